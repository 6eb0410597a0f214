"""The activation quantizers of a model, and how their static scales are measured."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from modiff.core.observers import (
    RANGE_METRICS,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
    RangeSearchObserver,
)
from modiff.core.quantizer import Quantizer
from modiff.core.step_sets import StepSizes
from modiff.errors import CalibrationError, ConfigError
from modiff.model.apply import leave_unfit
from modiff.model.attach import Attachment, eager, required_attachment, sample_of
from modiff.model.attention import attention_quantizers
from modiff.model.roles import warn_unfit
from modiff.nn import Clock

ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "l1", "cosine", "kl"]
MakeObserver = Callable[[int | None], Observer]
"""Makes an observer for one scale (None), or for one scale for each index of an axis."""
OBSERVERS: dict[str, MakeObserver] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    **{name: functools.partial(RangeSearchObserver, metric=metric) for name, metric in RANGE_METRICS.items()},
}


def quantizers_of(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizer of each layer under the layer's name, those of attention under "<module>.q" and so on."""
    layers = required_attachment(model, "quantizers_of").layers
    own = {name: layer.quantizer for name, layer in layers.items() if layer.quantizer is not None}
    return own | attention_quantizers(model)


def measure_scales(
    models: nn.Module | Sequence[nn.Module],
    forward_loop: Callable[[], object],
    *,
    observer: ObserverName | MakeObserver = "minmax",
) -> None:
    """Run `forward_loop` with dynamic scales, watch what each layer codes, and freeze them, as `modiff.calibrate`.

    Each is watched on exactly what it will code; with `step_groups`, each step of the loop alone.
    Raises: CalibrationError if no layer has static scales, none ran, or a value is not finite; scales measured before
        are then kept.
    """
    if isinstance(observer, str) and observer not in OBSERVERS:
        raise ConfigError(f"observer: expected one of {', '.join(OBSERVERS)}, got {observer!r}. Pick one of them.")
    make: MakeObserver = OBSERVERS[observer] if isinstance(observer, str) else observer
    models = [models] if isinstance(models, nn.Module) else models
    attachments = {model: required_attachment(model, "calibrate") for model in models}
    step_sizes = {a: a.step_sizes for a in attachments.values() if _has_residual_scales(a)}
    named = [(name, q, a.clock) for model, a in attachments.items() for name, q in quantizers_of(model).items()]
    quantizers = [each for each in named if not each[1].config.dynamic and each[1].bits]
    if not quantizers:
        raise CalibrationError(
            "calibrate: expected layers with static scales, got none. Dynamic scales need no calibration. "
            "Set QuantizerConfig(dynamic=False)."
        )
    for attachment in step_sizes:
        attachment.step_sizes = StepSizes(measuring=True)
    for layer in (layer for attachment in attachments.values() for layer in attachment.layers.values()):
        if layer.quantizer is not None:
            layer.quantizer.weight_noise = layer.operator.weight_noise()
    hooks = [eager(m).register_forward_pre_hook(_Kept(a.clock), with_kwargs=True) for m, a in attachments.items()]
    for name, quantizer, clock in quantizers:
        quantizer.watch(functools.partial(_finite, make, quantizer.observed_dim, name, clock))
    try:
        forward_loop()
        silent = {name: "no coded step" for name, quantizer, _ in quantizers if quantizer.saw_nothing}
        if len(silent) == len(quantizers):
            raise CalibrationError(
                f"{quantizers[0][0]}: expected inputs while calibrating, got none. The forward loop never reached a "
                "coded step of any layer. Run whole trajectories."
            )
        warn_unfit("calibrate", silent, "They keep the scales that they had. Exclude them, or run whole trajectories.")
        # embeddings read one row a sample: the whole image shares their error from step to step, which adds up
        images = {id(clock) for _, quantizer, clock in quantizers if not quantizer.reads_one_row}
        for _, quantizer, clock in quantizers:
            if not quantizer.saw_nothing:
                quantizer.freeze(residuals=quantizer.reads_one_row and id(clock) in images)
        for model in models:
            leave_unfit(model, "calibrate")
        step_sizes = {attachment: StepSizes(attachment.step_sizes.largest) for attachment in step_sizes}
    finally:
        for attachment, sizes in step_sizes.items():
            attachment.step_sizes = sizes
        for hook in hooks:
            hook.remove()
        for _, quantizer, _ in quantizers:
            quantizer.unwatch()


class _Kept:
    """Tells the clock how much of the last sample, and so of its errors, is in this one: their correlation.

    Next to 1 for samplers that add no noise; those that add much forget what rounding did to the sample.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.before = clock, dict[str, Tensor]()

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = sample_of(args, kwargs)
        if sample is None or torch.compiler.is_compiling():
            return
        now = sample.detach().flatten(1).float()
        now, before = now - now.mean(1, keepdim=True), self.before.get(self.clock.context)
        self.before[self.clock.context] = now
        if before is not None and before.shape == now.shape:
            self.clock.kept = float(cosine_similarity(now, before).mean().clamp(0, 1))


def _finite(make: MakeObserver, axis: int | None, name: str, clock: Clock) -> Observer:
    """An observer that looks at each tensor first: a scale of NaN would spoil every image, and be saved."""
    observer = make(axis)
    observe = observer.observe

    def checked(x: Tensor) -> None:
        if not x.isfinite().all():
            when = f"at step {clock.step}" if clock.active else "outside of a trajectory"
            raise CalibrationError(
                f"{name}: expected finite values while calibrating, got NaN or infinity {when}. Scales measured before "
                "are kept. Use float32 or bfloat16, or exclude the layer."
            )
        observe(x)

    observer.observe = checked
    return observer


def _has_residual_scales(attachment: Attachment) -> bool:
    configs = [layer.config for layer in attachment.layers.values() if layer.config.modulation is not None]
    return any(c.activation.bits and not c.activation.dynamic and c.activation.step_groups == 1 for c in configs)
