"""Multi-scale residual VQ tokenizer: images <-> a pyramid of token maps, coarse to fine.

    images (B, 3, H, W) in [-1, 1] -> features (B, code_dim, h, w) -> tokens (B, L) int64
    tokens -> f_hat (B, code_dim, h, w) -> images

`scales` is ((h_0, w_0), ..., (h, w)), coarse to fine; the last one is the latent's size. The tokens
of all scales stand in one row of L = sum h_k w_k, row-major inside a scale. Each scale quantises
what the coarser ones left over (the residual), and its codes are added to the running
reconstruction f_hat. A model, `codec`, is a tree of tensors: keys are argument names of functions,
shapes are the configuration.

    encoder {conv_in, down [level, ...], middle level, norm_out, conv_out}; quant_conv
    codebook (codes, code_dim); phi [convolution] * 4
    post_quant_conv; decoder {conv_in, middle level, up [level, ...], norm_out, conv_out}
    level {blocks [residual_block, ...], attentions, downsample or upsample, if any}

    >>> codec = init(codes=64, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    >>> tokens = encode(codec, torch.zeros(2, 3, 8, 8), scales=((1, 1), (2, 2), (4, 4)))
    >>> tokens.shape
    torch.Size([2, 21])

Sources: VAR (Tian et al. 2024); HMAR (Kumbong et al. 2025); VQGAN's convnet (Esser et al. 2021).
"""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree


@torch.no_grad()
def encode(codec, images, scales):
    """Tokens (B, L) int64 of images (B, 3, H, W) in [-1, 1].

    On a GPU first set torch.backends.cudnn.allow_tf32 = False: with it a few tokens are others.
    """
    check_images(codec, images, scales)
    pyramid = quantise(codec, encode_features(codec, images), scales)
    return torch.cat([tokens for _, tokens, _ in pyramid], 1)


def decode(codec, tokens, scales):
    """Images (B, 3, H, W) in [-1, 1], fp32, of tokens (B, L) int64."""
    return decode_features(codec, accumulate(codec, tokens, scales))


def accumulate(codec, tokens, scales):
    """f_hat (B, code_dim, h, w), the sum of all scales' contributions (VAR, algorithm 2)."""
    *_, f_hat = f_hat_by_scale(codec, tokens, scales)
    return f_hat


def next_scale_inputs(codec, tokens, scales):
    """What the transformer sees of scales 1, 2, ...: tokens (B, L) -> (B, L - len_0, code_dim).

    Each sees f_hat of all coarser scales, area-resized to its size: HMAR's Markov property.
    """
    f_hats = f_hat_by_scale(codec, tokens, scales)
    # zip ends with scales[1:], before the last f_hat is computed, which no scale would see
    inputs = [resize_to_scale(f_hat, size) for size, f_hat in zip(scales[1:], f_hats)]
    return torch.cat(inputs, 1)


def masked_inputs(codec, tokens, scales, mask=None):
    """`own_inputs_of_scale` of scales 1, 2, ...: (B, L - len_0, code_dim).

    mask (B, L - len_0) bool, True = hidden; None hides nothing.
    """
    check_scales(scales)
    first, *finer = lengths(scales)
    parts = tokens[:, first:].split(finer, 1)
    masks = [None] * len(finer) if mask is None else mask.split(finer, 1)

    inputs = []
    for k, (part, hidden) in enumerate(zip(parts, masks), 1):
        inputs.append(own_inputs_of_scale(codec, part, k, scales, hidden))
    return torch.cat(inputs, 1)


def own_inputs_of_scale(codec, tokens, k, scales, hidden=None):
    """What the masked branch sees of scale k: tokens, hidden (B, n_k) -> (B, n_k, code_dim).

    What these tokens alone add to f_hat, area-resized to their scale. Hidden codes are zeroed
    before they are enlarged, lest they leak into their neighbours. hidden=None zeroes nothing, as
    published models were trained.
    """
    return resize_to_scale(contribution(codec, tokens, k, scales, hidden), scales[k])


def quantise(codec, features, scales):
    """Yields (residual (B, n_k, code_dim), tokens (B, n_k), f_hat) of each scale.

    features, f_hat (B, code_dim, h, w). The tokens were chosen for `residual`; f_hat is accumulated
    up to and with them (VAR, algorithm 1). Gradients reach codebook and phi through f_hat; none
    passes the choice of a token.
    """
    features = _widen(features.detach())
    f_hat = torch.zeros_like(features)

    for k, size in enumerate(scales):
        residual = resize_to_scale(features - f_hat.detach(), size)  # (B, n_k, code_dim)
        tokens = nearest(codec["codebook"], residual)
        f_hat = f_hat + contribution(codec, tokens, k, scales)
        yield residual, tokens, f_hat


@torch.no_grad()
def nearest(codebook, vectors):
    """Index (...) of the code (V, code_dim) nearest to each of vectors (..., code_dim), by L2."""
    codebook = codebook.to(vectors.dtype)
    squares = codebook.square().sum(1)  # a vector's own is left out: it is the same for all codes
    parts = vectors.flatten(0, -2).split(max(1, 2**25 // len(codebook)))  # 2 x 128 MiB at a time
    with torch.autocast(vectors.device.type, enabled=False):
        indices = [torch.argmin(squares - 2 * part @ codebook.T, -1) for part in parts]
    return torch.cat(indices).view(vectors.shape[:-1])


def contribution(codec, tokens, k, scales, hidden=None):
    """What scale k's tokens (B, n_k) add to f_hat, (B, code_dim, h, w); nothing where hidden."""
    codes = F.embedding(tokens, codec["codebook"])  # (B, n_k, code_dim)
    if hidden is not None:
        codes = codes.masked_fill(hidden[..., None], 0)

    codes = _widen(codes).mT.unflatten(2, scales[k])  # (B, code_dim, h_k, w_k)
    codes = enlarge(codes, scales[-1])  # (B, code_dim, h, w)
    with torch.autocast(codes.device.type, enabled=False):
        smoothed = convolution(codes, **codec["phi"][phi_index(k, len(scales))])
    return codes.lerp(smoothed, 0.5)


def phi_index(k, scale_count):
    """Which of the four phi serves scale k: the nearest of the ticks 1/12, 13/36, 23/36, 11/12.

    Ten scales take 0 0 1 1 1 2 2 3 3 3: scales 2 and 7 lie midway between two ticks, and the
    rounding of float64 decides, as in the published model.
    """
    place = k / max(scale_count - 1, 1)
    step = (1 - 1 / 12 - 1 / 12) / 3
    return min(range(4), key=lambda i: abs(1 / 12 + i * step - place))


def f_hat_by_scale(codec, tokens, scales):
    """Yields f_hat (B, code_dim, h, w) after each scale, of tokens (B, L)."""
    check_scales(scales)
    maps = enumerate(tokens.split(lengths(scales), 1))
    return itertools.accumulate(contribution(codec, part, k, scales) for k, part in maps)


def resize_to_scale(f_hat, size):
    """f_hat (B, code_dim, h, w), area-resized to (h_k, w_k), as a row (B, h_k w_k, code_dim)."""
    return F.interpolate(f_hat, size, mode="area").flatten(2).mT


def enlarge(x, size):
    """Bicubic (B, C, h_k, w_k) -> (B, C, h, w), rows @ x @ columns.mT: deterministic, fast."""
    if x.shape[2:] == size:
        return x
    rows, columns = (_bicubic(x, *pair) for pair in zip(x.shape[2:], size))
    with torch.autocast(x.device.type, enabled=False):
        return (x.mT @ rows.mT).mT @ columns.mT


def _bicubic(x, small, large):
    """The matrix (large, small) that enlarges: its columns are unit vectors, enlarged."""
    identity = torch.eye(small, dtype=x.dtype, device=x.device)
    return F.interpolate(identity[None, None], (large, small), mode="bicubic")[0, 0]


def lengths(scales):
    """Tokens of each scale, [h_k w_k, ...]."""
    return [h * w for h, w in scales]


def _widen(x):
    """x in fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the convnet: a level is what runs at one resolution


def encode_features(codec, images):
    """The encoder's output (B, code_dim, h, w), before quantisation, of images in [-1, 1]."""
    return convolution(encoder(images, **codec["encoder"]), **codec["quant_conv"])


def decode_features(codec, f_hat):
    """Images (B, 3, H, W) in [-1, 1], fp32, of an accumulated map f_hat (B, code_dim, h, w)."""
    return _widen(decode_unclamped(codec, f_hat)).clamp(-1, 1)


def decode_unclamped(codec, f_hat):
    """`decode_features` before its range is enforced, as training needs it."""
    return decoder(convolution(f_hat, **codec["post_quant_conv"]), **codec["decoder"])


def encoder(x, conv_in, down, middle, norm_out, conv_out):
    """Images (B, 3, H, W) -> (B, code_dim, h, w): levels that halve the sides, then the middle."""
    x = F.pixel_unshuffle(x, fold_side(conv_in["weight"].shape[1]))  # squares of pixels as channels
    x = convolution(x, **conv_in)
    for weights in [*down, middle]:
        x = level(x, **weights)
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def decoder(x, conv_in, middle, up, norm_out, conv_out):
    """(B, code_dim, h, w) -> images (B, 3, H, W): the encoder's way back, deepest level first."""
    x = convolution(x, **conv_in)
    for weights in [middle, *up]:
        x = level(x, **weights)
    x = convolution(F.silu(group_norm(x, **norm_out)), **conv_out)
    return F.pixel_shuffle(x, fold_side(x.shape[1]))


def fold_side(channels):
    """s, where squares of s x s pixels of three colours are folded into channels, 3 s^2."""
    return math.isqrt(channels // 3)


def level(x, blocks, attentions=(), downsample=None, upsample=None):
    """Residual blocks, each followed by its attention if there is one; then a change of sides."""
    for i, block in enumerate(blocks):
        x = residual_block(x, **block)
        if i < len(attentions):
            x = self_attention(x, **attentions[i])

    if downsample is not None:
        x = convolution(F.pad(x, (0, 1, 0, 1)), **downsample, stride=2, padding=0)
    if upsample is not None:
        x = convolution(F.interpolate(x, scale_factor=2, mode="nearest"), **upsample)
    return x


def residual_block(x, norm1, conv1, norm2, conv2, shortcut=None):
    """x plus two convolutions of it; a 1x1 shortcut where the channels change."""
    h = convolution(F.silu(group_norm(x, **norm1)), **conv1)
    h = convolution(F.silu(group_norm(h, **norm2)), **conv2)
    return h + (x if shortcut is None else convolution(x, **shortcut))


def self_attention(x, norm, qkv, project):
    """Single-head attention over all positions, scale channels^-0.5."""
    rows = convolution(group_norm(x, **norm), **qkv).flatten(2).mT
    q, k, v = rows.unsqueeze(1).chunk(3, -1)  # (B, 1, h w, channels) each
    attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT
    return x + convolution(attended.unflatten(2, x.shape[2:]), **project)


def convolution(x, weight, bias, stride=1, padding="same"):
    """In the weight's dtype, whatever that of x and the bias."""
    return F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride, padding)


def group_norm(x, weight, bias):
    """Over 32 groups, in the dtype of its weight."""
    return F.group_norm(x.to(weight.dtype), 32, weight, bias, eps=1e-6)


# ---- training


def training_pass(codec, images, scales, coarse, stops, commitment=0.1):
    """One differentiable pass over images (B, 3, H, W), as a dict.

    coarse, stops (n,) int64: image coarse[i] is decoded a second time, from scales 0 to stops[i]
    alone, so that coarse scales become images by themselves.

    images: reconstructions (B, 3, H, W), not clamped. coarse_images: (n, 3, H, W). loss: VAR,
    equation 5, averaged over scales. residuals, tokens: of each scale.
    """
    features = _widen(encode_features(codec, images))  # (B, code_dim, h, w)
    residuals, tokens, maps = zip(*quantise(codec, features, scales))
    f_hats = torch.stack(maps)  # (S, B, code_dim, h, w)

    # codes go to the features, and features a little to their codes
    targets = features.expand_as(f_hats)
    loss = F.mse_loss(f_hats, targets.detach())
    loss = loss + commitment * F.mse_loss(targets, f_hats.detach())

    # the gradient of a coarse image goes only to what its last scale can express: the means of that
    # scale's cells, enlarged as codes are. Gradients to all positions cost the finest 3.5 dB.
    cells = [F.interpolate(features[coarse], size, mode="area") for size in scales]
    means = torch.stack([enlarge(cell, scales[-1]) for cell in cells])  # (S, n, code_dim, h, w)
    # f_hats have an index into the batch, means one into coarse
    rows = torch.arange(len(coarse), device=coarse.device)
    coarse_maps = straight_through(f_hats[stops, coarse], means[stops, rows])
    whole_maps = straight_through(f_hats[-1], features)

    decoded = decode_unclamped(codec, torch.cat([whole_maps, coarse_maps])).to(features.dtype)
    whole, coarse_images = decoded.split([len(images), len(coarse)])
    made = dict(images=whole, coarse_images=coarse_images, loss=loss)
    return made | dict(residuals=residuals, tokens=tokens)


def straight_through(value, gradient_to):
    """value, whose gradient goes to another tensor as if that stood in its place."""
    return gradient_to + (value - gradient_to).detach()


def revive_codes(codebook, counts, residuals, generator):
    """(codebook, dead (V,) bool): codes never chosen become random residuals.

    counts (V,): how often each was chosen; residuals [(B, n_k, code_dim), ...]: what they were
    chosen for. After the first step this is what initialises the codebook from data.
    """
    dead = counts == 0
    vectors = torch.cat([rows.flatten(0, 1) for rows in residuals])
    drawn = torch.randint(len(vectors), (len(codebook),), generator=generator)
    fresh = vectors[drawn.to(vectors.device)].to(codebook.dtype)
    return torch.where(dead[:, None], fresh, codebook), dead


def init(
    *,
    codes=4096,
    code_dim=32,
    channels=160,
    multipliers=(1, 1, 2, 2, 4),
    residual_blocks=2,
    attention=True,
    fold=1,
    seed=0,
):
    """A new codec, fp32; the defaults are the published sizes, with 108,948,355 parameters.

    Level i has channels * multipliers[i] channels, channels being a multiple of 32; every level but
    the last halves the sides. Levels of the decoder have residual_blocks + 1 blocks. With attention
    one follows each block of the deepest level. fold: squares of fold x fold pixels are channels.
    """
    generator = torch.Generator().manual_seed(seed)
    conv = partial(_new_convolution, generator)
    widths = [channels * multiplier for multiplier in multipliers]
    attended = [False] * (len(widths) - 1) + [attention]
    kinds = list(zip(widths, attended))
    deepest = widths[-1]

    return dict(
        encoder=dict(
            conv_in=conv(3 * fold**2, channels),
            down=_new_levels(conv, channels, kinds, residual_blocks, "downsample"),
            middle=_new_level(conv, deepest, deepest, 2, int(attention)),
            norm_out=_new_norm(deepest),
            conv_out=conv(deepest, code_dim),
        ),
        quant_conv=conv(code_dim, code_dim),
        codebook=torch.empty(codes, code_dim).normal_(generator=generator),
        phi=[conv(code_dim, code_dim) for _ in range(4)],
        post_quant_conv=conv(code_dim, code_dim),
        decoder=dict(
            conv_in=conv(code_dim, deepest),
            middle=_new_level(conv, deepest, deepest, 2, int(attention)),
            up=_new_levels(conv, deepest, kinds[::-1], residual_blocks + 1, "upsample"),
            norm_out=_new_norm(widths[0]),
            conv_out=conv(widths[0], 3 * fold**2),
        ),
    )


def _new_levels(conv, inputs, kinds, count, resize):
    """[level, ...] of (width, attended) each; all but the last also resize."""
    trees = []
    for width, attended in kinds:
        tree = _new_level(conv, inputs, width, count, count if attended else 0)
        if len(trees) + 1 < len(kinds):
            tree[resize] = conv(width, width)
        trees.append(tree)
        inputs = width
    return trees


def _new_level(conv, inputs, outputs, count, attentions):
    tree = dict(blocks=[])
    for _ in range(count):
        block = dict(norm1=_new_norm(inputs), conv1=conv(inputs, outputs))
        block |= dict(norm2=_new_norm(outputs), conv2=conv(outputs, outputs))
        if inputs != outputs:
            block["shortcut"] = conv(inputs, outputs, 1)
        tree["blocks"].append(block)
        inputs = outputs

    for _ in range(attentions):
        layer = dict(norm=_new_norm(outputs), qkv=conv(outputs, 3 * outputs, 1))
        layer["project"] = conv(outputs, outputs, 1)
        tree.setdefault("attentions", []).append(layer)
    return tree


def _new_norm(width):
    return dict(weight=torch.ones(width), bias=torch.zeros(width))


def _new_convolution(generator, inputs, outputs, size=3):
    bound = (inputs * size * size) ** -0.5
    weight = torch.empty(outputs, inputs, size, size).uniform_(-bound, bound, generator=generator)
    return dict(weight=weight, bias=torch.zeros(outputs))


def cast(codec, dtype):
    """The same tree, the encoder's and decoder's convolutions in dtype; gradients pass through.

    What quantises stays fp32: in bf16 other tokens would be chosen.
    """
    nets = dict(encoder=codec["encoder"], decoder=codec["decoder"])
    return codec | pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.ndim == 4 else leaf, nets)


def downsampling(codec):
    """Image pixels per side of a latent position, fold * 2 ** (levels - 1)."""
    down, weight = codec["encoder"]["down"], codec["encoder"]["conv_in"]["weight"]
    return fold_side(weight.shape[1]) * 2 ** (len(down) - 1)


# ---- checks


def check_scales(scales):
    """ValueError unless scales are (height, width) pairs, none smaller than the one before."""
    heights, widths = zip(*scales)
    for sides in heights, widths:
        if [1, *sides] != sorted([1, *sides]):
            raise ValueError(f"scales: got {scales}, expected (height, width), coarse to fine")


def check_images(codec, images, scales):
    """ValueError unless images are floats (B, 3, H, W) in [-1, 1] whose latent fits the scales."""
    check_scales(scales)
    height, width = (downsampling(codec) * side for side in scales[-1])
    fits = images.is_floating_point() and images.shape[1:] == (3, height, width)
    # a look at values would stall an accelerator
    if fits and images.is_cpu and not torch.compiler.is_compiling():
        fits = (images.abs() <= 1.001).all()
    if not fits:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: got {got}, expected floats (B, 3, {height}, {width}) in [-1, 1]")


@torch.no_grad()
def check(codec):
    """ValueError unless encode and decode take this tree, with a small grey image."""
    scales = ((1, 1), (1, 1), (1, 1), (2, 2))  # each has a phi of its own
    try:
        side = 2 * downsampling(codec)
        images = codec["codebook"].new_zeros(1, 3, side, side)
        decode(codec, encode(codec, images, scales), scales) + images  # raises if shapes differ
    except Exception as error:
        raise ValueError(f"codec: no tokenizer's tree: {type(error).__name__}: {error}") from error


# ---- published weights

PUBLISHED_NAMES = {  # parts of published names and ours, replaced in this order
    "quantize.embedding.weight": "codebook",
    "quantize.quant_resi.qresi_ls.": "phi.",
    "mid.block_1.": "middle.blocks.0.",
    "mid.block_2.": "middle.blocks.1.",
    "mid.attn_1.": "middle.attentions.0.",
    ".block.": ".blocks.",
    ".attn.": ".attentions.",
    "nin_shortcut": "shortcut",
    "proj_out": "project",
    "sample.conv": "sample",  # of downsample, upsample
}


def from_published(state_dict):
    """A codec, fp32, from the state dict of a published VAR or HMAR tokenizer, else ValueError."""
    codec = {}
    try:
        for name, leaf in state_dict.items():
            for theirs, ours in PUBLISHED_NAMES.items():
                name = name.replace(theirs, ours)
            *path, last = name.split(".")
            node = codec
            for key in path:
                node = node.setdefault(key, {})
            node[last] = leaf.float()

        codec = _make_lists(codec)
        codec.pop("quantize", None)  # statistics of use
        codec["decoder"]["up"].reverse()  # published by level, ours in the order they run
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"state_dict: no tokenizer's: {type(error).__name__}: {error}") from error
    check(codec)
    return codec


def _make_lists(node):
    """The tree, its dicts whose keys are 0, 1, ... as lists."""
    if not isinstance(node, dict):
        return node
    node = {key: _make_lists(child) for key, child in node.items()}
    return [node[str(i)] for i in range(len(node))] if "0" in node else node
