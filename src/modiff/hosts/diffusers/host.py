"""Pipelines and models of diffusers as a `Host`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from modiff.config import PackedAnchors
from modiff.errors import ConfigError
from modiff.files import new_folder
from modiff.hosts.diffusers.hooks import cache_contexts, follow, unfollow
from modiff.hosts.diffusers.quantizer import attach_quantizer, offer_quantizer, saving_quantized, withdraw_quantizer
from modiff.hosts.diffusers.runs import calibration_run, evaluations, rehearsals
from modiff.hosts.host import Host
from modiff.hosts.names import ENDS
from modiff.model.attach import attachment_of, eager
from modiff.model.facts import facts_of

DENOISERS = (
    "unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "prior_prior", "decoder",
    "image_unet", "text_unet", "super_res_first", "super_res_last",
)  # fmt: skip
"""Component names under which pipelines keep the networks that run at every step."""
_GUIDING = ("diffusers.hooks.layer_skip", "diffusers.hooks.smoothed_energy_guidance_utils")


def is_pipeline(target: Any) -> bool:
    """Whether a target of diffusers is a pipeline, also a modular one."""
    return hasattr(type(target), "components")


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks that a pipeline evaluates at every step, by component name; a decoder only if it reads the time.

    Raises: ConfigError if the pipeline has none under a known name.
    """
    networks = {n: eager(m) for n in DENOISERS if isinstance(m := getattr(pipe, n, None), nn.Module)}
    if "decoder" in networks and facts_of(networks["decoder"]).timestep_argument(networks["decoder"]) is None:
        del networks["decoder"]
    if not networks:
        parts = ", ".join(sorted(pipe.components))
        raise ConfigError(
            f"{type(pipe).__name__}: expected a component named {', '.join(DENOISERS)}, got {parts}. This pipeline has "
            "another name for its denoiser. Apply to the module itself and use `with modiff.trajectory(module):`."
        )
    return networks


class DiffusersHost(Host):
    """Every call of a pipeline is a trajectory; branches of guidance are the cache contexts that it enters."""

    generation = "__call__"
    ends = ENDS
    timestep_names = (*Host.timestep_names, "timestep_ratio", "r", "timestep_img", "vision_timesteps")

    def networks(self, target: Any) -> dict[str, nn.Module]:
        """The denoisers of a pipeline by component name, or the model itself."""
        return denoisers(target) if is_pipeline(target) else super().networks(target)

    def branch_hooks(self, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """Of guiders, which evaluate a branch with some layers skipped."""
        hooks = (hook for module in modules if (registry := vars(module).get("_diffusers_hook"))
                 for hook in registry.hooks.items())  # fmt: skip
        return tuple(sorted({name for name, hook in hooks if type(hook).__module__ in _GUIDING}))

    def attach(self, target: Any) -> None:
        """Follow the models, and the pipeline's calls; models save packed integers from now on."""
        for network in self.networks(target).values():
            if attachment_of(network) is not None:
                offer_quantizer(network)
                follow(network)
        if is_pipeline(target):
            super().attach(target)

    def detach(self, target: Any) -> None:
        """Undo `attach`; a correction of the quantized network is taken off the scheduler."""
        if hasattr(scheduler := getattr(target, "scheduler", None), "without_correction"):
            target.scheduler = scheduler.without_correction()
        for network in self.networks(target).values():
            unfollow(network)
            withdraw_quantizer(network)
        super().detach(target)

    def rehearsals(self, network: nn.Module, target: Any) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
        """Calls of a copy of the pipeline, of the size that it has by default."""
        return rehearsals(target, network) if isinstance(target, DiffusionPipeline) else iter(())

    def contexts(self, *networks: nn.Module) -> AbstractContextManager[object]:
        """Follow the cache contexts of models that modiff is not on."""
        stack = ExitStack()
        for network in networks:
            stack.enter_context(cache_contexts(network))
        return stack

    def packed(self, network: nn.Module) -> None:
        """diffusers treats the model as quantized from now on."""
        attach_quantizer(network)

    def run(self, target: Any, *, steps: int, batch: int, seed: int) -> Callable[[int], object]:
        """Of a pipeline that needs no prompt."""
        if isinstance(target, DiffusionPipeline):
            return calibration_run(target, steps=steps, batch=batch, seed=seed)
        return super().run(target, steps=steps, batch=batch, seed=seed)

    def evaluations(self, target: Any, steps: int) -> int:
        """As the pipeline's scheduler says."""
        if isinstance(target, DiffusionPipeline):
            return evaluations(target, steps)
        return super().evaluations(target, steps)

    def save(
        self,
        target: Any,
        networks: list[nn.Module],
        folder: str | Path,
        max_shard_size: int,
        anchor_weights: PackedAnchors,
    ) -> None:
        """As diffusers writes it, with integers for the networks that carry modiff."""
        if is_pipeline(target) and not isinstance(target, DiffusionPipeline):
            raise ConfigError(
                f"save: expected a DiffusionPipeline or a network, got {type(target).__name__}. The folder of a "
                "modular pipeline names its components, and holds none. Use "
                f"modiff.save(pipe.{next(iter(denoisers(target)))}, folder)."
            )
        with new_folder(folder) as partial, saving_quantized(networks, anchor_weights):
            target.save_pretrained(partial, max_shard_size=max_shard_size)
