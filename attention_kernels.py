"""Attention over a sequence of blocks (the scales of an image): block-diagonal or block-causal, with no L x L mask.

`block_sparse_attention` is the entry; `dense_masked_attention` says in a few lines what it computes.
"""
import torch
import torch.nn.functional as F

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def block_sparse_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """Softmax attention in which a token sees its own block and, if is_causal, every earlier block.

    query, key, value: (batch, heads, tokens, head_dim), one device and dtype (float16, bfloat16, float32 or float64; under autocast they are cast to
    its dtype first), any strides, head_dim a multiple of 8 from 16 to 256. block_lengths: positive ints, the tokens of each block, summing to tokens.
    scale: positive factor on the scores, head_dim ** -0.5 if None. Returns (batch, heads, tokens, head_dim), laid out as (batch, tokens, heads,
    head_dim) so that joining the heads copies nothing. ValueError on anything else.
    """
    query, key, value = _autocast(query, key, value)
    block_lengths, scale = _check_arguments(query, key, value, block_lengths, scale)
    outputs, start = [], 0
    for length in block_lengths:
        stop = start + length
        seen = slice(0 if is_causal else start, stop)
        outputs.append(F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], scale=scale).transpose(1, 2))
        start = stop
    return torch.cat(outputs, dim=1).transpose(1, 2)


def dense_masked_attention(query, key, value, block_lengths, is_causal=False, scale=None):
    """The definition of `block_sparse_attention`, by an explicit (tokens, tokens) mask: same arguments, O(tokens^2) memory. For tests only."""
    query, key, value = _autocast(query, key, value)
    block_lengths, scale = _check_arguments(query, key, value, block_lengths, scale)
    block = torch.repeat_interleave(torch.tensor(block_lengths, device=query.device))  # (tokens,), the block of each token
    visible = block[:, None] >= block if is_causal else block[:, None] == block  # (tokens, tokens)
    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)  # (batch, heads, tokens, tokens)
    return scores.softmax(-1) @ value


def _autocast(*tensors):
    # q and k are normalised in float32 while v comes out of a bfloat16 product: like every matmul under autocast, cast what is not float64
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_arguments(query, key, value, block_lengths, scale):
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (batch, heads, tokens, head_dim)")
    tokens, head_dim = query.shape[2:]
    if query.dtype not in DTYPES:
        raise ValueError(f"query is {query.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"query has head_dim {head_dim}, expected a multiple of 8 from 16 to 256")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected that of query, {tuple(query.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected the dtype of query, {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of query, {query.device}")
    block_lengths = tuple(block_lengths)
    if not all(isinstance(length, int) and length > 0 for length in block_lengths):
        raise ValueError(f"block_lengths is {block_lengths}, expected positive ints")
    if sum(block_lengths) != tokens:
        raise ValueError(f"block_lengths {block_lengths} sum to {sum(block_lengths)}, expected the {tokens} tokens of query")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, expected a positive number")
    return block_lengths, scale
