"""`python -m llm_trainer` is the program `llm-trainer`."""
import sys

from llm_trainer.cli.commands import main

if __name__ == "__main__": sys.exit(main())
