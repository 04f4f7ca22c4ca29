"""What the code may not contain, anywhere: a way from a file's bytes to running code, or from a word to a shell."""
import ast
import json
import os
import re
import stat
from pathlib import Path

import pytest
from torture import hostile

from llm_trainer.runs.run import create_run

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "llm_trainer").rglob("*.py"), *(ROOT / "nbs").rglob("*.ipynb"),
                  *(ROOT / "bench").glob("*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "commands",
           "pty"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "numpy.load", "np.load",
         "torch.hub.load",
         "pandas.read_pickle", "tempfile.mktemp", "extractall", "torch.jit.load", "torch.package.PackageImporter"}
KEYWORDS = {"trust_remote_code", "shell", "allow_pickle", "weights_only"}


def trees(path: Path):
    "The syntax trees of a module, or of the code cells of a notebook"
    if path.suffix == ".py": return [ast.parse(path.read_text())]
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = [[line for line in "".join(c["source"]).split("\n") if not line.lstrip().startswith(("!", "%"))]
             for c in cells]
    return [ast.parse("\n".join(each)) for each in lines]


def faults(tree: ast.AST) -> list[str]:
    "What in a tree is not allowed"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            found.append(node.module)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.split(".")[-1] == "extractall": found.append(f"line {node.lineno}: {name}()")
            found += [f"line {node.lineno}: {k.arg}=" for k in node.keywords if k.arg in KEYWORDS]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_evaluates_or_calls_a_shell(path):
    assert [fault for tree in trees(path) for fault in faults(tree)] == []


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import torch; torch.load('x', weights_only=True)", "eval('1')",
    "exec(code)", "subprocess.run('x', shell=True)", "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "np.load('x', allow_pickle=True)", "tarfile.open('x').extractall()", "os.system('x')", "import yaml"])
def test_the_walk_would_see_it(line): assert faults(ast.parse(line))


def test_what_looks_alike_is_fine():
    assert not faults(ast.parse("model.eval(); torch.compile(f); re.compile('x'); json.load(f); load_model(f); "
                                "subprocess.run(['x'])"))


@pytest.mark.parametrize("name", [n for n in hostile.pickles(Path("nowhere"))
                                  if n.startswith(("pickle", "global", "inst"))])
def test_each_payload_would_run_if_something_unpickled_it(name, tmp_path):
    "The battery's payloads are sharp"
    import pickle
    sentinel = tmp_path / "sentinel"
    pickle.loads(hostile.pickles(sentinel)[name])
    assert sentinel.exists()


READS = {"read_text", "write_text", "read_bytes", "write_bytes", "copyfile", "rmtree"}
OPENS = {"open", "io.open", "gzip.open", "tokenize.open"}
READY = {"O_NONBLOCK", "O_DIRECTORY", "O_EXCL", "os.devnull"}  # with one of these os.open waits for nobody
OURS = re.compile(r"/proc/|__file__|files\('llm_trainer'\)|\bopen\((fd|os\.devnull)\b")
FINE = {
    # files of a folder that was made just before, for them
    "data/batches.py": {"open"}, "data/cache.py": {"(work / name).write_text"},
    "data/tokenizer.py": {"(folder / 'tokenizer.json').write_bytes", "(folder / 'tokenizer_config.json').write_bytes"},
    "model/huggingface.py": {"(Path(folder) / name).write_text",
                             "(Path(folder) / 'model.safetensors.index.json').write_text"},
    "runs/torchrun.py": {"(folder / str(rank)).write_text"}, "training/saved.py": {
        "(folder / 'state/trainer.json').write_text"},
    "runs/export.py": {"(target / 'README.md').write_text", "shutil.copyfile"},
    # the same, and Python's own library
    "data/builtin.py": {"open", "tokenize.open"},
    # texts that a person names: what is no file is refused before
    "data/readers.py": {"open", "gzip.open"},
    "cli/commands.py": {"path.write_text", "workspace.home(output).write_bytes"}, "config.py": {"path.open"},
    "workspace.py": {"path.read_bytes", "new.write_text"},
    "generation/serve.py": {"(Path(folder) / 'generation_config.json').read_bytes"},
    # the kernel's
    "device.py": {"Path(path).read_text"}, "system/process.py": {"path.read_text"},
    "system/energy.py": {"file.read_text", "(zone / 'max_energy_range_uj').read_text"}}


def waits(tree: ast.AST) -> set[str]:
    "The calls that open or remove what is at a path without asking what it is: at a pipe's they would wait for ever"
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or OURS.search(text := ast.unparse(node)): continue
        name = ast.unparse(node.func)
        last, mode = name.rpartition(".")[2], node.args and isinstance(node.args[0], ast.Constant)
        if (name in OPENS or (name != last and last in READS) or (last == "open" and mode)
            or (name == "os.open" and not any(word in text for word in READY))): found.add(name)
    return found


@pytest.mark.parametrize("path", (ROOT / "llm_trainer").rglob("*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_opened_that_could_be_a_pipe(path):
    name = str(path.relative_to(ROOT / "llm_trainer"))
    assert name == "system/files.py" or waits(ast.parse(path.read_text())) <= FINE.get(name, set())


@pytest.mark.parametrize("line", [
    "open(path)", "path.open('rb')", "path.read_text()", "(folder / 'x').write_bytes(b'')", "shutil.rmtree(folder)",
    "os.open(path, os.O_WRONLY | CREATE)", "gzip.open(path)"])
def test_the_walk_would_see_a_wait(line): assert waits(ast.parse(line))


def test_run_folders_are_private(tmp_path):
    old = os.umask(0)
    try: run = create_run(tmp_path, {}, note="mine")
    finally: os.umask(old)
    for path in [run.folder, *run.folder.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path
