"""softgrpo-serve: a model over HTTP, for the clients of OpenAI's protocol."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softgrpo.cli.errors import one_line_errors

if TYPE_CHECKING:
    from softgrpo_engine import SoftParams

# Connections that wait for nothing but their body or a place in the queue.
_SPARE_CONNECTIONS = 256
_KEY_VARIABLE = "SOFTGRPO_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-serve``; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        with one_line_errors(parser.prog, "stopped"):
            _serve(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo-serve",
        description="Serve a model to OpenAI clients and on a page of its own, with soft tokens.",
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="directory, hub id or alias (%(default)s)")
    add("--served-model-name", metavar="NAME", help="as clients call it (its directory or id)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    add("--port", type=int, default=8000, help="0 is any free one (%(default)s)")
    add("--api-key", metavar="KEY", help=f"clients must send it (${_KEY_VARIABLE}, which is in no "
        "list of processes; else none)")  # fmt: skip
    add("--dtype", default="bfloat16", help="bfloat16 or float32 (%(default)s)")
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer (the model's)")
    add("--max-batch-size", type=int, default=64, metavar="N", help="samples at once (%(default)s)")
    add("--max-waiting", type=int, default=256, metavar="N", help="samples in the queue, beyond "
        "which clients are sent away (%(default)s)")  # fmt: skip
    add("--kv-memory", type=float, metavar="GIB", help="of the KV cache (what the batch needs)")
    add("--split-thinking", action="store_true", help="send what comes before the end of thinking "
        "as reasoning_content")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--soft", action="store_true", help="soft tokens, whatever the model was for")
    mode.add_argument("--discrete", action="store_true", help="ordinary tokens by default")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install 'softgrpo[serve]'")
    if arguments.max_waiting < 0:
        raise ValueError(f"--max-waiting {arguments.max_waiting} is not allowed: must be >= 0")
    api_key = _api_key(arguments.api_key)
    # A port in use is found before the model is loaded.
    listener = _listener(arguments.host, arguments.port)
    # Heavy imports come after the arguments are known to be good.
    import uvicorn

    from softgrpo.serve.app import make_app
    from softgrpo.serve.settings import ServeSettings
    from softgrpo.serve.stream import SEND_SECONDS
    from softgrpo_engine import LLM
    from softgrpo_engine.model.source import resolve_model

    path = resolve_model(arguments.model)
    llm = LLM(
        path,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_batch_size=arguments.max_batch_size,
        kv_memory=arguments.kv_memory,
    )
    settings = ServeSettings(
        name=arguments.served_model_name or _name(arguments.model),
        soft=_default_soft(arguments, llm.default_soft),
        max_waiting=arguments.max_waiting,
        api_key=api_key,
        split_thinking=arguments.split_thinking,
        is_local=ipaddress.ip_address(listener.getsockname()[0]).is_loopback,
    )
    logging.basicConfig(format="%(asctime)s %(message)s")
    config = uvicorn.Config(
        make_app(llm, settings),
        log_level="warning",
        access_log=False,
        lifespan="off",
        limit_concurrency=arguments.max_batch_size + arguments.max_waiting + _SPARE_CONNECTIONS,
        server_header=False,
    )
    if sys.platform == "linux":
        # What a reader that stopped has not taken would hold its connection, and the server's end.
        patience = int(1000 * SEND_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    host, port = listener.getsockname()[:2]
    try:
        listener.listen()
    except OSError as error:  # another server began to listen while this one loaded its model
        raise ValueError(f"cannot listen on {host} port {port}: {error}") from None
    host = f"[{host}]" if ":" in host else host
    print(f"serving {settings.name} on http://{host}:{port} (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def _api_key(argument: str | None) -> str | None:
    """Of the command line, or of the environment."""
    name, key = "--api-key", argument
    if argument is None:
        name, key = _KEY_VARIABLE, os.environ.get(_KEY_VARIABLE)
    if key == "":
        raise ValueError(f"an empty {name} would let everybody in: leave it out, or give one")
    return key


def _listener(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error}") from None
    return listener


def _default_soft(arguments: argparse.Namespace, of_model: SoftParams | None) -> SoftParams | None:
    from softgrpo_engine import SoftParams

    if arguments.discrete:
        return None
    return of_model or (SoftParams() if arguments.soft else None)


def _name(model: str) -> str:
    """An id or alias as it is; a directory by its last part, a run's `runs/NAME/model` by NAME."""
    path = Path(model)
    if not path.exists():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


if __name__ == "__main__":
    sys.exit(main())
