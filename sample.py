"""Sampling, editing and model files; and `python sample.py`.

    labels (B,) -> for each scale: features -> logits -> guidance -> top-k, top-p -> tokens
    -> masked passes -> f_hat (B, code_dim, h, w) -> images (B, 3, H, W)

`generate` and `edit` take a whole model, with the settings that suit it. `steps` is the method as
a generator, so that a caller can watch it or stop it. The random numbers of an image are a function
of its seed, the scale and the pass. An image depends on the rest of its batch only through rounding
(which in bf16 may change a token).

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024);
classifier-free guidance (Ho and Salimans 2021).
"""

import argparse
import contextlib
import ctypes
import math
import os
import re
import sys
import warnings
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


@torch.no_grad()
def generate(model, labels, *, seed=0, **overrides):
    """Images (B, 3, H, W) in [-1, 1], fp32, one for each label.

    model: of `load_model`, or a dict(tokenizer=codec, transformer=params, classes=[name, ...],
        sampling=settings) of trees on any device, see `load_model`.
    labels: B numbers of classes, names of classes, or vectors (B, C), see hmar.condition.
    seed: image i uses the random numbers of seed + i; or a list with a seed for each image.
    overrides: arguments of `steps` that replace those in model["sampling"].

    At most `images_at_once` of them are computed together, which bounds memory. Errors are those
    of `steps`; ValueError for an unknown class name.
    """
    params, codec = model["transformer"], model["tokenizer"]
    labels = class_numbers(labels, model["classes"])
    seeds = seeds_of_images(seed, len(labels))
    settings = model["sampling"] | overrides

    images = []
    for part in parts(len(labels), images_at_once(math.prod(image_size(params, codec)))):
        *_, last = steps(params, codec, labels[part], seed=seeds[part], **settings)
        images.append(tokenizer.decode_features(codec, last.f_hat))
    return torch.cat(images)


class Step(NamedTuple):
    """What `steps` yields after each pass."""

    scale: int
    pass_index: int  # in the scale: 0 is next-scale prediction, later passes are masked
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
    temperature=1.0,
    cooling=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
):
    """Samples the pyramid coarse to fine; a generator of a Step after each pass (HMAR; MaskGIT).

    labels: (B,) int64 or a list, 0 to classes, where `classes` stands for no class; or vectors
        (B, C), see hmar.condition.
    schedule: for each scale, how many tokens each of its passes keeps; None: one pass a scale. See
        `masked_schedule`.
    guidance, mask_guidance: strength of guidance at the last scale, in next-scale and in masked
        passes. 0 turns it off, which halves the cost.
    rise: the power with which guidance grows over the scales, see `guidance_at_scale`; 0: constant.
    temperature: divides the logits of the last scale; below .001 the most likely code is taken.
    cooling: the temperature of the first scale divided by that of the last one, to which it falls,
        see `temperature_at_scale`; 1: constant.
    top_k: only the top_k most likely codes are sampled; 0: all.
    top_p: of these, only the most likely ones that together have this probability.
    seed: image i uses the random numbers of seed + i; or a list with a seed for each image.

    ValueError if the arguments do not fit each other.
    """
    scales, codebook = hmar.scale_sizes(params), codec["codebook"]
    labels, seeds = torch.as_tensor(labels), seeds_of_images(seed, len(labels))
    strengths = dict(guidance=guidance, mask_guidance=mask_guidance, rise=rise)
    filters = dict(temperature=temperature, cooling=cooling, top_k=top_k, top_p=top_p)
    check_arguments(params, codec, labels, seeds, schedule, **strengths, **filters)

    schedule = schedule or masked_schedule(scales, 0)
    conditions = hmar.condition(params, labels.to(codebook.device))  # (B, C)
    f_hat = codebook.new_zeros(len(labels), codebook.shape[1], *scales[-1])  # (B, code_dim, h, w)
    cache = [[] for _ in range(hmar.block_count(params))] if "causal" in params else None

    for k, size in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, size)  # (B, n_k, code_dim)
        tokens = torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        hidden = torch.ones_like(tokens, dtype=torch.bool)  # (B, n_k), what is to be sampled

        for pass_index, keep in enumerate(schedule[k]):
            if pass_index == 0:  # next-scale prediction sees only coarser scales
                branch, strength, seen = params["next_scale"], guidance, [inputs]
            else:  # a masked pass also sees the tokens of this scale that were kept
                own_inputs = masked_branch_inputs(params, codec, tokens, hidden, k, scales)
                branch, strength = params["masked"], mask_guidance
                seen = [inputs, own_inputs, hidden]
            # A cache needs both halves of every scale, so the strength at the last one decides.
            x = guided_features(params, conditions, seen, strength > 0, k, cache)
            strength = guidance_at_scale(strength, rise, k, scales)
            scale_temperature = temperature_at_scale(temperature, cooling, k, scales)
            uniform = uniform_numbers(seeds, k, pass_index, tokens)  # (B, n_k)

            tokens = tokens.clone()  # those of the last Step stay as they are
            confidence = torch.zeros_like(uniform)
            for positions, pair in hmar.wave_logits(branch, size, x, tokens):
                logits = classifier_free_guidance(pair, strength)  # (B, m, codes)
                sampled, probability = sample_codes(
                    logits, uniform[:, positions], scale_temperature, top_k, top_p
                )
                is_hidden = hidden[:, positions]
                tokens[:, positions] = torch.where(is_hidden, sampled, tokens[:, positions])
                confidence[:, positions] = probability.double()

            hidden = hide_least_confident(confidence, hidden, keep)
            grown = f_hat + tokenizer.contribution(codec, tokens, k, scales)
            yield Step(k, pass_index, tokens, hidden, grown)

        f_hat = grown  # the next scale is sampled from this


def masked_branch_inputs(params, codec, tokens, hidden, k, scales):
    """What the masked branch sees of the visible tokens of scale k: (B, n_k, code_dim)."""
    zeroed = None if hmar.hidden_tokens_leak(params) else hidden
    return tokenizer.own_inputs_of_scale(codec, tokens, k, scales, zeroed)


def guidance_at_scale(strength, rise, k, scales):
    """strength * (k / (S - 1)) ** rise at scale k of S; at the last scale it is strength itself."""
    return strength * progress(k, scales) ** rise


def temperature_at_scale(temperature, cooling, k, scales):
    """temperature * cooling ** (1 - k / (S - 1)) at scale k of S; at the last it is temperature.

    Coarse scales decide what an image shows, and a high temperature varies it; at a low one fine
    scales add less noise. This lowers the FD of samples (tests/RESULTS.md, section 3).
    """
    return temperature * cooling ** (1 - progress(k, scales))


def progress(k, scales):
    """0 at the first scale to 1 at the last; 1 if there is one scale alone."""
    return k / (len(scales) - 1) if len(scales) > 1 else 1.0


def guided_features(params, conditions, seen, is_guided, k, cache):
    """The features of scale k that a head reads: (1, B, n_k, C), or for guidance (2, B, n_k, C).

    The second of the two is computed without a class. conditions (B, C). seen: the inputs of
    hmar.features, [inputs] or [inputs, own_inputs, mask], each (B, n_k, ...). cache: see there.
    """
    if not is_guided:
        return hmar.features(params, conditions, *seen, k=k, cache=cache)[None]
    null = params["classes"][-1].expand_as(conditions)
    conditions = torch.cat([conditions, null])  # (2 B, C)
    seen = [torch.cat([x, x]) for x in seen]
    return hmar.features(params, conditions, *seen, k=k, cache=cache).unflatten(0, (2, -1))


def select_in_cache(cache, chosen):
    """The cache of `guided_features`, for the batch entries chosen (B,)."""

    def select(x):  # (B, ...), or (2 B, ...) with the second half without a class
        return x.unflatten(0, (-1, len(chosen)))[:, chosen].flatten(0, 1)

    return [[(select(key), select(value)) for key, value in past] for past in cache]


def classifier_free_guidance(pair, strength):
    """(1 + t) conditional - t unconditional, t the strength (Ho and Salimans 2021, equation 6).

    pair (2, B, m, codes): logits with and without the class. If strength is 0, the latter are not
    read and may be missing.
    """
    if strength == 0:
        return pair[0]
    conditional, unconditional = pair
    return (1 + strength) * conditional - strength * unconditional


def sample_codes(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(tokens (...) int64, their probability (...)) of logits (..., V).

    A token is the first code at which the cumulative probability exceeds uniform (...), fp64 in
    [0, 1). The filters are those of `steps`, in that order. A temperature below .001 takes the most
    likely code.
    """
    is_greedy = temperature < 0.001
    logits = filter_logits(logits if is_greedy else logits / temperature, top_k, top_p)
    probability = logits.softmax(-1)

    if is_greedy:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        sums = probability.cumsum(-1)
        total = sums[..., -1:]
        # uniform * total may round up to total, where searchsorted finds a code of probability 0.
        below = total.nextafter(torch.zeros_like(total))
        points = torch.minimum((uniform[..., None] * total).to(total.dtype), below)
        tokens = torch.searchsorted(sums, points, right=True)

    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # for nan, searchsorted returns V
    return tokens[..., 0], probability.gather(-1, tokens)[..., 0]


def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (..., V), -inf for all but the top_k best codes and, of these, the best with top_p.

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


def hide_least_confident(confidence, hidden, keep):
    """hidden (B, n_k) without its most confident tokens: what a later pass samples again.

    confidence (B, n_k). keep: how many tokens stay, a number or (B, 1).
    """
    confidence = confidence.masked_fill(~hidden, -math.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)  # of each token, 0 the most confident
    return hidden & (rank >= keep)


def uniform_numbers(seeds, k, pass_index, tokens, particles=1):
    """(B, n_k) fp64 in [0, 1) for tokens (B, n_k), on their device; see `random_stream`."""
    count = tokens.shape[1]
    streams = [random_stream(seed, k, pass_index, i) for seed in seeds for i in range(particles)]
    by_image = [stream.random(count) for stream in streams]
    return torch.from_numpy(np.reshape(by_image, tokens.shape)).to(tokens.device)


RESAMPLING = 2**31  # in place of the index of a pass; no schedule has so many


def random_stream(seed, k, pass_index, particle=0):
    """numpy's generator for an image with this seed at scale k: the source of all randomness.

    pass_index: of the pass that samples tokens; RESAMPLING: for the choice among particles.
    particle: in an edit the first has the stream of its image, the others have those of images
    whose seeds are 2^48 and more away, far from all that a user asks for.
    """
    return np.random.default_rng((seed + (particle << 48), k, pass_index))


def seeds_of_images(seed, count):
    """A list of seeds: seed + i for image i, or those in the list if there is a seed for each.

    ValueError if the list has another length than `count`.
    """
    if np.ndim(seed) == 0:
        return [int(seed) + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed: got {len(seed)} for {count} labels")
    return [int(number) for number in seed]  # numpy's integers would overflow


def class_numbers(labels, names):
    """A tensor of labels: numbers or vectors as they are, names of classes as their numbers.

    A text that is no class's name may be its number.
    """
    if torch.is_tensor(labels) or not any(isinstance(label, str) for label in labels):
        return torch.as_tensor(labels)
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for label in map(str, labels):
        if label not in numbers:
            expected = f"0 to {len(names) - 1} or a name such as {', '.join(names[:5])}"
            raise ValueError(f"labels: got {label!r}, expected {expected}")
    return torch.tensor([numbers[str(label)] for label in labels])


def parts(count, size):
    """Slices of a batch of `count` images, each of at most `size` of them."""
    return [slice(first, first + size) for first in range(0, max(1, count), size)]


def images_at_once(pixels):
    """How many images with this number of pixels pass a network together: 512 of 32 x 32."""
    return max(1, 2**19 // pixels)


def image_size(params, codec):
    """(height, width) in pixels of the images of a model."""
    cell = tokenizer.downsampling(codec)
    return tuple(cell * side for side in hmar.scale_sizes(params)[-1])


def check_arguments(params, codec, labels, seeds, schedule=None, **numbers):
    """ValueError where the arguments of `steps` would silently give wrong images."""
    check_codes(params, codec)
    counts = tokenizer.lengths(hmar.scale_sizes(params))
    schedule = schedule or [[count] for count in counts]
    if [sum(keeps) for keeps in schedule] != counts:
        raise ValueError(f"schedule: got {schedule}, expected these sums by scale: {counts}")
    if len(schedule[0]) > 1 or (max(map(len, schedule)) > 1 and not has_masked_passes(params)):
        raise ValueError(f"schedule: got {schedule}; masked passes need a masked branch, scale > 0")

    check_numbers(**numbers, seed=min(seeds, default=0))
    classes = len(params["classes"]) - 1
    are_numbers = len(labels) and not labels.is_floating_point()
    # Values are checked on the CPU only: reading them would make a GPU wait.
    if are_numbers and labels.is_cpu and not 0 <= labels.min() <= labels.max() <= classes:
        raise ValueError(f"labels: got {labels.tolist()}, expected 0 to {classes} (no class)")


def check_numbers(**numbers):
    """ValueError if one of these arguments of `steps` is outside its range."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: got {number}, expected 0 or more")
        if name == "top_p" and not 0 < number <= 1:
            raise ValueError(f"{name}: got {number}, expected above 0, at most 1")


def check_codes(params, codec):
    """ValueError if the transformer was made for other codes than those of the tokenizer."""
    codes = tuple(codec["codebook"].shape)
    expected = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    if codes != expected:
        raise ValueError(f"tokenizer: got (codes, code_dim) {codes}, expected {expected}")


# ---- schedules


def has_masked_passes(params):
    """Whether a tree can sample tokens again; VAR's, which keeps keys and values, cannot."""
    return "masked" in params and "causal" not in params


def masked_schedule(scales, masked_passes, refined_tokens=math.inf):
    """A schedule [[1], ...]: next-scale prediction, then this many masked passes, at each scale.

    refined_tokens: scales of more tokens have no masked pass (as published, those of more than 9).

    The number of tokens that a pass keeps grows as a cosine falls (MaskGIT, section 3.3): of 16
    tokens the first pass keeps 1, and 3 masked passes keep 4, 5 and 6. Scale 0 has one pass; a
    scale has at most as many passes as tokens.
    """
    if masked_passes < 0:
        raise ValueError(f"masked passes: got {masked_passes}, expected 0 or more")
    schedule = []
    for k, count in enumerate(tokenizer.lengths(scales)):
        is_refined = 0 < k and count <= refined_tokens
        passes = min(masked_passes + 1, count) if is_refined else 1
        done = np.arange(passes + 1)
        kept = np.round(count * (1 - np.cos(np.pi / 2 * done / passes)))  # after each pass
        # each pass keeps at least one token and leaves one for each pass to come
        kept = kept.clip(min=done, max=count - passes + done).astype(int)
        schedule.append(np.diff(kept).tolist())
    return schedule


def published_schedule(scales):
    """The published schedule of HMAR: [1] [1, 3] [1, 1, 2, 5], then one pass a scale."""
    first, *counts = tokenizer.lengths(scales)
    refined = {4: [1, 3], 9: [1, 1, 2, 5]}
    return [[first], *(refined.get(count, [count]) for count in counts)]


# ---- editing


@torch.no_grad()
def edit(model, images, mask, labels, *, particles=8, seed=0, **overrides):
    """images (B, 3, H, W) in [-1, 1], repainted under the mask as labels say (HMAR, editing).

    model, labels, seed, overrides: as for `generate`; but the schedule of the model is that of its
        samples. Here it is None by default: one masked pass at each scale, if there is a branch.
    mask: (B, 1, H, W) bool, True = repaint. Hidden pixels have no influence on the result, and
        pixels outside the mask stay as they are.
    particles: samples of each image that are followed at once, see `edit_steps`. The best one is
        returned. Time grows with their number; memory is bounded, as in `generate`.

    Just outside the mask it is known what the decoded image lacks. This difference is extrapolated
    and added inside, fading over two latent cells.

    ValueError if images, mask and labels do not fit.
    """
    params, codec = model["transformer"], model["tokenizer"]
    labels, scales = class_numbers(labels, model["classes"]), hmar.scale_sizes(params)
    seeds = seeds_of_images(seed, len(labels))
    expected = (len(labels), 1, *images.shape[2:])
    if len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, expected {len(images)}, one an image")
    if mask.dtype != torch.bool or mask.shape != expected:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: got {got}, expected a bool tensor {expected}")
    tokenizer.check_images(codec, images.masked_fill(mask, 0), scales)

    settings = model["sampling"] | dict(schedule=None) | overrides
    cell = tokenizer.downsampling(codec)
    at_once = max(1, images_at_once(images.shape[2:].numel()) // particles)

    edited = []
    for part in parts(len(images), at_once):
        visible = replace_hidden(images[part], mask[part], 4 * cell)
        features = tokenizer.encode_features(codec, visible)
        outside = F.adaptive_max_pool2d(mask[part].float(), scales[-1]) == 0  # (B, 1, h, w)
        options = settings | dict(seed=seeds[part])
        passes = edit_steps(params, codec, labels[part], features, outside, particles, **options)
        *_, last = passes

        # Outside of the mask the image itself is decoded, so that both sides of its edge fit.
        *_, (_, _, f_hat) = tokenizer.quantise(codec, features, scales)
        f_hat = torch.where(outside, f_hat, last.f_hat[::particles])
        painted = tokenizer.decode_features(codec, f_hat)
        painted = painted + extrapolate(visible - painted, ~mask[part], 2 * cell)
        painted = painted.clamp(-1, 1).to(images.dtype)
        edited.append(torch.where(mask[part], painted, images[part]))
    return torch.cat(edited)


@torch.no_grad()
def edit_steps(
    params,
    codec,
    labels,
    features,
    outside,
    particles,
    *,
    schedule=None,
    guidance=1.5,
    mask_guidance=0.0,
    rise=1.0,
    temperature=1.0,
    cooling=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
):
    """Samples the pyramid of edits coarse to fine; a generator of a Step after each pass.

    features: (B, code_dim, h, w), the encoder's output. outside: (B, 1, h, w) bool, True for cells
    of the latent map that lie wholly outside the mask. The other arguments are those of `steps`;
    schedule None is one masked pass at each scale if there is a masked branch.

    At each scale, tokens whose cell lies wholly outside the mask are given: they are the codes
    nearest to the features minus the edit's own f_hat so far. The others are sampled, then sampled
    again by the masked branch, which sees the given ones. To their logits the `evidence` of the
    visible part of their cell is added.

    Each image has several particles, one after another in the batch of B * particles entries that a
    Step has. After each scale they are resampled by the likelihood of the given tokens (sequential
    Monte Carlo), so that coarse tokens agree with what is visible. At the last scale the particle
    with the highest likelihood of that scale's given tokens replaces all of its image.
    """
    scales, codebook = hmar.scale_sizes(params), codec["codebook"]
    labels, seeds = torch.as_tensor(labels), seeds_of_images(seed, len(labels))
    strengths = dict(guidance=guidance, mask_guidance=mask_guidance, rise=rise)
    filters = dict(temperature=temperature, cooling=cooling, top_k=top_k, top_p=top_p)
    check_arguments(params, codec, labels, seeds, schedule, **strengths, **filters)

    schedule = schedule or masked_schedule(scales, 1 if has_masked_passes(params) else 0)
    labels, features, outside = (  # (B particles, ...)
        part.repeat_interleave(particles, 0) for part in (labels, features, outside)
    )
    conditions = hmar.condition(params, labels.to(codebook.device))
    f_hat = codebook.new_zeros(len(labels), codebook.shape[1], *scales[-1])
    cache = [[] for _ in range(hmar.block_count(params))] if "causal" in params else None

    for k, size in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, size)
        residual = features - f_hat
        tokens = tokenizer.nearest(codebook, tokenizer.resize_to_scale(residual, size))
        hidden = F.adaptive_max_pool2d((~outside).float(), size).flatten(1) > 0
        clues = evidence(codebook, residual, outside, size)  # (B particles, n_k, codes)
        likelihood = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)

        for pass_index, keep in enumerate(keeps_by_image(schedule[k], hidden)):
            if pass_index == 0:
                branch, strength, seen = params["next_scale"], guidance, [inputs]
            else:
                own_inputs = masked_branch_inputs(params, codec, tokens, hidden, k, scales)
                branch, strength = params["masked"], mask_guidance
                seen = [inputs, own_inputs, hidden]
            x = guided_features(params, conditions, seen, strength > 0, k, cache)  # as in `steps`
            strength = guidance_at_scale(strength, rise, k, scales)
            scale_temperature = temperature_at_scale(temperature, cooling, k, scales)
            uniform = uniform_numbers(seeds, k, pass_index, tokens, particles)

            tokens = tokens.clone()
            confidence = torch.zeros_like(uniform)
            for positions, pair in hmar.wave_logits(branch, size, x, tokens):
                is_hidden = hidden[:, positions]
                if pass_index == 0:  # given tokens are judged by predictions from coarser scales
                    log_p = pair[0].log_softmax(-1).gather(-1, tokens[:, positions, None])[..., 0]
                    likelihood += log_p.masked_fill(is_hidden, 0).sum(1)
                logits = classifier_free_guidance(pair, strength) + clues[:, positions]
                sampled, probability = sample_codes(
                    logits, uniform[:, positions], scale_temperature, top_k, top_p
                )
                tokens[:, positions] = torch.where(is_hidden, sampled, tokens[:, positions])
                confidence[:, positions] = probability.double()

            hidden = hide_least_confident(confidence, hidden, keep)
            grown = f_hat + tokenizer.contribution(codec, tokens, k, scales)
            if pass_index + 1 == len(schedule[k]):  # the scale is complete: resample the particles
                is_last = k + 1 == len(scales)
                chosen = choose_particles(likelihood, particles, seeds, k, is_last)
                tokens, hidden, grown = (part[chosen] for part in (tokens, hidden, grown))
                cache = None if cache is None else select_in_cache(cache, chosen)
            yield Step(k, pass_index, tokens, hidden, grown)

        f_hat = grown


def choose_particles(likelihood, particles, seeds, k, is_last):
    """The batch entries (B,) with which an edit goes on after scale k.

    likelihood (B,) in nats, of what is given at this scale; seeds: of the B / particles images. The
    particles of each image are resampled in proportion to their likelihood (systematic resampling,
    Kitagawa 1996). At the last scale the one with the highest replaces all of its image.
    """
    weights = likelihood.view(-1, particles).softmax(1)  # (images, particles)
    if is_last:
        chosen = weights.argmax(1, keepdim=True).expand(-1, particles)
    else:
        offsets = [random_stream(seed, k, RESAMPLING).random() for seed in seeds]
        offsets = torch.tensor(offsets, device=weights.device)[:, None]  # (images, 1)
        points = (torch.arange(particles, device=weights.device) + offsets) / particles
        chosen = torch.searchsorted(weights.cumsum(1), points).clamp(max=particles - 1)
    first = particles * torch.arange(len(weights), device=weights.device)
    return (first[:, None] + chosen).flatten()


def keeps_by_image(keeps, hidden):
    """[(B, 1), ...]: the tokens that an image keeps at each pass, in proportion to its hidden ones.

    hidden (B, n_k). With keeps (1, 1, 2, 4), an image of which half is hidden keeps 1, 0, 1 and 2.
    """
    count, total = hidden.sum(1, keepdim=True), hidden.shape[1]
    sums = [(count * done + total - 1) // total for done in accumulate(keeps, initial=0)]
    return [after - before for before, after in pairwise(sums)]


def evidence(codebook, residual, outside, size):
    """Log-likelihood (B, n_k, codes) of each code, given the visible part of its cell.

    residual (B, code_dim, h, w) is left to quantise and known where outside (B, 1, h, w). A cell of
    this scale has m positions of the latent map. Let a share s of them be visible, with mean a and
    variance v. If positions are independent and Gaussian, then

        mean of the whole cell ~ Normal(a, v (1 - s) / (m s))

    Returned is the logarithm of this density at each code, up to a constant; 0 in cells that are
    hidden wholly.
    """
    visible = outside.to(residual.dtype)
    share = tokenizer.resize_to_scale(visible, size)  # (B, n_k, 1)
    divisor = share.clamp(min=1e-6)  # 0 / 0 in hidden cells; no other share is so small
    mean = tokenizer.resize_to_scale(residual * visible, size) / divisor  # (B, n_k, code_dim)
    square = tokenizer.resize_to_scale(residual.square() * visible, size) / divisor
    variance = (square - mean.square()).mean(-1, keepdim=True)
    variance = variance.clamp(min=1e-4)  # a deviation of .01 at least: a few positions may be alike

    m = outside.shape[2:].numel() / math.prod(size)
    unknown = (1 - share).clamp(min=1e-2)  # 0 only where tokens are given instead of sampled
    precision = m * share / unknown / variance
    distance = torch.cdist(mean, codebook.to(mean.dtype)).square()
    return torch.where(share > 0, -0.5 * precision * distance, 0.0)


def replace_hidden(images, mask, reach):
    """images (B, 3, H, W) whose pixels under the mask (B, 1, H, W) are replaced by a guess.

    They become the mean of the visible pixels, and near the edge of the mask their extrapolation.
    """
    count = (~mask).sum((2, 3), keepdim=True).clamp(min=1)
    total = images.masked_fill(mask, 0).sum((2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / count).to(images.dtype)  # (B, 3, 1, 1)
    return torch.where(mask, mean + extrapolate(images - mean, ~mask, reach), images)


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


# ---- model files

# guidance, top-k and top-p of the published samplers: those of HMAR by depth, and that of VAR
PUBLISHED = {
    16: dict(guidance=1.7, top_k=1000, top_p=0.99),
    20: dict(guidance=1.9, top_k=950, top_p=0.99),
    24: dict(guidance=2.1, top_k=900, top_p=0.99),
    30: dict(guidance=1.6, top_k=650, top_p=0.99),
}
PUBLISHED_VAR = dict(guidance=1.5, top_k=900, top_p=0.96)

EXPECTED_WEIGHTS = "expected a run folder of train.py, its model.pt, or published weights"


def load_model(path, tokenizer_path=None, scales=None):
    """The model of a run folder, of its file model.pt, or of published weights, on the CPU.

    tokenizer_path: another file, whose tokenizer is used; published transformers need one. scales:
    as for hmar.from_published. A model is a dict of these parts:

        tokenizer    tree of tokenizer.py
        transformer  tree of hmar.py
        classes      names of the classes, [str, ...]
        sampling     keyword arguments of `steps` that suit the transformer

    That of a run whose training has not finished, or of published weights, has only some of them;
    `draft` is a tokenizer whose decoder's stage has not ended.

    Files are read with weights_only=True, so that none can run code. ValueError if a file is
    missing or holds no such weights.
    """
    path = find_weights(Path(path))
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: no weights, {EXPECTED_WEIGHTS}: {reason}") from error
    names = model.keys() if isinstance(model, dict) else set()
    if names == {"stage", "state"}:  # a checkpoint
        raise ValueError(f"{path}: training has not finished; the same train.py command goes on")
    is_ours = bool(names & {"draft", "tokenizer", "transformer"})
    if is_ours and scales is not None:
        raise ValueError(f"--scales: for published weights; {path} has its own")
    try:
        if is_ours:
            model = update_model(model)
        else:
            model = from_published(model, scales)
    except ValueError as error:
        raise ValueError(f"{path}: no weights, {EXPECTED_WEIGHTS}: {error}") from error

    if tokenizer_path is not None:
        other = load_model(tokenizer_path)
        if "tokenizer" not in other:
            raise ValueError(f"{tokenizer_path}: has no tokenizer")
        model["tokenizer"] = other["tokenizer"]
    return model


def find_weights(path):
    """The file of weights that a path means. ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder, {EXPECTED_WEIGHTS}")
    has_model = (path / "model.pt").exists()
    is_begun = (path / "args.json").exists() and not has_model
    if is_begun:
        raise ValueError(f"{path}: training has not finished; the same train.py command goes on")
    if not path.is_dir():
        return path
    if not has_model:
        raise ValueError(f"{path}: has no model.pt, {EXPECTED_WEIGHTS}")
    return path / "model.pt"


def update_model(model):
    """A model as it is today, from a file that may be older.

    In older files is_causal is an entry of the model, published MLPs are called mlp_tanh, and
    guidance was weakened token by token where the class changed a prediction most (soften).
    """
    params = model.get("transformer")
    is_causal = model.pop("is_causal", False)
    if model.get("sampling", {}).pop("soften", None):
        warnings.warn("a model of an older version, whose guidance may be too strong now")
    if params is None:
        return model
    if is_causal:
        params["causal"] = {}
    branches = [params[name]["blocks"] for name in ("next_scale", "masked") if name in params]
    for block in sum(branches, params["trunk"]):
        if "mlp_tanh" in block:
            block["mlp"] = block.pop("mlp_tanh") | dict(tanh={})
    return model


def from_published(state_dict, scales=None):
    """The part of a model that a published state dict contains: a tokenizer or a transformer."""
    if isinstance(state_dict, dict) and any(name.startswith("encoder") for name in state_dict):
        return dict(tokenizer=tokenizer.from_published(state_dict))
    params = hmar.from_published(state_dict, scales)
    classes = [str(label) for label in range(len(params["classes"]) - 1)]
    return dict(transformer=params, classes=classes, sampling=published_sampling(params))


def published_sampling(params):
    """The settings of the published sampler for such a tree, as keyword arguments of `steps`.

    An HMAR of a depth that was not published gets those of depth 16.
    """
    settings = dict(mask_guidance=0.0, rise=1.0, temperature=1.0, cooling=1.0)
    if "causal" in params:
        return settings | PUBLISHED_VAR
    if "masked" in params:
        settings["schedule"] = published_schedule(hmar.scale_sizes(params))
    return settings | PUBLISHED.get(hmar.block_count(params), PUBLISHED[16])


# ---- pictures and image files

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"  # of images that are read


def sheet(rows, names, numbers=None):
    """A grid of samples as a PIL image: rows of images (n, 3, H, W) in [-1, 1] beside their names.

    numbers: of the rows, which stand for names that the font cannot draw; 0, 1, ... if None.
    """
    font = ImageFont.load_default(12)
    numbers = range(len(names)) if numbers is None else numbers
    pairs = zip(names, numbers, strict=True)
    names = [name[:40] if can_draw(font, name[:40]) else str(number) for name, number in pairs]
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


def can_draw(font, text):
    """Whether a font has all characters of a text; it draws one box for all that it lacks."""
    box = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(character)) != box for character in text)


def to_bytes(images):
    """Images (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_image(path, shortest=None):
    """The first frame of an image file: upright, RGB, transparency on white, 16 bits scaled to 8.

    shortest: a large image may be reduced by a whole factor, but no side below this. Raises what
    Pillow raises for a file that it cannot read.
    """
    with Image.open(path, formats=FORMATS) as image:
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


# ---- devices, memory and errors of the commands, train.py's too


def to_device(tree, device):
    """The tree with all tensors on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def find_device(name=None):
    """The torch.device of this name; by default this process's GPU if there is one, else the CPU.

    "cuda" is this process's GPU, too.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def find_dtype(name, device):
    """torch.bfloat16 or torch.float32, of "bf16" or "fp32"; by default as the processor suggests.

    That is bf16 where it has instructions for it. ValueError for another name.
    """
    if name not in (None, "bf16", "fp32"):
        raise ValueError(f"--dtype: got {name}, expected bf16 or fp32")
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


def add_device_flags(top):
    """Adds --device and --dtype to a parser."""
    device = "default: a GPU if there is one"
    top.add_argument("--device", choices=("cuda", "cpu"), help=device)
    dtype = "default: bf16 where the processor has instructions for it"
    top.add_argument("--dtype", choices=("bf16", "fp32"), help=dtype)


@contextlib.contextmanager
def exit_with_a_line(name):
    """Turns ValueError and OSError into one line and status 1.

    It is for what reads flags and files; an error elsewhere is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")


# ---- here the library ends; the command

# settings of `steps` that are flags too
SAMPLING_FLAGS = "guidance", "mask_guidance", "rise"
SAMPLING_FLAGS += "temperature", "cooling", "top_k", "top_p"


def parser():
    """The flags of `python sample.py`."""
    top = argparse.ArgumentParser(description="Sample images, or repaint a part of one.")
    add = top.add_argument
    add("run", help="run folder of train.py, its model.pt, or published weights")
    add("--tokenizer", help="file with another tokenizer; published transformers need one")
    text = "all scales of published weights of another size, coarse to fine, such as 1 2 4 or 2x3"
    add("--scales", nargs="+", type=scale_pair, help=text)
    text = (
        "class names, or numbers of classes that have no such name "
        "(default: all; the first ten for a picture)"
    )
    add("--labels", nargs="+", help=text)
    add("--count", type=int, default=8, help="images for each label (default: 8)")
    text = "image i uses the random numbers of seed + i (default: 0)"
    add("--seed", type=int, default=0, help=text)
    text = (
        "picture file: a grid with a row for each label; .gif: a grid after each pass, but of "
        "edits only the last; .npz: an array for FID programs, shuffled; no suffix: a folder, "
        "missing or empty, of images NUMBER-CLASS.png, which torchrun shares among processes "
        "(default: samples.png)"
    )
    add("--out", type=Path, default=Path("samples.png"), help=text)
    add("--edit", type=Path, help="image to repaint; it is cropped and reduced to the model's size")
    text = (
        "image with the same proportions, white where to repaint; if it has transparent parts, "
        "what is opaque is repainted, of whatever colour"
    )
    add("--mask", type=Path, help=text)
    text = (
        "instead of --mask: shrink the image and paint a border of this share of the model's size"
    )
    add("--pad", type=float, default=0.0, help=text)
    text = "candidates for an edit, which are sampled together; the best one is kept (default: 8)"
    add("--particles", type=int, default=8, help=text)
    add_device_flags(top)
    add_sampling_flags(top)
    return top


def add_sampling_flags(top):
    """Adds SAMPLING_FLAGS and --mask-steps to a parser; those not given are not in its result."""
    title = "sampling settings (the defaults are stored in the model, and printed)"
    add = top.add_argument_group(title, argument_default=argparse.SUPPRESS).add_argument
    add("--guidance", type=float, help="strength of guidance at the last scale; 0 turns it off")
    add("--mask-guidance", type=float, help="the same in masked passes")
    text = "guidance is multiplied by (k / (S - 1)) ** RISE at scale k of 0 to S - 1; 0: constant"
    add("--rise", type=float, help=text)
    text = "divides the logits of the last scale (see --cooling); 0: take the most likely code"
    add("--temperature", type=float, help=text)
    text = (
        "the temperature of the first scale divided by that of the last, to which it falls; "
        "1: constant"
    )
    add("--cooling", type=float, help=text)
    add("--top-k", type=int, help="sample only the k most likely codes; 0: all")
    text = "sample only the smallest set of codes with at least this probability together; 1: all"
    add("--top-p", type=float, help=text)
    text = "masked passes at each scale, which sample the least confident tokens again"
    add("--mask-steps", type=int, metavar="N", help=text)


def scale_pair(text):
    """Parses "4" or "2x3" as (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def overrides_of_flags(args, transformer):
    """The settings of `steps` that flags replace in a model, {name: value}."""
    overrides = {name: x for name, x in vars(args).items() if name in SAMPLING_FLAGS}
    if "mask_steps" in args:
        overrides["schedule"] = masked_schedule(hmar.scale_sizes(transformer), args.mask_steps)
    return overrides


class Job(NamedTuple):
    """What the flags ask for, read and checked."""

    kind: str  # of the output: "folder" or the suffix of a file
    model: dict
    overrides: dict  # settings that replace those of the model
    classes: list  # numbers, one a row of the picture
    labels: torch.Tensor  # (n,) of all images
    seeds: list  # of the n images
    batches: list  # slices of the n images
    photo: torch.Tensor | None  # (1, 3, H, W), to be edited
    mask: torch.Tensor | None  # (1, 1, H, W)
    particles: int


def read_job(args):
    """The Job of the flags. ValueError or OSError where they, or the files, do not fit."""
    kind = kind_of_output(args)
    for name, number in dict(count=args.count, particles=args.particles).items():
        if number < 1:
            raise ValueError(f"--{name}: got {number}, expected 1 or more")

    model = load_model(args.run, args.tokenizer, args.scales)
    check_parts(args.run, model)
    device = find_device(args.device)
    dtype = find_dtype(args.dtype, device)
    codec = to_device(tokenizer.cast(model["tokenizer"], dtype), device)
    params = to_device(hmar.cast(model["transformer"], dtype), device)
    model = model | dict(tokenizer=codec, transformer=params)

    default = model["classes"] if kind in ("folder", ".npz") else model["classes"][:10]
    classes = class_numbers(args.labels or default, model["classes"])
    labels = classes.repeat_interleave(args.count)
    seeds = seeds_of_images(args.seed, len(labels))
    overrides = overrides_of_flags(args, params)
    check_arguments(params, codec, labels, seeds, **model["sampling"] | overrides)

    photo = mask = None
    height, width = image_size(params, codec)
    batch = min(50, images_at_once(height * width))
    if args.edit or args.mask or args.pad:
        if not args.edit or (args.pad if args.mask else not 0 < args.pad < 0.5):
            raise ValueError("--edit: expected either --mask, or --pad above 0 and below 0.5")
        pair = read_photo_and_mask(args.edit, args.mask, args.pad, (width, height))
        photo, mask = to_device(pair, device)
        batch = max(1, batch // args.particles)
    args.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return Job(
        kind=kind,
        model=model,
        overrides=overrides,
        classes=classes.tolist(),
        labels=labels,
        seeds=seeds,
        batches=parts(len(labels), batch),
        photo=photo,
        mask=mask,
        particles=args.particles,
    )


def kind_of_output(args):
    """What --out is: "folder", or the suffix of a file. ValueError if it cannot be written."""
    suffix = args.out.suffix.lower()
    if args.out.is_dir() or not suffix:
        if args.out.is_dir() and any(args.out.iterdir()):
            raise ValueError(
                f"--out: got {args.out}, which is not empty; remove it or name another"
            )
        return "folder"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--out: got {args.out}, several processes need a folder")
    if suffix != ".npz" and Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"--out: got {args.out}, expected .png, .jpg, .gif, .npz or no suffix")
    if args.out.resolve() in [path.resolve() for path in (args.edit, args.mask) if path]:
        raise ValueError(f"--out: got {args.out}, which would be overwritten")
    return suffix


def check_parts(run, model):
    """ValueError, with advice, if a model has no tokenizer or no transformer."""
    if "transformer" not in model:
        is_run = "sampling" in model  # otherwise it is a published tokenizer
        advice = "training has not finished; the same train.py command goes on" if is_run else ""
        raise ValueError(f"{run}: has no transformer; {advice or EXPECTED_WEIGHTS}")
    if "tokenizer" not in model:
        raise ValueError(f"{run}: has no tokenizer; name a file that has one with --tokenizer")


def read_photo_and_mask(photo_path, mask_path, pad, size):
    """Image (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) bool, cropped to size (width, height).

    mask_path: for `read_mask`. Without it the photo is surrounded by a border of `pad` times the
    size, which is to be repainted. ValueError if there is nothing to repaint, or everything.
    """
    photo = read_image(photo_path)
    if mask_path:
        photo, mask = crop_together(photo, read_mask(mask_path), size)
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
    if not mask.any() or mask.all():
        raise ValueError("--mask: expected some white, where to repaint, and some black")
    return pixels, mask


def read_mask(path):
    """A grey PIL image of a mask file, white where to repaint.

    If the file has transparent parts, what is opaque counts as white, of whatever colour.
    """
    with Image.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 255:
                return alpha
        return convert_to_rgb(image).convert("L")


def crop_together(photo, mask, size):
    """(photo at size (width, height), mask at a multiple of it), cropped to the same part.

    Both are first resized to `times` times the size, so that a pixel that is shown is a mean of
    cells outside the mask only. ValueError if their proportions differ.
    """
    skew = abs(mask.width * photo.height - mask.height * photo.width)
    if skew > max(*mask.size, *photo.size):  # sides that were rounded may differ by a pixel
        raise ValueError(f"--mask: got {mask.size} pixels for a photo of {photo.size}")
    ratios = [min(image.width / size[0], image.height / size[1]) for image in (photo, mask)]
    times = math.ceil(max(4, *ratios))  # at least 4, because small photos would become jagged
    grid = [times * side for side in size]
    photo, mask = (ImageOps.fit(image, grid, Image.NEAREST) for image in (photo, mask))
    return photo.reduce(times), mask


def sample_part(job, part):
    """Images (n, 3, H, W) of a part, a slice, of the job, on the CPU."""
    labels, seed = job.labels[part], job.seeds[part]
    if job.photo is None:
        return generate(job.model, labels, seed=seed, **job.overrides).cpu()
    photo, mask = (x.expand(len(labels), -1, -1, -1) for x in (job.photo, job.mask))
    options = dict(particles=job.particles, seed=seed) | job.overrides
    return edit(job.model, photo, mask, labels, **options).cpu()


@torch.no_grad()
def sample_growth(job, part):
    """[images (n, 3, H, W), ...] of a part of the job, decoded after each pass, on the CPU."""
    params, codec = job.model["transformer"], job.model["tokenizer"]
    settings = job.model["sampling"] | job.overrides
    passes = steps(params, codec, job.labels[part], seed=job.seeds[part], **settings)
    return [tokenizer.decode_features(codec, step.f_hat).cpu() for step in passes]


def write_picture(path, job):
    """Writes a grid with a row for each class; as .gif a grid after each pass."""
    names = [job.model["classes"][number] for number in job.classes]
    is_gif = job.kind == ".gif"
    if is_gif and job.photo is None:
        frames = list(zip(*(sample_growth(job, part) for part in job.batches)))
    else:
        frames = [[sample_part(job, part) for part in job.batches]]

    pages = []
    for frame in frames:
        rows = torch.cat(frame).chunk(len(names))
        if job.photo is not None:  # the image and what is visible of it come first
            shown = torch.cat([job.photo, job.photo.masked_fill(job.mask, 0)]).cpu()
            rows = [torch.cat([shown, row]) for row in rows]
        pages.append(sheet(rows, names, job.classes))

    if is_gif:  # the last page is shown longest
        times = [400] * (len(pages) - 1) + [2000]  # milliseconds
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)
    else:
        pages[0].save(path)


def write_archive(path, job):
    """Writes arr_0, uint8 (n, H, W, 3), and labels (n,) for programs that compute FIDs.

    They are shuffled, always alike: the Inception Score of such programs is a mean over parts of a
    file, and a part with few classes would lower it.
    """
    pixels = np.concatenate([to_bytes(sample_part(job, part)) for part in job.batches])
    order = np.random.default_rng(0).permutation(len(pixels))
    with open(path, "wb") as file:
        np.savez(file, arr_0=pixels[order], labels=job.labels.numpy()[order])


def write_folder(folder, job):
    """Writes NUMBER-CLASS.png of each image.

    Processes of torchrun share the batches, which are those of one process: a smaller batch would
    round differently.
    """
    rank, processes = (int(os.environ.get(name, x)) for name, x in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > 1:  # no image is written before all processes have seen that the folder is empty
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    folder.mkdir(exist_ok=True)

    names = [re.sub(r"[^\w.-]", "_", name)[:40] for name in job.model["classes"]]
    for part in job.batches[rank::processes]:
        numbers = range(len(job.labels))[part]
        labels = job.labels[part].tolist()
        images = to_bytes(sample_part(job, part))
        for number, label, pixels in zip(numbers, labels, images, strict=True):
            Image.fromarray(pixels).save(folder / f"{number:06d}-{names[label]}.png")
        print(f"sampled {numbers[0]} to {numbers[-1]} of {len(job.labels)}", flush=True)

    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or files."""
    args = parser().parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    keep_freed_memory()
    try:
        with exit_with_a_line("sample.py"):
            job = read_job(args)
        settings = job.model["sampling"] | job.overrides
        print(
            "; ".join(f"{name} {settings[name]:g}" for name in SAMPLING_FLAGS if name in settings)
        )
        writers = {"folder": write_folder, ".npz": write_archive}
        writers.get(job.kind, write_picture)(args.out, job)
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    names = dict.fromkeys(job.model["classes"][number] for number in job.classes)
    print(f"{args.out}: {args.count} each of {', '.join(names)}")


if __name__ == "__main__":
    main()
