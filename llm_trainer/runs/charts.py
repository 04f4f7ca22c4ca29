"""Curves as pictures made from numbers: SVG for a page, characters for a terminal. Knows nothing of runs and files."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from llm_trainer.terminal import clean, count, duration

COLOURS = ("#1f6feb", "#b35900", "#1a7f37", "#a40e26")  # each at least 4.5:1 on white
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
SIGNS = "*o+x"


@dataclass(frozen=True)
class Curve:
    "One line of a picture"
    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    marks: bool = False  # Each point is shown: they are few, and each was measured on its own
    tag: str = ""  # A letter at its end, so that colour is not needed to tell it apart


def points(curve: Curve, most: int, log: bool = False) -> list[tuple[float, float]]:
    "The points that can be drawn, at most about `most`: of many, the lowest and the highest of each stretch"
    good = [(x, y) for x, y in zip(curve.xs, curve.ys) if _finite(x) and _finite(y) and (not log or y > 0)]
    if len(good) <= most: return good
    size, kept = ceil(2 * len(good) / most), []
    for start in range(0, len(good), size):
        block = range(start, min(start + size, len(good)))
        kept += sorted({min(block, key=lambda i: good[i][1]), max(block, key=lambda i: good[i][1])})
    return [good[i] for i in sorted({*kept, len(good) - 1})]


def _finite(value) -> bool: return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def ticks(low: float, high: float, most: int) -> list[float]:
    "Round values between `low` and `high`, at most about `most`"
    if not high > low: return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** floor(log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999999)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)][:64]


@dataclass(frozen=True)
class Frame:
    "The range of the numbers that are drawn, and where each lies in it"
    left: float
    right: float
    low: float
    high: float
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        "Where a point lies, both from 0 to 1; 1 is right, and up"
        height = (self._scaled(y) - self._scaled(self.low)) / ((self._scaled(self.high) - self._scaled(self.low)) or 1)
        return (x - self.left) / ((self.right - self.left) or 1), height

    def _scaled(self, y: float) -> float: return log10(y) if self.log else y

    def heights(self, most: int) -> list[float]:
        "The values that are written beside the picture"
        if not self.log: return ticks(self.low, self.high, most)
        round_ones = [n * 10.0 ** power for power in range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
                      for n in (1, 2, 5)]
        found = [y for y in round_ones if self.low <= y <= self.high]
        return found if 2 <= len(found) <= 2 * most else [self.low, self.high]


def frame(drawn: Iterable[list[tuple[float, float]]], log: bool) -> Frame | None:
    "The frame around all points; None where there are none"
    xs, ys = zip(*[point for each in drawn for point in each]) if any(drawn := list(drawn)) else ((), ())
    if not xs: return None
    low, high = min(ys), max(ys)
    if low == high: low, high = (low * 0.9, high * 1.1 or 1.0) if low >= 0 else (low * 1.1, high * 0.9)
    return Frame(min(xs), max(xs), low, high, log)


def short(value: float) -> str:
    "A number beside an axis: `12.5k`, `0.003`, `2e-05`"
    return count(float(value)) if abs(value) >= 1000 else f"{value:.3g}"


NUMBERS: dict[str, Callable[[float], str]] = {"time": duration}  # axes whose numbers are no plain ones


# A page --------------------------------------------------------------------------------------------------------------

def svg(
    curves: list[Curve],
    title: str,  # What it shows; read aloud in place of the picture, and shown with it
    x: str = "step",  # Name of the axis at the bottom
    y: str = "loss",  # Name of the axis at the left
    log: bool = False,  # The axis at the left is logarithmic
) -> str:  # An <svg> element without scripts and outside references; nothing where there is nothing to draw
    "A picture of `curves` for a page"
    drawn = [points(curve, 700, log) for curve in curves]
    box = frame(drawn, log)
    if box is None: return ""
    wide, high, left, top, bottom = 720, 260, 56, 24, 36
    def place(at: tuple[float, float]) -> tuple[float, float]:
        across, up = box.at(*at)
        return left + across * (wide - left - 12), high - bottom - up * (high - top - bottom)
    name = NUMBERS.get(x, short)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img" '
             f'aria-label="{_text(title)}">',
             f"<title>{_text(title)}</title>"]
    for value in box.heights(5):
        at = place((box.left, value))[1]
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{wide - 12}"/>'
                     f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_text(short(value))}</text>')
    for value in ticks(box.left, box.right, 7):
        at = place((value, box.low))[0]
        parts.append(f'<text x="{at:.1f}" y="{high - bottom + 16}" text-anchor="middle">{_text(name(value))}</text>')
    for i, (curve, found) in enumerate(zip(curves, drawn)):
        colour, spots = COLOURS[i % len(COLOURS)], [place(at) for at in found]
        line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots) if spots else ""
        if line:
            parts.append(f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{2 if curve.marks else 1.2}"/>')
        if curve.marks: parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in spots]
        key = f"{'● ' if curve.marks else '— '}{_text(curve.label)}"
        parts.append(f'<text x="{left + 8 + i * 150}" y="14" fill="{colour}">{key}</text>')
    return "".join([*parts, f'<text x="{wide - 12}" y="{high - 4}" text-anchor="end">{_text(x)}</text>',
                    f'<text x="{left}" y="{high - 4}">{_text(y)}{" (logarithmic)" if log else ""}</text></svg>'])


def _text(value: str) -> str: return escape(clean(value, ""))


# A terminal ----------------------------------------------------------------------------------------------------------

def plot(
    curves: list[Curve],
    x: str = "step",  # Name of the axis at the bottom
    y: str = "loss",  # Name of the axis at the left
    log: bool = False,  # The axis at the left is logarithmic
    width: int = 72,  # Columns of the whole
    height: int = 16,  # Lines of the whole
    braille: bool = True,  # Eight dots a character; else ASCII
    paint: Callable[[str, int], str] = lambda text, i: text,  # Gives what belongs to curve `i` its colour
) -> str:
    "A picture of `curves` in characters: each line has its colour or its sign, single measurements a mark of their own"
    inside, rows = max(10, width - 9), max(3, height - 3)
    drawn = [points(curve, 4 * inside, log) for curve in curves]
    box = frame(drawn, log)
    if box is None: return "There are no numbers to draw yet."
    cells: list[list[tuple[int, int] | None]] = [[None] * inside for _ in range(rows)]  # (curve, dots or a character)
    for i, (curve, found) in enumerate(zip(curves, drawn)):
        fine = braille and not curve.marks
        across, down = (2 * inside, 4 * rows) if fine else (inside, rows)
        for column, row in _line([box.at(*at) for at in found], across, down, joined=not curve.marks):
            if not fine:
                cells[row][column] = i, ord("•" if braille else SIGNS[i % len(SIGNS)])
                continue
            there = cells[row // 4][column // 2]
            dots = there[1] & 0xff if there and there[1] >= 0x2800 else 0
            cells[row // 4][column // 2] = i, 0x2800 | dots | DOTS[row % 4][column % 2]
    for i, (curve, found) in enumerate(zip(curves, drawn)):
        if curve.tag and found:
            across, up = box.at(*found[-1])
            cells[min(rows - 1, round((1 - up) * (rows - 1)))][min(inside - 1,
                                                                   round(across * (inside - 1)))] = i, ord(curve.tag)
    side = {min(rows - 1, round((1 - box.at(box.left, v)[1]) * (rows - 1))): short(v)
            for v in box.heights(max(3, rows // 2))}
    bar, corner = ("│", "└") if braille else ("|", "+")
    lines = ["  ".join(paint(f"{_sign(curve, i, braille)} {clean(curve.label, '')}", i) for i,
                       curve in enumerate(curves))
             + f"   {y}{', logarithmic' if log else ''}"]
    lines += [f"{side.get(n, ''):>7} {bar}" + "".join(" " if c is None else paint(chr(c[1]), c[0])
                                                      for c in row).rstrip()
              for n, row in enumerate(cells)]
    lines.append(f"{'':>7} {corner}{('─' if braille else '-') * inside}")
    first, last = (NUMBERS.get(x, short)(v) for v in (box.left, box.right))
    return "\n".join([*lines, f"{'':>9}{first}{x:^{max(1, inside - len(first) - len(last))}}{last}"])


def _sign(curve: Curve, i: int, braille: bool) -> str:
    if curve.tag: return curve.tag
    return ("•" if curve.marks else "⠒") if braille else SIGNS[i % len(SIGNS)]


def _line(spots: list[tuple[float, float]], across: int, down: int, joined: bool) -> set[tuple[int, int]]:
    "The (column, row) pairs that a line through `spots` touches; only the spots where it is not joined"
    found, before = set(), None
    for x, y in spots:
        at = min(across - 1, round(x * (across - 1))), min(down - 1, round((1 - y) * (down - 1)))
        steps = max(abs(at[0] - before[0]), abs(at[1] - before[1]), 1) if joined and before else 1
        begin = before if joined and before else at
        found |= {(round(begin[0] + (at[0] - begin[0]) * n / steps), round(begin[1] + (at[1] - begin[1]) * n / steps))
                  for n in range(steps + 1)}
        before = at
    return found
