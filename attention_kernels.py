"""Attention over a sequence of blocks, such as the scales of an image: no L x L mask anywhere.

`block_sparse_attention` is the entry, `dense_masked_attention` says what it computes. On
NVIDIA's cards three Triton kernels (forward; dQ; dK and dV) stream the softmax as FlashAttention-2
does (Dao 2023, algorithms 1 and 2); tests compile and interpret them, no card has run them yet.
Elsewhere PyTorch computes block by block.

    >>> query, key, value = torch.randn(3, 2, 4, 14, 32)
    >>> block_sparse_attention(query, key, value, block_lengths=(1, 4, 9)).shape
    torch.Size([2, 4, 14, 32])
"""

import functools
import itertools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Mac, Windows: kernels are plain functions nobody calls
    triton = None

# with TRITON_INTERPRET=1 the kernels run in numpy, on any device
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
HAS_AMX = torch.cpu._is_amx_tile_supported()

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# on a CPU, in dtypes of 2 bytes, where gradients are wanted or AMX is missing, two plain products
# beat torch's fused attention up to these sizes: keys of a block; batch x heads x queries x keys
UNFUSED_KEYS, UNFUSED_SCORES = 700, 2**27


def block_sparse_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """Softmax attention in which a token sees its own block and, if is_causal, all earlier ones.

    query, key, value: (batch, heads, tokens, head_dim) on one device, any strides, one dtype:
        float16, bfloat16, float32 or float64, after autocast; head_dim 16, 24, ... 256.
    block_lengths: positive ints that sum to tokens.
    scale: positive factor on the scores, head_dim ** -0.5 if None.

    Returns (batch, heads, tokens, head_dim), laid out as (batch, tokens, heads, head_dim), so that
    joining the heads copies nothing. ValueError on other arguments. Gradients are of the first
    order. On a CPU, in 2 bytes, rounding depends on batch size and processor (`_attention`).

    Call it once before you capture a CUDA graph: the first call copies its tile table to the card.
    """
    query, key, value, block_lengths, scale = _check(query, key, value, block_lengths, scale)

    has_kernels = triton is not None and torch.version.hip is None  # no tiles for AMD
    is_sparse = len(block_lengths) > 1  # one block is plain attention, which torch has
    on_gpu = query.is_cuda and query.dtype != torch.float64
    if INTERPRETED or (has_kernels and is_sparse and on_gpu):
        return _forward(query, key, value, block_lengths, bool(is_causal), scale)[0]
    return _block_by_block(query, key, value, block_lengths, is_causal, scale)


def dense_masked_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """What `block_sparse_attention` computes, of the same arguments, by an explicit mask."""
    query, key, value, block_lengths, scale = _check(query, key, value, block_lengths, scale)

    # whose tokens see each other
    block = torch.repeat_interleave(torch.tensor(block_lengths, device=query.device))  # (tokens,)
    sees = torch.ge if is_causal else torch.eq
    visible = sees(block[:, None], block)  # (tokens, tokens)

    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


# ---- the PyTorch path


def _block_by_block(query, key, value, block_lengths, is_causal, scale):
    # cut along dimension 1, where a token's heads lie side by side: the cat below copies whole rows
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))

    queries = query.split(block_lengths, dim=1)
    keys, values = (_visible_parts(x, block_lengths, is_causal) for x in (key, value))
    outputs = [_attention(*block, scale) for block in zip(queries, keys, values)]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _visible_parts(x, block_lengths, is_causal):
    """What each block sees of the keys or values (batch, tokens, ...)."""
    if not is_causal:
        return x.split(block_lengths, dim=1)

    # each is cut from the next longer one: cut from x, its gradient would be as long as x
    prefixes = [x]
    for length in reversed(block_lengths[1:]):
        prefixes.append(prefixes[-1][:, :-length])
    return prefixes[::-1]


def _attention(query, key, value, scale):
    """Attention of (batch, tokens, heads, head_dim) without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, heads, tokens, head_dim)

    is_small = k.shape[2] <= UNFUSED_KEYS and q.shape[:3].numel() * k.shape[2] <= UNFUSED_SCORES
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    fused_is_slow = gradients or not HAS_AMX

    if q.is_cpu and q.element_size() == 2 and is_small and fused_is_slow:
        scores = (q * scale) @ k.mT
        output = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return output.transpose(1, 2)


# ---- the kernels
#
# A program owns a tile of rows of one head (queries; for dK and dV, keys) and walks over the
# columns that its rows see. The rows of a tile lie in one block, or in a run of tiny ones:
#
#     the first two rows of a tile; what they see is #:
#     one block of 9, full steps of 4     blocks of 1 and 4, causal
#     ########|#                          |#               down: rows (queries)
#     ########|#                          |#####           across: columns (keys)
#     no mask |mask: the tail             |mask: no full step is seen by all
#
# With a mask a step is half as wide, since less of it is seen, but 16 at least, as tl.dot wants. A
# kernel's arguments are tuples, as `_launch` makes them:
#
#     tensor      pointer; strides of batch, head, token (bytes, see `_launch`), feature (elements)
#     statistics  tensors (batch, heads, tokens): logsumexp, delta
#     work        tiles, bounds, how many tiles; heads, tokens
#
# DOT and ACC are dtypes, of what tl.dot takes and of sums; PRECISION that of its fp32 products.


@functools.lru_cache(maxsize=256)
def tile_table(block_lengths, is_causal, transposed, rows, columns, device="cpu"):
    """What the kernels walk over, for queries or (transposed) keys: two int32 tensors.

    Tiles (count, 6), longest walk first: start and stop of the rows; start and stop of the columns
        that all of them see, in full steps; start and stop of those that need a mask.
    Bounds (2, tokens): the first column that a row sees, and the first behind them.
    """
    edges = [0, *itertools.accumulate(block_lengths)]
    count = len(block_lengths)

    # block i sees the columns from low[i] to high[i]
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

        # all of the tile's rows see columns low[last] to high[first]. If there are any, its queries
        # share low, so these come first; its keys (transposed) share high, so these come last
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
    """Its tile; place (batch, head); first, that head's start in statistics; rows; inside, which
    of them exist; bounds (the first column that each row sees, the first behind).
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
    """Start and stop of the walk without or with a mask, and the offsets of a step."""
    STEP: tl.constexpr = COLUMNS // 2 if MASKED and COLUMNS > 16 else COLUMNS
    walk = tile + 2 + 2 * MASKED
    return tl.load(walk), tl.load(walk + 1), tl.arange(0, STEP)


@jit
def _pointers(tensor, place, start, rows, DIM):
    """Pointers (rows, features), and which features there are: a power of two is loaded."""
    base, batch_stride, head_stride, token_stride, feature_stride = tensor
    SIZE: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    token_stride //= SIZE
    base += (place[0] * batch_stride + place[1] * head_stride) // SIZE
    features = tl.arange(0, triton.next_power_of_2(DIM))
    offsets = rows.to(tl.int64)[:, None] * token_stride + features.to(tl.int64) * feature_stride
    return base + offsets + tl.cast(start, tl.int64) * token_stride, (features < DIM)[None, :]


@jit
def _load(tensor, place, start, rows, inside, DIM, DOT, MASKED=True):
    """(rows, features), rows from start on, zero where there is none."""
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


# Blocks that share a tile must not infect each other, and 0 * inf is nan. So under a mask inf and
# nan become 0 before products with p and ds, which are nan in rows that see them, as they should.


@jit
def _replace_bad(x):
    """x, zero in place of inf and nan."""
    return tl.where(x - x == 0, x, 0)


@jit
def _mask_bad(p, visible, x):
    """p, 0 if not visible, nan in columns whose row of x is not finite; x, cleaned."""
    is_finite = tl.min((x - x == 0).to(tl.int32), 1) != 0
    return tl.where(visible, tl.where(is_finite[None, :], p, float("nan")), 0), _replace_bad(x)


@jit
def _products(a, b, ACC, PRECISION):
    return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)


@jit
def _add_product(total, p, x, tensor, PRECISION):
    """total + p @ x; p in the dtype that tensor has in memory: interpreted, x is wider."""
    p = p.to(tensor[0].dtype.element_ty).to(x.dtype)
    return tl.dot(p, x, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def _forward_kernel(tensors, statistics, work, scale, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION):
    query, key, value, output = tensors
    tile, place, first, rows, inside, bounds = _program(work, ROWS)
    q = _load(query, place, 0, rows, inside, DIM, DOT)

    scale *= 1.4426950408889634  # 1 / ln 2, for powers of two
    highest = tl.full([ROWS], -1e30, ACC)  # finite: inf - inf is nan
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
                p, v = _mask_bad(p, visible, v)

            shrink = tl.exp2(highest - higher)
            highest = higher
            total = total * shrink + tl.sum(p, 1)
            out = _add_product(out * shrink[:, None], p, v, value, PRECISION)

    total = tl.where(total == 0, 1, total)  # rows beyond the tile
    _store(output, out / total[:, None], place, rows, inside, DIM)
    tl.store(statistics[0] + first + rows, highest + tl.log2(total), inside)


@jit
def _score_gradient(q, k, do, v, scale, logsumexp, delta, PRECISION):
    """Probabilities and score gradients, (queries, keys).

    Given k, q, v, do in place of q, k, do, v: their transposes.
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

    # delta is the sum of p dp over a row's columns, for the next kernel too
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
                k = _replace_bad(k)
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
                p, do = _mask_bad(p, visible, do)
                ds = tl.where(visible, ds, 0)
                q = _replace_bad(q)

            dv = _add_product(dv, p, do, output_gradient, PRECISION)
            dk = _add_product(dk, ds, q, query, PRECISION)

    _store(key_gradient, dk * scale, place, rows, inside, DIM)
    _store(value_gradient, dv, place, rows, inside, DIM)


# ---- the launch

# {(major architecture, bytes of an element): {up to this head_dim: (rows of a tile, columns of a
# full step, warps, stages) of forward, dQ, dK/dV}}. Chosen by what they compile to, never run
# (`tests/benchmark.py kernels`); other architectures take those of 8.
TILES = {
    (8, 2): {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        128: ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (9, 2): {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    },
    (10, 2): {
        64: ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
        256: ((64, 32, 8, 2),) * 3,
    },
    (8, 4): {
        64: ((32, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 2),) * 3,
        256: ((16, 16, 8, 2),) * 3,
    },
}
LONG_BLOCK = 512  # from here on 8 warps take 128 rows where 4 took 64: half as many loads
FORWARD, DQ, DKV = range(3)


def _constants(which, head_dim, dtype, architecture, longest):
    """Compile-time arguments of a kernel on a major architecture; None: interpreted."""
    table = TILES.get((architecture, dtype.itemsize), TILES[8, min(dtype.itemsize, 4)])
    limit = min(limit for limit in table if head_dim <= limit)
    rows, columns, warps, stages = table[limit][which]
    if longest >= LONG_BLOCK and head_dim > 32 and (rows, warps) == (64, 4):
        rows, warps = 128, 8

    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    operand = accumulator
    if architecture:  # else numpy interprets, which has no bfloat16
        operand = getattr(tl, str(dtype).removeprefix("torch."))
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

    sizes = dict(DIM=head_dim, ROWS=rows, COLUMNS=columns)
    types = dict(DOT=operand, ACC=accumulator, PRECISION=precision)
    options = dict(num_warps=warps, num_stages=stages)
    return {name: tl.constexpr(x) for name, x in (sizes | types).items()} | options


def _launch(which, tensors, statistics, block_lengths, is_causal, scale):
    """Run a kernel for every tile of every head."""
    kernel = (_forward_kernel, _dq_kernel, _dkv_kernel)[which]
    query = tensors[0]
    batch, heads, tokens, head_dim = query.shape
    if batch * heads == 0:
        return

    architecture = None if INTERPRETED else torch.cuda.get_device_capability(query.device)[0]
    constants = _constants(which, head_dim, query.dtype, architecture, max(block_lengths))
    tile = (constants["ROWS"].value, constants["COLUMNS"].value)
    tiles, bounds = tile_table(tuple(block_lengths), is_causal, which == DKV, *tile, query.device)

    # strides in bytes: Triton loads 16 bytes at once only where it sees that 16 divides a stride;
    # it divides 144 bytes, but not the 72 elements that are the same stride
    tensors = tuple((x, *(n * x.itemsize for n in x.stride()[:3]), x.stride(3)) for x in tensors)
    work = (tiles, bounds, len(tiles), heads, tokens)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        kernel[(len(tiles) * batch * heads,)](tensors, statistics, work, scale, **constants)


# ---- the operators

LIBRARY = __name__.replace(".", "_")  # copies of this file in two packages do not clash


def _empty(query):
    return torch.empty_permuted(query.shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


@torch.library.custom_op(f"{LIBRARY}::forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 logarithm of each row's sum of exponentials."""
    output, logsumexp = _new_outputs(query)
    tensors = (query, key, value, output)
    _launch(FORWARD, tensors, (logsumexp,), lengths, is_causal, scale)
    return output, logsumexp


@_forward.register_fake
def _new_outputs(query, *_):
    """Allocates what the operator returns; under torch.compile it stands in for it."""
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
    """The arguments, cast as autocast says, the lengths a tuple. ValueError where they are bad."""
    for name, x in dict(query=query, key=key, value=value).items():
        if not torch.is_tensor(x):
            raise ValueError(f"{name} is {type(x).__name__}, expected a tensor")

    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = query, key, value
        query, key, value = (x.to(dtype) if x.dtype in DTYPES[:3] else x for x in tensors)

    shape = tuple(query.shape)
    if len(shape) != 4 or shape[2] == 0:
        raise ValueError(f"query has shape {shape}, expected (batch, heads, tokens > 0, head_dim)")
    tokens, head_dim = shape[2:]
    if query.dtype not in DTYPES:
        raise ValueError(f"query is {query.dtype}, expected one of {DTYPES}")
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"query has head_dim {head_dim}, expected a multiple of 8 from 16 to 256")
    expected = (shape, query.dtype, query.device)
    for name, x in dict(key=key, value=value).items():
        given = (tuple(x.shape), x.dtype, x.device)
        if given != expected:
            raise ValueError(f"{name} is {given}, expected that of query, {expected}")

    fits = isinstance(block_lengths, Sequence)
    fits = fits and all(isinstance(n, int) and n > 0 for n in block_lengths)
    if not fits or sum(block_lengths) != tokens:
        expected = f"positive ints that sum to the {tokens} tokens"
        raise ValueError(f"block_lengths is {block_lengths!r}, expected {expected}")

    scale = head_dim**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float)) or not 0 < scale < torch.inf:
        raise ValueError(f"scale is {scale!r}, expected a positive number")
    return query, key, value, tuple(block_lengths), float(scale)
