"""What several test files use: random trees and arguments, comparisons, plain re-derivations."""

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import hmar


@st.composite
def pyramids(draw, largest=4, most=4):
    """Scales, coarse to fine."""
    heights = sorted(draw(st.lists(st.integers(1, largest), min_size=1, max_size=most)))
    count = len(heights)
    widths = sorted(draw(st.lists(st.integers(1, largest), min_size=count, max_size=count)))
    return tuple(zip(heights, widths))


def close(ours, truth, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(truth))
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def leaves_equal(tree, other):
    if pytree.tree_structure(tree) != pytree.tree_structure(other):
        return False
    return all(map(torch.equal, pytree.tree_leaves(tree), pytree.tree_leaves(other)))


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
    total = sum(h * w for h, w in scales)
    return torch.randint(codes, (batch, total), generator=torch.Generator().manual_seed(seed))


def quantiser(codes, code_dim, phis=4, seed=0):
    """The part of a tokenizer's tree that the quantiser reads."""
    codebook = normal(codes, code_dim, seed=seed + 20)
    phi = []
    for i in range(phis):
        weight = normal(code_dim, code_dim, 3, 3, seed=seed + i, scale=0.3)
        phi.append(dict(weight=weight, bias=normal(code_dim, seed=seed + 9 + i, scale=0.3)))
    return dict(codebook=codebook, phi=phi)


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
    counts = [h * w for h, w in hmar.scales(params)]
    shape = (batch, sum(counts[1:]), params["input"]["weight"].shape[1])
    labels = torch.randint(len(params["classes"]), (batch,), generator=generator)
    features = [normal(*shape, seed=seed + i).to(params["classes"].dtype) for i in range(2)]
    return labels, *features, torch.rand(shape[:2], generator=generator) < 0.5


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
