"""Data and training: drawn shapes or folders of images, then the tokenizer, next-scale and masked stages."""
import colorsys
import functools
import hashlib
import itertools
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "hexagon", "arrow", "heart")


def circle(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular polygon around (centre, 0), the first at the angle start in radians, y pointing down."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@functools.cache
def outline(shape):
    """The polygon (N, 2) that fills a shape of SHAPES within about the unit circle, then the polygons cut out of it."""
    if shape == "disc":
        return (circle(),)
    if shape == "ring":
        return circle(), circle(radius=0.5)
    if shape == "crescent":
        return circle(), circle(radius=0.75, centre=0.5)
    if shape == "hexagon":
        return (circle(points=6),)
    if shape == "star":
        return (np.stack([circle(5, start=-np.pi / 2), circle(5, radius=0.4, start=-np.pi * 0.3)], axis=1).reshape(10, 2),)
    if shape == "heart":
        angle = np.linspace(0, 2 * np.pi, 48)
        height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        return (np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1),)
    return (np.array({
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0, -1), (0.95, 0.7), (-0.95, 0.7)],
        "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                  (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        "arrow": [(1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)],
    }[shape]),)


def draw_shape(index, size=32):
    """The built-in data set: (RGB image of size x size, label), a pure function of the index; label = index % 10, an index into SHAPES.

    Bright fill on a dark background that is flat or blends two colours; the shape's colour, place, size and rotation (within .25 rad)
    vary. The random numbers do not depend on size, so sizes show the same picture. ValueError for index < 0 or size < 8.
    """
    for name, value, least in (("index", index, 0), ("size", size, 8)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    label = int(index) % len(SHAPES)
    hue, saturation, value, radius, x, y, turn, blend, direction, *dark = np.random.default_rng(int(index)).random(15).tolist()
    fill = np.float32(colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.85 + 0.15 * value))
    first, second = (np.float32(colorsys.hsv_to_rgb(dark[i], dark[i + 1], 0.3 * dark[i + 2])) for i in (0, 3))
    radius, angle = (9.5 + 4 * radius) / 32, 0.5 * turn - 0.25
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([12 + 8 * x, 12 + 8 * y]) / 32
    mask = Image.new("L", (4 * size, 4 * size))  # drawn at four times the size, then averaged: smooth edges
    for polygon, ink in zip(outline(SHAPES[label]), (255, 0)):
        ImageDraw.Draw(mask).polygon(((centre + radius * polygon @ rotation) * 4 * size).ravel().tolist(), fill=ink)
    cover = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255
    ground = first
    if blend < 0.5:
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        way = 2 * np.pi * direction
        ground = first + (second - first) * (0.5 + (np.cos(way) * ramp + np.sin(way) * ramp[:, None]) / 2**0.5)[:, :, None]
    picture = ground + cover * (fill - ground)  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8)), label


def list_images(folder):
    """([(path, label), ...], class names) of a folder: one sub-folder a class, searched to any depth, or images alone as one class.

    Sorted by name; a label is an index into the names. Hidden files, and files that are no images by suffix, are passed over;
    directories that cannot be read are named on stderr. ValueError for a folder that is missing, without images, or of both kinds.
    """
    def complain(error):
        print(f"passed over: {error}", file=sys.stderr)

    def images(place, names):
        suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
        return [os.path.join(place, name) for name in sorted(names) if name.lower().endswith(suffixes) and not name.startswith(".")]

    def below(top):
        for place, folders, names in os.walk(top, onerror=complain):  # links are not followed, so that loops end
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from images(place, names)

    def is_class(name):  # a link back up to the folder is none
        link = os.path.join(os.path.realpath(os.path.join(folder, name)), "")
        return not name.startswith(".") and not os.path.join(home, "").startswith(link)

    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        state = "no folder" if os.path.exists(folder) else "missing"
        raise ValueError(f"data: expected a folder of images, got {folder!r}, which is {state}")
    _, folders, names = next(os.walk(folder, onerror=complain), (folder, [], []))
    own, home = images(folder, names), os.path.realpath(folder)
    groups = {name: paths for name in sorted(folders) if is_class(name) and (paths := list(below(os.path.join(folder, name))))}
    if own and groups:
        both = f"{os.path.basename(own[0])!r} beside the sub-folder {next(iter(groups))!r}"
        raise ValueError(f"data: expected one sub-folder a class or images alone, got both in {folder!r}: {both}")
    if not own and not groups:
        raise ValueError(f"data: expected PNG, JPEG, WebP, BMP or GIF images, got {folder!r}, which holds none")
    groups = groups or {os.path.basename(home): own}
    return [(path, label) for label, paths in enumerate(groups.values()) for path in paths], tuple(groups)


def read_image(path, shortest=None):
    """The first frame of an image file as an upright RGB image, transparency on white, 16 bits a channel scaled to 8.

    shortest: where given, a large JPEG may be decoded at a fraction of its size, no side below that (much faster).
    ValueError that names the path and the reason for a file that is broken, truncated or above 100 million pixels.
    """
    try:
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise OSError("no regular file")
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as image:
            if image.width * image.height > 100_000_000:
                raise OSError(f"{image.width} x {image.height} pixels, more than 100 million")
            if shortest is not None:
                image.draft(None, (shortest, shortest))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it
                return Image.fromarray((np.asarray(image, dtype=np.float32).clip(0, 65535) / 257 + 0.5).astype(np.uint8)).convert("RGB")
            if "transparency" in image.info or "A" in image.getbands():
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = "no image of these formats" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {str(reason) or type(error).__name__}") from error


def check_images(files):
    """The files [(path, label), ...] that can be read, after decoding each once; every other one is named on stderr.

    ValueError with a list when more than 5 % (and more than ten) are broken, or none is left.
    """
    def fault(path):
        try:
            read_image(path, shortest=1)
        except ValueError as error:
            return str(error)

    def faults_of(start):  # 32 files a task, since a million tasks waiting would fill the memory
        return [fault(path) for path, _ in files[start:start + 32]]

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        faults = list(itertools.chain.from_iterable(pool.map(faults_of, range(0, len(files), 32))))
    broken = [reason for reason in faults if reason]
    if len(broken) > max(0.05 * len(files), 10) or len(broken) == len(files):
        more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(f"data: {len(broken)} of {len(files)} images cannot be read: {'; '.join(broken[:10])}{more}")
    for reason in broken:
        print(f"skipped: {reason}", file=sys.stderr)
    return [file for file, reason in zip(files, faults) if not reason]


def split_held_out(files, folder, fraction=0.05):
    """(training, held out) parts of [(path, label), ...], told apart by a hash of the path inside the folder, so that a file stays
    in its part when others come or go. Neither part is empty. ValueError for fewer than two files or a fraction outside [0, 1)."""
    if len(files) < 2:
        raise ValueError(f"data: expected at least two images, one to train on and one held out, got {len(files)} in {folder}")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected the held-out part of the images, at least 0 and below 1, got {fraction}")

    def place(file):
        name = os.path.relpath(file[0], folder).replace(os.sep, "/")
        return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64

    places = [place(file) for file in files]
    limit = min(max(fraction, min(places)), np.nextafter(max(places), 0))
    return [file for file, at in zip(files, places) if at > limit], [file for file, at in zip(files, places) if at <= limit]


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
    box = (left, top, min(left + reach, width), min(top + reach, height))
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    return ImageOps.mirror(image) if mirror else image


class Images(torch.utils.data.Dataset):
    """Images as (uint8 (3, size, size), label). items: a sequence of (path, label), or of numbers of drawings, such as range(20_000).

    A key is a pair (index, seed), so that a sampler decides the randomness: seed None is the centre crop, any other one decides crop and
    flip alone. Drawings vary enough by themselves and are always whole.
    """
    def __init__(self, items, size, flip=True):
        self.items, self.size, self.flip = items, size, flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed = key
        item = self.items[index]
        if isinstance(item, (int, np.integer)):
            image, label = draw_shape(item, self.size)
        else:
            path, label = item
            image = crop(read_image(path, shortest=2 * self.size), self.size, seed, self.flip)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), label
