"""The whole life of a run in seconds: train, save, resume, sample, open it with Transformers. Run this one first."""
import json
import math
import shutil

import pytest
from llm_trainer import workspace
from llm_trainer.training.checkpoint import Checkpoints, weights_hash
from llm_trainer.config import load_config
from llm_trainer.generation.sampler import Sampling, generate, load_for_generation
from llm_trainer.training.recipe import train

pytestmark = pytest.mark.xdist_group("tiny")  # what they share is made once
PROMPT = "Return the"


@pytest.fixture(scope="module")
def space(tmp_path_factory): return workspace.init(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def events(space): return list(train("tiny", load_config("tiny"), dict(target_epochs=2), space))


@pytest.fixture(scope="module")
def best(space, events, tmp_path_factory):
    "A copy of the best checkpoint, which outlives the pruning of longer training"
    folder = Checkpoints(space.checkpoints / "tiny", "tiny").select("best")
    return shutil.copytree(folder, tmp_path_factory.mktemp("tiny") / "tiny" / folder.name)


def test_it_learns(events):
    losses = [e.loss for e in events if e.kind == "step"]
    assert events[-1].kind == "finished" and events[-1].status == "completed"
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5


def test_each_evaluation_follows_a_save(events):
    kinds = [e.kind for e in events if e.kind in ("saved", "evaluated")]
    assert "evaluated" in kinds and all(kinds[i - 1] == "saved" for i, k in enumerate(kinds) if k == "evaluated")


def test_bits_per_byte_and_perplexity_fit_the_loss(events):

    for e in events:
        if e.kind == "evaluated":
            assert math.isclose(e.perplexity, math.exp(e.loss)) and 0 < e.bits_per_byte < e.loss / math.log(2)


def test_a_checkpoint_is_whole_and_verifies(best):
    names = {str(p.relative_to(best)) for p in best.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "manifest.json", "state/optimizer.safetensors", "state/trainer.json"}
    from llm_trainer.training.checkpoint import verify
    assert verify(best) == []


def test_going_on_for_two_epochs_trains_exactly_two(space, events):
    meta = next(e.meta for e in events if e.kind == "prepared")
    more = list(train("tiny", load_config("tiny"), dict(target_epochs=4, lr_plan="redecay"), space, meta))
    steps = [e for e in more if e.kind == "step"]
    assert steps[0].step == [e for e in events if e.kind == "step"][-1].step + 1
    assert (steps[-1].epoch, more[-1].status) == (4.0, "completed")


def test_it_writes_text(best):
    model, tokenizer = load_for_generation(best)
    def write(seed):
        return "".join(p.text for p in generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=12, seed=seed)))
    assert write(1) == write(1) != write(2)


def test_transformers_opens_the_folder_and_writes_the_same(best):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, pieces = AutoModelForCausalLM.from_pretrained(best).eval(), AutoTokenizer.from_pretrained(best)
    model, tokenizer = load_for_generation(best, "cpu")
    ids = tokenizer.encode(PROMPT)
    assert pieces(PROMPT)["input_ids"] == ids
    ours = [p.token for p in generate(model, tokenizer, PROMPT,
                                      Sampling(max_new_tokens=20, temperature=0, ignore_eot=True))]
    with torch.no_grad():
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False,
                              pad_token_id=0)
    assert out[0, len(ids):].tolist() == [t for t in ours if t is not None]


def test_the_weights_hash_is_that_of_the_file(best):
    import hashlib
    assert weights_hash(best) == hashlib.sha256((best / "model.safetensors").read_bytes()).hexdigest()
    files = json.loads((best / "manifest.json").read_text())["files"]
    assert files["model.safetensors"]["sha256"] == weights_hash(best)


def test_a_new_run_starts_from_its_weights(space, events, best):
    "Whatever shape the profile names: model and tokenizer are those of the folder"
    config = load_config("tiny").replace(init_from=str(best), n_layer=3, lr=1e-4, warmup_steps=0)
    finer = list(train("finer", config, dict(target_epochs=1), space))
    first, scratch = (next(e.loss for e in run if e.kind == "step") for run in (finer, events))
    meta = next(e.meta for e in finer if e.kind == "prepared")
    assert first < scratch - 0.5 and meta["config"]["model"]["n_layer"] == 2


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_it_samples_while_training_in_bfloat16(space, arch):
    config = load_config("tiny").replace(arch=arch, dtype="bfloat16", max_steps=4, sample_every=2, eval_every=2)
    events = list(train(f"half-{arch}", config, dict(target_epochs=1, target_steps=4), space))
    sampled = [e for e in events if e.kind == "sampled"]
    assert [e.step for e in sampled] == [2, 4] and all(e.text for e in sampled)
