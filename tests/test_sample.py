"""Sampling against a plain loop, exact draws, editing, the command."""

import copy
import itertools
import json
import math
import os
import shutil
import struct
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    JSON,
    close,
    contents,
    double,
    leaves_equal,
    normal,
    pyramids,
    quantiser,
    random_tokens,
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
PLAIN = {name: branch for name, branch in PARAMS.items() if name != "masked"}
LABELS = torch.tensor([2, 0, 3])


def last_tokens(steps):
    """(B, L): what the last pass of each scale left."""
    last = {step.scale: step.tokens for step in steps}
    return torch.cat(list(last.values()), 1)


# The method, against plain loops


def slow_filter(logits, top_k, top_p):
    """The codes that stay, of one token's logits (a list), in ascending order of these.

    All that reach the top_k-th, then no tail that holds at most 1 - top_p.
    """
    ascending = sorted(range(len(logits)), key=logits.__getitem__)
    if 0 < top_k < len(logits):
        least = logits[ascending[-top_k]]
        ascending = [code for code in ascending if logits[code] >= least]
    total, tail = sum(math.exp(logits[code]) for code in ascending), 0.0
    for code in ascending[:-1]:
        tail += math.exp(logits[code]) / total
        if top_p < 1 and tail <= 1 - top_p:
            ascending = ascending[1:]
    return ascending


def slow_draw(logits, codes, uniform):
    """(token, confidence) of one token, from codes in this order; None draws the likeliest."""
    weights = [math.exp(logits[code]) for code in codes]
    sums = list(itertools.accumulate(weights))
    if uniform is None:
        token = max(codes, key=logits.__getitem__)
    else:
        token = codes[next(i for i, sum_ in enumerate(sums) if sum_ > uniform * sums[-1])]
    return token, math.exp(logits[token]) / sums[-1]


class Script:
    """A network for a plain loop: its logits are tables, and a little of what it is given."""

    def __init__(self, scales, codes, code_dim, seed):
        counts = [h * w for h, w in scales]
        self.first = [normal(4, n, codes, seed=seed + 7 * k) for k, n in enumerate(counts)]
        self.again = [normal(4, n, codes, seed=seed + 7 * k + 1) for k, n in enumerate(counts)]
        self.read = normal(code_dim, codes, seed=seed + 90)
        self.shift = normal(codes, seed=seed + 91)

    def branch_features(self, params, branch, labels, inputs, own=None, mask=None, k=0, cache=None):
        seen = 0 if inputs is None else inputs @ self.read
        if branch == "next_scale":
            return self.first[k][labels] + seen
        return self.again[k][labels] + seen - 2 * own @ self.read + mask[..., None] * self.shift

    def play(self):
        functions = dict(branch_features=self.branch_features, logits=lambda x, weight, bias: x)
        return mock.patch.multiple(hmar, **functions)


def slow_steps(script, params, codec, label, seed, options):
    """(scale, pass, tokens, hidden places) of one image, as the description says it."""
    scales, null = hmar.scales(params), 3
    f_hat = torch.zeros(1, codec["codebook"].shape[1], *scales[-1], dtype=torch.float64)
    for k, (h, w) in enumerate(scales):
        tokens, hidden = [0] * (h * w), list(range(h * w))
        inputs = tokenizer.resize_to_scale(f_hat, (h, w)) if k else None
        for number, keep in enumerate(options["schedule"][k]):
            mask = torch.tensor([[place in hidden for place in range(h * w)]])
            t, branch, seen = options["guidance"], "next_scale", [inputs]
            if number:
                zeroed = mask if "own_input" in params["masked"] else None
                own = torch.tensor([tokens])
                own = tokenizer.masked_scale_input(codec, own, k, scales, zeroed)
                t, branch, seen = options["mask_guidance"], "masked", [inputs, own, mask]
            if len(scales) > 1:
                t = t * k / (len(scales) - 1)
            rows = torch.tensor([[label], [null]])
            both = [script.branch_features(params, branch, row, *seen, k=k)[0] for row in rows]
            if options["soften"]:
                p, q = (logits.softmax(-1) for logits in both)
                divergence = (p * (p / q).log()).sum() / (h * w)
                t = t / (1 + divergence / options["soften"])
            heat = options["temperature"]
            logits = ((1 + t) * both[0] - t * both[1]) / (heat or 1)

            numbers = np.random.default_rng((seed, k, number)).random(h * w)
            confidence = {}
            for place in hidden:
                row = logits[place].tolist()
                codes = slow_filter(row, options["top_k"], options["top_p"])
                # unfiltered codes stand in their own order, filtered ones with the surest first
                everything = len(codes) == len(row) and options["top_p"] == 1
                is_plain = everything and not 0 < options["top_k"] < len(row)
                codes = sorted(codes) if is_plain else codes[::-1]
                uniform = numbers[place] if heat else None
                tokens[place], confidence[place] = slow_draw(row, codes, uniform)
            order = sorted(hidden, key=lambda place: (-confidence[place], place))
            hidden = sorted(order[keep:])
            yield k, number, list(tokens), hidden
        codes = codec["codebook"][torch.tensor([tokens])]
        f_hat = f_hat + tokenizer.contribution(codec["phi"], codes, k, scales)


@st.composite
def schedules(draw, scales):
    """Of each scale but the first, its tokens cut at random places; a pass may keep none."""
    passes = []
    for k, (h, w) in enumerate(scales):
        cuts = sorted(draw(st.lists(st.integers(0, h * w), max_size=3))) if k else []
        passes.append(tuple(b - a for a, b in itertools.pairwise([0, *cuts, h * w])))
    return tuple(passes)


@quick
@given(pyramids(3, 3), st.data(), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_passes_are_those_of_a_plain_loop(scales, data, batch, own_input, seed):
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
    codec = quantiser(5, 4, seed=seed)
    script, labels = Script(scales, 5, 4, seed), torch.arange(batch) * 2 % 4
    with script.play():
        steps = list(sample.steps(params, codec, labels, seed=seed, **options))
    for i in range(batch):
        slow = slow_steps(script, params, codec, int(labels[i]), seed + i, options)
        for step, (k, number, tokens, hidden) in zip(steps, slow, strict=True):
            assert (step.scale, step.number, step.tokens[i].tolist()) == (k, number, tokens)
            assert step.hidden[i].nonzero().flatten().tolist() == hidden
    close(steps[-1].f_hat, tokenizer.accumulate(codec, last_tokens(steps), scales))


@quick
@given(st.integers(1, 12), st.integers(0, 14), st.booleans(), st.data(), st.integers(0, 999))
def test_filters_are_those_of_plain_loops(codes, top_k, tied, data, seed):
    top_p = data.draw(st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]))
    logits = normal(2, 3, codes, seed=seed, scale=2)
    logits = logits.round() if tied and top_p == 1 else logits  # ties stay in top-k
    ours = torch.full_like(logits, -math.inf)
    values, places = sample.filtered(logits, top_k, top_p)
    ours.scatter_(-1, places, values)
    for token, kept in zip(logits.flatten(0, 1).tolist(), ours.flatten(0, 1).tolist()):
        stay = slow_filter(token, top_k, top_p)
        expected = [token[code] if code in stay else -math.inf for code in range(codes)]
        assert kept == expected


@pytest.mark.parametrize("spread", [0, 0.01, 3])
def test_many_ties_stay_in_the_order_of_their_codes(spread):
    """Of logits in bf16; flat ones tie more than there is room for."""
    logits = (normal(2, 3, 999, scale=spread) - 9).bfloat16().float()
    logits[..., 5], logits[..., 3] = 0.0, -0.0
    values, codes = torch.sort(logits, dim=-1, descending=True, stable=True)
    for top_k in (1, 2, 300, 998):
        stays = values >= values[..., top_k - 1, None]
        ours, places = sample.filtered(logits, top_k)
        assert ours.shape[-1] <= top_k + sample.TIES or spread < 3
        assert torch.equal(ours[ours.isfinite()], values[stays])
        assert torch.equal(places[ours.isfinite()], codes[stays])


def test_filters_of_ties_keep_one_at_least():
    flat = torch.zeros(4, 8)
    for top_p, kept in ((1e-9, 1), (0.5, 4)):
        assert (sample.filtered(flat, 0, top_p)[0].isfinite().sum(-1) == kept).all()


@pytest.mark.parametrize("guidance, halves", [(2.0, ([1, 2, 2], [2] * 3)), (0, ([1] * 3,) * 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_guidance_of_zero_asks_for_one_half(is_causal, guidance, halves):
    with mock.patch.object(hmar, "branch_features", wraps=hmar.branch_features) as predict:
        sample.generate(PLAIN, CODEC, LABELS, guidance=guidance, is_causal=is_causal)
    rows = [len(call.args[2]) for call in predict.call_args_list]
    assert rows == [3 * n for n in halves[is_causal]]


def test_a_draw_never_falls_on_a_code_that_was_ruled_out():
    logits = torch.tensor([-math.inf, 5.0, -math.inf, -35.0, -math.inf]).expand(2, 5)
    codes = torch.arange(5).expand(2, 5)
    tokens, _ = sample.draw(logits, codes, torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert tokens[0] == 1 and tokens[1] in (1, 3)


@quick
@given(pyramids(5, 5), st.integers(0, 30))
def test_schedules_sum_to_their_scales(scales, passes):
    made, counts = sample.masked_schedule(scales, passes), [h * w for h, w in scales]
    for k, (kept, count) in enumerate(zip(made, counts, strict=True)):
        assert sum(kept) == count and min(kept) >= 1
        assert len(kept) == (min(passes + 1, count) if k else 1)
    sample.check_schedule(made, scales, True)
    assert [sum(kept) for kept in sample.published_schedule(scales)] == counts


def test_published_schedules():
    single = tuple((side * side,) for side in (4, 5, 6, 8, 10, 13, 16))
    assert sample.published_schedule(hmar.SCALES[256]) == ((1,), (1, 3), (1, 1, 2, 5), *single)
    cosine = (13, 36, 57, 71, 79)  # round(256 (1 - cos)), differenced
    assert sample.masked_schedule(((1, 1), (16, 16)), 4)[1] == cosine


def test_a_partly_given_scale_keeps_in_proportion():
    hidden = torch.arange(8) < torch.tensor([8, 4, 0, 3])[:, None]
    kept = sample.kept_counts((1, 1, 2, 4), hidden, True)
    assert torch.cat(kept, 1).tolist() == [[1, 1, 2, 4], [1, 0, 1, 2], [0] * 4, [1, 0, 1, 1]]
    kept = torch.cat(sample.kept_counts((8,), hidden, True), 1)
    assert kept.tolist() == [[8, 0], [0, 4], [0, 0], [0, 3]]


# Images


def test_a_caller_chooses_what_the_next_scale_is_drawn_from():
    """Of several drafts of the coarse scales the best goes on in all rows."""
    drawn = []
    for step in sample.steps(PARAMS, CODEC, LABELS, seed=[5, 6, 7]):
        if not step.hidden.any():
            drawn.append(step.tokens)
            if step.scale == 1:
                step.f_hat[:] = step.f_hat[1].clone()
    coarse = torch.cat(drawn[:2], 1)[1].expand(3, -1)
    chosen = torch.cat([coarse, drawn[2]], 1)
    close(step.f_hat, tokenizer.accumulate(CODEC, chosen, SCALES), 1e-6)


WAYS = {
    "ours": dict(),
    "VAR": dict(is_causal=True, soften=0.1),
    "refined": dict(schedule=sample.masked_schedule(SCALES, 3), mask_guidance=1.0, top_p=0.9),
    "cold": dict(temperature=0, top_k=3, guidance=2.0, seed=[2**40, 5, 7]),
}


@pytest.fixture(params=WAYS)
def way(request):
    """(params, options)."""
    options = WAYS[request.param]
    return PLAIN if options.get("is_causal") else PARAMS, options


def test_generate_is_a_pure_function_of_its_arguments(way):
    params, options = way
    before, state = copy.deepcopy([params, CODEC, LABELS, options]), torch.get_rng_state()
    images, tokens = sample.generate(params, CODEC, LABELS, **options)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = sample.generate(params, CODEC, LABELS, **options)
    assert torch.equal(images, again[0]) and torch.equal(tokens, again[1])
    assert leaves_equal(before[:3], [params, CODEC, LABELS]) and before[3] == options
    close(images, tokenizer.decode(CODEC, tokens, SCALES).detach(), 1e-5)


def test_an_image_depends_on_its_batch_by_rounding_alone(way):
    params, options = way
    labels, seeds = torch.tensor([2, 0, 3, 1, 2]), [7, 3, 11, 4, 2**40]
    options = {name: value for name, value in options.items() if name != "seed"}
    half = hmar.cast(params, torch.bfloat16), tokenizer.cast(CODEC, torch.bfloat16)
    images, tokens = sample.generate(params, CODEC, labels, seed=seeds, **options)
    _, rough = sample.generate(*half, labels, seed=seeds, **options)
    for batch in ([0], [4, 2], [3, 1, 0], [1, 1]):
        own = dict(seed=[seeds[i] for i in batch], **options)
        own_images, own_tokens = sample.generate(params, CODEC, labels[batch], **own)
        assert torch.equal(own_tokens, tokens[batch])
        close(own_images, images[batch], 1e-5)
        _, own_tokens = sample.generate(*half, labels[batch], **own)
        assert (own_tokens == rough[batch]).double().mean() > 0.7


def test_defaults_are_ours_or_the_published_ones():
    theirs = PARAMS | dict(masked=PARAMS["masked"].copy())
    del theirs["masked"]["own_input"]
    for params, schedule, *numbers in (
        (PARAMS, sample.masked_schedule(SCALES, 1), 5, 5, 0.1),
        (theirs, sample.published_schedule(SCALES), 1.5, 0, 0),
        (PLAIN, ((1,), (4,), (12,)), 1.5, 0, 0),
    ):
        expected = dict(zip(("guidance", "mask_guidance", "soften"), numbers), schedule=schedule)
        plain = dict(temperature=1, top_k=0, top_p=1, seed=0)
        assert sample.defaults(params) == expected | plain


# Editing


def picture(batch, seed=0):
    return torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def masks(kind, batch):
    mask = torch.zeros(batch, 1, 6, 8, dtype=torch.bool)
    if kind == "random":
        return torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[..., {"empty": 8, "half": 4, "column": 7, "full": 0}[kind] :] = True
    return mask


@pytest.mark.parametrize("kind", ["empty", "column", "half", "random", "full"])
@pytest.mark.parametrize("params", [PARAMS, PLAIN], ids=["masked", "plain"])
def test_editing_leaves_what_is_outside_the_mask(params, kind):
    images, mask = picture(3), masks(kind, 3)
    before = copy.deepcopy([params, images, mask])
    edited = sample.edit(params, CODEC, images, mask, LABELS)
    assert leaves_equal(before, [params, images, mask])
    assert edited.shape == images.shape and edited.abs().max() <= 1
    outside = ~mask.expand_as(images)
    assert torch.equal(edited[outside], images[outside])
    assert torch.equal(edited, images) == (kind == "empty")


@pytest.mark.parametrize("schedule", [None, ((1,), (4,), (12,)), ((1,), (0, 4), (3, 0, 9))])
def test_editing_does_not_depend_on_the_batch(schedule):
    """Three masks together: each image as alone, the full one as generated."""
    images, labels = picture(4), torch.tensor([1, 2, 0, 2])
    mask = torch.cat([masks(kind, 1) for kind in ("empty", "full", "half", "random")])
    edited = sample.edit(PARAMS, CODEC, images, mask, labels, schedule=schedule, seed=9)
    assert torch.equal(edited[0], images[0])
    for i in range(4):
        own = [x[i : i + 1] for x in (images, mask, labels)]
        alone = sample.edit(PARAMS, CODEC, *own, schedule=schedule, seed=9 + i)
        close(edited[i : i + 1], alone, 1e-5)
    generated, _ = sample.generate(PARAMS, CODEC, labels[1:2], schedule=schedule, seed=10)
    close(edited[1:2], generated, 1e-5)


@quick
@given(pyramids(3, 3), st.data(), st.integers(0, 99))
def test_given_tokens_stay_and_the_others_are_refined(scales, data, seed):
    counts, tokens = [h * w for h, w in scales], random_tokens(3, scales, 5, seed)
    is_given = random_tokens(3, scales, 5, seed + 1) < 3
    is_given[0] = False
    options = dict(schedule=data.draw(schedules(scales)), seed=seed)
    params, codec = double(tree(scales, random=False)), quantiser(5, 4, seed=seed)
    with Script(scales, 5, 4, seed).play():
        every = partial(sample.steps, params, codec, **options)
        nothing = torch.zeros(3, 4, *scales[-1], dtype=torch.float64)
        with mock.patch.object(sample, "evidence", lambda *arguments: 0.0):
            steps = list(every(torch.tensor([0, 1, 2]), known=(tokens, is_given, nothing)))
        plain = last_tokens(every(torch.tensor([0])))
    for k, (own, fixed) in enumerate(zip(tokens.split(counts, 1), is_given.split(counts, 1))):
        mine, partly = [step for step in steps if step.scale == k], fixed.any(1) & ~fixed.all(1)
        for step in mine:
            assert torch.equal(step.tokens[fixed], own[fixed]) and not (step.hidden & fixed).any()
        assert not mine[-1].hidden.any()
        if k and len(options["schedule"][k]) == 1:  # drawn again by the branch that sees the others
            assert (mine[0].hidden | fixed)[partly].all()
    last = last_tokens(steps)
    assert torch.equal(last[:1], plain)
    stays = is_given.split(counts, 1)[-1].view(3, 1, *scales[-1])  # the image's own map goes on
    drawn, own = (tokenizer.accumulate(codec, rows, scales) for rows in (last, tokens))
    close(steps[-1].f_hat, torch.where(stays, own, drawn))


def test_evidence_draws_a_cut_cell_towards_its_part_that_stays():
    codebook, residual = normal(7, 3), torch.zeros(1, 3, 4, 4)
    residual[0] = codebook[5][:, None, None]
    stays = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    stays[..., :1, :] = True  # of 2 x 2 cells, the upper two are cut, the lower two unknown
    numbers = sample.evidence(codebook, residual, stays, (2, 2))
    assert numbers.shape == (1, 4, 7) and not numbers[0, 2:].any()
    assert (numbers[0, :2].argmax(-1) == 5).all()
    residual[..., 1:, :] = 100  # what does not stay says nothing
    assert torch.equal(sample.evidence(codebook, residual, stays, (2, 2)), numbers)
    more = sample.evidence(codebook, residual[..., :1, :].expand(1, 3, 4, 4), ~stays, (2, 2))
    assert more[0, 2].min() < numbers[0, 0].min()  # of a cell known whole: surer still


def test_an_edit_knows_what_lies_outside_the_mask():
    def sure(codebook, residual, stays, size):
        numbers = torch.zeros(len(residual), size[0] * size[1], len(codebook))
        numbers[..., 7] = 1e4
        return numbers

    mask, images = masks("random", 2), picture(2)
    with mock.patch.object(sample, "evidence", side_effect=sure) as evidence:
        sample.generate(PARAMS, CODEC, LABELS[:2])
        assert not evidence.called
        with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
            sample.edit(PARAMS, CODEC, images, mask, LABELS[:2])
        tokens, is_given, features = known = generate.call_args.kwargs["known"]
        _, drawn = sample.generate(PARAMS, CODEC, LABELS[:2], known=known)
    assert (drawn[~is_given] == 7).all() and torch.equal(drawn[is_given], tokens[is_given])
    close(features, tokenizer.encode_features(CODEC, images))
    assert torch.equal(tokens, tokenizer.encode(CODEC, images, SCALES))
    cells = [(y, x, h, w) for h, w in SCALES for y in range(h) for x in range(w)]
    for token, (y, x, h, w) in enumerate(cells):
        rows = slice(y * 6 // h, -(-(y + 1) * 6 // h))
        columns = slice(x * 8 // w, -(-(x + 1) * 8 // w))
        touched = mask[:, 0, rows, columns].flatten(1).any(1)
        assert torch.equal(is_given[:, token], ~touched)


@pytest.mark.parametrize("kind", ["half", "random"])
def test_what_decoding_does_at_the_edge_is_taken_back(kind):
    """Here it makes a grey picture lighter by 0.25: next to the edge all of it is taken off."""
    images, mask = torch.zeros(3, 3, 6, 8), masks(kind, 3)
    lighter = torch.full((3, 3, 6, 8), 0.25)
    with mock.patch.object(tokenizer, "decode_features", lambda codec, f_hat: lighter):
        edited = sample.edit(PARAMS, CODEC, images, mask, LABELS)
    reach = 2 * tokenizer.downsampling(CODEC)
    for i, y, x in itertools.product(range(3), range(6), range(8)):
        outside = (~mask[i, 0]).nonzero().tolist()
        distance = min(max(abs(y - a), abs(x - b)) for a, b in outside)
        expected = torch.full((3,), 0.25 * min(1, distance / (reach + 1)))
        close(edited[i, :, y, x], expected, 1e-6)


# Bad arguments

JUNK = JSON | st.binary()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(sample.defaults(PARAMS))),
    JUNK | st.lists(JUNK | st.just(math.nan) | st.lists(JUNK), min_size=3, max_size=3),
)
@example("soften", 1e-220)
def test_options_work_or_are_a_value_error_that_names_them(name, value):
    try:
        images, _ = sample.generate(PARAMS, CODEC, LABELS, **{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name}: ")
    else:
        assert images.isfinite().all()


@quick
@given(JUNK | st.sampled_from([torch.zeros(2), LABELS[None], LABELS + 1, LABELS - 1, LABELS.int()]))
def test_labels_that_are_none_are_a_value_error(labels):
    with pytest.raises(ValueError, match="^labels: "):
        sample.generate(PARAMS, CODEC, labels)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schedule=((1,), (4,))), r"schedule: got .* that sum to \[1, 4, 12\]"),
        (dict(schedule=((1,), (5, -1), (12,))), "schedule: got "),
        (dict(schedule=((0, 1), (4,), (12,))), "schedule: got "),
        (dict(schedule=((1,), (1, 3), (12,)), params=PLAIN), "schedule: got .* no masked branch"),
        (dict(codec=small_codec(codes=32)), r"codec: got .*\(32, 8\), .* has \(16, 8\)"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sample.generate(**dict(params=PARAMS, codec=CODEC, labels=LABELS) | options)


HALF = masks("half", 3)


@pytest.mark.parametrize("mask", [HALF.byte(), HALF[:2], HALF[:, 0], HALF.numpy(), None, "a.png"])
def test_bad_edits(mask):
    with pytest.raises(ValueError, match=r"^mask: expected a bool tensor \(3, 1, 6, 8\)"):
        sample.edit(PARAMS, CODEC, picture(3), mask, LABELS)
    for labels in (LABELS[:2], 3):
        with pytest.raises(ValueError, match="^labels: "):
            sample.edit(PARAMS, CODEC, picture(3), HALF, labels)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it, and pictures beside it."""
    folder = tmp_path_factory.mktemp("run")
    torch.save(PARAMS, folder / "hmar.pt")
    torch.save(CODEC, folder / "tokenizer.pt")
    made = {"tokenizer": sample.digest(CODEC), "masked": sample.digest(PARAMS)}
    write_args(folder, class_names=["disc", "ring", "star"], made=made)
    Image.fromarray(sample.to_bytes(picture(1))[0]).save(folder / "photo.png")
    mask = masks("half", 1)[0, 0].numpy() * 255
    Image.fromarray(mask.astype(np.uint8)).save(folder / "mask.png")
    Image.new("L", (8, 8)).save(folder / "black.png")
    return folder


def write_args(folder, **changed):
    run = dict(flags={}, class_names=[], causal=False, images=["", ""], made={})
    (folder / "args.json").write_text(json.dumps(run | changed))


def call(*flags):
    return sample.main(["--dtype", "fp32", "--device", "cpu", *map(str, flags)])


def drawn(labels, **options):
    return sample.generate(PARAMS, CODEC, torch.tensor(labels), **options)[0]


def npz(path):
    with np.load(path) as archive:
        return dict(archive)


def assert_same(made, images):
    """An archive's pixels, or these, are those of images but for rounding."""
    made = made if isinstance(made, np.ndarray) else npz(made)["arr_0"]
    assert made.dtype == np.uint8
    assert np.abs(made.astype(int) - sample.to_bytes(images)).max() <= 1


def test_the_command_draws_the_same_images_in_every_form(run, tmp_path):
    flags = (run, "--labels", "star", "0", "--count", 3, "--seed", 5, "--out")
    for name in ("sheet.png", "growing.gif", "all.npz", "folder"):
        assert call(*flags, tmp_path / name) == 0
    labels = [2, 2, 2, 0, 0, 0]
    expected = drawn(labels, seed=5)
    assert npz(tmp_path / "all.npz")["labels"].tolist() == labels
    assert_same(tmp_path / "all.npz", expected)
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [path.name for path in files] == [f"{i:06d}-{labels[i]}.png" for i in range(6)]
    assert_same(np.stack([np.asarray(Image.open(path)) for path in files]), expected)
    with Image.open(tmp_path / "sheet.png") as page, Image.open(tmp_path / "growing.gif") as gif:
        left = page.width - 3 * (64 + 2)  # images grow by whole pixels
        assert page.height == 2 * (48 + 2) and left > 12
        rows = np.asarray(page).reshape(2, 50, -1, 3)
        assert_same(rows[:, :48:8, left : left + 64 : 8], expected[::3])
        assert gif.n_frames == 5 and gif.size == page.size  # a page a pass
        for number, step in enumerate(sample.steps(PARAMS, CODEC, torch.tensor(labels), seed=5)):
            gif.seek(number)
            shown = np.asarray(gif.convert("RGB"), int)[:48:8, left : left + 64 : 8]
            truth = sample.to_bytes(sample.decoded(CODEC, step.f_hat))[0]
            assert np.abs(shown - truth).mean() < 3  # of a palette
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("flags", ["--top-p 95", "--guidance -1", "--causal", "--mask-steps -1"])
def test_what_is_refused_begins_no_folder(run, tmp_path, flags):
    assert call(run, *flags.split(), "--out", tmp_path / "drawn") == 2
    assert not (tmp_path / "drawn").exists()


def test_an_interrupted_folder_goes_on(run, tmp_path, capsys):
    flags = (run, "--count", 2, "--batch", 2, "--out", tmp_path / "a.npz")
    effects = [(drawn([0, 0]), None), KeyboardInterrupt]
    with mock.patch.object(sample, "generate", side_effect=effects):
        assert call(*flags) == 130
    assert capsys.readouterr().err == "sample.py: stopped; the same command goes on\n"
    assert not (tmp_path / "a.npz").exists() and len(list((tmp_path / "a").glob("*.png"))) == 2
    with mock.patch.object(sample, "generate", wraps=sample.generate) as generate:
        assert call(*flags) == 0
        (tmp_path / "a" / "000003-1.png").unlink()  # drawn alone it is the same
        assert call(*flags) == 0
    assert [made.kwargs["seed"] for made in generate.call_args_list] == [[2, 3], [4, 5], [3]]
    assert_same(tmp_path / "a.npz", drawn([0, 0, 1, 1, 2, 2]))

    (tmp_path / "a.npz").unlink()
    picture = tmp_path / "a" / "000001-0.png"
    picture.write_bytes(picture.read_bytes()[:-30])  # and what is damaged is named
    assert call(*flags) == 2 and not (tmp_path / "a.npz").exists()
    assert capsys.readouterr().err.startswith(f"sample.py: {picture}: ")


def test_two_processes_split_the_work_and_the_last_one_packs(run, tmp_path, monkeypatch):
    flags = (run, "--count", 3, "--batch", 2, "--out", tmp_path / "a.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = set()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert not (tmp_path / "a.npz").exists()
        assert call(*flags) == 0
        own = {path.name for path in (tmp_path / "a").glob("*.png")} - seen
        assert {int(name[:6]) % 2 for name in own} == {rank}
        seen |= own
    assert_same(tmp_path / "a.npz", drawn([0] * 3 + [1] * 3 + [2] * 3))


@pytest.mark.parametrize("name", ["notes.txt", "000000-0.png", "settings.json"])
@pytest.mark.parametrize("text", ["{}", "null", "[[[", '{"labels": 1}'])
def test_foreign_folders_are_refused_and_stay_as_they_are(run, tmp_path, capsys, name, text):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text(text)
    for out in (folder, tmp_path / "mine.npz"):
        assert call(run, "--out", out) == 2
        assert "mine" in capsys.readouterr().err
        assert contents(folder) == {name: text.encode()}
    assert not (tmp_path / "mine.npz").exists()


@pytest.mark.parametrize("flags", [("--seed", 1), ("--top-k", 3), ("--labels", 2)])
def test_folders_of_other_settings_are_refused(run, tmp_path, capsys, flags):
    plain = (run, "--count", 1, "--mask-steps", 0, "--out", tmp_path)
    assert call(*plain) == 0
    before = contents(tmp_path)
    assert call(*plain, *flags) == 2
    assert "images of other settings" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_one_process_at_a_time_draws_into_a_folder(run, tmp_path, capsys):
    held = sample.locked(tmp_path / "settings.json")
    assert call(run, "--count", 1, "--out", tmp_path) == 2
    assert f"sample.py: {tmp_path}: another process works there" in capsys.readouterr().err
    held.close()
    assert call(run, "--count", 1, "--out", tmp_path) == 0


def test_the_command_edits(run, tmp_path):
    photo = np.asarray(Image.open(run / "photo.png"))
    edit = (run, "--edit", run / "photo.png", "--labels", "ring", "--count", 2, "--out")
    assert call(*edit, tmp_path / "e.npz", "--mask", run / "mask.png") == 0
    for made in npz(tmp_path / "e.npz")["arr_0"]:
        assert np.array_equal(made[:, :4], photo[:, :4]) and not np.array_equal(made, photo)
    assert call(*edit, tmp_path / "p.npz", "--pad", 0.2) == 0
    inner = Image.open(run / "photo.png").resize((6, 4))
    for made in npz(tmp_path / "p.npz")["arr_0"]:
        assert made.shape == (6, 8, 3) and np.array_equal(made[1:5, 1:7], np.asarray(inner))
    assert call(*edit, tmp_path / "s.png", "--pad", 0.49, "--dtype", "bf16") == 0


STEERING = [
    ("--guidance 2.5 --soften 3", dict(guidance=2.5, soften=3)),
    ("--mask-guidance 0.5 --top-k 3 --top-p 0.9", dict(mask_guidance=0.5, top_k=3, top_p=0.9)),
    ("--temperature 0.7 --seed 9", dict(temperature=0.7, seed=[9, 10])),
    ("--mask-steps 2", dict(schedule=sample.masked_schedule(SCALES, 2))),
    ("--dtype bf16", dict(head=torch.bfloat16)),
]


@pytest.mark.parametrize("flags, expected", STEERING)
def test_flags_reach_the_sampler(run, tmp_path, monkeypatch, flags, expected):
    calls = []

    def seen(params, *rest, **options):
        calls.append(options | dict(head=params["next_scale"]["head"]["weight"].dtype))
        return torch.zeros(2, 3, 6, 8), None

    monkeypatch.setattr(sample, "generate", seen)
    flags = ("--labels", "disc", "--count", 2, "--out", tmp_path / "a.png", *flags.split())
    assert call(run, *flags) == 0
    plain = dict(seed=[0, 1], is_causal=False, head=torch.float32)
    assert calls == [sample.defaults(PARAMS) | plain | expected]


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copied"))


def test_a_run_that_was_trained_causal_is_sampled_so(copied, tmp_path):
    torch.save(PLAIN, copied / "hmar.pt")
    write_args(copied, causal=True)
    assert call(copied, "--count", 1, "--out", tmp_path / "a.npz") == 0
    images, _ = sample.generate(PLAIN, CODEC, torch.arange(3), is_causal=True)
    assert_same(tmp_path / "a.npz", images)


def test_another_tokenizer_than_it_was_trained_for_is_refused(copied, tmp_path, capsys):
    torch.save(pytree.tree_map(lambda leaf: leaf + 1e-3, CODEC), copied / "other.pt")
    flags = (copied, "--tokenizer", copied / "other.pt", "--out", tmp_path / "a.png")
    assert call(*flags) == 2
    assert "hmar.pt: trained for another tokenizer" in capsys.readouterr().err
    write_args(copied)  # nothing is known of it
    assert call(*flags) == 0

    write_args(copied, made={"tokenizer": sample.digest(CODEC), "masked": "another run's"})
    assert call(copied, "--out", tmp_path / "a.png") == 2
    assert "hmar.pt: not what the run beside it made" in capsys.readouterr().err


def test_leaves_are_fp32_once_loaded_and_have_values(tmp_path):
    for whole, load in ((CODEC, sample.load_tokenizer), (PARAMS, sample.load_transformer)):
        leaves, structure = pytree.tree_flatten(whole)
        mixed = [leaf.double() if i % 2 else leaf for i, leaf in enumerate(leaves)]
        torch.save(pytree.tree_unflatten(mixed, structure), tmp_path / "a.pt")
        loaded = load(tmp_path / "a.pt")
        assert leaves_equal(loaded, whole)
        assert {leaf.dtype for leaf in pytree.tree_leaves(loaded)} == {torch.float}

        torch.save(pytree.tree_map(lambda leaf: leaf.to("meta"), whole), tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a.pt: no weights that can be read safely"):
            load(tmp_path / "a.pt")


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({}, optional=dict(class_names=JSON, causal=JSON, made=JSON)),
    st.lists(JSON, min_size=3, max_size=3),
)
def test_whatever_args_json_holds_the_run_is_read(run, tmp_path_factory, value, names):
    folder = tmp_path_factory.mktemp("fuzz")
    args = sample.parser().parse_args([str(run), "--weights", str(folder / "hmar.pt")])
    (folder / "hmar.pt").symlink_to(run / "hmar.pt")
    (folder / "args.json").write_text(json.dumps(dict(class_names=names) | value))
    made = value.get("made")
    if isinstance(made, dict) and made:  # digests, of something else
        with pytest.raises(ValueError, match="another tokenizer"):
            sample.load_models(args)
        return
    _, _, names, is_causal = sample.load_models(args)
    assert is_causal in (True, False) and len(names) == 3
    assert sample.sheet([picture(1)] * 3, names).height == 3 * 50


BROKEN = ("[" * 100_000, '{"a":' * 100_000, '{"made": 1', "\xff", "NaN", "[]", "null")


@pytest.mark.parametrize("text", BROKEN)
def test_broken_args_json_is_one_line(copied, tmp_path, capsys, text):
    (copied / "args.json").write_bytes(text.encode("latin-1"))
    assert call(copied, "--out", tmp_path / "a.png") == 2
    printed = capsys.readouterr().err
    assert "args.json: expected a JSON object" in printed and printed.count("\n") == 1


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden files are not here")
def test_published_weights_need_no_run_folder(tmp_path, capsys):
    golden = torch.load(GOLDEN, weights_only=True)["state"]
    for name in ("vqvae", "var", "nsp"):
        torch.save(golden[name], tmp_path / name)
    flags = ("--tokenizer", tmp_path / "vqvae", "--weights", tmp_path / "var", "--labels", 2)
    flags += ("--count", 2, "--out", tmp_path / "a.npz", "--scales", 1, 2, 3, "4x4")
    assert call(*flags) == 2
    assert "var: holds weights of VAR's: add --causal" in capsys.readouterr().err
    assert call(*flags, "--causal", "--weights", tmp_path / "nsp") == 2
    assert "leave out --causal" in capsys.readouterr().err
    assert call(*flags, "--causal") == 0
    params = hmar.from_published(golden["var"], ((1, 1), (2, 2), (3, 3), (4, 4)))
    codec = tokenizer.from_published(golden["vqvae"])
    images, _ = sample.generate(params, codec, torch.tensor([2, 2]), is_causal=True)
    assert_same(tmp_path / "a.npz", images)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Files that hold no weights."""
    folder = tmp_path_factory.mktemp("broken")
    torch.save(print, folder / "code.pt")
    os.mkfifo(folder / "pipe.pt")
    torch.save(pytree.tree_map(lambda leaf: leaf * math.nan, PARAMS), folder / "hmar.pt")
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{run} --labels 3", "--labels: got '3', expected 0 to 2 or such as disc, ring, star"),
        ("{run} --top-p x", "argument --top-p: invalid float value: 'x'"),
        ("{run} --mask x --pad 0.2", "not allowed with argument --mask"),
        ("{run} --count 0", "--count: got 0, expected 1 to"),
        ("{run} --out {run}/hmar.pt/x.png", "hmar.pt/x.png"),
        ("{run} --out x.jpg", "--out: got x.jpg, expected"),
        ("{run}/none", "none/hmar.pt"),
        ("", "expected RUN or --weights, --tokenizer"),
        ("{run} --weights {broken}/code.pt", "code.pt: no weights that can be read safely"),
        ("{run} --weights {broken}/hmar.pt", "not finite"),
        ("{run} --weights {broken}/pipe.pt", "pipe.pt: missing or no regular file"),
        ("{run} --tokenizer {run}/hmar.pt", "hmar.pt: "),
        ("{run} --edit {run}/photo.png", "--edit: expected with one of --mask and --pad"),
        ("{run} --edit {run}/photo.png --mask {run}/black.png", "--mask: expected white"),
        ("{run} --edit {run}/hmar.pt --pad 0.2", "hmar.pt: no image of these formats"),
        ("{run} --edit {run}/photo.png --pad 0.2 --out {run}/photo.png", "is also to be read"),
        ("{run} --device abacus", "--device: got 'abacus', expected cpu or a cuda"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, broken, tmp_path, capsys, flags, message):
    flags, before = flags.format(run=run, broken=broken).split(), contents(run)
    assert call("--out", tmp_path / "x.png", *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir()) and contents(run) == before


@pytest.mark.parametrize(
    "error, status, text",
    [
        (torch.OutOfMemoryError("full\n\x1b[2J"), 2, "full??[2J"),
        (RuntimeError("a: can't allocate memory: 9 bytes"), 2, "not enough memory: 9 bytes"),
        (MemoryError(), 2, "MemoryError"),
        (KeyError(7), 1, "KeyError: 7 (HMAR_TRACEBACK=1 shows where)"),
    ],
)
def test_faults_are_one_line_too(run, tmp_path, monkeypatch, capsys, error, status, text):
    monkeypatch.setattr(sample, "generate", mock.Mock(side_effect=error))
    assert call(run, "--out", tmp_path / "a.png") == status
    assert capsys.readouterr().err == f"sample.py: {text}\n"
    monkeypatch.setenv("HMAR_TRACEBACK", "1")
    call(run, "--out", tmp_path / "a.png")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["\x1b[31m\nred", os.fsdecode(b"\xff")])
def test_a_name_of_any_characters_is_told_on_one_line(run, tmp_path, capsys, name):
    assert call(run, "--count", 1, "--out", tmp_path / f"{name}.png") == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out[:-1].isprintable() and said.out.endswith(".png\n")


@pytest.mark.parametrize("name", ["hpu", "meta", "mps", "xla", "", "cuda"])
def test_devices_that_are_not_here_are_refused(name, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    got = name.replace("cuda", "cuda:99")
    with pytest.raises(ValueError, match=f"^--device: got {got!r}, expected cpu or a cuda"):
        sample.find_device(name)


def test_a_few_images_at_a_time_pass_through_the_tokenizer(monkeypatch):
    """A hundred at once would not fit a GPU at 1024 pixels."""
    images = torch.zeros(3, 3, 6, 8)
    expected = sample.edit(PARAMS, CODEC, images, HALF, LABELS)
    monkeypatch.setattr(sample, "at_once", lambda pixels: 2)
    for name in ("encode_features", "decode_features"):
        with mock.patch.object(tokenizer, name, wraps=getattr(tokenizer, name)) as passed:
            close(sample.edit(PARAMS, CODEC, images, HALF, LABELS), expected, 1e-5)
        assert [len(call.args[1]) for call in passed.call_args_list] == [2, 1]


def test_what_a_kill_left_is_written_over_and_a_full_disk_is_named(tmp_path):
    path, victim, few = tmp_path / "a.pt", tmp_path / "victim", dict(a=torch.zeros(10**6))
    path.write_text("old")
    victim.write_text("mine")

    def killed(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with mock.patch.object(os, "remove"), pytest.raises(KeyboardInterrupt):
        sample.write_atomically(path, killed)
    assert len(contents(tmp_path)) == 3 and path.read_text() == "old"
    disk = mock.patch.object(sample, "open", lambda *_: full, create=True)
    with (
        open("/dev/full", "wb") as full,
        disk,
        pytest.raises(OSError, match="a.pt: .* No space left"),
    ):
        sample.write_atomically(path, lambda file: torch.save(few, file))
    sample.write_atomically(path, lambda file: file.write(b"new"))
    for link in (os.symlink, os.link):  # nor is anything written through
        link(victim, tmp_path / "a.pt.0.tmp")
        sample.write_atomically(path, lambda file: file.write(b"new"))
    assert contents(tmp_path) == {"a.pt": b"new", "victim": b"mine"}


def test_a_transparent_colour_of_16_bits_is_laid_on_white(tmp_path):
    key, other = struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC), struct.pack(">HHH", 9, 9, 9)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = dict(IHDR=header, tRNS=key, IDAT=zlib.compress(b"\0" + key + other), IEND=b"")
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in parts.items():
        chunk = name.encode() + data
        png += struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(png)
    pixels = np.asarray(sample.read_image(tmp_path / "a.png"))
    assert pixels.tolist() == [[[255] * 3, [0] * 3]]
