"""vLLM's server on Triton's interpreter: run_server.py OPTION ...

The processes that it starts import this file too, and with it the interpreter.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import interpreter  # noqa: F401

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
