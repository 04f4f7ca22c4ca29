"""Text for a terminal: cleaning what came from data, and short forms of numbers. Knows nothing of runs."""
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str, keep: str = "\n\t") -> str:
    "`text` without escape sequences, control bytes, direction overrides, lone surrogates; `keep`: which of \\n\\t stay"
    text = _CONTROL.sub("", _SEQUENCE.sub("", str(text)))
    for char in "\n\t":
        if char not in keep: text = text.replace(char, " ")
    return text


def inert(json: str) -> str:
    "JSON text with every character that commands a terminal written as \\u and its number: the same JSON"
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json)


def quoted(name: str | os.PathLike) -> str:
    "A path for a shell, in characters that can be shown: those that can't are written as $'\\x1b'"
    plain = shlex.quote(name := os.fspath(name))
    if clean(plain, "") == plain: return plain
    def shown(c): return c not in "'\\" and clean(c, "") == c
    def encoded(c): return c.encode(errors="surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass")
    return "$'" + "".join(c if shown(c) else "".join(f"\\x{b:02x}" for b in encoded(c)) for c in name) + "'"


def literal(text: str) -> str:
    "`text` in Markdown, as it is: cleaned, its signs not markup"
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", lambda found: f"&#{ord(found[0])};", clean(text, ""))


def sparkline(values: Sequence[float | None], width: int = 12) -> str:
    "A line of `width` bars that shows how `values` went; empty for fewer than two"
    points = [v for v in values if v is not None]
    if len(points) < 2: return ""
    if len(points) > width:
        cuts = [i * len(points) // width for i in range(width + 1)]
        points = [sum(points[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, high = min(points), max(points)
    return "".join("▁▂▃▄▅▆▇█"[int((v - low) / ((high - low) or 1) * 7)] for v in points)


def duration(seconds: float | None) -> str:
    "`3725` → `1h02m`; a dash when it is not known"
    if seconds is None: return "–"
    seconds = int(seconds)
    if seconds < 60: return f"{seconds}s"
    if seconds < 3600: return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400: return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def count(n: float | None) -> str:
    "`1234567` → `1.23M`"
    if n is None: return "–"
    digits = float(f"{n:.3g}")  # rounded here and nowhere else
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(digits) >= size: return f"{digits / size:.3g}{unit}"
    return f"{n:.3g}" if isinstance(n, float) else str(n)


def number(value: float | None, digits: int = 4) -> str:
    "A loss or a like figure: fixed digits where they fit, powers of ten elsewhere, a dash where it is not known"
    if value is None or value != value: return "–"
    return f"{value:.{digits}f}" if 10 ** -digits <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def fixed(value: float, digits: int, mark: str = "") -> str:
    "`1234.50`, with `mark` between thousands; a number that would fill lines in powers of ten"
    return f"{value:{mark}.{digits}f}" if abs(value) < 1e12 else f"{value:.3e}"


def size(n: float | None) -> str:
    "`1234567` → `1.2 MB`"
    if n is None: return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000: return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
