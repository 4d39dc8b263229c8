"""The tokenizer against plain re-derivations; bad input. Published weights: test_golden.py."""

import doctest
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    close,
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


# Training


def straight_through(value, gradient_to):
    return value.detach() + gradient_to - gradient_to.detach()


@given(pyramids(3, 3), st.integers(1, 6), st.data(), seeds)
def test_training_loss(scales, batch, data, seed):
    codec = scrambled(small_codec(channels=64), seed, 0.1) | quantiser(9, 8, seed=seed)
    coarse = sorted(data.draw(st.sets(st.integers(0, batch - 1))))
    stops = [data.draw(st.integers(0, len(scales) - 1)) for _ in coarse]
    features = normal(batch, 8, *scales[-1], seed=seed)
    leaves = features.requires_grad_(), codec["codebook"].requires_grad_()
    images = normal(batch, 3, *(2 * side for side in scales[-1]), seed=seed).tanh()
    with mock.patch.object(tokenizer, "encode_features", lambda *_: features):
        given = (torch.tensor(rows, dtype=torch.int64) for rows in (coarse, stops))
        made = tokenizer.training_loss(codec, images, scales, *given)

    slow = [list(zip(*slow_quantise(codec, feature, scales))) for feature in features]
    residuals, tokens, maps = zip(*slow)
    maps = torch.stack([torch.stack(f_hats) for f_hats in maps], 1)  # (S, B, C, h, w)
    assert torch.equal(torch.cat(made["tokens"], 1), torch.stack([*map(torch.cat, tokens)]))
    ours = torch.cat(made["residuals"], 1)
    close(ours, torch.stack([*map(torch.cat, residuals)]).detach())
    assert not ours.requires_grad

    # VAR, equation 5: codes go to the features, the features a tenth as much to their codes
    loss = (maps - features.detach()).square().mean()
    loss = loss + 0.1 * (features - maps.detach()).square().mean()

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


# All terms of the loss, written out

SIDES = ((1, 1), (2, 2), (4, 4), (4, 4))  # of 16 pixels


def plain_cells(maps):
    """Means over 4 x 4 of (..., H, W)."""
    return maps.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4)).mean((-3, -1))


def plain_hues(images):
    red, green, blue = plain_cells(images).unbind(1)
    return torch.stack([red - blue, 2 * green - red - blue])


def plain_texture(images):
    ones = torch.ones(3, 1, 3, 3)
    sums, counts = (F.conv2d(x, ones, padding=1, groups=3) for x in (images, images * 0 + 1))
    return (plain_cells((images - sums / counts).square().sum(1)) + 1e-4).sqrt()


def plain_perceptual(layers, *pair):
    for layer in layers:
        pair = [layer(x) for x in pair]
        one, other = (F.normalize(x) for x in pair)
        yield (one - other).square().sum(1).mean()
        pair = [F.avg_pool2d(x, 2) for x in pair]


def plain_jumps(images):
    """Of cells, along rows and columns: jumps inside squares of 2 x 2 pixels, and between them."""
    for lines in (images, images.transpose(2, 3)):
        squares = torch.zeros_like(lines[:, 0])
        squares[..., :-1] = (lines[..., 1:] - lines[..., :-1]).square().sum(1)
        cells = squares.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # (B, h, 4, w, 4)
        for first in (0, 1):
            yield (cells[..., [first, first + 2]].mean((2, 4)) + 1e-4).sqrt()


def plain_spectrum(images):
    """The maps of the 55 frequencies, each a sum over the pixels of every window."""
    place = torch.arange(8) + 0.5
    for u, v in itertools.product(range(8), range(8)):
        if max(u, v) >= 3:
            wave = torch.cos(math.pi * u * place / 8)[:, None] * torch.cos(math.pi * v * place / 8)
            wave = wave / wave.square().sum().sqrt()
            found = F.conv2d(images, wave.expand(3, 1, 8, 8), stride=8, groups=3).square().sum(1)
            yield (F.avg_pool2d(found, 2, stride=1) + 1e-3).sqrt()


def plain_loss(codec, images, stops, layers, variance, is_transposed):
    tokens = tokenizer.encode(codec, images, SIDES)
    features = tokenizer.encode_features(codec, images)
    f_hats = [*tokenizer.f_hat_by_scale(codec, tokens, SIDES)]
    decoded = tokenizer.decode_unclamped(codec, f_hats[-1])
    rest = decoded - images
    expected = rest.square().mean() + 0.5 * rest.abs().mean()
    for dim in (2, 3):
        expected += 0.25 * rest.diff(dim=dim).abs().mean()
    expected += 0.25 * (plain_texture(decoded) - plain_texture(images)).abs().mean()
    for ours, theirs in zip(plain_jumps(decoded), plain_jumps(images)):
        expected += 0.72 / 4 * (ours - theirs).abs().mean()
    for ours, theirs in zip(plain_spectrum(decoded), plain_spectrum(images)):
        expected += 2.2 / 55 * (ours - theirs).abs().mean()
    seen = [x.transpose(2, 3) if is_transposed else x for x in (decoded, images)]
    expected += 0.08 * sum(plain_perceptual(layers, *seen))
    expected += 0.28 * plain_hues(rest).square().mean() / (variance + 0.01)
    errors = []
    for row in (0, 4, 8):  # every fourth is decoded from coarse scales too
        f_hat = f_hats[stops[row]][row : row + 1]
        errors.append(F.mse_loss(tokenizer.decode_unclamped(codec, f_hat), images[row : row + 1]))
    expected += 0.5 * torch.stack(errors).mean()
    quantisation = torch.stack([F.mse_loss(f_hat, features) for f_hat in f_hats]).mean()
    return (expected + (1 + 0.1) * quantisation).item()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_loss_is_the_sum_of_its_terms(is_transposed):
    layers = torch.nn.ModuleList()
    for inputs, outputs in ((3, 4), (4, 5)):
        parts = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs)
        layers.append(torch.nn.Sequential(*parts, torch.nn.SiLU()).eval())  # no zero vectors
    codec = small_codec(attention=False, fold=2, seed=7)
    images = normal(10, 3, 16, 16).tanh().float()
    coarse, stops = torch.tensor([0, 4, 8]), torch.tensor([2, 0, 1])
    weights = dict(texture_weight=0.25, jump_weight=0.72, spectrum_weight=2.2)
    result = tokenizer.training_loss(
        codec,
        images,
        SIDES,
        coarse,
        stops,
        hue_variance=0.2,
        perceptual_layers=layers,
        is_transposed=is_transposed,
        images_per_coarse=10 / 3,
        **weights,
    )
    stops = dict(zip(coarse.tolist(), stops.tolist()))
    expected = plain_loss(codec, images, stops, layers, 0.2, is_transposed)
    assert result["loss"].item() == pytest.approx(expected, rel=1e-4)


OURS = small_codec(multipliers=(1, 2))
levels = st.lists(st.integers(1, 2), min_size=1, max_size=3)


@given(levels, st.integers(1, 2), st.booleans(), seeds)
def test_init_is_a_pure_function_and_fits(multipliers, blocks, attention, seed):
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


def example(batches):
    """Runs the training loop of tokenizer's docstring; the squared error of each step."""
    errors = []

    def training_loss(*arguments):
        made = tokenizer.training_loss(*arguments)
        errors.append(made["error"].item())
        return made

    values = vars(tokenizer) | dict(training_loss=training_loss)
    for line in doctest.DocTestParser().get_examples(tokenizer.__doc__):
        if line.source.startswith("batches = "):
            values["batches"] = batches
        else:
            exec(line.source, values)  # noqa: S102
    return errors


def test_the_training_loop_of_the_docstring_learns():
    """Squares of two colours, at random places, on a shade of grey."""
    torch.manual_seed(0)
    batches = []
    for _ in range(90):
        images = torch.rand(8, 1, 1, 1).expand(8, 3, 16, 16) - 0.5
        images = images.clone()
        for image, (row, column) in zip(images, torch.randint(0, 9, (8, 2)).tolist()):
            color = torch.tensor([0.8, -0.8, -0.8]) if row % 2 else torch.tensor([-0.8, 0.2, 0.8])
            image[:, row : row + 8, column : column + 8] = color[:, None, None]
        batches.append(images)
    errors = example(batches)
    first, last = np.mean(errors[:5]), np.mean(errors[-10:])
    assert last < first / 3


def test_without_a_hue_variance_it_is_that_of_the_batch():
    images, nothing = normal(4, 3, 6, 8).tanh().float(), torch.tensor([], dtype=torch.int64)
    given = OURS, images, SCALES, nothing, nothing
    variance = tokenizer.measure_hue_variance(images)
    ours, same, other = (
        tokenizer.training_loss(*given, hue_variance=x)["loss"] for x in (None, variance, 0.0)
    )
    assert torch.equal(ours, same) and ours < other
    assert torch.equal(ours, tokenizer.training_loss(*given)["loss"])


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
        coarse = torch.tensor([0]), torch.tensor([1])
        refused("^images: got .*, expected", tokenizer.training_loss, OURS, bad, SCALES, *coarse)
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
        for name, given in (("encode", IMAGES), ("decode", TOKENS), ("next_scale_inputs", TOKENS)):
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
