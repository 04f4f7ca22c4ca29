"""Many texts written at once: a request joins the others at the next token, one that is done or unwanted makes room.

Knows nothing of HTTP and of threads. Rows share one cache, aligned at their ends as in a left-padded batch."""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from llm_trainer.generation.filters import uniforms
from llm_trainer.generation.sampling import Sampling
from llm_trainer.generation.kernels import fast_step, recorded, step_weights
from llm_trainer.model.transformer import GPT, KVCache
from llm_trainer.generation.sampler import PLANLESS, Piece, TextStream, choose_tokens, pad_left, window_start

AT_ONCE = 8192  # tokens of prompts read by one pass


@dataclass(frozen=True)
class Token(Piece):
    "A piece with the tokens that were likely in its place: (id, log-probability), the likeliest first"
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    "One text that is to be written, and how far it is"
    ids: list[int]  # The prompt, at least one token and at most the model's context
    sampling: Sampling  # The knobs; its seed is this text's
    top: int = 0  # How many likely tokens to give with each one
    score: bool = False  # Also give what the tokens of the prompt cost, as `scores`
    limit: int | None = None  # Tokens to write at most; None: as the knobs say; 0: only score
    tokens: list[int] = field(default_factory=list)  # Prompt and text
    scores: list[Token] = field(default_factory=list)  # One for each token of the prompt but the first
    read: int = 0  # How many of the newest tokens the cache holds

    def __post_init__(self):
        if self.limit is None: self.limit = self.sampling.max_new_tokens
        self.tokens, self.stream = list(self.ids), TextStream(self.sampling.stop)
        self.knobs = replace(self.sampling, max_new_tokens=1, stop=(), seed=None, truncate="error", ignore_eot=False)

    def number(self) -> float:
        "The random number that chooses the next token"
        if self.written == 0: self._random = uniforms([self.sampling.seed], self.sampling.max_new_tokens)[:, 0]
        return self._random[self.written].item()

    @property
    def written(self) -> int: return len(self.tokens) - len(self.ids)


class Engine:
    """Writes the texts of many requests, a token of each at every `step`"""

    def __init__(self,
        model: GPT,  # In evaluation mode
        tokenizer,  # Its tokenizer
        rows: int = 32,  # Texts written at the same time
        memory: int = 1 << 30,  # Bytes for the cache of several texts; one alone gets what it needs
    ):
        self.model, self.tokenizer, self.most, self.context = model, tokenizer, rows, model.config.seq_len
        c, w = model.config, model.head
        self.places = memory // (2 * c.n_layer * c.n_kv_head * c.head_size * w.element_size())
        self.rows: list[Request] = []
        self.ends = frozenset(tokenizer.ends)
        self.waiting: deque[Request] = deque()
        self.cache, self.length, self.steps = None, 0, {}
        with torch.inference_mode(): self.weights = step_weights(model)

    @property
    def busy(self) -> bool: return bool(self.rows or self.waiting)

    def add(self, request: Request) -> None:
        "Queues a request; it joins at the next step that has room for it"
        self.waiting.append(request)

    @torch.inference_mode()
    def drop(self, request: Request) -> None:
        "Forgets a request that nobody wants any more, wherever it is"
        if request in self.waiting: self.waiting.remove(request)
        if request in self.rows: self._leave(request)

    def clear(self) -> list[Request]:
        "Forgets all requests and the cache, and says which they were"
        gone = [*self.rows, *self.waiting]
        self.rows, self.waiting, self.cache, self.steps = [], deque(), None, {}
        return gone

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Piece]]:
        "Writes one token of every text that has its turn; what was added, in the order of the rows"
        new, again = self._admit(), [r for r in self.rows if r.read == self.context]  # their windows move on
        scored = [(going, self._next())] if (going := [r for r in self.rows if r.read < self.context]) else []
        self.rows += new
        scored += [(rows, self._read(rows)) for rows in self._passes(again + new)]
        pieces = [piece for rows, logits in scored for piece in self._write(rows, logits)]
        for request, piece in pieces:
            if piece.finish: self._leave(request)
        return pieces

    # -- Who is written --

    def _admit(self) -> list[Request]:
        "The requests that join now: in order, while there are rows and memory"
        joined = []
        while self.waiting and len(self.rows) + len(joined) < self.most:
            rows = [*self.rows, *joined, self.waiting[0]]
            if len(rows) > 1 and math.prod(self._wanted(rows)) > self.places: break
            joined.append(self.waiting.popleft())
        if joined: self._make_room([*self.rows, *joined])
        return joined

    def _wanted(self, rows: list[Request]) -> tuple[int, int]:
        "Rows and places of a cache for `rows`: some more places than needed, so that the texts seldom have to be moved"
        need = max(min(self.context, len(r.ids) + r.limit) for r in rows)
        return 1 << (len(rows) - 1).bit_length(), need + max(16, need // 4)

    def _make_room(self, rows: list[Request]) -> None:
        "A cache that holds `rows`"
        wanted, had = self._wanted(rows), _shape(self.cache)
        if all(w <= h for w, h in zip(wanted, had)): return
        larger = tuple(map(max, wanted, had))
        batch, size = wanted if math.prod(larger) > self.places else larger
        old, device = self.cache, self.model.head.device
        padding = torch.zeros(batch, dtype=torch.long, device=device)
        self.cache, self.steps = KVCache(self.model, batch, size, padding, static=self.model.head.is_cuda), {}
        if self.rows: self._move(old, max(r.read for r in self.rows))

    def _leave(self, request: Request) -> None:
        "Takes a row out; the last one moves into its place"
        i, last, end = self.rows.index(request), len(self.rows) - 1, self.length
        mover = self.rows[last]
        if i < last:
            kv = self.cache.kv[:, :, :, :, end-mover.read:end]
            kv[:, :, i] = kv[:, :, last]
            self.cache.padding[i] = self.cache.padding[last]
        self.rows[i] = mover
        self.rows.pop()
        if len(self.rows) == 1: self._move(self.cache, self.rows[0].read)  # alone, it is written as `generate` would

    # -- The cache --

    def _move(self, source: KVCache, length: int) -> None:
        "Puts what `source` holds so that the newest token of each row is at place `length - 1`"
        n, b, end = max(r.read for r in self.rows), len(self.rows), self.length
        if n and (source is not self.cache or length != end):
            for old, new in zip(source.kv, self.cache.kv):
                new[:, :b, :, length-n:length] = old[:, :b, :, end-n:end].clone()
        self.length = length
        for i, r in enumerate(self.rows): self.cache.padding[i] = length - r.read

    def _next(self) -> Tensor:
        "The scores after one more token of each row whose window has room for it (B, V)"
        if self.length == self.cache.size: self._move(self.cache, max(r.read for r in self.rows))
        b, static = len(self.rows), self.cache.position is not None
        width = 1 << (b - 1).bit_length() if static else b
        tokens = torch.tensor([r.tokens[-1:] for r in self.rows] + [[0]] * (width - b)).to(self.model.head.device)
        going = [i for i, r in enumerate(self.rows) if r.read < self.context]
        for i in set(range(width)).difference(going):
            self.cache.padding[i] = self.length  # what is not used looks at nothing
        view, step = self._step(width, tokens)
        view.length = self.length
        if static: self.cache.position.fill_(self.length)
        logits = step(tokens)
        self.length += 1
        for i in going: self.rows[i].read += 1
        return logits if len(going) == width else logits[going]

    def _step(self, b: int, tokens: Tensor):
        "The first `b` rows of the cache, and what reads one token of each"
        if b not in self.steps:
            view = copy(self.cache)
            view.kv, view.length = self.cache.kv[:, :, :b], self.length
            view.padding = self.cache.padding[:b] if b > 1 else None
            step = fast_step(self.model, view, self.weights)
            if view.position is not None:
                view.position.fill_(self.length)
                step = recorded(step, view, tokens)
            self.steps[b] = view, step
        return self.steps[b]

    def _passes(self, rows: list[Request]) -> Iterator[list[Request]]:
        "`rows` in groups small enough to be read at once"
        group, widest = [], 0
        for r in rows:
            widest = max(widest, min(len(r.tokens), self.context))
            if group and widest * (len(group) + 1) > AT_ONCE:
                yield group
                group, widest = [], min(len(r.tokens), self.context)
            group.append(r)
        if group: yield group

    def _read(self, rows: list[Request]) -> Tensor:
        "Reads what `rows` have so far into the cache: the scores of what follows (B, V)"
        model, device = self.model, self.model.head.device
        windows = [r.tokens[window_start(len(r.tokens), self.context):] for r in rows]
        tokens, padding = pad_left(windows)
        n = tokens.shape[1]
        cache = KVCache(model, len(rows), n, padding.to(device) if len(rows) > 1 else None)
        with sdpa_kernel(PLANLESS) if model.head.is_cuda else nullcontext():
            hidden = model.hidden(tokens.to(device), cache)
        for r in rows: r.read = 0
        here = max(r.read for r in self.rows)
        if self.length < n or self.length > 2 * max(here, n) or here == 0: self._move(self.cache, max(here, n))
        for row, (r, window) in enumerate(zip(rows, windows)):
            i, r.read = self.rows.index(r), len(window)
            self.cache.kv[:, :, i, :, self.length-r.read:self.length] = cache.kv[:, :, row, :, n-r.read:]
            self.cache.padding[i] = self.length - r.read
            if r.score and not r.written: r.scores = self._score(r, hidden[row, n-r.read:-1])
        return F.linear(hidden[:, -1], model.head)[:, :model.vocab_size]

    # -- The tokens --

    def _write(self, rows: list[Request], logits: Tensor) -> Iterator[tuple[Request, Piece]]:
        "Chooses the next token of each row and says what it adds to the text"
        logits = logits[:, :self.tokenizer.vocab_size]
        tokens = self._choose(rows, logits)
        asked = [i for i, r in enumerate(rows) if r.sampling.logprobs and r.limit]
        costs = dict(zip(asked, _costs(logits[asked], tokens[asked], max(rows[i].top for i in asked)))) if asked else {}
        for i, (r, token) in enumerate(zip(rows, tokens.tolist())):
            for piece in self._add(r, token, *costs.get(i, (None, ()))): yield r, piece

    def _choose(self, rows: list[Request], logits: Tensor) -> Tensor:
        "One token for each row (B,): rows with the same knobs together, those that look back on their own"
        groups: dict = {}
        for i, r in enumerate(rows): groups.setdefault(i if r.knobs.looks_back else r.knobs, []).append(i)
        tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for members in groups.values():
            r = rows[members[0]]
            u = torch.tensor([rows[i].number() for i in members], device=logits.device)
            history = torch.tensor([r.tokens], device=logits.device) if r.knobs.looks_back else None
            tokens[members] = choose_tokens(logits[members], u, r.knobs, history, len(r.ids))
        return tokens

    def _add(self, r: Request, token: int, logprob: float | None, top: tuple) -> Iterator[Token]:
        "What a token adds to a text, and the end of it where it is one"
        finish = "length" if r.written >= r.limit else None
        if not finish and (token < 0 or token in self.ends and not r.sampling.ignore_eot): finish = "eot"
        if not finish:
            r.tokens.append(token)
            yield Token(r.stream.push(self.tokenizer.token_bytes(token)), token, logprob, top=top[:r.top])
            finish = "stop" if r.stream.stopped else "length" if r.written == r.limit else None
        if finish: yield Token(r.stream.push(b"", final=True), finish=finish)

    def _score(self, r: Request, hidden: Tensor) -> list[Token]:
        "What each token of the prompt but the first costs, some at a time: the scores of all are large"
        found = []
        for h, ids in zip(hidden.split(256), torch.tensor(r.ids[1:], device=hidden.device).split(256)):
            logits = F.linear(h, self.model.head)[:, :self.tokenizer.vocab_size]
            found += [Token("", id, cost, top=top) for id, (cost, top) in zip(ids.tolist(), _costs(logits, ids, r.top))]
        return found


def _costs(logits: Tensor, ids: Tensor, top: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    "The log-probability of each row's token, and its `top` likeliest ones with theirs"
    logp = logits.float().log_softmax(-1)
    best, which = logp.topk(min(top, logp.shape[1]))
    pairs = [tuple(zip(i, p)) for i, p in zip(which.tolist(), best.tolist())]
    return list(zip(logp.gather(1, ids.clamp(min=0)[:, None])[:, 0].tolist(), pairs))


def _shape(cache: KVCache | None) -> tuple[int, int]:
    "Rows and places of a cache"
    return (0, 0) if cache is None else (cache.kv.shape[2], cache.size)
