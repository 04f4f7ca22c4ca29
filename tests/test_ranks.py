"""A run on two processes: a rank that dies ends all, is named, and the run goes on with another number of them."""
import os
import signal
import threading

import pytest
from conftest import until

from llm_trainer.config import load_config
from llm_trainer.errors import UsageError
from llm_trainer.runs import launch, ranks, worker
from llm_trainer.runs.queue import choose_devices, lock_names
from llm_trainer.system import process


def tiny(**knobs): return load_config("tiny").replace(threads=1, sample_every=0, eval_every=0, save_every=5, **knobs)


def test_a_killed_rank_ends_all_and_the_run_goes_on_alone(space):
    run = launch.start(tiny(epochs=1000), space, "pair", devices="2")
    until(lambda: run.state().step >= 6 or not run.locked)
    ranks, attempt = run.state().ranks, run.attempts()[-1]
    assert [rank["device"] for rank in ranks] == ["cpu", "cpu"] and run.state().strategy == "ddp"
    assert (attempt["world_size"], attempt["devices"]) == (2, ["cpu", "cpu"])
    assert run.state().pid not in [r["pid"] for r in ranks]
    os.kill(ranks[1]["pid"], signal.SIGKILL)
    until(lambda: not run.locked)
    state = run.status()
    assert state.status == "failed" and state.reason["code"] == "rank_lost"
    assert "Rank 1 (cpu)" in state.reason["message"]
    until(lambda: all(process.process_state(rank["pid"]) in (None, "zombie") for rank in ranks))
    plan = launch.plan_resume(run, space, devices="1", changes={"max_steps": 12, "epochs": 1})
    assert plan.from_step >= 5 and "instead of 2" in str(plan)
    again = launch.resume(run, space, devices="1", changes={"max_steps": max(12, plan.from_step + 2)}, background=False)
    assert worker.work(again, space) == 0 and again.status().status == "completed"


@pytest.mark.slow
def test_one_killed_of_eight_ends_all_and_two_go_on(space):
    run = launch.start(tiny(epochs=1000), space, "eight", devices="8")
    until(lambda: run.state().step >= 6 or not run.locked)
    ranks = run.state().ranks
    assert len(ranks) == 8
    os.kill(ranks[5]["pid"], signal.SIGKILL)
    until(lambda: not run.locked)
    assert run.status().reason["code"] == "rank_lost" and "Rank 5 (cpu)" in run.status().reason["message"]
    until(lambda: all(process.process_state(rank["pid"]) in (None, "zombie") for rank in ranks))
    step = launch.plan_resume(run, space, devices="2").from_step
    again = launch.resume(run, space, devices="2", changes={"max_steps": step + 4}, background=False)
    assert step >= 5 and worker.work(again, space) == 0
    assert again.status().status == "completed" and again.state().step == step + 4 and len(again.state().ranks) == 2


@pytest.mark.slow
def test_a_rank_is_named_where_torchrun_saw_its_end_first(space, monkeypatch):
    monkeypatch.setattr(ranks.Launch, "_look_after", lambda self: None)  # a launcher that is never in time
    run = launch.start(tiny(epochs=1000), space, "late", devices="2", background=False)
    def kill():
        until(lambda: run.state().step >= 6)
        os.kill(run.state().ranks[1]["pid"], signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    assert worker.work(run, space) == 1
    killer.join()
    reason = run.status().reason
    assert reason["code"] == "rank_lost" and reason["message"].startswith("Rank 1 (cpu) is gone, at step")


def test_a_dry_run_says_how_several_devices_would_share_it(space):
    from llm_trainer.cli import doctor, estimate
    alone, pair = (estimate.estimate(tiny(), space, devices) for devices in (None, "2"))
    assert (alone["strategy"], pair["strategy"], pair["devices"]) == ("none", "ddp", ["cpu", "cpu"])
    assert pair["memory"]["activations"] < alone["memory"]["activations"]
    assert pair["memory_available"] * 2 <= alone["memory_available"]
    assert pair["tokens_per_step"] == alone["tokens_per_step"]
    assert pair["tokens_per_step"] == round(pair["step_seconds"] * pair["tokens_per_second"])
    shared = estimate.estimate(tiny(strategy="fsdp"), space, "4")
    assert shared["memory"]["optimizer"] < pair["memory"]["optimizer"] and "asked for" in shared["why"]
    apart = estimate.estimate(tiny(), space, ["cpu"] * 4, 2)  # two machines
    assert apart["memory_available"] == pair["memory_available"] and 0 <= apart["waited"] < 1
    assert "2 (cpu), ddp" in estimate.report(pair) and "on each" in estimate.report(pair)
    assert "on each" not in estimate.report(alone)
    with pytest.raises(UsageError, match="can't share"): estimate.estimate(tiny(), space, "3")
    found = doctor.examine()
    assert found["devices"][0]["name"] == "cpu" and "--devices 2" in doctor.report(found)


def test_devices_are_chosen_and_refused(tmp_path, monkeypatch):
    cpu, gpu = {"training": {"device": "cpu"}}, {"training": {"device": "cuda"}}
    assert choose_devices(None, cpu, tmp_path) == ["cpu"] and choose_devices("3", cpu, tmp_path) == ["cpu"] * 3
    assert choose_devices(None, cpu, tmp_path, ["cpu", "cpu"]) == ["cpu", "cpu"]
    assert choose_devices("auto", cpu, tmp_path) == ["cpu"]
    for wrong in ("0", "0,1", "two", "-1", ""):
        with pytest.raises(UsageError): choose_devices(wrong, cpu, tmp_path)
    monkeypatch.setattr(process, "gpus", lambda: ["GPU-a", "GPU-b", "GPU-c"])
    assert choose_devices("2", gpu, tmp_path) == ["cuda:0", "cuda:1"]
    assert choose_devices("0,2", gpu, tmp_path) == ["cuda:0", "cuda:2"]
    assert choose_devices("auto", gpu, tmp_path) == ["cuda:0", "cuda:1", "cuda:2"]
    assert lock_names(["cuda:2"], gpu) == ["GPU-c"]
    here = lock_names(["cpu", "cpu"], cpu)
    assert here == lock_names([], cpu) and len(here) == 1
    with monkeypatch.context() as elsewhere:  # several machines may share a workspace
        elsewhere.setattr(process, "boot_id", lambda: "another machine's")
        assert lock_names(["cpu"], cpu) != here
    for wrong in ("4", "0,3", "1,1"):
        with pytest.raises(UsageError): choose_devices(wrong, gpu, tmp_path)
    with pytest.raises(UsageError, match="can't share 5 sequences"): launch.take_devices("2", {"training": dict(
        device="cpu", batch_size=5, grad_accum_steps=1)}, tmp_path)


def test_each_gpu_is_chosen_by_its_number_and_one_that_is_not_there_is_refused(monkeypatch):
    import torch
    from llm_trainer import device
    chosen = []
    monkeypatch.setattr(device, "why_not", lambda kind: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [worker.take_device(name) for name in ("cuda:1", "cuda:0", "cpu", "")] == ["cuda", "cuda", "cpu", ""]
    assert chosen == [1, 0]  # the first one, too: a device mesh would give it that of its local rank
    with pytest.raises(UsageError, match="GPU 2 is not there(.|\n)*--devices 2"): worker.take_device("cuda:2")
    monkeypatch.setattr(device, "why_not", lambda kind: "this PyTorch is built without CUDA")
    assert worker.take_device("cuda:0") == "cpu" and chosen == [1, 0]  # a driver was seen, and torch is one for CPUs


@pytest.mark.parametrize("devices", [None, pytest.param("2", marks=pytest.mark.slow)])
def test_a_driver_without_a_torch_that_uses_it_means_a_cpu(space, monkeypatch, devices):
    monkeypatch.setattr(process, "accelerator", lambda: "cuda")
    config = tiny(max_steps=3, device="auto")
    from llm_trainer.cli import estimate
    if not torch_uses_cuda():
        for some in (None, "2"): assert estimate.estimate(config, space, some)["device"]["device"] == "cpu"
        run = launch.start(config, space, "guessed", devices=devices, background=False)
        assert worker.work(run, space) == 0 and run.state().device == "cpu" and run.state().step == 3
        assert {rank["device"] for rank in run.state().ranks} <= {"cpu"}


def torch_uses_cuda():
    from llm_trainer.device import why_not
    return why_not("cuda") is None


def test_gpus_are_those_that_cuda_will_show(monkeypatch):
    monkeypatch.setattr(process, "_asked_of_nvml", lambda: ["GPU-aa", "GPU-ab", "GPU-b"])
    def seen(visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible is not None else \
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        process.gpus.cache_clear()
        return process.gpus()
    try:
        if os.path.exists("/proc/driver/nvidia/gpus"): pytest.skip("this machine has GPUs of its own")
        assert seen(None) == ["GPU-aa", "GPU-ab", "GPU-b"] and seen("2,0") == ["GPU-b", "GPU-aa"]
        assert seen("GPU-b") == ["GPU-b"] and seen("GPU-a") == []  # it could be either
        assert seen("1,7,0") == ["GPU-ab"] and seen("") == [] and seen("-1") == []
        assert seen("MIG-1,MIG-2") == ["MIG-1", "MIG-2"]  # two parts of one GPU don't wait for each other
    finally: process.gpus.cache_clear()


def test_the_bytes_on_the_wires_are_those_of_a_calculation_by_hand():
    from llm_trainer.config import ModelConfig
    from llm_trainer.model.cost import parameter_table
    from llm_trainer.training.scaling import Wires, all_gather_seconds, all_reduce_seconds, step_time, wires_of
    wires = Wires(inside=100.0, outside=10.0, devices=8, latency=0.0)
    assert all_reduce_seconds(800, 1, wires) == 0
    assert all_reduce_seconds(800, 2, wires) == 2 * 1 / 2 * 800 / 100
    assert all_reduce_seconds(800, 8, wires) == 2 * 7 / 8 * 800 / 100
    # two machines: each device sends an eighth of it through its own card
    assert all_reduce_seconds(800, 16, wires) == 2 * 7 / 8 * 800 / 100 + 2 * 1 / 2 * 100 / 10
    assert all_gather_seconds(800, 8, wires) == 7 / 8 * 800 / 100
    cfg = ModelConfig(arch="gpt2", n_layer=2, n_head=2, n_embd=32, n_hidden=128, seq_len=16)
    table = parameter_table(cfg, 64)
    hidden, rest = table["attention"] + table["mlp"], sum(table.values()) - table["attention"] - table["mlp"]
    def sent(strategy, world=8, optimizer="adamw", rounds=1, hold=True):
        return step_time(cfg, 64, world * 4 * rounds, world, 1e9, wires, 4, strategy, optimizer, hold).sent
    def near(seconds): return pytest.approx(seconds, rel=1e-9)
    share = 7 / 8 / 100
    assert sent("ddp") == sent("ddp", rounds=3) == near(2 * share * 4 * (hidden + rest))  # gradients, once a step
    gathered = reduced = share * 4 * (hidden + rest)  # in float32, or twice in bfloat16
    assert sent("fsdp") == sent("fsdp", rounds=3) == near(gathered + reduced)
    assert sent("fsdp", rounds=3, hold=False) == near(3 * (gathered + reduced))
    assert sent("ddp", optimizer="muon") - sent("ddp") == near(share * 2 * hidden)
    assert sent("fsdp", optimizer="muon") - sent("fsdp") == near(2 * share * 2 * hidden / 8)  # there and back
    assert sent("ddp", 16, "muon") - sent("ddp", 16) == near(share * 2 * hidden + 1 / 2 * 2 * hidden / 8 / 10)
    hidden_behind = step_time(cfg, 64, 4 * 8, 8, 1e3, wires, 4, "ddp")
    assert hidden_behind.sent > 0 == hidden_behind.waited and hidden_behind.efficiency == 1
    open_ = step_time(cfg, 64, 4 * 8, 8, 1e12, wires, 4, "ddp")
    assert open_.waited == near(open_.sent - open_.compute * 2 / 3)
    assert wires_of("NVIDIA H100 80GB HBM3").inside > 10 * wires_of("NVIDIA H100 PCIe").inside
