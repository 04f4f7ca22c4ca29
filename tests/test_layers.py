"""The import directions of DESIGN: strictly downwards between words, no circle, and faces that load without torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llm_trainer"
TOWER = [{"errors", "terminal", "workspace", "config", "events", "device"}, {"system"}, {"data"}, {"model"},
         {"generation"}, {"training"}, {"runs"}, {"notebook", "tui"}, {"cli"}]
RANK = {word: rank for rank, words in enumerate(TOWER) for word in words}
ON_TOP = ("__init__", "__main__", "_modidx")


def name_of(path: Path) -> str:
    "`llm_trainer/data/corpus.py` → `data.corpus`; a folder's `__init__` is the folder"
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    "Modules of this package that `path` imports, anywhere in it: in functions and under TYPE_CHECKING too"
    package = ["llm_trainer", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{a.name}" for a in node.names]
        else: continue
        for name in names:
            if not name.startswith("llm_trainer."): continue
            inner = name.removeprefix("llm_trainer.")
            found |= {m for m in (inner, inner.rpartition(".")[0]) if m in MODULES}
    return found - {name_of(path)}


ARROWS = {name: imported(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", [m for m in MODULES if m not in ON_TOP])
def test_words_point_down(name):
    me = name.partition(".")[0]
    assert me in RANK, f"{me} is no word of the house: see TOWER"
    for other in ARROWS[name]:
        word = other.partition(".")[0]
        if word in ON_TOP or word == me: continue
        assert RANK[word] < RANK[me] or RANK[me] == 0, f"{name} imports {other}, which doesn't stand below it"
        assert RANK[word] <= RANK[me], f"{name} imports {other}, which stands above it"


def test_no_circle():
    "Also not inside a word"
    done, path = set(), []

    def walk(name):
        assert name not in path, " → ".join([*path[path.index(name):], name])
        if name in done: return
        path.append(name)
        for other in sorted(ARROWS[name]): walk(other)
        done.add(path.pop())

    for name in ARROWS:
        if name != "__init__": walk(name)


def test_folders_import_nothing():
    "An `__init__` with an import would load its folder's torch for whoever wants one light module of it"
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent in (PACKAGE, PACKAGE / "notebook"): continue  # entry points, which load their parts when asked
        imports = [node for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not imports, path


def test_chapters_are_in_reading_order():
    "A page imports no page that comes after it"
    number = {}
    for page in sorted((PACKAGE.parent / "nbs").glob("[0-9]*.ipynb")):
        for line in page.read_text(encoding="utf-8").split('"'):
            if line.startswith("#| default_exp "):
                number[line.removeprefix("#| default_exp ").strip().removesuffix("\\n")] = page.name
    assert len(number) > 20
    for module, page in number.items():
        later = {number[other] for other in ARROWS[module] if other in number and number[other] > page}
        assert not later, f"{page} imports {', '.join(later)}"


def test_viewers_never_import_the_trainer():
    trainers = ("model.transformer", "training.trainer", "training.recipe")
    for name, found in ARROWS.items():
        if name == "notebook" or name.startswith("tui"): assert not [m for m in found if m.startswith(trainers)], name


LIGHT = [m for m in MODULES if m.partition(".")[0] in (
    "config", "events", "runs", "cli", "tui", "system", "workspace", "__init__")]


def test_faces_load_without_torch():
    "One process imports them one by one, so that the first that loads torch is named"
    code = ("import importlib, sys\n"
            f"for name in {[*LIGHT, 'training.checkpoint', 'model.safetensors']!r}:\n"
            "    importlib.import_module('llm_trainer' if name == '__init__' else f'llm_trainer.{name}')\n"
            "    heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
            "    if heavy: sys.exit(f'{name} loads {heavy}')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_status_needs_no_pydantic():
    code = "import llm_trainer.runs.run, llm_trainer.system.process, sys; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exported_modules_need_no_fastcore():
    for name, path in MODULES.items(): assert "fastcore" not in path.read_text() or name == "_modidx", path
