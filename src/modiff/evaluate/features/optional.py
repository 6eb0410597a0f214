"""Packages that are not needed for anything else, imported when asked for, with a clear word if that fails."""

from __future__ import annotations

import importlib
from types import ModuleType

from modiff.errors import ConfigError
from modiff.evaluate.features.messages import first_line


def optional_import(package: str, where: str) -> ModuleType:
    """The module `package` of the extra `eval`.

    Raises: ConfigError if it is not installed, or installed and broken. The known case of the latter is a torchvision
    built for another torch, which raises `operator torchvision::nms does not exist` and takes down what imports it.

    >>> optional_import("json", "here").__name__
    'json'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise ConfigError(
            f"{where}: expected the package {missing}, got none installed. modiff does not need it for anything else. "
            f"{_how(missing)}"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{where}: expected {package} to load, got {reason}. It is installed, but broken or "
            f"built for another torch. {_how('torchvision' if 'torchvision' in reason else package)}"
        ) from error


def _how(package: str) -> str:
    if package == "torchvision":
        return "Install torchvision of torch's own build: from the same package index, in one command with torch."
    return "Type: pip install 'modiff[eval]'."
