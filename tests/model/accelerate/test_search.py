"""`modiff.accelerate` from end to end on small networks: what stays on the target, and what leaves it as it was."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, ModiffWarning, StateError
from modiff.kernels import native
from modiff.model.accelerate import loops, settings
from modiff.model.accelerate.loops import FLOATS, MODIFF, Race, Trials
from modiff.model.accelerate.search import AccelerateResult
from modiff.model.attach import attachment_of
from tests.helpers import Terminal, relative_error
from tests.kernels.problems import needs_compiler
from tests.model.toys import TAKEN, applied, assert_equal, generate, sample, toy
from tests.pixels import pixel_pipeline

PACES: dict[str, float] = {MODIFF: 20.0, FLOATS: 10.0}
TIMES = {"float": 1.0, "plain": 0.8, "modulated": 0.5}


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test depends on the clock of this machine: layers and loops take what the test says."""
    monkeypatch.setattr("modiff.api.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(settings, "measure_layer", lambda *_: TIMES)
    monkeypatch.setattr(Trials, "seconds", lambda _: [1.0, 1.0])
    monkeypatch.setattr(Race, "pace", lambda _, side: PACES[side])


def accelerated(model: nn.Module, max_error: float = 0.02, **words: Any) -> AccelerateResult:
    words = {"compile": False, "progress": False} | words
    return modiff.accelerate(model, max_error, lambda: steps_of(model)[-1], **words)


def steps_of(model: nn.Module) -> list[torch.Tensor]:
    """`sample` with a tensor for the timestep, on which no graph depends."""
    return sample(lambda x, t: model(x, torch.tensor(t)))


def test_the_fastest_settings_within_the_error_stay_on_the_target_until_they_are_removed(tmp_path: Path) -> None:
    model, exact = toy(), sample(toy())
    result = accelerated(model)
    assert result.accelerated
    assert (result.gain, result.choices) == (2.0, {"W8A8 modulated": 5})
    assert 0 < result.error <= 0.02
    assert result.error == pytest.approx(relative_error(generate(model)[-1], exact[-1]))
    assert {entry.name for entry in result.report.taken} == set(TAKEN)
    assert len(next(iter(json.loads(next(tmp_path.glob("times-*.json")).read_text()).values()))["layers"]) == 8
    assert json.loads(json.dumps(result.to_dict()))["choices"] == result.choices
    assert "2.00x as fast as floats: 20 evaluations a second, floats 10" in str(result)
    modiff.remove(model)
    assert_equal(sample(model), exact)


@pytest.mark.parametrize(
    ("paces", "times", "words", "reason"),
    [
        ({MODIFF: 9.9}, {}, {}, "the best settings ran at 0.99x the speed of floats, with an error of 0.0"),
        ({}, {"plain": 1.0, "modulated": 0.98}, {}, "no integers are faster with an error of 0.02 at most"),
        ({}, {}, {"max_error": 1e-6}, "no integers are faster with an error of 1e-06 at most"),
    ],
    ids=["a loop that is slower", "layers that are slower", "an error that only floats keep"],
)
def test_where_nothing_pays_the_target_is_as_it_was(paces, times, words, reason, monkeypatch) -> None:
    monkeypatch.setitem(PACES, MODIFF, paces.get(MODIFF, 20.0))
    for mode, seconds in times.items():
        monkeypatch.setitem(TIMES, mode, seconds)
    model = toy()
    modules = dict(model.named_modules())
    result = accelerated(model, **words)
    assert not result.accelerated
    assert attachment_of(model) is None
    assert reason in result.reason
    assert str(result).startswith(f"left as it was: {result.reason}")
    assert dict(model.named_modules()) == modules
    assert model._compiled_call_impl is None
    assert_equal(sample(model), sample(toy()))
    assert json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("calls", "state", "budget", "states", "layers"),
    [(1, 1028, 0, 7, 4), (1, 1028, -1, 5, 3), (2, 1028 + 516, 0, 7, 4), (1, 1028, 4 * 1028 - 1, 7, 4)],
)
def test_states_of_all_calls_fit_into_the_memory_that_they_may_take(calls, state, budget, states, layers) -> None:
    """2 of body, 2 of q, 1 of k, 2 of v (reads a copy), 4 of out (runs twice); 512 numbers each, 256 in call 2."""
    model = toy()
    model.attention.to_v.register_forward_pre_hook(lambda _, args: args[0].clone())
    model.attention.register_forward_hook(lambda module, _, y: module.to_out[0](y))

    def run(x: torch.Tensor, t: float) -> torch.Tensor:
        return sum(model(x[: 3 - call], torch.tensor(t)) for call in range(1, calls + 1))

    words = {"compile": False, "state_memory": 7 * state + budget, "progress": False}
    result = modiff.accelerate(model, 0.5, partial(sample, run), **words)
    assert result.choices == {"W8A8 plain": 5 - layers, "W8A8 modulated, int16 states": layers}
    with modiff.trajectory(model):
        sample(run)
    assert modiff.report(model).memory.states == states * state


def test_a_pipeline_needs_no_example_and_its_calls_are_trajectories() -> None:
    pipe = pixel_pipeline()
    before = pipe(
        batch_size=1, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    result = modiff.accelerate(pipe, 0.1, compile=False, steps=4, progress=False)
    assert result.accelerated
    assert math.isfinite(result.before)
    same = modiff.accelerate(pixel_pipeline(), 0.1, {"num_inference_steps": 4}, compile=False, progress=False)
    assert same.choices == result.choices
    after = pipe(
        batch_size=1, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert relative_error(torch.as_tensor(after), torch.as_tensor(before)) == pytest.approx(result.error)
    modiff.remove(pipe)


def test_an_interrupt_leaves_the_target_as_it_was_and_keeps_the_times_that_were_measured(tmp_path: Path) -> None:
    model, calls = toy(), []

    def failing() -> None:
        calls.append(sample(model))
        if len(calls) == 4:  # full precision, layers, one of the search, and this one of the race
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modiff.accelerate(model, 0.5, failing, compile=False, progress=False)
    assert attachment_of(model) is None
    assert model._compiled_call_impl is None
    assert_equal(sample(model), sample(toy()))
    assert len(next(iter(json.loads(next(tmp_path.glob("times-*.json")).read_text()).values()))["layers"]) == 8


@pytest.mark.parametrize("ours", [pytest.param(True, marks=needs_compiler), False])
def test_without_a_compiler_both_sides_run_as_they_are_and_the_result_says_why(ours, monkeypatch) -> None:
    """Of inductor alone, or of modiff's loops too."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr("modiff.errors._WARNED", set())
    monkeypatch.setattr(loops.torch, "compile", broken)
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)  # asks again
    if not ours:
        monkeypatch.setattr(native, "find_compiler", lambda: None)
    slowly = "accelerate: .* without torch.compile, more slowly: RuntimeError: no C|run on torch's own operators"
    with pytest.warns(ModiffWarning, match=slowly) as seen:
        result = accelerated(model := toy(), compile=True)
    assert {"own operators" in str(each.message) for each in seen} == {False, not ours}
    assert {"native" in entry.execution for entry in result.report.taken} == {ours}
    assert result.reason == "not compiled: RuntimeError: no C++ compiler"
    assert len(generate(model)) == 6


def test_the_bar_moves_while_layers_are_timed_and_ends_full(monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    accelerated(toy(), progress=True)
    assert all(f"times of layer {number} of 5" in shown.getvalue() for number in (1, 5))
    assert shown.getvalue().rstrip().split("\r")[-1].startswith("loops: 100%")


def test_compiled_it_computes_the_same_and_removal_takes_the_graph_away(monkeypatch) -> None:
    model, compile = toy(), torch.compile
    monkeypatch.setattr(loops.torch, "compile", lambda run, **_: compile(run, backend="aot_eager", fullgraph=True))
    result = accelerated(model, compile=True)
    assert (result.reason, model._compiled_call_impl is None) == ("both compiled", False)
    with modiff.trajectory(model):
        outputs = steps_of(model)
    modiff.remove(model)
    assert model._compiled_call_impl is None
    assert relative_error(outputs[-1], sample(model)[-1]) == pytest.approx(result.error, rel=1e-4)


def test_bad_inputs_are_one_clear_line() -> None:
    for wrong in (2, "0.02", None, math.nan):
        with pytest.raises(
            ConfigError, match=r"accelerate\.max_error: expected a relative error between 0 and 1, got "
        ):
            accelerated(toy(), wrong)
    for model, example in ((pixel_pipeline(), 5), (toy(), {"x": 1})):
        with pytest.raises(
            ConfigError, match=r"accelerate\.example: expected a function that runs one trajectory, or "
        ):
            modiff.accelerate(model, 0.02, example)
    with pytest.raises(ConfigError, match="Toy: expected run=, a function that runs one trajectory"):
        modiff.accelerate(toy())
    with pytest.raises(StateError, match="accelerate: expected a plain model, got Toy with modulated layers"):
        accelerated(applied())


@pytest.mark.parametrize("kind", ["nothing runs", "another model runs", "not a number", "other noise at each call"])
def test_an_example_that_tells_nothing_is_refused_before_the_search(kind, monkeypatch) -> None:
    monkeypatch.undo()
    model, other, calls = toy(), toy(), []

    def example() -> Any:
        calls.append(kind)
        if kind == "nothing runs":
            return None
        if kind == "another model runs":
            return steps_of(other)[-1]
        factor = math.nan if kind == "not a number" else 1 + 0.1 * len(calls)
        return sample(lambda x, t: model(x * factor, torch.tensor(t)))[-1]

    what = "the same noise at each call" if "noise" in kind else "of the target whose result is finite and not all zero"
    with pytest.raises(ConfigError, match=rf"accelerate\.example: expected a trajectory .*{what}, got "):
        modiff.accelerate(model, 0.02, example, compile=False, progress=False)
    assert len(calls) == 1 + ("noise" in kind)
    assert_equal(sample(model), sample(toy()))


def test_where_no_times_can_be_kept_they_are_measured_for_this_call_with_a_warning(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("modiff.api.cache_folder", lambda: tmp_path / "file")
    with pytest.warns(ModiffWarning, match="times of layers are kept for this call alone: .*Set MODIFF_CACHE"):
        assert accelerated(toy()).accelerated
