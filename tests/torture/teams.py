"""Runs on several processes: ranks killed, suspended, signalled, out of disk; launcher killed; other world sizes."""
from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from llm_trainer.runs import launch
from llm_trainer.system import process
from llm_trainer.training.checkpoint import verify

from .battery import cases, kept_folder, struck, trial
from .forks import Child, server
from .lives import RUN, end_of, new_home, run_of, store_of

FAULTS = ("kill one", "kill rank 0", "kill launcher", "suspend one", "suspend rank 0", "disk full", "TERM launcher",
          "TERM one", "kill all")
STEADY = ["--dropout", "0", "--sample-every", "0"]
_untouched: dict[tuple, tuple] = {}


def untouched(*flags: str) -> tuple[str, list]:
    "What a run with these flags ends with when nothing happens to it"
    if flags not in _untouched:
        home = kept_folder("torture-team-") / "home"
        shutil.copytree(new_home(str(home.parent / "from")), home)
        child = begin(home, *flags)
        if code := child.wait(): raise RuntimeError(f"the untouched run ended {code}: {child.tail(3000)}")
        _untouched[flags] = end_of(home)
    return _untouched[flags]


def begin(home: Path, *flags: str, **how) -> Child:
    "Start the run, or go on with it"
    if not run_of(home).folder.exists():
        return server().start(["train", "--config", "torture", "--name", RUN, *flags], home, **how)
    devices = [flag for before, flag in zip(("", *flags), flags) if "--devices" in (before, flag)]
    return server().start(["resume", RUN, *devices], home, **how)


def wait_for(child: Child, home: Path, step: int) -> list[dict]:
    "The ranks, once they have made so many steps more than before, or the child has ended"
    while child.alive():
        state = run_of(home).state()
        if state.ranks and state.status == "running" and (state.step or 0) >= step: return state.ranks
        time.sleep(0.002)
    return run_of(home).state().ranks


def strike(fault: str, child: Child, ranks: list[dict], rng: random.Random) -> None:
    "Do it"
    one = rng.choice(ranks[1:])
    def hit(signum, *those): return [process.send({**process.identity(rank["pid"])}, signum) for rank in those
                                      if process.process_state(rank["pid"])]
    match fault:
        case "kill one": hit(signal.SIGKILL, one)
        case "kill rank 0": hit(signal.SIGKILL, ranks[0])
        case "kill all": hit(signal.SIGKILL, *ranks)
        case "suspend one": hit(signal.SIGSTOP, one)
        case "suspend rank 0": hit(signal.SIGSTOP, ranks[0])
        case "TERM one": hit(signal.SIGTERM, one)
        case "kill launcher": child.kill(signal.SIGKILL)
        case "TERM launcher": child.kill(signal.SIGTERM)


def after(fault: str, code: int, home: Path, ranks: list[dict], child: Child) -> str | None:
    "What must hold once the launcher has ended"
    run, deadline = run_of(home), time.monotonic() + 30
    while run.locked or any(process.process_state(rank["pid"]) not in (None, "zombie") for rank in ranks):
        if time.monotonic() > deadline: return "ranks are left"
        time.sleep(0.02)
    state, store = run.status(), store_of(home)
    if state.status == "completed": return None  # it was faster
    reasons = {"disk full": ("disk_full",), "TERM launcher": ("signal",), "TERM one": ("signal",)}
    ends = reasons.get(fault, ("rank_lost",))
    killed = fault in ("kill launcher", "kill all", "kill rank 0")
    if not (killed and state.status == "crashed") and (state.reason or {}).get("code") not in ends:
        return f"{state.status} {state.reason}, exit code {code}: {child.tail()}"
    expected = {"TERM launcher": (143,), "TERM one": (0,), "kill launcher": (-signal.SIGKILL,)}.get(fault, (1,))
    if code not in expected: return f"exit code {code} instead of {expected}: {child.tail()}"
    bad = {step: problems for step in store.steps() if (problems := verify(store.path(step)))}
    return f"visible but damaged: {bad}" if bad else None


def differs(home: Path, whole: tuple[str, list], tolerance: float = 0.0) -> str | None:
    "How a run that was resumed to its end differs from one that nothing happened to"
    if run_of(home).status().status != "completed":
        return f"ended {run_of(home).status().status}: {run_of(home).state().reason}"
    digest, rows = end_of(home)
    if [row[:2] for row in rows] != [row[:2] for row in whole[1]]: return "other steps were logged"
    far = max(abs(a[2] - b[2]) for a, b in zip(rows, whole[1]))
    if far > tolerance: return f"losses differ by {far:.3g}"
    return None if tolerance or digest == whole[0] else "other weights"


@trial("T17", goal=200, slice=0, chunk=6)
def faults(n: int, seed: int) -> list[str]:
    """a run on two gloo processes loses one (killed, suspended), its launcher, all of them, the disk, or is sent
    SIGTERM at either place, up to 6 times: no process stays, the reason is stored, every checkpoint verifies; resumed,
    it equals one that nothing happened to, bit for bit"""
    failures, done, pair = [], 0, ("--devices", "2")
    while done < n:
        rng, struck_here = random.Random(f"team {seed} {done}"), 0
        with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
            home, problem = new_home(tmp), None
            while done < n and struck_here < 6 and not problem:
                fault = FAULTS[(seed + done) % len(FAULTS)]
                before = max(store_of(home).steps(), default=0)
                full = {}
                if fault == "disk full": full["rank_failpoint"] = f"save.before-fsync=enospc:{rng.randrange(1, 3)}"
                child = begin(home, *pair, **full)
                ranks = wait_for(child, home, before + rng.randrange(0, 4)) if not full else []
                if child.alive() and not full: strike(fault, child, ranks, rng)
                code = child.wait()
                problem = after(fault, code, home, ranks or run_of(home).state().ranks, child)
                struck(f"{fault}: {run_of(home).status().status}")
                done, struck_here = done + 1, struck_here + 1
                if problem: failures.append(f"case {seed + done - 1}: {fault}: {problem}")
                if run_of(home).status().status == "completed": break
            if problem: continue
            if run_of(home).status().status != "completed" and (code := (child := begin(home, *pair)).wait()):
                problem = child.tail()
            problem = problem or differs(home, untouched(*pair))
            if problem: failures.append(f"case {seed + done - 1}: resumed: {problem}")
    return failures


@trial("T18", goal=20, slice=0, chunk=2)
@cases
def worlds(case: int) -> str | None:
    """a run that goes on at other numbers of processes (1, 2 and 4, gloo), stopped in between: the same steps in the
    same order, losses within 1e-5 of one process's"""
    rng = random.Random(f"worlds {case}")
    journey = [1, 2] if case == 0 else [1, 2, 4] if case == 1 else [rng.choice([1, 2, 4]) for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        for world in journey:
            before = max(store_of(home).steps(), default=0)
            child = begin(home, *STEADY, "--devices", str(world))
            until, run = before + rng.randrange(1, 5), run_of(home)
            while child.alive() and not (run.locked and (run.state().step or 0) >= until): time.sleep(0.002)
            if child.alive(): launch.stop(run)
            if code := child.wait(): return f"{journey}: {world} processes ended {code}: {child.tail()}"
            struck(f"{world} processes")
        child = begin(home, *STEADY, "--devices", "1")
        if code := child.wait(): return f"{journey}: the end {code}: {child.tail()}"
        return differs(home, untouched(*STEADY), 1e-5) and f"{journey}: {differs(home, untouched(*STEADY), 1e-5)}"
