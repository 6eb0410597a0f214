"""The operators as torch sees them: schemas, fake implementations, tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modiff.kernels import native, ops, prologue_ops
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from modiff.kernels.prologue import prologue
from tests.helpers import assert_same_bits
from tests.kernels.problems import operands

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
LINEAR = Problem(12, 10, bits=4)
CONV = Problem(12, 10, (3, 3), (1, 1), (1, 1), (1, 1), bits=4)
ONE = Problem(12, 10, (1, 1), (1, 1), (0, 0), (1, 1), bits=4)
ALONG = Problem(12, 10, (3,), (2,), (1,), (1,), bits=4)


@pytest.mark.parametrize("backend", ["reference", "float_exact", "onednn"])
@pytest.mark.parametrize("problem", [LINEAR, CONV, ONE, ALONG], ids=["linear", "conv", "one", "along"])
@pytest.mark.parametrize("scale", ["one", "sample"])
def test_the_fake_operators_promise_what_the_real_ones_do(backend, problem, scale):
    codes, weight = operands(problem, 0)
    kernel = Kernel(problem, weight, torch.rand(10), backend=backend)
    factor = torch.tensor(0.1) if scale == "one" else torch.rand(2, *[1] * (codes.dim() - 1))
    p, g = problem, kernel.geometry
    before = (codes, weight, p.weight_shape, kernel.weight_scale, factor)
    after = (g.stride, g.padding, g.dilation, g.groups, p.bits, p.weight_max, backend)
    torch.library.opcheck(ops.accumulate, (kernel.new_output(codes), *before, *after), test_utils=CHECKS)
    for bias in (None, torch.rand(10)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(ops.compute, (*before, bias, *after, dtype), test_utils=CHECKS)


@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
@pytest.mark.parametrize("innermost", [False, True])
def test_the_fake_input_side_promises_what_the_real_one_does(granularity, innermost):
    x = torch.randn(2, 3, 4, 5)
    x = x.contiguous(memory_format=torch.channels_last) if innermost else x
    for move, gain in ((None, None), (torch.randn_like(x), torch.tensor(0.5))):
        dynamic = (x, torch.randn_like(x), move, gain, 4, 0.5, granularity, 1)
        torch.library.opcheck(prologue_ops.code_dynamic, dynamic, test_utils=CHECKS)
        static = (x, torch.randn_like(x), move, gain, torch.tensor(0.1), 4, granularity, 1)
        torch.library.opcheck(prologue_ops.code_static, static, test_utils=CHECKS)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.1), torch.full((2, 1, 1), 0.1)])
def test_the_fake_plain_quantizer_promises_what_the_real_one_does(scale):
    torch.library.opcheck(
        prologue_ops.code_plain, (torch.randn(2, 3, 4), scale, 4, 0.5, "sample", -1), test_utils=CHECKS
    )


@pytest.mark.skipif(native.find_compiler() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("problem", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_compiled_step_is_one_graph_and_equals_the_eager_one_bit_for_bit(problem, dynamic):
    codes, weight = operands(problem, 3)
    kernel = Kernel(problem, weight, torch.rand(10) + 0.1)
    granularity, channel = ("sample", 1) if problem.kernel_size else ("token", -1)

    def step(x: Tensor, state: Tensor, output: Tensor, scale: Tensor | None) -> Tensor:
        sent, used = prologue(x, state, scale, 4, 0.8, granularity, channel_dim=channel)
        kernel.accumulate(output, sent, used)
        return sent

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    states = [torch.empty_like(codes, dtype=torch.float32).zero_() for _ in range(2)]
    outputs = [kernel.new_output(codes) for _ in range(2)]
    with torch.no_grad():
        for number in range(4):
            x = torch.empty_like(states[0]).normal_()
            scale = None if dynamic else torch.tensor(0.05 / (number + 1))
            sent = [f(x, s, o, scale) for f, s, o in zip((step, compiled), states, outputs, strict=True)]
            assert_same_bits(sent[1], sent[0])
            assert_same_bits(states[1], states[0])
            assert_same_bits(outputs[1], outputs[0])
    assert counter.frame_count == 1
