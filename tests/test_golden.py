"""Agreement with the published systems: tiny random models of every kind, golden A."""

import json

import benchmark
import pytest
import torch
from helpers import GOLDEN, refused
from torch.utils import _pytree as pytree

import hmar
import sample
import tokenizer

SCALES = ((1, 1), (2, 2), (3, 3), (4, 4))
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files here")


@pytest.fixture(scope="module")
def golden():
    """What theirs computed, and their weights as trees of ours."""
    theirs = torch.load(GOLDEN / "published_A.pt")
    states = theirs["state"]
    trees = {kind: hmar.from_published(states[kind], SCALES) for kind in ("var", "nsp", "hmar")}
    return theirs | trees | dict(codec=tokenizer.from_published(states["vqvae"]))


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_tokenizer(golden):
    theirs, codec = golden["vq"], golden["codec"]
    tokens = tokenizer.encode(codec, golden["images"], SCALES)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    near(tokenizer.encode_features(codec, golden["images"]), theirs["f"])
    near(tokenizer.decode(codec, tokens, SCALES), theirs["rec"])
    for name in ("var_input", "ns_input"):
        near(tokenizer.next_scale_inputs(codec, tokens, SCALES), theirs[name])
    near(tokenizer.masked_inputs(codec, tokens, SCALES), theirs["mask_input"])


def test_logits(golden):
    vq, train, labels = golden["vq"], golden["train"], golden["labels"]
    logits = hmar.next_scale_logits(golden["var"], labels, vq["var_input"], is_causal=True)
    near(logits, train["var_logits"])
    near(hmar.next_scale_logits(golden["nsp"], labels, vq["ns_input"]), train["nsp_logits"])
    mask = torch.zeros(2, 29, dtype=torch.bool)
    mask[:, train["mp_idx_to_mask"]] = True  # published training shares a mask over the batch
    given = labels, vq["ns_input"], vq["mask_input"], mask
    near(hmar.masked_logits(golden["hmar"], *given), train["mp_logits"])


PUBLISHED = dict(mask_guidance=0, soften=0, temperature=0)
REFINED = dict(schedule=((1,), (1, 3), (1, 3, 5), (16,)))
SAMPLES = dict(
    var=dict(is_causal=True),
    nsp={},
    hmar_nomask=dict(schedule=0),
    hmar_mask_argmax=REFINED,
    hmar_mask_argmax_k5=REFINED | dict(top_k=5),
)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(golden, name):
    theirs, params, codec = golden["sample"][name], golden[name.split("_")[0]], golden["codec"]
    options = PUBLISHED | SAMPLES[name] | dict(guidance=golden["meta"]["cfg"])
    images, tokens = sample.generate(params, codec, golden["labels"], **options)
    assert torch.equal(tokens, torch.cat(theirs["idx"], 1))
    near(images, tokenizer.decode_features(codec, theirs["f_hat"]))


def layout(kind):
    layouts = json.loads((GOLDEN / "published_layouts.json").read_text())
    state, device = {}, "cpu" if kind == "vqvae" else "meta"  # which has no arg min
    for name, (dtype, _, *shape) in layouts[kind].items():
        state[name] = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    if "attn_bias_for_masking" in state:
        mask = benchmark.dense_mask(tokenizer.lengths(hmar.SCALES[256]), kind == "var")
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
