"""A run in a notebook: `watch` it live, `compare` several, list all `runs`. A part is loaded when it is asked for."""
from __future__ import annotations

from importlib import import_module

PARTS = {"figure": ("picture", "png", "line"), "words": ("safe", "headline", "quote"), "view": ("watch", "Watch"),
         "tables": ("compare", "runs")}
__all__ = [name for names in PARTS.values() for name in names]


def __getattr__(name: str):
    for part, names in PARTS.items():
        if name in names: return getattr(import_module(f"{__name__}.{part}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
