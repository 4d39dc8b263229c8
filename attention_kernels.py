"""Attention over a sequence of blocks (the scales of an image): block-diagonal or block-causal, with no L x L mask anywhere.

`block_sparse_attention` is the entry, `dense_masked_attention` says in a few lines what it computes. On CUDA it is three Triton kernels
(forward; dQ; dK, dV), elsewhere F.scaled_dot_product_attention by block: the streaming softmax of FlashAttention-2 (Dao 2023, alg. 1, 2).

A program owns a tile of rows (queries; for dK and dV, keys) of one head and walks over the columns that its rows see, which it looks up in
a small table made once on the host from the block lengths. The rows of a tile lie in one block, or in a run of tiny ones. The columns that
all of them see need no mask and are walked in full steps; the rest, a tail or the tiny blocks, in half steps (16 at least) with a mask.

    >>> query, key, value = torch.randn(3, 2, 4, 14, 32)
    >>> block_sparse_attention(query, key, value, block_lengths=(1, 4, 9)).shape
    torch.Size([2, 4, 14, 32])
"""

from __future__ import annotations

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
except (
    ImportError
):  # there is no Triton for Mac and Windows: the kernels are then plain functions that nobody calls
    triton = None
jit = triton.jit if triton else lambda function: function
INTERPRETED = (
    triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
)  # the kernels then run in numpy, for tensors on any device
LIBRARY = __name__.replace(
    ".", "_"
)  # of the operators: copies of this file in two packages do not clash
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# (major architecture, bytes of an element): {up to this head_dim: (rows of a tile, columns of a full step, warps, stages) for forward, dQ
# and dK/dV}. Chosen by what they compile to: no spills in 2 bytes; shared memory within 99 KiB for 8, for consumer cards have no more.
TILES = {
    (8, 2): {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        128: ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (9, 2): {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    },
    (10, 2): {
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    (8, 4): {
        64: ((32, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 2),) * 3,
        256: ((16, 16, 8, 2),) * 3,
    },
}


def block_sparse_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """Softmax attention in which a token sees its own block and, if is_causal, every earlier block.

    query, key, value: (batch, heads, tokens, head_dim), one device, one dtype (float16, bfloat16, float32, float64; under autocast cast to
    its dtype first), any strides, head_dim a multiple of 8 from 16 to 256. block_lengths: positive ints that sum to tokens. scale: positive
    factor on the scores, head_dim ** -0.5 if None. Returns (batch, heads, tokens, head_dim), laid out as (batch, tokens, heads, head_dim),
    so that joining the heads copies nothing. Gradients are of the first order. ValueError on anything else.

    Before you capture a CUDA graph of your own, call it once: that makes the table of the block lengths.
    """
    query, key, value, block_lengths, scale = _checked(query, key, value, block_lengths, scale)
    if INTERPRETED or triton and query.is_cuda and query.dtype != torch.float64:
        return _forward(query, key, value, block_lengths, bool(is_causal), scale)[0]
    query, key, value = (
        x.transpose(1, 2) for x in (query, key, value)
    )  # tokens first: gradients of cuts join by plain copies
    keys, values = _seen(key, block_lengths, is_causal), _seen(value, block_lengths, is_causal)
    blocks = zip(query.split(block_lengths, dim=1), keys, values, strict=True)
    return torch.cat([_attention(q, k, v, scale) for q, k, v in blocks], dim=1).transpose(1, 2)


def _seen(x, block_lengths, is_causal):
    """The part of the keys or values (batch, tokens, heads, head_dim) that each block sees."""
    if not is_causal:
        return x.split(block_lengths, dim=1)
    views = [x]
    for length in reversed(
        block_lengths[1:]
    ):  # each cut from the last: the gradient of a cut is as large as what it was cut from
        views.append(views[-1][:, :-length])
    return views[::-1]


def _attention(query, key, value, scale):
    """Attention of (batch, tokens, heads, head_dim) without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if (
        query.device.type == "cpu" and query.element_size() == 2 and key.shape[1] <= 256
    ):  # the backward is then two to four times as fast
        with torch.autocast("cpu", enabled=False):
            output = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), scale=scale
            ).to(query.dtype)
    else:
        output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return output.transpose(1, 2)


def dense_masked_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """What `block_sparse_attention` computes, by an explicit (tokens, tokens) mask: same arguments, for tests only."""
    query, key, value, block_lengths, scale = _checked(query, key, value, block_lengths, scale)
    block = torch.repeat_interleave(
        torch.tensor(block_lengths, device=query.device)
    )  # (tokens,), the block of each token
    visible = block[:, None] >= block if is_causal else block[:, None] == block  # (tokens, tokens)
    scores = (query @ key.mT * scale).masked_fill(
        ~visible, -torch.inf
    )  # (batch, heads, tokens, tokens)
    return scores.softmax(-1) @ value


def _checked(query, key, value, block_lengths, scale):
    """The arguments as they are computed with: cast under autocast, the lengths a tuple, the scale a float. ValueError on bad ones."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not torch.is_tensor(tensor):
            raise ValueError(f"{name} is {type(tensor).__name__}, expected a tensor")
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        # q and k are normalised in float32 while v comes out of a bfloat16 product: like every matmul, cast what is not float64
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    if query.ndim != 4 or query.shape[2] == 0:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, expected (batch, heads, tokens, head_dim), at least one token"
        )
    tokens, head_dim = query.shape[2:]
    if query.dtype not in DTYPES:
        raise ValueError(f"query is {query.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"query has head_dim {head_dim}, expected a multiple of 8 from 16 to 256")
    for name, tensor in (("key", key), ("value", value)):
        for verb, got, expected in (
            ("has shape", tuple(tensor.shape), tuple(query.shape)),
            ("is", tensor.dtype, query.dtype),
            ("is on", tensor.device, query.device),
        ):
            if got != expected:
                raise ValueError(f"{name} {verb} {got}, expected that of query, {expected}")
    if not isinstance(block_lengths, Sequence) or not all(
        isinstance(n, int) and n > 0 and n is not True for n in block_lengths
    ):
        raise ValueError(
            f"block_lengths is {block_lengths!r}, expected a sequence of positive ints"
        )
    if sum(block_lengths) != tokens:
        raise ValueError(
            f"block_lengths is {block_lengths!r}, which sums to {sum(block_lengths)}, expected the {tokens} tokens of query"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float)) or scale is True or not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale!r}, expected a positive number")
    return query, key, value, tuple(block_lengths), float(scale)


@functools.lru_cache(maxsize=256)
def tile_table(block_lengths, is_causal, transposed, rows, columns, device="cpu"):
    """What the kernels walk over, for queries or (transposed) keys: tiles (count, 6) and bounds (2, tokens), int32 on device.

    A tile: its rows, start and stop; the columns that all of them see, in full steps, start and stop; those that need a mask, start and
    stop. Bounds: the first column that each row sees, and the first after it that it does not. Tiles with the most columns come first.
    """
    edges = [0, *itertools.accumulate(block_lengths)]
    tokens, count = edges[-1], len(block_lengths)
    seen = [
        ((start, tokens) if transposed else (0, stop)) if is_causal else (start, stop)
        for start, stop in itertools.pairwise(edges)
    ]
    tiles, first = [], 0
    while first < count:
        last = first
        while (
            last + 1 < count and edges[last + 2] - edges[first] <= rows
        ):  # tiny blocks share a tile
            last += 1
        begin, stop = seen[first][0], seen[last][1]
        full = max(seen[first][1] - seen[last][0], 0) // columns * columns
        # what not all rows see lies before the common columns when transposed, after them otherwise
        runs = (
            (stop - full, stop, begin, stop - full)
            if transposed
            else (begin, begin + full, begin + full, stop)
        )
        tiles += [
            (start, min(start + rows, edges[last + 1]), *runs)
            for start in range(edges[first], edges[last + 1], rows)
        ]
        first = last + 1
    tiles.sort(key=lambda tile: tile[2] - tile[3] + tile[4] - tile[5])
    bounds = torch.repeat_interleave(
        torch.tensor(seen, dtype=torch.int32), torch.tensor(block_lengths), dim=0
    )  # (tokens, 2)
    return torch.tensor(tiles, dtype=torch.int32, device=device), bounds.T.contiguous().to(device)


@jit
def _program(tiles, bounds, tile_count, heads, tokens, ROWS: tl.constexpr):
    """The program's tile, batch and head, its rows and what they see. A head's tiles run side by side and find its keys in the cache."""
    program = tl.program_id(0)
    tile, pair = tiles + program % tile_count * 6, (program // tile_count).to(tl.int64)
    rows = tl.load(tile) + tl.arange(0, ROWS)
    inside = rows < tl.load(tile + 1)
    return (
        tile,
        pair // heads,
        pair % heads,
        rows,
        inside,
        tl.load(bounds + rows, inside, 0),
        tl.load(bounds + tokens + rows, inside, 0),
    )


@jit
def _pointers(tensor, strides, batch, head, tokens, features):
    base = tensor + batch * strides[0] + head * strides[1]
    return (
        base
        + tokens.to(tl.int64)[:, None] * strides[2]
        + features.to(tl.int64)[None, :] * strides[3]
    )


@jit
def _load(
    pointers, inside, features, HEAD_DIM: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr
):
    """(tokens, features), zero for tokens that are not inside and for features beyond head_dim."""
    if MASKED:
        loaded = tl.load(pointers, inside[:, None] & (features < HEAD_DIM)[None, :], 0)
    elif HEAD_DIM == features.shape[0]:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, (features < HEAD_DIM)[None, :], 0)
    return loaded.to(DOT)


@jit
def _visible(low, high, column):
    return (low[:, None] <= column[None, :]) & (column[None, :] < high[:, None])  # (rows, columns)


@jit
def _finite(x):
    """Zero in place of inf and nan, which the zero probability of what is not visible would not cancel."""
    return tl.where(x - x == 0, x, 0)


@jit
def _probabilities(p, visible, x):
    """p where visible, nan in columns where x (columns, features) has inf or nan: rows that see them must not lose them to `_finite`."""
    poisoned = tl.max((x - x != 0).to(tl.int32), 1) != 0
    return tl.where(visible, tl.where(poisoned[None, :], float("nan"), p), 0)


@jit
def _forward_kernel(
    query,
    key,
    value,
    output,
    logsumexp,
    tiles,
    bounds,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    tile_count,
    heads,
    tokens,
    scale,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, batch, head, rows, inside, low, high = _program(
        tiles, bounds, tile_count, heads, tokens, ROWS
    )
    features = tl.arange(0, FEATURES)
    q = _load(
        _pointers(query, query_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    highest, total, out = (
        tl.full([ROWS], -1e30, ACC),
        tl.zeros([ROWS], ACC),
        tl.zeros([ROWS, FEATURES], ACC),
    )
    scale *= 1.4426950408889634  # 1 / ln 2, for powers of two
    for masked in tl.static_range(2):
        stop, columns = (
            tl.load(tile + 3 + 2 * masked),
            tl.arange(0, COLUMNS // 2 if masked and COLUMNS > 16 else COLUMNS),
        )
        k_pointers = _pointers(key, key_strides, batch, head, columns, features)
        v_pointers = _pointers(value, value_strides, batch, head, columns, features)
        for start in tl.range(tl.load(tile + 2 + 2 * masked), stop, columns.shape[0]):
            column, offset = start + columns, tl.cast(start, tl.int64)
            k = _load(
                k_pointers + offset * key_strides[2], column < stop, features, HEAD_DIM, DOT, masked
            )
            v = _load(
                v_pointers + offset * value_strides[2],
                column < stop,
                features,
                HEAD_DIM,
                DOT,
                masked,
            )
            scores = tl.dot(
                q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC
            )  # (rows, columns)
            if masked:
                visible = _visible(low, high, column)
                scores = tl.where(visible, scores, -1e30)
            higher = tl.maximum(highest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])
            if masked:
                p, v = _probabilities(p, visible, v), _finite(v)
            shrink = tl.exp2(highest - higher)
            highest, total = higher, total * shrink + tl.sum(p, 1)
            out = tl.dot(
                p.to(value.dtype.element_ty).to(DOT),
                v,
                out * shrink[:, None],
                input_precision=PRECISION,
                out_dtype=ACC,
            )
    total = tl.where(total == 0, 1, total)  # rows beyond the tile
    mask = inside[:, None] & (features < HEAD_DIM)[None, :]
    tl.store(
        _pointers(output, output_strides, batch, head, rows, features), out / total[:, None], mask
    )
    tl.store(logsumexp + (batch * heads + head) * tokens + rows, highest + tl.log2(total), inside)


@jit
def _query_gradient_kernel(
    query,
    key,
    value,
    output,
    logsumexp,
    output_gradient,
    query_gradient,
    delta,
    tiles,
    bounds,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    output_gradient_strides,
    tile_count,
    heads,
    tokens,
    scale,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, batch, head, rows, inside, low, high = _program(
        tiles, bounds, tile_count, heads, tokens, ROWS
    )
    features = tl.arange(0, FEATURES)
    q = _load(
        _pointers(query, query_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    out = _load(
        _pointers(output, output_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    do = _load(
        _pointers(output_gradient, output_gradient_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    row = (batch * heads + head) * tokens + rows
    row_logsumexp, row_delta = (
        tl.load(logsumexp + row, inside, 0),
        tl.sum(out.to(ACC) * do.to(ACC), 1),
    )
    tl.store(
        delta + row, row_delta, inside
    )  # the sum of p dp over a row's columns, for the next kernel too
    dq = tl.zeros([ROWS, FEATURES], ACC)
    for masked in tl.static_range(2):
        stop, columns = (
            tl.load(tile + 3 + 2 * masked),
            tl.arange(0, COLUMNS // 2 if masked and COLUMNS > 16 else COLUMNS),
        )
        k_pointers = _pointers(key, key_strides, batch, head, columns, features)
        v_pointers = _pointers(value, value_strides, batch, head, columns, features)
        for start in tl.range(tl.load(tile + 2 + 2 * masked), stop, columns.shape[0]):
            column, offset = start + columns, tl.cast(start, tl.int64)
            k = _load(
                k_pointers + offset * key_strides[2], column < stop, features, HEAD_DIM, DOT, masked
            )
            v = _load(
                v_pointers + offset * value_strides[2],
                column < stop,
                features,
                HEAD_DIM,
                DOT,
                masked,
            )
            scores = tl.dot(
                q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC
            )  # (rows, columns)
            p = tl.exp2(scores * (scale * 1.4426950408889634) - row_logsumexp[:, None])
            ds = p * (
                tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
                - row_delta[:, None]
            )
            if masked:
                ds, k = tl.where(_visible(low, high, column), ds, 0), _finite(k)
            dq = tl.dot(
                ds.to(key.dtype.element_ty).to(DOT), k, dq, input_precision=PRECISION, out_dtype=ACC
            )
    mask = inside[:, None] & (features < HEAD_DIM)[None, :]
    tl.store(
        _pointers(query_gradient, output_strides, batch, head, rows, features), dq * scale, mask
    )


@jit
def _key_value_gradient_kernel(
    query,
    key,
    value,
    logsumexp,
    output_gradient,
    delta,
    key_gradient,
    value_gradient,
    tiles,
    bounds,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    output_gradient_strides,
    tile_count,
    heads,
    tokens,
    scale,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # rows are keys here and columns are queries
    tile, batch, head, rows, inside, low, high = _program(
        tiles, bounds, tile_count, heads, tokens, ROWS
    )
    features = tl.arange(0, FEATURES)
    k = _load(
        _pointers(key, key_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    v = _load(
        _pointers(value, value_strides, batch, head, rows, features),
        inside,
        features,
        HEAD_DIM,
        DOT,
        True,
    )
    dk, dv = tl.zeros([ROWS, FEATURES], ACC), tl.zeros([ROWS, FEATURES], ACC)
    for masked in tl.static_range(2):
        stop, columns = (
            tl.load(tile + 3 + 2 * masked),
            tl.arange(0, COLUMNS // 2 if masked and COLUMNS > 16 else COLUMNS),
        )
        q_pointers = _pointers(query, query_strides, batch, head, columns, features)
        do_pointers = _pointers(
            output_gradient, output_gradient_strides, batch, head, columns, features
        )
        for start in tl.range(tl.load(tile + 2 + 2 * masked), stop, columns.shape[0]):
            column, offset = start + columns, tl.cast(start, tl.int64)
            q = _load(
                q_pointers + offset * query_strides[2],
                column < stop,
                features,
                HEAD_DIM,
                DOT,
                masked,
            )
            do = _load(
                do_pointers + offset * output_gradient_strides[2],
                column < stop,
                features,
                HEAD_DIM,
                DOT,
                masked,
            )
            column_logsumexp = tl.load(
                logsumexp + (batch * heads + head) * tokens + column, column < stop, 0
            )
            column_delta = tl.load(
                delta + (batch * heads + head) * tokens + column, column < stop, 0
            )
            scores = tl.dot(
                k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC
            )  # (rows, columns)
            p = tl.exp2(scores * (scale * 1.4426950408889634) - column_logsumexp[None, :])
            ds = p * (
                tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
                - column_delta[None, :]
            )
            if masked:
                visible = _visible(low, high, column)
                p, ds, q, do = (
                    _probabilities(p, visible, do),
                    tl.where(visible, ds, 0),
                    _finite(q),
                    _finite(do),
                )
            dv = tl.dot(
                p.to(query.dtype.element_ty).to(DOT),
                do,
                dv,
                input_precision=PRECISION,
                out_dtype=ACC,
            )
            dk = tl.dot(
                ds.to(query.dtype.element_ty).to(DOT),
                q,
                dk,
                input_precision=PRECISION,
                out_dtype=ACC,
            )
    mask = inside[:, None] & (features < HEAD_DIM)[None, :]
    tl.store(_pointers(key_gradient, output_strides, batch, head, rows, features), dk * scale, mask)
    tl.store(_pointers(value_gradient, output_strides, batch, head, rows, features), dv, mask)


def _constants(which, head_dim, dtype, architecture):
    """The compile-time arguments of kernel number `which` of forward, dQ, dK/dV, on a major architecture; None: the interpreter."""
    table = TILES[
        8 if dtype.itemsize > 2 or architecture not in (9, 10) else architecture,
        min(dtype.itemsize, 4),
    ]
    rows, columns, warps, stages = next(
        sizes for limit, sizes in table.items() if head_dim <= limit
    )[which]
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    half = (
        {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if architecture else {}
    )  # numpy, which interprets, has no bfloat16
    precision = (
        "tf32"
        if getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
        else "ieee"
    )
    return dict(
        HEAD_DIM=head_dim,
        FEATURES=triton.next_power_of_2(head_dim),
        ROWS=rows,
        COLUMNS=columns,
        DOT=half.get(dtype, accumulator),
        ACC=accumulator,
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def _launch(which, block_lengths, is_causal, scale, tensors, strided):
    """Run a kernel for every tile of every head on its tensors; strided: those whose strides it takes, query first."""
    kernel = (_forward_kernel, _query_gradient_kernel, _key_value_gradient_kernel)[which]
    query = strided[0]
    batch, heads, tokens, head_dim = query.shape
    constants = _constants(
        which,
        head_dim,
        query.dtype,
        None if INTERPRETED else torch.cuda.get_device_capability(query.device)[0],
    )
    tiles, bounds = tile_table(
        tuple(block_lengths),
        is_causal,
        which == 2,
        constants["ROWS"],
        constants["COLUMNS"],
        query.device,
    )
    strides = (tensor.stride() for tensor in strided)
    if batch * heads:
        with torch.cuda.device_of(query):  # Triton launches on the current device
            kernel[(len(tiles) * batch * heads,)](
                *tensors, tiles, bounds, *strides, len(tiles), heads, tokens, scale, **constants
            )


def _empty(query):
    return torch.empty_permuted(
        query.shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device
    )  # (batch, tokens, heads, head_dim)


@torch.library.custom_op(f"{LIBRARY}::forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_lengths: Sequence[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and, for the backward, the base-2 logarithm of each row's sum of exponentials (batch, heads, tokens)."""
    output, logsumexp = _forward_shapes(query, key, value, block_lengths, is_causal, scale)
    _launch(
        0,
        block_lengths,
        is_causal,
        scale,
        (query, key, value, output, logsumexp),
        (query, key, value, output),
    )
    return output, logsumexp


@_forward.register_fake
def _forward_shapes(query, key, value, block_lengths, is_causal, scale):
    return _empty(query), query.new_empty(
        query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32)
    )


@torch.library.custom_op(f"{LIBRARY}::backward", mutates_args=())
def _backward(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    block_lengths: Sequence[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, delta = _empty(query), _empty(query), _empty(query), torch.empty_like(logsumexp)
    strided = (query, key, value, output, output_gradient)
    _launch(
        1,
        block_lengths,
        is_causal,
        scale,
        (query, key, value, output, logsumexp, output_gradient, dq, delta),
        strided,
    )
    _launch(
        2,
        block_lengths,
        is_causal,
        scale,
        (query, key, value, logsumexp, output_gradient, delta, dk, dv),
        strided,
    )
    return dq, dk, dv


_backward.register_fake(
    lambda output_gradient, query, *_: (_empty(query), _empty(query), _empty(query))
)


def _save(ctx, inputs, output):
    *tensors, ctx.block_lengths, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, output_gradient, _):
    return (
        *_backward(
            output_gradient, *ctx.saved_tensors, ctx.block_lengths, ctx.is_causal, ctx.scale
        ),
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
