"""A number for the bytes of a tensor: it changes with any of them, and with nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.kernels import native
from modiff.kernels.native import fingerprint

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")

BLOCK = 1 << 18


def of(x: Tensor) -> int:
    found = fingerprint(x)
    assert found is not None
    return found[0]


def some(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


sizes = st.one_of(st.integers(1, 300), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77]))


@given(count=sizes, data=st.data())
def test_every_bit_counts(count, data):
    x = some(count)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 7))
    before = of(x)
    x[place] = x[place] ^ (1 << bit if bit < 7 else -128)
    assert of(x) != before
    x[place] = x[place] ^ (1 << bit if bit < 7 else -128)
    assert of(x) == before


@given(count=st.sampled_from([2, 130, BLOCK // 2]), data=st.data())
def test_two_values_that_change_places_are_seen(count, data):
    x = torch.randperm(count, generator=torch.Generator().manual_seed(2)).float()
    a = data.draw(st.integers(0, count - 1))
    b = data.draw(st.integers(0, count - 1).filter(lambda b: b != a))
    other = x.clone()
    other[[a, b]] = x[[b, a]]
    assert of(other) != of(x)


def test_whole_stripes_and_whole_blocks_that_change_places_are_seen():
    for count, part in [(4096, 64), (4 * BLOCK, BLOCK)]:
        x = some(count)
        turned = torch.cat([x[part : 2 * part], x[:part], x[2 * part :]])
        assert of(turned) != of(x)


def mixed(x: int) -> int:
    """The finalizer of splitmix64, as the loop takes its keys from it."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("high", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("low", [0, 1])
@pytest.mark.parametrize("bit", range(32))
def test_a_bit_is_seen_where_the_key_leaves_next_to_nothing_of_the_product(high, low, bit):
    key = mixed(0x9E3779B97F4A7C15)  # of the first word
    halves = [key % 2**32 ^ (low * (2**32 - 1)), key >> 32 ^ high]
    x = torch.tensor(halves, dtype=torch.int64).to(torch.uint32).view(torch.int32)
    before = of(x)
    x[0] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert of(x) != before


def test_changes_that_cancel_in_a_sum_are_seen():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    assert len({of(y) for y in (x, -x, x.flip(0), x.roll(1), x.roll(16), x * 2, x.abs())}) == 7


def test_more_zeros_are_another_tensor():
    assert len({of(torch.zeros(n)) for n in (1, 2, 15, 16, 17, 1 << 16, (1 << 16) + 1)}) == 7


def test_threads_do_not_change_it():
    x, threads = some(9 * BLOCK + 13), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.add(of(x))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_dtype_and_the_order_in_memory_belong_to_it(dtype):
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    inner = x.to(torch.float32).contiguous(memory_format=torch.channels_last).to(dtype)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(inner) == fingerprint(inner.clone())
    assert fingerprint(x) != fingerprint(inner)
    assert fingerprint(x) != fingerprint(x.view(6, 20))
    assert fingerprint(x) != fingerprint(x.view(torch.uint8))
    square = torch.ones(4, 4, dtype=torch.float32).to(dtype)
    assert fingerprint(square) != fingerprint(square.T)  # the same bytes


def test_a_part_of_a_tensor_has_its_own():
    x = some(4096)
    assert of(x[64:128]) == of(x[64:128].clone())  # nothing around it is read


@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 3), torch.zeros(4, 6)[:, :3], torch.zeros(1, 3).expand(2, 3), torch.zeros(3, device="meta"),
     torch.zeros(3, 3).to_sparse()],
    ids=["empty", "slice", "expanded", "meta", "sparse"],
)  # fmt: skip
def test_where_nothing_can_be_told_it_says_so(x):
    assert fingerprint(x) is None


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "load", lambda _: native.Native(None, "none"))
    assert fingerprint(torch.zeros(3)) is None
