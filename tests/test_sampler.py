"""Filters keep what Hugging Face's keep; cached, batched and streamed texts equal those of the slow and obvious way."""

import copy
import io
import json
import queue
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import warm
from hypothesis import given, settings, strategies as st
from llm_trainer.generation import sampler
from llm_trainer.config import ModelConfig
from llm_trainer.device import why_not
from llm_trainer.errors import NotFoundError, UsageError
from llm_trainer.generation.filters import (
    Sampling, apply_filters, draw, no_repeat_ngram, repetition_penalty, uniforms)
from llm_trainer.generation.child import serve
from llm_trainer.generation.sampling import BOUNDS
from llm_trainer.model.transformer import GPT
from llm_trainer.generation.sampler import (
    TextStream, generate, generate_batch, load_for_generation, pad_left, window_start, sample_tokens)
from llm_trainer.data.tokenizer import train_tokenizer
from llm_trainer.model.huggingface import save_weights

CONTEXT, COMPARED = 24, ("top_k", "no_repeat_ngram")  # of any size: nothing is computed with them
CONFIGS = {"gpt2": ModelConfig(arch="gpt2", n_layer=2, n_head=2, n_embd=32, seq_len=CONTEXT),
           "qwen3": ModelConfig(arch="qwen3", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, seq_len=CONTEXT)}


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer("byte", 257, [])


def wild(arch, vocabulary=257):
    "A model that knows nothing but has strong opinions"
    torch.manual_seed(0)
    model = GPT(CONFIGS[arch], vocabulary).eval()
    for p in model.parameters():
        if p.ndim == 2: p.data *= 6 if arch == "gpt2" else 3
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request): return wild(request.param)


@torch.no_grad()
def obvious(model, ids, sampling, seed):
    "One token at a time, everything read again for each: the reference for all fast paths"
    ids, n, u = list(ids), len(ids), uniforms([seed], sampling.max_new_tokens)[:, 0]
    for i in range(sampling.max_new_tokens):
        logits = model(torch.tensor([ids[window_start(len(ids), model.config.seq_len):]]))[0][:, -1]
        scores = apply_filters(logits, sampling, torch.tensor([ids]), n)
        ids.append((scores.argmax(-1) if sampling.greedy else draw(scores, u[i:i+1])).item())
    return ids[n:]


def written(model, prompts, sampling, seeds):
    return [list(row) for row in zip(*(ids for ids, _ in sample_tokens(model, prompts, sampling, seeds)))]


# ---- filters

def theirs(s, history, prompt, scores):
    from transformers.generation import logits_process as lp
    steps = []
    if s.repetition_penalty != 1: steps.append(lp.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.no_repeat_ngram: steps.append(lp.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram))
    if s.temperature != 1: steps.append(lp.TemperatureLogitsWarper(s.temperature))
    if s.top_k: steps.append(lp.TopKLogitsWarper(s.top_k))
    if s.top_p < 1: steps.append(lp.TopPLogitsWarper(s.top_p))
    if s.min_p: steps.append(lp.MinPLogitsWarper(s.min_p))
    if s.typical_p < 1: steps.append(lp.TypicalLogitsWarper(s.typical_p))
    for step in steps: scores = step(history, scores)
    return scores


def test_ten_thousand_random_cases_keep_what_transformers_keeps():
    r, g, cases, rows = random.Random(0), torch.Generator().manual_seed(0), 0, 10
    while cases < 10_000:
        v, n = r.choice([5, 32, 97]), r.randint(1, 30)
        maybe = lambda off, *on: r.choice([off, *on])  # noqa: E731
        s = Sampling(temperature=maybe(1.0, 0.3, 0.8, 1.7), top_k=maybe(0, 1, 3, v),
                     top_p=maybe(1.0, 0.1, 0.5, 0.9, 0.99),
                     min_p=maybe(0.0, 0.02, 0.2, 1.0), typical_p=maybe(1.0, 0.2, 0.9),
                     repetition_penalty=maybe(1.0, 0.8, 1.3), no_repeat_ngram=maybe(0, 0, 1, 2, 3))
        logits = torch.randn(rows, v, generator=g) * r.choice([0.1, 1, 5])
        if r.random() < 0.3: logits = logits.round()  # ties
        history = torch.randint(v, (rows, n), generator=g)
        ours, want = apply_filters(logits, s, history, n // 2), theirs(s, history, n // 2, logits)
        same = ours.isfinite() == want.isfinite()
        left = want.isfinite().any(1)  # where everything is banned there is nothing to agree on
        assert same[left].all(), s
        assert torch.equal(ours[ours.isfinite()], want[ours.isfinite()]), s
        cases += left.sum().item()


def test_the_order_is_the_one_generate_uses(tmp_path):
    from transformers import AutoModelForCausalLM
    save_weights(wild("gpt2"), tmp_path, 256)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = model.generation_config
    config.update(do_sample=True, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.9, repetition_penalty=1.2,
                  no_repeat_ngram_size=2, num_beams=1, num_beam_groups=1)
    names = [type(p).__name__ for p in model._get_logits_processor(config, input_ids_seq_length=4)]
    want = ["Repetition", "NoRepeatNGram", "Temperature", "TopK", "TopP", "MinP", "Typical"]
    assert len(names) == len(want) and all(n.startswith(w) for n, w in zip(names, want)), names


def test_padding_in_the_history_counts_for_nothing():
    logits, history = torch.randn(2, 6), torch.tensor([[-1, -1, -1, 2, 3, 2], [1, 1, 4, 0, 1, 1]])
    for f in (lambda h, x: repetition_penalty(x, h, 1.5), lambda h, x: no_repeat_ngram(x, h, 2),
              lambda h, x: no_repeat_ngram(x, h, 3)):
        assert torch.equal(f(history, logits)[:1], f(history[:1, 3:], logits[:1]))
    assert no_repeat_ngram(logits, history, 2)[0, 3] == -torch.inf
    assert no_repeat_ngram(logits, history, 2)[0].isinf().sum() == 1


def test_counts_are_of_what_was_written_only():
    s = Sampling(temperature=1, presence_penalty=0.5, frequency_penalty=0.25)
    got = apply_filters(torch.zeros(1, 4), s, torch.tensor([[0, 0, 1, 2, 2]]), prompt=2)
    torch.testing.assert_close(got, torch.tensor([[0.0, -0.75, -1.0, 0.0]]))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.floats(0, 1 - 2**-23, width=32), st.data())
def test_a_struck_token_is_never_drawn(scores, u, data):
    struck = data.draw(st.sets(st.integers(0, len(scores) - 1), max_size=len(scores) - 1))
    logits = torch.tensor([scores]).index_fill(1, torch.tensor(sorted(struck), dtype=torch.long), -torch.inf)
    assert draw(logits, torch.tensor([u])).item() not in struck


@pytest.mark.parametrize("wrong", [
    dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0),
    dict(top_p=1.1),
    dict(top_p=float("nan")), dict(typical_p=0), dict(min_p=-0.1), dict(min_p=2), dict(top_k=-1), dict(top_k=1.5),
    dict(no_repeat_ngram=-1), dict(max_new_tokens=0), dict(repetition_penalty=0), dict(presence_penalty=float("nan")),
    dict(beams=0), dict(beams=10**9), dict(max_new_tokens=10**12), dict(seed=2**64), dict(truncate="right"),
    dict(stop=[""]), dict(stop=[1]), dict(seed=1.5), dict(stop=5), dict(stop=b"a"), dict(stop=["a", "\ud800"]),
    dict(ignore_eot="no"), dict(logprobs=1),
    *({name: 10**digits} for digits in (400, 5000) for name in BOUNDS if name not in COMPARED)])
def test_a_knob_that_cannot_be_meant_is_named(wrong):
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))} must be "): Sampling(**wrong)


def test_no_stop_is_none(): assert Sampling(stop=None).stop == Sampling(stop=[]).stop == ()


def test_seeds_beyond_32_bits_are_seeds_of_their_own():
    def numbers(seed): return tuple(uniforms([seed], 3)[:, 0].tolist())
    for seed in (0, 1, 2**32 - 1):
        assert numbers(seed) == tuple(torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist())
    seeds = [s + half for s in range(200) for half in (0, 2**32, 2**33, 2**63 - 200, -200, -2**32 - 200, 1 - 2**63)]
    assert len(set(map(numbers, seeds))) == len(seeds)


# ---- tokens

@pytest.mark.parametrize("s", [
    Sampling(max_new_tokens=90), Sampling(max_new_tokens=40, temperature=0), Sampling(max_new_tokens=5, top_k=3),
    Sampling(max_new_tokens=40, temperature=0, repetition_penalty=1.5),
    Sampling(max_new_tokens=40, no_repeat_ngram=2, frequency_penalty=0.5, top_p=0.8)])
def test_the_cache_writes_what_the_uncached_model_writes_past_the_context(model, s):
    for prompt in [7], [5, 6, 7], list(range(CONTEXT)):
        assert written(model, [prompt], s, [3]) == [obvious(model, prompt, s, 3)]


@pytest.mark.parametrize("s", [Sampling(max_new_tokens=60),
                               Sampling(max_new_tokens=60, temperature=0, repetition_penalty=1.3),
                               Sampling(max_new_tokens=30, top_p=0.9, presence_penalty=0.4, no_repeat_ngram=2)])
def test_a_batch_writes_what_each_row_writes_alone(model, s):
    prompts, seeds = [[5, 6, 7], list(range(CONTEXT)), [9], list(range(20, 40))], [1, 2, 3, 1]
    assert written(model, prompts, s, seeds) == [obvious(model, p, s, seed) for p, seed in zip(prompts, seeds)]


def test_greedy_text_is_hugging_faces(tokenizer, tmp_path, model):
    from transformers import AutoModelForCausalLM
    save_weights(model, tmp_path, 256)
    tokenizer.save(tmp_path)
    ours, prompt = load_for_generation(tmp_path, "cpu"), "hello"
    got = [p.token for p in generate(*ours, prompt, Sampling(max_new_tokens=15, temperature=0)) if p.token is not None]
    them, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([tokenizer.encode(prompt)])
    out = them.generate(ids, max_new_tokens=15, do_sample=False)
    assert got == [t for t in out[0, 5:].tolist() if t != 256]


def test_windows_move_by_a_quarter_and_never_overflow():
    for context in 2, 3, 24, 128:
        starts = [window_start(n, context) for n in range(1, 5 * context)]
        assert starts == sorted(starts) and all(1 <= n - a <= context for n, a in enumerate(starts, 1))
        assert all(n - a > context - max(1, context // 4) - 1 for n, a in enumerate(starts, 1) if a)


def test_padding_aligns_the_ends():
    ids, padding = pad_left([[1, 2, 3], [4]], fill=-1)
    assert ids.tolist() == [[1, 2, 3], [-1, -1, 4]] and padding.tolist() == [0, 2]


# ---- text

@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.text("ab", max_size=30),
       st.lists(st.text(min_size=1, max_size=3) | st.text("ab", min_size=1, max_size=9), max_size=3),
       st.integers(0, 2**32))
def test_any_cut_of_the_bytes_streams_the_same_text(text, stop, seed):
    r, data, stream, shown = random.Random(seed), text.encode(), TextStream(tuple(stop)), ""
    while data:
        n = r.randint(1, 3)
        shown += stream.push(data[:n])
        data = data[n:]
        if stream.stopped: break
    shown += stream.push(b"", final=True)
    ends = [(i + len(s), i) for s in stop if (i := text.find(s)) >= 0]  # the first that is whole counts
    assert stream.stopped == bool(ends) and shown == text[:min(ends, default=(0, None))[1]]


class Counted(str):
    "A text that counts how often it is looked at"
    looks = 0
    def __getitem__(self, key):
        self.looks += 1
        return super().__getitem__(key)
    def startswith(self, *how):
        self.looks += 1
        return super().startswith(*how)


@pytest.mark.parametrize("text", ["no sign of it" * 20, "x" * 260, "xy" * 130])
def test_a_long_stop_string_is_looked_at_as_seldom_as_a_short_one(text):
    stop = Counted("x" * 2_000)
    stream = TextStream((stop,))
    shown = "".join([*map(stream.push, map(str.encode, text)), stream.push(b"", final=True)])
    assert shown == text and stop.looks <= 2 * len(text)


def test_broken_bytes_become_one_sign_each_and_nothing_is_lost():
    stream = TextStream()
    assert [stream.push(b) for b in (b"a\xe2", b"\x82", b"\xacb", b"\xff", b"c\xe2")] == ["a", "", "€b", "\ufffd", "c"]
    assert stream.push(b"", final=True) == "\ufffd"


def test_pieces_join_to_the_text_and_say_why_it_ended(model, tokenizer):
    s = Sampling(max_new_tokens=40, seed=5)
    pieces = list(generate(model, tokenizer, "hello", s))
    tokens = [p.token for p in pieces if p.token is not None]
    assert "".join(p.text for p in pieces) == b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish in ("length", "eot")
    assert [p.token for p in generate(model, tokenizer, "hello", s)][:-1] == tokens  # the same seed, the same text
    assert pieces[-1].token is None and pieces[0].logprob is None


def test_a_stop_string_ends_the_text_before_it(model, tokenizer):
    whole = "".join(p.text for p in generate(model, tokenizer, "hello",
                                             Sampling(max_new_tokens=40, seed=5, ignore_eot=True)))
    stop = whole[10:13]
    pieces = list(generate(model, tokenizer, "hello", Sampling(max_new_tokens=40, seed=5, ignore_eot=True, stop=stop)))
    assert "".join(p.text for p in pieces) == whole[:whole.find(stop)] and pieces[-1].finish == "stop"


def test_end_of_text_ends_it_unless_ignored(tokenizer):
    model = wild("gpt2")
    model.head.data[256] = 0
    model.transformer.ln_f.bias.data += 1
    model.head.data[256] += 100  # nothing else is likely
    assert [p.finish for p in generate(model, tokenizer, "a", Sampling(temperature=0))] == ["eot"]
    assert len(list(generate(model, tokenizer, "a", Sampling(temperature=0, ignore_eot=True, max_new_tokens=4)))) == 5


@torch.no_grad()
def test_log_probabilities_are_the_models_own(model, tokenizer):
    s = Sampling(max_new_tokens=12, seed=1, logprobs=True, temperature=0.7, top_k=20)
    pieces = [p for p in generate(model, tokenizer, "hello", s) if p.token is not None]
    ids = tokenizer.encode("hello") + [p.token for p in pieces]
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)[0]
    for i, p in enumerate(pieces): assert p.logprob == pytest.approx(logp[4 + i, p.token].item(), abs=1e-4)


def test_many_prompts_and_samples_equal_one_by_one(model, tokenizer):
    prompts, s = ["hello", "a", "the quick brown", "é"], Sampling(max_new_tokens=30, seed=4, stop=("q", "\x00"))
    many = list(generate_batch(model, tokenizer, prompts, s, samples=2, batch_size=3))
    assert [c.prompt for c in many] == [p for p in prompts for _ in range(2)]
    for i, c in enumerate(many):
        one = list(generate(model, tokenizer, c.prompt,
                            Sampling(max_new_tokens=30, seed=4 + i % 2, stop=("q", "\x00"))))
        assert c.text == "".join(p.text for p in one) and c.finish == one[-1].finish
        assert c.tokens == [p.token for p in one[:-1]]
    largest = Sampling(max_new_tokens=30, seed=2**63 - 1)
    last, first = (c.tokens for c in generate_batch(model, tokenizer, ["a"], largest, samples=2))
    assert [last, first] == [[p.token for p in generate(model, tokenizer, "a", replace(largest, seed=seed))][:-1]
                             for seed in (2**63 - 1, 0)]


def test_prompts_that_cannot_be_continued_say_why(model, tokenizer):
    long = "x" * (CONTEXT + 1)
    too_long = f"has {CONTEXT + 1} tokens, the model reads {CONTEXT}"
    for prompt, s, message in (("", Sampling(), "empty"), (long, Sampling(), too_long),
                               ("a", Sampling(top_k=258), "at most 257"), ("a", Sampling(top_k=10**5000), "at most"),
                               (None, Sampling(), "text"),
                               (5, Sampling(), "text"), (b"a", Sampling(), "text"), (["a"], Sampling(), "text"),
                               ("a\ud800", Sampling(), "character 2 is a stray byte")):
        with pytest.raises(UsageError, match=message): next(generate(model, tokenizer, prompt, s))
    cut = [p.token for p in generate(model, tokenizer, "y" + "x" * CONTEXT,
                                     Sampling(truncate="left", seed=1, max_new_tokens=5))]
    assert cut == [p.token for p in generate(model, tokenizer, "x" * CONTEXT, Sampling(seed=1, max_new_tokens=5))]
    with pytest.raises(UsageError, match="don't belong together"): next(generate(wild("gpt2", 200), tokenizer, "a"))
    with pytest.raises(NotFoundError): load_for_generation("/nowhere")
    with pytest.raises(UsageError, match="Prompt 2 of 3: .*empty"):
        next(generate_batch(model, tokenizer, ["a", "", "b"]))
    with pytest.raises(UsageError, match=f"max-new-tokens {CONTEXT - 1}$"): beam(model, tokenizer, "a", beams=2)


def test_a_device_that_is_not_there_is_refused(tokenizer, tmp_path):
    save_weights(wild("gpt2"), tmp_path, 256)
    tokenizer.save(tmp_path)
    missing = next(d for d in ("mps", "cuda") if why_not(d))  # no machine has both
    for asked in ((missing,), ("auto", missing)):
        with pytest.raises(UsageError, match=f"asks for {missing}"): load_for_generation(tmp_path, *asked)


def test_an_interrupted_batch_gives_what_was_written(tokenizer, monkeypatch):
    def interrupted(*args):
        for i, tokens in enumerate(sample_tokens(*args)):
            if i == 3: raise KeyboardInterrupt
            yield tokens
    s = Sampling(max_new_tokens=9, seed=1, ignore_eot=True)
    whole = list(generate_batch(wild("gpt2"), tokenizer, ["a", "bc"], s, samples=2))
    monkeypatch.setattr(sampler, "sample_tokens", interrupted)
    cut = list(generate_batch(wild("gpt2"), tokenizer, ["a", "bc"], s, samples=2, batch_size=3))
    assert [c.finish for c in cut] == ["interrupted"] * 3  # the second batch was not begun
    assert [c.tokens for c in cut] == [c.tokens[:3] for c in whole[:3]]
    assert all(0 < c.first_token_seconds <= c.seconds and c.tokens_per_second for c in cut)


def beam(model, tokenizer, prompt, **knobs):
    return [p.token for p in generate(model, tokenizer, prompt, Sampling(ignore_eot=True, **knobs))
            if p.token is not None]


@torch.no_grad()
def test_beams_find_the_most_probable_text(tokenizer):
    model = wild("gpt2")
    best = beam(model, tokenizer, "hi", beams=257, max_new_tokens=2)
    ids = torch.tensor([tokenizer.encode("hi")])
    first = model(ids)[0][:, -1].log_softmax(-1)[0]
    second = model(torch.cat([ids.expand(257, -1), torch.arange(257)[:, None]], 1))[0][:, -1].log_softmax(-1)
    assert best == list(divmod((first[:, None] + second).argmax().item(), 257))

    def score(tokens):
        logp = model(torch.cat([ids, torch.tensor([tokens])], 1))[0].log_softmax(-1)[0]
        return sum(logp[1 + i, t].item() for i, t in enumerate(tokens))
    knobs = Sampling(ignore_eot=True, beams=3, max_new_tokens=6, logprobs=True)
    pieces = list(generate(model, tokenizer, "hi", knobs))[:-1]
    assert sum(p.logprob for p in pieces) == pytest.approx(score([p.token for p in pieces]), abs=1e-3)
    one, three = (beam(model, tokenizer, "hi", beams=n, temperature=0, max_new_tokens=6) for n in (1, 3))
    assert score(three) >= score(one) - 1e-4


def test_beams_equal_hugging_faces(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM
    ended, tokenizer = 0, copy.copy(tokenizer)
    for arch in CONFIGS:
        model = wild(arch)
        save_weights(model, tmp_path, 256)
        them, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([tokenizer.encode("hello")])
        for eot in (None, *range(5, 250, 25)):  # any token may end a text
            want = them.generate(ids, num_beams=4, max_new_tokens=12, do_sample=False, eos_token_id=eot,
                                 pad_token_id=0)[0, 5:].tolist()
            if eot in want: ended, want = ended + 1, want[:want.index(eot)]
            tokenizer.eot_id = eot or 256
            s = Sampling(beams=4, max_new_tokens=12, ignore_eot=not eot)
            assert [p.token for p in generate(model, tokenizer, "hello", s) if p.token is not None] == want
    assert ended


# ---- the child process

def test_the_server_answers_in_order_and_names_what_is_wrong(tokenizer):
    requests = [{"id": 1, "prompt": "hello", "max_new_tokens": 6, "seed": 1}, "nonsense",
                {"id": 2, "prompt": "a", "top_p": 7},
                {"id": 3, "prompt": "a", "tempurature": 1}, {"id": 4}, {"id": 5, "prompt": "a", "temperature": "hot"},
                {"id": 6, "prompt": "b", "max_new_tokens": 3, "seed": 1}]
    out = []
    serve(wild("gpt2"), tokenizer, [json.dumps(r) if isinstance(r, dict) else r for r in requests], out.append)
    first = [m for m in out if m.get("id") == 1]
    want = list(generate(wild("gpt2"), tokenizer, "hello", Sampling(max_new_tokens=6, seed=1)))
    assert "".join(m.get("text", "") for m in first) == "".join(p.text for p in want)
    assert first[-1]["finish"] == want[-1].finish
    errors = {m["id"]: m["error"] for m in out if "error" in m}
    assert set(errors) == {None, 2, 3, 4, 5} and "top_p" in errors[2] and "tempurature" in errors[3]
    assert [m["id"] for m in out if "finish" in m] == [1, 6]


def test_the_server_stops_a_text_that_is_cancelled(tokenizer):
    lines, out = queue.Queue(), []
    def send(message):
        out.append(message)
        if len(out) == 3: lines.put('{"cancel": 1}')
        if "finish" in message: lines.put(None)
    lines.put('{"id": 1, "prompt": "a", "max_new_tokens": 100000, "ignore_eot": true}')
    thread = threading.Thread(target=serve, args=(wild("gpt2"), tokenizer, iter(lines.get, None), send))
    thread.start()
    thread.join(60)
    assert out[-1]["finish"] == "cancelled" and 2 <= out[-1]["tokens"] < 100_000


def test_the_child_process_takes_the_device_of_the_workspace(tokenizer, tmp_path):
    save_weights(wild("qwen3"), tmp_path, 256)
    tokenizer.save(tmp_path)
    (tmp_path / "settings.ini").write_text("[llm_trainer]\ndevice = nonesuch")
    done = warm.program(tmp_path, tmp_path, code="from llm_trainer.generation.child import main; exit(main())")
    assert done.returncode == 2 and "settings.ini asks for the device 'nonesuch'" in json.loads(done.stdout)["error"]


def test_the_child_process_speaks_json_lines_only(tokenizer, tmp_path):
    save_weights(wild("qwen3"), tmp_path, 256)
    tokenizer.save(tmp_path)
    lines = "".join(json.dumps(r) + "\n" for r in ({"id": "a", "prompt": "é\n", "max_new_tokens": 5},
                                                   {"id": "b", "prompt": "", "seed": 1}))
    command = [sys.executable, "-m", "llm_trainer.generation.child", str(tmp_path), "cpu"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    messages = [json.loads(line) for line in io.StringIO(done.stdout)]
    assert done.returncode == 0 and messages[0]["ready"] and messages[0]["context"] == CONTEXT
    assert [m["id"] for m in messages if "finish" in m] == ["a"] and "empty" in messages[-1]["error"]
