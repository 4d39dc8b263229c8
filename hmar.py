"""The HMAR transformer: a pyramid of token maps -> logits of every token, from features of the coarser scales alone.

    labels (B,), features (B, L - len_0, code_dim) -> sequence (B, L, C) -> blocks -> logits (B, L, codes)

A sequence holds all scales, coarse to fine: scale 0 is made of start tokens and the class, each later scale of `inputs`, the accumulated
reconstruction of the scales before it. Attention stays inside a scale (block-diagonal), so no scale needs another's keys: that is the
Markov property, and why sampling keeps no cache. With is_causal=True the same functions are VAR, where a scale attends to the coarser ones
too. The masked branch shares the first blocks (the trunk) and sees, besides, the tokens of the scale itself, some of them hidden.
A model is a tree of tensors whose keys are the argument names of the functions that use them, and its shapes are its configuration.

    >>> params = add_masked_branch(init(depth=2, classes=10, codes=64, code_dim=8, scales=((1, 1), (2, 2))), blocks=1)
    >>> labels, inputs, hidden = torch.tensor([3, 7]), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    >>> next_scale_logits(params, labels, inputs).shape, masked_logits(params, labels, inputs, inputs, hidden).shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 64]))

Sources: HMAR (Kumbong et al. 2025), VAR (Tian et al. 2024); conditioning by adaptive layer norm as in DiT (Peebles and Xie 2023).
"""
import math
import re

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from attention_kernels import block_sparse_attention

LOSS_SLICE = 1 << 25  # logits that the loss holds at once, in elements: 128 MiB of fp32
SCALES = {pixels: tuple((side, side) for side in sides) for pixels, sides in (  # published, for a downsampling of 16
    (256, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), (512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    (1024, (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)))}


def scales(params):
    """((h_0, w_0), ...): the scales that a tree is made for, read off its positions."""
    return tuple(tuple(position.shape[:2]) for position in params["positions"])


def next_scale_logits(params, labels, inputs, is_causal=False, *, only=None, cache=None):
    """Logits (B, L, codes), fp32, of every token given the coarser scales (HMAR, next-scale prediction; is_causal=True: VAR).

    labels (B,) int64, 0 to the number of classes, which is the null class; inputs (B, L - len_0, code_dim) from
    tokenizer.next_scale_inputs. only=k computes scale k alone, (B, n_k, codes), from its own inputs (B, n_k, code_dim), None for scale 0.
    There a `cache` from new_cache makes it VAR: it takes in the scale's keys and values. ValueError on what does not fit the tree.
    """
    return logits(next_scale_features(params, labels, inputs, is_causal, only=only, cache=cache), **params["next_scale"]["head"])


def masked_logits(params, labels, inputs, own_inputs, mask, *, only=None):
    """Logits (B, L, codes), fp32, of every token given the coarser scales and its own scale's visible tokens (HMAR, masked prediction).

    own_inputs (B, L - len_0, code_dim) from tokenizer.masked_inputs; mask (B, L - len_0) bool, True = hidden; scale 0 is never masked.
    only=k, from 1, computes scale k alone from its own part of each. ValueError where the tree has no masked branch, or as above.
    """
    return logits(masked_features(params, labels, inputs, own_inputs, mask, only=only), **params["masked"]["head"])


def next_scale_losses(params, labels, tokens, inputs, is_causal=False, *, keep=None, checkpointing=False):
    """Cross entropy (B, L), fp32, of tokens (B, L) under `next_scale_logits`, whose whole table of logits it never holds.

    keep: from stochastic_depth. checkpointing: keep only each block's input for the backward pass and compute the rest again.
    """
    x = next_scale_features(params, labels, inputs, is_causal, keep=keep, checkpointing=checkpointing)
    return token_losses(x.flatten(0, 1), tokens.flatten(), **params["next_scale"]["head"]).view(tokens.shape)


def masked_losses(params, labels, tokens, inputs, own_inputs, mask, *, places=None, keep=None, checkpointing=False):
    """Cross entropy (M,), fp32, of the M hidden tokens, in the order of mask (B, L - len_0); the head runs on these alone.

    places (M,) int64: mask.flatten().nonzero() where the caller has it, since asking a GPU for it would stall its queue.
    """
    x = masked_features(params, labels, inputs, own_inputs, mask, keep=keep, checkpointing=checkpointing)
    places = mask.flatten().nonzero()[:, 0] if places is None else places
    first = tokens.shape[1] - mask.shape[1]
    x, targets = (whole[:, first:].flatten(0, 1).index_select(0, places) for whole in (x, tokens))
    return token_losses(x, targets, **params["masked"]["head"])


def token_losses(x, targets, weight, bias):
    """Cross entropy (N,) of targets (N,) under the logits of x (N, C); several slices are computed again in the backward pass."""
    def loss(x, targets):
        return F.cross_entropy(logits(x, weight, bias), targets, reduction="none")
    size = max(1, LOSS_SLICE // len(weight))
    if len(x) <= size:
        return loss(x, targets)
    return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in zip(x.split(size), targets.split(size))])


def scale_weights(scales, kind):
    """Weight of each token in the loss, (L,) fp32, summing to 1. ValueError on another kind.

    "token": all alike (VAR). "scale": all scales alike. "lognormal": scale k in proportion to the standard normal density at z_k, where z
    are the relative sides, reversed and standardised (HMAR); a scale's mass is shared equally by its tokens.
    """
    if kind not in ("token", "scale", "lognormal"):
        raise ValueError(f'kind: got {kind!r}, expected "token", "scale" or "lognormal"')
    counts = torch.tensor([h * w for h, w in scales], dtype=torch.float64)
    mass = counts if kind == "token" else torch.ones_like(counts)
    relative = (counts / counts[-1]).sqrt().flip(0)
    if kind == "lognormal" and (relative != 1).any():
        mass = torch.exp(-0.5 * ((relative - relative.mean()) / relative.std()).square())
    return (mass / mass.sum() / counts).repeat_interleave(counts.long()).float()


def stochastic_depth(uniform, rate):
    """Factors (B, depth, 2) of each block's two branches, from uniform (B, depth, 2) in [0, 1): 0 where dropped, else 1 / kept share."""
    kept = 1 - torch.linspace(0, rate, uniform.shape[1], device=uniform.device)[:, None]  # the rate rises linearly over blocks
    return (uniform < kept) / kept


def next_scale_features(params, labels, inputs, is_causal=False, *, only=None, cache=None, keep=None, checkpointing=False):
    """What the next-scale head's last product reads, (B, L, C) fp32. ValueError on shapes, dtypes or labels that do not fit the tree."""
    first, lengths = _checked_span(params, labels, inputs, only)
    if cache is not None:
        cache = [layer[:, :, :, :first + lengths[0]] for layer in cache]
    later = linear(inputs, **params["input"]) if only != 0 else None
    return branch_features(params, params["next_scale"], labels, later, lengths, only, is_causal, cache, keep, checkpointing)


def masked_features(params, labels, inputs, own_inputs, mask, *, only=None, keep=None, checkpointing=False):
    """What the masked head's last product reads, (B, L, C) fp32: in the place of a hidden token's own features, the mask embedding."""
    if "masked" not in params:
        raise ValueError("params: this tree has no masked branch; add_masked_branch makes one and `train.py masked` trains it")
    if only == 0:
        raise ValueError("only: got 0, which is never masked, expected None or a later scale")
    _, lengths = _checked_span(params, labels, inputs, only)
    if own_inputs.shape != inputs.shape or mask.shape != inputs.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"own_inputs, mask: got {tuple(own_inputs.shape)} and {mask.dtype} {tuple(mask.shape)}, expected "
                         f"{tuple(inputs.shape)} and bool {tuple(inputs.shape[:2])}")
    branch = params["masked"]
    own = linear(own_inputs, branch.get("own_input", params["input"]["weight"]))  # a published tree shares the input weight
    later = linear(inputs, **params["input"]) + torch.where(mask[..., None], branch["mask_embedding"].to(own.dtype), own)
    return branch_features(params, branch, labels, later, lengths, only, keep=keep, checkpointing=checkpointing)


def branch_features(params, branch, labels, later, lengths, only, is_causal=False, cache=None, keep=None, checkpointing=False):
    """Start tokens for scale 0, `later` (B, L - len_0, C) for others, plus level and position, through trunk and branch: (B, L, C) fp32."""
    condition = F.embedding(labels, params["classes"])  # (B, C)
    start = condition[:, None] + params["start"]  # (B, len_0, C)
    if only is None:
        places = torch.cat([position.flatten(0, 1) + level for position, level in zip(params["positions"], params["levels"])])
        x = torch.cat([start, later], 1) + places
    else:
        x = (start if only == 0 else later) + params["positions"][only].flatten(0, 1) + params["levels"][only]
    x = run_blocks(x, condition, params["trunk"] + branch["blocks"], lengths, is_causal, cache, keep, checkpointing)
    return modulate(wide(x), *head_modulation(condition, **branch["modulation"]))


def run_blocks(x, condition, blocks, lengths, is_causal=False, cache=None, keep=None, checkpointing=False):
    """x (B, L, C) through all blocks, with what belongs to each: its part of the cache, its factors from stochastic_depth."""
    for i, params in enumerate(blocks):
        arguments = (x, condition, lengths, is_causal, None if cache is None else cache[i], None if keep is None else keep[:, i])
        x = checkpoint(block, *arguments, use_reentrant=False, **params) if checkpointing else block(*arguments, **params)
    return x


def block(x, condition, lengths, is_causal, cache, keep, modulation, attention, mlp):
    """x (B, L, C), condition (B, C) -> (B, L, C): attention and MLP, each modulated by the class."""
    six = linear(F.silu(condition), **modulation).unsqueeze(1).chunk(6, -1)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six  # (B, 1, C) each, in the published order
    if keep is not None:  # (B, 2)
        gamma1, gamma2 = gamma1 * keep[:, 0, None, None], gamma2 * keep[:, 1, None, None]
    x = x + gamma1 * self_attention(modulate(x, scale1, shift1), lengths, is_causal, cache, **attention)
    return x + gamma2 * feed_forward(modulate(x, scale2, shift2), **mlp)


def self_attention(x, lengths, is_causal, cache, qkv, q_bias, v_bias, scale, project):
    """Multi-head attention with unit-length queries and keys; scale (heads,) is the log of each head's temperature, at most log 100."""
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = linear(x, qkv, bias).unflatten(-1, (3, len(scale), -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, head_dim) each
    q, k = of_length(scale.clamp(max=math.log(100)).exp()[:, None, None], q).to(v.dtype), of_length(1.0, k).to(v.dtype)
    if cache is None:
        out = block_sparse_attention(q, k, v, lengths, is_causal, scale=1.0)
    else:  # keys and values (2, B, heads, tokens up to here, head_dim), whose end this scale fills in
        cache[0, :, :, -k.shape[2]:], cache[1, :, :, -v.shape[2]:] = k, v
        out = F.scaled_dot_product_attention(q, cache[0], cache[1], scale=1.0)
    return linear(out.transpose(1, 2).flatten(2), **project)


def of_length(length, x):
    """x, scaled to a length along its last dimension, in fp32: F.normalize, but for a backward pass that is twice as fast on a CPU."""
    x = wide(x)
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12))


def feed_forward(x, expand, contract):
    """The MLP: four times the width, tanh-GELU."""
    return linear(F.gelu(linear(x, **expand), approximate="tanh"), **contract)


def linear(x, weight, bias=None):
    """In the weight's dtype, so that a tree from `cast` computes in bf16 with norms, softmax, residual stream and head in fp32."""
    return F.linear(x.to(weight.dtype), weight, bias)


def modulate(x, scale, shift):
    """Layer norm without weights of its own, scaled and shifted by the class."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def head_modulation(condition, weight, bias):
    """(scale, shift), (B, 1, C) each, fp32: what the class does to the last layer norm."""
    with torch.autocast(condition.device.type, enabled=False):
        return linear(F.silu(wide(condition)), weight, bias).unsqueeze(1).chunk(2, -1)


def logits(x, weight, bias):
    """The head's last product, in fp32 whatever surrounds it."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(wide(x), weight, bias)


def wide(x):
    """x in fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(params, dtype):
    """The same tree with its blocks' weights in dtype, but for the attention temperatures. Gradients pass through."""
    def move(path, tensor):
        names = [getattr(key, "key", None) for key in path]
        return tensor.to(dtype) if ("trunk" in names or "blocks" in names) and names[-1] != "scale" else tensor
    return pytree.tree_map_with_path(move, params)


def new_cache(params, batch):
    """Room for keys and values of the whole pyramid, (2, batch, heads, L, head_dim) a block: what VAR needs to sample and HMAR does not."""
    blocks, total = params["trunk"] + params["next_scale"]["blocks"], sum(h * w for h, w in scales(params))
    heads, width = len(blocks[0]["attention"]["scale"]), params["classes"].shape[1]
    return [block["attention"]["qkv"].new_empty(2, batch, heads, total, width // heads) for block in blocks]


def init(*, depth=16, classes=1000, codes=4096, code_dim=32, scales=SCALES[256], width=None, heads=None, gamma=None, seed=0):
    """A new tree for next-scale prediction, fp32, initialised as published; the sizes of VAR-d and HMAR-d follow from depth alone.

    width defaults to 64 * depth, heads to width / 64, gamma, which scales the branches' gates, to 1e-3, from depth 24 1e-4, from 30 1e-5.
    Under torch.device("meta") nothing is allocated. ValueError on sizes below 1 or a width that the heads do not divide.
    """
    width = 64 * depth if width is None else width
    heads = max(1, width // 64) if heads is None else heads
    if min(depth, classes, codes, code_dim, width, heads) < 1 or width % heads:
        raise ValueError(f"depth, classes, codes, code_dim, width, heads: got {(depth, classes, codes, code_dim, width, heads)}, "
                         "expected positive sizes and a width that the heads divide")
    scales = _pairs(scales)
    gamma = (1e-5 if depth >= 30 else 1e-4 if depth >= 24 else 1e-3) if gamma is None else gamma
    generator = None if torch.empty(0).is_meta else torch.Generator().manual_seed(seed)

    def normal(*shape, gain=1.0):
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=math.sqrt(1 / (3 * width)), generator=generator).mul_(gain)

    def affine(inputs, outputs, gain=1.0):
        return dict(weight=normal(outputs, inputs, gain=gain), bias=torch.zeros(outputs))

    def block():
        modulation = affine(width, 6 * width)
        modulation["weight"][:2 * width] *= gamma
        modulation["weight"][2 * width:] *= 0.5
        attention = dict(qkv=normal(3 * width, width), q_bias=torch.zeros(width), v_bias=torch.zeros(width),
                         scale=torch.full((heads,), math.log(4)), project=affine(width, width, 1 / math.sqrt(2 * depth)))
        return dict(modulation=modulation, attention=attention,
                    mlp=dict(expand=affine(width, 4 * width), contract=affine(4 * width, width, 1 / math.sqrt(2 * depth))))

    return dict(classes=normal(classes + 1, width), start=normal(scales[0][0] * scales[0][1], width), levels=normal(len(scales), width),
                positions=[normal(h, w, width) for h, w in scales], input=affine(code_dim, width), trunk=[block() for _ in range(depth)],
                next_scale=dict(blocks=[], modulation=affine(width, 2 * width, 0.5), head=affine(width, codes, 0.02)))


def add_masked_branch(params, blocks=8, own_input=True, seed=0):
    """The same tree with a masked branch: its last `blocks` blocks and head start as copies of the next-scale branch's, the rest is shared.

    own_input: with an input weight for a scale's own tokens, a copy of the shared one at first; the published model has none. ValueError if
    there is a branch already or the depth is less than `blocks`.
    """
    all_blocks = params["trunk"] + params["next_scale"]["blocks"]
    if "masked" in params or not 1 <= blocks <= len(all_blocks):
        raise ValueError(f"blocks: got {blocks}, expected 1 to {len(all_blocks)}, for a tree that has no masked branch yet")
    next_scale = params["next_scale"] | dict(blocks=all_blocks[-blocks:])
    embedding = torch.empty(params["classes"].shape[1], device="cpu")
    torch.nn.init.trunc_normal_(embedding, std=math.sqrt(1 / (3 * len(embedding))), generator=torch.Generator().manual_seed(seed))
    branch = pytree.tree_map(torch.clone, next_scale) | dict(mask_embedding=embedding.to(params["classes"]))
    if own_input:
        branch["own_input"] = params["input"]["weight"].clone()
    return params | dict(trunk=all_blocks[:-blocks], next_scale=next_scale, masked=branch)


def resize_positions(params, scales):
    """The same weights for other scales, as a start for fine-tuning at another resolution or shape; sampling without fine-tuning is poor.

    Each new scale takes after the old one of the nearest relative size: its positions, resampled bicubically, and its level embedding. The
    start tokens of scale 0 are resampled alike. ValueError unless scales are (height, width) pairs.
    """
    scales = _pairs(scales)

    def resample(grid, size):  # (h, w, C) -> (*size, C)
        return F.interpolate(grid.permute(2, 0, 1)[None].float(), size, mode="bicubic")[0].permute(1, 2, 0).to(grid.dtype).contiguous()
    old = [position.shape[:2] for position in params["positions"]]
    relative = torch.tensor([h * w / (old[-1][0] * old[-1][1]) for h, w in old]).sqrt()
    source = [int((relative - math.sqrt(h * w / (scales[-1][0] * scales[-1][1]))).abs().argmin()) for h, w in scales]
    start = resample(params["start"].unflatten(0, old[0]), scales[0]).flatten(0, 1)
    positions = [resample(params["positions"][k], size) for k, size in zip(source, scales)]
    return params | dict(start=start, levels=params["levels"][source], positions=positions)


PUBLISHED_NAMES = (  # patterns of our names, applied in order
    (r"^classes$", "class_emb.weight"), (r"^start$", "pos_start"), (r"^positions$", "pos_1LC"), (r"^levels$", "lvl_embed.weight"),
    (r"^input\.bias$", "word_embed_bias"), (r"^input\.", "word_embed."), (r"^trunk\.", "base_blocks."),
    (r"^masked\.mask_embedding$", "mask_embed.weight"), (r"^(next_scale|masked)\.modulation", r"\1.head_nm.modulation"),
    (r"^next_scale\.", "ns_"), (r"^masked\.", "mask_"), (r"modulation", "ada_lin.1"), (r"mlp\.expand", "ffn.fc1"),
    (r"mlp\.contract", "ffn.fc2"), (r"attention\.project", "attn.proj"), (r"attention\.qkv$", "attn.mat_qkv.weight"),
    (r"attention\.scale$", "attn.scale_mul_1H11"), (r"attention\.", "attn."))
ONE_BRANCH_NAMES = ((r"^base_blocks", "blocks"), (r"^ns_head", "head"), (r"^word_embed_bias", "word_embed.bias"))


def from_published(state_dict, scales=None, *, dtype=torch.float32):
    """A tree from the state dict of VAR, of HMAR after stage one, or of the combined HMAR with its masked branch; or a VAR trainer's file.

    scales may be left out for the published lengths of 680, 2240 and 9451 tokens. Persistent buffers are checked and dropped. ValueError
    lists what is missing, unexpected or of another shape, or says why scales do not fit.
    """
    state = _transformer_state(state_dict)
    combined = any(name.startswith(("ns_", "mask_")) for name in state)
    head, stacks = ("ns_head.bias", ("base_blocks", "ns_blocks")) if combined else ("head.bias", ("blocks",))
    sizes = ("class_emb.weight", "word_embed.weight", "pos_1LC", "pos_start", head)
    if missing := [name for name in sizes if not torch.is_tensor(state.get(name))]:
        raise ValueError("state_dict: expected VAR, HMAR after stage one or the combined HMAR, "
                         f"got {type(state_dict).__name__} with {', '.join(list(state)[:10]) or 'no names'}, without {', '.join(missing)}")
    scales = _published_scales(state, scales)
    buffers = r"lvl_1L|attn_bias_for_masking|.*\.attn\.zero_k_bias"
    state = {name: tensor for name, tensor in state.items() if not re.fullmatch(buffers, name)}

    def count(stack):
        return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
    width = state["pos_1LC"].shape[-1]
    heads = max((tensor.numel() for name, tensor in state.items() if name.endswith(".attn.scale_mul_1H11")), default=1)
    with torch.device("meta"):  # a tree of these sizes; at least one block, where there is none it is told as missing
        template = init(depth=max(1, sum(map(count, stacks))), classes=len(state["class_emb.weight"]) - 1, codes=len(state[head]),
                        code_dim=state["word_embed.weight"].shape[1], scales=scales, width=width, heads=heads if width % heads == 0 else 1)
        template = add_masked_branch(template, max(1, count("mask_blocks")), own_input=False) if combined else template
        template["positions"] = torch.empty(state["pos_1LC"].shape[1], width)  # published in one row
    names = {}  # published name -> the template's tensor
    for path, tensor in pytree.tree_flatten_with_path(template)[0]:
        name = ".".join(re.findall(r"\w+", pytree.keystr(path)))
        for pattern, published in PUBLISHED_NAMES + (() if combined else ONE_BRANCH_NAMES):
            name = re.sub(pattern, published, name)
        names[name] = tensor
    problems = [f"{name} is missing" for name in names if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in names]
    problems += [f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}" for name, tensor in names.items()
                 if name in state and state[name].squeeze().shape != tensor.squeeze().shape]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"state_dict: does not fit the published transformer: {', '.join(problems[:10])}{more}")
    leaves = [state[name].to(dtype).reshape(tensor.shape) for name, tensor in names.items()]
    params = pytree.tree_unflatten(leaves, pytree.tree_structure(template))
    positions = params["positions"].split([h * w for h, w in scales])
    return params | dict(positions=[position.unflatten(0, size) for position, size in zip(positions, scales)])


def published_is_causal(state_dict):
    """Whether published weights come with VAR's block-causal mask: True, False (HMAR's block-diagonal one), or None without a mask."""
    mask = _transformer_state(state_dict).get("attn_bias_for_masking")
    return None if mask is None else bool(mask[0, 0, -1, 0] == 0)  # may the last token see the first one


def _transformer_state(state_dict):
    """The state dict itself, or the transformer's in a VAR trainer's file; {} for anything else."""
    for name in ("trainer", "var_wo_ddp"):
        state_dict = state_dict.get(name, state_dict) if isinstance(state_dict, dict) else {}
    return {str(name): tensor for name, tensor in state_dict.items()} if isinstance(state_dict, dict) else {}


def _published_scales(state, scales):
    """The scales of a published state, by default those of its length. ValueError where its positions or its buffers say something else."""
    total, first = state["pos_1LC"].shape[1], state["pos_start"].shape[1]
    known = {sum(h * w for h, w in published): published for published in SCALES.values()}
    if scales is None and total not in known:
        raise ValueError(f"scales: must be given for {total} tokens; known are the published lengths, {', '.join(map(str, known))}")
    scales = _pairs(known[total] if scales is None else scales)
    counts = [h * w for h, w in scales]
    if sum(counts) != total or counts[0] != first:
        raise ValueError(f"scales: {scales} hold {sum(counts)} tokens, the first {counts[0]}; these weights have {total} and {first}")
    levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if "lvl_1L" in state and not torch.equal(state["lvl_1L"].flatten().cpu(), levels):
        raise ValueError(f"scales: {scales} do not match the levels stored with these weights (lvl_1L)")
    if "attn_bias_for_masking" in state:
        visible, masks = state["attn_bias_for_masking"][0, 0].cpu() == 0, (levels[:, None] == levels, levels[:, None] >= levels)
        if not any(torch.equal(visible, mask) for mask in masks):
            raise ValueError("state_dict: attn_bias_for_masking is neither block-diagonal nor block-causal over the scales")
    if any(tensor.any() for name, tensor in state.items() if name.endswith(".attn.zero_k_bias")):
        raise ValueError("state_dict: attn.zero_k_bias is not zero")
    return scales


def _pairs(scales):
    """scales as a tuple of pairs. ValueError unless they are (height, width) pairs of positive integers."""
    pairs = isinstance(scales, (tuple, list)) and all(isinstance(size, (tuple, list)) and len(size) == 2 for size in scales)
    if not pairs or not scales or any(not isinstance(side, int) or side < 1 for size in scales for side in size):
        raise ValueError(f"scales: got {scales}, expected (height, width) pairs of positive integers")
    return tuple(tuple(size) for size in scales)


def _checked_span(params, labels, inputs, only):
    """(first token, lengths) of the scales that a call computes: all, or scale `only`. ValueError where an argument does not fit."""
    null, counts = len(params["classes"]) - 1, [h * w for h, w in scales(params)]
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 (B,)")
    # on an accelerator a look at the values would stall its queue
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels) and not 0 <= labels.min() <= labels.max() <= null:
        raise ValueError(f"labels: got values from {labels.min()} to {labels.max()}, expected 0 to {null}, the null class")
    if only is not None and not 0 <= only < len(counts):
        raise ValueError(f"only: got {only}, expected None or a scale from 0 to {len(counts) - 1}")
    expected = (len(labels), sum(counts[1:]) if only is None else counts[only], params["input"]["weight"].shape[1])
    if only != 0 and not (torch.is_tensor(inputs) and inputs.is_floating_point() and inputs.shape == expected):
        got = (inputs.dtype, tuple(inputs.shape)) if torch.is_tensor(inputs) else inputs
        raise ValueError(f"inputs: got {got}, expected floats {expected}")
    return (0, counts) if only is None else (sum(counts[:only]), counts[only:only + 1])
