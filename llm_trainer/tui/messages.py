"""What the parts of the watcher tell each other, on one page."""
from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from llm_trainer.tui.readers import RunNews, RunRow


@dataclass
class RunsRead(Message):
    """The workspace was read; rows of every run, newest first."""
    rows: list[RunRow]
    problem: str = ""


@dataclass
class RunRead(Message):
    """The run on the screen was read; what is new since the last time."""
    news: RunNews


@dataclass
class CurvesRead(Message):
    """The marked runs were read; the plot has something new to draw."""
    rows: list[RunRow]
