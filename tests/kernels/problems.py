"""Random layers on integer codes, with their sums by explicit loops."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from modiff.kernels import native
from modiff.kernels.encode import encode_eagerly, encode_residual, past_of
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.kernel import Kernel
from modiff.kernels.layout import innermost, layout_of
from modiff.kernels.problem import Problem
from tests.reference import layers

BACKENDS = ("reference", "float_exact", "onednn")
GRANULARITIES = ("tensor", "sample", "token")
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def none_clipped() -> Tensor:
    """A count of what left 16 bits, before anything did."""
    return torch.zeros(1, dtype=torch.int32)


@st.composite
def problems(draw: st.DrawFn, bits: st.SearchStrategy[int] | None = None) -> Problem:
    """Linear layers and convolutions of one and two axes, any stride, padding, dilation and grouping."""
    axes = draw(st.integers(0, 2))
    one = draw(st.booleans())  # a kernel of size 1 without padding: a matmul, if it has no stride
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 16])) if axes else 1
    most = {1: 9, 16: 2}.get(groups, 4)
    each = st.lists(st.integers(1, 2), min_size=axes, max_size=axes).map(tuple)
    return Problem(
        inputs=groups * draw(st.integers(1, most)),
        outputs=groups * draw(st.integers(1, most - 1)),
        kernel_size=(1,) * axes if one else draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes).map(tuple)),
        stride=draw(each),
        padding=draw(st.lists(st.integers(0, 0 if one else 2), min_size=axes, max_size=axes).map(tuple)),
        dilation=draw(each),
        groups=groups,
        bits=draw(st.integers(2, 8) if bits is None else bits),
        weight_max=draw(st.sampled_from([7, 8, 64, 127, 128])),
    )


def operands(problem: Problem, seed: int, *, inner: bool = True, extreme: bool = False) -> tuple[Tensor, Tensor]:
    """(uint8 codes, int8 weight codes); half of both are the extreme codes where asked, so that pairs saturate."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, problem.inputs) if not problem.kernel_size else (2, problem.inputs, *[5] * len(problem.kernel_size))
    codes = torch.randint(0, 2**problem.bits, shape, generator=generator)
    largest = min(problem.weight_max, 127)
    weight = torch.randint(-problem.weight_max, largest + 1, problem.weight_shape, generator=generator)
    if extreme:
        codes[0], weight[::2] = 2**problem.bits - 1, largest
    codes = codes.to(torch.uint8)
    if problem.kernel_size and inner:
        codes = innermost(codes)
    return codes, weight.to(torch.int8)


def sums_of(problem: Problem, codes: Tensor, weight: Tensor, backend: str) -> Tensor:
    """The sums of one backend, whether dispatch would choose it or not."""
    return Kernel(problem, weight, torch.ones(problem.outputs, device=weight.device), backend=backend).sums(codes)


def exact_sums(problem: Problem, codes: Tensor, weight: Tensor) -> Tensor:
    """sum (code - zero) * weight code by loops, in float64."""
    values = codes.double() - 2 ** (problem.bits - 1)
    if not problem.kernel_size:
        return layers.linear(values, weight)
    return layers.conv(
        values, weight.double(), stride=problem.stride, padding=problem.padding, dilation=problem.dilation,
        groups=problem.groups,
    )  # fmt: skip


def scales(problem: Problem, codes: Tensor, kind: str) -> Tensor:
    """Activation scales: one number of no axes, one for each sample, or one for each token."""
    if kind == "one":
        return torch.tensor(0.03)
    if kind == "token":
        size = codes.shape[:-1] if not problem.kernel_size else (codes.shape[0], *codes.shape[2:])
        found = torch.rand(size) * 0.05 + 0.01
        return found.unsqueeze(1 if problem.kernel_size else -1)
    return torch.rand(codes.shape[0], *[1] * (codes.dim() - 1)) * 0.05 + 0.01


def eagerly(x, state, scale, bits, clip=1.0, granularity="tensor", *, channel_dim=-1, **loop):
    """`encode_residual` by torch's operators."""
    past = past_of(x, state, scale, *map(loop.get, ("move", "gain", "clipped")))
    return encode_eagerly(x.detach(), past, scale, layout_of(x.shape, x.stride(), bits, clip, granularity, channel_dim))


ENCODERS = {"native": encode_residual, "eager": eagerly, "fused": InputFusion().encode}


def along(*sizes: int) -> dict[str, tuple[int, ...]]:
    """The settings of a convolution that keeps its image, of these kernel sizes; none of a linear layer."""
    ones = (1,) * len(sizes)
    return {"kernel_size": sizes, "stride": ones, "padding": tuple(size // 2 for size in sizes), "dilation": ones}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """That many threads of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
