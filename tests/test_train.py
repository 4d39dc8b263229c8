"""The trainer: nothing is lost, several processes are one, what a step computes, bad input is told."""

import argparse
import contextlib
import copy
import errno
import gc
import io
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
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hmar
import sample
import tokenizer
import train

SCALES = ((1, 1), (4, 4), (8, 8))
STEPS = 12
TINY = (
    "--size 16 --scales 1 4 8 --dtype fp32 --device cpu --channels 32 --multipliers 1 1 --codes 16"
    " --code-dim 8 --depth 1 --width 32 --masked-blocks 1 --batch 4 --warmup 2 --save-every 4"
).split()
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_train", "torch._dynamo"])


@pytest.fixture(autouse=True, scope="module")
def often():
    """Reports at each step, revival at every fifth, one thread; here and in processes started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "REVIVE_EVERY", 5)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Commands, in a process of their own or in this one


def command(flags, hook, environment, log):
    """`python train.py FLAGS`, in a process forked from one that has imported torch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # workers beyond this machine's cores
    train.LOG_EVERY, train.REVIVE_EVERY = 1, 5
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
        """Itself, when it has ended as expected; minus the number of a signal that ended it."""
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
    """A run folder of all three stages that nobody interrupted. Only to be read."""
    out = tmp_path_factory.mktemp("runs") / "base"
    start("--data", folder, "--out", out).ended()
    return out


def continued(base, out, *stages, **flags):
    """A run folder in which the stages of `base` that are named are finished, begun with flags."""
    shutil.copytree(base, out)
    record = json.loads((out / "args.json").read_text())
    record["made"] = {stage: record["made"][stage] for stage in stages}
    record["flags"] |= flags
    (out / "args.json").write_text(json.dumps(record))
    (out / "metrics.jsonl").unlink()
    return out


def lines_of(out, stage=None, name="stage"):
    """The lines of metrics.jsonl, of a stage, that have a name."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in (None, line["stage"]) and name in line]


def weights(out, name):
    return torch.load(Path(out) / name, weights_only=True)


def difference(ours, theirs):
    """The largest absolute difference of two trees' tensors; the trees have the same structure."""
    (ours, structure), (theirs, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert structure == other
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs))


def contents(out):
    """{path: bytes} of all files in a folder."""
    paths = [path for path in Path(out).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def assert_same_run(ours, theirs):
    """Bit for bit: weights, tokens, record and metrics."""
    for name in ("tokenizer.pt", "hmar.pt"):
        assert difference(weights(ours, name), weights(theirs, name)) == 0, name
    for name in ("metrics.jsonl", "args.json", "tokens-train.npy", "tokens-held-out.npy"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_run_learns_and_leaves_a_folder(base, folder):
    for stage in train.STAGES:
        losses = [line["loss"] for line in lines_of(base, stage, "loss")]
        held_out = [line["held_out_loss"] for line in lines_of(base, stage, "held_out_loss")]
        assert len(losses) == len(held_out) == STEPS and np.mean(losses[-3:]) < np.mean(losses[:3])
        assert held_out[-1] < held_out[0]
    line = lines_of(base, "next-scale", "loss")[0]
    assert line["step"] == 1 and line["rate"] > 0 and line["gradient"] > 0
    assert len(line["scale_losses"]) == len(SCALES)

    record = json.loads((base / "args.json").read_text())
    assert record["class_names"] == sorted(train.SHAPES[:3]) and not record["causal"]
    assert list(record["made"]) == list(train.STAGES)
    expected = dict(data=str(folder), size=16, steps=dict.fromkeys(train.STAGES, STEPS))
    expected |= dict(dtype="float32", flip=False, scales=[list(pair) for pair in SCALES], seed=0)
    assert expected.items() <= record["flags"].items()
    assert not set(train.UNRECORDED) & set(record["flags"])

    codec, params = weights(base, "tokenizer.pt"), weights(base, "hmar.pt")
    for leaf in pytree.tree_leaves((codec, params)):
        assert type(leaf) is torch.Tensor and not leaf.requires_grad and leaf.isfinite().all()
    assert sample.generate(params, codec, torch.tensor([0, 2]))[0].shape == (2, 3, 16, 16)
    assert hmar.scales(params) == SCALES and "masked" in params
    for name, rows in (("reconstructions", 1 + len(SCALES)), ("next-scale", 3), ("masked", 3)):
        with Image.open(base / "samples" / f"{name}.png") as sheet:
            assert sheet.format == "PNG" and sheet.height == rows * 66
    names = {"args.json", "hmar.pt", "tokenizer.pt", "metrics.jsonl", "samples", "lock"}
    names |= {f"tokens-{part}.npy{end}" for part in ("train", "held-out") for end in ("", ".json")}
    assert {path.name for path in base.iterdir()} == names


# Kills and signals


def progress(out):
    """1000 a stage, then steps, by the last whole line of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    for line in reversed(lines):
        if line.endswith("\n"):
            return (
                list(train.STAGES).index(json.loads(line)["stage"]) * 1000
                + json.loads(line)["step"]
            )
    return 0


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
    assert start(*flags).ended().said("err") == "" and killed >= 2  # a busy machine may be late
    assert_same_run(tmp_path / "run", base)


def ask_at(stage, step, number, rank="0", group=False):
    """Has a process send itself, or its group, a signal when it has written a step's metrics."""
    write = train.log
    if group:
        os.setpgrp()

    def log(args, now, **numbers):
        write(args, now, **numbers)
        is_now = (args.stage, now) == (stage, step) and "rate" in numbers
        if is_now and os.environ.get("RANK", "0") == rank:
            os.killpg(os.getpgrp(), number) if group else os.kill(os.getpid(), number)

    train.log = log


def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on(base, start, folder, tmp_path):
    flags = ["--data", folder, "--out", tmp_path / "run"]
    for stage, step, number in (
        ("tokenizer", 5, signal.SIGINT),
        ("next-scale", 10, signal.SIGTERM),
        ("masked", 7, signal.SIGINT),
    ):
        job = start(*flags, hook=partial(ask_at, stage, step, number)).ended(130)
        assert job.said("err") == f"train.py: {stage}: stopped and saved at step {step}\n"
        assert weights(tmp_path / "run", f"{stage}.resume.pt")["progress"][0] == step
    said = start(*flags).ended().said("out")
    assert f"masked: continues at step 7 of {STEPS}" in said
    assert "tokenizer: finished before" in said
    assert_same_run(tmp_path / "run", base)


def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_workers(start, folder, tmp_path):
    """As Ctrl-C on a terminal and torchrun send it."""
    flags = ["tokenizer", "--data", folder, "--out", tmp_path / "run", "--workers", 1]
    hook = partial(ask_at, "tokenizer", 3, signal.SIGTERM, group=True)
    said = start(*flags, hook=hook).ended(130).said("err")
    assert said == "train.py: tokenizer: stopped and saved at step 3\n"


def raises(error):
    def raises(*arguments, **options):
        raise error

    return raises


def test_an_interruption_before_the_first_step_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "data_sets", raises(KeyboardInterrupt))
    assert status_of("--out", tmp_path / "run") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_two_processes_stop_together_and_go_on_bit_for_bit(start, folder, tmp_path):
    """The second is told at step 7, both agree at step 10, between reports and revivals."""
    flags = ["tokenizer", "--data", folder, "--accumulate", 2, "--out"]
    whole = start_two(start, *flags, tmp_path / "whole")
    hook = partial(ask_at, "tokenizer", 7, signal.SIGTERM, rank="1")
    for job in start_two(start, *flags, tmp_path / "cut", hook=hook):
        job.ended(130)
    assert weights(tmp_path / "cut", "tokenizer.resume.pt")["progress"][0] == 10
    jobs = start_two(start, *flags, tmp_path / "cut")
    assert jobs[1].ended().said("out") == ""  # the first speaks for both
    for job in (*jobs, *whole):
        job.ended()
    name = "tokenizer.pt"
    assert difference(weights(tmp_path / "cut", name), weights(tmp_path / "whole", name)) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


# The loop, on a stage that is a linear regression


class Killed(BaseException):
    pass


def toy_args(out, **changes):
    Path(out).mkdir(exist_ok=True)
    flags = dict(out=str(out), stage="tokenizer", steps=12, lr=0.1, warmup=2, ema=0.9, accumulate=1)
    flags |= dict(judge_every=1, save_every=2, compile=False, device=torch.device("cpu"))
    return argparse.Namespace(**flags | changes)


def toy_batches(args, start):
    for step in range(start, args.steps):
        x = torch.randn(4, 3, generator=train.generator_of("toy", step))
        yield [dict(x=x, y=x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))]


def toy_loss(params, x, y):
    value = (hmar.linear(x, **params) - y).square().mean()
    return value, dict(loss=value)


def toy_fit(args, evaluate=lambda tree: dict(loss=1.0), after_step=None):
    params = train.trainable(dict(weight=torch.zeros(2, 3), bias=torch.zeros(2)))
    batches = partial(toy_batches, args)
    return train.fit(args, params, toy_loss, batches, evaluate, after_step)


def stop_at(step, stop, now, reports, optimizer):
    """As after_step: calls stop at a step."""
    if now == step:
        stop()


def past_a_size(trees=()):
    """An evaluate: a loss that falls until the weights have a size, then rises."""

    def evaluate(tree):
        trees.append(copy.deepcopy(tree))
        return dict(loss=abs(float(tree["weight"].norm()) - 0.1))

    trees = []
    return trees, evaluate


def test_the_loop_is_muon_and_adamw_with_clipping_a_schedule_and_averages(tmp_path):
    """Against a loop that is written out."""
    args = toy_args(tmp_path, steps=9, warmup=3)
    falling = iter(range(99, 0, -1))
    ours = toy_fit(args, lambda tree: dict(loss=float(next(falling))))
    theirs = dict(weight=torch.zeros(2, 3), bias=torch.zeros(2))
    for leaf in theirs.values():
        leaf.requires_grad_()
    muon = torch.optim.Muon([theirs["weight"]], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs["bias"]], betas=(0.9, 0.95), weight_decay=0)
    average = {name: leaf.detach().clone() for name, leaf in theirs.items()}

    for step, (batch,) in enumerate(toy_batches(args, 0), 1):
        toy_loss(theirs, **batch)[0].backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in theirs.values()))
        rate = 0.1 * min(1, step / 3) * 0.5 * (1 + math.cos(math.pi * (step - 1) / 9))
        for leaf in theirs.values():
            leaf.grad /= max(1, norm)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        for name, leaf in theirs.items():
            average[name].lerp_(leaf.detach(), 1 - min(0.9, step / (step + 10)))
        line = lines_of(tmp_path, name="rate")[step - 1]
        assert line["rate"] == pytest.approx(rate)
        assert line["gradient"] == pytest.approx(norm, rel=1e-4)
    assert difference(ours, average) < 1e-5


def test_the_rate_warms_up_and_ends_near_zero():
    args = toy_args("/tmp", steps=100, warmup=10)
    rates = [train.learning_rate(step, args) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.01) and np.argmax(rates) in (9, 10)
    assert all(np.diff(rates[10:]) < 0) and 0 < rates[-1] < 1e-4
    assert rates[50] == pytest.approx(0.05)


def test_the_best_weights_are_kept_and_the_run_ends_early_across_a_kill_too(tmp_path, capsys):
    trees, evaluate = past_a_size()
    whole = toy_fit(toy_args(tmp_path / "whole"), evaluate)
    losses = [line["held_out_loss"] for line in lines_of(tmp_path / "whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best < 7 and len(losses) == best + 1 + 4  # a third of 12 steps of patience
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])
    said = f"tokenizer: stopped early at step {best + 5}; best at {best + 1}\n"
    assert said in capsys.readouterr().out

    for step in (best, best + 3):  # killed before the best step, and after it
        with pytest.raises(Killed):
            toy_fit(toy_args(tmp_path / "cut"), evaluate, partial(stop_at, step, raises(Killed)))
    again = toy_fit(toy_args(tmp_path / "cut"), evaluate)
    assert said in capsys.readouterr().out and difference(again, whole) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_a_kill_during_a_judgement_loses_no_line(tmp_path):
    _, evaluate = past_a_size()
    expected = toy_fit(toy_args(tmp_path / "whole", judge_every=4), evaluate)
    with pytest.raises(Killed):
        toy_fit(toy_args(tmp_path / "cut", judge_every=4), raises(Killed))
    assert difference(toy_fit(toy_args(tmp_path / "cut", judge_every=4), evaluate), expected) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_a_second_signal_ends_the_run_at_once_and_one_at_the_end_is_heeded(tmp_path):
    def ask():
        os.kill(os.getpid(), signal.SIGINT)

    def twice():
        ask()
        ask()
        pytest.fail("still running")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_args(tmp_path / "a"), after_step=partial(stop_at, 3, twice))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_args(tmp_path / "b", steps=2), after_step=partial(stop_at, 2, ask))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 50)
    batches = toy_batches

    def broken(args, start):
        for step, parts in enumerate(batches(args, start), start + 1):
            yield [
                dict(x=part["x"] * (math.inf if step >= 5 else 1), y=part["y"]) for part in parts
            ]

    monkeypatch.setitem(globals(), "toy_batches", broken)
    for _ in range(2):  # the same command says so again
        with pytest.raises(ValueError, match="tokenizer: loss or gradient is not finite at step 6"):
            toy_fit(toy_args(tmp_path, judge_every=4))
    saved = weights(tmp_path, "tokenizer.resume.pt")
    assert saved["progress"][0] == 4 and all(leaf.isfinite().all() for leaf in saved["state"])


def test_a_rate_that_is_too_high_ends_in_one_line(folder, tmp_path, refused):
    line = refused("tokenizer", "--data", folder, "--out", tmp_path, "--lr", 1000, "--warmup", 0)
    assert re.search(r"tokenizer: loss or gradient is not finite at step \d+; a lower --lr", line)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and not (tmp_path / "tokenizer.pt").exists()


def test_muon_takes_matrices_through_views_and_adamw_the_rest():
    shapes = dict(weight=(8, 4, 3, 3), flat=(6, 5), bias=(8,), head=(7, 5), codebook=(16, 4))
    generator = torch.Generator().manual_seed(0)
    tree = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tree["weight"] = tree["weight"].contiguous(memory_format=torch.channels_last)
    params = train.trainable(tree)
    optimizer = train.Optimizer(params)
    assert [id(leaf) for leaf, _ in optimizer.pairs] == [id(params[x]) for x in ("weight", "flat")]

    plain = {name: torch.nn.Parameter(tree[name].flatten(1).clone()) for name in ("weight", "flat")}
    rest = {name: torch.nn.Parameter(tree[name].clone()) for name in shapes if name not in plain}
    options = dict(weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    muon = torch.optim.Muon(plain.values(), lr=0.1, **options)
    adamw = torch.optim.AdamW(rest.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    state = None
    for step in range(4):
        if step == 2:  # as after a kill
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = train.Optimizer(params)
            optimizer.load_state_dict(state)
        for name, leaf in params.items():
            leaf.grad = torch.randn(leaf.shape, generator=generator)
            if name in plain:
                plain[name].grad = leaf.grad.flatten(1).clone()
            else:
                rest[name].grad = leaf.grad.clone()
        optimizer.step(0.1)
        muon.step()
        adamw.step()
        for name, leaf in (plain | rest).items():
            assert difference(params[name].flatten(), leaf.flatten()) < 1e-6, name
        assert all(leaf.grad is None for leaf in params.values())

    optimizer.forget(params["codebook"], torch.arange(16) < 3)
    moment = optimizer.adamw.state[params["codebook"]]["exp_avg"].abs().sum(1)
    assert (moment[:3] == 0).all() and (moment[3:] > 0).all()


def test_muon_is_for_what_maps_features_to_features():
    codec = tokenizer.init(codes=32, code_dim=8, channels=32, multipliers=(1, 2))
    params = hmar.init(depth=2, width=32, classes=3, codes=32, code_dim=8, scales=SCALES)
    tree = train.trainable(dict(codec=codec, hmar=hmar.add_masked_branch(params, 1)))
    chosen = {id(leaf) for leaf, _ in train.Optimizer(tree).pairs}
    kinds = "conv1|conv2|shortcut|upsample|downsample|qkv|project|expand|contract"
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        name = pytree.keystr(path)
        expected = leaf.ndim > 1 and re.search(rf"'({kinds})'\](\['weight'\])?$", name) is not None
        assert (id(leaf) in chosen) == expected, name


def test_every_item_comes_once_an_epoch_in_a_new_order():
    args, count = argparse.Namespace(seed=3, batch=4), 10
    drawn = [item for step in range(20) for item in train.step_items(args, step, count)]
    assert [draw for _, draw in drawn] == list(range(80))
    epochs = [[index for index, _ in drawn[first : first + count]] for first in range(0, 80, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8
    args.seed = 4
    assert [index for index, _ in train.step_items(args, 0, count)] != epochs[0][:4]


# Several processes and parts of a batch are one


@pytest.mark.parametrize("stage", train.STAGES)
def test_two_processes_or_two_parts_are_one_with_the_whole(base, start, folder, tmp_path, stage):
    """Two channels share a norm, else gradients that should be 0 make AdamW step by rounding."""
    lr = 1e-4
    flags = [stage, "--data", folder, "--lr", lr, "--batch", 16, "--channels", 64, "--out"]
    earlier = list(train.STAGES)[: list(train.STAGES).index(stage)]
    for name in ("one", "parts", "two"):
        if earlier:
            recorded = dict(lr=dict.fromkeys(train.STAGES, lr), batch=16, channels=64)
            continued(base, tmp_path / name, *earlier, **recorded)
    one = start(*flags, tmp_path / "one")
    parts = start(*flags, tmp_path / "parts", "--accumulate", 2)
    for job in (one, parts, *start_two(start, *flags, tmp_path / "two")):
        job.ended()

    file = train.STAGES[stage]
    whole = weights(tmp_path / "one", file)
    metrics = lines_of(tmp_path / "one", stage)
    for name in ("parts", "two"):
        made = weights(tmp_path / name, file)
        assert difference(made, whole) < 0.2 * lr, name  # Muon multiplies in bf16
        for ours, line in zip(lines_of(tmp_path / name, stage), metrics, strict=True):
            for key, value in line.items():
                if key not in ("stage", "held_out_codes_used", "held_out_perplexity"):
                    assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, key)
    if stage == "masked":
        before = weights(base, "hmar.pt")
        assert difference(whole.pop("masked"), before.pop("masked")) > 1e-4
        assert difference(whole, before) == 0  # the rest stays


@pytest.mark.parametrize(
    "flags, processes, parts",
    [
        ("--size 32", 1, 1),
        ("--size 256", 1, 8),
        ("--size 256", 8, 1),
        ("--size 1024", 2, 32),
        ("--size 256 --batch 36", 1, 6),
        ("--size 256 --batch 10", 2, 1),
        ("--size 256 --accumulate 2", 1, 2),
    ],
)
def test_a_batch_is_cut_into_as_few_parts_as_fit(monkeypatch, flags, processes, parts):
    monkeypatch.setattr(train, "world", lambda: processes)
    assert train.resolved(train.parser().parse_args(flags.split())).accumulate == parts


def watched(monkeypatch, module, name):
    """Lists the calls of a function, (result, arguments, options) each."""
    function, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append((function(*arguments, **options), arguments, options))
        return calls[-1][0]

    monkeypatch.setattr(module, name, call)
    return calls


def test_nothing_puts_more_images_through_the_tokenizer_than_fit(folder, tmp_path, monkeypatch):
    """Judging, encoding, and drawing a sheet's rows of eight."""
    for module in (train, sample):
        monkeypatch.setattr(module, "at_once", lambda pixels: 3)
    calls = watched(monkeypatch, tokenizer, "encode_features")
    decoded = watched(monkeypatch, tokenizer, "decode_features")
    run("--data", folder, "--out", tmp_path, "--steps", 1, "--accumulate", 2)
    assert {len(arguments[1]) for _, arguments, _ in calls + decoded} <= {1, 2, 3}


def test_a_compiled_run_has_the_losses_of_an_eager_one(folder, tmp_path, monkeypatch):
    """Each stage's step is one graph; Dynamo's interpreter runs it: a backend would take minutes."""
    graphs, compile = [], torch.compile
    torch.compiler.reset()

    def captured(graph, example):
        graphs.append(graph)
        return graph.forward

    whole = partial(compile, backend=captured, fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    runs = []
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        run("--data", folder, "--out", tmp_path / name, "--steps", 2, *flags)
        assert bool(graphs) == bool(flags)
        runs.append([line["loss"] for line in lines_of(tmp_path / name, name="loss")])
    assert len(runs[0]) == 6
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_workers_change_nothing(base, folder, tmp_path):
    flags = ["tokenizer", "--data", folder, "--workers", 1]
    run(*flags, "--out", tmp_path)
    assert difference(weights(tmp_path, "tokenizer.pt"), weights(base, "tokenizer.pt")) == 0


# What the stages compute


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
        coarse = F.mse_loss(made["coarse"], images[: len(own)])
        assert line["coarse"] == pytest.approx(coarse.item(), rel=1e-4)
        assert line["loss"] == pytest.approx((expected + 0.5 * coarse).item(), rel=1e-4)
    assert len(stops) == 10 and set(stops) == {0, 1}  # a quarter of the images; not the last scale


def test_dead_codes_alone_are_replaced_and_their_moments_forgotten(folder, tmp_path, monkeypatch):
    revivals = watched(monkeypatch, tokenizer, "revive_codes")
    forgotten = watched(monkeypatch, train.Optimizer, "forget")
    flags = ["tokenizer", "--data", folder, "--batch", 2, "--codes", 128]
    run(*flags, "--out", tmp_path)
    counts = [int(arguments[1].sum()) for _, arguments, _ in revivals]
    assert counts == [2 * 81 * n for n in (1, 4)]  # at steps 1 and 5, not 10: past 80 % of 12
    for ((new, dead), (old, counts, residuals, _), _), (_, told, _) in zip(revivals, forgotten):
        assert torch.equal(dead, counts == 0) and 0 < dead.sum() < 128
        vectors = torch.cat([residual.flatten(0, 1) for residual in residuals])
        assert all((vectors == row).all(1).any() for row in new[dead])
        optimizer, leaf, rows = told
        assert leaf.shape == (128, 8) and torch.equal(rows, dead)


def held_out(folder):
    """The held-out images in [-1, 1] and labels."""
    _, kept = train.split_held_out(train.list_images(folder)[0], folder)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path, _ in kept]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    return images, torch.tensor([label for _, label in kept])


def test_held_out_numbers_are_those_of_the_weights_that_are_saved(base, folder):
    images, labels = held_out(folder)
    codec, params = weights(base, "tokenizer.pt"), weights(base, "hmar.pt")
    best = {}
    for line in lines_of(base, name="held_out_loss"):
        stage = line["stage"]
        best[stage] = min(best.get(stage, line), line, key=lambda line: line["held_out_loss"])
    tokens = tokenizer.encode(codec, images, SCALES)
    edges = (0, 1, 17, 81)
    line = best["tokenizer"]
    decoded = tokenizer.decode(codec, tokens, SCALES)
    errors = (decoded - images).double().square().mean((1, 2, 3))
    psnr = (10 * (4 / errors).log10()).mean().item()
    assert line["held_out_loss"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert line["held_out_psnr"][-1] == pytest.approx(psnr, abs=1e-3)
    assert line["held_out_codes_used"] == len(tokens.unique())
    for k in range(3):
        counts = torch.bincount(tokens[:, edges[k] : edges[k + 1]].flatten()).double()
        entropy = -sum(n * math.log(n) for n in (counts / counts.sum()).tolist() if n)
        assert line["held_out_perplexity"][k] == pytest.approx(math.exp(entropy), rel=1e-4)

    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    logits = hmar.next_scale_logits(params, labels, inputs)
    surprise = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    line = best["next-scale"]
    accuracy = (logits.argmax(-1) == tokens).double().mean().item()
    assert line["held_out_loss"] == pytest.approx(surprise.mean().item(), rel=1e-4)
    assert line["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    expected = [surprise[:, edges[k] : edges[k + 1]].mean().item() for k in range(3)]
    assert line["held_out_scale_losses"] == pytest.approx(expected, rel=1e-4)

    mask = torch.rand(len(images), 80, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    logits = hmar.masked_logits(params, labels, inputs, own_inputs, mask)
    surprise = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")[:, 1:][mask]
    assert best["masked"]["held_out_loss"] == pytest.approx(surprise.mean().item(), rel=1e-4)


def test_labels_are_dropped_and_the_share_of_hidden_tokens_is_uniform(base, folder, monkeypatch):
    flags = ["masked", "--data", str(folder), "--batch", "50", "--depth", "1"]
    args = train.resolved(train.parser().parse_args([*TINY, *flags, "--accumulate", "2"]))
    more = dict(stage="masked", steps=40, out=str(base), class_names=range(3))
    args = argparse.Namespace(
        **vars(args) | more | dict(device=torch.device("cpu"), dtype=torch.float32)
    )
    seen = []
    monkeypatch.setattr(train, "token_cache", lambda *_: np.zeros((30, 2, 81), np.uint16))
    monkeypatch.setattr(
        train, "fit", lambda args, tree, loss, batches, evaluate: seen.append(batches)
    )
    data = argparse.Namespace(labels=[0, 1, 2] * 10)
    train.train_masked(args, data, data)
    batches = [parts for parts in seen[0](30)]
    assert len(batches) == 10 and all(len(parts) == 2 for parts in batches)
    ratios = torch.cat([part["mask"].float().mean(1) for parts in batches for part in parts])
    assert np.histogram(ratios, 4, (0, 1))[0].min() > 90  # of 500
    labels = torch.cat([part["labels"] for parts in batches for part in parts])
    assert 25 < (labels == 3).sum() < 85  # a tenth
    for parts in batches:
        hidden = sum(part["mask"].sum() for part in parts)
        assert all(part["share"] == 2 / hidden for part in parts)
        assert all(
            torch.equal(part["places"], part["mask"].flatten().nonzero()[:, 0]) for part in parts
        )


# The token cache

CODEC = tokenizer.init(
    codes=16,
    code_dim=8,
    channels=32,
    multipliers=(1, 1),
    residual_blocks=1,
    attention=False,
    seed=7,
)


def cache(out, data, name="train", codec=CODEC, **changes):
    flags = dict(out=str(out), scales=SCALES, size=16, flip=False, seed=0, dtype=torch.float32)
    args = argparse.Namespace(**flags | dict(device=torch.device("cpu")) | changes)
    return np.array(train.token_cache(args, name, data, codec))


def encoded(images):
    return tokenizer.encode(CODEC, train.to_unit(torch.stack(images), torch.device("cpu")), SCALES)


def test_a_small_folder_is_encoded_in_several_crops(folder, tmp_path, monkeypatch):
    items = train.list_images(folder)[0][:9]
    images = train.Images(items, 16)
    tokens = cache(tmp_path, images)
    assert tokens.shape == (9, 16, 81) and tokens.dtype == np.uint16
    for view in range(3):
        keys = [(i, (0, view, i) if view else None) for i in range(9)]  # the first: centre crops
        expected = encoded([images[key][0] for key in keys])
        assert np.array_equal(tokens[:, view], expected)
    assert len(np.unique(tokens[0], axis=0)) > 1
    monkeypatch.setattr(train, "VIEWS_IN_ALL", 30)
    assert cache(tmp_path, images).shape == (9, 3, 81)
    monkeypatch.setattr(train, "VIEWS_IN_ALL", 5)
    assert cache(tmp_path, images).shape == (9, 1, 81)
    mirrored = train.Images(items, 16, flip=True)
    assert cache(tmp_path, mirrored, flip=True).shape == (9, 2, 81)
    assert cache(tmp_path, images, "held-out").shape == (9, 1, 81)
    assert cache(tmp_path, train.Images(range(4), 16)).shape == (4, 1, 81)  # drawings


def test_a_cache_is_made_anew_when_what_it_depends_on_changes(folder, tmp_path, monkeypatch):
    calls = watched(monkeypatch, train, "encoded")
    images = drawings(tmp_path / "images", 6)
    items = train.list_images(images)[0]
    path = tmp_path / "tokens-train.npy"

    def made(anew, items=items, **changes):
        calls.clear()
        tokens = cache(tmp_path, train.Images(items, 16), **changes)
        assert bool(calls) == anew
        return tokens

    first = made(True)
    assert np.array_equal(made(False), first)
    other = copy.deepcopy(CODEC)
    other["decoder"]["conv_out"]["bias"][0] += 1e-3
    assert np.array_equal(made(True, codec=other), first)
    made(True)
    made(True, items=items[:-1])
    made(True, items=items[1:])
    os.utime(items[2][0], (0, 0))  # another picture under the same name
    made(True, items=items[1:])
    made(True, seed=1)
    made(True, seed=1, flip=True)
    made(True, scales=((1, 1), (8, 8)))

    made(True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # no missing row is token 0
    assert np.array_equal(made(True), first)
    path.write_bytes(b"something else")
    assert np.array_equal(made(True), first)
    path.unlink()
    assert np.array_equal(made(True), first)
    (tmp_path / "victim").write_text("mine")
    path.unlink()
    path.symlink_to(tmp_path / "victim")
    assert np.array_equal(made(True), first) and (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("writer", ["save_array", "write_json"])
def test_a_cache_killed_while_it_was_made_anew_is_not_taken_for_whole(
    tmp_path, monkeypatch, writer
):
    images = train.Images(range(20), 16)
    expected = cache(tmp_path, images)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, writer, raises(Killed))
        cache(tmp_path, train.Images(range(30), 16))
    assert np.array_equal(cache(tmp_path, images), expected)


# Starting from given weights


def published(params, patterns):
    """The state dict, in the published layout, of one of our trees."""
    state = {}
    for path, tensor in pytree.tree_flatten_with_path(params)[0]:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state


def flags_of(*flags, classes=("a", "b", "c")):
    args = train.resolved(train.parser().parse_args([*TINY, *map(str, flags)]))
    args.device, args.dtype, args.class_names = torch.device("cpu"), torch.float32, classes
    return args


def test_a_tokenizer_starts_from_weights_and_keeps_its_codebook(folder, tmp_path):
    given = tmp_path / "given.pt"
    torch.save(CODEC, given)
    assert difference(train.initial_tokenizer(flags_of("tokenizer", "--init", given)), CODEC) == 0
    assert len(train.initial_tokenizer(flags_of("tokenizer", "--codes", 99))["codebook"]) == 99
    flags = ["tokenizer", "--data", folder, "--steps", 3, "--lr", 1e-6, "--init", given]
    run(*flags, "--out", tmp_path / "run")
    trained = weights(tmp_path / "run", "tokenizer.pt")
    assert 0 < difference(trained["encoder"], CODEC["encoder"]) < 1e-4


def test_a_tokenizer_of_another_downsampling_is_trained_at_its_own(folder, tmp_path, refused):
    sizes = dict(codes=16, code_dim=8, channels=32, multipliers=(1, 1, 1), residual_blocks=1)
    torch.save(tokenizer.init(**sizes, attention=False), tmp_path / "given.pt")
    flags = ["tokenizer", "--data", folder, "--out", tmp_path / "run", "--steps", 1]
    flags += ["--init", tmp_path / "given.pt"]
    assert "the last 4, 16 pixels / 4" in refused(*flags)
    run(*flags, "--scales", 1, 2, 4)


def test_a_transformer_starts_from_other_classes_scales_and_branches(tmp_path, capsys):
    sizes = dict(width=32, classes=5, codes=16, code_dim=8)
    params = hmar.add_masked_branch(hmar.init(depth=3, scales=SCALES, seed=5, **sizes), 2)

    def started(*flags, classes="abcde", params=params):
        torch.save(params, tmp_path / "init.pt")
        args = flags_of("next-scale", "--init", tmp_path / "init.pt", *flags, classes=classes)
        return train.initial_transformer(args, CODEC), capsys.readouterr().out

    same, said = started()
    assert said == "" and "masked" not in same and same["next_scale"]["blocks"] == []
    assert difference(same["trunk"], params["trunk"] + params["next_scale"]["blocks"]) == 0
    assert difference(same["next_scale"]["head"], params["next_scale"]["head"]) == 0
    fewer, said = started(classes="xy")
    assert said == "--init: a new class embedding for 2 classes\n"
    assert fewer.pop("classes").shape == (3, 32)
    assert difference(fewer, {name: same[name] for name in same if name != "classes"}) == 0
    other, said = started("--size", 8, "--scales", 1, 2, 3, 4)
    assert said == "--init: positions resampled for the scales 1 2 3 4\n"
    assert hmar.scales(other) == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert difference(other["trunk"], same["trunk"]) == 0
    with pytest.raises(
        ValueError, match="got 8 codes of 8 dimensions, expected the tokenizer's 16"
    ):
        started(params=hmar.init(depth=1, scales=SCALES, **sizes | dict(codes=8)))


def test_a_finished_tokenizer_is_taken_as_it_is(folder, tmp_path):
    torch.save(CODEC, tmp_path / "given.pt")
    flags = ["--data", folder, "--out", tmp_path / "run", "--steps", 1, "--codes", 16]
    run(*flags, "--tokenizer", tmp_path / "given.pt")
    assert difference(weights(tmp_path / "run", "tokenizer.pt"), CODEC) == 0
    assert {line["stage"] for line in lines_of(tmp_path / "run")} == {"next-scale", "masked"}
    run(*flags)  # --tokenizer need not be repeated
    assert sample.main([str(tmp_path / "run"), "--count", "1", "--out", str(tmp_path / "a")]) == 0


# Run folders that are not what they were


def test_an_own_folder_is_gone_on_with_by_its_own_flags_alone(base, folder, tmp_path, refused):
    out = shutil.copytree(base, tmp_path / "run")
    flags = ["--data", folder, "--out", out]
    before = contents(out)
    line = refused(*flags, "--lr", 9, "--seed", 3, "--depth", 2)
    assert line == (
        f"train.py: {out}: begun with other flags: seed 0 -> 3, lr {json.loads(before['args.json'])['flags']['lr']}"
        " -> {'tokenizer': 9.0, 'next-scale': 9.0, 'masked': 9.0}, depth 1 -> 2;"
        " --out NAME begins another run, --restart this one anew"
    )
    assert "flip False -> True" in refused(*flags, "--flip")
    assert "size 16 -> 8, scales" in refused(*flags, "--size", 8, "--scales", 1, 2, 4)
    torch.save(CODEC, tmp_path / "other.pt")
    assert "tokenizer None -> " in refused(*flags, "--tokenizer", tmp_path / "other.pt")
    run(*flags)
    run(*flags, "--accumulate", 2, "--workers", 1, "--save-every", 3, "--checkpointing")
    run("masked", "--data", os.path.relpath(folder), "--out", out)  # the same folder
    assert contents(out) == before


def test_changed_images_are_refused(base, folder, tmp_path, refused):
    images = shutil.copytree(folder, tmp_path / "images")
    flags = ["tokenizer", "--data", images, "--out", tmp_path / "run", "--steps", 1]
    run(*flags)
    path = next(images.rglob("*.png"))
    for change in (lambda: os.utime(path, (0, 0)), path.unlink):
        change()
        assert f"the images in {images} have changed" in refused(*flags)
    run(*flags, "--restart")


@pytest.mark.parametrize("name", ["tokenizer.pt", "hmar.pt", "tokenizer.resume.pt"])
def test_weights_without_a_record_are_not_trained_over(folder, tmp_path, refused, name):
    (tmp_path / name).write_text("mine")
    flags = ["tokenizer", "--data", folder, "--out", tmp_path, "--steps", 1]
    line = refused(*flags)
    assert line.startswith(f"train.py: {tmp_path}: holds {name} but no args.json; --out NAME")
    assert contents(tmp_path) == {name: b"mine", "lock": b""}
    assert not (tmp_path / "samples").exists()
    run(*flags, "--restart")


def test_a_folder_takes_one_process_at_a_time(folder, tmp_path, refused):
    before = contents(tmp_path)
    with open(tmp_path / "lock", "w") as file:
        train.fcntl.flock(file, train.fcntl.LOCK_EX)
        line = refused("--data", folder, "--out", tmp_path)
        assert line == f"train.py: {tmp_path}: another process trains in it"
    assert contents(tmp_path) == before | {"lock": b""}


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
    hook = partial(ask_at, "next-scale", 6, signal.SIGKILL)
    start(*flags, "--restart", hook=hook).ended(-signal.SIGKILL)
    assert not (out / "hmar.pt").exists() and lines_of(out)[0]["step"] == 1
    job = start(*flags).ended()
    assert "next-scale: continues at step 4" in job.said("out")
    assert len(lines_of(out, "masked")) == 2 * STEPS


def test_a_kill_between_weights_and_their_record_loses_nothing(base, folder, tmp_path):
    """hmar.pt has its masked branch, of which args.json does not know yet."""
    out = continued(base, tmp_path / "run", "tokenizer", "next-scale")
    run("--data", folder, "--out", out)
    assert difference(weights(out, "hmar.pt"), weights(base, "hmar.pt")) == 0


@pytest.mark.parametrize("name, stage", [("tokenizer.pt", "next-scale"), ("hmar.pt", "masked")])
def test_weights_that_the_run_did_not_make_are_refused(
    base, folder, tmp_path, refused, name, stage
):
    stages = list(train.STAGES)
    out = continued(base, tmp_path / "run", *stages[: stages.index(stage)])
    tree = weights(out, name)
    pytree.tree_leaves(tree)[0][0] += 1e-3
    torch.save(tree, out / name)
    line = refused(stage, "--data", folder, "--out", out)
    assert line == f"train.py: {out}/{name}: not what this run made; --restart begins it anew"
    (out / name).unlink()
    made_by = stages[stages.index(stage) - 1]
    assert f"{name} is missing; python train.py {made_by} makes it" in refused(
        stage, "--data", folder, "--out", out
    )


def test_a_damaged_checkpoint_or_metrics_are_told_or_passed_over(base, folder, tmp_path, refused):
    flags = ["tokenizer", "--data", folder, "--out", tmp_path]
    run(*flags, "--steps", 1)
    record = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(record | dict(made={})))
    hostile = [
        "5",
        "[]",
        '{"step": 1}',
        "null",
        '{"stage": "tokenizer", "step": "a"}',
        "[" * 100_000,
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(hostile))
    run(*flags, "--steps", 1)
    assert len(lines_of(tmp_path)) == 2

    (tmp_path / "args.json").write_text(json.dumps(record | dict(made={})))
    path = tmp_path / "tokenizer.resume.pt"
    for content in (torch.zeros(3), {}, dict(progress=(1, 1, 1.0), optimizer=[{}, {}], state=[])):
        torch.save(content, path)
        line = refused(*flags, "--steps", 1)
        assert line == f"train.py: {path}: expected this stage's checkpoint"
    path.write_text("text")
    assert f"{path}: no weights that can be read safely" in refused(*flags, "--steps", 1)


# Full disks


@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_a_file_that_cannot_grow_is_told_in_one_line(base, start, folder, tmp_path, limit):
    """A write that fails in the middle of a file, by a limit that Linux has for it."""
    out = continued(base, tmp_path / "run", "tokenizer")
    before = (out / "tokenizer.pt").read_bytes()
    job = start("--data", folder, "--out", out, hook=partial(limit_files, limit)).ended(2)
    line = job.said("err")
    assert line.count("\n") == 1 and "cannot be written" in line
    assert (out / "tokenizer.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def limit_files(limit):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_leaves_the_last_checkpoint_whole(base, folder, tmp_path, monkeypatch, refused):
    flags = ["tokenizer", "--data", folder, "--out", tmp_path / "run"]
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused(*flags)
    assert line.startswith("train.py: ") and line.endswith(
        "cannot be written: No space left on device"
    )
    assert weights(tmp_path / "run", "tokenizer.resume.pt")["progress"][0] in (4, 8)
    assert not list((tmp_path / "run").glob("*.tmp"))
    run(*flags)
    assert difference(weights(tmp_path / "run", "tokenizer.pt"), weights(base, "tokenizer.pt")) == 0


def test_a_file_is_replaced_whole(tmp_path):
    """Whoever has the old file open goes on reading it, since the new one is another file."""
    path = tmp_path / "a.json"
    train.write_json(path, dict(a=1))
    with open(path) as old:
        train.write_json(path, dict(b=2))
        assert json.load(old) == dict(a=1) and train.read_json(path) == dict(b=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# Bad input


def test_a_mixed_folder_trains_and_names_its_broken_files_once(tmp_path):
    """The whole command, started as anybody would, on one class of images of every kind."""
    images = tmp_path / "mine"
    images.mkdir()
    picture = train.draw_shape(3, 40)[0]
    picture.convert("L").save(images / "grey.png")
    picture.convert("RGBA").save(images / "alpha.png")
    picture.convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(
        images / "16.png"
    )
    whole = (images / "alpha.png").read_bytes()
    (images / "half.png").write_bytes(whole[: len(whole) // 2])
    (images / "\x1b[31mbroken.jpg").write_text("text")
    (images / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (images / "notes.txt").write_text("notes")
    command = [sys.executable, ROOT / "train.py", *TINY, "--data", "mine", "--steps", 2]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    done = subprocess.run([str(word) for word in command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(done.stderr.splitlines())
    assert len(lines) == 2 and lines[0].startswith("skipped: mine/?[31mbroken.jpg: no image")
    assert lines[1].startswith("skipped: mine/half.png: ")
    assert done.stdout.startswith("runs/mine: 5 images to train on, 1 held out, 1 classes; cpu")
    assert json.loads((tmp_path / "runs/mine/args.json").read_text())["class_names"] == ["mine"]


BAD = {  # what is wrong: (flags, what the line says)
    "unknown stage": ("tokeniser", "invalid choice: 'tokeniser'"),
    "mistyped flag": ("--step-s=3", "unrecognized arguments: --step-s=3"),
    "no number": ("--batch many", "--batch: invalid int value: 'many'"),
    "no scale": ("--scales 1 2y2", "--scales: invalid"),
    "missing data": ("--data {here}/none", "--data: got '{here}/none', which is missing"),
    "data is a file": ("--data {here}/file.txt", "which is no folder"),
    "empty data": ("--data {here}/empty", "'{here}/empty', which holds no PNG"),
    "one image": ("--data {here}/one", "expected at least two"),
    "all broken": ("--data {here}/broken", "no image of the class of {here}/broken/"),
    "size does not divide": ("--size 15", "--size: got 15, expected a multiple of 2"),
    "negative size": ("--size -4", "--size"),
    "a finer scale": ("--scales 1 2 16", "expected two or more, the last 8, 16 pixels / 2"),
    "an early end": ("--scales 1 2 4", "--scales: got 1 2 4, expected two or more, the last 8"),
    "one scale": ("--scales 8", "expected two or more"),
    "out of order": ("--scales 1 4 2 8", "scales"),
    "no side": ("--scales 0 8", "scales"),
    "channels": ("--channels 48", "expected 1 or more, channels a multiple of 32"),
    "width": ("--width 100", "--width: got 100, heads of 100 dimensions"),
    "no steps": ("--steps 0", "--steps: got 0, expected 1 to"),
    "many steps": ("--steps " + "9" * 400, "--steps"),
    "batch does not divide": ("--accumulate 3", "--batch: got 4, expected a multiple of 3 parts"),
    "infinite rate": ("--lr inf", "--lr: got inf"),
    "negative seed": ("--seed -1", "--seed"),
    "unknown device": ("--device gpu", "--device: got 'gpu'"),
    "no real device": ("--device meta", "--device: got 'meta'"),
    "init alone": ("--init {here}/file.txt", "--init: needs the stage that it starts"),
    "init is missing": ("tokenizer --init {here}/none.pt", "none.pt"),
    "init is text": ("tokenizer --init {here}/file.txt", "{here}/file.txt: no weights that can be"),
    "init holds code": (
        "tokenizer --init {here}/code.pt",
        "{here}/code.pt: no weights that can be",
    ),
    "init is a tensor": ("tokenizer --init {here}/tensor.pt", "{here}/tensor.pt: "),
    "init is half a tree": ("tokenizer --init {here}/half.pt", "{here}/half.pt: "),
    "tokenizer is a tensor": ("--tokenizer {here}/tensor.pt", "{here}/tensor.pt: "),
    "no predecessor": ("next-scale", "tokenizer.pt is missing; python train.py tokenizer makes it"),
    "no tokenizer": ("masked", "tokenizer.pt is missing; python train.py tokenizer makes it"),
    "causal and masked": ("masked --causal", "masked: there is no such stage with"),
    "out is a file": ("--out {here}/file.txt", "file.txt"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad")
    for name in ("empty", "one", "broken"):
        (here / name).mkdir()
    Image.new("RGB", (20, 20)).save(here / "one" / "a.png")
    for name in ("broken/a.png", "broken/b.png", "file.txt"):
        (here / name).write_text("text")
    torch.save(torch.zeros(3), here / "tensor.pt")
    torch.save(dict(codebook=torch.zeros(4, 2)), here / "half.pt")
    torch.save(dict(codebook=os.system), here / "code.pt")
    return here


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_status_2(folder, here, tmp_path, refused, name):
    flags, said = [text.replace("{here}", str(here)) for text in BAD[name]]
    line = refused("--data", folder, "--out", tmp_path / "run", "--steps", 1, *flags.split())
    assert said in line and "Traceback" not in line and not list(tmp_path.rglob("*.pt"))


numbers = st.integers(-(10**30), 10**30) | st.integers(-2, 70) | st.floats()
texts = st.text(max_size=20) | st.sampled_from(["", "1x", "x1", "2x3", "\0", "\udcff", "9" * 400])
values = (numbers | texts).map(str)
several = st.lists(st.integers(0, 20).map(str) | values, min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@example([("--batch", ["999999937"]), ("--size", ["256"])])
@example([("--depth", ["1000000000"])])
@example([("--scales", ["8"]), ("--size", ["8"])])
@given(st.data())
def test_flags_of_any_value_are_taken_or_refused(data):
    parser = train.parser()
    names = [action.option_strings[0] for action in parser._actions if action.option_strings]
    names = sorted(set(names) - {"-h", "--init", "--tokenizer"})
    pairs = data
    if not isinstance(data, list):
        pairs = data.draw(st.lists(st.tuples(st.sampled_from(names), several), max_size=4))
    flags = [word for name, words in pairs for word in (name, *words)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = train.resolved(parser.parse_args(flags))
    except SystemExit as end:
        assert end.code == 2
        return
    except ValueError as error:
        assert str(error)
        return
    assert args.scales[-1][0] >= 1 and args.batch % args.accumulate == 0


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(keys=None, value=None)
@example(keys=None, value=[])
@example(keys=None, value=3)
@example(keys=None, value="deep")
@given(keys=st.sampled_from(["flags", "class_names", "images", "made", "causal"]), value=trees)
def test_a_record_of_any_content_is_taken_or_refused(base, folder, tmp_path, capsys, keys, value):
    """args.json, whole or one of its entries."""
    out = tmp_path / "run"
    if not out.exists():
        shutil.copytree(base, out)
    record = json.loads((base / "args.json").read_text()) | {keys: value} if keys else value
    text = "[" * 100_000 if value == "deep" else json.dumps(record)
    (out / "args.json").write_text(text)
    capsys.readouterr()
    status = status_of("masked", "--data", folder, "--out", out)
    said = capsys.readouterr().err
    assert status in (0, 2) and said.count("\n") == (status == 2), said
    if keys is None:
        assert status == 2 and f"{out}/args.json: expected" in said
