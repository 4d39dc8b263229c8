"""What speed and memory rest on, without a clock."""

import contextlib
from functools import partial
from unittest import mock

import benchmark
import pytest
import torch
from helpers import arguments, random_tokens, settings_of, small_codec, tree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import attention_kernels as kernels
import hmar
import sample
import tokenizer
import train

SCALES = ((1, 1), (2, 2), (4, 4))
CODEC = small_codec(codes=11, code_dim=4, multipliers=(1, 2), attention=False)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Made(TorchDispatchMode):
    """tensors: [(operator, tensor), ...], without values."""

    def __enter__(self):
        self.tensors = []
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        leaves = filter(torch.is_tensor, pytree.tree_leaves(result))
        self.tensors += [(str(operator), torch.empty_like(x, device="meta")) for x in leaves]
        return result


def small(scales=SCALES, depth=3, masked=1):
    return tree(scales, depth=depth, masked=masked, codes=11, random=False)


def loss(name, params, *batch):
    """A stage's, of a batch from `batch_of`."""
    if name == "tokenizer":
        return tokenizer.training_loss(params, *batch, hue_variance=0.1)["loss"]
    return hmar.losses(params, *batch).mean()


def batch_of(name, params, scales=SCALES, count=4):
    if name == "tokenizer":
        images = torch.zeros(count, 3, 2 * scales[-1][0], 2 * scales[-1][1])
        return images, scales, torch.tensor([0]), torch.tensor([1])
    labels, inputs, *masked = arguments(params, count)
    given = labels, random_tokens(count, scales, 11), inputs
    return (*given, *masked) if name == "masked" else given


def step(name, scales=SCALES, dtype=torch.bfloat16, **more):
    """[(operator, tensor), ...] of a step of a stage's loss."""
    params = CODEC if name == "tokenizer" else small(scales)
    params = benchmark.trainable(params) | more
    cast = tokenizer.cast if name == "tokenizer" else hmar.cast
    batch = batch_of(name, params, scales)
    with Made() as made:
        loss(name, cast(params, dtype), *batch).backward()
    return made.tensors


# ---- sizes


@DTYPES
@pytest.mark.parametrize("more", [{}, dict(causal={})])
def test_no_tensor_has_a_row_and_a_column_a_token(dtype, more):
    scales = hmar.SCALES[256]
    made = step("next_scale", scales, dtype, **more) + step("masked", scales, dtype)
    with Made() as drawn:
        list(sample.steps(small(scales) | more, CODEC, torch.tensor([0, 1])))
    shapes = [x.shape for _, x in made + drawn.tensors]
    assert (4, 680, 32) in shapes and (2, 256) in shapes
    assert all(sum(side >= 680 for side in shape) < 2 for shape in shapes)


# ---- dtypes


@DTYPES
@pytest.mark.parametrize("name", ["next_scale", "masked"])
def test_products_are_in_the_dtype_that_was_asked_for(name, dtype):
    """But for the input's and the head's modulation."""
    made = step(name, dtype=dtype)
    names = ("aten.mm", "aten.addmm", "aten.bmm", "aten._scaled")
    products = [x.dtype for operator, x in made if operator.startswith(names)]
    assert products.count(dtype) > 40 and len(products) - products.count(dtype) < 12
    assert {x.dtype for _, x in made if x.is_floating_point()} <= {torch.float32, dtype}


@pytest.mark.parametrize(
    "device, has, fast",
    [("cpu", False, False), ("cpu", True, True), ("cuda", (7, 5), False), ("cuda", (8, 0), True)],
)
def test_the_dtype_is_a_rule_about_the_device(device, has, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: has)
    chosen = sample.find_dtype(None, torch.device(device))
    assert chosen == (torch.bfloat16 if fast else torch.float32)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert sample.find_device("cuda") == torch.device("cuda", 3)


def test_enlarging_goes_back_through_products():
    """Bicubic's own backward pass on CUDA is slow, and adds up in any order."""
    operators = {operator for operator, _ in step("tokenizer")}
    assert "aten.bmm.default" in operators
    assert not any("bicubic2d_backward" in operator for operator in operators)


# ---- waiting


@contextlib.contextmanager
def elsewhere(*trees):
    """Their tensors on another device, without values: to look at one, or to mix them, fails."""
    there = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), trees)
    off = mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext())
    with off, FakeTensorMode(allow_non_fake_inputs=True):  # which has no autocast there
        yield there


@pytest.mark.parametrize("name", ["tokenizer", "next_scale"])
def test_a_loss_waits_for_nothing_and_is_one_graph(name):
    """That of the masked stage waits for the number of hidden tokens."""
    params = CODEC if name == "tokenizer" else small()
    batch = batch_of(name, params)
    with elsewhere(params, *batch) as there:
        loss(name, *there)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            value = compiled(name, params, *pytree.tree_map_only(torch.Tensor, torch.clone, batch))
            torch.testing.assert_close(value, loss(name, params, *batch))


@pytest.mark.parametrize("name", ["tokenizer", "next_scale", "masked"])
def test_compiled_losses_are_those_of_the_loops(name):
    """Gradients are equal, with dropout too; other numbers of images take a second graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = partial(torch.compile, backend="eager")  # the others take a minute here
    params = small(depth=1 + (name == "masked"), masked=int(name == "masked"))
    tree = benchmark.trainable(CODEC if name == "tokenizer" else benchmark.learning(params))
    codec, weights = small_codec(codes=11, code_dim=4), hmar.scale_weights(SCALES, "root")
    kernels = torch.ones(5, 3, 3, 3)
    layers = [lambda x: torch.conv2d(x, kernels)]

    def gradients(change, count):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(count)
        if name == "tokenizer":
            images = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
            coarse = torch.arange(0, count, 2)
            given = tokenizer.cast(tree, torch.bfloat16), images, SCALES, coarse, coarse % 2
            options = dict(jump_weight=0.2, spectrum_weight=0.2, hue_variance=0.1)
            options |= dict(perceptual_layers=layers, is_transposed=count == 7)
            function = tokenizer.training_loss
        else:
            labels, tokens = torch.arange(count) % 3, random_tokens(count, SCALES, 11)
            batch = labels, tokens
            if name == "masked":
                batch = *batch, torch.rand(count, 20, generator=generator) < 0.3
            given = hmar.cast(params | tree, torch.bfloat16), codec, weights, *batch
            function, options = train.transformer_loss, dict(dropout=0.3)
        result = functions.setdefault(change, change(function))(*given, **options)["loss"]
        leaves = pytree.tree_leaves(tree)
        return [result.detach(), *torch.autograd.grad(result, leaves, allow_unused=True)]

    functions = {}
    for count in (6, 8, 7):
        pair = zip(gradients(compiled, count), gradients(lambda x: x, count), strict=True)
        for ours, plain in pair:
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    if name != "masked":  # which waits for the number of hidden tokens, between two graphs
        assert not counters["graph_break"]
        assert graphs == (3 if name == "tokenizer" else 2)  # one more for the exchange of sides


def test_losses_are_compiled_on_a_gpu_alone():
    on_cpu, on_gpu = torch.device("cpu"), torch.device("cuda:1")
    for device in (on_cpu, on_gpu):
        stage = mock.Mock(device=device, dtype=torch.float32, tree=CODEC, each=lambda _: [])
        with (
            mock.patch.object(train, "Stage", lambda *_, stage=stage: stage),
            mock.patch.object(torch, "compile") as compiled,
        ):
            images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
            train.train_tokenizer(CODEC, [], images, {}, settings_of())
            params, examples = tree(SCALES, masked=0), (torch.zeros(1), torch.zeros(1, 21))
            stage.tree = params
            train.train_transformer(params, CODEC, [], examples, settings_of())
        assert [x.args[0] for x in compiled.mock_calls] == [
            tokenizer.training_loss,
            train.transformer_loss,
        ]
        assert all(x.kwargs["disable"] == (device == on_cpu) for x in compiled.mock_calls)


# ---- what a GPU waits for, and holds


def test_a_loop_waits_for_no_number_and_no_copy():
    """But where numbers are printed, here in step 4, and where dead codes are replaced, twice.

    The masked stage waits in each step, for the number of hidden tokens.
    """
    waits = benchmark.waits_of_loops()
    codes = [(16,)] * 2
    assert waits == {"tokenizer": (4, codes), "next-scale": (4, []), "masked": (1, [])}


def test_state_on_the_device_is_kept_once():
    """The weights, gradients and momenta in fp32, and a cast."""
    found = benchmark.state_bytes(depth=8)
    assert found["weights"] == found["gradients"] == 4
    assert sum(found.values()) < 16


@pytest.mark.parametrize("more, options", [({}, {}), (dict(causal={}), dict(top_p=0.9))])
def test_sampling_waits_for_nothing_and_mixes_no_devices(more, options):
    with elsewhere(small() | more, CODEC, torch.tensor([0, 1])) as models:
        list(sample.steps(*models, **options))


# ---- the benchmark


@pytest.mark.parametrize("name, masked", [("next_scale", 0), ("masked", 2)])
def test_computed_costs_are_those_of_a_real_step(name, masked):
    params = small(depth=4, masked=masked)
    tree = benchmark.trainable(benchmark.learning(params))
    fast = hmar.cast(params | tree, torch.bfloat16)
    batch = [*batch_of(name, params, count=1)]
    if masked:
        batch[-1] = torch.arange(20)[None] % 2 == 1
    flops = benchmark.count_flops(lambda: loss(name, fast, *batch).backward())

    leaves = pytree.tree_leaves(tree)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    optimizers = train.new_optimizers(tree, 0)
    muon = benchmark.count_flops(lambda: [optimizer.step() for optimizer in optimizers])
    with FakeTensorMode():
        params, tree = benchmark.without_values((params, tree))
        computed = benchmark.transformer_flops(params), benchmark.optimizer_flops(tree)
    assert computed == (flops, muon)


def test_costs_are_printed(capsys):
    benchmark.main(["cost", "--depth", "16"])
    assert "109 / 310 / 468 | 79.56 | 11.60 | 256 pixels" in capsys.readouterr().out


def test_gpu_refuses_what_disagrees(capsys, monkeypatch):
    command = ["gpu", "--device=cpu", "--size=256"]
    assert benchmark.main(command) == 0
    out = capsys.readouterr().out
    ran = "1 passed" if kernels.triton else "1 skipped"  # a Mac has no Triton
    assert "REHEARSAL" in out and ran in out and out.count(": ours") == 7

    whole = hmar.feed_forward
    monkeypatch.setattr(hmar, "feed_forward", lambda *args, **more: 1.01 * whole(*args, **more))
    assert benchmark.main(command) == 1
    assert capsys.readouterr().out.count("differs from the reference") == 2
