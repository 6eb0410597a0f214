"""Finished units in a folder, one safetensors file each: an interrupted reconstruction goes on after the last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modiff.calibration.data import Call
from modiff.calibration.reconstruct.report import UnitReport
from modiff.errors import FormatError

FORMAT = "modiff reconstruction unit"
VERSION = "1"


class UnitStore:
    """The units of one reconstruction in a folder.

    Args:
        folder: made when it is missing; None keeps nothing.
        run: a digest of everything that the result depends on beside the unit: config, weights, calls.
    Raises: OSError if the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, run: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.run = run
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, index: int, name: str) -> tuple[dict[str, Tensor], UnitReport] | None:
        """What unit `index` learned, and its report; None if it is not there.

        Raises: FormatError if the file is damaged or belongs to another reconstruction.
        """
        path = self._path(index, name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            mine = facts.get("format") == FORMAT and facts.get("version") == VERSION and facts.get("run") == self.run
            report = _report(json.loads(facts["report"])) if mine else None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: expected a unit of a reconstruction, got {type(error).__name__}: {error}. The file is "
                "damaged or was cut. Delete it: the unit is learned again."
            ) from error
        if report is None:
            raise FormatError(
                f"{path}: expected a unit of this reconstruction, got one of another version, config, calibration set "
                "or weights. Its codes would be mixed with these. Give another folder, or empty this one."
            )
        return tensors, report

    def save(self, index: int, tensors: dict[str, Tensor], report: UnitReport) -> None:
        """Write a finished unit whole or not at all. Raises: OSError."""
        path = self._path(index, report.name)
        if path is None:
            return
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run,
            "report": json.dumps(dataclasses.asdict(report)),
        }
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=facts))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, index: int, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"unit-{index:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.safetensors"


def _report(values: dict[str, Any]) -> UnitReport:
    return UnitReport(**values | {"layers": tuple(values["layers"])})


def digest_of(settings: dict[str, Any], weights: Iterable[Tensor], calls: Iterable[Call]) -> str:
    """SHA-256 of everything that decides what is learned. Cost: one pass over the weights and the calls."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in weights:
        _add(digest, tensor)
    for call in calls:
        digest.update(repr((call.step, call.timestep, call.context, call.rows)).encode())
        for tensor in call.tensors():
            _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().flatten()
    digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(plain.view(torch.uint8).numpy().tobytes())
