"""The kernels against dense masked attention in float64: on the GPU where there is one, otherwise in Triton's interpreter.

Run as a script, this file compiles the kernels ahead of time and prints what they use, one JSON object a line.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import attention_kernels
from attention_kernels import block_sparse_attention, dense_masked_attention, tile_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = attention_kernels.triton
needs_kernels = pytest.mark.skipif(triton is None, reason="no Triton")
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32  # the dtype of the tests of structure
CLOSE = dict(rtol=0, atol=1e-12) if DEVICE == "cpu" else dict(rtol=0, atol=2e-5)
LAYOUTS = ["contiguous", "qkv", "transposed", "expanded"]
KERNELS = ("_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel")
PATTERNS = pytest.mark.parametrize("is_causal", [False, True], ids=["diagonal", "causal"])


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if triton and DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setattr(attention_kernels, "INTERPRETED", True)
        yield


@contextlib.contextmanager
def tiles(*sizes):
    """The kernels with (rows, columns) of our own, for structure to show at a few tokens. In the interpreter only: a GPU has its table."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            entry = {256: [(*size, 4, 1) for size in sizes]}
            patch.setattr(attention_kernels, "TILES", dict.fromkeys(attention_kernels.TILES, entry))
        yield


SMALL = [(16, 32)] * 3
sizes = st.sampled_from([16, 32, 64])
tile_sizes = st.lists(st.tuples(sizes, sizes), min_size=3, max_size=3)
length = st.one_of(
    st.just(1), st.integers(1, 9), st.sampled_from([2, 3, 5, 7, 11, 13, 16, 17, 31, 32, 33, 37])
)
lengths = (
    st.one_of(
        st.lists(length, min_size=1, max_size=8),
        st.builds(lambda n, count: [n] * count, st.integers(1, 17), st.integers(1, 5)),
        st.builds(
            lambda head, n, tail: [*head, n, *tail],
            st.lists(length, max_size=3),
            st.integers(65, 90),
            st.lists(length, max_size=1),
        ),
    )
    .filter(lambda n: sum(n) <= 110)
    .map(tuple)
)


def inputs(block_lengths, batch=1, heads=1, head_dim=16, dtype=EXACT, layout="contiguous", seed=0):
    """query, key, value and the output's gradient, leaves of the given layout."""
    tokens, generator = sum(block_lengths), torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    if layout == "qkv":  # three views of one projection
        query, key, value = draw(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    elif layout == "transposed":  # no dimension of stride one where one is used to it
        query, key, value = (draw(batch, heads, head_dim, tokens).mT for _ in range(3))
    elif layout == "expanded":
        query, key, value = (
            draw(batch, 1, tokens, head_dim).expand(-1, heads, -1, -1) for _ in range(3)
        )
    else:
        query, key, value = (draw(batch, heads, tokens, head_dim) for _ in range(3))
    return query, key, value, draw(batch, tokens, heads, head_dim).transpose(1, 2)


def run(attention, query, key, value, output_gradient, *args):
    """The output and the three gradients, detached."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, *args)
    return output.detach(), *torch.autograd.grad(output, leaves, output_gradient)


def check(query, key, value, output_gradient, block_lengths, is_causal, scale=None):
    """The entry's output and gradients, against float64 on the same rounded inputs.

    Allowed is twice the error of a dense computation in the same dtype, plus a few roundings of the largest value, plus what recomputation
    rounds and a dense computation does not: the float32 exponent, a difference of numbers as large as Q K, of every probability; and delta,
    the sum of the stored output times dO, of every score gradient, so that it does not cancel dO V where a token sees one key only.
    """
    args = (block_lengths, is_causal, scale)
    exact_inputs = [x.double() for x in (query, key, value, output_gradient)]
    ours = run(block_sparse_attention, query, key, value, output_gradient, *args)
    exact = run(dense_masked_attention, *exact_inputs, *args)
    dense = run(dense_masked_attention, query, key, value, output_gradient, *args)
    q, k, _, do = exact_inputs
    scale = scale or query.shape[-1] ** -0.5
    assert ours[0].transpose(1, 2).is_contiguous()  # the heads can be joined without a copy
    score = (q.abs() @ k.abs().mT).max() * scale * torch.finfo(torch.float32).eps
    eps, delta = torch.finfo(query.dtype).eps, (exact[0] * do).abs().sum(-1).max() * scale
    deltas = (0, delta * k.abs().max(), delta * q.abs().max(), 0)
    for name, got, truth, plain, term in zip(
        ("output", "dquery", "dkey", "dvalue"), ours, exact, dense, deltas, strict=True
    ):
        assert got.dtype == query.dtype and got.shape == query.shape
        largest = truth.abs().max()
        allowed = 2 * (plain - truth).abs().max() + eps * (4 * largest + term) + score * largest
        assert (got - truth).abs().max() <= (1e-12 if query.dtype == torch.float64 else allowed), (
            name
        )


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths,
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([16, 24, 32, 40, 72]),
    st.booleans(),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, EXACT]),
    st.sampled_from(LAYOUTS),
    tile_sizes,
    st.integers(0, 2**31),
)
def test_kernels_agree_with_dense_attention(
    block_lengths, batch, heads, head_dim, is_causal, scale, dtype, layout, tiling, seed
):
    with tiles(*tiling):
        check(
            *inputs(block_lengths, batch, heads, head_dim, dtype, layout, seed),
            block_lengths,
            is_causal,
            scale,
        )


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="float64 takes the PyTorch path on a GPU")
@PATTERNS
def test_gradcheck(is_causal):
    block_lengths = (1, 2, 9, 5, 18)
    leaves = [x.requires_grad_() for x in inputs(block_lengths, heads=2)[:3]]
    with tiles(*SMALL):
        assert torch.autograd.gradcheck(
            lambda *x: block_sparse_attention(*x, block_lengths, is_causal), leaves, fast_mode=True
        )


@PATTERNS
@pytest.mark.parametrize("dtype", attention_kernels.DTYPES)
def test_pytorch_path_agrees_with_dense_attention(is_causal, dtype, monkeypatch):
    monkeypatch.setattr(attention_kernels, "INTERPRETED", False)
    block_lengths = (1, 1, 4, 9, 2, 36, 64, 5)
    check(
        *(x.cpu() for x in inputs(block_lengths, 2, 2, 24, dtype, "qkv")), block_lengths, is_causal
    )


def test_dense_attention_sees_what_it_should():
    # values are one-hot in the token, so the output is the matrix of probabilities
    query, value = torch.zeros(1, 1, 16, 16), torch.eye(16)[None, None]
    for is_causal, seen in (
        (False, [range(1), range(1, 6), range(6, 16)]),
        (True, [range(1), range(6), range(16)]),
    ):
        probabilities = dense_masked_attention(query, query, value, (1, 5, 10), is_causal)[0, 0]
        for row, columns in zip(
            probabilities.tolist(), [seen[0]] + [seen[1]] * 5 + [seen[2]] * 10, strict=True
        ):
            assert row == pytest.approx(
                [(column in columns) / len(columns) for column in range(16)]
            )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(length, st.integers(1, 300)), min_size=1, max_size=12),
    st.sampled_from([[], [4096]]),
    st.booleans(),
    st.booleans(),
    sizes,
    st.sampled_from([32, 64]),
)
def test_the_table_covers_every_pair_once(some, giant, is_causal, transposed, rows, columns):
    block_lengths = (*some, *giant)
    table, bounds = tile_table(block_lengths, is_causal, transposed, rows, columns)
    starts = [0, *itertools.accumulate(block_lengths)]
    tokens, block = starts[-1], [i for i, n in enumerate(block_lengths) for _ in range(n)]
    low = [starts[i] if transposed or not is_causal else 0 for i in block]
    high = [tokens if transposed and is_causal else starts[i + 1] for i in block]
    assert bounds.tolist() == [low, high]
    owned, work = [], []
    for start, stop, full_begin, full_stop, masked_begin, masked_stop in table.tolist():
        owned += range(start, stop)
        first, last = block[start], block[stop - 1]
        assert (
            stop - start <= rows and (start - starts[first]) % rows == 0
        )  # counted from the block's edge
        assert first == last or start == starts[first]
        assert (full_stop - full_begin) % columns == 0
        if full_stop > full_begin:  # all rows see the full steps
            assert low[stop - 1] <= full_begin and full_stop <= high[start]
        runs = sorted(
            run for run in ((full_begin, full_stop), (masked_begin, masked_stop)) if run[1] > run[0]
        )
        assert (
            runs[0][0] == low[start]
            and runs[-1][1] == high[stop - 1]
            and all(a[1] == b[0] for a, b in itertools.pairwise(runs))
        )
        assert (
            first != last or masked_stop - masked_begin < columns
        )  # no more of a single block than a tail is masked
        work.append(full_stop - full_begin + masked_stop - masked_begin)
    assert sorted(owned) == list(range(tokens)) and work == sorted(work, reverse=True)
    firsts = sorted(
        {block[start] for start in table[:, 0].tolist()}
    )  # the blocks that tiles begin in: one more would not have fitted
    assert all(
        starts[second + 1] - starts[first] > rows for first, second in itertools.pairwise(firsts)
    )


def test_little_more_than_the_exact_work_is_done():
    import benchmark  # which imports all of the library, this file's script does not

    for block_lengths, most in zip(benchmark.scale_lengths(), (1.35, 1.06, 1.02), strict=True):
        exact = benchmark.exact_elements(block_lengths, False)
        for sizes in itertools.chain(
            *(entry.values() for entry in attention_kernels.TILES.values())
        ):
            for which, (rows, columns, *_) in enumerate(sizes):
                assert (
                    exact
                    <= benchmark.kernel_count(block_lengths, False, which, rows, columns, 64, 2)[0]
                    <= most * exact
                )


@needs_kernels
@PATTERNS
def test_real_tile_sizes_and_a_wide_head(is_causal):
    block_lengths = (1, 4, 9, 16, 65, 130)
    check(*inputs(block_lengths, 1, 1, 136, torch.float32, "qkv"), block_lengths, is_causal)


@needs_kernels
@PATTERNS
def test_written_everywhere_repeatable_and_independent_of_the_batch(is_causal):
    block_lengths = (1, 3, 20, 41)
    tensors = inputs(block_lengths, 2, 1, 24, torch.float32, "qkv")
    torch.use_deterministic_algorithms(True)  # torch.empty then starts as nan
    try:
        assert torch.empty(3).isnan().all()
        with tiles(*SMALL):
            whole = run(block_sparse_attention, *tensors, block_lengths, is_causal)
            again = run(block_sparse_attention, *tensors, block_lengths, is_causal)
            parts = [
                run(
                    block_sparse_attention,
                    *(x[i : i + 1] for x in tensors),
                    block_lengths,
                    is_causal,
                )
                for i in range(2)
            ]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second, split in zip(whole, again, zip(*parts, strict=True), strict=True):
        assert (
            first.isfinite().all()
            and torch.equal(first, second)
            and torch.equal(first, torch.cat(split))
        )


@needs_kernels
@PATTERNS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "output_gradient"])
@pytest.mark.parametrize("scale", [1, 4])
def test_nan_stays_where_it_is_seen(is_causal, poison, which, scale):
    block_lengths = (1, 2, 4, 3, 17)  # the first four share a tile
    tensors = inputs(block_lengths, head_dim=16)
    begin, end = sum(block_lengths[:scale]), sum(block_lengths[: scale + 1])
    bad = [x.clone() for x in tensors]
    bad[which][:, :, begin, 3] = poison
    with tiles(*SMALL):
        clean, got = (
            run(block_sparse_attention, *x, block_lengths, is_causal) for x in (tensors, bad)
        )
    earlier, later = slice(0, begin), slice(end, None)
    untouched = {  # the output and the gradients that no path leads to
        "query": [(earlier, later)] * 2 + [(later, slice(0, 0) if is_causal else earlier)] * 2,
        "key": [(earlier, slice(0, 0) if is_causal else later)] * 2
        + [(slice(0, 0), slice(0, 0)) if is_causal else (earlier, later)] * 2,
    }[("query", "key", "key", "query")[which]]
    if which == 3:
        untouched = [(slice(None), slice(None)), *untouched[1:]]
    for ours, expected, regions in zip(got, clean, untouched, strict=True):
        for region in regions:
            assert torch.equal(ours[:, :, region], expected[:, :, region])
    dense = run(
        dense_masked_attention, *bad, block_lengths, is_causal
    )  # and it is not hidden from those that see it
    for ours, expected in zip(got, dense, strict=True):
        seen = expected[:, :, begin:end].isnan().any(-1)
        assert (
            which == 1
            and poison == float("inf")
            or not ours[:, :, begin:end].isfinite().all(-1)[seen].any()
        )


@needs_kernels
@PATTERNS
def test_permuting_tokens_inside_a_block_permutes_the_output(is_causal):
    block_lengths = (1, 4, 9, 40)
    query, key, value, _ = inputs(block_lengths, 1, 2)
    edges = [0, *itertools.accumulate(block_lengths)]
    order = torch.cat(
        [start + torch.randperm(stop - start) for start, stop in itertools.pairwise(edges)]
    ).to(DEVICE)
    with tiles(*SMALL):
        plain = block_sparse_attention(query, key, value, block_lengths, is_causal)
        permuted = block_sparse_attention(
            query[:, :, order], key[:, :, order], value[:, :, order], block_lengths, is_causal
        )
    torch.testing.assert_close(permuted, plain[:, :, order], **CLOSE)


@needs_kernels
def test_patterns_meet_where_they_are_the_same():
    block_lengths = (5, 1, 19, 33)
    query, key, value, _ = inputs(block_lengths, 2, 1)
    with tiles(*SMALL):
        one = [
            block_sparse_attention(query, key, value, (58,), is_causal)
            for is_causal in (False, True)
        ]
        diagonal, causal = (
            block_sparse_attention(query, key, value, block_lengths, is_causal)
            for is_causal in (False, True)
        )
        edges = [0, *itertools.accumulate(block_lengths)]
        alone = [
            block_sparse_attention(*(x[:, :, a:b] for x in (query, key, value)), (b - a,))
            for a, b in itertools.pairwise(edges)
        ]
    torch.testing.assert_close(one[0], one[1], **CLOSE)
    torch.testing.assert_close(diagonal, torch.cat(alone, 2), **CLOSE)
    torch.testing.assert_close(causal[:, :, :5], diagonal[:, :, :5], **CLOSE)
    assert not torch.allclose(causal[:, :, 5:], diagonal[:, :, 5:], atol=1e-3)


@needs_kernels
def test_a_long_block_and_many_blocks():
    for block_lengths in ((4096,), (1,) * 150):
        query, key, value, _ = inputs(block_lengths, head_dim=16)
        rows = torch.randint(sum(block_lengths), (20,))  # dense attention of a few rows
        if len(block_lengths) == 1:
            expected = (query[:, :, rows] @ key.mT / 4).softmax(-1) @ value
        else:
            expected = value[:, :, rows]
        with tiles((256, 512), (16, 32), (16, 32)):
            torch.testing.assert_close(
                block_sparse_attention(query, key, value, block_lengths)[:, :, rows],
                expected,
                **CLOSE,
            )


@needs_kernels
def test_views_are_read_in_place(monkeypatch):
    query, key, value, output_gradient = inputs((3, 6), 2, 2, layout="qkv")
    seen, launch = [], attention_kernels._launch
    monkeypatch.setattr(
        attention_kernels, "_launch", lambda *args: (seen.append(args[4]), launch(*args))
    )
    run(block_sparse_attention, query, key, value, output_gradient, (3, 6))
    assert len(seen) == 3
    for tensors in seen:
        for given_tensor, read in zip((query, key, value), tensors, strict=False):
            assert (
                read.data_ptr() == given_tensor.data_ptr()
                and read.stride() == given_tensor.stride()
            )


@needs_kernels
def test_offsets_beyond_two_to_the_31():
    # a batch, then tokens, then features that are far apart; torch.empty reserves the memory and touches none of it
    block_lengths = (1, 2)
    small = inputs(block_lengths, 2, 1, 16, torch.float16)
    expected = run(block_sparse_attention, *small, block_lengths)
    for strides in ((2**31 + 8, 16, 16, 1), (64, 64, 2**30 + 8, 1), (64, 64, 1, 2**27 + 2**24)):
        extent = sum((n - 1) * stride for n, stride in zip((2, 1, 3, 16), strides, strict=True)) + 1
        assert extent > 2**31 - 1
        if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 10 * extent:
            pytest.skip("not enough memory on this GPU")
        far = []
        for x in small:
            far.append(
                torch.empty(extent, dtype=torch.float16, device=DEVICE)
                .as_strided((2, 1, 3, 16), strides)
                .copy_(x)
            )
        for ours, plain in zip(
            run(block_sparse_attention, *far, block_lengths), expected, strict=True
        ):
            assert torch.equal(ours, plain)


@needs_kernels
def test_more_heads_than_a_grid_has_rows(monkeypatch):
    query, key, value, output_gradient = inputs((2,), 70_000, 1)
    if DEVICE == "cuda":
        check(query, key, value, output_gradient, (2,), False)
        return
    grids = []  # too many programs for the interpreter: the grid is one number, of which the hardware allows 2 ** 31 - 1

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **constants: None

    for kernel in KERNELS:
        monkeypatch.setattr(attention_kernels, kernel, Recorder())
    run(block_sparse_attention, query, key, value, output_gradient, (2,))
    assert grids == [(70_000,)] * 3


@PATTERNS
def test_compiles_as_one_graph(is_causal):
    *tensors, output_gradient = inputs((1, 3, 12), 2, 2, 16, torch.float32, "qkv")
    compiled = run(
        torch.compile(block_sparse_attention, fullgraph=True),
        *tensors,
        output_gradient,
        (1, 3, 12),
        is_causal,
    )
    for ours, expected in zip(
        compiled,
        run(block_sparse_attention, *tensors, output_gradient, (1, 3, 12), is_causal),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@needs_kernels
@PATTERNS
def test_operators_pass_opcheck(is_causal):
    query, key, value, output_gradient = inputs((1, 4), 1, 2, 16, torch.float32, "qkv")
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(attention_kernels._forward, (*leaves, (1, 4), is_causal, 0.25))
    saved = (
        query,
        key,
        value,
        *attention_kernels._forward(query, key, value, (1, 4), is_causal, 0.25),
    )
    torch.library.opcheck(
        attention_kernels._backward, (output_gradient, *saved, (1, 4), is_causal, 0.25)
    )


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_kernels), False])
def test_autocast_casts(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(attention_kernels, "INTERPRETED", False)
    query, key, value, output_gradient = inputs((1, 4, 9), 1, 2, 16, torch.float32)
    leaves = [query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_()]
    with torch.autocast(DEVICE, torch.bfloat16):
        output = block_sparse_attention(
            F.normalize(leaves[0], dim=-1),
            F.normalize(leaves[1], dim=-1),
            leaves[2],
            (1, 4, 9),
            scale=4.0,
        )
    assert output.dtype == torch.bfloat16
    half = [x.bfloat16() for x in (F.normalize(query, dim=-1), F.normalize(key, dim=-1), leaves[2])]
    assert torch.equal(
        output, block_sparse_attention(*half, (1, 4, 9), scale=4.0)
    )  # also where the PyTorch path computes in float32
    gradients = torch.autograd.grad(output, leaves, output_gradient.bfloat16())
    assert [x.dtype for x in gradients] == [torch.float32, torch.float32, torch.bfloat16] and all(
        x.isfinite().all() for x in gradients
    )


@needs_kernels
def test_checkpoint_and_inputs_that_require_no_gradient():
    *tensors, output_gradient = inputs((1, 4, 9), 1, 2)
    expected = run(block_sparse_attention, *tensors, output_gradient, (1, 4, 9), True)[1:]
    for chosen in itertools.product((False, True), repeat=3):
        leaves = [
            x.detach().requires_grad_(wanted) for x, wanted in zip(tensors, chosen, strict=True)
        ]
        output = checkpoint(block_sparse_attention, *leaves, (1, 4, 9), True, use_reentrant=False)
        assert output.requires_grad == any(chosen)
        if any(chosen):
            output.backward(output_gradient)
        for leaf, gradient, wanted in zip(leaves, expected, chosen, strict=True):
            assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


@needs_kernels
def test_float32_is_exact_unless_torch_is_told_otherwise():
    for allowed, precision in ((True, "tf32"), (False, "ieee")):  # False is where torch starts
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert attention_kernels._constants(0, 64, torch.float32, 8)["PRECISION"] == precision


def test_an_empty_batch():
    output = block_sparse_attention(
        *(torch.zeros(0, 2, 3, 16, device=DEVICE) for _ in range(3)), (1, 2)
    )
    assert output.shape == (0, 2, 3, 16)


BAD = [
    (
        dict(query=torch.zeros(2, 6, 16)),
        r"query has shape \(2, 6, 16\), expected \(batch, heads, tokens, head_dim\)",
    ),
    (
        dict(key=torch.zeros(1, 2, 5, 16)),
        r"key has shape \(1, 2, 5, 16\), expected .*\(1, 2, 6, 16\)",
    ),
    (dict(value=torch.zeros(2, 2, 6, 16)), "value has shape"),
    (
        dict(key=torch.zeros(1, 2, 6, 16, dtype=torch.float64)),
        r"key is torch.float64, expected .*torch.float32",
    ),
    (dict(value=torch.zeros(1, 2, 6, 16, device="meta")), "value is on meta, expected .*cpu"),
    (
        dict(query=torch.zeros(1, 2, 6, 16, dtype=torch.int64)),
        "query is torch.int64, expected one of torch.float16",
    ),
    (dict(query=torch.zeros(1, 2, 6, 16, dtype=torch.complex64)), "query is torch.complex64"),
    (
        dict(query=torch.zeros(1, 2, 6, 8)),
        "query has head_dim 8, expected a multiple of 8 from 16 to 256",
    ),
    (dict(query=torch.zeros(1, 2, 6, 264)), "head_dim 264"),
    (dict(query=torch.zeros(1, 2, 6, 20)), "head_dim 20"),
    (
        dict(query=torch.zeros(1, 2, 0, 16), block_lengths=()),
        r"query has shape \(1, 2, 0, 16\), expected .*at least one token",
    ),
    (dict(query=None), "query is NoneType, expected a tensor"),
    (dict(key=[1.0]), "key is list, expected a tensor"),
    (dict(value=None), "value is NoneType, expected a tensor"),
    (dict(block_lengths=(True, 5)), r"block_lengths is \(True, 5\), expected"),
    (
        dict(block_lengths=(1, 4)),
        r"block_lengths is \(1, 4\), which sums to 5, expected the 6 tokens of query",
    ),
    (dict(block_lengths=()), r"block_lengths is \(\), which sums to 0"),
    (
        dict(block_lengths=(6, 0)),
        r"block_lengths is \(6, 0\), expected a sequence of positive ints",
    ),
    (dict(block_lengths=(7, -1)), r"block_lengths is \(7, -1\), expected"),
    (dict(block_lengths=(2.0, 4.0)), r"block_lengths is \(2.0, 4.0\), expected"),
    (dict(block_lengths=6), "block_lengths is 6, expected a sequence of positive ints"),
    (dict(scale=0.0), "scale is 0.0, expected a positive number"),
    (dict(scale=-1), "scale is -1"),
    (dict(scale=True), "scale is True"),
    (dict(scale=float("nan")), "scale is nan"),
    (dict(scale="big"), "scale is 'big'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("attention", [block_sparse_attention, dense_masked_attention])
def test_bad_input(attention, wrong, message):
    arguments = (
        {name: torch.zeros(1, 2, 6, 16) for name in ("query", "key", "value")}
        | dict(block_lengths=(1, 5))
        | wrong
    )
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_importing_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, attention_kernels as a; x = torch.ones(1, 1, 3, 16); "
        "assert a.triton is None and a.block_sparse_attention(x, x, x, (1, 2), True).shape == x.shape"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(attention_kernels.__file__).parent
    )


class Device:
    """What Triton asks of a driver in order to compile for an architecture."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)


class Compiled:
    """A kernel that is compiled for its launch, but not launched."""

    def __init__(self, kernel, results):
        self.kernel, self.results = kernel, results

    def __getitem__(self, grid):
        return lambda *args, **constants: self.results.append(
            self.kernel.warmup(*args, grid=grid, **constants)
        )


def compile_kernels(architecture, dtype, head_dim):
    """Registers, spills, shared memory and tensor-core instructions of the three kernels, as the operators launch them for a qkv."""
    results, block_lengths = [], (1, 4, 9, 16)
    triton.runtime.driver.set_active(Device(architecture))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(architecture, 10))
        for kernel in KERNELS:
            patch.setattr(
                attention_kernels, kernel, Compiled(getattr(attention_kernels, kernel), results)
            )
        query, key, value, output_gradient = inputs(
            block_lengths, 2, 4, head_dim, getattr(torch, dtype), "qkv"
        )
        output, logsumexp = attention_kernels._forward(query, key, value, block_lengths, False, 1.0)
        attention_kernels._backward(
            output_gradient, query, key, value, output, logsumexp, block_lengths, False, 1.0
        )
    for name, built in zip(KERNELS, results, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(built.asm["cubin"])
            cubin.flush()
            cuobjdump = triton.knobs.nvidia.cuobjdump.path
            usage, sass = (
                subprocess.run(
                    [cuobjdump, flag, cubin.name], check=True, capture_output=True, text=True
                ).stdout
                for flag in ("--dump-resource-usage", "-sass")
            )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        tensor_cores = {
            instruction: built.asm["ptx"].count(instruction)
            for instruction in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
        }
        yield dict(
            architecture=architecture,
            dtype=dtype,
            head_dim=head_dim,
            kernel=name,
            registers=registers,
            stack=stack,
            spills=len(re.findall(r"\s(?:STL|LDL)[. ]", sass)),
            shared=built.metadata.shared,
            **tensor_cores,
        )


@needs_kernels
def test_compiled_ahead_of_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", str(Path(attention_kernels.__file__).parent))
        done = subprocess.run(
            [sys.executable, __file__], check=True, capture_output=True, text=True
        )
    if not done.stdout:
        pytest.skip("this Triton brings no ptxas or cuobjdump")
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 45
    for kernel in kernels:
        assert kernel["shared"] <= {80: 99, 90: 227, 100: 227}[kernel["architecture"]] * 1024, (
            kernel
        )
        if (
            kernel["dtype"] == "float32"
        ):  # whose products are not the tensor cores', and which may spill
            continue
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        assert (
            kernel[
                {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[kernel["architecture"]]
            ]
            > 0
        ), kernel


def compile_in_worker(*job):  # a worker that printed would mix its lines with the other's
    return list(compile_kernels(*job))


def main():
    tools = triton.knobs.nvidia
    if all(Path(tool.path).exists() for tool in (tools.ptxas, tools.cuobjdump)):
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            sizes = [
                *itertools.product(("bfloat16", "float16"), (64, 128)),
                ("float32", 256),
            ]  # the last has the smallest steps
            jobs = ((architecture, *size) for architecture in (80, 90, 100) for size in sizes)
            for results in pool.map(compile_in_worker, *zip(*jobs)):
                print(*map(json.dumps, results), sep="\n", flush=True)


if __name__ == "__main__":
    main()
