"""Tokenizers: any text comes back, text can't give orders, and `transformers` sees the same numbers."""
from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, normalizers

from hearing import Heard
from llm_trainer.data.builtin import documents, open_builtin
from llm_trainer.data.corpus import cut
from llm_trainer.errors import NotFoundError, UsageError
from llm_trainer.data.tokenizer import EOT, KINDS, Tokenizer, prepare_tokenizer, train_tokenizer

CORPUS = list(documents("python-docs-tiny")) + ["Größe, œuvre, 東京, 😀"]
TOKENIZERS = {kind: train_tokenizer(kind, 600, CORPUS) for kind in KINDS}
STRANGE = ["", " ", "\0", "\r\n\t\x0b\x1b[31m", "<|endoftext|>", "a<|endoftext|>b <|endoftext", "<0x41>", "Ġ",
           "e\u0301 \u200b\ufeff", "👩‍👩‍👧 🇫🇷 𝕳 ﷽", "   spaces   between   ", "\u2028\ufffd\U0010ffff",
           "don't we'll I'd 123 x_y"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("kind", KINDS)
def test_strange_texts_come_back(kind):
    for text in STRANGE: assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_replaced_not_raised(kind):
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode("a\udc80b")) == "a\ufffdb"


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_the_same_numbers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = TOKENIZERS[kind]
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eot_id and len(theirs) == ours.vocab_size
    for text in CORPUS[:50] + STRANGE:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        if text: assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    TOKENIZERS[kind].save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.kind, loaded.vocab_size) == (TOKENIZERS[kind].hash, kind, TOKENIZERS[kind].vocab_size)
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("ä b") == loaded.encode("ä b")


def test_the_pieces_of_a_text_have_the_tokens_of_the_whole():
    text = "\n\n".join(CORPUS) + "   \n  x =  'it''s' \n\n\n" * 300
    for size in (50, 333, 4000):
        pieces = list(cut([text], size))
        assert len(pieces) > 10
        for tokenizer in TOKENIZERS.values():
            assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab'st1.é \n\t\r\u00a0\u3000😀_", max_size=200), st.integers(5, 40))
def test_the_pieces_of_any_text_have_the_tokens_of_the_whole(text, size):
    pieces = list(cut([text], size))  # the text is too short for a cut in a bad place
    bpe = TOKENIZERS["bpe"]
    assert [i for ids in bpe.encode_batch(pieces) for i in ids] == bpe.encode(text)


def test_training_is_the_same_in_another_process(tmp_path):
    code = ("from llm_trainer.data.builtin import documents; from llm_trainer.data.tokenizer import train_tokenizer; "
            "print(train_tokenizer('bpe', 700, documents('python-docs-tiny')).hash)")
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env={"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel, "PATH": ""}).stdout
              for seed, parallel in (("1", "true"), ("2", "false"))}
    assert len(hashes) == 1


def test_a_vocabulary_that_the_text_does_not_support_is_smaller_and_said():
    said = Heard()
    assert train_tokenizer("bpe", 5000, ["aaa bbb"], said).vocab_size < 300
    assert len(said) == 1 and "5,000" in said[0]
    with pytest.raises(UsageError, match="257"): train_tokenizer("bpe", 256, ["a"])


def test_the_byte_tokenizer_is_bytes():
    assert TOKENIZERS["byte"].encode("aé\0") == [97, 0xC3, 0xA9, 0] and TOKENIZERS["byte"].vocab_size == 257


def test_the_char_tokenizer_gives_each_character_of_the_corpus_one_token():
    char = TOKENIZERS["char"]
    assert len(char.encode("Größe 東京")) == 8 and len(char.encode("北")) == 3


def test_a_tokenizer_is_prepared_once(tmp_path):
    corpus = open_builtin("python-docs-tiny", tmp_path, 0.1)
    wish = SimpleNamespace(tokenizer="bpe", vocab_size=400)
    one = prepare_tokenizer(wish, [corpus], tmp_path)
    folder, = tmp_path.glob("tokenizer-*")
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert prepare_tokenizer(wish, [(corpus, 1.0)], tmp_path).hash == one.hash
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("G", "H", 1))
    said = Heard()
    assert prepare_tokenizer(wish, [corpus], tmp_path, said).hash == one.hash and "made again" in said[0]
    by_path = prepare_tokenizer(SimpleNamespace(tokenizer=str(folder), vocab_size=0), [corpus], tmp_path)
    assert by_path.hash == one.hash


def test_a_foreign_tokenizer_keeps_its_numbers(tmp_path):
    "One shaped like Qwen's: another regular expression, normal form C, more special tokens"
    from tokenizers import Regex, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, trainers
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens([EOT, "<|im_start|>"])
    backend.add_tokens(["<tool>"])
    backend.enable_truncation(8)
    backend.save(str(tmp_path / "tokenizer.json"))
    said = {"eos_token": "<|im_start|>", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("A long enough sentence, <tool> and <|im_start|> in it.")
    assert len(ids) > 8 and tokenizer.decode(ids) == "A long enough sentence, <tool> and <|im_start|> in it."
    assert tokenizer.token_bytes(tokenizer.eot_id) == b"" and tokenizer.backend.token_to_id("<|im_start|>") not in ids
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"


def tree(change):
    t = json.loads(TOKENIZERS["bpe"].json)
    change(t)
    return json.dumps(t)


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"{", b"[]", b"[" * 200_000, b'{"model": 1}',
    b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    tree(lambda t: t["model"].update(type="WordPiece")).encode(), tree(lambda t: t.update(decoder=None)).encode(),
    tree(lambda t: t.update(added_tokens=[])).encode().replace(EOT.encode(), b"gone"),
    tree(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 5000}})).encode(),
    tree(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                           "invert": False})).encode(),
    tree(lambda t: t["model"].update(merges=[["x", "not there"]])).encode(),
    tree(lambda t: t["model"]["vocab"].update({"a": "b"})).encode(),
    tree(lambda t: t.update(added_tokens=[{"content": EOT}])).encode(),
])
def test_a_damaged_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError): Tokenizer.load(tmp_path)


def bpe(alphabet=True, split=None, normalizer=None, added=(), **how):
    "A tokenizer as the library makes them, with one thing that is not usual"
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers
    backend, on_bytes = Backend(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*[split] * bool(split), on_bytes])
    backend.decoder = decoders.ByteLevel()
    if normalizer: backend.normalizer = normalizer
    backend.train_from_iterator(["the quick brown fox jumps, 東京 café"] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOT], show_progress=False,
        initial_alphabet=on_bytes.alphabet() if alphabet else [], **how))
    backend.add_tokens(list(added))
    return backend.to_str()


def split(pattern, **how):
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Split(Regex(pattern), "removed", **how)


@pytest.mark.parametrize("make, words", [
    (lambda: bpe(alphabet=False), "loses .* characters of a text, like 'I'"),
    (lambda: tree(lambda t: t["model"]["vocab"].pop("Q")), "loses 1 of .*, like 'Q'"),
    (lambda: bpe(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    (lambda: bpe(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    (lambda: bpe(split=split("🦊")), r"pre_tokenizer \(Split\) takes out"),
    (lambda: bpe(split=split(r"[\w\s]+", invert=True)), "loses .*, like \"'\""),
    (lambda: bpe(added=["é"]), r"like '\\u9019'")])  # takes the number of the byte that GPT-2's table writes so
def test_a_tokenizer_that_loses_characters_is_refused_by_their_names(make, words, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(make())
    capfd.readouterr()
    with pytest.raises(UsageError, match=words): Tokenizer.load(tmp_path)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("how, changes", [
    (dict(split=split(r"\p{L}+|\P{L}+", invert=True)), None), (dict(added=["<tool>", "  ", "õ"]), None),
    (dict(added=[AddedToken("<tool>", lstrip=True, special=False)]), "the blanks beside its added tokens"),
    (dict(normalizer=normalizers.NFC()), "NFC"),
    (dict(normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])),
     "Lowercase, NFKD, StripAccents")])
def test_what_a_tokenizer_says_it_changes_is_no_loss(how, changes):
    assert Tokenizer(bpe(**how)).changes == changes


def test_no_token_is_drawn_at_random():
    drawn = Tokenizer(tree(lambda t: t["model"].update(dropout=0.5)))
    assert {tuple(f(CORPUS[0])) for f in (drawn.encode, drawn.encode_marked) for _ in range(5)} == {
        tuple(TOKENIZERS["bpe"].encode(CORPUS[0]))}


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as f: f.truncate(10 << 30)
    with pytest.raises(UsageError, match="too large"): Tokenizer.load(tmp_path)
    with pytest.raises(NotFoundError): Tokenizer.load(tmp_path / "nowhere")
