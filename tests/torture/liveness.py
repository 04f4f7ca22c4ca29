"""Who is alive: forged process records, broken locks, two owners."""
from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from pathlib import Path

from llm_trainer.system import locks, process
from llm_trainer.runs.run import create_run

from .battery import cases, trial
from .children import fork, wait

_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
            signal.SIGALRM]


class Stranger:
    "A live process of somebody else that remembers every signal it gets"

    def __enter__(self):
        self._heard, into = os.pipe()
        ready, tell = os.pipe()

        def live():
            os.setsid()
            for number in _SIGNALS: signal.signal(number, lambda n, _: os.write(into, bytes([n])))
            os.write(tell, b"!")
            while True: signal.pause()
        self.pid = fork(live)
        os.close(into), os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        return self

    def heard(self) -> list[int]:
        "The signals that reached it; it must have lived until now"
        os.kill(self.pid, signal.SIGKILL)
        code = wait(self.pid)
        with open(self._heard, "rb") as file: return list(file.read()) + ([] if code == -signal.SIGKILL else [code])

    def __exit__(self, *_): pass


FORGERIES = ("old boot", "wrong start", "other namespace", "other host", "no start", "text pid", "pid 1",
             "own group", "negative", "huge", "true", "float", "perfect, no lock", "garbage state",
             "lock is a folder", "lock is a link", "lock is a fifo", "lock full of noise")


@trial("T7", goal=1000, slice=54, chunk=36)
@cases
def forged(case: int) -> str | None:
    """state.json forged with the pid of a live stranger (old boot, wrong start time, other namespace or host, odd
    types, broken lock): status says crashed, stop sends no signal, not even while somebody holds the run's lock"""
    from llm_trainer.runs import launch
    rng, kind = random.Random(f"forged {case}"), FORGERIES[case % len(FORGERIES)]
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp, Stranger() as stranger:
        run = create_run(Path(tmp), {}, name="forged")
        record = process.identity(stranger.pid)
        state = {**json.loads((run.folder / "state.json").read_text()), "status": "running", "phase": "training",
                 **record, "heartbeat": 9e9, "progress_at": 9e9}
        match kind:
            case "old boot": state["boot_id"] = "00000000-0000-0000-0000-000000000000"
            case "wrong start": state["process_start_ticks"] += rng.choice([-100, -1, 1, 100])
            case "other namespace": state["pid_namespace"] = "pid:[1]"
            case "other host": state["host"] = "elsewhere"
            case "no start": state["process_start_ticks"] = None
            case "text pid": state["pid"] = str(stranger.pid)
            case "pid 1": state["pid"] = 1
            case "own group": state["pid"] = 0
            case "negative": state["pid"] = -stranger.pid
            case "huge": state["pid"] = 2**rng.choice([22, 31, 63, 70])
            case "true": state["pid"] = True
            case "float": state["pid"] = float(stranger.pid)
        (run.folder / "state.json").write_text("{" if kind == "garbage state" else json.dumps(state))
        lock = run.folder / "lock"
        if kind.startswith("lock"): lock.unlink(missing_ok=True)
        match kind:
            case "lock is a folder": lock.mkdir()
            case "lock is a link": lock.symlink_to("/etc/passwd")
            case "lock is a fifo": os.mkfifo(lock)
            case "lock full of noise": lock.write_bytes(rng.randbytes(999))
        status = run.status().status
        held = locks.Lock(lock)
        if not kind.startswith(("lock", "garbage", "perfect")):
            for send in (process.send, process.send_group):
                if send(state, signal.SIGTERM): status += " (and a signal was sent)"
            held.acquire()
            for now in (False, True): launch.stop(run, now=now, timeout=0)
            held.release()
            run.withdraw()
        for now in (False, True):
            try: launch.stop(run, now=now, show=lambda state: None)
            except Exception as e: status += f" (stop raised {e!r})" if not hasattr(e, "exit_code") else ""
        heard = stranger.heard()
        if status != ("unknown" if kind == "garbage state" else "crashed") or heard:
            return f"{kind}: {status}, the stranger heard {heard}"


@trial("T20", goal=500, slice=30, chunk=50)
@cases
def clocks(case: int) -> str | None:
    """the clock jumps (a day, an hour, back and forth) and the process is suspended for ten minutes: elapsed time and
    status stay true, `stalled` then `running`, never a false crash"""
    from llm_trainer.runs.writer import RunWriter
    from llm_trainer.events import Phase, Step
    rng = random.Random(f"clocks {case}")
    now = {"monotonic": rng.uniform(0, 1e6), "wall": 1.8e9}
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        run = create_run(Path(tmp), {}, name="timed", locked=True)
        writer = RunWriter(run, run.lock, clock=lambda: now["monotonic"], wall=lambda: now["wall"])
        writer.log(Phase("training"))
        passed = 0.0
        def seen(): return run.status(wall=now["wall"], monotonic=now["monotonic"]).status
        for step in range(1, 30):
            wait = rng.uniform(0.5, 5)
            for key in now: now[key] += wait
            passed += wait
            if rng.random() < .3: now["wall"] += rng.choice([86_400, -86_400, 3600, -3600, -10**6])
            if seen() != "running": return f"step {step}: {seen()} after a jump"
            if step > 8 and rng.random() < .1:
                for key in now: now[key] += 600
                passed += 600
                if seen() != "stalled": return f"step {step}: {seen()} after ten silent minutes"
            writer.log(Step(step, step / 10, step, 1e-3, 2.0, 1.0, 100.0, 10, 5.0))
            if seen() != "running": return f"step {step}: {seen()} after progress"
            writer.update()
            elapsed = run.state().elapsed_seconds
            if abs(elapsed - passed) > 1: return f"step {step}: {elapsed} s elapsed, {passed} s passed"
        run.lock.release()
        if seen() != "crashed": return f"{seen()} without its lock"
