"""Which backend runs a layer, and why: the first in the list that is exact for the problem on this machine."""

from typing import NamedTuple

from modiff.errors import KernelError, warn_once
from modiff.kernels.backend import Backend
from modiff.kernels.exact import FLOAT_EXACT, REFERENCE
from modiff.kernels.isa import Isa, detect
from modiff.kernels.onednn import ONEDNN, self_test
from modiff.kernels.problem import Problem
from modiff.kernels.product import NATIVE
from modiff.kernels.triton.backend import TRITON

BACKENDS: list[Backend] = [NATIVE, ONEDNN, TRITON, FLOAT_EXACT, REFERENCE]
"""In the order in which they are asked, the fastest first."""


class Choice(NamedTuple):
    """A backend by its name, one line that says why, and what each backend before it answered."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...] = ()


def register_backend(backend: Backend) -> None:
    """Ask this backend first, in every kernel built from now on. Raises: KernelError if its name is taken."""
    if not backend.name or any(known.name == backend.name for known in BACKENDS):
        raise KernelError(
            f"register_backend: expected a name other than {_names()}, got {backend.name!r}. Reports and files tell "
            "backends by name. Set `name` of the class."
        )
    BACKENDS.insert(0, backend)


def unregister_backend(name: str) -> None:
    """Ask this backend no longer; kernels that have it keep it. Raises: KernelError for an unknown name."""
    BACKENDS.remove(backend_named(name))


def backend_named(name: str) -> Backend:
    """The backend of that name. Raises: KernelError if there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise KernelError(f"backend: expected one of {_names()}, got {name!r}. Name one of them, or register it.")


def plan(problem: Problem, isa: Isa | None = None) -> Choice:
    """The backend that a kernel for this problem would take, on this machine or on the one that `isa` pretends."""
    isa = this_machine(problem.device) if isa is None else isa
    refusals: list[tuple[str, str]] = []
    for backend in BACKENDS:
        if backend.devices and problem.device not in backend.devices:
            continue
        sentence = backend.unsupported(problem, isa)
        if not sentence:
            causes = [cause for _, cause in refusals]
            if backend.slow and not causes:
                causes = [f"no faster backend runs on {problem.device}"]
            why = backend.reason(problem, isa) + (f": {'; '.join(causes)}" if causes else "")
            return Choice(backend.name, why, tuple(refusals))
        refusals.append((backend.name, sentence))
    raise KernelError(f"plan: expected a backend for {problem}, got none. {refusals}. Register one that runs it.")


def warn_if_slow(choice: Choice, isa: Isa) -> None:
    """Say once per cause that integer layers are slower here than they could be, and what to do."""
    for backend in BACKENDS:
        broken = backend.broken(isa)
        if broken and (backend.name, broken) in choice.refusals:
            warn_once(
                broken,
                f"modiff: integer layers run on {choice.backend}, more slowly than on {backend.name}: {broken}. "
                "Install a torch for this processor that modiff was tested with, or leave execution='simulated'.",
            )
            return
    if backend_named(choice.backend).slow:
        warn_once(
            choice.backend,
            f"modiff: a layer runs on {choice.reason}. Exclude such layers, or leave execution='simulated'; the report "
            "of modiff.apply names their backends.",
        )


def this_machine(device: str = "cpu") -> Isa:
    """What this process may use; for CPUs with what oneDNN's self-test shows."""
    isa = detect()
    asks = device == "cpu" and isa.onednn and isa.level != "other"
    return isa._replace(trust=self_test()) if asks else isa


def _names() -> str:
    return ", ".join(backend.name for backend in BACKENDS)
