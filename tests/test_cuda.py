"""A GPU from end to end: a compiled run at GPT-2's smallest shape that learns, resumes to the bit and writes."""
import gc
import math

import pytest
import torch
from test_resume import Life, stop_after

from llm_trainer import workspace
from llm_trainer.training.checkpoint import Checkpoints
from llm_trainer.config import load_config
from llm_trainer.model.cost import memory_estimate
from llm_trainer.generation.sampling import Sampling
from llm_trainer.generation.sampler import generate, load_for_generation

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def space(tmp_path_factory): return workspace.init(tmp_path_factory.mktemp("workspace"))


def gpt2_124m(steps, **changes):
    "The profile at a batch of 16,384 tokens, on the code that lies inside every Python"
    return load_config("gpt2-124m").replace(**dict(
        dataset="python-code", dataset_config=None, vocab_size=16_384, val_fraction=0.05, batch_size=16,
        grad_accum_steps=1,
        max_steps=steps, warmup_steps=50, eval_batches=8, eval_every=0, save_every=0, save_minutes=0, sample_every=0,
        log_every=1) | changes)


def test_124m_learns_and_writes(space):
    life = Life(space, "learns", gpt2_124m(300), 100)
    events = life.live(target_steps=300)
    validation = [e for e in events if e.kind == "evaluated"][-1]
    assert events[-1].status == "completed" and validation.loss < 6 < 9 < float.fromhex(life.losses[0])
    model, tokenizer = load_for_generation(Checkpoints(space.checkpoints / "learns", "learns").select("best"))
    pieces = list(generate(model, tokenizer, "import ", Sampling(max_new_tokens=50, seed=1)))
    assert model.head.is_cuda and len(pieces) > 1


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3", n_head=6, head_size=128, optimizer="muon"),
                                     dict(dtype="float16", dropout=0.1),
                                     dict(dtype="float32", batch_size=4, grad_accum_steps=2, compile=False)],
                         ids=["gpt2", "qwen3 muon", "float16 scaler dropout", "float32 eager accumulation"])
def test_resumes_to_the_bit_when_deterministic(space, request, changes):
    name = request.node.callspec.id.replace(" ", "-")
    config = gpt2_124m(40, **dict(deterministic=True, n_layer=6) | changes)
    whole, cut = Life(space, f"whole-{name}", config, 100), Life(space, f"cut-{name}", config, 100)
    whole.live(target_steps=40)
    cut.live(stop_after(23), target_steps=40)
    cut.live(target_steps=40)
    assert len(cut.losses) == 40 and (cut.losses, cut.weights) == (whole.losses, whole.weights)


def test_a_step_that_is_not_finite_is_told_a_step_later(space):
    from test_trainer import trainer
    t = trainer(steps=6, device="cuda", compile=False, log_every=0)
    t.model.cuda()
    t.stepper.recorder = None  # a recorded one is in test_fast
    real, calls = t.stepper.loss, iter(range(100))
    t.stepper.loss = lambda *a, **k: real(*a, **k) * (math.nan if next(calls) == 2 else 1)
    told = [(e.kind, e.step) for e in t if e.kind in ("step", "skipped")]
    assert told.index(("skipped", 3)) == told.index(("step", 3)) + 1 and t.state.skipped == 1
    assert all(torch.isfinite(p).all() for p in t.model.parameters())


@pytest.mark.parametrize("profile", ["small", "medium", "gpt2-124m"])
def test_memory_is_as_foretold(profile):
    from llm_trainer.data.batches import Stream, Windows
    from llm_trainer.device import resolve
    from llm_trainer.model.transformer import GPT
    from llm_trainer.training.optimizer import LRSchedule, build_optimizer
    from llm_trainer.training.trainer import Trainer
    config = load_config(profile).replace(log_every=0, eval_every=0, save_every=0, save_minutes=0, sample_every=0,
                                          grad_accum_steps=1)
    t, vocab = config.training, config.data.vocab_size
    resolution = resolve(t)
    device = resolution.apply()
    gc.collect()  # what earlier tests left is not this one's
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = GPT(config.model, vocab).to(device)
    stream = Stream(Windows(torch.randint(vocab, (400_000,)).numpy().astype("uint16"), config.model.seq_len),
                    t.batch_size)
    for _ in Trainer(model, build_optimizer(model, t), LRSchedule.from_config(t, 3), stream, t, resolution,
                     target_position=10**9, target_step=3): pass
    measured = torch.cuda.max_memory_allocated() - before
    foretold = memory_estimate(config.model, vocab, t.batch_size, t.optimizer, resolution.dtype)["total"]
    print(f"{profile}: {foretold / 1e9:.2f} GB foretold, {measured / 1e9:.2f} measured, {foretold / measured:.2f}")
    assert abs(foretold / measured - 1) < 0.15
