"""Data: drawings, folders of images, what is read, cropped, held out; Frechet distances."""

import argparse
import io
import itertools
import os
import time

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
    """The largest difference of two images in grey levels."""
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
    for name in (".DS_Store", "notes.txt", "cat/notes.txt", "cat/.DS_Store"):
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
    for name, message in (
        ("none", "expected a folder"),
        ("both/1.png", "expected a folder"),
        ("empty", "which holds none of .png, .jpg"),
        ("both", "'1.png' and sub-folders of images"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            train.list_images(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


names = st.lists(st.text("abcdefgh0123456789", min_size=1, max_size=6), min_size=2, unique=True)


@quick
@given(names)
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


def test_the_held_out_part_is_the_same_on_every_machine():
    files = [(f"data/{number % 10}/{number:05}.jpg", number % 10) for number in range(20_000)]
    held_out = train.split_held_out(files, "data")[1]
    assert len(held_out) == 1000 and len({label for _, label in held_out[:40]}) == 10
    assert held_out[0][0] == "data/4/18984.jpg"
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"got {count} image in data"):
            train.split_held_out(files[:count], "data")


# Reading

TRANSPARENT = flat((200, 0, 0, 0), mode="RGBA")
TRANSPARENT.paste((0, 120, 0, 255), (0, 0, 10, 16))
TRANSPARENT.paste((0, 0, 0, 128), (0, 8, 10, 16))
ON_WHITE = flat("white")
ON_WHITE.paste((0, 120, 0), (0, 0, 10, 16))
ON_WHITE.paste((127, 127, 127), (0, 8, 10, 16))
GREY = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
EIGHT_BITS = Image.fromarray(np.rint(np.asarray(GREY) / 257).astype(np.uint8)).convert("RGB")
EIGHT_BITS.putpixel((2, 0), (255, 255, 255))
PALETTE = PICTURE.quantize(8)
CODED = flat(1, (9, 9), "P")  # code 1 is red, code 0 is green
CODED.putpalette([0, 255, 0, 255, 0, 0])
CODED.putpixel((2, 3), 0)
CODED_ON_WHITE = flat("white", (9, 9))
CODED_ON_WHITE.putpixel((2, 3), (0, 255, 0))
RED = flat("red")
FRAMES = dict(save_all=True, append_images=[flat("blue")])
CASES = {  # name: (bytes of a file, the picture it shows, how far apart they may be)
    "rgb.png": (encoded(PICTURE, "PNG"), PICTURE, 0),
    "rgb.webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, 0),
    "grey.png": (encoded(PICTURE.convert("L"), "PNG"), PICTURE.convert("L").convert("RGB"), 0),
    "palette.gif": (encoded(PALETTE, "GIF"), PALETTE.convert("RGB"), 0),
    "frames.gif": (encoded(RED, "GIF", **FRAMES), RED, 0),
    "alpha.png": (encoded(TRANSPARENT, "PNG"), ON_WHITE, 1),
    "palette_alpha.png": (encoded(CODED, "PNG", transparency=1), CODED_ON_WHITE, 0),
    "key_colour.png": (encoded(RED, "PNG", transparency=(255, 0, 0)), flat("white"), 0),
    "cmyk.jpg": (encoded(RED.convert("CMYK"), "JPEG", quality=100), RED, 2),
    "sixteen.png": (encoded(GREY, "PNG", transparency=400), EIGHT_BITS, 0),
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
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # members of Transpose
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG"):
        stored.save(tmp_path / "a.png", kind, exif=exif)
        pixels = np.asarray(sample.read_image(tmp_path / "a.png"))
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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_other_files_are_refused_with_a_reason(tmp_path):
    (tmp_path / "half.png").write_bytes(CASES["rgb.png"][0][:400])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    flat(0, (10_001, 10_000), "1").save(tmp_path / "large.png")
    for name, reason in (
        ("half.png", "truncated"),
        ("folder.png", "no regular file"),
        ("pipe.png", "no regular file"),
        ("gone.png", "missing"),
        ("large.png", "10001 x 10000 pixels"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            sample.read_image(tmp_path / name)


# Cropping and the data set


@quick
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.none() | st.integers(0, 2**63)
)
def test_a_crop_has_its_size_and_colours(width, height, size, seed):
    image = train.crop(flat((10, 200, 90), (width, height)), size, seed)
    assert np.asarray(image).tolist() == [[[10, 200, 90]] * size] * size


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
    assert train.crop(flat("red", (60_000, 1)), 256, 0).size == (256, 256)


@pytest.fixture
def folder(tmp_path):
    for kind in ("cat", "dog"):
        save_all(tmp_path, *(f"{kind}/{number}.png" for number in range(3)), size=(40, 24))
    gradient(50, 40).save(tmp_path / "dog" / "3.jpg", quality=95)
    return tmp_path


def test_items_are_decided_by_their_keys(folder):
    files, _ = train.list_images(folder)
    for items in (files, range(30, 37)):
        images = train.Images(items, 16, flip=True)
        keys = [(index, seed, 1) for index in range(7) for seed in (None, 0, 2**40, (5, 6))]
        seen = [images[key] for key in keys]
        for key, (pixels, label) in reversed(list(zip(keys, seen))):
            again, same = images[key]
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16)
            assert torch.equal(pixels, again) and label == same and len(images) == 7
    drawing = torch.from_numpy(np.array(train.draw_shape(33, 16)[0])).permute(2, 0, 1)
    pixels, label = images[3, 1, 1]
    assert torch.equal(pixels, drawing) and label == 3  # drawings stay whole
    photo = train.Images(files, 32)
    assert not torch.equal(photo[6, 0, 0][0], photo[6, 1, 0][0]) and photo[6, 0, 0][1] == 1


def test_nothing_is_mirrored_unless_flip_is_given(folder):
    for flags, flip in (([], False), (["--flip"], True)):
        args = train.parser().parse_args([*flags, "--data", str(folder), "--size", "16"])
        training, held_out, _ = train.data_sets(args)
        assert training.flip == flip and not held_out.flip and held_out.any_class


def test_a_large_jpeg_is_decoded_small_yet_looks_the_same(tmp_path):
    path = tmp_path / "a.jpg"
    PICTURE.resize((1200, 960), Image.Resampling.NEAREST).save(path, quality=95)
    small, large = sample.read_image(path, shortest=64), sample.read_image(path)
    assert large.size == (1200, 960) and 64 <= min(small.size) < 256
    assert difference(train.crop(small, 32), train.crop(large, 32)) < 16


def test_every_second_time_an_image_is_mirrored_if_asked(folder):
    items = train.list_images(folder)[0]
    gradient(40, 30).save(items[1][0])
    images = [train.Images(items, 16, flip=flip) for flip in (False, True)]
    plain = images[0][1, 5, 0][0]
    for turn, mirrored in enumerate((plain, plain.flip(-1)) * 2):
        assert torch.equal(images[0][1, 5, turn][0], plain)
        assert torch.equal(images[1][1, 5, turn][0], mirrored)

    args = argparse.Namespace(seed=3, batch=7, steps=8)
    keys = itertools.chain(*train.step_keys(args, images[0], 0))
    turns = sorted((i, turn % 2) for i, _, turn in keys)
    assert turns == sorted(itertools.product(range(7), (0, 1) * 4))


@pytest.mark.parametrize("workers", [0, 3])
def test_images_come_in_the_order_of_their_keys_one_list_ahead(workers):
    begun, lists = [], [range(7), range(7, 9), range(9, 15)]

    class Slow(dict):
        def __missing__(self, key):
            begun.append(key)
            time.sleep(0.01 * (-key % 3))
            return torch.full((1,), key), 0

    batches = train.loaded(argparse.Namespace(workers=workers), Slow(), iter(lists))
    for number, images in enumerate(batches):
        assert images[:, 0].tolist() == list(lists[number])
        assert len(begun) <= sum(map(len, lists[: number + 2]))
    assert sorted(begun) == list(range(15))


def test_a_broken_file_is_named_once_and_replaced_by_another_of_its_class(folder, capsys):
    renamed = folder / "cat" / "0\x1b[31m.png"
    (folder / "cat" / "0.png").rename(renamed).write_text("text")
    (folder / "dog" / "3.jpg").write_bytes(b"")
    images = train.Images(train.list_images(folder)[0], 16)
    for _ in range(2):
        for index, other in ((0, 1), (6, 3)):  # the last one's next is the first of its class
            pixels, label = images[index, None, 0]
            expected, same = images[other, None, 0]
            assert torch.equal(pixels, expected) and label == same
    expected = ""
    for name in ("cat/0?[31m.png", "dog/3.jpg"):
        expected += f"skipped: {folder}/{name}: no image of these formats\n"
    assert capsys.readouterr().err == expected
    for path in (folder / "cat").iterdir():
        path.write_text("text")
    held_out = train.Images(images.items, 16, any_class=True)  # by any other, with its label
    assert held_out[2, None, 0][1] == held_out.labels[2] != images.labels[2]
    with pytest.raises(ValueError, match="--data: .*cat/1.png cannot be read, nor one that could"):
        train.Images(train.list_images(folder)[0], 16)[1, None, 0]


@pytest.mark.parametrize("count, most", [(40, 10), (400, 20)])
def test_more_than_a_twentieth_and_more_than_ten_broken_files_stop_the_run(tmp_path, count, most):
    save_all(tmp_path, "good.png")
    (tmp_path / "bad.png").write_text("text")
    for broken in (most, most + 1):
        bad = [(str(tmp_path / "bad.png"), 0)] * broken
        images = train.Images(bad + [(str(tmp_path / "good.png"), 0)] * (count - broken), 16)
        if broken == most:
            assert all(images[index, None, 0][0].shape == (3, 16, 16) for index in range(count))
            continue
        with pytest.raises(ValueError, match="--data: more than 5 % of the images") as caught:
            images[0, None, 0]
        assert str(caught.value).count("bad.png") == 10 and "\n" not in str(caught.value)


@quick
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_the_frechet_distance_of_gaussians(dimensions, seed):
    a, shift = normal(40, dimensions, seed=seed), normal(dimensions, seed=seed + 1)
    moved = shift.square().sum().item()
    assert judge.frechet(a, a + shift) == pytest.approx(moved, rel=1e-7, abs=1e-8)
    centred = a - a.mean(0)
    spread = 4 * centred.var(0).sum().item()
    assert judge.frechet(centred, 3 * centred) == pytest.approx(spread, rel=1e-6)
