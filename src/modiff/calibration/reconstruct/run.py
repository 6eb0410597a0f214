"""Learn how weights round, or how wide static steps are, unit by unit against the network in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from modiff.calibration.blocks import Block, blocks_of
from modiff.calibration.data import Call, LazyCalls
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.reconstruct.job import Job
from modiff.calibration.reconstruct.layers import evaluating, full_precision
from modiff.calibration.reconstruct.report import ReconstructionReport
from modiff.calibration.reconstruct.store import UnitStore, digest_of
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.model.attach import required_attachment
from modiff.model.calibrate import quantizers_of
from modiff.nn import ModulatedLayer


@torch.inference_mode(False)
def learn_units(
    model: nn.Module,
    calls: Sequence[Call],
    config: ReconstructConfig | None = None,
    *,
    kinds: Sequence[str] = (),
    folder: str | Path | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Learn the rounding of weights (AdaRound), or static steps, unit by unit, and fix what is better into the layers.

    A unit's inputs come from the model as quantized so far, its targets from full precision (Q-Diffusion, "asym").
    It keeps what it learned only if that lowers the loss on rows held out; otherwise it stays as it was.

    Args:
        model: with modulated or plain quantized layers.
        calls: a calibration set; with the call before each, for residual steps.
        config: Q-Diffusion's settings for weights when None.
        kinds: class names of blocks, as in `blocks_of`; `modiff.reconstruct` knows those of diffusers.
        folder: keeps each finished unit; the same call goes on after the last one there.
        progress: show a bar.
    Returns: each unit with its loss before and after.
    Raises: StateError without modulated layers, inside a trajectory, or with packed weights; ConfigError or
        CalibrationError for what cannot be learned; FormatError for a folder of another reconstruction.
    Cost: for each unit, two runs of the network up to it for each call, then `config.iterations` passes of the unit.
        In memory: inputs and targets of one unit.

    When it raises or is interrupted, the layers are as they were before; what was finished is in `folder`.
    """
    config = config or ReconstructConfig()
    names = _learnable(model, config)
    calls = _usable(calls, config)
    blocks = _blocks(model, calls, config, kinds, names)
    job = Job(model, calls, config)
    store = UnitStore(folder, "" if folder is None else _digest(model, calls, config, blocks, job))
    reports = []
    with evaluating(model), job.undone_on_error():
        for index, block in enumerate(tqdm(blocks, desc="reconstruct", unit="block", disable=not progress)):
            stored = store.load(index, block.name)
            if stored is None:
                stored = job.learn(block, index)
                store.save(index, *stored)
            found, report = stored
            job.keep(found)
            reports.append(report)
    return ReconstructionReport((*reports, *job.left_out(blocks)))


def _digest(model: nn.Module, calls: Sequence[Call], config: ReconstructConfig, blocks: list[Block], job: Job) -> str:
    """Of everything that decides what is learned: settings, layers, units, weights, present scales, and calls."""
    attention = required_attachment(model, "reconstruct").config.attention
    settings = {
        "config": config.to_dict(),
        "layers": {name: [quantized.config.to_dict(), quantized.split] for name, quantized in job.layers.items()},
        "units": [[block.name, *block.layers] for block in blocks],
        "attention": None if attention is None else attention.to_dict(),
    }
    return digest_of(settings, (*model.parameters(), *model.buffers(), *job.present_tensors()), calls)


def _blocks(
    model: nn.Module, calls: Sequence[Call], config: ReconstructConfig, kinds: Sequence[str], names: list[str]
) -> list[Block]:
    """The units in the order in which the first call runs them."""
    kinds, patterns = (kinds, config.blocks) if config.unit == "block" else ((), ())
    with evaluating(model), full_precision(model), torch.no_grad():
        return blocks_of(model, kinds=kinds, patterns=patterns, layers=names, run=lambda: calls[0].evaluate(model))


def _usable(calls: Sequence[Call], config: ReconstructConfig) -> Sequence[Call]:
    """The calls to learn from. Raises: CalibrationError if there are none."""
    if config.learn == "residual_steps":
        pairs = [i for i in range(len(calls)) if calls[i].previous is not None]
        if not pairs:
            raise CalibrationError(
                f"reconstruct: expected calls with the one before each, got none among {len(calls)}. A residual is "
                "the change between two steps. Collect with pairs=True."
            )
        return calls if len(pairs) == len(calls) else LazyCalls(pairs, calls.__getitem__)
    if not len(calls):
        raise CalibrationError(
            "reconstruct: expected at least one calibration call, got none. There is nothing to learn from. Collect "
            "a whole trajectory."
        )
    return calls


def _learnable(model: nn.Module, config: ReconstructConfig) -> list[str]:
    """The layers that have something to learn.

    Raises: StateError inside a trajectory; ConfigError or CalibrationError, with the reason, where nothing can be.
    """
    attachment = required_attachment(model, "reconstruct")
    if attachment.clock.active:
        raise StateError(
            "reconstruct: expected no running trajectory, got one. Its states belong to the weights as they were. "
            "Call it after `with modiff.trajectory(model):`."
        )
    _check_exclude(model, config)
    taken = [name for name, quantized in attachment.layers.items() if _has_something(quantized, config)]
    names = [name for name in taken if config.takes(name)]
    if not names:
        why = "All of them are excluded. Exclude fewer." if taken else _NOTHING[config.learn]
        raise ConfigError(f"reconstruct: expected layers to learn, got none. {why}")
    if config.learn != "residual_steps" and config.activations == "quantized":
        for quantized in attachment.layers.values():
            _check_codes(quantized)
    return names


def _check_exclude(model: nn.Module, config: ReconstructConfig) -> None:
    """Raises: ConfigError for a pattern that no layer has; a typing error would be learned through."""
    known = dict.fromkeys((*required_attachment(model, "reconstruct").layers, *quantizers_of(model)))
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                f"ReconstructConfig.exclude: expected patterns that match a layer, got {pattern!r}. No quantized layer "
                f"has this name. Known layers: {', '.join(list(known)[:8])}, ..."
            )


_NOTHING = {
    "weights": "No weight is quantized. Set WeightConfig(bits=4).",
    "activation_steps": "Dynamic scales are measured at each call, and those of modulated layers belong to residuals. "
    "Use plain layers with QuantizerConfig(dynamic=False), or learn 'residual_steps'.",
    "residual_steps": "Dynamic scales are measured at each call, and plain layers have no residual. Use modulated "
    "layers with QuantizerConfig(dynamic=False), or learn 'activation_steps'.",
}


def _has_something(quantized: ModulatedLayer, config: ReconstructConfig) -> bool:
    """Whether a layer has what is to be learned. Raises: ConfigError for residual steps that two inputs do not make."""
    if config.learn == "weights":
        return quantized.config.weight.bits is not None
    static = (
        quantized.quantizer is not None and bool(quantized.quantizer.bits) and not quantized.quantizer.config.dynamic
    )
    if config.learn == "activation_steps" or not static or quantized.inputs is None:
        return static and config.learn == "activation_steps" and quantized.inputs is None
    modulation = quantized.inputs.config
    if modulation.predictor != "hold" or quantized.config.activation.step_groups != 1:
        found = "predictor='linear'" if modulation.predictor != "hold" else "step_groups other than 1"
        raise ConfigError(
            f"{quantized.name}: expected predictor='hold' and one set of scales for all steps, got {found}. The "
            f"residual "
            "is learned from two neighbouring inputs of any step. Use modiff.calibrate for this layer."
        )
    return True


def _check_codes(quantized: ModulatedLayer) -> None:
    """Raises: ConfigError or CalibrationError if a layer's activation cannot be coded from nothing."""
    quantizer = quantized.quantizer
    if quantizer is None:
        return
    if quantizer.bits == 0:
        raise ConfigError(
            f"{quantized.name}: expected 2 to 8 activation bits, got 0. Zero bits send nothing, so there is no "
            f"value to "
            "learn with. Use activations='full_precision'."
        )
    if quantizer.config.dynamic or quantized.inputs is not None:
        return
    if quantizer.config.step_groups != 1:
        raise ConfigError(
            f"{quantized.name}: expected one set of scales for all steps, got "
            f"step_groups={quantizer.config.step_groups}. Rows "
            "of many steps are learned together. Learn weights with activations='full_precision', then calibrate."
        )
    if quantizer.static is None:
        raise CalibrationError(
            f"{quantized.name}: expected measured scales, got none. Its activation is quantized while learning. Call "
            "modiff.calibrate first, or learn weights with activations='full_precision'."
        )
