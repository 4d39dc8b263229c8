"""Data: drawings, folders of images, what is read, cropped, held out; Frechet distances."""

import argparse
import errno
import io
import itertools
import os
import time
from unittest import mock

import judge  # puts the repository on the path
import numpy as np
import pytest
import torch
from helpers import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train

quick = settings(max_examples=25, deadline=None)
PICTURE = train.draw_shape(4, 48)[0].resize((60, 48))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour, size=(20, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def difference(image, other):
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max())


def save_all(folder, *names, size=(20, 16)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        flat((len(name) * 7 % 256, 90, 30), size).save(folder / name)


# Drawn shapes


@quick
@given(st.integers(0, 2**40), st.integers(8, 80))
def test_a_drawing_depends_on_its_index_alone(index, size):
    np.random.seed(size)
    image, label = train.draw_shape(index, size)
    again, _ = train.draw_shape(np.int64(index), size)
    assert image.mode == "RGB" and image.size == (size, size) and label == index % 10
    assert image.tobytes() == again.tobytes() != train.draw_shape(index + 10, size)[0].tobytes()


# Folders


def test_a_sub_folder_is_a_class(tmp_path):
    kept = ["cat/4.bmp", "cat/5.gif", "cat/6.jpeg", "cat/deep/3.webp", "dog/1.JPG", "dog/2.png"]
    save_all(tmp_path, *reversed(kept), "cat/.7.png", ".git/8.png", "cat/.old/9.png")
    for name in (".DS_Store", "notes.txt", "cat/notes.txt"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    files, classes = train.list_images(tmp_path)
    assert classes == ["cat", "dog"]
    assert files == [(str(tmp_path / name), int(name[0] == "d")) for name in kept]
    files, classes = train.list_images(f"{tmp_path}/dog/")  # images alone are one class
    assert classes == ["dog"] and [path[-5:] for path, _ in files] == ["1.JPG", "2.png"]


def test_folders_without_a_meaning_are_refused(tmp_path):
    save_all(tmp_path, "both/1.png", "both/cat/2.png")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "cat").symlink_to(tmp_path)
    for name, message in (
        ("both/1.png", "^--data: .*Not a dir"),
        ("nowhere", "^--data: .*No such"),
        ("link", "^--data: .*cat is a link"),
        ("empty", "expected a folder with .png, .jpg"),
        ("both", "with images beside sub-folders of images"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            train.list_images(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


@quick
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=2, unique=True))
def test_the_held_out_part_is_stable(names):
    files = [(f"/data/cat/{name}.png", 0) for name in names]
    training, held_out = train.split_held_out(files, "/data")
    assert training and held_out and sorted(training + held_out) == sorted(files)
    moved = [(f"/elsewhere{path}", label) for path, label in files]
    expected = [(f"/elsewhere{path}", label) for path, label in held_out]
    assert train.split_held_out(moved, "/elsewhere/data")[1] == expected
    if len(files) > 2:  # when a file goes the others stay, but for one that keeps the share
        fewer = train.split_held_out(files[:-1], "/data")[1]
        assert len(set(fewer) - set(held_out)) <= 1


def test_the_held_out_part_is_the_same_everywhere():
    files = [(f"data/{number % 10}/{number:05}.jpg", number % 10) for number in range(20_000)]
    held_out = train.split_held_out(files, "data")[1]
    assert len(held_out) == 1000 and len({label for _, label in held_out[:40]}) == 10
    assert held_out[0][0] == "data/4/18984.jpg"
    assert len(train.split_held_out(files * 3, "data")[1]) == 2000


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


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_becomes_the_same_rgb(tmp_path, name):
    content, expected, tolerance = CASES[name]
    (tmp_path / name).write_bytes(content)
    image = sample.read_image(str(tmp_path / name))
    assert image.mode == "RGB" and image.size == expected.size
    assert difference(image, expected) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    upright = flat("red", (32, 16))
    upright.paste("lime", (0, 0, 8, 8))  # a mark in the corner at the top left
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # members of Transpose
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.jpg"):
        stored.save(tmp_path / name, exif=exif)
        pixels = np.asarray(sample.read_image(tmp_path / name))
        assert pixels.shape == (16, 32, 3) and pixels[3, 3, 1] > 200 and pixels[13, 28, 0] > 200


@quick
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=20),
    st.integers(0, 10**6),
)
def test_damaged_and_truncated_files_are_read_or_refused(tmp_path_factory, name, damage, length):
    content = bytearray(CASES[name][0])
    for place, value in damage:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content[: length % len(content)] if not damage else content)
    try:
        assert sample.read_image(path).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_other_files_are_refused_with_a_reason(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "pipe.png", "gone.png"):
        with pytest.raises(FileNotFoundError, match=f"no regular file: .*{name}"):
            sample.read_image(tmp_path / name)
    path = tmp_path / "half.png"
    path.write_bytes(CASES["rgb.png"][0][:400])
    for reason in ("truncated", "decompression bomb"):
        with pytest.raises(ValueError, match=f"half.png: .*{reason}"):
            sample.read_image(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # it has more than twice as many


# Cropping and the data set


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@quick
@given(st.integers(32, 200), st.integers(32, 200))
def test_the_centre_crop_is_the_centre(width, height):
    image, side = gradient(width, height), min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    assert difference(train.crop(image, side), centre) == 0
    small = np.asarray(train.crop(image, 16), dtype=float).mean((0, 1))
    assert abs(small[0] - (left + side / 2 - 0.5)) < 1
    assert abs(small[1] - (top + side / 2 - 0.5)) < 1


def test_a_random_crop_moves_and_zooms():
    image = gradient(200, 128)
    seen = [np.asarray(train.crop(image, 64, seed), dtype=float) for seed in range(300)]
    seen = np.stack(seen)  # (300, 64, 64, 3)
    zoom = 128 / 64 * 48 / (seen[:, 32, 56, 0] - seen[:, 32, 8, 0])  # the shorter side / the size
    assert 0.97 < zoom.min() < 1.02 and 1.10 < zoom.max() < 1.16  # none is mirrored
    assert seen[..., 0].min() < 5 and seen[..., 0].max() > 194  # both ends are reached
    assert seen[:, 0, :, 1].std() > 1  # and the shorter side moves too
    for size, seed in (((60_000, 1), 0), ((1, 1), 2**63), ((90, 3), None)):
        cropped = train.crop(flat("red", size), 256, seed)
        assert cropped.size == (256, 256) and difference(cropped, flat("red", (256, 256))) == 0


@pytest.fixture
def folder(tmp_path):
    for kind in ("cat", "dog"):
        save_all(tmp_path, *(f"{kind}/{number}.png" for number in range(3)), size=(40, 24))
    gradient(50, 40).save(tmp_path / "dog" / "3.jpg", quality=95)
    return tmp_path


def images_of(folder, size=16):
    return train.Images(*train.list_images(folder), size, flip=True)


def test_items_are_decided_by_their_keys(folder):
    for images in (images_of(folder), train.Images(range(30, 37), train.SHAPES, 16)):
        keys = [(index, seed, 1) for index in range(7) for seed in (None, 0, 2**40, (5, 6))]
        for key, pixels in reversed([(key, images[key]) for key in keys]):
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16)
            assert torch.equal(pixels, images[key])
    drawing = torch.from_numpy(np.array(train.draw_shape(33, 16)[0])).permute(2, 0, 1)
    assert torch.equal(images[3, 1, 1], drawing) and images.labels[3] == 3  # these stay whole
    photos = images_of(folder, 32)
    assert not torch.equal(photos[6, 0, 0], photos[6, 1, 0]) and photos.labels == [0] * 3 + [1] * 4


def test_every_second_time_an_image_is_mirrored_if_asked(folder):
    for path in folder.rglob("*.*"):
        gradient(40, 30).save(path)
    for flip in (False, True):
        args = argparse.Namespace(data=folder, size=16, flip=flip)
        images, held_out, _ = train.data_sets(args)
        plain = images[1, 5, 0]
        for turn, mirrored in enumerate((plain, plain.flip(-1) if flip else plain) * 2):
            assert torch.equal(images[1, 5, turn], mirrored)
        assert not held_out.flip

    args = argparse.Namespace(seed=3, batch=6, steps=dict(tokenizer=8))
    keys = itertools.chain(*train.step_keys(args, images, 0))
    turns = sorted((i, turn % 2) for i, _, turn in keys)
    assert turns == sorted(itertools.product(range(6), (0, 1) * 4))


def test_a_file_is_looked_at_once(folder):
    """A link to nothing and a pipe are passed over."""
    args = argparse.Namespace(data=str(folder), size=16, flip=False)
    _, _, before = train.data_sets(args)
    (folder / "cat" / "gone.png").symlink_to("nothing")
    os.mkfifo(folder / "cat" / "pipe.png")
    with mock.patch.object(os, "stat", side_effect=os.stat) as stat:
        images, held_out, total = train.data_sets(args)
    for path, _ in images.items + held_out.items:
        assert stat.mock_calls.count(mock.call(path)) == 1
    assert len(images) + len(held_out) == 7 and total == before


def test_images_come_in_the_order_of_their_keys_one_list_ahead():
    begun, lists = [], [range(7), range(7, 9), range(9, 15)]

    def image(key):
        begun.append(key)
        time.sleep(0.01 * (-key % 3))
        return torch.full((1,), key)

    slow = mock.MagicMock()
    slow.__getitem__.side_effect = image
    batches = train.loaded(argparse.Namespace(workers=3), slow, iter(lists))
    for number, images in enumerate(batches):
        assert images[:, 0].tolist() == list(lists[number])
        assert len(begun) <= sum(map(len, lists[: number + 2]))
    assert sorted(begun) == list(range(15))


def test_a_broken_file_is_named_once_and_replaced(folder, capsys):
    broken = [folder / "cat" / "0.png", folder / "dog" / "3.jpg"]
    for path in broken:
        path.write_text("text")
    images = images_of(folder)
    for _ in range(2):
        for index, other in ((0, 1), (6, 3)):  # the last one's next is the first of its class
            assert torch.equal(images[index, None, 0], images[other, None, 0])
    lines = [f"skipped: {path}: no image of these formats\n" for path in broken]
    assert capsys.readouterr().err == "".join(lines)

    for path in (folder / "cat").iterdir():
        path.write_text("text")
    images = images_of(folder)
    with pytest.raises(ValueError, match="--data: .*cat/1.png cannot be read, nor another of cat"):
        images[1, None, 0]
    pixels, labels = train.read_held_out(images)
    assert labels.tolist() == [1] * 4 and torch.equal(pixels[0], images[3, None, 0])


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, None])
def test_what_the_system_refuses_breaks_no_image(folder, code):
    images, refused = images_of(folder), mock.Mock(side_effect=OSError(code, ""))
    refusal = mock.patch.object(sample.Path, "read_bytes", refused)
    if code is None:
        refusal = mock.patch.object(sample, "as_rgb", side_effect=MemoryError)
    with refusal, pytest.raises(OSError if code else MemoryError):
        images[0, None, 0]
    assert not images.broken and images[0, None, 0].shape == (3, 16, 16)


@quick
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
