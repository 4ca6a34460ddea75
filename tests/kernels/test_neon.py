"""The C++ core on 64-bit Arm: cross-compiled with the flags of the build, run by an emulator."""

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from softgrpo_kernels import SoftToken, soft_token
from softgrpo_kernels import noise as plain
from softgrpo_kernels.methods import MULTIPLEX, NOISES
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.tensors import DTYPES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PREFIX = "aarch64-linux-gnu-"
TOOLS = (PREFIX + "g++", PREFIX + "objdump", "qemu-aarch64")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

NOISE_FUNCTIONS = ("gumbel_of_ids", "normal_of_ids", "log_gamma_of_ids", "gumbel_argmax")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shell(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Object files of the core, one per source file; warnings of -Wall are errors."""
    folder = tmp_path_factory.mktemp("aarch64")
    options = re.search(
        r"target_compile_options\(\S+ PRIVATE ([^)]*)\)",
        (ROOT / "kernels" / "extension.cmake").read_text(),
    )[1].split()
    folders = [ROOT / "kernels" / "csrc", ROOT / "engine" / "csrc"]
    sources = [f for folder in folders for f in folder.glob("*.cpp")]
    sources = [f for f in sources if not f.name.startswith(("bind_", "module"))]
    sources.append(HERE / "csrc" / "driver.cpp")

    def compile_one(source):
        out = folder / f"{source.stem}.o"
        shell(
            PREFIX + "g++", "-std=c++17", *options, "-Werror", "-fopenmp",
            *(f"-I{folder}" for folder in folders), "-c", source, "-o", out,
        )  # fmt: skip
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(scope="module")
def run(objects):
    """run(op, arguments) -> the bytes of the results. Arguments: numbers (int64) and tensors."""
    folder = objects[0].parent
    # Static: the emulator then needs no libraries of that machine.
    shell(PREFIX + "g++", "-static", "-fopenmp", *objects, "-o", folder / "driver")

    def run(op, arguments):
        with open(folder / "in", "wb") as file:
            for a in arguments:
                file.write(memory(a if isinstance(a, torch.Tensor) else torch.tensor(a)))
        shell("qemu-aarch64", "-E", "OMP_NUM_THREADS=2", folder / "driver", op,
              folder / "in", folder / "out")  # fmt: skip
        return (folder / "out").read_bytes()

    return run


def memory(x):
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors(data, layout):
    """The results in the bytes, by their dtypes and shapes."""
    data, out = bytearray(data), []
    for dtype, shape in layout:
        end = shape.numel() * dtype.itemsize
        out.append(torch.frombuffer(data[:end], dtype=dtype).reshape(shape))
        data = data[end:]
    assert not data
    return out


def test_noise_bits(run):
    golden = json.loads((HERE / "golden_noise.json").read_text())
    rows = golden["rows"]
    keys = [torch.tensor([r[name] for r in rows]) for name in ("seed", "position", "uid", "stream")]
    ids = torch.tensor(golden["ids"], dtype=torch.int32).expand(len(rows), -1)
    (noise,) = tensors(run("gumbel_noise", [*ids.shape, ids, *keys]), [(torch.float32, ids.shape)])
    want = [[float.fromhex(x) for x in row["gumbel"]] for row in rows]
    assert torch.equal(noise, torch.tensor(want, dtype=torch.float32))

    # Every lane, a rest, ids that are none, keys of all 64 and 32 bits.
    ids = torch.randint(-1, 200_000, (50, 203), dtype=torch.int32)
    keys = [torch.randint(-(2**62), 2**62, (50,)) * 2]
    keys += [torch.randint(2**32, (50,)) for _ in range(3)]
    (noise,) = tensors(run("gumbel_noise", [*ids.shape, ids, *keys]), [(torch.float32, ids.shape)])
    assert torch.equal(noise, plain.gumbel_noise(ids, *keys))


def mixed_rows(vocabulary, dtype):
    """Logits and parameters: every mode, every kind of noise, sets within and beyond the slots."""
    rows = 24
    z = 3 * torch.randn(rows, vocabulary)
    z[1] = 1.5  # all tied
    z[3] = z[3].round()  # many ties
    z[5, torch.rand(vocabulary) < 0.9] = -torch.inf
    z[5, -1] = 0.5
    z[7] = torch.where(z[7] > 0, 0.0, -0.0)
    z[20, vocabulary // 2] = torch.nan
    z[21, -1] = torch.inf
    z[22] = -torch.inf
    noise = torch.arange(rows) % len(NOISES)
    scales = torch.tensor([1.0, 1.0, 2.0, 0.05, 8.0, 8.0, 0.5, 1.0])
    mode = torch.full((rows,), 2)
    mode[[0, 13]] = 0
    mode[10:13] = 1
    mode[19] = 3
    top_k = torch.randint(1, 31, (rows,))
    top_k[11], top_k[12] = -1, 200
    top_p = torch.linspace(0.6, 1.0, rows)
    top_p[11] = 0.9
    settings = {
        "temperature": torch.linspace(0.5, 1.4, rows),
        "top_k": top_k,
        "top_p": top_p,
        "min_p": torch.where(torch.arange(rows) % 3 == 0, 0.02, 0.0),
        "gumbel_tau": 0.2,
        "weight_floor": torch.where((torch.arange(rows) % 3 == 0) & (noise < MULTIPLEX), 0.05, 0.0),
        "noise_scale": scales[noise],
        "noise_clamp": None,
        "eps": torch.where(torch.arange(rows) % 7 == 1, 1e-6, 0.0),
        "seed": 7,
        "position": torch.arange(rows),
        "uid": 3,
        "stream": 1,
        "mode": mode,
        "noise": noise,
    }
    return z.to(dtype), settings


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
# Less than a tile and no multiple of a vector; many tiles; a multiple of everything.
@pytest.mark.parametrize("vocabulary", [203, 5001, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_token(run, dtype, vocabulary, order):
    logits, settings = mixed_rows(vocabulary, dtype)
    embed = torch.randn(vocabulary, 37).to(dtype)
    terminal = torch.randint(vocabulary, (len(logits), vocabulary // 4), dtype=torch.int32)
    want = soft_token(
        logits, embed, **settings, terminal_ids=terminal, order=order,
        need_lse=True, need_entropy=True, need_kept_mass=True, backend="reference",
    )  # fmt: skip
    assert len(want.kind[want.valid & (settings["mode"] == 2)].unique()) == 2

    packed = RowParameters.pack(len(logits), logits.device, 32, **settings)
    sizes = [*logits.shape, packed.k_max, terminal.shape[1], embed.shape[1]]
    inputs = [logits, embed, packed.floats, packed.ints, terminal]
    data = run("soft_token", [*sizes, int(order == "joint"), DTYPES[dtype], *inputs])
    names = [field.name for field in fields(SoftToken)]
    layout = [(getattr(want, name).dtype, getattr(want, name).shape) for name in names]
    have = SoftToken(**dict(zip(names, tensors(data, layout), strict=True)))

    for name in ("ids", "n", "token", "kind", "valid"):
        assert torch.equal(getattr(have, name), getattr(want, name)), name
    for name in ("gprime", "weights", "logp", "token_logp", "lse", "entropy", "kept_mass"):
        torch.testing.assert_close(
            getattr(have, name), getattr(want, name), rtol=1e-6, atol=1e-6, equal_nan=True
        )
    # One rounding to the table's dtype.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(have.embed, want.embed, rtol=max(ulp, 1e-6), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indexed_dot(run, dtype):
    rows, slots, vocabulary, width = 5, 7, 90, 203
    hidden, table = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    ids = torch.randint(-1, vocabulary, (rows, slots), dtype=torch.int32)
    data = run("indexed_dot", [rows, slots, vocabulary, width, DTYPES[dtype], hidden, table, ids])
    (dots,) = tensors(data, [(torch.float32, ids.shape)])
    want = (hidden.double()[:, None] * table.double()[ids.clamp(min=0)]).sum(-1)
    want = torch.where(ids >= 0, want, 0.0)
    torch.testing.assert_close(dots, want.float(), rtol=1e-6, atol=1e-5)


@pytest.fixture(scope="module")
def assembly(objects):
    """Instructions of every function of the noise and of the passes over the vocabulary."""
    code = {}
    for file in objects:
        if file.stem not in ("gumbel_noise", "soft_token_perturb", "soft_token"):
            continue
        text = shell(PREFIX + "objdump", "-dC", "--no-show-raw-insn", file)
        for block in text.split("\n\n"):
            title = re.search(r"<(.*)>:\n", block)
            if title:
                code[f"{file.stem}: {title[1]}"] = block
    return code


@pytest.mark.parametrize(
    ("function", "instructions"),
    [
        ("tile_maxima<float>", [r"fcm(gt|ge)", r"(bif|bit|bsl|fmaxnm)"]),
        ("tile_maxima<softgrpo::Bf16>", [r"shl", r"fcm(gt|ge)", r"(bif|bit|bsl|fmaxnm)"]),
        ("exponential_sums<softgrpo::Bf16>", [r"fdiv", r"fm(ul|la)", r"fadd"]),
        ("dot<softgrpo::Bf16>", [r"fm(ul|la)"]),
        *((name, [r"eor", r"fmul", r"fadd"]) for name in NOISE_FUNCTIONS),
    ],
)
def test_vector_instructions(assembly, function, instructions):
    bodies = {name: body for name, body in assembly.items() if f"::{function}(" in name}
    bodies |= {name: body for name, body in assembly.items() if f"::{function}<" in name}
    assert bodies
    for name, body in bodies.items():
        for instruction in instructions:
            assert re.search(rf"\t{instruction}\tv\d+\.(4s|16b)", body), (name, instruction)


def test_no_fused_multiply_add_in_the_noise(assembly):
    noise = {k: v for k, v in assembly.items() if any(f"::{f}" in k for f in NOISE_FUNCTIONS)}
    assert len(noise) >= len(NOISE_FUNCTIONS)
    for name, body in noise.items():
        assert not re.search(r"\tf(n?m(add|sub)|ml[as])\t", body), name
