"""Agreement with the published systems, by golden.pt.

It holds tiny random models of every kind, what the published code (VAR 78b9539, HMAR 595a9df)
computed with them, and the names and shapes of published checkpoints.
"""

import benchmark
import pytest
import torch
from helpers import GOLDEN, leaves_equal, refused
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

SCALES = ((1, 1), (2, 2), (3, 3), (4, 4))


@pytest.fixture(scope="module")
def golden():
    """What the published code computed, and its weights as trees of ours."""
    theirs = torch.load(GOLDEN)
    states = theirs["state"]
    trees = {kind: hmar.from_published(states[kind], SCALES) for kind in ("var", "nsp", "hmar")}
    return theirs | trees | dict(codec=tokenizer.from_published(states["vqvae"]))


def near(ours, theirs, tolerance=1e-4):
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_tokenizer(golden):
    theirs, codec = golden["vq"], golden["codec"]
    tokens = tokenizer.encode(codec, golden["images"], SCALES)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    features = tokenizer.encode_features(codec, golden["images"])
    near(features, theirs["f"])
    ours = tokenizer.quantise(codec, features, SCALES)
    for (_, own, f_hat), index, expected in zip(ours, theirs["idx"], theirs["f_hat"], strict=True):
        assert torch.equal(own, index)
        near(f_hat, expected)
    near(tokenizer.accumulate(codec, tokens, SCALES), theirs["f_hat"][-1])
    near(tokenizer.decode(codec, tokens, SCALES), theirs["rec"])
    for name in ("var_input", "ns_input"):
        near(tokenizer.next_scale_inputs(codec, tokens, SCALES), theirs[name])
    near(tokenizer.masked_inputs(codec, tokens, SCALES), theirs["mask_input"])


def test_logits_and_losses(golden):
    vq, train, labels = golden["vq"], golden["train"], golden["labels"]
    tokens = torch.cat(vq["idx"], 1)
    mask = torch.zeros(2, 29, dtype=torch.bool)
    mask[:, train["mp_idx_to_mask"]] = True  # published training shares a mask over the batch

    def losses(kind, *inputs):
        tree, is_masked = golden[kind], len(inputs) > 1
        branch = tree["masked" if is_masked else "next_scale"]
        logits = hmar.logits(branch, hmar.features(tree, labels, *inputs))
        near(logits, train[f"{'mp' if is_masked else kind}_logits"])
        return hmar.losses(tree, labels, tokens, *inputs)

    near(losses("var", vq["var_input"]).mean(), train["var_loss"])
    ours = losses("hmar", vq["ns_input"], vq["mask_input"], mask)
    near(ours.mean(), train["mp_loss"])

    ours = losses("nsp", vq["ns_input"])
    near(ours.mean(), train["nsp_loss_uniform"])
    weights = hmar.scale_weights(SCALES, "lognormal")
    near(weights.double(), train["lognorm_weight"], 1e-6)
    near((ours * weights).sum(1).mean(), train["nsp_loss_lognorm"])
    by_scale = (ours * hmar.scale_weights(SCALES, "scale")).sum(1).mean()
    near(by_scale * len(SCALES), train["nsp_loss_equal"], 1e-3)  # a sum over scales there


ONE_PASS, REFINED = ((1,), (4,), (9,), (16,)), ((1,), (1, 3), (1, 3, 5), (16,))
PUBLISHED = dict(mask_guidance=0, temperature=0)


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("var", "var", dict()),
        ("nsp", "nsp", dict()),
        ("hmar_nomask", "hmar", dict(schedule=ONE_PASS)),
        ("hmar_mask_argmax", "hmar", dict(schedule=REFINED)),
        ("hmar_mask_argmax_k5", "hmar", dict(schedule=REFINED, top_k=5)),
    ],
)
def test_samples(golden, name, kind, options):
    theirs, codec = golden["sample"][name], golden["codec"]
    options |= dict(PUBLISHED, guidance=golden["cfg"])
    passes = sample.steps(golden[kind], codec, golden["labels"], **options)
    last = {step.scale: step for step in passes}
    tokens = torch.cat([step.tokens for step in last.values()], 1)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    near(last[3].f_hat, theirs["f_hat"])
    model = dict(tokenizer=codec, transformer=golden[kind], classes=[], sampling=options)
    images = sample.generate(model, golden["labels"])
    decoded = (tokenizer.decode_features(codec, theirs["f_hat"]) + 1) / 2
    near((images + 1) / 2, theirs.get("img", decoded), 2e-4)


def test_every_pass_of_refinement(golden):
    """Each masked pass hides and samples the same tokens as the published code."""
    theirs = golden["sample"]["hmar_mask_argmax"]
    models = golden["hmar"], golden["codec"], golden["labels"]
    options = dict(PUBLISHED, guidance=golden["cfg"], schedule=REFINED)
    passes = sample.steps(*models, **options)
    steps = {(step.scale, step.pass_index): step for step in passes}
    for k, tokens in enumerate(theirs["idx_initial"]):
        assert torch.equal(steps[k, 0].tokens, tokens)
    for their_pass in theirs["mask_steps"]:
        k, number = their_pass["si"], their_pass["step"]
        hidden = [row.nonzero().flatten().tolist() for row in steps[k, number - 1].hidden]
        assert hidden == their_pass["masked"].sort().values.tolist()
        assert torch.equal(steps[k, number].tokens, their_pass["idx_after"])


def test_filters(golden):
    logits = golden["micro"]["filter_logits"]
    for case in golden["micro"]["filter"]:
        top_p = case["top_p"] or 1.0  # theirs: 0 keeps all
        assert torch.equal(sample.filter_logits(logits, case["top_k"], top_p), case["out"]), case


def layout(golden, kind):
    state, device = {}, "meta"
    for name, (dtype, _, *shape) in golden["layouts"][kind].items():
        state[name] = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    if "attn_bias_for_masking" in state:
        mask = benchmark.dense_mask(tokenizer.lengths(hmar.SCALES[256]), kind == "var")
        state["attn_bias_for_masking"] = mask[None, None]
    return state


def shapes(tree):
    return pytree.tree_map(lambda leaf: leaf.shape, tree)


def test_the_published_layouts_load(golden):
    with torch.device("meta"):
        codec, params = tokenizer.init(), hmar.init(depth=16)
        combined = hmar.add_masked_branch(params, blocks=8)
    assert shapes(tokenizer.from_published(layout(golden, "vqvae"))) == shapes(codec)
    for kind, ours in dict(var=params, nsp=params, hmar=combined).items():
        state = layout(golden, kind)
        params = hmar.from_published(state)
        assert ("causal" in params) == (kind == "var")
        params.pop("causal", None)
        if kind == "hmar":
            assert params["masked"].pop("leak") == {}
            assert params["masked"]["own_input"] is params["input"]["weight"]
        assert shapes(params) == shapes(benchmark.with_tanh(ours)), kind
    # stage two's: loaded as VAR it would sample rubbish
    refused("^state_dict: 16 blocks, .* in branches", hmar.from_published, layout(golden, "mp"))


def used(golden, name, state):
    """Loads one of the golden state dicts and uses all of it."""
    vq, labels = golden["vq"], golden["labels"]
    if name == "vqvae":
        codec = tokenizer.from_published(state)
        return tokenizer.decode(codec, tokenizer.encode(codec, golden["images"], SCALES), SCALES)

    params = hmar.from_published(state, SCALES)
    hmar.logits(params["next_scale"], hmar.features(params, labels, vq["ns_input"]))
    if name == "hmar":
        mask = torch.arange(29).expand(2, 29) % 2 == 0
        x = hmar.features(params, labels, vq["ns_input"], vq["mask_input"], mask)
        hmar.logits(params["masked"], x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_published_tokenizer_of_any_dtype_loads_in_fp32(golden, dtype):
    state = {name: leaf.to(dtype) for name, leaf in golden["state"]["vqvae"].items()}
    rounded = pytree.tree_map(lambda leaf: leaf.to(dtype).float(), golden["codec"])
    assert leaves_equal(tokenizer.from_published(state), rounded)


@pytest.mark.parametrize("kind", ["vqvae", "var", "nsp", "hmar"])
def test_each_entry_that_is_missing_raises(golden, kind):
    """When it is loaded or when it is first used."""
    state = golden["state"][kind]
    used(golden, kind, state)
    unused = (*hmar.BUFFERS, "ema_vocab_hit_SV")
    for name in state:
        if not name.endswith(unused):
            other = {key: leaf for key, leaf in state.items() if key != name}
            with pytest.raises((KeyError, TypeError, ValueError)):
                used(golden, kind, other)
