"""Training: drawn shapes or a folder of images -> tokenizer.pt, hmar.pt; and `python train.py`.

    images -> tokenizer stage -> tokens (N, views, L) -> next-scale stage -> masked stage

All randomness and the order of the data are functions of seed and step, so a killed run continues
bit for bit though none of them is saved. There is no adversarial loss, and no weights of others
in the perceptual one (`learned_levels`).
"""

import colorsys
import contextlib
import ctypes
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import hmar
import sample
import tokenizer

# a stage is finished when its file is there
STAGES = {"tokenizer": "tokenizer.pt", "next-scale": "next-scale.pt", "masked": "hmar.pt"}

DEPTH = 2  # unless --depth says otherwise
COOL_DOWN = 0.6  # last share of a stage's steps: the rate falls to zero
WARM_UP = 0.06  # first share: the rate rises to its peak
MEMORY = 0.25  # share of the steps over which the moving average of the weights (EMA) reaches
CLIP = 1.0  # largest gradient norm
BETAS = (0.9, 0.95)  # AdamW's
MOMENTUM = 0.95  # Muon's
# embeddings, codes, what faces them, modulation, single channels
NOT_FOR_MUON = "classes|start|levels|positions|codebook|head|modulation|depthwise"
LABEL_DROP = 0.1  # label dropout: these become the null class, for guidance
REVIVE_EVERY = 20  # steps, after which codes that nobody chose are replaced
REVIVE_UNTIL = 0.8  # share of the steps: the last codes to be replaced get time to settle
COARSE_WEIGHT = 0.5  # of the squared error of coarse images (RESULTS, "The pyramid")
EDGE_WEIGHT = 0.25  # of the error of edges, beside .5 of the absolute error
TEXTURE_WEIGHT = 0.5  # of the error of texture (RESULTS, "Texture")
PERCEPTUAL_WEIGHT = 0.08  # of the perceptual error (RESULTS, "Perceptual")
LEVELS_STEPS = 400  # in which its network is learned
HUE_WEIGHT = 0.28  # of the share of the hues' variance that is lost (RESULTS, "Hues, tried")
LOG_EVERY = 50  # steps
JUDGED = 128  # held-out images at most that are looked at
SAVES = 8  # checkpoints a stage, at least
SAVE_SECONDS = 300  # between two checkpoints, at most
TIMED = 20  # steps of a stage that tell how long it takes
PATIENCE = 1 / 3  # of the steps without a better loss end a stage
HELD_OUT = 0.05  # share of the images
MOST_HELD_OUT = 2000  # images
VIEWS_IN_ALL = 20_000  # random crops: a small folder's images are encoded in several each
MOST_VIEWS = 16  # crops of an image
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
# those that change a result
FLAGS = ("size", "depth", "flip", "seed", "dtype", "compile", "causal", "scales")


def dial(depth, size, images):
    """{setting: value} that --depth and --size decide, for so many images to train on.

    Measured at depth 2 (RESULTS, "The dial"); extrapolated to meet the published one at 16.
    """
    larger = depth / DEPTH
    is_large = depth >= 8  # the published sizes, no convolutions (RESULTS, "Neighbours")

    # images as the parameters, which grow by depth^3 (Hoffmann et al. 2022), fewer of larger ones,
    # since each has more tokens; no folder is worth more than so many epochs
    seen = min(50_000 * larger**3 * math.sqrt(32 / size), 200 * images)
    batch = 8 * round(2 * larger**1.5)  # as the root of what is seen (McCandlish et al. 2018)

    # squares of pixels as channels, where it helps: the finest level is dear (RESULTS, "Folding")
    fold = 2 if not is_large and (size >= 48 or depth <= DEPTH) else 1
    seen_by = {"tokenizer": 0.43 if fold > 1 else 0.35, "next-scale": 1, "masked": 1 / 11}
    perceptual = size >= 48 and fold > 1  # at 32 it is not worth its time
    if perceptual:  # a quarter of an hour at 64, where an image has twice the tokens
        seen *= 0.69
        batch //= 2

    # deeper wants less, a larger batch more (HyperP 2603.28743)
    rate = 4e-3 * larger**-0.7

    cell = min(16, max(4, 2 ** math.ceil(math.log2(size / 16))))  # a 16th of the side, 4 to 16
    halvings = cell.bit_length() - 1
    multipliers = halvings * (1,) if fold > 1 else (1, 1, 2, 2, 4)[: halvings + 1]
    codec = dict(
        codes=min(4096, 2 ** round(8 + 4 / 3 * math.log2(larger))),  # 128 to the published ones
        code_dim=32 if is_large else 16,
        channels=fold * max(32, 32 * round(10 * depth / 32)),  # the published 160 at depth 16
        multipliers=multipliers,
        fold=fold,
        residual_blocks=2 if is_large else 1,
        attention=is_large,
    )
    return dict(
        cell=cell,
        growth=2 if depth <= DEPTH else math.sqrt(2),  # of scales' sides (RESULTS, "Today")
        codec=codec,
        transformer=dict(depth=depth, gamma=None if is_large else 0.1, convolutions=not is_large),
        masked_blocks=(depth + 1) // 2,
        loss_weights="lognormal" if is_large else "token",
        batch=batch,
        steps={stage: math.ceil(share * seen / batch) for stage, share in seen_by.items()},
        lr={"tokenizer": rate, "next-scale": rate, "masked": rate / 4},
        perceptual=perceptual,
        decay=0.05 * larger**-0.8,  # shrinks alike over a run (Wang and Aitchison 2024)
        looks=3 * depth,  # at held-out images in a stage
    )


def fit(args, stage, tree, loss, batches, evaluate, after_step=lambda *_: None, extra=()):
    """`tree` with that moving average (EMA) of its parameters that was best on held-out images.

    loss(tree, **batch) -> (scalar, {name: tensor} to log, what after_step needs); batches(start)
    yields each step's batch, a dict a part; evaluate(tree) -> {name: numbers}, the lowest "loss" is
    best; after_step(step, needs, optimizer) may change tree and extra, tensors that are saved too.
    """
    model = Trained(tree, loss)
    current = [leaf.detach() for leaf in model.leaves]  # the same memory, without gradients
    ema = [leaf.clone() for leaf in current]
    best = [leaf.to("cpu", copy=True) for leaf in current]
    steps, peak = args.steps[stage], args.lr[stage]
    optimizer = Optimizer(tree, args.decay)
    state = [*current, *ema, *best, *optimizer.moments, *extra]
    (start, best_step, best_loss), window = load_checkpoint(args, stage, state)
    call = wrapped(model, args)
    progress = Progress(args, stage, start)
    with stop_signals(args.device) as asked_to_stop:
        for step, parts in enumerate(batches(start), start + 1):
            rate = learning_rate(step, steps, peak)
            numbers, needs, norm = optimise(call, parts, model.leaves, optimizer, rate)
            kept = min(1 - 1 / (1 + MEMORY * steps), step / (step + 10))  # the first soon goes
            torch._foreach_lerp_(ema, current, 1 - kept)
            after_step(step, needs, optimizer)
            progress.tick(step)
            window += [{"gradient": norm} | part for part in numbers]
            if step % LOG_EVERY == 0 or step == steps:
                progress.log(step, rate=rate, **means(averaged(window)))
                window.clear()

            if progress.is_look_due(step):
                held_out_loss = look(step, evaluate, with_leaves(tree, ema), progress)
                if held_out_loss < best_loss:
                    best_step, best_loss = step, held_out_loss
                    torch._foreach_copy_(best, ema)
                elif step < steps and step - best_step >= PATIENCE * steps:
                    say(f"{stage}: stopped early at step {step}; best at {best_step}")
                    break

            stops = asked_to_stop(step)
            if stops or progress.is_save_due(step):
                require_finite(stage, step, norm.isfinite())  # nan weights give a nan norm
                window = averaged(window)  # one saves for all
                saved = dict(state=state, progress=(step, best_step, best_loss), window=window)
                save(stage_paths(args, stage)[1], saved)
            if stops:
                raise KeyboardInterrupt(f"{stage}: stopped and saved at step {step}")

    say(f"{stage}: best at step {best_step}, loss {best_loss:.4g} held out")
    return with_leaves(tree, best)


def look(step, evaluate, tree, progress):
    """The loss on held-out images: the first process's, for all of them to act on."""
    numbers = agreed(lambda: evaluate(tree))
    progress.log(step, **{f"held_out_{name}": value for name, value in numbers.items()})
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
    call.zero_grad()
    numbers, needs = zip(*reports)
    return numbers, needs, norm


def learning_rate(step, steps, peak):
    """Of step 1, 2, ...: warm-up, constant, then linear to zero (Hägele et al. 2024)."""
    left = 1 - (step - 1) / steps
    return peak * min(1, step / (WARM_UP * steps), left / COOL_DOWN)


class Optimizer:
    """Muon for matrices and convolutions (Jordan et al. 2024), AdamW for vectors and NOT_FOR_MUON.

    A convolution's weight is a matrix of its outputs. Those of one shape are stepped together,
    shared among the processes. Muon's steps are scaled to AdamW's size: one rate for both (Liu et
    al. 2025). Muon multiplies in bf16 whatever --dtype says.
    """

    def __init__(self, tree, decay=0):
        self.decay = decay
        self.groups, others = {}, []
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if not isinstance(leaf, torch.nn.Parameter):
                continue
            name = pytree.keystr(path)
            embeds_codes = leaf.ndim == 2 and "input" in name  # the published one
            if leaf.ndim < 2 or embeds_codes or re.search(NOT_FOR_MUON, name):
                others.append(leaf)
            else:
                self.groups.setdefault(leaf.shape, []).append(leaf)

        self.momenta = [torch.stack(x).detach().flatten(2) * 0 for x in self.groups.values()]
        self.adamw = torch.optim.AdamW(others, betas=BETAS, weight_decay=0, fused=True)
        for leaf in others:  # as AdamW makes it at its first step: a checkpoint is copied into it
            step = torch.zeros((), device=leaf.device)
            first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
            self.adamw.state[leaf] = dict(step=step, exp_avg=first, exp_avg_sq=second)
        self.moments = [*self.momenta, *pytree.tree_leaves([*self.adamw.state.values()])]

    @torch.no_grad()
    def step(self, rate):
        """Muon's with Nesterov's momentum, in the gradients; AdamW's."""
        for (shape, leaves), momentum in zip(self.groups.items(), self.momenta):
            for leaf in leaves:
                if leaf.grad is None:  # a phi that serves no scale
                    leaf.grad = torch.zeros_like(leaf)
            gradients = [leaf.grad.flatten(1) for leaf in leaves]  # (rows, columns) each
            torch._foreach_lerp_(momentum.unbind(), gradients, 1 - MOMENTUM)
            torch._foreach_lerp_(gradients, momentum.unbind(), MOMENTUM)

            updates = orthogonal(own_share(torch.stack(gradients)))
            updates = gathered(updates, len(leaves)).float().view(-1, *shape)

            # AdamW's have a root mean square of .2, orthogonal ones 1 / sqrt(max)
            size = 0.2 * math.sqrt(max(momentum.shape[1:]))
            torch._foreach_mul_(leaves, 1 - rate * self.decay)
            torch._foreach_sub_(leaves, updates.unbind(), alpha=rate * size)

        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()

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
    return pytree.tree_map_only(torch.nn.Parameter, lambda _: next(leaves), tree)


def wrapped(model, args):
    """What is called for the loss: the model itself, compiled, or spread over the processes."""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # parts of different sizes each compile anew
        model = torch.compile(model)
    if world() == 1:
        return model
    # a phi may serve no scale; and buckets are never ordered anew, so that a run that goes on adds
    # up gradients as before
    options = dict(find_unused_parameters=True, gradient_as_bucket_view=True)
    return torch.nn.parallel.DistributedDataParallel(model, **options)


def averaged(window):
    """Reports of steps, [{name: tensor}, ...], each averaged over all processes."""
    names = window[0] if window else ()
    rows = [summed(torch.stack([report[name] for report in window])) / world() for name in names]
    return [dict(zip(names, values)) for values in zip(*rows)]


def means(window):
    """{name: mean number or numbers} of reports of steps."""
    return {name: torch.stack([x[name] for x in window]).mean(0).tolist() for name in window[0]}


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
        if rank() == 0 and sys.stdout.isatty():
            print()  # the renewed line stays
    if asked:  # during the last step
        raise KeyboardInterrupt


class Progress:
    """A stage's progress, said and written, with the time that is left."""

    def __init__(self, args, stage, start):
        self.args, self.stage, self.start = args, stage, start
        self.began = self.saved = time.monotonic()
        self.shown = ""

    def log(self, step, **numbers):
        """Adds a line to metrics.jsonl and says it. ValueError where a number is not finite."""
        line = json.dumps(dict(stage=self.stage, step=step, **numbers))
        require_finite(self.stage, step, not re.search(r"\b(NaN|Infinity)\b", line))
        if rank() == 0:
            with open(Path(self.args.out, "metrics.jsonl"), "a") as file:
                file.write(line + "\n")
        single = [name for name in numbers if not isinstance(numbers[name], list)]
        self.shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in single)
        self.say(step)

    def tick(self, step):
        """Says how long it will take after the first steps; on a terminal the line lives."""
        if step == self.start + TIMED or sys.stdout.isatty():
            self.say(step)

    def say(self, step):
        """Prints where the stage is."""
        place = f"{self.stage} {step}/{self.args.steps[self.stage]}"
        say(f"{place}  {self.time_left(step)}{self.shown}", renewed=True)

    def time_left(self, step):
        """Of the stage and the run, "0:04:10 left, 0:09:00 of the run  "; "" at first."""
        args, done = self.args, step - self.start
        if done < TIMED:
            return ""
        pace = (time.monotonic() - self.began) / done
        stage = pace * (args.steps[self.stage] - step)

        # other stages are as fast as this one, by their FLOPs
        later = [*args.work.values()][[*args.work].index(self.stage) + 1 :]
        per_step = args.work[self.stage] / args.steps[self.stage]
        run = stage + pace * sum(later) / per_step
        stage, run = (datetime.timedelta(seconds=round(left)) for left in (stage, run))
        return f"{stage} left, {run} of the run  "

    def is_look_due(self, step):
        """Whether held-out images are looked at after this step."""
        steps = self.args.steps[self.stage]
        return step == steps or step % math.ceil(steps / self.args.looks) == 0

    def is_save_due(self, step):
        """Whether a checkpoint is: after a share of the steps, or where the last is long ago."""
        is_due = step % math.ceil(self.args.steps[self.stage] / SAVES) == 0
        if world() == 1 or step % 10 == 0:  # the first process's clock tells
            is_due |= agreed(lambda: time.monotonic() - self.saved > SAVE_SECONDS)
        if is_due:
            self.saved = time.monotonic()
        return is_due


def require_finite(stage, step, fits):
    """ValueError that says what to do, unless all was finite."""
    if not fits:
        message = f"{stage}: loss or gradient is not finite at step {step}; a lower --lr may help"
        raise ValueError(f"{message}; the last checkpoint is kept")


# ---- the tokenizer stage


def train_tokenizer(args, data, held_out, init=None):
    """Images -> a codec each of whose scales is an image; dead codes are replaced on the way."""
    initial = init or tokenizer.init(**args.codec, seed=args.seed)
    codec = trainable(to_device(initial, args.device))
    codebook = codec["codebook"]
    counts_since = torch.zeros(len(codebook), dtype=torch.int64, device=args.device)
    judged = to_unit(read_held_out(held_out)[0], args.device)
    variance = hues(judged).var((1, 2, 3), correction=0).mean()
    levels = learned_levels(args, data)

    def loss(codec, images, stops):
        fast = tokenizer.cast(codec, args.dtype)
        some = slice(None, None, tokenizer.COARSE_EVERY)
        passed = tokenizer.training_pass(fast, images, args.scales, stops[some])
        coarse = F.mse_loss(passed["coarse"], images[some])
        total = reconstruction_loss(passed["images"], images, variance, levels)
        total = total + COARSE_WEIGHT * coarse + passed["loss"]
        numbers = dict(loss=total, coarse=coarse, quantisation=passed["loss"])

        # parts may be unlike, their mean is the batch's; coarse images are every fourth of each
        share = len(images) * args.parts * world() / args.batch
        numbers = {name: share * number for name, number in numbers.items()}
        return numbers["loss"], numbers, (passed["tokens"], passed["residuals"])

    def batches(start):
        for done, images in enumerate(loaded(args, data, step_keys(args, data, start)), start):
            generator = generator_of(args.seed, "tokenizer", done)
            stops = torch.randint(len(args.scales) - 1, (args.batch,), generator=generator)
            parts = in_parts(args, dict(stops=stops))
            for part, pixels in zip(parts, images.tensor_split(args.parts)):
                part["images"] = to_unit(pixels, args.device)
            yield to_device(parts, args.device)

    def after_step(step, needs, optimizer):
        tokens, residuals = zip(*needs)  # of the parts
        tokens = torch.cat([part.flatten() for part in pytree.tree_leaves(tokens)])
        counts = torch.zeros_like(counts_since).index_add_(0, tokens, torch.ones_like(tokens))
        counts_since.add_(summed(counts))
        is_late = step > REVIVE_UNTIL * args.steps["tokenizer"]
        is_first = step == 1 and init is None  # a new codebook begins as what is to be quantised
        if is_first or (step % REVIVE_EVERY == 0 and not is_late):
            generator = generator_of(args.seed, "revive", step)
            residuals = [gathered(torch.cat(parts), args.batch) for parts in zip(*residuals)]
            new, dead = tokenizer.revive_codes(codebook.data, counts_since, residuals, generator)
            codebook.data.copy_(new)
            optimizer.forget(codebook, dead)
            counts_since.zero_()

    judge = functools.partial(judge_tokenizer, args, judged)
    return fit(args, "tokenizer", codec, loss, batches, judge, after_step, extra=[counts_since])


def reconstruction_loss(decoded, images, variance, levels=()):
    """Squared, absolute, edge, texture, hue and perceptual errors of reconstructions (B, 3, H, W).

    Where detail cannot be told, the first three are least for a blur; texture asks for as much
    grain as there was. Of hues it is the share that is lost of the data's variance: in photographs
    green varies so little beside brightness that no code was spent on it otherwise.
    """
    error = decoded - images
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    plain = error.square().mean() + 0.5 * error.abs().mean() + EDGE_WEIGHT * edges
    grain = (texture(decoded) - texture(images)).abs().mean()
    hue = hues(error).square().mean() / (variance + 0.01)  # .01: grey images
    seen = perceptual_error(levels, decoded, images)
    return plain + TEXTURE_WEIGHT * grain + HUE_WEIGHT * hue + PERCEPTUAL_WEIGHT * seen


def learned_levels(args, data):
    """Levels of a small classifier of the data, learned in seconds, for `perceptual_error`, or [].

    A run that goes on learns them again.
    """
    if not args.perceptual or len(data.class_names) == 1:
        return []
    levels = torch.nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        for inputs, outputs in itertools.pairwise((3, 32, 64, 96, 128)):
            convolution = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            norm = torch.nn.BatchNorm2d(outputs)
            levels.append(torch.nn.Sequential(convolution, norm, torch.nn.ReLU()))
        head = torch.nn.Linear(outputs, len(data.class_names))
    net = torch.nn.ModuleList([levels, head]).to(args.device)

    steps = min(LEVELS_STEPS, args.steps["tokenizer"])
    count = min(32, max(4, 2**17 // args.size**2))  # fewer images above 64 pixels
    say(f"tokenizer: learns to see, {steps} steps of {count} images")
    rows = torch.randint(len(data), (steps, count), generator=generator_of(args.seed, "levels"))
    keys = ([(row, (args.seed, row), 0) for row in some] for some in rows.tolist())
    labels = torch.tensor(data.labels)[rows].to(args.device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    for step, images in enumerate(loaded(args, data, keys)):
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype == torch.bfloat16):
            *_, last = maps(levels, to_unit(images, args.device))
            loss = F.cross_entropy(head(last.mean((2, 3))), labels[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, steps, 3e-3)
        optimizer.step()
    return levels.eval().requires_grad_(False).to(args.dtype)


def perceptual_error(levels, decoded, images):
    """Squared difference of what the levels see, in unit vectors (LPIPS, Zhang et al. 2018)."""
    with torch.no_grad():
        wanted = maps(levels, images)
    total = 0
    for pair in zip(maps(levels, decoded), wanted):
        seen, real = (F.normalize(x.float(), dim=1) for x in pair)
        total = total + (seen - real).square().sum(1).mean()
    return total


def maps(levels, images):
    """What each level sees, [(B, channels, h, w), ...], the next at half of the sides."""
    x, seen = images, []
    for level in levels:
        x = level(x.to(level[0].weight.dtype))
        seen.append(x)
        x = F.avg_pool2d(x, 2, ceil_mode=True)
    return seen


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


# ---- the next-scale and the masked stage


def train_next_scale(args, data, held_out, init=None):
    """Tokens -> a transformer that predicts every token from the coarser scales."""
    codec, all_tokens, evaluate = on_tokens(args, "next-scale", data, held_out)
    init = init or new_transformer(args, len(data.class_names))
    params = trainable(to_device(init, args.device))
    weights = hmar.scale_weights(args.scales, args.loss_weights).to(args.device)  # (L,)
    lengths = tokenizer.lengths(args.scales)

    def loss(params, labels, tokens):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        fast = hmar.cast(params, args.dtype)
        options = dict(is_causal=args.causal, checkpointing=args.checkpointing)
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, **options)
        losses = losses * (args.parts * world() / args.batch)  # as in the tokenizer's
        total = (losses * weights).sum()
        by_scale = [scale.mean() for scale in losses.sum(0).split(lengths)]
        return total, dict(loss=total, scale_losses=torch.stack(by_scale)), ()

    def batches(start):
        for done in range(start, args.steps["next-scale"]):
            batch = transformer_batch(args, "next-scale", done, params, data.labels, all_tokens)
            yield to_device(in_parts(args, batch), args.device)

    return fit(args, "next-scale", params, loss, batches, evaluate)


def new_transformer(args, classes):
    """An untrained one for the tokenizer's codes."""
    codes, code_dim = args.codec["codes"], args.codec["code_dim"]
    sizes = dict(codes=codes, code_dim=code_dim, classes=classes, scales=args.scales)
    return hmar.init(**args.transformer, **sizes, seed=args.seed)


def fitted(args, params, classes):
    """Given weights as a start for these scales and classes: all blocks are one trunk again.

    ValueError where their codes are not those of the tokenizer.
    """
    branch = params["next_scale"]
    got = len(branch["head"]["bias"]), params["input"]["weight"].shape[1]
    sizes = args.codec["codes"], args.codec["code_dim"]
    if got != sizes:
        raise ValueError(f"--init: got (codes, code_dim) {got}, expected the tokenizer's {sizes}")

    if "tokenizer" in args.stages and args.tokenizer is None:
        say("--init: without --tokenizer its codes get new meanings")
    trunk = params["trunk"] + branch["blocks"]
    params = params | dict(trunk=trunk, next_scale=branch | dict(blocks=[]))
    params.pop("masked", None)
    if hmar.scales(params) != args.scales:
        say(f"--init: positions resampled for the scales {args.scales}")
        params = hmar.resize_positions(params, args.scales)
    if len(params["classes"]) != classes + 1:
        say(f"--init: a new class embedding for {classes} classes")
        width = params["classes"].shape[1]
        new = hmar.init(depth=1, width=width, classes=classes, seed=args.seed)
        params["classes"] = new["classes"]
    return params


def train_masked(args, data, held_out, init=None):
    """next-scale.pt -> the same with a masked branch: hidden tokens from the others of their scale.

    The trunk and the next-scale branch stay as they are (HMAR, stage two).
    """
    params = load_stage(args, "next-scale")
    codec, all_tokens, evaluate = on_tokens(args, "masked", data, held_out)
    params = hmar.add_masked_branch(params, args.masked_blocks, seed=args.seed)
    params |= trainable(dict(masked=params["masked"]))
    first = tokenizer.lengths(args.scales)[0]

    def loss(params, labels, tokens, mask, places, share):
        inputs = tokenizer.next_scale_inputs(codec, tokens, args.scales)
        own_inputs = tokenizer.masked_inputs(codec, tokens, args.scales, mask)
        fast = hmar.cast(params, args.dtype)
        options = dict(places=places, checkpointing=args.checkpointing)
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
    tokens = encoded(args, codec, pixels)
    judged = to_device((codec, labels, tokens), args.device)
    names = data.class_names[:10]
    return codec, all_tokens, functools.partial(judge_transformer, args, stage, names, *judged)


def transformer_batch(args, stage, done, params, labels, all_tokens):
    """dict(labels (B,), tokens (B, L)) of a whole batch after `done` steps."""
    generator = generator_of(args.seed, stage, done)
    rows = [index for index, _ in step_items(args, done, len(labels))]
    views = torch.randint(all_tokens.shape[1], (args.batch,), generator=generator).numpy()
    tokens = torch.from_numpy(all_tokens[rows, views].astype(np.int64))

    null = len(params["classes"]) - 1
    is_dropped = torch.rand(args.batch, generator=generator) < LABEL_DROP
    labels = torch.tensor([labels[row] for row in rows]).masked_fill(is_dropped, null)
    return dict(labels=labels, tokens=tokens)


def in_parts(args, batch):
    """This process's parts of a step's batch, [dict, ...]."""
    split = {name: own_share(rows).tensor_split(args.parts) for name, rows in batch.items()}
    return [dict(zip(split, values)) for values in zip(*split.values())]


def own_share(rows):
    """This process's rows of a tensor, list or range; another may have one more."""
    first, last = (number * len(rows) // world() for number in (rank(), rank() + 1))
    return rows[first:last]


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
    options = sample.own_options(params, args.causal)
    classes = torch.arange(len(names), device=args.device).repeat_interleave(8)
    for number, part in enumerate(classes.split(few)):
        images.append(sample.generate(params, codec, part, seed=few * number, **options)[0])
    write_sheet(args, stage, torch.cat(images).split(8), names)

    loss, hits, count = sums.tolist()
    return dict(loss=loss / max(1, count), accuracy=hits / max(1, count))


# ---- data


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

    A key (index, seed, turn) decides all: seed None is the centre crop, others are random; with
    flip an odd turn mirrors. A broken file is named once, the next of its class takes its place.
    """

    def __init__(self, items, class_names, size, flip=False):
        self.items, self.class_names, self.size, self.flip = items, class_names, size, flip
        self.is_drawn = isinstance(items, range)
        self.labels = [i % len(SHAPES) if self.is_drawn else i[1] for i in items]
        self.broken = set()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed, turn = key
        if self.is_drawn:  # these vary enough by themselves
            image, _ = draw_shape(self.items[index], self.size)
        else:
            image = crop(self.readable(index), self.size, seed)
            if self.flip and turn % 2:
                image = ImageOps.mirror(image)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def readable(self, index):
        """The image of an index, or of the next one of its class that is not broken."""
        label = self.labels[index]
        for offset in range(len(self)):
            other = (index + offset) % len(self)
            if self.labels[other] != label or other in self.broken:
                continue
            try:
                return sample.read_image(self.items[other][0], shortest=2 * self.size)
            except ValueError as error:
                if other not in self.broken:  # by another thread meanwhile
                    self.broken.add(other)
                    print(f"skipped: {error}", file=sys.stderr)
        path = self.items[index][0]
        raise ValueError(f"--data: {path} cannot be read, nor another of {self.class_names[label]}")


def read_held_out(held_out):
    """(pixels uint8 (n, 3, H, W), labels (n,)) of the first JUDGED images that can be read."""
    pixels, labels = [], []
    for index, label in enumerate(held_out.labels[:JUDGED]):
        with contextlib.suppress(ValueError):  # of a class that has no other
            pixels.append(held_out[index, None, 0])
            labels.append(label)
    if not pixels:
        raise ValueError("--data: no held-out image can be read")
    return torch.stack(pixels), torch.tensor(labels)


def crop(image, size, seed=None):
    """An image -> size x size: the largest square at its centre, resized.

    With a seed a random square, down to 1 / 1.125 of that.
    """
    width, height = image.size
    reach = min(width, height)  # the square's side
    left, top = (width - reach) // 2, (height - reach) // 2
    if seed is not None:
        zoom, x, y = np.random.default_rng(seed).random(3).tolist()
        reach /= 1 + zoom / 8
        left, top = x * (width - reach), y * (height - reach)

    box = (left, top, left + reach, top + reach)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def data_sets(args):
    """(training Images, held-out Images, a hash of their names, labels and sizes in bytes)."""
    if args.data is None:
        train, held_out = range(20_000), range(20_000, 20_500)
        return Images(train, SHAPES, args.size), Images(held_out, SHAPES, args.size), None

    files, names = list_images(args.data)
    start, total, regular = len(os.path.join(args.data, "")), hashlib.sha256(), []
    for path, label in files:
        with contextlib.suppress(FileNotFoundError):  # no link to nothing, no pipe
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                regular.append((path, label))
                total.update(f"{path[start:]!r} {label} {status.st_size}\n".encode())
    train, held_out = split_held_out(regular, args.data)
    sets = Images(train, names, args.size, args.flip), Images(held_out, names, args.size)
    return *sets, total.hexdigest()[:16]


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, or images alone.

    Sorted by name, searched to any depth, but for hidden folders. ValueError for links to folders.
    """

    def refuse(reason):  # rather than learn without a class
        raise ValueError(f"--data: {reason}")

    groups = {}  # class -> its paths; "." for images that lie in no sub-folder
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(place, name) for name in folders):
            if os.path.islink(path):
                refuse(f"{path} is a link to a folder, which is not followed")
        group = os.path.relpath(place, folder).split(os.sep)[0]
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                groups.setdefault(group, []).append(os.path.join(place, name))

    if not groups:
        refuse(f"got {folder!r}, expected a folder with {', '.join(SUFFIXES)}")
    if "." in groups and len(groups) > 1:
        refuse(f"got {folder!r}, with images beside sub-folders of images")
    files = [(path, label) for label, paths in enumerate(groups.values()) for path in paths]
    return files, [Path(folder).resolve().name] if "." in groups else [*groups]


def split_held_out(files, folder):
    """(training, held out) of [(path, label), ...], by a hash of the path inside the folder."""
    start = len(os.path.join(folder, ""))
    ordered = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file[0][start:])).digest())
    count = min(MOST_HELD_OUT, math.ceil(HELD_OUT * len(files)))
    return ordered[count:], ordered[:count]


def generator_of(*key):
    """Randomness as a function of where it is used: (seed, stage, step, ...)."""
    number = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of an epoch's items, the same on every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).numpy()


def step_items(args, done, count):
    """[(index, draw), ...] of a step: every item once an epoch; draw numbers them over the run."""
    draws = range(done * args.batch, (done + 1) * args.batch)
    return [(epoch_order(args.seed, draw // count, count)[draw % count], draw) for draw in draws]


def step_keys(args, data, start):
    """Yields the keys of this process's images of each step, from step `start` on."""
    for done in range(start, args.steps["tokenizer"]):
        items = own_share(step_items(args, done, len(data)))
        # odd turns are mirrored: every image in every other epoch
        yield [(i, (args.seed, draw), i + draw // len(data)) for i, draw in items]


def loaded(args, data, key_lists):
    """Yields uint8 (n, 3, size, size), the images of each list of keys.

    --workers threads read the next list meanwhile; Pillow decodes without Python's lock.
    """
    with ThreadPoolExecutor(args.workers) as pool:
        lists = (pool.map(data.__getitem__, keys) for keys in key_lists)
        for images, _ in itertools.pairwise(itertools.chain(lists, [None])):
            yield torch.stack(list(images))


def to_unit(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return to_device(images, device).float() / 127.5 - 1


def token_cache(args, data, codec):
    """Tokens of all images, a memory-mapped array (N, views, L), encoded once by the codec.

    View 0 is the centre crop, others are random; with --flip every second one is mirrored.
    """
    path = Path(args.out, "tokens.npy")
    agreed(lambda: note_tokenizer(args, codec))
    if not agreed(path.exists):
        write = functools.partial(write_tokens, args, data, codec)
        if rank() == 0:
            sample.write_whole(path, write)
        else:
            write()
        barrier()
    tokens, expected = np.load(path, mmap_mode="r"), (len(data), views_of(args, len(data)))
    if tokens.shape[:2] != expected:
        raise ValueError(f"{path}: got {tokens.shape[:2]} images and views, expected {expected}")
    return tokens


def write_tokens(args, data, codec, whole=None):
    """Writes this process's rows of `token_cache` into the first process's file, `whole`.

    In the smallest type that holds the codes. Not through a map: two machines would overwrite each
    other's pages, and a full disk would end it without a word.
    """
    views, length = views_of(args, len(data)), sum(tokenizer.lengths(args.scales))
    kind = np.min_scalar_type(len(codec["codebook"]) - 1)
    if rank() == 0:
        np.lib.format.open_memmap(whole.name, "w+", kind, (len(data), views, length))
    name = agreed(lambda: whole.name)

    def key(crop):
        index, view = divmod(crop, views)
        return index, (args.seed, view, index) if view else None, view

    every = range(len(data) * views)
    crops = own_share(every)
    starts = range(0, len(crops), 64)
    lists = (map(key, crops[start:][:64]) for start in starts)
    with open(name, "r+b") as file:
        file.seek((crops.start - len(every)) * length * kind.itemsize, os.SEEK_END)
        for start, pixels in zip(starts, loaded(args, data, lists)):
            file.write(encoded(args, codec, pixels).numpy().astype(kind))
            done = start + len(pixels)
            if done % 4096 == 0 or done == len(crops):
                say(f"encoded {done} of {len(crops)} crops")
    barrier()


def views_of(args, images):
    """How many crops of each image are encoded."""
    if args.data is None:
        return 1
    return min(MOST_VIEWS, max(1 + args.flip, VIEWS_IN_ALL // images))


def encoded(args, codec, pixels):
    """Tokens (B, L) of pixels uint8 (B, 3, H, W), a few images at a time."""
    fast = tokenizer.cast(codec, args.dtype)
    tokens = []
    for few in pixels.split(sample.at_once(args.size**2)):
        tokens.append(tokenizer.encode(fast, to_unit(few, args.device), args.scales).cpu())
    return torch.cat(tokens)


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = sample.command_parser("python train.py [STAGE] [flags]: train HMAR from nothing.")
    add = top.add_argument
    add("stage", nargs="?", default="all", choices=("all", *STAGES), help="one of them alone (all)")
    add("--data", help="images, a sub-folder a class or all in one (drawings)")
    add("--size", type=int, help="side of the images (64, drawings 32)")
    add("--depth", type=int, help="the dial: transformer blocks, of which all follows (2)")
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
    add("--workers", type=int, help="threads that decode images (one a core, to 8)")
    add("--compile", action="store_true", help="torch.compile the training step")
    return top


def train(args):
    """The stages that the flags ask for, in order."""
    device = start_processes(args.device)
    check_flags(args)
    given = load_given(args)
    if args.depth is not None and "next-scale" in given:
        raise ValueError(f"--depth: got {args.depth}, but --init decides it")
    args.size = args.size or (64 if args.data else 32)
    data, held_out, images = agreed(lambda: data_sets(args))
    args = resolved(args, device, given, len(data))

    settings = (*FLAGS, *dial(args.depth, args.size, len(data)))
    flags = {name: getattr(args, name) for name in settings} | dict(images=images)
    for name, tree in given.items():
        flags["--tokenizer" if name == "codec" else "--init"] = sample.digest(tree)
    if "next-scale" in given:  # as a start for these scales and classes
        given["next-scale"] = fitted(args, given["next-scale"], len(data.class_names))
    record = dict(flags=flags, class_names=data.class_names)
    lock = claim_folder(args, record) if rank() == 0 else None
    barrier()
    prepare(args, given, data, held_out)

    work = {"tokenizer": train_tokenizer, "next-scale": train_next_scale, "masked": train_masked}
    for stage in args.stages:
        weights, checkpoint = stage_paths(args, stage)
        if agreed(weights.exists):
            say(f"{stage}: finished before, {weights}")
        elif stage == "tokenizer" and "codec" in given:
            save(weights, given["codec"])
        else:
            save(weights, work[stage](args, data, held_out, given.get(stage)))
        if rank() == 0:  # a kill may have left it
            checkpoint.unlink(missing_ok=True)
    then = "" if args.stages[-1] == "tokenizer" else f"; next: python sample.py {args.out}"
    say(f"finished{then}")
    del lock  # held until here

    # for programs: what this process cost
    say(f"seconds {time.process_time():.6g}\npeak_mb {peak_mb():.6g}")


def prepare(args, given, data, held_out):
    """Says what will be done; gives args the work of each stage and the parts of a batch."""
    names = data.class_names
    for label in set(range(len(names))).difference(data.labels):
        say(f"class {names[label]}: all its images are held out, none to train on")
    say(
        f"{args.out}: {len(data)} images to train on, {len(held_out)} held out, "
        f"{len(names)} classes; {args.device}, {str(args.dtype)[6:]}, "
        f"{torch.get_num_threads()} threads, processes: {world()}"
    )
    with torch.device("meta"):  # where tensors have no values
        codec = given.get("codec", given.get("tokenizer")) or tokenizer.init(**args.codec)
        params = given.get("next-scale") or new_transformer(args, len(names))
        codec, params = pytree.tree_map(lambda leaf: leaf.to("meta"), (codec, params))
        if not args.causal:
            params = hmar.add_masked_branch(params, args.masked_blocks)
    args.work = planned(args, codec, params, len(data))
    args.parts, args.checkpointing = agreed(lambda: fitting_parts(args, params))


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


def resolved(args, device, given, images):
    """The flags and what `dial` says beside them as one namespace."""
    if "next-scale" in given:
        args.depth = hmar.depth(given["next-scale"])
    args.depth = args.depth or DEPTH
    settings = dial(args.depth, args.size, images)
    for name in ("steps", "lr"):  # one number for all stages
        if getattr(args, name) is not None:
            settings[name] = dict.fromkeys(STAGES, getattr(args, name))
    settings["batch"] = args.batch or settings["batch"]
    vars(args).update(settings, device=device)
    args.dtype = sample.find_dtype(args.dtype, device)
    args.workers = args.workers or min(8, os.cpu_count())
    if args.out is None:
        args.out = os.path.join("runs", os.path.basename(os.path.abspath(args.data or "shapes")))
    if args.data and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--out: got {args.out}, inside --data, whose images would be more")

    wanted = STAGES if args.stage == "all" else ["tokenizer"] * bool(args.tokenizer) + [args.stage]
    args.stages = [stage for stage in STAGES if stage in wanted]
    if args.causal:
        args.stages = [stage for stage in args.stages if stage != "masked"]

    codec = given.get("codec", given.get("tokenizer"))
    if codec is not None:  # it has sizes of its own
        args.codec = dict(zip(("codes", "code_dim"), codec["codebook"].shape))
        args.cell = tokenizer.downsampling(codec)
    args.scales = fitting_scales(args)
    if args.batch < world():
        raise ValueError(f"--batch: got {args.batch} images, fewer than the {world()} processes")
    if images < world():
        raise ValueError(f"--data: got {images} images to train on, fewer than processes")
    return args


def planned(args, codec, params, images):
    """{stage: FLOPs of all its steps}, counted on trees without values; says what will be done."""
    for name, tree in dict(tokenizer=codec, transformer=params).items():
        say(f"{name}: {parameters(tree) / 1e6:.3g} M parameters")
    for stage in args.stages[bool(args.tokenizer) :]:  # that one is finished
        say(f"{stage}: {args.steps[stage]} steps of {args.batch} images")

    with torch.device("meta"):
        pixels = torch.empty(1, 3, args.size, args.size)
        features = torch.empty(1, args.codec["code_dim"], *args.scales[-1])
        inputs = torch.empty(1, sum(tokenizer.lengths(args.scales)[1:]), args.codec["code_dim"])
        labels = torch.zeros(1, dtype=torch.int64)

    def flops(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    # a training step is three forward passes; the masked stage trains half of its blocks
    encoder = flops(tokenizer.encode_features, codec, pixels)
    decoder = flops(tokenizer.unclamped, codec, features)
    forward = flops(hmar.next_scale_logits, params, labels, inputs, args.causal)
    codec_forward = encoder + (1 + 1 / tokenizer.COARSE_EVERY) * decoder
    per_image = {"tokenizer": 3 * codec_forward, "next-scale": 3 * forward, "masked": 2 * forward}
    work = {}
    for stage in args.stages:
        if stage == "next-scale":  # before it every image is encoded
            work["encoding"] = images * views_of(args, images) * encoder
        work[stage] = args.steps[stage] * args.batch * per_image[stage]
    return work


def parameters(tree):
    """How many numbers a tree has."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(tree))


def fitting_parts(args, params):
    """(parts of a process's batch, whether to compute activations twice), as memory allows."""
    share = math.ceil(args.batch / world())
    most = sample.at_once(args.size**2)
    if args.device.type == "cuda":
        # bytes an image that a stage keeps for the backward pass (`tests/benchmark.py cost`)
        transformer = 50 * sum(tokenizer.lengths(args.scales)) * 64 * args.depth**2
        codec = 200 * args.size**2 * args.codec.get("channels", 160)
        taken = 24 * parameters(params)  # weights, gradients (DDP may have two), moments, average
        free, _ = torch.cuda.mem_get_info(args.device)
        most = int(0.8 * (free - taken) / max(transformer, codec))
    parts = min(math.ceil(share / max(1, most)), args.batch // world())  # none is empty
    return parts, most * parts < share


def check_flags(args):
    """ValueError for flags out of their range, or without effect beside others."""
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed: got {args.seed}, expected 0 to 2 ** 62 - 1")
    for name, most in dict(size=2**16, depth=1000, steps=10**9, batch=2**16, workers=999).items():
        number = getattr(args, name)
        if number is not None and not 1 <= number <= most:
            raise ValueError(f"--{name}: got {number}, expected 1 to {most}")
    if args.lr is not None and args.lr <= 0:
        raise ValueError(f"--lr: got {args.lr}, expected above 0")
    if args.causal and args.stage == "masked":
        raise ValueError("masked: there is no such stage with --causal")
    if args.out == "":
        raise ValueError("--out: got '', expected a folder")
    if args.flip and args.data is None:
        raise ValueError("--flip: drawings are not mirrored; expected with --data")


def fitting_scales(args):
    """--scales, or default ones, for a tokenizer whose cells have so many pixels a side."""
    side = args.size // args.cell
    if args.size % args.cell:
        raise ValueError(f"--size: got {args.size}, expected a multiple of {args.cell}")
    scales = tuple(args.scales or default_scales(args.size, side, args.growth))
    tokenizer.check_scales(scales)
    if scales[-1] != (side, side) or len(scales) == 1:
        expected = f"two or more, the last {side}, {args.size} pixels / {args.cell}"
        raise ValueError(f"--scales: got {scales}, expected {expected}")
    return scales


def default_scales(size, latent, growth):
    """Published scales, else sides that grow so; last ones up to 8 stand twice (RESULTS)."""
    if size in hmar.SCALES and hmar.SCALES[size][-1][0] == latent:
        return hmar.SCALES[size]
    sides = [latent, latent] if latent <= 8 else [latent]
    while sides[0] > 1:
        sides.insert(0, round(sides[0] / growth))
    return tuple((side, side) for side in sides)


# ---- run folders and processes
#
# RUN/args.json holds the flags that change a result, class names, a hash of the images and, once
# there are tokens, the tokenizer's digest; RUN/<stage>.checkpoint.pt what a stage goes on from.
# Only the first process writes files and looks which are there; all read them.


def claim_folder(args, record):
    """The lock on the run folder. ValueError where it is another run's.

    Until there are weights, tokens or a checkpoint, a run with other flags may take its place.
    """
    out, args_json = Path(args.out), Path(args.out, "args.json")
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    before, there = sample.read_json(args_json), results(args, STAGES)
    if "flags" not in before and (before or there or Path(out, "metrics.jsonl").exists()):
        raise ValueError(f"{args.out}: holds files of another program; give another --out")

    record = json.loads(json.dumps(record, default=str))  # as it comes back from a file
    old, new = before.get("flags"), record["flags"]
    if old != new and there:
        text = f"begun with other flags or images: {sample.differences(old, new)}"
        raise ValueError(f"{args.out}: {text}; give another --out, or remove the folder")
    if old != new:
        sample.write_json(args_json, record)

    unfinished = "*." + 16 * "[0-9a-f]" + ".tmp"  # what a kill left of sample.write_whole
    for path in (*out.glob(unfinished), *out.glob(f"samples/{unfinished}")):
        path.unlink()
    return lock


def lock_folder(folder):
    """The open file folder/lock, which keeps others out. ValueError where another one has it."""
    file = open(Path(folder, "lock"), "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{folder}: another process works there") from error
    except OSError:  # a file system without locks goes without
        pass
    return file


def note_tokenizer(args, codec):
    """Notes the tokenizer's digest in args.json. ValueError where another was used before."""
    path = Path(args.out, "args.json")
    record, digest = sample.read_json(path), sample.digest(codec)
    if record.get("tokenizer") == digest:
        return
    later = results(args, ("next-scale", "masked"))
    if later:
        names = ", ".join(map(str, later))
        raise ValueError(f"{names}: made with another tokenizer than tokenizer.pt; remove them")
    sample.write_json(path, record | dict(tokenizer=digest))


def stage_paths(args, stage):
    """The stage's weights, and its checkpoint."""
    return Path(args.out, STAGES[stage]), Path(args.out, f"{stage}.checkpoint.pt")


def results(args, stages):
    """Those of tokens.npy, the stages' weights and their checkpoints that are there."""
    paths = [Path(args.out, "tokens.npy")]
    for stage in stages:
        paths += stage_paths(args, stage)
    return [path for path in paths if path.exists()]


def load_stage(args, stage):
    """The weights of a finished stage."""
    weights, _ = stage_paths(args, stage)
    tree, _ = sample.load(weights, tokenizer if stage == "tokenizer" else hmar)
    return to_device(tree, args.device)


def load_checkpoint(args, stage, state):
    """((step, best step, best loss), reports) to go on from; its tensors are written into state.

    Where there is no checkpoint the stage begins. metrics.jsonl is cut to what it then says.
    """
    _, checkpoint = stage_paths(args, stage)
    progress, window = (0, 0, math.inf), []
    if agreed(checkpoint.exists):
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
            torch._foreach_copy_(state, saved["state"])
            progress, window = saved["progress"], to_device(saved["window"], args.device)
        except Exception as error:
            text = f"{checkpoint}: expected this stage's; removed, the stage begins anew"
            raise ValueError(text) from error

    cut_metrics(args, stage, progress[0])
    word = f"goes on at step {progress[0]}" if progress[0] else "begins"
    say(f"{stage}: {word}, {args.steps[stage]} steps")
    return progress, window


def cut_metrics(args, stage, step):
    """Takes later steps of a stage out of metrics.jsonl, and a line of which a kill left half."""
    path = Path(args.out, "metrics.jsonl")
    if rank() > 0 or not path.exists():
        return
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        found = re.match(rf'{{"stage": "{stage}", "step": (\d+)'.encode(), line)
        is_later = found and int(found[1]) > step
        if line.endswith(b"\n") and not is_later:
            lines.append(line)
    sample.write_whole(path, lambda file: file.writelines(lines))


def save(path, tree):
    """Writes a tree of tensors: the old file or the whole new one. OSError if it cannot."""
    if rank() == 0:
        plain = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), tree)
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
        if device.type == "cuda" and tensor.is_cpu:
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

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


def barrier():
    """Waits for the other processes."""
    if world() > 1:
        torch.distributed.barrier()


def summed(tensor):
    """A tensor, added up over the processes in place."""
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gathered(rows, count):
    """The `count` rows of all processes, of this one's share."""
    whole = rows.new_zeros(count, *rows.shape[1:])
    own_share(whole).copy_(rows)
    return summed(whole)


def start_processes(name):
    """This process's device; joins those that torchrun started, if there are several."""
    device = sample.find_device(name)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world() > 1:
        patience = datetime.timedelta(hours=2)  # encoding may part the processes for long
        torch.distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=patience)
    return device


def keep_freed_memory():
    """Asks glibc to keep what is freed: faulting it in again takes a tenth of a small step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # others than glibc go without
    if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD, older ones take 32 MiB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_mb():
    """The most memory that this process had, in MB; nan where no Linux tells."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 1024 if found else math.nan


def say(line, renewed=False):
    """Prints a line, once however many processes there are.

    On a terminal the next line takes the place of one that is renewed.
    """
    if rank() > 0:
        return
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    print("\r\x1b[K" + line[: width if renewed else None], end="" if renewed else "\n", flush=True)


def main(argv=None):
    """The command; see `sample.command`."""
    status = sample.command("train.py", train, parser(), argv)
    # after an error it would wait for the others; torchrun ends them
    if status == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
