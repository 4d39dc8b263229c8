"""What several test files use: random trees, comparisons, plain re-derivations."""

import contextlib
import inspect
import itertools
import re
from pathlib import Path
from unittest import mock

import benchmark
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import hmar
import tokenizer
import train

GOLDEN = Path(__file__).with_name("golden.pt")


def contents(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lengths(scales):
    return [h * w for h, w in scales]


def scale_of_tokens(scales):
    """(L,) int64."""
    return torch.repeat_interleave(torch.tensor(lengths(scales)))


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def pyramids(draw, largest=4, most=4):
    side = st.integers(1, largest)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=most))
    heights, widths = map(sorted, zip(*sizes))
    return tuple(zip(heights, widths))


def close(ours, truth, tolerance=1e-10):
    torch.testing.assert_close(ours, torch.as_tensor(truth), rtol=tolerance, atol=tolerance)


def named_leaves(tree):
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def leaves_equal(tree, other):
    leaves, others = named_leaves(tree), named_leaves(other)
    if leaves.keys() != others.keys():
        return False
    pairs = [(leaf, others[name]) for name, leaf in leaves.items()]
    return all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in pairs)


def seeded(init, seed, **sizes):
    """init's tree, which depends on the seed alone and leaves torch's own stream where it is."""
    state = torch.get_rng_state()
    made = init(**sizes, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert leaves_equal(made, init(**sizes, seed=seed))
    assert not leaves_equal(made, init(**sizes, seed=seed + 1))
    return made


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def scrambled(tree, seed=0, scale=0.3):
    """The tree in float64, every leaf random: no bias, gain or gate is at a value that hides it."""
    leaves, structure = pytree.tree_flatten(tree)
    drawn = [normal(*leaf.shape, seed=seed + i, scale=scale) for i, leaf in enumerate(leaves)]
    return pytree.tree_unflatten(drawn, structure)


def double(tree):
    return pytree.tree_map(torch.Tensor.double, tree)


def random_tokens(batch, scales, codes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(codes, (batch, sum(lengths(scales))), generator=generator)


def quantiser(codes, code_dim, seed=0):
    """The part of a tokenizer's tree that quantises."""
    phi = dict(weight=torch.empty(code_dim, code_dim, 3, 3), bias=torch.empty(code_dim))
    codebook = normal(codes, code_dim, seed=seed + 20)
    return scrambled(dict(phi=[phi] * 4), seed) | dict(codebook=codebook)


SMALL = dict(codes=16, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)


def small_codec(**options):
    return tokenizer.init(**SMALL | options)


def tree(scales=((1, 1), (2, 2), (2, 3)), masked=1, own_input=True, random=True, **options):
    """A transformer with 16 channels a head and a masked branch of `masked` blocks, none if 0.

    own_input: False for a published tree: its activation, and a masked branch that leaks and has no
    input weight of its own. random: in float64, with leaves far from initial values and
    temperatures around their limit.
    """
    sizes = dict(depth=2, classes=3, codes=5, code_dim=4, heads=2, seed=0) | options
    params = hmar.init(**sizes, scales=scales, width=16 * sizes["heads"])
    if masked:
        params = hmar.add_masked_branch(params, masked)
    if random:
        params = scrambled(params, sizes["seed"])
        for name, leaf in named_leaves(params).items():
            if "temperature" in name:
                leaf.copy_(2.5 + 10 * leaf.abs())

    params = params if own_input else benchmark.with_tanh(params)
    if masked and not own_input:
        params["masked"] |= dict(own_input=params["input"]["weight"], leak={})
    return params


def arguments(params, batch, seed=0):
    """labels (the null class among them), inputs, own inputs and mask that fit the tree."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths(hmar.scale_sizes(params))[1:])
    shape = (batch, count, params["input"]["weight"].shape[1])
    labels = torch.randint(len(params["classes"]), (batch,), generator=generator)
    features = [normal(*shape, seed=seed + i).to(params["classes"].dtype) for i in range(2)]
    return labels, *features, torch.rand(shape[:2], generator=generator) < 0.5


def failure(main, *flags):
    """The line with which a command fails, or None if it succeeds."""
    try:
        main([*map(str, flags)])
    except SystemExit as ending:
        return ending.code
    return None


class NumberedImages:
    """A dataset of 16 x 16 images: red tells an image's number, green its label, blue is noise."""

    classes = ("ant", "bee", "cow")
    STEP = 6  # of red, between two images

    def __init__(self, count=40, noise=255):
        self.noise, self.read = noise, []  # read: the indices in the order in which they were read
        self.labels = np.random.default_rng(count).integers(3, size=count).tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.read.append(index)
        pixels = np.empty((16, 16, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = self.STEP * index, 100 * self.labels[index]
        pixels[..., 2] = np.random.default_rng(index).integers(self.noise + 1, size=(16, 16))
        return Image.fromarray(pixels), self.labels[index]


class Listed(list):
    """A dataset of a list of (image, label)."""

    def __init__(self, items, classes):
        super().__init__(items)
        self.classes = classes


@contextlib.contextmanager
def stages_that_only_read(read=0):
    """Yields a list, to which each stage adds its arguments by name; no stage trains.

    A stage reads so many batches and returns the tree that it was given.
    """
    found = []

    def stand_in(stage):
        def called(*arguments, **options):
            found.append(inspect.signature(stage).bind(*arguments, **options).arguments)
            list(itertools.islice(found[-1]["batches"](0), read))
            return arguments[0]

        return called

    names = "train_tokenizer", "train_transformer"
    with mock.patch.multiple(train, **{name: stand_in(getattr(train, name)) for name in names}):
        yield found


def stages_of(dataset, out=None, read=0, **options):
    """What `train` passes to each stage, as [{argument: value}, ...]; see above."""
    with stages_that_only_read(read) as found:
        train.train(dataset, out, **options)
    return found


def settings_of(steps=1, *, depth=1, size=16, classes=3, **changes):
    """All settings of a run on 60 images, with so many steps in each stage."""
    stages = "tokenizer", "decoder", "next_scale", "masked"
    settings = train.recipe(depth, size, 60, classes) | dict(dtype="fp32", dropout=0.0)
    return settings | {f"{stage}_steps": steps for stage in stages} | changes


def state_dict(tree, names):
    """{name: leaf}, the names' parts replaced in this order."""
    state = {}
    for path, leaf in named_leaves(tree).items():
        name = ".".join(re.findall(r"\w+", path))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = leaf
    return state


def published(params):
    """Our tree under the published names: VAR, or HMAR with both branches."""
    is_combined = "masked" in params
    names = {
        "classes": "class_emb.weight",
        "start": "pos_start",
        "levels": "lvl_embed.weight",
        "positions": "pos_1LC",
        "input.weight": "word_embed.weight",
        "input.bias": "word_embed_bias" if is_combined else "word_embed.bias",
        "masked.mask_embedding": "mask_embed.weight",
        "modulation": "ada_lin.1",
        "next_scale.ada": "next_scale.head_nm.ada",
        "masked.ada": "masked.head_nm.ada",
        "next_scale.": "ns_" if is_combined else "",
        "masked.": "mask_",
        "trunk": "base_blocks" if is_combined else "blocks",
        "log_temperature": "scale_mul_1H11",
        "qkv": "mat_qkv.weight",
        "attention": "attn",
        "project": "proj",
        "mlp.expand": "ffn.fc1",
        "mlp.contract": "ffn.fc2",
    }
    rows = torch.cat([grid.flatten(0, 1) for grid in params["positions"]])
    theirs = params | dict(positions=rows)
    if is_combined:
        branch = params["masked"].items()
        theirs["masked"] = {name: leaf for name, leaf in branch if name != "own_input"}
    state = state_dict(theirs, names)
    for name, leaf in list(state.items()):
        if name in ("pos_start", "pos_1LC", "mask_embed.weight"):
            state[name] = leaf[None]
        elif name.endswith("scale_mul_1H11"):
            state[name] = leaf.view(1, -1, 1, 1)
        elif name.endswith("q_bias"):
            state[name.replace("q_bias", "zero_k_bias")] = torch.zeros_like(leaf)

    scales = hmar.scale_sizes(params)
    mask = benchmark.dense_mask(lengths(scales), not is_combined, rows.dtype)
    buffers = dict(lvl_1L=scale_of_tokens(scales)[None], attn_bias_for_masking=mask[None, None])
    return state | buffers


def refused(message, call, *arguments, **options):
    with pytest.raises(ValueError, match=message):
        call(*arguments, **options)
