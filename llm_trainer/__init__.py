"""Train a GPT-style Transformer on your own machine: detached runs, honest status, exact resume, verified checkpoints

Modules:

- `llm_trainer.failpoints`: Named places where the tests make this process fail. Nothing happens, at the price of one look at an empty dict, unless `LLM_TRAINER_FAILPOINTS="name=action[:nth]"` is set: the nth hit (default 1) of that place is killed or raises.
- `llm_trainer.frontend`: A strict front end for python-fire, built from the commands' signatures. Knows nothing of training.
- `llm_trainer.generate_server`: A warm child process that writes text on request: one JSON object a line in, one a line out. Viewers keep one open and never load torch themselves. Start it with: python -m llm_trainer.generate_server FOLDER [DEVICE]
- `llm_trainer.worker`: The process that trains a run: waits for its turn, turns events into files, and always has a last word."""

__version__ = "0.1.0"
