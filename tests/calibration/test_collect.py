"""Collecting calibration data: the very inputs of the network, those that were asked for, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import CalibrationError, CalibrationSet, ConfigError, EveryStep, NormalSteps, UniformGroups
from modiff.calibration.collect import record_calls
from tests.helpers import assert_same_bits
from tests.model.toys import activations_only, sample, toy

STEPS = 6


def seen_by(model: nn.Module, run) -> list[tuple[Tensor, float]]:
    """Inputs of every evaluation."""
    found: list[tuple[Tensor, float]] = []
    handle = model.register_forward_pre_hook(lambda _, args: found.append((args[0].clone(), float(args[1]))))
    run()
    handle.remove()
    return found


def runs(model: nn.Module, batch: int = 2):
    return lambda i: sample(model, STEPS, seed=i, batch=batch)


def test_every_evaluation_is_kept_as_it_came():
    model = toy()
    found = record_calls(model, runs(model), trajectories=2, progress=False)
    true = seen_by(model, lambda: [runs(model)(i) for i in range(2)])
    assert [(c.trajectory, c.step) for c in found] == [(i, s) for i in range(2) for s in range(STEPS)]
    for call, (x, t) in zip(found, true, strict=True):
        assert_same_bits(call.args[0], x)
        assert call.timestep == pytest.approx(t)
        assert call.rows == ()
        assert call.previous is None
    outputs = runs(model)(0)
    with torch.no_grad():
        assert_same_bits(found[3].evaluate(model), outputs[3])


def test_a_sampler_chooses_steps_and_pairs_bring_the_step_before():
    model = toy()
    found = record_calls(
        model, runs(model), trajectories=2, steps=STEPS, sampler=UniformGroups(groups=3), pairs=True, progress=False
    )
    true = seen_by(model, lambda: runs(model)(1))
    assert [c.step for c in found] == [0, 2, 4] * 2
    assert found[3].previous is None
    for call in found[4:]:
        assert call.previous.step == call.step - 1
        assert call.previous.trajectory == call.trajectory == 1
        assert_same_bits(call.args[0], true[call.step][0])
        assert_same_bits(call.previous.args[0], true[call.step - 1][0])
        assert call.previous.timestep == pytest.approx(true[call.step - 1][1])


def test_one_step_of_each_sample_keeps_exactly_that_many_rows():
    model, batch, sampler = toy(), 5, NormalSteps()
    found = record_calls(
        model, runs(model, batch), trajectories=3, batch=batch, steps=STEPS, sampler=sampler, pairs=True, progress=False
    )
    plan = sampler.draw(STEPS, 3 * batch, torch.Generator().manual_seed(0))
    assert sum(len(c.args[0]) for c in found) == 3 * batch
    for call in found:
        columns = plan[call.step, call.trajectory * batch : (call.trajectory + 1) * batch]
        rows = columns.nonzero().flatten().tolist()
        assert call.rows == (() if len(rows) == batch else tuple(rows))
        true = seen_by(model, lambda i=call.trajectory: runs(model, batch)(i))
        assert_same_bits(call.args[0], true[call.step][0][rows])
        if call.step:
            assert_same_bits(call.previous.args[0], true[call.step - 1][0][rows])


class Guided(nn.Module):
    """Takes a condition and whether it is there; counts nothing, knows no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, text: dict[str, Tensor], txt_ids: Tensor) -> Tensor:
        return self.layer(sample) + text["embedding"] + txt_ids.sum()


def batched_guidance(model: nn.Module, batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, generator=generator)
    text = {"embedding": torch.randn(2 * batch, 4, generator=generator)}
    ids = torch.randn(2 * batch, 3, generator=generator)  # as long as the batch, and no batch
    given = []
    for i in range(STEPS):
        both = torch.cat([x, x])
        given.append(both)
        uncond, cond = model(both, torch.full((2 * batch,), 10.0 - i), text, txt_ids=ids).chunk(2)
        x = x - 0.1 * (uncond + 2.0 * (cond - uncond))
    return [*given, text["embedding"], ids]


def test_batched_guidance_keeps_a_sample_in_both_branches():
    model, batch = Guided(), 4
    sampler = NormalSteps()
    found = record_calls(
        model,
        lambda i: batched_guidance(model, batch, i),
        batch=batch,
        steps=STEPS,
        sampler=sampler,
        progress=False,
    )
    with torch.no_grad():
        *given, embedding, ids = batched_guidance(model, batch)
    assert any(0 < len(c.rows) < batch for c in found)
    for call in found:
        rows = list(call.rows) or list(range(batch))
        both = rows + [batch + r for r in rows]
        assert_same_bits(call.args[0], given[call.step][both])
        assert_same_bits(call.args[1], torch.full((len(both),), 10.0 - call.step))
        assert_same_bits(call.args[2]["embedding"], embedding[both])
        assert_same_bits(call.kwargs["txt_ids"], ids)
        assert call.timestep == 10.0 - call.step


def test_guidance_in_two_calls_is_counted_and_paired_by_context():
    model = toy()
    modiff.apply(model, activations_only(8))

    def run(_: int) -> None:
        x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        with modiff.trajectory(model):
            for i in range(STEPS):
                for name in ("cond", "uncond"):
                    with modiff.context(model, name):
                        model(x + (name == "cond"), 10.0 - i)

    found = record_calls(model, run, steps=STEPS, sampler=UniformGroups(groups=2), pairs=True, progress=False)
    assert [(c.context, c.step) for c in found] == [("cond", 0), ("uncond", 0), ("cond", 3), ("uncond", 3)]
    for call in found[2:]:
        assert (call.previous.context, call.previous.step) == (call.context, 2)
    assert_same_bits(found[2].args[0], found[3].args[0] + 1)


def test_quantized_trajectories_give_quantized_states():
    model = toy()
    plain = record_calls(model, runs(model), progress=False)
    modiff.apply(model, activations_only(2))

    def run(i: int) -> None:
        with modiff.trajectory(model):
            runs(model)(i)

    quantized = record_calls(model, run, progress=False)
    assert_same_bits(quantized[0].args[0], plain[0].args[0])
    assert float((quantized[-1].args[0] - plain[-1].args[0]).abs().max()) > 1e-4
    assert "_modiff" in model.__dict__, "what apply hung on the model stays"


def test_a_plain_model_is_left_as_it_was_also_when_a_run_raises():
    model = toy()
    before = dict(model.__dict__)

    def interrupted(i: int) -> None:
        runs(model)(i)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_calls(model, interrupted, progress=False)
    record_calls(model, runs(model), progress=False)
    assert model.__dict__.keys() == before.keys()
    assert not model._forward_pre_hooks


def test_inputs_that_the_caller_changes_later_are_copies():
    model = toy()

    def run(_: int) -> None:
        x = torch.zeros(1, 3, 4, 4)
        for i in range(3):
            model(x, 10.0 - i)
            x += 1

    found = record_calls(model, run, progress=False)
    assert [float(c.args[0].mean()) for c in found] == [0.0, 1.0, 2.0]


def test_a_tensor_that_is_written_in_inference_mode_is_copied_anew_and_any_other_once():
    model, x, y = toy(), torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)

    def run(_: int) -> None:
        with torch.inference_mode():
            moving, still = x.clone(), y.clone()
            for step in range(3):
                model(moving, 3.0 - step)
                moving += 1
                model(still, 3.0 - step)

    calls = record_calls(model, run, progress=False)
    assert [float(c.args[0].mean()) for c in calls] == [0.0, 1.0, 1.0, 1.0, 2.0, 1.0]
    assert calls[1].args[0] is calls[3].args[0]


def test_memory_is_bounded_in_memory_and_on_disk(tmp_path):
    model = toy()
    one = 2 * 3 * 4 * 4 * 4 / 2**20  # MiB of an input
    with pytest.raises(CalibrationError, match=r"collect: expected at most .* MiB of calls, got 3 calls .* folder="):
        record_calls(model, runs(model), memory_mib=2.5 * one, progress=False)
    found = record_calls(model, runs(model), trajectories=2, folder=tmp_path, memory_mib=2.5 * one, progress=False)
    whole = record_calls(model, runs(model), trajectories=2, progress=False)
    sizes = [len(p.read_bytes()) for p in tmp_path.glob("trajectory-00000-*.safetensors")]
    assert len(sizes) == 3
    assert len(found) == len(whole) == 2 * STEPS
    for mine, true in zip(found, whole, strict=True):
        assert_same_bits(mine.args[0], true.args[0])
        assert (mine.trajectory, mine.step, mine.timestep) == (true.trajectory, true.step, true.timestep)


def test_a_job_that_was_interrupted_runs_only_what_is_missing(tmp_path):
    model = toy()
    one = 2 * 3 * 4 * 4 * 4 / 2**20
    ran: list[int] = []

    def run(i: int) -> None:
        ran.append(i)
        runs(model)(i)
        if i == 1 and len(ran) == 2:
            raise KeyboardInterrupt

    def job() -> CalibrationSet:
        return record_calls(
            model, run, trajectories=3, steps=STEPS, sampler=EveryStep(), folder=tmp_path, memory_mib=2.5 * one,
            progress=False,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        job()
    found = job()
    assert ran == [0, 1, 1, 2]
    whole = record_calls(model, runs(model), trajectories=3, progress=False)
    assert [(c.trajectory, c.step) for c in found] == [(c.trajectory, c.step) for c in whole]
    for mine, true in zip(found, whole, strict=True):
        assert_same_bits(mine.args[0], true.args[0])
    job()
    assert ran == [0, 1, 1, 2]
    with pytest.raises(ConfigError, match="got one with another seed"):
        record_calls(
            model, run, trajectories=3, steps=STEPS, sampler=EveryStep(), folder=tmp_path, seed=1, progress=False
        )


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_a_trajectory_of_another_length_is_an_error(steps):
    model = toy()
    with pytest.raises(CalibrationError, match=f"expected {steps} evaluations in trajectory 0, got {STEPS}"):
        record_calls(model, runs(model), steps=steps, sampler=EveryStep(), progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": EveryStep()}, ConfigError, r"collect\.steps: expected the evaluations in a trajectory, got None"),
        ({"trajectories": 0}, ConfigError, r"collect\.trajectories: expected 1 or more, got 0"),
        ({"batch": 0}, ConfigError, r"collect\.batch: expected 1 or more, got 0"),
        ({"memory_mib": 0.0}, ConfigError, r"collect\.memory_mib: expected more than 0"),
        (
            {"batch": 3, "steps": STEPS, "sampler": NormalSteps()},
            CalibrationError,
            r"collect\.batch: expected a batch axis of 3 samples, or a multiple",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, error, message):
    model = toy()
    with pytest.raises(error, match=message):
        record_calls(model, runs(model), **settings, progress=False)


def test_a_run_that_never_reaches_the_network_is_an_error():
    with pytest.raises(CalibrationError, match="expected at least 1 evaluations in trajectory 0, got 0"):
        record_calls(toy(), lambda i: None, progress=False)
