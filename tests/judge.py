"""Four yardsticks: classifiers that never see the model, and Frechet distances in their features.

python tests/judge.py shapes RUN              drawings of train.py
python tests/judge.py letters RUN             Pillow's own font; a mirrored letter is a wrong one
python tests/judge.py cifar10 RUN --data DIR  DIR holds train/ and test/, one sub-folder a class
python tests/judge.py photos64 RUN --data DIR so too, of any classes and pixels
python tests/judge.py cifar10 RUN --data DIR --edit   held-out images whose halves are repainted
python tests/judge.py letters --write DIR     4,000 letters as a data set for train.py --data
python tests/judge.py shapes RUN --write DIR  README's growth.png and edit.png, of a run on drawings

RUN is a run folder, sampled with sample.py's defaults and the flags after a --, say -- --top-p .9.
Prints the share of samples that are of the class asked for, the Frechet distance (Heusel et al.
2017, section 2) of samples, of reconstructions and of held-out images to the reference images, the
samples' recall (Kynkaanniemi et al. 2019, section 3), and of 1,000 held-out images the PSNR after
each scale and the perplexity of its codes. Then a name and a number a line, for programs: seconds
are those of judging the run, peak_mb is the process's (Linux).
"""

import argparse
import itertools
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hmar
import sample
import tokenizer
import train

LETTERS = "2345GJKQRS"  # none is like its mirror image
FEATURES = 64
PHOTOGRAPHS = ("cifar10", "photos64")  # read from a folder, which is sorted by class
EPOCHS = dict(shapes=4, letters=4, cifar10=16, photos64=12)  # a few minutes of one core


def draw_letter(index, size=32):
    """(RGB image, label) of a letter, a pure function of the index: ink on paper, grey.

    Stroke, slant, size, proportion, place, rotation and both greys vary; label = index % 10.
    """
    label = index % len(LETTERS)
    numbers = np.random.default_rng((7, index)).random(9)
    big = 4 * size  # drawn at four times the size, then averaged
    page = Image.new("L", (2 * big, 2 * big))
    font = ImageFont.load_default(big * (0.55 + 0.3 * numbers[0]))
    stroke = round(numbers[1] * big * 0.035)
    where = dict(font=font, anchor="mm", stroke_width=stroke)
    ImageDraw.Draw(page).text((big, big), LETTERS[label], 255, **where)

    slant, turn = 0.6 * (numbers[2] - 0.5), 0.5 * (numbers[3] - 0.5)
    stretch = np.exp(0.4 * (numbers[4] - 0.5))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    forward = rotation @ np.array([[1, slant], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    inverse = np.linalg.inv(forward)
    centre = big / 2 + 0.2 * big * (numbers[5:7] - 0.5)
    offset = big - inverse @ centre
    rows = (*inverse[0], offset[0], *inverse[1], offset[1])
    page = page.transform((big, big), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)

    cover = np.asarray(page.reduce(4), dtype=np.float32) / 255
    paper, ink = 0.8 + 0.2 * numbers[7], 0.3 * numbers[8]
    grey = paper + (ink - paper) * cover
    return Image.fromarray((grey * 255 + 0.5).astype(np.uint8)).convert("RGB"), label


def drawn(draw, first, count):
    """Images (count, 3, 32, 32) in [-1, 1] and labels (count,), numbers first to first + count."""
    pairs = [draw(index) for index in range(first, first + count)]
    return as_tensors([picture for picture, _ in pairs], [label for _, label in pairs])


def as_tensors(pictures, labels):
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def read_folder(folder):
    files, _ = train.list_images(str(folder))
    pictures = [sample.read_image(path) for path, _ in files]  # all of one size
    return as_tensors(pictures, [label for _, label in files])


def images_of(kind, data=None):
    """((images, labels) to train the judge on, the same to compare with), none seen by a model.

    But for photographs, where the judge is trained on the model's own training images.
    """
    if kind in PHOTOGRAPHS:
        return read_folder(Path(data, "train")), read_folder(Path(data, "test"))
    draw = dict(shapes=train.draw_shape, letters=draw_letter)[kind]
    return drawn(draw, 1_000_000, 16_000), drawn(draw, 2_000_000, 2_000)


def network(classes, size=32):
    """Images (B, 3, H, W) -> logits; all but the last layer give features of unit variance."""
    widths = (32, 64, 96, 96)
    while size > 32:  # thinner levels come first: twice the size, half the width
        widths = (widths[0] // 2, *widths)
        size //= 2
    cells = (size // 8) ** 2  # after three more halvings

    layers = []
    for level, (before, after) in enumerate(itertools.pairwise((3, *widths))):
        stride = 2 if level else 1
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * cells, FEATURES)]
    layers += [nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, classes)]
    return nn.Sequential(*layers)


def roughen(images, generator):
    """Blur and noise of random strength, so that slightly soft images are judged fairly."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    strength = 1.5 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 0.5
    blur, noise = strength.clamp(min=0)
    grain = torch.randn(images.shape, generator=generator)
    return images + blur * (blurred - images) + 0.1 * noise * grain


def moved(images, generator):
    """Images shifted by up to a sixteenth and half of them mirrored: photographs are few."""
    reach = images.shape[-1] // 16
    padded = F.pad(images, 4 * (reach,), mode="reflect")
    x, y, mirror = torch.randint(2 * reach + 1, (3,), generator=generator).tolist()
    images = padded[:, :, y : y + images.shape[2], x : x + images.shape[3]]
    return images.flip(-1) if mirror % 2 else images


def train_judge(kind, images, labels, epochs, cache=None, seed=0, batch=64):
    """The trained network in eval mode; of letters it has ten more classes, their mirror images."""
    mirrored = kind == "letters"
    classes = (int(labels.max()) + 1) * (1 + mirrored)
    some = images[::20] if kind == "photos64" else images[:20]  # two sets of photos may begin alike
    same = [zlib.crc32(some.numpy().tobytes()), len(images), epochs, seed]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = network(classes, images.shape[-1])
    if cache is not None and Path(cache).exists():
        kept = torch.load(cache, weights_only=True)
        if kept["same"] == same:
            judge.load_state_dict(kept["state"])
            return judge.eval()

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    total = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) - len(order) % batch].split(batch):
            pictures, targets = roughen(images[rows], generator), labels[rows]
            if kind in PHOTOGRAPHS:
                pictures = moved(pictures, generator)
            if mirrored:
                flip = torch.rand(len(rows), generator=generator) < 0.3
                pictures = torch.where(flip[:, None, None, None], pictures.flip(-1), pictures)
                targets = targets + 10 * flip
            loss = F.cross_entropy(judge(pictures), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if cache is not None:
        torch.save({"same": same, "state": judge.state_dict()}, cache)
    return judge.eval()


@torch.no_grad()
def features(judge, images):
    """images (B, 3, H, W) in [-1, 1] -> (B, FEATURES) float64."""
    return torch.cat([judge[:-1](part) for part in images.float().split(500)]).double()


@torch.no_grad()
def accuracy(judge, images, labels):
    """The share of images that the judge takes for the class in labels (B,)."""
    taken = torch.cat([judge(part).argmax(1) for part in images.float().split(500)])
    return (taken == labels).double().mean().item()


def frechet(features_a, features_b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to (N, D) and (M, D)."""
    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    traces = covariance_a.trace() + covariance_b.trace() - 2 * middle
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


def recall(samples, reference, k=3):
    """The share of reference (M, D) as near to a sample (N, D) as the k-th nearest other sample."""
    radius = torch.cdist(samples, samples).kthvalue(k + 1).values  # (N,); the nearest is itself
    is_near = torch.cdist(reference, samples) <= radius  # (M, N)
    return is_near.any(1).double().mean().item()


def models_of(run):
    """(params, codec, options of `sample.steps`) of a run folder, as sample.py reads it."""
    params, codec, _, options = sample.load_models(sample.parser().parse_args([str(run)]))
    return params, codec, options


@torch.no_grad()
def after_each_scale(codec, images, scales):
    """(S, B, 3, H, W): images (B, 3, H, W) in [-1, 1], decoded after each scale."""
    made = []
    for part in images.split(64):
        pyramid = tokenizer.quantise(codec, tokenizer.encode_features(codec, part), scales)
        decoded = [tokenizer.decode_features(codec, f_hat) for _, _, f_hat in pyramid]
        made.append(torch.stack(decoded))
    return torch.cat(made, 1)


def perplexity(codes):
    """e to the entropy of codes (N,)."""
    share = codes.bincount() / len(codes)
    return torch.special.entr(share).sum().exp().item()


def draw_samples(run, flags):
    """(images, labels asked for): 50 of each class, by `sample.py RUN` and the flags."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/samples.npz"
        wanted = ["--labels", "all", "--count", "50", "--seed", "7000", "--out", path]
        if sample.main([str(run), *wanted, *flags]):
            raise SystemExit(2)
        with np.load(path) as file:
            return as_tensors(file["arr_0"], file["labels"])


def report(kind, judge, held_out, run, flags=()):
    """Prints numbers of a run folder, and returns them as a dict."""
    start = time.perf_counter()
    images, labels = held_out
    reference = features(judge, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    halves = reference[order].chunk(2)

    # what the tokenizer keeps
    params, codec, _ = models_of(run)
    scales = hmar.scales(params)
    few = images[:1000]
    if kind in PHOTOGRAPHS:  # sorted by class
        few = images[torch.arange(len(few)) * len(images) // len(few)]
    decoded = after_each_scale(codec, few, scales)
    psnr = 10 * torch.log10(4 / (decoded - few).square().mean((2, 3, 4)))  # (S, B)
    tokens = torch.cat([tokenizer.encode(codec, part, scales) for part in few.split(64)])
    codes = tokens.split([height * width for height, width in scales], dim=1)

    # what is drawn
    pixels, asked = draw_samples(run, flags)
    drawn_features = features(judge, pixels)

    numbers = dict(
        judge=accuracy(judge, images, labels),
        right=accuracy(judge, pixels, asked),
        samples=frechet(drawn_features, reference),
        reconstructions=frechet(features(judge, decoded[-1]), reference),
        held_out=frechet(*halves),
        recall=recall(drawn_features, reference),
    )
    shown = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    shown += f" (k = 3, {len(pixels)} samples, {len(images)} images)  PSNR after each scale "
    shown += " ".join(f"{value:.1f}" for value in psnr.mean(1).tolist()) + "  perplexity "
    shown += " ".join(f"{perplexity(part.flatten()):.0f}" for part in codes)
    print(f"{kind} {run} {' '.join(flags)}  {shown}")

    # for programs
    numbers |= dict(frechet=numbers["samples"], seconds=time.perf_counter() - start)
    numbers["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name in ("right", "frechet", "recall", "reconstructions", "seconds", "peak_mb"):
        print(f"{name} {numbers[name]:.6g}", flush=True)
    return numbers


@torch.no_grad()
def report_edits(kind, judge, held_out, run, count=200):
    """Prints, of held-out images with a half repainted, the share right and the seam:

    the mean jump across it over that of the originals.
    """
    images, labels = (rows[:count] for rows in held_out)
    params, codec, options = models_of(run)
    middle = images.shape[3] // 2
    for turn, name in enumerate(("left", "lower", "right", "upper")):
        mask = torch.zeros(count, 1, *images.shape[2:], dtype=torch.bool)
        mask[..., :middle] = True
        mask = mask.rot90(turn, (2, 3))
        made = sample.edit(params, codec, images, mask, labels, seed=8000, **options)

        upright = torch.stack([made, images]).rot90(-turn, (3, 4))
        jumps = (upright[..., middle] - upright[..., middle - 1]).abs().mean((1, 2, 3))
        right, seam = accuracy(judge, made, labels), jumps[0] / jumps[1]
        print(f"{kind} {run}  {name}  right {right:.3g}  seam {seam:.3g}", flush=True)


def write_letters(folder):
    """The letters as a data set, one sub-folder a class."""
    for index in range(4000):
        picture, label = draw_letter(index)
        place = Path(folder, LETTERS[label])
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{index:05d}.png")


def write_pictures(run, folder):
    """growth.png, samples after each scale; edit.png, drawings whose right half is repainted."""
    params, codec, _ = models_of(run)
    params, codec = hmar.cast(params, torch.bfloat16), tokenizer.cast(codec, torch.bfloat16)

    names = ["star", "cross", "crescent", "arrow", "heart"]
    labels = torch.tensor([train.SHAPES.index(name) for name in names])
    last = {step.scale: step.f_hat for step in sample.steps(params, codec, labels, seed=100)}
    grown = torch.stack([sample.decode_in_parts(codec, f_hat) for f_hat in last.values()], 1)
    sample.sheet(list(grown), names).save(Path(folder, "growth.png"))

    names, rows = ["disc", "triangle", "cross", "arrow", "heart"], []
    for label in map(train.SHAPES.index, names):
        image = drawn(train.draw_shape, 20_000 + label, 1)[0]  # held out; (1, 3, 32, 32)
        mask = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
        mask[..., 16:] = True
        labels = torch.full((3,), label)
        made = sample.edit(params, codec, image.expand(3, -1, -1, -1), mask, labels, seed=5)
        rows.append(torch.cat([image, image.masked_fill(mask[:1], 0), made]))
    sample.sheet(rows, names).save(Path(folder, "edit.png"))


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("kind", choices=EPOCHS)
    parser.add_argument("run", nargs="*", help="run folders")
    parser.add_argument("--data", help="of photographs")
    parser.add_argument("--edit", action="store_true", help="judge edits, not samples")
    parser.add_argument("--write", metavar="DIR", help="write letters, or pictures, there instead")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_intermixed_args(argv[:end]), argv[end + 1 :]

    if args.write and args.kind == "letters":
        return write_letters(args.write)
    if args.write:
        return write_pictures(args.run[0], args.write)
    training, held_out = images_of(args.kind, args.data)
    cache = Path(tempfile.gettempdir(), f"judge-{args.kind}.pt")
    judge = train_judge(args.kind, *training, epochs=EPOCHS[args.kind], cache=cache)
    for run in args.run:
        if args.edit:
            report_edits(args.kind, judge, held_out, run)
        else:
            report(args.kind, judge, held_out, run, flags)


if __name__ == "__main__":
    main()
