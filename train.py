"""Training: a dataset of images and labels -> a model; and `python train.py`.

    dataset[i] -> (PIL image, label)
    crops, uint8 (B, 3, size, size) -> train_tokenizer -> codec; again, for the decoder alone
    crops -> tokens (B, L) -> train_transformer: next-scale stage, then masked stage -> params

A stage is one loop. The seed and the number of a step decide its batch and its random numbers. So a
run that was killed goes on from its last checkpoint to the same weights, bit for bit if it is one
process on a CPU with the same number of threads. Crops are made on the fly.

`train` runs all stages on a dataset. Each stage can be called alone, too, on trees of tensors, an
iterator of batches and settings. The tokenizer is trained without an adversarial loss.
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
import operator
import os
import signal
import sys
import threading
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # the number of processes that torchrun started
RANK = int(os.environ.get("RANK", "0")) if WORLD > 1 else 0  # the number of this one


def train(dataset, out=None, *, device=None, workers=None, **asked):
    """Trains a tokenizer and a transformer on a dataset; returns a model as `sample.load_model`.

    dataset: a map-style dataset as torch defines it. dataset[i] is (PIL image, int label) for i
        from 0 to len(dataset) - 1, and dataset.classes has the names of the classes; without it
        there is one class. If dataset[i] raises OSError, another image takes its place. A run
        resumes bit for bit if dataset[i] depends on i alone.
    out: the run folder, in which a run that was stopped goes on. None: nothing is written.
    device: a name, see `sample.find_device`.
    workers: processes that read images. None: none on a CPU, up to eight on a GPU.

    All other arguments are settings. The defaults of the others depend on these:

    size: side in pixels of the square crops that are learned, 64 by default.
    depth: transformer blocks, 2 by default or those of init.
    is_simple: says that the images are simple drawings, which need fewer steps and scales, and no
        random crops.
    tokenizer: a model's file, whose tokenizer is used; none is trained then.
    init: a model's file, whose transformer is trained further; its tokenizer is used unless
        `tokenizer` is given.

    Any other name replaces an entry of `recipe`, such as seed, flip, is_causal (which trains VAR),
    dtype or lr; steps sets those of all stages.

    Raises ValueError if the arguments do not fit each other or the run in `out`, KeyboardInterrupt
    after Ctrl-C and a checkpoint, FloatingPointError if a loss is not finite.
    """
    device = start_processes(device)
    settings, model = begin_run(dataset, out, asked)
    scales, classes = settings["scales"], settings["classes"]
    dtype = sample.find_dtype(settings["dtype"], device)
    training, held_out = (Crops(dataset, part, settings) for part in hold_out(dataset))
    kind = "VAR" if settings["is_causal"] else "HMAR"
    log(f"{out or 'no run folder'}: {kind} of depth {settings['depth']}; {device}, {dtype}")
    log(f"{len(training)} images of {len(classes)} classes to train on, {len(held_out)} held out")
    reading, place = (settings, device, workers), (settings, out, device)

    images, labels = central_crops(held_out)

    # The model tells which stages have ended: it has a draft (the tokenizer before its decoder's
    # stage), then in its place a tokenizer, then a transformer, then its masked branch.
    if "tokenizer" not in model:
        pixels, _ = central_crops(training)
        terms = dict(hue_variance=tokenizer.measure_hue_variance(to_unit(pixels)))
        if settings["perceptual"]:
            terms["perceptual_layers"] = learn_perceptual_layers(training, settings, device)

        if "draft" not in model:
            model["draft"] = train_tokenizer(
                tokenizer.init(**arguments(tokenizer.init, settings)),
                partial(crop_batches, training, "tokenizer", *reading),
                images,
                terms | {name: settings[name] for name in ("texture_weight", "jump_weight")},
                *place,
            )
            model = save_model(out, model)

        model["tokenizer"] = train_tokenizer(
            model.pop("draft"),
            partial(crop_batches, training, "decoder", *reading),
            images,
            # The spectrum term replaces the others.
            terms | dict(texture_weight=0.0, spectrum_weight=settings["spectrum_weight"]),
            *place,
            decoder_only=True,
        )
        model = save_model(out, model)

    codec = sample.to_device(tokenizer.cast(model["tokenizer"], dtype), device)
    examples = labels, encode_crops(codec, images.to(device), scales)

    if "transformer" not in model:
        params = model["transformer"] = train_transformer(
            new_transformer(settings, model.pop("init", None)),
            codec,
            partial(token_batches, training, "next-scale", codec, *reading),
            examples,
            *place,
        )
        fast = sample.to_device(hmar.cast(params, dtype), device)
        weights = hmar.scale_weights(scales, settings["loss_weights"]).to(device)
        gain = evaluate_transformer(fast, codec, weights, examples)["class_gain"]
        model["sampling"] = weaken_guidance(settings, gain)
        model = save_model(out, model)

    if "masked" not in model["transformer"] and not settings["is_causal"]:
        seed, blocks = settings["seed"], settings["masked_blocks"]
        model["transformer"] = train_transformer(
            hmar.add_masked_branch(model["transformer"], blocks, seed=seed),
            codec,
            partial(token_batches, training, "masked", codec, *reading),
            examples,
            settings | model["sampling"],
            out,
            device,
        )
        if settings["masked_passes"]:
            schedule = sample.masked_schedule(**arguments(sample.masked_schedule, settings))
            model["sampling"] = model["sampling"] | dict(schedule=schedule)
        model = save_model(out, model)

    if out and RANK == 0:
        for path in (Path(out, "checkpoint.pt"), *Path(out).glob("*.tmp")):
            path.unlink(missing_ok=True)
    return model


# ---- the tokenizer's loop

REVIVE_EVERY = 20  # steps from one replacement of codes that were never chosen to the next
REVIVE_UNTIL = 0.8  # share of the steps; later codes get time to settle
COARSE_EVERY = 4  # every fourth image of a batch is decoded from coarse scales too


def train_tokenizer(
    codec, batches, held_out, terms, settings, out=None, device="cpu", *, decoder_only=False
):
    """Returns the codec, trained so that its first scales, however many, decode to an image too.

    codec: a tree of `tokenizer.init`. At the first step, codes that the batch does not choose are
        replaced by vectors of the batch.
    batches: an iterator of (images uint8 (B, 3, H, W), anything), or a function that returns the
        iterator of the steps after a number of steps, such as `crop_batches`. Each of several
        processes gets its own share of a batch.
    held_out: images uint8 (n, 3, H, W) to evaluate on, for the log alone.
    terms: weights and other keyword arguments of `tokenizer.training_loss`.
    decoder_only: trains nothing but the decoder and post_quant_conv, so that images keep their
        tokens; the stage is called "decoder" then.
    settings, out, device: as for `Stage`.
    """
    scales = settings["scales"]
    name, parts = "tokenizer", codec.keys()
    if decoder_only:
        name, parts = "decoder", ("post_quant_conv", "decoder")
    stage = Stage(name, {part: codec[part] for part in parts}, settings, out, device)
    codec = pytree.tree_map(torch.Tensor.detach, sample.to_device(codec, device))
    chosen = torch.zeros(len(codec["codebook"]), dtype=torch.int64, device=device)
    chosen = stage.keep("chosen", chosen)  # how often each code was chosen since the last revival
    loss_of = torch.compile(tokenizer.training_loss, disable=stage.device.type != "cuda")
    held_out = to_unit(held_out.to(device))

    for step, (images, _) in stage.each(batches):
        batch = WORLD * len(images)  # images are this process's share of the batch
        generator = generator_of(stage.seed, name, step)
        last_scales = torch.randint(len(scales) - 1, (batch,), generator=generator)
        last_scales[torch.arange(batch) % COARSE_EVERY > 0] = -1  # these are decoded whole only

        tokens, residuals = [], []
        for share, pixels, last in stage.micro_batches(images, own_share(last_scales)):
            coarse = (last >= 0).nonzero()[:, 0]  # the images that coarse scales show, too
            result = loss_of(
                tokenizer.cast(codec | stage.tree, stage.dtype),
                to_unit(pixels.to(device)),
                scales,
                coarse.to(device, non_blocking=True),
                last[coarse].to(device, non_blocking=True),
                is_transposed=step % 2 == 0,  # against stripes, see `tokenizer.training_loss`
                images_per_coarse=batch / math.ceil(batch / COARSE_EVERY),
                **terms,
            )
            reported = "loss", "error", "coarse", "quantisation"
            stage.backward(share, {name: result[name] for name in reported})
            tokens += [x.flatten() for x in result["tokens"]]
            residuals.append(result["residuals"])
        stage.update()

        if not decoder_only:
            tokens = torch.cat(tokens)
            chosen += total(torch.zeros_like(chosen).index_add_(0, tokens, torch.ones_like(tokens)))
            if step == 1 or (step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * stage.steps):
                # At step 1 this initialises the codebook from data.
                vectors = [gather(torch.cat(scale).detach()) for scale in zip(*residuals)]
                codebook = stage.tree["codebook"].detach()  # which shares its memory
                generator = generator_of(stage.seed, "revive", step)
                codebook.copy_(tokenizer.revive_codes(codebook, chosen, vectors, generator))
                chosen.zero_()

        if stage.is_evaluation:
            fast = tokenizer.cast(codec | stage.tree, stage.dtype)
            numbers, rows = evaluate_tokenizer(fast, held_out, scales)
            stage.log(numbers)
            names = ["original", *(f"after {h}x{w}" for h, w in scales)]
            stage.draw("reconstructions", rows, names)

    return codec | pytree.tree_map(torch.Tensor.detach, stage.tree)


# ---- the transformer's loop


def train_transformer(params, codec, batches, held_out, settings, out=None, device="cpu"):
    """Returns the transformer, trained to predict tokens from those of coarser scales (HMAR).

    params: a tree of `hmar.init`. If it has a masked branch, that alone is trained, to predict
        hidden tokens from the others of their scale too (HMAR, stage two).
    codec: the tokenizer of the tokens; it stays as it is.
    batches: as for `train_tokenizer`, of (labels (B,) or vectors (B, C), tokens int64 (B, L)).
        With probability label_drop a label becomes the null class, a vector classes[-1].
    held_out: (labels (n,), tokens (n, L)) to evaluate on.
    settings, out, device: as for `Stage`. If dropout is not 0, each step seeds torch's own random
        generator. The samples that are drawn into `out` are guided as `weaken_guidance` says.
    """
    is_masked, scales = "masked" in params, hmar.scale_sizes(params)
    name = "masked" if is_masked else "next-scale"
    params = pytree.tree_map(torch.Tensor.detach, params)
    stage = Stage(
        name, dict(masked=params["masked"]) if is_masked else params, settings, out, device
    )
    frozen = sample.to_device(hmar.cast(params, stage.dtype), device)  # what is not trained
    codec, embeddings = sample.to_device((codec, params["classes"]), device)
    weights = hmar.scale_weights(scales, settings["loss_weights"]).to(device)  # (L,)
    loss_of = torch.compile(transformer_loss, disable=stage.device.type != "cuda")
    if is_masked:  # always the same masks
        masks = draw_masks(len(held_out[0]), scales, generator_of("held-out mask"), ratio=0.5)
        held_out = *held_out, masks

    for step, (labels, tokens) in stage.each(batches):
        batch = WORLD * len(tokens)  # tokens are this process's share of the batch
        generator = generator_of(stage.seed, name, step)
        is_dropped = own_share(torch.rand(batch, generator=generator) < settings["label_drop"])
        is_dropped = is_dropped.to(labels.device, non_blocking=True)
        examples = [drop_labels(labels, is_dropped, embeddings), tokens]
        if is_masked:
            examples.append(own_share(draw_masks(batch, scales, generator)))

        if settings["dropout"]:
            generator = generator_of(stage.seed, name, step, "dropout", RANK)
            torch.manual_seed(generator.initial_seed())
        for share, *part in stage.micro_batches(*examples):
            fast = frozen | hmar.cast(stage.tree, stage.dtype)  # anew: backward frees its graph
            part = [x.to(device, non_blocking=True) for x in part]
            result = loss_of(fast, codec, weights, *part, dropout=settings["dropout"])
            stage.backward(share, result)
        stage.update()

        if stage.is_evaluation:
            fast = frozen | hmar.cast(stage.tree, stage.dtype)
            found = evaluate_transformer(fast, codec, weights, held_out)
            stage.log(found)
            gain = found.get("class_gain", 0.0)  # in the masked stage, guidance is weakened already
            draw_samples(stage, fast, codec, weaken_guidance(settings, gain))

    return params | pytree.tree_map(torch.Tensor.detach, stage.tree)


def transformer_loss(params, codec, weights, labels, tokens, mask=None, *, dropout=0.0):
    """{"loss": the mean loss in nats a token, ...} of labels (B,), tokens (B, L).

    weights (L,) are those of tokens; with a mask (B, L - len_0), the loss is that of hidden tokens.
    """
    scales = hmar.scale_sizes(params)
    inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
    if mask is None:
        losses = hmar.losses(params, labels, tokens, inputs, dropout=dropout).mean(0)  # (L,)
        by_scale = [scale.mean() for scale in losses.split(tokenizer.lengths(scales))]
        return dict(loss=(losses * weights).sum(), scale_losses=torch.stack(by_scale))

    zeroed = None if "leak" in params["masked"] else mask
    own_inputs = tokenizer.masked_inputs(codec, tokens, scales, zeroed)
    losses = hmar.losses(params, labels, tokens, inputs, own_inputs, mask, dropout=dropout)  # (M,)
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


def new_transformer(settings, init=None):
    """The tree that the next-scale stage begins with: untrained, or that of the model init."""
    classes = settings["classes"]
    sizes = arguments(hmar.init, settings) | dict(classes=len(classes))
    if init is None:
        return hmar.init(**sizes, causal=settings["is_causal"])

    # All blocks of the next-scale branch become the trunk again, and a masked branch is left out.
    branch = init["transformer"]["next_scale"]
    trunk = init["transformer"]["trunk"] + branch["blocks"]
    params = init["transformer"] | dict(trunk=trunk, next_scale=branch | dict(blocks=[]))
    params.pop("masked", None)
    if hmar.scale_sizes(params) != settings["scales"]:
        params = hmar.resize_positions(params, settings["scales"])
    if init.get("classes", classes) != classes or len(params["classes"]) != len(classes) + 1:
        width = params["classes"].shape[1]
        params["classes"] = hmar.init(**sizes | dict(depth=1, width=width))["classes"]
        log(f"--init: has other classes, so the embeddings of these {len(classes)} are new")
    return params


# ---- the settings of a run


def resolve(dataset, asked, model):
    """All settings of a run, {name: value}: those of `recipe`, some of them replaced.

    asked: the settings that are arguments of `train`; steps stands for those of all stages. Who
    sets one of the strengths of guidance gets both as they stand: none is weakened. model: the
    parts that are given, see `begin_run`.

    ValueError for an unknown name, a value of another type or outside its range, and where settings
    do not fit each other, the data or the given parts.
    """
    above_zero = "size", "depth", "steps", "lr", "batch", "evaluations", "every", "gain", "top_p"
    for name, value in asked.items():
        least = 1e-9 if name.endswith(above_zero) else 0
        most = dict(label_drop=0.999, dropout=0.999, top_p=1.0).get(name, math.inf)
        if isinstance(value, int | float) and not least <= value <= most:
            raise ValueError(f"{name}: got {value}, expected {least:g} to {most:g}")

    # A given model decides some of the settings.
    given, cell = {}, None
    if asked["tokenizer"] or asked["init"]:
        cell = tokenizer.downsampling(model["tokenizer"])
        given |= zip(("codes", "code_dim"), model["tokenizer"]["codebook"].shape)
    if asked["init"]:
        params = model.get("init", model)["transformer"]
        sample.check_codes(params, model["tokenizer"])
        given |= dict(depth=hmar.block_count(params), is_causal="causal" in params)
        own_scales = hmar.scale_sizes(params)
        own_size = cell * own_scales[-1][0]
        asked = dict(size=own_size) | asked
        asked = (dict(scales=own_scales) if asked["size"] == own_size else {}) | asked
    for name in asked.keys() & given.keys():
        if asked[name] != given[name]:
            raise ValueError(f"{name}: got {asked[name]}, but the given model has {given[name]}")

    classes = [str(name) for name in getattr(dataset, "classes", ["images"])]
    asked = dict(size=64, depth=2, is_simple=False) | asked | given
    size, depth, is_simple = asked["size"], asked["depth"], asked["is_simple"]
    images = len(hold_out(dataset)[0])
    settings = recipe(depth, size, images, len(classes), is_simple, cell)
    settings |= dict(classes=classes, is_simple=is_simple)
    settings |= {name: asked.pop(name) for name in ("tokenizer", "init")}

    if asked.keys() & {"guidance", "mask_guidance"}:
        asked = dict(halving_gain=math.inf) | asked
    if "steps" in asked:
        steps = asked.pop("steps")
        asked = {name: steps for name in settings if name.endswith("_steps")} | asked
    for name, value in asked.items():
        if name not in settings:
            raise ValueError(f"{name}: no such setting, expected one of {', '.join(settings)}")
        default = settings[name]
        kinds = (float, int) if type(default) is float else (type(default),)
        if default is not None and type(value) not in kinds:
            raise ValueError(f"{name}: got {value!r}, expected a value like {default!r}")
    settings |= asked

    # What a later stage would fail on.
    cell = cell or settings["fold"] * 2 ** (len(settings["multipliers"]) - 1)
    scales, side, blocks = settings["scales"], size // cell, settings["masked_blocks"]
    if size % cell or size < 2 * cell:
        raise ValueError(f"--size: got {size}, expected a multiple of {cell}, {2 * cell} or more")
    tokenizer.check_scales(scales)
    if len(scales) < 2 or scales[-1] != (side, side):
        raise ValueError(f"scales: got {scales}, expected two or more, the last {side} x {side}")
    if not 1 <= blocks <= settings["depth"]:
        raise ValueError(f"masked_blocks: got {blocks}, expected 1 to {settings['depth']}")
    hmar.scale_weights(scales, settings["loss_weights"])
    return settings


def recipe(depth, size, images, classes, is_simple=False, cell=None):
    """The settings of a run that trains on so many images of size x size pixels, {name: value}.

    Each is an argument of a function with that name, or is read by a stage. They were chosen at
    depths 2 and 3 and are extrapolated: from depth 8 on, with the published layers, nothing was
    tried; depth 16 has the published codes and channels (tests/RESULTS.md, section 8).

    is_simple: the images are simple drawings. cell: the side in pixels of a latent position, if a
    tokenizer is given.
    """
    relative_depth = depth / 2  # most numbers below were chosen at depth 2
    is_large = depth >= 8
    has_detail = size >= 48 and not is_large  # images whose detail a small model can learn

    # The tokenizer. With fold, squares of 2 x 2 pixels become channels. Every level but the last
    # halves the sides, and the fold halves them once.
    fold = 2 if not is_large and (size >= 48 or depth <= 2) else 1
    new_cell = min(16, max(4, 2 ** math.ceil(math.log2(size / 16))))  # a 16th of the side, 4 to 16
    halvings = round(math.log2(new_cell // fold))
    growth = 2 if depth <= 2 else math.sqrt(2)  # of the sides of scales

    # Images seen grow like the parameters, with depth^3 (Hoffmann et al. 2022), and the batch like
    # the root of the images seen (McCandlish et al. 2018). Larger images have more tokens, so fewer
    # are needed. The tokenizer sees no image more than 80 times, which are .4 of 200.
    seen = min(50_000 * relative_depth**3 * math.sqrt(32 / size), 200 * images)
    batch = 8 * round(2 * relative_depth**1.5)
    if has_detail:  # fewer images in smaller batches were as good
        seen *= 0.69
        batch //= 2
    shares = dict(tokenizer=0.4 if fold > 1 else 0.35, decoder=0.08, next_scale=1, masked=1 / 11)
    steps = {f"{name}_steps": math.ceil(share * seen / batch) for name, share in shares.items()}
    if is_simple:
        steps = {name: math.ceil(0.68 * number) for name, number in steps.items()}

    # The transformer has at most 35 epochs, because with more its samples become copies of images
    # (tests/RESULTS.md, section 3).
    most = math.ceil(35 * images / batch)
    steps["next_scale_steps"] = min(steps["next_scale_steps"], most)
    epochs = steps["next_scale_steps"] * batch / images

    settings = dict(size=size, flip=False, is_causal=False, seed=0, dtype=None, depth=depth)
    settings |= dict(  # of tokenizer.init; depth 16 has the published codes and channels
        codes=min(4096, 2 ** round(8 + 4 / 3 * math.log2(relative_depth))),
        channels=fold * max(32, 32 * round(10 * depth / 32)),
        multipliers=(1,) * (halvings + 1) if fold > 1 else (1, 1, 2, 2, 4)[: halvings + 1],
    )
    settings |= dict(code_dim=16, residual_blocks=1, attention=False, fold=fold)
    settings |= dict(scales=default_scales(size, cell or new_cell, growth, not is_simple))
    settings |= dict(width=None, gamma=0.1, convolutions=True, neighbours=True)  # of hmar.init
    settings |= dict(masked_blocks=(depth + 1) // 2, loss_weights="root", label_drop=0.1)

    # Deep models want a lower rate (HyperP, arXiv 2603.28743); rate * decay * steps stays constant
    # (Wang and Aitchison 2024). Dropout helps runs that see each image often and harms others.
    settings |= steps | dict(batch=batch, micro_batch=None, newton_schulz=5)
    settings |= dict(lr=4e-3 * relative_depth**-0.7, decay=0.05 * relative_depth**-0.8)
    settings |= dict(dropout=0.1 if epochs > 8 else 0.0, evaluations=3 * max(1, depth - 1))
    settings |= dict(central_every=min(16, max(2, 20_000 // images)))  # see `Crops`

    # The perceptual term is not worth its time at 32 pixels. Beside it the decoder would write flat
    # squares of 2 x 2 pixels; these weights of texture and jumps prevent them. In the decoder's
    # stage the spectrum term replaces both; in drawings a larger weight roughens what is flat.
    settings |= dict(perceptual=has_detail, spectrum_weight=0.25 if is_simple else 2.0)
    settings |= dict(texture_weight=0.25 if has_detail else 0.5)
    settings |= dict(jump_weight=0.72 if has_detail else 0.0)

    # The sampler. A single class has nothing to be guided by: its predictions differ from those
    # without a class only by noise. Scales of more than refined_tokens have no masked pass.
    row = next(row for row in SAMPLING if depth <= row[0] and size <= row[1])
    settings |= zip(("guidance", "mask_guidance", "rise"), SAMPLING[row])
    settings |= {} if classes > 1 else dict(guidance=0.0, mask_guidance=0.0)
    settings |= dict(temperature=0.75, cooling=1.5, top_k=0, top_p=1.0, halving_gain=0.1)
    settings |= dict(masked_passes=0, refined_tokens=25)
    if is_simple:
        settings |= dict(newton_schulz=3, loss_weights="token", central_every=1)
    if is_large:
        settings |= dict(code_dim=32, residual_blocks=2, attention=True)
        settings |= dict(gamma=None, convolutions=False, neighbours=False, loss_weights="lognormal")
        settings |= dict(temperature=1.0, cooling=1.0, halving_gain=math.inf)
        settings |= dict(masked_passes=2, refined_tokens=16)
    return settings | dict(classes=[str(number) for number in range(classes)])


# The first row whose depth and side in pixels are not exceeded counts. Guidance of the first three
# was chosen by the FD to images that no model saw, that of the next two by an earlier rule
# (tests/RESULTS.md, section 3). mask_guidance was only compared in edits.
SAMPLING = {  # (depth, side): guidance, mask_guidance, rise
    (2, 32): (4.4, 2.6, 1.0),
    (2, math.inf): (2.6, 2.6, 2.0),
    (3, 32): (3.2, 1.8, 1.0),
    (3, math.inf): (2.6, 1.8, 1.0),
    (7, math.inf): (1.8, 1.5, 1.0),
    (math.inf, math.inf): (1.5, 1.5, 1.0),  # not tried
}


def weaken_guidance(settings, gain):
    """The sampler's settings, both strengths of guidance divided by 1 + (gain / halving_gain)^2.

    gain: by how many nats a token the class lowers the next-scale loss of images held out, see
        `evaluate_transformer`. Below zero, as after learning a small folder by heart, it changes
        nothing.

    Guidance makes up for a model that has learned little of the classes. Where the class decides
    much, as in drawings, strong guidance would leave the data (tests/RESULTS.md, section 3).
    """
    share = 1 / (1 + (max(0.0, gain) / settings["halving_gain"]) ** 2)
    sampling = {name: settings[name] for name in sample.SETTINGS}
    return sampling | {x: share * sampling[x] for x in ("guidance", "mask_guidance")}


def default_scales(size, cell, growth, doubled=True):
    """The published scales where they fit, otherwise sides that grow by a factor.

    doubled: the last scale comes twice if its side is at most 8, which sharpens fine grain. The
        scale before these two has at least 5/8 of their side (tests/RESULTS.md, section 2).
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


def arguments(function, settings):
    """The settings that are arguments of a function, by name."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in names}


@torch.no_grad()
def evaluate_tokenizer(codec, images, scales):
    """({name: number or list}, rows of images) for held-out images (B, 3, H, W) in [-1, 1].

    held_out_error: the squared error. held_out_psnr: in dB, after each scale. held_out_perplexity:
    of the codes of each scale, the exponential of their entropy. The rows are the first eight
    images, then the same decoded after each scale.
    """
    decoded, counts = [], torch.zeros(len(scales), len(codec["codebook"]))
    for part in images.split(sample.images_at_once(images[0, 0].numel())):
        features = tokenizer.encode_features(codec, part)
        _, tokens, f_hats = zip(*tokenizer.quantise(codec, features, scales))
        decoded.append(torch.stack([tokenizer.decode_features(codec, x) for x in f_hats]))
        for k, chosen in enumerate(tokens):
            counts[k] += torch.bincount(chosen.flatten().cpu(), minlength=counts.shape[1])

    decoded = torch.cat(decoded, 1)  # (S, B, 3, H, W)
    errors = (decoded - images).square().mean((2, 3, 4))  # (S, B)
    psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean(1)
    share = counts.double() / counts.sum(1, keepdim=True)
    numbers = dict(held_out_error=errors[-1].mean().item(), held_out_psnr=psnr.tolist())
    numbers["held_out_perplexity"] = torch.special.entr(share).sum(1).exp().tolist()
    return numbers, [images[:8], *decoded[:, :8]]


@torch.no_grad()
def evaluate_transformer(params, codec, weights, examples):
    """{"held_out_loss": float, "class_gain": float} of examples, in nats a token.

    examples: labels (n,) or vectors (n, C), tokens (n, L), perhaps a mask. weights: of tokens (L,).
    held_out_loss: the mean of `transformer_loss`. class_gain, without a mask: by how much the class
    lowers it.
    """
    labels, tokens, *mask = sample.to_device(examples, weights.device)
    size = sample.images_at_once(math.prod(sample.image_size(params, codec)))

    def mean_loss(labels):
        losses = 0.0
        for part in zip(*(x.split(size) for x in (labels, tokens, *mask))):
            loss = transformer_loss(params, codec, weights, *part)["loss"].item()
            losses += len(part[0]) * loss
        return losses / len(labels)

    loss = mean_loss(labels)
    if mask:
        return dict(held_out_loss=loss)
    everywhere = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    without_class = mean_loss(drop_labels(labels, everywhere, params["classes"]))
    return dict(held_out_loss=loss, class_gain=without_class - loss)


def draw_samples(stage, params, codec, sampling):
    """Writes a grid with eight samples of each of the first ten classes of a stage.

    In the masked stage each scale has a masked pass, whatever the model's own schedule is.
    """
    classes = stage.settings["classes"]
    if stage.out and classes:  # there are none if conditions are vectors
        labels = torch.arange(min(10, len(classes))).repeat_interleave(8)
        model = dict(tokenizer=codec, transformer=params, classes=classes, sampling=sampling)
        schedule = sample.masked_schedule(hmar.scale_sizes(params), int("masked" in params))
        images = sample.generate(model, labels, schedule=schedule)
        stage.draw(stage.name, images.split(8), classes[:10])


# ---- what both loops use

LOG_EVERY = 50  # steps
SAVE_SECONDS = 300  # between checkpoints, beside those at evaluations
CLIP = 1.0  # largest norm of the gradient


class Stage:
    """What a loop has beside its batches and its loss: parameters, optimizers, log, checkpoints.

        for step, batch in stage.each(batches):
            for share, *part in stage.micro_batches(*batch):
                stage.backward(share, dict(loss=loss_of(stage.tree, *part)))
            stage.update()

    name: tokenizer, decoder, next-scale or masked, or any other for which settings has steps.
    tree: the tensors that it trains; stage.tree has copies, as parameters.
    settings: those of `recipe`. micro_batch: the images that pass the networks together; None: on a
        CPU so few that they fit its caches, on a GPU all that this process has of a batch.
    out: the run folder, in which a stage goes on from its checkpoint; a stage that is to begin anew
        needs another. None: nothing is written.
    """

    def __init__(self, name, tree, settings, out=None, device="cpu"):
        self.name, self.settings, self.seed = name, settings, settings["seed"]
        self.steps = settings[f"{name.replace('-', '_')}_steps"]
        self.lr = settings["lr"] * (MASKED_RATE if name == "masked" else 1)
        self.device = torch.device(device)
        self.dtype = sample.find_dtype(settings["dtype"], self.device)
        self.extra, self.saved = {}, {}
        if out and Path(out, "checkpoint.pt").exists():
            path = Path(out, "checkpoint.pt")
            saved = torch.load(path, map_location=self.device, weights_only=True)
            self.saved = saved if saved["stage"] == name else {}
        self.step = self.first_step = self.saved.get("step", 0)

        # The structure is the tree's own: with the checkpoint's keys, which are other objects, the
        # bytes of model.pt would change.
        leaves = pytree.tree_leaves(self.saved.pop("tree", tree))
        self.leaves = [nn.Parameter(leaf.detach().to(device, copy=True)) for leaf in leaves]
        self.tree = pytree.tree_unflatten(self.leaves, pytree.tree_structure(tree))
        optimizers = new_optimizers(self.tree, settings["decay"], settings["newton_schulz"])
        self.optimizers = [self.keep(f"{name} {type(x).__name__}", x) for x in optimizers]

        self.out = Path(out) if out and RANK == 0 else None  # only the first process writes
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
        self.report, self.window = {}, []  # numbers of a step, of the steps since the last line
        self.begun, self.save_at = time.monotonic(), time.monotonic() + SAVE_SECONDS
        millions = sum(leaf.numel() for leaf in self.leaves) / 1e6
        log(f"{name}: {millions:.3g} M parameters, {self.steps} steps, {self.step} done")

    def keep(self, name, value):
        """Returns value, a tensor, module or optimizer, in the state that the checkpoint has of it.

        It is in stage.extra, which checkpoints save.
        """
        saved = self.saved.get("extra", {}).pop(name, None)
        if torch.is_tensor(value) and saved is not None:
            value.copy_(saved)
        elif saved is not None:
            value.load_state_dict(saved)
        self.extra[name] = value
        return value

    def each(self, batches):
        """Yields (step, batch) of the steps that are left; saves between two, also after Ctrl-C.

        batches: an iterator, or a function that returns that of the steps after a number of steps.
        """
        batches = iter(batches(self.step) if callable(batches) else batches)
        evaluation_every = math.ceil(self.steps / self.settings["evaluations"])
        with catch_interrupt() as stop:
            while self.step < self.steps:
                self.step += 1
                self.is_evaluation = self.step == self.steps or self.step % evaluation_every == 0
                self.is_logged = self.is_evaluation or self.step % LOG_EVERY == 0
                yield self.step, next(batches)

                if self.is_evaluation or (self.is_logged and time.monotonic() > self.save_at):
                    self.save()
                if stop.is_set():
                    self.save()
                    rest = "the same command goes on from there" if self.out else "nothing is saved"
                    raise KeyboardInterrupt(f"stopped at step {self.step} of {self.name}; {rest}")

    def micro_batches(self, *tensors):
        """Yields (share of the batch, part of each tensor (B, ...)) of the micro-batches."""
        size = self.settings["micro_batch"]
        if size is None and self.device.type == "cpu":
            size = sample.images_at_once(self.settings["size"] ** 2)
        images = len(tensors[0])
        count = math.ceil(images / (size or images))
        for parts in zip(*(tensor.tensor_split(count) for tensor in tensors)):
            yield len(parts[0]) / images, *parts

    def backward(self, share, numbers):
        """Adds the gradient of a micro-batch, which is this share of a batch, and its numbers."""
        (share * numbers["loss"]).backward()
        for name, number in numbers.items():
            self.report[name] = self.report.get(name, 0) + share * number.detach()

    def update(self):
        """A step of the optimizers, with gradients averaged over the processes; and a log line."""
        for leaf in self.leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        if WORLD > 1:
            gradients = [leaf.grad for leaf in self.leaves]
            mean = total(nn.utils.parameters_to_vector(gradients)) / WORLD
            nn.utils.vector_to_parameters(mean, gradients)
        norm = self.report["gradient"] = nn.utils.clip_grad_norm_(self.leaves, CLIP)
        is_read = self.device.type == "cpu" or self.is_logged  # otherwise a GPU would be waited for
        if is_read and not norm.isfinite():
            text = f"{self.name}, step {self.step}: the loss or gradient is not finite"
            raise FloatingPointError(f"{text}; a lower --lr may help")
        optimizer_step(self.optimizers, learning_rate(self.step, self.steps, self.lr))
        self.window.append(self.report)
        self.report = {}
        if self.is_logged:
            numbers = {}
            for name in self.window[0]:
                mean = torch.stack([report[name] for report in self.window]).mean(0)
                numbers[name] = (total(mean) / WORLD).tolist()
            self.window = []
            self.log(numbers)

    def log(self, numbers):
        """Prints numbers and the time left of the stage; adds a line to metrics.jsonl.

        After a kill some steps have two lines; the later one counts.
        """
        if self.out:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(stage=self.name, step=self.step) | numbers) + "\n")
        pace = (time.monotonic() - self.begun) / (self.step - self.first_step)  # seconds a step
        left = datetime.timedelta(seconds=round(pace * (self.steps - self.step)))
        words = "  ".join(f"{name} {x:.4g}" for name, x in numbers.items() if isinstance(x, float))
        log(f"{self.name} {self.step}/{self.steps}  {left} left  {words}")

    def draw(self, name, rows, names):
        """Writes rows of images (n, 3, H, W) beside their names as RUN/samples/NAME.png."""
        if self.out:
            path = self.out / f"samples/{name}.png"
            path.parent.mkdir(exist_ok=True)
            sample.sheet(rows, names).save(path)
            log(f"{path} is written")

    def save(self):
        """Replaces RUN/checkpoint.pt."""
        if self.out:
            tree = pytree.tree_map(torch.Tensor.detach, self.tree)
            state = dict(stage=self.name, step=self.step, tree=tree, extra={})
            for name, value in self.extra.items():
                state["extra"][name] = value if torch.is_tensor(value) else value.state_dict()
            write_file(self.out / "checkpoint.pt", partial(torch.save, state))
        self.save_at = time.monotonic() + SAVE_SECONDS


@contextlib.contextmanager
def catch_interrupt():
    """Yields an event that Ctrl-C sets; a second Ctrl-C interrupts at once, as the first does
    where several processes wait for each other."""
    stop = threading.Event()

    def handle(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        print("stopping after this step; once more stops at once", file=sys.stderr)

    is_handled = WORLD == 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handle) if is_handled else None
    try:
        yield stop
    finally:
        if is_handled:
            signal.signal(signal.SIGINT, before)


# ---- optimizers

MATRICES = {"qkv", "project", "expand", "contract"}  # keys of the matrices that Muon trains


def new_optimizers(tree, decay, newton_schulz=5):
    """[Muon for matrices and convolutions (Jordan et al. 2024), AdamW for all other leaves].

    Embeddings, heads, modulation, depthwise convolutions and vectors are AdamW's. Muon multiplies
    in bf16 where the processor has it, whatever the dtype of the stage is.
    """
    matrices, others = [], []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        names = {getattr(entry, "key", None) for entry in path}
        is_matrix = leaf.shape[1] > 1 if leaf.ndim == 4 else leaf.ndim == 2 and names & MATRICES
        (matrices if is_matrix else others).append(leaf)
    dtype = sample.find_dtype(None, pytree.tree_leaves(tree)[0].device)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [Muon(matrices, decay, newton_schulz, dtype), adamw]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, to the bit, but in any dtype and for convolutions (Jordan et al. 2024).

    A convolution is a matrix with a row for each output channel. Matrices of one shape are updated
    together, in up to half of the time; of several processes each computes a share of them. Steps
    are scaled to the size of AdamW's: both use one rate (Liu et al. 2025).
    """

    def __init__(self, leaves, decay, newton_schulz, dtype):
        super().__init__(leaves, dict(lr=0.0))
        self.decay, self.newton_schulz, self.dtype = decay, newton_schulz, dtype
        self.stacks = {}  # leaves by the shape of their matrices
        for leaf in leaves:
            self.stacks.setdefault(leaf.flatten(1).shape, []).append(leaf)

    @torch.no_grad()
    def step(self):
        rate = self.param_groups[0]["lr"]
        for shape, leaves in self.stacks.items():
            state = self.state[leaves[0]]
            gradients = torch.stack([leaf.grad.flatten(1) for leaf in leaves])
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"].lerp_(gradients, 1 - 0.95)
            updates = gradients.lerp(momentum, 0.95).to(self.dtype)  # Nesterov's

            padded = F.pad(updates, (0, 0, 0, 0, 0, -len(updates) % WORLD))  # for equal shares
            updates = gather(orthogonalize(own_share(padded), self.newton_schulz))
            scale = 0.2 * math.sqrt(max(shape))
            for leaf, update in zip(leaves, updates):
                leaf.mul_(1 - rate * self.decay)
                leaf.add_(update.view_as(leaf), alpha=-rate * scale)


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


def optimizer_step(optimizers, rate):
    """A step of each optimizer at this learning rate; then the gradients are cleared."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


COOL_DOWN = 0.6  # share of a stage's steps at its end, while the learning rate falls to zero
WARM_UP = 0.06  # share at its beginning, while it rises to its peak
MASKED_RATE = 1 / 4  # learning rate of the masked stage, relative to the others


def learning_rate(step, steps, peak):
    """Warm-up, constant, then linear to zero (Hägele et al. 2024).

    The fall to zero replaces an average of the weights (EMA).
    """
    left = 1 - (step - 1) / steps
    return peak * min(1, step / (WARM_UP * steps), left / COOL_DOWN)


def learn_perceptual_layers(crops, settings, device):
    """Layers for `tokenizer.perceptual_error`: those of a small classifier of the training images.

    If there is a single class, it learns which of four quarter-turns an image was given (Gidaris et
    al. 2018). Trained in seconds, and again when a run goes on.
    """
    seed, dtype = settings["seed"], sample.find_dtype(settings["dtype"], device)
    steps = min(400, settings["tokenizer_steps"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.ModuleList()
        for inputs, width in itertools.pairwise((3, 32, 64, 96, 128)):
            convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            net.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        net.append(nn.Linear(width, crops.classes if crops.classes > 1 else 4))
    *layers, head = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)

    batch = min(32, max(4, 2**17 // crops.size**2))  # fewer images above 64 pixels
    log(f"tokenizer: first the perceptual network, {steps} steps of {batch} images")
    keys = crop_keys(len(crops), "perceptual", settings | dict(batch=batch), done=0)
    for step in range(1, steps + 1):
        images, labels = torch.utils.data.default_collate([crops[key] for key in next(keys)])
        if crops.classes == 1:
            generator = generator_of(seed, "turns", step)
            labels = torch.randint(4, (batch,), generator=generator)
            pairs = zip(images, labels.tolist())
            images = torch.stack([image.rot90(turn, (1, 2)) for image, turn in pairs])
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            *_, features = tokenizer.feature_maps(layers, to_unit(images.to(device)))
            scores = head(features.mean((2, 3)))
        F.cross_entropy(scores, labels.to(device)).backward()
        optimizer_step([optimizer], learning_rate(step, steps, 3e-3))
    net.eval().requires_grad_(False).to(dtype)
    return [lambda x, layer=layer: layer(x.to(dtype)) for layer in layers]


# ---- data: crops of any dataset, in batches; tokens of crops

EVALUATED = 128  # images held out for evaluations, at most a twentieth of all


def hold_out(dataset):
    """([index of an image to train on, ...], [index of one that is held out, ...]).

    A twentieth is held out, by a hash of its name or index. Seeds and images that come later do not
    change it, so that a run with --init holds out no image that the given model has learned.
    """
    names = dataset.names if isinstance(dataset, Folder) else range(len(dataset))
    numbers = [int(hashlib.sha256(f"held out {name}".encode()).hexdigest(), 16) for name in names]
    order = sorted(range(len(names)), key=numbers.__getitem__)
    is_low = [numbers[index] < 2**256 // 20 for index in order[:EVALUATED]]
    count = max(1, sum(is_low))
    return order[count:], order[:count]


class Crops(torch.utils.data.Dataset):
    """Square crops of some images of a dataset: (row, number) -> (uint8 (3, size, size), label).

    A crop is a function of the seed, its image and its number. One number in central_every is the
    central crop. If flip, half of the central crops and half of the others are mirrored.
    """

    def __init__(self, dataset, indices, settings):
        self.dataset, self.indices = dataset, indices
        self.size, self.seed, self.flip = settings["size"], settings["seed"], settings["flip"]
        self.central_every, self.classes = settings["central_every"], len(settings["classes"])
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
                image, label = read_item(self.dataset, index)
            except OSError as error:
                self.is_broken[other] = True
                print(f"left out: {error}", file=sys.stderr)
                continue
            if not 0 <= label < self.classes:
                got = f"label {label} of image {index}, expected 0 to {self.classes - 1}"
                raise ValueError(f"dataset: got {got}; dataset.classes has the names")
            return sample.convert_to_rgb(image), label, index
        raise OSError(f"dataset: none of the images {self.indices[:5]} can be read")


def read_item(dataset, index):
    """(PIL image, int) of a dataset. ValueError if it returns something else."""
    item = dataset[index]
    try:
        image, label = item
        label = operator.index(label)  # of int, numpy's integers and tensors of them
        image.getbands()
    except (AttributeError, TypeError, ValueError) as error:
        parts = item if isinstance(item, tuple | list) else [item]
        found = ", ".join(type(part).__name__ for part in parts)
        text = f"item {index} is ({found}), expected (PIL image, int)"
        raise ValueError(f"dataset: {text}") from error
    return image, label


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


def central_crops(crops):
    """The central crops of the first images: uint8 (n, 3, size, size), labels (n,)."""
    pairs = [crops[row, 0] for row in range(min(EVALUATED, len(crops)))]
    return torch.utils.data.default_collate(pairs)


def crop_batches(crops, stage, settings, device, workers, done):
    """Yields (images uint8 (b, 3, size, size), labels (b,)) of the steps after `done` steps.

    b is this process's share of the batch.
    """
    is_gpu = torch.device(device).type == "cuda"
    loader = torch.utils.data.DataLoader(
        crops,
        batch_sampler=map(own_share, crop_keys(len(crops), stage, settings, done)),
        num_workers=min(8, os.cpu_count()) * is_gpu if workers is None else workers,
        pin_memory=is_gpu,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # otherwise a number is drawn from torch's own
    )
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def crop_keys(count, stage, settings, done):
    """Yields [(row, number of its crop), ...] of the steps after `done`: a row once an epoch."""
    seed, batch = settings["seed"], settings["batch"]
    for step in itertools.count(done + 1):
        generator = generator_of(seed, stage, step, "crops")
        numbers = torch.randint(2**31, (batch,), generator=generator).tolist()
        places = range((step - 1) * batch, step * batch)
        rows = [epoch_order(seed, place // count, count)[place % count] for place in places]
        yield [*zip(rows, numbers)]


@lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of the rows in an epoch, the same in every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).tolist()


def ignore_interrupt(_):
    """Lets a worker live on after Ctrl-C, until the main process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def token_batches(crops, stage, codec, settings, device, workers, done):
    """Yields (labels (b,), tokens (b, L)) of `crop_batches`; codec is on the same device."""
    for images, labels in crop_batches(crops, stage, settings, device, workers, done):
        yield labels, encode_crops(codec, images, settings["scales"])


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
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---- here the method ends; the run folder


def begin_run(dataset, out, asked):
    """(settings, model) of a new run, or of that in the folder, whose settings args.json has.

    asked: the settings that are arguments of `train`. model: names of classes, settings of the
    sampler, and the parts that there are: those that are given (a tokenizer; init, a model), and
    the results of stages that have ended.

    ValueError if the run in the folder has other settings or data, or if the folder holds something
    else, which must not be overwritten.
    """
    out, sources = out and Path(out), {name: asked.get(name) for name in ("tokenizer", "init")}
    sources = {name: source and str(source) for name, source in sources.items()}

    before = {}
    files = {path.name for path in out.glob("*") if path.suffix != ".tmp"} if out else set()
    if files:  # others than those of a killed run
        before = json.loads((out / "args.json").read_text()) if "args.json" in files else {}
        if "data" not in before:
            raise ValueError(f"--out: {out} is neither empty nor a run of train.py")
        if files == {"args.json"}:  # nothing was trained, so the settings may change
            before = {}
    if before and sources.items() <= before.items() and (out / "model.pt").exists():
        model = sample.load_model(out)  # it has the given parts, so their files may be gone
    else:
        model = load_given(**sources)

    settings = resolve(dataset, asked | sources, model)
    if settings["batch"] % WORLD:
        got = f"got {settings['batch']}, expected a multiple of the {WORLD} processes"
        raise ValueError(f"--batch: {got}")
    now = settings | dict(images=len(dataset), data=fingerprint(dataset))
    if len(settings["classes"]) == 1:
        now["classes"] = []  # a single class has the name of the folder, which may be moved
    text = json.dumps(now, indent=1)
    changed = [name for name, x in json.loads(text).items() if before and before.get(name) != x]
    if changed:
        words = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
        text = f"{out} was begun with other settings or data ({words})"
        raise ValueError(f"--out: {text}; name another folder, or remove this one")

    wait_for_all()  # until all have read the folder; then the first writes there
    if out and not before:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "args.json", lambda file: file.write(text.encode()))
    if "sampling" not in model:  # nothing was trained yet
        sampling = weaken_guidance(settings, gain=0.0)
        model = dict(classes=settings["classes"], sampling=sampling) | model
        model = save_model(out, model) if "tokenizer" in model else model
    return settings, model


def load_given(tokenizer, init):
    """The parts with which a run begins, of model files: {"tokenizer": a tree, "init": a model}.

    ValueError if a file lacks its part.
    """
    given = {}
    for path, part in ((init, "transformer"), (tokenizer or init, "tokenizer")):
        if path:
            model = sample.load_model(path)
            if part not in model:
                raise ValueError(f"{path}: has no {part}")
            given |= {part: model[part]} if part == "tokenizer" else dict(init=model)
    return given


def fingerprint(dataset):
    """A hash that tells a dataset from others: its own, or one of a few labels and images.

    If one of the images is not the same twice, because it is augmented at random, none counts.
    """
    if hasattr(dataset, "fingerprint"):
        return dataset.fingerprint()
    labels, images, again = [], [], []
    for index in range(0, len(dataset), math.ceil(len(dataset) / 16)):
        with contextlib.suppress(OSError):  # an image that cannot be read is left out later
            (image, label), (other, _) = read_item(dataset, index), read_item(dataset, index)
            labels.append(label)
            images.append(hashlib.sha256(image.tobytes()).hexdigest())
            again.append(hashlib.sha256(other.tobytes()).hexdigest())
    counted = labels, images if images == again else []
    return hashlib.sha256(repr(counted).encode()).hexdigest()[:16]


def save_model(out, model):
    """Writes RUN/model.pt and returns the model on the CPU.

    It is read again, so that a stage begins with the same objects whether or not the run was
    stopped before it: then the files are equal to the byte.
    """
    model = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), model)
    if out:
        write_file(Path(out, "model.pt"), partial(torch.save, model))
        wait_for_all()
        model = sample.load_model(out)
    return model


def write_file(path, write):
    """Replaces a file by what write(file) writes, as a whole or not at all; first process only."""
    if RANK == 0:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        except RuntimeError as error:  # torch.save's, if the disk is full
            raise OSError(f"{path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def log(line):
    """Prints a line in the first process."""
    if RANK == 0:
        print(line, flush=True)


# ---- several processes


def start_processes(name):
    """The device of this name, after the processes that torchrun started have found each other."""
    device = sample.find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # TF32 would choose other tokens
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        wait_for_all()  # none may end, because of wrong flags, before all are connected
    return device


def wait_for_all():
    """Returns when all processes have come here."""
    if WORLD > 1:
        dist.barrier()


def own_share(batch):
    """This process's share of a list or tensor (B, ...) that all processes have."""
    return batch[RANK * len(batch) // WORLD : (RANK + 1) * len(batch) // WORLD]


def total(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor):
    """The tensors (n, ...) of all processes, one after another."""
    if WORLD == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


# ---- two datasets: a folder of images, drawings of shapes

CACHE_BYTES = 2**29  # of decoded images that a process keeps in memory
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Cached(torch.utils.data.Dataset):
    """A dataset that keeps images that were read, as long as their pixels fit in CACHE_BYTES."""

    def __init__(self, labels, classes):
        self.labels, self.classes, self.images, self.used = labels, classes, {}, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label, image = self.labels[index], self.images.get(index)
        if image is None:
            image = self.read(index)
            self.used += 3 * image.width * image.height
            if self.used <= CACHE_BYTES:
                self.images[index] = image
        return image, label


class Folder(Cached):
    """The images below a folder: a class for each sub-folder, and one for images directly in it.

    Links are followed, and names that begin with a dot are passed over. Images of deeper folders
    belong to the class. size: large images may be reduced, but not below twice this size. `names`
    and `labels` list the images, `classes` the names of the classes. ValueError if there are none.
    """

    def __init__(self, folder, size=None):
        self.folder, self.size, found = Path(folder), size, []
        if not self.folder.is_dir():
            raise ValueError(f"--data: there is no folder {folder}")
        for root, folders, names in os.walk(folder, followlinks=True):
            place = Path(root).resolve()
            # A link to a folder around it would be a loop.
            inner = {x for x in folders if not place.is_relative_to((place / x).resolve())}
            folders[:] = [name for name in inner if name[0] != "."]
            images = [x for x in names if x[0] != "." and x.lower().endswith(SUFFIXES)]
            found += [Path(root, name).relative_to(folder).parts for name in images]
        if not found:
            raise ValueError(f"--data: no images found in {folder} ({', '.join(SUFFIXES)})")

        found.sort()
        self.names = ["/".join(parts) for parts in found]
        own = self.folder.resolve().name
        owners = [parts[0] if len(parts) > 1 else own for parts in found]
        classes = sorted({*owners})
        super().__init__([classes.index(owner) for owner in owners], classes)

    def read(self, index):
        path = self.folder / self.names[index]
        try:
            return sample.read_image(path, self.size and 2 * self.size)
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise OSError(f"{path}: {error}") from error

    def fingerprint(self):
        """A hash of the names and of the bytes of a few files; the folder itself may move."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        for name in self.names[:: math.ceil(len(self) / 8)]:
            with contextlib.suppress(OSError):  # an image that cannot be read is left out later
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()[:16]


class Drawings(Cached):
    """The built-in drawings: `draw_shape` of 0 to 20,499."""

    def __init__(self, size=32):
        super().__init__([index % len(SHAPES) for index in range(20_500)], [*SHAPES])
        self.size = size

    def read(self, index):
        return draw_shape(index, self.size)[0]

    def fingerprint(self):
        return "drawings"


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


# ---- the command


def parser():
    """The flags of `python train.py`; those that are settings have their names."""
    top = argparse.ArgumentParser(description="Train HMAR on your images, or on drawings.")
    add, by_the_recipe = top.add_argument, "(default: by the recipe)"
    add("--data", help="folder of images, or of a folder for each class (default: drawings)")
    add("--size", type=int, help="side of the images in pixels (default: 64; drawings: 32)")
    add("--depth", type=int, help="transformer blocks; much follows from it (default: 2)")
    add("--out", help="run folder (default: runs/ and the name of the data folder)")
    add("--seed", type=int, help="seed of all randomness (default: 0)")
    add("--steps", type=int, help=f"training steps of each stage {by_the_recipe}")
    add("--batch", type=int, help=f"images in a step, over all processes {by_the_recipe}")
    add("--lr", type=float, help=f"peak of the learning rate {by_the_recipe}")
    text = "replaces other settings of the recipe, such as masked_steps=100 neighbours=False"
    add("--set", nargs="+", action="extend", type=setting, metavar="NAME=VALUE", help=text)
    add("--flip", action="store_true", default=None, help="mirror every second crop")
    text = "train VAR instead, for comparison: attend to coarser scales, no masked stage"
    add("--causal", action="store_true", default=None, dest="is_causal", help=text)
    add("--tokenizer", help="use the tokenizer of this model.pt or published file, and train none")
    add("--init", help="train the transformer of this model.pt further, with its tokenizer")
    add("--workers", type=int, help="processes that read images (default: none on a CPU)")
    sample.add_device_flags(top)
    return top


def setting(text):
    """(name, value) of NAME=VALUE; a value is a Python literal, otherwise a string."""
    name, value = text.split("=", 1)
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name, value


def main(argv=None):
    """The command. SystemExit with a line and status 1 for wrong flags or folders."""
    asked = vars(parser().parse_args(argv))
    names = "data", "out", "device", "workers", "set"
    data, out, device, workers, changes = (asked.pop(name) for name in names)
    asked = {name: value for name, value in asked.items() if value is not None}
    asked |= dict(changes or [])
    if not data:
        asked = dict(is_simple=True) | (dict() if "init" in asked else dict(size=32)) | asked
    out = Path(out or f"runs/{Path(data or 'shapes').resolve().name}")
    sample.keep_freed_memory()
    with sample.exit_with_a_line("train.py"):
        dataset = Folder(data) if data else Drawings()
        start_processes(device)
        settings, _ = begin_run(dataset, out, asked)  # what it refuses is told in a line
        dataset.size = settings["size"]

    try:
        train(dataset, out, device=device, workers=workers, **asked)
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error or 'stopped'}")
    log(f"finished; next: python sample.py {out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
