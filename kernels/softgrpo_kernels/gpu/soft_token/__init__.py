"""One soft step in Triton.

The statistics kernel reads the logits once (or the LM head's leaves them with their statistics),
the selection its K best tiles again, from the cache; a third kernel draws, a fourth mixes the
embeddings. Rows over the whole vocabulary have kernels of their own. Nothing waits for the device.
"""

from __future__ import annotations

from softgrpo_kernels.gpu.soft_embedding import mix_into
from softgrpo_kernels.gpu.soft_token.draw import draw
from softgrpo_kernels.gpu.soft_token.full_vocabulary import sample_full_vocabulary
from softgrpo_kernels.gpu.soft_token.lm_head import MOST_ROWS, lm_head_statistics
from softgrpo_kernels.gpu.soft_token.select import select
from softgrpo_kernels.gpu.soft_token.statistics import vocabulary_statistics
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import SoftToken, SoftTokenInputs
from softgrpo_kernels.tensors import unit_stride


def soft_token(inputs: SoftTokenInputs, rows: RowParameters, out: SoftToken) -> None:
    """See `softgrpo_kernels.reference.soft_token`; float32, bfloat16 or float16. Without logits
    they are computed from the head."""
    logits, embed, terminal_ids, head, joint = inputs
    batch, need_entropy = len(out.token), out.entropy is not None
    if not batch:
        return
    if logits is None and batch <= MOST_ROWS:
        assert head is not None
        logits, tile_max, chunk_sums = lm_head_statistics(head, rows, need_entropy=need_entropy)
    else:
        if logits is None:
            assert head is not None
            logits = head.logits()
        logits = unit_stride(logits)
        tile_max, chunk_sums = vocabulary_statistics(logits, rows, need_entropy=need_entropy)
    keys = select(logits, tile_max, rows)
    draw(keys, chunk_sums, rows, out, terminal_ids, head, joint)
    sample_full_vocabulary(logits, rows, out, chunk_sums, joint=joint)
    if embed is not None and out.embed is not None:
        mix_into(out.embed, out.ids, out.weights, embed)
