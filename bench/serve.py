"""How fast a server writes: ours beside `transformers serve` on the same weights, in one run.

    python bench/serve.py [--size quickstart|124m] [--arch gpt2|qwen3] [--clients 1,8,32] [--tokens 64] [--seconds 10]
                          [--device auto]

Each client asks, again and again, for a text of that many tokens without a stream; the speed is that of all of them
together over the time given. Prints one JSON object. `ratio` is ours over theirs. Theirs is started with continuous
batching where its version has it (pip install 'transformers[serving]'); where it can't be started, `theirs` says why.
"""
import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from llm_trainer.config import ModelConfig
from llm_trainer.data.tokenizer import train_tokenizer
from llm_trainer.model.huggingface import save_weights
from llm_trainer.model.transformer import GPT

SIZES = {"quickstart": (dict(n_layer=4, n_head=4, n_embd=192, seq_len=128), 1024),
         "124m": (dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024), 50257)}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROMPT = "This module provides "


def make(folder: Path, arch: str, size: str) -> None:
    "A model of that size that has learned nothing, with a tokenizer of bytes and the chat template that theirs needs"
    sizes, vocabulary = SIZES[size]
    torch.manual_seed(0)
    tokenizer = train_tokenizer("byte", 257, [])
    save_weights(GPT(ModelConfig(arch=arch, **sizes), vocabulary).eval(), folder, None)
    tokenizer.config["chat_template"] = CHAT
    tokenizer.save(folder)


def ask(port: int, path: str, body: dict, timeout: float = 600) -> dict:
    "The answer to a request"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    if answer.status != 200: raise RuntimeError(f"{answer.status}: {found[:300]!r}")
    return json.loads(found)


def measure(port: int, path: str, body: dict, clients: int, seconds: float) -> float:
    "Tokens per second of `clients` that ask again and again"
    done, failed, end = [], [], time.perf_counter() + seconds

    def client():
        while time.perf_counter() < end and not failed:
            try: done.append((ask(port, path, body)["usage"]["completion_tokens"], time.perf_counter()))
            except Exception as e: failed.append(e)

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for t in threads: t.start()
    for t in threads: t.join()
    if failed: raise failed[0]
    return sum(n for n, _ in done) / (max(at for _, at in done) - began)


class Program:
    "A server as a process of its own; its log says what became of it"

    def __init__(self, words: list[str], port: int, log: Path):
        self.port, self.log = port, log
        with open(log, "w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)

    def wait(self, path: str, body: dict, seconds: float = 240) -> None:
        "Until it answers"
        deadline, said = time.monotonic() + seconds, "nothing"
        while time.monotonic() < deadline and self.process.poll() is None:
            try: return void(ask(self.port, path, body, seconds))
            except (OSError, RuntimeError, http.client.HTTPException) as e: said = str(e)
            time.sleep(0.5)
        raise RuntimeError(f"It does not answer: {said}. {self.log.read_text()[-600:]}")

    def __enter__(self): return self
    def __exit__(self, *_):
        self.process.terminate()
        try: self.process.wait(15)
        except subprocess.TimeoutExpired: self.process.kill()


def void(_) -> None: return None


def free_port() -> int:
    import socket
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def transformers_serve(folder: Path, port: int, device: str) -> list[str]:
    "Its command line, with what its version knows"
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    helped = subprocess.run([*words, "--help"], capture_output=True, text=True).stdout
    flags = {"--host": "127.0.0.1", "--port": str(port), "--device": device, "--dtype": "bfloat16" if device == "cuda"
             else "float32", "--continuous-batching": None, "--force-model": str(folder)}
    given = [word for flag, value in flags.items() if flag in helped for word in [flag, *([value] if value else [])]]
    return [*words, *([str(folder)] if "force_model" not in helped and "MODEL" in helped.split("Options")[0] else []),
            *given]


def bench_serve(arch: str, size: str, clients: list[int], tokens: int, seconds: float, device: str) -> dict:
    "Tokens per second of both, at each number of clients"
    os.environ["LLM_TRAINER_DEBUG"] = "1"
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "model"
        folder.mkdir()
        make(folder, arch, size)
        found: dict = {"arch": arch, "size": size, "device": device, "tokens": tokens, "torch": torch.__version__,
                       "threads": torch.get_num_threads(), "ours": {}, "theirs": {}}
        port, body = free_port(), {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0.8, "ignore_eot": True}
        start = ("import sys\nfrom llm_trainer.generation import serve as http\n"
                 "with http.bind(port=int(sys.argv[2])) as l:\n"
                 "    http.serve(*http.open_model(sys.argv[1], 'model', sys.argv[3], rows=64), l)")
        with Program([sys.executable, "-c", start, str(folder), str(port), device], port,
                     Path(tmp) / "ours.log") as ours:
            ours.wait("/v1/completions", body)
            for n in clients:
                measure(port, "/v1/completions", body, n, 1)
                found["ours"][n] = round(measure(port, "/v1/completions", body, n, seconds))
        port = free_port()
        chat = {"model": str(folder), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens,
                "temperature": 0.8, "stream": False}
        try:
            with Program(transformers_serve(folder, port, device), port, Path(tmp) / "theirs.log") as theirs:
                theirs.wait("/v1/chat/completions", chat)
                for n in clients:
                    measure(port, "/v1/chat/completions", chat, n, 1)
                    found["theirs"][n] = round(measure(port, "/v1/chat/completions", chat, n, seconds))
            found["ratio"] = {n: round(found["ours"][n] / found["theirs"][n], 2) for n in clients}
        except Exception as e: found["theirs"] = f"{type(e).__name__}: {e}"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--arch", choices=["gpt2", "qwen3"], default="gpt2")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    clients = [int(n) for n in args.clients.split(",")]
    print(json.dumps(bench_serve(args.arch, args.size, clients, args.tokens, args.seconds, device), indent=2))
