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
        said = capsys.readouterr().err
        assert said.startswith("train.py: ") and said.endswith("\n") and said.count("\n") == 1, said
        return said[:-1]

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
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs))


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
    flags = ["tokenizer", "--data", folder, "--out", tmp_path / "run", "--workers", 2]
    hook = partial(ask_at, "tokenizer", 3, signal.SIGTERM, group=True)
    said = start(*flags, hook=hook).ended(130).said("err")
    assert said == "train.py: tokenizer: stopped and saved at step 3\n"
    start(*flags).ended()


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
    flags = ["--data", folder, "--accumulate", 2, "--out"]
    whole = start_two(start, *flags, tmp_path / "whole")
    hook = partial(ask_at, "tokenizer", 7, signal.SIGTERM, rank="1")
    for job in start_two(start, *flags, tmp_path / "cut", hook=hook):
        job.ended(130)
    assert weights(tmp_path / "cut", "tokenizer.resume.pt")["progress"][0] == 10
    jobs = start_two(start, *flags, tmp_path / "cut")
    assert jobs[1].ended().said("out") == ""  # the first speaks for both
    for job in (*jobs, *whole):
        job.ended()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
