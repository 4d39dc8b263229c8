"""Training: a dataset of images and labels -> a model; and `python train.py`.

    dataset[i] -> (PIL image, label)
    crops, uint8 (B, 3, size, size) -> train_tokenizer -> codec; again, for the decoder alone
    crops -> tokens (B, L) -> train_transformer: next-scale stage, then masked stage -> params

A stage is one loop. The seed and the number of a step decide its batch and its random numbers. So a
run that was killed goes on from its last checkpoint to the same weights, bit for bit if it is one
process on a CPU with the same number of threads. Crops are made when they are needed, and nothing
is prepared.

`train` runs all stages on a dataset. Each stage can be called alone, too, on trees of tensors and
an iterator of batches. The tokenizer is trained without an adversarial loss.
"""

import argparse
import ast
import colorsys
import contextlib
import datetime
import hashlib
import inspect
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from functools import lru_cache, partial
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

# The stages, and the seconds of a step of each, relative to one of the tokenizer's. They are
# rough (.6 to 1.9 at depths 2 and 3) and serve the time left that is printed.
STEP_COSTS = dict(tokenizer=1.0, decoder=0.9, next_scale=1.2, masked=1.2)
COOL_DOWN = 0.6  # share of a stage's steps at its end, while the learning rate falls to zero
WARM_UP = 0.06  # share at its beginning, while it rises to its peak
CLIP = 1.0  # largest norm of the gradient
MASKED_RATE = 1 / 4  # learning rate of the masked stage, relative to the others
REVIVE_EVERY = 20  # steps from one replacement of codes that were never chosen to the next
REVIVE_UNTIL = 0.8  # share of the steps; later codes get time to settle
DECODER = "post_quant_conv", "decoder"  # the parts of a codec that make images of f_hat
COARSE_EVERY = 4  # every fourth image of a batch is decoded from coarse scales too
PERCEPTUAL_STEPS = 400  # of the perceptual network
PERCEPTUAL_WIDTHS = 3, 32, 64, 96, 128  # its channels
EVALUATED = 128  # images held out for evaluations, at most a twentieth of all
LOG_EVERY = 50  # steps
TOKENIZER_REPORT = "loss", "error", "coarse", "quantisation"  # logged of its training loss
SAVE_SECONDS = 300  # between checkpoints, beside those at evaluations
CACHE_BYTES = 2**29  # of decoded images that a process keeps in memory
ENCODED_TOGETHER = 4  # batches
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ---- a run


def train(
    dataset,
    out=None,
    *,
    size=64,
    depth=None,
    seed=0,
    flip=False,
    is_causal=None,
    is_simple=False,
    tokenizer=None,
    init=None,
    device=None,
    dtype=None,
    workers=None,
    **settings,
):
    """Trains a tokenizer and a transformer on a dataset; returns a model as `sample.load_model`.

    dataset: a map-style dataset as torch defines it. dataset[i] is (PIL image, int label) for i
        from 0 to len(dataset) - 1, and dataset.classes has the names of the classes; without it
        there is one class. If dataset[i] raises OSError, another image takes its place. A run
        resumes bit for bit if dataset[i] depends on i alone.
    out: the run folder, in which a run that was stopped goes on. None: nothing is written.
    size: side in pixels of the square crops that are learned.
    depth: transformer blocks. None: 2, or those of init.
    flip: mirrors every second crop.
    is_causal: True trains VAR, in which a scale attends to the coarser ones. None: as init is.
    is_simple: says that the images are simple drawings, which need fewer steps and scales, and no
        random crops.
    tokenizer: a model or its file, whose tokenizer is used; none is trained then.
    init: a model or its file, whose transformer is trained further; its tokenizer is used unless
        `tokenizer` is given.
    device, dtype: names, see `sample.find_device` and `sample.find_dtype`.
    workers: processes that read images. None: none on a CPU, up to eight on a GPU.
    settings: replace entries of `recipe` by name; steps and lr set those of all stages.

    Raises ValueError if the arguments do not fit each other or the run in `out`, KeyboardInterrupt
    after Ctrl-C and a checkpoint, FloatingPointError if a loss is not finite.
    """
    flags = dict(size=size, depth=depth, seed=seed, flip=flip, is_causal=is_causal)
    flags |= dict(is_simple=is_simple, tokenizer=tokenizer, init=init, dtype=dtype)
    device = start_processes(sample.find_device(device))
    plan = begin_run(dataset, out, flags, settings)
    return run_stages(dataset, flags, plan, out, device, workers)


def run_stages(dataset, flags, plan, out, device, workers):
    """Runs the stages whose results are not yet in the model of the run folder; returns the model.

    flags: the arguments of `train` from size to dtype. plan: what `begin_run` makes of them.
    """
    out, settings, classes = out and Path(out), plan["settings"], plan["classes"]
    scales, seed = settings["scales"], flags["seed"]
    dtype = sample.find_dtype(flags["dtype"], device)

    order = torch.randperm(len(dataset), generator=generator_of(seed, "rows")).tolist()
    held_out_count = count_held_out(len(dataset))
    options = dict(size=flags["size"], seed=seed, flip=flags["flip"], classes=len(classes))
    held_out = Crops(dataset, order[:held_out_count], **options)
    options |= dict(central_every=settings["central_every"])
    training = Crops(dataset, order[held_out_count:], **options)
    reading = dict(seed=seed, batch=settings["batch"], device=device, workers=workers)

    sampling = arguments(sample.steps, settings)
    model = dict(classes=classes, sampling=sampling)
    if out and (out / "model.pt").exists():
        model = sample.load_model(out)
    print_plan(flags, plan, out, device, dtype, len(training), held_out_count)

    with catch_interrupt() as stop:
        shared = dict(out=out, seed=seed, device=device, dtype=dtype, stop=stop)

        if "tokenizer" not in model and (flags["tokenizer"] or flags["init"]):
            model["tokenizer"] = part_of(flags["tokenizer"] or flags["init"], "tokenizer")
            model = save_model(out, model)

        if "tokenizer" not in model:
            images, _ = central_crops(training)
            terms = dict(hue_variance=tokenizer.measure_hue_variance(to_unit(images)))
            if settings["perceptual"]:
                steps = min(PERCEPTUAL_STEPS, settings["tokenizer_steps"])
                learning = dict(seed=seed, device=device, dtype=dtype, workers=workers)
                terms["perceptual_layers"] = learn_perceptual_layers(training, steps, **learning)

            learn = partial(
                train_tokenizer,
                held_out=central_crops(held_out)[0],
                lr=settings["tokenizer_lr"],
                **arguments(train_tokenizer, settings),
                **terms,
                **shared,
            )
            if "draft" not in model:
                model["draft"] = learn(
                    tokenizer.init(**arguments(tokenizer.init, settings), seed=seed),
                    partial(crop_batches, training, stage="tokenizer", **reading),
                    steps=settings["tokenizer_steps"],
                    later=later_steps(plan, "tokenizer"),
                    texture_weight=settings["texture_weight"],
                    jump_weight=settings["jump_weight"],
                )
                model = save_model(out, model)

            model["tokenizer"] = learn(
                model.pop("draft"),
                partial(crop_batches, training, stage="decoder", **reading),
                decoder_only=True,
                steps=settings["decoder_steps"],
                later=later_steps(plan, "decoder"),
                texture_weight=0.0,  # the spectrum term stands in its place
                spectrum_weight=settings["spectrum_weight"],
            )
            model = save_model(out, model)

        codec = sample.to_device(tokenizer.cast(model["tokenizer"], dtype), device)
        examples = encode_held_out(codec, held_out, scales)
        shared |= dict(classes=classes)

        if "transformer" not in model:
            params = model["transformer"] = train_transformer(
                new_transformer(flags, plan),
                codec,
                partial(token_batches, training, codec, scales, stage="next-scale", **reading),
                examples,
                steps=settings["next_scale_steps"],
                lr=settings["next_scale_lr"],
                later=later_steps(plan, "next_scale"),
                sampling=sampling,
                **arguments(train_transformer, settings),
                **shared,
            )
            fast = sample.to_device(hmar.cast(params, dtype), device)
            weights = hmar.scale_weights(scales, settings["loss_weights"]).to(device)
            gain = broadcast(evaluate_transformer(fast, codec, weights, examples)["class_gain"])
            model["sampling"] = weaken_guidance(sampling, gain, settings["halving_gain"])
            model = save_model(out, model)

        if "masked" not in model["transformer"] and "causal" not in model["transformer"]:
            model["transformer"] = train_transformer(
                hmar.add_masked_branch(model["transformer"], settings["masked_blocks"], seed=seed),
                codec,
                partial(token_batches, training, codec, scales, stage="masked", **reading),
                examples,
                steps=settings["masked_steps"],
                lr=settings["masked_lr"],
                sampling=model["sampling"],
                **arguments(train_transformer, settings),
                **shared,
            )
            if settings["masked_passes"]:
                schedule = sample.masked_schedule(**arguments(sample.masked_schedule, settings))
                model["sampling"] = model["sampling"] | dict(schedule=schedule)
            model = save_model(out, model)

    if out and rank() == 0:
        (out / "checkpoint.pt").unlink(missing_ok=True)
    # An image that several processes left out counts once.
    broken = torch.cat([training.is_broken, held_out.is_broken]).int().to(device)
    broken = int((add_over_processes(broken) > 0).sum())
    if broken:
        log(f"{broken} of {len(dataset)} images were left out")
    return model


# ---- the settings of a run


def recipe(depth, size, images, classes, is_simple=False, cell=None):
    """The settings of a run on so many images of size x size pixels, {name: value}.

    Each is an argument of a function with that name, or is read by `run_stages`. They were chosen
    at depths 2 and 3 and are extrapolated so that depth 16 has the published codes and channels.

    One run was deeper, of depth 4. From depth 8 on nothing was tried, and the laws are those of a
    first run: at depth 16 7 epochs of ImageNet in batches of 360, with Muon. Published models were
    trained for 200 epochs and more in batches of 768, by AdamW at 3e-4 (VAR, depth 16), on tokens
    of a tokenizer that had learned from a perceptual and an adversarial term. Ours has neither
    there. So whoever wants such quality gives the published tokenizer and sets the batch, the steps
    and the rates of the stages.

    is_simple: the images are simple drawings. cell: the side in pixels of a latent position, if a
    tokenizer is given.
    """
    relative_depth = depth / 2  # most numbers below were chosen at depth 2
    is_large = depth >= 8  # from here on the published layers
    training_images = images - count_held_out(images)
    has_detail = size >= 48 and not is_large  # images whose detail a small model can learn

    # The tokenizer. With fold, squares of 2 x 2 pixels become channels, which lowers the FD of
    # reconstructions at 64 pixels from 3.55 to 1.65 for 5 % more time. Every level but the last
    # halves the sides, and the fold halves them once.
    fold = 2 if not is_large and (size >= 48 or depth <= 2) else 1
    new_cell = min(16, max(4, 2 ** math.ceil(math.log2(size / 16))))  # a 16th of the side, 4 to 16
    halvings = round(math.log2(new_cell // fold))
    cell = cell or new_cell

    # Sides of scales that grow by a factor of 2 were worse at depth 3.
    growth = 2 if depth <= 2 else math.sqrt(2)

    # Images seen grow like the parameters, with depth^3 (Hoffmann et al. 2022), and the batch like
    # the root of the images seen (McCandlish et al. 2018). Larger images have more tokens, so fewer
    # are needed. The tokenizer sees no image more than 80 times (.4 of 200).
    seen = min(50_000 * relative_depth**3 * math.sqrt(32 / size), 200 * training_images)
    batch = 8 * round(2 * relative_depth**1.5)
    if has_detail:  # fewer images in smaller batches were as good
        seen *= 0.69
        batch //= 2
    shares = dict(tokenizer=0.4 if fold > 1 else 0.35, decoder=0.08, next_scale=1, masked=1 / 11)
    steps = {name: math.ceil(share * seen / batch) for name, share in shares.items()}
    if is_simple:
        steps = {name: math.ceil(0.68 * number) for name, number in steps.items()}

    # The transformer sees none more than 35 times, because its samples become copies of images that
    # it sees more often (tests/RESULTS.md, section 3).
    steps["next_scale"] = min(steps["next_scale"], math.ceil(35 * training_images / batch))
    epochs = steps["next_scale"] * batch / training_images

    # Deep models want a lower rate (HyperP, arXiv 2603.28743); rate * decay * steps stays constant
    # (Wang and Aitchison 2024).
    rate = 4e-3 * relative_depth**-0.7

    return dict(
        # tokenizer.init
        codes=min(4096, 2 ** round(8 + 4 / 3 * math.log2(relative_depth))),
        code_dim=32 if is_large else 16,
        channels=fold * max(32, 32 * round(10 * depth / 32)),  # the published 160 at depth 16
        multipliers=(1,) * (halvings + 1) if fold > 1 else (1, 1, 2, 2, 4)[: halvings + 1],
        residual_blocks=2 if is_large else 1,
        attention=is_large,
        fold=fold,
        # hmar.init. Convolutions lower the loss by .16 nats a token, neighbours by .24 and more.
        depth=depth,
        width=None,  # 64 * depth
        scales=default_scales(size, cell, growth, doubled=not is_simple),
        gamma=None if is_large else 0.1,
        convolutions=not is_large,
        neighbours=not is_large,
        masked_blocks=(depth + 1) // 2,
        # The stages.
        batch=batch,
        tokenizer_steps=steps["tokenizer"],
        decoder_steps=steps["decoder"],
        next_scale_steps=steps["next_scale"],
        masked_steps=steps["masked"],
        tokenizer_lr=rate,
        next_scale_lr=rate,
        masked_lr=MASKED_RATE * rate,
        decay=0.05 * relative_depth**-0.8,
        # Three Newton-Schulz iterations of Muon instead of five save a third of the time, but raise
        # the FD of photographs by 4 to 14 %, so only simple drawings use three.
        newton_schulz=3 if is_simple else 5,
        # So many in each stage. Six at depth 2 took 8 % of the seconds of a run at 64 pixels.
        evaluations=3 * max(1, depth - 1),
        label_drop=0.1,
        # Dropout helps runs that see each image often and harms those that do not: FD of CIFAR-10's
        # first 1,000 images 3.8 for 4.7 after 15 epochs, of 10,000 5.7 for 5.2 after five.
        dropout=0.1 if epochs > 8 else 0.0,
        # The root of the number of tokens helps photographs and harms drawings.
        loss_weights="lognormal" if is_large else "token" if is_simple else "root",
        # The perceptual term is not worth its time at 32 pixels. Beside it a texture weight of .5
        # makes the decoder write flat squares of 2 x 2 pixels; these weights of texture and jumps
        # do not. At 32 pixels, where it is off, they raise the FD of reconstructions.
        # In the decoder's stage the spectrum term replaces both, against a lattice of dots. In the
        # tokenizer's stage it would raise the FD of samples of 64 pixels from 6.5 to 7.2.
        perceptual=has_detail,
        texture_weight=0.25 if has_detail else 0.5,
        jump_weight=0.72 if has_detail else 0.0,
        spectrum_weight=2.0,
        # One crop in so many is the central one, which is not resampled if it has the right size.
        central_every=1 if is_simple else min(16, max(2, 20_000 // images)),
        # The sampler. Its guidance is weakened where the class decides much, see `weaken_guidance`;
        # with the published layers that was not tried.
        **sampling_settings(depth, size, classes),
        halving_gain=math.inf if is_large else 0.1,
        # Masked passes of samples, at coarse scales only, as published. With neighbours one ties
        # on CIFAR-10 at depth 2, lowers its FD by .2 at depth 3, and raises that of photographs by
        # .2 to .6. A longer masked stage does not help.
        masked_passes=2 if is_large else 0,
        refined_tokens=16 if is_large else 25,
    )


# Guidance of the first three rows was chosen by the FD to images that no model saw, see section 3
# of tests/RESULTS.md. That of the next two is some .7 of what was best when it was weakened token
# by token, and mask_guidance was only compared in edits. The first row whose depth and side in
# pixels are not exceeded counts.
SAMPLING = {  # (depth, side): guidance, mask_guidance, rise, temperature, cooling
    (2, 32): (4.4, 2.6, 1.0, 0.75, 1.5),
    (2, math.inf): (2.6, 2.6, 2.0, 0.75, 1.5),
    (3, 32): (3.2, 1.8, 1.0, 0.75, 1.5),
    (3, math.inf): (2.6, 1.8, 1.0, 0.75, 1.5),
    (7, math.inf): (1.8, 1.5, 1.0, 0.75, 1.5),
    (math.inf, math.inf): (1.5, 1.5, 1.0, 1.0, 1.0),  # not tried
}


def sampling_settings(depth, size, classes):
    """Keyword arguments of `sample.steps` that suit a model of this recipe.

    A single class has nothing to be guided by: its predictions differ from those without a class
    only by noise.
    """
    fitting = [row for (most, side), row in SAMPLING.items() if depth <= most and size <= side]
    guidance, mask_guidance, rise, temperature, cooling = fitting[0]
    if classes == 1:
        guidance = mask_guidance = 0.0
    settings = dict(guidance=guidance, mask_guidance=mask_guidance, rise=rise)
    return settings | dict(temperature=temperature, cooling=cooling, top_k=0, top_p=1.0)


def weaken_guidance(sampling, gain, halving_gain):
    """The settings with both strengths of guidance divided by 1 + (gain / halving_gain)^2.

    gain: by how many nats a token the class lowers the next-scale loss of images held out, see
        `evaluate_transformer`. Below zero, as after learning a small folder by heart, it changes
        nothing.
    halving_gain: the gain at which guidance is halved.

    Guidance makes up for a model that has learned little of the classes, as those of photographs
    have (a gain of .06 or less). Where the class decides much, as in drawings and letters (.13 to
    .28), strong guidance would leave the data (tests/RESULTS.md, section 3).
    """
    share = 1 / (1 + (max(0.0, gain) / halving_gain) ** 2)
    names = sampling.keys() & {"guidance", "mask_guidance"}
    return sampling | {name: share * sampling[name] for name in names}


def default_scales(size, cell, growth, doubled=True):
    """The published scales where they fit, otherwise sides that grow by a factor.

    doubled: the last scale comes twice if its side is at most 8, which sharpens fine grain. The
        scale before these two has at least 5/8 of their side: when it had half, half of the FD of
        CIFAR-10 arose where the full side is sampled first (tests/RESULTS.md, section 2).
    """
    if cell == 16 and size in hmar.SCALES:
        return hmar.SCALES[size]
    latent = size // cell
    sides = [latent]
    if doubled and latent <= 8:
        sides = [round(latent / min(growth, 1.6)), latent, latent]
    while sides[0] > 1:
        sides.insert(0, round(sides[0] / growth))
    return tuple((side, side) for side in sides)


# Settings with names that end so are above zero.
ABOVE_ZERO = "steps", "lr", "batch", "evaluations", "central_every"


def replace_settings(settings, changes):
    """The settings with some of them replaced by name.

    steps and lr stand for those of all stages; the masked stage takes a quarter of the rate. Who
    sets one of the strengths of guidance gets both as they stand: none is weakened. ValueError for
    an unknown name, a value of another type, or a number that is not above 0.
    """
    changes = dict(changes)
    for name, value in changes.items():
        is_number = isinstance(value, int | float)
        if name.endswith(ABOVE_ZERO) and is_number and not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, expected above 0")
    if "steps" in changes:
        steps = changes.pop("steps")
        changes = {f"{stage}_steps": steps for stage in STEP_COSTS} | changes
    if "lr" in changes:
        peak = changes.pop("lr")
        rates = dict(tokenizer_lr=peak, next_scale_lr=peak, masked_lr=MASKED_RATE * peak)
        changes = rates | changes
    if changes.keys() & {"guidance", "mask_guidance"}:
        changes = dict(halving_gain=math.inf) | changes

    for name, value in changes.items():
        if name not in settings:
            raise ValueError(f"{name}: no such setting, expected one of {', '.join(settings)}")
        kinds = (float, int) if type(settings[name]) is float else (type(settings[name]),)
        if settings[name] is not None and type(value) not in kinds:
            raise ValueError(f"{name}: got {value!r}, expected a value like {settings[name]!r}")
    return settings | changes


def arguments(function, settings):
    """The settings that are arguments of a function, by name."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in names}


def count_held_out(images):
    """How many of so many images are never trained on: those of an evaluation, and no more."""
    return max(1, min(EVALUATED, images // 20))


# ---- the tokenizer's loop


def train_tokenizer(
    codec,
    batches,
    held_out,
    scales,
    *,
    steps,
    lr,
    decay=0.05,
    newton_schulz=5,
    evaluations=6,
    decoder_only=False,
    seed=0,
    later=0,
    out=None,
    device="cpu",
    dtype=torch.float32,
    stop=None,
    **terms,
):
    """Returns the codec, trained so that its first scales, however many, decode to an image too.

    codec: a tree of `tokenizer.init`. At the first step, codes that the batch does not choose are
        replaced by vectors of the batch.
    batches: an iterator of (images uint8 (B, 3, H, W), anything), or a function that returns the
        iterator of the steps after a number of steps, such as `crop_batches`. Each of several
        processes gets its own share of a batch.
    held_out: images uint8 (n, 3, H, W) to evaluate on, `evaluations` times, for the log alone.
    steps: their number. lr: the peak of the learning rate. decay: weight decay of Muon.
    newton_schulz: iterations of Muon.
    decoder_only: trains nothing but the decoder and post_quant_conv, so that images keep their
        tokens; the stage is called "decoder" then.
    later: the work of later stages, in steps of this one; only for the time left that is printed.
    out: the run folder, in which a stage goes on from its checkpoint; a stage that is to begin anew
        needs another. None: nothing is written.
    stop: an event after which the stage saves and raises KeyboardInterrupt.
    terms: texture_weight, jump_weight, spectrum_weight, hue_variance and perceptual_layers of
        `tokenizer.training_loss`.
    """
    stage = "decoder" if decoder_only else "tokenizer"
    codec = pytree.tree_map(torch.Tensor.detach, sample.to_device(codec, device))
    names = DECODER if decoder_only else codec.keys()
    trained = trainable({name: codec[name] for name in names}, device)
    leaves, codes = pytree.tree_leaves(trained), len(codec["codebook"])
    state = new_state(trained, decay, newton_schulz, asked=[steps, lr, seed])
    state["chosen"] = torch.zeros(codes, dtype=torch.int64, device=device)  # since the last revival
    out = out and Path(out)
    clock = begin_stage(out, stage, state, steps, later)
    pixels = held_out[0, 0].numel()
    at_once = images_a_micro_batch(pixels, tokenizer_bytes(codec, pixels, dtype), device)
    loss_of = compiled(tokenizer.training_loss, device)
    batches = iter(batches(state["step"]) if callable(batches) else batches)
    held_out = to_unit(held_out.to(device))
    window, save_at = [], time.monotonic() + SAVE_SECONDS

    while state["step"] < steps:
        step = state["step"] = state["step"] + 1
        images, _ = next(batches)  # (b, 3, H, W), this process's share of the batch
        batch = world() * len(images)
        positions = own_share(torch.arange(batch))  # of these images in the whole batch
        generator = generator_of(seed, stage, step)
        last_scales = torch.randint(len(scales) - 1, (batch,), generator=generator)[positions]

        report, tokens, residuals = {}, [], []
        for part, places, last in micro_batches(at_once, images, positions, last_scales):
            coarse = (places % COARSE_EVERY == 0).nonzero()[:, 0]  # also decoded from coarse scales
            part, coarse, stops = send((part, coarse, last[coarse]), device)
            result = loss_of(
                tokenizer.cast(codec | trained, dtype),
                to_unit(part),
                scales,
                coarse,
                stops,
                is_transposed=step % 2 == 0,  # against stripes, see `tokenizer.training_loss`
                images_per_coarse=batch / math.ceil(batch / COARSE_EVERY),
                **terms,
            )
            share = len(part) / len(images)
            (share * result["loss"]).backward()
            add_to_report(report, share, {name: result[name] for name in TOKENIZER_REPORT})
            tokens.append(result["tokens"])
            residuals.append(result["residuals"])

        average_gradients(leaves)
        report["gradient"] = nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer_step(state["optimizers"], learning_rate(step, steps, lr))

        if not decoder_only:
            count_chosen(state["chosen"], tokens)
            if step == 1 or (step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * steps):
                # At step 1 this initialises the codebook from data.
                revive_codes(state, residuals, generator_of(seed, "revive", step))

        window.append(report)
        is_evaluation = step == steps or step % math.ceil(steps / evaluations) == 0
        is_logged = is_evaluation or step % LOG_EVERY == 0
        if is_logged:
            log_numbers(out, stage, step, clock, means(window))
            window.clear()
        if is_evaluation:
            fast = tokenizer.cast(codec | trained, dtype)
            found = evaluate_tokenizer(fast, held_out, scales) if rank() == 0 else None
            found = broadcast(found)
            log_numbers(out, stage, step, clock, {f"held_out_{x}": found[x] for x in found})
            draw_reconstructions(out, fast, held_out[:8], scales)
        if is_evaluation or (is_logged and time.monotonic() > save_at):
            save_at = save_checkpoint(out, stage, state)
        if is_stopped(stop, step, device):
            save_and_stop(out, stage, state, report)

    return codec | pytree.tree_map(torch.Tensor.detach, trained)


def count_chosen(chosen, tokens):
    """Adds to chosen (codes,) how often each code was chosen in a batch, in all processes.

    tokens: a list over micro-batches of tuples over scales of tokens (b, n_k).
    """
    tokens = torch.cat([x.flatten() for x in itertools.chain(*tokens)])
    counts = torch.zeros_like(chosen).index_add_(0, tokens, torch.ones_like(tokens))
    chosen.add_(add_over_processes(counts))


@torch.no_grad()
def revive_codes(state, residuals, generator):
    """Replaces codes that were never chosen by residuals, in place, and sets the counts to zero.

    residuals: a list over micro-batches of tuples over scales of residuals (b, n_k, code_dim).
    """
    codebook = state["tree"]["codebook"]
    by_scale = [gather(torch.cat(parts)) for parts in zip(*residuals)]
    codebook.copy_(tokenizer.revive_codes(codebook, state["chosen"], by_scale, generator))
    state["chosen"].zero_()


# ---- the transformer's loop


def train_transformer(
    params,
    codec,
    batches,
    held_out,
    *,
    steps,
    lr,
    decay=0.05,
    newton_schulz=5,
    evaluations=6,
    label_drop=0.1,
    dropout=0.0,
    loss_weights="token",
    halving_gain=math.inf,
    seed=0,
    later=0,
    classes=(),
    sampling=None,
    out=None,
    device="cpu",
    dtype=torch.float32,
    stop=None,
):
    """Returns the transformer, trained to predict tokens from those of coarser scales (HMAR).

    params: a tree of `hmar.init`. If it has a masked branch, that alone is trained, to predict
        hidden tokens from the others of their scale too (HMAR, stage two).
    codec: the tokenizer of the tokens; it stays as it is.
    batches: an iterator of (labels (B,) or vectors (B, C), tokens int64 (B, L)), or a function that
        returns the iterator of the steps after a number of steps, such as `token_batches`.
    held_out: (labels (n,), tokens (n, L)) to evaluate on.
    label_drop: the share of labels that become the null class. Vectors become classes[-1], which
        stays as it is. dropout: as in `hmar.features`; if it is not 0, each step seeds
        torch's own random generator.
    loss_weights: of `hmar.scale_weights`; the masked stage weighs all hidden tokens equally.
    classes, sampling, halving_gain: names (numbers without them), settings, and how far their
        guidance is weakened (`weaken_guidance`), for the grid of samples that is drawn into `out`.
    The other arguments are those of `train_tokenizer`.
    """
    is_masked = "masked" in params
    stage, scales = "masked" if is_masked else "next-scale", hmar.scale_sizes(params)
    codec = sample.to_device(codec, device)
    weights = hmar.scale_weights(scales, loss_weights).to(device)  # (L,)
    embeddings = params["classes"].to(device)
    # The masked stage trains its branch alone. The rest is cast once.
    params = pytree.tree_map(torch.Tensor.detach, params)
    trained = trainable(dict(masked=params["masked"]) if is_masked else params, device)
    frozen = sample.to_device(hmar.cast(params, dtype), device) if is_masked else {}
    leaves = pytree.tree_leaves(trained)
    state = new_state(trained, decay, newton_schulz, asked=[steps, lr, seed])
    pixels = math.prod(sample.image_size(params, codec))
    at_once = images_a_micro_batch(pixels, transformer_bytes(params, dtype), device)
    loss_of = compiled(transformer_loss, device)
    out = out and Path(out)
    clock = begin_stage(out, stage, state, steps, later)
    batches = iter(batches(state["step"]) if callable(batches) else batches)
    if is_masked:  # always the same masks
        masks = draw_masks(len(held_out[0]), scales, generator_of("held-out mask"), ratio=0.5)
        held_out = *held_out, masks
    window, save_at = [], time.monotonic() + SAVE_SECONDS

    while state["step"] < steps:
        step = state["step"] = state["step"] + 1
        labels, tokens = next(batches)  # (b,), (b, L), this process's share of the batch
        batch = world() * len(tokens)
        positions = own_share(torch.arange(batch))  # of these images in the whole batch
        generator = generator_of(seed, stage, step)
        is_dropped = torch.rand(batch, generator=generator)[positions] < label_drop
        labels = drop_labels(labels, *send([is_dropped], labels.device), embeddings)
        examples = labels, tokens
        if is_masked:
            examples = labels, tokens, draw_masks(batch, scales, generator)[positions]

        if dropout:
            torch.manual_seed(seed_of(seed, stage, step, "dropout", rank()))
        report = {}
        for part in micro_batches(at_once, *examples):
            fast = frozen | hmar.cast(trained, dtype)  # anew: backward frees the graph of a cast
            if is_masked:  # found on the CPU, where the mask is; a GPU would have to be waited for
                part = *part, hmar.hidden_positions(params, part[2])
            result = loss_of(fast, codec, weights, *send(part, device), dropout=dropout)
            share = len(part[0]) / len(tokens)
            (share * result["loss"]).backward()
            add_to_report(report, share, result)

        average_gradients(leaves)
        report["gradient"] = nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer_step(state["optimizers"], learning_rate(step, steps, lr))

        window.append(report)
        is_evaluation = step == steps or step % math.ceil(steps / evaluations) == 0
        is_logged = is_evaluation or step % LOG_EVERY == 0
        if is_logged:
            log_numbers(out, stage, step, clock, means(window))
            window.clear()
        if is_evaluation:
            fast = frozen | hmar.cast(trained, dtype)
            found = broadcast(evaluate_transformer(fast, codec, weights, held_out))
            log_numbers(out, stage, step, clock, found)
            gain = found.get("class_gain", 0.0)  # in the masked stage, guidance is weakened already
            weakened = weaken_guidance(sampling or {}, gain, halving_gain)
            draw_samples(out, stage, fast, codec, classes, weakened)
        if is_evaluation or (is_logged and time.monotonic() > save_at):
            save_at = save_checkpoint(out, stage, state)
        if is_stopped(stop, step, device):
            save_and_stop(out, stage, state, report)

    return params | pytree.tree_map(torch.Tensor.detach, trained)


def transformer_loss(
    params, codec, weights, labels, tokens, mask=None, hidden_at=None, *, dropout=0.0
):
    """{"loss": the mean loss in nats a token, ...} of labels (B,), tokens (B, L).

    weights (L,) are those of tokens; with a mask (B, L - len_0), the loss is that of hidden tokens.
    hidden_at: as for `hmar.losses`.
    """
    scales = hmar.scale_sizes(params)
    inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
    if mask is None:
        losses = hmar.losses(params, labels, tokens, inputs, dropout=dropout).mean(0)  # (L,)
        by_scale = [scale.mean() for scale in losses.split(tokenizer.lengths(scales))]
        return dict(loss=(losses * weights).sum(), scale_losses=torch.stack(by_scale))

    zeroed = None if hmar.hidden_tokens_leak(params) else mask
    own_inputs = tokenizer.masked_inputs(codec, tokens, scales, zeroed)
    shown = inputs, own_inputs, mask, hidden_at
    losses = hmar.losses(params, labels, tokens, *shown, dropout=dropout)  # (M,)
    # The divisor is a constant, the expected number of hidden tokens, so that the losses of
    # micro-batches add up to the loss of the batch.
    return dict(loss=losses.sum() / (0.5 * mask.numel()))


def drop_labels(labels, is_dropped, classes):
    """The labels, numbers (B,) or vectors (B, C), where is_dropped (B,) those of no class."""
    if labels.is_floating_point():
        return torch.where(is_dropped[:, None], classes[-1].to(labels), labels)
    return labels.masked_fill(is_dropped, len(classes) - 1)


def draw_masks(count, scales, generator, ratio=None):
    """(count, L - len_0) bool, True where a token is hidden.

    ratio: the share of hidden tokens. None: any share, a random one for each image (HMAR).
    """
    tokens = sum(tokenizer.lengths(scales)[1:])
    ratio = torch.rand(count, 1, generator=generator) if ratio is None else ratio
    return torch.rand(count, tokens, generator=generator) < ratio


def new_transformer(flags, plan):
    """The tree that the next-scale stage begins with: an untrained one, or that of init."""
    settings, classes = plan["settings"], plan["classes"]
    sizes = arguments(hmar.init, settings) | dict(classes=len(classes), seed=flags["seed"])
    if not flags["init"]:
        return hmar.init(**sizes, causal=plan["is_causal"])

    # All blocks of the next-scale branch become the trunk again, and a masked branch is left out.
    params = part_of(flags["init"], "transformer")
    branch = params["next_scale"]
    params = params | dict(trunk=params["trunk"] + branch["blocks"])
    params["next_scale"] = branch | dict(blocks=[])
    params.pop("masked", None)
    if hmar.scale_sizes(params) != settings["scales"]:
        params = hmar.resize_positions(params, settings["scales"])
    names = as_model(flags["init"]).get("classes") or classes
    if names != classes or len(params["classes"]) != len(classes) + 1:
        width = params["classes"].shape[1]
        params["classes"] = hmar.init(**sizes | dict(depth=1, width=width))["classes"]
        log(f"--init: has other classes, so the embeddings of these {len(classes)} are new")
    return params


# ---- evaluation and pictures


@torch.no_grad()
def evaluate_tokenizer(codec, images, scales):
    """{name: number or list} for held-out images (B, 3, H, W) in [-1, 1].

    error: the squared error. psnr: in dB, after each scale. perplexity: of the codes of each scale,
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
    return dict(error=errors[-1].mean().item(), psnr=psnr, perplexity=perplexity)


def evaluate_transformer(params, codec, weights, examples):
    """{"held_out_loss": float, "class_gain": float} of examples, in nats a token.

    examples: labels (n,) or vectors (n, C), tokens (n, L), perhaps a mask. weights: of tokens (L,).
    held_out_loss: the mean of `transformer_loss`. class_gain, without a mask: by how much the class
        lowers it.
    """
    loss = mean_loss(params, codec, weights, examples)
    if len(examples) == 3:
        return dict(held_out_loss=loss)
    labels, tokens = examples
    all_of_them = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    null = drop_labels(labels, all_of_them, params["classes"])
    without_class = mean_loss(params, codec, weights, (null, tokens))
    return dict(held_out_loss=loss, class_gain=without_class - loss)


@torch.no_grad()
def mean_loss(params, codec, weights, examples):
    """The mean of `transformer_loss` over the examples of `evaluate_transformer`."""
    total, pixels = 0.0, math.prod(sample.image_size(params, codec))
    for part in micro_batches(sample.images_at_once(pixels), *examples):
        result = transformer_loss(params, codec, weights, *sample.to_device(part, weights.device))
        total += len(part[0]) / len(examples[0]) * result["loss"].item()
    return total


@torch.no_grad()
def draw_reconstructions(out, codec, images, scales):
    """Writes samples/reconstructions.png: images (n, 3, H, W), then the same after each scale."""
    if out is None or rank() > 0:
        return
    features = tokenizer.encode_features(codec, images)
    f_hats = [f_hat for _, _, f_hat in tokenizer.quantise(codec, features, scales)]
    rows = [images, *(tokenizer.decode_features(codec, f_hat) for f_hat in f_hats)]
    names = ["original", *(f"after {h}x{w}" for h, w in scales)]
    save_picture(out / "samples/reconstructions.png", sample.sheet(rows, names))


def draw_samples(out, stage, params, codec, classes, sampling):
    """Writes samples/STAGE.png, a grid with eight samples of each of the first ten classes.

    In the masked stage each scale has a masked pass, whatever the model's own schedule is.
    """
    if out is None or rank() > 0:
        return
    classes = classes or [str(label) for label in range(len(params["classes"]) - 1)]
    if not classes:  # conditions are vectors
        return
    labels = torch.arange(min(10, len(classes))).repeat_interleave(8)
    model = dict(tokenizer=codec, transformer=params, classes=classes, sampling=sampling or {})
    passes = 1 if "masked" in params else 0
    schedule = sample.masked_schedule(hmar.scale_sizes(params), passes)
    images = sample.generate(model, labels, schedule=schedule)
    save_picture(out / f"samples/{stage}.png", sample.sheet(images.split(8), classes[:10]))


def save_picture(path, picture):
    """Writes a picture and prints its name."""
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    log(f"{path} is written")


# ---- what both loops use: state, optimizers, log, checkpoints


def trainable(tree, device):
    """A copy of the tree on a device, whose leaves are parameters."""
    return pytree.tree_map(lambda leaf: nn.Parameter(leaf.detach().to(device, copy=True)), tree)


def new_state(tree, decay, newton_schulz, asked=()):
    """All that a stage changes and a checkpoint saves: {name: number, tree or optimizers}.

    Whatever a loop adds to it is saved and restored too. asked: numbers that must be those of the
    checkpoint from which a stage goes on.
    """
    optimizers = new_optimizers(tree, decay, newton_schulz)
    return dict(step=0, asked=[*asked], tree=tree, optimizers=optimizers)


def begin_stage(out, stage, state, steps, later):
    """Restores the state from a checkpoint of the stage, if there is one; returns a clock.

    The clock is for `log_numbers`: {"begun" (seconds), "done", "steps", "later" (steps)}.
    """
    if out is not None and rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    load_checkpoint(out, stage, state)
    leaves = pytree.tree_leaves(state["tree"])
    millions = sum(leaf.numel() for leaf in leaves) / 1e6
    log(f"{stage}: {millions:.3g} M parameters, {steps} steps, {state['step']} done")
    return dict(begun=time.monotonic(), done=state["step"], steps=steps, later=later)


def new_optimizers(tree, decay, newton_schulz=5):
    """[Muon for matrices and convolutions (Jordan et al. 2024), AdamW for all other leaves].

    Muon multiplies in bf16 where the processor has it, whatever the dtype of the stage is.
    """
    matrices, others = [], []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        (matrices if is_matrix(path, leaf) else others).append(leaf)
    dtype = sample.find_dtype(None, pytree.tree_leaves(tree)[0].device)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [Muon(matrices, decay, newton_schulz, dtype), adamw]


MATRICES = {"qkv", "project", "expand", "contract"}  # keys of the matrices that Muon trains


def is_matrix(path, leaf):
    """Whether Muon trains a leaf: full convolutions and the MATRICES of blocks and neighbours.

    All else (embeddings, heads, modulation, depthwise convolutions, vectors) is AdamW's.
    """
    if leaf.ndim == 4:
        return leaf.shape[1] > 1
    return leaf.ndim == 2 and any(getattr(entry, "key", None) in MATRICES for entry in path)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, to the bit, but in any dtype and for convolutions (Jordan et al. 2024).

    torch's version always multiplies in bf16, which takes 20 times as long as fp32 on a processor
    without bf16. A convolution is a matrix with a row for each output channel. Matrices of one
    shape are updated together, in up to half of the time. Steps are scaled to the size of AdamW's:
    both use one rate (Liu et al. 2025).
    """

    def __init__(self, leaves, decay, newton_schulz, dtype):
        super().__init__(leaves, dict(lr=0.0))
        self.decay, self.newton_schulz, self.dtype = decay, newton_schulz, dtype
        self.stacks = {}  # leaves by the shape of their matrices
        for leaf in leaves:
            self.stacks.setdefault(leaf.flatten(1).shape, []).append(leaf)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for shape, leaves in self.stacks.items():
            state = self.state[leaves[0]]
            gradients = torch.stack([leaf.grad.flatten(1) for leaf in leaves])
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"].lerp_(gradients, 1 - 0.95)
            updates = gradients.lerp(momentum, 0.95).to(self.dtype)  # Nesterov's
            updates = shared_orthogonalize(updates, self.newton_schulz)
            scale = 0.2 * math.sqrt(max(shape))
            for leaf, update in zip(leaves, updates):
                leaf.mul_(1 - group["lr"] * self.decay)
                leaf.add_(update.view_as(leaf), alpha=-group["lr"] * scale)


def orthogonalize(matrices, iterations):
    """Matrices (n, rows, columns) with singular values near 1, by Newton-Schulz (Jordan 2024)."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):  # x <- 3.4445 x - 4.775 x x' x + 2.0315 x x' x x' x
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if is_tall else x


def shared_orthogonalize(matrices, iterations):
    """`orthogonalize`, of which each of several processes computes a part."""
    if world() == 1:
        return orthogonalize(matrices, iterations)
    share = math.ceil(len(matrices) / world())
    padded = F.pad(matrices, (0, 0, 0, 0, 0, share * world() - len(matrices)))
    part = orthogonalize(padded[rank() * share :][:share], iterations)
    return gather(part.contiguous())[: len(matrices)]


def optimizer_step(optimizers, rate):
    """A step of each optimizer at this learning rate; then the gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def learning_rate(step, steps, peak):
    """Warm-up, constant, then linear to zero (Hägele et al. 2024).

    Falling to zero does what an average of the weights (EMA) is for, so none is kept.
    """
    left = 1 - (step - 1) / steps
    return peak * min(1, step / (WARM_UP * steps), left / COOL_DOWN)


# What autograd keeps of an image, in numbers of the dtype: for each pixel and channel of the
# tokenizer's first level; for each token, channel and block of the transformer. Counted of the
# published sizes in bf16, with some more for dropout (`tests/benchmark.py count`).
TOKENIZER_NUMBERS, TRANSFORMER_NUMBERS = 100, 30


def tokenizer_bytes(codec, pixels, dtype):
    """Bytes that autograd keeps of an image with so many pixels."""
    channels = len(codec["encoder"]["conv_in"]["bias"])
    return TOKENIZER_NUMBERS * pixels * channels * dtype.itemsize


def transformer_bytes(params, dtype):
    """Bytes that autograd keeps of an image."""
    tokens, width = sum(tokenizer.lengths(hmar.scale_sizes(params))), params["classes"].shape[1]
    return TRANSFORMER_NUMBERS * tokens * width * hmar.block_count(params) * dtype.itemsize


def images_a_micro_batch(pixels, image_bytes, device, free=None):
    """Images in a micro-batch: on a CPU few, which fit its caches; on a GPU what its memory takes.

    A GPU waits for Python if there is too little to do. So what autograd keeps of a micro-batch may
    take half of its free memory. The rest is for gradients, for what the optimizers allocate in
    their first step, and for temporary tensors of operators.

    image_bytes: what autograd keeps of an image. free: free bytes of the device; None: as it says.
    """
    if torch.device(device).type != "cuda":
        return sample.images_at_once(pixels)
    if free is None:
        torch.cuda.empty_cache()  # what an earlier stage has used counts as free
        free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // 2 // image_bytes)


def compiled(function, device):
    """A loss, compiled for a GPU; on a CPU, the function itself.

    Most memory traffic of a step on a GPU is that of elementwise operators, which the compiler
    fuses. With TORCH_COMPILE_DISABLE=1 in the environment torch does not compile.
    """
    return torch.compile(function) if torch.device(device).type == "cuda" else function


def send(tensors, device):
    """[tensor, ...] on a device. A GPU copies from pinned memory, and nothing waits for it."""
    if torch.device(device).type == "cuda":
        tensors = [tensor.pin_memory() if tensor.is_cpu else tensor for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def micro_batches(images_at_once, *tensors):
    """Yields tuples of parts of the tensors (B, ...), of at most so many images each."""
    count = math.ceil(len(tensors[0]) / images_at_once)
    yield from zip(*(tensor.tensor_split(count) for tensor in tensors))


def add_to_report(report, share, result):
    """Adds the numbers of a micro-batch, which is this share of a batch, to those of the step."""
    for name, number in result.items():
        report[name] = report.get(name, 0) + share * number.detach()


def means(window):
    """{name: number or list}: reports of several steps, averaged over them and the processes."""
    found = {}
    for name in window[0]:
        mean = torch.stack([report[name] for report in window]).mean(0)
        found[name] = (add_over_processes(mean) / world()).tolist()
    return found


def log_numbers(out, stage, step, clock, numbers):
    """Prints numbers and the time left, of the stage and of the run; adds a line to metrics.jsonl.

    FloatingPointError if a number is not finite. After a kill some steps may have two lines; the
    later one counts.
    """
    check_finite(stage, step, numbers)
    if out is not None and rank() == 0:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dict(stage=stage, step=step) | numbers) + "\n")

    pace = (time.monotonic() - clock["begun"]) / max(1, step - clock["done"])  # seconds per step
    left = clock["steps"] - step
    stage_left = datetime.timedelta(seconds=round(pace * left))
    run_left = datetime.timedelta(seconds=round(pace * (left + clock["later"])))
    words = "  ".join(f"{name} {x:.4g}" for name, x in numbers.items() if isinstance(x, float))
    log(f"{stage} {step}/{clock['steps']}  {stage_left} left, of the run {run_left}  {words}")


def check_finite(stage, step, numbers):
    """FloatingPointError if one of the numbers, or of lists of them, is not finite."""
    if not all(np.isfinite(x).all() for x in numbers.values()):
        text = "the loss or gradient is not finite; a lower --lr may help"
        raise FloatingPointError(f"{stage}, step {step}: {text}")


def save_checkpoint(out, stage, state):
    """Replaces RUN/checkpoint.pt; returns the time at which the next one is due.

    Saving takes at most a thirtieth of the time.
    """
    begun = time.monotonic()
    if out is not None:
        saved = pytree.tree_map(saved_leaf, state)
        write_file(out / "checkpoint.pt", partial(torch.save, dict(stage=stage, state=saved)))
    now = time.monotonic()
    return now + max(SAVE_SECONDS, 30 * (now - begun))


def saved_leaf(leaf):
    """What a checkpoint holds of a leaf of the state: a number, a tensor or a state dict."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    return leaf.state_dict() if hasattr(leaf, "state_dict") else leaf


@torch.no_grad()
def restored_leaf(leaf, saved):
    """A leaf of the state, changed in place to what a checkpoint holds of it.

    A number, which cannot be changed in place, is replaced by the saved one.
    """
    if isinstance(leaf, torch.Tensor):
        return leaf.copy_(saved)
    if hasattr(leaf, "state_dict"):
        # Copied, because Windows cannot replace a file that is mapped into memory.
        leaf.load_state_dict(pytree.tree_map_only(torch.Tensor, torch.clone, saved))
        return leaf
    return saved


def load_checkpoint(out, stage, state):
    """Restores the state, in place, if RUN/checkpoint.pt is of this stage.

    ValueError if that was asked for other steps, another rate or seed.
    """
    path = None if out is None else out / "checkpoint.pt"
    if path is None or not path.exists():
        return
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if saved["stage"] == stage:
        if saved["state"]["asked"] != state["asked"]:
            raise ValueError(f"out: {path} is of a stage with other steps, lr or seed")
        state.update(pytree.tree_map(restored_leaf, state, saved["state"]))


def is_stopped(stop, step, device):
    """Whether Ctrl-C came. Several processes decide it together, in every tenth step."""
    if stop is None or world() == 1:
        return stop is not None and stop.is_set()
    if step % 10:
        return False
    return add_over_processes(torch.tensor(int(stop.is_set()), device=device)).item() > 0


def save_and_stop(out, stage, state, report):
    """Saves a checkpoint and raises KeyboardInterrupt; called after Ctrl-C, between two steps."""
    check_finite(stage, state["step"], dict(gradient=report["gradient"].item()))
    save_checkpoint(out, stage, state)
    wait_for_all()  # torchrun may end all processes when one ends
    text = "the same command goes on from there" if out else "nothing is saved without a folder"
    raise KeyboardInterrupt(f"stopped at step {state['step']} of {stage}; {text}")


@contextlib.contextmanager
def catch_interrupt():
    """Yields an event that Ctrl-C sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, partial(handle_interrupt, stop))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def handle_interrupt(stop, *_):
    """The handler of Ctrl-C."""
    if stop.is_set():
        raise KeyboardInterrupt("stopped")
    stop.set()
    print("stopping after this step; once more stops at once", file=sys.stderr)


# ---- the perceptual network


def learn_perceptual_layers(crops, steps, *, seed, device, dtype, workers=None):
    """Layers for `tokenizer.perceptual_error`: those of a small classifier of the training images.

    If there is a single class, it learns which of four quarter-turns an image was given (Gidaris et
    al. 2018). Trained in seconds, and again when a run goes on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.ModuleList()
        for inputs, width in itertools.pairwise(PERCEPTUAL_WIDTHS):
            convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            net.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        net.append(nn.Linear(PERCEPTUAL_WIDTHS[-1], crops.classes if crops.classes > 1 else 4))
    *layers, head = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)

    batch = min(32, max(4, 2**17 // crops.size**2))  # fewer images above 64 pixels
    log(f"tokenizer: first the perceptual network, {steps} steps of {batch} images")
    reading = dict(seed=seed, batch=batch, device=device, workers=workers)
    batches = crop_batches(crops, 0, stage="perceptual", **reading, is_shared=False)
    for step in range(1, steps + 1):
        images, labels = next(batches)
        pixels = to_unit(images)
        if crops.classes == 1:
            generator = generator_of(seed, "turns", step)
            labels = torch.randint(4, (batch,), generator=generator)
            turned = [image.rot90(turn, (1, 2)) for image, turn in zip(pixels, labels.tolist())]
            pixels, labels = torch.stack(turned), labels.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            *_, features = tokenizer.feature_maps(layers, pixels)
            scores = head(features.mean((2, 3)))
        F.cross_entropy(scores, labels).backward()
        optimizer_step([optimizer], learning_rate(step, steps, 3e-3))
    net.eval().requires_grad_(False).to(dtype)
    return [lambda x, layer=layer: layer(x.to(dtype)) for layer in layers]


# ---- data: crops of any dataset, in batches; tokens of crops


class Crops(torch.utils.data.Dataset):
    """Square crops of some images of a dataset: (row, number) -> (uint8 (3, size, size), label).

    A crop is a function of the seed, its image and its number. One number in central_every is the
    central crop. If flip, half of the central crops and half of the others are mirrored.
    """

    def __init__(self, dataset, indices, *, size, seed, flip=False, classes=1, central_every=1):
        self.dataset, self.indices, self.size, self.seed = dataset, indices, size, seed
        self.flip, self.classes, self.central_every = flip, classes, central_every
        self.is_broken = torch.zeros(len(indices), dtype=torch.bool).share_memory_()  # by workers

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        row, number = key
        image, label, index = self.read(row)
        is_central = number % self.central_every == 0
        pixels = crop(image, self.size, None if is_central else (self.seed, index, number))
        if self.flip and number // self.central_every % 2:
            pixels = ImageOps.mirror(pixels)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), label

    def read(self, row):
        """(RGB image, label, index) of a row; of the next one that can be read if it cannot.

        An image that cannot be read is printed once.
        """
        for other in itertools.chain(range(row, len(self)), range(row)):
            if self.is_broken[other]:
                continue
            index = self.indices[other]
            try:
                image, label = self.dataset[index]
            except OSError as error:
                self.is_broken[other] = True
                print(f"left out: {error}", file=sys.stderr)
                continue
            if not 0 <= label < self.classes:
                got = f"label {label} of image {index}"
                expected = f"0 to {self.classes - 1}; the list dataset.classes has the names"
                raise ValueError(f"dataset: got {got}, expected {expected}")
            return sample.convert_to_rgb(image), int(label), index
        raise OSError(f"dataset: none of the images {self.indices[:5]} can be read")


def crop(image, size, seed=None):
    """A square crop of a PIL image, resized to size x size.

    Its side is random between 1 / 1.125 and 1 times the shorter side of the image, and so is its
    place. seed None: the largest square, at the centre.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if seed is not None:
        zoom, x, y = np.random.default_rng(seed).random(3).tolist()
        side /= 1 + zoom / 8
        left, top = x * (width - side), y * (height - side)

    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.LANCZOS, box=box, reducing_gap=2.0)


def crop_batches(crops, done, *, stage, batch, seed, device, workers=None, is_shared=True):
    """Yields (images uint8 (b, 3, size, size), labels (b,)) of the steps after `done` steps.

    b is this process's share of the batch, or all of it if not is_shared.
    """
    is_gpu = torch.device(device).type == "cuda"
    workers = min(8, os.cpu_count()) * is_gpu if workers is None else workers
    loader = torch.utils.data.DataLoader(
        crops,
        batch_sampler=crop_keys(len(crops), done, stage, batch, seed, is_shared),
        num_workers=workers,
        pin_memory=is_gpu,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # otherwise a number is drawn from torch's own
    )
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def crop_keys(count, done, stage, batch, seed, is_shared=True):
    """Yields [(row, number of its crop), ...] of the steps after `done`: a row once an epoch."""
    for step in itertools.count(done + 1):
        generator = generator_of(seed, stage, step, "crops")
        numbers = torch.randint(2**31, (batch,), generator=generator)
        places = range((step - 1) * batch, step * batch)
        rows = [epoch_order(seed, place // count, count)[place % count] for place in places]
        keys = [*zip(rows, numbers.tolist())]
        yield own_share(torch.tensor(keys)).tolist() if is_shared else keys


@lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of the rows in an epoch, the same in every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).tolist()


def ignore_interrupt(_):
    """Lets a worker live on after Ctrl-C, until the main process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def central_crops(crops, count=EVALUATED):
    """The central crops of the first images: uint8 (n, 3, size, size), labels (n,)."""
    pairs = [crops[row, 0] for row in range(min(count, len(crops)))]
    return torch.utils.data.default_collate(pairs)


def token_batches(crops, codec, scales, done, **reading):
    """Yields (labels (b,), tokens (b, L)) of `crop_batches`; codec is on the same device.

    ENCODED_TOGETHER batches pass the encoder together, always the same ones: it takes less time,
    and by rounding a token may depend on what is encoded with it.
    """
    skipped = done % ENCODED_TOGETHER
    batches = crop_batches(crops, done - skipped, **reading)
    while True:
        images, labels = zip(*itertools.islice(batches, ENCODED_TOGETHER))
        tokens = encode_crops(codec, torch.cat(images), scales).split([len(x) for x in images])
        yield from [*zip(labels, tokens)][skipped:]
        skipped = 0


def encode_held_out(codec, crops, scales):
    """(labels (n,), tokens (n, L)) of the central crops of the first images."""
    images, labels = central_crops(crops)
    return labels, encode_crops(codec, images.to(codec["codebook"].device), scales)


def encode_crops(codec, images, scales):
    """Tokens (B, L) of images uint8 (B, 3, H, W), which are encoded a few at a time."""
    parts = images.split(sample.images_at_once(images[0, 0].numel()))
    return torch.cat([tokenizer.encode(codec, to_unit(part), scales) for part in parts])


def to_unit(images):
    """uint8 (B, 3, H, W) -> float in [-1, 1]. ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images: got {images.dtype}, expected uint8")
    return images.float() / 127.5 - 1


def generator_of(*key):
    """A generator whose seed is a hash of where it is used: (seed, stage, step, ...)."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key):
    """A hash of where random numbers are used, 0 to 2^56."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


# ---- here the method ends; two small datasets: a folder of images, drawings of shapes


class Cached:
    """A dataset that keeps images that were read, as long as their pixels fit in CACHE_BYTES."""

    def __init__(self, count):
        self.count, self.places, self.used, self.pixels = count, {}, 0, None

    def __getstate__(self):
        """What is sent to processes that read images: all but the cache."""
        return self.__dict__ | dict(places={}, used=0, pixels=None)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index in self.places:
            pixels, size, label = self.places[index]
            return Image.frombytes("RGB", size, pixels.tobytes()), label

        image, label = self.read(index)
        pixels = np.asarray(image).ravel()
        end = self.used + len(pixels)
        if end <= CACHE_BYTES:
            if self.pixels is None:
                # One block, which takes no memory before it is written. Thousands of small ones
                # would lie between the large tensors and keep the heap from being used again.
                self.pixels = np.empty(CACHE_BYTES, np.uint8)
            self.pixels[self.used : end] = pixels
            self.places[index] = self.pixels[self.used : end], image.size, label
            self.used = end
        return image, label


class Folder(Cached):
    """The images below a folder: a sub-folder for each class, or images alone, which are one class.

    Links are followed, and names that begin with a dot are passed over. Images of deeper folders
    belong to the class. size: large images may be reduced, but not below twice this size. `names`
    and `labels` list the images, `classes` the names of the classes. ValueError if there are no
    images, or images beside sub-folders of images.
    """

    def __init__(self, folder, size=None):
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise ValueError(f"--data: there is no folder {folder}")
        images = image_names(self.folder)
        if not images:
            raise ValueError(f"--data: no images found in {folder} ({', '.join(SUFFIXES)})")
        is_flat = len(images[0]) == 1
        for parts in images:
            if (len(parts) == 1) != is_flat:
                names = f"{'/'.join(images[0])} and {'/'.join(parts)}"
                raise ValueError(
                    f"--data: {folder} has images beside sub-folders of images: {names}"
                )

        self.classes = sorted({parts[0] for parts in images})
        if is_flat:
            self.classes = [self.folder.resolve().name]
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.names = ["/".join(parts) for parts in images]
        self.labels = [0 if is_flat else numbers[parts[0]] for parts in images]
        super().__init__(len(images))

    def read(self, index):
        path = self.folder / self.names[index]
        try:
            shortest = self.size and 2 * self.size
            return sample.read_image(path, shortest), self.labels[index]
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise OSError(f"{path}: {error}") from error

    def fingerprint(self):
        """A hash of the names and of the bytes of a few files; the folder itself may move."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        for name in self.names[:: math.ceil(len(self) / 8)]:
            with contextlib.suppress(OSError):  # an image that cannot be read is left out later
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()[:16]


def image_names(folder):
    """[(..., name), ...]: the parts of the names of all images below a folder, sorted.

    Folders of images inside a class, and sub-folders without any image, are printed. A loop of
    links ends where it reaches a folder that it came from.
    """
    parents, found, visited = {str(folder): {os.path.realpath(folder)}}, [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        parts = Path(root).relative_to(folder).parts
        visited.add(parts[:1])
        folders[:] = [name for name in folders if name[0] != "."]
        for name in list(folders):
            path = os.path.join(root, name)
            real = os.path.realpath(path)
            if real in parents[root]:
                folders.remove(name)
            parents[path] = parents[root] | {real}
        for name in names:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                found.append((*parts, name))

    found.sort()
    nested = sorted({"/".join(parts[:-1]) for parts in found if len(parts) > 2})
    empty = sorted({parts[0] for parts in visited if parts} - {parts[0] for parts in found})
    if nested:
        text = "their images belong to the class of the first folder"
        log(f"{folder}: {len(nested)} nested folders, such as {nested[0]}: {text}")
    if empty:
        log(f"{folder}: no images in {', '.join(empty[:5])}{', ...' if empty[5:] else ''}")
    return found


# ---- the built-in drawings


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


class Drawings(Cached):
    """The built-in data set as a dataset: `draw_shape` of 0 to 20,499."""

    def __init__(self, size=32):
        super().__init__(20_500)
        self.size, self.classes = size, [*SHAPES]

    def read(self, index):
        return draw_shape(index, self.size)

    def fingerprint(self):
        """What stands for a hash of the data, see `signature`."""
        return "drawings"


# ---- files and processes


def write_file(path, write):
    """Replaces a file by what write(file) writes, as a whole or not at all; first process only."""
    if rank() == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)


def log(line):
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
    """Connects the processes that torchrun started, if there are several; returns the device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    if world() > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=10)  # the longest wait is that for an evaluation
        torch.distributed.init_process_group(backend, timeout=timeout)
        wait_for_all()  # none may end, because of wrong flags, before all are connected
    return device


def own_share(batch):
    """This process's share of a tensor (B, ...) that all processes have."""
    return batch.tensor_split(world())[rank()]


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


def gather(tensor):
    """The tensors (n, ...) of all processes, one after another."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    torch.distributed.all_gather(parts, tensor)
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


# ---- the run folder


def begin_run(dataset, out, flags, changes):
    """The plan of a new run, or that of the run in the folder; it is stored there in args.json.

    flags: the arguments of `train` from size to dtype, by name. changes: its settings.
    The plan is a dict: asked (flags and changes), data (a signature), classes (names), is_causal,
    settings (those of `recipe`, with the changes).
    ValueError where the arguments do not fit each other, the folder, or the run in it.
    """
    out, data = out and Path(out), signature(dataset)
    models = {x: describe(flags[x]) for x in ("tokenizer", "init") if isinstance(flags[x], dict)}
    asked = json.loads(json.dumps(flags | models | changes, default=str))
    plan = read_plan(out)
    is_new = plan is None
    if is_new:
        plan = dict(asked=asked, data=data, **new_plan(dataset, flags, changes))
    else:
        check_same(out, plan, asked, data)
    batch = plan["settings"]["batch"]
    if batch % world():
        raise ValueError(f"--batch: got {batch}, expected a multiple of the {world()} processes")

    wait_for_all()  # all have read the folder before the first writes there
    if is_new and out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plan, indent=1)
        write_file(out / "args.json", lambda file: file.write(text.encode()))
    wait_for_all()
    return plan


def describe(model):
    """What stands in args.json for a model in memory."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(model):
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().float().numpy().tobytes())
    return f"a model in memory ({digest.hexdigest()[:16]})"


def class_names(dataset):
    """[str, ...]; a dataset without names has one class."""
    return [str(name) for name in getattr(dataset, "classes", ["images"])]


def signature(dataset):
    """What tells a dataset from others: {"images", "classes", "hash"}.

    The hash is the dataset's own `fingerprint()`, or else one of a few labels and images. An image
    that is not the same twice, because it is augmented at random, does not count.
    """
    count, names = len(dataset), class_names(dataset)
    if count < 2:
        raise ValueError(f"dataset: got {count} images, expected two or more")
    if hasattr(dataset, "fingerprint"):
        digest = dataset.fingerprint()
    else:
        digest = hashlib.sha256()
        for index in range(0, count, math.ceil(count / 16)):
            with contextlib.suppress(OSError):  # an image that cannot be read is left out later
                (image, label), (again, _) = dataset[index], dataset[index]
                digest.update(str(int(label)).encode())
                digest.update(image.tobytes() if image.tobytes() == again.tobytes() else b"")
        digest = digest.hexdigest()[:16]
    # A single class has the folder's name, which may change.
    return dict(images=count, classes=names if len(names) > 1 else [], hash=digest)


def read_plan(out):
    """The plan in a run folder. None if the folder is missing, empty, or has nothing but a plan.

    ValueError if the folder holds something else, of which nothing must be overwritten.
    """
    names = {path.name for path in out.iterdir()} if out and out.exists() else set()
    names -= {"args.json.tmp"}  # of a run that was killed at once
    if not names:
        return None
    try:
        plan = json.loads((out / "args.json").read_text())
        plan["settings"]["scales"] = tuple(map(tuple, plan["settings"]["scales"]))
        plan = dict(plan, asked=dict(plan["asked"]), data=dict(plan["data"]))
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--out: {out} is neither empty nor a run of train.py") from error
    return None if names == {"args.json"} else plan


def check_same(out, plan, asked, data):
    """ValueError if the run in the folder was begun with other settings or other data."""
    for kind, before, now in (("settings", plan["asked"], asked), ("data", plan["data"], data)):
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names:
            words = [f"{name} {before.get(name)} -> {now.get(name)}" for name in names]
            words = ["other files" if name == "hash" else word for name, word in zip(names, words)]
            text = f"{out} was begun with other {kind} ({', '.join(words)})"
            raise ValueError(f"--out: {text}; name another folder, or remove this one")


def new_plan(dataset, flags, changes):
    """{"classes", "is_causal", "settings"} of a new run. ValueError where the flags do not fit."""
    for name, least in dict(size=1, depth=1, seed=0).items():
        if flags[name] is not None and flags[name] < least:
            raise ValueError(f"--{name}: got {flags[name]}, expected {least} or more")

    size, classes, source = flags["size"], class_names(dataset), flags["tokenizer"] or flags["init"]
    depth, is_causal, cell = flags["depth"] or 2, bool(flags["is_causal"]), None
    fixed = {"depth"}  # settings that are decided elsewhere: by a flag, by a given model
    if source:
        codec = part_of(source, "tokenizer")
        cell = tokenizer.downsampling(codec)
        fixed |= inspect.signature(tokenizer.init).parameters.keys()
        fixed |= {"texture_weight", "jump_weight", "spectrum_weight", "perceptual"}
        fixed |= {"tokenizer_steps", "tokenizer_lr", "decoder_steps"}
    if flags["init"]:
        params = part_of(flags["init"], "transformer")
        sample.check_codes(params, codec)
        depth, is_causal = hmar.block_count(params), "causal" in params
        fixed |= inspect.signature(hmar.init).parameters.keys() - {"scales"}
        if flags["depth"] not in (None, depth):
            raise ValueError(f"--depth: got {flags['depth']}, but --init has {depth} blocks")
        if flags["is_causal"] not in (None, is_causal):
            asked, found = ("VAR", "HMAR") if flags["is_causal"] else ("HMAR", "VAR")
            raise ValueError(f"--causal: {asked} is asked for, but --init is {found}")
    if fixed & changes.keys():
        raise ValueError(f"--set: {', '.join(sorted(fixed & changes.keys()))} cannot be set here")

    options = depth, size, len(dataset), len(classes), flags["is_simple"]
    settings = replace_settings(recipe(*options, cell), changes)
    cell = cell or settings["fold"] * 2 ** (len(settings["multipliers"]) - 1)
    if size % cell or size < 2 * cell:
        raise ValueError(f"--size: got {size}, expected a multiple of {cell}, {2 * cell} or more")
    settings = replace_settings(recipe(*options, cell), changes)  # with the scales for this cell
    check_settings(settings, size // cell)
    if source:
        settings |= dict(zip(("codes", "code_dim"), codec["codebook"].shape))
    return dict(classes=classes, is_causal=is_causal, settings=settings)


def check_settings(settings, side):
    """ValueError for settings that a later stage would fail on; side: of the latent map."""
    scales, blocks = settings["scales"], settings["masked_blocks"]
    tokenizer.check_scales(scales)
    if len(scales) < 2 or scales[-1] != (side, side):
        raise ValueError(f"scales: got {scales}, expected two or more, the last {side} x {side}")
    if settings["loss_weights"] not in hmar.WEIGHTS:
        got = f"loss_weights: got {settings['loss_weights']}"
        raise ValueError(f"{got}, expected one of {', '.join(hmar.WEIGHTS)}")
    if not 1 <= blocks <= settings["depth"]:
        raise ValueError(f"masked_blocks: got {blocks}, expected 1 to {settings['depth']}")
    sample.masked_schedule(**arguments(sample.masked_schedule, settings))
    sample.check_numbers(**arguments(sample.steps, settings))


def part_of(source, name):
    """The tokenizer or the transformer of a model, or of a file of weights. ValueError if none."""
    model = as_model(source)
    if name not in model:
        raise ValueError(f"{'the model' if model is source else source}: has no {name}")
    return model[name]


def as_model(source):
    """The model itself, or that of a file."""
    return source if isinstance(source, dict) else sample.load_model(source)


def print_plan(flags, plan, out, device, dtype, training, held_out):
    """Prints what is trained on what."""
    settings = plan["settings"]
    kind = "VAR" if plan["is_causal"] else "HMAR"
    log(
        f"{out or 'no run folder'}: {kind} of depth {settings['depth']}, {training} images to "
        f"train on, {held_out} held out, {len(plan['classes'])} classes; {device}, "
        f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, "
        f"{world()} processes"
    )
    log(f"scales {' '.join(f'{h}x{w}' for h, w in settings['scales'])}")
    for name in ("tokenizer", "init"):
        if flags[name]:
            where = "a model in memory" if isinstance(flags[name], dict) else flags[name]
            log(f"--{name}: {where}")


def later_steps(plan, stage):
    """The work of the stages after this one, in steps of this one."""
    names = list(STEP_COSTS)
    names = names[names.index(stage) + 1 :]
    if plan["is_causal"]:
        names = [name for name in names if name != "masked"]
    work = sum(plan["settings"][f"{name}_steps"] * STEP_COSTS[name] for name in names)
    return work / STEP_COSTS[stage]


def save_model(out, model):
    """Writes RUN/model.pt and returns the model on the CPU.

    It is read again, so that a stage begins with the same objects whether or not the run was
    stopped before it: then the files are equal to the byte.
    """
    model = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), model)
    if out is None:
        return model
    wait_for_all()
    write_file(out / "model.pt", partial(torch.save, model))
    wait_for_all()
    model = sample.load_model(out)
    wait_for_all()
    return model


# ---- the command


def parser():
    """The flags of `python train.py`."""
    top = argparse.ArgumentParser(
        description="Train HMAR from scratch, on your images or drawings."
    )
    add = top.add_argument
    text = "folder of images, one sub-folder for each class, or images directly in it (default: a "
    add("--data", help=text + "built-in data set, drawings of ten shapes)")
    add("--size", type=int, help="side of the images in pixels (default: 64; drawings: 32)")
    text = "transformer blocks; other settings follow from it, the size and the number of images "
    add("--depth", type=int, help=text + "(default: 2)")
    add("--out", help="run folder (default: runs/ and the name of the data folder)")
    add("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    text = "training steps, one number for all stages (default: by the recipe)"
    add("--steps", type=int, help=text)
    add("--batch", type=int, help="images in a step, over all processes (default: by the recipe)")
    text = "peak of the learning rate, of which the masked stage takes a quarter (default: by the "
    add("--lr", type=float, help=text + "recipe)")
    text = "replaces other settings of the recipe, such as masked_steps=100 neighbours=False"
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=text)
    add("--flip", action="store_true", help="mirror every second crop")
    text = "train VAR instead, for comparison: attend to coarser scales, no masked stage"
    add("--causal", action="store_true", default=None, help=text)
    text = "use the tokenizer in this model.pt or published file, and train none"
    add("--tokenizer", help=text)
    text = (
        "continue from this model.pt: keep its tokenizer and depth, train its transformer further"
    )
    add("--init", help=text)
    text = "processes that read images (default: none on a CPU, up to 8 on a GPU)"
    add("--workers", type=int, help=text)
    sample.add_device_flags(top)
    return top


def parse_settings(texts):
    """{name: value} of NAME=VALUE; a value is a Python literal, otherwise a string."""
    changes = {}
    for text in texts:
        name, is_assigned, value = text.partition("=")
        if not is_assigned:
            raise ValueError(f"--set: got {text}, expected NAME=VALUE")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or folders."""
    args = parser().parse_args(argv)
    sample.keep_freed_memory()
    with sample.exit_with_a_line("train.py"):
        size = (64 if args.data else 32) if args.size is None else args.size
        dataset = Folder(args.data, size) if args.data else Drawings(size)
        is_simple = isinstance(dataset, Drawings)
        out = Path(args.out or f"runs/{Path(args.data or 'shapes').resolve().name}")
        device = start_processes(sample.find_device(args.device))
        flags = dict(size=size, depth=args.depth, seed=args.seed, flip=args.flip)
        flags |= dict(is_causal=args.causal, is_simple=is_simple, dtype=args.dtype)
        flags |= dict(tokenizer=args.tokenizer, init=args.init)
        changes = {name: getattr(args, name) for name in ("steps", "batch", "lr")}
        changes = {name: value for name, value in changes.items() if value is not None}
        plan = begin_run(dataset, out, flags, changes | parse_settings(args.set))

    try:
        run_stages(dataset, flags, plan, out, device, args.workers)
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error}")
    log(f"finished; next: python sample.py {out}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
