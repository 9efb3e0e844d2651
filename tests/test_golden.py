"""Outputs, gradients and rules of official programs, against the classes of the library.

Every number is computed in float64. A difference is measured relative to the largest entry of the
expected array; `EXACT` is what float64 allows, other tolerances are named where they stand.
"""

import pytest
import torch
import torch.nn.functional as F
from golden_clip import golden_clip, golden_problem, load_golden
from torch import nn

from vlmadapt.methods import METHODS
from vlmadapt.methods.base import Method
from vlmadapt.methods.generation import GENERATION_METHODS
from vlmadapt.methods.graph_adapter import visual_nodes
from vlmadapt.methods.proto_clip import layer_shapes
from vlmadapt.methods.task_res import raw_text
from vlmadapt.models.adapters import ReleasedAdapterLayer, Site
from vlmadapt.models.blocks import AdaptedAttention
from vlmadapt.problems.batches import Batch, Batches, TaskBatches
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.generation import load_task
from vlmadapt.training.batched import fit_many
from vlmadapt.training.loop import fit
from vlmadapt.training.paper_protocol import PAPER_RULES, SEARCH_ENDS, as_released, tip_adapter_grid
from vlmadapt.training.tuning import hold_out

EXACT = 1e-12  # relative, of float64
SINGLE = 1e-6  # relative, where the file holds numbers rounded to float32


@pytest.fixture(scope="module")
def clip():
    return golden_clip()


def assert_close(found, expected, relative=EXACT):
    expected = torch.as_tensor(expected).double()
    found = found.detach().double()
    assert found.shape == expected.shape
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert difference <= relative, f"relative difference {difference:.1e}, allowed {relative:.0e}"


def put(parameter, value):
    assert parameter.shape == value.shape
    parameter.data = value.double().clone()


def class_names(count):
    return [f"class {k}" for k in range(count)]


def from_arrays(text, train=None, **kwargs):
    return FewShotProblem.from_features(class_names(len(text)), text, train=train, **kwargs)


def gradients(method, batch, *parameters):
    "The loss of `batch` and its gradients."
    loss = method.loss(batch)
    return loss, torch.autograd.grad(loss, parameters)


# Methods on frozen features


def test_tip_adapter():
    golden, _ = load_golden("tip_adapter")
    problem = from_arrays(golden["text"], (golden["views"], golden["labels"]))
    method = fit(METHODS["TipAdapter"](problem), problem)
    assert_close(method.keys, golden["keys"])
    for alpha, beta, logits in zip(golden["alpha"], golden["beta"], golden["logits"], strict=True):
        method.set(alpha=alpha, beta=beta)
        assert_close(method.logits(Batch(golden["queries"])), logits)


def tip_adapter_f(golden, metadata, **given):
    problem = from_arrays(golden["text"], (golden["views"], golden["labels"]))
    names = ("lr", "weight_decay", "eps")
    settings = {name: float(metadata[name]) for name in names} | given
    alpha, beta = float(metadata["alpha"]), float(metadata["beta"])
    weights = {"alpha": alpha, "beta": beta, "alpha_train": alpha, "beta_train": beta}
    batch = Batch(golden["batch"], golden["labels"], torch.arange(len(golden["labels"])))

    class OneBatch(METHODS["TipAdapterF"]):
        "Each epoch is one step on the batch of the file."

        def batches(self, problem, seed):
            return [batch]

    epochs = int(metadata["steps"])
    return OneBatch(problem, **weights, **settings, epochs=epochs), problem, batch


def test_tip_adapter_f_at_the_start():
    golden, metadata = load_golden("tip_adapter_f")
    method, _, batch = tip_adapter_f(golden, metadata)
    assert_close(method.keys, golden["keys"])
    assert_close(method.logits(batch), golden["train_logits"])
    loss, (gradient,) = gradients(method, batch, method.keys)
    assert_close(loss, golden["loss"][0])
    assert_close(gradient, golden["grad_keys"])


def test_tip_adapter_f_trained_by_fit():
    "Three steps of AdamW with weight decay, eps 1e-4 and a cosine."
    golden, metadata = load_golden("tip_adapter_f")
    method, problem, _ = tip_adapter_f(golden, metadata)
    keys, logits = [], []

    def look(epoch):
        keys.append(method.keys.detach().clone())
        logits.append(method.logits(Batch(golden["queries"])).detach())

    fit(method, problem, progress=False, after_epoch=look)
    assert_close(torch.stack(keys), golden["weights"])
    assert_close(torch.stack(logits), golden["logits_after"])
    losses = torch.tensor([entry["loss"] for entry in method.log], dtype=torch.float64)
    assert_close(losses, golden["loss"])


def test_tip_adapter_f_with_unit_keys():
    "The gradient of unit keys is the released one without its part along the keys."
    golden, metadata = load_golden("tip_adapter_f")
    method, _, batch = tip_adapter_f(golden, metadata, unit_keys=True)
    loss, (gradient,) = gradients(method, batch, method.keys)
    assert_close(loss, golden["loss"][0])
    keys, released = golden["keys"], golden["grad_keys"]
    tangent = released - (released * keys).sum(1, keepdim=True) * keys
    assert_close(gradient, tangent)


def test_tip_adapter_f_defaults_are_the_released_ones():
    defaults = METHODS["TipAdapterF"].defaults()
    released = {"unit_keys": False, "drop_last": False, "eps": 1e-4, "weight_decay": 0.01}
    assert {name: defaults[name] for name in released} == released


def test_clip_adapter():
    golden, metadata = load_golden("clip_adapter")
    problem = from_arrays(golden["raw_text"])
    assert_close(problem.features.text, golden["text"])
    method = METHODS["CLIPAdapter"](problem, ratio=float(metadata["ratio"]))
    put(method.V, golden["down"])
    put(method.U, golden["up"])
    batch = Batch(golden["queries"], golden["query_labels"])
    assert_close(method.logits(batch), golden["logits"])
    loss, (down, up) = gradients(method, batch, method.V, method.U)
    assert_close(loss, golden["loss"])
    assert_close(down, golden["grad_down"])
    assert_close(up, golden["grad_up"])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_task_res_on_raw_text(alpha):
    golden, _ = load_golden("taskres")
    method = METHODS["TaskRes"](from_arrays(golden["raw_text"]), alpha=alpha, text_norm="raw")
    put(method.X, golden["residual"])
    batch = Batch(golden["queries"], golden["query_labels"])
    assert_close(method.logits(batch), golden[f"logits_{alpha}"])
    loss, (gradient,) = gradients(method, batch, method.X)
    assert_close(loss, golden[f"loss_{alpha}"])
    assert_close(gradient, golden[f"grad_{alpha}"])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_task_res_on_unit_text(alpha):
    "Unit rows with X/|t| give the released logits, and |t| times the released gradient."
    golden, _ = load_golden("taskres")
    length = golden["raw_text"].norm(dim=1, keepdim=True)
    method = METHODS["TaskRes"](from_arrays(golden["raw_text"]), alpha=alpha)
    put(method.X, golden["residual"] / length)
    batch = Batch(golden["queries"], golden["query_labels"])
    assert_close(method.logits(batch), golden[f"logits_{alpha}"])
    loss, (gradient,) = gradients(method, batch, method.X)
    assert_close(loss, golden[f"loss_{alpha}"])
    assert_close(gradient / length, golden[f"grad_{alpha}"])


def test_raw_text_is_refused_where_only_unit_rows_were_given():
    golden, _ = load_golden("taskres")
    for name in ("TaskRes", "GraphAdapter"):
        problem = from_arrays(golden["text"], (golden["text"], torch.arange(10)))
        with pytest.raises(ValueError, match="text features of unit length only") as refused:
            METHODS[name](problem, text_norm="raw")
        assert "\n" not in str(refused.value)


GRAPH_CASES = [("beta0.7", 0.7, "unit", 1), ("beta0.3", 0.3, "unit", 1)]
GRAPH_CASES += [("beta0.7_raw8", 0.7, "raw", 8)]


@pytest.mark.parametrize("case, beta, text_norm, length", GRAPH_CASES)
def test_graph_adapter(case, beta, text_norm, length):
    "One image per class stands for the image nodes; raw nodes are 8 times as long."
    golden, metadata = load_golden("graph_adapter")
    text, nodes = length * golden["text"], length * golden["image_nodes"]
    problem = from_arrays(text, (nodes, torch.arange(len(nodes))))
    assert_close(visual_nodes(problem, text_norm), nodes)
    alpha = float(metadata["alpha"])
    method = METHODS["GraphAdapter"](problem, alpha=alpha, beta=beta, text_norm=text_norm)
    put(method.W, torch.stack([golden["W_tt"], golden["W_it"]]))
    put(method.b, torch.stack([golden["b_tt"], golden["b_it"]]))
    batch = Batch(golden["queries"], golden["query_labels"])
    assert_close(method.logits(batch), golden[f"logits_{case}"])
    loss, (weight, bias) = gradients(method, batch, method.W, method.b)
    assert_close(loss, golden[f"loss_{case}"])
    for graph, name in enumerate(("tt", "it")):
        assert_close(weight[graph], golden[f"grad_W_{name}_{case}"])
        assert_close(bias[graph], golden[f"grad_b_{name}_{case}"])


def test_gda():
    "The official log prior is float32 and the precision a pseudo-inverse: exact to 1e-7."
    golden, _ = load_golden("gda")
    problem = from_arrays(golden["text"], (golden["views"], golden["labels"]))
    method = fit(METHODS["GDA"](problem), problem)
    assert_close(method.W.T, golden["W"], 1e-7)
    assert_close(method.b, golden["b"], 1e-7)
    for alpha, logits in zip(golden["alpha"], golden["logits"], strict=True):
        method.set(alpha=alpha)
        assert_close(method.logits(Batch(golden["queries"])), logits, 1e-7)


def proto_clip(golden, adapter, width=16, **given):
    problem = from_arrays(golden[f"text_{width}"], (golden[f"views_{width}"], golden["labels"]))
    return METHODS["ProtoCLIP"](problem, adapter=adapter, **given)


PROTO_ADAPTERS = {"conv3x": "conv-3x", "conv2x": "conv-2x", "fc": "fc", "none": "none"}


@pytest.mark.parametrize("case", PROTO_ADAPTERS)
def test_proto_clip(case):
    "Gradients are stored in float32."
    golden, _ = load_golden("proto_clip")
    method = proto_clip(golden, PROTO_ADAPTERS[case], alpha_train=0.5, beta_train=12.0)
    layers = range(len(layer_shapes(PROTO_ADAPTERS[case], 16)))
    names = [
        (f"{short}{i}", f"{case}.layer{i}", long)
        for i in layers
        for short, long in (("w", "weight"), ("g", "ln_weight"), ("s", "ln_bias"))
    ]
    for own, layer, entry in names:
        put(method.layers[own], golden[f"{layer}.{entry}"])
    image, text = method.prototypes()
    assert_close(image, golden["image_prototypes_16"])
    assert_close(text, golden["text_16"])
    queries = golden["queries_16"]
    assert_close(method.query(queries), golden[f"{case}.unit_queries"])
    for alpha, beta, log_p in zip(
        golden["alpha"], golden["beta"], golden[f"{case}.log_p"], strict=True
    ):
        method.set(alpha=alpha, beta=beta)
        assert_close(method.logits(Batch(queries)), log_p)
    loss = method.loss(Batch(queries, golden["query_labels"]))
    assert_close(loss, golden[f"{case}.loss"])
    loss.backward()
    for own, layer, entry in names:
        assert_close(method.layers[own].grad, golden[f"{layer}.grad_{entry}"], SINGLE)


def test_proto_clip_of_a_width_that_is_no_square():
    "Exception: the released class pads 24 numbers to 5 x 5, the library takes 4 x 6 unpadded."
    golden, _ = load_golden("proto_clip")
    assert tuple(golden["conv3x_pad24.layer0.ln_weight"].shape) == (16, 5, 5)
    assert layer_shapes("conv-3x", 24)[0][1] == (16, 4, 6)
    method = proto_clip(golden, "none", width=24)
    assert_close(method.prototypes()[0], golden["image_prototypes_24"])


# Methods that train prompts


def test_towers_and_tokenizer(clip):
    golden, metadata = load_golden("clip_tiny")
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in metadata["classnames"]]
    tokens = clip.tokenizer(sentences)
    assert torch.equal(tokens, golden["tokens"])
    with torch.no_grad():
        text = clip.model.encode_text(tokens)
        image = clip.model.encode_image(golden["images"])
    assert_close(text, golden["text_features"])
    assert_close(F.normalize(text, dim=-1), golden["text_features_unit"])
    assert_close(image, golden["image_features"])
    assert_close(clip.encode_text(sentences), golden["text_features"], SINGLE)


def check(method, batch, golden, prefix="", **parameters):
    "Compare scores, loss and gradients; `parameters` are names of gradients in the file."
    assert_close(method.logits(batch), golden[f"{prefix}logits"])
    loss, found = gradients(method, batch, *parameters.values())
    assert_close(loss, golden[f"{prefix}loss"])
    for name, gradient in zip(parameters, found, strict=True):
        assert_close(gradient, golden[f"{prefix}{name}"])


def features_batch():
    golden, _ = load_golden("clip_tiny")
    return Batch(golden["image_features"], golden["labels"])


def pixel_batch():
    golden, _ = load_golden("clip_tiny")
    return Batch(golden["images"], golden["labels"])


COOP_CASES = [("end", False)] + [(place, True) for place in ("end", "middle", "front")]


@pytest.mark.parametrize("kind", ["generic", "class"])
@pytest.mark.parametrize("place, safe", COOP_CASES)
def test_coop(clip, place, safe, kind):
    golden, metadata = load_golden("coop")
    names = metadata["safe_classnames" if safe else "classnames"]
    problem = golden_problem(names, clip)
    n = int(metadata["n_ctx"])
    method = METHODS["CoOp"](problem, n_ctx=n, place=place, class_specific=kind == "class")
    put(method.context, golden[f"ctx_{kind}"])
    case = f"{place}_{kind}" + ("_safe" if safe else "")
    batch = features_batch()
    assert_close(method.logits(batch), golden[f"logits_{case}"])
    loss, (gradient,) = gradients(method, batch, method.context)
    assert_close(loss, golden[f"loss_{case}"])
    assert_close(gradient, golden[f"grad_{case}"])


def test_coop_from_words(clip):
    golden, metadata = load_golden("coop")
    problem = golden_problem(metadata["classnames"], clip)
    method = METHODS["CoOp"](problem, n_ctx=int(metadata["n_ctx"]), words=None).double()
    assert_close(method.context, golden["ctx_words"])
    assert_close(method.logits(features_batch()), golden["logits_words"])


def test_cocoop(clip):
    golden, metadata = load_golden("cocoop")
    method = METHODS["CoCoOp"](golden_problem(metadata["classnames"], clip))
    assert_close(method.context, golden["ctx_start"])
    hidden, _, out = method.meta
    own = {
        "ctx": method.context,
        "w1": hidden.weight,
        "b1": hidden.bias,
        "w2": out.weight,
        "b2": out.bias,
    }
    for name, parameter in own.items():
        put(parameter, golden[name])
    check(method, features_batch(), golden, **{f"grad_{name}": p for name, p in own.items()})


@pytest.mark.parametrize("n, depth", [(4, 3), (4, 1), (2, 2)])
def test_vpt(clip, n, depth):
    "Exception: the library encodes the fixed sentence in float32, so the text is given."
    golden, metadata = load_golden("vpt")
    names = metadata["classnames"]
    method = METHODS["VPT"](golden_problem(names, clip), n_ctx=n, depth=depth)
    assert_close(method.text(names), golden["text"], SINGLE)
    method.fixed[tuple(names)] = golden["text"]
    prefix = f"n{n}d{depth}."
    put(method.V, golden[f"{prefix}prompts"])
    check(method, pixel_batch(), golden, prefix, grad=method.V)


@pytest.mark.parametrize("n_text, n_image, depth", [(4, 4, 2), (2, 4, 2), (2, 2, 3)])
def test_independent_prompts(clip, n_text, n_image, depth):
    golden, metadata = load_golden("ivlp")
    problem = golden_problem(metadata["classnames"], clip)
    after = "" if n_text == 4 else "of a"
    settings = {"depth": depth, "n_ctx": n_text, "n_vision": n_image, "after": after}
    method = METHODS["MuDPT"](problem, injection="none", **settings)
    prefix = f"t{n_text}d{depth}v{n_image}d{depth}."
    put(method.T, golden[f"{prefix}text_prompts"])
    put(method.V, golden[f"{prefix}image_prompts"])
    check(method, pixel_batch(), golden, prefix, grad_text=method.T, grad_image=method.V)


def test_independent_prompts_in_text_only(clip):
    golden, metadata = load_golden("ivlp")
    method = METHODS["CoOp"](golden_problem(metadata["classnames"], clip), n_ctx=4, depth=3)
    prefix = "t4d3v0d0."
    prompts = golden[f"{prefix}text_prompts"]
    put(method.context, prompts[0])
    put(method.deep, prompts[1:])
    batch = features_batch()
    assert_close(method.logits(batch), golden[f"{prefix}logits"])
    loss, (first, deep) = gradients(method, batch, method.context, method.deep)
    assert_close(loss, golden[f"{prefix}loss"])
    assert_close(torch.cat([first[None], deep]), golden[f"{prefix}grad_text"])


@pytest.mark.parametrize("n, depth", [(2, 3), (4, 2), (2, 1)])
def test_maple(clip, n, depth):
    "Gradients of the projections' weights are stored in float32."
    golden, metadata = load_golden("maple")
    method = METHODS["MaPLe"](golden_problem(metadata["classnames"], clip), n_ctx=n, depth=depth)
    prefix = f"n{n}d{depth}."
    put(method.T, golden[f"{prefix}text_prompts"])
    layers = method.to_vision.out
    for i, layer in enumerate(layers):
        put(layer.weight, golden[f"{prefix}proj_weight"][i])
        put(layer.bias, golden[f"{prefix}proj_bias"][i])
    check(method, pixel_batch(), golden, prefix, grad_text_prompts=method.T)
    method.loss(pixel_batch()).backward()
    weights = torch.stack([layer.weight.grad for layer in layers])
    assert_close(weights, golden[f"{prefix}grad_proj_weight"], SINGLE)
    biases = torch.stack([layer.bias.grad for layer in layers])
    assert_close(biases, golden[f"{prefix}grad_proj_bias"])


TRANSFORMER = {
    "self_attn.ln_1": "ln_1",
    "self_attn.ln_2": "ln_2",
    "self_attn.attn": "attn",
    "self_attn.mlp.c_fc": "up",
    "self_attn.mlp.c_proj": "down",
}


def official_names(kind, method):
    "Official name of a prefix -> our module or parameters, for one of the three released classes."
    learner = f"{kind}_prompt_learner."
    if kind == "mudpt":
        return {
            f"{learner}embed_projection": method.to_vision.first,
            f"{learner}deep_projections": method.to_vision.out,
            "image_encoder.visual_ctx_deep_projections": method.to_text.out,
        }
    names = {
        f"{learner}ln_{end}": getattr(method.to_vision, f"ln_{end}") for end in ("pre", "post")
    }
    names[f"{learner}visual_proj"] = method.to_vision.out
    for official, own in TRANSFORMER.items():
        names[learner + official] = method.to_vision.get_submodule(own)
    if kind == "uumudpt":
        image = "image_encoder.visual_ctx_"
        for end in ("pre", "post"):
            names[f"{image}ln_intra_{end}"] = getattr(method.to_text, f"ln_{end}")
        names[f"{image}text_proj"] = method.to_text.out
        for official, own in TRANSFORMER.items():
            names[image + official] = method.to_text.get_submodule(own)
    return names


def check_mudpt(clip, kind, n, depth, **settings):
    golden, metadata = load_golden(kind)
    problem = golden_problem(metadata["classnames"], clip)
    method = METHODS["MuDPT"](problem, n_ctx=n, depth=depth, **settings).double()
    start = f"n{n}d{depth}."
    given = {
        key.removeprefix(f"{start}param."): x
        for key, x in golden.items()
        if ".param." in key and key.startswith(start)
    }
    learner, image = f"{kind}_prompt_learner.", "image_encoder.visual_ctx"
    prompts = {"T": (f"{learner}ctx", f"{learner}deep_prompts")}
    if method.V is not None:
        prompts["V"] = (image, f"{image}_deep_prompts")
    for own, (first, deep) in prompts.items():
        put(getattr(method, own), torch.cat([given.pop(first)[None], given.pop(deep)]))
    own_parameters = {}
    for official, module in official_names(kind, method).items():
        for name, parameter in module.named_parameters():
            own_parameters[f"{official}.{name}"] = parameter
    assert own_parameters.keys() == given.keys()
    for name, parameter in own_parameters.items():
        put(parameter, given[name])
    batch = pixel_batch()
    assert_close(method.logits(batch), golden[f"{start}logits"])
    loss = method.loss(batch)
    assert_close(loss, golden[f"{start}loss"])
    loss.backward()
    for own, (first, deep) in prompts.items():
        gradient = getattr(method, own).grad
        assert_close(gradient[0], golden[f"{start}grad.{first}"])
        assert_close(gradient[1:], golden[f"{start}grad.{deep}"])
    for name, parameter in own_parameters.items():
        if f"{start}grad.{name}" in golden:
            assert_close(parameter.grad, golden[f"{start}grad.{name}"])
    squares = sum(p.grad.square().sum() for p in method.parameters())
    assert_close(squares.sqrt(), golden[f"{start}grad_norm"])


@pytest.mark.parametrize("n, depth", [(2, 3), (4, 2)])
def test_mudpt(clip, n, depth):
    "The released class of that name couples its prompts by linear maps."
    check_mudpt(clip, "mudpt", n, depth, injection="linear")


def test_umudpt(clip):
    check_mudpt(clip, "umudpt", 4, 3, injection="transformer", one_way=True)


def test_uumudpt(clip):
    check_mudpt(clip, "uumudpt", 4, 3, injection="transformer")


# p-adapter


def adapted_attention(golden, metadata, kind, p):
    weights = {
        name.removeprefix(f"{kind}."): x
        for name, x in golden.items()
        if name.startswith(f"{kind}.")
    }
    width, heads = golden["x"].shape[-1], int(metadata["heads"])
    mha = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    roles = ("query", "key", "value")
    put(mha.in_proj_weight, torch.cat([weights[f"self.{role}.weight"] for role in roles]))
    put(mha.in_proj_bias, torch.cat([weights[f"self.{role}.bias"] for role in roles]))
    put(mha.out_proj.weight, weights["output.dense.weight"])
    put(mha.out_proj.bias, weights["output.dense.bias"])
    site = Site(kind=kind, width=width, heads=heads)
    settings = {"mu": float(metadata["mu"]), "pool": int(metadata["pool"])}
    adapter = ReleasedAdapterLayer(
        site, hidden=width // int(metadata["factor"]), **settings
    ).double()
    for own, official in {"down": "i", "up": "o", "gate": "gate"}.items():
        layer = adapter.get_submodule(own)
        put(layer.weight, weights[f"output.text_laplacian_adapter_{official}.weight"])
        put(layer.bias, weights[f"output.text_laplacian_adapter_{official}.bias"])
    put(adapter.p, golden[f"{kind}_p{p}.p"].squeeze())
    put(adapter.theta, golden[f"{kind}_p{p}.theta"].squeeze())
    return AdaptedAttention(mha, adapter), weights


@pytest.mark.parametrize("p", ["1.25", "1.75"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_p_adapter_of_the_released_code(kind, p):
    "Outputs to 1e-8, gradients to 1e-6: distances near zero meet the released guard of 1e-8."
    golden, metadata = load_golden("p_adapter")
    attention, weights = adapted_attention(golden, metadata, kind, p)
    x = golden["x"]
    source = golden["encoder"] if kind == "cross" else x
    mask = None
    if kind == "self":
        mask = -10000.0 * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).triu(1)
    attended, _ = attention(x, source, source, need_weights=False, attn_mask=mask)
    scale, shift = weights["output.LayerNorm.weight"], weights["output.LayerNorm.bias"]
    eps = float(metadata["layer_norm_eps"])
    output = F.layer_norm(attended + x, scale.shape, scale, shift, eps)
    case = f"{kind}_p{p}."
    assert_close(output, golden[f"{case}output"], 1e-8)
    adapter = attention.adapter
    (output * golden["weight"]).sum().backward()
    for name in ("down", "up", "gate"):
        gradient = adapter.get_submodule(name).weight.grad
        assert_close(gradient, golden[f"{case}grad_{name}"], 1e-6)
    assert_close(adapter.p.grad[None], golden[f"{case}grad_p"], 1e-6)
    assert_close(adapter.theta.grad[None], golden[f"{case}grad_theta"], 1e-6)


# Incomplete batches


KEPT = {
    "CLIPLoRA",
    "TwoSFS",
    "LayerNormTuning",
    "FullFineTuning",
    "TipAdapterF",
    "ProtoCLIP",
    "APET",
    "AMUTuning",
}  # released loaders without drop_last; all others are Dassl's
OWN_BATCHES = {"LPPlusPlus", "CrossModal", "ProLIP"}  # the whole support set; without end


@pytest.mark.parametrize(
    "name", [name for name, cls in METHODS.classifiers().items() if "epochs" in cls.recipe]
)
def test_incomplete_batches_by_method(name):
    recipe = METHODS[name].recipe
    if name in OWN_BATCHES:
        assert "drop_last" not in recipe and METHODS[name].batches is not Method.batches
    else:
        assert recipe["drop_last"] is (name not in KEPT)


def test_tuners_drop_incomplete_batches():
    assert all(cls.recipe["drop_last"] for cls in GENERATION_METHODS.values())


def random_problem(count, classes=4, width=8, seed=0):
    "Raw features of any length, `count` support images."
    draw = torch.Generator().manual_seed(seed)
    text = 9 * torch.randn(classes, width, generator=draw, dtype=torch.float64)
    views = torch.randn(2, count, width, generator=draw, dtype=torch.float64)
    test = torch.randn(12, width, generator=draw, dtype=torch.float64)
    labels = torch.arange(count) % classes
    return from_arrays(text, (views, labels), test=(test, torch.arange(12) % classes))


BATCH_CASES = [(10, 4, True, [4, 4]), (10, 4, False, [4, 4, 2]), (3, 4, True, [3])]
BATCH_CASES += [(3, 4, False, [3]), (8, 4, False, [4, 4]), (4, 4, True, [4])]


@pytest.mark.parametrize("count, size, drop_last, expected", BATCH_CASES)
def test_sizes_of_batches(count, size, drop_last, expected):
    batches = Batches(random_problem(count), 1, size, "cpu", drop_last)
    for _ in range(2):
        found = list(batches)
        assert [len(batch.y) for batch in found] == expected
        assert len(batches) == len(expected)
        positions = torch.cat([batch.index for batch in found])
        assert len(positions.unique()) == len(positions)


@pytest.mark.parametrize("drop_last, expected", [(True, [4, 4]), (False, [4, 4, 2])])
def test_batches_of_tasks(drop_last, expected):
    problem = load_task("mini-entailment", train=10)
    batches = TaskBatches(problem, 1, 4, drop_last=drop_last)
    assert len(batches) == len(expected)
    assert [len(batch.x) for batch in batches] == expected


@pytest.mark.parametrize("name", ["TipAdapterF", "TaskRes", "GraphAdapter", "CLIPAdapter"])
def test_steps_in_an_epoch(name):
    "Ten images in batches of four are two steps where the last batch is dropped, else three."
    problem = random_problem(10)
    for drop_last, steps in ((True, 2), (False, 3)):
        method = METHODS[name](problem, batch_size=4, drop_last=drop_last)
        assert len(method.batches(problem, 1)) == steps


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("name", ["TipAdapterF", "TaskRes", "ProtoCLIP"])
def test_many_runs_do_what_single_runs_do(name, drop_last):
    problems = [random_problem(10, seed=seed) for seed in (0, 1)]
    settings = {"epochs": 3, "batch_size": 4, "drop_last": drop_last}
    if name == "ProtoCLIP":
        settings["adapter"] = "fc"
    runs = [
        (METHODS[name], settings | {"lr": lr}, problem, seed)
        for lr, problem, seed in zip((1e-3, 1e-2), problems, (1, 2), strict=True)
    ]
    for method, (cls, given, problem, seed) in zip(
        fit_many(runs, progress=False), runs, strict=True
    ):
        alone = fit(cls(problem, **given), problem, seed, progress=False)
        for found, expected in zip(method.parameters(), alone.parameters(), strict=True):
            assert_close(found, expected.detach(), 1e-9)


# Raw text rows


def test_raw_rows_survive_a_held_out_part():
    "Shots held out for validation leave the raw text rows as they were given."
    problem = random_problem(32)
    lengths = raw_text(problem).norm(dim=1)
    assert lengths.min() > 2
    assert torch.equal(raw_text(hold_out(problem)), raw_text(problem))
    method = METHODS["TaskRes"](hold_out(problem), text_norm="raw")
    assert method.hyper_parameters["text_norm"] == "raw"
    assert_close(method.classifier(), problem.features.text)


@pytest.mark.parametrize("name", ["TaskRes", "GraphAdapter"])
def test_raw_and_unit_rows_give_different_methods(name):
    problem = random_problem(16)
    runs = [
        (METHODS[name], {"text_norm": norm, "epochs": 5}, problem, 1) for norm in ("unit", "raw")
    ]
    unit, raw = fit_many(runs, progress=False)
    assert (
        unit.scores(problem.features.test) - raw.scores(problem.features.test)
    ).abs().max() > 0.1


def test_unit_rows_are_the_default():
    for name in ("TaskRes", "GraphAdapter"):
        assert METHODS[name].defaults()["text_norm"] == "unit"


# Released selection rules


GRIDS = {"oxford_pets": (6.9655, 2.855), "fgvc_aircraft": (29.8505, 28.505)}
GRIDS["oxford_flowers"] = (49.7505, 47.505)


@pytest.mark.parametrize("dataset", GRIDS)
def test_released_grid_of_tip_adapter(dataset):
    "Evenly spaced from 0.1; the upper end is left out."
    grid = tip_adapter_grid(dataset)
    for (name, values), count, end, last in zip(
        grid.items(), (200, 20), SEARCH_ENDS[dataset], GRIDS[dataset], strict=True
    ):
        assert len(values) == count, name
        assert values[0] == pytest.approx(0.1)
        assert values[-1] == pytest.approx(last)
        assert values[-1] < end


def released_problem():
    draw = torch.Generator().manual_seed(3)
    problem = random_problem(16)
    val = torch.randn(8, 8, generator=draw, dtype=torch.float64)
    x, y = problem.features.views, problem.labels["train"]
    test = (problem.features.test, torch.arange(12) % 4)
    prompts = torch.randn(3, 4, 8, generator=draw, dtype=torch.float64)
    val = (val, torch.arange(8) % 4)
    arrays = dict(train=x, val=val[0], test=test[0])
    second = {name: array[..., :5] for name, array in arrays.items()}  # for AMU-Tuning
    options = dict(val=val, test=test, text_all=prompts, auxiliary={"second": second})
    return from_arrays(raw_text(problem), (x, y), **options)


SELECTIONS = {"TipAdapter": "val_search", "TipAdapterF": "test_epoch"}
SELECTIONS |= {"GDA": "val_search", "ProtoCLIP": "val_epoch", "AMUTuning": "test_epoch"}
SELECTIONS |= dict.fromkeys(("APE", "TIMO", "TIMOS", "ProKeR"), "val_search")
FEW_SHOT = dict.fromkeys(("ZSLP", "CLAP", "SSText"), "defaults")  # never look at test images
FEW_SHOT |= dict.fromkeys(("LPPlusPlus", "CrossModal"), "val_epoch")


# these need a backbone, which arrays lack; the notebook of the rules has them
OF_BACKBONES = {"ProLIP", "PromptSRC", "CLIPLoRA", "TwoSFS"}


@pytest.mark.parametrize("name", [name for name in PAPER_RULES if name not in OF_BACKBONES])
def test_released_rules_say_what_they_looked_at(name):
    problem = released_problem()
    settings = {"adapter": "fc"} if name == "ProtoCLIP" else {}
    if "epochs" in METHODS[name].recipe:
        settings["epochs"] = 3
    found = as_released(name, problem, **settings)
    assert found["selection"] == (SELECTIONS | FEW_SHOT)[name]
    assert 0 <= found["accuracy"] <= 100
    problem.provenance["dataset"] = "imagenet"
    on_test = as_released(name, problem, **settings)
    if name in FEW_SHOT:
        assert on_test == found
        return
    assert on_test["selection"] == SELECTIONS[name].replace("val", "test")
    assert "validation" not in on_test["rule"]


def test_released_search_of_tip_adapter_takes_the_first_best_pair():
    problem = released_problem()
    method = METHODS["TipAdapter"](problem)
    x, y = problem.features.val, problem.labels["val"]
    best = (-1, None)
    for beta in tip_adapter_grid(None)["beta"]:
        for alpha in tip_adapter_grid(None)["alpha"]:
            right = int((method.set(alpha=alpha, beta=beta).scores(x).argmax(1) == y).sum())
            if right > best[0]:
                best = right, (alpha, beta)
    alpha, beta = best[1]
    truth = torch.arange(12) % 4
    predicted = method.set(alpha=alpha, beta=beta).scores(problem.features.test).argmax(1)
    accuracy = 100 * float((predicted == truth).double().mean())
    assert as_released("TipAdapter", problem)["accuracy"] == pytest.approx(accuracy)
