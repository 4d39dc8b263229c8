"""What makes it fast changes no result, and is really done: rounding, slices, checkpoints, halves and heads that are left out."""

import argparse
import contextlib
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import benchmark
import pytest
import torch
import torch.nn.functional as F
from test_hmar import arguments, tree
from test_sample import LABELS, PARAMS, SCALES, TOKENIZER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import attention_kernels
import hmar
import sample
import tokenizer
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PYRAMID = hmar.SCALES[256][:5]
MODEL = benchmark.model(4, PYRAMID, "cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # two on a busy machine wait for each other more than they work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(params, batch=2, seed=0):
    """labels, tokens, inputs, own inputs, mask that fit the tree."""
    labels, inputs, own, mask = arguments(params, batch, seed)
    total = sum(h * w for h, w in hmar.scales(params))
    return (
        labels,
        torch.randint(len(params["next_scale"]["head"]["bias"]), (batch, total)),
        inputs,
        own,
        mask,
    )


def test_bf16_logits_are_those_of_fp32_within_two_percent():
    labels, _, inputs, own, mask = batch_of(MODEL)
    half = hmar.cast(MODEL, torch.bfloat16)
    with torch.no_grad():
        for predict in (
            lambda p: hmar.next_scale_logits(p, labels, inputs),
            lambda p: hmar.next_scale_logits(p, labels, inputs, True),
            lambda p: hmar.masked_logits(p, labels, inputs, own, mask),
        ):
            ours, truth = predict(half), predict(MODEL)
            assert 1e-4 < (ours - truth).norm() / truth.norm() < 0.02  # not zero: the cast is felt


def test_the_benchmark_refuses_to_time_what_disagrees(capsys, monkeypatch):
    assert benchmark.disagreement(MODEL, "cpu") < 1e-5
    monkeypatch.setitem(hmar.SCALES, 256, PYRAMID)
    whole = hmar.self_attention  # the reference has its own
    monkeypatch.setattr(
        hmar, "self_attention", lambda x, *args, **kwargs: 1.01 * whole(x, *args, **kwargs)
    )
    with pytest.raises(SystemExit, match="disagree"):
        benchmark.start(argparse.Namespace(size=256, depth=2, batch=1), "cpu")
    assert "seconds" not in capsys.readouterr().out


@pytest.mark.parametrize("masked", [False, True])
def test_no_slice_of_logits_exceeds_its_limit(masked, monkeypatch):
    params = tree()
    labels, tokens, inputs, own, mask = batch_of(params, 8)
    rows, whole = [], hmar.logits

    def losses():
        if masked:
            return hmar.masked_losses(params, labels, tokens, inputs, own, mask)
        return hmar.next_scale_losses(params, labels, tokens, inputs)

    expected = losses()
    monkeypatch.setattr(hmar, "LOSS_SLICE", 7 * 5)  # seven tokens of five codes
    monkeypatch.setattr(hmar, "logits", lambda x, *head: rows.append(len(x)) or whole(x, *head))
    torch.testing.assert_close(losses(), expected, rtol=0, atol=1e-12)
    assert max(rows) == 7 and sum(rows) == (
        mask.sum() if masked else tokens.numel()
    )  # the masked head sees hidden tokens alone


def kept_bytes(function, weights):
    """(result, bytes of the storages that its backward pass waits for, weights excluded)."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = function()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    return result, sum(
        storages[pointer]
        for pointer in storages.keys() - {leaf.untyped_storage().data_ptr() for leaf in weights}
    )


def test_checkpointing_keeps_less_and_changes_no_bit():
    params = pytree.tree_map(torch.Tensor.requires_grad_, benchmark.model(4, PYRAMID, "cpu"))
    labels, tokens, inputs, *_ = batch_of(params)
    leaves = pytree.tree_leaves(params)
    results, kept = [], []
    for checkpointing in (False, True):
        step = functools.partial(
            hmar.next_scale_losses, params, labels, tokens, inputs, checkpointing=checkpointing
        )
        losses, size = kept_bytes(step, leaves)
        results.append(
            [
                losses,
                *torch.autograd.grad(
                    losses.mean(), leaves, allow_unused=True, materialize_grads=True
                ),
            ]
        )
        kept.append(size)
    assert all(map(torch.equal, *results)) and any(gradient.any() for gradient in results[0][1:])
    assert kept[1] < 0.5 * kept[0]


def test_masked_losses_send_no_gradient_into_frozen_weights():
    """The trunk is passed backwards on the way to the mask embedding, but no product is spent on its weights."""
    params = tree()
    branch = pytree.tree_map(torch.Tensor.requires_grad_, params["masked"])
    labels, tokens, inputs, own, mask = batch_of(params)
    losses = hmar.masked_losses(params, labels, tokens, inputs, own, mask)
    with mock.patch.object(F, "linear", side_effect=AssertionError):  # nothing is computed again
        losses.sum().backward()
    assert all(leaf.grad.any() for leaf in (branch["mask_embedding"], branch["own_input"]))
    assert not any(
        leaf.requires_grad
        for name in ("trunk", "next_scale", "input")
        for leaf in pytree.tree_leaves(params[name])
    )


def test_no_step_waits_for_the_device(monkeypatch):
    """Tensors without values, on which item, nonzero and the like fail: each of them would stall a GPU's queue."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # there is none for these tensors
    meta = torch.device("meta")
    params, codec, critic = (
        pytree.tree_map(lambda leaf: leaf.to(meta), t)
        for t in (PARAMS, TOKENIZER, tokenizer.init_discriminator(8))
    )
    labels, tokens, mask, images, uniform, places = (
        x.to(meta)
        for x in (
            LABELS,
            torch.empty(3, 17, dtype=torch.int64),
            torch.empty(3, 16, dtype=torch.bool),
            torch.empty(3, 3, 16, 16),
            torch.empty(3, 4),
            torch.empty(5, dtype=torch.int64),
        )
    )
    inputs, own = (
        tokenizer.next_scale_inputs(codec, tokens, SCALES),
        tokenizer.masked_inputs(codec, tokens, SCALES, mask),
    )
    with pytest.raises((NotImplementedError, RuntimeError)):
        hmar.masked_losses(params, labels, tokens, inputs, own, mask)
    args = argparse.Namespace(
        dtype=torch.bfloat16,
        scales=((1, 1), (8, 8)),
        beta=0.1,
        lr=0.1,
        weight_decay=0.1,
        device=meta,
    )

    def next_scale(params):
        return hmar.next_scale_losses(hmar.cast(params, args.dtype), labels, tokens, inputs).mean()

    def masked(params):
        return hmar.masked_losses(
            hmar.cast(params, args.dtype), labels, tokens, inputs, own, mask, places=places
        ).sum()

    def reconstruction(params):
        return train.tokenizer_loss(args, params, images, True, None, 0.4, uniform)[0]

    for start, loss in (
        (params, next_scale),
        (params, masked),
        (dict(tokenizer=codec, discriminator=critic), reconstruction),
    ):
        trained = train.trainable(start)
        optimizer, leaves = (
            train.adamw(trained, args),
            [x for x in pytree.tree_leaves(trained) if isinstance(x, torch.nn.Parameter)],
        )
        loss(trained).backward()
        assert torch.nn.utils.clip_grad_norm_(leaves, 1.0).is_meta
        optimizer.step()


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the CPU, on tensors without values: whatever mixes the two fails, as it would on a GPU."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # there is none for these tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda tree: pytree.tree_map(
            lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), tree
        )


def test_training_mixes_no_devices(elsewhere):
    generator = torch.Generator().manual_seed(0)
    params, codec, critic, labels, images = elsewhere(
        (PARAMS, TOKENIZER, tokenizer.init_discriminator(8), LABELS, torch.empty(3, 3, 6, 8))
    )
    tokens = tokenizer.encode(tokenizer.cast(codec, torch.bfloat16), images, SCALES)
    mask, keep = elsewhere(
        (torch.empty(3, sum(tokenizer.lengths(SCALES)[1:]), dtype=torch.bool), torch.empty(3, 3, 2))
    )
    inputs, own = (
        tokenizer.next_scale_inputs(codec, tokens, SCALES),
        tokenizer.masked_inputs(codec, tokens, SCALES, mask),
    )
    for options in (
        dict(),
        dict(
            keep=keep[:, : len(params["trunk"] + params["next_scale"]["blocks"])],
            checkpointing=True,
        ),
    ):
        for is_causal in (False, True):
            assert hmar.next_scale_losses(
                hmar.cast(params, torch.bfloat16), labels, tokens, inputs, is_causal, **options
            ).is_meta
        places = elsewhere(torch.empty(5, dtype=torch.int64))
        assert hmar.masked_losses(
            params, labels, tokens, inputs, own, mask, places=places, **options
        ).is_meta
    features = tokenizer.features(codec, images)
    assert tokenizer.data_codebook(codec, features, SCALES, generator).is_meta
    counts = torch.zeros(len(codec["codebook"]), dtype=torch.int64, device="meta")
    assert all(
        made.is_meta
        for made in tokenizer.revive_codes(
            codec["codebook"], counts, [features.flatten(2).mT], generator
        )
    )
    args = argparse.Namespace(dtype=torch.bfloat16, scales=SCALES, beta=0.1)
    large, numbers = elsewhere((torch.empty(3, 3, 16, 24), torch.empty(3, 4)))
    args.scales = ((1, 1), (2, 3), (large.shape[2] // 2, large.shape[3] // 2))
    tree = train.trainable(dict(tokenizer=codec, discriminator=critic))
    assert train.tokenizer_loss(args, tree, large, True, None, 0.4, numbers)[0].is_meta


@pytest.mark.parametrize(
    "device, expected, backend",
    [(None, "cuda:1", "nccl"), ("cuda", "cuda:1", "nccl"), ("cpu", "cpu", "gloo")],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device, expected, backend):
    monkeypatch.setattr(os, "environ", os.environ | dict(WORLD_SIZE="2", LOCAL_RANK="1"))
    monkeypatch.setattr(
        torch, "empty", lambda count, device: argparse.Namespace(device=torch.device(device))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        mock.patch.object(torch.cuda, "set_device") as chosen,
        mock.patch.object(torch.distributed, "init_process_group") as joined,
    ):
        assert sample.start_processes(device) == torch.device(expected)
    assert [call.args for call in chosen.call_args_list] == (
        [(torch.device(expected),)] if backend == "nccl" else []
    )
    joined.assert_called_once_with(backend)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(order=order, mask_guidance=1.0) for order in sample.ORDERS),
        dict(smooth=True),
        dict(top_k=3, top_p=0.9, temperature=0.5),
        dict(guidance=0.0, temperature=0),
        dict(is_causal=True),
    ],
)
def test_sampling_mixes_no_devices(elsewhere, options):
    def numbers(streams, active, shape):  # the library's own needs to know which images are active
        return torch.empty(len(streams), *shape, dtype=torch.float64, device=active.device)

    def keep(passes, masked, has_masked_branch):
        return [torch.full((len(masked),), count, device=masked.device) for count in passes]

    params, codec, labels, images = elsewhere((PARAMS, TOKENIZER, LABELS, torch.empty(3, 3, 6, 8)))
    if "is_causal" in options:
        del params["masked"]
    with (
        mock.patch.object(sample, "uniforms", numbers),
        mock.patch.object(sample, "keep_counts", keep),
    ):
        images, tokens = sample.generate(params, codec, labels, **options)
        assert images.is_meta and tokens.is_meta
        if not options.get("is_causal"):
            assert sample.edit(
                params, codec, images, images[:, :1] > 0, labels, feather=2, **options
            ).is_meta


@pytest.mark.parametrize(
    "guidance, mask_guidance", [(0.0, 0.0), (1.5, 0.0), ([0, 3.0, 0], [0, 0, 2.0])]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_halves_left_out_change_no_token(guidance, mask_guidance, is_causal):
    options = dict(
        guidance=guidance,
        mask_guidance=mask_guidance,
        schedule=((1,), (1, 3), (3, 4, 5)),
        is_causal=is_causal,
    )
    params = PARAMS
    if is_causal:
        params, options = (
            {name: part for name, part in PARAMS.items() if name != "masked"},
            dict(guidance=guidance, is_causal=True),
        )
    batches, single, features = [], sample.guided, hmar.next_scale_features

    def counted(params, labels, *args, **kwargs):
        batches.append(len(labels))
        return features(params, labels, *args, **kwargs)

    with mock.patch.object(hmar, "next_scale_features", counted):
        ours = sample.generate(params, TOKENIZER, LABELS, **options)[1]
    steps = (
        [1.5 * k / (len(SCALES) - 1) for k in range(len(SCALES))]
        if guidance == 1.5
        else guidance or [0] * len(SCALES)
    )
    both = is_causal and any(steps)  # a cache takes in both halves from the first scale on
    assert batches == [len(LABELS) * (1 + (both or t > 0)) for t in steps]
    if not is_causal:  # the cache's size follows from guidance, the rest does not
        with mock.patch.object(
            sample, "guided", lambda *args, always=False: single(*args, always=True)
        ):
            assert torch.equal(sample.generate(params, TOKENIZER, LABELS, **options)[1], ours)


def small_step(masked_blocks, batch, device):
    """What `benchmark.cost` computes, really made: (arguments of cost, tree, its trained leaves, tree in bf16, losses(checkpointing))."""
    scales, depth, sizes = (
        ((1, 2), (2, 3), (4, 4)),
        4,
        dict(width=64, heads=2, classes=3, codes=40, code_dim=4),
    )
    params = hmar.init(depth=depth, scales=scales, **sizes)
    params = hmar.add_masked_branch(params, masked_blocks) if masked_blocks else params
    params = pytree.tree_map(lambda x: x.to(device), params)
    params, leaves = benchmark.trained(
        params, lambda name: name.startswith("masked") or not masked_blocks
    )
    labels, tokens, inputs, own, mask = (x.to(device) for x in batch_of(params, batch))
    mask[:] = torch.arange(mask.shape[1], device=device) % 2 == 1
    fast = hmar.cast(params, torch.bfloat16)

    def losses(checkpointing=False):
        if masked_blocks:
            return hmar.masked_losses(
                fast, labels, tokens, inputs, own, mask, checkpointing=checkpointing
            )
        return hmar.next_scale_losses(fast, labels, tokens, inputs, checkpointing=checkpointing)

    return (
        dict(depth=depth, scales=scales, masked_blocks=masked_blocks, **sizes),
        params,
        leaves,
        fast,
        losses,
    )


@pytest.mark.parametrize("masked_blocks", [0, 2])
def test_computed_parameters_optimizer_and_flops_are_those_of_a_real_step(masked_blocks):
    sizes, params, leaves, _, losses = small_step(masked_blocks, 2, "cpu")
    optimizer, average = torch.optim.AdamW(leaves), [leaf.detach().clone() for leaf in leaves]
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # attention in its six products, none made again
        losses().mean().backward()
    optimizer.step()
    computed, weights = benchmark.cost(**sizes), pytree.tree_leaves(params)
    moments = [
        x for state in optimizer.state.values() for x in state.values() if x.ndim
    ]  # all but the step counters
    assert computed["parameters"] == sum(map(torch.numel, weights))
    assert computed["optimizer"] == sum(
        x.nbytes for x in [*weights, *(leaf.grad for leaf in leaves), *moments, *average]
    )
    assert 2 * computed["flops"] == counter.get_total_flops()


@pytest.mark.skipif(attention_kernels.triton is None, reason="no Triton")
@pytest.mark.parametrize("masked_blocks", [0, 2])
def test_computed_activations_are_what_a_real_step_keeps(masked_blocks, monkeypatch):
    """To the byte, but for the loss's own: logarithms of the softmax, a target a token and a number, of which slices keep one at a time."""
    if DEVICE == "cpu":  # attention keeps what it keeps on a GPU
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(attention_kernels, "INTERPRETED", True)
    sizes, params, _, fast, losses = small_step(masked_blocks, 1, DEVICE)
    computed, weights, lengths = (
        benchmark.cost(**sizes),
        pytree.tree_leaves((params, fast)),
        tokenizer.lengths(sizes["scales"]),
    )
    loss = (sum(lengths[1:]) // 2 if masked_blocks else sum(lengths)) * (4 * sizes["codes"] + 8) + 4
    kept, checkpointed = (
        kept_bytes(functools.partial(losses, checkpointing), weights)[1] - loss
        for checkpointing in (False, True)
    )
    x = torch.randn(1, sum(lengths), sizes["width"], device=DEVICE, requires_grad=True)
    condition, blocks = (
        fast["classes"][:1],
        (fast["masked"]["blocks"] if masked_blocks else fast["trunk"])[-1:],
    )
    again = kept_bytes(lambda: hmar.run_blocks(x, condition, blocks, lengths), [*weights, x])[1]
    assert kept == computed["activations"]
    assert checkpointed + again == computed["checkpointed"]


def test_computed_cost_of_the_tokenizer_is_that_of_a_real_step():
    sizes, scales = (
        dict(codes=64, code_dim=16, channels=32, multipliers=(1, 2), residual_blocks=1),
        ((1, 1), (3, 3), (8, 8)),
    )
    params, leaves = benchmark.trained(tokenizer.init(**sizes), lambda name: True)
    fast, images = tokenizer.cast(params, torch.bfloat16), torch.rand(1, 3, 16, 16)

    def losses():
        made, loss, _, _ = tokenizer.training_pass(fast, images, scales)
        return made.sum() + loss

    with FlopCounterMode(display=False) as counter:
        losses().backward()
    computed = benchmark.tokenizer_cost(16, scales, **sizes)
    assert computed["parameters"] == sum(map(torch.numel, pytree.tree_leaves(params)))
    assert computed["optimizer"] == 5 * sum(
        leaf.nbytes for leaf in leaves
    )  # weights, gradients, two moments, average
    assert computed["flops"] == counter.get_total_flops()
    assert computed["activations"] == kept_bytes(losses, pytree.tree_leaves((params, fast)))[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator alone")
def test_freed_memory_is_not_faulted_in_again():
    script = (
        "import resource, sys, torch, sample\nif sys.argv[1] == 'keep': sample.keep_freed_memory()\n"
        "def step(): [torch.ones(2**21) for _ in range(8)]\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "step()\nbefore = faults()\nfor _ in range(20): step()\nprint(faults() - before)"
    )
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", script, way],
                cwd=Path(sample.__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("plain", "keep")
    )
    assert kept < plain / 10, (kept, plain)
