"""Training: drawn shapes or a folder of images -> tokenizer.pt and hmar.pt; `python train.py`.

    images -> tokenizer stage -> tokens (N, views, L) -> next-scale stage -> masked stage

The settings, then `fit`, the loop of all stages; then each stage, how it is judged, data, the
command; run folders and processes come last. All randomness and the order of the data are functions
of seed and step, so a killed run continues bit for bit though none of them is saved.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import colorsys
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
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
    rank,
    read_json,
    require,
    world,
    write_atomically,
)

# what each leaves
STAGES = {"tokenizer": "tokenizer.pt", "next-scale": "hmar.pt", "masked": "hmar.pt"}

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
    "save_every": (250, 500),
    "steps": ((1150, 1200, 250), (200_000, 400_000, 80_000)),  # of each stage
    "lr": ((4e-3, 4e-3, 1e-3), (1e-4, 1e-4, 1e-4)),
}
LARGEST_SMALL = 64  # pixels
COOL_DOWN = 0.6  # last share of the steps: the rate falls to zero
CLIP = 1.0  # largest gradient norm
WEIGHT_DECAY = 0.05  # on matrices alone
BETAS = (0.9, 0.95)  # AdamW's
MOMENTUM = 0.95  # Muon's
MUON_TOGETHER = 2**22  # numbers in the matrices of a shape that are stepped together
NOT_FOR_MUON = (  # what faces other than features, and modulation
    "classes|start|levels|positions|codebook|phi|quant_conv|conv_in|conv_out|head|input|modulation"
)
LABEL_DROP = 0.1  # labels made null, for guidance
DEPTH_DROP = 0.1  # stochastic depth of the last block at depth 24, in proportion at others
REVIVE_EVERY = 20  # steps; then codes that nobody chose are replaced, until 80 % of the run
COARSE_EVERY = 4  # images of a batch: one of them is decoded from its coarse scales too
COARSE_WEIGHT = 0.5  # of the squared error of these
HUE_WEIGHT = 0.28  # of the share of the hues' variance that is lost
LOG_EVERY = 50  # steps
JUDGEMENTS = 6  # looks at held-out images in a stage
JUDGED = 128  # held-out images, at most
PATIENCE = 1 / 3  # of the steps without a better loss end a stage
HELD_OUT = 0.05  # share of the images
VIEWS_IN_ALL = 20_000  # a small folder's images are encoded in several random crops each,
MOST_VIEWS = 16  # but in no more than these
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
TOKENIZER_SIZES = ("codes", "code_dim", "channels", "multipliers", "residual_blocks", "attention")
UNRECORDED = (  # flags that change no result
    "stage", "stages", "out", "restart", "save_every", "workers", "device", "accumulate",
    "class_names", "lock", "checkpointing",
)  # fmt: skip


def fit(args, tree, loss, batches, evaluate, after_step=lambda *_: None, extra=()):
    """`tree` with those moving averages of its parameters that were best on held-out images.

    args.steps and .lr are of this stage. loss(tree, **batch) -> (scalar, {name: tensor} to log);
    batches(start) yields each step's batch, a dict a part; evaluate(tree) -> {name: numbers}, the
    lowest "loss" is best; after_step(step, reports, optimizer) may change tree, extra and reports.
    """
    model = Trained(tree, loss)
    leaves = list(model.leaves)
    current = [leaf.detach() for leaf in leaves]
    average = [leaf.clone() for leaf in current]
    best = [leaf.clone() for leaf in current]
    optimizer = Optimizer(tree)
    state = [*current, *average, *best, *optimizer.moments, *extra]
    start, best_step, best_loss = resume(args, state)
    call = wrapped(model, args)
    judge_every = math.ceil(args.steps / JUDGEMENTS)
    window = []  # what was reported since the last line of metrics

    with stop_signals(args.device) as asked_to_stop:
        for step, parts in enumerate(batches(start), start + 1):
            rate = learning_rate(step, args)
            reports, norm = optimise(call, parts, leaves, optimizer, rate)
            torch._foreach_lerp_(average, current, 1 - min(args.ema, step / (step + 10)))
            after_step(step, reports, optimizer)

            window += [{"gradient": norm} | report for report in reports]
            if step % LOG_EVERY == 0 or step == args.steps:
                log(args, step, rate=rate, **means(window))
                window.clear()

            if step % judge_every == 0 or step == args.steps:
                numbers = evaluate(with_leaves(tree, average))
                log(args, step, **{f"held_out_{name}": value for name, value in numbers.items()})
                if numbers["loss"] < best_loss:
                    best_step, best_loss = step, numbers["loss"]
                    torch._foreach_copy_(best, average)
                elif step < args.steps and step - best_step >= PATIENCE * args.steps:
                    say(f"{args.stage}: stopped early at step {step}; best at {best_step}")
                    break

            stops = asked_to_stop(step)
            if stops or step % args.save_every == 0:
                require_finite(args, step, norm.isfinite())  # nan weights give a nan norm
                keep(args, state, (step, best_step, best_loss))
            if stops:
                raise KeyboardInterrupt(f"{args.stage}: stopped and saved at step {step}")

    say(f"{args.stage}: kept step {best_step}, loss {best_loss:.4g} held out")
    return with_leaves(tree, best)


def optimise(call, parts, leaves, optimizer, rate):
    """(reports of the loss, norm of the gradient) of one step over a batch in parts."""
    reports = []
    for number, batch in enumerate(parts, 1):
        alone = world() > 1 and number < len(parts)  # gradients are added up with the last part's
        with call.no_sync() if alone else contextlib.nullcontext():
            value, report = call(**batch)
            (value / len(parts)).backward()
        reports.append(pytree.tree_map(torch.Tensor.detach, report))

    norm = torch.nn.utils.clip_grad_norm_(leaves, CLIP)
    optimizer.step(rate)
    return reports, norm


class Optimizer:
    """Muon for the matrices inside the networks (Jordan et al. 2024), AdamW for everything else.

    A convolution's weight is a matrix of its outputs. Those of one shape are stepped together,
    in half the time. Muon's steps are scaled to AdamW's size: one rate for both (Liu et al. 2025).
    """

    def __init__(self, tree):
        by_shape, others = {}, []
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if not isinstance(leaf, torch.nn.Parameter):
                continue
            if leaf.ndim < 2 or re.search(NOT_FOR_MUON, pytree.keystr(path)):
                others.append(leaf)
            else:
                by_shape.setdefault(leaf.shape, []).append(leaf)

        self.groups = []
        for shape, leaves in by_shape.items():
            count = max(1, MUON_TOGETHER // shape.numel())
            self.groups += [leaves[i : i + count] for i in range(0, len(leaves), count)]
        self.momenta = [torch.stack(group).detach().flatten(2) * 0 for group in self.groups]
        self.adamw = torch.optim.AdamW(others, betas=BETAS, weight_decay=0, fused=True)
        for leaf in others:
            step = torch.zeros((), device=leaf.device)
            first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
            self.adamw.state[leaf] = dict(step=step, exp_avg=first, exp_avg_sq=second)
        self.moments = [*self.momenta, *pytree.tree_leaves([*self.adamw.state.values()])]

    @torch.no_grad()
    def step(self, rate):
        for leaves, momentum in zip(self.groups, self.momenta):
            gradients = torch.stack([leaf.grad for leaf in leaves]).flatten(2)  # (N, rows, columns)
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, MOMENTUM))  # Nesterov
            size = 0.2 * math.sqrt(max(updates.shape[1:]))
            for leaf, update in zip(leaves, updates):
                leaf.mul_(1 - rate * WEIGHT_DECAY)
                leaf.sub_(update.reshape(leaf.shape), alpha=rate * size)
                leaf.grad = None

        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()

    def forget(self, leaf, rows):
        """Sets the moments of some rows of a leaf to zero."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.adamw.state[leaf][name][rows] = 0


def orthogonal(matrices):
    """(N, rows, columns), bf16, singular values about 1, by Newton-Schulz (Jordan et al. 2024)."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)

    for _ in range(5):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if is_tall else x


def learning_rate(step, args):
    """Of step 1, 2, ...: warm-up, constant, then linear to zero (Hägele et al. 2024)."""
    left = 1 - (step - 1) / args.steps
    return args.lr * min(1, step / max(1, args.warmup), left / COOL_DOWN)


# ---- the tokenizer stage


def train_tokenizer(args, data, held_out):
    """Images -> a codec each of whose scales is an image; dead codes are replaced on the way."""
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    sizes = {name: getattr(args, name) for name in TOKENIZER_SIZES}
    codec = load_tokenizer(args.init) if args.init else tokenizer.init(**sizes, seed=args.seed)
    codec = trainable(to_device(codec, args.device))
    codebook = codec["codebook"]
    chosen = torch.zeros(len(codebook), dtype=torch.int64, device=args.device)  # since revival
    reserved = [held_out[index, None, 0][0] for index in range(len(held_out))[:JUDGED]]
    reserved = to_unit(torch.stack(reserved), args.device)
    variance = hues(reserved).var((1, 2, 3), correction=0).mean()

    def loss(codec, images, stops, back):
        fast = tokenizer.cast(codec, args.dtype)
        made = tokenizer.training_pass(fast, images, args.scales, stops)
        coarse = (made["coarse"] - images[: len(stops)]).square().mean((1, 2, 3)).sum()
        coarse = coarse * (min(COARSE_EVERY, args.batch) / len(images))  # the mean of a batch
        total = reconstruction_loss(made["images"], images, variance)
        total = total + COARSE_WEIGHT * coarse + made["loss"]

        numbers = dict(loss=total, coarse=coarse, quantisation=made["loss"])
        residuals = [residual[back] for residual in made["residuals"]]
        return total, numbers | dict(tokens=made["tokens"], residuals=residuals)

    def batches(start):
        for done, images in enumerate(loaded(args, data, step_keys(args, data, start)), start):
            parts = []
            pixels_of_parts = images.tensor_split(args.accumulate)
            for pixels, stop in zip(pixels_of_parts, coarse_stops(args, done)):
                stop, order = stop.sort(descending=True)  # those with a stop first, and back
                part = dict(images=to_unit(pixels[order], args.device), back=order.argsort())
                parts.append(part | dict(stops=stop[stop >= 0]))
            yield to_device(parts, args.device)

    def after_step(step, reports, optimizer):
        tokens = torch.cat([own.flatten() for report in reports for own in report.pop("tokens")])
        by_scale = zip(*(report.pop("residuals") for report in reports))
        counts = torch.zeros_like(chosen).index_add_(0, tokens, torch.ones_like(tokens))
        chosen.add_(summed(counts))
        if step == 1 or step % REVIVE_EVERY == 0 and step <= 0.8 * args.steps:
            generator = generator_of(args.seed, "revive", step)
            residuals = [gathered(torch.cat(parts)) for parts in by_scale]
            new, dead = tokenizer.revive_codes(codebook.detach(), chosen, residuals, generator)
            codebook.data.copy_(new)
            optimizer.forget(codebook, dead)
            chosen.zero_()

    judge = functools.partial(judge_tokenizer, args, reserved)
    return fit(args, codec, loss, batches, judge, after_step, extra=[chosen])


def coarse_stops(args, done):
    """Of each image, in parts, the scale up to which it is decoded alone too; -1: of none."""
    generator = generator_of(args.seed, "tokenizer", done)
    stops = torch.randint(len(args.scales) - 1, (args.batch,), generator=generator)
    every = min(COARSE_EVERY, args.batch)
    is_whole = torch.arange(args.batch) % every < every - 1
    return own_parts(args, stops.masked_fill(is_whole, -1))


def reconstruction_loss(made, images, variance):
    """Squared, absolute, edge and hue errors of reconstructions (B, 3, H, W).

    The last is the share that is lost of the variance of the data's hues: in photographs green
    varies so little beside brightness that no code was spent on it otherwise.
    """
    error = made - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    plain = error.square().mean() + 0.5 * error.abs().mean() + 0.25 * edges
    return plain + HUE_WEIGHT * hues(error).square().mean() / (variance + 0.01)


def hues(images):
    """(2, B, H / 4, W / 4): red - blue and 2 green - red - blue of images, means over 4 x 4."""
    cells = [max(1, side // 4) for side in images.shape[2:]]
    red, green, blue = F.adaptive_avg_pool2d(images, cells).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


# ---- the next-scale and the masked stage


def train_next_scale(args, data, held_out):
    """Tokens -> a transformer that predicts every token from the coarser scales."""
    codec, cache, evaluate = on_tokens(args, data, held_out)
    params = trainable(initial_transformer(args, codec))
    weights = hmar.scale_weights(args.scales, args.loss_weights).to(args.device)  # (L,)
    lengths = tokenizer.lengths(args.scales)

    def loss(params, labels, tokens, gates):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        fast = hmar.cast(params, args.dtype)
        options = dict(gates=gates, checkpointing=args.checkpointing)
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, args.causal, **options)
        total = (losses * weights).sum(1).mean()
        by_scale = [own.mean() for own in losses.mean(0).split(lengths)]
        return total, dict(loss=total, scale_losses=torch.stack(by_scale))

    def batches(start):
        for done in range(start, args.steps):
            batch = transformer_batch(args, done, params, data.labels, cache)
            yield to_device(in_parts(args, batch), args.device)

    return fit(args, params, loss, batches, evaluate)


def initial_transformer(args, codec):
    """A new transformer of the flags' sizes, or --init's for these scales and classes."""
    codes, code_dim = codec["codebook"].shape
    sizes = dict(codes=codes, code_dim=code_dim, classes=len(args.class_names), scales=args.scales)
    if args.init is None:
        own = dict(depth=args.depth, width=args.width, gamma=args.gamma, seed=args.seed)
        return to_device(hmar.init(**sizes, **own), args.device)

    params = load_transformer(args.init)
    branch = params["next_scale"]
    got = len(branch["head"]["bias"]), params["input"]["weight"].shape[1]
    expected = f"the tokenizer's {(codes, code_dim)}"
    require(got == (codes, code_dim), f"--init: got (codes, code_dim) {got}, expected {expected}")

    # all blocks are trained, so all are its own: the trunk of one without branches
    params.pop("masked", None)
    params["trunk"] += branch["blocks"]
    branch["blocks"] = []
    if hmar.scales(params) != args.scales:
        say(f"--init: positions resampled for the scales {args.scales}")
        params = hmar.resize_positions(params, args.scales)
    if len(params["classes"]) != len(args.class_names) + 1:
        say(f"--init: a new class embedding for {len(args.class_names)} classes")
        width = params["classes"].shape[1]
        new = hmar.init(**sizes, depth=1, width=width, heads=1, seed=args.seed)
        params["classes"] = new["classes"]
    return to_device(params, args.device)


def train_masked(args, data, held_out):
    """hmar.pt -> the same with a masked branch: hidden tokens from the others of their scale.

    The trunk and the next-scale branch stay as they are (HMAR, stage two).
    """
    codec, cache, evaluate = on_tokens(args, data, held_out)
    params = finished(args, "next-scale")
    blocks = min(args.masked_blocks, len(params["trunk"]) + len(params["next_scale"]["blocks"]))
    params = hmar.add_masked_branch(params, blocks, seed=args.seed)
    params |= trainable(dict(masked=params["masked"]))
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
        for done in range(start, args.steps):
            batch = transformer_batch(args, done, params, data.labels, cache)
            generator = generator_of(args.seed, "mask", done)
            ratio = torch.rand(args.batch, 1, generator=generator)  # of hidden tokens
            numbers = torch.rand(args.batch, cache.shape[2] - first, generator=generator)
            mask = numbers < ratio

            share = world() * args.accumulate / mask.sum().clamp(min=1)
            parts = in_parts(args, batch | dict(mask=mask))
            for part in parts:
                part |= dict(places=part["mask"].flatten().nonzero()[:, 0], share=share)
            yield to_device(parts, args.device)

    return fit(args, params, loss, batches, evaluate)


def on_tokens(args, data, held_out):
    """What both have in common: (codec, training tokens (N, views, L), evaluate of `fit`)."""
    codec = finished(args, "tokenizer")
    cache = token_cache(args, data, codec)
    reserved = encoded(args, held_out, codec, range(len(held_out))[:JUDGED])[:, 0]  # (B, L)
    labels = torch.tensor(held_out.labels[:JUDGED])
    judged = to_device((codec, labels, reserved), args.device)
    return codec, cache, functools.partial(judge_transformer, args, *judged)


def transformer_batch(args, done, params, labels, cache):
    """dict(labels (B,), tokens (B, L), gates (B, depth, 2)) of a whole batch after `done` steps."""
    generator = generator_of(args.seed, args.stage, done)
    rows = [index for index, _ in step_items(args, done, len(labels))]
    views = torch.randint(cache.shape[1], (args.batch,), generator=generator).numpy()
    tokens = torch.from_numpy(cache[rows, views].astype(np.int64))

    null = len(params["classes"]) - 1
    dropped = torch.rand(args.batch, generator=generator) < LABEL_DROP
    chosen = torch.tensor([labels[row] for row in rows]).masked_fill(dropped, null)

    frozen = len(params["trunk"]) if args.stage == "masked" else 0  # blocks that drop nothing
    depth = len(params["trunk"]) + len(params["next_scale"]["blocks"])
    uniform = torch.rand(args.batch, depth - frozen, 2, generator=generator)
    gates = hmar.stochastic_depth(uniform, min(0.5, DEPTH_DROP * depth / 24))
    gates = F.pad(gates, (0, 0, frozen, 0), value=1)
    return dict(labels=chosen, tokens=tokens, gates=gates)


def in_parts(args, batch):
    """This process's parts of a step's batch, [dict, ...]."""
    split = {name: own_parts(args, tensor) for name, tensor in batch.items()}
    return [dict(zip(split, values)) for values in zip(*split.values())]


# ---- how they are judged


@torch.no_grad()
def judge_tokenizer(args, images, codec):
    """Held-out squared error; PSNR in dB after each scale; codes used and their perplexity a scale.

    Draws samples/reconstructions.png: the original and the image after each scale.
    """
    codec = tokenizer.cast(codec, args.dtype)
    errors, rows = [], []
    counts = torch.zeros(len(args.scales), len(codec["codebook"]), dtype=torch.float64)
    for part in images.split(at_once(args.size**2)):
        features = tokenizer.encode_features(codec, part)
        pyramid = tokenizer.quantise(codec["codebook"], codec["phi"], features, args.scales)
        made = []
        for k, (_, tokens, f_hat) in enumerate(pyramid):
            made.append(tokenizer.decode_features(codec, f_hat))
            counts[k] += torch.bincount(tokens.flatten().cpu(), minlength=counts.shape[1])
        made = torch.stack(made)  # (S, B, 3, H, W)
        errors.append((made - part).square().mean((2, 3, 4)))
        rows = rows or [part[:8], *made[:, :8]]

    names = ["original", *(f"after {h}x{w}" for h, w in args.scales)]
    write_sheet(args, "reconstructions", rows, names)
    errors = torch.cat(errors, 1)  # (S, B)
    share = counts / counts.sum(1, keepdim=True)
    return dict(
        loss=errors[-1].mean().item(),
        psnr=(10 * torch.log10(4 / errors.clamp(min=1e-10))).mean(1).tolist(),
        codes_used=int((counts.sum(0) > 0).sum()),
        perplexity=torch.exp(-torch.xlogy(share, share).sum(1)).tolist(),  # codes in even use
    )


@torch.no_grad()
def judge_transformer(args, codec, labels, tokens, params):
    """Held-out loss (nats) and token accuracy, of the hidden half in the masked stage.

    Draws samples/<stage>.png: eight samples of each of the first ten classes.
    """
    params, codec = hmar.cast(params, args.dtype), tokenizer.cast(codec, args.dtype)
    generator = generator_of("held-out mask")
    lengths = tokenizer.lengths(args.scales)
    sums = torch.zeros(3, sum(lengths), dtype=torch.float64, device=args.device)
    for part, part_labels in zip(tokens.split(32), labels.split(32)):
        inputs = tokenizer.next_scale_inputs(codec, part, args.scales)
        judged = torch.ones_like(part, dtype=torch.bool)
        if args.stage == "masked":
            mask = torch.rand(inputs.shape[:2], generator=generator).to(args.device) < 0.5
            own_inputs = tokenizer.masked_inputs(codec, part, args.scales, mask)
            logits = hmar.masked_logits(params, part_labels, inputs, own_inputs, mask)
            judged = F.pad(mask, (lengths[0], 0))  # scale 0 is never masked
        else:
            logits = hmar.next_scale_logits(params, part_labels, inputs, args.causal)
        losses = F.cross_entropy(logits.transpose(1, 2), part, reduction="none")
        hits = logits.argmax(-1) == part
        sums += torch.stack([losses * judged, hits * judged, judged]).sum(1)

    names = args.class_names[:10]
    classes = torch.arange(len(names), device=args.device).repeat_interleave(8)
    images, _ = sample.generate(params, codec, classes, is_causal=args.causal)
    write_sheet(args, args.stage, images.split(8), names)

    by_scale = torch.stack([part.sum(1) for part in sums.split(lengths, 1)], 1)  # (3, S)
    loss, hits, count = by_scale.sum(1).tolist()
    scale_losses = (by_scale[0] / by_scale[2].clamp(min=1)).tolist()
    return dict(loss=loss / max(1, count), accuracy=hits / max(1, count), scale_losses=scale_losses)


# ---- data


def polygon(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular one around (centre, 0); y points down, angles in rad."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def heart():
    """The corners (48, 2) of a heart about the unit circle."""
    angle = np.linspace(0, 2 * np.pi, 48)
    height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1)


OUTLINES = dict(  # the polygon that is filled, about the unit circle, then what is cut out
    disc=[polygon()],
    ring=[polygon(), polygon(radius=0.5)],
    square=[[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    triangle=[[(0, -1), (0.95, 0.7), (-0.95, 0.7)]],
    star=[polygon(points=10, radius=np.tile([1, 0.4], 5), start=-np.pi / 2)],
    cross=[
        [(-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3)]
        + [(0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3)]
    ],
    crescent=[polygon(), polygon(radius=0.75, centre=0.5)],
    hexagon=[polygon(points=6)],
    arrow=[[(1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)]],
    heart=[heart()],
)
SHAPES = tuple(OUTLINES)


def draw_shape(index, size=32):
    """The built-in data set: (RGB image of size x size, label), a pure function of the index.

    label = index % 10, an index into SHAPES. Bright fill on a dark background that is flat or
    blends two colours; the shape's colour, place, size and rotation (within .25 rad) vary. The
    numbers do not depend on size, so sizes show the same picture.
    """
    index = operator.index(index)
    label = index % len(SHAPES)
    numbers = np.random.default_rng(index).random(15).tolist()
    hue, saturation, value, radius, x, y, turn, blend, direction, *dark = numbers
    fill = np.float32(colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.85 + 0.15 * value))
    first = np.float32(colorsys.hsv_to_rgb(dark[0], dark[1], 0.3 * dark[2]))
    second = np.float32(colorsys.hsv_to_rgb(dark[3], dark[4], 0.3 * dark[5]))

    angle = 0.5 * turn - 0.25
    rotation = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    centre = np.array([12 + 8 * x, 12 + 8 * y]) / 32
    radius = (9.5 + 4 * radius) / 32
    mask = Image.new("L", (4 * size, 4 * size))  # four times the size, then averaged: soft edges
    for outline, ink in zip(OUTLINES[SHAPES[label]], (255, 0)):
        corners = (centre + radius * np.array(outline) @ np.array(rotation)) * 4 * size
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


class Images:
    """Images as (uint8 (3, size, size), label), of paths and labels or of numbers of drawings.

    A key is (index, seed, turn), so that a sampler decides the randomness: seed None is the centre
    crop; with flip an odd turn mirrors. A file that cannot be read is named, once a process, and
    replaced by the next of its class; ValueError when these are more than 5 % and more than ten.
    With any_class, as for the few that are held out, by the next of all, and it takes its label.
    """

    def __init__(self, items, size, flip=False, any_class=False):
        self.items, self.size, self.flip, self.any_class = items, size, flip, any_class
        self.is_drawn = isinstance(items, range)
        self.labels = [i % len(SHAPES) if self.is_drawn else i[1] for i in items]
        self.broken = {}  # index -> reason

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed, turn = key
        if self.is_drawn:  # these vary enough by themselves
            image, _ = draw_shape(self.items[index], self.size)
        else:
            image = crop(self.readable(index), self.size, seed)
            image = ImageOps.mirror(image) if self.flip and turn % 2 else image
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), self.labels[index]

    def readable(self, index):
        """The image of an index, or of the next one of its class that can be read."""
        for other in itertools.chain(range(index, len(self)), range(index)):
            is_alike = self.any_class or self.labels[other] == self.labels[index]
            if not is_alike or other in self.broken:
                continue
            try:
                image = sample.read_image(self.items[other][0], shortest=2 * self.size)
                self.labels[index] = self.labels[other]
                return image
            except ValueError as error:
                reason = str(error)
                if self.broken.setdefault(other, reason) is reason:  # not another thread's
                    print(f"skipped: {sample.printable(reason)}", file=sys.stderr)
            if len(self.broken) > max(10, 0.05 * len(self)):
                reasons = "; ".join(list(self.broken.values())[:10])
                raise ValueError(f"--data: more than 5 % of the images cannot be read: {reasons}")
        path = self.items[index][0]
        raise ValueError(f"--data: {path} cannot be read, nor one that could take its place")


def crop(image, size, seed=None):
    """An image -> size x size: the shorter side is resized to size and the centre cut out.

    With a seed (what numpy.random.default_rng takes) the shorter side becomes size to 1.125 size
    and the place is random.
    """
    width, height = image.size
    reach = min(width, height)  # of the source, so that no resized image of extreme shape is made
    left, top = (width - reach) // 2, (height - reach) // 2
    if seed is not None:
        zoom, x, y = np.random.default_rng(seed).random(3).tolist()
        reach /= 1 + zoom / 8
        left, top = x * (width - reach), y * (height - reach)

    box = (left, top, left + reach, top + reach)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def data_sets(args):
    """(training Images, held-out Images, class names) of --data, or of drawings."""
    if args.data is None:
        held_out = Images(range(20_000, 20_500), args.size)
        return Images(range(20_000), args.size), held_out, SHAPES
    files, names = list_images(args.data)
    train, held_out = split_held_out(files, args.data)
    return Images(train, args.size, args.flip), Images(held_out, args.size, any_class=True), names


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, or images alone.

    Sorted by name, searched to any depth; hidden files and files that are no images by suffix are
    passed over, links to folders not followed. ValueError for no folder, no images, or both kinds.
    """

    def warn(error):
        print(f"passed over: {sample.printable(error)}", file=sys.stderr)

    require(os.path.isdir(folder), f"--data: got {folder!r}, expected a folder")
    groups = {}  # class -> its paths; "" for images that lie in no sub-folder
    for place, folders, names in os.walk(folder, onerror=warn):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        group = name_inside(place, folder).split(os.sep)[0]
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                groups.setdefault(group, []).append(os.path.join(place, name))

    require(groups, f"--data: got {folder!r}, which holds none of {', '.join(SUFFIXES)}")
    alone = os.path.basename(groups.get("", [""])[0])
    fits = not alone or len(groups) == 1
    require(fits, f"--data: got {folder!r} with both {alone!r} and sub-folders of images")
    classes = sorted(groups)
    names = classes if not alone else [Path(folder).resolve().name]
    return [(path, i) for i, name in enumerate(classes) for path in groups[name]], names


def split_held_out(files, folder):
    """(training, held out) parts of [(path, label), ...], in the order of a hash of the path.

    The path is the one inside the folder, so that a copy is split alike. ValueError: under two.
    """
    require(len(files) >= 2, f"--data: got {len(files)} image in {folder}, expected at least two")

    def place(file):
        return hashlib.sha256(os.fsencode(name_inside(file[0], folder))).digest()

    ordered = sorted(files, key=place)
    count = math.ceil(HELD_OUT * len(files))
    return ordered[count:], ordered[:count]


def name_inside(path, folder):
    """The part of a path below the folder that it begins with."""
    return path[len(os.fspath(folder)) :].lstrip(os.sep)


def generator_of(*key):
    """Randomness as a function of where it is used: (seed, stage, step, ...)."""
    number = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of an epoch's items, the same on every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).tolist()


def step_items(args, done, count):
    """[(index, draw), ...] of a step: every item once an epoch; draw numbers them over the run."""
    draws = range(done * args.batch, (done + 1) * args.batch)
    return [(epoch_order(args.seed, draw // count, count)[draw % count], draw) for draw in draws]


def step_keys(args, data, start):
    """Yields the keys of this process's images of each step, from step `start` on."""
    share = args.batch // world()
    for done in range(start, args.steps):
        items = step_items(args, done, len(data))[rank() * share :][:share]
        # every image is mirrored every other epoch
        yield [(i, (args.seed, draw), i + draw // len(data)) for i, draw in items]


def loaded(args, data, key_lists):
    """Yields uint8 (n, 3, size, size), the images of each list of keys.

    --workers threads read the next list meanwhile; Pillow decodes without Python's lock.
    """
    with ThreadPoolExecutor(args.workers or 1) as pool:
        fetch = pool.map if args.workers else map  # which reads when it is asked
        waiting = (fetch(lambda key: data[key][0], keys) for keys in key_lists)
        ahead = collections.deque(itertools.islice(waiting, 2))
        while ahead:
            yield torch.stack(list(ahead.popleft()))
            ahead.extend(itertools.islice(waiting, 1))


def to_unit(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return to_device(images, device).float() / 127.5 - 1


def token_cache(args, data, codec):
    """Tokens of all images, a memory-mapped array (N, views, L), encoded once by the codec.

    View 0 is the centre crop, others are random; with --flip every second one is mirrored.
    """
    views = 1
    if not data.is_drawn:
        views = min(MOST_VIEWS, max(1 + args.flip, VIEWS_IN_ALL // len(data)))
    path = os.path.join(args.out, "tokens.npy")
    if read_run(args)["made"].get("tokens") != file_digest(path):
        first, last = (number * len(data) // world() for number in (rank(), rank() + 1))
        tokens = encoded(args, data, codec, range(first, last), views).numpy()
        tokens = tokens.astype(np.uint16 if len(codec["codebook"]) <= 2**16 else np.int32)
        write_atomically(f"{path}.part.{rank()}.tmp", lambda file: np.save(file, tokens))
        barrier()

        if rank() == 0:
            parts = [f"{path}.part.{number}.tmp" for number in range(world())]
            tokens = np.concatenate([np.load(part) for part in parts])
            write_atomically(path, lambda file: np.save(file, tokens))
            record(args, "tokens", file_digest(path))
            for part in parts:
                os.remove(part)
    barrier()
    return np.load(path, mmap_mode="r")


def file_digest(path):
    """A digest of a file's bytes, a gigabyte in about a second; "" where there are none."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    return digest(torch.from_numpy(np.memmap(path, np.uint8, "c"))) if size else ""


def encoded(args, data, codec, rows, views=1):
    """Tokens (len(rows), views, L) of some images."""
    fast = tokenizer.cast(codec, args.dtype)
    total = len(rows) * views
    keys = (
        (i, (args.seed, view, i) if view else None, view) for i in rows for view in range(views)
    )
    lists = iter(lambda: list(itertools.islice(keys, 64)), [])

    tokens = []
    for number, pixels in enumerate(loaded(args, data, lists), 1):
        for few in pixels.split(at_once(args.size**2)):
            images = to_unit(few, args.device)
            tokens.append(tokenizer.encode(fast, images, args.scales).cpu())
        done = min(64 * number, total)
        if done % 4096 == 0 or done == total:
            say(f"encoded {done} of {total} crops")
    return torch.cat(tokens).unflatten(0, (len(rows), views))


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
    add("--workers", type=sample.number(int, 0, 1024), default=0, help="threads that decode")
    add = top.add_argument_group("run").add_argument
    add("stage", nargs="?", default="all", help="all, tokenizer, next-scale or masked (all)")
    add("--out", help="run folder (runs/shapes or runs/<data folder>)")
    add("--init", help="start the one stage from these weights, ours or published")
    add("--tokenizer", help="use this finished tokenizer, ours or published")
    add("--restart", action="store_true", help="begin the run folder anew")
    add("--seed", type=sample.number(int, 0), default=0, help="of all randomness (0)")
    add("--save-every", type=positive, help="steps, for going on after a kill (auto)")
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
    require(len(data) >= world(), f"--data: got {len(data)} images, fewer than processes")
    claim_folder(args, data, held_out)
    for label in set(range(len(args.class_names))).difference(data.labels):
        say(f"class {args.class_names[label]}: its images are all held out, too few to train on")
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
            require(os.path.exists(path), f"{path} is missing; --restart begins the run anew")
            say(f"{stage}: finished before, {path}")
            continue
        own = dict(stage=stage, steps=args.steps[stage], lr=args.lr[stage])
        tree = work[stage](argparse.Namespace(**vars(args) | own), data, held_out)
        finish(args, stage, tree)
    say(f"finished: {args.out} holds weights, metrics.jsonl and samples/")
    say(f"next: python sample.py {args.out}")


def resolved(args):
    """The flags with every (auto) filled in. ValueError that names what does not fit."""
    stages = ("all", *STAGES)
    require(args.stage in stages, f"stage: got {args.stage!r}, expected one of {', '.join(stages)}")
    if args.size is None:
        args.size = 32 if args.data is None else 256
    if args.out is None:
        args.out = os.path.join("runs", os.path.basename(os.path.abspath(args.data or "shapes")))
    for name, presets in PRESETS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, presets[args.size > LARGEST_SMALL])
    for name in ("steps", "lr"):  # one number for all stages, or one for each
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else [value] * len(STAGES)
        setattr(args, name, dict(zip(STAGES, values)))

    args.stages = [stage for stage in STAGES if args.stage in ("all", stage)]
    if args.tokenizer is not None and "tokenizer" not in args.stages:
        args.stages.insert(0, "tokenizer")
    if args.causal:
        require(args.stage != "masked", "masked: there is no such stage with --causal")
        args.stages = [stage for stage in args.stages if stage != "masked"]
    fits = args.init is None or args.stage in ("tokenizer", "next-scale")
    require(fits, "--init: needs the stage that it starts, tokenizer or next-scale")

    cell = downsampling(args)
    side = args.size // cell
    require(args.size % cell == 0, f"--size: got {args.size}, expected a multiple of {cell}")
    args.scales = tuple(args.scales or default_scales(side))
    fits = args.scales[-1] == (side, side) and len(args.scales) > 1
    expected = f"two or more, the last {side}, {args.size} pixels / {cell}"
    require(fits, f"--scales: got {args.scales}, expected {expected}")
    check_sizes(args)

    counts = [n for n in range(1, args.batch + 1) if args.batch % (n * world()) == 0]
    if args.accumulate is None:  # as few parts as memory allows
        least = args.batch / (world() * at_once(args.size**2))
        args.accumulate = next((n for n in counts if n >= least), args.batch)
    expected = f"a multiple of {args.accumulate} parts on {world()} processes"
    require(args.accumulate in counts, f"--batch: got {args.batch}, expected {expected}")
    return args


def check_sizes(args):
    """ValueError for models that cannot be: told before the first stage, not after it."""
    tokenizer.check_scales(args.scales)
    width = args.width or 64 * args.depth
    head_dim = width // max(1, width // 64)  # where the heads divide it, as hmar.init checks
    message = f"--width: got {width}, heads of {head_dim} dimensions"
    require(head_dim % 8 == 0 and head_dim >= 16, f"{message}, expected a multiple of 8 from 16 on")
    with torch.device("meta"):
        tokenizer.init(**{name: getattr(args, name) for name in TOKENIZER_SIZES})
        hmar.init(depth=args.depth, width=args.width, scales=args.scales, codes=args.codes)


def downsampling(args):
    """Pixels a side of a latent cell, of the codec that is given, in the run folder, or to come."""
    path = args.init if args.stage == "tokenizer" else args.tokenizer
    own = os.path.join(args.out, "tokenizer.pt")
    if args.stage in ("next-scale", "masked") and os.path.exists(own):
        path = path or own
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


# ---- run folders: args.json holds the flags, the images and what was made, as digests


def claim_folder(args, data, held_out):
    """Makes the run folder this run's own: one process at a time, one set of flags, one data set.

    ValueError where the folder is in use, somebody else's, or was begun differently.
    """
    samples = os.path.join(args.out, "samples")
    require(not os.path.islink(samples), f"{samples}: got a link, expected an own folder")
    for name in ("data", "tokenizer", "init"):  # --restart would remove them, or images mix
        given = getattr(args, name) or os.devnull
        for real in (os.path.abspath, os.path.realpath):  # of a link, where it lies and leads
            path, out = Path(real(given)), Path(real(args.out))
            fits = not path.is_relative_to(out) and not out.is_relative_to(path)
            require(fits, f"--{name}: got {given}, which lies inside --out {args.out} or around it")
    fits = not args.restart or "tokenizer" in args.stages
    require(fits, f"--restart: begins with the tokenizer stage, got {args.stage}")
    os.makedirs(args.out, exist_ok=True)
    args.lock = sample.locked(os.path.join(args.out, "lock")) if rank() == 0 else None
    before = read_run(args)
    flags = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    flags |= dict(dtype=str(args.dtype)[6:], data=args.data and os.path.abspath(args.data))
    flags["init"] = args.init and f"{args.stage}: {args.init}"
    flags["images"] = [fingerprint(args, data), fingerprint(args, held_out)]
    run = dict(flags=flags, class_names=list(args.class_names), causal=args.causal, made={})
    run = json.loads(json.dumps(run))  # as it comes back from a file

    there = [path for path in own_files(args) if os.path.lexists(path)]
    differ = [f"{os.path.basename(path)} without args.json" for path in there if not before]
    for name, value in run["flags"].items() if before else ():
        old = before["flags"].get(name)
        stage = dict(tokenizer="tokenizer", init=str(old).partition(":")[0]).get(name)
        need_not_repeat = value is None and stage in before["made"]  # its work is done
        if old != value and not need_not_repeat:
            differ.append(f"{name} {old} -> {value}")
    advice = "--out NAME begins another run, --restart this one anew"
    fits = args.restart or not differ
    require(
        fits, f"{args.out}: not begun with these flags or images: {', '.join(differ[:5])}; {advice}"
    )
    if args.restart:
        say(f"{args.out}: begun anew; leave out --restart to go on with it")
    barrier()  # every process has looked

    if rank() == 0 and (args.restart or not before):
        for path in there:
            os.remove(path)
        write_run(args, run)
    barrier()


def own_files(args):
    """Paths of all that a run writes into its folder but the lock, args.json last."""
    names = ["tokenizer.pt", "hmar.pt", "metrics.jsonl", "tokens.npy"]
    names += [f"{stage}.resume.pt" for stage in STAGES]
    names += [f"samples/{name}.png" for name in ("reconstructions", "next-scale", "masked")]
    return [os.path.join(args.out, name) for name in (*names, "args.json")]


def fingerprint(args, data):
    """What tells images from others: names, sizes and times of files, or numbers of drawings."""
    if data.is_drawn:
        return str(data.items)
    total = hashlib.sha256()
    for path, label in data.items:
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nothing
        name = name_inside(path, args.data)
        total.update(f"{name!r} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def read_run(args):
    """What args.json holds: the flags, what was made; {} where it is missing."""
    path = os.path.join(args.out, "args.json")
    run = read_json(path)
    fits = not run or all(isinstance(run.get(name), dict) for name in ("flags", "made"))
    require(fits, f"{path}: expected what train.py wrote; --out NAME begins another run")
    return run


def write_run(args, run):
    """Writes args.json."""
    path = os.path.join(args.out, "args.json")
    write_atomically(path, lambda file: file.write(json.dumps(run, indent=1).encode()))


def record(args, name, made):
    """Notes in args.json the digest of what was made."""
    run = read_run(args)
    run["made"][name] = made
    write_run(args, run)


def finish(args, stage, tree):
    """Writes a stage's weights, then their digest into args.json; its checkpoint goes."""
    save(os.path.join(args.out, STAGES[stage]), tree)
    if rank() == 0:
        record(args, stage, digest(tree))
        Path(args.out, f"{stage}.resume.pt").unlink(missing_ok=True)
    barrier()


def finished(args, stage):
    """The weights that an earlier stage left. ValueError where they are missing or others.

    A masked branch goes: a kill may have come when hmar.pt had it and args.json did not say so. The
    digest is of the leaves in order, which does not change when add_masked_branch moves blocks.
    """
    path = os.path.join(args.out, STAGES[stage])
    made = read_run(args)["made"].get(stage)
    fits = made and os.path.exists(path)
    require(fits, f"{path} is missing; python train.py {stage} makes it")
    tree = load_tokenizer(path) if stage == "tokenizer" else load_transformer(path)
    tree.pop("masked", None)
    require(digest(tree) == made, f"{path}: not what this run made; --restart begins it anew")
    return to_device(tree, args.device)


def keep(args, state, progress):
    """Saves what a stage goes on from after a kill, and how long metrics.jsonl was then."""
    metrics = Path(args.out, "metrics.jsonl")
    length = metrics.stat().st_size if metrics.exists() else 0
    kept = dict(state=state, progress=progress, metrics=length)
    save(os.path.join(args.out, f"{args.stage}.resume.pt"), kept)


def resume(args, state):
    """(step, best step, best loss) to go on from: those of the stage's checkpoint, or of a first.

    Its tensors are written into state. What metrics.jsonl says of later steps goes.
    """
    path = os.path.join(args.out, f"{args.stage}.resume.pt")
    is_missing = not os.path.exists(path)
    barrier()  # every process has looked
    if is_missing:  # so that metrics.jsonl is cut even after a kill before the first save
        keep(args, state, (0, 0, math.inf))
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        for own, kept in zip(state, saved["state"], strict=True):
            require(own.shape == kept.shape, "other shapes")
            own.copy_(kept)
        step, best_step, best_loss = saved["progress"]
        step, best_step, length = map(operator.index, (step, best_step, saved["metrics"]))
        require(0 <= best_step <= step <= args.steps and min(best_loss, length) >= 0, "other steps")
    except Exception as error:
        raise ValueError(f"{path}: expected this stage's checkpoint") from error

    metrics = os.path.join(args.out, "metrics.jsonl")
    if rank() == 0 and os.path.exists(metrics):
        lines = Path(metrics).read_bytes()[:length]
        write_atomically(metrics, lambda file: file.write(lines))
    word = "continues" if step else "nothing is saved yet, begins"
    say(f"{args.stage}: {word} at step {step} of {args.steps}, saved every {args.save_every}")
    return step, best_step, best_loss


@contextlib.contextmanager
def stop_signals(device):
    """A function of the step: whether Ctrl-C or SIGTERM asked to stop; a second one ends the run.

    Several processes ask each other at every tenth step, so that all stop together.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    def agreed(step):
        if world() == 1:
            return bool(asked)
        return step % 10 == 0 and bool(summed(torch.tensor(len(asked), device=device)))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # during the last step
        raise KeyboardInterrupt


def log(args, step, **numbers):
    """Adds a line to metrics.jsonl and prints it. ValueError where a number is not finite."""
    line = json.dumps(dict(stage=args.stage, step=step, **numbers))
    require_finite(args, step, not re.search(r"\b(NaN|Infinity)\b", line))
    if rank() == 0:
        with open(os.path.join(args.out, "metrics.jsonl"), "a") as file:
            file.write(line + "\n")
        single = [name for name in numbers if not isinstance(numbers[name], list)]
        shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in single)
        say(f"{args.stage} {step}/{args.steps}  {shown}")


def require_finite(args, step, fits):
    """ValueError that says what to do, unless all was finite."""
    message = f"{args.stage}: loss or gradient is not finite at step {step}; a lower --lr may help"
    require(fits, f"{message}; the last checkpoint is kept")


def save(path, tree):
    """Writes a tree of tensors: the old file or the whole new one. OSError if it cannot."""
    if rank() == 0:
        plain = pytree.tree_map(lambda x: x.detach().cpu() if torch.is_tensor(x) else x, tree)
        write_atomically(path, lambda file: torch.save(plain, file))
    barrier()  # from here on every process finds it


def write_sheet(args, name, rows, names):
    """Writes samples/<name>.png."""
    if rank() == 0:
        folder = os.path.join(args.out, "samples")
        os.makedirs(folder, exist_ok=True)
        sample.write_image(os.path.join(folder, f"{name}.png"), sample.sheet(rows, names))


# ---- parameters, processes, devices


class Trained(torch.nn.Module):
    """The thinnest module that DDP and torch.compile take: a tree's parameters, a loss."""

    def __init__(self, tree, loss):
        super().__init__()
        leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.nn.Parameter)]
        self.leaves, self.tree, self.loss = torch.nn.ParameterList(leaves), tree, loss

    def forward(self, **batch):
        return self.loss(self.tree, **batch)


def trainable(tree):
    """The tree with copies of its leaves as parameters."""
    return pytree.tree_map(lambda leaf: torch.nn.Parameter(leaf.clone()), tree)


def with_leaves(tree, leaves):
    """The tree with its parameters replaced, in order."""
    leaves = iter(leaves)

    def replaced(leaf):
        return next(leaves) if isinstance(leaf, torch.nn.Parameter) else leaf

    return pytree.tree_map(replaced, tree)


def wrapped(model, args):
    """What is called for the loss: the model itself, compiled, or spread over the processes."""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # parts of different sizes each compile anew
        model = torch.compile(model)
    if world() == 1:
        return model
    unused = args.stage == "tokenizer"  # a phi that serves no scale
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)


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


def start_processes(name):
    """This process's device; joins those that torchrun started, if there are several."""
    device = sample.find_device(name)
    if world() > 1:
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


def say(line):
    """Prints a line, once however many processes there are."""
    if rank() == 0:
        print(sample.printable(line), flush=True)


def main(argv=None):
    """The command; see `sample.command`."""
    try:
        return sample.command("train.py", train, parser(), argv)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
