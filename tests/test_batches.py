"""Token files and the order of windows: each token once an epoch, any place at once, whoever fetches it."""
from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend

from hearing import Heard
from llm_trainer.data.batches import (
    BLOCK, MixStream, Stream, Windows, open_tokens, permute, prepare_tokens, shares, token_type,
    training_stream, val_batches, write_tokens)
from llm_trainer.data.builtin import open_builtin
from llm_trainer.config import DataConfig, Source
from llm_trainer.data.sources import first_look, open_corpus, open_mix
from llm_trainer.events import silent
from llm_trainer.errors import DataError, NotFoundError
from llm_trainer.data.tokenizer import Tokenizer, train_tokenizer



@pytest.fixture(scope="module")
def world(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    corpus = open_builtin("python-docs-tiny", data, 0.1, silent)
    tokenizer = train_tokenizer("bpe", 512, corpus.documents("train"))
    cache = prepare_tokens(corpus, tokenizer, data, silent)
    kinds = {kind: train_tokenizer(kind, 300, corpus.documents("train")) for kind in ("bpe", "char", "byte")}
    return SimpleNamespace(data=data, kinds=kinds, corpus=corpus, tokenizer=tokenizer, cache=cache)


def numbers(n, tmp_path):
    np.arange(n, dtype="<u2").tofile(tmp_path / "n.bin")
    return np.memmap(tmp_path / "n.bin", "<u2", "r")


def take(stream, n, start=0): return list(islice(stream.iterate(start), n))


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for p, q in zip(one, two) for a, b in zip(p, q))


# -- token files

def test_token_files_hold_the_documents_one_after_the_other(world):
    t, eot = world.tokenizer, world.tokenizer.eot_id
    for split in ("train", "val"):
        expected = [eot] + [i for text in world.corpus.documents(split) for i in [*t.encode(text), eot]]
        assert getattr(world.cache, split).tolist() == expected
        meta, texts = world.cache.meta, list(world.corpus.documents(split))
        assert meta[f"{split}_tokens"] == len(expected) and meta[f"{split}_documents"] == len(texts)
        assert meta[f"{split}_bytes"] == sum(len(text.encode()) for text in texts)
    assert world.cache.meta["tokenizer_hash"] == t.hash and world.cache.meta["fingerprint"] == world.corpus.fingerprint


PARTS = "<|endoftext|>", "<|endof", "text|>", " a word\n", "é東😀", "x" * 3000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), min_size=1), max_size=9), st.sampled_from(["bpe", "char", "byte"]))
def test_joined_documents_have_the_tokens_of_each_alone(world, documents, kind):
    tokenizer, folder = world.kinds[kind], world.data
    pieces = [("val" if i % 3 == 0 else "train", "".join(parts), True) for i, parts in enumerate(documents)]
    count = write_tokens(folder, iter(pieces), tokenizer)
    for split in ("train", "val"):
        texts = [text for where, text, _ in pieces if where == split]
        expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot_id]]
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == [tokenizer.eot_id, *expected]
        assert count[f"{split}_tokens"] == len(expected) + 1 and count[f"{split}_documents"] == len(texts)


def test_only_a_tokenizer_without_other_special_tokens_joins(world):
    assert world.tokenizer.joining.encode("a<|endoftext|>b").ids.count(world.tokenizer.eot_id) == 1
    backend = Backend.from_str(world.tokenizer.json)
    backend.add_special_tokens(["<|user|>"])
    assert Tokenizer(backend.to_str()).joining is None


def test_a_long_document_has_the_tokens_of_the_whole(world, tmp_path):
    text = "\n".join(text for split in ("train", "val") for text in world.corpus.documents(split)) * 60  # over 3 MB
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    wish = SimpleNamespace(dataset=str(tmp_path / "a.txt"), text_column=None, val_fraction=0.5)
    corpus = open_corpus(wish, tmp_path / "d", silent)
    seen = []
    def note(event):
        if event.kind == "progress": seen.append((event.what, event.done, event.total))
    cache = prepare_tokens(corpus, world.tokenizer, tmp_path / "d", note)
    train, val = (next(corpus.documents(split)) for split in ("train", "val"))
    eot = world.tokenizer.eot_id
    assert cache.train.tolist() == [eot, *world.tokenizer.encode(train)]
    assert cache.val.tolist() == [eot, *world.tokenizer.encode(val), eot]
    assert seen[-1][1] == seen[-1][2] == len(text.encode()) and seen == sorted(seen, key=lambda told: told[1])


def test_a_large_vocabulary_takes_four_bytes(): assert token_type(65536) == "<u2" and token_type(65537) == "<u4"


def test_damaged_tokens_are_noticed_and_made_again(world, tmp_path):
    cache = prepare_tokens(world.corpus, world.tokenizer, tmp_path, silent)
    good, said = (cache.folder / "train.bin").read_bytes(), Heard()
    (cache.folder / "train.bin").write_bytes(good[:-2])
    with pytest.raises(DataError, match="train.bin is damaged"): open_tokens(cache.folder)
    assert prepare_tokens(world.corpus, world.tokenizer, tmp_path, said).train.tolist() == cache.train.tolist()
    assert "made again" in said[0] and (cache.folder / "train.bin").read_bytes() == good
    flipped = bytearray(good)
    flipped[100] ^= 4
    (cache.folder / "train.bin").write_bytes(flipped)
    assert open_tokens(cache.folder, full=False).verify() == "train.bin is damaged"
    with pytest.raises(DataError, match="prepare"): open_tokens(cache.folder)
    with pytest.raises(NotFoundError, match="gone"): open_tokens(tmp_path / "tokens-nowhere")
    meta = json.loads((cache.folder / "meta.json").read_text())
    (cache.folder / "meta.json").write_text(json.dumps({**meta, "train_tokens": 1}))
    with pytest.raises(DataError, match="meta.json is damaged"): open_tokens(cache.folder)


# -- windows

@settings(max_examples=200, deadline=None)
@given(st.integers(2, 300), st.integers(1, 40))
def test_each_token_is_a_target_once(n, seq_len):
    if n <= seq_len: return
    windows = Windows(np.arange(n), seq_len)
    x, y = windows.batch(range(len(windows)))
    assert x.shape == y.shape == (len(windows), seq_len) and x.dtype == y.dtype == torch.int64
    kept = y >= 0
    assert sorted(y[kept].tolist()) == list(range(1, n)) and torch.equal(x[kept] + 1, y[kept])
    assert (y[~kept] == -100).all() and (x >= 0).all() and x.is_contiguous() and y.is_contiguous()


def test_a_text_shorter_than_a_window_is_refused():
    for what, fix in (("training", "--seq_len"), ("validation", "--val_fraction")):
        with pytest.raises(DataError, match="fewer than one window") as e: Windows(np.arange(64), 64, what)
        assert what in str(e.value) and fix in str(e.value)
    assert len(Windows(np.arange(65), 64)) == 1


def test_validation_sees_every_window_once_in_order(tmp_path):
    windows = Windows(numbers(1000, tmp_path), 16)
    y = torch.cat([y for _, y in val_batches(windows, 7)]).flatten()
    assert y[y >= 0].tolist() == list(range(1, 1000)) and len(list(val_batches(windows, 7, most=3))) == 3


def test_windows_are_sent_to_a_worker_as_a_path(tmp_path):
    windows = Windows(numbers(60_000, tmp_path), 16)
    sent = pickle.dumps(windows)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[3][0], windows[3][0])


# -- the order

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2 ** 64), st.integers(0, 1000))
def test_an_order_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n), n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert int(permute([n // 2], n, seed, epoch)[0]) == order[n // 2]


def test_all_orders_are_about_equally_likely():
    seen = Counter(tuple(permute(np.arange(4), 4, seed).tolist()) for seed in range(4800))
    assert len(seen) == 24 and 120 < min(seen.values()) and max(seen.values()) < 300  # 200 each, by chance


def test_the_order_never_changes():
    "The order is part of a run's identity: another one would break every resume"
    assert permute(np.arange(10), 10, 1337).tolist() == permute(np.arange(10), 10, 1337 + 2 ** 64).tolist() == ORDER


ORDER = [8, 6, 0, 1, 3, 7, 4, 2, 9, 5]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_token_is_trained_once_an_epoch(tmp_path, shuffle):
    stream = Stream(Windows(numbers(1003, tmp_path), 10), 4, seed=3, shuffle=shuffle)
    n = stream.windows_per_epoch
    assert n == 101
    orders = []
    for epoch in range(3):
        order = stream.order(np.arange(epoch * n, epoch * n + n))
        y = stream.windows.batch(order)[1]
        assert sorted(y[y >= 0].tolist()) == list(range(1, 1003))
        orders.append(order.tolist())
    assert (orders[0] == orders[1]) != shuffle and (orders[0] == list(range(n))) != shuffle


@pytest.mark.parametrize("make", [
    lambda tmp, **kw: Stream(Windows(numbers(997, tmp), 10), 4, seed=5, **kw),
    lambda tmp, **kw: MixStream([Windows(numbers(997, tmp), 10), Windows(np.arange(500), 10)], [2, 1], 4, seed=5,
                                **kw)])
class TestBothStreams:
    def test_seeking_equals_replaying(self, make, tmp_path):
        replayed = take(make(tmp_path), 80)
        for k in (0, 1, 24, 25, 26, 79): assert same(take(make(tmp_path), 1, start=4 * k), replayed[k:k + 1])

    def test_far_away_is_as_near(self, make, tmp_path):
        assert take(make(tmp_path), 1, start=4 * 10 ** 12)[0][0].shape == (4, 10)

    def test_workers_fetch_the_same(self, make, tmp_path):
        expected = take(make(tmp_path), 40, start=8)
        before = torch.random.get_rng_state()
        assert same(take(make(tmp_path, num_workers=2), 40, start=8), expected)
        assert torch.equal(before, torch.random.get_rng_state())  # dropout must not depend on the loader

    def test_ranks_share_one_order(self, make, tmp_path):
        expected = [x for x, _ in take(make(tmp_path), 48, start=12)]
        for world in (1, 2, 4):
            ranks = [take(make(tmp_path, rank=r, world=world), 48 // world, start=12) for r in range(world)]
            dealt = [ranks[k % world][k // world][0] for k in range(48)]
            assert all(torch.equal(a, b) for a, b in zip(dealt, expected))

    def test_the_global_random_state_plays_no_part(self, make, tmp_path):
        one = take(make(tmp_path), 5)
        np.random.seed(1)
        torch.manual_seed(1)
        assert same(take(make(tmp_path), 5), one)


# -- mixes

def test_a_mix_keeps_its_weights_exactly_and_each_corpus_its_epochs():
    parts = [Windows(np.arange(3001), 10), Windows(np.arange(201), 10), Windows(np.arange(101), 10)]
    mix = MixStream(parts, [0.7, 0.2, 0.1], batch_size=2, seed=1)
    order = mix.order(np.arange(10 * BLOCK))
    which = np.searchsorted(mix.windows.ends, order, side="right")
    for block in which.reshape(10, BLOCK): assert np.bincount(block).tolist() == mix.shares == [717, 205, 102]
    for k, part in enumerate(parts):
        seen = np.bincount(order[which == k] - (mix.windows.ends[k - 1] if k else 0), minlength=len(part))
        assert seen.max() - seen.min() <= 1
    assert mix.windows_per_epoch == sum(map(len, parts)) == 330


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=8))
def test_shares_add_up(weights):
    found = shares(weights)
    assert sum(found) == BLOCK and all(abs(f - w / sum(weights) * BLOCK) < 1 for f, w in zip(found, weights))


@pytest.mark.parametrize("weights, least", [((1, 1e-300), "1e-300 of b.txt"), ((1, 1e6), "1 of a.txt")])
def test_a_weight_that_is_never_drawn_is_refused_before_anything_is_read(tmp_path, weights, least):
    data = DataConfig(dataset=[Source(name=name, weight=w) for name, w in zip(("a.txt", "b.txt"), weights)])
    for look in (first_look, open_mix):
        with pytest.raises(DataError, match=f"The weight {least} is less than 1/1024"): look(data, tmp_path)


def test_one_corpus_is_a_plain_stream(world):
    one = training_stream([world.cache], [1.0], 32, 4, seed=2)
    assert type(one) is Stream and same(take(one, 3), take(Stream(Windows(world.cache.train, 32), 4, seed=2), 3))
    assert type(training_stream([world.cache] * 2, [0.5, 0.5], 32, 4)) is MixStream


# -- workers

def test_workers_ignore_signals_and_end_with_the_stream(tmp_path):
    stream = Stream(Windows(numbers(5000, tmp_path), 10), 4, num_workers=2)
    batches = stream.iterate()
    first = next(batches)
    workers, end = [], time.monotonic() + 60
    # the second may still be on its way when the first has answered
    while os.path.exists("/proc") and len(workers) < 2:
        assert time.monotonic() < end
        children = [int(pid) for pid in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
                    if b"python" in open(f"/proc/{pid}/cmdline", "rb").read()]
        workers = [pid for pid in children if _ignores(pid, signal.SIGTERM)]
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    rest = [next(batches) for _ in range(50)]
    assert same([first, *rest], take(Stream(stream.windows, 4), 51))
    batches.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def _ignores(pid, sign):
    line = next(line for line in open(f"/proc/{pid}/status") if line.startswith("SigIgn"))
    return bool(int(line.split()[1], 16) >> (sign - 1) & 1)
