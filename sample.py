"""Sampling: class labels -> tokens, scale by scale -> images; editing; and the command `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> filter -> draw -> masked refinement -> f_hat -> images (B, 3, H, W)

`steps` is the whole method as a Python generator, one item a pass, so that a caller can watch, stop or choose; `generate` and `edit`
consume it. `guided` is where guidance is applied, `filtered` and `draw` make tokens of logits, `schedule` says how many of them each
pass keeps. Every image has a stream of random numbers of its own, so it comes out the same whatever batch it is drawn in: in fp32, for in
bf16 a product's rounding depends on its size, and a draw between two tokens may then fall to the other.

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024); classifier-free guidance (Ho and Salimans 2021);
the Halton scheduler (Besnier et al. 2025).
"""
import argparse
import contextlib
import ctypes
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import timeit
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.utils import _pytree as pytree

import hmar
import tokenizer

PUBLISHED_PASSES = {4: (1, 3), 9: (1, 1, 2, 5)}  # tokens of a scale -> tokens kept at each pass; every other scale takes one pass
ORDERS = ("confidence", "halton", "random")


class Step(NamedTuple):
    """What `steps` yields after each pass."""
    scale: int
    number: int  # of the pass within its scale: 0 is the next-scale draw, later ones refine
    tokens: torch.Tensor  # (B, n_k) int64, the scale's tokens so far
    masked: torch.Tensor  # (B, n_k) bool, those that a later pass draws again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales up to this one: tokenizer.decode_features makes an image of it; the next scale is
    # drawn from what it holds after the last pass, so a caller may write the best candidate's map over the others'


def generate(params, tokenizer_params, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64) of labels (B,) int64. Keyword arguments are those of `steps`."""
    last = {step.scale: step for step in steps(params, tokenizer_params, labels, **options)}  # of each scale, its last pass
    with torch.no_grad():
        images = decoded(tokenizer_params, last[max(last)].f_hat)
    return images, torch.cat([step.tokens for step in last.values()], 1)


@torch.no_grad()
def steps(params, tokenizer_params, labels, *, schedule=None, guidance=1.5, mask_guidance=0.0, temperature=1.0, top_k=0, top_p=1.0, seed=0,
          is_causal=False, order="confidence", smooth=False, known=None, network=None):
    """Draws the pyramid coarse to fine, yielding a Step after each pass (HMAR; within a scale MaskGIT).

    labels (B,) int64. schedule: for each scale the tokens kept at each pass, as `schedule` makes it; None is the published one where the
    tree has a masked branch, else one pass a scale. guidance, mask_guidance: a number g >= 0, rising over scales as g k / (S - 1), or one
    value a scale; scales with 0 skip the unconditional half. temperature >= 0, 0 = arg max; top_k >= 0 codes stay, 0 = all; top_p in (0, 1]
    of the probability stays. Image i draws from the stream of seed + i, or of seed[i]. is_causal: VAR, with a key/value cache. order:
    "confidence" (published), "halton" or "random": which drawn tokens a pass keeps. smooth: feed on soft codes, for looks (VAR). known:
    (tokens (B, L), given (B, L) bool, features (B, code_dim, h, w)) of an image, for `edit`. network: what to call in place of
    (hmar.next_scale_features, hmar.masked_features), such as these compiled.
    """
    _check_options(params, tokenizer_params, labels, temperature, top_k, top_p, order)
    scales, codebook, phi = hmar.scales(params), tokenizer_params["codebook"], tokenizer_params["phi"]
    schedule = check_schedule(schedule, scales, "masked" in params)
    guidance, mask_guidance = _per_scale("guidance", guidance, scales), _per_scale("mask_guidance", mask_guidance, scales)
    next_scale, refine = network or (hmar.next_scale_features, hmar.masked_features)
    both = is_causal and any(guidance)  # a cache takes in both halves from the first scale on
    cache = hmar.new_cache(params, len(labels) * (1 + both)) if is_causal else None
    streams, lengths = _streams(seed, len(labels)), tokenizer.lengths(scales)
    nothing = torch.zeros(len(labels), sum(lengths), dtype=torch.int64, device=labels.device)
    image_tokens, given, features = known or (nothing, nothing.bool(), None)  # plain generation: no token is given
    image_tokens, given = image_tokens.split(lengths, 1), given.split(lengths, 1)
    stays = given[-1].unflatten(1, scales[-1]).unsqueeze(1)  # (B, 1, h, w) bool, where the image's own map goes on
    f_hat = image_map = torch.zeros(len(labels), codebook.shape[1], *scales[-1], device=labels.device)
    for k, (h, w) in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, (h, w)) if k else None
        tokens, masked, bias = image_tokens[k], ~given[k], 0.0
        codes = F.embedding(tokens, codebook)
        if features is not None:
            bias = evidence(codebook, features - f_hat, stays, (h, w))
            image_map = image_map + tokenizer.contribution(phi, codes, k, scales)
        for number, keep in enumerate(keep_counts(schedule[k], masked, k > 0 and "masked" in params)):
            if number == 0:
                predict, head = functools.partial(next_scale, params, only=k, cache=cache), params["next_scale"]["head"]
                x = guided(predict, params, labels, guidance[k], inputs, always=both)
            else:
                predict, head = functools.partial(refine, params, only=k), params["masked"]["head"]
                hidden = masked if "own_input" in params["masked"] else None  # published trees saw the draft leak through
                own = tokenizer.masked_scale_input(tokenizer_params, tokens, k, scales, hidden)
                x = guided(predict, params, labels, mask_guidance[k], inputs, own, masked)
            scores = filtered(hmar.logits(x, **head) + bias, top_k, top_p)  # the head is affine, so it may follow: once, not twice
            uniform = functools.partial(uniforms, streams, masked.any(1))
            drawn, confidence = draw(scores, temperature, uniform((h * w,)))
            fresh = F.embedding(drawn, codebook)
            if smooth:
                fresh = soft_codes(scores, codebook, k / max(1, len(scales) - 1), uniform(scores.shape[1:]))
            tokens, codes = torch.where(masked, drawn, tokens), torch.where(masked[..., None], fresh, codes)
            if order == "random":
                confidence = uniform((h * w,))
            elif order == "halton":
                confidence = -halton_order(h, w).argsort().to(confidence).expand_as(confidence)
            place = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            masked = masked & (place >= keep[:, None])  # the `keep` most confident are kept, ties by position; the others drawn again
            grown = torch.where(stays, image_map, f_hat + tokenizer.contribution(phi, codes, k, scales))
            yield Step(k, number, tokens, masked, grown)
        f_hat = grown  # which the next scale is drawn from


def guided(predict, params, labels, t, *features, always=False):
    """Guided logits, (1 + t) conditional - t unconditional, from one doubled batch; with t = 0 the unconditional half is not computed.

    predict(labels, *features) -> logits. always: run both halves whatever t is, so that a cache gets both.
    """
    if t == 0 and not always:
        return predict(labels, *features)
    null = torch.full_like(labels, len(params["classes"]) - 1)
    conditional, unconditional = predict(torch.cat([labels, null]), *(x if x is None else torch.cat([x, x]) for x in features)).chunk(2)
    return (1 + t) * conditional - t * unconditional


def filtered(logits, top_k=0, top_p=1.0):
    """logits (..., V) with -inf where a code is ruled out: below the top_k-th (ties stay), then the tail that holds at most 1 - top_p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ascending, codes = logits.sort(-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False  # the best always stays
        logits = logits.masked_fill(tail.scatter(-1, codes, tail), -math.inf)
    return logits


def draw(logits, temperature, uniform):
    """(tokens (...) int64, confidence (...) fp64) of filtered logits (..., V): their cumulative sum is inverted at uniform (...) in [0, 1).

    temperature divides the logits, 0 = arg max. Confidence, by which a pass chooses what it keeps, is the probability at temperature 1.
    """
    probability = logits.double().softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        sums = (probability if temperature == 1 else (logits.double() / temperature).softmax(-1)).cumsum(-1)
        total = sums[..., -1:]  # a draw below the total never falls on a code that was ruled out
        at = torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(sums, at, right=True)[..., 0]
    return tokens, probability.gather(-1, tokens[..., None])[..., 0]


def uniforms(streams, active, shape):
    """Numbers in [0, 1), (B, *shape) fp64, from the stream of each image that is active (B,) bool, which takes part in a pass.

    The others' streams stand still, so that an image does not depend on its neighbours; drawn on the CPU, the same for every device.
    """
    numbers = torch.zeros(len(streams), *shape, dtype=torch.float64)
    for i in active.nonzero()[:, 0].tolist():
        numbers[i] = torch.rand(shape, generator=streams[i], dtype=torch.float64)
    return numbers.to(active.device)


def soft_codes(logits, codebook, progress, uniform):
    """Gumbel-softmax mixtures of codes (B, n, code_dim), sharper as progress goes 0 to 1 (VAR's smooth sampling). uniform (B, n, V)."""
    noise = -torch.log(-torch.log(uniform.clamp(1e-300)))
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) + noise) / temperature).softmax(-1).to(codebook.dtype) @ codebook


def schedule(scales, steps, curve="cosine"):
    """For each scale the tokens kept at each pass, ((1,), (1, 3), ...): a draw, then `steps` of refinement (a number, or one a scale).

    curve: "cosine" keeps few first, most last (MaskGIT), "linear" alike. Never more passes than a scale has tokens, one at the first scale.
    """
    steps = _per_scale("steps", [steps] * len(scales) if isinstance(steps, int) else steps, scales, int)
    require(curve in ("cosine", "linear"), f'curve: got {curve!r}, expected "cosine" or "linear"')
    passes = []
    for k, (count, step) in enumerate(zip(tokenizer.lengths(scales), steps)):
        kept, number = [0], 1 if k == 0 else min(step + 1, count)
        for i in range(1, number + 1):  # each pass keeps at least one, and leaves one for each that follows
            share = i / number if curve == "linear" else 1 - math.cos(math.pi / 2 * i / number)
            kept.append(min(max(round(share * count), kept[-1] + 1), count - number + i))
        passes.append(tuple(after - before for before, after in itertools.pairwise(kept)))
    return tuple(passes)


def published_schedule(scales):
    """The published schedule, (1) (1, 3) (1, 1, 2, 5), then one pass a scale, 14 at 256 pixels; it goes by size, for any scales."""
    return tuple(PUBLISHED_PASSES.get(count, (count,)) if k else (count,) for k, count in enumerate(tokenizer.lengths(scales)))


def check_schedule(schedule, scales, has_masked_branch):
    """The schedule as tuples, with None replaced; ValueError unless it has an entry a scale whose numbers sum to the scale's tokens."""
    counts = tokenizer.lengths(scales)
    if schedule is None:
        return published_schedule(scales) if has_masked_branch else tuple((count,) for count in counts)
    fits = isinstance(schedule, (list, tuple)) and len(schedule) == len(counts)
    fits = fits and all(isinstance(passes, (int, list, tuple)) for passes in schedule)
    require(fits, f"schedule: got {schedule!r}, expected the tokens kept at each pass, a tuple for each of the {len(counts)} scales")
    schedule = tuple((passes,) if isinstance(passes, int) else tuple(passes) for passes in schedule)
    for k, (passes, count) in enumerate(zip(schedule, counts)):
        fits = all(isinstance(kept, int) and kept >= 0 for kept in passes) and sum(passes) == count and (k > 0 or len(passes) == 1)
        require(fits, f"schedule: entry {k} is {passes}, expected {'numbers that sum to ' if k else 'one number, '}{count}")
        require(has_masked_branch or len(passes) == 1, "schedule: asks for masked refinement, but these weights have no masked branch")
    return schedule


def keep_counts(passes, masked, has_masked_branch):
    """How many tokens each image keeps at each pass, [(B,), ...], of those masked (B, n) at first: the schedule's numbers in proportion.

    An image of which some tokens are given takes at least one pass of refinement, since only the masked branch sees them.
    """
    count, total = masked.sum(1), masked.shape[1]
    partly = (count > 0) & (count < total)
    if len(passes) == 1 and has_masked_branch and partly.any():
        return [torch.where(partly, 0, count), torch.where(partly, count, 0)]
    kept = [(count * done + total - 1) // total for done in itertools.accumulate(passes, initial=0)]
    return [after - before for before, after in itertools.pairwise(kept)]


def evidence(codebook, residual, stays, size):
    """Logits (B, n, V) that draw the cells which the edge of a mask cuts through towards the part of them that stays.

    residual (B, code_dim, h, w) is what is left to quantise, stays (B, 1, h, w) bool where it is known, size the scale's. A cell's own
    residual is taken for Gaussian around the mean of its known part, with the variance seen there; a cell with no known part gets 0.
    """
    weight = stays.to(residual.dtype)
    share = tokenizer.resize_to_scale(weight, size)  # (B, n, 1), known of each cell
    mean, square = (tokenizer.resize_to_scale(x * weight, size) / share.clamp(min=1e-6) for x in (residual, residual.square()))
    variance = (square - mean.square()).mean(-1, keepdim=True).clamp(min=1e-4)
    precision = stays[0].numel() / (size[0] * size[1]) * share / (1 - share).clamp(min=1e-2) / variance
    return torch.where(share > 0, -0.5 * precision * torch.cdist(mean, codebook.to(mean.dtype)).square(), 0.0)


@functools.cache
def halton_order(h, w):
    """The cells (h w,) int64 of an h x w grid as a Halton sequence of bases 2 and 3 first visits them (Besnier et al. 2025)."""
    def place(i, base, side):  # in integers, as thirds would be rounded across a cell's edge
        value, scale = 0, 1
        while i:
            i, digit = divmod(i, base)
            value, scale = value * base + digit, scale * base
        return value * side // scale
    cells = {}  # a dict keeps the order of the first visits
    for i in itertools.count():
        cells[place(i, 2, h) * w + place(i, 3, w)] = None
        if len(cells) == h * w:
            return torch.tensor(list(cells))


@torch.no_grad()
def edit(params, tokenizer_params, images, mask, labels, *, feather=0, **options):
    """images (B, 3, H, W) in [-1, 1], of which labels (B,) int64 are drawn under mask (B, 1, H, W) bool, True = repaint (HMAR, editing).

    At each scale the tokens whose cells lie outside the mask are those of the image; the others are drawn by the next-scale branch, then by
    the masked branch, which sees the given ones. Pixels outside the mask are the original ones; what decoding did to them at the mask's
    edge is taken back inside too, fading over two latent cells, and there the edge blends over `feather` pixels. Keyword arguments are
    those of `steps`. ValueError on a mask of another shape or type, or as encode and steps.
    """
    scales, expected = hmar.scales(params), (len(images), 1, *images.shape[2:])
    given = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
    require(given == f"torch.bool {expected}", f"mask: got {given}, expected bool {expected}")
    require(len(labels) == len(images), f"labels: got {len(labels)}, expected one for each of the {len(images)} images")
    require(isinstance(feather, int) and feather >= 0, f"feather: got {feather!r}, expected pixels, 0 or more")
    tokenizer.check_images(tokenizer_params, images, scales)
    parts = images.split(at_once(math.prod(images.shape[2:])))
    features = torch.cat([tokenizer.features(tokenizer_params, part) for part in parts])
    tokens = tokenizer.quantised(tokenizer_params, features, scales)
    repaint = torch.cat([F.adaptive_max_pool2d(mask.float(), size).flatten(1) for size in scales], 1) > 0  # (B, L)
    painted, _ = generate(params, tokenizer_params, labels, known=(tokens, ~repaint, features), **options)
    outside, original = (~mask).to(painted.dtype), images.to(painted.dtype)
    repair = continued((original - painted) * outside, outside, 2 * tokenizer.downsampling(tokenizer_params))
    painted = (painted + repair).clamp(-1, 1)
    grown = [F.max_pool2d(outside, 2 * pixels + 1, 1, pixels) for pixels in range(feather + 1)]
    share = 1 - sum(grown) / len(grown)  # 0 outside the mask, 1 from `feather` pixels inside it
    return torch.where(mask, torch.lerp(original, painted, share).to(images.dtype), images)


def continued(error, known, reach):
    """error (B, C, H, W) of the known pixels, 0 elsewhere, carried ring by ring into the others, fading to 0 over `reach` pixels.

    known (B, 1, H, W) is 1 or 0. Returns (B, C, H, W), 0 where known. So no seam shows where a decoder mixes both sides of an edge.
    """
    carried = torch.zeros_like(error)
    for ring in range(1, reach + 1):
        near, share = (F.avg_pool2d(x, 3, stride=1, padding=1) for x in (error, known))
        fresh = (known == 0) & (share > 0)
        error = torch.where(fresh, near / share.clamp(min=0.1), error)
        carried = torch.where(fresh, error * (1 - ring / (reach + 1)), carried)
        known = known + fresh
    return carried


def decoded(tokenizer_params, f_hat):
    """tokenizer.decode_features of a few images at a time, since the decoder's maps at full size outweigh everything else."""
    few = at_once(math.prod(f_hat.shape[2:]) * tokenizer.downsampling(tokenizer_params) ** 2)
    return torch.cat([tokenizer.decode_features(tokenizer_params, part) for part in f_hat.split(few)])


def at_once(pixels):
    """How many images of so many pixels pass through the tokenizer together: eight of 256 x 256, which take 13 GB in training."""
    return max(1, 2**19 // max(1, pixels))


def _streams(seed, count):
    seeds = range(seed, seed + count) if isinstance(seed, int) else seed
    fits = isinstance(seeds, (list, tuple, range)) and len(seeds) == count
    fits = fits and all(isinstance(number, int) and -2**63 <= number < 2**63 for number in seeds)
    require(fits, f"seed: got {seed!r}, expected an integer of 64 bits, or one for each of the {count} images")
    return [torch.Generator().manual_seed(number) for number in seeds]


def _per_scale(name, value, scales, kinds=(int, float)):
    """One number a scale: a number rises over scales as value k / (S - 1)."""
    values = [value * k / max(1, len(scales) - 1) for k in range(len(scales))] if isinstance(value, kinds) else value
    fits = isinstance(values, (list, tuple)) and len(values) == len(scales)
    fits = fits and all(isinstance(number, kinds) and 0 <= number < math.inf for number in values)
    require(fits, f"{name}: got {value}, expected a number, 0 or more, or one for each of the {len(scales)} scales")
    return values


def _check_options(params, tokenizer_params, labels, temperature, top_k, top_p, order):
    codes, code_dim = tokenizer_params["codebook"].shape
    ours = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    require((codes, code_dim) == ours, f"tokenizer_params: got {codes} codes of {code_dim} dimensions, the transformer expects "
                                       f"{ours[0]} of {ours[1]}")
    given = f"{labels.dtype} {tuple(labels.shape)}" if torch.is_tensor(labels) else labels
    require(torch.is_tensor(labels) and labels.ndim == 1, f"labels: got {given}, expected int64 (B,)")
    require(isinstance(temperature, (int, float)) and 0 <= temperature < math.inf, f"temperature: got {temperature}, expected 0 or more")
    require(isinstance(top_k, int) and top_k >= 0, f"top_k: got {top_k}, expected an integer, 0 or more")
    require(isinstance(top_p, (int, float)) and 0 < top_p <= 1, f"top_p: got {top_p}, expected a share in (0, 1]")
    require(order in ORDERS, f"order: got {order!r}, expected one of {', '.join(ORDERS)}")


def require(fine, message):
    """ValueError with the message unless all is fine."""
    if not fine:
        raise ValueError(message)


def sheet(rows, names):
    """A PIL image of rows of images (n, 3, H, W) in [-1, 1], each row's name at its left."""
    font = ImageFont.load_default(12)
    zoom, left = max(1, 64 // rows[0].shape[-1]), 12 + max(int(font.getlength(name)) for name in names)  # small images grow by whole pixels
    pixels = [to_bytes(row) for row in rows]
    height, width = pixels[0].shape[1] * zoom + 2, pixels[0].shape[2] * zoom + 2
    page = Image.new("RGB", (left + width * max(len(row) for row in pixels), height * len(rows)), "white")
    for y, (row, name) in enumerate(zip(pixels, names)):
        ImageDraw.Draw(page).text((6, y * height + height // 2), name, "black", font, anchor="lm")
        for x, picture in enumerate(row):
            page.paste(Image.fromarray(picture).resize((width - 2, height - 2), Image.Resampling.NEAREST), (left + x * width, y * height))
    return page


def to_bytes(images):
    """Images (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def naming(what, problem="", kinds=ValueError):
    """An error inside of one of these kinds becomes a ValueError of one line that names what it is about: a file, a flag."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}: {problem}{(str(error).splitlines() or [type(error).__name__])[0]}") from error


def rank():
    """This process's number among those that torchrun started, else 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    """How many processes torchrun started, else 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start_processes(device):
    """Joins the processes that torchrun started, if it did, and returns the device that is this one's."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require(not device.startswith("mps"), "device: got 'mps', which has no float64 to draw tokens with, expected cuda or cpu")
    torch.backends.cudnn.allow_tf32 = False  # on by default, but the quantiser is in fp32, as is whatever is not in bf16
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = f"cuda:{os.environ['LOCAL_RANK']}" if several and device == "cuda" else device
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device!r}, expected one that this machine has; cpu is always there") from error
    if several:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else all processes would meet on the first
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Asks glibc, where it is there, to keep what is freed: faulting it in again takes a tenth to a fifth of a small step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):  # M_MMAP_THRESHOLD, which older versions limit
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fast_dtype(device):
    """bf16 where a product of 1024 x 1024 takes at most 0.8 of its fp32 time on this machine, else fp32."""
    def seconds(dtype):
        a = torch.randn(1024, 1024, device=device).to(dtype)
        return min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=4))
    faster = torch.tensor(seconds(torch.bfloat16) < 0.8 * seconds(torch.float32), dtype=torch.int64, device=device)
    if world() > 1:
        torch.distributed.broadcast(faster, 0)  # the same for all processes
    return torch.bfloat16 if faster else torch.float32


def load(path):
    """A tree or state dict on the CPU; ValueError for anything else, a pickle with code in it among them."""
    with open(path, "rb") as file, naming(path, "not a file of weights that can be read safely: ", Exception):
        return torch.load(file, map_location="cpu", weights_only=True)


def load_tokenizer(path):
    """A tokenizer's tree from a file of ours or a published one; ValueError that names the file."""
    state = load(path)
    with naming(path):
        if not isinstance(state, dict) or "codebook" not in state:
            return tokenizer.from_published(state)
        whole = {"encoder", "quant_conv", "codebook", "phi", "post_quant_conv", "decoder"}
        require(state.keys() == whole, f"expected a whole tokenizer, got one with {', '.join(state)}")
        return state


def load_transformer(path, scales=None, is_causal=None):
    """A transformer's tree from a file, ours or published (is_causal: which kind it must be, or None); ValueError that names the file."""
    state = load(path)
    with naming(path):
        if isinstance(state, dict) and "trunk" in state:
            whole = {"classes", "start", "levels", "positions", "input", "trunk", "next_scale"}
            require(whole <= state.keys() <= whole | {"masked"}, f"expected a whole transformer, got one with {', '.join(state)}")
            return state
        found, params = hmar.published_is_causal(state), hmar.from_published(state, scales)
        require(None in (found, is_causal) or found == is_causal, f"holds weights of {'VAR: add' if found else 'HMAR: leave out'} --causal")
        return params


def digest(*trees):
    """A fingerprint of all tensors in some trees."""
    total = hashlib.sha256()
    for tensor in pytree.tree_leaves(trees):
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside path, flushes it to disk, renames it. OSError if it cannot; the old file stays whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise OSError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from error


def write_json(path, value):
    """A JSON file, whole or not at all."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    """The object in a JSON file, {} where there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path) as file, naming(path, "not JSON: "):
        return json.load(file)


def fill_array(path, settings, shape, dtype, chunk, make):
    """A memory-mapped array (N, ...) in path.npy whose rows come from make(range of rows), a chunk at a time, split over the processes.

    What is done is noted beside it: interrupted, it goes on there; with other settings (JSON) it begins anew, and says so.
    """
    if rank() == 0 and read_json(f"{path}.json") != settings:
        if os.path.exists(f"{path}.json"):
            print(f"{path}.npy: made anew, since its settings changed")
            os.remove(f"{path}.json")  # first, so that what is half made is never taken for whole
        np.lib.format.open_memmap(f"{path}.npy", "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is told now, not by a signal when a page is written
            with open(f"{path}.npy", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        np.lib.format.open_memmap(f"{path}.done.npy", "w+", bool, (math.ceil(shape[0] / chunk),)).flush()
        write_json(f"{path}.json", settings)
    barrier()
    rows, done = (np.lib.format.open_memmap(f"{path}{suffix}.npy", "r+") for suffix in ("", ".done"))
    for i in range(rank(), len(done), world()):
        if not done[i]:
            part = range(shape[0])[i * chunk:(i + 1) * chunk]
            rows[part.start:part.stop] = make(part)
            rows.flush()
            done[i] = True
    done.flush()
    barrier()
    return rows


def barrier():
    """Waits for the other processes."""
    if world() > 1:
        torch.distributed.barrier()


class Progress:
    """One updating line on a terminal, a plain line every ten seconds elsewhere; rank 0 alone speaks."""
    def __init__(self, what, total, done=0):
        self.what, self.total, self.start, self.seen = what, total, time.monotonic(), 0
        self.first, self.last, self.terminal = done, -math.inf, sys.stdout.isatty()

    def show(self, done, images, note=""):
        self.seen += images
        now = time.monotonic()
        if rank() or (now - self.last < (0.2 if self.terminal else 10) and done < self.total):
            return
        self.last, spent = now, now - self.start
        minutes, seconds = divmod(int(spent / max(1, done - self.first) * (self.total - done)), 60)
        line = f"{self.what} {done}/{self.total}  {note}  {self.seen / max(spent, 1e-9):.0f} images/s  {minutes}:{seconds:02d} left"
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal and done < self.total else "\n", flush=True)


class Parser(argparse.ArgumentParser):
    """argparse whose help fits a screen and whose errors are one line, with the nearest flag for a mistyped one."""
    def __init__(self, **options):
        super().__init__(add_help=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32), **options)

    def parse_args(self, args=None):
        flags = [flag.removeprefix("--") for flag in self._option_string_actions]
        for word in sys.argv[1:] if args is None else args:
            name = word[2:].partition("=")[0]
            if word.startswith("--") and not any(flag.startswith(name) for flag in flags):
                near = difflib.get_close_matches(name, flags, 1)
                self.error(f"no flag --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists them"))
        return super().parse_args(args)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def command(name, work, args, stopped):
    """Calls work(args). Exit status: 0; 2 with one line on stderr for bad input; 130 where it was stopped."""
    try:
        work(args)
        return 0
    except (ValueError, OSError) as error:
        text = re.sub(r"(?s)^Caught .*\n[\w.]+: ", "", str(error).strip())  # as a DataLoader's worker wraps it
        print(f"{name}: {text}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        advice = "a smaller --batch, in training more --accumulate or --checkpointing, needs less"
        print(f"{name}: {str(error).partition('. ')[0]}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{name}: {str(interrupt) or stopped}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parser():
    """The flags of `python sample.py`."""
    top = Parser(usage="python sample.py RUN [flags]",
                 description="Draw images from a run folder of train.py, or from published weights; or repaint a part of a photograph.")
    what = top.add_argument_group("what").add_argument
    what("run", nargs="?", metavar="RUN", help="run folder of train.py")
    what("-h", "--help", action="help", help="show this and exit")
    what("--weights", metavar="FILE", help="transformer, ours or published, in place of a run folder")
    what("--tokenizer", metavar="FILE", help="its tokenizer, ours or published")
    what("--causal", action="store_true", help="the weights are VAR's")
    what("--scales", nargs="+", type=scale_pair, metavar="SIDE", help="of published weights at unpublished lengths, 4 or 2x3 each")
    what("--labels", nargs="+", default=["all"], metavar="LABEL", help="class names or numbers, or all (all; the first ten in a sheet)")
    what("--count", type=int, default=8, metavar="N", help="images a label (8)")
    what("--seed", type=int, default=0, help="of the first image; image i has seed + i (0)")
    what("--out", default="samples.png", metavar="FILE", help=".png sheet, .gif of it growing, .npz for FID, or a folder (samples.png)")
    what("--growth", action="store_true", help="sheet with a row an image, a column a scale")
    how = top.add_argument_group("sampling").add_argument
    how("--guidance", nargs="+", type=float, default=[1.5], metavar="G", help="one number, rising over scales, or one a scale (1.5)")
    how("--mask-guidance", nargs="+", type=float, default=[0.0], metavar="G", help="the same for masked passes (0)")
    how("--temperature", type=float, default=1.0, metavar="T", help="0: arg max (1)")
    how("--top-k", type=int, default=0, metavar="K", help="codes that may be drawn; 0: all (0)")
    how("--top-p", type=float, default=1.0, metavar="P", help="share of the probability that may be drawn (1)")
    how("--mask-steps", nargs="+", type=int, metavar="M", help="masked passes, one number for all scales or one a scale (as published)")
    how("--schedule", metavar="S", help="tokens kept at each pass of each scale: published, or '1 / 1,3 / 1,1,2,5 / 16'")
    how("--order", default="confidence", choices=ORDERS, metavar="ORDER", help=f"what a pass keeps: {', '.join(ORDERS)} (confidence)")
    how("--smooth", action="store_true", help="feed on soft codes, for looks")
    edit = top.add_argument_group("editing").add_argument
    edit("--edit", metavar="PHOTO", help="image to repaint, with --count versions for each label")
    edit("--mask", metavar="IMAGE", help="white: repaint; any size")
    edit("--pad", type=float, metavar="SHARE", help="outpaint: shrink the photo and draw a border of this share of the side around it")
    edit("--feather", type=int, default=0, metavar="PIXELS", help="blend the edge inside the mask (0)")
    machine = top.add_argument_group("machine").add_argument
    machine("--batch", type=int, default=50, metavar="N", help="images at a time (50)")
    machine("--device", help="cuda or cpu (the first there is)")
    machine("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where this machine multiplies it faster (auto)")
    machine("--compile", action="store_true", help="minutes of compiling first, faster from then on: for many images")
    return top


def scale_pair(text):
    """Of the parser: "4" or "2x3" -> (height, width)."""
    h, _, w = text.partition("x")
    return int(h), int(w or h)


def load_models(args, device):
    """(params, tokenizer_params, class names) of a run folder or of files, checked, on a device."""
    require(args.run is not None or args.weights and args.tokenizer, "expected a run folder, or both --weights and --tokenizer")
    weights, tokens = (path or os.path.join(args.run, name) for path, name in ((args.weights, "hmar.pt"), (args.tokenizer, "tokenizer.pt")))
    require(args.weights or os.path.exists(weights), f"{weights} is missing: the next-scale stage of python train.py makes it")
    folder = os.path.dirname(args.weights) if args.weights else args.run  # a run's own file has the names of its classes beside it
    settings = read_json(os.path.join(folder, "args.json")).get("next-scale", {})
    require(args.weights or not args.causal or settings.get("causal"), f"--causal: {args.run} was trained without it")
    args.causal = args.causal or settings.get("causal", False)
    trees = load_transformer(weights, args.scales, args.causal), load_tokenizer(tokens)
    params, tokenizer_params = pytree.tree_map(lambda tensor: tensor.to(device), trees)
    names, count = settings.get("class_names", ()), len(params["classes"]) - 1
    return params, tokenizer_params, names if len(names) == count else [str(label) for label in range(count)]


def class_index(text, names):
    """The class of a name or a number; ValueError with the nearest names for an unknown one."""
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    near = ", ".join(difflib.get_close_matches(text, names, 3) or names[:3])
    named = "; these weights come without names" if names[0] == "0" else f" or a name such as {near}"
    raise ValueError(f"--labels: got {text!r}, expected 0 to {len(names) - 1}{named}")


def sampling_options(args, scales):
    """The keyword arguments of `steps` that the flags ask for."""
    chosen = None
    if args.schedule == "published":
        chosen = published_schedule(scales)
    elif args.schedule:
        with naming("--schedule", f"got {args.schedule!r}, expected numbers such as '1 / 1,3 / 1,1,2,5': "):
            chosen = tuple(tuple(int(kept) for kept in entry.split(",")) for entry in args.schedule.split("/"))
    elif args.mask_steps:
        chosen = schedule(scales, args.mask_steps[0] if len(args.mask_steps) == 1 else args.mask_steps)
    guidance, mask_guidance = (value[0] if len(value) == 1 else value for value in (args.guidance, args.mask_guidance))
    return dict(schedule=chosen, guidance=guidance, mask_guidance=mask_guidance, temperature=args.temperature, top_k=args.top_k,
                top_p=args.top_p, is_causal=args.causal, order=args.order, smooth=args.smooth)


def read_image(path, shortest=None):
    """The first frame of an image file as an upright RGB image, transparency on white, 16 bits a channel scaled to 8. shortest: where
    given, a large JPEG may be decoded at a fraction of its size, no side below that (much faster). ValueError that names the path and
    the reason for a file that is broken, truncated or above 100 million pixels."""
    try:
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise OSError("no regular file" if os.path.exists(path) else "missing")
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as image:
            if image.width * image.height > 100_000_000:
                raise OSError(f"{image.width} x {image.height} pixels, more than 100 million")
            if shortest is not None:
                image.draft(None, (shortest, shortest))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it
                grey = np.where(np.asarray(image) == image.info.get("transparency"), 65535, np.asarray(image)).clip(0, 65535)
                return Image.fromarray((grey / 257 + 0.5).astype(np.uint8)).convert("RGB")
            if "transparency" in image.info or "A" in image.getbands():
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = "no image of these formats" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {str(reason) or type(error).__name__}") from error


def photo_and_mask(args, size):
    """(image (1, 3, H, W) in [-1, 1], mask (1, 1, H, W) bool, True = repaint) of --edit and --mask or --pad; size is (width, height)."""
    require((args.mask is None) != (args.pad is None), "--edit: expected one of --mask IMAGE and --pad SHARE")
    photo = ImageOps.fit(read_image(args.edit), size, Image.Resampling.LANCZOS)
    if args.mask:
        mask = ImageOps.fit(read_image(args.mask).convert("L"), size, Image.Resampling.NEAREST)
    else:
        border = tuple(round(side * args.pad) for side in size)
        inner = [side - 2 * edge for side, edge in zip(size, border)]
        require(0 < args.pad < 0.5 and min(inner) >= 1, f"--pad: got {args.pad}, expected a share of the side between 0 and 0.5")
        photo = ImageOps.expand(photo.resize(inner, Image.Resampling.LANCZOS), border, "grey")
        mask = ImageOps.expand(Image.new("L", inner, 0), border, 255)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return pixels, torch.from_numpy(np.array(mask))[None, None] > 127


def check_flags(args, suffix):
    """ValueError for flags that would be without effect, or that no file can follow."""
    for name in ("count", "batch"):
        require(getattr(args, name) >= 1, f"--{name}: got {getattr(args, name)}, expected at least 1")
    still, out = suffix != ".gif" and not args.growth, f"got {args.out}, expected"
    require(still or not args.edit, f"--edit: {out} a .png without --growth, an .npz or a folder to write")
    require(args.edit or not (args.mask or args.pad is not None or args.feather), "--mask, --pad, --feather: expected --edit PHOTO too")
    require(not args.growth or suffix == ".png", f"--growth: {out} a .png to write")
    require(args.weights or not args.scales, f"--scales: got {args.run}, expected published --weights; a run folder's have their own")
    known = suffix in (".png", ".gif", ".npz") or suffix not in Image.registered_extensions()
    require(known, f"--out: {out} a .png, .gif or .npz, or the name of a folder")


def run(args):
    """What the command does once its flags are read."""
    device, suffix = start_processes(args.device), os.path.splitext(args.out)[1].lower()
    check_flags(args, suffix)
    params, tokenizer_params, names = load_models(args, device)
    every = list(range(len(names)))[:10 if suffix in (".png", ".gif") else None]
    kinds = every if args.labels == ["all"] else [class_index(text, names) for text in args.labels]
    options = sampling_options(args, hmar.scales(params))
    dtype = dict(bf16=torch.bfloat16, fp32=torch.float32).get(args.dtype) or fast_dtype(device)
    settings = dict(weights=args.weights or args.run, tokenizer=args.tokenizer or args.run, labels=kinds, count=args.count, seed=args.seed,
                    dtype=str(dtype)[6:], **options)
    settings["schedule"] = check_schedule(options["schedule"], hmar.scales(params), "masked" in params)
    settings |= {name: getattr(args, name) for name in ("edit", "mask", "pad", "feather")} if args.edit else {}
    settings = json.loads(json.dumps(settings))  # as they come back from a file
    models = hmar.cast(params, dtype), tokenizer.cast(tokenizer_params, dtype)
    labels = torch.tensor(kinds, device=device).repeat_interleave(args.count)
    if args.compile:
        if device.type == "cuda":  # what attention keeps must not lie in the memory of a graph, nor be weights that each replay copies
            generate(*models, labels[:1], **options)
            pytree.tree_map(torch._dynamo.mark_static_address, models)
        options |= dict(network=compiled_network(device))
    height, width = (tokenizer.downsampling(tokenizer_params) * side for side in hmar.scales(params)[-1])
    photo = [part.to(device) for part in photo_and_mask(args, (width, height))] if args.edit else []
    progress = Progress("drawing", len(labels))

    def make(rows):
        """Images (n, 3, H, W) of a range of the images asked for."""
        own, seed = labels[rows.start:rows.stop], args.seed + rows.start
        if photo:
            images, mask = (part.expand(len(own), -1, -1, -1) for part in photo)
            made = edit(*models, images, mask, own, feather=args.feather, seed=seed, **options)
        else:
            made, _ = generate(*models, own, seed=seed, **options)
        progress.show(rows.stop, len(rows))
        return made

    if suffix == ".npz":
        write_arrays(args, settings, digest(models, photo), make, labels.tolist(), (height, width, 3))
    elif suffix in (".png", ".gif"):
        names = [names[kind] for kind in kinds]
        growing = steps(*models, labels, seed=args.seed, **options)  # a generator: nothing is drawn until somebody asks
        growing = ((step.scale, decoded(models[1], step.f_hat)) for step in growing)
        if suffix == ".gif":  # a page a pass
            pages = [sheet(images.split(args.count), names) for _, images in growing]
        elif args.growth:
            pages = [sheet(torch.stack(list(dict(growing).values()), 1), [name for name in names for _ in range(args.count)])]
        else:
            made = torch.cat([make(rows).cpu() for rows in batches(args, labels)]).split(args.count)
            pages = [sheet([torch.cat([photo[0].cpu(), row]) for row in made] if photo else made, names)]
        moving = dict(save_all=True, append_images=pages[1:], duration=[400] * (len(pages) - 1) + [2000], loop=0)  # milliseconds
        write_atomically(args.out, lambda file: pages[0].save(file, suffix[1:], **(moving if suffix == ".gif" else {})))
    else:
        write_folder(args, settings, make, labels.tolist())
    if rank() == 0:
        print(f"wrote {args.out}: " + ", ".join(f"{name} {value}" for name, value in settings.items() if name != "labels"))


def batches(args, labels):
    """Ranges of at most --batch images."""
    return [range(len(labels))[first:first + args.batch] for first in range(0, len(labels), args.batch)]


def write_arrays(args, settings, fingerprint, make, labels, shape):
    """An .npz as the standard FID evaluator reads it, images (N, H, W, 3) as arr_0, and labels; they go from file to file, however many."""
    part = args.out.removesuffix(".npz") + ".part"
    made_of = settings | dict(batch=args.batch, digest=fingerprint)
    fill_array(part, made_of, (len(labels), *shape), np.uint8, args.batch, lambda rows: to_bytes(make(rows)))
    if rank() == 0:
        write_atomically(args.out, lambda file: np.savez(file, np.load(f"{part}.npy", mmap_mode="r"), labels=np.array(labels)))
        write_json(f"{args.out}.json", settings)
        for ending in (".json", ".npy", ".done.npy"):  # without the first, the others are made anew
            os.remove(part + ending)


def write_folder(args, settings, make, labels):
    """A folder of PNG files, number-label.png, beside settings.json. ValueError for a folder of images drawn with other settings."""
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "settings.json")
    before = read_json(path) or settings
    changed = [f"{name} {before.get(name)!r} -> {value!r}" for name, value in settings.items() if before.get(name) != value]
    require(not changed, f"--out: the images in {args.out} were drawn with other settings ({', '.join(changed)}); expected another folder")
    barrier()  # every process has looked
    if rank() == 0:
        write_json(path, settings)
    for rows in batches(args, labels)[rank()::world()]:
        for i, pixels in zip(rows, to_bytes(make(rows))):
            path = os.path.join(args.out, f"{i:06d}-{labels[i]}.png")
            write_atomically(path, lambda file, pixels=pixels: Image.fromarray(pixels).save(file, "PNG"))


def compiled_network(device):
    """hmar's two functions for `steps`, compiled for each scale's shapes; on CUDA replayed as graphs, without the cost of launches (but
    for VAR, whose cache is new for each batch)."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return tuple(compiled(call, dynamic=False, mode=mode) for call in (hmar.next_scale_features, hmar.masked_features))


def compiled(call, **options):
    """torch.compile, with room for all that a call is compiled for anew: each scale, with and without guidance, each part of a loss."""
    torch._dynamo.config.recompile_limit = 64  # beyond it, code would run as it is, and tell nobody
    return torch.compile(call, **options)


def main(argv=None):
    """The command; see `command`."""
    return command("sample.py", run, parser().parse_args(argv), "stopped; with --out FILE.npz the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
