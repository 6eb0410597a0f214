"""Evaluations whose inputs differ are of different branches; rows that come, go or change places keep their states."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, StateError, presets
from modiff.nn import Clock
from modiff.nn.branches import Inputs, inputs_of
from tests.helpers import assert_same_bits, assert_within, relative_error

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
    "l": lambda: of(COND, labels=torch.tensor([1.0])),
    "k": lambda: of(COND, labels=torch.tensor([2.0])),
    "v": lambda: of(COND, scale=1.0),
    "w": lambda: of(COND, scale=0.0),
    "r": lambda: of(COND, sigma=torch.rand(1)),
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
    "told by a float for each sample": ("9l 9k 6l 6k 3k 3l", "ababba"),
    "by one that starts late": ("9l 6l 6k 3k 3l", "aabba"),
    "by a scale": ("9v 9w 6v 6w 3w", "ababb"),
    "times that move": ("9r 6r 3r 2r", "aaaa"),
    "times that move in two calls": ("9r 9r 6r 6r 3r 3r", "ababab"),
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


def test_images_and_times_are_no_conditions():
    sample = torch.empty(1, 4)
    given = {"guidance": torch.tensor([3.5]), "mid_block_residual": torch.empty(1, 4, 2, 2), "residuals": [COND],
             "added": {"labels": torch.tensor([7]), "scale": 0.5}, "cap_feats": [COND]}  # fmt: skip
    for args, more in (((sample, 5, [1, 2]), {}), ((sample,), {"timestep": 5, "2": [1, 2]})):
        shape, conditions = inputs_of(args, given | more, sample, ("timestep", 1))
        assert shape == (1, 4)
        assert set(conditions) == {"2", "added.labels", "added.scale", "cap_feats.0", "guidance"}


LINEAR = ModiffConfig(layer=LayerConfig(modulation=ModulationConfig(predictor="linear", gain=0.8)))


class Rows(nn.Module):
    """No row of the batch sees another one; the words of a condition enter in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: float, words: Tensor) -> Tensor:
        h = (self.conv(sample) + words[..., None, None]).movedim(1, -1)
        return self.conv_out((h + self.down(self.up(h).relu())).movedim(-1, 1))


def rows_model(config: ModiffConfig) -> nn.Module:
    torch.manual_seed(0)
    model = Rows().eval()
    modiff.apply(model, dataclasses.replace(config, include=("*",), share_residuals="auto"))
    return model


def with_layer(config: ModiffConfig, **changes: object) -> ModiffConfig:
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, **changes))


HELD = QuantizerConfig(bits=4, refresh_every=3)
ROWS = [presets.w8a4(), presets.w4a8(), LINEAR, with_layer(presets.w8a4(), activation=HELD)]
EXECUTIONS = {"simulated": 0.0, "float32": 0.0, "int16": 2e-3}
"""And how far rows are from what they would be alone: a grid is made of all rows that there are at its start."""


def executed(config: ModiffConfig, execution: str) -> ModiffConfig:
    if execution == "simulated":
        return config
    state_dtype = "auto" if execution == "int16" else "float32"
    loop = dataclasses.replace(config.layer.modulation, state_dtype=state_dtype)
    return with_layer(config.on_integers(), modulation=loop)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("config", ROWS)
def test_rows_that_are_reordered_go_on_as_if_they_had_been_these_from_the_start(config, execution):
    model = rows_model(executed(config, execution))
    index, times = torch.tensor([2, 0, 2, 3]), (900.0, 800.0, 700.0, 600.0, 500.0)
    x, words = torch.randn(4, 3, 4, 4), torch.randn(4, 16)
    away = torch.tensor([0.3, 0.01, 0.02, 0.3]).reshape(4, 1, 1, 1)  # two of them leave their anchors

    def steps(rows: Tensor, late: Tensor) -> list[Tensor]:
        outputs = []
        with modiff.trajectory(model), torch.no_grad():
            for i, t in enumerate(times):
                if i == 3:
                    modiff.reorder(model, late)
                    rows = rows[late]
                for name, factor in (("cond", 1.0), ("uncond", 0.5)):
                    with modiff.context(model, name):
                        outputs.append(model(x[rows] * (1 - i * away[rows]) * factor, t, words[rows]))
        return outputs

    everyone = torch.arange(4)
    for late, early in zip(steps(everyone, index)[6:], steps(everyone[index], everyone)[6:], strict=True):
        assert relative_error(late, early) <= EXECUTIONS[execution]


DROPPED = [[1], [3], [2, 3], [3, 0], [0, 1, 2]]


@pytest.mark.parametrize("index", DROPPED)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("config", ROWS)
def test_rows_whose_conditions_stay_go_on_where_others_are_dropped(config, execution, index):
    model = rows_model(executed(config, execution))
    x, words = torch.randn(4, 3, 4, 4), torch.randn(4, 16)

    def steps(first: list[int], later: list[int]) -> list[Tensor]:
        with modiff.trajectory(model), torch.no_grad():
            return [
                model(x[rows] * (1 + t / 1e4), t, words[rows])
                for t in (900.0, 800.0, 700.0, 600.0, 500.0)
                for rows in [first if t > 650 else later]
            ]

    for kept, alone in zip(steps([0, 1, 2, 3], index)[3:], steps(index, index)[3:], strict=True):
        assert relative_error(kept, alone) < 1e-5 + EXECUTIONS[execution]


@pytest.mark.parametrize("index", [[1], [2, 0]])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("config", [presets.w8a8(), presets.w4a8(), LINEAR])
def test_rows_that_were_there_go_on_and_rows_that_come_begin(config, execution, index):
    model = rows_model(executed(config, execution))
    x, words, times = torch.randn(4, 3, 4, 4), torch.randn(4, 16), (900.0, 800.0, 700.0, 600.0, 500.0)
    coming = [i for i in range(4) if i not in index]
    bound = 2e-4 + EXECUTIONS[execution]  # float error may move a value by a code

    def steps(first: list[int], later: list[int]) -> list[Tensor]:
        with modiff.trajectory(model), torch.no_grad():
            rows = {t: first if t > 650 else later for t in times}
            return [model(x[r] * (1 + t / 1e4), t, words[r]) for t, r in rows.items() if r]

    together, kept, new = steps(index, [0, 1, 2, 3])[3:], steps(index, index)[3:], steps([], coming)
    for ours, old, come in zip(together, kept, new, strict=True):
        assert relative_error(ours[index], old) < bound
        assert relative_error(ours[coming], come) < bound


@pytest.mark.parametrize("case", ["dropped", "new", "told apart by nothing", "written in place"])
def test_states_begin_again_where_a_row_is_new_or_nothing_tells(case):
    model, x, words = rows_model(presets.w8a8().on_integers()), torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    later = {"new": torch.randn(1, 16), "told apart by nothing": torch.zeros(1)}.get(case, words[1:].clone())
    loop = model.up.loop
    with modiff.trajectory(model), torch.no_grad():
        for t in (9.0, 8.0):
            model(x, t, torch.zeros(1) if case == "told apart by nothing" else words)
        if case == "written in place":
            words += 0
        model(x[1:], 7.0, later)
        assert loop.memories["default #1", 0].taken == (3 if case == "dropped" else 1)
        assert loop.memories["default", 0].taken == 2


@pytest.mark.parametrize("case", ["come", "to a grid", "from beyond a grid", "to scales that last", "untold"])
def test_states_of_all_rows_begin_again_where_nothing_tells_new_from_old_or_a_grid_does_not_hold_them(case):
    config = presets.published(8, 8).on_integers() if "grid" in case else presets.w8a8()
    config = with_layer(presets.w8a4(), activation=HELD) if "last" in case else config
    model, x, words = rows_model(config), torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    words[1] *= 50.0 if case == "from beyond a grid" else 1.0
    with modiff.trajectory(model), torch.no_grad():
        model(x[:1], 9.0, words[:1])
        for step, t in enumerate((8.0, 7.0)):
            model(x, t, torch.zeros(2, 16) if case == "untold" else words)
            for layer in (model.up, model.down) if "grid" in case else ():
                memory = layer.loop.memories["default #1", 0]
                expected = layer.operator.affine(memory.input.state.value.double())  # the law, rows that came too
                assert_within(memory.output.value(), expected.detach(), 0.52 * (step + 2) * float(memory.output.grid))
        taken = model.up.loop.memories["default #1", 0].taken
        assert taken == (3 if case in ("come", "to a grid") else 2)


def test_rows_of_integers_are_reordered_on_their_grid_bit_for_bit():
    model, index = rows_model(presets.w8a8().on_integers()), torch.tensor([2, 0, 2])
    with modiff.trajectory(model), torch.no_grad():
        for t in (9.0, 8.0):
            model(torch.randn(3, 3, 4, 4), t, torch.ones(3, 16))
        memory = model.up.loop.memories["default", 0]
        before = [(state.n.clone(), state.grid) for state in (*memory.input.states, memory.output)]
        modiff.reorder(model, index)
        for (n, grid), state in zip(before, (*memory.input.states, memory.output), strict=True):
            assert_same_bits(state.n, n[index])
            assert state.grid is grid


def test_reorder_refuses_rows_that_depend_on_each_other_and_an_index_that_does_not_fit():
    shared = with_layer(presets.w8a8(), activation=QuantizerConfig(bits=8, granularity="tensor"))
    model = rows_model(shared)
    with modiff.trajectory(model), torch.no_grad():
        model(torch.randn(2, 3, 4, 4), 9.0, torch.randn(2, 16))
        with pytest.raises(StateError, match=r"expected scales of each sample.*granularity='sample' or 'token'"):
            modiff.reorder(model, torch.tensor([0, 0]))
        with pytest.raises(StateError, match="Begin the trajectory again"):  # some layers may have gone on
            model(torch.randn(2, 3, 4, 4), 8.0, torch.randn(2, 16))
    model = rows_model(presets.w8a8())
    with pytest.raises(StateError, match="between two evaluations, got none"):
        modiff.reorder(model, torch.tensor([0, 1]))
    with modiff.trajectory(model), torch.no_grad():
        model(torch.randn(2, 3, 4, 4), 9.0, torch.randn(2, 16))
        for index in (torch.tensor([0, 2]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), torch.tensor([[0]])):
            with pytest.raises(ConfigError, match="expected a row of the batch for each of its rows"):
                modiff.reorder(model, index)
        with pytest.raises(StateError, match="expected an index of its 2 rows, got one of 1"):
            modiff.reorder(model, torch.tensor([0]))
