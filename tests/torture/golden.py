"""Runs of released versions: what they saved must load for ever. `python -m tests.torture.golden VERSION` adds one."""
from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from llm_trainer.events import silent
from llm_trainer.training.checkpoint import Checkpoints
from llm_trainer.runs.run import Run

from .battery import cases, trial
from .forks import server
from .lives import RUN, new_home

GOLDEN = Path(__file__).parent / "golden"
RELEASES = sorted(p.name for p in GOLDEN.glob("*")) if GOLDEN.exists() else []


@trial("T22", goal=2 * len(RELEASES), slice=len(RELEASES), chunk=1)
@cases
def releases(case: int) -> str | None:
    """checkpoints and run folders of every released version: verified, shown, loaded for generation, resumed (or
    refused by name on another kind of machine)"""
    from llm_trainer.generation.sampler import load_for_generation
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = Path(tmp) / "home"
        shutil.copytree(GOLDEN / RELEASES[case % len(RELEASES)], home)
        run, store = Run(home / "runs" / RUN), Checkpoints(home / "checkpoints" / RUN, RUN, emit=silent)
        if run.status().status != "completed" or not run.metrics(): return "not shown as it ended"
        if bad := {step: problems for step, problems in store.verify().items() if problems}: return f"damaged: {bad}"
        model, tokenizer = load_for_generation(store.select("best"), "cpu")
        if tokenizer.decode(tokenizer.encode("the model")) != "the model": return "another tokenizer"
        child = server().start(["resume", RUN, "--more-epochs", "1"], home)
        code = child.wait()
        if code and "can't be resumed exactly" not in child.tail(3000): return f"resume ended {code}: {child.tail()}"


def make(version: str) -> None:
    "Keep a small completed run of this version, with one checkpoint: some 90 kB"
    small = ["--n-layer", "1", "--n-embd", "8", "--save-every", "0", "--eval-every", "0"]
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        child = server().start(["train", "--config", "torture", "--name", RUN, *small], home)
        if child.wait(): raise SystemExit(f"the run failed: {child.tail()}")
        target = GOLDEN / version
        target.mkdir(parents=True)
        for name in ("settings.ini", "corpus.txt"): shutil.copy(home / name, target / name)
        for name in ("runs", "checkpoints"): shutil.copytree(home / name / RUN, target / name / RUN)


if __name__ == "__main__": make(sys.argv[1])
