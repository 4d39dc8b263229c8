"""Training: built-in shapes or a folder of images -> model.pt; and `python train.py`.

    images, prepared once -> tokenizer stage -> tokens (N, crops, L) -> next-scale, masked stage

The seed and the number of a step decide its batch. So a run that was killed goes on from its last
checkpoint to the same weights, bit for bit on one CPU with the same number of threads. The
tokenizer is trained without an adversarial loss. Its perceptual loss uses a small network that is
trained on the same images first (`learn_perceptual_layers`).
"""

import argparse
import colorsys
import datetime
import hashlib
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

COOL_DOWN = 0.6  # last share of a stage's steps, in which the learning rate falls to zero
WARM_UP = 0.06  # first share, in which it rises to its peak
AVERAGED = 0.25  # time constant of the weights' moving average (EMA), as a share of the steps
PATIENCE = 1 / 3  # a stage ends after this share of the steps without a better held-out loss
CLIP = 1.0  # largest norm of the gradient
LOG_EVERY = 50  # steps
SAVE_SECONDS = 300  # after so long without a checkpoint the next logged step saves one
LABEL_DROP = 0.1  # share of labels replaced by the null class, for guidance
REVIVE_EVERY = 20  # steps, after which codes that were never chosen are replaced
REVIVE_UNTIL = 0.8  # share of the steps; later codes get time to settle
COARSE_EVERY = 4  # every fourth image of a batch is decoded from coarse scales too
PERCEPTUAL_STEPS = 400  # of the perceptual network
PERCEPTUAL_WIDTHS = 3, 32, 64, 96, 128  # its channels
SHAPE_IMAGES = 20_500  # in the built-in data set
CROPS = 20_000  # of all images together, if there are fewer images: 2 to 16 crops of each
EVALUATED = 128  # held-out images in an evaluation
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


# ---- the settings of a run


def recipe(depth, size, images, classes, is_shapes=False, cell=None):
    """The settings of a run on so many images of size x size pixels, {name: value}.

    Chosen at depths 2 and 3 and extrapolated so that depth 16 has the published sizes. is_shapes:
    the data set is the built-in one. cell: the side in pixels of a latent position, if a tokenizer
    is given.
    """
    relative_depth = depth / 2
    is_large = depth >= 8  # from here on the published layers
    training_images = images - count_held_out(images)
    has_detail = size >= 48 and not is_large  # images whose detail a small model can learn

    # The tokenizer. With fold, squares of 2 x 2 pixels become channels, which lowers the FD of
    # reconstructions at 64 pixels from 3.55 to 1.65 for 5 % more time.
    fold = 2 if not is_large and (size >= 48 or depth <= 2) else 1
    own_cell = min(16, max(4, 2 ** math.ceil(math.log2(size / 16))))  # a 16th of the side, 4 to 16
    halvings = own_cell.bit_length() - 1
    codec = dict(
        codes=min(4096, 2 ** round(8 + 4 / 3 * math.log2(relative_depth))),
        code_dim=32 if is_large else 16,
        channels=fold * max(32, 32 * round(10 * depth / 32)),  # the published 160 at depth 16
        # Every level but the last halves the sides, and the fold halves them once.
        multipliers=halvings * (1,) if fold > 1 else (1, 1, 2, 2, 4)[: halvings + 1],
        fold=fold,
        residual_blocks=2 if is_large else 1,
        attention=is_large,
    )
    cell = cell or own_cell
    growth = 2 if depth <= 2 else math.sqrt(2)  # of the sides of scales; 2 is worse at depth 3

    # The transformer. Convolutions lower the loss by .16 nats a token, neighbours by .24 and more.
    local = {} if is_large else dict(gamma=0.1, convolutions=True, neighbours=True)

    # Images seen grow like the parameters, with depth^3 (Hoffmann et al. 2022), and the batch like
    # the root of the images seen (McCandlish et al. 2018). Larger images have more tokens, so fewer
    # are needed; no folder is seen more than 200 times.
    seen = min(50_000 * relative_depth**3 * math.sqrt(32 / size), 200 * training_images)
    batch = 8 * round(2 * relative_depth**1.5)
    if has_detail:  # fewer images in smaller batches were as good
        seen *= 0.69
        batch //= 2
    shares = {"tokenizer": 0.43 if fold > 1 else 0.35, "next-scale": 1, "masked": 1 / 11}
    steps = {name: math.ceil(share * seen / batch) for name, share in shares.items()}
    if is_shapes:  # which are simple
        steps = {name: math.ceil(0.68 * number) for name, number in steps.items()}

    # Deep models want a lower rate (HyperP, arXiv 2603.28743); rate * decay * steps stays constant
    # (Wang and Aitchison 2024).
    rate = 4e-3 * relative_depth**-0.7

    return dict(
        depth=depth,
        size=size,
        images=images,
        cell=cell,
        codec=codec,
        # Photographs get their last scale twice, for fine grain.
        scales=default_scales(size, cell, growth, doubled=not is_shapes),
        transformer=dict(depth=depth) | local,
        masked_blocks=(depth + 1) // 2,
        loss_weights="lognormal" if is_large else "token",
        perceptual=has_detail,  # not worth its time at 32 pixels
        batch=batch,
        steps=steps,
        lr={"tokenizer": rate, "next-scale": rate, "masked": rate / 4},
        decay=0.05 * relative_depth**-0.8,
        # Three Newton-Schulz iterations of Muon instead of five save a third of the time, but raise
        # the FD of photographs by 4 to 14 %, so only the built-in shapes use three.
        newton_schulz=3 if is_shapes else 5,
        evaluations=3 * max(2, depth),  # in each stage
        crops=1 if is_shapes else min(16, max(2, CROPS // images)),
        sampling=sampling_settings(depth, size, classes),
        masked_passes=2 if is_large else 0,  # by default; with neighbours they help edits only
    )


def sampling_settings(depth, size, classes):
    """Keyword arguments of `sample.steps` that suit a model of this recipe.

    Chosen at depths 2 and 3, 32 and 64 pixels, by the FD to images that no model saw
    (tests/RESULTS.md, section 3); those of other depths and sizes were not tried. A single class
    has nothing to be guided by: its predictions differ from those without a class only by noise.
    """
    if depth <= 2 and size <= 32:
        settings = dict(guidance=6.0, mask_guidance=3.0, rise=1.0, temperature=0.95)
    elif depth <= 2:
        settings = dict(guidance=4.3, mask_guidance=3.0, rise=2.0, temperature=0.9)
    elif depth < 8:
        guidance = 4.5 if size <= 32 else 3.5
        settings = dict(guidance=guidance, mask_guidance=2.0, rise=1.0, temperature=0.9)
    else:
        settings = dict(guidance=1.5, mask_guidance=1.5, rise=1.0, temperature=1.0)
    if classes == 1:
        settings |= dict(guidance=0.0, mask_guidance=0.0)
    return settings | dict(soften=0.1, top_k=0, top_p=1.0)


def default_scales(size, cell, growth, doubled=True):
    """The published scales where they fit, otherwise sides that grow by a factor.

    doubled: the last scale comes twice if its side is at most 8.
    """
    if cell == 16 and size in hmar.SCALES:
        return hmar.SCALES[size]
    latent = size // cell
    sides = [latent, latent] if doubled and latent <= 8 else [latent]
    while sides[0] > 1:
        sides.insert(0, round(sides[0] / growth))
    return tuple((side, side) for side in sides)


# ---- the loop of all stages


def fit(stage, run, out, tree, loss, make_batch, evaluate, draw, after_step=None, extra=()):
    """Trains all leaves of a tree; returns their moving average (EMA) at the best evaluation.

    stage: its name. run: the settings. out: the run folder. extra: tensors that after_step changes.

        loss(tree, **batch)          -> (mean over its images, {name: tensor} to log, what
                                        after_step needs: it gets a list with one for each part)
        make_batch(step, positions)  -> {name: tensor} of these images of the batch of a step
        evaluate(tree)               -> {name: number or list} on held-out images; the least
                                        "loss" is best
        draw(tree)                   writes a sheet of pictures
        after_step(step, traces, tree, average)  may change leaves of the last two in place
    """
    steps, batch_size = run["steps"][stage], run["batch"]
    leaves, structure = pytree.tree_flatten(tree)
    leaves = [nn.Parameter(leaf.detach().clone()) for leaf in leaves]
    average, best = ([leaf.detach().clone() for leaf in leaves] for _ in range(2))
    optimizers = new_optimizers(tree, leaves, run["decay"], run["newton_schulz"])
    state = [*leaves, *average, *best, *extra]  # all that is changed, always in place
    step, best_step, best_loss = load_checkpoint(out, stage, state, optimizers)
    tree, average_tree = (pytree.tree_unflatten(x, structure) for x in (leaves, average))
    millions = sum(leaf.numel() for leaf in leaves) / 1e6
    work = f"{steps} steps of {batch_size} images, {step} done"
    say(f"{stage}: {millions:.3g} M parameters, {work}")

    own = np.split(np.arange(batch_size), world())[rank()]  # this process's images in a batch
    parts = np.array_split(own, math.ceil(len(own) / sample.images_at_once(run["size"] ** 2)))
    window, begun, saved = [], (step, time.monotonic()), time.monotonic()
    while step < steps:
        step += 1
        report, traces = {}, []
        for part in parts:
            value, numbers, trace = loss(tree, **make_batch(step, part))
            share = len(part) / len(own)
            (share * value).backward()
            for name, number in numbers.items():
                report[name] = report.get(name, 0) + share * number.detach()
            traces.append(trace)
        average_gradients(leaves)
        report["gradient"] = nn.utils.clip_grad_norm_(leaves, CLIP)

        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, run["lr"][stage])
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, leaves, step, steps)
        if after_step:
            with torch.no_grad():
                after_step(step, traces, tree, average_tree)

        window.append(report)
        is_evaluation = step == steps or step % math.ceil(steps / run["evaluations"]) == 0
        if step % LOG_EVERY and not is_evaluation:
            continue
        log(out, stage, step, steps, begun, means(window))
        window.clear()

        is_over = False
        if is_evaluation:
            found = broadcast(evaluate(average_tree) if rank() == 0 else None)
            log(out, stage, step, steps, begun, {f"held_out_{x}": found[x] for x in found})
            if rank() == 0:
                draw(average_tree)
            if found["loss"] < best_loss:
                best_step, best_loss = step, found["loss"]
                torch._foreach_copy_(best, average)
            is_over = step - best_step >= PATIENCE * steps
        if is_evaluation or time.monotonic() - saved > SAVE_SECONDS:
            done = steps if is_over else step  # after an early stop a resumed run has no steps left
            save_checkpoint(out, stage, done, best_step, best_loss, state, optimizers)
            saved = time.monotonic()
        if is_over:
            break

    say(f"{stage}: best at step {best_step}, loss {best_loss:.4g}")
    return pytree.tree_unflatten(best, structure)


def new_optimizers(tree, leaves, decay, newton_schulz=5):
    """[Muon for matrices and convolutions (Jordan et al. 2024), AdamW for all other leaves].

    leaves: the parameters, in the order of the tree's leaves. hmar.is_table and tokenizer.TABLES
    name the matrices that AdamW trains. Muon multiplies in bf16 where the processor has it,
    whatever --dtype is.
    """
    matrices, others = [], []
    for (path, _), leaf in zip(pytree.tree_flatten_with_path(tree)[0], leaves, strict=True):
        keys = {getattr(entry, "key", None) for entry in path}
        is_table = hmar.is_table(keys, leaf) or keys & tokenizer.TABLES
        (others if leaf.ndim < 2 or is_table else matrices).append(leaf)
    muon = Muon(matrices, decay, newton_schulz, sample.find_dtype(None, leaves[0].device))
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, to the bit, but in any dtype and for convolutions (Jordan et al. 2024).

    torch's version always multiplies in bf16, which takes 20 times as long as fp32 on a processor
    without bf16. A convolution is treated as a matrix with a row for each output channel. Steps are
    scaled to the size of AdamW's: both use one rate (Liu et al. 2025).
    """

    def __init__(self, leaves, decay, newton_schulz, dtype):
        super().__init__(leaves, dict(lr=0.0))
        self.decay, self.newton_schulz, self.dtype = decay, newton_schulz, dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for leaf in group["params"]:
            state, gradient = self.state[leaf], leaf.grad.flatten(1)
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - 0.95)
            update = gradient.lerp(momentum, 0.95).to(self.dtype)  # Nesterov's
            update = orthogonalize(update, self.newton_schulz)
            scale = 0.2 * math.sqrt(max(update.shape))
            leaf.mul_(1 - group["lr"] * self.decay)
            leaf.add_(update.view_as(leaf), alpha=-group["lr"] * scale)


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
def update_average(average, leaves, step, steps):
    """Moves the average; its window grows with the step, so that initial weights soon leave it."""
    kept = min(1 - 1 / (1 + AVERAGED * steps), step / (step + 10))
    torch._foreach_lerp_(average, leaves, 1 - kept)


def means(window):
    """{name: number or list}: reports of several steps, averaged over them and the processes."""

    def mean(*values):
        return (add_over_processes(torch.stack(values).mean(0)) / world()).tolist()

    return pytree.tree_map(mean, *window)


def log(out, stage, step, steps, begun, numbers):
    """Appends a line to metrics.jsonl and prints it with the time left at the pace since `begun`.

    begun: (step, seconds). ValueError if a number is not finite. After a kill some steps may have
    two lines; the later one counts.
    """
    try:
        line = json.dumps(dict(stage=stage, step=step) | numbers, allow_nan=False)
    except ValueError as error:
        text = "the loss or gradient is not finite; a lower --lr may help"
        raise ValueError(f"{stage}, step {step}: {text}") from error
    if rank() == 0:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(line + "\n")
    pace = (time.monotonic() - begun[1]) / (step - begun[0])  # seconds per step
    left = datetime.timedelta(seconds=round(pace * (steps - step)))
    words = "  ".join(f"{name} {x:.4g}" for name, x in numbers.items() if isinstance(x, float))
    say(f"{stage} {step}/{steps}  {left} left  {words}")


def save_checkpoint(out, stage, step, best_step, best_loss, tensors, optimizers):
    """Replaces RUN/checkpoint.pt, which holds all that a stage needs to go on."""
    saved = dict(stage=stage, step=step, best_step=best_step, best_loss=best_loss)
    saved |= dict(tensors=[tensor.detach() for tensor in tensors])
    saved |= dict(optimizers=[optimizer.state_dict() for optimizer in optimizers])
    write_file(out / "checkpoint.pt", lambda file: torch.save(saved, file))


@torch.no_grad()
def load_checkpoint(out, stage, tensors, optimizers):
    """(step, best_step, best_loss) to go on from; a checkpoint of the stage fills the tensors."""
    path = out / "checkpoint.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if saved.get("stage") != stage:
        return 0, 0, math.inf
    for tensor, old in zip(tensors, saved["tensors"], strict=True):
        tensor.copy_(old)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["best_step"], saved["best_loss"]


# ---- the tokenizer stage


def train_tokenizer(run, out, device):
    """Trains a codec whose first scales alone, however many, decode to an image too."""
    dtype, scales = sample.find_dtype(run["dtype"], device), run["scales"]
    images = np.load(out / "images.npy", mmap_mode="c")  # (n, crops, 3, H, W)
    held_out, training = split_held_out(images)
    held_out = to_unit(held_out[:EVALUATED, 0]).to(device)
    codec = sample.to_device(tokenizer.init(**run["codec"], seed=run["seed"]), device)
    chosen = torch.zeros(len(codec["codebook"]), dtype=torch.int64, device=device)
    terms = dict(
        hue_variance=tokenizer.measure_hue_variance(to_unit(training[:EVALUATED, 0])),
        perceptual_layers=learn_perceptual_layers(run, out, training, device, dtype),
        images_per_coarse=run["batch"] / math.ceil(run["batch"] / COARSE_EVERY),
    )

    def make_batch(step, positions):
        rows, crops, generator = choose_rows(run, "tokenizer", step, len(training))
        stops = torch.randint(len(scales) - 1, (run["batch"],), generator=generator)
        images = to_unit(training[rows[positions], crops[positions]])
        coarse = torch.from_numpy(np.flatnonzero(positions % COARSE_EVERY == 0))  # rows of the part
        made = dict(images=images, coarse=coarse, stops=stops[positions][coarse])
        return sample.to_device(made, device)

    def loss(codec, images, coarse, stops):
        fast = tokenizer.cast(codec, dtype)
        made = tokenizer.training_loss(fast, images, scales, coarse, stops, **terms)
        report = {name: made[name] for name in ("loss", "coarse", "quantisation")}
        return made["loss"], report, (made["tokens"], made["residuals"])

    def evaluate(codec):
        return evaluate_tokenizer(tokenizer.cast(codec, dtype), held_out, scales)

    def draw(codec):
        draw_reconstructions(out, tokenizer.cast(codec, dtype), held_out[:8], scales)

    def after_step(step, traces, codec, average):
        is_due = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * run["steps"]["tokenizer"]
        count_chosen(chosen, traces)
        if step == 1 or is_due:  # at step 1 this initialises the codebook from data
            generator = generator_of(run["seed"], "revive", step)
            replace_dead_codes(chosen, traces, generator, codec["codebook"], average["codebook"])

    return fit("tokenizer", run, out, codec, loss, make_batch, evaluate, draw, after_step, [chosen])


def count_chosen(chosen, traces):
    """Adds to chosen (codes,) how often each code was chosen in a batch, in all processes."""
    tokens = torch.cat([x.flatten() for x in pytree.tree_leaves([trace[0] for trace in traces])])
    counts = torch.zeros_like(chosen).index_add_(0, tokens, torch.ones_like(tokens))
    chosen.add_(add_over_processes(counts))


def replace_dead_codes(chosen, traces, generator, codebook, average):
    """Replaces codes that were never chosen by residuals, in place; then counts begin again."""
    residuals = [gather(torch.cat(parts)) for parts in zip(*(trace[1] for trace in traces))]
    codes, dead = tokenizer.revive_codes(codebook, chosen, residuals, generator)
    codebook.copy_(codes)
    average[dead] = codes[dead]  # otherwise the average would long remember the dead codes
    chosen.zero_()


def learn_perceptual_layers(run, out, images, device, dtype):
    """Layers for tokenizer.perceptual_error: those of a small classifier of the training images.

    If there is a single class, it learns which of four quarter-turns an image was given (Gidaris et
    al. 2018). Trained in seconds, and again when a run is resumed. Returns [] if the recipe has no
    such loss.
    """
    if not run["perceptual"]:
        return []
    _, labels = load_labels(out)
    has_classes = len(run["class_names"]) > 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        net = nn.ModuleList()
        for inputs, width in itertools.pairwise(PERCEPTUAL_WIDTHS):
            convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            net.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        net.append(nn.Linear(PERCEPTUAL_WIDTHS[-1], len(run["class_names"]) if has_classes else 4))
    *layers, head = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)

    steps = min(PERCEPTUAL_STEPS, run["steps"]["tokenizer"])
    count = min(32, max(4, 2**17 // run["size"] ** 2))  # fewer images above 64 pixels
    say(f"tokenizer: the perceptual network, {steps} steps of {count} images")
    for step in range(1, steps + 1):
        generator = generator_of(run["seed"], "levels", step)
        rows = torch.randint(len(images), (count,), generator=generator)
        crops = torch.randint(run["crops"], (count,), generator=generator)
        pixels, targets = to_unit(images[rows.numpy(), crops.numpy()]), labels[rows]
        if not has_classes:
            targets = torch.randint(4, (count,), generator=generator)
            turned = [image.rot90(turn, (1, 2)) for image, turn in zip(pixels, targets.tolist())]
            pixels = torch.stack(turned)
        pixels, targets = pixels.to(device), targets.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            *_, features = tokenizer.feature_maps(layers, pixels)
            scores = head(features.mean((2, 3)))
        F.cross_entropy(scores, targets).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 3e-3)
        optimizer.step()
        optimizer.zero_grad()
    net.eval().requires_grad_(False).to(dtype)
    return [lambda x, layer=layer: layer(x.to(dtype)) for layer in layers]


@torch.no_grad()
def evaluate_tokenizer(codec, images, scales):
    """{name: number or list} for held-out images (B, 3, H, W) in [-1, 1].

    loss: the squared error. psnr: in dB, after each scale. perplexity: of the codes of each scale,
    the exponential of their entropy.
    """
    errors, counts = [], torch.zeros(len(scales), len(codec["codebook"]))
    for part in images.split(sample.images_at_once(images[0, 0].numel())):
        features = tokenizer.encode_features(codec, part)
        _, tokens, f_hats = zip(*tokenizer.quantise(codec, features, scales))
        decoded = torch.stack([tokenizer.decode_features(codec, f_hat) for f_hat in f_hats])
        errors.append((decoded - part).square().mean((2, 3, 4)))  # (S, B)
        for k, chosen in enumerate(tokens):
            counts[k] += torch.bincount(chosen.flatten().cpu(), minlength=counts.shape[1])

    errors = torch.cat(errors, 1)
    psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean(1).tolist()
    share = counts.double() / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp().tolist()
    return dict(loss=errors[-1].mean().item(), psnr=psnr, perplexity=perplexity)


@torch.no_grad()
def draw_reconstructions(out, codec, images, scales):
    """Writes samples/reconstructions.png: images (n, 3, H, W), then the same after each scale."""
    features = tokenizer.encode_features(codec, images)
    f_hats = [f_hat for _, _, f_hat in tokenizer.quantise(codec, features, scales)]
    rows = [images, *(tokenizer.decode_features(codec, f_hat) for f_hat in f_hats)]
    names = ["original", *(f"after {h}x{w}" for h, w in scales)]
    sample.sheet(rows, names).save(out / "samples/reconstructions.png")


# ---- the next-scale and the masked stage


def train_next_scale(run, out, device, codec, start=None):
    """Trains a transformer to predict each scale of the tokens from the coarser ones (HMAR).

    start: a tree to begin with, which is changed to fit the run.
    """
    dtype, scales = sample.find_dtype(run["dtype"], device), run["scales"]
    codec = sample.to_device(codec, device)
    params = sample.to_device(adapt_tree(run, start) if start else new_tree(run), device)
    weights = hmar.scale_weights(scales, run["loss_weights"]).to(device)  # (L,)
    held_out_labels, labels = load_labels(out)
    held_out, training = split_held_out(load_tokens(run, out, codec, device, dtype))

    def make_batch(step, positions):
        rows, tokens, _ = choose_tokens(run, "next-scale", step, labels, training)
        return sample.to_device(dict(labels=rows[positions], tokens=tokens[positions]), device)

    def loss(params, labels, tokens):
        fast = hmar.cast(params, dtype)
        inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
        losses = hmar.next_scale_losses(fast, labels, tokens, inputs, run["causal"]).mean(0)  # (L,)
        total = (losses * weights).sum()
        by_scale = [scale.mean() for scale in losses.split(tokenizer.lengths(scales))]
        return total, dict(loss=total, scale_losses=torch.stack(by_scale)), None

    def evaluate(params):
        batch = held_out_batch(held_out_labels, held_out)
        return evaluate_loss(run, device, loss, params, batch)

    def draw(params):
        fast = hmar.cast(params, dtype), tokenizer.cast(codec, dtype)
        draw_samples(run, out / "samples/next-scale.png", *fast, schedule=None)

    return fit("next-scale", run, out, params, loss, make_batch, evaluate, draw)


def train_masked(run, out, device, codec, params):
    """Trains a masked branch to predict hidden tokens from the others too (HMAR, stage two).

    The rest of the transformer stays as it is.
    """
    dtype, scales = sample.find_dtype(run["dtype"], device), run["scales"]
    codec = sample.to_device(codec, device)
    params = hmar.add_masked_branch(params, run["masked_blocks"], seed=run["seed"])
    params = sample.to_device(params, device)
    held_out_labels, labels = load_labels(out)
    held_out, training = split_held_out(load_tokens(run, out, codec, device, dtype))
    count = sum(tokenizer.lengths(scales)[1:])  # tokens that a mask may hide

    def make_batch(step, positions):
        rows, tokens, generator = choose_tokens(run, "masked", step, labels, training)
        ratio = torch.rand(run["batch"], 1, generator=generator)  # of hidden tokens, by image
        mask = torch.rand(run["batch"], count, generator=generator) < ratio
        made = dict(labels=rows[positions], tokens=tokens[positions], mask=mask[positions])
        return sample.to_device(made, device)

    def loss(branch, labels, tokens, mask):
        fast = hmar.cast(params | branch, dtype)
        inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
        own_inputs = tokenizer.masked_inputs(codec, tokens, scales, mask)
        losses = hmar.masked_losses(fast, labels, tokens, inputs, own_inputs, mask)  # (hidden,)
        # Divided by the expected number of hidden tokens, half of all, so that the losses of parts
        # of a batch add up to the loss of the batch.
        total = losses.sum() / (0.5 * mask.numel())
        return total, dict(loss=total), None

    def evaluate(branch):
        batch = held_out_batch(held_out_labels, held_out)
        generator = generator_of("held-out mask")
        batch["mask"] = torch.rand(len(batch["tokens"]), count, generator=generator) < 0.5
        return evaluate_loss(run, device, loss, branch, batch)

    def draw(branch):
        fast = hmar.cast(params | branch, dtype), tokenizer.cast(codec, dtype)
        schedule = sample.masked_schedule(scales, 1)
        draw_samples(run, out / "samples/masked.png", *fast, schedule=schedule)

    branch = dict(masked=params["masked"])
    return params | fit("masked", run, out, branch, loss, make_batch, evaluate, draw)


def new_tree(run):
    """An untrained transformer of the run."""
    sizes = dict(codes=run["codec"]["codes"], code_dim=run["codec"]["code_dim"])
    sizes |= dict(scales=run["scales"], classes=len(run["class_names"]), seed=run["seed"])
    return hmar.init(**run["transformer"], **sizes)


def adapt_tree(run, params):
    """A trained transformer for this run: without a masked branch, with its scales and classes."""
    branch, classes = params["next_scale"], len(run["class_names"])
    params = params | dict(trunk=params["trunk"] + branch["blocks"])
    params["next_scale"] = branch | dict(blocks=[])
    params.pop("masked", None)
    if hmar.scale_sizes(params) != run["scales"]:
        params = hmar.resize_positions(params, run["scales"])
    if len(params["classes"]) != classes + 1:  # new embeddings, those of an untrained tree
        width = params["classes"].shape[1]
        sizes = dict(codes=1, code_dim=1, scales=((1, 1),))  # only its classes are used
        new = hmar.init(depth=1, width=width, classes=classes, **sizes, seed=run["seed"])
        params["classes"] = new["classes"]
    return params


def held_out_batch(labels, tokens):
    """The labels and tokens of the images of an evaluation; tokens (n, crops, L)."""
    tokens = torch.from_numpy(tokens[:EVALUATED, 0].astype(np.int64))
    return dict(labels=labels[: len(tokens)], tokens=tokens)


@torch.no_grad()
def evaluate_loss(run, device, loss, tree, batch):
    """{"loss": the mean loss of a batch}, computed in parts."""
    total = 0.0
    for rows in torch.arange(len(batch["tokens"])).split(sample.images_at_once(run["size"] ** 2)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        value, *_ = loss(tree, **sample.to_device(part, device))
        total += len(rows) * value.item()
    return dict(loss=total / len(batch["tokens"]))


def draw_samples(run, path, params, codec, schedule):
    """Writes a sheet with eight samples of each of the first ten classes."""
    names, few = run["class_names"][:10], sample.images_at_once(run["size"] ** 2)
    labels = torch.arange(len(names)).repeat_interleave(8)
    options = run["sampling"] | dict(schedule=schedule, is_causal=run["causal"])
    images = []
    for number, part in enumerate(labels.split(few)):
        images.append(sample.generate(params, codec, part, seed=few * number, **options)[0])
    sample.sheet(torch.cat(images).split(8), names).save(path)


# ---- here the method ends; the built-in shapes


def polygon(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular polygon around (centre, 0); y points down."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def heart():
    """The corners (48, 2) of a heart, about as large as the unit circle."""
    angle = np.linspace(0, 2 * np.pi, 48)
    height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1)


OUTLINES = dict(  # the polygon that is filled, then one that is cut out; about the unit circle
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
    """The built-in data set: (PIL image of size x size, label), a pure function of the index.

    label = index % 10, an index into SHAPES. An index shows the same picture at all sizes.
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
    # drawn at four times the size and averaged, for soft edges
    mask = Image.new("L", (4 * size, 4 * size))
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


# ---- images, prepared once; tokens; batches


def image_paths(folder):
    """{path: parts of its name inside the folder}, sorted, of all images that are not hidden."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    parts = {path: path.relative_to(folder).parts for path in found}
    return {path: own for path, own in parts.items() if not any(x[0] == "." for x in own)}


def list_images(folder):
    """([(path, label), ...], class names) of a folder with a sub-folder for each class, or with
    images alone, which are one class.

    ValueError if there are no images, or images beside sub-folders of images.
    """
    parts = image_paths(folder)
    classes = sorted({own[0] if len(own) > 1 else "" for own in parts.values()})
    if not classes:
        raise ValueError(f"--data: no images found in {folder} ({', '.join(SUFFIXES)})")
    if classes == [""]:
        return [(path, 0) for path in parts], [Path(folder).resolve().name]
    if "" in classes:
        raise ValueError(f"--data: {folder} has images beside sub-folders of images")
    return [(path, classes.index(own[0])) for path, own in parts.items()], classes


def prepare_images(run, out, files):
    """Writes images.npy, uint8 (N, crops, 3, size, size), and then labels.npy.

    Images come in an order that depends on the seed; the first ones are held out. A file that
    cannot be read is named and left out. files: as `list_images` returns them; None for shapes.
    """
    count, shape = run["images"], (run["crops"], 3, run["size"], run["size"])
    say(f"{out / 'images.npy'}: up to {count * math.prod(shape) / 2**20:.0f} MiB will be written")
    order = torch.randperm(count, generator=generator_of(run["seed"], "rows"))
    header = dict(descr="|u1", fortran_order=False)
    labels = []

    def write(file):
        np.lib.format.write_array_header_1_0(file, header | dict(shape=(count, *shape)))
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # Pillow releases Python's lock
            for numbers in print_progress(order.split(64), count, "images prepared"):
                pairs = pool.map(lambda number: read_crops(run, files, number), numbers.tolist())
                for crops, label in filter(None, pairs):
                    file.write(np.ascontiguousarray(crops))
                    labels.append(label)
        file.seek(0)  # the header has the same length for fewer images
        np.lib.format.write_array_header_1_0(file, header | dict(shape=(len(labels), *shape)))

    write_file(out / "images.npy", write)
    if len(labels) < 2:
        raise ValueError(f"--data: {len(labels)} images can be read, expected two or more")
    write_file(out / "labels.npy", lambda file: np.save(file, labels))


def read_crops(run, files, number):
    """(uint8 (crops, 3, size, size), label) of an image, or None if its file cannot be read.

    The first crop is the centre, the others are random; with --flip every second one is mirrored.
    """
    size = run["size"]
    if files is None:
        image, label = draw_shape(number, size)
        return np.asarray(image).transpose(2, 0, 1)[None], label

    path, label = files[number]
    try:
        image = sample.read_image(path, shortest=2 * size)
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise errors of many kinds
        print(f"left out: {path}: {error}", file=sys.stderr)
        return None
    seeds = [None, *((run["seed"], number, i) for i in range(1, run["crops"]))]
    crops = [crop(image, size, seed) for seed in seeds]
    if run["flip"]:
        crops[1::2] = map(ImageOps.mirror, crops[1::2])
    return np.stack(crops).transpose(0, 3, 1, 2), label


def crop(image, size, seed):
    """A square crop of an image, resized to size x size.

    Its side is random between 1 / 1.125 and 1 times the shorter side of the image, and so is its
    place. seed None: the largest square, at the centre.
    """
    width, height = image.size
    reach = min(width, height)  # the side of the square
    left, top = (width - reach) // 2, (height - reach) // 2
    if seed is not None:
        zoom, x, y = np.random.default_rng(seed).random(3).tolist()
        reach /= 1 + zoom / 8
        left, top = x * (width - reach), y * (height - reach)

    box = (left, top, left + reach, top + reach)
    return image.resize((size, size), Image.LANCZOS, box=box, reducing_gap=2.0)


def count_held_out(images):
    """How many of so many images are held out: a twentieth, 128 to 500, at most an eighth."""
    return max(1, min(500, max(128, images // 20), images // 8))


def split_held_out(rows):
    """[held-out, training] rows of all images, which come in the order of images.npy."""
    return np.split(rows, [count_held_out(len(rows))])


def load_labels(out):
    """[held-out, training] labels, int64 (n,)."""
    return [torch.from_numpy(part) for part in split_held_out(np.load(out / "labels.npy"))]


def load_tokens(run, out, codec, device, dtype):
    """(N, crops, L), the smallest unsigned type: tokens.npy, which is written first if missing."""
    path = out / "tokens.npy"
    if rank() == 0 and not path.exists():
        images = np.load(out / "images.npy", mmap_mode="c")
        blocks = np.array_split(images, math.ceil(len(images) / 64))
        blocks = print_progress(blocks, len(images), "images encoded")
        fast = tokenizer.cast(codec, dtype)
        tokens = np.concatenate([encode_crops(run, fast, device, pixels) for pixels in blocks])
        write_file(path, lambda file: np.save(file, tokens))
    wait_for_all()
    return np.load(path, mmap_mode="c")


def encode_crops(run, codec, device, pixels):
    """Tokens (n, crops, L), of the smallest unsigned type, of uint8 (n, crops, 3, size, size)."""
    parts = torch.from_numpy(pixels).flatten(0, 1).split(sample.images_at_once(run["size"] ** 2))
    parts = [tokenizer.encode(codec, to_unit(x).to(device), run["scales"]) for x in parts]
    tokens = torch.cat(parts).cpu().numpy().reshape(len(pixels), run["crops"], -1)
    return tokens.astype(np.min_scalar_type(len(codec["codebook"]) - 1))


def choose_tokens(run, stage, step, labels, tokens):
    """(labels (batch,), tokens (batch, L), generator) of a step; some labels become no class."""
    rows, crops, generator = choose_rows(run, stage, step, len(tokens))
    is_dropped = torch.rand(run["batch"], generator=generator) < LABEL_DROP
    labels = labels[rows].masked_fill(is_dropped, len(run["class_names"]))
    return labels, torch.from_numpy(tokens[rows, crops].astype(np.int64)), generator


def choose_rows(run, stage, step, count):
    """(rows, crops, generator) of a step's batch: each of `count` rows once an epoch, any crop."""
    seed, size = run["seed"], run["batch"]
    places = range((step - 1) * size, step * size)
    rows = np.array([epoch_order(seed, i // count, count)[i % count] for i in places])
    generator = generator_of(seed, stage, step)
    return rows, torch.randint(run["crops"], (size,), generator=generator).numpy(), generator


@lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of the rows in an epoch, the same in every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).numpy()


def generator_of(*key):
    """A generator whose seed is a hash of where it is used: (seed, stage, step, ...)."""
    number = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))


def to_unit(images):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return torch.as_tensor(images).float() / 127.5 - 1


# ---- files and processes


def write_file(path, write):
    """Replaces a file by what write(file) writes, as a whole or not at all; first process only."""
    if rank() == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)


def print_progress(blocks, total, done):
    """Yields the blocks; prints every five seconds how many rows of the total are done."""
    count, printed = 0, time.monotonic()
    for block in blocks:
        yield block
        count += len(block)
        if count == total or time.monotonic() - printed > 5:
            printed = time.monotonic()
            say(f"{count} of {total} {done}")


def say(line):
    """Prints a line in the first process."""
    if rank() == 0:
        print(line, flush=True)


def world():
    """The number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    """The number of this process among them."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def start_processes(device):
    """Connects the processes that torchrun started, if there are several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world() > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(hours=24)  # the others wait while the first prepares images
        torch.distributed.init_process_group(backend, timeout=timeout)


def wait_for_all():
    """Returns when all processes have come here."""
    if world() > 1:
        torch.distributed.barrier()


def broadcast(value):
    """The value of the first process, in all of them."""
    box = [value]
    if world() > 1:
        torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def gather(rows):
    """The rows of all processes, one after another."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def add_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def average_gradients(leaves):
    """Averages gradients over the processes, as one vector. Unused leaves get gradients of zero."""
    for leaf in leaves:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    if world() > 1:
        gradients = [leaf.grad for leaf in leaves]
        total = add_over_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(total / world(), gradients)


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = argparse.ArgumentParser(description="Train HMAR from scratch, on your images or shapes.")
    add = top.add_argument
    text = "folder of images, one sub-folder for each class, or images directly in it (default: a "
    add("--data", help=text + "built-in data set, drawings of ten shapes)")
    add("--size", type=int, help="side of the images in pixels (default: 64; shapes: 32)")
    text = "transformer blocks; the other settings, the recipe, follow from it, the size and the "
    add("--depth", type=int, help=text + "number of images (default: 2)")
    add("--out", help="run folder (default: runs/ and the name of the data folder)")
    add("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    text = "training steps, one number for all three stages (default: by the recipe)"
    add("--steps", type=int, help=text)
    add("--batch", type=int, help="images in a step, over all processes (default: by the recipe)")
    text = "peak of the learning rate, of which the masked stage takes a quarter (default: by the "
    add("--lr", type=float, help=text + "recipe)")
    add("--flip", action="store_true", help="mirror every second crop of a folder's images")
    text = "train VAR instead: attend to coarser scales, no masked stage"
    add("--causal", action="store_true", help=text)
    text = "use the tokenizer in this model.pt or published file, and train none"
    add("--tokenizer", help=text)
    text = (
        "continue from this model.pt: keep its tokenizer and depth, go on training its transformer"
    )
    add("--init", help=text)
    sample.add_device_flags(top)
    return top


def read_settings(out):
    """The settings in a run folder's args.json; None if the folder is missing or empty.

    ValueError if the folder holds something else, of which nothing must be overwritten.
    """
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names <= {"args.json.tmp"}:  # a run that was killed at once
        return None
    try:
        settings = json.loads((out / "args.json").read_text())
        scales = tuple(map(tuple, settings["scales"]))
        return settings | dict(scales=scales, flags=dict(settings["flags"]))
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--out: {out} is neither empty nor a run of train.py") from error


def choose_settings(args, flags, names, count):
    """The settings of a new run: those of the recipe, replaced by the flags that are given.

    flags: command-line values stored in args.json, which a resumed run must repeat. names: of the
    classes. count: of the images. ValueError where flags do not fit.
    """
    depth, size, cell = args.depth or 2, args.size or (64 if args.data else 32), None
    if args.init or args.tokenizer:
        codec = load_part(args.tokenizer or args.init, "tokenizer")
        cell = tokenizer.downsampling(codec)
    if args.init:
        params = load_part(args.init, "transformer")
        sample.check_codes(params, codec)
        depth = hmar.block_count(params)
    settings = recipe(depth, size, count, len(names), is_shapes=not args.data, cell=cell)
    if size % settings["cell"] or size < 2 * settings["cell"]:
        raise ValueError(f"--size: got {size}, expected 2, 3, ... times {settings['cell']}")

    if cell:
        settings["codec"] = dict(zip(("codes", "code_dim"), codec["codebook"].shape))
    if args.batch:
        settings["batch"] = args.batch
    if args.steps:
        settings["steps"] = dict.fromkeys(settings["steps"], args.steps)
    if args.lr:
        rates, peak = settings["lr"], max(settings["lr"].values())
        settings["lr"] = {name: args.lr * rate / peak for name, rate in rates.items()}
    others = {name: flags[name] for name in ("seed", "flip", "causal", "dtype")}
    return settings | others | dict(class_names=names, flags=flags)


def load_part(path, name):
    """The tokenizer or the transformer in a file of weights. ValueError if it has none."""
    model = sample.load_model(path)
    if name not in model:
        raise ValueError(f"{path}: has no {name}")
    return model[name]


def begin_run(args, out):
    """(settings, files): of a new run, or of the one that the folder holds.

    files: as `list_images` returns them; None for shapes or where images are prepared already.
    ValueError where flags do not fit, or differ from those that the run was begun with.
    """
    for name in ("size", "depth", "steps", "batch", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: got {value}, expected above 0")
    if args.seed < 0:
        raise ValueError(f"--seed: got {args.seed}, expected 0 or more")

    flags = {name: x for name, x in vars(args).items() if name not in ("out", "device")}
    flags["data"] = args.data is not None  # its path may change
    before = read_settings(out)
    if (out / "labels.npy").exists():  # so it is a run of ours
        others = [name for name in flags if before["flags"].get(name) != flags[name]]
        if others:
            words = [f"--{name} {before['flags'].get(name)} -> {flags[name]}" for name in others]
            raise ValueError(f"--out: {out} was begun with other flags: {', '.join(words)}")
        if args.data and image_paths(args.data):  # a run goes on where its data are gone
            _, names = list_images(args.data)
            # A single class has the folder's name, which may change.
            if len(names) > 1 and names != before["class_names"]:
                raise ValueError(f"--out: {out} was begun with other classes than {args.data} has")
        return before, None

    files, names, count = None, [*SHAPES], SHAPE_IMAGES
    if args.data:
        files, names = list_images(args.data)
        count = len(files)
    return choose_settings(args, flags, names, count), files


def train(args):
    """Prepares the images, then runs each stage whose result is not yet in RUN/model.pt."""
    device = sample.find_device(args.device)
    start_processes(device)
    out = Path(args.out or f"runs/{Path(args.data or 'shapes').resolve().name}")
    run, files = begin_run(args, out)
    if run["batch"] % world():
        got = f"--batch: got {run['batch']}"
        raise ValueError(f"{got}, expected a multiple of the {world()} processes")
    wait_for_all()  # all have read the folder before the first writes there

    if rank() == 0 and not (out / "labels.npy").exists():
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=1)
        write_file(out / "args.json", lambda file: file.write(text.encode()))
        (out / "samples").mkdir(exist_ok=True)
        prepare_images(run, out, files)
    wait_for_all()
    print_settings(args, run, out, device)

    model = dict(classes=run["class_names"], sampling=run["sampling"], is_causal=run["causal"])
    if (out / "model.pt").exists():
        model = sample.load_model(out)
    wait_for_all()
    if "tokenizer" not in model:
        given = args.tokenizer or args.init
        codec = load_part(given, "tokenizer") if given else train_tokenizer(run, out, device)
        if rank() == 0:
            (out / "tokens.npy").unlink(missing_ok=True)  # tokens of another tokenizer
        model = save_model(out, model | dict(tokenizer=codec))
    if "transformer" not in model:
        start = load_part(args.init, "transformer") if args.init else None
        params = train_next_scale(run, out, device, model["tokenizer"], start)
        model = save_model(out, model | dict(transformer=params))
    if "masked" not in model["transformer"] and not run["causal"]:
        params = train_masked(run, out, device, model["tokenizer"], model["transformer"])
        if run["masked_passes"]:
            schedule = sample.masked_schedule(run["scales"], run["masked_passes"])
            model["sampling"] = run["sampling"] | dict(schedule=schedule)
        save_model(out, model | dict(transformer=params))

    if rank() == 0:
        (out / "checkpoint.pt").unlink(missing_ok=True)
    say(f"finished; next: python sample.py {out}")


def print_settings(args, run, out, device):
    """Prints what is trained on what."""
    if rank() == 0 and args.data:
        found = len(image_paths(args.data))
        if found not in (0, run["images"]):
            say(f"{args.data} has {found} images now; the {run['images']} of before are used")
    held_out, labels = load_labels(out)
    dtype = str(sample.find_dtype(run["dtype"], device)).removeprefix("torch.")
    say(
        f"{out}: {'VAR' if run['causal'] else 'HMAR'} of depth {run['depth']}, "
        f"{len(labels)} images to train on, {len(held_out)} held out, "
        f"{len(run['class_names'])} classes; {device}, {dtype}, "
        f"{torch.get_num_threads()} threads, {world()} processes"
    )


def save_model(out, model):
    """Writes RUN/model.pt and returns what it now contains.

    It is read again so that a stage starts from the same objects whether or not the run was killed
    before it: then the files are equal to the byte.
    """
    model = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), model)
    write_file(out / "model.pt", lambda file: torch.save(model, file))
    wait_for_all()
    model = sample.load_model(out)
    wait_for_all()
    return model


def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or files."""
    args = parser().parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    sample.keep_freed_memory()
    with sample.exit_with_a_line("train.py"):
        train(args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
