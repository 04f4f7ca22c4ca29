"""The numbers of one run, read as they are written and kept small, and what is drawn of them. Knows no screen."""
from __future__ import annotations

import math
import os
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.runs.run import Run
from llm_trainer.system.files import open_regular, parse

TRAIN = ("step", "tokens", "time", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes")
VAL = ("step", "tokens", "time", "loss", "perplexity", "bits_per_byte")
AXES = ("step", "tokens", "time")  # what a curve can be drawn against; time is in seconds of training
SMOOTH = {"smooth": 0.012, "smoother": 0.04, "raw only": 0.0}  # reach of the mean, in parts of the width


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

    def __init__(self) -> None:
        self.attempt, self.seconds = None, 0.0
        self.before: float | None = None

    def __call__(self, row: dict) -> float:
        now, attempt = _number(row.get("time")), row.get("attempt")
        if now == now:
            if self.before is not None and attempt == self.attempt: self.seconds += max(0.0, now - self.before)
            self.before, self.attempt = now, attempt
        return self.seconds


class Curves:
    """The metrics of one run as two series. One thread may poll while another draws.

    A file of many megabytes takes seconds to read. The first look is a sample of its lines; those that follow read all
    of it, a part at a time, behind the sample."""

    def __init__(self, run: Run, limit: int = 100_000):
        self.run, self.lock, self._limit = run, threading.Lock(), limit
        self.train, self.val = Series(TRAIN, limit), Series(VAL, limit)
        self._follower, self._clock, self._older = run.follow(), Clock(), 0
        self._whole: tuple[Series, Series] | None = None

    @property
    def version(self) -> int:
        "Another number whenever there is something new to draw"
        return self._older + self.train.version + self.val.version

    @property
    def reading(self) -> bool:
        "Whether what is here is only a sample of what was written"
        return self._whole is not None

    def poll(self, most: float = 1.0) -> bool:
        "Take in the new rows, for `most` seconds at a time; False when there were none"
        before, until = self.version, time.monotonic() + most
        if not before and self._whole is None and (lines := sample(self._follower.path)):
            with self.lock: self._fill(filter(None, map(parse, lines)), self.train, self.val, Clock())
            self._whole = Series(TRAIN, self._limit), Series(VAL, self._limit)
            return True
        while rows := self._follower.poll():
            with self.lock: self._fill(rows, *(self._whole or (self.train, self.val)), self._clock)
            if time.monotonic() > until: return self.reading or self.version != before
        if self._whole is not None:
            with self.lock:
                self._older, (self.train, self.val), self._whole = self.version + 1, self._whole, None
        return self.version != before

    @staticmethod
    def _fill(rows: Iterable[dict[str, Any]], train: Series, val: Series, clock: Clock) -> None:
        for row in rows:
            series = {"train": train, "val": val}.get(str(row.get("kind")))
            if series is not None: series.append({**row, "time": clock(row)})

    def add(self, row: dict[str, Any]) -> None: self._fill([row], self.train, self.val, self._clock)

    def arrays(self, kind: str, *names: str) -> list[np.ndarray]:
        "Columns of the `train` or `val` series, taken while no row is being added"
        with self.lock:
            series = getattr(self, kind)
            return [np.array(series[name]) for name in names]

    def losses(self, kind: str, x: str, per_byte: bool = False) -> list[np.ndarray]:
        """Places and losses: nats per token, or bits per byte, which compares between tokenizers. Training losses
        are converted at the ratio of the two that the last validation had"""
        if not per_byte: return self.arrays(kind, x, "loss")
        if kind == "val": return self.arrays(kind, x, "bits_per_byte")
        places, losses = self.arrays(kind, x, "loss")
        return [places, losses * (self.val.last("bits_per_byte") or math.nan) / (self.val.last("loss") or math.nan)]


# bytes of a metrics file: from where on it is sampled, and up to where it is looked through
MANY, MOST = 4 << 20, 64 << 20


def sample(path: Path, lines: int = 3000) -> list[bytes]:
    "Some lines of a big file, evenly spread, with every validation and the last line; none of a small one"
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < MANY: return []
            if size > MOST: return [_line_at(file, round(i * size / lines)) for i in range(lines)]
            found = file.read(MOST).split(b"\n")
    except OSError: return []
    step = max(1, len(found) // lines)
    return [line for i, line in enumerate(found) if i % step == 0 or i > len(found) - 3 or b'"val"' in line[:60]]


def _line_at(file, place: int) -> bytes:
    "The first whole line behind `place`"
    file.seek(place)
    if place: file.readline(1 << 16)
    return file.readline(1 << 16)


@dataclass(frozen=True)
class Columns:
    """A curve reduced to one entry per column of a picture that has points."""
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


def columns(x: np.ndarray, y: np.ndarray, left: float, right: float, width: int, smoothing: float = 0.0) -> Columns:
    """The points between `left` and `right` as `width` columns, each with its lowest, highest and mean value.
    `smoothing` is the reach of `smooth`, as a share of the width"""
    good = np.isfinite(x) & np.isfinite(y) & (x >= left) & (x <= right)
    x, y = x[good], y[good]
    empty = np.empty(0)
    if not len(x) or right <= left or width < 1: return Columns(empty, empty, empty, empty)
    place = np.minimum(((x - left) * width / (right - left)).astype(int), width - 1)
    starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
    used, size = place[starts], np.diff(np.r_[starts, len(y)])
    low, high, total = (how.reduceat(y, starts) for how in (np.minimum, np.maximum, np.add))
    mean = total / size
    if smoothing and len(used) > 2:
        whole, weight = np.full(width, np.nan), np.zeros(width)
        whole[used], weight[used] = mean, size
        mean = smooth(whole, smoothing * width, weight)[used]
    return Columns(np.add.reduceat(x, starts) / size, low, high, mean)


def smooth(y: np.ndarray, reach: float, weight: np.ndarray | None = None) -> np.ndarray:
    """The mean of each value and its neighbours, weighted by a bell curve that reaches as far left as right, so the
    line neither lags nor starts low. `reach` is its width, in values; what is not a number is left out"""
    there = np.isfinite(y)
    weight = np.where(there, 1.0 if weight is None else weight, 0.0)
    size = max(1, round(3 * reach))
    bell = np.exp(-0.5 * (np.arange(-size, size + 1) / max(reach, 0.5)) ** 2)
    def spread(values): return np.convolve(np.pad(values, size), bell, "valid")
    total, gathered = spread(np.where(there, y, 0.0) * weight), spread(weight)
    return np.divide(total, gathered, out=np.full(len(y), np.nan), where=gathered > 0)


def thin(y: np.ndarray, points: int = 1500) -> np.ndarray:
    "Which of many points to draw, as rising indices: the lowest and the highest of each stretch, and the newest"
    size = math.ceil(2 * len(y) / points)
    if size <= 2: return np.arange(len(y))
    whole = len(y) // size * size
    blocks, start = y[:whole].reshape(-1, size), np.arange(0, whole, size)
    low = np.where(np.isnan(blocks), np.inf, blocks).argmin(1) + start
    high = np.where(np.isnan(blocks), -np.inf, blocks).argmax(1) + start
    rows = np.sort(np.concatenate([low, high, np.arange(whole, len(y)), [len(y) - 1]]))
    return rows[np.r_[True, rows[1:] != rows[:-1]]]
