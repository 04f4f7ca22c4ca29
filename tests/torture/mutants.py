"""`python -m tests.torture.mutants [--budget 60m] [--seed 0] [MODULE …]`: does a test notice a wrong line? (T24)

Changes one operator, constant or statement of a module at a time, in a copy of the checkout, and runs the tests about
that module; a change that no test notices has survived. Prints each, and the share that was killed."""
from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .battery import ROOT

TESTS = {  # module → the tests that should notice
    "training/checkpoint": ["test_checkpoint.py", "test_resume.py", "test_tiny.py"],
    "system/locks": ["test_system.py", "test_launch.py", "test_strangers.py"],
    "system/files": ["test_runs.py", "test_checkpoint.py", "test_system.py"],
    "runs/state": ["test_runs.py", "test_launch.py"],
    "runs/run": ["test_runs.py", "test_launch.py", "test_strangers.py"],
    "runs/writer": ["test_runs.py", "test_launch.py"],
    "cli/parser": ["test_frontend.py", "test_cli.py"],
    "cli/render": ["test_cli.py", "test_frontend.py"]}
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.And: ast.Or,
         ast.Or: ast.And}


def mutations(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    "Each small change: what it is, and the whole changed tree"
    for i, node in enumerate(ast.walk(tree)):
        for what, change in _changes(node):
            twin = copy.deepcopy(tree)
            change(next(n for j, n in enumerate(ast.walk(twin)) if j == i))
            yield f"line {getattr(node, 'lineno', '?')}: {what}", ast.fix_missing_locations(twin)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    def name(kind): return kind.__name__
    if isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if new := SWAPS.get(type(op)):
                yield f"{name(type(op))} → {name(new)}", lambda n, k=k, new=new: n.ops.__setitem__(k, new())
    if isinstance(node, ast.BoolOp | ast.BinOp) and (new := SWAPS.get(type(node.op))):
        yield f"{name(type(node.op))} → {name(new)}", lambda n, new=new: setattr(n, "op", new())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda n: (setattr(n, "op", ast.Not()),
                                        setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand)))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} → {not node.value}", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f"{node.value} → {node.value + 1}", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Return) and node.value and not (isinstance(node.value, ast.Constant)
                                                            and node.value.value is None):
        yield "returns None", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.Raise):
        other = ast.parse("StopAsyncIteration", mode="eval").body
        yield "raises something else", lambda n: n.__dict__.update(exc=other, cause=None)


def notices(copy_of: Path, module: str, limit: float) -> bool:
    "Does a test fail, or not come to its end?"
    tests = [str(copy_of / "tests" / name) for name in TESTS[module]]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(copy_of), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=copy_of, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    try: return child.wait(limit) != 0
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        child.wait()
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("--budget", type=float, default=60, help="minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, end, tried, survivors = random.Random(args.seed), time.monotonic() + 60 * args.budget, 0, []
    with tempfile.TemporaryDirectory(prefix="mutants-") as tmp:
        twin = Path(tmp) / "checkout"
        left = shutil.ignore_patterns(".git", ".venv", "runs", "checkpoints", "data", "_docs")
        shutil.copytree(ROOT, twin, symlinks=True, ignore=left)
        for name in ("runs", "checkpoints", "data"): (twin / name).mkdir(exist_ok=True)
        shutil.copytree(ROOT / "llm_trainer" / "data", twin / "llm_trainer" / "data", dirs_exist_ok=True)
        shutil.copytree(ROOT / "llm_trainer" / "runs", twin / "llm_trainer" / "runs", dirs_exist_ok=True)
        limits, todo = {}, []
        for module in args.modules:
            begun = time.monotonic()
            if notices(twin, module, 1200): sys.exit(f"the tests of {module} fail as it is")
            limits[module] = 60 + 3 * (time.monotonic() - begun)
            source = (ROOT / "llm_trainer" / f"{module}.py").read_text()
            todo += [(module, what, ast.unparse(tree)) for what, tree in mutations(ast.parse(source))]
        rng.shuffle(todo)
        for module, what, text in todo:
            if time.monotonic() > end: break
            path = twin / "llm_trainer" / f"{module}.py"
            whole = path.read_text()
            path.write_text(text)
            killed, tried = notices(twin, module, limits[module]), tried + 1
            path.write_text(whole)
            if not killed: survivors.append(f"{module}: {what}")
            print(f"{tried:>4} of {len(todo)}  {'killed  ' if killed else 'SURVIVED'}  {module}: {what}", flush=True)
    share = 1 - len(survivors) / max(1, tried)
    print(json.dumps({"mutants": len(todo), "tried": tried, "killed": round(share, 3), "survivors": survivors},
                     indent=1))
    return 0 if share >= 0.9 else 1


if __name__ == "__main__": sys.exit(main())
