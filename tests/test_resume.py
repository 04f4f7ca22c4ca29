"""Resume is exact: every loss the same hex float and the same weights hash as the run never stopped."""
import json
import math
import shutil

import pytest
from llm_trainer import workspace
from llm_trainer.training.checkpoint import Checkpoints, weights_hash
from llm_trainer.config import load_config
from llm_trainer.errors import CheckpointError, UsageError
from llm_trainer.training.recipe import train

pytestmark = pytest.mark.xdist_group("resume")  # what they share is made once

@pytest.fixture(scope="module")
def space(tmp_path_factory): return workspace.init(tmp_path_factory.mktemp("workspace"))


def settings(**changes): return load_config("tiny").replace(sample_every=0, **changes)


def stop_after(steps: int):
    "Asks for a stop once `steps` steps are done: the trainer asks once before its first step and once after each"
    asked = iter(range(10**9))
    return lambda: {"stop"} if next(asked) >= steps else set()


class Life:
    "One run that may be lived in several pieces"
    def __init__(self, space, name, config, epochs):
        self.space, self.name, self.config, self.epochs, self.meta, self.losses = space, name, config, epochs, None, []
        self.heard = []

    def live(self, requests=set, **attempt):
        events = list(train(self.name, self.config, dict(target_epochs=self.epochs, **attempt), self.space, self.meta,
                            requests, self.heard.append))
        self.meta = next(e.meta for e in events if e.kind == "prepared")
        self.losses += [e.loss.hex() for e in events if e.kind == "step"]
        return events

    @property
    def weights(self): return weights_hash(Checkpoints(self.space.checkpoints / self.name, self.name).select("latest"))


CASES = {
    "all at once": dict(dropout=0.1, batch_size=4, grad_accum_steps=2, schedule="wsd", shuffle=False, grad_clip=0.1),
    "muon": dict(arch="qwen3", optimizer="muon"), "workers": dict(num_workers=2),
}
ALONE = {
    "bfloat16": dict(dtype="bfloat16"),  # takes long where the CPU has no instructions for it
    "gpt2": {}, "qwen3": dict(arch="qwen3"), "dropout": dict(dropout=0.1),
    "accumulation": dict(batch_size=2, grad_accum_steps=4),
    "both": dict(dropout=0.1, batch_size=4, grad_accum_steps=2),
    "wsd": dict(schedule="wsd"), "in order": dict(shuffle=False), "clipped": dict(grad_clip=0.1),
}
ALL = CASES | ALONE


@pytest.fixture(scope="module")
def whole(space):
    "The run never stopped, by case; made once"
    made = {}
    def get(case, epochs=1):
        key = case, epochs
        if key not in made:
            made[key] = Life(space, f"whole-{len(made)}", settings(eval_every=0, save_every=0, **ALL[case]), epochs)
            made[key].live()
        return made[key]
    return get


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in ALONE)])
def test_stopped_in_the_middle_of_an_epoch(space, whole, case):
    reference = whole(case)
    life = Life(space, f"cut-{list(ALL).index(case)}", reference.config, 1)
    assert life.live(stop_after(11))[-1].status == "stopped"
    assert life.live()[-1].status == "completed"
    assert (life.losses, life.weights) == (reference.losses, reference.weights)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_compiled_run_drops_out_as_before(space, arch):
    config = settings(eval_every=0, save_every=0, dropout=0.2, compile=True, deterministic=True, arch=arch)
    whole, cut = Life(space, f"whole-{arch}", config, 1), Life(space, f"cut-{arch}", config, 1)
    whole.live()
    cut.live(stop_after(4))
    cut.live()
    assert len(whole.losses) > 4 and (cut.losses, cut.weights) == (whole.losses, whole.weights)


@pytest.mark.parametrize("steps", [0, pytest.param(1, marks=pytest.mark.slow), "epoch end", "last"])
def test_stopped_at_the_edges(space, whole, steps):
    reference = whole("dropout", 2)
    n = {"epoch end": len(reference.losses) // 2, "last": len(reference.losses) - 1}.get(steps, steps)
    life = Life(space, f"edge-{n}", reference.config, 2)
    life.live(stop_after(n))
    life.live()
    assert (life.losses, life.weights) == (reference.losses, reference.weights)


def test_ten_stops_in_one_epoch(space, whole):
    reference = whole("both")
    life = Life(space, "chained", reference.config, 1)
    for _ in range(10): life.live(stop_after(3))
    life.live()
    assert (life.losses, life.weights) == (reference.losses, reference.weights)


@pytest.mark.slow
def test_three_epochs_stopped_in_the_second(space, whole):
    reference = whole("gpt2", 3)
    life = Life(space, "three", reference.config, 3)
    life.live(stop_after(len(reference.losses) // 2))
    life.live()
    assert life.weights == reference.weights


def test_evaluating_sampling_and_saving_change_nothing(space, whole):
    busy = Life(space, "busy", load_config("tiny").replace(dropout=0.1, eval_every=5, sample_every=3, save_every=2), 1)
    busy.live()
    assert (busy.losses, busy.weights) == (whole("dropout").losses, whole("dropout").weights)


def test_an_owed_evaluation_is_made_up_for(space):
    life = Life(space, "owed", settings(eval_every=10, save_every=0), 1)
    events = train("owed", life.config, dict(target_epochs=1), space)
    life.meta = next(e.meta for e in events if e.kind == "prepared")
    assert next(e.step for e in events if e.kind == "saved") == 10
    events.close()  # the process dies between the save and its evaluation
    assert next(e.step for e in life.live() if e.kind == "evaluated") == 10


def test_patience_ends_a_resumed_run_where_it_ends_the_whole_one(space):
    config = settings(eval_every=2, save_every=0, patience=2, lr=1e-9, min_lr=0)
    whole = Life(space, "patient", config, 1)
    assert whole.live()[-1].code == "patience"
    life = Life(space, "impatient", config, 1)
    events = train("impatient", config, dict(target_epochs=1), space)
    life.meta = next(e.meta for e in events if e.kind == "prepared")
    last = len(whole.losses)
    assert next(e.step for e in events if e.kind == "saved" and e.step == last) == last
    events.close()  # dies before the evaluation that would have ended it
    assert life.live()[-1].code == "patience" and life.weights == whole.weights
    life.epochs = 2
    assert len([e for e in life.live() if e.kind == "step"]) >= 4  # more epochs, patience anew


def test_changed_text_is_refused_also_before_the_first_checkpoint(space):
    text = space.root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    life = Life(space, "unsaved", settings(dataset=str(text), tokenizer="byte"), 1)
    events = train("unsaved", life.config, dict(target_epochs=1), space)
    life.meta = next(e.meta for e in events if e.kind == "prepared")
    events.close()
    text.write_text("the slow brown fox creeps under the busy dog. " * 400)
    with pytest.raises(UsageError, match="data changed"): life.live()
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    assert life.live()[-1].status == "completed"


def test_each_text_of_a_mix_is_validated_on_its_own(space):
    text = space.root / "short.txt"
    text.write_text("abc " * 3000)
    mix = [dict(name="python-docs-tiny", weight=1), dict(name=str(text), weight=1)]
    life = Life(space, "mix", settings(dataset=mix, tokenizer="byte", eval_every=10, max_steps=20), 1)
    events = life.live(target_steps=20)
    last = [e for e in events if e.kind == "evaluated"][-1]
    (docs, a), (short, b) = last.parts
    assert (docs, short) == ("python-docs-tiny", "short.txt") and min(a, b) < last.loss < max(a, b) and b < a
    whole = [e for e in Life(space, "one", settings(eval_every=10), 1).live(target_steps=10) if e.kind == "evaluated"]
    assert whole and not whole[-1].parts


def test_what_makes_a_resume_inexact_is_named(space):
    life = Life(space, "elsewhere", settings(eval_every=0), 1)
    life.live(stop_after(3))
    life.meta["resolution"]["torch_version"] = "2.9.0"
    life.live()
    notes = [e.message for e in life.heard if e.kind == "note"]
    assert any("may differ in the last bits" in n and "PyTorch: 2.9.0 then" in n for n in notes)


def test_another_tokenizer_is_refused(space, whole):
    reference = whole("gpt2")
    meta = dict(reference.meta, tokenizer_hash="0" * 64)
    with pytest.raises(UsageError, match="tokenizer"):
        list(train(reference.name, reference.config, dict(target_epochs=2), space, meta))


def test_a_probe_that_differs_is_refused(space):
    "A checkpoint that verifies, but whose next batch has another loss by the smallest amount"
    life = Life(space, "probe", settings(eval_every=0), 1)
    life.live(stop_after(5))
    store = Checkpoints(space.checkpoints / "probe", "probe")
    saved = shutil.move(store.select("latest"), space.root / "saved")
    record = json.loads((saved / "state/trainer.json").read_text())
    record["probe"] = math.nextafter(float.fromhex(record["probe"]), math.inf).hex()
    (saved / "state/trainer.json").write_text(json.dumps(record))
    (saved / "manifest.json").unlink()
    store.save(record["step"], lambda folder: shutil.copytree(saved, folder, dirs_exist_ok=True) and None)
    with pytest.raises(CheckpointError, match="can't be resumed exactly"): life.live()


def test_gone_token_files_are_made_again_identically(space, whole):
    reference = whole("gpt2", 2)
    life = Life(space, "gone", reference.config, 2)
    life.live(stop_after(20))
    for name in life.meta["data"]["caches"]: shutil.rmtree(space.data / name)
    life.live()
    assert life.weights == reference.weights
