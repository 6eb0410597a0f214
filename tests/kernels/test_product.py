"""The compiled loops in every form that this processor can run: their sums are exact, also where 16 bits just hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modiff.core.affine import qrange
from modiff.kernels import native
from modiff.kernels.backend import Operator
from modiff.kernels.epilogue import add_eagerly
from modiff.kernels.exact import REFERENCE
from modiff.kernels.kernel import Kernel
from modiff.kernels.layout import Geometry, innermost
from modiff.kernels.product import NATIVE, family
from modiff.nn.weight import pack_nibbles
from tests.kernels.problems import exact_sums, needs_compiler, none_clipped, on_threads, problems
from tests.kernels.problems import operands as operands_of

pytestmark = needs_compiler
LINEAR = Geometry()
FAMILIES = {"plain": (0, "", ()), "avx2": (1, "avx2", ("-mavx2",)), "vnni": (2, "avx_vnni", ("-mavx2", "-mavxvnni")),
            "vnni512": (3, "avx512_vnni", ("-mavx512f", "-mavx512vnni"))}  # fmt: skip
"""Number, capability of the processor, and the compiler's flags."""


@pytest.fixture(params=FAMILIES)
def loops(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The loops compiled for one set of instructions."""
    number, needed, flags = FAMILIES[request.param]
    if needed and not torch.cpu.get_capabilities().get(needed):
        pytest.skip(f"this processor has no {needed}")
    folder: Path = tmp_path_factory.getbasetemp() / "families"
    monkeypatch.setenv(native.CACHE, str(folder))
    monkeypatch.setattr(native, "_ATTEMPTS", ((*flags, "-fopenmp"), flags))
    native.load_library.cache_clear()
    assert family() == number
    yield number
    native.load_library.cache_clear()


def operator(weight: torch.Tensor, bits: int, geometry: Geometry = LINEAR, *, halves: bool = False) -> Operator:
    """With random scales; weights of 4 bits two in a byte where asked."""
    scales = torch.rand(len(weight), *[1] * geometry.axes)
    stored = pack_nibbles(weight) if halves else weight
    return Operator(stored, tuple(weight.shape), scales, geometry, geometry.axes, bits, int(weight.abs().max()))


def worst_codes(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """For each output the codes that drive its sums highest, and those that drive them lowest."""
    rows = weight.flatten(1)
    return torch.cat([(rows > 0).to(torch.uint8), (rows < 0).to(torch.uint8)]) * (2**bits - 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("spread", [3.0, 30.0, 1e9])  # bell-shaped, or every weight at its bound
@pytest.mark.parametrize("largest", [7, 127])
@pytest.mark.parametrize("shape", [(19, 1030), (19, 57, 3, 3)])
def test_sums_are_exact_where_every_lane_is_driven_to_its_bound(bits, spread, largest, shape, loops):
    weight = (torch.randn(shape) * spread).round().clamp(-largest - 1, largest).to(torch.int8)
    geometry = Geometry((1, 1), (0, 0), (1, 1)) if shape[2:] else LINEAR
    operands = operator(weight, bits, geometry, halves=largest == 7)
    codes = worst_codes(weight, bits).reshape(-1, *shape[1:])
    assert torch.equal(NATIVE.sums(operands, codes).double(), REFERENCE.sums(operands, codes))


@given(
    problem=problems(), seed=st.integers(0, 9**9), inner=st.booleans(), extreme=st.booleans(), shift=st.integers(0, 3)
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_layers_add_up_exactly_in_any_memory(problem, seed, inner, extreme, shift, loops):
    codes, weight = operands_of(problem, seed, inner=inner, extreme=extreme)
    shifted = torch.empty(codes.numel() + shift, dtype=torch.uint8)[shift:].as_strided(codes.shape, codes.stride())
    operands = operator(weight, problem.bits, problem.geometry, halves=problem.weight_max == 7)
    kernel = Kernel(problem, operands.weight, torch.ones(problem.outputs), backend="native")
    assert torch.equal(kernel.sums(shifted.copy_(codes)).double(), exact_sums(problem, codes, weight))


@pytest.mark.parametrize(("bits", "halves"), [(4, True), (8, False)])
def test_three_rows_of_a_product_worth_eight_threads_add_up_exactly_and_take_their_step(bits, halves, loops):
    low, high = (-8, 7) if halves else qrange(8)
    operands = operator(torch.randint(low, high + 1, (400, 1030), dtype=torch.int8), bits, halves=halves)
    codes = torch.randint(0, 2**bits, (3, 1030), dtype=torch.uint8)
    expected = REFERENCE.sums(operands, codes)
    with on_threads(8):
        assert torch.equal(NATIVE.sums(operands, codes).double(), expected)
        check_step(operands, codes, torch.rand(3, 1), expected.float() * operands.weight_scale)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "geometry"),
    [
        (1, 1, (1, 1), Geometry((1, 1), (0, 0), (1, 1))),
        (7, 17, (3, 3), Geometry((1, 1), (1, 1), (1, 1))),
        (5, 33, (3, 2), Geometry((2, 1), (2, 0), (1, 2))),
        (8, 16, (1, 3), Geometry((1, 1), (0, 1), (1, 1))),
        (12, 20, (3, 3), Geometry((2, 2), (1, 1), (1, 1), 2)),
        (16, 48, (5, 5), Geometry((1, 1), (2, 2), (1, 1), 4)),
    ],
)
@pytest.mark.parametrize("bits", [3, 8])
def test_convolutions_of_any_geometry_add_up_exactly_and_take_their_step(inputs, outputs, size, geometry, bits, loops):
    low, high = qrange(8)
    weight = torch.randint(low, high + 1, (outputs * geometry.groups, inputs, *size), dtype=torch.int8)
    operands = operator(weight, bits, geometry)
    codes = torch.randint(0, 2**bits, (2, inputs * geometry.groups, 6, 9), dtype=torch.uint8)
    expected = REFERENCE.sums(operands, codes)
    with on_threads(3):
        assert torch.equal(NATIVE.sums(operands, codes).double(), expected)
        for scale in (torch.rand(1), torch.rand(2, 1, 1, 1), torch.rand(2, 1, *expected.shape[2:])):
            check_step(operands, codes, scale, expected.float() * operands.weight_scale)


@pytest.mark.parametrize(("bits", "halves", "axes"), [(4, False, 0), (4, True, 2), (8, False, 0), (8, False, 2)])
def test_rows_of_zero_codes_are_left_out_of_the_product_and_sum_up_to_nothing(bits, halves, axes, loops):
    low, high = (-8, 7) if halves else qrange(8)
    shape = (45, 150) if axes == 0 else (44, 75, 1, 1)
    geometry = LINEAR if axes == 0 else Geometry((2, 1), (0, 0), (1, 1), 2)
    operands = operator(torch.randint(low, high + 1, shape, dtype=torch.int8), bits, geometry, halves=halves)
    codes = torch.randint(0, 2**bits, (4, 50, 150), dtype=torch.uint8)
    codes[torch.rand(4, 50) < 0.5] = operands.zero_point
    codes[0], codes[1, :, :149], codes[1, :, 149] = operands.zero_point, operands.zero_point, 0  # none, and one code
    if axes:
        codes = codes.unflatten(1, (5, 10)).movedim(-1, 1)
    expected = REFERENCE.sums(operands, codes)
    with on_threads(2):
        assert torch.equal(NATIVE.sums(operands, codes).double(), expected)
        check_step(operands, codes, torch.rand(1), expected.float() * operands.weight_scale)


def check_step(operands: Operator, codes: torch.Tensor, scale: torch.Tensor, sent: torch.Tensor) -> None:
    """Float and integer states, outputs and biases as torch's own operators have them, bit for bit."""
    lay = innermost if operands.axes else torch.Tensor.contiguous
    grid = torch.tensor(2.0**-4)
    for dtype in (torch.float32, torch.bfloat16):
        for start, integers in (
            (torch.randn(sent.shape), None),
            (torch.randint(-30000, 30000, sent.shape, dtype=torch.int16), (grid, none_clipped())),
        ):
            states = [lay(start.clone()), lay(start.clone())]
            outputs = [lay(torch.empty(sent.shape, dtype=dtype)) for _ in states]
            counts = None if integers is None else (grid, none_clipped())
            NATIVE.step(operands, states[0], codes, scale, outputs[0], integers)
            add_eagerly(states[1], counts, lay(sent), scale, outputs[1])
            assert torch.equal(states[0], states[1])
            assert torch.equal(outputs[0], outputs[1])
            assert integers is None or counts is None or torch.equal(integers[1], counts[1])
    bias = torch.randn(len(operands.weight))
    shaped = bias.reshape(-1, *[1] * operands.axes)
    assert torch.equal(NATIVE.compute(operands, codes, scale, bias, torch.float32), shaped + sent * scale)
