"""Training: nothing is lost, processes are one, what a step computes, settings, wrong flags."""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Listed,
    NumberedImages,
    contents,
    failure,
    leaves_equal,
    random_tokens,
    refused,
    settings_of,
    small_codec,
    stages_of,
    tree,
)
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

FLAGS = ["--size", 16, "--depth", 1, "--batch", 4, "--steps", 24, "--set", "channels=32"]
FLAGS += ["--dtype", "fp32", "--device", "cpu", "--data", "data"]
SHORT = ["--steps", 1, "--lr", 1e-9]
OPTIONS = dict(size=16, depth=1, device="cpu", dtype="fp32")
STAGES = "tokenizer", "decoder", "next-scale", "masked"
SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels
CODEC = small_codec(attention=False, seed=7)  # cells of two pixels
FOLDED = small_codec(attention=False, fold=2, seed=7)  # cells of four pixels
CPU = torch.device("cpu")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "triton", "pytest", "hypothesis", "PIL.Image"])


# Commands, in processes or this one


def enter(environment):
    """Lets a process be one of those that torchrun starts with this environment."""
    os.environ.update(environment)
    importlib.reload(train)  # which reads it
    torch.set_num_threads(1)


def command(flags, seconds, file_bytes, environment, log):
    """`python train.py FLAGS`, killed after some seconds, with so much room for a file; 0: none."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    enter(environment)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
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


def start(out, *flags, seconds=0, file_bytes=0, **environment):
    """A process, forked from one that has imported torch."""
    flags = [str(flag) for flag in (*FLAGS, "--out", out, *flags)]
    _, log = tempfile.mkstemp(dir=Path(out).parent)
    given = flags, seconds, file_bytes, environment, log
    process = FORKS.Process(target=command, args=given, daemon=True)
    process.log = log
    process.start()
    return process


def ended(process, status=0):
    """What it printed."""
    process.join()
    printed = Path(process.log).read_text()
    assert process.exitcode == status, printed
    return printed


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
    out.with_name("printed").write_text(ended(start(out, "--data", folder)))
    return out


@pytest.fixture
def out(base, own_folder):
    return Path(shutil.copytree(base, "run"))


def remove(out, part):
    """Removes a part of a run's model.pt, as if its stage had not run."""
    model = torch.load(out / "model.pt")
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
    printed, record = base.with_name("printed").read_text(), (base / "args.json").read_text()
    assert f"{base}: HMAR of depth 1; cpu, torch.float32" in printed
    counts = re.search(r"(\d+) images of 3 classes to train on, (\d+) held out", printed)
    assert sum(map(int, counts.groups())) == 60
    assert re.search(r"next-scale 16/24  0:00:\d\d left  loss \d", printed)
    assert f"{base}/samples/masked.png is written" in printed
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
    assert "masked" in model["transformer"] and "causal" not in model["transformer"]


# Kills, Ctrl-C and full disks


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
    lines = "tokenizer 8/24", "decoder 8/24", "next-scale 8/24", "masked 8/24"
    for stage, line in zip(STAGES, lines):
        printed = interrupted(start("run"), line)
        last = printed.strip().splitlines()[-1]
        stop = rf"train.py: stopped at step (\d+) of {stage}; the same command goes on from there"
        step = int(re.fullmatch(stop, last).group(1))
        saved = torch.load("run/checkpoint.pt")
        assert (saved["stage"], saved["step"]) == (stage, step)
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


def write_b(path):
    train.write_file(Path(path), lambda file: file.write(b"BBBB"))


def test_a_file_is_replaced_as_a_whole_or_not_at_all():
    """Also if another process writes the same one meanwhile."""

    def write(file):
        file.write(b"AA")
        file.flush()
        assert path.read_bytes() == b"old"
        other = FORKS.Process(target=write_b, args=(str(path),))
        other.start()
        other.join()
        file.write(b"AA")
        file.flush()
        assert path.read_bytes() == b"BBBB"

    path = Path("file")
    path.write_bytes(b"old")
    train.write_file(path, write)
    assert path.read_bytes() == b"AAAA"


def test_a_full_disk_ends_in_a_line_and_the_last_checkpoint_stays(base):
    interrupted(start("run"), "tokenizer 8/24")
    before = contents("run")["checkpoint.pt"]
    line = ended(start("run", file_bytes=len(before) // 2), 1).splitlines()[-1]
    assert line.startswith("train.py: ") and "checkpoint.pt" in line
    assert contents("run")["checkpoint.pt"] == before
    ended(start("run"))
    assert results("run") == results(base)


# The loops


def examples_of(scales, steps=6, batch=4, classes=3):
    """[(labels, tokens), ...] at random."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(classes, (batch,), generator=generator), random_tokens(batch, scales, 16, i))
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


LOOPS = [("token", 0.0, False), ("lognormal", 0.3, False), ("root", 0.0, True)]


@pytest.mark.parametrize(("weights", "dropout", "has_vectors"), LOOPS)
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_transformers_loop_equals_one_written_out(is_masked, weights, dropout, has_vectors):
    params, steps = small_tree(is_masked), 18  # two of them warm up
    scales, stage = hmar.scale_sizes(params), "masked" if is_masked else "next-scale"
    examples = examples_of(scales, steps)
    if has_vectors:
        width = params["classes"].shape[1]
        vectors = torch.randn(steps, 4, width, generator=torch.Generator().manual_seed(2))
        examples = [(row, tokens) for row, (_, tokens) in zip(vectors, examples)]
    settings = settings_of(steps, lr=0.01, decay=0.3, seed=5, evaluations=1, label_drop=0.4)
    settings |= dict(loss_weights=weights, dropout=dropout)
    ours = train.train_transformer(params, CODEC, iter(examples), examples[0], settings)

    def step_loss(trained, step):
        labels, tokens = examples[step - 1]
        generator = train.generator_of(5, stage, step)
        is_dropped = torch.rand(4, generator=generator) < 0.4
        dropped.append(is_dropped)
        null = params["classes"][3] if has_vectors else torch.tensor(3)
        labels = torch.where(is_dropped[:, None] if has_vectors else is_dropped, null, labels)
        given = params | trained, labels, tokens, tokenizer.next_scale_inputs(CODEC, tokens, scales)
        torch.manual_seed(train.generator_of(5, stage, step, "dropout", 0).initial_seed())
        if not is_masked:
            losses = hmar.losses(*given, dropout=dropout).mean(0)
            return (losses * hmar.scale_weights(scales, weights)).sum()
        shares = torch.rand(4, 1, generator=generator)
        mask = torch.rand(4, 20, generator=generator) < shares
        own_inputs = tokenizer.masked_inputs(CODEC, tokens, scales, mask)
        losses = hmar.losses(*given, own_inputs, mask, dropout=dropout)
        return losses.sum() / 40  # half of all are hidden

    trained, dropped = dict(masked=params["masked"]) if is_masked else params, []
    peak = 0.01 / 4 if is_masked else 0.01
    theirs = written_out(trained, steps, peak, 0.3, step_loss)
    assert difference(ours, params | theirs) < 1e-6 < difference(ours, params)
    assert 9 < torch.cat(dropped).sum() < 54


@pytest.mark.parametrize("decoder_only", [False, True])
def test_the_tokenizers_loop_equals_one_written_out(decoder_only):
    images = drawings(30).split(6)  # five batches
    codec = small_codec(codes=64, attention=False, fold=2, seed=3)
    settings = settings_of(5, lr=0.01, decay=0.3, evaluations=1, seed=5, scales=SCALES)
    ours = train.train_tokenizer(
        codec,
        zip(images, itertools.repeat("anything")),
        images[0],
        dict(hue_variance=0.1),
        settings,
        decoder_only=decoder_only,
    )
    stage = "decoder" if decoder_only else "tokenizer"

    def step_loss(trained, step):
        pixels = images[step - 1] / 127.5 - 1
        stops = torch.randint(3, (6,), generator=train.generator_of(5, stage, step))
        coarse = torch.tensor([0, 4])
        given = codec | trained, pixels, SCALES, coarse, stops[coarse]
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


@pytest.mark.parametrize("stage", ["tokenizer", "next-scale", "masked"])
def test_micro_batches_add_up_to_one_batch(stage, monkeypatch):
    """And so do the parts in which held-out images are evaluated."""
    is_tokenizer, found = stage == "tokenizer", []
    params = small_tree(stage == "masked")
    examples = examples_of(hmar.scale_sizes(params), steps=3, batch=10)
    lr = {"tokenizer": 1e-5, "next-scale": 1e-4, "masked": 4e-4}[stage]
    for count in (10, 4):
        monkeypatch.setattr(sample, "images_at_once", lambda pixels, count=count: count)
        settings = settings_of(3, lr=lr, evaluations=3, micro_batch=count, scales=SCALES)
        settings["classes"] = []  # without their names no samples are drawn
        if is_tokenizer:
            images = drawings(10)
            stage_of = partial(train.train_tokenizer, FOLDED, iter([(images, None)] * 3))
            stage_of(images[:5], dict(hue_variance=0.1), settings, f"{count}")
        else:
            stage_of = partial(train.train_transformer, params, CODEC, iter(examples))
            stage_of(examples[0], settings, f"{count}")
        lines = lines_of(f"{count}")
        for line in lines:
            line.pop("held_out_perplexity", None)  # rounding may choose another code
            if "class_gain" in line:  # a difference of two losses: here rounding is all of it
                line["class_gain"] += line["held_out_loss"]
        found.append([number for line in lines for number in [*line.values()][1:]])
    whole, parts = (np.hstack(numbers) for numbers in found)
    np.testing.assert_allclose(parts, whole, rtol=1e-3 if is_tokenizer else 2e-4)


def overfit(out=None, end=None, at=None, steps=24, evaluations=24, **changes):
    """Trains on tokens that are all 0; end() is called before the batch of step `at`.

    Returns the tree and the numbers of the steps that it was trained on.
    """
    params = small_tree(scales=((1, 1), (2, 2)), depth=1, convolutions=False, neighbours=False)
    batch, seen = (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)), []

    def batches(done):
        for step in itertools.count(done + 1):
            seen.append(step)
            if step == at:
                end()
            yield batch

    settings = settings_of(steps, evaluations=evaluations, **dict(lr=0.02) | changes)
    return train.train_transformer(params, CODEC, batches, batch, settings, out), seen


def kill():
    raise SystemExit


ctrl_c = partial(signal.raise_signal, signal.SIGINT)


def test_kills_and_ctrl_c_of_a_stage_change_nothing():
    whole, seen = overfit("whole")
    assert seen == [*range(1, 25)]
    goes_on = "stopped at step 12 of next-scale; the same command goes on"
    for end, step, saved, message in (
        (kill, 10, 9, ""),
        (ctrl_c, 12, 12, goes_on),
        (kill, 23, 22, ""),
    ):
        with pytest.raises((SystemExit, KeyboardInterrupt), match=message):
            overfit("cut", end, step)
        assert torch.load("cut/checkpoint.pt")["step"] == saved
    for expected in ([23, 24], [], []):  # afterwards it is over
        cut, seen = overfit("cut")
        assert difference(cut, whole) == 0 and seen == expected

    with pytest.raises(KeyboardInterrupt, match="step 5 of next-scale; nothing is saved"):
        overfit(None, ctrl_c, 5)


@pytest.mark.parametrize("seconds, saved", [(300, 0), (0, 3)])
def test_a_run_is_saved_after_so_many_seconds_at_a_line(monkeypatch, seconds, saved):
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
    with pytest.raises(SystemExit):
        overfit("run", kill, 5, evaluations=1)
    _, seen = overfit("run", evaluations=1)
    assert seen[0] == saved + 1
    lines = [line["step"] for line in lines_of("run", name="loss")]
    assert lines == [3, *range(saved + 3, 25, 3)]


def test_what_is_not_finite_is_not_saved():
    for _ in range(2):  # the same command says so again
        line = run("run", "--lr", 1e30)
        assert re.search(r"tokenizer, step \d+: the loss or gradient is not finite", line)
        assert not {"run/model.pt", "run/checkpoint.pt"} & contents(".").keys()


def train_both(out, last=6):
    """A stage with a discriminator that has an optimizer of its own; killed after step `last`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator, discriminator = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
    settings = settings_of(both_steps=6, evaluations=6, lr=0.05)
    stage = train.Stage("both", dict(generator.named_parameters()), settings, out)
    stage.keep("discriminator", discriminator)
    other = stage.keep("other", torch.optim.AdamW(discriminator.parameters(), lr=0.01))
    margin = stage.keep("margin", torch.zeros(()))

    def batches(done):
        for step in itertools.count(done + 1):
            yield torch.randn(2, 3, 4, 4, generator=train.generator_of("both", step))

    for step, x in stage.each(batches):
        if step > last:
            raise SystemExit
        made = F.conv2d(x, **stage.tree, padding=1)
        real, fake = discriminator(x).mean(), discriminator(made.detach()).mean()
        margin += (real - fake).detach()
        (F.softplus(-real) + F.softplus(fake)).backward()
        train.optimizer_step([other], 0.01)
        stage.backward(1, dict(loss=F.softplus(-discriminator(made).mean())))
        other.zero_grad()
        stage.update()
    return stage


@pytest.mark.parametrize("last", [1, 3])
def test_a_second_optimizer_is_saved_and_goes_on(last):
    whole = train_both("whole")
    with pytest.raises(SystemExit):
        train_both("cut", last)
    cut = train_both("cut")
    assert cut.first_step == last
    saved = [torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("cut", "whole")]
    names = {"discriminator", "other", "margin", "both Muon", "both AdamW"}
    assert saved[0]["extra"].keys() == saved[1]["extra"].keys() == names
    leaves = [pytree.tree_leaves(state) for state in saved]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*leaves, strict=True))
    assert difference(cut.tree, whole.tree) == 0 != saved[0]["extra"]["margin"]
    maps = Path("/proc/self/maps")  # Windows replaces no file that is mapped into memory
    assert not maps.exists() or f"{Path('cut').resolve()}/checkpoint.pt" not in maps.read_text()
    assert train.Stage("next-scale", whole.tree, settings_of(), "cut").step == 0  # of another stage


# Muon


def test_muon_has_full_convolutions_and_the_matrices_of_blocks():
    inner = [(96, 32), (32, 32), (128, 32), (32, 128)]  # attention, then mlp
    small = [(32, 4, 3, 3), (64, 32), (32, 64), *inner]  # the input, what looks at neighbours
    for options, expected in ((dict(convolutions=True, neighbours=True), small), ({}, inner)):
        params = tree(depth=1, masked=0, random=False, **options)
        params["projection"] = torch.zeros(2, 2)  # a leaf that somebody adds
        muon, adamw = train.new_optimizers(params, 0)
        ours, others = (optimizer.param_groups[0]["params"] for optimizer in (muon, adamw))
        assert sorted(tuple(leaf.shape) for leaf in ours) == sorted(expected)
        leaves = pytree.tree_leaves(params)
        assert sorted(map(id, [*ours, *others])) == sorted(map(id, leaves))
    muon, adamw = train.new_optimizers(CODEC, 0)
    assert all(leaf.ndim == 4 for leaf in muon.param_groups[0]["params"])
    assert all(leaf.ndim < 4 for leaf in adamw.param_groups[0]["params"])
    assert adamw.defaults["betas"] == (0.9, 0.95) and adamw.defaults["weight_decay"] == 0


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
    written = {name: data for name, data in results("cut").items() if not name.endswith(".tmp")}
    assert written == results("four")
    for process in start_several(4, "new", "--batch", 6):
        assert "--batch: got 6, expected a multiple of the 4 processes" in ended(process, 1)
    assert not Path("new").exists()


def steps_in_process(environment):
    """Steps of a process, saved in a file of its number."""
    enter(environment)
    train.start_processes("cpu")
    found, images = {}, drawings(8)
    codec = small_codec(codes=64, attention=False, fold=2, seed=3)
    features = tokenizer.encode_features(codec, images / 127.5 - 1)
    features = features.movedim(1, 3).flatten(0, 2)
    spread = torch.linspace(0, 1, 64)[:, None]  # the codes lie among what they are chosen for
    codec["codebook"] = spread * features[:: len(features) // 64][:64]
    batches = iter([(images.tensor_split(train.WORLD)[train.RANK], None)])
    settings = settings_of(lr=1e-9, evaluations=1, scales=SCALES)
    codec = train.train_tokenizer(codec, batches, images[:2], dict(hue_variance=0.1), settings)
    found["codebook"] = codec["codebook"]

    params = small_tree()
    batch = examples_of(hmar.scale_sizes(params))[0]  # the same in each process
    for dropout in (0.0, 0.3):
        settings = settings_of(lr=0.01, label_drop=0.0, dropout=dropout)
        trained = train.train_transformer(params, CODEC, iter([batch]), batch, settings)
        found["dropout" if dropout else "transformer"] = trained

    crops = train.Crops(NumberedImages(12), range(12), settings_of())
    layers = train.learn_perceptual_layers(crops, settings_of(3), CPU)
    x = images / 127.5 - 1
    found["perceptual"] = [x := layer(x) for layer in layers]
    torch.save(found, f"{train.WORLD} {train.RANK}.pt")


def test_two_processes_have_the_same_codes_and_perceptual_network_but_other_dropout():
    processes = [FORKS.Process(target=steps_in_process, args=(x,)) for x in ({}, *environments(2))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    alone, *both = (torch.load(name) for name in ("1 0.pt", "2 0.pt", "2 1.pt"))
    assert difference(*both) == 0
    for name in ("codebook", "transformer", "perceptual"):
        assert difference(both[0][name], alone[name]) < 1e-5, name
    # If both dropped the same, their mean gradient would be that of one.
    assert difference(both[0]["dropout"], alone["dropout"]) > 1e-3


def test_a_run_goes_on_with_another_number_of_processes(base, out):
    remove(out, "transformer")
    for process in start_several(2, out):
        ended(process)
    ours, theirs = (
        [line["held_out_loss"] for line in lines_of(folder, name="held_out_loss")][-6:]
        for folder in (out, base)
    )
    assert ours == pytest.approx(theirs, rel=0.1)


# The recipe and its settings


STEPS = [f"{stage}_steps" for stage in ("tokenizer", "decoder", "next_scale", "masked")]
PINNED = """
depth size images simple: batch central_every, steps of the stages; codes; lr decay; guidance
2 32 9872 False: 16 2 1250 250 3125 285; 256; .004 .05; 4.4 2.6 1
3 32 9872 False: 32 2 1846 422 5274 480; 512; .0030116 .03615; 3.2 1.8 1
2 64 9872 False: 8 2 1220 244 3050 278; 256; .004 .05; 2.6 2.6 2
3 64 1900 False: 16 10 2059 412 4157 468; 512; .0030116 .03615; 2.6 1.8 1
2 32 20372 True: 16 1 851 170 2125 194; 256; .004 .05; 4.4 2.6 1
4 32 49872 False: 48 2 2917 667 8334 758; 512; .0024623 .02872; 1.8 1.5 1
"""
COLUMNS = ["batch", "central_every", *STEPS, "codes", "lr", "decay"]
COLUMNS += ["guidance", "mask_guidance", "rise"]


@pytest.mark.parametrize("line", PINNED.strip().splitlines()[1:])
def test_numbers_that_were_chosen_by_trials(line):
    given, expected = line.replace(";", "").split(": ")
    depth, size, images, is_simple = (eval(word) for word in given.split())
    settings = train.recipe(depth, size, images, 10, is_simple)
    expected = dict(zip(COLUMNS, map(float, expected.split()), strict=True))
    assert {name: settings[name] for name in COLUMNS} == pytest.approx(expected, rel=1e-3)
    chosen = dict(label_drop=0.1, gamma=0.1, masked_passes=0, temperature=0.75, cooling=1.5)
    weights = (0.25, 0.72) if size > 32 else (0.5, 0.0)
    chosen |= zip(("texture_weight", "jump_weight"), weights)
    chosen |= dict(spectrum_weight=0.25 if is_simple else 2.0)
    chosen |= dict(perceptual=size > 32, loss_weights="token" if is_simple else "root")
    assert {name: settings[name] for name in chosen} == chosen


def test_the_recipe_grows_by_its_laws():
    runs = [train.recipe(depth, 256, 10**9, 10) for depth in range(1, 31)]
    for small, large in itertools.pairwise(runs):
        assert small["batch"] <= large["batch"] and small["lr"] > large["lr"]
        for steps in STEPS:
            assert small[steps] * small["batch"] < large[steps] * large["batch"]
    published = dict(codes=4096, code_dim=32, channels=160, multipliers=(1, 1, 2, 2, 4))
    assert published.items() <= runs[15].items()
    for name, values in dict(neighbours=(True, False), loss_weights=("root", "lognormal")).items():
        assert [run[name] for run in runs] == 7 * [values[0]] + 23 * [values[1]]
    for images, dropout in ((7_000, 0.0), (6_000, 0.1)):  # some 7 epochs, and 8.5
        assert train.recipe(2, 32, images, 10)["dropout"] == dropout
    few = train.recipe(2, 32, 190, 10)  # of which no stage makes more epochs than these
    epochs = [few[f"{stage}_steps"] * few["batch"] / 190 for stage in ("tokenizer", "next_scale")]
    assert 80 <= epochs[0] < 81 and 35 <= epochs[1] < 36
    for size, cell in ((16, 4), (64, 4), (96, 8), (128, 8), (256, 16), (1024, 16)):
        for depth in (2, 3):
            sizes = train.arguments(tokenizer.init, train.recipe(depth, size, 100, 10))
            assert tokenizer.downsampling(tokenizer.init(**sizes)) == cell
    for given, sides in (
        ((2, 48, 100, 10), [1, 2, 3, 6, 12]),
        ((3, 48, 100, 10), [1, 2, 3, 4, 6, 8, 12]),
        ((2, 32, 100, 10), [1, 2, 5, 8, 8]),
        ((2, 32, 100, 10, True), [1, 2, 4, 8]),
    ):
        assert [h for h, _ in train.recipe(*given)["scales"]] == sides


SMALL_CODEC = dict(codes=32, code_dim=8, channels=96, multipliers=(1, 1, 2), residual_blocks=1)
SETTINGS = dict(evaluations=2, newton_schulz=3, decay=0.2, masked_steps=5, guidance=2.5)
SETTINGS |= dict(label_drop=0.3, loss_weights="root", batch=10, codes=32, code_dim=8, channels=96)
SETTINGS |= dict(masked_blocks=1, gamma=0.5, neighbours=False, scales=((1, 1), (4, 4)))
SETTINGS |= dict(texture_weight=0.1, jump_weight=0.2, spectrum_weight=0.3, lr=0.008)


def test_settings_reach_the_stages_that_take_them():
    """And so does the seed: each tree begins with random numbers of its own."""
    options = OPTIONS | dict(depth=3, seed=4, steps=7)
    stages = stages_of(NumberedImages(40), **options, **SETTINGS)
    for stage in stages:
        settings = stage["settings"]
        assert {name: settings[name] for name in SETTINGS} | {"guidance": 2.5} == SETTINGS
        assert [settings[name] for name in STEPS] == [7, 7, 7, 5] and settings["seed"] == 4
        assert settings["classes"] == ["ant", "bee", "cow"]
        (images, _) = next(stage["batches"](0))
        assert len(images) == 10
    codec = tokenizer.init(**SMALL_CODEC, attention=False, seed=4)
    assert leaves_equal(stages[0]["codec"], codec) and leaves_equal(stages[1]["codec"], codec)
    learned, decoded = (stage["terms"] for stage in stages[:2])
    assert learned == dict(hue_variance=mock.ANY, texture_weight=0.1, jump_weight=0.2)
    assert decoded == dict(hue_variance=mock.ANY, texture_weight=0, spectrum_weight=0.3)
    assert stages[1]["decoder_only"]
    sizes = dict(depth=3, classes=3, codes=32, code_dim=8, scales=SETTINGS["scales"], gamma=0.5)
    params = hmar.init(**sizes, convolutions=True, neighbours=False, seed=4)
    assert leaves_equal(stages[2]["params"], params)
    assert leaves_equal(stages[3]["params"], hmar.add_masked_branch(params, 1, seed=4))


def test_hmar_as_published_but_small_is_one_command():
    flags = ["--set", "convolutions=False", "neighbours=False", "masked_passes=1", "label_drop=0"]
    flags += ["--set", "loss_weights=lognormal", "scales=((1, 1), (2, 2), (4, 4))"]
    assert run("run", *SHORT, *flags) is None
    model = sample.load_model("run")
    params = model["transformer"]
    assert params["input"]["weight"].ndim == 2 and "depthwise" not in params["masked"]["blocks"][0]
    assert all("neighbours" not in params[branch] for branch in ("next_scale", "masked"))
    scales = hmar.scale_sizes(params)
    assert scales == ((1, 1), (2, 2), (4, 4))
    assert model["sampling"]["schedule"] == sample.masked_schedule(scales, 1)
    passes = list(sample.steps(params, model["tokenizer"], torch.tensor([0]), **model["sampling"]))
    assert len(passes) == 5
    settings = json.loads(Path("run/args.json").read_text())
    assert settings["channels"] == 32  # FLAGS has a --set, too
    assert settings["loss_weights"] == "lognormal" and settings["label_drop"] == 0


# Data as an argument


FLOWERS = [(train.draw_shape(i, 20)[0].convert("L"), np.int64(i % 2)) for i in range(12)]
PHOTOS = [(image, 0) for image, _ in FLOWERS]  # a list, without names of classes


@pytest.mark.parametrize(
    "dataset, names",
    [(Listed(FLOWERS, ("daisy", "rose")), ["daisy", "rose"]), (PHOTOS, ["images"])],
)
def test_train_takes_a_dataset_and_returns_a_model(dataset, names, capsys):
    options = OPTIONS | dict(steps=2, batch=4, channels=32)
    before = contents(".").keys()
    model = train.train(dataset, **options)
    assert contents(".").keys() == before  # nothing is written
    assert "no run folder: HMAR of depth 1;" in capsys.readouterr().out
    assert model["classes"] == names
    assert (model["sampling"]["guidance"] == 0) == (len(names) == 1)  # nothing to be guided by
    images = sample.generate(model, [names[-1], 0])
    assert images.shape == (2, 3, 16, 16) and images.std() > 0
    again = train.train(dataset, "run", **options)
    for part in ("tokenizer", "transformer"):
        assert leaves_equal(again[part], model[part])
        assert leaves_equal(sample.load_model("run")[part], model[part])
        assert all(type(leaf) is torch.Tensor for leaf in pytree.tree_leaves(again[part]))


# What the stages compute


def drawings(count):
    """uint8 (count, 3, 16, 16)."""
    images = [torch.from_numpy(np.array(train.draw_shape(i, 16)[0])) for i in range(count)]
    return torch.stack(images).permute(0, 3, 1, 2)


def test_dead_codes_are_replaced_at_first_and_every_twentieth_step_until_the_last_fifth():
    """Read from the checkpoints: a batch begins when that of the step before is written."""
    codec = small_codec(codes=64, attention=False, fold=2, seed=7)
    images, states = drawings(60).split(2), []

    def batches():
        for step in range(1, 46):
            if step > 1:
                states.append(torch.load("run/checkpoint.pt"))
            yield images[step % 30], None

    settings = settings_of(45, lr=1e-12, evaluations=45, scales=SCALES)
    train.train_tokenizer(codec, batches(), images[0][:1], dict(hue_variance=1), settings, "run")
    before, chosen, revived = codec["codebook"], torch.zeros(64), {}
    for step, state in enumerate(states, 1):
        codebook = state["tree"]["codebook"]
        features = tokenizer.encode_features(codec, images[step % 30] / 127.5 - 1)
        residuals, tokens, _ = zip(
            *tokenizer.quantise(codec | dict(codebook=before), features, SCALES)
        )
        chosen += torch.cat([x.flatten() for x in tokens]).bincount(minlength=64)
        changed = (codebook - before).abs().amax(1) > 1e-4
        if changed.any():
            assert torch.equal(changed, chosen == 0) and not changed.all()
            near = [torch.cdist(codebook[changed], x.flatten(0, 1)).amin(1) for x in residuals]
            near = torch.stack(near) < 1e-3  # (S, n)
            assert near.any(0).all()  # each is a vector that was quantised
            revived[step] = near[0].float().mean()  # the share of those of the first scale
            chosen.zero_()
        assert torch.equal(state["extra"]["chosen"], chosen.long())
        before = codebook
    assert [*revived] == [1, 20] and max(revived.values()) < 0.5


def test_held_out_numbers_are_of_saved_weights(base):
    model = sample.load_model(base)
    codec, params = model["tokenizer"], model["transformer"]
    dataset = train.Folder("data", 16)
    stage, *_ = stages_of(dataset, **OPTIONS)
    images = stage["held_out"] / 127.5 - 1
    stage, *_ = stages_of(dataset, tokenizer=base, **OPTIONS)
    labels, tokens = stage["held_out"]
    assert torch.equal(tokens, tokenizer.encode(codec, images, SCALES))
    errors = tokenizer.decode(codec, tokens, SCALES) - images
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    settings = stage["settings"]
    weights = hmar.scale_weights(SCALES, settings["loss_weights"])
    surprise, without = (
        (hmar.losses(params, given, tokens, inputs) * weights).sum(1).mean()
        for given in (labels, torch.full_like(labels, 3))
    )
    share = 1 / (1 + ((without - surprise).clamp(min=0).item() / 0.1) ** 2)
    expected = {name: settings[name] for name in model["sampling"]}
    expected |= {name: share * settings[name] for name in ("guidance", "mask_guidance")}
    assert model["sampling"] == pytest.approx(expected, rel=1e-5)
    generator = train.generator_of("held-out mask")
    mask = torch.rand(len(labels), 36, generator=generator) < 0.5
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


@pytest.mark.parametrize(
    "given, expected",
    [({}, (2.2, 1.3)), (dict(guidance=2.5), (2.5, 2.6)), (dict(mask_guidance=2.0), (4.4, 2.0))],
)
def test_guidance_is_weakened_once_unless_it_is_given(given, expected, monkeypatch):
    """In pictures of both stages, and in the model, by a gain that is halving_gain."""
    found, drawn = train.evaluate_transformer, []

    def evaluate(*arguments):
        numbers = found(*arguments)
        return numbers | (dict(class_gain=0.1) if "class_gain" in numbers else {})

    monkeypatch.setattr(train, "evaluate_transformer", evaluate)
    monkeypatch.setattr(train, "draw_samples", lambda *given: drawn.append(given[-1]))
    options = OPTIONS | dict(depth=2, steps=1, batch=4)
    model = train.train(NumberedImages(40), **options, **given)
    assert len(drawn) == 2
    for sampling in (model["sampling"], *drawn):
        strengths = sampling["guidance"], sampling["mask_guidance"]
        assert strengths == pytest.approx(expected)
    below = train.weaken_guidance(settings_of(), -1)  # which changes nothing
    assert below == {name: settings_of()[name] for name in below}


def test_the_gain_of_a_class_is_that_of_its_vector():
    params = small_tree(scales=SCALES, convolutions=False)
    params["classes"] = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    weights, tokens = hmar.scale_weights(SCALES, "root"), random_tokens(3, SCALES, 16)
    labels = torch.tensor([0, 1, 2])
    ours, theirs = (
        train.evaluate_transformer(params, CODEC, weights, (conditions, tokens))
        for conditions in (labels, params["classes"][labels])
    )
    assert ours == pytest.approx(theirs, abs=1e-5) and ours["class_gain"] != 0


# Weights that are given


def save_params(path, codec=CODEC, causal=False, classes="abcde", seed=5, depth=3):
    scales = tuple((side, side) for side in (1, 2, 3, 4, 4))  # of 8 pixels
    sizes = dict(width=32, classes=len(classes), codes=16, code_dim=8, depth=depth, scales=scales)
    params = hmar.init(**sizes, causal=causal, seed=seed)
    params = params if causal else hmar.add_masked_branch(params, min(2, depth))
    model = dict(transformer=params, classes=[*classes], sampling={})
    torch.save(model | (dict(tokenizer=codec) if codec else {}), path)
    return params


INIT = ["--batch", 4, "--dtype", "fp32", "--device", "cpu", "--data", "data", *SHORT, "--init"]


def test_init_fits_scales_and_branches():
    params = save_params("init.pt")
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    sides = {32: [1, 2, 3, 4, 6, 8, 11, 16], 8: [1, 2, 3, 4, 4]}
    for size, flags in ((32, ["--size", 32]), (8, [])):  # it has 8 pixels
        assert failure(train.main, *INIT, "init.pt", *flags, "--out", size) is None
        model = sample.load_model(f"{size}")
        made = model["transformer"]
        assert difference(made["trunk"] + made["next_scale"]["blocks"], blocks) < 1e-6
        assert [side for side, _ in hmar.scale_sizes(made)] == sides[size]
        assert made["classes"].shape == (4, 32) and len(made["masked"]["blocks"]) == 2
        assert leaves_equal(model["tokenizer"], CODEC)  # the one that its tokens are of
        assert json.loads(Path(f"{size}/args.json").read_text())["size"] == size
    for name in ("levels", "positions"):
        assert difference(made[name], params[name]) < 1e-6

    save_params("bare.pt", codec=None)
    save_params("wide.pt", codec=small_codec(code_dim=16))

    def begin(*init):
        return failure(train.main, *INIT, *init, "--out", "new")

    assert begin("bare.pt") == "train.py: bare.pt: has no tokenizer"
    # twice the channels would be read by convolutions of two groups
    assert "got (codes, code_dim) (16, 16), expected (16, 8)" in begin("wide.pt")
    assert not Path("new").exists()
    assert begin("bare.pt", "--tokenizer", "init.pt") is None


@pytest.mark.parametrize("names, is_kept", [("abc", True), ("acb", False), ("abcd", False)])
def test_embeddings_of_other_classes_are_new(names, is_kept):
    params = save_params("init.pt", classes=names)
    stage, *_ = stages_of(Listed(FLOWERS, "abc"), init="init.pt", device="cpu", dtype="fp32")
    embeddings = stage["params"]["classes"]
    assert len(embeddings) == 4
    is_same = [torch.equal(*pair) for pair in zip(embeddings, params["classes"])]
    assert is_same == [is_kept] * 4


def test_settings_that_contradict_given_models_are_refused():
    save_params("init.pt")
    save_params("other.pt", seed=6)
    init, other, tokens = (
        ["--init", "init.pt"],
        ["--init", "other.pt"],
        ["--tokenizer", "init.pt"],
    )

    def begin(*flags):
        return failure(train.main, *INIT[:-1], "--out", "run", *flags)

    for flags, name in (
        (["--depth", 2, *init], "depth: got 2, but .* 3"),
        (["--causal", *init], "is_causal: got True, but .* False"),
        (["--set", "codes=9", *init], "codes: got 9, but .* 16"),
        (["--set", "code_dim=9", *tokens], "code_dim: got 9, but .* 8"),
    ):
        assert re.match(f"train.py: {name}", begin(*flags)), flags
    assert not Path("run").exists()
    assert begin("--depth", 3, "--set", "codes=16", *init) is None
    assert "begun with other settings or data (init" in begin(*other)


def test_var_has_no_masked_stage(capsys):
    assert run("run", *SHORT, "--causal") is None
    model = sample.load_model("run")
    assert "causal" in model["transformer"] and "masked" not in model["transformer"]
    assert {line["stage"] for line in lines_of("run")} == {*STAGES[:3]}
    again = train.train(PHOTOS, "more", init="run", steps=1, device="cpu", dtype="fp32")
    assert "more: VAR of depth 1" in capsys.readouterr().out
    assert "causal" in again["transformer"] and "masked" not in again["transformer"]
    assert {line["stage"] for line in lines_of("more")} == {"next-scale"}


@pytest.mark.parametrize("flag", ["--init", "--tokenizer"])
def test_given_models_are_copied_so_that_a_run_goes_on_without_their_files(flag):
    save_params("given.pt", depth=1)
    flags = "--size", 8, flag, "given.pt"
    ended(start("whole", *flags))
    interrupted(start("cut", *flags), "next-scale 8/24")
    os.rename("given.pt", "elsewhere.pt")
    interrupted(start("cut", *flags), "masked 8/24")
    ended(start("cut", *flags))
    assert results("cut") == results("whole")
    assert {line["stage"] for line in lines_of("whole")} == {*STAGES[2:]}
    assert leaves_equal(sample.load_model("whole")["tokenizer"], CODEC)


# Run folders that are not what they were


def test_a_stage_is_finished_if_the_model_file_has_its_part(base, out):
    remove(out, "transformer")
    assert run(out) is None
    assert results(out) == results(base)
    before = Path(out, "metrics.jsonl").read_bytes()
    assert run(out, "--seed", 0, "--set", "label_drop=0.1") is None  # what it was begun with
    assert Path(out, "metrics.jsonl").read_bytes() == before and results(out) == results(base)
    (out / "model.pt").unlink()  # to train all anew
    assert run(out) is None
    assert results(out) == results(base)


def test_other_settings_are_refused_by_name(base, out):
    for flags, names in (
        (["--seed", 3, "--flip"], ["seed 0 -> 3", "flip False -> True"]),
        (["--depth", 2, "--steps", 9], ["depth 1 -> 2", "decoder_steps 24 -> 9"]),
        (["--tokenizer", base], [f"tokenizer None -> {base}"]),
    ):
        printed = run(out, *flags)
        assert printed.startswith(f"train.py: --out: {out} was begun with other settings or data")
        assert all(name in printed for name in names) and "\n" not in printed
    assert results(out) == results(base)


NO_RUN = [("tokens.npy", "x"), ("samples/mine.png", "x"), ("model.pt", "x"), ("args.json", "[]")]
NO_RUN.append(("args.json", '{"lr": 1}'))


@pytest.mark.parametrize("name, content", NO_RUN)
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(name, content):
    Path("run", name).parent.mkdir(parents=True)
    Path("run", name).write_text(content)
    before = contents("run")
    assert run("run") == "train.py: --out: run is neither empty nor a run of train.py"
    assert contents("run") == before


REFUSED = """
--data none  --data: there is no folder none
--size 15  --size: got 15, expected a multiple of 4, 8 or more
--size 4  --size: got 4, expected a multiple of 4, 8 or more
--size 0  size: got 0, expected
--batch 0  batch: got 0, expected
--depth -1  depth: got -1, expected
--steps 0  steps: got 0, expected
--lr 0  lr: got 0.0, expected
--lr nan  lr: got nan, expected
--seed -1  seed: got -1, expected 0 to
--tokenizer none.pt  none.pt
--init none.pt  none.pt
--init text.pt  text.pt: expected published weights
--out text.pt  text.pt
--set nothing=1  nothing: no such setting, expected one of
--set codes=many  codes: got 'many', expected a value like
--set codes=2.5  codes: got 2.5, expected a value like
--set neighbours=1  neighbours: got 1, expected a value like True
--set label_drop=True  label_drop: got True, expected
--set label_drop=10  label_drop: got 10, expected
--set label_drop=1.0  label_drop: got 1.0, expected
--set label_drop=-1  label_drop: got -1, expected
--set dropout=10  dropout: got 10, expected
--set dropout=-0.1  dropout: got -0.1, expected
--set halving_gain=0  halving_gain: got 0, expected
--set masked_steps=0  masked_steps: got 0, expected
--set evaluations=0  evaluations: got 0, expected
--set central_every=0  central_every: got 0, expected
--set scales=((1,1),(3,3))  scales: got ((1, 1), (3, 3)), expected two or more, the last 4 x 4
--set scales=((2,2),(1,1),(4,4))  scales: got ((2, 2), (1, 1), (4, 4)), expected
--set loss_weights=none  none
--set masked_blocks=9  masked_blocks: got 9, expected 1 to
--set masked_passes=-1  masked_passes: got -1
--set temperature=-1.0  temperature: got -1.0
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_wrong_flags_and_settings_are_refused_in_a_line(line):
    Path("text.pt").write_text("text")
    flags, message = line.split("  ")
    printed = run("run", *flags.split())
    assert printed.startswith("train.py: ") and message in printed and "\n" not in printed
    assert not Path("run").exists()
    if "--set" in flags:  # as arguments of the function, too
        name, value = train.setting(flags.split()[1])
        refused(re.escape(message), train.train, NumberedImages(), size=16, **{name: value})


def test_a_setting_without_a_value_is_refused_as_argparse_does(capsys):
    assert run("run", "--set", "batch") == 2
    assert "'batch'" in capsys.readouterr().err and not Path("run").exists()
