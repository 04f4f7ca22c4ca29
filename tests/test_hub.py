"""Datasets of the hub over real HTTP: a small hub on this machine, a fresh process and a fresh cache for each."""
from __future__ import annotations

import json

import pytest
import warm

pytest.importorskip("datasets")
from hub_server import REVISION, Hub  # noqa: E402

from llm_trainer.data.hub import KNOWN, articles  # noqa: E402

OPEN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from llm_trainer.data.sources import open_corpus
for wish in json.loads(sys.argv[1]):
    said = []
    emit = lambda event: event.kind == "note" and said.append(event.message)
    try:
        corpus = open_corpus(SimpleNamespace(**wish), Path(sys.argv[2]), emit)
        found = dict(train=list(corpus.documents("train")), val=list(corpus.documents("val")), rule=corpus.rule,
                     fingerprint=corpus.fingerprint, bytes=[corpus.count["bytes"], corpus.val_bytes])
    except Exception as e: found = dict(error=type(e).__name__, code=getattr(e, "exit_code", None), message=str(e))
    print(json.dumps({**found, "said": said, "library": "datasets" in sys.modules}))
"""
TALES = {"train": [{"id": i, "story": f"Tale {i} of é and 東京."} for i in range(300)],
         "validation": [{"id": 0, "story": "A tale held out."}]}


LOADED = ("llm_trainer.data.sources", "pandas", "pyarrow.parquet", "httpx", "fsspec",
          "dill")  # not datasets, which reads what is below


def opened(url, folder, *datasets, **wish) -> list[dict]:
    "What a process of its own found when it opened these corpora"
    defaults = dict(dataset_config=None, dataset_revision=None, text_column=None, val_fraction=0.1, offline=False,
                    streaming=False)
    env = dict(HF_ENDPOINT=url, HF_HOME=str(folder / "hf"), HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    wishes = [{**defaults, **wish, **(d if isinstance(d, dict) else {"dataset": d})} for d in datasets]
    ran = warm.program(folder, json.dumps(wishes), str(folder / "data"), code=OPEN, loaded=LOADED, **env)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def opening(url, folder, dataset, **wish) -> dict: return opened(url, folder, dataset, **wish)[0]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add("someone/tales", TALES)
        hub.add("someone/plain", {"train": [{"text": f"line {i}"} for i in range(100)]})
        for config in ("one", "two"):
            hub.add("someone/both", {"train": [{"text": f"{config} {i}"} for i in range(20)]}, config)
        hub.add("someone/chat", {"train": [{"question": "a", "answer": "b"}]})
        hub.add("someone/parts", {"left": [{"text": "a"}], "right": [{"text": "b"}]})
        yield hub


def test_a_dataset_is_fetched_once_and_then_ours_and_streaming_gives_the_same(hub, tmp_path):
    first = opening(hub.url, tmp_path, "someone/tales")
    assert first["train"] == [row["story"] for row in TALES["train"]] and first["val"] == ["A tale held out."]
    assert first["rule"] == "own" and first["library"] and "someone/tales" in first["said"][0]
    before = len(hub.requests)
    again = opening(hub.url, tmp_path, "someone/tales", offline=True)
    assert len(hub.requests) == before and not again["library"] and again["said"] == []
    assert again["fingerprint"] == first["fingerprint"] and again["train"] == first["train"]
    file, = (tmp_path / "data").glob("*/train.jsonl")
    file.write_bytes(file.read_bytes().replace(b"Tale 7", b"Tail 7", 1))  # damaged: it is fetched again
    mended = opening(hub.url, tmp_path, "someone/tales")
    assert mended["fingerprint"] == first["fingerprint"] and any("made again" in said for said in mended["said"])
    (tmp_path / "b").mkdir()
    streamed = opening(hub.url, tmp_path / "b", "someone/tales", streaming=True)
    assert streamed["fingerprint"] == first["fingerprint"] and streamed["train"] == first["train"]


def test_names_columns_and_configurations(hub, tmp_path):
    wishes = {
        "held out": dict(dataset="someone/plain"), "config": dict(dataset="someone/both", dataset_config="two"),
        "which config": dict(dataset="someone/both"),
        "wrong config": dict(dataset="someone/both", dataset_config="tow"),
        "which column": dict(dataset="someone/chat"), "column": dict(dataset="someone/chat", text_column="answer"),
        "no text": dict(dataset="someone/tales", text_column="id"), "splits": dict(dataset="someone/parts"),
        "unknown": dict(dataset="someone/nothing"), "typo": dict(dataset="python-dosc"),
        "revision": dict(dataset="someone/plain", dataset_revision=REVISION)}
    found = dict(zip(wishes, opened(hub.url, tmp_path, *wishes.values())))
    size = {split: sum(map(len, found["held out"][split])) for split in ("train", "val")}
    assert found["held out"]["rule"] == "share 0.1" and sum(size.values()) == found["held out"]["bytes"][0]
    assert {text[:3] for text in found["config"]["train"]} == {"two"} and found["column"]["train"] == []  # one document
    assert "one, two" in found["which config"]["message"] and "--dataset_config" in found["wrong config"]["message"]
    assert "answer, question" in found["which column"]["message"]
    assert "'id' holds no text" in found["no text"]["message"]
    assert "left, right" in found["splits"]["message"]
    assert "no dataset someone/nothing" in found["unknown"]["message"] and found["unknown"]["code"] == 3
    assert "Did you mean python-docs?" in found["typo"]["message"]
    assert found["revision"]["train"] == found["held out"]["train"]
    assert all("said" in result and len(result.get("message", "").splitlines()) <= 5 for result in found.values())


SAYS = {"500": "an error (500)", "gone": "can't be reached", "slow": "too slow", "cut": "broke off"}


@pytest.mark.parametrize("fault", [
    "500", "gone", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("slow", "cut"))])
def test_a_hub_that_fails_is_told_in_one_message(tmp_path, fault):
    "What doesn't answer at all is reported at once; where a download breaks off the library tries some seconds more"
    with Hub() as hub:
        hub.add("someone/tales", TALES)
        hub.fault = fault
        if fault == "gone": hub.__exit__()
        found = opening(hub.url, tmp_path, "someone/tales")
        assert found["error"] == "HubError" and found["code"] == 1 and SAYS[fault] in found["message"]
        assert "quickstart" in found["message"] and "--offline" in found["message"]
        assert not list((tmp_path / "data").glob("*/train.jsonl"))
        assert len(hub.requests) <= 2 or fault in ("slow", "cut")
        hub.fault = None  # the network is back
        if fault != "gone": assert len(opening(hub.url, tmp_path, "someone/tales")["train"]) == 300


# -- WikiText-2

def wikitext(splits: dict[str, int]) -> dict:
    "As many rows as there should be, of two articles each"
    def page(title):
        return ["", f" = {title} = \n", "", " A text , with = in it .\n", "", " = = A section = = \n", "", " More .\n"]
    def row(split, n):
        return (page(f"First {split}") + [" A line of text .\n"] * (n - 16) + page(f"Second {split}"))[:n]
    return {split: [{"text": text} for text in row(split, n)] for split, n in splits.items()}


def test_wikitext_is_pinned_counted_and_joined_to_articles(tmp_path):
    known = KNOWN["wikitext-2"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Hub() as whole, Hub() as short:
        whole.add(known.repo, wikitext(known.rows), known.config)
        short.add(known.repo, wikitext({**known.rows, "train": 36000}), known.config)
        good, bad = opening(whole.url, tmp_path / "a", "wikitext-2"), opening(short.url, tmp_path / "b", "wikitext-2")
        assert any(f"/resolve/{known.revision}/" in request for request in whole.requests)
        assert not any("/resolve/main/" in request for request in whole.requests)
        same = opening(whole.url, tmp_path / "a", known.repo, dataset_config=known.config, offline=True)
    assert [text[:17] for text in good["train"]] == [" = First train = ", " = Second train ="]
    assert "\n = = A section = = \n" in good["train"][0] and len(good["val"]) == 2 and good["rule"] == "own"
    assert same["fingerprint"] == good["fingerprint"]
    assert bad["error"] == "HubError" and "36718" in bad["message"] and "36000" in bad["message"]


def test_only_a_title_between_empty_lines_begins_an_article():
    rows = ["", " = A = \n", "", "x\n", " = not a title = \n", "y\n", "", " = = Section = = \n", "", "z\n", "",
            " = B = \n", ""]
    found = list(articles(rows))
    assert [text.splitlines()[0] for text in found] == [" = A = ", " = B = "]
    assert found[0] == " = A = \n\nx\n = not a title = \ny\n\n = = Section = = \n\nz\n" and list(articles([])) == []
