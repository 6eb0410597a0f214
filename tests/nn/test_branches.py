"""Evaluations whose inputs differ are of different branches, however a loop or a sampler orders them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modiff.nn import Clock
from modiff.nn.branches import Inputs, inputs_of

COND, UNCOND = torch.randn(2, 1, 8, 16)
ONE, TWO = torch.Size((1, 4)), torch.Size((2, 4))


def of(prompt: Tensor | None, shape: torch.Size = ONE, **more: object) -> Inputs:
    given = {"hidden_states": (sample := torch.empty(shape)), "encoder_hidden_states": prompt, **more}
    return inputs_of((), given, sample, None)


def c() -> Inputs:
    return of(COND)


def u() -> Inputs:
    return of(UNCOND.clone())  # made again at every step


def both() -> Inputs:
    return of(torch.cat([UNCOND, COND]), TWO)


def noisy() -> Inputs:
    return of(COND + torch.randn(()))


def skipping() -> Inputs:
    return of(COND, skip_layers=[1])


def masked() -> Inputs:
    return of(None, encoder_attention_mask=torch.ones(1, 8))


RUNS: dict[
    str, tuple[list[tuple[float, Callable[[], Inputs]]], str]
] = {  # (timestep, inputs); a letter for each branch
    "guidance in two calls": ([(9, c), (9, u), (6, c), (6, u), (3, c), (3, u)], "ababab"),
    "in the other order": ([(9, u), (9, c), (6, u), (6, c)], "abab"),
    "in an order that changes": ([(9, c), (9, u), (6, u), (6, c), (3, c), (3, u)], "abbaab"),
    "without a prompt": ([(9, c), (9, masked), (6, c), (6, masked)], "abab"),
    "guidance that ends": ([(9, u), (9, c), (6, u), (6, c), (3, c), (2, c)], "ababbb"),
    "guidance that starts late": ([(9, c), (6, c), (3, u), (3, c), (2, u), (2, c)], "aababa"),
    "Heun's sampler": ([(9, c), (6, c), (6, c), (3, c), (3, c), (0, c)], "aaaaaa"),
    "Heun's and guidance in two calls": ([(9, c), (9, u), *[(6, c), (6, u)] * 2, (3, c), (3, u)], "abababab"),
    "Heun's and guidance that starts late": ([(9, c), (6, c), (6, c), *[(3, c), (3, u)] * 2], "aaaabab"),
    "a batch that shrinks": ([(9, both), (6, both), (3, c), (2, c)], "aabb"),
    "guidance on and off": ([(9, both), (6, c), (5, both), (4, c)], "abab"),
    "a third call that skips layers": ([(9, both), (9, skipping), (6, both), (6, skipping), (3, both)], "ababa"),
    "the same beside one that does not": ([(9, c), (9, skipping), (6, c), (6, skipping)], "abab"),
    "prompts that change at each step": ([(9, noisy), (6, noisy), (3, noisy), (2, noisy), (1, noisy)], "abbbb"),
    "the same in two calls": ([(t, noisy) for t in (9, 9, 6, 6, 3, 3, 2, 2, 1, 1)], "abcdcdcdcd"),
    "no timestep, guidance in two calls": ([(None, c), (None, u)] * 3, "ababab"),
    "no timestep, prompts that change": ([(None, noisy)] * 6, "abcddd"),
    "no timestep, other batches": ([(None, c), (None, both), (None, c)], "aba"),
}


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_an_evaluation_goes_on_where_one_of_the_same_inputs_was(run, numbered):
    (evaluations, branches), seen = RUNS[run], []
    clock = Clock("UNet")
    clock.numbered = numbered
    clock.start()
    for timestep, inputs in evaluations:
        clock.call(timestep, inputs())
        seen.append(clock.context)
        clock.returned()
        assert clock.context == "default"
    assert seen == ["default" if letter == "a" else f"default #{ord(letter) - ord('a')}" for letter in branches]


@pytest.mark.parametrize("numbered", [False, True])
def test_tiles_under_the_same_conditions_are_told_apart_by_their_order_where_the_host_numbers_them(
    numbered, monkeypatch
):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    clock, seen = Clock("UNet"), []
    clock.numbered = numbered
    clock.start()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for timestep in (9, 6, 3):
            for inputs in (c, u) * 3:
                clock.call(timestep, inputs())
                seen.append(clock.context)
                clock.returned()
    assert len(told) == (not numbered)
    assert len(set(seen)) == (6 if numbered else 2)
    assert seen[:6] == seen[6:12] == seen[12:]


def test_branches_are_told_apart_where_nobody_waits_for_the_timestep_on_a_device(monkeypatch):
    monkeypatch.setattr("modiff.nn.clock.middle", lambda _: torch.zeros(1, device="meta"))
    clock, seen = Clock("UNet"), []
    clock.start()
    for inputs in (c, u, skipping) * 3:
        clock.call(9, inputs())
        seen.append(clock.context)
        clock.returned()
    assert seen == ["default", "default #1", "default #2"] * 3


def test_prompts_written_in_place_and_values_of_other_types_are_other_inputs():
    prompt, clock = COND.clone(), Clock("UNet")
    clock.start()
    clock.call(9, of(prompt, flag=True))
    clock.returned()
    assert clock.knows(of(COND, flag=True))
    assert not clock.knows(of(COND, flag=1))
    prompt.add_(1)
    assert not clock.knows(of(prompt, flag=True))
    for changed in (COND.double(), COND[:, :4], None):
        assert not clock.knows(of(changed, flag=True))
    assert clock.knows(of(COND, flag=True)) is False  # what was given before is gone


def test_images_scales_and_times_are_no_conditions():
    sample, timestep = torch.empty(1, 4), torch.tensor([3])
    given = {"timestep": timestep, "guidance": torch.tensor([3.5]), "mid_block_residual": torch.empty(1, 4, 2, 2),
             "added": {"labels": torch.tensor([7]), "scale": 0.5, "parts": [sample]}}  # fmt: skip
    shape, conditions = inputs_of((sample, [1, 2]), given, sample, timestep)
    assert shape == (1, 4)
    assert set(conditions) == {"1", "added.labels"}
