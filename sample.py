"""Sampling: class labels -> tokens, scale by scale -> images; editing; and `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> filter -> draw -> masked refinement
    -> f_hat (B, code_dim, h, w) -> images (B, 3, H, W)

`steps` is the method as a generator, so that a caller can watch, stop or choose; `generate` and
`edit` consume it. An image depends on its batch by rounding alone: its random numbers follow from
its seed, the scale and the pass. In fp32 its tokens are the same and its pixels within 1e-5; in
bf16 a batch of another size may tip a token, and what is drawn after it.

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024);
classifier-free guidance (Ho and Salimans 2021).
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import itertools
import json
import math
import os
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

LIMITS = dict(  # of the options of `steps` that are numbers
    guidance=(0, 1e4),
    mask_guidance=(0, 1e4),
    soften=(0, 1e4),
    temperature=(0, 1e4),
    top_k=(0, 2**31),
    top_p=(1e-9, 1),
)
TIES = 128  # of the top_k-th code, that there is room for before all codes are sorted


def generate(params, codec, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64); arguments as for `steps`."""
    last = {step.scale: step for step in steps(params, codec, labels, **options)}

    tokens = torch.cat([step.tokens for step in last.values()], 1)
    return decoded(codec, last[max(last)].f_hat), tokens


class Step(NamedTuple):
    """What `steps` yields after each pass; the next scale is drawn from what f_hat then holds."""

    scale: int
    number: int  # of the pass in its scale: 0 is the next-scale draw, later ones refine it
    tokens: torch.Tensor  # (B, n_k) int64, the scale's tokens so far
    hidden: torch.Tensor  # (B, n_k) bool, those that a later pass draws again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales up to this: decode_features shows it


@torch.no_grad()
def steps(params, codec, labels, *, is_causal=False, known=None, **options):
    """Draws the pyramid coarse to fine, yielding a Step after each pass (HMAR; MaskGIT).

    labels (B,) int64. is_causal: VAR, with a key/value cache; no tree tells it. known: what `edit`
    passes, tokens (B, L), given (B, L) bool, features. options: those of `settled`.
    """
    scales = hmar.scales(params)
    counts = tokenizer.lengths(scales)
    options = settled(params, codec, labels, **options)
    rows = 2 * len(labels) if options["guidance"] else len(labels)
    cache = hmar.new_cache(params, rows) if is_causal else None

    nothing = torch.zeros(len(labels), sum(counts), dtype=torch.int64, device=labels.device)
    known_tokens, given, features = known or (nothing, nothing.bool(), None)
    known_maps = tokenizer.f_hat_by_scale(codec, known_tokens, scales)
    known_tokens, given = known_tokens.split(counts, 1), given.split(counts, 1)
    stays = given[-1].unflatten(1, scales[-1]).unsqueeze(1)  # (B, 1, h, w), outside of an edit
    f_hat = torch.zeros_like(known_maps[0])  # (B, code_dim, h, w)

    for k, size in enumerate(scales):
        # tokenizer.next_scale_inputs, of what was drawn so far
        inputs = tokenizer.resize_to_scale(f_hat, size) if k else None  # (B, n_k, code_dim)
        tokens = known_tokens[k]
        hidden = ~given[k]  # (B, n_k), what is to be drawn
        keeps = options["schedule"][k]
        nudge = None
        if known is not None:
            keeps = kept_counts(keeps, hidden, k > 0 and "masked" in params)
            nudge = evidence(codec["codebook"], features - f_hat, stays, size)

        for number, keep in enumerate(keeps):
            if number == 0:  # from the coarser scales alone; then also from what was kept of this
                logits = guided(params, "next_scale", labels, k, options, inputs, cache=cache)
            else:
                zeroed = hidden if "own_input" in params["masked"] else None  # published: they leak
                own = tokenizer.masked_scale_input(codec, tokens, k, scales, zeroed)
                logits = guided(params, "masked", labels, k, options, inputs, own, hidden)

            if nudge is not None:
                logits = logits + nudge
            drawn, confidence = chosen(logits, k, number, options)
            tokens = torch.where(hidden, drawn, tokens)
            hidden = hidden & ~surest(confidence, hidden, keep)

            codes = F.embedding(tokens, codec["codebook"])
            grown = f_hat + tokenizer.contribution(codec["phi"], codes, k, scales)
            grown = torch.where(stays, known_maps[k], grown)
            yield Step(k, number, tokens, hidden, grown)

        f_hat = grown  # what the next scale is drawn from


def settled(params, codec, labels, **asked):
    """All options of `steps`, a dict: what was asked for, `defaults` where that is None.

    schedule: for each scale the tokens kept at each pass, as `masked_schedule` makes it. guidance
    and mask_guidance: of the last scale, rising to it from 0 at the first; 0 is off, at half the
    cost. soften, in nats a token: where guidance is halved (see `guided`), 0 for never.
    temperature divides the logits, below 0.001 arg max; then top_k codes stay, 0 = all; then top_p
    of the probability. Image i draws the numbers of seed + i, or seed[i]. ValueError on what does
    not fit.
    """
    options = defaults(params)
    unknown = ", ".join(asked.keys() - options.keys())
    require(not unknown, f"options: got {unknown}, expected some of {', '.join(options)}")
    options |= {name: value for name, value in asked.items() if value is not None}

    sizes = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    got = tuple(codec["codebook"].shape)
    require(got == sizes, f"codec: got (codes, code_dim) {got}, the transformer has {sizes}")
    require(torch.is_tensor(labels) and labels.ndim == 1, "labels: expected an int64 tensor (B,)")
    for name, (least, most) in LIMITS.items():
        kind = int if name == "top_k" else (int, float)
        what = "an integer" if kind is int else "a number"
        fits = isinstance(options[name], kind) and least <= options[name] <= most
        require(fits, f"{name}: got {options[name]!r}, expected {what}, {least:g} to {most:g}")
    check_schedule(options["schedule"], hmar.scales(params), "masked" in params)

    seed = options["seed"]
    seeds = [seed + i for i in range(len(labels))] if isinstance(seed, int) else seed
    fits = isinstance(seeds, (list, tuple)) and len(seeds) == len(labels)
    fits = fits and all(isinstance(number, int) and number >= 0 for number in seeds)
    require(fits, f"seed: got {seed!r}, expected one from 0 on, or {len(labels)} of them")
    return options | dict(seed=seeds)


def guided(params, branch, labels, k, options, *inputs, cache=None):
    """Logits (B, n_k, codes) of scale k from a branch of hmar and what it is fed, guided.

    (1 + t) conditional - t unconditional (Ho and Salimans 2021, equation 6); t rises from 0 at the
    first scale to the branch's guidance at the last. At 0 one half is enough, but for a cache,
    which needs both. With soften, t shrinks by 1 + D / soften, D being the divergence of the two in
    nats, on average over an image's tokens: what a class says is amplified where it says little,
    and not exaggerated where it says all.
    """
    head, soften = params[branch]["head"], options["soften"]
    strongest = options["guidance"] if branch == "next_scale" else options["mask_guidance"]
    last = len(hmar.scales(params)) - 1
    t = strongest * k / last if last else strongest
    predict = partial(hmar.branch_features, params, branch, k=k, cache=cache)
    if strongest == 0 or (t == 0 and cache is None):
        return hmar.logits(predict(labels, *inputs), **head)

    null = torch.full_like(labels, len(params["classes"]) - 1)
    doubled = [None if x is None else torch.cat([x, x]) for x in inputs]
    conditional, unconditional = predict(torch.cat([labels, null]), *doubled).chunk(2)
    if soften == 0:  # the head, which is affine, may follow
        return hmar.logits((1 + t) * conditional - t * unconditional, **head)

    conditional = hmar.logits(conditional, **head).log_softmax(-1)  # (B, n_k, codes)
    unconditional = hmar.logits(unconditional, **head).log_softmax(-1)
    divergence = (conditional.exp() * (conditional - unconditional)).sum(-1).mean(1)  # (B,)
    t = t / (1 + divergence.clamp(min=0)[:, None, None] / max(soften, 1e-30))
    return (1 + t) * conditional - t * unconditional


def chosen(logits, k, number, options):
    """(tokens, confidence), (B, n_k) each, of logits (B, n_k, codes) at a pass of scale k."""
    uniform = None
    if options["temperature"] >= 0.001:
        uniform = uniforms(options["seed"], k, number, logits.shape[1]).to(logits.device)
        logits = logits / options["temperature"]
    return draw(*filtered(logits, options["top_k"], options["top_p"]), uniform)


def filtered(logits, top_k=0, top_p=1.0):
    """(values, codes), (..., K) each, of the codes that may be drawn; -inf for those that may not.

    Of logits (..., V) those below the top_k-th go (ties stay), then those whose betters hold top_p
    of what is left. The surest come first; unfiltered, all codes stand in their own order.
    """
    everything = logits.shape[-1]
    is_cut = 0 < top_k < everything
    if not is_cut and top_p >= 1:
        return logits, torch.arange(everything, device=logits.device).expand(logits.shape)

    values, codes = ranked(logits, min(top_k + TIES, everything) if is_cut else everything)
    if is_cut:
        least = values[..., top_k - 1, None]
        if (values[..., -1:] >= least).any():  # more ties than there was room for
            values, codes = ranked(logits, everything)
        values = values.masked_fill(values < least, -math.inf)
    if top_p < 1:
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability  # what surer codes hold: of the best, 0
        values = values.masked_fill(before >= top_p, -math.inf)
    return values, codes


def ranked(logits, count):
    """(values, codes), (..., count) each: the largest of logits (..., V), a tie's lower code first.

    What is sorted is one integer a code, the bits of its logit in fp32 above its number counted
    backwards: faster than floats, and ties do not depend on the processor or on other logits.
    """
    numbers = torch.arange(logits.shape[-1] - 1, -1, -1, device=logits.device)
    codes = []
    for rows in logits.flatten(0, -2).split(max(1, 2**21 // len(numbers))):  # 16 MiB at a time
        bits = (rows.float() + 0.0).view(torch.int32)  # no -0.0
        bits ^= (bits >> 31) & 0x7FFFFFFF  # negative ones ascend too
        keys = bits.long().mul_(2**32).add_(numbers)
        codes.append(keys.topk(count).indices)
    codes = torch.cat(codes).view(*logits.shape[:-1], count)
    return logits.gather(-1, codes), codes


def draw(values, codes, uniform=None):
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


def uniforms(seeds, k, number, count):
    """Numbers in [0, 1), (B, count) fp64: a function of (seed, k, number), on the CPU."""
    rows = [np.random.default_rng((seed, k, number)).random(count) for seed in seeds]
    return torch.from_numpy(np.array(rows).reshape(-1, count))


def surest(confidence, hidden, keep):
    """The `keep`, a number or (B, 1), most confident of the hidden tokens (B, n), bool alike."""
    order = confidence.masked_fill(~hidden, -math.inf).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(-1)
    return hidden & (place < keep)


def masked_schedule(scales, passes):
    """For each scale the tokens kept at each pass, ((1,), (1, 3), ...): a draw, then `passes`.

    Few are kept at first, most last, after a cosine (MaskGIT, section 3.3); one at least at each.
    """
    schedule = []
    for k, count in enumerate(tokenizer.lengths(scales)):
        number = min(passes + 1, count) if k else 1
        done = np.arange(number + 1)
        kept = np.round(count * (1 - np.cos(np.pi / 2 * done / number)))  # after each pass
        kept = kept.clip(done, count - number + done).astype(int)
        schedule.append(tuple(np.diff(kept).tolist()))
    return tuple(schedule)


def published_schedule(scales):
    """The published schedule, (1) (1, 3) (1, 1, 2, 5), then one pass a scale: 14 at 256 pixels."""
    first, *counts = tokenizer.lengths(scales)
    passes = {4: (1, 3), 9: (1, 1, 2, 5)}
    return ((first,), *(passes.get(count, (count,)) for count in counts))


def defaults(params):
    """What measured best, as options of `steps`; for published trees as published.

    A tree of our own is told by its masked branch, which has an input of its own.
    """
    scales = hmar.scales(params)
    options = dict(guidance=1.5, mask_guidance=0.0, soften=0.0)
    options |= dict(temperature=1.0, top_k=0, top_p=1.0, seed=0)
    if "own_input" in params.get("masked", {}):
        options |= dict(guidance=5.0, mask_guidance=5.0, soften=0.1)
        return options | dict(schedule=masked_schedule(scales, 1))
    schedule = published_schedule(scales) if "masked" in params else masked_schedule(scales, 0)
    return options | dict(schedule=schedule)


def kept_counts(passes, hidden, has_masked_branch):
    """[(B, 1), ...]: how many of its hidden tokens (B, n) an image keeps at each pass: a share.

    Where some are given there is one masked pass at least, since no other sees them.
    """
    count, total = hidden.sum(1, keepdim=True), hidden.shape[1]
    partly = (count > 0) & (count < total)
    if len(passes) == 1 and has_masked_branch and partly.any():
        return [torch.where(partly, 0, count), torch.where(partly, count, 0)]

    sums = itertools.accumulate(passes, initial=0)
    kept = [(count * done + total - 1) // total for done in sums]
    return [after - before for before, after in itertools.pairwise(kept)]


@torch.no_grad()
def edit(params, codec, images, mask, labels, **options):
    """images (B, 3, H, W) in [-1, 1], of which labels (B,) int64 are drawn under the mask.

    mask (B, 1, H, W) bool, True = repaint. At each scale the tokens whose cells lie outside are
    the image's; the others are drawn, then refined by the masked branch, which sees the given ones
    (HMAR, editing). Pixels outside are the original ones; what decoding did to them at the edge is
    taken back inside too, fading over two latent cells. Keyword arguments are those of `steps`.
    """
    scales = hmar.scales(params)
    tokenizer.check_images(codec, images, scales)
    expected = (len(images), 1, *images.shape[2:])
    fits = torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == expected
    require(fits, f"mask: expected a bool tensor {expected}")
    fits = torch.is_tensor(labels) and labels.shape == images.shape[:1]
    require(fits, f"labels: got {labels}, expected a tensor ({len(images)},)")

    parts = images.split(at_once(images.shape[2:].numel()))
    features = torch.cat([tokenizer.encode_features(codec, part) for part in parts]).float()
    pyramid = tokenizer.quantise(codec["codebook"], codec["phi"], features, scales)
    tokens = torch.cat([own for _, own, _ in pyramid], 1)
    touched = [F.adaptive_max_pool2d(mask.float(), size).flatten(1) for size in scales]
    given = torch.cat(touched, 1) == 0  # (B, L)
    painted, _ = generate(params, codec, labels, known=(tokens, given, features), **options)

    outside = (~mask).to(painted.dtype)
    error = (images.to(painted.dtype) - painted) * outside
    painted = painted + continued(error, outside, 2 * tokenizer.downsampling(codec))
    return torch.where(mask, painted.clamp(-1, 1).to(images.dtype), images)


def evidence(codebook, residual, stays, size):
    """Logits (B, n, codes) that draw cells cut by a mask's edge towards their part that stays.

    residual (B, code_dim, h, w) is what is left to quantise, known where stays (B, 1, h, w). A
    cell's mean is taken for Gaussian around that of its known part, with the variance seen there.
    """
    weight = stays.to(residual.dtype)
    share = tokenizer.resize_to_scale(weight, size)  # (B, n, 1), known of each cell
    known = share.clamp(min=1e-6)
    mean = tokenizer.resize_to_scale(residual * weight, size) / known  # (B, n, code_dim)
    square = tokenizer.resize_to_scale(residual.square() * weight, size) / known
    variance = (square - mean.square()).mean(-1, keepdim=True).clamp(min=1e-4)

    places = stays.shape[2:].numel() / (size[0] * size[1])  # of the latent in a cell
    precision = places * share / (1 - share).clamp(min=1e-2) / variance
    distance = torch.cdist(mean, codebook.to(mean.dtype)).square()
    return torch.where(share > 0, -0.5 * precision * distance, 0.0)


def continued(error, known, reach):
    """error (B, C, H, W) carried on from known pixels (B, 1, H, W), fading, lest a seam show."""
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
    few = at_once(f_hat.shape[2:].numel() * tokenizer.downsampling(codec) ** 2)
    return torch.cat([tokenizer.decode_features(codec, part) for part in f_hat.split(few)])


def at_once(pixels):
    """How many images of so many pixels pass the tokenizer together: eight of 256 x 256."""
    return max(1, 2**19 // max(1, pixels))


# ---- what fits


def require(fine, message):
    """ValueError with the message unless all is fine."""
    if not fine:
        raise ValueError(message)


def check_schedule(schedule, scales, has_masked_branch):
    """ValueError unless the numbers of each scale sum to its tokens."""
    counts = tokenizer.lengths(scales)
    try:
        fits = [sum(kept) for kept in schedule] == counts and min(map(min, schedule)) >= 0
        refined = [k for k, kept in enumerate(schedule) if len(kept) > 1]
        fits = fits and 0 not in refined and (has_masked_branch or not refined)
    except (TypeError, ValueError, LookupError):  # no numbers, or none
        fits = False
    expected = f"for each scale numbers that sum to {counts}, one where no masked branch sees them"
    require(fits, f"schedule: got {schedule!r}, expected {expected}")


# ---- pictures and weights


def sheet(rows, names):
    """A PIL image of rows of images (n, 3, H, W) in [-1, 1], each row's name at its left."""
    names = [printable(name)[:40] for name in names]
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
            return as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image of these formats"
        raise ValueError(f"{path}: {reason}") from error


def as_rgb(image):
    """An image of any mode as viewers show it."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in key)

    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image)
        grey = np.where(grey == key, 65535, grey).clip(0, 65535) / 257 + 0.5
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_tokenizer(path):
    """A codec from a file, ours or published. ValueError that names the file."""
    return load_model(path, "codebook", tokenizer.check, tokenizer.from_published)


def load_transformer(path, scales=None, is_causal=None):
    """A transformer's tree from a file, ours or published: of VAR if is_causal, None for either."""

    def from_published(state):
        found = hmar.published_is_causal(state)
        kind = "VAR's: add --causal" if found else "HMAR's: leave out --causal"
        require(None in (found, is_causal) or found == is_causal, f"holds weights of {kind}")
        return hmar.from_published(state, scales)

    return load_model(path, "trunk", hmar.check, from_published)


def load_model(path, key, check, from_published):
    """A tree in fp32, on the CPU: ours, told by its key, or published. ValueError for others."""
    require(os.path.isfile(path), f"{path}: missing or no regular file")  # a pipe would wait
    with open(path, "rb") as file:
        try:
            tree = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(tree, dict) and key in tree:
                check(tree)
            else:
                tree = from_published(tree)
            return pytree.tree_map(lambda leaf: leaf.float().cpu(), tree)
        except Exception as error:
            text = f"no weights that can be read safely, {type(error).__name__}"
            text = error if isinstance(error, ValueError) else text
            raise ValueError(f"{path}: {text}") from error


def digest(tree):
    """A fingerprint of all tensors in a tree."""
    total = hashlib.sha256()
    for tensor in pytree.tree_leaves(tree):
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


# ---- the command


def parser():
    """The flags of `python sample.py`."""
    top = Parser("python sample.py RUN [flags]: draw images, or repaint a part of one.")
    add = top.add_argument
    add("run", nargs="?", help="run folder of train.py")
    add("--weights", help="transformer, ours or published (RUN/hmar.pt)")
    add("--tokenizer", help="ours or published (RUN/tokenizer.pt)")
    add("--causal", action="store_true", help="the weights are VAR's")
    add("--scales", nargs="+", type=scale_pair, help="of published weights, 4 or 2x3 each")
    add("--labels", nargs="+", default=["all"], help="class names, else numbers (all)")
    add("--count", type=number(int, 1), default=8, help="images a label (8)")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of image 0; image i has i more (0)")
    add("--out", default="samples.png", help=".png sheet, .gif, .npz or a folder (samples.png)")
    add("--guidance", type=float, help="at the last scale, 0 at the first (5, published 1.5)")
    add("--mask-guidance", type=float, help="of masked passes (5, published 0)")
    add("--soften", type=float, help="nats at which guidance halves (0.1, published 0: never)")
    add("--temperature", type=float, help="0: arg max (1)")
    add("--top-k", type=int, help="codes that may be drawn, 0: all (0)")
    add("--top-p", type=float, help="probability that may be drawn (1)")
    add("--mask-steps", type=number(int, 0, 10_000), help="masked passes a scale (1)")
    add("--edit", help="image to repaint, cropped to the model's shape")
    either = top.add_mutually_exclusive_group().add_argument
    either("--mask", help="image, white: repaint; any size")
    either("--pad", type=number(float, 0.01, 0.49), help="outpaint, a border of this share")
    add("--batch", type=number(int, 1), default=50, help="images at a time (50)")
    add("--device", help="cuda or cpu (the first there is)")
    add("--dtype", choices=("bf16", "fp32"), help="(bf16 where the processor has it)")
    return top


class Parser(argparse.ArgumentParser):
    """The stock parser, whose errors are ValueErrors and whose help has a line a flag."""

    def __init__(self, description):
        shape = partial(argparse.HelpFormatter, max_help_position=42, width=100)
        options = dict(formatter_class=shape, usage=argparse.SUPPRESS, allow_abbrev=False)
        super().__init__(description=description, **options)

    def error(self, message):
        raise ValueError(message)


def number(kind, least, most=10**9):
    """Of a parser: the type of a number of a kind within limits."""

    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text}, expected {least:g} to {most:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # in the message for what is no number
    return parse


def scale_pair(text):
    """Of the parser: "4" or "2x3" -> (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def run(args):
    """What the command does once its flags are read."""
    suffix = check_flags(args)
    device = find_device(args.device)
    dtype = find_dtype(args.dtype, device)
    params, codec, names, is_causal = load_models(args)
    classes = chosen_classes(args.labels, names)
    if args.labels == ["all"] and suffix in (".png", ".gif"):
        classes = classes[:10]
    labels = torch.tensor(classes).repeat_interleave(args.count)
    given = photo_and_mask(args, params, codec) if args.edit else ()

    # ValueError before anything is written; a folder remembers what was not asked for, too
    asked = {name: getattr(args, name) for name in (*LIMITS, "seed")}
    if args.mask_steps is not None:
        asked["schedule"] = masked_schedule(hmar.scales(params), args.mask_steps)
    options = settled(params, codec, labels, **asked) | dict(is_causal=is_causal)
    settings = dict(options, labels=labels.tolist(), dtype=str(dtype), scales=hmar.scales(params))
    settings["models"] = digest([params, codec, *given])
    models = hmar.cast(params, dtype), tokenizer.cast(codec, dtype)
    models = pytree.tree_map(lambda leaf: leaf.to(device), models)

    def draw(numbers):
        """Yields (numbers, images (n, 3, H, W)), a batch at a time."""
        for first in range(0, len(numbers), args.batch):
            some = numbers[first : first + args.batch]
            own = labels[some].to(device)
            more = dict(options, seed=[options["seed"][i] for i in some])
            if args.edit:
                same = [x.to(device).expand(len(some), -1, -1, -1) for x in given]
                yield some, edit(*models, *same, own, **more).cpu()
            else:
                yield some, generate(*models, own, **more)[0].cpu()

    rows = [names[label] for label in classes]
    if suffix == ".png":
        images = torch.cat([images for _, images in draw(range(len(labels)))])
        write_image(args.out, sheet(images.split(args.count), rows))
    elif suffix == ".gif":
        walk = steps(*models, labels.to(device), **options)
        maps = (decoded(models[1], step.f_hat) for step in walk)
        pages = [sheet(images.split(args.count), rows) for images in maps]
        times = [400] * (len(pages) - 1) + [2000]  # milliseconds
        more = dict(save_all=True, append_images=pages[1:], duration=times, loop=0)
        write_image(args.out, pages[0], "GIF", **more)
    else:
        fill_folder(args.out, settings, draw)
    print(f"wrote {printable(args.out)}")


def fill_folder(out, settings, draw):
    """Draws this process's share of what is missing of number-label.png files; packs an .npz."""
    name, suffix = os.path.splitext(out)
    folder = name if suffix.lower() == ".npz" else out
    text = json.dumps(settings)
    os.makedirs(folder, exist_ok=True)
    others = [name for name in os.listdir(folder) if not name.endswith(".tmp")]
    message = f"--out: {folder} holds something else, or images of other settings"
    fits = not others or "settings.json" in others
    require(fits, f"{message}; expected a new folder")
    if rank() == 0:  # the record is the lock, held until all is drawn
        record = locked(os.path.join(folder, "settings.json"))
        record.seek(0)
        before = record.read()
        require(before in ("", text), f"{message}; expected a new folder")
        record.write(text[len(before) :])
        record.flush()

    labels = settings["labels"]
    paths = [os.path.join(folder, f"{i:06d}-{label}.png") for i, label in enumerate(labels)]
    own = range(len(paths))[rank() :: world()]
    for numbers, images in draw([i for i in own if not os.path.exists(paths[i])]):
        for i, pixels in zip(numbers, to_bytes(images)):
            write_image(paths[i], Image.fromarray(pixels))
        print(f"drew {numbers[-1] + 1} of {len(paths)}", flush=True)

    if out != folder and all(map(os.path.exists, paths)):  # of all processes
        pixels = np.stack([np.asarray(read_image(path)) for path in paths])
        write_atomically(out, lambda file: np.savez(file, arr_0=pixels, labels=labels))


def check_flags(args):
    """The suffix of --out. ValueError for flags that would be without effect."""
    suffix = os.path.splitext(args.out)[1].lower()
    fits = suffix not in (".jpg", ".jpeg", ".webp", ".bmp")
    require(fits, f"--out: got {args.out}, expected a .png, .gif or .npz, or the name of a folder")
    fits = not suffix or os.path.isdir(os.path.dirname(args.out) or ".")
    require(fits, f"--out: got {args.out}, expected a folder that is there")
    fits = bool(args.edit) == bool(args.mask or args.pad) and not (args.edit and suffix == ".gif")
    require(fits, "--edit: expected with one of --mask and --pad, and no .gif")
    read = [os.path.realpath(path) for path in (args.edit, args.mask) if path]
    fits = os.path.realpath(args.out) not in read
    require(fits, f"--out: got {args.out}, which is also to be read")
    return suffix


def find_device(name):
    """The torch.device of --device, by default this process's GPU or the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # the quantiser is in fp32
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.empty(0, device=name).device
        require(device.type in ("cuda", "cpu"), "no float64")
        return device
    except Exception as error:
        raise ValueError(f"--device: got {name!r}, expected cpu or a cuda that is here") from error


def find_dtype(name, device):
    """The torch dtype of --dtype, by default bf16 where the processor multiplies it, else fp32."""
    if name is None:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        name = "bf16" if has_bf16 else "fp32"
    return dict(bf16=torch.bfloat16, fp32=torch.float32)[name]


def load_models(args):
    """(params, codec, class names, whether it is VAR's), by args.json beside the weights."""
    require(args.run or (args.weights and args.tokenizer), "expected RUN or --weights, --tokenizer")
    weights = args.weights or os.path.join(args.run, "hmar.pt")
    require(
        os.path.exists(weights), f"{weights} is missing; RUN is a folder that train.py finished"
    )
    trained = read_json(os.path.join(os.path.dirname(weights), "args.json"))
    is_causal = args.causal or trained.get("causal") is True
    fits = not args.causal or trained.get("causal") is not False
    require(fits, f"--causal: {weights} was trained without it")
    params = load_transformer(weights, args.scales, is_causal)
    codec = load_tokenizer(args.tokenizer or os.path.join(args.run, "tokenizer.pt"))

    made, names = trained.get("made"), trained.get("class_names")
    if isinstance(made, dict) and made:  # digests of what the run made
        fits = made.get("tokenizer") == digest(codec)
        require(fits, f"{weights}: trained for another tokenizer than this")
        require(digest(params) in made.values(), f"{weights}: not what the run beside it made")
    classes = len(params["classes"]) - 1
    if not isinstance(names, list) or len(names) != classes:
        names = range(classes)
    return params, codec, list(map(str, names)), is_causal


def chosen_classes(texts, names):
    """The numbers of the classes that --labels names; a name goes before a number."""
    if texts == ["all"]:
        return list(range(len(names)))
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for text in texts:
        expected = f"0 to {len(names) - 1} or such as {', '.join(names[:5])}"
        require(text in numbers, f"--labels: got {text!r}, expected {expected}")
    return [numbers[text] for text in texts]


def photo_and_mask(args, params, codec):
    """Image (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) bool of --edit and --mask or --pad."""
    size = [tokenizer.downsampling(codec) * side for side in hmar.scales(params)[-1][::-1]]
    photo = ImageOps.fit(read_image(args.edit), size, Image.Resampling.LANCZOS)
    if args.mask is not None:
        mask = ImageOps.fit(read_image(args.mask).convert("L"), size, Image.Resampling.NEAREST)
    else:
        border = tuple(max(1, int(side * args.pad)) for side in size)
        inner = [side - 2 * edge for side, edge in zip(size, border)]
        photo = ImageOps.expand(photo.resize(inner), border, "grey")
        mask = ImageOps.expand(Image.new("L", inner, 0), border, 255)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.from_numpy(np.array(mask))[None, None] > 127
    require(mask.any(), "--mask: expected white where the image is to be repainted")
    return pixels, mask


def read_json(path):
    """The object in a JSON file, {} where there is no file. ValueError for anything else."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        require(isinstance(value, dict), f"got a {type(value).__name__}")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object; {error}") from error


def write_atomically(path, write):
    """write(file) to a temporary file, then renamed: the old one or the whole new. OSError else.

    It has the process's rank in its name, so that the next run writes over what a kill left.
    """
    temporary = f"{path}.{rank()}.tmp"
    try:
        if os.path.lexists(temporary):  # it may be a link, whose target is somebody else's
            os.remove(temporary)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's, while it handles the disk's
        cause = error
        while not getattr(cause, "strerror", None) and cause.__context__:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or error
        raise OSError(f"{path}: cannot be written: {reason}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def locked(path):
    """The file, which may be new, open to read and add to, locked while this process lives."""
    import fcntl  # Windows has none

    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{os.path.dirname(path)}: another process works there") from error
    return file


def rank():
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def world():
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def write_image(path, image, kind="PNG", **options):
    """Writes an image file, whole or not at all."""
    write_atomically(path, lambda file: image.save(file, kind, **options))


def printable(text):
    """The text on one line, without what a terminal would obey."""
    return "".join(mark if mark.isprintable() else "?" for mark in str(text))


def command(name, work, parser, argv):
    """Exit status of work(flags): 0; 2, one line, for bad input; 1 for a fault; 130 if stopped."""
    try:
        work(parser.parse_args(argv))
        return 0
    except KeyboardInterrupt as interrupt:
        text, status = str(interrupt) or "stopped; the same command goes on", 130
    except Exception as error:  # noqa: BLE001
        if os.environ.get("HMAR_TRACEBACK"):
            traceback.print_exc()
        text, status = str(error).strip() or type(error).__name__, 2
        bad_input = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
        if "can't allocate memory" in text:  # torch's on a CPU
            text = f"not enough memory: {text.partition('memory: ')[2]}"
        elif not isinstance(error, bad_input):
            text, status = f"{type(error).__name__}: {text[:200]} (HMAR_TRACEBACK=1 shows where)", 1
    print(f"{name}: {printable(text)}", file=sys.stderr)
    return status


def main(argv=None):
    """The command; see `command`."""
    return command("sample.py", run, parser(), argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
