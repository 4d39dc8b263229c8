"""Attacks that no module's own tests hold: files in the way, words that a terminal would obey."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer
import train

SIZES = dict(codes=16, code_dim=8)
CODEC = tokenizer.init(channels=32, multipliers=(1, 1), residual_blocks=1, **SIZES)
PARAMS = hmar.init(depth=1, width=32, classes=2, scales=((1, 1), (4, 4)), **SIZES)
ESCAPE = "\x1b[31m\nred"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    torch.save(CODEC, tmp_path / "run" / "tokenizer.pt")
    torch.save(PARAMS, tmp_path / "run" / "hmar.pt")
    return tmp_path / "run"


def draw(*flags):
    common = ["--count", "1", "--device", "cpu", "--dtype", "fp32"]
    return sample.main([str(flag) for flag in (*flags, *common)])


def line_of(capsys):
    said = capsys.readouterr().err
    assert said.endswith("\n") and said[:-1].isprintable()
    return said


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_lies_in_the_place_of_a_temporary_file_is_not_written_through(run, tmp_path, link):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in ("settings.json", "000000-0.png"):
        link(victim, out / f"{name}.0.tmp")
    link(victim, tmp_path / "a.png.0.tmp")
    for path in (out, tmp_path / "a.png"):
        assert draw(run, "--out", path) == 0
    assert victim.read_text() == "mine"
    names = ["000000-0.png", "000001-1.png", "settings.json"]
    assert sorted(os.listdir(out)) == names and not (out / names[0]).is_symlink()


def test_a_damaged_picture_is_named_when_a_folder_is_packed(run, tmp_path, capsys):
    out, picture = tmp_path / "a.npz", tmp_path / "a" / "000001-1.png"
    assert draw(run, "--out", out) == 0
    whole = np.load(out)["arr_0"]
    out.unlink()
    picture.write_bytes(picture.read_bytes()[:-30])
    assert draw(run, "--out", out) == 2 and not out.exists()
    assert line_of(capsys).startswith(f"sample.py: {picture}: ")
    picture.unlink()
    assert draw(run, "--out", out) == 0 and np.array_equal(np.load(out)["arr_0"], whole)


def test_metrics_that_are_no_text_are_passed_over(tmp_path):
    line = b'{"stage": "masked", "step": 3, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + line + b"\0\0\0\x80")
    args = argparse.Namespace(out=str(tmp_path), stage="tokenizer")
    assert train.resume(args, [], None) == (0, 0, math.inf)
    assert (tmp_path / "metrics.jsonl").read_bytes() == line


def test_leaves_of_several_float_types_are_one_when_they_are_loaded(run):
    for name, tree, load in (
        ("tokenizer.pt", CODEC, sample.load_tokenizer),
        ("hmar.pt", PARAMS, sample.load_transformer),
    ):
        leaves, structure = pytree.tree_flatten(tree)
        mixed = [leaf.double() if i % 2 else leaf for i, leaf in enumerate(leaves)]
        torch.save(pytree.tree_unflatten(mixed, structure), run / name)
        loaded = pytree.tree_leaves(load(run / name))
        assert all(map(torch.equal, loaded, leaves)) and {x.dtype for x in loaded} == {torch.float}


@pytest.mark.parametrize("name", ["hpu", "meta", "mps", "xla", "", "cuda:99", ESCAPE])
def test_devices_that_are_not_here_are_refused(name, run, capsys):
    assert sample.main([str(run), "--device", name]) == 2
    assert line_of(capsys).startswith(f"sample.py: --device: got {name!r}, expected cpu or a cuda")


def test_names_reach_the_terminal_on_one_line_and_without_escapes(run, tmp_path, capsys):
    (run / "args.json").write_text(json.dumps(dict(class_names=[ESCAPE, "b"])))
    assert draw(run, "--labels", "c", "--out", tmp_path / "a.png") == 2
    assert "such as ?[31m?red, b" in line_of(capsys)
    torch.save(PARAMS | {ESCAPE: torch.zeros(3)}, run / "hmar.pt")
    assert draw(run, "--out", tmp_path / "a.png") == 2
    assert "red is (3,), not known" in line_of(capsys)
    torch.save(PARAMS, run / "hmar.pt")
    for name in (ESCAPE, os.fsdecode(b"\xff")):  # no UTF-8
        assert draw(run, "--out", tmp_path / f"{name}.png") == 0
        said = capsys.readouterr()
        assert said.err == "" and said.out[:-1].isprintable() and said.out.endswith(".png\n")
