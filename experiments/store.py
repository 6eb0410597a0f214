"""What the study has finished, on disk: a file for each experiment and for each run, so that a killed study goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modiff.errors import ConfigError, FormatError
from modiff.files import check_writable, write_json

FORMAT_VERSION = 1
SETTINGS, EXPERIMENTS, RUNS = "study.json", "experiments", "runs"


class Store:
    """A folder that belongs to one model and one set of settings.

    Args:
        settings: all that shapes the figures, as plain JSON values.
    Raises: ConfigError if the folder holds a study with other settings, or other files; FormatError if its study.json
        is damaged; OSError that names a file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps({"format_version": FORMAT_VERSION} | settings))
        self._claim()

    def experiment(self, name: str) -> dict[str, Any] | None:
        """What an experiment found; None if it has not finished. Raises: FormatError for a damaged file."""
        return _read(self.folder / EXPERIMENTS / f"{name}.json")

    def save_experiment(self, name: str, values: dict[str, Any]) -> None:
        """Keep what an experiment found, whole or not at all."""
        _write(self.folder / EXPERIMENTS / f"{name}.json", values)

    def run(self, key: str) -> dict[str, Any] | None:
        """The outcome of a run; None if there is none. Raises: FormatError for a damaged file."""
        return _read(self.folder / RUNS / f"{key}.json")

    def save_run(self, key: str, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a run, whole or not at all."""
        _write(self.folder / RUNS / f"{key}.json", outcome)

    def _claim(self) -> None:
        record = self.folder / SETTINGS
        check_writable(record)
        past = _read(record)
        if past is None:
            foreign = sorted(p.name for p in self.folder.iterdir())
            if foreign:
                raise ConfigError(
                    f"{self.folder}: expected an empty folder or one of an earlier study, got {foreign[0]} and no "
                    f"{SETTINGS}. Its files are not to be mixed with others. Give another folder."
                )
            write_json(record, self.settings)
            return
        differing = sorted(key for key in {*past, *self.settings} if past.get(key) != self.settings.get(key))
        if differing:
            raise ConfigError(
                f"{self.folder}: expected a folder with the same settings, got another {' and '.join(differing)}. Its "
                "figures do not belong to this study. Give another folder, or the settings that it began with."
            )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(
            f"{path}: expected figures of an earlier study, got {type(error).__name__}: {error}. The file is damaged. "
            "Delete it: the next study measures it again."
        ) from error


def _write(path: Path, values: dict[str, Any]) -> None:
    check_writable(path)
    write_json(path, values)
