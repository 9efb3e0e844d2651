"""Training that runs out of memory, and training that never waits for a GPU."""

import pytest
import torch

import vlmadapt as va
from vlmadapt.methods import METHODS
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
