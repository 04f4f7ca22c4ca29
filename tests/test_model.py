"""The model equals Hugging Face's both ways, its loss equals the plain one, and only a folder that fits is loaded."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from llm_trainer.config import ModelConfig
from llm_trainer.model.cost import flops_per_token, parameters_count
from llm_trainer.generation.decode import flat_step
from llm_trainer.errors import CheckpointError, NotFoundError, UsageError
from llm_trainer.model.transformer import GPT, KVCache
from llm_trainer.model.huggingface import (
    from_hf, hf_config, load_model, load_tensors, model_tensors, save_weights, to_hf)
from safetensors.torch import load_file, save_file

SIZES = dict(n_layer=3, n_head=4, n_embd=32, seq_len=24)
CONFIGS = {
    "gpt2": ModelConfig(arch="gpt2", n_hidden=100, **SIZES),
    "qwen3": ModelConfig(arch="qwen3", **SIZES),
    "qwen3-grouped": ModelConfig(arch="qwen3", n_kv_head=2, head_size=16, n_hidden=72, **SIZES),
}
V = 101  # not a multiple of 64: padded inside


@pytest.fixture(params=CONFIGS)
def cfg(request): return CONFIGS[request.param]


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    model = GPT(cfg, V).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.05)  # norms and biases too
        model.trunk.embedding.weight[V:] = 0
    return model


@pytest.fixture
def tokens(): return torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))


def auto(folder):
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def test_hugging_face_opens_our_folder_to_the_same_logits(model, tokens, tmp_path):
    save_weights(model, tmp_path, eot_id=V - 1)
    theirs = auto(tmp_path)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-4, rtol=0)
    assert type(theirs).__name__ == hf_config(model)["architectures"][0]
    assert theirs.config.vocab_size == V and theirs.config.eos_token_id == V - 1


@torch.no_grad()
def test_we_open_their_folder_and_their_shards(model, tokens, tmp_path):
    save_weights(model, tmp_path, eot_id=V - 1)
    theirs = auto(tmp_path)
    for p in theirs.parameters(): p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in "one", "shards":
        torch.testing.assert_close(load_model(tmp_path / folder)(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_gradients_equal_hugging_faces(model, tokens, tmp_path):
    save_weights(model, tmp_path)
    theirs = auto(tmp_path)
    with torch.enable_grad():
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        theirs(tokens, labels=tokens).loss.backward()
    grads = {name: to_hf(model, name, p.grad) for name, p in model.named_parameters()}
    for name, p in theirs.named_parameters(): torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_untied_head_round_trips(tokens, tmp_path):
    torch.manual_seed(0)
    model = GPT(CONFIGS["qwen3-grouped"], V, tied=False, rope_theta=500_000.0, norm_eps=1e-5).eval()
    save_weights(model, tmp_path)
    torch.testing.assert_close(auto(tmp_path)(tokens).logits, model(tokens)[0], atol=1e-4, rtol=0)
    again = load_model(tmp_path)
    assert (again.tied, again.rope_theta, again.norm_eps) == (False, 500_000.0, 1e-5)
    assert torch.equal(again(tokens)[0], model(tokens)[0])


def test_saving_what_was_loaded_gives_the_same_bytes(model, tmp_path):
    for name in "a", "b": (tmp_path / name).mkdir()
    save_weights(model, tmp_path / "a", 3)
    save_weights(load_model(tmp_path / "a"), tmp_path / "b", 3)
    for file in "model.safetensors", "config.json", "generation_config.json":
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tensors_go_back_into_a_model(model, cfg):
    other = GPT(cfg, V)
    load_tensors(other, model_tensors(model))
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(from_hf(model, name, to_hf(model, name, a)), a)
        assert to_hf(model, name, torch.tensor(3.0)) == 3  # an optimizer's step count passes through


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_equal_plain_cross_entropy(model, tokens, reduction):
    targets = tokens.roll(-1, 1).clone()
    targets[0, :9] = -100
    ours = model.loss(tokens, targets, reduction)
    grads = torch.autograd.grad(ours * 3, list(model.parameters()))
    plain = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), reduction=reduction)
    for a, b in zip(grads, torch.autograd.grad(plain * 3, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, plain)
    with torch.no_grad(): torch.testing.assert_close(model.loss(tokens, targets, reduction), plain)


def test_loss_under_autocast_is_close_and_masks_whole_batches(model, tokens):
    with torch.autocast("cpu", torch.bfloat16): low = model.loss(tokens, tokens)
    torch.testing.assert_close(low, model.loss(tokens, tokens), atol=0.05, rtol=0)
    assert model.loss(tokens, torch.full_like(tokens, -100)) == 0


def test_many_small_batches_add_up_to_one_big_one(cfg):
    torch.manual_seed(0)
    model, x = GPT(cfg, V), torch.randint(V, (8, 24))
    whole = torch.autograd.grad(model.loss(x, x, "sum"), list(model.parameters()))
    parts = [torch.autograd.grad(model.loss(x[i:i+1], x[i:i+1], "sum"), list(model.parameters())) for i in range(8)]
    for a, *b in zip(whole, *parts): torch.testing.assert_close(a / 8, sum(b) / 8, atol=5e-6, rtol=1e-5)


def test_padded_rows_stay_zero_through_training(cfg):
    model, x = GPT(cfg, V), torch.randint(V, (2, 24))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model.loss(x, x).backward()
        opt.step()
        opt.zero_grad()
    assert not model.head[V:].any() and model.head[:V].any()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("step", ["model", "flat"])
def test_the_cache_changes_nothing_with_or_without_padding(model, tokens, static, step):
    for padding in None, torch.tensor([0, 4]):
        cache = KVCache(model, 2, 24, padding, static)
        model.next_logits(tokens[:, :6], cache)
        next_logits = flat_step(model, cache) if step == "flat" else lambda x, c=cache: model.next_logits(x, c)
        got = torch.stack([next_logits(tokens[:, i:i+1]) for i in range(6, 24)], 1)
        starts = [0, 0] if padding is None else padding.tolist()
        want = torch.cat([model(tokens[i:i+1, a:])[0][:, 6-a:] for i, a in enumerate(starts)])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        with pytest.raises(UsageError, match="room for 24"): model.next_logits(tokens[:, :1], cache)


def test_context_is_bounded(model):
    with pytest.raises(UsageError, match="25 tokens don't fit the model's context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_dropout_acts_in_training_only(tokens):
    model = GPT(ModelConfig(arch="qwen3", dropout=0.5, **SIZES), V)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_counts_hold_at_known_models():
    gpt2 = ModelConfig(arch="gpt2", n_layer=12, n_head=12, n_embd=768, seq_len=1024)
    assert parameters_count(gpt2, 50257) == 124_439_808
    qwen = ModelConfig(arch="qwen3", n_layer=28, n_head=16, n_kv_head=8, head_size=128, n_embd=1024, n_hidden=3072,
                       seq_len=40960)
    assert parameters_count(qwen, 151936) == 596_049_920
    assert flops_per_token(gpt2, 50257) == 6 * (124_439_808 - 1024*768 - 12*(9*768 + 3072) - 2*768) + 12*12*768*1024


# ---- folders that must be refused, with a reason

BREAK = {
    "no folder": (lambda d: shutil.rmtree(d), NotFoundError, "config.json does not exist"),
    "no weights": (lambda d: (d/"model.safetensors").unlink(), NotFoundError, "no model.safetensors"),
    "not json": (lambda d: (d/"config.json").write_text("{oops"), CheckpointError, "no JSON"),
    "deep json": (lambda d: (d/"config.json").write_text("[" * 100_000), CheckpointError, "no JSON"),
    "a list": (lambda d: (d/"config.json").write_text("[]"), CheckpointError, "hold a JSON object"),
    "huge config": (lambda d: (d/"config.json").write_bytes(b" " * 9_000_000), CheckpointError, "sensible size"),
    "truncated": (lambda d: (d/"model.safetensors").write_bytes((d/"model.safetensors").read_bytes()[:-7]),
                  CheckpointError, "damaged"),
    "huge header": (lambda d: (d/"model.safetensors").write_bytes(b"\xff" * 8 + b"{}"), CheckpointError, "damaged"),
    "empty": (lambda d: (d/"model.safetensors").write_bytes(b""), CheckpointError, "damaged"),
    "a pickle": (lambda d: torch.save({}, d/"model.safetensors"), CheckpointError, "damaged"),
}


@pytest.mark.parametrize("what", BREAK)
def test_a_broken_folder_is_refused(what, tmp_path):
    save_weights(GPT(CONFIGS["gpt2"], V), tmp_path)
    damage, error, message = BREAK[what]
    damage(tmp_path)
    with pytest.raises(error, match=message): load_model(tmp_path)


def edit(folder, **changes):
    config = json.loads((folder/"config.json").read_text()) | changes
    (folder/"config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("arch,changes,message", [
    ("gpt2", dict(model_type="llama"), "neither gpt2 nor qwen3"),
    ("gpt2", dict(n_layer=None), "lacks 108 tensors"),  # as Transformers has it: 12 layers
    ("gpt2", dict(activation_function="relu"), "activation_function"),
    ("gpt2", dict(n_embd=64), "config.json asks for"),
    ("gpt2", dict(n_layer=2), "transformer.h.2.* is no tensor"),
    ("gpt2", dict(n_layer=4), "lacks 12 tensors"),
    ("gpt2", dict(vocab_size=100), "config.json asks for"),
    ("gpt2", dict(vocab_size="many"), "many"),
    ("gpt2", dict(vocab_size=10**18), "vocab_size"),
    ("gpt2", dict(n_layer=10**9), "n_layer"),
    ("qwen3", dict(num_hidden_layers=10**12), "num_hidden_layers"),
    ("gpt2", dict(num_labels=10**12), "num_labels"),  # its class would make a name for each
    ("gpt2", dict(n_head=5), "n_head"),
    ("qwen3", dict(attention_bias=True), "attention_bias"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window"),
    ("qwen3", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "yarn"),
    ("qwen3", dict(rope_parameters=[1]), "has to be an object"),
    ("qwen3", dict(max_position_embeddings=1_000_000, head_dim=1024), "max_position_embeddings"),
])
def test_a_config_that_does_not_fit_is_refused(arch, changes, message, tmp_path):
    save_weights(GPT(CONFIGS[arch], V), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises((UsageError, CheckpointError), match=message): load_model(tmp_path)


def test_an_index_may_not_point_elsewhere(tmp_path):
    save_weights(GPT(CONFIGS["gpt2"], V), tmp_path)
    (tmp_path/"model.safetensors").rename(tmp_path/"model-00001-of-00001.safetensors")
    for name in "../model.safetensors", "/etc/passwd", "pytorch_model.bin", 7:
        (tmp_path/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="no shard beside it"): load_model(tmp_path)


def test_the_oldest_gpt2_files_load(tmp_path):
    model = GPT(CONFIGS["gpt2"], V).eval()
    save_weights(model, tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path/"model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(tensors, tmp_path/"model.safetensors")
    x = torch.randint(V, (1, 24))
    assert torch.equal(load_model(tmp_path)(x)[0], model(x)[0])


@pytest.mark.slow
def test_compiling_changes_nothing(tokens):
    model = GPT(CONFIGS["qwen3-grouped"], V)
    plain = model.loss(tokens, tokens)
    compiled = torch.compile(model.loss)(tokens, tokens)
    for a, b in zip(torch.autograd.grad(plain, list(model.parameters())),
                    torch.autograd.grad(compiled, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
