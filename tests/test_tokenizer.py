"""The tokenizer against slow, plain re-derivations (loops, one image at a time), its properties, published weights, bad input."""
import copy
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    close, double, leaves_equal, normal, pyramids, quantiser, random_tokens, scrambled, slow_bicubic)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import tokenizer

quick = settings(max_examples=25, deadline=None)
SCALES = ((1, 1), (2, 2), (3, 4))
TICKS = np.linspace(1 / 12, 11 / 12, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # two on a busy machine wait for each other more than they work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(seed=0, **options):
    return tokenizer.init(**(dict(codes=16, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1, seed=seed) | options))


def slow_area(grid, size):
    """grid (h, w) -> size: the mean of the cells that an output cell covers, wholly or in part."""
    def covered(i, inputs, outputs):
        return range(i * inputs // outputs, -(-(i + 1) * inputs // outputs))
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            values = [grid[a, b] for a in covered(y, grid.shape[0], size[0]) for b in covered(x, grid.shape[1], size[1])]
            out[y, x] = sum(values) / len(values)
    return out


def slow_convolution(maps, weight, bias, stride=1, padding=None):
    """maps (C, h, w), weight (O, C, s, s): at every place the sum over taps and channels; padding (before, after)."""
    before, after = padding or (weight.shape[-1] // 2,) * 2
    padded = np.pad(maps, ((0, 0), (before, after), (before, after)))
    taps, out = range(weight.shape[-1]), []
    for y in range(0, padded.shape[1] - len(taps) + 1, stride):
        for x in range(0, padded.shape[2] - len(taps) + 1, stride):
            out.append(bias + sum(weight[:, :, a, b] @ padded[:, y + a, x + b] for a in taps for b in taps))
    return np.stack(out, 1).reshape(len(bias), -1, (padded.shape[2] - len(taps)) // stride + 1)


def slow_contribution(params, tokens, k, scales, hidden=None):
    """What scale k's tokens (n_k) add to the map, (C, h, w); hidden tokens add what a code of zeros would."""
    (h, w), codebook = scales[k], params["codebook"].numpy()
    codes = np.zeros((codebook.shape[1], h, w))
    for place, token in enumerate(tokens):
        if hidden is None or not hidden[place]:
            codes[:, place // w, place % w] = codebook[token]
    if k < len(scales) - 1:
        codes = np.stack([slow_bicubic(grid, scales[-1]) for grid in codes])
    distance = [abs(tick - k / max(1, len(scales) - 1)) for tick in TICKS]
    phi = params["phi"][distance.index(min(distance)) if len(params["phi"]) == 4 else 0]
    return 0.5 * codes + 0.5 * slow_convolution(codes, phi["weight"].numpy(), phi["bias"].numpy())


def slow_quantise(params, feature, scales):
    """For each scale (residual (C, h_k, w_k), tokens, f_hat (C, h, w)) of one image's feature (C, h, w)."""
    f_hat = np.zeros(feature.shape)
    for k, size in enumerate(scales):
        residual = np.stack([slow_area(grid, size) for grid in feature - f_hat])
        distances = [[sum((residual[c, y, x] - code[c]) ** 2 for c in range(len(code))) for code in params["codebook"].numpy()]
                     for y in range(size[0]) for x in range(size[1])]
        tokens = [row.index(min(row)) for row in distances]
        f_hat = f_hat + slow_contribution(params, tokens, k, scales)
        yield residual, tokens, f_hat


def rows(maps):
    """(C, h, w) -> (h w, C), a row of features."""
    return torch.from_numpy(maps.reshape(len(maps), -1).T.copy())


@quick
@given(pyramids(), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4]), st.integers(1, 2), st.integers(0, 999))
def test_the_residual_pyramid_is_that_of_plain_loops(scales, codes, code_dim, phis, batch, seed):
    params, feature = quantiser(codes, code_dim, phis, seed), normal(batch, code_dim, *scales[-1], seed=seed + 50)
    ours = list(tokenizer.quantise(params["codebook"], params["phi"], feature, scales))
    for i in range(batch):
        for (residual, tokens, f_hat), (slow_residual, slow_tokens, slow_f_hat) in zip(
                ours, slow_quantise(params, feature[i].numpy(), scales), strict=True):
            close(residual[i], rows(slow_residual))
            assert tokens[i].tolist() == slow_tokens
            close(f_hat[i], slow_f_hat)


@quick
@given(pyramids(), st.integers(1, 2), st.integers(0, 999))
def test_inputs_of_the_transformer_are_those_of_plain_loops(scales, batch, seed):
    params, tokens = quantiser(7, 2, seed=seed), random_tokens(batch, scales, 7, seed)
    first, split = scales[0][0] * scales[0][1], [h * w for h, w in scales]
    mask = torch.rand(batch, tokens.shape[1] - first, generator=torch.Generator().manual_seed(seed)) < 0.5
    ours = [function(params, tokens, scales, *more) for function, more in (
        (tokenizer.next_scale_inputs, ()), (tokenizer.masked_inputs, ()), (tokenizer.masked_inputs, (mask,)))]
    assert all(x.shape == (batch, tokens.shape[1] - first, 2) for x in ours)
    for i in range(batch):
        own, hidden = tokens[i].split(split), mask[i].split(split[1:])
        f_hat, expected = slow_contribution(params, own[0].tolist(), 0, scales), ([], [], [])
        for k, size in list(enumerate(scales))[1:]:
            plain, zeroed = (slow_contribution(params, own[k].tolist(), k, scales, hide) for hide in (None, hidden[k - 1].tolist()))
            for row, maps in zip(expected, (f_hat, plain, zeroed)):
                row.append(rows(np.stack([slow_area(grid, size) for grid in maps])))
            f_hat = f_hat + plain
        close(tokenizer.accumulate(params, tokens, scales)[i], f_hat)
        for x, row in zip(ours, expected):
            close(x[i], torch.cat(row or [torch.zeros(0, 2, dtype=torch.float64)]))


def test_phi_map_of_the_published_scales():
    assert [tokenizer.phi_index(k, 4) for k in range(4)] == [0, 1, 2, 3]
    assert [tokenizer.phi_index(k, 10) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [tokenizer.phi_index(k, 14) for k in range(14)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert tokenizer.phi_index(0, 1) == 0


def slow_norm(maps, weight, bias):
    """32 groups, one after the other."""
    out = np.empty_like(maps)
    for group in np.split(np.arange(len(maps)), 32):
        deviation = maps[group] - maps[group].mean()
        out[group] = deviation / math.sqrt((deviation ** 2).mean() + 1e-6)
    return out * weight[:, None, None] + bias[:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


def slow_residual(maps, block):
    inner = slow_convolution(silu(slow_norm(maps, **block["norm1"])), **block["conv1"])
    inner = slow_convolution(silu(slow_norm(inner, **block["norm2"])), **block["conv2"])
    return inner + (slow_convolution(maps, **block["shortcut"]) if "shortcut" in block else maps)


def slow_attention(maps, attention):
    """Every place looks at every place."""
    qkv = slow_convolution(slow_norm(maps, **attention["norm"]), **attention["qkv"]).reshape(3, len(maps), -1)
    out = np.zeros((len(maps), qkv.shape[2]))
    for i in range(qkv.shape[2]):
        weights = [math.exp(qkv[0, :, i] @ qkv[1, :, j] * len(maps) ** -0.5) for j in range(qkv.shape[2])]
        out[:, i] = sum(weight * qkv[2, :, j] for j, weight in enumerate(weights)) / sum(weights)
    return maps + slow_convolution(out.reshape(maps.shape), **attention["project"])


def slow_convnet(maps, net, decoding):
    def middle(maps):
        blocks, attentions = net["middle"]["blocks"], net["middle"]["attentions"]
        maps = slow_residual(maps, blocks[0])
        return slow_residual(slow_attention(maps, attentions[0]) if attentions else maps, blocks[1])
    maps = slow_convolution(maps, **net["conv_in"])
    maps = middle(maps) if decoding else maps
    for level in net["up" if decoding else "down"]:
        for i, block in enumerate(level["blocks"]):
            maps = slow_residual(maps, block)
            maps = slow_attention(maps, level["attentions"][i]) if level["attentions"] else maps
        if "downsample" in level:
            maps = slow_convolution(maps, **level["downsample"], stride=2, padding=(0, 1))
        if "upsample" in level:
            maps = slow_convolution(maps.repeat(2, 1).repeat(2, 2), **level["upsample"])
    maps = maps if decoding else middle(maps)
    return slow_convolution(silu(slow_norm(maps, **net["norm_out"])), **net["conv_out"])


@pytest.mark.parametrize("attention", [True, False])
def test_the_convnets_are_those_of_plain_loops(attention):
    params = scrambled(small(multipliers=(1, 2), code_dim=4, attention=attention), scale=0.1)
    arrays, image = pytree.tree_map(torch.Tensor.numpy, params), normal(1, 3, 4, 6, scale=0.5)
    feature = slow_convolution(slow_convnet(image[0].numpy(), arrays["encoder"], False), **arrays["quant_conv"])
    close(tokenizer.features(params, image)[0], feature)
    f_hat = normal(4, 2, 3, scale=3)
    truth = slow_convnet(slow_convolution(f_hat.numpy(), **arrays["post_quant_conv"]), arrays["decoder"], True)
    truth, params["decoder"]["conv_out"] = truth * 9, pytree.tree_map(lambda tensor: tensor * 9, params["decoder"]["conv_out"])
    assert np.abs(truth).max() > 1, "nothing to clamp"
    close(tokenizer.decode_features(params, f_hat[None])[0], truth.clip(-1, 1))


@quick
@given(pyramids(3, 3).filter(lambda scales: scales[-1] != (1, 1)), st.integers(1, 3), st.integers(0, 99))
def test_shapes_and_ranges(scales, batch, seed):  # a group of one channel at one place has no variance to norm by
    params, (h, w) = small(), scales[-1]
    images = torch.rand(batch, 3, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tokens = tokenizer.encode(params, images, scales)
    total = sum(h * w for h, w in scales)
    assert tokens.shape == (batch, total) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < 16
    decoded = tokenizer.decode(params, tokens, scales)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1
    assert tokenizer.accumulate(params, tokens, scales).shape == (batch, 8, h, w)
    assert torch.equal(tokenizer.encode(params, images, scales), tokens)
    assert torch.equal(tokenizer.encode(params, images, [list(size) for size in scales]), tokens)


@quick
@given(pyramids(), st.integers(1, 3), st.integers(0, 999))
def test_map_and_residual_make_the_feature_again(scales, batch, seed):
    params, feature = quantiser(9, 3, seed=seed), normal(batch, 3, *scales[-1], seed=seed)
    *before, (residual, _, f_hat) = [(torch.zeros(()), None, torch.zeros(()))] + list(
        tokenizer.quantise(params["codebook"], params["phi"], feature, scales))
    close(before[-1][2] + residual.transpose(1, 2).unflatten(2, scales[-1]), feature, 1e-12)
    tokens = torch.cat([tokens for _, tokens, _ in tokenizer.quantise(params["codebook"], params["phi"], feature, scales)], 1)
    close(tokenizer.accumulate(params, tokens, scales), f_hat, 1e-12)


@quick
@given(pyramids(), st.integers(0, 3), st.integers(0, 999))
def test_next_scale_inputs_know_only_coarser_scales(scales, changed, seed):
    changed %= len(scales)
    params, tokens = quantiser(9, 3, seed=seed), random_tokens(2, scales, 9, seed)
    counts = [h * w for h, w in scales]
    start = sum(counts[:changed])
    other = torch.cat([tokens[:, :start], (tokens[:, start:] + 1) % 9], 1)  # the scale and all finer ones
    before, after = (tokenizer.next_scale_inputs(params, t, scales).split(counts[1:], 1) for t in (tokens, other))
    for k, (a, b) in enumerate(zip(before, after), 1):
        assert torch.equal(a, b) == (k <= changed)


@quick
@given(pyramids(), st.integers(0, 999))
def test_masked_inputs_do_not_know_what_is_hidden(scales, seed):
    params, tokens = quantiser(9, 3, seed=seed), random_tokens(2, scales, 9, seed)
    first = scales[0][0] * scales[0][1]
    mask = torch.rand(2, tokens.shape[1] - first, generator=torch.Generator().manual_seed(seed)) < 0.5
    other = tokens.clone()
    other[:, first:][mask] = (other[:, first:][mask] + 1) % 9
    other[:, :first] = (other[:, :first] + 1) % 9  # nor of scale 0
    assert torch.equal(tokenizer.masked_inputs(params, tokens, scales, mask), tokenizer.masked_inputs(params, other, scales, mask))
    leaks = not torch.equal(tokenizer.masked_inputs(params, tokens, scales), tokenizer.masked_inputs(params, other, scales))
    assert leaks == bool(mask.any())
    pieces = [tokenizer.masked_scale_input(params, own, k, scales, hide) for k, (own, hide) in enumerate(zip(
        tokens[:, first:].split([h * w for h, w in scales[1:]], 1), mask.split([h * w for h, w in scales[1:]], 1)), 1)]
    assert torch.equal(torch.cat([mask.new_zeros(2, 0, 3).double(), *pieces], 1), tokenizer.masked_inputs(params, tokens, scales, mask))


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_training_pass(beta):
    params, images = double(small()), normal(2, 3, 6, 8).tanh()
    pytree.tree_map(lambda tensor: tensor.requires_grad_(), params)
    reconstruction, loss, residuals, tokens = tokenizer.training_pass(params, images, SCALES, beta)
    feature, pyramid = tokenizer.features(params, images).detach(), []
    for i in range(2):
        frozen = pytree.tree_map(torch.Tensor.detach, params)
        pyramid.append([f_hat for _, _, f_hat in slow_quantise(frozen, feature[i].numpy(), SCALES)])
    terms = [(1 + beta) * np.mean([(pyramid[i][k] - feature[i].numpy()) ** 2 for i in range(2)]) for k in range(len(SCALES))]
    close(loss, torch.tensor(sum(terms) / len(SCALES)))
    assert torch.equal(torch.cat(tokens, 1), tokenizer.encode(params, images, SCALES)) and [len(r[0]) for r in residuals] == [1, 4, 12]
    assert not any(residual.requires_grad for residual in residuals)
    close(reconstruction.clamp(-1, 1), tokenizer.decode(params, torch.cat(tokens, 1), SCALES).detach())

    commitment = sum(2 * beta * (feature - torch.from_numpy(np.stack([p[k] for p in pyramid]))) for k in range(len(SCALES)))
    bias, codebook = params["quant_conv"]["bias"], params["codebook"]
    close(torch.autograd.grad(loss, bias, retain_graph=True)[0], commitment.sum((0, 2, 3)) / feature.numel() / len(SCALES))
    f_hat = tokenizer.accumulate(params, torch.cat(tokens, 1), SCALES).detach().requires_grad_()
    decoded = tokenizer.decoder(tokenizer.convolution(f_hat, **params["post_quant_conv"]), **params["decoder"])
    straight = torch.autograd.grad(decoded.square().sum(), f_hat)[0].sum((0, 2, 3))
    through = torch.autograd.grad(reconstruction.square().sum(), [bias, codebook], allow_unused=True, retain_graph=True)
    close(through[0], straight)
    assert through[1] is None, "the reconstruction moves codes only through the quantisation loss"
    close(torch.autograd.grad(loss, codebook)[0], torch.autograd.grad(
        tokenizer.training_pass(params, images, SCALES, 1.0)[1], codebook)[0])  # beta weighs the commitment alone


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_training_pass_stops_at_a_scale(stop):
    params, images = double(small()), normal(2, 3, 6, 8).tanh()
    feature = tokenizer.features(params, images)
    f_hats = [f_hat for _, _, f_hat in tokenizer.quantise(params["codebook"], params["phi"], feature, SCALES)][:stop]
    reconstruction, loss, residuals, tokens = tokenizer.training_pass(params, images, SCALES, 0.5, stop=stop)
    assert len(residuals) == len(tokens) == stop
    close(loss, 1.5 * sum((f_hat - feature).square().mean() for f_hat in f_hats) / stop)
    close(reconstruction.clamp(-1, 1), tokenizer.decode_features(params, f_hats[-1]))


def test_training_pass_without_quantisation():
    params, images = small(), torch.zeros(2, 3, 6, 8)
    reconstruction, loss, residuals, tokens = tokenizer.training_pass(params, images, SCALES, quantised=False)
    assert loss == 0 and residuals == tokens == []
    assert torch.equal(reconstruction.clamp(-1, 1), tokenizer.decode_features(params, tokenizer.features(params, images)))


@quick
@given(pyramids(), st.integers(4, 20), st.integers(1, 6), st.integers(0, 99))
def test_a_codebook_made_of_data_fits_it(scales, codes, batch, seed):
    params = quantiser(codes, 3, seed=seed) | dict(phi=[dict(weight=torch.zeros(3, 3, 3, 3), bias=torch.zeros(3))] * 4)
    feature = normal(batch, 3, *scales[-1], seed=seed).float() + 5
    made, again = (tokenizer.data_codebook(params, feature, scales, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(made, again) and made.shape == (codes, 3) and made.dtype == torch.float32

    def error(codebook):
        *_, (_, _, f_hat) = tokenizer.quantise(codebook, params["phi"], feature, scales)
        return (f_hat - feature).square().mean()
    assert error(made) < error(params["codebook"])


def test_the_discriminator_is_spectrally_normalised():
    weight = normal(6, 2, 4, 4) + 9 * normal(6, 1, 1, 1, seed=1) * normal(1, 2, 4, 4, seed=2)  # one singular value stands out
    assert abs(torch.linalg.matrix_norm(tokenizer.spectrally_normalised(weight).flatten(1), 2) - 1) < 1e-9
    layers = tokenizer.init_discriminator(8)
    assert tokenizer.discriminator(torch.zeros(2, 3, 32, 48), layers).shape == (2, 3, 5)
    louder = pytree.tree_map(lambda tensor: tensor * 7, layers)
    images = normal(2, 3, 32, 32).float()
    torch.testing.assert_close(tokenizer.discriminator(images, louder), tokenizer.discriminator(images, layers))


def test_augmentation():
    images = normal(3, 3, 8, 8)
    uniform = torch.tensor([[0.9, 0.5, 0.5, 0.5], [0.1, 0.5, 0.5, 0.75], [0.9, 0.75, 0.5, 0.5]])
    same, mirrored, moved = tokenizer.augmented(images, uniform)
    close(same, images[0])
    close(mirrored, images[1].flip(-1) + 0.125)
    close(moved[:, :, :7], (images[2, :, :, :7] + images[2, :, :, 1:]) / 2)  # a sixteenth of the width: half a pixel


def test_dead_codes_are_replaced_by_residuals():
    codebook, residuals = normal(6, 3).float(), [normal(2, n, 3, seed=n).float() for n in (1, 4)]
    kept = codebook.clone()
    revived, dead = tokenizer.revive_codes(codebook, torch.tensor([0, 3, 0, 1, 9, 0]), residuals, torch.Generator().manual_seed(0))
    assert dead.tolist() == [True, False, True, False, False, True] and torch.equal(codebook, kept)
    assert torch.equal(revived[~dead], codebook[~dead])
    vectors = {tuple(vector) for residual in residuals for vector in residual.flatten(0, 1).tolist()}
    assert {tuple(code) for code in revived[dead].tolist()} <= vectors


def test_cast_moves_the_convolutions_alone():
    params = small()
    half = tokenizer.cast(params, torch.bfloat16)
    for (path, ours), (_, original) in zip(pytree.tree_flatten_with_path(half)[0], pytree.tree_flatten_with_path(params)[0], strict=True):
        convolution = path[0].key in ("encoder", "decoder") and original.ndim == 4
        assert ours.dtype == (torch.bfloat16 if convolution else torch.float32) and torch.equal(ours, original.to(ours.dtype))
    images = torch.rand(2, 3, 6, 8) * 2 - 1
    tokens = tokenizer.encode(half, images, SCALES)
    assert tokens.dtype == torch.int64
    decoded = tokenizer.decode(half, tokens, SCALES)
    truth = tokenizer.decode(double(params), tokens, SCALES)
    same = tokenizer.decode(pytree.tree_map(lambda tensor: tensor.to(torch.bfloat16).double(), params), tokens, SCALES)
    assert decoded.dtype == torch.float32  # rounding inside costs no more than some times what rounding the weights alone does
    assert (decoded - truth).square().mean().sqrt() < 5 * (same - truth).square().mean().sqrt()


def test_published_size():
    with torch.device("meta"):
        params = tokenizer.init()
    assert sum(leaf.numel() for leaf in pytree.tree_leaves(params)) == 108_948_355
    assert all(leaf.is_meta for leaf in pytree.tree_leaves(params)) and tokenizer.downsampling(params) == 16


@quick
@given(st.lists(st.integers(1, 2), min_size=1, max_size=3), st.integers(1, 2), st.booleans(), st.integers(1, 5), st.integers(0, 9))
def test_init_is_a_pure_function_of_its_arguments(multipliers, blocks, attention, phis, seed):
    options = dict(codes=5, code_dim=3, channels=32, multipliers=multipliers, residual_blocks=blocks, attention=attention, phis=phis)
    state = torch.get_rng_state()
    params = tokenizer.init(**options, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert leaves_equal(params, tokenizer.init(**options, seed=seed)) and not leaves_equal(params, tokenizer.init(**options, seed=seed + 1))
    side = 2 ** (len(multipliers) - 1)
    assert tokenizer.downsampling(params) == side and all(leaf.dtype == torch.float32 for leaf in pytree.tree_leaves(params))
    images = torch.zeros(1, 3, 2 * side, side)
    assert tokenizer.decode(params, tokenizer.encode(params, images, ((1, 1), (2, 1))), ((1, 1), (2, 1))).shape == images.shape
    if multipliers == [1, 2]:
        assert leaves_equal(params, tokenizer.from_published(published(params)))


def published(params):
    """Our tree under the published names, written out by hand."""
    state = {"quantize.embedding.weight": params["codebook"], "quantize.ema_vocab_hit_SV": torch.rand(3, len(params["codebook"]))}

    def put(name, layer):
        state[f"{name}.weight"], state[f"{name}.bias"] = layer["weight"], layer["bias"]

    def put_all(name, layers, renamed):
        for part, layer in layers.items():
            put(f"{name}.{renamed.get(part, part)}", layer)
    for side, stack in (("encoder", "down"), ("decoder", "up")):
        net = params[side]
        for name in ("conv_in", "norm_out", "conv_out"):
            put(f"{side}.{name}", net[name])
        levels = list(enumerate(net[stack] if side == "encoder" else reversed(net[stack])))
        for i, block in enumerate(net["middle"]["blocks"]):
            put_all(f"{side}.mid.block_{i + 1}", block, {})
        for attention in net["middle"]["attentions"]:
            put_all(f"{side}.mid.attn_1", attention, {"project": "proj_out"})
        for number, level in levels:
            for i, block in enumerate(level["blocks"]):
                put_all(f"{side}.{stack}.{number}.block.{i}", block, {"shortcut": "nin_shortcut"})
            for i, attention in enumerate(level["attentions"]):
                put_all(f"{side}.{stack}.{number}.attn.{i}", attention, {"project": "proj_out"})
            if f"{stack}sample" in level:
                put(f"{side}.{stack}.{number}.{stack}sample.conv", level[f"{stack}sample"])
    for i, phi in enumerate(params["phi"]):
        put(f"quantize.quant_resi.qresi_ls.{i}", phi)
    put("quant_conv", params["quant_conv"])
    put("post_quant_conv", params["post_quant_conv"])
    return state


WEIGHTS = published(small(multipliers=(1, 2), residual_blocks=2))


@pytest.mark.parametrize("nest", [lambda state: state, lambda state: {"trainer": {"vae_local": state, "var_wo_ddp": {}}, "epoch": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_published_weights_of_any_dtype_load(nest, dtype):
    params = small(multipliers=(1, 2), residual_blocks=2)
    state = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    assert leaves_equal(tokenizer.from_published(nest(state)), pytree.tree_map(lambda tensor: tensor.to(dtype).float(), params))
    assert leaves_equal(tokenizer.from_published(nest(state), dtype=dtype), pytree.tree_map(lambda tensor: tensor.to(dtype), params))


def test_a_missing_tensor_is_named():
    """Whichever it is, also one of those that the sizes are read from."""
    silent = []
    for name in WEIGHTS.keys() - {"quantize.ema_vocab_hit_SV"}:
        with pytest.raises(ValueError) as error:
            tokenizer.from_published({key: tensor for key, tensor in WEIGHTS.items() if key != name})
        found = f"{name} is missing" in str(error.value)
        silent += [] if found or str(error.value).startswith("state_dict: expected a published tokenizer") else [name]
    assert silent == []


def test_a_tensor_of_another_shape_is_told():
    """Where it decides a size itself, those that disagree with it are; only the number of codes stands in one tensor alone."""
    silent = []
    for name in WEIGHTS.keys() - {"quantize.ema_vocab_hit_SV", "quantize.embedding.weight"}:
        with pytest.raises(ValueError) as error:
            tokenizer.from_published(WEIGHTS | {name: WEIGHTS[name][:-1]})
        silent += [] if re.search(r"^state_dict: does not fit.* is \(.*\), expected \(", str(error.value)) else [name]
    assert silent == []


def test_what_does_not_fit_is_listed_ten_at_a_time():
    names = [name for name in WEIGHTS if name.startswith("decoder.mid")]
    with pytest.raises(ValueError) as error:
        tokenizer.from_published({key: tensor for key, tensor in WEIGHTS.items() if key not in names} | {"extra": torch.zeros(3)})
    assert str(error.value).count(" is missing") == 10 and str(error.value).endswith(f" and {len(names) - 9} more")
    with pytest.raises(ValueError, match="extra is unexpected$"):
        tokenizer.from_published(WEIGHTS | {"extra": torch.zeros(3)})


@pytest.mark.parametrize("other", [
    {}, {"state": {0: torch.zeros(3)}, "param_groups": [{}]}, {1: 2}, None, 5, [1], "weights", torch.zeros(3), {"trainer": 3},
    {"class_emb.weight": torch.zeros(2, 2), "pos_start": torch.zeros(1, 1, 2)}])
def test_something_else_than_a_tokenizer(other):
    with pytest.raises(ValueError, match="^state_dict: expected a published tokenizer"):
        tokenizer.from_published(other)


@pytest.mark.parametrize("name", ["tokens", "images", "params"])
def test_arguments_are_not_changed(name):
    arguments = dict(params=small(), images=torch.rand(2, 3, 6, 8) * 2 - 1, tokens=random_tokens(2, SCALES, 16))
    before = copy.deepcopy(arguments[name])
    tokenizer.encode(arguments["params"], arguments["images"], SCALES)
    tokenizer.decode(arguments["params"], arguments["tokens"], SCALES)
    tokenizer.training_pass(arguments["params"], arguments["images"], SCALES)
    for function in (tokenizer.next_scale_inputs, tokenizer.masked_inputs):
        function(arguments["params"], arguments["tokens"], SCALES)
    tokenizer.masked_inputs(arguments["params"], arguments["tokens"], SCALES, torch.ones(2, 16, dtype=torch.bool))
    assert leaves_equal(before, arguments[name])


IMAGES = torch.zeros(2, 3, 6, 8)


@pytest.mark.parametrize("images, scales, message", [
    (IMAGES[0], SCALES, r"images: got torch.float32 \(3, 6, 8\), expected a float tensor \(B, 3, H, W\)"),
    (IMAGES[:, :1], SCALES, r"images: got torch.float32 \(2, 1, 6, 8\)"),
    (IMAGES.byte(), SCALES, r"images: got torch.uint8"),
    (IMAGES[:, :, :5], SCALES, "images: got 5x8 pixels, expected sides that divide by the downsampling, 2"),
    (IMAGES[:0], SCALES, "images: got "),
    (IMAGES + 1.5, SCALES, r"images: got values from 1.5 to 1.5, expected \[-1, 1\]"),
    (IMAGES * 255 + 127, SCALES, "images: got values from 127 to 127"),
    (IMAGES * math.nan, SCALES, "images: got values from nan"),
    (IMAGES, SCALES[:2], r"scales: the last is \(2, 2\), expected the latent's size \(3, 4\)"),
    (IMAGES, (), r"scales: got \(\), expected \(height, width\) pairs"),
    (IMAGES, (1, 2, 3), r"scales: got \(1, 2, 3\), expected"),
    (IMAGES, ((2, 2), (1, 1), (3, 4)), "scales: got .* coarse to fine"),
    (IMAGES, ((0, 1), (3, 4)), "scales: got .* positive integers"),
    (IMAGES, ((1.5, 2), (3, 4)), "scales: got .* positive integers"),
    (IMAGES, None, "scales: got None")])
def test_bad_images_and_scales(images, scales, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenizer.encode(small(), images, scales)


TOKENS = torch.zeros(2, 17, dtype=torch.int64)


@pytest.mark.parametrize("function", [tokenizer.decode, tokenizer.accumulate, tokenizer.next_scale_inputs, tokenizer.masked_inputs])
@pytest.mark.parametrize("tokens, scales, message", [
    (TOKENS[0], SCALES, r"tokens: got torch.int64 \(17,\), expected int64 \(B, 17\)"),
    (TOKENS[:, 1:], SCALES, r"tokens: got torch.int64 \(2, 16\), expected int64 \(B, 17\) for scales"),
    (TOKENS.int(), SCALES, r"tokens: got torch.int32"),
    (TOKENS + 16, SCALES, "tokens: got values from 16 to 16, expected 0 to 15"),
    (TOKENS - 1, SCALES, "tokens: got values from -1 to -1, expected 0 to 15"),
    (TOKENS, (3, 4), r"scales: got \(3, 4\)")])
def test_bad_tokens(function, tokens, scales, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(small(), tokens, scales)


@pytest.mark.parametrize("mask", [torch.ones(2, 17, dtype=torch.bool), torch.ones(2, 16), torch.ones(16, dtype=torch.bool)])
def test_bad_masks(mask):
    with pytest.raises(ValueError, match=r"^mask: got .* expected bool \(2, 16\)"):
        tokenizer.masked_inputs(small(), TOKENS, SCALES, mask)


@pytest.mark.parametrize("options, message", [
    (dict(channels=33), r"channels, multipliers: got 33, \(1, 1\), expected products that are positive multiples of 32"),
    (dict(multipliers=()), r"channels, multipliers: got 32, \(\)"), (dict(multipliers=(1, 0)), "channels, multipliers"),
    (dict(codes=0), r"codes, code_dim, residual_blocks, phis: got \(0, 8, 1, 4\), expected 1 or more"),
    (dict(residual_blocks=0), "codes, code_dim"), (dict(phis=0), "codes, code_dim")])
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        small(**options)
