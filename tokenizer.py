"""Multi-scale residual VQ tokenizer: images <-> a pyramid of token maps, coarse to fine.

    images (B, 3, H, W) in [-1, 1] -> features (B, code_dim, h, w) -> tokens (B, L) int64
    tokens -> f_hat (B, code_dim, h, w) -> images

`scales` is ((h_0, w_0), ..., (h, w)), coarse to fine; the last one is the latent's size. The tokens
of all scales stand in one row of L = sum h_k w_k, row-major inside a scale. Each scale quantises
what the coarser ones left over (the residual), and its codes are added to the running
reconstruction f_hat. A model, `codec`, is a tree of tensors whose keys are the argument names of
the functions below; its shapes are its configuration.

    >>> codec = init(codes=64, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    >>> tokens = encode(codec, torch.zeros(2, 3, 8, 8), scales=((1, 1), (2, 2), (4, 4)))
    >>> tokens.shape
    torch.Size([2, 21])

Sources: VAR (Tian et al. 2024); HMAR (Kumbong et al. 2025); VQGAN's convnet (Esser et al. 2021).
"""

import itertools
import re
from functools import partial
from operator import index

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree


@torch.no_grad()
def encode(codec, images, scales):
    """Tokens (B, L) int64 of images (B, 3, H, W) in [-1, 1]."""
    check_images(codec, images, scales)
    features = encode_features(codec, images)
    pyramid = quantise(codec["codebook"], codec["phi"], features, scales)
    return torch.cat([tokens for _, tokens, _ in pyramid], 1)


def decode(codec, tokens, scales):
    """Images (B, 3, H, W) in [-1, 1], fp32, of tokens (B, L) int64."""
    return decode_features(codec, accumulate(codec, tokens, scales))


def accumulate(codec, tokens, scales):
    """f_hat (B, code_dim, h, w), the sum of all scales' contributions (VAR, algorithm 2)."""
    return f_hat_by_scale(codec, tokens, scales)[-1]


def next_scale_inputs(codec, tokens, scales):
    """What the transformer sees of scales 1, 2, ...: tokens (B, L) -> (B, L - len_0, code_dim).

    For each, f_hat of all coarser scales, area-resized to its size: HMAR's Markov property.
    """
    f_hats = f_hat_by_scale(codec, tokens, scales)
    inputs = [resize_to_scale(f_hat, size) for f_hat, size in zip(f_hats, scales[1:])]
    return torch.cat(inputs, 1)


def masked_inputs(codec, tokens, scales, mask=None):
    """What the masked branch sees of scales 1, 2, ... themselves: (B, L - len_0, code_dim).

    For each its own contribution alone, area-resized to its size. mask (B, L - len_0) bool,
    True = hidden: such codes are zeroed before they are resized, lest anything of them leak into
    their neighbours; with None, the published way, it does.
    """
    _check_tokens(codec, tokens, scales)
    first, *finer = lengths(scales)
    tokens = tokens[:, first:]
    mask = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else mask
    _expect("mask", mask, torch.bool, tokens.shape[1:], 0, 1)

    parts = enumerate(zip(tokens.split(finer, 1), mask.split(finer, 1)), 1)
    inputs = [masked_scale_input(codec, own, k, scales, hidden) for k, (own, hidden) in parts]
    return torch.cat(inputs, 1)


def masked_scale_input(codec, tokens, k, scales, hidden=None):
    """`masked_inputs` of scale k alone: tokens, hidden (B, n_k) -> (B, n_k, code_dim)."""
    codes = F.embedding(tokens, codec["codebook"])
    if hidden is not None:
        codes = codes.masked_fill(hidden[..., None], 0)
    return resize_to_scale(contribution(codec["phi"], codes, k, scales), scales[k])


def quantise(codebook, phi, features, scales):
    """Yields (residual (B, n_k, code_dim), tokens (B, n_k), f_hat) of each scale.

    features, f_hat (B, code_dim, h, w). `residual` is what the scale's tokens were chosen for,
    f_hat the map accumulated up to and with it (VAR, algorithm 1). Gradients reach codebook and phi
    through f_hat; none passes the choice of a token.
    """
    features = _wide(features.detach())
    f_hat = torch.zeros_like(features)

    for k, size in enumerate(scales):
        residual = resize_to_scale(features - f_hat.detach(), size)  # (B, n_k, code_dim)
        tokens = nearest(codebook, residual)
        f_hat = f_hat + contribution(phi, F.embedding(tokens, codebook), k, scales)
        yield residual, tokens, f_hat


@torch.no_grad()
def nearest(codebook, vectors):
    """Index (...) of the code (V, code_dim) nearest to each of vectors (..., code_dim), by L2."""
    codebook = codebook.to(vectors.dtype)
    squares = codebook.square().sum(1)  # a vector's own square moves no minimum
    parts = vectors.flatten(0, -2).split(max(1, 2**25 // len(codebook)))  # 128 MiB at a time
    with torch.autocast(vectors.device.type, enabled=False):
        indices = [torch.argmin(squares - 2 * part @ codebook.T, -1) for part in parts]
    return torch.cat(indices).view(vectors.shape[:-1])


def contribution(phi, codes, k, scales):
    """What scale k adds to f_hat, (B, code_dim, h, w), of its codes (B, n_k, code_dim)."""
    codes = _wide(codes).transpose(1, 2).unflatten(2, scales[k])  # (B, code_dim, h_k, w_k)
    codes = F.interpolate(codes, scales[-1], mode="bicubic")  # (B, code_dim, h, w)
    with torch.autocast(codes.device.type, enabled=False):
        smoothed = convolution(codes, **phi[phi_index(k, len(scales))])
    return 0.5 * codes + 0.5 * smoothed


def phi_index(k, scale_count):
    """Which of the four phi serves scale k: the nearest of evenly spread ticks.

    In float64, whose rounding decided the ties that ten scales have in the published model.
    """
    place = k / max(scale_count - 1, 1)
    step = (1 - 1 / 12 - 1 / 12) / 3
    return min(range(4), key=lambda i: abs(1 / 12 + i * step - place))


def f_hat_by_scale(codec, tokens, scales):
    """f_hat after each scale, [(B, code_dim, h, w), ...], of tokens (B, L)."""
    _check_tokens(codec, tokens, scales)
    codes = [F.embedding(own, codec["codebook"]) for own in tokens.split(lengths(scales), 1)]
    added = [contribution(codec["phi"], own, k, scales) for k, own in enumerate(codes)]
    return list(itertools.accumulate(added))


def resize_to_scale(f_hat, size):
    """f_hat (B, code_dim, h, w), area-resized to (h_k, w_k), as a row (B, h_k w_k, code_dim)."""
    return F.interpolate(f_hat, size, mode="area").flatten(2).transpose(1, 2)


def lengths(scales):
    """Tokens of each scale, [h_k w_k, ...]."""
    return [h * w for h, w in scales]


def _wide(x):
    """x in fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the convnet


def encode_features(codec, images):
    """The encoder's output (B, code_dim, h, w), before quantisation, of images in [-1, 1]."""
    return convolution(encoder(images, **codec["encoder"]), **codec["quant_conv"])


def decode_features(codec, f_hat):
    """Images (B, 3, H, W) in [-1, 1], fp32, of an accumulated map f_hat (B, code_dim, h, w)."""
    return _wide(unclamped(codec, f_hat)).clamp(-1, 1)


def unclamped(codec, f_hat):
    """`decode_features` before its range is enforced, as training needs it."""
    return decoder(convolution(f_hat, **codec["post_quant_conv"]), **codec["decoder"])


def encoder(x, conv_in, down, middle, norm_out, conv_out):
    """Images (B, 3, H, W) -> (B, code_dim, h, w): levels that halve the sides, then the middle."""
    x = convolution(x, **conv_in)
    for weights in [*down, middle]:
        x = level(x, **weights)
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def decoder(x, conv_in, middle, up, norm_out, conv_out):
    """(B, code_dim, h, w) -> images (B, 3, H, W): the encoder's way back, deepest level first."""
    x = convolution(x, **conv_in)
    for weights in [middle, *up]:
        x = level(x, **weights)
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def level(x, blocks, attentions, downsample=None, upsample=None):
    """Residual blocks, an attention after each while there are attentions; then other sides."""
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
    rows = convolution(group_norm(x, **norm), **qkv).flatten(2).transpose(1, 2)
    q, k, v = rows.unsqueeze(1).chunk(3, -1)  # (B, 1, h w, channels) each
    attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
    return x + convolution(attended.unflatten(2, x.shape[2:]), **project)


def convolution(x, weight, bias, stride=1, padding="same"):
    """In the weight's dtype, whatever that of x and the bias."""
    return F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride, padding)


def group_norm(x, weight, bias):
    """Over 32 groups, in the dtype of its weight."""
    return F.group_norm(x.to(weight.dtype), 32, weight, bias, eps=1e-6)


# ---- training


def training_pass(codec, images, scales, stops, commitment=0.1):
    """One differentiable pass over images (B, 3, H, W), as a dict.

    images: reconstructions (B, 3, H, W), not clamped. coarse: (n, 3, H, W), the first n images
    decoded from scales 0 to stops (n,) int64 alone, lest coarse scales say nothing. loss: VAR,
    equation 5, averaged over scales. residuals, tokens: of each scale.
    """
    f = _wide(encode_features(codec, images))  # (B, code_dim, h, w)
    residuals, tokens, maps = zip(*quantise(codec["codebook"], codec["phi"], f, scales))
    f_hats = torch.stack(maps)  # (S, B, code_dim, h, w)
    features = f.expand_as(f_hats)
    loss = F.mse_loss(f_hats, features.detach())
    loss = loss + commitment * F.mse_loss(features, f_hats.detach())

    # straight-through: the decoder sees `coded`, gradients reach `smooth`; rows from B on are
    # the coarse images, whose gradients reach their scale's cell means
    count = len(stops)
    rows = torch.arange(count, device=f.device)
    cells = [F.interpolate(f[:count], size, mode="area") for size in scales]
    means = [F.interpolate(own, scales[-1], mode="bicubic") for own in cells]
    own_means = torch.stack(means)[stops, rows]  # (n, code_dim, h, w)
    smooth = torch.cat([f, own_means])  # (B + n, code_dim, h, w)
    coded = torch.cat([f_hats[-1], f_hats[stops, rows]])
    made = unclamped(codec, smooth + (coded - smooth).detach()).to(f.dtype)

    whole, coarse = made.split([len(images), count])
    return dict(images=whole, coarse=coarse, loss=loss, residuals=residuals, tokens=tokens)


def revive_codes(codebook, counts, residuals, generator):
    """(codebook, dead (V,) bool): codes never chosen become random residuals.

    counts (V,) says how often each was chosen, residuals [(B, n_k, code_dim), ...] for what.
    """
    dead = counts == 0
    vectors = torch.cat([residual.flatten(0, 1) for residual in residuals])
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
    seed=0,
):
    """A new codec, fp32; the defaults are the published sizes, with 108,948,355 parameters.

    A level has channels * multiplier channels and halves the sides, but for the last. The decoder
    has one residual block a level more than the encoder; with attention, one follows each of the
    deepest level. Under torch.device("meta") nothing is allocated.
    """
    sizes = (codes, code_dim, channels, residual_blocks, *multipliers)
    if min(sizes) < 1 or channels % 32 or not multipliers:  # the norms have 32 groups
        raise ValueError(f"sizes: got {sizes}, expected 1 or more, channels a multiple of 32")
    generator = torch.Generator().manual_seed(seed)
    conv = partial(_new_convolution, generator)
    widths = [channels * multiplier for multiplier in multipliers]
    attended = [False] * (len(widths) - 1) + [attention]
    levels = list(zip(widths, attended))
    deepest = widths[-1]

    return dict(
        encoder=dict(
            conv_in=conv(3, channels),
            down=_new_levels(conv, channels, levels, residual_blocks, "downsample"),
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
            up=_new_levels(conv, deepest, levels[::-1], residual_blocks + 1, "upsample"),
            norm_out=_new_norm(widths[0]),
            conv_out=conv(widths[0], 3),
        ),
    )


def _new_levels(conv, inputs, levels, count, sample):
    made = []
    for width, attended in levels:
        made.append(_new_level(conv, inputs, width, count, count * attended))
        if len(made) < len(levels):
            made[-1][sample] = conv(width, width)
        inputs = width
    return made


def _new_level(conv, inputs, outputs, count, attended):
    blocks, attentions = [], []
    for width in [inputs] + [outputs] * (count - 1):
        block = dict(norm1=_new_norm(width), conv1=conv(width, outputs))
        block |= dict(norm2=_new_norm(outputs), conv2=conv(outputs, outputs))
        if width != outputs:
            block["shortcut"] = conv(width, outputs, 1)
        blocks.append(block)

    for _ in range(attended):  # of the blocks
        qkv, project = conv(outputs, 3 * outputs, 1), conv(outputs, outputs, 1)
        attentions.append(dict(norm=_new_norm(outputs), qkv=qkv, project=project))
    return dict(blocks=blocks, attentions=attentions)


def _new_norm(width):
    return dict(weight=torch.ones(width), bias=torch.zeros(width))


def _new_convolution(generator, inputs, outputs, size=3):
    bound = (inputs * size * size) ** -0.5
    weight = torch.empty(outputs, inputs, size, size).uniform_(-bound, bound, generator=generator)
    return dict(weight=weight, bias=torch.zeros(outputs))


def cast(codec, dtype):
    """The same tree, the encoder's and decoder's convolutions in dtype; gradients pass through."""
    nets = dict(encoder=codec["encoder"], decoder=codec["decoder"])
    return codec | pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.ndim == 4 else leaf, nets)


def downsampling(codec):
    """Image pixels per side of a latent position, 2 ** (levels - 1)."""
    return 2 ** (len(codec["encoder"]["down"]) - 1)


# ---- checks


def check_scales(scales):
    """ValueError unless scales are (height, width) pairs, none smaller than the one before."""
    try:
        sides = [[1, *map(index, axis)] for axis in zip(*scales, strict=True)]
    except (TypeError, ValueError):
        sides = []
    if len(sides) != 2 or sides != [sorted(axis) for axis in sides]:
        raise ValueError(f"scales: got {scales}, expected integers (height, width), coarse to fine")


def check_images(codec, images, scales):
    """ValueError unless images are floats (B, 3, H, W) in [-1, 1] whose latent fits the scales."""
    check_scales(scales)
    size = [downsampling(codec) * side for side in scales[-1]]
    _expect("images", images, None, (3, *size), -1.001, 1.001)


def _check_tokens(codec, tokens, scales):
    check_scales(scales)
    _expect("tokens", tokens, torch.int64, (sum(lengths(scales)),), 0, len(codec["codebook"]) - 1)


def _expect(name, tensor, dtype, shape, low, high):
    """ValueError unless tensor is (B, *shape), of a dtype (None: any) and from low to high."""
    fits = torch.is_tensor(tensor) and dtype in (None, tensor.dtype) and tensor.shape[1:] == shape
    # on an accelerator a look at the values would stall its queue
    if fits and tensor.is_cpu and tensor.numel() and not torch.compiler.is_compiling():
        fits = low <= tensor.min() <= tensor.max() <= high
    if not fits:
        got = (tensor.dtype, *tensor.shape) if torch.is_tensor(tensor) else type(tensor)
        raise ValueError(f"{name}: got {got}, expected {(dtype, 'B', *shape)}, {low} to {high}")


def check(codec):
    """ValueError that names the leaves unless codec is a whole tree of finite floats."""
    leaves = _named(codec)
    tree = _tree("codec", leaves, _template(leaves))
    pytree.tree_map(lambda *_: None, tree, codec)  # ValueError on a dict in place of a list


def _named(tree):
    """{name: leaf}, a name such as decoder.up.0.conv1.bias; ValueError unless they are floats."""
    nodes = itertools.count()  # lists that are shared can unfold to 2 ** 40: stop, and refuse
    leaves, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda _: next(nodes) > 10_000)
    named = {".".join(re.findall(r"[^\[\]']+", pytree.keystr(path))): leaf for path, leaf in leaves}
    for name, leaf in named.items():
        fits = torch.is_tensor(leaf) and leaf.is_floating_point()
        fits = fits and leaf.untyped_storage().nbytes() >= leaf.nbytes  # no expanded view
        if not fits or not (leaf.is_meta or leaf.isfinite().all()):
            raise ValueError(f"{name!r} is not finite floats, all of them in memory")
    return named


def _tree(argument, leaves, template):
    """The tree of leaves, {name: leaf}. ValueError that lists those that a template has not."""
    found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    expected = {name: tuple(leaf.shape) for name, leaf in _named(template).items()}
    wrong = []
    for name in sorted(dict(found.items() ^ expected.items())):
        wrong.append(f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'known')}")
    if wrong:
        raise ValueError(f"{argument}: {len(wrong)} do not fit: {', '.join(wrong[:10])}")
    return pytree.tree_unflatten(map(leaves.get, expected), pytree.tree_structure(template))


def _template(leaves):
    """A tree without values that is as some of the leaves, {name: leaf}, say."""

    def sizes(pattern):  # 1 where there is no such leaf, which the comparison will tell
        fits = [leaf for name, leaf in leaves.items() if re.fullmatch(pattern, name)]
        return [max(1, leaf.shape[:1].numel()) for leaf in fits] or [1]

    channels = max(32, sizes("encoder.conv_in.bias")[0] // 32 * 32)
    widths = sizes("encoder.down.*.blocks.0.norm2.bias")
    blocks = sizes("encoder.down.*.norm2.bias")
    with torch.device("meta"):
        return init(
            codes=sizes("codebook")[0],
            code_dim=sizes("quant_conv.bias")[0],
            channels=channels,
            multipliers=[max(1, width // channels) for width in widths],
            residual_blocks=len(blocks) // len(widths),
            attention=any(".attentions." in name for name in leaves),
        )


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
    "sample.conv": "sample",
}


def from_published(state_dict):
    """A codec, fp32, from the state dict of a published VAR or HMAR tokenizer of any size.

    ValueError that lists, by our names, what does not fit.
    """
    leaves = {}
    for name, leaf in _named(state_dict).items():
        for theirs, ours in PUBLISHED_NAMES.items():
            name = name.replace(theirs, ours)
        leaves[name] = leaf
    leaves.pop("quantize.ema_vocab_hit_SV", None)  # statistics of use

    template = _template(leaves)
    template["decoder"]["up"].reverse()  # published by level, ours in the order they run
    codec = pytree.tree_map(torch.Tensor.float, _tree("state_dict", leaves, template))
    codec["decoder"]["up"].reverse()
    return codec
