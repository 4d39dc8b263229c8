"""The transformer against slow, plain re-derivations (one token and one head at a time), its properties, published weights, bad input."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import (
    close,
    double,
    leaves_equal,
    normal,
    pyramids,
    quantiser,
    random_tokens,
    scrambled,
    slow_bicubic,
)
from torch.utils import _pytree as pytree

import hmar
import tokenizer

quick = settings(max_examples=20, deadline=None)
SCALES = ((1, 1), (2, 2), (2, 3))


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # two on a busy machine wait for each other more than they work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tree(
    scales=SCALES,
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
    """A tree of width 16 a head; random: float64, every leaf far from its initial value, temperatures on both sides of their limit."""
    sizes = dict(
        depth=depth, classes=classes, codes=codes, code_dim=code_dim, width=16 * heads, heads=heads
    )
    params = hmar.init(**sizes, scales=scales, seed=seed)
    params = hmar.add_masked_branch(params, masked, own_input) if masked else params
    if not random:
        return params
    params = scrambled(params, seed)
    blocks = (
        params["trunk"]
        + params["next_scale"]["blocks"]
        + params.get("masked", {"blocks": []})["blocks"]
    )
    for i, block in enumerate(blocks):
        block["attention"]["scale"] = 1.5 + 2 * normal(heads, seed=seed + i).abs() + (i % 2) * 2
    return params


def arguments(params, batch, seed=0):
    """labels (the null class among them), inputs, own inputs and mask that fit the tree."""
    total, (first, *_) = (
        sum(h * w for h, w in hmar.scales(params)),
        (h * w for h, w in hmar.scales(params)),
    )
    code_dim, generator = params["input"]["weight"].shape[1], torch.Generator().manual_seed(seed)
    labels = torch.randint(len(params["classes"]), (batch,), generator=generator)
    features = [
        normal(batch, total - first, code_dim, seed=seed + i).to(params["classes"].dtype)
        for i in range(2)
    ]
    return labels, *features, torch.rand(batch, total - first, generator=generator) < 0.5


def slow_linear(x, weight, bias):
    return torch.stack([sum(w * value for w, value in zip(row, x)) for row in weight]) + bias


def slow_norm(x, scale, shift):
    deviation = x - sum(x) / len(x)
    return deviation / math.sqrt(sum(deviation**2) / len(x) + 1e-6) * (1 + scale) + shift


def silu(x):
    return x / (1 + torch.exp(-x))


def slow_attention(xs, visible, qkv, q_bias, v_bias, scale, project):
    """xs: a vector a token; visible[i]: the tokens that token i sees."""
    width, out = len(q_bias), [[] for _ in xs]
    for head in range(len(scale)):
        rows = torch.arange(width)[head * width // len(scale) : (head + 1) * width // len(scale)]
        q, k, v = (
            [qkv[part * width + rows] @ x + bias for x in xs]
            for part, bias in enumerate((q_bias[rows], 0, v_bias[rows]))
        )
        q, k = (
            [vector / max(math.sqrt(sum(vector**2)), 1e-12) for vector in vectors]
            for vectors in (q, k)
        )
        for i, seen in enumerate(visible):
            weights = [
                torch.exp(math.exp(min(scale[head], math.log(100))) * (q[i] @ k[j])) for j in seen
            ]
            out[i].append(sum(weight * v[j] for weight, j in zip(weights, seen)) / sum(weights))
    return [project["weight"] @ torch.cat(parts) + project["bias"] for parts in out]


def slow_feed_forward(x, expand, contract):
    h = expand["weight"] @ x + expand["bias"]
    h = torch.stack(
        [
            0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
            for value in h
        ]
    )
    return contract["weight"] @ h + contract["bias"]


def slow_block(xs, condition, visible, block):
    six = block["modulation"]["weight"] @ silu(condition) + block["modulation"]["bias"]
    width = len(condition)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (
        six[i * width : (i + 1) * width] for i in range(6)
    )
    attended = slow_attention(
        [slow_norm(x, scale1, shift1) for x in xs], visible, **block["attention"]
    )
    xs = [x + gamma1 * update for x, update in zip(xs, attended)]
    return [
        x + gamma2 * slow_feed_forward(slow_norm(x, scale2, shift2), **block["mlp"]) for x in xs
    ]


def slow_logits(params, label, inputs, is_causal=False, own_inputs=None, hidden=None):
    """Logits (L, codes) of one image; with own_inputs those of the masked branch."""
    branch, condition = (
        params["next_scale" if own_inputs is None else "masked"],
        params["classes"][label],
    )
    places = [
        (k, y, x)
        for k, (h, w) in enumerate(hmar.scales(params))
        for y in range(h)
        for x in range(w)
    ]
    first, shared, xs = len(params["start"]), params["input"]["weight"], []
    for i, (k, y, x) in enumerate(places):
        if k == 0:
            token = condition + params["start"][i]
        else:
            token = slow_linear(inputs[i - first], shared, params["input"]["bias"])
            if own_inputs is not None and hidden[i - first]:
                token = token + branch["mask_embedding"]
            elif own_inputs is not None:
                token = token + slow_linear(
                    own_inputs[i - first], branch.get("own_input", shared), 0
                )
        xs.append(token + params["levels"][k] + params["positions"][k][y, x])
    visible = [
        [j for j, (other, *_) in enumerate(places) if other == k or is_causal and other < k]
        for k, *_ in places
    ]
    for block in params["trunk"] + branch["blocks"]:
        xs = slow_block(xs, condition, visible, block)
    two = slow_linear(silu(condition), **branch["modulation"])
    xs = [slow_norm(x, two[: len(condition)], two[len(condition) :]) for x in xs]
    return torch.stack([slow_linear(x, **branch["head"]) for x in xs])


@quick
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 999),
)
def test_a_block_is_that_of_plain_loops(lengths, heads, is_causal, seed):
    block, width = tree(heads=heads, seed=seed)["trunk"][0], 16 * heads
    x, condition = normal(2, sum(lengths), width, seed=seed), normal(2, width, seed=seed + 1)
    scale_of = [k for k, length in enumerate(lengths) for _ in range(length)]
    visible = [
        [j for j, other in enumerate(scale_of) if other == own or is_causal and other < own]
        for own in scale_of
    ]
    ours = hmar.block(x, condition, lengths, is_causal, None, None, **block)
    for i in range(2):
        close(ours[i], torch.stack(slow_block(list(x[i]), condition[i], visible, block)), 1e-9)


@quick
@given(
    pyramids(3, 3),
    st.integers(1, 3),
    st.data(),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_logits_are_those_of_plain_loops(scales, depth, data, heads, own_input, is_causal, seed):
    masked = data.draw(st.integers(0, depth))
    params = tree(scales, depth=depth, masked=masked, own_input=own_input, heads=heads, seed=seed)
    labels, inputs, own, mask = arguments(params, 1, seed)
    close(
        hmar.next_scale_logits(params, labels, inputs, is_causal)[0],
        slow_logits(params, labels[0], inputs[0], is_causal),
        1e-9,
    )
    if masked:
        close(
            hmar.masked_logits(params, labels, inputs, own, mask)[0],
            slow_logits(params, labels[0], inputs[0], own_inputs=own[0], hidden=mask[0]),
            1e-9,
        )


@quick
@given(pyramids(), st.booleans(), st.integers(0, 3), st.integers(0, 999))
def test_one_scale_alone_is_a_part_of_the_whole(scales, own_input, k, seed):
    k %= len(scales)
    params = tree(scales, own_input=own_input, seed=seed)
    labels, inputs, own, mask = arguments(params, 2, seed)
    counts = [h * w for h, w in scales]

    def part(x):
        return x.split(counts[1:], 1)[k - 1] if k else None

    whole = hmar.next_scale_logits(params, labels, inputs).split(counts, 1)[k]
    close(hmar.next_scale_logits(params, labels, part(inputs), only=k), whole)
    if k:
        whole = hmar.masked_logits(params, labels, inputs, own, mask).split(counts, 1)[k]
        close(
            hmar.masked_logits(params, labels, part(inputs), part(own), part(mask), only=k), whole
        )


@quick
@given(pyramids(), st.integers(1, 3), st.integers(0, 999))
def test_cached_scales_are_the_block_causal_whole(scales, batch, seed):
    params = tree(scales, seed=seed)
    labels, inputs, _, _ = arguments(params, batch, seed)
    counts, cache = [h * w for h, w in scales], hmar.new_cache(params, batch)
    parts = [None, *inputs.split(counts[1:], 1)]
    alone = [
        hmar.next_scale_logits(params, labels, part, only=k, cache=cache)
        for k, part in enumerate(parts[: len(scales)])
    ]
    whole = hmar.next_scale_logits(params, labels, inputs, is_causal=True)
    close(torch.cat(alone, 1), whole)


@quick
@given(pyramids(), st.integers(0, 3), st.booleans(), st.integers(0, 999))
def test_a_scale_does_not_depend_on_the_inputs_of_others(scales, changed, masked, seed):
    """Bit for bit; block-causal, only on coarser ones."""
    params, counts, changed = (
        tree(scales, seed=seed),
        [h * w for h, w in scales],
        changed % len(scales),
    )
    labels, inputs, own, mask = arguments(params, 2, seed)
    later = torch.arange(len(scales)).repeat_interleave(torch.tensor(counts))[
        counts[0] :
    ]  # the scale of each input
    others = [torch.where((later == changed)[:, None], x + 1, x) for x in (inputs, own)]

    def moved(predict, a, b):
        a, b = (predict(*x).split(counts, 1) for x in (a, b))
        return [not torch.equal(x, y) for x, y in zip(a, b)]

    same_scale = [k == changed and k > 0 for k in range(len(scales))]
    assert (
        moved(lambda x: hmar.next_scale_logits(params, labels, x), inputs[None], others[0][None])
        == same_scale
    )
    assert (
        moved(
            lambda *x: hmar.masked_logits(params, labels, *x),
            (inputs, own, mask),
            (*others, mask ^ (later == changed)),
        )
        == same_scale
    )
    causal = moved(
        lambda x: hmar.next_scale_logits(params, labels, x, is_causal=True),
        inputs[None],
        others[0][None],
    )
    assert causal == [0 < changed <= k for k in range(len(scales))]


@quick
@given(pyramids(), st.integers(0, 999))
def test_masked_logits_do_not_see_the_tokens_under_the_mask(scales, seed):
    params, quantise, tokens = (
        tree(scales, seed=seed),
        quantiser(5, 4, seed=seed),
        random_tokens(2, scales, 5, seed),
    )
    labels, inputs, _, mask = arguments(params, 2, seed)
    hidden = torch.cat(
        [torch.ones(2, tokens.shape[1] - mask.shape[1], dtype=torch.bool), mask], 1
    )  # scale 0's tokens are not seen either

    def predict(tokens):
        return hmar.masked_logits(
            params, labels, inputs, tokenizer.masked_inputs(quantise, tokens, scales, mask), mask
        )

    assert torch.equal(predict(tokens), predict((tokens + hidden) % 5))
    assert torch.equal(predict(tokens), predict((tokens + ~hidden) % 5)) == bool(
        mask.all()
    )  # but the others are


def test_labels_choose_their_row_and_the_null_class_is_the_last():
    params = tree()
    labels, (_, inputs, own, mask) = torch.tensor([0, 1, 2, 3]), arguments(params, 4)
    for predict in (
        lambda p: hmar.next_scale_logits(p, labels, inputs),
        lambda p: hmar.masked_logits(p, labels, inputs, own, mask),
    ):
        for row in range(4):
            classes = params["classes"].clone()
            classes[row] += 1
            before, after = predict(params), predict(params | dict(classes=classes))
            assert [not torch.equal(a, b) for a, b in zip(before, after)] == [
                label == row for label in range(4)
            ]


@quick
@given(
    pyramids(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 40), st.integers(0, 999)
)
def test_losses_are_cross_entropies_of_the_logits(
    scales, is_causal, checkpointing, own_input, slice_rows, seed
):
    """However the logits are sliced, and whether blocks are computed twice or not: values and gradients."""
    params = tree(scales, own_input=own_input, seed=seed)
    pytree.tree_map(lambda tensor: tensor.requires_grad_(), params)
    labels, inputs, own, mask = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)
    expected = (
        -hmar.next_scale_logits(params, labels, inputs, is_causal)
        .log_softmax(-1)
        .gather(-1, tokens[..., None])[..., 0]
    )
    hidden = (
        -hmar.masked_logits(params, labels, inputs, own, mask)
        .log_softmax(-1)
        .gather(-1, tokens[..., None])[..., 0]
    )
    hidden = hidden[:, tokens.shape[1] - mask.shape[1] :][mask]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hmar, "LOSS_SLICE", slice_rows * 5)
        ours = hmar.next_scale_losses(
            params, labels, tokens, inputs, is_causal, checkpointing=checkpointing
        )
        ours_hidden = hmar.masked_losses(
            params, labels, tokens, inputs, own, mask, checkpointing=checkpointing
        )
        assert ours.shape == tokens.shape and ours_hidden.shape == (int(mask.sum()),)
        close(ours.detach(), expected.detach())
        close(ours_hidden.detach(), hidden.detach())
        leaves = pytree.tree_leaves(params)
        grads = [
            torch.autograd.grad(
                loss.square().sum(), leaves, allow_unused=True, materialize_grads=True
            )
            for loss in (
                torch.cat([ours.flatten(), ours_hidden]),
                torch.cat([expected.flatten(), hidden]),
            )
        ]
    for a, b in zip(*grads):
        close(a, b, 1e-9)


@pytest.mark.parametrize("codes", [64, 4096])
def test_the_initial_loss_is_that_of_a_guess(codes):
    scales = ((1, 1), (2, 2), (3, 3))
    params = tree(scales, depth=3, heads=4, codes=codes, code_dim=8, classes=10, random=False)
    labels, inputs, own, mask = arguments(params, 8)
    tokens = random_tokens(8, scales, codes)
    for losses in (
        hmar.next_scale_losses(params, labels, tokens, inputs),
        hmar.next_scale_losses(params, labels, tokens, inputs, True),
        hmar.masked_losses(params, labels, tokens, inputs, own, mask),
    ):
        assert abs(losses.mean() / math.log(codes) - 1) < 0.01


@quick
@given(pyramids(9, 6), st.sampled_from(["token", "scale", "lognormal"]))
def test_loss_weights_are_those_of_plain_loops(scales, kind):
    weights, counts = hmar.scale_weights(scales, kind), [h * w for h, w in scales]
    assert weights.shape == (sum(counts),) and weights.dtype == torch.float32
    sides = [math.sqrt(count / counts[-1]) for count in counts]
    mean = sum(sides) / len(sides)
    deviation = math.sqrt(sum((side - mean) ** 2 for side in sides) / max(1, len(sides) - 1))
    if kind == "lognormal" and deviation < 1e-6:
        return  # scales of one size have no relative sides
    mass = {
        "token": counts,
        "scale": [1] * len(counts),
        "lognormal": [
            math.exp(-(((side - mean) / (deviation or 1)) ** 2) / 2) for side in reversed(sides)
        ],
    }[kind]
    expected = [mass[k] / sum(mass) / count for k, count in enumerate(counts) for _ in range(count)]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)
    assert abs(weights.double().sum() - 1) < 1e-6


def test_published_masses_of_the_scales():
    masses = [
        float(part.sum())
        for part in hmar.scale_weights(hmar.SCALES[256], "lognormal").split(
            [h * w for h, w in hmar.SCALES[256]]
        )
    ]
    assert masses == pytest.approx(
        [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709], abs=5.1e-5
    )


@pytest.mark.parametrize("kind", ["lognormal", "token", "scale"])
@pytest.mark.parametrize("scales", [((2, 2),), ((2, 3), (2, 3), (2, 3))])
def test_loss_weights_of_scales_of_one_size(scales, kind):
    weights = hmar.scale_weights(scales, kind)
    assert torch.allclose(weights, torch.full_like(weights, 1 / len(weights)))


@pytest.mark.parametrize(
    "depth, plain, with_branch",
    [
        (16, 310_283_520, 467_691_904),
        (20, 600_917_136, 845_517_872),
        (24, 1_033_399_360, 1_384_328_960),
        (30, 2_010_020_356, 2_556_324_212),
    ],
)
def test_published_sizes(depth, plain, with_branch):
    with torch.device("meta"):
        params = hmar.init(depth=depth)
        combined = hmar.add_masked_branch(params, own_input=False)
    for tree_, count in ((params, plain), (combined, with_branch)):
        assert sum(leaf.numel() for leaf in pytree.tree_leaves(tree_)) == count and all(
            leaf.is_meta for leaf in pytree.tree_leaves(tree_)
        )
    assert (
        hmar.scales(params) == hmar.SCALES[256]
        and len(params["trunk"][0]["attention"]["scale"]) == depth
    )


def test_published_scales_have_their_lengths():
    assert {size: sum(h * w for h, w in scales) for size, scales in hmar.SCALES.items()} == {
        256: 680,
        512: 2240,
        1024: 9451,
    }


@pytest.mark.parametrize("depth, gamma", [(2, 1e-3), (24, 1e-4), (30, 1e-5)])
def test_weights_start_as_published(depth, gamma):
    width = 32
    params = hmar.init(
        depth=depth,
        width=width,
        heads=2,
        classes=200,
        codes=300,
        code_dim=40,
        scales=((4, 4), (6, 6)),
    )
    std, last, narrow = math.sqrt(1 / (3 * width)), params["trunk"][-1], (2 * depth) ** -0.5
    gains = [
        (params["classes"], 1),
        (params["start"], 1),
        (torch.cat([p.flatten(0, 1) for p in params["positions"]]), 1),
        (params["input"]["weight"], 1),
        (last["attention"]["qkv"], 1),
        (last["attention"]["project"]["weight"], narrow),
        (last["mlp"]["expand"]["weight"], 1),
        (last["mlp"]["contract"]["weight"], narrow),
        (last["modulation"]["weight"][: 2 * width], gamma),
        (last["modulation"]["weight"][2 * width :], 0.5),
        (params["next_scale"]["modulation"]["weight"], 0.5),
        (params["next_scale"]["head"]["weight"], 0.02),
    ]
    for weight, gain in gains:  # of a sample of n, five standard errors
        assert abs(weight.std() / (std * gain) - 1) < 5 / math.sqrt(2 * weight.numel())
        assert abs(weight.mean()) < 5 * std * gain / math.sqrt(weight.numel())
    assert params["levels"].shape == (2, width) and params["levels"].std() > std / 2
    for path, leaf in pytree.tree_flatten_with_path(params)[0]:
        assert "bias" not in pytree.keystr(path) or not leaf.any(), path
        assert "scale'" not in pytree.keystr(path[-1:]) or torch.equal(
            leaf, torch.full((2,), math.log(4))
        ), path


@quick
@given(pyramids(), st.integers(1, 3), st.data(), st.booleans(), st.integers(0, 9))
def test_init_and_the_masked_branch_are_pure_functions(scales, depth, data, own_input, seed):
    options, state = (
        dict(depth=depth, classes=2, codes=5, code_dim=4, scales=scales, width=32, heads=2),
        torch.get_rng_state(),
    )
    params = hmar.init(**options, seed=seed)
    kept, blocks = copy.deepcopy(params), data.draw(st.integers(1, depth))
    combined = hmar.add_masked_branch(params, blocks, own_input, seed=seed)
    assert (
        leaves_equal(params, kept)
        and torch.equal(torch.get_rng_state(), state)
        and hmar.scales(combined) == scales
    )
    assert leaves_equal(params, hmar.init(**options, seed=seed)) and not leaves_equal(
        params, hmar.init(**options, seed=seed + 1)
    )
    assert leaves_equal(combined, hmar.add_masked_branch(params, blocks, own_input, seed=seed))
    assert len(combined["trunk"]) == depth - blocks and all(
        len(combined[name]["blocks"]) == blocks for name in ("next_scale", "masked")
    )
    labels, inputs, _, _ = arguments(params, 2)
    assert torch.equal(
        hmar.next_scale_logits(combined, labels, inputs),
        hmar.next_scale_logits(params, labels, inputs),
    )
    assert (
        leaves_equal(combined["masked"]["blocks"], combined["next_scale"]["blocks"])
        and ("own_input" in combined["masked"]) == own_input
    )
    pytree.tree_map(lambda tensor: tensor.add_(1), combined["masked"])  # the branch is its own
    assert leaves_equal(params, kept)
    assert torch.equal(
        hmar.next_scale_logits(combined, labels, inputs),
        hmar.next_scale_logits(params, labels, inputs),
    )


@quick
@given(st.integers(1, 5), st.floats(0, 0.9), st.integers(0, 99))
def test_stochastic_depth(depth, rate, seed):
    uniform = torch.rand(4, depth, 2, generator=torch.Generator().manual_seed(seed))
    keep = hmar.stochastic_depth(uniform, rate)
    for image, i, branch in itertools.product(range(4), range(depth), range(2)):
        kept = 1 - (rate * i / (depth - 1) if depth > 1 else 0)
        if abs(uniform[image, i, branch] - kept) > 1e-6:
            assert float(keep[image, i, branch]) == pytest.approx(
                1 / kept if uniform[image, i, branch] < kept else 0, rel=1e-5
            )
    params = tree(depth=depth, masked=0)
    labels, inputs, _, _ = arguments(params, 4)
    tokens = random_tokens(4, SCALES, 5)
    ours = hmar.next_scale_losses(params, labels, tokens, inputs, keep=keep.double())
    for image in range(4):  # the same as scaling both gates of every block
        scaled = copy.deepcopy(params)
        for i, block in enumerate(scaled["trunk"]):
            for branch in range(2):
                for gate in block["modulation"].values():
                    gate[branch * 32 : branch * 32 + 32] *= keep[image, i, branch].double()
        close(
            ours[image],
            hmar.next_scale_losses(
                scaled, *(x[image : image + 1] for x in (labels, tokens, inputs))
            )[0],
        )


def test_cast_moves_the_blocks_alone():
    params = pytree.tree_map(lambda tensor: tensor / 2, tree())
    params = pytree.tree_map(torch.Tensor.float, params)
    half = hmar.cast(params, torch.bfloat16)
    for (path, ours), original in zip(
        pytree.tree_flatten_with_path(half)[0], pytree.tree_leaves(params), strict=True
    ):
        block = (
            any(getattr(key, "key", None) in ("blocks", "trunk") for key in path)
            and path[-1].key != "scale"
        )
        assert ours.dtype == (torch.bfloat16 if block else torch.float32) and torch.equal(
            ours, original.to(ours.dtype)
        )
    labels, inputs, own, mask = arguments(params, 2)
    rounded = double(
        half
    )  # rounding inside costs no more than some times what rounding the weights alone does
    for predict in (
        lambda p, *x: hmar.next_scale_logits(p, labels, x[0]),
        lambda p, *x: hmar.next_scale_logits(p, labels, x[0], True),
        lambda p, *x: hmar.masked_logits(p, labels, *x, mask),
    ):
        ours, truth, same = (
            predict(p, inputs.to(p["classes"].dtype), own.to(p["classes"].dtype))
            for p in (half, double(params), rounded)
        )
        assert ours.dtype == torch.float32
        assert (ours - truth).square().mean().sqrt() < 5 * (same - truth).square().mean().sqrt()


def test_arguments_are_not_changed():
    params, tokens = tree(), random_tokens(2, SCALES, 5)
    labels, inputs, own, mask = arguments(params, 2)
    before = copy.deepcopy([params, tokens, labels, inputs, own, mask])

    def results():
        yield from (
            hmar.next_scale_logits(params, labels, inputs),
            hmar.next_scale_logits(params, labels, inputs, True),
        )
        yield from (
            hmar.next_scale_losses(params, labels, tokens, inputs),
            hmar.masked_logits(params, labels, inputs, own, mask),
        )
        yield from (
            hmar.masked_losses(params, labels, tokens, inputs, own, mask),
            hmar.resize_positions(params, SCALES),
        )

    assert leaves_equal(list(results()), list(results())) and leaves_equal(
        before, [params, tokens, labels, inputs, own, mask]
    )


def published(params):
    """Our tree under the published names, written out by hand: HMAR with its masked branch, or VAR and HMAR after stage one."""
    combined = "masked" in params
    state = {
        "class_emb.weight": params["classes"],
        "pos_start": params["start"][None],
        "lvl_embed.weight": params["levels"],
        "pos_1LC": torch.cat([p.flatten(0, 1) for p in params["positions"]])[None],
        "word_embed.weight": params["input"]["weight"],
        "word_embed_bias" if combined else "word_embed.bias": params["input"]["bias"],
    }
    branches = [("ns_", "next_scale"), ("mask_", "masked")] if combined else [("", "next_scale")]
    stacks = {"base_blocks": params["trunk"]} if combined else {"blocks": params["trunk"]}
    for prefix, name in branches:
        branch = params[name]
        stacks |= {f"{prefix}blocks": branch["blocks"]} if combined else {}
        for ours, theirs in (("modulation", "head_nm.ada_lin.1"), ("head", "head")):
            state |= {f"{prefix}{theirs}.{part}": tensor for part, tensor in branch[ours].items()}
    if combined:
        state["mask_embed.weight"] = params["masked"]["mask_embedding"][None]
    for stack, blocks in stacks.items():
        for i, block in enumerate(blocks):
            attention, name = block["attention"], f"{stack}.{i}"
            state |= {
                f"{name}.attn.scale_mul_1H11": attention["scale"].view(1, -1, 1, 1),
                f"{name}.attn.q_bias": attention["q_bias"],
                f"{name}.attn.v_bias": attention["v_bias"],
                f"{name}.attn.mat_qkv.weight": attention["qkv"],
                f"{name}.attn.zero_k_bias": torch.zeros_like(attention["q_bias"]),
            }
            affine = {
                "attn.proj": attention["project"],
                "ffn.fc1": block["mlp"]["expand"],
                "ffn.fc2": block["mlp"]["contract"],
                "ada_lin.1": block["modulation"],
            }
            state |= {
                f"{name}.{layer}.{part}": tensor
                for layer, both in affine.items()
                for part, tensor in both.items()
            }
    levels = torch.arange(len(params["levels"])).repeat_interleave(
        torch.tensor([h * w for h, w in hmar.scales(params)])
    )
    hidden = torch.where(
        levels[:, None] == levels if combined else levels[:, None] >= levels, 0.0, -torch.inf
    )
    return state | {"lvl_1L": levels[None], "attn_bias_for_masking": hidden[None, None]}


BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
PLAIN = pytree.tree_map(torch.Tensor.float, tree(masked=0))
COMBINED = pytree.tree_map(torch.Tensor.float, tree(depth=3, own_input=False))


@quick
@given(
    pyramids(),
    st.integers(1, 3),
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_published_weights_of_any_dtype_load(scales, depth, data, dtype, nested):
    params = pytree.tree_map(
        torch.Tensor.float,
        tree(scales, depth=depth, masked=data.draw(st.integers(0, depth)), own_input=False),
    )
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in published(params).items()
    }
    outer = {"trainer": {"var_wo_ddp": state, "vae_local": {}}, "epoch": 3} if nested else state
    narrow = pytree.tree_map(lambda tensor: tensor.to(dtype), params)
    wide = pytree.tree_map(torch.Tensor.float, narrow)
    assert leaves_equal(hmar.from_published(outer, scales), wide)
    assert leaves_equal(hmar.from_published(outer, scales, dtype=dtype), narrow)
    without = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    assert leaves_equal(hmar.from_published(without, [list(size) for size in scales]), wide)


def test_which_attention_a_published_file_was_made_for():
    assert [hmar.published_is_causal(published(params)) for params in (PLAIN, COMBINED)] == [
        True,
        False,
    ]
    assert hmar.published_is_causal({"trainer": {"var_wo_ddp": published(PLAIN)}}) is True
    assert (
        hmar.published_is_causal(
            {
                name: tensor
                for name, tensor in published(PLAIN).items()
                if not name.endswith(BUFFERS)
            }
        )
        is None
    )


@pytest.mark.parametrize("params", [PLAIN, COMBINED], ids=["plain", "combined"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_told(params):
    """Where it decides a size itself, those that disagree with it are; the numbers of classes and code dimensions stand in one alone."""
    state, silent = published(params), []
    for name in state:
        if name.endswith(BUFFERS):
            continue
        with pytest.raises(ValueError) as error:
            hmar.from_published(
                {key: tensor for key, tensor in state.items() if key != name}, SCALES
            )
        told = f"{name} is missing" in str(error.value) or "state_dict: expected VAR, HMAR" in str(
            error.value
        )
        silent += [] if told else [f"{name} missing: {error.value}"]
        if name == "word_embed.weight":
            continue
        wrong = (
            state[name].flatten()[:-1] if name.endswith("scale_mul_1H11") else state[name][..., :-1]
        )
        with pytest.raises(ValueError) as error:
            hmar.from_published(state | {name: wrong}, SCALES)
        silent += (
            []
            if str(error.value).startswith(("state_dict: does not fit", "scales: "))
            else [f"{name} cut: {error.value}"]
        )
    assert silent == []


def test_what_does_not_fit_is_listed_ten_at_a_time():
    state = published(COMBINED)
    names = [name for name in state if name.startswith("mask_") and not name.endswith(BUFFERS)]
    with pytest.raises(
        ValueError, match="^state_dict: does not fit the published transformer: "
    ) as error:
        hmar.from_published(
            {name: tensor for name, tensor in state.items() if name not in names}
            | {"extra": torch.zeros(3)},
            SCALES,
        )
    assert str(error.value).count(" is missing") == 10 and str(error.value).endswith(
        f" and {len(names) - 9} more"
    )
    with pytest.raises(ValueError, match="extra is unexpected$"):
        hmar.from_published(state | {"extra": torch.zeros(3)}, SCALES)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"state": {0: torch.zeros(3)}, "param_groups": [{}]},
        {1: 2},
        None,
        5,
        [1],
        "weights",
        torch.zeros(3),
        {"trainer": 3},
        {
            "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
            "quantize.embedding.weight": torch.zeros(5, 4),
        },
    ],
)
def test_something_else_than_a_transformer(other):
    with pytest.raises(
        ValueError, match="^state_dict: expected VAR, HMAR after stage one or the combined HMAR"
    ):
        hmar.from_published(other)


def test_hmar_before_it_is_combined_is_refused():
    """Stage two's own layout keeps no next-scale branch: loaded as VAR it would sample rubbish."""
    state = published(PLAIN) | {"mask_embed.weight": torch.zeros(1, 32)}
    with pytest.raises(
        ValueError, match="^state_dict: expected VAR, HMAR after stage one or the combined HMAR"
    ):
        hmar.from_published(state, SCALES)


@pytest.mark.parametrize(
    "scales, message",
    [
        (None, "must be given for 11 tokens; known are the published lengths, 680, 2240, 9451"),
        (((1, 1), (2, 2)), "hold 5 tokens"),
        (((2, 2), (1, 1), (2, 3)), "the first 4; these weights have 11 and 1"),
        (((1, 1), (2, 3), (2, 2)), "do not match the levels"),
        ((1, 2, 3), ""),
        (5, ""),
        ((), ""),
    ],
)
def test_scales_that_do_not_fit_published_weights(scales, message):
    with pytest.raises(ValueError, match=f"^scales: .*{message}"):
        hmar.from_published(published(PLAIN), scales)


@pytest.mark.parametrize(
    "buffer, value, message",
    [
        (
            "attn_bias_for_masking",
            torch.zeros(1, 1, 11, 11),
            "neither block-diagonal nor block-causal",
        ),
        ("blocks.1.attn.zero_k_bias", torch.ones(32), "zero_k_bias is not zero"),
    ],
)
def test_buffers_that_say_something_else_are_refused(buffer, value, message):
    with pytest.raises(ValueError, match=f"^state_dict: .*{message}"):
        hmar.from_published(published(PLAIN) | {buffer: value}, SCALES)


@quick
@given(pyramids(3, 3), pyramids(4, 4), st.integers(0, 99))
def test_positions_are_resampled_from_the_nearest_scale(old, new, seed):
    params = tree(old, seed=seed)
    resized = hmar.resize_positions(params, new)
    assert hmar.scales(resized) == new and resized["trunk"] is params["trunk"]

    def side(size, last):
        return math.sqrt(size[0] * size[1] / (last[0] * last[1]))

    for size, level, position in zip(new, resized["levels"], resized["positions"], strict=True):
        distance = [abs(side(source, old[-1]) - side(size, new[-1])) for source in old]
        nearest = {k for k, d in enumerate(distance) if d < min(distance) + 1e-6}
        k = next(k for k in nearest if torch.equal(level, params["levels"][k]))
        for channel in (0, 31):  # as fine-tuning starts from it, fp32 will do
            close(
                position[..., channel],
                slow_bicubic(params["positions"][k][..., channel].numpy(), size),
                1e-5,
            )
    labels, inputs, own, mask = arguments(resized, 2)
    assert hmar.next_scale_logits(resized, labels, inputs).shape == (
        2,
        sum(h * w for h, w in new),
        5,
    )
    assert hmar.masked_logits(resized, labels, inputs, own, mask).isfinite().all()


def test_positions_of_the_same_scales_stay():
    params = tree(random=False)
    same = hmar.resize_positions(params, SCALES)
    assert all(
        same[name] is params[name] for name in params.keys() - {"positions", "levels", "start"}
    )
    for ours, theirs in zip(
        [*same["positions"], same["start"], same["levels"]],
        [*params["positions"], params["start"], params["levels"]],
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


PARAMS = tree(random=False)
LABELS, INPUTS, OWN, MASK = arguments(PARAMS, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(labels=torch.tensor([0, 4])),
            "labels: got values from 0 to 4, expected 0 to 3, the null class",
        ),
        (dict(labels=torch.tensor([-1, 3])), "labels: got values from -1 to 3"),
        (dict(labels=torch.zeros(2)), "labels: got torch.float32"),
        (dict(labels=torch.tensor(1)), r"labels: got torch.int64 \(\), expected int64 \(B,\)"),
        (
            dict(labels=torch.zeros(3, dtype=torch.int64)),
            r"inputs: got .*expected floats \(3, 10, 4\)",
        ),
        (
            dict(inputs=INPUTS[:, 1:]),
            r"inputs: got \(torch.float32, \(2, 9, 4\)\), expected floats \(2, 10, 4\)",
        ),
        (dict(inputs=INPUTS[..., 1:]), "inputs: got .*expected floats"),
        (dict(inputs=INPUTS.long()), "inputs: got .*torch.int64"),
        (dict(inputs=None), "inputs: got None"),
        (dict(only=3), "only: got 3, expected None or a scale from 0 to 2"),
        (dict(only=-1), "only: got -1"),
        (dict(only=1), r"inputs: got .*expected floats \(2, 4, 4\)"),
    ],
)
def test_bad_arguments(change, message):
    call = dict(labels=LABELS, inputs=INPUTS) | change
    with pytest.raises(ValueError, match=f"^{message}"):
        hmar.next_scale_logits(PARAMS, **call)
    with pytest.raises(ValueError, match=f"^{message}"):
        hmar.masked_logits(PARAMS, **call, own_inputs=OWN, mask=MASK)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(own_inputs=OWN[:, 1:]),
            r"own_inputs, mask: got \(2, 9, 4\) and torch.bool \(2, 10\), expected \(2, 10, 4\) and bool \(2, 10\)",
        ),
        (dict(mask=MASK.float()), "own_inputs, mask: got .*torch.float32"),
        (dict(mask=MASK[:, 1:]), "own_inputs, mask: got"),
        (dict(inputs=None, only=0), "only: got 0"),
    ],
)
def test_bad_arguments_of_the_masked_branch(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        hmar.masked_logits(
            PARAMS, **(dict(labels=LABELS, inputs=INPUTS, own_inputs=OWN, mask=MASK) | change)
        )


def test_a_tree_without_a_masked_branch():
    with pytest.raises(
        ValueError, match="^params: this tree has no masked branch; add_masked_branch makes one"
    ):
        hmar.masked_logits(PLAIN, LABELS, INPUTS, OWN, MASK)
    misspelt = copy.deepcopy(PLAIN)
    misspelt["trunk"][1]["attention"]["qvk"] = misspelt["trunk"][1]["attention"].pop("qkv")
    with pytest.raises(TypeError, match="qvk"):  # a wrong key is named
        hmar.next_scale_logits(misspelt, LABELS, INPUTS)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: hmar.init(depth=0),
            "depth, classes, codes, code_dim, width, heads: got .0, 1000, 4096, 32, 0, 1.*, expected positive sizes",
        ),
        (lambda: hmar.init(width=30, heads=4), "depth, classes, .*a width that the heads divide"),
        (lambda: hmar.init(depth=1, scales=()), r"scales: got \(\)"),
        (lambda: hmar.init(depth=1, scales=(1, 2)), r"scales: got \(1, 2\)"),
        (lambda: hmar.init(depth=1, scales=((0, 1), (2, 2))), r"scales: got \(\(0, 1\)"),
        (lambda: hmar.add_masked_branch(PLAIN, 3), "blocks: got 3, expected 1 to 2"),
        (lambda: hmar.add_masked_branch(PLAIN, 0), "blocks: got 0"),
        (lambda: hmar.add_masked_branch(PARAMS, 1), "blocks: got 1, .* no masked branch yet"),
        (
            lambda: hmar.scale_weights(SCALES, "area"),
            """kind: got 'area', expected "token", "scale" or "lognormal"$""",
        ),
        (
            lambda: hmar.resize_positions(PARAMS, ()),
            r"scales: got \(\), expected \(height, width\) pairs of positive integers",
        ),
        (lambda: hmar.resize_positions(PARAMS, (1, 2)), r"scales: got \(1, 2\), expected"),
        (lambda: hmar.resize_positions(PARAMS, ((0, 1),)), "scales: got"),
        (lambda: hmar.resize_positions(PARAMS, ((1.5, 1),)), "scales: got"),
    ],
)
def test_bad_sizes(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
