"""The HMAR transformer: from labels and what coarser scales add up to, to logits of every token.

    labels (B,), inputs (B, L - len_0, code_dim) -> features (B, L, C) -> logits (B, L, codes)

L is the number of tokens of all scales, len_0 that of scale 0, C the width.

A sequence holds all scales, coarse to fine. The input at scale 0 is start tokens plus the class
embedding. At each later scale it is the map that the coarser scales add up to, resized to this
scale (`tokenizer.next_scale_inputs`). Attention stays inside a scale, so sampling needs no cache:
the Markov property. In a causal tree, which is VAR's, a scale attends to all coarser ones too.
The masked branch shares the first blocks, the trunk, and also sees the visible tokens of its own
scale. `features` is the transformer, `logits` its head, `losses` what it is trained by.

A model, `params`, is a tree of tensors, and its shapes are the configuration. The keys inside of
input, a block, a modulation, a head and neighbours are argument names of the function that computes
with them; the keys above are read by name in `features`, `condition`, `embed_inputs` and `logits`.

    classes (classes + 1, C), the null class last; start (len_0, C)
    levels (S, C), an embedding for each scale, as published; positions [(h, w, C), ...]
    input {weight, bias}; trunk [block, ...]
    next_scale {blocks [block, ...], modulation, head}
    masked {blocks, modulation, head, mask_embedding (C,), own_input}, if there is such a branch
    block {modulation, attention, mlp {expand, contract}}

Some keys are optional. What a tree has decides what is computed. An empty dict, {}, is a flag: to
be there is to be set.

    causal {}                 at the top: the tree is VAR's
    depthwise                 in a block: a 3 x 3 convolution of each channel of each scale's map
    neighbours                in both branches: the head sees neighbouring tokens of the same scale
    tanh {}                   in an mlp: GELU in its tanh approximation, as published
    own_input                 in the masked branch: a weight; without it that of input is used

A weight of input and own_input may be a matrix (C, code_dim) or a 3 x 3 convolution. Convolutions
and neighbours suit small models: `init` adds them if it is asked to, published trees have neither.

    >>> params = init(depth=2, classes=10, codes=64, code_dim=8, scales=((1, 1), (2, 2)))
    >>> x = features(params, torch.tensor([3, 7]), torch.randn(2, 4, 8))
    >>> logits(params["next_scale"], x).shape
    torch.Size([2, 5, 64])

Sources: HMAR (Kumbong et al. 2025), VAR (Tian et al. 2024), adaptive layer norm as in DiT (Peebles
and Xie 2023).
"""

import math
import re

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from attention_kernels import block_sparse_attention

SCALES = {  # published scales by the image's side in pixels, for a tokenizer that downsamples by 16
    16 * sides[-1]: tuple(zip(sides, sides))
    for sides in (
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    )
}


# ---- the transformer


def features(
    params, labels, inputs, own_inputs=None, mask=None, *, k=None, cache=None, dropout=0.0
):
    """The transformer without its head: features (B, n, C), fp32, of all tokens.

    labels: (B,) int64, 0 to classes, which torch checks, or vectors (B, C); see `condition`.
    inputs: (B, L - len_0, code_dim), from tokenizer.next_scale_inputs.
    own_inputs, mask: for the masked branch, otherwise None. own_inputs (B, L - len_0, code_dim) are
        from tokenizer.masked_inputs. mask (B, L - len_0) bool is True where a token is hidden;
        those of scale 0 never are.
    k: computes scale k alone, for sampling. inputs, own_inputs and mask are then its part of the
        sequence; at scale 0 they are not read.
    cache: for sampling of a causal tree, [[] for each block]. The keys and values of scale k are
        appended; the lists must hold those of all coarser scales.
    dropout: for training, the share of numbers that are zeroed in what attention and MLPs add, by
        torch's own random generator.

    ValueError if a cache is missing or not needed, if own_inputs and mask do not come together and
    fit inputs, or if at a scale k > 0 alone the numbers of labels and inputs differ, which would
    broadcast. (In a whole sequence torch refuses that.)
    """
    if (cache is not None) != ("causal" in params and k is not None):
        got = "None" if cache is None else "one"
        raise ValueError(f"cache: got {got}; a single scale of a causal tree alone needs one")
    if (own_inputs is None) != (mask is None):
        raise ValueError("own_inputs and mask: got one of them, expected both or none")
    if k is not None and k > 0 and len(labels) != len(inputs):
        raise ValueError(f"labels: got {len(labels)} for {len(inputs)} inputs")

    branch = params["next_scale"] if mask is None else params["masked"]
    blocks = params["trunk"] + branch["blocks"]
    indices = range(len(params["levels"])) if k is None else [k]  # of scales
    sizes = [tuple(params["positions"][i].shape[:2]) for i in indices]
    conditions = condition(params, labels)  # (B, C)

    embedded = []
    if indices[0] == 0:
        embedded.append(conditions[:, None] + params["start"])  # (B, len_0, C)
    if indices[-1] > 0:
        finer = sizes[1:] if k is None else sizes
        embedded.append(embed_inputs(params, inputs, own_inputs, mask, finer))
    positions = [params["positions"][i].flatten(0, 1) + params["levels"][i] for i in indices]
    x = torch.cat(embedded, 1) + torch.cat(positions)  # (B, n, C)

    caches = [None] * len(blocks) if cache is None else cache
    for weights, past in zip(blocks, caches, strict=True):
        x = transformer_block(x, conditions, sizes, "causal" in params, past, dropout, **weights)

    scale_shift = linear(F.silu(conditions), **branch["modulation"]).unsqueeze(1)  # (B, 1, 2 C)
    return modulate(x, *scale_shift.chunk(2, -1))


def condition(params, labels):
    """Vectors (B, C) that condition the transformer: class embeddings, or labels that are vectors.

    labels: (B,) int64, 0 to classes, where `classes` is the null class; or floats (B, C), such as a
    learned projection of a text's embedding. The null vector, for guidance, is classes[-1].
    """
    return labels if labels.is_floating_point() else F.embedding(labels, params["classes"])


def embed_inputs(params, inputs, own_inputs, mask, sizes):
    """The embeddings (B, n, C) of the inputs of scales 1, 2, ... or of one of them alone.

    With a mask, those of the masked branch: to each embedding is added that of the token itself
    where it is visible, and the mask embedding where it is hidden. sizes: (h, w) of each scale.
    """
    embedded = convolve_by_scale(inputs, sizes, **params["input"])
    if mask is None:
        return embedded
    if own_inputs.shape != inputs.shape or mask.shape != inputs.shape[:2]:
        got = f"own_inputs {tuple(own_inputs.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"got {got} for inputs {tuple(inputs.shape)}")

    branch = params["masked"]
    weight = branch.get("own_input", params["input"]["weight"])  # see `hidden_tokens_leak`
    visible = convolve_by_scale(own_inputs, sizes, weight, bias=None)
    if weight.ndim == 2:  # the output of a convolution stays: it comes from visible tokens nearby
        visible = visible.masked_fill(mask[..., None], 0)
    return embedded + (visible + mask[..., None] * branch["mask_embedding"])


def transformer_block(
    x, conditions, sizes, is_causal, past, dropout, *, modulation, attention, mlp, depthwise=None
):
    """x (B, n, C) after attention and MLP, each modulated by conditions (B, C), as in DiT.

    sizes: (h, w) of each scale in x. past: for `cached_attention`, otherwise None. dropout: as in
    `features`. The others are weights. With `depthwise` the block begins with a convolution of each
    channel of each scale's map (UniFormer, Li et al. 2022), which published blocks do not have.
    """
    if depthwise is not None:
        x = x + convolve_by_scale(x, sizes, **depthwise)

    modulations = linear(F.silu(conditions), **modulation).unflatten(1, (6, 1, -1))  # (B, 6, 1, C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulations.unbind(1)  # the published order

    attended = self_attention(modulate(x, scale1, shift1), sizes, is_causal, past, **attention)
    x = x + gamma1 * F.dropout(attended, dropout)

    transformed = feed_forward(modulate(x, scale2, shift2), **mlp)
    return x + gamma2 * F.dropout(transformed, dropout)


def self_attention(x, sizes, is_causal, past, *, qkv, q_bias, v_bias, log_temperature, project):
    """Cosine attention of x (B, n, C): queries and keys are normalised to unit length.

    Scores are multiplied by exp(log_temperature), which is clamped at 100; so log_temperature
    (heads,) is the logarithm of an inverse temperature. A token sees its own scale; with is_causal
    the coarser ones too.
    """
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    heads = len(log_temperature)
    projected = linear(x, qkv, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    qk, (v,) = projected.split([2, 1])  # (2, B, heads, n, head_dim) and (B, heads, n, head_dim)

    # Queries get the factor as their length and keys 1, so that attention itself has a scale of 1.
    factor = log_temperature.clamp(max=math.log(100)).exp().view(-1, 1, 1)
    lengths = torch.stack([factor, torch.ones_like(factor)])[:, None]  # (2, 1, heads, 1, 1)
    q, k = set_length(qk, lengths)  # together, because that takes half as many kernels

    if past is None:
        block_lengths = [h * w for h, w in sizes]
        attended = block_sparse_attention(q, k, v, block_lengths, is_causal, scale=1.0)
    else:
        attended = cached_attention(q, k, v, past)
    return linear(attended.transpose(1, 2).flatten(2), **project)


def set_length(x, length):
    """The vectors x (..., head_dim), multiplied so that they have this length (..., 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp(min=1e-12)
    return x * (length / norm).to(x.dtype)


def cached_attention(query, key, value, past):
    """Attention to all scales so far. past lists their (key, value); the new ones are appended."""
    past.append((key, value))
    keys, values = (torch.cat(parts, 2) for parts in zip(*past))
    return F.scaled_dot_product_attention(query, keys, values, scale=1.0)


def feed_forward(x, expand, contract, tanh=None):
    """The MLP of x (..., C) with GELU: exact, or with `tanh` its tanh approximation.

    Published models were trained with the approximation. In bf16 on a CPU it takes six times as
    long as exact GELU.
    """
    hidden = F.gelu(linear(x, **expand), approximate="none" if tanh is None else "tanh")
    return linear(hidden, **contract)


def modulate(x, scale, shift):
    """Layer norm, then a scale and a shift that depend on the condition, in the dtype of scale."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype)
    return torch.addcmul(shift, x, 1 + scale)


def convolve_by_scale(x, sizes, weight, bias):
    """A convolution of each scale's map by itself: x (B, n, C') -> (B, n, C).

    sizes: (h, w) of each scale in x. weight: (C, C', 3, 3), or (C, 1, 3, 3) for each channel by
    itself, or a matrix (C, C'), as published, for each token by itself.
    """
    if weight.ndim == 2:
        return linear(x, weight, bias)

    groups = x.shape[-1] if weight.shape[1] == 1 else 1
    convolved = []
    for part, size in zip(x.to(weight.dtype).split([h * w for h, w in sizes], 1), sizes):
        maps = part.unflatten(1, size).permute(0, 3, 1, 2)  # (B, C', h, w)
        maps = maps.contiguous(memory_format=torch.channels_last)
        maps = F.conv2d(maps, weight, bias, padding="same", groups=groups)
        convolved.append(maps.permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, C)
    return torch.cat(convolved, 1)


def linear(x, weight, bias):
    """The linear map of x, computed in the dtype of weight."""
    return F.linear(x.to(weight.dtype), weight, bias)


# ---- the head; a branch is params["next_scale"] or params["masked"]


def logits(branch, x, near=None, *, dropout=0.0):
    """Logits (..., codes), at least fp32, of a branch's features x (..., C).

    near (..., 6): the tokens of `neighbour_tokens`, for branches with neighbours. dropout: for
    training, the share of numbers that are zeroed in what the neighbours' MLP adds.
    """
    if "neighbours" in branch:
        x = add_neighbours(x, near, dropout, **branch["neighbours"])
    result = linear(x, **branch["head"])
    return result.to(torch.promote_types(result.dtype, torch.float32))


def add_neighbours(x, near, dropout, *, embedding, expand, contract):
    """x (..., C) plus an MLP of it and of the neighbouring tokens near (..., 6).

    embedding (6, codes + 1, C): a table for each of NEIGHBOURS; its last vector is for those that
    would lie outside of the map.
    """
    seen = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    for table, codes in zip(embedding, near.unbind(-1), strict=True):
        seen = seen + F.embedding(codes, table)
    return x + F.dropout(feed_forward(seen, expand, contract), dropout)


# The neighbours of a token that the head sees, as (row, column) from it, and how far they reach: to
# the left, right, top and bottom. All are sampled before the token, because they lie in earlier
# waves; a token's wave is column + 2 row, see `wave_logits`.
NEIGHBOURS = (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, -2), (-2, 0)
REACH = 2, 1, 2, 0


def neighbour_tokens(branch, tokens, sizes):
    """The NEIGHBOURS (B, n, 6) of each of tokens (B, n), of scales of these sizes [(h, w), ...].

    Where a neighbour would lie outside of the map, the number is `codes`, one more than the last
    code's. (B, n, 0) for branches without neighbours.
    """
    if "neighbours" not in branch:
        return tokens.new_empty(*tokens.shape, 0)

    codes = len(branch["head"]["bias"])
    left, _, top, _ = REACH
    near = []
    for part, (h, w) in zip(tokens.split([h * w for h, w in sizes], 1), sizes, strict=True):
        maps = F.pad(part.unflatten(1, (h, w)), REACH, value=codes)  # (B, h + 2, w + 3)
        corners = [(top + y, left + x) for y, x in NEIGHBOURS]
        shifted = [maps[:, y : y + h, x : x + w] for y, x in corners]
        near.append(torch.stack(shifted, -1).flatten(1, 2))  # (B, h w, 6)
    return torch.cat(near, 1)


def wave_logits(branch, size, x, tokens):
    """Yields (positions (m,), logits (..., B, m, codes)) of one scale, in the order of sampling.

    size: (h, w) of the scale. x (..., B, n, C): its features. tokens (B, n): the caller writes what
    it samples at these positions into tokens before it asks for the next ones.

    A branch without neighbours predicts all positions at once. With neighbours there is a wave for
    each value of column + 2 row, see NEIGHBOURS.
    """
    h, w = size
    waves = {}
    for position in range(h * w):
        row, column = divmod(position, w)
        wave = column + 2 * row if "neighbours" in branch else 0
        waves.setdefault(wave, []).append(position)

    for wave in sorted(waves):
        positions = torch.tensor(waves[wave], device=tokens.device)
        near = neighbour_tokens(branch, tokens, [size])[:, positions]  # (B, m, 6)
        yield positions, logits(branch, x[..., positions, :], near)


# ---- losses


def losses(
    params, labels, tokens, inputs, own_inputs=None, mask=None, hidden_at=None, *, dropout=0.0
):
    """Cross entropies in nats, fp32: (B, L), or with a mask (M,) of the M hidden tokens.

    tokens (B, L) int64. The other arguments are those of `features`. With a mask the head runs on
    hidden tokens only, which come image by image and, in an image, coarse to fine. hidden_at (M,):
    `hidden_positions(params, mask)`, if the caller has it; computing it here makes a GPU wait.
    """
    branch = params["next_scale"] if mask is None else params["masked"]
    x = features(params, labels, inputs, own_inputs, mask, dropout=dropout)  # (B, L, C)
    x = x.flatten(0, 1)  # (B L, C)
    near = neighbour_tokens(branch, tokens, scale_sizes(params)).flatten(0, 1)  # (B L, 6)
    targets = tokens.flatten()

    if mask is not None:
        hidden_at = hidden_positions(params, mask) if hidden_at is None else hidden_at
        x, near, targets = (part.index_select(0, hidden_at) for part in (x, near, targets))
    result = F.cross_entropy(logits(branch, x, near, dropout=dropout), targets, reduction="none")
    return result.view(tokens.shape) if mask is None else result


def hidden_positions(params, mask):
    """Where in tokens.flatten() are the M hidden tokens of a mask (B, L - len_0): (M,) int64."""
    return F.pad(mask, (len(params["start"]), 0)).flatten().nonzero()[:, 0]


# Kinds of `scale_weights`: the power of the number of tokens, or None for a law of its own.
WEIGHTS = dict(token=1.0, root=0.5, scale=0.0, lognormal=None)


def scale_weights(scales, kind):
    """The weight (L,), fp32, of each token in the loss; weights sum to 1 and are equal in a scale.

    kind: how the weight of a whole scale grows. "token": with its number of tokens (VAR).
    "root": with the square root of that number. "scale": all scales weigh the same. "lognormal",
    as HMAR calls it: scale k of S has the weight exp(-z^2 / 2), where z is the side of scale
    S - 1 - k, standardised over the scales. (So the published code has it: coarse scales get their
    weight from the sides of fine ones.)
    """
    counts = torch.tensor(scales, dtype=torch.float64).prod(1)  # (S,)
    if kind == "lognormal":
        sides = (counts / counts[-1]).sqrt().flip(0)
        spread = sides.std() if len(sides) > 1 else 0
        standardised = ((sides - sides.mean()) / spread).nan_to_num()  # 0 if all have one size
        mass = torch.exp(-0.5 * standardised.square())
    else:
        mass = counts ** WEIGHTS[kind]
    return (mass / mass.sum() / counts).repeat_interleave(counts.long()).float()


# ---- here the method ends; what a tree says about itself, and precision


def scale_sizes(params):
    """((h_0, w_0), ...): the scales that a tree was made for."""
    return tuple(tuple(position.shape[:2]) for position in params["positions"])


def hidden_tokens_leak(params):
    """Whether the masked branch has no own_input and no convolutions, as published.

    Such a branch embeds the tokens of its own scale with the weight of `input`. And it was trained
    with the codes of hidden tokens in own_inputs (tokenizer.masked_inputs without a mask), where
    they leak into those of visible tokens nearby; so it has to be sampled, and trained further,
    with them. With a convolution a hidden token would see itself.
    """
    return "own_input" not in params["masked"] and params["input"]["weight"].ndim == 2


def block_count(params):
    """The number of blocks that a token passes through."""
    return len(params["trunk"]) + len(params["next_scale"]["blocks"])


# What `cast` casts; the products that use these leaves follow. The rest stays in fp32: embeddings,
# the residual stream, the temperatures of attention, the modulation of heads, and losses.
CAST = {"head", "expand", "contract"}
CAST_IN_BLOCKS = {"modulation", "qkv", "q_bias", "v_bias", "project", "depthwise"}


def cast(params, dtype):
    """The same tree with the leaves below the keys CAST in dtype; gradients reach the original."""

    def move(path, leaf):
        keys = {getattr(entry, "key", None) for entry in path}
        is_in_block = bool(keys & {"trunk", "blocks"})
        is_cast = keys & CAST or (is_in_block and keys & CAST_IN_BLOCKS)
        return leaf.to(dtype) if is_cast else leaf

    return pytree.tree_map_with_path(move, params)


# ---- initialisation and surgery


def init(
    *,
    depth=16,
    classes=1000,
    codes=4096,
    code_dim=32,
    scales=SCALES[256],
    width=None,
    heads=None,
    gamma=None,
    convolutions=False,
    neighbours=False,
    causal=False,
    seed=0,
):
    """A new tree for next-scale prediction, fp32, initialised as published; sizes follow depth.

    width: C, 64 * depth if None. heads: width / 64 if None. gamma scales the gates; None: 1e-3,
    1e-4 from depth 24 on, 1e-5 from depth 30 on. convolutions: 3 x 3 convolutions of the inputs and
    in each block. neighbours: the head sees tokens of its own scale that are sampled before.
    Published trees have neither. causal: a tree of VAR, where a scale attends to all coarser ones.
    On torch.device("meta") nothing is allocated.
    """
    width = width or 64 * depth
    heads = heads or max(1, width // 64)
    if gamma is None:
        gamma = 1e-5 if depth >= 30 else 1e-4 if depth >= 24 else 1e-3
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return _normal(generator, width, *shape)

    def affine(inputs, outputs, gain=1.0):
        return dict(weight=normal(outputs, inputs).mul_(gain), bias=torch.zeros(outputs))

    params = dict(
        classes=normal(classes + 1, width),
        start=normal(scales[0][0] * scales[0][1], width),
        levels=normal(len(scales), width),
        positions=[normal(h, w, width) for h, w in scales],
        input=affine(code_dim, width),
        trunk=[_new_block(normal, affine, width, heads, depth, gamma) for _ in range(depth)],
        next_scale=dict(
            blocks=[], modulation=affine(width, 2 * width, 0.5), head=affine(width, codes, 0.02)
        ),
    )
    if convolutions:
        # The matrix is sampled all the same, so that the weights above are those without
        # convolutions.
        params["input"]["weight"] = normal(width, code_dim, 3, 3)
        for block in params["trunk"]:
            block["depthwise"] = dict(weight=normal(width, 1, 3, 3), bias=torch.zeros(width))
    if neighbours:
        params["next_scale"]["neighbours"] = dict(
            embedding=normal(len(NEIGHBOURS), codes + 1, width),  # see `add_neighbours`
            expand=affine(width, 2 * width),
            contract=affine(2 * width, width, 0.02),
        )
    if causal:
        params["causal"] = {}  # has no tensors, so that casts and optimizers pass it by
    return params


def _normal(generator, width, *shape):
    std = math.sqrt(1 / (3 * width))
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=std, generator=generator)


def _new_block(normal, affine, width, heads, depth, gamma):
    modulation = affine(width, 6 * width)
    modulation["weight"][: 2 * width] *= gamma  # of gamma1 and gamma2 in `transformer_block`
    modulation["weight"][2 * width :] *= 0.5
    narrow = 1 / math.sqrt(2 * depth)
    attention = dict(
        qkv=normal(3 * width, width),
        q_bias=torch.zeros(width),
        v_bias=torch.zeros(width),
        log_temperature=torch.full((heads,), math.log(4)),
        project=affine(width, width, narrow),
    )
    mlp = dict(expand=affine(width, 4 * width), contract=affine(4 * width, width, narrow))
    return dict(modulation=modulation, attention=attention, mlp=mlp)


def add_masked_branch(params, blocks=None, own_input=True, seed=0):
    """A tree with a masked branch: copies of the last blocks and of the rest of next_scale.

    trunk [1 2 3 4] -> trunk [1 2], next_scale [3 4], masked [copies of 3 4], for 2 blocks. The
    trunk and next_scale share their tensors with params, which stays as it is.

    blocks: how many are copied; None: half of them, rounded up. own_input: the input weight is
    copied too, for the tokens of the same scale; published trees have no such copy, see
    `hidden_tokens_leak`. ValueError if there is a masked branch, if blocks is not 1 to all, or if
    the tree is causal, because its cache holds tokens that masked passes would sample again.
    """
    every = params["trunk"] + params["next_scale"]["blocks"]
    blocks = (len(every) + 1) // 2 if blocks is None else blocks
    if "causal" in params:
        raise ValueError("params: got a causal tree, which cannot have a masked branch")
    if "masked" in params or not 1 <= blocks <= len(every):
        raise ValueError(f"blocks: got {blocks}, expected 1 to {len(every)}, and only once")

    next_scale = params["next_scale"] | dict(blocks=every[-blocks:])
    masked = pytree.tree_map(torch.clone, next_scale)
    width = params["classes"].shape[1]
    embedding = _normal(torch.Generator().manual_seed(seed), width, width)
    masked["mask_embedding"] = embedding.to(params["classes"])
    if own_input:
        masked["own_input"] = params["input"]["weight"].clone()
    return params | dict(trunk=every[:-blocks], next_scale=next_scale, masked=masked)


def resize_positions(params, scales):
    """The same weights for other scales, to fine-tune at another resolution or shape.

    Each new scale copies the old one of the closest relative size, resampled bicubically.
    """
    old = [position.shape[:2] for position in params["positions"]]

    def relative(sizes):
        areas = torch.tensor(sizes).prod(1)
        order = torch.linspace(0, 1e-5, len(sizes))  # keeps two scales of one size in order
        return (areas / areas[-1]).sqrt() + order

    def resample(grid, size):  # (h, w, C) -> (*size, C)
        planes = F.interpolate(grid.permute(2, 0, 1)[None], size, mode="bicubic")
        return planes[0].permute(1, 2, 0).contiguous()

    source = (relative(scales)[:, None] - relative(old)).abs().argmin(1).tolist()
    start = resample(params["start"].unflatten(0, old[0]), scales[0]).flatten(0, 1)
    positions = [resample(params["positions"][k], size) for k, size in zip(source, scales)]
    return params | dict(start=start, levels=params["levels"][source], positions=positions)


# ---- published weights

PUBLISHED_NAMES = (  # patterns in published names -> ours, replaced in this order
    (r"class_emb\.weight", "classes"),
    (r"pos_start", "start"),
    (r"pos_1LC", "positions"),
    (r"lvl_embed\.weight", "levels"),
    (r"word_embed[._]", "input."),
    (r"^(base_)?blocks", "trunk"),
    (r"mask_embed\.weight", "masked.mask_embedding"),
    (r"^head", "ns_head"),  # VAR's, as HMAR calls it
    (r"^ns_", "next_scale."),
    (r"^mask_", "masked."),
    (r"(\.head_nm)?[._]ada_lin\.1", ".modulation"),  # _ in VAR-d36's shared_ada_lin
    (r"ffn\.fc1", "mlp.expand"),
    (r"ffn\.fc2", "mlp.contract"),
    (r"attn", "attention"),
    (r"proj", "project"),
    (r"mat_qkv\.weight", "qkv"),
    (r"scale_mul_1H11", "log_temperature"),
)
# Names that end so are buffers, not weights.
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


def from_published(state_dict, scales=None):
    """A tree, fp32, from the state dict of VAR, of HMAR after stage one, or with both branches.

    The tree is causal if the state dict has VAR's block-causal attention mask. scales may be left
    out for 680, 2240 and 9451 tokens. ValueError if an entry or a block is missing that such a
    model has, or if the scales do not have as many tokens as the state dict.
    """
    try:
        params = _renamed(state_dict)
        _check_complete(params)
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"state_dict: not a transformer's: {reason}") from error

    table = params["positions"]  # of all scales
    published = {sum(h * w for h, w in sizes): sizes for sizes in SCALES.values()}
    scales = published.get(len(table), ()) if scales is None else scales
    counts = [h * w for h, w in scales]
    if sum(counts) != len(table):
        raise ValueError(f"scales: got {scales}, expected some of {len(table)} tokens")
    params["positions"] = [x.unflatten(0, hw) for x, hw in zip(table.split(counts), scales)]

    mask = state_dict.get("attn_bias_for_masking")
    if mask is not None and mask[0, 0, -1, 0] == 0:  # the last token sees the first
        params["causal"] = {}
    return params


def _renamed(state_dict):
    """A tree of a state dict, but the positions of all scales are one table, as published.

    If the state dict is not a transformer's, it raises an error or returns an incomplete tree.
    """
    params = {}
    for name, leaf in state_dict.items():
        if name.endswith(BUFFERS):
            continue
        for theirs, ours in PUBLISHED_NAMES:
            name = re.sub(theirs, ours, name)
        if name in ("start", "positions", "masked.mask_embedding"):
            leaf = leaf.squeeze(0)
        if name.endswith("log_temperature"):
            leaf = leaf.flatten()
        *path, last = name.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf.float()

    # {"0": block, ...} -> [block, ...]
    trees = params, params["next_scale"], params.get("masked", {})
    for tree, stack in zip(trees, ("trunk", "blocks", "blocks")):
        blocks = tree.get(stack, {})
        tree[stack] = [blocks[str(i)] for i in range(len(blocks))]
        for block in tree[stack]:
            block["mlp"]["tanh"] = {}

    shared = params.pop("shared", None)  # VAR-d36: its blocks differ in a bias only
    for block in params["trunk"] if shared else ():
        bias = shared["modulation"]["bias"] + block.pop("ada_gss").flatten()
        block["modulation"] = shared["modulation"] | dict(bias=bias)
    return params


def _check_complete(params):
    """LookupError unless a `_renamed` tree has as many blocks, and all leaves, as its sizes say."""
    next_scale, masked = params["next_scale"], params.get("masked")
    codes, width = next_scale["head"]["weight"].shape
    blocks = params["trunk"] + next_scale["blocks"]
    heads = len(blocks[0]["attention"]["log_temperature"])
    sizes = dict(depth=len(blocks), width=width, heads=heads, codes=codes, scales=[(1, 1)])
    sizes |= dict(code_dim=params["input"]["weight"].shape[1])

    if heads >= 16 and len(blocks) != heads:  # all published models have as many blocks as heads
        raise LookupError(f"{len(blocks)} blocks, expected {heads}")
    if masked is not None:
        counts = [len(branch["blocks"]) for branch in (next_scale, masked)]
        if min(counts) == 0 or counts[0] != counts[1]:
            raise LookupError(f"{counts} blocks in the two branches, expected as many in both")

    with torch.device("meta"):
        whole = init(classes=len(params["classes"]) - 1, **sizes)
        whole["positions"] = whole["positions"][0]
        if masked is not None:
            whole = add_masked_branch(whole, len(masked["blocks"]), own_input=False)
    trees = (pytree.tree_flatten_with_path(tree)[0] for tree in (whole, params))
    expected, found = ({pytree.keystr(path) for path, _ in leaves} for leaves in trees)
    if missing := sorted(expected - found):
        raise LookupError(f"{len(missing)} entries are missing, such as {missing[0]}")
