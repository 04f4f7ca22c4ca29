"""Forked processes under test: what they did, said and cost. A child never returns to its parent's code."""
from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Ended:
    "How a child ended"
    code: int  # Exit code, negative if a signal ended it
    said: str  # What the action returned, or the traceback of what it raised
    grew: int  # Bytes its memory grew at the peak
    seconds: float

    @property
    def raised(self) -> bool: return self.code == 1


def fork(action: Callable[[], object]) -> int:
    "Run `action` in a forked child that ends with it: 0, or 1 if it raised. The child's pid"
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        action()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else 1
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def wait(pid: int) -> int:
    "Exit code of a child, negative if a signal ended it"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(action: Callable[[], object], limit: int = 60, quiet: bool = True) -> Ended:
    """Run `action` in a forked child for at most `limit` seconds of work, or ten times as long asleep; its text or
    traceback comes back"""
    out, into = os.pipe()

    def act():
        os.close(out)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try: text, code = str(action() or ""), 0
        except BaseException: text, code = traceback.format_exc(limit=-4), 1
        grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        data = f"{grew * (1 if sys.platform == 'darwin' else 1024)}\n{text}".encode("utf-8", "replace")
        while data: data = data[os.write(into, data):]
        sys.exit(code)

    started = time.monotonic()
    pid = fork(act)
    os.close(into)
    data = b""
    while (left := started + 10 * limit - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
        if not (more := os.read(out, 1 << 16)): break
        data += more
    else:
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    os.close(out)
    code = wait(pid)
    grew, _, text = data.decode("utf-8", "replace").partition("\n")
    return Ended(code, text, int(grew or 0), time.monotonic() - started)
