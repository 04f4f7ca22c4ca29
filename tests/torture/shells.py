"""Real processes and real terminals, and a long random life with several shells at once."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_trainer.system import process
from llm_trainer.events import silent
from llm_trainer.training.checkpoint import Checkpoints, verify, weights_hash
from llm_trainer.runs.run import Run, list_runs

from .battery import cases, struck, trial
from .forks import Child, server
from .lives import RUN, clean_end, difference, new_home, run_of, store_of


def command(home: Path, *words: str) -> list[str]: return [sys.executable, "-m", "llm_trainer", *words]


def environment(home: Path) -> dict[str, str]:
    "Of a shell in the workspace"
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "LLM_TRAINER_HOME": str(home), "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def wait_until(true, limit: float = 600) -> bool:
    "Whether `true()` became so; the limit is for what never comes, also on a busy machine"
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if true(): return True
        time.sleep(0.02)
    return False


@trial("T8", goal=60, slice=1, chunk=2)
@cases
def terminals(case: int) -> str | None:
    """the real launch path: `train --background` in a terminal that is then closed, beside a viewer that never reads
    and one that is stopped; half of the workers killed -9 and resumed: finishes, equal to an untouched run"""
    rng = random.Random(f"terminal {case}")
    clean_end()
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp)
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(home)
            os.execve("/bin/sh", ["sh", "-c", '"$@"; exec sleep 1000', "sh",
                                  *command(home, "train", "--config", "torture", "--name", RUN,
                                                                                       "--background")],
                      environment(home))
        said = b""
        while b"stop victim" not in said and select.select([terminal], [], [], 600)[0]:
            try: said += os.read(terminal, 4096)
            except OSError: break
        shell = dict(cwd=home, env=environment(home))
        viewers = [subprocess.Popen(command(home, *words), **shell, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                   for words in (["logs", RUN, "--follow"], ["status", RUN, "--watch"])]
        try:
            if not viewers[1].stdout.readline(): return "status --watch said nothing"
            viewers[1].send_signal(signal.SIGSTOP)
            fcntl.fcntl(viewers[0].stdout, fcntl.F_SETPIPE_SZ, 4096)  # nobody reads, and it is soon full
            os.close(terminal)  # the window is gone
            os.kill(pid, signal.SIGHUP)
            run = run_of(home)
            if b"goes on when this shell closes" not in said: return f"no background run: {said[-500:]!r}"
            if case % 2:
                wait_until(lambda: (run.state().step or 0) >= rng.randrange(1, 50) or not run.locked)
                process.send(run.state().to_record(), signal.SIGKILL)
                if not wait_until(lambda: not run.locked): return "killed, and its lock is held"
                if run.status().status not in ("crashed", "completed"): return f"killed: {run.status().status}"
                done = subprocess.run(command(home, "resume", RUN, "--background"), **shell, capture_output=True,
                                      text=True)
                if done.returncode: return f"resume ended {done.returncode}: {done.stderr}"
            if not wait_until(lambda: not run.locked and run.status().status not in ("queued", "running")):
                return f"did not end: {run.status().status} {run.log_tail(5)}"
            return difference(home)
        finally:
            for viewer in viewers:
                with contextlib.suppress(ProcessLookupError): viewer.kill()
                viewer.wait()
                viewer.stdout.close()
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


CELLS = [(accum, dropout, chain, where) for chain in (1, 3, 10) for accum in (1, 4) for dropout in (0.0, 0.1)
         for where in ("step 0", "mid-epoch", "epoch end", "in evaluation", "last step")]
_ends: dict[tuple, tuple] = {}


def _everything(home: Path) -> tuple:
    "Weights, optimizer, random numbers, position and every loss as a hex float"
    folder = store_of(home).select("latest")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    record = json.loads((folder / "state" / "trainer.json").read_text())
    losses = [(row["kind"], row["step"], float(row["loss"]).hex()) for row in run_of(home).metrics()]
    return (files["model.safetensors"]["sha256"], files["state/optimizer.safetensors"]["sha256"], record["rng"],
            record["position"], record["probe"], losses)


@trial("T3", goal=4 * len(CELLS), slice=3, chunk=6)
@cases
def exact(case: int) -> str | None:
    """bit-exact resume: accumulation 1 and 4, dropout 0 and 0.1, stopped at step 0, mid-epoch, epoch end, in an
    evaluation, at the last step, 1, 3 and 10 times (CPU fp32, eager): weights, optimizer, random numbers, probe and
    all losses as hex floats equal"""
    accum, dropout, chain, where = CELLS[case % len(CELLS)]
    rng = random.Random(f"exact {case}")
    flags = ["--grad-accum-steps", str(accum), "--dropout", str(dropout), "--seed", str(case // len(CELLS))]
    key = tuple(flags)
    if key not in _ends:
        with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
            home = new_home(tmp)
            child = server().start(["train", "--config", "torture", "--name", RUN, *flags], home)
            if child.wait(): return f"{flags}: {child.tail()}"
            _ends[key] = (_everything(home), run_of(home).state().steps)
    clean, steps = _ends[key]
    places = {"step 0": 0, "mid-epoch": steps // 4, "epoch end": steps // 2, "last step": steps - 1}
    stops = [places[where]] if where in places else []
    while len(stops) < chain and steps - 1 > chain: stops = sorted({*stops, rng.randrange(1, steps)})
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home, argv = new_home(tmp), ["train", "--config", "torture", "--name", RUN, *flags]
        if where == "in evaluation":
            server().start(argv, home, at_phase={"phase": "evaluating", "signals": [int(signal.SIGTERM)],
                                                 "nth": 1}).wait()
            argv = ["resume", RUN]
        for stop in stops:
            how = {"stop_at": stop} if stop else {"at_phase": {"phase": "tokenizing", "signals": [int(signal.SIGTERM)]}}
            server().start(argv, home, **how).wait()
            argv = ["resume", RUN]
        child = server().start(argv, home)
        if code := child.wait(): return f"{CELLS[case % len(CELLS)]} stopped at {stops}: ended {code}: {child.tail()}"
        found = _everything(home)
        names = ("weights", "optimizer", "random numbers", "position", "probe", "losses")
        differ = [name for name, a, b in zip(names, clean, found) if a != b]
        if differ: return f"{CELLS[case % len(CELLS)]} stopped at {stops}: other {', '.join(differ)}"


@trial("T23", goal=30, slice=1, chunk=5)
@cases
def offline(case: int) -> str | None:
    "a whole run that ends if it looks up a name or opens a connection (audited): not one"
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = new_home(tmp, prepared=case % 2 == 1)
        child = server().start(["train", "--config", "torture", "--name", RUN], home, no_network=True)
        if code := child.wait(): return f"ended {code}: {child.tail()}"
        return difference(home)


# A long random life ---------------------------------------------------------------------------------------------------

class World:
    "A workspace, the commands running in it, and what must be true of it"
    ids = ("ada", "bob", "cyd")

    def __init__(self, home: Path, rng: random.Random):
        self.home, self.rng, self.running, self.damaged, self.longer = home, rng, {}, set(), set()
        self.fds = len(os.listdir("/proc/self/fd"))

    def run(self, run_id: str) -> Run: return Run(self.home / "runs" / run_id)

    def store(self, run_id: str) -> Checkpoints:
        "Its checkpoints"
        return Checkpoints(self.home / "checkpoints" / run_id, run_id, emit=silent)

    def shell(self, *words: str, allowed: tuple[int, ...] = (0,)) -> str | None:
        "Run a command to its end"
        child = server().start(list(words), self.home)
        code = child.wait()
        if code not in allowed: return f"{' '.join(words)}: exit code {code}, not {allowed}: {child.tail(300)}"

    def step(self) -> str | None:
        "One random act, of those that can be done now"
        self.running = {run_id: child for run_id, child in self.running.items() if child.alive()
                        or child.wait() is None}
        run_id = self.rng.choice([*self.ids, *self.running, *self.running])
        exists, live, steps = self.run(run_id).folder.exists(), run_id in self.running, self.store(run_id).steps()
        acts = ["kill"] * 4 + ["double"] * 2 + ["wait"] if live else ["start"] * 4
        if exists: acts += ["look", "stop", "verify", "delete"]
        if steps and not live: acts += ["pin", "index"] + ["damage"] * (len(steps) > 1)
        act = self.rng.choice(acts)
        struck(act)
        return getattr(self, f"_{act}")(run_id, exists, live, steps)

    def _start(self, run_id, exists, live, steps):
        more = exists and self.rng.random() < .2
        if more: self.longer.add(run_id)
        words = ["resume", run_id] if exists else ["train", "--config", "torture", "--name", run_id]
        self.running[run_id] = server().start([*words, *(["--more-epochs", "1"] if more else [])], self.home)
        time.sleep(self.rng.uniform(0, 0.5))

    def _kill(self, run_id, exists, live, steps):
        child: Child = self.running.pop(run_id)
        child.kill()
        child.wait()
        if exists and self.run(run_id).status().status in ("running", "stalled"): return "killed, and shown as alive"

    def _stop(self, run_id, exists, live, steps): return self.shell("stop", run_id, allowed=(0, 3) if live else (0,))

    def _look(self, run_id, exists, live, steps):
        return self.shell("runs", "--json") or self.shell("status", "--json") or self.shell("logs", run_id)

    def _verify(self, run_id, exists, live, steps):
        return self.shell("verify", run_id, allowed=(0, 1) if run_id in self.damaged else (0, 1, 3) if live else (0,))

    def _delete(self, run_id, exists, live, steps):
        if problem := self.shell("delete", run_id, "--yes", allowed=(0, 75) if live else (0,)): return problem
        if self.run(run_id).folder.exists(): return None if live else "deleted, and still there"
        if self.store(run_id).folder.exists(): return "deleted, and its checkpoints are still there"
        for notes in (self.damaged, self.longer): notes.discard(run_id)

    def _pin(self, run_id, exists, live, steps): self.store(run_id).pin(self.rng.choice(steps))
    def _double(self, run_id, exists, live, steps): return self.shell("resume", run_id, allowed=(0, 3, 75))

    def _wait(self, run_id, exists, live, steps):
        if (code := self.running.pop(run_id).wait()) not in (0, 143, 1 if run_id in self.damaged else 0):
            return f"the worker ended {code}"

    def _damage(self, run_id, exists, live, steps):
        file = self.rng.choice(sorted(p for p in self.store(run_id).path(steps[-1]).rglob("*") if p.is_file()))
        os.truncate(file, file.stat().st_size // 2)
        self.damaged.add(run_id)

    def _index(self, run_id, exists, live, steps): (self.store(run_id).folder / "index.json").write_text("{")

    def end(self) -> str | None:
        "Every process killed and every run resumed to its end: what was never damaged equals an untouched run"
        for child in self.running.values():
            child.kill()
            child.wait()
        self.running = {}
        for run in list_runs(self.home / "runs"):
            if run.id in self.damaged: continue
            if problem := self.shell("resume", run.id): return problem
            if (status := run.status().status) != "completed": return f"{run.id} was resumed to its end and is {status}"
            if run.id not in self.longer and weights_hash(self.store(run.id).select("latest")) != clean_end()[0]:
                return f"{run.id} has other weights than an untouched run"
        return self.broken()

    def broken(self) -> str | None:
        "An invariant that does not hold"
        for run in list_runs(self.home / "runs"):
            status, child = run.status().status, self.running.get(run.id)
            if status in ("running", "stalled", "queued") and child is None:
                return f"{run.id} is shown as {status}, and nothing runs"
            if child is None and run.id not in self.damaged:
                store = self.store(run.id)
                if bad := {s: p for s in store.steps() if (p := verify(store.path(s)))}: return f"{run.id}: {bad}"
        if (fds := len(os.listdir("/proc/self/fd"))) > self.fds + 20:
            return f"{fds} descriptors are open, there were {self.fds}"


@trial("T21", goal=10000, slice=12, chunk=24)
def lives(n: int, seed: int) -> list[str]:
    """a random life of three runs from several shells (train, resume, more epochs, kill -9, stop, double start,
    verify, delete, pin, damage, lost index; 24 acts each): no dead run shown alive, no unnoticed damage, documented
    exit codes, descriptors constant; in the end each undamaged run resumes to the weights of an untouched one"""
    failures, done = [], 0
    clean_end()
    while done < n:
        with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
            world, acts = World(new_home(tmp), random.Random(f"world {seed + done}")), min(24, n - done)
            try:
                problem = next(filter(None, (world.step() or world.broken() for _ in range(acts))), None) or world.end()
                if problem: failures.append(f"case {seed + done}: {problem}")
            except Exception as e: failures.append(f"case {seed + done}: {e!r}")
            finally:
                for child in world.running.values():
                    child.kill()
                    child.wait()
            done += acts
    return failures
