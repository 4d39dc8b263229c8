"""Data: drawings, folders of images, what is read, cropped, held out; Frechet distances."""

import errno
import gc
import io
import os
from types import SimpleNamespace
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
    found = train.list_images(tmp_path)
    files, classes = found["files"], found["class_names"]
    assert classes == ["cat", "dog"]
    assert files == [(str(tmp_path / name), int(name[0] == "d")) for name in kept]
    lost = ["2 files of .txt passed over", "empty: no image for this class"]
    assert found["notes"] == [f"--data: {note}" for note in lost]
    found = train.list_images(f"{tmp_path}/dog/")  # images alone are one class
    files, classes = found["files"], found["class_names"]
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


def test_a_link_to_nothing_and_a_pipe_are_passed_over(tmp_path):
    save_all(tmp_path, "cat/1.png", "dog/2.png")
    before = train.list_images(tmp_path)
    (tmp_path / "cat/gone.png").symlink_to("nothing")
    os.mkfifo(tmp_path / "cat/pipe.png")
    assert train.list_images(tmp_path) == before | dict(
        notes=["--data: 2 files of .png passed over"]
    )


def test_a_twentieth_is_held_out_but_never_most():
    counts = [train.count_held_out(count) for count in (2, 80, 1000, 4000, 9000, 10**6)]
    assert counts == [1, 10, 125, 200, 450, 500]


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


def prepared(folder, out, *flags):
    """(images, labels) in the order of the run, prepared by the command's first step."""
    flags = ["--data", folder, "--out", out, "--size", 16, *flags]
    args = train.parser().parse_args([str(flag) for flag in flags])
    run = train.make_run(args, torch.device("cpu"))
    train.claim_and_prepare(run).close()
    return np.array(train.load_images(run)), torch.cat(train.load_labels(run)).tolist()


def test_images_are_prepared_in_crops_in_an_order_by_the_seed(folder, tmp_path_factory):
    outs = [tmp_path_factory.mktemp("runs") / name for name in "abc"]
    images, labels = prepared(folder, outs[0])
    assert images.shape == (7, 16, 3, 16, 16) and sorted(labels) == [0] * 3 + [1] * 4
    again, _ = prepared(folder, outs[1])
    assert (images == again).all()
    _, others = prepared(folder, outs[2], "--seed", 8)
    assert others != labels

    # crop 0 is the centre, the others are unlike each other
    files = train.list_images(folder)["files"]
    centres = [np.asarray(train.crop(sample.read_image(path), 16)) for path, _ in files]
    (photo,) = [row for row in images if len(np.unique(row[0])) > 20]
    assert (photo[0].transpose(1, 2, 0) == centres[-1]).all()
    assert len({crop.tobytes() for crop in photo}) == 16


def test_a_large_folder_has_two_crops_an_image(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(train, "CROPS", 7)
    images, _ = prepared(folder, tmp_path_factory.mktemp("run"))
    assert images.shape[1] == 2


def test_every_second_crop_is_mirrored_if_asked(folder, tmp_path_factory):
    for path in folder.rglob("*.*"):
        gradient(40, 30).save(path)
    pairs = [["--flip"], []]
    images = [prepared(folder, tmp_path_factory.mktemp("run"), *flip)[0] for flip in pairs]
    grows = [rows[:, :, 0, 8, 15].astype(int) - rows[:, :, 0, 8, 0] for rows in images]
    assert (grows[0][:, ::2] > 0).all() and (grows[0][:, 1::2] < 0).all() and (grows[1] > 0).all()


def test_a_broken_file_is_named_and_left_out(folder, tmp_path_factory, capsys):
    broken = [folder / "cat" / "0.png", folder / "dog" / "3.jpg"]
    for path in broken:
        path.write_text("text")
    _, labels = prepared(folder, tmp_path_factory.mktemp("run"))
    lines = [f"left out: {path}: no image of these formats" for path in broken]
    assert sorted(capsys.readouterr().err.splitlines()) == lines
    assert sorted(labels) == [0, 0, 1, 1, 1]
    for path in folder.rglob("*.*"):
        path.write_text("text")
    with pytest.raises(ValueError, match="--data: 0 images can be read"):
        prepared(folder, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, None])
def test_what_the_system_refuses_ends_the_run(folder, tmp_path_factory, code):
    error = OSError(code, "") if code else MemoryError
    refusal = mock.patch.object(sample, "read_image", side_effect=error)
    out = tmp_path_factory.mktemp("run")
    with (
        refusal,
        pytest.raises(ValueError if code else MemoryError, match="--data: " if code else None),
    ):
        prepared(folder, out)
    gc.collect()  # the lock
    assert [path.name for path in out.iterdir() if path.is_file()] == ["lock"]
    assert len(prepared(folder, out)[0]) == 7


def test_an_epoch_has_every_row_once(tmp_path):
    run = SimpleNamespace(seed=3, batch=4, crops=5)
    drawn = [train.draw_rows(run, "tokenizer", step, 10)[:2] for step in range(1, 21)]
    rows, crops = (np.concatenate(parts) for parts in zip(*drawn))
    epochs = rows.reshape(8, 10)
    assert (np.sort(epochs) == range(10)).all() and len(np.unique(epochs, axis=0)) == 8
    assert np.bincount(crops, minlength=5).min() > 4


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
