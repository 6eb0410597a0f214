"""Applying: what is replaced, what comes out, what is shared and split, and what an error leaves behind."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import modiff
from modiff import (
    ConfigError,
    QuantizerConfig,
    StateError,
    presets,
)
from modiff.core import recursion
from modiff.hosts.names import shortcut_splits
from modiff.model.apply import install
from modiff.nn import ModulatedLayer
from modiff.nn.loop import simulated
from tests.helpers import assert_same_bits, assert_within
from tests.model.toys import SPLITS, activations_only, applied, assert_equal, generate, sample, toy, toy_unet


def quantized_layers(model: nn.Module) -> dict[str, ModulatedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ModulatedLayer)}


@pytest.mark.parametrize("share", ["auto", "off", "override", "static"])
def test_shared_residuals_change_nothing_but_the_number_of_codings(share, monkeypatch):
    """Layers with other settings or static scales do not share."""
    calls = []
    monkeypatch.setattr(simulated, "encode", lambda *a: calls.append(1) or recursion.encode(*a))
    model, alone = toy(), toy()
    config = activations_only(4, granularity="tensor", dynamic=share != "static")
    if share == "override":
        other = dataclasses.replace(config.layer, activation=QuantizerConfig(bits=8))
        config = dataclasses.replace(config, overrides=(("attention.to_k", other),))
    modiff.apply(alone, dataclasses.replace(config, share_residuals="off"))
    config = dataclasses.replace(config, share_residuals="off" if share == "off" else "auto")
    notes = {e.name: e.reason for e in modiff.apply(model, config).taken}
    assert notes["attention.to_k"] == ("may share with to_q" if share == "auto" else "")
    assert notes["attention.to_v"] == ("may share with to_q" if share in ("auto", "override") else "")
    if share == "static":
        return
    ours = generate(model, steps=4)
    assert len(calls) == 4 * {"auto": 3, "off": 5, "override": 4}[share]
    assert_equal(ours, generate(alone, steps=4))


def test_a_u_net_s_concatenations_are_split_where_the_skip_begins():
    model, inputs, skip = toy_unet(), {}, []
    for name in SPLITS:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model.conv_in.register_forward_hook(lambda *a: skip.append(a[2]))
    model(torch.randn(1, 3, 4, 4), 0.0)
    last = "up_blocks.1.resnets.1.conv1"
    assert_same_bits(inputs[last][:, SPLITS[last] :], skip[0])
    report = modiff.apply(model, activations_only(4))
    for name, layer in quantized_layers(model).items():
        assert layer.spec.split == SPLITS.get(name)
        assert len(layer.quantizer.runs) == (2 if layer.spec.split else 1)
    notes = {e.name: e.reason for e in report.taken if e.name in SPLITS}
    assert notes
    left_over, missing = toy_unet(), toy_unet()
    del left_over.up_blocks[1].resnets[1], missing.down_blocks[1].resnets[0]
    assert shortcut_splits(toy()) == shortcut_splits(left_over) == shortcut_splits(missing) == {}
    assert all(note.startswith(f"split at {SPLITS[name]}") for name, note in notes.items())


def test_what_cannot_be_applied_changes_nothing():
    model = toy_unet()
    modules = dict(model.named_modules())
    with pytest.raises(ConfigError, match="expected a split between 0 and 24"):
        install(model, activations_only(4), splits={"up_blocks.1.resnets.0.conv1": 99})
    assert dict(model.named_modules()) == modules
    assert "_modiff" not in model.__dict__
    modiff.apply(model)
    before = quantized_layers(model)
    with pytest.raises(StateError, match="apply: expected a plain model, got ToyUNet with modulated layers"):
        modiff.apply(model, presets.w8a4())
    assert quantized_layers(model) == before
    with pytest.raises(ConfigError, match="expected a diffusers pipeline or a torch module, got str"):
        modiff.apply("unet")
    with (
        pytest.warns(DeprecationWarning, match="script"),
        pytest.raises(ConfigError, match="got a RecursiveScriptModule"),
    ):
        modiff.apply(torch.jit.script(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))))


def test_the_model_is_the_same_as_before_down_to_the_module_objects():
    model = toy()
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    parameters = dict(model.named_parameters())
    before, attributes = sample(model), set(model.__dict__)
    modiff.apply(model, presets.tuned(4, 4))
    assert list(model.state_dict()) == keys
    layer = model.body
    with modiff.trajectory(model):
        sample(model)
        modiff.remove(model)
        assert layer.loop.tensors() == []
    assert list(model.named_modules()) == list(modules.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) == attributes
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    assert_equal(sample(model), before)


def test_weights_changed_in_between_stay_changed_and_the_mode_too():
    model = toy().train()
    modiff.apply(model)
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
    model.to(torch.float64)
    model.eval()
    modiff.remove(model)
    assert_same_bits(model.body.weight.detach(), 2 * toy().body.weight.detach().double())
    assert not any(m.training for m in model.modules())


def halved(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)


def taken_off(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")


LATER = {
    "parametrization": parametrizations.orthogonal,
    "weight norm": parametrizations.weight_norm,
    "weight norm by a hook": weight_norm,
    "spectral norm by a hook": spectral_norm,
    "pruned": halved,
    "taken off again": taken_off,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", LATER)
def test_what_makes_a_weight_may_come_after_apply_and_stays_when_modiff_goes(kind, tmp_path):
    model, plain = toy(), toy()
    modiff.apply(model, presets.modulated(None, None))
    for target in (plain, model):
        torch.manual_seed(0)
        LATER[kind](target.eval().attention.to_out[0])
    expected = sample(plain, steps=3)
    for ours, exact in zip(generate(model, steps=3), expected, strict=True):
        assert_within(ours, exact, 1e-5)
    verbs = [lambda: modiff.save(model, tmp_path / "saved"), lambda: modiff.pack(model)]
    for verb in verbs if kind != "taken off again" else ():
        with pytest.raises(StateError, match=r"expected attention\.to_out\.0\.(weight|bias) as a parameter, got one"):
            verb()
    modiff.remove(model)
    assert_equal(sample(model, steps=3), expected)


def test_removing_reaches_a_layer_inside_a_wrapper_and_drops_no_hook():
    model, plain = applied(), toy().attention.to_q.weight
    model.attention.to_q = wrapper = nn.Sequential(model.attention.to_q)
    wrapper[0].forward = wrapper[0].forward  # as offloading hooks do
    with pytest.raises(StateError, match=r"remove: expected attention.to_q as modiff left it, got it wrapped"):
        modiff.remove(model)
    del wrapper[0].forward
    modiff.remove(model)
    assert model.attention.to_q is wrapper
    assert type(wrapper[0]) is nn.Linear
    assert_same_bits(wrapper[0].weight, plain)


def test_a_plain_model_has_nothing_on_it():
    model = toy()
    for verb in (
        modiff.remove, modiff.pack, modiff.report, lambda m: modiff.calibrate(m, print),
        lambda m: modiff.trajectory(m).__enter__(), lambda m: modiff.context(m, "cond").__enter__(),
    ):  # fmt: skip
        with pytest.raises(StateError, match=r"^\w+: expected a model with modulated layers, got a plain Toy"):
            verb(model)
