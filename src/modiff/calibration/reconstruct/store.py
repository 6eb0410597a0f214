"""Finished units on disk, and what they depend on."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modiff.calibration.data import Call
from modiff.calibration.reconstruct.config import UnitReport
from modiff.files import read_tensors, reading, write_tensors

FORMAT = {"format": "modiff reconstruction unit", "version": "1"}


def save_unit(path: Path, learned: dict[str, Tensor], report: UnitReport) -> None:
    """Write what a unit learned, atomically."""
    write_tensors(path, learned, FORMAT | {"report": json.dumps(dataclasses.asdict(report))})


def load_unit(path: Path) -> tuple[dict[str, Tensor], UnitReport]:
    """What a unit learned, and its report. Raises: FormatError if the file is damaged or of another version."""
    unit = ("a unit of a reconstruction", "Delete it: the unit is learned again.")
    learned, facts = read_tensors(path, *unit)
    with reading(path, *unit):
        if {key: facts.get(key) for key in FORMAT} != FORMAT:
            raise ValueError(f"format {facts.get('format')!r}, version {facts.get('version')!r}")
        values = json.loads(facts["report"])
        return learned, UnitReport(**values | {"layers": tuple(values["layers"])})


def digest_of(settings: Any, tensors: Iterable[Tensor] = (), calls: Iterable[Call] = ()) -> str:
    """SHA-256 of JSON values, tensors and calls. Cost: one pass over the tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    named = ((repr((c.step, c.timestep, c.context, c.rows)), c.tensors()) for c in calls)
    for facts, group in itertools.chain([("", tensors)], named):
        digest.update(facts.encode())
        for tensor in group:
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
