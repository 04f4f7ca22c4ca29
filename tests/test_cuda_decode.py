"""What the GPU's kernels write, recorded, is what the slow and obvious way writes."""
import pytest
import torch

from llm_trainer.generation import kernels as gpu
from llm_trainer.config import ModelConfig
from llm_trainer.generation.filters import apply_filters, draw, top_k, uniforms
from llm_trainer.generation.sampling import Sampling
from llm_trainer.model.transformer import GPT, KVCache
from llm_trainer.generation.sampler import pad_left, window_start, sample_tokens

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CONTEXT = 24
PROMPTS = [[5, 6, 7], list(range(CONTEXT)), [9], list(range(20, 40)), [250], [1, 2]]
SHAPES = {"gpt2": dict(arch="gpt2", n_head=2), "qwen3": dict(arch="qwen3", n_head=4, n_kv_head=2),
          "odd": dict(arch="gpt2", n_head=4, n_embd=96)}  # heads of 24 channels: no power of two
KNOBS = {"greedy": dict(temperature=0), "plain": dict(),
         "shortlist": dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
         "nucleus": dict(top_p=0.9),
         "looks back": dict(temperature=0.9, top_k=20, repetition_penalty=1.2, no_repeat_ngram=3)}


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**dict(n_layer=2, n_embd=32, seq_len=CONTEXT) | SHAPES[request.param]), 257).eval()
    for p in model.parameters():
        if p.ndim == 2: p.data *= 3 if model.config.arch == "qwen3" else 6
        else: p.data += torch.randn_like(p) * 0.1
    return model.cuda()


@pytest.fixture(params=["triton", "in parts", "without"])
def way(request, monkeypatch):
    if request.param == "without": monkeypatch.setattr(gpu, "triton", None)
    if request.param == "in parts": monkeypatch.setattr(gpu, "PLACES", 4)


@torch.no_grad()
def obvious(model, ids, sampling, seed):
    "Everything read again for each token, no cache, no shortlist"
    ids, n, u = list(ids), len(ids), uniforms([seed], sampling.max_new_tokens)[:, 0].cuda()
    for i in range(sampling.max_new_tokens):
        logits = model.next_logits(torch.tensor([ids[window_start(len(ids), CONTEXT):]], device="cuda"))
        scores = apply_filters(logits, sampling, torch.tensor([ids], device="cuda"), n)
        ids.append((scores.argmax(-1) if sampling.greedy else draw(scores, u[i:i+1])).item())
    return ids[n:]


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("rows", [1, 3, 6])  # alone, by our kernels, by cuBLAS
def test_the_text_is_the_obvious_one_also_beyond_the_context(model, way, knobs, rows):
    s, seeds = Sampling(max_new_tokens=60, **knobs), list(range(rows))
    got = [list(row) for row in zip(*(ids for ids, _ in sample_tokens(model, PROMPTS[:rows], s, seeds)))]
    assert got == [obvious(model, p, s, seed) for p, seed in zip(PROMPTS, seeds)]


def test_log_probabilities_are_the_models_own(model, way):
    s = Sampling(max_new_tokens=12, logprobs=True, temperature=0.7, top_k=20)
    tokens, logps = zip(*((ids[0], logps[0]) for ids, logps in sample_tokens(model, [[5, 6, 7]], s, [1])))
    with torch.no_grad(): logp = model(torch.tensor([[5, 6, 7, *tokens]], device="cuda"))[0].log_softmax(-1)[0]
    for i, token in enumerate(tokens): assert logps[i] == pytest.approx(logp[2 + i, token].item(), abs=1e-3)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 3, 9])
@torch.inference_mode()
def test_scores_at_a_real_shape_are_the_uncached_models(arch, rows):
    torch.manual_seed(0)
    model = GPT(ModelConfig(arch=arch, n_layer=3, n_head=12, n_embd=768, seq_len=1024), 50257).eval().cuda()
    texts = [torch.randint(50257, (600 - 7 * i,)).tolist() for i in range(rows)]
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model.to(dtype=dtype)
        tokens, padding = (x.cuda() for x in pad_left([t[:-3] for t in texts]))
        cache = KVCache(model, rows, 700, padding.clone() if rows > 1 else None, static=True)
        model.next_logits(tokens, cache)
        last = torch.tensor([t[-3:] for t in texts], device="cuda")
        step = gpu.recorded(gpu.fast_step(model, cache), cache, last[:, :1])
        for i in range(3): got = step(last[:, i:i+1])
        for row, text in zip(got.float(), texts):
            want = model.next_logits(torch.tensor([text], device="cuda"))[0].float()
            torch.testing.assert_close(row, want, atol=near * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("vocabulary", [40, 257, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shortlist_holds_what_top_k_keeps(vocabulary, dtype):
    logits = torch.randn(5, vocabulary + 7, device="cuda").to(dtype)[:, :vocabulary]  # bfloat16: many are equal
    for k in 1, 7, 50, 128:
        if k > vocabulary: continue
        scores, ids = gpu.shortlist(logits, k)
        for row, some, their in zip(top_k(logits.float(), k), scores, ids):
            kept = row.isfinite().nonzero()[:, 0]
            assert torch.equal(their[some.isfinite()], kept) and torch.equal(some[some.isfinite()], row[kept])


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_rows_that_come_and_go_are_written_as_alone(model, way, knobs):
    from llm_trainer.data.tokenizer import train_tokenizer
    from llm_trainer.generation.engine import Engine, Request
    asked = [Request(ids, Sampling(max_new_tokens=5 + 11 * i, seed=i, ignore_eot=True, **knobs)) for i,
             ids in enumerate(PROMPTS)]
    engine = Engine(model, train_tokenizer("byte", 257, []), rows=5)
    # 1, 2, 4, 5 at once of a cache for 8, longer than the context, the first ones leaving early
    for i, r in enumerate(asked):
        engine.add(r)
        for _ in range(3 * i): engine.step()
    while engine.busy: engine.step()
    assert [r.tokens[len(r.ids):] for r in asked] == [obvious(model, r.ids, r.sampling, r.sampling.seed) for r in asked]
