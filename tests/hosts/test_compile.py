"""torch.compile takes a quantized model as one graph, at every step, with the results of eager execution bit for bit.

The backend "aot_eager" traces and functionalizes as inductor does and leaves torch's arithmetic alone, so that any
difference is ours.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo

import modiff
from modiff import AttentionConfig, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.model.attach import attachment_of
from modiff.nn import Clock
from tests.hosts.tiny import HOSTS
from tests.methods import small
from tests.model.toys import SHAPE, Toy

W8A4 = LayerConfig(activation=QuantizerConfig(bits=4))
LAYERS = {
    "integer": dataclasses.replace(W8A4, execution="integer"),
    "plain integer": dataclasses.replace(W8A4, modulation=None, execution="integer"),
    "simulated": dataclasses.replace(
        W8A4, modulation=ModulationConfig(predictor="linear", gain=0.8), rotation="hadamard"
    ),
    "weights alone": LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=None), modulation=None),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


def attention(**changes: Any) -> AttentionConfig:
    softmax = QuantizerConfig(bits=8, symmetric=False, lowest="zero", **changes)
    return AttentionConfig(operands=QuantizerConfig(bits=6, **changes), softmax=softmax)


CASES = {
    **{kind: ("dit", ModiffConfig(layer=layer)) for kind, layer in LAYERS.items() if kind != "integer"},
    "unet, integer": ("unet", ModiffConfig(layer=LAYERS["integer"])),
    "attention": ("flux", ModiffConfig(layer=LAYERS["integer"], attention=attention())),
    "static": ("dit", ModiffConfig(layer=LAYERS["integer"], attention=attention(dynamic=False, step_groups=0))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_gives_the_images_of_an_eager_one_from_one_graph(case):
    name, config = CASES[case]
    host = dataclasses.replace(HOSTS["ddim"], build=small.build) if name == "unet" else HOSTS[name]
    pipe = host.build()
    modiff.apply(pipe, config)
    if case == "static":
        modiff.calibrate(pipe, lambda: host.call(pipe))
    expected = host.call(pipe)
    host.network(pipe).compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(host.call(pipe, steps=2), host.call(pipe, steps=2))  # U-Nets: step 2 has another memory layout
    before = graphs()
    assert torch.equal(host.call(pipe), expected)
    assert graphs() == before


def test_branches_of_guidance_are_told_apart_by_their_conditions_in_a_graph_too():
    """Guidance in two calls that starts late and changes its order."""

    class Guided(Toy):
        def forward(self, sample, timestep, prompt, flag=False, more=None):
            return super().forward(sample + prompt.mean(), timestep) + 1.0 * flag

    (cond, uncond), sample = torch.randn(2, 2, 5, 16), torch.randn(SHAPE)
    contexts: dict[bool, list[str]] = {}
    for compiled in (False, True):
        model = Guided().eval()
        modiff.apply(model, ModiffConfig(layer=LAYERS["simulated"], min_weights=0))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        clock, seen = attachment_of(model).clock, contexts.setdefault(compiled, [])
        clock.call = lambda *a, c=clock, s=seen: (Clock.call(c, *a), s.append(c.context))[0]
        with modiff.trajectory(model), torch.no_grad():
            for t, prompts in ((900.0, [cond]), (800.0, [cond, uncond]), (700.0, [uncond, cond]), (600.0, [cond])):
                for prompt in prompts:
                    more = {"cap": [prompt[0]], "scale": 0.5, "name": "x"}
                    run(sample, torch.tensor(t), prompt, flag=True, more=more)
    assert contexts[True] == contexts[False] == ["default"] * 2 + ["default #1"] * 2 + ["default"] * 2


def test_what_torch_compile_returns_is_the_model_behind_it_to_every_verb():
    host = HOSTS["dit"]
    pipe = host.build()
    plain = host.call(pipe, steps=2)
    modiff.apply(pipe, ModiffConfig(layer=LAYERS["integer"]))
    expected = host.call(pipe, steps=2)
    pipe.transformer = wrapped = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    assert torch.equal(host.call(pipe, steps=2), expected)
    modiff.remove(pipe)
    assert torch.equal(host.call(pipe, steps=2), plain)
    assert modiff.apply(wrapped, ModiffConfig(layer=LAYERS["simulated"])).taken
    modiff.remove(wrapped)
