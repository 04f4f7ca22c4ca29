"""The parts of the writer and of the state, one by one, with clocks that a test sets."""
import math
import json
import os
import re
import select
import stat
import tempfile
import threading
import time
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import INSTEAD, instead
from torture.children import in_child

from llm_trainer.errors import NotFoundError, UsageError
from llm_trainer.runs import writer as w
from llm_trainer.runs.run import (
    check_id, create_run, find_run, last_of_each, list_runs, new_id, sweep, why_unknown)
from llm_trainer.runs.state import (
    ENDED, LIVE, STATES, State, derive, list_devices, look_of, proper, silence, slowest_of, stall_timeout, unheard)
from llm_trainer.system import process
from llm_trainer.system.files import (
    Appender, Follower, deliver, encode, file_hash, load_json, log_line, open_log, open_regular, open_to_add, overwrite,
    parse, plain, read_json, remove, replace_file, sealed, timestamp, unsealed, write_whole)
from llm_trainer.training.checkpoint import Checkpoints, StepFolders
from llm_trainer.errors import CheckpointError


@pytest.fixture
def run(tmp_path): return create_run(tmp_path / "runs", {"training": {"epochs": 2}}, "one", locked=True)


class Clock:
    "A clock that stands still until it is moved"
    def __init__(self, at=100.0): self.at = at
    def __call__(self): return self.at


# State

@pytest.mark.parametrize("phase, step_seconds, wanted", [
    ("training", None, 600), ("training", 0.1, 60), ("training", 6.0, 60), ("training", 7.0, 70), ("sampling", 7.0, 70),
    ("saving", 0.1, 600), ("evaluating", 7.0, 700), ("tokenizing", None, 6000), (None, 1.0, 600)])
def test_how_long_a_run_may_be_silent(phase, step_seconds, wanted):
    assert stall_timeout(State(phase=phase, step_seconds=step_seconds)) == wanted


def test_silence_is_measured_by_the_clock_that_both_share():
    here = process.boot_id()
    assert silence(State(progress_monotonic=5.0, boot_id=here, progress_at=1.0), wall=9e9, monotonic=12.0) == 7
    assert silence(State(progress_monotonic=5.0, boot_id="another", progress_at=1.0), wall=4.0, monotonic=12.0) == 3
    assert silence(State(progress_at=9.0), wall=4.0) == 0 == silence(State(progress_monotonic=9.0, boot_id=here),
                                                                   monotonic=4.0)
    assert silence(State(), wall=50.0) == 0
    assert silence(State(progress_at=time.time() - 1000)) > 999
    assert silence(State(progress_monotonic=time.monotonic() - 50, boot_id=here)) == pytest.approx(50, abs=20)


def test_what_is_true_of_a_stored_state():
    def now(status, locked, silent): return derive(State(status=status, phase="training", step_seconds=1.0,
                                                         progress_at=0.0), locked, wall=silent)
    for ended in ("completed", "stopped", "failed", "diverged"):
        assert now(ended, False, 0) == ended == now(ended, True, 1e9)
    assert now("running", True, 60) == "running" and now("running", True, 60.1) == "stalled"
    assert now("queued", True, 1e9) == "queued" and now("queued", False, 0) == "crashed"
    assert now("running", False, 0) == now(None, False, 0) == "crashed"
    assert look_of("odd") == look_of(None) == look_of("unknown")


def test_a_value_of_another_kind_is_not_taken():
    record = {"step": True, "epoch": 2, "loss": math.inf, "tokens": 2**63, "steps": 2**63 - 1, "pid": -(2**63),
              "status": 7, "loss_history": [1, 2.5, None, True, math.nan, "x"], "waiting_for": ["a", 1],
              "ranks": [{}, 1], "locked": True, "stored_status": "x", "odd": 1, "val_loss": None}
    assert proper(record) == {"epoch": 2, "steps": 2**63 - 1, "loss_history": [1, 2.5], "waiting_for": ["a"],
                              "ranks": [{}], "val_loss": None}
    assert "locked" not in State(locked=True).to_record() and State.from_record(record).tokens == 0


def test_which_states_are_live_and_which_are_ends():
    assert LIVE == ("running", "queued", "stalled")
    assert ENDED == ("completed", "stopped", "failed", "diverged", "crashed")
    with pytest.raises(FrozenInstanceError): STATES["running"].sign = "x"


def test_a_run_that_did_nothing_has_done_nothing():
    new = State()
    assert (new.attempt, new.epoch, new.step, new.tokens) == (0, 0, 0, 0)
    assert (new.elapsed_seconds, new.skipped, new.write_errors) == (0, 0, 0)
    assert unheard(State(heartbeat=9.0), wall=4.0) == 0 and unheard(State(heartbeat=4.0), wall=9.0) == 5


def test_ranks_that_are_equally_fast_are_not_worth_a_word():
    def told(waits): return slowest_of(State(status="running", ranks=[
        {"rank": 0, "step_seconds": 1.0, "waits": waits}, {"rank": 1, "step_seconds": 1.1, "waits": 0}]))
    assert told(0.049) == "" and told(0.05).endswith("rank 0 waits 5%")
    assert list_devices(["cpu", "cpu"], None) == "2 (cpu), ?" and "machines" in list_devices(["cpu"], "ddp", 2)


# The curve and the pace

def test_a_history_keeps_at_most_twice_as_many_means_and_joins_neighbours():
    history = w.History([], most=2)
    for step, loss in enumerate([1.0, None, 3.0, 5.0, 7.0], 1): history.add(step, loss)
    assert history.means == [[1.0, 1], [3.0, 1], [5.0, 1], [7.0, 1]] and history.points() == [2.0, 6.0]
    history.add(6, 9.0)
    assert history.means == [[2.0, 2], [6.0, 2], [9.0, 1]] and history.width == 2.0
    history.add(7, 20.0)  # step 7 begins the fourth stretch of two steps
    assert history.means[-1] == [20.0, 1]
    history.add(8, 40.0)
    assert history.means[-1] == [30.0, 2] and history.points() == [4.0, pytest.approx((9 + 20 + 40) / 3)]


def test_a_history_goes_on_from_where_the_attempt_begins():
    assert w.History([1.0, 2.0, 3.0, 4.0], 8, 4).points() == [1.0, 2.0]
    assert w.History([1.0, 2.0], 8, 8).points() == [1.0, 2.0] and w.History([1.0, 2.0], 8, 0).points() == []
    again = w.History([1.0, 2.0], 4, 4)
    again.add(4, 4.0)
    assert again.means == [[1.0, 1], [3.0, 2]]
    assert w.History([], 0, 0).most == 60 and w.History([1.0, 2.0], 2).points() == []
    assert w.History([1.0, 2.0]).width == 0 == w.History([], 8).width and w.History([1.0], 0).means == []


def test_the_pace_is_the_median_step_and_the_mean_speed():
    pace = w.Pace()
    assert pace.usual is None and pace.per_second is None
    for at in (0, 1, 11, 13, 16): pace.step(at)
    assert sorted(pace.durations) == [1, 2, 3, 10] and pace.usual == 3
    for at in range(17, 117): pace.step(at)
    assert len(pace.durations) == 51 and pace.usual == 1
    pace.log(100, 50.0)
    assert pace.per_second is None
    pace.log(200, None)
    pace.log(400, 20.0)
    assert pace.busy == 10.0 and pace.per_second == 30.0


# Files while it trains

def records(run, **more):
    clock = Clock()
    return w.RunWriter(run, run.lock, clock, Clock(1e9), **more), clock


def test_a_writer_leaves_no_descriptor(run):
    def open_files(): return sorted(os.listdir("/dev/fd"))
    before = open_files()
    writer, _ = records(run)
    for _ in range(2):
        writer.close()
        assert open_files() == before


def test_a_state_is_written_at_once_or_seldom(run):
    writer, clock = records(run)
    writer.update(status="running", phase="training")
    def seldom(step):
        writer.log(SimpleNamespace(kind="step", step=step, epoch=step / 10, tokens=8, loss=None, tokens_per_second=5.0,
                                   memory_bytes=1, eta_seconds=2.0))
        return run.state().step
    assert seldom(1) == 0
    clock.at += w.EVERY
    assert seldom(2) == 2 and seldom(3) == 2
    writer.update(phase="saving")
    assert run.state().step == 3 and run.state().phase == "saving" and run.state().eta_seconds == 2.0


def test_waiting_in_the_queue_is_no_training(run):
    writer, clock = records(run)
    clock.at += 1000
    writer.update(status="running")
    assert run.state().elapsed_seconds == 0
    clock.at += 5
    writer.update(phase="x")
    assert run.state().elapsed_seconds == 5
    writer.update(status="running")
    writer.finish("stopped")
    assert run.state().elapsed_seconds == 5 and run.state().heartbeat == 1e9
    again, clock = records(run)
    again.update(status="running")
    clock.at += 2
    again.update(phase="x")
    assert run.state().elapsed_seconds == 7


def test_a_run_that_ended_before_its_turn_did_not_train(run):
    writer, clock = records(run)
    clock.at += 1000
    writer.finish("stopped", "signal", "x" * 2000)
    state = run.state()
    assert state.elapsed_seconds == 0 and state.reason == {"code": "signal", "message": "x" * 1000}
    writer.finish("failed")
    assert run.state().status == "stopped"


def test_requests_are_looked_for_seldom_and_forgotten_when_done(run):
    writer, clock = records(run)
    assert writer.requests() == set()
    assert run.request("save") and not run.request("save")
    assert os.stat(run.folder / "control/save").st_mode & 0o777 == 0o600
    assert writer.requests() == set()
    clock.at += w.EVERY
    assert writer.requests() == {"save"} == writer.asked.seen and not writer.is_stopping
    writer.signals.add("stop")
    assert writer.requests() == {"save", "stop"} and writer.is_stopping and run.state().phase == "stopping"
    writer.acknowledge("save")
    assert run.asked() == set() and writer.asked.seen == {"stop"} and set(run.state().acknowledged) == {"stop", "save"}
    writer.acknowledge("stop")
    assert writer.asked.seen == set()


def test_a_stop_is_said_once_with_its_reason(run):
    writer, _ = records(run)
    writer.stopping()
    writer.stopping("again")
    assert [line.partition("stopping")[1:] for line in run.log_tail()] == [("stopping", ": asked to stop")]
    writer.log(SimpleNamespace(kind="phase", name="saving"))
    assert run.state().phase == "stopping" and len(run.log_tail()) == 1
    writer.log(SimpleNamespace(kind="phase", name="compiling"))
    assert run.log_tail()[-1].endswith(" compiling")


def test_what_a_new_attempt_begins_with(run):
    state = State(created_at=None, reason={"code": "x"}, ranks=[{}], waiting_for=["y"], eta_seconds=3.0)
    found = w.fresh(run, state, {"attempt": 4, "target_epochs": 3, "target_steps": 9})
    assert (found["attempt"], found["epochs"], found["steps"], found["run_id"]) == (4, 3, 9, "one")
    assert found["created_at"] == run.meta["created_at"] and found["reason"] is None and found["ranks"] == []
    assert w.fresh(run, State(created_at="then"), {})["attempt"] == 1
    assert w.fresh(run, State(created_at="then"), {})["created_at"] == "then"


def test_an_attempt_from_the_start_forgets_the_curve_before_it(run):
    write_whole(run.folder / "state.json", {**run.state().to_record(), "loss_history": [1.0, 2.0], "step": 2})
    assert records(run)[0].history.points() == []
    run.add_attempt(from_step=1)
    assert records(run)[0].history.points() == [1.0]


def test_the_best_of_several_validations_and_what_was_skipped(run):
    writer, _ = records(run)
    def evaluated(loss): writer.log(SimpleNamespace(kind="evaluated", step=1, epoch=0.1, tokens=8, loss=loss, parts=[],
                                                    perplexity=1.0, bits_per_byte=1.0))
    for loss in (3.0, 2.0, math.nan, 2.5): evaluated(loss)
    writer.log(SimpleNamespace(kind="skipped", step=2, what="loss"))
    writer.log(SimpleNamespace(kind="skipped", step=3, what="loss"))
    state = run.state()
    assert (state.val_loss, state.best_val_loss, state.skipped) == (2.5, 2.0, 2)
    assert "parts" not in run.metrics("val")[0] and run.log_tail(1)[0].endswith("step 3  skipped: loss")


def test_which_gpus_are_metered(run, monkeypatch):
    monkeypatch.setattr(w, "Meter", lambda gpus=(): gpus)
    def metered(kind, **attempt):
        writer = records(run)[0]
        writer.attempt = attempt
        writer.log(SimpleNamespace(kind="prepared", meta={"device": {"type": kind}}))
        return writer.energy
    assert metered("cuda", devices=["cuda:2"]) == (2,) and metered("cuda") == (0,) and metered("cpu") == ()


def test_the_line_of_a_step_and_an_end_without_the_lock(run):
    writer, _ = records(run)
    writer.update(steps=9)
    writer.log(SimpleNamespace(kind="step", step=3, epoch=0.5, tokens=8, loss=2.0, tokens_per_second=5.0, lr=0.1,
                               memory_bytes=1, eta_seconds=2.0, grad_norm=1.0))
    assert " step 3/9  epoch 0.50  loss 2.0000  5 tokens/s  2s left" in run.log_tail(1)[0]
    run.lock.release()
    writer.finish("stopped")
    assert run.state().status == "stopped"


def test_a_writer_that_is_closed_writes_nothing(run):
    writer, _ = records(run)
    writer.close()
    before = (run.folder / "state.json").read_bytes()
    writer.log(SimpleNamespace(kind="note", message="late"))
    writer.beat()
    writer.stopping()
    assert (run.folder / "state.json").read_bytes() == before and run.log_tail() == []


# Files

def test_records_become_plain_json():
    class Scalar:
        def item(self): return 1.5
    found = plain({1: [math.nan, math.inf, True, None, (2, {3})], "a": Scalar(), "b": "x\x1b[31my", "c": len, "d": 0.5})
    assert found["1"] == [None, None, True, None, [2, [3]]] and found["a"] == 1.5 and found["b"] == "xy"
    assert found["c"] == str(len) and found["d"] == 0.5
    assert encode({"a": "é\x07"}) == '{"format_version":1,"a":"é"}\n'.encode()
    assert encode({"a": "é\x07"}, exact=True) == b'{"format_version":1,"a":"\\u00e9\\u0007"}\n'


def test_a_full_disk_still_takes_a_state_of_the_same_size(tmp_path):
    path = tmp_path / "state.json"
    write_whole(path, {"text": "a long text that was here before"})
    size = path.stat().st_size
    overwrite(path, {"a": 1})
    assert path.stat().st_size == size and read_json(path) == {"format_version": 1, "a": 1}
    assert path.read_bytes().endswith(b" \n") and os.listdir(tmp_path) == ["state.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_objects_are_records(tmp_path):
    assert [parse(line) for line in (b"[1]", b"1", b"{", b"[" * 10**5, b'{"a": NaN}')] == [None] * 4 + [{"a": None}]
    for name, content in (("list", "[1]"), ("nan", '{"a": NaN}'), ("deep", "[" * 10**5), ("bytes", "\udcff")):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=name): load_json(tmp_path / name)
    (tmp_path / "large").write_text('{"a": 1}')
    assert load_json(tmp_path / "large", limit=8) == {"a": 1}
    with pytest.raises(CheckpointError, match="sensible size"): load_json(tmp_path / "large", limit=7)


def test_a_follower_begins_near_the_end_and_again_with_a_new_file(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"first\nsecond\nthird\n")
    def lines(tail): return Follower(path, bytes.decode, tail=tail).poll()
    assert lines(None) == ["first", "second", "third"] == lines(19) == lines(100)
    assert lines(6) == [] and lines(7) == ["third"] and lines(18) == ["second", "third"] and lines(0) == []
    follower = Follower(path, bytes.decode, limit=8)
    assert follower.poll() == ["first"] and follower.poll() == ["second"] and follower.poll() == ["third"]
    assert follower.poll() == []
    path.write_bytes(b"new\n")
    assert follower.poll() == ["new"]
    path.with_name("other").write_bytes(b"more\nand more\n")
    os.replace(path.with_name("other"), path)
    assert follower.poll() == ["more"] and follower.poll() == ["and more"]
    path.write_bytes(b"x" * 8)  # a line as long as what is read at once
    assert Follower(path, bytes.decode, limit=8).poll() == ["x" * 8]
    path.write_bytes(b"x" * 7)
    assert Follower(path, bytes.decode, limit=8).poll() == []


def test_a_line_of_a_log_is_the_last_state_of_a_progress_bar():
    assert log_line(b"10%\r20%\r\x1b[1m30%\x1b[0m\tx\r") == "30%\tx"


def test_moments_sort_as_text():
    assert timestamp(0) == "1970-01-01T00:00:00.000000Z" and timestamp(1.5) == "1970-01-01T00:00:01.500000Z"
    assert timestamp(3600 * 24 * 366 - 0.25) == "1971-01-01T23:59:59.750000Z"
    assert abs(time.time() - time.mktime(time.strptime(timestamp()[:19], "%Y-%m-%dT%H:%M:%S")) + time.timezone) < 100


# The run's folder

def test_a_run_shows_itself_in_a_notebook(run):
    run.lock.release()
    shown = run._repr_markdown_()
    assert "| step | 0 of ? |" in shown and "| loss | –  |" in shown and "| status | crashed  |" in shown
    write_whole(run.folder / "state.json", {**run.state().to_record(), "status": "stopped", "step": 3, "steps": 9,
                                            "phase": "saving", "val_loss": 1.25})
    shown = run._repr_markdown_()
    assert "| step | 3 of 9 |" in shown and "| validation loss | 1.25 |" in shown and "stopped saving" in shown


def test_what_a_run_is_called_and_where_it_may_be_made(tmp_path, monkeypatch):
    assert all(re.fullmatch("[a-z]+-[a-z]+-[0-9a-f]{4}", new_id()) for _ in range(9))
    assert len({new_id() for _ in range(9)}) == 9
    assert create_run(tmp_path / "deep" / "runs", {}).id.count("-") == 2
    ids = iter(["twice", "twice", "once"])
    monkeypatch.setattr("llm_trainer.runs.run.new_id", lambda: next(ids))
    assert [create_run(tmp_path, {}).id for _ in range(2)] == ["twice", "once"]


def test_what_may_not_be_known_is_unknown(run, monkeypatch):
    monkeypatch.setattr("llm_trainer.runs.run.locks.probe", lambda path: None)
    assert why_unknown(run.folder) == ("denied", "permission denied")
    write_whole(run.folder / "state.json", {**run.state().to_record(), "status": "completed"})
    assert why_unknown(run.folder) is None


@pytest.mark.parametrize("name, value", [
    ("meta.json", {"config": None}), ("meta.json", {"config": {"model": 7}}),
    ("attempts.jsonl", {"changed": None}), ("attempts.jsonl", {"changed": {"lr": 1}})])
def test_settings_are_what_is_of_its_kind(run, name, value):
    run.add_attempt(from_step=0)
    known, path = run.settings(), run.folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **value}) + "\n")
    assert run.settings() == ({} if name == "meta.json" else known)
    assert run.damage() == (None if value == {"changed": None} else f"{name} ({next(iter(value))})")


def test_a_note_has_a_word_and_a_log_a_reason(run):
    run.add_note("one")
    run.add_note("two")
    assert (run.folder / "notes.txt").read_text() == "one\ntwo\n"
    with pytest.raises(UsageError, match="word at least"): run.add_note(" \n ")
    run.require("train.log")
    (run.folder / "train.log").mkdir()
    with pytest.raises(CheckpointError, match="train.log of .*: not a regular file"): run.require("train.log")
    (run.folder / "train.log").rmdir()
    (run.folder / "train.log").write_text("begun\n")
    assert run.follow_log().poll() == ["begun"]
    assert run.add_attempt(lr=1)["attempt"] == 1


def test_the_last_lines_of_a_log(run):
    (run.folder / "train.log").write_text("".join(f"line {i}\n" for i in range(3000)))
    assert run.log_tail() == [f"line {i}" for i in range(2980, 3000)]
    assert run.log_tail(0) == [] and run.log_tail(1) == ["line 2999"] and len(run.log_tail(2000)) == 2000
    (run.folder / "train.log").write_text("x" * 4400 + "\nend\n")
    assert run.log_tail(2)[-1] == "end" and len(run.log_tail(2)[0]) == 4400


def test_notes_are_whole_lines(run):
    run.add_note("first\nline")
    with open(run.folder / "notes.txt", "a") as f: f.write("by hand, no newline")
    run.add_note("last")
    assert run.notes().splitlines()[-2:] == ["by hand, no newline", "last"] and "first" in run.notes()
    assert os.stat(run.folder / "notes.txt").st_mode & 0o777 == 0o600


def test_a_name_that_several_runs_begin_with(tmp_path):
    for i in range(8): create_run(tmp_path, {}, f"a{i}")
    def said():
        with pytest.raises(UsageError) as e: find_run(tmp_path, "a")
        return str(e.value)
    assert "any of 8 runs" in said() and "…" not in said() and "a7" in said()
    create_run(tmp_path, {}, "a8")
    assert "any of 9 runs" in said() and " …" in said()
    assert sum(f"a{i}" in said() for i in range(9)) == 8
    assert find_run(tmp_path, "a3").id == "a3" and find_run(tmp_path).id == "a8" and len(list_runs(tmp_path)) == 9
    with pytest.raises(NotFoundError, match="did you mean a1"): find_run(tmp_path, "a1x")
    with pytest.raises(UsageError) as e: check_id("A" * 100)
    assert f"'{'A' * 80}'" in str(e.value)
    assert len({new_id() for _ in range(50)}) > 40 and all(check_id(new_id()) for _ in range(50))


def test_the_time_of_a_row_and_a_reason_without_a_code(run):
    writer = w.RunWriter(run, run.lock, Clock(), Clock(1e9 + 0.12345))
    writer.log(SimpleNamespace(kind="step", step=1, epoch=0.1, tokens=8, loss=1.0, tokens_per_second=5.0, lr=0.1,
                               memory_bytes=1, eta_seconds=2.0, grad_norm=1.0))
    assert run.metrics()[0]["time"] == 1e9 + 0.123
    writer.finish("failed", None, "why")
    assert run.state().reason == {"code": None, "message": "why"}


def test_what_is_in_a_records_text_stays_to_the_letter(run):
    run.complete_meta(data={"name": "a\x07\u202eb"})
    assert run.meta["data"]["name"] == "a\x07\u202eb" and b"\\u0007" in (run.folder / "meta.json").read_bytes()


def test_a_run_without_a_state_is_unknown(run):
    (run.folder / "state.json").unlink()
    assert run.status().status != "unknown"  # a process has it, and will write it again
    run.lock.release()
    assert (run.status().status, run.status().reason["code"]) == ("unknown", "damaged")


def test_folders_half_made_are_swept_after_an_hour(tmp_path):
    for name, age in ((".new-old", 3700), (".new-young", 3500), (".gone-x", 0), ("run", 9999), (".queue", 9999)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".new-young", ".queue", "run"]
    (tmp_path / ".new-link").symlink_to(tmp_path / "nowhere")
    os.utime(tmp_path / ".new-link", (1e9, 1e9), follow_symlinks=False)
    sweep(tmp_path)
    assert not (tmp_path / ".new-link").is_symlink()
    sweep(tmp_path / "nowhere")


def test_links_are_followed_only_where_one_says_so(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    for read in (load_json, file_hash):
        with pytest.raises((OSError, CheckpointError)): read(tmp_path / "link")
        assert read(tmp_path / "link", follow=True) == read(tmp_path / "a.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "door").symlink_to(tmp_path / "folder")
    remove(tmp_path / "door")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder", "link"]
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "link"]


@instead
def test_what_lies_in_the_way_of_a_record_is_removed_without_a_wait(tmp_path, instead):
    for name in ("at", ".x.json.tmp", ".x.json.new"): instead(tmp_path / name)
    remove(tmp_path / "at", quiet=False)
    write_whole(tmp_path / "x.json", {"a": 1})
    replace_file(tmp_path / "x.json", b'{"a": 2}')
    assert os.listdir(tmp_path) == ["x.json"] and read_json(tmp_path / "x.json") == {"a": 2}


@pytest.mark.parametrize("kind", ["pipe", "loop", "link", "folder", "device"])
def test_only_a_regular_file_is_read_or_written(run, tmp_path, kind):
    at = Path("/dev/null") if kind == "device" else tmp_path / "at"
    if kind != "device": INSTEAD[kind](at)
    for act in (open_regular, open_to_add, lambda at: overwrite(at, {"a": 1}), lambda at: Appender(at).write(b"x")):
        with pytest.raises(OSError): act(at)
    with open_log(at) as nowhere: nowhere.write(b"lost")
    (run.folder / "notes.txt").unlink(missing_ok=True)
    if kind != "device": os.rename(at, run.folder / "notes.txt")
    elif os.geteuid() == 0: os.mknod(run.folder / "notes.txt", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else: return
    with pytest.raises(OSError): run.add_note("kept?")


def test_what_is_delivered_is_whole_and_keeps_its_mode(tmp_path):
    at, link = tmp_path / "text", tmp_path / "link"
    link.symlink_to("text")
    deliver(at, b"the old text")
    at.chmod(0o640)
    deliver(link, b"new")
    assert at.read_bytes() == b"new" and stat.S_IMODE(at.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [link, at] and link.is_symlink()


def test_who_can_not_be_delivered_to_is_named(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    for at, why in (pipe, "Nobody reads it"), (tmp_path / "no" / "text", "No such file"), (tmp_path, "Is a directory"):
        with pytest.raises(OSError, match=why) as said: deliver(at, b"text")
        assert said.value.filename == str(at)
    if Path("/dev/full").exists():
        with pytest.raises(OSError) as said: deliver(Path("/dev/full"), b"text")
        assert said.value.filename == "/dev/full"


def test_who_reads_a_pipe_late_gets_all_of_it(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    writer = threading.Thread(target=deliver, args=(pipe, b"text" * 100_000))
    writer.start()
    os.set_blocking(reader.fileno(), True)
    select.select([reader], [], [])  # until something is there: before, to read is to be at the end
    with reader: assert reader.readall() == b"text" * 100_000
    writer.join()


def test_a_file_of_ours_in_a_folder_of_others_is_written_in_place():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        at = Path(folder, "text")
        at.write_text("the old text")
        if os.geteuid() == 0: os.chown(at, 65534, 65534)
        else: os.chmod(folder, 0o555)
        def deliver_as_its_owner():
            if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)
            for content in (b"new", b""):
                deliver(at, content)
                assert at.read_bytes() == content
        ended = in_child(deliver_as_its_owner)
        assert ended.code == 0 and os.listdir(folder) == ["text"], ended.said
        os.chmod(folder, 0o755)


def test_a_seal_holds_no_number_that_is_none(tmp_path):
    assert sealed({"b": 1, "a": 2}).startswith(b'{\n "a": 2,\n "b": 1,\n "digest": "')
    with pytest.raises(ValueError): sealed({"a": math.nan})
    (tmp_path / "x").write_bytes(sealed({"b": 1, "a": [1.5]}))
    assert unsealed(tmp_path / "x") == {"b": 1, "a": [1.5]} and sealed({"b": 1, "a": 2}) == sealed({"a": 2, "b": 1})
    (tmp_path / "x").write_bytes(sealed({"b": 1, "a": [1.5]}).replace(b"1.5", b"1.6"))
    with pytest.raises(CheckpointError, match="changed after"): unsealed(tmp_path / "x")


def test_steps_of_any_length(tmp_path):
    for name in ("step-00000005", "step-12345678", "step-123456789", "step-1234567", ".tmp-step-00000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").touch()
    assert StepFolders(tmp_path, "x").steps() == [5, 12345678, 123456789]
    assert StepFolders(tmp_path / "nowhere", "x").steps() == []


def test_a_save_wants_room_for_as_much_as_the_last_one_took(tmp_path, monkeypatch):
    store, wanted = Checkpoints(tmp_path / "x", "x"), []
    monkeypatch.setattr(store, "require_space", wanted.append)
    def write(folder): (folder / "model.safetensors").write_bytes(b"weights")
    for step in (1, 2): store.save(step, write)
    store.save(3, write, size=99)
    assert wanted == [0, 7, 99]


def test_the_last_row_of_each_step_counts():
    rows = [{"step": 2, "kind": "train", "x": 1}, {"step": 1, "kind": "train", "x": 2}, {"step": 2, "kind": "train",
            "x": 3}, {"step": "2", "kind": "train"}, {"kind": "train"}]
    assert [row["x"] for row in last_of_each(rows, step=int, kind=str)] == [2, 3]


def test_a_torn_line_is_told_and_mended_by_the_next(tmp_path, monkeypatch):
    file, real = Appender(tmp_path / "x.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with pytest.raises(OSError, match="only part"): file.write(b'{"a": 1}\n')
    monkeypatch.undo()
    file.write(b'{"b": 2}\n')
    assert (tmp_path / "x.jsonl").read_bytes() == b'{"a\n{"b": 2}\n'
    file.close()
    file.close()
