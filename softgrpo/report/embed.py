"""The data of a report in the compact form that its page reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from softgrpo.log.files import number
from softgrpo.report.read import Row, Run

_WEIGHT_SCALE = 10_000  # weights travel as integers


def embed_json(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element whatever its strings hold.

    ASCII only (lone surrogates survive), and no ``<``, so neither ``</script>`` nor ``<!--``.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def pack_curves(run: Run) -> dict[str, Any]:
    """{name, step [n], columns {metric: [n] numbers or null}, evals [{step, ...}]}."""
    names = dict.fromkeys(key for row in run.steps for key in row if key != "step")
    columns = {name: [_short(row.get(name)) for row in run.steps] for name in names}
    return {
        "name": run.name,
        "step": [_short(row["step"]) for row in run.steps],
        "columns": {name: col for name, col in columns.items() if any(v is not None for v in col)},
        "evals": [{key: _short(value) for key, value in row.items()} for row in run.evals],
    }


def pack_samples(samples: Sequence[Row]) -> dict[str, Any]:
    """{vocabulary [strings], rows}: every token text once, positions as flat lists of integers.

    A position is [flags, token, candidate, weight, candidate, weight, ...] with flags = kind
    (1 soft) + 2 if forced, texts as indices into the vocabulary, weights in 1/10000.
    """
    vocabulary: dict[str, int] = {}
    rows = [_pack_sample(sample, vocabulary) for sample in samples]
    return {"vocabulary": list(vocabulary), "rows": rows}


def _pack_sample(sample: Row, vocabulary: dict[str, int]) -> dict[str, Any]:
    positions = sample.get("positions")
    packed = [
        pack_position(position, vocabulary)
        for position in (positions if isinstance(positions, list) else [])
        if isinstance(position, dict)
    ]
    row = {
        "step": _short(sample.get("step")),
        "phase": str(sample.get("phase", "train")),
        "prompt": _text(sample.get("prompt")),
        "answer": _text(sample.get("answer")),
        "reward": _short(sample.get("reward")),
        "advantage": _short(sample.get("advantage")),
        "finish": _text(sample.get("finish_reason")),
        "uid": _text(sample.get("uid")),
        "positions": packed,
    }
    if not packed:
        row["text"] = _text(sample.get("text"))
    return row


def pack_position(position: Row, vocabulary: dict[str, int]) -> list[int]:
    """One position as in `pack_samples`; new texts go into the vocabulary."""

    def index(text: Any) -> int:
        return vocabulary.setdefault(_text(text), len(vocabulary))

    flags = int(position.get("kind") == 1) + 2 * bool(position.get("forced"))
    packed = [flags, index(position.get("token"))]
    for text, weight in _pairs(position.get("candidates")):
        packed += [index(text), round(weight * _WEIGHT_SCALE)]
    return packed


def _pairs(candidates: Any) -> Iterable[tuple[Any, float]]:
    for pair in candidates if isinstance(candidates, list) else []:
        if isinstance(pair, list) and len(pair) == 2:
            yield pair[0], number(pair[1]) or 0.0


def _short(value: Any) -> float | int | None:
    """A number with six significant digits, integers as integers; None for all that is not one."""
    found = number(value)
    if found is None:
        return None
    return int(found) if found == int(found) else float(f"{found:.6g}")


def _text(value: Any) -> str:
    return "" if value is None else str(value)
