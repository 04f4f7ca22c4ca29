"""The fast paths of a step beside their slow twins: compiled blocks, the fused head and loss, the recorded step."""
import math
import os

import pytest
import torch
from llm_trainer.config import load_config
from llm_trainer.model.transformer import GPT
from llm_trainer.training.fast import compiled_twin, fast_loss, keep_compiled
from test_trainer import trainer

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def no_folder(monkeypatch): monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)


def test_what_was_compiled_is_kept_where_only_this_user_looks(tmp_path, no_folder):
    mine = keep_compiled(tmp_path / "data", tmp_path / "me")
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(mine) and mine.parent == tmp_path / "data" / "compiled"
    assert (tmp_path / "me/key").stat().st_mode & 0o777 == 0o600
    assert keep_compiled(tmp_path / "data", tmp_path / "me") == mine
    assert keep_compiled(tmp_path / "data", tmp_path / "me") is None, "a folder that was set is left"
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    assert keep_compiled(tmp_path / "data", tmp_path / "you") != mine


def test_without_a_place_for_the_key_nothing_is_kept(tmp_path, no_folder):
    (tmp_path / "file").write_text("")
    assert keep_compiled(tmp_path / "data", tmp_path / "file") is None
    (tmp_path / "short").mkdir()
    (tmp_path / "short/key").write_text("guessable")
    assert keep_compiled(tmp_path / "data", tmp_path / "short") is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_twin_shares_every_parameter_and_leaves_the_model_as_it_is(arch):
    model = GPT(load_config("tiny", {"arch": arch}).model, 100).eval()
    twin = compiled_twin(model)
    model.train()
    assert all(m.training for m in twin.modules()), "a model that was read from a checkpoint was in evaluation mode"
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert sum(m._compiled_call_impl is not None for m in twin.modules()) == model.config.n_layer


def gpu_trainer(arch, **settings):
    changes = dict(device="cuda", dtype="bfloat16", deterministic=True, log_every=1, n_embd=64) | settings
    return trainer(steps=changes.pop("steps", 20), arch=arch, **changes)


def on_gpu(made):
    "`made` with its model on the GPU and an optimizer for it there"
    from llm_trainer.training.optimizer import build_optimizer
    from llm_trainer.training.trainer import Trainer
    model = made.model.cuda()
    return Trainer(model, build_optimizer(model, made.training), made.plan, made.stream, made.training, made.resolution,
                   target_position=made.target.position, target_step=made.target.step, lengths=made.lengths)


class TestOnAGPU:
    pytestmark = cuda

    @pytest.mark.parametrize("vocabulary", [100, 5000])
    def test_the_fused_loss_is_the_models(self, vocabulary):
        torch.manual_seed(0)
        model = GPT(load_config("tiny", {"n_embd": 64}).model, vocabulary).cuda()
        x = torch.randint(vocabulary, (4, 64), device="cuda")
        y = torch.where(torch.rand(4, 64, device="cuda") < 0.2, -100, x.roll(-1, 1))
        found = []
        for loss_of in (model.loss, fast_loss(model, "bfloat16")):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16): loss = loss_of(x, y, reduction="sum") / 7
            loss.backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        (plain, a), (fused, b) = found
        assert abs(plain - fused) < 2e-3 * plain and (a - b).norm() < 0.02 * a.norm()
        assert model.head.grad[vocabulary:].abs().max() == 0

    @pytest.mark.parametrize("changes", [
        dict(arch="gpt2", dropout=0.1), dict(arch="qwen3", optimizer="muon", schedule="wsd", batch_size=4,
                                             grad_accum_steps=2),
        dict(arch="qwen3", optimizer="muon", compile=False, dropout=0.2)], ids=["gpt2", "accumulation", "eager"])
    def test_a_recorded_step_is_the_plain_one_to_the_bit(self, changes, monkeypatch):
        found = []
        for plain in (True, False):
            torch.manual_seed(1)
            t = on_gpu(gpu_trainer(**changes))
            if plain: t.stepper.recorder = None
            losses = [e.loss.hex() for e in t if e.kind == "step"]
            assert plain or t.stepper.recorder.recording, t.stepper.recorder.problem
            found.append((losses, torch.cuda.get_rng_state().tolist(), [p.clone() for p in t.model.parameters()]))
        assert found[0][:2] == found[1][:2]
        assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2]))

    def test_a_recorded_step_that_is_not_finite_changes_nothing(self):
        t = on_gpu(gpu_trainer("qwen3", optimizer="muon", compile=False, log_every=0, steps=30))
        bad, real = torch.ones((), device="cuda"), t.model.loss
        t.stepper.loss = lambda *a, **k: real(*a, **k) * bad
        events = iter(t)
        def take(n): return [next(e for e in events if e.kind in ("step", "skipped")) for _ in range(n)]
        take(6)
        assert t.stepper.recorder.recording
        before = [p.clone() for p in t.model.parameters()]
        bad.fill_(math.nan)
        take(1)
        assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))
        bad.fill_(1)
        assert "skipped" in [e.kind for e in take(3)] and t.state.skipped == 1
        assert not torch.equal(before[0], next(t.model.parameters()))

    def test_a_step_that_keeps_the_device_busy_is_not_recorded(self):
        t = on_gpu(gpu_trainer("gpt2", compile=False, n_layer=2, n_embd=2048, n_head=16, batch_size=256, seq_len=64,
                               steps=5))
        assert list(t)[-1].status == "completed" and not t.stepper.recorder.recording

    def test_a_recording_that_fails_is_said_and_done_without(self):
        t = on_gpu(gpu_trainer("gpt2", compile=False, steps=8))
        real = t.model.loss
        def waits_for_the_device(x, y, reduction):
            return real(x, y, reduction=reduction) * (1 + 0 * float(x.float().mean()))
        t.stepper.loss = waits_for_the_device
        events = list(t)
        assert any(e.kind == "note" and "recorded" in e.message for e in events)
        assert events[-1].status == "completed" and sum(e.kind == "step" for e in events) == 8
