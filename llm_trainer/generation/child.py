"""A warm child process that writes text on request: one JSON object a line in, one a line out. Viewers keep one open
and never load torch themselves. Start it with: python -m llm_trainer.generation.child FOLDER [DEVICE]"""
# In:  {"id": 1, "prompt": "The", "max_new_tokens": 50, ...any field of `Sampling`}   {"cancel": 1}
# Out: {"ready": true, ...}   {"id": 1, "text": "...", "token": 5}   {"id": 1, "error": "one message"}
#      {"id": 1, "finish": "length", "tokens": 50, "seconds": 0.1}

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from llm_trainer.errors import LLMTrainerError, UsageError
from llm_trainer.workspace import preferred_device

LINE_LIMIT = 4_000_000  # characters of one request


def serve(model: Any, tokenizer: Any, lines: Iterable[str], send: Callable[[dict], None]) -> None:
    """Answer requests until `lines` end. They are read in a thread, so a `cancel` is seen while a text is written;
    requests that wait are answered in order."""
    requests: queue.Queue[dict | None] = queue.Queue()
    cancelled: set[Any] = set()

    def listen() -> None:
        for line in lines:
            if not line.strip(): continue
            try: request = json.loads(line) if len(line) <= LINE_LIMIT else None
            except (ValueError, RecursionError): request = None
            if not isinstance(request, dict): requests.put({})
            elif "cancel" in request: cancelled.add(str(request["cancel"]))
            else: requests.put(request)
        requests.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (request := requests.get()) is not None:
        key = request.pop("id", None)
        try: _answer(model, tokenizer, request, key, send, lambda key=key: str(key) in cancelled)
        except LLMTrainerError as e: send({"id": key, "error": str(e)})
        cancelled.discard(str(key))


def _answer(model, tokenizer, request, key, send, stopped) -> None:
    from llm_trainer.generation.sampling import Sampling
    from llm_trainer.generation.sampler import generate
    prompt, known = request.pop("prompt", None), {f.name for f in fields(Sampling)}
    if not isinstance(prompt, str): raise UsageError('A request is one JSON object with a "prompt" string')
    if odd := sorted(set(request) - known):
        raise UsageError(f"{odd[0]} is no setting of generation; known: {', '.join(sorted(known))}")
    try: sampling = Sampling(**request)
    except TypeError as e: raise UsageError(f"A setting has the wrong type: {e}") from None
    start, tokens = time.perf_counter(), 0

    def finish(why):
        send({"id": key, "finish": why, "tokens": tokens, "seconds": time.perf_counter() - start})

    for piece in generate(model, tokenizer, prompt, sampling):
        if stopped(): return finish("cancelled")
        if piece.finish is None:
            tokens += 1
            send({"id": key, "text": piece.text, "token": piece.token, "logprob": piece.logprob})
        else:
            if piece.text: send({"id": key, "text": piece.text, "token": None, "logprob": None})
            finish(piece.finish)


def main(argv: list[str] | None = None) -> int:
    """Load a folder, say that it is ready, and serve standard input."""
    folder, device = (*(sys.argv[1:] if argv is None else argv), "auto")[:2]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to stderr

    def send(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        from llm_trainer.generation.sampler import choose_threads, load_for_generation
        model, tokenizer = load_for_generation(folder, device, preferred_device())
        choose_threads(model)
        send({"ready": True, "device": str(model.head.device), "context": model.config.seq_len,
              "vocabulary": model.vocab_size})
        serve(model, tokenizer, sys.stdin, send)
    except LLMTrainerError as e:
        send({"id": None, "error": str(e)})
        return e.exit_code
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
