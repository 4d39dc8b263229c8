"""Attention over a sequence of blocks, such as the scales of an image, without an L x L mask.

`block_sparse_attention` is the function to call; `dense_masked_attention` computes the same with an
explicit mask and defines what is correct. On NVIDIA GPUs three Triton kernels (forward; dQ; dK and
dV) compute the softmax in a streaming fashion, as FlashAttention-2 does (Dao 2023, algorithms 1
and 2). The tests compile these kernels and run them in Triton's interpreter; they have not run on a
GPU yet. So the first call for a GPU, dtype and head_dim compares them with dense attention and, if
they differ, warns and lets PyTorch compute (`_kernels_agree`). On all other devices PyTorch
computes block by block.

    >>> query, key, value = torch.randn(3, 2, 4, 14, 32)
    >>> block_sparse_attention(query, key, value, block_lengths=(1, 4, 9)).shape
    torch.Size([2, 4, 14, 32])
"""

import functools
import itertools
import os
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the kernels are never called there
    triton = None

# With TRITON_INTERPRET=1 the kernels run in numpy, on any device.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def block_sparse_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """Softmax attention in which a token sees its own block and, if is_causal, all earlier blocks.

    query, key, value: (batch, heads, tokens, head_dim) of one dtype, on one device, with any
        strides. head_dim is a multiple of 8 from 16 to 256. Under autocast they are cast first.
    block_lengths: the number of tokens of each block, positive integers that sum to tokens.
    scale: the factor on the scores; head_dim ** -0.5 if None.

    Returns (batch, heads, tokens, head_dim), stored as (batch, tokens, heads, head_dim), so that
    joining the heads needs no copy. Gradients of the first order are supported. ValueError if the
    shapes, dtypes or lengths do not fit.

    Before compiling it or capturing a CUDA graph, call it once: the first call checks the kernels
    and copies its tile table to the GPU.
    """
    query, key, value, scale = _check(query, key, value, block_lengths, scale)
    block_lengths = tuple(block_lengths)

    has_kernels = triton is not None and torch.version.hip is None  # no tile sizes for AMD GPUs
    is_sparse = len(block_lengths) > 1  # one block is plain attention, which torch computes
    on_gpu = query.is_cuda and query.dtype != torch.float64
    if INTERPRETED or (has_kernels and is_sparse and on_gpu):
        # torch.compile and fake tensors cannot look at numbers
        is_traced = torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter)
        if is_traced or _kernels_agree(query.device, query.dtype, query.shape[-1]):
            return _forward(query, key, value, block_lengths, bool(is_causal), scale)[0]
    return _block_by_block(query, key, value, block_lengths, is_causal, scale)


def dense_masked_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """The reference for `block_sparse_attention`: the same arguments and result, a dense mask."""
    query, key, value, scale = _check(query, key, value, block_lengths, scale)

    # the block to which each token belongs
    block = torch.repeat_interleave(torch.tensor(block_lengths, device=query.device))  # (tokens,)
    sees = torch.ge if is_causal else torch.eq
    visible = sees(block[:, None], block)  # (tokens, tokens)

    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


# ---- the PyTorch path


def _block_by_block(query, key, value, block_lengths, is_causal, scale):
    # With tokens in dimension 1 and heads in dimension 2, the final cat copies contiguous rows.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))

    queries = query.split(block_lengths, dim=1)
    keys, values = (_visible_parts(x, block_lengths, is_causal) for x in (key, value))
    outputs = [_attention(*block, scale) for block in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _visible_parts(x, block_lengths, is_causal):
    """The keys or values (batch, tokens, ...) that each block sees."""
    if not is_causal:
        return x.split(block_lengths, dim=1)

    # Each prefix is cut from the next longer one. Cut from x, every gradient would be as long as x.
    prefixes = [x]
    for length in reversed(block_lengths[1:]):
        prefixes.append(prefixes[-1][:, :-length])
    return prefixes[::-1]


def _attention(query, key, value, scale):
    """Attention of (batch, tokens, heads, head_dim) without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, heads, tokens, head_dim)
    if _fused_is_slow(q, k, v):
        scores = (q * scale) @ k.mT
        output = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return output.transpose(1, 2)


def _fused_is_slow(q, k, v):
    """Whether two plain matrix products are faster than torch's fused attention on this CPU.

    Measured for dtypes of 2 bytes, on processors with and without AMX: so it is for short blocks,
    where gradients are wanted or AMX is missing.
    """
    if not q.is_cpu or q.element_size() != 2:
        return False
    scores = q.shape[:3].numel() * k.shape[2]  # batch x heads x queries x keys
    is_small = k.shape[2] <= 700 and scores <= 2**27
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return is_small and (gradients or not torch.cpu._is_amx_tile_supported())


# ---- the kernels
#
# A program owns a tile of rows of one head (queries; for dK and dV, keys) and walks over the
# columns that its rows see. The rows of a tile lie in one block, or in several tiny ones:
#
#     the first two rows of a tile; the columns that they see are #:
#     one block of 9, full steps of 4     blocks of 1 and 4, causal
#     ########|#                          |#               down: rows (queries)
#     ########|#                          |#####           across: columns (keys)
#     no mask |mask: the tail             |mask: no full step is seen by all rows
#
# A step with a mask is half as wide, because less of it is seen, but has at least the 16 columns
# that tl.dot needs. The arguments of a kernel are tuples, made by `_launch`:
#
#     tensor      pointer; strides of batch, head, token and feature, in elements
#     statistics  tensors (batch, heads, tokens): logsumexp, delta
#     work        tiles, bounds, number of tiles; heads, tokens
#
# DOT and ACC are dtypes: of the operands of tl.dot, and of sums. PRECISION is that of products in
# fp32.


@functools.lru_cache(maxsize=256)
def tile_table(block_lengths, is_causal, transposed, rows, columns, device="cpu"):
    """The tiles that the kernels walk over, of queries or (transposed) of keys: two int32 tensors.

    tiles (count, 6), the longest walk first: start and stop of the rows; start and stop of the
        columns that all of these rows see, in full steps; start and stop of the columns that need a
        mask.
    bounds (2, tokens): the first column that a row sees, and the first one after those it sees.
    """
    edges = [0, *itertools.accumulate(block_lengths)]
    count = len(block_lengths)

    # block i sees columns low[i] to high[i] - 1
    low, high = edges[:-1], edges[1:]
    if is_causal and transposed:  # a key is seen by all later queries
        high = edges[-1:] * count
    elif is_causal:
        low = [0] * count

    tiles = []
    first = 0
    while first < count:
        # tiny blocks share a tile
        last = first
        while last + 1 < count and edges[last + 2] - edges[first] <= rows:
            last += 1

        # All rows of the tile see columns low[last] to high[first]. Queries of a tile share low, so
        # these columns come first in their walk; keys (transposed) share high, so they come last.
        start, stop = low[first], high[last]
        full = max(high[first] - low[last], 0) // columns * columns
        if transposed:
            walk = (stop - full, stop, start, stop - full)
        else:
            walk = (start, start + full, start + full, stop)

        end = edges[last + 1]
        for row in range(edges[first], end, rows):
            tiles.append((row, min(row + rows, end), *walk))
        first = last + 1

    tiles.sort(key=lambda tile: tile[3] - tile[2] + tile[5] - tile[4], reverse=True)
    bounds = torch.tensor([low, high], dtype=torch.int32)
    bounds = bounds.repeat_interleave(torch.tensor(block_lengths), dim=1)
    return torch.tensor(tiles, dtype=torch.int32, device=device), bounds.to(device)


jit = triton.jit if triton else lambda function: function


@jit
def _program(work, ROWS):
    """(tile, (batch, head), first, rows, inside, (low, high)) of the current program.

    tile is a pointer, and first the offset of the head in statistics. inside tells which rows
    exist. Each row sees columns low to high - 1.
    """
    tiles, bounds, tile_count, heads, tokens = work
    program = tl.program_id(0)  # a head's tiles run side by side and find its keys in the cache
    tile = tiles + program % tile_count * 6
    pair = (program // tile_count).to(tl.int64)

    rows = tl.load(tile) + tl.arange(0, ROWS)
    inside = rows < tl.load(tile + 1)
    low = tl.load(bounds + rows, inside, 0)
    high = tl.load(bounds + tokens + rows, inside, 0)
    return tile, (pair // heads, pair % heads), pair * tokens, rows, inside, (low, high)


@jit
def _columns(tile, MASKED, COLUMNS):
    """Start and stop of the walk without or with a mask, and the column offsets of one step."""
    STEP: tl.constexpr = COLUMNS // 2 if MASKED and COLUMNS > 16 else COLUMNS
    # a tile is (rows, unmasked columns, masked columns), two ints each
    walk = tile + 2 + 2 * MASKED
    return tl.load(walk), tl.load(walk + 1), tl.arange(0, STEP)


@jit
def _pointers(tensor, place, start, rows, DIM):
    """Pointers (rows, features), and which features exist: a power of two of them is loaded."""
    base, batch_stride, head_stride, token_stride, feature_stride = tensor
    base += place[0] * batch_stride + place[1] * head_stride
    base += tl.cast(start, tl.int64) * token_stride
    features = tl.arange(0, triton.next_power_of_2(DIM))
    offsets = rows.to(tl.int64)[:, None] * token_stride + features.to(tl.int64) * feature_stride
    return base + offsets, (features < DIM)[None, :]


@jit
def _load(tensor, place, start, rows, inside, DIM, DOT, MASKED=True):
    """(rows, features) from row `start` on, zero where a row or feature does not exist."""
    pointers, features = _pointers(tensor, place, start, rows, DIM)
    if MASKED:
        features = inside[:, None] & features
    return tl.load(pointers, features, 0).to(DOT)


@jit
def _store(tensor, x, place, rows, inside, DIM):
    pointers, features = _pointers(tensor, place, 0, rows, DIM)
    tl.store(pointers, x, inside[:, None] & features)


@jit
def _visible(bounds, column):
    low, high = bounds
    return (low[:, None] <= column[None, :]) & (column[None, :] < high[:, None])  # (rows, columns)


@jit
def _products(a, b, ACC, PRECISION):
    return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)


@jit
def _add_product(total, p, x, tensor, PRECISION):
    """total + p @ x, p rounded to the dtype that tensor has in memory (interpreted, x is wider)."""
    p = p.to(tensor[0].dtype.element_ty).to(x.dtype)
    return tl.dot(p, x, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def _forward_kernel(tensors, statistics, work, scale, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION):
    query, key, value, output = tensors
    tile, place, first, rows, inside, bounds = _program(work, ROWS)
    q = _load(query, place, 0, rows, inside, DIM, DOT)

    scale *= 1.4426950408889634  # 1 / ln 2, for powers of two
    highest = tl.full([ROWS], -1e30, ACC)  # finite, because inf - inf is nan
    total = tl.zeros([ROWS], ACC)
    out = tl.zeros(q.shape, ACC)

    for masked in tl.static_range(2):  # first without a mask, then with one
        start, stop, columns = _columns(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            there = column < stop
            k = _load(key, place, step, columns, there, DIM, DOT, masked)
            v = _load(value, place, step, columns, there, DIM, DOT, masked)

            scores = _products(q, k, ACC, PRECISION)
            if masked:
                visible = _visible(bounds, column)
                scores = tl.where(visible, scores, -1e30)

            higher = tl.maximum(highest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])
            if masked:
                p = tl.where(visible, p, 0)

            shrink = tl.exp2(highest - higher)
            highest = higher
            total = total * shrink + tl.sum(p, 1)
            out = _add_product(out * shrink[:, None], p, v, value, PRECISION)

    total = tl.where(total == 0, 1, total)  # of rows beyond the tile
    _store(output, out / total[:, None], place, rows, inside, DIM)
    tl.store(statistics[0] + first + rows, highest + tl.log2(total), inside)


@jit
def _score_gradient(q, k, do, v, scale, logsumexp, delta, PRECISION):
    """Probabilities and gradients of the scores, (queries, keys).

    The dK/dV kernel passes k, q, v, do in place of q, k, do, v and gets the transposes, (keys,
    queries).
    """
    p = tl.exp2(_products(q, k, delta.dtype, PRECISION) * (scale * 1.4426950408889634) - logsumexp)
    return p, p * (_products(do, v, delta.dtype, PRECISION) - delta)


@jit
def _dq_kernel(tensors, statistics, work, scale, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION):
    query, key, value, output, output_gradient, query_gradient = tensors
    logsumexp, delta = statistics
    tile, place, first, rows, inside, bounds = _program(work, ROWS)
    q = _load(query, place, 0, rows, inside, DIM, DOT)
    out = _load(output, place, 0, rows, inside, DIM, DOT)
    do = _load(output_gradient, place, 0, rows, inside, DIM, DOT)

    # delta, the sum of p dp over a row's columns, is stored for the next kernel
    row_delta = tl.sum(out.to(ACC) * do.to(ACC), 1)[:, None]
    tl.store(delta + first + rows[:, None], row_delta, inside[:, None])
    row_logsumexp = tl.load(logsumexp + first + rows, inside, 0)[:, None]
    dq = tl.zeros(q.shape, ACC)

    for masked in tl.static_range(2):
        start, stop, columns = _columns(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            there = column < stop
            k = _load(key, place, step, columns, there, DIM, DOT, masked)
            v = _load(value, place, step, columns, there, DIM, DOT, masked)

            _, ds = _score_gradient(q, k, do, v, scale, row_logsumexp, row_delta, PRECISION)
            if masked:
                ds = tl.where(_visible(bounds, column), ds, 0)
            dq = _add_product(dq, ds, k, key, PRECISION)

    _store(query_gradient, dq * scale, place, rows, inside, DIM)


@jit
def _dkv_kernel(tensors, statistics, work, scale, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION):
    # rows are keys here and columns are queries
    query, key, value, output_gradient, key_gradient, value_gradient = tensors
    logsumexp, delta = statistics
    tile, place, first, rows, inside, bounds = _program(work, ROWS)
    k = _load(key, place, 0, rows, inside, DIM, DOT)
    v = _load(value, place, 0, rows, inside, DIM, DOT)
    dk = tl.zeros(k.shape, ACC)
    dv = tl.zeros(v.shape, ACC)

    for masked in tl.static_range(2):
        start, stop, columns = _columns(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            there = column < stop
            q = _load(query, place, step, columns, there, DIM, DOT, masked)
            do = _load(output_gradient, place, step, columns, there, DIM, DOT, masked)
            column_logsumexp = tl.load(logsumexp + first + column, there, 0)[None, :]
            column_delta = tl.load(delta + first + column, there, 0)[None, :]

            p, ds = _score_gradient(k, q, v, do, scale, column_logsumexp, column_delta, PRECISION)
            if masked:
                visible = _visible(bounds, column)
                p = tl.where(visible, p, 0)
                ds = tl.where(visible, ds, 0)

            dv = _add_product(dv, p, do, output_gradient, PRECISION)
            dk = _add_product(dk, ds, q, query, PRECISION)

    _store(key_gradient, dk * scale, place, rows, inside, DIM)
    _store(value_gradient, dv, place, rows, inside, DIM)


# ---- the launch

# {bytes of an element: {largest head_dim: (rows of a tile, columns of a full step, warps, stages)
# of the forward, dQ and dK/dV kernels}}. Chosen so that they compile without register spills for
# compute capabilities 8.0 to 10.0 (`tests/benchmark.py kernels`); not measured on a GPU yet.
TILES = {
    2: {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        128: ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    4: {
        64: ((32, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 2),) * 3,
        256: ((16, 16, 8, 2),) * 3,
    },
}
FORWARD, DQ, DKV = range(3)


def _constants(which, head_dim, dtype):
    """The compile-time arguments of a kernel."""
    table = TILES[min(dtype.itemsize, 4)]
    limit = min(limit for limit in table if head_dim <= limit)
    rows, columns, warps, stages = table[limit][which]

    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    operand = getattr(tl, str(dtype).removeprefix("torch."))
    if INTERPRETED:  # numpy, which has no bfloat16
        operand = accumulator
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

    sizes = dict(DIM=head_dim, ROWS=rows, COLUMNS=columns)
    types = dict(DOT=operand, ACC=accumulator, PRECISION=precision)
    options = dict(num_warps=warps, num_stages=stages)
    return {name: tl.constexpr(x) for name, x in (sizes | types).items()} | options


def _launch(which, tensors, statistics, block_lengths, is_causal, scale):
    """Runs a kernel for every tile of every head."""
    kernel = (_forward_kernel, _dq_kernel, _dkv_kernel)[which]
    query = tensors[0]
    batch, heads, tokens, head_dim = query.shape
    if batch * heads == 0:
        return

    constants = _constants(which, head_dim, query.dtype)
    tile = (constants["ROWS"].value, constants["COLUMNS"].value)
    tiles, bounds = tile_table(tuple(block_lengths), is_causal, which == DKV, *tile, query.device)

    tensors = tuple((x, *x.stride()) for x in tensors)
    work = (tiles, bounds, len(tiles), heads, tokens)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        kernel[(len(tiles) * batch * heads,)](tensors, statistics, work, scale, **constants)


# ---- the kernels' check of themselves


@functools.cache
def _kernels_agree(device, dtype, head_dim):
    """Whether the kernels compute what dense attention does, on a small case; warns if not.

    Computed once in a process for each device, dtype and head_dim.
    """
    lengths, scale = (1, 4, 9, 70), head_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, 1, 1, sum(lengths), head_dim, generator=generator).to(device, dtype)
    no_autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            for is_causal in (False, True):
                pattern = lengths, is_causal, scale
                ours = _output_and_gradients(_forward, tensors, pattern)
                dense = _output_and_gradients(dense_masked_attention, tensors, pattern)
                exact = _output_and_gradients(dense_masked_attention, tensors.double(), pattern)
                allowed = _allowed_errors(tensors, scale, dense, exact)
                names = "output", "dQ", "dK", "dV"
                for name, got, truth, most in zip(names, ours, exact, allowed, strict=True):
                    error = (got - truth).abs().max()
                    if not error <= most:  # nan is an error too
                        raise ArithmeticError(f"{name} is wrong by {error:.1e}, allowed {most:.1e}")
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise errors of many kinds
        case = f"{device}, {dtype}, head_dim {head_dim}: {type(error).__name__}: {error}"
        words = "Triton kernels fail their check and are not used, so training is slower:"
        warnings.warn(f"{words} {case}", RuntimeWarning, stacklevel=3)
        return False
    return True


def _output_and_gradients(attention, tensors, pattern):
    """[output, dQ, dK, dV] of attention(query, key, value, *pattern); tensors: these and dO."""
    *qkv, output_gradient = tensors
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    output = attention(*leaves, *pattern)
    if attention is _forward:
        output, _ = output
    return [output.detach(), *torch.autograd.grad(output, leaves, output_gradient)]


def _allowed_errors(tensors, scale, dense, exact):
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


# ---- the operators

LIBRARY = __name__.replace(".", "_")  # so that copies of this file in two packages do not clash


def _empty(query):
    return torch.empty_permuted(query.shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


@torch.library.custom_op(f"{LIBRARY}::forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 logarithm of the sum of exponentials of each row."""
    output, logsumexp = _new_outputs(query)
    tensors = (query, key, value, output)
    _launch(FORWARD, tensors, (logsumexp,), lengths, is_causal, scale)
    return output, logsumexp


@_forward.register_fake
def _new_outputs(query, *_):
    """Allocates what the operator returns. Under torch.compile this stands in for the operator."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return _empty(query), query.new_empty(query.shape[:-1], dtype=dtype)


@torch.library.custom_op(f"{LIBRARY}::backward", mutates_args=())
def _backward(
    saved: Sequence[Tensor], gradient: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> list[Tensor]:
    query, key, value, output, logsumexp = saved
    dq, dk, dv = gradients = _new_gradients(saved)
    statistics = (logsumexp, torch.empty_like(logsumexp))
    pattern = (lengths, is_causal, scale)
    tensors = (query, key, value, output, gradient, dq)
    _launch(DQ, tensors, statistics, *pattern)
    tensors = (query, key, value, gradient, dk, dv)
    _launch(DKV, tensors, statistics, *pattern)
    return gradients


@_backward.register_fake
def _new_gradients(saved, *_):
    return [_empty(saved[0]) for _ in range(3)]


def _save(ctx, inputs, output):
    ctx.pattern = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(ctx, output_gradient, _):
    saved = list(ctx.saved_tensors)
    return *_backward(saved, output_gradient, *ctx.pattern), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


# ---- checking of arguments


def _check(query, key, value, block_lengths, scale):
    """query, key, value as autocast casts them, and scale. ValueError where a kernel would read
    beyond the tensors or compute something else.
    """
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = query, key, value
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)

    expected = (query.shape, query.dtype, query.device)
    for name, x in dict(key=key, value=value).items():
        given = (x.shape, x.dtype, x.device)
        if given != expected:
            raise ValueError(f"{name} is {given}, expected that of query, {expected}")

    if query.ndim != 4:
        shape = tuple(query.shape)
        raise ValueError(f"query has shape {shape}, expected (batch, heads, tokens, head_dim)")
    tokens, head_dim = query.shape[2:]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"query has head_dim {head_dim}, expected a multiple of 8 from 16 to 256")
    if min(block_lengths, default=0) < 1 or sum(block_lengths) != tokens:
        expected = f"positive integers that sum to the {tokens} tokens"
        raise ValueError(f"block_lengths is {block_lengths}, expected {expected}")
    return query, key, value, float(head_dim**-0.5 if scale is None else scale)
