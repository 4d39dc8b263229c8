"""Benchmarks. `python tests/benchmark.py attention` times the attention of a training step, with `--count` it counts the kernels' work.

`train`, `sample` and `tokenizer` time the library against the published way, a dense fp32 reference below, and print no time where the two
disagree; `curves` trains twice, in bf16 and fp32; `cost` computes what training takes and times nothing. Every other run prints its
conditions first. Times are medians of rounds in which the contestants take turns, so that a busy machine is fair.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_kernels
import hmar
import sample
import tokenizer
import train
from attention_kernels import block_sparse_attention

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
PEAK = dict(
    A100=312, H100=989, H200=989, B200=2250
)  # dense bf16 TFLOP/s of the SXM cards, by the makers' data sheets
KERNELS = ("forward", "dQ", "dK/dV")


def print_conditions(device, dtype):
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    triton = getattr(attention_kernels.triton, "__version__", "none")
    print(
        f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Triton {triton}, {dtype}\n"
    )


def print_table(header, rows):
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [
        [
            f"{x:,.2f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
            for x in row
        ]
        for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def alternating_medians(contestants, device, rounds=15, warmup=3):
    """{name: median seconds of a call}, the functions of {name: function} being called in turns."""
    times = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, function in contestants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def scale_lengths():
    """The tokens of each scale at 256, 512 and 1024 pixels: 680, 2240 and 9451 together."""
    return [tuple(height * width for height, width in scales) for scales in hmar.SCALES.values()]


def exact_elements(lengths, is_causal):
    """Scores that the pattern needs, of one head."""
    return sum(
        n * stop if is_causal else n * n
        for n, stop in zip(lengths, itertools.accumulate(lengths), strict=True)
    )


def kernel_count(lengths, is_causal, which, rows, columns, head_dim, size):
    """Score elements that a kernel computes and bytes that it asks of memory (caches included) for one head: (elements, read, written)."""
    tiles, _ = attention_kernels.tile_table(lengths, is_causal, which == 2, rows, columns)
    elements = read = written = 0
    for start, stop, full_begin, full_stop, masked_begin, masked_stop in tiles.tolist():
        full, masked = full_stop - full_begin, masked_stop - masked_begin
        step = max(16, columns // 2)  # with a mask
        elements += rows * (full + math.ceil(masked / step) * step)
        # a row's vectors and statistics, and what the table says of it; two vectors a column, with two statistics if it is a query
        row_vectors, row_numbers = ((1, 2), (3, 3), (2, 2))[which]
        read += (stop - start) * (row_vectors * head_dim * size + row_numbers * 4) + 24
        read += (full + masked) * (2 * head_dim * size + (8 if which == 2 else 0))
        written += (stop - start) * (
            head_dim * size * (2 if which == 2 else 1) + (0 if which == 2 else 4)
        )
    return elements, read, written


def least_bytes(tokens, which, head_dim, size):
    """Bytes that must be read and written if every vector and statistic is, once."""
    vectors, numbers = ((4, 1), (6, 2), (6, 2))[which]
    return tokens * (vectors * head_dim * size + numbers * 4)


def attention_count(head_dim, dtype, device):
    """The table of work and traffic of one head, for the tiles of this card, or without one of 9.0."""
    architecture = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    rows = []
    for lengths, is_causal, which in itertools.product(scale_lengths(), (False, True), range(3)):
        constants = attention_kernels._constants(which, head_dim, dtype, architecture)
        elements, read, written = kernel_count(
            lengths,
            is_causal,
            which,
            constants["ROWS"],
            constants["COLUMNS"],
            head_dim,
            dtype.itemsize,
        )
        exact, least = (
            exact_elements(lengths, is_causal),
            least_bytes(sum(lengths), which, head_dim, dtype.itemsize),
        )
        rows.append(
            (
                f"{sum(lengths)} {'causal' if is_causal else 'diagonal'} {KERNELS[which]}",
                elements,
                exact,
                elements / exact,
                exact / sum(lengths) ** 2,
                read,
                written,
                least,
                (read + written) / least,
            )
        )
    print(
        f"one head of {head_dim}, tiles of architecture {architecture}; bytes are what programs ask for, from whichever cache\n"
    )
    print_table(
        (
            "tokens, pattern, kernel",
            "scores",
            "exact",
            "ratio",
            "of dense",
            "read",
            "written",
            "least",
            "ratio",
        ),
        rows,
    )


def training_step(attention, query, key, value, output_gradient):
    """Output and gradients of (batch, heads, tokens, head_dim) views of one qkv tensor."""
    output = attention(query, key, value)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), output_gradient)


def agree(results, expected, dtype):
    pairs = zip(results, expected, strict=True)
    return all(
        (a.float() - b.float()).abs().max() <= 16 * torch.finfo(dtype).eps * b.abs().max()
        for a, b in pairs
    )


def attention_contestants(lengths, is_causal, dtype, device):
    """{name: attention(query, key, value)} of the same pattern, the dense one first."""
    block = torch.repeat_interleave(torch.tensor(lengths, device=device))
    seen = block[:, None] >= block if is_causal else block[:, None] == block
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)
    contestants = {
        "SDPA, dense mask": functools.partial(F.scaled_dot_product_attention, attn_mask=mask),
        "block-sparse": lambda *qkv: block_sparse_attention(*qkv, lengths, is_causal),
    }
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch, head, row, column):
            return block[row] >= block[column] if is_causal else block[row] == block[column]

        flex = torch.compile(flex_attention)
        blocks = create_block_mask(visible, None, None, len(block), len(block), device=device)
        contestants["FlexAttention"] = lambda *qkv: flex(*qkv, block_mask=blocks)
        if not is_causal and dtype != torch.float32:  # its keys cannot be a prefix
            contestants["varlen attention"] = functools.partial(variable_length_attention, lengths)
    return contestants


def variable_length_attention(lengths, query, key, value):
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    batch, heads, tokens, head_dim = query.shape
    edges = torch.tensor(
        [0, *itertools.accumulate(lengths * batch)], dtype=torch.int32, device=query.device
    )
    packed = (
        x.transpose(1, 2).reshape(batch * tokens, heads, head_dim) for x in (query, key, value)
    )
    return (
        varlen_attn(*packed, edges, edges, max(lengths), max(lengths))
        .view(batch, tokens, heads, head_dim)
        .transpose(1, 2)
    )


def attention(arguments):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[arguments.dtype or ("bf16" if device == "cuda" or arguments.count else "fp32")]
    batch, heads, head_dim = arguments.batch, arguments.heads, arguments.head_dim
    print_conditions(device, dtype)
    if arguments.count:
        return attention_count(head_dim, dtype, device)
    card = torch.cuda.get_device_name() if device == "cuda" and dtype != torch.float32 else ""
    peak = next((tflops for name, tflops in PEAK.items() if name in card), None)
    rows, all_agree = [], True
    for lengths, is_causal in itertools.product(
        scale_lengths() if device == "cuda" else scale_lengths()[:1], (False, True)
    ):
        qkv = torch.randn(batch, sum(lengths), 3, heads, head_dim, device=device).to(dtype)
        tensors = [x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
        output_gradient = (
            torch.randn(batch, sum(lengths), heads, head_dim, device=device)
            .to(dtype)
            .transpose(1, 2)
        )
        contestants = attention_contestants(lengths, is_causal, dtype, device)
        steps = {
            name: functools.partial(training_step, function, *tensors, output_gradient)
            for name, function in contestants.items()
        }
        agreeing = [
            name for name in steps if agree(steps[name](), steps["SDPA, dense mask"](), dtype)
        ]
        with torch.no_grad():
            forward = alternating_medians(
                {name: functools.partial(contestants[name], *tensors) for name in agreeing}, device
            )
        both = alternating_medians({name: steps[name] for name in agreeing}, device)
        tera = (
            14e-12 * head_dim * exact_elements(lengths, is_causal) * batch * heads
        )  # two products forward, five backward
        for name in contestants:
            label = f"{sum(lengths)} {'causal' if is_causal else 'diagonal'} {name}"
            if name in agreeing:
                rate, times = tera / both[name], both["SDPA, dense mask"] / both[name]
                rows.append(
                    (
                        label,
                        forward[name] * 1e3,
                        both[name] * 1e3,
                        times,
                        rate,
                        f"{rate / peak:.1%}" if peak else "-",
                    )
                )
            else:
                rows.append((label, *["disagrees"] * 5))
                all_agree = False
    print(f"batch {batch}, {heads} heads of {head_dim}\n")
    print_table(
        (
            "tokens, pattern, attention",
            "forward ms",
            "+ backward ms",
            "x dense",
            "TFLOP/s",
            "of peak",
        ),
        rows,
    )
    return (
        0
        if all_agree
        else "some results disagree with dense attention: no time is printed for them"
    )


def peak_memory(function, device):
    """MiB at the peak of a call above what lay there before it; nan where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return math.nan

    def status(name):
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        return int(line.split()[1]) / 2**10

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = status("VmRSS:")
    function()
    return status("VmHWM:") - before


def best_products(dtypes, device):
    """{dtype: the most FLOP/s that a large product reaches}."""
    best = {}
    for dtype, (m, k, n) in itertools.product(
        dtypes, ((2048, 2048, 2048), (8192, 1024, 1024), (4096, 512, 2048))
    ):
        a, b = (
            torch.randn(m, k, device=device).to(dtype),
            torch.randn(k, n, device=device).to(dtype),
        )
        for _ in range(5):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            best[dtype] = max(best.get(dtype, 0), 2 * m * k * n / (time.perf_counter() - start))
    return best


def product_flops(function):
    """FLOPs of a call's products of weights (linear layers, convolutions); attention's own are counted by `exact_elements`."""
    with FlopCounterMode(display=False) as counter:
        function()
    return sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if "bmm" not in str(op) and "attention" not in str(op)
    )


def step_flops(step, batch, width, depth, elements):
    """FLOPs of a training step, forward and backward: its products of weights, and attention's six, two of them forward, of `elements`
    scores a head.
    """
    return product_flops(step) + 12 * batch * width * elements * depth


def saved_bytes(function, weights):
    """Bytes that the backward pass of a call waits for, each storage once, without those of `weights`."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    for tensor in weights:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def staged(params):
    """`trained` as in the masked stage if the tree has a masked branch, else as in stage one."""
    return trained(params, lambda name: name.startswith("masked") == ("masked" in params))


def traced(params):
    """(3,): FLOPs of one image's training step of a tree without data, and bytes that it keeps, plain and with checkpointing; on a GPU, in
    bf16, half of the tokens being hidden where there is a masked branch.

    It runs the library's own code on tensors that are shapes alone.
    """
    lengths, branch = (
        tokenizer.lengths(hmar.scales(params)),
        "masked" if "masked" in params else "next_scale",
    )
    later, (width, code_dim) = sum(lengths[1:]), params["input"]["weight"].shape
    with (
        FakeTensorMode(),
        mock.patch.object(attention_kernels, "INTERPRETED", True),
    ):  # the kernels' operators, not the CPU's path
        params, leaves = staged(pytree.tree_map(lambda tensor: torch.empty(tensor.shape), params))
        fast, labels, inputs = (
            hmar.cast(params, torch.bfloat16),
            torch.tensor([0]),
            torch.empty(1, later, code_dim),
        )

        def logits(checkpointing=False):  # the loss has no products, and keeps but a slice of them
            if branch == "next_scale":
                x = hmar.next_scale_features(fast, labels, inputs, checkpointing=checkpointing)
            else:
                mask, hidden = torch.ones(1, later, dtype=torch.bool), torch.arange(later // 2)
                x = hmar.masked_features(
                    fast, labels, inputs, inputs, mask, checkpointing=checkpointing
                )
                x = x[:, lengths[0] :].flatten(0, 1).index_select(0, hidden)
            return hmar.logits(x, **fast[branch]["head"])

        blocks, weights = (
            len(params["trunk"] + params[branch]["blocks"]),
            pytree.tree_leaves((params, fast)),
        )
        flops = step_flops(
            lambda: torch.autograd.grad(logits().sum(), leaves),
            1,
            width,
            blocks,
            exact_elements(lengths, False),
        )
        kept = [
            saved_bytes(functools.partial(logits, checkpointing), weights)
            for checkpointing in (False, True)
        ]
    return torch.tensor([flops, *kept], dtype=torch.float64)


def cost(depth, scales, masked_blocks=0, **sizes):
    """What a training step costs, computed and not measured: {name: number}. masked_blocks: 0, stage one; else the masked stage.

    parameters; flops, of an image, forward and backward, without what is computed again; optimizer: bytes of the weights, and of gradients,
    AdamW's moments and the moving average of those that are trained, in fp32; activations: bytes an image that the backward pass waits for,
    as `traced` has it; checkpointed: the same with checkpointing, and a block that is computed again. sizes: as for hmar.init.
    """

    def tree(trunk, branch):
        with torch.device("meta"):
            params = hmar.init(
                depth=trunk + branch, scales=scales, **dict(width=64 * depth) | sizes
            )
            return hmar.add_masked_branch(params, branch) if branch else params

    branch, params = min(1, masked_blocks), tree(depth - masked_blocks, masked_blocks)
    parameters, trainable = (
        sum(map(torch.numel, leaves)) for leaves in (pytree.tree_leaves(params), staged(params)[1])
    )
    one = traced(tree(1, branch))
    trunk_block = traced(tree(2, branch)) - one  # every block costs alike
    branch_block = traced(tree(1, 2)) - one if branch else trunk_block
    flops, plain, checkpointed = (
        one + (depth - masked_blocks - 1) * trunk_block + (masked_blocks - branch) * branch_block
    )
    return dict(
        parameters=parameters,
        flops=int(flops),
        optimizer=4 * parameters + 16 * trainable,
        activations=int(plain),
        checkpointed=int(checkpointed + branch_block[1] - branch_block[2]),
    )


def tokenizer_cost(size, scales, **sizes):
    """`cost` of a training step of the tokenizer in bf16, its adversarial loss apart. sizes: as for tokenizer.init."""
    with FakeTensorMode():
        params, leaves = trained(tokenizer.init(**sizes), lambda name: True)
        fast, images = tokenizer.cast(params, torch.bfloat16), torch.empty(1, 3, size, size)

        def losses():
            made, loss, _, _ = tokenizer.training_pass(fast, images, scales)
            return made.sum() + loss

        with FlopCounterMode(display=False) as counter:
            losses().backward()
        activations = saved_bytes(losses, pytree.tree_leaves((params, fast)))
    parameters = sum(map(torch.numel, leaves))
    return dict(
        parameters=parameters,
        flops=counter.get_total_flops(),
        optimizer=20 * parameters,
        activations=activations,
    )


def dense_logits(params, labels, inputs, mask=None, own=None, only=None, caches=None):
    """Logits (B, L, V) the published way: fp32, one additive mask (L, L), the head on every token; or scale `only`, with growing caches.

    own: (own_inputs, hidden) of the masked branch. caches: a list [keys, values] a block, which the scale is added to.
    """
    branch, condition = params["masked" if own else "next_scale"], params["classes"][labels]
    x = condition[:, None] + params["start"]
    if only != 0:
        later = F.linear(inputs, **params["input"])
        if own:
            later = later + torch.where(
                own[1][..., None], branch["mask_embedding"], F.linear(own[0], branch["own_input"])
            )
        x = torch.cat([x, later], 1) if only is None else later
    places = [
        position.flatten(0, 1) + level
        for position, level in zip(params["positions"], params["levels"])
    ]
    x = x + (torch.cat(places) if only is None else places[only])
    for i, block in enumerate(params["trunk"] + branch["blocks"]):
        x = dense_block(x, condition, mask, None if caches is None else caches[i], **block)
    scale, shift = F.linear(F.silu(condition), **branch["modulation"])[:, None].chunk(2, -1)
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, **branch["head"])


def dense_block(x, condition, mask, cache, modulation, attention, mlp):
    gamma1, gamma2, scale1, scale2, shift1, shift2 = F.linear(F.silu(condition), **modulation)[
        :, None
    ].chunk(6, -1)
    x = x + gamma1 * dense_self_attention(
        F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1, mask, cache, **attention
    )
    h = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2, **mlp["expand"])
    return x + gamma2 * F.linear(F.gelu(h, approximate="tanh"), **mlp["contract"])


def dense_self_attention(x, mask, cache, qkv, q_bias, v_bias, scale, project):
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = (
        F.linear(x, qkv, bias).unflatten(-1, (3, len(scale), -1)).permute(2, 0, 3, 1, 4)
    )  # (B, heads, L, head_dim) each
    q, k = (
        F.normalize(q, dim=-1) * scale.clamp(max=math.log(100)).exp()[:, None, None],
        F.normalize(k, dim=-1),
    )
    if cache is not None:
        cache[:] = k, v = [
            torch.cat([*old, new], 2) for old, new in zip((cache[:1], cache[1:]), (k, v))
        ]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return F.linear(out.transpose(1, 2).flatten(2), **project)


def dense_mask(lengths, is_causal, device):
    """(L, L) fp32: 0 where a token sees another, -inf elsewhere."""
    block = torch.repeat_interleave(torch.tensor(lengths, device=device))
    seen = block[:, None] >= block if is_causal else block[:, None] == block
    return torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)


@torch.no_grad()
def dense_sample(params, tokenizer_params, labels, guidance=1.5):
    """Tokens (B, L) drawn by VAR as published: a doubled batch at every scale, with a cache of keys and values."""
    scales, f_hat, drawn = hmar.scales(params), 0, []
    both = torch.cat([labels, torch.full_like(labels, len(params["classes"]) - 1)])
    caches = [[] for _ in params["trunk"] + params["next_scale"]["blocks"]]
    for k, size in enumerate(scales):
        inputs = tokenizer.resize_to_scale(f_hat, size).repeat(2, 1, 1) if k else None
        conditional, unconditional = dense_logits(
            params, both, inputs, only=k, caches=caches
        ).chunk(2)
        t = guidance * k / (len(scales) - 1)
        probability = ((1 + t) * conditional - t * unconditional).softmax(-1)
        drawn.append(torch.multinomial(probability.flatten(0, 1), 1).view(len(labels), -1))
        codes = F.embedding(drawn[-1], tokenizer_params["codebook"])
        f_hat = f_hat + tokenizer.contribution(tokenizer_params["phi"], codes, k, scales)
    return torch.cat(drawn, 1)


def model(depth, scales, device, masked_blocks=None):
    """A tree of random weights with a masked branch, whose blocks, unlike those of a new tree, matter to the logits."""
    params = hmar.init(depth=depth, width=512, codes=4096, scales=scales, gamma=1.0)
    params["classes"] *= 30
    params["next_scale"]["head"]["weight"] *= 50
    params = hmar.add_masked_branch(params, masked_blocks or max(1, depth // 2))
    params["masked"]["own_input"].mul_(-1)  # else nothing tells the two sums apart
    return pytree.tree_map(lambda tensor: tensor.to(device), params)


def training_batch(params, batch, device):
    """(labels, tokens, inputs, own_inputs, hidden), random; a share of a tenth to nine tenths hidden."""
    generator = torch.Generator().manual_seed(0)
    total, first = sum(h * w for h, w in hmar.scales(params)), len(params["start"])
    labels, tokens = (
        torch.randint(n, shape, generator=generator)
        for n, shape in ((1000, (batch,)), (4096, (batch, total)))
    )
    inputs, own = torch.randn(
        2, batch, total - first, params["input"]["weight"].shape[1], generator=generator
    )
    hidden = (
        torch.rand(batch, total - first, generator=generator)
        < torch.linspace(0.1, 0.9, batch + 2)[1:-1, None]
    )
    return [tensor.to(device) for tensor in (labels, tokens, inputs, own, hidden)]


@torch.no_grad()
def disagreement(params, device):
    """The largest difference between the library's fp32 logits and the reference's, over the largest logit."""
    labels, _, inputs, own, hidden = training_batch(params, 1, device)
    lengths = tokenizer.lengths(hmar.scales(params))
    causal, diagonal = (dense_mask(lengths, is_causal, device) for is_causal in (True, False))
    parts, caches = (
        [None, *inputs.split(lengths[1:], 1)],
        [[] for _ in params["trunk"] + params["next_scale"]["blocks"]],
    )
    cached = torch.cat(
        [dense_logits(params, labels, part, only=k, caches=caches) for k, part in enumerate(parts)],
        1,
    )
    cache = hmar.new_cache(params, 1)
    ours = torch.cat(
        [
            hmar.next_scale_logits(params, labels, part, only=k, cache=cache)
            for k, part in enumerate(parts)
        ],
        1,
    )
    pairs = (
        (
            hmar.next_scale_logits(params, labels, inputs),
            dense_logits(params, labels, inputs, diagonal),
        ),
        (
            hmar.next_scale_logits(params, labels, inputs, is_causal=True),
            dense_logits(params, labels, inputs, causal),
        ),
        (
            hmar.masked_logits(params, labels, inputs, own, hidden),
            dense_logits(params, labels, inputs, diagonal, (own, hidden)),
        ),
        (ours, cached),
        (ours, dense_logits(params, labels, inputs, causal)),
    )
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@torch.no_grad()
def rounding(params, dtype, device):
    """Relative norm of what computing in dtype changes in the logits of both branches."""
    labels, _, inputs, own, hidden = training_batch(params, 1, device)
    half, whole = (
        torch.cat(
            [
                hmar.next_scale_logits(tree, labels, inputs),
                hmar.masked_logits(tree, labels, inputs, own, hidden),
            ]
        )
        for tree in (hmar.cast(params, dtype), params)
    )
    return float((half - whole).norm() / whole.norm())


def trained(params, is_trained):
    """(tree with gradients where is_trained(path), the leaves that have them)."""
    leaves = []

    def leaf(path, tensor):
        if not is_trained(train.path_name(path)):
            return tensor
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    return pytree.tree_map_with_path(leaf, params), leaves


def stage_steps(params, stage, batch, dtype, device):
    """(published, ours): functions that take the forward pass, loss and gradients of a stage."""
    labels, tokens, inputs, own, hidden = training_batch(params, batch, device)
    mask = dense_mask(tokenizer.lengths(hmar.scales(params)), False, device)
    params, leaves = trained(params, lambda name: name.startswith("masked") == (stage == "masked"))

    def published():
        if stage == "masked":
            logits = dense_logits(params, labels, inputs, mask, (own, hidden))
            losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
            loss = losses[:, -hidden.shape[1] :][hidden].mean()
        else:
            loss = F.cross_entropy(
                dense_logits(params, labels, inputs, mask).flatten(0, 1), tokens.flatten()
            )
        return torch.autograd.grad(loss, leaves)

    def ours():
        fast = hmar.cast(params, dtype)
        if stage == "masked":
            losses = hmar.masked_losses(fast, labels, tokens, inputs, own, hidden)
        else:
            losses = hmar.next_scale_losses(fast, labels, tokens, inputs)
        return torch.autograd.grad(losses.mean(), leaves)

    return published, ours


def row(name, seconds, slowest, work, flops, head, memory, best, dtype):
    """A line of a table: seconds, ratio, tokens a second, MiB, GFLOP/s, and the share of the best product's speed.

    The last number allows for the head's share of the flops being fp32.
    """
    plain, allowed = flops / best[dtype], (flops - head) / best[dtype] + head / best[torch.float32]
    return (
        name,
        seconds,
        slowest / seconds,
        round(work / seconds),
        round(memory),
        round(flops / seconds / 1e9),
        f"{plain / seconds:.0%}",
        f"{allowed / seconds:.0%}",
    )


HEADER = (
    "seconds",
    "x published",
    "tokens/s",
    "peak MiB",
    "GFLOP/s",
    "of best",
    "of best, fp32 head",
)


def start(arguments, device):
    """(dtype, params) with the conditions printed; ends the run where the two ways disagree."""
    dtype = sample.fast_dtype(device)
    scales = hmar.SCALES[arguments.size]
    print_conditions(device, f"published fp32, ours {str(dtype)[6:]}")
    params = model(arguments.depth, scales, device)
    error = disagreement(params, device)
    if not error < 1e-4:
        sys.exit(
            f"the two ways disagree: fp32 logits differ by {error:.1e} of the largest, so no time is printed"
        )
    print(
        f"depth {arguments.depth}, width 512, 4096 codes, {arguments.batch} x {arguments.size} pixels, "
        f"{sum(tokenizer.lengths(scales))} tokens each; fp32 logits agree to {error:.0e} of the largest, "
        f"{str(dtype)[6:]} ones differ by {rounding(params, dtype, device):.2%} in norm"
    )
    return dtype, params


def print_best(best):
    print(
        "best product: "
        + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {str(dtype)[6:]}" for dtype, rate in best.items())
        + "\n"
    )


def training(arguments):
    """A step of both stages, then how it grows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, params = start(arguments, device)
    best, rows = best_products({dtype, torch.float32}, device), []
    lengths, batch = tokenizer.lengths(hmar.scales(params)), arguments.batch
    total, width, hidden = (
        sum(lengths),
        params["classes"].shape[1],
        int(training_batch(params, batch, device)[4].sum()),
    )
    for stage in ("next-scale", "masked"):
        steps = dict(zip(("published", "ours"), stage_steps(params, stage, batch, dtype, device)))
        seconds = alternating_medians(steps, device, arguments.rounds, 1)
        for name, step in steps.items():
            predicted = hidden if stage == "masked" and name == "ours" else batch * total
            head = 6 * predicted * width * 4096
            elements = total**2 if name == "published" else exact_elements(lengths, False)
            flops = step_flops(step, batch, width, arguments.depth, elements)
            rows.append(
                row(
                    f"{stage}, {name}",
                    seconds[name],
                    seconds["published"],
                    batch * total,
                    flops,
                    head if name == "ours" else 0,
                    peak_memory(step, device),
                    best,
                    dtype if name == "ours" else torch.float32,
                )
            )
    best_after = best_products({dtype, torch.float32}, device)
    print_best({key: max(best[key], best_after[key]) for key in best})
    print_table(("a training step", *HEADER), rows)
    growth(dtype, device)


def growth(dtype, device):
    """How seconds and memory of a step at depth 2 grow with the image."""
    rows, before = [], None
    for size, scales in hmar.SCALES.items():
        lengths = tokenizer.lengths(scales)
        step = stage_steps(model(2, scales, device), "next-scale", 1, dtype, device)[1]
        seconds = alternating_medians({"ours": step}, device, 3, 1)["ours"]
        now = [
            seconds,
            peak_memory(step, device),
            exact_elements(lengths, False),
            sum(lengths),
            sum(lengths) ** 2,
        ]
        grown = [f"{b / a:.1f}" if before else "" for a, b in zip(before or now, now)]
        rows.append((f"1 x {size}", seconds, round(now[1]), *now[2:], *grown))
        before = now
    print("\nours at depth 2, and by how much it grows from one line to the next\n")
    names = ("seconds", "peak MiB", "scores", "tokens", "tokens^2")
    print_table(("next-scale", *names, *(f"x {name}" for name in names)), rows)


def sampling(arguments):
    """All tokens of a batch, without the decoder: VAR with its cache, and HMAR in the published passes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, params = start(arguments, device)
    tokenizer_params = pytree.tree_map(
        lambda tensor: tensor.to(device), tokenizer.init(channels=32, multipliers=(1,))
    )
    labels, fast = torch.arange(arguments.batch, device=device), hmar.cast(params, dtype)
    scales, width = hmar.scales(params), params["classes"].shape[1]
    lengths, passes = tokenizer.lengths(scales), sum(map(len, sample.published_schedule(scales)))

    def ours(tree, **options):
        for _ in sample.steps(tree, tokenizer_params, labels, **options):
            pass

    one_pass = tuple((length,) for length in lengths)
    contestants = {
        f"VAR, published, {len(scales)} passes": lambda: dense_sample(
            params, tokenizer_params, labels
        ),
        f"VAR, ours, {len(scales)} passes": lambda: ours(fast, is_causal=True, schedule=one_pass),
        f"HMAR, ours, {len(scales)} passes": lambda: ours(fast, schedule=one_pass),
        f"HMAR, ours, {passes} passes": lambda: ours(fast),
    }
    best = best_products({dtype, torch.float32}, device)
    seconds, rows = alternating_medians(contestants, device, arguments.rounds, 1), []
    slowest = next(iter(seconds.values()))
    for name, function in contestants.items():
        causal, head = (
            "VAR" in name,
            2 * (2 * sum(lengths) - lengths[0]) * arguments.batch * width * 4096,
        )
        flops = (
            product_flops(function)
            + 8 * arguments.batch * width * exact_elements(lengths, causal) * arguments.depth
        )
        mine = "ours" in name
        rows.append(
            row(
                name,
                seconds[name],
                slowest,
                arguments.batch * sum(lengths),
                flops,
                head if mine else 0,
                peak_memory(function, device),
                best,
                dtype if mine else torch.float32,
            )
        )
    print_best(best)
    print_table((f"sampling {arguments.batch} images", *HEADER), rows)


def tokenizers(arguments, images):
    """{name: tree}: a trained tokenizer where one is given, else random ones of the published size and a smaller one."""
    if arguments.weights:
        state = sample.load(arguments.weights)
        return {
            arguments.weights: state if "codebook" in state else tokenizer.from_published(state)
        }
    trees = {
        f"{channels} channels, untrained": tokenizer.init(channels=channels)
        for channels in (160, 64)
    }
    for params in trees.values():  # codes as far apart as their features, else all tokens are one
        with torch.no_grad():
            found = tokenizer.features(params, images[:1])
        mean, deviation = found.mean((0, 2, 3)), found.std((0, 2, 3))
        params["codebook"] = (
            torch.randn(params["codebook"].shape, generator=torch.Generator().manual_seed(0))
            * deviation
            + mean
        )
    return trees


@torch.no_grad()
def tokenizing(arguments):
    """Encoding and decoding in bf16 against fp32, and what it changes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print_conditions(device, "fp32 and bf16")
    images = train.to_unit(
        torch.stack([draw(index, arguments.size) for index in range(arguments.batch)]), "cpu"
    )
    rows, notes = [], []
    for name, params in tokenizers(arguments, images).items():
        images, scales = (
            images.to(device),
            train.default_scales(arguments.size // tokenizer.downsampling(params)),
        )
        params = train.to_device(params, device)
        trees = dict(fp32=params, bf16=tokenizer.cast(params, torch.bfloat16))
        tokens = {dtype: tokenizer.encode(tree, images, scales) for dtype, tree in trees.items()}
        made = {dtype: tokenizer.decode(trees[dtype], tokens["fp32"], scales) for dtype in trees}
        for work, given in (("encode", images), ("decode", tokens["fp32"])):
            calls = {
                dtype: functools.partial(getattr(tokenizer, work), tree, given, scales)
                for dtype, tree in trees.items()
            }
            best = best_products([DTYPES[dtype] for dtype in calls], device)
            seconds = alternating_medians(calls, device, arguments.rounds, 1)
            for dtype, call in calls.items():
                rate = product_flops(call) / seconds[dtype]
                rows.append(
                    (
                        f"{name}, {work}, {dtype}",
                        seconds[dtype],
                        seconds["fp32"] / seconds[dtype],
                        len(images) / seconds[dtype],
                        round(tokens[dtype].numel() / seconds[dtype]),
                        round(peak_memory(call, device)),
                        round(rate / 1e9),
                        f"{rate / best[DTYPES[dtype]]:.0%}",
                    )
                )
        error, made["both"] = (
            (made["fp32"] - made["bf16"]) * 127.5,
            tokenizer.decode(trees["bf16"], tokens["bf16"], scales),
        )
        whole, half = (
            float(10 * torch.log10(4 / F.mse_loss(made[key], images))) for key in ("fp32", "both")
        )
        changed = (tokens["fp32"] != tokens["bf16"]).float().mean()
        notes.append(
            f"{name}: bf16 changes {changed:.1%} of the tokens; images of the same tokens by {error.abs().mean():.2f} of 255, "
            f"at most {error.abs().max():.0f}; the PSNR from {whole:.2f} to {half:.2f} dB"
        )
    print(f"{len(images)} drawings of {arguments.size} pixels\n")
    print_table(
        (
            "tokenizer",
            "seconds",
            "x fp32",
            "images/s",
            "tokens/s",
            "peak MiB",
            "GFLOP/s",
            "of best",
        ),
        rows,
    )
    print("", *notes, sep="\n")


def draw(index, size):
    """uint8 (3, size, size)."""
    return train.Images([index], size)[0, None][0]


def curves(arguments):
    """Trains a small model on drawings in bf16 and fp32 from the same start and prints both curves."""
    print_conditions("cpu", "bf16 and fp32")
    scales, generator = train.default_scales(8), torch.Generator().manual_seed(0)
    images = train.to_unit(torch.stack([draw(index, 32) for index in range(500)]), "cpu")
    tokenizer_params = tokenizer.init(
        codes=256,
        code_dim=16,
        channels=32,
        multipliers=(1, 1, 2),
        residual_blocks=1,
        attention=False,
    )
    with torch.no_grad():
        found = tokenizer.features(tokenizer_params, images)
        tokenizer_params["codebook"] = tokenizer.data_codebook(
            tokenizer_params, found, scales, generator
        )
    tokens, labels, losses = (
        tokenizer.encode(tokenizer_params, images, scales),
        torch.arange(500) % 10,
        {},
    )
    for dtype in (torch.bfloat16, torch.float32):
        new = hmar.init(
            depth=3, width=192, classes=10, codes=256, code_dim=16, scales=scales, gamma=0.1
        )
        params, leaves = trained(new, lambda name: True)
        optimizer, order, losses[dtype] = (
            torch.optim.AdamW(leaves, lr=3e-3, fused=True),
            torch.Generator().manual_seed(1),
            [],
        )
        for _ in range(200):
            chosen = torch.randint(500, (16,), generator=order)
            inputs = tokenizer.next_scale_inputs(tokenizer_params, tokens[chosen], scales)
            loss = hmar.next_scale_losses(
                hmar.cast(params, dtype), labels[chosen], tokens[chosen], inputs
            ).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    means = {
        step: [statistics.mean(curve[step - 20 : step]) for curve in losses.values()]
        for step in range(20, 201, 20)
    }
    rows = [(f"{step - 19} to {step}", *both) for step, both in means.items()]
    print_table(("steps", "loss, bf16", "loss, fp32"), rows)
    half, whole = means[200]
    print(f"\nthe ends differ by {abs(half - whole) / whole:.2%}")
    return 0 if abs(half - whole) < 0.02 * whole else "the curves end more than 2 % apart"


def costs(arguments):
    """Markdown: what training takes at the published sizes."""
    print(
        "Computed, not measured: stage one / masked stage (its branch of 8 blocks trained, half of the tokens hidden); TFLOPs an image, "
        "forward and backward, without what is computed again; MB an image that the backward pass waits for on a GPU, in bf16, plain and "
        "with --checkpointing, but for the logits, of which slices of 128 MiB are held; GB of weights, gradients, AdamW's moments and "
        "the average, fp32, but for a bf16 copy of the blocks.\n"
    )
    print(
        "| model | pixels | parameters, M | TFLOPs | MB | MB, --checkpointing | GB |\n|---|---|---|---|---|---|---|"
    )
    columns = dict(
        parameters=(1e6, 0),
        flops=(1e12, 2),
        activations=(1e6, 0),
        checkpointed=(1e6, 0),
        optimizer=(1e9, 1),
    )
    for depth, (size, scales) in itertools.product((16, 20, 24, 30), hmar.SCALES.items()):
        stages = [cost(depth, scales, masked_blocks) for masked_blocks in (0, 8)]
        cells = [
            " / ".join(f"{stage[name] / unit:,.{digits}f}" for stage in stages)
            for name, (unit, digits) in columns.items()
        ]
        print("| " + " | ".join([f"d{depth}", str(size), *cells]) + " |", flush=True)
    for size, scales in hmar.SCALES.items():
        stage = tokenizer_cost(size, scales)
        cells = [
            f"{stage[name] / unit:,.{digits}f}" if name in stage else ""
            for name, (unit, digits) in columns.items()
        ]
        print("| " + " | ".join(["tokenizer", str(size), *cells]) + " |", flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a positive number")
    return int(text)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "attention", help="the attention of a training step against its alternatives"
    )
    command.add_argument(
        "--count", action="store_true", help="count the kernels' work and traffic; needs no GPU"
    )
    command.add_argument("--batch", type=positive, default=4)
    command.add_argument("--heads", type=positive, default=8)
    command.add_argument(
        "--head-dim", type=int, choices=range(16, 257, 8), metavar="16..256", default=64
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="default: bf16 on a GPU and in the count, fp32 on a CPU"
    )
    command.set_defaults(run=attention)
    for name, run, told in (
        (
            "train",
            training,
            "a training step of both stages against the published way, and how it grows",
        ),
        ("sample", sampling, "drawing all tokens of a batch against the published way"),
        ("tokenizer", tokenizing, "encoding and decoding in bf16 against fp32"),
    ):
        command = commands.add_parser(name, help=told)
        if name == "tokenizer":
            command.add_argument("--size", type=positive, default=256)
            command.add_argument(
                "--weights",
                metavar="FILE",
                help="a trained tokenizer, ours or published, instead of untrained ones",
            )
        else:
            command.add_argument("--size", type=int, choices=hmar.SCALES, default=256)
            command.add_argument("--depth", type=positive, default=8)
        command.add_argument("--batch", type=positive, default=4)
        command.add_argument(
            "--rounds",
            type=positive,
            default=5,
            help="timings of each contestant, after one that does not count",
        )
        command.set_defaults(run=run)
    commands.add_parser(
        "cost", help="what training takes at the published sizes, computed without a GPU"
    ).set_defaults(run=costs)
    commands.add_parser(
        "curves", help="losses of 200 steps on drawings in bf16 and fp32"
    ).set_defaults(run=curves)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as the commands have it
    sample.keep_freed_memory()  # as the commands do, and for both ways
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
