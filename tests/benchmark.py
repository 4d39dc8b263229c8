"""Benchmarks: python tests/benchmark.py [attention | train | sample | cost | kernels].

`train` and `sample` time the library against the published way: the dense reference below makes
the tensors that VAR's code makes, in fp32 and under bf16 autocast. It is checked against ours
first; the ratio against the faster of the two counts. Contestants take turns and the best of their
rounds is told, so that a busy machine is fair; with one thread on a CPU it is CPU time.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import math
import platform
import re
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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {256: (4, 8), 512: (1, 8), 1024: (1, 2)}  # pixels -> images and depth, if not asked for
VAR = sample.PUBLISHED["VAR"]


# ---- what is measured, and how it is told


def print_conditions(*notes):
    """Processor, threads, versions: what a table is worth nothing without."""
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()
    threads = f"threads: {torch.get_num_threads()}"
    print(machine, threads, f"torch {torch.__version__}", *notes, sep="; ")


def processor():
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.findall(r"^(model name|cpu family|model)\s*: (.+)", text, re.MULTILINE)
    words = [" ".join(pair) for pair in found[:3]] or [platform.processor()]
    words += ["avx512_bf16"] * torch.cpu._is_avx512_bf16_supported()
    words += ["AMX"] * torch.cpu._is_amx_tile_supported()
    return ", ".join(words)


def print_table(header, rows):
    """Columns as wide as their widest cell."""
    formats = {float: ",.2f", int: ",", str: ""}
    lines = [header, *([format(cell, formats[type(cell)]) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def clock():
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def best_seconds(contestants, rounds):
    """{name: seconds of the fastest call} of {name: function}, after one to warm up."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(rounds + 1):
        for name, function in contestants.items():
            start = clock()
            function()
            seconds = clock() - start
            if turn:
                best[name] = min(best[name], seconds)
    return best


def peak_memory(function):
    """MiB at the peak of a call above what lay there before; 0 where the system is silent."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return 0

    def status(name):
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s*(\d+)", text)[1]) / 2**10

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


# ---- the work, counted


def exact_elements(lengths, is_causal):
    """Scores that the pattern needs, of one head."""
    seen = itertools.accumulate(lengths) if is_causal else lengths
    return sum(n * keys for n, keys in zip(lengths, seen, strict=True))


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def saved_bytes(function, weights):
    """Bytes that a call keeps for its backward pass, without `weights`."""
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


# ---- attention


def attention(arguments):
    """forward and backward passes of one layer against its alternatives"""
    batch, heads, head_dim = arguments.batch, 8, arguments.head_dim
    dtype = sample.find_dtype(arguments.dtype, DEVICE)
    print_conditions(f"{batch} x {heads} heads of {head_dim}", dtype)
    rows = []
    for size, is_causal in itertools.product(arguments.size, (False, True)):
        lengths = tuple(tokenizer.lengths(hmar.SCALES[size]))
        shape = (batch, sum(lengths), 3, heads, head_dim)
        qkv = torch.randn(shape, device=DEVICE, dtype=dtype).permute(2, 0, 3, 1, 4)
        tensors = [x.requires_grad_() for x in qkv]
        output_gradient = torch.randn_like(tensors[0])
        contestants = attention_contestants(lengths, is_causal, dtype)

        def step(function, tensors=tensors, output_gradient=output_gradient):
            output = function(*tensors)
            return [output.detach(), *torch.autograd.grad(output, tensors, output_gradient)]

        truth = step(contestants["SDPA, dense mask"])
        for name, function in contestants.items():
            refuse(name, step(function), truth, 16 * torch.finfo(dtype).eps)
        with torch.no_grad():
            calls = {name: functools.partial(f, *tensors) for name, f in contestants.items()}
            forward = best_seconds(calls, arguments.rounds)
        calls = {name: functools.partial(step, f) for name, f in contestants.items()}
        both = best_seconds(calls, arguments.rounds)

        # two products forward, five backward
        tera = 14e-12 * head_dim * exact_elements(lengths, is_causal) * batch * heads
        for name, seconds in both.items():
            label = f"{sum(lengths)} {'causal' if is_causal else 'diagonal'} {name}"
            times = both["SDPA, dense mask"] / seconds
            rows.append((label, forward[name] * 1e3, seconds * 1e3, times, tera / seconds))
    columns = ("forward ms", "+ backward ms", "x dense", "TFLOP/s")
    print_table(("tokens, pattern, attention", *columns), rows)


def refuse(name, ours, truth, allowed):
    """Ends the run unless each tensor is near the true one, by the norm."""
    pairs = zip(ours, truth, strict=True)
    error = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
    if not error < allowed:
        sys.exit(f"{name} differs from the reference by {error:.1e}, so no time is printed")


def dense_mask(lengths, is_causal, dtype=torch.float32):
    """(L, L): 0 where a token sees another, -inf elsewhere."""
    block = torch.repeat_interleave(torch.tensor(lengths, device=DEVICE))
    sees = torch.ge if is_causal else torch.eq
    visible = sees(block[:, None], block)
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


def attention_contestants(lengths, is_causal, dtype):
    """{name: attention(query, key, value)} of the same pattern."""
    mask = dense_mask(lengths, is_causal, dtype)
    ours = attention_kernels.block_sparse_attention
    contestants = {
        "SDPA, dense mask": functools.partial(F.scaled_dot_product_attention, attn_mask=mask),
        "block-sparse": lambda *qkv: ours(*qkv, lengths, is_causal),
    }
    if DEVICE.type != "cuda":
        return contestants

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch, head, row, column):
        return mask[row, column] == 0

    flex = torch.compile(flex_attention)
    blocks = create_block_mask(visible, None, None, len(mask), len(mask), device=DEVICE)
    contestants["FlexAttention"] = lambda *qkv: flex(*qkv, block_mask=blocks)
    if not is_causal and dtype != torch.float32:  # its keys cannot be a prefix
        contestants["varlen attention"] = functools.partial(variable_length_attention, lengths)
    return contestants


def variable_length_attention(lengths, query, key, value):
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    batch, _, tokens, _ = query.shape
    edges = [0, *itertools.accumulate(lengths * batch)]
    edges = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    output = varlen_attn(*packed, edges, edges, max(lengths), max(lengths))
    return output.unflatten(0, (batch, tokens)).transpose(1, 2)


# ---- the published way: VAR's tensors and casts, whether autocast is on or not


def dense_logits(params, labels, inputs, mask):
    """Logits (B, L, codes) in training, with an additive mask (L, L)."""
    # the sequence is made in fp32, the blocks then run in what products give
    with torch.autocast(DEVICE.type, enabled=False):
        condition = F.embedding(labels, params["classes"])
        start = condition[:, None] + params["start"]
        x = torch.cat([start, F.linear(inputs, **params["input"])], 1) + dense_places(params)
    if torch.is_autocast_enabled(DEVICE.type):
        dtype = torch.get_autocast_dtype(DEVICE.type)
        x, condition, mask = (tensor.to(dtype) for tensor in (x, condition, mask))

    for block in params["trunk"] + params["next_scale"]["blocks"]:
        x = dense_block(x, condition, mask, None, **block)
    return dense_head(x, condition, **params["next_scale"])


def dense_places(params):
    """(L, C): positions and levels."""
    pairs = zip(params["positions"], params["levels"])
    return torch.cat([position.flatten(0, 1) + level for position, level in pairs])


def dense_block(x, condition, mask, cache, modulation, attention, mlp):
    six = F.linear(F.silu(condition), **modulation).unflatten(-1, (1, 6, -1))  # (B, 1, 6, C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)

    h = dense_norm(x).mul(scale1.add(1)).add_(shift1)
    x = x + dense_attention(h, mask, cache, **attention).mul_(gamma1)

    h = dense_norm(x).mul(scale2.add(1)).add_(shift2)
    h = F.gelu(F.linear(h, **mlp["expand"]), approximate="tanh")
    return x + F.linear(h, **mlp["contract"]).mul(gamma2)


def dense_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


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


def dense_head(x, condition, modulation, head, blocks=()):
    scale, shift = F.linear(F.silu(condition), **modulation).unflatten(-1, (1, 2, -1)).unbind(2)
    h = dense_norm(x.float()).mul(scale.add(1)).add_(shift)
    return F.linear(h.float(), **head).float()


@torch.no_grad()
def dense_sample(params, codec, labels, seen=None):
    """Tokens (B, L) drawn with a cache. seen: a list for the guided logits of each scale."""
    scales = hmar.scales(params)
    both = torch.cat([labels, torch.full_like(labels, len(params["classes"]) - 1)])
    condition = F.embedding(both, params["classes"])
    places = dense_places(params).split(tokenizer.lengths(scales))
    blocks = params["trunk"] + params["next_scale"]["blocks"]
    caches = [[] for _ in blocks]
    f_hat, drawn = 0, []

    for k, size in enumerate(scales):
        if k == 0:
            x = condition[:, None] + params["start"] + places[0]
        else:
            inputs = tokenizer.resize_to_scale(f_hat, size)
            x = (F.linear(inputs, **params["input"]) + places[k]).repeat(2, 1, 1)
        for block, cache in zip(blocks, caches):
            x = dense_block(x, condition, None, cache, **block)

        conditional, unconditional = dense_head(x, condition, **params["next_scale"]).chunk(2)
        t = VAR["guidance"] * k / (len(scales) - 1)
        logits = (1 + t) * conditional - t * unconditional
        if seen is not None:
            seen.append(logits)
        probability = dense_filtered(logits, VAR["top_k"], VAR["top_p"]).softmax(-1)
        drawn.append(torch.multinomial(probability.flatten(0, 1), 1).view(logits.shape[:2]))
        f_hat = f_hat + tokenizer.contribution(codec, drawn[-1], k, scales)
    return torch.cat(drawn, 1)


def dense_filtered(logits, top_k, top_p):
    """Logits (B, n, codes), -inf where the filters rule a code out."""
    least = logits.topk(top_k, sorted=False)[0].amin(-1, keepdim=True)
    logits = logits.masked_fill(logits < least, -torch.inf)
    ascending, order = logits.sort(-1)
    out = ascending.softmax(-1).cumsum_(-1) <= 1 - top_p
    out[..., -1:] = False
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


# ---- train and sample


def training(arguments):
    """a step of stage one, forward and backward, against the published way"""
    params = begin(arguments)
    lengths = tokenizer.lengths(hmar.scales(params))
    total = sum(lengths)
    labels = torch.randint(1000, (arguments.batch,), device=DEVICE)
    tokens = torch.randint(4096, (arguments.batch, total), device=DEVICE)
    inputs = torch.randn(arguments.batch, total - lengths[0], 32, device=DEVICE)
    params = train.trainable(params)
    leaves = pytree.tree_leaves(params)

    def published(mask, autocast=False):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            logits = dense_logits(params, labels, inputs, mask)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(dtype, is_causal):
        fast = hmar.cast(params, dtype)
        loss = hmar.next_scale_losses(fast, labels, tokens, inputs, is_causal).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for is_causal in (False, True):
        mask = dense_mask(lengths, is_causal)
        refuse("ours in fp32", ours(torch.float32, is_causal), published(mask), 1e-3)
    refuse("autocast", published(mask, True), published(mask), 0.1)
    contestants = {
        "published, fp32": lambda: published(mask),
        "published, bf16 autocast": lambda: published(mask, autocast=True),
        "ours": lambda: ours(arguments.dtype, False),
        "ours, VAR mode": lambda: ours(arguments.dtype, True),
    }
    compare("a training step", contestants, arguments)


def sampling(arguments):
    """all tokens of a batch, without the decoder, against the published way"""
    params = begin(arguments)
    params = hmar.add_masked_branch(params, max(1, arguments.depth // 2))
    scales = hmar.scales(params)
    lengths = tokenizer.lengths(scales)
    codec = train.to_device(tokenizer.init(channels=32, multipliers=(1,)), DEVICE)
    labels = torch.arange(arguments.batch, device=DEVICE)
    check_sampling(params, codec, labels[:1])

    weights = train.trainable(params)  # autocast keeps their casts: faster
    fast = hmar.cast(params, arguments.dtype)
    several = sample.published_schedule(scales)
    once = [[length] for length in lengths]

    def published(autocast=False):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            dense_sample(weights, codec, labels)

    def ours(schedule, is_causal=False):
        options = VAR | dict(schedule=schedule, is_causal=is_causal, mask_guidance=0, soften=0)
        for _ in sample.steps(fast, codec, labels, **options):
            pass

    contestants = {
        "published, fp32": published,
        "published, bf16 autocast": lambda: published(autocast=True),
        f"ours, {sum(map(len, several))} passes": lambda: ours(several),
        f"ours, {len(once)} passes": lambda: ours(once),
        f"ours, {len(once)} passes, VAR mode": lambda: ours(once, is_causal=True),
    }
    compare("sampling", contestants, arguments)


@torch.no_grad()
def check_sampling(params, codec, labels):
    """Ends the run where the guided logits that the reference drew from are not ours."""
    scales = hmar.scales(params)
    published = []
    tokens = dense_sample(params, codec, labels, published)
    inputs = tokenizer.next_scale_inputs(codec, tokens, scales)
    null = torch.full_like(labels, len(params["classes"]) - 1)
    conditional, unconditional = (
        hmar.next_scale_logits(params, rows, inputs, is_causal=True) for rows in (labels, null)
    )
    counts = torch.tensor(tokenizer.lengths(scales), device=DEVICE)
    t = torch.linspace(0, VAR["guidance"], len(counts), device=DEVICE).repeat_interleave(counts)[
        :, None
    ]
    refuse("ours", [(1 + t) * conditional - t * unconditional], [torch.cat(published, 1)], 1e-4)


def begin(arguments):
    """A tree of random weights whose blocks, unlike a new tree's, matter to the logits."""
    batch, depth = SIZES[arguments.size]
    arguments.batch = arguments.batch or batch
    arguments.depth = arguments.depth or depth
    arguments.dtype = sample.find_dtype(None, DEVICE)
    what = f"{arguments.batch} x {arguments.size} pixels, depth {arguments.depth}, width 512"
    print_conditions(what, f"4096 codes; ours in {arguments.dtype}")

    scales = hmar.SCALES[arguments.size]
    params = hmar.init(depth=arguments.depth, width=512, scales=scales, gamma=1.0)
    params["classes"] *= 30
    params["next_scale"]["head"]["weight"] *= 50
    return train.to_device(params, DEVICE)


def compare(what, contestants, arguments):
    """The table: seconds, how many times faster than both references, and memory."""
    seconds = best_seconds(contestants, arguments.rounds)
    fp32, bf16, *_ = seconds.values()
    rows = []
    for name, function in contestants.items():
        own = seconds[name]
        ratios = [other / own for other in (fp32, bf16, min(fp32, bf16))]
        rows.append((name, own, *ratios, round(peak_memory(function))))
    columns = ("seconds", "x fp32", "x autocast", "x faster", "peak MiB")
    print_table((what, *columns), rows)
    print(f"\nbest of {arguments.rounds} rounds")


# ---- what training takes, computed


def staged(params):
    """(the tree as its last branch's stage has it, the parameters that are trained)."""
    if "masked" in params:
        params = params | train.trainable(dict(masked=params["masked"]))
    else:
        params = train.trainable(params)
    leaves = pytree.tree_leaves(params)
    return params, [leaf for leaf in leaves if leaf.requires_grad]


def traced(params):
    """(3,): FLOPs of one image's training step, bytes that it keeps, plain and checkpointing.

    As on a GPU in bf16, half of the tokens hidden if there is a mask; on tensors without values.
    """
    branch = "masked" if "masked" in params else "next_scale"
    lengths = tokenizer.lengths(hmar.scales(params))
    later = sum(lengths[1:])
    width, code_dim = params["input"]["weight"].shape
    kernels = mock.patch.object(attention_kernels, "INTERPRETED", True)  # not the CPU's path
    with FakeTensorMode(), kernels:
        params = pytree.tree_map(lambda leaf: torch.empty(leaf.shape), params)
        params, trained = staged(params)
        fast = hmar.cast(params, torch.bfloat16)
        labels, inputs = torch.tensor([0]), torch.empty(1, later, code_dim)
        own = (inputs, torch.ones(1, later, dtype=torch.bool)) if branch == "masked" else ()

        def logits(checkpointing=False):  # the loss has no products, and keeps but a slice of them
            options = dict(checkpointing=checkpointing)
            x = hmar.branch_features(fast, branch, labels, inputs, *own, **options)[0]
            if own:
                x = x.index_select(0, torch.arange(later // 2))
            return hmar.logits(x, **fast[branch]["head"])

        blocks = len(params["trunk"] + params[branch]["blocks"])
        weights = pytree.tree_leaves((params, fast))
        flops = flops_of(lambda: torch.autograd.grad(logits().sum(), trained))
        flops += 12 * width * exact_elements(lengths, False) * blocks  # attention's six products
        kept = [saved_bytes(functools.partial(logits, way), weights) for way in (False, True)]
    return torch.tensor([flops, *kept], dtype=torch.float64)


def cost(depth, scales, masked_blocks=0, **sizes):
    """{what: number} of a training step of stage one or, with masked_blocks, of the masked stage.

    parameters; flops, of an image, without what is computed again; muon, FLOPs of a step; state:
    bytes of weights, gradients, moments, average and best, fp32; activations: bytes an image that
    the backward pass waits for; checkpointed: the same with checkpointing. sizes: as for hmar.init.
    """
    sizes = dict(width=64 * depth) | sizes

    def tree(trunk, branch):
        with torch.device("meta"):
            params = hmar.init(depth=trunk + branch, scales=scales, **sizes)
            return hmar.add_masked_branch(params, branch) if branch else params

    # every block costs alike
    branch = min(1, masked_blocks)
    one = traced(tree(1, branch))
    trunk_block = traced(tree(2, branch)) - one
    branch_block = traced(tree(1, 2)) - one if branch else trunk_block
    step = one + (depth - masked_blocks - 1) * trunk_block + (masked_blocks - branch) * branch_block
    flops, plain, checkpointed = map(int, step)

    again = int(branch_block[1] - branch_block[2])
    numbers = dict(flops=flops, activations=plain, checkpointed=checkpointed + again)
    return numbers | weights_cost(*staged(tree(depth - masked_blocks, masked_blocks)))


def weights_cost(tree, trained):
    parameters = sum(leaf.numel() for leaf in pytree.tree_leaves(tree))
    moving = sum(leaf.numel() for leaf in trained)
    momenta = train.Optimizer(tree).momenta  # one moment, not two
    state = parameters + 5 * moving - sum(x.numel() for x in momenta)
    muon = 0
    for count, *sides in (x.shape for x in momenta):
        rows, columns = sorted(sides)
        muon += 5 * count * (4 * rows**2 * columns + 2 * rows**3)  # five iterations, three products
    return dict(parameters=parameters, state=4 * state, muon=muon)


def tokenizer_cost(size, scales, **sizes):
    """`cost` of a training step of the tokenizer in bf16. sizes: as for tokenizer.init."""
    with FakeTensorMode():
        codec = train.trainable(tokenizer.init(**sizes))
        fast = tokenizer.cast(codec, torch.bfloat16)
        count = tokenizer.COARSE_EVERY  # images, one of them coarse
        images, stops = torch.empty(count, 3, size, size), torch.tensor([0])

        def losses():
            made = tokenizer.training_pass(fast, images, scales, stops)
            return made["images"].sum() + made["coarse"].sum() + made["loss"]

        flops = flops_of(lambda: losses().backward())
        activations = saved_bytes(losses, pytree.tree_leaves((codec, fast)))
        numbers = dict(flops=flops // count, activations=activations // count)
        return numbers | weights_cost(codec, pytree.tree_leaves(codec))


def costs(arguments):
    """the dial from depth 2 to 30: what training takes, computed"""
    print(
        "Computed, not measured: tokenizer / next-scale / masked stage. EFLOP with Muon's; GB of "
        "weights, gradients, moments, average and best; MB an image kept for the backward pass, "
        "bf16; hours at 66 TFLOP/s, 40 % of a 24 GB card's, without launches, data and saving.\n"
    )
    units = dict(parameters=1e6, training=1e18, state=1e9, activations=1e6, checkpointed=1e6)
    rows = []
    for depth in (2, 3, 4, 6, 8, 12, 16, 20, 24, 30):
        size = arguments.size or (64 if depth < 8 else 256)
        dial = train.dial(depth, size, arguments.images)
        codec, batch, steps = dial["codec"], dial["batch"], dial["steps"].values()
        cell = 2 ** (len(codec["multipliers"]) - 1)
        scales = train.default_scales(size, size // cell)
        codes = dict(codes=codec["codes"], code_dim=codec["code_dim"])
        stages = [tokenizer_cost(size, scales, **codec)]
        stages += [cost(depth, scales, blocks, **codes) for blocks in (0, dial["masked_blocks"])]

        for count, stage in zip(steps, stages):
            stage["training"] = count * (batch * stage["flops"] + stage["muon"])
        tokens = dial["steps"]["next-scale"] * batch * sum(tokenizer.lengths(scales))
        rate = f"{dial['lr']['next-scale']:.1e}"
        cells = [depth, size, f"{tokens:.2g}", batch, listed(steps), rate]
        for key, unit in units.items():
            cells.append(listed(stage[key] / unit for stage in stages if key in stage))
        rows.append((*cells, f"{sum(x['training'] for x in stages) / 66e12 / 3600:.3g}"))
    columns = "depth", "pixels", "tokens", "batch", "steps", "rate", "parameters, M"
    print_table((*columns, "EFLOP", "GB", "MB", "MB, checkpointing", "hours"), rows)


def listed(numbers):
    return " / ".join(f"{number:.0f}" if number > 999 else f"{number:.3g}" for number in numbers)


# ---- the kernels, compiled


def kernels(arguments):
    """registers, spills, shared memory and blocks an SM of the kernels; needs no GPU"""
    import test_attention_kernels as compiled

    # threads and KiB of shared memory of an SM, one of which each block loses
    limits = {80: (2048, 164), 89: (1536, 100), 90: (2048, 228), 100: (2048, 228), 120: (1536, 100)}
    rows = []
    for architecture, head_dim, longest in itertools.product(limits, arguments.head_dim, (9, 512)):
        threads, shared = limits[architecture]
        for kernel in compiled.compile_kernels(architecture, "bfloat16", head_dim, longest):
            warps = kernel["warps"]
            registers = math.ceil(kernel["registers"] / 8) * 8 * 32 * warps
            bounds = [2**16 // registers, threads // (32 * warps)]
            bounds.append(shared * 1024 // (kernel["shared"] + 1024))
            if kernel["tensor_memory"]:
                bounds.append(512 // kernel["tensor_memory"])

            name = f"{architecture / 10} {head_dim} {kernel['kernel'].strip('_')}"
            tile = f"{kernel['rows']} x {kernel['columns']}"
            counts = (warps, kernel["registers"], kernel["spills"], kernel["shared"], min(bounds))
            rows.append((name, tile, *counts))

    columns = ("rows x columns", "warps", "registers", "spills", "shared memory", "blocks an SM")
    print(f"Triton {attention_kernels.triton.__version__}, bfloat16")
    print_table(("architecture, head_dim, kernel", *columns), dict.fromkeys(rows))


# ---- the command


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run):
        made = commands.add_parser(name, help=run.__doc__)
        made.set_defaults(run=run)
        return made.add_argument

    add = command("attention", attention)
    add("--size", type=int, choices=hmar.SCALES, nargs="+", default=[256])
    add("--batch", type=int, default=4)
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=("bf16", "fp32"))
    add("--rounds", type=int, default=15)
    for name, run in (("train", training), ("sample", sampling)):
        add = command(name, run)
        add("--size", type=int, choices=hmar.SCALES, default=256)
        add("--batch", type=int, help="(4 of 256, 1 above)")
        add("--depth", type=int, help="(8, of 1024 2)")
        add("--rounds", type=int, default=5)
    add = command("cost", costs)
    add("--size", type=int, help="pixels (64, from depth 8 on 256)")
    add("--images", type=int, default=1_281_167, help="to train on (ImageNet's)")
    add = command("kernels", kernels)
    add("--head-dim", type=int, nargs="+", default=[32, 64, 96, 128, 256])

    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as the commands have it
    train.keep_freed_memory()  # as the commands do, and for both ways
    arguments.run(arguments)


if __name__ == "__main__":
    main()
