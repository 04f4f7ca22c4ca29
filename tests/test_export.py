"""What leaves a workspace: folders and files that other programs open, the card beside them, and the way to a hub."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import conftest
import pytest
from hub_server import Hub

from llm_trainer import workspace
from llm_trainer.runs.export import model_card, plain, written

PROMPT = "Return the"


def program(space, *argv, **env): return conftest.program(space, *argv, HF_HUB_DISABLE_XET="1", **env)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    "A workspace with the run `done`"
    made = workspace.init(tmp_path_factory.mktemp("export"))
    ran = program(made, "train", "--config", "tiny", "--name", "done", "--max-steps", "12", "--seq-len", "32")
    assert ran.returncode == 0, ran.stderr
    return made


@pytest.fixture(scope="module")
def folder(space):
    "Its export, written under umask 022"
    ran = program(space, "export", "done", "--out", "model", "--json")
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(path=space.root / "model", said=json.loads(ran.stdout))


def test_a_folder_has_everything_but_the_state_of_training_and_modes_that_the_umask_gives(space, folder):
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"]
    assert sorted(os.listdir(folder.path)) == names and folder.said["folder"] == str(folder.path)
    umask = os.umask(0)
    os.umask(umask)
    assert folder.path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {p.stat().st_mode & 0o777 for p in folder.path.iterdir()} == {0o666 & ~umask}


def test_the_card_has_the_data_the_figures_and_the_settings(space, folder):
    card = (folder.path / "README.md").read_text()
    best = [json.loads(line) for line in (space.runs / "done/metrics.jsonl").read_text().splitlines()
            if '"val"' in line][-1]
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# model\n" in card
    for text in ("python-docs-tiny", f"{best['loss']:.4f}", f"{best['bits_per_byte']:.4f}", "| max\\_steps | 12 |",
                 "| step | 12 |", 'pipeline("text-generation", model="./model")'): assert text in card, text
    assert str(space.root) not in card


def test_a_card_holds_no_markup_of_what_it_tells(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "<script>"}')
    card = model_card("a\x1b[2J|b", tmp_path, {"config": {"data": {"dataset": "/home/me/secret/<b>x|y.txt"}},
                                               "parameters": 3}, {"step": 1})
    assert "\x1b" not in card and "<script>" not in card and "secret" not in card and "\\<b\\>x\\|y.txt" in card
    assert plain("/home/me/notes/") == "notes"


def test_an_export_writes_nothing_over_and_leaves_nothing_half(space, folder, tmp_path):
    for way in ([], ["--format", "gguf"]):
        ran = program(space, "export", "done", "--out", "model", *way)
        assert ran.returncode == 2 and "exists already" in ran.stderr
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (old := tmp_path / f".new.{gone.pid}.tmp").mkdir()
    (mine := tmp_path / ".new.1.tmp").mkdir()  # of a process that lives
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "new") as hidden:
        hidden.mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [mine] and not old.exists()


@pytest.mark.parametrize("argv, code, words", [
    (["done"], 2, "--out says where to write"),
    (["done", "--out", "x", "--quantize", "f16"], 2, "--quantize belongs to --format gguf"),
    (["done", "--out", "nowhere/x"], 3, "nowhere does not exist"),
    (["nobody", "--out", "x"], 3, "nobody"),
    (["done", "--out", "x", "--push", "no-slash"], 2, "--push takes USER/NAME"),
    (["done", "--out", "x", "--push", "me/x"], 2, "hf auth login")])
def test_what_can_not_be_meant_is_said_before_anything_is_written(space, tmp_path, argv, code, words):
    ran = program(space, "export", *argv, HF_HOME=str(tmp_path), HF_TOKEN="")
    assert ran.returncode == code and words in ran.stderr and not (space.root / "x").exists()


def test_a_folder_is_exported_as_a_run_is(space, folder):
    ran = program(space, "export", "./model", "--out", "again")
    assert ran.returncode == 0, ran.stderr
    assert "of unknown origin" in (space.root / "again/README.md").read_text()
    assert (space.root / "again/model.safetensors").read_bytes() == (folder.path / "model.safetensors").read_bytes()


def test_a_gguf_file_says_what_llama_cpp_will_read(space, tmp_path):
    gguf = pytest.importorskip("gguf")
    ran = program(space, "export", "done", "--format", "gguf", "--out", "model.gguf")
    assert ran.returncode == 0 and "llama-cli -m" in ran.stdout, ran.stderr
    fields = gguf.GGUFReader(space.root / "model.gguf").fields
    assert fields["general.architecture"].contents() == "gpt2" and fields["general.file_type"].contents() == 1
    assert fields["general.name"].contents() == "model" and fields["gpt2.context_length"].contents() == 32


def test_without_the_package_gguf_its_pip_line_is_the_answer(space, tmp_path):
    (tmp_path / "gguf.py").write_text("raise ImportError('gguf')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = program(space, "export", "done", "--format", "gguf", "--out", "y.gguf", PYTHONPATH=path)
    assert ran.returncode == 2 and "pip install 'llm_trainer[gguf]'" in ran.stderr
    assert not (space.root / "y.gguf").exists()


def test_push_makes_a_private_repository_of_what_was_written(space, tmp_path):
    with Hub() as hub:
        where = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_TOKEN=hub.token)
        ran = program(space, "export", "done", "--push", "me/first-model", "--json", **where)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["pushed"] == f"{hub.url}/me/first-model" and hub.private["me/first-model"]
        files = hub.models["me/first-model"]
        best = json.loads(ran.stdout)["checkpoint"]
        with open(f"{best}/model.safetensors", "rb") as f: assert files["model.safetensors"] == f.read()
        assert b"# first-model\n" in files["README.md"]
        assert not any("state" in name or "manifest" in name for name in files)
        ran = program(space, "export", "done", "--push", "me/first-model", "--out", "kept",
                      **{**where, "HF_TOKEN": "hf_other"})
        assert ran.returncode == 1 and "refused the login" in ran.stderr and (space.root / "kept/README.md").is_file()
        shutil.rmtree(space.root / "kept")
        before = len(hub.requests)
        assert program(space, "export", "done", "--out", "kept",
                       **where).returncode == 0 and len(hub.requests) == before


# ---- what opens the folder

def test_pipelines_take_batches_and_prompts_longer_than_the_context(folder):
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, pipeline
    write = pipeline("text-generation", model=str(folder.path))
    texts = write([PROMPT, "If the argument is", "x"], batch_size=3, max_new_tokens=5, do_sample=False)
    alone = write(PROMPT, max_new_tokens=5, do_sample=False)
    assert texts[0][0]["generated_text"] == alone[0]["generated_text"] and len(texts) == 3
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    assert tokenizer.model_max_length == 32 and tokenizer.pad_token and tokenizer.unk_token
    assert len(tokenizer(PROMPT * 50, truncation=True)["input_ids"]) == 32
    assert write(PROMPT * 50, handle_long_generation="hole", max_new_tokens=5, do_sample=False)[0]["generated_text"]


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_ctranslate2_opens_both_dialects_and_writes_the_same(tmp_path, arch):
    ctranslate2 = pytest.importorskip("ctranslate2")
    import torch
    from ctranslate2.converters import TransformersConverter

    from llm_trainer.config import ModelConfig
    from llm_trainer.data.tokenizer import train_tokenizer
    from llm_trainer.model.huggingface import save_weights
    from llm_trainer.model.transformer import GPT
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", 300, ["To be, or not to be: that is the question. " * 20])
    model = GPT(ModelConfig(arch=arch, n_layer=2, n_head=2, n_embd=32, seq_len=64), tokenizer.vocab_size).eval()
    for p in model.parameters():
        if p.ndim == 2: torch.nn.init.normal_(p[:model.vocab_size] if len(p) == len(model.head) else p, 0, 0.3)
    save_weights(model, tmp_path, tokenizer.eot_id)
    tokenizer.save(tmp_path, 64)
    TransformersConverter(str(tmp_path)).convert(str(tmp_path / "ct2"))
    ids = tokenizer.encode("To be, or")
    words = [tokenizer.backend.id_to_token(i) for i in ids]
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", inter_threads=1, intra_threads=1)
    found = generator.generate_batch([words], max_length=20, sampling_topk=1,
                                     include_prompt_in_result=False)[0].sequences_ids[0]
    with torch.no_grad(): logits = model(torch.tensor([ids + found]))[0][0, len(ids) - 1:-1]
    assert found == logits.argmax(-1).tolist() and found
