"""What a test of the battery is, how a budget is spent on them, and the ledger of what ran."""
from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("store", "hostile", "words", "lives", "liveness", "shells", "golden")


@dataclass(frozen=True)
class Trial:
    "One test of the battery"
    id: str
    title: str  # What is attacked, and what must hold
    run: Callable[[int, int], list[str]]  # n cases from number `seed` on → what failed, a line each
    goal: int  # Cases we want to publish
    slice: int  # Cases in `make test`
    share: float = 1.0  # Weight of its part of the budget
    chunk: int = 10  # Cases between two looks at the clock


_trials: list[Trial] = []


def trial(id: str, goal: int, slice: int, share: float = 1.0, chunk: int = 10):
    "Register a function `run(n, seed)` as a test of the battery; its docstring is what is attacked and what must hold"
    def register(run):
        _trials.append(Trial(id, " ".join(run.__doc__.split()), run, goal, slice, share, chunk))
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


def kept_folder(prefix: str) -> Path:
    "A temporary folder that lives as long as this process"
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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


class Ledger:
    "What ran, per test and version of the code: `.torture/ledger.json`, replaced after every chunk"

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists(): self.rows = json.loads(path.read_text())

    def row(self, id: str, version: str) -> dict:
        "The counts of one test on one version"
        return self.rows.setdefault(version, {}).setdefault(id, {"n": 0, "failed": 0, "seconds": 0.0, "failures": []})

    def ran(self, id: str) -> int:
        "Cases of a test on any version: the number the next case gets"
        return sum(tests.get(id, {}).get("n", 0) for tests in self.rows.values())

    def add(self, id: str, version: str, n: int, failures: list[str], seconds: float) -> None:
        "Note a chunk"
        row = self.row(id, version)
        row.update(n=row["n"] + n, failed=row["failed"] + len(failures), seconds=row["seconds"] + seconds,
                   failures=(row["failures"] + failures)[:50], commit=_git("rev-parse", "--short=10", "HEAD"),
                   date=datetime.now(UTC).date().isoformat())
        self.path.parent.mkdir(exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.rows, indent=1))
        os.replace(new, self.path)


def spend(budget: float, ledger: Ledger, only: set[str] | None = None, say=print) -> int:
    "Run every test to its goal or its share of `budget` seconds; shares nobody needs go to the others. Failures"
    version, failed = code_version(), 0
    left = [t for t in trials() if not only or t.id.split()[0] in only]
    end = time.monotonic() + budget
    while left and time.monotonic() < end:
        unit, begun = (end - time.monotonic()) / sum(t.share for t in left), list(left)
        for t in begun:
            stop = min(end, time.monotonic() + unit * t.share)
            while (ran := ledger.row(t.id, version)["n"]) < t.goal and time.monotonic() < stop:
                started, n = time.monotonic(), min(t.chunk, t.goal - ran)
                failures = t.run(n, ledger.ran(t.id))
                ledger.add(t.id, version, n, failures, time.monotonic() - started)
                failed += len(failures)
                for line in failures: say(f"{t.id} FAILED {line}")
            row = ledger.row(t.id, version)
            say(f"{t.id:10} {row['n']:>6} of {t.goal:<6} {row['failed']} failed  {row['seconds']:.0f} s  {t.title}")
            if row["n"] >= t.goal: left.remove(t)
    return failed


def report(ledger: Ledger) -> str:
    "RELIABILITY.md"
    version = code_version()
    lines = ["# Reliability", "",
             "Written by `make torture`; not edited by hand. Each line is a test of `tests/torture/`: so many cases of",
             "trouble, so many broken promises. With 0 failures in N cases the true rate is below 3/N at 95 % confidence.", ""]
    newest = max((row.get("date", "") for tests in ledger.rows.values() for row in tests.values()), default="")
    commits = {row["commit"] for row in ledger.rows.get(version, {}).values() if "commit" in row}
    seconds = sum(row["seconds"] for row in ledger.rows.get(version, {}).values())
    lines += [f"- Date: {newest}", f"- Code: `llm_trainer/` at tree `{version}`, commit {', '.join(sorted(commits)) or 'none'}",
              f"- Time on this code: {seconds / 60:.0f} minutes on {os.cpu_count()} cores", "",
              "| test | what is attacked, and what must hold | N | failures | wanted N | minutes | N on earlier code |",
              "|---|---|---:|---:|---:|---:|---:|"]
    for t in trials():
        row = ledger.row(t.id, version)
        earlier = ledger.ran(t.id) - row["n"]
        lines.append(f"| {t.id} | {t.title} | {row['n']:,} | {row['failed']} | {t.goal:,} | {row['seconds'] / 60:.1f} | {earlier:,} |")
    broken = [f"- {t.id} {line.strip().splitlines()[-1][:300]}" for t in trials()
              for line in ledger.row(t.id, version)["failures"]]
    return "\n".join([*lines, *(["", "## Failures", "", *broken] if broken else []), ""])
