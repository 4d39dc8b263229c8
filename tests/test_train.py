"""Training: nothing is lost, processes are one, what a step computes, bad input."""

import argparse
import copy
import errno
import fcntl
import gc
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CODEC_SIZES, asked_of_fit, contents, scrambled, small_codec
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

SCALES = ((1, 1), (4, 4), (8, 8))
TINY = dict(channels=32, multipliers=(1, 1), residual_blocks=1, attention=False, codes=16)
TINY |= dict(code_dim=8)
FLAGS = ["--size", "16", "--scales", "1", "4", "8", "--dtype", "fp32", "--device", "cpu"]
CODEC = small_codec(attention=False, seed=7)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_train", "torch._dynamo"])


def tiny_dial(depth, size, images, steps=12, **changes):
    steps, lr = (dict.fromkeys(train.STAGES, value) for value in (steps, 4e-3))
    return dict(
        cell=2,
        codec=TINY | changes,
        transformer=dict(depth=1, gamma=0.1, convolutions=True),
        masked_blocks=1,
        loss_weights="token",
        batch=4,
        steps=steps,
        lr=lr,
        perceptual=True,
        decay=0.05,
        looks=6,
    )


DIAL = train.dial
OFTEN = dict(dial=tiny_dial, SAVES=3, LOG_EVERY=1, REVIVE_EVERY=4)


@pytest.fixture(autouse=True, scope="module")
def often():
    here = Path(__file__).resolve().parent
    path = dict(PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    with mock.patch.dict(os.environ, path), mock.patch.multiple(train, **OFTEN):
        yield


# Commands, in processes or this one


def command(flags, hooks, environment, constants, log):
    """`python train.py FLAGS`, in a process forked from one that has imported torch."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    vars(train).update(OFTEN | constants)
    for hook in hooks:
        hook()
    sys.exit(train.main(flags))


@pytest.fixture(scope="module")
def start(tmp_path_factory, folder):
    logs, processes = tmp_path_factory.mktemp("logs"), []

    def start(out, *flags, hooks=(), environment=(), **constants):
        flags = [str(flag) for flag in (*FLAGS, "--data", folder, "--out", out, *flags)]
        log = str(logs / str(random.getrandbits(60)))
        process = FORKS.Process(target=command, args=(flags, hooks, environment, constants, log))
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
    def run(out, *flags, status=0):
        gc.collect()  # a folder that a run before held
        flags = (*FLAGS, "--data", folder, "--out", out, *flags)
        try:
            assert train.main([str(flag) for flag in flags]) == status
        except SystemExit as error:  # its own
            assert error.code == status

    return run


@pytest.fixture
def refused(run, capsys):
    def refused(out, *flags):
        capsys.readouterr()
        run(out, *flags, status=2)
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if not line.startswith("skipped: ")]
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
def base(tmp_path_factory, often, start):
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
    *_, seconds, peak = base.with_name("said").read_text().splitlines()
    assert 1 < float(seconds.removeprefix("seconds ")) < 600
    assert 100 < float(peak.removeprefix("peak_mb ")) < 9000
    for stage, file in train.STAGES.items():
        losses = [line["loss"] for line in lines_of(base, stage, "loss")]
        held_out = [line["held_out_loss"] for line in lines_of(base, stage, "held_out_loss")]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        assert len(held_out) == len(losses) // 2 and held_out[-1] < held_out[0]
        leaves = pytree.tree_leaves(torch.load(base / file))
        assert all(type(leaf) is torch.Tensor for leaf in leaves)

    text = (base / "args.json").read_text()
    assert json.loads(text)["class_names"] == sorted(train.SHAPES[:3])
    assert str(folder) not in text and str(base) not in text  # both may move
    sheets = ["masked.png", "next-scale.png", "reconstructions.png"]
    assert sorted(os.listdir(base / "samples")) == sheets
    names = "args.json hmar.pt lock metrics.jsonl next-scale.pt samples tokenizer.pt tokens.npy"
    assert sorted(os.listdir(base)) == names.split()


# Kills and signals


def test_kills_at_random_moments_change_nothing(base, start, folder, tmp_path):
    """Nor do new places and times of all files, each time."""
    move = partial(shutil.copytree, copy_function=shutil.copyfile)
    data, out = folder, tmp_path / "run"
    out.mkdir()
    for number in itertools.count(1):
        seconds = random.uniform(0, number / 2)
        kill = partial(signal.setitimer, signal.ITIMER_REAL, seconds)
        process = start(out, "--data", data, hooks=[kill])
        process.join()
        if process.exitcode == 0:
            break
        ended(process, -signal.SIGALRM)
        data, out = move(data, tmp_path / f"data {number}"), move(out, tmp_path / f"{number}")
    assert number > 2
    assert contents(out) == contents(base)


def at(stage, step, act, ranks="0"):
    """Has processes act when a step's metrics are written."""
    write = train.Progress.log

    def log(progress, number, **numbers):
        write(progress, number, **numbers)
        is_now = (progress.stage, number) == (stage, step) and "rate" in numbers
        if is_now and os.environ.get("RANK", "0") in ranks:
            act()

    train.Progress.log = log


def ask(number):
    os.killpg(os.getpgrp(), number)


def limit_files():
    """Writes fail in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_run_told_to_stop_saves_and_goes_on(base, start, tmp_path):
    stops = [("tokenizer", 6, signal.SIGINT), ("next-scale", 10, signal.SIGTERM)]
    for stage, step, number in (*stops, ("masked", 7, signal.SIGINT)):
        hook = partial(at, stage, step, partial(ask, number))
        *_, line = ended(start(tmp_path, "--workers", 1, hooks=[hook]), 130).splitlines()
        assert line == f"train.py: {stage}: stopped and saved at step {step}"
        assert torch.load(tmp_path / f"{stage}.checkpoint.pt")["progress"][0] == step
    assert "masked: goes on at step 7, 12 steps" in ended(start(tmp_path))
    assert contents(tmp_path) == contents(base)


def test_a_full_disk_loses_nothing(base, start, tmp_path):
    said = ended(start(tmp_path, hooks=[partial(at, "tokenizer", 6, limit_files)]), 2)
    *before, line = said.splitlines()
    assert line.startswith(f"train.py: {tmp_path}/tokenizer.") and "cannot be written: " in line
    assert before[-1].startswith("tokenizer 8/12 ") and not list(tmp_path.rglob("*.tmp"))
    assert torch.load(tmp_path / "tokenizer.checkpoint.pt")["progress"][0] == 4
    ended(start(tmp_path))
    assert contents(tmp_path) == contents(base)


# The loop, on a stage that is a linear regression


def toy_args(out, **changes):
    out.mkdir(exist_ok=True)
    flags = dict(out=out, steps=dict(tokenizer=12), lr=dict(tokenizer=0.1), looks=99, decay=0.05)
    flags |= dict(compile=False, device=torch.device("cpu"), work=dict(tokenizer=1))
    flags |= dict(stages=["tokenizer"])
    return argparse.Namespace(**flags | changes)


def toy_batches(start):
    for step in range(start, 12):
        x = torch.randn(4, 3, generator=train.generator_of("toy", step))
        yield [dict(x=x, y=x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))]


def toy_loss(params, x, y):
    wide = sum(weight.flatten(1).roll(i, 1) for i, weight in enumerate(params["wide"]))
    value = (hmar.linear(x, wide + params["tall"].T, params["bias"]) - y).square().mean()
    return value, dict(loss=value), ()


def toy_params():
    wide = [torch.zeros(2, 3, 1, 1) for _ in range(3)]
    return train.trainable(dict(wide=wide, tall=torch.zeros(3, 2), bias=torch.zeros(2)))


def toy_fit(args, evaluate=lambda tree: dict(loss=1.0), after_step=lambda *_: None):
    with mock.patch.object(train, "SAVES", 6):
        given = toy_params(), toy_loss, toy_batches, evaluate, after_step
        return train.fit(args, "tokenizer", *given)


def stop_at(step, stop, now, needs, optimizer):
    if now == step:
        stop()


@pytest.mark.parametrize("warmup, is_compiled", [(3, False), (8, True)])
def test_the_loop_equals_one_written_out(tmp_path, monkeypatch, warmup, is_compiled):
    for name, value in dict(WARM_UP=warmup / 12, MEMORY=1 / 36).items():
        monkeypatch.setattr(train, name, value)
    args = toy_args(tmp_path, compile=is_compiled)
    falling = iter(range(99, 0, -1))
    with mock.patch.object(torch, "compile", side_effect=lambda model: model) as compiled:
        ours = toy_fit(args, lambda tree: dict(loss=next(falling)))
    assert compiled.called == is_compiled
    theirs = toy_params()
    leaves = pytree.tree_leaves(theirs)
    average = [leaf.detach().clone() for leaf in leaves]
    matrices = [torch.nn.Parameter(leaf.detach().flatten(1)) for leaf in leaves[:-1]]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(leaves[-1:], betas=(0.9, 0.95), weight_decay=0)

    for step, (batch,) in enumerate(toy_batches(0), 1):
        toy_loss(theirs, **batch)[0].backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
        rate = 0.1 * min(step / warmup, 1, (13 - step) / 12 / 0.6)
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


@pytest.mark.parametrize("log_every", (1, 5))
def test_best_weights_and_early_stop_survive_kills(tmp_path, capsys, monkeypatch, log_every):
    """And means over steps that a kill cut are those of a run left alone."""

    def evaluate(tree):  # falls until the weights have a size
        trees.append(copy.deepcopy(tree))
        return dict(loss=abs(float(tree["tall"].norm()) - 0.1))

    trees = []
    monkeypatch.setattr(train, "LOG_EVERY", log_every)
    whole = toy_fit(toy_args(tmp_path / "whole"), evaluate)
    losses = [line["held_out_loss"] for line in lines_of(tmp_path / "whole", name="held_out_loss")]
    best = int(np.argmin(losses))
    assert 0 < best and len(losses) == best + 1 + 4  # a third of 12 steps
    assert difference(whole, trees[best]) == 0 < difference(whole, trees[-1])

    killed = mock.Mock(side_effect=SystemExit)
    for step in (best + 1, best + 4):  # killed at the best step, and after it
        with pytest.raises(SystemExit):
            toy_fit(toy_args(tmp_path / "cut"), evaluate, partial(stop_at, step, killed))
    assert difference(toy_fit(toy_args(tmp_path / "cut"), evaluate), whole) == 0
    said = f"tokenizer: stopped early at step {best + 5}; best at {best + 1}\n"
    assert capsys.readouterr().out.count(said) == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_second_signal_and_one_at_the_end_are_heeded(tmp_path):
    def stop(count):
        for _ in range(count):
            signal.raise_signal(signal.SIGINT)

    for count, step in ((2, 3), (1, 5)):  # 4 after the best
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt) as stopped:
            toy_fit(toy_args(tmp_path), after_step=partial(stop_at, step, partial(stop, count)))
        assert not str(stopped.value)  # nothing was saved
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "SAVES", 12)
    monkeypatch.setattr(train, "look", lambda *_: 1.0)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e6 if step == 2 else 1e-4)
    for every in (1, 50):  # the same command says so again
        monkeypatch.setattr(train, "LOG_EVERY", every)
        line = refused(tmp_path, "tokenizer")
        assert re.search(r"tokenizer: loss or gradient is not finite at step [34]; a lower", line)
        state = torch.load(tmp_path / "tokenizer.checkpoint.pt")["state"]
        assert all(leaf.isfinite().all() for leaf in state)
    assert not re.search("NaN|Infinity", (tmp_path / "metrics.jsonl").read_text())


def test_an_epoch_has_every_item_once():
    args = argparse.Namespace(seed=3, batch=4)
    items = [item for step in range(20) for item in train.step_items(args, step, 10)]
    indices, draws = np.transpose(items)
    assert (draws == range(80)).all()
    epochs = indices.reshape(8, 10)
    assert (np.sort(epochs) == range(10)).all() and len(np.unique(epochs, axis=0)) == 8


# Several processes and parts of a batch are one


def start_many(start, count, *flags, hooks=(), **options):
    """The processes that torchrun would start, unlike each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    options |= dict(hooks=[*hooks, unlike])
    ranks = map(str, range(count))
    return [start(*flags, environment=dict(common, RANK=rank), **options) for rank in ranks]


def unlike():
    """The others see no file of a run, as on a network, list no images and judge otherwise."""
    if os.environ["RANK"] == "0":
        return
    exists, judge, losses = os.path.exists, train.judge_tokenizer, itertools.count()

    def look(path):
        assert not str(path).endswith((".pt", ".npy", ".json")), path
        return exists(path)

    os.path.exists = os.path.lexists = Path.exists = look
    os.walk = None
    train.judge_tokenizer = lambda *given: judge(*given) | dict(loss=next(losses))


def both_ended(processes, *statuses):
    """When one has ended the other does too, within half a minute."""
    multiprocessing.connection.wait([process.sentinel for process in processes], 120)
    for process, status in zip(processes, statuses):
        ended(process, status, within=30)


def few(count):
    """So many images pass the networks together, all with coarse ones."""
    sample.at_once = lambda pixels: count
    tokenizer.COARSE_EVERY = 1


def fail():
    """An error of one process, which may not wait for the others."""
    torch.distributed.destroy_process_group = lambda: os._exit(9)
    raise ValueError


def test_two_processes_end_and_go_on_together(start, tmp_path):
    """Means are over 5 steps, of which an end cuts some."""

    def two(name, *hooks):
        flags = [tmp_path / name, "tokenizer"]
        constants = dict(LOG_EVERY=5, SAVES=5, dial=partial(tiny_dial, codes=128, steps=20))
        return start_many(start, 2, *flags, hooks=[partial(few, 1), *hooks], **constants)

    kill = partial(ask, signal.SIGKILL)
    whole = two("whole")
    for step, act, ranks, statuses, saved in (
        (5, kill, "1", (1, -signal.SIGKILL), 4),
        (5, fail, "1", (1, 2), 4),
        (5, fail, "0", (2, 1), 4),
        (5, partial(ask, signal.SIGTERM), "1", (130, 130), 10),
        (15, kill, "01", (-signal.SIGKILL, -signal.SIGKILL), 12),
    ):
        both_ended(two("cut", partial(at, "tokenizer", step, act, ranks)), *statuses)
        assert torch.load(tmp_path / "cut" / "tokenizer.checkpoint.pt")["progress"][0] == saved
    both_ended(start_many(start, 2, tmp_path / "cut"), 2, 1)  # other flags
    cut = two("cut")
    both_ended(cut, 0, 0)
    both_ended(whole, 0, 0)
    assert ended(cut[1]) == ""  # the first speaks for both
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_gradients_are_added_up_in_one_order(monkeypatch):
    """DDP orders its buckets anew after a first step, unless it looks for unused parameters."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with mock.patch.object(torch.nn.parallel, "DistributedDataParallel") as wrap:
        train.wrapped("model", argparse.Namespace(compile=False))
    assert wrap.call_args.kwargs["find_unused_parameters"]


@pytest.mark.parametrize("stages, counts", [("tokenizer", (2, 3)), ("all", (2, 5))])
def test_processes_or_parts_are_one(base, start, tmp_path, stages, counts):
    """Two channels share a norm: AdamW steps by rounding where a gradient is 0."""
    lr, constants = 1e-4, dict(dial=partial(tiny_dial, channels=64))
    flags = [stages, "--lr", lr, "--batch", 16]
    if stages == "all":  # but for the tokenizer, lest tokens differ
        flags += ["--tokenizer", base / "tokenizer.pt"]
    processes = []
    for count, most, name in zip((1, 1, *counts), (99, 8, 4, 4), ("one", "parts", "few", "many")):
        given, hooks = [tmp_path / name, *flags], [partial(few, most)]
        processes += start_many(start, count, *given, hooks=hooks, **constants)
    for process in processes:
        ended(process)

    # of the tokenizer three steps: then rounding chooses another code
    most = 4 if stages == "tokenizer" else None
    metrics = lines_of(tmp_path / "one")
    for name in ("parts", "few", "many"):
        for path in tmp_path.glob("one/*.pt"):
            trained = torch.load(tmp_path / name / path.name)
            assert difference(trained, torch.load(path)) < 2 * lr, name  # Muon is in bf16
        for ours, line in zip(lines_of(tmp_path / name)[:most], metrics[:most], strict=True):
            for key, value in line.items():
                if key != "stage":
                    assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, key)
    if stages == "all":
        assert len({path.read_bytes() for path in tmp_path.glob("*/tokens.npy")}) == 1
        whole, before = (torch.load(tmp_path / "one" / f"{x}.pt") for x in ("hmar", "next-scale"))
        before = hmar.add_masked_branch(before, 1)
        assert difference(whole.pop("masked"), before.pop("masked")) > 1e-4
        assert difference(whole, before) == 0  # the rest stays


def share(out):
    train.start_processes("cpu")
    train.wrapped = lambda model, *_: model
    train.orthogonal = mock.Mock(wraps=train.orthogonal)
    toy_fit(toy_args(out))
    parts = {len(call.args[0]) for call in train.orthogonal.call_args_list}
    sys.exit(parts != {len(train.own_share(range(count))) for count in (3, 1)})


def test_processes_share_muon_to_the_last_bit(start, tmp_path):
    """Any number of processes goes on from a checkpoint."""
    for count in (1, 2, 3):
        hook = partial(share, tmp_path / str(count))
        for process in start_many(start, count, "", hooks=[hook]):
            ended(process)
    assert len({path.read_bytes() for path in tmp_path.glob("*/*.pt")}) == 1


def test_processes_wait_two_hours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with mock.patch.object(torch.distributed, "init_process_group") as init:
        train.start_processes("cpu")
    assert init.call_args.kwargs["timeout"].total_seconds() == 7200


def watched(monkeypatch, module, name):
    """[(result, arguments, options), ...] of the calls of a function."""
    function, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append((function(*arguments, **options), arguments, options))
        return calls[-1][0]

    monkeypatch.setattr(module, name, call)
    return calls


def test_no_network_sees_more_images_than_fit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "at_once", lambda pixels: 1)
    monkeypatch.setattr(train, "VIEWS_IN_ALL", 1)
    calls = [watched(monkeypatch, sample, "generate")]
    for name in ("encode_features", "decode_features"):
        calls.append(watched(monkeypatch, tokenizer, name))
    for name in ("next_scale_logits", "masked_logits", "next_scale_losses", "masked_losses"):
        calls.append(watched(monkeypatch, hmar, name))
    plans = watched(monkeypatch, train, "planned")
    run(tmp_path, "--steps", 1)
    assert [*plans[0][0]] == ["tokenizer", "encoding", "next-scale", "masked"]  # in time's order
    for own in calls:
        assert {len(x) for _, given, _ in own for x in given[1:] if torch.is_tensor(x)} == {1}


# The dial, memory and time


def test_the_dial_grows_by_its_laws():
    dials = [DIAL(depth, 256, 10**9) for depth in range(1, 31)]
    for small, large in itertools.pairwise(dials):
        assert small["batch"] <= large["batch"]
        for stage in train.STAGES:
            assert small["lr"][stage] > large["lr"][stage]
            assert small["steps"][stage] * small["batch"] < large["steps"][stage] * large["batch"]
    assert [dials[15]["codec"][name] for name in ("codes", "code_dim")] == [4096, 32]
    assert [dial["transformer"]["convolutions"] for dial in dials] == 7 * [True] + 23 * [False]
    few = DIAL(8, 32, 190)
    assert few["steps"]["next-scale"] * few["batch"] < 201 * 190  # epochs
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        sizes = DIAL(2, size, 100)["codec"]
        codec = tokenizer.init(**sizes)
        assert tokenizer.downsampling(codec) == cell
        assert sizes["fold"] == 2 and DIAL(2, size, 100)["perceptual"] == (size > 32)
        assert DIAL(3, size, 100)["codec"]["fold"] == 1 + (size > 32)
        tokenizer.check(codec)
    for dial, sides in zip(dials[1:], ([1, 2, 3, 6, 12], [1, 2, 3, 4, 6, 8, 12])):
        assert [h for h, _ in train.default_scales(48, 12, dial["growth"])] == sides


def test_parts_and_checkpointing_follow_from_the_memory(monkeypatch):
    changes = dict(device=torch.device("cuda"), size=256, scales=hmar.SCALES[256], depth=16)
    args = argparse.Namespace(batch=64, codec=dict(channels=1), **changes)
    image = 50 * 680 * 1024 * 16  # bytes, as computed costs say
    for free, expected in ((100, (1, False)), (24, (4, False)), (1, (64, True)), (2, (64, False))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * image, 0))
        assert train.fitting_parts(args, {}) == expected
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert train.fitting_parts(args, {}) == (10, True)  # of 10 or 11 images
    with pytest.raises(ValueError, match="--batch: got 4 images, fewer than the 6 processes"):
        asked_of_fit("masked")


def test_the_time_left_is_told(tmp_path, monkeypatch, capsys):
    """Of a stage by its steps, of the run by FLOPs; on a terminal in one line."""
    args = toy_args(tmp_path, steps=dict(tokenizer=100), stages=["tokenizer", "masked"])
    args.work = dict(tokenizer=500, encoding=400, masked=600)
    monkeypatch.setattr(train.time, "monotonic", lambda: 10.0)
    progress = train.Progress(args, "tokenizer", 20)
    monkeypatch.setattr(train.time, "monotonic", lambda: 50.0)
    for step in (39, 40):  # twenty steps, two seconds each
        progress.tick(step)
    progress.log(60, loss=0.5, many=[1])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress.tick(60)
    first, second, third = capsys.readouterr().out.split("\n")
    assert first == "tokenizer 40/100  0:02:00 left, 0:08:40 of the run  "
    assert second == "tokenizer 60/100  0:00:40 left, 0:04:00 of the run  loss 0.5"
    assert third == "\r\x1b[K" + second


# What the stages compute


def parts_of(folder):
    """Its training images, its held-out ones in [-1, 1], their labels."""
    args = argparse.Namespace(data=folder, size=16, flip=False)
    images, judged, _ = train.data_sets(args)
    pixels = torch.stack([judged[i, None, 0] for i in range(2)]) / 127.5 - 1
    return images, pixels, torch.tensor(judged.labels)


def plain_hues(images):
    red, green, blue = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)).unbind(1)
    return red - blue, 2 * green - red - blue


def plain_texture(images):
    ones = torch.ones(3, 1, 3, 3)
    sums, counts = (F.conv2d(x, ones, padding=1, groups=3) for x in (images, images * 0 + 1))
    squares = (images - sums / counts).square().sum(1)
    return (squares.unflatten(2, (4, 4)).unflatten(1, (4, 4)).mean((2, 4)) + 1e-4).sqrt()


def plain_perceptual(levels, *pair):
    for level in levels:
        pair = [level(x) for x in pair]
        one, other = (F.normalize(x) for x in pair)
        yield (one - other).square().sum(1).mean()
        pair = [F.avg_pool2d(x, 2) for x in pair]


def test_the_tokenizer_learns_from_all_errors(run, folder, tmp_path, monkeypatch):
    learned = watched(monkeypatch, train, "learned_levels")
    calls = watched(monkeypatch, tokenizer, "training_pass")
    run(tmp_path, "tokenizer", "--steps", 5, "--batch", 8)
    variance = sum(hue.var(correction=0) for hue in plain_hues(parts_of(folder)[1]))
    stops = []
    for (passed, (_, images, _, own), _), line in zip(calls, lines_of(tmp_path, name="loss")):
        stops += own.tolist()
        rest = passed["images"] - images
        expected = rest.square().mean() + 0.5 * rest.abs().mean() + passed["loss"]
        for dim in (2, 3):
            expected += 0.25 * rest.diff(dim=dim).abs().mean()
        grain = plain_texture(passed["images"]) - plain_texture(images)
        expected += 0.5 * grain.abs().mean()
        expected += 0.08 * sum(plain_perceptual(learned[0][0], passed["images"], images))
        lost = sum(hue.square().mean() for hue in plain_hues(rest))
        expected += 0.28 * lost / (variance + 0.02)
        coarse = F.mse_loss(passed["coarse"], images[::4])
        assert line["coarse"] == pytest.approx(coarse.item(), rel=1e-4)
        assert line["loss"] == pytest.approx((expected + 0.5 * coarse).item(), rel=1e-4)
    assert len(stops) == 10 and set(stops) == {0, 1}  # a quarter, no last


def test_dead_codes_and_moments_are_replaced(run, tmp_path, monkeypatch):
    def forgotten(optimizer, leaf, rows):
        forget(optimizer, leaf, rows)
        (new, dead), (_, counts, *_), _ = revived[-1]
        assert torch.equal(dead, counts == 0) and 0 < dead.sum() < 128
        assert torch.equal(leaf, new) and torch.equal(rows, dead)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal((optimizer.adamw.state[leaf][name] == 0).all(1), dead)
        sums.append(int(counts.sum()))

    sums, forget = [], train.Optimizer.forget
    revived = watched(monkeypatch, tokenizer, "revive_codes")
    monkeypatch.setattr(train, "dial", partial(tiny_dial, codes=128))
    monkeypatch.setattr(train.Optimizer, "forget", forgotten)
    run(tmp_path, "tokenizer", "--batch", 2)
    assert sums == [2 * 81 * n for n in (1, 3, 4)]  # at steps 1, 4 and 8, not after 80 %


def test_held_out_numbers_are_of_saved_weights(base, folder):
    _, images, labels = parts_of(folder)
    codec, params = torch.load(base / "tokenizer.pt"), torch.load(base / "hmar.pt")
    tokens = tokenizer.encode(codec, images, SCALES)
    errors = tokenizer.decode(codec, tokens, SCALES) - images
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    logits = hmar.next_scale_logits(params, labels, inputs)
    surprise = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    mask = torch.rand(len(images), 80, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    logits = hmar.masked_logits(params, labels, inputs, own_inputs, mask)[:, 1:][mask]
    hidden = tokens[:, 1:][mask]

    best = {}
    expected = errors.square().mean(), surprise, F.cross_entropy(logits, hidden)
    for stage, loss in zip(train.STAGES, expected):
        lines = lines_of(base, stage, "held_out_loss")
        best[stage] = min(lines, key=lambda line: line["held_out_loss"])
        assert best[stage]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    hits = (logits.argmax(-1) == hidden).float().mean().item()
    assert best["masked"]["held_out_accuracy"] == pytest.approx(hits)
    for k, own in enumerate(tokens.split([1, 16, 64], 1)):
        share = torch.bincount(own.flatten()).double() / own.numel()
        perplexity = torch.special.entr(share).sum().exp().item()
        assert best["tokenizer"]["held_out_perplexity"][k] == pytest.approx(perplexity, rel=1e-4)


def test_labels_masks_and_losses_of_the_stages():
    codec = tokenizer.init(**CODEC_SIZES)
    for name in ("next_scale", "masked"):
        params, loss, batches = asked_of_fit(name, SCALES, torch.float32, batch=50, steps=10)
        params = pytree.tree_map(torch.Tensor.float, scrambled(params))
        labels, tokens, *masked = batches[0].values()
        given = [params, labels, tokens, tokenizer.next_scale_inputs(codec, tokens, SCALES)]
        if name == "masked":
            given += [tokenizer.masked_inputs(codec, tokens, SCALES, masked[0]), masked[0]]
            expected = hmar.masked_losses(*given).mean()
        else:
            by_scale = hmar.next_scale_losses(*given).split([1, 16, 64], 1)
            expected = sum(losses.mean() for losses in by_scale) / 3
        torch.testing.assert_close(loss(params, **batches[0])[0], expected)

    ratios = torch.cat([batch["mask"].float().mean(1) for batch in batches])
    assert np.histogram(ratios, 4, (0, 1))[0].min() > 90
    labels = torch.cat([batch["labels"] for batch in batches])
    assert 25 < (labels == 3).sum() < 85  # a tenth


def test_a_small_folder_is_encoded_in_several_crops(base, run, folder, tmp_path, monkeypatch):
    images, *_ = parts_of(folder)
    path = base / "tokenizer.pt"
    for most, flip, views in ((20_000, False, 16), (84, False, 3), (5, False, 1), (5, True, 2)):
        monkeypatch.setattr(train, "VIEWS_IN_ALL", most)
        out, images.flip = tmp_path / f"{most} {flip}", flip
        run(out, "--steps", 1, "--tokenizer", path, *["--flip"] * flip)
        tokens = np.load(out / "tokens.npy")
        assert tokens.shape == (28, views, 81) and tokens.dtype == np.uint8
        for view in range(min(3, views)):
            keys = [(i, (0, view, i) if view else None, view) for i in range(28)]
            pixels = torch.stack([images[key] for key in keys]) / 127.5 - 1
            expected = tokenizer.encode(torch.load(path), pixels, SCALES)
            assert np.array_equal(tokens[:, view], expected), view


def save_params(path, codes=16):
    sizes = dict(width=32, classes=5, codes=codes, code_dim=8, depth=3, scales=SCALES, seed=5)
    params = hmar.add_masked_branch(hmar.init(**sizes), 2)
    torch.save(params, path)
    return params


def test_init_fits_classes_scales_and_branches(tmp_path, capsys):
    def started(*flags, classes=5, stage="next-scale"):
        flags = [stage, *FLAGS, "--init", str(tmp_path / "init.pt"), *flags]
        args = train.parser().parse_args(flags)
        given = train.load_given(args)
        args = train.resolved(args, torch.device("cpu"), given, 30)
        return train.fitted(args, given["next-scale"], classes), capsys.readouterr().out

    params = save_params(tmp_path / "init.pt")
    same, said = started()
    assert said == "" and "masked" not in same and same["next_scale"]["blocks"] == []
    assert difference(same["trunk"], params["trunk"] + params["next_scale"]["blocks"]) == 0
    fewer, said = started(classes=2)
    assert said == "--init: a new class embedding for 2 classes\n"
    assert fewer["classes"].shape == (3, 32) and difference(fewer["trunk"], same["trunk"]) == 0
    other, said = started("--size", "4", "--scales", "1", "2")
    assert said == "--init: positions resampled for the scales ((1, 1), (2, 2))\n"
    assert hmar.scales(other) == ((1, 1), (2, 2))
    assert started(stage="all")[1] == "--init: without --tokenizer its codes get new meanings\n"


def test_a_wrong_init_leaves_nothing(run, tmp_path, monkeypatch, refused):
    encoded = watched(monkeypatch, train, "encoded")
    out, init, flags = tmp_path / "run", tmp_path / "a.pt", ["--steps", 1, "--lr", 1e-9, "--init"]
    save_params(init, codes=32)
    for wrong, said in (
        (tmp_path / "missing.pt", "missing or no regular file"),
        (tmp_path, "missing or no regular file"),
        (init, "got (codes, code_dim) (32, 8), expected the tokenizer's (16, 8)"),
    ):
        assert said in refused(out, *flags, wrong)
        assert not encoded and not out.exists()
    params = save_params(init)
    run(out, *flags, init)
    assert difference(torch.load(out / "hmar.pt")["levels"], params["levels"]) < 1e-6
    run(out, *flags, shutil.move(init, tmp_path / "b.pt"))
    assert "other flags or images: --init " in refused(out, *flags[:-1])


def test_a_given_tokenizer_is_taken_or_trained_on(run, tmp_path, monkeypatch, refused, capsys):
    out, given = tmp_path / "run", tmp_path / "given.pt"
    torch.save(CODEC, given)
    run(out, "--steps", 1, "--tokenizer", given)
    assert difference(torch.load(out / "tokenizer.pt"), CODEC) == 0
    assert {line["stage"] for line in lines_of(out)} == {"next-scale", "masked"}
    run(out, "--steps", 1, "--tokenizer", shutil.copy(given, tmp_path / "copy.pt"))
    assert "other flags or images: --tokenizer " in refused(out, "--steps", 1)

    calls = watched(monkeypatch, hmar, "branch_features")
    run(tmp_path / "var", "--steps", 1, "--causal", "--tokenizer", given)
    for _, _, options in calls:  # to train, to judge, to draw
        assert options.get("is_causal") or options.get("cache"), options
    assert not (tmp_path / "var/hmar.pt").exists()

    revived = watched(monkeypatch, tokenizer, "revive_codes")
    run(tmp_path / "other", "tokenizer", "--steps", 1, "--lr", 1e-6, "--init", given)
    trained = torch.load(tmp_path / "other" / "tokenizer.pt")
    assert 0 < difference(trained["encoder"], CODEC["encoder"]) < 1e-4
    assert difference(trained["codebook"], CODEC["codebook"]) < 1e-4 and not revived
    assert "sample.py" not in capsys.readouterr().out.rpartition("finished")[2]


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
    for name in ("tokens.npy", "next-scale.pt", "hmar.pt"):
        (out / name).unlink()
    with mock.patch.object(train, "encoded", side_effect=[torch.zeros(64, 81), OSError]):
        run(out, status=2)
    assert not list(out.glob("tokens*"))
    run(out)
    assert contents(out) == contents(base)


def test_other_flags_or_images_are_refused(base, out, run, folder, tmp_path, refused):
    assert refused(out, "--seed", 3, "--flip", "--depth", 3) == (
        f"train.py: {out}: begun with other flags or images: depth 2 -> 3, flip False -> True, "
        "seed 0 -> 3; give another --out, or remove the folder"
    )
    data = shutil.copytree(folder, tmp_path / "data")
    run(out, "--workers", 1, "--data", data)
    image = data / "disc/000.png"
    for change in (
        partial(image.write_bytes, b"longer"),
        partial(image.rename, data / "disc/x.png"),
    ):
        change()
        assert "begun with other flags or images: images " in refused(out, "--data", data)
    assert contents(out) == contents(base)


def test_what_has_no_record_is_refused(tmp_path, refused):
    for name in (*train.STAGES.values(), "tokens.npy", "masked.checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
        line = refused(tmp_path, "tokenizer")
        assert line == f"train.py: {tmp_path}: holds files of another program; give another --out"
        assert contents(tmp_path) == {"lock": b"", name: b"mine"}
        (tmp_path / name).unlink()


def test_no_transformer_meets_another_tokenizer(out, run, refused):
    (out / "hmar.pt").unlink()
    torch.save(CODEC, out / "tokenizer.pt")
    assert refused(out) == (
        f"train.py: {out}/tokens.npy, {out}/next-scale.pt: made with another tokenizer than "
        "tokenizer.pt; remove them"
    )
    (out / "tokens.npy").unlink()
    assert f"{out}/next-scale.pt: made with another" in refused(out)
    (out / "next-scale.pt").unlink()
    run(out)


def test_tokens_of_other_images_are_refused(out, refused):
    (out / "hmar.pt").unlink()
    np.save(out / "tokens.npy", np.load(out / "tokens.npy")[1:])
    assert "tokens.npy: got" in refused(out)


def test_a_folder_takes_one_process_at_a_time(base, out, run, refused, monkeypatch):
    with train.lock_folder(out):
        assert refused(out) == f"train.py: {out}: another process works there"
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "none")))
    (out / "masked.checkpoint.pt").touch()  # left by a kill
    run(out)  # a file system without locks
    assert contents(out) == contents(base)


def test_damaged_files_are_told_or_mended(base, out, run, refused):
    path, junk = out / "tokenizer.checkpoint.pt", b'5\n[]\n{"step": 1}\n'
    (out / "tokenizer.pt").unlink()
    (out / "metrics.jsonl").write_bytes(junk + b'{"stage": "tok')  # half a line
    for state in ([], 999 * [torch.zeros(1)]):
        torch.save(dict(state=state, progress=(1, 1, 1.0), window=[]), path)
        said = f"{path}: expected this stage's; removed, the stage begins anew"
        assert refused(out, "tokenizer") == f"train.py: {said}"
    path.unlink()
    run(out, "tokenizer")
    own, _, _ = (base / "metrics.jsonl").read_bytes().partition(b'{"stage": "next-scale"')
    assert (out / "metrics.jsonl").read_bytes() == junk + own


BAD = [
    ("--step-s=3", "unrecognized arguments: --step-s=3"),
    ("--data broken --workers 2", "--data: no held-out image can be read"),
    ("--size 15", "--size: got 15, expected a multiple of 2"),
    ("--batch 0", "--batch: got 0, expected 1 to"),
    ("--lr 0", "--lr: got 0.0, expected above 0"),
    ("--lr nan", "loss or gradient is not finite at step 1"),
    ("--tokenizer codec.pt --init codec.pt", "got a tokenizer beside --tokenizer"),
    ("--depth 2 --init params.pt", "--depth: got 2, but --init decides it"),
    ("masked", "next-scale.pt: no weights that can be read: FileNotFoundError"),
    ("--out file.txt", "file.txt"),
    ("--out=", "--out: got '', expected a folder"),
]


@pytest.mark.parametrize("flags, said", BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, run, refused, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    for name in ("broken/a.png", "broken/b.png", "file.txt"):
        Path(name).write_text("text")
    torch.save(CODEC, "codec.pt")
    save_params("params.pt")
    assert said in refused("run", "--steps", 1, *flags.split())
    assert not list(Path("run").rglob("*.pt"))
    run("run", "tokenizer", "--steps", 1)
