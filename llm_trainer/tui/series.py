"""The numbers of one run, kept small: columns of doubles that never grow past a limit however long the run."""
from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

TRAIN = ("step", "tokens", "time", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes")
VAL = ("step", "tokens", "time", "loss", "perplexity", "bits_per_byte")


class Series:
    """Rows of one kind in order of their step; `extremes` is the column whose peaks survive thinning."""

    def __init__(self, names: Iterable[str], limit: int = 100_000, extremes: str = "loss"):
        self.columns = {name: array("d") for name in names}
        self.limit, self.extremes, self.version = limit, self.columns[extremes], 0

    def __len__(self) -> int: return len(self.columns["step"])

    def __getitem__(self, name: str) -> array: return self.columns[name]

    def last(self, name: str) -> float | None:
        "The newest value of a column, None where there is none"
        values = self.columns[name]
        return values[-1] if len(values) and values[-1] == values[-1] else None

    def append(self, row: dict) -> None:
        "Add a row; one at an earlier step than the last is a replay after a crash and replaces what it repeats"
        step = _number(row.get("step"))
        if step != step: return
        steps = self.columns["step"]
        if len(steps) and step <= steps[-1]:
            keep = bisect_left(steps, step)
            for values in self.columns.values(): del values[keep:]
        for name, values in self.columns.items(): values.append(_number(row.get(name)))
        self.version += 1
        if len(steps) >= 2 * self.limit: self._thin()

    def _thin(self) -> None:
        "Keep of every four rows the lowest and the highest"
        peaks, keep = self.extremes, []
        for start in range(0, len(peaks) - 3, 4):
            block = range(start, start + 4)
            real = [i for i in block if peaks[i] == peaks[i]] or [start, start + 3]
            keep += sorted({min(real, key=peaks.__getitem__), max(real, key=peaks.__getitem__)})
        keep.append(len(peaks) - 1)
        for values in self.columns.values(): values[:] = array("d", [values[i] for i in keep])


def _number(value: object) -> float:
    "A finite number, or not a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300: return float("nan")
    return float(value)


class Clock:
    """Turns the wall times of a run's rows into seconds of training: pauses between attempts do not count."""

    def __init__(self) -> None: self.attempt, self.before, self.seconds = None, None, 0.0

    def __call__(self, row: dict) -> float:
        now, attempt = _number(row.get("time")), row.get("attempt")
        if now == now:
            if self.before is not None and attempt == self.attempt: self.seconds += max(0.0, now - self.before)
            self.before, self.attempt = now, attempt
        return self.seconds
