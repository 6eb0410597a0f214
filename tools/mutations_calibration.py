"""Deliberate bugs in calibration: samplers, sets, range metrics, scales per step, attention operands, methods."""

from __future__ import annotations

from mutation import Mutation

CALIBRATION: tuple[Mutation, ...] = (
    Mutation(
        file="src/modiff/model/timesteps.py",
        old="kept[steps - 1 - times, torch.arange(samples)] = True",
        new="kept[times, torch.arange(samples)] = True",
        tests=("tests/model/test_timesteps.py",),
        why="time runs the wrong way: NDTC prefers states near the noise",
    ),
    Mutation(
        file="src/modiff/model/timesteps.py",
        old='"variance": math.sqrt(steps / 2)',
        new='"variance": steps / 4',
        tests=("tests/model/test_timesteps.py",),
        why="the reading of the spread as a variance is another density",
    ),
    Mutation(
        file="src/modiff/model/timesteps.py",
        old=".floor().clamp(0, steps - 1)",
        new=".round().clamp(0, steps - 1)",
        tests=("tests/model/test_timesteps.py",),
        why="half a step of bias in every drawn time",
    ),
    Mutation(
        file="src/modiff/model/collect.py",
        old="before = self._last.pop(context, None)",
        new="before = self._last.pop(next(iter(self._last), context), None)",
        tests=("tests/model/test_collect.py",),
        why="a residual pair mixes the conditional branch with the unconditional one",
    ),
    Mutation(
        file="src/modiff/model/collect.py",
        old="tuple(first + row for first in branches for row in rows)",
        new="tuple(rows)",
        tests=("tests/model/test_collect.py",),
        why="a kept sample loses its conditional branch",
    ),
    Mutation(
        file="src/modiff/model/collect.py",
        old="version_of(tensor), positions)",
        new="0, positions)",
        tests=("tests/model/test_collect.py",),
        why="a tensor that was changed in place is kept as it was a step before",
    ),
    Mutation(
        file="src/modiff/model/calibration_set_shards.py",
        old='        if header.get("last") == "True":\n            return found',
        new="        return found",
        tests=("tests/model/test_calibration_set.py",),
        why="a trajectory that was cut off counts as whole, and is not run again",
    ),
    Mutation(
        file="src/modiff/core/range_metrics.py",
        old="filled = (mass > 0).double()",
        new="filled = torch.ones_like(mass)",
        tests=("tests/core/test_range_metrics.py",),
        why="KL spreads the mass of a code over empty bins",
    ),
    Mutation(
        file="src/modiff/core/observers.py",
        old="chosen = torch.where(loss < best, ratio, chosen)",
        new="chosen = torch.where(loss <= best, ratio * 0.99, chosen)",
        tests=("tests/core/test_range_metrics.py",),
        why="the search answers with the range after the best one",
    ),
    Mutation(
        file="src/modiff/core/step_sets.py",
        old="if len(moment) == len(now) and all(",
        new="if len(moment) == len(now) and any(",
        tests=("tests/core/test_step_sets.py",),
        why="a sampler with half the steps silently finds the residual scales of another",
    ),
    Mutation(
        file="src/modiff/core/coder.py",
        old='return self._split(x.clamp_min(0) if self.config.lowest == "zero" else x)',
        new="return self._split(x)",
        tests=("tests/core/test_coder.py",),
        why="an always-zero quantizer widens its range for negative values",
    ),
    Mutation(
        file="src/modiff/nn/attention.py",
        old="return (probabilities @ v).to(query.dtype)",
        new="return (probabilities @ value.to(probabilities.dtype)).to(query.dtype)",
        tests=("tests/nn/test_attention.py",),
        why="v stays in full precision",
    ),
    Mutation(
        file="src/modiff/nn/attention.py",
        old='"v": "sample"',
        new='"v": "token"',
        tests=("tests/nn/test_attention.py",),
        why="v gets a scale along the axis that is summed: no integer matmul can run it",
    ),
    Mutation(
        file="src/modiff/nn/attention.py",
        old="if output is not None and mode.calls == 0:",
        new="if False:",
        tests=("tests/nn/test_attention.py",),
        why="attention that a processor computes otherwise is silently left in full precision",
    ),
    Mutation(
        file="src/modiff/model/replay.py",
        old="            call.previous.evaluate(model)\n        call.evaluate(model)",
        new="            call.evaluate(model)\n        call.evaluate(model)",
        tests=("tests/model/test_replay.py",),
        why="modulated layers see the same input twice: every residual is zero, as in the released CIFAR code",
    ),
)
