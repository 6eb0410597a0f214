"""Calls in safetensors shards: tensors as tensors, everything else as JSON in the file's header. No pickle.

A folder holds `calibration.json` (format version, settings) and `trajectory-00000-000.safetensors`, ...: the parts of
each trajectory, the last of which says so. A trajectory without its last part was cut off, and is collected again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modiff.errors import CalibrationError, ConfigError, FormatError

FORMAT = "modiff calibration set"
VERSION = 1
SETTINGS = "calibration.json"
_SHARD = re.compile(r"trajectory-(\d{5,})-(\d{3,})\.safetensors")
_PLAIN = (str, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Record:
    """One call in a shard: the file, and the call's fields with names where the tensors belong."""

    path: Path
    fields: dict[str, Any]

    def read(self) -> dict[str, Any]:
        """The call's fields with its tensors. Raises: FormatError if the shard does not hold them."""
        try:
            with safe_open(self.path, "pt") as file:
                loaded: dict[str, Tensor] = {}

                def tensor(name: str) -> Tensor:
                    if name not in loaded:
                        loaded[name] = file.get_tensor(name)
                    return loaded[name]

                return {key: _decode(value, tensor) for key, value in self.fields.items()}
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(self.path, error) from error


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder this set's, or find that it is. Raises: ConfigError if it holds another set."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    if not (folder / SETTINGS).exists():
        _replace(folder / SETTINGS, json.dumps({"format_version": VERSION, "settings": wanted}, indent=2) + "\n")
        return
    past = read_settings(folder)
    differing = sorted(key for key in {*wanted, *past} if wanted.get(key) != past.get(key))
    if differing:
        raise ConfigError(
            f"{folder}: expected an empty folder or one of the same set, got one with another "
            f"{' and '.join(differing)}. Its calls would be mixed with these. Give another folder."
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the set in a folder. Raises: FormatError if there is none, or of another version."""
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, settings = content["format_version"], content["settings"]
        if not isinstance(settings, dict):
            raise TypeError(f"settings are {type(settings).__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected the settings of a calibration set, got {type(error).__name__}: {error}. The folder is "
            "missing, damaged or holds something else. Give a folder written by CalibrationSet.save."
        ) from error
    if version != VERSION:
        raise FormatError(
            f"{path}: expected format_version {VERSION}, got {version!r}. Another version of modiff wrote it. "
            "Collect the set again."
        )
    return settings


def write(folder: Path, trajectory: int, part: int, calls: Iterable[Any], *, last: bool) -> None:
    """Write one part of a trajectory, whole or not at all; a tensor that several calls hold is stored once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def name_of(tensor: Tensor) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = f"t{len(names)}"
            tensors[names[id(tensor)]] = tensor.contiguous().clone()
        return names[id(tensor)]

    kept = list(calls)  # alive while ids are names
    fields = [_encode_call(call, name_of) for call in kept]
    header = {"format": FORMAT, "format_version": str(VERSION), "last": str(last), "calls": json.dumps(fields)}
    path = shard_path(folder, trajectory, part)
    partial = path.with_suffix(".tmp")
    try:
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def shard_path(folder: Path, trajectory: int, part: int) -> Path:
    """Where a part of a trajectory lies."""
    return folder / f"trajectory-{trajectory:05d}-{part:03d}.safetensors"


def complete(folder: Path) -> list[int]:
    """Trajectories whose parts are all there. Raises: FormatError for a shard that is damaged."""
    first = sorted(
        int(found[1]) for p in folder.iterdir() if (found := _SHARD.fullmatch(p.name)) and int(found[2]) == 0
    )
    return [trajectory for trajectory in first if _parts(folder, trajectory) is not None]


def records(folder: Path, trajectory: int) -> list[Record]:
    """The calls of a complete trajectory, in order."""
    found = _parts(folder, trajectory) or []
    return [Record(path, fields) for path, header in found for fields in header]


def _parts(folder: Path, trajectory: int) -> list[tuple[Path, list[dict[str, Any]]]] | None:
    """The parts of a trajectory up to its last, with the fields of their calls; None if the last is missing."""
    found: list[tuple[Path, list[dict[str, Any]]]] = []
    while (path := shard_path(folder, trajectory, len(found))).exists():
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("format_version") != str(VERSION):
                raise ValueError(f"a file of format {header.get('format')!r}")
            fields = json.loads(header["calls"])
            if not isinstance(fields, list) or not all(isinstance(f, dict) for f in fields):
                raise TypeError("calls that are no list of objects")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(path, error) from error
        found.append((path, fields))
        if header.get("last") == "True":
            return found
    return None


def _encode_call(call: Any, name_of: Any) -> dict[str, Any]:
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    encoded = {key: _encode(value, name_of) for key, value in fields.items() if key != "previous"}
    return encoded | {"previous": None if call.previous is None else {"call": _encode_call(call.previous, name_of)}}


def _encode(value: Any, name_of: Any) -> Any:
    """JSON for a nested value: objects with one key stand for what JSON does not have."""
    if isinstance(value, Tensor):
        return {"tensor": name_of(value)}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _encode(item, name_of)] for key, item in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_encode(item, name_of) for item in value]}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    raise CalibrationError(
        f"calibration set: expected tensors, numbers, strings and containers of them, got {type(value).__name__}. "
        "Only these are saved without pickle. Call the network with plain arguments."
    )


def _decode(value: Any, tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "call":
        return {key: _decode(item, tensor) for key, item in content.items()}
    if kind == "dict":
        return {key: _decode(item, tensor) for key, item in content}
    items = [_decode(item, tensor) for item in content]
    return {"tuple": tuple, "list": list}[kind](items)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _damaged(path: Path, error: Exception) -> FormatError:
    reason = str(error).splitlines()[0] if str(error) else "nothing"
    return FormatError(
        f"{path}: expected a shard of a calibration set, got {type(error).__name__}: {reason}. The file is damaged, "
        "was cut, or is of another kind. Remove it and collect again."
    )
