"""Norms and activations that move into layers: the same results within float error, and only where that is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.kernels.input_fusion import InputFusion
from modiff.nn import ModulatedConv2d, fusion, traced
from modiff.nn.layer import ModulatedLayer
from tests.helpers import assert_within, drifting
from tests.nn.fusing import BLOCKS, PLAIN, W8A8, Model, conv_block, fused, made, taken
from tests.nn.test_law import law


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


FUSED = {
    "modulated": W8A8,
    "plain": PLAIN,
    "moves": dataclasses.replace(W8A8, modulation=ModulationConfig(predictor="linear", gain=0.5)),
    "states in 16 bits": dataclasses.replace(W8A8, modulation=ModulationConfig(state_dtype="int16")),
}


def layers(model: nn.Module) -> list[ModulatedLayer]:
    return [m for m in model.modules() if isinstance(m, ModulatedLayer)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("layer", FUSED.values(), ids=FUSED)
def test_a_rewritten_block_gives_what_the_block_gives(block, layer):
    make, shape, moved = BLOCKS[block]
    eager, counts = made(make, layer), []
    model = made(make, layer)
    compiled = fused(model, counts)
    full = make().eval()
    full.load_state_dict(eager.state_dict())
    with torch.no_grad(), modiff.trajectory(eager), modiff.trajectory(model):
        for x in drifting(0, shape, 5, 0.3, torch.float32):
            expected, found, exact = eager(x), compiled(x), full(x)
            worst = float((expected - exact).abs().max())
            assert_within(found, exact, 1.5 * worst + 1e-5)
    assert sum(counts) == moved


@pytest.mark.parametrize("layer", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("innermost", [True, False])
def test_a_split_layer_computes_its_group_norm_too(layer, innermost):
    """Both halves behind one norm over all channels; an input that is not channels-last goes through torch's."""
    found: list[Tensor] = []
    for rewrite in (False, True):
        torch.manual_seed(0)
        model = Model(lambda m, x: m.conv(functional.silu(m.norm(x))), norm=nn.GroupNorm(4, 16),
                      conv=nn.Conv2d(16, 8, 3, padding=1))  # fmt: skip
        split = ModulatedConv2d.from_float(model.conv, layer, split=6)
        model.conv, counts = split, []
        run = fused(model, counts) if rewrite else model
        with torch.no_grad():
            split.clock.start()
            for x in drifting(0, (2, 16, 6, 5), 4, 0.3, torch.float32):
                split.clock.call(None)
                last = run(x.contiguous(memory_format=torch.channels_last) if innermost else x)
                split.clock.returned()
            split.clock.stop()
        found.append(last)
        assert sum(counts) == rewrite
    assert_within(found[1], found[0], 0.03 * float(found[0].abs().max()))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("form", "error"), [("modulated", 1e-5), ("moves", 1e-5), ("states in 16 bits", 1e-3)])
def test_the_law_holds_in_every_layer_behind_a_norm(block, form, error):
    make, shape, _ = BLOCKS[block]
    model = made(make, FUSED[form])
    compiled = fused(model, [])
    with torch.no_grad(), modiff.trajectory(model):
        for step, x in enumerate(drifting(0, shape, 4, 0.3, torch.float32)):
            compiled(x)
            if step == 0:
                anchors = [layer.state.input.clone() for layer in layers(model)]
            for layer, anchor in zip(layers(model), anchors, strict=True):
                state = layer.state
                bound = error * (1 + state.output.abs().max())
                assert_within(state.output, law(layer, state.input, anchor), bound)


@pytest.mark.parametrize("form", ["modulated", "moves", "states in 16 bits"])
def test_layers_that_read_one_norm_share_its_codes_and_others_of_the_same_x_do_not(monkeypatch, form):
    calls: list[str] = []
    real = InputFusion.encode

    def counted(self: InputFusion, *args: Any, **options: Any) -> Any:
        calls.append(self.norm)
        return real(self, *args, **options)

    monkeypatch.setattr(InputFusion, "encode", counted)
    for block, norms in (("dit", ["layer", "layer", "none"]), ("conv", ["group", "group"])):
        make, shape, _ = BLOCKS[block]
        model = made(make, FUSED[form])
        compiled = fused(model, [])
        with torch.no_grad(), modiff.trajectory(model):
            first, second = drifting(0, shape, 2, 0.3, torch.float32)
            compiled(first)
            calls.clear()
            compiled(second)
            assert len({id(memory.input) for layer in layers(model) for memory in layer.loop.memories.values()}) == len(
                norms
            ) + (block == "conv")
        assert sorted(calls) == norms


UNFUSED = {
    "rotation": dataclasses.replace(W8A8, rotation="hadamard"),
    "states in halves": dataclasses.replace(W8A8, modulation=ModulationConfig(state_dtype="float16")),
    "simulated": LayerConfig(),
    "floats": LayerConfig(activation=QuantizerConfig(bits=None), modulation=None),
}


@pytest.mark.parametrize("reason", UNFUSED)
def test_layers_that_cannot_compute_a_norm_leave_it_where_it_is(reason):
    counts: list[int] = []
    model = made(conv_block, UNFUSED[reason])
    with torch.no_grad(), modiff.trajectory(model):
        fused(model, counts)(torch.randn(2, 16, 6, 5))
    assert sum(counts) == 0


def read_twice(m: Any, x: Tensor) -> Tensor:
    y = functional.silu(m.norm(x))
    return m.conv(y) + y


def norm_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.conv(functional.silu(y)) + y


def in_place(m: Any, x: Tensor) -> Tensor:
    return m.conv(functional.silu(m.norm(x), inplace=True))


def dropped(m: Any, x: Tensor) -> Tensor:
    return m.conv(functional.dropout(functional.silu(m.norm(x)), 0.5, training=True))


def exact_gelu(m: Any, x: Tensor) -> Tensor:
    return m.conv(functional.gelu(x))


def other_dtype(m: Any, x: Tensor) -> Tensor:
    return m.conv(functional.silu(m.norm(x).bfloat16())).float()


def written(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = functional.silu(m.norm(x))
    x.add_(1)
    return m.conv(y) + x


def written_by_operator(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = functional.silu(m.norm(x))
    x[:, 0] = 0
    x += 1
    return m.conv(y) + x


def written_as_out(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = functional.silu(m.norm(x))
    torch.add(x, 1, out=x)
    return m.conv(y) + x


def written_by_aten(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = functional.silu(m.norm(x))
    torch.ops.aten.add_.Tensor(x, x)
    return m.conv(y) + x


PARTLY = {"written": (written, 0), "written by an operator": (written_by_operator, 0),
          "written as out": (written_as_out, 0), "written by aten": (written_by_aten, 0),
          "read twice": (read_twice, 0), "norm read twice": (norm_read_twice, 1), "in place": (in_place, 0),
          "dropped": (dropped, 0), "exact gelu": (exact_gelu, 1), "other dtype": (other_dtype, 1)}  # fmt: skip


@pytest.mark.parametrize("case", PARTLY)
def test_what_something_else_reads_or_no_kernel_knows_is_still_computed(case):
    call, moved = PARTLY[case]
    counts: list[int] = []
    torch.manual_seed(0)
    model = taken(Model(call, norm=nn.GroupNorm(4, 16), conv=nn.Conv2d(16, 16, 3, padding=1)).eval(), W8A8)
    with torch.no_grad(), modiff.trajectory(model):
        fused(model, counts)(torch.randn(2, 16, 6, 5))
    assert sum(counts) == moved


def test_a_norm_over_other_channels_than_the_layer_s_stays_where_it_is():
    counts: list[int] = []
    model = Model(lambda m, x: m.fc(functional.silu(m.norm(x))), norm=nn.GroupNorm(2, 6), fc=nn.Linear(32, 32))
    taken(model.eval(), PLAIN)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        assert_within(fused(model, counts)(x), model(x), 1e-5)
    assert sum(counts) == 0
    fusion = InputFusion("group", 2, eps=1e-5, activation="silu")
    codes, scale = fusion.encode(x, None, None, 8, granularity="token")
    exact = functional.silu(functional.group_norm(x.double(), 2))
    assert_within((codes.double() - 128) * scale, exact, (0.501 * scale).expand_as(exact))


def test_a_norm_whose_modulation_widens_its_dtype_stays_where_it_is():
    def widened(m: Any, x: Tensor) -> Tensor:
        scale = x.mean(1, keepdim=True)
        return m.fc(m.norm(x.bfloat16()) * scale + scale)

    counts: list[int] = []
    model = Model(widened, norm=nn.LayerNorm(32, elementwise_affine=False), fc=nn.Linear(32, 32))
    taken(model.eval(), W8A8)
    with torch.no_grad(), modiff.trajectory(model):
        assert fused(model, counts)(torch.randn(2, 7, 32)).dtype == torch.float32
    assert sum(counts) == 0


def test_a_modulation_that_is_not_one_of_samples_stays_where_it_is():
    def by_token(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.norm(x) * m.scale(x) + m.scale(x))

    counts: list[int] = []
    model = Model(by_token, norm=nn.LayerNorm(32, elementwise_affine=False), scale=nn.Tanh(), fc=nn.Linear(32, 32))
    taken(model.eval(), W8A8)
    with torch.no_grad(), modiff.trajectory(model):
        fused(model, counts)(torch.randn(2, 7, 32))
    assert sum(counts) == 0


def test_calibration_sees_what_the_layer_reads_behind_its_norm():
    static = dataclasses.replace(PLAIN, activation=QuantizerConfig(bits=8, dynamic=False, granularity="tensor"))
    eager, model = made(conv_block, static), made(conv_block, static)
    compiled, inputs = fused(model, []), drifting(0, (2, 16, 6, 5), 3, 0.3, torch.float32)
    with torch.no_grad():
        modiff.calibrate(eager, lambda: [eager(x) for x in inputs])
        modiff.calibrate(model, lambda: [compiled(x) for x in inputs])
        for x in inputs:
            assert_within(compiled(x), eager(x), 0.05)


@pytest.mark.parametrize("block", ["conv", "dit"])
def test_shape_and_layout_behind_a_norm_are_known_before_it_runs(block):
    make, shape, _ = BLOCKS[block]
    model = made(make, PLAIN)
    layer, x = layers(model)[0], torch.randn(shape)
    arguments = (layer.clock.token, x, None, None, "none", 1, 0.0, "silu", 1, layer.number)
    found = torch.library.opcheck(traced.fused_layer, arguments, test_utils="test_faketensor")
    assert found == {"test_faketensor": "SUCCESS"}


def test_torch_finds_the_backend_by_its_name():
    assert "modiff" in dynamo.list_backends()
    assert dynamo.lookup_backend("modiff") is fusion.backend
