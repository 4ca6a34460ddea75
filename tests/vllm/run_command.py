"""A command of softgrpo, with vLLM on Triton's interpreter: run_command.py MODULE ARGUMENT ...

The processes that vLLM starts import this file too, and with it the interpreter.
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import interpreter  # noqa: F401

if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    sys.exit(import_module(module).main(arguments))
