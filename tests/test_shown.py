"""What is shown is true: means instead of single batches, one rounding, the whole run in its sparkline, honest ETAs."""
import json
import math

import pytest

from llm_trainer.events import Evaluated, Finished, Phase, Saved, Step
from llm_trainer.runs.run import create_run
from llm_trainer.runs.state import State
from llm_trainer.runs.writer import History, RunWriter
from llm_trainer.terminal import count, number, sparkline


def test_numbers_are_rounded_once():
    assert count(9465.4) == "9.47k" and count(9464.6) == "9.46k" and count(999.7) == "1k" and count(999_700) == "1M"
    assert count(1_234_567) == "1.23M" and count(0) == "0" and count(7.0) == "7" and count(999) == "999"
    assert number(2.30259) == "2.3026" and number(None) == "–" and number(float("nan")) == "–"
    assert number(1e-7) == "1.0e-07"


def test_a_little_curve_shows_the_whole_run():
    history = History([])
    for step in range(10, 20_001, 10): history.add(step, 5.2 + math.exp(-step / 3000))
    points = history.points()
    assert 30 <= len(points) <= 60 and points[0] > 6.0 and points[-1] < 5.21 and points == sorted(points, reverse=True)
    gaps = [a - b for a, b in zip(points, points[1:])]
    # evenly over the steps: it falls first and then is flat
    assert max(gaps[len(gaps) // 2:]) < max(gaps[:len(gaps) // 2])
    again = History(points, 20_000, 10_000)  # resumed from the middle: what came after it is gone
    again.add(10_010, 5.3)
    assert len(again.points()) == pytest.approx(len(points) / 2 + 1, abs=1)
    bars = sparkline([7.0] * 30 + [1.0] * 30, 10)
    assert len(bars) == 10 and bars[:5] == "█" * 5 and bars[5:] == "▁" * 5


def test_the_speed_of_an_ended_run_is_its_mean(tmp_path):
    run = create_run(tmp_path / "runs", {}, name="fast", locked=True)
    writer = RunWriter(run, run.lock)
    writer.log(Phase("training"))
    for i, speed in enumerate((100.0, 3000.0, 1000.0, 1500.0)):  # the first stretch holds the warming up
        writer.log(Step(i + 1, 0.1, (i + 1) * 6000, 1e-3, 3.0, 1.0, speed, 1, 9.0))
    writer.log(Finished("completed"))
    run.lock.release()
    assert run.state().tokens_per_second == pytest.approx(18_000 / (2 + 6 + 4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A tiny run's events with every step logged, and with every fifth"
    from llm_trainer import workspace
    from llm_trainer.config import load_config
    from llm_trainer.training.recipe import train
    space, found = workspace.init(tmp_path_factory.mktemp("shown")), {}
    for every in (1, 5):
        config = load_config("tiny", {"log_every": every, "max_steps": 12, "eval_every": 6, "device": "cpu",
                                      "sample_every": 0})
        attempt = {"target_epochs": 9, "target_steps": 12}
        found[every] = list(train(f"every-{every}", config, attempt, space, {}, set))
    return found


def test_the_loss_shown_is_the_mean_since_the_last_log(trained):
    losses = {every: {e.step: e.loss for e in events if isinstance(e, Step) and e.loss is not None} for every,
              events in trained.items()}
    assert list(losses[5]) == [5, 10, 12]
    def mean(first, last): return sum(losses[1][i] for i in range(first, last + 1)) / (last - first + 1)
    for step, first in ((5, 1), (10, 6), (12, 11)): assert losses[5][step] == pytest.approx(mean(first, step), rel=1e-6)


def test_the_time_left_holds_the_last_evaluation_and_save(trained):
    steps = [e for e in trained[1] if isinstance(e, Step)]
    kinds = [e.kind for e in trained[1] if isinstance(e, (Step, Evaluated, Saved))]
    assert kinds[-3:] == ["step", "saved", "evaluated"] and steps[-1].eta_seconds == 0
    spent = {e.step: e.seconds for e in trained[1] if isinstance(e, Saved)}
    # after one evaluation and save, one more of each is to come
    assert steps[6].step == 7 and steps[6].eta_seconds > spent[6]


def test_a_resume_plan_says_both_numbers_and_what_its_learning_rates_are():
    from llm_trainer.runs.launch import ResumePlan
    plan = ResumePlan("owl", "stopped", 40, 2.0, 7, None, lr_before=2.68e-05, lr_after=0.003, left=3.0, more=2)
    said = str(plan)
    assert "epoch 7: 3 left + 2 more" in said and "2.68e-05 in the last step, 0.003 in the next" in said
    assert "112 times" in said
    assert "times" not in str(ResumePlan("owl", "stopped", 40, 2.0, 5, None, lr_before=0.003, lr_after=0.003))


def test_more_epochs_and_epochs_together_are_refused(tmp_path):
    from llm_trainer import workspace
    from llm_trainer.config import load_config
    from llm_trainer.errors import UsageError
    from llm_trainer.runs.launch import plan_resume
    space = workspace.init(tmp_path)
    run = create_run(space.runs, load_config("tiny", {}).to_dict(), name="both")
    run.add_attempt(from_step=0, target_epochs=4, target_steps=None, changed={}, lr_plan=None)
    (run.folder / "state.json").write_text(json.dumps({"status": "stopped", "step": 10, "epoch": 1.0, "epochs": 4}))
    with pytest.raises(UsageError, match="--epochs 20"): plan_resume(run, space, 1, changes={"epochs": 20})
    plan = plan_resume(run, space, 2)
    assert (plan.left, plan.more, plan.target_epochs) == (4.0, 2, 6)  # nothing was saved, so all four are left


def test_every_face_says_in_the_same_words_which_devices_and_who_waits(tmp_path):
    from llm_trainer import workspace
    from llm_trainer.cli import render
    from llm_trainer.events import Joined, Prepared
    from llm_trainer.notebook.words import headline
    from llm_trainer.runs.state import devices_of, slowest_of
    from llm_trainer.tui.readers import row_of
    run = create_run(workspace.init(tmp_path).runs, {}, name="pair", locked=True)
    writer = RunWriter(run, run.lock)
    def faces():
        "What status, the watcher and the notebook's view show"
        state, row = run.status(), row_of(run, 0)
        return render.card(state, {}), f"{row.devices}\n{row.slowest}", headline(state)
    def step(n, *seconds): writer.log(Step(n, 0.1, n, 1e-3, 3.0, 1.0, 100.0, 1, 9.0, rank_seconds=seconds))
    ranks = [dict(rank=r, host="here", pid=1, device="cpu", step_seconds=None) for r in (0, 1)]
    writer.log(Prepared(dict(device="cpu", strategy="ddp")))
    writer.log(Joined(ranks))
    writer.log(Phase("training"))
    assert all("2 (cpu), ddp" in face and "slowest" not in face for face in faces())
    step(1, 30.0, 40.0)
    writer.file.write()
    told = "rank 1 is the slowest, 40 s a step of its own; rank 0 waits 25%"
    assert all("2 (cpu), ddp" in face and told in face for face in faces())
    assert [(rank["step_seconds"], rank["waits"]) for rank in run.status().ranks] == [(30.0, 0.25), (40.0, 0.0)]
    step(2, 39.0, 40.0)
    writer.file.write()
    assert all("2 (cpu), ddp" in face and "slowest" not in face for face in faces())  # as good as equal
    step(3, 30.0, 40.0)
    writer.log(Finished("stopped"))
    run.lock.release()
    assert all("2 (cpu), ddp" in face and "slowest" not in face for face in faces())  # nobody waits any more
    many = [dict(rank=r, host=f"node-{r // 2}", device=f"cuda:{r % 2}", step_seconds=1 + r / 4, waits=0.6 - r / 5)
            for r in range(4)]
    state = State(status="running", strategy="fsdp", ranks=many)
    assert devices_of(state) == "4 on 2 machines (cuda:0, cuda:1), fsdp"
    assert slowest_of(state) == "rank 3 on node-1 is the slowest, 1.75 s a step of its own; rank 0 on node-0 waits " \
                                "longest, 60%"
    for wrong in (None, "x", True, float("nan"), [], {}):
        state.ranks[0]["waits"] = state.ranks[1]["step_seconds"] = wrong
        assert "node-0" not in slowest_of(state) and devices_of(state)
    assert devices_of(State(ranks=many[:1])) == slowest_of(State(status="running", ranks=many[:1])) == ""


def test_the_card_of_a_run_that_another_machine_has_says_what_helps():
    from llm_trainer.cli.render import card
    far = dict(run_id="pair", host="far-away", boot_id="another", pid=7, heartbeat=1.0)
    assert "nothing is heard of far-away; if that machine is gone: llm-trainer resume pair" in card(
        State(status="stalled", **far))
    held = "a process of it still holds its lock; end it on far-away: llm-trainer stop pair --now"
    lost = State(status="failed", reason=dict(code="rank_lost", message="Rank 0 on far-away …"), **far)
    assert held not in card(lost)
    lost.locked = True
    assert held in card(lost)
    assert held not in card(State(status="failed", locked=True, run_id="pair"))  # it is about to end
    assert "batch-size" in card(State(status="failed", reason=dict(code="oom"), **far))
