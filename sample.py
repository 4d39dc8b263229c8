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

    at_once = images_at_once(math.prod(image_size(params, codec)))

    images = []
    for part in torch.arange(len(labels)).split(at_once):
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
    known=None,
    particles=1,
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
    known: None for new images. For edits (features, outside): the encoder's output
        (B, code_dim, h, w), and (B, 1, h, w) bool, True for cells of the latent map that lie wholly
        outside the mask. See `start_of_scale` for what becomes of them.
    particles: samples of each image that an edit follows at once, one after another in the batch of
        B * particles entries that a Step has, see `resample_particles`.
    schedule: for each scale, how many tokens each of its passes keeps, see `masked_schedule`; None:
        one pass a scale. An edit keeps as large a share of its hidden tokens.
    guidance, mask_guidance: strength of guidance at the last scale, in next-scale and in masked
        passes. 0 turns it off, which halves the cost.
    rise: guidance is multiplied by (k / (S - 1)) ** rise at scale k of S; 0: constant.
    temperature: divides the logits of the last scale; below .001 the most likely code is taken.
    cooling: the temperature of the first scale divided by that of the last one, to which it falls
        as cooling ** (1 - k / (S - 1)); 1: constant. Coarse scales decide what an image shows, and
        a high temperature varies it; at a low one fine scales add less noise. This lowers the FD of
        samples (tests/RESULTS.md, section 3).
    top_k: only the top_k most likely codes are sampled; 0: all.
    top_p: of these, only the most likely ones that together have this probability.
    seed: image i uses the random numbers of seed + i; or a list with a seed for each image.

    ValueError if the arguments do not fit each other.
    """
    scales, codebook = hmar.scale_sizes(params), codec["codebook"]
    labels, seeds = torch.as_tensor(labels), seeds_of_images(seed, len(labels)).repeat(particles)
    strengths = dict(guidance=guidance, mask_guidance=mask_guidance, rise=rise)
    ranges = dict(temperature=temperature, cooling=cooling, top_k=top_k, top_p=top_p)
    check_arguments(params, codec, schedule, **strengths, **ranges)

    schedule = schedule or masked_schedule(scales, 0)
    labels, *known = (  # (B particles, ...), as all that follows; B stands for these
        part.repeat_interleave(particles, 0) for part in (labels, *(known or ()))
    )
    conditions = hmar.condition(params, labels.to(codebook.device))  # (B, C)
    conditions = torch.stack([conditions, params["classes"][-1].expand_as(conditions)])  # (2, B, C)
    f_hat = codebook.new_zeros(len(labels), codebook.shape[1], *scales[-1])  # (B, code_dim, h, w)
    cache = [[] for _ in range(hmar.block_count(params))] if "causal" in params else None

    for k, size in enumerate(scales):
        progress = k / (len(scales) - 1) if len(scales) > 1 else 1.0  # 0 to 1, at the last scale
        scale_temperature = temperature * cooling ** (1 - progress)
        filters = dict(temperature=scale_temperature, top_k=top_k, top_p=top_p)
        inputs = tokenizer.resize_to_scale(f_hat, size)  # (B, n_k, code_dim), of coarser scales
        tokens, hidden, clues = start_of_scale(codebook, f_hat, size, *known)
        likelihood = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)

        for pass_index, keep in enumerate(keeps_by_image(schedule[k], hidden)):
            if pass_index == 0:  # next-scale prediction sees only coarser scales
                branch, strength, seen = params["next_scale"], guidance, [inputs]
            else:  # a masked pass also sees the tokens of this scale that are not hidden
                zeroed = None if "leak" in params["masked"] else hidden
                own_inputs = tokenizer.own_inputs_of_scale(codec, tokens, k, scales, zeroed)
                branch, strength = params["masked"], mask_guidance
                seen = [inputs, own_inputs, hidden]  # the mask is `hidden`
            # For guidance features are computed with and without a class: (2, B, n_k, C). Rise does
            # not decide it, because a cache has to hold both of all scales.
            halves = 2 if strength > 0 else 1
            seen = [torch.cat([x] * halves) for x in seen]
            x = hmar.features(params, conditions[:halves].flatten(0, 1), *seen, k=k, cache=cache)
            x = x.unflatten(0, (halves, -1))
            strength = strength * progress**rise
            uniform = uniform_numbers(seeds, particles, k, pass_index, tokens)  # (B, n_k)

            tokens = tokens.clone()  # those of the last Step stay as they are
            confidence = torch.zeros_like(uniform)
            for positions, pair in hmar.wave_logits(branch, size, x, tokens):
                is_hidden = hidden[:, positions]  # (B, m), of the m positions of this wave
                logits = classifier_free_guidance(pair, strength) + clues[:, positions]
                sampled, probability = sample_codes(logits, uniform[:, positions], **filters)
                tokens[:, positions] = torch.where(is_hidden, sampled, tokens[:, positions])
                confidence[:, positions] = probability.double()
                if pass_index == 0 and particles > 1:
                    likelihood += likelihood_of_given(pair[0], tokens[:, positions], is_hidden)

            hidden = hide_least_confident(confidence, hidden, keep)
            grown = f_hat + tokenizer.contribution(codec, tokens, k, scales)
            if particles > 1 and pass_index + 1 == len(schedule[k]):  # the scale is complete
                state = tokens, hidden, grown, cache
                state = resample_particles(state, likelihood, particles, seeds, k, progress == 1)
                tokens, hidden, grown, cache = state
            yield Step(k, pass_index, tokens, hidden, grown)

        f_hat = grown  # the next scale is sampled from this


def classifier_free_guidance(pair, strength):
    """(1 + t) conditional - t unconditional, t the strength (Ho and Salimans 2021, equation 6).

    pair (2, B, m, codes): logits with and without the class. Without guidance (1, B, m, codes).
    """
    return pair[0] if strength == 0 else (1 + strength) * pair[0] - strength * pair[1]


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


def masked_schedule(scales, masked_passes, refined_tokens=math.inf):
    """A schedule [[1], ...]: next-scale prediction, then this many masked passes, at each scale.

    refined_tokens: scales of more tokens have no masked pass (as published, those of more than 9).

    The number of tokens that a pass keeps grows as a cosine falls (MaskGIT, section 3.3): of 16
    tokens the first pass keeps 1, and 3 masked passes keep 4, 5 and 6. Scale 0 has one pass; a
    scale has at most as many passes as tokens.
    """
    check_numbers(masked_passes=masked_passes)
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


def uniform_numbers(seeds, particles, k, pass_index, tokens):
    """fp64 in [0, 1) for tokens (B, n), on their device: the source of all randomness.

    seeds (B,): of B / particles images, each repeated; k, pass_index: of the pass.

    The first particle of an image has its seed. Those of the others are 2^48 and more away, far
    from all that a user asks for.
    """
    own = [seed + (i % particles << 48) for i, seed in enumerate(seeds.tolist())]
    rows = [np.random.default_rng((seed, k, pass_index)).random(tokens.shape[1]) for seed in own]
    return torch.from_numpy(np.reshape(rows, tokens.shape)).to(tokens.device)


def seeds_of_images(seed, count):
    """A numpy array (count,): seed + i for image i, or the seeds that are given, one an image."""
    seeds = np.asarray(seed, np.int64)
    seeds = seeds + np.arange(count) if seeds.ndim == 0 else seeds
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} for {count} labels")
    return seeds


def class_numbers(labels, names):
    """A tensor of labels: numbers or vectors as they are, names of classes as their numbers.

    Digits that name no class are the number of one.
    """
    if torch.is_tensor(labels):
        return labels
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    if unknown := [x for x in labels if isinstance(x, str) and x not in numbers]:
        expected = f"0 to {len(names) - 1} or a name such as {', '.join(names[:5])}"
        raise ValueError(f"labels: got {unknown[0]!r}, expected {expected}")
    return torch.as_tensor([numbers[x] if isinstance(x, str) else x for x in labels])


def images_at_once(pixels):
    """How many images with this number of pixels pass a network together: 512 of 32 x 32."""
    return max(1, 2**19 // pixels)


def image_size(params, codec):
    """(height, width) in pixels of the images of a model."""
    return tuple(tokenizer.downsampling(codec) * side for side in hmar.scale_sizes(params)[-1])


def check_arguments(params, codec, schedule=None, **numbers):
    """ValueError where the arguments of `steps` would silently give wrong images."""
    check_codes(params, codec)
    check_numbers(**numbers)
    passes = [len(keeps) for keeps in schedule or [[]]]  # of each scale
    if passes[0] > 1 or (max(passes) > 1 and "masked" not in params):
        raise ValueError("schedule: masked passes need a masked branch (VAR has none), scale > 0")


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


# ---- editing


@torch.no_grad()
def edit(model, images, mask, labels, *, particles=8, seed=0, **overrides):
    """images (B, 3, H, W) in [-1, 1], repainted under the mask as labels say (HMAR, editing).

    model, labels, seed, overrides: as for `generate`; but the schedule of the model is that of its
        samples. Edits take one masked pass at each scale by default, if there is a masked branch.
    mask: (B, 1, H, W) bool, True = repaint. Hidden pixels have no influence on the result, and
        pixels outside the mask stay as they are.
    particles: samples of each image that are followed at once, see `steps`. The best one is
        returned. Time grows with their number; memory is bounded, as in `generate`.

    Just outside the mask it is known what the decoded image lacks. This difference is extrapolated
    and added inside, fading over two latent cells.

    ValueError if images, mask and labels do not fit.
    """
    params, codec = model["transformer"], model["tokenizer"]
    labels, scales = class_numbers(labels, model["classes"]), hmar.scale_sizes(params)
    seeds = seeds_of_images(seed, len(labels))
    expected = (len(images), 1, *images.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected or len(labels) != len(images):
        got = f"{mask.dtype} {tuple(mask.shape)} and {len(labels)} labels"
        raise ValueError(f"mask: got {got}, expected a bool tensor {expected}, a label each")
    tokenizer.check_images(codec, images.masked_fill(mask, 0), scales)

    schedule = masked_schedule(scales, int("masked" in params))
    settings = model["sampling"] | dict(schedule=schedule) | overrides
    cell = tokenizer.downsampling(codec)
    at_once = max(1, images_at_once(images.shape[2:].numel()) // particles)

    edited = []
    for part in torch.arange(len(images)).split(at_once):
        visible = replace_hidden(images[part], mask[part], 4 * cell)
        features = tokenizer.encode_features(codec, visible)
        outside = F.adaptive_max_pool2d(mask[part].float(), scales[-1]) == 0  # (B, 1, h, w)
        options = settings | dict(known=(features, outside), particles=particles, seed=seeds[part])
        *_, last = steps(params, codec, labels[part], **options)

        # Outside of the mask the image itself is decoded, so that both sides of its edge fit.
        *_, (_, _, f_hat) = tokenizer.quantise(codec, features, scales)
        f_hat = torch.where(outside, f_hat, last.f_hat[::particles])
        painted = tokenizer.decode_features(codec, f_hat)
        painted = painted + extrapolate(visible - painted, ~mask[part], 2 * cell)
        painted = painted.clamp(-1, 1).to(images.dtype)
        edited.append(torch.where(mask[part], painted, images[part]))
    return torch.cat(edited)


def start_of_scale(codebook, f_hat, size, features=None, outside=None):
    """(tokens (B, n_k), hidden (B, n_k), clues (B, n_k, codes)) before a scale is sampled.

    Of new images all tokens are hidden, and clues are 0. Of edits, tokens whose cell lies wholly
    outside the mask are given: they are the codes nearest to the features minus the edit's own
    f_hat so far. The others are hidden, and their clues, which are added to the logits, are the
    `evidence` of the visible part of their cell.
    """
    if features is None:
        tokens = torch.zeros(len(f_hat), math.prod(size), dtype=torch.int64, device=f_hat.device)
        return tokens, tokens == 0, f_hat.new_zeros(*tokens.shape, 1)
    residual = features - f_hat
    tokens = tokenizer.nearest(codebook, tokenizer.resize_to_scale(residual, size))
    hidden = F.adaptive_max_pool2d((~outside).float(), size).flatten(1) > 0
    return tokens, hidden, evidence(codebook, residual, outside, size)


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


def keeps_by_image(keeps, hidden):
    """[(B, 1), ...]: the tokens that an image keeps at each pass, in proportion to its hidden ones.

    hidden (B, n_k). With keeps (1, 1, 2, 4), an image of which half is hidden keeps 1, 0, 1 and 2.
    """
    count, total = hidden.sum(1, keepdim=True), hidden.shape[1]
    sums = [(count * done + total - 1) // total for done in accumulate(keeps, initial=0)]
    return [after - before for before, after in pairwise(sums)]


def likelihood_of_given(logits, tokens, hidden):
    """The log-likelihood (B,) of the tokens (B, m) that are not hidden, by logits (B, m, codes)."""
    log_p = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return log_p.masked_fill(hidden, 0).sum(1)


def resample_particles(state, likelihood, particles, seeds, k, is_last):
    """The tensors (B, ...) of a tree, of the particles with which an edit goes on after scale k.

    likelihood (B,) in nats, of what is given at this scale; seeds (B,): as in `uniform_numbers`.
    The particles of an image are resampled in proportion to their likelihood (systematic
    resampling, Kitagawa 1996), so that coarse tokens agree with what is visible. At the last scale
    the one with the highest replaces all of its image.
    """
    weights = likelihood.view(-1, particles).softmax(1)  # (images, particles)
    if is_last:
        chosen = weights.argmax(1, keepdim=True).expand(-1, particles)
    else:
        # No schedule has 2^31 passes, so these numbers are no token's.
        offsets = uniform_numbers(seeds[::particles], 1, k, 2**31, weights[:, :1])
        points = (torch.arange(particles, device=weights.device) + offsets) / particles
        chosen = torch.searchsorted(weights.cumsum(1), points).clamp(max=particles - 1)
    first = particles * torch.arange(len(weights), device=weights.device)
    chosen = (first[:, None] + chosen).flatten()  # (B,)

    def select(x):  # (B, ...); in a cache of guided passes (2 B, ...), see `steps`
        return x.unflatten(0, (-1, len(chosen)))[:, chosen].flatten(0, 1)

    return pytree.tree_map_only(torch.Tensor, select, state)


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


def load_model(path, tokenizer_path=None, scales=None):
    """The model of a run folder, of its file model.pt, or of published weights, on the CPU.

    tokenizer_path: the file of a tokenizer for published transformers, which need one. scales: as
    for hmar.from_published. A model is a dict of these parts:

        tokenizer    tree of tokenizer.py
        transformer  tree of hmar.py
        classes      names of the classes, [str, ...]
        sampling     keyword arguments of `steps` that suit the transformer

    That of a run whose training has not finished, or of published weights, has only some of them;
    `draft` is a tokenizer whose decoder's stage has not ended.

    Files are read with weights_only=True, so that none can run code. ValueError if a file holds no
    such weights, or if the other arguments would replace what it has.
    """
    file = Path(path, "model.pt") if Path(path).is_dir() else path
    try:
        model = torch.load(file, map_location="cpu", weights_only=True)
        is_ours = not model.keys().isdisjoint({"draft", "tokenizer", "transformer"})
        if any(name.startswith("encoder.") for name in model):
            model = dict(tokenizer=tokenizer.from_published(model))
        elif not is_ours:
            params = hmar.from_published(model, scales)
            classes = [str(label) for label in range(len(params["classes"]) - 1)]
            model = dict(transformer=params, classes=classes, sampling=published_sampling(params))
    except Exception as error:  # torch.load raises errors of many kinds
        reason = str(error).partition("\n")[0]
        expected = "expected published weights, or a run of train.py whose training has finished"
        raise ValueError(f"{path}: {expected}: {reason}") from error

    if is_ours and (scales is not None or (tokenizer_path and "tokenizer" in model)):
        raise ValueError(f"--scales, --tokenizer: for published weights; {path} has its own")
    if tokenizer_path is not None:
        model["tokenizer"] = load_model(tokenizer_path).get("tokenizer")
    return model


def published_sampling(params):
    """The settings of the published sampler for such a tree, as keyword arguments of `steps`.

    An HMAR of a depth that was not published gets those of depth 16.
    """
    settings = dict(mask_guidance=0.0, rise=1.0, temperature=1.0, cooling=1.0)
    if "causal" in params:
        return settings | dict(guidance=1.5, top_k=900, top_p=0.96)
    if "masked" in params:
        refined = {4: [1, 3], 9: [1, 1, 2, 5]}
        counts = tokenizer.lengths(hmar.scale_sizes(params))
        settings["schedule"] = [refined.get(count, [count]) for count in counts]
    by_depth = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}
    guidance, top_k = by_depth.get(hmar.block_count(params), by_depth[16])
    return settings | dict(guidance=guidance, top_k=top_k, top_p=0.99)


# ---- pictures and image files

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"  # of images that are read


def sheet(rows, names):
    """A grid of samples as a PIL image: rows of images (n, 3, H, W) in [-1, 1] beside names."""
    font, names = ImageFont.load_default(12), [name[:40] for name in names]
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
    """The device of a name; by default, or if it is "cuda", this process's GPU, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank) if name == "cuda" else torch.device(name)


def find_dtype(name, device):
    """torch.bfloat16 or float32 of "bf16" or "fp32"; by default bf16 where processors have it."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    name = name or ("bf16" if has_bf16 else "fp32")
    return dict(bf16=torch.bfloat16, fp32=torch.float32)[name]


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
    top.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    top.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is fast")


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

SETTINGS = dict(  # arguments of `steps` that are flags; their defaults are stored in the model
    guidance="strength of guidance at the last scale; 0 turns it off",
    mask_guidance="the same in masked passes",
    rise="guidance is multiplied by (k / (S - 1)) ** RISE at scale k of 0 to S - 1; 0: constant",
    temperature="divides the logits of the last scale (see --cooling); 0: take the likeliest code",
    cooling="temperature of the first scale divided by that of the last, to which it falls",
    top_k="sample only the k most likely codes; 0: all",
    top_p="sample only the smallest set of codes with at least this probability together; 1: all",
)


def parser():
    """The flags of `python sample.py`."""
    top = argparse.ArgumentParser(description="Sample images, or repaint a part of one.")
    add = top.add_argument
    add("run", help="run folder of train.py, its model.pt, or published weights")
    add("--tokenizer", help="file with the tokenizer that published transformers need")
    text = "all scales of published weights of another size, coarse to fine, such as 1 2 4 or 2x3"
    add("--scales", nargs="+", type=lambda side: side.split("x"), help=text)
    add("--labels", nargs="+", help="class names or numbers (default: all, or ten in a picture)")
    add("--count", type=int, default=8, help="images for each label (default: 8)")
    text = "image i uses the random numbers of seed + i, so take seeds further apart than images"
    add("--seed", type=int, default=0, help=text)
    text = (
        "picture with a row for each label; .gif: a frame after each pass, but of edits only the "
        "last; .npz: array for FID programs, shuffled; no suffix: folder, missing or empty, of "
        "images NUMBER-CLASS.png, which torchrun shares among processes (default: samples.png)"
    )
    add("--out", type=Path, default=Path("samples.png"), help=text)
    add("--edit", type=Path, help="image to repaint; it is cropped and reduced to the model's size")
    add("--mask", type=Path, help="image of the same proportions, white or opaque where to repaint")
    text = "instead of --mask: shrink the image, paint a border of this share of the model's size"
    add("--pad", type=float, default=0.0, help=text)
    add("--particles", type=int, default=8, help="candidates; the best is kept (default: 8)")
    add_device_flags(top)

    title = "sampling settings (the defaults are stored in the model, and printed)"
    add = top.add_argument_group(title, argument_default=argparse.SUPPRESS).add_argument
    for name, text in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=int if name == "top_k" else float, help=text)
    text = "masked passes at each scale, which sample the least confident tokens again"
    add("--mask-steps", type=int, metavar="N", help=text)
    return top


def read_photo_and_mask(photo_path, mask_path, pad, size):
    """Image (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) bool, cropped to size (width, height).

    The mask is white, or if it has transparent parts opaque, where to repaint. Without it, the
    photo is shrunk and surrounded by a border of `pad` times the size, which is to be repainted.
    ValueError if there is nothing to repaint, or everything.
    """
    photo = read_image(photo_path)
    if mask_path:
        with Image.open(mask_path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            alpha = image.convert("RGBA").getchannel("A")
            mask = convert_to_rgb(image).convert("L") if alpha.getextrema()[0] == 255 else alpha
        skew = abs(mask.width * photo.height - mask.height * photo.width)
        if skew > max(*mask.size, *photo.size):  # sides that were rounded may differ by a pixel
            raise ValueError(f"--mask: got {mask.size} pixels for a photo of {photo.size}")
    else:
        border = tuple(max(1, int(side * pad)) for side in size)
        inner = [side - 2 * edge for side, edge in zip(size, border)]
        photo = ImageOps.expand(ImageOps.fit(photo, size, Image.LANCZOS).resize(inner), border)
        mask = ImageOps.expand(Image.new("L", inner), border, 255)

    # Both get `times` times the size, so that a pixel that is shown is a mean of cells outside the
    # mask alone. Small photos would become jagged, if it were less than 4 times.
    ratios = [min(image.width / size[0], image.height / size[1]) for image in (photo, mask)]
    times = math.ceil(max(4, *ratios))
    grid = [times * side for side in size]
    photo, mask = (ImageOps.fit(image, grid, Image.NEAREST) for image in (photo, mask))
    pixels = torch.from_numpy(np.array(photo.reduce(times))).permute(2, 0, 1)[None].float()
    mask = torch.from_numpy(np.array(mask))[None, None].float()
    # A pixel of the model that any white cell touches is repainted, so that thin strokes stay.
    mask = F.adaptive_max_pool2d(mask, size[::-1]) > 127
    if not mask.any() or mask.all():
        raise ValueError("--mask: expected some white, where to repaint, and some black")
    return pixels / 127.5 - 1, mask


@torch.no_grad()
def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or files."""
    args = parser().parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    keep_freed_memory()
    rank, processes = (int(os.environ.get(x, y)) for x, y in (("RANK", 0), ("WORLD_SIZE", 1)))
    kind = "" if args.out.is_dir() else args.out.suffix.lower()  # "": a folder

    with exit_with_a_line("sample.py"):
        if not kind and args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out: got {args.out}, which is not empty; name another folder")
        if kind not in ("", ".npz") and Image.registered_extensions().get(kind) not in Image.SAVE:
            raise ValueError(f"--out: got {args.out}, expected .png, .jpg, .gif, .npz or no suffix")
        if kind and processes > 1:
            raise ValueError(f"--out: got {args.out}, several processes need a folder")
        if args.out.resolve() in [path.resolve() for path in (args.edit, args.mask) if path]:
            raise ValueError(f"--out: got {args.out}, which would be overwritten")
        if bool(args.edit) != bool(args.mask or args.pad) or (args.mask and args.pad):
            raise ValueError("--edit: expected together with either --mask or --pad")
        if min(args.count, args.particles) < 1 or args.seed < 0 or not 0 <= args.pad < 0.5:
            raise ValueError("--count, --particles, --seed, --pad: expected >= 1, 1, 0, and < 0.5")

        scales = args.scales and [(int(side[0]), int(side[-1])) for side in args.scales]
        model = load_model(args.run, args.tokenizer, scales)
        names = model.get("classes")
        if "transformer" not in model:
            advice = "training has not finished; the same train.py command goes on"
            raise ValueError(f"{args.run}: has no transformer; {advice}")
        if model.get("tokenizer") is None:
            raise ValueError(f"{args.run}: has no tokenizer; name its file with --tokenizer")
        if not names:
            raise ValueError(f"{args.run}: labels are vectors; call sample.generate with them")

        device = find_device(args.device)
        dtype = find_dtype(args.dtype, device)
        params = to_device(hmar.cast(model["transformer"], dtype), device)
        codec = to_device(tokenizer.cast(model["tokenizer"], dtype), device)
        model |= dict(transformer=params, tokenizer=codec)
        overrides = {name: x for name, x in vars(args).items() if name in SETTINGS}
        if "mask_steps" in args:
            overrides["schedule"] = masked_schedule(hmar.scale_sizes(params), args.mask_steps)
        settings = model["sampling"] | overrides
        check_arguments(params, codec, **settings)

        default = names if kind in ("", ".npz") else names[:10]
        classes = class_numbers(args.labels or default, names)
        labels = classes.repeat_interleave(args.count)
        seeds = seeds_of_images(args.seed, len(labels))
        height, width = image_size(params, codec)
        at_once, shown = min(50, images_at_once(height * width)), []
        if args.edit:
            photo, mask = read_photo_and_mask(args.edit, args.mask, args.pad, (width, height))
            at_once, shown = max(1, at_once // args.particles), [photo, photo.masked_fill(mask, 0)]
        (args.out.parent if kind else args.out).mkdir(parents=True, exist_ok=True)

    print("; ".join(f"{name} {settings[name]:g}" for name in SETTINGS if name in settings))
    if processes > 1:  # no image is written before all processes have seen that the folder is empty
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    batches = []
    for numbers in torch.arange(len(labels)).split(at_once)[rank::processes]:
        options = dict(seed=seeds[numbers]) | overrides
        if args.edit:
            pair = (x.expand(len(numbers), -1, -1, -1).to(device) for x in (photo, mask))
            frames = [edit(model, *pair, labels[numbers], particles=args.particles, **options)]
        elif kind == ".gif":
            passes = steps(params, codec, labels[numbers], **model["sampling"] | options)
            frames = [tokenizer.decode_features(codec, step.f_hat) for step in passes]
        else:
            frames = [generate(model, labels[numbers], **options)]
        if kind:
            batches.append([to_bytes(frame) for frame in frames])
        else:
            for number, pixels in zip(numbers.tolist(), to_bytes(frames[0]), strict=True):
                name = re.sub(r"[^\w.-]", "_", names[labels[number]])[:40]
                Image.fromarray(pixels).save(args.out / f"{number:06d}-{name}.png")
        print(f"sampled {numbers[0]} to {numbers[-1]} of {len(labels)}", flush=True)

    row_names = [names[number] for number in classes.tolist()]
    temporary = args.out.with_suffix(f".{os.getpid()}{kind}")
    if kind == ".npz":
        # Shuffled, always alike: the Inception Score of programs that compute FIDs is a mean over
        # parts of a file, and a part with few classes would lower it.
        order = np.random.default_rng(0).permutation(len(labels))
        pixels = np.concatenate([frame for (frame,) in batches])  # (n, H, W, 3)
        np.savez(temporary, arr_0=pixels[order], labels=labels.numpy()[order])
    elif kind:
        pages = []
        for frame in map(np.concatenate, zip(*batches)):
            images = torch.from_numpy(frame).permute(0, 3, 1, 2) / 127.5 - 1
            rows = [torch.cat([*shown, row]) for row in images.chunk(len(row_names))]
            pages.append(sheet(rows, row_names))
        times = [400] * (len(pages) - 1) + [2000]  # milliseconds
        gif = dict(save_all=True, append_images=pages[1:], duration=times, loop=0)
        pages[0].save(temporary, **gif if kind == ".gif" else {})
    if kind:
        os.replace(temporary, args.out)  # so that a full disk loses nothing that was there
    print(f"{args.out}: {args.count} each of {', '.join(dict.fromkeys(row_names))}")


if __name__ == "__main__":
    main()
