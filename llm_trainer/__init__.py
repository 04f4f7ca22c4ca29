"""Train a GPT-style Transformer on your own machine: detached runs, honest status, exact resume, verified checkpoints

The command line is `llm-trainer`. In Python: `llm_trainer.config.load_config` reads a profile, `llm_trainer.launch.start`
trains it in the background, `llm_trainer.train.train` here and now as an iterator of events, `llm_trainer.live.watch` shows
a run in a notebook, `llm_trainer.runs.list_runs` finds all of them, `llm_trainer.sampler.generate` writes text.

Docs: https://llm-trainer.github.io/llm_trainer"""

__version__ = "0.1.0"
