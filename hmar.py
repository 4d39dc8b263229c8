"""The HMAR transformer: from a pyramid of token maps, as features, to logits of every token.

    labels (B,), inputs (B, L - len_0, code_dim) -> sequence (B, L, C) -> blocks -> logits (B, L, codes)

A sequence holds all scales, coarse to fine: scale 0 is made of start tokens and the class, each later
one of `inputs`, the accumulated reconstruction of those before it. Attention stays inside a scale
(block-diagonal), so no scale needs another's keys: that is the Markov property, and why sampling keeps
no cache. With is_causal=True the same functions are VAR, where a scale attends to the coarser ones too.
The masked branch shares the first blocks (the trunk) and sees, besides, the visible tokens of the scale
itself: `masked_input` is where the mask goes.

A model is a tree of tensors: its keys are argument names of the functions below, its shapes are its
configuration.

    >>> params = init(depth=2, classes=10, codes=64, code_dim=8, scales=((1, 1), (2, 2)))
    >>> next_scale_logits(params, torch.tensor([3, 7]), torch.randn(2, 4, 8)).shape
    torch.Size([2, 5, 64])

Sources: HMAR (Kumbong et al. 2025), VAR (Tian et al. 2024), adaptive layer norm of DiT (Peebles 2023).
"""

import math
import re
from functools import partial
from operator import index

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from attention_kernels import block_sparse_attention


def _squares(*sides):
    return tuple((side, side) for side in sides)


SCALES = {  # published, by the image's side in pixels, for a tokenizer that downsamples by 16
    256: _squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: _squares(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: _squares(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
LOSS_SLICE = 1 << 25  # logits that the loss holds at once: 128 MiB of fp32


def scales(params):
    """((h_0, w_0), ...): the scales that a tree is made for, read off its positions."""
    return tuple(tuple(position.shape[:2]) for position in params["positions"])


def next_scale_logits(params, labels, inputs, is_causal=False):
    """Logits (B, L, codes), fp32, of every token given the coarser scales (VAR; HMAR, next-scale branch).

    labels (B,) int64, 0 to the number of classes, which is the null class. inputs (B, L - len_0,
    code_dim) from tokenizer.next_scale_inputs. is_causal: attend to coarser scales too (VAR).
    ValueError on what does not fit the tree.
    """
    features = next_scale_features(params, labels, inputs, is_causal)
    return logits(features, **params["next_scale"]["head"])


def masked_logits(params, labels, inputs, own_inputs, mask):
    """Logits (B, L, codes), fp32, given the scale's visible tokens too (HMAR, masked branch).

    labels, inputs: as above. own_inputs (B, L - len_0, code_dim) from tokenizer.masked_inputs. mask
    (B, L - len_0) bool, True = hidden; scale 0 never is. ValueError on what does not fit the tree.
    """
    features = masked_features(params, labels, inputs, own_inputs, mask)
    return logits(features, **params["masked"]["head"])


def next_scale_features(params, labels, inputs, is_causal=False, gates=None, checkpointing=False):
    """(B, L, C), fp32: what the next-scale head reads; arguments as for next_scale_losses."""
    lengths = _checked_lengths(params, labels, inputs)
    x = sequence(params, labels, linear(inputs, **params["input"]))
    attend = partial(block_sparse_attention, block_lengths=lengths, is_causal=is_causal, scale=1.0)
    return run(params, params["next_scale"], labels, x, attend, gates, checkpointing)


def masked_features(params, labels, inputs, own_inputs, mask, gates=None, checkpointing=False):
    """(B, L, C), fp32: what the masked head reads; arguments as for masked_losses."""
    lengths = _checked_lengths(params, labels, inputs)
    x = sequence(params, labels, masked_input(params, inputs, own_inputs, mask))
    attend = partial(block_sparse_attention, block_lengths=lengths, scale=1.0)
    return run(params, params["masked"], labels, x, attend, gates, checkpointing)


def scale_features(params, labels, inputs, k, cache=None):
    """(B, n_k, C), fp32: what the next-scale head reads at scale k alone.

    inputs (B, n_k, code_dim), None for scale 0. With a cache from new_cache it is VAR: scale k attends
    to those before it, and its keys and values go in. ValueError on what does not fit the tree.
    """
    lengths = _checked_lengths(params, labels, inputs, k)
    x = linear(inputs, **params["input"]) if k else start_tokens(params, labels)
    attend = partial(block_sparse_attention, block_lengths=lengths, scale=1.0)
    if cache is not None:
        end = sum(h * w for h, w in scales(params)[: k + 1])
        attend = [partial(cached_attention, past=layer[..., :end, :]) for layer in cache]
    return run(params, params["next_scale"], labels, x + places(params, k), attend)


def masked_scale_features(params, labels, inputs, own_inputs, mask, k):
    """(B, n_k, C), fp32: what the masked head reads at scale k >= 1 alone.

    inputs and own_inputs (B, n_k, code_dim), mask (B, n_k). ValueError on what does not fit the tree.
    """
    lengths = _checked_lengths(params, labels, inputs, k, least=1)
    x = masked_input(params, inputs, own_inputs, mask)
    attend = partial(block_sparse_attention, block_lengths=lengths, scale=1.0)
    return run(params, params["masked"], labels, x + places(params, k), attend)


def masked_input(params, inputs, own_inputs, mask):
    """(B, n, C): the coarser scales plus the own tokens, or the mask embedding where these are hidden."""
    if "masked" not in params:
        raise ValueError("params: this tree has no masked branch; add_masked_branch makes one")
    _expect("own_inputs", own_inputs, inputs.shape)
    _expect("mask", mask, inputs.shape[:2], torch.bool)

    branch = params["masked"]
    weight = branch.get("own_input", params["input"]["weight"])  # published trees share it
    own = linear(own_inputs, weight)
    own = torch.where(mask[..., None], branch["mask_embedding"].to(own.dtype), own)
    return linear(inputs, **params["input"]) + own


def start_tokens(params, labels):
    """(B, len_0, C): scale 0 knows the class alone."""
    return F.embedding(labels, params["classes"])[:, None] + params["start"]


def places(params, k):
    """(n_k, C): what tells the tokens of scale k where they are."""
    return params["positions"][k].flatten(0, 1) + params["levels"][k]


def sequence(params, labels, later):
    """(B, L, C): start tokens and later (B, L - len_0, C), all told where they are."""
    everywhere = [places(params, k) for k in range(len(params["positions"]))]
    return torch.cat([start_tokens(params, labels), later], 1) + torch.cat(everywhere)


def run(params, branch, labels, x, attend, gates=None, checkpointing=False):
    """(B, n, C): x through the trunk, a branch's blocks and its layer norm.

    attend: as for block, or a list of one for each block.
    """
    blocks = params["trunk"] + branch["blocks"]
    condition = F.embedding(labels, params["classes"])  # (B, C)
    attends = attend if isinstance(attend, list) else [attend] * len(blocks)
    if gates is not None:
        _expect("gates", gates, (len(labels), len(blocks), 2))

    for i, weights in enumerate(blocks):
        arguments = (x, condition, attends[i], None if gates is None else gates[:, i])
        if checkpointing:
            x = checkpoint(block, *arguments, use_reentrant=False, **weights)
        else:
            x = block(*arguments, **weights)

    two = linear(F.silu(condition), **branch["modulation"]).unsqueeze(1)  # (B, 1, 2 C)
    scale, shift = two.chunk(2, -1)
    return modulate(x, scale, shift)


def block(x, condition, attend, gates, modulation, attention, mlp):
    """x (B, n, C) after attention and MLP, each modulated by condition (B, C).

    attend(query, key, value), each (B, heads, n, head_dim). gates (B, 2) scale the two updates.
    """
    six = linear(F.silu(condition), **modulation).unsqueeze(1)  # (B, 1, 6 C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.chunk(6, -1)  # the published order
    if gates is not None:
        gamma1 = gamma1 * gates[:, :1, None]
        gamma2 = gamma2 * gates[:, 1:, None]

    x = x + gamma1 * self_attention(modulate(x, scale1, shift1), attend, **attention)
    return x + gamma2 * feed_forward(modulate(x, scale2, shift2), **mlp)


def self_attention(x, attend, qkv, q_bias, v_bias, log_temperature, project):
    """(B, n, C): attention of unit-length queries and keys, log_temperature (heads,) at most log 100."""
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    heads = linear(x, qkv, bias).unflatten(-1, (3, len(log_temperature), -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, n, head_dim) each

    temperature = log_temperature.clamp(max=math.log(100)).exp()[:, None, None]
    out = attend(of_length(temperature, q), of_length(1.0, k), v)
    return linear(out.transpose(1, 2).flatten(2), **project)


def of_length(length, x):
    """x, scaled to a length along its last dimension, in fp32."""
    wide_x = wide(x)
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    return (wide_x * (length / norm.clamp(min=1e-12))).to(x.dtype)


def cached_attention(query, key, value, past):
    """Attention to every scale so far. past (2, B, heads, tokens, head_dim): its end is filled here."""
    past[0, :, :, -key.shape[2] :] = key
    past[1, :, :, -key.shape[2] :] = value
    return F.scaled_dot_product_attention(query, past[0], past[1], scale=1.0)


def feed_forward(x, expand, contract):
    """(B, n, C): the MLP, four times as wide inside, tanh-GELU."""
    return linear(F.gelu(linear(x, **expand), approximate="tanh"), **contract)


def modulate(x, scale, shift):
    """Layer norm without weights of its own, scaled and shifted by the class."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def linear(x, weight, bias=None):
    """The product in the weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, bias)


def logits(features, weight, bias):
    """Logits (..., codes), fp32, of features (..., C): the head."""
    return wide(linear(features, weight, bias))


def wide(x):
    """x in fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(params, dtype):
    """The same tree with its blocks' and heads' weights in dtype, for products in it; gradients pass.

    Temperatures and all else stay, and so do residual stream, softmax and losses in fp32.
    """

    def move(path, leaf):
        names = {getattr(key, "key", None) for key in path}
        narrow = names & {"trunk", "blocks", "head"} and "log_temperature" not in names
        return leaf.to(dtype) if narrow else leaf

    return pytree.tree_map_with_path(move, params)


def new_cache(params, batch):
    """Room for keys and values, (2, batch, heads, L, head_dim) a block, for VAR's scale_features."""
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    heads = len(blocks[0]["attention"]["log_temperature"])
    total = sum(h * w for h, w in scales(params))
    shape = (2, batch, heads, total, params["classes"].shape[1] // heads)
    return [block["attention"]["qkv"].new_empty(shape) for block in blocks]


# ---- losses


def next_scale_losses(
    params, labels, tokens, inputs, is_causal=False, *, gates=None, checkpointing=False
):
    """Cross entropy (B, L), fp32, in nats, of tokens (B, L) int64 under next_scale_logits.

    Other arguments as there. gates (B, depth, 2) from stochastic_depth. checkpointing: keep each
    block's input alone for the backward pass and compute the rest again. ValueError on what does not fit.
    """
    features = next_scale_features(params, labels, inputs, is_causal, gates, checkpointing)
    head = params["next_scale"]["head"]
    _expect("tokens", tokens, features.shape[:2], torch.int64, below=len(head["bias"]))
    return token_losses(features.flatten(0, 1), tokens.flatten(), **head).view(tokens.shape)


def masked_losses(
    params,
    labels,
    tokens,
    inputs,
    own_inputs,
    mask,
    *,
    places=None,
    gates=None,
    checkpointing=False,
):
    """Cross entropy (M,), fp32, in nats, of the M hidden ones of tokens (B, L) int64, in mask's order.

    Other arguments as for masked_logits and next_scale_losses. places (M,) int64: mask.flatten()
    .nonzero() where the caller has it, since asking a GPU for it would stall its queue.
    """
    features = masked_features(params, labels, inputs, own_inputs, mask, gates, checkpointing)
    head = params["masked"]["head"]
    _expect("tokens", tokens, features.shape[:2], torch.int64, below=len(head["bias"]))
    if places is None:
        places = mask.flatten().nonzero()[:, 0]

    first = len(params["start"])
    hidden = features[:, first:].flatten(0, 1).index_select(0, places)  # (M, C)
    targets = tokens[:, first:].flatten().index_select(0, places)  # (M,)
    return token_losses(hidden, targets, **head)


def token_losses(features, targets, weight, bias):
    """Cross entropy (N,) of targets (N,) under the head's logits of features (N, C).

    Beyond LOSS_SLICE logits are computed in slices, and again in the backward pass.
    """

    def loss(features, targets):
        return F.cross_entropy(logits(features, weight, bias), targets, reduction="none")

    rows = max(1, LOSS_SLICE // len(weight))
    if len(features) <= rows:
        return loss(features, targets)
    slices = zip(features.split(rows), targets.split(rows))
    return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in slices])


def scale_weights(scales, kind):
    """Weight of each token in the loss, (L,) fp32, summing to 1; tokens share a scale's mass equally.

    kind: "token", all tokens alike (VAR); "scale", all scales alike; "lognormal", a normal density of
    the relative sides, reversed and standardised (HMAR). ValueError on another.
    """
    if kind not in ("token", "scale", "lognormal"):
        raise ValueError(f'kind: got {kind!r}, expected "token", "scale" or "lognormal"')
    counts = torch.tensor([h * w for h, w in scales], dtype=torch.float64)  # (S,)
    mass = counts if kind == "token" else torch.ones_like(counts)
    sides = (counts / counts[-1]).sqrt().flip(0)
    if kind == "lognormal" and (sides != 1).any():  # scales of one size are all alike
        mass = torch.exp(-0.5 * ((sides - sides.mean()) / sides.std()).square())
    return (mass / mass.sum() / counts).repeat_interleave(counts.long()).float()


def stochastic_depth(uniform, rate):
    """Gates (B, depth, 2) of each block's two updates: 0 where dropped, else 1 / the share kept.

    uniform (B, depth, 2) in [0, 1). rate in [0, 1): the last block's; it rises linearly from 0.
    """
    kept = 1 - torch.linspace(0, rate, uniform.shape[1], device=uniform.device)[:, None]
    return (uniform < kept) / kept


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
    seed=0,
):
    """A new tree for next-scale prediction, fp32, initialised as VAR's; its sizes follow from depth.

    width is 64 * depth by default, heads width / 64, and gamma, which scales the gates, 1e-3, from
    depth 24 1e-4, from 30 1e-5. Under torch.device("meta") nothing is allocated. ValueError on sizes
    below 1 and a width that heads do not divide.
    """
    width = 64 * depth if width is None else width
    heads = max(1, width // 64) if heads is None else heads
    sizes = dict(depth=depth, classes=classes, codes=codes, code_dim=code_dim)
    sizes |= dict(width=width, heads=heads)
    if min(sizes.values()) < 1 or width % heads:
        raise ValueError(f"sizes: got {sizes}, expected 1 or more and heads that divide the width")
    scales = _pairs(scales)
    if gamma is None:
        gamma = next(
            value for least, value in ((30, 1e-5), (24, 1e-4), (0, 1e-3)) if depth >= least
        )
    generator = None if torch.empty(0).is_meta else torch.Generator().manual_seed(seed)

    def normal(*shape, gain=1.0):
        std = math.sqrt(1 / (3 * width))
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=std, generator=generator).mul_(
            gain
        )

    def affine(inputs, outputs, gain=1.0):
        return dict(weight=normal(outputs, inputs, gain=gain), bias=torch.zeros(outputs))

    return dict(
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


def _new_block(normal, affine, width, heads, depth, gamma):
    modulation = affine(width, 6 * width)
    modulation["weight"][: 2 * width] *= gamma
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
    """The same tree with a masked branch: copies of the last blocks and the head; the rest is shared.

    own_input: an input weight for a scale's own tokens, at first a copy of the shared one; the
    published model has none. ValueError if there is a branch already, or fewer blocks.
    """
    every = params["trunk"] + params["next_scale"]["blocks"]
    if "masked" in params or not 1 <= blocks <= len(every):
        expected = f"1 to {len(every)}, for a tree that has no masked branch yet"
        raise ValueError(f"blocks: got {blocks}, expected {expected}")

    next_scale = params["next_scale"] | dict(blocks=every[-blocks:])
    masked = pytree.tree_map(torch.clone, next_scale)
    embedding = torch.empty(params["classes"].shape[1], device="cpu")
    std = math.sqrt(1 / (3 * len(embedding)))
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.trunc_normal_(embedding, std=std, generator=generator)
    masked["mask_embedding"] = embedding.to(params["classes"])
    if own_input:
        masked["own_input"] = params["input"]["weight"].clone()
    return params | dict(trunk=every[:-blocks], next_scale=next_scale, masked=masked)


def resize_positions(params, scales):
    """The same weights for other scales, to be fine-tuned at another resolution or shape.

    Each new scale takes after the old one of the nearest relative size: its level, and its positions,
    resampled bicubically. ValueError unless scales are (height, width) pairs.
    """
    scales = _pairs(scales)
    old = [position.shape[:2] for position in params["positions"]]

    def resample(grid, size):  # (h, w, C) -> (*size, C)
        wide_grid = grid.permute(2, 0, 1)[None].float()
        resized = F.interpolate(wide_grid, size, mode="bicubic")[0].permute(1, 2, 0)
        return resized.to(grid.dtype).contiguous()

    def relative(sizes):
        areas = torch.tensor([h * w for h, w in sizes])
        return (areas / areas[-1]).sqrt()

    source = (relative(scales)[:, None] - relative(old)).abs().argmin(1).tolist()
    start = resample(params["start"].unflatten(0, old[0]), scales[0]).flatten(0, 1)
    positions = [resample(params["positions"][k], size) for k, size in zip(source, scales)]
    return params | dict(start=start, levels=params["levels"][source], positions=positions)


# ---- what fits


def _pairs(scales):
    """scales as a tuple of pairs. ValueError unless they are pairs of positive integers."""
    try:
        pairs = tuple((index(height), index(width)) for height, width in scales)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or min(map(min, pairs)) < 1:
        expected = "(height, width) pairs of positive integers"
        raise ValueError(f"scales: got {scales}, expected {expected}")
    return pairs


def _checked_lengths(params, labels, inputs, k=None, least=0):
    """[tokens of each scale], all or k alone. ValueError where an argument does not fit the tree."""
    lengths = [h * w for h, w in scales(params)]
    batch = labels.numel() if torch.is_tensor(labels) else 0
    _expect("labels", labels, (batch,), torch.int64, below=len(params["classes"]))
    if k is not None and k not in range(least, len(lengths)):
        raise ValueError(f"k: got {k}, expected a scale from {least} to {len(lengths) - 1}")
    if k != 0:
        count = sum(lengths[1:]) if k is None else lengths[k]
        _expect("inputs", inputs, (batch, count, params["input"]["weight"].shape[1]))
    return lengths if k is None else [lengths[k]]


def _expect(name, tensor, shape, dtype=None, below=None):
    """ValueError unless tensor has this shape, dtype (None: any float), and values 0 to below - 1."""
    got = type(tensor).__name__
    fits = False
    if torch.is_tensor(tensor):
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        is_right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        fits = is_right and tensor.shape == shape
    if not fits:
        raise ValueError(f"{name}: got {got}, expected {dtype or 'floats'} {tuple(shape)}")

    # on an accelerator a look at the values would stall its queue
    is_seen = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    if below is not None and is_seen and tensor.numel():
        low, high = tensor.aminmax()
        if low < 0 or high >= below:
            raise ValueError(f"{name}: got values {low} to {high}, expected 0 to {below - 1}")


def check(params):
    """None; ValueError that lists the leaves unless params is a whole tree, as init and surgery make it.

    Names and shapes are compared; leaves must be dense floats and, where a CPU can tell, finite.
    """
    try:
        leaves = _named(params)
    except RecursionError:
        raise ValueError("params: holds itself") from None
    template = _fitted("params", leaves)
    pytree.tree_map(lambda *_: None, template, params)  # ValueError where a list should be a dict


def _named(tree):
    """{name: leaf}, a name such as trunk.0.attention.qkv."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {".".join(re.findall(r"\w+", pytree.keystr(path))): leaf for path, leaf in leaves}


def _fitted(what, leaves):
    """A tree without values that leaves, {name: leaf}, fit. ValueError that lists those that do not."""
    template = _template(leaves)
    expected = _named(template)
    problems = []
    for name in expected | leaves:
        got = _described(leaves.get(name))
        wanted = _described(expected.get(name))
        if got != wanted:
            problems.append(f"{name} is {got}, expected {wanted}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{what}: {', '.join(problems[:10])}{more}")
    return template


def _described(leaf):
    """In words, the same of leaves that may stand for each other."""
    if not _is_dense(leaf):
        return "missing" if leaf is None else type(leaf).__name__
    if leaf.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return str(leaf.dtype)
    if leaf.device.type == "cpu" and not leaf.isfinite().all():
        return "not finite"
    return f"floats {tuple(leaf.shape)}"


def _is_dense(leaf):
    return torch.is_tensor(leaf) and leaf.layout == torch.strided and not leaf.is_nested


def _template(leaves):
    """A tree without values, of the sizes that some leaves have: what all should be like."""

    def sizes(name, ndim):  # ones where there is no such leaf, which the comparison will tell
        leaf = leaves.get(name)
        fits = _is_dense(leaf) and leaf.ndim == ndim and leaf.numel() > 0
        return tuple(leaf.shape) if fits else (1,) * ndim

    def count(stack):
        inside = [name.removeprefix(stack) for name in leaves if name.startswith(stack)]
        return len({name.split(".")[0] for name in inside})

    is_masked = any(name.startswith("masked.") for name in leaves)
    trunk = count("trunk.")
    branch = max(is_masked, count("masked.blocks." if is_masked else "next_scale.blocks."))
    first = "trunk.0" if trunk else "next_scale.blocks.0"
    heads = sizes(f"{first}.attention.log_temperature", 1)[0]
    classes, width = sizes("classes", 2)
    options = dict(
        depth=max(1, trunk + branch),
        classes=max(1, classes - 1),
        codes=sizes("next_scale.head.bias", 1)[0],
        code_dim=sizes("input.weight", 2)[1],
        scales=[sizes(f"positions.{k}", 3)[:2] for k in range(max(1, count("positions.")))],
        width=width,
        heads=heads if width % heads == 0 else 1,
    )
    try:
        with torch.device("meta"):
            template = init(**options)
            if branch:
                template = add_masked_branch(template, branch, "masked.own_input" in leaves)
    except RuntimeError as error:
        raise ValueError(f"sizes: got {options}, which no memory holds") from error
    if not is_masked:
        template.pop("masked", None)
    return template


# ---- published weights

PUBLISHED_NAMES = (  # patterns of their names, what becomes of them, in this order
    (r"^class_emb\.weight$", "classes"),
    (r"^pos_start$", "start"),
    (r"^pos_1LC$", "positions"),
    (r"^lvl_embed\.weight$", "levels"),
    (r"^word_embed[._]", "input."),
    (r"^(base_)?blocks\.", "trunk."),
    (r"^mask_embed\.weight$", "masked.mask_embedding"),
    (r"^(ns_)?head", "next_scale.head"),
    (r"^ns_", "next_scale."),
    (r"^mask_", "masked."),
    (r"(\.head_nm)?\.ada_lin\.1\.", ".modulation."),
    (r"\.ffn\.fc1\.", ".mlp.expand."),
    (r"\.ffn\.fc2\.", ".mlp.contract."),
    (r"\.attn\.proj\.", ".attention.project."),
    (r"\.attn\.mat_qkv\.weight$", ".attention.qkv"),
    (r"\.attn\.scale_mul_1H11$", ".attention.log_temperature"),
    (r"\.attn\.", ".attention."),
)
BUFFERS = ("lvl_1L", "attn_bias_for_masking", ".attn.zero_k_bias")


def from_published(state_dict, scales=None, *, dtype=torch.float32):
    """A tree from a state dict of VAR, HMAR after stage one or the combined HMAR, or VAR's trainer's file.

    scales may be left out for the published lengths of 680, 2240 and 9451 tokens. ValueError lists, by
    our names, what is missing, unexpected or misshaped, or says what does not fit the scales.
    """
    state = _transformer_state(state_dict)
    scales = _published_scales(state, scales)
    leaves = {}
    for published in [name for name in state if not name.endswith(BUFFERS)]:
        name = published
        for theirs, ours in PUBLISHED_NAMES:
            name = re.sub(theirs, ours, name)
        if name in leaves:
            raise ValueError(f"state_dict: {published} is the second {name}")
        leaf = state[published]
        if _is_dense(leaf) and name.endswith("log_temperature"):
            leaf = leaf.flatten()  # (1, heads, 1, 1)
        elif _is_dense(leaf) and name in ("start", "positions", "masked.mask_embedding"):
            leaf = leaf.squeeze(0)
        leaves[name] = leaf

    rows = leaves.pop("positions").split([h * w for h, w in scales])
    for k, size in enumerate(scales):
        leaves[f"positions.{k}"] = rows[k].unflatten(0, size)
    template = _fitted("state_dict", leaves)
    names = iter(_named(template))
    return pytree.tree_map(lambda _: leaves[next(names)].to(dtype), template)


def published_is_causal(state_dict):
    """Whether published weights come with VAR's block-causal mask; None without any."""
    mask = _transformer_state(state_dict).get("attn_bias_for_masking")
    if mask is None:
        return None
    if not _is_dense(mask) or mask.ndim != 4 or mask.numel() == 0:
        raise ValueError("state_dict: attn_bias_for_masking is no (1, 1, L, L) tensor")
    return bool(mask[0, 0, -1, 0] == 0)  # may the last token see the first one


def _transformer_state(state_dict):
    """{name: tensor}: the state dict itself or the transformer's in a VAR trainer's file."""
    for name in ("trainer", "var_wo_ddp"):
        if isinstance(state_dict, dict):
            state_dict = state_dict.get(name, state_dict)
    state = state_dict if isinstance(state_dict, dict) else {}
    return {str(name): leaf for name, leaf in state.items()}


def _published_scales(state, scales):
    """The scales of a published state, by default those of its length. ValueError if it says others."""
    rows = [state.get(name) for name in ("pos_1LC", "pos_start")]
    if not all(_is_dense(leaf) and leaf.ndim == 3 for leaf in rows):
        names = ", ".join(list(state)[:10]) or "nothing"
        expected = "VAR, HMAR after stage one or the combined HMAR"
        raise ValueError(f"state_dict: expected {expected}, got {names}")
    total, first = (leaf.shape[1] for leaf in rows)
    known = {sum(h * w for h, w in sizes): sizes for sizes in SCALES.values()}
    if scales is None and total not in known:
        raise ValueError(f"scales: must be given for {total} tokens; known are {list(known)}")
    scales = _pairs(known[total] if scales is None else scales)
    counts = [h * w for h, w in scales]
    if sum(counts) != total or counts[0] != first:
        got = f"{sum(counts)} tokens, the first {counts[0]}"
        raise ValueError(f"scales: {scales} hold {got}; these weights have {total} and {first}")

    levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (L,)
    visible = [levels[:, None] == levels, levels[:, None] >= levels]  # block-diagonal, block-causal
    for name, buffer in state.items():
        allowed = []
        if name == "lvl_1L":
            allowed = [levels]
        elif name == "attn_bias_for_masking":
            allowed = [torch.zeros(total, total).masked_fill(~mask, -torch.inf) for mask in visible]
        elif name.endswith(BUFFERS):
            allowed = [torch.zeros(rows[0].shape[2])]
        if allowed and not any(_same(buffer, values) for values in allowed):
            raise ValueError(f"scales: {scales} do not fit the values of {name}")
    return scales


def _same(buffer, values):
    return _is_dense(buffer) and torch.equal(buffer.squeeze().cpu().to(values.dtype), values)
