"""Training: drawn shapes or a folder of images -> tokenizer.pt and hmar.pt; `python train.py`.

    images -> tokenizer stage -> tokens (N, views, L) -> next-scale stage -> masked stage

First the settings and `fit`, the loop of all stages; then each stage, top to bottom; then how they
are judged; then data. All randomness and the order of the data are functions of seed and step, so
that nothing of them is saved and a run that was killed continues bit for bit. The command and what
happens to a run folder stand at the end.
"""

import argparse
import colorsys
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
from sample import (
    at_once,
    digest,
    load_tokenizer,
    load_transformer,
    read_json,
    require,
    write_atomically,
)

STAGES = {
    "tokenizer": "tokenizer.pt",
    "next-scale": "hmar.pt",
    "masked": "hmar.pt",
}  # what each leaves

PRESETS = {  # up to 64 pixels, a model for two CPU cores; above, the published one, for GPUs
    "channels": (32, 160),
    "multipliers": ((1, 1, 2), (1, 1, 2, 2, 4)),
    "residual_blocks": (1, 2),
    "attention": (False, True),
    "codes": (256, 4096),
    "code_dim": (16, 32),
    "depth": (3, 16),
    "width": (192, None),
    "gamma": (0.1, None),
    "masked_blocks": (2, 8),
    "loss_weights": ("token", "lognormal"),
    "batch": (16, 64),
    "ema": (0.998, 0.9999),
    "warmup": (100, 1000),
    "steps": ((1400, 1800, 300), (200_000, 400_000, 80_000)),  # of each stage
    "lr": ((4e-3, 4e-3, 2e-3), (1e-4, 1e-4, 1e-4)),
}
LARGEST_SMALL = 64  # pixels
CLIP = 1.0  # largest gradient norm
WEIGHT_DECAY = 0.05  # on matrices alone
BETAS = (0.9, 0.95)
NOT_FOR_MUON = (  # what faces other than features, and modulation
    "classes|start|levels|positions|codebook|phi|quant_conv|conv_in|conv_out|head|input|modulation"
)
LABEL_DROP = 0.1  # labels made null, for guidance
DEPTH_DROP = 0.1  # stochastic depth of the last block at depth 24, in proportion at others
REVIVE_EVERY = 20  # steps, after which codes that nobody chose are replaced, until 80 % of the run
COARSE_EVERY = 4  # of which images of a batch one is decoded from its coarse scales too
COARSE_WEIGHT = 0.5  # of the squared error of these
LOG_EVERY = 50  # steps
JUDGEMENTS = 8  # times in a stage that held-out images are looked at
JUDGED = 512  # of these, at most
PATIENCE = 3 / 8  # of the steps without a better held-out loss end a stage
HELD_OUT = 0.05  # share of the images
VIEWS_IN_ALL = 20_000  # a small folder's images are encoded in several random crops each,
MOST_VIEWS = 16  # but not in more than these
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
TOKENIZER_SIZES = ("codes", "code_dim", "channels", "multipliers", "residual_blocks", "attention")
UNRECORDED = (  # flags that change no result
    "stage", "stages", "out", "restart", "save_every", "workers", "device", "accumulate",
    "class_names", "lock", "checkpointing",
)  # fmt: skip


def fit(args, tree, loss, batches, evaluate, after_step=None, extra=()):
    """`tree` with those moving averages of its parameters that were best on held-out images.

    loss(tree, **batch) -> (scalar, {name: tensor}), which is reported; batches(start) yields each
    step's batch in parts, a dict each; evaluate(tree) -> {name: numbers}, where the lowest "loss"
    is best; after_step(step, reports, optimizer) may change parameters, extra are tensors that it
    keeps. A step depends on its number and the checkpoint alone.
    """
    model = Trained(tree, loss)
    leaves = list(model.leaves)
    average = [leaf.detach().clone() for leaf in leaves]
    optimizer = Optimizer(tree)
    run = Checkpoint(args, [leaf.data for leaf in leaves], average, extra, optimizer)
    call = wrapped(model, args)
    stop = StopSignal()
    window = []  # what was reported since the last line of metrics

    for step, parts in enumerate(batches(run.step), run.step + 1):
        rate = learning_rate(step, args)
        reports, norm = optimise(call, parts, leaves, optimizer, rate)
        decay = min(args.ema, step / (step + 10))
        torch._foreach_lerp_(average, [leaf.detach() for leaf in leaves], 1 - decay)
        if after_step is not None:
            after_step(step, reports, optimizer)

        window += [{"gradient": norm} | shown(report) for report in reports]
        if step % LOG_EVERY == 0 or step == args.steps:
            log(args, step, rate=rate, **means(window))
            window.clear()
        if step % args.judge_every == 0 or step == args.steps:
            numbers = evaluate(with_leaves(tree, average))
            log(args, step, **{f"held_out_{name}": value for name, value in numbers.items()})
            run.keep_best(step, numbers["loss"])
        if run.is_over(step):
            break

        stopped = stop.agreed(step, args.device)
        if stopped or step % args.save_every == 0:
            require_finite(args, step, norm.isfinite())  # of weights that are not, it is not
            run.save(step)
        if stopped:
            raise KeyboardInterrupt(f"{args.stage}: stopped and saved at step {step}")

    stop.close()
    return with_leaves(tree, run.best())


def optimise(call, parts, leaves, optimizer, rate):
    """(reports of the loss, norm of the gradient) of one step over a batch in parts."""
    reports = []
    for number, batch in enumerate(parts, 1):
        alone = world() > 1 and number < len(parts)  # gradients are added up with the last part's
        with call.no_sync() if alone else contextlib.nullcontext():
            value, report = call(**batch)
            (value / len(parts)).backward()
        reports.append(report)

    norm = torch.nn.utils.clip_grad_norm_(leaves, CLIP)
    optimizer.step(rate)
    return reports, norm


class Optimizer:
    """Muon for the matrices inside the networks (Jordan et al. 2024), AdamW for everything else.

    A convolution's weight is a matrix of its outputs. Muon's steps are scaled to AdamW's size, so
    that both take the same learning rate (Liu et al. 2025).
    """

    def __init__(self, tree):
        self.pairs, others = [], []  # (leaf, a view of it as a matrix)
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if not isinstance(leaf, torch.nn.Parameter):
                continue
            if leaf.ndim < 2 or re.search(NOT_FOR_MUON, pytree.keystr(path)):
                others.append(leaf)
            else:
                self.pairs.append((leaf, torch.nn.Parameter(leaf.detach().flatten(1))))
        self.adamw = torch.optim.AdamW(others, betas=BETAS, weight_decay=0, fused=True)
        matrices = [matrix for _, matrix in self.pairs]
        options = dict(weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        self.muon = torch.optim.Muon(matrices, **options)

    def step(self, rate):
        for leaf, matrix in self.pairs:
            matrix.grad = leaf.grad.flatten(1)
            leaf.grad = None
        for optimizer in (self.adamw, self.muon):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

    def forget(self, leaf, rows):
        """Sets the moments of some rows of a leaf to zero."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.adamw.state[leaf][name][rows] = 0

    def state_dict(self):
        return [self.adamw.state_dict(), self.muon.state_dict()]

    def load_state_dict(self, states):
        self.adamw.load_state_dict(states[0])
        self.muon.load_state_dict(states[1])


def learning_rate(step, args):
    """Of step 1, 2, ...: linear warm-up, then a cosine to zero."""
    decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps))
    return args.lr * decay * min(1, step / max(1, args.warmup))


# Stage one


def train_tokenizer(args, data, held_out):
    """Images -> a codec each of whose scales is an image; dead codes are replaced on the way."""
    codec = trainable(initial_tokenizer(args))
    codebook, scales = codec["codebook"], args.scales
    chosen = torch.zeros(len(codebook), dtype=torch.int64, device=args.device)  # since revival
    reserved = first_images(held_out, 128, args)
    is_coarse = torch.arange(args.batch) % COARSE_EVERY == COARSE_EVERY - 1

    def loss(codec, images, stops, rows):
        made = tokenizer.training_pass(tokenizer.cast(codec, args.dtype), images, scales, stops)
        error = reconstruction_loss(made["images"], images)
        coarse_error = (made["coarse"] - images[: len(stops)]).square().mean((1, 2, 3)).sum()
        coarse_error = coarse_error * (COARSE_EVERY / len(images))
        total = error + COARSE_WEIGHT * coarse_error + made["loss"]
        numbers = dict(loss=total, coarse=coarse_error, quantisation=made["loss"])
        residuals = [own[rows] for own in made["residuals"]]
        return total, numbers | dict(tokens=made["tokens"], residuals=residuals)

    def batches(start):
        for step, (images, _) in enumerate(loader(args, data, start), start):
            generator = generator_of(args.seed, "tokenizer", step)
            stops = torch.randint(len(scales) - 1, (args.batch,), generator=generator)
            stops = stops.masked_fill(~is_coarse, -1)
            parts = []
            images = images.tensor_split(args.accumulate)
            for pixels, own in zip(images, own_parts(args, stops)):
                order = own.argsort(descending=True)  # those with a stop come first
                part = dict(images=to_unit(pixels[order], args.device), rows=order.argsort())
                parts.append(part | dict(stops=own[order][: (own >= 0).sum()]))
            yield to_device(parts, args.device)

    def after_step(step, reports, optimizer):
        for tokens in itertools.chain.from_iterable(report["tokens"] for report in reports):
            chosen.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))
        if step == 1 or step % REVIVE_EVERY == 0 and step <= 0.8 * args.steps:
            generator = generator_of(args.seed, "revive", step)
            by_scale = zip(*(report["residuals"] for report in reports))
            residuals = [gathered(torch.cat(parts)) for parts in by_scale]
            counts = summed(chosen)
            new, dead = tokenizer.revive_codes(codebook.detach(), counts, residuals, generator)
            codebook.data.copy_(new)
            optimizer.forget(codebook, dead)
            chosen.zero_()

    def evaluate(codec):
        return judge_tokenizer(args, tokenizer.cast(codec, args.dtype), reserved)

    return fit(args, codec, loss, batches, evaluate, after_step, extra=[chosen])


def reconstruction_loss(made, images):
    """Squared, absolute and edge errors of reconstructions (B, 3, H, W)."""
    edges = sum(F.l1_loss(made.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
    return F.mse_loss(made, images) + 0.5 * F.l1_loss(made, images) + 0.25 * edges


def judge_tokenizer(args, codec, images):
    """Held-out squared error; PSNR in dB after each scale; codes used and their perplexity a scale.

    Draws samples/reconstructions.png: the original and the image after each scale.
    """
    errors, tokens, rows = [], [], []
    for part in images.split(at_once(args.size**2)):
        made, own = after_each_scale(args, codec, part)
        errors.append((made - part).square().mean((2, 3, 4)))  # (S, B)
        tokens.append(own)
        rows = rows or [part[:8], *made[:, :8]]

    names = ["original", *(f"after {h}x{w}" for h, w in args.scales)]
    write_sheet(args, "reconstructions", rows, names)
    errors = torch.cat(errors, 1)
    by_scale = torch.cat(tokens).split(tokenizer.lengths(args.scales), 1)
    counts = [torch.bincount(own.flatten(), minlength=len(codec["codebook"])) for own in by_scale]
    return dict(
        loss=errors[-1].mean().item(),
        psnr=(10 * torch.log10(4 / errors)).mean(1).tolist(),
        codes_used=int((sum(counts) > 0).sum()),
        perplexity=[perplexity(row) for row in counts],
    )


@torch.no_grad()
def after_each_scale(args, codec, images):
    """(images decoded after each scale (S, B, 3, H, W), tokens (B, L)) of images (B, 3, H, W)."""
    features = tokenizer.encode_features(codec, images)
    pyramid = tokenizer.quantise(codec["codebook"], codec["phi"], features, args.scales)
    made, tokens = [], []
    for _, own, f_hat in pyramid:
        made.append(tokenizer.decode_features(codec, f_hat))
        tokens.append(own)
    return torch.stack(made), torch.cat(tokens, 1)


def perplexity(counts):
    """How many codes are in even use, exp of the entropy, of counts (V,)."""
    share = counts.double() / counts.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


# Stages two and three


def train_next_scale(args, data, held_out):
    """Tokens -> a transformer that predicts every token from the coarser scales."""
    codec = finished(args, "tokenizer")
    params = trainable(initial_transformer(args, codec))
    cache = token_cache(args, "train", data, codec)
    reserved = token_cache(args, "held-out", held_out, codec)
    weights = hmar.scale_weights(args.scales, args.loss_weights).to(args.device)

    def loss(params, labels, tokens, gates):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        fast = hmar.cast(params, args.dtype)
        options = dict(gates=gates, checkpointing=args.checkpointing)
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, args.causal, **options)
        total = (losses * weights).sum(1).mean()
        return total, dict(loss=total, scale_losses=by_scale(args, losses.mean(0)))

    def batches(start):
        for step in range(start, args.steps):
            yield in_parts(args, transformer_batch(args, step, params, data.labels, cache))

    def evaluate(params):
        fast = hmar.cast(params, args.dtype)
        return judge_transformer(args, fast, codec, held_out.labels, reserved)

    return fit(args, params, loss, batches, evaluate)


def train_masked(args, data, held_out):
    """hmar.pt -> the same with a masked branch: hidden tokens from the others of their scale.

    The trunk and the next-scale branch stay as they are (HMAR, stage two).
    """
    codec = finished(args, "tokenizer")
    params = initial_masked(args)
    params = params | trainable(dict(masked=params["masked"]))
    cache = token_cache(args, "train", data, codec)
    reserved = token_cache(args, "held-out", held_out, codec)
    first = tokenizer.lengths(args.scales)[0]

    def loss(params, labels, tokens, gates, mask, places, share):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        own_inputs = tokenizer.masked_inputs(codec, tokens, args.scales, mask)
        fast = hmar.cast(params, args.dtype)
        options = dict(places=places, gates=gates, checkpointing=args.checkpointing)
        losses = hmar.masked_losses(fast, labels, tokens, inputs, own_inputs, mask, **options)
        total = (losses * share).sum()  # in all parts together, the mean over hidden tokens
        return total, dict(loss=total)

    def batches(start):
        for step in range(start, args.steps):
            batch = transformer_batch(args, step, params, data.labels, cache)
            generator = generator_of(args.seed, "mask", step)
            ratio = torch.rand(args.batch, 1, generator=generator)  # of hidden tokens
            numbers = torch.rand(args.batch, cache.shape[2] - first, generator=generator)
            mask = numbers < ratio
            share = world() * args.accumulate / mask.sum().clamp(min=1)
            parts = in_parts(args, batch | dict(mask=mask))
            for part, own in zip(parts, own_parts(args, mask)):
                places = own.flatten().nonzero()[:, 0]
                part |= to_device(dict(places=places, share=share), args.device)
            yield parts

    def evaluate(params):
        fast = hmar.cast(params, args.dtype)
        return judge_transformer(args, fast, codec, held_out.labels, reserved)

    return fit(args, params, loss, batches, evaluate)


def transformer_batch(args, step, params, labels, cache):
    """dict(labels (B,), tokens (B, L), gates (B, depth, 2)) of a step's whole batch.

    Each image in one of its views, some labels null, some branches dropped.
    """
    generator = generator_of(args.seed, args.stage, step)
    rows = [index for index, _ in step_items(args, step, len(labels))]
    views = torch.randint(cache.shape[1], (args.batch,), generator=generator).numpy()
    tokens = torch.from_numpy(cache[rows, views].astype(np.int64))

    null = len(params["classes"]) - 1
    dropped = torch.rand(args.batch, generator=generator) < LABEL_DROP
    chosen = torch.tensor(labels)[rows].masked_fill(dropped, null)

    frozen = len(params["trunk"]) if args.stage == "masked" else 0  # blocks that drop nothing
    depth = len(params["trunk"]) + len(params["next_scale"]["blocks"])
    uniform = torch.rand(args.batch, depth - frozen, 2, generator=generator)
    gates = hmar.stochastic_depth(uniform, DEPTH_DROP * depth / 24)
    gates = F.pad(gates, (0, 0, frozen, 0), value=1)
    return dict(labels=chosen, tokens=tokens, gates=gates)


def in_parts(args, batch):
    """This process's parts of a step's batch, [dict, ...], on the device."""
    split = {name: own_parts(args, tensor) for name, tensor in batch.items()}
    parts = [dict(zip(split, values)) for values in zip(*split.values())]
    return to_device(parts, args.device)


@torch.no_grad()
def judge_transformer(args, params, codec, labels, cache):
    """Held-out loss (nats) and token accuracy, in all and a scale, of the hidden half if masked.

    Draws samples/<stage>.png: eight samples of each of the first ten classes.
    """
    device, is_masked = args.device, args.stage == "masked"
    tokens = torch.from_numpy(cache[:JUDGED, 0].astype(np.int64)).to(device)
    labels = torch.tensor(labels[:JUDGED], device=device)
    lengths = tokenizer.lengths(args.scales)
    generator = generator_of("held-out mask")
    sums = torch.zeros(3, tokens.shape[1], dtype=torch.float64, device=device)

    for own, own_labels in zip(tokens.split(32), labels.split(32)):
        inputs = tokenizer.next_scale_inputs(codec, own, args.scales)
        judged = torch.ones_like(own, dtype=torch.bool)
        if is_masked:
            mask = (torch.rand(inputs.shape[:2], generator=generator) < 0.5).to(device)
            own_inputs = tokenizer.masked_inputs(codec, own, args.scales, mask)
            logits = hmar.masked_logits(params, own_labels, inputs, own_inputs, mask)
            judged = F.pad(mask, (lengths[0], 0))  # scale 0 is never masked
        else:
            logits = hmar.next_scale_logits(params, own_labels, inputs, args.causal)
        losses = F.cross_entropy(logits.transpose(1, 2), own, reduction="none")
        numbers = torch.stack([losses, (logits.argmax(-1) == own).float(), torch.ones_like(losses)])
        sums += (numbers * judged).sum(1)

    draw_samples(args, params, codec)
    loss, accuracy, count = sums.sum(1).tolist()
    scale_sums = torch.stack([part.sum(1) for part in sums.split(lengths, 1)], 1)
    scale_losses, accuracies = (scale_sums[:2] / scale_sums[2].clamp(min=1)).tolist()
    numbers = dict(loss=loss / max(1, count), accuracy=accuracy / max(1, count))
    return numbers | dict(scale_losses=scale_losses, scale_accuracies=accuracies)


def draw_samples(args, params, codec):
    """Writes the sheet samples/<stage>.png."""
    names = args.class_names[:10]
    rows = []
    for label in range(len(names)):
        labels = torch.full((8,), label, device=args.device)
        images, _ = sample.generate(params, codec, labels, seed=8 * label, is_causal=args.causal)
        rows.append(images)
    write_sheet(args, args.stage, rows, names)


def by_scale(args, values):
    """Means (S,) of values (L,) over each scale."""
    return torch.stack([own.mean() for own in values.split(tokenizer.lengths(args.scales))])


# ---- data

SHAPES = (
    "disc", "ring", "square", "triangle", "star", "cross", "crescent", "hexagon", "arrow", "heart",
)  # fmt: skip


def polygon(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular one around (centre, 0); y points down, angles in rad."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@functools.cache
def outlines():
    """For each of SHAPES the polygon that fills it, about the unit circle, then what is cut out."""
    angle = np.linspace(0, 2 * np.pi, 48)
    height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    heart = np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1)
    outer = polygon(points=5, start=-np.pi / 2)
    inner = polygon(points=5, radius=0.4, start=-np.pi * 0.3)
    square = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    triangle = [(0, -1), (0.95, 0.7), (-0.95, 0.7)]
    arm = np.array([(-0.3, -0.3), (-0.3, -1), (0.3, -1)])
    cross = [arm @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    arrow = [(1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)]
    return dict(
        disc=[polygon()],
        ring=[polygon(), polygon(radius=0.5)],
        square=[np.array(square)],
        triangle=[np.array(triangle)],
        star=[np.stack([outer, inner], axis=1).reshape(10, 2)],
        cross=[np.concatenate(cross)],
        crescent=[polygon(), polygon(radius=0.75, centre=0.5)],
        hexagon=[polygon(points=6)],
        arrow=[np.array(arrow)],
        heart=[heart],
    )


def draw_shape(index, size=32):
    """The built-in data set: (RGB image of size x size, label), a pure function of the index.

    label = index % 10, an index into SHAPES. Bright fill on a dark background that is flat or
    blends two colours; the shape's colour, place, size and rotation (within .25 rad) vary. The
    numbers do not depend on size, so sizes show the same picture. ValueError: index < 0, size < 8.
    """
    for name, value, least in (("index", index, 0), ("size", size, 8)):
        fits = isinstance(value, (int, np.integer)) and value >= least
        require(fits, f"{name}: got {value!r}, expected an integer of at least {least}")

    label = int(index) % len(SHAPES)
    numbers = np.random.default_rng(int(index)).random(15).tolist()
    hue, saturation, value, radius, x, y, turn, blend, direction, *dark = numbers
    fill = np.float32(colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.85 + 0.15 * value))
    first = np.float32(colorsys.hsv_to_rgb(dark[0], dark[1], 0.3 * dark[2]))
    second = np.float32(colorsys.hsv_to_rgb(dark[3], dark[4], 0.3 * dark[5]))

    angle = 0.5 * turn - 0.25
    rotation = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    centre = np.array([12 + 8 * x, 12 + 8 * y]) / 32
    radius = (9.5 + 4 * radius) / 32
    mask = Image.new("L", (4 * size, 4 * size))  # four times the size, then averaged: soft edges
    for outline, ink in zip(outlines()[SHAPES[label]], (255, 0)):
        corners = (centre + radius * outline @ np.array(rotation)) * 4 * size
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=ink)
    cover = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255

    ground = first
    if blend < 0.5:
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        way = 2 * np.pi * direction
        along = (np.cos(way) * ramp + np.sin(way) * ramp[:, None]) / 2**0.5  # (size, size)
        ground = first + (second - first) * (0.5 + along)[:, :, None]
    picture = ground + cover * (fill - ground)  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8)), label


class Images(torch.utils.data.Dataset):
    """Images as (uint8 (3, size, size), label), of paths and labels or of numbers of drawings.

    A key is (index, seed), so that a sampler decides the randomness: seed None is the centre crop,
    another one decides crop and flip. A file that cannot be read is named once and replaced by the
    next of its class; ValueError when these are more than 5 % and more than ten.
    """

    def __init__(self, items, size, flip=False):
        self.items, self.size, self.flip = items, size, flip
        self.is_drawn = isinstance(items, range)
        self.labels = [i % len(SHAPES) if self.is_drawn else i[1] for i in items]
        self.broken = {}  # index -> reason

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed = key
        if self.is_drawn:  # these vary enough by themselves
            image, _ = draw_shape(self.items[index], self.size)
        else:
            image = crop(self.readable(index), self.size, seed, self.flip)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), self.labels[index]

    def readable(self, index):
        """The image of an index, or of the next one of its class that can be read."""
        for other in itertools.chain(range(index, len(self)), range(index)):
            if self.labels[other] != self.labels[index] or other in self.broken:
                continue
            try:
                return sample.read_image(self.items[other][0], shortest=2 * self.size)
            except ValueError as error:
                self.broken[other] = str(error)
                print(f"skipped: {sample.printable(error)}", file=sys.stderr)
            if len(self.broken) > max(10, 0.05 * len(self)):
                reasons = "; ".join(list(self.broken.values())[:10])
                raise ValueError(f"--data: more than 5 % of the images cannot be read: {reasons}")
        path = self.items[index][0]
        raise ValueError(f"--data: no image of the class of {path} can be read")


def crop(image, size, seed=None, flip=False):
    """An image -> size x size: the shorter side is resized to size and the centre cut out.

    With a seed (what numpy.random.default_rng takes) the shorter side becomes size to 1.125 size,
    the place is random, and with flip half are mirrored.
    """
    width, height = image.size
    reach = min(width, height)  # of the source, so that no resized image of extreme shape is made
    left, top, is_mirrored = (width - reach) // 2, (height - reach) // 2, False
    if seed is not None:
        zoom, x, y, coin = np.random.default_rng(seed).random(4).tolist()
        reach /= 1 + zoom / 8
        left, top = x * (width - reach), y * (height - reach)
        is_mirrored = flip and coin < 0.5

    box = (left, top, left + reach, top + reach)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    return ImageOps.mirror(image) if is_mirrored else image


def data_sets(args):
    """(training Images, held-out Images, class names) of --data, or of drawings."""
    if args.data is None:
        held_out = Images(range(20_000, 20_500), args.size)
        return Images(range(20_000), args.size), held_out, SHAPES
    files, names = list_images(args.data)
    train, held_out = split_held_out(files, args.data)
    return Images(train, args.size, args.flip), Images(held_out, args.size), names


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, or images alone.

    Sorted by name, searched to any depth; hidden files and files that are no images by suffix are
    passed over, links to folders not followed. ValueError for a folder that is missing, without
    images, or of both kinds.
    """
    state = "no folder" if os.path.exists(folder) else "missing"
    require(os.path.isdir(folder), f"--data: got {folder!r}, which is {state}")
    groups = {}
    for place, folders, names in os.walk(folder, onerror=warn):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = Path(place).relative_to(folder).parts
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                groups.setdefault(parts[:1], []).append(os.path.join(place, name))

    kinds = "PNG, JPEG, WebP, BMP or GIF images"
    require(groups, f"--data: got {folder!r}, which holds no {kinds}")
    own = groups.get((), [""])[0]
    message = f"--data: got images alone in {folder!r} and {os.path.basename(own)!r} beside them"
    require(not own or len(groups) == 1, f"{message}, expected one sub-folder a class or no folder")
    groups = sorted(groups.items())
    names = [parts[0] if parts else Path(folder).resolve().name for parts, _ in groups]
    return [(path, i) for i, (_, paths) in enumerate(groups) for path in paths], names


def warn(error):
    """Names a folder that cannot be read."""
    print(f"passed over: {sample.printable(error)}", file=sys.stderr)


def split_held_out(files, folder):
    """(training, held out) parts of [(path, label), ...], in the order of a hash of the path.

    The path is the one inside the folder, so that a copy is split alike. ValueError: under two.
    """
    require(len(files) >= 2, f"--data: got {len(files)} image in {folder}, expected at least two")

    def place(file):
        name = os.path.relpath(file[0], folder).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(name)).digest()

    ordered = sorted(files, key=place)
    count = math.ceil(HELD_OUT * len(files))
    return ordered[count:], ordered[:count]


def generator_of(*key):
    """Randomness as a function of where it is used: (seed, stage, step, ...)."""
    number = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of an epoch's items, the same on every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).tolist()


def step_items(args, step, count):
    """[(index, draw), ...] of a step: every item once an epoch; draw numbers them over the run."""
    draws = range(step * args.batch, (step + 1) * args.batch)
    return [(epoch_order(args.seed, draw // count, count)[draw % count], draw) for draw in draws]


def loader(args, data, start):
    """Batches (uint8 images (B / processes, 3, size, size), labels) from step `start` on."""
    share = args.batch // world()
    own = slice(rank() * share, (rank() + 1) * share)

    def keys():
        for step in range(start, args.steps):
            items = step_items(args, step, len(data))[own]
            yield [(index, (args.seed, draw)) for index, draw in items]

    workers = dict(num_workers=args.workers, worker_init_fn=stand_apart)
    return torch.utils.data.DataLoader(data, batch_sampler=keys(), **workers)


def first_images(data, count, args):
    """The first `count` images, centre crops, (B, 3, size, size) in [-1, 1]."""
    rows = range(min(len(data), count))
    return to_unit(torch.stack([data[index, None][0] for index in rows]), args.device)


def to_unit(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return to_device(images, device).float() / 127.5 - 1


def token_cache(args, name, data, codec):
    """Tokens of all images, a memory-mapped array (N, views, L), encoded once by the codec.

    The first view is the centre crop; a small folder's images have several random crops besides.
    Kept in the run folder, made anew where codec or images changed, or it is not whole.
    """
    views = 1
    if not data.is_drawn and name == "train":
        views = min(MOST_VIEWS, max(1 + args.flip, VIEWS_IN_ALL // len(data)))
    dtype = np.uint16 if len(codec["codebook"]) <= 2**16 else np.int32
    shape = (len(data), views, sum(tokenizer.lengths(args.scales)))
    path = os.path.join(args.out, f"tokens-{name}.npy")
    key = dict(codec=digest(codec), images=fingerprint(data), dtype=str(args.dtype), seed=args.seed)
    key |= dict(
        shape=shape, flip=args.flip, size=os.path.getsize(path) if os.path.exists(path) else 0
    )

    if json.loads(json.dumps(key)) != read_json(f"{path}.json"):
        rows = range(len(data))
        own = rows[rank() * len(rows) // world() : (rank() + 1) * len(rows) // world()]
        save_array(f"{path}.{rank()}", encoded(args, name, data, codec, own, views).astype(dtype))
        barrier()
        if rank() == 0:
            parts = [f"{path}.{number}" for number in range(world())]
            save_array(path, np.concatenate([np.load(part) for part in parts]))
            write_json(f"{path}.json", key | dict(size=os.path.getsize(path)))
            for part in parts:
                os.remove(part)
    barrier()
    return np.load(path, mmap_mode="r")


def encoded(args, name, data, codec, rows, views):
    """Tokens (len(rows), views, L) of a range of images."""
    fast = tokenizer.cast(codec, args.dtype)
    tokens = []
    for first in rows[::64]:
        part = range(first, min(first + 64, rows.stop))
        keys = [(i, (args.seed, view, i) if view else None) for i in part for view in range(views)]
        images = to_unit(torch.stack([data[key][0] for key in keys]), args.device)
        for few in images.split(at_once(args.size**2)):
            tokens.append(tokenizer.encode(fast, few, args.scales).cpu())
        if part.stop % 4096 < 64 or part.stop == rows.stop:
            say(f"encoding {name} {part.stop}/{rows.stop}")
    return torch.cat(tokens).unflatten(0, (len(rows), views)).numpy()


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = sample.Parser(
        "python train.py [STAGE] [flags]: train HMAR from nothing. (auto) follows --size."
    )
    positive = sample.number(int, 1)
    size = sample.number(int, 1, 2**16)  # more only takes for ever to be refused
    add = top.add_argument_group("data").add_argument
    add("--data", help="images, a sub-folder a class or all in one (drawings)")
    add("--size", type=size, help="side of the images (256, drawings 32)")
    add("--flip", action="store_true", help="mirror images at random")
    add("--workers", type=sample.number(int, 0, 1024), default=0, help="that decode")
    add = top.add_argument_group("run").add_argument
    add("stage", nargs="?", default="all", choices=("all", *STAGES))
    add("--out", help="run folder (runs/shapes or runs/<data folder>)")
    add("--init", help="start the one stage from these weights, ours or published")
    add("--tokenizer", help="use this finished tokenizer, ours or published")
    add("--restart", action="store_true", help="begin the run folder anew")
    add("--seed", type=sample.number(int, 0), default=0, help="of all randomness (0)")
    add("--save-every", type=positive, default=500, help="steps, for going on after a kill (500)")
    add("--device", help="cuda or cpu (the first there is)")
    add("--dtype", choices=("bf16", "fp32"), help="(bf16 where the processor has it)")
    add("--compile", action="store_true", help="torch.compile the training step")
    add = top.add_argument_group("optimisation").add_argument
    add("--steps", type=positive, help="of each stage (auto)")
    add("--batch", type=size, help="images a step, over all processes (auto)")
    add("--accumulate", type=size, help="parts of a batch, saves memory (auto)")
    add("--lr", type=sample.number(float, 1e-9, 1e3), help="at its peak (auto)")
    add("--warmup", type=sample.number(int, 0), help="to the peak (auto)")
    add("--ema", type=sample.number(float, 0, 1), help="of saved weights (auto)")
    add("--checkpointing", action="store_true", help="compute activations twice, saves memory")
    add = top.add_argument_group("model").add_argument
    add("--scales", nargs="+", type=sample.scale_pair, help="4 or 2x3 each (auto)")
    add("--codes", type=positive, help="codebook size (auto)")
    add("--code-dim", type=size, help="dimensions of a code (auto)")
    add("--channels", type=size, help="tokenizer's, a multiple of 32 (auto)")
    add("--multipliers", nargs="+", type=sample.number(int, 1, 64), help="a level each (auto)")
    add("--depth", type=sample.number(int, 1, 1000), help="transformer blocks (auto)")
    add("--width", type=size, help="of the transformer (auto)")
    add("--masked-blocks", type=size, help="the masked branch's own (auto)")
    add("--loss-weights", choices=("token", "scale", "lognormal"), help="(auto)")
    add("--causal", action="store_true", help="VAR: attend to coarser scales, no masked stage")
    return top


def train(args):
    """The stages that the flags ask for, in order."""
    args.device = start_processes(args.device)
    args.dtype = sample.find_dtype(args.dtype, args.device)
    args = resolved(args)
    data, held_out, args.class_names = data_sets(args)
    claim_folder(args, data, held_out)
    say(
        f"{args.out}: {len(data)} images to train on, {len(held_out)} held out, "
        f"{len(args.class_names)} classes; {args.device}, {str(args.dtype)[6:]}, "
        f"{torch.get_num_threads()} threads, processes: {world()}"
    )
    if args.device.type == "cpu" and args.size > LARGEST_SMALL:
        say("a model of the published size, made for GPUs: on a CPU its steps take minutes")

    work = {"tokenizer": train_tokenizer, "next-scale": train_next_scale, "masked": train_masked}
    for stage in args.stages:
        path = os.path.join(args.out, STAGES[stage])
        if stage in read_run(args)["made"]:
            say(f"{stage}: finished before, {path}")
            continue
        own = dict(stage=stage, steps=args.steps[stage], lr=args.lr[stage])
        own["judge_every"] = math.ceil(own["steps"] / JUDGEMENTS)
        tree = work[stage](argparse.Namespace(**vars(args) | own), data, held_out)
        finish(args, stage, tree)
    say(f"finished: {args.out} holds weights, metrics.jsonl and samples/")
    say(f"next: python sample.py {args.out}")


def resolved(args):
    """The flags with every (auto) filled in. ValueError that names what does not fit."""
    if args.size is None:
        args.size = 32 if args.data is None else 256
    for name, presets in PRESETS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, presets[args.size > LARGEST_SMALL])
    for name in ("steps", "lr"):  # one number for all stages, or one for each
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else [value] * len(STAGES)
        setattr(args, name, dict(zip(STAGES, values)))
    if args.out is None:
        folder = "shapes" if args.data is None else os.path.basename(os.path.abspath(args.data))
        args.out = os.path.join("runs", folder)

    left_out = {"tokenizer": args.tokenizer is not None, "next-scale": False, "masked": args.causal}
    asked = [stage for stage in STAGES if args.stage in ("all", stage)]
    args.stages = [stage for stage in asked if not left_out[stage]]
    require(args.stages, f"{args.stage}: there is no such stage with --tokenizer or --causal")
    fits = args.init is None or args.stage in ("tokenizer", "next-scale")
    require(fits, "--init: needs the stage that it starts, tokenizer or next-scale")

    step = downsampling(args)
    side = args.size // step
    require(args.size % step == 0, f"--size: got {args.size}, expected a multiple of {step}")
    args.scales = tuple(args.scales or default_scales(side))
    tokenizer.check_scales(args.scales)
    fits = args.scales[-1] == (side, side) and len(args.scales) > 1
    message = f"--scales: got {sides(args.scales)}, expected two or more, the last"
    require(fits, f"{message} {side}, {args.size} pixels / {step}")
    width = args.width or 64 * args.depth
    head_dim = width // max(1, width // 64)  # where the heads divide it, as hmar.init checks
    message = f"--width: got {width}, heads of {head_dim} dimensions"
    require(head_dim % 8 == 0 and head_dim >= 16, f"{message}, expected a multiple of 8 from 16 on")
    with torch.device("meta"):  # what does not fit is told before the first stage, not after it
        tokenizer.init(**{name: getattr(args, name) for name in TOKENIZER_SIZES})
        hmar.init(depth=args.depth, width=args.width, scales=args.scales, codes=args.codes)

    if args.accumulate is None:  # as few parts as memory allows
        args.accumulate = max(1, math.ceil(args.batch / (world() * at_once(args.size**2))))
        while args.batch % (args.accumulate * world()) and args.accumulate < args.batch:
            args.accumulate += 1
    fits = args.batch % (args.accumulate * world()) == 0
    message = f"--batch: got {args.batch}, expected a multiple of {args.accumulate} parts"
    require(fits, f"{message} on {world()} processes")
    return args


def downsampling(args):
    """Pixels a side of a latent cell, of the codec that is given, in the run folder, or to come."""
    path = args.init if args.stage == "tokenizer" else args.tokenizer
    own = os.path.join(args.out, "tokenizer.pt")
    if path is None and args.stage in ("next-scale", "masked") and os.path.exists(own):
        path = own
    if path is None:
        return 2 ** (len(args.multipliers) - 1)
    return tokenizer.downsampling(load_tokenizer(path))


def default_scales(latent):
    """Scales for a latent of latent x latent: published ones, else sides that grow by about 3/2."""
    for published in hmar.SCALES.values():
        if published[-1][0] == latent:
            return published
    made = [latent]
    while made[0] > 1:
        made.insert(0, max(1, min(made[0] - 1, round(made[0] / 1.4))))
    return tuple((side, side) for side in made)


def sides(scales):
    """The scales as --scales takes them."""
    return " ".join(str(h) if h == w else f"{h}x{w}" for h, w in scales)


def initial_tokenizer(args):
    """A new codec of the flags' sizes, or --init's."""
    if args.init is not None:
        return to_device(load_tokenizer(args.init), args.device)
    sizes = {name: getattr(args, name) for name in TOKENIZER_SIZES}
    return to_device(tokenizer.init(**sizes, seed=args.seed), args.device)


def initial_transformer(args, codec):
    """A new transformer of the flags' sizes, or --init's for these scales and classes."""
    codes, code_dim = codec["codebook"].shape
    sizes = dict(codes=codes, code_dim=code_dim, classes=len(args.class_names), scales=args.scales)
    if args.init is None:
        own = dict(depth=args.depth, width=args.width, gamma=args.gamma, seed=args.seed)
        return to_device(hmar.init(**sizes, **own), args.device)

    params = load_transformer(args.init)
    params.pop("masked", None)
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    params |= dict(trunk=blocks, next_scale=params["next_scale"] | dict(blocks=[]))
    if hmar.scales(params) != args.scales:
        say(f"--init: positions resampled for the scales {sides(args.scales)}")
        params = hmar.resize_positions(params, args.scales)
    if len(params["classes"]) != len(args.class_names) + 1:
        say(f"--init: a new class embedding for {len(args.class_names)} classes")
        width = params["classes"].shape[1]
        new = hmar.init(**sizes, depth=1, width=width, heads=1, seed=args.seed)
        params["classes"] = new["classes"]
    got = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
    message = f"--init: got {got[0]} codes of {got[1]} dimensions, expected the tokenizer's"
    require(got == (codes, code_dim), f"{message} {codes} of {code_dim}")
    return to_device(params, args.device)


def initial_masked(args):
    """hmar.pt with a new masked branch."""
    params = finished(args, "next-scale")
    blocks = min(args.masked_blocks, len(params["trunk"]) + len(params["next_scale"]["blocks"]))
    return hmar.add_masked_branch(params, blocks, seed=args.seed)


# ---- run folders and processes


class Trained(torch.nn.Module):
    """The thinnest module that DDP and torch.compile take: a tree's parameters, a loss."""

    def __init__(self, tree, loss):
        super().__init__()
        leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.nn.Parameter)]
        self.leaves, self.tree, self.loss = torch.nn.ParameterList(leaves), tree, loss

    def forward(self, **batch):
        return self.loss(self.tree, **batch)


def trainable(tree):
    """The tree with its leaves as parameters, contiguous, since Muon works on views of them."""
    order = torch.contiguous_format

    def fresh(tensor):
        return torch.nn.Parameter(tensor.clone(memory_format=order))

    return pytree.tree_map(fresh, tree)


def with_leaves(tree, leaves):
    """The tree with its parameters replaced, in order, and everything detached."""
    leaves = iter(leaves)

    def replaced(leaf):
        return next(leaves) if isinstance(leaf, torch.nn.Parameter) else leaf

    return pytree.tree_map(lambda leaf: replaced(leaf).detach(), tree)


def wrapped(model, args):
    """What is called for the loss: the model itself, compiled, or spread over the processes."""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # parts of different sizes each compile anew
        model = torch.compile(model)
    if world() == 1:
        return model
    devices = [args.device] if args.device.type == "cuda" else None
    unused = args.stage == "tokenizer"  # a phi that serves no scale
    wrap = torch.nn.parallel.DistributedDataParallel
    return wrap(model, device_ids=devices, find_unused_parameters=unused)


class Checkpoint:
    """What a stage goes on from after a kill, STAGE.resume.pt, and its best weights, STAGE.best.pt.

    All tensors are written over in place when a run goes on.
    """

    def __init__(self, args, leaves, average, extra, optimizer):
        self.args, self.average, self.optimizer = args, average, optimizer
        self.state, self.extra = [*leaves, *average], list(extra)
        self.step, self.best_step, self.best_loss = 0, 0, math.inf
        self.path = os.path.join(args.out, f"{args.stage}.resume.pt")
        self.best_path = os.path.join(args.out, f"{args.stage}.best.pt")
        if os.path.exists(self.path):
            self.load()
        drop_metrics(args, self.step)

    def load(self):
        saved = sample.load(self.path)
        try:
            self.step, self.best_step, self.best_loss = saved["progress"]
            self.optimizer.load_state_dict(saved["optimizer"])
            torch._foreach_copy_([*self.state, *self.extra], saved["state"])
        except Exception as error:
            raise ValueError(f"{self.path}: expected this stage's checkpoint") from error
        for tensor in self.extra if rank() else ():  # saved as sums, which the first one carries on
            tensor.zero_()
        say(f"{self.args.stage}: continues at step {self.step} of {self.args.steps}")

    def save(self, step):
        state = [*self.state, *(summed(tensor) for tensor in self.extra)]
        progress = (step, self.best_step, self.best_loss)
        saved = dict(progress=progress, state=state, optimizer=self.optimizer.state_dict())
        save(self.path, saved)

    def keep_best(self, step, loss):
        if loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            save(self.best_path, self.average)

    def is_over(self, step):
        """Whether all steps are done, or the held-out loss has long stopped to fall."""
        wait = PATIENCE * self.args.steps
        if step < self.args.steps and step - self.best_step >= wait:
            say(f"{self.args.stage}: stopped early at step {step}; best at {self.best_step}")
            return True
        return step == self.args.steps

    def best(self):
        say(f"{self.args.stage}: kept step {self.best_step}, loss {self.best_loss:.4g} held out")
        barrier()
        return to_device(sample.load(self.best_path), self.args.device)


class StopSignal:
    """Whether Ctrl-C or SIGTERM asked the run to save and end; a second one ends it at once."""

    def __init__(self):
        self.asked = False
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in signals}

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, signal.default_int_handler)

    def agreed(self, step, device):
        """The same answer on every process, asked every tenth step where there are several."""
        if world() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        return step % 10 == 0 and bool(summed(asked))

    def close(self):
        """Ends the watch; what was asked during the last step ends the run now."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked:
            raise KeyboardInterrupt


def claim_folder(args, data, held_out):
    """Makes the run folder this run's own: one process at a time, one set of flags, one data set.

    args.json holds the flags, the class names, a fingerprint of the images and the digests of what
    is made. ValueError where the folder is in use, somebody else's, or was begun differently.
    """
    os.makedirs(args.out, exist_ok=True)
    args.lock = locked(args) if rank() == 0 else None
    before = read_run(args)
    run = json.loads(json.dumps(run_record(args, data, held_out)))  # as it comes back from a file
    there = [path for path in own_files(args) if os.path.exists(path)]
    advice = "--out NAME begins another run, --restart this one anew"

    if before is None:
        message = f"{args.out}: holds {', '.join(map(os.path.basename, there))} but no args.json"
        require(not there or args.restart, f"{message}; {advice}")
    elif not args.restart:
        differ = []
        for name, value in run["flags"].items():
            old = before["flags"].get(name)
            need_not_repeat = name in ("init", "tokenizer") and value is None
            if old != value and not need_not_repeat:
                differ.append(f"{name} {old} -> {value}")
        require(not differ, f"{args.out}: begun with other flags: {', '.join(differ)}; {advice}")
        fits = before["images"] == run["images"]
        require(fits, f"{args.out}: the images in {args.data} have changed; {advice}")
    barrier()  # every process has looked

    if rank() == 0:
        remove_unfinished(args)
        os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
    if rank() == 0 and (before is None or args.restart):
        for path in there:
            os.remove(path)
        write_json(os.path.join(args.out, "args.json"), run)
    barrier()
    if args.tokenizer is not None and "tokenizer" not in read_run(args)["made"]:
        finish(args, "tokenizer", load_tokenizer(args.tokenizer))


def locked(args):
    """The run folder's lock file, held while this process lives."""
    file = open(os.path.join(args.out, "lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{args.out}: another process trains in it") from error
    return file


def remove_unfinished(args):
    """Removes what a kill left half written, of the run's own files alone."""
    own = "|".join(re.escape(os.path.basename(path)) for path in own_files(args))
    for name in os.listdir(args.out):
        if re.fullmatch(rf"(args\.json|{own})(\.\d+)?\.\d+\.tmp", name):
            os.remove(os.path.join(args.out, name))


def run_record(args, data, held_out):
    """What args.json says of a run that begins."""
    flags = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    flags |= dict(dtype=str(args.dtype)[6:], data=args.data and os.path.abspath(args.data))
    images = [fingerprint(data), fingerprint(held_out)]
    names = list(args.class_names)
    return dict(flags=flags, class_names=names, causal=args.causal, images=images, made={})


def own_files(args):
    """Paths of what a run writes into its folder, but for args.json, lock and samples/."""
    names = ["tokenizer.pt", "hmar.pt", "metrics.jsonl"]
    names += [f"{stage}.{kind}.pt" for stage in STAGES for kind in ("resume", "best")]
    names += [f"tokens-{part}.npy{end}" for part in ("train", "held-out") for end in ("", ".json")]
    return [os.path.join(args.out, name) for name in names]


def read_run(args):
    """args.json as a dict, None where there is none. ValueError where it is something else."""
    path = os.path.join(args.out, "args.json")
    if not os.path.exists(path):
        return None
    run = read_json(path)
    kinds = dict(flags=dict, made=dict, class_names=list, images=list)
    fits = isinstance(run, dict) and all(isinstance(run.get(name), kinds[name]) for name in kinds)
    require(fits, f"{path}: expected what train.py wrote; --restart begins the run anew")
    return run


def finish(args, stage, tree):
    """Writes a stage's weights, then their digest into args.json; its checkpoints go."""
    save(os.path.join(args.out, STAGES[stage]), tree)
    if rank() == 0:
        run = read_run(args)
        run["made"][stage] = digest(tree)
        write_json(os.path.join(args.out, "args.json"), run)
        for kind in ("resume", "best"):
            path = os.path.join(args.out, f"{stage}.{kind}.pt")
            if os.path.exists(path):
                os.remove(path)
    barrier()


def finished(args, stage):
    """The weights that an earlier stage left. ValueError where they are missing or others.

    A masked branch goes: a kill may have come when hmar.pt had it and args.json did not say so.
    """
    path = os.path.join(args.out, STAGES[stage])
    require(os.path.exists(path), f"{path} is missing; python train.py {stage} makes it")
    tree = load_tokenizer(path) if stage == "tokenizer" else load_transformer(path)
    tree.pop("masked", None)
    made = read_run(args)["made"].get(stage)
    require(digest(tree) == made, f"{path}: not what this run made; --restart begins it anew")
    return to_device(tree, args.device)


def fingerprint(data):
    """A digest of the list of images: names, sizes and times of files, or numbers of drawings."""
    total = hashlib.sha256()
    for item in [data.items] if data.is_drawn else data.items:
        if not data.is_drawn:
            stat = os.stat(item[0])
            item = (os.path.abspath(item[0]), item[1], stat.st_size, stat.st_mtime_ns)
        total.update(repr(item).encode())
    return total.hexdigest()[:16]


def log(args, step, **numbers):
    """Adds a line to metrics.jsonl and prints it. ValueError where a number is not finite."""
    line = json.dumps(dict(stage=args.stage, step=step, **numbers))
    require_finite(args, step, not re.search(r"\b(NaN|Infinity)\b", line))
    if rank() == 0:
        with open(os.path.join(args.out, "metrics.jsonl"), "a") as file:
            file.write(line + "\n")
        shown = [
            f"{name} {value:.4g}" for name, value in numbers.items() if not isinstance(value, list)
        ]
        say(f"{args.stage} {step}/{args.steps}  {'  '.join(shown)}")


def require_finite(args, step, fits):
    """ValueError that says what to do, unless all was finite."""
    message = f"{args.stage}: loss or gradient is not finite at step {step}; a lower --lr may help;"
    require(fits, f"{message} the last checkpoint is kept")


def drop_metrics(args, step):
    """Removes the lines past the step that a stage goes on from, which it will write again."""
    path = os.path.join(args.out, "metrics.jsonl")
    if rank() or not os.path.exists(path):
        return
    kept = []
    for line in Path(path).read_text().splitlines(True):
        # a kill may have cut the last one
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)["stage"] != args.stage or json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


def shown(report):
    """What of a loss's report is for metrics: the tensors, detached; lists are for after_step."""
    return {name: value.detach() for name, value in report.items() if torch.is_tensor(value)}


def means(window):
    """{name: mean number or numbers} of reports, over the steps and over all processes."""
    stacked = {name: torch.stack([report[name] for report in window]) for name in window[0]}
    return {name: (summed(rows.mean(0)) / world()).tolist() for name, rows in stacked.items()}


def own_parts(args, rows):
    """This process's part of a tensor with a row a sample, in --accumulate parts."""
    parts = rows.tensor_split(world() * args.accumulate)
    return parts[rank() * args.accumulate :][: args.accumulate]


def to_device(tree, device):
    """The tree on a device; from pinned memory to CUDA, so that nothing waits for the copy."""

    def send(tensor):
        pinned = device.type == "cuda" and tensor.is_cpu
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

    return pytree.tree_map(send, tree)


def rank():
    """This process's number among those that torchrun started, else 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    """How many processes torchrun started, else 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier():
    """Waits for the other processes."""
    if world() > 1:
        torch.distributed.barrier()


def summed(tensor):
    """A tensor, added up over the processes."""
    tensor = tensor.clone()
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gathered(tensor):
    """The rows of all processes, each of which has as many."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def start_processes(device):
    """Joins torchrun's processes, if there are several, and returns this one's device."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = sample.find_device(device)
    if several:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Asks glibc to keep what is freed: faulting it in again takes a tenth of a small step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def stand_apart(_):
    """Of a worker that decodes: Ctrl-C is for the run alone, which saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(line):
    """Prints a line, once however many processes there are."""
    if rank() == 0:
        print(sample.printable(line), flush=True)


def save(path, tree):
    """Writes a tree of tensors: the old file or the whole new one. OSError if it cannot."""
    if rank() == 0:
        plain = pytree.tree_map(lambda x: x.detach().cpu() if torch.is_tensor(x) else x, tree)
        write_atomically(path, lambda file: torch.save(plain, file))


def save_array(path, array):
    """Writes an .npy file, whole or not at all."""
    write_atomically(path, lambda file: np.save(file, array))


def write_json(path, value):
    """Writes a JSON file, whole or not at all."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_sheet(args, name, rows, names):
    """Writes samples/<name>.png."""
    if rank() == 0:
        path = os.path.join(args.out, "samples", f"{name}.png")
        page = sample.sheet(rows, names)
        write_atomically(path, lambda file: page.save(file, "PNG"))


def main(argv=None):
    """The command; see `sample.command`."""
    try:
        return sample.command("train.py", train, parser(), argv)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
