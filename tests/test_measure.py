"""`evaluate`: every token once, and the same figures as Hugging Face."""
import math
import shutil

import numpy as np
import pytest
import torch

from hearing import Heard
from llm_trainer.config import ModelConfig
from llm_trainer.events import silent
from llm_trainer.errors import UsageError
from llm_trainer.training.evaluate import measure, strided, words
from llm_trainer.model.transformer import GPT
from llm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from llm_trainer.training.trainer import evaluate, metrics, token_lengths
from llm_trainer.model.huggingface import load_model, save_weights
from llm_trainer.workspace import init


@pytest.mark.parametrize("n", [2, 9, 64, 65, 100])
@pytest.mark.parametrize("context, stride", [(8, 8), (8, 3), (8, 1), (64, 16)])
def test_every_token_but_the_first_is_predicted_once_in_order(n, context, stride):
    tokens = np.arange(n, dtype=np.uint16)
    y = torch.cat([y.flatten() for _, y in strided(tokens, context, stride, batch_size=3)])
    assert y[y >= 0].tolist() == list(range(1, n))


def test_words_do_not_depend_on_where_blocks_end():
    tokenizer, text = train_tokenizer("byte", 257, ()), "one two\n three  four five"
    ids = np.array([*tokenizer.encode(text), tokenizer.eot_id, *tokenizer.encode("six")])
    assert {words(ids, tokenizer, block) for block in (1, 2, 3, 7, 1000)} == {6}


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def folder(request, tmp_path_factory):
    "A Hugging Face folder with random weights and a byte tokenizer"
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    tokenizer = train_tokenizer("byte", 257, ())
    model = GPT(ModelConfig(arch=request.param, n_layer=2, n_head=2, n_embd=32, seq_len=32), tokenizer.vocab_size)
    for p in model.parameters(): torch.nn.init.normal_(p, 0, 0.3)
    save_weights(model, place, tokenizer.eot_id)
    tokenizer.save(place)
    return place


@pytest.mark.parametrize("stride", [32, 8])
def test_equal_to_hugging_face(folder, tmp_path, stride):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    text = "The function returns a list of names. " * 20
    (tmp_path / "text.txt").write_text(text)
    found = measure(folder, init(tmp_path), {}, str(tmp_path / "text.txt"), stride, "cpu", emit=silent)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer(text, return_tensors="pt").input_ids[0]
    eot = torch.tensor([tokenizer.eos_token_id])
    ids, nats, end = torch.cat([eot, ids, eot]), [], 1  # a document stands between two of them
    for at in range(0, len(ids), stride):  # Hugging Face's recipe for models of fixed length
        window = ids[at:at + 33]
        with torch.no_grad(): logits = model(window[None, :-1]).logits[0]
        each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        nats += each[end - at - 1:].tolist()  # without those that the windows before predicted
        end = at + len(window)
        if end == len(ids): break
    assert found["tokens"] == len(nats) == len(ids) - 1 and found["stride"] == stride
    assert found["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats[:-1]) / math.log(2) / len(text), abs=1e-4)
    assert math.log(found["word_perplexity"]) == pytest.approx(sum(nats) / len(text.split()), rel=1e-4)


def test_a_file_is_measured_whole(folder, tmp_path):
    text = "The function returns a list of names. " * 20
    (tmp_path / "text.txt").write_text(text)
    told = []
    found = measure(folder, init(tmp_path), {}, str(tmp_path / "text.txt"), device="cpu",
                    emit=lambda event: told.append((event.what, event.done)) if event.kind == "progress" else None)
    assert told[-1] == ("measuring", found["tokens"])
    assert found["bytes"] == len(text) and found["tokens"] == len(text) + 1  # and one <|endoftext|>
    assert found["words"] == 140 and found["split"] == "all"
    with pytest.raises(UsageError, match="--data"): measure(folder, init(tmp_path), {}, emit=silent)
    with pytest.raises(UsageError, match="--stride"): measure(folder, init(tmp_path), {}, "x", stride=33, emit=silent)


@pytest.mark.parametrize("nats, found", [(2., math.exp(2)), (709., math.exp(709)), (800., math.inf),
                                         (math.inf, math.inf), (math.nan, math.nan)])
def test_a_perplexity_is_never_capped(nats, found):
    assert metrics(nats, 0, 1, 0)["perplexity"] == pytest.approx(found, nan_ok=True)


def test_figures_of_a_changed_text_are_said_to_be(folder, tmp_path):
    from tokenizers import normalizers
    shutil.copytree(folder, place := tmp_path / "model")
    tokenizer, said = Tokenizer.load(folder), Heard()
    tokenizer.backend.normalizer = normalizers.Lowercase()
    (place / "tokenizer.json").write_text(tokenizer.backend.to_str())
    (tmp_path / "text.txt").write_text("The function RETURNS a list. " * 20)
    measure(place, init(tmp_path), {}, str(tmp_path / "text.txt"), device="cpu", emit=said)
    assert "changes a text before it reads it (Lowercase)" in said[0]


def test_measuring_keeps_no_graph():
    class Watched(torch.nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return torch.zeros(*x.shape, 8), None
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert evaluate(Watched(), [(ids, ids)], torch.ones(8))["loss"] == pytest.approx(math.log(8))


def test_a_stride_gives_more_context_and_the_same_tokens(folder):
    model, lengths = load_model(folder), token_lengths(Tokenizer.load(folder))
    tokens = np.frombuffer(b"for x in range(10): print(x)\n" * 9, np.uint8)
    whole, half = (evaluate(model, strided(tokens, 32, stride, 4), lengths) for stride in (32, 16))
    assert whole["tokens"] == half["tokens"] == len(tokens) - 1 and whole["bytes"] == half["bytes"]
