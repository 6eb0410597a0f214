"""The models that a page offers: those of the package, and folders inside the one that the user named."""

import inspect
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from diffusers import DiffusionPipeline

from modiff.assets import INDEX, model_folder, packaged
from modiff.config import ModiffConfig, check
from modiff.evaluate.pipelines import has_static_scales
from modiff.files import read_json
from modiff.generate.samplers import set_scheduler
from modiff.hosts.host import host_of
from modiff.hosts.text import TextHost
from modiff.model.trajectory import clone
from modiff.presets import as_config

KEPT, DEPTH, MOST = 2, 4, 200  # models that stay loaded; how deep others are looked for, and how many are offered
_NAME = re.compile(r"[A-Za-z0-9_]+(:[A-Za-z0-9_]+)*")


class Facts(NamedTuple):
    """What a pipeline says of itself before its weights are read. prompt, label: whether it draws what it is told."""

    pipeline: str
    prompt: bool
    label: bool


class Loaded:
    """A pipeline in full precision, used by one request at a time, and what was last made of it, behind its key."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.quantized: tuple[Any, Any] | None = None
        self.reference: tuple[Any, Any] | None = None
        self._samplers: dict[str | None, DiffusionPipeline] = {}

    def sampling(self, sampler: str | None) -> DiffusionPipeline:
        """A pipeline with the same weights and this sampler. Raises: ConfigError for one that does not fit."""
        if sampler not in self._samplers:
            copied = clone(self.pipe)
            self._samplers[sampler] = copied if sampler is None else set_scheduler(copied, sampler)
        return self._samplers[sampler]


class Models:
    """The models that may be opened.

    root: nothing outside of this folder is read, links followed. open_model: loads a plain pipeline from a folder.
    """

    def __init__(self, root: Path, open_model: Callable[[str], DiffusionPipeline]) -> None:
        self.root = root.expanduser().resolve()
        check("root", str(root), self.root.is_dir(), "a folder", "Models are chosen inside of it. Give --root FOLDER.")
        self._open, self._loaded = open_model, lru_cache(maxsize=KEPT)(self._load)

    def choices(self) -> list[str]:
        """The models of the package, and folders of pipelines, not hidden and not linked, by their path in the root."""
        folders = (path.parent for depth in range(DEPTH) for path in self.root.glob("*/" * depth + INDEX))
        names = sorted(path.relative_to(self.root).as_posix() for path in folders if path.resolve() == path)
        return packaged() + [name for name in names if name == "." or not re.search(r"(^|/)\.", name)][:MOST]

    def folder(self, name: str) -> Path:
        """The folder of a model by its name in `choices`, or by the path of another one inside the root.

        Raises: ConfigError for a folder outside, one without a pipeline, or with links that lead outside.
        """
        name = name.strip()
        if name in packaged():
            return model_folder(name)
        folder = self._inside("model", name)
        why = f"A pipeline is a folder with {INDEX}. Pick one from the list."
        got = name if folder.is_dir() else f"{name} (no such folder)"
        check("model", got, bool(name) and (folder / INDEX).is_file(), "a folder of a diffusers pipeline", why)
        for link in (path for path in folder.rglob("*") if path.is_symlink()):
            self._inside("model", str(link.relative_to(self.root) if link.is_relative_to(self.root) else link))
        return folder

    def facts(self, name: str) -> Facts:
        """Which conditions a model takes. Raises: as `folder`; FormatError for a damaged index."""
        advice = "Copy the folder again, or write it again with pipe.save_pretrained(folder)."
        pipeline = read_json(self.folder(name) / INDEX, "the index of a diffusers pipeline", advice).get("_class_name")
        kind = getattr(diffusers, str(pipeline), None)
        known = inspect.signature(kind.__call__).parameters if isinstance(kind, type) else {}
        return Facts(str(pipeline), "prompt" in known, "class_labels" in known)

    def load(self, name: str) -> Loaded:
        """The model, read again if its files changed. To be called in its turn.

        Raises: as `folder`; FormatError for a damaged folder; ConfigError for text models and quantized ones.
        """
        folder = self.folder(name)
        changed = max(path.stat().st_mtime_ns for path in (folder, *folder.rglob("*")))
        return self._loaded(name.strip() if name.strip() in packaged() else str(folder), changed)

    def _load(self, name: str, changed: int) -> Loaded:
        pipe = self._open(name)
        why = "The page compares images. Call the pipeline from Python after modiff.apply(pipe, config)."
        draws = not isinstance(host_of(pipe), TextHost)
        check("model", f"{name} ({type(pipe).__name__})", draws, "a pipeline that makes images", why)
        return Loaded(pipe)

    def config(self, text: str, *, integers: bool) -> ModiffConfig:
        """What `modiff.apply` makes of a name; a JSON file must lie inside the root.

        Raises: ConfigError, FormatError; also for scales that must be calibrated first.
        """
        text = text.strip()
        named = not text or (_NAME.fullmatch(text) and not Path(text).is_file())
        config = as_config(text if named else self._inside("config", text))
        why = "They must be measured. Calibrate in Python, or use dynamic scales."
        check("config", "static ones", not has_static_scales(config), "dynamic scales", why)
        return config.on_integers() if integers else config

    def _inside(self, field: str, text: str) -> Path:
        """A path below the root, links and .. resolved. Raises: ConfigError for one outside."""
        try:
            path = (self.root / text).resolve()
            path.exists()
            inside = path.is_relative_to(self.root)
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
            path, inside = self.root, False
        why = "The page reads nothing else. Pick a model from the list, or start modiff ui with another --root."
        check(field, text[:200], inside, "a path inside the folder that modiff ui was started with", why)
        return path
