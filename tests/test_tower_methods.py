"Methods that train parts of CLIP's towers: official numbers, counts, schedules and savings."

import pytest
import torch
import torch.nn.functional as F
from golden_clip import golden_problem, load_golden
from torch import nn

from vlmadapt.core.hashing import content_key
from vlmadapt.core.seeding import stream
from vlmadapt.core.tensors import load_arrays
from vlmadapt.methods import METHODS, load_method, method_info
from vlmadapt.models.adapted_models import TowerBlock
from vlmadapt.models.blocks import causal_mask
from vlmadapt.models.class_prompts import photo_tokens
from vlmadapt.models.lora_prefix import PROJECTIONS, LowRankBranch, add_branches
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.loop import fit, initialise_method, make_optimizer, make_schedule, train
from vlmadapt.training.tuning import tune

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


# Training by the official programs


LABELS = torch.tensor([0, 3, 4])  # of the three images of the tiny CLIP


def with_batches(cls, metadata, per_stage):
    "A subclass that reads the batches of a file; each stage begins with the first."
    images = load_golden("clip_tiny")[0]["images"]
    order = [i % 3 for steps in per_stage for i in range(steps)]
    found = []
    for i in order:
        index = metadata["batches"][i]
        found.append(Batch(images[index], LABELS[index]))

    class Given(cls):
        def batches(self, problem, seed):
            return GivenBatches(found)

    return Given


class GivenBatches:
    "One batch for each epoch, in the order of a list."

    def __init__(self, batches):
        self.left = iter(batches)

    def __len__(self):
        return 1

    def __iter__(self):
        yield next(self.left)


def logged(method, key):
    return torch.tensor([entry[key] for entry in method.log], dtype=torch.float64)


def record_gradients(method, parameters):
    "Record in a list, which is returned, the gradients of each later loss of the method."
    gradients = []
    loss = method.loss

    def watched(batch):
        found = loss(batch)
        gradients.append(torch.autograd.grad(found, parameters(), retain_graph=True))
        return found

    method.loss = watched
    return gradients


def named_branches(method):
    "The branches of a method by the names of the file."
    towers = [(tower, i) for tower in method.towers for i in range(3)]
    names = [f"{tower}.{i}" for tower, i in towers]
    return dict(zip(names, method.branches, strict=True))


def test_clip_lora_trains_as_the_official_program():
    golden, metadata = load_golden("clip_lora_training")
    steps = metadata["iterations"]

    class Official(with_batches(METHODS["CLIPLoRA"], metadata, [steps])):
        def init(self, generator):
            super().init(generator)
            self.logit_scale = 100.0
            for name, branch in named_branches(self).items():
                for n, part in enumerate("qkv"):
                    branch.A.data[n] = golden[f"start_A.{name}.{part}"]

    problem = golden_problem(metadata["classnames"], labels=LABELS)
    method = Official(problem, epochs=steps, lr=metadata["lr"], dropout=0.0, batch_size=2)
    gradients = record_gradients(method, lambda: list(method.branches.parameters()))
    initialise_method(method, problem, seed=1)
    train(method, problem, seed=1, progress=False)
    assert relative(logged(method, "loss"), golden["losses"]) < 1e-9
    assert relative(logged(method, "lr"), golden["rates"]) < 1e-12
    for step in (1, 3):
        found = dict(zip(method.branches.parameters(), gradients[step - 1], strict=True))
        for name, branch in named_branches(method).items():
            for letter, parameter in (("A", branch.A), ("B", branch.B)):
                for n, part in enumerate("qkv"):
                    expected = golden[f"grad{step}_{letter}.{name}.{part}"]
                    scale = expected.abs().max().clamp(min=1e-6)
                    assert (found[parameter][n] - expected).abs().max() < 1e-6 * scale, name
    for name, branch in named_branches(method).items():
        for n, part in enumerate("qkv"):
            assert relative(branch.B[n], golden[f"B.{name}.{part}"]) < 1e-6
            assert relative(branch.A[n], golden[f"A.{name}.{part}"]) < 1e-6
    images = load_golden("clip_tiny")[0]["images"]
    assert relative(method.scores(Batch(images)), golden["logits"]) < 1e-6


def norm_names(model):
    "The LayerNorms inside blocks by the names of the official model."
    return {id(m): n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}


def test_two_sfs_trains_as_the_official_program():
    golden, metadata = load_golden("two_sfs")
    steps = metadata["iterations"]
    cls = with_batches(METHODS["TwoSFS"], metadata, [6, 4])
    problem = golden_problem(metadata["classnames"], labels=LABELS)
    method = cls(problem, epochs=steps, lr=metadata["lr"], batch_size=2)
    assert method.stages() == {0: 6, 6: 4}
    starts = []

    def trained():
        starts.append(method.classifier.detach().clone())
        ((_, parameters),) = method.decays()
        return parameters

    gradients = record_gradients(method, trained)
    initialise_method(method, problem, seed=1)
    train(method, problem, seed=1, progress=False)
    assert relative(logged(method, "loss"), golden["losses"]) < 1e-9
    assert relative(logged(method, "lr"), golden["rates"]) < 1e-12
    names = norm_names(method.adapted)
    found = iter(gradients[0])
    for norm in method.norms:
        for kind, parameter in norm.named_parameters():
            name = f"{names[id(norm)]}.{kind}"
            assert relative(next(found), golden[f"grad.{name}"]) < 1e-6, name
            assert relative(parameter, golden[f"tuned.{name}"]) < 1e-9, name
    assert sum(name.startswith("grad.") for name in golden) == 2 * len(method.norms)
    assert relative(starts[6], golden["classifier_start"]) < 1e-9
    assert relative(gradients[6][0], golden["grad_classifier"]) < 1e-6
    assert relative(method.classifier, golden["classifier"]) < 1e-9
    images = load_golden("clip_tiny")[0]["images"]
    assert relative(method.scores(Batch(images), metadata["mixed"]), golden["mixed_logits"]) < 1e-9


# Savings that change nothing


def tower_methods(problem):
    "Every method with an exact plain form, as a method without dropout."
    yield METHODS["CLIPLoRA"](problem, dropout=0.0)
    yield METHODS["TwoSFS"](problem)
    yield METHODS["TwoSFS"](problem, outer_norms=True, towers="text")
    yield METHODS["LayerNormTuning"](problem)
    yield METHODS["FullFineTuning"](problem)


def plain_loss(method, batch):
    "The loss through the model's own forward pass, on all positions."
    ids = photo_tokens(method.backbone, method.class_names)
    text = method.trained_text()
    if "text" in method.towers:
        text = F.normalize(method.adapted.encode_text(ids), dim=-1)
    image = method.adapted.encode_image(batch.x)
    return F.cross_entropy(method.cosine_logits(image, text), batch.y)


def random_batch(backbone, classes, count=3):
    generator = torch.Generator().manual_seed(1)
    size = backbone.size
    x = torch.randn(count, 3, size, size, generator=generator)
    y = torch.randint(classes, (count,), generator=generator)
    return Batch(x.to(next(backbone.model.parameters()).dtype), y)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["golden", "mini"])
def test_a_step_is_that_of_the_models_own_forward_pass(kind, index):
    problem = golden_problem() if kind == "golden" else few_shot("mini-digits", shots=1)
    tolerance = 1e-9 if kind == "golden" else 1e-4
    method = list(tower_methods(problem))[index]
    for branch in getattr(method, "branches", []):
        branch.B.data.normal_(generator=torch.Generator().manual_seed(2))
    batch = random_batch(problem.backbone, problem.K)
    parameters = [p for n, p in method.named_parameters() if n != "classifier"]
    found = torch.autograd.grad(method.loss(batch), parameters, allow_unused=True)
    expected = torch.autograd.grad(plain_loss(method, batch), parameters, allow_unused=True)
    assert relative(method.loss(batch), plain_loss(method, batch)) < tolerance
    largest = max(g.abs().max() for g in expected if g is not None)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= tolerance * largest
    assert (method.logits(batch) - method.scorer(method.class_names)(batch)).abs().max() == 0


def test_text_is_computed_only_where_it_changes(monkeypatch):
    problem = few_shot("mini-digits", shots=1)
    batch = random_batch(problem.backbone, problem.K)
    calls = []
    encode = problem.backbone.model.encode_text
    monkeypatch.setattr(
        problem.backbone.model, "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    frozen = METHODS["CLIPLoRA"](problem, towers="vision")
    for _ in range(3):
        frozen.loss(batch).backward()
    assert len(calls) == 1 and frozen.text_plan is None
    trained = METHODS["CLIPLoRA"](problem, towers="text", dropout=0.0)
    trained.loss(batch).backward()
    assert trained.branches[0].B.grad.abs().max() > 0
    assert frozen.image(batch.x).grad_fn is not None and trained.image(batch.x).grad_fn is None


def test_class_prompts_share_a_prefix_only_without_dropout():
    problem = few_shot("mini-digits", shots=1)
    batch = random_batch(problem.backbone, problem.K)
    prefix = {}
    for dropout in (0.0, 0.25):
        method = METHODS["CLIPLoRA"](problem, dropout=dropout)
        method.loss(batch)
        prefix[dropout] = method.text_plan.plan.prefix_length
        longest = max(length for _, length in method.text_plan.plan.parts)
        assert longest < problem.backbone.model.text.context_length / 2
    assert prefix == {0.0: 1 + 4, 0.25: 0}


def test_every_class_prompt_draws_its_own_dropout():
    problem = golden_problem(["face", "face", "cup & saucer"], labels=LABELS // 2)
    method = METHODS["CLIPLoRA"](problem)
    for branch in method.branches:
        branch.B.data.normal_(generator=torch.Generator().manual_seed(2))
    text = method.trained_text().detach()
    assert (text[0] - text[1]).abs().max() > 1e-3
    exact = method.text().detach()
    assert (exact[0] - exact[1]).abs().max() < 1e-12
    batch = random_batch(problem.backbone, problem.K)
    method.steps = 0
    first = method.loss(batch)
    assert method.loss(batch) != first
    method.steps = 0
    assert method.loss(batch) == first


def test_recomputed_dropout_draws_the_same_numbers():
    problem = golden_problem()
    method = METHODS["CLIPLoRA"](problem, towers="text")
    method.budget = 1
    for branch in method.branches:
        branch.B.data.normal_(generator=torch.Generator().manual_seed(2))
    batch = random_batch(problem.backbone, problem.K)

    def loss():
        method.steps = 0
        return method.loss(batch)

    B = method.branches[1].B
    (gradient,) = torch.autograd.grad(loss(), [B])
    assert method.text_plan.plan.recompute
    place = (0, 3, 1)
    B.data[place] += 1e-6
    above = loss().item()
    B.data[place] -= 2e-6
    slope = (above - loss().item()) / 2e-6
    assert abs(slope - gradient[place].item()) < 1e-5 * gradient.abs().max().item()


# Contracts


@pytest.mark.parametrize("name", ["CLIPLoRA", "TwoSFS", "LayerNormTuning", "FullFineTuning"])
def test_base_classes_are_fitted_and_new_ones_scored(name, tmp_path):
    base, new = (few_shot("mini-digits", shots=2, seed=1, part=part) for part in ("base", "new"))
    method = METHODS[name](base, epochs=3, lr=1e-3)
    weights = content_key(weights=base.backbone.model.state_dict())
    fit(method, base, progress=False)
    assert content_key(weights=base.backbone.model.state_dict()) == weights
    assert method.outputs(new, "test").shape[1] == len(new.class_names)
    method.save(tmp_path / "m.safetensors")
    tensors, card = load_arrays(tmp_path / "m.safetensors")
    buffers = {"stage"} & set(tensors)
    assert set(tensors) == set(card["trained"]) | buffers
    loaded = load_method(tmp_path / "m.safetensors", base.backbone)
    assert type(loaded) is METHODS[name]
    for part in (base, new):
        assert (loaded.outputs(part, "test") == method.outputs(part, "test")).all()
    again = fit(METHODS[name](base, epochs=3, lr=1e-3), base, progress=False)
    for key, x in method.state_dict().items():
        assert (again.state_dict()[key] == x).all(), key


def test_full_fine_tuning_serves_both_kinds_of_problem():
    classification, generation = few_shot("mini-digits", shots=1), load_task("mini-vqa", train=8)
    for problem, module in ((classification, "layer_norm_tuning"), (generation, "generation")):
        cls = METHODS.find("FullFineTuning", problem)
        assert cls.__module__ == f"vlmadapt.methods.{module}"
    assert method_info("FullFineTuning").kind == "towers"
    assert method_info("FullFineTuning", "generation").cls.name == "FullFineTuning"


def test_iterations_follow_the_shots():
    problem = few_shot("mini-digits", shots=3, seed=1)
    for name, iterations in (("CLIPLoRA", 1500), ("TwoSFS", 900), ("LayerNormTuning", 900)):
        method = METHODS[name](problem)
        steps = len(method.batches(problem, seed=1))
        assert steps * sum(method.stages().values()) == iterations


def test_the_rate_is_selected_on_validation_images_where_it_is_asked_for():
    problem = few_shot("mini-digits", shots=2, seed=1)
    for name in ("CLIPLoRA", "LayerNormTuning"):
        found = tune(name, problem, trials=2, fixed=dict(epochs=1))
        assert found.selection == "few_shot_val" and len(found.trials) == 2
    assert method_info("TwoSFS").cls.validation_free
    assert tune("TwoSFS", problem, trials=0, fixed=dict(epochs=1)).selection == "defaults"


PUBLISHED = {  # what the released programs set, read in their code
    "CLIPLoRA": dict(rank=2, alpha=1.0, dropout=0.25, lr=2e-4, lr_end=1e-6, weight_decay=1e-2)
    | dict(epochs=500, batch_size=32, parts=("query", "key", "value"), layers="all"),
    "TwoSFS": dict(first_share=0.6, lr=2e-4, lr_end=1e-6, weight_decay=1e-2, epochs=300)
    | dict(batch_size=32, outer_norms=False, towers=("vision", "text")),
    "PromptSRC": dict(text_weight=25.0, image_weight=10.0, lr=2.5e-3, weight_decay=5e-4)
    | dict(epochs=50, batch_size=4, n_ctx=4, templates=60),
    "AMUTuning": dict(alpha=0.5, merge=0.35, uncertainty="none", lr=1e-3, weight_decay=0.01)
    | dict(eps=1e-4, epochs=50, batch_size=8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_those_of_the_released_programs(name):
    defaults = METHODS[name].defaults()
    found = {n: defaults[n] for n in PUBLISHED[name]}
    assert found == PUBLISHED[name]
    assert METHODS[name].recipe["optimizer"] == ("sgd" if name == "PromptSRC" else "adamw")


def test_the_rate_of_the_released_length_is_a_cosine_of_each_step():
    "500 iterations a shot: the rate of the first and the last step, and of those between."
    problem = few_shot("mini-digits", shots=2, seed=1)
    method = METHODS["CLIPLoRA"](problem)
    recipe, steps = method.hyper_parameters, len(method.batches(problem, seed=1))
    optimizer = make_optimizer([method])
    options = recipe["epochs"], steps, recipe["lr_end"]
    scheduler = make_schedule(optimizer, recipe["schedule"], *options)
    total = steps * recipe["epochs"]
    assert total == 1000
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    at = torch.arange(total, dtype=torch.float64)
    expected = 1e-6 + (2e-4 - 1e-6) * (1 + torch.cos(torch.pi * at / total)) / 2
    assert relative(torch.tensor(rates, dtype=torch.float64), expected) < 1e-9
