"""Many texts at once are the texts one by one: the engine beside a slow twin without cache, batch or moving windows."""
import copy
from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_trainer.config import ModelConfig
from llm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from llm_trainer.generation.engine import Engine, Request
from llm_trainer.generation.filters import apply_filters, draw, uniforms
from llm_trainer.generation.sampling import Sampling
from llm_trainer.generation.sampler import generate, window_start
from llm_trainer.model.transformer import GPT

CONTEXT = 24
KNOBS = [dict(), dict(temperature=0), dict(temperature=0.7, top_k=30, top_p=0.9), dict(min_p=0.01, stop=("e", "th")),
         dict(repetition_penalty=1.2, presence_penalty=0.1),
         dict(no_repeat_ngram=2, frequency_penalty=0.3, ignore_eot=True)]


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer("byte", 257, [])


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def model(request):
    "A model that knows nothing but has strong opinions"
    torch.manual_seed(0)
    heads = {} if request.param == "gpt2" else dict(n_kv_head=2)
    model = GPT(ModelConfig(arch=request.param, n_layer=2, n_head=4, n_embd=32, seq_len=CONTEXT, **heads), 257).eval()
    for p in model.parameters():
        if p.ndim == 2: p.data *= 6 if request.param == "gpt2" else 3
    return model


class Slow:
    "The engine as one would write it first: every text is read again for each of its tokens"
    def __init__(self, model, tokenizer, rows):
        self.model, self.tokenizer, self.most, self.rows, self.waiting = model, tokenizer, rows, [], deque()
        self.add = self.waiting.append

    @property
    def busy(self): return bool(self.rows or self.waiting)

    def drop(self, request):
        for some in (self.rows, self.waiting):
            if request in some: some.remove(request)

    @torch.no_grad()
    def step(self):
        while self.waiting and len(self.rows) < self.most: self.rows.append(self.waiting.popleft())
        told = [(r, self.next(r)) for r in self.rows]
        self.rows = [r for r, (_, finish) in told if not finish]
        return {id(r): piece for r, piece in told}

    def next(self, r):
        s = r.sampling
        logits = self.model(torch.tensor([r.tokens[window_start(len(r.tokens), CONTEXT):]]))[0][:, -1]
        scores = apply_filters(logits.float(), s, torch.tensor([r.tokens]), len(r.ids))
        u = uniforms([s.seed], s.max_new_tokens)[r.written]
        token = (scores.argmax(-1) if s.greedy else draw(scores, u)).item()
        if token == self.tokenizer.eot_id and not s.ignore_eot: return r.stream.push(b"", final=True), "eot"
        r.tokens.append(token)
        text = r.stream.push(self.tokenizer.token_bytes(token))
        finish = "stop" if r.stream.stopped else "length" if r.written == s.max_new_tokens else None
        return text + (r.stream.push(b"", final=True) if finish else ""), finish


def joined(pieces):
    "What a step of the engine brought, a text and a finish for each row"
    found = {}
    for r, p in pieces:
        text, _ = found.get(id(r), ("", None))
        found[id(r)] = text + p.text, p.finish
    return found


def texts(engine, requests):
    "The text of each request, all of them added at once"
    for r in requests: engine.add(r)
    found = {r: "" for r in requests}
    while engine.busy:
        for r, p in engine.step(): found[r] += p.text
    return list(found.values())


request = st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=CONTEXT), st.integers(1, 60),
                    st.sampled_from(KNOBS), st.integers(0, 2**40))
acts = st.lists(st.one_of(request, st.integers(0, 20), st.tuples(st.just("drop"), st.integers(0, 9))), min_size=3,
                max_size=24)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(acts, st.integers(1, 5))
def test_who_comes_and_goes_changes_no_other_text(model, tokenizer, acts, rows):
    model = copy.deepcopy(model).double()  # so that no draw lies within the rounding of a batch
    fast, slow, pairs = Engine(model, tokenizer, rows), Slow(model, tokenizer, rows), []
    def step():
        a, b = joined(fast.step()), slow.step()
        same = {id(s): a[id(f)] for f, s in pairs if id(f) in a}
        assert same == b
    for act in [*acts, 1000]:
        if isinstance(act, int):
            for _ in range(act):
                if fast.busy: step()
        elif act[0] == "drop":
            if pairs:
                fast.drop(pairs[act[1] % len(pairs)][0])
                slow.drop(pairs[act[1] % len(pairs)][1])
        else:
            ids, n, knobs, seed = act
            pairs.append(tuple(Request(ids, Sampling(max_new_tokens=n, seed=seed, **knobs)) for _ in range(2)))
            fast.add(pairs[-1][0])
            slow.add(pairs[-1][1])
        assert fast.busy == slow.busy
    assert not fast.busy


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_text_alone_is_generates_to_the_last_bit(model, tokenizer, knobs):
    s, engine = Sampling(max_new_tokens=50, seed=7, logprobs=True, **knobs), Engine(model, tokenizer)
    engine.add(request := Request(tokenizer.encode("The moon"), s))
    mine = [p for _ in range(60) if engine.busy for _, p in engine.step()]
    theirs = list(generate(model, tokenizer, "The moon", s))
    assert [(p.token, p.logprob, p.finish) for p in mine] == [(p.token, p.logprob, p.finish) for p in theirs]
    assert "".join(p.text for p in mine) == "".join(p.text for p in theirs) and request.written == len(theirs) - 1


def test_alone_again_it_goes_on_as_if_it_had_always_been(model, tokenizer):
    s = Sampling(max_new_tokens=40, seed=3, logprobs=True)
    engine = Engine(model, tokenizer)
    long, short = Request([1, 2, 3], s), Request([9] * 20, replace(s, max_new_tokens=5))
    engine.add(short)
    engine.add(long)
    while short in [*engine.rows, *engine.waiting]: engine.step()
    assert engine.rows == [long] and engine.length == long.read and engine.cache.padding[0] == 0


def test_little_memory_makes_texts_wait_not_differ(model, tokenizer):
    asked = [([i + 1] * (1 + 3 * i), Sampling(max_new_tokens=30, seed=i)) for i in range(6)]
    plenty = texts(Engine(model, tokenizer), [Request(*a) for a in asked])
    narrow = Engine(model, tokenizer, memory=1)
    for a in asked: narrow.add(Request(*a))
    narrow.step()
    assert len(narrow.rows) == 1 and len(narrow.waiting) == 5
    narrow.clear()
    assert texts(narrow, [Request(*a) for a in asked]) == plenty


def test_what_a_prompt_costs_is_the_models_own(model, tokenizer):
    ids, other = tokenizer.encode("Once upon a time"), [5, 6, 7]
    asked = [Request(i, Sampling(max_new_tokens=1, temperature=0, logprobs=True), top=3, score=True, limit=n)
             for i, n in ((ids, 0), (other, 1))]
    engine = Engine(model, tokenizer)
    for r in asked: engine.add(r)
    pieces = engine.step()
    with torch.no_grad(): logp = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    want = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor([t.logprob for t in asked[0].scores]), want, atol=1e-4)
    assert [t.token for t in asked[0].scores] == ids[1:]
    assert [[i for i, _ in t.top] for t in asked[0].scores] == logp[:-1].topk(3)[1].tolist()
    assert [(r, p.finish) for r, p in pieces if p.finish] == [(r, "length") for r in asked]
    assert [r.written for r in asked] == [0, 1] and not engine.busy


def test_a_text_ends_where_its_knobs_leave_nothing_to_choose(model, tokenizer):
    ids, knobs = tokenizer.encode("abc"), Sampling(no_repeat_ngram=1, ignore_eot=True, max_new_tokens=300, seed=1)
    engine, request = Engine(model, tokenizer), Request(ids, knobs)
    engine.add(request)
    while engine.busy: last = engine.step()[-1][1]
    pieces = list(generate(model, tokenizer, "abc", knobs))
    assert request.tokens == ids + [piece.token for piece in pieces[:-1]] and len(set(request.tokens)) == 257
    assert last.finish == pieces[-1].finish == "eot"


def test_a_token_that_ends_a_turn_ends_the_text(model, tokenizer):
    s = Sampling(max_new_tokens=20, temperature=0)
    whole = Request([1, 2, 3], s)
    texts(Engine(model, tokenizer), [whole])
    end, cut = whole.tokens[8], Request([1, 2, 3], s)
    texts(Engine(model, Tokenizer(tokenizer.json, generation={"eos_token_id": [end]})), [cut])
    assert cut.tokens[3:] == whole.tokens[3:whole.tokens.index(end, 3)]
