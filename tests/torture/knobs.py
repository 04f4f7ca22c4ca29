"""Every sampling setting at ordinary and extreme values, against a decoder that knows none of our code."""
from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np

from llm_trainer.generation.sampling import Sampling

from .battery import cases, struck, trial


class Letters:
    "A tokenizer of 64 signs and an end"
    vocab_size, eot_id, ends = 65, 64, (64,)

    def encode(self, text: str) -> list[int]: return [byte % 64 for byte in text.encode()]
    def encode_prompt(self, text: str) -> list[int]: return self.encode(text)
    def token_bytes(self, token: int) -> bytes: return bytes([32 + token])


@lru_cache
def model(arch: str = "gpt2"):
    "A small untrained model with a context of 32, always the same one"
    import torch

    from llm_trainer.config import ModelConfig
    from llm_trainer.model.transformer import GPT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = GPT(ModelConfig(arch=arch, n_layer=1, n_head=2, n_embd=16, seq_len=32, dropout=0), 65).eval()
        for p in made.parameters(): p.data.mul_(3)  # scores that differ
    return made


EXTREMES = {"temperature": [0, 5e-324, 1e-40, 1e-10, 0.1, 0.8, 1, 3, 1e10, 1e308], "top_k": [0, 1, 2, 64, 65],
            "top_p": [1, 5e-324, 1e-9, 0.5, 0.9, 1 - 1e-12], "min_p": [0, 5e-324, 0.05, 0.999999, 1],
            "typical_p": [1, 5e-324, 0.3, 0.95], "repetition_penalty": [1, 5e-324, 1e-39, 0.5, 1.3, 1e39, 1e308],
            "presence_penalty": [0, -1e308, -1e39, -2, 0.5, 1e39, 1e308],
            "frequency_penalty": [0, -1e308, -3, 0.4, 1e39, 1e308], "no_repeat_ngram": [0, 1, 2, 3, 1000]}


def draw_knobs(rng: random.Random) -> dict:
    "Some knobs, at any of their values"
    named = rng.sample(list(EXTREMES), rng.randint(1, 5))
    return {name: rng.choice(EXTREMES[name]) for name in named}


def penalized(scores: np.ndarray, knobs: dict, prompt: list[int], written: list[int]) -> np.ndarray:
    "The scores after what looks back, in float64"
    def get(name, off): return knobs.get(name, off)
    def big(value): return max(-1e30, min(1e30, value))
    x, seen = scores.astype(np.float64), sorted({*prompt, *written})
    if (r := get("repetition_penalty", 1)) != 1:
        r = max(1e-30, big(r))
        for t in seen: x[t] = big(x[t] * r if x[t] < 0 else x[t] / r)
    for t in set(written):
        x[t] = big(x[t] - big(get("presence_penalty", 0)) - big(get("frequency_penalty", 0)) * written.count(t))
    history, n = prompt + written, get("no_repeat_ngram", 0)
    if n and len(history) >= n:
        tail = history[len(history) - n + 1:]
        for i in range(len(history) - n + 1):
            if history[i:i + n - 1] == tail: x[history[i + n - 1]] = -math.inf
    return x


def beams_oracle(score, knobs: dict, prompt: list[int], n: int, most: int, ends: bool) -> tuple[list[int], str] | None:
    """The text of beam search and how it ends: at each step the 2n best continuations of n texts; those of the first n
    that end are done, the first n others go on. None where a choice depends on the last bits"""
    texts, done, why = [(0.0, [])], [], "length"
    for i in range(most):
        found = []
        for total, text in texts:
            x = score(text)
            x = penalized(x - x.max() - math.log(np.exp(x - x.max()).sum()), knobs, prompt, text)
            found += [(total + cost, [*text, token]) for token, cost in enumerate(x.tolist()) if cost > -math.inf]
        found.sort(key=lambda one: -one[0])
        if any(abs(total) > 1e4 for total, _ in found): return None
        if any(a[0] - b[0] < 1e-4 for a, b in zip(found[:2 * n], found[1:])): return None
        if not found:
            why = "eot"
            break
        found = found[:2 * n]
        done += [(total / (i + 1), text[:-1], "eot") for total, text in found[:n] if ends and text[-1] == 64]
        texts = [one for one in found if not (ends and one[1][-1] == 64)][:n]
        if not texts: return None
        done = sorted(done)[-n:]
        gap = done[0][0] - texts[0][0] / (i + 1) if len(done) == n else -1.0
        if abs(gap) < 1e-4: return None
        if i + 1 == most or gap > 0: break
    done = sorted([*done, (texts[0][0] / max(1, len(texts[0][1])), texts[0][1], why)])
    if len(done) > 1 and done[-1][0] - done[-2][0] < 1e-4: return None
    return done[-1][1:]


def oracle(scores: np.ndarray, knobs: dict, prompt: list[int], written: list[int]) -> np.ndarray | None:
    """The probabilities of the next token in float64, one rule after the other as their papers and Hugging Face have
    them; None where a choice depends on the last bits"""
    def get(name, off): return knobs.get(name, off)
    x = penalized(scores, knobs, prompt, written)
    if np.all(x == -math.inf): return np.zeros_like(x)
    order = np.sort(x)
    def close(a, b): return abs(a - b) <= 1e-4 * max(1, abs(a), abs(b)) and a != b
    if get("temperature", Sampling.temperature) == 0:
        if close(order[-1], order[-2]) or order[-1] == order[-2]: return None
        return (x == x.max()).astype(float)
    scale = get("temperature", Sampling.temperature)
    if not 0.05 <= scale <= 20 or np.abs(x[np.isfinite(x)]).max(initial=0) > 1e4: return None
    x = x / scale
    if k := get("top_k", 0):
        if k < 65 and (close(order[-k], order[-k - 1]) or order[-k] == order[-k - 1]): return None
        x = np.where(x < np.sort(x)[-k], -math.inf, x)
    p = np.exp(x - x.max())
    p /= p.sum()
    for name in ("top_p", "min_p", "typical_p"):
        if get(name, EXTREMES[name][0]) == EXTREMES[name][0]: continue
        value, kept = get(name, 0), p > 0
        if name == "top_p":
            down = np.argsort(-p, kind="stable")
            before = np.cumsum(p[down]) - p[down]
            if np.any(np.abs(before[p[down] > 0] - value) < 1e-4) and value < 1 - 1e-9: return None
            kept = np.zeros(65, bool)
            kept[down[(before < value) | (np.arange(65) == 0)]] = True
            if value > 1 - 1e-9 or value < 1e-6 and close(order[-1], order[-2]): return None
        elif name == "min_p":
            if np.any((np.abs(p - value * p.max()) < 1e-5 * p.max()) & (p < p.max())): return None
            kept = p >= value * p.max()
        else:
            surprise = -np.log(p, where=p > 0, out=np.full(65, -math.inf))
            gap = np.abs(surprise - np.sum(p[p > 0] * surprise[p > 0]))
            near = np.argsort(gap, kind="stable")
            before = np.cumsum(p[near]) - p[near]
            finite = np.sort(gap[np.isfinite(gap)])
            if np.any(np.abs(before - value) < 1e-4) or np.any(np.diff(finite) < 1e-5): return None
            kept = np.zeros(65, bool)
            kept[near[(before < value) | (np.arange(65) == 0)]] = True
        p = np.where(kept & (p > 0), p, 0)
        p /= p.sum()
    return p


@trial("T25", goal=2000, slice=20, chunk=60)
@cases
def knobs_at_their_edges(case: int) -> str | None:
    """Any knobs of sampling at ordinary and extreme values on a real decoder: no internal error, no text lost, the same
    seed the same text, and each token the one that an independent decoder in float64 takes with the same numbers"""
    import torch

    from llm_trainer.generation.filters import uniforms
    from llm_trainer.generation.sampler import generate
    rng, tokenizer = random.Random(f"knobs {case}"), Letters()
    net, knobs = model(rng.choice(["gpt2", "qwen3"])), draw_knobs(rng)
    prompt = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))
    ids, beams = tokenizer.encode(prompt), rng.choice([1, 1, 1, 1, 2, 5])
    most = rng.choice([1, 5, 32 - len(ids)]) if beams > 1 else rng.choice([1, 8, 20, 90])
    sampling = Sampling(max_new_tokens=most, seed=rng.randrange(2**31), ignore_eot=rng.random() < 0.5, beams=beams,
                        **knobs)
    told = list(generate(net, tokenizer, prompt, sampling))
    again = list(generate(net, tokenizer, prompt, sampling))
    tokens, last = [piece.token for piece in told[:-1]], told[-1]
    if told != again: return f"{knobs}: another text with the same seed"
    if last.finish not in ("eot", "length") or (last.finish == "length") != (len(tokens) == most):
        return f"{knobs}: ended by {last.finish}"
    if "".join(piece.text for piece in told) != b"".join(map(tokenizer.token_bytes, tokens)).decode():
        return f"{knobs}: text was lost"
    def score(written):
        with torch.inference_mode(): return net(torch.tensor([ids + written]))[0][0, -1].double().numpy()
    if beams > 1:
        wanted = beams_oracle(score, knobs, ids, beams, most, not sampling.ignore_eot)
        struck("beams: " + ("as the oracle" if wanted else "too close to say"))
        return wanted and wanted != (tokens, last.finish) and f"{knobs}: {beams} beams: {tokens}, not {wanted}" or None
    numbers = uniforms([sampling.seed], most)[:, 0].double().numpy()
    for i, token in enumerate([*tokens, None][:most]):
        if len(ids) + i > 32: return struck("beyond the context")
        p = oracle(score(tokens[:i]), knobs, ids, tokens[:i])
        if p is None:
            struck("too close to say")
            continue
        sums = np.cumsum(p)
        wanted = 64 if sums[-1] == 0 else int(np.searchsorted(sums, numbers[i] * sums[-1], side="right"))
        drawn = sums[-1] and knobs.get("temperature", Sampling.temperature)
        if drawn and np.min(np.abs(sums - numbers[i] * sums[-1])) < 1e-4:
            struck("too close to say")
            continue
        if token is None:
            ends = not sums[-1] or wanted == 64 and not sampling.ignore_eot
            if not ends: return f"{knobs}: ended at {i}, the oracle goes on with {wanted}"
        elif sums[-1] == 0 or token != wanted: return f"{knobs}: token {i} is {token}, the oracle takes {wanted}"
        struck("as the oracle")
    return None
