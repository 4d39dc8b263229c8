"""Data: built-in shapes, folders of images, how they are read, cropped and held out; the judge."""

import io
import os
from pathlib import Path

import judge  # puts the repository on the path
import numpy as np
import pytest
import torch
from helpers import captured, failure, normal, prepared
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train

PICTURE = train.draw_shape(4, 48)[0].resize((60, 48))
pytestmark = pytest.mark.usefixtures("own_folder")
FLAGS = ["--depth", 1, "--device", "cpu", "--size", 16, "--data"]


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour, size=(20, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def difference(image, other):
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max())


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.arange(width) % 256, np.arange(height) % 256)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def save(folder, name, image):
    Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
    image.save(Path(folder, name))


@given(st.integers(0, 2**40), st.integers(8, 80))
def test_a_shape_depends_on_its_index_alone(index, size):
    np.random.seed(size)
    image, label = train.draw_shape(index, size)
    again, _ = train.draw_shape(np.int64(index), size)
    assert image.mode == "RGB" and image.size == (size, size) and label == index % 10
    assert image.tobytes() == again.tobytes() != train.draw_shape(index + 10, size)[0].tobytes()


# Reading

TRANSPARENT = flat((200, 0, 0, 0), mode="RGBA")
TRANSPARENT.paste((0, 120, 0, 255), (0, 0, 10, 16))
TRANSPARENT.paste((0, 0, 0, 128), (0, 8, 10, 16))
ON_WHITE = flat("white")
ON_WHITE.paste((0, 120, 0), (0, 0, 10, 16))
ON_WHITE.paste((127, 127, 127), (0, 8, 10, 16))
GREY = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
EIGHT_BITS = Image.fromarray(np.rint(np.asarray(GREY) / 257).astype(np.uint8)).convert("RGB")
CODED = flat(1, (9, 9), "P")  # code 1 is red, code 0 is green
CODED.putpalette([0, 255, 0, 255, 0, 0])
CODED.putpixel((2, 3), 0)
CODED_ON_WHITE = flat("white", (9, 9))
CODED_ON_WHITE.putpixel((2, 3), (0, 255, 0))
RED = flat("red")
FRAMES = dict(save_all=True, append_images=[ON_WHITE])
CASES = {  # name: (bytes of a file, the picture it shows, how far apart they may be)
    "rgb.png": (encoded(PICTURE, "PNG"), PICTURE, 0),
    "rgb.webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, 0),
    "grey.png": (encoded(PICTURE.convert("L"), "PNG"), PICTURE.convert("L").convert("RGB"), 0),
    "frames.gif": (encoded(RED, "GIF", **FRAMES), RED, 0),
    "alpha.png": (encoded(TRANSPARENT, "PNG"), ON_WHITE, 1),
    "palette_alpha.png": (encoded(CODED, "PNG", transparency=1), CODED_ON_WHITE, 0),
    "key.png": (encoded(RED, "PNG", transparency=(255, 0, 0)), flat("white"), 0),
    "cmyk.jpg": (encoded(RED.convert("CMYK"), "JPEG", quality=100), RED, 2),
    "sixteen.png": (encoded(GREY, "PNG"), EIGHT_BITS, 0),
}


@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=20),
    st.integers(0, 10**6),
)
def test_damaged_and_truncated_files_are_read_or_left_out(name, damage, length):
    content = bytearray(CASES[name][0])
    for place, value in damage:
        content[place % len(content)] = value
    Path(name).write_bytes(content[: length % len(content)] if not damage else content)
    run = dict(size=8, crops=2, seed=0, flip=False)
    made = train.read_crops(run, [(Path(name), 3)], 0)
    assert made is None or (made[0].shape == (2, 3, 8, 8) and made[1] == 3)


UPRIGHT = flat("red", (32, 16))
UPRIGHT.paste("lime", (0, 0, 8, 8))
for orientation, undo in enumerate((None, 0, 3, 1, 5, 2, 6, 4), 1):  # members of Transpose
    stored, exif = UPRIGHT if undo is None else UPRIGHT.transpose(undo), Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("png", {}), ("jpeg", dict(quality=100, subsampling=0))):
        content = encoded(stored, kind, exif=exif, **options)
        CASES[f"turned{orientation}.{kind}"] = content, UPRIGHT, 2


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_becomes_the_same_rgb(name):
    content, expected, tolerance = CASES[name]
    Path(name).write_bytes(content)
    image = sample.read_image(name)
    assert image.mode == "RGB" and image.size == expected.size
    assert difference(image, expected) <= tolerance


# What the command prepares of a folder


def test_a_sub_folder_is_a_class():
    kept = ["cat/4.bmp", "cat/5.gif", "cat/6.png", "cat/deep/3.webp", "dog/1.PNG", "dog/2.png"]
    for data, names in (("one", kept), ("two", kept[::-1])):  # in whatever order they came
        for name in names:
            save(data, name, flat(3 * (40 * kept.index(name),)))
    for name in ("cat/.7.png", ".git/8.png", "cat/.old/9.png"):
        save("two", name, RED)
    Path("two/notes.txt").write_text("no image")
    os.mkdir("two/empty")

    def prepare(data):
        """Class names, labels, numbers of images."""
        out = f"run of {Path(data).name}"
        captured(out, *FLAGS, data)
        names = train.read_settings(Path(out))["class_names"]
        return names, [*np.load(f"{out}/labels.npy")], [*prepared(out)[:, 0, 0, 8, 8] // 40]

    names, labels, numbers = prepare("two")
    assert names == ["cat", "dog"] and sorted(numbers) == [*range(6)]
    assert labels == [int(number > 3) for number in numbers]
    assert prepare("one") == (names, labels, numbers)
    names, labels, numbers = prepare("one/dog/")  # images alone are one class
    assert names == ["dog"] and labels == [0, 0] and sorted(numbers) == [4, 5]


def test_a_twentieth_is_held_out_but_never_most():
    counts = [train.count_held_out(count) for count in (2, 80, 1000, 4000, 9000, 10**6)]
    assert counts == [1, 10, 125, 200, 450, 500]


@pytest.fixture
def data(own_folder):
    for number in range(7):
        image = gradient(50, 40) if number == 6 else flat((36 * number, 90, 30), (40, 24))
        save("data", f"{number}.png", image)
    return "data"


def test_images_are_prepared_in_an_order_by_the_seed(data, monkeypatch):
    captured("run", *FLAGS, data)
    captured("other", *FLAGS, data, "--seed", 8)
    images, others = prepared("run"), prepared("other")
    orders = [[image.tobytes() for image in rows[:, 0]] for rows in (images, others)]
    assert len(images) == 7 and orders[0] != orders[1] and set(orders[0]) == set(orders[1])
    monkeypatch.setattr(train, "CROPS", 7)  # as if the folder were large
    captured("large", *FLAGS, data)
    assert np.array_equal(prepared("large"), images[:, :2])


@settings(max_examples=2, phases=[Phase.generate])  # it shrinks slowly
@given(st.integers(0, 2**31))
def test_crop_0_is_the_centre(tmp_path_factory, seed):
    data, out = (tmp_path_factory.mktemp(name) for name in ("data", "run"))
    sizes = np.random.default_rng(seed).integers(16, 200, (12, 2)).tolist()
    expected = []
    for number, (width, height) in enumerate([*sizes, (60_000, 1), (1, 1), (90, 3)]):
        image = gradient(width, height)
        save(data, f"{number:02d}/{number}.png", image)  # its label tells which it is
        image = image.reduce(max(1, min(image.size) // 32))  # what is large is read at a fraction
        width, height = image.size
        side = min(image.size)
        left, top = (width - side) // 2, (height - side) // 2
        centre = image.crop((left, top, left + side, top + side))
        expected.append(centre.resize((16, 16), Image.Resampling.LANCZOS, reducing_gap=2.0))
    captured(out, *FLAGS, data)
    for label, crops in zip(np.load(out / "labels.npy"), prepared(out), strict=True):
        assert difference(crops[0].transpose(1, 2, 0), expected[label]) <= 1


def test_other_crops_move_and_zoom_and_every_second_is_mirrored_if_asked():
    for number in range(20):
        save("data", f"{number}.png", gradient(200, 128))
    for name, *flip in (("plain",), ("flipped", "--flip")):
        captured(name, *FLAGS, "data", "--size", 64, *flip)
    images, flipped = (prepared(name) for name in ("plain", "flipped"))
    assert np.array_equal(flipped[:, ::2], images[:, ::2])
    assert np.array_equal(flipped[:, 1::2], images[:, 1::2, ..., ::-1])

    seen = images[:, 1:].reshape(300, 3, 64, 64).astype(float)
    # the shorter side / the crop's
    zoom = 128 / 64 * 48 / (seen[:, 0, 32, 56] - seen[:, 0, 32, 8])
    assert 0.97 < zoom.min() < 1.02 and 1.10 < zoom.max() < 1.16  # none is mirrored
    assert seen[:, 0].min() < 5 and seen[:, 0].max() > 194  # both ends are reached
    assert seen[:, 1, 0].std() > 1  # and the shorter side moves too


def test_a_broken_file_is_named_and_left_out(data, capsys, monkeypatch):
    for path in ("data/0.png", "data/6.png"):
        Path(path).write_text("text")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # decompression bombs
    Image.new("L", (100, 100)).save("data/large.png")
    captured("run", *FLAGS, data)
    said = capsys.readouterr()
    for name in ("0", "6", "large"):
        assert f"left out: data/{name}.png: " in said.err
    assert len(prepared("run")) == len(np.load("run/labels.npy")) == 5
    assert os.path.getsize("run/images.npy") == 128 + prepared("run").nbytes
    assert "run/images.npy: up to 0 MiB" in said.out


def test_images_that_were_added_later_are_mentioned(data, capsys):
    for expected in (False, False, True, False):
        captured("run", *FLAGS, data)
        said = capsys.readouterr().out
        assert ("data has 8 images now; the 7 of before are used" in said) == expected
        assert "6 images to train on, 1 held out" in said
        if expected:
            Path("data").rename("moved")  # a run goes on without its images
        elif Path("data/5.png").exists() and "MiB" not in said:
            save("data", "9.png", RED)


BAD_INPUT = """
broken  --data: 0 images can be read, expected two or more
none  --data: no images found in none
empty  --data: no images found in empty
both  --data: both has images beside sub-folders of images
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_a_folder_without_images_is_refused(line):
    for name in ("broken/a.png", "broken/b.png", "both/a.png", "both/cat/b.png", "empty/a.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    folder, message = line.split("  ")
    assert failure(train.main, *FLAGS, folder, "--out", "run").startswith(f"train.py: {message}")


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_the_frechet_distance_of_gaussians(dimensions, seed):
    a, shift = normal(40, dimensions, seed=seed), normal(dimensions, seed=seed + 1)
    moved = shift.square().sum().item()
    assert judge.frechet(a, a + shift) == pytest.approx(moved, rel=1e-7, abs=1e-8)
    centred = a - a.mean(0)
    spread = 4 * centred.var(0).sum().item()
    assert judge.frechet(centred, 3 * centred) == pytest.approx(spread, rel=1e-6)


def test_recall_is_of_images_as_near_as_the_third_neighbour():
    samples = torch.arange(5.0)[:, None]  # which is 3 2 2 2 3 away
    reference = torch.tensor([-3.1, -2.9, 2, 7.1])[:, None]
    assert judge.recall(samples, reference) == 0.5
