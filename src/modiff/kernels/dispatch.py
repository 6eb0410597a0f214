"""Which backend runs a layer, and why: a pure function of the problem, the instruction set and the self-test."""

from __future__ import annotations

from typing import Literal, NamedTuple

from modiff.kernels.exact import chunk_of
from modiff.kernels.isa import Isa
from modiff.kernels.problem import Problem
from modiff.kernels.self_test import Trust
from modiff.kernels.triton.backend import gpu_obstacle

Backend = Literal["reference", "float_exact", "onednn", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "float_exact", "onednn", "triton")

_INT16, _INT32 = 2**15 - 1, 2**31 - 1
_BLOCK = 16
"""Channels of a group that oneDNN's fast grouped convolutions come in, on every instruction set."""


class Choice(NamedTuple):
    """A backend, and one line for `explain`."""

    backend: Backend
    reason: str


def choose_backend(problem: Problem, isa: Isa, trust: Trust | None = None) -> Choice:
    """The fastest backend whose sums are exact for this problem.

    Args:
        trust: what the self-test found; None takes oneDNN at its word.
    """
    trust = Trust() if trust is None else trust
    if problem.device != "cpu":
        gpu = gpu_obstacle(problem)
        return Choice("reference", f"float64 sums, slow: {gpu}") if gpu else Choice("triton", "Triton, sums in 32 bits")
    unsupported = onednn_unsupported(problem, isa, trust)
    if not unsupported:
        return Choice("onednn", _why_onednn(problem, isa))
    other = float_exact_obstacle(problem, isa)
    if not other:
        chunk = chunk_of(problem.bits, problem.weight_max, problem.kernel_size)
        pieces = -(-problem.inputs // problem.groups // chunk)
        return Choice("float_exact", f"float32 sums, exact in {pieces} chunk{'s' * (pieces > 1)}: {unsupported}")
    return Choice("reference", f"float64 sums, slow: {unsupported}; {other}")


def onednn_unsupported(problem: Problem, isa: Isa, trust: Trust) -> str:
    """Why oneDNN must not run the problem; empty if it may."""
    if problem.device != "cpu":
        return f"oneDNN runs on CPUs, the codes are on {problem.device}"
    if not isa.onednn:
        return "this torch has no oneDNN integer operators"
    if isa.level == "other":
        return "oneDNN's integer kernels need x86 with SSE4.1"
    if len(problem.kernel_size) > 2:
        return "oneDNN's accumulating convolution has at most two axes"
    each = (problem.inputs // problem.groups, problem.outputs // problem.groups)
    if problem.groups > 1 and not problem.depthwise and any(n % _BLOCK for n in each):
        return f"oneDNN is slow for groups of {each[0]} and {each[1]} channels, which {_BLOCK} does not divide"
    if problem.largest_sum > _INT32:
        return f"a sum of {problem.summed} products may pass 32 bits"
    if not trust.bounded:
        return f"oneDNN failed the self-test{f' ({trust.detail})' if trust.detail else ''}"
    pair = 2 * problem.largest_byte * problem.weight_max
    if pair <= _INT16 or (isa.sums_in_int32 and trust.full):
        return ""
    cause = "failed the self-test" if isa.sums_in_int32 else "has no VNNI"
    return (
        f"{isa.level} {cause}: 2 x {problem.largest_byte} x {problem.weight_max} = {pair} saturates 16 bits; at most "
        "7-bit weights, or 7-bit activations, run on integers here"
    )


def float_exact_obstacle(problem: Problem, isa: Isa) -> str:
    """Why float32 sums must not run the problem; empty if they may."""
    if problem.device != "cpu":
        return f"float32 convolutions on {problem.device} may take inexact algorithms"
    if problem.kernel_size and not problem.pointwise and not isa.onednn:
        return "without oneDNN a float32 convolution may take an inexact algorithm"
    if chunk_of(problem.bits, problem.weight_max, problem.kernel_size) == 0:
        return "one channel's products alone pass 2^24"
    if problem.largest_sum > _INT32:
        return "chunks are added in 32 bits"
    return ""


def _why_onednn(problem: Problem, isa: Isa) -> str:
    if isa.sums_in_int32:
        return f"oneDNN int8 on {isa.level}, sums in 32 bits"
    pair = 2 * problem.largest_byte * problem.weight_max
    return f"oneDNN int8 on {isa.level}: 2 x {problem.largest_byte} x {problem.weight_max} = {pair} fits 16 bits"
