"""softgrpo-serve under load: what it answers, how soon, and what memory it takes.

    python benchmarks/serve_load.py --clients 64 --minutes 10

First the throughput: every client asks a question, streamed and whole, beside `LLM.generate` on the
same requests in a process of its own. Then, for so many minutes, clients of all kinds at once:
good ones of mixed lengths, some that leave, some that read slowly, bad JSON, unknown settings,
prompts and bodies that are too long, wrong keys. Every answer has to be the one that its kind gets.
All of it stays on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, CHAT, METRICS = "load", "/v1/chat/completions", "/metrics"
QUESTIONS = (
    "What is {} + {}?",
    "Count from {} to {}.",
    "Write a short story about {} cats and {} dogs, with a beginning and an end.",
    "Why is {0} larger than {1}? " * 12,
)
# Kinds of clients: how many in a hundred, and the status that they have to get.
KINDS = {
    "whole": (25, 200),
    "stream": (35, 200),
    "slow": (8, 200),
    "leaves": (12, 200),
    "bad JSON": (4, 400),
    "unknown setting": (4, 400),
    "long prompt": (4, 400),
    "long body": (4, 413),
    "wrong key": (4, 401),
}


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen
    port: int

    @staticmethod
    def start(
        model: str, dtype: str, max_batch_size: int, max_waiting: int, kv_memory: float
    ) -> Server:
        command = [sys.executable, "-m", "softgrpo.cli.serve", "--model", model, "--soft"]
        command += ["--dtype", dtype]
        command += ["--port", "0", "--api-key", KEY, "--max-model-len", "2048"]
        command += ["--kv-memory", str(kv_memory)]
        command += ["--max-batch-size", str(max_batch_size), "--max-waiting", str(max_waiting)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        found = re.search(r":(\d+) ", process.stdout.readline())
        assert found, "the server did not start"
        return Server(process, int(found[1]))

    def cpu_seconds(self) -> float:
        """That it has used so far: on a machine with other work it says more than the clock."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB of its resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


@dataclass
class Answer:
    """status 0: the connection was lost. text: of the body."""

    status: int
    text: str
    first: float = 0.0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        return '"finish_reason"' in self.text and '{"error"' not in self.text

    @property
    def tokens(self) -> int:
        found = re.findall(r'"completion_tokens": ?(\d+)', self.text)
        return int(found[-1]) if found else 0


@dataclass
class Counts:
    """What came of the chaos."""

    answers: collections.Counter = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0


def question(chance: random.Random) -> dict[str, Any]:
    text = chance.choice(QUESTIONS).format(chance.randrange(100), chance.randrange(100))
    return {"messages": [{"role": "user", "content": text}], "seed": chance.randrange(2**31)}


async def ask(
    port: int, body: bytes, *, key: str = KEY, leave_after: int | None = None, pause: float = 0.0
) -> Answer:
    """One request. leave_after: bytes of the answer. pause: seconds between two small reads."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**14)
    parts, first, size = [], 0.0, 0
    try:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        while part := await reader.read(256 if pause else 2**14):
            first = first or time.perf_counter() - start
            parts.append(part)
            size += len(part)
            if leave_after is not None and size > leave_after:
                break
            await asyncio.sleep(pause)
    except ConnectionError:
        pass  # a body that is too large is not read to its end
    finally:
        writer.close()
    text = b"".join(parts).decode(errors="replace")
    status = int(text[9:12]) if text.startswith("HTTP/1.1 ") else 0
    return Answer(status, text, first, time.perf_counter() - start)


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return text


async def client(port: int, chance: random.Random, until: float, counts: Counts) -> None:
    """Asks until the time is over, each time as another kind of client."""
    kinds, weights = list(KINDS), [share for share, _ in KINDS.values()]
    while time.monotonic() < until:
        (kind,) = chance.choices(kinds, weights)
        body = {**question(chance), "max_tokens": chance.choice((1, 16, 64, 200))}
        # Several samples for some, so that the queue is full at times.
        body |= {"stream": kind != "whole", "soft": chance.randrange(2), "n": chance.choice((1, 3))}
        body["stream_options"] = {"include_usage": True}
        options: dict[str, Any] = {}
        data = None
        if kind == "bad JSON":
            data = b'{"messages": [' + b"[" * chance.randrange(1000)
        elif kind == "unknown setting":
            body["soft_tua"] = 1
        elif kind == "long prompt":
            body["messages"] = [{"role": "user", "content": "one two " * 6000}]
        elif kind == "long body":
            data = b"x" * (5 * 2**20)
        elif kind == "wrong key":
            options["key"] = "other"
        elif kind == "leaves":
            options["leave_after"] = chance.choice((0, 300, 2000))
        elif kind == "slow":
            options["pause"] = 0.05
        answer = await ask(port, data or json.dumps(body).encode(), **options)
        note(kind, answer, counts)
        if answer.status == 429:
            await asyncio.sleep(int(re.search(r"(?i)retry-after: (\d+)", answer.text)[1]))  # type: ignore[index]


def note(kind: str, answer: Answer, counts: Counts) -> None:
    counts.answers[kind, answer.status] += 1
    counts.tokens += answer.tokens
    allowed = {KINDS[kind][1], 429}
    if kind == "long body":
        allowed.add(0)  # the connection may be closed while the client still sends
    is_good = kind in ("whole", "stream", "slow") and answer.status == 200
    if answer.status not in allowed or (is_good and not answer.is_complete):
        counts.wrong.append(f"{kind}: status {answer.status}, {answer.text[:200]!r}")
    if kind == "stream" and answer.status == 200:
        counts.first.append(answer.first)


async def chaos(server: Server, clients: int, seconds: float) -> None:
    counts, memory = Counts(), [server.memory()]
    until = time.monotonic() + seconds

    async def watch() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(1)
            memory.append(server.memory())

    chances = [random.Random(seed) for seed in range(clients)]
    await asyncio.gather(watch(), *(client(server.port, c, until, counts) for c in chances))
    await asyncio.sleep(1)
    left = re.findall(
        r"^softgrpo_(?:running|waiting|kv_use) (.*)$", await get(server.port, METRICS), re.M
    )
    print(f"\n{clients} clients for {seconds:.0f} s: {counts.answers.total()} requests, "
          f"{counts.tokens} tokens of whole answers")  # fmt: skip
    for (kind, status), count in sorted(counts.answers.items()):
        print(f"  {kind:16} {status or 'closed':>6} {count:7}")
    print(f"answers that were not what they had to be: {len(counts.wrong)}")
    for line in counts.wrong[:10]:
        print(f"  {line}")
    if len(counts.first) > 1:
        cuts = statistics.quantiles(counts.first, n=100, method="inclusive")
        print(f"time to first token: p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s")
    quarter = max(1, len(memory) // 4)
    parts = [memory[i : i + quarter] for i in range(0, len(memory), quarter)]
    print("memory, MiB, most of each quarter:", *(f"{max(part):.0f}" for part in parts))
    print(f"left in the engine (running, waiting, share of the KV cache): {', '.join(left)}")


@dataclass
class Rate:
    """Tokens/s by the clock, and of the CPU time of the process that made them."""

    clock: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.clock:.0f} tokens/s ({self.cpu:.0f} a second of CPU time)"


async def throughput(server: Server, bodies: list[dict[str, Any]], *, stream: bool) -> Rate:
    """Of all of them at once."""
    rest = {"stream": stream, "stream_options": {"include_usage": True}}
    start, cpu = time.perf_counter(), server.cpu_seconds()
    answers = await asyncio.gather(
        *(ask(server.port, json.dumps({**body, **rest}).encode()) for body in bodies)
    )
    seconds, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
    assert all(answer.is_complete for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return Rate(tokens / seconds, tokens / cpu)


def generate(model: str, dtype: str, bodies: list[dict[str, Any]]) -> Rate:
    """Of `LLM.generate` on them."""
    from softgrpo_engine import LLM, SamplingParams, SoftParams

    llm = LLM(model, dtype=dtype, max_model_len=2048, max_batch_size=len(bodies))
    params = SamplingParams(max_tokens=bodies[0]["max_tokens"], ignore_eos=True)
    prompts = [body["messages"] for body in bodies]
    llm.generate(prompts, SamplingParams(max_tokens=4), SoftParams(), progress=False)  # warm
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, SoftParams(), progress=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(len(s.token_ids) for o in outputs for s in o.samples)
    return Rate(tokens / seconds, tokens / cpu)


def small_model(folder: Path) -> str:
    """A random model with the tokenizer of SmolLM2: its steps take next to no time."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from softgrpo_engine.model.source import resolve_model

    source = resolve_model("smollm2-135m")
    config = AutoConfig.from_pretrained(str(source))
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="directory, hub id or alias; `small` is random")
    add("--dtype", default="bfloat16", help="float32 where the CPU multiplies that faster")
    add("--clients", type=int, default=64)
    add("--minutes", type=float, default=10.0)
    add("--max-waiting", type=int, default=16, help="so few that the queue is full at times")
    add("--kv-memory", type=float, default=0.5, help="GiB; resident once all of it has been used")
    add("--tokens", type=int, default=64, help="of each answer in the measure of throughput")
    add("--generate", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the server
    chance = random.Random(0)
    rest = {"max_tokens": arguments.tokens, "ignore_eos": True}
    bodies = [{**question(chance), **rest} for _ in range(arguments.clients)]
    if arguments.generate:
        print(json.dumps(vars(generate(arguments.model, arguments.dtype, bodies))))
        return
    folder = tempfile.TemporaryDirectory()  # until the end of the program
    if arguments.model == "small":
        arguments.model = small_model(Path(folder.name))
    command = [
        sys.executable,
        __file__,
        "--generate",
        "--model",
        arguments.model,
        "--dtype",
        arguments.dtype,
    ]
    command += ["--clients", str(arguments.clients), "--tokens", str(arguments.tokens)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    alone = Rate(**json.loads(said))
    server = Server.start(
        arguments.model,
        arguments.dtype,
        arguments.clients,
        arguments.max_waiting,
        arguments.kv_memory,
    )
    try:
        asyncio.run(throughput(server, [{**b, "max_tokens": 4} for b in bodies], stream=False))
        print(f"LLM.generate, {arguments.clients} samples at once: {alone}")
        for name, stream in (("whole", False), ("streamed", True)):
            rate = asyncio.run(throughput(server, bodies, stream=stream))
            shares = f"{rate.clock / alone.clock:.2f} and {rate.cpu / alone.cpu:.2f} of it"
            print(f"served, {name}: {rate}, {shares}", flush=True)
        asyncio.run(chaos(server, arguments.clients, 60 * arguments.minutes))
        server.process.send_signal(signal.SIGTERM)
        print(f"exit status after SIGTERM: {server.process.wait(60)}")
    finally:
        server.process.kill()


if __name__ == "__main__":
    main()
