"""What must be known of a network that its modules do not say; whoever hosts it knows, or the source of `forward`."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


class NetworkFacts:
    """Facts of a network, as `modiff.Host` gives them; the defaults are those of a plain module.

    default_exclude: patterns on names of layers that are left in full precision: what reads the time step or the class
        alone is a few rows, costs nothing and has a large effect.
    timestep_names: of the argument of `forward` that holds the time step; a network without one counts evaluations.
    unbatched: keyword arguments without a batch axis, such as positions.
    block_classes: patterns on class names; a module that matches is learned as a whole by `modiff.reconstruct`.
    ends: patterns on names of first and last layers: one of such a name that is registered first or last is meant.
    reads_tokens: a table is the way in, so that no layer keeps its floats for being the first.
    """

    default_exclude: tuple[str, ...] = ()
    timestep_names: tuple[str, ...] = (
        "timestep", "timesteps", "time_step", "time_steps", "t", "time", "times", "time_cond", "sigma", "sigmas",
        "noise_labels", "noise_level", "noise_levels", "c_noise", "log_snr", "diffusion_step", "diffusion_steps",
    )  # fmt: skip
    unbatched: tuple[str, ...] = ()
    block_classes: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    reads_tokens: bool = False

    def is_attention(self, module: nn.Module) -> bool:
        """Whether a module computes attention, by torch's `scaled_dot_product_attention`."""
        return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))

    def splits(self, network: nn.Module) -> dict[str, int]:
        """Channel index of the concatenation for each layer whose input is one; each half gets its own scales."""
        return {}

    def example(self, network: nn.Module, target: Any = None) -> dict[str, Any] | None:
        """Arguments of one evaluation as one generation makes it, of which the shapes matter alone; None if unknown.

        target: what `apply` was given; a pipeline may know more of sizes than its network.
        """
        return None

    def rehearsals(self, network: nn.Module, target: Any) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
        """Copies of a network without values, and what evaluates each as the first step of one generation does.

        All evaluations of that step, so that of its shapes nothing is guessed. The first that raises nothing counts.
        """
        yield from ()

    def branch_hooks(self, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """Names of what hangs on modules while a branch of guidance is evaluated, and changes what they compute."""
        return ()

    def timestep_argument(self, network: nn.Module) -> tuple[str, int] | None:
        """Name and position of the argument that holds the time step; None if the network has none."""
        names = list(inspect.signature(network.forward).parameters)
        return next(((name, i) for i, name in enumerate(names) if name in self.timestep_names), None)


_PLAIN = NetworkFacts()
_FINDERS: list[Callable[[Any], NetworkFacts | None]] = []


def register_facts(find: Callable[[Any], NetworkFacts | None]) -> None:
    """Let `find` be asked before those that are registered already."""
    _FINDERS.insert(0, find)


def facts_of(network: Any) -> NetworkFacts:
    """What the first finder that knows a network says of it; the facts of a plain module if none does."""
    return next((facts for find in _FINDERS if (facts := find(network)) is not None), _PLAIN)


def ends_of(network: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Which of the named layers are the first and the last, and how that is known.

    As `forward` is written, they are the first that reads its first argument but the time, and the last. Registration
    decides where their host knows the name of what is registered there, and where no module is mentioned.
    """
    facts = facts_of(network)
    mentioned = {name for name, _ in _uses(network)} & {name for name, _ in network.named_children()}
    ends: dict[str, str] = {}
    for index in ((-1,) if facts.reads_tokens else (0, -1)) if layers else ():
        if mentioned and not any(fnmatchcase(layers[index], pattern) for pattern in facts.ends):
            ends[_written(network, layers, index)] = "as forward is written"
        else:
            ends[layers[index]] = "by registration"
    return ends


def _written(network: nn.Module, layers: Sequence[str], index: int) -> str:
    name = ""
    while name not in layers:
        layers = [layer for layer in layers if not name or layer.startswith(f"{name}.")]
        children = list(dict.fromkeys(layer.removeprefix(f"{name}.").partition(".")[0] for layer in layers))
        uses = [use for use in _uses(network.get_submodule(name)) if use[0] in children]
        uses = uses or [(child, True) for child in children]
        reading = [child for child, reads in uses if reads or index == -1]
        name = f"{name}.{(reading or [child for child, _ in uses])[index]}".removeprefix(".")
    return name


def _uses(module: nn.Module) -> list[tuple[str, bool]]:
    """Attributes in the order in which `forward` uses them; whether with values of its first argument but the time."""
    try:
        function: Any = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body[0]
        names = [argument.arg for argument in function.args.args[1:]]
        values, uses = {*[n for n in names if n not in facts_of(module).timestep_names][:1]}, list[tuple[str, bool]]()
    except (OSError, TypeError, SyntaxError, AttributeError):  # made at runtime
        return []

    def mentions(*nodes: ast.AST) -> bool:
        inside = [n for node in nodes for n in ast.walk(node)]
        facts = [n.value for n in inside if isinstance(n, ast.Attribute) and n.attr in ("dtype", "device", "shape")]
        return any(isinstance(n, ast.Name) and n.id in values and n not in facts for n in inside)

    def read(node: ast.AST, reads: bool) -> None:
        """Note the attributes of a node in the order of evaluation; whether it `reads` values of the argument."""
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):  # arguments are evaluated before the function is called
            children, reads = [*node.args, *node.keywords, node.func], mentions(*node.args, *node.keywords)
        elif isinstance(node, ast.For):
            over = [n.attr for n in ast.walk(node.iter) if isinstance(n, ast.Attribute)]
            uses.extend((name, mentions(node)) for name in over)
            children = node.body
        elif isinstance(node, ast.Assign):
            children = [node.value, *node.targets]
        for child in children:
            read(child, reads)
        if isinstance(node, ast.Attribute):
            uses.append((node.attr, reads))
        elif isinstance(node, ast.Assign) and mentions(node.value):
            values.update(n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))

    for statement in function.body:
        read(statement, False)
    return uses
