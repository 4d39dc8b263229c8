"""What several test files use: random trees and arguments, comparisons, plain re-derivations."""

import argparse
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import hmar
import tokenizer
import train


def contents(folder):
    """{path: bytes} of all files in a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lengths(scales):
    return [h * w for h, w in scales]


def scale_of_tokens(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()


@st.composite
def pyramids(draw, largest=4, most=4):
    """Scales, coarse to fine."""
    heights = sorted(draw(st.lists(st.integers(1, largest), min_size=1, max_size=most)))
    count = len(heights)
    widths = sorted(draw(st.lists(st.integers(1, largest), min_size=count, max_size=count)))
    return tuple(zip(heights, widths))


def close(ours, truth, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(truth))
    torch.testing.assert_close(ours.detach(), expected, rtol=tolerance, atol=tolerance)


def leaves_equal(tree, other):
    leaves, others = (
        {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(some)[0]}
        for some in (tree, other)
    )
    same_names = leaves.keys() == others.keys()
    return same_names and all(torch.equal(leaves[name], others[name]) for name in leaves)


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


def quantiser(codes, code_dim, phis=4, seed=0):
    """The part of a tokenizer's tree that the quantiser reads."""
    codebook = normal(codes, code_dim, seed=seed + 20)
    phi = []
    for i in range(phis):
        weight = normal(code_dim, code_dim, 3, 3, seed=seed + i, scale=0.3)
        phi.append(dict(weight=weight, bias=normal(code_dim, seed=seed + 9 + i, scale=0.3)))
    return dict(codebook=codebook, phi=phi)


def small_codec(**options):
    sizes = dict(codes=16, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    return tokenizer.init(**sizes | options)


def tree(
    scales=((1, 1), (2, 2), (2, 3)),
    *,
    depth=2,
    masked=1,
    own_input=True,
    heads=2,
    classes=3,
    codes=5,
    code_dim=4,
    random=True,
    seed=0,
):
    """A transformer of width 16 a head, its masked branch of `masked` blocks, none if 0.

    random: float64, leaves far from their initial values, temperatures around their limit.
    """
    sizes = dict(depth=depth, classes=classes, codes=codes, code_dim=code_dim, heads=heads)
    params = hmar.init(**sizes, width=16 * heads, scales=scales, seed=seed)
    if masked:
        params = hmar.add_masked_branch(params, masked, own_input)
    if not random:
        return params

    params = scrambled(params, seed)
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    blocks += params["masked"]["blocks"] if masked else []
    for i, block in enumerate(blocks):
        temperature = 1.5 + 2 * normal(heads, seed=seed + i).abs() + (i % 2) * 2
        block["attention"]["log_temperature"] = temperature
    return params


def arguments(params, batch, seed=0):
    """labels (the null class among them), inputs, own inputs and mask that fit the tree."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths(hmar.scales(params))[1:])
    shape = (batch, count, params["input"]["weight"].shape[1])
    labels = torch.randint(len(params["classes"]), (batch,), generator=generator)
    features = [normal(*shape, seed=seed + i).to(params["classes"].dtype) for i in range(2)]
    return labels, *features, torch.rand(shape[:2], generator=generator) < 0.5


CODEC_SIZES = dict(codes=11, code_dim=4, channels=32, multipliers=(1, 2))
CODEC_SIZES |= dict(residual_blocks=1, attention=False)


def asked_of_fit(
    name, scales=((1, 1), (2, 2), (4, 4)), dtype=torch.bfloat16, device="cpu", **flags
):
    """(tree, loss(tree, **batch), batches) that a stage of the trainer hands to its loop."""
    settings = train.dial(2, 32, 100) | dict(codec=CODEC_SIZES, batch=4, masked_blocks=2)
    settings |= dict(loss_weights="scale", steps=1) | flags
    settings["steps"] = dict.fromkeys(train.STAGES, settings["steps"])
    flags = vars(train.parser().parse_args([])) | dict(scales=scales, size=2 * scales[-1][0])
    with mock.patch.object(train, "dial", lambda *_: settings):
        args = train.resolved(argparse.Namespace(**flags), torch.device(device), {}, 3)
    vars(args).update(dtype=dtype, parts=1, checkpointing=False)

    models = tokenizer.init(**CODEC_SIZES), tree(scales, depth=3, masked=0, codes=11, random=False)
    codec, params = train.to_device(models, args.device)
    cache = random_tokens(3, scales, 11)[:, None].numpy()
    data = train.Images(range(3), train.SHAPES, args.size)
    given = dict(on_tokens=lambda *_: (codec, cache, None), load_stage=lambda *_: params)
    given |= dict(fit=lambda *given, **_: given, DEPTH_DROP=4)
    with mock.patch.multiple(train, **given):
        init = codec if name == "tokenizer" else params
        _, _, asked, loss, batches, *_ = getattr(train, f"train_{name}")(args, data, data, init)
        return asked, loss, [part for (part,) in batches(0)]


BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")  # what their names end in


def published(params):
    """Our tree under the published names, written out by hand: VAR, or HMAR with both branches."""
    is_combined = "masked" in params
    state = {
        "class_emb.weight": params["classes"],
        "pos_start": params["start"][None],
        "lvl_embed.weight": params["levels"],
        "pos_1LC": torch.cat([p.flatten(0, 1) for p in params["positions"]])[None],
        "word_embed.weight": params["input"]["weight"],
        "word_embed_bias" if is_combined else "word_embed.bias": params["input"]["bias"],
    }
    if is_combined:
        state["mask_embed.weight"] = params["masked"]["mask_embedding"][None]

    branches = {"": params["next_scale"]}
    stacks = {"blocks": params["trunk"]}
    if is_combined:
        branches = {"ns_": params["next_scale"], "mask_": params["masked"]}
        stacks = {f"{prefix}blocks": branch["blocks"] for prefix, branch in branches.items()}
        stacks["base_blocks"] = params["trunk"]
    affine = {}
    for prefix, branch in branches.items():
        affine[f"{prefix}head_nm.ada_lin.1"] = branch["modulation"]
        affine[f"{prefix}head"] = branch["head"]
    for stack, blocks in stacks.items():
        for i, block in enumerate(blocks):
            name, attention = f"{stack}.{i}", block["attention"]
            state[f"{name}.attn.scale_mul_1H11"] = attention["log_temperature"].view(1, -1, 1, 1)
            state[f"{name}.attn.q_bias"] = attention["q_bias"]
            state[f"{name}.attn.v_bias"] = attention["v_bias"]
            state[f"{name}.attn.mat_qkv.weight"] = attention["qkv"]
            state[f"{name}.attn.zero_k_bias"] = torch.zeros_like(attention["q_bias"])
            affine[f"{name}.attn.proj"] = attention["project"]
            affine[f"{name}.ffn.fc1"] = block["mlp"]["expand"]
            affine[f"{name}.ffn.fc2"] = block["mlp"]["contract"]
            affine[f"{name}.ada_lin.1"] = block["modulation"]
    for name, layer in affine.items():
        state |= {f"{name}.{part}": leaf for part, leaf in layer.items()}

    levels = torch.tensor(scale_of_tokens(lengths(hmar.scales(params))))
    visible = levels[:, None] == levels if is_combined else levels[:, None] >= levels
    mask = torch.where(visible, 0.0, -torch.inf)
    return state | {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None]}


def slow_bicubic(grid, size):
    """grid (h, w) -> size: Keys's kernel, a = -0.75, cell centres at halves, the edge repeated."""

    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def taps(i, inputs, outputs):
        centre = (i + 0.5) * inputs / outputs - 0.5
        places = range(math.floor(centre) - 1, math.floor(centre) + 3)
        return [(min(max(j, 0), inputs - 1), kernel(centre - j)) for j in places]

    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            for a, row in taps(y, grid.shape[0], size[0]):
                for b, column in taps(x, grid.shape[1], size[1]):
                    out[y, x] += row * column * grid[a, b]
    return out


def refused(message, call, *arguments, **options):
    with pytest.raises(ValueError, match=message):
        call(*arguments, **options)
