"""Benchmarks. `python tests/benchmark.py attention` times the attention of a training step, with `--count` it counts the kernels' work.

Every run prints its conditions first. Times are medians of rounds in which the contestants take turns, so that a busy machine is fair.
"""
import argparse
import functools
import itertools
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_kernels
import hmar
from attention_kernels import block_sparse_attention

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
PEAK = dict(A100=312, H100=989, H200=989, B200=2250)  # dense bf16 TFLOP/s of the SXM cards, by the makers' data sheets
KERNELS = ("forward", "dQ", "dK/dV")


def print_conditions(device, dtype):
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    triton = getattr(attention_kernels.triton, "__version__", "none")
    print(f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Triton {triton}, {dtype}\n")


def print_table(header, rows):
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [[f"{x:,.2f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in (header, *rows)]
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
    return sum(n * stop if is_causal else n * n for n, stop in zip(lengths, itertools.accumulate(lengths), strict=True))


def kernel_count(lengths, is_causal, which, rows, columns, head_dim, size):
    """Score elements that a kernel computes and bytes that it asks of memory (caches included) for one head: (elements, read, written)."""
    tiles, _ = attention_kernels.tile_table(lengths, is_causal, which == 2, rows, columns)
    elements = read = written = 0
    for start, stop, full_begin, full_stop, masked_begin, masked_stop in tiles.tolist():
        full, masked = full_stop - full_begin, masked_stop - masked_begin
        elements += rows * (full + math.ceil(masked / (columns // 2)) * (columns // 2))
        # a row's vectors and statistics, and what the table says of it; two vectors a column, with two statistics if it is a query
        row_vectors, row_numbers = ((1, 2), (3, 3), (2, 2))[which]
        read += (stop - start) * (row_vectors * head_dim * size + row_numbers * 4) + 24
        read += (full + masked) * (2 * head_dim * size + (8 if which == 2 else 0))
        written += (stop - start) * (head_dim * size * (2 if which == 2 else 1) + (0 if which == 2 else 4))
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
        elements, read, written = kernel_count(lengths, is_causal, which, constants["ROWS"], constants["COLUMNS"], head_dim, dtype.itemsize)
        exact, least = exact_elements(lengths, is_causal), least_bytes(sum(lengths), which, head_dim, dtype.itemsize)
        rows.append((f"{sum(lengths)} {'causal' if is_causal else 'diagonal'} {KERNELS[which]}", elements, exact, elements / exact,
                     exact / sum(lengths) ** 2, read, written, least, (read + written) / least))
    print(f"one head of {head_dim}, tiles of architecture {architecture}; bytes are what programs ask for, from whichever cache\n")
    print_table(("tokens, pattern, kernel", "scores", "exact", "ratio", "of dense", "read", "written", "least", "ratio"), rows)


def training_step(attention, query, key, value, output_gradient):
    """Output and gradients of (batch, heads, tokens, head_dim) views of one qkv tensor."""
    output = attention(query, key, value)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), output_gradient)


def agree(results, expected, dtype):
    pairs = zip(results, expected, strict=True)
    return all((a.float() - b.float()).abs().max() <= 16 * torch.finfo(dtype).eps * b.abs().max() for a, b in pairs)


def attention_contestants(lengths, is_causal, dtype, device):
    """{name: attention(query, key, value)} of the same pattern, the dense one first."""
    block = torch.repeat_interleave(torch.tensor(lengths, device=device))
    seen = block[:, None] >= block if is_causal else block[:, None] == block
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)
    contestants = {"SDPA, dense mask": functools.partial(F.scaled_dot_product_attention, attn_mask=mask),
                   "block-sparse": lambda *qkv: block_sparse_attention(*qkv, lengths, is_causal)}
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
    edges = torch.tensor([0, *itertools.accumulate(lengths * batch)], dtype=torch.int32, device=query.device)
    packed = (x.transpose(1, 2).reshape(batch * tokens, heads, head_dim) for x in (query, key, value))
    return varlen_attn(*packed, edges, edges, max(lengths), max(lengths)).view(batch, tokens, heads, head_dim).transpose(1, 2)


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
    for lengths, is_causal in itertools.product(scale_lengths() if device == "cuda" else scale_lengths()[:1], (False, True)):
        qkv = torch.randn(batch, sum(lengths), 3, heads, head_dim, device=device).to(dtype)
        tensors = [x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
        output_gradient = torch.randn(batch, sum(lengths), heads, head_dim, device=device).to(dtype).transpose(1, 2)
        contestants = attention_contestants(lengths, is_causal, dtype, device)
        steps = {name: functools.partial(training_step, function, *tensors, output_gradient) for name, function in contestants.items()}
        agreeing = [name for name in steps if agree(steps[name](), steps["SDPA, dense mask"](), dtype)]
        with torch.no_grad():
            forward = alternating_medians({name: functools.partial(contestants[name], *tensors) for name in agreeing}, device)
        both = alternating_medians({name: steps[name] for name in agreeing}, device)
        tera = 14e-12 * head_dim * exact_elements(lengths, is_causal) * batch * heads  # two products forward, five backward
        for name in contestants:
            label = f"{sum(lengths)} {'causal' if is_causal else 'diagonal'} {name}"
            if name in agreeing:
                rate, times = tera / both[name], both["SDPA, dense mask"] / both[name]
                rows.append((label, forward[name] * 1e3, both[name] * 1e3, times, rate, f"{rate / peak:.1%}" if peak else "-"))
            else:
                rows.append((label, *["disagrees"] * 5))
                all_agree = False
    print(f"batch {batch}, {heads} heads of {head_dim}\n")
    print_table(("tokens, pattern, attention", "forward ms", "+ backward ms", "x dense", "TFLOP/s", "of peak"), rows)
    return 0 if all_agree else "some results disagree with dense attention: no time is printed for them"


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
    command = commands.add_parser("attention", help="the attention of a training step against its alternatives")
    command.add_argument("--count", action="store_true", help="count the kernels' work and traffic; needs no GPU")
    command.add_argument("--batch", type=positive, default=4)
    command.add_argument("--heads", type=positive, default=8)
    command.add_argument("--head-dim", type=int, choices=range(16, 257, 8), metavar="16..256", default=64)
    command.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU and in the count, fp32 on a CPU")
    command.set_defaults(run=attention)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
