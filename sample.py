"""Sampling, editing and model files; and `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> top-k, top-p -> tokens -> masked passes
    -> f_hat (B, code_dim, h, w) -> images (B, 3, H, W)

`steps` is the method as a generator, so that a caller can watch it or stop it; `generate` and
`edit` consume it. The random numbers of an image are a function of its seed, the scale and the
pass. An image depends on the rest of its batch only through rounding (which in bf16 may change a
token).

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024);
classifier-free guidance (Ho and Salimans 2021).
"""

import argparse
import contextlib
import ctypes
import math
import os
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils import _pytree as pytree

import hmar
import tokenizer


def generate(params, codec, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64); arguments and errors of `steps`."""
    last = {step.scale: step for step in steps(params, codec, labels, **options)}

    tokens = torch.cat([step.tokens for step in last.values()], 1)
    return decode_in_parts(codec, last[max(last)].f_hat), tokens


class Step(NamedTuple):
    """What `steps` yields after each pass."""

    scale: int
    number: int  # of the pass in its scale: 0 is next-scale prediction, later ones are masked
    tokens: torch.Tensor  # (B, n_k) int64, the tokens of the scale so far
    hidden: torch.Tensor  # (B, n_k) bool, the tokens that a later pass samples again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales so far; decode_features shows it


@torch.no_grad()
def steps(
    params,
    codec,
    labels,
    *,
    schedule=None,
    guidance=1.5,
    mask_guidance=0.0,
    rise=1.0,
    soften=0.0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    is_causal=False,
    known=None,
):
    """Samples the pyramid coarse to fine; a generator of a Step after each pass (HMAR; MaskGIT).

    labels: (B,) int64 or a list, 0 to classes; `classes` stands for no class.
    schedule: for each scale, how many tokens each of its passes keeps; None: one pass a scale. See
        `masked_schedule`.
    guidance, mask_guidance: strength of guidance at the last scale, in next-scale and in masked
        passes. 0 turns it off, which halves the cost, except with is_causal.
    rise: at scale k of S, guidance is multiplied by (k / (S - 1)) ** rise; 0 keeps it constant.
    soften: the divergence in nats at which guidance is halved, see `classifier_free_guidance`.
    temperature: divides the logits; below .001 the most likely code is taken.
    top_k: only the top_k most likely codes are sampled; 0: all.
    top_p: of these, only the most likely ones that together have this probability.
    seed: image i uses the random numbers of seed + i; or a list with a seed for each image.
    is_causal: the tree is VAR's, which attends to all coarser scales and keeps keys and values.
    known: a Known, from `edit`.

    ValueError if the arguments do not fit each other.
    """
    scales, codebook = hmar.scale_sizes(params), codec["codebook"]
    batch, has_masked = len(labels), "masked" in params and not is_causal
    labels, seeds = torch.as_tensor(labels), seeds_of_images(seed, batch)
    if schedule is None:
        schedule = [[count] for count in tokenizer.lengths(scales)]
    filters = dict(soften=soften, temperature=temperature, top_k=top_k, top_p=top_p)
    limits = filters | dict(guidance=guidance, mask_guidance=mask_guidance, rise=rise)
    check_arguments(params, codec, labels, seeds, schedule, has_masked, **limits)
    labels = labels.to(codebook.device)

    f_hat = codebook.new_zeros(batch, codebook.shape[1], *scales[-1])  # (B, code_dim, h, w)
    cache = [[] for _ in range(hmar.block_count(params))] if is_causal else None

    for k, size in enumerate(scales):
        keeps = schedule[k]
        progress = k / (len(scales) - 1) if len(scales) > 1 else 1.0  # from 0 to 1
        tokens = torch.zeros(batch, math.prod(size), dtype=torch.int64, device=codebook.device)
        hidden = torch.ones_like(tokens, dtype=torch.bool)  # (B, n_k), what is to be sampled
        clues = None
        if known is not None:  # an edit: some tokens are given, and there are clues to others
            tokens, hidden, clues = known_tokens(codec, known, f_hat, size)
            keeps = shares_of_hidden(keeps, hidden)  # now (B, 1) each

        inputs = tokenizer.resize_to_scale(f_hat, size)  # (B, n_k, code_dim)
        for number, keep in enumerate(keeps):
            if number == 0:  # this pass sees only coarser scales
                branch, strength, branch_inputs = "next_scale", guidance, dict(inputs=inputs)
            else:  # a masked pass also sees the tokens of this scale that were kept
                zeroed = hidden if hmar.zeroes_hidden(params) else None
                own = tokenizer.own_inputs_of_scale(codec, tokens, k, scales, zeroed)
                branch, strength = "masked", mask_guidance
                branch_inputs = dict(inputs=inputs, own_inputs=own, mask=hidden)

            strength = strength * progress**rise
            features = guided_features(params, branch, labels, strength, cache, k, **branch_inputs)
            uniform = uniform_numbers(seeds, k, number, tokens)  # (B, n_k)
            state = tokens, hidden, uniform, clues
            tokens, confidence, log_p = sample_pass(
                params, branch, features, k, *state, strength=strength, **filters
            )
            if number == 0:  # of an edit's given tokens, under the coarser scales sampled so far
                likelihood = log_p

            hidden = hide_least_confident(confidence, hidden, keep)
            grown = f_hat + tokenizer.contribution(codec, tokens, k, scales)
            if known is not None and number + 1 == len(keeps):  # an edit: resample its particles
                is_last = k + 1 == len(scales)
                rows = choose_particles(likelihood, known.particles, seeds, k, is_last)  # (B,)
                tokens, hidden, grown = (x[rows] for x in (tokens, hidden, grown))
                if is_causal:  # a cache has rows with a class, then rows without one
                    pair = torch.cat([rows, rows + batch])
                    cache = [[(key[pair], value[pair]) for key, value in layer] for layer in cache]
            yield Step(k, number, tokens, hidden, grown)

        f_hat = grown  # the next scale is sampled from this


def sample_pass(
    params,
    branch,
    features,
    k,
    tokens,
    hidden,
    uniform,
    clues,
    *,
    strength,
    soften,
    temperature,
    top_k,
    top_p,
):
    """Samples the hidden tokens of scale k: (tokens (B, n_k), confidence, given_log_p (B,)).

    features: of `guided_features`, for which the blocks ran once; here the head runs once for each
    wave of tokens. uniform (B, n_k) decides the samples. confidence (B, n_k), fp64, is the
    probability of each token. clues: None, or for an edit logits (B, n_k, codes) to be added; then
    given_log_p is the log-probability of the tokens that are not hidden, otherwise 0.
    """
    tokens, confidence = tokens.clone(), torch.zeros_like(uniform)
    given_log_p = uniform.new_zeros(len(tokens))
    is_sampled = temperature >= 0.001  # otherwise the most likely code is taken

    for wave in hmar.waves(params, k):  # m positions; each sees tokens of earlier waves
        near = hmar.neighbour_tokens(params, tokens, k)  # (B, n_k, 6), or None
        near = None if near is None else near[:, wave]
        both = hmar.branch_logits(params, branch, features[:, :, wave], near)
        logits = both[0]  # (B, m, codes)
        if len(both) == 2:  # the second are logits without a class
            logits = classifier_free_guidance(*both, strength, soften)

        if clues is not None:
            logits = logits + clues[:, wave]
            log_p = both[0].log_softmax(-1).gather(-1, tokens[:, wave, None])[..., 0]
            given_log_p += log_p.masked_fill(hidden[:, wave], 0).sum(1)

        logits = logits / temperature if is_sampled else logits
        logits = filter_logits(logits, top_k, top_p)
        new, probability = sample_codes(logits, uniform[:, wave] if is_sampled else None)
        confidence[:, wave] = probability.double()
        tokens[:, wave] = torch.where(hidden[:, wave], new, tokens[:, wave])
    return tokens, confidence, given_log_p


def hide_least_confident(confidence, hidden, keep):
    """The tokens that a later pass samples again: of hidden (B, n_k) all but the most confident.

    keep: how many stay, a number or (B, 1).
    """
    confidence = confidence.masked_fill(~hidden, -math.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    return hidden & (order.argsort(-1) >= keep)


def seeds_of_images(seed, count):
    """A list of seeds: seed + i for image i, or the list itself if there is a seed for each."""
    return [int(seed) + i for i in range(count)] if np.ndim(seed) == 0 else seed


def check_arguments(params, codec, labels, seeds, schedule, has_masked, **limits):
    """ValueError where the arguments of `steps` would silently give wrong images."""
    check_codes(params, codec)
    counts = tokenizer.lengths(hmar.scale_sizes(params))
    if [sum(keeps) for keeps in schedule] != counts:
        raise ValueError(f"schedule: got {schedule}, expected these sums by scale: {counts}")
    if len(schedule[0]) > 1 or (max(map(len, schedule)) > 1 and not has_masked):
        raise ValueError(f"schedule: got {schedule}; masked passes need a masked branch, scale > 0")
    if len(seeds) != len(labels):
        raise ValueError(f"seed: got {len(seeds)} for {len(labels)} labels")
    for name, number in (limits | dict(seed=min(seeds, default=0))).items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: got {number}, expected 0 or more")
    if not 0 < limits["top_p"] <= 1:
        raise ValueError(f"top_p: got {limits['top_p']}, expected above 0, at most 1")
    classes = len(params["classes"]) - 1
    # values are checked on the CPU only: reading them would make a GPU wait
    if labels.is_cpu and len(labels) and not 0 <= labels.min() <= labels.max() <= classes:
        raise ValueError(f"labels: got {labels.tolist()}, expected 0 to {classes} (no class)")


def check_codes(params, codec):
    """ValueError if the transformer was made for other codes than those of the tokenizer."""
    codes = tuple(codec["codebook"].shape)
    expected = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    if codes != expected:
        raise ValueError(f"tokenizer: got (codes, code_dim) {codes}, expected {expected}")


def guided_features(params, branch, labels, strength, cache, k, **inputs):
    """The features that the head of a branch reads: (1, B, n_k, C), with guidance (2, B, n_k, C).

    The second of the two is computed without a class. inputs: those of hmar.branch_features.
    """
    halves = 1
    if strength != 0 or cache is not None:  # a cache needs both halves from the start
        halves, null = 2, torch.full_like(labels, len(params["classes"]) - 1)
        labels = torch.cat([labels, null])
        inputs = {name: torch.cat([x, x]) for name, x in inputs.items()}
    features = hmar.branch_features(params, branch, labels, **inputs, k=k, cache=cache)
    return features.unflatten(0, (halves, -1))


def classifier_free_guidance(conditional, unconditional, strength, soften=0.0):
    """(1 + t) conditional - t unconditional, t the strength (Ho and Salimans 2021, equation 6).

    Logits (B, m, codes). With soften, t is divided by 1 + (D / soften)^2, where D is the divergence
    of the prediction without the class from that with it, in nats. So guidance is weaker where the
    class already decides.
    """
    if soften:
        log_p, log_q = conditional.log_softmax(-1), unconditional.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)  # (B, m, 1)
        strength = strength / (1 + (divergence / soften) ** 2)
    return (1 + strength) * conditional - strength * unconditional


def uniform_numbers(seeds, k, number, tokens):
    """(B, n_k) fp64 in [0, 1): a function of each image's seed, the scale and the pass.

    tokens (B, n_k) give the shape and the device.
    """
    count = tokens.shape[1]
    rows = [np.random.default_rng((seed, k, number)).random(count) for seed in seeds]
    return torch.from_numpy(np.reshape(rows, tokens.shape)).to(tokens.device)


def filter_logits(logits, top_k=0, top_p=1.0):
    """logits (..., V), -inf outside the top_k best and then outside the best that hold top_p.

    top_k 0 and top_p 1 keep all codes. Codes with equal logits stay together. Top-p (nucleus)
    sampling as in Holtzman et al. 2020.
    """
    codes = logits.shape[-1]
    count = min(top_k, codes) if top_k > 0 else codes
    if count == codes and top_p == 1:
        return logits

    best = logits.topk(count).values  # (..., count), the best first
    logits = logits.masked_fill(logits < best[..., -1:], -math.inf)
    if top_p < 1:
        share = (best - logits.logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share  # the probability of all better codes
        least = best.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def sample_codes(logits, uniform=None):
    """(tokens (...) int64, their probability (...)) of logits (..., V).

    Inverts the cumulative probability at uniform (...) fp64 in [0, 1). None: the most likely code.
    """
    probability = logits.softmax(-1)
    if uniform is None:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        sums = probability.cumsum(-1)
        total = sums[..., -1:]
        # uniform * total may round up to total, where searchsorted finds a code of probability 0
        below = total.nextafter(torch.zeros_like(total))
        places = torch.minimum((uniform[..., None] * total).to(total.dtype), below)
        tokens = torch.searchsorted(sums, places, right=True)

    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # for nan, searchsorted returns V
    return tokens[..., 0], probability.gather(-1, tokens)[..., 0]


# ---- schedules


def masked_schedule(scales, masked_passes):
    """A schedule [[1], ...]: next-scale prediction, then this many masked passes, at each scale.

    Few tokens are kept at first and most at last, after a cosine (MaskGIT, section 3.3): of 16
    tokens the first pass keeps 1, and 3 masked passes keep 4, 5 and 6. Scale 0 has one pass; a
    scale has at most as many passes as tokens.
    """
    if masked_passes < 0:
        raise ValueError(f"masked passes: got {masked_passes}, expected 0 or more")
    schedule = []
    for k, count in enumerate(tokenizer.lengths(scales)):
        number = min(masked_passes + 1, count) if k else 1
        done = np.arange(number + 1)
        kept = np.round(count * (1 - np.cos(np.pi / 2 * done / number)))  # after each pass
        # each pass keeps at least one token and leaves one for each pass to come
        kept = kept.clip(min=done, max=count - number + done).astype(int)
        schedule.append(np.diff(kept).tolist())
    return schedule


def published_schedule(scales):
    """The published schedule of HMAR: [1] [1, 3] [1, 1, 2, 5], then one pass a scale."""
    first, *counts = tokenizer.lengths(scales)
    refined = {4: [1, 3], 9: [1, 1, 2, 5]}
    return [[first], *(refined.get(count, [count]) for count in counts)]


# ---- editing


class Known(NamedTuple):
    """What `edit` passes to `steps` about the images."""

    features: torch.Tensor  # (B, code_dim, h, w), the encoder's output
    outside: torch.Tensor  # (B, 1, h, w) bool: positions wholly outside the mask
    particles: int  # so many rows of the batch, one after another, are of one image


@torch.no_grad()
def edit(params, codec, images, mask, labels, *, particles=8, schedule=None, seed=0, **options):
    """images (B, 3, H, W) in [-1, 1], repainted under the mask as labels (B,) (HMAR, editing).

    mask: (B, 1, H, W) bool, True = repaint. Hidden pixels have no influence on the result, and
    pixels outside the mask stay as they are. Tokens wholly outside the mask are not sampled: they
    are the codes nearest to the encoder's features minus the edit's own f_hat so far. The others
    are sampled, then sampled again by the masked branch, which sees the given ones. The decoder's
    error just outside the mask is known; it is extrapolated and subtracted inside, fading over two
    latent cells.

    particles: samples of each image that are followed at once. After each scale they are resampled
        by the likelihood of the given tokens (sequential Monte Carlo), so that coarse tokens agree
        with what is visible; the best one is returned. Time and memory grow with their number.
    schedule, seed: as for `steps`; schedule None: one masked pass at each scale if the tree has a
        masked branch. options: other arguments of `steps`.

    ValueError if images, mask and labels do not fit.
    """
    scales = hmar.scale_sizes(params)
    expected = (len(labels), 1, *images.shape[2:])
    if len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, expected {len(images)}, one an image")
    if mask.dtype != torch.bool or mask.shape != expected:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: got {got}, expected a bool tensor {expected}")
    tokenizer.check_images(codec, images.masked_fill(mask, 0), scales)
    if schedule is None:
        schedule = masked_schedule(scales, 1 if "masked" in params else 0)

    cell = tokenizer.downsampling(codec)
    images = replace_hidden(images, mask, 4 * cell)
    parts = images.split(images_at_once(images.shape[2:].numel()))
    features = torch.cat([tokenizer.encode_features(codec, part) for part in parts])
    outside = F.adaptive_max_pool2d(mask.float(), scales[-1]) == 0  # (B, 1, h, w)

    rows = torch.arange(len(images)).repeat_interleave(particles)
    known = Known(features[rows], outside[rows], particles)
    seeds = seeds_of_images(seed, len(labels))
    # particle 0 has the seed of the image, the others seeds that are far from those of all images
    seeds = [own + (i << 48) for own in seeds for i in range(particles)]
    labels = torch.as_tensor(labels)[rows]
    *_, last = steps(params, codec, labels, schedule=schedule, seed=seeds, known=known, **options)

    *_, (_, _, f_hat) = tokenizer.quantise(codec, features, scales)  # of the visible part
    painted = decode_in_parts(codec, torch.where(outside, f_hat, last.f_hat[::particles]))
    painted = painted + extrapolate(images - painted, ~mask, 2 * cell)
    return torch.where(mask, painted.clamp(-1, 1).to(images.dtype), images)


def known_tokens(codec, known, f_hat, size):
    """(tokens, hidden (B, n_k), logits (B, n_k, codes)) at a scale of an edit.

    hidden is True for tokens whose cell touches the mask; the others are fixed to the nearest code.
    logits: see `evidence`.
    """
    residual = known.features - f_hat
    tokens = tokenizer.nearest(codec["codebook"], tokenizer.resize_to_scale(residual, size))
    hidden = F.adaptive_max_pool2d((~known.outside).float(), size).flatten(1) > 0
    return tokens, hidden, evidence(codec["codebook"], residual, known.outside, size)


def choose_particles(likelihood, particles, seeds, k, is_last):
    """The rows (B,) with which an edit goes on after scale k, by likelihood (B,) in nats.

    The particles of each image are resampled in proportion to their likelihood (systematic
    resampling, Kitagawa 1996). At the last scale the most likely one fills all rows.
    """
    weights = likelihood.view(-1, particles).softmax(1)  # (images, particles)
    if is_last:
        chosen = weights.argmax(1, keepdim=True).expand(-1, particles)
    else:
        # No pass has the number 2^31, so these numbers differ from those of `uniform_numbers`.
        offsets = [np.random.default_rng((seed, k, 2**31)).random() for seed in seeds[::particles]]
        offsets = torch.tensor(offsets, device=weights.device)[:, None]  # (images, 1)
        places = (torch.arange(particles, device=weights.device) + offsets) / particles
        chosen = torch.searchsorted(weights.cumsum(1), places).clamp(max=particles - 1)
    first = particles * torch.arange(len(weights), device=weights.device)
    return (first[:, None] + chosen).flatten()


def replace_hidden(images, mask, reach):
    """images (B, 3, H, W) whose pixels under the mask (B, 1, H, W) are made up from the others.

    They become the mean of the visible pixels, and near the edge of the mask their extrapolation.
    """
    count = (~mask).sum((2, 3), keepdim=True).clamp(min=1)
    total = images.masked_fill(mask, 0).sum((2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / count).to(images.dtype)  # (B, 3, 1, 1)
    return torch.where(mask, mean + extrapolate(images - mean, ~mask, reach), images)


def shares_of_hidden(keeps, hidden):
    """[(B, 1), ...]: the tokens that an image keeps at each pass, in proportion to its hidden ones.

    Example: with keeps (1, 1, 2, 4) and half of the tokens hidden, an image keeps 1, 0, 1 and 2.
    """
    count, total = hidden.sum(1, keepdim=True), hidden.shape[1]
    sums = [(count * done + total - 1) // total for done in accumulate(keeps, initial=0)]
    return [after - before for before, after in pairwise(sums)]


def evidence(codebook, residual, outside, size):
    """Log-likelihood (B, n, codes) of each code, given the seen part of cells at the mask's edge.

    residual (B, code_dim, h, w) is left to quantise and known where outside (B, 1, h, w). Of the m
    places of a cell a share s is seen, with mean a and variance v. If places are independent and
    Gaussian, the mean of the whole cell has mean a and variance v (1 - s) / (m s). Returned is the
    logarithm of that density at each code, up to a constant; 0 in cells that are not seen at all.
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


def extrapolate(images, visible, reach):
    """Images (B, C, H, W), continued from visible (B, 1, H, W) pixels, in rings that fade to 0."""
    images = images.masked_fill(~visible, 0)
    carried = torch.zeros_like(images)
    for ring in range(1, reach + 1):
        share = F.avg_pool2d(visible.to(images.dtype), 3, stride=1, padding=1)
        # a share is 0, or 1/9 and more
        near = F.avg_pool2d(images, 3, stride=1, padding=1) / share.clamp(min=0.1)
        fresh = ~visible & (share > 0)
        images = torch.where(fresh, near, images)
        carried = torch.where(fresh, near * (1 - ring / (reach + 1)), carried)
        visible = visible | fresh
    return carried


# ---- images


@torch.no_grad()
def decode_in_parts(codec, f_hat):
    """tokenizer.decode_features of a few images at a time, because a decoder needs much memory."""
    few = images_at_once(f_hat.shape[2:].numel() * tokenizer.downsampling(codec) ** 2)
    return torch.cat([tokenizer.decode_features(codec, part) for part in f_hat.split(few)])


def images_at_once(pixels):
    """How many images with this number of pixels pass a network together: 512 of 32 x 32."""
    return max(1, 2**19 // pixels)


def sheet(rows, names):
    """A PIL image of rows of images (n, 3, H, W) in [-1, 1], each row beside its name."""
    names = [name[:40] for name in names]
    font = ImageFont.load_default(12)
    zoom = max(1, 64 // rows[0].shape[-1])  # small images are enlarged by whole pixels
    left = 12 + max(int(font.getlength(name)) for name in names)
    height, width = (side * zoom + 2 for side in rows[0].shape[2:])
    page = Image.new("RGB", (left + width * len(rows[0]), height * len(rows)), "white")

    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        ImageDraw.Draw(page).text((6, (y + 0.5) * height), name, "black", font, anchor="lm")
        tiles = F.interpolate(row, scale_factor=zoom)
        strip = np.hstack(to_bytes(F.pad(tiles, (0, 2, 0, 2), value=1.0)))  # with a white edge
        page.paste(Image.fromarray(strip), (left, y * height))
    return page


def to_bytes(images):
    """Images (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_image(path, shortest=None):
    """The first frame of an image file: upright, RGB, transparency on white, 16 bits scaled to 8.

    shortest: a large image may be reduced by a whole factor, but no side below this. Raises what
    Pillow raises for a file that it cannot read.
    """
    with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as image:
        if shortest:
            image.draft(None, (shortest, shortest))  # JPEG files can be decoded at a fraction
        ImageOps.exif_transpose(image, in_place=True)
        image = convert_to_rgb(image)
    return image.reduce(max(1, min(image.size) // shortest)) if shortest else image


def convert_to_rgb(image):
    """A PIL image of any mode as RGB, as viewers show it."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image).clip(0, 65535) / 257 + 0.5
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def read_photo_and_mask(photo_path, mask_path, pad, size):
    """Image (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) bool, cropped to size (width, height).

    mask_path: an image, white where to repaint. Without it the photo is surrounded by a border of
    `pad` times the size, which is to be repainted. ValueError if there is nothing to repaint, or
    everything.
    """
    photo = read_image(photo_path)
    if mask_path:
        # Both are resized to `times` times the model's size, so that a pixel that is shown is a
        # mean of cells outside the mask only.
        mask = read_image(mask_path).convert("L")
        skew = abs(mask.width * photo.height - mask.height * photo.width)
        if skew > max(*mask.size, *photo.size):  # sides that were rounded may differ by a pixel
            raise ValueError(f"--mask: got {mask.size} pixels for a photo of {photo.size}")
        ratios = [min(image.width / size[0], image.height / size[1]) for image in (photo, mask)]
        times = math.ceil(max(4, *ratios))  # at least 4, because small photos would become jagged
        grid = [times * side for side in size]
        photo, mask = (ImageOps.fit(image, grid, Image.NEAREST) for image in (photo, mask))
        photo = photo.reduce(times)
    else:
        photo = ImageOps.fit(photo, size, Image.LANCZOS)
        border = tuple(max(1, int(side * pad)) for side in size)
        inner = [side - 2 * edge for side, edge in zip(size, border)]
        photo = ImageOps.expand(photo.resize(inner), border)
        mask = ImageOps.expand(Image.new("L", inner), border, 255)

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.from_numpy(np.array(mask))[None, None].float()
    # A pixel of the model that any white cell touches is repainted, so that thin strokes stay.
    mask = F.adaptive_max_pool2d(mask, size[::-1]) > 127
    if not mask.any() or mask.all():  # transparent masks are read as white
        raise ValueError("--mask: expected white where to repaint, black elsewhere")
    return pixels, mask


def save_sheets(path, pages):
    """Writes the first page, or as .gif all pages, the last of them shown longest."""
    if Path(path).suffix.lower() == ".gif":
        times = [400] * (len(pages) - 1) + [2000]  # milliseconds
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)
    else:
        pages[0].save(path)


# ---- model files

# guidance, top-k and top-p of the published samplers: those of HMAR by depth, and that of VAR
PUBLISHED = {
    16: dict(guidance=1.7, top_k=1000, top_p=0.99),
    20: dict(guidance=1.9, top_k=950, top_p=0.99),
    24: dict(guidance=2.1, top_k=900, top_p=0.99),
    30: dict(guidance=1.6, top_k=650, top_p=0.99),
    "VAR": dict(guidance=1.5, top_k=900, top_p=0.96),
}


def load_model(path, tokenizer=None, scales=None):
    """The model of a run folder, of its file model.pt, or of published weights, on the CPU.

    tokenizer: another file, whose tokenizer is used; published transformers need one. scales: as
    for hmar.from_published. A model is a dict, of which an unfinished or published one has a part:

        tokenizer    tree of tokenizer.py
        transformer  tree of hmar.py
        classes      names of the classes, [str, ...]
        sampling     keyword arguments of `steps` that suit the transformer
        is_causal    whether the transformer is VAR's

    Files are read with weights_only=True, so that none can run code. ValueError if a file is
    missing or holds no such weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        if not model.keys() & {"tokenizer", "transformer"}:
            model = from_published(model, scales)
    except Exception as error:  # torch.load raises errors of many kinds
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no weights: {reason.splitlines()[0]}") from error
    if tokenizer is not None:
        other = load_model(tokenizer)
        if "tokenizer" not in other:
            raise ValueError(f"{tokenizer}: has no tokenizer")
        model["tokenizer"] = other["tokenizer"]
    return model


def from_published(state_dict, scales=None):
    """The part of a model that a published state dict contains: a tokenizer or a transformer."""
    if any(name.startswith("encoder") for name in state_dict):
        return dict(tokenizer=tokenizer.from_published(state_dict))
    params = hmar.from_published(state_dict, scales)
    is_causal = hmar.published_is_causal(state_dict)
    classes = [str(label) for label in range(len(params["classes"]) - 1)]
    sampling = published_sampling(params, is_causal)
    return dict(transformer=params, classes=classes, sampling=sampling, is_causal=is_causal)


def published_sampling(params, is_causal):
    """The settings of the published sampler for such a tree, as keyword arguments of `steps`."""
    settings = dict(mask_guidance=0.0, rise=1.0, soften=0.0, temperature=1.0)
    if "masked" in params:
        settings["schedule"] = published_schedule(hmar.scale_sizes(params))
    name = "VAR" if is_causal else hmar.block_count(params)
    return settings | PUBLISHED.get(name, PUBLISHED[16])


def to_device(tree, device):
    """The tree with all tensors on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


# ---- here the method ends; the command

# arguments of `steps` that are flags too
SAMPLING_FLAGS = "guidance", "mask_guidance", "rise", "soften", "temperature", "top_k", "top_p"


def parser():
    """The flags of `python sample.py`."""
    top = argparse.ArgumentParser(description="Sample images, or repaint a part of one.")
    add = top.add_argument
    add("run", help="run folder of train.py, its model.pt, or published weights")
    add("--tokenizer", help="file with another tokenizer; published transformers need one")
    text = "all scales of published weights of another size, coarse to fine, such as 1 2 4 or 2x3"
    add("--scales", nargs="+", type=scale_pair, help=text)
    text = "class names, or numbers of classes that have no such name (default: all; the first "
    add("--labels", nargs="+", help=text + "ten for a sheet)")
    add("--count", type=int, default=8, help="images for each label (default: 8)")
    text = "image i uses the random numbers of seed + i (default: 0)"
    add("--seed", type=int, default=0, help=text)
    text = (
        "picture file: a sheet with a row for each label; .gif: one after each pass, but of edits "
        "only the last; .npz: an "
    )
    text += "array for FID programs; no suffix: a folder of images (default: samples.png)"
    add("--out", type=Path, default=Path("samples.png"), help=text)
    add("--edit", type=Path, help="image to repaint; it is cropped and reduced to the model's size")
    add("--mask", type=Path, help="image with the same proportions, white where to repaint")
    text = (
        "instead of --mask: shrink the image and paint a border of this share of the model's size"
    )
    add("--pad", type=float, default=0.0, help=text)
    text = "candidates for an edit, which are sampled together; the best one is kept (default: 8)"
    add("--particles", type=int, default=8, help=text)
    add_device_flags(top)

    title = "sampling settings (the defaults are stored in the model)"
    add = top.add_argument_group(title, argument_default=argparse.SUPPRESS).add_argument
    add("--guidance", type=float, help="strength of guidance at the last scale; 0 turns it off")
    add("--mask-guidance", type=float, help="the same in masked passes")
    text = "guidance is multiplied by (k / (S - 1)) ** RISE at scale k of 0 to S - 1; 0: constant"
    add("--rise", type=float, help=text)
    text = "guidance is halved where the predictions with and without a class have a KL divergence "
    add("--soften", type=float, help=text + "of this many nats; 0: never")
    add("--temperature", type=float, help="divides the logits; 0: take the most likely code")
    add("--top-k", type=int, help="sample only the k most likely codes; 0: all")
    text = "sample only the smallest set of codes with at least this probability together; 1: all"
    add("--top-p", type=float, help=text)
    text = "masked passes at each scale, which sample the least confident tokens again"
    add("--mask-steps", type=int, metavar="N", help=text)
    return top


def add_device_flags(top):
    """Adds --device and --dtype to a parser."""
    device = "default: a GPU if there is one"
    top.add_argument("--device", choices=("cuda", "cpu"), help=device)
    dtype = "default: bf16 where the processor has instructions for it"
    top.add_argument("--dtype", choices=("bf16", "fp32"), help=dtype)


def scale_pair(text):
    """Parses "4" or "2x3" as (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def find_device(name=None):
    """The torch.device of --device; by default this process's GPU if there is one, else the CPU."""
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def find_dtype(name, device):
    """The torch dtype of --dtype; by default bf16 where the processor multiplies it, else fp32."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    is_bf16 = has_bf16 if name is None else name == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32


def keep_freed_memory():
    """Asks glibc on Linux to keep freed memory, because getting it again from the system is slow.

    It takes 7 % of a small training step and 35 % of sampling 128 images of 64 x 64 pixels.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # only glibc has it
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD; old ones take 32 MiB
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def exit_with_a_line(name):
    """Turns ValueError, OSError and Ctrl-C into one line and status 1; other errors are bugs."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")


def class_numbers(texts, names):
    """The numbers of classes given by name, or by number where no class has that name."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for text in texts:
        if text not in numbers:
            expected = f"0 to {len(names) - 1} or a name such as {', '.join(names[:5])}"
            raise ValueError(f"--labels: got {text!r}, expected {expected}")
    return [numbers[text] for text in texts]


def write_images(args):
    """Samples what the flags ask for and writes it to --out. ValueError where they do not fit."""
    out, suffix = args.out, args.out.suffix.lower()
    if out.is_dir() or not suffix:
        suffix = "folder"
    elif suffix != ".npz" and Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"--out: got {out}, expected .png, .jpg, .gif, .npz or no suffix")
    for name, number in dict(count=args.count, particles=args.particles).items():
        if number < 1:
            raise ValueError(f"--{name}: got {number}, expected 1 or more")
    if out.resolve() in [path.resolve() for path in (args.edit, args.mask) if path]:
        raise ValueError(f"--out: got {out}, which would be overwritten")

    model = load_model(args.run, args.tokenizer, args.scales)
    for name in ("tokenizer", "transformer"):
        if name not in model:
            raise ValueError(f"{args.run}: has no {name}")
    some = model["classes"][: None if suffix in ("folder", ".npz") else 10]
    classes = class_numbers(args.labels or some, model["classes"])
    names = [model["classes"][label] for label in classes]
    labels = torch.tensor(classes).repeat_interleave(args.count)
    sample_frames, batch = make_sampler(args, model, labels, every_pass=suffix == ".gif")
    batches = torch.arange(len(labels)).split(batch)

    out.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "folder":
        write_folder(out, labels.tolist(), batches, sample_frames)
    elif suffix == ".npz":
        pixels = np.concatenate([to_bytes(sample_frames(numbers)[0]) for numbers in batches])
        with open(out, "wb") as file:
            np.savez(file, arr_0=pixels, labels=labels.numpy())
    else:
        frames = zip(*(sample_frames(numbers) for numbers in batches))
        save_sheets(out, [sheet(torch.cat(parts).chunk(len(names)), names) for parts in frames])
    print(f"{out}: {args.count} each of {', '.join(dict.fromkeys(names))}")


def make_sampler(args, model, labels, every_pass):
    """(a function from the numbers (n,) of images to [images (n, 3, H, W), ...], batch size).

    The list has an entry for each pass if every_pass, otherwise the finished images alone.
    """
    device = find_device(args.device)
    dtype = find_dtype(args.dtype, device)
    codec = to_device(tokenizer.cast(model["tokenizer"], dtype), device)
    params = to_device(hmar.cast(model["transformer"], dtype), device)
    scales, cell = hmar.scale_sizes(params), tokenizer.downsampling(codec)
    height, width = (cell * side for side in scales[-1])

    options = sampling_options(args, model)
    if args.edit or args.mask or args.pad:
        if not args.edit or not (args.mask or 0 < args.pad < 0.5):
            raise ValueError("--edit: expected with --mask, or --pad above 0 and below 0.5")
        edited = read_photo_and_mask(args.edit, args.mask, args.pad, (width, height))
        photo, mask = to_device(edited, device)

    def sample_frames(numbers):
        own = options | dict(labels=labels[numbers], seed=(args.seed + numbers).tolist())
        if args.edit:
            pair = (x.expand(len(numbers), -1, -1, -1) for x in (photo, mask))
            return [edit(params, codec, *pair, particles=args.particles, **own).cpu()]
        if every_pass:
            passes = steps(params, codec, **own)
            return [decode_in_parts(codec, step.f_hat).cpu() for step in passes]
        return [generate(params, codec, **own)[0].cpu()]

    batch = min(50, images_at_once(height * width))
    return sample_frames, max(1, batch // args.particles) if args.edit else batch


def sampling_options(args, model):
    """The keyword arguments of `steps` or `edit`: those stored in the model, replaced by flags."""
    flags = {name: x for name, x in vars(args).items() if name in SAMPLING_FLAGS}
    options = model["sampling"] | flags | dict(is_causal=model["is_causal"])
    if "mask_steps" in args:
        scales = hmar.scale_sizes(model["transformer"])
        options["schedule"] = masked_schedule(scales, args.mask_steps)
    elif args.edit:  # the model's schedule is that of samples
        options.pop("schedule", None)
    return options


def write_folder(folder, labels, batches, sample_frames):
    """Writes NUMBER-LABEL.png of each image. Batches whose images are all there are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}-{label}.png" for i, label in enumerate(labels)]
    there = sum(path.exists() for path in paths)
    if there:
        print(f"{folder}: {there} of {len(paths)} images are there already and are kept")
    for numbers in batches:
        missing = [i for i in numbers.tolist() if not paths[i].exists()]
        if not missing:
            continue
        # The whole batch is sampled again, because a smaller one would round differently.
        (images,) = sample_frames(numbers)
        for i, pixels in zip(numbers.tolist(), to_bytes(images), strict=True):
            if i in missing:
                temporary = paths[i].with_suffix(".tmp")
                Image.fromarray(pixels).save(temporary, "PNG")
                temporary.replace(paths[i])
        print(f"sampled {numbers[-1] + 1} of {len(paths)}", flush=True)


def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or files."""
    args = parser().parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    keep_freed_memory()
    with exit_with_a_line("sample.py"):
        write_images(args)


if __name__ == "__main__":
    main()
