"""An independent judge of drawn shapes: a small classifier that never sees the model, and the Frechet distance in its features.

python tests/judge.py samples.npz        arr_0 (N, H, W, 3) uint8, labels (N,) int: accuracy over all and a class, and the distance
"""
import argparse
import itertools
import os
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train import SHAPES, draw_shape

TRAINING, HELD_OUT = 1_000_000, 2_000_000  # first indices of the judge's own drawings, far from those the model is trained on
FEATURES = 64


def drawings(first, count):
    """Drawings number first to first + count: images (count, 3, 32, 32) float in [-1, 1], labels (count,) int64."""
    pairs = [draw_shape(index) for index in range(first, first + count)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in pairs]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor([label for _, label in pairs])


def network():
    """Images (B, 3, 32, 32) -> logits (B, 10); all but the last layer give the features, of unit variance over the training drawings."""
    widths = (3, 24, 48, 64, 64)
    layers = []
    for level, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(width_in, width_out, 3, stride=2 if level else 1, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, FEATURES), nn.BatchNorm1d(FEATURES, affine=False)]
    return nn.Sequential(*layers, nn.Linear(FEATURES, len(SHAPES)))


def roughen(images, generator):
    """Blur and noise of a random strength an image (none for about a third), so that slightly soft drawings are judged fairly."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    blur, noise = (1.5 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 0.5).clamp(min=0)
    return images + blur * (blurred - images) + 0.1 * noise * torch.randn(images.shape, generator=generator)


def train_judge(seed=0, cache=None, count=16_000, epochs=4, batch=64):
    """The trained network in eval mode; cache: a file to keep it in, used again while drawings, seed and sizes stay the same."""
    same = [zlib.crc32(drawings(TRAINING, 20)[0].numpy().tobytes()), seed, count, epochs, batch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = network()
    if cache is not None and Path(cache).exists():
        kept = torch.load(cache, weights_only=True)
        if kept["same"] == same:
            judge.load_state_dict(kept["state"])
            return judge.eval()
    images, labels = drawings(TRAINING, count)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (count // batch))
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator)[: count - count % batch].split(batch):
            loss = F.cross_entropy(judge(roughen(images[rows], generator)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if cache is not None:
        temporary = Path(f"{cache}.{os.getpid()}")
        torch.save({"same": same, "state": judge.state_dict()}, temporary)
        temporary.replace(cache)
    return judge.eval()


@torch.no_grad()
def features(judge, images):
    """images (B, 3, 32, 32) float in [-1, 1] -> (B, 64) float64."""
    return torch.cat([judge[:-1](part) for part in images.float().split(500)]).double()


@torch.no_grad()
def predictions(judge, images):
    """images (B, 3, 32, 32) float in [-1, 1] -> the likeliest label (B,) int64."""
    return torch.cat([judge(part).argmax(1) for part in images.float().split(500)])


def accuracy(judge, images, labels):
    """The part of the images (B, 3, 32, 32) that the judge takes for the shape in labels (B,), from 0 to 1."""
    return (predictions(judge, images) == labels).double().mean().item()


def frechet(features_a, features_b):
    """Frechet distance |m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to (N, D) and (M, D) (Heusel et al. 2017, section 2)."""
    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = ((x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1) for x in (a, b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()  # the trace of (A B)^1/2
    return ((a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * middle).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help=".npz file")
    parser.add_argument("--cache", default=Path(tempfile.gettempdir()) / "shape_judge.pt", help="file that keeps the trained judge")
    arguments = parser.parse_args()
    with np.load(arguments.samples) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.from_numpy(file["labels"]).long()
    if images.shape[-2:] != (32, 32):
        images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    judge = train_judge(cache=arguments.cache)
    held_out, held_out_labels = drawings(HELD_OUT, 2000)
    others = drawings(HELD_OUT + 2000, len(images))[0]
    right = predictions(judge, images) == labels
    print(f"judge: {accuracy(judge, held_out, held_out_labels):.2%} right on 2,000 held-out drawings")
    print(f"samples: {right.double().mean().item():.2%} of {len(images)} are the shape asked for")
    for label, shape in enumerate(SHAPES):
        if (labels == label).any():
            taken = predictions(judge, images[labels == label])[~right[labels == label]].tolist()
            wrong = ", ".join(f"{taken.count(other)} {SHAPES[other]}" for other in sorted(set(taken)))
            print(f"  {shape:9} {right[labels == label].double().mean().item():8.2%}{'  taken for: ' + wrong if wrong else ''}")
    reference = features(judge, held_out)
    print(f"Frechet distance to held-out drawings: {frechet(features(judge, images), reference):.3f}"
          f" (as many other held-out drawings: {frechet(features(judge, others), reference):.3f})")


if __name__ == "__main__":
    main()
