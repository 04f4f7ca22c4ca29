"""The loop on a real model: accumulation, patience, skipped steps, requests, precision."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from llm_trainer.data.batches import Stream, Windows, val_batches
from llm_trainer.training.checkpoint import SavedInfo, SaveFailed
from llm_trainer.config import load_config
from llm_trainer.device import resolve, seed_everything
from llm_trainer.model.transformer import GPT
from llm_trainer.training.optimizer import LRSchedule, build_optimizer
from llm_trainer.training.step import accumulate
from llm_trainer.training.trainer import Trainer

TOKENS = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, np.uint8).astype(np.uint16)


def trainer(steps=6, **settings):
    config = load_config("tiny").replace(**dict(save_every=0, eval_every=0, sample_every=0, warmup_steps=0) | settings)
    t = config.training
    resolution = resolve(t)
    resolution.apply()
    seed_everything(t.seed)
    windows = Windows(TOKENS, config.model.seq_len)
    made = GPT(config.model, 256)
    return Trainer(made, build_optimizer(made, t), LRSchedule.from_config(t, steps),
                   Stream(windows, t.batch_size, t.seed), t, resolution,
                   target_position=10**9, target_step=steps, lengths=torch.ones(256, dtype=torch.long),
                   validation=lambda: [("all", val_batches(windows, t.batch_size, 1))])


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_32_batches_of_one_are_one_batch_of_32(arch):
    x, y = Windows(TOKENS, 64).batch(range(32))
    y[-1, 40:] = -100  # the masked tail of a corpus
    found = []
    for size in (32, 1):
        t = trainer(arch=arch)
        loss, targets = accumulate(t.model.loss, list(zip(x.split(size), y.split(size))), t.device,
                                   t.resolution.autocast)
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in t.model.parameters()])))
    (whole, a), (parts, b) = found
    assert targets == 32 * 64 - 24 and abs(whole - parts) <= 1e-6 * whole
    assert (a - b).norm() <= 1e-6 * a.norm()


def test_the_trajectory_is_the_same_with_either_split():
    losses = [[e.loss for e in trainer(batch_size=b, grad_accum_steps=32 // b) if e.kind == "step"] for b in (32, 1)]
    assert np.allclose(*losses, rtol=1e-5)


def test_patience_ends_a_run_that_no_longer_gets_better():
    t = trainer(steps=50, patience=2, lr=1e-9, min_lr=0, eval_every=1)
    t.state.best_val_loss = 0.0
    *_, last = t
    assert (last.status, last.code, t.state.step) == ("completed", "patience", 2)


def test_patience_that_ran_out_in_an_evaluation_owed_ends_the_run_too():
    t = trainer(steps=50, patience=2, lr=1e-9, min_lr=0, eval_every=1)
    t.state.best_val_loss, t.state.evaluations_since_best, t.owes_evaluation = 0.0, 1, True
    *_, last = t
    assert (last.status, last.code, t.state.step) == ("completed", "patience", 0)


@pytest.mark.parametrize("end", ["stop", "patience"])
def test_a_save_that_failed_is_tried_again_before_the_end(end):
    t, tries = trainer(steps=50, eval_every=2, patience=2 * (end == "patience")), []
    def save(trainer):
        tries.append(trainer.state.step)
        if len(tries) == 1: raise SaveFailed("The disk is full.", "one", 28)
        return SavedInfo(Path("x"), 1, 0.1)
    t.save_to = save
    if end == "patience": t.state.best_val_loss, t.state.evaluations_since_best = 0.0, 1
    else: t.requests = lambda: {"stop"} if tries else set()
    *events, last = t
    assert tries == [2, 2] and [e.step for e in events if e.kind == "saved"] == [2]
    assert last.status == {"stop": "stopped", "patience": "completed"}[end]
    told = [e.message for e in events if e.kind == "note"]
    assert told == ["Training goes on without a checkpoint: The disk is full."]


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_the_run_goes_on():
    t = trainer(steps=5)
    real, calls = t.stepper.loss, iter(range(100))
    t.stepper.loss = lambda *a, **k: real(*a, **k) * (math.nan if next(calls) == 2 else 1)
    events = list(t)
    assert [(e.step, e.what) for e in events if e.kind == "skipped"] == [(3, "loss")]
    assert events[-1].status == "completed" and t.state.skipped == 1
    assert all(torch.isfinite(p).all() for p in t.model.parameters())


def test_ten_in_a_row_are_diverged():
    t = trainer(steps=50)
    real = t.stepper.loss
    t.stepper.loss = lambda *a, **k: real(*a, **k) * math.inf
    before = [p.clone() for p in t.model.parameters()]
    *_, last = t
    assert (last.status, last.code, t.state.step) == ("diverged", "non_finite", 10)
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_precision_learns(dtype):
    t = trainer(steps=30, dtype=dtype)
    losses = [e.loss for e in t if e.kind == "step" and e.loss is not None]
    assert losses[-1] < losses[0] - 1


def test_clipping_bounds_the_gradient_that_is_used():
    t = trainer(steps=1, grad_clip=0.01)
    step = next(e for e in t if e.kind == "step")
    used = torch.cat([p.grad.flatten() for p in t.model.parameters()]).norm()
    assert step.grad_norm > 0.1 and used <= 0.0101


def test_a_stop_before_the_last_evaluation_leaves_it_owed():
    t = trainer(steps=3, eval_every=0)
    t.requests = lambda: {"stop"} if t.state.step == 3 else set()
    *_, last = t
    assert t.complete and (last.status, t.owes_evaluation) == ("stopped", True)
    t.requests = set
    assert [e.kind for e in t if e.kind in ("evaluated", "step")] == ["evaluated"]
    *_, last = t
    assert last.status == "completed"
