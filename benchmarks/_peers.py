"""Other engines for rollout_throughput.py and train_step.py, each in a process of its own.

A peer is timed after ours, on the idle machine. One that cannot run is reported absent, with the
reason, and the benchmark goes on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# mode -> batch -> seconds of the repeats
Seconds = dict[str, dict[int, list[float]]]


@dataclass(frozen=True)
class PeerSettings:
    """What all engines are asked to do."""

    model: str
    batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    sampling: dict[str, Any]
    soft_tau: float | None = None  # of vLLM with our plug-in


class Absent(Exception):
    """The peer cannot run here; the message says why."""


def vllm(python: Path | None, settings: PeerSettings) -> Seconds:
    """vLLM in the interpreter `python`: the same sampling and greedy, or soft tokens alone."""
    if python is None or not python.exists():
        raise Absent("give its interpreter with --vllm-python")
    done = run_peer(
        [str(python), str(Path(__file__).parent / "_vllm_peer.py")],
        settings.threads,
        json.dumps(vars(settings)),
    )
    found = json_line(done)
    return {
        mode: {int(batch): s for batch, s in batches.items()} for mode, batches in found.items()
    }


def llama_cpp(binary: Path | None, gguf: Path | None, settings: PeerSettings) -> Seconds:
    """`llama-batched-bench` on a GGUF of the same weights, with its own choice of batch sizes and
    attention; it does not sample at all."""
    if binary is None or not binary.exists() or gguf is None or not gguf.exists():
        raise Absent("give llama-batched-bench with --llama-bench and its model with --llama-gguf")
    length = settings.prompt_tokens + settings.new_tokens
    batches = ",".join(map(str, settings.batch_sizes))
    command = [
        str(binary), "-m", str(gguf), "-c", str(2 * length * max(settings.batch_sizes)),
        "-npp", str(settings.prompt_tokens), "-ntg", str(settings.new_tokens), "-npl", batches,
        "-t", str(settings.threads), "--output-format", "jsonl",
    ]  # fmt: skip
    seconds: dict[int, list[float]] = {}
    for _ in range(settings.repeats):
        for line in run_peer(command, settings.threads).splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                seconds.setdefault(row["pl"], []).append(row["t"])
    return {"no sampling": seconds}


# How llama.cpp calls what the kernel of Linux calls so.
_LLAMA_ISA = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
}


def llama_build(binary: Path, gguf: Path, machine: list[str]) -> dict[str, Any]:
    """What the build of llama.cpp says of itself, by the `llama-completion` beside its benchmark:
    the features of CPUs that it was compiled for, and those of this machine (as in /proc/cpuinfo)
    that it leaves unused. Empty where that program is not there."""
    program = binary.with_name("llama-completion")
    if not program.exists():
        return {}
    command = [str(program), "-m", str(gguf), "-n", "1", "-p", "1", "-no-cnv"]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    found = set(re.findall(r"([A-Z0-9_]+) = 1", done.stderr + done.stdout))
    known = [name for name in machine if name in _LLAMA_ISA]
    return {
        "features": sorted(found),
        "unused": [name for name in known if _LLAMA_ISA[name] not in found],
    }


def json_line(text: str) -> Any:
    """The last line that is a JSON object: what a peer's libraries print is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise Absent("it printed no result")


def run_peer(command: list[str], threads: int, text: str = "") -> str:
    """Standard output of a peer; raises Absent with its last words when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0 or not done.stdout.strip():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise Absent(f"{Path(command[0]).name} failed: {lines[-1]}")
    return done.stdout
