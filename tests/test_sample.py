"""Sampling against a plain loop, exact draws, editing, the command."""

import copy
import io
import itertools
import math
import os
import re
import sys
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN,
    close,
    contents,
    full_disk,
    leaves_equal,
    normal,
    pyramids,
    quantiser,
    random_tokens,
    refused,
    scrambled,
    small_codec,
    status_of,
    tree,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

pytestmark = pytest.mark.usefixtures("own_folder")
SCALES = ((1, 1), (2, 2), (3, 4))

CODEC = small_codec()
PARAMS = scrambled(tree(SCALES, codes=16, code_dim=8, random=False), scale=0.15)
PARAMS = pytree.tree_map(torch.Tensor.float, PARAMS)
OWN = sample.own_options(PARAMS)
PLAIN = {name: branch for name, branch in PARAMS.items() if name != "masked"}
LABELS = torch.tensor([2, 0, 3])


# The method, against plain loops


def slow_filter(logits, top_k, top_p):
    """The codes of one token's logits (a list) that stay, in their own order."""
    codes = range(len(logits))
    if 0 < top_k < len(logits):
        least = sorted(logits)[-top_k]
        codes = [code for code in codes if logits[code] >= least]
    total = sum(math.exp(logits[code]) for code in codes)

    def betters(code):
        return sum(math.exp(logits[other]) for other in codes if logits[other] > logits[code])

    return [code for code in codes if top_p == 1 or betters(code) / total < top_p]


def slow_draw(logits, codes, uniform):
    """(token, confidence) of one token, from these codes; uniform None draws the likeliest."""
    weights = [math.exp(logits[code]) for code in codes]
    sums = list(itertools.accumulate(weights))
    if uniform is None:
        token = max(codes, key=logits.__getitem__)
    else:
        token = codes[next(i for i, sum_ in enumerate(sums) if sum_ > uniform * sums[-1])]
    return token, math.exp(logits[token]) / sums[-1]


def slow_shares(keeps, k, hidden, total):
    """What an image keeps at each pass with only so many of a scale's tokens hidden."""
    if k > 0 and len(keeps) == 1 and 0 < hidden < total:
        return 0, hidden  # once more by the branch that sees the given ones
    done = [math.ceil(hidden * sum_ / total) for sum_ in itertools.accumulate(keeps, initial=0)]
    return [after - before for before, after in itertools.pairwise(done)]


def slow_steps(params, codec, label, seed, options, known=None):
    """(scale, pass, tokens, hidden places), f_hat of one image, as the description says it."""
    scales, rows = hmar.scales(params), torch.tensor([[label], [3]])  # 3: no class
    caches = [None, None]
    if options["is_causal"]:
        caches = [[[] for _ in range(hmar.depth(params))] for _ in rows]
    f_hat = torch.zeros(1, codec["codebook"].shape[1], *scales[-1], dtype=torch.float64)
    for k, (h, w) in enumerate(scales):
        tokens, hidden, seen = [0] * (h * w), list(range(h * w)), [0] * (h * w)
        keeps = options["schedule"][k]
        if known is not None:
            f_hat = torch.where(known.outside, known.f_hats[k], f_hat)
            tokens = known.tokens[k][0].tolist()
            hidden = [place for place in hidden if not known.given[k][0, place]]
            keeps = slow_shares(keeps, k, len(hidden), h * w)
            left = known.features - f_hat
            seen = sample.evidence(codec["codebook"], left, known.outside, (h, w))[0]
        inputs = tokenizer.resize_to_scale(f_hat, (h, w))
        for number, keep in enumerate(keeps):
            mask = torch.tensor([[place in hidden for place in range(h * w)]])
            t, branch, given = options["guidance"], "next_scale", [inputs]
            if number:
                zeroed = mask if "own_input" in params["masked"] else None
                own = torch.tensor([tokens])
                own = tokenizer.own_inputs_of_scale(codec, own, k, scales, zeroed)
                t, branch, given = options["mask_guidance"], "masked", [inputs, own, mask]
            if len(scales) > 1:
                t = t * (k / (len(scales) - 1)) ** options["rise"]
            features = partial(hmar.branch_features, params, branch, k=k)
            both = [features(row, *given, cache=cache)[0] for row, cache in zip(rows, caches)]
            heat, numbers = options["temperature"], np.random.default_rng((seed, k, number))
            numbers, confidence = numbers.random(h * w), {}

            # one after another, after those near, which a head may look at
            for place in sorted(hidden, key=lambda place: place % w + 2 * (place // w)):
                near = hmar.near_tokens(params, torch.tensor([tokens]), k)[0, place]
                pair = [hmar.branch_logits(params, branch, x[place], near) for x in both]
                p, q = (logits.softmax(-1) for logits in pair)
                strength = t
                if options["soften"]:
                    divergence = (p * (p / q).log()).sum()
                    strength = t / (1 + (divergence / options["soften"]) ** 2)
                logits = (1 + strength) * pair[0] - strength * pair[1]
                logits = (logits + seen[place]) / (heat or 1)
                row = (logits - logits.max()).tolist()
                codes = slow_filter(row, options["top_k"], options["top_p"])
                uniform = numbers[place] if heat else None
                tokens[place], confidence[place] = slow_draw(row, codes, uniform)
            order = sorted(hidden, key=lambda place: (-confidence[place], place))
            hidden = sorted(order[keep:])
            grown = f_hat + tokenizer.contribution(codec, torch.tensor([tokens]), k, scales)
            yield (k, number, list(tokens), hidden), grown[0]
        f_hat = grown


def some_known(scales, seed):
    counts = tokenizer.lengths(scales)
    tokens, draws = (random_tokens(1, scales, 5, seed + i) for i in range(2))
    given = (draws < 3).split(counts, 1)
    features, *f_hats = normal(len(scales) + 1, 1, 4, *scales[-1], seed=seed)
    outside = given[-1].view(1, 1, *scales[-1])
    return sample.Known(tokens.split(counts, 1), given, f_hats, features, outside)


@st.composite
def schedules(draw, scales):
    """Of each scale but the first, its tokens cut at random places; a pass may keep none."""
    passes = []
    for k, (h, w) in enumerate(scales):
        cuts = sorted(draw(st.lists(st.integers(0, h * w), max_size=3))) if k else []
        passes.append(tuple(b - a for a, b in itertools.pairwise([0, *cuts, h * w])))
    return tuple(passes)


@settings(max_examples=40)
@given(pyramids(3, 3), st.data(), st.integers(0, 3), st.booleans(), st.booleans())
def test_passes_are_those_of_a_plain_loop(scales, data, batch, own_input, looks):
    """Of a head that looks at neighbours one token after another."""
    seed, is_causal = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([False, batch > 0]))
    one_pass = st.just([[count] for count in tokenizer.lengths(scales)])
    options = dict(
        is_causal=is_causal,
        schedule=data.draw(one_pass if is_causal else schedules(scales)),
        guidance=data.draw(st.sampled_from([0, 1.5, 4])),
        mask_guidance=data.draw(st.sampled_from([0, 1.5])),
        rise=data.draw(st.sampled_from([0, 1, 2])),
        soften=data.draw(st.sampled_from([0, 0.1, 2])),
        temperature=data.draw(st.sampled_from([0, 0.5, 1.0, 3.0])),
        top_k=data.draw(st.integers(0, 6)),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.4])),
    )
    params = tree(scales, own_input=own_input, neighbours=looks, seed=seed)
    codec, labels = quantiser(5, 4, seed=seed), torch.arange(max(1, batch)) * 2 % 4
    known = some_known(scales, seed) if batch == 0 else None
    steps = list(sample.steps(params, codec, labels, seed=seed, known=known, **options))
    for i, label in enumerate(labels.tolist()):
        slow = slow_steps(params, codec, label, seed + i, options, known)
        for step, (expected, f_hat) in zip(steps, slow, strict=True):
            hidden = step.hidden[i].nonzero().flatten().tolist()
            assert (step.scale, step.number, step.tokens[i].tolist(), hidden) == expected
            close(step.f_hat[i], f_hat)


def test_guidance_rises_over_the_scales_by_a_power():
    """The middle of three scales has a quarter of it as a square, half of it as a line."""
    middles = []
    for guidance, rise in ((4, 2), (2, 1), (4, 1)):
        options = dict(schedule=0, soften=0, guidance=guidance, rise=rise)
        _, middle, _ = sample.steps(PARAMS, CODEC, torch.arange(60) % 3, **options)
        middles.append(middle.tokens)
    assert torch.equal(*middles[:2]) and not torch.equal(*middles[1:])


TOP_P = st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0])


@given(st.integers(1, 12), st.integers(0, 14), TOP_P, st.booleans(), st.integers(0, 999))
@example(7, 4, 0.9, True, 1)
def test_filters_are_those_of_plain_loops(codes, top_k, top_p, tied, seed):
    logits = normal(9, codes, seed=seed, scale=2)
    logits = logits.round() if tied else logits
    for token, kept in zip(logits.tolist(), sample.filter_logits(logits, top_k, top_p).tolist()):
        stay = slow_filter(token, top_k, top_p)
        assert kept == [token[code] if code in stay else -math.inf for code in range(codes)]


def test_a_draw_never_falls_on_a_code_that_was_ruled_out():
    logits = torch.tensor([-math.inf, 5.0, -math.inf, -35.0, -math.inf]).expand(2, 5)
    tokens, _ = sample.draw(logits, torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert tokens[0] == 1 and tokens[1] in (1, 3)


@given(pyramids(5, 5), st.integers(0, 30))
def test_schedules_sum_to_their_scales(scales, passes):
    counts = tokenizer.lengths(scales)
    for k, keeps in enumerate(sample.masked_schedule(scales, passes)):
        assert sum(keeps) == counts[k] and min(keeps) >= 1
        assert len(keeps) == (min(passes + 1, counts[k]) if k else 1)
    assert [sum(keeps) for keeps in sample.published_schedule(scales)] == counts
    cosine = [13, 36, 57, 71, 79]  # round(256 (1 - cos)), differenced
    assert sample.masked_schedule(((1, 1), (16, 16)), 4)[1] == cosine


# Images


def test_a_caller_chooses_what_the_next_scale_is_drawn_from():
    maps = []
    for step in sample.steps(PARAMS, CODEC, LABELS, seed=np.int64(5)):
        if not step.hidden.any():
            maps.append(step.tokens)
            if step.scale == 1:
                step.f_hat[:] = step.f_hat[1].clone()  # the second draft goes on in all rows
    tokens = torch.cat(maps, 1)
    tokens[:, :5] = tokens[1, :5].clone()
    close(step.f_hat, tokenizer.accumulate(CODEC, tokens, SCALES), 1e-6)


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(temperature=0, top_k=3)])
def test_images_depend_on_arguments_alone(options):
    given = PARAMS, CODEC, torch.tensor([2, 0, 3, 1, 2])
    seeds = [7, 3, 11, 4, 2**40]
    before, state = copy.deepcopy(given), torch.get_rng_state()
    images, tokens = sample.generate(*given, seed=seeds, **options)
    assert torch.equal(torch.get_rng_state(), state) and leaves_equal(before, given)
    close(images, tokenizer.decode(CODEC, tokens, SCALES).detach(), 1e-5)
    for batch in ([0], [4, 2], [3, 1, 0], [1, 1]):
        options["seed"] = [seeds[i] for i in batch]
        own_images, own_tokens = sample.generate(PARAMS, CODEC, given[2][batch], **options)
        assert torch.equal(own_tokens, tokens[batch])
        close(own_images, images[batch], 1e-5)


def blocks(depth):
    """A tree's trunk at this depth."""
    return dict(trunk=PARAMS["trunk"] * (depth - 1))  # a block is the branch's


def test_published_trees_are_sampled_as_published():
    common = dict(mask_guidance=0, rise=1, soften=0)
    for depth, guidance, top_k in ((2, 1.7, 1000), (20, 1.9, 950), (24, 2.1, 900), (30, 1.6, 650)):
        expected = common | dict(is_causal=False, guidance=guidance, top_k=top_k, top_p=0.99)
        assert sample.published_options(PLAIN | blocks(depth)) == expected
        expected["schedule"] = [[1], [1, 3], [12]]
        assert sample.published_options(PARAMS | blocks(depth)) == expected
        expected = common | dict(is_causal=True, guidance=1.5, top_k=900, top_p=0.96)
        assert sample.published_options(PLAIN | blocks(depth), is_causal=True) == expected


@pytest.mark.parametrize(
    "depth, many, few, mask_guidance, rise, temperature",
    [
        (1, 7 * (174 / 298) ** 0.72, 7, 3, 2, 0.95),
        (2, 7 * (174 / 298) ** 0.72, 7, 3, 2, 0.95),
        (3, 4.57 * (194 / 298) ** 0.25 * 2 / 3, 4.6, 2, 1, 0.9),
        (9, 1.5, 6.9 * 2 / 9, 1.5, 1, 0.9),
    ],
)
def test_own_options_follow_depth_and_scales(depth, many, few, mask_guidance, rise, temperature):
    sides = 1, 4, 5, 16  # 298 tokens
    positions = [torch.zeros(side, side, 1) for side in sides]
    none, one, two = (sample.masked_schedule([(n, n) for n in sides], i) for i in range(3))
    blind = PARAMS | blocks(depth)
    looks = blind | dict(next_scale=blind["next_scale"] | dict(neighbours={}))
    for params, heat, passes, of_edits in (blind, 1, two, two), (looks, temperature, none, one):
        assert sample.own_options(params)["guidance"] == pytest.approx(few)  # of 17 tokens
        expected = dict(mask_guidance=mask_guidance, rise=rise, soften=0.1, temperature=heat)
        expected |= dict(schedule=passes, top_k=0, top_p=1, is_causal=False)
        options = sample.own_options(params | dict(positions=positions))
        assert options == expected | dict(guidance=pytest.approx(many))
        edits = sample.own_options(params | dict(positions=positions), is_edit=True)
        assert edits == options | dict(schedule=of_edits)


# Editing


def picture(batch, seed=0):
    return torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


MASKS = torch.rand(6, 1, 6, 8, generator=torch.Generator().manual_seed(1)) < 0.2
for index, left in enumerate((8, 0, 4, 7)):  # hides nothing, all, half, a column
    MASKS[index] = torch.arange(8) >= left
HALF = MASKS[[2, 2, 2]]


@pytest.mark.parametrize(
    "params, options",
    [(PLAIN, {}), (PARAMS, {}), (PARAMS, dict(is_causal=True))]  # VAR takes one pass a scale
    + [(PARAMS, dict(schedule=keeps)) for keeps in ([[1], [4], [12]], [[1], [0, 4], [3, 0, 9]])],
)
def test_each_image_is_edited_as_alone(params, options):
    """Outside it stays; under a full mask it is as generated."""
    images, labels = picture(6), torch.tensor([1, 2, 0, 2, 3, 0])
    with (
        mock.patch.object(sample, "images_at_once", return_value=4),
        mock.patch.object(tokenizer, "encoder", wraps=tokenizer.encoder) as encoder,
        mock.patch.object(tokenizer, "decoder", wraps=tokenizer.decoder) as decoder,
    ):
        edited = sample.edit(params, CODEC, images, MASKS, labels, seed=9, **options)
    for network in (encoder, decoder):
        assert [len(call.args[0]) for call in network.call_args_list] == [4, 2]
    assert torch.equal(edited.masked_fill(MASKS, 0), images.masked_fill(MASKS, 0))
    for i in range(6):
        own = [x[i : i + 1] for x in (images, MASKS, labels)]
        close(edited[i : i + 1], sample.edit(params, CODEC, *own, seed=9 + i, **options), 1e-5)
    generated, _ = sample.generate(params, CODEC, labels[1:2], seed=10, **options)
    close(edited[1:2], generated, 1e-5)


def test_where_the_head_looks_edits_take_a_masked_pass_and_samples_none():
    params = tree(SCALES, codes=16, code_dim=8, neighbours=True, random=False)
    given = params, CODEC, picture(3), HALF, LABELS
    assert torch.equal(sample.edit(*given), sample.edit(*given, schedule=1))
    assert not torch.equal(sample.edit(*given), sample.edit(*given, schedule=0))
    drawn, _ = sample.generate(params, CODEC, LABELS)
    assert torch.equal(drawn, sample.generate(params, CODEC, LABELS, schedule=0)[0])


@given(st.integers(0, 2**20), st.floats(0, 1))
def test_pixels_under_the_mask_change_nothing(seed, share):
    generator = torch.Generator().manual_seed(seed)
    one, other, chance = (torch.rand(3, 3, 6, 8, generator=generator) for _ in range(3))
    mask = chance[:, :1] < share
    pictures = [torch.where(mask, hidden, 2 * one - 1) for hidden in (1 - 2 * other, math.nan)]
    edits = [sample.edit(PARAMS, CODEC, images, mask, LABELS, seed=seed) for images in pictures]
    assert torch.equal(*edits)


def test_hidden_pixels_become_like_their_surroundings():
    images, mask = torch.full((1, 3, 9, 9), 0.5), torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 4:] = True
    images[..., 3] = 0.9
    seen = sample.replace_hidden(images.masked_fill(mask, -1), mask, 3)[0, 0, 4]
    mean = (3 * 0.5 + 0.9) / 4
    close(seen[:4], images[0, 0, 4, :4])
    close(seen[4:], [mean + (0.9 - mean) * fade for fade in (0.75, 0.5, 0.25, 0, 0)], 1e-6)
    assert (sample.replace_hidden(images, mask | True, 3) == 0).all()
    large = torch.ones(1, 3, 300, 300, dtype=torch.float16)  # their sum is beyond its range
    corner = torch.zeros(1, 1, 300, 300, dtype=torch.bool)
    corner[..., 0, 0] = True
    assert (sample.replace_hidden(large, corner, 1) == 1).all()


def test_evidence_is_the_density_of_a_cell_seen_in_part():
    codebook, residual = normal(7, 3), normal(1, 3, 4, 4)
    outside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    outside[..., :2, :2] = torch.tensor([[0, 1], [1, 1]])  # of the first of 2 x 2 cells
    logits = sample.evidence(codebook, residual, outside, (2, 2))
    seen = residual[0][:, outside[0, 0]]  # (3, places)
    mean = seen.mean(1)
    variance = (seen - mean[:, None]).square().mean() * (1 - 0.75) / (4 * 0.75)
    close(logits[0, 0], -0.5 * (codebook - mean).square().sum(1) / variance)
    assert logits.shape == (1, 4, 7) and not logits[0, 1:].any()


def test_an_edit_knows_what_lies_outside_the_mask():
    mask, images = MASKS[[4, 5]], picture(2)
    mask[1] = torch.arange(6)[:, None] == 3  # beyond the upper cells' pixels, in their latents
    with mock.patch.object(sample, "steps", wraps=sample.steps) as steps:
        sample.edit(PARAMS, CODEC, images, mask, LABELS[:2])
    known = steps.call_args.kwargs["known"]
    tokens = torch.cat(known.tokens, 1)
    images = sample.replace_hidden(images, mask, 4 * tokenizer.downsampling(CODEC))
    assert torch.equal(tokens, tokenizer.encode(CODEC, images, SCALES))
    assert torch.equal(known.outside.flatten(1), known.given[-1])
    close(known.features, tokenizer.encode_features(CODEC, images))
    maps = [*tokenizer.f_hat_by_scale(CODEC, tokens, SCALES)]
    close(torch.stack(known.f_hats), torch.stack([0 * maps[0], *maps]).detach(), 1e-5)
    hidden = mask.unflatten(3, (4, -1)).unflatten(2, (3, -1)).any(5).any(3)  # latent cells
    for size, is_given in zip(SCALES, known.given):  # of 2 x 2 in 3 x 4 they overlap
        share_hidden = F.adaptive_avg_pool2d(hidden.float(), size)
        assert torch.equal(is_given, share_hidden.flatten(1) == 0)


def test_what_decoding_does_at_the_edge_is_taken_back():
    """Here it makes a grey picture lighter by 0.25: next to the edge all of it is taken off."""
    images, mask = torch.zeros(3, 3, 6, 8), MASKS[[2, 4, 5]]
    with mock.patch.object(tokenizer, "decode_features", return_value=images + 0.25):
        edited = sample.edit(PARAMS, CODEC, images, mask, LABELS)
    reach = 2 * tokenizer.downsampling(CODEC)
    for i, y, x in itertools.product(range(3), range(6), range(8)):
        outside = (~mask[i, 0]).nonzero()
        distance = (outside - torch.tensor([y, x])).abs().amax(1).min()
        expected = 0.25 * (distance / (reach + 1)).clamp(max=1)
        close(edited[i, :, y, x], expected.expand(3), 1e-6)


def test_bad_options_are_told():
    for message, options in {
        r"schedule: .*got \[1, 4\], expected \[1, 4, 12\]": dict(schedule=[[1], [4]]),
        r"codec: .*got \(32, 8\), expected \(16, 8\)": dict(codec=small_codec(codes=32)),
        "seed: .*got 2, expected 3": dict(seed=[1, 2]),
        r"schedule \(.*: got .* no masked branch": dict(params=PLAIN, schedule=1),
        "schedule: got .* at the first scale": dict(schedule=[[1, 0], [4], [12]]),
        "logits: got nan": dict(soften=math.nan),
        r"schedule \(--mask-steps\): got .* no masked": dict(is_causal=True, schedule=1),
        r"masked passes \(--mask-steps\): got -1": dict(schedule=-1),
        "top_p: got nan": dict(top_p=math.nan),
        "rise: got -1": dict(rise=-1),
        "labels: got 0 to 4, expected 0 to 3": dict(labels=[0, 4, 1]),
        "labels: got torch.float32": dict(labels=[0.0, 1.0, 1.0]),
        "scales: got": dict(params=PARAMS | dict(positions=PARAMS["positions"][::-1])),
    }.items():
        options = dict(params=PARAMS, codec=CODEC, labels=LABELS) | options
        refused(f"^{message}", sample.generate, **options)

    black = torch.zeros(3, 3, 6, 8, dtype=torch.uint8)  # which in [-1, 1] would be grey
    refused("^images: got .*uint8", sample.edit, PARAMS, CODEC, black, HALF, LABELS)
    refused("^labels: got 1, expected ", sample.edit, PARAMS, CODEC, picture(3), HALF, LABELS[:1])
    for mask in (HALF.byte(), HALF[:2]):
        message = r"^mask: expected a bool tensor \(3, 1, 6, 8\)"
        refused(message, sample.edit, PARAMS, CODEC, picture(3), mask, LABELS)


# The command


def odd(leaf):
    return leaf.double().transpose(0, -1).contiguous().transpose(0, -1)


def run_folder(folder, params=PARAMS, name="hmar.pt", **record):
    """Of weights that are not plain yet."""
    folder.mkdir(exist_ok=True)
    torch.save(pytree.tree_map(odd, params), folder / name)
    torch.save(pytree.tree_map(odd, CODEC), folder / "tokenizer.pt")
    sample.write_json(folder / "args.json", record)


def scaled(tree, factor):
    return pytree.tree_map(lambda leaf: factor * leaf, tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    names = ["disc", "ring", "star"]
    run_folder(folder, class_names=names, digests={"tokenizer.pt": sample.digest(CODEC)})
    decoder = CODEC | dict(post_quant_conv=scaled(CODEC["post_quant_conv"], 1e30))
    torch.save(decoder, folder / "decoder.pt")
    torch.save(scaled(CODEC, 2), folder / "codec.pt")
    torch.save(scaled(PARAMS, 1e20), folder / "large.pt")
    torch.save(scaled(PARAMS, math.nan), folder / "nan.pt")
    torch.save(print, folder / "code.pt")
    Image.fromarray(sample.to_bytes(picture(1))[0]).save(folder / "photo.png")
    Image.fromarray(HALF[0, 0].numpy()).save(folder / "mask.png")
    Image.new("L", (8, 8)).save(folder / "black.png")
    os.symlink("loop.png", folder / "loop.png")
    run_folder(folder / "plain")
    run_folder(folder / "cut")
    (folder / "cut" / "args.json").write_text("[{}]")
    run_folder(folder / "typed", class_names=3)
    run_folder(folder / "foreign", digests={"hmar.pt": "of another"})
    run_folder(folder / "deep")
    (folder / "deep" / "args.json").write_text("[" * 100_000)
    (folder / "cut" / "settings.json").write_bytes(b"\xff")
    return folder


def call(*flags):
    """The exit status of the command."""
    return status_of(sample.main, "--dtype", "fp32", "--device", "cpu", *flags)


def archived(*flags):
    path = f"{len(contents('.'))}.npz"
    assert call(*flags, "--out", path) == 0
    return np.load(path)["arr_0"]


def assert_drawn(pixels, labels, params=PARAMS, codec=CODEC, **options):
    """pixels (B, H, W, 3) are what `generate` makes of these labels."""
    images, _ = sample.generate(params, codec, torch.tensor(labels), **options)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - sample.to_bytes(images)).max() <= 1


def test_the_command_draws_the_same_images_in_every_form(run):
    flags = (run, "--labels", "star", "0", "--count", 3, "--seed", 5, "--out")
    for name in ("sheet.png", "growing.gif", "all.npz", "folder"):
        assert call(*flags, name) == 0
    labels, archive = [2, 2, 2, 0, 0, 0], np.load("all.npz")
    pixels = archive["arr_0"]
    assert_drawn(pixels, labels, seed=5, **OWN)
    assert archive["labels"].tolist() == labels
    assert contents("folder") == contents("all")
    names = [f"{i:06d}-{label}.png" for i, label in enumerate(labels)]
    assert sorted(contents("folder")) == [*names, "settings.json"]

    page, gif = Image.open("sheet.png"), Image.open("growing.gif")
    left = page.width - 3 * (64 + 2)  # images grow by whole pixels
    assert page.height == 2 * (48 + 2) and left > 12
    rows = np.asarray(page).reshape(2, 50, -1, 3)
    assert np.array_equal(rows[:, :48:8, left : left + 64 : 8], pixels[::3])
    assert gif.n_frames == 7 and gif.size == page.size  # a page a pass
    for number, step in enumerate(sample.steps(PARAMS, CODEC, torch.tensor(labels), seed=5)):
        gif.seek(number)
        shown = np.asarray(gif.convert("RGB"), int)[:48:8, left : left + 64 : 8]
        truth = sample.to_bytes(tokenizer.decode_features(CODEC, step.f_hat[:1]).detach())[0]
        assert np.abs(shown - truth).mean() < 3  # of a palette


def test_an_interrupted_folder_goes_on_in_two_processes(run, capsys, monkeypatch):
    """Files are written two at a time; whoever then finds all of them there packs them."""
    together, whole_file = threading.Barrier(2), sample.whole_file
    flags = (run, "--count", 4, "--out", "a.npz")

    def write_together(path):
        if path.suffix == ".png":
            together.wait(timeout=20)
        return whole_file(path)

    def stopped(effects, status, said, room=10**9):
        """How many images are there when `generate` had these effects."""
        with mock.patch.object(sample, "generate", side_effect=effects), full_disk(room):
            assert call(*flags) == status
        assert re.search(said, capsys.readouterr().err)
        return len([*Path("a").glob("*.png")])

    monkeypatch.setattr(sample, "images_at_once", lambda pixels: 2)
    monkeypatch.setattr(sample, "whole_file", write_together)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    some = sample.generate(PARAMS, CODEC, torch.tensor([0, 0]))
    assert stopped([some], 2, "settings.json.*: cannot be written: ", room=20) == 0
    assert stopped([KeyboardInterrupt], 130, "^sample.py: stopped\n$") == 0
    assert contents(".") == {}
    assert stopped([some, MemoryError], 2, "^sample.py: MemoryError\n$") == 2
    assert stopped([some], 2, "^sample.py: .*/000002-0.png: cannot be written: ", room=20) == 2
    with pytest.raises(KeyError):  # a bug shows its traceback
        stopped([KeyError], None, "")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample, "whole_file", whole_file)
    before = os.stat("a/000001-0.png").st_ino
    Path("a.npz").write_bytes(b"old")
    for rank, batches in (("1", [[1, 3], [5, 7], [9, 11]]), ("0", [[0, 2], [4, 6], [8, 10]])):
        assert Path("a.npz").read_bytes() == b"old"
        monkeypatch.setenv("RANK", rank)
        with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
            assert call(*flags) == 0
        assert [made.kwargs["seed"] for made in generate.call_args_list] == batches
        assert ("wrote a.npz" in capsys.readouterr().out) == (rank == "0")
    assert os.stat("a/000001-0.png").st_ino == before  # though it was drawn again beside 3
    assert_drawn(np.load("a.npz")["arr_0"], [0] * 4 + [1] * 4 + [2] * 4)


def test_a_folder_is_of_one_setting(run, capsys):
    """Which the first that drew wrote there, even if another command, too, had found it empty."""
    flags = (run, "--count", 5000, "--out", "a")

    def draw(*_, seed, **options):
        if seed[0] == 1:
            assert contents("a") == {}
            assert call(*flags) == 130  # of seed 0, meanwhile
        if seed[0] == 50:
            raise KeyboardInterrupt
        return torch.zeros(50, 3, 6, 8), None

    seed, labels = (("--seed", 1), "seed 0 -> 1"), (("--labels", 2), "[0, 1, 2] -> [2]")
    with mock.patch.object(sample, "generate", draw):
        for other, said in (seed, seed, labels):
            assert call(*flags, *other) == 2
            assert said in capsys.readouterr().err
            files = contents("a")
            assert len(files) == 51 and len(files["settings.json"]) < 2000
            assert b'"soften": 0.1' in files["settings.json"]
    with mock.patch.object(sample, "own_options", return_value=dict(guidance=9)):  # a later version
        assert call(*flags) == 2
    assert "guidance 7 -> 9" in capsys.readouterr().err


def test_a_file_is_the_old_one_or_a_whole_new_one():
    path = Path("a.pt")
    path.write_text("old")

    killed = pytest.raises(KeyboardInterrupt)
    with mock.patch.object(os, "unlink"), killed, sample.whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert len(contents(".")) == 2 and path.read_text() == "old"

    with sample.whole_file(path) as file:  # another writer comes and goes meanwhile
        file.write(b"whole ")
        with sample.whole_file(path) as other:
            other.write(b"another")
        file.write(b"file")
    assert len(contents(".")) == 2 and path.read_text() == "whole file"


def test_the_command_edits(run):
    photo = Image.open(run / "photo.png")
    inner, photo = np.asarray(photo.resize((6, 4))), np.asarray(photo)
    edit = (run, "--edit", run / "photo.png", "--labels", "ring", "--count", 2)
    for pixels in archived(*edit, "--mask", run / "mask.png"):
        assert np.array_equal(pixels[:, :4], photo[:, :4]) and not np.array_equal(pixels, photo)
    for pixels in archived(*edit, "--pad", 0.2):
        assert pixels.shape == (6, 8, 3) and np.array_equal(pixels[1:5, 1:7], inner)
    archived(*edit, "--pad", 0.49)


@given(width=st.integers(3, 70), height=st.integers(3, 70))
def test_what_the_command_shows_knows_nothing_of_what_is_under_the_mask(width, height):
    """Though large photos are shrunk, and small ones enlarged."""
    hidden = np.zeros((height, width), bool)
    hidden[height // 2 :, width // 2 :] = True
    first = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    second = np.where(hidden[:, :, None], 255 - first, first)
    Image.fromarray(hidden).save("mask.png")
    shown = []
    for photo in first, second:
        Image.fromarray(photo).save("photo.png")
        flags = ["--edit", "photo.png", "--mask", "mask.png"]
        pixels, mask = sample.photo_and_mask(sample.parser().parse_args(["run", *flags]), (8, 6))
        shown.append(pixels.masked_fill(mask, 0))
    assert torch.equal(*shown)


def test_a_thin_stroke_of_a_large_mask_is_repainted(run):
    stroke = np.zeros((600, 800), np.uint8)
    stroke[:, 205:209] = 255
    Image.fromarray(stroke).save("stroke.png")
    flags = ["--edit", str(run / "photo.png"), "--mask", "stroke.png"]
    _, mask = sample.photo_and_mask(sample.parser().parse_args([str(run), *flags]), (8, 6))
    assert mask[..., 2].all() and mask.sum() == 6
    Image.new("RGBA", (8, 6)).save("stroke.png")  # all transparent: as white
    assert call(run, *flags) == 2


def test_a_run_before_its_masked_stage_is_drawn_and_told(capsys):
    run_folder(Path("run"), PLAIN, "next-scale.pt", flags=dict(causal=False))
    os.symlink("nothing", "run/hmar.pt")
    assert_drawn(archived("run", "--count", 1), [0, 1, 2], schedule=0)
    assert "next-scale.pt: without the masked branch" in capsys.readouterr().err


def test_names_go_before_numbers():
    run_folder(Path("run"), class_names=["1", "2", "0"])
    assert_drawn(archived("run", "--labels", "1", "--count", 1), [0])
    assert len(archived("run", "--count", 1)) == 3


def test_what_a_killed_sampler_left_goes(run):
    """But not what another one is writing."""
    assert call(run, "--count", 1, "--out", "folder") == 0
    token = "0123456789abcdef"
    left, fresh, others = (Path(f"folder/{name}.tmp") for name in (f"a.{token}", f"b.{token}", "c"))
    for path in left, fresh, others:
        path.write_text("half")
    for path in left, others:
        os.utime(path, (0, 0))
    assert call(run, "--count", 1, "--out", "folder") == 0
    assert not left.exists() and fresh.exists() and others.exists()
    Path("mine").mkdir()
    others.rename("mine/c.tmp")
    assert call(run, "--out", "mine") == 2


def test_of_two_that_begin_a_folder_at_once_one_is_refused(run, capsys):
    write = sample.write_json

    def write_late(path, value):  # another was first
        write(path.with_name("settings.json"), value | dict(seed=7))
        write(path, value)

    with mock.patch.object(sample, "write_json", write_late):
        assert call(run, "--count", 1, "--out", "a") == 2
    assert "seed 7 -> 0" in capsys.readouterr().err and len(contents("a")) == 1
    Path("b.npz").mkdir()
    with mock.patch.object(os, "link", side_effect=OSError("no links here")):
        assert call(run, "--count", 1, "--out", "b.npz") == 0
    assert len(contents("b.npz")) == 4


def test_flags_reach_the_sampler(run):
    flags = "--labels ring --count 2 --guidance 2.5 --soften 3 --mask-guidance 0.5 --top-k 3"
    flags += " --top-p 0.7 --temperature 0.7 --seed 9 --mask-steps 2"
    options = dict(guidance=2.5, soften=3, mask_guidance=0.5, top_k=3, top_p=0.7, temperature=0.7)
    pixels = archived(run, *flags.split())
    assert_drawn(pixels, [1, 1], **options, seed=9, schedule=sample.masked_schedule(SCALES, 2))

    run_folder(Path("run"), PLAIN, "next-scale.pt", flags=dict(causal=True))
    pixels = archived("run", "--count", 1)
    assert_drawn(pixels, [0, 1, 2], PLAIN, is_causal=True)
    os.unlink("run/args.json")
    assert call("run") == 2  # not as HMAR


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files here")
def test_published_weights_are_sampled_as_published():
    Path("args.json").write_text("not of a run")
    golden = torch.load(GOLDEN / "published_A.pt")["state"]
    codec = tokenizer.from_published(golden["vqvae"])
    for name in golden:
        torch.save(golden[name], name)
    flags = ("--tokenizer", "vqvae", "--scales", 1, 2, 3, "4x4", "--labels", 2)
    for name in ("var", "nsp", "hmar"):
        params = hmar.from_published(golden[name], ((1, 1), (2, 2), (3, 3), (4, 4)))
        options = sample.published_options(params, is_causal=name == "var")
        pixels = archived(name, *flags, "--count", 2)
        assert_drawn(pixels, [2, 2], params, codec, **options)
    for scales in ([1, 2, 3, 4], ["1x1", "1x4", "1x9", "1x16"]):  # of as many tokens
        status = call("var", "--tokenizer", "vqvae", "--scales", *scales, "--out", "folder")
        assert status == (0 if scales[1] == 2 else 2)


BAD_INPUT = f"""
. --out a.gif --labels{51 * " 0"}  --labels: got 51, expected at most 50
. --edit loop.png --pad 0.2  missing or no regular file: loop.png
. --labels 3  --labels: got '3', expected 0 to 2 or such as disc, ring, star
. --top-p x  argument --top-p: invalid float value: 'x'
. --top-p 95  top_p: got 95
. --count 100000000000000  can't allocate memory
. --count 0  --count: got 0, expected 1 or more
. --out a.gif --count 51  --count: got 51
. --seed -1  seed: got -1
. --out hmar.pt/x.png  File exists: 'hmar.pt'
. --out .  --out: . holds something else: count None -> 8
. --out cats.bmp  cats.bmp, expected .png, .jpg
. --out v1.2  v1.2, expected .png, .jpg
. --out cut.npz  cut/settings.json: expected a JSON object
cut  cut/args.json: expected a JSON object
. --out photo.png --edit photo.png --pad 0.2  is also to be read
none  none: cannot be read: FileNotFoundError
code.pt  code.pt: cannot be read
nan.pt  nan.pt: no weights
large.pt  logits: got nan or infinity
plain --tokenizer decoder.pt  images: got nan
. --tokenizer hmar.pt  hmar.pt: no weights
. --tokenizer codec.pt  args.json: tells of another tokenizer.pt than this
. --pad 0.2  --edit: expected with --mask, or --pad
. --edit photo.png --mask black.png  --mask: expected white
. --edit photo.png --pad 0.2 --out a.gif  .gif (not of edits)
. --soften -1  soften: got -1.0
. --temperature -1  temperature: got -1.0
. --out {240 * "x"}.png  .png: cannot be written: [Errno
deep  deep/args.json: expected a JSON object
typed  typed/args.json: class_names: got 3
foreign  foreign/args.json: tells of another hmar.pt
. --scales 1 2 3  --scales: got some, but a run has its own
. --device cuda  --device: got cuda, but no GPU 0 is here
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line_and_status_2(run, tmp_path, capsys, monkeypatch, line):
    flags, message = line.split("  ")
    monkeypatch.chdir(run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = contents(run)
    status = call("--out", tmp_path / "folder", *flags.split())
    printed = capsys.readouterr().err
    assert status == 2 and message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir()) and contents(run) == before


def test_names_of_any_characters_are_drawn_and_printed(monkeypatch):
    out = "é\u4e2d.png"
    run_folder(Path("run"), class_names=["é\u4e2d", "\ud800\x1b\n" * 40, "a"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert call("run", "--labels", "é\u4e2d", 1, 2, "--count", 1, "--out", out) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"wrote \\xe9\\u4e2d.png\n"
    assert Image.open(out).height == 3 * 50
