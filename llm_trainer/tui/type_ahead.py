"""Keys in the order they were typed: the next one waits until what the last one did, like opening a dialog, is done."""
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from textual import events
from textual.app import App
from textual.message_pump import MessagePump

MOST = 1.0  # seconds that one part of the app may take over a key before the next key is given out all the same


class TypeAhead:
    """Over a slow line several keys come at once. Textual gives all of them to what has the focus when they come, so
    what is typed ahead of a dialog would go to the screen below it."""

    def __init__(self, app: App, deliver: Callable[[events.Event], Awaitable[None]]):
        self.app, self.deliver = app, deliver
        self.waiting: deque[events.Event] = deque()
        self.task: asyncio.Task | None = None

    def put(self, event: events.Event, first: bool = False) -> None:
        "Take in a key; `first` for one that stands for the key that is being handled"
        (self.waiting.appendleft if first else self.waiting.append)(event)
        if self.task is None or self.task.done(): self.task = asyncio.create_task(self._give_out())

    async def _give_out(self) -> None:
        while self.waiting:
            event, target = self.waiting.popleft(), self.app.focused or self.app.screen
            try: await self.deliver(event)
            except Exception as error: self.app._handle_exception(error)
            for node in (*target.ancestors_with_self, self.app, self.app.screen, self.app): await self._heard(node)

    @staticmethod
    async def _heard(node: MessagePump) -> None:
        "Wait until a part of the app has handled all that it was sent"
        done = asyncio.Event()
        if not node.is_running or not node.call_later(done.set): return
        with suppress(TimeoutError): await asyncio.wait_for(done.wait(), MOST)

    def close(self) -> None:
        self.waiting.clear()
        if self.task is not None: self.task.cancel()
