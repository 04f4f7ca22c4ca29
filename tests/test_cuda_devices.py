"""Two GPUs: the same training as on one, by copies and by shares, resumed exactly, and a rank that dies."""
import os
import signal

import pytest
import torch
from conftest import until
from world import live_together

from llm_trainer import workspace
from llm_trainer.runs.run import Run

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]
QUIET = dict(eval_every=20, save_every=0, sample_every=20, max_steps=40, device="cuda", deterministic=True)
CASES = {"float32": dict(dtype="float32", compile=False),
         "compiled": dict(dtype="bfloat16", compile=True, seq_len=64, n_embd=64),
         "muon": dict(dtype="bfloat16", compile=False, arch="qwen3", optimizer="muon", grad_accum_steps=2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    workspace.init(root)
    return root


@pytest.fixture(scope="module")
def worlds(root):
    lives = {world: [dict(name=f"{case}-{strategy}-{world}", epochs=2, changes=QUIET | changes
                          | dict(strategy=strategy))
                     for case, changes in CASES.items() for strategy in (("auto",) if world == 1 else ("ddp", "fsdp"))]
             for world in (1, 2)}
    cut = dict(QUIET, max_steps=30, eval_every=0, sample_every=0, dropout=0.1, dtype="bfloat16", compile=False)
    lives[2] += [dict(name=name, changes=cut | dict(strategy=strategy), stop=stop) for strategy in ("ddp", "fsdp")
                 for name, stop in ((f"whole-{strategy}", None), (f"cut-{strategy}", 13), (f"cut-{strategy}", None))]
    return {world: live_together(root, world, lives[world], "cuda") for world in (1, 2)}


def losses(life): return [float.fromhex(step["loss"]) for step in life["steps"]]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_training(worlds, case, strategy):
    (alone,), (life,) = worlds[1][f"{case}-auto-1"], worlds[2][f"{case}-{strategy}-2"]
    # later on the tiny model jumps, and then a difference in the last bit is one in the first digit
    far = max(abs(a - b) for a, b in zip(losses(alone)[:24], losses(life)))
    print(case, strategy, "losses differ by", far, "validation by",
          max(abs(a - b) for a, b in zip(alone["val"], life["val"])))
    assert life["status"] == "completed" and life["kinds"] == alone["kinds"]
    assert len(life["samples"]) == len(alone["samples"])
    assert far < (1e-4 if case == "float32" else 0.02)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_is_exact_at_the_same_world_size(worlds, strategy):
    (whole,), cut = worlds[2][f"whole-{strategy}"], worlds[2][f"cut-{strategy}"]
    assert [step for life in cut for step in life["steps"]] == whole["steps"] and cut[-1]["weights"] == whole["weights"]


def used(): return [total - free for free, total in map(torch.cuda.mem_get_info, range(2))]


def test_a_killed_rank_ends_all_and_frees_the_memory(root):
    from llm_trainer.config import load_config
    from llm_trainer.runs import launch
    config = load_config("tiny").replace(device="cuda", epochs=500, eval_every=0, sample_every=0, compile=False)
    before = used()
    run = launch.start(config, workspace.init(root), "killed", devices="2")
    until(lambda: run.state().step >= 30 or not run.locked)
    os.kill(run.state().ranks[1]["pid"], signal.SIGKILL)
    until(lambda: not Run(run.folder).locked, seconds=30)
    reason = run.state().reason
    assert reason["code"] == "rank_lost" and "Rank 1 (cuda:1)" in reason["message"]
    until(lambda: all(now < then + 2**28 for now, then in zip(used(), before)), seconds=30)


def test_the_gpus_of_a_list_are_those_that_train_whatever_its_order(root):
    from llm_trainer.config import load_config
    from llm_trainer.runs import launch
    config = load_config("tiny").replace(device="cuda", max_steps=8, eval_every=0, sample_every=0, compile=False,
                                         strategy="fsdp")
    run = launch.start(config, workspace.init(root), "turned", devices="1,0")
    until(lambda: not run.locked)
    state = run.status()
    assert state.status == "completed" and [rank["device"] for rank in state.ranks] == ["cuda:1", "cuda:0"], state
