"""What OpenAI's interface asks for and answers, as plain dicts: completions, chats, chunks of a stream, errors.

Knows nothing of HTTP, and of the model only its tokenizer and its context."""
from __future__ import annotations

import codecs
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from llm_trainer.errors import UsageError
from llm_trainer.generation.sampling import Sampling, is_number, is_text
from llm_trainer.generation.engine import Request, Token

MOST_TEXTS, MOST_STOPS, MOST_TOP = 128, 16, 20  # Texts of a prompt, stop strings, likely tokens in place of each
DECODER = codecs.getincrementaldecoder("utf-8")
FINISH = {"eot": "stop", "stop": "stop", "length": "length"}
OWN = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram", "ignore_eot", "truncate")
SHARED = ("model", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "n", "stream",
          "stream_options", "logprobs", "logit_bias", "max_tokens", *OWN)
UNHEEDED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention")
COMPLETION = (*SHARED, "prompt", "echo", "best_of", "suffix")
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
        "functions", "function_call", "parallel_tool_calls", "modalities", "audio", "prediction", "reasoning_effort",
        "web_search_options")
EMPTY = {"logit_bias": {}, "suffix": "", "tools": [], "functions": [], "tool_choice": "none", "function_call": "none",
         "response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "prediction": None,
         "web_search_options": None, "parallel_tool_calls": None,
         "reasoning_effort": None}  # All that is taken of these


class RequestError(UsageError):
    """A request that can't be fulfilled, and the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        "The error as OpenAI's clients read it"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# Reading a request ---------------------------------------------------------------------------------------------------

def parse(data: bytes) -> dict[str, Any]:
    "The JSON object of a request's body"
    try:
        body = json.loads(data)
        whole = is_text(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError): body = None
    if not isinstance(body, dict): raise RequestError("The body must be one JSON object.")
    if not whole:
        raise RequestError("The body holds half of a surrogate pair, as \\ud800 is one: it stands for no character. "
                           "Send both halves, or the character itself.")
    return {key: value for key, value in body.items() if value is not None}


def _whole(x) -> bool: return isinstance(x, int) and not isinstance(x, bool)


def _text(x) -> bool: return isinstance(x, str)


def _switch(x) -> bool: return isinstance(x, bool)


def take(body: dict, name: str, test: Callable[[Any], bool], what: str, default: Any = None) -> Any:
    "A value of the body that must be `what`; `default` where it isn't given"
    if name not in body: return default
    if not test(body[name]): raise RequestError(f"{name} must be {what}.", param=name)
    return body[name]


def _number(body: dict, name: str, low: int, high: int, default: int | None) -> int | None:
    return take(body, name, lambda x: _whole(x) and low <= x <= high, f"a whole number from {low:,} to {high:,}",
                default)


def _texts(body: dict, prompts: int, most: int) -> int:
    "How many texts each of `prompts` is to get"
    n = _number(body, "n", 1, MOST_TEXTS, 1)
    if n * prompts > most: raise RequestError(f"One request asks for at most {most} texts here.", param="n")
    return n


def _known(body: dict, names: tuple[str, ...]) -> None:
    "Refuses what would change the text if it were heeded"
    for name in body:
        if name not in names and name not in UNHEEDED:
            raise RequestError(f"Unknown field {name[:80]!r}; known: {', '.join(sorted(names))}.", param=name[:80])
        if name in EMPTY and body[name] != EMPTY[name]:
            raise RequestError(f"{name} is not supported here; leave it out.", param=name)


def _sampling(body: dict, tokens: int, logprobs: bool) -> Sampling:
    "The knobs of a request"
    stop = take(body, "stop", lambda x: _text(x) or isinstance(x, list) and all(map(_text, x)) and len(x) <= MOST_STOPS,
                f"a string or a list of at most {MOST_STOPS}", [])
    stop = tuple(s for s in ([stop] if _text(stop) else stop) if s)
    real = {name: take(body, name, is_number, "a number") for name in
            ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty")}
    whole = {name: take(body, name, _whole, "a whole number") for name in ("top_k", "no_repeat_ngram", "seed")}
    more = {"ignore_eot": take(body, "ignore_eot", _switch, "true or false"),
            "truncate": take(body, "truncate", _text, "text")}
    given = {name: value for name, value in {**real, **whole, **more}.items() if value is not None}
    try: return Sampling(max_new_tokens=max(1, tokens), stop=stop, logprobs=logprobs, **{"temperature": 1.0, **given})
    except UsageError as e:
        raise RequestError(str(e), param=str(e).partition(" ")[0]) from None


@dataclass
class Job:
    "A request as it came, and the texts that it asks for"
    kind: str  # text_completion or chat.completion
    model: str
    texts: list[Request]
    per_prompt: int  # n: texts of each prompt
    stream: bool = False
    usage: bool = False  # A last chunk of the stream says how many tokens there were
    echo: bool = False
    logprobs: bool = False
    prompts: list[str] = field(default_factory=list)  # Each prompt as text
    begins: list[tuple[int, tuple]] = field(default_factory=list)  # Where in it what is read begins: `_begin`
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Model:
    "What the interface has to know of a model"
    id: str
    tokenizer: Any
    vocab_size: int
    context: int
    chat: Callable[[list[dict]], list[int]] | None = None  # The tokens of a conversation, where there is a template


def _expect(body: dict, model: Model) -> None:
    "Refuses a request that is meant for another model"
    name = take(body, "model", _text, "text", model.id)
    if name != model.id:
        raise RequestError(f"There is no model {name[:200]!r} here; this server has {model.id!r}.", 404, "model",
                           "model_not_found")


def _requests(model: Model, prompts: list[list[int]], n: int, sampling: Sampling, limit: int, **more) -> list[Request]:
    "`n` texts for each prompt, whose seeds count up as those of `generate --num-samples`"
    if sampling.top_k > model.vocab_size:
        raise RequestError(f"top_k must be at most {model.vocab_size}, the tokens of the vocabulary.", param="top_k")
    found = []
    for ids in prompts:
        if len(ids) > model.context and sampling.truncate == "error":
            raise RequestError(f"The prompt has {len(ids):,} tokens, the model reads {model.context:,}. "
                               'Shorten it, or send "truncate": "left" to drop its beginning.', param="prompt",
                               code="context_length_exceeded")
        for i in range(n):
            own = replace(sampling, seed=sampling.seed_of(i))
            found.append(Request(ids[-model.context:], own, limit=limit, **more))
    return found


def _stream(body: dict) -> dict[str, bool]:
    "Whether to stream, and whether to say the usage then"
    stream = take(body, "stream", _switch, "true or false", False)
    options = take(body, "stream_options", lambda x: isinstance(x, dict), "an object", {})
    usage = take(options, "include_usage", lambda x: x is None or _switch(x), "true or false", False)
    if "stream_options" in body and not stream:
        raise RequestError("stream_options is for streams; send stream: true with it.", param="stream_options")
    return {"stream": stream, "usage": bool(usage)}


def _ids(x) -> bool: return isinstance(x, list) and all(map(_whole, x))


def _given(body: dict) -> list:
    "The prompts of a completion as they came: one or a list of them, each a string or a list of tokens"
    given = body.get("prompt", "")
    if _text(given) or given and _ids(given): given = [given]
    if not isinstance(given, list) or not given or not all(_text(p) or _ids(p) for p in given):
        raise RequestError("prompt must be text, a list of texts, a list of token ids, or a list of such lists.",
                           param="prompt")
    return given


def _prompts(given: list, model: Model) -> tuple[list[list[int]], list[str]]:
    "The prompts of a completion, as tokens and as text"
    size = model.tokenizer.vocab_size
    if any(not 0 <= i < size for p in given if not _text(p) for i in p):
        raise RequestError(f"A token id is from 0 to {size - 1:,} here.", param="prompt")
    ids = [model.tokenizer.encode_prompt(p) if _text(p) else p for p in given]
    texts = [p if _text(p) else model.tokenizer.decode(p) for p in given]
    return [i or [model.tokenizer.eot_id] for i in ids], texts  # nothing: as at the beginning of a document


def _begin(cut: list[int], tokenizer) -> tuple[int, tuple]:
    "Where a text goes on behind the tokens that were `cut` off it, and the bytes of a character that ends there"
    decoder = DECODER("replace")
    return len(decoder.decode(b"".join(map(tokenizer.token_bytes, cut)))), decoder.getstate()


def completion(
    body: dict[str, Any],  # From `parse`
    model: Model,
    most: int = 256,  # Texts of one request
) -> Job:
    "What a body for /v1/completions asks for"
    _expect(body, model)
    _known(body, COMPLETION)
    given, top = _given(body), _number(body, "logprobs", 0, MOST_TOP, None)
    n = _texts(body, len(given), most)
    if body.get("best_of", n) != n:
        raise RequestError("best_of is not supported here; n gives that many texts.", param="best_of")
    limit = _number(body, "max_tokens", 0, 1_000_000, 16)
    echo = take(body, "echo", _switch, "true or false", False)
    sampling = _sampling(body, limit, top is not None)
    prompts, texts = _prompts(given, model)
    requests = _requests(model, prompts, n, sampling, limit, top=top or 0, score=echo and top is not None)
    begins = [_begin(ids[:len(ids) - len(r.ids)], model.tokenizer) for ids, r in zip(prompts, requests[::n])]
    return Job("text_completion", model.id, requests, n, echo=echo, logprobs=top is not None, prompts=texts,
               begins=begins, **_stream(body))


def chat(body: dict[str, Any], model: Model, most: int = 256) -> Job:
    "What a body for /v1/chat/completions asks for"
    _expect(body, model)
    if model.chat is None:
        raise RequestError(f"{model.id} has no chat template, so it knows no turns of a conversation. "
                           "Use /v1/completions, which continues a text.", code="no_chat_template")
    _known(body, CHAT)
    n, logprobs = _texts(body, 1, most), take(body, "logprobs", _switch, "true or false", False)
    top = _number(body, "top_logprobs", 0, MOST_TOP, 0)
    if top and not logprobs:
        raise RequestError("top_logprobs is for log-probabilities; send logprobs: true with it.", param="top_logprobs")
    ids = model.chat(_messages(body))
    room = max(16, model.context - len(ids))
    older = _number(body, "max_tokens", 1, 1_000_000, room)
    limit = _number(body, "max_completion_tokens", 1, 1_000_000, None) or older
    requests = _requests(model, [ids], n, _sampling(body, limit, logprobs), limit, top=top)
    return Job("chat.completion", model.id, requests, n, logprobs=logprobs, **_stream(body))


WORDS = (_text, "text")
# What a message may hold, which is all that a chat template reads; its parts; its calls of tools: key → test, and what
# passes it
TURN = {"role": WORDS, "content": (lambda x: _text(x) or isinstance(x, list), "text or a list of parts"), "name": WORDS,
        "tool_calls": (lambda x: isinstance(x, list), "a list"), "tool_call_id": WORDS, "reasoning_content": WORDS}
PART = {"type": (lambda x: x == "text", '"text"; others than text are not read here'), "text": WORDS}
CALL = {"index": (lambda x: isinstance(x, int), "a number"), "id": WORDS,
        "type": (lambda x: x == "function", '"function"'), "function": (lambda x: isinstance(x, dict), "an object")}
FUNCTION = {"name": WORDS, "arguments": (lambda x: _text(x) or isinstance(x, dict), "text or an object")}


def _object(given: Any, known: dict[str, tuple], where: str, *needed: str) -> dict[str, Any]:
    "What an object inside a request says; an empty value says nothing where it isn't needed"
    if not isinstance(given, dict): raise RequestError(f"{where} must be an object.", param=where)
    nothing = (None, "", [], {})
    for name in [*given, *needed]:
        value, at = given.get(name), f"{where}.{name[:80]}"
        if value in nothing and name not in needed: continue
        if name not in known:
            raise RequestError(f"{at} is not read here; what is: {', '.join(sorted(known))}.", param=at)
        test, what = known[name]
        if not test(value): raise RequestError(f"{at} must be {what}.", param=at)
    return {name: given[name] for name in known if name in needed or given.get(name) not in nothing}


def _messages(body: dict) -> list[dict[str, Any]]:
    "The turns of a conversation, as a chat template reads them"
    turns = take(body, "messages", lambda x: isinstance(x, list) and x, "a list of at least one message")
    if not turns: raise RequestError("messages must be a list of at least one message.", param="messages")
    return [_turn(turn, f"messages[{i}]") for i, turn in enumerate(turns)]


def _turn(given: Any, where: str) -> dict[str, Any]:
    "One of them: its parts joined, its calls of tools in place of a text"
    needed = ("role",) if isinstance(given, dict) and given.get("tool_calls") else ("role", "content")
    turn = {"content": "", **_object(given, TURN, where, *needed)}
    if not _text(turn["content"]):
        turn["content"] = "".join(_object(part, PART, f"{where}.content[{i}]", *PART)["text"]
                                  for i, part in enumerate(turn["content"]))
    if "tool_calls" in turn:
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(turn["tool_calls"])]
    return turn


def _call(given: Any, where: str) -> dict[str, Any]:
    "A call of a tool; its arguments, which OpenAI's clients send as JSON in a text, as the object that they are"
    call = _object(given, CALL, where, "type", "function")
    function = _object(call["function"], FUNCTION, f"{where}.function", "name")
    try: read = json.loads(function.get("arguments", "{}"))
    except (TypeError, ValueError, RecursionError): read = None
    return {**call, "function": {**function, **({"arguments": read} if isinstance(read, dict) else {})}}


# Answering it --------------------------------------------------------------------------------------------------------

def spelled(data: bytes) -> str:
    "A token as text; bytes that are none by themselves the way OpenAI writes them"
    try: return data.decode()
    except UnicodeDecodeError: return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _cost(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0


class Teller:
    "Makes the answers of one job: chunks of a stream as the pieces come, or all of it at the end"

    def __init__(self, job: Job, tokenizer):
        self.job, self.tokenizer, self.chats = job, tokenizer, job.kind == "chat.completion"
        self.offsets, self.decoders, self.begun = [], [DECODER("replace") for _ in job.texts], set()
        for i, decoder in enumerate(() if self.chats else self.decoders):
            begin, bytes = job.begins[i // job.per_prompt]
            if job.echo: decoder.setstate(bytes)
            self.offsets.append(begin if job.echo else len(job.prompts[i // job.per_prompt]))

    @property
    def head(self) -> dict[str, Any]:
        kind = self.job.kind + (".chunk" if self.chats and self.job.stream else "")
        return {"id": f"{'chatcmpl' if self.chats else 'cmpl'}-{self.job.id}", "object": kind,
                "created": self.job.created, "model": self.job.model}

    def usage(self) -> dict[str, int]:
        "How many tokens were read and written"
        read = sum(len(r.ids) for r in self.job.texts[::self.job.per_prompt])
        written = sum(r.written for r in self.job.texts)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self, pieces: list[list[Token]]) -> dict[str, Any]:
        "The answer to a job that doesn't stream: `pieces` of each text"
        return {**self.head, "choices": [self._choice(i, found) for i, found in enumerate(pieces)],
                "usage": self.usage()}

    def chunk(self, i: int, pieces: list[Token]) -> dict[str, Any]:
        "The part of a stream that brings `pieces` of text `i`"
        return {**self.head, "choices": [self._choice(i, pieces)], **({"usage": None} if self.job.usage else {})}

    def last(self) -> dict[str, Any]:
        "The part of a stream that says what it used"
        return {**self.head, "choices": [], "usage": self.usage()}

    def _choice(self, i: int, pieces: list[Token]) -> dict[str, Any]:
        text, first = "".join(p.text for p in pieces), i not in self.begun
        self.begun.add(i)
        tokens = [p for p in pieces if p.token is not None]
        if first and self.job.echo:
            text, tokens = self.job.prompts[i // self.job.per_prompt] + text, [*self._prompt(i), *tokens]
        finish = FINISH.get(pieces[-1].finish) if pieces else None
        choice = {"index": i, "finish_reason": finish, "logprobs": self._logprobs(i, tokens) if self.job.logprobs
                  else None}
        if not self.chats: return {**choice, "text": text}
        if not self.job.stream: return {**choice, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**choice, "delta": {**({"role": "assistant"} if first else {}),
                                    **({"content": text} if text or first else {})}}

    def _prompt(self, i: int) -> Iterator[Token]:
        "The tokens of the prompt of text `i`; nothing is known of the first"
        request = self.job.texts[i]
        return [Token("", request.ids[0]), *request.scores]

    def _logprobs(self, i: int, tokens: list[Token]) -> dict[str, Any]:
        def name(id): return spelled(self.tokenizer.token_bytes(id))
        if self.chats:
            return {"content": [{**self._entry(p.token, p.logprob), "top_logprobs": [self._entry(*t) for t in p.top]}
                                           for p in tokens], "refusal": None}
        offsets = []
        for p in tokens:
            offsets.append(self.offsets[i])
            self.offsets[i] += len(self.decoders[i].decode(self.tokenizer.token_bytes(p.token)))
        tops = []
        for p in tokens:
            found: dict[str, float] = {}
            for id, cost in ((*p.top, (p.token, p.logprob)) if p.logprob is not None else ()):
                found.setdefault(name(id), _cost(cost))
            tops.append(found or None)
        return {"tokens": [name(p.token) for p in tokens], "token_logprobs": [_cost(p.logprob) for p in tokens],
                "top_logprobs": tops if self.job.texts[i].top else None, "text_offset": offsets}

    def _entry(self, id: int, cost: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(id)
        return {"token": spelled(data), "logprob": _cost(cost), "bytes": list(data)}
