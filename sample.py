"""Sampling: class labels -> tokens, scale by scale -> images; editing; and the command `python sample.py`.

    labels (B,) -> for each scale: logits -> guidance -> filter -> draw -> masked refinement -> f_hat -> images (B, 3, H, W)

`steps` is the whole method as a Python generator, one item a pass, so that a caller can watch, stop or choose; `generate` and `edit` consume it.
`guided` is where guidance is applied, `filtered` and `draw` make tokens of logits, `schedule` and `still_masked` say what is drawn again and when.
Every image has a stream of random numbers of its own, so it comes out the same whatever batch it is drawn in.

Sources: HMAR (Kumbong et al. 2025); MaskGIT (Chang et al. 2022); VAR (Tian et al. 2024); classifier-free guidance (Ho and Salimans 2021);
the Halton scheduler (Besnier et al. 2025).
"""
import argparse
import difflib
import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import hmar
import tokenizer

PUBLISHED_PASSES = {4: (1, 3), 9: (1, 1, 2, 5)}  # tokens of a scale -> tokens kept at each pass; every other scale takes one pass


class Step(NamedTuple):
    """What `steps` yields after each pass."""
    scale: int
    number: int  # of the pass within its scale: 0 is the next-scale draw, later ones refine
    tokens: torch.Tensor  # (B, n_k) int64, the scale's tokens so far
    masked: torch.Tensor  # (B, n_k) bool, those that a later pass draws again
    f_hat: torch.Tensor  # (B, code_dim, h, w), all scales up to this one: tokenizer.decode_features makes an image of it


def generate(params, tokenizer_params, labels, **options):
    """(images (B, 3, H, W) in [-1, 1], tokens (B, L) int64) of labels (B,) int64. Keyword arguments are those of `steps`."""
    tokens = {}
    for step in steps(params, tokenizer_params, labels, **options):
        tokens[step.scale] = step.tokens
    with torch.no_grad():
        return tokenizer.decode_features(tokenizer_params, step.f_hat), torch.cat(list(tokens.values()), 1)


@torch.no_grad()
def steps(params, tokenizer_params, labels, *, schedule=None, guidance=1.5, mask_guidance=0.0, temperature=1.0, top_k=0, top_p=1.0, seed=0,
          is_causal=False, order="confidence", smooth=False, known=None):
    """Draws the pyramid coarse to fine, yielding a Step after each pass (HMAR; within a scale MaskGIT).

    labels (B,) int64. schedule: for each scale the tokens kept at each pass, as `schedule` makes it; None is the published one where the tree has a
    masked branch, else one pass a scale. guidance, mask_guidance: a number g >= 0, rising over scales as g k / (S - 1), or one value a scale; scales
    with 0 skip the unconditional half. temperature >= 0, 0 = arg max; top_k >= 0 codes stay, 0 = all; top_p in (0, 1] of the probability stays.
    Image i draws from the stream of seed + i, or of seed[i]. is_causal: VAR, with a key/value cache. order: "confidence" (published), "halton" or
    "random": which drawn tokens a pass keeps. smooth: feed on soft codes, for looks (VAR). known: (tokens (B, L), given (B, L) bool), for `edit`.
    """
    scales, codebook = hmar.scales(params), tokenizer_params["codebook"]
    _check_options(params, tokenizer_params, labels, temperature, top_k, top_p, order)
    schedule = check_schedule(schedule, scales, "masked" in params)
    guidance, mask_guidance = _per_scale("guidance", guidance, scales), _per_scale("mask_guidance", mask_guidance, scales)
    streams = _streams(seed, len(labels))
    cache = hmar.new_cache(params, len(labels) * (2 if any(guidance) else 1), params["next_scale"]["head"]["weight"].dtype) if is_causal else None
    f_hat = torch.zeros(len(labels), codebook.shape[1], *scales[-1], device=labels.device)
    given = None if known is None else [part.split(tokenizer.lengths(scales), 1) for part in known]
    for k, (h, w) in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, (h, w)) if k else None
        predict = functools.partial(hmar.next_scale_logits, params, only=k, cache=cache)
        scores = filtered(guided(predict, params, labels, guidance[k], inputs, always=is_causal and any(guidance)), top_k, top_p)
        tokens, confidence = draw(scores, temperature, uniforms(streams, (h * w,), labels.device))
        masked = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~given[1][k]
        tokens = tokens if known is None else torch.where(masked, tokens, given[0][k])
        codes = soft_codes(scores, codebook, k / max(1, len(scales) - 1), streams) if smooth else None
        for number, keep in enumerate(keep_counts(schedule[k], masked, "masked" in params)):
            if number:
                hidden = masked if "own_input" in params["masked"] else None  # published trees saw the draft leak through
                own = tokenizer.masked_scale_input(tokenizer_params, tokens, k, scales, hidden)
                predict = functools.partial(hmar.masked_logits, params, only=k)
                scores = filtered(guided(predict, params, labels, mask_guidance[k], inputs, own, masked), top_k, top_p)
                drawn, confidence = draw(scores, temperature, uniforms(streams, (h * w,), labels.device))
                tokens = torch.where(masked, drawn, tokens)
            masked = still_masked(masked, priority(order, confidence, h, w, streams), keep)
            now = F.embedding(tokens, codebook) if codes is None else codes
            now = f_hat + tokenizer.contribution(tokenizer_params["phi"], now, k, scales)
            yield Step(k, number, tokens, masked, now)
        f_hat = now


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
    """(tokens (...) int64, confidence (...) fp64) from filtered logits (..., V) by inverting their cumulative sum in fp64 at uniform (...) in [0, 1).

    temperature divides the logits, 0 = arg max. Confidence is the token's probability at temperature 1, by which a pass chooses what it keeps.
    """
    probability = logits.double().softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        sums = (probability if temperature == 1 else (logits.double() / temperature).softmax(-1)).cumsum(-1)
        total = sums[..., -1:]  # a draw below the total never falls on a code that was ruled out
        tokens = torch.searchsorted(sums, torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total))), right=True)[..., 0]
    return tokens, probability.gather(-1, tokens[..., None])[..., 0]


def uniforms(streams, shape, device):
    """One number in [0, 1) a token from each image's own stream, (B, *shape) fp64; drawn on the CPU, so that every device sees the same."""
    return torch.stack([torch.rand(shape, generator=stream, dtype=torch.float64) for stream in streams]).to(device)


def soft_codes(logits, codebook, progress, streams):
    """Gumbel-softmax mixtures of codes (B, n, code_dim) that sharpen over the scales; progress in [0, 1] (VAR's smooth sampling)."""
    noise = -torch.log(-torch.log(uniforms(streams, logits.shape[1:], logits.device).clamp(1e-300)))
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) + noise) / temperature).softmax(-1).to(codebook.dtype) @ codebook


def schedule(scales, steps, curve="cosine"):
    """For each scale the tokens kept at each pass, ((1,), (1, 3), ...): one next-scale draw and `steps` passes of refinement, a number or one a scale.

    curve: "cosine" keeps few tokens first and most last (MaskGIT), "linear" alike. A scale takes no more passes than it has tokens, the first scale one.
    """
    counts = tokenizer.lengths(scales)
    steps = [steps] * len(counts) if isinstance(steps, int) else list(steps)
    if len(steps) != len(counts) or any(not isinstance(step, int) or step < 0 for step in steps):
        raise ValueError(f"steps: got {steps}, expected a number, 0 or more, or one for each of the {len(counts)} scales")
    if curve not in ("cosine", "linear"):
        raise ValueError(f'curve: got {curve!r}, expected "cosine" or "linear"')
    passes = []
    for k, (count, step) in enumerate(zip(counts, steps)):
        number = 1 if k == 0 else min(step + 1, count)
        done = [i / number if curve == "linear" else 1 - math.cos(math.pi / 2 * i / number) for i in range(1, number + 1)]
        kept = [0]
        for i, share in enumerate(done):  # each pass keeps at least one, and leaves one for each that follows
            kept.append(min(max(round(share * count), kept[-1] + 1), count - (number - 1 - i)))
        passes.append(tuple(after - before for before, after in itertools.pairwise(kept)))
    return tuple(passes)


def published_schedule(scales):
    """The published schedule, (1) (1, 3) (1, 1, 2, 5) and then one pass a scale, 14 passes at 256 pixels, for any scales: it belongs to a scale's size."""
    return tuple(PUBLISHED_PASSES.get(count, (count,)) if k else (count,) for k, count in enumerate(tokenizer.lengths(scales)))


def check_schedule(schedule, scales, has_masked_branch):
    """The schedule as tuples, with None replaced; ValueError unless it has an entry a scale whose numbers sum to the scale's tokens."""
    counts = tokenizer.lengths(scales)
    if schedule is None:
        return published_schedule(scales) if has_masked_branch else tuple((count,) for count in counts)
    schedule = tuple((passes,) if isinstance(passes, int) else tuple(passes) for passes in schedule)
    if len(schedule) != len(counts):
        raise ValueError(f"schedule: has {len(schedule)} entries, expected one for each of the {len(counts)} scales")
    for k, (passes, count) in enumerate(zip(schedule, counts)):
        if sum(passes) != count or min(passes) < 0 or not all(isinstance(kept, int) for kept in passes) or (k == 0 and len(passes) > 1):
            raise ValueError(f"schedule: entry {k} is {passes}, expected {'one number, ' if k == 0 else 'numbers that sum to '}{count}")
    if not has_masked_branch and any(len(passes) > 1 for passes in schedule):
        raise ValueError("schedule: asks for masked refinement, but these weights have no masked branch")
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


def priority(order, confidence, h, w, streams):
    """A number (B, n) a token, the highest kept first: its confidence, its place in Halton order, or a random one."""
    if order == "confidence":
        return confidence
    if order == "random":
        return uniforms(streams, confidence.shape[1:], confidence.device)
    return -halton_order(h, w).argsort().to(confidence).expand_as(confidence)


def still_masked(masked, priority, keep):
    """masked (B, n) without the keep (B,) tokens of the highest priority among them; ties go by position."""
    rank = priority.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return masked & (rank >= keep[:, None])


@functools.cache
def halton_order(h, w):
    """The cells (h w,) int64 of an h x w grid in the order in which a Halton sequence of bases 2 and 3 first visits them (Besnier et al. 2025)."""
    def radical_inverse(i, base):
        value, unit = 0.0, 1.0
        while i:
            unit /= base
            i, digit = divmod(i, base)
            value += digit * unit
        return value
    cells = {}  # a dict keeps the order of the first visits
    for i in itertools.count():
        cells[int(radical_inverse(i, 2) * h) * w + int(radical_inverse(i, 3) * w)] = None
        if len(cells) == h * w:
            return torch.tensor(list(cells))


def edit(params, tokenizer_params, images, mask, labels, *, feather=0, **options):
    """images (B, 3, H, W) in [-1, 1] with what is under mask (B, 1, H, W) bool, True = repaint, drawn anew as labels (B,) int64 (HMAR, editing).

    At each scale the tokens whose cells lie outside the mask are those of the image; the others are drawn by the next-scale branch, then by the
    masked branch, which sees the given ones. Pixels outside the mask are the original ones; inside, the edge blends over `feather` pixels. Keyword
    arguments are those of `steps`. ValueError on a mask of another shape or type, or as encode and steps.
    """
    scales = hmar.scales(params)
    if mask.dtype != torch.bool or mask.shape != (len(images), 1, *images.shape[2:]):
        raise ValueError(f"mask: got {mask.dtype} {tuple(mask.shape)}, expected bool {(len(images), 1, *images.shape[2:])}")
    if not isinstance(feather, int) or feather < 0:
        raise ValueError(f"feather: got {feather!r}, expected pixels, 0 or more")
    tokens = tokenizer.encode(tokenizer_params, images, scales)
    repaint = torch.cat([F.adaptive_max_pool2d(mask.float(), size).flatten(1) for size in scales], 1) > 0  # (B, L)
    for step in steps(params, tokenizer_params, labels, known=(tokens, ~repaint), **options):
        pass
    with torch.no_grad():
        painted = tokenizer.decode_features(tokenizer_params, step.f_hat)
    outside = (~mask).float()
    grown = [F.max_pool2d(outside, 2 * pixels + 1, 1, pixels) for pixels in range(feather + 1)]
    share = 1 - sum(grown) / len(grown)  # 0 outside the mask, 1 from `feather` pixels inside it
    return torch.where(mask, torch.lerp(images, painted, share), images)


def _streams(seed, count):
    seeds = range(seed, seed + count) if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} seeds, expected a number or one for each of the {count} images")
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def _per_scale(name, value, scales):
    """One number a scale: a number rises over scales as value k / (S - 1)."""
    values = [value * k / max(1, len(scales) - 1) for k in range(len(scales))] if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != len(scales) or any(not 0 <= v < math.inf for v in values):
        raise ValueError(f"{name}: got {value}, expected a number, 0 or more, or one for each of the {len(scales)} scales")
    return values


def _check_options(params, tokenizer_params, labels, temperature, top_k, top_p, order):
    codes, code_dim = tokenizer_params["codebook"].shape
    ours = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    if (codes, code_dim) != ours:
        raise ValueError(f"tokenizer_params: has {codes} codes of {code_dim} dimensions, these weights were made for {ours[0]} of {ours[1]}")
    for name, value, fits, expected in (("temperature", temperature, 0 <= temperature < math.inf, "0 or more"), ("top_k", top_k, top_k >= 0, "0 or more"),
                                        ("top_p", top_p, 0 < top_p <= 1, "a share in (0, 1]"),
                                        ("order", order, order in ("confidence", "halton", "random"), '"confidence", "halton" or "random"')):
        if not fits:
            raise ValueError(f"{name}: got {value!r}, expected {expected}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag for a mistyped one."""
    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word.partition("=")[0] for word in message.split() if word.startswith("--")] if message.startswith("unrecognized") else []
        near = [match for word in wrong for match in difflib.get_close_matches(word, flags, 1)]
        self.exit(2, f"{self.prog}: {message}{'; did you mean ' + ', '.join(near) + '?' if near else ''}\n")


def sheet(rows, names):
    """A PIL image: a row of images (n, 3, H, W) in [-1, 1] each, its name at the left."""
    font = ImageFont.load_default(12)
    scale = max(1, 64 // rows[0].shape[-1])  # small images are enlarged, by whole pixels
    left = 12 + max(int(font.getlength(name)) for name in names)
    pixels = [((row.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for row in rows]
    height, width = pixels[0].shape[1] * scale + 2, pixels[0].shape[2] * scale + 2
    page = Image.new("RGB", (left + width * max(len(row) for row in pixels), height * len(rows)), "white")
    for y, (row, name) in enumerate(zip(pixels, names)):
        ImageDraw.Draw(page).text((6, y * height + height // 2), name, "black", font, anchor="lm")
        for x, picture in enumerate(row):
            page.paste(Image.fromarray(picture).resize((width - 2, height - 2), Image.Resampling.NEAREST), (left + x * width, y * height))
    return page
