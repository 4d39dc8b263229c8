"""The transformer against plain re-derivations; published weights; bad input."""

import copy
import math
import re

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
    normal,
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


def slow_logits(params, condition, inputs, tokens, own_inputs=None, hidden=None):
    """Logits (L, codes) of one image with a condition (C,); own_inputs: of the masked branch."""
    branch = params["next_scale" if own_inputs is None else "masked"]
    scales = hmar.scale_sizes(params)
    later = slow_convolution(inputs, scales[1:], **params["input"])
    if own_inputs is not None:
        own = slow_convolution(own_inputs, scales[1:], branch["own_input"])
        if branch["own_input"].ndim == 2:
            own[hidden] = 0
        own[hidden] += branch["mask_embedding"]
        later = later + own
    x = torch.cat([condition + params["start"], later]) + benchmark.dense_places(params)

    mask = benchmark.dense_mask(lengths(scales), "causal" in params, torch.float64)
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


def predictions(params, labels, inputs, own, mask, tokens):
    """{branch: logits (B, L, codes)} of a tree."""
    trees = dict(next_scale=[inputs])
    if "masked" in params:
        trees["masked"] = [inputs, own, mask]
    predicted = {}
    for name, seen in trees.items():
        near = hmar.neighbour_tokens(params[name], tokens, hmar.scale_sizes(params))
        x = hmar.features(params, labels, *seen)
        predicted[name] = hmar.logits(params[name], x, near)
    return predicted


causal = st.sampled_from([{}, dict(causal={})])


@given(pyramids(3, 3), *shapes, kinds, causal, st.booleans(), seeds)
def test_logits_equal_plain_matrices(scales, depth, masked, heads, kind, more, vectors, seed):
    params = tree(scales, depth=depth, masked=min(masked, depth), heads=heads, **kind, seed=seed)
    params |= more
    labels, inputs, own, mask = arguments(params, 2, seed)
    conditions = params["classes"][labels]
    if vectors:  # any others, which no class has
        labels = conditions = normal(*conditions.shape, seed=seed)
    tokens = random_tokens(2, scales, 5, seed)
    ours = predictions(params, labels, inputs, own, mask, tokens)
    one = seed % 2  # of two images
    given = params, conditions[one], inputs[one], tokens[one]
    close(ours["next_scale"][one], slow_logits(*given), 1e-9)
    if "masked" in ours:
        close(ours["masked"][one], slow_logits(*given, own_inputs=own[one], hidden=mask[one]), 1e-9)


# ---- properties


@given(pyramids(), kinds, causal, st.integers(1, 3), seeds)
def test_one_scale_alone_is_a_part_of_the_whole(scales, kind, more, batch, seed):
    params = tree(scales, **kind, seed=seed) | more
    labels, *given = arguments(params, batch, seed)
    whole = hmar.features(params, labels, given[0])
    cache = [[] for _ in range(hmar.block_count(params))] if more else None
    masked = None if more else hmar.features(params, labels, *given)
    for k in range(len(scales)):
        own = scale_of_tokens(scales) == k
        part = [x[:, own[len(params["start"]) :]] for x in given]
        close(hmar.features(params, labels, part[0], k=k, cache=cache), whole[:, own])
        if masked is not None:
            close(hmar.features(params, labels, *part, k=k), masked[:, own])


@given(pyramids(), causal, kinds, seeds)
def test_losses_are_cross_entropies(scales, more, kind, seed):
    params = tree(scales, **kind, seed=seed) | more
    leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(params)]
    labels, inputs, *masked = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)

    logits = predictions(params, labels, inputs, *masked, tokens)
    every = F.cross_entropy(logits["next_scale"].mT, tokens, reduction="none")
    hidden = F.cross_entropy(logits["masked"].mT, tokens, reduction="none")
    hidden = hidden[:, len(params["start"]) :][masked[-1]]
    ours = hmar.losses(params, labels, tokens, inputs)
    ours_hidden = hmar.losses(params, labels, tokens, inputs, *masked)
    for loss, truth in ((ours, every), (ours_hidden, hidden)):
        close(loss, truth)
        totals = loss.square().sum(), truth.square().sum()
        gradients = (torch.autograd.grad(x, leaves, materialize_grads=True) for x in totals)
        for gradient, expected in zip(*gradients):
            close(gradient, expected, 1e-9)


@given(pyramids(), st.booleans(), causal, seeds)
def test_dropout_zeroes_what_blocks_and_neighbours_add(scales, neighbours, more, seed):
    params = tree(scales, neighbours=neighbours, seed=seed) | more
    labels, inputs, *_ = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)

    def losses(params, dropout):
        torch.manual_seed(seed)
        return hmar.losses(params, labels, tokens, inputs, dropout=dropout)

    branch = {x: leaf for x, leaf in params["next_scale"].items() if x != "neighbours"}
    bare = params | dict(trunk=[], next_scale=branch | dict(blocks=[]))
    close(losses(params, 1.0), losses(bare, 0.0))
    assert torch.equal(losses(params, 0.5), losses(params, 0.5))
    assert not torch.equal(losses(params, 0.5), losses(params, 0.0))


@given(pyramids(3, 3), kinds, seeds)
def test_waves_predict_what_the_whole_head_predicts(scales, kind, seed):
    """Each position comes once, and its neighbours are written before it is predicted."""
    params = tree(scales, **kind, seed=seed)
    labels, inputs, own, mask = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)
    whole = predictions(params, labels, inputs, own, mask, tokens)
    for name, seen in dict(next_scale=[inputs], masked=[inputs, own, mask]).items():
        x = hmar.features(params, labels, *seen)
        for k, size in enumerate(scales):
            is_own = scale_of_tokens(scales) == k
            truth, codes = whole[name][:, is_own], tokens[:, is_own]
            written, found = torch.zeros_like(codes), torch.full_like(truth, math.nan)
            for positions, logits in hmar.wave_logits(params[name], size, x[:, is_own], written):
                assert found[:, positions].isnan().all()
                written[:, positions], found[:, positions] = codes[:, positions], logits
            close(found, truth)


@given(pyramids(), st.integers(0, 99), causal, seeds)
def test_a_token_is_seen_only_by_those_drawn_later(scales, place, more, seed):
    params = tree(scales, neighbours=True, seed=seed) | more
    labels, *given = arguments(params, 1, seed)
    tokens, scale_of = random_tokens(1, scales, 5, seed), scale_of_tokens(scales)
    place = place % len(scale_of)
    row, column = (torch.cat([torch.cartesian_prod(*map(torch.arange, s)) for s in scales])).T
    wave = column + 2 * row
    is_later = (scale_of == scale_of[place]) & (wave > wave[place])

    changed = tokens.clone()
    changed[0, place] = (tokens[0, place] + 1) % 5
    before, after = (predictions(params, labels, *given, x) for x in (tokens, changed))
    for name in before:
        assert torch.equal(before[name][0, ~is_later], after[name][0, ~is_later])


@given(pyramids(9, 6), st.sampled_from(["token", "root", "scale", "lognormal"]))
@example(((2, 2),), "lognormal")
@example(((2, 3), (2, 3), (2, 3)), "lognormal")
def test_loss_weights_are_those_of_plain_loops(scales, kind):
    counts = np.array(lengths(scales))
    sides = np.sqrt(counts / counts[-1])[::-1]
    deviation = np.std(sides, ddof=1) if len(sides) > 1 else 0
    assume(deviation == 0 or deviation > 1e-6)
    standardised = (sides - sides.mean()) / (deviation or 1)
    normal = np.exp(-(standardised**2) / 2)
    mass = dict(token=counts, root=np.sqrt(counts), scale=counts**0, lognormal=normal)[kind]
    expected = torch.from_numpy(np.repeat(mass / mass.sum() / counts, counts))
    weights = hmar.scale_weights(scales, kind)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-5, atol=0)


def test_other_kinds_of_loss_weights_are_refused():
    refused("^kind: got sides, expected token, ", hmar.scale_weights, SCALES, "sides")


def test_cast_moves_layers_of_blocks_and_heads():
    params = tree(convolutions=True, neighbours=True)
    params = pytree.tree_map(lambda leaf: (leaf / 2).float(), params)
    params["trunk"][0]["new"] = torch.zeros(2)  # what nobody has listed stays as it is
    half = hmar.cast(params, torch.bfloat16)
    moved = re.compile(r"(blocks|trunk|head|expand|contract)(?!.*(temperature|new))")
    for name, leaf in named_leaves(half).items():
        assert leaf.dtype == (torch.bfloat16 if moved.search(name) else torch.float32), name

    def both(params):
        params["trunk"][0].pop("new", None)
        tokens = random_tokens(2, hmar.scale_sizes(params), 5)
        return predictions(params | dict(causal={}), *arguments(params, 2), tokens).values()

    # rounding inside costs no more than some times what rounding the weights alone does
    trees = (half, double(params), double(half))
    for ours, truth, rounded in zip(*map(both, trees)):
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


@given(pyramids(), st.integers(1, 3), st.integers(0, 9))
def test_init_and_the_masked_branch_are_pure_functions(scales, blocks, seed):
    sizes = dict(depth=3, classes=2, codes=5, code_dim=4, scales=scales, width=32, heads=2)
    params = seeded(hmar.init, seed, **sizes)
    kept = copy.deepcopy(params)
    combined = seeded(hmar.add_masked_branch, seed, params=params, blocks=blocks)

    masked = combined["masked"]
    assert len(masked["blocks"]) == blocks
    assert torch.equal(masked["own_input"], params["input"]["weight"])
    assert leaves_equal(masked["blocks"], combined["next_scale"]["blocks"])
    pytree.tree_map(lambda leaf: leaf.add_(1), masked)  # the branch is its own
    assert leaves_equal(params, kept)
    labels, inputs, _, _ = arguments(params, 2)
    before = hmar.features(params, labels, inputs)
    assert torch.equal(hmar.features(combined, labels, inputs), before)


def test_a_masked_branch_has_half_of_the_blocks_by_default():
    for depth, blocks in ((1, 1), (2, 1), (3, 2), (4, 2)):
        combined = hmar.add_masked_branch(tree(depth=depth, masked=0, random=False))
        assert len(combined["masked"]["blocks"]) == blocks


def test_causal_trees_have_the_weights_of_others():
    params, causal = (tree(masked=0, random=False, causal=is_causal) for is_causal in (False, True))
    assert causal.pop("causal") == {} and "causal" not in params
    assert leaves_equal(params, causal)


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
    loaded = hmar.from_published(state, scales)
    assert leaves_equal(loaded, wide)
    assert ("causal" in loaded) == (masked == 0 or len(scales) == 1)
    blocks = loaded["trunk"] + loaded["next_scale"]["blocks"]
    blocks += loaded["masked"]["blocks"] if masked else []
    assert all(block["mlp"]["tanh"] == {} for block in blocks)
    without = {name: leaf for name, leaf in state.items() if not name.endswith(hmar.BUFFERS)}
    loaded = hmar.from_published(without, [list(size) for size in scales])
    assert leaves_equal(loaded, wide) and "causal" not in loaded


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
    assert ours.pop("causal") == {}
    torch.testing.assert_close(ours, pytree.tree_map(torch.Tensor.float, params))


@pytest.mark.parametrize("state", PUBLISHED)
def test_weights_that_are_not_a_transformers_are_refused(state):
    for scales in (None, SCALES[:2], ((1, 1), (2, 2), (2, 2))):
        refused("^scales: got .* expected some of 11", hmar.from_published, state, scales)
    for other in (None, {}, {"trainer": {"x": 3}}):
        with pytest.raises((AttributeError, KeyError)):
            hmar.from_published(other)


def test_a_masked_branch_is_added_once_and_has_one_to_all_blocks():
    causal = PLAIN | dict(causal={})
    for params, blocks in ((PLAIN, 0), (PLAIN, 3), (PARAMS, 1), (causal, 1)):
        message = f"^blocks: got {blocks}, expected 1 to 2 of a tree that is not causal and has no"
        refused(message, hmar.add_masked_branch, params, blocks)


def test_published_weights_without_a_block_are_refused():
    """A VAR of 16 heads has 16; in small trees nothing says how many there were."""
    with torch.device("meta"):
        sizes = dict(classes=3, codes=5, code_dim=4, scales=SCALES)
        var = hmar.init(depth=16, **sizes)
        combined = hmar.add_masked_branch(var, 8)
    for params, last in ((var, "blocks.15"), (combined, "base_blocks.7")):
        whole = published(params)
        whole.pop("attn_bias_for_masking")
        assert hmar.block_count(hmar.from_published(whole, SCALES)) == 16
        other = {name: leaf for name, leaf in whole.items() if not name.startswith(f"{last}.")}
        refused("^state_dict: 15 blocks, 16 heads", hmar.from_published, other, SCALES)

    state = published(tree(depth=4, masked=2, own_input=False, random=False))
    for last in ("ns_blocks.1", "mask_blocks.1", "mask_blocks.0"):
        other = {name: leaf for name, leaf in state.items() if not name.startswith(f"{last}.")}
        with pytest.raises((KeyError, ValueError)):
            hmar.from_published(other, SCALES)


def test_published_masked_branches_leak_and_those_we_add_do_not():
    loaded = hmar.from_published(PUBLISHED[1], SCALES)
    assert loaded["masked"]["leak"] == {} and "leak" not in PARAMS["masked"]


def test_own_inputs_and_mask_come_together():
    """Alone the first would be ignored."""
    labels, inputs, own, mask = arguments(PARAMS, 2)
    for pair in ((own, None), (None, mask)):
        refused("^own_inputs and mask: got one", hmar.features, PARAMS, labels, inputs, *pair)
        tokens = random_tokens(2, SCALES, 5)
        refused("^own_inputs and mask", hmar.losses, PARAMS, labels, tokens, inputs, *pair)


def test_arguments_that_would_broadcast_are_refused():
    labels, inputs, own, mask = arguments(PARAMS, 2)
    for other in (own[:1], own[:, :1]):
        refused("^inputs: got", hmar.features, PARAMS, labels, inputs, other, mask)
    with pytest.raises(RuntimeError):
        hmar.features(PARAMS, labels, inputs, own[..., :1], mask)
    for other in (mask[:1], mask[:, :1]):
        refused("^inputs: got", hmar.features, PARAMS, labels, inputs, own, other)
    for other in (labels - 4, labels + 4):
        with pytest.raises((IndexError, RuntimeError), match="index"):  # torch's
            hmar.features(PARAMS, other, inputs, own, mask)
    causal, cache = PARAMS | dict(causal={}), [[], []]
    hmar.features(causal, labels, inputs, k=0, cache=cache)
    for params, options in ((causal, dict(cache=cache)), (PARAMS, {})):
        one = labels[:1], inputs[:, :4]
        refused("^inputs: got .* for 1 labels", hmar.features, params, *one, k=1, **options)


def test_a_cache_is_for_single_scales_of_causal_trees():
    """Without it a scale would not see the coarser ones; other trees would see too much."""
    causal, cache = PARAMS | dict(causal={}), [[], []]
    labels, inputs, _, _ = arguments(PARAMS, 2)
    refused("^cache: ", hmar.features, causal, labels, inputs[:, :4], k=1)
    refused("^cache: ", hmar.features, causal, labels, inputs, cache=cache)
    refused("^cache: ", hmar.features, PARAMS, labels, inputs[:, :4], k=1, cache=cache)


def test_inputs_of_other_tokenizers_are_refused():
    """Twice as many channels would fit convolutions of two groups."""
    params = tree(convolutions=True, neighbours=True)
    labels, inputs, _, _ = arguments(params, 2)
    with pytest.raises(RuntimeError):
        hmar.features(params, labels, inputs.repeat(1, 1, 2))
