"""Training: nothing is lost, processes are one, what a step computes, bad input."""

import copy
import errno
import fcntl
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
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import captured, contents, full_disk, prepared, small_codec, status_of, tree
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
SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels
CODEC = small_codec(attention=False, seed=7)  # cells of two pixels
OTHER_CODEC = small_codec(codes=128, code_dim=16)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "triton", "pytest", "hypothesis", "PIL.Image"])


# Commands, in processes or this one


def command(flags, seconds, environment, log):
    """`python train.py FLAGS`, killed after some seconds unless they are 0."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """What it said."""
    process.join()
    said = Path(process.log).read_text()
    assert process.exitcode == status, said
    return said


def run(out, *flags, status=0):
    got = status_of(train.main, *FLAGS, "--out", out, *flags)
    assert status in (got, None)
    return got


@pytest.fixture
def refused(capsys):
    def refused(out, *flags):
        capsys.readouterr()
        run(out, *flags, status=2)
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if not line.startswith("left out: ")]
        return line

    return refused


@pytest.fixture(scope="module")
def base(tmp_path_factory, folder):
    """A run folder of all three stages that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "base"
    out.with_name("said").write_text(ended(start(out, "--data", folder)))
    return out


@pytest.fixture
def out(base, own_folder):
    return Path(shutil.copytree(base, "run"))


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
    assert f"{base}: 27 images to train on, 3 held out, 3 classes; cpu, float32, 1 thr" in said
    assert re.search(r"next-scale \(2 of 3\) 16/24  0:00:\d\d left  loss \d", said)
    assert 1 < float(said.split("seconds ")[1]) < 600
    assert json.loads(record)["class_names"] == sorted(train.SHAPES[:3])
    assert str(folder) not in record and str(base) not in record  # both may move
    for stage, file in train.STAGES.items():
        losses = [line["loss"] for line in lines_of(base, stage, "loss")]
        assert losses[-1] < losses[0]
        assert len(losses) == len(lines_of(base, stage, "held_out_loss"))
        leaves = pytree.tree_leaves(torch.load(base / file))
        assert all(type(leaf) is torch.Tensor for leaf in leaves)
    names = "args.json hmar.pt images.bin labels.npy lock metrics.jsonl next-scale.pt"
    names += " samples/masked.png samples/next-scale.png samples/reconstructions.png"
    assert sorted(contents(base)) == [*names.split(), "tokenizer.pt", "tokens.npy"]


# Kills and signals


def test_kills_at_random_moments_change_nothing(base):
    """Nor does a move without the data, once images are prepared."""
    data, out = shutil.copytree("data", "copy"), "run"
    for number in itertools.count(1):
        process = start(out, "--data", data, seconds=random.uniform(0.01, number / 2))
        process.join()
        if process.exitcode == 0:
            break
        ended(process, -signal.SIGALRM)
        if os.path.exists(f"{out}/args.json"):
            shutil.rmtree(data, ignore_errors=True)
            out = shutil.move(out, f"{number}")
    assert number > 2
    assert contents(out) == contents(base)


def test_a_run_that_is_stopped_says_in_a_line_where_it_goes_on(base):
    def is_masked():
        path = Path("run/checkpoint.pt")
        return path.exists() and torch.load(path)["stage"] == "masked"

    begun = ((signal.SIGTERM, Path("run/tokens.npy").exists), (signal.SIGINT, is_masked))
    for number, is_begun in begun:
        process = start("run")
        while not is_begun():
            time.sleep(0.01)
        os.kill(process.pid, number)
        *_, line = ended(process, 130).splitlines()
        saved = torch.load("run/checkpoint.pt")
        name = "masked" if Path("run/next-scale.pt").exists() else "next-scale"
        step = saved["at"]["step"] if saved["stage"] == name else 0
        assert line == f"train.py: stopped; the same command goes on from {name}, step {step}"
    ended(start("run"))
    assert contents("run") == contents(base)


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_an_interrupt_while_torch_is_loaded_is_no_traceback(name):
    command = [sys.executable, Path(train.__file__).with_name(name), "--help"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT


def test_a_full_disk_is_one_line_and_loses_nothing(refused, capsys):
    with full_disk(1_000_000):  # in the middle of a file
        line = refused("whole", "--steps", 1)
    assert line.startswith("train.py: whole/checkpoint.pt: cannot be written: [Errno 27]")
    run("whole", "--steps", 1)
    names = set()
    for written in itertools.count():  # files, before one is not
        results = written * [None] + [OSError(errno.ENOSPC, "full")]
        with mock.patch.object(os, "fsync", side_effect=results):
            if run("run", "--steps", 1, status=None) == 0:
                break
        *_, line = capsys.readouterr().err.splitlines()
        names.add(re.fullmatch("train.py: run/(.*): cannot be written: .* full", line)[1])
        assert not list(Path("run").rglob("*.tmp"))
    assert {"images.bin", "labels.npy", "args.json", "checkpoint.pt"} < names
    assert contents("run") == contents("whole")


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


def toy_fit(out, look=lambda tree: dict(loss=1.0), loss=toy_loss, steps=12, looks=1, **more):
    os.makedirs(out, exist_ok=True)
    numbers = dict(steps=steps, batch=4, peak=0.1, decay=0.05, looks=looks, newton_schulz=5)
    stage = train.Stage(name="toy", place="1 of 1", out=Path(out), flags={}, **numbers)
    return train.fit(stage=stage, tree=toy_tree(), loss=loss, batch=toy_batch, look=look, **more)


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
    def look(params):  # falls until the weights have a size
        trees.append(copy.deepcopy(params))
        return dict(loss=abs(float(params["tall"].norm()) - 0.1))

    def stop_at(last, step, *_):
        if step == last:
            raise SystemExit

    trees = []
    whole = toy_fit("whole", look, looks=99)
    losses = [line["held_out_loss"] for line in lines_of("whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best and len(losses) == best + 1 + 4  # a third of 12 steps
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])

    for step in (best + 2, best + 5):  # killed after the best step, and at the last
        with pytest.raises(SystemExit):
            toy_fit("cut", look, looks=99, after_step=partial(stop_at, step))
    for _ in range(2):  # the second time it is over
        assert difference(toy_fit("cut", look, looks=99), whole) == 0
    assert capsys.readouterr().out.count(f"toy: best at step {best + 1}, ") == 3
    assert contents("cut")["metrics.jsonl"] == contents("whole")["metrics.jsonl"]


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
    toy_fit("run", extra=[counts])
    assert counts == sum(range(saved + 1))  # extra is saved too
    assert [line["step"] for line in lines_of("run", name="loss")] == [3, 6, 9, 12]


def test_a_run_ends_where_another_one_began_in_its_folder():
    """Which was removed meanwhile, as a refusal says, with the lock."""

    def after_step(step, *_):
        if step == 7:
            sample.write_json("run/args.json", dict(flags=dict(seed=1)))

    with pytest.raises(ValueError, match="^run: is another run's now"):
        toy_fit("run", after_step=after_step)
    assert torch.load("run/checkpoint.pt")["at"]["step"] == 0
    place = SimpleNamespace(out=Path("run"), record=dict(flags={}))
    with pytest.raises(ValueError, match="^run: is another run's now"):
        train.save_stage(place, "tokenizer", CODEC)
    assert not Path("run/tokenizer.pt").exists()


def test_muon_has_matrices_and_convolutions_but_what_faces_codes_and_classes():
    inner = [(96, 32), (32, 32), (128, 32), (32, 128)]  # attention, then mlp
    small = [(32, 36), (64, 32), (32, 64), *inner]  # the input, what looks at neighbours
    for options, expected in ((dict(convolutions=True, neighbours=True), small), ({}, inner)):
        params = tree(depth=1, masked=0, random=False, **options)
        leaves = [train.new_parameter(leaf) for leaf in pytree.tree_leaves(params)]
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
    ours = [torch.randn(shape, generator=generator) for shape in ((5, 9), (9, 5), (7, 7))]
    theirs = [leaf.clone() for leaf in ours]
    muon = torch.optim.Muon(theirs, weight_decay=0.5, adjust_lr_fn="match_rms_adamw", ns_steps=3)
    optimizers = train.Muon(ours, 0.5, 3, torch.bfloat16), muon
    for step in range(1, 6):
        for leaf, other in zip(ours, theirs):
            leaf.grad = other.grad = torch.randn(leaf.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 * step
            optimizer.step()
    assert difference(ours, theirs) == 0


def test_muon_multiplies_in_bf16_only_where_the_processor_does(monkeypatch):
    for has_bf16, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        leaves = [torch.zeros(2, 3), torch.zeros(3)]
        muon, _ = train.new_optimizers(dict(weight=leaves[0], bias=leaves[1]), leaves, 0)
        assert muon.dtype == dtype


def test_a_batch_is_halved_where_memory_is_small(monkeypatch):
    sizes = []

    def loss(params, x, y):
        sizes.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return toy_loss(params, x, y)

    whole = toy_fit("whole", steps=3)
    halved = toy_fit("halved", loss=loss, steps=3)
    assert sizes == [4, 2, 1, 1, 1, 1] + 8 * [1]
    assert difference(halved, whole) < 1e-2  # Muon is in bf16
    for world in "1", "4":  # four processes have an image each
        monkeypatch.setenv("WORLD_SIZE", world)
        names = dict.fromkeys(("broadcast_object_list", "barrier"), mock.DEFAULT)
        alone = mock.patch.multiple(torch.distributed, **names)
        with alone, pytest.raises(torch.OutOfMemoryError):
            toy_fit(f"none {world}", loss=mock.Mock(side_effect=torch.OutOfMemoryError))


def test_what_is_not_finite_is_not_saved(refused):
    for _ in range(2):  # the same command says so again
        line = refused("run", "--lr", 1e30)
        assert "tokenizer, step 8: loss or gradient is not finite; a lower --lr may" in line
        saved = torch.load("run/checkpoint.pt")
        assert saved["at"]["step"] == 0 and all(leaf.isfinite().all() for leaf in saved["leaves"])
    assert Path("run/metrics.jsonl").read_text() == ""


def test_a_terminal_shows_one_line_that_is_renewed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.say("one", renewed=True)
    train.say("two")
    assert capsys.readouterr().out == "\r\x1b[Kone\r\x1b[Ktwo\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit), sample.report_errors("train.py"):
        raise ValueError("three")
    assert capsys.readouterr().err == "\r\x1b[Ktrain.py: three\n"
    monkeypatch.setattr(sys, "stdout", None)  # closed
    train.say("four")


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
    assert ended(second) == ""  # the first speaks for both
    for line, other in zip(lines_of("one"), lines_of("two"), strict=True):
        for key, value in line.items():
            close = pytest.approx(value, rel=2e-3, abs=2e-3) if key != "stage" else value
            assert "perplexity" in key or other[key] == close, key
    for name in train.STAGES.values():
        trees = [torch.load(f"{run}/{name}") for run in ("one", "two")]
        assert difference(*trees) < 2e-3, name

    for rank, seconds in ((1, 3), (0, 4), (1, 5)):
        processes = start_two("cut", *flags)
        processes[rank].join(seconds)
        processes[rank].kill()  # torchrun ends the other
        processes[1 - rank].join(1)
        processes[1 - rank].kill()
        processes[1 - rank].join()  # else it may still hold the lock
    for process in start_two("cut", *flags):
        ended(process)
    assert contents("cut") == contents("two")

    for out, *more, said in (
        ("cut", *flags, "--seed", 3, "cut: begun with other flags"),
        ("new", "--batch", 5, "--batch: got 5 for 2 processes, expected say 6"),
    ):
        for process in start_two(out, *more):
            (line,) = ended(process, 2).splitlines()
            assert line.startswith(f"train.py: {said}")
    assert not Path("new").exists()


# The dial


def test_the_dial_grows_by_its_laws():
    dials = [train.dial(depth, 256, 10**9) for depth in range(1, 31)]
    for small, large in itertools.pairwise(dials):
        assert small["batch"] <= large["batch"]
        for stage in train.STAGES:
            assert small["lr"][stage] > large["lr"][stage]
            assert small["steps"][stage] * small["batch"] < large["steps"][stage] * large["batch"]
    assert [dials[15]["codec"][name] for name in ("codes", "code_dim")] == [4096, 32]
    for name in ("convolutions", "neighbours"):
        assert [name in dial["transformer"] for dial in dials] == 7 * [True] + 23 * [False]
    few = train.dial(8, 32, 190)
    assert few["steps"]["next-scale"] * few["batch"] < 201 * 190  # epochs
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        small, deep = (train.dial(depth, size, 100) for depth in (2, 3))
        codec = tokenizer.init(**small["codec"])
        tokenizer.check(codec)
        assert tokenizer.downsampling(codec) == cell and small["perceptual"] == (size > 32)
        assert small["codec"]["fold"] == 2 and deep["codec"]["fold"] == 1 + (size > 32)
    for dial, sides in zip(dials[1:], ([1, 2, 3, 6, 12], [1, 2, 3, 4, 6, 8, 12])):
        assert [h for h, _ in train.default_scales(48, 4, dial["growth"])] == sides


def test_drawings_take_fewer_steps_and_scales_than_images_of_ones_own():
    runs = []
    for flags, is_drawn in ([], True), (["--data", "images", "--size", "32"], False):
        args = train.parser().parse_args(flags)
        runs.append(train.choose_settings(args, train.Given(), train.DRAWINGS, is_drawn))
    drawn, own = runs
    assert [h for h, _ in drawn["scales"]] == [1, 2, 4, 8]
    assert [h for h, _ in own["scales"]] == [1, 2, 4, 8, 8]
    for stage in train.STAGES:
        assert drawn["steps"][stage] == math.ceil(0.68 * own["steps"][stage])
    assert (drawn["newton_schulz"], own["newton_schulz"]) == (3, 5)
    differ = "steps", "scales", "crops", "newton_schulz"
    assert drawn | {name: own[name] for name in differ} == own


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


def plain_perceptual(levels, *pair):
    for level in levels:
        pair = [level(x) for x in pair]
        one, other = (F.normalize(x) for x in pair)
        yield (one - other).square().sum(1).mean()
        pair = [F.avg_pool2d(x, 2) for x in pair]


def test_the_tokenizer_learns_from_all_errors_whatever_the_parts(monkeypatch):
    levels = torch.nn.ModuleList()
    for inputs, outputs in ((3, 4), (4, 5)):
        layers = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs)
        levels.append(torch.nn.Sequential(*layers, torch.nn.ReLU()).eval())
    monkeypatch.setattr(train, "learn_levels", lambda *_: levels)
    given = captured("run", *FLAGS, "--batch", 10)
    codec, batch = given["tree"], given["batch"](3, np.arange(10))
    images, coarse, stops = (batch[name] for name in ("images", "coarse", "stops"))
    assert coarse.tolist() == [0, 4, 8] and set(stops.tolist()) <= {0, 1, 2}
    passed = tokenizer.training_pass(codec, images, SCALES, coarse, stops)

    variance = plain_hues(images_of("run")[3:]).var((1, 2, 3), correction=0).mean()
    rest = passed["images"] - images
    expected = rest.square().mean() + 0.5 * rest.abs().mean() + passed["loss"]
    for dim in (2, 3):
        expected += 0.25 * rest.diff(dim=dim).abs().mean()
    expected += 0.5 * (plain_texture(passed["images"]) - plain_texture(images)).abs().mean()
    expected += 0.08 * sum(plain_perceptual(levels, passed["images"], images))
    expected += 0.28 * plain_hues(rest).square().mean() / (variance + 0.01)
    expected += 0.5 * F.mse_loss(passed["coarse_images"], images[coarse])
    value, report, _ = given["loss"](codec, **batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert report["loss"] is value

    parts = [given["batch"](3, positions) for positions in np.arange(10).reshape(2, 5)]
    for name, tensors in (("images", images), ("stops", stops)):
        assert torch.equal(torch.cat([part[name] for part in parts]), tensors)
    mean = sum(given["loss"](codec, **part)[0] for part in parts) / 2
    torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-5)


def test_an_epoch_has_every_image_once_in_any_crop():
    given = captured("run", *FLAGS)
    crops = prepared("run")[3:].reshape(27 * 16, -1)
    places = {crop.tobytes(): place for place, crop in enumerate(crops)}
    images = [given["batch"](step, np.arange(4))["images"] for step in range(1, 55)]
    pixels = ((torch.cat(images) + 1) * 127.5).round().byte().numpy()
    rows, crops = np.divmod([places[image.tobytes()] for image in pixels], 16)
    epochs = rows.reshape(8, 27)
    assert (np.sort(epochs) == range(27)).all() and len(np.unique(epochs, axis=0)) == 8
    assert np.bincount(crops, minlength=16).min() > 4


def test_the_perceptual_network_learns_classes_in_all_crops():
    """It is right on images that it saw, of all crops; afterwards its norms are fixed."""
    images = np.stack([np.asarray(train.draw_shape(i, 24)[0]) for i in range(30)])
    images = np.stack([images, 255 - images], 1).transpose(0, 1, 4, 2, 3)
    labels = torch.arange(30) % 3
    names = dict(perceptual=True, class_names=[*"abc"], seed=0, size=24, crops=2)
    run = mock.Mock(device=torch.device("cpu"), dtype=torch.float32, **names)
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses:
        levels = train.learn_levels(run, images, labels, 60)
    values = [F.cross_entropy(*call.args).item() for call in losses.call_args_list]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])  # of wrong labels it learns nothing
    assert not any(level.training for level in levels)
    norm = levels[0][1].running_mean
    plain, crops = (levels[0][0](train.to_unit(images[:, i])).mean((0, 2, 3)) for i in (0, 1))
    assert (norm - (plain + crops) / 2).abs().max() < 0.5 * (plain - crops).abs().max()
    run.class_names = ["one"]
    assert train.learn_levels(run, images, labels, 60) == []


def test_dead_codes_are_replaced(monkeypatch):
    monkeypatch.setattr(train, "REVIVE_EVERY", 4)
    given = captured("run", *FLAGS)
    codebook, (chosen,), sums = given["tree"]["codebook"], given["extra"], []
    for step in range(1, 25):
        before = codebook.clone()
        averages = dict(codebook=before.clone())  # which a revived code enters at once
        *_, trace = given["loss"](given["tree"], **given["batch"](step, np.arange(4)))
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
    codec, params = torch.load(base / "tokenizer.pt"), torch.load(base / "hmar.pt")
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
    for stage, loss in zip(train.STAGES, expected):
        lines = lines_of(base, stage, "held_out_loss")
        best[stage] = min(lines, key=lambda line: line["held_out_loss"])
        assert best[stage]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    psnr = (10 * torch.log10(4 / errors.square().mean((1, 2, 3)))).mean().item()
    assert best["tokenizer"]["held_out_psnr"][-1] == pytest.approx(psnr, rel=1e-4)
    shares = [own.flatten().bincount() / own.numel() for own in tokens.split([1, 4, 16, 16], 1)]
    perplexity = [torch.special.entr(share).sum().exp().item() for share in shares]
    assert best["tokenizer"]["held_out_perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_labels_masks_and_losses_of_the_stages(base, out):
    codec, labels = torch.load(base / "tokenizer.pt"), []
    for name in ("masked", "next-scale"):
        (out / train.STAGES[name]).unlink()
        given = captured(out, *FLAGS)
        params = hmar.add_masked_branch(torch.load(base / "next-scale.pt"), 1) | given["tree"]
        batches = [given["batch"](step, np.arange(4)) for step in range(1, 150)]
        labels += [batch["labels"] for batch in batches]
        own, tokens, *masked = batches[0].values()
        sees = [params, own, tokens, tokenizer.next_scale_inputs(codec, tokens, SCALES)]
        expected = hmar.next_scale_losses(*sees).mean()
        if name == "masked":
            sees += [tokenizer.masked_inputs(codec, tokens, SCALES, *masked), *masked]
            expected = hmar.masked_losses(*sees).sum() / (4 * 18)
            ratios = torch.cat([batch["mask"].float().mean(1) for batch in batches])
            assert np.histogram(ratios, 4, (0, 1))[0].min() > 100
        torch.testing.assert_close(given["loss"](given["tree"], **batches[0])[0], expected)
    counts = torch.cat(labels).bincount()
    assert len(counts) == 4 and counts.min() > 0 and 70 < counts[3] < 170  # a tenth


# Weights that are given


def save_params(path, codes=16):
    scales = tuple((side, side) for side in (1, 2, 3, 4, 4))
    sizes = dict(width=32, classes=5, codes=codes, code_dim=8, depth=3, scales=scales, seed=5)
    params = hmar.add_masked_branch(hmar.init(**sizes), 2)
    torch.save(params, path)
    return params


def test_init_fits_classes_scales_and_branches(capsys):
    params = save_params("init.pt")
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    torch.save(CODEC, "codec.pt")
    # --init decides the depth
    flags = [*FLAGS[4:], *SHORT, "--tokenizer", "codec.pt"]
    for size, sides in ((32, [1, 2, 3, 4, 6, 8, 11, 16]), (8, [1, 2, 3, 4, 4])):
        flags += ["--size", size, "--out", size, "--init", "init.pt"]
        assert status_of(train.main, *flags) == 0
        made = torch.load(f"{size}/hmar.pt")
        assert difference(made["trunk"] + made["next_scale"]["blocks"], blocks) < 1e-6
        assert [side for side, _ in hmar.scales(made)] == sides
        assert made["classes"].shape == (4, 32) and len(made["masked"]["blocks"]) == 2
    assert difference(made["levels"], params["levels"]) < 1e-6
    assert "its codes get new meanings" not in capsys.readouterr().out

    # the same weights go on from wherever they lie, others are refused
    moved = shutil.move("init.pt", "moved.pt")
    assert status_of(train.main, *flags, "--init", moved) == 0
    save_params(moved, codes=32)
    assert status_of(train.main, *flags, "--init", moved) == 2
    expected = "--init: got (codes, code_dim) (32, 8), the tokenizer has (16, 8)\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_given_tokenizer_is_taken_or_trained_on(refused):
    torch.save(CODEC, "given.pt")
    with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
        run("run", *SHORT, "--tokenizer", "given.pt")
    schedules = [call.kwargs.get("schedule") for call in generate.call_args_list]
    assert schedules == [None, 1]  # the masked stage draws by its branch
    assert difference(torch.load("run/tokenizer.pt"), CODEC) == 0
    assert {line["stage"] for line in lines_of("run")} == {"next-scale", "masked"}
    rates = sample.read_json("run/args.json")["flags"]["lr"]
    assert rates["next-scale"] == 1e-9 and rates["masked"] == 2.5e-10
    tokens, held_out = np.load("run/tokens.npy"), prepared("run")
    assert tokens.shape[:2] == (30, 16) and tokens.dtype == np.uint8 and len(held_out) == 3
    images = torch.from_numpy(held_out.reshape(48, 3, 16, 16) / np.float32(127.5) - 1)
    expected = tokenizer.encode(CODEC, images, train.default_scales(16, 2, 2))
    assert np.array_equal(tokens[:3].reshape(48, -1), expected)
    run("run", *SHORT, "--tokenizer", shutil.copy("given.pt", "copy.pt"))
    assert "other flags or images: --tokenizer " in refused("run", *SHORT)

    run("other", *SHORT, "--steps", 2, "--init", "given.pt")
    trained = torch.load("other/tokenizer.pt")
    assert difference(trained, CODEC) < 1e-4  # no code was dead at first


def test_var_attends_to_coarser_scales_and_has_no_masked_stage():
    """And losses are compiled if asked."""
    features = mock.patch.object(hmar, "branch_features", wraps=hmar.branch_features)
    compiled = mock.patch.object(torch, "compile", side_effect=lambda loss: loss)
    with features as features, compiled as compiled:
        captured("plain", *FLAGS)
        assert not compiled.called
        run("run", *SHORT, "--causal", "--compile")
    assert compiled.call_count == 2 and not Path("run/hmar.pt").exists()
    for call in features.call_args_list:  # to train, to judge, to draw
        assert call.kwargs.get("is_causal") or call.kwargs.get("cache"), call.kwargs


# Run folders that are not what they were


def test_a_stage_is_finished_while_its_file_exists(base, out):
    own = [out / name for name in ("a.tmp", "hmar.pt.7.tmp", "tokenizer.pt.0123abcd.tmp")]
    for path in (*own, out / "a.0123456789abcdef.tmp", out / "samples/x.0123456789abcdef.tmp"):
        path.write_text("mine, or left by a kill")
    run(out)
    for path in own:
        path.unlink()
    assert contents(out) == contents(base)

    # what was made of other weights is made anew
    names = "tokenizer.pt", "tokens.npy", "next-scale.pt", "hmar.pt"
    for name, later in (names[0], names[1:]), (names[2], names[3:]):
        for other in later:
            (out / other).write_bytes(b"of another")
        (out / name).unlink()
        record = sample.read_json(out / "args.json")
        record["digests"][name] = "another"
        sample.write_json(out / "args.json", record)
        run(out)
        for other in ("args.json", *names):
            assert (out / other).read_bytes() == (base / other).read_bytes()


def test_prepared_images_stay_where_their_data_is_gone(refused, capsys):
    data = shutil.copytree("data", "copy")
    flags = "run", "--data", data, "--size", 16
    captured(*flags)
    before = contents("run")
    shutil.rmtree(data)
    assert refused(*flags, "--seed", 3) == (
        "train.py: --data: expected, to prepare run anew with other flags"
    )
    # gone, empty as a drive that is not mounted, or emptied, but for what desktops leave
    throw_away = partial(shutil.copytree, "data", f"{data}/.Trash-0")
    for change in (
        lambda: None,
        partial(os.mkdir, data),
        partial(os.mkdir, f"{data}/disc"),
        throw_away,
    ):
        change()
        captured(*flags)
        assert contents("run") == before
        assert "images prepared before are used" in capsys.readouterr().out


def test_other_flags_or_images_are_refused(base, out, refused):
    assert refused(out, "--seed", 3, "--flip") == (
        f"train.py: {out}: begun with other flags or images: flip False -> True, "
        "seed 0 -> 3; give another --out, or remove the folder"
    )
    data = Path(shutil.copytree("data", "copy"))
    run(out, "--data", data)
    image = data / "disc/000.png"
    for change, argument in ((image.write_bytes, b"longer"), (image.rename, data / "disc/x.png")):
        change(argument)
        assert "begun with other flags or images: images " in refused(out, "--data", data)
    assert contents(out) == contents(base)


def test_what_was_prepared_for_other_flags_is_not_used():
    """Tokens of a --tokenizer that goes, nor images when the second preparing is killed."""
    torch.save(OTHER_CODEC, "codec.pt")
    with mock.patch.object(train, "save_tree", side_effect=KeyboardInterrupt):
        run("one", "--steps", 1, "--tokenizer", "codec.pt", status=130)
    assert Path("one/tokens.npy").exists() and not list(Path("one").glob("*.pt"))
    captured("one", *FLAGS, "--steps", 1)
    assert not Path("one/tokens.npy").exists()
    with mock.patch.object(np, "save", side_effect=KeyboardInterrupt):
        run("one", "--steps", 1, "--seed", 7, status=130)  # other images, without a record
    for out in ("one", "two"):
        run(out, "--steps", 1)
    assert contents("one") == contents("two")


def test_what_is_cut_or_of_another_run_is_refused_by_name(out, refused):
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(out) == f"train.py: {out}: another process works there"
    params = pytree.tree_map(torch.neg, torch.load(out / "hmar.pt"))
    for name, other in (("hmar.pt", params), ("tokenizer.pt", OTHER_CODEC)):
        own = shutil.move(out / name, out / "own.pt")
        torch.save(other, out / name)
        assert refused(out) == f"train.py: {out}/args.json: tells of another {name} than this"
        shutil.move(own, out / name)
    torch.save(OTHER_CODEC, "other.pt")  # codes of another meaning
    line = refused("new", "--init", out / "next-scale.pt", "--tokenizer", "other.pt")
    assert line == f"train.py: {out}/args.json: tells of another tokenizer.pt than this"
    (out / "hmar.pt").write_bytes(b"")
    assert f"{out}/hmar.pt: " in refused(out)
    (out / "hmar.pt").unlink()

    tokens = np.load(out / "tokens.npy")
    for bad, said in ((tokens[1:], "(29, 16, 37), up to"), (255 + 0 * tokens, "up to 255")):
        np.save(out / "tokens.npy", bad)
        line = refused(out)
        assert line.startswith(f"train.py: {out}/tokens.npy: got") and said in line
    os.truncate(out / "tokens.npy", 0)
    assert f"{out}/tokens.npy: " in refused(out)
    (out / "tokens.npy").unlink()
    os.truncate(out / "images.bin", 1000)
    assert f"{out}/images.bin: got 1000 bytes, expected 368640" in refused(out)
    np.save(out / "tokens.npy", tokens)

    with mock.patch.object(train, "save_stage", side_effect=KeyboardInterrupt):
        run(out, status=130)
    saved = torch.load(out / "checkpoint.pt")
    other = saved | dict(flags=saved["flags"] | dict(seed=1))
    for bad in ([], dict(stage="masked", at={}), other):
        torch.save(bad, out / "checkpoint.pt")
        said = f"{out}/checkpoint.pt: not of this run; once it is removed, masked begins"
        assert said in refused(out)
    (out / "checkpoint.pt").unlink()
    (out / "metrics.jsonl").unlink()
    run(out)
    assert b"\0" not in (out / "metrics.jsonl").read_bytes()

    os.truncate(out / "labels.npy", 0)
    assert f"{out}/labels.npy: " in refused(out)
    record = sample.read_json(out / "args.json")
    for name in ("flags", "class_names", "count", "digests"):
        sample.write_json(out / "args.json", record | {name: 1.5})
        assert f"{out}/args.json: {name}: got 1.5" in refused(out)


def test_what_is_passed_over_or_changed_is_told(out, folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # alone, it is the first
    data = shutil.copytree(folder, "copy")
    os.mkdir(f"{data}/\x1b[31m")
    Path(data, "disc", "a.tiff").write_text("")
    run(out, "--data", data)
    said = capsys.readouterr().out
    assert "--data: 1 files of .tiff passed over\n" in said and "\x1b" not in said
    assert "--data: ?[31m: no image for this class\n" in said and "were changed" not in said
    os.utime(f"{data}/disc/000.png")
    run(out, "--data", data)
    assert "--data: files were changed; what was prepared before is used" in capsys.readouterr().out
    run(out.rename("my run"))
    assert capsys.readouterr().out.count("next: python sample.py 'my run'\n") == 1


def test_what_has_no_record_is_refused(refused):
    for name in (*train.STAGES.values(), "checkpoint.pt", "metrics.jsonl"):
        os.makedirs(f"run/{name}")
        assert refused("run").startswith("train.py: run: begun with other flags")
        os.rmdir(f"run/{name}")  # as it was
    Path("run/args.json").write_text('{"lr": 1}')
    before = contents("run")
    assert refused("run").startswith("train.py: run: holds another program's args.json")
    assert contents("run") == before


BAD_INPUT = """
--step-s=3  unrecognized arguments: --step-s=3
--data broken  --data: 0 images can be read, expected two or more
--data=  --data: [Errno 2] No such file or directory: ''
--data file.txt  --data: [Errno 20] Not a directory: 'file.txt'
--data link  --data: link/cat is a link to a folder
--data empty  --data: got 'empty', expected a folder with .png, .jpg
--data both  --data: got 'both', with images beside sub-folders of images
--size 15  --size: got 15, expected a multiple of 4
--batch 0  --batch: got 0, expected 1 or more
--lr 0  --lr: got 0, expected above 0
--lr nan  --lr: got nan, expected above 0
--tokenizer codec.pt --init codec.pt  got a tokenizer beside --tokenizer
--init params.pt  --depth: got 1, but --init decides it
--tokenizer nowhere.pt  nowhere.pt: cannot be read: FileNotFoundError
--out file.txt  file.txt
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line_and_status_2(refused, line):
    for name in ("broken/a.png", "broken/b.png", "both/a.png", "both/cat/b.png", "file.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    for name in ("link", "empty/cat"):
        Path(name).mkdir(parents=True)
    Path("link/cat").symlink_to("../both")
    torch.save(CODEC, "codec.pt")
    save_params("params.pt")
    flags, said = line.split("  ")
    assert said in refused("run", *flags.split())
    assert not list(Path("run").rglob("*.pt"))
