"""The program in a process of its own that doesn't load PyTorch first: it is forked from one that has it loaded.

For tests of what a command does. What a process needs to start, what it leaves unloaded and how it ends on a signal is
tested with `python -m llm_trainer`. `python warm.py FD` is the process that forks, one for each process of tests."""
from __future__ import annotations

import atexit
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path


@cache
def _forks() -> socket.socket:
    "The line to the process that forks; it ends with ours"
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here = Path(__file__).resolve()
    path = os.pathsep.join(filter(None, [str(here.parents[1]), os.environ.get("PYTHONPATH")]))
    forks = subprocess.Popen([sys.executable, str(here), str(its.fileno())], pass_fds=[its.fileno()],
                             stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    its.close()
    atexit.register(lambda: (ours.close(), forks.wait()))
    return ours


OURS = ("llm_trainer.cli.commands", "llm_trainer.generation.sampler", "llm_trainer.training.evaluate",
        "llm_trainer.training.recipe")


def program(root: Path, *argv, input: str = "", timeout: float = 240, code: str | None = None,
            loaded: tuple[str, ...] = OURS, **env):
    "What `python -m llm_trainer *argv` (or `python -c code *argv`) says in the workspace `root`, with its exit code"
    env = {**os.environ, "LLM_TRAINER_HOME": str(root), "OMP_NUM_THREADS": "1", **env}
    argv = [os.fsdecode(word) for word in argv]
    if sys.platform != "linux":  # elsewhere a process that has threads and libraries loaded is not safely forked
        what = ["-m", "llm_trainer"] if code is None else ["-c", code]
        return subprocess.run([sys.executable, *what, *argv], cwd=root, env=env, input=input, capture_output=True,
                              text=True, timeout=timeout)
    line = _forks()
    with ExitStack() as stack:
        files = wish, said, out, err = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
        for file, text in (wish, json.dumps(dict(argv=argv, root=str(root), env=env, code=code))), (said, input):
            file.write(text.encode("utf-8", "surrogateescape"))
            file.seek(0)
        socket.send_fds(line, [" ".join(loaded).encode()], [f.fileno() for f in files])
        line.settimeout(30 + timeout)
        pid = int(line.recv(100))
        line.settimeout(timeout)
        try: end = int(line.recv(100))
        except TimeoutError:
            os.kill(pid, 9)
            line.settimeout(30)
            line.recv(100)
            raise subprocess.TimeoutExpired(argv, timeout) from None
        for f in (out, err): f.seek(0)
        told = [f.read().decode().replace("\r\n", "\n") for f in (out, err)]
    return subprocess.CompletedProcess(argv, end, *told)


def _live(wish: int, *streams: int) -> int:
    "The life of a process that was forked: where it is, what it reads and writes, its command, its end"
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    with open(wish) as f: asked = json.load(f)
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path[:0] = filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(asked["root"])
    sys.argv = ["llm_trainer", *asked["argv"]]
    try:
        if asked["code"] is None:
            from llm_trainer.cli.commands import main
            code = main()
        else: code = exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"}) or 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    return code


def main(line: socket.socket) -> None:
    "Forks a process for each wish, and says how it ended"
    while True:
        said, fds, _, _ = socket.recv_fds(line, 1000, 4)
        if not said: return
        for name in said.decode().split(): importlib.import_module(name)
        if not (pid := os.fork()):
            line.close()
            code = 1
            try: code = _live(*fds)
            finally: os._exit(code)
        for fd in fds: os.close(fd)
        line.send(b"%d" % pid)
        line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__": main(socket.socket(fileno=int(sys.argv[1])))
