"""The transformer against plain re-derivations; published weights; bad input."""

import copy
import math
import re
from functools import partial

import benchmark  # its transformer is VAR's, densely
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    arguments,
    close,
    double,
    dtypes,
    leaves_equal,
    lengths,
    named_leaves,
    published,
    pyramids,
    random_tokens,
    refused,
    scale_of_tokens,
    seeded,
    tree,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import hmar

seeds = st.integers(0, 999)
SCALES = ((1, 1), (2, 2), (2, 3))
# as published, ours, those we train
kinds = st.sampled_from([dict(own_input=False), {}, dict(convolutions=True, neighbours=True)])


# ---- densely, one image at a time; x (L, C) has a row a token


def slow_convolution(x, scales, weight, bias=None):
    """x (n, C'): of the nine around each in its scale."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = [x.new_zeros(0, len(weight))]
    for own, size in zip(x.split(lengths(scales)), scales):
        maps = own.T.unflatten(1, size)
        maps = F.conv2d(maps, weight, bias, padding=1, groups=len(maps) // weight.shape[1])
        rows.append(maps.flatten(1).T)
    return torch.cat(rows)


def slow_look(x, scales, tokens, embedding, expand, contract):
    """x (L, C) after each has looked at those of tokens (L,) near it, by place."""
    rows = []
    for own, codes, (h, w) in zip(x.split(lengths(scales)), tokens.split(lengths(scales)), scales):
        for place, (y, z) in enumerate(np.ndindex(h, w)):
            seen = F.layer_norm(own[place], own.shape[1:], eps=1e-6)
            near = (0, -1), (1, -1), (1, 0), (1, 1), (0, -2), (2, 0)
            for table, (up, side) in zip(embedding, near, strict=True):
                is_inside = y >= up and 0 <= z + side < w
                seen = seen + table[codes[place - up * w + side] if is_inside else -1]
            hidden = F.gelu(F.linear(seen, **expand))
            rows.append(own[place] + F.linear(hidden, **contract))
    return torch.stack(rows)


def slow_logits(params, label, inputs, tokens, is_causal=False, own_inputs=None, hidden=None):
    """Logits (L, codes) of one image; with own_inputs those of the masked branch."""
    branch = params["next_scale" if own_inputs is None else "masked"]
    scales = hmar.scale_sizes(params)
    later = slow_convolution(inputs, scales[1:], **params["input"])
    if own_inputs is not None:
        weight = branch.get("own_input", params["input"]["weight"])
        own = slow_convolution(own_inputs, scales[1:], weight)
        if weight.ndim == 2:
            own[hidden] = 0
        own[hidden] += branch["mask_embedding"]
        later = later + own
    condition = params["classes"][label]
    x = torch.cat([condition + params["start"], later]) + benchmark.dense_places(params)

    mask = benchmark.dense_mask(lengths(scales), is_causal, torch.float64)
    for block in params["trunk"] + branch["blocks"]:
        if "depthwise" in block:
            x = x + slow_convolution(x, scales, **block["depthwise"])
        rest = {name: part for name, part in block.items() if name != "depthwise"}
        x = benchmark.dense_block(x[None], condition[None], mask, None, **rest)[0]
    scale, shift = F.linear(F.silu(condition), **branch["modulation"]).chunk(2)
    x = benchmark.dense_norm(x, scale, shift)
    if "neighbours" in branch:
        x = slow_look(x, scales, tokens, **branch["neighbours"])
    return F.linear(x, **branch["head"])


shapes = st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)


@given(pyramids(3, 3), *shapes, kinds, st.booleans(), seeds)
def test_logits_equal_plain_matrices(scales, depth, masked, heads, kind, is_causal, seed):
    params = tree(scales, depth=depth, masked=min(masked, depth), heads=heads, **kind, seed=seed)
    labels, inputs, own, mask = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)
    ours = hmar.next_scale_logits(params, labels, inputs, is_causal, tokens)
    one = seed % 2  # of two images
    given = params, labels[one], inputs[one], tokens[one]
    close(ours[one], slow_logits(*given, is_causal), 1e-9)
    if masked:
        ours = hmar.masked_logits(params, labels, inputs, own, mask, tokens)
        close(ours[one], slow_logits(*given, own_inputs=own[one], hidden=mask[one]), 1e-9)


# ---- properties


@given(pyramids(), kinds, st.integers(1, 3), seeds)
def test_one_scale_alone_is_a_part_of_the_whole(scales, kind, batch, seed):
    params = tree(scales, **kind, seed=seed)
    labels, *given = arguments(params, batch, seed)
    tokens = random_tokens(batch, scales, 5, seed)

    def logits(branch, *given, k=None, **options):
        features = hmar.branch_features(params, branch, labels, *given, k=k, **options)
        own = tokens if k is None else tokens[:, scale_of_tokens(scales) == k]
        return hmar.branch_logits(params, branch, features, hmar.neighbour_tokens(params, own, k))

    whole, masked = logits("next_scale", given[0]), logits("masked", *given)
    causal = logits("next_scale", given[0], is_causal=True)
    cache = [[] for _ in range(hmar.block_count(params))]
    for k in range(len(scales)):
        own = scale_of_tokens(scales) == k
        part = [x[:, own[len(params["start"]) :]] for x in given]
        close(logits("next_scale", part[0], k=k), whole[:, own])
        close(logits("next_scale", part[0], k=k, cache=cache), causal[:, own])
        close(logits("masked", *part, k=k), masked[:, own])


@given(pyramids(), st.booleans(), kinds, seeds)
def test_losses_are_cross_entropies(scales, is_causal, kind, seed):
    params = tree(scales, **kind, seed=seed)
    leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(params)]
    labels, inputs, *masked = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)

    logits = hmar.next_scale_logits(params, labels, inputs, is_causal, tokens)
    every = F.cross_entropy(logits.mT, tokens, reduction="none")
    logits = hmar.masked_logits(params, labels, inputs, *masked, tokens)
    hidden = F.cross_entropy(logits.mT, tokens, reduction="none")
    hidden = hidden[:, len(params["start"]) :][masked[-1]]
    ours = hmar.next_scale_losses(params, labels, tokens, inputs, is_causal)
    ours_hidden = hmar.masked_losses(params, labels, tokens, inputs, *masked)
    for loss, truth in ((ours, every), (ours_hidden, hidden)):
        close(loss, truth)
        totals = loss.square().sum(), truth.square().sum()
        gradients = (torch.autograd.grad(x, leaves, materialize_grads=True) for x in totals)
        for gradient, expected in zip(*gradients):
            close(gradient, expected, 1e-9)


@given(pyramids(), st.integers(0, 99), seeds)
def test_a_token_is_seen_only_by_those_drawn_later(scales, place, seed):
    params = tree(scales, neighbours=True, seed=seed)
    labels, inputs, own, mask = arguments(params, 1, seed)
    tokens, scale_of = random_tokens(1, scales, 5, seed), scale_of_tokens(scales)
    place, wave = place % len(scale_of), torch.zeros_like(scale_of)
    for k in range(len(scales)):
        places = (scale_of == k).nonzero()[:, 0]
        for number, positions in enumerate(hmar.waves(params, k)):
            wave[places[positions]] = number
    is_later = (scale_of == scale_of[place]) & (wave > wave[place])

    changed = tokens.clone()
    changed[0, place] = (tokens[0, place] + 1) % 5
    for predict, call in (
        (hmar.next_scale_logits, [inputs]),
        (partial(hmar.next_scale_logits, is_causal=True), [inputs]),
        (hmar.masked_logits, [inputs, own, mask]),
    ):
        before, after = (predict(params, labels, *call, tokens=x) for x in (tokens, changed))
        assert torch.equal(before[0, ~is_later], after[0, ~is_later])
        refused("^tokens: got None", predict, params, labels, *call)


@given(pyramids(9, 6), st.sampled_from(["token", "scale", "lognormal"]))
@example(((2, 2),), "lognormal")
@example(((2, 3), (2, 3), (2, 3)), "lognormal")
def test_loss_weights_are_those_of_plain_loops(scales, kind):
    counts = np.array(lengths(scales))
    sides = np.sqrt(counts / counts[-1])[::-1]
    deviation = np.std(sides, ddof=1) if len(sides) > 1 else 0
    assume(deviation == 0 or deviation > 1e-6)
    standardised = (sides - sides.mean()) / (deviation or 1)
    normal = np.exp(-(standardised**2) / 2)
    mass = dict(token=counts, scale=np.ones(len(counts)), lognormal=normal)[kind]
    expected = torch.from_numpy(np.repeat(mass / mass.sum() / counts, counts))
    weights = hmar.scale_weights(scales, kind)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-5, atol=0)


def test_cast_moves_blocks_and_heads():
    params = pytree.tree_map(lambda leaf: (leaf / 2).float(), tree())
    half = hmar.cast(params, torch.bfloat16)
    moved = re.compile("(blocks|trunk|head)(?!.*temperature)")
    for name, leaf in named_leaves(half).items():
        assert leaf.dtype == (torch.bfloat16 if moved.search(name) else torch.float32), name

    def predictions(params):
        labels, inputs, *masked = arguments(params, 2)
        yield hmar.next_scale_logits(params, labels, inputs, is_causal=True)
        yield hmar.masked_logits(params, labels, inputs, *masked)

    # rounding inside costs no more than some times what rounding the weights alone does
    trees = (half, double(params), double(half))
    for ours, truth, rounded in zip(*map(predictions, trees)):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 5 * (rounded - truth).norm()


# ---- initialisation and surgery


@pytest.mark.parametrize("depth, gamma", [(2, 1e-3), (24, 1e-4), (30, 1e-5)])
def test_weights_start_as_published(depth, gamma):
    sizes = dict(width=32, heads=2, classes=200, codes=300, code_dim=40)
    params = hmar.init(depth=depth, scales=((4, 4), (6, 6)), **sizes)
    narrow = (2 * depth) ** -0.5
    gains = dict(project=narrow, contract=narrow, head=0.02, modulation=0.5)
    for name, leaf in named_leaves(params).items():
        if "bias" in name or "temperature" in name:
            assert (leaf == (math.log(4) if "temperature" in name else 0)).all(), name
            continue
        std = math.sqrt(1 / (3 * 32)) * next((gains[part] for part in gains if part in name), 1)
        if "trunk" in name and "modulation" in name:  # of the gates less
            leaf = torch.cat([leaf[: 2 * 32] / gamma * 0.5, leaf[2 * 32 :]])
        # of a sample of n, five standard errors
        assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.numel()), name
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.numel()), name


@given(pyramids(), st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_init_and_the_masked_branch_are_pure_functions(scales, blocks, own_input, seed):
    sizes = dict(depth=3, classes=2, codes=5, code_dim=4, scales=scales, width=32, heads=2)
    params = seeded(hmar.init, seed, **sizes)
    kept = copy.deepcopy(params)
    options = dict(params=params, blocks=blocks, own_input=own_input)
    combined = seeded(hmar.add_masked_branch, seed, **options)

    masked = combined["masked"]
    assert len(masked["blocks"]) == blocks and ("own_input" in masked) == own_input
    assert leaves_equal(masked["blocks"], combined["next_scale"]["blocks"])
    pytree.tree_map(lambda leaf: leaf.add_(1), masked)  # the branch is its own
    assert leaves_equal(params, kept)
    labels, inputs, _, _ = arguments(params, 2)
    before = hmar.next_scale_logits(params, labels, inputs)
    assert torch.equal(hmar.next_scale_logits(combined, labels, inputs), before)


@given(pyramids(3, 3), pyramids(4, 4), seeds)
@example(SCALES, SCALES, 0)
@example(((1, 1), (4, 4)), ((2, 2), (3, 3)), 0)  # nearest by sides, not by areas
def test_positions_are_resampled_from_the_nearest_scale(old, new, seed):
    params = tree(old, seed=seed)
    ours = hmar.resize_positions(params, new)
    assert hmar.scale_sizes(ours) == new and ours["trunk"] is params["trunk"]

    def side(size, last):
        return math.sqrt(math.prod(size) / math.prod(last))

    for size, level, position in zip(new, ours["levels"], ours["positions"], strict=True):
        distance = [abs(side(source, old[-1]) - side(size, new[-1])) for source in old]
        k = (params["levels"] == level).all(1).nonzero().item()
        assert distance[k] < min(distance) + 1e-4
        planes = params["positions"][k].movedim(2, 0)[None]
        resampled = F.interpolate(planes, size, mode="bicubic")[0]
        close(position, resampled.movedim(0, 2))


def test_of_two_scales_of_one_size_the_order_decides():
    params = tree(((1, 1), (2, 2), (4, 4), (4, 4)))
    for new, sources in {((2, 2), (4, 4), (8, 8)): [0, 1, 3], ((8, 8),) * 2: [2, 3]}.items():
        ours = hmar.resize_positions(params, new)
        assert torch.equal(ours["levels"], params["levels"][sources])


# ---- published weights, and what does not fit

PLAIN = tree(masked=0, random=False)
PARAMS = tree(random=False)
PUBLISHED = published(PLAIN), published(tree(depth=3, own_input=False, random=False))


@given(pyramids(), st.integers(1, 3), st.integers(0, 3), dtypes)
def test_published_weights_of_any_dtype_load(scales, depth, masked, dtype):
    params = tree(scales, depth=depth, masked=min(masked, depth), own_input=False)
    params = pytree.tree_map(lambda leaf: leaf.to(dtype), params)
    state, wide = published(params), pytree.tree_map(torch.Tensor.float, params)
    assert leaves_equal(hmar.from_published(state, scales), wide)
    assert hmar.published_is_causal(state) == (masked == 0 or len(scales) == 1)
    without = {name: leaf for name, leaf in state.items() if not name.endswith(hmar.BUFFERS)}
    assert leaves_equal(hmar.from_published(without, [list(size) for size in scales]), wide)
    assert hmar.published_is_causal(without) is False


def test_published_blocks_that_share_their_modulation_load():
    """VAR-d36's: one layer for all, and a bias of each block's own."""
    params = tree(masked=0, depth=3, own_input=False)
    shared = params["trunk"][0]["modulation"]
    for block in params["trunk"]:
        block["modulation"]["weight"] = shared["weight"]
    state = published(params) | {f"shared_ada_lin.1.{name}": shared[name] for name in shared}
    for name in list(state):
        if name.startswith("blocks") and "ada_lin" in name:
            own = state.pop(name)
            if name.endswith("bias"):
                gates = (own - shared["bias"]).view(1, 1, 6, -1)
                state[name.replace("ada_lin.1.bias", "ada_gss")] = gates
    ours = hmar.from_published(state, hmar.scale_sizes(params))
    torch.testing.assert_close(ours, pytree.tree_map(torch.Tensor.float, params))


@pytest.mark.parametrize("state", PUBLISHED)
def test_weights_that_are_not_a_transformers_are_refused(state):
    gaps = "^class", "^pos_start", "^(lvl_emb|word_emb)", r"blocks\.0\.", r"head\.", "ada_lin"
    for gap in gaps:
        other = {name: leaf for name, leaf in state.items() if not re.search(gap, name)}
        refused("^state_dict: not a transformer's", hmar.from_published, other, SCALES)
    for scales in (None, SCALES[:2], ((1, 1), (2, 2), (2, 2))):
        refused("^scales: got .* expected some of 11", hmar.from_published, state, scales)
    for other in (None, {}, {"trainer": {"x": 3}}):
        refused("^state_dict: not a transformer's", hmar.from_published, other)


def test_a_masked_branch_is_added_once_and_has_one_to_all_blocks():
    for params, blocks in ((PLAIN, 0), (PLAIN, 3), (PARAMS, 1)):
        message = f"^blocks: got {blocks}, expected 1 to 2, and only once"
        refused(message, hmar.add_masked_branch, params, blocks)


def test_arguments_that_would_broadcast_are_refused():
    labels, inputs, own, mask = arguments(PARAMS, 2)
    for other in (own[:1], own[:, :1], own[..., :1]):
        refused("own_inputs", hmar.masked_logits, PARAMS, labels, inputs, other, mask)
    for other in (mask[:1], mask[:, :1]):
        refused("mask", hmar.masked_logits, PARAMS, labels, inputs, own, other)
    for other in (labels - 4, labels + 4):
        with pytest.raises((IndexError, RuntimeError), match="index"):  # torch's
            hmar.masked_logits(PARAMS, other, inputs, own, mask)
    looks = tree(neighbours=True)
    refused("^tokens: got None", hmar.next_scale_logits, looks, *arguments(looks, 2)[:2])


def test_inputs_of_other_tokenizers_are_refused():
    """Twice as many channels would fit convolutions of two groups."""
    params = tree(convolutions=True, neighbours=True)
    labels, inputs, _, _ = arguments(params, 2)
    with pytest.raises(RuntimeError):
        hmar.next_scale_logits(
            params, labels, inputs.repeat(1, 1, 2), False, random_tokens(2, SCALES, 5)
        )
