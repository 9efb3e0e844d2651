"""Compare the speed of p-adapters with that of the authors' program, in one process.

python tools/measure_p_adapter.py REPOSITORY [repeats]; REPOSITORY is a git directory of
wuhy68/p-Adapter. Its file of BLIP's text decoder runs as released but for two missing lines of the
attention, which are put in; a module that it imports and never uses is left empty.

One step is forward and backward of one adapted attention with residual connection and
normalisation, at BLIP's size: width 768, 12 heads, hidden size 96, float32. All sides alternate;
processor times are compared, since the machine may be busy with other things. `key_values_ms` is
the time of one product that every side needs, that of the keys and values, forward only.
`released_products_ms` and `paper_products_ms` are the times of all matrix products that a training
step of the form cannot do without, on random numbers and with nothing between them: no softmax, no
logarithm, no copy. No program of the form on this machine is faster.
"""

import json
import subprocess
import sys
import time
import types
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from vlmadapt.core.environment import device_name
from vlmadapt.models.adapters import AdapterLayer, PAdapterLayer, ReleasedAdapterLayer, Site
from vlmadapt.models.blocks import AdaptedAttention

COMMIT = "e66ab8b7aa929bc4b3d3600d36faa2f989243530"
WIDTH, HEADS, HIDDEN, POOL, MU, P = 768, 12, 96, 16, 0.1, 1.25
SIZES = [("self", 40, 40), ("cross", 40, 197), ("cross", 40, 577), ("self", 197, 197)]
MISSING = {
    "        if is_cross_attention:\n            mixed_key_layer = self.key(encoder": (
        "        mixed_query_layer = self.query(hidden_states)\n"
    ),
    "        query_layer = self.transpose_for_scores(mixed_query_layer)\n": (
        "        key_layer = self.transpose_for_scores(mixed_key_layer)\n"
    ),
}


def official_attention(repository):
    """Return the authors' class of an adapted attention."""
    place = f"{COMMIT}:eff_blip/eff_modeling_blip.py"
    command = ["git", f"--git-dir={repository}", "show", place]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line, before in MISSING.items():
        assert text.count(line) == 1, line
        text = text.replace(line, before + line)
    start = text.index("class BertSelfAttention")
    text = text[start : text.index("class BertIntermediate")]
    space = {"torch": torch, "nn": nn, "F": F, "math": __import__("math")}
    exec(compile(text, place, "exec"), space)
    return space["BertAttention"]


def settings():
    """Return the configuration that the authors' class reads."""
    return types.SimpleNamespace(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        encoder_width=WIDTH,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        add_text_laplacian_adapter=True,
        add_text_attn_adapter=False,
        text_laplacian_adapter_reduction_factor=WIDTH // HIDDEN,
        image_sample_len=POOL,
        learnable_p=True,
        laplacian_adapter_p_cross=P,
        laplacian_adapter_p_self=P,
        laplacian_adapter_mu=MU,
    )


def own_attention(official, kind, form):
    """Return our adapted attention with the authors' weights."""
    frozen = official.self
    mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    parts = (frozen.query, frozen.key, frozen.value)
    mha.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    mha.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    mha.out_proj.load_state_dict(official.output.dense.state_dict())
    mha.requires_grad_(False)
    site = Site(kind=kind, width=WIDTH, heads=HEADS)
    if form == "adapter":
        return AdaptedAttention(mha, AdapterLayer(site, hidden=HIDDEN))
    if form == "paper":
        return AdaptedAttention(mha, PAdapterLayer(site, hidden=HIDDEN, p=P, mu=MU))
    adapter = ReleasedAdapterLayer(site, hidden=HIDDEN, p=P, mu=MU, pool=POOL)
    for own, theirs in {"down": "i", "up": "o", "gate": "gate"}.items():
        layer = getattr(official.output, f"text_laplacian_adapter_{theirs}")
        getattr(adapter, own).load_state_dict(layer.state_dict())
    return AdaptedAttention(mha, adapter)


def products(kind, form, n1, n2, batch):
    """Return the sizes (count, m, k, n) of the matrix products of a training step."""
    tokens, pairs = batch * n1, batch * HEADS
    head = WIDTH // HEADS
    scores, values = (pairs, n1, head, n2), (pairs, n1, n2, head)
    found = [(1, batch * n2, WIDTH, 2 * WIDTH)]  # keys and values
    found += 4 * [(1, tokens, WIDTH, WIDTH)]  # queries and output, with their gradients
    found += [scores, values, values, scores]  # attention, with the gradients of rows and queries
    narrow = [(1, tokens, WIDTH, HIDDEN), (1, tokens, HIDDEN, WIDTH), (1, WIDTH, tokens, HIDDEN)]
    found += 2 * narrow if form == "paper" else 3 * narrow
    if form == "paper":
        found += [scores, values, (pairs, n2, head, head)]  # distances in the metric
    if kind == "self":  # keys and values have gradients too
        back = (pairs, n2, n1, head)
        found += [(1, tokens, 2 * WIDTH, WIDTH), back, back]
        found += [back, (pairs, n2, head, head)] if form == "paper" else []
    return found


def multiply(sizes):
    """Return a function that computes products of these sizes."""
    generator = torch.Generator().manual_seed(0)
    operands = []
    for count, m, k, n in sizes:
        shapes = (count, m, k), (count, k, n)
        operands.append([torch.randn(*shape, generator=generator) for shape in shapes])

    def run():
        for a, b in operands:
            torch.bmm(a, b)

    return run


def steps(attention, kind, n1, n2, batch):
    """Return a training step of the authors' form and of each of ours, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n1, WIDTH, generator=generator, requires_grad=True)
    memory = torch.randn(batch, n2, WIDTH, generator=generator)
    torch.manual_seed(0)
    official = attention(settings(), 0, is_cross_attention=kind == "cross")
    for name, parameter in official.named_parameters():
        parameter.requires_grad_("adapter" in name)
    encoder = memory if kind == "cross" else None
    causal = torch.ones(n1, n1, dtype=torch.bool).triu(1) if kind == "self" else None
    added = None if causal is None else -10000.0 * causal

    def theirs():
        return official(x, added, encoder_hidden_states=encoder)[0]

    def ours(module):
        source = x if kind == "self" else memory
        out = module(x, source, source, need_weights=False, attn_mask=causal)[0]
        return official.output.LayerNorm(out + x)

    found = {"official": theirs}
    for form in ("released", "paper", "adapter"):
        module = own_attention(official, kind, form)
        found[form] = lambda module=module: ours(module)
    source = x.detach() if kind == "self" else memory
    weight = torch.cat([official.self.key.weight, official.self.value.weight]).requires_grad_()
    found["key_values"] = lambda: F.linear(source, weight)
    for form in ("released", "paper"):
        found[f"{form}_products"] = multiply(products(kind, form, n1, n2, batch))
    gap = (found["released"]() - theirs()).abs().max().item()
    assert gap < 1e-4, gap
    return found


def measure(found, repeats):
    """Return the median processor time of each step in milliseconds, all taking turns."""
    times = {name: [] for name in found}
    for _ in range(repeats):
        for name, forward in found.items():
            start = time.process_time()
            out = forward()
            if name in ("official", "released", "paper", "adapter"):
                out.square().mean().backward()
            times[name].append(1000 * (time.process_time() - start))
    return {name: median(values[2:]) for name, values in times.items()}


def main(repository, repeats=25, batch=8):
    torch.set_num_threads(1)
    attention = official_attention(repository)
    rows = []
    for kind, n1, n2 in SIZES:
        spent = measure(steps(attention, kind, n1, n2, batch), repeats)
        row = dict(attention=kind, queries=n1, keys=n2)
        row |= {f"{name}_ms": round(value, 2) for name, value in spent.items()}
        for form in ("released", "paper", "adapter"):
            row[f"{form}_speedup"] = round(spent["official"] / spent[form], 2)
        for form in ("released", "paper"):
            limit = spent["official"] / spent[f"{form}_products"]
            row[f"{form}_limit"] = round(limit, 2)  # of the speedup, from the products alone
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    conditions = dict(width=WIDTH, heads=HEADS, hidden=HIDDEN, pool=POOL, batch=batch)
    conditions["step"] = "training: forward and backward"
    conditions |= dict(repeats=repeats, threads=1, dtype="float32", torch=torch.__version__)
    conditions |= dict(clock="processor time, median", official=COMMIT)
    conditions |= dict(device=device_name(), instructions=torch.backends.cpu.get_cpu_capability())
    print(json.dumps(dict(conditions=conditions, rows=rows), indent=1))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
