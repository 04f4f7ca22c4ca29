"""Which process is which: boot ids, start times, signals to one and no other. Knows nothing of runs or torch."""
from __future__ import annotations

import errno
import os
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_trainer.errors import UsageError

FILES = 1024  # open files that a run may need: loaders, shards, logs
THREADS = 4096  # that may be asked for

LINUX, MACOS = sys.platform.startswith("linux"), sys.platform == "darwin"
if not (LINUX or MACOS):
    raise UsageError(f"llm_trainer runs on Linux and macOS, not on {sys.platform}: it needs flock and process groups.\n"
                     "On Windows, install WSL2 (wsl --install) and run it there.")


@lru_cache(maxsize=1)
def boot_id() -> str:
    "A text that changes with every boot of this machine"
    if MACOS: return _sysctl("kern.bootsessionuuid")
    try: return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError: pass
    try: return next(s for s in Path("/proc/stat").read_text().splitlines() if s.startswith("btime"))
    except (OSError, StopIteration): return "unknown"  # a container without /proc: the lock still tells who lives


def start_ticks(pid: int) -> int | None:
    "When process `pid` started, in clock ticks since boot (macOS: microseconds); None when there is no such process"
    if MACOS: return _macos_start(pid)
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def process_state(pid: int) -> str | None:
    "What `pid` is doing: running, sleeping, waiting (for a disk), stopped or zombie; None when it is gone"
    if MACOS: return "running" if _macos_start(pid) is not None else None
    names = {"R": "running", "S": "sleeping", "D": "waiting", "T": "stopped", "t": "stopped", "Z": "zombie"}
    fields = _stat(pid)
    return names.get(fields[0], "sleeping") if fields else None


def prepare() -> None:
    """Makes a fresh process fit to work. Descriptors 0 to 2 exist: whoever started it may have closed them, and the
    next file to be opened, perhaps a lock, would be taken for standard output. No folder it makes is open to everybody.
    As many files may be open as a run needs, if the system allows that. And threads that wait for one another soon
    sleep: spinning without end, two of them beside two busy processes were 5 times slower, and alone no faster. Where
    other processes work they sleep at once, which is 10 times as fast there and a quarter slower elsewhere. A wish for
    more threads than any machine has, for which OpenMP would end the process, is left out."""
    import resource
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try: os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", errors="replace", closefd=False))
    os.umask(os.umask(0o077) | 0o002)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # read when torch loads
        os.environ.update({"OMP_WAIT_POLICY": "passive"} if _others_work() else {"GOMP_SPINCOUNT": "2000"})
    wish = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip().lstrip("0")
    if wish.isdecimal() and int(wish[:9]) > THREADS:
        del os.environ["OMP_NUM_THREADS"]
        print(f"OMP_NUM_THREADS asks for more than {THREADS:,} threads, so it doesn't count: each core gets one.\n"
              "Leave that to this program: unset OMP_NUM_THREADS; or choose: export OMP_NUM_THREADS=2", file=sys.stderr)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted: resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def outlive_parent() -> None:
    """Has the system send no signal when the thread that started this process ends. torch asks for a SIGINT, which
    comes while the rest of that process still seems to live, and then looks like a person's Ctrl-C"""
    if not LINUX: return
    import ctypes
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG


def _others_work() -> bool:
    "Did other processes want half of the cores in the last minute, and does one of them at this moment, too?"
    if os.getloadavg()[0] <= 0.5 * (os.cpu_count() or 1): return False
    try: running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError): return True
    return running > 1  # the first is this one


def too_many_files(error: BaseException) -> str | None:
    "What helps when `error` says that no more files may be open; None for any other"
    if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE) and "Too many open files" not in str(error):
        return None
    import resource
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"Too many open files: this process may have {limit:,} open. Raise the limit: ulimit -n {FILES}"


def out_of_memory(error: BaseException) -> bool:
    "Did memory run out: Python's, a GPU's, that of torch's CPU allocator, or the room to load a library?"
    words = "out of memory", "can't allocate memory", "cannot allocate memory", "failed to map segment"
    said = isinstance(error, RuntimeError | OSError | ImportError) and any(word in str(error).lower() for word in words)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or said


def no_memory(error: BaseException) -> str | None:
    "What helps when `error` says that memory ran out; None for any other"
    if not out_of_memory(error): return None
    import resource
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY: return "Memory ran out. End what else needs it, or use a smaller model."
    return f"Memory ran out: this process may have {limit / 1e9:,.2g} GB of it. Lift the limit: ulimit -v unlimited"


def identity(pid: int | None = None) -> dict[str, Any]:
    "What tells this process (or `pid`) from every other one, also after a reboot or in another container"
    pid = pid or os.getpid()
    return {"host": os.uname().nodename, "pid": pid, "process_start_ticks": start_ticks(pid), "boot_id": boot_id(),
            "pid_namespace": _pid_namespace()}


def same_process(record: dict[str, Any]) -> bool:
    "Does the process that `record` (an `identity()`) describes still live on this machine?"
    pid = record.get("pid")
    if type(pid) is not int or pid < 2 or type(record.get("process_start_ticks")) is not int: return False
    return all(record.get(key) == value for key, value in identity(pid).items())


def send(record: dict[str, Any], signum: int) -> bool:
    "Signals the process that `record` describes, and only that one; False when it is gone or another"
    if not LINUX or not hasattr(os, "pidfd_open"): return same_process(record) and _kill(os.kill, record["pid"], signum)
    if not same_process(record): return False
    try: fd = os.pidfd_open(record["pid"])
    except OSError: return False
    try: return same_process(record) and _kill(signal.pidfd_send_signal, fd, signum)  # fd can't come to mean another
    finally: os.close(fd)


def send_group(record: dict[str, Any], signum: int) -> bool:
    "Signals the whole session that `record`'s process leads; the process alone where it leads none"
    if not same_process(record): return False
    try: leads = os.getsid(record["pid"]) == record["pid"]
    except ProcessLookupError: return False
    return _kill(os.killpg, record["pid"], signum) if leads else send(record, signum)


def _kill(how, target: int, signum: int) -> bool:
    try: how(target, signum)
    except (ProcessLookupError, PermissionError): return False
    return True


def _stat(pid: int) -> list[str] | None:
    "The fields of /proc/PID/stat after the name, which may hold spaces and brackets itself"
    try: return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError: return None


def _pid_namespace() -> str | None:
    try: return os.readlink("/proc/self/ns/pid")
    except OSError: return None


def _sysctl(name: str) -> str:
    import ctypes
    libc, size = ctypes.CDLL(None), ctypes.c_size_t(128)
    buffer = ctypes.create_string_buffer(size.value)
    if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0): raise OSError(f"sysctl {name}")
    return buffer.value.decode()


def _macos_start(pid: int) -> int | None:
    "`pbi_start_tvsec` and `_tvusec` of struct proc_bsdinfo (136 bytes, flavour 3 of proc_pidinfo)"
    import ctypes
    buffer = ctypes.create_string_buffer(136)
    if ctypes.CDLL(None).proc_pidinfo(pid, 3, ctypes.c_uint64(0), buffer, 136) != 136: return None
    def number(at): return int.from_bytes(buffer.raw[at:at + 8], sys.byteorder)
    return number(120) * 1_000_000 + number(128)


def accelerator() -> str:
    "The device that `auto` will mean here, guessed without torch: cuda, mps or cpu"
    nvidia = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg") and bool(gpus())  # WSL2 has no nvidiactl
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and nvidia: return "cuda"
    return "mps" if MACOS and os.uname().machine == "arm64" else "cpu"


@lru_cache(maxsize=1)
def gpus() -> list[str]:
    "The UUIDs that NVIDIA's driver has for the GPUs this process may use, in CUDA's order; found without torch"
    there = [found for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")) if (found := _uuid(path))]
    there = there or _asked_of_nvml()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None: return there
    shown: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        match = [there[int(name)]] if name.isdecimal() and int(name) < len(there) else \
            [name] if name.startswith("MIG-") else \
            [uuid for uuid in there if name.startswith("GPU-") and uuid.startswith(name)]
        if len(match) != 1: break  # CUDA too stops at the first that is none
        shown += match
    return shown


def _uuid(path: Path) -> str | None:
    try: return next((line.split()[-1] for line in path.read_text().splitlines() if line.startswith("GPU UUID")), None)
    except OSError: return None


def _asked_of_nvml() -> list[str]:
    "The same from NVIDIA's library, for a container or a WSL2 whose /proc doesn't tell"
    if not (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")): return []
    import ctypes
    try:
        nvml, count, found = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(), []
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)): return []
        for i in range(count.value):
            handle, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) or nvml.nvmlDeviceGetUUID(handle, uuid, 96):
                return []
            found.append(uuid.value.decode())
        return found
    except (OSError, AttributeError, UnicodeError): return []
