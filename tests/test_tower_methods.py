"Methods that train parts of CLIP's towers: official numbers, counts, schedules and savings."

import pytest
from golden_clip import load_golden
from torch import nn

from vlmadapt.core.seeding import stream
from vlmadapt.models.adapted_models import TowerBlock
from vlmadapt.models.blocks import causal_mask
from vlmadapt.models.lora_prefix import PROJECTIONS, LowRankBranch, add_branches

LETTERS = dict(q="query", k="key", v="value", o="output")


def relative(found, expected):
    "The largest difference, relative to the largest entry."
    return float((found.detach() - expected).abs().max() / expected.abs().max())


# CLIP-LoRA's attention


def golden_attention(golden, metadata, case, parts):
    "An attention of the file, with the branches of one case."
    attn = nn.MultiheadAttention(32, int(metadata["heads"]), batch_first=True).double()
    names = {
        "in_proj_weight": golden["in_proj_weight"],
        "in_proj_bias": golden["in_proj_bias"],
        "out_proj.weight": golden["out_proj_weight"],
        "out_proj.bias": golden["out_proj_bias"],
    }
    attn.load_state_dict(names)
    attn.requires_grad_(False)
    rank = len(golden[f"{case}.A_{parts[0]}"])
    alpha = float(golden[f"{case}.scaling"]) * rank**0.5
    branch = LowRankBranch(32, rank, alpha, [LETTERS[p] for p in parts], 0.0, stream(1, "lora"))
    branch.double()
    for n, part in enumerate(parts):
        branch.A.data[n] = golden[f"{case}.A_{part}"]
        branch.B.data[n] = golden[f"{case}.B_{part}"]
    holder = nn.Module()
    holder.attn = attn
    add_branches(TowerBlock("golden", "self", 1, holder), branch)
    return holder.attn


@pytest.mark.parametrize("case", ["r2a1qkv", "r4a8qkvo", "r4a8qk_causal"])
def test_clip_lora_attention_is_the_official_one(case):
    golden, metadata = load_golden("clip_lora")
    parts = case.removeprefix("r2a1").removeprefix("r4a8").removesuffix("_causal")
    attn = golden_attention(golden, metadata, case, parts)
    x = golden["x"]
    mask = causal_mask(x.shape[1])[0] if case.endswith("causal") else None
    output = attn(x, x, x, attn_mask=mask)[0]
    assert relative(output, golden[f"{case}.output"]) < 1e-12
    (output * golden["weight"]).sum().backward()
    for n, part in enumerate(parts):
        for letter, parameter in (("A", attn.branch.A), ("B", attn.branch.B)):
            name = f"{case}.grad_{letter}_{part}"
            if name in golden:
                assert relative(parameter.grad[n], golden[name]) < 1e-12, name
    update = attn.branch.update(PROJECTIONS["query"])
    assert relative(update, golden[f"{case}.delta_q"]) < 1e-12
    assert relative(attn.merged()(x, x, x, attn_mask=mask)[0], golden[f"{case}.output"]) < 1e-12
