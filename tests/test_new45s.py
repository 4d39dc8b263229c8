import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from test_sample import *  # noqa


@quick
@given(st.integers(0, 2**20), st.floats(0, 1))
def test_pixels_under_the_mask_change_nothing(seed, share):
    generator = torch.Generator().manual_seed(seed)
    one, other, chance = (torch.rand(3, 3, 6, 8, generator=generator) for _ in range(3))
    mask = chance[:, :1] < share
    pictures = [2 * one - 1, torch.where(mask, 1 - 2 * other, 2 * one - 1)]
    edits = [sample.edit(PARAMS, CODEC, images, mask, LABELS, seed=seed) for images in pictures]
    assert torch.equal(*edits)


def test_hidden_pixels_become_like_their_surroundings():
    images, mask = torch.full((1, 3, 9, 9), 0.5), torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 4:] = True
    images[..., 3] = 0.9
    seen = sample.replace_hidden(images.masked_fill(mask, -1), mask, 3)[0, 0, 4]
    mean = (3 * 0.5 + 0.9) / 4
    close(seen[:4], images[0, 0, 4, :4])
    close(seen[4:], [mean + (0.9 - mean) * fade for fade in (0.75, 0.5, 0.25, 0, 0)], 1e-6)
    assert (sample.replace_hidden(images, mask | True, 3) == 0).all()


def test_a_thin_stroke_of_a_large_mask_is_repainted(run, tmp_path):
    stroke = np.zeros((600, 800), np.uint8)
    stroke[:, 205:209] = 255
    Image.fromarray(stroke).save(tmp_path / "stroke.png")
    args = sample.parser().parse_args(
        [str(run), "--edit", str(run / "photo.png"), "--mask", str(tmp_path / "stroke.png")]
    )
    _, mask = sample.photo_and_mask(args, (8, 6))
    expected = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    expected[..., 2] = True
    assert torch.equal(mask, expected)


def test_a_run_before_its_masked_stage_is_drawn_and_told(tmp_path, capsys):
    run = run_folder(tmp_path / "run", PLAIN, "next-scale.pt", flags=dict(causal=False))
    (run / "hmar.pt").symlink_to("nothing")
    assert_same(archived(tmp_path, run, "--count", 1), drawn([0, 1, 2], schedule=0))
    assert "next-scale.pt: without masked passes" in capsys.readouterr().err


def test_a_name_goes_before_all_and_before_numbers(tmp_path):
    for names, text, number in ((["a", "all", "b"], "all", 1), (["1", "2", "0"], "1", 0)):
        run = run_folder(tmp_path / text, class_names=names)
        pixels = archived(tmp_path, run, "--labels", text, "--count", 1)
        assert_same(pixels, drawn([number]))


def test_what_a_killed_sampler_left_goes(run, tmp_path):
    flags = (run, "--count", 1, "--out", tmp_path / "folder")
    assert call(*flags) == 0
    (tmp_path / "folder/000000-0.png.abc.tmp").write_text("half")
    assert call(*flags) == 0 and len(contents(tmp_path)) == 4


def test_large_images_are_read_one_at_a_time(tmp_path, monkeypatch):
    Image.new("L", (6000, 6000)).save(tmp_path / "a.png")
    threads, most, convert = [], [], sample.as_rgb

    def as_rgb(image):
        threads.append(image)
        most.append(len(threads))
        time.sleep(0.1)
        threads.pop()
        return convert(image)

    monkeypatch.setattr(sample, "as_rgb", as_rgb)
    with ThreadPoolExecutor(2) as pool:
        images = [*pool.map(partial(sample.read_image, shortest=8), 2 * [tmp_path / "a.png"])]
    assert most == [1, 1] and {image.size for image in images} == {(8, 8)}


def test_a_jpeg_may_be_larger_than_what_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (160, 80), "red").save(tmp_path / name)
    assert sample.read_image(tmp_path / "a.jpg", shortest=10).size == (20, 10)
    for name, shortest in (("a.jpg", None), ("a.png", 10), ("a.jpg", 80)):
        with pytest.raises(ValueError, match=rf"{name}: .*(12800|160 x 80) pixels"):
            sample.read_image(tmp_path / name, shortest)
