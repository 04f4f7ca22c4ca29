"""The checkpoint store alone: damage, failing writes and kills at every station of a save. Needs no trainer."""
from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from llm_trainer.system import failpoints
from llm_trainer.model.safetensors import read_tensors, write_tensors
from llm_trainer.events import silent
from llm_trainer.training.checkpoint import Checkpoints, SaveFailed, verify

from .battery import cases, kept_folder, struck, trial

HERE = [name for name in failpoints.NAMES if name.split(".")[0] in ("save", "index", "prune")]


def content(step: int):
    "A `write` for `Checkpoints.save`: weights and state that say which step they are"
    def write(folder: Path) -> dict[str, str]:
        (folder / "state").mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        (folder / "state" / "trainer.json").write_text(f'{{"step": {step}, "epoch": {step / 100}}}')
        def save(name, t): return {name: write_tensors(folder / name, t, {"format": "pt"})}
        value = torch.full((40, 50), float(step))
        return save("model.safetensors", {"w": value, "b": value[0].clone()}) | \
            save("state/optimizer.safetensors", {"w.exp_avg": value + 1})
    return write


def small_store(folder: Path, steps=(10, 20, 30), keep: int = 3) -> Checkpoints:
    "A store with a few checkpoints"
    store = Checkpoints(folder / "calm-heron-0001", "calm-heron-0001", keep, emit=silent, reserve=0)
    for step in steps:
        store.save(step, content(step))
        store.record(step, 4 - step / 100)
    return store


def exit_code_of(action) -> int:
    "Run `action` in a forked process; its exit code, negative if a signal ended it"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally: os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sound(store: Checkpoints, step: int | None = None) -> str | None:
    "What is wrong with a store after trouble: every visible folder must verify and load, the newest at `step` or later"
    bad = {s: problems for s in store.steps() if (problems := verify(store.path(s)))}
    if bad: return f"visible but damaged: {bad}"
    newest = store.select("latest")
    value = read_tensors(newest / "model.safetensors")["b"][0].item()
    if newest != store.path(int(value)): return f"{newest.name} holds step {value}"
    if step is not None and value < step: return f"lost step {step}: the newest is {value}"
    if store.select("best") not in map(store.path, store.steps()): return "best is gone"


_kept: dict[str, Path] = {}


def _pattern() -> Path:
    "A store made once per process, copied by each case"
    if "store" not in _kept or not _kept["store"].exists():
        _kept["store"] = kept_folder("torture-store-")
        small_store(_kept["store"])
    return _kept["store"]


KINDS = ("flip", "truncate", "zero page", "swap files", "delete", "stale manifest", "swap folders", "add file", "link",
         "grow")


@trial("T4", goal=3000, slice=60, chunk=100)
@cases
def damage(case: int) -> str | None:
    """a checkpoint file damaged (bits, truncation, zeroed page, swap, deletion, stale manifest, links): detected,
    named, never loaded, the newest good one used instead"""
    rng = random.Random(f"damage {case}")
    kind = rng.choices(KINDS, weights=(10, 8, 2, 1, 1, 1, 1, 1, 1, 2))[0]
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        shutil.copytree(_pattern(), tmp, dirs_exist_ok=True)
        said: list[str] = []
        store = Checkpoints(Path(tmp) / "calm-heron-0001", "calm-heron-0001",
                            emit=lambda event: said.append(event.message))
        newest = store.path(30)
        victim = rng.choice([p for p in sorted(newest.rglob("*")) if p.is_file()])
        data = victim.read_bytes()
        spot = rng.randrange(len(data))
        if kind == "flip":
            victim.write_bytes(data[:spot] + bytes([data[spot] ^ 1 << rng.randrange(8)]) + data[spot + 1:])
        elif kind == "truncate": victim.write_bytes(data[:spot])
        elif kind == "zero page":
            page = spot - spot % 4096
            if not any(data[page:page + 4096]): page = 0
            victim.write_bytes(data[:page] + bytes(len(data[page:page + 4096])) + data[page + 4096:])
        elif kind == "swap files": shutil.copy(store.path(20) / victim.relative_to(newest), victim)
        elif kind == "delete": victim.unlink()
        elif kind == "stale manifest":
            victim = newest / "manifest.json"
            shutil.copy(store.path(10) / "manifest.json", victim)
        elif kind == "swap folders":
            newest.rename(Path(tmp) / "x")
            store.path(20).rename(newest)
            (Path(tmp) / "x").rename(store.path(20))
        elif kind == "add file":
            victim = newest / rng.choice(["model.safetensors.index.json", "state/more.safetensors",
                                          "pytorch_model.bin"])
            victim.write_bytes(data)
        elif kind == "link":
            victim.rename(Path(tmp) / "elsewhere")
            victim.symlink_to(Path(tmp) / "elsewhere")
        elif kind == "grow": victim.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
        if kind == "swap files" and victim.read_bytes() == data: return None
        problems, chosen = verify(newest), store.select("latest")
        if not problems: return f"{kind} of {victim.name} not noticed"
        if kind != "swap folders" and victim.name not in " ".join(problems):
            return f"{kind} of {victim.name}: not named in {problems}"
        if chosen != store.path(10 if kind == "swap folders" else 20): return f"{kind}: {chosen.name} was chosen"
        if len(said) != 1 or "damaged" not in said[0]: return f"{kind}: said {said}"


@trial("T4 index", goal=2000, slice=40, chunk=100)
@cases
def index_damage(case: int) -> str | None:
    "index.json damaged or gone: said, every checkpoint still found, newest used"
    rng = random.Random(f"index {case}")
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        shutil.copytree(_pattern(), tmp, dirs_exist_ok=True)
        said: list[str] = []
        store = Checkpoints(Path(tmp) / "calm-heron-0001", "calm-heron-0001",
                            emit=lambda event: said.append(event.message), reserve=0)
        path = store.folder / "index.json"
        data, spot = path.read_bytes(), rng.randrange(path.stat().st_size)
        match rng.randrange(4):
            case 0: path.write_bytes(data[:spot] + bytes([data[spot] ^ 1 << rng.randrange(8)]) + data[spot + 1:])
            case 1: path.write_bytes(data[:spot])
            case 2: path.write_bytes(rng.randbytes(spot))
            case 3: path.unlink()
        if list(store.index()) != [10, 20, 30]: return f"found {list(store.index())}"
        if path.exists() and not said: return "damage not said"
        if store.select("latest") != store.path(30): return "not the newest"
        store.save(40, content(40))
        said.clear()
        if store.index()[40]["pins"] != ["latest"] or said: return f"the next save did not mend it: {said}"


ACTIONS = ("kill", "eio", "enospc", "raise")


@trial("T2 store", goal=20 * len(HERE) * len(ACTIONS), slice=2 * len(HERE), chunk=64)
@cases
def stations(case: int) -> str | None:
    """kill, EIO, ENOSPC or an exception at each named station of a save: earlier checkpoints whole, the next save
    clean"""
    name, action = HERE[case % len(HERE)], ACTIONS[case // len(HERE) % len(ACTIONS)]
    nth = random.Random(f"stations {case}").choice([1, 1, 2, 3])
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        store = small_store(Path(tmp), keep=1)

        def trouble():
            failpoints.arm(f"{name}={action}:{nth}")
            for step in (40, 50): store.save(step, content(step))
        try:
            if action == "kill":
                if (code := exit_code_of(trouble)) not in (0, -signal.SIGKILL): return f"{name}: child ended {code}"
            else:
                try: trouble()
                except (SaveFailed, RuntimeError) as e:
                    if action == "enospc" and getattr(e, "code", "") != "disk_full": return f"{name}: {e!r}"
        finally: failpoints.arm(None)
        reopened = Checkpoints(store.folder, store.run_id, keep=1, emit=silent, reserve=0)
        if problem := sound(reopened, 30): return f"{name}={action}:{nth}: {problem}"
        reopened.save(60, content(60))
        if problem := sound(reopened, 60): return f"{name}={action}:{nth}, next save: {problem}"
        left = [p.name for p in store.folder.iterdir() if not p.name.startswith("step-") and p.name != "index.json"]
        if left: return f"{name}={action}:{nth}: {left} stayed"
        if len(reopened.steps()) > 2: return f"{name}={action}:{nth}: {reopened.steps()} not pruned"


@trial("T1 store", goal=1000, slice=8, chunk=20)
@cases
def killed_saves(case: int) -> str | None:
    "kill -9 at a random instant of a stream of saves: no visible folder damaged, nothing older lost"
    rng = random.Random(f"killed {case}")
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        store = small_store(Path(tmp), keep=2)
        done, pipe = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                step = 30
                while True:
                    step += 10
                    store.save(step, content(step))
                    os.write(pipe, step.to_bytes(4, "little"))
            finally: os._exit(1)
        os.close(pipe)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(done, "rb") as file: told = file.read()
        last = int.from_bytes(told[-4:], "little") if told else 30
        struck("inside a save" if any(p.name.startswith(".tmp") for p in store.folder.iterdir())
               else "between two saves")
        return sound(Checkpoints(store.folder, store.run_id, emit=silent), last)


@trial("T5 store", goal=200, slice=12, chunk=20)
@cases
def full_disk(case: int) -> str | None:
    """the n-th write of a save fails, for n = 1, 2, … until it succeeds; also a real file size limit: the old
    checkpoint verifies, no temporary file stays"""
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        store = small_store(Path(tmp))
        if case % 4 == 3:  # a real limit of the kernel, at every size from nothing to enough
            def limited():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (case // 4 * 701 % 9000, resource.RLIM_INFINITY))
                try: store.save(40, content(40))
                except SaveFailed as e: assert e.code == "disk_full"
            if code := exit_code_of(limited): return f"ended {code}"
        else:
            failpoints.arm(f"*={'eio' if case % 2 else 'enospc'}:{case // 4 * 3 % 90 + case % 4 + 1}")
            try: store.save(40, content(40))
            except SaveFailed: pass
            finally: failpoints.arm(None)
        if problem := sound(store, 30): return problem
        left = [p.name for p in store.folder.iterdir() if p.name.startswith(".")
                and not p.name.startswith(".tmp-step-00000010")]
        if left: return f"{left} stayed"

