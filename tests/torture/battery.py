"""What a test of the battery is, how a budget is spent on them, and the ledger of what ran."""
from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEDGER = Path(__file__).with_name("ledger.json")
ROOMS = ("store", "hostile", "words", "lives", "liveness", "shells", "golden", "knobs", "strangers", "teams")


@dataclass(frozen=True)
class Trial:
    "One test of the battery"
    id: str
    title: str  # What is attacked, and what must hold
    run: Callable[[int, int], list[str]]  # n cases from number `seed` on → what failed, a line each
    goal: int  # Cases we want to publish
    slice: int  # Cases in `make test`, or in `make test-slow`
    chunk: int = 10  # Cases between two looks at the clock: some seconds


_trials: list[Trial] = []


def trial(id: str, goal: int, slice: int, chunk: int = 10):
    "Register a function `run(n, seed)` as a test of the battery; its docstring is what is attacked and what must hold"
    def register(run):
        _trials.append(Trial(id, " ".join(run.__doc__.split()), run, goal, slice, chunk))
        return run
    return register


def cases(check: Callable[[int], str | None]) -> Callable[[int, int], list[str]]:
    "Make a function of one case number into a trial's `run`: what it returns, or raises, is a failure"
    def run(n: int, seed: int) -> list[str]:
        failures = []
        for case in range(seed, seed + n):
            try: problem = check(case)
            except Exception: problem = traceback.format_exc(limit=-3)
            if problem: failures.append(f"case {case}: {problem}")
        return failures
    run.__doc__ = check.__doc__
    return run


_struck: Counter = Counter()


def struck(where: str) -> None:
    "Note what a case of a random test really hit; the report says how often each was"
    _struck[where] += 1


def kept_folder(prefix: str) -> Path:
    "A temporary folder that lives as long as this process"
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def hear_interrupts() -> None:
    "Undoes that a script's background ignores Ctrl-C and Ctrl-\\: what is started from here would ignore them, too"
    for signum in (signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(signum) == signal.SIG_IGN: signal.signal(signum, signal.default_int_handler)


def trials() -> list[Trial]:
    "Every test of the battery, by id"
    for room in ROOMS: importlib.import_module(f"{__package__}.{room}")
    return sorted(_trials, key=lambda t: (int("".join(filter(str.isdigit, t.id.split()[0]))), t.id))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def code_version() -> str:
    "What the cases ran against: the tree of llm_trainer/ at HEAD, marked when the working tree differs"
    return (_git("rev-parse", "--short=10", "HEAD:llm_trainer") or "unknown") + \
        ("+changes" if _git("status", "--porcelain", "--", "llm_trainer") else "")


@dataclass(frozen=True)
class Chunk:
    "What some cases in a row came to"
    n: int
    failures: list[str]
    struck: Counter
    seconds: float


def run_chunk(id: str, n: int, seed: int) -> Chunk:
    "Run `n` cases of a test from number `seed` on"
    _struck.clear()
    started, t = time.monotonic(), next(t for t in trials() if t.id == id)
    try: failures = t.run(n, seed)
    except Exception: failures = [f"case {seed}: {traceback.format_exc(limit=-3)}"]
    return Chunk(n, failures, Counter(_struck), time.monotonic() - started)


class Ledger:
    "What ran, per version of the code and test: a file that is replaced after every chunk"

    def __init__(self, path: Path = LEDGER):
        self.path, self.versions = path, {}
        if path.exists(): self.versions = json.loads(path.read_text())

    def row(self, id: str, version: str) -> dict:
        "The counts of one test on one version: cases, failures that stand, failures that were settled, what was struck"
        empty = {"n": 0, "seconds": 0.0, "failures": [], "settled": [], "struck": {}, "commit": "", "date": ""}
        return self.versions.setdefault(version, {}).setdefault(id, empty)

    def rows(self, id: str) -> dict[str, dict]:
        "The counts of one test, by version"
        return {version: tests[id] for version, tests in self.versions.items() if id in tests}

    def ran(self, id: str) -> int:
        "Cases of a test on any version of the code"
        return sum(row["n"] for row in self.rows(id).values())

    def add(self, id: str, version: str, chunk: Chunk) -> None:
        "Note a chunk"
        row = self.row(id, version)
        row.update(n=row["n"] + chunk.n, seconds=round(row["seconds"] + chunk.seconds, 1),
                   failures=row["failures"] + chunk.failures,
                   struck=dict(Counter(row["struck"]) + chunk.struck), commit=_git("rev-parse", "--short=10", "HEAD"),
                   date=_today())
        self.save()

    def settle(self, id: str, version: str, failure: str, why: str) -> None:
        "Note that a failure was understood, and that its case passes"
        row = self.row(id, version)
        row["failures"].remove(failure)
        row["settled"].append({"failure": failure, "why": why, "date": _today(), "passed on": code_version()})
        self.save()

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.versions, indent=1) + "\n")
        os.replace(new, self.path)


def _today() -> str: return datetime.now(UTC).date().isoformat()


def spend(budget: float, ledger: Ledger, only: set[str] | None = None, jobs: int = 1, say=print) -> int:
    """Run the battery for `budget` seconds in `jobs` processes at once: always the test that is farthest from the N we
    want, and each at least once, also where that takes longer. Gives the number of failures"""
    version, failed, end = code_version(), 0, time.monotonic() + budget
    chosen = [t for t in trials() if t.goal and (not only or t.id in only or t.id.split()[0] in only)]
    given = {t.id: ledger.row(t.id, version)["n"] for t in chosen}  # cases that ran or are under way, from number 0 on
    running = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while True:
            while len(running) < jobs:
                over = time.monotonic() > end
                left = [t for t in chosen if not (over and given[t.id])]
                if not left: break
                t = min(left, key=lambda t: given[t.id] / t.goal)
                running[pool.submit(run_chunk, t.id, t.chunk, given[t.id])] = t
                given[t.id] += t.chunk
            if not running: return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                t, chunk = running.pop(future), future.result()
                ledger.add(t.id, version, chunk)
                failed += len(chunk.failures)
                for line in chunk.failures: say(f"{t.id} FAILED {line}")
                n = ledger.row(t.id, version)["n"]
                say(f"{t.id:10} {n:>6,} of {t.goal:<6,} +{chunk.n} in {chunk.seconds:.0f} s, "
                    f"{len(chunk.failures)} failed", flush=True)


def again(id: str, why: str, ledger: Ledger, say=print) -> int:
    "Run each failed case of a test again, with those after it; what passes now is settled. Gives what still fails"
    (t,) = (t for t in trials() if t.id == id)
    for version, row in ledger.rows(id).items():
        for failure in list(row["failures"]):
            chunk = run_chunk(id, t.chunk, int(re.match(r"case (\d+)", failure)[1]))
            for line in chunk.failures: say(f"{id} FAILED {line}")
            if not chunk.failures: ledger.settle(id, version, failure, why)
    return sum(len(row["failures"]) for row in ledger.rows(id).values())


def report(ledger: Ledger) -> str:
    "RELIABILITY.md"
    from . import mutants
    version, all_trials = code_version(), trials()
    here = {t.id: ledger.row(t.id, version) for t in all_trials}
    def minutes(rows): return sum(row["seconds"] for row in rows) / 60
    ever = minutes(row for tests in ledger.versions.values() for row in tests.values())
    commits = sorted({row["commit"] for row in here.values() if row["commit"]})
    lines = [
        "# Reliability", "",
        "Written by `make torture`; not edited by hand. Each line is a test of `tests/torture/`: so many cases of",
        "trouble, so many broken promises. With 0 failures in N cases the true rate is below 3/N at 95 % confidence.",
        "", f"- Date: {max(row['date'] for row in here.values()) or 'not run yet'}",
        f"- Code: `llm_trainer/` at tree `{version}`, commit {', '.join(commits) or 'none'}",
        f"- Time: {minutes(here.values()):.0f} minutes of work on this code, on {os.cpu_count()} cores; "
        f"{ever - minutes(here.values()):.0f} minutes on earlier code", "",
        "| test | what is attacked, and what must hold | N | failures | wanted N | minutes | N on earlier code |",
        "|---|---|---:|---:|---:|---:|---:|"]
    changed = mutants.summary()
    for t in all_trials:
        row = here[t.id]
        lines.append(f"| {t.id} | {t.title} | {row['n']:,} | {len(row['failures'])} | {t.goal:,} | "
                     f"{row['seconds'] / 60:.1f} | "
                     f"{ledger.ran(t.id) - row['n']:,} |")
        if t.id == "T23":
            lines.append(f"| T24 | {mutants.TITLE} | {changed['tried']:,} | {len(changed['survived'])} | "
                         f"{changed['mutants']:,} | {changed['seconds'] / 60:.1f} | |")
    told = [(t.id, v, row) for t in all_trials for v, row in ledger.rows(t.id).items()]
    paragraphs = {
        "Failures that stand": [f"- {id} on `{v}`: {_last(f)}" for id, v, row in told for f in row["failures"]],
        "Failures that were looked into": [
            f"- {id} on `{v}`: {_last(s['failure'])}. {s['why']} The case passed when it was run again on {s['date']}."
            for id, v, row in told for s in row["settled"]],
        "What the random tests hit, on this code": [
            f"- {t.id}: " + ", ".join(f"{what} {n:,}" for what,
                                      n in sorted(here[t.id]["struck"].items(), key=lambda kv: -kv[1]))
            for t in all_trials if here[t.id]["struck"]],
        "Modules that changed since their mutants were tried (T24)": [f"- `{name}`" for name in changed["changed"]],
        "Mutants that no test noticed (T24)": [
            f"- `{module}`, `{one['line']}`: {one['what']}" for module, one in changed["survived"]],
        "Mutants that no test could notice (T24)": [
            f"- `{module}`, `{one['line']}`: {one['what']}. {why}" for module, one, why in changed["same"]]}
    for title, rows in paragraphs.items(): lines += ["", f"## {title}", "", *rows] if rows else []
    return "\n".join([*lines, ""])


def _last(failure: str) -> str:
    "`case 7: RuntimeError: what` of a failure that may be a traceback"
    head, *rest = failure.strip().splitlines()
    return (f"{head.partition(':')[0]}: {rest[-1]}" if rest else head)[:300].replace("|", "/")
