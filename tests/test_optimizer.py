"""Optimizer: which parameters decay, one face for AdamW and Muon, and plans that are pure functions of the step."""
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save
from torch import nn

from hearing import Heard
from llm_trainer.config import TrainConfig, load_config
from llm_trainer.errors import CheckpointError, UsageError
from llm_trainer.model.transformer import GPT
from llm_trainer.training.optimizer import LRSchedule, Muon, build_optimizer, extend, level, parameter_kinds

OPTIMIZERS = ["adamw", "muon"]
ARCHS = ["gpt2", "qwen3"]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU")])]


def gpt(arch="gpt2", seed=0, device="cpu", tied=True):
    torch.manual_seed(seed)
    return GPT(load_config("tiny", {"arch": arch}).model, 100, tied=tied).to(device)


def steps(model, opt, n, first=0):
    "Losses of `n` steps on batches that depend on the step only, as hex"
    losses, device = [], next(model.parameters()).device
    for step in range(first, first + n):
        x = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(step)).to(device)
        opt.set_factor(1 / (step + 1))
        opt.zero_grad()
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        opt.step()
        losses.append(loss.item().hex())
    return losses


# Who gets which step

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_kinds_cover_every_parameter_once(arch, tied):
    model = gpt(arch, tied=tied)
    kinds = parameter_kinds(model)
    assert sorted(sum(kinds.values(), [])) == sorted(name for name, _ in model.named_parameters())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert all(len(shapes[n]) == 2 for n in kinds["hidden"] + kinds["matrix"])
    assert all(len(shapes[n]) == 1 for n in kinds["vector"])
    assert all(".0." in n or ".1." in n for n in kinds["hidden"]), "only what lies in a block"
    assert any("wte" in n or "embed" in n for n in kinds["matrix"]) and (tied or "lm_head.weight" in kinds["matrix"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    model = gpt()
    opt = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    def names(decay):
        return {opt.names[p] for g in opt.param_groups if g["weight_decay"] == decay for p in g["params"]}
    kinds = parameter_kinds(model)
    assert names(0.3) == {*kinds["hidden"], *kinds["matrix"]} and names(0) == set(kinds["vector"])


def test_muon_takes_hidden_matrices_at_its_own_rate():
    model = gpt()
    opt = build_optimizer(model, TrainConfig(optimizer="muon", lr=1e-3, muon_lr=7e-3))
    muon = [g for o in opt.optimizers if isinstance(o, torch.optim.Muon) for g in o.param_groups]
    assert {opt.names[p] for g in muon for p in g["params"]} == set(parameter_kinds(model)["hidden"])
    opt.set_factor(0.5)
    assert {g["lr"] for g in muon} == {3.5e-3} and {g["lr"] for g in opt.param_groups} == {3.5e-3, 5e-4}


@pytest.mark.parametrize("most", [1, 2000, 2**24], ids=["one by one", "some at a time", "together"])
@pytest.mark.parametrize("device", DEVICES)
def test_muon_takes_the_steps_of_pytorchs(most, device):
    shapes = [(32, 32)] * 3 + [(96, 32)] * 2 + [(32, 96)] * 2
    ours, theirs = ([nn.Parameter(torch.ones(s, device=device)) for s in shapes] for _ in range(2))
    pair = Muon(ours, 0.02, 0.3), torch.optim.Muon(theirs, 0.02, 0.3, adjust_lr_fn="match_rms_adamw")
    pair[0].most, pair[0].levels = most, False
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(device)
            p.grad = q.grad = g if i or step else None
        for o in pair: o.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(pair[0].state[p]["momentum_buffer"], pair[1].state[q]["momentum_buffer"])


def test_the_compiler_stays_unloaded():
    code = f"""
import sys, torch
from llm_trainer.config import TrainConfig
from llm_trainer.training.optimizer import build_optimizer
for name in {OPTIMIZERS}:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    opt = build_optimizer(model, TrainConfig(optimizer=name))
    model(torch.ones(2, 4)).square().sum().backward()
    opt.step(); opt.zero_grad(); opt.load_named_state(opt.named_state())
    if "torch._dynamo" in sys.modules: sys.exit(name)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_adamw_is_the_papers():
    model = nn.Linear(4, 3)
    p, g = model.weight.detach().clone(), torch.randn(3, 4)
    cfg = TrainConfig(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.1)
    opt, m, v = build_optimizer(model, cfg), 0, 0
    for step in (1, 2, 3):
        model.weight.grad, model.bias.grad = g * step, torch.zeros(3)
        opt.step()
        m, v = 0.8*m + 0.2*g*step, 0.9*v + 0.1*(g*step)**2
        p = p * (1 - 0.01*0.1) - 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), p)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_a_muon_step_is_as_large_as_an_adamw_step(shape):
    model = nn.Linear(*shape, bias=False)
    before = model.weight.detach().clone()
    opt = build_optimizer(model, TrainConfig(optimizer="muon", muon_lr=0.1, weight_decay=0))
    model.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    opt.step()
    assert 0.1 * 0.1 < (model.weight - before).pow(2).mean().sqrt().item() < 0.3 * 0.1


def test_levelled_rows_are_of_one_size_and_the_step_as_long_as_before():
    torch.manual_seed(0)
    updates, sizes = torch.randn(2, 48, 16) * torch.logspace(-1, 1, 48)[:, None], torch.zeros(2, 48, 1)
    found = level(updates, sizes)
    rows = found.norm(dim=2)
    torch.testing.assert_close(found.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))
    plain = updates.norm(dim=2)
    assert (rows.amax(1) / rows.amin(1)).max() < 1.01 < (plain.amax(1) / plain.amin(1)).min()
    torch.testing.assert_close(level(updates.mT, torch.zeros(2, 1, 48)), found.mT)
    before = sizes.clone()
    assert level(torch.zeros(2, 48, 16), torch.zeros(2, 48, 1)).abs().max() == 0, "no gradient, no step"
    level(torch.full_like(updates, torch.nan), sizes, keep=torch.tensor(0.0))
    assert torch.equal(sizes, before)


def test_momentum_climbs_and_falls_with_the_learning_rate():
    model = gpt()
    opt = build_optimizer(model, TrainConfig(optimizer="muon"))
    muon = opt.optimizers[0].param_groups[0]
    found = []
    for step, factor in ((0, 0.1), (100, 1.0), (5000, 1.0), (5000, 0.5), (5000, 0.0)):
        opt.set_factor(factor, step)
        found.append(muon["momentum"])
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.925, 0.9])


def test_a_state_from_before_rows_were_levelled_loads():
    model = gpt()
    opt = build_optimizer(model, TrainConfig(optimizer="muon"))
    steps(model, opt, 2)
    old = {name: {k: t for k, t in state.items() if k != "sizes"} for name, state in opt.named_state().items()}
    fresh = build_optimizer(model, TrainConfig(optimizer="muon"))
    fresh.load_named_state(old)
    assert all(not s["sizes"].any() for s in fresh.named_state().values() if "sizes" in s)
    steps(model, fresh, 1)


# State by name

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stored_state_goes_on_bit_for_bit(name, arch, device):
    cfg, model = TrainConfig(optimizer=name), gpt(arch, device=device)
    opt = build_optimizer(model, cfg)
    steps(model, opt, 3)
    flat = {f"{n}/{k}": t for n, state in opt.named_state().items() for k, t in state.items()}
    stored, weights = load(save(flat)), {k: v.clone() for k, v in model.state_dict().items()}
    expected = steps(model, opt, 3, first=3)
    for _ in range(2):  # and the stored state is not used up by loading it
        again = gpt(arch, seed=9, device=device)
        again.load_state_dict(weights)
        fresh, named = build_optimizer(again, cfg), {}
        for key, t in stored.items(): named.setdefault(key.split("/")[0], {})[key.split("/")[1]] = t
        fresh.load_named_state(named)
        assert steps(again, fresh, 3, first=3) == expected
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_names_every_parameter_and_counts_steps(name):
    model = gpt()
    opt = build_optimizer(model, TrainConfig(optimizer=name))
    assert opt.named_state() == {}
    opt.load_named_state({})  # a checkpoint of step 0
    steps(model, opt, 2)
    state = opt.named_state()
    assert state.keys() == dict(model.named_parameters()).keys()
    assert {float(s["step"]) for s in state.values() if "step" in s} == {2.0}


def test_a_state_of_something_else_is_refused():
    model = gpt()
    adamw, muon = (build_optimizer(model, TrainConfig(optimizer=name)) for name in OPTIMIZERS)
    steps(model, adamw, 1)
    state = adamw.named_state()
    with pytest.raises(CheckpointError, match="doesn't fit"): muon.load_named_state(state)
    with pytest.raises(CheckpointError, match="only in one"): adamw.load_named_state({**state, "head": {}})
    first = next(iter(state))
    less = {name: s for name, s in state.items() if name != first}
    with pytest.raises(CheckpointError, match="only in one"): adamw.load_named_state(less)
    wrong = {**state, first: {**state[first], "exp_avg": torch.zeros(2, 2)}}
    with pytest.raises(CheckpointError, match=first): adamw.load_named_state(wrong)
    missing = {**state, first: {k: v for k, v in state[first].items() if k != "step"}}
    with pytest.raises(CheckpointError, match=first): adamw.load_named_state(missing)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_it_overfits_one_batch(name, arch):
    model = gpt(arch)
    opt = build_optimizer(model, TrainConfig(optimizer=name, lr=1e-2, muon_lr=1e-2, weight_decay=0))
    x = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(80):
        opt.zero_grad()
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        opt.step()
    assert loss.item() < 0.1


# Plans

def plan(total=100, **settings): return LRSchedule.from_config(TrainConfig(**{"warmup_steps": 10, **settings}), total)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_plan_climbs_peaks_and_falls(kind):
    p = plan(schedule=kind, lr=1e-3, min_lr=1e-4)
    factors = [p.factor(s) for s in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[10] == 1.0 and factors[0] == 1 / 11
    assert factors[10:] == sorted(factors[10:], reverse=True)
    if kind == "constant": assert set(factors[10:]) == {1.0}
    else: assert 0.1 < factors[99] < 0.16 and p.factor(100) == pytest.approx(0.1)
    assert p.lr(10) == 1e-3


def test_linear_and_wsd_by_hand():
    p = plan(total=110, schedule="linear")
    assert [p.factor(s) for s in (10, 60, 109, 110)] == pytest.approx([1, 0.5, 0.01, 0])
    p = plan(total=110, schedule="wsd", decay_fraction=0.4)
    assert [p.factor(s) for s in (10, 69, 70, 90, 110)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert plan(schedule="wsd", decay_fraction=0).factor(99) == 1.0 and plan(warmup_steps=0).factor(0) == 1.0


def test_a_warmup_longer_than_the_run_is_clamped_and_said():
    for warmup, notes in ((500, 1), (100, 0)):
        said = Heard()
        assert LRSchedule.from_config(TrainConfig(warmup_steps=warmup), 100, said).warmup == 100
        assert len(said) == notes and all("warmup_steps (500) is longer than the run (100 steps)" in note
                                          for note in said)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_redecay_is_the_plan_of_the_longer_run(kind):
    old = plan(schedule=kind)
    new, planned = extend(old, "redecay", 100, 160), plan(total=160, schedule=kind)
    assert [new.factor(s) for s in range(100)] == [old.factor(s) for s in range(100)]
    assert [new.factor(s) for s in range(100, 160)] == [planned.factor(s) for s in range(100, 160)]


def test_hold_stays_at_the_last_value():
    new = extend(plan(min_lr=1e-4), "hold", 100, 160)
    assert {new.factor(s) for s in range(99, 160)} == {new.factor(99)} and new.factor(99) > 0.1


def test_rewarm_climbs_to_half_and_falls_again():
    old = plan(min_lr=1e-4)
    new = extend(old, "rewarm", 100, 160)
    factors = [new.factor(s) for s in range(99, 160)]
    assert factors[:12] == sorted(factors[:12]) and max(factors) == factors[11] == 0.5 and factors[-1] < 0.11
    assert extend(old, "rewarm", 100, 103).factor(102) <= 0.5  # less is added than a warmup


def test_changed_settings_apply_from_the_step_they_were_made():
    old = plan(lr=1e-3)
    new = extend(old, "redecay", 50, 100, TrainConfig(lr=1e-4, warmup_steps=10))
    assert new.lr(49) == old.lr(49) and new.lr(50) == pytest.approx(old.lr(50) / 10)
    held = extend(old, "hold", 50, 100, TrainConfig(lr=1e-4, warmup_steps=10))
    assert held.lr(99) == pytest.approx(old.lr(49))


def test_an_unknown_way_to_extend_is_refused():
    with pytest.raises(UsageError, match="redecay, hold or rewarm"): extend(plan(), "continue", 1, 2)


PLANS = st.builds(plan, total=st.integers(1, 500), schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
                  warmup_steps=st.integers(0, 50), decay_fraction=st.floats(0, 1), min_lr=st.floats(0, 1e-3))


EXTENSION = st.tuples(st.sampled_from(["redecay", "hold", "rewarm"]), st.integers(1, 100), st.integers(1, 100))


@settings(max_examples=300, deadline=None)
@given(PLANS, st.lists(EXTENSION, max_size=4))
@pytest.mark.filterwarnings("ignore:warmup_steps")
def test_extended_plans_keep_the_past_and_survive_json(p, extensions):
    at = 0
    for how, ahead, more in extensions:
        at = at + ahead
        longer = extend(p, how, at, at + more)
        assert [longer.lr(s) for s in range(at)] == [p.lr(s) for s in range(at)]
        p = longer
    again = LRSchedule.from_dict(json.loads(json.dumps(p.to_dict())))
    assert again == p and [again.factor(s) for s in range(300)] == [p.factor(s) for s in range(300)]
    assert all(0 <= p.factor(s) <= 1 for s in range(700))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_and_the_device_knows_it_alone(name, device):
    model = gpt("qwen3", device=device)
    opt = build_optimizer(model, TrainConfig(optimizer=name))
    steps(model, opt, 2)
    state = {n: {k: t.clone() for k, t in s.items()} for n, s in opt.named_state().items()}
    before = [p.clone() for p in model.parameters()], state
    for p in model.parameters(): p.grad.fill_(torch.nan)
    opt.step(torch.tensor(False, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
    assert all(torch.equal(t, opt.named_state()[n][k]) for n, s in before[1].items() for k, t in s.items())
    other = gpt("qwen3", device=device)
    plain = build_optimizer(other, TrainConfig(optimizer=name))
    for p, q in zip(model.parameters(), other.parameters()):
        q.data.copy_(p)
        q.grad = torch.ones_like(q)
        p.grad = torch.ones_like(p)
    plain.load_named_state(opt.named_state())
    opt.set_factor(1)
    opt.step(torch.tensor(True, device=device))
    plain.step()
    for p, q in zip(model.parameters(), other.parameters()): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
