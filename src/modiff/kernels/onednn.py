"""The integer backend of CPUs: PyTorch's oneDNN operators on uint8 activations and int8 weights.

Signed activations are never used: without AMX they run on a reference kernel that takes 10,000 times as long.
Without VNNI the sum of two products saturates at 16 bits and the result is silently wrong: `unsupported` rules that out
by the largest byte and the largest weight code, and `self_test` believes no processor.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from modiff.kernels.backend import PREPACKED, Backend, Operator
from modiff.kernels.epilogue import Integers, add_sent
from modiff.kernels.exact import REFERENCE
from modiff.kernels.isa import Isa, Trust
from modiff.kernels.layout import Geometry, output_shape
from modiff.kernels.problem import LARGEST_INT16, LARGEST_INT32, Problem

_IN_PLACE = (torch.float32, torch.bfloat16)
_BLOCK = 16
"""Channels of a group that oneDNN's fast grouped convolutions come in, on every instruction set."""


class OneDnn(Backend):
    """u8 x s8 products summed in int32; one operator adds into the state where one scale serves the whole tensor.

    Cost: a copy of the weight codes in oneDNN's layout, a byte a weight.
    """

    name = "onednn"
    devices = ("cpu",)

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Why oneDNN must not run the problem; empty if it may."""
        if len(problem.kernel_size) > 2:
            return "oneDNN's accumulating convolution has at most two axes"
        each = (problem.inputs // problem.groups, problem.outputs // problem.groups)
        if problem.groups > 1 and not problem.depthwise and any(n % _BLOCK for n in each):
            return f"oneDNN is slow for groups of {each[0]} and {each[1]} channels, which {_BLOCK} does not divide"
        if problem.largest_sum > LARGEST_INT32:
            return f"a sum of {problem.summed} products may pass 32 bits"
        byte = 2**problem.bits - 1
        pair = 2 * byte * problem.weight_max
        few_bits_run = isa.onednn and isa.level != "other" and isa.trust.bounded
        if (broken := self.broken(isa)) and (pair > LARGEST_INT16 or not few_bits_run):
            return broken
        if pair <= LARGEST_INT16 or isa.sums_in_int32:
            return ""
        return (
            f"{isa.level} has no VNNI: 2 x {byte} x {problem.weight_max} = {pair} saturates 16 bits; "
            "at most 7-bit weights, or 7-bit activations, run on integers here"
        )

    def broken(self, isa: Isa) -> str:
        """Operators that are missing, a processor they are not made for, or sums that the self-test saw wrong."""
        if not isa.onednn:
            return "this torch has no oneDNN integer operators"
        if isa.level == "other":
            return "oneDNN's integer kernels need x86 with SSE4.1"
        if not isa.trust.bounded or (isa.sums_in_int32 and not isa.trust.full):
            detail = f" ({isa.trust.detail})" if isa.trust.detail else ""
            return f"oneDNN failed the self-test on {isa.level}{detail}"
        return ""

    def reason(self, problem: Problem, isa: Isa) -> str:
        """One line for the report: the instructions, and why its sums are exact."""
        if isa.sums_in_int32:
            return f"oneDNN int8 on {isa.level}, sums in 32 bits"
        byte = 2**problem.bits - 1
        sums = f"2 x {byte} x {problem.weight_max} = {2 * byte * problem.weight_max}"
        return f"oneDNN int8 on {isa.level}: {sums} fits 16 bits"

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero point) * weight code, made in int32 and rounded once, to float32."""
        ones = torch.ones_like(operator.weight_scale, dtype=torch.float32)
        return _compute(operator._replace(weight_scale=ones), codes, _one(), None, torch.float32)

    def scaled(self, operator: Operator, codes: Tensor) -> Tensor:
        """weight scale * sums, float32: what is left is the scale of the codes."""
        return _compute(operator, codes, _one(), None, torch.float32)

    def accumulate(self, operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """output += scale * weight scale * sums; in the operator itself where there is one scale."""
        inside = scale.numel() == 1 and output.dtype in _IN_PLACE and _add_inside(operator, output, codes, scale)
        if not inside:
            super().accumulate(operator, output, codes, scale)

    def step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers = None
    ) -> None:
        """`accumulate`, and the new state into `output`; with a scale for each row both in one pass behind the sums."""
        if integers is None and scale.numel() == 1:
            self.accumulate(operator, state, codes, scale)
            output.copy_(state)
        else:
            sent = _compute(operator, codes, _one(), None, torch.float32)
            add_sent(state, integers, sent, scale, operator.axes, output)

    def compute(
        self, operator: Operator, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale * weight scale * sums + bias, in one operator where there is one scale."""
        if scale.numel() != 1 or dtype not in _IN_PLACE:
            return super().compute(operator, codes, scale, bias, dtype)
        return _compute(operator, codes, scale, None if bias is None else bias.float(), dtype)


def _compute(operator: Operator, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (weight, zeros), g = _weight(operator, codes), operator.geometry
    channels, zero = operator.weight_scale.flatten(), _zero_point(operator.bits)
    if operator.axes:
        return torch.ops.onednn.qconv_pointwise.tensor(
            codes, scale, zero, weight, channels, zeros, bias, g.stride, g.padding, g.dilation, g.groups,
            1.0, 0, dtype, "none", [], "",
        )  # fmt: skip
    rows = codes.reshape(-1, operator.shape[1])
    result = torch.ops.onednn.qlinear_pointwise.tensor(
        rows, scale, zero, weight, channels, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )
    return result.view(output_shape(codes.shape, operator.shape, g))


def _add_inside(operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> bool:
    g = operator.geometry
    if not output.is_contiguous(memory_format=torch.channels_last if operator.axes else torch.contiguous_format):
        return False
    weight, zeros = _weight(operator, codes)
    channels, zero = operator.weight_scale.flatten(), _zero_point(operator.bits)
    if operator.axes:
        torch.ops.onednn.qconv2d_pointwise.binary_tensor(
            codes, scale, zero, weight, channels, zeros, output, None, g.stride, g.padding, g.dilation, g.groups,
            1.0, 0, output.dtype, 1.0, 0, "sum", 1.0, "none", [], "",
        )  # fmt: skip
        return True
    rows = output.view(-1, operator.shape[0])
    result = torch.ops.onednn.qlinear_pointwise.binary_tensor(
        codes.reshape(-1, operator.shape[1]), scale, zero, weight, channels, zeros, rows, None,
        1.0, 0, output.dtype, 1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
    if result.data_ptr() != rows.data_ptr():
        rows.copy_(result)
    return True


def _weight(operator: Operator, codes: Tensor) -> tuple[Tensor, ...]:
    key = ("onednn", operator.shape, operator.geometry, operator.bits)
    return PREPACKED.get(operator.weight, key, lambda: _pack(operator, codes))


def _pack(operator: Operator, codes: Tensor) -> tuple[Tensor, Tensor]:
    weight, g = operator.weight_codes().contiguous(), operator.geometry
    zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    if not operator.axes:
        return torch.ops.onednn.qlinear_prepack(weight, None), zeros
    ones = torch.ones(len(weight), dtype=torch.float32, device="cpu")
    settings = (operator.zero_point, g.stride, g.padding, g.dilation, g.groups, list(codes.shape))
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, *settings), zeros


@functools.cache
def _one() -> Tensor:
    return torch.ones((), dtype=torch.float32, device="cpu")


@functools.cache
def _zero_point(bits: int) -> Tensor:
    return torch.tensor(2 ** (bits - 1), device="cpu")


ONEDNN = OneDnn()

_WORST = ((8, 64), (7, 128), (4, 128))
"""(bits, largest weight code) that just stay below the 16 bits of a pair of products."""


@functools.cache
def self_test() -> Trust:
    """Does oneDNN add up right on this machine? Asked once per process. Cost: under a millisecond."""
    try:
        bounded = all(_right(*case) for bits, weight in _WORST for case in _cases(bits, weight))
        return Trust(bounded, bounded and all(_right(*case) for case in _cases(8, 128)))
    except (RuntimeError, AttributeError, TypeError) as error:
        return Trust(bounded=False, full=False, detail=str(error).splitlines()[0])


def _right(operator: Operator, codes: Tensor) -> bool:
    return torch.equal(ONEDNN.sums(operator, codes).double(), REFERENCE.sums(operator, codes))


def _cases(bits: int, weight: int) -> Iterator[tuple[Operator, Tensor]]:
    """All-largest codes next to alternating signs, for each kind of layer: what makes a wrong sum fail."""
    for shape, geometry, size in (
        ((24, 64), Geometry(), (5, 64)),
        ((17, 131), Geometry(), (33, 131)),
        ((16, 32, 3, 3), Geometry((1, 1), (1, 1), (1, 1)), (1, 32, 5, 5)),
        ((7, 5, 3, 3), Geometry((1, 1), (1, 1), (1, 1)), (2, 5, 4, 4)),
    ):
        codes = torch.full(size, 2**bits - 1, dtype=torch.uint8, device="cpu")
        codes[0] //= 2
        weights = torch.full(shape, -weight, dtype=torch.int8, device="cpu")
        weights[::2] = min(weight, 127)
        scales = torch.ones(shape[0], *[1] * geometry.axes, dtype=torch.float32, device="cpu")
        yield Operator(weights, shape, scales, geometry, geometry.axes, bits, weight), codes
