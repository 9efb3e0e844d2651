"A problem and a method of one's own, which share nothing with the library's but the interface."

import pytest
import torch
from torch import nn

import vlmadapt as va
from vlmadapt.methods.base import Method
from vlmadapt.problems.base import Problem, SealedLabels, SealedSplitError
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit


class Parity(Problem):
    "Tell odd numbers from even ones by a number's last bit."

    kind = "classification"

    def __init__(self):
        self.numbers = dict(train=list(range(16)), val=[2, 3, 5], test=[7, 8, 9])
        labels = {split: [n % 2 for n in own] for split, own in self.numbers.items()}
        super().__init__(labels, "accuracy", provenance=dict(dataset="parity"))

    def images(self, split):
        return self.numbers[split]

    def compare(self, output, truth):
        correct = [a == b for a, b in zip(output, truth, strict=True)]
        return dict(accuracy=100 * sum(correct) / len(correct), n=len(correct), predictions=output)


class LastBit(Method):
    "A weight and a bias on the last bit."

    needs = set()
    recipe = dict(
        optimizer="sgd", lr=1.0, weight_decay=0.0, epochs=40, batch_size=16, schedule="constant"
    )

    def constants(self, problem):
        return {}

    def init(self, generator):
        self.weight = nn.Parameter(torch.zeros(2))

    def logits(self, batch):
        return self.weight[0] * batch.x + self.weight[1]

    def loss(self, batch):
        return nn.functional.binary_cross_entropy_with_logits(self.logits(batch), batch.y)

    def _bits(self, problem, split):
        return torch.tensor([float(n & 1) for n in problem.images(split)])

    def batches(self, problem, seed):
        return [Batch(self._bits(problem, "train"), torch.tensor(problem.labels["train"]).float())]

    @torch.no_grad()
    def outputs(self, problem, split):
        return (self.logits(Batch(self._bits(problem, split))) > 0).int().tolist()


def test_own_problem_and_method_go_through_fit_and_evaluate():
    problem = Parity()
    method = fit(LastBit(problem), problem)
    assert method.log[-1]["loss"] < 0.5
    assert problem.score(method.outputs(problem, "val"), "val")["accuracy"] == 100
    assert evaluate(method, problem) == dict(accuracy=100, n=3, predictions=[1, 0, 1])


def test_the_constructor_seals_the_test_split():
    problem = Parity()
    assert isinstance(problem.labels["test"], SealedLabels)
    with pytest.raises(SealedSplitError, match="only evaluate"):
        problem.score([1, 0, 1], "test")
    with pytest.raises(SealedSplitError):
        list(problem.labels["test"])
    assert not issubclass(SealedSplitError, (OSError, ValueError))


def test_score_names_the_split():
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        Parity().score([0], "validation")
    with pytest.raises(ValueError, match="val: 2 outputs but 3 labels"):
        Parity().score([0, 1], "val")
    x, y = torch.eye(4), [0, 1, 2, 3]
    problem = FewShotProblem.from_features(list("abcd"), x, train=(x, y), val=(x, y), test=(x, y))
    with pytest.raises(ValueError, match="val: 3 outputs but 4 labels"):
        problem.score(x[:3], "val")


def accuracy(problem, name):
    return evaluate(va.adapt(problem, name, trials=0), problem)["accuracy"]


def test_assigned_train_features_are_what_every_method_sees():
    problem = va.few_shot("mini-digits", backbone="mini", shots=2)
    before = {name: accuracy(problem, name) for name in ("GDA", "TipAdapter", "LinearProbe")}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(problem.features.train.shape, generator=generator)
    problem.features.train = noise
    assert problem.features.views.shape == (1, *noise.shape)
    for name, value in before.items():
        assert accuracy(problem, name) < value, name


def test_assigned_features_are_checked_like_given_ones():
    problem = va.few_shot("mini-digits", backbone="mini", shots=1)
    with pytest.raises(AttributeError, match="no features are called 'trian'; there are "):
        problem.features.trian = problem.features.train
    problem.features.val = torch.full_like(problem.features.val, torch.nan)
    with pytest.raises(ValueError, match="features.val"):
        problem.features.val  # noqa: B018
