"""Removing is bit-exact: the same module objects, parameters, keys, hooks, mode and outputs."""

from __future__ import annotations

import pytest
import torch

import modiff
from modiff import StateError, presets
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy


def test_the_model_is_the_same_as_before_down_to_the_module_objects():
    model = toy()
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    parameters = dict(model.named_parameters())
    before, attributes = sample(model), set(model.__dict__)
    modiff.apply(model, presets.tuned(4, 4))
    assert list(model.state_dict()) == keys
    with modiff.trajectory(model):
        sample(model)
    modiff.remove(model)
    assert dict(model.named_modules()) == modules
    assert list(dict(model.named_modules())) == list(modules)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) == attributes
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    for ours, theirs in zip(sample(model), before, strict=True):
        assert_same_bits(ours, theirs)


def test_weights_changed_in_between_stay_changed_and_the_mode_too():
    model = toy().train()
    modiff.apply(model)
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
    model.to(torch.float64)
    model.eval()
    modiff.remove(model)
    assert_same_bits(model.body.weight.detach(), 2 * toy().body.weight.detach().double())
    assert not any(m.training for m in model.modules())


def test_it_can_be_applied_again_afterwards():
    model = toy()
    outputs = []
    for _ in range(2):
        modiff.apply(model, presets.w8a4())
        with modiff.trajectory(model):
            outputs.append(sample(model))
        modiff.remove(model)
    for a, b in zip(*outputs, strict=True):
        assert_same_bits(b, a)


def test_removing_inside_a_trajectory_frees_the_states_and_leaves_a_plain_model():
    model = toy()
    modiff.apply(model)
    layer = model.body
    with modiff.trajectory(model):
        sample(model, steps=2)
        modiff.remove(model)
        assert layer.loop.tensors() == []
        plainly = sample(model)
    for a, b in zip(plainly, sample(toy()), strict=True):
        assert_same_bits(a, b)


def test_a_plain_model_has_nothing_to_remove():
    model = toy()
    for _ in range(2):
        with pytest.raises(StateError, match="remove: expected a model with modulated layers, got a plain Toy"):
            modiff.remove(model)
        modiff.apply(model)
        modiff.remove(model)
