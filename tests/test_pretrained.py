"""Models from elsewhere: computed as Transformers computes them, or refused; names of a hub; tokens stay the same."""
from __future__ import annotations

import atexit
import dataclasses
import inspect
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import program  # noqa: E402
from hub_server import REVISION, Hub  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import AddedToken, Regex, decoders, models, normalizers  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import pre_tokenizers, processors, trainers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

from llm_trainer import workspace  # noqa: E402
from llm_trainer.cli.commands import main  # noqa: E402
from llm_trainer.config import ModelConfig  # noqa: E402
from llm_trainer.data.batches import write_tokens  # noqa: E402
from llm_trainer.data.tokenizer import Tokenizer, read_otherwise, train_tokenizer  # noqa: E402
from llm_trainer.errors import CheckpointError, LLMTrainerError, UsageError  # noqa: E402
from llm_trainer.generation.protocol import Model, completion  # noqa: E402
from llm_trainer.generation.sampler import prompt_ids  # noqa: E402
from llm_trainer.generation.filters import Sampling  # noqa: E402
from llm_trainer.model.gguf import SPLIT  # noqa: E402
from llm_trainer.model.huggingface import load_model, save_weights, write_config  # noqa: E402
from llm_trainer.model.transformer import GPT  # noqa: E402
from llm_trainer.runs.export import copy_folder  # noqa: E402

transformers.utils.logging.disable_progress_bar()
TOKENS = torch.arange(3, 60)[None]
TEXT = "To be, or not to be: that's the question. It'll rain in 1999… naïve café 東京 " * 40


# ---- every attribute of a config.json: the same logits, or a refusal

BASE = dict(
    gpt2=dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64),
    qwen3=dict(model_type="qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=16, vocab_size=100, max_position_embeddings=64))
SAME = dict(
    gpt2=[{}, dict(n_inner=48), dict(tie_word_embeddings=False), dict(reorder_and_upcast_attn=True), dict(n_ctx=1024),
          dict(torch_dtype="bfloat16"), dict(attn_pdrop=.3), dict(pad_token_id=3), dict(eos_token_id=[1, 2]),
          dict(summary_type="x"),
          dict(logit_scale=3.), dict(is_decoder=True), dict(activation_function="gelu_pytorch_tanh"),
          dict(num_attention_heads=4)],
    qwen3=[{}, dict(tie_word_embeddings=True), dict(rope_theta=1e6),
           dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
           dict(rope_scaling=dict(rope_type="default"), rope_theta=77.),
           dict(rope_parameters=dict(rope_theta=33.), rope_theta=44.),
           dict(rope_parameters=None, rope_theta=44.), dict(sliding_window=4), dict(max_window_layers=0),
           dict(rms_norm_eps=1e-2),
           dict(num_key_value_heads=None), dict(attention_dropout=.5), dict(hidden_act="swish"),
           dict(layer_types=["full_attention"] * 2),
           dict(mlp_bias=True), dict(original_max_position_embeddings=8), dict(pretraining_tp=2)])
REFUSED = dict(
    gpt2=[dict(activation_function="gelu"), dict(activation_function="gelu_fast"), dict(layer_norm_epsilon=1e-3),
          dict(scale_attn_weights=False), dict(scale_attn_by_inverse_layer_idx=True), dict(add_cross_attention=True),
          dict(quantization_config=dict(quant_method="gptq")), dict(is_encoder_decoder=True),
          dict(chunk_size_feed_forward=4),
          dict(per_layer_config={0: dict(layer_norm_epsilon=.1)}), dict(auto_map=dict(AutoModelForCausalLM="x.Y")),
          dict(is_causal=False), dict(sliding_window=4), dict(attention_chunk_size=4),
          dict(transformers_weights="other.safetensors"), dict(layer_types=["sliding_attention", "full_attention"]),
          dict(attribute_map={"n_head": "foo"}), dict(model_type="llama"), dict(model_type=["gpt2"])],
    qwen3=[dict(attention_bias=True), dict(is_causal=False), dict(attention_chunk_size=4),
           dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
           dict(hidden_act="gelu"),
           dict(partial_rotary_factor=.5), dict(layer_types=["sliding_attention", "full_attention"]),
           dict(rope_scaling=dict(type="linear", factor=2.)),
           dict(rope_parameters=dict(rope_type="dynamic", factor=2., rope_theta=1e4)),
           dict(rope_scaling=dict(type="linear", factor=2.), rope_parameters=dict(rope_type="default", rope_theta=1e4)),
           dict(rope_scaling=dict(rope_type="yarn", factor=4., original_max_position_embeddings=16)),
           dict(rope_parameters=dict(rope_theta=1e4, factor=8.)),
           dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))),
           dict(head_dim=None), dict(quantization_config=dict(quant_method="fp8")), dict(num_hidden_layers="many")])


def theirs(folder, config: dict):
    "A model of Transformers' with the config as it is written; its folder says the config in just these words"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def difference(folder, model) -> float: return (load_model(folder)(TOKENS)[0] - model(TOKENS).logits).abs().max().item()


@pytest.mark.parametrize("kind", BASE)
def test_what_is_read_is_computed_alike(kind, tmp_path):
    "Whatever its config.json says, leaves out, or spells as older versions did"
    for change in SAME[kind]: assert difference(tmp_path, theirs(tmp_path, BASE[kind] | change)) < 1e-4, change
    for missing in ("n_positions", "n_layer") if kind == "gpt2" else ("head_dim", "max_position_embeddings"):
        config = {k: v for k, v in BASE[kind].items() if k != missing}
        assert difference(tmp_path, theirs(tmp_path, config)) < 1e-4, missing


@pytest.mark.parametrize("kind", BASE)
def test_what_would_be_computed_otherwise_is_refused(kind, tmp_path):
    save_weights(GPT(ModelConfig(arch=kind, n_layer=2, n_head=2, n_embd=32, seq_len=64), 100), tmp_path)
    for change in REFUSED[kind]:
        (tmp_path / "config.json").write_text(json.dumps(BASE[kind] | change))
        with pytest.raises(UsageError): print(change, load_model(tmp_path))


@pytest.mark.parametrize("kind", BASE)
def test_a_head_of_its_own_is_not_passed_over(kind, tmp_path):
    theirs(tmp_path, BASE[kind] | dict(tie_word_embeddings=False))
    (tmp_path / "config.json").write_text(json.dumps(BASE[kind] | dict(tie_word_embeddings=True)))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"): load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = next(t for name, t in tensors.items()
                                     if name.endswith(("wte.weight", "embed_tokens.weight"))).clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path).eval()) < 1e-4


@pytest.mark.parametrize("kind", BASE)
def test_shards_and_names_without_the_trunk_are_read(kind, tmp_path):
    model = theirs(tmp_path, BASE[kind] | dict(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert difference(tmp_path / "shards", model) < 1e-4
    tensors = {k.removeprefix("transformer.").removeprefix("model."): v for k,
               v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(tmp_path, model) < 1e-4


@pytest.mark.parametrize("kind", BASE)
def test_a_shorter_context_is_the_beginning_of_the_longer_one(kind, tmp_path):
    model = theirs(tmp_path, BASE[kind])
    short = load_model(tmp_path, seq_len=16)
    with torch.no_grad(): assert (short(TOKENS[:, :16])[0] - model(TOKENS[:, :16]).logits).abs().max() < 1e-4
    save_weights(short, tmp_path)
    assert load_model(tmp_path).config.seq_len == AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 16
    with pytest.raises(UsageError, match="reads 16 tokens"): load_model(tmp_path, seq_len=17)


@pytest.mark.parametrize("kind", BASE)
def test_of_two_sets_of_weights_the_one_file_is_read_and_exported(kind, tmp_path):
    "As Transformers does, whichever is newer"
    model, folder = theirs(tmp_path / "model", BASE[kind]), tmp_path / "model"
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .3)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in (tmp_path / "shards").glob("model*"): shutil.copy(file, folder)
    assert difference(folder, AutoModelForCausalLM.from_pretrained(folder).eval()) < 1e-4
    copy_folder(folder, tmp_path / "out", "")
    assert [p.name for p in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert difference(folder, model) < 1e-4
    copy_folder(folder, tmp_path / "apart", "")
    assert difference(tmp_path / "apart", model) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", BASE)
def test_a_weight_that_is_no_number_is_refused_by_its_name(kind, value, tmp_path):
    theirs(tmp_path, BASE[kind])
    tensors = load_file(tmp_path / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"): load_model(tmp_path)


def test_a_null_says_nothing_and_a_number_that_makes_no_logit_is_refused(tmp_path):
    model = theirs(tmp_path, BASE["qwen3"])
    save_weights(load_model(tmp_path), tmp_path)  # says everything there is to say
    config = json.loads((tmp_path / "config.json").read_text())

    def read(**change):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        return load_model(tmp_path)
    with torch.no_grad(): assert (read(rope_parameters=None)(TOKENS)[0] - model(TOKENS).logits).abs().max() < 1e-4
    for name, value, words in [
            ("head_dim", None, "doesn't describe a qwen3 model: head_dim is null$"),
            ("rms_norm_eps", -1.0, "rms_norm_eps is -1.0"),
            ("rope_parameters", {"rope_type": "default", "rope_theta": -1e4}, "rope_theta is -10000.0"),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_theta is 0")]:
        with pytest.raises(UsageError, match=words): read(**{name: value})


def test_quantized_weights_adapters_and_pickles_are_told_apart(tmp_path):
    model = theirs(tmp_path, BASE["gpt2"])
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v.to(torch.int8) if v.ndim == 2 else v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="quantized"): load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickles") as refused: load_model(tmp_path)
    train_tokenizer("byte", 257, ()).save(tmp_path)
    line = shlex.split(str(refused.value).splitlines()[-1])  # the line of the message, as a person runs it
    ran = subprocess.run([sys.executable, *line[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert difference(tmp_path / line[-1], model) < 1e-4 and Tokenizer.load(tmp_path / line[-1]).vocab_size == 257
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="LoRA"): load_model(tmp_path)


# ---- any config.json at all: drawn from what the class has and from what the model's code reads

@cache
def fields_of(kind: str) -> dict:
    "Every attribute that a config of this kind has with its default, and those that its code looks for besides"
    from transformers import GPT2Config, Qwen3Config, cache_utils, masking_utils, modeling_rope_utils
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.qwen3 import modeling_qwen3
    config, code = dict(gpt2=(GPT2Config, modeling_gpt2), qwen3=(Qwen3Config, modeling_qwen3))[kind]
    found = {name: getattr(config(), name) for name in config().to_dict()}
    found |= {f.name: f.default if f.default is not dataclasses.MISSING else None for f in dataclasses.fields(config)
              if f.name not in found}
    for module in code, cache_utils, masking_utils, modeling_rope_utils:
        for name in re.findall(r"getattr\(\w*\.?\w*config, \"(\w+)\"", inspect.getsource(module)):
            found.setdefault(name, None)
    return {name: value for name, value in found.items() if not name.startswith("_") and name not in (
        "model_type", "transformers_version", "auto_map", "architectures", "id2label", "label2id", "num_labels")}


ODD = {  # of attributes whose values mean something: these, too
    "hidden_act": ["silu", "gelu", "relu", "swish", "gelu_new"], "rms_norm_eps": [1e-6, 1e-5, 1e-2],
    "activation_function": ["gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu"],
    "dtype": ["float16", "bfloat16"],
    "layer_types": [["full_attention"] * 2, ["sliding_attention", "full_attention"], ["full_attention"]],
    "rope_parameters": [dict(rope_type="default", rope_theta=5e5), dict(rope_theta=77.), dict(
        rope_type="linear", factor=2., rope_theta=1e4), dict(rope_type="yarn", factor=4., rope_theta=1e4,
        original_max_position_embeddings=16), dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=.5)],
    "rope_scaling": [dict(type="linear", factor=2.), dict(rope_type="dynamic", factor=2.), None],
    "rope_theta": [1e4, 1e6, 77.], "partial_rotary_factor": [.5, 1.], "head_dim": [8, 16, 24],
    "num_key_value_heads": [1, 2, 4, None], "sliding_window": [4, None], "attention_chunk_size": [4, None],
    "max_window_layers": [0, 1, 28], "n_inner": [48, 128, None], "layer_norm_epsilon": [1e-5, 1e-6, 1e-3],
    "vocab_size": [100, 104], "n_positions": [64, 80], "max_position_embeddings": [64, 80, 4096],
    "n_embd": [32, 48], "hidden_size": [32, 64], "intermediate_size": [64, 48], "n_layer": [1, 3],
    "num_hidden_layers": [1, 2, 3], "n_head": [1, 2, 4], "num_attention_heads": [2, 4, 8],
    "quantization_config": [dict(quant_method="gptq", bits=4)],
    "per_layer_config": [{"0": dict(layer_norm_epsilon=.1)}],
    "is_causal": [True, False], "is_decoder": [True, False], "tie_encoder_decoder": [True],
    "pruned_heads": [{"0": [1]}],
    "eos_token_id": [1, [1, 2], 5000], "pad_token_id": [0, 3], "chunk_size_feed_forward": [0, 4],
    "original_max_position_embeddings": [16], "use_bidirectional_attention": [True, False],
    "attn_implementation": ["eager", "sdpa"], "problem_type": [None], "classifier_dropout": [.5]}


def drawn_config(kind: str, rng: random.Random) -> dict:
    "One to three attributes with values of their own, as JSON has them"
    known = fields_of(kind) | {name: None for name in ("rope_scaling", "rope_theta", "is_decoder", "is_causal",
                                                       "pruned_heads", "attn_implementation", "partial_rotary_factor",
                                                       "use_bidirectional_attention", "n_ctx", "head_dim")}

    def value(name):
        if name in ODD: return rng.choice(ODD[name])
        if isinstance(known[name], bool): return rng.random() < .5
        if isinstance(known[name], int): return rng.choice([0, 1, 2, known[name] + 1])
        if isinstance(known[name], float): return rng.choice([0., .1, known[name] * 3])
        return rng.choice([None, known[name], 1, True, False, "x", .5, [1], {"0": 1}])
    return {name: value(name) for name in rng.sample(sorted(known), rng.choice([1, 1, 2, 3]))}


@torch.no_grad()
def both_ways(model, config: dict) -> torch.Tensor:
    "Their logits of a text read at once, and of the same read token by token behind a cache: a batch of two"
    tokens = TOKENS[:, :config.get("n_positions", 64)]
    at_once = model(tokens, use_cache=False, return_dict=True).logits
    cache, steps = DynamicCache(config=model.config), []
    for i in range(tokens.shape[1]):
        steps.append(model(tokens[:, i:i + 1], past_key_values=cache, use_cache=True, return_dict=True).logits)
    return torch.cat([at_once, torch.cat(steps, dim=1)], dim=0)


@pytest.mark.filterwarnings("ignore:`rope_scaling`")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))])
@pytest.mark.parametrize("kind", BASE)
def test_any_config_is_computed_alike_or_refused_by_name(kind, part, tmp_path):
    rng, seen = random.Random(f"{kind} {part}"), Counter()
    for _ in range(30):
        change = drawn_config(kind, rng)
        config = BASE[kind] | change
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        try:
            model = theirs(tmp_path, config)
            wanted = both_ways(model, config)
        except Exception: seen["nobody's"] += 1  # they can't make such a model, or not run it
        else:
            try: ours = load_model(tmp_path)
            except LLMTrainerError as e:
                named = str(e)
                assert any(name in named or NAMED_AS.get(name, name) in named for name in change), (change, named)
                seen["refused"] += 1
            else:
                with torch.no_grad(): found = ours(TOKENS[:, :wanted.shape[1]])[0]
                assert (found - wanted).abs().max() < 1e-3, change
                seen["equal"] += 1
    assert seen["equal"] > 9 and seen["refused"] > 1, seen


NAMED_AS = {"rope_scaling": "rope_parameters", "partial_rotary_factor": "rope_parameters",
            "use_sliding_window": "layer_types", "original_max_position_embeddings": "rope_parameters"}


def older(folder):
    "The same folder as it was written before there was a tokenizer.json"
    tree = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tree["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, tree["merges"])]) + "\n")
    (folder / "tokenizer.json").unlink()
    return folder


def in_this_process(line: str, monkeypatch) -> str:
    "Runs a line of a message, python -c CODE …; gives its last word"
    _, *argv = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [argv[0], *argv[2:]])
    exec(argv[1], {})
    return argv[-1]


def test_a_vocabulary_of_an_older_form_is_refused_with_the_line_that_writes_it_anew(tmp_path, monkeypatch):
    before = chat_folder(tmp_path / "before", "gpt2")
    shutil.copytree(before, tmp_path / "old one")
    with pytest.raises(UsageError, match="as older programs wrote it") as refused:
        Tokenizer.load(older(tmp_path / "old one"))
    monkeypatch.chdir(tmp_path)
    anew = tmp_path / in_this_process(str(refused.value).splitlines()[-1], monkeypatch)
    assert Tokenizer.load(anew).encode(TEXT) == Tokenizer.load(before).encode(TEXT)
    assert difference(anew, AutoModelForCausalLM.from_pretrained(before).eval()) < 1e-4


# ---- tokens: a conversation reads the same before and after

CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}{{'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
         "m['content'] | trim + '<|eot_id|>'}}{% endfor %}")
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
END = dict(__type="AddedToken", content="<|im_end|>", special=True, lstrip=False, rstrip=False, normalized=False,
           single_word=False)
FOLDERS = {  # special tokens, the way to cut, tokenizer_config.json, the ids that end a text
    "qwen": (MARKS, SPLIT % "", dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>",
                                     pad_token="<|endoftext|>", bos_token=None,
             unk_token=None, add_bos_token=False, split_special_tokens=False, errors="replace", chat_template=CHATML),
             [2, 0]),
    "jinja": (MARKS, SPLIT % "", dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", chat_template="old"),
              2),
    "llama": (HEADERS, SPLIT % "{1,3}", dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
              eos_token="<|eot_id|>", clean_up_tokenization_spaces=True, chat_template=LLAMA), [1, 2]),
    "several": (MARKS, SPLIT % "", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=END, chat_template=[
        dict(name="default", template=CHATML), dict(name="rag", template="x")]), 2),
    "files": (MARKS, SPLIT % "", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
              chat_template="old", sep_token="<|im_start|>"), 2),
    "vision": (["<|endoftext|>", "<image>", "<sound>", "<|start|>", "<|stop|>"], SPLIT % "", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|stop|>", image_token="<image>", audio_token="<sound>",
        extra_special_tokens=dict(begin_token="<|start|>"), cls_token="<|start|>", chat_template=CHATML), 4),
    "extra": (MARKS, SPLIT % "", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
              extra_special_tokens=["<|im_start|>", "<|im_end|>"], mask_token="<|im_start|>", chat_template=CHATML), 2),
    "gpt2": (["<|endoftext|>"], None, dict(model_max_length=1024), 0)}
MESSAGES = [dict(role="user", content="Who are you? <think>"),
            dict(role="assistant", content="  I don't know é e\u0301 1999")]


def chat_folder(path, name: str):
    "A model folder of a kind that is met on the hub"
    return Path(shutil.copytree(made(name), path))


@cache
def made(name: str) -> Path:
    special, cut, config, eos = FOLDERS[name]
    path = Path(tempfile.mkdtemp(prefix=name))
    atexit.register(shutil.rmtree, path)
    backend = Backend(models.BPE(ignore_merges=name == "llama"))
    splits = [pre_tokenizers.Split(Regex(cut), "isolated")] if cut else []
    on_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, on_bytes])
    backend.decoder = decoders.ByteLevel()
    if name in ("qwen", "jinja"): backend.normalizer = normalizers.NFC()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if name == "qwen":
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    if name == "llama": backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if name in ("jinja", "files"): (path / "chat_template.jinja").write_text(CHATML)
    if name == "files":
        (path / "additional_chat_templates").mkdir()
        for use in ("rag", "tool_use"):
            (path / "additional_chat_templates" / f"{use}.jinja").write_text(f"{use}: " + CHATML)
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=32, seq_len=64)
    save_weights(GPT(ModelConfig(arch="gpt2" if name == "gpt2" else "qwen3", **sizes), backend.get_vocab_size() + 5),
                 path, 0)
    ids = dict(eos_token_id=eos, pad_token_id=0) if name != "llama" else dict(bos_token_id=0, eos_token_id=eos)
    generation = dict(ids, temperature=0.6, top_p=0.95, transformers_version="4.51.0")
    write_config(load_model(path), path, ids=ids, generation=generation)
    return path


def same_reading(before, after):
    "The same ids for texts, marks and conversations, and the same tokens that begin, end and fill them"
    a, b = AutoTokenizer.from_pretrained(before), AutoTokenizer.from_pretrained(after)
    texts = ["Hello  world 123456", "<|im_start|>user\nhi<|im_end|>", "e\u0301 don't", "<|endoftext|>a",
             "<|begin_of_text|>x", "\n\n  x"]
    assert [a(t)["input_ids"] for t in texts] == [b(t)["input_ids"] for t in texts] and len(a) == len(b)
    assert a.chat_template == b.chat_template
    def read(t, name):
        return t.apply_chat_template(MESSAGES, chat_template=name, add_generation_prompt=True, tokenize=True,
                                     return_dict=True)["input_ids"]
    for name in a.chat_template if isinstance(a.chat_template, dict) else [None] if a.chat_template else []:
        assert read(a, name) == read(b, name) and (len(read(a, name)) > 20 or name == "rag")
    for name in {*a.SPECIAL_TOKENS_ATTRIBUTES, *a.special_tokens_map}:
        assert getattr(a, name) in (None, getattr(b, name)), name
    assert set(a.special_tokens_map.items()) <= set(b.special_tokens_map.items())
    assert a.extra_special_tokens == b.extra_special_tokens and b.pad_token is not None
    for file in "config.json", "generation_config.json":
        one, other = (json.loads((folder / file).read_text()) for folder in (before, after))
        for key in "bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_p":
            assert one.get(key) == other.get(key), key


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_stay_what_the_folder_says(name, tmp_path):
    before = chat_folder(tmp_path / "before", name)
    tokenizer = Tokenizer.load(before)
    for after in tmp_path / "checkpoint", tmp_path / "resumed":
        tokenizer.save(after, 64)
        write_config(load_model(before), after, ids=tokenizer.ids, generation=tokenizer.generation)
        same_reading(before, after)
        tokenizer = Tokenizer.load(after)
    there, eos = AutoTokenizer.from_pretrained(after), FOLDERS[name][3]
    assert tokenizer.encode_marked("<|im_start|>a") == there("<|im_start|>a", add_special_tokens=False)["input_ids"]
    ends = eos if isinstance(eos, list) else [eos]
    assert there.model_max_length == 64 and set(tokenizer.ends) == {*ends, tokenizer.eot_id}
    assert (tokenizer.chat_template is None) == (name == "gpt2")


def with_template(path, *, single: str, ids: dict[str, int]):
    "A folder whose tokenizer puts something around each text"
    folder = chat_folder(path, "llama")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*ids.items()])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("single", ["<|begin_of_text|> $A", "$A <|end_of_text|>", "$A", "<|eot_id|> $A",
                                    "<|begin_of_text|> <|start_header_id|> $A <|end_of_text|>"])
def test_what_the_tokenizer_puts_around_a_text_is_there_in_training_and_prompts(tmp_path, single):
    folder = with_template(tmp_path / "t", single=single, ids=dict(zip(HEADERS, range(5))))
    tokenizer, there = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    model, texts = load_model(folder), ["Hello  world 12", "<|begin_of_text|>x", "é東"]
    whole = [there(t, split_special_tokens=True)["input_ids"] for t in texts]
    prompts = [ids[:len(ids) - len(tokenizer.after)] for ids in whole]  # what comes after a text ends it
    assert [tokenizer.encode_prompt(t) for t in texts] == prompts
    assert [prompt_ids(model, tokenizer, t, Sampling()) for t in texts] == prompts
    asked = completion({"prompt": [*texts, "", prompts[0]]}, Model("m", tokenizer, model.vocab_size, 64)).texts
    assert [r.ids for r in asked] == [*prompts, tokenizer.before or [tokenizer.eot_id], prompts[0]]
    eot, pieces = [tokenizer.eot_id], [("train", "Hello  ", False), ("val", texts[2], True),
                                       ("train", "world 12", True), ("train", texts[1], True)]
    write_tokens(tmp_path, iter(pieces), tokenizer)
    train, val = (np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() for split in ("train", "val"))
    def ours(ids): return ids[len(tokenizer.before) if tokenizer.before == eot else 0:] + eot
    halves = tokenizer.encode("Hello  ") + tokenizer.encode("world 12")
    assert val == eot + ours(whole[2]) and train[-len(ours(whole[1])):] == ours(whole[1])
    assert train[:-len(ours(whole[1]))] == eot + ours(tokenizer.before + halves + tokenizer.after)


@pytest.mark.parametrize("single, ids", [("<|eot_id|> $A", {"<|eot_id|>": 70_000}),
                                         ("<|eot_id|> " * 9 + "$A", {"<|eot_id|>": 2})])
def test_a_tokenizer_that_puts_what_makes_no_sense_around_a_text_is_refused(tmp_path, single, ids):
    with pytest.raises(UsageError, match="tokens around each text"):
        Tokenizer.load(with_template(tmp_path / "t", single=single, ids=ids))


@pytest.mark.parametrize("name, change, words", [
    ("qwen", dict(add_bos_token=True, bos_token="<|im_start|>"), "add_bos_token is true, .*does not put"),
    ("llama", dict(add_bos_token=False), "add_bos_token is false, .*puts '<|begin_of_text|>' before"),
    ("llama", dict(add_eos_token=True), "add_eos_token is true, .*does not put '<|eot_id|>' behind"),
    ("qwen", dict(eos_token="<|end|>"), "eos_token names '<|end|>', which is no token there"),
    ("qwen", dict(image_token="<image>"), "image_token names '<image>'"),
    ("qwen", dict(additional_special_tokens=["<|im_end|>", "<box>"]), "additional_special_tokens names '<box>'"),
    ("vision", dict(extra_special_tokens=dict(end_token=dict(content="<end>"))), "extra_special_tokens names '<end>'"),
    ("qwen", dict(added_tokens_decoder={"7": dict(content="<|im_end|>", special=True)}),
     "added_tokens_decoder gives '<|im_end|>' the number 7, and there it has 2"),
    ("qwen", dict(added_tokens_decoder={"2": dict(content="<|stop|>", special=True)}), ".*and there it has none")])
def test_a_folder_that_contradicts_itself_is_refused_by_name(tmp_path, name, change, words):
    folder = chat_folder(tmp_path / "model", name)
    Tokenizer.load(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    words = words.replace("|", r"\|")
    with pytest.raises(UsageError, match=f"tokenizer_config.json contradicts tokenizer.json in .*: {words}"):
        Tokenizer.load(folder)


def test_two_files_that_name_different_ends_are_refused(tmp_path):
    "Newer versions of Transformers read the older file, older ones the newer"
    folder = chat_folder(tmp_path / "model", "qwen")
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(eos_token="<|endoftext|>", unk_token=None)))
    with pytest.raises(UsageError, match="says eos_token = '<.im_end.>', and special_tokens_map.json beside it"):
        Tokenizer.load(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(eos_token=END, sep_token="<|im_start|>")))
    assert Tokenizer.load(folder).config["sep_token"] == "<|im_start|>"


# ---- the program: folders and names of a hub

@pytest.fixture(scope="module")
def space(tmp_path_factory): return workspace.init(tmp_path_factory.mktemp("pretrained"))


TINY = ["--config", "tiny", "--max-steps", "3", "--eval-every", "0", "--sample-every", "0"]


def test_a_chat_model_of_the_hub_is_trained_and_still_chats(space, tmp_path):
    with Hub() as hub:
        hub.add_model("someone/chatty", before := chat_folder(tmp_path / "before", "qwen"))
        where = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
        ran = program(space, "train", *TINY, "--name", "chat", "--init-from", "someone/chatty", "--seq-len", "32",
                      **where)
        assert ran.returncode == 0 and "Fetching someone/chatty" in ran.stderr, ran.stderr
        asked = len(hub.requests)
        ran = program(space, "train", *TINY, "--dry-run", "--json", "--init-from", "someone/chatty", "--offline",
                      **where)
        assert ran.returncode == 0 and len(hub.requests) == asked, ran.stderr
        record = json.loads((space.runs / "chat/meta.json").read_text())["config"]
        assert record["training"]["init_from"] == record["data"]["tokenizer"] == f"someone/chatty@{REVISION}"
        assert record["model"]["seq_len"] == 32
    out = tmp_path / "out"
    assert program(space, "export", "chat", "--out", str(out)).returncode == 0
    same_reading(before, out)
    assert "base_model: someone/chatty\n" in (out / "README.md").read_text()
    assert AutoConfig.from_pretrained(out).max_position_embeddings == 32
    assert AutoTokenizer.from_pretrained(out).model_max_length == 32


@pytest.mark.parametrize("name, fault, code, words", [
    ("someone/nothing", None, 3, "no model someone/nothing on the hub"),
    ("someone/pickled", None, 2, "from_pretrained(sys.argv[1])"),
    ("someone/empty", None, 3, "has no model.safetensors"),
    ("someone/older", None, 2, "someone/older has no tokenizer.json, but its vocabulary as older programs wrote it"),
    ("someone/wordless", None, 3, "has no tokenizer.json.\nName a model that has one"),
    ("someone/chatty@nope", None, 3, "no revision nope"), ("./someone/chatty", None, 3, "does not exist"),
    ("someone/chatty", "gated", 1, "requires an agreement or a login"),
    ("someone/chatty", "401", 1, "requires an agreement or a login"),
    ("someone/chatty", "500", 1, "answered with an error (500)"), ("someone/chatty", "503", 1, "error (503)"),
    ("someone/chatty", "cut", 1, "can't be reached, or broke off"),
    ("someone/chatty", "short", 1, "and the hub lists"), ("someone/chatty", "gone", 1, "can't be reached")])
def test_a_name_that_gives_no_model_leaves_nothing(tmp_path, name, fault, code, words):
    space = workspace.init(tmp_path / "space")
    with Hub() as hub:
        hub.add_model("someone/chatty", chat_folder(tmp_path / "before", "files"))
        (pickled := tmp_path / "pickled").mkdir()
        (pickled / "pytorch_model.bin").write_bytes(b"\x80")
        hub.add_model("someone/pickled", pickled)
        (empty := tmp_path / "empty").mkdir()
        (empty / "README.md").write_text("Nothing yet")
        hub.add_model("someone/empty", empty)
        hub.add_model("someone/older", older(chat_folder(tmp_path / "older", "gpt2")))
        wordless = {k: v for k, v in hub.models["someone/older"].items() if k not in ("merges.txt", "vocab.json")}
        hub.models["someone/wordless"] = wordless
        there, hub.fault = sorted(space.root.rglob("*")), fault
        where = dict(HF_ENDPOINT="http://127.0.0.1:1" if fault == "gone" else hub.url, HF_HOME=str(tmp_path / "home"))
        ran = program(space, "train", *TINY, "--init-from", name, **where)
        assert ran.returncode == code and words in ran.stderr, ran.stderr
        said = [line for line in ran.stderr.splitlines() if not line.startswith(("Fetching", " "))]
        assert len(said) <= 4 and "Traceback" not in ran.stderr and not ran.stdout.strip(), ran
        assert sorted(space.root.rglob("*")) == there and not any(".bin" in request for request in hub.requests)
        if fault not in ("cut", "short", "500"): return
        hub.fault = None  # what failed once is fetched whole the next time
        ran = program(space, "train", *TINY, "--dry-run", "--init-from", name, "--seq-len", "32", **where)
        assert ran.returncode == 0, ran.stderr


def test_every_file_that_says_something_of_the_tokens_is_fetched(tmp_path):
    from llm_trainer.data.pretrained import fetch_model
    before = chat_folder(tmp_path / "before", "files")
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add_model("someone/files", before)
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                      hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        name, folder = fetch_model("someone/files", tmp_path / "data", emit=lambda event: None)
        there = {p.relative_to(before): p.read_bytes() for p in before.rglob("*") if p.is_file()}
        assert len(there) == 8 and all((folder / name).read_bytes() == data for name, data in there.items())
        assert fetch_model(name, tmp_path / "data", offline=True)[1] == folder
        (folder / "additional_chat_templates" / "rag.jinja").write_text("other")  # is noticed, and fetched again
        assert fetch_model(name, tmp_path / "data", emit=lambda event: None)[1] == folder
        assert (folder / "additional_chat_templates" / "rag.jinja").read_text().startswith("rag: ")


@pytest.mark.parametrize("words", [
    ["serve", "{}", "--port", "0"], ["generate", "{}", "--prompt", "a"], ["evaluate", "{}"],
    ["export", "{}", "--out", "x"], ["train", *TINY, "--init-from", "{}"]])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "m.gguf", "alone.safetensors", "Model"])
def test_a_file_in_the_place_of_a_model_folder_is_one_message(tmp_path, words, name):
    space = workspace.init(tmp_path / "space")
    folder = chat_folder(space.root / "model", "qwen")
    (folder / "m.gguf").write_bytes(b"GGUF")
    for there in (space.root / "alone.safetensors", space.root / "Model"): there.write_bytes(b"x")
    file = name if name in ("alone.safetensors", "Model") else f"model/{name}"
    before = sorted(space.root.rglob("*"))
    ran = program(space, *[word.format(file) for word in words])
    assert ran.returncode == 2 and f"{file} is a file, and a model is a folder" in ran.stderr, ran
    way = "made for llama.cpp" if name == "m.gguf" else "Name its folder: ./model" if "/" in file else "that holds both"
    assert way in ran.stderr and len(ran.stderr.splitlines()) == 2 and sorted(space.root.rglob("*")) == before


@pytest.mark.parametrize("name, change", [("qwen", dict(add_prefix_space=True)), ("gpt2", dict(add_prefix_space=True)),
    ("gpt2", dict(tokenizer_class="Qwen2Tokenizer")), ("llama", dict(tokenizer_class="GPT2Tokenizer")),
    ("qwen", dict(tokenizer_class="CodeGenTokenizer")), ("llama", dict(tokenizer_class=None))])
def test_a_tokenizer_of_two_meanings_is_no_beginning(space, tmp_path, monkeypatch, capsys, name, change):
    "Each of the two ways that the message shows leads to a folder that can be begun with"
    monkeypatch.setenv("LLM_TRAINER_HOME", str(space.root))
    folder, file = chat_folder(tmp_path / "model", name), tmp_path / "model" / "tokenizer_config.json"
    said = {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}
    file.write_text(json.dumps(said))
    shutil.copytree(folder, other := tmp_path / "other")
    def begun(folder): return main(["train", *TINY, "--dry-run", "--init-from", str(folder), "--seq-len", "32"])
    assert begun(folder) == 2 and "has two meanings: tokenizer_class" in (told := capsys.readouterr().err), told
    in_this_process(told.splitlines()[-1], monkeypatch)
    (other / "tokenizer_config.json").write_text(json.dumps(said | dict(tokenizer_class="PreTrainedTokenizerFast")))
    for mended in (folder, other): assert begun(mended) == 0, capsys.readouterr().err
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)


def test_a_tokenizer_larger_than_its_model_is_refused_before_there_is_a_run(space, tmp_path):
    folder, runs = chat_folder(tmp_path / "model", "qwen"), list(space.runs.iterdir())
    train_tokenizer("bpe", 700, [TEXT + " ".join(f"w{i} x{i * 7}" for i in range(900))]).save(folder)
    ran = program(space, "train", *TINY, "--init-from", str(folder))
    assert ran.returncode == 2 and "they don't belong together" in ran.stderr and list(space.runs.iterdir()) == runs


@pytest.mark.slow
def test_the_plan_of_a_model_of_600_million_parameters_is_quick(space, tmp_path):
    "Nothing of its weights is read, and the speed is measured on a slice of it"
    folder = chat_folder(tmp_path / "model", "qwen")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, rope_theta=1000000, rms_norm_eps=1e-6,
        tie_word_embeddings=True)))
    short = ["--batch-size", "1", "--seq-len", "512"]
    ran = program(space, "train", "--config", "tiny", *short, "--dry-run", "--json", "--init-from", str(folder))
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert (plan["parameters"], plan["vocab_size"]) == (596_049_920, 151936)
    assert plan["config"]["model"]["seq_len"] == 512


def test_a_folder_that_brings_code_is_not_run_to_see_how_its_tokenizer_reads(tmp_path, monkeypatch):
    folder = chat_folder(tmp_path / "model", "qwen")
    (folder / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": {"AutoConfig": "tok.Tok"}}))
    (folder / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert read_otherwise(folder, Tokenizer.load(folder)) is None and not (tmp_path / "ran").exists()
