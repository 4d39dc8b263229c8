"""The tokenizer against plain re-derivations; published weights; bad input."""

import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    close,
    dtypes,
    leaves_equal,
    lengths,
    named_leaves,
    normal,
    pyramids,
    quantiser,
    random_tokens,
    refused,
    scrambled,
    seeded,
    small_codec,
    state_dict,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import tokenizer

seeds = st.integers(0, 999)
SCALES = ((1, 1), (2, 2), (3, 4))


# The quantiser


def resized(maps, size, mode):
    """maps (C, h, w) -> (C, *size)."""
    return F.interpolate(maps[None], size, mode=mode)[0]


def slow_contribution(codec, tokens, k, scales, hidden=None):
    """What scale k's tokens (n_k) add to the map (C, h, w); a hidden one is a code of zeros."""
    codes = codec["codebook"][tokens]
    if hidden is not None:
        codes[hidden] = 0
    codes = resized(codes.T.unflatten(1, scales[k]), scales[-1], "bicubic")
    nearest = np.abs(np.linspace(1 / 12, 11 / 12, 4) - k / max(1, len(scales) - 1)).argmin()
    return (codes + F.conv2d(codes, **codec["phi"][nearest], padding=1)) / 2


def slow_row(maps, size):
    """(C, h, w), resized -> (h_k w_k, C), a row of features."""
    return resized(maps, size, "area").flatten(1).T


def slow_quantise(codec, feature, scales):
    """For each scale (residual (n_k, C), tokens, f_hat (C, h, w)) of one feature (C, h, w)."""
    f_hat = torch.zeros_like(feature)
    for k, size in enumerate(scales):
        residual = slow_row(feature - f_hat, size)
        tokens = (residual[:, None] - codec["codebook"]).square().sum(2).argmin(1)
        f_hat = f_hat + slow_contribution(codec, tokens, k, scales)
        yield residual, tokens, f_hat


@given(pyramids().filter(lambda scales: len(scales) > 1), seeds)
def test_inputs_of_the_transformer_are_those_of_plain_matrices(scales, seed):
    codec, tokens = quantiser(7, 2, seed=seed), random_tokens(2, scales, 7, seed)
    mask = normal(2, sum(lengths(scales)[1:]), seed=seed) < 0
    ours = [
        tokenizer.next_scale_inputs(codec, tokens, scales),
        tokenizer.masked_inputs(codec, tokens, scales),
        tokenizer.masked_inputs(codec, tokens, scales, mask),
    ]
    for i in range(2):
        own, hidden = tokens[i].split(lengths(scales)), mask[i].split(lengths(scales)[1:])
        f_hat, expected = slow_contribution(codec, own[0], 0, scales), []
        for k, size in enumerate(scales[1:], 1):
            plain = slow_contribution(codec, own[k], k, scales)
            zeroed = slow_contribution(codec, own[k], k, scales, hidden[k - 1])
            rows = [slow_row(maps, size) for maps in (f_hat, plain, zeroed)]
            expected.append(torch.stack(rows))
            f_hat = f_hat + plain
        close(tokenizer.accumulate(codec, tokens, scales)[i], f_hat)
        for inputs, rows in zip(ours, torch.cat(expected, 1)):
            close(inputs[i], rows)


def test_phi_map_of_the_published_scales():
    for expected in ("0011122333", "00011112222333"):
        indices = [tokenizer.phi_index(k, len(expected)) for k in range(len(expected))]
        assert "".join(map(str, indices)) == expected


def test_cast_moves_the_convolutions_alone():
    half = tokenizer.cast(OURS, torch.bfloat16)
    for name, leaf in named_leaves(half).items():
        moves = "coder" in name and leaf.ndim == 4
        assert leaf.dtype == (torch.bfloat16 if moves else torch.float32), name
    tokens = tokenizer.encode(half, normal(2, 3, 6, 8).tanh().float(), SCALES)
    decoded, truth = (tokenizer.decode(codec, tokens, SCALES) for codec in (half, OURS))
    assert decoded.dtype == torch.float32 and not torch.equal(decoded, truth)
    assert (decoded - truth).abs().mean() < 0.05 * truth.abs().mean()


def test_one_scale_alone_has_no_inputs():
    codec, tokens = quantiser(7, 2), random_tokens(3, ((2, 2),), 7)
    for inputs in (tokenizer.next_scale_inputs, tokenizer.masked_inputs):
        made = inputs(codec, tokens, ((2, 2),))
        assert made.shape == (3, 0, 2) and made.dtype == codec["codebook"].dtype


# Training


def straight_through(value, gradient_to):
    return value.detach() + gradient_to - gradient_to.detach()


@given(pyramids(3, 3), st.integers(1, 6), st.data(), st.floats(0, 2), seeds)
def test_training_loss(scales, batch, data, commitment, seed):
    codec = scrambled(small_codec(channels=64), seed, 0.1) | quantiser(9, 8, seed=seed)
    coarse = sorted(data.draw(st.sets(st.integers(0, batch - 1))))
    stops = [data.draw(st.integers(0, len(scales) - 1)) for _ in coarse]
    features = normal(batch, 8, *scales[-1], seed=seed)
    leaves = features.requires_grad_(), codec["codebook"].requires_grad_()
    images = normal(batch, 3, *(2 * side for side in scales[-1]), seed=seed)
    with mock.patch.object(tokenizer, "encode_features", lambda *_: features):
        given = (torch.tensor(rows, dtype=torch.int64) for rows in (coarse, stops))
        made = tokenizer.training_loss(codec, images, scales, *given, commitment=commitment)

    slow = [list(zip(*slow_quantise(codec, feature, scales))) for feature in features]
    residuals, tokens, maps = zip(*slow)
    maps = torch.stack([torch.stack(f_hats) for f_hats in maps], 1)  # (S, B, C, h, w)
    assert torch.equal(torch.cat(made["tokens"], 1), torch.stack([*map(torch.cat, tokens)]))
    ours = torch.cat(made["residuals"], 1)
    close(ours, torch.stack([*map(torch.cat, residuals)]).detach())
    assert not ours.requires_grad

    # VAR, equation 5: codes go to the features, the features to their codes
    loss = (maps - features.detach()).square().mean()
    loss = loss + commitment * (features - maps.detach()).square().mean()

    # gradients go straight through; those of coarse images to the cells of their last scale
    decoded = [*straight_through(maps[-1], features)]
    for i, stop in zip(coarse, stops):
        cells = resized(resized(features[i], scales[stop], "area"), scales[-1], "bicubic")
        decoded.append(straight_through(maps[stop, i], cells))
    decoded = tokenizer.decode_unclamped(codec, torch.stack(decoded))
    ours = torch.cat([made["images"], made["coarse_images"]])
    for pair in ((made["quantisation"], loss), (ours, decoded)):
        close(*pair)
        totals = [(value * normal(*value.shape, seed=seed)).sum() for value in pair]
        options = dict(retain_graph=True, materialize_grads=True)
        gradients = [torch.autograd.grad(total, leaves, **options) for total in totals]
        for gradient, expected in zip(*gradients):
            close(gradient, expected)


def test_features_move_to_their_codes_a_tenth_as_much_as_codes_to_them():
    images, nothing = normal(2, 3, 6, 8).tanh().float(), torch.tensor([], dtype=torch.int64)
    given = small_codec(), images, SCALES, nothing, nothing
    losses = [tokenizer.training_loss(*given)["quantisation"]]
    losses += [tokenizer.training_loss(*given, commitment=x)["quantisation"] for x in (0, 1)]
    ours, without, whole = losses
    close(ours - without, 0.1 * (whole - without).detach(), 1e-6)


# Published weights


def published(codec):
    names = {
        "codebook": "quantize.embedding.weight",
        "phi.": "quantize.quant_resi.qresi_ls.",
        "middle.blocks.0": "mid.block_1",
        "middle.blocks.1": "mid.block_2",
        "middle.attentions.0": "mid.attn_1",
        "blocks": "block",
        "attentions": "attn",
        "shortcut": "nin_shortcut",
        "project": "proj_out",
        "sample": "sample.conv",
    }
    up = codec["decoder"]["up"][::-1]  # by level, not in the order they run
    state = state_dict(codec | dict(decoder=codec["decoder"] | dict(up=up)), names)
    return state | {"quantize.ema_vocab_hit_SV": torch.zeros(3, 4)}


OURS = small_codec(multipliers=(1, 2))
WEIGHTS = published(OURS)
NAMES = list(WEIGHTS)[:-1]


levels = st.lists(st.integers(1, 2), min_size=1, max_size=3)


@given(levels, st.integers(1, 2), st.booleans(), dtypes, seeds)
def test_init_is_a_pure_function_and_fits(multipliers, blocks, attention, dtype, seed):
    options = dict(multipliers=multipliers, residual_blocks=blocks, attention=attention)
    codec = seeded(small_codec, seed, **options)
    assert all(leaf.dtype == torch.float32 for leaf in pytree.tree_leaves(codec))

    codec["decoder"]["conv_out"]["weight"] *= 99
    side, scales = tokenizer.downsampling(codec), ((1, 1), (2, 1))
    images = normal(3, 3, 2 * side, side, seed=seed).tanh().float()
    tokens = tokenizer.encode(codec, images, [list(size) for size in scales])
    assert tokens.shape == (3, 3) and tokens.dtype == torch.int64
    decoded = tokenizer.decode_unclamped(codec, tokenizer.accumulate(codec, tokens, scales))
    assert decoded.shape == images.shape and decoded.abs().max() > 1
    assert torch.equal(tokenizer.decode(codec, tokens, scales), decoded.clamp(-1, 1))

    half = pytree.tree_map(lambda leaf: leaf.to(dtype), codec)
    loaded = tokenizer.from_published(published(half))
    assert leaves_equal(loaded, pytree.tree_map(torch.Tensor.float, half))


def test_weights_that_are_not_a_tokenizers_are_refused():
    gaps = [f"^{re.escape(name)}$" for name in WEIGHTS if not name.endswith("hit_SV")]  # each entry
    gaps += ["embedding", "qresi", "conv_in", r"decoder\.up", r"down\.0", r"down\.1", r"up\.1"]
    gaps += ["encoder.*attn", "decoder.*attn", r"down\.\d\.block\.0", r"up\.0\.block\.1"]
    for gap in gaps:
        other = {name: leaf for name, leaf in WEIGHTS.items() if not re.search(gap, name)}
        assert len(other) < len(WEIGHTS)
        refused("^state_dict: not a tokenizer's", tokenizer.from_published, other)
    for other in (None, {}, {"trainer": {"x": 3}}):
        refused("^state_dict: not a tokenizer's", tokenizer.from_published, other)


# Bad input

IMAGES, TOKENS = torch.zeros(2, 3, 6, 8), torch.zeros(2, 17, dtype=torch.int64)


def others(tensor, *values):
    """Other shapes, and the values in it."""
    shapes = [tensor[0], tensor[None], tensor[:, 1:], tensor[..., 1:], tensor[..., None]]
    return shapes + [tensor.index_fill(1, torch.tensor([2]), value) for value in values]


def test_bad_images_are_named():
    images = others(IMAGES, 1.5, -1.1, 127, math.nan, math.inf)
    for bad in [*images, IMAGES.byte(), IMAGES.int(), IMAGES.bool()]:
        refused("^images: got .*, expected", tokenizer.encode, OURS, bad, SCALES)
    assert len(tokenizer.encode(OURS, IMAGES[:0], SCALES)) == 0


def test_bad_tokens_and_masks_are_refused_by_torch():
    mask = torch.ones(2, 16, dtype=torch.bool)
    calls = [(tokenizer.masked_inputs, TOKENS, bad) for bad in [*others(mask), mask.float()]]
    for function in (tokenizer.decode, tokenizer.next_scale_inputs, tokenizer.masked_inputs):
        calls += [(function, bad) for bad in [*others(TOKENS, 16, -1, 2**62), TOKENS.double()]]
        assert len(function(OURS, TOKENS[:0], SCALES)) == 0
    for function, tokens, *mask in calls:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            function(OURS, tokens, SCALES, *mask)


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=4))
def test_scales_are_pairs_coarse_to_fine(scales):
    heights, widths = ([1, *sides] for sides in zip(*scales))
    if heights == sorted(heights) and widths == sorted(widths):
        tokenizer.check_scales(scales)
    else:
        for name, given in (("encode", IMAGES), ("decode", TOKENS), ("masked_inputs", TOKENS)):
            refused("^scales: got .*, expected", getattr(tokenizer, name), OURS, given, scales)


@pytest.mark.parametrize("side, window", [(16, 8), (40, 8), (48, 16), (64, 16)])
def test_the_spectrum_of_a_wave_is_one_frequency(side, window):
    """Of window - 3 half-periods a window along columns and 2 along rows."""
    phase = math.pi / window * ((torch.arange(side) + 0.5) % window)
    wave = torch.cos((window - 3) * phase)[:, None] * torch.cos(2 * phase)
    found = tokenizer.spectrum(wave.expand(1, 3, side, side))
    low = window * 3 // 8
    expected = torch.full((window**2 - low**2,), 0.001)
    expected[(window - 3 - low) * window + 2] += 3 * (window / 2) ** 2  # squares of a window
    places = side // window - 1
    expected = expected.sqrt()[None, :, None, None].expand(1, -1, places, places)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "sides, maps", [((6, 20), (55, 1, 2)), ((12, 20), (55, 1, 2)), ((52, 100), (220, 3, 6))]
)
def test_the_spectrum_of_any_sides(sides, maps):
    """Continues an image by its last pixels."""
    image = torch.rand(1, 3, *sides)
    found = tokenizer.spectrum(image)
    assert found.shape == (1, *maps)
    window = 8 if maps[0] == 55 else 16
    rows, columns = (
        torch.arange(-(-side // window) * window).clamp(max=side - 1) for side in sides
    )
    assert torch.equal(found, tokenizer.spectrum(image[:, :, rows][..., columns]))


def test_jumps_tell_squares_of_pixels_from_grain():
    """Columns of two pixels, by turns 0 and 1, jump between squares only, and along rows only."""
    columns = (torch.arange(20) // 2 % 2).float().expand(1, 3, 12, 20)
    found = tokenizer.jumps(columns)
    assert found.shape == (1, 4, 3, 5)
    expected = torch.zeros(4, 3, 5)
    expected[1] = 3  # of three colours
    expected[1, :, -1] = 3 / 2  # behind the last pixel there is no jump
    torch.testing.assert_close(found[0].square(), expected + 1e-4)
    assert torch.equal(tokenizer.jumps(columns.mT)[:, [2, 3]], found[:, [0, 1]].mT)
    assert tokenizer.jumps(torch.rand(1, 3, 9, 18)).shape == (1, 4, 3, 5)
