"""The folder of an evaluation: settings, finished questions, results."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from softgrpo.log.files import dotted, read_jsonl, write_atomically


@dataclass(frozen=True)
class Settings:
    """All that the samples depend on; a folder holds one such set.

    soft: SoftParams without the temperature; its top_k and top_p are those of discrete tokens too.
    thoughts: "own", or what stands in their place: "argmax", the heaviest candidate alone of every
    mixture; "filler", the tokens `filler_thoughts` (a FillerConfig) behind every prompt.
    engine: as in `rollout.engine`; another one rounds differently.
    model_files, questions: digests, so that a retrained model and edited data are noticed.
    """

    model: str
    engine: str
    dtype: str
    batch_invariant: bool
    tasks: list[str]
    modes: list[str]
    temperatures: list[float]
    samples: int
    max_tokens: int
    limit: int | None
    seed: int
    soft: dict[str, Any]
    thoughts: str
    filler_thoughts: dict[str, Any]
    system_prompt: str | None
    few_shot: list[dict[str, str]]
    prompt_template: str | None
    questions: dict[str, str]
    model_files: str

    def to_dict(self) -> dict[str, Any]:
        """As settings.json holds it."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """Eight hexadecimal digits that name this set."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:8]


class EvalFolder:
    """settings.json, samples.jsonl (a line for every finished question), results.json, report.html.

    The constructor makes the folder or takes up what is in it. It raises ValueError, naming the
    setting, for a folder of other settings, and for one that another process is writing to.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path = Path(path)
        self.samples = self.path / "samples.jsonl"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "settings.json"
        if file.exists():
            _check_same(json.loads(file.read_text()), settings.to_dict(), self.path)
        else:
            write_atomically(file, json.dumps(settings.to_dict(), indent=1) + "\n")
        self._file = _open_for_appending(self.samples)

    def rows(self) -> list[dict[str, Any]]:
        """The finished questions, in the order in which they were finished."""
        return read_jsonl(self.samples)

    def append(self, row: dict[str, Any]) -> None:
        """One finished question; a line is written whole, or cut off when the folder is opened."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Lets another process write here."""
        self._file.close()


def model_digest(path: Path) -> str:
    """A digest of a model directory: its small files, and size and both ends of its weights."""
    digest = hashlib.sha256()
    kinds = (".json", ".jinja", ".safetensors")
    for file in sorted(p for p in path.iterdir() if p.suffix in kinds):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(2**20))
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def _check_same(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    old, new = dotted(then), dotted(now)
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{path} was begun with {name} = {old.get(name)!r}, this command has "
                f"{new.get(name)!r}: give the same setting, or another --output"
            )


def _open_for_appending(path: Path) -> IO[bytes]:
    """Locks the file and cuts off a last line that a kill left half written."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"another softgrpo-eval is writing to {path.parent}") from None
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return file
        end = start
    file.truncate(0)
    return file
