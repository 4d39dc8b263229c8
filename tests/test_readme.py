"""What a newcomer relies on: README's commands and example, files that can be copied alone, quiet imports, functions that fit a screen."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sample
import train

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("attention_kernels", "tokenizer", "hmar", "sample", "train")
README = (ROOT / "README.md").read_text()


def python(*arguments, cwd):
    """Runs Python in a folder that holds whatever it imports; returns what it printed."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=plain | dict(OMP_NUM_THREADS="1", COLUMNS="120"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_first_code_block_is_two_commands():
    first = (
        re.search(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL).group(1).splitlines()
    )
    assert len(first) == 2
    assert "train.py" in first[0] and "pytest" in first[1]


def test_readme_example_runs():
    (example,) = blocks("python")
    printed = python("-c", example, cwd=ROOT)
    assert re.fullmatch(r"4\.1\d \(2, 3, 16, 16\)\n", printed), printed


def test_readme_commands_run(tmp_path, monkeypatch):
    """Every line of the shell blocks after the first, as it stands and in that order, on a few drawings and with few steps."""
    monkeypatch.chdir(tmp_path)
    for index in range(24):
        folder = Path("my_images", ("bird", "cat", "dog", "fish")[index % 4])
        folder.mkdir(parents=True, exist_ok=True)
        train.draw_shape(index)[0].save(folder / f"{index}.png")
    train.draw_shape(3)[0].save("photo.png")
    Image.new("L", (8, 8), "white").save("mask.png")
    _, *others = blocks("sh")
    lines = "".join(others).splitlines()
    assert len(lines) >= 11
    for line in lines:
        _, script, *flags = shlex.split(line.replace("RUN", "runs/my_images"), comments=True)
        command, few = {
            "train.py": (train, "--steps 2 --batch 4 --workers 0"),
            "sample.py": (sample, "--count 2"),
        }[script]
        assert command.main([*flags, *few.split()]) == 0, line
    for made in (
        "cats.png",
        "drawn/000000-0.png",
        "growing.gif",
        "samples.npz",
        "runs/large/tokenizer.pt",
        "runs/more/hmar.pt",
    ):
        assert Path(made).is_file(), made


@pytest.mark.parametrize(
    "names", [("attention_kernels",), ("tokenizer",), ("hmar", "attention_kernels")]
)
def test_copied_alone_a_file_runs_its_example(tmp_path, names):
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    report = python("-m", "doctest", "-v", f"{names[0]}.py", cwd=tmp_path)
    assert (
        re.search(r"^[1-9]\d* passed", report, re.MULTILINE)
        and "0 failed" in report
        or "Test passed" in report
    )
    assert ">>>" in (ROOT / f"{names[0]}.py").read_text()


def test_readme_counts_the_lines_of_the_files():
    for name in MODULES:
        lines = int(re.search(rf"^\| `{name}.py` \| (\d+) \|", README, re.MULTILINE).group(1))
        assert abs(lines - len((ROOT / f"{name}.py").read_text().splitlines())) <= 15, name


def test_imports_print_nothing():
    assert python("-c", "import hmar, tokenizer, sample, train", cwd=ROOT) == ""


def test_flags_that_readme_names_exist_and_help_fits_a_screen():
    helps = {name: python(f"{name}.py", "--help", cwd=ROOT) for name in ("train", "sample")}
    assert all(len(text.splitlines()) <= 62 for text in helps.values())
    for line in "\n".join(blocks("sh")).splitlines():
        for name, text in helps.items():
            if f"{name}.py" in line:
                after = line.split(f"{name}.py")[1].partition("#")[0]
                assert all(
                    re.search(rf"{flag}\b", text) for flag in re.findall(r"--[a-z-]+", after)
                ), line


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_a_screen_and_only_the_agreed_packages_are_imported(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) - set(MODULES) <= {
        "torch",
        "triton",
        "numpy",
        "PIL",
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [
        node.name
        for node in functions
        if node.end_lineno - node.lineno >= 60 and not node.name.endswith("_kernel")
    ]
    assert not long
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree) and public
