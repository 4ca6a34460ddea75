"""Commands in processes of their own that begin where their imports end.

They are of the standard library's fork server, which imports PyTorch and the trainer once; every
new interpreter would take five seconds for them. To a test they are what a command line starts:
they can be killed, be one of several ranks, and have an exit status.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["softgrpo.trainer", "softgrpo.supervised.trainer", "softgrpo.evaluation", "transformers"]
)


def start(module, *arguments, environment=None, output=os.devnull):
    """`python -m module arguments` with further variables; both streams are added to a file."""
    arguments = [str(argument) for argument in arguments]
    process = SERVER.Process(
        target=_run, args=(module, arguments, environment or {}, str(output)), daemon=True
    )
    process.start()
    return process


def ranks(*arguments, machines=1, output=os.devnull):
    """softgrpo-train in two processes, as torchrun starts them on one machine or on two."""
    variables = variables_of_ranks(machines)
    return [
        start("softgrpo.cli.train", *arguments, environment=rank, output=output)
        for rank in variables
    ]


def variables_of_ranks(machines=1):
    """Those by which two processes find each other."""
    local = 2 // machines
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common["LOCAL_WORLD_SIZE"] = str(local)
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in (0, 1)]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def exit_status(process, seconds=120):
    """Of a signal its negative number."""
    process.join(seconds)
    assert process.exitcode is not None, f"still there after {seconds} s"
    return process.exitcode


def kill_in_the_middle(process, file, text, count):
    """kill -9 as soon as `text` stands so often in a file that the process writes."""
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count(text) >= count):
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert exit_status(process) == -signal.SIGKILL


def _run(module, arguments, environment, output):
    os.environ.update(environment)
    with open(output, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(importlib.import_module(module).main(arguments))
