"""What moves into layers: the same results within float error, only where that is right, and codes that are shared."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.kernels import native
from modiff.kernels.input_fusion import InputFusion
from modiff.nn import ModulatedConv2d, fusion, traced
from modiff.nn.loop import source
from tests.helpers import assert_within, drifting
from tests.nn.building import BLOCKS, PLAIN, W8A8, Model, fused, layers, made, states, taken
from tests.nn.test_law import law
from tests.recipes import state_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


FORMS = {
    "plain": (PLAIN, 0.0),
    "modulated": (W8A8, 1e-5),
    "moves": (dataclasses.replace(W8A8, modulation=ModulationConfig(predictor="linear", gain=0.5)), 1e-5),
    # may anchor again
    "states in 16 bits": (LayerConfig(execution="integer"), 2e-3),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_rewritten_block_gives_what_the_block_gives_and_keeps_the_law(block, form):
    make, shape, moved = BLOCKS[block]
    config, error = FORMS[form]
    eager, model, counts = made(make, config), made(make, config), []
    compiled, full = fused(model, counts), make().eval()
    full.load_state_dict(eager.state_dict())
    anchors: list[Tensor] = []
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, shape, 4, 0.3, torch.float32):
            expected, exact = eager(x), full(x)
            assert_within(compiled(x), exact, 1.5 * float((expected - exact).abs().max()) + 1e-5)
            if config.modulation is not None:
                anchors = anchors or [state_of(layer).input.clone() for layer in layers(model)]
                for layer, anchor in zip(layers(model), anchors, strict=True):
                    state = state_of(layer)
                    bound = error * (1 + float(state.output.abs().max()))
                    assert_within(state.output, law(layer, state.input, anchor), bound)
    assert sum(counts) == moved


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("innermost", [True, False])
def test_a_split_layer_computes_its_group_norm_too(form, innermost):
    """Both halves behind one norm over all channels; an input that is not channels-last goes through torch's."""
    outputs: list[Tensor] = []
    for rewrite in (False, True):
        torch.manual_seed(0)
        model = Model(conv_of_norm, norm=nn.GroupNorm(4, 16), conv=nn.Conv2d(16, 8, 3, padding=1))
        split = model.conv = ModulatedConv2d.from_float(model.conv, FORMS[form][0], name="conv", split=6)
        counts: list[int] = []
        run = fused(model, counts) if rewrite else model
        split.clock.start()
        for x in drifting(0, (2, 16, 6, 5), 4, 0.3, torch.float32):
            split.clock.call(None)
            with torch.no_grad():
                last = run(x.contiguous(memory_format=torch.channels_last) if innermost else x)
            split.clock.returned()
        outputs.append(last)
        assert sum(counts) == rewrite
    assert_within(outputs[1], outputs[0], 0.03 * float(outputs[0].abs().max()))


def test_layers_that_read_one_norm_share_its_codes_and_others_of_the_same_x_do_not(monkeypatch):
    calls: list[str] = []
    real = InputFusion.encode
    monkeypatch.setattr(InputFusion, "encode", lambda self, *a, **k: (calls.append(self.norm), real(self, *a, **k))[1])
    for block, norms in (("dit", ["layer", "layer", "none"]), ("conv", ["group", "group"])):
        make, shape, _ = BLOCKS[block]
        model = made(make)
        compiled = fused(model, [])
        with torch.no_grad(), modiff.trajectory(model):
            *early, last = drifting(0, shape, 3, 0.1, torch.float32)
            for x in early:  # the first residual is held against the values, too
                compiled(x)
            calls.clear()
            compiled(last)
            assert states(model) == len(norms) + (block == "conv")
        assert sorted(calls) == norms


def conv_of_norm(m: Any, x: Tensor) -> Tensor:
    return m.conv(functional.silu(m.norm(x)))


def written(write: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def call(m: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = functional.silu(m.norm(x))
        write(x)
        return m.conv(y) + x

    return call


def by_operators(x: Tensor) -> None:
    x[:, 0] = 0
    x += 1


def gate_written(m: Any, x: Tensor) -> Tensor:
    gate = x + 1
    active = functional.silu(gate)
    gate.add_(1)
    return m.fc((x + gate) * active)


GROUP, GROUP2, LAYER = nn.GroupNorm(4, 32), nn.GroupNorm(2, 6), nn.LayerNorm(32, elementwise_affine=False)
PICTURE, COLUMNS, TOKENS = (2, 32, 6, 5), (2, 32, 7), (2, 7, 32)
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module, tuple[int, ...], int]] = {
    "read twice": (lambda m, x: m.conv(y := functional.silu(m.norm(x))) + y, GROUP, PICTURE, 0),
    "norm read twice": (lambda m, x: m.conv(functional.silu(y := m.norm(x))) + y, GROUP, PICTURE, 1),
    "written": (written(lambda x: x.add_(1)), GROUP, PICTURE, 0),
    "written by operators": (written(by_operators), GROUP, PICTURE, 0),
    "written as out": (written(lambda x: torch.add(x, 1, out=x)), GROUP, PICTURE, 0),
    "written by aten": (written(lambda x: torch.ops.aten.add_.Tensor(x, x)), GROUP, PICTURE, 0),
    "in place": (lambda m, x: m.conv(functional.silu(m.norm(x), inplace=True)), GROUP, PICTURE, 0),
    "dropped": (lambda m, x: m.conv(functional.dropout(functional.silu(x), 1e-9, training=True)), GROUP, PICTURE, 0),
    "exact gelu": (lambda m, x: m.conv(functional.gelu(x)), GROUP, PICTURE, 1),
    "other dtype": (lambda m, x: m.conv(functional.silu(m.norm(x).bfloat16())).float(), GROUP, PICTURE, 1),
    "other channels": (lambda m, x: m.fc(functional.silu(m.norm(x))), GROUP2, (2, 6, 32), 0),
    "widened": (lambda m, x: m.fc(m.norm(x.bfloat16()) * (y := x.mean(1, keepdim=True)) + y), LAYER, TOKENS, 0),
    "modulated by token": (lambda m, x: m.fc(m.norm(x) * x.tanh() + x.tanh()), LAYER, TOKENS, 0),
    "rows of tokens": (lambda m, x: m.fc(m.norm(x).reshape(2, 7, 32)), GROUP, COLUMNS, 0),
    "columns first": (lambda m, x: m.fc(m.norm(x[..., None]).permute(2, 3, 0, 1).reshape(7, 2, 32)), GROUP, COLUMNS, 0),
    "view read twice": (lambda m, x: m.fc((y := m.norm(x.mT)).transpose(1, 2)) + y.transpose(1, 2), GROUP, TOKENS, 0),
    "view of a slice": (lambda m, x: m.fc(m.norm(x[..., :3]).view(2, 32, -1).transpose(1, 2)), GROUP, PICTURE, 1),
    "view as a type": (lambda m, x: m.fc(m.norm(x).view(torch.float32).transpose(1, 2)), GROUP, COLUMNS, 0),
    "gate of a picture": (lambda m, x: m.conv(x * functional.silu(x + 1)), GROUP, PICTURE, 0),
    "gate of samples": (lambda m, x: m.fc(x * functional.silu(x.mean(1, keepdim=True))), GROUP, TOKENS, 0),
    "gate read twice": (lambda m, x: m.fc(x * (y := functional.silu(x + 1))) + y, GROUP, TOKENS, 0),
    "gate laid otherwise": (lambda m, x: m.fc(x * functional.silu(x.mT.contiguous().mT)), GROUP, TOKENS, 0),
    "gate written": (gate_written, GROUP, TOKENS, 0),
    "gate of rows": (lambda m, x: m.fc(x[0] * functional.silu(x[1])), GROUP, TOKENS, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_something_reads_or_writes_or_no_kernel_knows_is_still_computed(case):
    call, norm, shape, moved = CASES[case]
    counts: list[int] = []
    torch.manual_seed(0)
    modules = {"norm": norm, "conv": nn.Conv2d(32, 32, 3, padding=1), "fc": nn.Linear(32, 32)}
    model, x = taken(Model(call, **modules).eval(), PLAIN), torch.randn(shape)
    with torch.no_grad():
        assert_within(fused(model, counts)(x), model(x), 0.05 if moved else 1e-5)
    assert sum(counts) == moved


UNFUSED = {
    "rotation": dataclasses.replace(W8A8, rotation="hadamard"),
    "states in halves": dataclasses.replace(W8A8, modulation=ModulationConfig(state_dtype="float16")),
    "simulated": LayerConfig(),
    "floats": LayerConfig(activation=QuantizerConfig(bits=None), modulation=None),
}


def test_layers_that_cannot_compute_a_norm_leave_it_where_it_is():
    for reason, config in UNFUSED.items():
        counts, model = [], made(BLOCKS["conv"][0], config)
        with torch.no_grad(), modiff.trajectory(model):
            fused(model, counts)(torch.randn(2, 16, 6, 5))
        assert sum(counts) == 0, reason


def test_calibration_sees_what_the_layer_reads_behind_its_norm():
    static = dataclasses.replace(PLAIN, activation=QuantizerConfig(bits=8, dynamic=False, granularity="tensor"))
    eager, model = made(BLOCKS["conv"][0], static), made(BLOCKS["conv"][0], static)
    inputs = drifting(0, (2, 16, 6, 5), 3, 0.3, torch.float32)
    with torch.no_grad():
        for run, each in ((eager, eager), (compiled := fused(model, []), model)):
            modiff.calibrate(each, lambda run=run: [run(x) for x in inputs])
        for x in inputs:
            assert_within(compiled(x), eager(x), 0.05)


@pytest.mark.parametrize("block", ["conv", "dit"])
def test_shape_and_layout_behind_a_norm_are_known_before_it_runs(block):
    make, shape, _ = BLOCKS[block]
    layer = layers(made(make, PLAIN))[0]
    arguments = (layer.clock.token, torch.randn(shape), None, None, "none", 1, 0.0, "silu", 1, layer.number)
    torch.library.opcheck(traced.fused_layer, arguments, test_utils="test_faketensor")


def one_tensor(m: Any, x: Tensor, view: bool = False) -> Tensor:
    y = (torch.tanh(x) + 1).flatten(0, 1) if view else torch.tanh(x) + 1
    return m.to_q(y) + m.to_k(y) * m.to_v(y)


def one_view(m: Any, x: Tensor) -> Tensor:
    return one_tensor(m, x, True)


def one_after_the_other(m: Any, x: Tensor) -> Tensor:
    """As in a residual block: outputs are read again at the end, so the next input takes the memory of the last one."""
    q = m.to_q(torch.tanh(x) + 1)
    k = m.to_k(torch.sin(q) * 3)
    return m.to_v(torch.cos(k) * 2) + q + k


def written_between(m: Any, x: Tensor, write: Callable[[Tensor], Any] = lambda y: y.mul_(2)) -> Tensor:
    y = torch.tanh(x)
    q = m.to_q(y)
    write(y)
    return q + m.to_k(y) * m.to_v(y)


def written_by_position(m: Any, x: Tensor) -> Tensor:
    return written_between(m, x, lambda y: functional.relu(y, True))


def projections(call: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> Model:
    return Model(call, **{name: nn.Linear(32, 32) for name in ("to_q", "to_k", "to_v")}, **more)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.skipif(native.find_compiler() is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("call", "backend", "count"),
    [(one_tensor, "modiff", 1), (one_view, "inductor", 1), (one_after_the_other, "inductor", 3)],
)
def test_inductor_gives_what_eager_execution_gives(call, backend, count):
    eager, model = made(lambda: projections(call)), made(lambda: projections(call))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 50, 32), 4, 0.3, torch.float32):
            expected = eager(x)
            assert_within(compiled(x), expected, 0.01 * float(expected.abs().max()))
        assert states(model) == count


@pytest.mark.parametrize(("call", "numbered"), [(one_tensor, 3), (one_view, 3), (one_after_the_other, 0),
                                                (written_between, 0), (written_by_position, 0)])  # fmt: skip
def test_what_several_layers_read_has_a_number_unless_it_is_written_between(monkeypatch, call, numbered):
    """With numbers no bytes are compared."""
    reads: list[int] = []

    def rewrite(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        fusion.fuse(module)
        reads.extend(node.args[3] for node in module.graph.nodes if node.target is traced.layer and len(node.args) > 3)
        return module.forward

    eager, model = made(lambda: projections(call)), made(lambda: projections(call))
    compiled = torch.compile(model, backend=rewrite, fullgraph=True)
    if numbered:
        monkeypatch.setattr(source, "fingerprint", lambda _: pytest.fail("a pass over memory"))
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 5, 32), 3, 0.3, torch.float32):
            assert_within(compiled(x), eager(x), 1e-5)
        assert states(model) == (1 if numbered else states(eager))
    assert len(reads) == numbered
    assert len({abs(read) for read in reads}) == (numbered > 0)
    assert [read < 0 for read in reads] == [i == 0 for i in range(numbered)]


def reads_again(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x) + 1
    return m.to_k(y) + m.to_q(y) * m.to_k(y)


def two_groups(m: Any, x: Tensor) -> Tensor:
    """The first that reads y belongs to no group with those after it."""
    y = torch.tanh(x) + 1
    return m.to_q(y) + m.inner.to_k(y) * m.inner.to_v(y)


@pytest.mark.parametrize("call", [one_tensor, reads_again, two_groups])
@pytest.mark.parametrize("earlier", ["to_q", "to_k", ""])
def test_a_graph_that_runs_twice_in_an_evaluation_shares_within_each_run_alone(call, earlier):
    """Also where one of its layers was called earlier, outside of the graph."""

    def twice(m: Any, x: Tensor) -> Tensor:
        x = getattr(m.block, earlier)(x) if earlier else x
        return m.run(m.run(x) * 0.5)

    eager, model = (made(lambda: Model(twice, block=projections(call, inner=projections(call)))) for _ in range(2))
    graph = fused(model.block, [])
    eager.__dict__["run"], model.__dict__["run"] = eager.block, lambda x: graph(x)
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, (2, 5, 32), 4, 0.3, torch.float32):
            assert_within(model(x), eager(x), 1e-4)
