"""Calibration data: the very inputs of the network, those that were chosen, in bounded memory; and their replay."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import CalibrationError, ConfigError, EveryStep, NormalSteps, UniformGroups
from modiff.calibration.collect import record_calls
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.model.toys import activations_only, sample, toy

STEPS = 6


def seen_by(model: nn.Module, run) -> list[tuple[Tensor, float]]:
    """Inputs of every evaluation."""
    seen: list[tuple[Tensor, float]] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), float(args[1]))))
    run()
    handle.remove()
    return seen


def runs(model: nn.Module, batch: int = 2):
    return lambda i: sample(model, STEPS, seed=i, batch=batch)


def test_every_evaluation_is_kept_as_it_came():
    model = toy()
    calls = record_calls(model, runs(model), trajectories=2, progress=False)
    true = seen_by(model, lambda: [runs(model)(i) for i in range(2)])
    assert [(c.trajectory, c.step) for c in calls] == [(i, s) for i in range(2) for s in range(STEPS)]
    for call, (x, t) in zip(calls, true, strict=True):
        assert_same_bits(call.args[0], x)
        assert (call.timestep, call.rows, call.previous) == (pytest.approx(t), (), None)
    with torch.no_grad():
        assert_same_bits(calls[3].evaluate(model), runs(model)(0)[3])


def test_one_step_of_each_sample_keeps_exactly_that_many_rows():
    model, batch, sampler = toy(), 5, NormalSteps()
    calls = record_calls(
        model, runs(model, batch), trajectories=3, batch=batch, steps=STEPS, sampler=sampler, pairs=True, progress=False
    )
    plan = sampler.draw(STEPS, 3 * batch, torch.Generator().manual_seed(0))
    assert sum(len(c.args[0]) for c in calls) == 3 * batch
    for call in calls:
        columns = plan[call.step, call.trajectory * batch : (call.trajectory + 1) * batch]
        rows = columns.nonzero().flatten().tolist()
        assert call.rows == (() if len(rows) == batch else tuple(rows))
        true = seen_by(model, lambda i=call.trajectory: runs(model, batch)(i))
        assert_same_bits(call.args[0], true[call.step][0][rows])
        if call.step:
            assert (call.previous.step, call.previous.trajectory) == (call.step - 1, call.trajectory)
            assert_same_bits(call.previous.args[0], true[call.step - 1][0][rows])
            assert call.previous.timestep == pytest.approx(true[call.step - 1][1])


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
    inputs = []
    for i in range(STEPS):
        both = torch.cat([x, x])
        inputs.append(both)
        uncond, cond = model(both, torch.full((2 * batch,), 10.0 - i), text, txt_ids=ids).chunk(2)
        x = x - 0.1 * (uncond + 2.0 * (cond - uncond))
    return [*inputs, text["embedding"], ids]


def test_batched_guidance_keeps_a_sample_in_both_branches():
    model, batch = Guided(), 4
    calls = modiff.collect(
        model, lambda i: batched_guidance(model, batch, i), batch=batch, steps=STEPS, sampler=NormalSteps(),
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        *inputs, embedding, ids = batched_guidance(model, batch)
    assert any(0 < len(c.rows) < batch for c in calls)
    for call in calls:
        rows = list(call.rows) or list(range(batch))
        both = rows + [batch + r for r in rows]
        assert_same_bits(call.args[0], inputs[call.step][both])
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

    calls = record_calls(model, run, steps=STEPS, sampler=UniformGroups(groups=2), pairs=True, progress=False)
    assert [(c.context, c.step) for c in calls] == [("cond", 0), ("uncond", 0), ("cond", 3), ("uncond", 3)]
    for call in calls[2:]:
        assert (call.previous.context, call.previous.step) == (call.context, 2)
    assert_same_bits(calls[2].args[0], calls[3].args[0] + 1)


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_is_written_in_place_is_copied_again_and_any_other_once(inference):
    model, x, y = toy(), torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)

    def run(_: int) -> None:
        with torch.inference_mode(inference):
            moving, still = x.clone(), y.clone()
            for step in range(3):
                model(moving, 3.0 - step)
                moving += 1
                model(still, 3.0 - step)

    calls = record_calls(model, run, progress=False)
    assert [float(c.args[0].mean()) for c in calls] == [0.0, 1.0, 1.0, 1.0, 2.0, 1.0]
    assert calls[1].args[0] is calls[3].args[0]


def test_memory_is_bounded_and_a_job_that_was_interrupted_runs_only_what_is_missing(tmp_path):
    model, ran = toy(), []
    before, memory_mib = dict(model.__dict__), 2.5 * 2 * 3 * 4 * 4 * 4 / 2**20  # of two inputs and a half
    with pytest.raises(CalibrationError, match=r"collect: expected at most .* MiB of calls, got 3 calls .* folder="):
        record_calls(model, runs(model), memory_mib=memory_mib, progress=False)

    def run(i: int) -> None:
        ran.append(i)
        runs(model)(i)
        if ran == [0, 1]:
            raise KeyboardInterrupt

    settings = {"trajectories": 3, "steps": STEPS, "sampler": EveryStep(), "folder": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        record_calls(model, run, **settings, memory_mib=memory_mib)
    assert model.__dict__.keys() == before.keys()
    assert not model._forward_pre_hooks
    for _ in range(2):
        calls = record_calls(model, run, **settings, memory_mib=memory_mib)
        assert ran == [0, 1, 1, 2]
    assert len(list(tmp_path.glob("trajectory-00000-*.safetensors"))) == 3
    whole = record_calls(model, runs(model), trajectories=3, progress=False)
    for mine, true in zip(calls, whole, strict=True):
        assert_same_bits(mine.args[0], true.args[0])
        assert (mine.trajectory, mine.step, mine.timestep) == (true.trajectory, true.step, true.timestep)
    with pytest.raises(ConfigError, match="got one with another seed"):
        record_calls(model, run, **settings, seed=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": EveryStep()}, ConfigError, r"collect\.steps: expected the evaluations in a trajectory, got None"),
        ({"memory_mib": 0.0}, ConfigError, r"collect\.memory_mib: expected more than 0"),
        ({"steps": 5, "sampler": EveryStep()}, CalibrationError, "expected 5 evaluations in trajectory 0, got 6"),
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
    with pytest.raises(CalibrationError, match="expected at least 1 evaluations in trajectory 0, got 0"):
        record_calls(model, lambda i: None, progress=False)


@pytest.mark.parametrize("modulated", [False, True])
def test_plain_layers_are_calibrated_on_the_calls_and_modulated_ones_on_the_residual_of_each_pair(modulated):
    """MoDiff, residual ranges: (max - min) of a_t - a_prev over all calibration data."""
    model, plain, ran, seen = toy(), toy(), [], []
    calls = record_calls(model, runs(model), trajectories=2, pairs=modulated, progress=False)
    plain.register_forward_hook(lambda *_: ran.append(1))
    modiff.replay(plain, calls)  # a network without modiff is just evaluated
    assert len(ran) == len(calls)
    config = activations_only(8, dynamic=False)
    if not modulated:
        config = dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=None))
    modiff.apply(model, config)
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    plain.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for call in calls:
            call.evaluate(plain)
    largest = max(float(x.abs().max()) for x in seen)
    if modulated:
        pairs = [(a, b) for a, b, call in zip(seen[1:], seen, calls[1:], strict=False) if call.step]
        assert len(pairs) == 2 * (STEPS - 1)
        moved = max(float((a - b).abs().max()) for a, b in pairs)
        assert moved < 0.7 * largest, "the two must differ, else nothing is tested"
        largest = moved
    scale = float(attachment_of(model).layers["body"].quantizer.static[0].scale)
    assert scale == pytest.approx(largest / 127, rel=1e-4)
    if modulated:
        with pytest.raises(CalibrationError, match="replay: expected calls with the one before each, got none among 6"):
            modiff.replay(model, record_calls(plain, runs(plain), progress=False))
