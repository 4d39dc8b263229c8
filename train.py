"""Training: drawn shapes or a folder of images -> tokenizer.pt and hmar.pt; and the command `python train.py`.

    files -> Images, uint8 (3, size, size) -> tokenizer stage -> token cache (N, views, L) -> next-scale stage -> masked stage

Data come first (`draw_shape`, `list_images`, `Images`), then `fit`, the loop of all three stages, then what each stage gives it: a tree of
weights, a loss, the batches of each step. All randomness and the order of the data are functions of seed and step, so that nothing of them
is saved and a run that was killed continues bit for bit. The flags and what happens to a run folder stand at the end.
"""
import argparse
import colorsys
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
from sample import at_once, barrier, digest, load_tokenizer, load_transformer, rank, read_json, require, world, write_atomically, write_json

WEIGHTS = {"tokenizer": "tokenizer.pt", "next-scale": "hmar.pt", "masked": "hmar.pt"}  # what each stage leaves in the run folder
STAGES = tuple(WEIGHTS)
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "hexagon", "arrow", "heart")


def circle(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular polygon around (centre, 0), the first at the angle start in radians, y pointing down."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@functools.cache
def outlines():
    """For each of SHAPES the polygon (N, 2) that fills it within about the unit circle, then the polygons cut out of it."""
    angle = np.linspace(0, 2 * np.pi, 48)
    height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    star = np.stack([circle(points=5, start=-np.pi / 2), circle(points=5, radius=0.4, start=-np.pi * 0.3)], axis=1).reshape(10, 2)
    return dict(
        disc=[circle()], ring=[circle(), circle(radius=0.5)], crescent=[circle(), circle(radius=0.75, centre=0.5)],
        hexagon=[circle(points=6)], star=[star], heart=[np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1)],
        square=[np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
        triangle=[np.array([(0, -1), (0.95, 0.7), (-0.95, 0.7)])],
        cross=[np.array([(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                         (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)])],
        arrow=[np.array([(1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)])])


def draw_shape(index, size=32):
    """The built-in data set: (RGB image of size x size, label), a pure function of the index; label = index % 10, an index into SHAPES.
    Bright fill on a dark background that is flat or blends two colours; the shape's colour, place, size and rotation (within .25 rad)
    vary. The random numbers do not depend on size, so sizes show the same picture. ValueError for index < 0 or size < 8."""
    for name, value, least in (("index", index, 0), ("size", size, 8)):
        fine = isinstance(value, (int, np.integer)) and value >= least
        require(fine, f"{name}: expected an integer of at least {least}, got {value!r}")
    label = int(index) % len(SHAPES)
    hue, saturation, value, radius, x, y, turn, blend, direction, *dark = np.random.default_rng(int(index)).random(15).tolist()
    fill = np.float32(colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.85 + 0.15 * value))
    first, second = (np.float32(colorsys.hsv_to_rgb(dark[i], dark[i + 1], 0.3 * dark[i + 2])) for i in (0, 3))
    radius, angle = (9.5 + 4 * radius) / 32, 0.5 * turn - 0.25
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([12 + 8 * x, 12 + 8 * y]) / 32
    mask = Image.new("L", (4 * size, 4 * size))  # drawn at four times the size, then averaged: smooth edges
    for polygon, ink in zip(outlines()[SHAPES[label]], (255, 0)):
        ImageDraw.Draw(mask).polygon(((centre + radius * polygon @ rotation) * 4 * size).ravel().tolist(), fill=ink)
    cover = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255
    ramp, way, ground = np.linspace(-0.5, 0.5, size, dtype=np.float32), 2 * np.pi * direction, first
    if blend < 0.5:
        ground = first + (second - first) * (0.5 + (np.cos(way) * ramp + np.sin(way) * ramp[:, None]) / 2**0.5)[:, :, None]
    picture = ground + cover * (fill - ground)  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8)), label


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, searched to any depth, or images alone as one class.
    Sorted by name; a label is an index into the names. Hidden files, and files that are no images by suffix, are passed over;
    directories that cannot be read are named on stderr. ValueError for a folder that is missing, without images, or of both kinds."""
    def walk(top):  # (sub-folders, paths of images) of each folder; links are not followed, so that loops end
        for place, folders, names in os.walk(top, onerror=lambda error: print(f"passed over: {error}", file=sys.stderr)):
            folders[:], names = (sorted(name for name in found if not name.startswith(".")) for found in (folders, names))
            suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
            yield folders, [os.path.join(place, name) for name in names if name.lower().endswith(suffixes)]

    folder, state = os.fspath(folder), "no folder" if os.path.exists(folder) else "missing"
    require(os.path.isdir(folder), f"data: expected a folder of images, got {folder!r}, which is {state}")
    home, (names, own) = Path(folder).resolve(), next(walk(folder), ([], []))
    groups = {name: [path for _, paths in walk(os.path.join(folder, name)) for path in paths] for name in names
              if Path(folder, name).resolve() not in (home, *home.parents)}  # a link back up to the folder is no class
    groups = {name: paths for name, paths in groups.items() if paths}
    require(own or groups, f"data: expected PNG, JPEG, WebP, BMP or GIF images, got {folder!r}, which holds none")
    if own and groups:
        both = f"{os.path.basename(own[0])!r} beside the sub-folder {next(iter(groups))!r}"
        raise ValueError(f"data: expected one sub-folder a class or images alone, got both in {folder!r}: {both}")
    groups = groups or {home.name: own}
    return [(path, label) for label, paths in enumerate(groups.values()) for path in paths], tuple(groups)


def check_images(files):
    """The files [(path, label), ...] that can be read, after decoding each once; every other one is named on stderr. ValueError with
    a list when more than 5 % (and more than ten) are broken, or none is left."""
    def fault(file):
        try:
            sample.read_image(file[0], shortest=1)
        except ValueError as error:
            return str(error)

    with warnings.catch_warnings(), ThreadPool(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        faults = pool.map(fault, files, chunksize=32)
    broken = [reason for reason in faults if reason]
    if len(broken) > max(0.05 * len(files), 10) or len(broken) == len(files):
        more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(f"data: {len(broken)} of {len(files)} images cannot be read: {'; '.join(broken[:10])}{more}")
    for reason in broken:
        print(f"skipped: {reason}", file=sys.stderr)
    return [file for file, reason in zip(files, faults) if not reason]


def split_held_out(files, folder, fraction=0.05):
    """(training, held out) parts of [(path, label), ...], told apart by a hash of the path inside the folder, so that a file stays
    in its part when others come or go, and in the order of that hash, so that its first ones are of all classes. Neither part is empty.
    ValueError for fewer than two files or a fraction outside [0, 1)."""
    require(len(files) >= 2, f"data: expected at least two images, one to train on and one held out, got {len(files)} in {folder}")
    require(0 <= fraction < 1, f"fraction: expected the held-out part of the images, at least 0 and below 1, got {fraction}")
    names = [os.path.relpath(path, folder).replace(os.sep, "/") for path, _ in files]
    places = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names]
    limit = min(max(fraction, min(places)), np.nextafter(max(places), 0))
    ordered = sorted(zip(places, files))
    return [file for at, file in ordered if at > limit], [file for at, file in ordered if at <= limit]


def crop(image, size, seed=None, flip=True):
    """An image of any size -> size x size: the shorter side is resized to size and the centre cut out. With a seed (what
    numpy.random.default_rng takes) the shorter side becomes size to 1.125 size, the place is random, and half are mirrored (flip)."""
    width, height = image.size
    reach = min(width, height)  # of the source, so that no resized image of an extreme shape is ever made
    left, top, mirror = (width - reach) // 2, (height - reach) // 2, False
    if seed is not None:
        zoom, x, y, coin = np.random.default_rng(seed).random(4).tolist()
        reach /= 1 + zoom / 8
        left, top, mirror = x * (width - reach), y * (height - reach), flip and coin < 0.5
    box = (left, top, left + reach, top + reach)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    return ImageOps.mirror(image) if mirror else image


class Images(torch.utils.data.Dataset):
    """Images as (uint8 (3, size, size), label). items: a sequence of (path, label), or of numbers of drawings, such as range(20_000).
    A key is a pair (index, seed), so that a sampler decides the randomness: seed None is the centre crop, any other one decides crop and
    flip alone. Drawings vary enough by themselves and are always whole."""
    def __init__(self, items, size, flip=True):
        self.items, self.size, self.flip = items, size, flip
        self.labels = [item % len(SHAPES) if isinstance(item, (int, np.integer)) else item[1] for item in items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed = key
        item = self.items[index]
        if isinstance(item, (int, np.integer)):
            image, _ = draw_shape(item, self.size)
        else:
            image = crop(sample.read_image(item[0], shortest=2 * self.size), self.size, seed, self.flip)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), self.labels[index]


def data_sets(args):
    """(training Images, held-out Images, class names) of --data, or of drawings."""
    if args.data is None:
        return Images(range(20_000), args.size), Images(range(20_000, 20_500), args.size), SHAPES
    with contextlib.redirect_stderr(sys.stderr if rank() == 0 else io.StringIO()):  # each process looks, one speaks
        files, names = list_images(args.data)
        train, held_out = split_held_out(check_images(files), args.data, args.val)
    return Images(train, args.size, args.flip), Images(held_out, args.size, args.flip), names


def generator_of(*key):
    """Randomness as a function of where it is used (seed, stage, step, ...), so that none of it has to be saved to continue a run."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    """The order of an epoch's items, the same on every process and after a restart."""
    return torch.randperm(count, generator=generator_of(seed, "epoch", epoch)).tolist()


def step_items(args, step, count):
    """[(index, draw), ...]: the items of a step, every item once an epoch in a new order; draw numbers them over the whole run."""
    draws = range(step * args.batch, (step + 1) * args.batch)
    return [(epoch_order(args.seed, draw // count, count)[draw % count], draw) for draw in draws]


def own_parts(args, batch):
    """This process's part of a tensor with a row a sample, in --accumulate parts: all processes together see what one alone would."""
    return batch.chunk(world() * args.accumulate)[rank() * args.accumulate:][:args.accumulate]


def to_unit(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return to_device(images, device).float() / 127.5 - 1


def token_cache(name, images, tokenizer_params, args):
    """Tokens of all images, a memory-mapped (N, views, L) array in the run folder, encoded once by the finished tokenizer. Keyed by the
    tokenizer's weights and the list of images; continued where it was interrupted; made anew, and said so, when either changed. The
    views are the centre crop and its mirror image, or --views random crops; drawings have one."""
    views = args.views if args.data is not None else 0
    mirrored = args.data is not None and args.flip and not views
    settings = (args.scales, args.size, views, mirrored, args.dtype, args.seed if views else None)
    key = hashlib.sha256(repr((digest(tokenizer_params), settings)).encode())
    for item in images.items:
        key.update(repr(item if args.data is None else (item, os.path.getsize(item[0]), os.path.getmtime(item[0]))).encode())
    fast = tokenizer.cast(tokenizer_params, args.dtype)
    progress = sample.Progress(f"encoding {name}", len(images))

    def encode(rows):
        keys = [[(i, (args.seed, view, i)) for i in rows] for view in range(views)] or [[(i, None) for i in rows]]
        batches = [to_unit(torch.stack([image for image, _ in readers.map(images.__getitem__, own)]), args.device) for own in keys]
        batches += [batches[0].flip(-1)] if mirrored else []
        tokens = torch.stack([torch.cat([tokenizer.encode(fast, part, args.scales) for part in pixels.split(at_once(args.size**2))])
                              for pixels in batches], 1)
        progress.show(rows.stop, len(rows))
        return tokens.cpu().numpy()

    shape = (len(images), max(1, views) + mirrored, sum(tokenizer.lengths(args.scales)))
    with ThreadPool(max(1, args.workers)) as readers:
        return sample.fill_array(os.path.join(args.out, f"tokens-{name}"), dict(key=key.hexdigest()), shape, np.int32, 64, encode)


class Trained(torch.nn.Module):
    """The thinnest module that DDP and torch.compile take: the trainable leaves of a tree as parameters, a loss as forward."""
    def __init__(self, params, loss):
        super().__init__()
        self.leaves = torch.nn.ParameterList(leaf for leaf in pytree.tree_leaves(params) if isinstance(leaf, torch.nn.Parameter))
        self.params, self.loss = params, loss

    def forward(self, *batch):
        return self.loss(self.params, *batch)


def trainable(params, branches=None):
    """The tree with its leaves as parameters, all or those of some branches."""
    if branches is not None:
        return params | trainable({name: params[name] for name in branches})
    return pytree.tree_map(lambda tensor: torch.nn.Parameter(tensor.clone()), params)


def with_leaves(params, leaves):
    """The tree with its trainable leaves replaced, in order, and detached."""
    leaves = iter(leaves)
    return pytree.tree_map(lambda leaf: next(leaves) if isinstance(leaf, torch.nn.Parameter) else leaf, params)


def fit(args, params, loss, batches, *, after_step=None, evaluate=None, extra=()):
    """Trains the parameters in the tree `params` for args.steps and returns the tree with their moving averages.

    loss(params, *batch) -> (loss, {name: tensor}); batches(start) yields for each step one batch for each of the --accumulate parts;
    after_step(step, outputs of the parts, optimizer) may change parameters; evaluate(averaged tree) -> numbers to report; extra: tensors of
    state that after_step keeps. A step depends on its number and the checkpoint alone: a run that was killed continues bit for bit.
    """
    model, resume, start = Trained(params, loss), os.path.join(args.out, f"{args.stage}.resume.pt"), 0
    leaves, optimizer = list(model.leaves), adamw(params, args)
    average = [leaf.detach().clone() for leaf in leaves]
    state, window = [leaf.data for leaf in leaves] + average, {}  # window: what was measured since the last report
    if os.path.exists(resume):
        saved = sample.load(resume)
        start, window = saved["step"], to_device(saved["window"], args.device)
        optimizer.load_state_dict(saved["optimizer"])
        torch._foreach_copy_([*state, *extra], saved["state"])
        del saved
        for tensor in extra if rank() else ():  # saved as sums over the processes, which the first one carries on
            tensor.zero_()
        say(f"{args.stage}: continues at step {start} of {args.steps}")
    call = sample.compiled(model) if args.compile else model
    if world() > 1:
        call = torch.nn.parallel.DistributedDataParallel(call, device_ids=[args.device] if args.device.type == "cuda" else None,
                                                         find_unused_parameters=args.stage == "tokenizer")
    progress, note, stop = sample.Progress(args.stage, args.steps, start), "", Stop()
    metrics = Metrics(os.path.join(args.out, "metrics.jsonl"), args.stage, start)
    for step, micro_batches in enumerate(batches(start), start + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args)
        outputs, norm = optimise(call, micro_batches, leaves, optimizer, args.clip)
        torch._foreach_lerp_(average, [leaf.detach() for leaf in leaves], 1 - min(args.ema, step / (step + 10)))
        numbers = after_step and after_step(step, outputs, optimizer) or {}
        for name, value in [pair for output in (*outputs, dict(gradient=norm)) for pair in output.items()]:
            if torch.is_tensor(value):  # lists are for after_step alone
                window.setdefault(name, []).append(value.detach())
        if step % args.log_every == 0 or step == args.steps:
            means = {name: torch.stack(tensors).mean(0).tolist() for name, tensors in window.items()}
            window.clear()
            metrics.write(step, lr=learning_rate(step - 1, args), **means, **numbers)
            note = "  ".join(f"{name} {value:.4g}" for name, value in (means | numbers).items() if name in ("loss", "psnr_now"))
        progress.show(step, args.batch, note)
        if evaluate is not None and (step % args.eval_every == 0 or step == args.steps):
            numbers = evaluate(with_leaves(params, average))
            metrics.write(step, **numbers)
            shown = "  ".join(" ".join([name, *(f"{number:.4g}" for number in np.atleast_1d(value))]) for name, value in numbers.items())
            say(f"{args.stage} {step}/{args.steps}  {shown}")
        stopped = stop.agreed(step, args.device)
        if step % args.save_every == 0 or stopped or step == args.steps:
            whole_state = [*state, *(summed(tensor) for tensor in extra)]
            save(resume, dict(step=step, state=whole_state, optimizer=optimizer.state_dict(), window=window))
        if stopped:
            raise KeyboardInterrupt(f"{args.stage}: stopped at step {step} of {args.steps} and saved; "
                                    "the same command, without --restart, continues there")
    stop.restore()
    return with_leaves(params, average)


def optimise(call, micro_batches, leaves, optimizer, clip):
    """One step from a batch in parts: (what the loss reports for each part, the norm of the gradient before clipping)."""
    outputs = []
    for i, batch in enumerate(micro_batches, 1):
        with call.no_sync() if world() > 1 and i < len(micro_batches) else contextlib.nullcontext():
            loss, output = call(*batch)
            (loss / len(micro_batches)).backward()
        outputs.append(output)
    norm = torch.nn.utils.clip_grad_norm_(leaves, clip)
    optimizer.step()
    optimizer.zero_grad()
    return outputs, norm


def adamw(params, args):
    """AdamW (0.9, 0.95) whose decay spares biases, norms, embeddings, positions, temperatures and the codebook."""
    spared = re.compile(r"classes|start|levels|positions|scale$|codebook|mask_embedding|bias|norm")
    groups = {True: [], False: []}
    for path, leaf in pytree.tree_flatten_with_path(params)[0]:
        if isinstance(leaf, torch.nn.Parameter):
            groups[not spared.search(path_name(path))].append(leaf)
    return torch.optim.AdamW([dict(params=leaves, weight_decay=args.weight_decay * decays) for decays, leaves in groups.items()],
                             lr=args.lr, betas=(0.9, 0.95), fused=args.device.type in ("cpu", "cuda"))


def learning_rate(step, args):
    """Linear warm-up, then cosine or linear decay to zero."""
    decay = 0.5 * (1 + math.cos(math.pi * (step / args.steps))) if args.decay == "cosine" else 1 - step / args.steps
    return args.lr * min(1, (step + 1) / max(1, args.warmup)) * decay


def train_tokenizer(args, data, held_out):
    """Stage one, images -> tokenizer.pt: a plain autoencoder, then a codebook made of data, whose dead codes are replaced as it trains."""
    tree = dict(tokenizer=trainable(initial_tokenizer(args)))
    if args.gan:
        tree["discriminator"] = trainable(to_device(tokenizer.init_discriminator(seed=args.seed), args.device))
    codebook, scales = tree["tokenizer"]["codebook"], args.scales
    warm = 0 if args.init else min(200, args.steps // 10)
    chosen = torch.zeros(len(codebook), dtype=torch.int64, device=args.device)  # how often, since dead codes were last replaced
    window = torch.zeros(len(scales), len(codebook), dtype=torch.int64, device=args.device)  # the same a scale, since the last report
    reserved = whole(held_out, 256, args)

    def batches(start):
        own = slice(rank() * args.batch // world(), (rank() + 1) * args.batch // world())
        keys = ([(index, (args.seed, draw)) for index, draw in step_items(args, step, len(data))[own]] for step in range(start, args.steps))
        loader = torch.utils.data.DataLoader(data, batch_sampler=keys, num_workers=args.workers, worker_init_fn=stand_apart)
        for step, (images, _) in enumerate(loader, start):
            generator = generator_of(args.seed, "tokenizer", step)
            coin, depth = torch.rand(2, generator=generator).tolist()
            stop = int(depth * len(scales)) + 1 if coin < args.truncate else None
            gan = args.gan * min(1, max(0, 5 * step / args.steps - 1))  # from a fifth of the steps on, in full from two fifths
            parts = to_unit(images, args.device).chunk(args.accumulate)
            uniform = to_device(own_parts(args, torch.rand(args.batch, 4, generator=generator)), args.device)
            yield [(pixels, step >= warm, stop, gan, numbers) for pixels, numbers in zip(parts, uniform)]

    def after_step(step, outputs, optimizer):
        if step == warm:
            with torch.no_grad():
                pixels = whole(data, 512, args).split(at_once(args.size**2))
                features = torch.cat([tokenizer.features(tree["tokenizer"], part) for part in pixels])
            replace(codebook, tokenizer.data_codebook(tree["tokenizer"], features, scales, generator_of(args.seed, "codebook")))
        for k, tokens in [(k, tokens) for output in outputs for k, tokens in enumerate(output["tokens"])]:
            window[k].index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))
            chosen.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))
        if args.revive_every and step > warm and step % args.revive_every == 0 and step <= 0.8 * args.steps:
            counts = summed(chosen)
            new, dead = tokenizer.revive_codes(codebook.detach(), counts, outputs[-1]["residuals"], generator_of(args.seed, "revive", step))
            replace(codebook, new)
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[codebook][moment][dead] = 0
            chosen.zero_()
        if args.unit_codes:
            replace(codebook, F.normalize(codebook.detach(), dim=1))
        if step % args.log_every == 0 and step > warm:
            counts = summed(window)
            window.zero_()
            _, psnr = reconstructed(tokenizer.cast(tree["tokenizer"], args.dtype), reserved[:16], args)
            return dict(psnr_now=psnr, codes_used=int((counts.sum(0) > 0).sum()), usage=code_usage(counts))

    params = fit(args, tree, functools.partial(tokenizer_loss, args), batches, after_step=after_step, extra=[chosen, window],
                 evaluate=lambda average: judge_tokenizer(average["tokenizer"], reserved, args))["tokenizer"]
    return params | dict(codebook=F.normalize(params["codebook"], dim=1)) if args.unit_codes else params  # an average is shorter


def tokenizer_loss(args, tree, images, quantised, stop, gan, uniform):
    """(loss, what is reported) of images (B, 3, H, W): squared, absolute and edge errors, quantisation, and with gan adversarial losses."""
    fast = tokenizer.cast(tree["tokenizer"], args.dtype)
    made, vq, residuals, tokens = tokenizer.training_pass(fast, images, args.scales, args.beta, quantised, stop)
    edges = sum(F.l1_loss(made.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
    reconstruction = F.mse_loss(made, images) + 0.5 * F.l1_loss(made, images) + 0.25 * edges
    total = reconstruction + vq
    output = dict(loss=total.detach(), vq=vq.detach(), residuals=residuals, tokens=tokens)
    if gan:
        last = tree["tokenizer"]["decoder"]["conv_out"]["weight"]  # its cast may be an output of a compiled part
        fooled, critic = adversarial_losses(tree["discriminator"], images, made, reconstruction, last, uniform)
        total, output = total + gan * fooled + critic, output | dict(critic=critic.detach())
    return total, output


def adversarial_losses(layers, images, made, reconstruction, last, uniform):
    """(the tokenizer's loss, the discriminator's hinge loss); the first balanced by gradient norms at the decoder's last weight (VQGAN)."""
    frozen = pytree.tree_map(torch.Tensor.detach, layers)
    fooled = -tokenizer.discriminator(tokenizer.augmented(made, uniform), frozen).mean()
    gradients = (torch.autograd.grad(value, last, retain_graph=True)[0] for value in (reconstruction, fooled))
    ours, theirs = (summed(gradient.float()).norm() for gradient in gradients)
    real, fake = (tokenizer.discriminator(tokenizer.augmented(batch, uniform), layers) for batch in (images, made.detach()))
    return fooled * (ours / (theirs + 1e-6)).clamp(max=1e4).detach(), F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def code_usage(counts):
    """For each row of counts (S, V): distinct codes, their perplexity, and the most that could have been used, min(V, tokens seen)."""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-torch.xlogy(share, share).sum(1))
    return [dict(distinct=int((row > 0).sum()), perplexity=round(float(p), 1), most=min(len(row), int(row.sum())))
            for row, p in zip(counts, perplexity)]


def judge_tokenizer(params, images, args):
    """{"psnr": dB on held-out images}; draws the reconstruction sheet: original, reconstruction, and the image after each scale."""
    made, psnr = reconstructed(params, images, args)
    with torch.no_grad():
        images, made = (batch[:min(8, at_once(args.size**2))] for batch in (images, made))
        pyramid = tokenizer.quantise(params["codebook"], params["phi"], tokenizer.features(params, images), args.scales)
        rows = [images, made, *(tokenizer.decode_features(params, f_hat) for _, _, f_hat in pyramid)]
    names = ["original", "reconstruction", *(f"after {h}x{w}" for h, w in args.scales)]
    write_sheet(os.path.join(args.out, "samples", "reconstructions.png"), rows, names)
    return dict(psnr=psnr)


def reconstructed(params, images, args):
    """(reconstructions of images (B, 3, H, W), their mean PSNR in dB)."""
    with torch.no_grad():
        tokens = [tokenizer.encode(params, batch, args.scales) for batch in images.split(at_once(args.size**2))]
        made = torch.cat([tokenizer.decode(params, batch, args.scales) for batch in tokens])
    return made, float((10 * torch.log10(4 / (made - images).square().mean((1, 2, 3)))).mean())


def train_transformer(args, data, held_out):
    """Stage two, tokens -> hmar.pt: every token from the coarser scales. Stage three, hmar.pt -> hmar.pt with its masked branch: hidden
    tokens from the others of their scale, while the trunk and the rest stay as they are."""
    tokenizer_params, is_masked = finished(args, "tokenizer"), args.stage == "masked"
    params = initial_transformer(args, tokenizer_params)
    params = trainable(params, ["masked"] if is_masked else [name for name in params if name != "trunk" or not args.freeze_trunk])
    tokens, reserved = (token_cache(name, images, tokenizer_params, args) for name, images in (("train", data), ("held-out", held_out)))
    labels, held_out_labels, null = torch.tensor(data.labels), torch.tensor(held_out.labels), len(params["classes"]) - 1
    depth = len(params["trunk"]) + len(params["next_scale"]["blocks"])
    always = len(params["trunk"]) if is_masked else 0  # the frozen blocks drop nothing
    weights = hmar.scale_weights(args.scales, args.loss_weights).to(args.device)

    def loss(params, labels, tokens, keep, mask=None, places=None, share=None):
        inputs = tokenizer.next_scale_inputs(tokenizer_params, tokens, args.scales)
        fast, options = hmar.cast(params, args.dtype), dict(keep=keep, checkpointing=args.checkpointing)
        if mask is None:
            losses = hmar.next_scale_losses(fast, labels, tokens, inputs, args.causal, **options)
            total = (losses * weights).sum(1).mean()
            return total, dict(loss=total.detach(), scale_losses=by_scale(losses.detach().mean(0), args.scales))
        own_inputs = tokenizer.masked_inputs(tokenizer_params, tokens, args.scales, mask)
        losses = hmar.masked_losses(fast, labels, tokens, inputs, own_inputs, mask, places=places, **options)
        total = (losses * share).sum()  # the mean over the whole step's hidden tokens, in however many parts it runs
        return total, dict(loss=total.detach())

    def batches(start):
        for step in range(start, args.steps):
            chosen, own, generator = *token_batch(args, step, labels, tokens), generator_of(args.seed, args.stage, step)
            chosen = torch.where(torch.rand(args.batch, generator=generator) < args.label_drop, null, chosen)
            keep = hmar.stochastic_depth(torch.rand(args.batch, depth - always, 2, generator=generator), args.depth_drop * depth / 24)
            keep = torch.cat([torch.ones(args.batch, always, 2), keep], 1)
            parts = [own_parts(args, tensor) for tensor in (chosen, own, keep)]
            if is_masked:
                ratio = torch.rand(args.batch, 1, generator=generator)  # of hidden tokens, for each sample
                mask = torch.rand(args.batch, own.shape[1] - tokenizer.lengths(args.scales)[0], generator=generator) < ratio
                masks, share = own_parts(args, mask), torch.tensor(world() * args.accumulate / max(1, int(mask.sum())))
                parts += [masks, [hidden.flatten().nonzero()[:, 0] for hidden in masks], [share] * args.accumulate]
            yield to_device(list(zip(*parts)), args.device)

    return fit(args, params, loss, batches,
               evaluate=lambda average: judge_transformer(average, tokenizer_params, held_out_labels, reserved, args))


def token_batch(args, step, labels, tokens):
    """(labels (B,), tokens (B, L)) of a step's whole batch, a random view of each image."""
    indices = [index for index, _ in step_items(args, step, len(labels))]
    views = torch.randint(tokens.shape[1], (len(indices),), generator=generator_of(args.seed, "views", step)).numpy()
    return labels[indices], torch.from_numpy(tokens[indices, views].astype(np.int64))


def by_scale(values, scales):
    """Means (S,) of values (L,) over each scale."""
    return torch.stack([own.mean() for own in values.split(tokenizer.lengths(scales))])


def judge_transformer(params, tokenizer_params, labels, tokens, args):
    """Held-out loss (nats) and token accuracy, over all tokens and a scale; in the masked stage of the hidden half of the tokens alone.
    Draws the sample sheet, samples/<stage>.png: a row a class, eight samples each, of the first ten classes."""
    tokens, labels = torch.from_numpy(tokens[:512, 0].astype(np.int64)).to(args.device), labels[:512].to(args.device)
    lengths, sums = tokenizer.lengths(args.scales), 0
    with torch.no_grad():
        batch = min(32, at_once(args.size**2))
        for number, (own, own_labels) in enumerate(zip(tokens.split(batch), labels.split(batch))):
            inputs = tokenizer.next_scale_inputs(tokenizer_params, own, args.scales)
            if args.stage == "masked":
                mask = (torch.rand(inputs.shape[:2], generator=generator_of("held-out mask", 32 * number)) < 0.5).to(args.device)
                own_inputs = tokenizer.masked_inputs(tokenizer_params, own, args.scales, mask)
                logits, judged = hmar.masked_logits(params, own_labels, inputs, own_inputs, mask), F.pad(mask, (lengths[0], 0))
            else:
                logits, judged = hmar.next_scale_logits(params, own_labels, inputs, args.causal), torch.ones_like(own)
            losses, hits = F.cross_entropy(logits.transpose(1, 2), own, reduction="none"), logits.argmax(-1) == own
            sums = sums + (torch.stack([losses, hits, torch.ones_like(losses)]) * judged).double().sum(1)  # (3, L)
    names = args.class_names[:10]
    rows = [sample.generate(params, tokenizer_params, torch.full((8,), label, device=args.device), seed=8 * label, is_causal=args.causal)[0]
            for label in range(len(names))]
    write_sheet(os.path.join(args.out, "samples", f"{args.stage}.png"), rows, names)
    loss, accuracy, count = sums.sum(1).tolist()
    scale_sums = torch.stack([own.sum(1) for own in sums.split(lengths, 1)], 1)[:, args.stage == "masked":]  # scale 0 is never masked
    scale_losses, scale_accuracies = (scale_sums[:2] / scale_sums[2].clamp(min=1)).tolist()
    return dict(held_out_loss=loss / count, ln_codes=math.log(len(tokenizer_params["codebook"])), accuracy=accuracy / count,
                held_out_scale_losses=scale_losses, scale_accuracies=scale_accuracies)


def initial_tokenizer(args):
    """A new tokenizer of the flags' sizes, or --init's: a tree of ours or a published state dict."""
    names = ("codes", "code_dim", "channels", "multipliers", "residual_blocks", "attention", "seed")
    new = load_tokenizer(args.init) if args.init else tokenizer.init(**{name: getattr(args, name) for name in names})
    return to_device(new, args.device)


def initial_transformer(args, tokenizer_params):
    """What a stage starts from: hmar.pt with a new masked branch; or a new transformer of the flags' sizes; or --init's, with positions
    resampled for other scales and a new class embedding for other classes."""
    codes, code_dim = tokenizer_params["codebook"].shape
    new = dict(classes=len(args.class_names), codes=codes, code_dim=code_dim, scales=args.scales, gamma=args.gamma, seed=args.seed)
    if args.stage != "masked" and args.init is None:
        return to_device(hmar.init(depth=args.depth, width=args.width, **new), args.device)
    params = finished(args, "next-scale") if args.stage == "masked" else load_transformer(args.init)
    params.pop("masked", None)  # trained before: start over
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    if args.stage == "masked":
        return hmar.add_masked_branch(params, min(args.masked_blocks, len(blocks)), seed=args.seed)
    params = params | dict(trunk=blocks, next_scale=params["next_scale"] | dict(blocks=[]))
    if hmar.scales(params) != args.scales:
        say(f"--init: positions resampled from {sides(hmar.scales(params))} to {sides(args.scales)}")
        params = hmar.resize_positions(params, args.scales)
    if len(params["classes"]) != len(args.class_names) + 1:
        say(f"--init: a new class embedding for {len(args.class_names)} classes in place of {len(params['classes']) - 1}")
        params = params | dict(classes=hmar.init(depth=1, width=params["classes"].shape[1], **new)["classes"])
    fits = (len(params["next_scale"]["head"]["bias"]), params["input"]["weight"].shape[1]) == (codes, code_dim)
    require(fits, f"--init: {args.init} does not fit tokenizer.pt's {codes} codes of {code_dim} dimensions")
    return to_device(params, args.device)


def finished(args, stage):
    """The weights that an earlier stage left in the run folder; ValueError that says which command makes them."""
    path = os.path.join(args.out, WEIGHTS[stage])
    command = f"python train.py {stage} --out {args.out} ..."
    require(os.path.exists(path), f"{args.stage}: {path} is missing; the {stage} stage makes it: {command}")
    return to_device(load_tokenizer(path) if stage == "tokenizer" else load_transformer(path), args.device)


def whole(images, count, args):
    """The first `count` images, centre crops, (B, 3, size, size) in [-1, 1]."""
    return to_unit(torch.stack([images[index, None][0] for index in range(min(len(images), count))]), args.device)


def replace(parameter, value):
    """parameter = value, the same on every process."""
    parameter.data.copy_(value)
    if world() > 1:
        torch.distributed.broadcast(parameter.data, 0)


def summed(tensor):
    """A tensor, added up over the processes."""
    tensor = tensor.clone()
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def path_name(path):
    """ "trunk.0.mlp.expand.weight" of a leaf's path."""
    return ".".join(re.findall(r"\w+", pytree.keystr(path)))


def to_device(tree, device):
    """The tree on a device; from pinned memory to CUDA, so that nothing waits for the copy."""
    def send(tensor):
        pinned = torch.device(device).type == "cuda" and tensor.is_cpu
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)
    return pytree.tree_map(send, tree)


def say(line):
    """Prints a line, once however many processes there are."""
    if rank() == 0:
        print(line, flush=True)


def save(path, tree):
    """Writes a tree of tensors so that either the old file or the whole new one is there, whatever happens. OSError if it cannot."""
    if rank() == 0:
        plain = pytree.tree_map(lambda leaf: leaf.detach().cpu() if torch.is_tensor(leaf) else leaf, tree)  # any machine can load it
        write_atomically(path, lambda file: torch.save(plain, file))


def write_sheet(path, rows, names):
    """A PNG of `sample.sheet`, whole or not at all."""
    if rank() == 0:
        write_atomically(path, lambda file: sample.sheet(rows, names).save(file, "PNG"))


class Metrics:
    """metrics.jsonl: one JSON object a line with stage, step and numbers; lines past the step that a run continues from are dropped."""
    def __init__(self, path, stage, step):
        self.path, self.stage = path, stage
        if rank() == 0 and os.path.exists(path):
            lines = [line for line in Path(path).read_text().splitlines(True) if line.endswith("\n")]  # a kill may have cut the last one
            kept = [line for line in lines if json.loads(line)["stage"] != stage or json.loads(line)["step"] <= step]
            write_atomically(path, lambda file: file.write("".join(kept).encode()))

    def write(self, step, **numbers):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(stage=self.stage, step=step, **numbers)) + "\n")


def stand_apart(_):
    """Of a worker that decodes: out of the run's process group, so that Ctrl-C and torchrun's SIGTERM reach the run alone, which saves."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class Stop:
    """Whether the run was asked to end by Ctrl-C or SIGTERM; a second signal ends it at once."""
    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        self.asked = True
        self.restore()
        if rank() == 0 and os.isatty(2):  # somebody waits
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may not be called inside of itself

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, step, device):
        """The same answer on every process, asked every tenth step where there are several."""
        return self.asked if world() == 1 else step % 10 == 0 and bool(summed(torch.tensor(self.asked, dtype=torch.int64, device=device)))


PRESETS = {  # by the largest side of images they are meant for: a model for two CPU cores, and the published one
    64: dict(channels=32, multipliers=(1, 1, 2), residual_blocks=1, attention=False, codes=256, code_dim=16, depth=3, width=192, gamma=0.1,
             masked_blocks=2, loss_weights="token", batch=16, ema=0.998, warmup=100,
             steps={"tokenizer": 2200, "next-scale": 2600, "masked": 400}, lr={"tokenizer": 4e-3, "next-scale": 3e-3, "masked": 1e-3}),
    math.inf: dict(channels=160, multipliers=(1, 1, 2, 2, 4), residual_blocks=2, attention=True, codes=4096, code_dim=32, depth=16,
                   width=None, gamma=None, masked_blocks=8, loss_weights="lognormal", batch=64, ema=0.9999, warmup=1000,
                   steps={"tokenizer": 200_000, "next-scale": 400_000, "masked": 80_000}, lr=dict.fromkeys(STAGES, 1e-4))}


def default_scales(latent):
    """Scales for a latent of latent x latent: the published ones for 16, 32 and 64, else sides that grow by about a half."""
    published = {scales[-1][0]: scales for scales in hmar.SCALES.values()}
    made = [latent]
    while made[0] > 1:
        made.insert(0, max(1, min(made[0] - 1, round(made[0] / 1.5))))
    return published.get(latent, tuple((side, side) for side in made))


def sides(scales):
    """The scales as --scales takes them."""
    return " ".join(str(h) if h == w else f"{h}x{w}" for h, w in scales)


def parser():
    """The flags of `python train.py`."""
    top = sample.Parser(usage="python train.py [STAGE] [flags]",
                        description="Train HMAR from nothing: the tokenizer, the next-scale and the masked stage. (auto) follows --size.")
    data = top.add_argument_group("data").add_argument
    data("--data", metavar="FOLDER", help="images, one sub-folder a class or all in one (drawn shapes)")
    data("--size", type=int, default=None, metavar="PIXELS", help="side of the square images (32 for drawings, else 256)")
    data("--val", type=float, default=0.05, metavar="SHARE", help="held out by a hash of the file name (0.05)")
    data("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random (on)")
    data("--views", type=int, default=0, metavar="N", help="random crops encoded an image; 0: centre crop and mirror image (0)")
    data("--workers", type=int, default=min(4, max(0, os.cpu_count() // 2 - 1)), metavar="N", help="that decode images (by the cores)")
    run = top.add_argument_group("run").add_argument
    run("stage", nargs="?", default="all", choices=("all", *STAGES), metavar="STAGE", help=f"{', '.join(STAGES)} or all (all)")
    run("-h", "--help", action="help", help="show this and exit")
    run("--out", metavar="RUN", help="run folder (runs/shapes, or runs/<name of the data folder>)")
    run("--init", metavar="FILE", help="start the stage from these weights, ours or published (a single stage only)")
    run("--tokenizer", metavar="FILE", help="use this finished tokenizer, ours or published, instead of training one")
    run("--freeze-trunk", action="store_true", help="next-scale: train embeddings and head only")
    run("--restart", action="store_true", help="begin the stages anew, whatever the run folder holds")
    run("--seed", type=int, default=0, metavar="N", help="of all randomness (0)")
    run("--save-every", type=int, default=500, metavar="STEPS", help="checkpoints to go on from (500)")
    run("--log-every", type=int, default=50, metavar="STEPS", help="lines of metrics.jsonl (50)")
    run("--eval-every", type=int, metavar="STEPS", help="held-out numbers and sample sheets (a quarter of the steps)")
    run("--device", help="cuda or cpu (the first there is)")
    run("--dtype", choices=("auto", "bf16", "fp32"), default="auto", metavar="TYPE", help="bf16, fp32 or whichever is faster (auto)")
    run("--compile", action="store_true", help="torch.compile the training step")
    loop = top.add_argument_group("optimisation (auto follows --size)").add_argument
    loop("--steps", type=int, metavar="N", help="of each stage (auto)")
    loop("--batch", type=int, metavar="N", help="images a step, over all processes (auto)")
    loop("--accumulate", type=int, metavar="N", help="parts of a step's batch, to save memory (8 images of 256 pixels in each)")
    loop("--lr", type=float, metavar="RATE", help="peak learning rate (auto)")
    loop("--warmup", type=int, metavar="STEPS", help="until the learning rate is at its peak (auto)")
    loop("--decay", choices=("cosine", "linear"), default="cosine", metavar="CURVE", help="cosine or linear, of the learning rate (cosine)")
    loop("--weight-decay", type=float, default=0.05, metavar="W", help="of AdamW, on matrices alone (0.05)")
    loop("--clip", type=float, default=1.0, metavar="NORM", help="largest gradient norm (1)")
    loop("--ema", type=float, metavar="DECAY", help="decay of the moving average of weights, which is what is saved (auto)")
    loop("--checkpointing", action="store_true", help="compute activations twice to save memory")
    tok = top.add_argument_group("tokenizer").add_argument
    tok("--scales", nargs="+", type=sample.scale_pair, metavar="SIDE", help="coarse to fine, 4 or 2x3 each (auto)")
    tok("--codes", type=int, metavar="V", help="codebook size (auto)")
    tok("--code-dim", type=int, metavar="N", help="dimensions of a code (auto)")
    tok("--channels", type=int, metavar="N", help="a multiple of 32 (auto)")
    tok("--multipliers", nargs="+", type=int, metavar="M", help="of channels, a level each; n levels downsample by 2^(n-1) (auto)")
    tok("--residual-blocks", type=int, metavar="N", help="a level (auto)")
    tok("--beta", type=float, default=0.1, metavar="B", help="weight of the commitment loss (0.1)")
    tok("--revive-every", type=int, default=20, metavar="STEPS", help="dead codes are replaced, until 80 %% of the run; 0: never (20)")
    tok("--truncate", type=float, default=0.0, metavar="P", help="chance that a step decodes from a random number of coarse scales (0)")
    tok("--gan", type=float, default=0.0, metavar="WEIGHT", help="adversarial loss, from a fifth of the steps on (0)")
    tok("--unit-codes", action="store_true", help="keep codes at length one")
    model = top.add_argument_group("transformer").add_argument
    model("--depth", type=int, metavar="N", help="blocks (auto)")
    model("--width", type=int, metavar="N", help="(auto; 64 * depth where published)")
    model("--masked-blocks", type=int, metavar="N", help="the masked branch's own (auto)")
    model("--loss-weights", choices=("token", "scale", "lognormal"), metavar="KIND", help="token, scale or lognormal (auto)")
    model("--label-drop", type=float, default=0.1, metavar="P", help="labels made null in training, for guidance (0.1)")
    model("--depth-drop", type=float, default=0.1, metavar="P", help="stochastic depth of the last block at depth 24 (0.1)")
    model("--causal", action="store_true", help="VAR: attend to coarser scales too (no masked stage)")
    return top


def resolved(args, tokenizer_params=None):
    """The flags with every 'auto' filled in. ValueError that names the flag for whatever does not fit."""
    if args.size is None:
        args.size = 32 if args.data is None else 256
    preset = PRESETS[min(limit for limit in PRESETS if args.size <= limit)]
    vars(args).update({name: value for name, value in preset.items() if getattr(args, name, None) is None})
    least = {1: "size depth batch accumulate codes code_dim channels residual_blocks masked_blocks save_every log_every", 1e-9: "clip",
             0: "views workers warmup weight_decay ema beta revive_every truncate gan label_drop depth_drop"}
    for low, name in [(low, name) for low, names in least.items() for name in names.split()]:
        value, high = getattr(args, name), dict(ema=1, truncate=1, label_drop=1, depth_drop=23 / max(1, args.depth)).get(name, math.inf)
        fits = value is None or low <= value <= high
        require(fits, f"--{name.replace('_', '-')}: got {value}, expected at least {low}" + f" and at most {high}" * (high < math.inf))
    require(not args.gan or args.size >= 16, f"--gan: the critic needs --size 16 or more, got {args.size}")
    for name in ("steps", "lr"):
        given = getattr(args, name)
        setattr(args, name, given if isinstance(given, dict) else dict.fromkeys(STAGES, given))
        require(min(getattr(args, name).values()) > 0, f"--{name}: got {given}, expected more than 0")
    step = 2 ** (len(args.multipliers) - 1) if tokenizer_params is None else tokenizer.downsampling(tokenizer_params)
    require(args.size % step == 0, f"--size: got {args.size}, expected a multiple of the downsampling, {step}")
    if args.accumulate is None:
        shares = [parts for parts in range(1, args.batch + 1) if args.batch % (parts * world()) == 0] or [1]
        args.accumulate = next((parts for parts in shares if args.batch <= parts * world() * at_once(args.size**2)), shares[-1])
    side, parts = args.size // step, args.accumulate * world()
    args.scales = tuple(args.scales or default_scales(side))
    tokenizer.check_scales(args.scales)
    end = sides(args.scales[-1:])
    require(args.scales[-1] == (side, side), f"--scales: end at {end}, expected the latent's side, {args.size} / {step}")
    require(args.batch % parts == 0, f"--batch: {args.batch} does not divide into {args.accumulate} parts on {world()} processes")
    require(args.stage in ("tokenizer", "next-scale") or not args.init, "--init: needs the stage that it starts, tokenizer or next-scale")
    require(args.stage != "masked" or not args.causal, "--causal: VAR has no masked stage")
    return args


def stage_settings(args, stage):
    """What decides a stage's result, as JSON holds it: the flags, with the stage's own steps and learning rate."""
    others = ("stage", "out", "restart", "save_every", "log_every", "eval_every", "workers", "device", "tokenizer", "accumulate")
    own = dict(steps=args.steps[stage], lr=args.lr[stage], dtype=str(args.dtype)[6:], data=args.data and os.path.abspath(args.data))
    return json.loads(json.dumps({name: value for name, value in (vars(args) | own).items() if name not in others}))


def run_stage(args, stage, data, held_out):
    """Trains one stage, unless the run folder says that it is finished; refuses other settings than those it was started with."""
    path, weights, resume = (os.path.join(args.out, name) for name in ("args.json", WEIGHTS[stage], f"{stage}.resume.pt"))
    saved, settings = read_json(path), stage_settings(args, stage)
    started = {name: {} for name in STAGES} | saved
    settings |= {earlier: started[earlier].get("made") for earlier in STAGES[:STAGES.index(stage)]}  # other weights are other settings
    fits = stage != "masked" or started["next-scale"].get("tokenizer") == started["tokenizer"].get("made")
    require(fits, f"{args.out}: hmar.pt was trained for another tokenizer.pt; train.py next-scale --restart trains it anew")
    require(stage != "masked" or not started["next-scale"].get("causal"), f"{args.out}: VAR (--causal) has no masked stage")
    begun = os.path.exists(resume) or started[stage].get("finished") and os.path.exists(weights)
    before = started[stage] if begun and not args.restart else {}
    changed = [f"{name} {before.get(name)!r} -> {settings[name]!r}" for name in settings if before and before.get(name) != settings[name]]
    require(not changed, f"{args.out}: the {stage} stage was started with other settings ({', '.join(changed)}); "
                         "--out NAME begins another run, with --init FILE from its weights, --restart this one anew")
    made_for = started["tokenizer"] or settings
    fits = stage == "tokenizer" or all(made_for[name] == settings[name] for name in ("size", "scales"))
    require(fits, f"{args.out}: tokenizer.pt was made for --size {made_for['size']} --scales {sides(made_for['scales'])}, "
                 f"not for {settings['size']} and {sides(settings['scales'])}")
    if before.get("finished") and os.path.exists(weights):
        return say(f"{stage}: finished before, {weights}")
    if rank() == 0:
        if args.restart and os.path.exists(resume):
            os.remove(resume)
        write_json(path, saved | {stage: settings})
    barrier()
    own = dict(stage=stage, steps=args.steps[stage], lr=args.lr[stage], eval_every=args.eval_every or max(1, args.steps[stage] // 4))
    train_stage = train_tokenizer if stage == "tokenizer" else train_transformer
    finish(args, stage, settings, train_stage(argparse.Namespace(**vars(args) | own), data, held_out))


def finish(args, stage, settings, params):
    """Writes a stage's weights, then into args.json what they were made with and their digest."""
    save(os.path.join(args.out, WEIGHTS[stage]), params)
    if rank() == 0:
        path = os.path.join(args.out, "args.json")
        saved = read_json(path) | {stage: settings | dict(finished=True, made=digest(params))}
        if stage == "next-scale":  # whose hmar.pt has no masked branch
            saved.get("masked", {}).pop("finished", None)
        write_json(path, saved)
    barrier()


def train(args):
    """The stages that the flags ask for, in order."""
    args.device = sample.start_processes(args.device)
    args.out = args.out or os.path.join("runs", "shapes" if args.data is None else os.path.basename(os.path.abspath(args.data)))
    given, own = load_tokenizer(args.tokenizer) if args.tokenizer else None, os.path.join(args.out, "tokenizer.pt")
    source = args.init if args.stage == "tokenizer" else own if args.stage != "all" and os.path.exists(own) else None
    args = resolved(args, load_tokenizer(source) if given is None and source else given)
    data, held_out, args.class_names = data_sets(args)
    os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
    if rank() == 0:
        for path in [*Path(args.out).glob("*.[0-9]*.tmp"), *Path(args.out, "samples").glob("*.[0-9]*.tmp")]:  # half written by a kill
            path.unlink()
    saved = read_json(os.path.join(args.out, "args.json"))
    known = [getattr(torch, saved[stage]["dtype"]) for stage in STAGES if stage in saved]  # so that a run continues as it began
    known = dict(bf16=[torch.bfloat16], fp32=[torch.float32]).get(args.dtype, known)
    args.dtype = known[0] if known else sample.fast_dtype(args.device)
    say(f"{args.out}: {len(data)} images to train on, {len(held_out)} held out, {len(args.class_names)} classes; {args.device}, "
        f"{str(args.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, {world()} process{'es' if world() > 1 else ''}")
    left_out = ("tokenizer" if args.tokenizer else None, "masked" if args.causal else None)
    stages = [stage for stage in STAGES if args.stage in ("all", stage) and stage not in left_out]
    say(f"{args.size} x {args.size} pixels, {args.batch} images a step, "
        f"steps: {', '.join(f'{stage} {args.steps[stage]:,}' for stage in stages)}")
    if args.device.type == "cpu" and args.size > min(PRESETS):
        say(f"a model of the published size, made for GPUs: its steps take minutes on a CPU; up to --size {min(PRESETS)} it is a small one")
    if given is not None:
        begun = any(os.path.exists(os.path.join(args.out, name)) for name in ("tokenizer.pt", "tokenizer.resume.pt"))
        same = not begun or saved.get("tokenizer", {}).get("made") == digest(given)
        require(same or args.restart, f"{args.out}: has another tokenizer than {args.tokenizer}; --out NAME begins another run, "
                                      "--restart replaces it")
        barrier()  # every process has looked
        finish(args, "tokenizer", stage_settings(args, "tokenizer"), given)
    for stage in stages:
        run_stage(args, stage, data, held_out)
    following = "python train.py next-scale, with the same flags" if args.stage == "tokenizer" else f"python sample.py {args.out}"
    say(f"finished: weights, args.json, metrics.jsonl and samples/ are in {args.out}; next: {following}")


def main(argv=None):
    """The command; see `sample.command`."""
    return sample.command("train.py", train, parser().parse_args(argv), "stopped; the same command, without --restart, goes on")


if __name__ == "__main__":
    sys.exit(main())
