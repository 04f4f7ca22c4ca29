"""The real llama.cpp for tests: its server in a process of its own, asked over HTTP on this machine."""
from __future__ import annotations

import http.client
import json
import subprocess
import sys

SERVE = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.port, p.warmup, p.verbosity, p.ui = sys.argv[1], 0, 1, 0, False, -1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(p)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


class Llama:
    "`with Llama(file) as llama: llama.ids(text)`"
    def __init__(self, file):
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(file)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self):
        said = []
        for line in self.process.stdout:
            if line.startswith("at http"):
                self.url = line.split()[1]
                self.line = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
                return self
            said.append(line)
        raise AssertionError("llama.cpp does not open it: " + "".join(said[-8:]))

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def ask(self, route: str, **body):
        self.line.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(self.line.getresponse().read())

    def ids(self, text: str, special: bool = False) -> list[int]:
        "The tokens of a text; `special`: as a prompt is read, with what begins it and marks that count"
        return self.ask("/tokenize", content=text, parse_special=special, add_special=special)["tokens"]

    def greedy(self, ids: list[int], n: int) -> tuple[list[int], list[dict[int, float]]]:
        "The `n` likeliest tokens that follow, and the log-probabilities of the five likeliest at each place"
        found = self.ask("/completion", prompt=ids, n_predict=n, temperature=0, top_k=1, samplers=["top_k"], n_probs=5,
                         ignore_eos=True, cache_prompt=False, return_tokens=True)
        return found["tokens"], [{c["id"]: c["logprob"] for c in place["top_logprobs"]}
                                 for place in found["completion_probabilities"]]
