"""Multi-scale residual VQ tokenizer: images <-> a pyramid of token maps, coarse to fine.

    images (B, 3, H, W) in [-1, 1] -> features (B, code_dim, h, w) -> tokens (B, L) int64
    tokens -> f_hat (B, code_dim, h, w) -> images

`scales` is ((h_0, w_0), ..., (h, w)), coarse to fine; the last one is the size of the latent map.
The tokens of all scales form one sequence of L = sum h_k w_k, row-major inside a scale. Each scale
quantises the residual that the coarser scales left over. Its codes, enlarged to the latent's size
and partly passed through a learned convolution (phi), are added to the accumulated
reconstruction f_hat. A model, `codec`, is a tree of tensors: its keys are the argument names of
functions, and its shapes are the configuration.

    encoder {conv_in, layers [layer, ...], norm_out, conv_out}; quant_conv
    codebook (codes, code_dim); phi [convolution] * 4
    post_quant_conv; decoder {conv_in, layers [layer, ...], norm_out, conv_out}
    layer: the weights of a residual_block or a self_attention, or {downsample} or {upsample}

A training loop, for batches of images whose sides are twice those of the last scale:

    >>> batches = [torch.zeros(8, 3, 16, 16)] * 2
    >>> scales = ((1, 1), (2, 2), (4, 4), (8, 8))
    >>> codec = init(codes=64, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    >>> leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(codec)]
    >>> optimizer = torch.optim.AdamW(leaves, lr=2e-3)
    >>> for step, images in enumerate(batches):
    ...     coarse = torch.arange(0, len(images), 4)
    ...     stops = torch.randint(len(scales), coarse.shape)
    ...     made = training_loss(codec, images, scales, coarse, stops)
    ...     optimizer.zero_grad()
    ...     made["loss"].backward()
    ...     optimizer.step()
    ...     if step % 20 == 0:  # codes that were not chosen begin anew
    ...         counts = torch.cat(made["tokens"], 1).flatten().bincount(minlength=64)
    ...         codec["codebook"].data = revive_codes(codec["codebook"], counts, made["residuals"])
    >>> encode(codec, images, scales).shape
    torch.Size([8, 85])

Sources: VAR (Tian et al. 2024); HMAR (Kumbong et al. 2025); VQGAN's convnet (Esser et al. 2021).
"""

import itertools
import math
import re

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
    with torch.autocast(codes.device.type, enabled=False):
        codes = enlarge(codes, scales[-1])  # (B, code_dim, h, w)
        smoothed = convolution(codes, **codec["phi"][phi_index(k, len(scales))])
    return codes.lerp(smoothed, 0.5)  # half of each, as published


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
    matrices = []
    for small, large in zip(x.shape[2:], size):
        unit_vectors = torch.eye(small, dtype=x.dtype, device=x.device)[None, None]
        columns = F.interpolate(unit_vectors, (large, small), mode="bicubic")
        matrices.append(columns[0, 0])  # (large, small)
    vertical, horizontal = matrices
    return (x.mT @ vertical.mT).mT @ horizontal.mT


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
    # The products of so many vectors with all codes take at most 128 MiB in fp32.
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
    parts = enumerate(tokens.split(lengths(scales), 1))
    return itertools.accumulate(contribution(codec, part, k, scales) for k, part in parts)


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
    pairs = zip(scales[1:], f_hat_by_scale(codec, tokens, scales))  # with that of the scale before
    return torch.cat([resize_to_scale(f_hat, size) for size, f_hat in pairs], 1)


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
    first, *later = lengths(scales)
    parts = tokens[:, first:].split(later, 1)
    masks = [None] * len(later) if mask is None else mask.split(later, 1)
    pairs = enumerate(zip(parts, masks, strict=True), 1)
    own = [own_inputs_of_scale(codec, part, k, scales, hidden) for k, (part, hidden) in pairs]
    return torch.cat(own, 1)


# ---- the convolutional network


def encode_features(codec, images):
    """The encoder's output (B, code_dim, h, w), before quantisation, of images in [-1, 1]."""
    x = F.pixel_unshuffle(images, fold_side(codec["encoder"]["conv_in"]["weight"].shape[1]))
    x = network(x, **codec["encoder"])
    return convolution(x, **codec["quant_conv"])


def decode_features(codec, f_hat):
    """Images (B, 3, H, W) in [-1, 1], fp32, decoded from f_hat (B, code_dim, h, w)."""
    return _widen(decode_unclamped(codec, f_hat)).clamp(-1, 1)


def decode_unclamped(codec, f_hat):
    """The output of the decoder before it is clamped to [-1, 1]; training needs its gradients."""
    x = convolution(f_hat, **codec["post_quant_conv"])
    x = network(x, **codec["decoder"])
    return F.pixel_shuffle(x, fold_side(x.shape[1]))


def fold_side(channels):
    """s, if squares of s x s pixels of three colours are folded into 3 s^2 channels."""
    return math.isqrt(channels // 3)


def network(x, conv_in, layers, norm_out, conv_out):
    """x (B, C, h, w) after all layers: residual blocks, attention, changes of resolution."""
    x = convolution(x, **conv_in)
    for weights in layers:
        if "conv1" in weights:
            x = residual_block(x, **weights)
        elif "qkv" in weights:
            x = self_attention(x, **weights)
        elif "downsample" in weights:
            x = convolution(F.pad(x, (0, 1, 0, 1)), **weights["downsample"], stride=2, padding=0)
        else:
            x = convolution(F.interpolate(x, scale_factor=2, mode="nearest"), **weights["upsample"])
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


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
HUE_WEIGHT, PERCEPTUAL_WEIGHT, COARSE_WEIGHT, COMMITMENT_WEIGHT = 0.28, 0.08, 0.5, 0.1


def training_loss(
    codec,
    images,
    scales,
    coarse,
    stops,
    *,
    hue_variance=None,
    texture_weight=0.5,
    jump_weight=0.0,
    spectrum_weight=0.0,
    perceptual_layers=(),
    is_transposed=False,
    images_per_coarse=4.0,
):
    """The whole loss of the tokenizer on images (B, 3, H, W) in [-1, 1], as a dict.

    coarse, stops (n,) int64: image coarse[i] is decoded a second time, from scales 0 to stops[i]
    only, so that coarse scales become images by themselves.
    images_per_coarse: images in a batch for each image in `coarse`. The coarse error is divided by
    the expected number of such images, so that the losses of the parts of a batch add up to its
    loss although they have unequal numbers of them.
    hue_variance: `measure_hue_variance` of the training data; None: of these images. The hue term
    is relative to it: in photographs hue varies little beside brightness, so that no code would be
    spent on it otherwise.
    texture_weight: asks for as much local contrast (`texture`) as the image has. Squared, absolute
    and edge errors alone favour a blur where detail cannot be predicted.
    jump_weight: weight of `jumps`, because flat squares of 2 x 2 pixels, which the perceptual term
    prefers, have the right texture too.
    spectrum_weight: weight of `spectrum`. Even then a decoder writes all detail in a few
    frequencies, which is visible as a lattice of dots.
    perceptual_layers: as for `perceptual_error`; without any, this term is zero.
    is_transposed: the layers see both images with rows and columns exchanged. A small network
    prefers some directions, and the decoder would answer with stripes if they were always the same.

    Returns loss, error (squared), coarse, quantisation: scalars; images: reconstructions
    (B, 3, H, W), not clamped; coarse_images (n, 3, H, W); tokens, residuals: one entry a scale, see
    `quantise`. ValueError as for `encode`. There is no adversarial term.
    """
    check_images(codec, images, scales)
    features = _widen(encode_features(codec, images))  # (B, code_dim, h, w)
    residuals, tokens, maps = zip(*quantise(codec, features, scales))
    f_hats = torch.stack(maps)  # (S, B, code_dim, h, w)

    targets = features.expand_as(f_hats)
    codes_to_features = F.mse_loss(f_hats, targets.detach())
    features_to_codes = F.mse_loss(targets, f_hats.detach())
    quantisation = codes_to_features + COMMITMENT_WEIGHT * features_to_codes  # VAR, equation 5

    # These maps pass gradients straight through to the features; coarse ones only to the cell means
    # at their last scale, enlarged as codes are: else the PSNR of the finest scale falls by 3.5 dB.
    cells = [F.interpolate(features[coarse], size, mode="area") for size in scales]
    means = torch.stack([enlarge(cell, scales[-1]) for cell in cells])  # (S, n, code_dim, h, w)
    means = means[stops, torch.arange(len(stops), device=stops.device)]  # (n, code_dim, h, w)
    coarse_maps = means + (f_hats[stops, coarse] - means).detach()
    whole_maps = features + (f_hats[-1] - features).detach()

    decoded = decode_unclamped(codec, torch.cat([whole_maps, coarse_maps])).to(features.dtype)
    whole, coarse_images = decoded.split([len(images), len(coarse)])

    errors = (coarse_images - images[coarse]).square().mean((1, 2, 3))  # (n,)
    coarse_error = images_per_coarse * errors.sum() / len(images)

    error = whole - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    squared_error = error.square().mean()
    terms = [squared_error, ABSOLUTE_WEIGHT * error.abs().mean(), EDGE_WEIGHT * edges]
    weights = texture_weight, jump_weight, spectrum_weight
    for weight, measure in zip(weights, (texture, jumps, spectrum)):
        if weight:
            terms.append(weight * (measure(whole) - measure(images)).abs().mean())
    variance = measure_hue_variance(images) if hue_variance is None else hue_variance
    hue_error = hues(error).square().mean() / (variance + 0.01)  # 0.01 for grey images
    terms.append(HUE_WEIGHT * hue_error)
    seen = (whole.mT, images.mT) if is_transposed else (whole, images)
    terms.append(PERCEPTUAL_WEIGHT * perceptual_error(perceptual_layers, *seen))
    terms += [COARSE_WEIGHT * coarse_error, quantisation]

    losses = dict(error=squared_error, coarse=coarse_error, quantisation=quantisation)
    outputs = dict(images=whole, coarse_images=coarse_images, tokens=tokens, residuals=residuals)
    return dict(loss=sum(terms)) | losses | outputs


def texture(images):
    """Local contrast (B, 1, H / 4, W / 4): what a 3 x 3 blur removes, root mean square of cells."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return (cell_means((images - blurred).square().sum(1, True)) + 1e-4).sqrt()


def jumps(images):
    """Jumps between neighbours (B, 4, H / 4, W / 4), root mean square of cells of 4 x 4 pixels.

    Maps 0 and 1 are of jumps along rows, inside squares of 2 x 2 pixels and between them; 2 and 3
    are the same along columns. A decoder with a fold of 2 writes such squares. Sizes round up.
    """

    def along_rows(images):  # (B, 2, H / 4, W / 4)
        missing = 1 + images.shape[3] % 2  # no jump behind the last pixel; then an even number
        squares = F.pad(images.diff(dim=3), (0, missing)).square().sum(1, True)
        places = squares[..., ::2], squares[..., 1::2]  # inside squares and between them
        return torch.cat([F.avg_pool2d(x, (4, 2), ceil_mode=True) for x in places], 1)

    return (torch.cat([along_rows(images), along_rows(images.mT).mT], 1) + 1e-4).sqrt()


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
        ours, theirs = (x.float().movedim(1, 3).flatten(0, 2) for x in pair)
        # |u - v|^2 = 2 (1 - cos) for unit vectors, in half of the time that these take.
        total = total + 2 * F.cosine_embedding_loss(ours, theirs, ours.new_ones(len(ours)))
    return total


def feature_maps(layers, x):
    """Yields the output of each layer (B, C, h, w); the next layer sees it at half of the sides."""
    for layer in layers:
        x = layer(x)
        yield x
        x = F.avg_pool2d(x, 2, ceil_mode=True)


def revive_codes(codebook, counts, residuals, generator=None):
    """The codebook (V, code_dim), in which codes that were never chosen become random residuals.

    counts (V,): how often each code was chosen. residuals [(B, n_k, code_dim), ...]: the vectors
    that were quantised. After the first training step this initialises the codebook from data.
    """
    vectors = torch.cat([rows.flatten(0, 1) for rows in residuals])
    chosen = torch.randint(len(vectors), (len(codebook),), generator=generator)
    fresh = vectors[chosen.to(vectors.device)].to(codebook.dtype)
    return torch.where((counts == 0)[:, None], fresh, codebook)


# ---- here the method ends; initialisation, precision, checks and published weights


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

    Level i, all that runs at one resolution, has channels * multipliers[i] channels; channels is a
    multiple of 32. Every level but the last halves the sides. Levels of the decoder have
    residual_blocks + 1 blocks. With attention, one attention layer follows each block of the
    deepest level. With fold > 1, squares of fold x fold pixels become channels before the first
    convolution.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [channels * multiplier for multiplier in multipliers]
    deepest = widths[-1]

    def conv(inputs, outputs, size=3):
        bound = (inputs * size * size) ** -0.5
        weight = torch.empty(outputs, inputs, size, size)
        weight.uniform_(-bound, bound, generator=generator)
        return dict(weight=weight, bias=torch.zeros(outputs))

    def norm(width):
        return dict(weight=torch.ones(width), bias=torch.zeros(width))

    def residual(inputs, outputs):
        block = dict(norm1=norm(inputs), conv1=conv(inputs, outputs))
        block |= dict(norm2=norm(outputs), conv2=conv(outputs, outputs))
        return block if inputs == outputs else block | dict(shortcut=conv(inputs, outputs, 1))

    def attend(width):
        return dict(norm=norm(width), qkv=conv(width, 3 * width, 1), project=conv(width, width, 1))

    def level(inputs, width, count, attentions):  # by turns, as long as there are attentions
        blocks = [residual(inputs if i == 0 else width, width) for i in range(count)]
        pairs = itertools.zip_longest(blocks, [attend(width) for _ in range(attentions)])
        return [layer for pair in pairs for layer in pair if layer is not None]

    def levels(inputs, order, count, change):
        layers = []
        for i in order:
            if layers:
                layers.append({change: conv(inputs, inputs)})
            has_attention = attention and i == len(widths) - 1
            layers += level(inputs, widths[i], count, count * has_attention)
            inputs = widths[i]
        return layers

    encoder = dict(conv_in=conv(3 * fold**2, channels))
    encoder["layers"] = levels(channels, range(len(widths)), residual_blocks, "downsample")
    encoder["layers"] += level(deepest, deepest, 2, int(attention))
    encoder |= dict(norm_out=norm(deepest), conv_out=conv(deepest, code_dim))

    codec = dict(encoder=encoder, quant_conv=conv(code_dim, code_dim))
    codec["codebook"] = torch.empty(codes, code_dim).normal_(generator=generator)
    codec["phi"] = [conv(code_dim, code_dim) for _ in range(4)]
    codec["post_quant_conv"] = conv(code_dim, code_dim)

    decoder = dict(conv_in=conv(code_dim, deepest))
    decoder["layers"] = level(deepest, deepest, 2, int(attention))
    decoder["layers"] += levels(deepest, range(len(widths))[::-1], residual_blocks + 1, "upsample")
    decoder |= dict(norm_out=norm(widths[0]), conv_out=conv(widths[0], 3 * fold**2))
    return codec | dict(decoder=decoder)


def cast(codec, dtype):
    """The same tree with the convolutions of encoder and decoder in dtype; gradients pass through.

    Quantisation stays in fp32, because bf16 would choose other tokens.
    """
    nets = {net: codec[net] for net in ("encoder", "decoder")}
    return codec | pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.ndim == 4 else leaf, nets)


def downsampling(codec):
    """The side of a latent position in image pixels: fold, doubled by changes of resolution."""
    layers, weight = codec["encoder"]["layers"], codec["encoder"]["conv_in"]["weight"]
    return fold_side(weight.shape[1]) * 2 ** sum("downsample" in layer for layer in layers)


def check_scales(scales):
    """ValueError unless scales are (height, width) pairs, none smaller than the one before."""
    if any([1, *sides] != sorted([1, *sides]) for sides in zip(*scales)):
        raise ValueError(f"scales: got {scales}, expected (height, width), coarse to fine")


def check_images(codec, images, scales):
    """ValueError unless images are floats (B, 3, H, W) in [-1, 1] whose latent fits the scales."""
    check_scales(scales)
    height, width = (downsampling(codec) * side for side in scales[-1])
    fits = images.is_floating_point() and images.shape[1:] == (3, height, width)
    # Values are read on the CPU only, because a GPU would be waited for, and not while compiling.
    is_plain = type(images) is torch.Tensor and not torch.compiler.is_compiling()
    if not fits or (is_plain and images.is_cpu and not (images.abs() <= 1.001).all()):
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: got {got}, expected floats (B, 3, {height}, {width}) in [-1, 1]")


PUBLISHED_NAMES = {  # parts of our names -> published ones
    "codebook": "quantize.embedding.weight",
    "phi.": "quantize.quant_resi.qresi_ls.",
    "shortcut": "nin_shortcut",
    "project": "proj_out",
    "sample": "sample.conv",  # of downsample, upsample
}


def from_published(state_dict):
    """A codec, fp32, from the state dict of a published VAR or HMAR tokenizer.

    These have the layers of `init` by default, of any width. KeyError names a missing entry.
    """

    def levels(stack, order, count):
        names = []
        for i in order:
            for j in range(count):
                names.append(f"{stack}.{i}.block.{j}")
                if i == 4:  # the deepest level has attention
                    names.append(f"{stack}.{i}.attn.{j}")
            names.append(f"{stack}.{i}")  # of its change of resolution
        return names[:-1]

    middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    down, up = levels("down", range(5), 2), levels("up", range(5)[::-1], 3)
    layers = dict(encoder=down + middle, decoder=middle + up)

    def load(path, _):
        keys = re.findall(r"\w+", pytree.keystr(path))
        if "layers" in keys:
            net, _, index, *rest = keys
            keys = [net, layers[net][int(index)], *rest]
        name = ".".join(keys)
        for ours, theirs in PUBLISHED_NAMES.items():
            name = name.replace(ours, theirs)
        return state_dict[name].float()

    with torch.device("meta"):
        expected = init()
    return pytree.tree_map_with_path(load, expected)
