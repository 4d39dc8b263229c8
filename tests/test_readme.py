"""What a newcomer relies on: README's commands and example, files that run alone."""

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
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = plain | dict(OMP_NUM_THREADS="1", COLUMNS="120")
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_first_code_block_is_two_commands():
    _, one, two = README.split("```")[1].splitlines()
    assert "train.py" in one and "pytest" in two


def test_what_is_named_and_linked_is_there():
    for path in re.findall(r"\]\((?!https:)(.+?)\)", README):
        assert (ROOT / path).is_file(), path
    text = README + (ROOT / "tests/RESULTS.md").read_text()
    for module, name in re.findall(rf"`({'|'.join(MODULES)})\.(?!p[yt]`)(\w+)`", text):
        assert hasattr(sys.modules[module], name), name


def test_the_places_to_change_are_at_their_lines():
    places = re.findall(r"`(\w+)\.(\w+)` \(line\s(\d+)\)", README)
    assert len(places) == 3
    for module, name, line in places:
        source = (ROOT / f"{module}.py").read_text().splitlines()
        assert source[int(line) - 1].startswith(f"def {name}("), name


def test_readme_example_runs():
    *_, example, _ = blocks("python")
    printed = python("-c", example, cwd=ROOT)
    assert re.fullmatch(r"4\.1\d \(2, 3, 16, 16\)\n", printed), printed


def test_readme_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(24):
        folder = Path("my_images", ("cat", "dog", "heart", "star")[index % 4])
        folder.mkdir(parents=True, exist_ok=True)
        train.draw_shape(index)[0].save(folder / f"{index}.png")
    train.draw_shape(3)[0].save("photo.png")
    Image.linear_gradient("L").save("mask.png")

    _, *others = blocks("sh")
    lines = "".join(others).splitlines()
    lines.sort(key=lambda line: "train.py" not in line)  # what is sampled is trained first
    assert len(lines) >= 8
    few = {"train.py": (train, "--steps 2 --batch 4"), "sample.py": (sample, "--count 2")}
    for line in lines:
        line = line.replace("RUN", "runs/my_images").replace("runs/shapes", "runs/my_images")
        _, script, *flags = shlex.split(line, comments=True)
        command, more = few[script]
        command.main([*flags, *more.split()])
    for example in blocks("python"):
        exec(example, {})  # noqa: S102
    written = ["pets.png", "sampled/000000-cat.png", "growing.gif", "samples.npz"]
    written += [f"runs/{name}/model.pt" for name in ("more", "paper", "own")]
    for path in written:
        assert Path(path).is_file(), path


@pytest.mark.parametrize(
    "names", [("attention_kernels",), ("tokenizer",), ("hmar", "attention_kernels")]
)
def test_copied_alone_a_file_runs_its_example_without_triton(tmp_path, names):
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('triton')")
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    report = python("-m", "doctest", "-v", f"{names[0]}.py", cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed", report, re.MULTILINE)


def test_help_names_all_flags():
    for name in ("train", "sample"):
        text = python(f"{name}.py", "--help", cwd=ROOT)
        assert text.startswith(f"usage: {name}.py")  # imports print nothing
        flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
        source = (ROOT / f"{name}.py").read_text()
        added = {*re.findall(r'add\("(--[a-z-]+)"', source), "--device", "--dtype"}
        if name == "sample":
            added |= {f"--{setting.replace('_', '-')}" for setting in sample.SETTINGS}
        assert set(flags) == added and len(flags) > 10


@pytest.mark.parametrize("name", MODULES)
def test_only_the_agreed_packages_are_imported(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    agreed = {"torch", "triton", "numpy", "PIL", *MODULES}
    assert imported - set(sys.stdlib_module_names) <= agreed
    assert ast.get_docstring(tree)
