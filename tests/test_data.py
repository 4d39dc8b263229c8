"""Data: drawn shapes, image folders, reading, cropping, splitting, and the judge's Frechet distance."""

import contextlib
import io
import os
import pickle
import warnings
from pathlib import Path

import judge  # puts the repository on the path
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared images are not here")
quick = settings(max_examples=25, deadline=None)
PICTURE = train.draw_shape(4, 48)[0].resize((60, 48))


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # two on a busy machine wait for each other more than they work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def closeness(image, other):
    """The largest difference of two images in grey levels."""
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max())


def save_all(folder, *names, size=(20, 16)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name) * 7 % 256, 90, 30)).save(folder / name)


@quick
@given(st.integers(0, 2**40), st.integers(8, 80))
def test_a_drawing_depends_on_its_index_alone(index, size):
    np.random.seed(size)
    image, label = train.draw_shape(index, size)
    again, _ = train.draw_shape(np.int64(index), size)
    assert image.mode == "RGB" and image.size == (size, size) and label == index % 10
    assert image.tobytes() == again.tobytes() != train.draw_shape(index + 10, size)[0].tobytes()


@quick
@given(st.integers(0, 10_000), st.sampled_from([64, 128, 96]))
def test_a_drawing_shows_the_same_at_every_size(index, size):
    small, large = (
        np.asarray(image, dtype=float)
        for image in (
            train.draw_shape(index)[0],
            train.draw_shape(index, size)[0].resize((32, 32), Image.Resampling.BOX),
        )
    )
    assert np.abs(small - large).mean() < 4  # edges are placed to a quarter of a pixel


def test_drawings_are_balanced_bright_on_dark_and_differ_by_class():
    assert np.bincount([train.draw_shape(index)[1] for index in range(200)]).tolist() == [20] * 10
    images = np.stack([np.asarray(train.draw_shape(index)[0]) for index in range(1000)])
    assert images.dtype == np.uint8
    brightness = images.max(axis=3)
    assert (brightness.max(axis=(1, 2)) >= 0.85 * 255 - 1).all() and (
        brightness.min(axis=(1, 2)) <= 0.3 * 255 + 1
    ).all()
    covered = (
        (brightness > 0.5 * 255).mean(axis=(1, 2)).reshape(-1, 10).mean(axis=0)
    )  # part of the image that a class fills
    of = dict(zip(train.SHAPES, covered))
    assert of["disc"] > of["hexagon"] > of["square"] > of["triangle"] > of["star"] > 0.1
    assert of["ring"] < 0.8 * of["disc"] and of["crescent"] < 0.65 * of["disc"]


def test_a_ring_has_a_hole_and_no_cut():
    for index in range(1, 2000, 10):
        image = np.asarray(train.draw_shape(index, 64)[0]).max(axis=2) > 128
        rows, columns = np.nonzero(image)
        y, x = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        if columns.max() < 63 and rows.max() < 63 and columns.min() > 0 and rows.min() > 0:
            radius, angle = (columns.max() - columns.min()) / 2, np.linspace(0, 2 * np.pi, 200)
            at = [
                image[
                    np.rint(y + part * radius * np.sin(angle)).astype(int),
                    np.rint(x + part * radius * np.cos(angle)).astype(int),
                ]
                for part in (0.3, 0.75)
            ]
            assert not at[0].any() and at[1].all()


@pytest.mark.parametrize("arguments", [(-1,), (1.5,), ("3",), (None,), (3, 7), (3, 32.0), (3, -32)])
def test_a_drawing_refuses_bad_numbers(arguments):
    with pytest.raises(ValueError, match=r"(index|size): expected an integer of at least \d, got"):
        train.draw_shape(*arguments)


def test_a_sub_folder_is_a_class(tmp_path):
    save_all(
        tmp_path,
        "dog/2.png",
        "dog/1.JPG",
        "cat/deep/3.webp",
        "cat/4.bmp",
        "cat/5.gif",
        "cat/6.jpeg",
    )
    save_all(tmp_path, "cat/.7.png", ".git/8.png", "cat/.old/9.png")
    for name in (".DS_Store", "notes.txt", "cat/notes.txt", "cat/.DS_Store"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    files, classes = train.list_images(tmp_path)
    assert classes == ("cat", "dog")
    assert [(os.path.relpath(path, tmp_path), label) for path, label in files] == [
        ("cat/4.bmp", 0),
        ("cat/5.gif", 0),
        ("cat/6.jpeg", 0),
        ("cat/deep/3.webp", 0),
        ("dog/1.JPG", 1),
        ("dog/2.png", 1),
    ]


def test_a_flat_folder_is_one_class(tmp_path):
    save_all(tmp_path, "holiday/b.png", "holiday/a.png")
    (tmp_path / "holiday" / "empty").mkdir()
    assert train.list_images(f"{tmp_path}/holiday/") == (
        [(f"{tmp_path}/holiday/a.png", 0), (f"{tmp_path}/holiday/b.png", 0)],
        ("holiday",),
    )


def test_links_in_a_circle_end(tmp_path):
    save_all(tmp_path, "data/cat/1.png", "elsewhere/2.png")
    for link, target in (
        ("self", "self"),
        ("up", "."),
        ("far", ".."),
        ("cat/up", ".."),
        ("dog", "../elsewhere"),
        ("cat/gone.png", "nowhere"),
    ):
        (tmp_path / "data" / link).symlink_to(target)
    files, classes = train.list_images(tmp_path / "data")
    assert classes == ("cat", "dog") and [Path(path).name for path, _ in files] == [
        "1.png",
        "gone.png",
        "2.png",
    ]
    assert len(train.check_images(files)) == 2


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    save_all(tmp_path, "cat/1.png", "dog/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert train.list_images(tmp_path)[1] == ("cat",)
    assert capsys.readouterr().err.count(f"{tmp_path}/dog") == 1
    with pytest.raises(ValueError, match="holds none"):
        train.list_images(tmp_path / "dog")


def test_folders_without_a_meaning_are_refused(tmp_path):
    save_all(tmp_path, "both/1.png", "both/cat/2.png")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    for name, message in (
        ("none", "which is missing"),
        ("both/1.png", "which is no folder"),
        ("empty", "holds none"),
        ("both", "'1.png' beside the sub-folder 'cat'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            train.list_images(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


TRANSPARENT = Image.new("RGBA", (20, 16), (200, 0, 0, 0))
TRANSPARENT.paste((0, 120, 0, 255), (0, 0, 10, 16))
TRANSPARENT.paste((0, 0, 0, 128), (0, 8, 10, 16))
ON_WHITE = Image.new("RGB", (20, 16), "white")
ON_WHITE.paste((0, 120, 0), (0, 0, 10, 16))
ON_WHITE.paste((127, 127, 127), (0, 8, 10, 16))
GREY = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
PALETTE = PICTURE.quantize(8)
CODED = Image.new("P", (9, 9), 1)  # code 1 is red, code 0 is green
CODED.putpalette([0, 255, 0, 255, 0, 0])
CODED.putpixel((2, 3), 0)
CODED_ON_WHITE = Image.new("RGB", (9, 9), "white")
CODED_ON_WHITE.putpixel((2, 3), (0, 255, 0))
FRAMES = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
BITMAP = Image.new("1", (20, 16), 1)
CASES = {  # name: (bytes of a file, the picture it shows, how far apart they may be in grey levels)
    "rgb.png": (encoded(PICTURE, "PNG"), PICTURE, 0),
    "rgb.bmp": (encoded(PICTURE, "BMP"), PICTURE, 0),
    "rgb.webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, 0),
    "flat.jpg": (
        encoded(FRAMES[0], "JPEG", quality=100),
        FRAMES[0],
        2,
    ),  # colours rounded twice, to YCbCr and back
    "progressive.jpg": (encoded(FRAMES[1], "JPEG", quality=100, progressive=True), FRAMES[1], 2),
    "really_png.jpg": (encoded(PICTURE, "PNG"), PICTURE, 0),
    "grey.png": (encoded(PICTURE.convert("L"), "PNG"), PICTURE.convert("L").convert("RGB"), 0),
    "grey.jpg": (
        encoded(Image.new("L", (20, 16), 77), "JPEG"),
        Image.new("RGB", (20, 16), (77, 77, 77)),
        1,
    ),
    "one_bit.png": (encoded(BITMAP, "PNG"), BITMAP.convert("RGB"), 0),
    "palette.png": (encoded(PALETTE, "PNG"), PALETTE.convert("RGB"), 0),
    "palette.gif": (encoded(PALETTE, "GIF"), PALETTE.convert("RGB"), 0),
    "frames.gif": (
        encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        FRAMES[0],
        0,
    ),
    "frames.webp": (
        encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        FRAMES[0],
        0,
    ),
    "frames.png": (
        encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
        FRAMES[0],
        0,
    ),
    "alpha.png": (encoded(TRANSPARENT, "PNG"), ON_WHITE, 1),
    "alpha.webp": (encoded(TRANSPARENT, "WEBP", lossless=True), ON_WHITE, 1),
    "grey_alpha.png": (
        encoded(Image.merge("LA", [Image.new("L", (9, 9), 0)] * 2), "PNG"),
        Image.new("RGB", (9, 9), "white"),
        0,
    ),
    "palette_alpha.png": (encoded(CODED, "PNG", transparency=1), CODED_ON_WHITE, 0),
    "palette_alphas.png": (encoded(CODED, "PNG", transparency=bytes([255, 0])), CODED_ON_WHITE, 0),
    "palette_alpha.gif": (encoded(CODED, "GIF", transparency=1), CODED_ON_WHITE, 0),
    "key_colour.png": (
        encoded(Image.new("RGB", (9, 9), (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
        Image.new("RGB", (9, 9), "white"),
        0,
    ),
    "cmyk.jpg": (encoded(FRAMES[0].convert("CMYK"), "JPEG", quality=100), FRAMES[0], 2),
    "sixteen.png": (
        encoded(GREY, "PNG"),
        Image.fromarray(np.rint(np.asarray(GREY) / 257).astype(np.uint8)).convert("RGB"),
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_becomes_the_same_rgb(tmp_path, name):
    content, expected, tolerance = CASES[name]
    (tmp_path / name).write_bytes(content)
    image = sample.read_image(str(tmp_path / name))
    assert image.mode == "RGB" and image.size == expected.size
    assert closeness(image, expected) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_turned_upright(tmp_path, orientation, kind):
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste("lime", (0, 0, 8, 8))  # a mark in the corner at the top left
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # members of Transpose
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", kind, exif=exif)
    image = sample.read_image(tmp_path / "a.png")
    assert (
        image.size == (32, 16)
        and np.asarray(image)[3, 3, 1] > 200
        and np.asarray(image)[13, 28, 0] > 200
    )


@pytest.mark.parametrize(
    "name",
    ["rgb.png", "rgb.bmp", "rgb.webp", "progressive.jpg", "palette.gif", "cmyk.jpg", "sixteen.png"],
)
def test_truncated_and_empty_files_are_named(tmp_path, name):
    path = tmp_path / name
    for content in (CASES[name][0][: len(CASES[name][0]) // 2], CASES[name][0][:7], b""):
        path.write_bytes(content)
        for shortest in (None, 1):
            with pytest.raises(ValueError) as caught:
                sample.read_image(path, shortest)
            assert (
                str(caught.value).startswith(f"{path}: ")
                and str(caught.value).count(name) == 1
                and "\n" not in str(caught.value)
            )


@quick
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_files_are_read_or_refused(tmp_path_factory, name, damage):
    content = bytearray(CASES[name][0])
    for place, value in damage:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        assert sample.read_image(path).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_other_files_are_refused_with_a_reason(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "tiff.png").write_bytes(encoded(PICTURE, "TIFF"))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (10_001, 10_000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "larger.png")
    for name, reason in (
        ("text.jpg", "no image"),
        ("tiff.png", "no image"),
        ("folder.png", "no regular file"),
        ("pipe.png", "no regular file"),
        ("gone.png", "missing"),
        ("large.png", "10001 x 10000 pixels"),
        ("larger.png", "400000000 pixels"),
    ):
        with (
            pytest.warns(Warning) if name == "large.png" else contextlib.nullcontext(),
            pytest.raises(ValueError, match=reason) as caught,
        ):
            sample.read_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="10001 x 10000"):
        warnings.simplefilter("error")  # no remarks of Pillow's beside our own line
        train.check_images([(tmp_path / "large.png", 0)])


def test_a_mixed_folder_names_its_three_broken_files_once(tmp_path, capsys, recwarn):
    good = ["grey.png", "alpha.png", "palette.png", "cmyk.jpg", "sixteen.png"]
    for name in good:
        (tmp_path / name).write_bytes(CASES[name][0])
    (tmp_path / "broken.jpg").write_text("text")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(CASES["rgb.png"][0][: len(CASES["rgb.png"][0]) // 2])
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "notes.txt").write_text("notes")
    files = train.check_images(train.list_images(tmp_path)[0])
    assert sorted(Path(path).name for path, _ in files) == sorted(good)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 3
        and all(line.startswith(f"skipped: {tmp_path}/") for line in lines)
        and not recwarn
    )
    assert [Path(line.split(": ")[1]).name for line in lines] == [
        "broken.jpg",
        "empty.png",
        "half.png",
    ]
    dataset = train.Images(files, 16)
    assert all(
        dataset[index, seed][0].shape == (3, 16, 16) for index in range(5) for seed in (None, 0, 1)
    )


@pytest.mark.parametrize(
    "count, broken, ends",
    [
        (40, 10, False),
        (40, 11, True),
        (400, 20, False),
        (400, 21, True),
        (3, 3, True),
        (0, 0, True),
    ],
)
def test_more_than_a_twentieth_broken_ends_the_run(tmp_path, capsys, count, broken, ends):
    save_all(tmp_path, "good.png")
    (tmp_path / "bad.png").write_text("text")
    bad = [(str(tmp_path / "bad.png"), number) for number in range(broken)]
    files = [(str(tmp_path / "good.png"), number) for number in range(count - broken)]
    mixed = files[:5] + bad + files[5:]
    if not ends:
        assert train.check_images(mixed) == files
        assert len(capsys.readouterr().err.splitlines()) == broken
        return
    with pytest.raises(
        ValueError, match=f"data: {broken} of {count} images cannot be read"
    ) as caught:
        train.check_images(mixed)
    assert str(caught.value).count("bad.png") == min(broken, 10) and "\n" not in str(caught.value)
    assert (f"and {broken - 10} more" in str(caught.value)) == (broken > 10)
    assert capsys.readouterr().err == ""


names = st.lists(
    st.text("abcdefgh0123456789", min_size=1, max_size=6), min_size=2, max_size=60, unique=True
)


@quick
@given(names, st.floats(0, 0.99))
def test_the_held_out_part_is_stable(names, fraction):
    files = [(f"/data/cat/{name}.png", 0) for name in names]
    training, held_out = train.split_held_out(files, "/data", fraction)
    assert training and held_out and sorted(training + held_out) == sorted(files)
    moved = [(f"/elsewhere{path}", label) for path, label in files]
    assert train.split_held_out(moved, "/elsewhere/data", fraction)[1] == [
        (f"/elsewhere{path}", label) for path, label in held_out
    ]
    few, fewer = (
        train.split_held_out(files[:-1], "/data", fraction)
        if len(files) > 2
        else (training, held_out)
    )
    # when a file goes the others stay where they are, but for the one that may have to move so that no part is empty
    assert len(set(fewer) - set(held_out)) <= 1 and len(set(few) - set(training)) <= 1


def test_the_held_out_part_has_the_size_asked_for():
    files = [(f"data/{number % 10}/{number:05}.jpg", number % 10) for number in range(20_000)]
    held_out = train.split_held_out(files, "data", 0.05)[1]
    assert (
        abs(len(held_out) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    )  # five standard deviations of a binomial count
    assert [path for path, _ in held_out[:3]] == [
        "data/4/18984.jpg",
        "data/3/12463.jpg",
        "data/9/09259.jpg",
    ]  # on every machine
    assert len({label for _, label in held_out[:40]}) == 10
    assert set(held_out) <= set(train.split_held_out(files, "data", 0.1)[1])


@pytest.mark.parametrize(
    "count, fraction, message",
    [
        (1, 0.05, "data: .* got 1"),
        (0, 0.05, "data: .* got 0"),
        (5, 1, "fraction: .* got 1"),
        (5, -0.1, "fraction: .* got -0.1"),
    ],
)
def test_a_split_refuses_what_it_cannot_do(count, fraction, message):
    with pytest.raises(ValueError, match=message):
        train.split_held_out(
            [(f"data/{number}.png", 0) for number in range(count)], "data", fraction
        )


@quick
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.none() | st.integers(0, 2**63),
    st.booleans(),
)
def test_a_crop_has_its_size_and_colours(width, height, size, seed, flip):
    image = Image.new("RGB", (width, height), (10, 200, 90))
    assert (
        np.asarray(train.crop(image, size, seed, flip)).tolist() == [[[10, 200, 90]] * size] * size
    )


def gradient(width, height):
    """The red channel grows from left to right, the green one from top to bottom, by one grey level a pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@quick
@given(st.integers(32, 200), st.integers(32, 200))
def test_the_centre_crop_is_the_centre(width, height):
    pixels = np.asarray(gradient(width, height))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    exact = train.crop(Image.fromarray(pixels), side)  # nothing to resize: the very pixels
    assert (np.asarray(exact) == pixels[top : top + side, left : left + side]).all()
    small = np.asarray(train.crop(Image.fromarray(pixels), 16), dtype=float)
    assert (
        abs(small[..., 0].mean() - (left + side / 2 - 0.5)) < 1
        and abs(small[..., 1].mean() - (top + side / 2 - 0.5)) < 1
    )


def test_a_random_crop_moves_zooms_and_flips():
    image = gradient(200, 128)
    seen = np.stack([np.asarray(train.crop(image, 64, seed), dtype=float) for seed in range(300)])
    steps = (
        seen[:, 32, 56, 0] - seen[:, 32, 8, 0]
    ) / 48  # source pixels a pixel, negative where mirrored
    mirrored = steps < 0
    zoom = 128 / 64 / np.abs(steps)  # the shorter side over the size
    assert abs(mirrored.mean() - 0.5) < 5 * (0.25 / 300) ** 0.5
    assert 0.97 < zoom.min() < 1.02 and 1.10 < zoom.max() < 1.16
    assert (
        seen[..., 0].min() < 5 and seen[..., 0].max() > 194
    )  # both ends of the longer side are reached
    assert seen[:, 0, :, 1].std() > 1  # and the shorter one moves too
    unflipped = np.stack(
        [np.asarray(train.crop(image, 64, seed, flip=False), dtype=float) for seed in range(300)]
    )
    assert (unflipped[:, 32, 56, 0] > unflipped[:, 32, 8, 0]).all()
    assert (unflipped[mirrored] == seen[mirrored][:, :, ::-1]).all()


def test_an_image_of_an_extreme_shape_costs_little():
    assert train.crop(Image.new("RGB", (60_000, 1)), 256, 0).size == (256, 256)


@pytest.fixture
def folder(tmp_path):
    save_all(
        tmp_path,
        *(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)),
        size=(40, 24),
    )
    gradient(50, 40).save(tmp_path / "dog" / "3.jpg", quality=95)
    return tmp_path


def test_items_are_decided_by_their_keys(folder):
    files, _ = train.list_images(folder)
    for dataset in (
        train.Images(files, 16),
        train.Images(range(30, 37), 16),
        train.Images(np.arange(7), 16),
    ):
        assert len(dataset) == 7
        keys = [(index, seed) for index in range(7) for seed in (None, 0, 1, 2**40, (5, 6))]
        items = [dataset[key] for key in keys]
        copy = pickle.loads(pickle.dumps(dataset))
        for key, (pixels, label) in reversed(list(zip(keys, items))):
            again, same = copy[key]
            assert (
                pixels.dtype == torch.uint8
                and pixels.shape == (3, 16, 16)
                and pixels.is_contiguous()
            )
            assert torch.equal(pixels, again) and label == same
    assert [dataset[index, None][1] for index in range(7)] == [index % 10 for index in range(7)]
    drawing = torch.from_numpy(np.array(train.draw_shape(3, 16)[0])).permute(2, 0, 1)
    assert all(
        torch.equal(dataset[3, seed][0], drawing) for seed in (None, 0, 1)
    )  # drawings stay whole
    photo = train.Images(files, 32)
    assert not torch.equal(photo[6, 0][0], photo[6, 1][0]) and photo[6, 0][1] == 1
    mirrored = [
        seed
        for seed in range(8)
        if not torch.equal(train.Images(files, 32, flip=False)[6, seed][0], photo[6, seed][0])
    ]
    assert 0 < len(mirrored) < 8


def test_workers_give_the_same_items(folder):
    dataset = train.Images(train.list_images(folder)[0], 16)
    keys = [[(index, index * 3) for index in range(4)], [(6, None), (5, 1), (4, 2)]]
    alone, beside = (
        list(torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=workers))
        for workers in (0, 1)
    )
    for (pixels, labels), (others, other_labels) in zip(alone, beside):
        assert torch.equal(pixels, others) and torch.equal(labels, other_labels)


def test_a_large_jpeg_is_decoded_small_yet_looks_the_same(tmp_path):
    PICTURE.resize((1200, 960), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=95)
    small, large = (
        sample.read_image(tmp_path / "a.jpg", shortest=64),
        sample.read_image(tmp_path / "a.jpg"),
    )
    assert large.size == (1200, 960) and 64 <= min(small.size) < 256
    assert closeness(train.crop(small, 32), train.crop(large, 32)) < 16
    item, _ = train.Images([(tmp_path / "a.jpg", 0)], 200)[
        0, None
    ]  # never enlarged from a decoding that is too small
    assert closeness(item.permute(1, 2, 0), train.crop(large, 200)) < 16


@needs_shared
def test_the_shared_images_are_read():
    files, classes = train.list_images(SHARED / "cifar10" / "test")
    assert len(classes) == 10 and len(train.check_images(files)) == len(files) == len(
        {path for path, _ in files}
    )
    exact = train.Images(files, 32)[0, None][0].permute(1, 2, 0).numpy()
    assert (exact == np.asarray(Image.open(files[0][0]).convert("RGB"))).all()
    photos, _ = train.list_images(SHARED / "photos")
    assert train.Images(photos, 64)[0, 0][0].shape == (3, 64, 64)


@quick
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_the_frechet_distance_of_gaussians(dimensions, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 40, dimensions, generator=generator, dtype=torch.float64)
    shift = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    assert abs(judge.frechet(a, a)) < 1e-9
    assert judge.frechet(a, a + shift) == pytest.approx(
        shift.square().sum().item(), rel=1e-7, abs=1e-8
    )
    assert (
        judge.frechet(a, b) == pytest.approx(judge.frechet(b, a), abs=1e-8)
        and judge.frechet(a, b) > 0
    )
    centred = a - a.mean(0)
    assert judge.frechet(centred, 3 * centred) == pytest.approx(
        4 * centred.var(0).sum().item(), rel=1e-6
    )


def test_the_judge_knows_shapes_and_keeps_itself(tmp_path):
    cache = tmp_path / "judge.pt"
    small = {"cache": cache, "count": 1000, "epochs": 2}
    network = judge.train_judge(**small)
    images, labels = judge.drawings(judge.HELD_OUT, 200)
    assert images.shape == (200, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert (
        judge.accuracy(network, images, labels)
        > 0.6
        > judge.accuracy(network, images, (labels + 1) % 10)
    )
    found = judge.features(network, images)
    assert found.dtype == torch.float64 and found.shape == (200, judge.FEATURES)
    assert torch.equal(found, judge.features(network, images.clone()))
    written = cache.stat().st_mtime_ns
    assert (
        torch.equal(judge.features(judge.train_judge(**small), images), found)
        and cache.stat().st_mtime_ns == written
    )
    judge.train_judge(**{**small, "count": 64, "epochs": 1})
    assert cache.stat().st_mtime_ns != written and list(tmp_path.iterdir()) == [cache]
