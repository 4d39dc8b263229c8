"""Sampling: class labels -> tokens, scale by scale -> images; editing; and `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> top-k, top-p -> draw -> masked refinement
    -> f_hat (B, code_dim, h, w) -> images (B, 3, H, W)

`steps` is the method as a generator, so that a caller can watch, stop or choose; `generate` and
`edit` consume it. An image's random numbers follow from its seed, the scale and the pass: its
batch changes it by rounding alone, which in bf16 may tip a token.

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024);
classifier-free guidance (Ho and Salimans 2021).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loaded: no traceback

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils import _pytree as pytree

import hmar
import tokenizer

PUBLISHED = {  # guidance, top-k and top-p of the published samplers: HMAR's by depth, and VAR's
    16: dict(guidance=1.7, top_k=1000, top_p=0.99),
    20: dict(guidance=1.9, top_k=950, top_p=0.99),
    24: dict(guidance=2.1, top_k=900, top_p=0.99),
    30: dict(guidance=1.6, top_k=650, top_p=0.99),
    "VAR": dict(guidance=1.5, top_k=900, top_p=0.96),
}


def generate(params, codec, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64); arguments as for `steps`."""
    last = {step.scale: step for step in steps(params, codec, labels, **options)}

    tokens = torch.cat([step.tokens for step in last.values()], 1)
    return decode_in_parts(codec, last[max(last)].f_hat), tokens


class Step(NamedTuple):
    """What `steps` yields after each pass.

    Writing into f_hat in place, after a scale's last pass, steers the finer scales.
    """

    scale: int
    number: int  # of the pass in its scale: 0 is the next-scale draw, later ones refine it
    tokens: torch.Tensor  # (B, n_k) int64, the scale's tokens so far
    hidden: torch.Tensor  # (B, n_k) bool, those that a later pass draws again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales up to this: decode_features shows it


def steps(
    params,
    codec,
    labels,
    *,
    schedule=None,
    guidance=None,
    mask_guidance=None,
    rise=None,
    soften=None,
    temperature=None,
    top_k=None,
    top_p=None,
    seed=0,
    is_causal=False,
    known=None,
):
    """Draws the pyramid coarse to fine; a generator of a Step after each pass (HMAR; MaskGIT).

    labels (B,) int64, or a list. An option that is None is the tree's own, by `own_options`.

    schedule: for each scale the tokens kept at each pass, or how many masked passes a scale has.
    guidance, mask_guidance: strength at the last scale, of next-scale and of masked passes; 0 turns
        it off and halves the cost, but not with is_causal, whose cache always has both halves.
    rise: at scale k of S both are weaker by (k / (S - 1)) ** rise; 0: they are not.
    soften: nats a token at which guidance is halved, 0: never.
    temperature: divides the logits; below .001: arg max.
    top_k: then the best so many codes stay, 0 or less: all.
    top_p: then the best codes that hold this much of the probability.
    seed: image i draws the numbers of seed + i; or a seed for each image.
    is_causal: the tree is VAR's, which keeps keys and values.
    known: of `edit`.
    """
    if is_causal:  # VAR has no masked branch
        params = {name: leaf for name, leaf in params.items() if name != "masked"}
    asked = locals()  # the arguments, by name
    own = own_options(params, is_causal, is_edit=known is not None)
    own |= {name: asked[name] for name in own if asked[name] is not None}
    options = SimpleNamespace(**own)
    if isinstance(options.schedule, (int, np.integer)):
        options.schedule = masked_schedule(hmar.scales(params), options.schedule)
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + i for i in range(len(labels))]
    labels = torch.as_tensor(labels, device=codec["codebook"].device)
    check_options(params, codec, labels, seed, options)
    # another function is the generator, so that what `check_options` refuses raises here
    return passes(params, codec, labels, seed, known, options)


@torch.no_grad()
def passes(params, codec, labels, seeds, known, options):
    """The loop of `steps`; options: its arguments of these names."""
    scales, batch = hmar.scales(params), len(seeds)
    codebook = codec["codebook"]
    f_hat = codebook.new_zeros(batch, codebook.shape[1], *scales[-1])  # (B, code_dim, h, w)
    cache = [[] for _ in range(hmar.depth(params))] if options.is_causal else None

    for k, size in enumerate(scales):
        tokens = torch.zeros(batch, math.prod(size), dtype=torch.int64, device=codebook.device)
        hidden = torch.ones_like(tokens, dtype=torch.bool)  # (B, n_k), what is to be drawn
        keeps = options.schedule[k]
        progress = k / (len(scales) - 1) if len(scales) > 1 else 1.0  # 0 at first, 1 at last
        if known is not None:  # an edit: some tokens are given, of others a part is seen
            f_hat = torch.where(known.outside, known.f_hats[k], f_hat)  # as it was before scale k
            tokens, hidden = known.tokens[k], ~known.given[k]
            keeps = shares_of_hidden(keeps, hidden, k > 0 and "masked" in params)  # now (B, 1) each
            seen_logits = evidence(codebook, known.features - f_hat, known.outside, size)

        inputs = tokenizer.resize_to_scale(f_hat, size)  # (B, n_k, code_dim)
        for number, keep in enumerate(keeps):
            if number == 0:  # the blocks see coarser scales alone
                branch, strength, seen = "next_scale", options.guidance, [inputs]
            else:  # and what was kept of this one
                zeroed = hidden if hmar.zeroes_hidden(params) else None
                own = tokenizer.own_inputs_of_scale(codec, tokens, k, scales, zeroed)
                branch, strength, seen = "masked", options.mask_guidance, [inputs, own, hidden]

            strength *= progress**options.rise
            # the blocks run once a pass, the head in each wave
            features = guided_features(params, branch, labels, seen, k, strength, cache)

            uniform = uniform_numbers(seeds, k, number, tokens)  # (B, n_k)
            tokens, confidence = tokens.clone(), torch.zeros_like(uniform)  # fp64
            for wave in hmar.waves(params, k):  # m positions, which see what is drawn before
                near = hmar.near_tokens(params, tokens, k)  # (B, n_k, N)
                rows = features[:, :, wave], near[:, wave]
                logits, *free = hmar.branch_logits(params, branch, *rows)  # (B, m, codes) each
                if free:  # guided: of no class
                    logits = classifier_free_guidance(logits, *free, strength, options.soften)
                if known is not None:
                    logits = logits + seen_logits[:, wave]
                drawn, probability = choose_tokens(logits, uniform[:, wave], options)
                confidence[:, wave] = probability.double()
                tokens[:, wave] = torch.where(hidden[:, wave], drawn, tokens[:, wave])

            hidden = hide_least_sure(confidence, hidden, keep)
            grown = f_hat + tokenizer.contribution(codec, tokens, k, scales)
            yield Step(k, number, tokens, hidden, grown)

        f_hat = grown  # what the next scale is drawn from


def hide_least_sure(confidence, hidden, keep):
    """What a later pass draws again: of hidden (B, n_k) all but the keep most confident.

    keep: a number, or (B, 1).
    """
    confidence = confidence.masked_fill(~hidden, -math.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    return hidden & (order.argsort(-1) >= keep)


def check_options(params, codec, labels, seeds, options):
    """ValueError unless tokenizer and options of `steps` fit the transformer and the labels."""
    sizes = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    tokenizer.check_scales(hmar.scales(params))
    counts = tokenizer.lengths(hmar.scales(params))
    for name, got, expected in (
        ("codec: codes, code_dim", tuple(codec["codebook"].shape), sizes),
        ("schedule: tokens by scale", list(map(sum, options.schedule)), counts),
        ("seed: how many", len(seeds), len(labels)),
    ):
        if got != expected:
            raise ValueError(f"{name}: got {got}, expected {expected}")
    numbers = vars(options) | dict(seed=min(seeds, default=0))
    for name in ("seed", "rise", "soften", "temperature"):
        if numbers[name] < 0:
            raise ValueError(f"{name}: got {numbers[name]}, expected 0 or more")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p: got {options.top_p}, expected above 0, at most 1")
    if "masked" not in params and max(map(len, options.schedule)) > 1:
        raise ValueError("schedule (--mask-steps): got masked passes, but no masked branch")
    if len(options.schedule[0]) > 1:
        raise ValueError("schedule: got several passes at the first scale")
    if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels: got {got}, expected int64, one an image")
    classes = len(params["classes"]) - 1
    # a look at values would stall an accelerator
    if labels.is_cpu and len(labels) and not 0 <= labels.min() <= labels.max() <= classes:
        got = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels: got {got}, expected 0 to {classes}, that of no class")


def guided_features(params, branch, labels, seen, k, strength, cache):
    """What the head of a branch reads, (1, B, n_k, C); if guided (2, ...), the last of no class."""
    halves = 1
    if strength != 0 or cache is not None:  # a cache holds both halves from the start
        halves, null = 2, torch.full_like(labels, len(params["classes"]) - 1)
        labels, seen = torch.cat([labels, null]), [torch.cat([x, x]) for x in seen]
    features = hmar.branch_features(params, branch, labels, *seen, k=k, cache=cache)
    return features.unflatten(0, (halves, -1))


def classifier_free_guidance(conditional, unconditional, strength, soften=0):
    """(1 + t) conditional - t unconditional (Ho and Salimans 2021, equation 6), t the strength.

    Logits (B, m, codes). With soften t shrinks by 1 + (D / soften)^2, D the divergence of the two
    in nats: what a class says is amplified where it says little, not exaggerated where it says all.
    """
    if soften:
        log_p, log_q = conditional.log_softmax(-1), unconditional.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)  # (B, m, 1)
        strength = strength / (1 + (divergence / soften) ** 2)
    return (1 + strength) * conditional - strength * unconditional


def uniform_numbers(seeds, k, number, tokens):
    """(B, n_k) fp64 in [0, 1), each image's own at a pass; tokens (B, n_k) say n_k, the device."""
    count = tokens.shape[1]
    rows = [np.random.default_rng((seed, k, number)).random(count) for seed in seeds]
    return torch.from_numpy(np.reshape(rows, tokens.shape)).to(tokens.device)


def choose_tokens(logits, uniform, options):
    """(tokens, confidence), (B, m) each, of logits (B, m, codes) and uniform numbers (B, m)."""
    if options.temperature < 0.001:  # arg max, before the division overflows
        uniform = None
    else:
        logits = logits / options.temperature
    return draw(filter_logits(logits, options.top_k, options.top_p), uniform)


def filter_logits(logits, top_k=0, top_p=1.0):
    """logits (..., V), -inf outside the top_k best, then outside the best that hold top_p of those.

    Top-k, then nucleus sampling; ties stay.
    """
    codes = logits.shape[-1]
    count = min(top_k, codes) if top_k > 0 else codes
    if count == codes and top_p == 1:
        return logits

    best = logits.topk(count).values  # (..., count), the best first
    logits = logits.masked_fill(logits < best[..., -1:], -math.inf)
    if top_p < 1:
        share = (best - logits.logsumexp(-1, keepdim=True)).exp()  # ties count too, and stay
        before = share.cumsum(-1) - share  # what better codes hold: of the best, 0
        least = best.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def draw(logits, uniform=None):
    """(tokens (...) int64, their probability (...)), drawn from logits (..., V).

    The cumulative probability is inverted at uniform (...) fp64 in [0, 1); None: arg max.
    """
    probability = logits.softmax(-1)
    if uniform is None:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        sums = probability.cumsum(-1)
        total = sums[..., -1:]
        # uniform * total may round up to total, where searchsorted finds a code that was ruled out
        below = total.nextafter(torch.zeros_like(total))
        places = torch.minimum((uniform[..., None] * total).to(total.dtype), below)
        tokens = torch.searchsorted(sums, places, right=True)

    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # of nan searchsorted returns V
    confidence = probability.gather(-1, tokens)[..., 0]
    if not confidence.isfinite().all():
        raise ValueError("logits: got nan or infinity, from weights, guidance or temperature")
    return tokens[..., 0], confidence


# ---- schedules and settings


def masked_schedule(scales, masked_passes):
    """For each scale the tokens kept at each pass, [[1], ...]: a draw, then masked passes.

    Few are kept at first, most last, after a cosine (MaskGIT, section 3.3): of 16 tokens the draw
    keeps 1, then 3 masked passes 4, 5, 6.
    """
    if masked_passes < 0:
        raise ValueError(f"masked passes (--mask-steps): got {masked_passes}, expected 0 or more")
    schedule = []
    for k, count in enumerate(tokenizer.lengths(scales)):
        number = min(masked_passes + 1, count) if k else 1
        done = np.arange(number + 1)
        kept = np.round(count * (1 - np.cos(np.pi / 2 * done / number)))  # after each pass
        # one more at least after each pass, and one left for each that is to come
        kept = kept.clip(min=done, max=count - number + done).astype(int)
        schedule.append(np.diff(kept).tolist())
    return schedule


def published_schedule(scales):
    """The published schedule, [1] [1, 3] [1, 1, 2, 5], then one pass a scale."""
    first, *counts = tokenizer.lengths(scales)
    refined = {4: [1, 3], 9: [1, 1, 2, 5]}
    return [[first], *(refined.get(count, [count]) for count in counts)]


def published_options(params, is_causal=False):
    """What the published samplers do with such a tree, as keyword arguments of `steps`."""
    options = dict(mask_guidance=0.0, rise=1, soften=0.0, is_causal=is_causal)
    if "masked" in params:
        options["schedule"] = published_schedule(hmar.scales(params))
    return options | PUBLISHED.get("VAR" if is_causal else hmar.depth(params), PUBLISHED[16])


def own_options(params, is_causal=False, is_edit=False):
    """What measured best with our own trees, as keyword arguments of `steps`, or of `edit`."""
    depth, count = hmar.depth(params), sum(tokenizer.lengths(hmar.scales(params)))
    # what is trained longer needs less guidance; published models have 1.5 to 2.1
    by_depth = min(1, 2 / depth)
    if depth <= 2:
        temperature = 0.95  # CIFAR-10 is .4 nearer to held-out images than at 1
        rise = 2  # late (Wang et al. 2024) photographs are 7 % nearer, but not at depth 3
        guidance = 7 * min(1, (174 / count) ** 0.72)
    else:
        temperature = 0.9  # .3 nearer than at .95
        rise = 1
        # falls slowly: two runs of photographs were .1, .5 nearer than by the root of count
        guidance = min(6.9, 4.57 * (194 / count) ** 0.25)

    # A head that looks at neighbours makes the tokens of a scale match, so a masked pass serves
    # edits alone, of which 98 % are right, without it 96 % (drawings); 70, 66 % (CIFAR-10).
    masked_passes = 1 if is_edit else 0
    if "neighbours" not in params["next_scale"]:  # as from depth 8 on
        masked_passes = 2
        temperature = 1.0

    return dict(
        schedule=masked_schedule(hmar.scales(params), masked_passes if "masked" in params else 0),
        guidance=max(1.5, by_depth * guidance),
        mask_guidance=max(1.5, by_depth * 3),
        rise=rise,
        soften=0.1,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        is_causal=is_causal,
    )


# ---- editing


class Known(NamedTuple):
    """What `edit` tells `steps` of the images, by scale."""

    tokens: tuple  # of (B, n_k) int64
    given: list  # of (B, n_k) bool: outside of the mask
    f_hats: list  # of (B, code_dim, h, w): before each scale, and after the last
    features: torch.Tensor  # (B, code_dim, h, w), what the images' tokens stand for
    outside: torch.Tensor  # (B, 1, h, w) bool


@torch.no_grad()
def edit(params, codec, images, mask, labels, **options):
    """images (B, 3, H, W) in [-1, 1], of which labels (B,) int64 are drawn under the mask.

    mask (B, 1, H, W) bool, True = repaint; what it hides changes nothing. At each scale the tokens
    whose cells lie outside are the image's; the others are drawn, then refined by the masked
    branch, which sees the given ones (HMAR, editing). Pixels outside are the original ones. The
    decoder's error just outside is known; extrapolated, it is subtracted inside, fading over two
    latent cells. options: of `steps`.
    """
    scales = hmar.scales(params)
    expected = (len(labels), 1, *images.shape[2:])
    if len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, expected {len(images)}, one an image")
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(f"mask: expected a bool tensor {expected}")
    tokenizer.check_images(codec, images.masked_fill(mask, 0), scales)

    cell = tokenizer.downsampling(codec)
    images = replace_hidden(images, mask, 4 * cell)

    parts = images.split(images_at_once(images.shape[2:].numel()))
    features = torch.cat([tokenizer.encode_features(codec, part) for part in parts])
    _, tokens, f_hats = zip(*tokenizer.quantise(codec, features, scales))
    hidden = F.adaptive_max_pool2d(mask.float(), scales[-1])  # (B, 1, h, w)
    given = [F.adaptive_max_pool2d(hidden, size).flatten(1) == 0 for size in scales]
    f_hats = [torch.zeros_like(f_hats[0]), *f_hats]
    known = Known(tokens, given, f_hats, features, hidden == 0)

    *_, last = steps(params, codec, labels, known=known, **options)
    painted = decode_in_parts(codec, torch.where(known.outside, f_hats[-1], last.f_hat))
    painted = painted + extrapolate(images - painted, ~mask, 2 * cell)
    return torch.where(mask, painted.clamp(-1, 1).to(images.dtype), images)


def replace_hidden(images, mask, reach):
    """images (B, 3, H, W) that cannot know of pixels under the mask (B, 1, H, W).

    They become the mean of the others, near the edge of the mask what these suggest.
    """
    count = (~mask).sum((2, 3), keepdim=True).clamp(min=1)
    total = images.masked_fill(mask, 0).sum((2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / count).to(images.dtype)  # (B, 3, 1, 1)
    return torch.where(mask, mean + extrapolate(images - mean, ~mask, reach), images)


def shares_of_hidden(keeps, hidden, has_masked_branch):
    """[(B, 1), ...]: the tokens an image keeps at each pass, its share of the schedule's keeps.

    Of (1, 1, 2, 4) an image with half of its tokens hidden (B, n) keeps 1 0 1 2. After a lone pass,
    which hardly sees given tokens, images given in part are drawn anew by a masked one.
    """
    count, total = hidden.sum(1, keepdim=True), hidden.shape[1]

    is_partly = (count > 0) & (count < total)
    if len(keeps) == 1 and has_masked_branch and is_partly.any():
        return [torch.where(is_partly, 0, count), torch.where(is_partly, count, 0)]

    sums = [(count * done + total - 1) // total for done in accumulate(keeps, initial=0)]
    return [after - before for before, after in pairwise(sums)]


def evidence(codebook, residual, outside, size):
    """Logits (B, n, codes) that draw cells cut by a mask's edge towards their part that is seen.

    residual (B, code_dim, h, w) is what is left to quantise, known where outside (B, 1, h, w). Of a
    cell's m places a share s is seen, with mean a and variance v. If places are independent and
    Gaussian, the whole cell's mean is a with variance v (1 - s) / (m s): the logits are that
    density at each code.
    """
    seen = outside.to(residual.dtype)
    share = tokenizer.resize_to_scale(seen, size)  # (B, n, 1)
    divisor = share.clamp(min=1e-6)
    mean = tokenizer.resize_to_scale(residual * seen, size) / divisor  # (B, n, code_dim)
    square = tokenizer.resize_to_scale(residual.square() * seen, size) / divisor
    variance = (square - mean.square()).mean(-1, keepdim=True).clamp(min=1e-4)

    places = outside.shape[2:].numel() / math.prod(size)  # m
    precision = places * share / (1 - share).clamp(min=1e-2) / variance
    distance = torch.cdist(mean, codebook.to(mean.dtype)).square()
    return torch.where(share > 0, -0.5 * precision * distance, 0.0)


def extrapolate(images, known, reach):
    """What known pixels (B, 1, H, W) of (B, C, H, W) suggest of others, ring by ring, fading."""
    images = images.masked_fill(~known, 0)
    carried = torch.zeros_like(images)
    for ring in range(1, reach + 1):
        share = F.avg_pool2d(known.to(images.dtype), 3, stride=1, padding=1)
        # a share is 0, or 1/9 and more
        near = F.avg_pool2d(images, 3, stride=1, padding=1) / share.clamp(min=0.1)
        fresh = ~known & (share > 0)
        images = torch.where(fresh, near, images)
        carried = torch.where(fresh, near * (1 - ring / (reach + 1)), carried)
        known = known | fresh
    return carried


# ---- images and weights


@torch.no_grad()
def decode_in_parts(codec, f_hat):
    """tokenizer.decode_features, a few images at a time: a decoder's maps outweigh the rest."""
    few = images_at_once(f_hat.shape[2:].numel() * tokenizer.downsampling(codec) ** 2)
    images = torch.cat([tokenizer.decode_features(codec, part) for part in f_hat.split(few)])
    if not images.isfinite().all():
        raise ValueError("images: got nan, expected a tokenizer's weights that do not overflow")
    return images


def images_at_once(pixels):
    """How many images of so many pixels pass the networks together: eight of 256 x 256."""
    return max(1, 2**19 // pixels)


def sheet(rows, names):
    """A PIL image of rows of images (n, 3, H, W) in [-1, 1], each row's name at its left."""
    names = [replace_unprintable(name)[:40] for name in names]
    font = ImageFont.load_default(12)
    zoom = max(1, 64 // rows[0].shape[-1])  # small images grow by whole pixels
    left = 12 + max(int(font.getlength(name)) for name in names)
    height, width = (side * zoom + 2 for side in rows[0].shape[2:])
    page = Image.new("RGB", (left + width * len(rows[0]), height * len(rows)), "white")

    for y, (row, name) in enumerate(zip(rows, names)):
        ImageDraw.Draw(page).text((6, (y + 0.5) * height), name, "black", font, anchor="lm")
        tiles = F.interpolate(row, scale_factor=zoom)
        strip = np.hstack(to_bytes(F.pad(tiles, (0, 2, 0, 2), value=1.0)))  # a white edge
        page.paste(Image.fromarray(strip), (left, y * height))
    return page


def to_bytes(images):
    """Images (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


LARGE_IMAGE_LOCK = threading.Lock()  # of several readers one at a time decodes a large image


def read_image(path, shortest=None):
    """The first frame of an image file, upright, RGB, transparency on white, 16 bits scaled to 8.

    shortest: a large one is read at a fraction of its size, no side below that. ValueError where
    the bytes are no image, a broken one, or one beyond Pillow's limit of 179 million pixels (of a
    JPEG: as read, at that fraction); OSError where they cannot be read.
    """
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise FileNotFoundError(f"missing or no regular file: {path}")
    content = Path(path).read_bytes()
    try:
        image = open_image(content, shortest)
        is_large = image.width * image.height > 2**25
        with LARGE_IMAGE_LOCK if is_large else contextlib.nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            image = convert_to_rgb(image)
            return image.reduce(max(1, min(image.size) // shortest)) if shortest else image
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: no image of these formats") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def open_image(content, shortest):
    """A PIL image, of whose bytes the header is read; with shortest a JPEG at a fraction."""
    if not shortest or not content.startswith(b"\xff\xd8\xff"):
        return Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "BMP", "GIF"))
    image = JpegImageFile(io.BytesIO(content))  # Image.open refuses a size that draft would shrink
    image.draft(None, (shortest, shortest))
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"got {image.width} x {image.height} pixels")
    return image


def convert_to_rgb(image):
    """An image of any mode as viewers show it."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image).clip(0, 65535) / 257 + 0.5
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load(path, module=None, **options):
    """(tree, origin) of a file of weights, the tree in fp32, on the CPU.

    module: `tokenizer` or `hmar`, None for what the file holds. origin: "ours"; of
    published files "VAR" if block-causal, else "HMAR". options: of from_published.
    """
    tree, origin = load_file(path), "ours"
    try:
        if module is None:
            module = tokenizer if any(name.startswith("encoder") for name in tree) else hmar
        if not {"codebook", "trunk"} & tree.keys():
            origin = "VAR" if hmar.published_is_causal(tree) else "HMAR"
            tree = module.from_published(tree, **options)

        tree = pytree.tree_map(lambda leaf: leaf.float().contiguous(), tree)
        if not all(leaf.isfinite().all() for leaf in pytree.tree_leaves(tree)):
            raise ValueError("numbers that are not finite")
        module.check(tree)
        return tree, origin
    except Exception as error:
        reason = f"no weights that can be read: {type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason.splitlines()[0]}") from error


def load_file(path):
    """What torch.save wrote, on the CPU. ValueError where it cannot be read."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("missing or no regular file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"cannot be read: {type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason.splitlines()[0]}") from error


def digest(tree):
    """A fingerprint of all tensors in a tree."""
    total = hashlib.sha256()
    for tensor in pytree.tree_leaves(tree):
        total.update(tensor.numpy(force=True).ravel())
    return total.hexdigest()[:16]


# ---- the command

# options of `steps` that are flags too
OPTIONS = "schedule", "guidance", "mask_guidance", "soften", "temperature", "top_k", "top_p"
SHEETS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}


def parser():
    """The flags of `python sample.py`."""
    top = command_parser("python sample.py RUN [flags]: draw images, or repaint a part of one.")
    add = top.add_argument
    add("run", type=Path, help="run folder of train.py, or weights, ours or published")
    add("--tokenizer", help="ours or published (tokenizer.pt beside the weights)")
    add("--scales", nargs="+", type=scale_pair, help="of published weights, 4 or 2x3 each")
    labels = "names or numbers of classes; -x as --labels=-x (all; of a sheet the first ten)"
    add("--labels", nargs="+", help=labels)
    add("--count", type=whole_number(1), default=8, help="images a label (8)")
    add("--seed", type=whole_number(0), default=0, help="of image 0; image i has i more (0)")
    add("--out", type=Path, default="samples.png", help="or .gif, .npz, a folder (samples.png)")
    add("--guidance", type=float, help="at the last scale, 0 at the first (by the model, to 7)")
    add("--mask-guidance", type=float, help="of masked passes (by depth, 1.5 to 3)")
    add("--soften", type=float, help="nats at which guidance halves, 0: never (ours 0.1)")
    add("--temperature", type=float, help="below .001: arg max (by the model, to 1)")
    add("--top-k", type=int, help="codes that may be drawn, 0: all (ours 0)")
    add("--top-p", type=float, help="probability that may be drawn (ours 1)")
    add("--mask-steps", type=int, dest="schedule", metavar="N", help="masked passes a scale")
    add("--edit", type=Path, help="image to repaint, cropped to the model's shape")
    either = top.add_mutually_exclusive_group().add_argument
    either("--mask", type=Path, help="image, white: repaint; any size")
    either("--pad", type=float, default=0.0, help="outpaint, a border of this share")
    return top


def command_parser(description):
    """argparse's, whose errors and help have a line each, with --device and --dtype."""
    shape = partial(argparse.HelpFormatter, max_help_position=42, width=100)
    options = dict(formatter_class=shape, usage=argparse.SUPPRESS, allow_abbrev=False)
    top = argparse.ArgumentParser(description=description, **options)
    top.add_argument("--device", choices=("cuda", "cpu"), help="(cuda if there is one)")
    top.add_argument("--dtype", choices=("bf16", "fp32"), help="(bf16 where the processor has it)")
    return top


def whole_number(least):
    """Of a parser: the type of whole numbers from `least` on."""

    def whole(text):
        number = int(text)
        if not least <= number < 2**48:
            raise argparse.ArgumentTypeError(f"got {text}, expected {least} or more, below 2^48")
        return number

    return whole


def positive(text):
    """Of a parser: a number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected above 0")
    return number


def scale_pair(text):
    """Of a parser: "4" or "2x3" -> (height, width)."""
    height, _, width = text.partition("x")
    side = whole_number(1)
    return side(height), side(width or height)


class Job(NamedTuple):
    """What is to be drawn: all that flags and files say of it."""

    kind: str  # of --out: "folder", or a format of Pillow's
    models: tuple  # (params, codec), cast, on the device
    labels: torch.Tensor  # (N,), as many of each class
    names: list  # of the classes
    seed: int  # of image 0
    options: dict  # of `steps`
    edited: tuple  # (photo (1, 3, H, W), mask (1, 1, H, W)), or () where nothing is
    batch: int  # images that are drawn together
    settings: dict  # what decides the images: a folder goes on only with equal ones


def read_job(args):
    """The Job of these flags. ValueError where they or the files do not fit."""
    kind, device = find_kind(args), set_up_device(args.device)
    dtype = find_dtype(args.dtype, device)

    params, codec, names, options, files = load_models(args)
    classes = class_numbers(args.labels, names, most=None if kind == "folder" else 10)
    is_edit = bool(args.edit or args.mask or args.pad)
    flags = {name: x for name, x in vars(args).items() if name in OPTIONS and x is not None}
    # the tree's own too: settings.json has them, and a later version may have others
    options = own_options(params, options["is_causal"], is_edit) | options | flags
    height, width = (tokenizer.downsampling(codec) * side for side in hmar.scales(params)[-1])
    edited = photo_and_mask(args, (width, height)) if is_edit else ()

    read = [path for path in (*files, args.edit, args.mask) if path]
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime) for path in read]
    settings = options | dict(labels=classes, count=args.count, seed=args.seed, pad=args.pad)
    settings |= dict(dtype=str(dtype), scales=hmar.scales(params), files=states)

    labels = torch.tensor(classes).repeat_interleave(args.count)
    models = hmar.cast(params, dtype), tokenizer.cast(codec, dtype)
    models, labels, edited = pytree.tree_map(lambda x: x.to(device), (models, labels, edited))
    names = [names[label] for label in classes]
    batch = min(50, images_at_once(height * width))
    return Job(kind, models, labels, names, args.seed, options, edited, batch, settings)


def find_kind(args):
    """The kind of --out: a format of Pillow's, or "folder", also for .npz. ValueError if unfit."""
    if os.path.realpath(args.out) in map(os.path.realpath, filter(None, (args.edit, args.mask))):
        raise ValueError(f"--out: got {args.out}, which is also to be read")
    suffix = args.out.suffix.lower()
    if suffix in ("", ".npz") or args.out.is_dir():
        return "folder"
    if suffix not in SHEETS or (suffix == ".gif" and args.edit):
        expected = f"{', '.join(SHEETS)} (not of edits), .npz or a folder without a suffix"
        raise ValueError(f"--out: got {args.out}, expected {expected}")
    for name, number in ("--count", args.count), ("--labels", len(args.labels or ())):
        if number > 50:
            raise ValueError(f"{name}: got {number}, expected at most 50 in a sheet")
    return SHEETS[suffix]


def draw_frames(job, numbers):
    """[images (n, 3, H, W), ...] of numbers (n,): for a GIF after each pass, else the last."""
    options = job.options | dict(labels=job.labels[numbers], seed=(job.seed + numbers).tolist())
    if job.kind == "GIF":
        passes = steps(*job.models, **options)
        return [decode_in_parts(job.models[1], step.f_hat).cpu() for step in passes]
    if not job.edited:
        return [generate(*job.models, **options)[0].cpu()]
    photo, mask = (x.expand(len(numbers), -1, -1, -1) for x in job.edited)
    return [edit(*job.models, photo, mask, **options).cpu()]


def write_sheet(out, job):
    """Draws all images into one, a row a label, or a GIF of that after each pass. Returns True."""
    batches = torch.arange(len(job.labels)).split(job.batch)
    frames = zip(*(draw_frames(job, numbers) for numbers in batches))
    # a frame: the images after a pass, in batches; a page: these joined and cut into rows by label
    pages = [torch.cat(parts).chunk(len(job.names)) for parts in frames]
    out.parent.mkdir(parents=True, exist_ok=True)
    save_sheets(out, job.kind, [sheet(rows, job.names) for rows in pages])
    return True


def write_folder(out, job):
    """Draws batches of which number-label.png is missing in a folder; packs all if out is an .npz.

    Under torchrun each process draws its share; whoever then finds all of them packs, and returns
    True.
    """
    is_archive = out.suffix.lower() == ".npz" and not out.is_dir()
    folder = out.with_suffix("") if is_archive else out
    labels = job.labels.tolist()
    paths = [folder / f"{i:06d}-{label}.png" for i, label in enumerate(labels)]
    check_folder(folder, job.settings)
    share = torch.arange(len(paths))[rank() :: world()]

    def write(i, pixels):
        if paths[i].exists():
            return
        with whole_file(paths[i]) as file:
            Image.fromarray(pixels).save(file, "PNG")

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for numbers in share.split(job.batch):
            if all(paths[i].exists() for i in numbers):
                continue
            # the whole batch again: another one would round otherwise
            (images,) = draw_frames(job, numbers)
            begin_folder(folder, job.settings)  # here, lest options that fail leave a folder
            list(pool.map(write, numbers, to_bytes(images)))  # raises the first error
            print(f"drew {numbers[-1] + 1} of {len(paths)}", flush=True)

    if not all(path.exists() for path in paths):
        return False
    for unfinished in folder.glob(UNFINISHED):  # of killed processes: others write for moments
        with contextlib.suppress(FileNotFoundError):
            if time.time() - unfinished.stat().st_mtime > 60:
                unfinished.unlink()
    if is_archive:
        shape = np.asarray(read_image(paths[0])).shape
        pixels = np.empty((len(paths), *shape), np.uint8)
        for row, path in zip(pixels, paths):
            row[:] = read_image(path)
        with whole_file(out) as file:
            np.savez(file, arr_0=pixels, labels=labels)
    return True


def begin_folder(folder, settings):
    """Writes settings.json unless it is there. ValueError where it is of other settings."""
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"settings.json.{secrets.token_hex(8)}.tmp"
        write_json(own, settings)
        with contextlib.suppress(OSError):  # of two that begin at once one succeeds
            os.link(own, path)
        if not path.exists():  # a file system without links
            os.replace(own, path)
        own.unlink(missing_ok=True)
    check_folder(folder, settings)


def check_folder(folder, settings):
    """ValueError unless a folder is empty or of these settings."""
    settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    # the folder is listed first: who begins it meanwhile writes settings.json before any image
    is_empty = not folder.exists() or all(file.match(UNFINISHED) for file in folder.iterdir())
    before = read_json(folder / "settings.json")
    if before != settings and not is_empty:
        raise ValueError(f"--out: {folder} holds something else: {differences(before, settings)}")


def set_up_device(name):
    """The torch.device of --device, by default this process's GPU or the CPU; TF32 goes off."""
    torch.backends.cudnn.allow_tf32 = False  # in convolutions: the quantiser is in fp32
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")

    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= torch.cuda.device_count():
        raise ValueError(f"--device: got cuda, but no GPU {place} is here")
    return torch.device("cuda", place)


def find_dtype(name, device):
    """The torch dtype of --dtype, by default bf16 where the processor multiplies it, else fp32."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    is_bf16 = has_bf16 if name is None else name == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32


def load_models(args):
    """(params, codec, class names, options of `steps`, files), by args.json beside the weights."""
    weights = args.run
    if weights.is_dir():
        weights = args.run / "hmar.pt"
        if not weights.exists():  # the last file of a --causal run
            weights = args.run / "next-scale.pt"
    params, origin = load(weights, hmar, scales=args.scales)
    files = weights, Path(args.tokenizer or weights.with_name("tokenizer.pt"))
    codec, _ = load(files[1], tokenizer)

    record, is_bare = {}, "masked" not in params
    if is_bare and origin == "HMAR":
        print(f"{weights}: taken for HMAR's: VAR's have attn_bias_for_masking", file=sys.stderr)
    if origin != "ours":
        options = published_options(params, is_causal=origin == "VAR")
    elif args.scales:
        raise ValueError("--scales: got some, but a run has its own")
    else:
        record = read_record(weights.parent)
        if is_bare and not record["flags"]:
            text = "expected its args.json beside it, which tells of --causal"
            raise ValueError(f"{weights}: {text}")
        options = dict(is_causal=record["flags"].get("causal", False))
        if is_bare and not options["is_causal"]:
            text = "without the masked branch, which hmar.pt would have"
            print(f"{weights}: {text}", file=sys.stderr)
        for name, tree in (weights.name, params), ("tokenizer.pt", codec):
            check_digest(weights.parent, name, tree)

    classes = len(params["classes"]) - 1
    names = record.get("class_names", [])
    names = names if len(names) == classes else range(classes)
    return params, codec, list(map(str, names)), options, files


def class_numbers(texts, names, most):
    """The numbers of the classes in texts, of None the first `most`; names go before numbers."""
    if texts is None:
        return list(range(len(names)))[:most]
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    try:
        return [numbers[text] for text in texts]
    except KeyError as error:
        expected = f"0 to {len(names) - 1} or such as {', '.join(names[:5])}"
        raise ValueError(f"--labels: got {error}, expected {expected}") from error


def photo_and_mask(args, size):
    """Image (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) bool of --edit and --mask or --pad."""
    if not args.edit or not (args.mask or 0 < args.pad < 0.5):
        raise ValueError("--edit: expected with --mask, or --pad above 0 and below 0.5")

    photo = read_image(args.edit)
    if args.mask:
        # both on one grid, of which times x times cells become a pixel of the model's: what is
        # shown is then a mean of shown ones alone; 4 at least, lest small photos become jagged
        mask = read_image(args.mask).convert("L")
        ratios = [min(image.width / size[0], image.height / size[1]) for image in (photo, mask)]
        times = math.ceil(max(4, *ratios))
        grid = [times * side for side in size]
        photo, mask = (ImageOps.fit(image, grid, Image.NEAREST) for image in (photo, mask))
        photo = photo.reduce(times)
    else:
        photo = ImageOps.fit(photo, size, Image.LANCZOS)
        border = tuple(max(1, int(side * args.pad)) for side in size)
        inner = [side - 2 * edge for side, edge in zip(size, border)]
        photo = ImageOps.expand(photo.resize(inner), border)
        mask = ImageOps.expand(Image.new("L", inner), border, 255)

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.from_numpy(np.array(mask))[None, None].float()
    # thin strokes stay: a pixel of the model's that any white touches is repainted
    mask = F.adaptive_max_pool2d(mask, size[::-1]) > 127
    if not mask.any() or mask.all():  # a transparent one is read as white
        raise ValueError("--mask: expected white where to repaint, black elsewhere")
    return pixels, mask


def save_sheets(path, kind, pages):
    """The first page in a format of Pillow's, or a GIF of all pages, the last one longest."""
    times = [400] * (len(pages) - 1) + [2000]  # milliseconds
    options = dict(save_all=kind == "GIF", append_images=pages[1:], duration=times, loop=0)
    with whole_file(path) as file:
        pages[0].save(file, kind, **options)


# ---- files and processes, of both commands


def rank():
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world():
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_record(folder):
    """A run's args.json, empty where there is none. ValueError where an entry has another type."""
    path = folder / "args.json"
    kinds = dict(flags=dict, class_names=list, count=int, digests=dict)
    record = dict(newest=0) | {name: kind() for name, kind in kinds.items()} | read_json(path)
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{path}: {name}: got {record[name]!r:.80}, expected {kind}")
    if not all(isinstance(name, str) for name in record["class_names"]):
        raise ValueError(f"{path}: class_names: expected texts")
    return record


def check_digest(folder, name, tree):
    """ValueError where a run's args.json tells of other weights in a file so named."""
    own = read_record(folder)["digests"].get(name)
    if own is not None and own != digest(tree):
        raise ValueError(f"{folder}/args.json: tells of another {name} than this")


def read_json(path):
    """The object in a JSON file, {} where there is no file."""
    try:
        return dict(json.loads(Path(path).read_bytes()))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object; {error}") from error


def write_json(path, value):
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def differences(old, new):
    """The entries in which two dicts differ, cut short, "seed 0 -> 3, ..."."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}"[:60] for name in names)


UNFINISHED = "*." + 16 * "[0-9a-f]" + ".tmp"  # a name of what `whole_file` has not finished


@contextlib.contextmanager
def whole_file(path):
    """A file that takes this name when it is whole; until then the old one stays.

    OSError, with the reason, where the system refuses.
    """
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises one while it handles an OSError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            os.unlink(temporary)


@contextlib.contextmanager
def report_errors(name):
    """Errors end the process with a line: 2 for bad input or a system that refuses, 130: Ctrl-C."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read_image` has a limit
    if hasattr(sys.stdout, "reconfigure"):  # names that it cannot encode are told all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except KeyboardInterrupt as interrupt:
        text, status = str(interrupt) or "stopped", 130
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        refusals = "out of memory", "allocate memory", "closed by peer"  # the last: torchrun's
        is_refused = any(words in str(error) for words in refusals)
        if isinstance(error, RuntimeError) and not is_refused:
            raise  # a bug
        text, status = str(error) or type(error).__name__, 2
    over = "\r\x1b[K" if sys.stderr and sys.stderr.isatty() else ""  # a progress line
    print(f"{over}{name}: {replace_unprintable(text)}", file=sys.stderr)
    sys.exit(status)


def replace_unprintable(text):
    """The text without what would steer a terminal: names of files and classes may have that."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def main(argv=None):
    """The command; SystemExit with status 2 and a line for bad input."""
    args = parser().parse_args(argv)
    with report_errors("sample.py"):
        job = read_job(args)
        write = write_folder if job.kind == "folder" else write_sheet
        if write(args.out, job):
            print(f"wrote {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
