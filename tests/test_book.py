"""What the tutorials tell you to do has the promised effect, tried in a copy of the repository; so has each setting."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from llm_trainer import workspace
from llm_trainer.cli.commands import front
from llm_trainer.config import all_settings, load_config

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
PAGES = [*TUTORIALS, *sorted((ROOT / "nbs").glob("*.ipynb"))]
pytestmark = pytest.mark.xdist_group("book")


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == kind]


def blocks(path: Path, language: str) -> list[str]:
    "The fenced blocks of one language in a notebook's prose"
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [found for text in cells(path, "markdown") for found in fenced.findall(text + "\n")]


# -- Links

def test_every_link_between_notebooks_is_a_file_beside_them():
    "So they work in Jupyter and on GitHub, not only on the site"
    wrong = []
    for path in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells(path, "markdown"))):
            target = link.partition("#")[0]
            if "://" in link or not target: continue
            if not (path.parent / target).is_file() or target.endswith(".html"): wrong.append(f"{path.name}: {link}")
    assert not wrong


def test_each_tutorial_leads_to_the_next():
    for path, after in zip(TUTORIALS[1:], TUTORIALS[2:]):
        assert f"({after.name})" in cells(path, "markdown")[-1], path.name


# -- Commands and profiles

FOREIGN = ("--include-path", "--quantization")  # flags of other programs that a tutorial names

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_every_command_of_a_tutorial_is_one(path):
    for line in "\n".join(blocks(path, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["llm-trainer"] and "--z-loss" not in words: front.parse(words[1:])
    flags = {f"--{f.name.replace('_', '-')}" for c in front.commands.values() for f in c.flags.values()}
    flags |= {"--z-loss", *FOREIGN}
    said = set(re.findall(r"`(--[a-z][\w-]*)", "\n".join(cells(path, "markdown"))))
    assert {word.replace("_", "-") for word in said} <= flags


def test_the_profile_of_a_mix_mixes(tmp_path):
    (text,) = blocks(ROOT / "nbs" / "tutorials" / "04_your_own_text.ipynb", "toml")
    (tmp_path / "mine.toml").write_text(text)
    mix = load_config(str(tmp_path / "mine.toml")).data.dataset
    assert [(part.name, part.weight) for part in mix] == [("my-notes", 3), ("python-docs", 1)]


# -- The knob of tutorial 03, followed to the letter

def apply(diff: str, copy: Path) -> None:
    "Make an edit that a tutorial shows: lines with a space or a minus, there once, become those with a space or a plus"
    first, *lines = diff.rstrip("\n").split("\n")
    path = copy / first.removeprefix("# ")
    nb = json.loads(path.read_text(encoding="utf-8"))
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    hits = [cell for cell in nb["cells"] if old in "".join(cell["source"])]
    assert len(hits) == 1 and "".join(hits[0]["source"]).count(old) == 1, f"{path.name} no longer holds:\n{old}"
    hits[0]["source"] = "".join(hits[0]["source"]).replace(old, new).splitlines(keepends=True)
    path.write_text(json.dumps(nb))


LOSSES = """
import json, sys
from llm_trainer import workspace
from llm_trainer.config import load_config
from llm_trainer.runs.run import new_id
from llm_trainer.training.recipe import train
space = workspace.find()
found = {}
for flags in json.loads(sys.argv[1]):
    config = load_config("tiny", {"max_steps": 4, "sample_every": 0, "save_every": 0, **flags})
    events = list(train(new_id(), config, {"target_epochs": 2, "target_steps": 4}, space))
    found[json.dumps(flags)] = [[e.loss.hex() for e in events if e.kind == kind] for kind in ("step", "evaluated")]
print(json.dumps(list(found.values())))
"""


def losses(root: Path, space: Path, *flags: dict) -> list:
    env = {**os.environ, "PYTHONPATH": str(root), "LLM_TRAINER_HOME": str(space), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", LOSSES, json.dumps(flags)], cwd=space, env=env, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_new_knob_reaches_the_model(tmp_path):
    pytest.importorskip("nbdev", reason="exporting needs: pip install 'llm_trainer[dev]'")
    copy, space = tmp_path / "copy", workspace.init(tmp_path / "space").root
    copy.mkdir()
    for name in ("nbs", "llm_trainer", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, copy)
    for diff in blocks(ROOT / "nbs" / "tutorials" / "03_add_a_knob.ipynb", "diff"): apply(diff, copy)
    subprocess.run(["nbdev-export"], cwd=copy, check=True, capture_output=True)
    before, = json.loads(warm.program(space, json.dumps([{}]), code=LOSSES).stdout.splitlines()[-1])
    off, on = losses(copy, space, {"z_loss": 0.0}, {"z_loss": 0.1})
    assert off == before
    # the first training loss has the penalty, and the weights are other ones
    assert on[0][0] != off[0][0] and on[1] != off[1]
    env = {**os.environ, "PYTHONPATH": str(copy), "LLM_TRAINER_HOME": str(space)}
    def ask(*words):
        return subprocess.run([sys.executable, "-m", "llm_trainer", *words], cwd=space, env=env, capture_output=True,
                              text=True)
    assert "--z_loss X" in ask("train", "--help").stdout or "--z-loss X" in ask("train", "--help").stdout
    assert "from 0 to 1" in ask("train", "--config", "tiny", "--z-loss", "2").stderr


# -- Every setting does something

BASE = {"max_steps": 6, "log_every": 1, "eval_every": 3, "save_every": 0, "sample_every": 0, "eval_batches": 2,
        "warmup_steps": 2, "n_layer": 1}
OTHER = {  # another value than tiny's, and what else must be set for it to mean something
    "arch": "qwen3", "n_layer": 2, "n_head": 2, "n_kv_head": (2, {"arch": "qwen3"}),
         "head_size": (16, {"arch": "qwen3"}), "n_embd": 64,
    "n_hidden": 64, "seq_len": 32, "dropout": 0.5, "tokenizer": "byte", "vocab_size": 300, "val_fraction": 0.3,
         "shuffle": False,
    "batch_size": 4, "grad_accum_steps": 2, "epochs": (1, {"max_steps": 0, "batch_size": 64, "log_every": 50}),
         "max_steps": 3,
    "optimizer": "muon", "lr": 1e-3, "muon_lr": (1e-3, {"optimizer": "muon"}), "min_lr": 1e-3, "warmup_steps": 4,
         "schedule": "linear",
    "decay_fraction": (0.9, {"schedule": "wsd"}), "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.9, "grad_clip": 0.01,
         "dtype": "bfloat16",
    "seed": 7, "log_every": 2, "eval_every": 2, "eval_batches": 1, "save_every": 2,
         "keep_checkpoints": (1, {"save_every": 2}),
    "sample_every": 3, "sample_prompt": ("Once", {"sample_every": 3}), "max_new_tokens": (3, {"sample_every": 3}),
    "temperature": (0.0, {"sample_every": 3}), "top_k": (1, {"sample_every": 3}), "top_p": (0.01, {"sample_every": 3}),
    "min_p": (0.99, {"sample_every": 3}), "repetition_penalty": (5.0, {"sample_every": 3}),
    "patience": (1, {"lr": 10.0, "eval_every": 1, "max_steps": 12, "log_every": 20}),
         "dataset": str(ROOT / "README.md")}
WITHOUT = {  # no other result by design, or none that a short run on an offline CPU can show; where it is tried
    "dataset_config": "test_hub", "dataset_revision": "test_hub", "text_column": "test_data", "offline": "test_hub",
    "streaming": "test_hub", "num_workers": "test_batches: other processes, the same batches",
           "compile": "test_trainer, test_cuda",
    "strategy": "test_distributed, test_cuda_devices",
    "device": "test_device, test_cuda", "threads": "test_device", "deterministic": "test_device, test_cuda",
    "save_minutes": "test_trainer: a clock", "init_from": "test_tiny"}


VARIES = ("tokens_per_second", "eta_seconds", "memory_bytes", "seconds", "path", "meta")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "What a short run does, as text: its events, and what lies on the disk afterwards"
    from llm_trainer.runs.run import new_id
    from llm_trainer.training.recipe import train
    space, known = workspace.init(tmp_path_factory.mktemp("settings")), {}

    def look(**flags):
        key = json.dumps(flags, sort_keys=True)
        if key in known: return known[key]
        config, name = load_config("tiny", flags), new_id()
        goal = {"target_epochs": config.training.epochs, "target_steps": config.training.max_steps or None}
        told = [{k: v for k, v in vars(e).items() if k not in VARIES} for e in train(name, config, goal, space)
                if e.kind not in ("phase", "progress", "note")]
        known[key] = repr(told) + repr(sorted(p.name for p in (space.checkpoints / name).glob("step-*")))
        return known[key]
    return look


def test_every_setting_is_tried_or_named_as_without_effect():
    assert set(OTHER) | set(WITHOUT) == set(all_settings()) and not set(OTHER) & set(WITHOUT)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")
                      if path.name != "test_book.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "llm_trainer").rglob("*.py")
                     if path.name != "config.py")
    for name in WITHOUT: assert name in tests and name in code, name


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_has_an_effect(name, seen):
    value, more = OTHER[name] if isinstance(OTHER[name], tuple) else (OTHER[name], {})
    base = {**BASE, **more}
    if name == "dataset": base.pop(name, None)
    first = {k: v for k, v in base.items() if k != name or name in BASE}
    assert seen(**{**base, name: value}) != seen(**first)
