"""Positions of a sample as lines of text: which candidates each was mixed from, at what weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import set_cell_size
from rich.text import Text

from softgrpo_kernels import soft_weights

if TYPE_CHECKING:
    from softgrpo_engine import Sample

# A mixture can have more candidates than fit into a line; the best ones carry the weight.
_SHOWN, _TOKEN_CELLS, _CANDIDATE_CELLS = 8, 10, 17


def candidate_lines(
    sample: Sample, tokenizer: Any, mixture: tuple[float, float], width: int, start: int = 0
) -> list[Text]:
    """Positions from ``start`` on, one a line of ``width`` cells: its number, then candidates and
    weights, best first. mixture: tau and weight_floor. A discrete position is its token alone."""
    record = sample.soft
    weights = soft_weights(record.gprime[start:], record.kind[start:], *mixture).tolist()
    ids, kinds = record.ids[start:].tolist(), record.kind[start:].tolist()
    shown = max(1, min(_SHOWN, (width - 4) // _CANDIDATE_CELLS))
    lines = []
    for i, (row, weight, kind) in enumerate(zip(ids, weights, kinds, strict=True), start):
        line = Text(f"{i:>4}", "dim")
        for token, share in list(zip(row, weight, strict=True))[: shown if kind else 1]:
            if token >= 0:
                style = "bold" if share >= 0.5 else "not dim" if share >= 0.01 else "dim"
                word = set_cell_size(_visible(tokenizer.decode([token])), _TOKEN_CELLS)
                line.append(f"  {word} " + (f"{share:.2f}" if kind else ""), style)
        line.rstrip()
        lines.append(line)
    return lines


def _visible(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
