"""A model folder behind OpenAI's interface: Starlette and uvicorn in front, one thread with the engine behind.

Knows nothing of runs. The event loop reads and answers, the engine's thread writes; nothing else is shared."""
from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import hmac
import json
import queue
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_trainer.errors import BusyError, LLMTrainerError, UsageError
from llm_trainer.terminal import clean

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise UsageError("Serving needs two packages more.\nInstall them: pip install 'llm_trainer[serve]'") from None

from llm_trainer.generation import protocol
from llm_trainer.generation.engine import Engine, Request, Token
from llm_trainer.generation.protocol import Job, Model, RequestError, Teller

# Bytes of a request; seconds for it to arrive, and to be read; how many are read at a time; seconds for texts to end
# before the server
BODY, SLOW, READING, READERS, GRACE = 4 << 20, 60, 10, 4, 3
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _policy(page: str) -> str:
    "A content security policy under which only the page's own script and style run, and it talks to nobody else"
    def hashed(tag: str) -> str:
        inner = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
    return (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


PAGE_HEADERS = {"Content-Security-Policy": _policy(PAGE), "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


# The engine's thread -------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Waiter:
    "A job whose pieces the event loop waits for"
    job: Job
    loop: asyncio.AbstractEventLoop
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: deque[tuple[int, Token]] = field(default_factory=deque)  # Filled by the engine's thread
    failed: RequestError | None = None
    gone: bool = False  # The client hung up

    def __post_init__(self): self.open = len(self.job.texts)


class Writer(threading.Thread):
    """Steps the engine while there is something to write"""

    def __init__(self, engine: Engine, limit: int):
        super().__init__(name="engine", daemon=True)
        self.engine, self.limit = engine, limit  # Texts that may wait
        self.acts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.owners: dict[Request, tuple[Waiter, int]] = {}

    @property
    def waiting(self) -> int: return len(self.engine.waiting)

    def submit(self, waiter: Waiter) -> None:
        "Asks for the texts of a job; 429 where too many wait already"
        if self.waiting + len(waiter.job.texts) > self.limit:
            raise RequestError(f"{self.waiting} texts wait already. Try again in a moment.", 429, code="queue_full")
        self.acts.put(lambda: self._add(waiter))

    def drop(self, waiter: Waiter) -> None:
        "Stops writing the texts of a job"
        self.acts.put(lambda: self._drop(waiter))

    def stop(self) -> None:
        self.acts.put(None)
        self.join(GRACE)

    def run(self) -> None:
        while True:
            while not self.engine.busy or not self.acts.empty():
                if (act := self.acts.get()) is None: return
                act()
            try: self._hand_out(self.engine.step())
            except Exception as e: self._fail(e)

    def _add(self, waiter: Waiter) -> None:
        for i, request in enumerate(waiter.job.texts):
            self.owners[request] = waiter, i
            self.engine.add(request)

    def _drop(self, waiter: Waiter) -> None:
        for request in waiter.job.texts:
            if self.owners.pop(request, None): self.engine.drop(request)

    def _hand_out(self, pieces: list[tuple[Request, Token]]) -> None:
        "Gives each piece to its job and wakes, once a step, those that stream or are done"
        touched: dict[asyncio.AbstractEventLoop, dict[Waiter, None]] = {}
        for request, piece in pieces:
            waiter, i = self.owners[request]
            waiter.pieces.append((i, piece))
            if piece.finish:
                del self.owners[request]
                waiter.open -= 1
            if waiter.job.stream or not waiter.open: touched.setdefault(waiter.loop, {})[waiter] = None
        for loop, waiters in touched.items(): loop.call_soon_threadsafe(_wake, waiters)

    def _fail(self, error: Exception) -> None:
        "A step that can't be done ends what was being written, not the server"
        print(f"llm-trainer: {type(error).__name__}: {clean(str(error))[:500]}", file=sys.stderr, flush=True)
        failure = RequestError(f"The text could not be written: {type(error).__name__}.", 500)
        for request in self.engine.clear():
            if owner := self.owners.pop(request, None):
                owner[0].failed = failure
                owner[0].loop.call_soon_threadsafe(owner[0].news.set)


def _wake(waiters: dict[Waiter, None]) -> None:
    for waiter in waiters: waiter.news.set()


# What is read beside the event loop ----------------------------------------------------------------------------------

class Reading(threading.Thread):
    """Reads one request, which becomes its job in `told`. It can be ended: a chat template is a program of its own"""

    def __init__(self, read: Callable[[], Job], done: Callable[[], None]):
        super().__init__(name="reading", daemon=True)
        self.read, self.done, self.over, self.lock = read, done, False, threading.Lock()
        self.loop = asyncio.get_running_loop()
        self.told: asyncio.Future[Job] = self.loop.create_future()
        self.start()

    def run(self) -> None:
        tell, told = self.told.cancel, None
        try:
            try: tell, told = self.told.set_result, self.read()
            except SystemExit: raise
            except Exception as e: tell, told = self.told.set_exception, e
            except BaseException as e: tell, told = self.told.set_exception, RuntimeError(str(e))  # a library's panic
            with self.lock: self.over = True
        except SystemExit: pass  # as `end` wants it
        finally:
            with suppress(RuntimeError): self.loop.call_soon_threadsafe(self._close, tell, told)  # or the loop is gone

    def _close(self, tell: Callable, told: Any) -> None:
        self.done()
        if not self.told.done(): tell(told)

    def end(self) -> None:
        "Ends it at its next line of Python, in silence"
        with self.lock:
            if not self.over: ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident),
                                                                         ctypes.py_object(SystemExit))


# HTTP ----------------------------------------------------------------------------------------------------------------

class Server:
    """The routes, and what they share"""

    def __init__(self,
        model: Model,  # From `open_model`
        engine: Engine,  # From `open_model`
        key: str | None = None,  # What clients must send
        hosts: tuple[str, ...] | None = None,  # Names that it answers to; None: any
        queue: int = 256,  # Texts that may wait
        reading: float = READING,  # Seconds to read a request
    ):
        self.model, self.engine, self.key, self.hosts = model, engine, key, hosts
        self.reading, self.turns, self.coming = reading, asyncio.Semaphore(READERS), set()
        self.writer, self.created = Writer(engine, queue), int(time.time())
        pages = {"/": self.page, "/health": self.health, "/v1/models": self.models,
                "/v1/models/{id:path}": self.one_model}
        written = {"/v1/completions": protocol.completion, "/v1/chat/completions": protocol.chat}
        routes = [Route(path, self.guarded(answer), methods=["GET"]) for path, answer in pages.items()]
        routes += [Route(path, self.guarded(self.writes(read)), methods=["POST"]) for path, read in written.items()]
        faults = {RequestError: _say, LLMTrainerError: _say_ours, HTTPException: _say_http, Exception: _say_fault}
        self.app = Starlette(routes=routes, exception_handlers=faults, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app) -> AsyncIterator[None]:
        self.writer.start()
        yield
        await asyncio.to_thread(self.writer.stop)

    def turn_away(self) -> None:
        "Ends what is still arriving or being read, saying why"
        for task in self.coming: task.cancel()

    def cut(self) -> None:
        "Ends what is still being written, saying why"
        for waiter, _ in list(self.writer.owners.values()):
            waiter.failed = _stopping()
            waiter.news.set()

    # -- Who may ask --

    def guarded(self, endpoint: Callable) -> Callable:
        "The endpoint for those that may use it"
        async def answer(request):
            self.check(request)
            return await endpoint(request)
        return answer

    def check(self, request) -> None:
        "Refuses a page of another site that reaches us by a name of its own, and a client without the key"
        host = request.headers.get("host", "")
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        if self.hosts and name.lower() not in self.hosts:
            raise RequestError(f"This server answers to {' and '.join(self.hosts)}. "
                               "Behind another name it wants a key: --api-key.", 403, code="unknown_host")
        if self.key is None or not request.url.path.startswith("/v1/"): return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise RequestError("The API key is missing or wrong: Authorization: Bearer KEY.", 401,
                               code="invalid_api_key")

    # -- What is answered --

    async def page(self, request) -> Response: return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def health(self, request) -> Response:
        return JSONResponse({"status": "ok", "model": self.model.id, "reading": len(self.coming),
                             "writing": len(self.engine.rows), "waiting": self.writer.waiting})

    async def models(self, request) -> Response: return JSONResponse({"object": "list", "data": [self.card()]})

    async def one_model(self, request) -> Response:
        protocol._expect({"model": request.path_params["id"]}, self.model)
        return JSONResponse(self.card())

    def card(self) -> dict[str, Any]:
        return {"id": self.model.id, "object": "model", "created": self.created, "owned_by": "llm_trainer",
                "max_model_len": self.model.context, "chat": self.model.chat is not None}

    # -- What is written --

    def writes(self, read: Callable[[dict, Model, int], Job]) -> Callable:
        "The endpoint that answers with text"
        async def answer(request):
            async with self.in_time(): job = await self.job(read, await _body(request))
            waiter = Waiter(job, asyncio.get_running_loop())
            self.writer.submit(waiter)
            return Answer(waiter, self)
        return answer

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        "What is done here ends when the server does"
        task = asyncio.current_task()
        self.coming.add(task)
        try: yield
        except asyncio.CancelledError: raise _stopping() from None
        finally: self.coming.discard(task)

    async def job(self, read: Callable[[dict, Model, int], Job], data: bytes) -> Job:
        "What a body asks for, unless it takes too long to find out"
        reading = None
        try:
            async with asyncio.timeout(self.reading):
                await self.turns.acquire()
                try:
                    reading = Reading(lambda: read(protocol.parse(data), self.model, self.writer.limit),
                                      self.turns.release)
                except BaseException:  # no thread to be had
                    self.turns.release()
                    raise
                return await reading.told
        except TimeoutError:
            if not reading: raise RequestError("Others are being read. Try again in a moment.", 503) from None
            raise RequestError(f"This took longer than {self.reading:g} s to read, so it was given up. Send less; "
                               "of a conversation, the chat template may never come to an end.") from None
        finally:
            if reading: reading.end()


class Answer(Response):
    """The text of a job as it is written, or all of it; who hangs up sets its rows free"""

    def __init__(self, waiter: Waiter, server: Server):
        self.waiter, self.job, self.server, self.background = waiter, waiter.job, server, None
        self.teller = Teller(waiter.job, server.model.tokenizer)

    async def __call__(self, scope, receive, send) -> None:
        listening = asyncio.create_task(self._listen(receive))
        try: await (self._stream if self.job.stream else self._whole)(scope, receive, send)
        finally:
            listening.cancel()
            if self.waiter.open: self.server.writer.drop(self.waiter)

    async def _listen(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect": pass
        self.waiter.gone = True
        self.waiter.news.set()

    async def _news(self) -> AsyncIterator[list[tuple[int, Token]]]:
        "What was written since the last look, until all of it is"
        w = self.waiter
        while not w.gone:
            await w.news.wait()
            w.news.clear()
            done = not w.open  # looked at first: what comes later is for the next look
            pieces = [w.pieces.popleft() for _ in range(len(w.pieces))]
            if pieces: yield pieces
            if w.failed: raise w.failed
            if done: return

    async def _whole(self, scope, receive, send) -> None:
        found: list[list[Token]] = [[] for _ in self.job.texts]
        try:
            async for pieces in self._news():
                for i, piece in pieces: found[i].append(piece)
        except RequestError as e: return await JSONResponse(e.body(), e.status)(scope, receive, send)
        if self.waiter.gone: return
        await JSONResponse(self.teller.whole(found))(scope, receive, send)

    async def _stream(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for pieces in self._news():
                by_text: dict[int, list[Token]] = {}
                for i, piece in pieces: by_text.setdefault(i, []).append(piece)
                await _send(send, *(self.teller.chunk(i, part) for i, part in by_text.items()))
            if self.job.usage and not self.waiter.gone: await _send(send, self.teller.last())
        except RequestError as e: await _send(send, e.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _stopping() -> RequestError: return RequestError("The server is stopping.", 503)


async def _send(send, *chunks: dict[str, Any]) -> None:
    "Some chunks of a stream, in one write"
    data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    await send({"type": "http.response.body", "body": data.encode(), "more_body": True})


async def _body(request) -> bytes:
    "The body of a request, as far as it is JSON of a size that is taken, and arrives"
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("Send the body as Content-Type: application/json.", 415)
    data, large = bytearray(), RequestError(f"The body may have {BODY >> 20} MB.", 413)
    try:
        async with asyncio.timeout(SLOW):
            async for part in request.stream():
                data += part
                if len(data) > BODY: raise large
    except TimeoutError: raise RequestError(f"The body did not arrive within {SLOW} s.", 408) from None
    except ClientDisconnect: raise RequestError("The client left before its body had come.") from None
    return bytes(data)


async def _say(request, error: RequestError) -> Response:
    more = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"},
            429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, more)


async def _say_ours(request, error: LLMTrainerError) -> Response: return await _say(request, RequestError(str(error)))


async def _say_http(request, error: HTTPException) -> Response:
    what = {404: f"There is nothing at {request.url.path[:200]}",
            405: f"{request.method[:20]} is not for {request.url.path[:200]}"}
    return await _say(request, RequestError(f"{what.get(error.status_code, error.detail)}.", error.status_code))


async def _say_fault(request, error: Exception) -> Response:
    return await _say(request, RequestError(f"This is a fault of the server: {type(error).__name__}.", 500))


# The model and the socket --------------------------------------------------------------------------------------------

def open_model(
    folder: Path,  # A Hugging Face model folder
    id: str,  # What clients call it
    device: str = "auto",  # auto, cuda, mps or cpu
    prefer: str = "auto",  # From settings.ini, where `device` leaves it open
    rows: int = 32,  # Texts written at the same time
) -> tuple[Model, Engine]:
    "What is served"
    from llm_trainer.generation.sampler import load_for_generation
    model, tokenizer = load_for_generation(folder, device, prefer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UsageError(f"The tokenizer has {tokenizer.vocab_size} tokens, the model knows {model.vocab_size}; they "
                         "don't belong together. Use the tokenizer saved beside the model")
    known = Model(id, tokenizer, model.vocab_size, model.config.seq_len, _chat(folder, tokenizer.encode_marked))
    return known, Engine(model, tokenizer, rows, _memory(model.head.device))


def _memory(device) -> int:
    "Bytes that the cache of several texts may take: half of a GPU's free memory, or an eighth of main memory"
    import torch
    from llm_trainer.device import total_memory
    if device.type == "cuda": return torch.cuda.mem_get_info(device)[0] // 2
    return total_memory("cpu") // 8


def _chat(folder: Path, encode: Callable[[str], list[int]]) -> Callable[[list[dict]], list[int]] | None:
    "What makes tokens of a conversation, where the folder has a chat template"
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template: return None

    def tokens(messages: list[dict]) -> list[int]:
        try: text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as e:  # a template is a program of its own
            raise RequestError(f"The chat template refuses these messages: {clean(str(e))[:300]}",
                               param="messages") from None
        return encode(text)
    return tokens


def bind(
    host: str = "127.0.0.1",  # Who can reach it: this machine only, or 0.0.0.0 for all that reach this machine
    port: int = 8000,  # 0: any free one
) -> socket.socket:  # Not listening yet
    "The address to serve at, before the model is loaded: one that can't be had is refused at once"
    how = dict(type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try: family, kind, _, _, address = socket.getaddrinfo(host, port, **how)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"{clean(host, '')} is no address of this machine. Try --host 127.0.0.1") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: found.bind(address)
    except OSError as e:
        found.close()
        raise BusyError(f"{clean(host, '')}:{port} can't be had: {e.strerror}.\n"
                        f"Take another port: --port {port % 65535 + 1}, or any free one: --port 0") from None
    return found


class _Uvicorn(uvicorn.Server):
    "Says when it answers; before it ends, what is being written has some seconds"
    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[], None]):
        super().__init__(config)
        self.server, self.ready = server, ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets=None) -> None:
        self.server.turn_away()
        later = asyncio.get_running_loop().call_later(GRACE, self.server.cut)
        await super().shutdown(sockets)
        later.cancel()


def serve(
    model: Model,  # From `open_model`
    engine: Engine,  # From `open_model`
    listener: socket.socket,  # From `bind`
    key: str | None = None,  # What clients must send; None: nothing
    queue: int = 256,  # Texts that may wait
    ready: Callable[[str], None] = lambda url: None,  # Called with the address once it answers
) -> None:
    "Serve until a signal comes; a second one ends it at once"
    host, port = listener.getsockname()[:2]
    local = host.startswith("127.") or host == "::1"
    server = Server(model, engine, key, tuple(dict.fromkeys([*LOOPBACK, host])) if local and key is None else None,
                    queue)
    config = uvicorn.Config(server.app, log_level="error", access_log=False, timeout_graceful_shutdown=2 * GRACE,
                            server_header=False, lifespan="on", ws="none", h11_max_incomplete_event_size=64 << 10)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _Uvicorn(config, server, lambda: ready(url)).run([listener])
