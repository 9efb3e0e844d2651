"""Adapters and p-adapters in models of transformers: eight families, peft's files, Trainer."""

import copy
import json
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from warm_process import warm_python

if find_spec("transformers") is None or find_spec("peft") is None:
    pytest.skip("needs the extra `hf`", allow_module_level=True)

import vlmadapt as va

va.AdapterConfig  # noqa: B018  imports transformers beside any build of torchvision

import peft  # noqa: E402
import transformers  # noqa: E402
from hf_families import (  # noqa: E402
    build,
    families,
    inputs_of,
    output_of,
    with_labels,
)
from safetensors.torch import load_file  # noqa: E402

FAMILIES = families()
CONFIGS = {
    "adapter": lambda **given: va.AdapterConfig(hidden=4, **given),
    "p-adapter": lambda **given: va.PAdapterConfig(hidden=4, **given),
    "replacing": lambda **given: va.PAdapterConfig(hidden=4, skip="aggregate", **given),
    "released": lambda **given: va.PAdapterConfig(hidden=8, form="released", p=1.25, **given),
}
GENERATING = [name for name in FAMILIES if name != "siglip"]


@lru_cache
def family(name):
    return FAMILIES[name]()


def adapted(name, kind="p-adapter", dtype=torch.float64, std=0.0, **settings):
    """Return an adapted model; with `std`, its adapters have random weights."""
    config = CONFIGS[kind](target_modules=family(name).targets, **settings)
    model = va.get_model(build(family(name)).to(dtype), config)
    return moved(model, std) if std else model


def moved(model, std=0.3):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim:
            parameter.data = std * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def exact(dtype, inputs):
    found = {}
    for name, x in inputs.items():
        real = isinstance(x, torch.Tensor) and x.is_floating_point()
        found[name] = x.to(dtype) if real else x
    return found


def padding(name):
    """Return the padding for a family; eager attention turns hidden rows of float64 into NaN."""
    return 2 if family(name).implementation == "sdpa" else 0


def seen(output):
    """Return logits of the last tokens, of texts with padding at the other end."""
    return output[1::2, -4:] if output.ndim == 3 else output


@pytest.mark.parametrize("kind", ["adapter", "p-adapter", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_new_adapters_change_no_bit(name, dtype, kind):
    inputs = exact(dtype, with_labels(family(name), inputs_of(family(name), pad=padding(name))))
    with torch.no_grad():
        expected = output_of(build(family(name)).to(dtype), inputs)
        model = adapted(name, kind, dtype)
        assert torch.equal(output_of(model, inputs), expected)
        assert (output_of(moved(model), inputs) - expected).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(output_of(model, inputs), expected)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_falls(name, kind):
    model = adapted(name, kind, torch.float32).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    inputs = with_labels(family(name), inputs_of(family(name), count=32))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    assert all(p.grad is not None for p in trained(model).values())
    for parameter, p in model.named_parameters():
        if parameter in frozen:
            assert p.grad is None and torch.equal(p, frozen[parameter])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", GENERATING)
def test_a_cache_changes_nothing(name, kind):
    """A new token needs its own attention row alone, also beside padding."""
    model = adapted(name, kind, std=0.3)
    inputs = exact(torch.float64, inputs_of(family(name), pad=padding(name)))
    found = {}
    for cached in (True, False):
        found[cached] = model.generate(
            **inputs,
            use_cache=cached,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(found[True].sequences, found[False].sequences)
    for one, other in zip(found[True].logits, found[False].logits, strict=True):
        assert (one - other).abs().max() < 1e-10


LOAD = """
import sys, torch
from pathlib import Path
import vlmadapt as va
va.PAdapterConfig
from hf_families import build, families, inputs_of, output_of, with_labels
for folder in map(Path, sys.argv[1:]):
    family = families()[folder.name]()
    model = va.get_model(build(family), folder)
    inputs = with_labels(family, inputs_of(family))
    with torch.no_grad():
        torch.save(output_of(model, inputs), folder / "output.pt")
"""


def test_saved_adapters_give_the_same_outputs_in_a_new_process(tmp_path):
    expected = {}
    for name in FAMILIES:
        model = adapted(name, "released" if name == "blip2" else "p-adapter", torch.float32, 0.3)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            inputs = with_labels(family(name), inputs_of(family(name)))
            expected[name] = output_of(model, inputs)
    folders = [str(tmp_path / name) for name in FAMILIES]
    done = warm_python().run(LOAD, *folders)
    assert not done.returncode, done.stderr
    for name, output in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "output.pt"), output), name


@pytest.mark.parametrize("skip", ["attention", "aggregate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_p_2_without_mu_is_the_ordinary_adapter(name, skip):
    """The aggregation is then attention itself, but for rounding (degrees of 1).

    Padding is left out, since a row without keys keeps its query node. RMSNorm computes in
    float32, so that differences of 1e-16 before it may be 1e-7 behind it.
    """
    ordinary = adapted(name, "adapter", std=0.3)
    model = adapted(name, "p-adapter", p=2.0, mu=0.0, learn="fixed", skip=skip)
    weights = peft.get_peft_model_state_dict(ordinary)
    result = peft.set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    inputs = exact(
        torch.float64, with_labels(family(name), inputs_of(family(name), pad=padding(name)))
    )
    with torch.no_grad():
        gap = seen(output_of(model, inputs) - output_of(ordinary, inputs)).abs().max()
    assert gap < (1e-12 if name in ("blip", "blip2", "siglip") else 1e-5)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in trained(model).items()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_training_has_the_same_gradients(name, kind, reentrant):
    if name == "blip" and reentrant:
        pytest.skip("BLIP changes its embeddings in place, which reentrant checkpoints forbid")
    model = adapted(name, kind, std=0.3).train()
    inputs = exact(torch.float64, with_labels(family(name), inputs_of(family(name))))
    expected = gradients(model, inputs)
    options = dict(use_reentrant=reentrant)
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if reentrant:
        model.base_model.model.enable_input_require_grads()
    found = gradients(model, inputs)
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), parameter


@pytest.mark.parametrize("name", ["llava", "t5", "blip2", "qwen2-vl"])
def test_eager_and_fused_attention_agree(name):
    model = adapted(name, dtype=torch.float32, std=0.3)
    inputs = with_labels(family(name), inputs_of(family(name)))
    found = []
    for implementation in ("sdpa", "eager"):
        model.base_model.model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(output_of(model, inputs))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_later_tokens_change_nothing_before_them():
    """The paper's degrees are the negative control: sums over all queries, later ones too."""
    ids = inputs_of(family("llava"))["input_ids"]
    other = ids.clone()
    other[:, -1] = 9
    pixels = inputs_of(family("llava"))["pixel_values"].double()
    change = {}
    for degree in ("none", "full"):
        model = adapted("llava", degree=degree, std=0.3)
        with torch.no_grad():
            before, after = (model(input_ids=x, pixel_values=pixels).logits for x in (ids, other))
        change[degree] = (after - before)[:, :-1].abs().max().item()
    assert change["none"] == 0
    assert change["full"] > 1e-4


def test_projected_queries_do_not_see_their_absolute_position():
    """Padding on the left moves all positions; rotary attention depends on differences alone."""
    short, long = (inputs_of(family("llava"), count=2, pad=pad) for pad in (0, 3))
    rows = long["attention_mask"][:, 0] == 0  # those with padding on the left
    change = {}
    for queries in ("projected", "rotated"):
        model = adapted("llava", queries=queries, std=0.3)
        with torch.no_grad():
            logits = [
                model(**exact(torch.float64, inputs), position_ids=positions).logits
                for inputs, positions in (
                    (short, torch.arange(10)[None]),
                    (long, torch.arange(13)[None]),
                )
            ]
        change[queries] = (logits[1][rows, 3:] - logits[0][rows]).abs().max().item()
    assert rows.any()
    assert change["projected"] < 1e-6  # rotary angles and RMSNorm are computed in float32
    assert change["rotated"] > 1e-3


# Files


@pytest.mark.parametrize("kind", CONFIGS)
def test_files_are_those_of_peft(kind, tmp_path):
    model = adapted("llava", kind, torch.float32, 0.3, task_type="CAUSAL_LM")
    lora = peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(build(family("llava")), lora).save_pretrained(tmp_path / "lora")
    model.save_pretrained(tmp_path / kind)
    names = {path.name for path in (tmp_path / kind).iterdir()}
    assert names == {path.name for path in (tmp_path / "lora").iterdir()}
    stored = json.loads((tmp_path / kind / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    shared = {f.name for f in peft.PeftConfig.__dataclass_fields__.values()}
    assert shared <= set(stored) and shared <= set(theirs)
    assert stored["peft_type"] == ("BOTTLENECK_ADAPTER" if kind == "adapter" else "P_ADAPTER")
    assert stored["inference_mode"] and stored["hidden"] == model.peft_config["default"].hidden
    weights = load_file(tmp_path / kind / "adapter_model.safetensors")
    layer = "base_model.model.model.language_model.layers.1.self_attn.o_proj"
    assert f"{layer}.adapter_down.weight" in weights and f"{layer}.adapter_up.bias" in weights
    assert (f"{layer}.adapter_p" in weights) == (kind != "adapter")
    assert all(".adapter_" in key and "default" not in key for key in weights)
    assert len(weights) == len(trained(model))
    config = type(model.peft_config["default"]).from_pretrained(tmp_path / kind)
    assert config.hidden == stored["hidden"] and type(config) is type(
        peft.PeftConfig.from_pretrained(tmp_path / kind)
    )
    again = peft.PeftModel.from_pretrained(build(family("llava")), tmp_path / kind)
    assert not trained(again)
    resumed = va.get_model(build(family("llava")), tmp_path / kind, is_trainable=True)
    assert set(trained(resumed)) == set(trained(model))


def test_adapters_are_switched_deleted_and_unloaded():
    inputs = exact(torch.float64, inputs_of(family("llava")))
    base = output_of(build(family("llava")).double(), inputs)
    model = adapted("llava", std=0.3)
    first = output_of(model, inputs)
    model.add_adapter("second", va.PAdapterConfig(hidden=2, form="paper", mu=0.5))
    assert torch.equal(output_of(model, inputs), first)
    model.set_adapter("second")
    assert torch.equal(output_of(model, inputs), base)
    assert all(".second" in name for name in trained(model))
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(output_of(model, inputs), first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(output_of(model, inputs), first)
    twin = copy.deepcopy(model)
    plain = model.unload()
    assert torch.equal(output_of(plain, inputs), base)
    assert type(plain.model.language_model.layers[0].self_attn.config).__name__ == "LlamaConfig"
    assert torch.equal(output_of(twin, inputs), first)


def test_two_adapters_that_replace_attention_are_refused():
    model = adapted("llava", "replacing")
    model.add_adapter("second", va.PAdapterConfig(hidden=2, skip="aggregate"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="activate that one alone"):
        model(**exact(torch.float64, inputs_of(family("llava"))))


def test_exponents_are_per_layer_shared_or_fixed():
    count = {}
    for learn in ("layer", "shared", "fixed"):
        model = adapted("llava", learn=learn, std=0.3)
        count[learn] = sum(p.ndim == 0 for p in trained(model).values())
        inputs = exact(torch.float64, with_labels(family("llava"), inputs_of(family("llava"))))
        model(**inputs).loss.backward()
        assert all(p.grad.abs() > 0 for p in trained(model).values() if p.ndim == 0)
    assert count == {"layer": 2, "shared": 1, "fixed": 0}


def test_layers_are_chosen_as_in_peft():
    settings = dict(target_modules=["o_proj"], layers_to_transform=[1])
    model = va.get_model(build(family("llava")), va.PAdapterConfig(**settings))
    (name,) = model.base_model.targeted_module_names
    assert name == "model.language_model.layers.1.self_attn.o_proj"
    settings = dict(target_modules=["out_proj"], layers_to_transform=0, layers_pattern="layers")
    model = va.get_model(build(family("llava")), va.AdapterConfig(**settings))
    assert len(model.base_model.targeted_module_names) == 1


def test_what_cannot_be_adapted_is_refused_in_one_line():
    fused = va.PAdapterConfig(target_modules=r".*visual.*attn\.proj")
    with pytest.raises(ValueError, match="take queries='rotated'"):
        va.get_model(build(family("qwen2-vl")), fused)
    pooling = va.AdapterConfig(target_modules=["attention.out_proj"])
    with pytest.raises(ValueError, match="without being called"):
        va.get_model(build(family("siglip")), pooling)
    with pytest.raises(ValueError, match="did you mean 'aggregate'"):
        va.PAdapterConfig(skip="aggregated")
    model = adapted("llava")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="output projections of known names"):
        va.get_model(torch.nn.Linear(2, 2), va.AdapterConfig())


def test_quantised_weights_are_refused_by_p_adapters():
    model = build(family("llava"))
    projection = model.model.language_model.layers[0].self_attn.o_proj
    integers = projection.weight.to(torch.int8)
    projection.weight = torch.nn.Parameter(integers, requires_grad=False)
    with pytest.raises(ValueError, match="has quantised weights"):
        va.get_model(model, va.PAdapterConfig())


@pytest.mark.parametrize("kind", ["p-adapter", "released"])
@pytest.mark.parametrize("name", ["llava", "t5", "blip2"])
def test_automatic_mixed_precision(name, kind):
    inputs = with_labels(family(name), inputs_of(family(name)))
    model = adapted(name, kind, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = output_of(build(family(name)).requires_grad_(False), inputs)
        assert torch.equal(output_of(model, inputs), expected)
        model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())


def test_chunks_of_an_image_tower_are_joined():
    """Qwen2-VL attends to one image at a time, in as many calls as there are images."""
    name, targets = "qwen2-vl", r".*visual.*(attn\.proj|fc2)"
    inputs = exact(torch.float64, inputs_of(family(name)))
    features = {}
    for skip in ("attention", "aggregate"):
        config = va.PAdapterConfig(
            hidden=4, target_modules=targets, queries="rotated", p=2.0, mu=0.0, skip=skip
        )
        model = va.get_model(build(family(name)).double(), config)
        tower = moved(model).base_model.model.model.visual
        one = tower(inputs["pixel_values"][:16], grid_thw=inputs["image_grid_thw"][:1])
        all_images = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        assert (all_images.pooler_output[:4] - one.pooler_output).abs().max() < 1e-10
        features[skip] = all_images.pooler_output
    assert (features["attention"] - features["aggregate"]).abs().max() < 1e-10


# Trainer


class Examples(torch.utils.data.Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, i):
        return {name: x[i] for name, x in self.inputs.items()}


@pytest.mark.parametrize("kind", ["adapter", "p-adapter"])
def test_trainer_runs_and_resumes(kind, tmp_path):
    data = Examples(with_labels(family("llava"), inputs_of(family("llava"), count=16)))

    def trainer(folder):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=10,
            save_steps=5,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
        )
        model = adapted("llava", kind, torch.float32)
        return transformers.Trainer(model=model, args=options, train_dataset=data)

    whole = trainer("whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 10 and sum(losses[6:]) < sum(losses[:4])  # four steps are one epoch
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 10
    for name, parameter in trained(whole.model).items():
        found = trained(resumed.model)[name]
        assert (found - parameter).abs().max() < 1e-6, name
