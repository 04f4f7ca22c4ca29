"""GGUF files read by the real llama.cpp: the same tokens, the same probabilities, and a word where that can't be."""
from __future__ import annotations

import random

import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
import torch  # noqa: E402
from gguf import GGUFReader  # noqa: E402
from llama import Llama  # noqa: E402
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402

from llm_trainer.config import ModelConfig  # noqa: E402
from llm_trainer.data.tokenizer import EOT, Tokenizer, train_tokenizer  # noqa: E402
from llm_trainer.errors import UsageError  # noqa: E402
from llm_trainer.model.gguf import PRE, SPLIT, write_gguf  # noqa: E402
from llm_trainer.model.huggingface import load_model, save_weights  # noqa: E402
from llm_trainer.model.transformer import GPT  # noqa: E402

TEXT = ("To be, or not to be: that's the question. "
        "It'll rain in 1999, 12345 times… naïve — café, 東京は日本の首都。 ") * 40 + (
        " ".join(f"{w}{i}" for i, w in enumerate("the of and to in is that it was for".split() * 30)))
AWKWARD = [" ", "  ", "a", "Hello, world", "é", "e\u0301", "東京は日本", "👩‍👩‍👧 family", "\n", "\n\n  \n", "\t\tx",
           "a  b   c    d", "it's I'll we'VE DON'T", "12345 6,789.00", EOT,
           "<0x41>", "\x01\x1b\x7f", "\r\n\r\n", "   leading",
           "trailing   ", "naïve—…∑", "\u200b\ufeff", "x" * 50, "a\u00a0b\u3000c", "٣ ½ ² Ⅷ", "مرحبا שלום"]
BOUND = {"f32": 2e-3, "f16": 1e-2, "q8_0": 0.2}  # of a log-probability
KINDS = [(arch, kind) for arch in ("gpt2", "qwen3") for kind in ("bpe", "char", "byte")]


def strings(n: int, seed: int = 0) -> list[str]:
    "Random strings of many alphabets, signs and control characters"
    pick = random.Random(seed)
    alphabets = [(32, 127)] * 3 + [(1, 0x250), (0x370, 0x500), (0x900, 0xa00), (0x3000, 0x30ff), (0x4e00, 0x9fff),
                                   (0x1f300, 0x1f700), (0x2000, 0x2100), (9, 13)]
    found = ["".join(chr(pick.randint(*pick.choice(alphabets))) for _ in range(pick.randint(1, 40))) for _ in range(n)]
    return [" ".join(text) if pick.random() < .3 else text for text in found]


def folder_of(path, tokenizer: Tokenizer, arch: str = "qwen3", rows: int | None = None, steps: int = 0, **how):
    "A model folder, trained for a moment so that it writes whole characters"
    path.mkdir()
    tied, theta = how.pop("tied", True), how.pop("theta", 10_000.0)
    sizes = dict(n_layer=2, n_head=4, n_embd=64, seq_len=96) | how
    torch.manual_seed(1)
    model = GPT(ModelConfig(arch=arch, **sizes), rows or tokenizer.vocab_size, tied, rope_theta=theta)
    optimizer, tokens = torch.optim.AdamW(model.parameters(), 5e-3), torch.tensor(tokenizer.encode(TEXT))
    for _ in range(steps):
        windows = torch.stack([tokens[i:i + 65] for i in torch.randint(len(tokens) - 65, (8,)).tolist()])
        model.loss(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_weights(model, path, tokenizer.eot_id)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def tokenizers(): return {kind: train_tokenizer(kind, 700, [TEXT]) for kind in ("bpe", "char", "byte")}


def imported(*cut, special=(EOT,), ignore_merges=False, normalizer=None, post_processor=None) -> Backend:
    "A tokenizer as others make them: text cut by `cut` before it is merged"
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(cut))
    backend.decoder = decoders.ByteLevel()
    if normalizer: backend.normalizer = normalizer
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if post_processor: backend.post_processor = post_processor(backend)
    return backend


def check(folder, tmp_path):
    "Greedy text and the five likeliest at each place in each format, llama.cpp's beside ours"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ids = tokenizer.encode("To be, or not")
    for quantize, bound in BOUND.items():
        write_gguf(folder, file := tmp_path / f"{quantize}.gguf", quantize)
        with Llama(file) as llama:
            assert [llama.ids(text) for text in AWKWARD[:8]] == [tokenizer.encode(text) for text in AWKWARD[:8]]
            written, likeliest = llama.greedy(ids, 40)
        with torch.no_grad(): logp = model(torch.tensor([ids + written]))[0][0].log_softmax(-1)
        assert len(written) == len(likeliest) == 40
        for place, token, theirs in zip(logp[len(ids) - 1:], written, likeliest):
            assert max(abs(value - place[id].item()) for id, value in theirs.items()) < bound, quantize
            first, second = place.topk(2).values.tolist()
            if quantize != "q8_0" and first - second > 2 * bound: assert place.argmax() == token, quantize


@pytest.mark.parametrize("arch, kind", KINDS)
def test_every_kind_of_model_gives_the_same_probabilities(tokenizers, tmp_path, arch, kind):
    check(folder_of(tmp_path / "model", tokenizers[kind], arch, steps=20,
                    **({} if arch == "gpt2" else {"n_kv_head": 2})), tmp_path)


def test_a_model_from_elsewhere_too(tokenizers, tmp_path):
    "Untied, wide heads, another base of the angles, more rows than tokens, rows that 32 doesn't divide"
    check(folder_of(tmp_path / "model", tokenizers["bpe"], "qwen3", 777, 20, tied=False, theta=1e6, n_kv_head=2,
                    head_size=32, n_hidden=80),
          tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_the_same_tokens_for_any_text(tokenizers, tmp_path, kind):
    tokenizer, file = tokenizers[kind], tmp_path / "x.gguf"
    said = write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file, "f16")
    texts = AWKWARD + strings(2500)
    if kind == "char": texts = [t.replace("\0", "").replace("\u2581", "") or "-" for t in texts]
    assert ("NUL" in "".join(said)) == (kind == "char")
    with Llama(file) as llama: assert [t for t in texts if llama.ids(t) != tokenizer.encode(t)] == []


def cuts(words) -> list:
    "The steps that a line of `PRE` names"
    made = {"ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False),
            "Digits": pre_tokenizers.Digits(individual_digits=True),
            "Bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}
    return [made.get(word) or pre_tokenizers.Split(Regex(word), "isolated") for word in words
            if word != "whole words first"]


@pytest.mark.parametrize("words", PRE, ids=PRE.values())
def test_every_known_way_to_cut_text_is_cut_alike(tmp_path, words):
    tokenizer = Tokenizer(imported(*cuts(words), ignore_merges="whole words first" in words).to_str())
    file = tmp_path / "x.gguf"
    write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file)
    texts = AWKWARD + strings(300, seed=1)
    with Llama(file) as llama: assert [t for t in texts if llama.ids(t) != tokenizer.encode(t)] == []


@pytest.mark.parametrize("how, why", [
    (dict(cut=[pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated"), *cuts(["Bytes"])]),
     "no pre-tokenizer that cuts text"),
    (dict(cut=[pre_tokenizers.ByteLevel(add_prefix_space=True)]), "no pre-tokenizer that cuts text"),
    (dict(cut=cuts(["ByteLevel"]), normalizer=normalizers.Lowercase()), "changes text before it reads it")])
def test_what_would_read_other_tokens_is_refused(tmp_path, how, why):
    tokenizer, file = Tokenizer(imported(*how.pop("cut"), **how).to_str()), tmp_path / "x.gguf"
    with pytest.raises(UsageError, match=why): write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("quantize, factor", [("f16", 1e-9), ("f16", 1e9), ("q8_0", 1e-9), ("q8_0", 1e9)])
def test_numbers_that_a_format_cannot_hold_are_refused_by_the_tensors_name(tokenizers, tmp_path, quantize, factor,
                                                                           recwarn):
    folder, file = folder_of(tmp_path / "model", tokenizers["byte"], n_layer=1), tmp_path / "x.gguf"
    model = load_model(folder)
    with torch.no_grad(): model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(factor)
    save_weights(model, folder, 0)
    with pytest.raises(UsageError, match=f"blk.0.ffn_up.weight doesn't fit {quantize}"):
        write_gguf(folder, file, quantize)
    assert not file.exists() and not [w for w in recwarn if w.category is RuntimeWarning]
    write_gguf(folder, file, "f32")


def test_normalisation_is_said_and_really_missing(tmp_path):
    tokenizer, file = Tokenizer(imported(*cuts([SPLIT % "", "Bytes"]),
                                         normalizer=normalizers.NFC()).to_str()), tmp_path / "x.gguf"
    assert "NFC" in "".join(write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file))
    with Llama(file) as llama:
        assert llama.ids("café") == tokenizer.encode("café") == tokenizer.encode("cafe\u0301")
        assert llama.ids("café") != llama.ids("cafe\u0301")


def test_a_conversation_reads_the_same_there(tmp_path):
    "The template, the marks as tokens, and every token that ends a text go along"
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = imported(*cuts([SPLIT % "", "Bytes"]), special=marks)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer = Tokenizer(backend.to_str(), config={"eos_token": "<|im_end|>", "chat_template": template},
                          ids={"eos_token_id": [2, 0]})
    write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file := tmp_path / "x.gguf")
    text = "<|im_start|>user\nWho's there?<|im_end|>\n"
    with Llama(file) as llama:
        asked = [dict(role="user", content="Who's there?")]
        assert llama.ask("/apply-template", messages=asked)["prompt"].startswith(text)
        marked, plain = llama.ids(text, special=True), llama.ids(text)
        assert marked == tokenizer.encode_marked(text) != plain == tokenizer.encode(text)
    fields = GGUFReader(file).fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot", "bos")] == [2, 0, 2]


def test_what_begins_every_text_begins_it_there(tmp_path):
    "As the tokenizer itself puts it, whatever its config calls bos_token"
    def begins(backend):
        return processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend = imported(*cuts([SPLIT % "", "Bytes"]), special=("<|endoftext|>", "<|im_start|>"), post_processor=begins)
    tokenizer = Tokenizer(backend.to_str(), config={"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    assert write_gguf(folder_of(tmp_path / "model", tokenizer, n_layer=1), file := tmp_path / "x.gguf") == []
    with Llama(file) as llama: assert llama.ids("Who's there?", special=True) == tokenizer.encode_prompt("Who's there?")
    marks = [("<|im_start|>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="$A <|im_start|>", special_tokens=marks)
    tokenizer = Tokenizer(backend.to_str(), config={"eos_token": "<|endoftext|>"})
    said, = write_gguf(folder_of(tmp_path / "after", tokenizer, n_layer=1), tmp_path / "y.gguf")
    assert "0 tokens before a text and 1 after it" in said
