"""Which runs, in which order: `--filter "status=running, val_loss<2"` and `--sort val_loss`. Knows no screen.
An expression is FIELD, one of = != < <= > >= ~ (contains), and a value; several, joined by commas, must all hold."""
from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from llm_trainer.errors import UsageError
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import State
from llm_trainer.terminal import clean

FACTS = {  # what a list of runs can also be asked for, from meta.json and notes.txt
    "parameters": lambda run, meta: meta.get("parameters"),
    "train_tokens": lambda run, meta: _dict(meta.get("data")).get("train_tokens"),
    "note": lambda run, meta: " ".join(run.notes().split()),
    "created": lambda run, meta: str(meta.get("created_at") or "")[:19]}
TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b, ">=": lambda a, b: a >= b, "~": lambda a, b: str(b) in str(a)}
TERM = re.compile(r"\s*([A-Za-z][\w-]*)\s*(<=|>=|!=|==|=|<|>|~)\s*(.*?)\s*", re.S)


def _dict(value) -> dict: return value if isinstance(value, dict) else {}


def fields_of(
    run: Run,
    state: State,  # As `run.status()` tells it
) -> dict[str, Any]:  # Field → value
    "The fields of one run that can be filtered or sorted by"
    meta = run.meta
    config = {name: value for group in _dict(meta.get("config")).values() for name, value in _dict(group).items()}
    return {**{name: read(run, meta) for name, read in FACTS.items()}, **config, "parameters": meta.get("parameters"),
            **vars(state)}


def terms(
    expressions: list[str],  # `val_loss<2, status=running`
) -> list[tuple[str, str, Any]]:  # (field, operator, value)
    "The tests of an expression; UsageError with an example if it can't be read"
    found = []
    for text in (part for each in expressions for part in each.split(",") if part.strip()):
        match = TERM.fullmatch(text)
        if not match or not match[3]: raise UsageError(
            f"--filter can't read {clean(text, '')!r}: it takes FIELD, one of = != < <= > >= ~, and a value.\n"
            'For example: llm-trainer runs --filter "status=completed, val_loss<2"')
        sign = "=" if match[2] == "==" else match[2]
        found.append((match[1].replace("-", "_"), sign, value_of(match[3])))
    return found


def value_of(text: str) -> Any:
    "`2` and `1e-3` are numbers, true, false and none what they say, all else is text in small letters"
    word = text.strip("'\"").lower()
    if word in ("true", "false", "none"): return {"true": True, "false": False, "none": None}[word]
    try: return float(word)
    except ValueError: return word


def _kept(value: Any, sign: str, wanted: Any) -> bool:
    "Does a value pass a test? What is missing only equals `none`; text and numbers are never compared in size"
    if isinstance(value, str):
        value, wanted = value.lower(), wanted if isinstance(wanted, str) or wanted is None else _spelt(wanted)
    if sign in ("=", "!="): return (value == wanted) == (sign == "=")
    if sign == "~":
        return value is not None and TESTS[sign](value, wanted if isinstance(wanted, str) else _spelt(wanted))
    alike = any(isinstance(value, kind) and isinstance(wanted, kind) for kind in (int | float, str))
    return alike and TESTS[sign](value, wanted)


def _spelt(value) -> str: return f"{value:g}" if isinstance(value, float) else str(value).lower()


def choose(
    runs: list[Run],  # Newest first
    filters: list[str] = [],  # Expressions that must all hold
    sort: str | None = None,  # A field, smallest first; None: as they come
    reverse: bool = False,  # Largest first
) -> list[State]:  # Their states
    "The states of the runs that pass, in the order wanted; runs without the field come last"
    asked = terms(filters)
    key = sort and sort.strip().replace("-", "_")
    states = [(run, run.status()) for run in runs]
    if not asked and not key: return [state for _, state in (reversed(states) if reverse else states)]
    rows = [(fields_of(run, state), state) for run, state in states]
    known = {name for fields, _ in rows for name in fields}
    for name in filter(None, [*(name for name, _, _ in asked), key]):
        if rows and name not in known: raise UsageError(_unknown(name, known))
    rows = [(fields, state) for fields, state in rows if all(_kept(fields.get(name), sign, value) for name, sign,
                                                             value in asked)]
    if key:
        there = [row for row in rows if _orders(row[0].get(key))]
        there.sort(key=lambda row: (isinstance(row[0][key], str), row[0][key]), reverse=reverse)
        rows = there + [row for row in rows if not _orders(row[0].get(key))]
    return [state for _, state in rows]


def _orders(value) -> bool: return isinstance(value, int | float | str) and value == value


def _unknown(name: str, known: set[str]) -> str:
    near = get_close_matches(name, known, 3, 0.5)
    return (f"Runs have no field {clean(name, '')[:60]}." + (f" Did you mean {' or '.join(near)}?" if near else "")
            + "\nFields are the keys of llm-trainer runs --json, every setting, and " + ", ".join(FACTS) + ".")
