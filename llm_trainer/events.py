"""What a run reports while it prepares and trains: small frozen records, known by their `kind`. Knows no listener."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

from llm_trainer.terminal import clean


class Event:
    "Something that happened; `kind`, its class in lower case, names it in files and handlers"
    kind: ClassVar[str] = "event"

    def __init_subclass__(cls): cls.kind = cls.__name__.lower()


Emit = Callable[[Event], None]  # takes each event at the moment it happens


def print_notes(event: Event) -> None:
    "The default listener: remarks go to standard error, everything else is left out"
    if isinstance(event, Note): print(clean(event.message), file=sys.stderr, flush=True)


def silent(event: Event) -> None:
    "A listener that keeps everything to itself"


@dataclass(frozen=True)
class Phase(Event):
    "What the run is busy with: reading, downloading, tokenizing, compiling, training, evaluating, saving, sampling"
    name: str


@dataclass(frozen=True)
class Note(Event):
    "Something worth a line in the log"
    message: str


@dataclass(frozen=True)
class Progress(Event):
    "How far something long has come: `done` of `total` (0: nobody knows)"
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Waiting(Event):
    "The device is busy; these runs come first"
    runs: list[str]


@dataclass(frozen=True)
class Stopping(Event):
    "A request to stop was seen; the run ends at its next step"
    message: str


@dataclass(frozen=True)
class Prepared(Event):
    "Everything is resolved and built; `meta` describes it for the run's record"
    meta: dict


@dataclass(frozen=True)
class Joined(Event):
    "All processes of a run on several devices are there: the rank, host, pid and device of each"
    ranks: list[dict]


@dataclass(frozen=True)
class Step(Event):
    "One optimizer step; `loss` and `grad_norm` are None where it isn't logged, the speed is the last one measured"
    step: int
    epoch: float
    tokens: int
    lr: float
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    eta_seconds: float | None = None
    # of several ranks: how long a step takes each by itself, without waiting for others
    rank_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluated(Event):
    "The validation set was read once, whole (or `eval_batches` of it)"
    step: int
    epoch: float
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    parts: tuple[tuple[str, float], ...] = ()  # Of a mix: the name and loss of each text


@dataclass(frozen=True)
class Saved(Event):
    "A checkpoint is complete and on disk at `path`"
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Sampled(Event):
    "The model continued `prompt`"
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Skipped(Event):
    "The step was left out because `what` was not finite; `count` such steps so far"
    step: int
    what: str
    count: int


@dataclass(frozen=True)
class Finished(Event):
    "The last event: `completed`, `stopped`, `diverged` or `failed`, and why"
    status: str
    code: str | None = None
    message: str | None = None


def packed(event: Event) -> bytes:
    "An event as JSON, for another process"
    return json.dumps({"kind": event.kind, **asdict(event)}, default=str).encode()  # type: ignore[call-overload]


def unpacked(data: bytes) -> Event:
    "What `packed` made; ValueError for anything else"
    fields = json.loads(data)
    try: return {kind.kind: kind for kind in Event.__subclasses__()}[fields.pop("kind")](**fields)
    except (KeyError, TypeError, AttributeError): raise ValueError("these bytes are no event") from None
