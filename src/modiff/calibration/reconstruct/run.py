"""Learn how weights round, or static scales, unit by unit against the network in full precision."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.calibration.blocks import Block, blocks_of
from modiff.calibration.data import Call, calls_with_previous, largest_step
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
from modiff.calibration.reconstruct.job import ReconstructionJob
from modiff.calibration.reconstruct.layers import evaluating, full_precision
from modiff.calibration.reconstruct.store import digest_of, load_unit, save_unit
from modiff.core.step_sets import StepSizes
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.files import ResumableFolder
from modiff.model.attach import required_attachment
from modiff.model.calibrate import quantizers_of
from modiff.nn import ModulatedLayer
from modiff.progress import Bar


@torch.inference_mode(False)
def learn_units(
    model: nn.Module, calls: Sequence[Call], config: ReconstructConfig | None = None, *, kinds: Sequence[str] = (),
    folder: str | Path | None = None, progress: bool = True,
) -> ReconstructionReport:  # fmt: skip
    """As `modiff.reconstruct`, on one network, with the class names of blocks as in `blocks_of`.

    A unit's inputs come from the model as quantized so far, its targets from full precision (Q-Diffusion, "asym"). It
    keeps what it learned only if that lowers the loss on rows held out. Where it raises, the layers are as before.
    """
    config = config or ReconstructConfig()
    names = _learnable(model, config)
    if config.learn == "residual_scales":
        calls = calls_with_previous("reconstruct", calls)
    elif not len(calls):
        raise CalibrationError("reconstruct: expected at least one calibration call, got none. There is nothing to "
                               "learn from. Collect a whole trajectory.")  # fmt: skip
    by_kind, patterns = (kinds, config.blocks) if config.unit == "block" else ((), ())
    with evaluating(model), full_precision(model), torch.no_grad():
        blocks = blocks_of(model, kinds=by_kind, patterns=patterns, layers=names, run=lambda: calls[0].evaluate(model))
    job = ReconstructionJob(model, calls, config)
    reports = []
    units = nullcontext() if folder is None else ResumableFolder(folder, _settings(job, blocks), items="unit-*")
    with units as kept, evaluating(model), job.undone_on_error():
        for index, block in enumerate(Bar(blocks, desc="reconstruct", unit="block", shown=progress)):
            file = f"unit-{index:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', block.name)}.safetensors"
            path = None if kept is None else kept.path / file
            if path is not None and path.exists():
                learned, report = load_unit(path)
            else:
                learned, report = job.learn(block, index)
                if path is not None:
                    save_unit(path, learned, report)
            job.keep(learned)
            reports.append(report)
    if config.learn == "residual_scales":
        required_attachment(model, "reconstruct").step_sizes = StepSizes(largest_step(calls))
    return ReconstructionReport((*reports, *job.left_out(blocks)))


def _settings(job: ReconstructionJob, blocks: list[Block]) -> dict[str, Any]:
    attention = required_attachment(job.model, "reconstruct").config.attention
    network = {
        "layers": {name: [layer.config.to_dict(), layer.spec.split] for name, layer in job.layers.items()},
        "units": [[block.name, *block.layers] for block in blocks],
        "attention": None if attention is None else attention.to_dict(),
    }
    weights = (*job.model.parameters(), *job.model.buffers(), *job.present_tensors())
    calls = digest_of(None, calls=job.calls)
    return {"format_version": 1, "config": job.config.to_dict(), "network": digest_of(network, weights), "calls": calls}


def _learnable(model: nn.Module, config: ReconstructConfig) -> list[str]:
    attachment = required_attachment(model, "reconstruct")
    if attachment.in_trajectory:
        raise StateError(
            "reconstruct: expected no running trajectory, got one. Its states belong to the weights as they were. "
            "Call it after `with modiff.trajectory(model):`."
        )
    known = dict.fromkeys((*attachment.layers, *quantizers_of(model)))
    for pattern in config.exclude:  # a typing error would be learned through
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                f"ReconstructConfig.exclude: expected patterns that match a layer, got {pattern!r}. No quantized layer "
                f"has this name. Known layers: {', '.join(list(known)[:8])}, ..."
            )
    able = [name for name, quantized in attachment.layers.items() if _has_something(quantized, config)]
    names = [name for name in able if config.takes(name)]
    if not names:
        why = "All of them are excluded. Exclude fewer." if able else _NOTHING[config.learn]
        raise ConfigError(f"reconstruct: expected layers to learn, got none. {why}")
    if config.learn != "residual_scales" and config.activations == "quantized":
        for quantized in attachment.layers.values():
            _check_activation(quantized)
    return names


_NOTHING = {
    **dict.fromkeys(("weights", "weights_and_scales"), "No weight is quantized. Set WeightConfig(bits=4)."),
    "activation_scales": "Dynamic scales are measured at each call, and those of modulated layers belong to residuals. "
    "Use plain layers with QuantizerConfig(dynamic=False), or learn 'residual_scales'.",
    "residual_scales": "Dynamic scales are measured at each call, and plain layers have no residual. Use modulated "
    "layers with QuantizerConfig(dynamic=False), or learn 'activation_scales'.",
}


def _has_something(quantized: ModulatedLayer, config: ReconstructConfig) -> bool:
    if config.learns_rounding:
        return quantized.config.weight.bits is not None
    quantizer = quantized.quantizer
    static = quantizer is not None and bool(quantizer.bits) and not quantizer.config.dynamic
    if not static or (config.learn == "residual_scales") != (quantized.inputs is not None):
        return False
    loop, groups = quantized.config.modulation, quantized.config.activation.step_groups
    if loop is not None and config.learn == "residual_scales" and (loop.predictor != "hold" or groups != 1):
        got = f"predictor={loop.predictor!r}" if loop.predictor != "hold" else f"step_groups={groups}"
        raise ConfigError(
            f"{quantized.name}: expected predictor='hold' and one set of scales for all steps, got {got}. The residual "
            "is learned from two neighbouring inputs of any step. Use modiff.calibrate for this layer."
        )
    return True


def _check_activation(quantized: ModulatedLayer) -> None:
    quantizer = quantized.quantizer
    if quantizer is not None and quantizer.bits == 0:
        raise ConfigError(
            f"{quantized.name}: expected 2 to 8 activation bits, got 0. Zero bits send nothing, so there is no value "
            "to learn with. Use activations='full_precision'."
        )
    if quantizer is None or quantizer.config.dynamic or quantized.inputs is not None:
        return
    if quantizer.config.step_groups != 1:
        raise ConfigError(
            f"{quantized.name}: expected one set of scales for all steps, got "
            f"step_groups={quantizer.config.step_groups}. Rows of many steps are learned together. Learn weights with "
            "activations='full_precision', then calibrate."
        )
    if quantizer.static is None:
        raise CalibrationError(
            f"{quantized.name}: expected measured scales, got none. Its activation is quantized while learning. Call "
            "modiff.calibrate first, or learn weights with activations='full_precision'."
        )
