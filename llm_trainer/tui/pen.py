"""Fewer bytes for the same picture: a colour is sent when it changes, not again with every piece of text."""
from __future__ import annotations

import re

PEN = re.compile(r"\x1b\[([\d;]*)m")
SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_].*?\x1b\\|.)", re.DOTALL)
ERASES = re.compile(r"\x1b\[[0-?]*[JKXLMPS@T]")  # these fill cells with the background
PLAIN = ("39", "49", frozenset())
DRAWN_ON_BLANKS = {"4", "5", "7", "9", "21", "53"}  # underline, blink, reverse, strike, double underline, overline
OFF = {"22": {"1", "2"}, "23": {"3"}, "24": {"4", "21"}, "25": {"5", "6"}, "27": {"7"}, "28": {"8"}, "29": {"9"}, "55": {"53"}}

Pen = tuple[str, str, frozenset[str]]  # foreground, background, the rest


def change(pen: Pen, codes: str) -> Pen | None:
    "`pen` after a sequence with these codes; None where it holds one we don't know"
    front, back, rest = pen
    given = (codes or "0").split(";")
    while given:
        code = given.pop(0) or "0"
        if code in ("38", "48"):
            size = {"5": 2, "2": 4}.get(given[0] if given else "", 0)
            if not size or len(given) < size: return None
            color, given = ";".join([code, *given[:size]]), given[size:]
            front, back = (color, back) if code == "38" else (front, color)
        elif code == "0": front, back, rest = PLAIN
        elif code in OFF: rest -= OFF[code]
        elif re.fullmatch("3[0-79]|9[0-7]", code): front = code
        elif re.fullmatch("4[0-79]|10[0-7]", code): back = code
        elif re.fullmatch("[1-9]|21|53", code): rest |= {code}
        else: return None
    return front, back, rest


def between(shown: Pen, wanted: Pen) -> str:
    "The shortest way from one pen to the other"
    if wanted == PLAIN: return "\x1b[0m"
    if shown[2] - wanted[2]: shown, start = PLAIN, ["0"]
    else: start = []
    codes = start + sorted(wanted[2] - shown[2]) + [new for old, new in zip(shown[:2], wanted[:2]) if old != new]
    return f"\x1b[{';'.join(codes)}m"


def terse(data: str) -> str:
    "The same cells in fewer bytes; starts from and ends with a terminal that draws plainly"
    shown = wanted = PLAIN
    out, pieces = [], PEN.split(data)
    for i, piece in enumerate(pieces):
        if i % 2:
            pen = change(wanted, piece)
            if pen is None: return data
            wanted = pen
        elif piece:
            text = SEQUENCE.sub("", piece).strip("\r\n")
            if (text or ERASES.search(piece)) and wanted != shown:
                invisible = not text.strip(" ") and wanted[1] == shown[1] and not (wanted[2] | shown[2]) & DRAWN_ON_BLANKS
                if not invisible: out.append(between(shown, wanted)); shown = wanted
            out.append(piece)
    if shown != PLAIN: out.append("\x1b[0m")
    return "".join(out)
