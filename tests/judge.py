"""Four data sets and their judges: classifiers that never see the model.

tests/judge.py shapes RUN              the built-in shapes of train.py
tests/judge.py letters RUN             Pillow's own font; a mirrored letter counts as a wrong one
tests/judge.py cifar10 RUN --data DIR  DIR holds train/ and test/, one sub-folder a class
tests/judge.py photos64 RUN --data DIR the same for photographs of any classes and size
tests/judge.py cifar10 RUN --data DIR --others DIR --fresh DIR   the judge learns, and samples are
                                       compared with, images of other folders than those of --data
tests/judge.py photos64 RUN --data DIR --others DIR   the judge learns features from images of other
                                       classes, then a linear classifier of these features
tests/judge.py KIND RUN ... --choose "--guidance 4 --rise 0" "--guidance 6"   chooses the settings
                                       with the lowest FD on one half of the images, in the mean of
                                       all runs, and reports on the other half
tests/judge.py KIND RUN ... --edit 300 so many unseen images, whose halves or middle are repainted
tests/judge.py KIND RUN ... --edit 100 --without evidence   the same without a part of the method
tests/judge.py letters --write DIR     4,000 letters as a data set for train.py --data
tests/judge.py shapes RUN --write DIR  growth.png, samples after each scale, and edit.png
tests/judge.py photos64 RUN --data DIR --write DIR   its edit-photos64.webp

RUN is a run folder, sampled with sample.py's defaults and the flags after a --, say -- --top-p .9.
Images that no model saw are split into two halves: settings are chosen by the first, and what is
printed compares with the second.

Prints, a name and numbers a line: held-out loss; accuracy, the share that the judge takes for their
class, of real images and of samples; FD, the Frechet distance in the judge's features (Heusel et
al. 2017, section 2), of samples and of reconstructions to real images; recall (Kynkaanniemi et al.
2019, section 3); seconds of a core to sample 500 images; memory (Linux); of samples and
reconstructions the power in eight bands of frequency over that of real images; of 1,000 real images
the PSNR after each scale and the perplexity of its codes.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
import hmar
import sample
import tokenizer
import train

LETTERS = "2345GJKQRS"  # none is like its mirror image
FEATURES = 64
PHOTOGRAPHS = ("cifar10", "photos64")  # read from a folder
EPOCHS = dict(shapes=4, letters=4, cifar10=16, photos64=12)  # training takes minutes
OTHER_EPOCHS = 24  # of a network that learns other classes


def draw_letter(index, size=32):
    """(RGB image, label) of a letter, a pure function of the index: ink on paper, grey.

    Size, shape, place, turn and both greys vary; label = index % 10.
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


def read_folder(folder, class_names):
    """ValueError where the classes are others: their numbers would be."""
    dataset = train.Folder(folder)
    if dataset.classes != class_names:
        raise ValueError(f"{folder}: got classes {dataset.classes}, expected {class_names}")
    return as_tensors(*zip(*dataset))  # all of one size


def images_of(kind, data=None, others=None, fresh=None):
    """[(images, labels) to train the judge on, the same to compare with].

    Models see none of the images to compare with. They see those that the judge is trained on, too,
    unless there are others. others and fresh are folders that take the places of data/train and
    data/test; images that data holds as well are left out.
    """
    if kind in PHOTOGRAPHS:
        names = train.Folder(f"{data}/train").classes
        parts = [read_folder(Path(data, part), names) for part in ("train", "test")]
        known = {image.numpy().tobytes() for images, _ in parts for image in images}
        for part, folder in enumerate((others, fresh)):
            if folder is not None:
                has_other_classes = kind == "photos64" and folder == others
                own = train.Folder(folder).classes if has_other_classes else names
                images, labels = read_folder(folder, own)
                is_new = torch.tensor([image.numpy().tobytes() not in known for image in images])
                parts[part] = images[is_new], labels[is_new]
        return parts
    draw = dict(shapes=train.draw_shape, letters=draw_letter)[kind]
    return [drawn(draw, 1_000_000, 16_000), drawn(draw, 2_000_000, 2_000)]


def halves(images, labels):
    """[(images, labels) that settings are chosen by, the same to report on]: a random split."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    middle = len(order) // 2
    return [(images[rows], labels[rows]) for rows in (order[:middle], order[middle:])]


def network(classes, size=32, wider=1):
    """Images (B, 3, H, W) -> logits; the last layer reads features of unit variance."""
    widths = [wider * width for width in (32, 64, 96, 96)]
    while size > 32:  # thinner levels come first: twice the size, half the width
        widths = (widths[0] // 2, *widths)
        size = -(-size // 2)
    cells = (-(-size // 8)) ** 2  # after three halvings

    layers = []
    for level, (before, after) in enumerate(itertools.pairwise((3, *widths))):
        stride = 2 if level else 1
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * cells, FEATURES)]
    layers += [nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, classes)]
    # With channels last training takes half of the time.
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def roughen(images, generator):
    """Blur and noise of random strength: soft images are judged fairly."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    strength = 1.5 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 0.5
    blur, noise = strength.clamp(min=0)
    grain = torch.randn(images.shape, generator=generator)
    return images + blur * (blurred - images) + 0.1 * noise * grain


def moved(images, generator):
    """A batch shifted by up to a sixteenth, two of five mirrored: photographs are few."""
    reach = images.shape[-1] // 16
    padded = F.pad(images, 4 * (reach,), mode="reflect")
    x, y, mirror = torch.randint(2 * reach + 1, (3,), generator=generator).tolist()
    images = padded[:, :, y : y + images.shape[2], x : x + images.shape[3]]
    return images.flip(-1) if mirror % 2 else images


def train_judge(kind, images, labels, batch=64, probe=None):
    """The network, trained once, in eval mode; of letters, mirrored ones are ten more classes.

    probe: (images, labels) of the classes to be judged, if the network learns other ones: a linear
    classifier of its features is then trained on these.
    """
    if probe is not None:
        judge = train_judge(f"{kind}-others", images, labels, batch)
        return fit_probe(judge, *probe)
    mirrored, epochs = kind == "letters", EPOCHS.get(kind, OTHER_EPOCHS)
    classes = (int(labels.max()) + 1) * (1 + mirrored)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = network(classes, images.shape[-1], 1 if kind in EPOCHS else 2)
    depends = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
    for function in (network, roughen, moved, train_judge):
        depends.update(inspect.getsource(function).encode())
    cache = Path.home() / f".cache/hmar/judge-{kind}-{epochs}-{depends.hexdigest()[:16]}.pt"
    cache.parent.mkdir(parents=True, exist_ok=True)
    if cache.exists():
        judge.load_state_dict(torch.load(cache, weights_only=True))
        return judge.eval()

    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    total = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) - len(order) % batch].split(batch):
            pictures, targets = roughen(images[rows], generator), labels[rows]
            if kind not in ("shapes", "letters"):
                pictures = moved(pictures, generator)
            if mirrored:
                flip = torch.rand(len(rows), generator=generator) < 0.3
                pictures = torch.where(flip[:, None, None, None], pictures.flip(-1), pictures)
                targets = targets + 10 * flip
            with torch.autocast("cpu", torch.bfloat16, enabled=kind not in EPOCHS):
                scores = judge(pictures.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    train.write_file(cache, lambda file: torch.save(judge.state_dict(), file))
    return judge.eval()


def fit_probe(judge, images, labels):
    """The judge with another last layer: logistic regression of its features."""
    rows = features(judge, images).float()
    probe = nn.Linear(rows.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(probe(rows), labels) + 1e-3 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return nn.Sequential(*judge[:-1], probe)


@torch.no_grad()
def features(judge, images):
    """images (B, 3, H, W) in [-1, 1] -> (B, FEATURES) float64."""
    return torch.cat([judge[:-1](part) for part in images.float().split(500)]).double()


@torch.no_grad()
def accuracy(judge, images, labels):
    """The share of images taken for the class in labels (B,)."""
    taken = judge[-1](features(judge, images).float()).argmax(1)
    return (taken == labels).double().mean().item()


def frechet(a, b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to (N, D) and (M, D)."""
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


def power(images, bands=8):
    """(bands,): mean power of grey images by radial frequency, to half a cycle a pixel."""
    grey = images.mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    rows, columns = (torch.hann_window(side, periodic=False) for side in grey.shape[1:])
    spectrum = torch.fft.fft2(grey * rows[:, None] * columns).abs().square().mean(0)
    y, x = (torch.fft.fftfreq(side) for side in grey.shape[1:])
    band = (2 * bands * torch.hypot(y[:, None], x)).long()
    return torch.stack([spectrum[band == number].mean() for number in range(bands)])


def choose_settings(judge, images, runs, choices, flags):
    """The one of choices ("--flag value ...", of sample.py) with the lowest mean FD of the runs."""
    reference, distances = features(judge, images), {}
    for choice in choices:
        sampled = [draw_samples(run, [*flags, *choice.split()]) for run in runs]
        right = np.mean([accuracy(judge, pixels, asked) for pixels, asked, *_ in sampled])
        fds = [frechet(features(judge, pixels), reference) for pixels, *_ in sampled]
        distances[choice] = np.mean(fds)
        words = f"accuracy {right:.4g}  FD {distances[choice]:.4g}, by which it is chosen"
        print(f"{choice}: {words};", *(f"{x:.4g}" for x in fds), flush=True)
    return min(distances, key=distances.get)


def model_of(run, flags=()):
    """(model, settings that flags of sample.py replace in it) of a run folder."""
    model = sample.load_model(run)
    args = sample.parser().parse_args([str(run), *flags])
    settings = {name: x for name, x in vars(args).items() if name in sample.SETTINGS}
    if "mask_steps" in args:
        scales = hmar.scale_sizes(model["transformer"])
        settings["schedule"] = sample.masked_schedule(scales, args.mask_steps)
    return model, settings


DRAW = """import pathlib, re, sys, time, sample
start = time.process_time()
sample.main(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()
print(time.process_time() - start, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)"""


def draw_samples(run, flags):
    """(images, labels asked for, seconds of a core for 500, peak MB): 50 a class, by sample.py."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/samples.npz"
        wanted = ["--count", "50", "--seed", "7000", "--out", path]
        command = [sys.executable, "-c", DRAW, run, *wanted, *flags]
        said = subprocess.check_output(command, env=os.environ | dict(PYTHONPATH=ROOT))
        with np.load(path) as file:
            pixels, asked = as_tensors(file["arr_0"], file["labels"])
    seconds, peak_mb = map(float, said.split()[-2:])
    return pixels, asked, seconds * 500 / len(asked), peak_mb


@torch.no_grad()
def report(judge, held_out, run, flags=()):
    """{name: number or numbers} of a run folder."""
    images, labels = held_out
    reference, real_power = features(judge, images), power(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

    # what the tokenizer keeps
    model, _ = model_of(run)
    codec, few = model["tokenizer"], images[order[:1000]]
    scales = hmar.scale_sizes(model["transformer"])
    parts = [tokenizer.encode(codec, part, scales) for part in few.split(64)]
    decoded = torch.cat([tokenizer.decode(codec, tokens, scales) for tokens in parts])
    kept, _ = train.evaluate_tokenizer(codec, few, scales)

    log = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    evaluations = [x for x in log if x["stage"] == "next-scale" and "held_out_loss" in x]

    # what is sampled
    pixels, asked, seconds, peak_mb = draw_samples(run, flags)
    sampled = features(judge, pixels)
    return dict(
        loss=evaluations[-1]["held_out_loss"],
        real_accuracy=accuracy(judge, images, labels),
        accuracy=accuracy(judge, pixels, asked),
        fd=frechet(sampled, reference),
        reconstructions_fd=frechet(features(judge, decoded), reference),
        recall=recall(sampled, reference),
        power=power(pixels) / real_power,
        power_reconstructions=power(decoded) / real_power,
        seconds=seconds,
        peak_mb=peak_mb,
        psnr=kept["held_out_psnr"],
        perplexity=kept["held_out_perplexity"],
    )


def show(numbers):
    for name, value in numbers.items():
        print(name, *(f"{x:.4g}" for x in np.atleast_1d(value)), flush=True)


def edits_of(run, flags=()):
    """A function (images, mask, labels, seeds) -> edited images: `sample.edit` of a run folder."""
    model, options = model_of(run, flags)
    dtype = sample.find_dtype(None, torch.device("cpu"))
    model["tokenizer"] = tokenizer.cast(model["tokenizer"], dtype)
    model["transformer"] = hmar.cast(model["transformer"], dtype)
    options["particles"] = sample.parser().parse_args([str(run), *flags]).particles
    return lambda *given: sample.edit(model, *given[:3], seed=given[3], **options)


# What takes the place of parts of `sample.edit`, to measure what they are worth.
WITHOUT = dict(
    evidence=lambda codebook, residual, outside, size: codebook.new_zeros(
        len(residual), size[0] * size[1], len(codebook)
    ),
    extrapolate=lambda images, visible, reach: torch.zeros_like(images),
)


@torch.no_grad()
def report_edits(judge, held_out, edit, count):
    """Prints of images whose halves, or the middle quarter, are repainted: accuracy; the squared
    error of what was hidden; at the mask's edge, the jumps divided by those of the originals;
    seconds of a core for an edit. edit: see `edits_of`.
    """
    images, labels = (rows[:count] for rows in held_out)  # in random order
    middle, quarter = images.shape[3] // 2, images.shape[3] // 4
    left, box = (torch.zeros_like(images[:, :1], dtype=torch.bool) for _ in range(2))
    left[..., :middle] = True
    box[..., quarter : quarter + middle, quarter : quarter + middle] = True
    masks = {
        name: left.rot90(i, (2, 3)) for i, name in enumerate(("left", "lower", "right", "upper"))
    }

    def jumps(pictures, mask):
        """The mean difference between pixels on both sides of the mask's edge."""
        total = count = 0
        for axis in (2, 3):
            edge = mask.diff(dim=axis)
            total += (pictures.diff(dim=axis).abs().mean(1, keepdim=True) * edge).sum()
            count += edge.sum()
        return total / count

    for name, mask in (masks | dict(middle=box)).items():
        begun = time.process_time()
        rows = torch.arange(len(images)).split(25)
        own = [(images[i], mask[i], labels[i], (8000 + i).tolist()) for i in rows]
        made = torch.cat([edit(*given) for given in own])
        seconds = (time.process_time() - begun) / len(made)
        error = (made - images).square().mean(1, keepdim=True)[mask].mean()
        words = f"accuracy {accuracy(judge, made, labels):.3g}  error {error:.3g}"
        words += f"  seam {jumps(made, mask) / jumps(images, mask):.3g}"
        print(f"{name}  {words}  {seconds:.3g} s", flush=True)


def write_letters(folder):
    for index in range(4000):
        picture, label = draw_letter(index)
        path = Path(folder, LETTERS[label], f"{index:05d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


@torch.no_grad()
def write_growth(run, path):
    """Samples of every second shape, decoded after each scale."""
    model, _ = model_of(run)
    codec, settings = model["tokenizer"], model["sampling"]
    labels, names = torch.arange(0, 10, 2), train.SHAPES[::2]
    passes = sample.steps(model["transformer"], codec, labels, seed=100, **settings)
    last = {step.scale: step.f_hat for step in passes}
    grown = torch.stack([tokenizer.decode_features(codec, f_hat) for f_hat in last.values()], 1)
    sample.sheet(list(grown), names).save(path)


@torch.no_grad()
def write_edits(run, images, labels, path):
    """The first image of each of ten classes, its right half hidden, and three edits of it."""
    model, _ = model_of(run)
    names = model["classes"][:10]
    first = [int((labels == label).nonzero()[0]) for label in range(len(names))]
    images, labels = images[first], labels[first]
    mask = torch.zeros_like(images[:, :1], dtype=torch.bool)
    mask[..., images.shape[3] // 2 :] = True
    made = [sample.edit(model, images, mask, labels, seed=seed) for seed in (100, 200, 300)]
    columns = [images, images.masked_fill(mask, 0), *made]
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.sheet(list(torch.stack(columns, 1)), names).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1])
    parser.add_argument("kind", choices=[*EPOCHS])
    parser.add_argument("run", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--others")
    parser.add_argument("--fresh")
    parser.add_argument("--choose", nargs="+")
    parser.add_argument("--edit", type=int, metavar="IMAGES")
    parser.add_argument("--without", nargs="+", choices=[*WITHOUT], default=[])
    parser.add_argument("--write")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_intermixed_args(argv[:end]), argv[end + 1 :]

    if args.write and args.kind == "letters":
        return write_letters(args.write)
    if args.write and args.kind == "shapes":
        write_growth(args.run[0], Path(args.write, "growth.png"))
        images = drawn(train.draw_shape, 500_000, 10)
        return write_edits(args.run[0], *images, Path(args.write, "edit.png"))
    if args.write:
        names = train.Folder(f"{args.data}/train").classes
        test = read_folder(f"{args.data}/test", names)
        return write_edits(args.run[0], *test, Path(args.write, f"edit-{args.kind}.webp"))

    if args.kind in PHOTOGRAPHS and not args.data:
        parser.error("--data: expected")
    training, held_out = images_of(args.kind, args.data, args.others, args.fresh)
    probe = None
    if args.others and args.kind == "photos64":  # whose classes are other ones
        names = train.Folder(f"{args.data}/train").classes
        probe = read_folder(f"{args.data}/train", names)
    judge = train_judge(args.kind, *training, probe=probe)
    own, unseen = accuracy(judge, *(probe or training)), accuracy(judge, *held_out)
    print(f"{args.kind}: accuracy on {unseen:.4g} of unseen images, {own:.4g} of the judge's own")
    choosing, reporting = halves(*held_out)
    of_halves = frechet(*(features(judge, images) for images, _ in (choosing, reporting)))
    print(f"FD of the two halves of unseen images to each other {of_halves:.4g}")
    for name in args.without:
        setattr(sample, name, WITHOUT[name])
    if args.choose:
        flags += choose_settings(judge, choosing[0], args.run, args.choose, flags).split()
    for run in args.run:
        print(f"\n{args.kind} {run}", *flags)
        if args.edit:
            report_edits(judge, reporting, edits_of(run, flags), args.edit)
        else:
            show(report(judge, reporting, run, flags))


if __name__ == "__main__":
    main()
