"""Ctrl-C at any moment: nothing of modiff stays behind, and no half-made step is built upon."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import modiff
from modiff import StateError, presets
from modiff.model.apply import install
from modiff.model.attach import Automatic, attachment_of
from modiff.model.attention import apply_attention
from tests.helpers import assert_same_bits
from tests.model.test_attention import X, coarse, network
from tests.model.toys import sample, toy


class Interrupts(nn.Module):
    """Passes its input through; raises KeyboardInterrupt at the calls in `at`."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        return x


@pytest.fixture
def interrupted_toy() -> nn.Module:
    """Modulated; the third evaluation is interrupted behind half of its layers."""
    model = toy()
    model.norm = nn.Sequential(model.norm, Interrupts())
    model.attention = nn.Sequential(model.attention, Interrupts(3))
    modiff.apply(model, presets.published(8, 4))
    return model


def test_an_interrupt_inside_attention_leaves_other_attention_in_full_precision():
    model = network()
    apply_attention(model, coarse())
    model.second.to_v = nn.Sequential(model.second.to_v, Interrupts(1))
    expected = functional.scaled_dot_product_attention(X, X, X)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(X, 5.0)
    assert_same_bits(functional.scaled_dot_product_attention(X, X, X), expected)


def test_the_step_after_an_interrupted_one_is_refused_inside_the_same_trajectory(interrupted_toy):
    with modiff.trajectory(interrupted_toy):
        with pytest.raises(KeyboardInterrupt):
            sample(interrupted_toy)
        with pytest.raises(StateError, match=r"Toy: expected a trajectory .* Begin the trajectory again"):
            sample(interrupted_toy, steps=1)
    with modiff.trajectory(interrupted_toy):
        sample(interrupted_toy, steps=1)


def test_a_layer_called_alone_after_an_interrupt_is_outside_of_a_trajectory(interrupted_toy):
    with pytest.raises(KeyboardInterrupt), modiff.trajectory(interrupted_toy):
        sample(interrupted_toy)
    with (
        modiff.trajectory(interrupted_toy),
        pytest.raises(StateError, match="body: expected a running trajectory, got a call outside of one"),
    ):
        interrupted_toy.body(torch.randn(2, 16, 4, 4))


def test_a_run_that_begins_by_itself_after_an_interrupted_one_starts_with_no_states(interrupted_toy):
    """Text-to-image interrupted at t = 666, then image-to-image from t = 500: time goes on, the image is another."""
    attachment = attachment_of(interrupted_toy)
    attachment.automatic = Automatic(attachment.clock)
    x = torch.ones(2, 3, 4, 4)
    with torch.no_grad():
        expected = [interrupted_toy(x, t) for t in (500.0, 333.0)]
        attachment.automatic.end()
        interrupted_toy.attention[1].calls = 0
        with pytest.raises(KeyboardInterrupt):
            sample(interrupted_toy)
        for ours, theirs in zip([interrupted_toy(x, t) for t in (500.0, 333.0)], expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_apply_leaves_the_model_as_it_was(late, monkeypatch):
    model = toy()
    before, attributes = dict(model.named_modules()), set(model.__dict__)
    set_module, sets = nn.Module.__setattr__, []

    def interrupted(self: nn.Module, name: str, value: object) -> None:
        set_module(self, name, value)
        if name == "to_k":
            sets.append(name)
            if len(sets) == 1:
                raise KeyboardInterrupt

    if late:
        monkeypatch.setattr("modiff.model.apply.apply_attention", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(model, presets.w8a8())
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert set(model.__dict__) == attributes
    assert not any(model.__dict__[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks"))


def test_a_network_that_returns_nothing_did_not_fail():
    class Writes(nn.Module):
        """Its result goes to a buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.result = toy(), torch.empty(0)

        def forward(self, sample: torch.Tensor, timestep: float) -> None:
            self.result = self.net(sample, timestep)

    model, x = Writes(), torch.ones(2, 3, 4, 4)
    modiff.apply(model, presets.published(8, 4))
    with torch.no_grad(), modiff.trajectory(model):
        for step in range(3):
            model(x, 1000.0 - 100 * step)
            assert model.result.isfinite().all()
