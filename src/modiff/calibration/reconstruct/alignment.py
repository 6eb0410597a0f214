"""How much each calibration sample counts: weights for which the steps' gradients agree (Gradient-Aligned Calibration).

    theta*  = theta - lr sum_i om_i g_i,   om = softmax(s / tau),   g_i = d MSE_i / d theta
    L(om)   = mean_t MSE_t(theta*) - 2 / (T (T - 1)) sum_{t<k} <a_t, a_k>,   (a_t)_i = d MSE_t(theta*) / d om_i

for T groups of steps with rows of their own. As (a_t)_i = -lr g_i . G_t with G_t = d MSE_t / d theta at theta*, the
last term is the inner product of the G_t in the metric of the g_i, and its derivative needs one product with a Hessian
for each group. The paper's text and code are not public: theta (the unit's weights as they round to nearest), losses as
shares of their mean before the step, the length of the step and the outer rate are choices made here.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modiff.calibration.reconstruct.config import AlignmentConfig, ReconstructConfig
from modiff.calibration.reconstruct.layers import Trainee
from modiff.calibration.reconstruct.learn import Run, unit_loss
from modiff.calibration.reconstruct.samples import Sample, UnitData
from modiff.errors import CalibrationError
from modiff.nn.weight import dense

Loss = Callable[[Tensor], Tensor]
"""A scalar of the flat weights (P,), twice differentiable."""


class Outer(NamedTuple):
    """At theta*: the outer loss and its derivative by the weights (M,), each group's loss (T,) and gradient (T, P)."""

    loss: float
    gradient: Tensor
    losses: Tensor
    gradients: Tensor

    @property
    def cosine(self) -> float:
        """The mean cosine between the gradients of two groups."""
        pairs = combinations(torch.nn.functional.normalize(self.gradients, dim=1), 2)
        return float(torch.stack([a @ b for a, b in pairs]).mean())


def outer(weights: Tensor, theta: Tensor, inner: Tensor, losses: Sequence[Loss], rate: float) -> Outer:
    """L(om) and dL / d om.

    Args:
        weights: om (M,). theta: (P,). inner: g (M, P). losses: of the T groups. rate: lr.
    Cost: per group two gradients and a product with the Hessian; memory of M + T weights.
    """
    moved = (theta - rate * weights @ inner).requires_grad_()
    values, gradients = [], []
    for loss in losses:
        value = loss(moved)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, moved)[0])
    told, groups = torch.stack(gradients), len(losses)
    by_weight = -rate * inner @ told.T  # (M, T): a_t
    pairs = 2 / (groups * (groups - 1))
    agreement = (by_weight.sum(1).square().sum() - by_weight.square().sum()) / 2
    curved = torch.zeros_like(theta)
    for loss, others in zip(losses, (by_weight.sum(1, keepdim=True) - by_weight).T, strict=True):
        (slope,) = torch.autograd.grad(loss(moved), moved, create_graph=True)
        curved += torch.autograd.grad(slope, moved, others @ inner)[0]
    gradient = by_weight.mean(1) - pairs * rate**2 * inner @ curved
    return Outer(float(torch.stack(values).mean() - pairs * agreement), gradient, torch.stack(values), told)


def weigh(
    theta: Tensor, inner: Tensor, losses: Sequence[Loss], rate: float, config: AlignmentConfig
) -> tuple[Tensor, Outer, Outer]:
    """om (M,) by Adam on s, and the outer problem at uniform and at these weights."""
    logits = torch.full((len(inner),), 1 / 32, device=theta.device, dtype=theta.dtype)
    optimizer = torch.optim.Adam([logits], lr=config.outer_rate)

    def shares() -> Tensor:
        return (logits / config.temperature).softmax(0)

    uniform = learned = outer(shares(), theta, inner, losses, rate)
    for _ in range(config.outer_steps if config.outer_rate else 0):
        om = shares()
        logits.grad = om * (learned.gradient - om @ learned.gradient) / config.temperature
        optimizer.step()
        learned = outer(shares(), theta, inner, losses, rate)
    return shares(), uniform, learned


def weigh_samples(
    data: UnitData, run: Run, trainees: Mapping[str, Trainee], config: ReconstructConfig, settings: AlignmentConfig
) -> dict[str, float]:
    """Weigh the training samples of a unit, mean 1. Returns: figures of its report.

    Raises: CalibrationError if the rows held out are of one group of steps.
    Cost: a backward pass of all training rows, and `outer_steps` + 1 times three of the validation rows.
    """
    shapes = {name: trainee.quantized.weight_shape for name, trainee in trainees.items()}
    layers = [trainee.quantized for trainee in trainees.values()]
    rounded = [dense(each.quantized_weight.codes(each.weight), torch.float32).flatten() for each in layers]
    theta = torch.cat(rounded)
    exact = torch.cat([each.quantized_weight.floats(each.weight).flatten() for each in layers]).to(theta)

    def loss_of(samples: Sequence[Sample], scale: float = 1.0) -> Loss:
        batches = list(data.batches(samples, config.batch))
        rows = scale * sum(batch.rows for batch in batches)

        def loss(flat: Tensor) -> Tensor:
            sizes = [values.numel() for values in rounded]
            for (name, shape), values in zip(shapes.items(), flat.split(sizes), strict=True):
                trainees[name].values = values.view(shape)
            return torch.stack([unit_loss(run, batch, config.p) * batch.rows for batch in batches]).sum() / rows

        return loss

    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # other kernels have no second derivative
            point = theta.clone().requires_grad_()
            units = _neighbours(data.training, settings.samples)
            inner = torch.stack([torch.autograd.grad(loss_of(unit)(point), point)[0] for unit in units])
            validation = _validation(data, settings)
            level = float(torch.stack([loss_of(group)(theta).detach() for group in validation]).mean())
            length, step = float((theta - exact).norm()), float(inner.mean(0).norm())
            if min(level, length, step) == 0:  # rounding costs nothing here: nothing to weigh
                return {}
            losses = [loss_of(group, level) for group in validation]
            rate = level * min(settings.inner_rate * level / step**2, 0.1 * length / step)
            om, *ends = weigh(theta, inner / level, losses, rate, settings)
    finally:
        for trainee in trainees.values():
            trainee.values = None
    weights = om / om.max()  # equal ones are 1 to the bit
    weights = weights / weights.mean()
    weight = {id(s): float(w) for w, unit in zip(weights, units, strict=True) for s in unit}
    data.training = [s._replace(weight=weight[id(s)]) for s in data.training]
    names = ("uniform", "learned")
    return {f"validation_{n}": float(end.losses.mean()) for n, end in zip(names, ends, strict=True)} | {
        f"cosine_{n}": end.cosine for n, end in zip(names, ends, strict=True)
    }


def _neighbours(samples: Sequence[Sample], most: int) -> list[list[Sample]]:
    ordered = sorted(samples, key=lambda sample: sample.call.step)
    count = min(most, len(ordered))
    return [ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count] for i in range(count)]


def _validation(data: UnitData, settings: AlignmentConfig) -> list[list[Sample]]:
    everything = [*data.held, *data.training]
    steps = 1 + max(sample.call.step for sample in everything)
    each = max(1, round(settings.validation * len(everything) / settings.groups))
    groups = [[s for s in data.held if s.call.step * settings.groups // steps == t] for t in range(settings.groups)]
    kept = [group[:each] for group in groups if group]
    if len(kept) < 2:
        raise CalibrationError(
            f"alignment: expected held-out rows of at least 2 groups of steps, got {len(kept)} of {len(data.held)} "
            "rows. The gradients of different steps are to agree. Collect more steps or samples."
        )
    return kept
