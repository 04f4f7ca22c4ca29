"""One warm child process that writes text: it loads torch, the watcher does not. JSON lines both ways."""
from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_trainer.runs.launch import environment
from llm_trainer.workspace import Workspace

LINE = 1 << 22  # bytes of one answer at most


class Generator:
    """Starts `generate_server` on a checkpoint with the first request and keeps it until another one is wanted."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.process: asyncio.subprocess.Process | None = None
        self.folder: Path | None = None
        self.number = 0
        self._errors, self._listener = b"", None

    @property
    def alive(self) -> bool: return self.process is not None and self.process.returncode is None

    async def start(self, folder: Path) -> None:
        "Have a process for this checkpoint, an old one if there is"
        if self.alive and self.folder == folder: return
        await self.close()
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "llm_trainer.generation.child", str(folder), stdin=pipe, stdout=pipe,
            stderr=pipe, cwd=self.workspace.root, limit=LINE, start_new_session=True, env=environment(self.workspace))
        self.folder, self._errors = folder, b""
        self._listener = asyncio.create_task(self._listen(self.process))

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        "Keep the end of what the process says on its error stream"
        while chunk := await process.stderr.read(4096): self._errors = (self._errors + chunk)[-4000:]

    async def ask(self, folder: Path, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        "Send one request and give its answers as they come; the last one holds `finish` or `error`"
        await self.start(folder)
        process, self.number = self.process, self.number + 1
        number = self.number
        try:
            await self._send({"id": number, **request})
            while text := await process.stdout.readline():
                answer = None
                with suppress(ValueError): answer = json.loads(text)
                if not isinstance(answer, dict) or answer.get("id", number) not in (number, None): continue
                yield answer
                if "error" in answer or answer.get("finish"): return
        except (OSError, ValueError) as problem: self._errors += f"\n{problem}".encode()
        await self.close()
        last = [text for text in self._errors.decode("utf-8", "replace").splitlines() if text.strip()]
        yield {"error": f"The generating process ended (exit code {process.returncode}). {last[-1] if last else ''}"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        await self.process.stdin.drain()

    async def cancel(self) -> None:
        "Stop the text that is being written; the process stays warm"
        if self.alive:
            with suppress(OSError): await self._send({"cancel": self.number})

    async def close(self) -> None:
        "End the process: its input closes, and if that does not help it is killed"
        process, self.process = self.process, None
        if process is None: return
        with suppress(OSError): process.stdin.close()
        try: await asyncio.wait_for(process.wait(), 0.5)
        except TimeoutError:
            with suppress(ProcessLookupError): process.kill()
            await process.wait()
        if self._listener: await self._listener
