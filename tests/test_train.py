"""Training: nothing is lost, processes are one, what a step computes, bad input."""

import argparse
import contextlib
import copy
import gc
import io
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
from helpers import CODEC_SIZES, JSON, asked_of_fit, contents, scrambled, small_codec, tree
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

ROOT = Path(__file__).resolve().parent.parent
SCALES = ((1, 1), (4, 4), (8, 8))
STEPS = 12
SIZES = "--size 16 --scales 1 4 8 --channels 32 --multipliers 1 1 --codes 16 --code-dim 8 --depth 1"
REST = "--width 32 --masked-blocks 1 --batch 4 --warmup 2 --save-every 4 --dtype fp32 --device cpu"
TINY = [*SIZES.split(), *REST.split()]
MUON = dict(weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_train", "torch._dynamo"])


@pytest.fixture(autouse=True, scope="module")
def often():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "REVIVE_EVERY", 4)
        yield


# Commands, in a process of their own or in this one


def command(flags, hook, environment, log):
    """`python train.py FLAGS`, in a process forked from one that has imported torch."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    train.LOG_EVERY, train.REVIVE_EVERY = 1, 4
    hook()
    sys.exit(train.main(flags))


class Job:
    """A command that runs; hook() is called in its process first."""

    def __init__(self, log, flags, hook, environment):
        self.log = log
        flags = [str(flag) for flag in flags]
        self.process = FORKS.Process(target=command, args=(flags, hook, environment, log))
        self.process.start()

    def said(self, end):
        return Path(f"{self.log}.{end}").read_text()

    def ended(self, status=0):
        self.process.join()
        assert self.process.exitcode == status, self.said("out") + self.said("err")
        return self


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")

    def start(*flags, hook=int, **environment):
        log = str(logs / str(random.getrandbits(60)))
        return Job(log, [*TINY, "--steps", STEPS, *flags], hook, environment)

    return start


def start_two(start, *flags, **options):
    """The two processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(options, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(*flags, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


def status_of(*flags):
    gc.collect()  # a folder that a run before held
    return train.main([*TINY, "--steps", str(STEPS), *(str(flag) for flag in flags)])


def run(*flags):
    assert status_of(*flags) == 0


@pytest.fixture
def refused(capsys):
    def refused(*flags):
        """The one line that a command says when it ends with status 2."""
        capsys.readouterr()
        assert status_of(*flags) == 2
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if not line.startswith("skipped: ")]
        assert line.startswith("train.py: ")
        return line

    return refused


# Run folders


def drawings(folder, count=30, size=16, classes=3):
    """A folder of drawn shapes, one sub-folder a class."""
    for index in range(count):
        path = folder / train.SHAPES[index % classes] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        train.draw_shape(index, size)[0].save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawings(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, often, start, folder):
    """A run folder of all three stages that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "base"
    start("--data", folder, "--out", out).ended()
    return out


def continued(base, out, *stages, **flags):
    """A run folder, begun with flags, in which stages of `base` are finished."""
    shutil.copytree(base, out)
    record = json.loads((out / "args.json").read_text())
    record["made"] = {stage: record["made"][stage] for stage in stages}
    record["flags"] |= flags
    (out / "args.json").write_text(json.dumps(record))
    (out / "metrics.jsonl").unlink()
    return out


def lines_of(out, stage=None, name="stage"):
    """The lines of metrics.jsonl that have a name."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in (None, line["stage"]) and name in line]


def weights(out, name):
    return torch.load(Path(out) / name, weights_only=True)


def difference(ours, theirs):
    """The largest absolute difference of two trees of one structure."""
    (ours, structure), (theirs, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert structure == other
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs))


def assert_same_run(ours, theirs):
    """Bit for bit: weights, tokens, record and metrics."""
    for name in ("tokenizer.pt", "hmar.pt"):
        assert difference(weights(ours, name), weights(theirs, name)) == 0, name
    for name in ("metrics.jsonl", "args.json", "tokens.npy"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_run_learns_and_leaves_a_folder(base, folder):
    for stage in train.STAGES:
        losses = [line["loss"] for line in lines_of(base, stage, "loss")]
        held_out = [line["held_out_loss"] for line in lines_of(base, stage, "held_out_loss")]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        assert len(held_out) == len(losses) // 2 and held_out[-1] < held_out[0]

    record = json.loads((base / "args.json").read_text())
    assert record["class_names"] == sorted(train.SHAPES[:3]) and not record["causal"]
    assert not set(train.UNRECORDED) & set(record["flags"])

    for leaf in pytree.tree_leaves([weights(base, name) for name in ("tokenizer.pt", "hmar.pt")]):
        assert type(leaf) is torch.Tensor and not leaf.requires_grad and leaf.isfinite().all()
    for name, rows in (("reconstructions", 1 + len(SCALES)), ("next-scale", 3), ("masked", 3)):
        with Image.open(base / "samples" / f"{name}.png") as sheet:
            assert sheet.format == "PNG" and sheet.height == rows * 66
    names = "args.json hmar.pt lock metrics.jsonl samples tokenizer.pt tokens.npy"
    assert sorted(os.listdir(base)) == names.split()


# Kills and signals


def progress(out):
    """1000 a stage, then steps, by the last line of metrics.jsonl that is whole."""
    path = out / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    if not whole:
        return 0
    line = json.loads(whole[-1])
    return 1000 * list(train.STAGES).index(line["stage"]) + line["step"]


def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(base, start, folder, tmp_path):
    chance = random.Random()  # new ones each time: no moment may matter
    flags = ["--data", folder, "--out", tmp_path / "run"]
    killed = 0
    for stage in range(3):
        for step in sorted(chance.sample(range(1, STEPS + 1), 2)):
            job = start(*flags)
            while job.process.is_alive() and progress(tmp_path / "run") < stage * 1000 + step:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
            job.process.kill()
            job.process.join()
            killed += job.process.exitcode == -signal.SIGKILL
    assert start(*flags).ended().said("err") == "" and killed >= 2
    assert_same_run(tmp_path / "run", base)


def at(stage, step, act, rank="0"):
    """Has a process act when it has written a step's metrics."""
    write = train.log

    def log(args, now, **numbers):
        write(args, now, **numbers)
        is_now = (args.stage, now) == (stage, step) and "rate" in numbers
        if is_now and os.environ.get("RANK", "0") == rank:
            act()

    train.log = log


def ask(number):
    """Sends this process a signal, as a terminal and torchrun do."""
    os.killpg(os.getpgrp(), number)


def limit_files():
    """From now on writes fail in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on(base, start, folder, tmp_path):
    flags = ["--data", folder, "--out", tmp_path / "run", "--workers", 1]
    stops = [("tokenizer", 6, signal.SIGINT), ("next-scale", 10, signal.SIGTERM)]
    for stage, step, number in (*stops, ("masked", 7, signal.SIGINT)):
        job = start(*flags, hook=partial(at, stage, step, partial(ask, number))).ended(130)
        assert job.said("err") == f"train.py: {stage}: stopped and saved at step {step}\n"
        assert weights(tmp_path / "run", f"{stage}.resume.pt")["progress"][0] == step
    said = start(*flags).ended().said("out")
    assert f"masked: continues at step 7 of {STEPS}" in said
    assert_same_run(tmp_path / "run", base)


def test_a_full_disk_leaves_the_last_checkpoint_whole(base, start, folder, tmp_path):
    out = tmp_path / "run"
    job = start("--data", folder, "--out", out, hook=partial(at, "tokenizer", 6, limit_files))
    line = job.ended(2).said("err")
    assert line.startswith(f"train.py: {out}/tokenizer.") and "cannot be written: " in line
    assert line.count("\n") == 1 and not list(out.rglob("*.tmp"))
    assert weights(out, "tokenizer.resume.pt")["progress"][0] == 4
    start("--data", folder, "--out", out).ended()
    assert_same_run(out, base)


def test_two_processes_stop_together_and_go_on_bit_for_bit(start, folder, tmp_path):
    """One is told at step 7, both agree at step 10, between two revivals."""
    flags = ["tokenizer", "--data", folder, "--accumulate", 2, "--steps", 20, "--codes", 128]
    whole = start_two(start, *flags, "--out", tmp_path / "whole")
    hook = partial(at, "tokenizer", 7, partial(ask, signal.SIGTERM), rank="1")
    for job in start_two(start, *flags, "--out", tmp_path / "cut", hook=hook):
        job.ended(130)
    assert weights(tmp_path / "cut", "tokenizer.resume.pt")["progress"][0] == 10
    cut = start_two(start, *flags, "--out", tmp_path / "cut")
    for job in (*cut, *whole):
        job.ended()
    assert cut[1].said("out") == ""  # the first speaks for both
    made, expected = (weights(tmp_path / name, "tokenizer.pt") for name in ("cut", "whole"))
    assert difference(made, expected) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


# The loop, on a stage that is a linear regression


class Killed(BaseException):
    pass


def toy_args(out, **changes):
    Path(out).mkdir(exist_ok=True)
    flags = dict(out=str(out), stage="tokenizer", steps=12, lr=0.1, warmup=2, ema=0.9, accumulate=1)
    flags |= dict(save_every=2, compile=False, device=torch.device("cpu"))
    return argparse.Namespace(**flags | changes)


def toy_batches(args, start):
    for step in range(start, args.steps):
        x = torch.randn(4, 3, generator=train.generator_of("toy", step))
        yield [dict(x=x, y=x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))]


def toy_loss(params, x, y):
    value = (hmar.linear(x, **params) - y).square().mean()
    return value, dict(loss=value)


def toy_fit(args, evaluate=lambda tree: dict(loss=1.0), after_step=lambda *_: None, looks=None):
    params = train.trainable(dict(weight=torch.zeros(2, 3), bias=torch.zeros(2)))
    batches = partial(toy_batches, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "JUDGEMENTS", looks or args.steps)
        return train.fit(args, params, toy_loss, batches, evaluate, after_step)


def stop_at(step, stop, now, reports, optimizer):
    if now == step:
        stop()


@pytest.mark.parametrize("warmup", (3, 6))
def test_the_loop_is_as_one_that_is_written_out(tmp_path, warmup):
    args = toy_args(tmp_path, steps=9, warmup=warmup)
    falling = iter(range(99, 0, -1))
    ours = toy_fit(args, lambda tree: dict(loss=float(next(falling))))
    theirs = dict(weight=torch.zeros(2, 3), bias=torch.zeros(2))
    for leaf in theirs.values():
        leaf.requires_grad_()
    muon = torch.optim.Muon([theirs["weight"]], **MUON)
    adamw = torch.optim.AdamW([theirs["bias"]], betas=(0.9, 0.95), weight_decay=0)
    average = {name: leaf.detach().clone() for name, leaf in theirs.items()}

    for step, (batch,) in enumerate(toy_batches(args, 0), 1):
        toy_loss(theirs, **batch)[0].backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in theirs.values()))
        rate = 0.1 * min(step / warmup, 1, (10 - step) / 9 / 0.6)
        for leaf in theirs.values():
            leaf.grad /= max(1, norm)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        for name, leaf in theirs.items():
            average[name].lerp_(leaf.detach(), 1 - min(0.9, step / (step + 10)))
        assert lines_of(tmp_path, name="rate")[step - 1]["rate"] == pytest.approx(rate)
    assert difference(ours, average) < 1e-5


def test_the_best_weights_are_kept_and_the_run_ends_early_across_a_kill_too(tmp_path, capsys):
    def evaluate(tree):
        """A loss that falls until the weights have a size, then rises."""
        trees.append(copy.deepcopy(tree))
        return dict(loss=abs(float(tree["weight"].norm()) - 0.1))

    trees = []
    whole = toy_fit(toy_args(tmp_path / "whole"), evaluate)
    losses = [line["held_out_loss"] for line in lines_of(tmp_path / "whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best and len(losses) == best + 1 + 4  # a third of 12 steps
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])
    said = f"tokenizer: stopped early at step {best + 5}; best at {best + 1}\n"
    assert said in capsys.readouterr().out

    path, killed = tmp_path / "cut" / "tokenizer.resume.pt", mock.Mock(side_effect=Killed)
    for step in (best, best + 3):  # killed before the best step, and after it
        with pytest.raises(Killed):
            toy_fit(toy_args(tmp_path / "cut"), evaluate, partial(stop_at, step, killed))
        saved, scalar = torch.load(path), torch.zeros(1)
        for other in (
            dict(state=[scalar, *saved["state"][1:]]),
            dict(state=[*saved["state"][:-1], scalar]),
            dict(progress=(99, 0, 1.0)),
        ):
            torch.save(saved | other, path)
            with pytest.raises(ValueError, match="expected this stage's checkpoint"):
                toy_fit(toy_args(tmp_path / "cut"), evaluate)
        torch.save(saved, path)
    again = toy_fit(toy_args(tmp_path / "cut"), evaluate)
    assert said in capsys.readouterr().out and difference(again, whole) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_the_second_look_that_is_no_better_ends_a_stage(tmp_path):
    toy_fit(toy_args(tmp_path, steps=20), looks=6)
    assert [line["step"] for line in lines_of(tmp_path, name="held_out_loss")] == [4, 8, 12]


def test_a_second_signal_ends_the_run_at_once_and_one_at_the_end_is_heeded(tmp_path):
    once = partial(signal.raise_signal, signal.SIGINT)

    def twice():
        once()
        once()

    for stop, step in ((twice, 3), (once, 5)):  # 4 after the best
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt) as stopped:
            toy_fit(toy_args(tmp_path), after_step=partial(stop_at, step, stop))
        assert not str(stopped.value)  # nothing was saved
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_the_step_is_compiled_if_asked(tmp_path):
    for asked in (False, True):
        with mock.patch.object(torch, "compile", side_effect=lambda model: model) as compiled:
            toy_fit(toy_args(tmp_path, compile=asked))
        assert compiled.called == asked


def test_what_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, folder, refused):
    monkeypatch.setattr(train, "JUDGEMENTS", 1)
    flags = ["tokenizer", "--data", folder, "--out", tmp_path, "--warmup", 0, "--save-every", 1]
    monkeypatch.setattr(train, "learning_rate", lambda step, args: 1e6 if step == 2 else 1e-4)
    for every in (1, 50, 50):  # the same command says so again
        monkeypatch.setattr(train, "LOG_EVERY", every)
        line = refused(*flags)
        assert re.search(r"tokenizer: loss or gradient is not finite at step [34]; a lower", line)
        state = weights(tmp_path, "tokenizer.resume.pt")["state"]
        assert all(leaf.isfinite().all() for leaf in state)
        if every == 1:
            assert not re.search("NaN|Infinity", (tmp_path / "metrics.jsonl").read_text())


def test_matrices_of_a_shape_are_stepped_together_as_by_torch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 4, 3, 3, generator=generator) for _ in range(3)]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)  # as a file may have it
    weights.append(torch.randn(40, 8, generator=generator))
    params = train.trainable(dict(conv1=weights, codebook=torch.randn(16, 4)))
    plain = [torch.nn.Parameter(weight.flatten(1).clone()) for weight in weights]
    muon = torch.optim.Muon(plain, lr=0.1, **MUON)
    monkeypatch.setattr(train, "MUON_TOGETHER", 2 * weights[0].numel())
    optimizer = train.Optimizer(params)
    assert [len(group) for group in optimizer.groups] == [2, 1, 1]
    for _ in range(3):
        for leaf in pytree.tree_leaves(params):
            leaf.grad = torch.randn(leaf.shape, generator=generator)
        for leaf, own in zip(params["conv1"], plain):
            own.grad = leaf.grad.flatten(1)
        optimizer.step(0.1)
        muon.step()
        for leaf, own in zip(params["conv1"], plain):
            size = 0.02 * max(own.shape) ** 0.5  # of a step, which is rounded to bf16
            assert difference(leaf.flatten(1), own) < 0.01 * size and leaf.grad is None

    optimizer.forget(params["codebook"], torch.arange(16) < 3)
    moment = optimizer.adamw.state[params["codebook"]]["exp_avg"].abs().sum(1)
    assert (moment[:3] == 0).all() and (moment[3:] > 0).all()


def test_muon_is_for_what_maps_features_to_features():
    codec = small_codec(multipliers=(1, 2))
    params = train.trainable(dict(codec=codec, hmar=tree(random=False)))
    muon = {id(leaf) for group in train.Optimizer(params).groups for leaf in group}
    kinds = "conv1|conv2|shortcut|upsample|downsample|qkv|project|expand|contract"
    for path, leaf in pytree.tree_flatten_with_path(params)[0]:
        is_named = re.search(rf"'({kinds})'\](\['weight'\])?$", pytree.keystr(path))
        assert (id(leaf) in muon) == (leaf.ndim > 1 and is_named is not None), path


def test_every_item_comes_once_an_epoch_in_a_new_order():
    args = argparse.Namespace(seed=3, batch=4)
    drawn = [item for step in range(20) for item in train.step_items(args, step, 10)]
    assert [draw for _, draw in drawn] == list(range(80))
    epochs = [[index for index, _ in drawn[first : first + 10]] for first in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8


# Several processes and parts of a batch are one


@pytest.mark.parametrize("stage", train.STAGES)
def test_two_processes_or_two_parts_are_one_with_the_whole(base, start, folder, tmp_path, stage):
    """Two channels share a norm: AdamW steps by rounding where a gradient is 0."""
    lr = 1e-4
    flags = [stage, "--data", folder, "--lr", lr, "--batch", 16, "--channels", 64, "--out"]
    earlier = list(train.STAGES)[: list(train.STAGES).index(stage)]
    for name in ("one", "parts", "two"):
        if earlier:
            recorded = dict(lr=dict.fromkeys(train.STAGES, lr), batch=16, channels=64)
            continued(base, tmp_path / name, *earlier, **recorded)
    one = start(*flags, tmp_path / "one")
    parts = start(*flags, tmp_path / "parts", "--accumulate", 2)
    for job in (one, parts, *start_two(start, *flags, tmp_path / "two", "--accumulate", 2)):
        job.ended()

    file = train.STAGES[stage]
    # of the tokenizer three steps: then rounding chooses another code
    most = 4 if stage == "tokenizer" else None
    whole = weights(tmp_path / "one", file)
    metrics = lines_of(tmp_path / "one", stage)
    for name in ("parts", "two"):
        made = weights(tmp_path / name, file)
        assert difference(made, whole) < 2 * lr, name  # Muon is in bf16
        for ours, line in zip(lines_of(tmp_path / name, stage)[:most], metrics[:most], strict=True):
            for key, value in line.items():
                if key != "stage":
                    assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, key)
    if stage == "masked":
        before = weights(base, "hmar.pt")
        assert difference(whole.pop("masked"), before.pop("masked")) > 1e-4
        assert difference(whole, before) == 0  # the rest stays


def watched(monkeypatch, module, name):
    """Lists the calls of a function, (result, arguments, options) each."""
    function, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append((function(*arguments, **options), arguments, options))
        return calls[-1][0]

    monkeypatch.setattr(module, name, call)
    return calls


# What the stages compute


def held_out(folder):
    """Images in [-1, 1] and their labels."""
    _, kept = train.split_held_out(train.list_images(folder)[0], folder)
    images = torch.stack([train.Images(kept, 16)[i, None, 0][0] for i in range(2)]) / 127.5 - 1
    return images, torch.tensor([label for _, label in kept])


def plain_hues(images):
    red, green, blue = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)).unbind(1)
    return red - blue, 2 * green - red - blue


def test_the_tokenizer_is_trained_on_all_its_errors(folder, tmp_path, monkeypatch):
    calls = watched(monkeypatch, tokenizer, "training_pass")
    run("tokenizer", "--data", folder, "--out", tmp_path, "--steps", 5, "--batch", 8)
    stops = []
    for (made, (_, images, scales, own), _), line in zip(calls, lines_of(tmp_path, name="loss")):
        stops += own.tolist()
        rest = made["images"] - images
        expected = rest.square().mean() + 0.5 * rest.abs().mean() + made["loss"]
        for dim in (2, 3):
            expected = expected + 0.25 * rest.diff(dim=dim).abs().mean()
        lost = sum(hue.square().mean() for hue in plain_hues(rest))
        variance = sum(hue.var(correction=0) for hue in plain_hues(held_out(folder)[0]))
        expected = expected + 0.28 * lost / (variance + 0.02)
        coarse = F.mse_loss(made["coarse"], images[: len(own)])
        assert line["coarse"] == pytest.approx(coarse.item(), rel=1e-4)
        assert line["loss"] == pytest.approx((expected + 0.5 * coarse).item(), rel=1e-4)
    assert len(stops) == 10 and set(stops) == {0, 1}  # a quarter, no last


def test_dead_codes_alone_are_replaced_and_their_moments_forgotten(folder, tmp_path, monkeypatch):
    revive, seen = tokenizer.revive_codes, []

    def revived(codebook, counts, *rest):
        new, dead = revive(codebook, counts, *rest)
        seen.append((counts.clone(), new, dead))
        return new, dead

    def noted(optimizer, leaf, rows):
        forgotten.append((leaf.detach().clone(), rows))
        forget(optimizer, leaf, rows)

    forget, forgotten = train.Optimizer.forget, []
    monkeypatch.setattr(tokenizer, "revive_codes", revived)
    monkeypatch.setattr(train.Optimizer, "forget", noted)
    flags = ["tokenizer", "--data", folder, "--batch", 2, "--codes", 128]
    run(*flags, "--out", tmp_path)
    # at steps 1, 4 and 8, not after 80 %
    assert [int(counts.sum()) for counts, *_ in seen] == [2 * 81 * n for n in (1, 3, 4)]
    for (counts, new, dead), (codebook, rows) in zip(seen, forgotten, strict=True):
        assert torch.equal(dead, counts == 0) and 0 < dead.sum() < 128
        assert torch.equal(codebook, new) and torch.equal(rows, dead)


def test_held_out_numbers_are_those_of_the_weights_that_are_saved(base, folder):
    images, labels = held_out(folder)
    codec, params = weights(base, "tokenizer.pt"), weights(base, "hmar.pt")
    tokens = tokenizer.encode(codec, images, SCALES)
    errors = (tokenizer.decode(codec, tokens, SCALES) - images).double().square()
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    logits = hmar.next_scale_logits(params, labels, inputs)
    surprise = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    mask = torch.rand(len(images), 80, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    logits = hmar.masked_logits(params, labels, inputs, own_inputs, mask)
    masked = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")[:, 1:][mask]
    hits = (logits.argmax(-1) == tokens)[:, 1:][mask]

    best = {}
    for stage, loss in zip(train.STAGES, (errors.mean(), surprise.mean(), masked.mean())):
        lines = lines_of(base, stage, "held_out_loss")
        best[stage] = min(lines, key=lambda line: line["held_out_loss"])
        assert best[stage]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert best["masked"]["held_out_accuracy"] == pytest.approx(hits.float().mean().item())
    assert best["tokenizer"]["held_out_codes_used"] == len(tokens.unique())
    by_scale = zip(tokens.split(tokenizer.lengths(SCALES), 1), surprise.split([1, 16, 64], 1))
    for k, (own, losses) in enumerate(by_scale):
        share = torch.bincount(own.flatten()).double() / own.numel()
        entropy = -sum(p * math.log(p) for p in share.tolist() if p)
        found = best["tokenizer"]["held_out_perplexity"][k]
        assert found == pytest.approx(math.exp(entropy), rel=1e-4)
        found = best["next-scale"]["held_out_scale_losses"][k]
        assert found == pytest.approx(losses.mean().item(), rel=1e-4)


def test_labels_masks_and_losses_of_the_stages():
    codec = tokenizer.init(**CODEC_SIZES)
    for name in ("next_scale", "masked"):
        params, loss, batches = asked_of_fit(name, SCALES, torch.float32, batch=50, steps=10)
        params = pytree.tree_map(torch.Tensor.float, scrambled(params))
        labels, tokens, gates, *masked = batches[0].values()
        given = [params, labels, tokens, tokenizer.next_scale_inputs(codec, tokens, SCALES)]
        if name == "masked":
            given += [tokenizer.masked_inputs(codec, tokens, SCALES, masked[0]), masked[0]]
            expected = hmar.masked_losses(*given, gates=gates).mean()
        else:
            by_scale = hmar.next_scale_losses(*given, gates=gates).split([1, 16, 64], 1)
            expected = sum(losses.mean() for losses in by_scale) / 3
        torch.testing.assert_close(loss(params, **batches[0])[0], expected)
        assert (gates == 0).any()

    ratios = torch.cat([batch["mask"].float().mean(1) for batch in batches])
    assert len(ratios) == 500 and np.histogram(ratios, 4, (0, 1))[0].min() > 90
    labels = torch.cat([batch["labels"] for batch in batches])
    assert 25 < (labels == 3).sum() < 85  # a tenth


# The token cache

CODEC = small_codec(attention=False, seed=7)


def cache(out, data, made=None, **changes):
    """Of a run folder in which nothing was made before but `made`."""
    flags = dict(
        out=str(out), scales=SCALES, size=16, flip=False, seed=0, workers=2, dtype=torch.float32
    )
    args = argparse.Namespace(**flags | dict(device=torch.device("cpu")) | changes)
    if made is not None:
        train.write_run(args, dict(flags={}, made=made))
    return np.array(train.token_cache(args, data, CODEC))


def test_a_small_folder_is_encoded_in_several_crops(folder, tmp_path, monkeypatch):
    fresh = partial(cache, tmp_path, made={})
    images = train.Images(train.list_images(folder)[0][:9], 16)
    tokens = fresh(images)
    assert tokens.shape == (9, 16, 81) and tokens.dtype == np.uint16
    for view in range(3):
        keys = [(i, (0, view, i) if view else None, 0) for i in range(9)]
        pixels = torch.stack([images[key][0] for key in keys]) / 127.5 - 1
        assert np.array_equal(tokens[:, view], tokenizer.encode(CODEC, pixels, SCALES))
    for most, flip, views in ((30, False, 3), (5, False, 1), (5, True, 2)):
        monkeypatch.setattr(train, "VIEWS_IN_ALL", most)
        images.flip = flip
        tokens = fresh(images, flip=flip)
        assert tokens.shape == (9, views, 81)
    pixels = torch.stack([images[i, (0, 1, i), 1][0] for i in range(9)]) / 127.5 - 1  # mirrored
    assert np.array_equal(tokens[:, 1], tokenizer.encode(CODEC, pixels, SCALES))
    images.flip = False
    assert not torch.equal(images[0, (0, 1, 0), 1][0] / 127.5 - 1, pixels[0])
    assert fresh(train.Images(range(4), 16)).shape == (4, 1, 81)  # drawings


def test_a_cache_that_is_not_what_the_run_made_is_made_anew(tmp_path, monkeypatch):
    calls = watched(monkeypatch, train, "encoded")
    images = train.Images(train.list_images(drawings(tmp_path / "images", 6))[0], 16)
    out = tmp_path / os.fsdecode(b"\xff")
    out.mkdir()
    path = out / "tokens.npy"

    def made(anew):
        calls.clear()
        tokens = cache(out, images)
        assert bool(calls) == anew
        return tokens

    first = cache(out, images, made={})
    assert np.array_equal(made(False), first)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"foreign", whole[:-1] + b"\1"):
        path.write_bytes(content)
        assert np.array_equal(made(True), first)
    path.unlink()
    assert np.array_equal(made(True), first)


def test_a_cache_killed_while_it_was_made_anew_is_not_taken_for_whole(tmp_path, monkeypatch):
    images = train.Images(range(20), 16)
    expected = cache(tmp_path, images, made={})
    for writer in ("write_atomically", "record"):
        cache(tmp_path, train.Images(range(30), 16), made={})
        (tmp_path / "args.json").write_text('{"flags": {}, "made": {}}')  # as after --restart
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, writer, mock.Mock(side_effect=Killed))
            cache(tmp_path, images)
        assert np.array_equal(cache(tmp_path, images), expected)


def test_what_links_point_to_is_not_written_over(folder, tmp_path, monkeypatch):
    """Of a run folder that somebody else made: all its files."""
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    flags = ["--data", folder, "--out", out, "--steps", 1]
    run(*flags)
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    for name in [*names, "hmar.pt.0.tmp", "tokens.npy.part.0.tmp", "tokens.npy.part.0.tmp.0.tmp"]:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    refused = status_of(*flags)
    assert refused == 2 and victim.read_text() == "mine"  # args.json is none
    (out / "args.json").unlink()
    run(*flags, "--restart")
    assert victim.read_text() == "mine" and "masked" in weights(out, "hmar.pt")
    shutil.rmtree(out / "samples")
    (out / "samples").symlink_to(tmp_path)
    assert status_of(*flags, "--restart") == 2 and not list(tmp_path.glob("*.png"))


# Starting from given weights


def test_a_transformer_starts_from_other_classes_scales_and_branches(tmp_path, capsys):
    sizes = dict(width=32, classes=5, codes=16, code_dim=8)
    params = hmar.add_masked_branch(hmar.init(depth=3, scales=SCALES, seed=5, **sizes), 2)

    def started(*flags, classes="abcde", params=params):
        torch.save(params, tmp_path / "init.pt")
        own = ["next-scale", "--init", tmp_path / "init.pt", "--out", tmp_path / "run", *flags]
        args = train.resolved(train.parser().parse_args([*TINY, *map(str, own)]))
        args.device, args.class_names = torch.device("cpu"), classes
        return train.initial_transformer(args, CODEC), capsys.readouterr().out

    same, said = started()
    assert said == "" and "masked" not in same and same["next_scale"]["blocks"] == []
    assert difference(same["trunk"], params["trunk"] + params["next_scale"]["blocks"]) == 0
    fewer, said = started(classes="xy")
    assert said == "--init: a new class embedding for 2 classes\n"
    assert fewer["classes"].shape == (3, 32) and difference(fewer["trunk"], same["trunk"]) == 0
    other, said = started("--size", 8, "--scales", 1, 2, 3, 4)
    assert said == "--init: positions resampled for the scales ((1, 1), (2, 2), (3, 3), (4, 4))\n"
    assert hmar.scales(other) == ((1, 1), (2, 2), (3, 3), (4, 4))
    with pytest.raises(ValueError, match="expected the tokenizer's"):
        started(params=hmar.init(depth=1, scales=SCALES, **sizes | dict(codes=8)))


def test_a_given_tokenizer_is_taken_or_trained_on(folder, tmp_path, monkeypatch, refused):
    given = tmp_path / "given.pt"
    torch.save(CODEC, given)
    flags = ["--data", folder, "--out", tmp_path / "run", "--steps", 1]
    checkpointed = watched(monkeypatch, hmar, "checkpoint")
    run(*flags, "--tokenizer", given, "--checkpointing")
    assert len(checkpointed) == 2  # a block and a step a stage
    assert difference(weights(tmp_path / "run", "tokenizer.pt"), CODEC) == 0
    assert {line["stage"] for line in lines_of(tmp_path / "run")} == {"next-scale", "masked"}
    run(*flags)  # --tokenizer need not be repeated
    assert sample.main([str(tmp_path / "run"), "--count", "1", "--out", str(tmp_path / "a")]) == 0

    calls = watched(monkeypatch, hmar, "branch_features")
    run(*flags, "--causal", "--tokenizer", given, "--out", tmp_path / "var")
    for _, _, options in calls:  # to train, to judge, to draw
        assert options.get("is_causal") or options.get("cache"), options
    assert "masked" not in weights(tmp_path / "var", "hmar.pt")
    assert json.loads((tmp_path / "var" / "args.json").read_text())["causal"] is True

    own = ["tokenizer", *flags, "--out", tmp_path / "other", "--lr", 1e-6]
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", mock.Mock(side_effect=KeyboardInterrupt))
        assert status_of(*own, "--init", given) == 130
    assert "init tokenizer: " in refused(*own)
    run(*own, "--init", given)
    trained = weights(tmp_path / "other", "tokenizer.pt")
    assert 0 < difference(trained["encoder"], CODEC["encoder"]) < 1e-4


# Run folders that are not what they were


def test_an_own_folder_is_gone_on_with_by_its_own_flags_alone(base, folder, tmp_path, refused):
    out = shutil.copytree(base, tmp_path / "run")
    flags = ["--data", folder, "--out", out]
    before = contents(out)
    line = refused(*flags, "--seed", 3, "--flip", "--depth", 2)
    assert line == (
        f"train.py: {out}: not begun with these flags or images: flip False -> True, seed 0 -> 3, "
        "depth 1 -> 2; --out NAME begins another run, --restart this one anew"
    )
    torch.save(CODEC, tmp_path / "other.pt")
    assert "tokenizer None -> " in refused(*flags, "--tokenizer", tmp_path / "other.pt")
    run(*flags, "--accumulate", 2, "--workers", 1, "--save-every", 3, "--checkpointing")
    run("masked", "--data", os.path.relpath(folder), "--out", out)
    assert contents(out) == before


def test_changed_images_are_refused(tmp_path, refused):
    images = drawings(tmp_path / "images", 6)
    (images / "disc/z.png").symlink_to("nowhere")
    flags = ["tokenizer", "--data", images, "--out", tmp_path / "run", "--steps", 1]
    run(*flags)
    for change in (partial(os.utime, times=(0, 0)), os.remove):
        change(images / "disc" / "000.png")
        assert "not begun with these flags or images: images [" in refused(*flags)


def test_too_few_images_are_told(tmp_path, capsys, refused, monkeypatch):
    flags = ["tokenizer", "--data", drawings(tmp_path / "few", 2, classes=2), "--steps", 1]
    run(*flags, "--out", tmp_path / "run")
    assert re.search("class (disc|ring): its images are all held out", capsys.readouterr().out)
    monkeypatch.setattr(train, "start_processes", lambda name: torch.device("cpu"))
    monkeypatch.setattr(train, "world", lambda: 2)
    assert "--data: got 1 images, fewer than processes" in refused(*flags)


def test_files_without_a_record_are_not_trained_over(folder, tmp_path, refused):
    flags = ["tokenizer", "--data", folder, "--out", tmp_path, "--steps", 1]
    for name in ("tokenizer.pt", "hmar.pt", "tokenizer.resume.pt", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
        assert f"flags or images: {name} without args.json; --out NAME" in refused(*flags)
        assert sorted(os.listdir(tmp_path)) == sorted(["lock", name])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / name).write_text("mine")
    run(*flags, "--restart")


def test_a_folder_takes_one_process_at_a_time(folder, tmp_path, refused):
    with sample.locked(tmp_path / "lock"):
        line = refused("--data", folder, "--out", tmp_path)
    assert line.startswith(f"train.py: {tmp_path}: another process works there")
    assert os.listdir(tmp_path) == ["lock"]


def test_what_a_kill_left_half_written_goes_and_the_users_own_files_stay(start, folder, tmp_path):
    own = ["notes.2024.tmp", "hmar.pt.old.tmp", "samples/tokenizer.pt.7.tmp", "tokenizer.pt.tmp"]
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    flags = ["tokenizer", "--data", folder, "--out", tmp_path, "--save-every", 1, "--steps", 3]
    start(*flags, hook=partial(die_at_fsync, 4)).ended(-signal.SIGKILL)
    assert len(list(tmp_path.glob("tokenizer.*.tmp"))) == 2
    start(*flags).ended()
    assert sorted(map(str, tmp_path.rglob("*.tmp"))) == sorted(str(tmp_path / x) for x in own)


def die_at_fsync(number):
    """Has a process kill itself at its fsync of a number."""
    fsync, calls = os.fsync, []

    def dying(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying


def test_restart_begins_anew_and_is_not_needed_after_a_kill(base, start, folder, tmp_path):
    out = shutil.copytree(base, tmp_path / "run")
    flags = ["--data", folder, "--out", out, "--seed", 1]
    hook = partial(at, "next-scale", 6, partial(ask, signal.SIGKILL))
    start(*flags, "--restart", hook=hook).ended(-signal.SIGKILL)
    assert not (out / "hmar.pt").exists()
    assert "next-scale: continues at step 4" in start(*flags).ended().said("out")
    assert "masked" in weights(out, "hmar.pt")


def test_a_perfect_reconstruction_is_a_finite_number(tmp_path, monkeypatch):
    args = argparse.Namespace(scales=((1, 1), (4, 4)), size=8, dtype=torch.float32, out=tmp_path)
    monkeypatch.setattr(tokenizer, "decode_features", lambda *_: torch.ones(2, 3, 8, 8))
    numbers = train.judge_tokenizer(args, torch.ones(2, 3, 8, 8), small_codec())
    assert numbers["loss"] == 0 and all(map(math.isfinite, numbers["psnr"]))


@pytest.mark.parametrize("flags", ["masked", "next-scale", "--tokenizer {}/tokenizer.pt"])
def test_restart_removes_nothing_that_it_needs(base, folder, refused, flags):
    before = contents(base)
    flags = flags.format(base).split()
    line = refused(*flags, "--data", folder, "--out", base, "--restart")
    assert "restart: begins with" in line or "which lies inside --out" in line
    assert contents(base) == before


def test_a_kill_between_weights_and_their_record_loses_nothing(base, folder, tmp_path):
    """hmar.pt has its masked branch, of which args.json does not know yet."""
    out = continued(base, tmp_path / "run", "tokenizer", "next-scale")
    run("--data", folder, "--out", out)
    assert difference(weights(out, "hmar.pt"), weights(base, "hmar.pt")) == 0


def test_weights_that_the_run_did_not_make_are_refused(base, folder, tmp_path, refused):
    flags = ["masked", "--data", folder, "--out", tmp_path / "run"]
    out = continued(base, tmp_path / "run", "tokenizer", "next-scale")
    for name, made_by in (("hmar.pt", "next-scale"), ("tokenizer.pt", "tokenizer")):
        tree = weights(out, name)
        pytree.tree_leaves(tree)[0][0] += 1e-3
        torch.save(tree, out / name)
        line = refused(*flags)
        assert line == f"train.py: {out}/{name}: not what this run made; --restart begins it anew"
        (out / name).unlink()
        assert f"{name} is missing; python train.py {made_by} makes it" in refused(*flags)
        shutil.copy(base / name, out)


def test_a_damaged_checkpoint_or_metrics_are_told_or_passed_over(base, folder, tmp_path, refused):
    out = continued(base, tmp_path / "run")
    flags = ["tokenizer", "--data", folder, "--out", out]
    path = out / "tokenizer.resume.pt"
    for content in (torch.zeros(3), {}, dict(progress=(1, 1, 1.0), state=[])):
        torch.save(content, path)
        assert refused(*flags) == f"train.py: {path}: expected this stage's checkpoint"
    path.unlink()
    junk = b'5\n[]\n{"step": 1}\n\xff'
    (out / "metrics.jsonl").write_bytes(junk)
    run(*flags)
    own, _, _ = (base / "metrics.jsonl").read_bytes().partition(b'{"stage": "next-scale"')
    assert (out / "metrics.jsonl").read_bytes() == junk + own


# Bad input


BAD = [
    ("--step-s=3", "unrecognized arguments: --step-s=3"),
    ("--data {here}/broken --workers 2", ".png cannot be read, nor one that could take its place"),
    ("--data {here} --out {here}/run", "which lies inside --out {here}/run or around it"),
    ("--data {here}/samples --out {here}", "which lies inside --out"),
    ("--tokenizer {here}/run/link --out {here}/run", "which lies inside --out"),
    ("--size 15", "--size: got 15, expected a multiple of 2"),
    ("--scales 1 2 16", "expected two or more, the last 8, 16 pixels / 2"),
    ("--channels 48", "expected 1 or more, channels a multiple of 32"),
    ("--width 100", "--width: got 100, heads of 100 dimensions"),
    ("--device meta", "--device: got 'meta'"),
    ("--init {here}/file.txt", "--init: needs the stage that it starts"),
    ("masked --causal", "masked: there is no such stage with"),
    ("--out {here}/file.txt", "file.txt"),
]


@pytest.fixture(scope="module")
def hostile(base, tmp_path_factory):
    return shutil.copytree(base, tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad")
    for name in ("broken/a.png", "broken/b.png", "samples/a.png", "samples/b.png", "file.txt"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("text")
    (here / "run").mkdir()
    torch.save(CODEC, here / "codec.pt")
    (here / "run/link").symlink_to(here / "codec.pt")
    return here


@pytest.mark.parametrize("flags, said", BAD)
def test_bad_input_ends_with_one_line_and_status_2(folder, here, tmp_path, refused, flags, said):
    flags = flags.replace("{here}", str(here)).split()
    line = refused("--data", folder, "--out", tmp_path / "run", "--steps", 1, *flags)
    assert said.replace("{here}", str(here)) in line and not list(tmp_path.rglob("*.pt"))


FLAGS = {action.dest: action.option_strings[-1:] for action in train.parser()._actions[1:]}
NAMES = sorted(FLAGS[name][0] for name in FLAGS if name not in ("stage", "init", "tokenizer"))
numbers = st.integers(-(10**30), 10**30) | st.integers(-2, 70) | st.floats()
texts = st.text(max_size=20) | st.sampled_from(["", "1x", "x1", "2x3", "\0", "\udcff", "9" * 400])
several = st.lists(st.integers(0, 20).map(str) | (numbers | texts).map(str), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@example([("--batch", ["999999937"]), ("--size", ["256"])])
@example([("--depth", ["1000000000"])])
@given(st.lists(st.tuples(st.sampled_from(NAMES), several), max_size=4))
def test_flags_of_any_value_are_taken_or_refused(pairs):
    flags = [word for name, words in pairs for word in (name, *words)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = train.resolved(train.parser().parse_args(flags))
        assert args.batch % args.accumulate == 0
    except ValueError as error:
        assert str(error)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["flags", "class_names", "images", "made", "causal"]), JSON)
def test_a_record_of_any_content_is_taken_or_refused(base, folder, hostile, entry, value):
    record = json.loads((base / "args.json").read_text()) | {entry: value}
    (hostile / "args.json").write_text(json.dumps(record))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = status_of("masked", "--data", folder, "--out", hostile)
    assert status in (0, 2) and said.getvalue().count("\n") == (status == 2), said.getvalue()
