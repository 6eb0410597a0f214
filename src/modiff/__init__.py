"""modiff: modulated quantization of diffusion models.

Every linear operator runs as a closed-loop predictive codec over the denoising steps: its input is predicted from the
past, the residual is coded in a few bits, and the operator is applied to the code alone (MoDiff, arXiv:2506.22463).

    report = modiff.apply(pipe, modiff.presets.w8a4())
    image = pipe(...)
    modiff.remove(pipe)
"""

import ast as _ast
import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import typing as _typing

from modiff import sampling as sampling  # diffusers looks for the schedulers of a folder among loaded modules
from modiff.config import VERSION as __version__  # noqa: F401

_STUB = _ast.parse(_pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {name.name: node.module for node in _STUB.body if isinstance(node, _ast.ImportFrom) for name in node.names}
"""The module of each public name: they load when they are first asked for, so `modiff --version` need not wait."""
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> _typing.Any:
    """A public name, or a module of the package."""
    home = _HOMES.get(name, "modiff")
    if home == "modiff.hosts.diffusers.quantizer":
        _importlib.import_module("modiff.hosts").diffusers_host()  # lets diffusers read folders that modiff wrote
    if home != "modiff":
        value = getattr(_importlib.import_module(home), name)
    elif not name.startswith("_") and _util.find_spec(f"modiff.{name}"):
        value = _importlib.import_module(f"modiff.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
