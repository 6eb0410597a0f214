"""The folder of a job's finished parts: it serves one model, one sampler and one method with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modiff.calibration.reconstruct.store import digest_of
from modiff.config import JsonConfig
from modiff.errors import ConfigError, FormatError
from modiff.files import write_json
from modiff.hosts.host import networks_of

JOB = "job.json"
VERSION = 1


def claim_work(folder: str | Path | None, target: Any, method: str, config: JsonConfig) -> Path | None:
    """The folder of finished parts, now this job's; None for none.

    Raises: ConfigError if it is another job's, or holds other files; FormatError if its job.json is damaged; OSError.
    Cost: one pass over the weights.
    """
    if folder is None:
        return None
    folder = Path(folder)
    job = job_of(target, method, config)
    path = folder / JOB
    if path.is_file():
        past = _read(path)
        differing = [key for key in job if past.get(key) != job[key]]
        if differing:
            raise ConfigError(
                f"{folder}: expected a new folder or one of the same job, got one with another "
                f"{' and '.join(differing)}. Its parts would be mixed with these. Give another folder, or delete it."
            )
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: expected a new folder or one with {JOB}, got other files. Parts of a job lie by themselves. "
            "Give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, job)
    return folder


def job_of(target: Any, method: str, config: JsonConfig) -> dict[str, Any]:
    """What decides what is learned: method, settings, sampler, and a digest of the weights."""
    scheduler = getattr(target, "scheduler", None)
    weights = (p for _, module in sorted(networks_of(target).items()) for p in module.parameters())
    return {
        "version": VERSION,
        "method": method,
        "settings": config.to_dict(),
        "sampler": None if scheduler is None else [type(scheduler).__name__, repr(sorted(scheduler.config.items()))],
        "model": digest_of({}, weights, ()),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected the settings of a job, got {type(error).__name__}: {error}. The file is damaged. Delete "
            "the folder: its parts are made again."
        ) from error
    return found if isinstance(found, dict) else {}
