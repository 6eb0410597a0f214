"""Layers of a compiled graph that read one tensor share its codes; those that read others in its memory do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff.kernels import native
from modiff.nn import fusion, sharing, traced
from modiff.nn.layer import ModulatedLayer
from tests.helpers import assert_within, drifting
from tests.nn.fusing import W8A8, Model, fused, taken

NAMES = ("to_q", "to_k", "to_v")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


def made(call: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return taken(Model(call, **{name: nn.Linear(32, 32) for name in NAMES}, **more).eval(), W8A8)


def one_tensor(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x) + 1
    return m.to_q(y) + m.to_k(y) * m.to_v(y)


def one_view(m: Any, x: Tensor) -> Tensor:
    y = (torch.tanh(x) + 1).flatten(0, 1)
    return m.to_q(y) + m.to_k(y) * m.to_v(y)


def one_after_the_other(m: Any, x: Tensor) -> Tensor:
    """As in a residual block: outputs are read again at the end, so the next input takes the memory of the last one."""
    q = m.to_q(torch.tanh(x) + 1)
    k = m.to_k(torch.sin(q) * 3)
    return m.to_v(torch.cos(k) * 2) + q + k


def written_between(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x) + 1
    q = m.to_q(y)
    y.mul_(2)
    return q + m.to_k(y) * m.to_v(y)


def written_by_position(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    q = m.to_q(y)
    functional.relu(y, True)
    return q + m.to_k(y) * m.to_v(y)


def states(model: nn.Module) -> int:
    """How many input states there are."""
    layers = [m for m in model.modules() if isinstance(m, ModulatedLayer)]
    return len({id(memory.input) for layer in layers for memory in layer.loop.memories.values()})


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.skipif(native.find_compiler() is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["inductor", "modiff"])
@pytest.mark.parametrize(("call", "count"), [(one_tensor, 1), (one_view, 1), (one_after_the_other, 3)])
def test_inductor_gives_what_eager_execution_gives(backend, call, count):
    eager, model = made(call), made(call)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 50, 32), 4, 0.3, torch.float32):
            expected = eager(x)
            assert_within(compiled(x), expected, 0.01 * float(expected.abs().max()))
        assert states(model) == count


@pytest.mark.parametrize(("call", "numbered"), [(one_tensor, 3), (one_view, 3), (one_after_the_other, 0),
                                                (written_between, 0), (written_by_position, 0)])  # fmt: skip
def test_what_several_layers_read_has_a_number_unless_it_is_written_between(call, numbered):
    places: list[int] = []

    def rewrite(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        fusion.fuse(module)
        places.extend(node.args[3] for node in module.graph.nodes if node.target is traced.layer and len(node.args) > 3)
        return module.forward

    eager, model = made(call), made(call)
    compiled = torch.compile(model, backend=rewrite, fullgraph=True)
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 5, 32), 3, 0.3, torch.float32):
            assert_within(compiled(x), eager(x), 1e-5)
    assert len(places) == numbered
    assert len({abs(place) for place in places}) == (numbered > 0)
    assert [place < 0 for place in places] == [i == 0 for i in range(numbered)]


def test_with_numbers_no_bytes_are_compared(monkeypatch):
    monkeypatch.setattr(sharing, "fingerprint", lambda _: pytest.fail("a pass over memory"))
    model = made(one_view)
    compiled = fused(model, [])
    with torch.no_grad(), modiff.trajectory(model):
        for x in drifting(0, (2, 5, 32), 3, 0.3, torch.float32):
            compiled(x)
        assert states(model) == 1


def reads_again(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x) + 1
    return m.to_k(y) + m.to_q(y) * m.to_k(y)


def two_groups(m: Any, x: Tensor) -> Tensor:
    """The first that reads y belongs to no group with those after it."""
    y = torch.tanh(x) + 1
    return m.to_q(y) + m.inner.to_k(y) * m.inner.to_v(y)


@pytest.mark.parametrize("call", [one_tensor, reads_again, two_groups])
@pytest.mark.parametrize("before", ["to_q", "to_k", ""])
def test_a_graph_that_runs_twice_in_an_evaluation_shares_within_each_run_alone(call, before):
    """Also where one of its layers was called before, outside of the graph."""

    def twice(m: Any, x: Tensor) -> Tensor:
        x = getattr(m.block, before)(x) if before else x
        return m.run(m.run(x) * 0.5)

    def build() -> Any:
        torch.manual_seed(0)
        inner = Model(call, **{name: nn.Linear(32, 32) for name in NAMES})
        block = Model(call, inner=inner, **{name: nn.Linear(32, 32) for name in NAMES})
        return taken(Model(twice, block=block).eval(), W8A8)

    eager, model = build(), build()
    graph = fused(model.block, [])
    eager.__dict__["run"], model.__dict__["run"] = eager.block, lambda x: graph(x)
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 5, 32), 4, 0.3, torch.float32):
            assert_within(model(x), eager(x), 1e-4)


@pytest.mark.parametrize("step", [0, 2])
def test_one_object_that_holds_another_tensor_is_another_tensor(step):
    """As inductor reuses memory: the second layer reads the same object, in which a kernel wrote."""
    model = made(one_tensor)
    q, k = model.to_q, model.to_k
    inputs = drifting(0, (2, 5, 32), 3, 0.3, torch.float32)
    with torch.no_grad(), modiff.trajectory(model):
        for i, x in enumerate(inputs[: step + 1]):
            q.clock.call(None)
            y = x.clone()
            traced.layer(q.clock.token, y, q.number)
            if i < step or step == 0:
                y.numpy()[...] += 1
            found = traced.layer(k.clock.token, y, k.number)
            q.clock.returned()
        exact = k.operator.affine(y)
    assert_within(found, exact, 0.05 * float(exact.abs().max()))
