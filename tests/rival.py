"""Why not diffusion? A class-conditional flow-matching UNet in pixels, judged by judge.py.

python tests/rival.py cifar10 --data DIR --seconds 300 [--steps 5 10 30] [--guidance 2 3 4] ...

The data sets, --data, --others and --fresh are those of judge.py (letters: the folder that it
writes). The UNet is trained on the images and random crops of train.py (or on --train DIR) until
the process has taken so many seconds of processor time, counted from its start as for train.py.
Then 50 images of each class are sampled in each way: with so many steps, a strength of guidance, a
solver, times that are denser near the images (--density above 1), and guidance only between two
times (--interval; noise is 0, images are 1). For each number of steps the way with the lowest FD on
one half of the images that no model saw is reported by the other half.

--edit N: instead, N unseen images are repainted as by judge.py --edit. In each step known pixels
are replaced by the image with the noise of that time; "repaint" also takes each step but the first
twice, after noise is added again (RePaint, Lugmayr et al. 2022, with r = 2).

Rectified flow (Lipman et al. 2023, Liu et al. 2023), logit-normal times (Esser et al. 2024),
classifier-free guidance (Ho & Salimans 2022), in an interval (Kynkaanniemi et al. 2024), Euler's
method or Adams and Bashforth's of second order, Muon, dropout as in EDM (Karras et al. 2022).
"""

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import judge

import hmar
import sample
import tokenizer
import train

EMBEDDING = 128
BATCH = 16
RATE = 3e-3  # at its peak
WARMUP = 100  # steps
COOL_DOWN = 0.6  # last share of the seconds
EMA = 0.998


class Block(nn.Module):
    """A residual block; the condition scales and shifts its second norm."""

    def __init__(self, before, after, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.modulation = nn.Linear(EMBEDDING, 2 * after)
        self.skip = nn.Conv2d(before, after, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, condition):
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        hidden = F.dropout(F.silu(hidden * (1 + scale) + shift), self.dropout, self.training)
        return self.skip(x) + self.conv2(hidden)


class UNet(nn.Module):
    """Images (B, 3, H, W), times (B,), labels (B,) -> velocity; label -1: none."""

    def __init__(self, size, classes, width, dropout=0.0):
        super().__init__()
        block = partial(Block, dropout=dropout)
        self.classes = nn.Embedding(classes + 1, EMBEDDING)
        self.times = nn.Linear(EMBEDDING, EMBEDDING)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

        self.down, self.up = nn.ModuleList([block(width, width)]), nn.ModuleList()
        for _ in range((size // 8).bit_length() - 1):  # down to 8 x 8
            self.down.append(block(width, 2 * width))
            self.up.insert(0, block(3 * width, width))
            width *= 2
        self.up.insert(0, block(2 * width, width))
        self.before, self.after = block(width, width), block(width, width)
        self.norm = nn.GroupNorm(8, width)
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)

    @torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
    def forward(self, images, times, labels):
        waves = 1000 * times[:, None] * torch.logspace(0, -4, EMBEDDING // 2)
        times = self.times(torch.cat([waves.sin(), waves.cos()], 1))
        condition = F.silu(times + self.classes(labels + 1))
        x, skips = self.conv_in(images.to(memory_format=torch.channels_last)), []
        for block in self.down:
            x = block(F.avg_pool2d(x, 2) if skips else x, condition)
            skips.append(x)

        x = self.before(x, condition)
        rows = self.norm(x).flatten(2).mT  # (B, H W, C)
        mixed, _ = self.attention(rows, rows, rows, need_weights=False)
        x = self.after(x + mixed.mT.reshape(x.shape), condition)
        for block, skip in zip(self.up, skips[::-1]):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1), condition)
        return self.conv_out(F.silu(x)).float()


def fit(model, crops, settings, seconds):
    """(model with averaged weights, steps), when the process has taken so many seconds."""
    tree = dict(model.named_parameters())
    leaves = [torch.nn.Parameter(leaf.detach().clone()) for leaf in tree.values()]
    # Muon trains embeddings and modulation too, which lowers the FD.
    matrices = [leaf for leaf in leaves if leaf.ndim >= 2]
    vectors = [leaf for leaf in leaves if leaf.ndim < 2]
    adamw = torch.optim.AdamW(vectors, betas=(0.9, 0.95), weight_decay=0, fused=True)
    dtype = sample.find_dtype(None, torch.device("cpu"))
    optimizers = [train.Muon(matrices, 0, 5, dtype), adamw]
    batches = train.crop_batches(crops, "unet", settings | dict(batch=BATCH), "cpu", None, 0)
    average, step, start = None, 0, time.process_time()
    while (left := (seconds - time.process_time()) / (seconds - start)) > 0:
        images, labels = next(batches)
        images = train.to_unit(images)

        # from noise, time 0, to images; some without a label
        noise, times = torch.randn_like(images), torch.randn(len(images)).sigmoid()
        mixed = noise.lerp(images, times[:, None, None, None])
        known = labels.masked_fill(torch.rand(len(images)) < 0.1, -1)
        now = dict(zip(tree, leaves, strict=True))
        velocity = torch.func.functional_call(model, now, (mixed, times, known))
        F.mse_loss(velocity, images - noise).backward()

        torch.nn.utils.clip_grad_norm_(leaves, train.CLIP)
        step += 1
        train.optimizer_step(optimizers, RATE * min(1, step / WARMUP, left / COOL_DOWN))
        if left < COOL_DOWN:
            average = average or [leaf.detach().clone() for leaf in leaves]
            torch._foreach_lerp_(average, [leaf.detach() for leaf in leaves], 1 - EMA)
    model.load_state_dict(dict(zip(tree, average, strict=True)))
    return model, step


@torch.no_grad()
def sample_flow(model, x, labels, steps, guidance, solver, density, interval):
    """Images from noise x; the step from time t to t + h adds h times the velocity at t.

    solver: "euler" takes the velocity as it is, "ab2" extrapolates it linearly from that of the
    step before to the middle of the step (Adams-Bashforth), unless guidance changed in between;
    both evaluate it once a step. density:
    times are 1 - (1 - i / steps) ** density. guidance: 1 outside the interval.
    """
    times = (1 - (1 - torch.linspace(0, 1, steps + 1)) ** density).tolist()
    before = None
    for now, after in itertools.pairwise(times):
        h, scale = after - now, guidance if interval[0] <= now <= interval[1] else 1
        velocity = guided_velocity(model, x, now, labels, scale)
        middle = velocity
        if solver == "ab2" and before is not None and before[2] == scale:
            h0, v0, _ = before
            middle = velocity + h / (2 * h0) * (velocity - v0)
        x = x + h * middle
        before = h, velocity, scale
    return x


def guided_velocity(model, x, time, labels, guidance):
    """The velocity with guidance, or without it where guidance is 1, for half of the cost."""
    if guidance == 1:
        return model(x, torch.full(labels.shape, time), labels)
    labels = torch.cat([labels, 0 * labels - 1])
    given, free = model(torch.cat([x, x]), torch.full(labels.shape, time), labels).chunk(2)
    return free + guidance * (given - free)


@torch.no_grad()
def edit_flow(model, images, mask, labels, noise, steps, guidance, density, interval, is_repaint):
    """Images whose pixels in the mask are repainted, by Euler's method; see the top."""
    times = (1 - (1 - torch.linspace(0, 1, steps + 1)) ** density).tolist()
    generator = torch.Generator().manual_seed(8)
    x = noise
    for now, after in itertools.pairwise(times):
        scale = guidance if interval[0] <= now <= interval[1] else 1
        for turn in range(2 if is_repaint and now > 0 else 1):
            if turn:  # back from time `after` to `now`: noise is added until its share is 1 - now
                kept = now / after
                added = ((1 - now) ** 2 - (kept * (1 - after)) ** 2) ** 0.5
                x = kept * x + added * torch.randn(x.shape, generator=generator)
            x = torch.where(mask, x, noise.lerp(images, now))
            x = x + (after - now) * guided_velocity(model, x, now, labels, scale)
    return torch.where(mask, x.clamp(-1, 1), images)


def training_crops(args, is_photographs):
    """The images that train.py trains on, of --train or of its data, and its settings."""
    if args.data is None:
        dataset = train.Drawings()
    else:
        dataset = train.Folder(args.train or Path(args.data, "train" if is_photographs else ""))
    indices, _ = train.hold_out(dataset)
    classes = len(dataset.classes)
    settings = train.recipe(2, args.size, len(indices), classes, is_simple=args.data is None)
    settings |= dict(seed=args.seed)
    return train.Crops(dataset, indices, settings), settings


def run(args):
    """Trains, samples or edits, judges."""
    if (args.data is None) != (args.kind == "shapes"):
        raise ValueError("--data: expected, but for shapes")
    is_photographs = args.kind in judge.PHOTOGRAPHS

    # training
    crops, settings = training_crops(args, is_photographs)
    count = len(settings["classes"])
    torch.manual_seed(args.seed)
    model = UNet(args.size, count, args.channels, args.dropout).to(
        memory_format=torch.channels_last
    )
    if args.model and Path(args.model).exists():
        model.load_state_dict(torch.load(args.model, weights_only=True))
    else:
        model, steps = fit(model, crops, settings, args.seconds)
        print(f"{steps} steps, {steps * BATCH / len(crops):.1f} epochs in {args.seconds:g} s")
        if args.model:
            torch.save(model.state_dict(), args.model)
    model.eval()
    print(f"{sum(map(torch.numel, model.parameters()))} parameters")

    if args.beside:
        return time_beside(model, args)

    # the judge
    judged, held_out = judge.images_of(args.kind, args.data, args.others, args.fresh)
    if args.size != held_out[0].shape[-1]:
        raise ValueError(f"--size: expected {held_out[0].shape[-1]}")
    probe = None
    if args.others and args.kind == "photos64":
        own = Path(args.data, "train")
        probe = judge.read_folder(own, train.Folder(own).classes)
    network = judge.train_judge(args.kind, *judged, probe=probe)
    choosing, reporting = judge.halves(*held_out)
    halves = [judge.features(network, images) for images, _ in (choosing, reporting)]

    if args.edit:
        for steps, is_repaint in itertools.product(args.steps, (False, True)):
            way = steps, args.guidance[0], args.density[0], args.interval[0], is_repaint
            print(f"{steps} steps, guidance {args.guidance[0]:g}{', repaint' * is_repaint}")
            judge.report_edits(network, reporting, partial(edit_images, model, way), args.edit)
        return

    # sampling, from the same noise in each way
    labels = torch.arange(count).repeat_interleave(50)
    shape = len(labels), 3, args.size, args.size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    best = {}
    ways = args.steps, args.guidance, args.solver, args.density, args.interval
    for steps, *way in itertools.product(*ways):
        start = time.process_time()
        pairs = zip(noise.split(50), labels.split(50))
        made = torch.cat([sample_flow(model, *pair, steps, *way) for pair in pairs])
        seconds = (time.process_time() - start) * 500 / len(made)
        made = sample.to_bytes(made)
        seen, _ = judge.as_tensors(made, [])
        sampled = judge.features(network, seen)
        chosen_by, reported = (judge.frechet(sampled, half) for half in halves)
        accuracy = judge.accuracy(network, seen, labels)
        recall = judge.recall(sampled, halves[1])
        guidance, solver, density, interval = way
        line = f"{steps:2d} steps  guidance {guidance:g}  {solver}  density {density:g}  interval "
        line += f"{interval[0]:g}:{interval[1]:g}  accuracy {accuracy:.3f}  FD {chosen_by:.3g} by "
        line += f"which it is chosen, {reported:.3g} reported  recall {recall:.3f}  "
        line += f"500 sampled in {seconds:.1f} s"
        print(args.kind, line, flush=True)
        best[steps] = min(best.get(steps, (float("inf"),)), (chosen_by, line, made), key=first)

    for _, line, made in best.values():
        print("chosen:", args.kind, line)
    if args.out:
        numpy.savez(args.out, arr_0=min(best.values(), key=first)[2], labels=labels)


def time_beside(model, args):
    """Prints seconds of a core for 500 samples of a run folder and of the UNet, best of three."""
    other, dtype = sample.load_model(args.beside), sample.find_dtype(None, torch.device("cpu"))
    other["tokenizer"] = tokenizer.cast(other["tokenizer"], dtype)
    other["transformer"] = hmar.cast(other["transformer"], dtype)
    labels = torch.arange(500) % len(other["classes"])
    noise = torch.randn(500, 3, args.size, args.size)

    def flow(steps):
        way = steps, args.guidance[0], args.solver[0], args.density[0], args.interval[0]
        for pair in zip(noise.split(50), labels.split(50)):
            sample_flow(model, *pair, *way)

    ways = {f"{steps} steps": partial(flow, steps) for steps in args.steps}
    ways[args.beside] = partial(sample.generate, other, labels)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, draw in ways.items():
            start = time.process_time()
            draw()
            best[name] = min(best[name], time.process_time() - start)
    for name, seconds in best.items():
        ratio = seconds / best[args.beside]
        print(f"{name}: 500 samples in {seconds:.2f} s, {ratio:.2f} times {args.beside}")


def edit_images(model, way, images, mask, labels, seeds):
    """Edits of images, each from noise of its own seed."""
    noise = [
        torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        for image, seed in zip(images, seeds)
    ]
    return edit_flow(model, images, mask, labels, torch.stack(noise), *way)


def first(row):
    return row[0]


def two_times(text):
    low, high = text.split(":")
    return float(low), float(high)


if __name__ == "__main__":
    top = argparse.ArgumentParser(description="Train and judge a flow-matching UNet.")
    top.add_argument("kind", choices=judge.EPOCHS)
    for name, default in dict(size=32, channels=32, seed=0).items():
        top.add_argument(f"--{name}", type=int, default=default)
    top.add_argument("--seconds", type=float, default=300.0)
    top.add_argument("--dropout", type=float, default=0.0)
    top.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 30])
    top.add_argument("--guidance", type=float, nargs="+", default=[2, 3, 4])
    top.add_argument("--solver", choices=("euler", "ab2"), nargs="+", default=["ab2"])
    top.add_argument("--density", type=float, nargs="+", default=[1])
    top.add_argument("--interval", type=two_times, nargs="+", default=[(0, 1)], metavar="FROM:TO")
    top.add_argument("--model", help="file of the trained UNet: written, or read if it exists")
    text = "judge edits of so many unseen images instead of samples"
    top.add_argument("--edit", type=int, metavar="IMAGES", help=text)
    text = "run folder: prints how long 500 samples of it and of the UNet take, in turns"
    top.add_argument("--beside", metavar="RUN", help=text)
    for name in "data", "others", "fresh", "train", "out":
        top.add_argument(f"--{name}")
    args = top.parse_args()
    run(args)
