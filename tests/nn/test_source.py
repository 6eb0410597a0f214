"""Which tensor a message was made from: told again by object, place or bytes, and never guessed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modiff.kernels import native
from modiff.nn import source
from modiff.nn.source import Source

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(shape)


def knows(found: Source, x: Tensor, place: int | None = None) -> bool:
    """Both for a layer that begins and for one that goes on."""
    begins = found.begins(x, place)
    assert begins == found.carries(x, place)
    return begins


def test_in_eager_execution_the_object_and_its_version_tell():
    x = torch.randn(3, 4)
    found = Source(x, None, True)
    assert knows(found, x)
    assert not knows(found, x.clone())
    assert not knows(found, x[:])
    x.mul_(1.0)
    assert not knows(found, x)


def test_an_object_that_is_gone_is_nobody():
    x = torch.randn(3, 4)
    found = Source(x, None, True)
    del x
    assert not knows(found, torch.randn(3, 4))


@needs_compiler
@pytest.mark.parametrize("place", [None, 0])
def test_where_the_object_is_silent_bytes_tell_and_at_the_start_the_address(place):
    x = inference(3, 4)
    found = Source(x, place, True)
    assert knows(found, x, place)
    with torch.inference_mode():
        assert knows(found, x.view(3, 4), place)
        assert not found.begins(x.clone(), place)
        assert found.carries(x.clone(), place)
        x.neg_()
        assert not knows(found, x, place)


@needs_compiler
def test_a_temporary_that_is_gone_is_not_the_next_one_in_its_memory():
    x = inference(3, 4)
    found = Source(x, None, True)
    with torch.inference_mode():
        again = x[:]  # the memory and the bytes, but another tensor
        del x
        assert not found.begins(again, None)


@needs_compiler
def test_in_a_graph_a_version_says_nothing():
    x = torch.randn(3, 4)
    found = Source(x, 0, True)
    x.numpy()[...] += 1  # as a compiled kernel writes
    assert not knows(found, x, 0)


@pytest.mark.parametrize("place", [None, 0])
def test_where_nobody_can_tell_nothing_is_shared(monkeypatch, place):
    x = inference(3, 4)
    assert not knows(Source(x, place, False), x, place)
    monkeypatch.setattr(source, "fingerprint", lambda _: None)
    assert not knows(Source(x, place, True), x, place)


def test_a_place_in_a_graph_tells_whatever_the_object_is(monkeypatch):
    monkeypatch.setattr(source, "fingerprint", lambda _: pytest.fail("no pass over memory"))
    x = torch.randn(3, 4)
    found = Source(x, -7, True)
    assert knows(found, x.view(3, 4), 7)
    assert not knows(found, x, 8)
    assert not knows(found, x, None)
    assert not found.begins(x, -7)  # the first that reads it in another run of the graph
    assert found.carries(x, -7)


@pytest.mark.parametrize("place", [0, 7, -7])
def test_what_a_graph_reads_is_not_what_eager_execution_reads(place):
    x = torch.randn(3, 4)
    assert not knows(Source(x, None, True), x, place)
    assert not knows(Source(x, place, True), x, None)


@pytest.mark.parametrize("place", [0, 7, -7])
def test_what_has_a_number_is_not_what_has_none(place):
    x = torch.randn(3, 4)
    other = 0 if place else 7
    assert not knows(Source(x, place, True), x, other)


def test_bytes_are_looked_at_only_for_readers_that_will_ask(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(source, "fingerprint", seen.append)
    Source(torch.randn(3), 0, False)
    Source(torch.randn(3), None, True)
    Source(torch.randn(3), 7, True)
    assert not seen
    Source(x := torch.randn(3), 0, True)
    assert seen[0] is x
