"""Which tensor a message was made from: told again by object, place or bytes, and never guessed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modiff.kernels import native
from modiff.nn import source
from modiff.nn.source import Source

HERE, THERE = ("default", 0), ("default", 1)
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(shape)


def overwritten(x: Tensor) -> None:
    """As a compiled kernel writes: no version counts it."""
    x.numpy()[...] += 1


def test_in_eager_execution_the_object_and_its_version_tell():
    x = torch.randn(3, 4)
    found = Source(x, None, HERE, True)
    assert found.carries(x, None, HERE)
    assert found.carries(x, None, THERE)
    assert not found.carries(x.clone(), None, HERE)
    assert not found.carries(x[:], None, HERE)
    x.mul_(1.0)
    assert not found.carries(x, None, HERE)


def test_an_object_that_is_gone_is_nobody():
    x = torch.randn(3, 4)
    found = Source(x, None, HERE, True)
    del x
    assert not found.carries(torch.randn(3, 4), None, HERE)


@needs_compiler
@pytest.mark.parametrize("place", [None, 0])
def test_where_the_object_is_silent_address_and_bytes_tell(place):
    x = inference(3, 4)
    found = Source(x, place, HERE, True)
    assert found.carries(x, place, HERE)
    with torch.inference_mode():
        assert found.carries(x.view(3, 4), place, HERE)
        assert not found.carries(x.clone(), place, HERE)
        x.neg_()
        assert not found.carries(x, place, HERE)


@needs_compiler
def test_in_a_graph_a_version_says_nothing():
    x = torch.randn(3, 4)
    found = Source(x, 0, HERE, True)
    overwritten(x)
    assert not found.carries(x, 0, HERE)


@pytest.mark.parametrize("place", [None, 0])
def test_where_nobody_can_tell_nothing_is_shared(monkeypatch, place):
    x = inference(3, 4)
    assert not Source(x, place, HERE, False).carries(x, place, HERE)
    monkeypatch.setattr(source, "fingerprint", lambda _: None)
    assert not Source(x, place, HERE, True).carries(x, place, HERE)


def test_a_place_in_a_graph_tells_whatever_the_object_is(monkeypatch):
    monkeypatch.setattr(source, "fingerprint", lambda _: pytest.fail("no pass over memory"))
    x = torch.randn(3, 4)
    found = Source(x, 7, HERE, True)
    assert found.carries(x.view(3, 4), 7, HERE)
    assert not found.carries(x, 8, HERE)
    assert not found.carries(x, 0, HERE)
    assert not found.carries(x, None, HERE)
    assert not found.carries(x, 7, THERE)  # the graph runs once more, on other tensors


@pytest.mark.parametrize("place", [0, 7])
def test_what_a_graph_reads_is_not_what_eager_execution_reads(place):
    x = torch.randn(3, 4)
    assert not Source(x, None, HERE, True).carries(x, place, HERE)
    assert not Source(x, place, HERE, True).carries(x, None, HERE)


def test_bytes_are_looked_at_only_for_readers_that_will_ask(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(source, "fingerprint", seen.append)
    Source(torch.randn(3), 0, HERE, False)
    Source(torch.randn(3), None, HERE, True)
    Source(torch.randn(3), 7, HERE, True)
    assert not seen
    Source(x := torch.randn(3), 0, HERE, True)
    assert seen[0] is x
