"""Multi-scale residual VQ tokenizer: images <-> a pyramid of token maps, coarse to fine.

    images (B, 3, H, W) in [-1, 1] -> features (B, code_dim, h, w) -> tokens (B, L) int64 -> f_hat (B, code_dim, h, w) -> images

`scales` is ((h_0, w_0), ..., (h, w)), coarse to fine, the last one being the latent's size. The tokens of all scales stand in one row of L
= sum h_k w_k, row-major inside a scale. Each scale quantises what the coarser ones left over (the residual), and its codes are added to the
running reconstruction f_hat. A model is a tree of tensors whose keys are the argument names of the functions below, its shapes are its
configuration. `quantise`, `contribution` and `next_scale_inputs` are the method; then come the convnet, training and published weights.

    >>> params = init(codes=64, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    >>> scales = ((1, 1), (2, 2), (4, 4))
    >>> tokens = encode(params, torch.zeros(2, 3, 8, 8), scales)
    >>> tokens.shape, decode(params, tokens, scales).shape, next_scale_inputs(params, tokens, scales).shape
    (torch.Size([2, 21]), torch.Size([2, 3, 8, 8]), torch.Size([2, 20, 8]))

Sources: VAR (Tian et al. 2024, section 3.2 and algorithms 1, 2); HMAR (Kumbong et al. 2025); the convnet is VQGAN's (Esser et al. 2021).
"""
import itertools
import re

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree


def encode(params, images, scales):
    """Tokens (B, L) int64 of images (B, 3, H, W) in [-1, 1]. ValueError on a wrong shape, dtype or range, or scales that do not fit."""
    check_images(params, images, scales)
    with torch.no_grad():
        return quantised(params, features(params, images), scales)


def quantised(params, features, scales):
    """Tokens (B, L) int64 of features (B, code_dim, h, w)."""
    return torch.cat([tokens for _, tokens, _ in quantise(params["codebook"], params["phi"], features, scales)], 1)


def decode(params, tokens, scales):
    """Images (B, 3, H, W) in [-1, 1], fp32, of tokens (B, L) int64. ValueError on tokens that do not fit the scales or the codebook."""
    return decode_features(params, accumulate(params, tokens, scales))


def accumulate(params, tokens, scales):
    """f_hat (B, code_dim, h, w): the sum of all scales' contributions. tokens (B, L) int64 (VAR, algorithm 2)."""
    return _running_f_hat(params, tokens, scales)[-1]


def next_scale_inputs(params, tokens, scales):
    """What the transformer sees of scales 1, 2, ...: tokens (B, L) -> (B, L - len_0, code_dim).

    For each, f_hat of all coarser scales, area-resized to its size. It knows no more of them than this map: HMAR's Markov property.
    """
    inputs = [resize_to_scale(f_hat, size) for f_hat, size in zip(_running_f_hat(params, tokens, scales), scales[1:])]
    return torch.cat(inputs or [F.embedding(tokens[:, :0], params["codebook"])], 1)


def masked_inputs(params, tokens, scales, mask=None):
    """What the masked branch sees of scales 1, 2, ... themselves: tokens (B, L) -> (B, L - len_0, code_dim).

    For each scale it is the scale's own contribution, not accumulated, area-resized to its size. mask (B, L - len_0) bool, True = hidden:
    hidden codes are zeroed before they are resized, lest anything of them leak into their neighbours; None is the published way: it does.
    """
    _check_tokens(params, tokens, scales)
    first, *finer = lengths(scales)
    if mask is not None and (mask.shape != (len(tokens), sum(finer)) or mask.dtype != torch.bool):
        raise ValueError(f"mask: got {tuple(mask.shape)} {mask.dtype}, expected bool {(len(tokens), sum(finer))}")
    hidden = [None] * len(finer) if mask is None else mask.split(finer, 1)
    scale_tokens = enumerate(zip(tokens[:, first:].split(finer, 1), hidden), 1)
    inputs = [masked_scale_input(params, own, k, scales, hide) for k, (own, hide) in scale_tokens]
    return torch.cat(inputs or [F.embedding(tokens[:, :0], params["codebook"])], 1)


def masked_scale_input(params, tokens, k, scales, hidden=None):
    """`masked_inputs` of scale k alone: tokens (B, n_k), hidden (B, n_k) bool or None -> (B, n_k, code_dim)."""
    codes = F.embedding(tokens, params["codebook"])
    if hidden is not None:
        codes = codes.masked_fill(hidden[..., None], 0)
    return resize_to_scale(contribution(params["phi"], codes, k, scales), scales[k])


def quantise(codebook, phi, features, scales):
    """The residual pyramid (VAR, algorithm 1): for each scale yields (residual (B, n_k, code_dim), tokens (B, n_k), f_hat).

    features, f_hat (B, code_dim, h, w). `residual` is what the scale's tokens were chosen for, f_hat the map accumulated up to and with
    this scale. In fp32 (fp64 if the features are); gradients reach codebook and phi through f_hat, none passes the choice of a token.
    """
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    f_hat = torch.zeros_like(features)
    for k, size in enumerate(scales):
        residual = resize_to_scale(features - f_hat.detach(), size)  # (B, n_k, code_dim)
        tokens = nearest(codebook, residual)
        f_hat = f_hat + contribution(phi, F.embedding(tokens, codebook), k, scales)
        yield residual, tokens, f_hat


def nearest(codebook, vectors):
    """Index (...) of the code in codebook (V, code_dim) nearest to each of vectors (..., code_dim), by squared L2 distance."""
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        codebook = codebook.to(vectors.dtype)
        squares = codebook.square().sum(1)  # a vector's own square moves no minimum
        parts = vectors.flatten(0, -2).split(max(1, 2**25 // len(codebook)))  # 128 MiB of distances at a time
        return torch.cat([torch.argmin(squares - 2 * part @ codebook.T, -1) for part in parts]).view(vectors.shape[:-1])


def contribution(phi, codes, k, scales):
    """What scale k adds to f_hat (B, code_dim, h, w): its codes (B, n_k, code_dim), resized bicubically to that size, through its phi."""
    codes = codes.to(torch.promote_types(codes.dtype, torch.float32)).transpose(1, 2).unflatten(2, scales[k])
    if k < len(scales) - 1:
        codes = F.interpolate(codes, scales[-1], mode="bicubic")
    with torch.autocast(codes.device.type, enabled=False):
        return 0.5 * codes + 0.5 * convolution(codes, **phi[phi_index(k, len(scales), len(phi))])


def phi_index(k, scale_count, phi_count=4):
    """Which phi serves scale k: the nearest of evenly spread ticks, in float64, whose rounding decided the published ties at ten scales."""
    edge, place = 1 / 3 / phi_count, k / max(scale_count - 1, 1)
    ticks = [edge + i * ((1 - edge - edge) / max(phi_count - 1, 1)) for i in range(phi_count)]
    return min(range(phi_count), key=lambda i: abs(ticks[i] - place))


def resize_to_scale(f_hat, size):
    """f_hat (B, code_dim, h, w), area-resized to a scale's size (h_k, w_k), as a row of features (B, h_k w_k, code_dim)."""
    if size != tuple(f_hat.shape[2:]):
        f_hat = F.interpolate(f_hat, size, mode="area")
    return f_hat.flatten(2).transpose(1, 2)


def lengths(scales):
    """Tokens of each scale, [h_k w_k, ...]."""
    return [h * w for h, w in scales]


def features(params, images):
    """The encoder's output (B, code_dim, h, w), before quantisation, of images (B, 3, H, W) in [-1, 1]."""
    return convolution(encoder(images, **params["encoder"]), **params["quant_conv"])


def decode_features(params, f_hat):
    """Images (B, 3, H, W) in [-1, 1], fp32, of an accumulated map f_hat (B, code_dim, h, w)."""
    images = decoder(convolution(f_hat, **params["post_quant_conv"]), **params["decoder"])
    return images.to(torch.promote_types(images.dtype, torch.float32)).clamp(-1, 1)


def encoder(x, conv_in, down, middle, norm_out, conv_out):
    """Images (B, 3, H, W) -> (B, code_dim, h, w): levels that halve the sides, then the middle blocks (VQGAN)."""
    x = convolution(x, **conv_in)
    for level in down:
        x = residual_blocks(x, level["blocks"], level["attentions"])
        if "downsample" in level:
            x = convolution(F.pad(x, (0, 1, 0, 1)), **level["downsample"], stride=2, padding=0)
    x = residual_blocks(x, **middle)
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def decoder(x, conv_in, middle, up, norm_out, conv_out):
    """(B, code_dim, h, w) -> images (B, 3, H, W), not clamped: the encoder's way back."""
    x = residual_blocks(convolution(x, **conv_in), **middle)
    for level in up:  # deepest first
        x = residual_blocks(x, level["blocks"], level["attentions"])
        if "upsample" in level:
            x = convolution(F.interpolate(x, scale_factor=2, mode="nearest"), **level["upsample"])
    return convolution(F.silu(group_norm(x, **norm_out)), **conv_out)


def residual_blocks(x, blocks, attentions):
    """Residual blocks, an attention after each while there are attentions."""
    for i, block in enumerate(blocks):
        x = residual_block(x, **block)
        if i < len(attentions):
            x = self_attention(x, **attentions[i])
    return x


def residual_block(x, norm1, conv1, norm2, conv2, shortcut=None):
    """x plus two convolutions of it; a 1x1 shortcut where the channels change."""
    h = convolution(F.silu(group_norm(x, **norm1)), **conv1)
    h = convolution(F.silu(group_norm(h, **norm2)), **conv2)
    return h + (x if shortcut is None else convolution(x, **shortcut))


def self_attention(x, norm, qkv, project):
    """Single-head attention over all positions, scale channels^-0.5."""
    h, w = x.shape[2:]
    q, k, v = convolution(group_norm(x, **norm), **qkv).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B, 1, h w, channels)
    return x + convolution(F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (h, w)), **project)


def convolution(x, weight, bias, stride=1, padding=None):
    """In the weight's dtype, so that a tree from `cast` computes in bf16 with norms and quantiser in fp32."""
    return F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride, weight.shape[-1] // 2 if padding is None else padding)


def group_norm(x, weight, bias):
    """Over 32 groups, in the dtype of its weight."""
    return F.group_norm(x.to(weight.dtype), 32, weight, bias, eps=1e-6)


def training_pass(params, images, scales, beta=0.25, quantised=True, stop=None):
    """One differentiable pass: (reconstruction (B, 3, H, W), not clamped; quantisation loss; residuals a scale; tokens a scale).

    The loss, averaged over scales on the accumulated map (VAR, equation 5): codebook term |f_hat_k - sg(f)|^2 plus beta times commitment
    term |sg(f_hat_k) - f|^2. The decoder's gradient passes straight through to the encoder. quantised=False is a plain autoencoder;
    with stop the image is decoded from the first `stop` scales only.
    """
    f = features(params, images)
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    loss, residuals, tokens, f_hat = f.new_zeros(()), [], [], f
    if quantised:
        for residual, own, f_hat in itertools.islice(quantise(params["codebook"], params["phi"], f, scales), stop):
            loss = loss + (F.mse_loss(f_hat, f.detach()) + beta * F.mse_loss(f, f_hat.detach())) / (stop or len(scales))
            residuals.append(residual)
            tokens.append(own)
        f_hat = f + (f_hat - f).detach()
    return decoder(convolution(f_hat, **params["post_quant_conv"]), **params["decoder"]).to(f.dtype), loss, residuals, tokens


def data_codebook(params, features, scales, generator, rounds=10):
    """A codebook (V, code_dim) made of features (B, code_dim, h, w) of some hundred images.

    Each scale in turn gets an equal share of codes, by k-means over its residuals, given the shares before. It starts from a draw with
    jitter, and with repetition where a scale has fewer vectors than codes.
    """
    f, count, made = features.detach().float(), len(params["codebook"]), []
    f_hat = torch.zeros_like(f)
    for k, size in enumerate(scales):
        vectors = resize_to_scale(f - f_hat, size).flatten(0, 1)
        share = count * (k + 1) // len(scales) - count * k // len(scales)
        if share == 0:
            continue
        order = torch.randperm(len(vectors), generator=generator)
        centres = vectors[order[torch.arange(share) % len(order)]]
        centres = centres + 1e-3 * vectors.std() * torch.randn(centres.shape, generator=generator).to(centres.device)
        for _ in range(rounds):
            nearest_centre = nearest(centres, vectors)
            sums, sizes = (torch.zeros_like(centres[:, :x.shape[1]]).index_add_(0, nearest_centre, x)
                           for x in (vectors, torch.ones_like(vectors[:, :1])))
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        made.append(centres)
        codes = F.embedding(nearest(torch.cat(made), vectors), torch.cat(made)).view(len(f), -1, f.shape[1])
        f_hat = f_hat + contribution(params["phi"], codes, k, scales).detach()
    return torch.cat(made)


def discriminator(images, layers):
    """Realness (B, h, w) of overlapping patches of images (B, 3, H, W): a small PatchGAN (Isola et al. 2017) under spectral norm."""
    *halving, last = layers
    for layer in halving:
        images = F.leaky_relu(F.conv2d(images, spectrally_normalised(layer["weight"]), layer["bias"], stride=2, padding=1), 0.2)
    return F.conv2d(images, spectrally_normalised(last["weight"]), last["bias"], padding=1).squeeze(1)


def spectrally_normalised(weight):
    """A weight over its largest singular value, by power iteration from a fixed start, so that no state is kept (Miyato et al. 2018)."""
    matrix = weight.flatten(1)
    with torch.no_grad():
        v = torch.ones_like(matrix[0])
        for _ in range(8):
            u = F.normalize(matrix @ v, dim=0)
            v = F.normalize(matrix.T @ u, dim=0)
    return weight / (u @ matrix @ v)


def init_discriminator(channels=64, seed=0):
    """Layers for `discriminator`: three that halve the image, one that judges."""
    generator, sizes = torch.Generator().manual_seed(seed), itertools.pairwise((3, channels, 2 * channels, 4 * channels, 1))
    return [dict(weight=torch.empty(outputs, inputs, 4, 4).normal_(0, 0.02, generator=generator), bias=torch.zeros(outputs))
            for inputs, outputs in sizes]


def augmented(images, uniform):
    """Images (B, 3, H, W) for the discriminator, as uniform (B, 4) in [0, 1) says: mirrored, moved by up to an eighth, lighter, darker."""
    mirror, x, y, light = uniform.to(images.dtype).T
    move = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    move[:, 0, 0], move[:, 1, 1] = torch.where(mirror < 0.5, -1.0, 1.0), 1
    move[:, 0, 2], move[:, 1, 2] = (x - 0.5) / 2, (y - 0.5) / 2
    grid = F.affine_grid(move, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False) + (light[:, None, None, None] - 0.5) / 2


def revive_codes(codebook, counts, residuals, generator):
    """(codebook, dead (V,) bool): codes never chosen (counts (V,) == 0) become random vectors of residuals [(B, n_k, code_dim), ...]."""
    dead = counts == 0
    vectors = torch.cat([residual.flatten(0, 1) for residual in residuals])
    chosen = torch.randint(len(vectors), (len(codebook),), generator=generator)
    return torch.where(dead[:, None], vectors[chosen.to(vectors.device)].to(codebook.dtype), codebook), dead


def init(*, codes=4096, code_dim=32, channels=160, multipliers=(1, 1, 2, 2, 4), residual_blocks=2, attention=True, phis=4, seed=0):
    """A new tokenizer tree, fp32; the defaults are the published sizes, with 108,948,355 parameters.

    Channels a level are channels * multiplier and must divide by 32 (group norm). Downsampling is 2 ** (len(multipliers) - 1). The decoder
    has one residual block a level more than the encoder; with attention, one follows each of the deepest level. Nothing is allocated under
    torch.device("meta"). ValueError on sizes below 1 or channels that do not divide.
    """
    widths = [channels * multiplier for multiplier in multipliers]
    if not widths or any(width <= 0 or width % 32 for width in widths):
        raise ValueError(f"channels, multipliers: got {channels}, {multipliers}, expected products that are positive multiples of 32")
    if min(codes, code_dim, residual_blocks, phis) < 1:
        raise ValueError(f"codes, code_dim, residual_blocks, phis: got {(codes, code_dim, residual_blocks, phis)}, expected 1 or more")
    generator = None if torch.empty(0).is_meta else torch.Generator().manual_seed(seed)

    def conv(inputs, outputs, size=3):
        bound = (inputs * size * size) ** -0.5
        return dict(weight=torch.empty(outputs, inputs, size, size).uniform_(-bound, bound, generator=generator), bias=torch.zeros(outputs))

    def norm(width):
        return dict(weight=torch.ones(width), bias=torch.zeros(width))

    def block(inputs, outputs):
        tree = dict(norm1=norm(inputs), conv1=conv(inputs, outputs), norm2=norm(outputs), conv2=conv(outputs, outputs))
        return tree if inputs == outputs else tree | dict(shortcut=conv(inputs, outputs, 1))

    def attend(width):
        return dict(norm=norm(width), qkv=conv(width, 3 * width, 1), project=conv(width, width, 1))

    def level(inputs, outputs, count, deepest):
        blocks = [block(inputs if i == 0 else outputs, outputs) for i in range(count)]
        return dict(blocks=blocks, attentions=[attend(outputs) for _ in blocks] if deepest and attention else [])

    def middle():
        return dict(blocks=[block(widths[-1], widths[-1]) for _ in range(2)], attentions=[attend(widths[-1])] if attention else [])

    last, inputs, down, up = len(widths) - 1, [channels, *widths], [], []  # level i of the encoder reads inputs[i] channels
    for i, width in enumerate(widths):
        down.append(level(inputs[i], width, residual_blocks, i == last) | (dict(downsample=conv(width, width)) if i < last else {}))
    for i, width in reversed(list(enumerate(widths))):
        up.append(level(widths[min(i + 1, last)], width, residual_blocks + 1, i == last) | (dict(upsample=conv(width, width)) if i else {}))
    return dict(
        encoder=dict(conv_in=conv(3, channels), down=down, middle=middle(), norm_out=norm(widths[-1]), conv_out=conv(widths[-1], code_dim)),
        quant_conv=conv(code_dim, code_dim),
        codebook=torch.empty(codes, code_dim).normal_(generator=generator),
        phi=[conv(code_dim, code_dim) for _ in range(phis)],
        post_quant_conv=conv(code_dim, code_dim),
        decoder=dict(conv_in=conv(code_dim, widths[-1]), middle=middle(), up=up, norm_out=norm(widths[0]), conv_out=conv(widths[0], 3)))


def cast(params, dtype):
    """The same tree with the encoder's and decoder's convolutions in dtype, norms, codebook and phi as they are. Gradients pass through."""
    nets = dict(encoder=params["encoder"], decoder=params["decoder"])
    return params | pytree.tree_map(lambda tensor: tensor.to(dtype) if tensor.ndim == 4 else tensor, nets)


def downsampling(params):
    """Image pixels per side of a latent position, 2 ** (levels - 1)."""
    return 2 ** (len(params["encoder"]["down"]) - 1)


def _running_f_hat(params, tokens, scales):
    """f_hat after each scale, [(B, code_dim, h, w), ...]."""
    _check_tokens(params, tokens, scales)
    codes = (F.embedding(own, params["codebook"]) for own in tokens.split(lengths(scales), 1))
    return list(itertools.accumulate(contribution(params["phi"], own, k, scales) for k, own in enumerate(codes)))


def check_scales(scales):
    """ValueError unless scales is a sequence of (height, width) pairs, none smaller than the one before."""
    pairs = isinstance(scales, (tuple, list)) and len(scales) > 0 and all(
        isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size) for size in scales)
    if not pairs or any(h < before_h or w < before_w for (before_h, before_w), (h, w) in itertools.pairwise(scales)):
        raise ValueError(f"scales: got {scales}, expected (height, width) pairs of positive integers, coarse to fine")


def _may_look(tensor):
    """Whether values can be checked: on an accelerator a look would stall its queue, in a compiled function it would cut the graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_images(params, images, scales):
    """ValueError unless images are floats (B, 3, H, W) in [-1, 1] whose latent has the last scale's size."""
    check_scales(scales)
    step = downsampling(params)
    latent = tuple(side // step for side in images.shape[2:])
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected a float tensor (B, 3, H, W)")
    if images.shape[2] % step or images.shape[3] % step or 0 in images.shape:
        raise ValueError(f"images: got {images.shape[2]}x{images.shape[3]} pixels, expected sides that divide by the downsampling, {step}")
    if tuple(scales[-1]) != latent:
        raise ValueError(f"scales: the last is {tuple(scales[-1])}, expected the latent's size {latent}")
    if _may_look(images) and not images.abs().amax() <= 1.001:
        raise ValueError(f"images: got values from {images.min():.3g} to {images.max():.3g}, expected [-1, 1]")


def _check_tokens(params, tokens, scales):
    check_scales(scales)
    total, codes = sum(lengths(scales)), len(params["codebook"])
    if tokens.ndim != 2 or tokens.shape[1] != total or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected int64 (B, {total}) for scales {scales}")
    if _may_look(tokens) and len(tokens) and not 0 <= tokens.min() <= tokens.max() < codes:
        raise ValueError(f"tokens: got values from {tokens.min()} to {tokens.max()}, expected 0 to {codes - 1}")


PUBLISHED_NAMES = (  # patterns of our names, applied in order
    (r"^codebook$", "quantize.embedding.weight"), (r"^phi\.", "quantize.quant_resi.qresi_ls."), (r"middle\.blocks\.0", "mid.block_1"),
    (r"middle\.blocks\.1", "mid.block_2"), (r"middle\.attentions\.0", "mid.attn_1"), (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."), (r"shortcut", "nin_shortcut"), (r"project", "proj_out"), (r"(down|up)sample", r"\1sample.conv"))


def from_published(state_dict, *, dtype=torch.float32):
    """A tree from a published VAR or HMAR tokenizer of any size, or a VAR trainer's file. ValueError: missing, unexpected, other shapes."""
    state = state_dict
    for name in ("trainer", "vae_local"):  # of a VAR trainer's file
        state = state.get(name, state) if isinstance(state, dict) else {}
    state = {str(name): tensor for name, tensor in state.items()} if isinstance(state, dict) else {}
    state.pop("quantize.ema_vocab_hit_SV", None)  # statistics of use
    sizes = ("encoder.conv_in.bias", "quantize.embedding.weight")
    if missing := [name for name in sizes if not torch.is_tensor(state.get(name))]:
        raise ValueError("state_dict: expected a published tokenizer, "
                         f"got {type(state_dict).__name__} with {', '.join(list(state)[:10]) or 'no names'}, without {', '.join(missing)}")

    def count(pattern):
        return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=0)

    def width(level):  # it stands in three biases, some of which may be missing or wrong
        return max(len(state.get(f"encoder.down.{level}.block.0.{part}.bias", ())) for part in ("conv1", "conv2", "norm2"))
    channels = max(32, len(state["encoder.conv_in.bias"]) // 32 * 32)  # what does not divide is told below
    multipliers = [max(1, width(level) // channels) for level in range(count(r"encoder\.down\.(\d+)\."))]
    codes, code_dim = state["quantize.embedding.weight"].shape
    with torch.device("meta"):
        template = init(codes=codes, code_dim=code_dim, channels=channels, multipliers=multipliers,
                        residual_blocks=count(r"encoder\.down\.0\.block\.(\d+)"), attention=any(".attn" in name for name in state),
                        phis=count(r"quantize\.quant_resi\.qresi_ls\.(\d+)"))
    template["decoder"]["up"].reverse()  # published by level, ours in the order they run
    names = {}  # published name -> the template's tensor
    for path, tensor in pytree.tree_flatten_with_path(template)[0]:
        name = ".".join(re.findall(r"\w+", pytree.keystr(path)))
        for pattern, published in PUBLISHED_NAMES:
            name = re.sub(pattern, published, name)
        names[name] = tensor
    problems = [f"{name} is missing" for name in names if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in names]
    problems += [f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}" for name, tensor in names.items()
                 if name in state and state[name].shape != tensor.shape]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"state_dict: does not fit the published tokenizer: {', '.join(problems[:10])}{more}")
    params = pytree.tree_unflatten([state[name].to(dtype) for name in names], pytree.tree_structure(template))
    params["decoder"]["up"].reverse()
    return params
