"""The kernels against dense masked attention in float64, on a GPU or in Triton's interpreter."""

import functools
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from unittest import mock

import benchmark
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import attention_kernels as kernels
from attention_kernels import block_sparse_attention, dense_masked_attention, tile_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32
SMALL = [(16, 32)] * 3

triton = kernels.triton
kernels_agree = kernels._kernels_agree
needs_kernels = pytest.mark.skipif(triton is None, reason="no Triton")
parametrize = pytest.mark.parametrize
both_patterns = parametrize("is_causal", [False, True])
search = settings(derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if triton and DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setattr(kernels, "INTERPRETED", True)
            # the interpreter needs half a minute; first_call runs the check
            patch.setattr(kernels, "_kernels_agree", lambda *_: True)
        yield


@pytest.fixture
def pytorch_path(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)


def tiles(*sizes):
    """Other tiles (rows, columns), for few tokens to show structure; not on a GPU."""
    results = zip(("output", "dq", "dkv"), sizes, strict=True)
    entry = {256: {result: (*size, 4, 1) for result, size in results}}
    table = dict.fromkeys(kernels.TILES, entry) if DEVICE == "cpu" else {}
    return mock.patch.dict(kernels.TILES, table)


# ---- what is computed

sizes = st.sampled_from([16, 32, 64])
length = st.one_of(st.integers(1, 9), st.sampled_from([1, 11, 13, 16, 17, 31, 32, 33, 37]))
several = st.lists(length, min_size=1, max_size=8)
equal = st.builds(lambda n, count: [n] * count, st.integers(1, 17), st.integers(1, 5))
one_long = st.tuples(st.integers(65, 90), length, length).flatmap(st.permutations)
lengths = st.one_of(several, equal, one_long).filter(lambda n: sum(n) <= 110).map(tuple)


def inputs(block_lengths, batch=1, heads=1, head_dim=16, dtype=EXACT, layout="qkv", seed=0):
    tokens = sum(block_lengths)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    if layout == "qkv":  # three views of one projection
        qkv = draw(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    elif layout == "transposed":  # no dimension of stride one where one is used to it
        qkv = draw(3, batch, heads, head_dim, tokens).mT
    else:  # all heads in one place
        qkv = draw(3, batch, 1, tokens, head_dim).expand(-1, -1, heads, -1, -1)
    return *qkv, draw(batch, tokens, heads, head_dim).transpose(1, 2)


def visibility(block_lengths, is_causal):
    """(L, L) bool: whether token i sees token j."""
    return benchmark.dense_mask(block_lengths, is_causal).cpu() == 0


def operator(query, key, value, block_lengths, is_causal=False, scale=None):
    """The kernels, without what chooses and checks them."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return kernels._forward(query, key, value, block_lengths, is_causal, scale)[0]


def allowed_errors(tensors, scale, dense, exact):
    """The largest errors of output, dQ, dK and dV that rounding explains.

    dense, exact: those of a dense computation in the same dtype and in float64. Allowed is twice
    the dense error, a few roundings of the largest value, and what recomputation rounds: the
    exponent, a difference of numbers as large as Q K; delta, which does not cancel dO V where a
    token sees one key only.
    """
    q, k, _, do = (x.double() for x in tensors)
    eps = torch.finfo(tensors[0].dtype).eps
    score_eps = min(eps, torch.finfo(torch.float32).eps)
    score = (q.abs() @ k.abs().mT).max() * scale * score_eps
    delta = (exact[0] * do).abs().sum(-1).max() * scale
    deltas = 0, delta * k.abs().max(), delta * q.abs().max(), 0
    return [
        2 * (plain - truth).abs().max() + (4 * eps + score) * truth.abs().max() + eps * term
        for plain, truth, term in zip(dense, exact, deltas, strict=True)
    ]


def run(tensors, *pattern, attention=block_sparse_attention):
    """The output and gradients of query, key and value; the last tensor is the output's."""
    *qkv, output_gradient = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    output = attention(*leaves, *pattern)
    return output.detach(), *torch.autograd.grad(output, leaves, output_gradient)


def check(tensors, block_lengths, is_causal, scale=None, attention=block_sparse_attention):
    """attention's output and gradients, against float64 on the same rounded inputs."""
    pattern = (block_lengths, is_causal, scale)
    wide = [x.double() for x in tensors]
    ours = run(tensors, *pattern, attention=attention)
    dense = run(tensors, *pattern, attention=dense_masked_attention)
    exact = run(wide, *pattern, attention=dense_masked_attention)
    assert ours[0].transpose(1, 2).is_contiguous()  # the heads can be joined without a copy

    query = tensors[0]
    allowed = allowed_errors(tensors, scale or query.shape[-1] ** -0.5, dense, exact)
    names = ("output", "dquery", "dkey", "dvalue")
    for name, got, truth, most in zip(names, ours, exact, allowed, strict=True):
        assert got.dtype == query.dtype and got.shape == query.shape
        most = 1e-12 if query.dtype == torch.float64 else most
        assert (got - truth).abs().max() <= most, name


@needs_kernels
@search
@given(st.data())
def test_kernels_agree_with_dense_attention(data):
    tile_sizes = st.tuples(*[st.tuples(sizes, sizes)] * 3)
    block_lengths, is_causal, tiling = map(data.draw, (lengths, st.booleans(), tile_sizes))
    few = st.integers(1, 2)
    head_dim = st.sampled_from([16, 24, 32, 40, 72])
    dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, EXACT])
    layouts = st.sampled_from(["qkv", "transposed", "expanded"])
    shape = few, few, head_dim, dtypes, layouts, st.integers(0, 2**31)
    tensors = inputs(block_lengths, *map(data.draw, shape))
    scale = data.draw(st.sampled_from([None, 0.05, 1.0]))
    with tiles(*tiling):
        check(tensors, block_lengths, is_causal, scale, operator)


@needs_kernels
@both_patterns
def test_real_tile_sizes(is_causal):
    block_lengths = (1, 4, 9, 16, 65, 130)
    tensors = inputs(block_lengths, 1, 1, 136, torch.float32)
    check(tensors, block_lengths, is_causal, attention=operator)
    tensors = inputs((5, 513), head_dim=40, dtype=torch.float16)
    check(tensors, (5, 513), is_causal, attention=operator)


# ---- the kernels' check of themselves

SELF_CHECK = (1, 5, 20)


class Broken:
    """A kernel that is wrong in one way, where it computes `result`, a name in TILES."""

    def __init__(self, kernel, way, result="output"):
        self.kernel, self.way, self.result = kernel, way, result

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, tensors, logsumexp, delta, table, scale, **constants):
        is_broken = constants["TRANSPOSED"].value == (self.result == "dkv")
        way = self.way if is_broken else None
        (tiles, *sizes), (first, *others) = table, tensors
        query = first[0]
        if way == "raises":
            raise RuntimeError("no such instruction")
        if way == "stops after one full step":
            tiles = tiles.clone()
            tiles[:, 3] = tiles[:, 3].minimum(tiles[:, 2] + constants["COLUMNS"].value)
            tiles[:, 4] = torch.where(tiles[:, 3] > tiles[:, 2], tiles[:, 3], tiles[:, 4])
        if way == "takes strides for contiguous":
            first = (query, *query.contiguous().stride())
        if way == "swaps strides":  # in a copy that is long enough for what is then read
            batch, head, token, feature = query.stride()
            storage = query.new_zeros(2 * sum(query.shape) * max(query.stride()))
            copy = storage.as_strided(query.shape, query.stride()).copy_(query)
            first = (copy, head, batch, token, feature)
        if way == "ignores scale":
            scale = 1.0
        given = (first, *others), logsumexp, delta, (tiles, *sizes), scale
        self.kernel[grid](*given, **constants)

        result = others[-2 if self.result == "dq" else -1][0]
        sees_all = (tiles[:, 2] == 0).all()
        if way == "is wrong" or (way == "is wrong if causal" and sees_all):
            result.mul_(1.2)
        if way == "writes nan":
            result.fill_(torch.nan)


@pytest.fixture
def first_call(monkeypatch):
    """The kernels have not been checked yet, nor is there compiled code."""

    def forget():
        kernels._compare_kernels.cache_clear()
        torch._dynamo.reset()

    forget()
    monkeypatch.setattr(kernels, "_kernels_agree", kernels_agree)
    with tiles(*[(256, 128)] * 3):  # fewer programs to interpret
        yield
    forget()


def noticed():
    return pytest.warns(RuntimeWarning, match="Triton kernels")


WAYS = [
    "raises",
    "is wrong",
    "is wrong if causal",
    "writes nan",
    "stops after one full step",
    "swaps strides",
    "takes strides for contiguous",
    "ignores scale",
]
CASES = [("output", way) for way in WAYS]
CASES += itertools.product(["dq", "dkv"], ["is wrong", *WAYS[4:6]])


@needs_kernels
@parametrize("result, way", CASES)
def test_a_broken_kernel_is_noticed_and_not_used(result, way, first_call, monkeypatch):
    """One warning for a device, dtype and head_dim; then PyTorch computes, and rightly."""
    name = "_forward_kernel" if result == "output" else "_backward_kernel"
    monkeypatch.setattr(kernels, name, Broken(getattr(kernels, name), way, result))
    tensors = inputs(SELF_CHECK, dtype=torch.float16, head_dim=24)
    with noticed() as warned:
        check(tensors, SELF_CHECK, False)
        check(tensors, SELF_CHECK, True)
    (message,) = [str(x.message) for x in warned if "Triton kernels" in str(x.message)]
    assert "head_dim 24" in message
    assert ("no such instruction" if way == "raises" else "not close") in message


@needs_kernels
@parametrize("backend", ["eager", "aot_eager"])
@parametrize("way", ["stops after one full step", "swaps strides"])
def test_compiled_code_does_not_use_a_broken_kernel(way, backend, first_call, monkeypatch):
    monkeypatch.setattr(kernels, "_forward_kernel", Broken(kernels._forward_kernel, way))
    compiled = torch.compile(block_sparse_attention, backend=backend, fullgraph=True)
    tensors = inputs(SELF_CHECK, dtype=torch.float16)
    launch = mock.Mock(side_effect=kernels._launch)
    with noticed(), mock.patch.object(kernels, "_launch", launch):
        check(tensors, SELF_CHECK, False, attention=compiled)
        launch.reset_mock()
        check(tensors, SELF_CHECK, False, attention=compiled)
    assert not launch.called


@needs_kernels
def test_a_first_call_in_any_mode(first_call):
    tensors = inputs(SELF_CHECK, dtype=torch.float16)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.float16), torch.device("meta"):
        block_sparse_attention(*tensors[:3], SELF_CHECK)
    check(tensors, SELF_CHECK, False)
    assert kernels._compare_kernels.cache_info().misses == 1


# ---- the PyTorch path


@both_patterns
@parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pytorch_path_agrees_with_dense_attention(is_causal, dtype, pytorch_path):
    # dtypes of 2 bytes take plain products for short blocks, torch's fused attention for long ones
    for block_lengths in ((1, 1, 4, 9, 2, 36, 64, 5), (3, 701, 2)):
        tensors = [x.cpu() for x in inputs(block_lengths, 2, 2, 24, dtype)]
        for scale in (None, 0.3):
            check(tensors, block_lengths, is_causal, scale)


@parametrize("head_dim", [1, 8, 20, 264])
def test_pytorch_takes_other_head_dims(head_dim):
    check(inputs((1, 4, 9), 2, 2, head_dim), (1, 4, 9), False)
    check(inputs((1, 4, 9), 2, 2, head_dim, torch.float16), (1, 4, 9), True)


@needs_kernels
@parametrize("hip", [None, "6.4"])
@parametrize("dtype, head_dim", [(torch.float32, 16), (torch.float64, 16), (torch.float32, 12)])
def test_what_has_no_kernels_takes_the_pytorch_path(
    hip, dtype, head_dim, pytorch_path, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode(), mock.patch.object(kernels, "_block_by_block") as by_block:
        qkv = torch.empty(3, 1, 1, 6, head_dim, dtype=dtype, device="cuda")
        block_sparse_attention(*qkv, (1, 5))
    assert by_block.called == bool(hip or dtype == torch.float64 or head_dim == 12)


@both_patterns
def test_plain_products_where_fused_ones_are_slow(is_causal, pytorch_path, monkeypatch):
    limit = 700
    block_lengths = (limit, 4, limit + 1)
    seen = [*itertools.accumulate(block_lengths)] if is_causal else block_lengths
    dtypes = (torch.bfloat16, torch.float32)
    yes_or_no = (False, True)
    for case in itertools.product(yes_or_no, yes_or_no, dtypes, (1, 2**27)):
        has_amx, has_gradients, dtype, batch = case
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        fused = mock.Mock(side_effect=F.scaled_dot_product_attention)
        with FakeTensorMode(), mock.patch.object(F, "scaled_dot_product_attention", fused):
            query, key, value = torch.empty(3, batch, 1, sum(block_lengths), 16, dtype=dtype)
            value.requires_grad_(has_gradients)
            block_sparse_attention(query, key, value, block_lengths, is_causal)

        is_slow = has_gradients or not has_amx
        is_plain = is_slow and dtype == torch.bfloat16 and batch == 1
        keys = [call.args[1].shape[2] for call in fused.call_args_list]
        assert keys == [n for n in seen if n > limit * is_plain], case


# ---- the table


@settings(search, max_examples=100)
@given(st.data())
def test_the_table_covers_every_pair_once(data):
    some = st.lists(st.one_of(length, st.integers(1, 300)), min_size=1, max_size=12)
    giant = st.sampled_from([[], [1024], [1] * 150])
    block_lengths = (*data.draw(some), *data.draw(giant))
    pattern = st.booleans(), st.booleans(), sizes, sizes
    is_causal, transposed, rows, columns = map(data.draw, pattern)
    table = tile_table(block_lengths, is_causal, transposed, rows, columns)

    visible = visibility(block_lengths, is_causal).numpy()
    if transposed:
        visible = visible.T

    seen, walks = np.zeros(visible.shape, int), []
    for start, stop, low, middle, high in table.tolist():
        seen[start:stop, low:high] += 1
        assert 0 < stop - start <= rows
        assert (middle - low) % columns == 0 and 0 <= high - middle < columns
        walks.append(high - low)
    assert (seen == visible).all() and walks == sorted(walks, reverse=True)


# ---- what is read and written


@needs_kernels
@both_patterns
def test_written_everywhere_repeatable_and_independent_of_the_batch(is_causal):
    pattern = ((1, 3, 20, 41), is_causal)
    tensors = inputs(pattern[0], 2, 1, 24, torch.float32)
    torch.use_deterministic_algorithms(True)  # torch.empty starts as nan
    try:
        assert torch.empty(3).isnan().all()
        with tiles(*SMALL):
            whole, again = (run(tensors, *pattern, attention=operator) for _ in range(2))
            part = run([x[:1] for x in tensors], *pattern, attention=operator)
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second, alone in zip(whole, again, part, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second) and torch.equal(first[:1], alone)


@needs_kernels
def test_views_are_read_in_place():
    tensors = inputs((3, 6), 2, 2)
    launch = mock.Mock(side_effect=kernels._launch)
    with mock.patch.object(kernels, "_launch", launch):
        run(tensors, (3, 6))
    assert launch.call_count == 3
    for call in launch.call_args_list:
        read = [(x.data_ptr(), x.stride()) for x in call.args[2]]
        assert all((x.data_ptr(), x.stride()) in read for x in tensors[:3])


@needs_kernels
@parametrize(
    "strides", [(2**29 + 8, 80, 16, 1), (80, 80, 2**29 + 8, 1), (80, 80, 1, 2**27 + 2**24)]
)
def test_offsets_beyond_two_to_the_31(strides):
    # torch.empty reserves the memory and touches none of it
    shape = (5, 1, 5, 16)  # no stride is so long, an offset is
    small = inputs((1, 4), 5, 1, 16, torch.float16)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert extent > 2**31
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 10 * extent:
        pytest.skip("not enough memory on this GPU")
    far = [torch.empty(extent, dtype=torch.float16, device=DEVICE) for _ in small]
    far = [x.as_strided(shape, strides).copy_(y) for x, y in zip(far, small, strict=True)]
    results = (run(x, (1, 4)) for x in (far, small))
    assert all(map(torch.equal, *results))


@needs_kernels
def test_none_and_many():
    launch = mock.MagicMock()
    kernel = type(kernels._forward_kernel)
    with mock.patch.object(kernel, "__getitem__", launch):
        for batch in (0, 70_000):
            run(inputs((2,), batch), (2,))
    # a grid of one number, at most 2 ** 31 - 1
    assert launch.call_args_list == [mock.call((70_000,))] * 3


# ---- as torch's parts see it


@both_patterns
def test_compiles_as_one_graph(is_causal):
    tensors = inputs((1, 3, 12), 2, 2, 16, torch.float32)
    compiled = torch.compile(block_sparse_attention, fullgraph=True)
    ours = run(tensors, (1, 3, 12), is_causal, attention=compiled)
    expected = run(tensors, (1, 3, 12), is_causal)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors[:3], (1, 3, 12), is_causal), expected[0])


@needs_kernels
@both_patterns
def test_operators_pass_opcheck(is_causal):
    *tensors, output_gradient = inputs((1, 4), 1, 2, 16, torch.float32)
    pattern = ((1, 4), is_causal, 0.25)
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(kernels._forward, (*leaves, *pattern))
    saved = [*tensors, *kernels._forward(*tensors, *pattern)]
    torch.library.opcheck(kernels._backward, (saved, output_gradient, *pattern))


@parametrize("has_kernels", [False, pytest.param(True, marks=needs_kernels)])
def test_autocast_casts(has_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", has_kernels and DEVICE == "cpu")
    query, key, value, output_gradient = inputs((1, 4, 9), 1, 2, 16, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (query, key, value.bfloat16())]
    with torch.autocast(DEVICE, torch.bfloat16):
        output = block_sparse_attention(*leaves, (1, 4, 9))
    expected = block_sparse_attention(*(x.bfloat16() for x in leaves), (1, 4, 9))
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    output.backward(output_gradient.bfloat16())
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in leaves)


@needs_kernels
def test_checkpoint_and_inputs_that_require_no_gradient():
    *tensors, output_gradient = whole = inputs((1, 4, 9), 1, 2)
    _, *expected = run(whole, (1, 4, 9), True)
    for chosen in itertools.product((False, True), repeat=3):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, chosen, strict=True)]
        output = checkpoint(block_sparse_attention, *leaves, (1, 4, 9), True, use_reentrant=False)
        if any(chosen):
            output.backward(output_gradient)
        for leaf, gradient, wanted in zip(leaves, expected, chosen, strict=True):
            assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


@needs_kernels
def test_float32_is_exact_unless_torch_is_told_otherwise():
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert kernels._dtypes(torch.float32)["PRECISION"] == precision


GOOD = torch.zeros(1, 2, 6, 16)
BAD = dict(
    query=[GOOD[0]],
    key=[GOOD[:, :, :5], GOOD[:, :1], GOOD.double()],
    value=[GOOD[0], GOOD.bfloat16(), GOOD.to("meta")],
    block_lengths=[(1, 4), (), (6, 0), (7, -1)],
)


@parametrize("name", BAD)
@parametrize("attention", [block_sparse_attention, dense_masked_attention])
def test_bad_input_is_named(attention, name):
    good = dict(query=GOOD, key=GOOD, value=GOOD, block_lengths=(1, 5))
    for wrong in BAD[name]:
        others = dict(key=wrong, value=wrong) if name == "query" else {}
        refused("^(got|block_lengths is) .*, expected ", attention, **good | {name: wrong} | others)


# ---- compiled ahead of time

# KiB of shared memory, and the tensor cores' instruction
LIMITS = {80: (99, "mma.sync"), 90: (227, "wgmma.mma_async"), 100: (227, "tcgen05.mma")}


def compile_kernels(architecture, dtype, head_dim):
    """What each kernel uses, compiled as for a qkv."""
    driver = mock.Mock()
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    driver.get_current_target.return_value = target
    triton.runtime.driver.set_active(driver)

    launch = triton.JITFunction.run
    results = []

    def compile_only(kernel, *args, warmup, **options):
        results.append((kernel, options, launch(kernel, *args, warmup=True, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
        patch.setattr(triton.JITFunction, "run", compile_only)
        tensors = inputs((9, 512), 2, 4, head_dim, getattr(torch, dtype))
        run(tensors, attention=lambda *x: kernels._forward(*x, (9, 512), False, 1.0)[0])

    built = []
    for kernel, options, binary in results:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", cubin.name]
            dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout

        name = kernel.__name__ + " transposed" * options["TRANSPOSED"].value
        found = dict(kernel=name, rows=options["ROWS"].value)
        found |= dict(columns=options["COLUMNS"].value, warps=options["num_warps"])
        found["registers"] = int(re.search(r"REG:(\d+)", dump)[1])
        found["spills"] = len(re.findall(r"\s(?:STL|LDL)[. ]", dump))
        found |= dict(shared=binary.metadata.shared, tensor_memory=binary.metadata.tmem_size)
        found["has_product"] = LIMITS.get(architecture, (0, ""))[1] in binary.asm["ptx"]
        built.append(found)
    return built


@needs_kernels
def test_compiled_ahead_of_time(monkeypatch):
    heads = [("bfloat16", head_dim) for head_dim in (48, 64, 80, 128, 144)] + [("float32", 256)]
    jobs = [(architecture, *head) for architecture in LIMITS for head in heads]
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # of new processes, which import the kernels anew
    with multiprocessing.get_context("spawn").Pool() as pool:
        built = pool.starmap(compile_kernels, jobs)
    for job, three in zip(jobs, built, strict=True):
        architecture, dtype, _ = job
        assert len(three) == 3
        for kernel in three:
            assert kernel["shared"] <= LIMITS[architecture][0] * 1024, (job, kernel)
            if dtype != "float32":  # which has no tensor cores and may spill
                assert kernel["spills"] == 0, (job, kernel)
                assert kernel["has_product"] or kernel["rows"] < 64, (job, kernel)
