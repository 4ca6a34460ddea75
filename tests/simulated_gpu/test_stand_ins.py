"""Every stand-in against its kernel under Triton's interpreter, in the launches of our wrappers.

At each launch the kernel and the stand-in get copies of the same memory, and all of it, whatever
lies around a tensor included, must come out the same.
"""

import ast
import importlib
import inspect
import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import triton.language as tl
from triton.runtime.interpreter import GridExecutor

from softgrpo_engine.ops import gpu as decoder_ops
from softgrpo_kernels import RowParameters, SoftToken, soft_token, soft_token_from_hidden
from softgrpo_kernels import gpu as ops
from softgrpo_kernels import token_logprob as plain_logprob
from softgrpo_kernels.noise import log_gamma_noise

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels"), str(HERE.parent / "engine" / "ops")]
from attention_cases import make_case  # noqa: E402
from logit_styles import logits_of  # noqa: E402

from simulated_gpu.stand_ins import STAND_INS, candidates  # noqa: E402

FOLDERS = [Path(ops.__file__).parent, Path(decoder_ops.__file__).parent]
# Not the functions that the package has under these names.
attention = importlib.import_module("softgrpo_engine.ops.gpu.paged_attention")
indexed = importlib.import_module("softgrpo_kernels.gpu.indexed_dot")
logprob = importlib.import_module("softgrpo_kernels.gpu.token_logprob")
lm_head = importlib.import_module("softgrpo_kernels.gpu.lm_head")
whole_rows = importlib.import_module("softgrpo_kernels.gpu.full_vocabulary")

# numpy's, of the kernels: infinities and NaN are part of the cases.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GREEDY, DISCRETE, SOFT, SKIP = range(4)
DTYPES = [torch.float32, torch.bfloat16]

# Kernels whose numbers are promised to the bit.
EXACT = {
    "rope_store_kv.rope_store_kv_kernel",
    "noise.gumbel_noise_kernel",
    "soft_embedding.soft_embedding_kernel",
    "soft_token.select_kernel",
}
# Whose probabilities meet values of a narrow dtype as sums of two of its numbers.
ATTENTION = {"paged_attention.decode_kernel", "paged_attention.join_kernel"}
# (relative, absolute): another exp and another order of a sum; of a narrow dtype one rounding.
TOLERANCES = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (3e-6, 5e-6),
    torch.bfloat16: (2**-7, 1e-5),
    torch.float16: (2**-10, 1e-5),
}


@pytest.fixture(autouse=True)
def poison():
    """What is allocated holds NaN, or the largest integer, until it is written."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Of those that look at rows over the whole vocabulary, each costs milliseconds; and narrow
    tiles of the LM head."""
    monkeypatch.setattr(whole_rows, "SPLITS", tl.constexpr(2))
    monkeypatch.setattr(lm_head, "ROWS", 4)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far; every launch is compared."""
    names, run = [], GridExecutor.__call__

    def compared(executor, *args, **kwargs):
        name = f"{executor.fn.__module__.rpartition('.')[2]}.{executor.fn.__name__}"
        names.append(name)
        known = inspect.signature(executor.fn).parameters
        arguments = inspect.getcallargs(
            executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
        )
        copies = copied(arguments)
        run(executor, *args, **kwargs)
        STAND_INS[name](executor.grid, **copies)
        for argument, value in arguments.items():
            if torch.is_tensor(value):
                compare(name, argument, whole(value), whole(copies[argument]))

    monkeypatch.setattr(GridExecutor, "__call__", compared)
    return names


def copied(arguments):
    """The same views of copies of the storages."""
    storages = {}

    def copy(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        new = torch.empty(0, dtype=tensor.dtype)
        storage = storages[storage.data_ptr()]
        return new.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return {k: copy(v) if torch.is_tensor(v) else v for k, v in arguments.items()}


def whole(tensor):
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def compare(name, argument, kernel, stand_in):
    rtol = atol = 0.0
    if kernel.is_floating_point() and name not in EXACT:
        rtol, atol = TOLERANCES[kernel.dtype]
        atol = max(atol, 2e-5) if name in ATTENTION else atol
    torch.testing.assert_close(
        stand_in, kernel, rtol=rtol, atol=atol, equal_nan=True,
        msg=lambda text: f"{name}: {argument}: {text}",
    )  # fmt: skip


# Which kernels there are, and which case reaches them.


def jitted(path):
    """Names of the @triton.jit functions of a file."""
    for node in ast.parse(path.read_text()).body:
        decorators = getattr(node, "decorator_list", [])
        if any("triton.jit" in ast.unparse(decorator) for decorator in decorators):
            yield node.name


def launched():
    """ "module.kernel" of every `kernel[grid](...)` of the package."""
    found = set()
    for path in itertools.chain(*(folder.glob("*.py") for folder in FOLDERS)):
        own = set(jitted(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = node.func.value
                assert isinstance(name, ast.Name), f"{path.name}: {ast.unparse(node.func)}"
                assert name.id in own, f"{path.name} launches {name.id} of another file"
                found.add(f"{path.stem}.{name.id}")
    return found


def test_every_launched_kernel_has_a_stand_in():
    assert set(STAND_INS) == launched()


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_arguments_are_the_kernel_s(name):
    module, _, kernel = name.partition(".")
    kernel = getattr(importlib.import_module(f"softgrpo_kernels.gpu.{module}"), kernel)
    parameters = list(inspect.signature(STAND_INS[name]).parameters)
    assert parameters == ["grid", *inspect.signature(kernel.fn).parameters]


def test_every_stand_in_has_a_case():
    assert set().union(*REACHED.values()) == set(STAND_INS)


REACHED = {}


def reaches(*names):
    """The test launches these kernels."""

    def decorate(test):
        REACHED[test.__name__] = set(names)
        return test

    return decorate


def assert_reached(test, launches):
    assert set(launches) == REACHED[test.__name__]


# The decoder.


@reaches(
    "rms_norm.rms_norm_kernel", "silu_mul.silu_mul_kernel", "rope_store_kv.rope_store_kv_kernel"
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_activation_and_rope(launches, dtype):
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, 48), (3, 48), (48,)))
    decoder_ops.rms_norm(x, weight, 1e-5)
    decoder_ops.rms_norm(x, weight, 1e-5, residual)
    decoder_ops.silu_mul(4 * torch.randn(3, 140).to(dtype))
    decoder_ops.silu_mul(torch.randn(1, 4200).to(dtype))  # two blocks
    heads, kv_heads, dim, page = 7, 2, 6, 5  # two blocks of heads
    qkv = torch.randn(4, (heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = torch.randn(2, 4, dim)
    k_pages, v_pages = torch.full((2, 4, kv_heads, page, dim), 5.0).to(dtype)
    slots = torch.tensor([17, 0, 9, 5])
    decoder_ops.rope_store_kv(qkv, cos, sin, k_pages, v_pages, slots, heads, kv_heads)
    assert_reached(test_norm_activation_and_rope, launches)


@reaches("paged_attention.decode_kernel", "paged_attention.join_kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [64, 512])
def test_decode_attention(launches, monkeypatch, dtype, split):
    """Groups of 3; with a split of 64 up to three of them, and rows with one."""
    monkeypatch.setattr(attention, "SPLIT", split)
    args, kwargs = make_case([150, 64, 1, 65], [1] * 4, (6, 2), 24, 16, dtype)
    args[4][2] = 0 if split == 512 else 1  # a row that nobody reads
    decoder_ops.paged_attention(*args, scale=kwargs["scale"])
    assert set(launches) <= REACHED["test_decode_attention"]
    assert len(launches) == (2 if split == 64 else 1)


@reaches("paged_attention.prefill_kernel")
@pytest.mark.parametrize(("dtype", "heads"), [(DTYPES[0], (6, 2)), (DTYPES[1], (3, 1))])
def test_prefill_attention(launches, dtype, heads):
    """Whole prompts, a prompt behind a prefix, a sequence without queries, decode rows."""
    args, kwargs = make_case([40, 30, 20, 50, 1], [40, 13, 0, 1, 1], heads, 24, 16, dtype)
    decoder_ops.paged_attention(*args, **kwargs)
    assert_reached(test_prefill_attention, launches)


# The soft step.

STATISTICS = ("statistics.statistics_kernel",)
LM_HEAD = ("lm_head.lm_head_kernel", "lm_head.combine_kernel")
STEP = (
    "soft_token.select_kernel", "soft_token.draw_kernel", "full_vocabulary.collect_kernel",
    "full_vocabulary.cut_kernel", "full_vocabulary.draw_kernel", "full_vocabulary.record_kernel",
    "soft_embedding.soft_embedding_kernel",
)  # fmt: skip


def poisoned(source, embed, k_max, statistics):
    layout = SoftToken.layout(source, k_max, embed, statistics, statistics)
    return SoftToken(**{n: s and torch.full(s[1], -7.0).to(s[0]) for n, s in layout.items()})


def step(logits, *, k_max=4, statistics=True, width=9, **settings):
    embed = torch.randn(logits.shape[1], width).to(logits.dtype)
    out = poisoned(logits, embed, k_max, statistics)
    return soft_token(
        logits, embed, k_max=k_max, backend="triton", out=out, need_lse=statistics,
        need_entropy=statistics, **settings,
    )  # fmt: skip


def step_from_hidden(hidden, head, *, k_max=4, statistics=True, **settings):
    embed = torch.randn(len(head), 9)
    return soft_token_from_hidden(
        hidden, head, embed, k_max=k_max, backend="triton", need_lse=statistics,
        need_entropy=statistics, **settings,
    )  # fmt: skip


def every_mode():
    return {
        "mode": torch.tensor([GREEDY, DISCRETE, SOFT, SKIP, SOFT, SOFT, DISCRETE]),
        "top_k": torch.tensor([0, 3, 4, 0, 4, 3, -1]),
        "top_p": torch.tensor([1, 0.9, 0.95, 1, 1, 0.8, 1]),
        "min_p": torch.tensor([0, 0, 0, 0, 0.01, 0, 0]),
        "temperature": torch.tensor([0, 0.7, 1, 0, 1.3, 1, 0.9]),
        "gumbel_tau": torch.tensor([0.1, 0.1, 0.1, 0.1, 1, 1, 1]),
        "eps": torch.tensor([0, 0, 1e-6, 0, 0, 0, 0]),
        "noise_scale": torch.tensor([1, 1, 0.5, 1, 2, 1, 1]),
        "noise_clamp": torch.tensor([[-1.5, 3.0]]).expand(7, 2),
        "seed": 2**41 + 5,
        "position": torch.arange(7),
        "uid": torch.arange(7) + 2**32 - 7,
    }


@reaches(*STATISTICS, *STEP)
def test_every_mode(launches):
    """Rows at odd distances; a terminal id that ends a soft row; top-p of the whole row's mass."""
    logits = logits_of("plain", 7, 303)[:, 3:]
    free = soft_token(logits, k_max=4, order="joint", **every_mode(), backend="reference")
    terminal = torch.full((7, 2), -1)
    terminal[4, 1] = free.token[4]
    out = step(logits, terminal_ids=terminal, order="joint", **every_mode())
    assert out.kind.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert_reached(test_every_mode, launches)


@reaches(*STATISTICS, *STEP)
def test_every_noise(launches):
    step(
        logits_of("plain", 6, 200), top_k=4, top_p=0.9, noise=torch.tensor([0, 1, 2, 3, 4, 2]),
        noise_scale=torch.tensor([1.0, 1.0, 4.0, 0.1, 3.0, 0.5]), gumbel_tau=1.0,
        position=torch.arange(6), eps=torch.tensor([0.0, 0.0, 1e-6, 0.0, 0.0, 0.0]),
        statistics=False,
    )  # fmt: skip
    assert_reached(test_every_noise, launches)


def test_candidates(launches):
    """Fewer tokens than slots; more tiles than slots, of which the best are searched; chunks."""
    styles = ["equal", "one"]
    step(torch.cat([logits_of(style, 1, 3) for style in styles]), top_k=3, top_p=0.913)
    styles = ["integers", "masked", "signed zeros"]
    logits = torch.cat([logits_of(style, 1, 700, torch.bfloat16) for style in styles])
    step(logits, k_max=2, top_k=2)
    logits = logits_of("integers", 2, 4200, torch.float16)
    step(logits, k_max=2, top_k=2, mode=torch.tensor([GREEDY, SOFT]))


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "logit_scale": 0.5}])
def test_candidates_are_scored_again_by_the_head(launches, options):
    hidden, head = torch.randn(70, 2).T, torch.randn(70, 300).T
    bias = torch.randn(300) if options else None
    step(
        hidden @ head.T, k_max=2, top_k=2, temperature=9.0, hidden=hidden, lm_head=head, bias=bias,
        statistics=False, **options,
    )  # fmt: skip


def test_bad_rows(launches):
    logits = logits_of("plain", 6, 300)
    logits[0, 299], logits[1, 0], logits[2], logits[3], logits[5, 7] = (
        torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan,
    )  # fmt: skip
    mode = torch.tensor([SOFT, DISCRETE, SOFT, SKIP, SOFT, DISCRETE])
    top_k = torch.tensor([2, 2, 2, 2, 2, -1])
    out = step(logits, k_max=2, top_k=top_k, mode=mode)
    assert out.valid.tolist() == [False] * 3 + [True] * 2 + [False]


def test_rows_that_break_a_rule(launches):
    """On a device nobody looks at them before the kernels do; what is out of range in one row is
    of no concern to another."""
    faults = {
        "temperature": (1, 0.0), "gumbel_tau": (2, 0.0), "top_k": (3, 5), "min_p": (4, 1.5),
        "noise": (5, 9), "uid": (6, -1), "mode": (7, 9), "top_p": (8, torch.nan),
        "noise_scale": (9, torch.inf),
    }  # fmt: skip
    settings = {name: torch.tensor([x] * 10) for name, x in SOUND.items()}
    for name, (row, value) in faults.items():
        settings[name][row] = value
    settings["mode"][8] = DISCRETE
    rows = RowParameters.pack(10, torch.device("cpu"), 2, noise_clamp=None, **settings)
    logits, embed = logits_of("plain", 10, 100), torch.randn(100, 9)
    out = poisoned(logits, embed, 2, True)
    ops.soft_token(logits, embed, rows, out)
    assert out.valid.tolist() == [True] + [False] * 9


SOUND = {
    "temperature": 0.7, "top_p": 1.0, "min_p": 0.0, "gumbel_tau": 0.1, "noise_scale": 1.0,
    "eps": 0.0, "top_k": 2, "seed": 1, "position": 2, "uid": 3, "stream": 0, "mode": SOFT,
    "noise": 0,
}  # fmt: skip


def whole_vocabulary(logits, **settings):
    return step(logits, k_max=2, mode=DISCRETE, temperature=0.9, **settings)


def test_rows_over_the_whole_vocabulary(launches, monkeypatch):
    """Nothing, top-p, both, min-p, a top-k of everything; two rounds of the programs that draw."""
    monkeypatch.setattr(whole_rows, "DRAW_BLOCK", tl.constexpr(64))
    whole_vocabulary(
        logits_of("integers", 5, 200), uid=torch.arange(5),
        top_p=torch.tensor([1, 0.8317, 0.913, 1, 1]), min_p=torch.tensor([0, 0, 0, 0.05, 0]),
        top_k=torch.tensor([-1, -1, 50, -1, 10**6]),
    )  # fmt: skip
    whole_vocabulary(logits_of("plain", 1, 200), order="joint", top_k=30, top_p=0.7, min_p=0.02)


def test_a_nucleus_that_overflows_its_list(launches, monkeypatch):
    """And one beside it that does not."""
    monkeypatch.setattr(whole_rows, "CAPACITY", tl.constexpr(40))
    whole_vocabulary(logits_of("plain", 2, 200), top_p=torch.tensor([0.9, 0.1]))


@reaches(*LM_HEAD, *STEP)
def test_from_hidden_states(launches):
    hidden, head, bias = torch.randn(5, 40), torch.randn(300, 40), torch.randn(300)
    hidden[3, 3] = torch.nan
    step_from_hidden(
        hidden, head, bias=bias, softcap=20.0, logit_scale=0.5,
        mode=torch.tensor([GREEDY, SOFT, SKIP, SOFT, DISCRETE]), k_max=2,
        temperature=torch.tensor([0, 0.7, 0, 1, 1]), top_k=torch.tensor([0, 2, 0, 2, -1]),
    )  # fmt: skip
    # Sums that are exact; a table whose rows lie apart, from its third row on.
    hidden, head = (torch.randint(-2, 3, (n, 43)).bfloat16() for n in (2, 132))
    step_from_hidden(
        hidden[:, 3:], head[3:, 3:], top_k=2, temperature=9.0, k_max=2, statistics=False
    )
    assert_reached(test_from_hidden_states, launches)


# Noise, mixtures and the ops of the trainer.


@reaches("noise.gumbel_noise_kernel")
def test_noise(launches):
    ids = torch.randint(-3, 300_000, (3, 300), dtype=torch.int32)
    keys = torch.randint(0, 2**32, (4, 3))
    keys[0] -= 2**31
    ops.gumbel_noise(ids, *keys)
    assert_reached(test_noise, launches)


def test_attempts_at_once_have_the_bits_of_attempts_in_turn():
    ids, shapes = torch.randint(0, 300_000, (20, 50)), torch.randn(20, 50).mul(3).exp()
    keys = (torch.arange(20) + 2**40, torch.arange(20), torch.arange(20), torch.zeros(20).long())
    expected = log_gamma_noise(ids, shapes, *keys)
    assert torch.equal(candidates._log_gamma(ids, shapes, keys), expected)


def strided(*shape, dtype=torch.float32):
    """Rows further apart than they are long."""
    return torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 3:]


@reaches("indexed_dot.indexed_dot_kernel", "soft_embedding.soft_embedding_kernel")
@pytest.mark.parametrize(("slots", "width"), [(5, 70), (9, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_indexed_dot(launches, dtype, slots, width):
    hidden, table = strided(4, width, dtype=dtype), strided(30, width, dtype=dtype)
    ids, grad = torch.randint(-2, 30, (4, slots)), torch.randn(4, slots)
    grad[0, :2] = 0.0
    indexed.indexed_dot(hidden, table, ids)
    indexed.indexed_dot_backward_hidden(grad, table, ids, torch.float32)
    ops.soft_embedding(ids.view(2, 2, slots), grad.view(2, 2, slots), table)
    assert_reached(test_indexed_dot, launches)


@reaches("indexed_dot.piece_sums_kernel", "indexed_dot.join_pieces_kernel")
@pytest.mark.parametrize("spread", ["all", "few", "one", "none"])
def test_sums_over_rows_of_a_table(launches, monkeypatch, spread):
    monkeypatch.setattr(indexed, "PIECE", 4)
    for dtype in DTYPES:
        hidden, grad = strided(9, 20, dtype=dtype), torch.randn(9, 3)
        ids = torch.randint(-2, 40, (9, 3)).clamp(min=-1)
        ids = {"all": ids, "few": ids % 3, "one": ids * 0 + 7, "none": ids * 0 - 1}[spread]
        indexed.indexed_dot_add_to_table(strided(40, 20, dtype=dtype), grad, hidden, ids)
    assert_reached(test_sums_over_rows_of_a_table, launches)


@reaches("token_logprob.accumulate_kernel", "token_logprob.differentiate_kernel")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), [(False, None, 1.0), (True, 5.0, 0.7)])
def test_token_logprob(launches, monkeypatch, with_bias, softcap, scale, entropy):
    """Several slices; the last case has a vocabulary of several blocks."""
    monkeypatch.setattr(plain_logprob, "_CHUNK_ELEMENTS", 2048)
    hidden, head = torch.randn(3, 8), torch.randn(1400, 8)
    label = torch.tensor([3, 1399, 0])
    bias = torch.randn(1400) if with_bias else None
    temperature = torch.tensor([[0.7], [1.0], [2.0]])
    logit_map = plain_logprob.LogitMap(bias, temperature, softcap, scale)
    grads = torch.randn(3, 3)
    results = logprob.token_logprob(hidden, head, label, logit_map, need_entropy=entropy)
    logprob.token_logprob_backward(
        plain_logprob.TokenGradients(*grads[:2], grads[2] if entropy else None), hidden, head,
        label, logit_map, *results[1:], need_hidden=True, d_weight=torch.zeros(1400, 8),
        d_bias=torch.zeros(1400) if with_bias else None,
    )  # fmt: skip
    assert_reached(test_token_logprob, launches)
    dots, state = torch.randn(1, 2500), torch.zeros(4, 1)
    state[0] = -torch.inf
    logprob.accumulate(
        dots, 7, None, temperature[0], label[:1], state, softcap=None, logit_scale=1.0,
        need_entropy=True,
    )  # fmt: skip
