"""Why not diffusion? A class-conditional flow-matching UNet in pixels, judged by judge.py.

python tests/rival.py cifar10 --data DIR --seconds 300 [--guidance 2 3 4] [--out .npz]

Kinds, --data, --others and --fresh as there (letters: what it writes). Trains on --train DIR, else
train.py's images, but for every 21st, for so many seconds of processor time without reading, draws
50 a class at each guidance; the one whose samples are nearest to those set aside, which is to be
reported, comes last.

Rectified flow (Lipman et al. 2023, Liu et al. 2023), logit-normal times (Esser et al. 2024),
classifier-free guidance (Ho & Salimans 2022), Muon.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import judge

import sample
import train

EMBEDDING = 128
BATCH = 16
RATE = 3e-3  # at its peak
WARMUP = 100  # steps
COOL_DOWN = 0.6  # last share of the seconds
EMA = 0.998
STEPS = 30  # of drawing


class Block(nn.Module):
    """A residual block; the condition scales and shifts its second norm."""

    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.modulation = nn.Linear(EMBEDDING, 2 * after)
        self.skip = nn.Conv2d(before, after, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, condition):
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(hidden * (1 + scale) + shift))


class UNet(nn.Module):
    """Images (B, 3, H, W), times (B,), labels (B,) -> velocity; label -1: none."""

    def __init__(self, size, classes, width):
        super().__init__()
        self.classes = nn.Embedding(classes + 1, EMBEDDING)
        self.times = nn.Linear(EMBEDDING, EMBEDDING)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

        self.down, self.up = nn.ModuleList([Block(width, width)]), nn.ModuleList()
        for _ in range((size // 8).bit_length() - 1):  # down to 8 x 8
            self.down.append(Block(width, 2 * width))
            self.up.insert(0, Block(3 * width, width))
            width *= 2
        self.up.insert(0, Block(2 * width, width))
        self.before, self.after = Block(width, width), Block(width, width)
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


def fit(model, pixels, labels, seconds):
    """(model with averaged weights, steps)."""
    tree = dict(model.named_parameters())
    leaves = [torch.nn.Parameter(leaf.detach().clone()) for leaf in tree.values()]
    # by their dotted names Muon gets embeddings and modulation too: nearer than with AdamW
    optimizers = train.new_optimizers(tree, leaves, decay=0)
    average, batches, step, left, start = None, [], 0, 1.0, time.process_time()
    while left > 0:
        if not batches:
            batches += torch.randperm(len(pixels)).split(BATCH)
        rows = batches.pop()
        images = pixels[rows]

        # from noise, time 0, to images; some without a label
        noise, times = torch.randn_like(images), torch.randn(len(rows)).sigmoid()
        mixed = noise.lerp(images, times[:, None, None, None])
        known = labels[rows].masked_fill(torch.rand(len(rows)) < train.LABEL_DROP, -1)
        now = dict(zip(tree, leaves, strict=True))
        velocity = torch.func.functional_call(model, now, (mixed, times, known))
        F.mse_loss(velocity, images - noise).backward()

        torch.nn.utils.clip_grad_norm_(leaves, train.CLIP)
        step += 1
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = RATE * min(1, step / WARMUP, left / COOL_DOWN)
            optimizer.step()
            optimizer.zero_grad()
        left = 1 - (time.process_time() - start) / seconds
        if left < COOL_DOWN:
            average = average or [leaf.detach().clone() for leaf in leaves]
            torch._foreach_lerp_(average, [leaf.detach() for leaf in leaves], 1 - EMA)
    model.load_state_dict(dict(zip(tree, average, strict=True)))
    return model, step


@torch.no_grad()
def draw(model, x, labels, guidance):
    """Images by Euler's steps from noise x."""
    labels = torch.cat([labels, 0 * labels - 1])
    for step in range(STEPS):
        times = torch.full(labels.shape, step / STEPS)
        given, free = model(torch.cat([x, x]), times, labels).chunk(2)
        x = x + (free + guidance * (given - free)) / STEPS
    return x


def run(args):
    """Trains, draws, judges."""
    if (args.data is None) != (args.kind == "shapes"):
        raise ValueError("--data: expected, but for shapes")
    judged, (images, _) = judge.images_of(args.kind, args.data, args.others, args.fresh)
    if args.size != images.shape[-1]:
        raise ValueError(f"--size: expected {images.shape[-1]}")
    network = judge.train_judge(args.kind, *judged)
    reference = judge.features(network, images)

    # training
    if args.data is None:
        pixels, classes = judge.drawn(train.draw_shape, 0, 20_000)
    else:
        own = Path(args.data, "train" if args.kind in judge.PHOTOGRAPHS else "")
        _, names = train.list_images(own)
        pixels, classes = judge.read_folder(args.train or own, names)
    is_aside = torch.arange(len(pixels)) % 21 == 0  # of drawings every 20th is a disc
    aside = judge.features(network, pixels[is_aside])
    pixels, classes = pixels[~is_aside], classes[~is_aside]
    torch.manual_seed(args.seed)
    count = int(classes.max()) + 1
    model = UNet(args.size, count, args.channels).to(memory_format=torch.channels_last)
    model, steps = fit(model, pixels, classes, args.seconds)
    parameters = sum(map(torch.numel, model.parameters()))

    # drawing, from the same noise at each guidance
    labels = torch.arange(count).repeat_interleave(50)
    noise = torch.randn(len(labels), *pixels.shape[1:])
    results = {}
    for guidance in args.guidance:
        start = time.process_time()
        pairs = zip(noise.split(50), labels.split(50))
        drawn = sample.to_bytes(torch.cat([draw(model, *pair, guidance) for pair in pairs]))
        seconds = (time.process_time() - start) * 500 / len(drawn)
        seen, _ = judge.as_tensors(drawn, [])
        right = judge.accuracy(network, seen, labels)
        drawn_features = judge.features(network, seen)
        distance = judge.frechet(drawn_features, reference)
        aside_distance = judge.frechet(drawn_features, aside)
        recall = judge.recall(drawn_features, reference)
        line = f"guidance {guidance:g}  steps {steps}  parameters {parameters}  right {right:.3f}  "
        line += f"Frechet {distance:.3g}  recall {recall:.3f}  to those set aside "
        line += f"{aside_distance:.3g}  "
        line += f"trained {args.seconds:g} s  500 drawn {seconds:.0f} s"
        results[-aside_distance] = line, drawn

    for _, (line, drawn) in sorted(results.items()):
        print(args.kind, line)
    if args.out:
        numpy.savez(args.out, arr_0=drawn, labels=labels)


if __name__ == "__main__":
    top = argparse.ArgumentParser(description="Train and judge a flow-matching UNet.")
    top.add_argument("kind", choices=judge.EPOCHS)
    for name, default in dict(size=32, channels=32, seed=0).items():
        top.add_argument(f"--{name}", type=int, default=default)
    top.add_argument("--seconds", type=float, default=300.0)
    top.add_argument("--guidance", type=float, nargs="+", default=[2, 3, 4])
    for name in "data", "others", "fresh", "train", "out":
        top.add_argument(f"--{name}")
    args = top.parse_args()
    run(args)
