"""The HMAR transformer: from a pyramid of token maps, given as features, to logits of every token.

    labels (B,), inputs (B, L - len_0, code_dim) -> x (B, L, C) -> blocks -> logits (B, L, codes)

L is the number of tokens of all scales, len_0 that of scale 0, C the width.

A sequence holds all scales, coarse to fine. The input at scale 0 is start tokens plus the class
embedding; at each later scale it is the map that the coarser scales add up to, resized. Attention
stays inside a scale, so that sampling needs no cache: the Markov property. With is_causal=True all
this is VAR, where a scale attends to the coarser ones too. The masked branch shares the first
blocks, the trunk, and also sees the visible tokens of its own scale: `apply_mask` is where the mask
goes.

A model is a tree of tensors: its keys are argument names of functions, its shapes are the
configuration.

    classes (classes + 1, C), the null class last; start (len_0, C)
    levels (S, C), an embedding for each scale, as published; positions [(h, w, C), ...]
    input {weight, bias}; trunk [block, ...]
    next_scale {blocks [block, ...], modulation, head}
    masked {blocks, modulation, head, mask_embedding (C,), own_input}
    optional in both branches: neighbours {embedding (6, codes + 1, C), expand, contract}
    block {modulation, attention, mlp or mlp_tanh, depthwise}; see `transformer_block`

Three kinds of trees differ in what they have. Trees of small models have everything above, with
3 x 3 convolutions in input, own_input and depthwise, which treat the map of each scale by itself
(`convolve_by_scale`). Trees of `init` by default have neither convolutions nor neighbours.
Published ones have no own_input either, and mlp_tanh in place of mlp. Arguments:

    labels      (B,) int64, 0 to classes; `classes` is the null class
    inputs      (B, L - len_0, code_dim), from tokenizer.next_scale_inputs
    own_inputs  (B, L - len_0, code_dim), from tokenizer.masked_inputs
    mask        (B, L - len_0) bool, True where hidden; scale 0 is never masked
    tokens      (B, L) int64, needed by heads that see neighbours
    k           one scale alone: inputs, own_inputs, mask are its part; at scale 0 they are not read

    >>> params = init(depth=2, classes=10, codes=64, code_dim=8, scales=((1, 1), (2, 2)))
    >>> next_scale_logits(params, torch.tensor([3, 7]), torch.randn(2, 4, 8)).shape
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

# (row, column) from a token to its neighbours that the head sees; all are sampled before it, see
# `waves`
NEIGHBOURS = (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, -2), (-2, 0)
SCALES = {  # published scales by the image's side in pixels, for a tokenizer that downsamples by 16
    16 * sides[-1]: tuple(zip(sides, sides))
    for sides in (
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    )
}


def scale_sizes(params):
    """((h_0, w_0), ...): the scales that a tree was made for."""
    return tuple(tuple(position.shape[:2]) for position in params["positions"])


def block_count(params):
    """The number of blocks that a token passes through."""
    return len(params["trunk"]) + len(params["next_scale"]["blocks"])


def next_scale_logits(params, labels, inputs, is_causal=False, tokens=None):
    """Logits (B, L, codes), at least fp32, of every token given the coarser scales (HMAR).

    tokens (B, L) are needed by trees with neighbours: there the head sees, for each token, the
    neighbours that are sampled before it. ValueError if they are missing.
    """
    features = branch_features(params, "next_scale", labels, inputs, is_causal=is_causal)
    return branch_logits(params, "next_scale", features, neighbour_tokens(params, tokens))


def masked_logits(params, labels, inputs, own_inputs, mask, tokens=None):
    """Logits (B, L, codes), at least fp32, given the visible tokens of the same scale too (HMAR).

    tokens: as for `next_scale_logits`.
    """
    features = branch_features(params, "masked", labels, inputs, own_inputs, mask)
    return branch_logits(params, "masked", features, neighbour_tokens(params, tokens))


def apply_mask(params, inputs, own_inputs, mask, sizes):
    """(B, n, C): the embedded inputs, plus the visible tokens, plus an embedding where hidden.

    sizes: (h, w) of each scale of these inputs. If `zeroes_hidden(params)`, own_inputs must come
    from codes that are zero where hidden (`tokenizer.own_inputs_of_scale`). ValueError if
    own_inputs or mask do not have the shape of inputs.
    """
    if own_inputs.shape != inputs.shape or mask.shape != inputs.shape[:2]:
        got = f"own_inputs {tuple(own_inputs.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"got {got} for inputs {tuple(inputs.shape)}")

    branch = params["masked"]
    weight = branch.get("own_input", params["input"]["weight"])
    visible = convolve_by_scale(own_inputs, sizes, weight, bias=None)
    if weight.ndim == 2:  # a convolution reads visible neighbours, so hidden places keep its output
        visible = visible.masked_fill(mask[..., None], 0)
    visible = visible + mask[..., None] * branch["mask_embedding"]
    return convolve_by_scale(inputs, sizes, **params["input"]) + visible


def zeroes_hidden(params):
    """Whether the masked branch expects hidden codes to be zero; published models let them leak."""
    return "own_input" in params["masked"]


def branch_features(
    params,
    branch,
    labels,
    inputs,
    own_inputs=None,
    mask=None,
    *,
    k=None,
    is_causal=False,
    cache=None,
):
    """The features (B, n, C), fp32, that the head of a branch ("next_scale" or "masked") reads.

    own_inputs, mask: for the masked branch. k: one scale alone, for sampling. cache: for VAR's
    sampling, a list for each block, to which this function appends the (key, value) of scale k.
    """
    ks = range(len(params["positions"])) if k is None else [k]
    condition = F.embedding(labels, params["classes"])  # (B, C)
    x = embed_inputs(params, condition, inputs, own_inputs, mask, ks)  # (B, n, C)

    blocks = params["trunk"] + params[branch]["blocks"]
    sizes = [scale_sizes(params)[i] for i in ks]
    look_around = partial(convolve_by_scale, sizes=sizes)
    if cache is None:  # scale 1, because the queries already carry a learned factor
        pattern = dict(block_lengths=[h * w for h, w in sizes], is_causal=is_causal, scale=1.0)
        attends = [partial(block_sparse_attention, **pattern)] * len(blocks)
    else:
        attends = [partial(cached_attention, past=layer) for layer in cache]
    for weights, attend in zip(blocks, attends, strict=True):
        x = transformer_block(x, condition, attend, look_around, **weights)

    two = linear(F.silu(condition), **params[branch]["modulation"]).unsqueeze(1)  # (B, 1, 2 C)
    scale, shift = two.chunk(2, -1)
    return modulate(x, scale, shift)


def embed_inputs(params, condition, inputs, own_inputs, mask, ks):
    """The embeddings (B, n, C) of scales ks, which the blocks read; condition (B, C) is the class.

    own_inputs, mask: for the masked branch, otherwise None.
    """
    tokens = [condition[:, None] + params["start"]] if 0 in ks else []  # (B, len_0, C)
    if ks[-1] > 0:
        sizes = [scale_sizes(params)[i] for i in ks if i > 0]
        if mask is None:
            tokens.append(convolve_by_scale(inputs, sizes, **params["input"]))
        else:
            tokens.append(apply_mask(params, inputs, own_inputs, mask, sizes))

    rows = [params["positions"][i].flatten(0, 1) + params["levels"][i] for i in ks]
    return torch.cat(tokens, 1) + torch.cat(rows)


def transformer_block(
    x,
    condition,
    attend,
    look_around,
    modulation,
    attention,
    mlp=None,
    mlp_tanh=None,
    depthwise=None,
):
    """x (B, n, C) after attention and MLP, each modulated by condition (B, C).

    attend(query, key, value), each (B, heads, n, head_dim). look_around(x, **depthwise): a
    convolution over each scale's map, which published blocks do not have (UniFormer, Li et al.
    2022, has one in every block). mlp has exact GELU. Published blocks have mlp_tanh instead, with
    the tanh approximation, which takes six times as long in bf16 on a CPU.
    """
    if depthwise is not None:
        x = x + look_around(x, **depthwise)

    six = linear(F.silu(condition), **modulation).unflatten(1, (6, 1, -1))  # (B, 6, 1, C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(1)  # the published order

    x = x + gamma1 * self_attention(modulate(x, scale1, shift1), attend, **attention)
    x2 = modulate(x, scale2, shift2)
    if mlp is not None:
        return x + gamma2 * feed_forward(x2, **mlp)
    return x + gamma2 * feed_forward(x2, approximate="tanh", **mlp_tanh)


def self_attention(x, attend, qkv, q_bias, v_bias, log_temperature, project):
    """Cosine attention of x (B, n, C): queries and keys are normalised to unit length.

    Scores are multiplied by exp(log_temperature), a learned factor for each of the heads, clamped
    at 100.
    """
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    parts = linear(x, qkv, bias).unflatten(-1, (3, len(log_temperature), -1))
    parts = parts.permute(2, 0, 3, 1, 4)  # (3, B, heads, n, head_dim)
    qk, (v,) = parts.split([2, 1])

    # queries get the length `temperature`, keys the length 1
    temperature = log_temperature.clamp(max=math.log(100)).exp().view(1, -1, 1, 1)
    length = torch.stack([temperature, torch.ones_like(temperature)])  # (2, 1, heads, 1, 1)
    wide = torch.promote_types(qk.dtype, torch.float32)
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=wide)
    q, k = qk * (length / norm.clamp(min=1e-12)).to(qk.dtype)
    out = attend(q, k, v)
    return linear(out.transpose(1, 2).flatten(2), **project)


def cached_attention(query, key, value, past):
    """Attention to all scales so far. past lists their (key, value); the new ones are appended."""
    past.append((key, value))
    keys, values = (torch.cat(parts, 2) for parts in zip(*past))
    return F.scaled_dot_product_attention(query, keys, values, scale=1.0)


def feed_forward(x, expand, contract, approximate="none"):
    """The MLP of x (..., C) with GELU; approximate: "none" or "tanh", as torch names its forms."""
    x = linear(x, **expand)
    return linear(F.gelu(x, approximate=approximate), **contract)


def modulate(x, scale, shift):
    """Layer norm, then a scale and a shift that depend on the class, in the dtype of scale."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype)
    return torch.addcmul(shift, x, 1 + scale)


def convolve_by_scale(x, sizes, weight, bias):
    """A convolution of each scale's map by itself: x (B, n, C') -> (B, n, C).

    weight: (C, C', 3, 3), or (C, 1, 3, 3) for each channel by itself, or as published a matrix
    (C, C').
    """
    if weight.ndim == 2:
        return linear(x, weight, bias)
    groups = x.shape[-1] if weight.shape[1] == 1 else 1
    rows = []
    for part, size in zip(x.to(weight.dtype).split([h * w for h, w in sizes], 1), sizes):
        maps = part.unflatten(1, size).permute(0, 3, 1, 2)  # (B, C', h, w)
        maps = maps.contiguous(memory_format=torch.channels_last)
        maps = F.conv2d(maps, weight, bias, padding="same", groups=groups)
        rows.append(maps.permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, C)
    return torch.cat(rows, 1)


def linear(x, weight, bias):
    """The linear map of x, computed in the dtype of weight."""
    return F.linear(x.to(weight.dtype), weight, bias)


def branch_logits(params, branch, features, near=None):
    """Logits (..., codes), at least fp32, of a branch's features (..., C).

    near (..., 6): the tokens of `neighbour_tokens`, for trees with neighbours.
    """
    head, neighbours = params[branch]["head"], params[branch].get("neighbours")
    if neighbours is not None:
        features = look_at_neighbours(features, near, **neighbours)
    wide = torch.promote_types(head["weight"].dtype, torch.float32)
    return linear(features, **head).to(wide)


def look_at_neighbours(features, near, embedding, expand, contract):
    """features (..., C) plus an MLP of them and of the neighbouring tokens near (..., 6).

    embedding (6, codes + 1, C): one table for each of NEIGHBOURS.
    """
    x = F.layer_norm(features, features.shape[-1:], eps=1e-6)
    for table, codes in zip(embedding, near.unbind(-1), strict=True):
        x = x + F.embedding(codes, table)
    return features + feed_forward(x, expand, contract)


def neighbour_tokens(params, tokens, k=None):
    """The six NEIGHBOURS (B, n, 6) of each of tokens (B, n), of scale k or of all scales.

    Beyond the edge of a map stands the number `codes`. Returns None for trees without neighbours;
    ValueError if tokens is None although the tree has them.
    """
    if "neighbours" not in params["next_scale"]:
        return None
    if tokens is None:
        raise ValueError("tokens: got None, but the head of this tree looks at neighbours")

    sizes = scale_sizes(params) if k is None else [scale_sizes(params)[k]]
    codes, near = len(params["next_scale"]["head"]["bias"]), []
    for part, (h, w) in zip(tokens.split([h * w for h, w in sizes], 1), sizes, strict=True):
        # Two rows above, two columns to the left and one to the right: as far as NEIGHBOURS reach.
        maps = F.pad(part.unflatten(1, (h, w)), (2, 1, 2, 0), value=codes)  # (B, h + 2, w + 3)
        shifted = [maps[:, 2 + y : 2 + y + h, 2 + x : 2 + x + w] for y, x in NEIGHBOURS]
        near.append(torch.stack(shifted, -1).flatten(1, 2))  # (B, h w, 6)
    return torch.cat(near, 1)


def waves(params, k):
    """The order in which tokens of scale k are sampled: [positions (m,), ...].

    Without neighbours all tokens are sampled at once: [slice(None)]. With them, there is a wave for
    each value of column + 2 row, so that the NEIGHBOURS of a token lie in earlier waves.
    """
    if "neighbours" not in params["next_scale"]:
        return [slice(None)]
    h, w = scale_sizes(params)[k]
    wave = (torch.arange(w) + 2 * torch.arange(h)[:, None]).flatten()  # (h w,)
    device = params["start"].device
    return [(wave == number).nonzero()[:, 0].to(device) for number in wave.unique()]


# ---- losses


def next_scale_losses(params, labels, tokens, inputs, is_causal=False):
    """Cross entropy (B, L), fp32, nats, of tokens under next_scale_logits."""
    features = branch_features(params, "next_scale", labels, inputs, is_causal=is_causal)
    return token_losses(params, "next_scale", features, tokens).view(tokens.shape)


def masked_losses(params, labels, tokens, inputs, own_inputs, mask):
    """Cross entropy (M,), fp32, nats, of the M hidden tokens, in the order of mask."""
    features = branch_features(params, "masked", labels, inputs, own_inputs, mask)
    hidden = F.pad(mask, (len(params["start"]), 0)).flatten().nonzero()[:, 0]
    return token_losses(params, "masked", features, tokens, hidden)


def token_losses(params, branch, features, tokens, chosen=None):
    """Cross entropy (B L,) of tokens (B, L), or of those at positions chosen (N,) of all B L.

    The head runs on the chosen tokens only.
    """
    near = neighbour_tokens(params, tokens)  # (B, L, 6), or None
    features, targets = features.flatten(0, 1), tokens.flatten()
    near = None if near is None else near.flatten(0, 1)
    if chosen is not None:
        features, targets = features.index_select(0, chosen), targets.index_select(0, chosen)
        near = None if near is None else near.index_select(0, chosen)
    logits = branch_logits(params, branch, features, near)
    return F.cross_entropy(logits, targets, reduction="none")


def scale_weights(scales, kind):
    """The weight (L,), fp32, of each token in the loss; weights sum to 1 and are equal in a scale.

    kind: "token" weighs all tokens equally (VAR); "scale" all scales equally; "lognormal", as HMAR
    calls it, gives scale k the weight exp(-z^2 / 2), where z is the standardised side of scale
    S - 1 - k. The order is reversed, as in the published code.
    """
    counts = torch.tensor(scales, dtype=torch.float64).prod(1)  # (S,)
    sides = (counts / counts[-1]).sqrt().flip(0)
    spread = sides.std() if len(sides) > 1 else 0
    standardised = ((sides - sides.mean()) / spread).nan_to_num()  # 0 if all have one size
    density = torch.exp(-0.5 * standardised.square())
    mass = dict(token=counts, scale=torch.ones_like(counts), lognormal=density)[kind]
    return (mass / mass.sum() / counts).repeat_interleave(counts.long()).float()


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
    seed=0,
):
    """A new tree for next-scale prediction, fp32, initialised as published; sizes follow depth.

    width: C, 64 * depth if None. heads: width / 64 if None. gamma scales the gates; None: 1e-3,
    1e-4 from depth 24 on, 1e-5 from depth 30 on. convolutions: 3 x 3 convolutions of the inputs and
    in each block. neighbours: the head sees tokens of its own scale that are sampled before.
    Published trees have neither. On torch.device("meta") nothing is allocated.
    """
    width = width or 64 * depth
    heads = heads or max(1, width // 64)
    if gamma is None:
        gamma = 1e-3 * 0.1 ** ((depth >= 24) + (depth >= 30))
    normal = partial(_normal, width, torch.Generator().manual_seed(seed))  # (*shape)
    affine = partial(_affine, normal)  # (inputs, outputs, gain)

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
        params["input"]["weight"] = normal(width, code_dim, 3, 3)
        for tree in params["trunk"]:
            tree["depthwise"] = dict(weight=normal(width, 1, 3, 3), bias=torch.zeros(width))
    if neighbours:
        embedding = normal(len(NEIGHBOURS), codes + 1, width)
        look = dict(embedding=embedding, expand=affine(width, 2 * width))
        look["contract"] = affine(2 * width, width, 0.02)
        params["next_scale"]["neighbours"] = look
    return params


# `cast` casts the leaves below these keys, and the products that use them follow. The temperatures
# of attention, the residual stream, embeddings, the modulation of heads and losses stay in fp32.
CAST_KEYS = {"trunk", "blocks", "head", "expand", "contract"}

# `train.py` trains the leaves below these keys and all vectors by AdamW, the other matrices and
# convolutions by Muon.
TABLES = {"classes", "start", "levels", "positions", "embedding", "head", "modulation", "depthwise"}


def is_table(keys, leaf):
    """Whether AdamW trains a leaf below these keys, although it may be a matrix."""
    embeds_codes = leaf.ndim == 2 and keys & {"input", "own_input"}  # published; not a convolution
    return bool(keys & TABLES or embeds_codes)


def cast(params, dtype):
    """The same tree with blocks and heads (CAST_KEYS) in dtype; gradients pass through."""

    def move(path, leaf):
        keys = {getattr(entry, "key", None) for entry in path}
        is_moved = keys & CAST_KEYS and "log_temperature" not in keys
        return leaf.to(dtype) if is_moved else leaf

    return pytree.tree_map_with_path(move, params)


def _normal(width, generator, *shape):
    std = math.sqrt(1 / (3 * width))
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=std, generator=generator)


def _affine(normal, inputs, outputs, gain=1.0):
    return dict(weight=normal(outputs, inputs).mul_(gain), bias=torch.zeros(outputs))


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


def add_masked_branch(params, blocks=8, own_input=True, seed=0):
    """The same tree with a masked branch: a copy of the last blocks and of the head.

    trunk [1 2 3 4] -> trunk [1 2], next_scale [3 4], masked [copies of 3 4], for 2 blocks.
    own_input: the input weight is copied too, for the tokens of the same scale; published trees
    have no such copy. ValueError if there is a masked branch, or if blocks is not 1 to all.
    """
    every = params["trunk"] + params["next_scale"]["blocks"]
    if "masked" in params or not 1 <= blocks <= len(every):
        raise ValueError(f"blocks: got {blocks}, expected 1 to {len(every)}, and only once")

    next_scale = params["next_scale"] | dict(blocks=every[-blocks:])
    masked = pytree.tree_map(torch.clone, next_scale)
    width = params["classes"].shape[1]
    embedding = _normal(width, torch.Generator().manual_seed(seed), width)
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
    ("class_emb.weight", "classes"),
    ("pos_start", "start"),
    ("pos_1LC", "positions"),
    ("lvl_embed.weight", "levels"),
    ("word_embed[._]", "input."),
    ("^(base_)?blocks", "trunk"),
    ("mask_embed.weight", "masked.mask_embedding"),
    ("^head", "ns_head"),  # VAR's, as HMAR calls it
    ("^ns_", "next_scale."),
    ("^mask_", "masked."),
    ("(.head_nm)?.ada_lin.1", ".modulation"),
    ("ffn.fc1", "mlp_tanh.expand"),
    ("ffn.fc2", "mlp_tanh.contract"),
    ("attn", "attention"),
    ("proj", "project"),
    ("mat_qkv.weight", "qkv"),
    ("scale_mul_1H11", "log_temperature"),
)
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")  # ends of names of no weights


def from_published(state_dict, scales=None):
    """A tree, fp32, from the state dict of VAR, of HMAR after stage one, or with both branches.

    scales may be left out for 680, 2240 and 9451 tokens. ValueError if an entry is missing that
    such a model has, or if the scales do not have as many tokens as the state dict.
    """
    params = {}
    try:
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

        shared = params.pop("shared", None)  # VAR-d36: its blocks differ in a bias only
        for tree in params["trunk"] if shared else ():
            bias = shared["modulation"]["bias"] + tree.pop("ada_gss").flatten()
            tree["modulation"] = shared["modulation"] | dict(bias=bias)

        # the positions of all scales are published in one row
        rows = params["positions"]
        published = {sum(h * w for h, w in sizes): sizes for sizes in SCALES.values()}
        scales = published.get(len(rows), ()) if scales is None else scales
        counts = [h * w for h, w in scales]
        if sum(counts) != len(rows):
            raise ValueError(f"scales: got {scales}, expected some of {len(rows)} tokens")
        params["positions"] = [x.unflatten(0, hw) for x, hw in zip(rows.split(counts), scales)]

        missing = {"classes", "start", "levels", "input"} - params.keys()
        for branch in ("next_scale", "masked"):  # weights of stage two alone have half a branch
            missing |= {"head", "modulation"} - params.get(branch, params["next_scale"]).keys()
        if missing:
            raise LookupError(", ".join(sorted(missing)))
        return params
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"state_dict: not a transformer's: {reason}") from error


def published_is_causal(state_dict):
    """Whether published weights contain VAR's block-causal attention mask."""
    mask = state_dict.get("attn_bias_for_masking")
    return mask is not None and bool(mask[0, 0, -1, 0] == 0)  # the last token sees the first
