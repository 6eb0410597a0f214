"""`observe` sees every call, changes nothing, and is gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modiff.model.observe import observe
from tests.model.toys import sample, toy


class Writes(nn.Module):
    """Doubles its input in place, and returns nothing else."""

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x.mul_(scale)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_layers_and_evaluations_are_seen_in_the_order_of_execution() -> None:
    model, seen = toy(), []
    expected = sample(model, steps=2)
    with observe(
        model,
        lambda name, *_: seen.append(name),
        lambda *_: seen.append("end"),
        layers=["conv_out", "body", ""],
        before_layer=lambda name, *_: seen.append(f"before {name}"),
        before_step=lambda *_: seen.append("begin"),
    ):
        found = sample(model, steps=2)
    one = ["begin", "before ", "before body", "body", "before conv_out", "conv_out", "", "end"]
    assert seen == one * 2
    assert all(map(torch.equal, found, expected))


def test_before_sees_inputs_that_the_layer_overwrites_and_on_layer_those_given_by_keyword() -> None:
    model, seen = nn.Sequential(Writes()), []
    with observe(
        model,
        lambda name, layer, inputs, output: seen.append((inputs, output is inputs[0])),
        layers=["0"],
        before_layer=lambda name, layer, args, kwargs: seen.append((args[0].clone(), kwargs)),
    ):
        model[0](torch.ones(1), scale=3.0)
    assert seen[0] == (torch.ones(1), {"scale": 3.0})
    assert seen[1] == ((torch.full((1,), 3.0), 3.0), True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_behind_when_the_body_raises(error: type[BaseException]) -> None:
    model = toy()
    with pytest.raises(error), observe(model, print, print, layers=["body"], before_layer=print, before_step=print):
        raise error
    assert hooks_on(model) == 0


def test_an_unknown_name_attaches_nothing() -> None:
    model = toy()
    with pytest.raises(AttributeError, match="nothing_here"), observe(model, print, layers=["body", "nothing_here"]):
        pass
    assert hooks_on(model) == 0


def test_what_the_functions_return_does_not_replace_outputs() -> None:
    model = toy()
    expected = sample(model, steps=1)[0]
    with torch.inference_mode(), observe(model, lambda *_: 0, lambda *_: 0, layers=["body"], before_step=lambda *_: 0):
        assert torch.equal(sample(model, steps=1)[0], expected)
