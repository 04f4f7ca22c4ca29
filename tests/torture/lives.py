"""Whole runs under fire: killed, signalled, starved of disk, poisoned, doubled; then resumed, and compared with a run
that nothing happened to, hash for hash."""
from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from llm_trainer import workspace
from llm_trainer.system import failpoints
from llm_trainer.events import silent
from llm_trainer.training.checkpoint import Checkpoints, verify, weights_hash
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import State

from .battery import cases, kept_folder, struck, trial
from .forks import Child, server

PROFILE = """
[model]
n_layer = 2
n_head = 2
n_embd = 16
seq_len = 16
dropout = 0.1
[data]
dataset = "corpus.txt"
vocab_size = 280
val_fraction = 0.1
[training]
batch_size = 4
grad_accum_steps = 2
epochs = 2
lr = 5e-3
warmup_steps = 3
dtype = "float32"
compile = false
device = "cpu"
threads = 1
log_every = 1
eval_every = 10
save_every = 5
sample_every = 10
[sampling]
max_new_tokens = 4
"""
SAVE_EVERY = 5
RUN = "victim"
_kept: dict[str, Path] = {}
_clean: dict[str, tuple] = {}


def corpus() -> str:
    "Some pages of text, the same on every machine"
    rng = random.Random(5)
    words = "the a model step loss token run saves reads writes learns old new small great and of in it".split()
    def page(): return " ".join(rng.choice(words) for _ in range(60)).capitalize() + "."
    return "\n\n".join(page() for _ in range(13))


def pattern() -> Path:
    "A workspace with its corpus prepared, copied by each case; also says what an untouched run ends with"
    if "home" in _kept and _kept["home"].exists(): return _kept["home"]
    home = _kept["home"] = kept_folder("torture-home-")
    workspace.init(home)
    (home / "corpus.txt").write_text(corpus())
    (home / "configs" / "torture.toml").write_text(PROFILE)
    children = server()
    started = time.monotonic()
    child = children.start(["train", "--config", "torture", "--name", RUN], home)
    if child.wait() != 0: raise RuntimeError(f"the untouched run failed: {child.tail(3000)}")
    _clean["end"] = (*end_of(home), time.monotonic() - started)
    for folder in ("runs", "checkpoints"):
        shutil.rmtree(home / folder)
        (home / folder).mkdir()
    return home


def new_home(tmp: str, prepared: bool = True) -> Path:
    "A fresh copy of the workspace"
    home = Path(tmp) / "home"
    shutil.copytree(pattern(), home)
    if not prepared:
        shutil.rmtree(home / "data")
        (home / "data").mkdir()
    return home


def run_of(home: Path) -> Run: return Run(home / "runs" / RUN)


def store_of(home: Path) -> Checkpoints:
    "The victim's checkpoints"
    return Checkpoints(home / "checkpoints" / RUN, RUN, emit=silent)


def end_of(home: Path) -> tuple[str, list]:
    "What a run is compared by: its weights' hash, and every loss as it was logged"
    rows = [(row["kind"], row["step"], row["loss"]) for row in run_of(home).metrics()]
    return weights_hash(store_of(home).select("latest")), rows


def clean_end() -> tuple[str, list]:
    "The end of a run that nothing happened to"
    pattern()
    return _clean["end"][:2]


def difference(home: Path, rows_lost: bool = False) -> str | None:
    "How a completed run differs from the untouched one; `rows_lost`: the disk may have refused lines of the metrics"
    state = run_of(home).status()
    if state.status != "completed": return f"ended {state.status}: {state.reason}"
    digest, rows = end_of(home)
    clean_digest, clean_rows = clean_end()
    if digest != clean_digest: return f"other weights: {digest[:12]} instead of {clean_digest[:12]}"
    if rows != clean_rows and not (rows_lost and set(rows) < set(clean_rows)):
        return f"other losses: {sorted(set(rows) ^ set(clean_rows))[:4]}"
    bad = {step: problems for step, problems in store_of(home).verify().items() if problems}
    if bad: return f"damaged at the end: {bad}"
    left = [p.name for p in store_of(home).folder.iterdir() if p.name.startswith(".")]
    if left: return f"{left} left behind"


def after_death(home: Path) -> str | None:
    "What must hold the moment a worker was killed"
    run, store = run_of(home), store_of(home)
    if not run.folder.exists(): return None
    state = run.status()
    if state.status not in ("crashed", "completed", "stopped"): return f"the killed run shows as {state.status}"
    steps = store.steps()
    bad = {step: problems for step in steps if (problems := verify(store.path(step)))}
    if bad: return f"visible but damaged: {bad}"
    logged = max((row["step"] for row in run.metrics("train")), default=0)
    if logged - (steps[-1] if steps else 0) > SAVE_EVERY + 1: return f"step {logged} was reached, {steps} are saved"


def resume(home: Path, **how) -> Child:
    "Start the run again: resumed, or from the beginning if it was killed before it had a name"
    exists = run_of(home).folder.exists()
    return server().start(["resume", RUN] if exists else ["train", "--config", "torture", "--name", RUN], home, **how)


def finish(home: Path, rows_lost: bool = False) -> str | None:
    "Resume to the end, twice (the second must find nothing to do), and compare"
    for _ in range(2):
        child = resume(home)
        if code := child.wait(): return f"resume ended {code}: {child.tail()}"
    return difference(home, rows_lost)


def life(home: Path, rng: random.Random, kills: int) -> tuple[int, str | None]:
    "One run, killed up to `kills` times: how many kills found it alive, and what is wrong"
    clean_end()
    whole, killed = _clean["end"][2], 0
    for n in range(kills):
        child = resume(home)
        aim = rng.choice(["anywhere"] * 4 + ["preparing", "saving", "saving", "evaluating"])
        if aim == "anywhere": time.sleep(rng.uniform(0, whole / (1 + n / 2)))
        elif aim == "preparing": time.sleep(rng.uniform(0, whole / 8))
        else: _until(aim, child, home, rng)
        child.kill()
        if (code := child.wait()) != -signal.SIGKILL:
            if code: return killed, f"ended {code} before it was killed: {child.tail()}"
            break
        killed += 1
        struck(where(home))
        if problem := after_death(home): return killed, f"kill {n + 1} of {kills}, while {where(home)}: {problem}"
    return killed, finish(home)


def where(home: Path) -> str:
    "What a killed run was busy with"
    state = run_of(home).state() if run_of(home).folder.exists() else State(status="queued")
    if state.phase in ("training", "saving", "evaluating", "sampling"): return state.phase
    return "preparing" if state.status in ("queued", "running") else "ending"


def _until(aim: str, child: Child, home: Path, rng: random.Random) -> None:
    "Wait until the child is inside its nth save or evaluation"
    times, inside = rng.randrange(1, 6 if aim == "saving" else 3), False
    while child.alive():
        now = _saves(home) if aim == "saving" else run_of(home).state().phase == aim
        if now and not inside: times -= 1
        inside = now
        if inside and not times: return time.sleep(rng.uniform(0, 0.006))
        time.sleep(0.0003)


def _saves(home: Path) -> bool:
    "Whether a checkpoint is being written"
    try: return any(name.startswith(".tmp") for name in os.listdir(home / "checkpoints" / RUN))
    except OSError: return False


@trial("T1", goal=1000, slice=2, chunk=8)
def kills(n: int, seed: int) -> list[str]:
    """kill -9 at random instants (half anywhere, half aimed at saving, evaluating and preparing; what they hit is
    below), resume, up to 4 times a run: always resumable, at most one save interval lost, weights and losses equal to
    those of an untouched run"""
    failures, done, lives = [], 0, 0
    while done < n:
        lives += 1
        rng = random.Random(f"life {seed} {lives}")
        with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
            try:
                killed, problem = life(new_home(tmp, prepared=rng.random() < .75), rng,
                                       min(n - done, rng.randrange(1, 5)))
            except Exception as e: killed, problem = 1, repr(e)
        if problem: failures.append(f"case {seed}, life {lives}: {problem}")
        done += killed  # a run that was faster than the kill is no case
    return failures


ACTIONS = ("kill", "eio", "enospc", "raise")
PLACES = [(name, action) for action in ACTIONS for name in failpoints.NAMES]


@trial("T2", goal=5 * len(PLACES), slice=5, chunk=8)
@cases
def places(case: int) -> str | None:
    """kill, EIO, ENOSPC or an exception at each of the named places in a real run (save, prune, metrics, state, lock,
    spawn, exit): resumable, equal to an untouched run"""
    case = case * 37 % len(PLACES) + case // len(PLACES) * len(PLACES)  # a slice sees all kinds
    name, action = PLACES[case % len(PLACES)]
    nth = random.Random(f"places {case}").choice([1, 2, 3, 5])
    spec = f"{name}={action}:{1 if name.split('.')[0] in ('lock', 'worker') else nth}"
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        argv = ["train", "--config", "torture", "--name", RUN] + (["--background"] if name == "worker.spawn" else [])
        child = server().start(argv, home, failpoint=spec)
        code = child.wait()
        if code == -1000: return f"{spec}: hangs"
        if code == 70 or (code == 1 and "Traceback" in child.tail(20000).split("Run ")[0]):
            return f"{spec}: {child.tail()}"
        run = run_of(home)
        if run.folder.exists():
            state = run.status()
            if state.status in ("running", "stalled"): return f"{spec}: dead, and shown as {state.status}"
            if action == "kill" and code != -signal.SIGKILL and state.status not in ("completed",):
                return f"{spec}: ended {code}, {state.status}"
            if state.status == "failed" and action == "enospc" and state.reason["code"] != "disk_full":
                return f"{spec}: {state.reason}"
        refused = name == "metrics.append" and action in ("eio", "enospc")
        if problem := finish(home, refused): return f"{spec} (ended {code}): {problem}"


@trial("T5", goal=200, slice=2, chunk=8)
@cases
def full_disk(case: int) -> str | None:
    """the disk is full in a whole run (a real file size limit; every write from the n-th fails once): it goes on or
    ends as disk_full, the old checkpoint verifies, resumed it equals an untouched run"""
    rng = random.Random(f"full {case}")
    limits = [500, 2_000, 5_000, 10_000, 20_000, 40_000]
    how = {"file_limit": rng.choice(limits)} if case % 2 else {"failpoint": f"*=enospc:{case // 2 + 1}"}
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        code = server().start(["train", "--config", "torture", "--name", RUN], home, **how).wait()
        run = run_of(home)
        if code not in (0, 1): return f"{how}: ended {code}"
        if run.folder.exists():
            state = run.status()
            if state.status not in ("completed", "failed", "crashed"): return f"{how}: {state.status}"
            if state.status == "failed" and state.reason["code"] != "disk_full":
                return f"{how}: {state.reason}"
            bad = {s: p for s in store_of(home).steps() if (p := verify(store_of(home).path(s)))}
            if bad: return f"{how}: {bad}"
        if problem := finish(home, rows_lost=True): return f"{how} (ended {code}): {problem}"


@trial("T6", goal=500, slice=3, chunk=8)
@cases
def writers(case: int) -> str | None:
    """two to four writers at once (train or resume of the same id): one owner, the others exit with 75 (or 2 for a
    taken name), nothing damaged"""
    rng = random.Random(f"writers {case}")
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        if fresh := case % 3 == 0: argv = ["train", "--config", "torture", "--name", RUN]
        else:
            killed = f"save.after-rename=kill:{rng.randrange(1, 5)}"
            server().start(["train", "--config", "torture", "--name", RUN], home, failpoint=killed).wait()
            argv = ["resume", RUN]
        children = [server().start(argv, home) for _ in range(rng.randrange(2, 5))]
        codes = sorted(child.wait() for child in children)
        if codes[0] or any(code not in ((2, 75) if fresh else (0, 75)) for code in codes[1:]):
            return f"exit codes {codes}: {children[0].tail()}"
        attempts = run_of(home).attempts()
        if len(attempts) != (1 if fresh else 2): return f"{len(attempts)} attempts were recorded for {codes}"
        return difference(home)


PREPARING = ("reading", "tokenizing")  # what a run whose text is prepared has behind it
PHASES = (*PREPARING, "training", "evaluating", "saving", "sampling")
SIGNALS = {"TERM": [signal.SIGTERM], "INT": [signal.SIGINT], "TERM twice": [signal.SIGTERM, signal.SIGTERM],
           "INT then TERM": [signal.SIGINT, signal.SIGTERM]}


@trial("T9", goal=50 * len(PHASES) * 2, slice=3, chunk=8)
@cases
def signals(case: int) -> str | None:
    """SIGTERM, SIGINT, twice, and one after the other, as each phase begins and at random instants: acknowledged, saved
    or nothing to save, documented exit code, resumed equal to an untouched run"""
    rng, at_random = random.Random(f"signals {case}"), case % 3 == 2
    phase, kind = PHASES[case % len(PHASES)], list(SIGNALS)[case // len(PHASES) % len(SIGNALS)]
    numbers = [int(n) for n in SIGNALS[kind]]
    nth = 1 if phase in (*PREPARING, "training") else rng.randrange(1, 3)
    how = {} if at_random else {"at_phase": {"phase": phase, "signals": numbers, "nth": nth}}
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp, prepared=phase not in PREPARING)
        clean_end()
        child = server().start(["train", "--config", "torture", "--name", RUN], home, **how)
        if at_random:
            _until_heard(child, home)
            time.sleep(rng.uniform(0, _clean["end"][2]))
            for number in numbers: child.kill(number)
        code = child.wait()
        state = run_of(home).status()
        what = f"{kind} {'at a random instant' if at_random else f'while {phase}'}"
        if code == 0 and nth == 1 and not at_random: return f"{what}: it never came"
        late = {0, *(-n for n in numbers)} if state.status == "completed" else set()  # as a program that only prints
        if code not in {128 + n for n in numbers} | late:
            return f"{what}: exit code {code}: {child.tail()}"
        if state.status not in ("stopped", "completed"): return f"{what}: {state.status} {state.reason}"
        if "stop" not in state.acknowledged and state.status == "stopped": return f"{what}: not acknowledged"
        if len(numbers) == 1 and state.step and state.checkpoint_step != state.step:
            return f"{what}: step {state.step} not saved"
        struck(f"{state.status} at step {'0' if not state.step else '1 or later'}")
        if problem := finish(home): return f"{what}: {problem}"


def _until_heard(child: Child, home: Path) -> None:
    "Wait until the child listens to signals: before that one simply ends it, as it would any program"
    while child.alive() and run_of(home).state().status != "running": time.sleep(0.002)


@trial("T19", goal=100, slice=3, chunk=8)
@cases
def poison(case: int) -> str | None:
    """NaN or infinity in activations, gradients or weights at a random step: skipped and counted, or `diverged`; every
    checkpoint on disk finite"""
    from safetensors.torch import load_file

    from llm_trainer.model.safetensors import all_finite
    rng = random.Random(f"poison {case}")
    where = ("loss", "gradient", "weights")[case % 3]
    nan = {"where": where, "call": rng.randrange(1, 200), "value": rng.choice(["nan", "inf", "-inf"])}
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        code = server().start(["train", "--config", "torture", "--name", RUN], home, nan=nan).wait()
        state, store = run_of(home).status(), store_of(home)
        allowed = {"completed": 0, "diverged": 1, "failed": 1}
        if state.status not in allowed or code != allowed[state.status]:
            return f"{nan}: {state.status}, exit code {code}"
        if state.status != "completed" and state.reason["code"] != "non_finite":
            return f"{nan}: {state.reason}"
        if where == "weights" and state.status == "completed": return f"{nan}: not noticed"
        for step in store.steps():
            if verify(store.path(step)) or not all_finite(load_file(store.path(step) / "model.safetensors")):
                return f"{nan}: step {step} is spoilt"
        if where != "weights" and not state.skipped and state.step * 8 > nan["call"] + 40:
            return f"{nan}: nothing was skipped"
