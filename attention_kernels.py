"""Attention over a sequence of blocks, such as the scales of an image, without an L x L mask.

`block_sparse_attention` is the function to call. Around it, in this order:

- `dense_masked_attention` computes the same with an explicit mask and defines what is correct.
- The PyTorch path calls torch's own attention for each block. It runs on every device.
- Three Triton kernels for NVIDIA GPUs (forward; dQ; dK and dV) take all blocks in one launch. They
  compute the softmax in a streaming fashion, as FlashAttention-2 does (Dao 2023, arXiv 2307.08691,
  algorithms 1 and 2).

The tests compile the kernels and run them in Triton's interpreter; no GPU has run them yet. So
before a process uses them for a GPU, dtype and head_dim, they are compared with dense attention on
a small case. If they differ, a warning says so and PyTorch computes (`_kernels_agree`).

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

# With TRITON_INTERPRET=1 the kernels run in numpy, on any device. Tests set this.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def dense_masked_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """The reference for `block_sparse_attention`: the same arguments, result and errors."""
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, block_lengths)
    scale = _scale(query, scale)

    # the block to which each token belongs
    block = torch.repeat_interleave(torch.tensor(block_lengths, device=query.device))  # (tokens,)
    sees = torch.ge if is_causal else torch.eq
    visible = sees(block[:, None], block)  # (tokens, tokens)

    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def block_sparse_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """Softmax attention in which a token sees its own block and, if is_causal, all earlier blocks.

    query, key, value: (batch, heads, tokens, head_dim) of one dtype, on one device, with any
        strides. Under autocast they are cast first.
    block_lengths: the number of tokens of each block, positive integers that sum to tokens.
    scale: the factor on the scores; head_dim ** -0.5 if None.

    Returns (batch, heads, tokens, head_dim), stored as (batch, tokens, heads, head_dim), so that
    joining the heads needs no copy. Gradients of the first order are supported. ValueError if the
    shapes, dtypes or lengths do not fit.

    Call it once before capturing a CUDA graph: the first call on a GPU copies to and from it.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, block_lengths)
    block_lengths, scale = tuple(block_lengths), _scale(query, scale)

    if _use_kernels(query, block_lengths):
        return _forward(query, key, value, block_lengths, bool(is_causal), scale)[0]
    if _use_varlen(query, block_lengths, is_causal):
        return _variable_length(query, key, value, block_lengths, scale)
    return _block_by_block(query, key, value, block_lengths, is_causal, scale)


def _use_kernels(query, block_lengths):
    """Whether the Triton kernels compute this call."""
    # looked up, because the check needs a plain number, and torch.compile may have a symbol
    head_dim = next((n for n in range(16, 257, 8) if n == query.shape[-1]), None)
    if head_dim is None:
        return False

    # TILES has no sizes for AMD GPUs; a single block is plain attention, which torch computes
    has_kernels = triton is not None and torch.version.hip is None
    is_sparse = len(block_lengths) > 1
    on_gpu = query.is_cuda and query.dtype != torch.float64
    if not INTERPRETED and not (has_kernels and is_sparse and on_gpu):
        return False

    # fake tensors, with which tools follow shapes, have no numbers to compare
    is_fake = type(query) not in (Tensor, torch.nn.Parameter)
    return is_fake or _kernels_agree(query.device, query.dtype, head_dim)


# ---- the PyTorch path


def _block_by_block(query, key, value, block_lengths, is_causal, scale):
    """One call of attention for each block."""
    # (batch, tokens, heads, head_dim), the layout of the result: joining blocks copies whole rows
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    queries = query.split(block_lengths, dim=1)
    keys, values = (_visible_tokens(x, block_lengths, is_causal) for x in (key, value))

    outputs = []
    for block in zip(queries, keys, values, strict=True):
        q, k, v = (x.transpose(1, 2) for x in block)  # (batch, heads, tokens, head_dim)
        outputs.append(_attention(q, k, v, scale).transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _visible_tokens(x, block_lengths, is_causal):
    """For each block, the part of x (batch, tokens, ...) that it sees."""
    if not is_causal:
        return x.split(block_lengths, dim=1)

    # Each prefix is cut from the next longer one. Cut from x, every gradient would be as long as x.
    prefixes = [x]
    for length in reversed(block_lengths[1:]):
        prefixes.append(prefixes[-1][:, :-length])
    return prefixes[::-1]


def _attention(q, k, v, scale):
    """Attention without a mask: q, k, v and the result are (batch, heads, tokens, head_dim)."""
    if _fused_is_slow(q, k, v):
        scores = (q * scale) @ k.mT
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _fused_is_slow(q, k, v):
    """Whether two plain matrix products are faster than torch's fused attention on this CPU.

    Measured for dtypes of 2 bytes, on processors with and without AMX (Intel's matrix units): so it
    is for short blocks, where gradients are wanted or AMX is missing.
    """
    if not q.is_cpu or q.element_size() != 2:
        return False
    keys = k.shape[2]
    score_count = q.shape[:3].numel() * keys  # batch x heads x queries x keys
    is_short = keys <= 700 and score_count <= 2**27
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return is_short and (gradients or not torch.cpu._is_amx_tile_supported())


def _use_varlen(query, block_lengths, is_causal):
    """Whether torch's FlashAttention can take all blocks in one call: own blocks only, 2 bytes."""
    head_dim = query.shape[-1]
    is_nvidia = query.is_cuda and torch.version.hip is None
    fits = query.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256
    is_sparse = len(block_lengths) > 1 and not is_causal  # keys that are a prefix are not possible
    return is_nvidia and fits and is_sparse and _has_flash_attention(query.device)


@torch.compiler.assume_constant_result
def _has_flash_attention(device):
    """Whether torch was built with FlashAttention and the GPU, Ampere or later, can run it."""
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and torch.cuda.get_device_capability(device) >= (8, 0)


def _variable_length(query, key, value, block_lengths, scale):
    """One call for all blocks, as if each were a short sequence of its own in a long batch."""
    from torch.nn.attention import varlen  # needs more than a second, and is used on GPUs only

    batch, _, tokens, _ = query.shape
    ends = torch.tensor([*itertools.accumulate(block_lengths)], dtype=torch.int32)
    ends = ends + tokens * torch.arange(batch, dtype=torch.int32)[:, None]  # (batch, blocks)
    edges = F.pad(ends.flatten(), (1, 0)).to(query.device, non_blocking=True)
    longest = max(block_lengths)

    # (batch * tokens, heads, head_dim), a view of a qkv; FlashAttention reads contiguous features
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    packed = [x if x.stride(-1) == 1 else x.contiguous() for x in packed]
    output = varlen.varlen_attn(*packed, edges, edges, longest, longest, scale=scale)
    return output.unflatten(0, (batch, tokens)).transpose(1, 2)


# ---- the kernels
#
# A program owns a tile of rows of one head and walks over the columns that its rows see. In the
# forward and dQ kernels rows are queries and columns are keys; in the dK/dV kernel rows are keys
# and columns are queries. The rows of a tile lie in one block, or in several tiny ones. A walk has
# full steps, whose columns are seen by all rows, and steps with a mask. Rows from top to bottom,
# columns that they see as #, with full steps of 4 columns:
#
#     a tile in a block of 9     a tile of two blocks, 1 and 4, causal
#     #### #### #                #
#     #### #### #                #####
#     #### #### #                #####
#     full full mask             mask (no full step is seen by all rows)
#
# A step with a mask is half as wide, because less of it is seen, but has at least the 16 columns
# that tl.dot needs. A kernel's arguments, made by `_launch`, are
#
#     query, ...        each a tuple: pointer; strides of batch, head, token, feature in elements
#     logsumexp, delta  pointers to (batch, heads, tokens)
#     table             a tuple: tiles, bounds (of `tile_table`), number of tiles; heads, tokens
#     scale             the factor on the scores
#     DIM               head_dim
#     ROWS, COLUMNS     rows of a tile, columns of a full step
#     DOT, ACC          dtypes of the operands of tl.dot, and of sums
#     PRECISION         that of products in fp32


@functools.lru_cache(maxsize=256)
def tile_table(block_lengths, is_causal, transposed, rows, columns, device="cpu"):
    """The tiles that the kernels walk over, of queries or (transposed) of keys: two int32 tensors.

    tiles (count, 6), the longest walk first: start and stop of the rows; start and stop of the
        columns of full steps; start and stop of the columns that need a mask.
    bounds (2, tokens): the first column that a row sees, and the first one after those it sees.
    """
    edges = [0, *itertools.accumulate(block_lengths)]
    count = len(block_lengths)

    # rows of block i see columns low[i] to high[i] - 1: those of their block, and if causal,
    low, high = edges[:-1], edges[1:]
    if is_causal and transposed:  # keys are seen by all later queries
        high = edges[-1:] * count
    elif is_causal:  # queries see all earlier keys
        low = [0] * count

    tiles = []
    first = 0
    while first < count:
        # the tile has the blocks first to last, more than one if they are tiny
        last = first
        while last + 1 < count and edges[last + 2] - edges[first] <= rows:
            last += 1

        # The walk. low and high only grow from block to block, so all rows see columns low[last] to
        # high[first]. Causal queries have one low, so these columns start the walk; causal keys
        # have one high, so they end it.
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
LOG2E = tl.constexpr(1.4426950408889634) if triton else None  # exp(x) is exp2(x * LOG2E)


@jit
def _program(table, ROWS):
    """What the current program works on: (tile, head, offset, rows, row_exists, bounds).

    tile: pointer to its line of the table. head: (batch entry, head). offset: of this head in
    logsumexp and delta. rows: ROWS token numbers; row_exists: those that belong to the tile.
    bounds: (low, high); each row sees columns low to high - 1.
    """
    tiles, bounds, tile_count, heads, tokens = table
    program = tl.program_id(0)  # a head's tiles run side by side and find its keys in the cache
    tile = tiles + program % tile_count * 6
    index = (program // tile_count).to(tl.int64)  # of the head, counted over the batch

    rows = tl.load(tile) + tl.arange(0, ROWS)
    row_exists = rows < tl.load(tile + 1)
    low = tl.load(bounds + rows, row_exists, 0)
    high = tl.load(bounds + tokens + rows, row_exists, 0)
    return tile, (index // heads, index % heads), index * tokens, rows, row_exists, (low, high)


@jit
def _walk(tile, MASKED, COLUMNS):
    """Start and stop of the steps without or with a mask, and the column offsets of one step."""
    STEP: tl.constexpr = COLUMNS // 2 if MASKED and COLUMNS > 16 else COLUMNS
    # a line of the table is (rows, columns of full steps, columns with a mask), two ints each
    columns = tile + 2 + 2 * MASKED
    return tl.load(columns), tl.load(columns + 1), tl.arange(0, STEP)


@jit
def _pointers(tensor, head, start, rows, DIM):
    """Pointers (rows, features) to tokens start + rows of a head, and which features exist.

    Their number is DIM rounded up to a power of two, because tl.arange needs one.
    """
    base, batch_stride, head_stride, token_stride, feature_stride = tensor
    base += head[0] * batch_stride + head[1] * head_stride
    base += tl.cast(start, tl.int64) * token_stride
    features = tl.arange(0, triton.next_power_of_2(DIM))
    offsets = rows.to(tl.int64)[:, None] * token_stride + features.to(tl.int64) * feature_stride
    return base + offsets, (features < DIM)[None, :]


@jit
def _load(tensor, head, start, rows, row_exists, DIM, DOT, CHECK_ROWS=True):
    """Tokens start + rows of a head, (rows, features): zero where a row or feature is missing."""
    pointers, exists = _pointers(tensor, head, start, rows, DIM)
    if CHECK_ROWS:
        exists = row_exists[:, None] & exists
    return tl.load(pointers, exists, 0).to(DOT)


@jit
def _store(tensor, x, head, rows, row_exists, DIM):
    pointers, feature_exists = _pointers(tensor, head, 0, rows, DIM)
    tl.store(pointers, x, row_exists[:, None] & feature_exists)


@jit
def _visible(bounds, column):
    low, high = bounds
    return (low[:, None] <= column[None, :]) & (column[None, :] < high[:, None])  # (rows, columns)


@jit
def _products(a, b, ACC, PRECISION):
    """The product of each row of a with each row of b."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)


@jit
def _add_product(total, p, x, tensor, PRECISION):
    """total + p @ x, with p rounded to the dtype of tensor, from which x was loaded.

    On a GPU that is the dtype of x too; the interpreter loads it as a wider one.
    """
    p = p.to(tensor[0].dtype.element_ty).to(x.dtype)
    return tl.dot(p, x, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def _forward_kernel(
    query, key, value, output, logsumexp, table, scale, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION
):
    tile, head, offset, rows, row_exists, bounds = _program(table, ROWS)
    q = _load(query, head, 0, rows, row_exists, DIM, DOT)

    scale *= LOG2E
    highest = tl.full([ROWS], -1e30, ACC)  # finite, because inf - inf is nan
    total = tl.zeros([ROWS], ACC)
    out = tl.zeros(q.shape, ACC)

    for masked in tl.static_range(2):  # full steps, then steps with a mask
        start, stop, columns = _walk(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            column_exists = column < stop
            k = _load(key, head, step, columns, column_exists, DIM, DOT, masked)
            v = _load(value, head, step, columns, column_exists, DIM, DOT, masked)

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

    total = tl.where(total == 0, 1, total)  # of rows that do not exist
    _store(output, out / total[:, None], head, rows, row_exists, DIM)
    tl.store(logsumexp + offset + rows, highest + tl.log2(total), row_exists)


@jit
def _dq_kernel(
    query,
    key,
    value,
    output,
    output_gradient,
    query_gradient,
    logsumexp,
    delta,
    table,
    scale,
    DIM,
    ROWS,
    COLUMNS,
    DOT,
    ACC,
    PRECISION,
):
    tile, head, offset, rows, row_exists, bounds = _program(table, ROWS)
    q = _load(query, head, 0, rows, row_exists, DIM, DOT)
    out = _load(output, head, 0, rows, row_exists, DIM, DOT)
    do = _load(output_gradient, head, 0, rows, row_exists, DIM, DOT)

    # delta, the sum of p dp over a row's columns, is stored for the next kernel
    row_delta = tl.sum(out.to(ACC) * do.to(ACC), 1)[:, None]
    tl.store(delta + offset + rows[:, None], row_delta, row_exists[:, None])
    row_logsumexp = tl.load(logsumexp + offset + rows, row_exists, 0)[:, None]
    dq = tl.zeros(q.shape, ACC)

    for masked in tl.static_range(2):
        start, stop, columns = _walk(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            column_exists = column < stop
            k = _load(key, head, step, columns, column_exists, DIM, DOT, masked)
            v = _load(value, head, step, columns, column_exists, DIM, DOT, masked)

            # (rows, columns): probabilities, and the gradients of the scores
            p = tl.exp2(_products(q, k, ACC, PRECISION) * (scale * LOG2E) - row_logsumexp)
            ds = p * (_products(do, v, ACC, PRECISION) - row_delta)
            if masked:
                ds = tl.where(_visible(bounds, column), ds, 0)
            dq = _add_product(dq, ds, k, key, PRECISION)

    _store(query_gradient, dq * scale, head, rows, row_exists, DIM)


@jit
def _dkv_kernel(
    query,
    key,
    value,
    output_gradient,
    key_gradient,
    value_gradient,
    logsumexp,
    delta,
    table,
    scale,
    DIM,
    ROWS,
    COLUMNS,
    DOT,
    ACC,
    PRECISION,
):
    # rows are keys here and columns are queries
    tile, head, offset, rows, row_exists, bounds = _program(table, ROWS)
    k = _load(key, head, 0, rows, row_exists, DIM, DOT)
    v = _load(value, head, 0, rows, row_exists, DIM, DOT)
    dk = tl.zeros(k.shape, ACC)
    dv = tl.zeros(v.shape, ACC)

    for masked in tl.static_range(2):
        start, stop, columns = _walk(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            column = step + columns
            column_exists = column < stop
            q = _load(query, head, step, columns, column_exists, DIM, DOT, masked)
            do = _load(output_gradient, head, step, columns, column_exists, DIM, DOT, masked)
            column_logsumexp = tl.load(logsumexp + offset + column, column_exists, 0)[None, :]
            column_delta = tl.load(delta + offset + column, column_exists, 0)[None, :]

            # (rows, columns): probabilities, and the gradients of the scores
            p = tl.exp2(_products(k, q, ACC, PRECISION) * (scale * LOG2E) - column_logsumexp)
            ds = p * (_products(v, do, ACC, PRECISION) - column_delta)
            if masked:
                visible = _visible(bounds, column)
                p = tl.where(visible, p, 0)
                ds = tl.where(visible, ds, 0)

            dv = _add_product(dv, p, do, output_gradient, PRECISION)
            dk = _add_product(dk, ds, q, query, PRECISION)

    _store(key_gradient, dk * scale, head, rows, row_exists, DIM)
    _store(value_gradient, dv, head, rows, row_exists, DIM)


# ---- the launch, and the operators that torch's autograd and compiler see

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


def _tile_sizes(query):
    """The entries of TILES for the forward, dQ and dK/dV kernels."""
    table = TILES[min(query.dtype.itemsize, 4)]
    return table[min(limit for limit in table if query.shape[-1] <= limit)]


def _launch(kernel, tile, tensors, statistics, pattern, transposed=False):
    """Runs a kernel for every tile of every head.

    tile: an entry of `_tile_sizes`. tensors: query, ..., statistics: logsumexp and delta, as the
    kernel takes them. pattern: block lengths, is_causal, scale. transposed: rows are keys.
    """
    query = tensors[0]
    batch, heads, tokens, head_dim = query.shape
    if batch * heads == 0:
        return

    rows, columns, warps, stages = tile
    lengths, is_causal, scale = pattern
    table = tile_table(tuple(lengths), is_causal, transposed, rows, columns, query.device)
    count = len(table[0])

    arguments = [(x, *x.stride()) for x in tensors]
    arguments += [*statistics, (*table, count, heads, tokens), scale]
    constants = dict(DIM=head_dim, ROWS=rows, COLUMNS=columns) | _dtypes(query.dtype)
    constants = {name: tl.constexpr(x) for name, x in constants.items()}
    with torch.cuda.device_of(query):  # Triton launches on the current device
        launch = kernel[(count * batch * heads,)]
        launch(*arguments, **constants, num_warps=warps, num_stages=stages)


def _dtypes(dtype):
    """DOT, ACC and PRECISION for tensors of a dtype."""
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    operand = getattr(tl, str(dtype).removeprefix("torch."))
    if INTERPRETED:  # numpy has no bfloat16
        operand = accumulator
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return dict(DOT=operand, ACC=accumulator, PRECISION=precision)


LIBRARY = __name__.replace(".", "_")  # so that copies of this file in two packages do not clash


def _empty(query):
    """Not initialised, of query's shape, stored as (batch, tokens, heads, head_dim)."""
    return torch.empty_permuted(query.shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


def _empty_outputs(query):
    """The output, and logsumexp (batch, heads, tokens) in at least fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return _empty(query), query.new_empty(query.shape[:-1], dtype=dtype)


@torch.library.custom_op(f"{LIBRARY}::forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 logarithm of the sum of exponentials of each row."""
    output, logsumexp = _empty_outputs(query)
    tile, _, _ = _tile_sizes(query)
    tensors = (query, key, value, output)
    _launch(_forward_kernel, tile, tensors, (logsumexp,), (lengths, is_causal, scale))
    return output, logsumexp


@torch.library.custom_op(f"{LIBRARY}::backward", mutates_args=())
def _backward(
    saved: Sequence[Tensor], gradient: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> list[Tensor]:
    """The gradients of query, key and value. saved: these, the output and logsumexp."""
    query, key, value, output, logsumexp = saved
    dq, dk, dv = _empty(query), _empty(query), _empty(query)
    statistics = (logsumexp, torch.empty_like(logsumexp))
    pattern = (lengths, is_causal, scale)
    _, dq_tile, dkv_tile = _tile_sizes(query)
    tensors = (query, key, value, output, gradient, dq)
    _launch(_dq_kernel, dq_tile, tensors, statistics, pattern)
    tensors = (query, key, value, gradient, dk, dv)
    _launch(_dkv_kernel, dkv_tile, tensors, statistics, pattern, transposed=True)
    return [dq, dk, dv]


def _save(ctx, inputs, output):
    ctx.pattern = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(ctx, output_gradient, _):
    saved = list(ctx.saved_tensors)
    return *_backward(saved, output_gradient, *ctx.pattern), None, None, None


# under torch.compile these stand in for the operators
_forward.register_fake(lambda query, *_: _empty_outputs(query))
_backward.register_fake(lambda saved, *_: [_empty(saved[0]) for _ in range(3)])
_forward.register_autograd(_gradients, setup_context=_save)


# ---- what follows only checks: the kernels, then the arguments


@torch.compiler.assume_constant_result  # torch.compile calls it and keeps the verdict
def _kernels_agree(device, dtype, head_dim):
    return _compare_kernels(device, dtype, head_dim)


@functools.cache
def _compare_kernels(device, dtype, head_dim):
    """Whether the kernels compute what dense attention does, on a small case; warns if not.

    Computed once in a process for each device, dtype and head_dim. Blocks share a tile or fill
    several; every kernel takes several steps; the inputs are views of one qkv.
    """
    lengths, scale = (1, 4, 9, 300), head_dim**-0.5
    shape = 2, sum(lengths), 4, 3, head_dim  # batch, tokens, (query, key, value, dO), heads
    no_autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            generator = torch.Generator().manual_seed(0)
            tensors = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
            tensors = tensors.permute(2, 0, 3, 1, 4)
            for is_causal in (False, True):
                pattern = lengths, is_causal, scale
                ours = _output_and_gradients(_forward, tensors, pattern)
                dense = _output_and_gradients(dense_masked_attention, tensors, pattern)
                exact = _output_and_gradients(dense_masked_attention, tensors.double(), pattern)
                allowed = _allowed_errors(tensors, scale, dense, exact)
                names = "output", "dQ", "dK", "dV"
                for name, result, truth, limit in zip(names, ours, exact, allowed, strict=True):
                    error = (result - truth).abs().max()
                    if not error <= limit:  # nan is an error too
                        raise ArithmeticError(f"{name} is wrong by {error:.1e}, limit {limit:.1e}")
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise errors of many kinds
        case = f"{device}, {dtype}, head_dim {head_dim}: {type(error).__name__}: {error}"
        words = "Triton kernels fail their check and are not used, so training is slower:"
        warnings.warn(f"{words} {case}", RuntimeWarning, stacklevel=5)
        return False
    return True


def _output_and_gradients(attention, tensors, pattern):
    """[output, dQ, dK, dV] of attention(query, key, value, *pattern).

    tensors: query, key, value and the gradient of the output.
    """
    *qkv, output_gradient = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
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


def _autocast(*tensors):
    """The tensors, cast as autocast wants them where it is enabled."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def _scale(query, scale):
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def _check(query, key, value, block_lengths):
    """ValueError where a kernel would read beyond the tensors or compute something else."""
    expected = (query.shape, query.dtype, query.device)
    for name, x in dict(key=key, value=value).items():
        found = (x.shape, x.dtype, x.device)
        if found != expected:
            raise ValueError(f"{name} is {found}, expected that of query, {expected}")

    if query.ndim != 4:
        shape = tuple(query.shape)
        raise ValueError(f"query has shape {shape}, expected (batch, heads, tokens, head_dim)")
    tokens = query.shape[2]
    if min(block_lengths, default=0) < 1 or sum(block_lengths) != tokens:
        expected = f"positive integers that sum to the {tokens} tokens"
        raise ValueError(f"block_lengths is {block_lengths}, expected {expected}")
