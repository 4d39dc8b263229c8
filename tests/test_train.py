"""Training: nothing is lost, processes are one, what a step computes, settings, wrong flags."""

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
import threading
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NumberedImages,
    contents,
    failure,
    leaves_equal,
    random_tokens,
    refused,
    small_codec,
    stages_of,
    stages_that_only_read,
    tree,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

FLAGS = ["--size", 16, "--depth", 1, "--batch", 4, "--steps", 24, "--set", "channels=32"]
FLAGS += ["--dtype", "fp32", "--device", "cpu", "--data", "data"]
SHORT = ["--steps", 1, "--lr", 1e-9]
STAGES = "tokenizer", "decoder", "next-scale", "masked"
SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels
CODEC = small_codec(attention=False, seed=7)  # cells of two pixels
FOLDED = small_codec(attention=False, fold=2, seed=7)  # cells of four pixels
CPU = torch.device("cpu")
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
    for index in range(60):
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


def interrupted(process, line, printing=None):
    """What a process printed until Ctrl-C, which comes after a line of it or of another one."""
    printing = printing or process
    while printing.is_alive() and line not in Path(printing.log).read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    return ended(process, 1)


def run(out, *flags):
    """The line with which the command fails, or None."""
    return failure(train.main, *FLAGS, "--out", out, *flags)


def results(out):
    """{name: bytes} of a run folder, without metrics.jsonl, whose lines may repeat after a kill."""
    return {name: data for name, data in contents(out).items() if name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, folder):
    """A run folder of all stages that nobody interrupted."""
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


def test_a_run_learns_and_leaves_a_folder(base, folder):
    said, record = base.with_name("said").read_text(), (base / "args.json").read_text()
    assert f"{base}: HMAR of depth 1, 57 images to train on, 3 held out, 3 classes; cpu" in said
    assert re.search(r"next-scale 16/24  0:00:\d\d left, of the run 0:00:\d\d  loss \d", said)
    assert f"{base}/samples/masked.png is written" in said
    assert str(folder) not in record and str(base) not in record  # both may move
    for stage, name in zip(STAGES, ("error", "error", "loss", "loss")):
        losses = [line[f"held_out_{name}"] for line in lines_of(base, stage, f"held_out_{name}")]
        assert len(losses) == len(lines_of(base, stage, name)) == 3
        # The decoder's stage begins with a trained decoder and takes up another term.
        assert losses[-1] < (1.1 if stage == "decoder" else 1) * losses[0]
    names = "args.json metrics.jsonl model.pt"
    names += " samples/masked.png samples/next-scale.png samples/reconstructions.png"
    assert sorted(contents(base)) == names.split()

    model = sample.load_model(base)
    assert model["classes"] == sorted(train.SHAPES[:3])
    trees = model["tokenizer"], model["transformer"]
    assert all(type(leaf) is torch.Tensor for leaf in pytree.tree_leaves(trees))
    assert "masked" in model["transformer"] and "causal" not in model["transformer"]


# Kills and Ctrl-C


def test_kills_at_random_moments_change_nothing(base):
    """Nor does it change anything if the run and its data are moved."""
    data, out = shutil.copytree("data", "copy"), "run"
    for number in itertools.count(1):
        process = start(out, "--data", data, seconds=random.uniform(0.01, number / 2))
        process.join()
        if process.exitcode == 0:
            break
        ended(process, -signal.SIGALRM)
        data = shutil.move(data, f"data {number}")
        if os.path.exists(out):
            out = shutil.move(out, f"run {number}")
    assert number > 2
    written = {name: data for name, data in results(out).items() if not name.endswith(".tmp")}
    assert written == results(base)


def test_ctrl_c_saves_and_the_same_command_goes_on(base):
    lines = "tokenizer 8/24", "decoder: 0.", "next-scale 8/24", "masked 8/24"
    for stage, line in zip(STAGES, lines):
        said = interrupted(start("run"), line)
        last = said.strip().splitlines()[-1]
        stop = rf"train.py: stopped at step (\d+) of {stage}; the same command goes on from there"
        step = int(re.fullmatch(stop, last).group(1))
        saved = torch.load("run/checkpoint.pt")
        assert (saved["stage"], saved["state"]["step"]) == (stage, step)
    ended(start("run"))
    assert results("run") == results(base)
    # And nothing is done twice.
    ours, theirs = ([(x["stage"], x["step"]) for x in lines_of(out)] for out in ("run", base))
    assert ours == theirs


def test_a_second_ctrl_c_stops_at_once_and_afterwards_it_is_pythons_again():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.catch_interrupt() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_is_replaced_as_a_whole_or_not_at_all():
    def write(file, content, error=None):
        file.write(content)
        file.flush()
        assert path.read_bytes() == expected  # others see the old one meanwhile
        if error:
            raise error

    path, expected = Path("file"), b"old"
    path.write_bytes(expected)
    with pytest.raises(OSError, match="disk full"):
        train.write_file(path, partial(write, content=b"ne", error=OSError("disk full")))
    assert path.read_bytes() == b"old"
    train.write_file(path, partial(write, content=b"new"))
    assert path.read_bytes() == b"new"


# The loops


def examples_of(scales, codes=16, steps=6, batch=4, classes=3):
    """[(labels, tokens), ...] at random."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(classes, (batch,), generator=generator),
            random_tokens(batch, scales, codes, i),
        )
        for i in range(steps)
    ]


def small_tree(is_masked=False, scales=((1, 1), (2, 2), (4, 4)), **options):
    options = dict(convolutions=True, neighbours=True, seed=3) | options
    sizes = dict(codes=16, code_dim=8, depth=2, masked=int(is_masked), random=False)
    return tree(scales=scales, **sizes | options)


def written_out(tree, steps, peak, decay, step_loss, after=lambda *_: None):
    """A tree after so many steps of step_loss(tree, step)."""
    trained = pytree.tree_map(lambda leaf: torch.nn.Parameter(leaf.clone()), tree)
    leaves = pytree.tree_leaves(trained)
    optimizers = train.new_optimizers(trained, decay)
    for step in range(1, steps + 1):
        step_loss(trained, step).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        rate = min(step / (0.06 * steps), 1, (steps + 1 - step) / steps / 0.6)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        after(trained, step)
    return pytree.tree_map(torch.Tensor.detach, trained)


@pytest.mark.parametrize(("weights", "dropout"), [("token", 0.0), ("lognormal", 0.3)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_transformers_loop_equals_one_written_out(is_masked, weights, dropout):
    params = small_tree(is_masked)
    scales, stage = hmar.scale_sizes(params), "masked" if is_masked else "next-scale"
    examples = examples_of(scales)
    options = dict(steps=6, lr=0.01, decay=0.3, seed=5)
    more = dict(evaluations=1, label_drop=0.4, loss_weights=weights)
    more |= dict(dropout=dropout)
    ours = train.train_transformer(params, CODEC, iter(examples), examples[0], **options, **more)

    def step_loss(trained, step):
        labels, tokens = examples[step - 1]
        generator = train.generator_of(5, stage, step)
        labels = torch.where(torch.rand(4, generator=generator) < 0.4, 3, labels)
        dropped.append(labels == 3)
        given = params | trained, labels, tokens, tokenizer.next_scale_inputs(CODEC, tokens, scales)
        torch.manual_seed(train.seed_of(5, stage, step, "dropout", 0))
        if not is_masked:
            losses = hmar.losses(*given, dropout=dropout).mean(0)
            return (losses * hmar.scale_weights(scales, weights)).sum()
        shares = torch.rand(4, 1, generator=generator)
        mask = torch.rand(4, 20, generator=generator) < shares
        own_inputs = tokenizer.masked_inputs(CODEC, tokens, scales, mask)
        losses = hmar.losses(*given, own_inputs, mask, dropout=dropout)
        return losses.sum() / 40  # half of all are hidden

    trained, dropped = dict(masked=params["masked"]) if is_masked else params, []
    theirs = written_out(trained, 6, 0.01, 0.3, step_loss)
    assert difference(ours, params | theirs) < 1e-6 < difference(ours, params)
    assert 3 < torch.cat(dropped).sum() < 18


@pytest.mark.parametrize("decoder_only", [False, True])
def test_the_tokenizers_loop_equals_one_written_out(decoder_only):
    dataset, scales = NumberedImages(30), SCALES
    images = torch.stack([torch.from_numpy(np.array(image)) for image, _ in zip_images(dataset)])
    images = images.permute(0, 3, 1, 2).split(6)  # five batches
    codec = small_codec(codes=64, attention=False, fold=2, seed=3)
    batches = zip(images, itertools.repeat("anything"))
    options = dict(steps=5, lr=0.01, decay=0.3, evaluations=1, seed=5)
    options |= dict(decoder_only=decoder_only, hue_variance=0.1)
    ours = train.train_tokenizer(codec, batches, images[0], scales, **options)
    stage = "decoder" if decoder_only else "tokenizer"

    def step_loss(trained, step):
        pixels = images[step - 1] / 127.5 - 1
        stops = torch.randint(3, (6,), generator=train.generator_of(5, stage, step))
        coarse = torch.tensor([0, 4])
        given = codec | trained, pixels, scales, coarse, stops[coarse]
        result.append(tokenizer.training_loss(*given, hue_variance=0.1, images_per_coarse=6 / 2))
        return result[-1]["loss"]

    @torch.no_grad()
    def revive(trained, step):
        if step == 1 and not decoder_only:
            tokens = torch.cat([x.flatten() for x in result[0]["tokens"]])
            dead = tokens.bincount(minlength=64) == 0
            vectors = torch.cat([x.flatten(0, 1) for x in result[0]["residuals"]])
            rows = torch.randint(len(vectors), (64,), generator=train.generator_of(5, "revive", 1))
            assert dead.any() and not dead.all()
            trained["codebook"][dead] = vectors[rows][dead]

    result, names = [], ("post_quant_conv", "decoder") if decoder_only else codec.keys()
    trained = {name: codec[name] for name in names}
    theirs = written_out(trained, 5, 0.01, 0.3, step_loss, revive)
    assert difference(ours, codec | theirs) < 1e-6 < difference(ours, codec)


def zip_images(dataset):
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_batch_of_tokens_in_parts_is_one_batch(is_masked, monkeypatch):
    params, losses = small_tree(is_masked), []
    examples = examples_of(hmar.scale_sizes(params), steps=3, batch=5)
    for count in (5, 2):
        monkeypatch.setattr(sample, "images_at_once", lambda pixels, count=count: count)
        out = Path(f"{count}")
        out.mkdir()
        options = dict(steps=3, lr=1e-4, evaluations=3, out=out, classes=[*"abc"])
        train.train_transformer(params, CODEC, iter(examples), examples[0], **options)
        lines = lines_of(out)
        for line in lines:
            if "class_gain" in line:  # a difference of two losses: here rounding is all of it
                line["class_gain"] += line["held_out_loss"]
        losses.append([list(line.values())[2:] for line in lines])
    flat = [np.hstack([np.hstack(line) for line in run]) for run in losses]
    np.testing.assert_allclose(*flat, rtol=2e-4)


def test_a_batch_of_images_in_parts_is_one_batch(monkeypatch):
    images, losses = drawings(10), []
    for count in (10, 4):
        monkeypatch.setattr(sample, "images_at_once", lambda pixels, count=count: count)
        out = Path(f"{count}")
        out.mkdir()
        options = dict(steps=2, lr=1e-5, evaluations=2, out=out)
        batches = itertools.repeat((images, None))
        train.train_tokenizer(FOLDED, batches, images[:5], SCALES, **options)
        losses.append([line for line in lines_of(out)])
    for ours, theirs in zip(*losses, strict=True):
        for name in ours.keys() - {"stage", "held_out_perplexity"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def overfit(out=None, stop_at=None, stop=None, steps=24, evaluations=24, **more):
    """Trains on tokens that are all 0; three of ten held-out tokens are 1.

    The held-out loss falls until code 1 is less likely than that. Returns the tree and the numbers
    of the steps that it was trained on.
    """
    scales, seen = ((1, 1), (2, 2)), []
    held_out = torch.zeros(20, 5, dtype=torch.int64)
    held_out[:6] = 1

    def batches(done):
        for step in itertools.count(done + 1):
            seen.append(step)
            if step == stop_at and stop is None:
                raise SystemExit
            if step == stop_at:
                stop.set()
            yield torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)

    if out is not None:
        out = Path(out)
        out.mkdir(exist_ok=True)
    params = small_tree(scales=scales, depth=1, convolutions=False, neighbours=False)
    held_out = torch.zeros(20, dtype=torch.int64), held_out
    options = dict(steps=steps, lr=0.02, label_drop=0.0, evaluations=evaluations)
    options |= dict(classes=[*"abc"], out=out, stop=stop) | more
    return train.train_transformer(params, CODEC, batches, held_out, **options), seen


def held_out_losses(out):
    return [line["held_out_loss"] for line in lines_of(out, name="held_out_loss")]


def test_kills_of_a_stage_change_nothing():
    """And it returns the weights at its end, although the held-out loss was lower before."""
    whole, seen = overfit("whole")
    losses = held_out_losses("whole")
    assert seen == [*range(1, 25)] and min(losses) < 0.9 * losses[-1]
    tokens = torch.zeros(10, 5, dtype=torch.int64)
    tokens[:3] = 1
    inputs = tokenizer.next_scale_inputs(CODEC, tokens, ((1, 1), (2, 2)))
    loss = hmar.losses(whole, torch.zeros(10, dtype=torch.int64), tokens, inputs).mean().item()
    assert loss == pytest.approx(losses[-1], rel=1e-4)

    for step in (10, 23):
        with pytest.raises(SystemExit):
            overfit("cut", stop_at=step)
        assert torch.load("cut/checkpoint.pt")["state"]["step"] == step - 1
    cut, seen = overfit("cut")
    assert difference(cut, whole) == 0 and seen == [23, 24]
    for _ in range(2):  # afterwards it is over
        again, seen = overfit("cut")
        assert difference(again, whole) == 0 and seen == []
    lines = [
        {(line["step"], len(line)): line for line in lines_of(out)} for out in ("cut", "whole")
    ]
    assert lines[0] == lines[1]


def test_a_stage_that_is_told_to_stop_saves_after_its_step(capsys):
    whole, _ = overfit("whole", evaluations=1)
    with pytest.raises(KeyboardInterrupt, match="step 5 of next-scale; the same command goes on"):
        overfit("cut", stop_at=5, stop=threading.Event(), evaluations=1)
    cut, seen = overfit("cut", evaluations=1)
    assert seen[0] == 6 and difference(cut, whole) == 0
    with pytest.raises(KeyboardInterrupt, match="step 5 of next-scale; nothing is saved"):
        overfit(stop_at=5, stop=threading.Event())
    errors = FloatingPointError, KeyboardInterrupt  # of which the second would end the tests
    with pytest.raises(errors, match="step 9: the loss or gradient is not finite"):
        overfit("infinite", stop_at=9, stop=threading.Event(), lr=1e30, evaluations=1)
    assert not os.path.exists("infinite/checkpoint.pt")


@pytest.mark.parametrize("seconds, saved", [(300, 0), (0, 3)])
def test_a_run_is_saved_after_so_many_seconds_at_a_line(monkeypatch, seconds, saved):
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
    with pytest.raises(SystemExit):
        overfit("run", stop_at=5, evaluations=1)
    _, seen = overfit("run", evaluations=1)
    assert seen[0] == saved + 1
    lines = [line["step"] for line in lines_of("run", name="loss")]
    assert lines == [3, *range(saved + 3, 25, 3)]


def test_what_is_not_finite_is_not_saved():
    for _ in range(2):  # the same command says so again
        line = run("run", "--lr", 1e30)
        assert re.search(r"tokenizer, step \d+: the loss or gradient is not finite", line)
        assert not {"run/model.pt", "run/checkpoint.pt"} & contents(".").keys()


def test_a_stage_refuses_what_it_would_silently_get_wrong():
    """Images that are no bytes, which would be almost black; a checkpoint of another stage."""
    with pytest.raises(ValueError, match="images: got torch.float32, expected uint8"):
        train.to_unit(torch.rand(1, 3, 8, 8))
    params = small_tree()
    examples = examples_of(hmar.scale_sizes(params))
    stage = partial(train.train_transformer, params, CODEC, held_out=examples[0], out="alone")
    stage(iter(examples), steps=2, lr=0.01)
    for other in (dict(steps=3, lr=0.01), dict(steps=2, lr=0.02), dict(steps=2, lr=0.01, seed=1)):
        with pytest.raises(ValueError, match="of a stage with other steps, lr or seed"):
            stage(iter(examples), **other)


def test_a_checkpoint_saves_whatever_is_in_the_state():
    """A discriminator beside a tokenizer, with an optimizer of its own, which was killed."""

    def new_networks():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]

    def train_both(out, last):
        generator, discriminator = new_networks()
        networks = [{"weight": net.weight, "bias": net.bias} for net in (generator, discriminator)]
        state = train.new_state(networks[0], 0.05, 5)
        state["discriminator"] = networks[1]
        state["discriminator_optimizer"] = torch.optim.AdamW(discriminator.parameters(), lr=0.01)
        state["margins"] = [0.5, torch.zeros(2)]
        train.begin_stage(out, "both", state, steps=6, later=0)
        while state["step"] < last:
            step = state["step"] = state["step"] + 1
            x = torch.randn(2, 3, 4, 4, generator=train.generator_of("both", step))
            real, fake = discriminator(x).mean(), discriminator(generator(x).detach()).mean()
            (F.softplus(-real) + F.softplus(fake)).backward()
            train.optimizer_step([state["discriminator_optimizer"]], 0.01)
            F.softplus(-discriminator(generator(x)).mean()).backward()
            train.optimizer_step(state["optimizers"], 0.01)
            state["discriminator_optimizer"].zero_grad()
            state["margins"] = [0.9 * state["margins"][0], state["margins"][1] + real.detach()]
            train.save_checkpoint(out, "both", state)
        return state

    for name in ("whole", "cut"):
        Path(name).mkdir()
    whole = train_both(Path("whole"), 6)
    train_both(Path("cut"), 3)
    cut = train_both(Path("cut"), 6)
    saved = [torch.load(f"{name}/checkpoint.pt")["state"] for name in ("cut", "whole")]
    assert saved[0].keys() == saved[1].keys() >= {"discriminator", "discriminator_optimizer"}
    leaves = [pytree.tree_leaves(state) for state in saved]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*leaves, strict=True))
    for name in ("tree", "discriminator"):
        assert difference(cut[name], whole[name]) == 0
    assert cut["margins"][0] == whole["margins"][0] < 0.3
    for ours, theirs in zip(cut["discriminator"].values(), new_networks()[1].parameters()):
        assert not torch.equal(ours, theirs)
    other = train.new_state(whole["tree"], 0.05, 5)
    train.load_checkpoint(Path("cut"), "another stage", other)
    assert other["step"] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_a_checkpoint_that_was_read_can_be_replaced():
    """Windows replaces no file that is mapped into memory."""
    Path("run").mkdir()
    for _ in range(2):
        leaf = torch.nn.Parameter(torch.ones(300, 300))
        state = train.new_state(dict(qkv=leaf, other=torch.nn.Parameter(torch.ones(90_000))), 0, 5)
        train.load_checkpoint(Path("run"), "stage", state)
        assert f"{Path('run').resolve()}/checkpoint.pt" not in Path("/proc/self/maps").read_text()
        for leaf in state["tree"].values():
            leaf.grad = torch.ones_like(leaf)
        train.optimizer_step(state["optimizers"], 0.1)
        train.save_checkpoint(Path("run"), "stage", state)


# Muon


def test_muon_has_full_convolutions_and_the_matrices_of_blocks():
    inner = [(96, 32), (32, 32), (128, 32), (32, 128)]  # attention, then mlp
    small = [(32, 4, 3, 3), (64, 32), (32, 64), *inner]  # the input, what looks at neighbours
    for options, expected in ((dict(convolutions=True, neighbours=True), small), ({}, inner)):
        params = tree(depth=1, masked=0, random=False, **options)
        leaves = pytree.tree_leaves(params)
        muon, adamw = train.new_optimizers(params, 0)
        ours, others = (optimizer.param_groups[0]["params"] for optimizer in (muon, adamw))
        assert sorted(tuple(leaf.shape) for leaf in ours) == sorted(expected)
        assert {id(leaf) for leaf in ours + others} == {id(leaf) for leaf in leaves}
        assert adamw.defaults["betas"] == (0.9, 0.95) and adamw.defaults["weight_decay"] == 0
    muon, adamw = (
        optimizer.param_groups[0]["params"] for optimizer in train.new_optimizers(CODEC, 0)
    )
    assert all(leaf.ndim == 4 for leaf in muon) and all(leaf.ndim < 4 for leaf in adamw)
    added = torch.zeros(2, 2)  # a leaf that somebody adds
    _, adamw = train.new_optimizers(dict(qkv=torch.zeros(2, 2), projection=added), 0)
    assert adamw.param_groups[0]["params"] == [added]


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_newton_schulz_is_a_polynomial_of_singular_values(count, rows, columns, iterations):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(count, rows, columns, dtype=torch.float64, generator=generator)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = left * values[:, None] @ right
    assert difference(train.orthogonalize(matrices, iterations), expected) < 1e-12


# Some have one shape as matrices, and are updated together. Their sides are even, as in a model:
# products of several odd matrices may be rounded in another way.
SHAPES = (5, 9), (9, 5), (7, 7, 3, 3), (8, 16), (16, 8), (8, 16), (8, 4, 2, 2)


def test_muon_in_bf16_is_torchs_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in SHAPES]
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
        muon, _ = train.new_optimizers(dict(qkv=torch.zeros(2, 3), bias=torch.zeros(3)), 0)
        assert muon.dtype == dtype


# Several processes are one


def environments(count):
    """What torchrun tells so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [dict(common, RANK=str(rank)) for rank in range(count)]


def start_several(count, *flags):
    return [start(*flags, **environment) for environment in environments(count)]


def test_four_processes_are_one_and_go_on_when_one_is_killed():
    """But for rounding: Muon multiplies in bf16, AdamW steps by its sign where a gradient is 0."""
    flags = ["--lr", 1e-5, "--batch", 8, "--set", "tokenizer_steps=24"]
    # Each process has random numbers of its own for dropout.
    flags += ["next_scale_steps=12", "masked_steps=12", "dropout=0.0"]
    ended(start("one", *flags))
    first, *others = start_several(4, "four", *flags)
    ended(first)
    for process in others:
        assert ended(process) == ""  # only the first prints
    for line, other in zip(lines_of("one"), lines_of("four"), strict=True):
        for key, value in line.items():
            close = pytest.approx(value, rel=2e-3, abs=2e-3) if key != "stage" else value
            assert "perplexity" in key or other[key] == close, key
    models = [sample.load_model(run) for run in ("one", "four")]
    for name in ("tokenizer", "transformer"):
        assert difference(*(model[name] for model in models)) < 2e-3, name

    first, second, *others = start_several(4, "cut", *flags)
    interrupted(second, "tokenizer", first)  # they stop together, although one has got Ctrl-C
    for process in others:
        ended(process, 1)
    stop = r"train.py: stopped at step (\d+) of (\S+); the same command goes on from there"
    step, stage = re.search(stop, ended(first, 1)).groups()
    saved = torch.load("cut/checkpoint.pt")
    assert (str(saved["state"]["step"]), saved["stage"]) == (step, stage)
    for rank, seconds in ((1, 3), (0, 4)):
        processes = start_several(4, "cut", *flags)
        processes[rank].join(seconds)
        processes[rank].kill()
        time.sleep(1)
        for process in processes:  # torchrun ends the others
            process.kill()
            process.join()
    for process in start_several(4, "cut", *flags):
        ended(process)
    assert results("cut") == results("four")
    for process in start_several(4, "new", "--batch", 6):
        assert "--batch: got 6, expected a multiple of the 4 processes" in ended(process, 1)
    assert not Path("new").exists()


def revive_in_process(environment):
    """A step of the tokenizer on this process's share of images, saved in a file of its number."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    train.start_processes(CPU)
    images, codec = drawings(8), small_codec(codes=64, attention=False, fold=2, seed=3)
    features = tokenizer.encode_features(codec, images / 127.5 - 1)
    features = features.movedim(1, 3).flatten(0, 2)
    spread = torch.linspace(0, 1, 64)[:, None]  # the codes lie among what they are chosen for
    codec["codebook"] = spread * features[:: len(features) // 64][:64]
    batches = iter([(images.tensor_split(train.world())[train.rank()], None)])
    codec = train.train_tokenizer(codec, batches, images[:2], SCALES, steps=1, lr=1e-9)
    torch.save(codec["codebook"], f"{train.world()} {train.rank()}.pt")


def test_processes_revive_the_same_codes():
    several = [{}, *environments(2)]
    processes = [FORKS.Process(target=revive_in_process, args=(x,)) for x in several]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    alone, *both = (torch.load(name) for name in ("1 0.pt", "2 0.pt", "2 1.pt"))
    assert torch.equal(*both) and difference(both[0], alone) < 1e-5


def test_a_run_goes_on_with_another_number_of_processes(base, out):
    remove(out, "transformer")
    for process in start_several(2, out):
        ended(process)
    ours, theirs = (held_out_losses(folder)[-6:] for folder in (out, base))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_processes_that_do_not_divide_the_batch_are_refused(monkeypatch):
    flags = dict(size=16, depth=1, seed=0, flip=False, is_causal=None, is_simple=False)
    begin = partial(
        train.begin_run, NumberedImages(), "run", flags | dict(tokenizer=None, init=None)
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused("--batch: got 16, expected a multiple of the 3 processes", begin, dict(batch=16))
    assert not os.path.exists("run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    begin(dict(batch=16))
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused("--batch: got 16, expected a multiple of the 3 processes", begin, dict(batch=16))


# The recipe and its settings


PINNED = """
depth size images simple: batch central_every, steps of the stages
2 32 10000 False: 16 2 1250 250 3125 285
3 32 10000 False: 32 2 1846 422 5274 480
2 64 10000 False: 8 2 1220 244 3050 278
3 64 2000 False: 16 10 2059 412 4157 468
2 32 20500 True: 16 1 851 170 2125 194
4 32 50000 False: 48 2 2917 667 8334 758
"""
GUIDANCE = {(2, 32): (4.4, 2.6, 1.0, 0.75, 1.5), (3, 32): (3.2, 1.8, 1.0, 0.75, 1.5)}
GUIDANCE |= {(2, 64): (2.6, 2.6, 2.0, 0.75, 1.5), (3, 64): (2.6, 1.8, 1.0, 0.75, 1.5)}
GUIDANCE |= {(4, 32): (1.8, 1.5, 1.0, 0.75, 1.5)}


@pytest.mark.parametrize("line", PINNED.strip().splitlines()[1:])
def test_numbers_that_were_chosen_by_trials(line):
    given, expected = line.split(": ")
    counted = "batch", "central_every", *(f"{stage}_steps" for stage in train.STEP_COSTS)
    depth, size, images, is_simple = (eval(word) for word in given.split())
    settings = train.recipe(depth, size, images, 10, is_simple)
    assert [settings[name] for name in counted] == [*map(int, expected.split())]
    rate = {2: 4e-3, 3: 3.0116e-3, 4: 2.4623e-3}[depth]
    for stage, peak in (("tokenizer", rate), ("next_scale", rate), ("masked", rate / 4)):
        assert settings[f"{stage}_lr"] == pytest.approx(peak, rel=1e-3)
    assert settings["decay"] == pytest.approx({2: 0.05, 3: 0.03615, 4: 0.02872}[depth], rel=1e-3)
    chosen = dict(label_drop=0.1, gamma=0.1)
    chosen |= dict(masked_passes=0, refined_tokens=25)
    chosen |= dict(newton_schulz=3 if is_simple else 5, code_dim=16, perceptual=size > 32)
    weights = (0.25, 0.72, 2.0) if size > 32 else (0.5, 0.0, 2.0)
    chosen |= zip(("texture_weight", "jump_weight", "spectrum_weight"), weights)
    chosen |= dict(codes={2: 256, 3: 512, 4: 512}[depth])
    names = "guidance", "mask_guidance", "rise", "temperature", "cooling"
    chosen |= zip(names, GUIDANCE[depth, size])
    chosen |= dict(
        loss_weights="token" if is_simple else "root",
        top_k=0,
        top_p=1.0,
        evaluations=3 * (depth - 1),
    )
    assert {name: settings[name] for name in chosen} == chosen


def test_the_recipe_grows_by_its_laws():
    runs = [train.recipe(depth, 256, 10**9, 10) for depth in range(1, 31)]
    for small, large in itertools.pairwise(runs):
        assert small["batch"] <= large["batch"]
        for name in ("tokenizer_lr", "next_scale_lr", "masked_lr"):
            assert small[name] > large[name]
        for stage in train.STEP_COSTS:
            steps = f"{stage}_steps"
            assert small[steps] * small["batch"] < large[steps] * large["batch"]
    published = train.arguments(tokenizer.init, runs[15])
    assert leaves_equal(*(meta(tokenizer.init, **sizes) for sizes in (published, {})))
    for name in ("convolutions", "neighbours"):
        assert [run[name] for run in runs] == 7 * [True] + 23 * [False]
    assert [run["gamma"] for run in runs] == 7 * [0.1] + 23 * [None]
    assert [run["loss_weights"] for run in runs] == 7 * ["root"] + 23 * ["lognormal"]
    assert [run["masked_passes"] for run in runs] == 7 * [0] + 23 * [2]
    for images, dropout in ((10_000, 0.0), (2_000, 0.1)):  # 5 epochs and 28
        assert train.recipe(2, 32, images, 10)["dropout"] == dropout
    few = train.recipe(8, 32, 200, 10)
    assert 35 <= few["next_scale_steps"] * few["batch"] / 190 < 36  # epochs
    assert few["tokenizer_steps"] * few["batch"] / 190 < 81
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        small, deep = (train.recipe(depth, size, 100, 10) for depth in (2, 3))
        codec = tokenizer.init(**train.arguments(tokenizer.init, small))
        assert tokenizer.downsampling(codec) == cell and small["perceptual"] == (size > 32)
        assert small["fold"] == 2 and deep["fold"] == 1 + (size > 32)
    for run, sides in zip(runs[1:], ([1, 2, 3, 6, 12], [1, 2, 3, 4, 6, 8, 12])):
        assert [h for h, _ in train.recipe(run["depth"], 48, 100, 10)["scales"]] == sides


def meta(init, **sizes):
    """A tree as shapes: zeros."""
    with torch.device("meta"):
        made = init(**sizes)
    return pytree.tree_map(lambda leaf: torch.zeros(()).expand(leaf.shape), made)


def test_drawings_take_fewer_steps_and_scales_than_other_images():
    shapes, own = (train.recipe(2, 32, 20_500, 10, is_simple) for is_simple in (True, False))
    assert [h for h, _ in shapes["scales"]] == [1, 2, 4, 8]
    assert [h for h, _ in own["scales"]] == [1, 2, 5, 8, 8]
    steps = [f"{stage}_steps" for stage in train.STEP_COSTS]
    for name in steps:
        assert shapes[name] == math.ceil(0.68 * own[name])
    differ = "scales", "central_every", "newton_schulz", "loss_weights", *steps
    assert shapes | {name: own[name] for name in differ} == own


def test_every_setting_is_used_by_something():
    """Those that no function takes as an argument are read by `run_stages`."""
    functions = tokenizer.init, hmar.init, sample.steps, sample.masked_schedule
    functions += train.train_tokenizer, train.train_transformer
    settings = train.recipe(2, 32, 1000, 10)
    taken = set().union(*(train.arguments(function, settings) for function in functions))
    read = ["batch", "perceptual", "central_every", "masked_blocks"]
    read += ["texture_weight", "jump_weight", "spectrum_weight"]
    read += [f"{stage}_steps" for stage in train.STEP_COSTS]
    read += ["tokenizer_lr", "next_scale_lr", "masked_lr"]
    assert {*settings} == taken | {*read}


def test_sampling_settings_fit_the_sampler():
    for depth, size in itertools.product((1, 2, 3, 8), (32, 64)):
        given = small_tree(), CODEC, torch.tensor([0])
        next(sample.steps(*given, **train.sampling_settings(depth, size, 10)))
    without = train.recipe(2, 64, 1000, 1)  # a class alone is not guided
    differ = {
        name for name, value in train.recipe(2, 64, 1000, 10).items() if without[name] != value
    }
    assert differ == {"guidance", "mask_guidance"}
    assert without["guidance"] == without["mask_guidance"] == 0


SETTINGS = dict(evaluations=2, newton_schulz=3, decay=0.2)
SETTINGS |= dict(label_drop=0.3, loss_weights="root", central_every=3, batch=10, guidance=2.5)
SETTINGS |= dict(codes=32, code_dim=8, masked_blocks=1, gamma=0.5, neighbours=False, depth=3)
SETTINGS |= dict(scales=((1, 1), (4, 4)), channels=96)
SETTINGS |= dict(texture_weight=0.1, jump_weight=0.2, spectrum_weight=0.3)


def test_settings_reach_the_stages_that_take_them():
    changes = {name: value for name, value in SETTINGS.items() if name != "depth"}
    options = dict(size=16, depth=3, seed=4, device="cpu", dtype="fp32", lr=0.008, steps=7)
    stages = stages_of(NumberedImages(40), masked_steps=5, **options, **changes)
    rates = 0.008, 0.008, 0.008, 0.002
    for stage, steps, rate in zip(stages, (7, 7, 7, 5), rates, strict=True):
        common = "evaluations", "newton_schulz", "decay"
        assert [stage[name] for name in common] == [SETTINGS[name] for name in common]
        assert (stage["steps"], stage["lr"], stage["seed"]) == (steps, rate, 4)
        (images, _) = next(stage["batches"](0))
        assert len(images) == 10
    assert len(stages[0]["codec"]["codebook"]) == 32 and stages[0]["scales"] == SETTINGS["scales"]
    assert leaves_equal(stages[0]["codec"], tokenizer.init(**SMALL_CODEC, seed=4))
    learned, decoded = (stage["terms"] for stage in stages[:2])
    assert learned == dict(hue_variance=mock.ANY, texture_weight=0.1, jump_weight=0.2)
    assert decoded == dict(hue_variance=mock.ANY, texture_weight=0, spectrum_weight=0.3)
    assert leaves_equal(stages[1]["codec"], stages[0]["codec"]) and stages[1]["decoder_only"]
    params = stages[2]["params"]
    assert hmar.scale_sizes(params) == SETTINGS["scales"] and len(params["trunk"]) == 3
    assert "neighbours" not in params["next_scale"]
    assert len(stages[3]["params"]["masked"]["blocks"]) == 1
    for stage in stages[2:]:
        assert stage["label_drop"] == 0.3 and stage["loss_weights"] == "root"
        assert stage["classes"] == ["ant", "bee", "cow"]
        assert stage["sampling"]["guidance"] == 2.5


SMALL_CODEC = dict(codes=32, code_dim=8, channels=96, multipliers=(1, 1, 2), residual_blocks=1)
SMALL_CODEC |= dict(attention=False)


def test_settings_of_the_command_have_types():
    flags = ["--set", "label_drop=0", "decay=0.5", "--set", "loss_weights=root"]
    with stages_that_only_read() as stages:
        assert run("run", *flags, "neighbours=False", "scales=((1, 1), (4, 4))") is None
    settings = json.loads(Path("run/args.json").read_text())["settings"]
    assert settings["channels"] == 32  # FLAGS has a --set, too
    assert settings["neighbours"] is False and settings["scales"] == [[1, 1], [4, 4]]
    assert stages[0]["decay"] == 0.5 and stages[0]["scales"] == ((1, 1), (4, 4))
    assert stages[2]["label_drop"] == 0 and stages[2]["loss_weights"] == "root"


BAD_SETTINGS = """
nothing=1  nothing: no such setting, expected one of codes, code_dim, channels,
batch  --set: got batch, expected NAME=VALUE
depth=3  --set: depth cannot be set here
codes=many  codes: got 'many', expected a value like
codes=2.5  codes: got 2.5, expected a value like
neighbours=1  neighbours: got 1, expected a value like True
label_drop=True  label_drop: got True, expected a value like 0.1
masked_steps=0  masked_steps: got 0, expected above 0
evaluations=0  evaluations: got 0, expected above 0
central_every=0  central_every: got 0, expected above 0
scales=((1, 1), (3, 3))  scales: got ((1, 1), (3, 3)), expected two or more, the last 4 x 4
loss_weights=none  loss_weights: got none, expected one of token, root,
masked_blocks=9  masked_blocks: got 9, expected 1 to
temperature=-1.0  temperature: got -1.0
"""


@pytest.mark.parametrize("line", BAD_SETTINGS.strip().splitlines())
def test_unknown_and_unfit_settings_are_refused_in_a_line(line):
    change, message = line.split("  ")
    said = run("run", "--set", change)
    assert said.startswith(f"train.py: {message}") and "\n" not in said
    assert not Path("run").exists()
    name, _, value = change.partition("=")
    if value and name != "depth":
        refused(
            re.escape(message), train.train, NumberedImages(), size=16, **{name: _literal(value)}
        )


def _literal(value):
    return train.parse_settings([f"x={value}"])["x"]


def test_hmar_as_published_but_small_is_one_command():
    flags = ["--set", "convolutions=False", "neighbours=False", "masked_passes=1"]
    assert run("run", *SHORT, *flags) is None
    model = sample.load_model("run")
    params = model["transformer"]
    assert params["input"]["weight"].ndim == 2 and "depthwise" not in params["masked"]["blocks"][0]
    assert all("neighbours" not in params[branch] for branch in ("next_scale", "masked"))
    assert model["sampling"]["schedule"] == sample.masked_schedule(SCALES, 1)
    assert max(map(len, model["sampling"]["schedule"])) == 2
    passes = list(sample.steps(params, model["tokenizer"], [0], **model["sampling"]))
    assert len(passes) > len(SCALES)


# Data as an argument


class Flowers:
    """A dataset of the shape of torchvision's."""

    classes = ("daisy", "rose")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if not 0 <= index < 12:
            raise IndexError
        return train.draw_shape(index, 20)[0].convert("L"), index % 2


class Photos(Flowers):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 0

    @property
    def classes(self):
        raise AttributeError


@pytest.mark.parametrize("dataset, names", [(Flowers(), ["daisy", "rose"]), (Photos(), ["images"])])
def test_train_takes_a_dataset_and_returns_a_model(dataset, names, capsys):
    options = dict(size=16, depth=1, steps=2, batch=4, channels=32, device="cpu", dtype="fp32")
    before = contents(".").keys()
    model = train.train(dataset, **options)
    assert contents(".").keys() == before  # nothing is written
    assert (
        "no run folder: HMAR of depth 1, 11 images to train on, 1 held out"
        in capsys.readouterr().out
    )
    assert model["classes"] == names
    images = sample.generate(model, [names[-1], 0])
    assert images.shape == (2, 3, 16, 16) and images.std() > 0
    again = train.train(dataset, "run", **options)
    for part in ("tokenizer", "transformer"):
        assert leaves_equal(again[part], model[part])
        assert leaves_equal(sample.load_model("run")[part], model[part])
        assert all(type(leaf) is torch.Tensor for leaf in pytree.tree_leaves(again[part]))


def test_stages_are_called_on_trees_and_tensors_alone(capsys):
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    options = dict(steps=2, lr=1e-3)
    codec = train.train_tokenizer(FOLDED, iter([(images, None)] * 2), images, SCALES, **options)
    tokens = tokenizer.encode(codec, images / 127.5 - 1, SCALES)
    batches = [(torch.zeros(6, dtype=torch.int64), tokens)] * 2
    params = small_tree(scales=SCALES)
    for before in (params, hmar.add_masked_branch(params, 1)):
        made = train.train_transformer(before, codec, iter(batches), batches[0], **options)
        assert difference(made, before) > 0
        is_masked = "masked" in before
        assert leaves_equal(made["trunk"], before["trunk"]) == is_masked
        assert all(type(leaf) is torch.Tensor for leaf in pytree.tree_leaves(made))
    assert os.listdir() == ["data"]
    Path("run").mkdir()  # with a folder, but without names of classes
    options = dict(steps=1, lr=1e-3, out=Path("run"))
    train.train_transformer(params, codec, iter(batches), batches[0], **options)
    names = {"metrics.jsonl", "checkpoint.pt", "samples/next-scale.png"}
    assert contents("run").keys() == names


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


def plain_jumps(images):
    """Of cells, along rows and columns: jumps inside squares of 2 x 2 pixels, and between them."""
    for lines in (images, images.transpose(2, 3)):
        squares = torch.zeros_like(lines[:, 0])
        squares[..., :-1] = (lines[..., 1:] - lines[..., :-1]).square().sum(1)
        cells = squares.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # (B, h, 4, w, 4)
        for first in (0, 1):
            yield (cells[..., [first, first + 2]].mean((2, 4)) + 1e-4).sqrt()


def plain_spectrum(images):
    """The maps of the 55 frequencies, each a sum over the pixels of every window."""
    place = torch.arange(8) + 0.5
    for u, v in itertools.product(range(8), range(8)):
        if max(u, v) >= 3:
            wave = torch.cos(math.pi * u * place / 8)[:, None] * torch.cos(math.pi * v * place / 8)
            wave = wave / wave.square().sum().sqrt()
            found = F.conv2d(images, wave.expand(3, 1, 8, 8), stride=8, groups=3).square().sum(1)
            yield (F.avg_pool2d(found, 2, stride=1) + 1e-3).sqrt()


def plain_loss(codec, images, stops, layers, variance, is_transposed):
    tokens, features = (
        tokenizer.encode(codec, images, SCALES),
        tokenizer.encode_features(codec, images),
    )
    f_hats = [*tokenizer.f_hat_by_scale(codec, tokens, SCALES)]
    decoded = tokenizer.decode_unclamped(codec, f_hats[-1])
    rest = decoded - images
    expected = rest.square().mean() + 0.5 * rest.abs().mean()
    for dim in (2, 3):
        expected += 0.25 * rest.diff(dim=dim).abs().mean()
    expected += 0.25 * (plain_texture(decoded) - plain_texture(images)).abs().mean()
    for ours, theirs in zip(plain_jumps(decoded), plain_jumps(images)):
        expected += 0.72 / 4 * (ours - theirs).abs().mean()
    for ours, theirs in zip(plain_spectrum(decoded), plain_spectrum(images)):
        expected += 2.2 / 55 * (ours - theirs).abs().mean()
    seen = [x.transpose(2, 3) if is_transposed else x for x in (decoded, images)]
    expected += 0.08 * sum(plain_perceptual(layers, *seen))
    expected += 0.28 * plain_hues(rest).square().mean() / (variance + 0.01)
    errors = []
    for row in (0, 4, 8):  # every fourth is decoded from coarse scales too
        f_hat = f_hats[stops[row]][row : row + 1]
        errors.append(F.mse_loss(tokenizer.decode_unclamped(codec, f_hat), images[row : row + 1]))
    expected += 0.5 * torch.stack(errors).mean()
    quantisation = torch.stack([F.mse_loss(f_hat, features) for f_hat in f_hats]).mean()
    return (expected + (1 + 0.1) * quantisation).item()


def test_the_tokenizer_learns_from_all_errors():
    layers = torch.nn.ModuleList()
    for inputs, outputs in ((3, 4), (4, 5)):
        parts = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs)
        layers.append(torch.nn.Sequential(*parts, torch.nn.ReLU()).eval())
    images, codecs, out = drawings(10), [FOLDED], Path("run")
    out.mkdir()

    def batches():
        yield images, None
        codecs.append(torch.load(out / "checkpoint.pt")["state"]["tree"])  # with other codes
        yield images, None

    options = dict(steps=2, lr=1e-12, evaluations=2, seed=3, out=out)
    options |= dict(perceptual_layers=layers, hue_variance=0.2)
    options |= dict(texture_weight=0.25, jump_weight=0.72, spectrum_weight=2.2)
    train.train_tokenizer(FOLDED, batches(), images[:2], SCALES, **options)
    losses = [line["loss"] for line in lines_of(out, name="loss")]
    for step, codec in enumerate(codecs, 1):
        stops = torch.randint(3, (10,), generator=train.generator_of(3, "tokenizer", step))
        expected = plain_loss(codec, images / 127.5 - 1, stops, layers, 0.2, step == 2)
        assert losses[step - 1] == pytest.approx(expected, rel=1e-4)


def drawings(count):
    """uint8 (count, 3, 16, 16)."""
    images = [torch.from_numpy(np.array(train.draw_shape(i, 16)[0])) for i in range(count)]
    return torch.stack(images).permute(0, 3, 1, 2)


def test_hues_are_measured_on_training_images():
    dataset = NumberedImages(40)
    stage, *_ = stages_of(dataset, size=16, depth=1, device="cpu", dtype="fp32")
    held_out = {int(image[0, 0, 0]) // 6 for image in stage["held_out"]}
    images = [torch.from_numpy(np.array(dataset[i][0])) for i in range(40) if i not in held_out]
    images = torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1
    variance = plain_hues(images).var((1, 2, 3), correction=0).mean().item()
    assert len(images) == 38
    assert stage["terms"]["hue_variance"] == pytest.approx(variance, rel=1e-5)
    assert "perceptual_layers" not in stage["terms"]


def perceptual_losses(dataset, steps, classes):
    """Losses of the perceptual network while it learns, [(scores, labels), ...] and its layers."""
    crops = train.Crops(dataset, range(len(dataset)), size=24, seed=0, classes=classes)
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses:
        layers = train.learn_perceptual_layers(
            crops, steps, seed=0, device=CPU, dtype=torch.float32
        )
    pairs = [call.args for call in losses.call_args_list]
    return [F.cross_entropy(*pair).item() for pair in pairs], pairs, layers


def test_the_perceptual_network_learns_classes():
    """Afterwards its norms are fixed, and no random number of torch's own is used up."""
    labels = np.random.default_rng(0).integers(3, size=30).tolist()
    dataset = [(Image.new("RGB", (30, 24), 3 * (100 * label,)), label) for label in labels]
    before = torch.get_rng_state()
    values, _, layers = perceptual_losses(dataset, 60, classes=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])  # of wrong labels it learns nothing
    x = torch.randn(8, 3, 24, 24)
    whole, half = (layers[0](part) for part in (x, x[:4]))
    assert torch.allclose(whole[:4], half, atol=1e-6) and not whole.requires_grad
    again = perceptual_losses(dataset, 60, classes=3)[2]  # when a run goes on
    assert torch.equal(again[0](x), whole)


def test_without_classes_the_perceptual_network_learns_quarter_turns():
    dataset = [(train.draw_shape(10 * i + 8, 24)[0], 0) for i in range(30)]  # arrows
    values, pairs, _ = perceptual_losses(dataset, 150, classes=1)
    assert np.mean(values[-5:]) < 0.7 * np.log(4) < np.mean(values[:5])
    turns = torch.cat([labels for _, labels in pairs])
    assert turns.bincount(minlength=4).min() > 1000


def test_photographs_have_a_perceptual_network():
    dataset = [(train.draw_shape(i, 48)[0], i % 10) for i in range(40)]
    dataset = Listed(dataset)
    options = dict(size=48, depth=1, device="cpu", dtype="fp32", tokenizer_steps=3)
    for stage in stages_of(dataset, **options)[:2]:
        assert len(stage["terms"]["perceptual_layers"]) == 4
    stage, *_ = stages_of(dataset, perceptual=False, **options)
    assert "perceptual_layers" not in stage["terms"]


class Listed(list):
    classes = train.SHAPES


def test_dead_codes_are_replaced_at_first_and_every_twentieth_step_until_the_last_fifth():
    """Read from the checkpoints: a batch begins when that of the step before is written."""
    codec = small_codec(codes=64, attention=False, fold=2, seed=7)
    images, states = drawings(60).split(2), []
    Path("run").mkdir()

    def batches():
        for step in range(1, 46):
            if step > 1:
                states.append(torch.load("run/checkpoint.pt")["state"])
            yield images[step % 30], None

    options = dict(steps=45, lr=1e-12, evaluations=45, out=Path("run"))
    train.train_tokenizer(codec, batches(), images[0][:1], SCALES, **options)
    before, chosen, revived, coarse_only = codec["codebook"], torch.zeros(64), [], []
    for step, state in enumerate(states, 1):
        codebook = state["tree"]["codebook"]
        pixels = images[step % 30] / 127.5 - 1
        features = tokenizer.encode_features(codec, pixels)
        quantised = [*tokenizer.quantise(codec | dict(codebook=before), features, SCALES)]
        tokens = torch.cat([tokens.flatten() for _, tokens, _ in quantised])
        chosen += tokens.bincount(minlength=64)
        changed = (codebook - before).abs().amax(1) > 1e-4
        if changed.any():
            assert torch.equal(changed, chosen == 0) and not changed.all()
            vectors = [residual.flatten(0, 1) for residual, _, _ in quantised]
            near = [torch.cdist(codebook[changed], rows).amin(1) < 1e-3 for rows in vectors]
            assert torch.stack(near).any(0).all()  # each is a vector that was quantised
            coarse_only.append(near[0].float().mean().item())
            revived.append(step)
            chosen.zero_()
        assert torch.equal(state["chosen"], chosen.long())
        before = codebook
    assert revived == [1, 20] and max(coarse_only) < 0.5


def test_held_out_numbers_are_of_saved_weights(base):
    model = sample.load_model(base)
    codec, params = model["tokenizer"], model["transformer"]
    options = dict(size=16, depth=1, device="cpu", dtype="fp32")
    stage, *_ = stages_of(train.Folder("data", 16), **options)
    images = stage["held_out"] / 127.5 - 1
    stage, *_ = stages_of(train.Folder("data", 16), tokenizer=model, **options)
    labels, tokens = stage["held_out"]
    assert torch.equal(tokens, tokenizer.encode(codec, images, SCALES))
    errors = tokenizer.decode(codec, tokens, SCALES) - images
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    weights = hmar.scale_weights(SCALES, train.recipe(1, 16, 60, 3)["loss_weights"])
    surprise, without = (
        (hmar.losses(params, given, tokens, inputs) * weights).sum(1).mean()
        for given in (labels, torch.full((3,), 3))
    )
    share = 1 / (1 + (max(0, without - surprise).item() / 0.1) ** 2)
    expected = train.sampling_settings(1, 16, 3)
    expected |= {name: share * expected[name] for name in ("guidance", "mask_guidance")}
    assert model["sampling"] == pytest.approx(expected, rel=1e-5)
    mask = torch.rand(3, 36, generator=train.generator_of("held-out mask")) < 0.5
    own_inputs = tokenizer.masked_inputs(codec, tokens, SCALES, mask)
    wrong = hmar.losses(params, labels, tokens, inputs, own_inputs, mask).sum()

    last, expected = {}, (errors.square().mean(), surprise, wrong / (0.5 * mask.numel()))
    for stage, loss, name in zip(STAGES[1:], expected, ("error", "loss", "loss")):
        last[stage] = lines_of(base, stage, f"held_out_{name}")[-1]
        assert last[stage][f"held_out_{name}"] == pytest.approx(loss.item(), rel=1e-4)
    psnr = (10 * torch.log10(4 / errors.square().mean((1, 2, 3)))).mean().item()
    assert last["decoder"]["held_out_psnr"][-1] == pytest.approx(psnr, rel=1e-4)
    shares = [own.flatten().bincount() / own.numel() for own in tokens.split([1, 4, 16, 16], 1)]
    perplexity = [torch.special.entr(share).sum().exp().item() for share in shares]
    assert last["decoder"]["held_out_perplexity"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("gain, share", [(-2, 1), (0, 1), (0.3, 1 / 2), (0.6, 1 / 5)])
def test_guidance_is_weaker_the_more_the_class_says(gain, share):
    before = dict(guidance=4.0, mask_guidance=3.0, rise=2.0, temperature=0.5)
    after = before | dict(guidance=4 * share, mask_guidance=3 * share)
    assert train.weaken_guidance(before, gain, 0.3) == pytest.approx(after)
    assert train.weaken_guidance(before, gain, math.inf) == before
    assert train.weaken_guidance({}, gain, 0.3) == {}


@pytest.mark.parametrize(
    "given, expected",
    [({}, (2.2, 1.3)), (dict(guidance=2.5), (2.5, 2.6)), (dict(mask_guidance=2.0), (4.4, 2.0))],
)
def test_guidance_is_weakened_once_unless_it_is_given(given, expected, monkeypatch):
    """In pictures of the next-scale stage, in those of the masked stage, and in the model."""
    found, drawn = train.evaluate_transformer, []

    def evaluate(params, codec, weights, examples):
        numbers = found(params, codec, weights, examples)
        return numbers | (dict(class_gain=0.1) if "class_gain" in numbers else {})

    monkeypatch.setattr(train, "evaluate_transformer", evaluate)
    monkeypatch.setattr(train, "draw_samples", lambda *given: drawn.append((given[1], given[-1])))
    options = dict(size=16, device="cpu", steps=1, batch=4, dtype="fp32")
    model = train.train(NumberedImages(40), **options, **given)
    assert [stage for stage, _ in drawn] == ["next-scale", "masked"]
    for sampling in (model["sampling"], *(sampling for _, sampling in drawn)):
        strengths = sampling["guidance"], sampling["mask_guidance"]
        assert strengths == pytest.approx(expected)


def test_a_class_that_says_nothing_gains_nothing():
    scales, labels = SCALES, torch.tensor([0, 1, 2])
    params = hmar.init(width=32, depth=1, classes=3, codes=16, code_dim=8, scales=scales)
    params["classes"] = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(16, (3, sum(tokenizer.lengths(scales))))
    weights = hmar.scale_weights(scales, "root")
    for conditions in (labels, params["classes"][labels]):  # numbers, or vectors
        found = train.evaluate_transformer(params, CODEC, weights, (conditions, tokens))
        inputs = tokenizer.next_scale_inputs(CODEC, tokens, scales)
        with_class, without = (
            (hmar.losses(params, numbers, tokens, inputs) * weights).sum(1).mean().item()
            for numbers in (labels, torch.full((3,), 3))
        )
        assert found == pytest.approx(
            dict(held_out_loss=with_class, class_gain=without - with_class), abs=1e-5
        )
        assert found["class_gain"] != 0
    params["classes"][:] = params["classes"][3]
    assert train.evaluate_transformer(params, CODEC, weights, (labels, tokens))["class_gain"] == 0


def test_a_folder_without_classes_is_refined_and_edits(own_folder):
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


# Weights that are given


def save_params(path, codes=16, codec=CODEC, causal=False):
    scales = tuple((side, side) for side in (1, 2, 3, 4, 4))
    sizes = dict(width=32, classes=5, codes=codes, code_dim=8, depth=3, scales=scales, seed=5)
    params = hmar.init(**sizes, causal=causal)
    params = params if causal else hmar.add_masked_branch(params, 2)
    model = dict(transformer=params, classes=[*"abcde"], sampling={})
    torch.save(model | (dict(tokenizer=codec) if codec else {}), path)
    return params


INIT = ["--batch", 4, "--dtype", "fp32", "--device", "cpu", "--data", "data", *SHORT]


def test_init_fits_classes_scales_and_branches():
    params = save_params("init.pt")
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    flags = [*INIT, "--init", "init.pt"]  # which decides the depth
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


def test_flags_that_contradict_init_are_refused():
    save_params("init.pt")
    save_params("var.pt", causal=True)
    for init, flags, message in (
        ("init.pt", ["--depth", 2], "--depth: got 2, but --init has 3 blocks"),
        ("init.pt", ["--causal"], "--causal: VAR is asked for, but --init is HMAR"),
        (
            "init.pt",
            ["--set", "gamma=0.5", "convolutions=True"],
            "convolutions, gamma cannot be set",
        ),
        ("init.pt", ["--set", "codes=9"], "--set: codes cannot be set here"),
    ):
        flags = [*INIT, "--size", 8, "--out", "run", "--init", init, *flags]
        assert message in failure(train.main, *flags), flags
    message = "HMAR is asked for, but --init is VAR"
    options = dict(size=8, init="var.pt", is_causal=False)
    refused(message, train.train, train.Folder("data"), "run", **options)
    assert not Path("run").exists()
    assert (
        failure(train.main, *INIT, "--size", 8, "--out", "run", "--init", "init.pt", "--depth", 3)
        is None
    )


def test_init_of_var_trains_var(capsys):
    params = save_params("var.pt", causal=True)
    assert failure(train.main, *INIT, "--size", 8, "--out", "run", "--init", "var.pt") is None
    said = capsys.readouterr().out
    assert "run: VAR of depth 3" in said and "--init: var.pt" in said
    model = sample.load_model("run")
    assert "causal" in model["transformer"] and "masked" not in model["transformer"]
    assert difference(model["transformer"]["trunk"], params["trunk"]) < 1e-6
    assert {line["stage"] for line in lines_of("run")} == {"next-scale"}
    again = train.train(Flowers(), size=8, init=model, steps=1, device="cpu", dtype="fp32")
    assert "causal" in again["transformer"]


def test_a_given_tokenizer_is_used_as_it_is(capsys):
    save_params("given.pt")  # of which the transformer is not used
    run_it = partial(failure, train.main, *FLAGS, "--set", "label_drop=0.2", "--out", "run", *SHORT)
    assert run_it("--tokenizer", "given.pt") == "train.py: --set: channels cannot be set here"
    flags = [flag for flag in FLAGS if flag not in ("--set", "channels=32")]
    run_it = partial(failure, train.main, *flags, *SHORT, "--out", "run", "--tokenizer", "given.pt")
    ignored = run_it("--set", "decoder_steps=5", "texture_weight=0.1")
    assert ignored == "train.py: --set: decoder_steps, texture_weight cannot be set here"
    assert run_it() is None
    assert "--tokenizer: given.pt\n" in capsys.readouterr().out
    model = sample.load_model("run")
    assert leaves_equal(model["tokenizer"], CODEC)
    assert hmar.block_count(model["transformer"]) == 1
    assert hmar.scale_sizes(model["transformer"]) == train.default_scales(16, 2, 2)
    shutil.move("given.pt", "elsewhere.pt")  # once it is in model.pt, its file is not needed
    assert run_it() is None
    assert {line["stage"] for line in lines_of("run")} == {"next-scale", "masked"}


def test_var_has_no_masked_stage():
    assert run("run", *SHORT, "--causal") is None
    params = sample.load_model("run")["transformer"]
    assert "causal" in params and "masked" not in params
    assert {line["stage"] for line in lines_of("run")} == {*STAGES[:3]}


# Run folders that are not what they were


def test_a_stage_is_finished_if_the_model_file_has_its_part(base, out):
    remove(out, "transformer")
    assert run(out) is None
    assert results(out) == results(base)
    before = Path(out, "metrics.jsonl").read_bytes()
    assert run(out) is None
    assert Path(out, "metrics.jsonl").read_bytes() == before and results(out) == results(base)
    (out / "model.pt").unlink()  # to train all anew
    assert run(out) is None
    assert results(out) == results(base)


def test_a_folder_in_which_nothing_was_trained_yet_may_begin_anew(base):
    Path("run").mkdir()
    Path("run/args.json.tmp").write_text("{")
    assert run("run", "--set", "nothing=1") is not None
    with stages_that_only_read():
        assert run("run") is None
    assert json.loads(Path("run/args.json").read_text())["settings"]["batch"] == 4


def test_other_flags_are_refused_by_name(base, out):
    line = run(out, "--seed", 3, "--flip")
    expected = f"train.py: --out: {out} was begun with other settings "
    expected += ".seed 0 -> 3, flip False -> True.; .*"
    assert re.fullmatch(expected, line)
    for flags, name in (
        (["--depth", 2], "depth 1 -> 2"),
        (["--size", 32], "size 16 -> 32"),
        (["--steps", 9], "steps 24 -> 9"),
        (["--lr", 1], "lr None -> 1"),
        (["--batch", 8], "batch 4 -> 8"),
        (["--causal"], "causal None -> True"),
        (["--dtype", "bf16"], "dtype fp32 -> bf16"),
        (["--tokenizer", "none.pt"], "tokenizer None -> none.pt"),
        (["--set", "channels=64"], "channels 32 -> 64"),
        (["--set", "label_drop=0.2"], "label_drop None -> 0.2"),
    ):
        said = run(out, *flags)
        assert name in said and "\n" not in said, name
    assert results(out) == results(base)


def write_images(folder, count=12, classes=("cat", "dog"), shift=0):
    """So many images in sub-folders, in turns; without classes in the folder itself."""
    for index in range(count):
        path = Path(folder, classes[index % len(classes)] if classes else "", f"{index:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        train.draw_shape(index + shift, 16)[0].save(path)
    return folder


def begin(data, out="run"):
    """The line with which a run on a folder fails, or None. No stage trains."""
    with stages_that_only_read():
        return run(out, "--data", data)


def test_other_data_are_refused_and_moved_data_go_on():
    write_images("data1")
    assert begin("data1") is None
    shutil.move("data1", "moved")
    assert begin("moved") is None
    assert begin("data1") == "train.py: --data: there is no folder data1"
    os.symlink("moved", "link")
    assert begin("link") is None
    others = dict(
        count=write_images("count", 13),
        names=write_images("names", classes=("cat", "dogs")),
        bytes=write_images("bytes", shift=1),
        files=write_images("files"),
        flat=write_images("flat", classes=()),
    )
    os.rename("files/cat/02.png", "files/cat/020.png")
    before = results("run")
    for what, folder in others.items():
        said = begin(folder)
        assert said.startswith("train.py: --out: run was begun with other data ("), what
        assert "\n" not in said
    assert "images 12 -> 13" in begin("count") and "['cat', 'dog'] -> ['cat', 'dogs']" in begin(
        "names"
    )
    assert results("run") == before

    assert begin("flat", "flat run") is None  # a flat folder may be moved, too
    shutil.move("flat", "flat moved")
    assert begin("flat moved", "flat run") is None
    assert "other files" in begin(write_images("flat", classes=(), shift=2), "flat run")


class Augmented(NumberedImages):
    """Its images are never the same twice."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return Image.fromarray(np.asarray(image) ^ np.uint8(len(self.read) % 256)), label


def test_data_may_be_augmented_at_random():
    options = dict(out="run", size=16, depth=1, device="cpu", dtype="fp32")
    dataset = Augmented(40)
    for _ in range(2):
        stages_of(dataset, **options)
    dataset.labels = dataset.labels[1:] + dataset.labels[:1]
    refused("begun with other data .other files", stages_of, dataset, **options)


def test_other_datasets_are_refused():
    def begin(dataset, **options):
        stages_of(dataset, out="run", size=16, depth=1, device="cpu", dtype="fp32", **options)

    begin(NumberedImages(40))
    begin(NumberedImages(40))
    refused("begun with other data .other files", begin, NumberedImages(40, noise=3))
    refused("begun with other data .images 40 -> 41", begin, NumberedImages(41))
    other = NumberedImages(40)
    other.labels = other.labels[1:] + other.labels[:1]
    refused("begun with other data .other files", begin, other)
    refused("begun with other data .*classes", begin, Listed(zip_images(NumberedImages(40))))
    refused("begun with other settings .label_drop None -> 0.3", begin, other, label_drop=0.3)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokens.npy", "another program's"),
        ("samples/mine.png", "mine"),
        ("args.json", '{"lr": 1}'),
        ("args.json", "[]"),
        ("args.json", "text"),
        ("model.pt", "another program's"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(name, content):
    Path("run", name).parent.mkdir(parents=True)
    Path("run", name).write_text(content)
    before = contents("run")
    assert run("run") == "train.py: --out: run is neither empty nor a run of train.py"
    assert contents("run") == before


BAD_INPUT = """
--data none  --data: there is no folder none
--size 15  --size: got 15, expected a multiple of 4, 8 or more
--size 0  --size: got 0, expected 1 or more
--batch 0  batch: got 0, expected above 0
--depth -1  --depth: got -1, expected 1 or more
--steps 0  steps: got 0, expected above 0
--lr 0  lr: got 0.0, expected above 0
--lr nan  lr: got nan, expected above 0
--seed -1  --seed: got -1, expected 0 or more
--tokenizer none.pt  none.pt: no such file or folder
--init none.pt  none.pt: no such file or folder
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
