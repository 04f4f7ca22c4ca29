"""How much energy the devices have used, where they count it: Intel's and AMD's RAPL, NVIDIA's NVML. Loads no torch.
Both count for the whole chip, whoever uses it. Where a machine doesn't tell, nothing is guessed: most virtual ones
don't, and RAPL is often for root only."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

RAPL = Path("/sys/class/powercap")


class Counter:
    "Joules since it was made, from something that counts up and starts again at `wrap`"

    def __init__(self, read: Callable[[], float], wrap: float | None = None):
        self.read, self.wrap, self.joules, self.before = read, wrap, 0.0, read()

    def poll(self) -> float:
        now = self.read()
        if now >= self.before: self.joules += now - self.before
        elif self.wrap: self.joules += now + self.wrap - self.before
        self.before = now
        return self.joules


class Meter:
    "The joules of this machine's CPU and of some of its NVIDIA GPUs; a part that doesn't tell is not there"
    EVERY = 1.0  # seconds between two looks: a look takes about a millisecond

    def __init__(self,
        gpus: tuple[int, ...] = (),  # Indices as a process with this environment sees them
        rapl: Path = RAPL,  # Where Linux shows the counters of the CPU
    ):
        self.counters = {"cpu_joules": cpu_counters(rapl), "gpu_joules": gpu_counters(gpus)}
        self._last: dict[str, float] = {}
        self._looked = float("-inf")

    def read(self) -> dict[str, float]:
        "Joules by part since the meter was made; empty where nothing tells"
        if time.monotonic() - self._looked < self.EVERY: return self._last
        self._looked = time.monotonic()
        for name, counters in self.counters.items():
            try: self._last = {**self._last, **({name: round(sum(c.poll() for c in counters), 1)} if counters else {})}
            except (OSError, ValueError): self.counters[name] = []
        return self._last


def _joules(file: Path) -> float: return int(file.read_text()) / 1e6


def cpu_counters(rapl: Path = RAPL) -> list[Counter]:
    "A counter a processor package that may be read"
    found = []
    for zone in sorted(rapl.glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") != 1: continue  # a part of one that is counted
        try:
            wrap = int((zone / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter(partial(_joules, zone / "energy_uj"), wrap))
        except (OSError, ValueError): continue
    return found


def gpu_counters(gpus: tuple[int, ...]) -> list[Counter]:
    "A counter for each of these GPUs that has one (NVIDIA's, from Volta on)"
    if not gpus: return []
    import ctypes
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2(): return []
    except (OSError, AttributeError): return []
    found = []
    for gpu in gpus:
        handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
        visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        name = visible[gpu] if gpu < len(visible) else str(gpu)
        if name.isdigit(): failed = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else: failed = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if failed: continue

        def read(handle=handle, value=value) -> float:
            if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)): raise ValueError("not counted")
            return value.value / 1000
        try: found.append(Counter(read))
        except ValueError: continue
    return found
