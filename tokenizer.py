"""Multi-scale residual VQ tokenizer: images <-> a pyramid of token maps, coarse to fine.

    images (B, 3, H, W) in [-1, 1] -> features (B, code_dim, h, w) -> tokens (B, L) int64
    tokens -> f_hat (B, code_dim, h, w) -> images

`scales` is ((h_0, w_0), ..., (h, w)), coarse to fine; the last one is the size of the latent map.
The tokens of all scales form one sequence of L = sum h_k w_k, row-major inside a scale. Each scale
quantises the residual that the coarser scales left over. Its codes, enlarged to the latent's size
and partly passed through a learned convolution (phi), are added to the accumulated
reconstruction f_hat. A model, `codec`, is a tree of tensors: its keys are the argument names of
functions, and its shapes are the configuration.

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

# ---- the quantiser


def contribution(codec, tokens, k, scales, hidden=None):
    """What scale k's tokens (B, n_k) add to f_hat (B, code_dim, h, w); hidden codes are zeroed."""
    codes = F.embedding(tokens, codec["codebook"])  # (B, n_k, code_dim)
    if hidden is not None:
        codes = codes.masked_fill(hidden[..., None], 0)

    codes = _widen(codes).mT.unflatten(2, scales[k])  # (B, code_dim, h_k, w_k)
    codes = enlarge(codes, scales[-1])  # (B, code_dim, h, w)
    with torch.autocast(codes.device.type, enabled=False):
        smoothed = convolution(codes, **codec["phi"][phi_index(k, len(scales))])
    return codes.lerp(smoothed, 0.5)


def phi_index(k, scale_count):
    """The index of the phi that serves scale k: four are shared by all scales (VAR, section 3.2).

    phi are 3 x 3 convolutions. They stand at four equidistant points from 1/12 to 11/12, and scale
    k of S at k / (S - 1); the nearest serves it. Ten scales use 0 0 1 1 1 2 2 3 3 3. Of these,
    scales 2 and 7 lie midway between two points: there the rounding of float64 decides, as in the
    published model.
    """
    scale_point = k / max(scale_count - 1, 1)
    step = (1 - 1 / 12 - 1 / 12) / 3
    return min(range(4), key=lambda i: abs(1 / 12 + i * step - scale_point))


def enlarge(x, size):
    """Bicubic interpolation (B, C, h_k, w_k) -> (B, C, h, w), as two matrix products.

    On a GPU the backward pass of F.interpolate is slow and not deterministic; that of a product is
    fast and deterministic.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    vertical, horizontal = (_bicubic(x, *pair) for pair in zip(x.shape[2:], size))
    with torch.autocast(x.device.type, enabled=False):
        return (x.mT @ vertical.mT).mT @ horizontal.mT


def _bicubic(x, small, large):
    """The matrix (large, small) that interpolates: its columns are interpolated unit vectors."""
    identity = torch.eye(small, dtype=x.dtype, device=x.device)
    return F.interpolate(identity[None, None], (large, small), mode="bicubic")[0, 0]


def quantise(codec, features, scales):
    """Yields (residual (B, n_k, code_dim), tokens (B, n_k), f_hat) for each scale.

    features, f_hat (B, code_dim, h, w). The tokens are the codes nearest to `residual`, and f_hat
    is accumulated up to and including them (VAR, algorithm 1). Gradients reach the codebook and phi
    through f_hat; no gradient passes through the choice of a token.
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
    """Index (...) of the code (V, code_dim) nearest to each vector (..., code_dim), by L2 norm."""
    codebook = codebook.to(vectors.dtype)
    squares = codebook.square().sum(1)  # the vector's own square is the same for all codes
    # So many vectors at a time that their products with all codes take at most 128 MiB in fp32.
    parts = vectors.flatten(0, -2).split(max(1, 2**25 // len(codebook)))
    with torch.autocast(vectors.device.type, enabled=False):
        indices = [torch.argmin(squares - 2 * part @ codebook.T, -1) for part in parts]
    return torch.cat(indices).view(vectors.shape[:-1])


def resize_to_scale(x, size):
    """A map x (B, C, h, w) resized to size (h_k, w_k) by area averaging: (B, h_k w_k, C)."""
    return F.interpolate(x, size, mode="area").flatten(2).mT


@torch.no_grad()
def encode(codec, images, scales):
    """Tokens (B, L) int64 of images (B, 3, H, W) in [-1, 1].

    ValueError if the images have another range, dtype or size. On a GPU set
    torch.backends.cudnn.allow_tf32 = False first, because TF32 changes a few tokens.
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


def f_hat_by_scale(codec, tokens, scales):
    """An iterator over f_hat (B, code_dim, h, w) after each scale, for tokens (B, L)."""
    check_scales(scales)
    maps = enumerate(tokens.split(lengths(scales), 1))
    return itertools.accumulate(contribution(codec, part, k, scales) for k, part in maps)


def lengths(scales):
    """The number of tokens of each scale, [h_k w_k, ...]."""
    return [h * w for h, w in scales]


def _widen(x):
    """x in fp32, or in fp64 if it has that dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- what the transformer is fed


def next_scale_inputs(codec, tokens, scales):
    """The inputs of the transformer at scales 1, 2, ...: (B, L - len_0, code_dim).

    tokens (B, L). The input of a scale is what all coarser scales add up to, resized to it by area
    averaging. It is all that a scale sees of them: HMAR's Markov property.
    """
    coarser = f_hat_by_scale(codec, tokens, scales)
    inputs = [codec["codebook"].new_zeros(len(tokens), 0, codec["codebook"].shape[1])]
    for size in scales[1:]:
        f_hat = next(coarser)  # of the scales before this one
        inputs.append(resize_to_scale(f_hat, size))  # (B, n_k, code_dim)
    return torch.cat(inputs, 1)


def own_inputs_of_scale(codec, tokens, k, scales, hidden=None):
    """What the masked branch sees of scale k's tokens (B, n_k) themselves: (B, n_k, code_dim).

    It is what these tokens add to f_hat, resized back to their scale by area averaging. hidden
    (B, n_k) bool: the codes of hidden tokens are set to zero first; later would be too late,
    because a token's neighbours contain a part of its code once the map is enlarged. None hides
    nothing: published models were trained with this leak.
    """
    return resize_to_scale(contribution(codec, tokens, k, scales, hidden), scales[k])


def masked_inputs(codec, tokens, scales, mask=None):
    """What the masked branch sees of tokens (B, L) at scales 1, 2, ...: (B, L - len_0, code_dim).

    See `own_inputs_of_scale`. mask (B, L - len_0) bool, True where a token is hidden; None hides
    nothing.
    """
    check_scales(scales)
    first, *finer = lengths(scales)
    parts = tokens[:, first:].split(finer, 1)
    masks = [None] * len(finer) if mask is None else mask.split(finer, 1)

    inputs = [codec["codebook"].new_zeros(len(tokens), 0, codec["codebook"].shape[1])]
    for k, (part, hidden) in enumerate(zip(parts, masks, strict=True), 1):
        inputs.append(own_inputs_of_scale(codec, part, k, scales, hidden))
    return torch.cat(inputs, 1)


# ---- the convolutional network: a level is the part that runs at one resolution


def encode_features(codec, images):
    """The encoder's output (B, code_dim, h, w), before quantisation, of images in [-1, 1]."""
    return convolution(encoder(images, **codec["encoder"]), **codec["quant_conv"])


def decode_features(codec, f_hat):
    """Images (B, 3, H, W) in [-1, 1], fp32, decoded from f_hat (B, code_dim, h, w)."""
    return _widen(decode_unclamped(codec, f_hat)).clamp(-1, 1)


def decode_unclamped(codec, f_hat):
    """The output of the decoder before it is clamped to [-1, 1]; training needs its gradients."""
    return decoder(convolution(f_hat, **codec["post_quant_conv"]), **codec["decoder"])


def encoder(x, conv_in, down, middle, norm_out, conv_out):
    """Images (B, 3, H, W) -> (B, code_dim, h, w): levels that halve the sides, then the middle."""
    # squares of pixels become channels
    x = F.pixel_unshuffle(x, fold_side(conv_in["weight"].shape[1]))
    x = convolution(x, **conv_in)
    for weights in [*down, middle]:
        x = level(x, **weights)
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def decoder(x, conv_in, middle, up, norm_out, conv_out):
    """(B, code_dim, h, w) -> images (B, 3, H, W): the encoder in reverse, deepest level first."""
    x = convolution(x, **conv_in)
    for weights in [middle, *up]:
        x = level(x, **weights)
    x = convolution(F.silu(group_norm(x, **norm_out)), **conv_out)
    return F.pixel_shuffle(x, fold_side(x.shape[1]))


def fold_side(channels):
    """s, if squares of s x s pixels of three colours are folded into 3 s^2 channels."""
    return math.isqrt(channels // 3)


def level(x, blocks, attentions=(), downsample=None, upsample=None):
    """Residual blocks, each followed by attention if it has one; then a change of resolution."""
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
    """x plus two convolutions of it, with a 1x1 shortcut where the number of channels changes."""
    h = convolution(F.silu(group_norm(x, **norm1)), **conv1)
    h = convolution(F.silu(group_norm(h, **norm2)), **conv2)
    return h + (x if shortcut is None else convolution(x, **shortcut))


def self_attention(x, norm, qkv, project):
    """Single-head attention over all positions; scores are scaled by channels^-0.5."""
    projected = convolution(group_norm(x, **norm), **qkv).flatten(2).mT  # (B, h w, 3 channels)
    q, k, v = projected.unsqueeze(1).chunk(3, -1)  # (B, 1, h w, channels) each
    attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT
    return x + convolution(attended.unflatten(2, x.shape[2:]), **project)


def convolution(x, weight, bias, stride=1, padding="same"):
    """A convolution computed in the dtype of its weight."""
    return F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride, padding)


def group_norm(x, weight, bias):
    """Group normalisation over 32 groups, computed in the dtype of its weight."""
    return F.group_norm(x.to(weight.dtype), 32, weight, bias, eps=1e-6)


# ---- training


# Weights of the terms of `training_loss`; the squared error has a weight of 1.
ABSOLUTE_WEIGHT, EDGE_WEIGHT = 0.5, 0.25
HUE_WEIGHT, PERCEPTUAL_WEIGHT, COARSE_WEIGHT = 0.28, 0.08, 0.5


def training_loss(
    codec,
    images,
    scales,
    coarse,
    stops,
    *,
    hue_variance=0.0,
    texture_weight=0.5,
    jump_weight=0.0,
    spectrum_weight=0.0,
    perceptual_layers=(),
    is_transposed=False,
    images_per_coarse=4.0,
    commitment=0.1,
):
    """The whole loss of the tokenizer on images (B, 3, H, W) in [-1, 1], as a dict.

    coarse, stops (n,) int64: image coarse[i] is decoded a second time, from scales 0 to stops[i]
    only, so that coarse scales become images by themselves.
    images_per_coarse: images in a batch for each image in `coarse`. The coarse error is divided by
    the expected number of such images, so that the losses of the parts of a batch add up to its
    loss although they have unequal numbers of them.
    hue_variance: `measure_hue_variance` of the training data.
    texture_weight, jump_weight, spectrum_weight: weights of the differences of `texture`, `jumps`
    and `spectrum`.
    perceptual_layers: as for `perceptual_error`; without any, this term is zero.
    is_transposed: the layers see both images with rows and columns exchanged. A small network
    prefers some directions, and the decoder would answer with stripes if they were always the same.
    commitment: weight of the error that moves features to their codes (VAR, equation 5).

    There is no adversarial term. Squared, absolute and edge errors alone favour a blur where detail
    cannot be predicted; the texture term asks for as much local contrast as the image has. Flat
    squares of 2 x 2 pixels, which the perceptual term prefers, satisfy it, but not the term of
    `jumps`. Even then a decoder writes all detail in a few frequencies, which is seen as a lattice
    of dots; the spectrum term asks for as much of each frequency as the image has. The hue term is
    relative to the data's variance: in photographs hue varies little beside brightness, so that no
    code would be spent on it otherwise.

    Returns loss, error (squared), coarse, quantisation: scalars; images: reconstructions
    (B, 3, H, W), not clamped; coarse_images (n, 3, H, W); tokens, residuals: one entry a scale, see
    `quantise`.
    """
    features = _widen(encode_features(codec, images))  # (B, code_dim, h, w)
    residuals, tokens, maps = zip(*quantise(codec, features, scales))
    f_hats = torch.stack(maps)  # (S, B, code_dim, h, w)

    # Codes move to the features, and features slightly to their codes (VAR, equation 5).
    targets = features.expand_as(f_hats)
    quantisation = F.mse_loss(f_hats, targets.detach())
    quantisation = quantisation + commitment * F.mse_loss(targets, f_hats.detach())

    # The gradient of a coarse image passes only through the cell means at its last scale, enlarged
    # as codes are. Passing it to all positions lowers the PSNR of the finest scale by 3.5 dB.
    cells = [F.interpolate(features[coarse], size, mode="area") for size in scales]
    means = torch.stack([enlarge(cell, scales[-1]) for cell in cells])  # (S, n, code_dim, h, w)
    rows = torch.arange(len(coarse), device=coarse.device)  # means has n rows, f_hats B
    coarse_maps = straight_through(f_hats[stops, coarse], means[stops, rows])
    whole_maps = straight_through(f_hats[-1], features)

    decoded = decode_unclamped(codec, torch.cat([whole_maps, coarse_maps])).to(features.dtype)
    whole, coarse_images = decoded.split([len(images), len(coarse)])

    errors = (coarse_images - images[coarse]).square().mean((1, 2, 3))  # (n,)
    coarse_error = images_per_coarse * errors.sum() / len(images)

    error = whole - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    squared_error = error.square().mean()
    loss = squared_error + ABSOLUTE_WEIGHT * error.abs().mean() + EDGE_WEIGHT * edges
    weights = texture_weight, jump_weight, spectrum_weight
    for weight, measure in zip(weights, (texture, jumps, spectrum)):
        if weight:
            loss = loss + weight * (measure(whole) - measure(images)).abs().mean()
    hue_error = hues(error).square().mean() / (hue_variance + 0.01)  # 0.01 for grey images
    loss = loss + HUE_WEIGHT * hue_error
    seen = (whole.mT, images.mT) if is_transposed else (whole, images)
    loss = loss + PERCEPTUAL_WEIGHT * perceptual_error(perceptual_layers, *seen)
    loss = loss + COARSE_WEIGHT * coarse_error + quantisation

    return dict(
        loss=loss,
        error=squared_error,
        coarse=coarse_error,
        quantisation=quantisation,
        images=whole,
        coarse_images=coarse_images,
        tokens=tokens,
        residuals=residuals,
    )


def texture(images):
    """Local contrast (B, 1, H / 4, W / 4): what a 3 x 3 blur removes, root mean square of cells."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return (cell_means((images - blurred).square().sum(1, True)) + 1e-4).sqrt()


def jumps(images):
    """Jumps between neighbours (B, 4, H / 4, W / 4), root mean square of cells of 4 x 4 pixels.

    Maps 0 and 1 are of jumps along rows: 0 of those inside squares of 2 x 2 pixels, 1 of those
    between such squares. Maps 2 and 3 are the same along columns. A decoder with a fold of 2 writes
    such squares. Sizes are rounded up where a side is no multiple of 4.
    """
    found = []
    for lines in (images, images.mT):
        missing = 1 + lines.shape[3] % 2  # no jump behind the last pixel; then an even number
        squares = F.pad(lines.diff(dim=3), (0, missing)).square().sum(1, True)
        for place in (0, 1):
            found.append(F.avg_pool2d(squares[..., place::2], (4, 2), ceil_mode=True))
    along_rows, along_columns = found[:2], [cells.mT for cells in found[2:]]
    return (torch.cat([*along_rows, *along_columns], 1) + 1e-4).sqrt()


def spectrum(images):
    """Local amplitudes of detail (B, 220, H / 16 - 1, W / 16 - 1), one for each of 220 frequencies.

    They are coefficients of the discrete cosine transform (DCT-II, orthonormal) of windows of
    16 x 16 pixels, without those of fewer than six half-periods along both rows and columns. The
    root is taken of their squares, summed over colours and averaged over 2 x 2 neighbouring
    windows. Those four would be the whole of a small image, so where a side has less than 48 pixels
    windows have 8 x 8, with 55 frequencies of at least three half-periods. Sides that are no
    multiples of a window are continued by their last pixels.
    """
    window = 16 if min(images.shape[2:]) >= 48 else 8
    index = torch.arange(window, device=images.device)
    waves = torch.cos(math.pi / window * index[:, None] * (index + 0.5)) * math.sqrt(2 / window)
    waves = torch.cat([waves[:1] / math.sqrt(2), waves[1:]])  # (window, window), orthonormal

    missing = [-side % window for side in images.shape[2:]]
    images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
    windows = images.unflatten(3, (-1, window)).unflatten(2, (-1, window)).transpose(3, 4)
    power = (waves @ windows @ waves.T).square().sum(1)  # (B, rows, columns, window, window)
    low = 3 * window // 8
    fine = torch.cat([power[..., low:, :].flatten(3), power[..., :low, low:].flatten(3)], -1)
    fine = fine.permute(0, 3, 1, 2)  # (B, frequencies, rows, columns)
    near = [min(2, side) for side in fine.shape[2:]]
    return (F.avg_pool2d(fine, near, stride=1) + 1e-3).sqrt()


def hues(images):
    """Colour differences red - blue and 2 green - red - blue (2, B, H / 4, W / 4), cell means."""
    red, green, blue = cell_means(images).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


def measure_hue_variance(images):
    """The variance of `hues` over images (B, 3, H, W), as a float."""
    return hues(images).var((1, 2, 3), correction=0).mean().item()


def cell_means(images):
    """Means over cells of 4 x 4 pixels."""
    return F.adaptive_avg_pool2d(images, [max(1, side // 4) for side in images.shape[2:]])


def perceptual_error(layers, decoded, images):
    """Squared difference of feature maps, as unit vectors, summed over layers (LPIPS, Zhang 2018).

    layers: callables (B, C, h, w) -> (B, C', h, w), applied one after another by `feature_maps`.
    """
    total = 0
    for pair in zip(feature_maps(layers, decoded), feature_maps(layers, images)):
        ours, theirs = (F.normalize(x.float(), dim=1) for x in pair)
        total = total + (ours - theirs).square().sum(1).mean()
    return total


def feature_maps(layers, x):
    """Yields the output of each layer (B, C, h, w); the next layer sees it at half of the sides."""
    for layer in layers:
        x = layer(x)
        yield x
        x = F.avg_pool2d(x, 2, ceil_mode=True)


def straight_through(value, gradient_to):
    """value, whose gradient goes to another tensor of the same shape, gradient_to, instead."""
    return gradient_to + (value - gradient_to).detach()


def revive_codes(codebook, counts, residuals, generator):
    """The codebook (V, code_dim), in which codes that were never chosen become random residuals.

    counts (V,): how often each code was chosen. residuals [(B, n_k, code_dim), ...]: the vectors
    that were quantised. After the first training step this initialises the codebook from data.
    """
    vectors = torch.cat([rows.flatten(0, 1) for rows in residuals])
    chosen = torch.randint(len(vectors), (len(codebook),), generator=generator)
    fresh = vectors[chosen.to(vectors.device)].to(codebook.dtype)
    return torch.where((counts == 0)[:, None], fresh, codebook)


# ---- here the method ends; initialisation and precision


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

    Level i has channels * multipliers[i] channels; channels is a multiple of 32. Every level but
    the last halves the sides. Levels of the decoder have residual_blocks + 1 blocks. With
    attention, one attention layer follows each block of the deepest level. With fold > 1, squares
    of fold x fold pixels become channels before the first convolution.
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
    """[level, ...] for kinds [(width, attended), ...]; all but the last change the resolution."""
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
    """The same tree with the convolutions of encoder and decoder in dtype; gradients pass through.

    Quantisation stays in fp32, because bf16 would choose other tokens.
    """
    nets = dict(encoder=codec["encoder"], decoder=codec["decoder"])
    return codec | pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.ndim == 4 else leaf, nets)


def downsampling(codec):
    """The side of a latent position in image pixels, fold * 2 ** (levels - 1)."""
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
    # values are checked on the CPU only: reading them would make a GPU wait
    if fits and images.is_cpu and not torch.compiler.is_compiling():
        fits = (images.abs() <= 1.001).all()
    if not fits:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: got {got}, expected floats (B, 3, {height}, {width}) in [-1, 1]")


# ---- published weights

PUBLISHED_NAMES = {  # parts of published names -> ours, replaced in this order
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
    """A codec, fp32, from the state dict of a published VAR or HMAR tokenizer.

    ValueError if an entry is missing that such a tokenizer has.
    """
    try:
        codec = {}
        for name, leaf in state_dict.items():
            for theirs, ours in PUBLISHED_NAMES.items():
                name = name.replace(theirs, ours)
            *path, last = name.split(".")
            node = codec
            for key in path:
                node = node.setdefault(key, {})
            node[last] = leaf.float()

        codec = _make_lists(codec)
        codec.pop("quantize", None)  # statistics of how often codes were used
        codec["decoder"]["up"].reverse()  # published by level, ours in the order in which they run
        _check_complete(codec)
        return codec
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"state_dict: not a tokenizer's: {reason}") from error


def _check_complete(codec):
    """LookupError unless a published tokenizer has all leaves of an `init` of its sizes."""
    found = {pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(codec)[0]}
    levels, up = codec["encoder"]["down"], codec["decoder"]["up"]
    if len(levels) != len(up):
        raise LookupError(f"{len(levels)} levels in the encoder, {len(up)} in the decoder")

    channels = len(codec["encoder"]["conv_in"]["bias"])
    widths = [len(level["blocks"][-1]["conv2"]["bias"]) for level in levels]
    sizes = dict(zip(("codes", "code_dim"), codec["codebook"].shape, strict=True))
    with torch.device("meta"):
        whole = init(
            **sizes,
            channels=channels,
            multipliers=[width // channels for width in widths],
            residual_blocks=max(len(level["blocks"]) for level in levels),
            attention=any("attentions" in name for name in found),
        )
    expected = {pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(whole)[0]}
    if missing := sorted(expected - found):
        raise LookupError(f"{len(missing)} entries are missing, such as {missing[0]}")


def _make_lists(node):
    """The tree, with dicts whose keys are "0", "1", ... turned into lists."""
    if not isinstance(node, dict):
        return node
    node = {key: _make_lists(child) for key, child in node.items()}
    return [node[str(i)] for i in range(len(node))] if "0" in node else node
