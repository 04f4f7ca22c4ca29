"""Every knob of sampling in one place: its name, its default, its bounds. The command line, the watcher's form, the
notebook and the server take them from here. It knows no tensor, so a face may ask it without loading torch; `filters`
says what each does."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from llm_trainer.errors import UsageError

INF = float("inf")


def text_only(text: str, what: str) -> str:
    "`text`, if it is text throughout: a tokenizer would read something else in place of a stray byte"
    if not isinstance(text, str): raise UsageError(f"{what} must be text (a str), not {_shown(text)}.")
    try: text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no valid UTF-8: character {error.start + 1} is a stray byte. A tokenizer "
                         "reads text only; convert the file first, for example with iconv.") from None
    return text


def is_text(x: object) -> bool:
    "Whether `x` is text throughout"
    try: return text_only(x, "it") == x
    except UsageError: return False


def is_number(x: object) -> bool:
    "Whether `x` is a number that can be computed with"
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _shown(x: object) -> str:
    "`x` for a message, not all of it where it is long"
    try: return f"{x!r:.60}"
    except ValueError: return "something too long to show"


@dataclass(frozen=True)
class Sampling:
    "How to write: every knob, checked when made; raises `UsageError`"
    # Choosing tokens
    temperature: float = 0.8  # 0 always takes the likeliest token; above 1 is wilder
    top_k: int = 0  # Only the K likeliest tokens; 0 is off
    top_p: float = 1.0  # Only the likeliest tokens that reach this probability together; 1 is off
    min_p: float = 0.0  # Only tokens of at least this share of the likeliest one's probability; 0 is off
    typical_p: float = 1.0  # Only tokens of typical surprise, up to this probability; 1 is off
    repetition_penalty: float = 1.0  # Above 1 discourages tokens that occurred, the prompt's too
    presence_penalty: float = 0.0  # Taken off the logit of each token written already
    frequency_penalty: float = 0.0  # The same, times how often it was written
    no_repeat_ngram: int = 0  # No sequence of this many tokens twice; 0 is off
    beams: int = 1  # Above 1: beam search, which neither samples nor streams
    seed: int | None = None  # The same seed, the same text (default: another text each time)
    # How much
    max_new_tokens: int = 200  # At most this many tokens
    stop: tuple[str, ...] = ()  # End before this text
    ignore_eot: bool = False  # Write on past the end of a document
    truncate: Literal["error", "left"] = "error"  # A prompt longer than the context: refuse it, or cut its beginning
    # Beside the text
    logprobs: bool = False  # Also give the log-probability of each token

    def __post_init__(self):
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, Iterable) else stop)
        for name, (fits, what) in BOUNDS.items():
            if not fits(value := getattr(self, name)): raise UsageError(f"{name} must be {what}, not {_shown(value)}.")

    def seed_of(self, i: int) -> int | None:
        "The seed of text `i` of several: they count up, and behind the largest one from 0"
        return None if self.seed is None else self.seed + i - 2**63 * (self.seed + i >= 2**63)

    @property
    def greedy(self) -> bool: return self.temperature == 0

    @property
    def looks_back(self) -> bool:
        "Whether a filter needs to know what was written"
        counts = self.presence_penalty or self.frequency_penalty
        return bool(self.repetition_penalty != 1 or counts or self.no_repeat_ngram)


def _whole(low: float, high: float = INF) -> Callable[[object], bool]:
    "Takes whole numbers from `low` to `high`"
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _number(test: Callable[[float], bool]) -> Callable[[object], bool]:
    "Takes numbers that pass `test`"
    return lambda x: is_number(x) and test(x)


def _switch(x: object) -> bool: return isinstance(x, bool)


_SEED = _whole(1 - 2**63, 2**63 - 1)
_SHARE = _number(lambda x: 0 < x <= 1)
BOUNDS: dict[str, tuple[Callable, str]] = {
    "max_new_tokens": (_whole(1, 1_000_000), "a whole number from 1 to 1,000,000"),
    "beams": (_whole(1, 1_000), "a whole number from 1 to 1,000"),
    "top_k": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "no_repeat_ngram": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "seed": (lambda x: x is None or _SEED(x), "a whole number of at most 63 bits"),
    "temperature": (_number(lambda x: x >= 0), "0 (the best token each time) or above"),
    "top_p": (_SHARE, "above 0 and at most 1 (1 is off)"),
    "typical_p": (_SHARE, "above 0 and at most 1 (1 is off)"),
    "min_p": (_number(lambda x: 0 <= x <= 1), "from 0 (off) to 1"),
    "repetition_penalty": (_number(lambda x: x > 0), "above 0 (1 is off)"),
    "presence_penalty": (is_number, "a finite number (0 is off)"),
    "frequency_penalty": (is_number, "a finite number (0 is off)"),
    "truncate": (lambda x: x in ("error", "left"), "'error' or 'left'"),
    "stop": (lambda x: isinstance(x, tuple) and all(is_text(s) and s for s in x), "text, or several that aren't empty"),
    "ignore_eot": (_switch, "true or false"),
    "logprobs": (_switch, "true or false"),
}
