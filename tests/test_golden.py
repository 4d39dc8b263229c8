"""Agreement with the published systems: tiny random models of every kind, golden A."""

import json
from pathlib import Path

import pytest
import torch
from helpers import refused, visibility
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

GOLDEN = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"
SCALES = ((1, 1), (2, 2), (3, 3), (4, 4))
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files here")


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "published_A.pt", weights_only=True)


@pytest.fixture(scope="module")
def vqvae(golden):
    return tokenizer.from_published(golden["state"]["vqvae"])


@pytest.fixture(scope="module")
def models(golden):
    kinds = ("var", "nsp", "hmar")
    return {kind: hmar.from_published(golden["state"][kind], SCALES) for kind in kinds}


def near(ours, theirs, tolerance=1e-4):
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_tokenizer(golden, vqvae):
    theirs = golden["vq"]
    tokens = tokenizer.encode(vqvae, golden["images"], SCALES)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    features = tokenizer.encode_features(vqvae, golden["images"])
    near(features, theirs["f"])
    pyramid = tokenizer.quantise(vqvae, features, SCALES)
    for (_, own, f_hat), *expected in zip(pyramid, theirs["idx"], theirs["f_hat"], strict=True):
        assert torch.equal(own, expected[0])
        near(f_hat, expected[1])
    near(tokenizer.accumulate(vqvae, tokens, SCALES), theirs["f_hat"][-1])
    near(tokenizer.decode(vqvae, tokens, SCALES), theirs["rec"])
    for name in ("var_input", "ns_input"):
        near(tokenizer.next_scale_inputs(vqvae, tokens, SCALES), theirs[name])
    near(tokenizer.masked_inputs(vqvae, tokens, SCALES), theirs["mask_input"])


def test_logits_and_losses(golden, models):
    vq, train, labels = golden["vq"], golden["train"], golden["labels"]
    tokens = torch.cat(vq["idx"], 1)
    ours = hmar.next_scale_logits(models["var"], labels, vq["var_input"], is_causal=True)
    near(ours, train["var_logits"])
    losses = hmar.next_scale_losses(models["var"], labels, tokens, vq["var_input"], is_causal=True)
    near(losses.mean(), train["var_loss"])

    near(hmar.next_scale_logits(models["nsp"], labels, vq["ns_input"]), train["nsp_logits"])
    losses = hmar.next_scale_losses(models["nsp"], labels, tokens, vq["ns_input"])
    near(losses.mean(), train["nsp_loss_uniform"])
    weights = hmar.scale_weights(SCALES, "lognormal")
    near(weights.double(), train["lognorm_weight"], 1e-6)
    near((losses * weights).sum(1).mean(), train["nsp_loss_lognorm"])
    by_scale = (losses * hmar.scale_weights(SCALES, "scale")).sum(1).mean()
    near(by_scale * len(SCALES), train["nsp_loss_equal"], 1e-3)  # a sum over scales there

    mask = torch.zeros(2, 29, dtype=torch.bool)
    mask[:, train["mp_idx_to_mask"]] = True  # published training shares a mask over the batch
    masked = (vq["ns_input"], vq["mask_input"], mask)
    near(hmar.masked_logits(models["hmar"], labels, *masked), train["mp_logits"])
    losses = hmar.masked_losses(models["hmar"], labels, tokens, *masked)
    near(losses.mean(), train["mp_loss"])


ONE_PASS, REFINED = ((1,), (4,), (9,), (16,)), ((1,), (1, 3), (1, 3, 5), (16,))
PUBLISHED = dict(mask_guidance=0, soften=0, temperature=0)


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("var", "var", dict(is_causal=True)),
        ("nsp", "nsp", dict()),
        ("hmar_nomask", "hmar", dict(schedule=ONE_PASS)),
        ("hmar_mask_argmax", "hmar", dict(schedule=REFINED)),
        ("hmar_mask_argmax_k5", "hmar", dict(schedule=REFINED, top_k=5)),
    ],
)
def test_samples(golden, vqvae, models, name, kind, options):
    theirs, labels = golden["sample"][name], golden["labels"]
    options |= dict(PUBLISHED, guidance=golden["meta"]["cfg"])
    images, tokens = sample.generate(models[kind], vqvae, labels, **options)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    near(tokenizer.accumulate(vqvae, tokens, SCALES), theirs["f_hat"])
    decoded = (tokenizer.decode_features(vqvae, theirs["f_hat"]) + 1) / 2
    near((images + 1) / 2, theirs.get("img", decoded), 2e-4)


def test_every_pass_of_refinement(golden, vqvae, models):
    """Each masked pass hides what theirs hides and draws what theirs draws."""
    theirs, labels = golden["sample"]["hmar_mask_argmax"], golden["labels"]
    options = dict(PUBLISHED, guidance=golden["meta"]["cfg"], schedule=REFINED)
    passes = sample.steps(models["hmar"], vqvae, labels, **options)
    steps = {(step.scale, step.number): step for step in passes}
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
        assert torch.equal(sample.filtered(logits, case["top_k"], top_p), case["out"]), case


def layout(kind):
    layouts = json.loads((GOLDEN / "published_layouts.json").read_text())
    state, device = {}, "cpu" if kind == "vqvae" else "meta"  # which has no arg min
    for name, (dtype, _, *shape) in layouts[kind].items():
        state[name] = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    if "attn_bias_for_masking" in state:
        mask = torch.where(visibility(hmar.SCALES[256], kind == "var"), 0.0, -torch.inf)
        state["attn_bias_for_masking"] = mask[None, None]
    return state


def shapes(tree):
    return pytree.tree_map(lambda leaf: leaf.shape, tree)


def test_the_published_layouts_load():
    with torch.device("meta"):
        codec, params = tokenizer.init(), hmar.init(depth=16)
        combined = hmar.add_masked_branch(params, own_input=False)
    assert shapes(tokenizer.from_published(layout("vqvae"))) == shapes(codec)
    for kind, ours in dict(var=params, nsp=params, hmar=combined).items():
        state = layout(kind)
        assert shapes(hmar.from_published(state)) == shapes(ours), kind
        assert hmar.published_is_causal(state) == (kind == "var")
    # stage two's: loaded as VAR it would sample rubbish
    refused("no transformer's tree", hmar.from_published, layout("mp"))
