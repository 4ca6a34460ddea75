"""The kernels of the soft step as a decode launches them: 152k and 128k tokens, 8 to 64 slots."""

from aot import TARGETS, Spec

GPU = "softgrpo_kernels.gpu.soft_token"


# The parameters of rows that are the batch's, or stand in a record.
PLACES = {"at_row": "*i64", "at_step": "*i64", "phases": "*u8"}
ROW = {"floats": "*fp32", "ints": "*i64", "columns": "i32", **PLACES}
COLLECTED = {
    "best": "*i64",
    "listed_a": "*fp32",
    "listed_id": "*i32",
    "count": "*i32",
    "histogram": "*i64",
}
# Where `sample` writes what it has drawn.
BATCH = {
    "out_weights": "*fp32", "out_logp": "*fp32", "out_n": "*i32", "out_embed": "*bf16",
    "out_valid": "*u8", "table": "*bf16",
}  # fmt: skip
STATISTICS = {"out_lse": "*fp32", "out_entropy": "*fp32"}
RECORD = {"out_forced": "*u8", "out_drawn": "*i64"}


def statistics(dtype, entropy):
    absent = dict.fromkeys((*PLACES, "count", "histogram")) if entropy else {}
    signature = {
        "tile_max": "*fp32", "chunk_sums": "*fp32", "count": "*i32", "histogram": "*i64",
        "logits": f"*{dtype}",
        "stride": "i32", "vocabulary": "i32", "chunks": "i32", **ROW,
    }  # fmt: skip
    return Spec(
        f"statistics {dtype}{' entropy' if entropy else ''}",
        f"{GPU}.statistics:statistics_kernel",
        {name: kind for name, kind in signature.items() if name not in absent},
        {"ENTROPY": entropy, **absent},
        divisible=("stride", "vocabulary"),
        num_warps=8,
        fp_fusion=True,
        wide_loads=1 if dtype == "bf16" else 2,
        narrow_loads=0 if entropy else 1,  # the phase
    )


def sample(k, *, record=True, unlisted=False, every=False, tiles=2048):
    """A row of a record, as the engine draws it, or of a batch."""
    names = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", "terminal_ids": "*i32"}
    signature = {
        "logits": "*bf16", "tile_max": "*fp32", "chunk_sums": "*fp32", "softcap": "fp32",
        "logit_scale": "fp32", "out_ids": "*i32", "out_gprime": "*fp32", "out_kind": "*u8",
        "out_token": "*i32", "out_logprob": "*fp32", "out_kept_mass": "*fp32",
        **ROW, **COLLECTED, **names, **BATCH, **STATISTICS, **RECORD,
        **dict.fromkeys(
            ("stride", "vocabulary", "tiles", "chunks", "k_max", "capacity", "terminal_width",
             "hidden_stride", "weight_stride", "width", "table_stride", "table_width"), "i32",
        ),
    }  # fmt: skip
    absent = [*(BATCH if record else {**RECORD, **PLACES})]
    absent += [] if unlisted else [*COLLECTED]
    absent += [] if every else ["bias", *STATISTICS]
    absent += [] if every or record else [*names, "out_kept_mass"]
    name = f"sample {'of a record' if record else 'of a batch'} k {k}"
    return Spec(
        f"{name}{' unlisted' if unlisted else ''}{' every output' if every else ''}",
        f"{GPU}.sample:sample_kernel",
        {name: kind for name, kind in signature.items() if name not in absent},
        {
            "K": k, "TILES": max(tiles, k), "CHUNKS": max(tiles // 32, 1),
            "TERMINALS": 2 if record or every else 0, "SOFTCAP": every, "JOINT": every,
            "BLOCK_H": 512, **dict.fromkeys(absent),
        },
        divisible=(
            "stride", "vocabulary", "weight_stride", "hidden_stride", "width", "table_stride",
            "table_width",
        ),
        num_warps=8 if k <= 16 else 16,
        wide_loads=1 if k > 8 else 0,
        narrow_loads=3,  # the phase, and of a token drawn from the vocabulary its logit
        # The assembler takes a minute for a network that sorts many keys: one GPU of each maker.
        targets=tuple(TARGETS) if k <= 8 else ("sm_90", "gfx942"),
    )  # fmt: skip


SPECS = [
    statistics("bf16", False),
    statistics("fp32", True),
    # k_max 1 and a vocabulary of one chunk.
    sample(2, record=False, tiles=32),
    sample(8),
    sample(64, record=False, unlisted=True, every=True),
    Spec(
        "mixture of a record",
        f"{GPU}.mixture:record_mixture_kernel",
        {
            "out": "*bf16", "ids": "*i32", "gprime": "*fp32", "kind": "*u8", "floats": "*fp32",
            "at_row": "*i64", "at_step": "*i64", "table": "*bf16",
            **dict.fromkeys(
                ("columns", "before", "capacity", "k_max", "table_stride", "width"), "i32"
            ),
        },
        {"K": 8, "BLOCK_H": 512},
        divisible=("table_stride", "width"),
    ),
]  # fmt: skip
