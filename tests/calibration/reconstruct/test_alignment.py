"""Weights of samples: closed forms on a linear layer, a toy of two groups of steps, and nothing changed at rate 0."""

import dataclasses
from itertools import combinations

import pytest
import torch
from torch import Tensor

from modiff import CalibrationError, ConfigError
from modiff.calibration.reconstruct.alignment import outer, weigh
from modiff.calibration.reconstruct.config import AlignmentConfig, ReconstructConfig
from tests.calibration.learning import applied, codes_of, learn, same_codes, weights
from tests.model.toys import toy

RATE = 0.05


class Linear:
    """Samples (x, y) of a linear layer of 2 x 3 weights, and groups of them; losses |W x - y|^2, in float64."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.theta = torch.randn(6, generator=draw, dtype=torch.float64)
        samples = [(torch.randn(3, generator=draw), torch.randn(2, generator=draw)) for _ in range(12)]
        self.samples = [(x.double(), y.double()) for x, y in samples]
        self.groups = [self.samples[6:8], self.samples[8:10], self.samples[10:]]

    @staticmethod
    def loss(theta: Tensor, samples) -> Tensor:
        return sum((theta.view(2, 3) @ x - y).square().sum() for x, y in samples) / len(samples)

    @staticmethod
    def gradient(theta: Tensor, samples) -> Tensor:
        return sum(2 * torch.outer(theta.view(2, 3) @ x - y, x) for x, y in samples).flatten() / len(samples)

    def written_out(self, om: Tensor) -> float:
        """L(om), by hand."""
        inner = [self.gradient(self.theta, [s]) for s in self.samples[:6]]
        moved = self.theta - RATE * sum(o * g for o, g in zip(om, inner, strict=True))
        values = [float(self.loss(moved, group)) for group in self.groups]
        slopes = [self.gradient(moved, group) for group in self.groups]
        by_weight = [torch.stack([-RATE * g @ slope for g in inner]) for slope in slopes]
        agreement = sum(float(a @ b) for a, b in combinations(by_weight, 2))
        return sum(values) / 3 - 2 / (3 * 2) * agreement


def test_the_outer_loss_and_its_derivative_are_those_of_finite_differences_on_a_linear_layer():
    linear = Linear()
    om = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.25, 0.05], dtype=torch.float64)
    inner = torch.stack([linear.gradient(linear.theta, [s]) for s in linear.samples[:6]])
    losses = [lambda theta, group=group: linear.loss(theta, group) for group in linear.groups]
    result = outer(om, linear.theta, inner, losses, RATE)
    assert result.loss == pytest.approx(linear.written_out(om), rel=1e-12)
    step = 1e-5
    for i in range(6):
        move = step * torch.eye(6, dtype=torch.float64)[i]
        slope = (linear.written_out(om + move) - linear.written_out(om - move)) / (2 * step)
        assert float(result.gradient[i]) == pytest.approx(slope, rel=1e-6)
    unit = torch.nn.functional.normalize(result.gradients, dim=1)
    assert result.cosine == pytest.approx(float((unit @ unit.T).triu(1).sum()) / 3, rel=1e-12)


def test_two_groups_of_opposite_targets_in_one_direction_give_the_weight_to_the_common_one():
    """Both groups want theta_0 = 1; one wants theta_1 = 1, the other -1."""
    inner = torch.tensor([[-2.0, 0.0], [-2.0, 0.0], [0.0, -2.0], [0.0, 2.0]])
    losses = [lambda theta, s=s: (theta[0] - 1).square() + (theta[1] - s).square() for s in (1.0, -1.0)]
    om, uniform, learned = weigh(torch.zeros(2), inner, losses, RATE, AlignmentConfig())
    assert torch.allclose(om.sum(), torch.tensor(1.0))
    assert om[:2].min() > 1.5 * om[2:].max()
    assert learned.loss < uniform.loss
    assert float(learned.losses.mean()) < float(uniform.losses.mean())
    assert learned.gradients[0, 0] == learned.gradients[1, 0]
    assert AlignmentConfig().outer_rate > 0
    still, *_ = weigh(torch.zeros(2), inner, losses, RATE, AlignmentConfig(outer_rate=0.0))
    assert still.tolist() == [0.25] * 4


def test_rate_0_is_reconstruction_without_weights_to_the_bit_and_learned_weights_change_it():
    outcomes = {}
    for name, alignment in (
        ("none", None), ("still", AlignmentConfig(outer_rate=0.0)), ("learned", AlignmentConfig(outer_rate=0.5)),
    ):  # fmt: skip
        model, calls = applied(toy, weights())
        outcomes[name] = codes_of(model), learn(model, calls, alignment=alignment), codes_of(model)
    (_, plain, codes), (_, still, same), (_, aligned, others) = outcomes.values()
    assert same_codes(codes, same)
    assert not same_codes(codes, others)
    assert [dataclasses.replace(u, figures={}) for u in still.units] == [
        dataclasses.replace(u, figures={}) for u in plain.units
    ]
    for unit, moved in zip(still.units, aligned.units, strict=True):
        assert unit.figures["validation_uniform"] == unit.figures["validation_learned"] > 0
        assert unit.figures["cosine_uniform"] == unit.figures["cosine_learned"]
        assert moved.figures["validation_uniform"] == pytest.approx(unit.figures["validation_uniform"], rel=0.5)
        assert moved.figures["validation_learned"] < 1.001 * moved.figures["validation_uniform"] < 1.001
        assert "cosine_learned" in str(aligned)
    assert plain.units[0].figures.keys() == {"undecided", "soft"}


def test_rows_of_one_group_of_steps_and_settings_that_mean_nothing_are_refused():
    model, calls = applied(toy, weights())
    with pytest.raises(
        CalibrationError, match="alignment: expected held-out rows of at least 2 groups of steps, got 1"
    ):
        learn(model, calls[:1], alignment=AlignmentConfig())
    for changes, message in (
        ({"groups": 1}, "AlignmentConfig.groups: expected 2 or more, got 1"),
        ({"validation": 1.0}, r"AlignmentConfig.validation: expected a share in \(0, 1\), got 1.0"),
        ({"temperature": 0.0}, "AlignmentConfig.temperature: expected more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AlignmentConfig(**changes)
    with pytest.raises(ConfigError, match="alignment: expected None unless weights alone are learned"):
        ReconstructConfig(alignment=AlignmentConfig(), activations="quantized")
