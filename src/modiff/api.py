"""The public verbs, on a pipeline or on any module."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.calibration.collect import record_calls
from modiff.calibration.data import CalibrationSet, Call
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
from modiff.calibration.reconstruct.layers import full_precision
from modiff.calibration.reconstruct.run import learn_units
from modiff.calibration.timesteps import StepSampler
from modiff.config import VERSION, ModiffConfig, PackedAnchors, check
from modiff.files import bytes_of
from modiff.hosts.host import host_of, is_attached, modulated_networks, network_named, networks_of, trajectories
from modiff.hosts.load import load_target
from modiff.kernels.native import cache_folder
from modiff.model.accelerate.loops import Trials, call_of
from modiff.model.accelerate.search import TRAJECTORIES, AccelerateResult, accelerate_networks
from modiff.model.apply import check_removable, install, uninstall
from modiff.model.attach import check_searchable, required_attachment
from modiff.model.autotune import AutotuneResult, choose_modes, if_writable, stored_profile
from modiff.model.calibrate import MakeObserver, ObserverName, measure_scales
from modiff.model.pack import check_anchors, check_packable, pack_layers
from modiff.model.probe import errors_if_plain, fitted_to_run
from modiff.model.report import Report
from modiff.model.select import layer_names, select_layers
from modiff.model.trajectory import model_context, plain_to_fit, warn_of_states
from modiff.model.tune import search_config, with_bits
from modiff.presets import AnyConfig, as_config
from modiff.progress import Bar


def apply(
    target: Any, config: AnyConfig | None = None, *, state_memory: int | str | None = None,
    run: Callable[[], object] | None = None,
) -> Report:  # fmt: skip
    """Modulate a pipeline's denoisers, or a module, in place; `remove` undoes it bit for bit.

    Every call of a pipeline is a trajectory from now on; a module alone runs inside `with modiff.trajectory(module):`.
    `save_pretrained` of diffusers writes packed integers; the floats stay in memory.

    Args:
        config: from `modiff.presets`, by name ("w8a4", "modulated:8:4", a JSON file), or a dictionary; W8A8 when None.
        state_memory: what the states of one generation of the usual size may take, in bytes or as "4GiB". Those
            layers keep states that would cost most error without, a byte; the others run plain at 8 bits.
        run: runs one trajectory; small images do. Layers that run first or last, read one row a sample or never run are
            then told by what runs, not by names and the source of `forward`. Input channels that dwarf the others of
            their layer get scales of their own, or the layer keeps its floats where that is not enough. With
            `state_memory` errors are measured, too: the network is evaluated once more for each layer. Otherwise all
            layers count alike there, so that the smallest states are kept.
    Returns: each layer taken or left, and why.
    Raises: StateError if modiff is on it already; ConfigError if no layer is taken, or for a budget where the host does
        not know the size of a generation. Nothing is changed then. Warns of states that exceed the memory that is free.
    """
    host, settings = host_of(target), as_config(config)
    networks = host.networks(target)
    known = layer_names(networks.values())
    reasons: dict[str, str] = {}
    if run is not None:
        settings, reasons = fitted_to_run({n: host.splits(n) for n in networks.values()}, settings, run)
    if state_memory is not None:
        selected = {n: select_layers(n, settings, splits=host.splits(n), known=known) for n in networks.values()}
        budget = bytes_of(state_memory, "state_memory")
        errors = {} if run is None else errors_if_plain({n: host.splits(n) for n in selected}, settings, run)
        plain = plain_to_fit(selected, budget, target, errors, share=settings.share_residuals == "auto")
        settings = replace(settings, overrides=(*settings.overrides, *((escape(n), c) for n, c in plain.items())))
        reasons |= dict.fromkeys(plain, f"plain: its states do not fit into state_memory={state_memory!r}")
    report = Report(())
    with ExitStack() as undo:
        for network in networks.values():
            splits = host.splits(network)
            report += install(network, settings, splits=splits, known=known, reasons=reasons, target=target)
            undo.callback(uninstall, network)
        undo.callback(host.detach, target)
        host.attach(target)
        undo.pop_all()
    warn_of_states(list(networks.values()), report)
    return report


def report(target: Any) -> Report:
    """What `apply` or `load` made of each layer, how it runs now, on which backend and why, and its memory.

    Raises: StateError without modulated layers.
    """
    attachments = [required_attachment(network, "report") for network in modulated_networks(target, "report")]
    return sum((attachment.report for attachment in attachments), Report(()))


def select(target: Any, config: AnyConfig) -> Report:
    """Which layers of a target the config takes, and why others are left, without changing anything.

    Raises: ConfigError for a pattern that matches no layer, a damaged weight, or nothing left to take.
    """
    host, settings = host_of(target), as_config(config)
    networks = host.networks(target).values()
    known = layer_names(networks)
    reports = (select_layers(n, settings, splits=host.splits(n), known=known) for n in networks)
    return sum(reports, Report(()))


def remove(target: Any) -> None:
    """Undo `apply`: the same modules, parameters and bits as before.

    Raises: StateError if there is nothing to undo, or no way back: after `pack` or `load`, or if layers were wrapped.
    """
    host = host_of(target)
    networks = host.networks(target).values()
    for network in networks:
        check_removable(network)
    for network in networks:
        uninstall(network)
    host.detach(target)


def pack(target: Any, *, anchor_weights: PackedAnchors = "quantized") -> Report:
    """Keep integer codes and float32 scales instead of float weights: half a byte a weight at 4 bits or fewer.

    Anchors lose the exact weights too, so outputs change; with quantized anchors they stay the same bits. There is no
    way back: `remove` is refused afterwards. diffusers then treats its models as quantized: `.half()` is refused.

    Args:
        anchor_weights: "int8" keeps 8-bit codes of what rounding took from the weights, a byte more each, for anchors.
    Returns: the report of the layers, which says what each anchors with now.
    Raises: StateError without modulated layers, inside a trajectory, if weights changed after their rounding was
        learned, or for "int8" without floats; ConfigError for "int8" without exact anchors. Nothing is changed then.
    """
    networks = modulated_networks(target, "pack")
    for network in networks:
        check_packable(network, anchor_weights)
    for network in networks:
        pack_layers(network, anchor_weights)
        host_of(network).packed(network)
    return report(target)


def save(
    target: Any, folder: str | Path, *, max_shard_size: int | str = "5GB", anchor_weights: PackedAnchors = "quantized"
) -> None:
    """Write a modulated pipeline or module as plain safetensors and JSON: packed weights, float32 scales, settings.

    The target is not changed and needs no `pack`. A pipeline or a model of diffusers is written as diffusers writes it,
    so its `from_pretrained` reads the folder too; other modules as config.json and model.safetensors.

    Args:
        folder: new or empty; it appears when all of it is on disk.
        max_shard_size: bytes, or a text such as "200MB"; larger weights go to several files.
        anchor_weights: what is kept of float weights, as `pack` has it; packed layers are written as they are.
    Raises: StateError without modulated layers, or with a LoRA loaded; FormatError for a folder with files; PathError.
    """
    networks = modulated_networks(target, "save")
    for network in networks:
        check_anchors(network, "save", anchor_weights)
    host_of(target).save(target, networks, folder, bytes_of(max_shard_size), anchor_weights)


def load(
    folder: str | Path, *, into: nn.Module | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Read what `save` wrote: the same codes and scales, the outputs of the packed model bit for bit.

    Args:
        into: for modules that are not of diffusers: one of the saved class, in full precision, changed in place.
        device: "cpu", "cuda" or "cuda:1".
        dtype: of what is not quantized, for pipelines and models of diffusers; scales stay float32.
    Returns: a pipeline (each call is a trajectory), a model of diffusers (begins trajectories by its time steps), or
        `into` (runs inside `modiff.trajectory`); packed.
    Raises: FormatError for a damaged folder, before anything large is allocated; ConfigError for a wrong `into`.
    """
    check("load.dtype", dtype, isinstance(dtype, torch.dtype), "a torch dtype", "Use torch.bfloat16.")
    return load_target(folder, into, device, dtype)


def trajectory(target: Any) -> AbstractContextManager[None]:
    """One generation of your own loop: states start empty and are freed at the end, also when the body raises.

    Raises: StateError without modulated layers, or inside another trajectory of the same model.
    """
    modulated_networks(target, "trajectory")
    return trajectories(networks_of(target))


def context(module: nn.Module, name: str) -> AbstractContextManager[None]:
    """Evaluations in the body have states of their own, e.g. "cond" and "uncond" of guidance in two calls.

    The name alone tells them apart, so whatever the network is given may change from step to step.
    """
    return model_context(module, name, names_tell=True)


def calibrate(
    target: Any, forward_loop: Callable[[], object], *, observer: ObserverName | MakeObserver = "minmax"
) -> None:
    """Measure the scales of layers with `dynamic=False` on what `forward_loop` runs, and freeze them.

    Args:
        forward_loop: runs whole trajectories, for example `lambda: pipe(...)`.
        observer: how values become a range: "minmax", "moving_average", "percentile", "mse", "l1", "cosine", "kl", or
            what makes an observer for an axis, `lambda axis: MSEObserver(axis, trials=100)`.
    Raises: StateError; ConfigError for an unknown observer; CalibrationError without static scales or runs of a layer.
    """
    measure_scales(modulated_networks(target, "calibrate"), forward_loop, observer=observer)


def tune(
    target: Any,
    bits: int,
    *,
    config: AnyConfig | None = None,
    weight_bits: int | None = 8,
    steps: int = 50,
    num_images: int = 4,
    seed: int = 0,
    run: Callable[[], object] | None = None,
) -> ModiffConfig:
    """Clip ratio, predictor, gain and rotation for a model at `bits` activation bits, from a few short trajectories.

    Args:
        config: selection and other settings to keep; its bit widths are replaced.
        steps, num_images, seed: of the trajectory of an unconditional pipeline; use the steps you will sample with.
        run: runs one trajectory; needed for anything but an unconditional pipeline.
    Returns: a config for `modiff.apply`. The target is not changed.
    Raises: ConfigError if `run` is needed and missing; StateError if modiff is on the target already.
    Cost: a full-precision trajectory with a pass over each input per candidate, then a few modulated trajectories.
    """
    host, base = host_of(target), with_bits(as_config(config), weight_bits, bits)
    networks = list(host.networks(target).values())
    run = run or partial(host.run(target, steps=steps, batch=num_images, seed=seed), 0)
    splits = [host.splits(network) for network in networks]
    with host.contexts(*networks):
        return search_config(networks, run, base, splits=splits)


def autotune(
    target: Any,
    config: AnyConfig | None = None,
    *,
    tolerance: float = 0.01,
    steps: int = 10,
    num_images: int = 1,
    seed: int = 0,
    run: Callable[[], object] | None = None,
    profile: str | Path | None = None,
) -> AutotuneResult:
    """For each layer the fastest of floats, plain integers and modulated integers that is exact enough.

    Args:
        config: bits and selection, modulated, without overrides; W8A8 when None.
        tolerance: the largest relative error that quantizing the input of a layer may make.
        steps, num_images, seed, run: as in `tune`; use the batch you will sample with.
        profile: JSON file of the times of layers, by machine; what it lacks is measured and added.
    Returns: the choice of each layer with its reason, and a config for `modiff.apply`. The target is not changed.
    Raises: ConfigError if `run` is needed; StateError if modiff is on the target; FormatError for a damaged profile.
    Cost: a full-precision trajectory, and some twenty calls of each kind of layer that the profile lacks.
    """
    host, settings = host_of(target), as_config(config)
    networks = list(host.networks(target).values())
    run = run or partial(host.run(target, steps=steps, batch=num_images, seed=seed), 0)
    splits = [host.splits(network) for network in networks]
    with stored_profile(profile) as times, host.contexts(*networks):
        return choose_modes(networks, run, settings, tolerance=tolerance, profile=times, splits=splits)


def accelerate(
    target: Any,
    max_error: float = 0.02,
    example: Callable[[], object] | Mapping[str, Any] | None = None,
    compile: bool = True,
    *,
    state_memory: int | str | None = None,
    steps: int = 50,
    num_images: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> AccelerateResult:
    """Make a pipeline or a module faster on this machine, within an error that is measured on whole trajectories.

    Each kind of layer is timed in floats, plain and modulated integers of 8, 6, 5, 4 and 3 bits; times are kept in the
    cache folder. The fastest settings within the error are compiled and run against compiled floats: they stay on the
    target where they win, otherwise it is as it was, and the result says why. `remove` undoes it.

    Args:
        max_error: relative L2 of what the example makes to full precision, ||ours - exact|| / ||exact||.
        example: runs one trajectory as you will sample: the same batch and number of steps, and always the same noise.
            Or the arguments of a pipeline's call. An unconditional pipeline needs none.
        compile: with torch.compile, backend "modiff", for the shapes of the example; others compile again. Weights of
            layers in floats are frozen: remove modiff before you change them.
        state_memory: what states may take, in bytes or as "4GiB"; layers that gain most by each byte keep them.
        steps, num_images, seed: of the example of an unconditional pipeline.
    Raises: ConfigError for an example that is needed, or a target that is compiled; StateError if modiff is on it.
    Cost: a dozen trajectories, twenty calls of each kind of layer in each setting, two compilations.
    """
    known = isinstance(max_error, (int, float)) and 0 < max_error < 1
    check("accelerate.max_error", max_error, known, "a relative error between 0 and 1", "0.02 is 2 percent.")
    host, budget = host_of(target), None if state_memory is None else bytes_of(state_memory, "state_memory")
    networks = host.networks(target)
    base = ModiffConfig().on_integers()
    check_searchable(list(networks.values()), base, "accelerate")
    if example is None:
        example = partial(host.run(target, steps=steps, batch=num_images, seed=seed), 0)
    elif not callable(example):
        example = call_of(target, "" if isinstance(target, nn.Module) else host.generation or "", example)
    with (
        stored_profile(if_writable(cache_folder() / f"times-{VERSION}.json")) as times,
        Bar(total=TRAJECTORIES, shown=progress) as bar,
    ):
        trials = Trials(
            list(networks.values()), example, partial(apply, target), partial(remove, target),
            within=lambda: nullcontext() if is_attached(target) else trajectories(networks),
            contexts=lambda: host.contexts(*networks.values()),
            splits=[host.splits(network) for network in networks.values()], bar=bar,
        )  # fmt: skip
        result = accelerate_networks(trials, base, max_error=max_error, compile=compile, budget=budget, times=times)
        bar.total = bar.n  # not all of them were needed
        return result


def collect(
    target: Any,
    run: Callable[[int], object],
    *,
    component: str | None = None,
    trajectories: int = 1,
    batch: int | None = None,
    steps: int | None = None,
    sampler: StepSampler | None = None,
    pairs: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    memory_mib: float = 1024.0,
    progress: bool = True,
) -> CalibrationSet:
    """Run trajectories and keep what the sampler chooses of the denoiser's inputs, full-precision or quantized.

    Args:
        run: `run(i)` generates with the seeds of trajectory i. component: which denoiser, for pipelines with several.
        batch: images in a run; the sampler then chooses among them, and only their rows are kept.
        steps: evaluations in a run (in each context, when guidance is in two calls); needed for a sampler.
        sampler: which steps of which images; all when None.
        pairs: keep the evaluation before each as well: residuals need two.
        folder: where shards go, trajectory by trajectory; the same call continues after the last one there.
        memory_mib: the most that is held in memory; beyond it shards are written, or without a folder it is an error.
    Returns: calls of the denoiser; both branches of guidance, batched or in contexts of their own.
    Raises: ConfigError for settings that do not fit; CalibrationError if trajectories are not what they say.
    Cost: the trajectories, and a copy of what is kept.
    """
    model = network_named(component, target, "collect")
    with host_of(target).contexts(model):
        return record_calls(
            model, run, trajectories=trajectories, batch=batch, steps=steps, sampler=sampler, pairs=pairs, seed=seed,
            folder=folder, memory_mib=memory_mib, progress=progress,
        )  # fmt: skip


def reconstruct(
    target: Any,
    calls: Sequence[Call] | Callable[[int], object],
    config: ReconstructConfig | None = None,
    *,
    component: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Learn how each weight rounds (AdaRound), or static scales, block by block, and keep what is better.

    Args:
        calls: a calibration set of its denoiser from `modiff.collect`; or `run(i)`, which generates with the seeds of
            trajectory i: one trajectory in full precision is collected then, all steps of it.
        config: what is learned and how long; Q-Diffusion's settings for weights when None.
        component: as in `collect`. folder: keeps each finished unit; the same call continues after the last one there.
    Returns: each unit, with its loss on held-out rows before and after.
    Raises: StateError without modulated layers; ConfigError or CalibrationError for what cannot be learned, or a
        folder of another reconstruction; FormatError for a damaged one.
    Cost: for each unit, two runs of the network up to it for each call, then `config.iterations` passes of the unit.
    """
    model = network_named(component, target, "reconstruct")
    config = config or ReconstructConfig()
    if callable(calls):
        required_attachment(model, "reconstruct")
        with full_precision(model):
            pairs = config.learn == "residual_scales"
            calls = collect(target, calls, component=component, pairs=pairs, progress=progress)
    return learn_units(model, calls, config, kinds=host_of(model).block_classes, folder=folder, progress=progress)
