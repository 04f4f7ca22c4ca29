"""`python -m tests.torture.mutants [--budget 60] [MODULE …]`: does a test notice a wrong line? (T24)

Changes one operator, constant or statement of a module at a time, in a copy of the checkout, and runs the tests that
reach the changed line, quick ones first, until one fails; a change that none notices has survived. What came of it is
kept in mutants.json, where the next call goes on; a module that changed begins again. Survivors that no test could
notice are named, with why, in equivalent.toml."""
from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .battery import ROOT

MODULES = ("training/checkpoint", "system/locks", "system/files", "runs/state", "runs/run", "runs/writer",
           "cli/parser", "cli/render")
TESTS = ("test_system", "test_writer", "test_render", "test_checkpoint", "test_runs", "test_shown", "test_frontend",
         "test_cli", "test_resume", "test_launch", "test_strangers", "test_tiny", "test_security", "test_ranks",
         "test_readers")
RESULT, SAME = (Path(__file__).with_name(name) for name in ("mutants.json", "equivalent.toml"))
TITLE = ("one operator, constant or statement changed in the modules of checkpoints, locks, states and the command "
         "line: a test notices (`python -m tests.torture.mutants`; N are the changes tried, failures those that no "
         "test noticed though one could have)")
SLOW, ENOUGH = 4.0, 8.0  # seconds: longer tests kill no mutant, and the tests that one is given
PATIENT = 4  # So many times as much of both for survivors that are tried again
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub,
         ast.Sub: ast.Add, ast.And: ast.Or, ast.Or: ast.And}


# Changes -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mutant:
    "One small change of a module"
    module: str
    line: int
    column: int
    what: str
    make: Callable[[], str]  # → the changed source

    @property
    def name(self) -> str: return f"{self.line}:{self.column} {self.what}"


def mutants(module: str, source: str) -> list[Mutant]:
    "Every small change of a module, in an order of chance that is always the same"
    tree, found = ast.parse(source), []
    for i, node in enumerate(ast.walk(tree)):
        for k, (what, _) in enumerate(_changes(node)):
            def make(i=i, k=k):
                twin = copy.deepcopy(tree)
                changed = next(n for j, n in enumerate(ast.walk(twin)) if j == i)
                list(_changes(changed))[k][1](changed)
                return ast.unparse(ast.fix_missing_locations(twin))
            found.append(Mutant(module, getattr(node, "lineno", 0), getattr(node, "col_offset", 0), what, make))
    random.Random(module).shuffle(found)
    return found


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], object]]]:
    "What may be changed about a node: in words, and how"
    def name(kind): return kind.__name__
    if isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if new := SWAPS.get(type(op)):
                yield f"{name(type(op))} → {name(new)}", lambda n, k=k, new=new: n.ops.__setitem__(k, new())
    if isinstance(node, ast.BoolOp | ast.BinOp) and (new := SWAPS.get(type(node.op))):
        yield f"{name(type(node.op))} → {name(new)}", lambda n, new=new: setattr(n, "op", new())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand))
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


# Who reaches a line --------------------------------------------------------------------------------------------------

TRACER = '''
"Notes, for each test, the lines of some modules that its processes reach; begun by the interpreter"
import os, sys, threading
ROOM, FILES = os.environ.get("MUTANTS_ROOM"), {files!r}
if ROOM and os.path.exists(ROOM + "/trace"):
    out, put = os.open(ROOM + "/lines", os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.write
    def now():
        global test, seen
        with open(ROOM + "/now") as f: test, seen = f.read(), set()
    def local(frame, event, arg):
        if event == "line" and (key := (frame.f_code.co_filename, frame.f_lineno)) not in seen:
            seen.add(key)
            put(out, f"{{FILES[key[0]]}}\\t{{key[1]}}\\t{{test}}\\n".encode())
        return local
    def calls(frame, event, arg): return local if frame.f_code.co_filename in FILES else None
    now()
    os.register_at_fork(after_in_child=now)
    sys.settrace(calls), threading.settrace(calls)

    class Plugin:
        __loader__ = None
        def pytest_runtest_protocol(self, item):
            with open(ROOM + "/now", "w") as f: f.write(item.nodeid)
            now()
        def pytest_runtest_logreport(self, report):
            row = f"{{report.nodeid}}\\t{{report.duration}}\\t{{report.outcome}}\\n"
            with open(ROOM + "/times", "a") as f: f.write(row)
        def pytest_sessionfinish(self):
            with open(ROOM + "/modules", "w") as f: f.write("\\n".join(sys.modules))
    sys.modules["mutants_plugin"] = Plugin()
'''


class Reach:
    "Which tests reach a line, and how long they take"
    slow, enough = SLOW, ENOUGH

    def __init__(self, kept: dict, sources: dict[str, str]):
        self.modules = sorted({name for of in kept["tests"].values() for name in of["modules"]})
        self.seconds: dict[str, float] = {id: s for of in kept["tests"].values() for id, s in of["seconds"].items()}
        self.lines: dict[str, dict[int, set[str]]] = {module: {} for module in MODULES}
        for of in kept["tests"].values():
            for module, lines in of["lines"].items():
                moved = _moved(kept["sources"][of["sources"][module]], sources[module])
                for line, tests in lines.items():
                    self.lines[module].setdefault(moved[int(line)], set()).update(tests)
        self.width = Counter((module, test) for module, lines in self.lines.items() for tests in lines.values()
                             for test in tests)  # lines of a module that a test reaches

    def tests(self, mutant: Mutant, tree: ast.Module) -> tuple[set[str], set[str]]:
        """The tests that may notice a change, near and far: those that reach its line; of what is computed at
        import, where one test at most is seen, those that use it, then those of a module of tests that reaches its
        module"""
        lines, at = self.lines[mutant.module], mutant.line
        around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= at <= n.end_lineno]
        within = [n for n in around if isinstance(n, ast.FunctionDef) and n.body[0].lineno <= at]
        if within and len(found := self._quick(lines.get(at, ()))) > 1: return found, set()
        near = max(within, key=lambda n: n.lineno) if within else min(
            around, key=lambda n: n.end_lineno - n.lineno, default=tree.body[0])
        used = list(range(near.lineno, near.end_lineno + 1)) if isinstance(near, ast.FunctionDef) else []
        if isinstance(near, ast.Assign | ast.AnnAssign):
            names = {n.id for n in ast.walk(near) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            used += [n.lineno for n in ast.walk(tree) if getattr(n, "id", getattr(n, "attr", "")) in names]
        files = {test.partition("::")[0] for of in lines.values() for test in of}
        users = set().union(*(lines.get(line, ()) for line in [at, *used]))
        return self._quick(users), self._quick(test for test in {*self.seconds} - users
                                               if test.partition("::")[0] in files)

    def _quick(self, tests) -> set[str]:
        return {test for test in tests if self.seconds.get(test, self.slow) < self.slow}


def _moved(before: str, after: str) -> list[int]:
    "For each line of a text that was changed, from 1 on, the line where it, or the one above it, is now"
    old, new = before.splitlines(), after.splitlines()
    found, at = [0], 1
    for tag, i, j, k, l in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for n in range(i, j): found.append(at := k + 1 + (n - i if tag == "equal" else min(n - i, max(0, l - k - 1))))
    return [*found, at]


def reach(twin: Path, room: Path, say=print) -> Reach:
    "Run every test once, with a look at the lines it reaches; kept for as long as a module of tests stays as it is"
    path = ROOT / ".mutants"
    kept = json.loads(path.read_text()) if path.exists() else {"tests": {}, "sources": {}}
    sources = {module: source_of(module, twin) for module in MODULES}
    kept["sources"] |= {_hash(text): text for text in sources.values()}
    for name in ("trace", "now"): (room / name).write_text("")
    for test in TESTS:
        about = _hash((twin / "tests" / f"{test}.py").read_text())
        if kept["tests"].get(test, {}).get("about") == about: continue
        begun = time.monotonic()
        hashes = {module: _hash(text) for module, text in sources.items()}
        kept["tests"][test] = of = {"about": about, "sources": hashes, **_traced(twin, room, test)}
        path.write_text(json.dumps(kept))
        say(f"{test}: looked at in {time.monotonic() - begun:.0f} s, {len(of['seconds'])} tests", flush=True)
    (room / "trace").unlink()
    return Reach(kept, sources)


def _traced(twin: Path, room: Path, test: str) -> dict:
    "What a module of tests reaches"
    files = {str(twin / "llm_trainer" / f"{module}.py"): module for module in MODULES}
    (twin / "sitecustomize.py").write_text(TRACER.format(files=files))
    for name in ("lines", "times", "modules"): (room / name).write_text("")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "mutants_plugin", "-p", "no:cacheprovider",
                    f"tests/{test}.py"], cwd=twin, env=_environment(twin, room), stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    _sweep(room)
    (twin / "sitecustomize.py").unlink()
    seconds, bad, lines = Counter(), set(), {module: {} for module in MODULES}
    for row in (room / "times").read_text().splitlines():
        id, took, outcome = row.split("\t")
        seconds[id] += float(took)
        if outcome != "passed": bad.add(id)
    for row in (room / "lines").read_text().splitlines():
        module, line, id = row.split("\t")
        if id not in bad: lines[module].setdefault(line, []).append(id)
    if not seconds: sys.exit(f"{test} can't be run")
    return {"seconds": seconds, "lines": lines, "modules": (room / "modules").read_text().split()}


# A copy of the checkout, and tests in it -----------------------------------------------------------------------------

def _environment(twin: Path, room: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(twin), "OMP_NUM_THREADS": "1", "MUTANTS_ROOM": str(room),
            "PYTHONDONTWRITEBYTECODE": "1"}


def copied(twin: Path) -> None:
    "The checkout as it is, without what git ignores"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                           text=True).stdout
    for name in filter(None, names.split("\0")):
        (twin / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists(): shutil.copy2(ROOT / name, twin / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "llm_trainer"], cwd=twin)


def _sweep(room: Path) -> None:
    "End what tests left running: each such process has the name of this room in its environment"
    mark = f"MUTANTS_ROOM={room}".encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(pid) != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


class Verdict:
    "Ends the process at the first test that fails, whose name it leaves; a plugin of pytest"

    def __init__(self, path: Path): self.path = path

    def pytest_runtest_logreport(self, report):
        if not report.failed: return
        self.path.write_text(report.nodeid)
        os._exit(1)

    def pytest_sessionfinish(self, exitstatus): os._exit(int(exitstatus))


def notices(twin: Path, room: Path, tests: list[str], limit: float) -> str | None:
    "The first of the tests that fails, or what else went wrong; None where all pass"
    verdict = room / "verdict"
    verdict.unlink(missing_ok=True)
    if not (pid := os.fork()):
        code = 70
        try:
            os.setsid()
            os.chdir(twin)
            os.environ.update(_environment(twin, room))
            sys.path[:0] = [str(twin)]
            sys.dont_write_bytecode = True
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2): os.dup2(null, fd)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, resource.RLIM_INFINITY))
            import pytest
            flags = ["-q", "-p", "no:cacheprovider", "--assert=plain", f"--basetemp={room / 'base'}"]
            code = pytest.main([*flags, *tests], plugins=[Verdict(verdict)])
        finally: os._exit(int(code))
    end = time.monotonic() + limit
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end: time.sleep(0.01)
    if not ended[0]:
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
    _sweep(room)
    shutil.rmtree(room / "base", ignore_errors=True)
    if ended[1] == 0: return None
    return verdict.read_text() if verdict.exists() else f"exit status {ended[1]}"


def _imported(names: list[str]) -> None:
    "Import what tests import of others, so that a forked child needn't"
    ours = ("llm_trainer", "tests", "torture", "conftest", "warm", "world", "test_", "tui_world", "hearing", "llama",
            "hub_server", "mutants", "sitecustomize", "__")
    for name in (*names, "hypothesis"):
        if name.startswith(ours) or name in sys.modules: continue
        with contextlib.suppress(BaseException): importlib.import_module(name)
    gc.freeze()


# The result ----------------------------------------------------------------------------------------------------------

def _hash(source: str) -> str: return hashlib.sha256(source.encode()).hexdigest()[:12]


def source_of(module: str, root: Path = ROOT) -> str: return (root / "llm_trainer" / f"{module}.py").read_text()


def read(sources: dict[str, str] | None = None) -> dict[str, dict]:
    "What came of the mutants, by module; where the sources are given, those of another source don't count"
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    def none(source): return {"source": source, "mutants": 0, "tried": 0, "survived": []}
    ours = {module: _hash(sources[module]) if sources else known.get(module, {}).get("source") for module in MODULES}
    return {module: known[module] if known.get(module, {}).get("source") == ours[module] and module in known
            else none(ours[module]) for module in MODULES}


def write(found: dict[str, dict]) -> None:
    new = RESULT.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    os.replace(new, RESULT)


def excused() -> dict[tuple[str, str], list[dict]]:
    "The survivors that no test could notice: (module, text of the line) → change and why"
    found: dict[tuple[str, str], list[dict]] = {}
    for module, rows in (tomllib.loads(SAME.read_text()) if SAME.exists() else {}).items():
        for row in rows: found.setdefault((module, row["line"]), []).append(row)
    return found


def why_same(module: str, survivor: dict, excuses: dict) -> str | None:
    "Why a survivor could not be noticed; None where it should have been"
    rows = excuses.get((module, survivor["line"]), [])
    return next((row["why"] for row in rows if row.get("change", survivor["what"]) == survivor["what"]), None)


def summary() -> dict:
    "What the report says"
    found, excuses = read(), excused()
    told = [(module, s, why_same(module, s, excuses)) for module, of in found.items() for s in of["survived"]]
    changed = [module for module, of in found.items() if of["source"] and of["source"] != _hash(source_of(module))]
    dates = [of["date"] for of in found.values() if of.get("date")]
    return {"mutants": sum(of["mutants"] for of in found.values()), "tried": sum(of["tried"] for of in found.values()),
            "seconds": sum(of.get("seconds", 0) for of in found.values()), "date": max(dates, default=""),
            "changed": changed,
            "survived": [(module, s) for module, s, why in told if not why],
            "same": [(module, s, why) for module, s, why in told if why]}


# Running -------------------------------------------------------------------------------------------------------------

class Room:
    "A copy of the checkout in which mutants live, one at a time"

    def __init__(self, room: Path):
        self.room, self.twin = room, room / "checkout"
        copied(self.twin)
        self.reach, self.kills = reach(self.twin, room), Counter()
        self.sound: dict[str, bool] = {}  # test → whether it passes where nothing is changed
        self.sources = {module: source_of(module, self.twin) for module in MODULES}
        self.trees = {module: ast.parse(text) for module, text in self.sources.items()}
        _imported(self.reach.modules)

    def tests(self, mutant: Mutant) -> list[str]:
        "The tests to ask: those that killed a neighbour, those near the line, the quick ones that reach little else"
        chosen, seconds = [], 0.0
        near, far = self.reach.tests(mutant, self.trees[mutant.module])
        def rank(test):
            cost = self.reach.seconds[test] * (1 + self.reach.width[mutant.module, test])
            return -self.kills[mutant.module, mutant.line // 20, test], test in far, cost, test
        for test in sorted(filter(lambda test: self.sound.get(test, True), near | far), key=rank):
            seconds += self.reach.seconds[test]
            if chosen and seconds > self.reach.enough: break
            chosen.append(test)
        return chosen

    def killer(self, mutant: Mutant) -> str | None:
        "The test that notices a mutant"
        path, tests = self.twin / "llm_trainer" / f"{mutant.module}.py", self.tests(mutant)
        whole, times = path.read_text(), path.stat()
        path.write_text(mutant.make())
        near = [test for test in tests if test.partition("::")[0] == tests[0].partition("::")[0]][:12]
        try: killer = self._first_of(near) or self._first_of([test for test in tests if test not in near])
        finally:
            path.write_text(whole)
            os.utime(path, (times.st_atime, times.st_mtime))
        if killer in self.reach.seconds:
            self.kills[mutant.module, mutant.line // 20, killer] += 1
            if killer not in self.sound: self.sound[killer] = not notices(self.twin, self.room, [killer], 120)
            if not self.sound[killer]: return self.killer(mutant)
        return killer

    def _first_of(self, tests: list[str]) -> str | None:
        "The first of some tests that fails"
        return notices(self.twin, self.room, tests, 30 + 4 * sum(map(self.reach.seconds.get, tests))) if tests else None


def survivor(mutant: Mutant, source: str) -> dict:
    text = source.splitlines()[mutant.line - 1].strip() if mutant.line else ""
    return {"at": f"{mutant.line}:{mutant.column}", "what": mutant.what, "line": text}


def spend(room: Room, modules: list[str], end: float, say=print) -> None:
    "Try mutants of each module in turn until the time is over or there is none left"
    found = read(room.sources)
    todo = {module: mutants(module, room.sources[module]) for module in modules}
    for module in modules: found[module]["mutants"] = len(todo[module])
    while time.monotonic() < end:
        left = [m for m in modules if found[m]["tried"] < len(todo[m])]
        if not left: return
        module = min(left, key=lambda m: found[m]["tried"] / len(todo[m]))
        of, begun = found[module], time.monotonic()
        mutant = todo[module][of["tried"]]
        killer = room.killer(mutant)
        if not killer: of["survived"].append(survivor(mutant, room.sources[module]))
        of.update(tried=of["tried"] + 1, date=datetime.now(UTC).date().isoformat(),
                  seconds=round(of.get("seconds", 0) + time.monotonic() - begun, 1))
        write(found)
        say(f"{module} {of['tried']}/{of['mutants']} {time.monotonic() - begun:.1f} s  {mutant.name}: "
            f"{'killed by ' + killer if killer else 'SURVIVED  ' + of['survived'][-1]['line']}", flush=True)


def again(room: Room, modules: list[str], say=print) -> None:
    "Try the survivors that have no excuse once more, on the tests as they are now"
    found, excuses = read(room.sources), excused()
    room.reach.slow, room.reach.enough = PATIENT * SLOW, PATIENT * ENOUGH
    for module in modules:
        there = {(f"{m.line}:{m.column}", m.what): m for m in mutants(module, room.sources[module])}
        for one in list(found[module]["survived"]):
            if why_same(module, one, excuses): continue
            killer = room.killer(there[one["at"], one["what"]])
            if killer: found[module]["survived"].remove(one)
            write(found)
            say(f"{module} {one['at']} {one['what']}: {'killed by ' + killer if killer else 'SURVIVED'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), help=f"of {', '.join(MODULES)}")
    parser.add_argument("--budget", type=float, default=60, help="minutes")
    parser.add_argument("--again", action="store_true", help="the survivors alone, with the tests as they are now")
    parser.add_argument("--afresh", action="store_true", help="look anew which test reaches which line")
    args = parser.parse_args()
    if args.afresh: (ROOT / ".mutants").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as tmp:
        room, end = Room(Path(tmp)), time.monotonic() + 60 * args.budget
        if args.again: again(room, args.modules)
        else: spend(room, args.modules, end)
    told = summary()
    share = 1 - len(told["survived"]) / max(1, told["tried"])
    print(json.dumps({"mutants": told["mutants"], "tried": told["tried"], "killed, of those that could be": share}))
    return 0 if share >= 0.9 else 1


if __name__ == "__main__": sys.exit(main())
