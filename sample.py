"""Sampling: class labels -> tokens, scale by scale -> images; editing; and `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> filter -> draw -> masked refinement
    -> f_hat (B, code_dim, h, w) -> images (B, 3, H, W)

`steps` is the whole method as a generator, one item a pass, so that a caller can watch, stop or
choose; `generate` and `edit` consume it. `guided` is where guidance is applied, `filtered` and
`draw` make tokens of logits, `masked_schedule` says how many of them each pass keeps. The random
numbers of an image follow from its seed, the scale and the pass alone, so they do not depend on
the batch that it is drawn in.

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024);
classifier-free guidance (Ho and Salimans 2021).
"""

import argparse
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import traceback
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.utils import _pytree as pytree

import hmar
import tokenizer

PUBLISHED_PASSES = {4: (1, 3), 9: (1, 1, 2, 5)}  # tokens of a scale -> kept at each pass; else one


class Step(NamedTuple):
    """What `steps` yields after each pass.

    A scale is drawn from what f_hat holds after the last pass of the one before, so a caller may
    write the best candidate's map over the others'.
    """

    scale: int
    number: int  # of the pass in its scale: 0 is the next-scale draw, later ones refine it
    tokens: torch.Tensor  # (B, n_k) int64, the scale's tokens so far
    hidden: torch.Tensor  # (B, n_k) bool, those that a later pass draws again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales up to this: decode_features shows it


def generate(params, codec, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64) of labels (B,) int64.

    Keyword arguments are those of `steps`.
    """
    last = {step.scale: step for step in steps(params, codec, labels, **options)}

    tokens = torch.cat([step.tokens for step in last.values()], 1)
    return decoded(codec, last[max(last)].f_hat), tokens


@torch.no_grad()
def steps(
    params,
    codec,
    labels,
    *,
    schedule=None,
    guidance=1.5,
    mask_guidance=0.0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    is_causal=False,
    known=None,
):
    """Draws the pyramid coarse to fine, yielding a Step after each pass (HMAR; MaskGIT).

    labels (B,) int64. schedule: for each scale the tokens kept at each pass, as `masked_schedule`
    makes it; None is the published one where the tree has a masked branch, else one pass a scale.
    guidance, mask_guidance: a number g >= 0, rising over scales as g k / (S - 1), or one a scale;
    where it is 0 the unconditional half is not computed. temperature >= 0 divides the logits,
    0 = arg max; then top_k >= 0 codes stay, 0 = all; then top_p in (0, 1] of the probability.
    Image i draws the numbers of seed + i, or of seed[i]. is_causal: VAR, with a key/value cache.
    known: (tokens (B, L), given (B, L) bool) of an image, for `edit`. ValueError on bad arguments.
    """
    check_sampling(params, codec, labels, temperature, top_k, top_p)
    scales = hmar.scales(params)
    schedule = check_schedule(schedule, scales, "masked" in params)
    guidance = per_scale("guidance", guidance, scales)
    mask_guidance = per_scale("mask_guidance", mask_guidance, scales)
    seeds = check_seeds(seed, len(labels))
    counts = tokenizer.lengths(scales)
    codebook, phi = codec["codebook"], codec["phi"]

    if known is None:  # nothing is given
        nothing = torch.zeros(len(labels), sum(counts), dtype=torch.int64, device=labels.device)
        known = nothing, nothing.bool()
    known_tokens, given = (row.split(counts, 1) for row in known)
    stays = given[-1].unflatten(1, scales[-1]).unsqueeze(1)  # (B, 1, h, w), outside of the edit

    both = is_causal and any(guidance)  # a cache takes in both halves from the first scale on
    cache = hmar.new_cache(params, len(labels) * (1 + both)) if is_causal else None
    f_hat = torch.zeros(len(labels), codebook.shape[1], *scales[-1], device=labels.device)
    known_f_hat = f_hat

    for k, size in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, size) if k else None  # (B, n_k, code_dim)
        tokens, hidden = known_tokens[k], ~given[k]  # hidden: what is to be drawn
        known_codes = F.embedding(tokens, codebook)
        known_f_hat = known_f_hat + tokenizer.contribution(phi, known_codes, k, scales)

        for number, keep in enumerate(kept_counts(schedule[k], hidden, k and "masked" in params)):
            # the first pass sees the coarser scales alone, later ones also what was kept of this
            if number == 0:
                predict = partial(hmar.scale_features, params, k=k, cache=cache)
                features = guided(predict, params, labels, guidance[k], inputs, both=both)
                head = params["next_scale"]["head"]
            else:
                # published trees, without an own_input, saw the hidden draft leak through
                zeroed = hidden if "own_input" in params["masked"] else None
                own = tokenizer.masked_scale_input(codec, tokens, k, scales, zeroed)
                predict = partial(hmar.masked_scale_features, params, k=k)
                seen = (inputs, own, hidden)
                features = guided(predict, params, labels, mask_guidance[k], *seen)
                head = params["masked"]["head"]

            # the head is affine, so that it may follow guidance: once, not for both halves
            logits = hmar.logits(features, **head) / (temperature or 1)  # (B, n_k, codes)
            numbers = uniforms(seeds, k, number, hidden) if temperature else None
            drawn, confidence = draw(*filtered(logits, top_k, top_p), numbers)
            tokens = torch.where(hidden, drawn, tokens)
            hidden = hidden & ~surest(confidence, hidden, keep)

            added = tokenizer.contribution(phi, F.embedding(tokens, codebook), k, scales)
            grown = torch.where(stays, known_f_hat, f_hat + added)
            yield Step(k, number, tokens, hidden, grown)

        f_hat = grown  # what the next scale is drawn from


def guided(predict, params, labels, t, *features, both=False):
    """Guided features, (1 + t) conditional - t unconditional (Ho and Salimans 2021, equation 6).

    predict(labels, *features) is called once, with both halves in one batch; with t = 0 without
    the unconditional half, unless `both` says that a cache needs it.
    """
    if t == 0 and not both:
        return predict(labels, *features)

    null = torch.full_like(labels, len(params["classes"]) - 1)
    doubled = [None if x is None else torch.cat([x, x]) for x in features]
    conditional, unconditional = predict(torch.cat([labels, null]), *doubled).chunk(2)
    return (1 + t) * conditional - t * unconditional


def filtered(logits, top_k=0, top_p=1.0):
    """(values, codes), (..., K) each: the logits of codes that may be drawn, the surest first.

    Of logits (..., V) those below the top_k-th go (ties stay), then the tail that holds at most
    1 - top_p of what is left; -inf stands where a row has fewer than another. Unfiltered they are
    all there, in their own order.
    """
    everything = logits.shape[-1]
    if not 0 < top_k < everything and top_p >= 1:
        return logits, torch.arange(everything, device=logits.device).expand(logits.shape)

    values, codes = logits.sort(-1, descending=True)
    if 0 < top_k < everything:
        least = values[..., top_k - 1, None]
        most = int((values >= least).sum(-1).max())  # more than top_k where there are ties
        values, codes = values[..., :most], codes[..., :most]
        values = values.masked_fill(values < least, -math.inf)
    if top_p < 1:
        ascending = values.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # of this code and all below
        tail = ascending <= 1 - top_p
        tail[..., 0] = False  # the best always stays
        values = values.masked_fill(tail, -math.inf)
    return values, codes


def draw(values, codes, uniform):
    """(tokens (...) int64, confidence (...)) drawn from codes (..., K) with logits values.

    Their cumulative sum is inverted at uniform (...) fp64 in [0, 1); None draws the likeliest.
    Confidence is a token's probability: by it a pass chooses what it keeps.
    """
    probability = values.softmax(-1)
    if uniform is None:
        place = values.argmax(-1, keepdim=True)
    else:
        sums = probability.cumsum(-1, dtype=torch.float64)
        total = sums[..., -1:]
        below = total.nextafter(torch.zeros_like(total))  # never a code that was ruled out
        at = torch.minimum(uniform[..., None] * total, below)
        place = torch.searchsorted(sums, at, right=True)
    return codes.gather(-1, place)[..., 0], probability.gather(-1, place)[..., 0]


def uniforms(seeds, k, number, hidden):
    """Numbers in [0, 1), (B, n_k) fp64 for hidden (B, n_k): a function of (seed, k, number).

    They are made on the CPU, the same for every device.
    """
    count = hidden.shape[1]
    rows = [np.random.default_rng((seed, k, number)).random(count) for seed in seeds]
    return torch.from_numpy(np.array(rows).reshape(-1, count)).to(hidden.device)


def surest(confidence, hidden, keep):
    """The `keep` (B,) most confident of the hidden tokens, (B, n) bool; ties break by position."""
    order = confidence.masked_fill(~hidden, -math.inf).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(-1)
    return hidden & (place < keep[:, None])


def masked_schedule(scales, passes, curve="cosine"):
    """For each scale the tokens kept at each pass, ((1,), (1, 3), ...): a draw, then `passes`.

    passes: masked passes, a number or one a scale. curve: "cosine" keeps few first, most last
    (MaskGIT, section 3.3), "linear" alike. Never more passes than a scale has tokens, one at the
    first scale. ValueError on others.
    """
    passes = [passes] * len(scales) if isinstance(passes, int) else passes
    passes = per_scale("passes", passes, scales, kinds=int)
    require(curve in ("cosine", "linear"), f"curve: got {curve!r}, expected 'cosine' or 'linear'")

    schedule = []
    for k, count in enumerate(tokenizer.lengths(scales)):
        number = min(passes[k] + 1, count) if k else 1
        kept = [0]
        for i in range(1, number + 1):
            share = i / number if curve == "linear" else 1 - math.cos(math.pi / 2 * i / number)
            least, most = kept[-1] + 1, count - number + i  # one at least for this and each other
            kept.append(min(max(round(share * count), least), most))
        schedule.append(tuple(after - before for before, after in itertools.pairwise(kept)))
    return tuple(schedule)


def published_schedule(scales):
    """The published schedule, (1) (1, 3) (1, 1, 2, 5), then one pass a scale: 14 at 256 pixels."""
    counts = tokenizer.lengths(scales)
    later = [PUBLISHED_PASSES.get(count, (count,)) for count in counts[1:]]
    return ((counts[0],), *later)


def kept_counts(passes, hidden, has_masked_branch):
    """How many of its hidden tokens (B, n) each image keeps at each pass, [(B,), ...].

    The schedule's numbers in proportion, as some tokens may be given. Such an image takes at least
    one pass of refinement, since only the masked branch sees them.
    """
    count, total = hidden.sum(1), hidden.shape[1]
    partly = (count > 0) & (count < total)
    if len(passes) == 1 and has_masked_branch and partly.any():
        return [torch.where(partly, 0, count), torch.where(partly, count, 0)]

    sums = itertools.accumulate(passes, initial=0)
    kept = [(count * done + total - 1) // total for done in sums]
    return [after - before for before, after in itertools.pairwise(kept)]


@torch.no_grad()
def edit(params, codec, images, mask, labels, **options):
    """images (B, 3, H, W) in [-1, 1], of which labels (B,) int64 are drawn under the mask.

    mask (B, 1, H, W) bool, True = repaint. At each scale the tokens whose cells lie outside the
    mask are the image's; the others are drawn by the next-scale branch, then by the masked branch,
    which sees the given ones (HMAR, editing). Pixels outside the mask are the original ones; what
    decoding did to them at its edge is taken back inside too, fading over two latent cells.
    Keyword arguments are those of `steps`. ValueError on a mask of another shape or type, or as
    `encode` and `steps`.
    """
    scales = hmar.scales(params)
    tokenizer.check_images(codec, images, scales)
    expected = (len(images), 1, *images.shape[2:])
    got = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
    require(got == f"torch.bool {expected}", f"mask: got {got}, expected torch.bool {expected}")
    require(len(labels) == len(images), f"labels: got {len(labels)}, expected {len(images)}")

    parts = images.split(at_once(images[0, 0].numel()))
    tokens = torch.cat([tokenizer.encode(codec, part, scales) for part in parts])
    touched = [F.adaptive_max_pool2d(mask.float(), size).flatten(1) for size in scales]
    given = torch.cat(touched, 1) == 0  # (B, L)
    painted, _ = generate(params, codec, labels, known=(tokens, given), **options)

    outside = (~mask).to(painted.dtype)
    original = images.to(painted.dtype)
    error = (original - painted) * outside
    painted = painted + continued(error, outside, 2 * tokenizer.downsampling(codec))
    return torch.where(mask, painted.clamp(-1, 1).to(images.dtype), images)


def continued(error, known, reach):
    """error (B, C, H, W) of the known pixels, carried into the others, fading over `reach` pixels.

    known (B, 1, H, W) is 1 or 0. Returns (B, C, H, W), 0 where known. So no seam shows where a
    decoder mixes both sides of an edge.
    """
    carried = torch.zeros_like(error)
    for ring in range(1, reach + 1):
        share = F.avg_pool2d(known, 3, stride=1, padding=1)
        near = F.avg_pool2d(error, 3, stride=1, padding=1) / share.clamp(min=0.1)
        fresh = (known == 0) & (share > 0)
        error = torch.where(fresh, near, error)
        carried = torch.where(fresh, near * (1 - ring / (reach + 1)), carried)
        known = known + fresh
    return carried


@torch.no_grad()
def decoded(codec, f_hat):
    """tokenizer.decode_features of a few images at a time: a decoder's maps outweigh the rest."""
    few = at_once(f_hat[0, 0].numel() * tokenizer.downsampling(codec) ** 2)
    return torch.cat([tokenizer.decode_features(codec, part) for part in f_hat.split(few)])


def at_once(pixels):
    """How many images of so many pixels pass the tokenizer together: eight of 256 x 256."""
    return max(1, 2**19 // max(1, pixels))


# ---- checks


def require(fine, message):
    """ValueError with the message unless all is fine."""
    if not fine:
        raise ValueError(message)


def check_sampling(params, codec, labels, temperature, top_k, top_p):
    """ValueError for arguments of `steps` that do not fit."""
    codes, code_dim = codec["codebook"].shape
    expected = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    message = f"codec: got {codes} codes of {code_dim} dimensions, the transformer expects"
    require((codes, code_dim) == expected, f"{message} {expected[0]} of {expected[1]}")
    fits = torch.is_tensor(labels) and labels.ndim == 1
    require(fits, f"labels: got {labels}, expected an int64 tensor (B,)")
    fits = _is_number(temperature) and (temperature == 0 or 1e-3 <= temperature < math.inf)
    require(fits, f"temperature: got {temperature}, expected 0 or at least 0.001")
    fits = isinstance(top_k, int) and top_k >= 0
    require(fits, f"top_k: got {top_k}, expected an integer, 0 or more")
    require(_is_number(top_p) and 0 < top_p <= 1, f"top_p: got {top_p}, expected a share in (0, 1]")


def check_schedule(schedule, scales, has_masked_branch):
    """The schedule as tuples, with None replaced. ValueError unless entries sum to their scale."""
    counts = tokenizer.lengths(scales)
    if schedule is None:
        plain = tuple((count,) for count in counts)
        return published_schedule(scales) if has_masked_branch else plain

    fits = isinstance(schedule, (list, tuple)) and len(schedule) == len(counts)
    message = f"schedule: got {schedule!r}, expected the tokens kept at each pass, a tuple for each"
    require(fits, f"{message} of the {len(counts)} scales")
    for k, passes in enumerate(schedule):
        fits = isinstance(passes, (list, tuple)) and len(passes) > 0
        fits = fits and all(isinstance(kept, int) and kept >= 0 for kept in passes)
        fits = fits and sum(passes) == counts[k] and (k > 0 or len(passes) == 1)
        kind = "numbers that sum to" if k else "one number,"
        require(fits, f"schedule: entry {k} is {passes}, expected {kind} {counts[k]}")
        fits = has_masked_branch or len(passes) == 1
        require(fits, "schedule: asks for masked passes; these weights have no masked branch")
    return tuple(tuple(passes) for passes in schedule)


def check_seeds(seed, count):
    """[seed of each image]. ValueError unless there is one for each, 0 <= seed < 2 ** 63."""
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) else seed
    fits = isinstance(seeds, (list, tuple)) and len(seeds) == count
    fits = fits and all(isinstance(number, int) and 0 <= number < 2**63 for number in seeds)
    require(fits, f"seed: got {seed!r}, expected an integer from 0 to 2^63, or {count} of them")
    return seeds


def per_scale(name, value, scales, kinds=(int, float)):
    """One number a scale, 0 to 10,000: a single one rises over the scales as value k / (S - 1)."""
    values = value
    if _is_number(value):
        values = [value * k / max(1, len(scales) - 1) for k in range(len(scales))]
    fits = isinstance(values, (list, tuple)) and len(values) == len(scales)
    fits = fits and all(isinstance(number, kinds) and 0 <= number <= 1e4 for number in values)
    message = f"{name}: got {value}, expected a number from 0 to 10,000, or one for each of the"
    require(fits, f"{message} {len(scales)} scales")
    return values


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- pictures and weights


def sheet(rows, names):
    """A PIL image of rows of images (n, 3, H, W) in [-1, 1], each row's name at its left."""
    font = ImageFont.load_default(12)
    zoom = max(1, 64 // rows[0].shape[-1])  # small images grow by whole pixels
    left = 12 + max(int(font.getlength(name)) for name in names)
    height, width = (side * zoom + 2 for side in rows[0].shape[2:])
    page = Image.new("RGB", (left + width * max(map(len, rows)), height * len(rows)), "white")

    for y, (row, name) in enumerate(zip(rows, names)):
        place = (6, y * height + height // 2)
        ImageDraw.Draw(page).text(place, name, "black", font, anchor="lm")
        for x, pixels in enumerate(to_bytes(row)):
            picture = Image.fromarray(pixels)
            picture = picture.resize((width - 2, height - 2), Image.Resampling.NEAREST)
            page.paste(picture, (left + x * width, y * height))
    return page


def to_bytes(images):
    """Images (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_image(path, shortest=None):
    """The first frame of an image file, upright, RGB, transparency on white, 16 bits scaled to 8.

    shortest: a large JPEG may be decoded at a fraction of its size, no side below that (faster).
    ValueError that names path and reason for a file that is broken or above 100 million pixels.
    """
    try:
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise OSError("no regular file" if os.path.exists(path) else "missing")
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as image:
            if image.width * image.height > 100_000_000:
                raise OSError(f"{image.width} x {image.height} pixels, more than 100 million")
            if shortest is not None:
                image.draft(None, (shortest, shortest))
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "no image of these formats"
        raise ValueError(f"{path}: {str(reason) or type(error).__name__}") from error


def _rgb(image):
    """An image of any mode as viewers show it."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency"), 65535, grey).clip(0, 65535)
        return Image.fromarray((grey / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or "A" in image.getbands():
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load(path):
    """A tree on the CPU. ValueError for any other file, a pickle with code in it among them."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            message = f"{path}: expected a file of weights that can be read safely"
            raise ValueError(f"{message}; {type(error).__name__}") from error


def load_tokenizer(path):
    """A codec from a file, ours or published. ValueError that names the file."""
    state = load(path)
    try:
        if not isinstance(state, dict) or "codebook" not in state:
            return tokenizer.from_published(state)
        tokenizer.check(state)
        return state
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_transformer(path, scales=None, is_causal=None):
    """A transformer's tree from a file, ours or published. ValueError that names the file.

    is_causal: which kind published weights must be, None for either.
    """
    state = load(path)
    try:
        if isinstance(state, dict) and "trunk" in state:
            hmar.check(state)
            return state
        params = hmar.from_published(state, scales)
        found = hmar.published_is_causal(state)
        kind = "VAR's: add --causal" if found else "HMAR's: leave out --causal"
        require(None in (found, is_causal) or found == is_causal, f"holds weights of {kind}")
        return params
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def digest(tree):
    """A fingerprint of all tensors in a tree."""
    total = hashlib.sha256()
    for tensor in pytree.tree_leaves(tree):
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


# ---- the command


def parser():
    """The flags of `python sample.py`."""
    top = Parser(
        "python sample.py RUN [flags]: draw images, or repaint a part of one, from a run folder of "
        "train.py or from published weights."
    )
    add = top.add_argument_group("what").add_argument
    add("run", nargs="?", metavar="RUN", help="run folder of train.py")
    add("--weights", metavar="FILE", help="transformer, ours or published, for a run's own")
    add("--tokenizer", metavar="FILE", help="its tokenizer, ours or published")
    add("--causal", action="store_true", help="the weights are VAR's")
    add("--scales", nargs="+", type=scale_pair, metavar="SIDE", help="of weights, 4 or 2x3 each")
    add("--labels", nargs="+", metavar="L", help="class names or numbers (all; 10 in a sheet)")
    add("--count", type=int, default=8, metavar="N", help="images a label")
    add("--seed", type=int, default=0, metavar="N", help="of the first; image i has seed + i")
    add("--out", default="samples.png", metavar="O", help=".png sheet, .gif, .npz or a folder")
    add = top.add_argument_group("sampling").add_argument
    add(
        "--guidance", nargs="+", type=float, default=1.5, metavar="G", help="rising, or one a scale"
    )
    add("--mask-guidance", nargs="+", type=float, default=0, metavar="G", help="of masked passes")
    add("--temperature", type=float, default=1, metavar="T", help="0: arg max")
    add("--top-k", type=int, default=0, metavar="K", help="codes that may be drawn, 0: all")
    add("--top-p", type=float, default=1, metavar="P", help="probability that may be drawn")
    add("--mask-steps", nargs="+", type=int, metavar="M", help="masked passes (as published)")
    add("--schedule", metavar="S", help="published, or kept at each pass: '1 / 1,3 / 16'")
    add = top.add_argument_group("editing").add_argument
    add("--edit", metavar="PHOTO", help="image to repaint")
    add("--mask", metavar="IMAGE", help="white: repaint; any size")
    add("--pad", type=float, metavar="SHARE", help="outpaint a border of this share of the side")
    add = top.add_argument_group("machine").add_argument
    add("--batch", type=int, default=50, metavar="N", help="images at a time")
    add("--device", metavar="D", help="cuda or cpu (the first there is)")
    add("--dtype", choices=("bf16", "fp32"), help="(bf16 where the processor has it)")
    return top


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with those defaults that say something."""

    def _get_help_string(self, action):
        plain = action.default in (None, False) or action.nargs == 0
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The stock parser, with one line for an error."""

    def __init__(self, description):
        form = partial(Help, max_help_position=26, width=100)
        options = dict(formatter_class=form, usage=argparse.SUPPRESS, allow_abbrev=False)
        super().__init__(description=description, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def number(kind, least, most=10**9):
    """Of a parser: the type of a number of a kind within limits."""

    def parse(text):
        value = kind(text) if len(text) < 100 else math.inf
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"got {text[:100]}, expected {least:g} to {most:g}")
        return value

    parse.__name__ = kind.__name__  # in the message for what is no number
    return parse


def scale_pair(text):
    """Of the parser: "4" or "2x3" -> (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def run(args):
    """What the command does once its flags are read."""
    suffix = os.path.splitext(args.out)[1].lower()
    check_flags(args, suffix)
    device = find_device(args.device)
    params, codec, names, digests = load_models(args, device)
    labels, options = chosen_labels(args, names, suffix), sampling_options(args, params)
    dtype = find_dtype(args.dtype, device)
    models = hmar.cast(params, dtype), tokenizer.cast(codec, dtype)
    photo, mask = photo_and_mask(args, params, codec) if args.edit else (None, None)
    settings = dict(labels=labels, seed=args.seed, dtype=str(dtype), **digests)
    settings |= options | dict(count=args.count, batch=args.batch)
    settings |= dict(edit=args.edit, mask=args.mask, pad=args.pad)
    every = torch.tensor(labels, device=device).repeat_interleave(args.count)

    def make(rows):
        """Images (n, 3, H, W) of a range of the images asked for."""
        own, seed = every[rows.start : rows.stop], args.seed + rows.start
        if photo is None:
            return generate(*models, own, seed=seed, **options)[0]
        same = [x.to(device).expand(len(own), -1, -1, -1) for x in (photo, mask)]
        return edit(*models, *same, own, seed=seed, **options)

    def rows_of(images):
        return [images[i : i + args.count] for i in range(0, len(images), args.count)]

    row_names = [names[label] for label in labels]
    if suffix == ".gif":  # a page a pass
        walk = steps(*models, every, seed=args.seed, **options)
        pages = [sheet(rows_of(decoded(codec, step.f_hat)), row_names) for step in walk]
        times = [400] * (len(pages) - 1) + [2000]  # milliseconds
        more = dict(save_all=True, append_images=pages[1:], duration=times, loop=0)
        write_atomically(args.out, lambda file: pages[0].save(file, "GIF", **more))
    elif suffix == ".png":
        images = torch.cat([make(rows).cpu() for rows in batches(args, every)])
        rows = rows_of(images)
        if photo is not None:
            rows = [torch.cat([photo, row]) for row in rows]
        page = sheet(rows, row_names)
        write_atomically(args.out, lambda file: page.save(file, "PNG"))
    else:
        folder = args.out.removesuffix(".npz")
        paths = draw_folder(args, folder, settings, make, every)
        if suffix == ".npz" and all(map(os.path.exists, paths)):  # of all processes
            pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
            arrays = dict(arr_0=pixels, labels=every.cpu().numpy())
            write_atomically(args.out, lambda file: np.savez(file, **arrays))
    print(f"wrote {printable(args.out)}")


def draw_folder(args, folder, settings, make, labels):
    """Draws number-label.png files beside settings.json and returns the paths of all.

    What is there is skipped, and the work split over torchrun's processes. ValueError for a folder
    that holds anything else, or images of other settings.
    """
    settings = json.loads(json.dumps(settings))  # as they come back from a file
    path = os.path.join(folder, "settings.json")
    os.makedirs(folder, exist_ok=True)
    names = [name for name in sorted(os.listdir(folder)) if not name.startswith("settings.json.")]
    if "settings.json" in names:
        before = read_json(path)
        changed = [name for name in settings if before.get(name) != settings[name]]
        message = f"--out: {folder} holds images drawn with other settings"
        require(not changed, f"{message} ({', '.join(changed)}), expected another folder")
    else:
        message = f"--out: {folder} holds {names[:1]}, not drawn by this command"
        require(not names, f"{message}, expected a new or empty folder")
        write_atomically(path, lambda file: file.write(json.dumps(settings).encode()))

    paths = [
        os.path.join(folder, f"{i:06d}-{label}.png") for i, label in enumerate(labels.tolist())
    ]
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for rows in batches(args, labels)[rank::world]:
        missing = [i for i in rows if not os.path.exists(paths[i])]
        for i, pixels in zip(rows, to_bytes(make(rows)) if missing else ()):
            picture = Image.fromarray(pixels)
            write_atomically(paths[i], lambda file, picture=picture: picture.save(file, "PNG"))
        print(f"drawing {rows.stop}/{len(labels)}", flush=True)
    return paths


def batches(args, labels):
    """Ranges of at most --batch images."""
    every = range(len(labels))
    return [every[first : first + args.batch] for first in every[:: args.batch]]


def check_flags(args, suffix):
    """ValueError for flags that would be without effect, or that no file can follow."""
    for name in ("count", "batch"):
        value = getattr(args, name)
        require(1 <= value <= 10**9, f"--{name}: got {value}, expected 1 to a billion")
    known = suffix in (".png", ".gif", ".npz") or suffix not in Image.registered_extensions()
    require(known, f"--out: got {args.out}, expected a .png, .gif or .npz, or the name of a folder")
    fits = not args.edit or suffix != ".gif"
    require(fits, f"--edit: got {args.out}, expected --out to be a .png, an .npz or a folder")
    ways = (args.mask is not None) + (args.pad is not None)
    require(ways == bool(args.edit), "--edit: expected with one of --mask IMAGE and --pad SHARE")
    fits = args.pad is None or 0 < args.pad < 0.5
    require(fits, f"--pad: got {args.pad}, expected a share of the side between 0 and 0.5")
    whole = args.run is not None or args.weights and args.tokenizer
    require(whole, "expected a run folder, or both --weights and --tokenizer")


def find_device(name):
    """The torch.device of --device, by default a GPU where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # the quantiser is in fp32
    require(name.startswith(("cuda", "cpu")), f"--device: got {name!r}, expected cuda or cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {name!r}, which this machine does not have") from error


def find_dtype(name, device):
    """The torch dtype of --dtype, by default bf16 where the processor multiplies it, else fp32."""
    if name is None:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        name = "bf16" if has_bf16 else "fp32"
    return dict(bf16=torch.bfloat16, fp32=torch.float32)[name]


def load_models(args, device):
    """(params, codec, class names, digests) of a run folder or of files, checked, on a device."""
    weights = args.weights or os.path.join(args.run, "hmar.pt")
    codec_path = args.tokenizer or os.path.join(args.run, "tokenizer.pt")
    for path in (weights, codec_path):
        require(os.path.exists(path), f"{path} is missing; python train.py makes it")
    run_folder = os.path.dirname(weights) if args.weights else args.run
    settings = read_json(os.path.join(run_folder, "args.json"))
    settings = settings if isinstance(settings, dict) else {}
    trained = settings.get("next-scale", {})
    causal = args.causal or bool(settings.get("causal"))

    params, codec = load_transformer(weights, args.scales, causal), load_tokenizer(codec_path)
    digests = dict(transformer=digest(params), tokenizer=digest(codec), is_causal=causal)
    expected = trained.get("tokenizer", digests["tokenizer"])
    fits = args.tokenizer or expected == digests["tokenizer"]
    require(fits, f"{weights} was trained for another tokenizer than {codec_path}")

    names, classes = settings.get("class_names", []), len(params["classes"]) - 1
    if len(names) != classes:
        names = [str(label) for label in range(classes)]
    params, codec = pytree.tree_map(lambda leaf: leaf.to(device), (params, codec))
    return params, codec, names, digests


def chosen_labels(args, names, suffix):
    """The labels that --labels names, by default all, of which a sheet shows ten."""
    if args.labels is None or args.labels == ["all"]:
        return list(range(len(names)))[: 10 if suffix in (".png", ".gif") else None]

    labels = []
    for text in args.labels:
        number = int(text) if text.isdecimal() and len(text) < 10 else len(names)
        near = ", ".join(difflib.get_close_matches(text, names, 3) or names[:3])
        fits = text in names or number < len(names)
        message = f"--labels: got {text!r}, expected 0 to {len(names) - 1} or a name such as"
        require(fits, f"{message} {near}")
        labels.append(names.index(text) if text in names else number)
    return labels


def sampling_options(args, params):
    """The keyword arguments of `steps` that the flags ask for."""
    scales, schedule = hmar.scales(params), None
    if args.schedule == "published":
        schedule = published_schedule(scales)
    elif args.schedule is not None:
        fits = re.fullmatch(r"[\d ,/]+", args.schedule)
        require(fits, f"--schedule: got {args.schedule!r}, expected numbers as in '1 / 1,3 / 9'")
        entries = [re.findall(r"\d+", entry) for entry in args.schedule.split("/")]
        schedule = [[int(kept) for kept in entry] for entry in entries]
    elif args.mask_steps is not None:
        single = len(args.mask_steps) == 1
        schedule = masked_schedule(scales, args.mask_steps[0] if single else args.mask_steps)

    def number(value):
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    return dict(
        schedule=check_schedule(schedule, scales, "masked" in params),
        guidance=number(args.guidance),
        mask_guidance=number(args.mask_guidance),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        is_causal=args.causal,
    )


def photo_and_mask(args, params, codec):
    """(image (1, 3, H, W) in [-1, 1], mask (1, 1, H, W) bool) of --edit and --mask or --pad."""
    size = [tokenizer.downsampling(codec) * side for side in hmar.scales(params)[-1][::-1]]
    photo = ImageOps.fit(read_image(args.edit), size, Image.Resampling.LANCZOS)
    if args.mask is not None:
        mask = ImageOps.fit(read_image(args.mask).convert("L"), size, Image.Resampling.NEAREST)
    else:
        border = tuple(round(side * args.pad) for side in size)
        inner = [max(1, side - 2 * edge) for side, edge in zip(size, border)]
        photo = photo.resize(inner, Image.Resampling.LANCZOS)
        photo = ImageOps.pad(photo, size, color="grey", method=Image.Resampling.NEAREST)
        mask = ImageOps.expand(Image.new("L", inner, 0), border, 255)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return pixels, torch.from_numpy(np.array(mask))[None, None] > 127


def read_json(path):
    """What a JSON file holds, {} where there is no file. ValueError that names a broken one."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, {type(error).__name__}") from error


def write_atomically(path, write):
    """write(file) to a temporary file, then to disk, then renamed: the old one or the whole new.

    OSError if it cannot be written.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path}: cannot be written: {reason}") from error


def printable(text):
    """The text on one line, without what a terminal would obey."""
    return "".join(mark if mark.isprintable() else "?" for mark in str(text))


def command(name, work, parser, argv):
    """Exit status of work(flags): 0; 2, one line, for bad input; 1 for a fault; 130 if stopped."""
    try:
        work(parser.parse_args(argv))
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"{name}: {interrupt or 'stopped; the same command goes on'}", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001
        if os.environ.get("HMAR_TRACEBACK"):
            traceback.print_exc()
        bad_input = isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError))
        text = printable(str(error).strip()) or type(error).__name__
        if not bad_input:
            text = f"{type(error).__name__}: {text[:200]} (HMAR_TRACEBACK=1 shows where)"
        print(f"{name}: {text}", file=sys.stderr)
        return 2 if bad_input else 1


def main(argv=None):
    """The command; see `command`."""
    return command("sample.py", run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
