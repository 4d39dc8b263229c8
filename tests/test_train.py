"""The trainer: what a step computes, that nothing is lost, that several processes are one, and what bad input is told.

`python tests/test_train.py --long` kills each stage of 60 steps at ten random moments, which takes minutes and is no part of the tests.
"""

import argparse
import contextlib
import copy
import errno
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hmar
import sample
import tokenizer
import train

SCALES = ((1, 1), (2, 2), (4, 4), (8, 8))
TINY = [
    *(
        "--size",
        "16",
        "--scales",
        "1",
        "2",
        "4",
        "8",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--workers",
        "0",
    ),
    *(
        "--channels",
        "32",
        "--multipliers",
        "1",
        "1",
        "--residual-blocks",
        "1",
        "--codes",
        "32",
        "--code-dim",
        "8",
        "--revive-every",
        "5",
    ),
    *("--depth", "2", "--width", "32", "--masked-blocks", "1", "--batch", "4", "--warmup", "2"),
    *("--log-every", "1", "--save-every", "4", "--eval-every", "10"),
]
STEPS = 24
SERVER = """
import json, os, signal, sys, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs lack
import torch
torch.set_num_threads(1)
import sample, train
train.draw_shape(0)
train.Image.init()
leaf = torch.zeros(1, requires_grad=True)
leaf.grad = torch.zeros(1)
torch.optim.AdamW([leaf]).step()  # which imports more than torch itself
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        pid, status = os.waitpid(job["wait"], job["flags"])
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    status = 1
    try:
        os.environ.update(job["environment"])
        sys.argv = [job["command"] + ".py", *job["flags"]]
        exec(job["before"], globals())
        status = {"train": train, "sample": sample}[job["command"]].main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)
"""


class Commands:
    """`python train.py ...` and `python sample.py ...` in processes of their own, without the seconds that importing torch takes: one
    process has imported it and forks for each command."""

    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        environment = os.environ | dict(
            PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"
        )
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **job):
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, command, *flags, before="", **environment):
        """A command that runs: before is Python to run in its process first."""
        self.count += 1
        job = Job(self, *(str(self.folder / f"{self.count}.{name}") for name in ("out", "err")))
        job.pid = self.ask(
            command=command,
            flags=[str(flag) for flag in flags],
            before=before,
            environment=environment,
            out=job.out_path,
            err=job.err_path,
        )
        return job

    def run(self, command, *flags, **options):
        return self.start(command, *flags, **options).wait()

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Job:
    def __init__(self, commands, out_path, err_path):
        self.commands, self.out_path, self.err_path, self.status = (
            commands,
            out_path,
            err_path,
            None,
        )

    def wait(self, flags=0):
        """Itself once it has ended, with status (minus the signal that killed it); flags os.WNOHANG: as far as it is."""
        if self.status is None:
            self.status = self.commands.ask(wait=self.pid, flags=flags)
        return self

    def kill(self, number):
        with contextlib.suppress(
            ProcessLookupError
        ):  # a child that has ended is kept until it is waited for
            os.kill(self.pid, number)
        return self.wait()

    @property
    def out(self):
        return Path(self.out_path).read_text()

    @property
    def err(self):
        return Path(self.err_path).read_text()

    def done(self):
        assert self.wait().status == 0, self.out + self.err
        return self


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


def drawings(folder, count=30, size=16, classes=3):
    """A folder of drawn shapes, one sub-folder a class."""
    for index in range(count):
        image, _ = train.draw_shape(index, size)
        path = folder / train.SHAPES[index % classes] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawings(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, commands, folder):
    """A run folder of all three stages that nobody interrupted. Only to be read."""
    run = tmp_path_factory.mktemp("runs") / "base"
    commands.run("train", *TINY, "--data", folder, "--out", run, "--steps", STEPS).done()
    return run


def continued(base, run, *stages):
    """A run folder in which the stages of `base` that are named are finished."""
    run.mkdir()
    for path in base.glob("tokens-*"):
        shutil.copy(path, run)
    for stage in stages:
        shutil.copy(base / ("tokenizer.pt" if stage == "tokenizer" else "hmar.pt"), run)
        shutil.copy(base / f"{stage}.resume.pt", run)
    settings = json.loads((base / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({stage: settings[stage] for stage in stages}))
    return run


@pytest.fixture(autouse=True)
def alone():
    """One thread, and the signal handlers as they were."""
    threads, handlers = (
        torch.get_num_threads(),
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
    )
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lines_of(run, stage=None):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in (None, line["stage"])]


def difference(ours, theirs):
    """The largest absolute difference of two trees' tensors; the trees have the same structure and other leaves."""
    (ours, structure), (theirs, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert structure == other
    assert [leaf for leaf in ours if not torch.is_tensor(leaf)] == [
        leaf for leaf in theirs if not torch.is_tensor(leaf)
    ]
    return max(
        float((a.double() - b.double()).abs().max())
        for a, b in zip(ours, theirs)
        if torch.is_tensor(a) and a.numel()
    )


def weights(run, name):
    return torch.load(Path(run) / name, weights_only=True)


def assert_same_run(ours, theirs):
    """Bit for bit: weights, optimizer, moving averages, tokens, settings and metrics."""
    for name in ("tokenizer.pt", "hmar.pt", *(f"{stage}.resume.pt" for stage in train.STAGES)):
        assert difference(weights(ours, name), weights(theirs, name)) == 0, name
    for name in ("metrics.jsonl", "args.json", "tokens-train.npy", "tokens-held-out.npy"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_every_stage_learns(base):
    for stage in train.STAGES:
        losses = [line["loss"] for line in lines_of(base, stage) if "loss" in line]
        assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) and losses[-1] < losses[0], (
            stage,
            losses,
        )
    evaluations = [line["psnr"] for line in lines_of(base, "tokenizer") if "psnr" in line]
    assert len(evaluations) == 3 and evaluations[-1] > evaluations[0]
    assert [line["step"] for line in lines_of(base, "masked") if "held_out_loss" in line] == [
        10,
        20,
        STEPS,
    ]


def test_the_run_folder(base, folder):
    tokenizer_params, params = weights(base, "tokenizer.pt"), weights(base, "hmar.pt")
    images, _ = sample.generate(
        params, tokenizer_params, torch.tensor([0, 2])
    )  # plain trees, as the functions take them
    assert (
        images.shape == (2, 3, 16, 16)
        and hmar.scales(params) == SCALES
        and params["masked"]["own_input"].shape == (32, 8)
    )
    for leaf in pytree.tree_leaves((tokenizer_params, params)):
        assert (
            type(leaf) is torch.Tensor
            and not leaf.requires_grad
            and leaf.device.type == "cpu"
            and leaf.isfinite().all()
        )
    settings = json.loads((base / "args.json").read_text())
    for stage in train.STAGES:
        assert (
            settings[stage]["class_names"] == sorted(train.SHAPES[:3])
            and settings[stage]["finished"]
        )
        assert (
            settings[stage]["steps"] == STEPS
            and settings[stage]["data"] == str(folder)
            and settings[stage]["dtype"] == "float32"
        )
    lines = lines_of(base)
    assert all(line["stage"] in train.STAGES and 1 <= line["step"] <= STEPS for line in lines)
    first = next(line for line in lines if line["stage"] == "next-scale")
    assert first["lr"] > 0 and first["gradient"] > 0 and len(first["scale_losses"]) == len(SCALES)
    judged = next(
        line for line in lines if line["stage"] == "next-scale" and "held_out_loss" in line
    )
    assert judged["ln_codes"] == pytest.approx(math.log(32)) and 0 <= judged["accuracy"] <= 1
    assert len(judged["held_out_scale_losses"]) == len(judged["scale_accuracies"]) == len(SCALES)
    side = 64 + 2  # 16 pixels, four times as large, and a gap
    held_out = len(np.load(base / "tokens-held-out.npy"))
    for name, rows, columns in (
        ("reconstructions", 2 + len(SCALES), min(8, held_out)),
        ("next-scale", 3, 8),
        ("masked", 3, 8),
    ):
        with Image.open(base / "samples" / f"{name}.png") as sheet:
            left = sheet.width - columns * side
            assert sheet.format == "PNG" and sheet.height == rows * side and 12 < left < 160, name
    assert sorted(path.name for path in base.iterdir()) == sorted(
        [
            "args.json",
            "hmar.pt",
            "metrics.jsonl",
            "samples",
            "tokenizer.pt",
            *(f"{stage}.resume.pt" for stage in train.STAGES),
            *(
                f"tokens-{part}{end}"
                for part in ("train", "held-out")
                for end in (".npy", ".done.npy", ".json")
            ),
        ]
    )


def progress(run):
    """Steps of the stages together, by the last whole line of metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    lines = (
        [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        if path.exists()
        else []
    )
    last = json.loads(lines[-1]) if lines else dict(stage="tokenizer", step=0)
    return train.STAGES.index(last["stage"]) * 1000 + last["step"]


def reach(job, run, moment, pause=0.0):
    """Waits until a run has come to a moment (1000 a stage, then steps) and a pause more, or has ended; whether it still runs."""
    while progress(run) < moment and job.wait(os.WNOHANG).status is None:
        time.sleep(0.002)
    time.sleep(pause)
    return job.wait(os.WNOHANG).status is None


def kill_often(commands, run, flags, moments, chance):
    """Runs a command to its end, killing it with SIGKILL a few milliseconds after each moment. How often it was killed."""
    kills = 0
    for moment in moments:
        job = commands.start("train", *flags)
        if reach(job, run, moment, chance.uniform(0, 0.03)):
            kills += job.kill(signal.SIGKILL).status == -signal.SIGKILL
        job.wait()
        assert job.status in (0, -signal.SIGKILL), job.out + job.err
    last = commands.run("train", *flags).done()
    assert last.err == ""
    return kills


def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(
    base, commands, folder, tmp_path
):
    chance = random.Random()  # a new one each time: no moment may matter
    moments = sorted(
        stage * 1000 + step for stage in range(3) for step in chance.sample(range(1, STEPS + 1), 3)
    )
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--steps", STEPS]
    assert (
        kill_often(commands, tmp_path / "run", flags, moments, chance) >= 3
    )  # of 9; a busy machine may be late
    assert_same_run(tmp_path / "run", base)


def signalled(number, stage, step):
    """Python that has a process send itself a signal when it has written a step's metrics."""
    return (
        f"write = train.Metrics.write\n"
        f"def signalled(self, step, **numbers):\n"
        f"    write(self, step, **numbers)\n"
        f"    if (self.stage, step) == ({stage!r}, {step}) and 'loss' in numbers: os.kill(os.getpid(), {number})\n"
        f"train.Metrics.write = signalled"
    )


def test_a_run_that_is_asked_to_stop_saves_says_how_to_go_on_and_does(
    base, commands, folder, tmp_path
):
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--steps", STEPS]
    for number, stage, step in (
        (signal.SIGINT, "tokenizer", 5),
        (signal.SIGTERM, "next-scale", 10),
        (signal.SIGINT, "masked", 7),
    ):
        job = commands.run("train", *flags, before=signalled(int(number), stage, step))
        assert job.status == 130, job.out + job.err
        assert job.err == (
            f"train.py: {stage}: stopped at step {step} of {STEPS} and saved; "
            "the same command, without --restart, continues there\n"
        )
        assert weights(tmp_path / "run", f"{stage}.resume.pt")["step"] == step
    job = commands.run("train", *flags).done()
    assert (
        f"masked: continues at step 7 of {STEPS}" in job.out
        and "tokenizer: finished before" in job.out
    )
    assert_same_run(tmp_path / "run", base)


def test_an_interruption_before_the_first_step_says_that_it_goes_on(
    folder, tmp_path, capsys, monkeypatch
):
    def interrupted(files):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "check_images", interrupted)
    assert train.main([*TINY, "--data", str(folder), "--out", str(tmp_path / "run")]) == 130
    assert "the same command" in capsys.readouterr().err


def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, monkeypatch):
    """Each stage's step is one graph; Dynamo's interpreter runs it, since a real backend would take minutes."""
    runs, graphs, compile = [], [], torch.compile
    torch.compiler.reset()

    def captured(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda model: compile(model, backend=captured, fullgraph=True)
    )
    monkeypatch.setattr(
        train,
        "data_sets",
        lambda args: (train.Images(range(40), 16), train.Images(range(40, 50), 16), train.SHAPES),
    )
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        assert train.main([*TINY, *flags, "--steps", "2", "--out", str(tmp_path / name)]) == 0
        assert bool(graphs) == bool(flags)
        runs.append([line["loss"] for line in lines_of(tmp_path / name) if "loss" in line])
    assert len(runs[0]) == 6
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_the_adversarial_loss_compiles_in_bf16():
    """In two graphs, since the balance of the losses asks for a gradient between them; AOTAutograd makes of each a node of its own."""
    params = tokenizer.init(
        codes=32, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, attention=False
    )
    tree = dict(
        tokenizer=train.trainable(params),
        discriminator=train.trainable(tokenizer.init_discriminator(channels=8)),
    )
    args = argparse.Namespace(dtype=torch.bfloat16, scales=SCALES, beta=0.1)
    model = train.Trained(tree, functools.partial(train.tokenizer_loss, args))
    generator = torch.Generator().manual_seed(0)
    pixels, uniform = (
        torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1,
        torch.rand(2, 4, generator=generator),
    )
    batch = (
        pixels,
        False,
        None,
        0.3,
        uniform,
    )  # not quantised: in bf16 the choice between two codes may fall to the other
    torch.compiler.reset()
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        call(*batch)[0].backward()
        gradients.append(
            torch.cat([leaf.grad.flatten() for leaf in model.leaves if leaf.grad is not None])
        )
        model.zero_grad()
    assert (
        gradients[0].norm() > 0
        and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    )


# A toy stage: the tokenizer's loop on one matrix.


def toy_flags(out, **changes):
    return argparse.Namespace(
        **dict(
            out=str(out),
            stage="tokenizer",
            steps=12,
            lr=0.1,
            warmup=2,
            decay="cosine",
            weight_decay=0.05,
            clip=1.0,
            ema=0.9,
            batch=4,
            accumulate=1,
            log_every=1,
            save_every=4,
            eval_every=6,
            seed=0,
            compile=False,
            device=torch.device("cpu"),
        )
        | changes
    )


class Killed(BaseException):
    pass


def killed(*arguments, **options):
    raise Killed


def toy_fit(args, evaluate=None, after_step=None):
    """Weights of a linear regression that train.fit trained."""

    def loss(params, x, y):
        value = (hmar.linear(x, **params) - y).square().mean()
        return value, dict(loss=value.detach())

    def batches(start):
        for step in range(start, args.steps):
            x = torch.randn(4, 3, generator=train.generator_of("toy", step))
            yield [(x, x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))]

    params = train.trainable(dict(weight=torch.zeros(2, 3), bias=torch.zeros(2)))
    return train.fit(args, params, loss, batches, evaluate=evaluate, after_step=after_step)


def interrupt_at(step, error):
    def after_step(now, outputs, optimizer):
        if now == step:
            raise error

    return after_step


def test_metrics_of_a_killed_run_are_those_of_an_uninterrupted_one(tmp_path):
    """Reported means span --log-every steps, however the run was cut."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for path in (whole, cut):
        path.mkdir()
    expected = toy_fit(toy_flags(whole, log_every=3))
    for step in (2, 6, 11):
        with pytest.raises(Killed):
            toy_fit(toy_flags(cut, log_every=3), after_step=interrupt_at(step, Killed()))
    assert difference(toy_fit(toy_flags(cut, log_every=3)), expected) == 0
    assert lines_of(cut) == lines_of(whole)


def test_a_kill_during_an_evaluation_loses_no_line(tmp_path):
    """The last evaluation comes at the last step: a run killed in it evaluates when it is continued."""

    def evaluate(params):
        return dict(held_out=float(params["weight"].sum()))

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for path in (whole, cut):
        path.mkdir()
    expected = toy_fit(toy_flags(whole, eval_every=4), evaluate)
    for _ in range(2):
        with pytest.raises(Killed):
            toy_fit(toy_flags(cut, eval_every=4), killed)
    with pytest.raises(Killed):
        toy_fit(toy_flags(cut, eval_every=12), killed)
    assert difference(toy_fit(toy_flags(cut, eval_every=4), evaluate), expected) == 0
    assert lines_of(cut)[-1] == lines_of(whole)[-1] and "held_out" in lines_of(whole)[-1]


@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_during_an_evaluation_stops_the_run(tmp_path, step):
    def evaluate(params):
        if json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(
        KeyboardInterrupt,
        match=f"tokenizer: stopped at step {min(step + 1, 12)} of 12 and saved|stopped at step {step}",
    ):
        toy_fit(toy_flags(tmp_path), evaluate)


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    def twice(step, outputs, optimizer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still running")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_flags(tmp_path), after_step=twice)


def test_the_loop_is_adamw_with_clipping_a_schedule_and_averages(tmp_path):
    """Against a loop that is written out, in float64."""
    args = toy_flags(tmp_path, steps=9, warmup=3)
    ours = toy_fit(args)
    theirs = dict(
        weight=torch.zeros(2, 3, dtype=torch.float64), bias=torch.zeros(2, dtype=torch.float64)
    )
    moments = {
        name: [torch.zeros_like(tensor), torch.zeros_like(tensor)]
        for name, tensor in theirs.items()
    }
    average = {name: tensor.clone() for name, tensor in theirs.items()}
    for step in range(1, args.steps + 1):
        x = torch.randn(4, 3, generator=train.generator_of("toy", step - 1)).double()
        error = (
            x @ theirs["weight"].T
            + theirs["bias"]
            - x @ torch.tensor([[1, 2], [0, -1], [3, 0.5]], dtype=torch.float64)
        )
        gradients = dict(weight=error.T @ x / 4, bias=error.mean(0))
        norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
        lr = 0.1 * min(1, step / 3) * 0.5 * (1 + math.cos(math.pi * (step - 1) / 9))
        line = lines_of(tmp_path)[step - 1]
        assert line["lr"] == pytest.approx(lr) and line["gradient"] == pytest.approx(
            float(norm), rel=1e-5
        )
        for name, tensor in theirs.items():
            gradient, (first, second) = gradients[name] / max(1, float(norm)), moments[name]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.05)
            tensor *= 1 - lr * (0.05 if name == "weight" else 0)
            tensor -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            average[name].lerp_(tensor, 1 - min(0.9, step / (step + 10)))
    assert difference(ours, {name: tensor.float() for name, tensor in average.items()}) < 1e-5


def test_decay_spares_what_is_no_matrix_of_weights():
    params = hmar.add_masked_branch(
        hmar.init(depth=2, width=32, classes=3, codes=32, code_dim=8, scales=SCALES), 1
    )
    tree = train.trainable(
        dict(
            tokenizer=tokenizer.init(codes=32, code_dim=8, channels=32, multipliers=(1, 1)),
            hmar=params,
        )
    )
    decays = {
        id(leaf): group["weight_decay"]
        for group in train.adamw(tree, toy_flags("")).param_groups
        for leaf in group["params"]
    }
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        name = train.path_name(path)
        spared = [
            "classes",
            "start",
            "levels",
            "positions",
            "scale",
            "bias",
            "q_bias",
            "v_bias",
            "mask_embedding",
            "codebook",
        ]
        is_norm = re.search(r"norm\w*\.weight", name) is not None
        expected = (
            0
            if is_norm
            or name.split(".")[1] in spared
            or name.split(".")[-1] in spared
            or "positions" in name
            else 0.05
        )
        if "mask_embedding" in name:
            expected = 0
        assert decays[id(leaf)] == expected, name
    assert len(decays) == len(pytree.tree_leaves(tree))


def test_every_item_comes_once_an_epoch_in_a_new_order_and_in_all_its_views():
    args, count = argparse.Namespace(seed=3, batch=4), 10
    drawn = [
        item for step in range(20) for item in train.step_items(args, step, count)
    ]  # eight epochs
    assert [draw for _, draw in drawn] == list(range(80))
    epochs = [[index for index, _ in drawn[first : first + count]] for first in range(0, 80, count)]
    assert (
        all(sorted(epoch) == list(range(count)) for epoch in epochs)
        and len({tuple(epoch) for epoch in epochs}) == 8
    )
    tokens = np.arange(2 * count).reshape(count, 2, 1)
    batches = [train.token_batch(args, step, torch.arange(count), tokens) for step in range(20)]
    assert all(torch.equal(own[:, 0] // 2, labels) for labels, own in batches)
    assert len(torch.cat([own for _, own in batches]).unique()) == 2 * count
    assert (
        len({tuple((own[:, 0] % 2).tolist()) for _, own in batches}) > 4
    )  # of 16 choices of four views
    args.seed = 4
    assert [index for index, _ in train.step_items(args, 0, count)] != epochs[0][:4]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_schedule_warms_up_and_ends_at_zero(decay):
    args = toy_flags("", steps=100, warmup=10, decay=decay)
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.01)
        and np.argmax(rates) in (9, 10)
        and all(np.diff(rates[10:]) < 0)
    )
    assert 0 < rates[-1] < 0.002 and rates[50] == pytest.approx(0.05)


# Several processes, and parts of a batch.


def start_two(commands, *flags, command="train", before=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, before=before)
    return [
        commands.start(command, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]


@pytest.mark.parametrize("stage", train.STAGES)
def test_two_processes_or_two_parts_with_half_the_batch_are_one_with_the_whole(
    base, commands, folder, tmp_path, stage
):
    """After ten steps. The rate is low and two channels share a norm, since AdamW divides by the gradient's size: where it should be 0,
    as a bias's before the norm of its one channel, it would make whole steps of rounding errors."""
    images, flags, file = (
        folder,
        [*TINY, "--steps", 10, "--lr", 1e-4, "--revive-every", 0],
        "hmar.pt",
    )
    if stage == "tokenizer":
        images, file = drawings(tmp_path / "images", 30), "tokenizer.pt"
        (images / "disc" / "broken.png").write_text("no image")
        flags += ["--size", 8, "--scales", 1, 2, 4, "--channels", 64]
    for name in ("one", "parts", "two"):
        continued(base, tmp_path / name, *train.STAGES[: train.STAGES.index(stage)])
    flags = [stage, *flags, "--data", images, "--out"]
    one, parts = (
        commands.start("train", *flags, tmp_path / "one"),
        commands.start("train", *flags, tmp_path / "parts", "--accumulate", 2),
    )
    first, second = start_two(commands, *flags, tmp_path / "two")
    for job in (one, parts, first, second):
        job.done()
    whole, norms = (
        weights(tmp_path / "one", file),
        [line["gradient"] for line in lines_of(tmp_path / "one") if "gradient" in line],
    )
    for name in ("parts", "two"):
        assert difference(weights(tmp_path / name, file), whole) < 1e-5, name
        assert [
            line["gradient"] for line in lines_of(tmp_path / name) if "gradient" in line
        ] == pytest.approx(norms, rel=1e-4), name
    assert [
        line["loss"] for line in lines_of(tmp_path / "parts") if "loss" in line
    ] == pytest.approx(
        [line["loss"] for line in lines_of(tmp_path / "one") if "loss" in line], abs=1e-5
    )
    if stage == "masked":
        before = weights(base, "hmar.pt")
        assert (
            difference(whole["trunk"], before["trunk"]) == 0
            and difference(whole["masked"], before["masked"]) > 1e-4
        )
    assert second.out == ""  # the first speaks for both
    assert (
        one.err.count("broken.png")
        == (first.err + second.err).count("broken.png")
        == (stage == "tokenizer")
    )


def test_two_processes_stop_together_and_go_on(commands, folder, tmp_path):
    """With everything switched on."""
    run = tmp_path / "run"
    flags = [
        "all",
        *TINY,
        "--data",
        folder,
        "--out",
        run,
        "--steps",
        14,
        "--gan",
        0.4,
        "--truncate",
        0.5,
        "--accumulate",
        2,
        "--save-every",
        100,
        "--codes",
        128,
    ]
    told = f"if os.environ['RANK'] == '1':\n    exec({signalled(int(signal.SIGTERM), 'tokenizer', 3)!r}, globals())"
    jobs = start_two(
        commands, *flags, before=told
    )  # the second is told, both agree at the tenth step
    assert [job.wait().status for job in jobs] == [130, 130], jobs[0].err + jobs[1].err
    assert weights(run, "tokenizer.resume.pt")["step"] == 10
    tell = (
        "fit = train.fit\n"
        "def told(*given, **options):\n"
        "    tree = fit(*given, **options)\n"
        "    print('made', train.digest(tree))\n"
        "    return tree\n"
        "train.fit = told"
    )
    jobs = [job.done() for job in start_two(commands, *flags, before=tell)]
    made, other = (
        [line for line in job.out.splitlines() if line.startswith("made")] for job in jobs
    )
    assert (
        made == other and len(set(made)) == 3
    )  # the same weights on both, replaced codes among them
    assert [line["step"] for line in lines_of(run, "tokenizer") if "loss" in line] == list(
        range(1, 15)
    )
    assert lines_of(run, "masked")[-1]["step"] == 14 and "masked" in weights(run, "hmar.pt")


GOLDEN_LOSSES = [
    3.238422,
    2.951376,
    2.522042,
    2.183599,
    1.934749,
    1.783352,
    1.688161,
    1.625839,
    1.588450,
    1.570671,
]


def test_ten_golden_losses(tmp_path):
    """Next-scale training through train.fit from weights and a batch written as formulas, so that no random stream can change them.

    Computed in float64, and in fp32 with one thread and two, torch 2.11 and 2.13, they differ by less than 1e-6; machines differ as
    little, and 1e-4 leaves room for AdamW to amplify it.
    """
    flags = dict(steps=10, lr=1e-2, eval_every=1000, stage="next-scale")
    scales = ((1, 1), (2, 2), (3, 4))
    numbers = iter(range(10**6))

    def formula(tensor):
        if tensor.ndim < 2:
            return tensor
        angle = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        return (
            0.5
            * tensor.shape[-1] ** -0.5
            * torch.sin(angle * (1 + 0.37 * next(numbers)) + angle**2 / 7)
        ).float()

    params = hmar.init(
        depth=2, width=32, heads=2, classes=3, codes=24, code_dim=4, scales=scales, gamma=0.5
    )
    params = pytree.tree_map(
        lambda tensor: tensor * 0 + 0.1 if tensor.ndim < 2 else formula(tensor), params
    )
    tokens = torch.arange(6 * 17).view(6, 17) ** 2 % 24
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    inputs = torch.sin(torch.arange(6 * 16 * 4, dtype=torch.float64) ** 1.3).view(6, 16, 4).float()
    share = hmar.scale_weights(scales, "lognormal")

    def loss(params, labels, tokens, inputs):
        value = (hmar.next_scale_losses(params, labels, tokens, inputs) * share).sum(1).mean()
        return value, dict(loss=value.detach())

    train.fit(
        toy_flags(tmp_path, **flags),
        train.trainable(params),
        loss,
        lambda start: [[(labels, tokens, inputs)]] * 10,
    )
    losses = [line["loss"] for line in lines_of(tmp_path)]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-4), losses


# The tokenizer's stage.


def test_code_usage_is_counted_as_in_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 5, (4, 12), generator=generator) * torch.randint(
        0, 2, (4, 12), generator=generator
    )
    counts[1] = 0
    counts[2] = torch.tensor([3, 1] + [0] * 10)
    for row, usage in zip(counts.tolist(), train.code_usage(counts), strict=True):
        seen = sum(row)
        entropy = -sum(n / seen * math.log(n / seen) for n in row if n)
        assert usage == dict(
            distinct=sum(n > 0 for n in row),
            perplexity=round(math.exp(entropy), 1),
            most=min(12, seen),
        )


def watched(monkeypatch, module, name, look):
    """Calls look(result, *arguments) after each call of a function."""
    function = getattr(module, name)

    @functools.wraps(function)
    def call(*arguments, **options):
        result = function(*arguments, **options)
        look(result, *arguments, **options)
        return result

    monkeypatch.setattr(module, name, call)


def run_main(*flags):
    assert train.main([*TINY, *(str(flag) for flag in flags)]) == 0


def test_usage_in_the_metrics_is_that_of_the_window(monkeypatch, folder, tmp_path):
    windows, passes = [], []
    watched(
        monkeypatch, train.tokenizer, "training_pass", lambda result, *_: passes.append(result[3])
    )
    run_main("tokenizer", "--data", folder, "--out", tmp_path, "--steps", 10, "--log-every", 3)
    for line in lines_of(tmp_path, "tokenizer"):
        if "usage" in line:
            windows.append(line["step"])
            taken = [
                torch.cat(
                    [
                        tokens[k].flatten()
                        for tokens in passes[max(1, line["step"] - 3) : line["step"]]
                    ]
                )
                for k in range(4)
            ]
            counts = torch.stack([torch.bincount(tokens, minlength=32) for tokens in taken])
            assert line["usage"] == train.code_usage(counts) and line["codes_used"] == len(
                torch.cat(taken).unique()
            )
    assert windows == [3, 6, 9] and passes[0] == []  # the first step quantises nothing


def test_usage_is_counted_on_across_a_kill(monkeypatch, folder, tmp_path):
    flags = [
        "tokenizer",
        "--data",
        folder,
        "--steps",
        12,
        "--log-every",
        4,
        "--save-every",
        3,
        "--out",
    ]
    run_main(*flags, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Metrics, "write", killed)  # at step 4, after the checkpoint of step 3
        run_main(*flags, tmp_path / "cut")
    run_main(*flags, tmp_path / "cut")
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole") and len(
        lines_of(tmp_path / "cut")[0]["usage"]
    ) == len(SCALES)


def test_dead_codes_alone_are_replaced_and_their_moments_forgotten(monkeypatch, folder, tmp_path):
    optimizers, revived, checked = [], [], []
    watched(monkeypatch, train, "adamw", lambda optimizer, *_: optimizers.append(optimizer))
    watched(
        monkeypatch,
        train.tokenizer,
        "revive_codes",
        lambda result, codebook, *rest: revived.append((*result, codebook.clone(), *rest)),
    )

    def look(rate, step, args):  # after the step, when its metrics are written
        if len(revived) > len(checked):
            checked.append(step + 1)
            new, dead, codebook, counts, residuals, _ = revived[-1]
            parameter = next(
                leaf
                for group in optimizers[0].param_groups
                for leaf in group["params"]
                if leaf.shape == (128, 8)
            )
            assert (
                torch.equal(parameter, new)
                and torch.equal(dead, counts == 0)
                and 0 < dead.sum() < 128
            )
            assert (
                torch.equal(new[~dead], codebook[~dead])
                and not (new[dead] == codebook[dead]).all(1).any()
            )
            vectors = torch.cat([residual.flatten(0, 1) for residual in residuals])
            assert all((vectors == row).all(1).any() for row in new[dead])
            for moment in ("exp_avg", "exp_avg_sq"):
                rows = optimizers[0].state[parameter][moment].abs().sum(1)
                assert (rows[dead] == 0).all() and (rows[~dead] > 0).all()

    watched(monkeypatch, train, "learning_rate", look)
    run_main(
        "tokenizer",
        "--data",
        folder,
        "--out",
        tmp_path,
        "--steps",
        12,
        "--batch",
        2,
        "--revive-every",
        3,
        "--codes",
        128,
    )
    assert checked == [3, 6, 9]  # not at step 12, after 80 % of the run
    counts = [int(arguments[3].sum()) for arguments in revived]
    assert counts == [
        2 * 85 * n for n in (2, 3, 3)
    ]  # choices since the last time; the first step quantises nothing


def test_unit_codes_have_length_one(folder, tmp_path):
    run_main(
        "tokenizer",
        "--data",
        folder,
        "--out",
        tmp_path,
        "--steps",
        12,
        "--unit-codes",
        "--revive-every",
        3,
    )
    trained = weights(tmp_path, "tokenizer.resume.pt")["state"]
    codebook = next(tensor for tensor in trained if tensor.shape == (32, 8))
    assert torch.allclose(codebook.norm(dim=1), torch.ones(32), atol=1e-6)
    assert torch.allclose(
        weights(tmp_path, "tokenizer.pt")["codebook"].norm(dim=1), torch.ones(32), atol=1e-6
    )


def quantisation_error(params, features):
    *_, (_, _, f_hat) = tokenizer.quantise(params["codebook"], params["phi"], features, SCALES)
    return float((features - f_hat).square().mean())


def test_a_codebook_made_of_data_quantises_better_than_a_random_one(folder):
    params = tokenizer.init(
        codes=32, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, attention=False
    )
    features = tokenizer.features(
        params, train.whole(train.Images(range(40), 16), 40, argparse.Namespace(device="cpu"))
    ).detach()
    made = tokenizer.data_codebook(params, features, SCALES, train.generator_of("a"))
    assert made.shape == (32, 8) and torch.equal(
        made, tokenizer.data_codebook(params, features, SCALES, train.generator_of("a"))
    )
    matched = (
        features.std() * params["codebook"]
    )  # random codes of the features' size, a fairer rival than the initial ones
    error, rival = (
        quantisation_error(params | dict(codebook=codebook), features)
        for codebook in (made, matched)
    )
    first = tokenizer.data_codebook(
        params, features, SCALES, train.generator_of("a"), rounds=0
    )  # k-means, not begun
    assert error < quantisation_error(params | dict(codebook=first), features)
    assert error < 0.95 * rival and error < 0.2 * quantisation_error(params, features)


def test_truncation_decodes_from_the_coarse_scales(monkeypatch, folder, tmp_path):
    params = tokenizer.init(
        codes=32, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, attention=False
    )
    images = train.whole(train.Images(range(4), 16), 4, argparse.Namespace(device="cpu"))
    features = tokenizer.features(params, images)
    pyramid = [
        f_hat
        for _, _, f_hat in tokenizer.quantise(params["codebook"], params["phi"], features, SCALES)
    ]
    for stop in (1, 3, None):
        made, loss, residuals, tokens = tokenizer.training_pass(
            params, images, SCALES, beta=0.3, stop=stop
        )
        distances = [F.mse_loss(f_hat, features).item() for f_hat in pyramid[:stop]]
        assert loss.item() == pytest.approx(1.3 * np.mean(distances), rel=1e-5)
        expected = tokenizer.decode_features(params, pyramid[(stop or 4) - 1])
        assert torch.allclose(made.clamp(-1, 1), expected, atol=1e-5) and len(residuals) == len(
            tokens
        ) == (stop or 4)
    stops = []
    watched(
        monkeypatch,
        train.tokenizer,
        "training_pass",
        lambda result, *arguments: stops.append(arguments[-1]),
    )
    run_main(
        "tokenizer",
        "--data",
        folder,
        "--out",
        tmp_path / "a",
        "--steps",
        24,
        "--truncate",
        0.5,
        "--batch",
        2,
    )
    assert set(stops) == {None, 1, 2, 3, 4} and 4 <= stops.count(None) <= 20
    stops.clear()
    run_main("tokenizer", "--data", folder, "--out", tmp_path / "b", "--steps", 2, "--batch", 2)
    assert stops == [None, None]


def test_the_adversarial_loss_is_balanced_by_gradient_norms():
    params = tokenizer.init(
        codes=32, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, attention=False
    )
    layers = train.trainable(tokenizer.init_discriminator(channels=8))
    images = train.whole(train.Images(range(4), 16), 4, argparse.Namespace(device="cpu"))
    last = params["decoder"]["conv_out"]["weight"].requires_grad_()
    made, *_ = tokenizer.training_pass(params, images, SCALES)
    reconstruction = F.mse_loss(made, images)
    fooled, critic = train.adversarial_losses(
        layers, images, made, reconstruction, last, torch.rand(4, 4)
    )
    ours, theirs = (
        torch.autograd.grad(value, last, retain_graph=True)[0].norm()
        for value in (reconstruction, fooled)
    )
    assert float(theirs) == pytest.approx(float(ours), rel=1e-3)  # the divisor has 1e-6 added
    assert (
        torch.autograd.grad(
            fooled, pytree.tree_leaves(layers), retain_graph=True, allow_unused=True
        )
        == (None,) * 8
    )
    gradients = torch.autograd.grad(
        critic, [layer["weight"] for layer in layers], retain_graph=True
    )
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert torch.autograd.grad(critic, last, allow_unused=True) == (None,)
    assert critic.item() == pytest.approx(2, abs=0.5)  # hinge of a critic that says about 0 of both


def test_the_adversarial_loss_starts_after_a_fifth_of_the_steps(folder, tmp_path):
    flags = ["tokenizer", "--data", folder, "--steps", 15, "--out"]
    run_main(*flags, tmp_path / "without")
    run_main(*flags, tmp_path / "with", "--gan", 0.4)
    without, with_it = (
        [line for line in lines_of(tmp_path / name) if "loss" in line]
        for name in ("without", "with")
    )
    assert [line["step"] for line in with_it if "critic" in line] == list(
        range(5, 16)
    )  # step 4 is at a fifth, with weight 0
    assert [a["loss"] == b["loss"] for a, b in zip(without, with_it)] == [True] * 5 + [False] * 10
    assert (
        all(math.isfinite(line["loss"] + line["critic"]) for line in with_it[4:])
        and with_it[-1]["loss"] < with_it[0]["loss"]
    )
    assert (
        difference(weights(tmp_path / "with", "tokenizer.pt")["codebook"], torch.zeros(32, 8)) > 0
    )  # a tokenizer, no critic, is saved
    assert set(weights(tmp_path / "with", "tokenizer.pt")) == set(
        weights(tmp_path / "without", "tokenizer.pt")
    )


# The token cache.

TOKENIZER = tokenizer.init(
    codes=32,
    code_dim=8,
    channels=32,
    multipliers=(1, 1),
    residual_blocks=1,
    attention=False,
    seed=7,
)


def cache(out, data, items, name="train", params=TOKENIZER, **changes):
    os.makedirs(out, exist_ok=True)
    flags = (
        dict(
            out=str(out),
            data=data,
            scales=((1, 1), (2, 2), (4, 4)),
            size=8,
            flip=True,
            views=0,
            seed=0,
            workers=0,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        | changes
    )
    return train.token_cache(
        name, train.Images(items, 8, flags["flip"]), params, argparse.Namespace(**flags)
    )


def encoded(images):
    return tokenizer.encode(
        TOKENIZER, train.to_unit(torch.stack(images), "cpu"), ((1, 1), (2, 2), (4, 4))
    )


def test_views_are_the_centre_crop_and_its_mirror_or_random_crops(folder, tmp_path):
    items = train.list_images(folder)[0][:9]
    images = train.Images(items, 8)
    centre = [images[index, None][0] for index in range(9)]
    expected = [encoded(centre), encoded([image.flip(-1) for image in centre])]
    tokens = torch.from_numpy(np.array(cache(tmp_path / "a", str(folder), items)))
    assert tokens.dtype == torch.int32 and torch.equal(tokens.long(), torch.stack(expected, 1))
    assert torch.equal(
        torch.from_numpy(np.array(cache(tmp_path / "b", str(folder), items, flip=False))).long(),
        expected[0][:, None],
    )
    assert cache(tmp_path / "c", None, range(9)).shape == (9, 1, 21)  # drawings have one view
    same = [items[0]] * 8
    tokens = np.array(cache(tmp_path / "d", str(folder), same, views=3))
    assert tokens.shape == (8, 3, 21)
    crops = train.Images(same, 8)
    for view in range(3):
        assert len(np.unique(tokens[:, view], axis=0)) > 1  # a crop of its own for each image
    several = {
        tuple(row)
        for row in encoded(
            [crops[0, (seed, view)][0] for seed in range(30) for view in range(3)]
        ).tolist()
    }
    assert len(several) > 3 and len({tuple(row) for row in tokens.reshape(-1, 21).tolist()}) > 3
    assert np.array_equal(tokens, cache(tmp_path / "e", str(folder), same, views=3))


def counted(monkeypatch, stop_after=math.inf):
    """Counts the images that are encoded; the run ends where more than stop_after batches would be."""
    seen, encode = [], tokenizer.encode

    def call(params, images, scales):
        if len(seen) >= stop_after:
            raise Killed
        seen.append(len(images))
        return encode(params, images, scales)

    monkeypatch.setattr(train.tokenizer, "encode", call)
    return seen


def test_an_interrupted_cache_is_continued(monkeypatch, tmp_path):
    expected = np.array(cache(tmp_path / "whole", None, range(150)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted(patch, stop_after=2)
        cache(tmp_path / "cut", None, range(150))
    seen = counted(monkeypatch)
    assert np.array_equal(cache(tmp_path / "cut", None, range(150)), expected) and seen == [22]
    assert np.array_equal(cache(tmp_path / "cut", None, range(150)), expected) and seen == [22]


def test_a_cache_is_made_anew_and_says_so_when_what_it_depends_on_changes(
    monkeypatch, folder, tmp_path, capsys
):
    items, seen = train.list_images(folder)[0][:6], counted(monkeypatch)

    def made(anew, *arguments, **changes):
        seen.clear()
        capsys.readouterr()
        tokens = cache(tmp_path, str(folder), *arguments, **changes)
        assert bool(seen) == anew and ("made anew" in capsys.readouterr().out) == anew
        return np.array(tokens)

    cache(tmp_path, str(folder), items)
    first = made(False, items)
    other = copy.deepcopy(TOKENIZER)
    other["decoder"]["conv_out"]["bias"][0] += 1e-3
    assert np.array_equal(made(True, items, params=other), first)
    other["codebook"] += 1
    assert not np.array_equal(made(True, items, params=other), first)
    made(True, items)
    made(True, items[::-1])
    made(True, items[:-1])
    made(False, items[:-1])
    os.utime(items[2][0], (0, 0))  # another picture under the same name
    made(True, items[:-1])
    made(True, items[:-1], flip=False)
    made(True, items[:-1], views=2)
    made(True, items[:-1], views=2, seed=1)
    made(True, items[:-1], views=2, seed=1, scales=((1, 1), (4, 4)))
    assert np.array_equal(made(True, items), first)


@pytest.mark.parametrize("place", ["between the arrays", "before the settings"])
def test_a_cache_killed_while_it_was_made_anew_is_not_taken_for_whole(monkeypatch, tmp_path, place):
    expected, calls, made = (
        np.array(cache(tmp_path, None, range(20))),
        [],
        np.lib.format.open_memmap,
    )

    def memmap(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return made(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if place == "between the arrays":
            patch.setattr(np.lib.format, "open_memmap", memmap)
        else:
            patch.setattr(sample, "write_json", killed)
        cache(tmp_path, None, range(30))
    assert np.array_equal(cache(tmp_path, None, range(20)), expected)


def test_the_room_for_a_cache_is_taken_when_it_is_made(monkeypatch, tmp_path):
    """A sparse file would end the process with SIGBUS, without a word, where the disk is full later."""
    counted(monkeypatch, stop_after=0)
    with pytest.raises(Killed):
        cache(tmp_path, None, range(2000))
    state = (tmp_path / "tokens-train.npy").stat()
    assert state.st_size > 2000 * 21 * 4 and state.st_blocks * 512 >= state.st_size


# Starting from given weights.


def refusal(capsys, *flags, command=train):
    """The one line that a command says on stderr when it ends with status 2."""
    capsys.readouterr()
    try:
        status = command.main([str(flag) for flag in flags])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2 and said.endswith("\n") and said.count("\n") == 1, said
    return said[:-1]


def flags_of(*flags, classes=("a", "b", "c")):
    args = train.resolved(train.parser().parse_args([*TINY, *(str(flag) for flag in flags)]))
    args.device, args.dtype, args.class_names = torch.device("cpu"), torch.float32, classes
    return args


def published(params, patterns, more=()):
    """The state dict, in the published layout, of one of our trees."""
    state = {}
    for path, tensor in pytree.tree_flatten_with_path(params)[0]:
        name = train.path_name(path)
        for pattern, replacement in (*patterns, *more):
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state


def published_tokenizer(params):
    turned = params | dict(decoder=params["decoder"] | dict(up=params["decoder"]["up"][::-1]))
    return published(turned, tokenizer.PUBLISHED_NAMES)


def test_a_tokenizer_starts_from_weights_of_ours_or_published_ones(tmp_path):
    torch.save(TOKENIZER, tmp_path / "ours.pt")
    state = published_tokenizer(TOKENIZER)
    assert {
        "quantize.embedding.weight",
        "encoder.mid.block_1.conv1.weight",
        "decoder.up.1.upsample.conv.weight",
    } <= set(state)
    torch.save(state, tmp_path / "published.pt")
    for name in ("ours.pt", "published.pt"):
        started = train.initial_tokenizer(
            flags_of("tokenizer", "--init", tmp_path / name, "--codes", 99)
        )
        assert difference(started, TOKENIZER) == 0
    assert len(train.initial_tokenizer(flags_of("tokenizer", "--codes", 99))["codebook"]) == 99


def test_a_tokenizer_trained_on_keeps_its_codebook_at_first(folder, tmp_path):
    torch.save(TOKENIZER, tmp_path / "given.pt")
    run_main(
        "tokenizer",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--steps",
        12,
        "--lr",
        1e-6,
        "--init",
        tmp_path / "given.pt",
        "--revive-every",
        0,
    )
    assert 0 < difference(weights(tmp_path / "run", "tokenizer.pt"), TOKENIZER) < 1e-4


def test_a_tokenizer_of_another_downsampling_is_trained_at_its_own(folder, tmp_path, capsys):
    given, out = tmp_path / "given.pt", tmp_path / "run"
    torch.save(
        tokenizer.init(
            codes=32,
            code_dim=8,
            channels=32,
            multipliers=(1, 1, 1),
            residual_blocks=1,
            attention=False,
        ),
        given,
    )
    flags = [*TINY, "tokenizer", "--data", folder, "--out", out, "--steps", 2, "--init", given]
    assert (
        refusal(capsys, *flags)
        == "train.py: --scales: end at 8, expected the latent's side, 16 / 4"
    )
    run_main(*flags[len(TINY) :], "--scales", 1, 2, 4)


def test_a_transformer_starts_from_other_classes_scales_and_branches(tmp_path, capsys):
    params = hmar.add_masked_branch(
        hmar.init(depth=3, width=32, classes=5, codes=32, code_dim=8, scales=SCALES, seed=5), 2
    )

    def started(*flags, classes=tuple("abcde"), params=params):
        torch.save(params, tmp_path / "init.pt")
        made = train.initial_transformer(
            flags_of("next-scale", "--init", tmp_path / "init.pt", *flags, classes=classes),
            TOKENIZER,
        )
        return made, capsys.readouterr().out

    same, said = started()
    assert said == "" and "masked" not in same and same["next_scale"]["blocks"] == []
    assert difference(same["trunk"], params["trunk"] + params["next_scale"]["blocks"]) == 0
    assert difference(same["next_scale"]["head"], params["next_scale"]["head"]) == 0
    assert (
        difference(
            [same[name] for name in ("classes", "input", "start")],
            [params[name] for name in ("classes", "input", "start")],
        )
        == 0
    )
    fewer, said = started(classes=("x", "y"))
    assert said == "--init: a new class embedding for 2 classes in place of 5\n" and fewer[
        "classes"
    ].shape == (3, 32)
    assert (
        0 < float(fewer["classes"].std()) < 0.3
        and difference(fewer | dict(classes=0), same | dict(classes=0)) == 0
    )
    other, said = started("--size", 8, "--scales", 1, 2, 3, 4)
    assert said == "--init: positions resampled from 1 2 4 8 to 1 2 3 4\n"
    assert (
        hmar.scales(other) == ((1, 1), (2, 2), (3, 3), (4, 4))
        and difference(other["trunk"], same["trunk"]) == 0
    )
    with pytest.raises(ValueError, match="does not fit tokenizer.pt's 32 codes of 8 dimensions"):
        started(params=hmar.init(depth=1, width=32, classes=5, codes=16, code_dim=8, scales=SCALES))
    official = hmar.init(
        depth=2, width=32, classes=5, codes=32, code_dim=8, scales=hmar.SCALES[256], seed=6
    )
    rows = official | dict(
        positions=torch.cat([position.flatten(0, 1) for position in official["positions"]])[None],
        start=official["start"][None],
    )
    state = published(rows, hmar.PUBLISHED_NAMES, hmar.ONE_BRANCH_NAMES)
    assert {
        "pos_1LC",
        "blocks.0.attn.mat_qkv.weight",
        "head_nm.ada_lin.1.weight",
        "class_emb.weight",
    } <= set(state)
    same, said = started("--size", 32, "--scales", *(h for h, _ in hmar.SCALES[256]), params=state)
    assert said == "" and difference(same, official) == 0


def test_a_frozen_trunk_stays_bit_for_bit(base, folder, tmp_path):
    continued(base, tmp_path / "run", "tokenizer")
    run_main(
        "next-scale",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--steps",
        4,
        "--init",
        base / "hmar.pt",
        "--freeze-trunk",
    )
    before, after = weights(base, "hmar.pt"), weights(tmp_path / "run", "hmar.pt")
    assert difference(after["trunk"], before["trunk"] + before["next_scale"]["blocks"]) == 0
    for name in ("classes", "start", "levels", "positions", "input"):
        assert difference(after[name], before[name]) > 0, name
    assert difference(after["next_scale"]["head"], before["next_scale"]["head"]) > 0


@pytest.mark.parametrize("layout", ["ours", "published"])
def test_a_finished_tokenizer_is_taken_as_it_is(folder, tmp_path, capsys, layout):
    torch.save(
        TOKENIZER if layout == "ours" else published_tokenizer(TOKENIZER), tmp_path / "given.pt"
    )
    run_main(
        "all",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--tokenizer",
        tmp_path / "given.pt",
        "--codes",
        99,
    )
    assert difference(weights(tmp_path / "run", "tokenizer.pt"), TOKENIZER) == 0
    assert {line["stage"] for line in lines_of(tmp_path / "run")} == {"next-scale", "masked"}
    assert (
        sample.main([str(tmp_path / "run"), "--count", "1", "--out", str(tmp_path / "a.png")]) == 0
    )
    run_main(
        "tokenizer",
        "--data",
        folder,
        "--out",
        tmp_path / "alone",
        "--tokenizer",
        tmp_path / "given.pt",
    )
    assert difference(weights(tmp_path / "alone", "tokenizer.pt"), TOKENIZER) == 0


# Folders of images, bad input, full disks.


def test_a_mixed_folder_trains_and_names_its_three_broken_files_once(tmp_path):
    """The whole command, started as anybody would, on one class of images of every kind."""
    images = tmp_path / "mine"
    images.mkdir()
    picture = train.draw_shape(3, 40)[0]
    grey = np.asarray(picture.convert("L"))
    picture.convert("L").save(images / "grey.png")
    picture.convert("RGBA").save(images / "alpha.png")
    picture.quantize(8).save(images / "palette.png")
    picture.convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(images / "sixteen.png")
    picture.save(images / "rgb.webp")
    whole = (images / "alpha.png").read_bytes()
    (images / "half.png").write_bytes(whole[: len(whole) // 2])
    (images / "broken.jpg").write_text("text")
    (images / "empty.png").touch()
    (images / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (images / "notes.txt").write_text("notes")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        "--data",
        "mine",
        "--steps",
        "2",
        "--workers",
        "1",
    ]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and [line.split(": ")[:2] for line in lines] == [
        ["skipped", f"mine/{name}"] for name in ("broken.jpg", "empty.png", "half.png")
    ]
    assert done.stdout.startswith("runs/mine: ") and " 1 classes" in done.stdout
    assert json.loads((tmp_path / "runs/mine/args.json").read_text())["masked"]["class_names"] == [
        "mine"
    ]
    assert (
        len(np.load(tmp_path / "runs/mine/tokens-train.npy"))
        + len(np.load(tmp_path / "runs/mine/tokens-held-out.npy"))
        == 6
    )


def test_workers_change_nothing(folder, tmp_path):
    for workers in (0, 2):
        run_main(
            "tokenizer",
            "--data",
            folder,
            "--out",
            tmp_path / str(workers),
            "--steps",
            3,
            "--workers",
            workers,
        )
    assert (
        difference(weights(tmp_path / "0", "tokenizer.pt"), weights(tmp_path / "2", "tokenizer.pt"))
        == 0
    )


BAD = {  # what is wrong: (flags, what the line says)
    "unknown stage": (["tokeniser"], "invalid choice: 'tokeniser'"),
    "mistyped flag": (["--step-s", 3], "no flag --step-s; did you mean --steps?"),
    "unknown flag": (["--qqq=3"], "no flag --qqq; --help lists them"),
    "no number": (["--batch", "many"], "--batch: invalid int value: 'many'"),
    "no scale": (["--scales", 1, "2y2"], "--scales: invalid"),
    "missing data": (
        ["--data", "{here}/nowhere"],
        "data: expected a folder of images, got '{here}/nowhere', which is missing",
    ),
    "data is a file": (["--data", "{here}/file.txt"], "which is no folder"),
    "empty data": (["--data", "{here}/empty"], "'{here}/empty', which holds none"),
    "one image": (["--data", "{here}/one"], "expected at least two images"),
    "all broken": (
        ["--data", "{here}/broken"],
        "2 of 2 images cannot be read: {here}/broken/a.png",
    ),
    "size does not divide": (
        ["--size", 15],
        "--size: got 15, expected a multiple of the downsampling, 2",
    ),
    "negative size": (["--size", -4], "--size: got -4"),
    "drawings too small": (["--size", 4, "--scales", 1, 2], "size"),
    "scales finer than the latent": (
        ["--scales", 1, 2, 16],
        "--scales: end at 16, expected the latent's side, 16 / 2",
    ),
    "scales that end early": (
        ["--scales", 1, 2, 4],
        "--scales: end at 4, expected the latent's side, 16 / 2",
    ),
    "scales out of order": (["--scales", 1, 4, 2, 8], "coarse to fine"),
    "no side": (["--scales", 0, 8], "positive"),
    "channels": (["--channels", 48], "multiples of 32"),
    "no steps": (["--steps", 0], "--steps: got 0"),
    "negative steps": (["--steps", -3], "--steps: got -3, expected more than 0"),
    "no batch": (["--batch", 0], "--batch: got 0, expected at least 1"),
    "batch does not divide": (
        ["--batch", 4, "--accumulate", 3],
        "--batch: 4 does not divide into 3 parts on 1 process",
    ),
    "negative rate": (["--lr", -1], "--lr: got -1.0"),
    "negative views": (["--views", -1], "--views: got -1"),
    "held-out share": (["--val", 1.5], "got 1.5"),
    "unknown device": (["--device", "gpu"], "device: got 'gpu'"),
    "init without a stage": (
        ["--init", "{here}/file.txt"],
        "--init: needs the stage that it starts",
    ),
    "init is missing": (["tokenizer", "--init", "{here}/none.pt"], "none.pt"),
    "init is no file of weights": (
        ["tokenizer", "--init", "{here}/file.txt"],
        "{here}/file.txt: not a file of weights",
    ),
    "init holds code": (
        ["tokenizer", "--init", "{here}/code.pt"],
        "{here}/code.pt: not a file of weights that can be read safely",
    ),
    "init is a tensor": (["tokenizer", "--init", "{here}/tensor.pt"], "expected"),
    "init is a tree of other things": (["tokenizer", "--init", "{here}/dict.pt"], "expected"),
    "init is half a tree": (["tokenizer", "--init", "{here}/half.pt"], "expected"),
    "tokenizer is a tensor": (["--tokenizer", "{here}/tensor.pt"], "expected"),
    "no predecessor": (
        ["next-scale"],
        "{here}/run/tokenizer.pt is missing; the tokenizer stage makes it: python train.py tokenizer",
    ),
    "no tokenizer": (["masked"], "{here}/run/tokenizer.pt is missing"),
    "causal has no masked stage": (["masked", "--causal"], "--causal: VAR has no masked stage"),
    "out is a file": (["--out", "{here}/file.txt"], "file.txt"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad")
    for name in ("empty", "one", "broken"):
        (here / name).mkdir()
    Image.new("RGB", (20, 20)).save(here / "one" / "a.png")
    for name in ("a.png", "b.png"):
        (here / "broken" / name).write_text("text")
    (here / "file.txt").write_text("file")
    torch.save(torch.zeros(3), here / "tensor.pt")
    torch.save(dict(a=1), here / "dict.pt")
    torch.save(dict(codebook=torch.zeros(4, 2)), here / "half.pt")
    torch.save(dict(codebook=os.system), here / "code.pt")
    return here


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_status_2(folder, bad, capsys, name):
    flags, said = BAD[name]
    data = [] if name.startswith("drawings") else ["--data", folder]
    flags = [str(flag).replace("{here}", str(bad)) for flag in flags]
    line = refusal(capsys, *TINY, *data, "--out", bad / "run", "--steps", 1, *flags)
    assert (
        line.startswith("train.py: ")
        or ": error: " in line
        or re.match(r"\S+: (no flag|argument) ", line)
    )
    assert said.replace("{here}", str(bad)) in line and "Traceback" not in line
    shutil.rmtree(bad / "run", ignore_errors=True)


def test_a_file_that_vanishes_in_a_run_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    drawings(tmp_path / "images", 12)
    watched(
        monkeypatch,
        train,
        "check_images",
        lambda files, _: [os.remove(path) for path, _ in files if "disc" in path],
    )
    line = refusal(
        capsys,
        "tokenizer",
        *TINY,
        "--data",
        tmp_path / "images",
        "--out",
        tmp_path / "run",
        "--steps",
        9,
        "--workers",
        1,
        "--val",
        0,
    )
    assert line.startswith("train.py: ") and re.search(r"disc/\d+.png: missing$", line)


def test_other_settings_in_a_run_folder_are_refused_unless_restarted(
    base, folder, tmp_path, capsys
):
    shutil.copytree(base, tmp_path / "run")
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--steps", STEPS]
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    line = refusal(capsys, "next-scale", *flags, "--lr", 9, "--seed", 3, "--depth", 2)
    assert line == (
        f"train.py: {tmp_path / 'run'}: the next-scale stage was started with other settings (seed 0 -> 3, lr 0.003 -> 9.0); "
        "--out NAME begins another run, with --init FILE from its weights, --restart this one anew"
    )
    line = refusal(capsys, "next-scale", *flags, "--size", 8, "--scales", 1, 2, 4)
    assert (
        "size 16 -> 8" in line
        or "tokenizer.pt was made for --size 16 --scales 1 2 4 8, not for 8 and 1 2 4" in line
    )
    assert "tokenizer.pt was made for" in refusal(
        capsys, "next-scale", *flags, "--size", 8, "--scales", 1, 2, 4, "--restart"
    )
    assert before == {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    assert train.main([str(flag) for flag in flags]) == 0  # nothing to do
    assert [line[: line.index(",")] for line in capsys.readouterr().out.splitlines()[2:5]] == [
        f"{stage}: finished before" for stage in train.STAGES
    ]
    assert before == {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    run_main("tokenizer", *flags[len(TINY) : -1], 3, "--restart")
    assert max(line["step"] for line in lines_of(tmp_path / "run", "tokenizer")) == 3
    assert lines_of(tmp_path / "run", "masked") == lines_of(base, "masked")


def test_a_stage_whose_predecessor_was_trained_anew_is_not_finished(base, folder, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "run")
    flags = ["--data", folder, "--out", tmp_path / "run", "--steps", 2, "--seed", 1]
    run_main("next-scale", *flags, "--restart")
    with contextlib.suppress(AssertionError):  # it may ask for --restart
        run_main("masked", *flags[:-3], STEPS)
    said = capsys.readouterr()
    assert "masked" in weights(tmp_path / "run", "hmar.pt") or "--restart" in said.err, said.out


@pytest.mark.parametrize("stage", ["next-scale", "masked"])
def test_weights_made_for_another_tokenizer_are_not_continued(
    base, folder, tmp_path, capsys, stage
):
    """In the run folder there is by now another tokenizer, of more codes."""
    continued(base, tmp_path / "run", *train.STAGES[: train.STAGES.index(stage)])
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--codes", 64]
    interrupted = [stage, *flags, "--steps", 4, "--save-every", 1]
    if stage == "next-scale":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, "judge_transformer", killed)
            train.main([str(flag) for flag in [*interrupted, "--eval-every", 2]])
    assert train.main([str(flag) for flag in ["tokenizer", *flags, "--steps", 2, "--restart"]]) == 0
    line = refusal(capsys, *interrupted)
    assert "tokenizer" in line


def test_a_trained_tokenizer_is_not_replaced_by_another(base, folder, tmp_path, capsys):
    flags = [
        *TINY,
        "--data",
        folder,
        "--steps",
        STEPS,
        "--out",
        shutil.copytree(base, tmp_path / "run"),
    ]
    torch.save(TOKENIZER, tmp_path / "other.pt")
    assert "--restart replaces it" in refusal(capsys, *flags, "--tokenizer", tmp_path / "other.pt")
    assert_same_run(tmp_path / "run", base)
    assert (
        train.main([str(flag) for flag in flags]) == 0
        and capsys.readouterr().out.count("finished before") == 3
    )


def test_finished_weights_without_what_resuming_needs_are_not_trained_over(
    base, folder, tmp_path, capsys
):
    run = shutil.copytree(base, tmp_path / "run")
    for path in run.glob("*.resume.pt"):
        path.unlink()
    flags = [*TINY, "--data", folder, "--out", run, "--steps"]
    for stage in train.STAGES:
        assert "lr" in refusal(capsys, stage, *flags, STEPS, "--lr", 1)
    assert (
        train.main([str(flag) for flag in (*flags, STEPS)]) == 0
        and capsys.readouterr().out.count("finished before") == 3
    )
    assert difference(weights(run, "hmar.pt"), weights(base, "hmar.pt")) == 0


def test_a_next_scale_stage_trained_again_is_given_its_masked_branch_back(base, folder, tmp_path):
    run = shutil.copytree(base, tmp_path / "run")
    run_main("next-scale", "--data", folder, "--out", run, "--steps", STEPS, "--restart")
    assert "masked" not in weights(run, "hmar.pt")
    run_main("--data", folder, "--out", run, "--steps", STEPS)
    assert difference(weights(run, "hmar.pt"), weights(base, "hmar.pt")) == 0


def full_disk(monkeypatch, after):
    """os.fsync fails from its call number `after` on."""
    calls, fsync = [], os.fsync

    def call(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", call)


def test_a_full_disk_leaves_the_last_checkpoint_whole(base, folder, tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--steps", STEPS, "tokenizer"]
    with monkeypatch.context() as patch:
        full_disk(patch, 4)  # after args.json, two checkpoints and a sheet
        line = refusal(capsys, *flags)
    assert (
        line
        == f"train.py: {tmp_path}/run/tokenizer.resume.pt: cannot be written: No space left on device"
    )
    assert weights(tmp_path / "run", "tokenizer.resume.pt")["step"] == 8 and not list(
        (tmp_path / "run").glob("*.tmp")
    )
    run_main(*flags[len(TINY) :])
    assert difference(weights(tmp_path / "run", "tokenizer.pt"), weights(base, "tokenizer.pt")) == 0
    assert lines_of(tmp_path / "run") == lines_of(base, "tokenizer")


def test_a_file_is_replaced_whole(tmp_path):
    """Whoever has the old file open goes on reading it, since the new one is another file."""
    path = tmp_path / "a.json"
    sample.write_json(path, dict(a=1))
    with open(path) as old:
        sample.write_json(path, dict(b=2))
        assert json.load(old) == dict(a=1) and sample.read_json(path) == dict(b=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("limit", [1_000, 100_000, 3_000_000])
def test_a_file_that_cannot_grow_is_told_in_one_line(base, commands, folder, tmp_path, limit):
    """A write that fails in the middle of a file: here by a limit of the size of files, of which Linux lets processes be told."""
    continued(base, tmp_path / "run", "tokenizer")
    before = (tmp_path / "run" / "tokenizer.pt").read_bytes()
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--steps", 2]
    job = commands.run(
        "train",
        *flags,
        "--restart",
        before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)",
    )
    assert job.status == 2 and job.err.count("\n") == 1 and "cannot be written" in job.err, job.err
    assert (tmp_path / "run" / "tokenizer.pt").read_bytes() == before and not list(
        (tmp_path / "run").glob("*.tmp")
    )


def test_what_a_kill_left_half_written_is_cleared_away(base, commands, folder, tmp_path):
    flags = [
        *TINY,
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--steps",
        3,
        "--save-every",
        1,
        "tokenizer",
    ]
    die = (
        "fsync, calls = os.fsync, []\ndef dying(descriptor):\n    calls.append(descriptor)\n"
        "    os.kill(os.getpid(), 9) if len(calls) == 3 else fsync(descriptor)\nos.fsync = dying"
    )
    assert commands.run("train", *flags, before=die).status == -signal.SIGKILL
    assert weights(tmp_path / "run", "tokenizer.resume.pt")["step"] == 1
    others = [tmp_path / "run" / name for name in ("draft.tmp", "notes/tokenizer.pt.7.tmp")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("somebody's own")
    commands.run("train", *flags).done()
    assert sorted((tmp_path / "run").rglob("*.tmp")) == others


# python sample.py on a run folder.


def drawn(*flags):
    assert sample.main(["--device", "cpu", "--dtype", "fp32", *(str(flag) for flag in flags)]) == 0


def test_labels_are_names_or_numbers_and_the_sheet_has_a_row_for_each(base, tmp_path, capsys):
    names = sorted(train.SHAPES[:3])
    drawn(base, "--labels", names[2], 0, "--count", 3, "--out", tmp_path / "a.png", "--seed", 5)
    assert "seed 5" in capsys.readouterr().out
    drawn(
        base,
        "--labels",
        2,
        names[0],
        "--count",
        3,
        "--out",
        tmp_path / "b.png",
        "--seed",
        5,
        "--batch",
        2,
    )
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert (
            a.format == "PNG"
            and a.height == 2 * 66
            and 12 < a.width - 3 * 66 < 160
            and a.tobytes() == b.tobytes()
        )
    drawn(base, "--labels", 2, "--count", 2, "--out", tmp_path / "growth.png", "--growth")
    with Image.open(tmp_path / "growth.png") as growth:
        assert growth.height == 2 * 66 and 12 < growth.width - len(SCALES) * 66 < 160
    drawn(base, "--out", tmp_path / "all.png", "--count", 1)
    with Image.open(tmp_path / "all.png") as page:
        assert page.height == 3 * 66


def test_a_gif_grows_pass_by_pass(base, tmp_path):
    drawn(
        base,
        "--labels",
        0,
        1,
        "--count",
        2,
        "--out",
        tmp_path / "a.gif",
        "--schedule",
        "1 / 1,3 / 16 / 30,34",
    )
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 6 and gif.height == 2 * 66  # a pass a frame
        last = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            last.append(np.asarray(gif.convert("RGB")))
        assert gif.info["duration"] == 2000 and len({frame.tobytes() for frame in last}) == 6


def arrays(path):
    with np.load(path) as archive:
        assert sorted(archive) == ["arr_0", "labels"]
        return archive["arr_0"], archive["labels"]


def test_an_npz_holds_images_and_labels_and_a_folder_the_same(base, commands, tmp_path):
    flags = [base, "--labels", 2, 1, "--count", 3, "--seed", 7, "--guidance", 0.5, "--batch", 2]
    drawn(*flags, "--out", tmp_path / "a.npz")
    images, labels = arrays(tmp_path / "a.npz")
    assert (
        images.dtype == np.uint8
        and images.shape == (6, 16, 16, 3)
        and labels.tolist() == [2, 2, 2, 1, 1, 1]
    )
    expected, _ = sample.generate(
        weights(base, "hmar.pt"),
        weights(base, "tokenizer.pt"),
        torch.tensor([2, 2, 2, 1, 1, 1]),
        seed=7,
        guidance=0.5,
    )
    assert (
        np.abs(images.astype(int) - sample.to_bytes(expected)).max() <= 1
    )  # rounding may tip at another batch size
    settings = json.loads((tmp_path / "a.npz.json").read_text())
    assert (
        settings["seed"] == 7
        and settings["guidance"] == 0.5
        and settings["labels"] == [2, 1]
        and settings["count"] == 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]
    drawn(*flags, "--out", tmp_path / "folder")
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [path.name for path in files] == [
        f"00000{i}-{label}.png" for i, label in enumerate(labels)
    ]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), images)
    assert json.loads((tmp_path / "folder" / "settings.json").read_text())["seed"] == 7
    for job in start_two(
        commands,
        *flags,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--out",
        tmp_path / "two.npz",
        command="sample",
    ):
        job.done()
    assert np.array_equal(arrays(tmp_path / "two.npz")[0], images)


COUNTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
def counted(*given, make=sample.generate, calls=[], **options):
    calls.append(given)
    print("made", flush=True)
    if len(calls) == stop_at:
        os.kill(os.getpid(), number)
    return make(*given, **options)
sample.generate, stop_at = counted, None
"""


def test_an_npz_that_was_killed_or_interrupted_is_continued(base, commands, tmp_path):
    flags = [
        base,
        "--labels",
        "all",
        "--count",
        20,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--batch",
        5,
        "--out",
    ]
    drawn(*flags, tmp_path / "whole.npz")
    made = 0
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        job = commands.run(
            "sample",
            *flags,
            tmp_path / "cut.npz",
            before=COUNTED + f"stop_at, number = 4, {int(number)}",
        )
        assert job.status == status and not (tmp_path / "cut.npz").exists()
        assert job.err.count("\n") == (1 if number == signal.SIGINT else 0), job.err
        made += job.out.count("made")
    made += (
        commands.run("sample", *flags, tmp_path / "cut.npz", before=COUNTED)
        .done()
        .out.count("made")
    )
    assert made == 12 + 2  # of the 12 batches, the two that were cut off twice
    for ours, theirs in zip(arrays(tmp_path / "cut.npz"), arrays(tmp_path / "whole.npz")):
        assert np.array_equal(ours, theirs)


def interrupted_npz(monkeypatch, calls, *flags):
    """Starts an .npz and ends after so many batches."""
    made, generate = [], sample.generate

    def call(*arguments, **options):
        if len(made) == calls:
            raise Killed
        made.append(arguments)
        return generate(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sample, "generate", call)
        drawn(*flags)


@pytest.mark.parametrize("batch", [2, 9])
def test_an_npz_may_be_continued_with_another_batch(base, tmp_path, monkeypatch, batch):
    flags = [base, "--labels", 0, "--count", 12, "--out"]
    drawn(*flags, tmp_path / "whole.npz")
    interrupted_npz(monkeypatch, 2, *flags, tmp_path / "cut.npz", "--batch", 3)
    drawn(*flags, tmp_path / "cut.npz", "--batch", batch)
    images, expected = (
        arrays(tmp_path / f"{name}.npz")[0].astype(int) for name in ("cut", "whole")
    )
    assert np.abs(images - expected).max() <= 1


@pytest.mark.parametrize("change", ["seed", "weights", "photo"])
def test_an_npz_is_not_continued_with_what_another_command_made(
    base, tmp_path, monkeypatch, change
):
    """Of another seed, of a run that was trained on, of another photograph: begun anew."""
    run = continued(base, tmp_path / "run", *train.STAGES)
    train.draw_shape(1, 16)[0].save(tmp_path / "photo.png")
    flags = [run, "--labels", 0, "--count", 4, "--batch", 2]
    flags += ["--edit", tmp_path / "photo.png", "--pad", 0.3] if change == "photo" else []
    if change == "photo":
        edit, generate, calls = sample.edit, sample.generate, []
        monkeypatch.setattr(
            sample,
            "generate",
            lambda *models, known, **options: generate(*models, known=known, **options),
        )  # for edit

        def once(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 2:
                raise Killed
            return edit(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sample, "edit", once)
            drawn(*flags, "--out", tmp_path / "cut.npz")
        train.draw_shape(2, 16)[0].save(tmp_path / "photo.png")
    else:
        interrupted_npz(monkeypatch, 1, *flags, "--out", tmp_path / "cut.npz")
    if change == "weights":
        torch.save(
            pytree.tree_map(
                lambda tensor: tensor.flip(0), weights(base, "tokenizer.pt")["codebook"]
            ),
            tmp_path / "codebook.pt",
        )
        torch.save(
            weights(base, "tokenizer.pt") | dict(codebook=torch.load(tmp_path / "codebook.pt")),
            run / "tokenizer.pt",
        )
    flags += ["--seed", 9] if change == "seed" else []
    drawn(*flags, "--out", tmp_path / "cut.npz")
    drawn(*flags, "--out", tmp_path / "whole.npz")
    assert np.array_equal(arrays(tmp_path / "cut.npz")[0], arrays(tmp_path / "whole.npz")[0])


def test_a_photograph_is_edited_under_a_mask_or_around_it(base, tmp_path):
    photo = train.draw_shape(4, 24)[0]
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    mask.save(tmp_path / "mask.png")
    flags = [base, "--edit", tmp_path / "photo.png", "--labels", 1, "--count", 2, "--out"]
    drawn(*flags, tmp_path / "a.npz", "--mask", tmp_path / "mask.png")
    images, _ = arrays(tmp_path / "a.npz")
    small = np.asarray(photo.resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    kept = np.abs(images.astype(int) - small)
    assert (
        kept[:, :, 8:].max() == 0
        and kept[:, :, :8].max() > 0
        and not np.array_equal(images[0], images[1])
    )
    drawn(*flags, tmp_path / "b.npz", "--pad", 0.25)
    images, _ = arrays(tmp_path / "b.npz")
    inner = np.asarray(
        photo.resize((16, 16), Image.Resampling.LANCZOS).resize((8, 8), Image.Resampling.LANCZOS)
    ).astype(int)
    assert np.abs(images[:, 4:12, 4:12].astype(int) - inner).max() == 0
    drawn(*flags, tmp_path / "sheet.png", "--mask", tmp_path / "mask.png", "--feather", 2)
    with Image.open(tmp_path / "sheet.png") as sheet:  # the photograph, then the versions
        assert sheet.height == 66 and 12 < sheet.width - 3 * 66 < 160


def test_photographs_and_masks_are_read_as_training_reads_images(base, tmp_path):
    """16 bits scaled, not clipped; transparent pixels on white."""
    Image.fromarray(np.full((16, 16), 123 * 257, np.uint16)).save(tmp_path / "photo.png")
    Image.fromarray(np.full((16, 16), 300, np.uint16)).save(tmp_path / "black.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for photo, expected in (("photo.png", 123), ("clear.png", 255)):
        drawn(
            base,
            "--edit",
            tmp_path / photo,
            "--mask",
            tmp_path / "black.png",
            "--labels",
            1,
            "--count",
            1,
            "--out",
            tmp_path / "a.npz",
        )
        assert (arrays(tmp_path / "a.npz")[0] == expected).all()
    settings = json.loads((tmp_path / "a.npz.json").read_text())
    assert (
        settings["edit"].endswith("clear.png")
        and settings["mask"].endswith("black.png")
        and settings["feather"] == 0
    )


def test_a_folder_is_not_mixed_with_images_of_other_settings(base, tmp_path, capsys):
    flags = [
        base,
        "--labels",
        1,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--out",
        tmp_path / "folder",
        "--count",
    ]
    drawn(*flags, 3)
    before = {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    assert "other settings (count 3 -> 2); expected another folder" in refusal(
        capsys, *flags, 2, command=sample
    )
    drawn(*flags, 3)
    assert {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == before


BAD_SAMPLING = {
    "unknown label": (
        ["--labels", "dics"],
        "--labels: got 'dics', expected 0 to 2 or a name such as disc",
    ),
    "number beyond the classes": (["--labels", 3], "--labels: got '3', expected 0 to 2"),
    "missing run": (
        ["{here}/nowhere"],
        "{here}/nowhere/hmar.pt is missing: the next-scale stage of python train.py makes it",
    ),
    "schedule does not sum": (
        ["--schedule", "1/1,3/16/60"],
        "schedule: entry 3 is (60,), expected numbers that sum to 64",
    ),
    "schedule of words": (["--schedule", "1/a"], "--schedule: got '1/a'"),
    "schedule of too few scales": (["--schedule", "1/4"], "a tuple for each of the 4 scales"),
    "mask steps": (["--mask-steps", 1, 2], "steps: got [1, 2]"),
    "no folder for the output": (
        ["--out", "{here}/nowhere/a.png"],
        "{here}/nowhere/a.png: cannot be written: No such file or directory",
    ),
    "no folder for an npz": (["--out", "{here}/nowhere/a.npz"], "nowhere/a"),
    "output is a folder": (
        ["--out", "{here}/folder.png"],
        "{here}/folder.png: cannot be written: Is a directory",
    ),
    "output below a file": (["--out", "{here}/file.txt/folder"], "file.txt/folder"),
    "count": (["--count", 0], "--count: got 0, expected at least 1"),
    "batch": (["--batch", 0], "--batch: got 0, expected at least 1"),
    "causal": (["--causal"], "was trained without it"),
    "scales": (["--scales", 1, 2], "expected published --weights; a run folder's have their own"),
    "out is a JPEG": (
        ["--out", "{here}/a.jpg"],
        "/a.jpg, expected a .png, .gif or .npz, or the name of a folder",
    ),
    "gif of an edit": (
        ["--edit", "{here}/one/a.png", "--pad", 0.2, "--out", "{here}/a.gif"],
        "--edit: got {here}/a.gif",
    ),
    "growth of an edit": (
        ["--edit", "{here}/one/a.png", "--pad", 0.2, "--growth"],
        "expected a .png without --growth",
    ),
    "growth in a folder": (
        ["--growth", "--out", "{here}/a"],
        "--growth: got {here}/a, expected a .png to write",
    ),
    "mask without a photo": (
        ["--mask", "{here}/one/a.png"],
        "--mask, --pad, --feather: expected --edit PHOTO too",
    ),
    "feather without a photo": (
        ["--feather", 2],
        "--mask, --pad, --feather: expected --edit PHOTO too",
    ),
    "pad without a photo": (["--pad", 0.1], "--mask, --pad, --feather: expected --edit PHOTO too"),
    "temperature": (["--temperature", -1], "temperature: got -1.0, expected 0 or more"),
    "top-p": (["--top-p", 0], "top_p: got 0.0"),
    "guidance": (
        ["--guidance", 1, 2],
        "guidance: got [1.0, 2.0], expected a number, 0 or more, or one for each of the 4 scales",
    ),
    "mistyped flag": (["--lables", 1], "no flag --lables; did you mean --labels?"),
    "photo is missing": (["--edit", "{here}/no.png", "--pad", 0.2], "{here}/no.png: missing"),
    "photo is text": (
        ["--edit", "{here}/file.txt", "--pad", 0.2],
        "{here}/file.txt: no image of these formats",
    ),
    "edit without a mask": (
        ["--edit", "{here}/one/a.png"],
        "--edit: expected one of --mask IMAGE and --pad SHARE",
    ),
    "pad": (
        ["--edit", "{here}/one/a.png", "--pad", 0.6],
        "--pad: got 0.6, expected a share of the side between 0 and 0.5",
    ),
    "weights without a tokenizer": (["--weights", "{here}/tensor.pt"], "tensor.pt"),
    "no run": ([], "expected a run folder, or both --weights and --tokenizer"),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_input_to_sampling_ends_with_one_line_and_status_2(base, bad, capsys, name):
    flags, said = BAD_SAMPLING[name]
    (bad / "folder.png").mkdir(exist_ok=True)
    run = [] if name in ("missing run", "no run") else [base]
    flags = [str(flag).replace("{here}", str(bad)) for flag in flags]
    out = [] if "--out" in flags else ["--out", bad / "out.png"]
    line = refusal(capsys, *run, "--device", "cpu", "--dtype", "fp32", *out, *flags, command=sample)
    assert said.replace("{here}", str(bad)) in line and not (bad / "out.png").exists()


def test_sampling_without_a_masked_branch_refuses_refinement(base, folder, tmp_path, capsys):
    run = continued(base, tmp_path / "run", "tokenizer")
    run_main("next-scale", "--data", folder, "--out", run, "--steps", 1, "--causal")
    assert "no masked branch" in refusal(
        capsys, run, "--schedule", "1/1,3/16/64", "--out", tmp_path / "a.png", command=sample
    )
    drawn(run, "--out", tmp_path / "a.png", "--count", 1)  # VAR, as args.json says
    drawn(
        "--weights",
        run / "hmar.pt",
        "--tokenizer",
        run / "tokenizer.pt",
        "--out",
        tmp_path / "b.png",
        "--count",
        1,
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "VAR (--causal) has no masked stage" in refusal(
        capsys, "masked", *TINY, "--data", folder, "--out", run
    )


# What the flags steer, and what the reported numbers say.

STEERED = {  # flags: the stage, the function that they reach, what is seen there
    "beta": (
        ["--beta", 0.7],
        "tokenizer",
        tokenizer,
        "training_pass",
        lambda call: call["beta"] == 0.7,
    ),
    "loss weights": (
        ["--loss-weights", "scale"],
        "next-scale",
        hmar,
        "scale_weights",
        lambda call: call["kind"] == "scale",
    ),
    "stochastic depth": (
        ["--depth-drop", 0.6],
        "next-scale",
        hmar,
        "stochastic_depth",
        lambda call: call["rate"] == 0.6 * 2 / 24,
    ),
    "factors of stochastic depth": (
        ["--depth-drop", 11],
        "next-scale",
        hmar,
        "next_scale_losses",
        lambda call: 0 in call["keep"] and call["keep"].max() > 1,
    ),
    "labels dropped": (
        ["--label-drop", 1],
        "next-scale",
        hmar,
        "next_scale_losses",
        lambda call: (call["labels"] == 3).all(),
    ),
    "labels kept": (
        ["--label-drop", 0],
        "next-scale",
        hmar,
        "next_scale_losses",
        lambda call: (call["labels"] < 3).all(),
    ),
    "labels dropped when masked": (
        ["--label-drop", 1],
        "masked",
        hmar,
        "masked_losses",
        lambda call: (call["labels"] == 3).all(),
    ),
    "checkpointing": (
        ["--checkpointing"],
        "next-scale",
        hmar,
        "next_scale_losses",
        lambda call: call["checkpointing"],
    ),
    "no flip": (["--no-flip"], "tokenizer", train, "crop", lambda call: call["flip"] is False),
    "flip": ([], "tokenizer", train, "crop", lambda call: call["flip"] is True),
    "weight decay": (
        ["--weight-decay", 0.3],
        "next-scale",
        torch.optim,
        "AdamW",
        lambda call: [group["weight_decay"] for group in call["params"]] == [0.3, 0],
    ),
}


@pytest.mark.parametrize(
    "flags, processes, parts",
    [
        (["--size", 32], 1, 1),
        (["--size", 256], 1, 8),
        (["--size", 256], 8, 1),
        (["--size", 512], 1, 32),
        (["--size", 1024], 2, 32),
        (["--size", 256, "--batch", 36], 1, 6),
        (["--size", 256, "--batch", 10], 2, 1),
        (["--size", 256, "--accumulate", 2], 1, 2),
    ],
)
def test_a_batch_is_cut_into_parts_that_fit_a_machine(monkeypatch, flags, processes, parts):
    """Of at most eight images of 256 pixels, or as many pixels in others, as few parts as divide the batch."""
    monkeypatch.setattr(train, "world", lambda: processes)
    assert (
        train.resolved(train.parser().parse_args([str(flag) for flag in flags])).accumulate == parts
    )


def test_nothing_puts_more_images_through_the_tokenizer_than_fit(tmp_path, monkeypatch):
    """Initialisation of the codebook, judging, encoding, and drawing a sheet's rows of eight."""
    counts = []
    features, decode = tokenizer.features, tokenizer.decode_features
    for module in (train, sample):
        monkeypatch.setattr(module, "at_once", lambda pixels: 3)
    monkeypatch.setattr(
        tokenizer,
        "features",
        lambda params, images: (counts.append(len(images)), features(params, images))[1],
    )
    monkeypatch.setattr(
        tokenizer,
        "decode_features",
        lambda params, f_hat: (counts.append(len(f_hat)), decode(params, f_hat))[1],
    )
    monkeypatch.setattr(
        train,
        "data_sets",
        lambda args: (train.Images(range(40), 16), train.Images(range(40, 50), 16), train.SHAPES),
    )
    assert (
        train.main([*TINY, "--steps", "11", "--accumulate", "2", "--out", str(tmp_path / "run")])
        == 0
    )
    assert set(counts) <= {1, 2, 3}


@pytest.mark.parametrize("name", STEERED)
def test_flags_reach_what_they_steer(base, folder, tmp_path, monkeypatch, name):
    flags, stage, module, function, reached = STEERED[name]
    original, calls = getattr(module, function), []

    def call(*arguments, **options):
        calls.append(inspect.signature(original).bind(*arguments, **options).arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, call)
    monkeypatch.setattr(
        sample,
        "generate",
        lambda params, _, labels, **options: (torch.zeros(len(labels), 3, 16, 16), None),
    )
    run = continued(base, tmp_path / "run", *train.STAGES[: train.STAGES.index(stage)])
    run_main(stage, "--data", folder, "--out", run, "--steps", 2, "--eval-every", 9, *flags)
    assert calls and reached(calls[0])


def test_the_share_of_hidden_tokens_is_uniform(base, folder, tmp_path, monkeypatch):
    shares = []
    watched(
        monkeypatch,
        hmar,
        "masked_losses",
        lambda _, *arguments, **__: shares.extend(arguments[5].float().mean(1).tolist()),
    )
    run_main(
        "masked",
        "--data",
        folder,
        "--out",
        continued(base, tmp_path / "run", *train.STAGES[:2]),
        "--steps",
        20,
        "--eval-every",
        99,
    )
    assert len(shares) >= 80 and np.histogram(shares[:80], 4, (0, 1))[0].min() >= 8


def held_out(base, folder):
    """What `base` holds out: images in [-1, 1] and labels."""
    files, _ = train.list_images(folder)
    _, kept = train.split_held_out(files, folder, 0.05)
    images = [
        torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).astype(np.float32) / 127.5 - 1)
        for path, _ in kept
    ]
    return torch.stack(images).permute(0, 3, 1, 2), torch.tensor([label for _, label in kept])


def test_held_out_numbers_are_those_of_the_weights_that_are_saved(base, folder):
    images, labels = held_out(base, folder)
    codec, params = weights(base, "tokenizer.pt"), weights(base, "hmar.pt")
    tokens = tokenizer.encode(codec, images, SCALES)
    errors = [
        float(((made - image) ** 2).mean())
        for made, image in zip(tokenizer.decode(codec, tokens, SCALES), images)
    ]
    psnr = np.mean([20 * math.log10(2) - 10 * math.log10(error) for error in errors])
    assert [line["psnr"] for line in lines_of(base, "tokenizer") if "psnr" in line][
        -1
    ] == pytest.approx(psnr, abs=1e-3)
    inputs = tokenizer.next_scale_inputs(codec, tokens, SCALES)
    logits = hmar.next_scale_logits(params, labels, inputs)
    surprise = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (B, L)
    line = [line for line in lines_of(base, "next-scale") if "held_out_loss" in line][-1]
    assert line["held_out_loss"] == pytest.approx(float(surprise.mean()), abs=1e-4) and line[
        "ln_codes"
    ] == pytest.approx(math.log(32))
    assert line["accuracy"] == pytest.approx(
        float((logits.argmax(-1) == tokens).double().mean()), abs=1e-6
    )
    edges = [0, 1, 5, 21, 85]
    assert line["held_out_scale_losses"] == pytest.approx(
        [float(surprise[:, a:b].mean()) for a, b in itertools.pairwise(edges)], abs=1e-4
    )
    hidden = torch.rand(len(images), 84, generator=train.generator_of("held-out mask", 0)) < 0.5
    logits = hmar.masked_logits(
        params, labels, inputs, tokenizer.masked_inputs(codec, tokens, SCALES, hidden), hidden
    )[:, 1:]
    surprise = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0][hidden]
    line = [line for line in lines_of(base, "masked") if "held_out_loss" in line][-1]
    assert line["held_out_loss"] == pytest.approx(float(surprise.mean()), abs=1e-4)


def test_the_tokenizer_is_trained_on_all_its_errors(monkeypatch):
    """Squared, absolute and edge errors, quantisation, and the critic's on augmented images, the balanced one by its weight."""
    params = tokenizer.init(
        codes=32, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, attention=False
    )
    tree = dict(
        tokenizer=train.trainable(params),
        discriminator=train.trainable(tokenizer.init_discriminator(channels=8)),
    )
    images, uniform = torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(4, 4)
    args = argparse.Namespace(dtype=torch.float32, scales=SCALES, beta=0.1)
    made, vq, *_ = tokenizer.training_pass(tree["tokenizer"], images, SCALES, 0.1)
    edges = (made[:, :, 1:] - made[:, :, :-1] - images[:, :, 1:] + images[:, :, :-1]).abs().mean()
    edges = (
        edges + (made[..., 1:] - made[..., :-1] - images[..., 1:] + images[..., :-1]).abs().mean()
    )
    expected = (
        ((made - images) ** 2).mean() + 0.5 * (made - images).abs().mean() + 0.25 * edges + vq
    )
    total, _ = train.tokenizer_loss(args, tree, images, True, None, 0.0, uniform)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    with_gan, output = train.tokenizer_loss(args, tree, images, True, None, 0.3, uniform)
    real, fake = (
        tokenizer.discriminator(tokenizer.augmented(batch, uniform), tree["discriminator"])
        for batch in (images, made)
    )
    critic = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert float(output["critic"]) == pytest.approx(float(critic), rel=1e-5)
    reconstruction = expected - vq
    last = tree["tokenizer"]["decoder"]["conv_out"]["weight"]
    ours, theirs = (
        torch.autograd.grad(value, last, retain_graph=True)[0].norm()
        for value in (reconstruction, fake.mean())
    )
    assert float(with_gan - total) == pytest.approx(
        float(critic - 0.3 * fake.mean() * ours / theirs), rel=1e-3
    )


def test_the_adversarial_weight_ramps_in(folder, tmp_path, monkeypatch):
    given = []
    watched(
        monkeypatch,
        train,
        "tokenizer_loss",
        lambda _, args, tree, images, quantised, stop, gan, uniform: given.append(gan),
    )
    run_main("tokenizer", "--data", folder, "--out", tmp_path, "--steps", 10, "--gan", 0.4)
    assert given == pytest.approx([0, 0, 0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_workers(commands, folder, tmp_path):
    """As Ctrl-C on a terminal and torchrun send it."""
    flags = [
        "tokenizer",
        *TINY,
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--steps",
        9,
        "--save-every",
        100,
        "--workers",
        2,
    ]
    told = signalled(int(signal.SIGTERM), "tokenizer", 3).replace(
        "os.kill(os.getpid()", "os.killpg(os.getpgrp()"
    )
    job = commands.run("train", *flags, before="os.setpgrp()\n" + told)
    assert (
        job.status == 130
        and "stopped at step 3 of 9 and saved" in job.err
        and job.err.count("\n") == 1
    ), job.err
    commands.run("train", *flags).done()


def test_two_processes_continue_bit_for_bit(commands, folder, tmp_path):
    """Stopped where neither a report nor a replacement of dead codes is due: what each had counted goes on."""
    flags = [
        "tokenizer",
        *TINY,
        "--data",
        folder,
        "--steps",
        16,
        "--codes",
        128,
        "--log-every",
        7,
        "--revive-every",
        11,
        "--save-every",
        5,
    ]
    for job in start_two(commands, *flags, "--out", tmp_path / "whole"):
        job.done()
    told = signalled(int(signal.SIGTERM), "tokenizer", 7)
    jobs = start_two(
        commands, *flags, "--out", tmp_path / "cut", before=told
    )  # both agree at the tenth step
    assert [job.wait().status for job in jobs] == [130, 130], jobs[0].err + jobs[1].err
    for job in start_two(commands, *flags, "--out", tmp_path / "cut"):
        job.done()
    for name in ("tokenizer.pt", "tokenizer.resume.pt"):
        assert (
            difference(weights(tmp_path / "cut", name), weights(tmp_path / "whole", name)) == 0
        ), name
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def long_run():
    """60 steps of each stage, each killed with SIGKILL at ten random moments, against a run that nobody interrupted."""
    import tempfile

    with tempfile.TemporaryDirectory() as here:
        here, chance = Path(here), random.Random()
        commands = Commands(here)
        drawings(here / "images")
        flags = [*TINY, "--data", here / "images", "--steps", 60, "--out"]
        commands.run("train", *flags, here / "whole").done()
        for number, stage in enumerate(train.STAGES):
            moments = [number * 1000 + step for step in sorted(chance.sample(range(1, 60), 10))]
            kills = kill_often(
                commands, here / "cut", [stage, *flags, here / "cut"], moments, chance
            )
            print(
                f"{stage}: killed {kills} times, after steps {[moment % 1000 for moment in moments]}",
                flush=True,
            )
        assert_same_run(here / "cut", here / "whole")
        print(
            "weights, optimizer, averages, tokens, settings and metrics equal the uninterrupted run's, bit for bit"
        )
        commands.close()


if __name__ == "__main__":
    if sys.argv[1:] != ["--long"]:
        sys.exit("usage: python tests/test_train.py --long; the tests run with pytest")
    long_run()
