"""The HMAR transformer: from labels and what coarser scales add up to, to logits of every token.

    labels (B,), inputs (B, L - len_0, code_dim) -> features (B, L, C) -> logits (B, L, codes)

L is the number of tokens of all scales, len_0 that of scale 0, C the width.

A sequence holds all scales, coarse to fine. The input at scale 0 is start tokens plus the class
embedding. At each later scale it is the map that the coarser scales add up to, resized to this
scale (`tokenizer.next_scale_inputs`). Attention stays inside a scale, so sampling needs no cache:
the Markov property. In a causal tree, which is VAR's, a scale attends to all coarser ones too.
The masked branch shares the first blocks, the trunk, and also sees the visible tokens of its own
scale. `features` is the transformer, `logits` its head, `losses` its training loss.

A model, `params`, is a tree of tensors, and its shapes are the configuration. The keys inside of
input, a block, a modulation, a head and neighbours are argument names of the function that computes
with them; the keys above are read by name in `features`, `condition`, `embed_inputs` and `logits`.

    classes (classes + 1, C), the null class last; start (len_0, C)
    levels (S, C), an embedding for each scale, as published; positions [(h, w, C), ...]
    input {weight, bias}; trunk [block, ...]
    next_scale {blocks [block, ...], modulation, head}
    masked {blocks, modulation, head, mask_embedding (C,), own_input}, if there is such a branch
    block {modulation, attention, mlp {expand, contract}}

Some keys are optional. What a tree has decides what is computed. An empty dict, {}, is a flag:
its presence means true.

    causal {}                 at the top: the tree is VAR's
    depthwise                 in a block: a 3 x 3 convolution of each channel of each scale's map
    neighbours                in both branches: the head sees neighbouring tokens of the same scale
    tanh {}                   in an mlp: GELU in its tanh approximation, as published
    leak {}                   in the masked branch: it was trained with the codes of hidden tokens
                              in own_inputs (tokenizer.masked_inputs without a mask), as published.
                              They leak into those of visible tokens nearby, so it has to be
                              sampled, and trained further, with them

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
from functools import partial

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

    ValueError if a cache is missing or not needed, if own_inputs and mask do not come together, or
    if labels, inputs, own_inputs and mask do not fit and would broadcast.
    """
    if (cache is not None) != ("causal" in params and k is not None):
        raise ValueError("cache: a single scale of a causal tree needs one, and nothing else does")
    if (own_inputs is None) != (mask is None):
        raise ValueError("own_inputs and mask: got one of them, expected both or none")
    seen = [inputs] if mask is None else [inputs, own_inputs, mask]
    if k != 0 and any(x.shape[:2] != (len(labels), inputs.shape[1]) for x in seen):
        raise ValueError(f"inputs: got {[tuple(x.shape) for x in seen]} for {len(labels)} labels")

    branch = params["next_scale"] if mask is None else params["masked"]
    blocks = params["trunk"] + branch["blocks"]
    scales = range(len(params["levels"])) if k is None else [k]
    sizes = [tuple(params["positions"][i].shape[:2]) for i in scales]
    conditions = condition(params, labels)  # (B, C)

    embedded = [conditions[:, None] + params["start"]] if 0 in scales else []  # (B, len_0, C)
    if later := sizes if k else sizes[1:]:
        embedded.append(embed_inputs(params, inputs, own_inputs, mask, later))
    positions = [params["positions"][i].flatten(0, 1) + params["levels"][i] for i in scales]
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

    branch = params["masked"]
    own = convolve_by_scale(own_inputs, sizes, branch["own_input"], bias=None)
    if branch["own_input"].ndim == 2:  # a convolution sees visible tokens nearby, so it stays
        own = own.masked_fill(mask[..., None], 0)
    return embedded + (own + mask[..., None] * branch["mask_embedding"])


def transformer_block(
    x, conditions, sizes, is_causal, past, dropout, *, modulation, attention, mlp, depthwise=None
):
    """x (B, n, C) after attention and MLP, each modulated by conditions (B, C), as in DiT.

    sizes: (h, w) of each scale in x. past: for `self_attention`. dropout: as in `features`. The
    others are weights. With `depthwise` the block begins with a convolution of each
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
    the coarser ones too. past: None, or the list of (keys, values) of all coarser scales, to which
    those of x, a single scale, are appended; then a token sees all of them.
    """
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    heads = len(log_temperature)
    projected = linear(x, qkv, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    qk, (v,) = projected.split([2, 1])  # (2, B, heads, n, head_dim) and (B, heads, n, head_dim)

    # Queries get the factor as their length and keys 1, so that attention itself has a scale of 1.
    # Both are computed together, because that takes half as many kernels.
    factor = log_temperature.clamp(max=math.log(100)).exp().view(-1, 1, 1)
    lengths = torch.stack([factor, torch.ones_like(factor)])[:, None]  # (2, 1, heads, 1, 1)
    wide = torch.promote_types(qk.dtype, torch.float32)
    norms = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=wide).clamp(min=1e-12)
    q, k = qk * (lengths / norms).to(qk.dtype)

    if past is None:
        block_lengths = [h * w for h, w in sizes]
        attended = block_sparse_attention(q, k, v, block_lengths, is_causal, scale=1.0)
    else:
        past.append((k, v))
        keys, values = (torch.cat(parts, 2) for parts in zip(*past))
        attended = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
    return linear(attended.transpose(1, 2).flatten(2), **project)


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

    def convolve(maps):  # (B, h, w, C')
        maps = maps.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return F.conv2d(maps, weight, bias, padding="same", groups=groups).permute(0, 2, 3, 1)

    return by_scale(convolve, x.to(weight.dtype), sizes)


def by_scale(function, x, sizes):
    """A function of maps (B, h, w, ...), of each scale by itself: x (B, n, ...) -> (B, n, ...)."""
    parts = zip(x.split([h * w for h, w in sizes], 1), sizes, strict=True)
    return torch.cat([function(part.unflatten(1, size)).flatten(1, 2) for part, size in parts], 1)


def linear(x, weight, bias):
    """The linear map of x, computed in the dtype of weight."""
    return F.linear(x.to(weight.dtype), weight, bias)


# ---- the head and the losses; a branch is params["next_scale"] or params["masked"]


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


# The neighbours of a token that the head sees, as (row, column) from it. All are sampled before the
# token, because they lie in earlier waves; a token's wave is column + 2 row, see `wave_logits`.
NEIGHBOURS = (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, -2), (-2, 0)


def neighbour_tokens(branch, tokens, sizes):
    """The NEIGHBOURS (B, n, 6) of each of tokens (B, n), of scales of these sizes [(h, w), ...].

    Where a neighbour would lie outside of the map, the number is `codes`, one more than the last
    code's. (B, n, 0) for branches without neighbours.
    """
    if "neighbours" not in branch:
        return tokens.new_empty(*tokens.shape, 0)

    def look(maps):  # (B, h, w) -> (B, h, w, 6)
        h, w = maps.shape[1:]
        # by 2 to the left, 1 to the right and 2 above, which is as far as neighbours are
        padded = F.pad(maps, (2, 1, 2, 0), value=len(branch["head"]["bias"]))
        corners = [(2 + row, 2 + column) for row, column in NEIGHBOURS]
        return torch.stack([padded[:, y : y + h, x : x + w] for y, x in corners], -1)

    return by_scale(look, tokens, sizes)


def wave_logits(branch, size, x, tokens):
    """Yields (positions (m,), logits (..., B, m, codes)) of one scale, in the order of sampling.

    size: (h, w) of the scale. x (..., B, n, C): its features. tokens (B, n): the caller writes what
    it samples at these positions into tokens before it asks for the next ones.

    A branch without neighbours predicts all positions at once. With neighbours there is a wave for
    each value of column + 2 row, see NEIGHBOURS.
    """
    places = [divmod(position, size[1]) for position in range(math.prod(size))]  # (row, column)
    waves = [column + 2 * row if "neighbours" in branch else 0 for row, column in places]
    for wave in sorted({*waves}):
        positions = [position for position, its_wave in enumerate(waves) if its_wave == wave]
        positions = torch.tensor(positions, device=tokens.device)
        near = neighbour_tokens(branch, tokens, [size])[:, positions]  # (B, m, 6)
        yield positions, logits(branch, x[..., positions, :], near)


def losses(params, labels, tokens, inputs, own_inputs=None, mask=None, *, dropout=0.0):
    """Cross entropies in nats, fp32: (B, L), or with a mask (M,) of the M hidden tokens.

    tokens (B, L) int64. The other arguments are those of `features`. With a mask the head runs on
    hidden tokens only, which come image by image and, in an image, coarse to fine.
    """
    branch = params["next_scale"] if mask is None else params["masked"]
    x = features(params, labels, inputs, own_inputs, mask, dropout=dropout)  # (B, L, C)
    near = neighbour_tokens(branch, tokens, scale_sizes(params))  # (B, L, 6)
    if mask is not None:
        hidden = F.pad(mask, (len(params["start"]), 0))  # (B, L)
        x, near, tokens = x[hidden], near[hidden], tokens[hidden]  # (M, ...)

    predicted = logits(branch, x, near, dropout=dropout)
    entropies = F.cross_entropy(predicted.flatten(0, -2), tokens.flatten(), reduction="none")
    return entropies.view(tokens.shape)


def scale_weights(scales, kind):
    """The weight (L,), fp32, of each token in the loss; weights sum to 1 and are equal in a scale.

    kind: how the weight of a whole scale grows. "token": with its number of tokens (VAR).
    "root": with the square root of that number. "scale": all scales weigh the same. "lognormal",
    as HMAR calls it: scale k of S has the weight exp(-z^2 / 2), where z is the side of scale
    S - 1 - k, standardised over the scales. (So the published code has it: coarse scales get their
    weight from the sides of fine ones.) ValueError for another kind.
    """
    counts = torch.tensor(scales, dtype=torch.float64).prod(1)  # (S,)
    powers = dict(token=1.0, root=0.5, scale=0.0)
    if kind == "lognormal":
        sides = (counts / counts[-1]).sqrt().flip(0)
        z = (sides - sides.mean()) / sides.std(correction=min(1, len(sides) - 1))
        mass = torch.exp(-0.5 * z.nan_to_num().square())  # z is 0 / 0 if all scales have one size
    elif kind in powers:
        mass = counts ** powers[kind]
    else:
        raise ValueError(f"kind: got {kind}, expected {', '.join(powers)} or lognormal")
    return (mass / mass.sum() / counts).repeat_interleave(counts.long()).float()


# ---- here the method ends; what a tree says about itself, and precision


def scale_sizes(params):
    """((h_0, w_0), ...): the scales that a tree was made for."""
    return tuple(tuple(position.shape[:2]) for position in params["positions"])


def block_count(params):
    """The depth: the number of blocks between input and head."""
    return len(params["trunk"]) + len(params["next_scale"]["blocks"])


# What `cast` casts; the products that use these leaves follow. Embeddings, the residual stream, the
# temperatures of attention, the modulation of heads and the losses stay in fp32.
CAST = (
    r"'(head|expand|contract|qkv|q_bias|v_bias|project|depthwise)'|'(trunk|blocks)'.*'modulation'"
)


def cast(params, dtype):
    """The same tree with the leaves of CAST in dtype; gradients reach the original."""

    def move(path, leaf):
        return leaf.to(dtype) if re.search(CAST, pytree.keystr(path)) else leaf

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

    normal = partial(_normal, generator, width)

    def affine(inputs, outputs, gain=1.0):
        return dict(weight=normal(outputs, inputs).mul_(gain), bias=torch.zeros(outputs))

    def new_block():
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

    params = dict(
        classes=normal(classes + 1, width),
        start=normal(scales[0][0] * scales[0][1], width),
        levels=normal(len(scales), width),
        positions=[normal(h, w, width) for h, w in scales],
        input=affine(code_dim, width),
        trunk=[new_block() for _ in range(depth)],
        next_scale=dict(
            blocks=[], modulation=affine(width, 2 * width, 0.5), head=affine(width, codes, 0.02)
        ),
    )
    if convolutions:
        # The matrix above is sampled all the same, so that all others are as without convolutions.
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
        params["causal"] = {}  # has no tensors, so casts and optimizers ignore it
    return params


def _normal(generator, width, *shape):
    std = math.sqrt(1 / (3 * width))
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=std, generator=generator)


def add_masked_branch(params, blocks=None, seed=0):
    """A tree with a masked branch: copies of the last blocks and of the rest of next_scale.

    trunk [1 2 3 4] -> trunk [1 2], next_scale [3 4], masked [copies of 3 4], for 2 blocks. The
    trunk and next_scale share their tensors with params, which stays as it is.

    blocks: how many are copied; None: half of them, rounded up. The input weight is copied too,
    for the tokens of the same scale. ValueError if there is a masked branch, if blocks is not 1 to
    all, or if the tree is causal, whose cache would hold tokens that masked passes sample again.
    """
    every = params["trunk"] + params["next_scale"]["blocks"]
    blocks = (len(every) + 1) // 2 if blocks is None else blocks
    if {"causal", "masked"} & params.keys() or not 1 <= blocks <= len(every):
        expected = f"1 to {len(every)} of a tree that is not causal and has no masked branch"
        raise ValueError(f"blocks: got {blocks}, expected {expected}")

    next_scale = params["next_scale"] | dict(blocks=every[-blocks:])
    masked = pytree.tree_map(torch.clone, next_scale)
    width = params["classes"].shape[1]
    embedding = _normal(torch.Generator().manual_seed(seed), width, width)
    masked["mask_embedding"] = embedding.to(params["classes"])
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
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")  # ends of names that are no weights


def from_published(state_dict, scales=None):
    """A tree, fp32, from the state dict of VAR, of HMAR after stage one, or with both branches.

    The tree is causal if the state dict has VAR's block-causal attention mask. scales may be left
    out for 680, 2240 and 9451 tokens. ValueError if they do not have as many tokens as the state
    dict, or if it lacks its last blocks. Of any other entry that is missing, an error tells the
    name: here, or when it is first used.
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

    next_scale, masked = params["next_scale"], params.get("masked")
    shared = params.pop("shared", None)  # VAR-d36: the modulations of its blocks differ in a bias
    for tree, stack in ((params, "trunk"), (next_scale, "blocks"), (masked or {}, "blocks")):
        blocks = tree.get(stack, {})  # {"0": block, ...}
        tree[stack] = [blocks[str(i)] for i in range(len(blocks))]
        for block in tree[stack]:
            block["mlp"]["tanh"] = {}
            if shared:
                bias = shared["modulation"]["bias"] + block.pop("ada_gss").flatten()
                block["modulation"] = shared["modulation"] | dict(bias=bias)

    # published models have 16 heads and more, as many blocks, and in both branches as many
    blocks = params["trunk"] + next_scale["blocks"]
    heads = len(blocks[0]["attention"]["log_temperature"])
    counts = [len(branch["blocks"]) for branch in (next_scale, masked or next_scale)]
    is_uneven = counts[0] != counts[1] or (masked and counts[0] == 0)
    if is_uneven or (heads >= 16 and len(blocks) != heads):
        raise ValueError(f"state_dict: {len(blocks)} blocks, {heads} heads, {counts} in branches")
    if masked:  # it has the weight of input for its own tokens; see `leak` above
        masked |= dict(own_input=params["input"]["weight"], leak={})
    mask = state_dict.get("attn_bias_for_masking")
    if mask is not None and mask[0, 0, -1, 0] == 0:  # the last token sees the first
        params["causal"] = {}
    table = params["positions"]  # of all scales
    published = {sum(h * w for h, w in sizes): sizes for sizes in SCALES.values()}
    scales = published.get(len(table), ()) if scales is None else scales
    counts = [h * w for h, w in scales]
    if sum(counts) != len(table):
        raise ValueError(f"scales: got {scales}, expected some of {len(table)} tokens")
    params["positions"] = [x.unflatten(0, hw) for x, hw in zip(table.split(counts), scales)]
    return params
