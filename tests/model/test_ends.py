"""The layers that run first and last: a warning where they are not those that were left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ModiffConfig, presets
from modiff.errors import ModiffWarning
from tests.model.toys import applied, generate


class HeadFirst(nn.Module):
    """Registers its output layer first and an auxiliary head, which never runs, last."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.enter, self.body, self.auxiliary = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.enter(x)))


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.errors._WARNED", set())


def run(model: nn.Module) -> None:
    with modiff.trajectory(model), torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 16))


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if m is not model)


def test_an_end_that_is_quantized_is_named_once_with_what_to_type():
    model = HeadFirst()
    report = modiff.apply(model)
    assert [e.name for e in report.taken] == ["enter", "body"]
    model = copy.deepcopy(model)
    with pytest.warns(ModiffWarning, match=r"HeadFirst: .* got enter quantized.* exclude=\('enter',\)") as caught:
        run(model)
    assert len(caught) == 1
    assert hooks_on(model) == 0


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
@pytest.mark.parametrize(
    "config",
    [
        ModiffConfig(exclude=("enter",)),
        ModiffConfig(include=("enter", "body")),
        ModiffConfig(overrides=(("en*", presets.w8a8().layer),)),
        ModiffConfig(first_last="quantize"),
    ],
)
def test_ends_that_the_config_names_are_not_warned_about(config):
    model = HeadFirst()
    modiff.apply(model, config)
    run(model)


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
def test_a_network_that_runs_in_the_order_of_registration_is_not_warned_about_whatever_embeds_its_time():
    model = applied()
    generate(model)
    assert hooks_on(model) == 0


def test_an_evaluation_that_raised_decides_nothing():
    model = HeadFirst()
    modiff.apply(model)
    with modiff.trajectory(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 3))
    assert hooks_on(model) == 0
    with pytest.warns(ModiffWarning, match="enter"):
        run(model)
