"""The seam between modiff and whatever runs a denoiser: `Host`, its registry, and the host of plain modules."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.checkpoint.module_folder import save_module
from modiff.config import PackedAnchors
from modiff.errors import ConfigError
from modiff.hosts.names import BLOCK_CLASSES, DEFAULT_EXCLUDE, UNBATCHED, example_inputs, shortcut_splits
from modiff.model.attach import attachment_of, eager, required_attachment
from modiff.model.facts import NetworkFacts, facts_of, register_facts
from modiff.model.trajectory import model_trajectory
from modiff.private_names import TORCH, check_private_names

_MARK = "_modiff_class"


class Host(NetworkFacts):
    """What modiff must know of a kind of target. As it stands, it is the host of a torch module.

    A host of your own overrides what differs, and `register_host` makes it known:

        class TextHost(Host):
            generation = "generate"

        register_host(lambda target: TextHost() if isinstance(target, TextModel) else None)

    generation: name of the method of a target whose call is one trajectory, from then on that `apply` was called;
        None where a loop of the user's is, inside `with modiff.trajectory(target):`.
    """

    default_exclude = DEFAULT_EXCLUDE
    unbatched = UNBATCHED
    block_classes = BLOCK_CLASSES
    generation: str | None = None

    def splits(self, network: nn.Module) -> dict[str, int]:
        """Where a U-Net in diffusers' names concatenates its decoder's channels and a skip connection's."""
        return shortcut_splits(network)

    def example(self, network: nn.Module, target: Any = None) -> dict[str, Any] | None:
        """Of a model of diffusers, from its config."""
        return example_inputs(network)

    def networks(self, target: Any) -> dict[str, nn.Module]:
        """The networks that a target evaluates at every step, by name. A finder must know these as well."""
        if not isinstance(target, nn.Module):
            raise ConfigError(
                f"target: expected a diffusers pipeline or a torch module, got {type(target).__name__}. modiff works "
                "on objects, not on names or lists. Load it first, e.g. DiffusionPipeline.from_pretrained(folder), and "
                "take the networks of a sampler one by one, or register a modiff.Host that names them."
            )
        if isinstance(target, torch.jit.ScriptModule):
            raise ConfigError(
                f"target: expected a torch module, got a {type(target).__name__}. Its layers are compiled already. "
                "Apply modiff to the module that it was made from."
            )
        model = eager(target)
        return {type(model).__name__: model}

    def attach(self, target: Any) -> None:
        """`apply` took layers of the target: let each call of `generation` be a trajectory."""
        if self.generation is None or not hasattr(type(target), self.generation):  # one network of a target
            return
        for network in self.networks(target).values():
            attachment = attachment_of(network)
            if attachment is not None:
                attachment.clock.numbered = True
        follow_generations(self, target, self.generation)

    def detach(self, target: Any) -> None:
        """Undo `attach`; nothing happens where it was not called."""
        target.__class__ = getattr(type(target), _MARK, type(target))

    def contexts(self, *networks: nn.Module) -> AbstractContextManager[object]:
        """While the body runs, the host's own names for branches of guidance choose states too."""
        return nullcontext()

    def packed(self, network: nn.Module) -> None:
        """The network holds integers for good from now on."""

    def run(self, target: Any, *, steps: int, batch: int, seed: int) -> Callable[[int], object]:
        """`run(i)` generates `batch` samples with the seeds of trajectory i. Raises: ConfigError if it cannot."""
        raise ConfigError(
            f"{type(target).__name__}: expected run=, a function that runs one trajectory, got none. A module alone "
            "does not say how it is sampled. Give run=lambda: ..."
        )

    def evaluations(self, target: Any, steps: int) -> int:
        """How often a trajectory of `steps` steps evaluates the network, in each context. Raises: as `run`."""
        raise ConfigError(
            f"{type(target).__name__}: expected evaluations_per_run=, got none. A module alone does not say how it is "
            "sampled. Give the number of evaluations in a run, or the pipeline."
        )

    def save(
        self,
        target: Any,
        networks: list[nn.Module],
        folder: str | Path,
        max_shard_size: int,
        anchor_weights: PackedAnchors,
    ) -> None:
        """Write a target; `networks` are those of its networks that carry modiff."""
        if not isinstance(target, nn.Module):
            raise ConfigError(
                f"save: expected a torch module or a pipeline of diffusers, got {type(target).__name__}. Its host does "
                "not say how it is written. Save its networks, each into a folder, or give its Host a `save`."
            )
        save_module(target, folder, max_shard_size, anchor_weights)


def register_host(find: Callable[[Any], Host | None]) -> None:
    """Make a host known. `find` returns it for the targets that are its own and their networks, None for others.

    The finder that was registered last is asked first.
    """
    register_facts(find)


def host_of(target: Any) -> Host:
    """The host of a target, or of one of its networks: what the first finder says that knows it."""
    check_private_names(TORCH)
    host = facts_of(eager(target))
    if not isinstance(host, Host):
        raise ConfigError(
            f"{type(target).__name__}: expected a modiff.Host of it, got {type(host).__name__}. A finder returned "
            "something else. Let it return a Host, or None for targets that it does not know."
        )
    return host


def networks_of(target: Any) -> dict[str, nn.Module]:
    """The networks of a target by name. Raises: ConfigError if there are none."""
    return host_of(target).networks(target)


def modulated_networks(target: Any, verb: str) -> list[nn.Module]:
    """The networks of a target that carry modiff. Raises: StateError if none does."""
    networks = list(networks_of(target).values())
    modulated = [network for network in networks if attachment_of(network) is not None]
    if not modulated:
        required_attachment(networks[0], verb)
    return modulated


def network_named(name: str | None, target: Any, verb: str) -> nn.Module:
    """The network of that name; without one the only network, or the only one that carries modiff."""
    networks = networks_of(target)
    if name in networks:
        return networks[name]
    modulated = [network for network in networks.values() if attachment_of(network) is not None]
    for choice in (list(networks.values()), modulated):
        if name is None and len(choice) == 1:
            return choice[0]
    raise ConfigError(
        f"{verb}.component: expected one of {', '.join(networks)}, got {name!r}. A calibration set belongs to one "
        f"network. Give component={next(iter(networks))!r}."
    )


@contextmanager
def trajectories(networks: dict[str, nn.Module]) -> Iterator[None]:
    """One generation of all networks that carry modiff."""
    with ExitStack() as stack:
        for network in networks.values():
            if attachment_of(network) is not None:
                stack.enter_context(model_trajectory(network))
        yield


def follow_generations(host: Host, target: Any, method: str) -> None:
    """Make every call of `target.method` a trajectory: states start empty and are freed at its end, also if it raises.

    Python looks `__call__` up on the class, so the target gets a subclass of the same name that wraps the method.
    """
    if is_attached(target):  # modiff was taken off its networks one by one
        return
    kind = type(target)

    @functools.wraps(getattr(kind, method))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with trajectories(host.networks(self)):
            return getattr(kind, method)(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, args, *state = kind.__reduce_ex__(self, protocol)  # a pickle finds `kind` by its name, not this class
        return follow_again, (host, method, make, tuple(kind if a is type(self) else a for a in args)), *state

    names = {method: call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, _MARK: kind,
             "__reduce_ex__": reduce}  # fmt: skip
    target.__class__ = type(kind.__name__, (kind,), names)


def follow_again(host: Host, method: str, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What a copy or a pickle of a followed target begins with: it is followed as well."""
    target = make(*args)
    follow_generations(host, target, method)
    return target


def is_attached(target: object) -> bool:
    """Whether calls of the target's own method are trajectories."""
    return _MARK in vars(type(target))
