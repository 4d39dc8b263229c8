"""Training: drawn shapes or a folder of images -> tokenizer.pt, hmar.pt; and `python train.py`.

    images -> tokenizer stage -> tokens (N, views, L) -> next-scale stage -> masked stage

The settings, then `fit`, the loop of all stages; then each stage, how it is judged, data, the
command; run folders and processes come last. All randomness and the order of the data are functions
of seed and step, so a killed run continues bit for bit though none of them is saved. No perceptual
and no adversarial loss is trained.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import colorsys
import contextlib
import ctypes
import datetime
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import sys
import threading
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

# a stage is finished when its file is there
STAGES = {"tokenizer": "tokenizer.pt", "next-scale": "next-scale.pt", "masked": "hmar.pt"}

PRESETS = {  # (up to 64 pixels, a model for two CPU cores; above, the published one, for GPUs)
    "channels": (32, 160),
    "multipliers": ((1, 1, 2), (1, 1, 2, 2, 4)),
    "residual_blocks": (1, 2),
    "attention": (False, True),
    "codes": (256, 4096),
    "code_dim": (16, 32),
    "depth": (3, 16),  # the width is 64 times that
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
LABEL_DROP = 0.1  # label dropout: these become the null class, for guidance
CHECKPOINTING = False  # the transformer's activations are computed twice, which saves memory
DEPTH_DROP = 0.1  # stochastic depth of the last block at depth 24, in proportion at others
REVIVE_EVERY = 20  # steps; then codes that nobody chose are replaced,
REVIVE_UNTIL = 0.8  # of the stage: the last ones get time to settle
COARSE_WEIGHT = 0.5  # of the squared error of coarse images (RESULTS, "The pyramid")
EDGE_WEIGHT = 0.25  # of the error of edges, beside .5 of the absolute error
HUE_WEIGHT = 0.28  # of the share of the hues' variance that is lost (RESULTS, "Hues, tried")
LOG_EVERY = 50  # steps
LOOKS = 6  # at held-out images in a stage,
JUDGED = 128  # of them at most
PATIENCE = 1 / 3  # of the steps without a better loss end a stage
HELD_OUT = 0.05  # share of the images
VIEWS_IN_ALL = 20_000  # a small folder's images are encoded in several random crops each,
MOST_VIEWS = 16  # but in no more than these
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FLAGS = ("size", "flip", "seed", "dtype", "compile", "causal", "scales")  # that change a result
CODES = ("codes", "code_dim")
NETS = ("channels", "multipliers", "residual_blocks", "attention")  # of the tokenizer


def fit(args, stage, tree, loss, batches, evaluate, after_step=lambda *_: None, extra=()):
    """`tree` with that moving average (EMA) of its parameters that was best on held-out images.

    loss(tree, **batch) -> (scalar, {name: tensor} to log, what after_step needs); batches(start)
    yields each step's batch, a dict a part; evaluate(tree) -> {name: numbers}, the lowest "loss" is
    best; after_step(step, needs, optimizer) may change tree and extra, tensors that are saved too.
    """
    model = Trained(tree, loss)
    leaves = list(model.leaves)
    current = [leaf.detach() for leaf in leaves]  # the same memory, without gradients
    ema = [leaf.clone() for leaf in current]
    best = [leaf.clone() for leaf in current]
    optimizer = Optimizer(tree)
    state = [*current, *ema, *best, *optimizer.moments, *extra]
    (start, best_step, best_loss), window = load_checkpoint(args, stage, state)
    call = wrapped(model, args, stage)
    steps = args.steps[stage]
    look_every = math.ceil(steps / LOOKS)
    with stop_signals(args.device) as asked_to_stop:
        for step, parts in enumerate(batches(start), start + 1):
            rate = learning_rate(step, steps, args.lr[stage], args.warmup)
            numbers, needs, norm = optimise(call, parts, leaves, optimizer, rate)
            decay = min(args.ema, step / (step + 10))  # the first weights are soon forgotten
            torch._foreach_lerp_(ema, current, 1 - decay)
            after_step(step, needs, optimizer)

            window += [{"gradient": norm} | part for part in numbers]
            if step % LOG_EVERY == 0 or step == steps:
                log(args, stage, step, rate=rate, **means(averaged(window)))
                window.clear()

            if step % look_every == 0 or step == steps:
                held_out_loss = look(args, stage, step, evaluate, with_leaves(tree, ema))
                if held_out_loss < best_loss:
                    best_step, best_loss = step, held_out_loss
                    torch._foreach_copy_(best, ema)
                elif step < steps and step - best_step >= PATIENCE * steps:
                    say(f"{stage}: stopped early at step {step}; best at {best_step}")
                    break

            stops = asked_to_stop(step)
            if stops or step % args.save_every == 0:
                require_finite(stage, step, norm.isfinite())  # nan weights give a nan norm
                window = averaged(window)  # one saves for all; averaged again it is the same
                save_checkpoint(args, stage, state, (step, best_step, best_loss), window)
            if stops:
                raise KeyboardInterrupt(f"{stage}: stopped and saved at step {step}")

    say(f"{stage}: best at step {best_step}, loss {best_loss:.4g} held out")
    return with_leaves(tree, best)


def look(args, stage, step, evaluate, tree):
    """The loss on held-out images: the first process's, for all of them to act on."""
    numbers = agreed(lambda: evaluate(tree))
    log(args, stage, step, **{f"held_out_{name}": value for name, value in numbers.items()})
    return numbers["loss"]


def optimise(call, parts, leaves, optimizer, rate):
    """(numbers, needs, norm of the gradient) of one step over a batch in parts, a list each."""
    reports = []
    for number, batch in enumerate(parts, 1):
        waits = world() > 1 and number < len(parts)  # processes add up gradients with the last part
        with call.no_sync() if waits else contextlib.nullcontext():
            value, *report = call(**batch)
            (value / len(parts)).backward()
        reports.append(pytree.tree_map(torch.Tensor.detach, report))

    norm = torch.nn.utils.clip_grad_norm_(leaves, CLIP)
    optimizer.step(rate)
    numbers, needs = zip(*reports)
    return numbers, needs, norm


def learning_rate(step, steps, peak, warmup):
    """Of step 1, 2, ...: warm-up, constant, then linear to zero (Hägele et al. 2024)."""
    left = 1 - (step - 1) / steps
    return peak * min(1, step / max(1, warmup), left / COOL_DOWN)


class Optimizer:
    """Muon for the matrices inside the networks (Jordan et al. 2024), AdamW for everything else.

    A convolution's weight is a matrix of its outputs. Those of one shape are stepped together,
    in half the time. Muon's steps are scaled to AdamW's size: one rate for both (Liu et al. 2025).
    Muon multiplies in bf16 whatever --dtype says.
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
        for leaf in others:  # as AdamW makes it at its first step: a checkpoint is copied into it
            step = torch.zeros((), device=leaf.device)
            first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
            self.adamw.state[leaf] = dict(step=step, exp_avg=first, exp_avg_sq=second)
        self.moments = [*self.momenta, *pytree.tree_leaves([*self.adamw.state.values()])]

    @torch.no_grad()
    def step(self, rate):
        """Muon: momentum, Nesterov's step, orthogonal; scaled to AdamW's root mean square of .2."""
        for leaves, momentum in zip(self.groups, self.momenta):
            gradients = torch.stack([leaf.grad for leaf in leaves]).flatten(2)  # (N, rows, columns)
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, MOMENTUM))  # Nesterov's look ahead
            size = 0.2 * math.sqrt(max(updates.shape[1:]))  # an orthogonal matrix has 1 / sqrt(max)
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

    for _ in range(5):  # x (a + b gram + c gram^2), (a, b, c) = (3.4445, -4.7750, 2.0315)
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if is_tall else x


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


def wrapped(model, args, stage):
    """What is called for the loss: the model itself, compiled, or spread over the processes."""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # parts of different sizes each compile anew
        model = torch.compile(model)
    if world() == 1:
        return model
    unused = stage == "tokenizer"  # a phi that serves no scale
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)


def averaged(window):
    """Reports of steps, [{name: tensor}, ...], each averaged over all processes."""
    names = window[0] if window else ()
    rows = [summed(torch.stack([report[name] for report in window])) / world() for name in names]
    return [dict(zip(names, values)) for values in zip(*rows)]


def means(window):
    """{name: mean number or numbers} of reports of steps."""
    names = window[0]
    return {name: torch.stack([x[name] for x in window]).mean(0).tolist() for name in names}


@contextlib.contextmanager
def stop_signals(device):
    """A function of the step: whether Ctrl-C or SIGTERM asked to stop; a second one ends the run.

    Several processes ask each other at every tenth step, so that all stop together.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    def is_asked(step):
        if world() == 1:
            return bool(asked)
        return step % 10 == 0 and bool(summed(torch.tensor(len(asked), device=device)))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield is_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # during the last step
        raise KeyboardInterrupt


def log(args, stage, step, **numbers):
    """Adds a line to metrics.jsonl and prints it. ValueError where a number is not finite."""
    line = json.dumps(dict(stage=stage, step=step, **numbers))
    require_finite(stage, step, not re.search(r"\b(NaN|Infinity)\b", line))
    if rank() == 0:
        with open(Path(args.out, "metrics.jsonl"), "a") as file:
            file.write(line + "\n")
        single = [name for name in numbers if not isinstance(numbers[name], list)]
        shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in single)
        say(f"{stage} {step}/{args.steps[stage]}  {shown}")


def require_finite(stage, step, fits):
    """ValueError that says what to do, unless all was finite."""
    if not fits:
        message = f"{stage}: loss or gradient is not finite at step {step}; a lower --lr may help"
        raise ValueError(f"{message}; the last checkpoint is kept")


# ---- the tokenizer stage


def train_tokenizer(args, data, held_out, init=None):
    """Images -> a codec each of whose scales is an image; dead codes are replaced on the way."""
    sizes = {name: getattr(args, name) for name in NETS + CODES}
    codec = trainable(to_device(init or tokenizer.init(**sizes, seed=args.seed), args.device))
    codebook = codec["codebook"]
    counts_since = torch.zeros(len(codebook), dtype=torch.int64, device=args.device)
    judged = to_unit(read_held_out(held_out)[0], args.device)
    variance = hues(judged).var((1, 2, 3), correction=0).mean()

    def loss(codec, images, stops):
        fast = tokenizer.cast(codec, args.dtype)
        passed = tokenizer.training_pass(fast, images, args.scales, stops)
        coarse = F.mse_loss(passed["coarse"], images[:: tokenizer.COARSE_EVERY])
        total = reconstruction_loss(passed["images"], images, variance)
        total = total + COARSE_WEIGHT * coarse + passed["loss"]
        numbers = dict(loss=total, coarse=coarse, quantisation=passed["loss"])
        return total, numbers, (passed["tokens"], passed["residuals"])

    def batches(start):
        for done, images in enumerate(loaded(args, data, step_keys(args, data, start)), start):
            generator = generator_of(args.seed, "tokenizer", done)
            stops = torch.randint(len(args.scales) - 1, (args.batch,), generator=generator)
            parts = []
            for pixels, stop in zip(images.tensor_split(args.parts), own_parts(args, stops)):
                part = dict(images=to_unit(pixels, args.device))
                parts.append(part | dict(stops=stop[:: tokenizer.COARSE_EVERY]))
            yield to_device(parts, args.device)

    def after_step(step, needs, optimizer):
        tokens, residuals = zip(*needs)  # of the parts
        tokens = torch.cat([part.flatten() for part in pytree.tree_leaves(tokens)])
        counts = torch.zeros_like(counts_since).index_add_(0, tokens, torch.ones_like(tokens))
        counts_since.add_(summed(counts))
        is_late = step > REVIVE_UNTIL * args.steps["tokenizer"]
        if step == 1 or (step % REVIVE_EVERY == 0 and not is_late):
            generator = generator_of(args.seed, "revive", step)
            residuals = [gathered(torch.cat(parts)) for parts in zip(*residuals)]
            new, dead = tokenizer.revive_codes(
                codebook.detach(), counts_since, residuals, generator
            )
            codebook.data.copy_(new)
            optimizer.forget(codebook, dead)
            counts_since.zero_()

    judge = functools.partial(judge_tokenizer, args, judged)
    return fit(args, "tokenizer", codec, loss, batches, judge, after_step, extra=[counts_since])


def reconstruction_loss(decoded, images, variance):
    """Squared, absolute, edge and hue errors of reconstructions (B, 3, H, W).

    The last is the share that is lost of the variance of the data's hues: in photographs green
    varies so little beside brightness that no code was spent on it otherwise.
    """
    error = decoded - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    plain = error.square().mean() + 0.5 * error.abs().mean() + EDGE_WEIGHT * edges
    return plain + HUE_WEIGHT * hues(error).square().mean() / (variance + 0.01)  # .01: grey images


def hues(images):
    """(2, B, H / 4, W / 4): red - blue and 2 green - red - blue of images, means over 4 x 4."""
    cells = [max(1, side // 4) for side in images.shape[2:]]
    red, green, blue = F.adaptive_avg_pool2d(images, cells).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


# ---- the next-scale and the masked stage


def train_next_scale(args, data, held_out, init=None):
    """Tokens -> a transformer that predicts every token from the coarser scales."""
    codec, all_tokens, evaluate = on_tokens(args, "next-scale", data, held_out)
    if init is None:
        codes, code_dim = codec["codebook"].shape
        sizes = dict(codes=codes, code_dim=code_dim, classes=len(data.class_names))
        sizes |= dict(depth=args.depth, gamma=args.gamma, scales=args.scales)
        init = hmar.init(**sizes, seed=args.seed)
    params = trainable(to_device(init, args.device))
    weights = hmar.scale_weights(args.scales, args.loss_weights).to(args.device)  # (L,)
    lengths = tokenizer.lengths(args.scales)

    def loss(params, labels, tokens, gates):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        fast = hmar.cast(params, args.dtype)
        options = dict(gates=gates, checkpointing=CHECKPOINTING)
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, args.causal, **options)
        total = (losses * weights).sum(1).mean()
        by_scale = [scale.mean() for scale in losses.mean(0).split(lengths)]
        return total, dict(loss=total, scale_losses=torch.stack(by_scale)), ()

    def batches(start):
        for done in range(start, args.steps["next-scale"]):
            batch = transformer_batch(args, "next-scale", done, params, data.labels, all_tokens)
            yield to_device(in_parts(args, batch), args.device)

    return fit(args, "next-scale", params, loss, batches, evaluate)


def fitted(args, params, classes):
    """Given weights as a start for these scales and classes: all blocks are one trunk again.

    ValueError where their codes are not those of the tokenizer.
    """
    branch = params["next_scale"]
    got = len(branch["head"]["bias"]), params["input"]["weight"].shape[1]
    expected = args.codes, args.code_dim
    if got != expected:
        raise ValueError(
            f"--init: got (codes, code_dim) {got}, expected the tokenizer's {expected}"
        )

    trunk = params["trunk"] + branch["blocks"]
    params = params | dict(trunk=trunk, next_scale=branch | dict(blocks=[]))
    params.pop("masked", None)
    if hmar.scales(params) != args.scales:
        say(f"--init: positions resampled for the scales {args.scales}")
        params = hmar.resize_positions(params, args.scales)
    if len(params["classes"]) != classes + 1:
        say(f"--init: a new class embedding for {classes} classes")
        width = params["classes"].shape[1]
        new = hmar.init(depth=1, width=width, heads=1, classes=classes, seed=args.seed)
        params["classes"] = new["classes"]
    return params


def train_masked(args, data, held_out, init=None):
    """next-scale.pt -> the same with a masked branch: hidden tokens from the others of their scale.

    The trunk and the next-scale branch stay as they are (HMAR, stage two).
    """
    codec, all_tokens, evaluate = on_tokens(args, "masked", data, held_out)
    params = load_stage(args, "next-scale")
    blocks = min(args.masked_blocks, len(params["trunk"]))
    params = hmar.add_masked_branch(params, blocks, seed=args.seed)
    params |= trainable(dict(masked=params["masked"]))
    first = tokenizer.lengths(args.scales)[0]

    def loss(params, labels, tokens, gates, mask, places, share):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        own_inputs = tokenizer.masked_inputs(codec, tokens, args.scales, mask)
        fast = hmar.cast(params, args.dtype)
        options = dict(places=places, gates=gates, checkpointing=CHECKPOINTING)
        losses = hmar.masked_losses(fast, labels, tokens, inputs, own_inputs, mask, **options)
        total = (losses * share).sum()
        return total, dict(loss=total), ()

    def batches(start):
        for done in range(start, args.steps["masked"]):
            batch = transformer_batch(args, "masked", done, params, data.labels, all_tokens)
            generator = generator_of(args.seed, "mask", done)
            ratio = torch.rand(args.batch, 1, generator=generator)  # of hidden tokens
            uniform = torch.rand(args.batch, all_tokens.shape[2] - first, generator=generator)
            mask = uniform < ratio

            # sum(losses * share) / parts / processes is the mean over the batch's hidden tokens
            share = world() * args.parts / mask.sum().clamp(min=1)
            parts = in_parts(args, batch | dict(mask=mask))
            for part in parts:
                part |= dict(places=part["mask"].flatten().nonzero()[:, 0], share=share)
            yield to_device(parts, args.device)

    return fit(args, "masked", params, loss, batches, evaluate)


def on_tokens(args, stage, data, held_out):
    """What both have in common: (codec, training tokens (N, views, L), evaluate of `fit`)."""
    codec = load_stage(args, "tokenizer")
    all_tokens = token_cache(args, data, codec)
    pixels, labels = read_held_out(held_out)
    tokens = torch.cat(encoded(args, codec, pixels))  # (B, L)
    judged = to_device((codec, labels, tokens), args.device)
    names = data.class_names[:10]
    return codec, all_tokens, functools.partial(judge_transformer, args, stage, names, *judged)


def transformer_batch(args, stage, done, params, labels, all_tokens):
    """dict(labels (B,), tokens (B, L), gates (B, depth, 2)) of a whole batch after `done` steps."""
    generator = generator_of(args.seed, stage, done)
    rows = [index for index, _ in step_items(args, done, len(labels))]
    views = torch.randint(all_tokens.shape[1], (args.batch,), generator=generator).numpy()
    tokens = torch.from_numpy(all_tokens[rows, views].astype(np.int64))

    null = len(params["classes"]) - 1
    is_dropped = torch.rand(args.batch, generator=generator) < LABEL_DROP
    labels = torch.tensor([labels[row] for row in rows]).masked_fill(is_dropped, null)

    frozen = len(params["trunk"]) if stage == "masked" else 0  # these blocks are never dropped
    depth = len(params["trunk"]) + len(params["next_scale"]["blocks"])
    uniform = torch.rand(args.batch, depth - frozen, 2, generator=generator)
    gates = hmar.stochastic_depth(uniform, min(0.5, DEPTH_DROP * depth / 24))
    gates = F.pad(gates, (0, 0, frozen, 0), value=1)
    return dict(labels=labels, tokens=tokens, gates=gates)


def in_parts(args, batch):
    """This process's parts of a step's batch, [dict, ...]."""
    split = {name: own_parts(args, tensor) for name, tensor in batch.items()}
    return [dict(zip(split, values)) for values in zip(*split.values())]


def own_parts(args, rows):
    """This process's part of a tensor with a row a sample, in args.parts parts."""
    parts = rows.tensor_split(world() * args.parts)
    return parts[rank() * args.parts :][: args.parts]


# ---- how they are judged


@torch.no_grad()
def judge_tokenizer(args, images, codec):
    """Held-out squared error; PSNR in dB after each scale; codes used and their perplexity a scale.

    Draws samples/reconstructions.png: the original and the image after each scale.
    """
    codec = tokenizer.cast(codec, args.dtype)
    errors, rows = [], []
    counts = torch.zeros(len(args.scales), len(codec["codebook"]), dtype=torch.float64)
    for part in images.split(sample.at_once(args.size**2)):
        features = tokenizer.encode_features(codec, part)
        decoded = []
        for k, (_, tokens, f_hat) in enumerate(tokenizer.quantise(codec, features, args.scales)):
            decoded.append(tokenizer.decode_features(codec, f_hat))
            counts[k] += torch.bincount(tokens.flatten().cpu(), minlength=counts.shape[1])
        decoded = torch.stack(decoded)  # (S, B, 3, H, W)
        errors.append((decoded - part).square().mean((2, 3, 4)))
        rows = rows or [part[:8], *decoded[:, :8]]

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
def judge_transformer(args, stage, names, codec, labels, tokens, params):
    """Held-out loss (nats) and token accuracy, of the hidden half in the masked stage.

    Draws samples/<stage>.png: eight samples of each class in names, the first ten.
    """
    params, codec = hmar.cast(params, args.dtype), tokenizer.cast(codec, args.dtype)
    generator = generator_of("held-out mask")
    few = min(32, sample.at_once(args.size**2))
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)
    for part, part_labels in zip(tokens.split(few), labels.split(few)):
        inputs = tokenizer.next_scale_inputs(codec, part, args.scales)
        counts = torch.ones_like(part, dtype=torch.bool)
        if stage == "masked":
            mask = torch.rand(inputs.shape[:2], generator=generator).to(args.device) < 0.5
            own_inputs = tokenizer.masked_inputs(codec, part, args.scales, mask)
            logits = hmar.masked_logits(params, part_labels, inputs, own_inputs, mask)
            counts = F.pad(mask, (part.shape[1] - mask.shape[1], 0))  # scale 0 is never masked
        else:
            logits = hmar.next_scale_logits(params, part_labels, inputs, args.causal)
        losses = F.cross_entropy(logits.transpose(1, 2), part, reduction="none")
        hits = logits.argmax(-1) == part
        sums += torch.stack([losses * counts, hits * counts, counts]).sum((1, 2))

    images = []
    classes = torch.arange(len(names), device=args.device).repeat_interleave(8)
    for start in range(0, len(classes), sample.at_once(args.size**2)):
        part = classes[start:][: sample.at_once(args.size**2)]
        images.append(sample.generate(params, codec, part, seed=start, is_causal=args.causal)[0])
    write_sheet(args, stage, torch.cat(images).split(8), names)

    loss, hits, count = sums.tolist()
    return dict(loss=loss / max(1, count), accuracy=hits / max(1, count))


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
    """Images as uint8 (3, size, size), of [(path, label), ...] or of a range: numbers of drawings.

    A key is (index, seed, turn), so that a sampler decides the randomness: seed None is the centre
    crop; with flip an odd turn mirrors. A broken file is named, once a process, and the next of its
    class takes its place.
    """

    def __init__(self, items, class_names, size, flip=False):
        self.items, self.class_names, self.size, self.flip = items, class_names, size, flip
        self.is_drawn = isinstance(items, range)
        self.labels = [i % len(SHAPES) if self.is_drawn else i[1] for i in items]
        self.broken, self.naming = set(), threading.Lock()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed, turn = key
        if self.is_drawn:  # these vary enough by themselves
            image, _ = draw_shape(self.items[index], self.size)
        else:
            image = crop(self.readable(index), self.size, seed)
            image = ImageOps.mirror(image) if self.flip and turn % 2 else image
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def readable(self, index):
        """The image of an index, or of the next one of its class that is not broken."""
        label = self.labels[index]
        for other in itertools.chain(range(index, len(self)), range(index)):
            if self.labels[other] != label or other in self.broken:
                continue
            try:
                return sample.read_image(self.items[other][0], shortest=2 * self.size)
            except ValueError as error:
                with self.naming:
                    if other not in self.broken:
                        print(f"skipped: {error}", file=sys.stderr)
                    self.broken.add(other)
        path = self.items[index][0]
        raise ValueError(f"--data: {path} cannot be read, nor another of {self.class_names[label]}")


def read_held_out(held_out):
    """(pixels uint8 (n, 3, H, W), labels (n,)) of the first JUDGED images that can be read."""
    pixels, labels = [], []
    for index, label in enumerate(held_out.labels[:JUDGED]):
        try:
            pixels.append(held_out[index, None, 0])
            labels.append(label)
        except ValueError as error:
            last = error
    if not pixels:
        raise last
    return torch.stack(pixels), torch.tensor(labels)


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
    """(training Images, held-out Images, a hash of their names, labels and sizes)."""
    if args.data is None:
        sets = [Images(part, SHAPES, args.size) for part in (range(20_000), range(20_000, 20_500))]
        return *sets, None
    files, names = list_images(args.data)
    train, held_out = split_held_out(files, args.data)
    total = hashlib.sha256()
    for path, label in files:
        file = f"{name_inside(path, args.data)!r} {label} {os.path.getsize(path)}\n"
        total.update(file.encode())
    sets = Images(train, names, args.size, args.flip), Images(held_out, names, args.size)
    return *sets, total.hexdigest()[:16]


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, or images alone.

    Sorted by name, searched to any depth; hidden files and files that are no images by suffix are
    passed over, links to folders not followed. ValueError for no folder, no images, or both kinds.
    """

    def warn(error):
        print(f"passed over: {error}", file=sys.stderr)

    if not os.path.isdir(folder):
        raise ValueError(f"--data: got {folder!r}, expected a folder")
    groups = {}  # class -> its paths; "" for images that lie in no sub-folder
    for place, folders, names in os.walk(folder, onerror=warn):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        group = name_inside(place, folder).split(os.sep)[0]
        for name in sorted(names):
            path = os.path.join(place, name)
            is_image = name.lower().endswith(SUFFIXES) and not name.startswith(".")
            if is_image and os.path.isfile(path):  # no pipe, no link to nothing
                groups.setdefault(group, []).append(path)

    if not groups:
        raise ValueError(f"--data: got {folder!r}, which holds none of {', '.join(SUFFIXES)}")
    alone = os.path.basename(groups.get("", [""])[0])
    if alone and len(groups) > 1:
        raise ValueError(f"--data: got {folder!r} with both {alone!r} and sub-folders of images")
    classes = sorted(groups)
    names = classes if not alone else [Path(folder).resolve().name]
    return [(path, i) for i, name in enumerate(classes) for path in groups[name]], names


def split_held_out(files, folder):
    """(training, held out) parts of [(path, label), ...], in the order of a hash of the path.

    The path is the one inside the folder, so that a copy is split alike. ValueError: under two.
    """
    if len(files) < 2:
        raise ValueError(f"--data: got {len(files)} image in {folder}, expected at least two")

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
    for done in range(start, args.steps["tokenizer"]):
        items = step_items(args, done, len(data))[rank() * share :][:share]
        # odd turns are mirrored: every image in every other epoch
        yield [(i, (args.seed, draw), i + draw // len(data)) for i, draw in items]


def loaded(args, data, key_lists):
    """Yields uint8 (n, 3, size, size), the images of each list of keys.

    --workers threads read the next list meanwhile; Pillow decodes without Python's lock.
    """
    with ThreadPoolExecutor(args.workers or 1) as pool:
        fetch = pool.map if args.workers else map  # which reads when it is asked
        waiting = (fetch(data.__getitem__, keys) for keys in key_lists)
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
    path = Path(args.out, "tokens.npy")
    agreed(lambda: note_tokenizer(args, codec))
    if not agreed(path.exists):
        first, last = (number * len(data) // world() for number in (rank(), rank() + 1))
        keys = (
            (i, (args.seed, view, i) if view else None, view)
            for i in range(first, last)
            for view in range(views)
        )
        lists = iter(lambda: list(itertools.islice(keys, 64)), [])
        tokens, done, total = [], 0, (last - first) * views
        for pixels in loaded(args, data, lists):
            tokens += encoded(args, codec, pixels)
            done += len(pixels)
            if done % 4096 == 0 or done == total:
                say(f"encoded {done} of {total} crops")

        tokens = torch.cat(tokens).unflatten(0, (-1, views)).numpy()
        parts = collected(tokens.astype(np.uint16 if len(codec["codebook"]) <= 2**16 else np.int32))
        if rank() == 0:
            sample.write_whole(path, lambda file: np.save(file, np.concatenate(parts)))
        barrier()
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:
        raise ValueError(f"{path}: expected tokens; removed, they are encoded anew") from error


def encoded(args, codec, pixels):
    """[tokens (n, L), ...] of pixels uint8 (B, 3, H, W), a few images at a time."""
    fast = tokenizer.cast(codec, args.dtype)
    parts = [to_unit(few, args.device) for few in pixels.split(sample.at_once(args.size**2))]
    return [tokenizer.encode(fast, part, args.scales).cpu() for part in parts]


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = sample.command_parser("python train.py [STAGE] [flags]: train HMAR from nothing.")
    add = top.add_argument
    add("stage", nargs="?", default="all", choices=("all", *STAGES), help="one of them alone (all)")
    add("--data", help="images, a sub-folder a class or all in one (drawings)")
    add("--size", type=int, help="side of the images (256, drawings 32)")
    add("--depth", type=int, help="transformer blocks; the width is 64 times that (3; 16 at 256)")
    add("--out", help="run folder (runs/shapes or runs/<data folder>)")
    add("--seed", type=int, default=0, help="of all randomness (0)")
    add("--steps", type=int, help="of each stage")
    add("--batch", type=int, help="images a step, over all processes")
    add("--lr", type=float, help="at its peak")
    add("--flip", action="store_true", help="mirror images at random")
    add("--scales", nargs="+", type=sample.scale_pair, help="4 or 2x3 each, coarse to fine")
    add("--causal", action="store_true", help="VAR: attend to coarser scales, no masked stage")
    add("--tokenizer", help="use this finished tokenizer, ours or published")
    add("--init", help="start the stage that they fit from these weights, ours or published")
    add("--device", choices=("cuda", "cpu"), help="(cuda if there is one)")
    add("--dtype", choices=("bf16", "fp32"), help="(bf16 where the processor has it)")
    add("--workers", type=int, default=0, help="threads that decode images")
    add("--compile", action="store_true", help="torch.compile the training step")
    return top


def train(args):
    """The stages that the flags ask for, in order."""
    device = start_processes(args.device)
    given = load_given(args)
    args = resolved(args, device, given)
    data, held_out, images = data_sets(args)
    classes = len(data.class_names)
    if len(data) < world():
        raise ValueError(f"--data: got {len(data)} images, fewer than processes")
    if "next-scale" in given:
        init = fitted(args, given["next-scale"], classes)
    else:
        init = given.get("tokenizer")

    flags = {name: getattr(args, name) for name in (*FLAGS, *PRESETS)}
    for name, tree in given.items():
        flags["--tokenizer" if name == "codec" else "--init"] = sample.digest(tree)
    record = dict(flags=flags, class_names=data.class_names, images=images)
    lock = claim_folder(args, record) if rank() == 0 else None
    barrier()
    for label in set(range(classes)).difference(data.labels):
        say(f"class {data.class_names[label]}: its images are all held out, too few to train on")
    say(
        f"{args.out}: {len(data)} images to train on, {len(held_out)} held out, "
        f"{classes} classes; {device}, {str(args.dtype)[6:]}, "
        f"{torch.get_num_threads()} threads, processes: {world()}"
    )
    if device.type == "cpu" and args.size > LARGEST_SMALL:
        say("a model of the published size: on a CPU its steps take minutes")

    work = {"tokenizer": train_tokenizer, "next-scale": train_next_scale, "masked": train_masked}
    for stage in args.stages:
        path, _ = stage_paths(args, stage)
        if agreed(path.exists):
            say(f"{stage}: finished before, {path}")
        elif stage == "tokenizer" and "codec" in given:
            save_stage(args, stage, given["codec"])
        else:
            save_stage(
                args, stage, work[stage](args, data, held_out, init if stage in given else None)
            )
    say(f"finished: {args.out} holds weights, metrics.jsonl and samples/")
    say(f"next: python sample.py {args.out}")
    del lock  # held until here


def load_given(args):
    """{"codec": the tree of --tokenizer, and the stage that --init starts: its tree}, as given."""
    given = {}
    if args.tokenizer is not None:
        given["codec"], _ = sample.load(args.tokenizer, tokenizer)
    if args.init is not None:
        tree, _ = sample.load(args.init)
        given["tokenizer" if "codebook" in tree else "next-scale"] = tree
    if "codec" in given and "tokenizer" in given:
        raise ValueError("--init: got a tokenizer beside --tokenizer, which is not trained")
    return given


def resolved(args, device, given):
    """The flags and PRESETS as one namespace, which nobody changes after this."""
    check_flags(args, given)

    # what was asked for goes before the preset of this size
    size = args.size or (256 if args.data else 32)
    asked = {name: value for name, value in vars(args).items() if value is not None}
    settings = {name: presets[size > LARGEST_SMALL] for name, presets in PRESETS.items()} | asked
    args = argparse.Namespace(**vars(args) | settings | dict(size=size, device=device))
    args.dtype = sample.find_dtype(args.dtype, device)
    if args.out is None:
        args.out = os.path.join("runs", os.path.basename(os.path.abspath(args.data or "shapes")))
    if args.data and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--out: got {args.out}, inside --data, whose images would be more")
    for name in ("steps", "lr"):  # one number for all stages, or one for each
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else [value] * len(STAGES)
        setattr(args, name, dict(zip(STAGES, values)))

    wanted = STAGES if args.stage == "all" else ["tokenizer"] * bool(args.tokenizer) + [args.stage]
    args.stages = [stage for stage in STAGES if stage in wanted]
    if args.causal:
        args.stages = [stage for stage in args.stages if stage != "masked"]

    # sizes that given weights have go before presets
    codec = given.get("codec", given.get("tokenizer"))
    if codec is None:
        with torch.device("meta"):
            codec = tokenizer.init(**{name: getattr(args, name) for name in NETS + CODES})
    else:
        vars(args).update(dict.fromkeys(NETS), **dict(zip(CODES, codec["codebook"].shape)))
    args.depth = None if "next-scale" in given else args.depth
    args.scales = fitting_scales(args, tokenizer.downsampling(codec))

    # the images of a process, in as few equal parts as memory allows
    share = args.batch // world()
    if args.batch % world():
        raise ValueError(f"--batch: got {args.batch}, expected a multiple of {world()} processes")
    least = math.ceil(share / sample.at_once(size**2))
    args.parts = next(n for n in range(least, share + 1) if share % n == 0)
    return args


def check_flags(args, given):
    """ValueError for flags out of their range, or without effect beside others."""
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed: got {args.seed}, expected 0 to 2 ** 62 - 1")
    for name, most in dict(size=2**16, depth=1000, steps=10**9, batch=2**16).items():
        number = getattr(args, name)
        if number is not None and not 1 <= number <= most:
            raise ValueError(f"--{name}: got {number}, expected 1 to {most}")
    if args.depth is not None and "next-scale" in given:
        raise ValueError(f"--depth: got {args.depth}, but --init decides it")
    if args.causal and args.stage == "masked":
        raise ValueError("masked: there is no such stage with --causal")
    if args.out == "":
        raise ValueError("--out: got '', expected a folder")
    if args.flip and args.data is None:
        raise ValueError("--flip: drawings are not mirrored; expected with --data")


def fitting_scales(args, cell):
    """--scales, or default ones, for a tokenizer whose cells have so many pixels a side."""
    side = args.size // cell
    if args.size % cell:
        raise ValueError(f"--size: got {args.size}, expected a multiple of {cell}")
    scales = tuple(args.scales or default_scales(side))
    tokenizer.check_scales(scales)
    if scales[-1] != (side, side) or len(scales) == 1:
        expected = f"two or more, the last {side}, {args.size} pixels / {cell}"
        raise ValueError(f"--scales: got {scales}, expected {expected}")
    return scales


def default_scales(latent):
    """Scales for a latent of latent x latent: published ones, else sides that grow by about 1.4."""
    for published in hmar.SCALES.values():
        if published[-1][0] == latent:
            return published
    sides = [latent]
    while sides[0] > 1:
        sides.insert(0, max(1, min(sides[0] - 1, round(sides[0] / 1.4))))
    return tuple((side, side) for side in sides)


# ---- run folders and processes
#
# RUN/args.json holds the flags that change a result, class names, a hash of the images and, once
# there are tokens, the tokenizer's digest; RUN/<stage>.checkpoint.pt what a stage goes on from.
# Only the first process writes files and looks which are there; all read them.


def claim_folder(args, record):
    """The lock on the run folder, which then is this run's. ValueError where it is another's.

    Until there are weights, tokens or a checkpoint, a run with other flags may take its place.
    """
    os.makedirs(args.out, exist_ok=True)
    lock = sample.lock_folder(args.out)
    record = json.loads(json.dumps(record, default=str))  # as it comes back from a file
    before = read_record(args)
    paths = [Path(args.out, "tokens.npy"), *(path for s in STAGES for path in stage_paths(args, s))]
    there = [path for path in paths if path.exists()]
    if there and not before:
        raise ValueError(f"{there[0]}: found without args.json; expected a new --out")

    # class names follow from the images' paths, but for images alone: then it is the folder's
    old, new = (run.get("flags", {}) | dict(images=run.get("images")) for run in (before, record))
    if old != new and there:
        text = f"begun with other flags or images: {sample.differences(old, new)}"
        raise ValueError(f"{args.out}: {text}; give another --out, or remove the folder")
    if old != new:
        sample.write_json(Path(args.out, "args.json"), record)

    # what a kill left
    for stage in STAGES:
        weights, checkpoint = stage_paths(args, stage)
        if weights in there:
            checkpoint.unlink(missing_ok=True)
    for path in (*Path(args.out).glob("*.tmp"), *Path(args.out).glob("samples/*.tmp")):
        if re.search(r"\.[0-9a-f]{16}\.tmp$", path.name):
            path.unlink()
    return lock


def read_record(args):
    """What args.json holds, {} where it is missing."""
    path = os.path.join(args.out, "args.json")
    record = sample.read_json(path)
    if record and not isinstance(record.get("flags"), dict):
        raise ValueError(f"{path}: expected what train.py wrote; give another --out")
    return record


def note_tokenizer(args, codec):
    """Notes in args.json the digest of the tokenizer, before anything is made with it.

    ValueError where there is what was made with another.
    """
    record, digest = read_record(args), sample.digest(codec)
    if record.get("tokenizer") == digest:
        return
    later = [path for stage in ("next-scale", "masked") for path in stage_paths(args, stage)]
    later = [path for path in (Path(args.out, "tokens.npy"), *later) if path.exists()]
    if later:
        names = ", ".join(map(str, later))
        raise ValueError(f"{names}: made with another tokenizer than tokenizer.pt; remove them")
    sample.write_json(Path(args.out, "args.json"), record | dict(tokenizer=digest))


def stage_paths(args, stage):
    """The stage's weights, and its checkpoint."""
    return Path(args.out, STAGES[stage]), Path(args.out, f"{stage}.checkpoint.pt")


def save_stage(args, stage, tree):
    """Writes a stage's weights, with which it is finished; its checkpoint goes."""
    weights, checkpoint = stage_paths(args, stage)
    save(weights, tree)
    if rank() == 0:
        checkpoint.unlink(missing_ok=True)
    barrier()


def load_stage(args, stage):
    """The weights of a finished stage. ValueError where it is not."""
    path, _ = stage_paths(args, stage)
    if not agreed(path.exists):
        raise ValueError(f"{path} is missing; python train.py {stage} makes it")
    tree, _ = sample.load(path, tokenizer if stage == "tokenizer" else hmar)
    return to_device(tree, args.device)


def save_checkpoint(args, stage, state, progress, window):
    """Saves what a stage goes on from: its tensors, (step, best step, best loss), and reports."""
    saved = dict(state=state, progress=progress, window=window)
    save(stage_paths(args, stage)[1], saved)


def load_checkpoint(args, stage, state):
    """((step, best step, best loss), reports) to go on from; its tensors are written into state.

    Where there is no checkpoint the stage begins. metrics.jsonl is cut to what it then says.
    """
    path = stage_paths(args, stage)[1]
    progress, window = (0, 0, math.inf), []
    if agreed(path.exists):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for own, other in zip(state, saved["state"], strict=True):
                if own.shape != other.shape:
                    raise ValueError("other shapes")
                own.copy_(other)
            progress, window = saved["progress"], to_device(saved["window"], args.device)
        except Exception as error:
            text = f"{path}: expected this stage's checkpoint; removed, the stage begins anew"
            raise ValueError(text) from error

    cut_metrics(args, stage, progress[0])
    word = f"goes on at step {progress[0]}" if progress[0] else "begins"
    say(f"{stage}: {word}, {args.steps[stage]} steps, saved every {args.save_every}")
    return progress, window


def cut_metrics(args, stage, step):
    """Takes later steps of a stage out of metrics.jsonl, and a line of which a kill left half."""
    path = Path(args.out, "metrics.jsonl")
    if rank() > 0 or not path.exists():
        return
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        found = re.match(rb'{"stage": "([a-z-]+)", "step": (\d+)', line)
        is_later = found and found[1].decode() == stage and int(found[2]) > step
        if line.endswith(b"\n") and not is_later:
            lines.append(line)
    sample.write_whole(path, lambda file: file.writelines(lines))


def save(path, tree):
    """Writes a tree of tensors: the old file or the whole new one. OSError if it cannot."""
    if rank() == 0:
        plain = pytree.tree_map(lambda x: x.detach().cpu() if torch.is_tensor(x) else x, tree)
        sample.write_whole(path, lambda file: torch.save(plain, file))
    barrier()  # from here on every process finds it


def write_sheet(args, name, rows, names):
    """Writes samples/<name>.png."""
    folder = Path(args.out, "samples")
    folder.mkdir(exist_ok=True)
    sample.write_sheets(folder / f"{name}.png", "PNG", [sample.sheet(rows, names)])


def to_device(tree, device):
    """The tree on a device; from pinned memory to CUDA, so that nothing waits for the copy."""

    def send(tensor):
        is_pinned = device.type == "cuda" and tensor.is_cpu
        return (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True)

    return pytree.tree_map(send, tree)


def rank():
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def world():
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(look):
    """What look() says in the first process, in all of them."""
    box = [look() if rank() == 0 else None]
    if world() > 1:
        torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def collected(value):
    """[each process's value] in the first process, None in the others."""
    parts = [value] * world() if rank() == 0 else None
    if world() > 1:
        torch.distributed.gather_object(value, parts)
    return parts


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
        patience = datetime.timedelta(hours=2)  # encoding may part the processes for long
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=patience)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Asks glibc to keep what is freed: faulting it in again takes a tenth of a small step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD, of which some take no more than 32 MiB
    if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def say(line):
    """Prints a line, once however many processes there are."""
    if rank() == 0:
        print(line, flush=True)


def main(argv=None):
    """The command; see `sample.command`."""
    status = sample.command("train.py", train, parser(), argv)
    # after an error it would wait for the others; torchrun ends them
    if status == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
