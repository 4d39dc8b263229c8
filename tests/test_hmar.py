"""The transformer against plain re-derivations, its properties, published weights, bad input."""

import copy
import itertools
import math
import operator

import pytest
import torch
from helpers import (
    BUFFERS,
    CYCLE,
    JUNK,
    REFUSED,
    SHARED,
    arguments,
    changes,
    close,
    double,
    leaves_equal,
    lengths,
    published,
    pyramids,
    quantiser,
    random_tokens,
    refused,
    scale_of_tokens,
    slow_bicubic,
    tree,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import hmar
import tokenizer

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
SCALES = ((1, 1), (2, 2), (2, 3))


# ---- one token and one head at a time


def slow_linear(x, weight, bias):
    return torch.stack([sum(w * value for w, value in zip(row, x)) for row in weight]) + bias


def slow_norm(x, scale, shift):
    deviation = x - sum(x) / len(x)
    return deviation / math.sqrt(sum(deviation**2) / len(x) + 1e-6) * (1 + scale) + shift


def silu(x):
    return x / (1 + torch.exp(-x))


def unit(x):
    return x / max(math.sqrt(sum(x**2)), 1e-12)


def slow_attention(xs, visible, qkv, q_bias, v_bias, log_temperature, project):
    """xs: a vector a token; visible[i]: the tokens that token i sees."""
    width = len(q_bias)
    out = [[] for _ in xs]
    for rows, log_t in zip(torch.arange(width).chunk(len(log_temperature)), log_temperature):
        temperature = math.exp(min(log_t, math.log(100)))
        q = [temperature * unit(qkv[rows] @ x + q_bias[rows]) for x in xs]
        k = [unit(qkv[width + rows] @ x) for x in xs]
        v = [qkv[2 * width + rows] @ x + v_bias[rows] for x in xs]
        for i, seen in enumerate(visible):
            weights = [torch.exp(q[i] @ k[j]) for j in seen]
            out[i].append(sum(weight * v[j] for weight, j in zip(weights, seen)) / sum(weights))
    return [project["weight"] @ torch.cat(parts) + project["bias"] for parts in out]


def slow_feed_forward(x, expand, contract):
    h = expand["weight"] @ x + expand["bias"]
    cubic = math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)
    return contract["weight"] @ (0.5 * h * (1 + torch.tanh(cubic))) + contract["bias"]


def slow_block(xs, condition, visible, block):
    six = block["modulation"]["weight"] @ silu(condition) + block["modulation"]["bias"]
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.chunk(6)
    normed = [slow_norm(x, scale1, shift1) for x in xs]
    attended = slow_attention(normed, visible, **block["attention"])
    xs = [x + gamma1 * update for x, update in zip(xs, attended)]
    normed = [slow_norm(x, scale2, shift2) for x in xs]
    return [x + gamma2 * slow_feed_forward(y, **block["mlp"]) for x, y in zip(xs, normed)]


def slow_logits(params, label, inputs, is_causal=False, own_inputs=None, hidden=None):
    """Logits (L, codes) of one image; with own_inputs those of the masked branch."""
    branch = params["next_scale" if own_inputs is None else "masked"]
    condition = params["classes"][label]
    shared = params["input"]["weight"]
    xs = []
    for k, (h, w) in enumerate(hmar.scales(params)):
        for y, x in itertools.product(range(h), range(w)):
            i = len(xs) - len(params["start"])  # among the inputs
            if k == 0:
                token = condition + params["start"][len(xs)]
            else:
                token = slow_linear(inputs[i], shared, params["input"]["bias"])
            if k > 0 and own_inputs is not None:
                own = slow_linear(own_inputs[i], branch.get("own_input", shared), 0)
                token = token + (branch["mask_embedding"] if hidden[i] else own)
            xs.append(token + params["levels"][k] + params["positions"][k][y, x])

    scale_of = scale_of_tokens(lengths(hmar.scales(params)))
    sees = operator.le if is_causal else operator.eq
    visible = [[j for j, other in enumerate(scale_of) if sees(other, own)] for own in scale_of]
    for block in params["trunk"] + branch["blocks"]:
        xs = slow_block(xs, condition, visible, block)
    scale, shift = slow_linear(silu(condition), **branch["modulation"]).chunk(2)
    return torch.stack([slow_linear(slow_norm(x, scale, shift), **branch["head"]) for x in xs])


@quick
@given(
    pyramids(3, 3),
    st.integers(1, 3),
    st.data(),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_logits_are_those_of_plain_loops(scales, depth, data, heads, own_input, is_causal, seed):
    masked = data.draw(st.integers(0, depth))
    options = dict(depth=depth, masked=masked, own_input=own_input, heads=heads)
    params = tree(scales, **options, seed=seed)
    labels, inputs, own, mask = arguments(params, 2, seed)
    ours = hmar.next_scale_logits(params, labels, inputs, is_causal)
    one = seed % 2  # of two images
    close(ours[one], slow_logits(params, labels[one], inputs[one], is_causal), 1e-9)
    if masked:
        ours = hmar.masked_logits(params, labels, inputs, own, mask)
        seen = dict(own_inputs=own[one], hidden=mask[one])
        close(ours[one], slow_logits(params, labels[one], inputs[one], **seen), 1e-9)


# ---- properties


def parts_of(scales, x):
    """The part of each scale; scale 0 has none."""
    return [None, *x.split(lengths(scales)[1:], 1)][: len(scales)]


@quick
@given(pyramids(), st.booleans(), st.integers(1, 3), seeds)
def test_one_scale_alone_is_a_part_of_the_whole(scales, own_input, batch, seed):
    params = tree(scales, own_input=own_input, seed=seed)
    labels, *rest = arguments(params, batch, seed)
    parts = list(zip(*(parts_of(scales, x) for x in rest)))

    def by_scale(inputs, *masked):
        made = [hmar.next_scale_logits(params, labels, inputs, kind) for kind in (False, True)]
        made.append(hmar.masked_logits(params, labels, inputs, *masked))
        return [logits.split(lengths(scales), 1) for logits in made]

    whole, causal, masked = by_scale(*rest)
    cache = hmar.new_cache(params, batch)
    scale_of = torch.tensor(scale_of_tokens(lengths(scales))[len(params["start"]) :])
    for k in range(len(scales)):
        others = (scale_of != k)[:, None]  # not seen: bit for bit the same
        same, _, refined = by_scale(rest[0] + others, rest[1] + others, rest[2] ^ others[:, 0])
        assert torch.equal(same[k], whole[k]) and torch.equal(refined[k], masked[k])
        given = [params, "next_scale", labels, parts[k][0]]
        features = hmar.branch_features(*given, k=k)
        close(hmar.logits(features, **params["next_scale"]["head"]), whole[k])
        features = hmar.branch_features(*given, k=k, cache=cache)
        close(hmar.logits(features, **params["next_scale"]["head"]), causal[k])
        if k:
            features = hmar.branch_features(params, "masked", labels, *parts[k], k)
            close(hmar.logits(features, **params["masked"]["head"]), masked[k])


@quick
@given(pyramids().filter(lambda scales: len(scales) > 1), seeds)
def test_masked_logits_do_not_see_the_tokens_under_the_mask(scales, seed):
    params = tree(scales, seed=seed)
    codec = quantiser(5, 4, seed=seed)
    tokens = random_tokens(2, scales, 5, seed)
    labels, inputs, _, mask = arguments(params, 2, seed)
    first = torch.ones(2, len(params["start"]), dtype=torch.bool)
    hidden = torch.cat([first, mask], 1)  # scale 0's tokens are not seen either

    def predict(tokens):
        own = tokenizer.masked_inputs(codec, tokens, scales, mask)
        return hmar.masked_logits(params, labels, inputs, own, mask)

    assert torch.equal(predict(tokens), predict((tokens + hidden) % 5))
    others_seen = not torch.equal(predict(tokens), predict((tokens + ~hidden) % 5))
    assert others_seen == (not mask.all())


@quick
@given(pyramids(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 40), seeds)
def test_losses_are_cross_entropies_of_the_logits(
    scales, is_causal, checkpointing, own_input, slice_rows, seed
):
    params = tree(scales, own_input=own_input, seed=seed)
    leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(params)]
    labels, inputs, own, mask = arguments(params, 2, seed)
    tokens = random_tokens(2, scales, 5, seed)

    def entropy(logits):
        return -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    expected = entropy(hmar.next_scale_logits(params, labels, inputs, is_causal))
    hidden = entropy(hmar.masked_logits(params, labels, inputs, own, mask))
    hidden = hidden[:, len(params["start"]) :][mask]

    def gradients(losses):
        total = losses.square().sum()
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hmar, "LOSS_SLICE", slice_rows * 5)
        options = dict(checkpointing=checkpointing)
        ours = hmar.next_scale_losses(params, labels, tokens, inputs, is_causal, **options)
        ours_hidden = hmar.masked_losses(params, labels, tokens, inputs, own, mask, **options)
        assert ours.shape == tokens.shape and ours_hidden.shape == (int(mask.sum()),)
        close(ours.detach(), expected.detach())
        close(ours_hidden.detach(), hidden.detach())
        some = dict(places=mask.flatten().nonzero()[::2, 0])
        half = hmar.masked_losses(params, labels, tokens, inputs, own, mask, **some)
        close(half.detach(), hidden[::2].detach())
        grads = gradients(torch.cat([ours.flatten(), ours_hidden]))
    for a, b in zip(grads, gradients(torch.cat([expected.flatten(), hidden]))):
        close(a, b, 1e-9)


@quick
@given(pyramids(9, 6), st.sampled_from(["token", "scale", "lognormal"]))
@example(((2, 2),), "lognormal")
@example(((2, 3), (2, 3), (2, 3)), "lognormal")
def test_loss_weights_are_those_of_plain_loops(scales, kind):
    weights = hmar.scale_weights(scales, kind)
    counts = lengths(scales)
    assert weights.shape == (sum(counts),) and weights.dtype == torch.float32
    sides = [math.sqrt(count / counts[-1]) for count in counts]
    mean = sum(sides) / len(sides)
    deviation = math.sqrt(sum((side - mean) ** 2 for side in sides) / max(1, len(sides) - 1))
    mass = counts if kind == "token" else [1] * len(counts)
    if kind == "lognormal" and deviation > 0:
        if deviation < 1e-6:
            return  # of one size but for rounding
        mass = [math.exp(-(((side - mean) / deviation) ** 2) / 2) for side in reversed(sides)]
    expected = [mass[k] / sum(mass) / counts[k] for k in scale_of_tokens(counts)]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)
    assert abs(weights.double().sum() - 1) < 1e-6


@quick
@given(st.integers(1, 5), st.floats(0, 0.9), seeds)
def test_stochastic_depth(depth, rate, seed):
    uniform = torch.rand(4, depth, 2, generator=torch.Generator().manual_seed(seed))
    gates = hmar.stochastic_depth(uniform, rate)
    for image, i, update in itertools.product(range(4), range(depth), range(2)):
        kept = 1 - rate * i / max(1, depth - 1)
        if abs(uniform[image, i, update] - kept) > 1e-6:
            expected = 1 / kept if uniform[image, i, update] < kept else 0
            assert float(gates[image, i, update]) == pytest.approx(expected, rel=1e-5)

    params = tree(depth=depth, masked=0)
    labels, inputs, _, _ = arguments(params, 4)
    tokens = random_tokens(4, SCALES, 5)
    ours = hmar.next_scale_losses(params, labels, tokens, inputs, gates=gates.double())
    for image in range(4):  # the same as scaling both gammas of every block
        scaled = copy.deepcopy(params)
        for i, update in itertools.product(range(depth), range(2)):
            for leaf in scaled["trunk"][i]["modulation"].values():
                leaf[update * 32 : update * 32 + 32] *= gates[image, i, update].double()
        own = [x[image : image + 1] for x in (labels, tokens, inputs)]
        close(ours[image], hmar.next_scale_losses(scaled, *own)[0])


def test_cast_moves_blocks_and_heads():
    params = pytree.tree_map(lambda leaf: (leaf / 2).float(), tree())
    half = hmar.cast(params, torch.bfloat16)
    originals = pytree.tree_leaves(params)
    for (path, ours), original in zip(pytree.tree_flatten_with_path(half)[0], originals):
        name = pytree.keystr(path)
        moved = any(part in name for part in ("'blocks'", "'trunk'", "'head'"))
        dtype = torch.bfloat16 if moved and "temperature" not in name else torch.float32
        assert ours.dtype == dtype and torch.equal(ours, original.to(dtype)), name

    labels, *rest, mask = arguments(params, 2)

    def predictions(params):
        inputs, own = (x.to(params["classes"].dtype) for x in rest)
        for is_causal in (False, True):
            yield hmar.next_scale_logits(params, labels, inputs, is_causal)
        yield hmar.masked_logits(params, labels, inputs, own, mask)

    # rounding inside costs no more than some times what rounding the weights alone does
    trees = (half, double(params), double(half))
    for ours, truth, rounded in zip(*map(predictions, trees)):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 5 * (rounded - truth).norm()


# ---- initialisation and surgery


def test_published_sizes():
    with torch.device("meta"):
        params = hmar.init(depth=30)
    combined = hmar.add_masked_branch(params, own_input=False)
    for model, count in ((params, 2_010_020_356), (combined, 2_556_324_212)):
        assert sum(leaf.numel() for leaf in pytree.tree_leaves(model)) == count
    assert [sum(lengths(scales)) for scales in hmar.SCALES.values()] == [680, 2240, 9451]


@pytest.mark.parametrize("depth, gamma", [(2, 1e-3), (24, 1e-4), (30, 1e-5)])
def test_weights_start_as_published(depth, gamma):
    sizes = dict(width=32, heads=2, classes=200, codes=300, code_dim=40)
    params = hmar.init(depth=depth, scales=((4, 4), (6, 6)), **sizes)
    std = math.sqrt(1 / (3 * 32))
    last = params["trunk"][-1]
    narrow = (2 * depth) ** -0.5
    gains = [
        (params["classes"], 1),
        (params["start"], 1),
        (torch.cat([position.flatten(0, 1) for position in params["positions"]]), 1),
        (params["input"]["weight"], 1),
        (last["attention"]["qkv"], 1),
        (last["attention"]["project"]["weight"], narrow),
        (last["mlp"]["expand"]["weight"], 1),
        (last["mlp"]["contract"]["weight"], narrow),
        (last["modulation"]["weight"][: 2 * 32], gamma),
        (last["modulation"]["weight"][2 * 32 :], 0.5),
        (params["next_scale"]["modulation"]["weight"], 0.5),
        (params["next_scale"]["head"]["weight"], 0.02),
    ]
    for weight, gain in gains:  # of a sample of n, five standard errors
        assert abs(weight.std() / (std * gain) - 1) < 5 / math.sqrt(2 * weight.numel())
        assert abs(weight.mean()) < 5 * std * gain / math.sqrt(weight.numel())
    assert params["levels"].shape == (2, 32) and params["levels"].std() > std / 2
    for path, leaf in pytree.tree_flatten_with_path(params)[0]:
        name = pytree.keystr(path)
        assert "bias" not in name or not leaf.any(), name
        assert "temperature" not in name or torch.equal(leaf, torch.full((2,), math.log(4)))


@quick
@given(pyramids(), st.integers(1, 3), st.data(), st.booleans(), st.integers(0, 9))
def test_init_and_the_masked_branch_are_pure_functions(scales, depth, data, own_input, seed):
    sizes = dict(depth=depth, classes=2, codes=5, code_dim=4, scales=scales, width=32, heads=2)
    blocks = data.draw(st.integers(1, depth))
    state = torch.get_rng_state()
    params = hmar.init(**sizes, seed=seed)
    kept = copy.deepcopy(params)
    combined = hmar.add_masked_branch(params, blocks, own_input, seed=seed)
    assert leaves_equal(params, kept) and torch.equal(torch.get_rng_state(), state)
    assert leaves_equal(params, hmar.init(**sizes, seed=seed))
    assert not leaves_equal(params, hmar.init(**sizes, seed=seed + 1))
    assert leaves_equal(combined, hmar.add_masked_branch(params, blocks, own_input, seed=seed))

    masked, next_scale = combined["masked"], combined["next_scale"]
    assert hmar.scales(combined) == scales and len(combined["trunk"]) == depth - blocks
    assert len(masked["blocks"]) == blocks and ("own_input" in masked) == own_input
    assert leaves_equal(masked["blocks"], next_scale["blocks"])
    labels, inputs, _, _ = arguments(params, 2)
    before = hmar.next_scale_logits(params, labels, inputs)
    assert torch.equal(hmar.next_scale_logits(combined, labels, inputs), before)
    pytree.tree_map(lambda leaf: leaf.add_(1), masked)  # the branch is its own
    assert leaves_equal(params, kept)
    assert torch.equal(hmar.next_scale_logits(combined, labels, inputs), before)


@quick
@given(pyramids(3, 3), pyramids(4, 4), seeds)
@example(SCALES, SCALES, 0)
def test_positions_are_resampled_from_the_nearest_scale(old, new, seed):
    params = tree(old, seed=seed)
    resized = hmar.resize_positions(params, new)
    hmar.check(resized)
    assert hmar.scales(resized) == new and resized["trunk"] is params["trunk"]

    def side(size, last):
        return math.sqrt(size[0] * size[1] / (last[0] * last[1]))

    for size, level, position in zip(new, resized["levels"], resized["positions"], strict=True):
        distance = [abs(side(source, old[-1]) - side(size, new[-1])) for source in old]
        nearest = [k for k, d in enumerate(distance) if d < min(distance) + 1e-6]
        k = next(k for k in nearest if torch.equal(level, params["levels"][k]))
        for channel in (0, 31):  # as fine-tuning starts from it, fp32 will do
            plane = params["positions"][k][..., channel].numpy()
            close(position[..., channel], slow_bicubic(plane, size), 1e-5)
    labels, inputs, own, mask = arguments(resized, 2)
    assert hmar.masked_logits(resized, labels, inputs, own, mask).isfinite().all()


# ---- what fits

PLAIN = pytree.tree_map(torch.Tensor.float, tree(masked=0))
COMBINED = pytree.tree_map(torch.Tensor.float, tree(depth=3, own_input=False))


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.booleans(), st.data())
def test_check_takes_whole_trees_and_nothing_else(masked, own_input, data):
    params = tree(masked=int(masked), own_input=own_input, random=False)
    hmar.check(params)
    other, change, path = data.draw(changes(params))
    whole = [("masked",), ("masked", "own_input"), ("trunk", 0), ("trunk", 1)]
    assume(change != "remove" or path not in whole)  # a whole tree again
    with pytest.raises(REFUSED):
        hmar.check(other)


def test_something_else_than_a_transformer_is_refused():
    for other in [*JUNK, [], PLAIN["trunk"], {"trunk": CYCLE}, {"trainer": 3}]:
        for load in (hmar.check, hmar.from_published):
            with pytest.raises(REFUSED):
                load(other)
    for other in (SHARED, PLAIN | {"extra": SHARED}):
        refused("is not finite floats", hmar.check, other)
    refused("mismatch", hmar.check, PLAIN | {"extra": {}})


# ---- published weights


@quick
@given(
    pyramids(),
    st.integers(1, 3),
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_published_weights_of_any_dtype_load(scales, depth, data, dtype):
    masked = data.draw(st.integers(0, depth))
    params = tree(scales, depth=depth, masked=masked, own_input=False)
    state = published(pytree.tree_map(torch.Tensor.float, params))
    floats = [name for name in state if name != "lvl_1L"]
    state |= {name: state[name].to(dtype) for name in floats}
    wide = pytree.tree_map(lambda leaf: leaf.to(dtype).float(), params)
    assert leaves_equal(hmar.from_published(state, scales), wide)
    assert hmar.published_is_causal(state) == (masked == 0 or len(scales) == 1)
    without = {name: leaf for name, leaf in state.items() if not name.endswith(BUFFERS)}
    assert leaves_equal(hmar.from_published(without, [list(size) for size in scales]), wide)
    assert hmar.published_is_causal(without) is None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([published(PLAIN), published(COMBINED)]).flatmap(changes))
def test_a_published_state_that_is_not_whole_is_refused(changed):
    state, _, (name,) = changed
    assume(not name.endswith(BUFFERS))
    with pytest.raises(REFUSED):
        hmar.from_published(state, SCALES)


def test_what_does_not_fit_is_named():
    extra = published(COMBINED) | {"extra": torch.zeros(3)}
    refused(r"^state_dict: 1 .*: extra is \(3,\), not known$", hmar.from_published, extra, SCALES)
    twice = published(PLAIN)
    twice["base_blocks.0.attn.q_bias"] = twice["blocks.0.attn.q_bias"]
    refused("trunk.0.attention.q_bias is there twice", hmar.from_published, twice, SCALES)


@pytest.mark.parametrize("scales", [None, ((1, 1), (2, 2)), ((1, 1), (2, 2), (2, 2)), ()])
def test_scales_that_do_not_fit_published_weights(scales):
    refused("^scales: got .* expected some of 11", hmar.from_published, published(PLAIN), scales)


# ---- bad input

PARAMS = tree(random=False)
CALL = dict(zip(("labels", "inputs", "own_inputs", "mask"), arguments(PARAMS, 2)))
CALL |= dict(params=PARAMS, tokens=random_tokens(2, SCALES, 5))
BAD = dict(
    labels=[torch.tensor([0, 4]), torch.tensor([-1, 3]), torch.zeros(2)],
    tokens=[CALL["tokens"][:, 1:], CALL["tokens"].T, CALL["tokens"] + 5, -CALL["tokens"] - 100],
    inputs=[CALL["inputs"][:, 1:], CALL["inputs"][..., 1:]],
    own_inputs=[CALL["own_inputs"][:, 1:], CALL["own_inputs"][..., 1:]],
    mask=[CALL["mask"].float(), CALL["mask"][:, 1:], CALL["mask"][:1]],
)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    for value in [*BAD[name], CALL[name].tolist(), CALL[name].numpy(), None]:
        call = CALL | {name: value}
        refused(f"^{name}: got .*, expected ", hmar.masked_losses, **call)
        if name not in ("own_inputs", "mask"):
            del call["own_inputs"], call["mask"]
            refused(f"^{name}: got .*, expected ", hmar.next_scale_losses, **call)


def test_a_part_of_another_scale_or_a_wrong_tree_is_an_error():
    labels, inputs = CALL["labels"], CALL["inputs"]
    given = PARAMS, "next_scale", labels, inputs
    refused("^inputs: got .* 10, 4", hmar.branch_features, *given, k=1)
    misspelt = copy.deepcopy(PLAIN)
    attention = misspelt["trunk"][1]["attention"]
    attention["qvk"] = attention.pop("qkv")
    with pytest.raises(TypeError, match="qvk"):  # a wrong key is named
        hmar.next_scale_logits(misspelt, labels, inputs)
    with pytest.raises(ValueError, match="zip"):
        hmar.next_scale_losses(PARAMS, labels, CALL["tokens"], inputs, gates=torch.ones(2, 3, 2))


def test_bad_sizes():
    refused("^width: got 30, expected a multiple of the 4 heads", hmar.init, width=30, heads=4)
    refused("^blocks: got 3, expected 1 to 2", hmar.add_masked_branch, PLAIN, 3)
    refused("^kind: got 'x'", hmar.scale_weights, ((1, 1),), "x")
    refused("^blocks: got 0", hmar.add_masked_branch, PLAIN, 0)
    refused("^blocks: got 1, .* only once", hmar.add_masked_branch, PARAMS, 1)
