"""Training: drawn shapes or a folder of images -> tokenizer.pt, hmar.pt; and `python train.py`.

    images, prepared once -> tokenizer stage -> tokens (N, crops, L) -> next-scale, masked stage

A step's batch follows from seed and number: on a CPU a killed run goes on bit for bit. There is no
adversarial loss; the perceptual one uses no weights of others (`learn_levels`).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loaded: no traceback

import collections
import colorsys
import ctypes
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

# a stage is finished when its file is there
STAGES = {"tokenizer": "tokenizer.pt", "next-scale": "next-scale.pt", "masked": "hmar.pt"}

COOL_DOWN = 0.6  # last share of a stage's steps: the rate falls to zero
WARM_UP = 0.06  # first share: the rate rises to its peak
AVERAGED = 0.25  # share of the steps over which the moving average of the weights (EMA) reaches
PATIENCE = 1 / 3  # a stage ends after this share of the steps without a better held-out loss
CLIP = 1.0  # largest gradient norm
# keys of AdamW's leaves: embeddings, codes, heads, modulation, convolutions of single channels
NOT_FOR_MUON = {"classes", "start", "levels", "positions", "codebook", "head", "modulation"}
NOT_FOR_MUON |= {"depthwise", "embedding"}
LOG_EVERY = 50  # steps
SAVE_SECONDS = 300  # between two checkpoints; after them the next line to be logged saves
LABEL_DROP = 0.1  # label dropout: these become the null class, for guidance
REVIVE_EVERY = 20  # steps, after which codes that nobody chose are replaced
REVIVE_UNTIL = 0.8  # share of the steps: the last codes to be replaced get time to settle
COARSE_EVERY = 4  # every fourth image of the tokenizer's is decoded from coarse scales too
COARSE_WEIGHT = 0.5  # of their squared error
# of errors in `reconstruction_loss`, beside 1 of the squared and .5 of the absolute one
EDGE_WEIGHT, TEXTURE_WEIGHT, PERCEPTUAL_WEIGHT, HUE_WEIGHT = 0.25, 0.5, 0.08, 0.28
PERCEPTUAL_STEPS = 400  # in which the perceptual network is learned
PERCEPTUAL_WIDTHS = 3, 32, 64, 96, 128  # its colours and channels
DRAWINGS = 20_500  # where there is no --data
DRAWN_STEPS = 0.68  # of other images' steps, for drawings are plain
CROPS = 20_000  # in all: a small folder's images are learned in up to 16 crops each, at least 2
JUDGED = 128  # of the held-out images, at a look
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def dial(depth, size, images):
    """{setting: value} that --depth and --size decide, for so many images to train on.

    Measured at depths 2 and 3; extrapolated to meet the published settings at 16.
    """
    relative_depth = depth / 2
    is_large = depth >= 8  # the published sizes and layers
    # convolutions gain .16 nats a token, neighbours .24 and more
    local = dict(gamma=0.1, convolutions=True, neighbours=True)
    rate = 4e-3 * relative_depth**-0.7  # deep wants less, its large batch more (HyperP 2603.28743)
    cell, codec = codec_sizes(depth, size)
    perceptual = size >= 48 and not is_large  # at 32 it is not worth its time

    # images seen grow as the parameters, by depth^3 (Hoffmann et al. 2022); they are fewer if they
    # are larger, since each has more tokens, and no folder is worth more than 200 epochs
    seen = min(50_000 * relative_depth**3 * math.sqrt(32 / size), 200 * images)
    # as the root of what is seen (McCandlish et al. 2018)
    batch = 8 * round(2 * relative_depth**1.5)
    if perceptual:  # such images have more tokens, and fewer were as good
        seen *= 0.69
        batch //= 2
    shares = {"tokenizer": 0.43 if codec["fold"] > 1 else 0.35, "next-scale": 1, "masked": 1 / 11}
    return dict(
        cell=cell,
        codec=codec,
        growth=2 if depth <= 2 else math.sqrt(2),  # of scales' sides; 2 is worse at depth 3
        transformer=dict(depth=depth) | ({} if is_large else local),
        masked_blocks=(depth + 1) // 2,
        loss_weights="lognormal" if is_large else "token",
        lr={"tokenizer": rate, "next-scale": rate, "masked": rate / 4},
        perceptual=perceptual,
        # rate * decay * steps are constant (Wang and Aitchison 2024)
        decay=0.05 * relative_depth**-0.8,
        looks=3 * depth,  # of a stage
        batch=batch,
        steps={stage: math.ceil(share * seen / batch) for stage, share in shares.items()},
    )


def codec_sizes(depth, size):
    """(pixels a side of a latent position, arguments of `tokenizer.init`)."""
    is_large = depth >= 8
    # squares of pixels become channels: at 64 pixels reconstructions are at a Frechet distance of
    # 1.65 for 3.55, in 5 % more time
    fold = 2 if not is_large and (size >= 48 or depth <= 2) else 1
    cell = min(16, max(4, 2 ** math.ceil(math.log2(size / 16))))  # a 16th of the side, 4 to 16
    halvings = cell.bit_length() - 1
    # every level but the last halves, and the fold halves once
    multipliers = halvings * (1,) if fold > 1 else (1, 1, 2, 2, 4)[: halvings + 1]
    return cell, dict(
        # 128 at depth 1, 256 at 2, 512 at 3; from 16 on 4,096, as published
        codes=min(4096, 2 ** round(8 + 4 / 3 * math.log2(depth / 2))),
        code_dim=32 if is_large else 16,
        channels=fold * max(32, 32 * round(10 * depth / 32)),  # the published 160 at depth 16
        multipliers=multipliers,
        fold=fold,
        residual_blocks=2 if is_large else 1,
        attention=is_large,
    )


def default_scales(size, cell, growth, doubled=True):
    """Published scales, else sides that grow by a factor; doubled: the last twice, if up to 8."""
    if cell == 16 and size in hmar.SCALES:
        return hmar.SCALES[size]
    latent = size // cell
    sides = [latent, latent] if doubled and latent <= 8 else [latent]
    while sides[0] > 1:
        sides.insert(0, round(sides[0] / growth))
    return tuple((side, side) for side in sides)


# ---- the loop, the same for all stages


class Stage(NamedTuple):
    """What `fit` is told of a stage beside its weights and functions."""

    name: str
    place: str  # "1 of 3"
    out: Path  # the run folder
    flags: dict  # as args.json there has them
    steps: int
    batch: int  # images a step, over all processes
    peak: float  # of the learning rate
    decay: float  # of Muon's weights
    looks: int  # at held-out images
    newton_schulz: int  # iterations of Muon's


# What a stage gives to `fit`:
#
#     loss(tree, **batch)     -> (mean over its images, {name: tensor} to log, one of traces)
#     batch(step, positions)  -> {name: tensor}, of these images of a step's batch
#     look(tree)              -> {name: number or list} of held-out images; least "loss" is best
#     after_step(step, traces, weights, averages)  may change the last two, which are trees, in
#                                place, and extra: tensors that go into the checkpoint too


def fit(stage, tree, loss, batch, look, after_step=lambda *_: None, extra=()):
    """All leaves of the tree learn; returns their moving average (EMA) at the best look."""
    leaves = [new_parameter(leaf) for leaf in pytree.tree_leaves(tree)]
    ema, best = ([leaf.detach().clone() for leaf in leaves] for _ in range(2))
    optimizers = new_optimizers(tree, leaves, stage.decay, stage.newton_schulz)
    kept = dict(leaves=leaves, ema=ema, best=best, extra=extra)
    at = resume_or_begin(stage, kept, optimizers)  # {"step", "best_step", "best_loss"}
    window, part_size = [], stage.batch // sample.world()  # images that pass at once
    last_save = time.monotonic()
    start = at["step"], last_save

    for step in range(at["step"] + 1, stage.steps + 1):
        report, traces, part_size = add_gradients(stage, step, loss, batch, tree, leaves, part_size)
        average_gradients(leaves)
        window.append(report | dict(gradient=nn.utils.clip_grad_norm_(leaves, CLIP)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, stage.steps, stage.peak)
            optimizer.step()
            optimizer.zero_grad()
        update_average(ema, leaves, step, stage.steps)
        with torch.no_grad():
            after_step(step, traces, replace_leaves(tree, leaves), replace_leaves(tree, ema))

        is_look = step == stage.steps or step % math.ceil(stage.steps / stage.looks) == 0
        if step % LOG_EVERY and not is_look:
            continue
        log(stage, step, start, means(window))
        window.clear()

        if is_look:
            found = broadcast(lambda: look(replace_leaves(tree, ema)))
            log(stage, step, start, {f"held_out_{name}": found[name] for name in found})
            if found["loss"] < at["best_loss"]:
                at |= dict(best_step=step, best_loss=found["loss"])
                torch._foreach_copy_(best, ema)
        is_over = is_look and step - at["best_step"] >= PATIENCE * stage.steps
        if is_look or time.monotonic() - last_save > SAVE_SECONDS:
            at["step"] = stage.steps if is_over else step  # if over, resuming takes none
            save_checkpoint(stage, at, kept, optimizers)
            last_save = time.monotonic()
        if is_over:
            break

    say(f"{stage.name}: best at step {at['best_step']}, loss {at['best_loss']:.4g}")
    return replace_leaves(tree, best)


def add_gradients(stage, step, loss, batch, tree, leaves, part_size):
    """Adds the gradients of the mean loss over this process's images of a batch.

    tree says the shapes of the leaves. part_size: how many images pass the networks together.
    Returns (means to log, [trace, ...] of the parts, part_size, halved after OutOfMemoryError).
    """
    own = np.arange(stage.batch).reshape(sample.world(), -1)[sample.rank()]
    numbers, traces = {}, []
    try:
        for part in np.array_split(own, math.ceil(len(own) / part_size)):
            share = len(part) / len(own)
            value, report, trace = loss(replace_leaves(tree, leaves), **batch(step, part))
            (share * value).backward()
            for name, number in report.items():
                numbers[name] = numbers.get(name, 0) + share * number.detach()
            traces.append(trace)
        return numbers, traces, part_size
    except torch.OutOfMemoryError:
        if part_size == 1:
            raise
    # here, not in the handler, which would keep the tensors of the failed pass
    value = report = trace = None
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.empty_cache()  # what torch holds free is lacking to others: kernels, NCCL
    return add_gradients(stage, step, loss, batch, tree, leaves, (part_size + 1) // 2)


def new_parameter(leaf):
    """A leaf that learns. Muon takes matrices alone, so a convolution is one here.

    `replace_leaves` gives it its shape back.
    """
    leaf = leaf.detach().clone()
    return nn.Parameter(leaf.flatten(1) if leaf.ndim == 4 else leaf)


def replace_leaves(tree, leaves):
    """The tree with these leaves, in its own shapes, without a copy."""
    own, structure = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([leaf.view_as(old) for leaf, old in zip(leaves, own)], structure)


def new_optimizers(tree, leaves, decay, newton_schulz=5):
    """[Muon for matrices and convolutions (Jordan et al. 2024), AdamW for all others].

    Muon multiplies in bf16 where the processor has it, whatever --dtype says.
    """
    matrices, others = [], []
    for (path, old), leaf in zip(pytree.tree_flatten_with_path(tree)[0], leaves):
        keys = {getattr(entry, "key", None) for entry in path}
        embeds_codes = old.ndim == 2 and keys & {"input", "own_input"}  # of published trees
        is_other = old.ndim < 2 or embeds_codes or keys & NOT_FOR_MUON
        (others if is_other else matrices).append(leaf)
    muon = Muon(matrices, decay, newton_schulz, sample.find_dtype(None, leaves[0].device))
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, to the bit, but in any dtype.

    torch's multiplies in bf16 alone, which takes a processor that lacks it 20 times as long as
    fp32. Steps are scaled to AdamW's size: one rate for both (Liu et al. 2025).
    """

    def __init__(self, matrices, decay, newton_schulz, dtype):
        super().__init__(matrices, dict(lr=0.0))
        self.decay, self.newton_schulz, self.dtype = decay, newton_schulz, dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for matrix in group["params"]:
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            momentum = state["momentum"].lerp_(matrix.grad, 1 - 0.95)
            update = matrix.grad.lerp(momentum, 0.95).to(self.dtype)  # Nesterov's
            update = orthogonalize(update, self.newton_schulz)
            matrix.mul_(1 - group["lr"] * self.decay)
            matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalize(matrix, iterations):
    """The matrix with singular values near 1, by Newton-Schulz iterations (Jordan et al. 2024)."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):  # x <- 3.4445 x - 4.775 x x' x + 2.0315 x x' x x' x
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    return x.T if is_tall else x


def learning_rate(step, steps, peak):
    """Warm-up, constant, then linear to zero (Hägele et al. 2024)."""
    left = 1 - (step - 1) / steps
    return peak * min(1, step / (WARM_UP * steps), left / COOL_DOWN)


@torch.no_grad()
def update_average(ema, leaves, step, steps):
    """A step of the average, whose window grows: initial weights soon leave it."""
    kept = min(1 - 1 / (1 + AVERAGED * steps), step / (step + 10))
    torch._foreach_lerp_(ema, leaves, 1 - kept)


def means(window):
    """{name: number or list}: reports of steps, averaged over them and the processes."""

    def mean(*values):
        return (add_over_processes(torch.stack(values).mean(0)) / sample.world()).tolist()

    return pytree.tree_map(mean, *window)


def log(stage, step, start, numbers):
    """Adds a line to metrics.jsonl and says it, with the time left at the pace since start.

    start: (step, seconds). ValueError where a number is not finite, which JSON cannot hold.
    """
    try:
        line = json.dumps(dict(stage=stage.name, step=step) | numbers, allow_nan=False)
    except ValueError as error:
        text = "loss or gradient is not finite; a lower --lr may help"
        raise ValueError(f"{stage.name}, step {step}: {text}") from error
    if sample.rank() == 0:
        with open(stage.out / "metrics.jsonl", "a") as file:
            file.write(line + "\n")
    pace = (time.monotonic() - start[1]) / (step - start[0])  # seconds a step
    left = datetime.timedelta(seconds=round(pace * (stage.steps - step)))
    words = "  ".join(f"{name} {x:.4g}" for name, x in numbers.items() if isinstance(x, float))
    say(f"{stage.name} ({stage.place}) {step}/{stage.steps}  {left} left  {words}", renewed=True)


def save_checkpoint(stage, at, kept, optimizers):
    """Writes RUN/checkpoint.pt: all that going on needs, and how long metrics.jsonl is."""
    if sample.rank() > 0:
        return
    metrics = stage.out / "metrics.jsonl"
    metrics.touch()
    states = [optimizer.state_dict() for optimizer in optimizers]
    saved = dict(stage=stage.name, at=at, optimizers=states, metrics=metrics.stat().st_size)
    saved["flags"] = own_record(stage.out, stage.flags)["flags"]
    save_tree(stage.out / "checkpoint.pt", saved | kept)


@torch.no_grad()
def resume_or_begin(stage, kept, optimizers):
    """{"step", "best_step", "best_loss"} to go on from; a checkpoint's tensors replace those given.

    A stage that begins is saved at step 0, so that metrics.jsonl can be cut to what it was then.
    """
    path, at = stage.out / "checkpoint.pt", dict(step=0, best_step=0, best_loss=math.inf)
    saved = sample.load_file(path) if broadcast(path.exists) else dict(stage=None)
    try:
        is_begun = saved["stage"] == stage.name
        if is_begun:
            if saved["flags"] != stage.flags:
                raise ValueError("of other flags")
            at = saved["at"]
            for name, tensors in kept.items():
                for tensor, old in zip(tensors, saved[name], strict=True):
                    tensor.copy_(old.view_as(tensor))  # view_as does not broadcast
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
    except Exception as error:
        hint = f"once it is removed, {stage.name} begins anew"
        raise ValueError(f"{path}: not of this run; {hint}") from error

    if sample.world() > 1:
        torch.distributed.barrier()  # all have read it before the first writes another
    if not is_begun:
        save_checkpoint(stage, at, kept, optimizers)
    elif sample.rank() == 0:
        with open(stage.out / "metrics.jsonl", "ab") as file:
            file.truncate(min(file.tell(), saved["metrics"]))
    size = sum(leaf.numel() for leaf in kept["leaves"]) / 1e6
    work = f"{size:.3g} M parameters, {stage.steps} steps of {stage.batch} images"
    say(f"{stage.name} ({stage.place}): {work}, {at['step']} done")
    return at


# ---- the tokenizer stage


def train_tokenizer(run, stage):
    """Images -> a codec each of whose scales is an image; dead codes are replaced on the way."""
    held_out, training = split_held_out(load_images(run))  # (n, crops, 3, H, W)
    judged = to_unit(held_out[:JUDGED, 0]).to(run.device)
    init = run.given.start_tokenizer
    codec = to_device(init or tokenizer.init(**run.codec, seed=run.seed), run.device)
    chosen = torch.zeros(len(codec["codebook"]), dtype=torch.int64, device=run.device)
    variance = hues(to_unit(training[:JUDGED, 0])).var((1, 2, 3), correction=0).mean().item()
    levels = learn_levels(run, training, load_labels(run)[1], min(PERCEPTUAL_STEPS, stage.steps))
    images_per_coarse = run.batch / math.ceil(run.batch / COARSE_EVERY)

    def loss(codec, images, coarse, stops):
        fast = tokenizer.cast(codec, run.dtype)
        passed = tokenizer.training_pass(fast, images, run.scales, coarse, stops)
        errors = (passed["coarse_images"] - images[coarse]).square().mean((1, 2, 3))
        # divided by what is expected, not by len(coarse): parts of a batch have more or less of
        # them, and the parts' losses are to add up to the batch's
        coarse_error = images_per_coarse * errors.sum() / len(images)
        total = reconstruction_loss(passed["images"], images, variance, levels)
        total = total + COARSE_WEIGHT * coarse_error + passed["loss"]
        report = dict(loss=total, coarse=coarse_error, quantisation=passed["loss"])
        return total, report, (passed["tokens"], passed["residuals"])

    def batch(step, positions):
        rows, crops, generator = draw_rows(run, stage.name, step, len(training))
        stops = torch.randint(len(run.scales) - 1, (run.batch,), generator=generator)
        images = to_unit(training[rows[positions], crops[positions]])
        # positions count in the batch, coarse counts in this part of it
        coarse = torch.from_numpy(np.flatnonzero(positions % COARSE_EVERY == 0))
        made = dict(images=images, coarse=coarse, stops=stops[positions][coarse])
        return to_device(made, run.device)

    def look(codec):
        numbers, rows = measure_tokenizer(tokenizer.cast(codec, run.dtype), judged, run.scales)
        names = ["original", *(f"after {h}x{w}" for h, w in run.scales)]
        page = sample.sheet(rows, names)
        sample.save_sheets(run.out / "samples/reconstructions.png", "PNG", [page])
        return numbers

    replace = partial(replace_dead_codes, run, stage, chosen)
    loss = torch.compile(loss) if run.compile else loss
    return fit(stage, codec, loss, batch, look, replace, [chosen])


def replace_dead_codes(run, stage, chosen, step, traces, weights, averages):
    """After a step: adds to the counts chosen (V,); now and then codes at 0 become residuals.

    The counts begin again then. At step 1 this initialises a new codebook from data.
    """
    tokens, residuals = zip(*traces)  # of each part of the batch, a list by scale
    tokens = torch.cat([x.flatten() for x in pytree.tree_leaves(tokens)])
    counts = torch.zeros_like(chosen).index_add_(0, tokens, torch.ones_like(tokens))
    chosen.add_(add_over_processes(counts))
    is_first = step == 1 and run.given.start_tokenizer is None
    is_due = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * stage.steps
    if is_first or is_due:
        residuals = [gather(torch.cat(parts)) for parts in zip(*residuals)]  # of each scale
        codebook, generator = weights["codebook"], generator_of(run.seed, "revive", step)
        codes, dead = tokenizer.revive_codes(codebook, chosen, residuals, generator)
        codebook.copy_(codes)
        averages["codebook"][dead] = codes[dead]  # else it would long remember the dead ones
        chosen.zero_()


def reconstruction_loss(decoded, images, variance, levels):
    """Squared, absolute, edge, texture, hue and perceptual errors of reconstructions (B, 3, H, W).

    The first three favour a blur where detail cannot be told; the error of texture asks for as much
    grain as there was. The error of hues is relative to the data's variance of hue: in photographs
    green varies so little beside brightness that no code was spent on it otherwise.
    """
    error = decoded - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    plain = error.square().mean() + 0.5 * error.abs().mean() + EDGE_WEIGHT * edges
    grain = (texture(decoded) - texture(images)).abs().mean()
    hue = hues(error).square().mean() / (variance + 0.01)  # .01: grey images
    seen = perceptual_error(levels, decoded, images)
    return plain + TEXTURE_WEIGHT * grain + HUE_WEIGHT * hue + PERCEPTUAL_WEIGHT * seen


def texture(images):
    """(B, 1, H / 4, W / 4): how much a blur takes from cells of 4 x 4, the root of mean squares."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return (cell_means((images - blurred).square().sum(1, True)) + 1e-4).sqrt()


def hues(images):
    """(2, B, H / 4, W / 4): red - blue and 2 green - red - blue of images, means over 4 x 4."""
    red, green, blue = cell_means(images).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


def cell_means(images):
    """Means over cells of 4 x 4 pixels."""
    return F.adaptive_avg_pool2d(images, [max(1, side // 4) for side in images.shape[2:]])


def perceptual_error(levels, decoded, images):
    """Squared difference of what the levels see, in unit vectors (LPIPS, Zhang et al. 2018)."""
    total = 0
    for pair in zip(level_maps(levels, decoded), level_maps(levels, images)):
        seen, real = (F.normalize(x.float(), dim=1) for x in pair)
        total = total + (seen - real).square().sum(1).mean()
    return total


def level_maps(levels, x):
    """Yields what each level sees, (B, channels, h, w), the next at half of the sides."""
    for level in levels:
        x = level(x.to(level[0].weight.dtype))
        yield x
        x = F.avg_pool2d(x, 2, ceil_mode=True)


def learn_levels(run, images, labels, steps):
    """Levels of a small classifier of the data, learned in seconds, for `perceptual_error`; or [].

    A run that goes on learns them again.
    """
    if not run.perceptual or len(run.class_names) == 1:
        return []
    net = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        for inputs, width in itertools.pairwise(PERCEPTUAL_WIDTHS):
            convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            net.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        net.append(nn.Linear(PERCEPTUAL_WIDTHS[-1], len(run.class_names)))
    *levels, head = net.to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)

    count = min(32, max(4, 2**17 // run.size**2))  # fewer images above 64 pixels
    say(f"tokenizer: learns to see, {steps} steps of {count} images")
    for step in range(1, steps + 1):
        generator = generator_of(run.seed, "levels", step)
        rows = torch.randint(len(images), (count,), generator=generator)
        crops = torch.randint(run.crops, (count,), generator=generator)
        pixels = to_unit(images[rows.numpy(), crops.numpy()]).to(run.device)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype == torch.bfloat16):
            *_, seen = level_maps(levels, pixels)
            scores = head(seen.mean((2, 3)))
        F.cross_entropy(scores, labels[rows].to(run.device)).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 3e-3)
        optimizer.step()
        optimizer.zero_grad()
    net.eval().requires_grad_(False).to(run.dtype)  # and so the levels, which are its parts
    return levels


@torch.no_grad()
def measure_tokenizer(codec, images, scales):
    """({name: number or list}, rows of a sheet) of held-out images (B, 3, H, W) in [-1, 1].

    loss: the squared error. psnr: in dB, after each scale. perplexity: of each scale's codes, the
    exponential of their entropy. Rows: up to eight originals, then the same after each scale.
    """
    errors, rows, counts = [], [], torch.zeros(len(scales), len(codec["codebook"]))
    for part in images.split(sample.images_at_once(images[0, 0].numel())):
        features = tokenizer.encode_features(codec, part)
        _, tokens, f_hats = zip(*tokenizer.quantise(codec, features, scales))
        decoded = torch.stack([tokenizer.decode_features(codec, f_hat) for f_hat in f_hats])
        errors.append((decoded - part).square().mean((2, 3, 4)))  # (S, B)
        rows = rows or [part[:8], *decoded[:, :8]]
        for k, chosen in enumerate(tokens):
            counts[k] += torch.bincount(chosen.flatten().cpu(), minlength=counts.shape[1])

    errors = torch.cat(errors, 1)
    psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean(1).tolist()
    share = counts.double() / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp().tolist()
    return dict(loss=errors[-1].mean().item(), psnr=psnr, perplexity=perplexity), rows


# ---- the next-scale and the masked stage


def train_transformer(run, stage):
    """Tokens -> a transformer that predicts each scale from the coarser ones, or its masked branch.

    The masked stage trains that branch alone, to predict hidden tokens from the others of their
    scale too (HMAR, stage two).
    """
    codec = load_stage(run, "tokenizer")
    held_out_labels, labels = load_labels(run)
    held_out, training = split_held_out(load_or_write_tokens(run, codec))  # (n, crops, L)
    is_masked = stage.name == "masked"
    learning = params = load_stage(run, "next-scale") if is_masked else start_next_scale(run)
    if is_masked:
        params = hmar.add_masked_branch(params, run.masked_blocks, seed=run.seed)
        learning = dict(masked=params["masked"])  # the part that `fit` trains
    weights = hmar.scale_weights(run.scales, run.loss_weights).to(run.device)  # (L,)
    lengths = tokenizer.lengths(run.scales)

    def batch(step, positions):
        rows, crops, generator = draw_rows(run, stage.name, step, len(training))
        is_dropped = torch.rand(run.batch, generator=generator) < LABEL_DROP
        own_labels = labels[rows].masked_fill(is_dropped, len(run.class_names))
        tokens = training[rows[positions], crops[positions]].astype(np.int64)
        made = dict(labels=own_labels[positions], tokens=torch.from_numpy(tokens))
        if is_masked:
            ratio = torch.rand(run.batch, 1, generator=generator)  # of hidden tokens
            uniform = torch.rand(run.batch, sum(lengths[1:]), generator=generator)
            made["mask"] = (uniform < ratio)[positions]
        return to_device(made, run.device)

    def loss(tree, labels, tokens, mask=None):
        fast = hmar.cast(params | tree, run.dtype)
        inputs = tokenizer.next_scale_inputs(codec, tokens, run.scales)
        if is_masked:
            own_inputs = tokenizer.masked_inputs(codec, tokens, run.scales, mask)
            losses = hmar.masked_losses(fast, labels, tokens, inputs, own_inputs, mask)  # (hidden,)
            # divided by what is expected, half of all, not by their number: see train_tokenizer
            total = losses.sum() / (0.5 * mask.numel())
            return total, dict(loss=total), None
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, run.causal).mean(0)  # (L,)
        total = (losses * weights).sum()
        by_scale = torch.stack([scale.mean() for scale in losses.split(lengths)])
        return total, dict(loss=total, scale_losses=by_scale), None

    def look(tree):
        draw_samples(run, stage.name, hmar.cast(params | tree, run.dtype), codec)
        judged = held_out_labels[:JUDGED], held_out[:JUDGED, 0]
        return measure_transformer(run, partial(loss, tree), *judged, is_masked)

    compiled = torch.compile(loss) if run.compile else loss
    return params | fit(stage, learning, compiled, batch, look)


def start_next_scale(run):
    """An untrained tree, or --init's made to fit: all blocks a trunk, these scales and classes."""
    classes, params = len(run.class_names), run.given.start_transformer
    if params is None:
        sizes = dict(codes=run.codec["codes"], code_dim=run.codec["code_dim"], scales=run.scales)
        params = hmar.init(**run.transformer, **sizes, classes=classes, seed=run.seed)

    branch = params["next_scale"]
    params = params | dict(trunk=params["trunk"] + branch["blocks"])
    params["next_scale"] = branch | dict(blocks=[])
    params.pop("masked", None)
    if hmar.scales(params) != run.scales:
        params = hmar.resize_positions(params, run.scales)
    if len(params["classes"]) != classes + 1:  # new embeddings, those of an untrained tree
        width = params["classes"].shape[1]
        new = hmar.init(depth=1, width=width, classes=classes, seed=run.seed)
        params["classes"] = new["classes"]
    return to_device(params, run.device)


@torch.no_grad()
def measure_transformer(run, loss, labels, tokens, is_masked):
    """{"loss": the mean over held-out images}, of labels (B,) and tokens (B, L)."""
    batch = [labels, torch.from_numpy(tokens.astype(np.int64))]
    if is_masked:
        shape = len(tokens), tokens.shape[1] - math.prod(run.scales[0])
        batch.append(torch.rand(shape, generator=generator_of("held-out mask")) < 0.5)

    total = 0
    for part in zip(*(rows.split(sample.images_at_once(run.size**2)) for rows in batch)):
        value, *_ = loss(*to_device(part, run.device))
        total += len(part[0]) * value.item()
    return dict(loss=total / len(labels))


@torch.no_grad()
def draw_samples(run, name, params, codec):
    """Writes samples/<name>.png: eight samples of each class, of the first ten."""
    names, fast = run.class_names[:10], tokenizer.cast(codec, run.dtype)
    labels = torch.arange(len(names), device=run.device).repeat_interleave(8)
    images, few = [], sample.images_at_once(run.size**2)
    schedule = 1 if name == "masked" else None  # by default there may be no masked pass
    for number, part in enumerate(labels.split(few)):
        options = dict(seed=few * number, is_causal=run.causal, schedule=schedule)
        images.append(sample.generate(params, fast, part, **options)[0])
    page = sample.sheet(torch.cat(images).split(8), names)
    sample.save_sheets(run.out / f"samples/{name}.png", "PNG", [page])


# ---- here the method ends; data: drawings, images prepared once, tokens


def polygon(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular one around (centre, 0); y points down."""
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

    label = index % 10, an index into SHAPES. All sizes show the same picture.
    """
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
        corners = (centre + radius * np.array(outline) @ rotation) * 4 * size
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


class Images(NamedTuple):
    """What a run trains on."""

    kind: str  # "drawings", "files" or, if these are prepared and may be gone, "prepared"
    class_names: list
    count: int
    fingerprint: str = None  # of the files' names and sizes
    newest: float = 0  # the latest time of theirs
    files: list = ()  # [(path, label), ...]
    notes: list = ()  # lines to say of what was passed over


def list_images(folder):
    """The Images in --data: one sub-folder a class, or images alone.

    Sorted, of any depth, but not of hidden folders.
    """

    def refuse(reason):
        raise ValueError(f"--data: {reason}")

    groups, others = {}, collections.Counter()  # {class, or "." for the folder itself: its paths}
    digest, newest = hashlib.sha256(), 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        paths = groups.setdefault(os.path.relpath(place, folder).split(os.sep)[0], [])
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                refuse(f"{place}/{name} is a link to a folder, which is not followed")
        for name in sorted(name for name in names if name[0] != "."):
            path, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if suffix not in SUFFIXES or not os.path.isfile(path):  # a link to nothing, a pipe
                others[suffix or "no suffix"] += 1
                continue
            paths.append(path)
            state = os.stat(path)
            newest = max(newest, state.st_mtime)
            digest.update(f"{os.path.relpath(path, folder)!r} {state.st_size}\n".encode())

    notes = [f"--data: {others[suffix]} files of {suffix} passed over" for suffix in others]
    empty = [name for name in groups if not groups[name] and name != "."]
    notes += [f"--data: {name}: no image for this class" for name in empty]
    groups = {name: paths for name, paths in groups.items() if paths}
    if not groups:
        refuse(f"got {folder!r}, expected a folder with {', '.join(SUFFIXES)}")
    if "." in groups and len(groups) > 1:
        refuse(f"got {folder!r}, with images beside sub-folders of images")
    files = [(path, label) for label, paths in enumerate(groups.values()) for path in paths]
    names = [Path(folder).resolve().name] if "." in groups else [*groups]
    return Images("files", names, len(files), digest.hexdigest()[:16], newest, files, notes)


def prepare(run):
    """Writes images.bin, labels.npy, with --tokenizer tokens.npy too, and args.json last of all.

    images.bin: uint8 (N, crops, 3, size, size), in an order by the seed, held-out ones first. With
    --tokenizer all are encoded as they are read, and held-out ones kept, for tests/judge.py. A file
    that cannot be decoded is named and left out; ValueError where the system cannot read one.
    """
    codec, labels, tokens = run.given.tokenizer, [], []
    room = count = run.images.count  # room: for images still to be kept
    if codec:
        codec = to_device(tokenizer.cast(codec, run.dtype), run.device)
        room = count_held_out(count)
    with sample.whole_file(run.out / "images.bin") as file:
        for pairs in say_progress(read_images(run), count, "images prepared"):
            pixels = np.stack([crops for crops, _ in pairs])  # (n, crops, 3, size, size)
            labels += [label for _, label in pairs]
            file.write(pixels[:room])
            room = max(0, room - len(pixels))
            if codec:
                tokens.append(encode_crops(run, codec, pixels))

    if len(labels) < 2:
        raise ValueError(f"--data: {len(labels)} images can be read, expected two or more")
    if codec:
        save_array(run.out / "tokens.npy", np.concatenate(tokens))
    save_array(run.out / "labels.npy", labels)
    sample.write_json(run.out / "args.json", run.record)


def read_images(run):
    """Yields [(uint8 (crops, 3, size, size), label), ...] of some files, in a random order."""

    def read(number):
        try:
            return read_crops(run, number)
        except ValueError as error:
            print(f"left out: {sample.replace_unprintable(str(error))}", file=sys.stderr)
        except OSError as error:  # of the system, not of the file
            raise ValueError(f"--data: {run.images.files[number][0]}: {error}") from error

    order = torch.randperm(run.images.count, generator=generator_of(run.seed, "rows"))
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # Pillow frees Python's lock
        for numbers in order.split(64):
            pairs = [pair for pair in pool.map(read, numbers.tolist()) if pair]
            if pairs:
                yield pairs


def read_crops(run, number):
    """(uint8 (crops, 3, size, size), label) of a file: the centre, then random crops.

    With --flip every second one is mirrored. ValueError where it cannot be decoded.
    """
    if run.images.kind == "drawings":  # they vary enough for one crop
        image, label = draw_shape(number, run.size)
        crops = [image]
    else:
        path, label = run.images.files[number]
        image = sample.read_image(path, shortest=2 * run.size)
        seeds = [None, *((run.seed, number, i) for i in range(1, run.crops))]
        crops = [crop(image, run.size, seed) for seed in seeds]
        if run.flip:
            crops[1::2] = map(ImageOps.mirror, crops[1::2])
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2)), label


def crop(image, size, seed):
    """An image -> size x size: a random square, from the largest down to 1 / 1.125 of it, resized.

    seed None: the largest, at the centre.
    """
    width, height = image.size
    reach = min(width, height)  # the square's side
    left, top = (width - reach) // 2, (height - reach) // 2
    if seed is not None:
        zoom, x, y = np.random.default_rng(seed).random(3).tolist()
        reach /= 1 + zoom / 8
        left, top = x * (width - reach), y * (height - reach)

    box = (left, top, left + reach, top + reach)
    return image.resize((size, size), Image.LANCZOS, box=box, reducing_gap=2.0)


def count_held_out(images):
    """How many of so many images are held out: a twentieth, 128 to 500, an eighth at most."""
    return max(1, min(500, max(128, images // 20), images // 8))


def split_held_out(rows):
    """[held-out, training] rows of all images, in the order in which they were prepared."""
    return np.split(rows, [count_held_out(len(rows))])


def load_labels(run):
    """[held-out, training] labels, int64 (n,); images and tokens are in their order."""
    labels = load_array(run.out / "labels.npy", len(run.class_names))
    return [torch.from_numpy(part) for part in split_held_out(labels)]


def load_images(run):
    """uint8 (N, crops, 3, size, size): images.bin, mapped. ValueError unless it is whole."""
    path = run.out / "images.bin"
    shape = sum(map(len, load_labels(run))), run.crops, 3, run.size, run.size
    got = path.stat().st_size
    if got != math.prod(shape):
        raise ValueError(f"{path}: got {got} bytes, expected {math.prod(shape)}; remove {run.out}")
    return np.memmap(path, np.uint8, mode="c", shape=shape)  # torch wants it writable


def load_or_write_tokens(run, codec):
    """(N, crops, L), the smallest unsigned type: tokens.npy, mapped, first written if need be."""
    path = run.out / "tokens.npy"

    def write_missing():
        if path.exists():
            return
        images = load_images(run)
        blocks = np.array_split(images, math.ceil(len(images) / 64))
        blocks = say_progress(blocks, len(images), "images encoded")
        fast = tokenizer.cast(codec, run.dtype)
        tokens = [encode_crops(run, fast, pixels) for pixels in blocks]
        save_array(path, np.concatenate(tokens))

    broadcast(write_missing)
    shape = sum(map(len, load_labels(run))), run.crops, sum(tokenizer.lengths(run.scales))
    return load_array(path, len(codec["codebook"]), shape)


def encode_crops(run, codec, pixels):
    """Tokens (n, crops, L), of the smallest unsigned type, of uint8 (n, crops, 3, size, size)."""
    parts = torch.from_numpy(pixels).flatten(0, 1).split(sample.images_at_once(run.size**2))
    parts = [tokenizer.encode(codec, to_unit(x).to(run.device), run.scales) for x in parts]
    tokens = torch.cat(parts).cpu().numpy().reshape(len(pixels), run.crops, -1)
    return tokens.astype(np.min_scalar_type(len(codec["codebook"]) - 1))


def save_array(path, array):
    """Writes an .npy file, whole or not at all."""
    with sample.whole_file(path) as file:
        np.save(file, array)


def load_array(path, below, shape=None):
    """Whole numbers of an .npy file, mapped. ValueError unless all are below that, of the shape."""
    try:
        array = np.load(path, mmap_mode="c")
        if array.shape != (shape or array.shape) or array.max() >= below:
            raise ValueError(f"got {array.shape}, up to {array.max()}")
        return array
    except (EOFError, ValueError) as error:
        expected = f"expected {shape or 'numbers'}, below {below}"
        raise ValueError(f"{path}: {error}, {expected}; remove {path.parent}") from error


def say_progress(blocks, total, done):
    """Yields the blocks; says every five seconds how many rows of the total are done."""
    count, said = 0, time.monotonic()
    for block in blocks:
        yield block
        count += len(block)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            say(f"{count} of {total} {done}", renewed=True)
    say(f"{count} of {total} {done}")


def draw_rows(run, stage, step, count):
    """(rows, crops, generator) of a step's batch: each of `count` rows once an epoch, any crop."""
    draws = range((step - 1) * run.batch, step * run.batch)
    rows = np.array([epoch_order(run.seed, draw // count, count)[draw % count] for draw in draws])
    generator = generator_of(run.seed, stage, step)
    return rows, torch.randint(run.crops, (run.batch,), generator=generator).numpy(), generator


@lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of an epoch's rows, the same on every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).numpy()


def generator_of(*key):
    """Randomness as a function of where it is used: (seed, stage, step, ...)."""
    number = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))


def to_unit(images):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return torch.as_tensor(images).float() / 127.5 - 1


# ---- the run folder, which only the first process writes, and the processes


def lock_folder(out):
    """Makes the run folder, returns its lock, an open file; ValueError where another has it."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "a")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another process works there") from error
    except OSError:  # a file system without locks goes without
        pass
    return lock


def prepare_once(run):
    """Prepares the images of a folder in which that was not done. ValueError if it is another's."""
    before = sample.read_record(run.out)
    old, new = before["flags"], run.record["flags"]
    names = (*STAGES.values(), "checkpoint.pt", "metrics.jsonl")
    is_begun = any((run.out / name).exists() for name in names)
    is_prepared = old == new
    if not old and (run.out / "args.json").exists():
        raise ValueError(f"{run.out}: holds another program's args.json; give another --out")
    if is_begun and not is_prepared:
        text = f"begun with other flags or images: {sample.differences(old, new)}"
        raise ValueError(f"{run.out}: {text}; give another --out, or remove the folder")

    if run.images.kind == "prepared" and not is_prepared:
        raise ValueError(f"--data: expected, to prepare {run.out} anew with other flags")

    unfinished = sample.UNFINISHED  # what a kill left half written
    for path in (*run.out.glob(unfinished), *run.out.glob(f"samples/{unfinished}")):
        path.unlink()
    if not is_prepared:
        for name in ("args.json", "tokens.npy"):  # of other flags
            (run.out / name).unlink(missing_ok=True)
        prepare(run)
    elif before["newest"] != run.record["newest"]:
        say("--data: files were changed; what was prepared before is used")


def own_record(out, flags):
    """args.json of a run of these flags. ValueError where another one began there meanwhile."""
    record = sample.read_record(out)
    if record["flags"] != flags:
        raise ValueError(f"{out}: is another run's now; give another --out")
    return record


def save_stage(run, name, tree):
    """Writes a finished stage's digest into args.json, and only then its weights.

    Removes what was made of other weights of its name.
    """
    record = own_record(run.out, run.record["flags"])
    old, new = record["digests"].get(STAGES[name]), sample.digest(tree)
    if old not in (None, new):
        later = ["tokens.npy", *STAGES.values()] if name == "tokenizer" else ["hmar.pt"]
        for file in later:
            (run.out / file).unlink(missing_ok=True)
    record["digests"][STAGES[name]] = new
    sample.write_json(run.out / "args.json", record)
    save_tree(run.out / STAGES[name], tree)


def load_stage(run, name):
    """The weights of a finished stage, on the device. ValueError where they are another run's."""
    tree, _ = sample.load(run.out / STAGES[name], tokenizer if name == "tokenizer" else hmar)
    sample.check_digest(run.out, STAGES[name], tree)
    return to_device(tree, run.device)


def save_tree(path, tree):
    """Writes a tree of tensors, whole or not at all."""
    with sample.whole_file(path) as file:
        torch.save(pytree.tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), tree), file)


def to_device(tree, device):
    """The tree on a device."""
    return pytree.tree_map(lambda tensor: tensor.to(device), tree)


def set_up_process(name):
    """This process's device; waits for the others that torchrun started, if there are several."""
    device = sample.set_up_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if sample.world() > 1:  # the others wait for the first: preparing takes long
        timeout = datetime.timedelta(hours=24)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timeout)
    return device


def keep_freed_memory():
    """Asks glibc to keep what is freed: faulting it in again takes 7 % of a small step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # others than glibc go without
    if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD, older ones take 32 MiB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def broadcast(work):
    """What work() returns in the first process, in all of them; they all raise its error, too."""
    box = [None, None]
    if sample.rank() == 0:
        try:
            box[0] = work()
        except (OSError, ValueError, MemoryError) as error:
            box[1] = error
    if sample.world() > 1:
        torch.distributed.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather(rows):
    """The rows of all processes, one after another."""
    if sample.world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(sample.world())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def add_over_processes(tensor):
    """The tensor, added up in place."""
    if sample.world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def average_gradients(leaves):
    """Over the processes, in one vector; a leaf that served nothing has zeros."""
    for leaf in leaves:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    if sample.world() > 1:
        gradients = [leaf.grad for leaf in leaves]
        total = add_over_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(total / sample.world(), gradients)


def say(line, renewed=False):
    """Prints a line, once however many processes there are; on a terminal one that is renewed."""
    if sample.rank() > 0:
        return
    line = sample.replace_unprintable(line)
    if not (sys.stdout and sys.stdout.isatty()):
        print(line, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    print("\r\x1b[K" + line[: width if renewed else None], end="" if renewed else "\n", flush=True)


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = sample.command_parser("python train.py [flags]: train HMAR from nothing.")
    add = top.add_argument
    add("--data", help="images, a sub-folder a class or all in one (drawings)")
    add("--size", type=sample.whole_number(1), help="side of the images (64, drawings 32)")
    add("--depth", type=sample.whole_number(1), help="the dial: transformer blocks (2)")
    add("--out", help="run folder (runs/shapes or runs/<data folder>)")
    add("--seed", type=sample.whole_number(0), default=0, help="of all randomness (0)")
    add("--steps", type=sample.whole_number(1), help="of each stage")
    add("--batch", type=sample.whole_number(1), help="images a step, over all processes")
    add("--lr", type=sample.positive, help="at its peak; of the masked stage a quarter")
    add("--flip", action="store_true", help="mirror every second crop")
    add("--causal", action="store_true", help="VAR: attend to coarser scales, no masked stage")
    add("--tokenizer", help="use this finished tokenizer, ours or published")
    add("--init", help="start the stage that they fit from these weights, ours or published")
    add("--compile", action="store_true", help="torch.compile the loss")
    return top


class Given(NamedTuple):
    """Trees of other files, None where there is none."""

    tokenizer: dict = None  # of --tokenizer: it is not trained
    start_tokenizer: dict = None  # of --init: a stage begins with it
    start_transformer: dict = None


def load_given(args):
    """The Given of these flags. ValueError where they do not go together."""
    codec = start = None
    if args.tokenizer is not None:
        codec, _ = sample.load(args.tokenizer, tokenizer)
    if args.init is not None:
        start, _ = sample.load(args.init)
    if start is None or "codebook" in start:
        if codec and start:
            raise ValueError("--init: got a tokenizer beside --tokenizer, which is not trained")
        return Given(codec, start)

    if codec:  # which those weights learned
        sample.check_digest(Path(args.init).parent, "tokenizer.pt", codec)
    if args.depth:
        raise ValueError(f"--depth: got {args.depth}, but --init decides it")
    return Given(codec, None, start)


def choose_images(data, out):
    """The Images of --data, or prepared ones, whose files may be gone, or drawings."""
    before, reason = sample.read_record(out), "--data: none"
    fingerprint = before["flags"].get("images")  # None: drawings
    if data is not None:
        try:
            return list_images(data)
        except ValueError as error:
            if not fingerprint:
                raise
            reason = str(error)
    if fingerprint:  # prepared, here or elsewhere
        notes = [f"{reason}; images prepared before are used"]
        names, count, newest = (before[name] for name in ("class_names", "count", "newest"))
        return Images("prepared", names, count, fingerprint, newest, notes=notes)
    return Images("drawings", [*SHAPES], DRAWINGS)


class Run(NamedTuple):
    """All that a run is, made once and then only read."""

    # of the flags and of `dial`
    size: int  # pixels a side
    depth: int
    seed: int
    flip: bool
    causal: bool
    compile: bool
    steps: dict  # {stage: number}
    lr: dict  # {stage: peak of the rate}
    batch: int
    decay: float  # of Muon's weights
    looks: int  # in each stage
    newton_schulz: int  # iterations of Muon's
    crops: int  # of an image
    scales: tuple
    cell: int  # pixels a side of a latent position
    growth: float  # of the scales' sides
    codec: dict  # sizes of the tokenizer
    transformer: dict  # of `hmar.init`
    masked_blocks: int
    loss_weights: str  # a kind of `hmar.scale_weights`
    perceptual: bool  # whether the tokenizer's loss has that error

    images: Images
    class_names: list
    given: Given
    out: Path
    device: torch.device
    dtype: torch.dtype
    record: dict  # for args.json


def make_run(args, device):
    """The Run of these flags. ValueError where they or the files do not fit."""
    given = load_given(args)
    name = os.path.basename(os.path.abspath(args.data or "shapes"))
    out = Path(args.out or f"runs/{name}")
    if args.data and out.resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--out: got {out}, inside --data, whose images would be more")

    images = choose_images(args.data, out)
    is_drawn = images.kind == "drawings"
    if args.flip and is_drawn:
        raise ValueError("--flip: drawings are not mirrored; expected with --data")
    settings = choose_settings(args, given, images.count, is_drawn)
    dtype = sample.find_dtype(args.dtype, device)
    flags = settings | dict(images=images.fingerprint, dtype=str(dtype))
    start = given.start_tokenizer or given.start_transformer
    for flag, tree in ("--tokenizer", given.tokenizer), ("--init", start):
        if tree:
            flags[flag] = sample.digest(tree)

    record = dict(class_names=images.class_names, count=images.count, newest=images.newest)
    record["flags"] = json.loads(json.dumps(flags))  # lists for tuples, as in the file
    made = dict(images=images, class_names=images.class_names, given=given, record=record)
    return Run(**settings, **made, out=out, device=device, dtype=dtype)


def choose_settings(args, given, count, is_drawn):
    """{setting: value} of a Run: `dial`'s, as flags and given trees change them, and the flags.

    count: of images. ValueError where they do not fit.
    """
    size = args.size or (32 if is_drawn else 64)
    depth = args.depth or 2
    if given.start_transformer:
        depth = hmar.depth(given.start_transformer)
    settings = dial(depth, size, count - count_held_out(count)) | dict(size=size, depth=depth)

    settings["batch"] = args.batch or settings["batch"]
    # three take two thirds of the time, but photographs are 4 to 14 % further
    settings["newton_schulz"] = 3 if is_drawn else 5
    if is_drawn:
        steps = settings["steps"]
        settings["steps"] = {stage: math.ceil(DRAWN_STEPS * steps[stage]) for stage in steps}
    if args.steps:
        settings["steps"] = dict.fromkeys(STAGES, args.steps)
    if args.lr:  # the masked stage's is smaller
        rates = settings["lr"]
        settings["lr"] = {name: args.lr * rates[name] / max(rates.values()) for name in rates}

    codec = given.tokenizer or given.start_tokenizer
    if codec:  # it has sizes of its own
        settings["codec"] = dict(zip(("codes", "code_dim"), codec["codebook"].shape))
        settings["cell"] = tokenizer.downsampling(codec)
    check_sizes(settings, given)

    cell, growth = settings["cell"], settings["growth"]
    # a last scale twice, for the grain of photographs
    settings["scales"] = default_scales(size, cell, growth, doubled=not is_drawn)
    settings["crops"] = 1 if is_drawn else min(16, max(2, CROPS // max(1, count)))
    return settings | {name: getattr(args, name) for name in ("seed", "flip", "causal", "compile")}


def check_sizes(settings, given):
    """ValueError where size, batch or --init do not fit the tokenizer or the processes."""
    size, cell, batch = (settings[name] for name in ("size", "cell", "batch"))
    if size % cell or size < 2 * cell:
        raise ValueError(f"--size: got {size}, expected a multiple of {cell}, two at least")
    world = sample.world()
    if batch % world:
        fits = math.ceil(batch / world) * world
        raise ValueError(f"--batch: got {batch} for {world} processes, expected say {fits}")
    params, codec = given.start_transformer, settings["codec"]
    if params:
        got = len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]
        wanted = codec["codes"], codec["code_dim"]
        if got != wanted:
            raise ValueError(f"--init: got (codes, code_dim) {got}, the tokenizer has {wanted}")


def train(args):
    """All stages in order, each unless its file is there; before them the images, once."""
    run = make_run(args, set_up_process(args.device))
    locks = []  # of the first process, held to the end: the file itself cannot be broadcast
    broadcast(lambda: locks.append(lock_folder(run.out)))
    broadcast(lambda: prepare_once(run))
    say_run(run)

    names = [name for name in STAGES if not (run.causal and name == "masked")]
    for number, name in enumerate(names, 1):
        path = run.out / STAGES[name]
        numbers = dict(steps=run.steps[name], batch=run.batch, peak=run.lr[name], looks=run.looks)
        muon = dict(decay=run.decay, newton_schulz=run.newton_schulz)
        place, flags = f"{number} of {len(names)}", run.record["flags"]
        stage = Stage(name, place, run.out, flags, **numbers, **muon)
        if broadcast(path.exists):
            load_stage(run, name)  # it is whole, and of this run
            say(f"{name}: finished before, {path}")
            continue
        try:
            if name == "tokenizer":
                tree = run.given.tokenizer or train_tokenizer(run, stage)
            else:
                tree = train_transformer(run, stage)
            broadcast(partial(save_stage, run, name, tree))
        except KeyboardInterrupt as stop:
            path = run.out / "checkpoint.pt"
            saved = sample.load_file(path) if path.exists() else {}
            step = saved["at"]["step"] if saved.get("stage") == name else 0
            text = f"stopped; the same command goes on from {name}, step {step}"
            raise KeyboardInterrupt(text) from stop

    broadcast(lambda: (run.out / "checkpoint.pt").unlink(missing_ok=True))
    say(f"finished; next: python sample.py {shlex.quote(str(run.out))}")
    say(f"CPU seconds {time.process_time():.6g}")


def say_run(run):
    """Says what will be done."""
    held_out, labels = load_labels(run)
    for note in run.images.notes:
        say(note)
    left = set(labels.tolist())
    for label, name in enumerate(run.class_names):
        if label not in left:
            say(f"class {name}: none of its images is left to train on")
    if run.given.start_transformer and not run.given.tokenizer:
        say("--init: without --tokenizer its codes get new meanings")
    counts = f"{len(labels)} images to train on, {len(held_out)} held out, "
    counts += f"{len(run.class_names)} classes; {run.device}, {str(run.dtype)[6:]}, "
    say(f"{run.out}: {counts}{torch.get_num_threads()} threads, processes: {sample.world()}")


def main(argv=None):
    """The command; SystemExit: status 2 and a line for bad input, 130 where it is interrupted."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with sample.report_errors("train.py"):
        train(args)
    if torch.distributed.is_initialized():  # after an error it would wait for the others
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
