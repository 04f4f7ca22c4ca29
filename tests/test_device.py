"""Device: every `auto` decided once with its reason, and random numbers that can be put back."""
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save

from llm_trainer import device as device_module
from llm_trainer.config import TrainConfig
from llm_trainer.device import (
    Resolution, available_threads, cgroups, choose_device, cpu_speeds, describe, fast_dtype, fast_threads,
    keeping_settings, unhindered_threads, memory_used, peak_flops, resolve,
    rng_state, seed_everything, set_rng_state, total_memory, why_not)
from llm_trainer.errors import UsageError


@pytest.fixture(autouse=True)
def process_as_it_was():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def cpu(**settings): return resolve(TrainConfig(device="cpu", **settings))


# Which device

def test_auto_takes_the_first_that_is_there_and_says_why():
    device, reason = choose_device()
    there = [d for d in ("cuda", "mps", "cpu") if why_not(d) is None]
    assert device == there[0] and reason.endswith(f"using {device}")
    assert all(f"{d}: {why_not(d)}" in reason for d in ("cuda", "mps") if d not in there)


def test_the_config_wins_over_the_preference_of_the_workspace():
    assert choose_device("cpu", "cuda") == ("cpu", "asked for by the config")
    assert choose_device("auto", "cpu") == ("cpu", "asked for by settings.ini")


@pytest.mark.parametrize("device", [d for d in ("cuda", "mps") if why_not(d)])
def test_a_device_that_is_not_there_is_refused_with_the_reason(device):
    with pytest.raises(UsageError) as e: resolve(TrainConfig(device=device))
    assert why_not(device) in str(e.value) and "there is: " in str(e.value) and "cpu" in str(e.value)
    with pytest.raises(UsageError, match="settings.ini asks for(.|\n)*--device cpu, or device = auto in settings.ini"):
        resolve(TrainConfig(), prefer=device)  # --device auto would ask settings.ini again
    with pytest.raises(UsageError, match="llm-trainer train --init-from RUN"):  # the device of a run is fixed
        replace(cpu(), device=device).apply()


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="settings.ini asks for the device 'tpu'"): choose_device("auto", "tpu")


def test_hidden_gpus_are_told_apart_from_missing_ones():
    code = "from llm_trainer.device import why_not; print(why_not('cuda'))"
    seen = warm.program(Path(), code=code, CUDA_VISIBLE_DEVICES="").stdout.strip()
    assert seen in ("this PyTorch is built without CUDA", "no NVIDIA driver found",
                    "CUDA_VISIBLE_DEVICES hides every GPU")


# Format, threads, memory

def test_cpu_defaults():
    r = cpu()
    assert (r.compile, r.deterministic, r.attention, r.torch_version) == (False, True, "default", torch.__version__)
    assert r.dtype == r.muon_dtype == fast_dtype("cpu") in ("float32", "bfloat16") and r.probed == cpu_speeds()
    assert 2**28 < r.memory_bytes == total_memory("cpu") <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_is_asked_for_is_taken():
    r = cpu(dtype="float32", compile=True, threads=3, deterministic=False)
    assert (r.dtype, r.compile, r.threads, r.deterministic) == ("float32", True, 3, False)


def test_float16_needs_cuda():
    with pytest.raises(UsageError, match="float16 trains on cuda only"): cpu(dtype="float16")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_threads_stay_within_the_affinity_of_the_process(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_threads() == 1
    finally: os.sched_setaffinity(0, before)
    assert 1 <= available_threads() <= len(before)


def test_a_wish_for_threads_is_respected(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert available_threads() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")  # for each level of threads within threads
    assert available_threads() == 3
    for no_number in ("many", "4097", "18446744073709551617,2", "9" * 5000, "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", no_number)
        assert 1 <= available_threads() <= os.cpu_count()


V1 = "9:name=systemd:/\n4:memory:/job/step\n3:cpu,cpuacct:/job/step\n0::/"


@pytest.mark.parametrize("own, limits", [
    (V1, {"memory/job/memory.limit_in_bytes": 7, "memory/memory.limit_in_bytes": 9, "memory/other/memory.max": 1}),
    (V1, {"memory/memory.limit_in_bytes": 7, "memory.max": 8, "cpu/job/step/memory.limit_in_bytes": 1}),
    ("0::/job.slice/step.scope", {"job.slice/memory.max": 7, "job.slice/step.scope/memory.max": 8, "x/memory.max": 1}),
    ("0::/docker/5e1f", {"memory.max": 7}), ("0::/../other", {"memory.max": 7}), ("", {"memory.max": 7}),
    ("4:memory:/a\n0::/b:c", {"unified/b:c/memory.max": 7, "memory/a/memory.limit_in_bytes": 8})])
def test_limits_are_those_of_each_control_group_around_this_process(tmp_path, own, limits):
    (tmp_path / "own").write_text(own)
    for path, limit in limits.items():
        (tmp_path / "shown" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shown" / path).write_text(f"{limit}\n")
    found = [path for group in cgroups("memory", tmp_path / "shown", tmp_path / "own") for path in group.glob("memory*")
             if path.is_file()]
    assert min(int(path.read_text()) for path in found) == 7


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "max 100000"}, None), ({}, None),
    ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 1),
    ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None)])
def test_a_quota_is_cores_rounded_up(tmp_path, files, cores):
    for name, text in files.items(): (tmp_path / name).write_text(text)
    assert device_module._quota(tmp_path) == cores


LIMITS = """
import os, sys
from llm_trainer.device import available_threads, total_memory
from llm_trainer.generation.serve import _memory
import torch
del os.environ["OMP_NUM_THREADS"]
for group in sys.argv[1:]:
    with open(f"{group}/cgroup.procs", "w") as f: f.write(str(os.getpid()))
print(available_threads(), total_memory("cpu") // 10**8, _memory(torch.device("cpu")) // 10**7)
"""
V1_GROUPS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cpu")]


@pytest.mark.skipif(not all(os.access(group / "cgroup.procs", os.W_OK) for group in V1_GROUPS),
                    reason="needs control groups (version 1) that may be made")
def test_a_real_control_group_limits_memory_threads_and_what_a_server_keeps():
    pytest.importorskip("uvicorn")
    groups = [group / f"llm-trainer-test-{os.getpid()}" for group in V1_GROUPS]
    inner = [group / "step" for group in groups]
    try:
        for group in inner: group.mkdir(parents=True)
        (groups[0] / "memory.limit_in_bytes").write_text("2000000000")
        (groups[1] / "cpu.cfs_quota_us").write_text("50000")
        done = warm.program(Path(), *inner, code=LIMITS)
        assert done.stdout.split() == ["1", "19", "24"], done.stderr
    finally:
        for group in (*inner, *groups):
            if group.is_dir(): group.rmdir()


def test_memory_of_this_process_grows_with_what_it_holds():
    before = memory_used("cpu")
    held = torch.ones(2**26)  # 256 MB
    assert 2**27 < memory_used(torch.device("cpu")) - before + (held[0] < 0)


def test_peak_flops_knows_chips_by_their_names():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "float16") == 756e12
    assert peak_flops("NVIDIA A10G", "bfloat16") < peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
    assert peak_flops("NVIDIA L4", "float32") == 30.3e12 and peak_flops("NVIDIA L40S", "float32") == 91.6e12
    assert peak_flops("Intel(R) Xeon(R) Processor", "bfloat16") is None


# The resolution

def test_a_resolution_survives_json_and_newer_keys():
    r = cpu()
    assert Resolution.from_dict(json.loads(json.dumps({**r.to_dict(), "world_size": 1}))) == r
    assert r.device in describe(r) and r.dtype in describe(r)


def test_apply_makes_it_true_for_this_process():
    assert cpu(threads=1).apply() == torch.device("cpu")
    assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    cpu(threads=2, deterministic=False).apply()
    assert torch.get_num_threads() == 2 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(why_not("cuda") is None, reason="there is a GPU")
def test_a_stored_device_that_is_gone_is_refused():
    stored = Resolution.from_dict({**cpu().to_dict(), "device": "cuda", "device_name": "H100"})
    with pytest.raises(UsageError, match=r"computes on cuda \(H100\), but"): stored.apply()


def test_the_clauses_that_do_not_hold_are_named():
    r = cpu(threads=1)
    assert r.differs(cpu(threads=1)) == []
    then = cpu(threads=2, deterministic=False)
    assert then.differs(r) == ["threads: 2 then, 1 now", "deterministic: False then, True now"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_products_not_weights(dtype):
    layer = torch.nn.Linear(4, 4)
    with cpu(dtype=dtype).autocast(): y = layer(torch.ones(2, 4))
    assert y.dtype == getattr(torch, dtype) and layer.weight.dtype == torch.float32


# Random numbers

def draws(): return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_generators_go_on_where_they_stood(seed, warm):
    seed_everything(seed)
    for _ in range(warm):
        random.gauss(0, 1)
        np.random.randn()
        torch.randn(1)
    state = load(save(rng_state()))  # through a checkpoint's file format
    expected = draws()
    seed_everything(seed + 1 & 0xffffffff)
    set_rng_state(state)
    assert draws() == expected
    set_rng_state(state)
    assert all(torch.equal(t, state[name]) for name, t in rng_state().items())


def test_the_same_seed_gives_the_same_numbers():
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first


def test_states_are_bytes_and_damaged_ones_are_refused():
    state = rng_state()
    assert all(t.dtype == torch.uint8 for t in state.values()) and {"python", "numpy", "torch"} <= state.keys()
    with pytest.raises(UsageError, match="python's random numbers is damaged"):
        set_rng_state({**state, "python": state["python"][:-1]})


# On a GPU

@pytest.mark.cuda
@pytest.mark.skipif(why_not("cuda") is not None, reason="needs a CUDA GPU")
def test_cuda():
    r = resolve(TrainConfig())
    assert r.device == "cuda" and r.compile and not r.deterministic and r.reason.endswith("using cuda")
    device = resolve(TrainConfig(deterministic=True, threads=r.threads)).apply()
    seed_everything(1)
    torch.rand(3, device=device)
    state = load(save(rng_state()))
    expected = torch.rand(3, device=device)
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device=device), expected)
    ones = torch.ones(8, 8, device=device)
    with r.autocast(): assert (ones @ ones).dtype == getattr(torch, r.dtype)
    held = torch.ones(2**20, device=device)
    assert memory_used(device) >= held.nbytes


@pytest.mark.cuda
@pytest.mark.skipif(why_not("cuda") is not None, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_deterministic_attention_on_cuda(dtype):
    r = resolve(TrainConfig(deterministic=True, dtype=dtype))
    device = r.apply()
    def gradient():
        seed_everything(3)
        q = torch.randn(2, 4, 256, 64, device=device, requires_grad=True)
        with r.autocast():
            x = q.to(getattr(torch, dtype))
            torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.1).sum().backward()
        return q.grad
    assert torch.equal(gradient(), gradient())


def test_a_resolution_leaves_its_process_as_it_found_it():
    def now():
        return (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision())
    before = now()
    @keeping_settings
    def training():
        cpu(threads=before[0] + 1, deterministic=not before[1], dtype="bfloat16").apply()
        yield now()
    running = training()
    assert next(running) == (before[0] + 1, not before[1], "high")
    running.close()
    assert now() == before


def test_a_busy_core_is_no_reason_to_wait(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device_module, "available_threads", lambda: 4)
    for paces, threads in (({1: 4, 2: 2, 4: 1}, 4), ({1: 1, 2: 0.9, 4: 3}, 2), ({1: 1, 2: 5, 4: 9}, 1)):
        monkeypatch.setattr(device_module, "_paces", lambda act, most, paces=paces: paces)
        assert unhindered_threads() == threads
    looks = iter([{1: 1, 2: 5, 4: 9}, {1: 4, 2: 2, 4: 1}])
    monkeypatch.setattr(device_module, "_paces", lambda act, most: next(looks))
    assert unhindered_threads() == 4, "a core that was busy for a moment"
    monkeypatch.setattr(device_module, "_paces", lambda act, most: {1: 1.05, 2: 1.0, 4: 1.5})
    assert fast_threads(None) == 1


LIMITED = """
from dataclasses import replace
from llm_trainer.config import TrainConfig
from llm_trainer.device import available_threads, describe, resolve
r = resolve(TrainConfig(device="cpu", threads=1))
then = replace(r, threads=2, math="")
print(available_threads(), ", 1 thread," in describe(then), "; ".join(then.inexact()))
try: resolve(TrainConfig(device="cpu", threads=2))
except ValueError as e: print(e)
"""


def test_threads_that_openmp_does_not_give_are_named():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"})
    said, refused, next_step = done.stdout.splitlines()
    assert said == "1 True threads: 2 then, 1 now; math library: unset then, OMP_THREAD_LIMIT=1 now"
    assert "--threads 2 is more" in refused and "--threads 1; or" in next_step


@pytest.mark.parametrize("name, counts", [
    ("OMP_THREAD_LIMIT", True), ("OMP_DYNAMIC", True), ("MKL_CBWR", True), ("MKL_DOMAIN_NUM_THREADS", True),
    ("KMP_DETERMINISTIC_REDUCTION", True), ("OPENBLAS_CORETYPE", True), ("BLIS_ARCH_TYPE", True),
    ("DNNL_DEFAULT_FPMATH_MODE", True), ("MKL_DEBUG_CPU_TYPE", True), ("NVIDIA_TF32_OVERRIDE", True),
    ("OMP_NUM_THREADS", False), ("OMP_WAIT_POLICY", False), ("GOMP_SPINCOUNT", False), ("KMP_BLOCKTIME", False),
    ("GOMP_CPU_AFFINITY", False), ("ONEDNN_VERBOSE", False), ("KMP_INIT_AT_FORK", False), ("HOME", False)])
def test_what_changes_the_arithmetic_is_a_clause_and_nothing_else(monkeypatch, name, counts):
    r = cpu(threads=1)
    monkeypatch.setenv(name, "8")
    assert bool(r.inexact()) == (f"{name}=8" in "".join(r.inexact())) == counts


def test_other_kernels_are_a_clause():
    r = cpu(threads=1)
    then = replace(r, kernels="AVX512, family 6 model 143", math="MKL_CBWR=AVX2")
    assert [clause.partition(":")[0] for clause in then.inexact()] == ["CPU kernels", "math library"]
    assert replace(r, kernels=None, math=None).inexact() == []
    newer = ("kernels", "math", "probed", "muon_dtype", "hindered")
    older = {k: v for k, v in r.to_dict().items() if k not in newer}
    assert Resolution.from_dict(older).muon_dtype == "bfloat16"
