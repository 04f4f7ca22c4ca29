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


@pytest.mark.parametrize("peer", [pytest.param("none", marks=pytest.mark.slow), "loop"])
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
    for _ in range(4):
        said.append("guest")
        turns.guest_stepped()
    assert said == ["guest", "guest", "a", "a", "b", "b"] * 2
    assert {name: len(s) for name, s in turns.seconds.items()} == {"peer": 2, "a": 2, "b": 2}
    assert isinstance(turns.resolution, Resolution) and turns.ratio("a", "a") == 1


@pytest.mark.parametrize("missing, peer", [([], "trainer"), (["accelerate"], "loop"),
                                           (["transformers", "accelerate"], "none")])
def test_what_is_missing_chooses_the_peer_and_is_said(missing, peer):
    choose = script("train").choose_peer
    assert choose("auto", missing)[0] == peer
    assert all(name in choose("auto", missing)[1] for name in missing)
    assert choose("none", missing) == ("none", "")


@pytest.mark.slow
def test_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = script("load").measure(megabytes=1, repeats=1, batches=3, config="tiny")
    assert all(found[what]["ratio"] > 0 for what in ("prepare", "stream"))
    assert found["memory"]["peak_mb"] >= found["memory"]["of_imports_mb"] > 0 and found["memory"]["tokens"] > 100_000
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_resume_as_a_script():
    done = subprocess.run([sys.executable, BENCH / "resume.py", "--config", "tiny", "--repeats", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds_to_first_step"] > 0 and found["torch_import_seconds"] > 0 and found["ratio"] > 0


def test_an_unknown_flag_is_refused():
    done = subprocess.run([sys.executable, BENCH / "resume.py", "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr


@pytest.mark.slow
def test_corpus(tmp_path, as_it_was):
    corpus, root = script("corpus"), tmp_path / "root"
    root.mkdir()
    texts = [f"# file {i}\n" + "def twice(x): return 2 * x\n" * (10 + i) for i in range(300)]
    for i, text in enumerate([*texts, texts[0], "short = 1\n"]): (root / f"{i}.py").write_text(text)
    tokenizer, train, val = corpus.prepare(root, tmp_path / "kept", 20_000)
    told = json.loads((tmp_path / "kept/corpus.json").read_text())
    held_out = [t for t in texts if corpus.hashlib.sha1(t.encode()).digest()[0] < 4]
    assert (told["documents"], told["val_documents"]) == (300 - len(held_out), len(held_out)) and held_out
    assert told["val_bytes"] == sum(len(t) for t in held_out)
    assert sorted(tokenizer.decode(val).split("# file ")[1:]) == sorted(t.removeprefix("# file ") for t in held_out)
    assert (train == tokenizer.eot_id).sum() > 1 and len(train) == told["train_tokens"]
    config = corpus.load_config("tiny").replace(**corpus.QUIET | dict(batch_size=2, device="cpu"))
    found = corpus.learn(config, tokenizer, train, val, 15 * 2 * 64)
    assert found["steps"] == 15 and found["tokens"] == 15 * 2 * 64 and found["bits_per_byte"] > 0
    assert found["stepping_s"] > 0
    json.dumps(found, allow_nan=False)


def test_start_tells_when_a_loss_was_reached():
    rows = [dict(kind="train", step=s, time=100 + 0.25 * s, loss=3.0) for s in (10, 20, 30, 40, 50)]
    rows[2:2] = [dict(kind="val", step=20, time=106, loss=2.5), dict(kind="val", step=25, time=107.5, loss=None)]
    rows.append(dict(kind="val", step=50, time=113.5, loss=1.9))
    found = script("start").told(rows, 100, 2.0)
    assert found == dict(first_logged_step=10, first_logged_step_s=2.5, reached_s=13.5, best=1.9, step_ms=250.0)
    assert script("start").told(rows, 100, 1.0)["reached_s"] is None
