"""Training: nothing is lost, processes are one, what a step computes, wrong flags."""

import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import captured, contents, failure, leaves_equal, prepared, small_codec, tree
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

FLAGS = ["--size", 16, "--depth", 1, "--batch", 4, "--steps", 24]
FLAGS += ["--dtype", "fp32", "--device", "cpu", "--data", "data"]
SHORT = ["--steps", 1, "--lr", 1e-9]
STAGES = "tokenizer", "next-scale", "masked"
SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels
CODEC = small_codec(attention=False, seed=7)  # cells of two pixels
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "triton", "pytest", "hypothesis", "PIL.Image"])


# Commands, in processes or this one


def command(flags, seconds, environment, log):
    """`python train.py FLAGS`, killed after some seconds unless they are 0."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    train.main(flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(30):
        path = folder / train.SHAPES[index % 3] / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        train.draw_shape(index, 16)[0].save(path)
    return folder


@pytest.fixture(autouse=True)
def data(own_folder, folder):
    os.symlink(folder, "data")


def start(out, *flags, seconds=0, **environment):
    """A process, forked from one that has imported torch."""
    flags = [str(flag) for flag in (*FLAGS, "--out", out, *flags)]
    _, log = tempfile.mkstemp(dir=Path(out).parent)
    given = flags, seconds, environment, log
    process = FORKS.Process(target=command, args=given, daemon=True)
    process.log = log
    process.start()
    return process


def ended(process, status=0):
    """What it printed."""
    process.join()
    said = Path(process.log).read_text()
    assert process.exitcode == status, said
    return said


def run(out, *flags):
    """The line with which the command fails, or None."""
    return failure(train.main, *FLAGS, "--out", out, *flags)


def results(out):
    """{name: bytes} of a run folder, without metrics.jsonl, whose lines may repeat after a kill."""
    return {name: data for name, data in contents(out).items() if name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, folder):
    """A run folder of all three stages that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "base"
    out.with_name("said").write_text(ended(start(out, "--data", folder)))
    return out


@pytest.fixture
def out(base, own_folder):
    return Path(shutil.copytree(base, "run"))


def remove(out, *parts):
    """Removes parts of a run's model.pt, as if their stages had not run."""
    model = torch.load(out / "model.pt")
    for part in parts:
        model.pop(part)
    torch.save(model, out / "model.pt")


def lines_of(out, stage=None, name="stage"):
    lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if stage in (None, line["stage"]) and name in line]


def difference(ours, theirs):
    (ours, structure), (theirs, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert structure == other
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs))


def images_of(out):
    """The first crops as they are learned, (30, 3, 16, 16) in [-1, 1], three held out."""
    return torch.from_numpy(prepared(out)[:, 0] / np.float32(127.5) - 1)


def test_a_run_learns_and_leaves_a_folder(base, folder):
    said, record = base.with_name("said").read_text(), (base / "args.json").read_text()
    assert f"{base}: HMAR of depth 1, 27 images to train on, 3 held out, 3 classes; cpu" in said
    assert re.search(r"next-scale 16/24  0:00:\d\d left  loss \d", said)
    assert str(folder) not in record and str(base) not in record  # both may move
    for stage in STAGES:
        losses = [line["held_out_loss"] for line in lines_of(base, stage, "held_out_loss")]
        assert losses[-1] < losses[0]
        assert len(losses) == len(lines_of(base, stage, "loss"))
    names = "args.json images.npy labels.npy metrics.jsonl model.pt"
    names += " samples/masked.png samples/next-scale.png samples/reconstructions.png tokens.npy"
    assert sorted(contents(base)) == names.split()

    model = sample.load_model(base)
    assert model["classes"] == sorted(train.SHAPES[:3]) and model["is_causal"] is False
    assert model["sampling"] == train.sampling_settings(1, 16, 3)
    trees = model["tokenizer"], model["transformer"]
    assert all(type(leaf) is torch.Tensor for leaf in pytree.tree_leaves(trees))
    assert "masked" in model["transformer"]


# Kills


def test_kills_at_random_moments_change_nothing(base):
    """Nor does a move without the data, once the images are prepared."""
    data, out = shutil.copytree("data", "copy"), "run"
    for number in itertools.count(1):
        process = start(out, "--data", data, seconds=random.uniform(0.01, number / 2))
        process.join()
        if process.exitcode == 0:
            break
        ended(process, -signal.SIGALRM)
        if os.path.exists(f"{out}/labels.npy"):
            shutil.rmtree(data, ignore_errors=True)
            out = shutil.move(out, f"{number}")
    assert number > 2
    written = {name: data for name, data in results(out).items() if not name.endswith(".tmp")}
    assert written == results(base)


def test_a_run_that_is_stopped_says_so_and_goes_on(base, monkeypatch):
    for name in ("train_tokenizer", "train_next_scale", "train_masked"):
        with mock.patch.object(train, name, side_effect=KeyboardInterrupt):
            assert run("run") == "train.py: stopped"
    ended(start("run"))
    assert results("run") == results(base)


# The loop, on a linear regression


def toy_batch(step, positions):
    x = torch.randn(4, 3, generator=train.generator_of("toy", step))[positions]
    return dict(x=x, y=x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))


def toy_loss(params, x, y):
    wide = sum(weight.flatten(1).roll(i, 1) for i, weight in enumerate(params["wide"]))
    value = (hmar.linear(x, wide + params["tall"].T, params["bias"]) - y).square().mean()
    return value, dict(loss=value), ()


def toy_tree():
    wide = [torch.zeros(2, 3, 1, 1) for _ in range(3)]
    return dict(wide=wide, tall=torch.zeros(3, 2), bias=torch.zeros(2))


def toy_fit(out, evaluate=lambda tree: dict(loss=1.0), loss=toy_loss, steps=12, often=1, **more):
    os.makedirs(out, exist_ok=True)
    run = dict(steps=dict(toy=steps), lr=dict(toy=0.1), batch=4, size=16, evaluations=often)
    run |= dict(decay=0.05, newton_schulz=5)
    functions = dict(loss=loss, make_batch=toy_batch, evaluate=evaluate, draw=lambda tree: None)
    return train.fit("toy", run, Path(out), toy_tree(), **functions, **more)


def test_the_loop_equals_one_written_out(monkeypatch):
    monkeypatch.setattr(train, "AVERAGED", 1 / 12)
    monkeypatch.setattr(sample, "find_dtype", lambda *_: torch.bfloat16)  # as torch's Muon
    ours = toy_fit("run")
    theirs = pytree.tree_map(torch.nn.Parameter, toy_tree())
    leaves = pytree.tree_leaves(theirs)
    average = [leaf.detach().clone() for leaf in leaves]
    matrices = [torch.nn.Parameter(leaf.detach().flatten(1)) for leaf in leaves[:-1]]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=5)
    adamw = torch.optim.AdamW(leaves[-1:], betas=(0.9, 0.95), weight_decay=0)

    for step in range(1, 13):
        toy_loss(theirs, **toy_batch(step, slice(None)))[0].backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
        for leaf in leaves:
            leaf.grad /= max(1, norm)
        for leaf, matrix in zip(leaves, matrices):  # of the same memory
            matrix.grad = leaf.grad.flatten(1)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 0.1 * min(step / 0.72, 1, (13 - step) / 12 / 0.6)
            optimizer.step()
        for leaf, mean in zip(leaves, average):
            mean.lerp_(leaf.detach(), 1 - min(0.5, step / (step + 10)))
            leaf.grad = None
    assert difference(pytree.tree_leaves(ours), average) < 1e-5


def test_best_weights_and_early_stop_survive_kills(capsys):
    def evaluate(params):  # falls until the weights have a certain norm
        trees.append(copy.deepcopy(params))
        return dict(loss=abs(float(params["tall"].norm()) - 0.1))

    def stop_at(last, step, *_):
        if step == last:
            raise SystemExit

    trees = []
    whole = toy_fit("whole", evaluate, often=99)
    losses = [line["held_out_loss"] for line in lines_of("whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best and len(losses) == best + 1 + 4  # a third of 12 steps
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])

    for step in (best + 2, best + 5):  # killed after the best step, and at the last
        with pytest.raises(SystemExit):
            toy_fit("cut", evaluate, often=99, after_step=partial(stop_at, step))
    for _ in range(2):  # the second time it is over
        assert difference(toy_fit("cut", evaluate, often=99), whole) == 0
    assert capsys.readouterr().out.count(f"toy: best at step {best + 1}, ") == 3
    lines = [{(x["step"], len(x)): x for x in lines_of(out)} for out in ("cut", "whole")]
    assert lines[0] == lines[1]  # of a step that came twice the later line


@pytest.mark.parametrize("seconds, saved", [(300, 0), (0, 6)])
def test_a_run_is_saved_after_so_many_seconds_at_a_line(monkeypatch, seconds, saved):
    def after_step(step, *_):
        counts.add_(step)
        if step == 7:
            raise SystemExit

    monkeypatch.setattr(train, "LOG_EVERY", 3)
    monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
    counts = torch.zeros(1)
    with pytest.raises(SystemExit):
        toy_fit("run", after_step=after_step, extra=[counts])
    counts.zero_()
    toy_fit("run", extra=[counts])
    assert counts == sum(range(saved + 1))  # extra is saved too
    lines = [line["step"] for line in lines_of("run", name="loss")]
    assert lines == [3, 6, *range(saved + 3, 13, 3)]


def test_muon_has_matrices_and_convolutions_but_what_faces_codes_and_classes():
    inner = [(96, 32), (32, 32), (128, 32), (32, 128)]  # attention, then mlp
    small = [(32, 4, 3, 3), (64, 32), (32, 64), *inner]  # the input, what looks at neighbours
    for options, expected in ((dict(convolutions=True, neighbours=True), small), ({}, inner)):
        params = tree(depth=1, masked=0, random=False, **options)
        leaves = pytree.tree_leaves(params)
        optimizers = train.new_optimizers(params, leaves, 0)
        muon, adamw = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
        assert sorted(tuple(leaf.shape) for leaf in muon) == sorted(expected)
        assert {id(leaf) for leaf in muon + adamw} == {id(leaf) for leaf in leaves}


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), iterations=st.integers(0, 5))
def test_newton_schulz_is_a_polynomial_of_singular_values(shape, iterations):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(iterations):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = left * values @ right
    assert difference(train.orthogonalize(matrix, iterations), expected) < 1e-12


def test_muon_in_bf16_is_torchs_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in ((5, 9), (9, 5), (7, 7, 3, 3))]
    theirs = [leaf.clone().flatten(1) for leaf in ours]
    muon = torch.optim.Muon(theirs, weight_decay=0.5, adjust_lr_fn="match_rms_adamw", ns_steps=3)
    optimizers = train.Muon(ours, 0.5, 3, torch.bfloat16), muon
    for step in range(1, 6):
        for leaf, other in zip(ours, theirs):
            leaf.grad = torch.randn(leaf.shape, generator=generator)
            other.grad = leaf.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 * step
            optimizer.step()
    assert difference([leaf.flatten(1) for leaf in ours], theirs) == 0


def test_muon_multiplies_in_bf16_only_where_the_processor_does(monkeypatch):
    for has_bf16, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        leaves = [torch.zeros(2, 3), torch.zeros(3)]
        muon, _ = train.new_optimizers(dict(weight=leaves[0], bias=leaves[1]), leaves, 0)
        assert muon.dtype == dtype


def test_a_batch_in_parts_is_one_batch(monkeypatch):
    whole = toy_fit("whole", steps=3)
    monkeypatch.setattr(sample, "images_at_once", lambda pixels: 3)
    assert difference(toy_fit("parts", steps=3), whole) < 1e-2  # Muon is in bf16


def test_what_is_not_finite_is_not_saved():
    for _ in range(2):  # the same command says so again
        line = run("run", "--lr", 1e30)
        assert re.search(r"tokenizer, step \d+: the loss or gradient is not finite", line)
        assert not {"run/model.pt", "run/checkpoint.pt"} & contents(".").keys()


# Several processes are one


def start_two(*flags):
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(*flags, **common, RANK=rank) for rank in "01"]


def test_two_processes_are_one_and_go_on_when_one_is_killed():
    """But for rounding: Muon multiplies in bf16, AdamW steps by its sign where a gradient is 0."""
    flags = ["--lr", 1e-5, "--batch", 8]
    ended(start("one", *flags))
    first, second = start_two("two", *flags)
    ended(first)
    assert ended(second) == ""  # only the first prints
    for line, other in zip(lines_of("one"), lines_of("two"), strict=True):
        for key, value in line.items():
            close = pytest.approx(value, rel=2e-3, abs=2e-3) if key != "stage" else value
            assert "perplexity" in key or other[key] == close, key
    models = [sample.load_model(run) for run in ("one", "two")]
    for name in ("tokenizer", "transformer"):
        assert difference(*(model[name] for model in models)) < 2e-3, name

    for rank, seconds in ((1, 3), (0, 4), (1, 5)):
        processes = start_two("cut", *flags)
        processes[rank].join(seconds)
        processes[rank].kill()  # torchrun ends the other
        processes[1 - rank].join(1)
        processes[1 - rank].kill()
        processes[1 - rank].join()
    for process in start_two("cut", *flags):
        ended(process)
    assert results("cut") == results("two")
    for process in start_two("new", "--batch", 5):
        assert "--batch: got 5, expected a multiple of the 2 processes" in ended(process, 1)
    assert not Path("new").exists()


# The recipe


def test_the_recipe_grows_by_its_laws():
    runs = [train.recipe(depth, 256, 10**9, 10) for depth in range(1, 31)]
    for small, large in itertools.pairwise(runs):
        assert small["batch"] <= large["batch"]
        for stage in STAGES:
            assert small["lr"][stage] > large["lr"][stage]
            assert small["steps"][stage] * small["batch"] < large["steps"][stage] * large["batch"]
    assert [runs[15]["codec"][name] for name in ("codes", "code_dim")] == [4096, 32]
    for name in ("convolutions", "neighbours"):
        assert [name in run["transformer"] for run in runs] == 7 * [True] + 23 * [False]
    assert [run["loss_weights"] for run in runs] == 7 * ["token"] + 23 * ["lognormal"]
    few = train.recipe(8, 32, 200, 10)
    assert few["steps"]["next-scale"] * few["batch"] < 201 * 175  # 200 epochs
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        small, deep = (train.recipe(depth, size, 100, 10) for depth in (2, 3))
        codec = tokenizer.init(**small["codec"])
        assert tokenizer.downsampling(codec) == cell and small["perceptual"] == (size > 32)
        assert small["codec"]["fold"] == 2 and deep["codec"]["fold"] == 1 + (size > 32)
    for run, sides in zip(runs[1:], ([1, 2, 3, 6, 12], [1, 2, 3, 4, 6, 8, 12])):
        assert [h for h, _ in train.recipe(run["depth"], 48, 100, 10)["scales"]] == sides


def test_shapes_take_fewer_steps_and_scales_than_other_images():
    shapes, own = (train.recipe(2, 32, 20_500, 10, is_shapes) for is_shapes in (True, False))
    assert [h for h, _ in shapes["scales"]] == [1, 2, 4, 8]
    assert [h for h, _ in own["scales"]] == [1, 2, 4, 8, 8]
    for stage in STAGES:
        assert shapes["steps"][stage] == math.ceil(0.68 * own["steps"][stage])
    assert (shapes["newton_schulz"], own["newton_schulz"]) == (3, 5)
    differ = "steps", "scales", "crops", "newton_schulz"
    assert shapes | {name: own[name] for name in differ} == own


def test_an_evaluation_without_a_gain_ends_no_stage_at_two_thirds():
    for depth in (1, 2, 3):
        assert train.recipe(depth, 32, 1000, 10)["evaluations"] * train.PATIENCE >= 2


def test_sampling_settings_fit_the_sampler():
    labels = torch.tensor([0])
    for depth, size in itertools.product((1, 2, 3, 8), (32, 64)):
        given = tree(codes=16, code_dim=8, masked=0, random=False), CODEC, labels
        next(sample.steps(*given, **train.sampling_settings(depth, size, 10)))


# What the stages compute


def plain_cells(maps):
    """Means over 4 x 4 of (..., H, W)."""
    return maps.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4)).mean((-3, -1))


def plain_hues(images):
    red, green, blue = plain_cells(images).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


def plain_texture(images):
    ones = torch.ones(3, 1, 3, 3)
    sums, counts = (F.conv2d(x, ones, padding=1, groups=3) for x in (images, images * 0 + 1))
    return (plain_cells((images - sums / counts).square().sum(1)) + 1e-4).sqrt()


def plain_perceptual(layers, *pair):
    for layer in layers:
        pair = [layer(x) for x in pair]
        one, other = (F.normalize(x) for x in pair)
        yield (one - other).square().sum(1).mean()
        pair = [F.avg_pool2d(x, 2) for x in pair]


def test_the_tokenizer_learns_from_all_errors_whatever_the_parts(monkeypatch):
    layers = torch.nn.ModuleList()
    for inputs, outputs in ((3, 4), (4, 5)):
        parts = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs)
        layers.append(torch.nn.Sequential(*parts, torch.nn.ReLU()).eval())
    monkeypatch.setattr(train, "learn_perceptual_layers", lambda *_: layers)
    given = captured("run", *FLAGS, "--batch", 10)
    codec, batch = given["tree"], given["make_batch"](3, np.arange(10))
    images, coarse, stops = (batch[name] for name in ("images", "coarse", "stops"))
    assert coarse.tolist() == [0, 4, 8] and set(stops.tolist()) <= {0, 1, 2}
    passed = tokenizer.training_loss(codec, images, SCALES, coarse, stops)

    variance = plain_hues(images_of("run")[3:]).var((1, 2, 3), correction=0).mean()
    rest = passed["images"] - images
    expected = rest.square().mean() + 0.5 * rest.abs().mean() + passed["quantisation"]
    for dim in (2, 3):
        expected += 0.25 * rest.diff(dim=dim).abs().mean()
    expected += 0.5 * (plain_texture(passed["images"]) - plain_texture(images)).abs().mean()
    expected += 0.08 * sum(plain_perceptual(layers, passed["images"], images))
    expected += 0.28 * plain_hues(rest).square().mean() / (variance + 0.01)
    expected += 0.5 * F.mse_loss(passed["coarse_images"], images[coarse])
    value, report, _ = given["loss"](codec, **batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert report["loss"] is value

    parts = [given["make_batch"](3, positions) for positions in np.arange(10).reshape(2, 5)]
    for name, tensors in (("images", images), ("stops", stops)):
        assert torch.equal(torch.cat([part[name] for part in parts]), tensors)
    mean = sum(given["loss"](codec, **part)[0] for part in parts) / 2
    torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-5)


def test_an_epoch_has_every_image_once_in_any_crop():
    given = captured("run", *FLAGS)
    crops = prepared("run")[3:].reshape(27 * 16, -1)
    places = {crop.tobytes(): place for place, crop in enumerate(crops)}
    images = [given["make_batch"](step, np.arange(4))["images"] for step in range(1, 55)]
    pixels = ((torch.cat(images) + 1) * 127.5).round().byte().numpy()
    rows, crops = np.divmod([places[image.tobytes()] for image in pixels], 16)
    epochs = rows.reshape(8, 27)
    assert (np.sort(epochs) == range(27)).all() and len(np.unique(epochs, axis=0)) == 8
    assert np.bincount(crops, minlength=16).min() > 4


def test_the_perceptual_network_learns_classes_in_all_crops(own_folder):
    """It learns the labels of its own images, in all crops; afterwards its norms are fixed."""
    labels = np.random.default_rng(0).integers(3, size=34)  # the first four are held out
    images = np.empty((30, 2, 3, 24, 24), np.uint8)  # a picture shows its label, no other row's
    images[:] = np.array([0, 100, 200])[labels[4:], None, None, None, None]
    images[:, 1] = 255 - images[:, 1]
    np.save("labels.npy", labels)
    run = dict(perceptual=True, class_names=[*"abc"], seed=0, size=24, crops=2)
    run |= dict(steps=dict(tokenizer=60))
    given = Path(), images, torch.device("cpu"), torch.float32
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses:
        layers = train.learn_perceptual_layers(run, *given)
    values = [F.cross_entropy(*call.args).item() for call in losses.call_args_list]
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])  # of wrong labels it learns nothing
    x = train.to_unit(images[:8, 0])
    whole, half = (layers[0](part) for part in (x, x[:4]))
    assert torch.allclose(whole[:4], half, atol=1e-6) and not whole.requires_grad
    assert train.learn_perceptual_layers(run | dict(perceptual=False), *given) == []


def test_a_folder_without_classes_learns_quarter_turns_and_is_not_guided(own_folder):
    images = np.stack(
        [np.asarray(train.draw_shape(10 * i + 8, 24)[0]) for i in range(30)]
    )  # arrows
    images = images.transpose(0, 3, 1, 2)[:, None]
    np.save("labels.npy", np.zeros(34, np.int64))
    run = dict(perceptual=True, class_names=["one"], seed=0, size=24, crops=1)
    run |= dict(steps=dict(tokenizer=150))
    given = Path(), images, torch.device("cpu"), torch.float32
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses:
        train.learn_perceptual_layers(run, *given)
    values = [F.cross_entropy(*call.args).item() for call in losses.call_args_list]
    assert np.mean(values[-5:]) < 0.7 * np.log(4) < np.mean(values[:5])
    turns = torch.cat([call.args[1] for call in losses.call_args_list])
    assert turns.bincount(minlength=4).min() > 1000
    with_classes, without = (train.recipe(2, 64, 1000, classes) for classes in (10, 1))
    differ = {name for name in without if without[name] != with_classes[name]}
    assert differ == {"sampling"} and without["perceptual"]
    assert without["sampling"]["guidance"] == without["sampling"]["mask_guidance"] == 0


def test_a_model_of_a_folder_without_classes_is_refined_and_edits(own_folder):
    Path("flat").mkdir()
    for index in range(8):
        train.draw_shape(index, 16)[0].save(f"flat/{index}.png")
    assert run("run", "--data", "flat", "--steps", 2) is None
    model = sample.load_model("run")
    assert model["classes"] == ["flat"] and "masked" in model["transformer"]
    flags = ["run", "--count", 2, "--device", "cpu", "--dtype", "fp32", "--out"]
    assert failure(sample.main, *flags, "samples.npz", "--mask-steps", 1) is None
    assert np.load("samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    edit = "--edit", "flat/0.png", "--pad", 0.25
    assert failure(sample.main, *flags, "edits.npz", *edit) is None
    inner = np.asarray(train.draw_shape(0, 16)[0].resize((8, 8)))
    for pixels in np.load("edits.npz")["arr_0"]:
        assert np.array_equal(pixels[4:12, 4:12], inner)


def test_dead_codes_are_replaced(monkeypatch):
    monkeypatch.setattr(train, "REVIVE_EVERY", 4)
    given = captured("run", *FLAGS)
    codebook, (chosen,), sums = given["tree"]["codebook"], given["extra"], []
    for step in range(1, 25):
        before = codebook.clone()
        averages = dict(codebook=before.clone())  # which a revived code enters at once
        *_, trace = given["loss"](given["tree"], **given["make_batch"](step, np.arange(4)))
        tokens = torch.cat([x.flatten() for x in trace[0]])
        chosen_by_now = chosen.clone().index_add_(0, tokens, torch.ones_like(tokens))
        given["after_step"](step, [trace], given["tree"], averages)
        changed = (codebook != before).any(1)
        assert torch.equal(averages["codebook"], codebook)
        if chosen.any():
            assert not changed.any()
            continue
        sums.append((step, int(chosen_by_now.sum())))
        assert torch.equal(changed, chosen_by_now == 0) and changed.any()
        vectors = torch.cat([x.flatten(0, 1) for x in trace[1]])
        fresh = codebook[changed][:, None] - vectors
        assert (fresh.abs().amax(2).amin(1) == 0).all()
    # at step 1 and every fourth, not after 80 %
    assert sums == [(1, 148), (4, 444), (8, 592), (12, 592), (16, 592)]


def test_held_out_numbers_are_of_saved_weights(base):
    model = sample.load_model(base)
    codec, params = model["tokenizer"], model["transformer"]
    images, labels = images_of(base)[:3], torch.from_numpy(np.load(base / "labels.npy")[:3])
    tokens = tokenizer.encode(codec, images, SCALES)
    assert np.array_equal(np.load(base / "tokens.npy")[:3, 0], tokens)
    errors = tokenizer.decode(codec, tokens, SCALES) - images
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    surprise = hmar.next_scale_losses(params, labels, tokens, inputs).mean()
    mask = torch.rand(3, 36, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    wrong = hmar.masked_losses(params, labels, tokens, inputs, own_inputs, mask).sum()

    best = {}
    expected = errors.square().mean(), surprise, wrong / (0.5 * mask.numel())
    for stage, loss in zip(STAGES, expected):
        lines = lines_of(base, stage, "held_out_loss")
        best[stage] = min(lines, key=lambda line: line["held_out_loss"])
        assert best[stage]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    psnr = (10 * torch.log10(4 / errors.square().mean((1, 2, 3)))).mean().item()
    assert best["tokenizer"]["held_out_psnr"][-1] == pytest.approx(psnr, rel=1e-4)
    shares = [own.flatten().bincount() / own.numel() for own in tokens.split([1, 4, 16, 16], 1)]
    perplexity = [torch.special.entr(share).sum().exp().item() for share in shares]
    assert best["tokenizer"]["held_out_perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_labels_masks_and_losses_of_the_stages(base, out):
    model, labels = sample.load_model(base), []
    codec, whole = model["tokenizer"], model["transformer"]
    trunk = whole["trunk"] + whole["next_scale"]["blocks"]
    plain = whole | dict(trunk=trunk, next_scale=whole["next_scale"] | dict(blocks=[]))
    del plain["masked"]
    torch.save(model | dict(transformer=plain), out / "model.pt")
    for name in ("masked", "next-scale"):
        given = captured(out, *FLAGS)
        assert given["stage"] == name
        params = hmar.add_masked_branch(plain, 1) | given["tree"]
        batches = [given["make_batch"](step, np.arange(4)) for step in range(1, 150)]
        labels += [batch["labels"] for batch in batches]
        own, tokens, *masked = batches[0].values()
        sees = [params, own, tokens, tokenizer.next_scale_inputs(codec, tokens, SCALES)]
        expected = hmar.next_scale_losses(*sees).mean()
        if name == "masked":
            sees += [tokenizer.masked_inputs(codec, tokens, SCALES, *masked), *masked]
            expected = hmar.masked_losses(*sees).sum() / (4 * 18)
            ratios = torch.stack([batch["mask"].float().mean(1) for batch in batches])
            assert np.histogram(ratios, 4, (0, 1))[0].min() > 100
            assert ratios.std(1).mean() > 0.2  # each image has its own
        torch.testing.assert_close(given["loss"](given["tree"], **batches[0])[0], expected)
        remove(out, *["transformer"][: name == "masked"])

    # the weights of large models
    settings = json.loads((out / "args.json").read_text()) | dict(loss_weights="lognormal")
    (out / "args.json").write_text(json.dumps(settings))
    losses = hmar.next_scale_losses(*sees).mean(0)
    expected = (losses * hmar.scale_weights(SCALES, "lognormal")).sum()
    given = captured(out, *FLAGS)
    torch.testing.assert_close(given["loss"](given["tree"], **batches[0])[0], expected)

    counts = torch.cat(labels).bincount()
    assert len(counts) == 4 and counts.min() > 0 and 70 < counts[3] < 170  # a tenth


# Weights that are given


def save_params(path, codes=16, codec=CODEC):
    scales = tuple((side, side) for side in (1, 2, 3, 4, 4))
    sizes = dict(width=32, classes=5, codes=codes, code_dim=8, depth=3, scales=scales, seed=5)
    params = hmar.add_masked_branch(hmar.init(**sizes), 2)
    torch.save(dict(transformer=params) | (dict(tokenizer=codec) if codec else {}), path)
    return params


def test_init_fits_classes_scales_and_branches():
    params = save_params("init.pt")
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    flags = [*FLAGS[4:], *SHORT, "--init", "init.pt"]  # which decides the depth
    for size, sides in ((32, [1, 2, 3, 4, 6, 8, 11, 16]), (8, [1, 2, 3, 4, 4])):
        assert failure(train.main, *flags, "--size", size, "--out", size) is None
        model = sample.load_model(f"{size}")
        made = model["transformer"]
        assert difference(made["trunk"] + made["next_scale"]["blocks"], blocks) < 1e-6
        assert [side for side, _ in hmar.scale_sizes(made)] == sides
        assert made["classes"].shape == (4, 32) and len(made["masked"]["blocks"]) == 2
        assert leaves_equal(model["tokenizer"], CODEC)  # the one that its tokens are of
    assert difference(made["levels"], params["levels"]) < 1e-6

    save_params("bare.pt", codec=None)
    save_params("wide.pt", codec=small_codec(code_dim=16))

    def begin(*init):
        return failure(train.main, *flags, "--size", 8, "--out", "new", "--init", *init)

    assert begin("bare.pt") == "train.py: bare.pt: has no tokenizer"
    # twice the channels would be read by convolutions of two groups
    assert "got (codes, code_dim) (16, 16), expected (16, 8)" in begin("wide.pt")
    assert not Path("new").exists()
    assert begin("bare.pt", "--tokenizer", "init.pt") is None


def test_a_given_tokenizer_is_used_as_it_is():
    save_params("given.pt")  # of which the transformer is not used
    with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
        assert run("run", *SHORT, "--tokenizer", "given.pt") is None
    scales = train.default_scales(16, 2, 2)
    schedules = [call.kwargs["schedule"] for call in generate.call_args_list]
    assert schedules == [None, sample.masked_schedule(scales, 1)]  # each stage shows its branch
    model = sample.load_model("run")
    assert leaves_equal(model["tokenizer"], CODEC)
    assert hmar.block_count(model["transformer"]) == 1
    shutil.move("given.pt", "elsewhere.pt")  # once it is in model.pt, its file is not needed
    assert run("run", *SHORT, "--tokenizer", "given.pt") is None
    assert {line["stage"] for line in lines_of("run")} == {"next-scale", "masked"}
    rates = train.read_settings(Path("run"))["lr"]
    assert rates["next-scale"] == 1e-9 and rates["masked"] == 2.5e-10
    tokens, images = np.load("run/tokens.npy"), prepared("run")
    assert tokens.shape[:2] == (30, 16) and tokens.dtype == np.uint8
    images = torch.from_numpy(images[:3].reshape(48, 3, 16, 16) / np.float32(127.5) - 1)
    assert np.array_equal(tokens[:3].reshape(48, -1), tokenizer.encode(CODEC, images, scales))


def test_var_attends_to_coarser_scales_and_has_no_masked_stage():
    with mock.patch.object(hmar, "branch_features", wraps=hmar.branch_features) as features:
        assert run("run", *SHORT, "--causal") is None
    model = sample.load_model("run")
    assert model["is_causal"] is True and "masked" not in model["transformer"]
    for call in features.call_args_list:  # to train, to evaluate, to sample
        assert call.kwargs.get("is_causal") or call.kwargs.get("cache"), call.kwargs


# Run folders that are not what they were


def test_a_stage_is_finished_if_the_model_file_has_its_part(base, out):
    remove(out, "transformer")
    assert run(out) is None
    assert results(out) == results(base)
    with mock.patch.object(train, "fit", side_effect=AssertionError):
        assert run(out) is None
    assert results(out) == results(base)

    (out / "model.pt").unlink()  # to train a tokenizer anew
    (out / "tokens.npy").write_bytes(b"of another tokenizer")
    assert run(out) is None
    assert results(out) == results(base)


def test_a_folder_that_was_never_prepared_may_begin_anew(base):
    Path("run").mkdir()
    Path("run/args.json.tmp").write_text("{")
    with mock.patch.object(train, "prepare_images", side_effect=KeyboardInterrupt):
        assert run("run", "--seed", 7) == "train.py: stopped"
    assert run("run") is None
    assert results("run") == results(base)


def test_other_flags_are_refused_by_name(base, out):
    line = run(out, "--seed", 3, "--flip")
    expected = "was begun with other flags: --seed 0 -> 3, --flip False -> True"
    assert line == f"train.py: --out: {out} {expected}"
    for flags, name in (
        (["--depth", 2], "--depth 1 -> 2"),
        (["--size", 32], "--size 16 -> 32"),
        (["--steps", 9], "--steps 24 -> 9"),
        (["--lr", 1], "--lr None -> 1"),
        (["--batch", 8], "--batch 4 -> 8"),
        (["--causal"], "--causal False -> True"),
        (["--dtype", "bf16"], "--dtype fp32 -> bf16"),
        (["--tokenizer", "none.pt"], "--tokenizer None -> none.pt"),
    ):
        assert name in run(out, *flags), name
    shutil.move("data", "elsewhere")  # a path is no other flag
    assert run(out, "--data", "elsewhere") is None
    assert results(out) == results(base)

    for path in Path("elsewhere").iterdir():  # but other classes are another run
        path.rename(path.with_name(f"other-{path.name}"))
    assert run(out, "--data", "elsewhere") == (
        f"train.py: --out: {out} was begun with other classes than elsewhere has"
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokens.npy", "another program's"),
        ("samples/mine.png", "mine"),
        ("args.json", '{"lr": 1}'),
        ("args.json", "[]"),
        ("args.json", "text"),
        ("labels.npy", "another program's"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(name, content):
    Path("run", name).parent.mkdir(parents=True)
    Path("run", name).write_text(content)
    before = contents("run")
    assert run("run") == "train.py: --out: run is neither empty nor a run of train.py"
    assert contents("run") == before
    assert not list(Path("run").rglob("*.pt"))


BAD_INPUT = """
--data none  --data: no images found in none
--size 15  --size: got 15, expected 2, 3, ... times 4
--batch 0  --batch: got 0, expected above 0
--depth -1  --depth: got -1, expected above 0
--steps 0  --steps: got 0, expected above 0
--lr 0  --lr: got 0.0, expected above 0
--lr nan  --lr: got nan, expected above 0
--seed -1  --seed: got -1, expected 0 or more
--tokenizer none.pt  none.pt: no weights
--init none.pt  none.pt: no weights
--init text.pt  text.pt: no weights
--out text.pt  text.pt
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line(line):
    Path("text.pt").write_text("text")
    flags, message = line.split("  ")
    said = run("run", *flags.split())
    assert said.startswith("train.py: ") and message in said and "\n" not in said
    assert not Path("run").exists()
