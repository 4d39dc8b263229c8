"""Sampling against a plain loop, exact draws, editing, the command."""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import resource
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    close,
    contents,
    double,
    leaves_equal,
    normal,
    pyramids,
    quantiser,
    random_tokens,
    refused,
    scrambled,
    small_codec,
    tree,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "published_A.pt"
SCALES = ((1, 1), (2, 2), (3, 4))
quick = settings(max_examples=25, deadline=None)

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


def scripted(code_dim, codes, seed):
    """A network for a plain loop: its logits are tables, and a little of what it is given."""
    read = normal(code_dim, codes, seed=seed)

    def predict(params, branch, labels, inputs, own=None, mask=None, k=0, cache=None):
        shape = 4, params["positions"][k][..., 0].numel(), codes
        logits = normal(*shape, seed=seed + 10 * k + len(branch))[labels]
        if branch == "masked":
            logits = logits - 2 * own @ read + mask[..., None] * read[0]
        return logits + inputs @ read

    return predict


def slow_shares(keeps, k, hidden, total):
    """What an image keeps at each pass with only so many of a scale's tokens hidden."""
    if k > 0 and len(keeps) == 1 and 0 < hidden < total:
        return 0, hidden  # once more by the branch that sees the given ones
    done = [math.ceil(hidden * sum_ / total) for sum_ in itertools.accumulate(keeps, initial=0)]
    return [after - before for before, after in itertools.pairwise(done)]


def slow_near(tokens, y, x, w, none):
    """[left, above left, above, above right] of a place in a map of width w."""
    beside = (y, x - 1), (y - 1, x - 1), (y - 1, x), (y - 1, x + 1)
    return [tokens[i * w + j] if i >= 0 and 0 <= j < w else none for i, j in beside]


def slow_steps(predict, params, codec, label, seed, options, known=None):
    """(scale, pass, tokens, hidden places), f_hat of one image, as the description says it."""
    scales, rows = hmar.scales(params), torch.tensor([[label], [3]])  # 3: no class
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
                t = t * k / (len(scales) - 1)
            both = [predict(params, branch, row, *given, k=k)[0] for row in rows]
            heat, looks = options["temperature"] or 1, params[branch].get("neighbours")
            numbers = np.random.default_rng((seed, k, number)).random(h * w)

            # one after another where the head looks at neighbours, else all at once
            grid, confidence = np.ndindex(h, w), {}
            waves = [x + 2 * y if looks else 0 for y, x in grid]
            for wave in sorted(set(waves)):
                places = [place for place in range(h * w) if waves[place] == wave]
                for place in set(places).intersection(hidden):
                    pair = [logits[place] for logits in both]
                    if looks:
                        near = torch.tensor(slow_near(tokens, *divmod(place, w), w, 5))
                        pair = [hmar.look_at_neighbours(x, near, **looks) for x in pair]
                    p, q = (logits.softmax(-1) for logits in pair)
                    strength = t
                    if options["soften"]:
                        divergence = (p * (p / q).log()).sum()
                        strength = t / (1 + (divergence / options["soften"]) ** 2)
                    logits = (1 + strength) * pair[0] - strength * pair[1]
                    logits = (logits + seen[place]) / heat
                    row = (logits - logits.max()).tolist()
                    codes = slow_filter(row, options["top_k"], options["top_p"])
                    uniform = numbers[place] if options["temperature"] else None
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


@quick
@given(
    pyramids(3, 3), st.data(), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_passes_are_those_of_a_plain_loop(scales, data, batch, own_input, looks, seed):
    """Of a head that looks at neighbours one token after another."""
    options = dict(
        schedule=data.draw(schedules(scales)),
        guidance=data.draw(st.sampled_from([0, 1.5, 4])),
        mask_guidance=data.draw(st.sampled_from([0, 1.5])),
        soften=data.draw(st.sampled_from([0, 0.1, 2])),
        temperature=data.draw(st.sampled_from([0, 0.5, 1.0, 3.0])),
        top_k=data.draw(st.integers(0, 6)),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.4])),
    )
    params = double(tree(scales, own_input=own_input, random=False))
    if looks:
        few = hmar.init(depth=1, classes=3, codes=5, width=5, heads=1, neighbours=True)
        for i, branch in enumerate((params["next_scale"], params["masked"])):
            branch["neighbours"] = scrambled(few["next_scale"]["neighbours"], seed + i, 1.0)
    codec = quantiser(5, 4, seed=seed)
    known = some_known(scales, seed) if batch == 0 else None
    predict, labels = scripted(4, 5, seed), torch.arange(max(1, batch)) * 2 % 4

    def see(params, branch, x, near):
        neighbours = params[branch].get("neighbours")
        return hmar.look_at_neighbours(x, near, **neighbours) if neighbours else x

    network = dict(branch_features=predict, branch_logits=see)
    with mock.patch.multiple(hmar, **network):
        steps = list(sample.steps(params, codec, labels, seed=seed, known=known, **options))
    for i, label in enumerate(labels.tolist()):
        slow = slow_steps(predict, params, codec, label, seed + i, options, known)
        for step, (expected, f_hat) in zip(steps, slow, strict=True):
            hidden = step.hidden[i].nonzero().flatten().tolist()
            assert (step.scale, step.number, step.tokens[i].tolist(), hidden) == expected
            close(step.f_hat[i], f_hat)


TOP_P = st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0])


@quick
@given(st.integers(1, 12), st.integers(0, 14), TOP_P, st.booleans(), st.integers(0, 999))
@example(7, 4, 0.9, True, 1)
def test_filters_are_those_of_plain_loops(codes, top_k, top_p, tied, seed):
    logits = normal(9, codes, seed=seed, scale=2)
    logits = logits.round() if tied else logits
    for token, kept in zip(logits.tolist(), sample.filtered(logits, top_k, top_p).tolist()):
        stay = slow_filter(token, top_k, top_p)
        assert kept == [token[code] if code in stay else -math.inf for code in range(codes)]


def test_a_draw_never_falls_on_a_code_that_was_ruled_out():
    logits = torch.tensor([-math.inf, 5.0, -math.inf, -35.0, -math.inf]).expand(2, 5)
    tokens, _ = sample.draw(logits, torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert tokens[0] == 1 and tokens[1] in (1, 3)


@quick
@given(pyramids(5, 5), st.integers(0, 30))
def test_schedules_sum_to_their_scales(scales, passes):
    counts = [h * w for h, w in scales]
    for k, keeps in enumerate(sample.masked_schedule(scales, passes)):
        assert sum(keeps) == counts[k] and min(keeps) >= 1
        assert len(keeps) == (min(passes + 1, counts[k]) if k else 1)
    assert [sum(keeps) for keeps in sample.published_schedule(scales)] == counts
    cosine = [13, 36, 57, 71, 79]  # round(256 (1 - cos)), differenced
    assert sample.masked_schedule(((1, 1), (16, 16)), 4)[1] == cosine


# Images


def test_a_caller_chooses_what_the_next_scale_is_drawn_from():
    maps = []
    for step in sample.steps(PARAMS, CODEC, LABELS, seed=[5, 6, 7]):
        if not step.hidden.any():
            maps.append(step.tokens)
            if step.scale == 1:
                step.f_hat[:] = step.f_hat[1].clone()  # the second draft goes on in all rows
    tokens = torch.cat(maps, 1)
    tokens[:, :5] = tokens[1, :5].clone()
    close(step.f_hat, tokenizer.accumulate(CODEC, tokens, SCALES), 1e-6)


REFINED = dict(schedule=sample.masked_schedule(SCALES, 3), mask_guidance=1.0, top_p=0.9)


@pytest.mark.parametrize(
    "params, options",
    [(PARAMS, {}), (PLAIN, dict(is_causal=True, soften=0.1)), (PARAMS, REFINED)]
    + [(PARAMS, dict(temperature=0, top_k=3, guidance=2.0))],
)
def test_images_depend_on_arguments_alone(params, options):
    labels, seeds = torch.tensor([2, 0, 3, 1, 2]), [7, 3, 11, 4, 2**40]
    before, state = copy.deepcopy([params, CODEC, labels]), torch.get_rng_state()
    images, tokens = sample.generate(params, CODEC, labels, seed=seeds, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert leaves_equal(before, [params, CODEC, labels])
    close(images, tokenizer.decode(CODEC, tokens, SCALES).detach(), 1e-5)
    for batch in ([0], [4, 2], [3, 1, 0], [1, 1]):
        own = dict(seed=[seeds[i] for i in batch], **options)
        own_images, own_tokens = sample.generate(params, CODEC, labels[batch], **own)
        assert torch.equal(own_tokens, tokens[batch])
        close(own_images, images[batch], 1e-5)


@pytest.mark.parametrize(
    "depth, guidance, top_k", [(2, 1.7, 1000), (20, 1.9, 950), (24, 2.1, 900), (30, 1.6, 650)]
)
def test_published_trees_are_sampled_as_published(depth, guidance, top_k):
    trunk = dict(trunk=PARAMS["trunk"] * (depth - 1))  # a block is the branch's
    expected = dict(mask_guidance=0, soften=0, is_causal=False, top_p=0.99)
    expected |= dict(guidance=guidance, top_k=top_k)
    assert sample.published_options(PLAIN | trunk) == expected
    expected["schedule"] = [[1], [1, 3], [12]]
    assert sample.published_options(PARAMS | trunk) == expected
    expected = dict(mask_guidance=0, soften=0, is_causal=True, top_p=0.96, guidance=1.5, top_k=900)
    assert sample.published_options(PLAIN | trunk, is_causal=True) == expected


@pytest.mark.parametrize(
    "depth, t, masked_t",
    [(1, 55 / 298**0.5, 5), (2, 55 / 298**0.5, 5), (4, 1.5, 5 / 8**0.5), (9, 1.5, 1.5)],
)
def test_own_options_follow_depth_and_scales(depth, t, masked_t):
    positions = [torch.zeros(side, side, 1) for side in (1, 4, 5, 16)]
    trunk = dict(trunk=PARAMS["trunk"] * (depth - 1), positions=positions)
    options = sample.own_options(PARAMS | trunk)
    assert [options["guidance"], options["mask_guidance"]] == pytest.approx([t, masked_t])
    few = sample.own_options(PARAMS | dict(trunk=trunk["trunk"]))
    assert few["guidance"] == pytest.approx(max(1.5, 0.9 * masked_t))
    refined = [[3, 9, 13], [34, 94, 128]] if depth > 2 else [[7, 18], [75, 181]]
    assert options["schedule"] == [[1], [16], *refined]


# Editing


def picture(batch, seed=0):
    return torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def masks(kind, batch):
    mask = torch.zeros(batch, 1, 6, 8, dtype=torch.bool)
    if kind == "random":
        return torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[..., {"empty": 8, "half": 4, "column": 7, "full": 0}[kind] :] = True
    return mask


HALF = masks("half", 3)


@pytest.mark.parametrize(
    "params, schedule",
    [(PLAIN, None), (PARAMS, None)]
    + [(PARAMS, ((1,), (4,), (12,))), (PARAMS, ((1,), (0, 4), (3, 0, 9)))],
)
def test_each_image_is_edited_as_alone(params, schedule):
    """Outside it stays; under a full mask it is as generated."""
    images, labels = picture(5), torch.tensor([1, 2, 0, 2, 3])
    mask = torch.cat([masks(kind, 1) for kind in ("empty", "full", "half", "random", "column")])
    with (
        mock.patch.object(sample, "at_once", return_value=2),
        mock.patch.object(tokenizer, "encoder", wraps=tokenizer.encoder) as encoder,
        mock.patch.object(tokenizer, "decoder", wraps=tokenizer.decoder) as decoder,
    ):
        edited = sample.edit(params, CODEC, images, mask, labels, seed=9, schedule=schedule)
    for network in (encoder, decoder):
        assert [len(call.args[0]) for call in network.call_args_list] == [2, 2, 1]
    assert torch.equal(edited.masked_fill(mask, 0), images.masked_fill(mask, 0))
    for i in range(5):
        own = [x[i : i + 1] for x in (images, mask, labels)]
        alone = sample.edit(params, CODEC, *own, seed=9 + i, schedule=schedule)
        close(edited[i : i + 1], alone, 1e-5)
    generated, _ = sample.generate(params, CODEC, labels[1:2], seed=10, schedule=schedule)
    close(edited[1:2], generated, 1e-5)


def test_evidence_is_the_density_of_a_cell_seen_in_part():
    codebook, residual = normal(7, 3), normal(1, 3, 4, 4)
    outside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    outside[..., :2, 1] = True  # half of the first of 2 x 2 cells
    logits = sample.evidence(codebook, residual, outside, (2, 2))
    seen = residual[0, :, :2, 1:2].flatten(1)  # (3, places)
    mean = seen.mean(1)
    variance = (seen - mean[:, None]).square().mean() * (1 - 0.5) / (4 * 0.5)
    close(logits[0, 0], -0.5 * (codebook - mean).square().sum(1) / variance)
    assert logits.shape == (1, 4, 7) and not logits[0, 1:].any()


def test_an_edit_knows_what_lies_outside_the_mask():
    mask, images = masks("random", 2), picture(2)
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
    hidden = mask.unflatten(3, (4, -1)).unflatten(2, (3, -1)).any(5).any(3)[:, 0]  # latent cells
    for (h, w), is_given in zip(SCALES, known.given):  # of 2 x 2 in 3 x 4 they overlap
        for y, x in itertools.product(range(h), range(w)):
            rows = hidden[:, y * 3 // h : -(-(y + 1) * 3 // h)]
            cell = rows[:, :, x * 4 // w : (x + 1) * 4 // w]
            assert torch.equal(is_given[:, y * w + x], ~cell.flatten(1).any(1))


def test_what_decoding_does_at_the_edge_is_taken_back():
    """Here it makes a grey picture lighter by 0.25: next to the edge all of it is taken off."""
    images, mask = torch.zeros(3, 3, 6, 8), masks("random", 3)
    mask[2] = HALF[0]
    lighter = images + 0.25
    with mock.patch.object(tokenizer, "decode_features", lambda codec, f_hat: lighter):
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
        "schedule: got .* no masked branch": dict(params=PLAIN, schedule=1),
        "schedule: got .* at the first scale": dict(schedule=[[1, 0], [4], [12]]),
        "logits: got nan": dict(soften=math.nan),
        "schedule: got several .* no masked branch": dict(is_causal=True, schedule=1),
        "masked passes: got -1": dict(schedule=-1),
        "top_p: got nan": dict(top_p=math.nan),
    }.items():
        options = dict(params=PARAMS, codec=CODEC, labels=LABELS) | options
        refused(f"^{message}", sample.generate, **options)

    # VAR edits in one pass a scale, though there is a masked branch
    sample.edit(PARAMS, CODEC, picture(3), HALF, LABELS, is_causal=True)

    black = torch.zeros(3, 3, 6, 8, dtype=torch.uint8)  # which in [-1, 1] would be grey
    for message, images, mask in (
        (r"mask: expected a bool tensor \(3, 1, 6, 8\)", picture(3), HALF.byte()),
        (r"mask: expected a bool tensor \(3, 1, 6, 8\)", picture(3), HALF[:2]),
        ("images: got .*uint8", black, HALF),
    ):
        refused(f"^{message}", sample.edit, PARAMS, CODEC, images, mask, LABELS)


# The command


def run_folder(folder, params=PARAMS, name="hmar.pt", **record):
    folder.mkdir(exist_ok=True)
    torch.save(params, folder / name)
    torch.save(CODEC, folder / "tokenizer.pt")
    (folder / "args.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    names = ["disc", "ring", "star"]
    run_folder(folder, class_names=names, digests={"tokenizer.pt": sample.digest(CODEC)})
    for name, factor in dict(nan=math.nan, large=1e20).items():
        scaled = pytree.tree_map(lambda leaf, factor=factor: factor * leaf, PARAMS)
        torch.save(scaled, folder / f"{name}.pt")
    torch.save(small_codec(seed=1), folder / "other_codec.pt")
    torch.save(print, folder / "code.pt")
    Image.fromarray(sample.to_bytes(picture(1))[0]).save(folder / "photo.png")
    Image.fromarray(masks("half", 1)[0, 0].numpy()).save(folder / "mask.png")
    Image.new("L", (8, 8)).save(folder / "black.png")
    run_folder(folder / "cut")
    (folder / "cut" / "args.json").write_text("[{}]")
    (folder / "cut" / "settings.json").write_bytes(b"\xff")
    return folder


def call(*flags):
    """The exit status of the command."""
    try:
        sample.main(["--dtype", "fp32", "--device", "cpu", *map(str, flags)])
    except SystemExit as stop:
        return stop.code
    return 0


def archived(tmp_path, *flags):
    path = tmp_path / f"{len(contents(tmp_path))}.npz"
    assert call(*flags, "--out", path) == 0
    return np.load(path)["arr_0"]


def drawn(labels, **options):
    return sample.generate(PARAMS, CODEC, torch.tensor(labels), **OWN | options)[0]


def assert_same(pixels, images):
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - sample.to_bytes(images)).max() <= 1


def test_the_command_draws_the_same_images_in_every_form(run, tmp_path):
    flags = (run, "--labels", "star", "0", "--count", 3, "--seed", 5, "--out")
    for name in ("sheet.png", "growing.gif", "all.npz", "folder"):
        assert call(*flags, tmp_path / name) == 0
    labels = [2, 2, 2, 0, 0, 0]
    expected, archive = drawn(labels, seed=5), np.load(tmp_path / "all.npz")
    assert archive["labels"].tolist() == labels
    assert_same(archive["arr_0"], expected)
    assert contents(tmp_path / "folder") == contents(tmp_path / "all")
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [path.name for path in files] == [f"{i:06d}-{labels[i]}.png" for i in range(6)]

    page, gif = Image.open(tmp_path / "sheet.png"), Image.open(tmp_path / "growing.gif")
    left = page.width - 3 * (64 + 2)  # images grow by whole pixels
    assert page.height == 2 * (48 + 2) and left > 12
    rows = np.asarray(page).reshape(2, 50, -1, 3)
    assert_same(rows[:, :48:8, left : left + 64 : 8], expected[::3])
    assert gif.n_frames == 5 and gif.size == page.size  # a page a pass
    passes = sample.steps(PARAMS, CODEC, torch.tensor(labels), **OWN, seed=5)
    for number, step in enumerate(passes):
        gif.seek(number)
        shown = np.asarray(gif.convert("RGB"), int)[:48:8, left : left + 64 : 8]
        truth = sample.to_bytes(sample.decode_in_parts(CODEC, step.f_hat))[0]
        assert np.abs(shown - truth).mean() < 3  # of a palette


def test_an_interrupted_folder_goes_on(run, tmp_path, capsys, monkeypatch):
    """Its files are written two at a time, each whole or not there."""
    archive, folder = tmp_path / "a.npz", tmp_path / "a"
    flags = (run, "--count", 2, "--out", archive)
    together, write = threading.Barrier(2, timeout=20), sample.write_whole

    def write_together(path, work):
        if path.suffix == ".png":
            together.wait()
        write(path, work)

    monkeypatch.setattr(sample, "at_once", lambda pixels: 2)
    monkeypatch.setattr(sample, "write_whole", write_together)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    some = drawn([0, 0]), None
    effects = [some, KeyboardInterrupt, some, MemoryError, some, KeyError]
    with mock.patch.object(sample, "generate", side_effect=effects):
        with full_disk():
            assert call(*flags) == 2
        assert re.search(r"settings.json\S*: cannot be written: ", capsys.readouterr().err)
        assert contents(tmp_path) == {}
        assert call(*flags) == 130
        assert capsys.readouterr().err == "sample.py: stopped\n"
        assert contents(tmp_path) == {}
        assert call(*flags) == 2
        assert capsys.readouterr().err == "sample.py: MemoryError\n"
        assert len(list(folder.glob("*.png"))) == 2
        with full_disk():
            assert call(*flags) == 2
        said = f"sample.py: {folder}/000002-1.png: cannot be written: "
        assert capsys.readouterr().err.startswith(said)
        with pytest.raises(KeyError):  # a bug shows its traceback
            call(*flags)
    assert not archive.exists() and len(list(folder.glob("*.png"))) == 2
    with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
        assert call(*flags) == 0
    assert [made.kwargs["seed"] for made in generate.call_args_list] == [[2, 3], [4, 5]]
    assert_same(np.load(archive)["arr_0"], drawn([0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_processes_share_a_folder(run, tmp_path, monkeypatch, name):
    """Whoever finds all images there packs them; settings are those of who came first."""
    flags, drawn_by = (run, "--count", 3, "--out", tmp_path / name), {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample, "at_once", lambda pixels: 2)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
            assert call(*flags) == 0
        seeds = [made.kwargs["seed"] for made in generate.call_args_list]
        drawn_by[rank] = [seed for part in seeds for seed in part]
        assert (tmp_path / "a.npz").exists() == (rank == "0" and name == "a.npz")
    assert drawn_by == {"1": [1, 3, 5, 7], "0": [0, 2, 4, 6, 8]}
    pixels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a").glob("*.png"))]
    assert_same(np.stack(pixels), drawn([0, 0, 0, 1, 1, 1, 2, 2, 2]))


def test_two_commands_of_other_settings_cannot_both_claim_a_folder(run, tmp_path, capsys):
    """Though both found it empty."""
    sample.check_folder(tmp_path / "a", dict(seed=0), begin=True)
    with pytest.raises(ValueError, match="holds something else: seed 0 -> 1"):
        sample.check_folder(tmp_path / "a", dict(seed=1), begin=True)
    assert set(contents(tmp_path)) == {"a/settings.json"}


@pytest.mark.parametrize("name", ["cats.bmp", "cats.tif", "v1.2"])
def test_an_unknown_suffix_is_refused(run, tmp_path, capsys, name):
    assert call(run, "--out", tmp_path / name) == 2
    assert f"{name}, expected .png, .jpg" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_generate_draws_what_the_command_draws(run, tmp_path):
    images, _ = sample.generate(PARAMS, CODEC, torch.tensor([0, 1, 2]))
    assert_same(archived(tmp_path, run, "--count", 1), images)


@contextlib.contextmanager
def full_disk(room=20):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_is_of_one_setting(run, tmp_path, capsys):
    flags = (run, "--count", 5000, "--out", tmp_path)
    some = drawn([0])[:1].expand(50, -1, -1, -1), None
    with mock.patch.object(sample, "generate", side_effect=[some, KeyboardInterrupt]):
        assert call(*flags) == 130
        before = contents(tmp_path)
        assert len(before) == 51 and len(before["settings.json"]) < 2000
        for *other, said in (("--seed", 1, "seed 0 -> 1"), ("--labels", 2, "[0, 1, 2] -> [2]")):
            assert call(*flags, *other) == 2
            assert said in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_file_is_the_old_one_or_a_whole_new_one(tmp_path):
    path, write = tmp_path / "a.pt", sample.write_whole
    path.write_text("old")

    def killed(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with mock.patch.object(Path, "unlink"), pytest.raises(KeyboardInterrupt):
        write(path, killed)
    with full_disk(), pytest.raises(OSError, match="a.pt: cannot be written: .*too large"):
        write(path, lambda file: torch.save(torch.zeros(10**6), file))
    assert len(contents(tmp_path)) == 2 and path.read_text() == "old"

    def slow(file):  # another writer comes and goes meanwhile
        file.write(b"whole ")
        write(path, lambda other: other.write(b"another"))
        file.write(b"file")

    write(path, slow)
    assert len(contents(tmp_path)) == 2 and path.read_text() == "whole file"


def test_the_command_edits(run, tmp_path):
    photo = Image.open(run / "photo.png")
    inner, photo = np.asarray(photo.resize((6, 4))), np.asarray(photo)
    edit = (tmp_path, run, "--edit", run / "photo.png", "--labels", "ring", "--count", 2)
    for pixels in archived(*edit, "--mask", run / "mask.png"):
        assert np.array_equal(pixels[:, :4], photo[:, :4]) and not np.array_equal(pixels, photo)
    for pixels in archived(*edit, "--pad", 0.2):
        assert pixels.shape == (6, 8, 3) and np.array_equal(pixels[1:5, 1:7], inner)
    archived(*edit, "--pad", 0.49)


def test_flags_reach_the_sampler(run, tmp_path):
    flags = "--labels ring --count 2 --guidance 2.5 --soften 3 --mask-guidance 0.5 --top-k 3"
    flags += " --top-p 0.7 --temperature 0.7 --seed 9 --mask-steps 2"
    options = dict(guidance=2.5, soften=3, mask_guidance=0.5, top_k=3, top_p=0.7, temperature=0.7)
    options |= dict(seed=9, schedule=sample.masked_schedule(SCALES, 2))
    assert_same(archived(tmp_path, run, *flags.split()), drawn([1, 1], **options))

    run = run_folder(tmp_path / "run", PLAIN, "next-scale.pt", flags=dict(causal=True))
    options = sample.own_options(PLAIN, is_causal=True)
    images, _ = sample.generate(PLAIN, CODEC, torch.arange(3), **options)
    assert_same(archived(tmp_path, run, "--count", 1), images)
    (run / "args.json").unlink()
    assert call(run) == 2  # not as HMAR


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden files are not here")
def test_published_weights_are_sampled_as_published(tmp_path):
    golden = torch.load(GOLDEN, weights_only=True)["state"]
    codec = tokenizer.from_published(golden["vqvae"])
    for name in golden:
        torch.save(golden[name], tmp_path / name)
    for name in ("var", "nsp", "hmar"):
        flags = (tmp_path / name, "--tokenizer", tmp_path / "vqvae")
        flags += ("--scales", 1, 2, 3, "4x4", "--labels", 2, "--count", 2)
        params = hmar.from_published(golden[name], ((1, 1), (2, 2), (3, 3), (4, 4)))
        options = sample.published_options(params, is_causal=name == "var")
        images, _ = sample.generate(params, codec, torch.tensor([2, 2]), **options)
        assert_same(archived(tmp_path, *flags), images)


@pytest.mark.parametrize("whole", [CODEC, PARAMS])
def test_leaves_are_plain_once_loaded(tmp_path, whole):
    def odd(leaf):
        return leaf.double().transpose(0, -1).contiguous().transpose(0, -1)

    torch.save(pytree.tree_map(odd, whole), tmp_path / "a.pt")
    loaded, origin = sample.load(tmp_path / "a.pt")
    assert leaves_equal(loaded, whole) and origin == "ours"
    for leaf in pytree.tree_leaves(loaded):
        assert leaf.dtype == torch.float and leaf.is_contiguous()


def test_a_decoder_that_overflows_is_refused():
    bias = torch.full_like(CODEC["post_quant_conv"]["bias"], math.inf)
    codec = CODEC | dict(post_quant_conv=CODEC["post_quant_conv"] | dict(bias=bias))
    with pytest.raises(ValueError, match="images: got nan"):
        sample.decode_in_parts(codec, torch.zeros(1, len(bias), 4, 4))


BAD_INPUT = """
. --labels 3  --labels: got '3', expected 0 to 2 or such as disc, ring, star
. --top-p x  argument --top-p: invalid float value: 'x'
. --top-p 95  top_p: got 95
. --count 0  --count: got 0, expected 1 or more
. --out a.gif --count 51  --count: got 51
. --seed -1  seed: got -1
. --out hmar.pt/x.png  File exists: 'hmar.pt'
. --out .  --out: . holds something else: count None -> 8
. --out cut.npz  cut/settings.json: expected a JSON object
cut  cut/args.json: expected a JSON object
. --out photo.png --edit photo.png --pad 0.2  is also to be read
none  none: cannot be read: FileNotFoundError
code.pt  code.pt: cannot be read
nan.pt  nan.pt: no weights
large.pt  logits: got nan or infinity
. --tokenizer hmar.pt  hmar.pt: no weights
. --tokenizer other_codec.pt  args.json: tells of another tokenizer.pt than this
. --pad 0.2  --edit: expected with --mask, or --pad
. --edit photo.png --mask black.png  --mask: expected white
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


def test_names_of_any_characters_are_drawn_and_printed(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run", class_names=["é\u4e2d", "\ud800\x1b\n" * 40, "a"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    out = tmp_path / "é\u4e2d.png"
    assert call(run, "--labels", "é\u4e2d", 1, 2, "--count", 1, "--out", out) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == f"wrote {tmp_path}/\\xe9\\u4e2d.png\n".encode()
    assert Image.open(out).height == 3 * 50
