"""The kernels of the soft step as a decode launches them: 152k and 128k tokens, 8 to 64 slots."""

from aot import TARGETS, Spec

GPU = "softgrpo_kernels.gpu.soft_token"


def statistics(dtype, entropy):
    return Spec(
        f"statistics {dtype}{' entropy' if entropy else ''}",
        f"{GPU}.statistics:statistics_kernel",
        {
            "tile_max": "*fp32", "chunk_sums": "*fp32", "logits": f"*{dtype}", "floats": "*fp32",
            "ints": "*i64", "stride": "i32", "vocabulary": "i32", "chunks": "i32", "batch": "i32",
        },
        {"ENTROPY": entropy},
        divisible=("stride", "vocabulary"),
        num_warps=8,
        fp_fusion=True,
        wide_loads=1 if dtype == "bf16" else 2,
    )  # fmt: skip


def select(dtype, k, *, tiles=2048):
    return Spec(
        f"select {dtype} k {k}",
        f"{GPU}.select:select_kernel",
        {
            "out_keys": "*i64", "logits": f"*{dtype}", "tile_max": "*fp32", "ints": "*i64",
            **dict.fromkeys(("stride", "vocabulary", "tiles", "batch", "k_max"), "i32"),
        },
        {"K": k, "TILES": max(tiles, k), "TILE": 128},
        divisible=("stride", "vocabulary"),
        num_warps=4 if k <= 16 else 8,
        fp_fusion=True,
        wide_loads=1 if k > 8 else 0,
        # The assembler takes a minute for a network that sorts many keys: one GPU of each maker.
        targets=tuple(TARGETS) if k <= 8 else ("sm_90", "gfx942"),
    )  # fmt: skip


def draw(k, *, head=False, every=False, chunks=64):
    absent = dict.fromkeys(("bias", *(() if head else ("hidden", "weight"))))
    absent |= {} if every else dict.fromkeys(("terminal_ids", "out_lse", "out_entropy"))
    absent |= {} if every or head else {"out_kept_mass": None}
    signature = {
        "keys": "*i64", "chunk_sums": "*fp32", "floats": "*fp32", "ints": "*i64",
        "terminal_ids": "*i32", "hidden": "*bf16", "weight": "*bf16", "softcap": "fp32",
        "logit_scale": "fp32", "out_ids": "*i32", "out_gprime": "*fp32", "out_weights": "*fp32",
        "out_logp": "*fp32", "out_n": "*i32", "out_token": "*i32", "out_token_logp": "*fp32",
        "out_kind": "*u8", "out_lse": "*fp32", "out_entropy": "*fp32",
        "out_kept_mass": "*fp32", "out_valid": "*u8",
        **dict.fromkeys(
            ("chunks", "batch", "terminal_width", "hidden_stride", "weight_stride", "width",
             "k_max"), "i32",
        ),
    }  # fmt: skip
    return Spec(
        f"draw k {k}{' head' if head else ''}{' every output' if every else ''}",
        f"{GPU}.draw:draw_kernel",
        {name: kind for name, kind in signature.items() if name not in absent},
        {
            "K": k, "CHUNKS": chunks, "TERMINALS": 2 if every else 0, "HEAD": head, "BIAS": False,
            "SOFTCAP": False, "JOINT": every, "LSE": every, "ENTROPY": every,
            "KEPT_MASS": every or head, **absent,
        },
        divisible=("weight_stride", "hidden_stride", "width"),
        num_warps=4,
    )  # fmt: skip


SPECS = [
    statistics("bf16", False),
    statistics("fp32", True),
    # k_max 1 and a vocabulary of one chunk.
    select("bf16", 2, tiles=32),
    draw(2, chunks=1),
    select("bf16", 64),
    select("fp32", 16),
    draw(32, head=True),
    draw(64, every=True),
]
