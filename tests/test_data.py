"""Corpora from files and from the library: streamed, split the same way each time, refused with one clear message."""
from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
from types import SimpleNamespace

import pytest
from conftest import instead
from hypothesis import given, settings, strategies as st

from llm_trainer.data.cache import prepared, read_record
from llm_trainer.config import DataConfig, Source
from llm_trainer.data.corpus import count_documents, cut, hash_fraction, threshold
from llm_trainer.data.readers import find_files, scan
from llm_trainer.data.sources import first_look, open_corpus, open_files, open_mix
from hearing import Heard
from llm_trainer.events import silent
from llm_trainer.errors import DataError, NotFoundError



def wish(dataset, **more):
    return SimpleNamespace(**{"dataset": str(dataset), "text_column": None, "val_fraction": 0.1, **more})


def open_quietly(path, data, **more): return open_corpus(wish(path, **more), data, silent)


@pytest.fixture
def data(tmp_path): return tmp_path / "data"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- pieces

@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="ab1 \n\t.é東😀", max_size=30), max_size=20), st.integers(4, 50))
def test_pieces_put_together_are_the_text(parts, size): assert "".join(cut(parts, size)) == "".join(parts)


def test_pieces_stay_small_where_nothing_is_a_good_border():
    pieces = list(cut(["x" * 100_000], size=100))
    assert max(map(len, pieces)) <= 6600 and sum(map(len, pieces)) == 100_000


# -- files

def test_a_txt_file_is_read_to_the_byte(tmp_path, data):
    text = "\ufeffinside: a BOM is only a mark at the beginning\r\nand \ufeff here it stays\r\n" * 3000
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = open_quietly(tmp_path / "a.txt", data)
    assert "".join(d for split in ("train", "val") for d in corpus.documents(split)) == text[1:]


def test_invalid_utf8_is_replaced_counted_and_said(tmp_path, data):
    good = "é�" * 400_000  # real replacement characters are not counted, wherever a read ends
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe ok " + good.encode() + b"\xc3")
    said = Heard()
    corpus = open_corpus(wish(tmp_path / "a.txt"), data, said)
    assert scan(tmp_path / "a.txt")[1] == 3
    assert len(said) == 1 and "3 pieces of invalid UTF-8" in said[0]
    assert next(corpus.documents("train")).startswith("ok \ufffd\ufffd ok é")


def test_folders_are_read_in_order_however_deep(tmp_path, data):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", ".hidden.txt", "a/.git/x.txt", "picture.png"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "t" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert [f.name for f in find_files(tmp_path / "t")] == ["y.jsonl", "z.txt", "b.txt"]
    corpus = open_quietly(tmp_path / "t", data)
    found = "".join(text for _, text, _ in corpus.pieces())
    assert sorted(found) == sorted("a/y.jsonl" "a/z.txt" "b.txt") and corpus.left_out == {"hidden": 2, "png": 1}


def test_jsonl_and_parquet_give_the_same_documents(tmp_path, data):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"story": f"Tale {i}: é\n" * (i % 40), "id": i} for i in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    one, two = open_quietly(jsonl(tmp_path / "b.jsonl", rows), data), open_quietly(tmp_path / "a.parquet", data)
    for split in ("train", "val"): assert list(one.documents(split)) == list(two.documents(split)) != []
    assert one.count == two.count and one.fingerprint != two.fingerprint


def test_a_lone_surrogate_in_json_is_replaced(tmp_path, data):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    corpus = open_quietly(tmp_path / "a.jsonl", data)
    assert "".join(text for _, text, _ in corpus.pieces()) == "a \ufffd b😀"


# -- refusals

@pytest.mark.parametrize("name, content, error, says", [
    ("a.txt", b"", DataError, "holds no text"),
    ("a.txt", b"MZ\0\0\0", DataError, "is not text"),
    ("a.txt", "utf-16".encode("utf-16"), DataError, "iconv"),
    ("a.bin", b"\x01\x00\x02\x00\x03\x00", DataError, "token numbers"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', DataError, "a.jsonl:2"),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', DataError, "a.jsonl:2"),
    ("a.jsonl", b'{"text": "a"}\n{"title": "b"}\n', DataError, "a.jsonl:2 has no column 'text'; it has: title"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', DataError, "a.jsonl:2"),
    ("a.jsonl", b'{"q": "a", "a": "b", "n": 1}\n', DataError, "it has: a, n, q"),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", DataError, "a.jsonl:2"),
    ("a.jsonl", b'{"text": ""}\n\n{"text": null}\n', DataError, "holds no text"),
    ("a.parquet", b"PAR1 not really", DataError, "a.parquet"),
    (None, None, NotFoundError, "no file or folder"),
])
def test_what_is_no_text_is_refused_in_one_message(tmp_path, data, name, content, error, says):
    if name: (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as e: open_quietly(tmp_path / (name or "missing.txt"), data)
    assert says in str(e.value) and 2 <= len(str(e.value).splitlines()) <= 6
    assert not list(data.glob("*.part")) and not list(data.glob(".*.part"))


def test_an_empty_folder_is_refused(tmp_path, data):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with text"): open_quietly(tmp_path / "empty", data)


def test_a_missing_column_names_the_columns(tmp_path, data):
    jsonl(tmp_path / "a.jsonl", [{"text": "x", "title": "y"}])
    with pytest.raises(DataError, match="it has: text, title"):
        open_quietly(tmp_path / "a.jsonl", data, text_column="body")
    corpus = open_quietly(tmp_path / "a.jsonl", data, text_column="title")
    assert "".join(d for s in ("train", "val") for d in corpus.documents(s)) == "y"


# -- the split

def test_documents_are_held_out_by_what_they_say(tmp_path, data):
    texts = [f"document {i}" for i in range(500)]
    one = open_quietly(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), data)
    random.Random(0).shuffle(texts)
    two = open_quietly(jsonl(tmp_path / "b.jsonl", [{"text": t} for t in texts + ["one more"]]), data)
    held = {t for t in texts if hash_fraction(t) < 0.1}
    assert set(one.documents("val")) == set(two.documents("val")) - {"one more"} == held
    assert not set(one.documents("train")) & set(one.documents("val"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, alphabet="abc"), min_size=2, max_size=6, unique=True), st.floats(1e-6, 0.5))
def test_neither_split_is_empty(texts, fraction):
    places = [hash_fraction(t) for t in texts]
    at = threshold({"low": min(places), "high": max(places)}, fraction)
    assert 0 < sum(p < at for p in places) < len(places)


def test_a_single_document_is_cut_at_its_last_part(tmp_path, data):
    text = "".join(f"line {i}, ünïcödé 😀\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = open_quietly(tmp_path / "a.txt", data)
    train, val = "".join(corpus.documents("train")), "".join(corpus.documents("val"))
    assert train + val == text and abs(len(val.encode()) / len(text.encode()) - 0.1) < 1e-4
    assert [last for _, _, last in corpus.pieces("train")].count(True) == 0  # it goes on, in the validation text
    assert [last for _, _, last in corpus.pieces("val")].count(True) == 1


def test_tiny_shakespeare_is_cut_where_everyone_cuts_it(tmp_path, data):
    size = 1_115_394  # characters, all ASCII
    (tmp_path / "a.txt").write_text(("To be, or not to be\n" * 60_000)[:size])
    assert sum(len(p) for _, p, _ in open_quietly(tmp_path / "a.txt", data).pieces("train")) == int(size * 0.9)


def test_the_fingerprint_is_the_text_and_the_split(tmp_path, data):
    for name, text in (("a", "one\n" * 50), ("b", "one\n" * 50), ("c", "one\n" * 49 + "two\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (open_quietly(tmp_path / f"{n}.txt", data).fingerprint for n in "abc")
    assert a == b != c != open_files(tmp_path / "a.txt", data, val_fraction=0.2, emit=silent).fingerprint


def test_a_mix_opens_each_with_its_share(tmp_path, data):
    for name in "ab": (tmp_path / f"{name}.txt").write_text(f"{name} text\n" * 50)
    parts = [{"name": str(tmp_path / "a.txt"), "weight": 3}, {"name": str(tmp_path / "b.txt"), "weight": 1}]
    mix = open_mix(SimpleNamespace(dataset=parts, text_column=None, val_fraction=0.1), data, silent)
    assert [share for _, share in mix] == [0.75, 0.25] and mix[0][0].fingerprint != mix[1][0].fingerprint


def test_each_part_of_a_mix_has_its_own_column_configuration_and_revision(tmp_path, data, monkeypatch):
    jsonl(tmp_path / "a.jsonl", [{"title": f"title {i}", "text": f"text {i}"} for i in range(50)])
    jsonl(tmp_path / "b.jsonl", [{"title": f"title {i}", "body": f"body {i}"} for i in range(50)])
    asked = []
    monkeypatch.setattr("llm_trainer.data.sources.open_hub", lambda name, data, *_: asked.append(
        (name, data.dataset_config, data.dataset_revision, data.text_column)) or mix[0][0])
    local = ({"name": str(tmp_path / "a.jsonl"), "text_column": "title"}, {"name": str(tmp_path / "b.jsonl")})
    hub = ({"name": "some/one", "config": "raw", "revision": "c0ffee"}, {"name": "some/two"})
    def settings(*parts):
        return DataConfig(dataset=[Source(**part) for part in parts], dataset_config="all", text_column="body")
    first_look(settings(*local), data)
    mix = open_mix(settings(*local), data, silent)
    assert [next(corpus.documents("train")).split()[0] for corpus, _ in mix] == ["title", "body"]
    open_mix(settings(*hub), data, silent)
    assert asked == [("some/one", "raw", "c0ffee", "body"), ("some/two", "all", None, "body")]


# -- built in

def test_the_built_in_corpora_are_there_and_stay_the_same(tmp_path):
    one, two = (open_corpus(wish("python-docs-tiny"), tmp_path / d, silent) for d in "ab")
    assert one.fingerprint == two.fingerprint
    assert 40_000 < one.count["bytes"] < 80_000 and one.count["documents"] > 50
    code = open_corpus(wish("python-code"), tmp_path / "a", silent)
    texts = [text for split in ("train", "val") for text in code.documents(split)]
    assert code.count["bytes"] > 5_000_000 and any("def dumps(" in text for text in texts)


# -- caches

def test_damage_is_noticed_and_mended(tmp_path):
    said = Heard()
    one = open_corpus(wish("python-docs-tiny"), tmp_path, silent)
    file = one.files[0]
    whole, folder = file.read_bytes(), file.parent
    flipped = bytearray(whole)
    flipped[1000] ^= 1
    for damage in (lambda: file.write_bytes(flipped), lambda: file.write_bytes(whole[:-9]), file.unlink,
                   (folder / "corpus.json").unlink, lambda: (folder / "corpus.json").write_text("{"),
                   lambda: (folder / "corpus.json").write_text((folder / "corpus.json").read_text().replace("1", "2"))):
        damage()
        said.clear()
        assert open_corpus(wish("python-docs-tiny"), tmp_path, said).fingerprint == one.fingerprint
        assert any("made again" in message for message in said) and file.read_bytes() == whole


def test_an_interrupted_build_leaves_nothing_that_counts(tmp_path):
    def broken(work):
        (work / "half").write_text("half")
        raise RuntimeError("interrupted")
    with pytest.raises(RuntimeError): prepared(tmp_path / "x", "r.json", broken, silent)
    assert read_record(tmp_path / "x", "r.json") == (None, None) and not (tmp_path / ".x.part").exists()
    (tmp_path / ".x.part").mkdir()  # what a kill -9 leaves
    (tmp_path / ".x.part" / "half").write_text("half")
    assert "half" not in prepared(tmp_path / "x", "r.json", lambda work: {}, silent)["files"]


@instead
def test_nothing_in_the_place_of_a_cache_keeps_it_from_being_made(tmp_path, instead):
    def build(work):
        (work / "file").write_text("whole")
        return {}
    for name in ("x", ".x.part"): instead(tmp_path / name)
    record = prepared(tmp_path / "x", "r.json", build, silent)
    assert read_record(tmp_path / "x", "r.json") == (record, None)
    for name in ("r.json", "file"):
        (tmp_path / "x" / name).unlink()
        instead(tmp_path / "x" / name)
        assert prepared(tmp_path / "x", "r.json", build, silent) == record
        assert read_record(tmp_path / "x", "r.json") == (record, None)
    assert sorted(os.listdir(tmp_path)) == ["x"]


def _open_in_a_process(data, log):
    from llm_trainer.data.builtin import open_builtin
    corpus = open_builtin("python-docs-tiny", data, 0.1,
                          lambda event: os.write(log, f"{getattr(event, 'message', '')}\n".encode()))
    os._exit(0 if corpus.count["documents"] > 50 else 1)


def test_two_processes_that_prepare_the_same_corpus_share_the_work(tmp_path):
    read, write = os.pipe()
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_open_in_a_process, args=(tmp_path, write)) for _ in range(4)]
    for p in both: p.start()
    for p in both: p.join()
    os.close(write)
    said = os.fdopen(read).read()
    assert [p.exitcode for p in both] == [0] * 4 and said.count("Collecting") == 1


def test_census_counts_bytes_and_not_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 10, encoding="utf-8")
    count = count_documents([tmp_path / "a.txt"])
    assert count["bytes"] == 20 and count["documents"] == 1 and 0 <= count["low"] == count["high"] < 1
    assert math.nextafter(count["low"], 1) > count["low"]
