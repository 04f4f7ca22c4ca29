"""OpenAI's interface gives what `generate` writes: HTTP on loopback, the real `openai` client, lm-eval, a browser."""
import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import full_pipe, until
import torch

uvicorn = pytest.importorskip("uvicorn", reason="needs: pip install 'llm_trainer[serve]'")
from llm_trainer.cli.commands import main  # noqa: E402
from llm_trainer.config import ModelConfig  # noqa: E402
from llm_trainer.data.tokenizer import train_tokenizer  # noqa: E402
from llm_trainer.generation import serve  # noqa: E402
from llm_trainer.generation.sampling import Sampling  # noqa: E402
from llm_trainer.generation.sampler import generate, generate_batch, load_for_generation  # noqa: E402
from llm_trainer.model.huggingface import save_weights  # noqa: E402
from llm_trainer.model.transformer import GPT  # noqa: E402

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
JSON = {"Content-Type": "application/json"}
FOREVER = dict(max_tokens=1_000_000, ignore_eot=True)
CHAT = "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}" \
       "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model that knows nothing but has strong opinions"
    path = tmp_path_factory.mktemp("models") / "parrot"
    path.mkdir()
    torch.manual_seed(0)
    model = GPT(ModelConfig(arch="gpt2", n_layer=2, n_head=2, n_embd=32, seq_len=64), 257).eval()
    for p in model.parameters():
        if p.ndim == 2: p.data *= 6
    tokenizer = train_tokenizer("byte", 257, [])
    save_weights(model, path, tokenizer.eot_id)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def own(folder): return load_for_generation(folder, "cpu")


@contextlib.contextmanager
def answering(folder, rows=8, made=None, **options):
    "The address of a server of this process"
    model, engine = made or serve.open_model(folder, "parrot", "cpu", rows=rows)
    app = serve.Server(model, engine, **options).app
    with serve.bind(port=0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2, lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def at(folder):
    with answering(folder, hosts=(*serve.LOOPBACK,)) as address: yield address


def ask(at, path="/v1/completions", body=None, method=None, **headers):
    "Status and JSON of an answer"
    connection = http.client.HTTPConnection(at, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if data is None else "POST"), path, data,
                       {**(JSON if data else {}), **headers})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, json.loads(found) if found[:1] in (b"{", b"[") else found


@contextlib.contextmanager
def streaming(at, **body):
    "The chunks of a stream, one by one"
    connection = http.client.HTTPConnection(at, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"stream": True, **body}), JSON)
    answer = connection.getresponse()
    assert answer.status == 200
    try: yield (json.loads(line[6:]) for line in answer if line.startswith(b"data: {"))
    finally:
        connection.close()
        answer.close()


def health(at): return ask(at, "/health")[1]


# What is written -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("knobs", [
    dict(), dict(temperature=0), dict(temperature=0.8, top_p=0.9, top_k=20), dict(stop=["e", "a"]),
    dict(ignore_eot=True), dict(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1),
    dict(min_p=0.02, typical_p=0.9, no_repeat_ngram=3)])
def test_the_text_is_generates(at, own, knobs):
    status, found = ask(at, body={"model": "parrot", "prompt": "The moon", "max_tokens": 80, "seed": 11, **knobs})
    pieces = list(generate(*own, "The moon", Sampling(max_new_tokens=80, seed=11, **{"temperature": 1.0, **knobs})))
    choice = found["choices"][0]
    assert status == 200 and found["object"] == "text_completion" and found["model"] == "parrot"
    assert choice["text"] == "".join(p.text for p in pieces)
    assert choice["finish_reason"] == {"eot": "stop", "stop": "stop", "length": "length"}[pieces[-1].finish]
    assert found["usage"] == {"prompt_tokens": 8, "completion_tokens": len(pieces) - 1, "total_tokens": 7 + len(pieces)}


def test_many_prompts_and_texts_are_generates_too(at, own):
    prompts = ["The moon", "A", "When the"]
    _, found = ask(at, body={"prompt": prompts, "n": 2, "max_tokens": 30, "seed": 5})
    theirs = list(generate_batch(*own, prompts, Sampling(max_new_tokens=30, seed=5, temperature=1), samples=2))
    assert [c["index"] for c in found["choices"]] == list(range(6))
    assert [c["text"] for c in found["choices"]] == [t.text for t in theirs]
    ids = [own[1].encode(p) for p in prompts]
    assert ask(at, body={"prompt": ids, "n": 2, "max_tokens": 30, "seed": 5})[1]["choices"] == found["choices"]
    assert ask(at, body={"prompt": ids[1], "max_tokens": 3, "temperature": 0})[1]["choices"][0]["text"] == \
        ask(at, body={"prompt": "A", "max_tokens": 3, "temperature": 0})[1]["choices"][0]["text"]


def test_seeds_count_up_past_the_largest(at):
    found = ask(at, body={"prompt": "A", "n": 2, "max_tokens": 20, "seed": 2**63 - 1})[1]["choices"]
    alone = [ask(at, body={"prompt": "A", "max_tokens": 20, "seed": s})[1]["choices"][0] for s in (2**63 - 1, 0)]
    assert [c["text"] for c in found] == [c["text"] for c in alone] and found[0]["text"] != found[1]["text"]


def test_what_ends_a_text_of_generate_ends_it_here(folder, own, tmp_path):
    s, path = Sampling(max_new_tokens=20, temperature=0), shutil.copytree(folder, tmp_path / "parrot")
    tokens = [p.token for p in generate(*own, "The moon", s)]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [own[1].eot_id, tokens[5]]}))
    want = list(generate(*load_for_generation(path, "cpu"), "The moon", s))
    with answering(path) as at:
        _, found = ask(at, body={"prompt": "The moon", "max_tokens": 20, "temperature": 0})
    assert found["choices"][0]["text"] == "".join(p.text for p in want) and want[-1].finish == "eot"
    assert found["choices"][0]["finish_reason"] == "stop" and found["usage"]["completion_tokens"] == len(want) - 1 <= 5


def test_a_stream_adds_up_to_the_whole(at):
    body = {"prompt": ["The", "Mañana €"], "n": 2, "max_tokens": 40, "seed": 2, "stop": "th", "logprobs": 2,
            "echo": True}
    whole, texts, finish, logprobs, used = ask(at, body=body)[1], {}, {}, {}, []
    with streaming(at, **body, stream_options={"include_usage": True}) as chunks:
        for chunk in chunks:
            used.append(chunk["usage"])
            for c in chunk["choices"]:
                texts[c["index"]] = texts.get(c["index"], "") + c["text"]
                finish[c["index"]] = c["finish_reason"]
                for key, values in c["logprobs"].items(): logprobs.setdefault((c["index"], key), []).extend(values)
    for c in whole["choices"]:
        i = c["index"]
        assert (texts[i], finish[i]) == (c["text"], c["finish_reason"])
        assert all(logprobs[i, key] == values for key, values in c["logprobs"].items())
    assert used[-1] == whole["usage"] and set(map(str, used[:-1])) == {"None"}


def test_echo_tells_what_each_token_of_the_prompt_costs(at, own):
    model, tokenizer = own
    _, found = ask(at, body={"prompt": "The moön", "max_tokens": 0, "echo": True, "logprobs": 1})
    told, ids = found["choices"][0]["logprobs"], tokenizer.encode("The moön")
    with torch.no_grad(): logp = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    want = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found["choices"][0]["text"] == "The moön" and found["usage"]["completion_tokens"] == 0
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(told["token_logprobs"][1:], want, strict=True))
    assert told["tokens"] == ["T", "h", "e", " ", "m", "o", "bytes:\\xc3", "bytes:\\xb6", "n"]
    assert told["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    for token, cost, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"]))[1:]:
        assert top[token] == cost and 1 <= len(top) <= 2 and max(top.values()) >= cost


@pytest.mark.parametrize("prompt", ["moön " * 20, "é" + "€" * 24, "é" + "€" * 25, "a" * 65])
def test_offsets_point_into_the_text_that_was_sent(at, own, prompt):
    asked = dict(prompt=[prompt, own[1].encode(prompt)], max_tokens=0, echo=True, logprobs=0, truncate="left", n=2)
    whole, data = ask(at, body=asked)[1], prompt.encode()
    for choice in whole["choices"]:
        assert choice["text"] == prompt and choice["logprobs"]["text_offset"] == [
            len(data[:n].decode(errors="ignore")) for n in range(len(data) - 64, len(data))]  # a byte is a token


def test_nothing_to_continue_is_the_beginning_of_a_document(at, own):
    asked = dict(max_tokens=5, temperature=0)
    empty, missing, token = (ask(at, body={**p, **asked})[1]["choices"]
                             for p in ({"prompt": ""}, {}, {"prompt": [own[1].eot_id]}))
    assert empty == missing == token


def test_who_comes_later_is_not_kept_waiting(at):
    with streaming(at, prompt="a", **FOREVER) as long:
        next(long)
        with streaming(at, prompt="b", max_tokens=3, temperature=0) as short: assert len(list(short)) >= 1
        assert health(at)["writing"] == 1
        next(long)
    until(lambda: health(at)["writing"] == 0)


def test_who_hangs_up_frees_the_row(at):
    with contextlib.ExitStack() as stack:
        for _ in range(3): next(stack.enter_context(streaming(at, prompt="a", n=2, **FOREVER)))
        until(lambda: health(at)["writing"] == 6)
    until(lambda: health(at)["writing"] == 0)
    host, port = at.split(":")
    # without a stream nothing would tell the server but the end of the line
    body = json.dumps({"prompt": "a", **FOREVER}).encode()
    with socket.create_connection((host, int(port))) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: "
                  b"%d\r\n\r\n%b"
                  % (at.encode(), len(body), body))
        until(lambda: health(at)["writing"] == 1)
    until(lambda: health(at)["writing"] == 0)


# What is refused -----------------------------------------------------------------------------------------------------

def deep(n): return b'{"prompt": ' + b"[" * n + b"]" * n + b"}"


BAD = {
    "another model": ({"model": "gpt-4", "prompt": "a"}, 404, "model", "'parrot'"),
    "no JSON": (b"prompt=a", 400, None, "one JSON object"),
    "a list": (b"[1]", 400, None, "one JSON object"),
    "nothing": (b" ", 400, None, "one JSON object"),
    "no UTF-8": (b'{"prompt": "\xff\xfe"}', 400, None, "one JSON object"),
    "deep": (deep(100_000), 400, None, "one JSON object"),
    "deep enough to be read": (deep(300), 400, "prompt", "prompt must be"),
    "a number of a million digits": (b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}", 400, None,
                                     "one JSON object"),
    "too large": (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413, None, "4 MB"),
    "a prompt that is none": ({"prompt": {"a": 1}}, 400, "prompt", "prompt must be"),
    "an id that is none": ({"prompt": [1, 257]}, 400, "prompt", "from 0 to 256"),
    "true as an id": ({"prompt": [True]}, 400, "prompt", "prompt must be"),
    "a long prompt": ({"prompt": "a" * 65}, 400, "prompt", "65 tokens, the model reads 64"),
    "words as a temperature": ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "a number"),
    "a temperature below 0": ({"prompt": "a", "temperature": -1}, 400, "temperature", "0"),
    "NaN": (b'{"prompt": "a", "top_p": NaN}', 400, "top_p", "a number"),
    "too many tokens": ({"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens", "1,000,000"),
    "top_k beyond the vocabulary": ({"prompt": "a", "top_k": 258}, 400, "top_k", "257"),
    "a seed of 64 bits": ({"prompt": "a", "seed": 2**64}, 400, "seed", "63 bits"),
    "n": ({"prompt": "a", "n": 1000}, 400, "n", "1 to 128"),
    "more texts than may wait": ({"prompt": ["a"] * 300}, 400, "n", "256"),
    "best_of": ({"prompt": "a", "best_of": 3}, 400, "best_of", "n gives"),
    "logit_bias": ({"prompt": "a", "logit_bias": {"5": 100}}, 400, "logit_bias", "not supported"),
    "an unknown field": ({"prompt": "a", "temprature": 1}, 400, "temprature", "temperature"),
    "usage without a stream": ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options",
                               "stream"),
    "stop": ({"prompt": "a", "stop": [1]}, 400, "stop", "string"),
    **{f"a {name} of 400 digits": ({"prompt": "a", name: 10**400}, 400, name, "a number") for name in
       ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")},
    **{f"half a character in {name}": ({"prompt": "a", "max_tokens": 1, **more}, 400, None, "surrogate")
       for name, more in {"a name": {"\ud800": 1}, "the prompt": {"prompt": "The \ud800 x"},
                          "a user": {"user": "\ud800"}, "an echo": {"prompt": "\ud800", "echo": True},
                          "a stop": {"stop": ["a", "\udfff"]}}.items()},
    "texts are counted before they are read": ({"prompt": ["a" * 65] * 2000, "n": 128}, 400, "n", "256"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_as_openai_does(at, name):
    body, status, param, words = BAD[name]
    got, found = ask(at, body=body)
    error = found["error"]
    assert (got, error["param"]) == (status, param) and words in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert health(at)["writing"] == 0


def test_other_paths_methods_types_and_names(at):
    assert ask(at, "/v1/nothing")[0] == 404 and ask(at, "/v1/models/gpt-4")[0] == 404
    assert ask(at, "/v1/completions")[0] == 405 and ask(at, "/v1/models", b"{}")[0] == 405
    assert ask(at, body=b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, found = ask(at, "/v1/models", Host="evil.example")  # a page that points its own name at this machine
    assert status == 403 and found["error"]["code"] == "unknown_host"
    status, found = ask(at, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 400 and found["error"]["code"] == "no_chat_template"
    assert "/v1/completions" in found["error"]["message"]
    assert ask(at, "/v1/models")[1]["data"][0]["id"] == ask(at, "/v1/models/parrot")[1]["id"] == "parrot"


def test_a_queue_that_is_full_says_so_and_a_key_is_asked_for(folder):
    with answering(folder, rows=1, queue=2, key="sesame") as at:
        key = {"Authorization": "Bearer sesame"}
        for wrong in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Basic sesame"}):
            status, found = ask(at, "/v1/models", **wrong)
            assert status == 401 and found["error"]["code"] == "invalid_api_key"
        assert ask(at, "/v1/models", **key)[0] == 200 and ask(at, "/health")[0] == 200
        lines = []
        for n in range(3):
            lines.append(http.client.HTTPConnection(at, timeout=60))
            lines[-1].request("POST", "/v1/completions", json.dumps({"prompt": "a", **FOREVER}), {**JSON, **key})
            until(lambda n=n: (health(at)["writing"], health(at)["waiting"]) == (1, n))
        status, found = ask(at, body={"prompt": "a"}, **key)
        assert status == 429 and found["error"]["type"] == "rate_limit_error"
        for line in lines: line.close()
        until(lambda: (health(at)["writing"], health(at)["waiting"]) == (0, 0))
        assert ask(at, body={"prompt": "a", "max_tokens": 2}, **key)[0] == 200


@pytest.mark.parametrize("knobs", [dict(temperature=1e-40), dict(frequency_penalty=1e39), dict(no_repeat_ngram=1)])
def test_knobs_that_leave_nothing_end_their_text_and_no_other(at, knobs):
    with streaming(at, prompt="a", **FOREVER) as other:
        next(other)
        status, found = ask(at, body={"prompt": "a", "max_tokens": 400, "ignore_eot": True, **knobs})
        assert status == 200 and found["choices"][0]["finish_reason"] in ("stop", "length")
        assert "error" not in next(other)


def test_a_step_that_fails_ends_its_texts_and_not_the_server(folder):
    model, engine = serve.open_model(folder, "parrot", "cpu")
    table = engine.model.transformer.wpe.weight
    with answering(folder, made=(model, engine)) as at:
        with streaming(at, prompt="a", **FOREVER) as chunks:
            next(chunks)
            whole, table.data = table.data, table.data[:3]  # the memory under the model is gone
            found = list(chunks)
        assert "IndexError" in found[-1]["error"]["message"] and found[-1]["error"]["type"] == "server_error"
        assert ask(at, body={"prompt": "four", "max_tokens": 3})[0] == 500
        table.data = whole
        assert ask(at, body={"prompt": "four", "max_tokens": 3})[0] == 200


# Those that use it ---------------------------------------------------------------------------------------------------

def test_the_openai_client(at, own):
    openai = pytest.importorskip("openai", reason="needs: pip install openai")
    client = openai.OpenAI(base_url=f"http://{at}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["parrot"]
    asked = dict(model="parrot", prompt="The moon", max_tokens=20, seed=1)
    text = "".join(p.text for p in generate(*own, "The moon", Sampling(max_new_tokens=20, seed=1, temperature=1)))
    assert client.completions.create(**asked).choices[0].text == text
    stream = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in stream for c in chunk.choices) == text and stream[-1].usage.prompt_tokens == 8
    with pytest.raises(openai.NotFoundError, match="parrot"): client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])


def test_a_conversation(folder, tmp_path):
    openai = pytest.importorskip("openai", reason="needs: pip install openai")
    from transformers import AutoTokenizer
    path = tmp_path / "talker"
    shutil.copytree(folder, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    turns = [{"role": "user", "content": "Who?"}]
    model, tokenizer = load_for_generation(path, "cpu")
    text = AutoTokenizer.from_pretrained(path).apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    want = "".join(p.text for p in generate(model, tokenizer, text, Sampling(max_new_tokens=12, seed=4, temperature=1)))
    with answering(path) as at:
        client = openai.OpenAI(base_url=f"http://{at}/v1", api_key="none", max_retries=0)
        asked = dict(model="parrot", messages=turns, max_tokens=12, seed=4, logprobs=True, top_logprobs=2)
        found = client.chat.completions.create(**asked)
        assert text == "<user>Who?\n<assistant>" and found.choices[0].message.content == want
        assert found.usage.prompt_tokens == len(tokenizer.encode(text))
        told = found.choices[0].logprobs.content
        assert len(told) == found.usage.completion_tokens and all(len(t.top_logprobs) == 2 for t in told)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(c.choices[0].delta.content or ""
                       for c in chunks) == want and chunks[0].choices[0].delta.role == "assistant"
        parts = [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
        assert client.chat.completions.create(**{**asked, "messages": parts}).choices[0].message.content == want
        for bad in ([{"role": "odd", "content": "a"}], [{"role": "user", "content": [{"type": "image_url"}]}], [],
                    *([{"role": "user", "content": [{"type": "text", **part}]}] for part in ({"text": None}, {}))):
            with pytest.raises(openai.BadRequestError) as e:
                client.chat.completions.create(model="parrot", messages=bad)
            assert e.value.param.startswith("messages")


LOOPS = "{% if messages[0].role == 'odd' %}{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}" \
        "{% endfor %}{% endif %}" + CHAT


def talker(folder, path, template, **more):
    "The model with a chat template"
    shutil.copytree(folder, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template, **more}))
    return path


def said(content, role="user", **more):
    return {"messages": [{"role": role, "content": content}], "max_tokens": 2, **more}


@pytest.fixture(scope="module")
def teller(folder, tmp_path_factory):
    "A server whose template says, as its refusal, what it was given"
    path = talker(folder, tmp_path_factory.mktemp("models") / "teller", "{{ raise_exception(messages | tojson) }}")
    with answering(path) as at: yield at


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": ["the moon"]}'}}
SEEN = {**CALL, "function": {"name": "look", "arguments": {"at": ["the moon"]}}}


@pytest.mark.parametrize("turn, seen", [
    (dict(content="a", name="Ann", refusal=None, audio=None, annotations=[]), dict(content="a", name="Ann")),
    (dict(content=None, tool_calls=[CALL]), dict(content="", tool_calls=[SEEN])),
    (dict(content="so", reasoning_content="hm", tool_calls=[SEEN]),
     dict(content="so", reasoning_content="hm", tool_calls=[SEEN])),
    (dict(content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{"}}]),
     dict(content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{"}}])),
    (dict(content=[{"type": "text", "text": "a"}, {"type": "text", "text": ""}], tool_call_id="c1", tool_calls=[]),
     dict(content="a", tool_call_id="c1"))])
def test_a_template_reads_all_that_a_message_says(teller, turn, seen):
    status, found = ask(teller, "/v1/chat/completions", {"messages": [{"role": "user", **turn}]})
    [given] = json.loads(found["error"]["message"].partition("messages: ")[2])
    given.pop("thinking", None)  # some versions of Transformers give the reasoning this name, too
    assert status == 400 and given == {"role": "user", **seen}


@pytest.mark.parametrize("turn, param", [
    (dict(content="a", nonsense=1), ".nonsense"), (dict(content="a", audio={"id": "x"}), ".audio"),
    (dict(content="a", refusal="no"), ".refusal"), (dict(content="a", name=7), ".name"), (dict(), ".content"),
    (dict(content=None), ".content"), (dict(content={"text": "a"}), ".content"), (dict(content=["a"]), ".content[0]"),
    (dict(content="a", role=None), ".role"), (dict(tool_calls=7), ".tool_calls"),
    (dict(content=[{"type": "text", "text": "a"}, {"type": "text"}]), ".content[1].text"),
    (dict(content=[{"type": "text", "text": {"a": 1}}]), ".content[0].text"),
    (dict(content=[{"type": "text", "text": "a", "cache_control": {"type": "x"}}]), ".content[0].cache_control"),
    (dict(content=[{"type": "image_url", "image_url": {"url": "a"}}]), ".content[0].type"),
    (dict(tool_calls=[{**CALL, "function": {}}]), ".tool_calls[0].function.name"),
    (dict(tool_calls=[{**CALL, "type": "custom"}]), ".tool_calls[0].type")])
def test_what_no_template_reads_is_refused_by_its_name(teller, turn, param):
    messages = [{"role": "user", "content": "a"}, {"role": "user", **turn}]
    status, found = ask(teller, "/v1/chat/completions", {"messages": messages})
    assert status == 400 and found["error"]["param"] == f"messages[1]{param}" in found["error"]["message"]


def test_likely_tokens_are_asked_for_with_their_costs(teller):
    status, found = ask(teller, "/v1/chat/completions", said("a", top_logprobs=2))
    assert status == 400 and found["error"]["param"] == "top_logprobs" and "logprobs: true" in found["error"]["message"]


def test_a_template_without_end_costs_its_own_request_only(folder, tmp_path):
    with answering(talker(folder, tmp_path / "loops", LOOPS), reading=0.5) as at, ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda _: ask(at, "/v1/chat/completions", said("a", "odd")), range(12)))
        assert {status for status, _ in found} <= {400, 503} and "0.5 s" in found[0][1]["error"]["message"]
        until(lambda: not any(thread.name == "reading" for thread in threading.enumerate()))
        for _ in range(9): assert ask(at, "/v1/chat/completions", said("a"))[0] == 200


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_gets_the_models_own_likelihoods(at, own, folder, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="needs: pip install 'lm_eval[api]'")
    from lm_eval.tasks import TaskManager
    asked = [{"question": q, "choices": ["one", "three", "six"], "label": i} for i,
             q in enumerate(["The moon", "Alas", "No. 7"])]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "own.yaml").write_text(TASK.format(name="own", data=tmp_path / "rows.json", cache=tmp_path / "cache"))
    args = dict(base_url=f"http://{at}/v1/completions", model="parrot", tokenizer=str(folder), max_length=64,
                num_concurrent=2)
    found = lm_eval.simple_evaluate("local-completions", model_args=args, tasks=["own"], batch_size=2,
                                    bootstrap_iters=0,
                                    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    told = [[float(answer[0]) for [answer] in sample["resps"]] for sample in found["samples"]["own"]]
    model, tokenizer = own
    for row, costs in zip(asked, told, strict=True):
        for choice, cost in zip(row["choices"], costs, strict=True):
            ids, start = tokenizer.encode(f"{row['question']} {choice}"), len(tokenizer.encode(row["question"]))
            with torch.no_grad(): logp = model(torch.tensor([ids]))[0][0].log_softmax(-1)
            assert math.isclose(cost, sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))), abs_tol=1e-3)


def test_the_command_serves_a_folder_and_ends_when_asked(folder, tmp_path, capsys):
    "At once, while a text is written, templates do not end and a body does not come"
    path, here = talker(folder, tmp_path / "loops", LOOPS, model_max_length=64), tmp_path / "here"
    here.mkdir()
    start = [sys.executable, "-m", "llm_trainer", "serve", str(path), "--port", "0", "--json"]
    half = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{")
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as process, ThreadPoolExecutor(8) as clients:
        try:
            told = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            at, port = told["url"].removeprefix("http://"), told["url"].rpartition(":")[2]
            assert told["model"] == "loops" and told["pid"] == process.pid and health(at)["status"] == "ok"
            assert main(["serve", str(folder), "--port", port]) == 75 and "--port" in capsys.readouterr().err
            assert ask(at, "/v1/chat/completions", said("a" * 100, truncate="left"))[0] == 200
            with socket.create_connection(at.split(":")) as s:  # a client that leaves while it sends
                s.sendall(half)
                assert health(at)["writing"] == 0
            until(lambda: health(at)["reading"] == 0)
            with socket.create_connection(at.split(":")) as s, streaming(at, prompt="a", **FOREVER) as chunks:
                s.sendall(half)
                next(chunks)
                asked = [clients.submit(ask, at, "/v1/chat/completions", said("a", "odd")) for _ in range(6)]
                until(lambda: health(at)["reading"] == 7)
                process.send_signal(signal.SIGTERM)
                assert s.makefile("rb").readline().split()[1] == b"503"
                assert list(chunks)[-1]["error"]["message"] == "The server is stopping."
            for status, found in (future.result() for future in asked):
                assert status == 503 and found["error"]["message"] == "The server is stopping."
            assert process.wait(60) == -signal.SIGTERM and process.stderr.read() == ""
        finally: process.kill()
    assert list(here.iterdir()) == []


def stopped_terminal():
    "The ends of a terminal on which Ctrl-S was pressed"
    screen, terminal = os.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    return screen, terminal


def left_pipe():
    "A pipe whose reader has gone"
    read, write = os.pipe()
    os.close(read)
    return os.open(os.devnull, os.O_RDONLY), write


def full_disk(): return os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)


INTERRUPTED, TERMINATED = (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize("ends, end", [
    (stopped_terminal, INTERRUPTED), (full_pipe, TERMINATED), *(
        pytest.param(ends, end, marks=pytest.mark.slow) for ends, end in (
            (stopped_terminal, TERMINATED), (full_disk, TERMINATED), (full_disk, INTERRUPTED), (full_pipe, INTERRUPTED),
            (left_pipe, TERMINATED), (left_pipe, INTERRUPTED)))])
def test_it_serves_whoever_takes_its_greeting(folder, ends, end):
    (signum, code), (screen, output) = end, ends()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "llm_trainer", "serve", str(folder), "--port", str(port)],
                               stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        def answers():
            with contextlib.suppress(OSError): return health(f"127.0.0.1:{port}")["status"]
        assert until(lambda: process.poll() is not None or answers()) == "ok"
        process.send_signal(signum)
        assert process.wait(60) == code
    finally:
        process.kill()
        os.close(screen)
        os.close(output)


@pytest.mark.parametrize("words, code, says", [
    (["nowhere/at-all"], 3, "does not exist"), (["--port", "70000"], 2, "--port"), (["--rows", "0"], 2, "--rows"),
    (["--api-key", "ключ"], 2, "--api-key"), (["--host", "no.such.host.invalid"], 2, "--host")])
def test_a_command_that_cannot_be_meant(folder, capsys, words, code, says):
    where = words if "/" in words[0] else [str(folder), *words]
    assert main(["serve", *where]) == code and says in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(folder, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('not here')")
    done = subprocess.run([sys.executable, "-m", "llm_trainer", "serve", str(folder)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 2 and "pip install 'llm_trainer[serve]'" in done.stderr


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_writes_stops_and_runs_nothing_of_the_texts(folder, own):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    prompt = "<img src=x onerror=alert(1)>"
    want = prompt + "".join(p.text for p in generate(*own, prompt, Sampling(max_new_tokens=30, temperature=0)))
    with answering(folder, key="sesame") as at, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=120_000)
        page, errors, foreign = browser.new_page(viewport={"width": 390, "height": 800}), [], []
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "401" not in m.text else None)
        page.on("dialog", lambda d: errors.append(d.message))
        page.on("request", lambda r: None if r.url.startswith(f"http://{at}/") else foreign.append(r.url))
        page.goto(f"http://{at}/")
        until(lambda: page.title() == "parrot")
        page.fill("#prompt", prompt)
        page.fill("#max_tokens", "30")
        page.fill("#temperature", "0")
        page.click("#write")
        page.wait_for_selector("#said.wrong")
        assert "API key" in page.inner_text("#said")
        page.fill("#key", "sesame")
        page.click("#write")
        until(lambda: "30 tokens" in page.inner_text("#said"))
        assert page.evaluate("document.getElementById('text').textContent") == want
        assert page.query_selector("#text img") is None
        page.fill("#max_tokens", "100000")
        page.click("#write")
        until(lambda: health(at)["writing"] == 1)
        page.click("#stop")
        until(lambda: health(at)["writing"] == 0)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.is_enabled("#write")
        page.goto(f"http://{at}/")
        page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
                      "document.body.append(s) }")
        assert page.evaluate("window.ran") is None and any("Content Security Policy" in e for e in errors)
        assert [e for e in errors if "Content Security Policy" not in e and "favicon" not in e] == [] and foreign == []
        browser.close()
