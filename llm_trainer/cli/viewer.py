"""What runs and servers show goes through here: a terminal that is gone, full or stopped costs them nothing.

Text is handed to a thread that writes it; what the other side doesn't take is dropped. Knows nothing of runs."""
from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

MOST = 1 << 20  # characters that wait for a slow reader; what comes after is dropped
PATIENCE = 1.0  # seconds that the last words may take


class Viewer:
    "Stands for an output stream; no method waits or raises because of who reads it"
    errors = "replace"

    def __init__(self, stream):
        stream.flush()
        self._stream, self._fd = stream, stream.fileno()
        self.encoding, self._tty = stream.encoding or "utf-8", stream.isatty()
        self._waiting, self._length, self._gone, self._closed = deque(), 0, False, False
        self._changed, self._busy = threading.Condition(), False
        threading.Thread(target=self._work, name="viewer", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            if not self._gone and self._length < MOST:
                self._waiting.append(text)
                self._length += len(text)
                self._changed.notify_all()
        return len(text)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed: self._changed.wait()
                if not self._waiting: return
                text, self._busy = "".join(self._waiting), True
                self._waiting.clear()
                self._length = 0
            try: self._put(text.encode(self.encoding, "replace"))
            except OSError: self._gone = True
            with self._changed:
                self._busy = False
                if self._gone: self._waiting.clear()
                self._changed.notify_all()

    def _put(self, data: bytes) -> None:
        while data:
            try: data = data[os.write(self._fd, data[:4096]):]
            except BlockingIOError: time.sleep(0.05)  # somebody set the descriptor non-blocking

    def drain(self, patience: float = PATIENCE) -> None:
        "Wait until everything is written, but not for long"
        end = time.monotonic() + patience
        with self._changed:
            while (self._waiting or self._busy) and not self._gone and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def close(self, patience: float = PATIENCE) -> None:
        self.drain(patience)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def flush(self) -> None: pass
    def isatty(self) -> bool: return self._tty
    def fileno(self) -> int: return self._fd
    def writable(self) -> bool: return True
    def writelines(self, lines) -> None:
        for line in lines: self.write(line)


def _real(stream) -> bool:
    "Is `stream` open on a descriptor of the system?"
    try: return os.fstat(stream.fileno()) is not None and not stream.closed
    except (AttributeError, OSError, ValueError): return False


def takes(fd: int) -> bool:
    "Would a short write to a descriptor return at once? Not where a pipe is full, or a terminal is stopped"
    try: return bool(select.select([], [fd], [], 0)[1])
    except (OSError, ValueError): return True


def let_go(seconds: float = 1.5) -> None:
    """Ctrl-C ends a command at any time. What it still says where nobody takes its output goes nowhere; what doesn't
    come back from writing, or from a long call of a library, is ended after `seconds`"""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler: return
    heard = 0.0

    def interrupted(signum, frame):
        nonlocal heard
        heard = time.monotonic()
        stuck = [fd for fd in (1, 2) if not takes(fd)]
        if stuck:
            null = os.open(os.devnull, os.O_WRONLY)
            for fd in stuck: os.dup2(null, fd)
            gone_within(seconds, 128 + signum)
        raise KeyboardInterrupt

    def listen(pipe: int):
        while signals := os.read(pipe, 64):
            if signal.SIGINT not in signals or signal.getsignal(signal.SIGINT) is not interrupted: continue
            since = time.monotonic() - 1.0  # a busy machine hears it late; several at once may be heard as one
            gone_within(seconds, 128 + signal.SIGINT, lambda since=since: heard < since, "interrupted.")

    signal.signal(signal.SIGINT, interrupted)
    with suppress(OSError, RuntimeError):  # descriptors or threads are short: the command says so
        read, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=listen, args=[read], name="ctrl-c", daemon=True).start()
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written to also inside a long C call
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def gone_within(seconds: float, code: int, still: Callable[[], bool] = lambda: True, word: str = "") -> None:
    "Ends the process if it is there then and `still` says so: what a library does may never come to its end"
    def end():
        if not still(): return
        try:
            if word and takes(2): os.write(2, f"llm-trainer: {word}\n".encode())
        finally: os._exit(code)
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


@contextmanager
def attached() -> Iterator[None]:
    "Standard output and error as viewers inside the block; a background job may write to its terminal, too"
    before, ours = (sys.stdout, sys.stderr), []
    handler = signal.getsignal(signal.SIGTTOU) if threading.current_thread() is threading.main_thread() else None
    if handler is not None: signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        for name in ("stdout", "stderr"):
            if not _real(getattr(sys, name)): continue
            try: ours.append(Viewer(getattr(sys, name)))
            except (OSError, RuntimeError): continue
            setattr(sys, name, ours[-1])
        yield
    finally:
        end = time.monotonic() + PATIENCE
        for viewer in ours: viewer.close(end - time.monotonic())
        sys.stdout, sys.stderr = before
        if handler is not None: signal.signal(signal.SIGTTOU, handler)
