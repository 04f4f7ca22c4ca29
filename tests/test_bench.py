"""The scripts in bench/: each measures something, finishes, and says so in one JSON object. No figure is asserted."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from llm_trainer.device import Resolution, resolve
from llm_trainer.config import TrainConfig

BENCH = Path(__file__).parent.parent / "bench"


def script(name: str):
    "A script of bench/ as a module"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_it_was():
    "Measuring sets up PyTorch for the whole process; put it back"
    import torch
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    torch.set_float32_matmul_precision(before[2])


@pytest.mark.parametrize("peer", ["none", "loop"])
def test_train(peer, as_it_was):
    found = script("train").measure("tiny", steps=2, rounds=2, peer=peer, device="cpu", batch_size=2)
    assert {"device", "dtype", "threads", "batch_tokens", "matmul_tflops", "memory", "profile", "gpt2"} <= found.keys()
    assert found["batch_tokens"] == 2 * 64
    for row in (found[name] for name in ("profile", "gpt2", "peer") if name in found):
        assert row["tokens_per_second"] > 0 and row["step_ms"] > 0 and row["parameters"] > 0
    assert ("ratio" in found) == (peer == "loop")
    if peer == "loop": assert found["peer"]["parameters"] == found["gpt2"]["parameters"]
    json.dumps(found, allow_nan=False)


def test_the_peer_is_of_the_very_same_shape():
    train, config = script("train"), script("train").load_config("tiny")
    theirs = train.hf_model(config, 512)
    assert sum(p.numel() for p in theirs.parameters()) == train.parameters_count(config.model, 512)
    assert theirs.config.n_inner == config.model.n_hidden and theirs.training


def test_turns_go_round(as_it_was):
    said = []
    turns = script("train").Turns(2, resolve(TrainConfig(device="cpu")))
    turns.contenders = {"a": lambda: said.append("a"), "b": lambda: said.append("b")}
    turns.guest_begins()
    for _ in range(4): said.append("guest"); turns.guest_stepped()
    assert said == ["guest", "guest", "a", "a", "b", "b"] * 2
    assert {name: len(s) for name, s in turns.seconds.items()} == {"peer": 2, "a": 2, "b": 2}
    assert isinstance(turns.resolution, Resolution) and turns.ratio("a", "a") == 1


@pytest.mark.parametrize("missing, peer", [([], "trainer"), (["accelerate"], "loop"), (["transformers", "accelerate"], "none")])
def test_what_is_missing_chooses_the_peer_and_is_said(missing, peer):
    choose = script("train").choose_peer
    assert choose("auto", missing)[0] == peer
    assert all(name in choose("auto", missing)[1] for name in missing)
    assert choose("none", missing) == ("none", "")


def test_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = script("load").measure(megabytes=1, repeats=1, batches=3, config="tiny")
    assert all(found[what]["ratio"] > 0 for what in ("prepare", "stream"))
    assert found["memory"]["peak_mb"] >= found["memory"]["of_imports_mb"] > 0 and found["memory"]["tokens"] > 100_000
    assert not list(tmp_path.iterdir())


def test_resume_as_a_script():
    done = subprocess.run([sys.executable, BENCH / "resume.py", "--config", "tiny", "--repeats", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds_to_first_step"] > 0 and found["torch_import_seconds"] > 0 and found["ratio"] > 0


def test_an_unknown_flag_is_refused():
    done = subprocess.run([sys.executable, BENCH / "resume.py", "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr
