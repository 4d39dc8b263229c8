"""Sampling against a plain loop, exact sampling, editing, model files, the command."""

import copy
import itertools
import math
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
    failure,
    leaves_equal,
    normal,
    pyramids,
    quantiser,
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

pytestmark = pytest.mark.usefixtures("own_folder")
SCALES = ((1, 1), (2, 2), (3, 4))

CODEC = small_codec()
PARAMS = scrambled(tree(SCALES, codes=16, code_dim=8, random=False), scale=0.15)
PARAMS = pytree.tree_map(torch.Tensor.float, PARAMS)
NAMES = ["disc", "ring", "star"]
SAMPLING = dict(guidance=6.0, mask_guidance=3.0, rise=1.0, temperature=0.95)
SAMPLING |= dict(top_k=0, top_p=1.0)
MODEL = dict(tokenizer=CODEC, transformer=PARAMS, classes=NAMES, sampling=SAMPLING)
PLAIN = {name: branch for name, branch in PARAMS.items() if name != "masked"}
VAR = PLAIN | dict(causal={})
VAR_MODEL = MODEL | dict(transformer=VAR)
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


def slow_sample(logits, codes, uniform):
    """(token, confidence) of one token, from these codes; uniform None draws the likeliest."""
    weights = [math.exp(logits[code]) for code in codes]
    sums = list(itertools.accumulate(weights))
    if uniform is None:
        token = max(codes, key=logits.__getitem__)
    else:
        token = codes[next(i for i, sum_ in enumerate(sums) if sum_ > uniform * sums[-1])]
    return token, math.exp(logits[token]) / sums[-1]


def slow_shares(keeps, hidden, total):
    """What an image keeps at each pass with only so many of a scale's tokens hidden."""
    done = [math.ceil(hidden * sum_ / total) for sum_ in itertools.accumulate(keeps, initial=0)]
    return [after - before for before, after in itertools.pairwise(done)]


def slow_steps(params, codec, condition, seed, options, known=None):
    """(scale, pass, tokens, hidden places), f_hat of one image, as the description says it.

    condition (1, C). known: (features, outside) of an edit.
    """
    scales, conditions = hmar.scale_sizes(params), (condition, params["classes"][-1:])
    caches = [None, None]
    if "causal" in params:
        caches = [[[] for _ in range(hmar.block_count(params))] for _ in conditions]
    f_hat = torch.zeros(1, codec["codebook"].shape[1], *scales[-1], dtype=torch.float64)
    for k, (h, w) in enumerate(scales):
        tokens, hidden, seen = [0] * (h * w), list(range(h * w)), [0] * (h * w)
        keeps = options["schedule"][k]
        if known is not None:
            left = known[0] - f_hat
            cells = F.adaptive_avg_pool2d(left, (h, w)).flatten(2)[0].T  # (n, code_dim)
            tokens = torch.cdist(cells, codec["codebook"]).argmin(1).tolist()
            share = F.adaptive_avg_pool2d(known[1].double(), (h, w)).flatten()
            hidden = [place for place in hidden if share[place] < 1 - 1e-9]
            keeps = slow_shares(keeps, len(hidden), h * w)
            seen = sample.evidence(codec["codebook"], left, known[1], (h, w))[0]
        inputs = tokenizer.resize_to_scale(f_hat, (h, w))
        for number, keep in enumerate(keeps):
            mask = torch.tensor([[place in hidden for place in range(h * w)]])
            t, branch, given = options["guidance"], "next_scale", [inputs]
            heat = options["temperature"]
            if number:
                zeroed = None if "leak" in params["masked"] else mask
                own = torch.tensor([tokens])
                own = tokenizer.own_inputs_of_scale(codec, own, k, scales, zeroed)
                t, branch, given = options["mask_guidance"], "masked", [inputs, own, mask]
            if len(scales) > 1:
                t = t * (k / (len(scales) - 1)) ** options["rise"]
                heat = heat * options["cooling"] ** (1 - k / (len(scales) - 1))
            features = partial(hmar.features, params, k=k)
            pairs = zip(conditions, caches)
            both = [features(vector, *given, cache=cache)[0] for vector, cache in pairs]
            numbers = np.random.default_rng((seed, k, number)).random(h * w)
            confidence = {}

            # one after another, after those near, which a head may look at
            for place in sorted(hidden, key=lambda place: place % w + 2 * (place // w)):
                near = torch.tensor([tokens])
                near = hmar.neighbour_tokens(params[branch], near, [(h, w)])[0, place]
                pair = [hmar.logits(params[branch], x[place], near) for x in both]
                logits = (1 + t) * pair[0] - t * pair[1]
                logits = (logits + seen[place]) / (heat or 1)
                row = (logits - logits.max()).tolist()
                codes = slow_filter(row, options["top_k"], options["top_p"])
                uniform = numbers[place] if heat else None
                tokens[place], confidence[place] = slow_sample(row, codes, uniform)
            order = sorted(hidden, key=lambda place: (-confidence[place], place))
            hidden = sorted(order[keep:])
            grown = f_hat + tokenizer.contribution(codec, torch.tensor([tokens]), k, scales)
            yield (k, number, list(tokens), hidden), grown[0]
        f_hat = grown


def some_known(scales, seed, count=1):
    """(features, outside) of an edit; features are large, or evidence decides every token."""
    features, chances = normal(2, count, 4, *scales[-1], seed=seed)
    return 10 * features, chances[:, :1] > 0


@st.composite
def schedules(draw, scales):
    """Of each scale but the first, its tokens cut at random places; a pass may keep none."""
    passes = []
    for k, (h, w) in enumerate(scales):
        cuts = sorted(draw(st.lists(st.integers(0, h * w), max_size=3))) if k else []
        passes.append(tuple(b - a for a, b in itertools.pairwise([0, *cuts, h * w])))
    return tuple(passes)


@settings(max_examples=60)
@given(pyramids(3, 3), st.data(), st.integers(0, 3), st.booleans(), st.booleans())
def test_passes_are_those_of_a_plain_loop(scales, data, batch, own_input, looks):
    """batch 0: of an edit. With neighbours the plain loop samples one token after another."""
    seed, is_causal = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    one_pass = st.just([[count] for count in tokenizer.lengths(scales)])
    options = dict(
        schedule=data.draw(one_pass if is_causal else schedules(scales)),
        guidance=data.draw(st.sampled_from([0, 1.5, 4])),
        mask_guidance=data.draw(st.sampled_from([0, 1.5])),
        rise=data.draw(st.sampled_from([0, 1, 2])),
        temperature=data.draw(st.sampled_from([0, 0.2, 0.5, 1.0, 3.0])),
        cooling=data.draw(st.sampled_from([1, 0.5, 2])),
        top_k=data.draw(st.integers(0, 6)),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.4])),
    )
    params = tree(scales, own_input=own_input, neighbours=looks, seed=seed)
    params |= dict(causal={}) if is_causal else {}
    codec, labels = quantiser(5, 4, seed=seed), torch.arange(max(1, batch)) * 2 % 4
    conditions = params["classes"][labels]
    if data.draw(st.booleans()):  # vectors of no class
        labels = conditions = normal(*conditions.shape, seed=seed)
    known = some_known(scales, seed) if batch == 0 else None
    steps = list(sample.steps(params, codec, labels, known=known, seed=seed, **options))
    for i in range(len(labels)):
        slow = slow_steps(params, codec, conditions[[i]], seed + i, options, known)
        for step, (expected, f_hat) in zip(steps, slow, strict=True):
            hidden = step.hidden[i].nonzero().flatten().tolist()
            assert (step.scale, step.pass_index, step.tokens[i].tolist(), hidden) == expected
            close(step.f_hat[i], f_hat)


def test_guidance_rises_over_the_scales_by_a_power():
    """The middle of three scales has a quarter of it as a square, half of it as a line."""
    middles = []
    for guidance, rise in ((4, 2), (2, 1), (4, 1)):
        options = dict(guidance=guidance, rise=rise)
        _, middle, _ = sample.steps(PARAMS, CODEC, torch.arange(60) % 3, **options)
        middles.append(middle.tokens)
    assert torch.equal(*middles[:2]) and not torch.equal(*middles[1:])


@pytest.mark.parametrize("guidance, copies", [(0, 1), (2, 2)])
def test_without_guidance_var_computes_nothing_without_a_class(guidance, copies):
    """With guidance it does from scale 0 on, where guidance is 0, because the cache holds it."""
    with mock.patch.object(hmar, "features", wraps=hmar.features) as features:
        list(sample.steps(VAR, CODEC, LABELS, guidance=guidance, mask_guidance=3))
        sample.edit(VAR_MODEL, picture(3), HALF, LABELS, guidance=guidance, particles=2)
    sizes = [len(call.args[1]) for call in features.call_args_list]
    assert sizes == [3 * copies] * 3 + [6 * copies] * 3


TOP_P = st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0])


@given(st.integers(1, 12), st.integers(0, 14), TOP_P, st.booleans(), st.integers(0, 999))
@example(7, 4, 0.9, True, 1)
def test_filters_are_those_of_plain_loops(codes, top_k, top_p, tied, seed):
    logits = normal(9, codes, seed=seed, scale=2)
    logits = logits.round() if tied else logits
    for token, kept in zip(logits.tolist(), sample.filter_logits(logits, top_k, top_p).tolist()):
        stay = slow_filter(token, top_k, top_p)
        assert kept == [token[code] if code in stay else -math.inf for code in range(codes)]


def test_codes_that_were_filtered_out_are_never_sampled():
    logits = torch.tensor([-math.inf, 5.0, -math.inf, -35.0, -math.inf]).expand(2, 5)
    tokens, _ = sample.sample_codes(logits, torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert tokens[0] == 1 and tokens[1] in (1, 3)


def test_the_temperature_divides_the_logits_before_the_filters():
    logits, uniform = normal(200, 5, scale=2), torch.linspace(0, 0.99, 200, dtype=torch.float64)
    for temperature in (0.001, 0.2, 3.0):
        ours = sample.sample_codes(logits, uniform, temperature, top_p=0.8)
        filtered = sample.filter_logits(logits / temperature, top_p=0.8)
        for token, p, row, number in zip(*ours, filtered.tolist(), uniform.tolist()):
            row = [x - max(row) for x in row]
            codes = [code for code in range(5) if row[code] > -math.inf]
            assert token == slow_sample(row, codes, number)[0]
            assert math.isclose(p, slow_sample(row, codes, number)[1])
    greedy, _ = sample.sample_codes(logits, uniform, 0.0009)
    assert torch.equal(greedy, logits.argmax(-1))


@given(pyramids(5, 5), st.integers(0, 30))
def test_schedules_sum_to_their_scales(scales, passes):
    counts = tokenizer.lengths(scales)
    for k, keeps in enumerate(sample.masked_schedule(scales, passes)):
        assert sum(keeps) == counts[k] and min(keeps) >= 1
        assert len(keeps) == (min(passes + 1, counts[k]) if k else 1)
    for k, keeps in enumerate(sample.masked_schedule(scales, passes, refined_tokens=6)):
        assert keeps == sample.masked_schedule(scales, passes if counts[k] <= 6 else 0)[k]
    cosine = [13, 36, 57, 71, 79]  # round(256 (1 - cos)), differenced
    assert sample.masked_schedule(((1, 1), (16, 16)), 4)[1] == cosine


# Images


@pytest.mark.parametrize(
    "params, options", [(PARAMS, {}), (VAR, {}), (PARAMS, dict(temperature=0, top_k=3))]
)
def test_images_depend_on_arguments_alone(params, options, monkeypatch):
    model = MODEL | dict(transformer=params)
    labels, seeds = torch.tensor([2, 0, 3, 1, 2]), [7, 3, 11, 4, 2**40]
    options = options | dict(guidance=4, rise=2)
    before, state = copy.deepcopy((CODEC, params)), torch.get_rng_state()
    images = sample.generate(model, labels, seed=seeds, **options)
    assert torch.equal(torch.get_rng_state(), state) and leaves_equal(before, (CODEC, params))
    settings = SAMPLING | options
    passes = list(sample.steps(params, CODEC, labels, seed=seeds, **settings))
    tokens = torch.cat([step.tokens for step in passes], 1)
    close(images, tokenizer.decode(CODEC, tokens, SCALES), 1e-5)
    for batch in ([0], [4, 2], [3, 1, 0], [1, 1], []):
        options["seed"] = [seeds[i] for i in batch]
        part = sample.generate(model, labels[batch], **options)
        close(part, images[batch], 1e-5)
        passes = list(sample.steps(params, CODEC, labels[batch], **settings | options))
        assert torch.equal(torch.cat([step.tokens for step in passes], 1), tokens[batch])

    # in parts of two, seeds and labels go on
    monkeypatch.setattr(sample, "images_at_once", lambda pixels: 2)
    decode = tokenizer.decode_features
    with mock.patch.object(tokenizer, "decode_features", wraps=decode) as decoded:
        close(sample.generate(model, labels, **options | dict(seed=seeds)), images, 1e-5)
    assert [len(call.args[1]) for call in decoded.call_args_list] == [2, 2, 1]
    whole = sample.generate(model, labels, seed=3)
    close(sample.generate(model, labels, seed=[3, 4, 5, 6, 7]), whole, 0)


def test_a_model_is_sampled_with_its_own_settings_and_by_the_names_of_its_classes():
    images = sample.generate(MODEL, ["star", "disc", "1"], seed=4)
    assert torch.equal(images, sample.generate(MODEL, [2, 0, 1], seed=4))
    *_, last = sample.steps(PARAMS, CODEC, [2, 0, 1], seed=4, **SAMPLING)
    assert torch.equal(images, tokenizer.decode_features(CODEC, last.f_hat))
    weak = sample.generate(MODEL, [2, 0, 1], seed=4, guidance=0)
    assert torch.equal(
        weak, sample.generate(MODEL | dict(sampling=SAMPLING | dict(guidance=0)), [2, 0, 1], seed=4)
    )
    assert not torch.equal(weak, images)
    refused("^labels: got 'bird', expected 0 to 2 or", sample.generate, MODEL, ["bird"])
    numbered = MODEL | dict(classes=["1", "2", "0"])  # a text is a name, if there is such a class
    assert torch.equal(images, sample.generate(numbered, ["0", 0, "2"], seed=4))
    vectors = PARAMS["classes"][[2, 0, 1]]
    assert torch.equal(sample.generate(MODEL, vectors, seed=4), images)
    assert not torch.equal(sample.generate(MODEL, -vectors, seed=4), images)


def blocks(depth):
    """A tree's trunk at this depth."""
    return dict(trunk=PARAMS["trunk"] * (depth - 1))  # a block is the branch's


def test_published_trees_are_sampled_with_published_settings():
    common = dict(mask_guidance=0, rise=1, temperature=1, cooling=1)
    for depth, guidance, top_k in ((2, 1.7, 1000), (20, 1.9, 950), (24, 2.1, 900), (30, 1.6, 650)):
        expected = common | dict(guidance=guidance, top_k=top_k, top_p=0.99)
        assert sample.published_sampling(PLAIN | blocks(depth)) == expected
        expected["schedule"] = [[1], [1, 3], [1, 1, 2, 5], [12]]
        positions = dict(positions=[torch.zeros(h, w, 1) for h, w in (*SCALES[:2], (3, 3), (3, 4))])
        assert sample.published_sampling(PARAMS | blocks(depth) | positions) == expected
        expected = common | dict(guidance=1.5, top_k=900, top_p=0.96)
        assert sample.published_sampling(VAR | blocks(depth)) == expected


# Editing


def picture(batch, seed=0):
    return torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


MASKS = torch.rand(6, 1, 6, 8, generator=torch.Generator().manual_seed(1)) < 0.2
for index, left in enumerate((8, 0, 4, 7)):  # hides nothing, all, half, a column
    MASKS[index] = torch.arange(8) >= left
HALF = MASKS[[2, 2, 2]]


@pytest.mark.parametrize(
    "params, options",
    [(PLAIN, {}), (PARAMS, {}), (VAR, {})]  # VAR takes one pass a scale
    + [(PARAMS, dict(schedule=keeps)) for keeps in ([[1], [4], [12]], [[1], [0, 4], [3, 0, 9]])],
)
@pytest.mark.parametrize("particles", [1, 3])
def test_each_image_is_edited_as_alone(params, options, particles):
    """Outside the mask it stays as it is; under a full mask it is as generated."""
    images, labels = picture(6), torch.tensor([1, 2, 0, 2, 3, 0])
    model = MODEL | dict(transformer=params)
    edit = partial(sample.edit, model, particles=particles, **options)
    with (
        mock.patch.object(sample, "images_at_once", return_value=12),
        mock.patch.object(tokenizer, "network", wraps=tokenizer.network) as networks,
        mock.patch.object(hmar, "features", wraps=hmar.features) as transformer,
    ):
        edited = edit(images, MASKS, labels, seed=9)
    # Memory is bounded: so many are encoded, then decoded, at once.
    expected = [6, 6] if particles == 1 else [4, 4, 2, 2]
    assert [len(call.args[0]) for call in networks.call_args_list] == expected
    most = max(len(call.args[1]) for call in transformer.call_args_list)
    assert most == 2 * min(12, 6 * particles)  # with and without a class
    assert torch.equal(edited.masked_fill(MASKS, 0), images.masked_fill(MASKS, 0))
    for i in range(6):
        own = [x[i : i + 1] for x in (images, MASKS, labels)]
        close(edited[i : i + 1], edit(*own, seed=9 + i), 1e-5)
    passes = 1 if params is PARAMS and not options else 0
    options = dict(schedule=sample.masked_schedule(SCALES, passes)) | options
    if particles == 1:
        generated = sample.generate(model, labels[1:2], seed=10, **options)
        close(edited[1:2], generated, 1e-5)


@given(
    pyramids(3, 3).filter(lambda x: len(x) > 1), st.booleans(), st.booleans(), st.integers(0, 99)
)
@example(SCALES, False, True, 0)
@example(SCALES, True, True, 1)
@example(SCALES, False, True, 5)  # guided, and a particle has moved
def test_particles_are_weighed_by_the_likelihood_of_given_tokens(scales, looks, is_causal, seed):
    """Given the coarser tokens of their own past, which resampling has moved to other rows."""
    params, codec = tree(scales, masked=0, neighbours=looks, seed=seed), quantiser(5, 4, seed=seed)
    params |= dict(causal={}) if is_causal else {}
    features, outside = some_known(scales, seed, 2)
    options = dict(known=(features, outside), particles=2, seed=seed, guidance=seed % 3)
    labels, sampled, likelihoods, moves = torch.tensor([1, 2]), [], [], []
    whole = sample.resample_particles

    def resample(state, likelihood, *given):
        sampled.append(state[0])
        likelihoods.append(likelihood.clone())
        chance = normal(4, seed=seed + len(moves), scale=9)
        moves.append(whole(torch.arange(4), chance, *given))
        return whole(state, chance, *given)

    with mock.patch.object(sample, "resample_particles", resample):
        list(sample.steps(params, codec, labels, **options))
    labels, outside = labels.repeat_interleave(2), outside.repeat_interleave(2, 0)
    tokens = torch.zeros(4, sum(tokenizer.lengths(scales)), dtype=torch.int64)
    scale_parts = tokens.split(tokenizer.lengths(scales), 1)  # views, filled scale by scale
    for k, size in enumerate(scales):
        scale_parts[k].copy_(sampled[k])
        inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
        log_p = -hmar.losses(params, labels, tokens, inputs)
        part = log_p.split(tokenizer.lengths(scales), 1)[k]
        is_given = F.adaptive_avg_pool2d(outside.double(), size).flatten(1) > 1 - 1e-9
        close(likelihoods[k], part.masked_fill(~is_given, 0).sum(1), 1e-9)
        tokens.copy_(tokens[moves[k]])


def test_particles_of_all_images_have_seeds_of_their_own():
    """The first has its image's, the others are far from those of any batch of images."""
    seeds = [5, 6, 7, 2**20, 2**40]
    images, masks = picture(1).expand(5, -1, -1, -1), HALF[[0] * 5]
    with mock.patch.object(np.random, "default_rng", wraps=np.random.default_rng) as streams:
        sample.edit(MODEL, images, masks, [1] * 5, seed=seeds, particles=8)
    by_pass = {}
    for seed, *place in (call.args[0] for call in streams.call_args_list):
        by_pass.setdefault(tuple(place), []).append(seed)
    passes = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert by_pass.keys() == {*passes, (0, 2**31), (1, 2**31)}
    for place in passes:
        used = by_pass[place]
        assert used[::8] == seeds and len({*used}) == 40
        far = {*used} - {*seeds}
        assert not far & {seed + i for seed in seeds for i in range(-1000, 1000)}
    for k in (0, 1):  # where particles are resampled
        assert by_pass[k, 2**31] == seeds


@pytest.mark.parametrize("dtype", [np.int32, np.uint64])
def test_seeds_may_be_integers_of_numpy(dtype):
    """Those of particles are far larger, and would overflow."""
    given = picture(3), HALF, LABELS
    edit = partial(sample.edit, MODEL, *given, particles=2)
    assert torch.equal(edit(seed=np.array([5, 3, 9], dtype)), edit(seed=[5, 3, 9]))
    assert torch.equal(edit(seed=dtype(5)), edit(seed=5))
    ours, theirs = (sample.generate(MODEL, [1, 2], seed=x) for x in (dtype(2), [2, 3]))
    assert torch.equal(ours, theirs)


def test_resampling_of_an_image_has_a_random_number_of_its_own():
    """As alone, whatever the seeds of the batch; other ones than tokens have; others by scale."""
    likelihood = normal(300).view(100, 3).flatten()

    def choose(likelihood, **options):
        rows = torch.arange(len(likelihood))
        return sample.resample_particles(rows, likelihood, 3, is_last=False, **options)

    seeds = np.arange(100).repeat(3)
    scales = [choose(likelihood, seeds=seeds, k=k) for k in (0, 1)]
    assert not torch.equal(*scales)
    for k, chosen in enumerate(scales):
        for i, own in enumerate(chosen.view(100, 3).tolist()):
            part = likelihood[3 * i : 3 * i + 3]
            assert own == (choose(part, seeds=np.array([i] * 3), k=k) + 3 * i).tolist()
            weights = part.softmax(0).cumsum(0).tolist()
            offset = np.random.default_rng((i, k, 2**31)).random()
            points = [(point + offset) / 3 for point in range(3)]
            expected = [sum(weight <= point for weight in weights) for point in points]
            assert own == [3 * i + min(2, choice) for choice in expected]


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=3), st.integers(0, 99))
def test_particles_are_resampled_in_proportion(likelihood, seed):
    likelihood = torch.tensor([likelihood, [0.0, 0.0, -80.0]], dtype=torch.float64)
    given = torch.arange(6), likelihood.flatten(), 3, np.array([seed] * 3 + [seed + 1] * 3), 1
    rows = sample.resample_particles(*given, is_last=False).view(2, 3)
    counts = torch.stack([(rows[0] == i).sum() for i in range(3)])
    assert ((counts - 3 * likelihood[0].softmax(0)).abs() < 1 + 1e-9).all() and counts.sum() == 3
    assert set(rows[1].tolist()) == {3, 4}  # of the second image, and never its third particle
    rows = sample.resample_particles(*given, is_last=True).view(2, 3)
    assert (rows[0] == likelihood[0].argmax()).all() and (rows[1] == 3).all()


def test_more_particles_agree_better_with_what_is_visible():
    """Of the features that the tokens add up to, outside of the mask."""
    images, found, labels = picture(24, seed=3), [], LABELS.repeat(8)
    features = tokenizer.encode_features(CODEC, images)
    outside = F.adaptive_max_pool2d(MASKS[[2] * 24].float(), SCALES[-1]) == 0
    schedule = sample.masked_schedule(SCALES, 1)
    for particles in (1, 8):
        options = dict(known=(features, outside), particles=particles, schedule=schedule)
        *_, last = sample.steps(PARAMS, CODEC, labels, **options)
        error = (features - last.f_hat[::particles]).square().mean(1, keepdim=True)
        found.append(error[outside].mean())
    assert found[1] < found[0]


def test_edits_take_a_masked_pass_by_default():
    given = picture(3), HALF, LABELS
    none, one = (sample.masked_schedule(SCALES, passes) for passes in (0, 1))
    edited = sample.edit(MODEL, *given)
    assert torch.equal(edited, sample.edit(MODEL, *given, schedule=one))
    assert not torch.equal(edited, sample.edit(MODEL, *given, schedule=none))
    stored = MODEL | dict(sampling=SAMPLING | dict(schedule=none))  # that of its samples
    assert torch.equal(edited, sample.edit(stored, *given))
    plain = MODEL | dict(transformer=PLAIN)
    assert torch.equal(sample.edit(plain, *given), sample.edit(plain, *given, schedule=none))


@given(st.integers(0, 2**20), st.floats(0, 1))
def test_pixels_under_the_mask_change_nothing(seed, share):
    generator = torch.Generator().manual_seed(seed)
    one, other, chance = (torch.rand(3, 3, 6, 8, generator=generator) for _ in range(3))
    mask = chance[:, :1] < share
    pictures = [torch.where(mask, hidden, 2 * one - 1) for hidden in (1 - 2 * other, math.nan)]
    edits = [sample.edit(MODEL, images, mask, LABELS, seed=seed) for images in pictures]
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

    # visible positions that are alike, and a cell that is visible wholly, have limits
    flat = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    logits = sample.evidence(codebook, flat, outside, (2, 2))
    distance = (codebook - 1).square().sum(1)
    close(logits[0, 0], -0.5 * distance * 4 * 0.75 / (1 - 0.75) / 1e-4, 1e-6)
    logits = sample.evidence(codebook, flat, outside | True, (2, 2))
    close(logits[0, 0], -0.5 * distance * 4 / 1e-2 / 1e-4, 1e-6)


def test_what_decoding_does_at_the_edge_is_taken_back():
    """Here it makes a grey picture lighter by 0.25: next to the edge all of it is taken off."""
    images, mask = torch.zeros(3, 3, 6, 8), MASKS[[2, 4, 5]]
    with mock.patch.object(tokenizer, "decode_features", return_value=images + 0.25):
        edited = sample.edit(MODEL, images, mask, LABELS)
    reach = 2 * tokenizer.downsampling(CODEC)
    for i, y, x in itertools.product(range(3), range(6), range(8)):
        outside = (~mask[i, 0]).nonzero()
        distance = (outside - torch.tensor([y, x])).abs().amax(1).min()
        expected = 0.25 * (distance / (reach + 1)).clamp(max=1)
        close(edited[i, :, y, x], expected.expand(3), 1e-6)


def test_outside_the_mask_the_known_features_are_decoded():
    images, cell = picture(3), tokenizer.downsampling(CODEC)
    decoder = mock.patch.object(tokenizer, "decode_features", wraps=tokenizer.decode_features)
    with decoder as decode:
        sample.edit(MODEL, images, HALF, LABELS)
    (_, decoded) = decode.call_args.args
    visible = sample.replace_hidden(images, HALF, 4 * cell)
    *_, (_, _, known) = tokenizer.quantise(CODEC, tokenizer.encode_features(CODEC, visible), SCALES)
    is_known = (decoded - known).abs().amax(1) < 1e-5  # (3, 3, 4)
    outside = F.adaptive_max_pool2d(HALF.float(), SCALES[-1])[:, 0] == 0
    assert is_known[outside].all() and not is_known[~outside].all()


def test_arguments_that_do_not_fit_are_refused():
    known = torch.zeros(3, 8, 3, 4), torch.ones(3, 1, 3, 4).bool()
    for message, options in {
        r"tokenizer: .*got .*\(32, 8\), expected \(16, 8\)": dict(codec=small_codec(codes=32)),
        "seed: got 2 for 3": dict(seed=[1, 2]),
        "schedule: .* need a masked branch": dict(params=PLAIN, schedule=[[1], [1, 3], [12]]),
        r"schedule: .*\(VAR has none": dict(params=VAR, schedule=[[1], [1, 3], [12]]),
        "schedule: .*scale > 0": dict(schedule=[[1, 0], [4], [12]]),
        "top_p: got nan": dict(top_p=math.nan),
        "top_p: got 95": dict(top_p=95),
        "top_p: got 0": dict(top_p=0.0),
        "rise: got -1": dict(rise=-1),
        "guidance: got nan": dict(guidance=math.nan),
        "temperature: got -1": dict(temperature=-1),
        "cooling: got -1": dict(cooling=-1),
    }.items():
        options = dict(params=PARAMS, codec=CODEC, labels=LABELS) | options
        for more in ({}, dict(known=known, particles=2)):
            refused(f"^{message}", lambda **given: next(sample.steps(**given)), **options, **more)
    refused("^masked_passes: got -1", sample.masked_schedule, SCALES, -1)

    black = torch.zeros(3, 3, 6, 8, dtype=torch.uint8)  # which in [-1, 1] would be grey
    refused("^images: got .*uint8", sample.edit, MODEL, black, HALF, LABELS)
    message = r"^mask: got .*, expected a bool tensor \(3, 1, 6, 8\), a label each"
    for mask, labels in ((HALF.byte(), LABELS), (HALF[:2], LABELS), (HALF, LABELS[:1])):
        refused(message, sample.edit, MODEL, picture(3), mask, labels)


@pytest.mark.parametrize("labels", [[0, 4, 1], [0, -1, 1]])
def test_classes_that_do_not_exist_are_refused(labels):
    with pytest.raises(IndexError):
        sample.generate(MODEL, labels)


# Model files


def save_model(folder, **parts):
    Path(folder).mkdir(exist_ok=True)
    torch.save(MODEL | parts, f"{folder}/model.pt")


def test_a_model_file_is_all_that_sampling_needs():
    """A run folder, its model.pt and a copy of that elsewhere are the same model."""
    save_model("run")
    Path("copy.pt").write_bytes(Path("run/model.pt").read_bytes())
    for path in ("run", "run/model.pt", Path("copy.pt")):
        loaded = sample.load_model(path)
        assert loaded.keys() == MODEL.keys()
        assert leaves_equal(loaded["transformer"], PARAMS)
        assert leaves_equal(loaded["tokenizer"], CODEC)
        assert loaded["classes"] == NAMES and loaded["sampling"] == SAMPLING
        images = sample.generate(MODEL, ["ring"])
        assert torch.equal(sample.generate(loaded, ["ring"]), images)


def test_published_weights_become_models():
    golden = torch.load(GOLDEN)["state"]
    for name in golden:
        torch.save(golden[name], name)
    scales = ((1, 1), (2, 2), (3, 3), (4, 4))
    for name in ("var", "nsp", "hmar"):
        model = sample.load_model(name, "vqvae", scales)
        params = hmar.from_published(golden[name], scales)
        assert leaves_equal(model["transformer"], params)
        assert leaves_equal(model["tokenizer"], tokenizer.from_published(golden["vqvae"]))
        assert ("causal" in model["transformer"]) == (name == "var")
        assert model["classes"] == [str(label) for label in range(10)]
        assert model["sampling"] == sample.published_sampling(params)
    assert sample.load_model("vqvae").keys() == {"tokenizer"}


def test_files_that_hold_no_model_are_refused_and_run_no_code():
    class Harmful:
        def __reduce__(self):
            return Path("harm").mkdir, ()

    torch.save(Harmful(), "code.pt")
    torch.save([1], "list.pt")
    torch.save({"x": torch.zeros(1)}, "foreign.pt")
    Path("empty.pt").write_bytes(b"")
    Image.new("L", (8, 6)).save("photo.png")
    for name in ("code.pt", "list.pt", "foreign.pt", "empty.pt", "photo.png", "none"):
        refused(f"^{name}: expected published weights, or a run", sample.load_model, name)
    assert not Path("harm").exists()


@pytest.mark.parametrize("path", ["begun", "begun/checkpoint.pt"])
def test_a_run_whose_training_has_not_finished_is_refused(path):
    Path("begun").mkdir()
    for name in ("args.json", "checkpoint.pt"):
        torch.save(dict(stage="tokenizer", state={}), Path("begun", name))
    refused(f"^{path}: .* a run of train.py whose training has finished", sample.load_model, path)


# The command


@pytest.fixture
def run(own_folder):
    save_model("run")
    Image.fromarray(sample.to_bytes(picture(1))[0]).save("photo.png")
    Image.fromarray(HALF[0, 0].numpy()).save("mask.png")
    return "run"


def call(*flags):
    """The line with which the command fails, or None."""
    return failure(sample.main, "--dtype", "fp32", "--device", "cpu", *flags)


def archived(*flags):
    path = f"{len(contents('.'))}.npz"
    assert call(*flags, "--out", path) is None
    return in_order(np.load(path)["arr_0"])


def in_order(shuffled):
    """An array of an archive, in the order of sampling."""
    return shuffled[np.argsort(np.random.default_rng(0).permutation(len(shuffled)))]


def assert_sampled(pixels, labels, model=MODEL, **options):
    """pixels (B, H, W, 3) are what `generate` makes of these labels."""
    images = sample.generate(model, torch.tensor(labels), **options)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - sample.to_bytes(images)).max() <= 1


def opened(folder):
    """{name: pixels}, in order."""
    paths = sorted(Path(folder).iterdir())
    return {path.name: np.asarray(Image.open(path)) for path in paths}


def test_the_command_samples_the_same_images_in_every_form(run, capsys):
    flags = (run, "--labels", "star", "0", "--count", 3, "--seed", 5, "--out")
    for name in ("sheet.png", "growing.gif", "all.npz", "folder"):
        assert call(*flags, name) is None
        printed = capsys.readouterr().out
        assert f"{name}: 3 each of star, disc\n" in printed and "guidance 6; " in printed
    labels, archive = [2, 2, 2, 0, 0, 0], np.load("all.npz")
    # Parts of an archive have to show several classes, for the Inception Score.
    assert archive["labels"].tolist() not in (labels, sorted(labels))
    pixels = in_order(archive["arr_0"])
    assert_sampled(pixels, labels, seed=5)
    assert in_order(archive["labels"]).tolist() == labels
    images = opened("folder")
    assert [*images] == [f"{i:06d}-{NAMES[label]}.png" for i, label in enumerate(labels)]
    assert np.array_equal(np.stack([*images.values()]), pixels)

    page, gif = Image.open("sheet.png"), Image.open("growing.gif")
    left = page.width - 3 * (64 + 2)  # images grow by whole pixels
    assert page.height == 2 * (48 + 2) and left > 12
    rows = np.asarray(page).reshape(2, 50, -1, 3)
    assert np.array_equal(rows[:, :48:8, left : left + 64 : 8], pixels[::3])
    assert gif.n_frames == 3 and gif.size == page.size  # a page for each pass
    steps = sample.steps(PARAMS, CODEC, torch.tensor(labels), seed=5, **SAMPLING)
    for number, step in enumerate(steps):
        gif.seek(number)
        shown = np.asarray(gif.convert("RGB"), int)[:48:8, left : left + 64 : 8]
        truth = sample.to_bytes(tokenizer.decode_features(CODEC, step.f_hat[:1]).detach())[0]
        assert np.abs(shown - truth).mean() < 3  # of a palette


def test_archives_and_folders_have_all_classes_and_pictures_ten():
    params = tree(SCALES, classes=12, codes=16, code_dim=8, random=False)
    names = [f"a {i}/b" for i in range(12)]
    save_model("run", transformer=params, classes=names)
    for out in ("all.npz", "folder", "grid.png"):
        assert call("run", "--count", 1, "--out", out) is None
    assert in_order(np.load("all.npz")["labels"]).tolist() == [*range(12)]
    assert [*opened("folder")] == [f"{i:06d}-a_{i}_b.png" for i in range(12)]
    assert Image.open("grid.png").height == 10 * 50


def test_a_folder_that_is_not_empty_is_refused(run):
    """Images of other settings would stay there, and a Fréchet distance would be wrong."""
    Path("empty").mkdir()
    assert call(run, "--count", 1, "--out", "empty") is None
    before = contents("empty")
    message = call(run, "--count", 2, "--seed", 3, "--out", "empty")
    assert message.startswith("sample.py: --out: got empty, which is not empty")
    assert contents("empty") == before and len(before) == 3


@pytest.mark.parametrize("name", ["all.npz", "page.png", "page.gif"])
def test_a_full_disk_loses_no_file_that_was_there(run, name):
    resource = pytest.importorskip("resource")  # Windows has no such limit
    assert call(run, "--count", 1, "--out", name) is None
    before, limits = Path(name).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(OSError):
            call(run, "--count", 1, "--out", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(name).read_bytes() == before and len(before) > 400


def test_processes_share_the_images_of_a_folder(run, monkeypatch):
    """Together they write what one would, in the same batches."""
    monkeypatch.setattr(sample, "images_at_once", lambda pixels: 2)
    assert call(run, "--count", 3, "--out", "one") is None
    waited = []
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name: waited.append(name))
    found = {}
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert call(run, "--count", 3, "--out", f"part{rank}") is None
        part = contents(f"part{rank}")
        assert part and not part.keys() & found.keys()
        found |= part
    assert found == contents("one") and len(found) == 9
    assert waited == 2 * ["init_process_group", "barrier"]
    assert "several processes need a folder" in call(run, "--count", 3, "--out", "all.npz")


def test_an_error_inside_sampling_keeps_its_traceback(run, monkeypatch):
    for error in (ValueError("too many values"), FileNotFoundError("weights")):
        monkeypatch.setattr(hmar, "self_attention", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            call(run, "--count", 1)


def test_the_command_edits(run):
    photo = Image.open("photo.png")
    inner, photo = np.asarray(photo.resize((6, 4))), np.asarray(photo)
    edit = (run, "--edit", "photo.png", "--labels", "ring", "--count", 2)
    for pixels in archived(*edit, "--mask", "mask.png"):
        assert np.array_equal(pixels[:, :4], photo[:, :4]) and not np.array_equal(pixels, photo)
    for pixels in archived(*edit, "--pad", 0.2):
        assert pixels.shape == (6, 8, 3) and np.array_equal(pixels[1:5, 1:7], inner)
    archived(*edit, "--pad", 0.49)
    _, mask = sample.read_photo_and_mask("photo.png", None, 0.25, (80, 60))
    rows, columns = mask[0, 0].logical_not().nonzero().T
    assert {*rows.tolist()} == {*range(15, 45)} and {*columns.tolist()} == {*range(20, 60)}

    # what a model stores is the schedule of its samples; edits take a masked pass all the same
    lone = [[1], [4], [12]]
    save_model("other", sampling=SAMPLING | dict(schedule=lone))
    given = (*edit[1:], "--mask", "mask.png")
    ours, theirs = (archived(name, *given) for name in ("run", "other"))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, archived("run", *given, "--mask-steps", 0))
    with mock.patch.object(sample, "edit", wraps=sample.edit) as edited:
        archived("run", *given, "--particles", 3)
        archived("run", *given)
        archived("run", *given, "--particles", 40)  # a batch of 50 samples has room for one image
    calls = [(call.kwargs["particles"], len(call.args[1])) for call in edited.call_args_list]
    assert calls == [(3, 2), (8, 2), (40, 1), (40, 1)]


def test_a_picture_of_edits_begins_with_the_image_and_what_is_visible(run):
    flags = ("--edit", "photo.png", "--mask", "mask.png", "--labels", "ring", "star", "--count", 2)
    pixels = archived(run, *flags)
    photo = np.asarray(Image.open("photo.png"))
    for name in ("page.png", "page.gif"):
        assert call(run, *flags, "--out", name) is None
    page = Image.open("page.png")
    assert Image.open("page.gif").n_frames == 1
    left = page.width - 4 * (64 + 2)
    rows = np.asarray(page).reshape(2, 50, -1, 3)[:, :48:8]
    shown = [rows[:, :, left + 66 * i : left + 66 * i + 64 : 8] for i in range(4)]
    for row in range(2):
        assert np.array_equal(shown[0][row], photo)
        assert np.array_equal(shown[1][row][:, :4], photo[:, :4])
        assert (shown[1][row][:, 4:] == 128).all()
    results = np.stack(shown[2:], 1).reshape(4, 6, 8, 3)
    assert np.array_equal(results, pixels)


@given(width=st.integers(3, 70), height=st.integers(3, 70))
def test_what_the_command_shows_does_not_depend_on_hidden_pixels(width, height):
    """Although large photos are reduced and small ones enlarged."""
    hidden = np.zeros((height, width), bool)
    hidden[height // 2 :, width // 2 :] = True
    first = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    second = np.where(hidden[:, :, None], 255 - first, first)
    Image.fromarray(hidden).save("mask.png")
    shown = []
    for photo in first, second:
        Image.fromarray(photo).save("photo.png")
        pixels, mask = sample.read_photo_and_mask("photo.png", "mask.png", 0, (8, 6))
        shown.append(pixels.masked_fill(mask, 0))
    assert torch.equal(*shown)


def test_a_thin_stroke_of_a_large_mask_is_repainted(run):
    stroke = np.zeros((600, 800), np.uint8)
    stroke[:, 205:209] = 255
    Image.fromarray(stroke).save("stroke.png")
    _, mask = sample.read_photo_and_mask("photo.png", "stroke.png", 0, (8, 6))
    assert mask[..., 2].all() and mask.sum() == 6
    # a pixel of the model is the mean of the photo's
    fine = np.indices((24, 32)).sum(0) % 2 * 255
    Image.fromarray(fine.astype(np.uint8)).save("fine.png")
    pixels, _ = sample.read_photo_and_mask("fine.png", "stroke.png", 0, (8, 6))
    assert pixels.abs().max() < 0.01
    # light grey counts as white, dark grey as black
    Image.fromarray(np.uint8([[0, 127, 128, 255]]).repeat(3, 0)).resize((8, 6), 0).save("grey.png")
    _, mask = sample.read_photo_and_mask("photo.png", "grey.png", 0, (8, 6))
    assert torch.equal(mask[0, 0, 0], torch.tensor([False] * 4 + [True] * 4))


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_strokes_on_a_transparent_ground_are_repainted(run, colour):
    stroke = Image.new("RGBA", (8, 6))
    for mode in ("RGBA", "LA", "P"):
        assert "--mask: expected" in call(run, "--edit", "photo.png", "--mask", saved(stroke, mode))
    stroke.paste(Image.new("RGBA", (3, 6), colour), (2, 0))
    for mode in ("RGBA", "LA", "P"):
        _, mask = sample.read_photo_and_mask("photo.png", saved(stroke, mode), 0, (8, 6))
        assert mask[..., 2:5].all() and mask.sum() == 18
    opaque = Image.open("mask.png").convert("RGBA")  # nothing is transparent: white counts
    _, mask = sample.read_photo_and_mask("photo.png", saved(opaque, "RGBA"), 0, (8, 6))
    assert torch.equal(mask, HALF[:1])


def saved(image, mode):
    path = f"{mode}.png"
    image.convert(mode).save(path)
    return path


def test_tiff_photos_are_read(run):
    Image.open("photo.png").save("photo.tiff")
    pixels = [np.asarray(sample.read_image(f"photo.{suffix}")) for suffix in ("png", "tiff")]
    assert np.array_equal(*pixels)


def test_a_run_before_its_masked_stage_can_be_sampled():
    save_model("run", transformer=PLAIN)
    model = MODEL | dict(transformer=PLAIN)
    assert_sampled(archived("run", "--count", 1), [0, 1, 2], model)


def test_names_go_before_numbers():
    save_model("run", classes=["1", "2", "0"])
    assert_sampled(archived("run", "--labels", "1", "--count", 1), [0])
    assert len(archived("run", "--count", 1)) == 3


def test_flags_reach_the_sampler(run):
    flags = "--labels ring --count 2 --guidance 2.5 --mask-guidance 0.5 --top-k 3"
    flags += " --top-p 0.7 --temperature 0.7 --rise 0.5 --cooling 0.01 --seed 9 --mask-steps 2"
    options = dict(guidance=2.5, mask_guidance=0.5, top_k=3, top_p=0.7, temperature=0.7)
    pixels = archived(run, *flags.split())
    schedule = sample.masked_schedule(SCALES, 2)
    assert_sampled(pixels, [1, 1], **options, rise=0.5, cooling=0.01, seed=9, schedule=schedule)

    save_model("var", transformer=VAR)
    model = MODEL | dict(transformer=VAR)
    assert_sampled(archived("var", "--count", 1), [0, 1, 2], model)


def test_the_command_samples_published_weights():
    golden = torch.load(GOLDEN)["state"]
    for name in golden:
        torch.save(golden[name], name)
    model = sample.load_model("hmar", "vqvae", ((1, 1), (2, 2), (3, 3), (4, 4)))
    flags = ("--tokenizer", "vqvae", "--scales", 1, 2, 3, "4x4", "--labels", 2, "--count", 2)
    assert_sampled(archived("hmar", *flags), [2, 2], model)


BAD_INPUT = """
run --labels 3  labels: got '3', expected 0 to 2 or a name such as disc, ring, star
run --count 0  --count, --particles, --seed, --pad: expected
run --particles 0  --count, --particles, --seed, --pad: expected
run --seed -1  --count, --particles, --seed, --pad: expected
run --cooling -1  cooling: got -1.0
run --top-p 95  top_p: got 95
run --top-k -1  top_k: got -1
run --mask-steps -1  masked_passes: got -1
var --mask-steps 2  schedule: masked passes need a masked branch (VAR has none)
vectors  vectors: labels are vectors
run --out photo.png --edit photo.png --pad 0.2  --out: got photo.png, which would be overwritten
run --out ./a/../photo.png --edit photo.png --pad 0.2  which would be overwritten
run --out sheet.xyz  --out: got sheet.xyz, expected .png
run --out sheet.psd  --out: got sheet.psd, expected .png
none  none: expected published weights, or a run of train.py
half  half: has no transformer; training has not finished; the same train.py command goes on
half/checkpoint.pt  half/checkpoint.pt: expected published weights, or a run of train.py
codec.pt  codec.pt: has no transformer
bare.pt  bare.pt: has no tokenizer; name its file with --tokenizer
bare.pt --tokenizer bare.pt  bare.pt: has no tokenizer; name its file with --tokenizer
bare.pt --tokenizer none  none: expected published weights, or a run of train.py
run --tokenizer var  --scales, --tokenizer: for published weights; run has its own
run --scales 1 2  --scales, --tokenizer: for published weights; run has its own
run --pad 0.2  --edit: expected together with either --mask or --pad
run --mask photo.png  --edit: expected together with either --mask or --pad
run --edit photo.png  --edit: expected together with either --mask or --pad
run --edit photo.png --pad 0.2 --mask black.png  --edit: expected together with either
run --edit photo.png --pad 0.7  --count, --particles, --seed, --pad: expected
run --edit photo.png --mask black.png  --mask: expected some white
run --edit photo.png --mask wide.png  --mask: got (300, 40) pixels for a photo of (8, 6)
run --edit none.png --pad 0.2  No such file or directory: 'none.png'
run --edit text.png --pad 0.2  cannot identify image file 'text.png'
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line(run, line):
    Image.new("L", (8, 6)).save("black.png")
    Image.new("L", (300, 40)).save("wide.png")
    Path("text.png").write_text("text")
    save_model("var", transformer=VAR)
    save_model("vectors", classes=[])
    Path("half").mkdir()
    torch.save(dict(tokenizer=CODEC, classes=NAMES, sampling=SAMPLING), "half/model.pt")
    torch.save(dict(stage="tokenizer", state={}), "half/checkpoint.pt")
    torch.save(dict(transformer=PARAMS, classes=NAMES, sampling=SAMPLING), "bare.pt")
    torch.save(dict(tokenizer=CODEC), "codec.pt")
    before = contents(".")
    flags, message = line.split("  ")
    said = call("--out", "new", *flags.split())
    assert said.startswith("sample.py: ") and message in said and "\n" not in said
    assert contents(".") == before


def test_names_of_any_characters_are_sampled():
    save_model("run", classes=["\u00e9\u4e2d", "a" * 300, "../b"])
    flags = ("run", "--labels", "\u00e9\u4e2d", 1, 2, "--count", 1, "--out")
    assert call(*flags, "\u00e9.png") is None
    assert Image.open("\u00e9.png").height == 3 * 50
    assert call(*flags, "folder") is None
    names = ["000000-\u00e9\u4e2d.png", f"000001-{'a' * 40}.png", "000002-.._b.png"]
    assert sorted(contents("folder")) == names
