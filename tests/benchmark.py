"""Benchmarks: tests/benchmark.py [attention | train | sample | gpu | cost | count | kernels],
or tests/benchmark.py rehearse FOLDER_OF_PHOTOGRAPHS NEW_FOLDER.

`train` and `sample` time the library against the published way: the dense reference below makes
the tensors that VAR's code makes, in fp32 and under bf16 autocast, and is checked against ours
first. Contestants take turns, so that a busy machine is fair; with one thread it is CPU time.
`gpu` is a rehearsal where there is none.
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_kernels
import hmar
import sample
import tokenizer
import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VAR = dict(guidance=1.5, top_k=900, top_p=0.96)  # settings of the published sampler
SIZES = {256: (4, 8), 512: (1, 8), 1024: (1, 2)}  # pixels -> images and depth; on a card the double
ROUNDS = 5


# ---- what is measured, and how it is printed


def conditions():
    """Card or processor, and versions."""
    is_gpu = DEVICE.type == "cuda"
    path = Path("/proc", "driver/nvidia/version" if is_gpu else "cpuinfo")
    text = path.read_text() if path.exists() else ""
    words = re.findall(r"^(?:NVRM|model name|cpu family|model)\b.*", text, re.MULTILINE)[:3]
    words.append(torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} threads")
    words += [f"torch {torch.__version__}", f"ours in {sample.find_dtype(None, DEVICE)}"]
    words.append(f"Triton {getattr(attention_kernels.triton, '__version__', 'none')}")
    return ", ".join(" ".join(word.split()) for word in words)


def print_table(header, rows):
    """In Markdown; the last column is of words."""
    lines = [header, ["-:"] * (len(header) - 1) + ["-"]]
    for row in rows:
        lines.append([f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *cells, words in lines:
        print("|", *(f"{cell:>{width}} |" for cell, width in zip(cells, widths)), words, "|")


def clock():
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def timed(contestants, references, flops, what=""):
    """Rows: best ms, times the speed of the best of the first, TFLOP/s, MiB on a card, words."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(ROUNDS + 1):
        for name, function in contestants.items():
            start = clock()
            function()
            if turn:  # the first warms up
                best[name] = min(best[name], clock() - start)

    reference = min([*best.values()][:references])
    rows = []
    for name, seconds in best.items():
        memory = peak_memory(contestants[name]) if DEVICE.type == "cuda" else ""
        numbers = seconds * 1e3, reference / seconds, flops / seconds / 1e12
        rows.append((*numbers, memory, what + name))
    return rows


def peak_memory(function):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def refuse(name, ours, truth, allowed):
    """Ends the run unless each tensor is near the true one, by the norm."""
    pairs = zip(ours, truth, strict=True)
    error = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
    if not error < allowed:
        sys.exit(f"{name} differs from the reference by {error:.1e}")


# ---- attention


def attention(size, batch, width, **_):
    """Rows of forward and backward passes of one layer and its alternatives."""
    heads, dtype = width // 64, sample.find_dtype(None, DEVICE)
    lengths = tuple(tokenizer.lengths(hmar.SCALES[size]))
    qkv = torch.randn(batch, sum(lengths), 3, heads, 64, device=DEVICE, dtype=dtype)
    tensors = [x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    output_gradient = torch.randn_like(tensors[0])

    def step(function):
        output = function(*tensors)
        return [output.detach(), *torch.autograd.grad(output, tensors, output_gradient)]

    rows = []
    for is_causal in (False, True):
        contestants = attention_contestants(batch, lengths, is_causal, dtype)
        calls = {name: partial(step, function) for name, function in contestants.items()}
        truth = calls["SDPA, dense mask"]()
        for name, call in calls.items():
            refuse(name, call(), truth, 16 * torch.finfo(dtype).eps)

        keys = itertools.accumulate(lengths) if is_causal else lengths
        flops = 7 * 128 * sum(map(math.prod, zip(lengths, keys))) * batch * heads
        what = f"{sum(lengths)} tokens, {'causal' if is_causal else 'diagonal'}, "
        rows += timed(calls, 1, flops, what)  # two products forward, five backward
    return rows


def dense_mask(lengths, is_causal, dtype=torch.float32):
    """(L, L): 0 where a token sees another, -inf elsewhere."""
    block = torch.repeat_interleave(torch.tensor(lengths, device=DEVICE))
    sees = torch.ge if is_causal else torch.eq
    return torch.where(sees(block[:, None], block), 0.0, -torch.inf).to(dtype)


def attention_contestants(batch, lengths, is_causal, dtype):
    """{name: attention(query, key, value)} of the same pattern."""
    mask = dense_mask(lengths, is_causal, dtype)
    ours = attention_kernels.block_sparse_attention
    contestants = {
        "SDPA, dense mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
        "block-sparse": partial(ours, block_lengths=lengths, is_causal=is_causal),
    }
    if DEVICE.type != "cuda":
        return contestants

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    def varlen(*qkv):
        packed = [x.transpose(1, 2).flatten(0, 1) for x in qkv]
        output = varlen_attn(*packed, edges, edges, max(lengths), max(lengths))
        return output.unflatten(0, (batch, -1)).transpose(1, 2)

    def visible(batch, head, row, column):
        return mask[row, column] == 0

    blocks = create_block_mask(visible, None, None, len(mask), len(mask), device=DEVICE)
    contestants["FlexAttention"] = partial(torch.compile(flex_attention), block_mask=blocks)
    if not is_causal and dtype != torch.float32:  # its keys cannot be a prefix
        edges = [0, *itertools.accumulate(lengths * batch)]
        edges = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        contestants["varlen"] = varlen
    return contestants


# ---- the published way: VAR's tensors and casts, whether autocast is on or not


def dense_logits(params, labels, inputs, mask):
    """Logits (B, L, codes) in training, with an additive mask (L, L)."""
    # the sequence is made in fp32, the blocks run in what products give
    with torch.autocast(DEVICE.type, enabled=False):
        condition = F.embedding(labels, params["classes"])
        start = condition[:, None] + params["start"]
        x = torch.cat([start, F.linear(inputs, **params["input"])], 1) + dense_places(params)
    if torch.is_autocast_enabled(DEVICE.type):
        dtype = torch.get_autocast_dtype(DEVICE.type)
        x, condition, mask = (tensor.to(dtype) for tensor in (x, condition, mask))
    return dense_blocks(params, x, condition, mask)


def dense_places(params):
    """(L, C): positions and levels."""
    pairs = zip(params["positions"], params["levels"])
    return torch.cat([position.flatten(0, 1) + level for position, level in pairs])


def dense_blocks(params, x, condition, mask, caches=None):
    """Logits (B, n, codes) of x (B, n, C)."""
    branch = params["next_scale"]
    blocks = params["trunk"] + branch["blocks"]
    for block, cache in zip(blocks, caches or [None] * len(blocks)):
        x = dense_block(x, condition, mask, cache, **block)

    modulation = F.linear(F.silu(condition), **branch["modulation"])
    scale, shift = modulation.unflatten(-1, (1, 2, -1)).unbind(2)
    return F.linear(dense_norm(x.float(), scale, shift).float(), **branch["head"]).float()


def dense_block(x, condition, mask, cache, modulation, attention, mlp):
    six = F.linear(F.silu(condition), **modulation).unflatten(-1, (1, 6, -1))  # (B, 1, 6, C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
    x = x + dense_attention(dense_norm(x, scale1, shift1), mask, cache, **attention).mul_(gamma1)
    h = F.linear(dense_norm(x, scale2, shift2), **mlp["expand"])
    h = F.gelu(h, approximate="tanh" if "tanh" in mlp else "none")
    return x + F.linear(h, **mlp["contract"]).mul(gamma2)


def dense_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).mul(scale.add(1)).add_(shift)


def dense_attention(x, mask, cache, qkv, q_bias, v_bias, log_temperature, project):
    """Attention under a mask or, where there is a list [keys, values] or [], to what it holds."""
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    parts = F.linear(x, qkv, bias).unflatten(-1, (3, len(log_temperature), -1))
    q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, n, head_dim) each
    temperature = log_temperature.clamp_max(math.log(100)).exp()[:, None, None]
    q = F.normalize(q, dim=-1).mul(temperature)
    k = F.normalize(k, dim=-1)

    if cache:
        k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v)))
    if cache is not None:
        cache[:] = k, v
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return F.linear(out.transpose(1, 2).flatten(2), **project)


@torch.no_grad()
def dense_sample(params, codec, labels):
    """Tokens (B, L) drawn with a cache, and both logits (2 B, L, codes)."""
    scales = hmar.scale_sizes(params)
    condition = F.embedding(with_null(params, labels), params["classes"])
    places = dense_places(params).split(tokenizer.lengths(scales))
    caches = [[] for _ in range(hmar.block_count(params))]
    f_hat, drawn = 0, []

    for k, size in enumerate(scales):
        if k == 0:
            x = condition[:, None] + params["start"] + places[0]
        else:
            inputs = tokenizer.resize_to_scale(f_hat, size)
            x = (F.linear(inputs, **params["input"]) + places[k]).repeat(2, 1, 1)
        both = dense_blocks(params, x, condition, None, caches)
        conditional, unconditional = both.chunk(2)
        t = VAR["guidance"] * k / (len(scales) - 1)
        probability = dense_filtered((1 + t) * conditional - t * unconditional).softmax(-1)
        tokens = torch.multinomial(probability.flatten(0, 1), 1).view(len(labels), -1)
        drawn.append((tokens, both))
        f_hat = f_hat + tokenizer.contribution(codec, tokens, k, scales)
    return [torch.cat(parts, 1) for parts in zip(*drawn)]


def with_null(params, labels):
    """The labels, and as many null classes."""
    return torch.cat([labels, torch.full_like(labels, len(params["classes"]) - 1)])


def dense_filtered(logits):
    """Logits (B, n, codes), -inf where the filters rule a code out."""
    least = logits.topk(VAR["top_k"], sorted=False)[0].amin(-1, keepdim=True)
    logits = logits.masked_fill(logits < least, -torch.inf)
    ascending, order = logits.sort(-1)
    out = ascending.softmax(-1).cumsum_(-1) <= 1 - VAR["top_p"]
    out[..., -1:] = False
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


# ---- train and sample


def training(size, batch, **sizes):
    """Rows of a step of stage one, forward and backward.

    Trees of `init` have exact GELU, published ones its tanh approximation.
    """
    params = trainable(begin(size, **sizes))
    as_published = with_tanh(params)
    lengths = tokenizer.lengths(hmar.scale_sizes(params))
    labels = torch.randint(1000, (batch,), device=DEVICE)
    tokens = torch.randint(4096, (batch, sum(lengths)), device=DEVICE)
    inputs = torch.randn(batch, sum(lengths[1:]), 32, device=DEVICE)
    leaves = pytree.tree_leaves(params)

    def published(mask, autocast=False, params=as_published):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            logits = dense_logits(params, labels, inputs, mask)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(dtype, is_causal, params=params):
        fast = hmar.cast(params, dtype)
        fast = fast | dict(causal={}) if is_causal else fast
        loss = hmar.losses(fast, labels, tokens, inputs).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for is_causal in (False, True):
        mask = dense_mask(lengths, is_causal)
        for tree in (params, as_published):
            given = published(mask, params=tree)
            refuse("ours in fp32", ours(torch.float32, is_causal, tree), given, 1e-3)
    refuse("autocast", published(mask, True), published(mask), 0.1)
    dtype = sample.find_dtype(None, DEVICE)
    contestants = {
        "published, fp32": partial(published, mask),
        "published, bf16 autocast": partial(published, mask, autocast=True),
        "published, bf16 autocast, exact GELU": partial(published, mask, True, params),
        "ours": partial(ours, dtype, is_causal=False),
        "ours, VAR mode": partial(ours, dtype, is_causal=True),
        "ours, published weights": partial(ours, dtype, False, as_published),
    }
    with FakeTensorMode():
        flops = batch * transformer_flops(without_values(params))
    return timed(contestants, 2, flops)


def sampling(size, batch, **sizes):
    """Rows of all tokens of a batch, without the decoder."""
    params = hmar.add_masked_branch(begin(size, **sizes), sizes["depth"] // 2)
    scales = hmar.scale_sizes(params)
    codec = sample.to_device(tokenizer.init(channels=32, multipliers=(1,)), DEVICE)
    labels = torch.arange(batch, device=DEVICE)
    tokens, logits = dense_sample(params, codec, labels)
    inputs = tokenizer.next_scale_inputs(codec, tokens, scales).repeat(2, 1, 1)
    both = with_null(params, labels)
    features = hmar.features(params | dict(causal={}), both, inputs)
    refuse("ours", [hmar.logits(params["next_scale"], features)], [logits], 1e-4)

    fast = hmar.cast(params, sample.find_dtype(None, DEVICE))
    several = sample.published_sampling(params)["schedule"]
    once = [[length] for length in tokenizer.lengths(scales)]
    # autocast keeps the casts of parameters: faster
    published = partial(dense_sample, trainable(with_tanh(params)), codec, labels)

    def ours(schedule, fast=fast):
        options = VAR | dict(schedule=schedule, mask_guidance=0)
        for _ in sample.steps(fast, codec, labels, **options):
            pass

    contestants = {
        "published, fp32": published,
        "published, bf16 autocast": torch.autocast(DEVICE.type, torch.bfloat16)(published),
        f"ours, {sum(map(len, several))} passes": partial(ours, several),
        f"ours, {len(once)} passes": partial(ours, once),
        f"ours, {len(once)} passes, VAR mode": partial(ours, once, fast=fast | dict(causal={})),
        f"ours, {sum(map(len, several))} passes, published weights": partial(
            ours, several, fast=with_tanh(fast)
        ),
    }
    return timed(contestants, 2, 0)


def begin(size, depth, width):
    """A tree of random weights whose blocks, unlike a new tree's, matter to the logits."""
    params = hmar.init(depth=depth, width=width, scales=hmar.SCALES[size], gamma=1.0)
    params["classes"] *= 30
    params["next_scale"]["head"]["weight"] *= 50
    return sample.to_device(params, DEVICE)


def with_tanh(tree):
    """The tree with the published activation in each mlp."""
    if isinstance(tree, list):
        return [with_tanh(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    parts = {key: with_tanh(part) for key, part in tree.items()}
    return parts | dict(mlp=parts["mlp"] | dict(tanh={})) if "mlp" in parts else parts


def trainable(tree):
    """The tree with copies of its leaves as parameters."""
    return pytree.tree_map(lambda leaf: torch.nn.Parameter(leaf.clone()), tree)


# ---- the table of what is measured


def kernel_tests(size, **_):
    """A row of how the kernels' tests end."""
    if size > 256:  # once is enough
        return []
    command = [sys.executable, "-m", "pytest", "-q", "test_attention_kernels.py"]
    command += ["-k", "none_and_many"] * (DEVICE.type == "cpu")  # interpreted, all take long
    options = dict(cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, timeout=200)
    done = subprocess.run(command, check=False, **options)
    *lines, last = done.stdout.splitlines()
    if done.returncode:
        print(*lines, sep="\n")
        sys.exit(last)
    return [("", "", "", "", last)]


def measure(runs, sizes):
    """Prints the table; status 1 where something failed, which the others outlive."""
    began, rows, header = time.monotonic(), [], conditions()
    is_gpu, scales = DEVICE.type == "cuda", hmar.SCALES
    rehearses = kernel_tests in runs and not is_gpu
    if rehearses:
        header = f"REHEARSAL with 30 tokens an image: {header}"
        scales = {size: sides[:4] for size, sides in scales.items()}

    for run, size in itertools.product(runs, sizes):
        work = (1, 2, 256) if rehearses else (*SIZES[size], 512)
        batch, depth, width = (number * (1 + is_gpu) for number in work)
        what = f"{run.__name__}, {batch} x {size} pixels, depth {depth}, width {width}: "
        print(what, file=sys.stderr)
        try:
            if time.monotonic() - began > 480:
                sys.exit("left out after eight minutes")
            with mock.patch.dict(hmar.SCALES, scales):
                part = run(size=size, batch=batch, depth=depth, width=width)
            rows += [(*cells, what + words) for *cells, words in part]
        except (Exception, SystemExit) as error:  # noqa: BLE001
            traceback.print_exc()
            rows.append(("", "", "", "", f"{what}FAILED: {error!r}"))
    print_table(("ms", "x reference", "TFLOP/s", "peak MiB", header), rows)
    return int("FAILED" in str(rows))


# ---- what training takes, counted on tensors without values


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def without_values(trees):
    """Empty tensors of the same shapes; in FakeTensorMode fake ones."""
    return pytree.tree_map(lambda leaf: torch.empty(leaf.shape), trees)


def count_numbers(tree):
    return sum(leaf.numel() for leaf in pytree.tree_leaves(tree))


def tokenizer_flops(codec, size, scales):
    """FLOPs of an image in the tokenizer's stage, and of one that is encoded."""
    codec, count = trainable(codec), train.COARSE_EVERY  # images, one of them coarse
    images = torch.empty(count, 3, size, size)

    def step():
        given = codec, images, scales, *torch.tensor([[0], [0]])
        tokenizer.training_loss(*given, hue_variance=0.1)["loss"].backward()

    works = step, lambda: tokenizer.encode_features(codec, images)
    return [count_flops(work) // count for work in works]


def transformer_flops(params):
    """FLOPs of an image in the stage of a tree's last branch; a mask hides half of its tokens."""
    name = "masked" if "masked" in params else "next_scale"
    lengths = tokenizer.lengths(hmar.scale_sizes(params))
    later = sum(lengths[1:])
    width, code_dim = params["input"]["weight"].shape[:2]
    params = params | trainable(learning(params))
    labels, inputs = torch.tensor([0]), torch.empty(1, later, code_dim)
    own = (inputs, torch.ones(1, later, dtype=torch.bool)) if name == "masked" else ()

    def step():
        x = hmar.features(params, labels, inputs, *own)[0]
        if own:  # the head runs on what is hidden
            x = x.index_select(0, torch.arange(later // 2))
        hmar.logits(params[name], x, labels.new_zeros(len(x), 6)).sum().backward()

    with mock.patch.object(attention_kernels, "INTERPRETED", True):  # not the CPU's path
        flops = count_flops(step)
    blocks = len(params["trunk"] + params[name]["blocks"])
    return flops + 12 * width * sum(n**2 for n in lengths) * blocks  # attention's six products


def learning(params):
    """The part of a tree that its last branch's stage trains."""
    return dict(masked=params["masked"]) if "masked" in params else params


def optimizer_flops(tree):
    """FLOPs of Muon's step."""
    tree = trainable(tree)
    for leaf in pytree.tree_leaves(tree):
        leaf.grad = torch.zeros_like(leaf)
    return count_flops(train.new_optimizers(tree, 0)[0].step)


def imagenet(depth, size):
    """The settings of a run on ImageNet, with its number of classes."""
    return train.recipe(depth, size, 1_281_167, classes=1000) | dict(classes=1000)


COSTS = """\
Computed, on ImageNet: tokenizer with its decoder's / next-scale / masked stage. EFLOP; \
parameters in millions; hours at 66 TFLOP/s, 40 % of a 24 GB card, 12 bytes a parameter exchanged \
at 24 GB/s; no evaluations.
"""


def print_costs(depths):
    rows = []
    for depth in depths:
        size = 64 if depth < 8 else 256
        recipe = imagenet(depth, size)
        batch, scales = recipe["batch"], recipe["scales"]
        # The decoder's stage counts as steps of the tokenizer, which take a little longer.
        stages = "tokenizer", "next_scale", "masked"
        steps = [recipe[f"{stage}_steps"] for stage in stages]
        steps[0] += recipe["decoder_steps"]
        with torch.device("meta"):
            codec = tokenizer.init(**train.arguments(tokenizer.init, recipe))
            params = hmar.init(**train.arguments(hmar.init, recipe))
            masked = hmar.add_masked_branch(params, recipe["masked_blocks"])
        with FakeTensorMode():
            codec, params, masked = without_values((codec, params, masked))
            first, encoding = tokenizer_flops(codec, size, scales)
            flops = (
                first,
                encoding + transformer_flops(params),
                encoding + transformer_flops(masked),
            )
            trees = codec, params, learning(masked)
            muon = [optimizer_flops(tree) for tree in trees]

        totals = [n * (batch * x + y) for n, x, y in zip(steps, flops, muon, strict=True)]
        hours = []
        for gpus in 1, 8:  # each takes a share of the batch, and Muon's whole step
            work = sum(n * (batch / gpus * x + y) for n, x, y in zip(steps, flops, muon))
            numbers = sum(n * count_numbers(tree) for n, tree in zip(steps, trees))
            seconds = work / 66e12 + 12 * numbers * (gpus - 1) / gpus / 24e9
            hours.append(seconds / 3600)
        cells = [[n / 1e3 for n in steps], [total / 1e18 for total in totals]]
        cells.append([count_numbers(tree) / 1e6 for tree in (codec, params, masked)])
        cells = [" / ".join(f"{x:.3g}" for x in cell) for cell in cells]
        rows.append((depth, batch, *cells, *hours, f"{size} pixels"))

    header = ("depth", "batch", "thousand steps", "EFLOP", "parameters", "hours", "on 8", "of")
    print(COSTS)
    print_table(header, rows)


# ---- what a GPU would wait for, and hold, counted without one


class Launches(TorchDispatchMode):
    """Counts operators that compute (each is a kernel or more) and copies that Python waits for."""

    FREE = "aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "prim"
    FREE += ("aten.promote_types",)

    def __enter__(self):
        self.count, self.waited_for = 0, []
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        returns = [x.alias_info for x in operator._schema.returns]
        is_view = any(alias and not alias.is_write for alias in returns)
        self.count += not is_view and not str(operator).startswith(self.FREE)
        if str(operator).startswith(("aten._to_copy", "aten.copy_")):
            *_, source = args[:2]
            is_sent = source.is_cpu and not result.is_cpu
            if is_sent and not (args[2:] or (kwargs or {}).get("non_blocking")):
                self.waited_for.append(tuple(source.shape))
        return result


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass of function()."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    return sum(storage.nbytes() for storage in kept.values()) if result.requires_grad else 0


def stage_losses(recipe, size, dtype):
    """{stage: (tree that it trains, loss of so many images)}, on zeros or fake tensors."""
    scales, first = recipe["scales"], recipe["scales"][0][0] ** 2
    tokens = sum(tokenizer.lengths(scales))
    with torch.device("meta"):
        codec = tokenizer.init(**train.arguments(tokenizer.init, recipe))
        params = hmar.init(**train.arguments(hmar.init, recipe))
        masked = hmar.add_masked_branch(params, recipe["masked_blocks"])
    codec, params, masked = (
        pytree.tree_map(lambda leaf: torch.zeros(leaf.shape), tree)
        for tree in (codec, params, masked)
    )
    weights = torch.zeros(tokens)

    def first_loss(tree, count, loss):
        images, coarse = torch.zeros(count, 3, size, size), torch.zeros(count // 4).long()
        cast = tokenizer.cast(tree, dtype)
        options = dict(images_per_coarse=4.0, hue_variance=0.1)
        return loss(cast, images, scales, coarse, coarse, **options)["loss"]

    def second_loss(tree, count, loss):
        fast = hmar.cast(params | tree if "trunk" in tree else masked | tree, dtype)
        batch = torch.zeros(count).long(), torch.zeros(count, tokens).long()
        if "trunk" not in tree:  # half of the tokens are hidden
            batch += (torch.zeros(count, tokens - first, dtype=torch.bool),)
        return loss(fast, codec, weights, *batch)["loss"]

    return {
        "tokenizer": (trainable(codec), first_loss, tokenizer.training_loss),
        "next-scale": (trainable(params), second_loss, train.transformer_loss),
        "masked": (trainable(learning(masked)), second_loss, train.transformer_loss),
    }


@contextlib.contextmanager
def without_a_device():
    """Fake tensors; half of each mask is True."""

    def positions(mask):  # which fake tensors cannot tell
        return torch.zeros(mask.numel() // 2, mask.ndim, dtype=torch.int64)

    nonzero = mock.patch.object(torch.Tensor, "nonzero", positions)
    kernels = mock.patch.object(attention_kernels, "INTERPRETED", True)  # not the CPU's path
    with FakeTensorMode(), nonzero, kernels:
        yield


def image_bytes(depth, size, dtype, **changes):
    """{stage: bytes that autograd keeps of an image}."""
    recipe, found = imagenet(depth, size) | changes, {}
    with without_a_device():
        for stage, (tree, loss, function) in stage_losses(recipe, size, dtype).items():
            few, many = (saved_bytes(partial(loss, tree, n, function)) for n in (4, 8))
            found[stage] = (many - few) // 4
    return found


def count_launches(depth, size):
    """{stage: operators of a micro-batch of 8 images, forward and backward}."""
    recipe, found = imagenet(depth, size), {}
    with without_a_device():
        for stage, (tree, loss, function) in stage_losses(recipe, size, torch.bfloat16).items():
            with Launches() as launches:
                loss(tree, 8, function).backward()
            found[stage] = launches.count
    return found


def host_times(depth, size):
    """{stage: process ms of a micro-batch with next to no work: mostly Python's and torch's}."""
    recipe, found = imagenet(depth, size), {}
    scales = ((1, 1),) * (len(recipe["scales"]) - 1) + ((2, 2),)
    recipe |= dict(scales=scales, channels=32, codes=16, width=64)
    size = 2 * recipe["fold"] * 2 ** (len(recipe["multipliers"]) - 1)

    def attend(query, key, value, *_, scale):  # one operator, as with the kernels
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    with mock.patch.object(hmar, "block_sparse_attention", attend):
        for stage, (tree, loss, function) in stage_losses(recipe, size, torch.float32).items():
            times = []
            for _ in range(6):
                begun = time.process_time()
                loss(tree, 4, function).backward()
                times.append(1e3 * (time.process_time() - begun))
            found[stage] = min(times)
    return found


def waits_of_loops():
    """{stage: (steps that began, shapes of copies that Python waited for)} of each loop.

    They run on meta tensors, of which no number can be read: to try it raises. So a loop that gets
    to step 4, where numbers are printed here, has not waited for one. The masked stage stops in its
    first step, where the number of hidden tokens is read. Codes are replaced in steps 1 and 3.
    torch's fused AdamW is left out, which has no form for meta tensors.
    """
    codec = tokenizer.init(codes=16, code_dim=8, channels=32, multipliers=(1, 1), residual_blocks=1)
    scales = (1, 1), (2, 2), (4, 4)
    params = hmar.init(depth=2, classes=3, codes=16, code_dim=8, scales=scales, neighbours=True)
    images, labels = torch.zeros(8, 3, 8, 8).byte(), torch.zeros(8).long()
    tokens = torch.zeros(8, 21).long()
    settings = train.recipe(2, 8, 100, 3) | dict(scales=scales, dropout=0.1, evaluations=1)
    settings |= dict(micro_batch=8, dtype="bf16")
    place = dict(settings=settings, device="meta")
    transformer = dict(codec=codec, held_out=(labels, tokens), **place)
    loops = {
        "tokenizer": partial(
            train.train_tokenizer, codec, held_out=images, terms=dict(hue_variance=0.1), **place
        ),
        "next-scale": partial(train.train_transformer, params, **transformer),
        "masked": partial(train.train_transformer, hmar.add_masked_branch(params), **transformer),
    }
    adamw, found = torch.optim.AdamW, {}

    def batches(stage, launches):
        batch = (images, labels) if stage == "tokenizer" else (labels, tokens)
        batch = [part.to("meta") for part in batch]
        for step in itertools.count(1):
            if step == 1:
                launches.waited_for.clear()  # of what comes before the loop
            found[stage] = step, launches.waited_for
            yield batch

    with contextlib.ExitStack() as stack:
        patch = partial(stack.enter_context)
        patch(mock.patch.object(torch.optim, "AdamW", lambda x, fused, **more: adamw(x, **more)))
        patch(mock.patch.multiple(train, LOG_EVERY=4, REVIVE_EVERY=3, log=lambda line: None))
        # which does not know meta tensors
        patch(mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()))
        for stage, loop in loops.items():
            with Launches() as launches, contextlib.suppress(RuntimeError):
                loop(batches=batches(stage, launches))
    return found


def state_bytes(depth):
    """{what: bytes a parameter on the device} of the next-scale stage."""
    recipe = imagenet(depth, 256)
    with FakeTensorMode():
        tree, _, _ = stage_losses(recipe, 256, torch.bfloat16)["next-scale"]
        optimizers = train.new_optimizers(tree, 0.0)
        for leaf in pytree.tree_leaves(tree):
            leaf.grad = torch.zeros_like(leaf)
        parts = dict(weights=tree, gradients=[leaf.grad for leaf in pytree.tree_leaves(tree)])
        train.optimizer_step(optimizers, 1e-3)
        parts["cast"] = hmar.cast(tree, torch.bfloat16)
        parts["momenta"] = [list(x.state.values()) for x in optimizers]
        total = count_numbers(tree)
        known, found = set(), {}
        for name, part in parts.items():
            leaves = [x for x in pytree.tree_leaves(part) if torch.is_tensor(x)]
            fresh = [x for x in leaves if id(x) not in known]
            known |= {id(x) for x in leaves}
            found[name] = sum(x.numel() * x.itemsize for x in fresh) / total
    return found


def print_counts(depth, size):
    """What a GPU of eight takes and waits for, by stage."""
    recipe = imagenet(depth, size)
    batch = recipe["batch"] // 8  # images of a process, which pass the networks together
    print(f"Depth {depth}, {size} pixels, {batch} images a step in each of eight processes.\n")
    launches, waits = count_launches(depth, size), waits_of_loops()
    narrow, wide = (image_bytes(depth, size, dtype) for dtype in (torch.bfloat16, torch.float32))
    times = host_times(depth, size)
    rows = []
    for stage, count in launches.items():
        mib = [kept[stage] / 2**20 for kept in (narrow, wide)]
        gib = batch * mib[0] / 2**10
        copies = f"{len(waits[stage][1])} in {waits[stage][0]} steps"
        rows.append((count, *mib, gib, copies, times[stage], stage))
    words = "operators of a micro-batch", "MiB an image: bf16", "fp32", "GiB of all in bf16"
    words += "copies waited for", "ms with next to no work"
    print_table((*words, "stage"), rows)
    print("\nOf these copies, the tokenizer's are of the numbers of dead codes, in two steps of 4.")
    print("Bytes a parameter in the next-scale stage:", end=" ")
    print(", ".join(f"{name} {number:.2f}" for name, number in state_bytes(depth).items()))


# ---- a rehearsal of several GPUs: processes on this CPU, of which some are killed

REHEARSED = dict(width=384, channels=32)  # instead of 1,024 and 160


def rehearse(photos, out):
    """Trains depth 16 at 256 pixels for two steps a stage; prints the peak of memory by stage.

    Four processes; one is killed in the tokenizer's stage, one in the next-scale stage, and two go
    on. The decoder's stage is not counted: it keeps less than the tokenizer's.
    """
    flags = ["train.py", "--data", photos, "--out", out, "--depth=16", "--size=256", "--steps=2"]
    flags += ["--batch=8", "--dtype=fp32", "--device=cpu", "--set"]
    flags += [f"{name}={value}" for name, value in REHEARSED.items()]
    counted = image_bytes(16, 256, torch.float32, **REHEARSED)
    rows = []
    for processes, killed_in in ((4, "tokenizer"), (4, "next-scale"), (2, None)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", *flags]
        where = dict(cwd=Path(__file__).resolve().parent.parent, stdout=subprocess.PIPE, text=True)
        torchrun = subprocess.Popen(command, **where)
        peaks, stages = {}, ["start"]
        watcher = threading.Thread(target=watch_memory, args=(torchrun, stages, peaks))
        watcher.start()
        for line in torchrun.stdout:
            print(line, end="", flush=True)
            found = re.match(r"(tokenizer|decoder|next-scale|masked): .* M parameters", line)
            stages += [found[1]] if found else []
            if killed_in and line.startswith(f"{killed_in} 2/2"):  # step 1 is saved by now
                os.kill(workers_of(torchrun)[-1], signal.SIGKILL)
        torchrun.wait()
        watcher.join()
        print(f"{processes} processes ended with status {torchrun.returncode}", flush=True)
        for stage, (one, all_of_them) in peaks.items():
            kept = 8 // processes * counted.get(stage, 0) / 2**30
            rows.append((processes, one / 2**20, all_of_them / 2**20, kept, stage))
    header = "processes", "GiB of one", "of all", "counted for images of one", "peak in the stage"
    print_table(header, rows)


def workers_of(process):
    """The numbers of the processes that a process has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def watch_memory(process, stages, peaks):
    """Keeps in peaks {stage: (largest KiB of a worker, of all together)}, without mapped files."""
    while process.poll() is None:
        sizes = [0]
        for worker in workers_of(process):
            with contextlib.suppress(OSError, TypeError):
                text = Path(f"/proc/{worker}/status").read_text()
                sizes.append(int(re.search(r"RssAnon:\s+(\d+)", text)[1]))
        before = peaks.get(stages[-1], (0, 0))
        peaks[stages[-1]] = max(before[0], *sizes), max(before[1], sum(sizes))
        time.sleep(0.2)


# ---- the kernels


def print_kernels(head_dims):
    """What the kernels compile to; needs no GPU."""
    from test_attention_kernels import compile_kernels

    # threads and KiB of an SM, one of which each block loses
    limits = {80: (2048, 164), 89: (1536, 100), 90: (2048, 228), 100: (2048, 228), 120: (1536, 100)}
    names = ("rows", "columns", "warps", "registers", "spills", "shared")
    rows = []
    for architecture, head_dim in itertools.product(limits, head_dims):
        threads, shared = limits[architecture]
        for kernel in compile_kernels(architecture, "bfloat16", head_dim):
            registers = math.ceil(kernel["registers"] / 8) * 8  # of a thread
            bounds = [2**16 // registers, threads]
            bounds = [bound // (32 * kernel["warps"]) for bound in bounds]
            bounds.append(shared * 1024 // (kernel["shared"] + 1024))
            if kernel["tensor_memory"]:
                bounds.append(512 // kernel["tensor_memory"])
            numbers = (kernel[name] for name in names)
            name = kernel["kernel"].strip("_")
            rows.append((architecture / 10, head_dim, *numbers, min(bounds), name))

    print(f"Triton {attention_kernels.triton.__version__}, bf16\n")
    header = ("architecture", "head_dim", *names, "blocks an SM", "kernel")
    print_table(header, dict.fromkeys(rows))


# ---- the command


def main(argv=None):
    global DEVICE
    runs = dict(attention=[attention], train=[training], sample=[sampling])
    runs["gpu"] = [kernel_tests, attention, training, sampling]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=(*runs, "cost", "count", "rehearse", "kernels"))
    add("folders", nargs="*", help="rehearse's: photographs, and a run folder")
    add("--size", type=int, choices=SIZES, nargs="+", help="pixels")
    add("--device", type=torch.device, default=DEVICE)
    add(
        "--depth",
        type=int,
        nargs="+",
        default=[2, 3, 4, 6, 8, 12, 16, 20, 24, 30],
        help="of cost and count",
    )
    add("--head-dim", type=int, nargs="+", default=[64, 128], help="kernels'")

    arguments = parser.parse_args(argv)
    DEVICE = arguments.device
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as the commands have it
    sample.keep_freed_memory()  # as the commands do, for both ways
    if arguments.command == "cost":
        return print_costs(arguments.depth)
    if arguments.command == "count":
        size = (arguments.size or [256])[0]
        return print_counts(arguments.depth[0], size)
    if arguments.command == "rehearse":
        return rehearse(*arguments.folders)
    if arguments.command == "kernels":
        return print_kernels(arguments.head_dim)
    sizes = SIZES if arguments.command == "gpu" else [256]
    return measure(runs[arguments.command], arguments.size or sizes)


if __name__ == "__main__":
    sys.exit(main())
