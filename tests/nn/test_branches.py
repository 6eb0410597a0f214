"""Evaluations whose inputs differ are of different branches, however a loop or a sampler orders them."""

import warnings

import pytest
import torch
from torch import Tensor

from modiff.nn import Clock
from modiff.nn.branches import Inputs, inputs_of

COND, UNCOND = torch.randn(2, 1, 8, 16)


def of(prompt: Tensor | None, rows: int = 1, **more: object) -> Inputs:
    sample = torch.empty(rows, 4)
    return inputs_of((), {"hidden_states": sample, "encoder_hidden_states": prompt, **more}, sample, None)


INPUTS = {
    "c": lambda: of(COND),
    "u": lambda: of(UNCOND.clone()),  # made again at every step
    "m": lambda: of(None, encoder_attention_mask=torch.ones(1, 8)),
    "n": lambda: of(COND + torch.randn(())),  # another one at each evaluation
    "s": lambda: of(COND, skip_layers=[1]),
    "B": lambda: of(torch.cat([UNCOND, COND]), 2),
    **{str(i): lambda i=i: of(COND + i) for i in range(10)},
}
RUNS = {  # timestep and inputs of each evaluation; a letter for each branch
    "guidance in two calls": ("9c 9u 6c 6u 3c 3u", "ababab"),
    "in an order that changes": ("9c 9u 6u 6c 3c 3u", "abbaab"),
    "without a prompt": ("9c 9m 6c 6m", "abab"),
    "guidance that ends": ("9u 9c 6u 6c 3c 2c", "ababbb"),
    "guidance that starts late": ("9c 6c 3u 3c 2u 2c", "aababa"),
    "Heun's sampler": ("9c 6c 6c 3c 3c 0c", "aaaaaa"),
    "Heun's and guidance in two calls": ("9c 9u 6c 6u 6c 6u 3c 3u", "abababab"),
    "Heun's and guidance that starts late": ("9c 6c 6c 3c 3u 3c 3u", "aaaabab"),
    "ten prompts": (" ".join(f"{t}{i}" for t in (9, 6, 3) for i in range(10)), "abcdefghij" * 3),
    "a batch that shrinks": ("9B 6B 3c 2c", "aabb"),
    "guidance on and off": ("9B 6c 5B 4c", "abab"),
    "a third call that skips layers": ("9B 9s 6B 6s 3B", "ababa"),
    "next to one that does not": ("9c 9s 6c 6s", "abab"),
    "prompts that change at each step": ("9n 6n 3n 2n 1n", "abbbb"),
    "the same in two calls": ("9n 9n 6n 6n 3n 3n 2n 2n 1n 1n", "abcdcdcdcd"),
    "no timestep, guidance in two calls": ("-c -u -c -u -c -u", "ababab"),
    "no timestep, prompts that change": ("-n -n -n -n -n -n", "abcddd"),
    "no timestep, other batches": ("-c -B -c", "aba"),
}


def branches(clock: Clock, evaluations: str) -> str:
    seen = []
    for timestep, kind in evaluations.split():
        clock.call(None if timestep == "-" else int(timestep), INPUTS[kind]())
        seen.append(clock.context.removeprefix("default").removeprefix(" #"))
        clock.returned()
        assert clock.context == "default"
    return "".join(chr(ord("a") + int(number or 0)) for number in seen)


@pytest.fixture(params=[False, True])
def clock(request, monkeypatch) -> Clock:
    """In a trajectory, of a host that numbers evaluations or of none."""
    monkeypatch.setattr("modiff.errors._WARNED", set())
    clock = Clock("UNet")
    clock.numbered = request.param
    clock.start()
    return clock


@pytest.mark.parametrize("run", RUNS)
def test_an_evaluation_goes_on_where_one_of_the_same_inputs_was(run, clock):
    evaluations, expected = RUNS[run]
    assert branches(clock, evaluations) == expected


def test_tiles_under_the_same_conditions_are_told_apart_by_their_order_where_the_host_numbers_them(clock):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = branches(clock, " ".join(f"{t}c {t}u {t}c {t}u {t}c {t}u" for t in (9, 6, 3)))
    assert seen == ("abcdef" if clock.numbered else "ababab") * 3
    assert len(told) == (not clock.numbered)


def test_branches_are_told_apart_where_nobody_waits_for_the_timestep_on_a_device(monkeypatch):
    monkeypatch.setattr("modiff.nn.clock.middle", lambda _: torch.zeros(1, device="meta"))
    clock = Clock("UNet")
    clock.start()
    assert branches(clock, "9c 9u 9s 9c 9u 9s 9c 9u 9s") == "abcabcabc"


def test_prompts_written_in_place_and_values_of_other_types_are_other_inputs(clock):
    prompt = COND.clone()
    clock.call(9, of(prompt, flag=True))
    clock.returned()
    assert clock.knows(of(COND, flag=True))
    for other in (of(COND, flag=1), of(COND.double(), flag=True), of(COND[:, :4], flag=True), of(None, flag=True)):
        assert not clock.knows(other)
    prompt.add_(1)
    assert not clock.knows(of(prompt, flag=True))
    assert not clock.knows(of(COND, flag=True))  # what was given before is gone


def test_images_scales_and_times_are_no_conditions():
    sample = torch.empty(1, 4)
    given = {"guidance": torch.tensor([3.5]), "mid_block_residual": torch.empty(1, 4, 2, 2), "residuals": [COND],
             "added": {"labels": torch.tensor([7]), "scale": 0.5}, "cap_feats": [COND]}  # fmt: skip
    for args, more in (((sample, 5, [1, 2]), {}), ((sample,), {"timestep": 5, "2": [1, 2]})):
        shape, conditions = inputs_of(args, given | more, sample, ("timestep", 1))
        assert shape == (1, 4)
        assert set(conditions) == {"2", "added.labels", "cap_feats.0"}
