"""The import directions of DESIGN: nothing imports upward, and the faces load without torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llm_trainer"
LAYERS = [
    {"errors", "workspace", "terminal", "host", "failpoints", "config", "records", "runs"},
    {"device", "cache", "builtin", "hub", "data", "tokenizer"},
    {"batches", "model", "weights", "cost", "optimizer", "checkpoint"},
    {"trainer", "filters", "decode", "gpu", "sampler"},
    {"train", "measure", "worker", "launch", "settle", "generate_server"},
    {"frontend", "show", "follow", "talk", "doctor", "plan", "cli", "tui", "live"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NO_TORCH = ["llm_trainer", "llm_trainer.config", "llm_trainer.runs", "llm_trainer.launch", "llm_trainer.cli", "llm_trainer.tui.app"]


def imported(path: Path) -> set[str]:
    "Modules of this package that `path` imports, anywhere in it"
    package = ["llm_trainer", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [stem] if stem != "llm_trainer" else [f"{stem}.{a.name}" for a in node.names]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith("llm_trainer.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if me in ("__init__", "_modidx"): return
    assert me in RANK, f"{me} has no layer: add it to LAYERS"
    for other in imported(path) - {"__version__", me}:
        assert RANK[other] <= RANK[me], f"{me} (layer {RANK[me]}) imports {other} (layer {RANK[other]})"


def test_trainer_and_runs_do_not_know_each_other():
    assert "runs" not in imported(PACKAGE / "trainer.py") and "trainer" not in imported(PACKAGE / "runs.py")


def test_viewers_never_import_the_trainer():
    for path in [PACKAGE / "live.py", *(PACKAGE / "tui").rglob("*.py")]:
        assert not imported(path) & {"trainer", "train", "model"}, path


@pytest.mark.parametrize("module", NO_TORCH)
def test_faces_load_without_torch(module):
    code = f"import {module}, sys; sys.exit(bool({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_status_needs_no_pydantic():
    code = "import llm_trainer.runs, llm_trainer.host, llm_trainer.workspace, sys; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exported_modules_need_no_fastcore():
    for path in PACKAGE.glob("*.py"):
        assert "fastcore" not in path.read_text() or path.name == "_modidx.py", path
