"""PromptSRC: its loss, gradients and averaged prompts against the official program; its settings.

Every number is computed in float64. A difference is relative to the largest entry of the expected
array.
"""

import pytest
import torch
import torch.nn.functional as F
from golden_clip import golden_clip, golden_problem, load_golden
from test_golden import assert_close, gradients, put

import vlmadapt as va
from vlmadapt.methods.prompt_src import (
    PROTOCOLS,
    FrozenBatch,
    PromptSRC,
    gaussian_weights,
    imagenet_templates,
    template_mean,
)
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.loop import fit

RELATIVE = 1e-6  # the library encodes the frozen text in float32
EXACT = 1e-12  # with the frozen text of the file


@pytest.fixture(scope="module")
def golden():
    return load_golden("promptsrc")


@pytest.fixture(scope="module")
def problem(golden):
    "The tiny CLIP with the tokens of the templates."
    arrays, metadata = golden
    clip = golden_clip()
    with torch.no_grad():
        clip.model.token_embedding.weight[arrays["token_ids"]] = arrays["token_rows"]
    clip.key = "golden with the tokens of the templates"
    return golden_problem(metadata["classnames"], clip)


def batch_of(indices):
    arrays, _ = load_golden("clip_tiny")
    return Batch(arrays["images"][indices], arrays["labels"][indices])


def released(golden, problem, cls=PromptSRC, **given):
    "The method with the settings of the file."
    arrays, metadata = golden
    names = ("epochs", "lr", "mean", "deviation", "depth")
    settings = {name: float(metadata[name]) for name in names}
    method = cls(problem, **settings, **given)
    put(method.T, arrays["start_text"])
    put(method.V, arrays["start_image"])
    return method


def test_features_of_the_frozen_model(golden, problem):
    arrays, _ = golden
    method = released(golden, problem)
    x = batch_of([0, 1, 2]).x
    assert_close(method.frozen_text(), arrays["frozen_text"], RELATIVE)
    assert_close(method.frozen_image(x), arrays["frozen_image"])
    assert_close(method.text(), arrays["text"])
    assert_close(F.normalize(method.image(x, method.V), dim=-1), arrays["image"])
    assert_close(method.logits(batch_of([0, 1, 2])), arrays["logits"])
    frozen = method.logit_scale * method.frozen_image(x) @ method.frozen_text().T
    assert_close(frozen, arrays["frozen_logits"], RELATIVE)


def test_the_frozen_text_is_another_with_fewer_templates(golden, problem):
    arrays, metadata = golden
    few = template_mean(problem.backbone, metadata["classnames"], imagenet_templates(20))
    assert (few - arrays["frozen_text"]).abs().max() > 1e-3


class Followed(PromptSRC):
    "Trained on the two batches of the file; loss terms, gradients and prompts are recorded."

    def batches(self, problem, seed):
        arrays, _ = load_golden("promptsrc")
        return [batch_of(indices) for indices in arrays["images_of_batches"].tolist()]

    def inputs(self, problem, split):
        return batch_of([0, 1, 2]).x

    def init(self, generator):
        super().init(generator)
        arrays, _ = load_golden("promptsrc")
        put(self.T, arrays["start_text"])
        put(self.V, arrays["start_image"])
        self.steps = []
        self.gradients = []
        for parameter in (self.T, self.V):
            parameter.register_post_accumulate_grad_hook(self.note)

    def note(self, parameter):
        self.gradients.append(parameter.grad.clone())

    def terms(self, *features):
        terms = super().terms(*features)
        self.steps.append(terms)
        return terms


@pytest.fixture(scope="module")
def trained(golden, problem):
    "The method after four epochs of `fit`, with its prompts after each of them."
    method = released(golden, problem, Followed)
    epochs = []

    def after_epoch(epoch):
        epochs.append((method.T.detach().clone(), method.V.detach().clone()))

    return fit(method, problem, progress=False, after_epoch=after_epoch), epochs


OFFICIAL = {
    "cross_entropy": "cross_entropy",
    "text": "text_distance",
    "image": "image_distance",
    "divergence": "divergence",
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_terms_of_the_loss(golden, trained, name):
    method, _ = trained
    found = torch.stack([terms[name].detach() for terms in method.steps[:8]])
    assert_close(found, golden[0][OFFICIAL[name]], RELATIVE)


def test_losses(golden, trained):
    method, _ = trained
    found = torch.tensor([entry["loss"] for entry in method.log], dtype=torch.float64)
    assert_close(found, golden[0]["loss"].view(-1, 2).mean(1), RELATIVE)


def test_gradients(golden, trained):
    method, _ = trained
    for name, shape in (("grad_text", method.T.shape), ("grad_image", method.V.shape)):
        found = torch.stack([g for g in method.gradients if g.shape == shape])
        assert_close(found, golden[0][name], RELATIVE)


def test_prompts_after_each_epoch_and_their_average(golden, trained):
    arrays, _ = golden
    method, epochs = trained
    assert_close(method.epoch_weights(), arrays["epoch_weights"])
    for epoch, (text, image) in enumerate(epochs[:-1]):
        assert_close(text, arrays["epoch_text"][epoch], RELATIVE)
        assert_close(image, arrays["epoch_image"][epoch], RELATIVE)
    text, image = epochs[-1]
    assert_close(text, arrays["average_text"], RELATIVE)
    assert_close(image, arrays["average_image"], RELATIVE)
    assert_close(method.logits(batch_of([0, 1, 2])), arrays["average_logits"], RELATIVE)
    assert (text - epochs[-2][0]).abs().max() > 0.01  # not the prompts of an epoch


def test_gradients_are_exact_with_the_frozen_text_of_the_file(golden, problem):
    arrays, _ = golden
    method = released(golden, problem)
    method.frozen_rows = arrays["frozen_text"]
    batch = batch_of(arrays["images_of_batches"][0].tolist())
    loss, (text, image) = gradients(method, batch, method.T, method.V)
    assert_close(loss, arrays["loss"][0])
    assert_close(text, arrays["grad_text"][0])
    assert_close(image, arrays["grad_image"][0])
    method.text_weight = 0
    other = gradients(method, batch, method.T)[1][0]
    assert (other - text).abs().max() > 0.01 * text.abs().max()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_weights_of_the_released_settings(golden, protocol):
    epochs, mean, deviation, _ = PROTOCOLS[protocol]
    found = gaussian_weights(epochs, mean, deviation)
    assert_close(found, golden[0][f"weights_{protocol}"])
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@pytest.fixture(scope="module")
def digits():
    return few_shot("mini-digits", shots=1, seed=1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_set_epochs_depth_and_averaging(digits, golden, protocol):
    method = PromptSRC(digits, protocol=protocol)
    assert_close(method.epoch_weights(), golden[0][f"weights_{protocol}"])
    assert method.hyper_parameters["depth"] == PROTOCOLS[protocol].depth
    values = {"lr": 2.5e-3, "batch_size": 4, "weight_decay": 5e-4, "schedule": "warmup_cosine"}
    assert {name: method.hyper_parameters[name] for name in values} == values
    assert (method.text_weight, method.image_weight, method.templates) == (25, 10, 60)


def test_a_given_number_of_epochs_scales_the_weights(digits):
    method = PromptSRC(digits, protocol="few_shot_specialised", epochs=10)
    assert_close(method.epoch_weights(), gaussian_weights(10, 9, 1))
    own = PromptSRC(digits, epochs=10, mean=2.0)
    assert_close(own.epoch_weights(), gaussian_weights(10, 2, 6))


def test_numbers_of_trained_parameters(digits):
    assert PromptSRC(digits).trainable_parameters() == 3 * 4 * (96 + 96)


def test_nothing_is_chosen_on_validation_data_by_default(digits):
    assert PromptSRC.validation_free
    assert va.method_info("PromptSRC").kind == "prompts"
    method = fit(va.create_method("PromptSRC", digits, epochs=2), digits)
    assert len(method.log) == 2


def test_fixed_views_have_the_frozen_features_of_their_crops(digits):
    method = PromptSRC(digits, fixed_views=3)
    batches = method.batches(digits, seed=1)
    seen = set()
    for _ in range(6):
        for batch in batches:
            assert isinstance(batch, FrozenBatch)
            assert_close(batch.frozen, method.frozen_image(batch.x), RELATIVE)
            seen.update(x.sum().item() for x in batch.x)
    assert 10 < len(seen) <= 30


def test_an_average_is_not_carried_into_the_next_fit(digits):
    method = PromptSRC(digits, epochs=2, lr=1e-2)
    first = fit(method, digits).V.detach().clone()
    assert torch.equal(fit(method, digits).V.detach(), first)


def test_more_templates_than_there_are_are_refused(digits):
    method = PromptSRC(digits, templates=81)
    with pytest.raises(ValueError, match="80 templates for ImageNet, not 81"):
        fit(method, digits)
