"""Training that runs out of memory, and training that never waits for a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlmadapt as va
from vlmadapt.methods import METHODS
from vlmadapt.reporting.bench_parts import exact_float32
from vlmadapt.training import batched
from vlmadapt.training.loop import make_optimizer


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(8)
    support = torch.randn(2, 40, 16, generator=generator)
    text = torch.randn(5, 16, generator=generator)
    return va.from_features(list("abcde"), text, train=(support, labels), text_neg=-text)


def runs(problem, count=5):
    rates = [1e-4 * 3**i for i in range(count)]
    return [(METHODS["TaskRes"], dict(lr=lr, epochs=3), problem, 1) for lr in rates]


@pytest.mark.parametrize("most", [3, 1])
def test_smaller_stacks_are_tried_where_memory_is_short(problem, most, monkeypatch):
    expected = va.fit_many(runs(problem))
    sizes = []
    whole = batched.Stacked.backward

    def limited(self, *arguments):
        sizes.append(len(self.methods))
        if len(self.methods) > most:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, *arguments)

    monkeypatch.setattr(batched.Stacked, "backward", limited)
    found = va.fit_many(runs(problem))
    assert sizes[0] == 5 and max(sizes[1:]) > 1
    for a, b in zip(expected, found, strict=True):
        assert len(b.log) == 3
        torch.testing.assert_close(a.X, b.X, rtol=1e-4, atol=1e-6)


def test_a_single_run_without_memory_fails(problem, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(METHODS["TaskRes"], "loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        va.fit_many(runs(problem, 2))


def test_large_runs_are_trained_one_by_one_on_a_processor(problem, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a stack")

    expected = va.fit_many(runs(problem, 2))
    monkeypatch.setattr(batched, "train_stacked", refuse)
    with pytest.raises(AssertionError, match="a stack"):
        va.fit_many(runs(problem, 2))
    monkeypatch.setattr(batched, "PROCESSOR_LIMIT", 10)
    found = va.fit_many(runs(problem, 2))
    torch.testing.assert_close(found[1].X, expected[1].X, rtol=1e-4, atol=1e-6)


def test_a_stack_on_a_processor_holds_no_more_than_its_caches(problem, monkeypatch):
    sizes = []
    train_stacked = batched.train_stacked

    def record(methods, *arguments):
        sizes.append(len(methods))
        train_stacked(methods, *arguments)

    expected = va.fit_many(runs(problem, 4))
    monkeypatch.setattr(batched, "train_stacked", record)
    monkeypatch.setattr(batched, "PROCESSOR_LIMIT", 2 * expected[0].trainable_parameters())
    found = va.fit_many(runs(problem, 4))
    assert sizes == [2, 2]
    torch.testing.assert_close(found[3].X, expected[3].X, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU computes asynchronously")
@pytest.mark.parametrize("name", ["TaskRes", "GraphAdapter", "HeGraphAdapter", "TipAdapterF"])
def test_a_step_of_training_does_not_wait_for_the_gpu(problem, name):
    method = METHODS[name](problem, batch_size=8).reset(1).to("cuda")
    optimizer = make_optimizer([method])
    batches = iter(method.batches(problem, 1))

    def step(batch):
        method.zero_grad()
        method(batch, "loss").backward()
        optimizer.step()

    step(next(batches))  # kernels are loaded, and the order of the epoch is copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# operators whose result the processor has to wait for
WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique")


class Waits(TorchDispatchMode):
    "Counts the operators for which a processor would wait for a GPU."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__.startswith(WAITING)
        return function(*args, **(kwargs or {}))


def waits(problem, name, runs, batch_size):
    values = dict(epochs=2, batch_size=batch_size, drop_last=False)
    rates = [1e-3 * (i + 1) for i in range(runs)]
    with Waits() as found:
        va.fit_many([(METHODS[name], dict(lr=lr, **values), problem, 1) for lr in rates])
    return found.count


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(
    "name", ["TaskRes", "GraphAdapter", "HeGraphAdapter", "TipAdapterF", "CLIPAdapter"]
)
def test_waits_do_not_depend_on_the_number_of_steps(problem, name, runs):
    "No number is read in a step: what a GPU would be waited for happens once an epoch at most."
    waits(problem, name, runs, 40)  # constants of the problem
    one_step = waits(problem, name, runs, 40)
    assert one_step == waits(problem, name, runs, 8)  # five steps


def test_waits_are_counted():
    x = torch.ones(3)
    with Waits() as found:
        float(x.sum())
        bool((x > 0).all())
        x.tolist()
    assert found.count >= 2


def test_exact_float32_restores_what_it_changes():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the processor")
@pytest.mark.parametrize("name", ["TaskRes", "GraphAdapter", "HeGraphAdapter", "TipAdapterF"])
def test_a_gpu_finds_what_the_processor_finds(problem, name):
    def scores(device):
        method = va.fit(METHODS[name](problem, epochs=5), problem, device=device)
        return method.scores(problem.features.train)

    with exact_float32():
        torch.testing.assert_close(scores("cuda"), scores("cpu"), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["CoOp", "MuDPT"])
def test_towers_train_and_predict_under_autocast(name):
    "In the backbone's precision, both where they are trained and where they predict."
    problem = va.few_shot("mini-digits", shots=1)
    problem.backbone.precision, precision = "bf16", problem.backbone.precision
    entered = []
    whole = type(problem.backbone).autocast

    def counted(self):
        entered.append(self.precision)
        return whole(self)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(problem.backbone), "autocast", counted)
            method = METHODS[name](problem, epochs=1)
            va.fit(method, problem, progress=False)
            trained = len(entered)
            method.scores(method.inputs(problem, "train"))
    finally:
        problem.backbone.precision = precision
    assert trained > 0 and len(entered) > trained and set(entered) == {"bf16"}


@pytest.mark.parametrize("equal_rates", [True, False])
def test_the_optimiser_sees_one_tensor_for_neighbours(problem, equal_rates):
    rates = [1e-3, 1e-3, 1e-3] if equal_rates else [1e-2, 1e-3, 1e-2]
    methods = [METHODS["TaskRes"](problem, lr=lr) for lr in rates]
    stack = batched.Stacked(methods)
    optimizer = make_optimizer(methods)
    joined = [stack.joined(group["params"]) for group in optimizer.param_groups]
    shapes = [[len(x) for x in group] for group in joined]
    assert shapes == ([[3]] if equal_rates else [[1, 1], [1]])
    for group in joined:
        for part in group:
            part.add_(1.0)
    assert all((method.X == 1).all() for method in methods)
