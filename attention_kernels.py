"""Attention over a sequence of blocks, such as the scales of an image, without an L x L mask.

`block_sparse_attention` is the function to call. Around it, in this order:

- `dense_masked_attention` computes the same with an explicit mask and defines what is correct.
- The PyTorch path calls torch's own attention for each block. It runs on every device.
- Two Triton kernels for NVIDIA GPUs take all blocks in one launch: forward, and backward, which is
  launched for dQ and again for dK and dV. They compute the softmax in a streaming fashion, as
  FlashAttention-2 does (Dao 2023, arXiv 2307.08691, algorithms 1 and 2).

The tests compile the kernels and run them in Triton's interpreter; no GPU has run them yet. So
before a process uses them for a GPU, dtype and head_dim, they are compared with dense attention on
a small case. If they differ, a warning says so and PyTorch computes (`_kernels_agree`).

    >>> query, key, value = torch.randn(3, 2, 4, 14, 32)
    >>> block_sparse_attention(query, key, value, block_lengths=(1, 4, 9)).shape
    torch.Size([2, 4, 14, 32])
"""

import functools
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
    scale = query.shape[-1] ** -0.5 if scale is None else scale

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
    block_lengths = tuple(block_lengths)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)

    if _use_kernels(query, block_lengths):
        return _forward(query, key, value, block_lengths, bool(is_causal), scale)[0]
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
    """Attention without a mask: q, k, v and the result are (batch, heads, tokens, head_dim).

    On a CPU, in dtypes of 2 bytes, plain matrix products are faster than torch's fused attention
    for short blocks, if gradients are wanted or AMX (Intel's matrix units) is missing. This was
    measured on processors with and without it.
    """
    is_half = q.is_cpu and q.element_size() == 2
    score_count = q.shape[:3].numel() * k.shape[2]  # batch x heads x queries x keys
    is_short = k.shape[2] <= 700 and score_count <= 2**27
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_half and is_short and (gradients or not torch.cpu._is_amx_tile_supported()):
        scores = (q * scale) @ k.mT
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


# ---- the kernels
#
# A program computes a tile: some rows of the score matrix of one head. Rows are queries and columns
# are keys; for dK and dV the matrix is transposed. The rows of a tile lie in one block, so they all
# see the same columns. The program walks over these in full steps, and over what is left in steps
# of half that width with a mask. `_launch` makes the kernels' arguments:
#
#     tensors           a tuple; each is a tuple: pointer; strides of batch, head, token, feature
#     logsumexp, delta  pointers to (batch, heads, tokens)
#     table             a tuple: pointer to a `tile_table`, number of tiles; heads, tokens
#     scale             the factor on the scores
#     TRANSPOSED        whether rows are keys
#     DIM               head_dim
#     ROWS, COLUMNS     rows of a tile, columns of a full step
#     DOT, ACC          dtypes of the operands of tl.dot, and of sums
#     PRECISION         that of products in fp32


@functools.lru_cache(maxsize=256)
def tile_table(block_lengths, is_causal, transposed, rows, columns, device="cpu"):
    """The tiles that the kernels compute, of queries or (transposed) of keys: (count, 5) int32.

    Each is start and stop of at most `rows` rows; then start, middle and stop of the columns that
    they see, where steps of `columns` end in the middle. The longest walks come first.
    """
    tokens = sum(block_lengths)
    tiles = []
    start = 0
    for length in block_lengths:
        stop = start + length
        low = 0 if is_causal and not transposed else start  # queries see all earlier keys
        high = tokens if is_causal and transposed else stop  # keys are seen by all later queries
        middle = high - (high - low) % columns
        for row in range(start, stop, rows):
            tiles.append((row, min(row + rows, stop), low, middle, high))
        start = stop

    tiles.sort(key=lambda tile: tile[4] - tile[2], reverse=True)
    return torch.tensor(tiles, dtype=torch.int32, device=device)


jit = triton.jit if triton else lambda function: function
if triton:
    LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E)
    LOWEST = tl.constexpr(-1e30)  # finite, because inf - inf is nan


@jit
def _program(table, ROWS):
    """What the current program works on: (tile, head, offset, rows, row_exists).

    tile: pointer to its line of the table. head: (batch entry, head). offset: of this head in
    logsumexp and delta. rows: ROWS token numbers; row_exists: those that belong to the tile.
    """
    tiles, tile_count, heads, tokens = table
    program = tl.program_id(0)  # a head's tiles run side by side and find its keys in the cache
    tile = tiles + program % tile_count * 5
    batch_head = (program // tile_count).to(tl.int64)
    head = (batch_head // heads, batch_head % heads)

    rows = tl.load(tile) + tl.arange(0, ROWS)
    row_exists = rows < tl.load(tile + 1)
    return tile, head, batch_head * tokens, rows, row_exists


@jit
def _walk(tile, MASKED, COLUMNS):
    """Start and stop of the steps without or with a mask, and the column offsets of one step."""
    STEP: tl.constexpr = COLUMNS // 2 if MASKED and COLUMNS > 16 else COLUMNS  # tl.dot needs 16
    return tl.load(tile + 2 + MASKED), tl.load(tile + 3 + MASKED), tl.arange(0, STEP)


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
    tensors, logsumexp, delta, table, scale, TRANSPOSED, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION
):
    """The output of a tile, and the logarithm of its sums of exponentials. No delta is read."""
    query, key, value, output = tensors
    tile, head, offset, rows, row_exists = _program(table, ROWS)
    q = _load(query, head, 0, rows, row_exists, DIM, DOT)

    scale *= LOG2E
    highest = tl.full([ROWS], LOWEST, ACC)
    total = tl.zeros([ROWS], ACC)
    out = tl.zeros(q.shape, ACC)

    for masked in tl.static_range(2):  # full steps, then steps with a mask
        start, stop, columns = _walk(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            exists = step + columns < stop
            k = _load(key, head, step, columns, exists, DIM, DOT, masked)
            v = _load(value, head, step, columns, exists, DIM, DOT, masked)

            scores = _products(q, k, ACC, PRECISION)  # (rows, columns)
            if masked:
                scores = tl.where(exists[None, :], scores, LOWEST)

            higher = tl.maximum(highest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])
            if masked:
                p = tl.where(exists[None, :], p, 0)

            shrink = tl.exp2(highest - higher)
            highest = higher
            total = total * shrink + tl.sum(p, 1)
            out = _add_product(out * shrink[:, None], p, v, value, PRECISION)

    _store(output, out / total[:, None], head, rows, row_exists, DIM)
    tl.store(logsumexp + offset + rows, highest + tl.log2(total), row_exists)


@jit
def _backward_kernel(
    tensors, logsumexp, delta, table, scale, TRANSPOSED, DIM, ROWS, COLUMNS, DOT, ACC, PRECISION
):
    """dQ of a tile of queries, or dK and dV of a tile of keys.

    For a query and a key, p is the probability that attention gives the key, and
    ds = p (dO V - delta) the gradient of their score. Then dQ = sum ds K over the keys,
    dK = sum ds Q and dV = sum p dO over the queries. So both are one loop, in which rows are loaded
    once, as (a, b), and columns in each step, as (c, d):

        rows     (a, b)    (c, d)    tensors
        queries  (Q, dO)   (K, V)    Q, dO, K, V, dQ and the output, from which delta is computed
        keys     (K, V)    (Q, dO)   K, V, Q, dO, dK, dV

    delta, which is dO times the output, is stored by the first launch and read by the second.
    """
    a_tensor, b_tensor, c_tensor, d_tensor, a_gradient, b_gradient = tensors
    tile, head, offset, rows, row_exists = _program(table, ROWS)
    a = _load(a_tensor, head, 0, rows, row_exists, DIM, DOT)
    b = _load(b_tensor, head, 0, rows, row_exists, DIM, DOT)
    da = tl.zeros(a.shape, ACC)
    db = tl.zeros(a.shape, ACC)

    if not TRANSPOSED:
        out = _load(b_gradient, head, 0, rows, row_exists, DIM, DOT)
        query_delta = tl.sum(out.to(ACC) * b.to(ACC), 1)[:, None]
        tl.store(delta + offset + rows[:, None], query_delta, row_exists[:, None])
        query_logsumexp = tl.load(logsumexp + offset + rows, row_exists, 0)[:, None]

    for masked in tl.static_range(2):
        start, stop, columns = _walk(tile, masked, COLUMNS)
        for step in tl.range(start, stop, columns.shape[0]):
            exists = step + columns < stop
            c = _load(c_tensor, head, step, columns, exists, DIM, DOT, masked)
            d = _load(d_tensor, head, step, columns, exists, DIM, DOT, masked)
            if TRANSPOSED:
                query_logsumexp = tl.load(logsumexp + offset + step + columns, exists, 0)[None, :]
                query_delta = tl.load(delta + offset + step + columns, exists, 0)[None, :]

            p = tl.exp2(_products(a, c, ACC, PRECISION) * (scale * LOG2E) - query_logsumexp)
            if masked:
                p = tl.where(exists[None, :], p, 0)
            if TRANSPOSED:
                db = _add_product(db, p, d, d_tensor, PRECISION)
            ds = p * (_products(b, d, ACC, PRECISION) - query_delta)
            da = _add_product(da, ds, c, c_tensor, PRECISION)

    _store(a_gradient, da * scale, head, rows, row_exists, DIM)
    if TRANSPOSED:
        _store(b_gradient, db, head, rows, row_exists, DIM)


# ---- the launch, and the operators that torch's autograd and compiler see

# {bytes of an element: {largest head_dim: {what is computed: (rows of a tile, columns of a full
# step, warps, stages)}}}. Chosen so that the kernels compile without register spills for compute
# capabilities 8.0 to 10.0 (`tests/benchmark.py kernels`); not measured on a GPU yet.
TILES = {
    2: {
        64: dict(output=(64, 64, 4, 3), dq=(64, 64, 4, 3), dkv=(64, 32, 8, 2)),
        128: dict(output=(64, 32, 4, 3), dq=(64, 32, 4, 3), dkv=(64, 32, 8, 2)),
        256: dict(output=(64, 32, 8, 2), dq=(32, 32, 8, 2), dkv=(32, 32, 8, 2)),
    },
    4: {
        64: dict(output=(32, 32, 4, 3), dq=(32, 32, 4, 2), dkv=(32, 32, 4, 2)),
        128: dict(output=(32, 32, 8, 2), dq=(32, 32, 8, 2), dkv=(32, 32, 8, 2)),
        256: dict(output=(16, 16, 8, 2), dq=(16, 16, 8, 2), dkv=(16, 16, 8, 2)),
    },
}


def _launch(kernel, result, tensors, logsumexp, delta, lengths, is_causal, scale):
    """Runs a kernel for every tile of every head. result: what is computed, a name in TILES."""
    query = tensors[0]
    batch, heads, tokens, head_dim = query.shape
    if batch * heads == 0:
        return

    sizes = TILES[min(query.dtype.itemsize, 4)]
    limit = min(limit for limit in sizes if head_dim <= limit)
    rows, columns, warps, stages = sizes[limit][result]
    transposed = result == "dkv"
    tiles = tile_table(tuple(lengths), is_causal, transposed, rows, columns, query.device)

    strided = tuple((x, *x.stride()) for x in tensors)
    table = (tiles, len(tiles), heads, tokens)
    constants = dict(TRANSPOSED=transposed, DIM=head_dim, ROWS=rows, COLUMNS=columns)
    constants = {name: tl.constexpr(x) for name, x in (constants | _dtypes(query.dtype)).items()}
    options = dict(num_warps=warps, num_stages=stages)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        launch = kernel[(len(tiles) * batch * heads,)]
        launch(strided, logsumexp, delta, table, scale, **constants, **options)


def _dtypes(dtype):
    """DOT, ACC and PRECISION for tensors of a dtype."""
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    # the interpreter computes with numpy, which has no bfloat16
    operand = accumulator if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))
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
    tensors = (query, key, value, output)
    pattern = (lengths, is_causal, scale)
    _launch(_forward_kernel, "output", tensors, logsumexp, logsumexp, *pattern)
    return output, logsumexp


@torch.library.custom_op(f"{LIBRARY}::backward", mutates_args=())
def _backward(
    saved: Sequence[Tensor], gradient: Tensor, lengths: Sequence[int], is_causal: bool, scale: float
) -> list[Tensor]:
    """The gradients of query, key and value. saved: these, the output and logsumexp."""
    query, key, value, output, logsumexp = saved
    dq, dk, dv = _empty(query), _empty(query), _empty(query)
    delta = torch.empty_like(logsumexp)
    pattern = (lengths, is_causal, scale)
    tensors = (query, gradient, key, value, dq, output)
    _launch(_backward_kernel, "dq", tensors, logsumexp, delta, *pattern)
    tensors = (key, value, query, gradient, dk, dv)
    _launch(_backward_kernel, "dkv", tensors, logsumexp, delta, *pattern)
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

    Computed once in a process for each device, dtype and head_dim. Blocks are smaller than a tile
    or fill several; every kernel takes several steps; the inputs are views of one qkv.
    """
    lengths, scale = (1, 4, 9, 300), head_dim**-0.5
    shape = 2, sum(lengths), 4, 3, head_dim  # batch, tokens, (query, key, value, dO), heads
    limit = 0.02 if dtype.itemsize == 2 else 0.005  # some roundings of 2 bytes, or of TF32
    no_autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            generator = torch.Generator().manual_seed(0)
            tensors = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
            *qkv, gradient = tensors.permute(2, 0, 3, 1, 4)
            for is_causal in (False, True):
                leaves = [x.detach().requires_grad_() for x in qkv]
                output, _ = _forward(*leaves, lengths, is_causal, scale)
                ours = output, *torch.autograd.grad(output, leaves, gradient)

                leaves = [x.detach().double().requires_grad_() for x in qkv]
                output = dense_masked_attention(*leaves, lengths, is_causal, scale)
                exact = output, *torch.autograd.grad(output, leaves, gradient.double())

                torch.testing.assert_close(ours, exact, rtol=limit, atol=limit, check_dtype=False)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise errors of many kinds
        case = f"{device}, {dtype}, head_dim {head_dim}: {type(error).__name__}: {error}"
        words = "Triton kernels fail their check and are not used, so training is slower:"
        warnings.warn(f"{words} {case}", RuntimeWarning, stacklevel=5)
        return False
    return True


def _autocast(*tensors):
    """The tensors, cast as autocast wants them where it is enabled."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def _check(query, key, value, block_lengths):
    """ValueError where a kernel would read beyond the tensors or compute something else."""
    kinds = [(tuple(x.shape), x.dtype, x.device) for x in (query, key, value)]
    if query.ndim != 4 or kinds != 3 * kinds[:1]:
        raise ValueError(f"got {kinds}, expected alike (batch, heads, tokens, head_dim)")
    if min(block_lengths, default=0) < 1 or sum(block_lengths) != query.shape[2]:
        expected = f"positive integers that sum to the {query.shape[2]} tokens"
        raise ValueError(f"block_lengths is {block_lengths}, expected {expected}")
