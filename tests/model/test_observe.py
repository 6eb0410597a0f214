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


def test_layers_and_evaluations_are_seen_in_the_order_of_execution() -> None:
    """What the functions return, here a number, does not replace an output."""
    model, seen = toy(), []
    expected = sample(model, steps=2)

    def see(*words: object) -> int:
        seen.append(words[0])
        return 0

    with torch.inference_mode(), observe(
        model, lambda name, *_: see(name), lambda *_: see("end"), layers=["conv_out", "body", ""],
        before_layer=lambda name, *_: see(f"before {name}"), before_step=lambda *_: see("begin"),
    ):  # fmt: skip
        outputs = sample(model, steps=2)
    assert seen == ["begin", "before ", "before body", "body", "before conv_out", "conv_out", "", "end"] * 2
    assert all(map(torch.equal, outputs, expected))


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
    with pytest.raises(AttributeError, match="nothing_here"), observe(model, print, layers=["body", "nothing_here"]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
