"""A fork server: one quiet process with everything imported, which forks the processes under test.

A trainer costs seconds to import and milliseconds to fork. The server has no threads (tokenizers' and torch's pools
would not survive a fork), so what a child does is what a fresh process would do: the command line, from its first line.
"""
from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()


class Server:
    "Starts commands of llm-trainer in forked processes; use `server()`"

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "LLM_TRAINER_FAILPOINTS": "",
               "LLM_TRAINER_HUNG_SECONDS": "1.5",  # a suspended rank is found soon
               "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE.parents[1])])}
        self.process = subprocess.Popen([sys.executable, "-m", "torture.forks"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, bufsize=0, env=env)
        self._heard, self.ended = b"", {}
        assert self._hear()["ready"]

    def _hear(self, patience: float | None = None) -> dict | None:
        "What the server says next; None if that is nothing for `patience` seconds"
        while b"\n" not in self._heard:
            if not select.select([self.process.stdout], [], [], patience)[0]: return None
            if not (more := os.read(self.process.stdout.fileno(), 1 << 16)):
                raise RuntimeError("the fork server is gone")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        answer = json.loads(line)
        if "ended" in answer: self.ended[answer["ended"]] = answer["code"]
        return answer

    def _tell(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        while "ended" in (answer := self._hear()): pass
        return answer

    def start(self, argv: list[str], home: Path, **how) -> Child:
        "Start `llm-trainer argv` in the workspace `home`; `how` says what should go wrong, see `_misfortune`"
        log = home / "shell.log"
        return Child(self, self._tell(argv=argv, home=str(home), log=str(log), how=how)["pid"], log)

    def wait(self, pid: int, limit: float) -> int:
        """The exit code of a child (negative: a signal's); killed, and -1000, if it sleeps or computes for more than
        `limit` seconds. Time in which the machine is busy with others doesn't count: a starved child doesn't hang"""
        slept, hangs = 0.0, False
        while pid not in self.ended:
            if self._hear(0.2) or hangs: continue
            state, computed = _doing(pid)
            slept += 0.2 * (state in "SDT")
            if hangs := max(slept, computed) > limit:
                with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        code = self.ended.pop(pid)
        return -1000 if hangs else code


def _doing(pid: int) -> tuple[str, float]:
    "A process's state, as /proc has it (Z: it ended), and the seconds of CPU it used"
    try: fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError: return "Z", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Child:
    "A command that is running"

    def __init__(self, server: Server, pid: int, log: Path):
        self.server, self.pid, self.log, self._code = server, pid, log, None

    def kill(self, signum: int = signal.SIGKILL) -> None:
        "Signal it, if it still lives: its pid stays its own until the server has reaped it and we have read so"
        if self._code is None and self.pid not in self.server.ended:
            with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signum)

    def alive(self) -> bool:
        "Whether it still runs, as far as /proc tells"
        return _doing(self.pid)[0] != "Z"

    def wait(self, limit: float = 120) -> int:
        "Its exit code"
        if self._code is None: self._code = self.server.wait(self.pid, limit)
        return self._code

    def tail(self, n: int = 600) -> str:
        "The end of what all commands of this workspace said"
        try: return self.log.read_bytes()[-n:].decode("utf-8", "replace")
        except OSError: return ""


_servers: dict[int, Server] = {}


def server() -> Server:
    "The server of this process, started when first asked for"
    if os.getpid() not in _servers:
        _servers[os.getpid()] = Server()
        atexit.register(_servers[os.getpid()].process.kill)
    return _servers[os.getpid()]


# In the server's process ----------------------------------------------------------------------------------------------

def _misfortune(failpoint: str | None = None, file_limit: int | None = None, at_phase: dict | None = None,
                stop_at: int | None = None, nan: dict | None = None, no_network: bool = False,
                rank_failpoint: str | None = None) -> None:
    "What should go wrong in a child, before it runs its command"
    if rank_failpoint: os.environ["LLM_TRAINER_FAILPOINTS"] = rank_failpoint  # for the processes it starts
    if failpoint:
        from llm_trainer.system import failpoints
        failpoints.arm(failpoint)
    if file_limit:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if at_phase: _signal_at_phase(**at_phase)
    if stop_at: _stop_at(stop_at)
    if nan: _poison(**nan)
    if no_network: _no_network()


def _signal_at_phase(phase: str, signals: list[int], nth: int = 1) -> None:
    "Send this process signals when the run enters a phase for the nth time"
    from llm_trainer.runs.writer import RunWriter
    log, seen = RunWriter.log, [0]

    def told(self, event):
        log(self, event)
        if event.kind == "phase" and event.name == phase:
            seen[0] += 1
            if seen[0] == nth:
                for number in signals: os.kill(os.getpid(), number)
    RunWriter.log = told


def _stop_at(step: int) -> None:
    "Ask the run to stop when it has made so many steps"
    from llm_trainer.runs.writer import RunWriter
    log = RunWriter.log

    def told(self, event):
        log(self, event)
        if event.kind == "step" and event.step == step: self.signals.add("stop")
    RunWriter.log = told


def _poison(where: str, call: int, value: str = "nan") -> None:
    "Make a number of the model not finite at the nth forward pass of its first LayerNorm while training"
    import torch
    calls = [0]

    def hook(module, args, output):
        if not (isinstance(module, torch.nn.LayerNorm) and module.training and torch.is_grad_enabled()): return None
        calls[0] += 1
        if calls[0] != call: return None
        if where == "weights": module.weight.data[0] = float(value)
        elif where == "gradient": output.register_hook(lambda gradient: gradient * float(value))
        else: return output * float(value)
    torch.nn.modules.module.register_module_forward_hook(hook)


def _no_network() -> None:
    "End this process with 99 when it looks up a name or connects to anything but this machine's own files"
    def hook(event, args):
        if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)): os._exit(99)
    sys.addaudithook(hook)


def _child(request: dict) -> None:
    os.setsid()
    os.chdir(request["home"])
    os.environ["LLM_TRAINER_HOME"] = request["home"]
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0), os.dup2(log, 1), os.dup2(log, 2)
    os.closerange(3, 64)
    signal.set_wakeup_fd(-1)
    from llm_trainer.runs.worker import STOPS
    for signum in (signal.SIGCHLD, *STOPS): signal.signal(signum, signal.SIG_DFL)  # as in a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 70
    try:
        _misfortune(**request["how"])
        from llm_trainer.cli import commands as cli
        sys.argv = ["llm-trainer", *request["argv"]]
        code = cli.main(request["argv"])
    except SystemExit as e: code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError): sys.stdout.flush(), sys.stderr.flush()  # their file may be what is full
        os._exit(code or 0)


def serve() -> None:
    "Read requests from stdin, fork, tell of children that ended"
    import fire  # noqa: F401
    import torch

    import llm_trainer.cli.commands
    import llm_trainer.cli.progress
    import llm_trainer.training.recipe
    import llm_trainer.runs.worker  # noqa: F401
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # imports half of torch, which children needn't do again
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**answer):
        out.write(json.dumps(answer) + "\n")
        out.flush()

    wake, waker = os.pipe()
    os.set_blocking(waker, False), os.set_blocking(wake, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    tell(ready=True)
    pending = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError): os.read(wake, 4096)
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    tell(ended=found[0], code=os.waitstatus_to_exitcode(found[1]))
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data: return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                out.flush()
                pid = os.fork()
                if pid == 0: _child(json.loads(line))
                tell(pid=pid)


if __name__ == "__main__": serve()
