"Evaluation reads memory-mapped features batch by batch and keeps the scores of one batch."

import weakref

import numpy as np
import pytest
import torch

import vlmadapt as va
from vlmadapt.methods.base import Method
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.training.evaluation import evaluate

K, D, N = 3, 8, 5000  # three batches


def mapped(path, dtype):
    "Test features in a file, as a memory map, and their labels."
    rng = np.random.default_rng(1)
    y = np.arange(N) % K
    x = (rng.standard_normal((N, D)) + 3 * np.eye(K, D)[y]).astype(dtype)
    np.save(path, x)
    return np.load(path, mmap_mode="r"), y


def problem_of(test, class_names=("a", "b", "c")):
    text = torch.eye(len(class_names), D)
    support = text.repeat_interleave(4, 0), torch.arange(len(class_names)).repeat_interleave(4)
    return FewShotProblem.from_features(list(class_names), text, train=support, test=test)


class Counted(Method):
    "Zero-shot scores that are counted while they are alive."

    def constants(self, problem):
        self.alive, self.most, self.rows = [], 0, []
        return {"text": problem.features.text}

    new_class_scores = Method.zero_shot_scores

    def logits(self, batch):
        found = self.cosine_logits(batch.x, self.text)
        self.rows.append(len(batch.x))
        self.alive.append(weakref.ref(found))
        self.most = max(self.most, sum(x() is not None for x in self.alive))
        return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_test_features_are_not_copied(tmp_path, dtype):
    x, y = mapped(tmp_path / "x.npy", dtype)
    problem = problem_of((x, y))
    stored = problem.features.stored("test")
    assert stored.data_ptr() == x.ctypes.data
    assert stored.element_size() == x.itemsize
    assert problem.features.test.dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_of_earlier_batches_are_dropped(tmp_path, dtype):
    problem = problem_of(mapped(tmp_path / "x.npy", dtype))
    method = Counted(problem)
    found = evaluate(method, problem)
    assert sum(method.rows) == N and len(method.rows) == 3
    assert method.most <= 2
    assert problem.features.is_loaded("test") == (dtype == np.float32)  # no copy was made
    whole = problem.compare(method.outputs(problem, "test"), problem.labels["test"]._labels)
    assert found == whole


def test_half_precision_gives_the_scores_of_its_float32_copy(tmp_path):
    x, y = mapped(tmp_path / "x.npy", np.float16)
    half, full = problem_of((x, y)), problem_of((x.astype(np.float32), y))
    method = va.fit(va.create_method("TipAdapter", half), half, seed=1)
    assert torch.equal(method.outputs(half, "test"), method.outputs(full, "test"))
    assert torch.equal(method.scores(x), method.scores(x.astype(np.float32)))


def test_classes_that_were_not_fitted_are_streamed_too(tmp_path):
    x, y = mapped(tmp_path / "x.npy", np.float16)
    fitted = Counted(problem_of((x, y)))
    other = problem_of((x, y), ("a", "d", "b"))
    scores = fitted.outputs(other, "test")
    assert scores.shape == (N, 3)
    fitted.most = 0
    assert torch.equal(fitted.predicted_classes(other, "test"), scores.argmax(1))
    assert fitted.most <= 2


def test_a_method_with_outputs_of_its_own_is_asked_for_them(tmp_path):
    class Own(Counted):
        def outputs(self, problem, split):
            return torch.eye(K)[torch.zeros(N, dtype=torch.long)]

    x, y = mapped(tmp_path / "x.npy", np.float32)
    problem = problem_of((x, y))
    assert evaluate(Own(problem), problem)["predictions"] == [0] * N


def test_further_metrics_keep_the_scores(tmp_path):
    problem = problem_of(mapped(tmp_path / "x.npy", np.float16))
    method = Counted(problem)
    plain, further = evaluate(method, problem), evaluate(method, problem, metrics="top5_accuracy")
    assert further.pop("top5_accuracy") == 100
    assert plain == further


def test_half_precision_that_is_infinite_is_refused(tmp_path):
    x, y = mapped(tmp_path / "x.npy", np.float16)
    x = np.array(x)
    x[4000, 2] = np.inf
    with pytest.raises(ValueError, match=r"row 4000; half precision holds at most 65504"):
        problem_of((x, y))
