"""Data: shapes, files, folders, datasets, crops, batches; what belongs together; the judge."""

import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from unittest import mock

import judge  # puts the repository on the path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Listed,
    NumberedImages,
    contents,
    failure,
    normal,
    refused,
    settings_of,
    small_codec,
    stages_of,
    stages_that_only_read,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import hmar
import tokenizer
import train

PICTURE = train.draw_shape(4, 48)[0].resize((60, 48))
pytestmark = pytest.mark.usefixtures("own_folder")
CPU = torch.device("cpu")
SMALL = dict(size=16, depth=1, batch=5, device="cpu", dtype="fp32")


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


def crops_of(*images, **changes):
    pairs = [(image, 0) for image in images]
    return train.Crops(pairs, range(len(pairs)), settings_of(**dict(central_every=1) | changes))


@given(st.integers(0, 2**40), st.integers(8, 80))
def test_a_shape_depends_on_its_index_alone(index, size):
    np.random.seed(size)
    image, label = train.draw_shape(index, size)
    again, _ = train.draw_shape(np.int64(index), size)
    assert image.mode == "RGB" and image.size == (size, size) and label == index % 10
    assert image.tobytes() == again.tobytes() != train.draw_shape(index + 10, size)[0].tobytes()


def test_the_drawings_are_a_dataset():
    drawings = train.Drawings(32)
    assert len(drawings) == 20_500
    with pytest.raises(IndexError):
        drawings[20_500]
    for index in (0, 17, 20_499, 17):  # the second time it is kept in memory
        image, label = drawings[index]
        expected, number = train.draw_shape(index, 32)
        assert image.tobytes() == expected.tobytes() and label == number
        assert drawings.classes[label] == train.SHAPES[number]


# Files

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
    "rgb.bmp": (encoded(PICTURE, "BMP"), PICTURE, 0),
    "rgb.tif": (encoded(PICTURE, "TIFF"), PICTURE, 0),
    "packed.tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE, 0),
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
    shutil.rmtree("damaged", ignore_errors=True)
    Path("damaged").mkdir()
    Path("damaged", name).write_bytes(content[: length % len(content)] if not damage else content)
    save("damaged", "zebra.png", RED)
    dataset = train.Folder("damaged")
    crops = train.Crops(dataset, [0, 1], settings_of(size=8))
    pixels, label = crops[0, 1]
    assert pixels.shape == (3, 8, 8) and label == 0
    if crops.is_broken[0]:
        assert torch.equal(pixels, crops[1, 1][0])
        with pytest.raises(OSError, match=name):
            dataset[0]


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
    Path("data").mkdir()
    Path("data", name).write_bytes(content)
    (image, label), *others = train.Folder("data")  # each suffix is known
    assert image.mode == "RGB" and image.size == expected.size and label == 0 and not others
    assert difference(image, expected) <= tolerance


# Folders


def test_a_sub_folder_is_a_class_and_so_are_images_beside_it():
    kept = ["cat/4.bmp", "cat/5.gif", "cat/6.png", "cat/deep/3.webp", "dog/1.PNG", "dog/2.png"]
    for data, names in (("one", kept), ("two", kept[::-1])):  # in whatever order they came
        for name in names:
            save(data, name, flat(3 * (40 * kept.index(name),)))
    for name in ("cat/.7.png", ".git/8.png", "cat/.old/9.png"):
        save("two", name, RED)
    Path("two/notes.txt").write_text("no image")
    os.makedirs("two/empty/deeper")

    def read(data):
        """Class names, [(number, label), ...]."""
        dataset = train.Folder(data)
        return dataset.classes, [
            (image.getpixel((8, 8))[0] // 40, label) for image, label in dataset
        ]

    expected = ["cat", "dog"], [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]
    assert read("one") == read("two") == expected
    assert read("one/dog/") == (["dog"], [(4, 0), (5, 0)])  # images alone are one class
    save("one", "6.png", flat("black"))
    names, pairs = read("one")
    assert names == ["cat", "dog", "one"] and (0, 2) in pairs


def test_links_are_followed_and_loops_of_them_end():
    save("data", "cat/1.png", RED)
    save("elsewhere", "2.png", flat("blue"))
    save("elsewhere", "deep/3.png", flat("lime"))
    os.symlink(Path("elsewhere").resolve(), "data/dog")
    os.symlink(Path("elsewhere/2.png").resolve(), "data/cat/4.png")
    os.symlink(Path("data").resolve(), "data/cat/all")  # a loop
    os.symlink(Path("elsewhere").resolve(), "elsewhere/deep/again")  # another
    dataset = train.Folder("data")
    assert dataset.classes == ["cat", "dog"]
    assert {"cat/1.png", "cat/4.png", "dog/2.png", "dog/deep/3.png"} <= {*dataset.names}
    assert len({*dataset.names}) == len(dataset) < 20
    colours = {name: image.getpixel((0, 0)) for name, (image, _) in zip(dataset.names, dataset)}
    assert colours["cat/4.png"] == colours["dog/2.png"] == (0, 0, 255)


BAD_FOLDERS = """
none  --data: there is no folder none
file.png  --data: there is no folder file.png
empty  --data: no images found in empty
broken  none of the images
"""


@pytest.mark.parametrize("line", BAD_FOLDERS.strip().splitlines())
def test_a_folder_without_images_is_refused_in_a_line(line, capfd):
    for name in ("broken/a.png", "broken/b.png", "empty/a.txt", "file.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    folder, message = line.split("  ")
    flags = ["--depth", 1, "--device", "cpu", "--size", 16, "--data", folder, "--out", "run"]
    said = failure(train.main, *flags)
    assert said.startswith("train.py: ") and message in said and "\n" not in said
    assert os.path.exists("run") == (folder == "broken")  # which is seen only when it is read


def test_large_images_are_reduced_but_not_below_twice_the_size():
    save("data", "large.png", gradient(250, 200))
    save("data", "small.png", gradient(50, 40))
    for size, expected in ((16, [(42, 34), (50, 40)]), (60, [(250, 200), (50, 40)])):
        sizes = [image.size for image, _ in train.Folder("data", size)]
        assert sizes == expected, size


def test_images_are_read_from_disk_once_while_there_is_memory(monkeypatch):
    for number in range(4):
        save("data", f"{number}.png", flat((60 * number, 0, 0)))
    monkeypatch.setattr(train, "CACHE_BYTES", 2 * 4 * 20 * 16)  # two images
    dataset = train.Folder("data")
    for _ in range(2):
        reds = [image.getpixel((0, 0))[0] for image, _ in dataset]
        assert reds == [0, 60, 120, 180]
    shutil.rmtree("data")
    assert [dataset[i][0].getpixel((0, 0))[0] for i in range(2)] == reds[:2]
    with pytest.raises(OSError, match=r"2\.png"):
        dataset[2]


def write_images(folder, count=12, classes=("cat", "dog"), shift=0):
    """So many images in sub-folders, in turns; without classes in the folder itself."""
    for index in range(count):
        name = f"{classes[index % len(classes)] if classes else ''}/{index:02d}.png"
        save(folder, name.strip("/"), train.draw_shape(index + shift, 16)[0])
    return folder


def test_other_data_are_refused_and_moved_data_go_on():
    def begin(data, out="run"):
        """The line with which a run on a folder fails, or None. No stage trains."""
        flags = "--size", 16, "--depth", 1, "--device", "cpu", "--dtype", "fp32"
        with stages_that_only_read():
            return failure(train.main, *flags, "--data", data, "--out", out)

    assert begin(write_images("data1")) is None
    shutil.move("data1", "moved")
    assert begin("moved") is None
    assert begin("data1") == "train.py: --data: there is no folder data1"
    os.symlink("moved", "link")
    assert begin("link") is None
    others = {
        "images 12 -> 13": write_images("count", 13),
        "['cat', 'dog'] -> ['cat', 'dogs']": write_images("names", classes=("cat", "dogs")),
        "(data ": write_images("bytes", shift=1),
        "data ": write_images("files"),
        "classes": write_images("flat", classes=()),
    }
    os.rename("files/cat/02.png", "files/cat/020.png")
    before = contents("run")
    for what, folder in others.items():
        printed = begin(folder)
        assert printed.startswith("train.py: --out: run was begun with other settings or data (")
        assert what in printed and "\n" not in printed
    assert contents("run") == before

    assert begin("flat", "flat run") is None  # a flat folder may be moved, too
    shutil.move("flat", "flat moved")
    assert begin("flat moved", "flat run") is None
    assert "(data " in begin(write_images("flat", classes=(), shift=2), "flat run")


# Datasets


WRONG_ITEMS = [
    (lambda image, label: torch.zeros(3, 16, 16), "Tensor"),
    (lambda image, label: dict(image=image, label=label), "dict"),
    (lambda image, label: None, "None"),
    (lambda image, label: (np.asarray(image), label), "ndarray"),
    (lambda image, label: (image, "cat"), "str"),
    (lambda image, label: (image, None), "None"),
    (lambda image, label: (image, 0.9), "float"),
    (lambda image, label: (image, 3), "label 3"),
    (lambda image, label: (image, -1), "label -1"),
]


@pytest.mark.parametrize("index", [0, 5])  # an image whose bytes are hashed, and another one
@pytest.mark.parametrize("change, found", WRONG_ITEMS)
def test_an_item_that_is_no_image_with_its_label_is_refused(index, change, found):
    numbered = NumberedImages(40)
    dataset = Listed([numbered[i] for i in range(40)], numbered.classes)
    dataset[index] = change(*dataset[index])
    with pytest.raises(ValueError, match=rf"\b{index}\b.*expected") as error:
        train.train(dataset, **SMALL, steps=1)
    message = str(error.value)
    assert found in message and ("label" in found or "(PIL image, int)" in message)


class Mirrored(NumberedImages):
    """Its images are mirrored at random."""

    random = np.random.default_rng(0)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return ImageOps.mirror(image) if self.random.random() < 0.5 else image, label


class Augmented(NumberedImages):
    """Its images are never the same twice."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return Image.fromarray(np.asarray(image) ^ np.uint8(len(self.read) % 256)), label


@pytest.mark.parametrize("kind", [NumberedImages, Mirrored, Augmented])
def test_a_run_goes_on_with_its_dataset_and_refuses_others(kind):
    dataset, other, more = kind(40), kind(40), kind(41)
    for _ in range(20):  # it begins, and goes on
        stages_of(dataset, "run", **SMALL)
    begun = "run was begun with other settings or data"
    other.labels = other.labels[1:] + other.labels[:1]
    refused(f"{begun} .data ", stages_of, other, "run", **SMALL)
    refused(f"{begun} .*images 40 -> 41", stages_of, more, "run", **SMALL)
    refused(f"{begun} .label_drop 0.1 -> 0.3", stages_of, dataset, "run", **SMALL, label_drop=0.3)
    if kind is NumberedImages:
        refused(f"{begun} .data ", stages_of, kind(40, noise=3), "run", **SMALL)


def test_a_run_that_ended_before_its_first_stage_may_begin_with_other_settings():
    numbered = NumberedImages(40)
    dataset = Listed([numbered[i] for i in range(40)], ["ant"])
    refused("label 1 of image", stages_of, dataset, "run", **SMALL)
    dataset.classes = numbered.classes
    stages_of(dataset, "run", **SMALL)
    assert json.loads(Path("run/args.json").read_text())["classes"] == ["ant", "bee", "cow"]


def test_drawings_have_the_size_that_is_asked_for():
    with stages_that_only_read(read=1) as found:
        train.main(["--size", "64", "--batch", "32", "--device", "cpu"])
    dataset = found[0]["batches"].args[0].dataset
    assert all(dataset[i][0].size == (64, 64) for i in range(0, 20_500, 41))
    stages_of(train.Drawings(64), "runs/shapes", size=64, batch=32, is_simple=True, device="cpu")


# Crops


@given(st.integers(16, 200), st.integers(16, 200), st.integers(0, 99))
def test_a_central_crop_is_the_largest_square(width, height, number):
    image = gradient(width, height)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    expected = centre.resize((16, 16), Image.Resampling.LANCZOS, reducing_gap=2.0)
    pixels, _ = crops_of(image)[0, number]  # central_every is 1
    assert difference(pixels.permute(1, 2, 0), expected) <= 1


@pytest.mark.parametrize("size", [(60_000, 1), (1, 1), (3, 90)])
def test_an_image_of_any_sides_has_crops(size):
    crops = crops_of(gradient(*size), central_every=2)
    assert all(crops[0, number][0].shape == (3, 16, 16) for number in range(4))


def test_other_crops_move_and_zoom_independently():
    crops = crops_of(gradient(200, 128), size=64, central_every=1000)
    seen = torch.stack([crops[0, number][0] for number in range(1, 500)]).double()
    side = 64 / 48 * (seen[:, 0, 32, 56] - seen[:, 0, 32, 8])  # in pixels of the image
    left = seen[:, 0, 32, 8] + 0.5 - 8.5 / 64 * side
    top = seen[:, 1, 8, 32] + 0.5 - 8.5 / 64 * side
    is_small = side < 123  # where there is room to move up and down
    zoom, x, y = (8 * (128 / side - 1))[is_small], left / (200 - side), top / (128 - side)
    numbers = torch.stack([zoom, x[is_small], y[is_small]])
    assert len(zoom) > 250 and numbers.min() > -0.3 and numbers.max() < 1.3  # none is mirrored
    correlation = torch.corrcoef(numbers)
    assert (correlation - torch.eye(3)).abs().max() < 0.2
    for values in (x, numbers[2]):
        assert torch.histc(values, 4, 0, 1).min() > len(values) / 8
    assert torch.histc(8 * (128 / side - 1), 4, 0, 1).min() > len(side) / 8


def test_a_crop_is_a_function_of_seed_image_and_number():
    dataset = NumberedImages(8)
    settings = settings_of(central_every=1000, seed=3)
    crops, alone = (train.Crops(dataset, rows, settings) for rows in ([5, 2, 7], [7]))
    other = train.Crops(dataset, [7], settings | dict(seed=4))
    pixels = crops[2, 9][0]
    assert torch.equal(alone[0, 9][0], pixels) and torch.equal(crops[2, 9][0], pixels)
    for different in (other[0, 9], crops[2, 10], crops[1, 9]):
        assert not torch.equal(different[0], pixels)


def test_every_second_crop_is_mirrored_if_asked():
    plain, flipped = (
        crops_of(PICTURE, size=48, central_every=4, flip=flip) for flip in (False, True)
    )
    is_mirrored = []
    for number in range(64):
        ours, theirs = plain[0, number][0], flipped[0, number][0]
        is_mirrored.append(not torch.equal(ours, theirs))
        assert not is_mirrored[-1] or torch.equal(ours.flip(2), theirs)
    assert sum(is_mirrored[::4]) == 8 and sum(is_mirrored) == 32  # of central crops, of all


def test_a_broken_image_is_named_once_and_another_of_its_split_takes_its_place(capsys, monkeypatch):
    for number in range(40):
        save("data", f"{number:02d}.png", flat((6 * number, 0, 0)))
    for number in (3, 4, 5, 39):
        Path(f"data/{number:02d}.png").write_text("text")
    Image.new("L", (100, 100)).save("data/07.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a decompression bomb
    training, held_out = (
        train.Crops(train.Folder("data"), rows, settings_of(classes=1))
        for rows in ([2, 3, 4, 5, 7, 9, 39], [0, 1, 3, 6])
    )

    def numbers(crops):
        return [int(crops[row, 0][0][0, 0, 0]) // 6 for row in range(len(crops))]

    for _ in range(2):
        assert numbers(training) == [2, 9, 9, 9, 9, 9, 2] and numbers(held_out) == [0, 1, 6, 6]
    said = capsys.readouterr().err
    for number, times in ((3, 2), (4, 1), (5, 1), (7, 1), (39, 1)):  # 3 in each of the two
        assert said.count(f"left out: data/{number:02d}.png: ") == times
    assert training.is_broken.sum() == 5 and held_out.is_broken.sum() == 1


def test_the_data_of_a_run_may_have_images_that_cannot_be_read(capfd):
    class Gaps(NumberedImages):
        def __getitem__(self, index):
            if index % 3 == 0:
                raise OSError(f"number {index} is broken")
            return super().__getitem__(index)

    for number in range(24):
        save("data", f"{number:02d}.png", flat((9 * number, 0, 0)))
    Path("data/03.png").write_text("text")
    os.remove("data/00.png")
    os.symlink("nowhere", "data/00.png")
    for dataset, count in ((Gaps(24), 8), (train.Folder("data"), 2)):
        stages_of(dataset, read=6, **SMALL)
        assert capfd.readouterr().err.count("left out: ") == count


# What a stage is fed, as `train` feeds it


def numbers_of(images):
    """The numbers that NumberedImages have written into crops (B, 3, H, W)."""
    reds = images[:, 0].float().mean((1, 2))
    return (reds / NumberedImages.STEP).round().long().tolist()


def token_codec():
    """An untrained tokenizer whose codes lie among the features of NumberedImages."""
    codec = small_codec(codes=256, attention=False, seed=3)
    images = train.to_unit(torch.stack([crop_of(i) for i in range(40)]))
    features = tokenizer.encode_features(codec, images).movedim(1, 3).flatten(0, 2)
    codec["codebook"] = features[torch.randperm(len(features))[:256]] * torch.rand(256, 1)
    return codec


def crop_of(index, **options):
    image = NumberedImages(**options)[index][0]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_epochs(numbers, training):
    """Each training image comes once an epoch, and no epoch is like another."""
    epochs = np.reshape(
        numbers[: len(numbers) // len(training) * len(training)], (-1, len(training))
    )
    assert (np.sort(epochs) == sorted(training)).all()
    assert len(np.unique(epochs, axis=0)) == len(epochs) > 2


@pytest.mark.parametrize("seed", [0, 7])
def test_the_tokenizer_learns_crops_of_training_images(seed):
    dataset = NumberedImages(40)
    stage, *_ = stages_of(dataset, seed=seed, **SMALL)
    held_out = numbers_of(stage["held_out"])
    training = [i for i in range(40) if i not in held_out]
    assert 1 <= len({*held_out}) == len(held_out) <= 5
    for image, number in zip(stage["held_out"], held_out):
        assert torch.equal(image, crop_of(number))

    dataset.read.clear()
    batches = list(itertools.islice(stage["batches"](0), 7 * 24))
    assert not {*dataset.read} & {*held_out}
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
    numbers = numbers_of(images)
    assert labels.tolist() == [dataset.labels[number] for number in numbers]
    check_epochs(numbers, training)
    other, *_ = stages_of(dataset, seed=seed + 1, **SMALL)
    others = torch.cat([images for images, _ in itertools.islice(other["batches"](0), 7)])
    assert numbers[:35] != numbers_of(others)

    crops = {number: set() for number in training}
    is_central = []
    for number, image in zip(numbers, images):
        crops[number].add(image.numpy().tobytes())
        is_central.append(torch.equal(image, crop_of(number)))  # of the right size: unresampled
    assert min(map(len, crops.values())) > 16
    assert 1 / 32 < np.mean(is_central) < 1 / 8  # central_every is 16

    for done in (1, 9):  # it goes on where it was stopped
        for ours, theirs in zip(stage["batches"](done), batches[done : done + 3]):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("number", [1, 2], ids=["next-scale", "masked"])
def test_labels_and_tokens_belong_together(number):
    """Of images of one colour all crops are alike, so that their tokens tell which image it is."""
    dataset, codec = NumberedImages(40, noise=0), token_codec()
    images = torch.stack([crop_of(i, noise=0) for i in range(40)])
    torch.save(dict(tokenizer=codec), "codec.pt")
    stage = stages_of(dataset, tokenizer="codec.pt", **SMALL)[number - 1]
    tokens = tokenizer.encode(codec, train.to_unit(images), hmar.scale_sizes(stage["params"]))
    index_of = {tuple(row): index for index, row in enumerate(tokens.tolist())}
    assert len(index_of) == 40

    labels, held_out = stage["held_out"]
    held_out = [index_of[tuple(row)] for row in held_out.tolist()]
    assert labels.tolist() == [dataset.labels[index] for index in held_out]
    dataset.read.clear()
    batches = list(itertools.islice(stage["batches"](0), 28))
    labels, tokens = (torch.cat(parts) for parts in zip(*batches))
    numbers = [index_of[tuple(row)] for row in tokens.tolist()]
    assert labels.tolist() == [dataset.labels[index] for index in numbers]
    assert numbers == dataset.read
    check_epochs(numbers, [i for i in range(40) if i not in held_out])
    for ours, theirs in zip(stage["batches"](9), batches[9:18]):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_tokens_are_of_many_crops_and_each_stage_has_its_own():
    dataset, codec = NumberedImages(40), token_codec()
    torch.save(dict(tokenizer=codec), "codec.pt")
    stages, seen = stages_of(dataset, tokenizer="codec.pt", **SMALL), []
    for stage in stages:
        dataset.read.clear()
        batches = itertools.islice(stage["batches"](0), 7 * 24)
        rows = torch.cat([tokens for _, tokens in batches]).tolist()
        seen.append({*zip(dataset.read, map(tuple, rows))})
        crops = Counter(index for index, _ in seen[-1])
        assert len(crops) == 40 - len(stage["held_out"][0]) and min(crops.values()) > 16
    assert len(seen[0] & seen[1]) < 0.2 * len(seen[0])


def test_drawings_are_learned_as_they_are():
    stage, *_ = stages_of(NumberedImages(40), is_simple=True, **SMALL)
    images = torch.cat([images for images, _ in itertools.islice(stage["batches"](0), 28)])
    for image, number in zip(images, numbers_of(images)):
        assert torch.equal(image, crop_of(number))


class Reading:
    """Keeps the indices of images that were read."""

    indices = frozenset()

    def __getitem__(self, index):
        self.indices = self.indices | {index}
        return super().__getitem__(index)


class Many(Reading, Listed):
    """So many images that are alike."""

    def __init__(self, count):
        super().__init__([(RED, 0)] * count, ["red"])


class ReadFolder(Reading, train.Folder):
    pass


def trained_and_held_out(dataset, **options):
    """Indices, or names of files, of the images that a stage learns and of all others."""
    stage, *_ = stages_of(dataset, **SMALL | dict(batch=50) | options)
    dataset.indices = frozenset()
    list(itertools.islice(stage["batches"](0), math.ceil(len(dataset) / 50)))
    names = getattr(dataset, "names", range(len(dataset)))
    trained = {names[index] for index in dataset.indices}
    held_out = {*names} - trained
    assert len(held_out) == len(stage["held_out"])
    return trained, held_out


@pytest.mark.parametrize("count", [3, 30, 300, 3000])
def test_no_seed_and_no_later_image_holds_out_what_was_trained_on(count):
    trained, held_out = trained_and_held_out(Many(count))
    assert 1 <= len(held_out) <= min(128, max(1, count / 8))
    assert count < 300 or len(held_out) > count / 40
    for more, seed in ((0, 1), (1, 0), (count // 5, 2), (2 * count, 0)):
        _, others = trained_and_held_out(Many(count + more), seed=seed)
        assert others and not others & trained
        assert more or others == held_out


def test_files_that_come_later_do_not_hold_out_what_was_trained_on():
    write_images("data", 120, ("ant", "bee"))
    trained, before = trained_and_held_out(ReadFolder("data"))
    write_images("data", 120, ("aardvark", "albatross"))  # before them in the order of the names
    _, held_out = trained_and_held_out(ReadFolder("data"), seed=1)
    assert before <= held_out and not held_out & trained


def test_a_run_reads_training_images_once_an_epoch_and_held_out_ones_to_evaluate():
    dataset = NumberedImages(40)
    trained = 40 - len(stages_of(dataset, **SMALL)[0]["held_out"])
    dataset.read.clear()
    options = dict(SMALL, batch=trained, steps=4, evaluations=2)  # four epochs a stage
    train.train(dataset, channels=32, **options)
    first = Counter(range(0, 40, 3))  # these tell the data from others, and are read twice
    times = Counter(dataset.read) - first - first
    # Those to train on once more, for the variance of hues.
    assert Counter(times.values()) == {1 + 4 + 4 + 4 + 4: trained, 1: 40 - trained}


def test_workers_read_the_same_batches_and_live_on_after_ctrl_c():
    settings = settings_of(batch=5, central_every=2)
    crops = train.Crops(NumberedImages(12), range(12), settings)
    ours, theirs = (
        train.crop_batches(crops, "tokenizer", settings, CPU, workers, 3) for workers in (0, 2)
    )
    for step in range(12):
        for one, other in zip(next(ours), next(theirs)):
            assert torch.equal(one, other)
        if step == 2:  # both have begun
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGINT)


def test_workers_say_which_images_are_broken(capfd):
    for number in range(4):
        save("data", f"{number}.png", flat((60 * number, 0, 0)))
    Path("data/2.png").write_text("text")
    settings = settings_of(batch=4, classes=1)
    crops = train.Crops(train.Folder("data"), range(4), settings)
    batches = train.crop_batches(crops, "tokenizer", settings, CPU, 1, 0)
    for images, _ in itertools.islice(batches, 3):
        assert sorted(images[:, 0, 0, 0].tolist()) == [0, 60, 180, 180]
    assert capfd.readouterr().err.count("left out: data/2.png") == 1


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_each_crop_is_of_one_process(count, share, processes, done):
    """Of each step the processes have equal shares, in the order in which one process has them."""
    settings = settings_of(batch=share * processes)
    crops = train.Crops(NumberedImages(count), range(count), settings)

    def batches_of(rank, size, done):
        with mock.patch.multiple(train, WORLD=size, RANK=rank):
            batches = train.crop_batches(crops, "masked", settings, CPU, 0, done)
            return [images for images, _ in itertools.islice(batches, 3)]

    whole = batches_of(0, 1, 0)
    shares = [batches_of(rank, processes, 0) for rank in range(processes)]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {share}
        assert torch.equal(torch.cat(parts), expected)
    later = batches_of(0, 1, done)
    assert done > 2 or torch.equal(later[0], whole[done])


# The perceptual network, which learns from them first


def perceptual_losses(dataset, steps, classes):
    """Losses of the perceptual network while it learns, [(scores, labels), ...] and its layers."""
    settings = settings_of(steps, size=24, classes=classes, central_every=1)
    crops = train.Crops(dataset, range(len(dataset)), settings)
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses:
        layers = train.learn_perceptual_layers(crops, settings, CPU)
    pairs = [call.args for call in losses.call_args_list]
    return [F.cross_entropy(*pair).item() for pair in pairs], pairs, layers


def test_the_perceptual_network_learns_classes():
    """Afterwards its norms are fixed, and no random number of torch's own is used up."""
    labels = np.random.default_rng(0).integers(3, size=30).tolist()
    dataset = [(Image.new("RGB", (30, 24), 3 * (100 * label,)), label) for label in labels]
    before = torch.get_rng_state()
    values, _, layers = perceptual_losses(dataset, 60, classes=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])  # of wrong labels it learns nothing
    x = torch.randn(8, 3, 24, 24)
    whole, half = (layers[0](part) for part in (x, x[:4]))
    assert torch.allclose(whole[:4], half, atol=1e-6) and not whole.requires_grad
    again = perceptual_losses(dataset, 60, classes=3)[2]  # when a run goes on
    assert torch.equal(again[0](x), whole)


def test_without_classes_the_perceptual_network_learns_quarter_turns():
    dataset = [(train.draw_shape(10 * i + 8, 24)[0], 0) for i in range(30)]  # arrows
    values, pairs, _ = perceptual_losses(dataset, 150, classes=1)
    assert np.mean(values[-5:]) < 0.7 * np.log(4) < np.mean(values[:5])
    turns = torch.cat([labels for _, labels in pairs])
    assert turns.bincount(minlength=4).min() > 1000


def test_photographs_have_a_perceptual_network():
    dataset = Listed([(train.draw_shape(i, 48)[0], i % 10) for i in range(40)], train.SHAPES)
    for size, changes, layers in ((48, {}, 4), (48, dict(perceptual=False), 0), (32, {}, 0)):
        stages = stages_of(dataset, **SMALL | dict(size=size, tokenizer_steps=3), **changes)
        found = [len(stage["terms"].get("perceptual_layers", ())) for stage in stages[:2]]
        assert found == [layers] * 2


# The judge


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
