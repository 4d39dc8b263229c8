"""Training: nothing is lost, processes are one, what a step computes, bad input."""

import copy
import errno
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import captured, contents, named_leaves, small_codec, tree
from torch.utils import _pytree as pytree

import hmar
import tokenizer
import train

FLAGS = ["--size", "16", "--depth", "1", "--batch", "4", "--steps", "24", "--dtype", "fp32"]
FLAGS += ["--device", "cpu"]
SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels
CODEC = small_codec(attention=False, seed=7)  # cells of two pixels
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_train", "torch._dynamo"])


# Commands, in processes or this one


def command(flags, hook, environment, log):
    """`python train.py FLAGS`, in a process forked from one that has imported torch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    hook()
    train.main(flags)


@pytest.fixture(scope="module", autouse=True)
def path():
    here = Path(__file__).resolve().parent
    with mock.patch.dict(os.environ, PYTHONPATH=f"{here}{os.pathsep}{here.parent}"):
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory, folder):
    logs, processes = tmp_path_factory.mktemp("logs"), []

    def start(out, *flags, data=folder, hook=int, **environment):
        flags = [str(flag) for flag in (*FLAGS, "--data", data, "--out", out, *flags)]
        log = str(logs / str(random.getrandbits(60)))
        process = FORKS.Process(target=command, args=(flags, hook, environment, log))
        process.log = log
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def ended(process, status=0, within=None):
    process.join(within)
    process.kill()
    process.join()
    said = Path(process.log).read_text()
    assert process.exitcode == status, said
    return said


@pytest.fixture
def run(folder):
    def run(out, *flags, status=None):
        gc.collect()  # a folder that a run before held
        flags = [str(flag) for flag in (*FLAGS, "--data", folder, "--out", out, *flags)]
        if status is None:
            return train.main(flags)
        with pytest.raises(SystemExit) as ending:
            train.main(flags)
        assert ending.value.code == status

    return run


@pytest.fixture
def refused(run, capsys):
    def refused(out, *flags):
        capsys.readouterr()
        run(out, *flags, status=2)
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if not line.startswith("left out: ")]
        return line

    return refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(30):
        path = folder / train.SHAPES[index % 3] / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        train.draw_shape(index, 16)[0].save(path)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, start):
    """A run folder of all three stages that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "base"
    out.with_name("said").write_text(ended(start(out)))
    return out


@pytest.fixture
def out(base, tmp_path):
    return shutil.copytree(base, tmp_path / "run")


def lines_of(out, stage=None, name="stage"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in (None, line["stage"]) and name in line]


def difference(ours, theirs):
    (ours, structure), (theirs, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert structure == other
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs))


def test_a_run_learns_and_leaves_a_folder(base, folder):
    said = base.with_name("said").read_text()
    assert f"{base}: 27 images to train on, 3 held out, 3 classes; cpu, float32, 1 thr" in said
    assert re.search(r"next-scale \(2 of 3\) 16/24  0:00:\d\d left  loss \d", said)
    assert 1 < float(said.split("seconds ")[1]) < 600
    for stage, file in train.STAGES.items():
        losses = [line["loss"] for line in lines_of(base, stage, "loss")]
        held_out = [line["held_out_loss"] for line in lines_of(base, stage, "held_out_loss")]
        assert losses[-1] < losses[0] and len(held_out) == len(losses)
        leaves = pytree.tree_leaves(torch.load(base / file))
        assert all(type(leaf) is torch.Tensor for leaf in leaves)

    text = (base / "args.json").read_text()
    assert json.loads(text)["class_names"] == sorted(train.SHAPES[:3])
    assert str(folder) not in text and str(base) not in text  # both may move
    sheets = ["masked.png", "next-scale.png", "reconstructions.png"]
    assert sorted(os.listdir(base / "samples")) == sheets
    names = "args.json hmar.pt images.bin labels.npy lock metrics.jsonl next-scale.pt samples"
    assert sorted(os.listdir(base)) == [*names.split(), "tokenizer.pt", "tokens.npy"]
    assert np.load(base / "tokens.npy").shape == (30, 16, 37)


# Kills and signals


def test_kills_at_random_moments_change_nothing(base, start, folder, tmp_path):
    """Nor does a move without the data, once images are prepared."""
    data, out = shutil.copytree(folder, tmp_path / "data"), tmp_path / "run"
    for number in itertools.count(1):
        seconds = random.uniform(0, number / 2)
        kill = partial(signal.setitimer, signal.ITIMER_REAL, seconds)
        process = start(out, data=data, hook=kill)
        process.join()
        if process.exitcode == 0:
            break
        ended(process, -signal.SIGALRM)
        if (out / "args.json").exists():
            shutil.rmtree(data, ignore_errors=True)
            out = shutil.move(out, tmp_path / f"{number}")
    assert number > 2
    assert contents(out) == contents(base)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_in_a_line_where_it_goes_on(base, start, tmp_path, number):
    process = start(tmp_path)
    while not (tmp_path / "next-scale.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    *_, line = ended(process, 130).splitlines()
    expected = "train.py: stopped; the same command goes on from (next-scale|masked), step (\\d+)"
    _, step = re.fullmatch(expected, line).groups()
    assert torch.load(tmp_path / "checkpoint.pt")["at"]["step"] == int(step)
    ended(start(tmp_path))
    assert contents(tmp_path) == contents(base)


def limit():
    """Writes fail in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk_is_one_line_and_loses_nothing(start, run, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    *_, line = ended(start(whole, "--steps", 1, hook=limit), 2).splitlines()
    assert line.startswith(f"train.py: {whole}/checkpoint.pt: cannot be written: [Errno 27]")
    run(whole, "--steps", 1)
    names = set()
    for written in range(30):  # files, before one is not
        results = written * [None] + [OSError(errno.ENOSPC, "full")]
        with mock.patch.object(os, "fsync", side_effect=results):
            try:
                run(out, "--steps", 1)
                break
            except SystemExit as error:
                assert error.code == 2
        *_, line = capsys.readouterr().err.splitlines()
        found = re.fullmatch(f"train.py: {out}/(.*): cannot be written: .* full", line)
        names.add(found[1])
        assert not list(out.rglob("*.tmp"))
    assert {"images.bin", "labels.npy", "args.json", "checkpoint.pt"} < names
    assert contents(out) == contents(whole)


# The loop, on a stage that is a linear regression


def toy_stage(out, **changes):
    out.mkdir(exist_ok=True)
    numbers = dict(steps=12, images=4, peak=0.1, decay=0.05, looks=99)
    return train.Stage(**dict(name="toy", place="1 of 1", out=out) | numbers | changes)


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


def toy_fit(stage, look=lambda tree: dict(loss=1.0), loss=toy_loss, **more):
    return train.fit(stage=stage, tree=toy_tree(), loss=loss, batch=toy_batch, look=look, **more)


def test_the_loop_equals_one_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "AVERAGED", 1 / 36)
    falling = iter(range(99, 0, -1))
    ours = toy_fit(toy_stage(tmp_path), lambda tree: dict(loss=next(falling)))
    theirs = pytree.tree_map(torch.nn.Parameter, toy_tree())
    leaves = pytree.tree_leaves(theirs)
    average = [leaf.detach().clone() for leaf in leaves]
    matrices = [torch.nn.Parameter(leaf.detach().flatten(1)) for leaf in leaves[:-1]]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(leaves[-1:], betas=(0.9, 0.95), weight_decay=0)

    for step in range(1, 13):
        toy_loss(theirs, **toy_batch(step, slice(None)))[0].backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
        rate = 0.1 * min(step / 0.72, 1, (13 - step) / 12 / 0.6)
        for leaf in leaves:
            leaf.grad /= max(1, norm)
        for leaf, matrix in zip(leaves, matrices):  # of the same memory
            matrix.grad = leaf.grad.flatten(1)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        for leaf, mean in zip(leaves, average):
            mean.lerp_(leaf.detach(), 1 - min(0.25, step / (step + 10)))
            leaf.grad = None
    assert difference(pytree.tree_leaves(ours), average) < 1e-5


def test_best_weights_and_early_stop_survive_kills(tmp_path, capsys):
    def look(params):  # falls until the weights have a size
        trees.append(copy.deepcopy(params))
        return dict(loss=abs(float(params["tall"].norm()) - 0.1))

    def stop_at(last, step, *_):
        if step == last:
            raise SystemExit

    trees = []
    whole = toy_fit(toy_stage(tmp_path / "whole"), look)
    losses = [line["held_out_loss"] for line in lines_of(tmp_path / "whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best and len(losses) == best + 1 + 4  # a third of 12 steps
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])

    for step in (best + 2, best + 5):  # killed after the best step, and at the last
        with pytest.raises(SystemExit):
            toy_fit(toy_stage(tmp_path / "cut"), look, after_step=partial(stop_at, step))
    assert difference(toy_fit(toy_stage(tmp_path / "cut"), look), whole) == 0
    assert difference(toy_fit(toy_stage(tmp_path / "cut"), look), whole) == 0  # it is over
    assert capsys.readouterr().out.count(f"toy: best at step {best + 1}, ") == 3
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole")]
    assert metrics[0] == metrics[1]


def test_a_save_between_looks(tmp_path, monkeypatch):
    """After so many seconds, at a line; what extra holds is saved too."""

    def after_step(step, needs, parameters, adamw):
        counts.add_(step)
        if step == 7:
            raise SystemExit

    monkeypatch.setattr(train, "LOG_EVERY", 3)
    for seconds, step in ((300, 0), (0, 6)):
        monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
        counts, out = torch.zeros(1), tmp_path / str(seconds)
        with pytest.raises(SystemExit):
            toy_fit(toy_stage(out, looks=1), after_step=after_step, extra=[counts])
        saved = torch.load(out / "checkpoint.pt")
        assert saved["at"]["step"] == step and saved["extra"][0] == sum(range(step + 1))
    for seconds, sum_at_save in ((300, 0), (0, 21)):  # a line after the save is cut
        counts, out = torch.zeros(1), tmp_path / str(seconds)
        toy_fit(toy_stage(out, looks=1), extra=[counts])
        steps = [line["step"] for line in lines_of(out, name="loss")]
        assert counts == sum_at_save and steps == [3, 6, 9, 12]


def test_muon_has_matrices_and_convolutions_but_what_faces_codes_and_classes():
    params = tree(depth=1, masked=0, convolutions=True, neighbours=True, random=False)
    leaves = [train.new_parameter(leaf) for leaf in pytree.tree_leaves(params)]
    muon, adamw = train.new_optimizers(params, leaves, 0)
    names = {id(leaf): name for leaf, name in zip(leaves, named_leaves(params))}
    groups = [optimizer.param_groups[0]["params"] for optimizer in (muon, adamw)]
    by_muon, by_adamw = ({names[id(leaf)] for leaf in group} for group in groups)
    assert by_muon | by_adamw == set(names.values())
    inner = ("['attention']['qkv']", "['attention']['project']['weight']")
    inner += ("['mlp']['expand']['weight']", "['mlp']['contract']['weight']")
    beside = {
        f"['next_scale']['neighbours']['{name}']['weight']" for name in ("expand", "contract")
    }
    assert by_muon == beside | {"['input']['weight']", *(f"['trunk'][0]{name}" for name in inner)}
    published = tree(depth=1, masked=0, random=False)  # a matrix embeds the codes there
    leaves = [train.new_parameter(leaf) for leaf in pytree.tree_leaves(published)]
    muon, _ = train.new_optimizers(published, leaves, 0)
    assert len(muon.param_groups[0]["params"]) == 4


def test_the_losses_are_compiled_if_asked(run, tmp_path):
    with mock.patch.object(torch, "compile", side_effect=lambda loss: loss) as compiled:
        run(tmp_path / "plain", "--steps", 1)
        assert not compiled.called
        run(tmp_path / "compiled", "--steps", 1, "--compile")
    assert len(compiled.mock_calls) == 3
    ours, theirs = contents(tmp_path / "plain"), contents(tmp_path / "compiled")
    assert ours["hmar.pt"] == theirs["hmar.pt"]


def test_a_batch_is_halved_where_memory_is_small(tmp_path):
    sizes = []

    def loss(params, x, y):
        sizes.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return toy_loss(params, x, y)

    falls = [dict(loss=-step) for step in range(3)]
    whole = toy_fit(toy_stage(tmp_path / "whole", steps=3), mock.Mock(side_effect=falls))
    stage = toy_stage(tmp_path / "halved", steps=3)
    halved = toy_fit(stage, mock.Mock(side_effect=falls), loss)
    assert sizes == [4, 2, 1, 1, 1, 1] + 8 * [1]
    assert difference(halved, whole) < 1e-2  # Muon is in bf16
    with pytest.raises(torch.OutOfMemoryError):
        toy_fit(toy_stage(tmp_path / "none"), loss=mock.Mock(side_effect=torch.OutOfMemoryError))


def test_what_is_not_finite_is_not_saved(run, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e9 if step == 9 else 1e-4)
    for _ in range(2):  # the same command says so again
        line = refused(tmp_path)
        assert re.search(r"tokenizer, step 16: loss or gradient is not finite; a lower", line)
        saved = torch.load(tmp_path / "checkpoint.pt")
        assert saved["at"]["step"] == 8 and all(leaf.isfinite().all() for leaf in saved["leaves"])
    assert not re.search("NaN|Infinity", (tmp_path / "metrics.jsonl").read_text())


def test_a_terminal_shows_one_line_that_is_renewed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.say("one", renewed=True)
    train.say("two")
    assert capsys.readouterr().out == "\r\x1b[Kone\r\x1b[Ktwo\n"


# Several processes are one


def start_many(start, count, *flags, **options):
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(*flags, **options, **common, RANK=str(rank)) for rank in range(count)]


def test_two_processes_are_one(base, start, tmp_path):
    """But for rounding: Muon multiplies in bf16, AdamW steps by its sign where a gradient is 0."""
    flags = ["--lr", 1e-5, "--batch", 8]
    one = start(tmp_path / "one", *flags)
    two = start_many(start, 2, tmp_path / "two", *flags)
    for process in (one, *two):
        ended(process)
    assert ended(two[1]) == ""  # the first speaks for both
    ours, theirs = (lines_of(tmp_path / name) for name in ("one", "two"))
    for line, other in zip(ours, theirs, strict=True):
        for key, value in line.items():
            close = pytest.approx(value, rel=2e-3, abs=2e-3) if key != "stage" else value
            assert "perplexity" in key or "accuracy" in key or other[key] == close, key
    for name in train.STAGES.values():
        trees = [torch.load(tmp_path / run / name) for run in ("one", "two")]
        assert difference(*trees) < 2e-3, name
    assert contents(tmp_path / "one")["images.bin"] == contents(tmp_path / "two")["images.bin"]


def test_two_processes_go_on_when_one_is_killed(start, tmp_path):
    whole = start_many(start, 2, tmp_path / "whole")
    for rank, seconds in ((1, 3), (0, 4), (1, 5)):
        processes = start_many(start, 2, tmp_path / "cut")
        processes[rank].join(seconds)
        processes[rank].kill()  # torchrun ends the other
        processes[1 - rank].join(1)
        processes[1 - rank].kill()
    for process in (*whole, *start_many(start, 2, tmp_path / "cut")):
        ended(process)
    ours, theirs = contents(tmp_path / "cut"), contents(tmp_path / "whole")
    assert ours == theirs


def test_what_the_first_process_refuses_all_do_in_a_line(base, start, tmp_path):
    out = shutil.copytree(base, tmp_path / "run")
    for process in start_many(start, 2, out, "--seed", 3):
        (line,) = ended(process, 2).splitlines()
        assert line.startswith(f"train.py: {out}: begun with other flags")


def test_a_batch_that_processes_do_not_divide_is_refused_first(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train, "start_processes", lambda name: torch.device("cpu"))
    assert refused(tmp_path / "run").endswith("--batch: got 4 for 3 processes, expected say 6")
    assert not (tmp_path / "run").exists()


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
        assert [dial["transformer"][name] for dial in dials] == 7 * [True] + 23 * [False]
    few = train.dial(8, 32, 190)
    assert few["steps"]["next-scale"] * few["batch"] < 201 * 190  # epochs
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        sizes = train.dial(2, size, 100)["codec"]
        codec = tokenizer.init(**sizes)
        assert tokenizer.downsampling(codec) == cell
        assert sizes["fold"] == 2 and train.dial(2, size, 100)["perceptual"] == (size > 32)
        assert train.dial(3, size, 100)["codec"]["fold"] == 1 + (size > 32)
        tokenizer.check(codec)
    for dial, sides in zip(dials[1:], ([1, 2, 3, 6, 12], [1, 2, 3, 4, 6, 8, 12])):
        assert [h for h, _ in train.default_scales(48, 4, dial["growth"])] == sides


# What the stages compute


def plain_hues(images):
    red, green, blue = images.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean((3, 5)).unbind(1)
    return red - blue, 2 * green - red - blue


def plain_texture(images):
    ones = torch.ones(3, 1, 3, 3)
    sums, counts = (F.conv2d(x, ones, padding=1, groups=3) for x in (images, images * 0 + 1))
    squares = (images - sums / counts).square().sum(1)
    return (squares.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).mean((2, 4)) + 1e-4).sqrt()


def plain_perceptual(levels, *pair):
    for level in levels:
        pair = [level(x) for x in pair]
        one, other = (F.normalize(x) for x in pair)
        yield (one - other).square().sum(1).mean()
        pair = [F.avg_pool2d(x, 2) for x in pair]


def test_the_tokenizer_learns_from_all_errors(folder, tmp_path, monkeypatch):
    levels = torch.nn.ModuleList()
    for inputs, outputs in ((3, 4), (4, 5)):
        layers = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs)
        levels.append(torch.nn.Sequential(*layers, torch.nn.ReLU()).eval())
    monkeypatch.setattr(train, "learn_levels", lambda *_: levels)
    given = captured(tmp_path, "tokenizer", "--data", folder, *FLAGS)
    codec, batch = given["tree"], given["batch"](3, np.arange(4))
    images, coarse, stops = (batch[name] for name in ("images", "coarse", "stops"))
    assert coarse.tolist() == [0]
    passed = tokenizer.training_pass(codec, images, SCALES, coarse, stops)

    pixels = np.array(np.memmap(tmp_path / "images.bin", np.uint8)).reshape(30, 16, 3, 16, 16)
    training = torch.from_numpy(pixels[3:, 0] / np.float32(127.5) - 1)
    variance = sum(hue.var(correction=0) for hue in plain_hues(training)) / 2
    rest = passed["images"] - images
    expected = rest.square().mean() + 0.5 * rest.abs().mean() + passed["loss"]
    for dim in (2, 3):
        expected += 0.25 * rest.diff(dim=dim).abs().mean()
    expected += 0.5 * (plain_texture(passed["images"]) - plain_texture(images)).abs().mean()
    expected += 0.08 * sum(plain_perceptual(levels, passed["images"], images))
    hue = sum(hue.square().mean() for hue in plain_hues(rest)) / 2
    expected += 0.28 * hue / (variance + 0.01)
    expected += 0.5 * F.mse_loss(passed["coarse"], images[:1])
    value, report, _ = given["loss"](codec, **batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert report["loss"] is value


def test_every_fourth_image_of_a_batch_is_coarse_whatever_the_parts(folder, tmp_path):
    given = captured(tmp_path, "tokenizer", "--data", folder, *FLAGS, "--batch", 14)
    whole = given["batch"](5, np.arange(14))
    assert whole["coarse"].tolist() == [0, 4, 8, 12] and set(whole["stops"].tolist()) <= {0, 1, 2}
    values, stops = [], []
    for positions in np.arange(14).reshape(2, 7):
        part = given["batch"](5, positions)
        assert torch.equal(part["images"], whole["images"][positions])
        values.append(given["loss"](given["tree"], **part)[0].item())
        stops += part["stops"].tolist()
    assert stops == whole["stops"].tolist()
    value, *_ = given["loss"](given["tree"], **whole)
    assert sum(values) / 2 == pytest.approx(value.item(), rel=1e-5)


def test_the_perceptual_network_learns_classes_in_all_crops(start, tmp_path, capsys):
    """It is right on images that it saw, of all crops; afterwards its norms are fixed."""
    images = np.stack([np.asarray(train.draw_shape(i, 48)[0]) for i in range(30)])
    images = np.stack([images, 255 - images], 1).transpose(0, 1, 4, 2, 3)
    labels = torch.arange(30) % 3
    names = dict(perceptual=True, class_names=[*"abc"], seed=0, size=48, crops=2)
    run = mock.Mock(device=torch.device("cpu"), dtype=torch.float32, **names)
    with mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy) as losses:
        levels = train.learn_levels(run, images, labels, 60)
    values = [F.cross_entropy(*call.args).item() for call in losses.call_args_list]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])  # of wrong labels it learns nothing
    assert not any(level.training for level in levels)
    norm = levels[0][1].running_mean
    plain, crops = (levels[0][0](train.to_unit(images[:, i])).mean((0, 2, 3)) for i in (0, 1))
    assert (norm - (plain + crops) / 2).abs().max() < 0.5 * (plain - crops).abs().max()
    run.class_names = ["one"]
    assert train.learn_levels(run, images, labels, 60) == []


def test_dead_codes_and_moments_are_replaced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "REVIVE_EVERY", 4)
    given = captured(tmp_path, "tokenizer", "--data", folder, *FLAGS)
    parameters = pytree.tree_map(train.new_parameter, given["tree"])
    codebook, (chosen,) = parameters["codebook"], given["extra"]
    zeros = dict(exp_avg=torch.ones_like(codebook), exp_avg_sq=torch.ones_like(codebook))
    adamw, sums = mock.Mock(state={codebook: zeros}), []
    for step in range(1, 25):
        before = codebook.detach().clone()
        *_, needs = given["loss"](given["tree"], **given["batch"](step, np.arange(4)))
        tokens = torch.cat([x.flatten() for x in needs[0]])
        chosen_by_now = chosen.clone().index_add_(0, tokens, torch.ones_like(tokens))
        given["after_step"](step, [needs], parameters, adamw)
        changed = (codebook != before).any(1)
        if chosen.sum() == 0:
            sums.append((step, int(chosen_by_now.sum())))
            assert torch.equal(changed, chosen_by_now == 0) and changed.any()
            vectors = torch.cat([x.flatten(0, 1) for x in needs[1]])
            fresh = codebook[changed][:, None] - vectors
            assert (fresh.abs().amax(2).amin(1) == 0).all()
            assert torch.equal(zeros["exp_avg"][:, 0] == 0, changed)
            zeros["exp_avg"].fill_(1)
        else:
            assert not changed.any()
    # at step 1 and every fourth, not after 80 %
    assert sums == [(1, 148), (4, 444), (8, 592), (12, 592), (16, 592)]


def test_held_out_numbers_are_of_saved_weights(base):
    codec, params = torch.load(base / "tokenizer.pt"), torch.load(base / "hmar.pt")
    pixels = np.array(np.memmap(base / "images.bin", np.uint8)).reshape(30, 16, 3, 16, 16)[:3, 0]
    images, labels = torch.from_numpy(pixels / np.float32(127.5) - 1), np.load(base / "labels.npy")
    tokens, labels = tokenizer.encode(codec, images, SCALES), torch.from_numpy(labels[:3])
    assert np.array_equal(np.load(base / "tokens.npy")[:3, 0], tokens)
    errors = tokenizer.decode(codec, tokens, SCALES) - images
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    logits = hmar.next_scale_logits(params, labels, inputs, tokens=tokens)
    surprise = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    mask = torch.rand(3, 36, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    logits = hmar.masked_logits(params, labels, inputs, own_inputs, mask, tokens)[:, 1:][mask]
    hidden = tokens[:, 1:][mask]

    best = {}
    expected = errors.square().mean(), surprise, F.cross_entropy(logits, hidden)
    for stage, loss in zip(train.STAGES, expected):
        lines = lines_of(base, stage, "held_out_loss")
        best[stage] = min(lines, key=lambda line: line["held_out_loss"])
        assert best[stage]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    hits = (logits.argmax(-1) == hidden).float().mean().item()
    assert best["masked"]["held_out_accuracy"] == pytest.approx(hits)
    psnr = (10 * torch.log10(4 / errors.square().mean((1, 2, 3)))).mean().item()
    assert best["tokenizer"]["held_out_psnr"][-1] == pytest.approx(psnr, rel=1e-4)
    for k, own in enumerate(tokens.split([1, 4, 16, 16], 1)):
        share = torch.bincount(own.flatten()).double() / own.numel()
        perplexity = torch.special.entr(share).sum().exp().item()
        assert best["tokenizer"]["held_out_perplexity"][k] == pytest.approx(perplexity, rel=1e-4)


def test_labels_masks_and_losses_of_the_stages(base, folder):
    codec, ratios, labels = torch.load(base / "tokenizer.pt"), [], []
    for name in ("next-scale", "masked"):
        copied = shutil.copytree(base, base.with_name(f"{name} copy"))
        (copied / "hmar.pt").unlink()
        if name == "next-scale":
            (copied / "next-scale.pt").unlink()
        given = captured(copied, name, "--data", folder, *FLAGS)
        params = torch.load(base / "next-scale.pt")
        params = hmar.add_masked_branch(params, 1) | given["tree"]
        batches = [given["batch"](step, np.arange(4)) for step in range(1, 150)]
        own, tokens, *masked = batches[0].values()
        sees = [params, own, tokens, tokenizer.next_scale_inputs(codec, tokens, SCALES)]
        if name == "masked":
            sees += [tokenizer.masked_inputs(codec, tokens, SCALES, masked[0]), masked[0]]
            expected = hmar.masked_losses(*sees).sum() / (4 * 18)
            ratios = torch.cat([batch["mask"].float().mean(1) for batch in batches])
        else:
            expected = hmar.next_scale_losses(*sees).mean()
        torch.testing.assert_close(given["loss"](given["tree"], **batches[0])[0], expected)
        labels += [batch["labels"] for batch in batches]
    assert np.histogram(ratios, 4, (0, 1))[0].min() > 100
    labels = torch.cat(labels)
    assert set(labels.tolist()) == {0, 1, 2, 3} and 70 < (labels == 3).sum() < 170  # a tenth


# Weights that are given


def save_params(path, codes=16):
    scales = tuple((side, side) for side in (1, 2, 3, 4, 4))
    sizes = dict(width=32, classes=5, codes=codes, code_dim=8, depth=3, scales=scales, seed=5)
    params = hmar.add_masked_branch(hmar.init(**sizes), 2)
    torch.save(params, path)
    return params


SMALL = ["--steps", 1, "--lr", 1e-9]
GIVEN = [*FLAGS[4:], *map(str, SMALL)]  # --init decides the depth


def initial(folder, out, *flags):
    flags = ["--data", folder, "--out", out, "--size", 8, *GIVEN, *flags]
    train.main([str(flag) for flag in flags])
    return torch.load(out / "hmar.pt")


def test_init_fits_classes_scales_and_branches(folder, tmp_path, capsys):
    init, given = tmp_path / "init.pt", tmp_path / "given.pt"
    params = save_params(init)
    torch.save(CODEC, given)
    made = initial(folder, tmp_path / "a", "--init", init, "--tokenizer", given)
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    assert difference(made["trunk"] + made["next_scale"]["blocks"], blocks) < 1e-6
    assert difference(made["levels"], params["levels"]) < 1e-6
    assert made["classes"].shape == (4, 32) and len(made["masked"]["blocks"]) == 2
    assert "its codes get new meanings" not in capsys.readouterr().out
    made = initial(folder, tmp_path / "b", "--init", init, "--tokenizer", given, "--size", 32)
    assert [side for side, _ in hmar.scales(made)] == [1, 2, 3, 4, 6, 8, 11, 16]
    assert difference(made["trunk"] + made["next_scale"]["blocks"], blocks) < 1e-6

    # the same weights go on from wherever they lie, others are refused
    moved = shutil.move(init, tmp_path / "moved.pt")
    initial(folder, tmp_path / "a", "--init", moved, "--tokenizer", given)
    save_params(moved, codes=32)
    with pytest.raises(SystemExit):
        initial(folder, tmp_path / "a", "--init", moved, "--tokenizer", given)
    expected = "--init: got (codes, code_dim) (32, 8), the tokenizer has (16, 8)\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_given_tokenizer_is_taken_or_trained_on(run, tmp_path, refused):
    out, given = tmp_path / "run", tmp_path / "given.pt"
    torch.save(CODEC, given)
    run(out, *SMALL, "--tokenizer", given)
    assert difference(torch.load(out / "tokenizer.pt"), CODEC) == 0
    assert {line["stage"] for line in lines_of(out)} == {"next-scale", "masked"}
    assert (out / "images.bin").stat().st_size == 3 * 16 * 3 * 16 * 16  # held-out ones
    tokens = np.load(out / "tokens.npy")
    assert tokens.shape[:2] == (30, 16) and tokens.dtype == np.uint8
    pixels = np.array(np.memmap(out / "images.bin", np.uint8)).reshape(48, 3, 16, 16)
    images, scales = train.to_unit(pixels), train.default_scales(16, 2, 2)
    expected = tokenizer.encode(CODEC, images, scales).unflatten(0, (3, 16))
    assert np.array_equal(tokens[:3], expected)
    run(out, *SMALL, "--tokenizer", shutil.copy(given, tmp_path / "copy.pt"))
    assert "other flags or images: --tokenizer " in refused(out, *SMALL)

    run(tmp_path / "other", *SMALL, "--init", given)
    trained = torch.load(tmp_path / "other" / "tokenizer.pt")
    assert difference(trained, CODEC) < 1e-4  # no code was dead at first


def test_var_attends_to_coarser_scales_and_has_no_masked_stage(run, tmp_path):
    calls, whole = [], hmar.branch_features

    def features(*args, **options):
        calls.append(options)
        return whole(*args, **options)

    with mock.patch.object(hmar, "branch_features", features):
        run(tmp_path, *SMALL, "--causal")
    for options in calls:  # to train, to judge, to draw
        assert options.get("is_causal") or options.get("cache"), options
    assert not (tmp_path / "hmar.pt").exists()


# Run folders that are not what they were


def test_a_stage_is_finished_while_its_file_exists(base, out, run):
    own = [out / name for name in ("a.tmp", "hmar.pt.7.tmp", "tokenizer.pt.0123abcd.tmp")]
    for path in (*own, out / "a.0123456789abcdef.tmp", out / "samples/x.0123456789abcdef.tmp"):
        path.write_text("mine, or left by a kill")
    with mock.patch.object(train, "fit", side_effect=SystemExit):
        run(out)
    for path in own:
        path.unlink()
    assert contents(out) == contents(base)


def test_other_flags_or_images_are_refused(base, out, run, folder, tmp_path, refused):
    assert refused(out, "--seed", 3, "--flip") == (
        f"train.py: {out}: begun with other flags or images: flip False -> True, "
        "seed 0 -> 3; give another --out, or remove the folder"
    )
    data = shutil.copytree(folder, tmp_path / "data")
    run(out, "--data", data)
    image = data / "disc/000.png"
    for change in (
        partial(image.write_bytes, b"longer"),
        partial(image.rename, data / "disc/x.png"),
    ):
        change()
        assert "begun with other flags or images: images " in refused(out, "--data", data)
    assert contents(out) == contents(base)


def test_before_anything_is_learned_other_flags_take_the_folder(base, run, tmp_path, folder):
    out = tmp_path / "run"
    with mock.patch.object(train, "fit", side_effect=SystemExit), pytest.raises(SystemExit):
        run(out, "--seed", 9)
    run(out)
    assert contents(out) == contents(base)


def test_what_was_prepared_for_other_flags_is_not_used(run, tmp_path, folder, monkeypatch):
    """Tokens of a --tokenizer that goes, nor images when the second preparing is killed."""
    given, one, two = tmp_path / "given.pt", tmp_path / "one", tmp_path / "two"
    torch.save(small_codec(codes=128, code_dim=16), given)
    stopped = mock.patch.object(train, "save_tree", side_effect=KeyboardInterrupt)
    with stopped:
        run(one, "--steps", 1, "--tokenizer", given, status=130)
    assert (one / "tokens.npy").exists() and not list(one.glob("*.pt"))
    for out in (one, two):
        with mock.patch.object(train, "fit", side_effect=KeyboardInterrupt):
            run(out, "--steps", 1, status=130)
        assert not (out / "tokens.npy").exists()
    with mock.patch.object(train.np, "save", side_effect=KeyboardInterrupt):
        run(one, "--steps", 1, "--seed", 7, status=130)  # other images, without a record
    for out in (one, two):
        run(out, "--steps", 1)
    assert contents(one) == contents(two)


def test_cut_files_are_refused_by_name(out, refused, run):
    (out / "hmar.pt").unlink()
    tokens = np.load(out / "tokens.npy")
    np.save(out / "tokens.npy", tokens[1:])
    assert f"{out}/tokens.npy: got (29, 16, 37), up to" in refused(out)
    (out / "tokens.npy").unlink()
    os.truncate(out / "images.bin", 1000)
    assert f"{out}/images.bin: got 1000 bytes, expected 368640" in refused(out)
    np.save(out / "tokens.npy", tokens)
    for saved in ([], dict(stage="masked", at={})):
        torch.save(saved, out / "checkpoint.pt")
        assert f"{out}/checkpoint.pt: not of this run; once it is removed" in refused(out)
    (out / "checkpoint.pt").unlink()
    (out / "metrics.jsonl").unlink()
    run(out)
    assert b"\0" not in (out / "metrics.jsonl").read_bytes()


def test_what_has_no_record_is_refused(tmp_path, refused):
    for name in (*train.STAGES.values(), "checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
        assert refused(tmp_path).startswith(f"train.py: {tmp_path}: begun with other flags")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_no_transformer_meets_another_tokenizer(out, run, refused):
    (out / "hmar.pt").unlink()
    torch.save(small_codec(codes=128, code_dim=16), out / "tokenizer.pt")
    assert f"{out}/args.json: tells of another tokenizer.pt than this" in refused(out)


def test_a_folder_takes_one_process_at_a_time(out, refused):
    with open(out / "lock") as lock:
        train.fcntl.flock(lock, train.fcntl.LOCK_EX)
        assert refused(out) == f"train.py: {out}: another process works there"


BAD = [
    ("--step-s=3", "unrecognized arguments: --step-s=3"),
    ("--data broken", "--data: 0 images can be read, expected two or more"),
    ("--data nowhere", "--data: [Errno 2] No such file or directory: 'nowhere'"),
    ("--data=", "--data: [Errno 2] No such file or directory: ''"),
    ("--size 15", "--size: got 15, expected a multiple of 4"),
    ("--batch 0", "--batch: got 0, expected 1 or more"),
    ("--lr 0", "--lr: got 0, expected above 0"),
    ("--lr nan", "--lr: got nan, expected above 0"),
    ("--tokenizer codec.pt --init codec.pt", "got a tokenizer beside --tokenizer"),
    ("--init params.pt", "--depth: got 1, but --init decides it"),
    ("--tokenizer nowhere.pt", "nowhere.pt: cannot be read: FileNotFoundError"),
    ("--out file.txt", "file.txt"),
]


@pytest.mark.parametrize("flags, said", BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, refused, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    for name in ("broken/a.png", "broken/b.png", "file.txt"):
        Path(name).write_text("text")
    torch.save(CODEC, "codec.pt")
    save_params("params.pt")
    line = refused("run", *flags.split())
    assert said.replace("--", "") in line.replace("argument --", "").replace("--", "")
    assert not list(Path("run").rglob("*.pt"))
