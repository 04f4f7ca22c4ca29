"""How things look in a terminal: bars and braille lines, and their ASCII twins."""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter

from llm_trainer.terminal import clean


def line(text: object, width: int = 0) -> str:
    "Text from a run as one clean line, cut to `width` cells with an ellipsis"
    text = " ".join(clean("" if text is None else str(text), keep="").split())
    return text if not width or len(text) <= width else text[:max(0, width - 1)] + "…"


def name(text: object, width: int) -> str:
    "A name cut to `width` cells in its middle: what tells names apart is often at their end"
    text = line(text)
    if len(text) <= width or width < 4: return line(text, width)
    end = (width - 1) // 2
    return f"{text[:width - 1 - end]}…{text[-end:]}"


def bar(fraction: float | None, width: int) -> tuple[str, str]:
    "The done and the open part of a progress bar"
    if fraction is None: return "", "─" * width
    halves = round(min(1.0, max(0.0, fraction)) * width * 2)
    done = "━" * (halves // 2) + ("╸" if halves % 2 else "")
    return done, "─" * (width - len(done))


def steps(n: float | None) -> str: return "–" if n is None else f"{int(n):,}"


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def braille(values: Sequence[float | None], width: int, height: int = 1, floor: float | None = None) -> list[str]:
    """`height` lines of `width` braille cells with a line through `values`, from `floor` (default: the
    lowest) to the highest; empty lines for fewer than two"""
    points = [v for v in values if v is not None and v == v and abs(v) != float("inf")]
    if len(points) < 2: return [" " * width] * height
    low, high = min(points) if floor is None else floor, max(points)
    rows, columns = 4 * height, 2 * width
    def level(v): return rows - 1 - round((v - low) / ((high - low) or 1) * (rows - 1)) if high > low else rows // 2
    grid, before = [[0] * width for _ in range(height)], None
    for x in range(columns):
        y = level(points[round(x * (len(points) - 1) / (columns - 1))])
        for row in range(min(y, before if before is not None else y), max(y, before if before is not None else y) + 1):
            if row == before and row != y: continue
            grid[row // 4][x // 2] |= _DOTS[row % 4][x % 2]
        before = y
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in cells) for cells in grid]


_ASCII = str.maketrans({
    "●": "*", "○": "o", "✓": "+", "■": "=", "‖": "|", "✗": "x", "∞": "~", "━": "=", "╸": "-", "╺": "-", "─": "-",
    "│": "|", "┃": "|", "┤": "+", "├": "+", "┼": "+", "┴": "+", "┬": "+", "┌": "+", "┐": "+", "└": "+", "┘": "+",
    "╭": "+", "╮": "+", "╰": "+", "╯": "+", "║": "|", "═": "=", "▁": "_", "▂": "_", "▃": ".", "▄": "-", "▅": "-",
    "▆": "=", "▇": "=", "█": "#", "▔": "-", "▀": "-", "▌": "|", "▐": "|", "▎": "|", "▏": "|", "▊": "|", "▕": "|",
    "…": ".", "·": ".", "–": "-", "—": "-", "→": ">", "←": "<", "↑": "^", "↓": "v", "▲": "^", "▼": "v", "▶": ">",
    "▸": ">", "◆": "#", "★": "*", "⏎": "E", "␣": "_", "×": "x", "•": "*", "“": '"', "”": '"', "’": "'", "⭘": "o"})


@lru_cache(4096)
def to_ascii(text: str) -> str:
    "`text` with every character that is not ASCII replaced by one that looks alike and is as wide"
    from rich.cells import cell_len
    out = []
    for char in text.translate(_ASCII):
        if "\u2800" <= char <= "\u28ff":
            dots = ord(char) - 0x2800
            top, bottom = dots & 0b00011011, dots & 0b11100100
            char = ":" if top and bottom else "'" if top else "." if bottom else " "
        out.append(char if char < "\x7f" else "?" * cell_len(char))
    return "".join(out)


PLAIN = Style(bold=False)  # for segments that come with none: Textual's NO_COLOR filter can't take those


class Border(LineFilter):
    """What every line passes on its way out: no control byte leaves, and in ASCII mode nothing but ASCII."""

    def __init__(self, ascii_only: bool = False):
        super().__init__()
        self.ascii_only = ascii_only

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [segment if segment.control or (segment.style and segment.text.isascii() and segment.text.isprintable())
                else Segment(self.text(segment.text), segment.style or PLAIN) for segment in segments]

    def text(self, text: str) -> str:
        text = clean(text, keep="")
        return to_ascii(text) if self.ascii_only else text
