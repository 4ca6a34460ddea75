"""vLLM's server on Triton's interpreter: run_server.py OPTION ...

The processes that it starts import this file too, and with it the interpreter.
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import interpreter  # noqa: F401

if __name__ == "__main__":
    from vllm.entrypoints.openai.api_server import run_server
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asyncio.run(run_server(make_arg_parser(FlexibleArgumentParser()).parse_args()))
