"""A job into a folder of shards: resumed after any interruption, never mixed with another job."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from tqdm import tqdm

from modiff.errors import StateError
from modiff.files import ResumableFolder, check_writable, read_json
from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.shards import MANIFEST, SHARDS, Manifest, Span, whole_shards, write_images
from modiff.generate.worker import Description, DrawnSpan

RECORD = "job.json"
_SLACK = 1 << 20


class Engine(AbstractContextManager["Engine"], Protocol):
    """Draws spans, in any order, on whatever machines it has. It is entered before it is used, and left at the end."""

    def describe(self, job: Job) -> Description:
        """As `generate.worker.describe`."""
        ...

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        """As `generate.worker.draw_span` for each span, as they are done; `tick` hears of the images."""
        ...


class LocalEngine:
    """This process, one span after the other."""

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        worker.close()

    def describe(self, job: Job) -> Description:
        """Open the model and see what it makes."""
        return worker.describe(job)

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        """The spans in their order; `tick` hears of each batch."""
        for span in spans:
            yield worker.draw_span(job, batch_size, span, tick)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """made, kept: images drawn now, and found in the folder. damaged: shards that were made again."""

    manifest: Manifest
    made: int
    kept: int
    damaged: tuple[str, ...]
    seconds: float


def run_job(job: Job, folder: str | Path, *, engine: Engine | None = None, progress: bool = False) -> Generated:
    """Generate the images of a job into a folder of shards and a manifest; what is there already is kept.

    Image i comes from the noise of seed + i. It has the same bits whatever num_images, the number of restarts and the
    engine, for one batch size (fixed by the folder), processor, number of threads and versions of the libraries;
    otherwise it is equal up to float rounding. The manifest tells where each shard was made.

    A process that is killed at any moment loses the shard that it was at, and nothing more. The folder may then be
    extended (more images) or read in part (fewer).

    Args:
        engine: this process, if None.
        progress: a bar with rate and time left.
    Raises: ConfigError for a job that the model cannot do, or a folder of another job; StateError if another process
        writes to the folder, or images are not finite; FormatError for a model or record that cannot be read; OSError
        that names the file, also if the disk has no room for the images.
    """
    folder = Path(folder)
    check_writable(folder / MANIFEST)
    with engine or LocalEngine() as engine:
        manifest = _manifest(folder, job, engine.describe(job))
        with ResumableFolder(folder, manifest.job, record=RECORD, items=SHARDS):
            shards, damaged = whole_shards(folder, manifest)
            manifest = dataclasses.replace(manifest, shards=shards)
            _check_space(folder, manifest)
            manifest.save(folder)
            kept, spans, start = manifest.present, manifest.missing, time.perf_counter()
            with tqdm(total=job.num_images, initial=kept, unit="image", disable=not progress) as bar:
                for drawn in engine.draw(job, manifest.batch_size, spans, bar.update) if spans else ():
                    manifest = _keep(folder, manifest, drawn)
            seconds = time.perf_counter() - start
    remade = tuple(name for name in damaged if name in {manifest.file_of(span.first) for span in spans})
    return Generated(manifest=manifest, made=job.num_images - kept, kept=kept, damaged=remade, seconds=seconds)


def _manifest(folder: Path, job: Job, description: Description) -> Manifest:
    """The manifest of the job, without shards yet. Sizes that the job leaves open are those of the folder."""
    request = {
        "model": description.digest,
        "pipeline": description.pipeline,
        "scheduler": description.scheduler,
        "config": job.config,
        "steps": job.steps,
        "seed": job.seed,
        **job.conditions.to_dict(),
    }
    batch, shard = job.sizes()
    if (folder / RECORD).is_file():
        past = read_json(folder / RECORD, "the settings of a job", "Give another folder, or delete this one.")
        batch, shard = job.batch_size or past.get("batch_size", batch), job.shard_size or past.get("shard_size", shard)
    return Manifest(
        model=job.model,
        request=request,
        num_images=job.num_images,
        shape=description.shape,
        batch_size=batch,
        shard_size=shard,
    )


def _keep(folder: Path, manifest: Manifest, drawn: DrawnSpan) -> Manifest:
    """Write a shard, then the manifest that lists it: killed in between, the shard is found by its own note."""
    if drawn.digest != manifest.request["model"]:
        raise StateError(
            f"{manifest.model}: expected the same model on every machine, got another on one. Its images would be "
            "mixed with others. Copy the same folder to all machines, then run the command again."
        )
    shard = write_images(folder, manifest, drawn.first, drawn.images, drawn.environment)
    manifest = manifest.with_shard(shard)
    manifest.save(folder)
    return manifest


def _check_space(folder: Path, manifest: Manifest) -> None:
    """Raises: OSError if the images that are missing do not fit on the disk. Shards are not compressed."""
    height, width, channels = manifest.shape
    images = sum(span.count for span in manifest.missing)
    # one shard while it replaces a shorter one, headers, and the manifest
    need = (images + manifest.shard_size) * height * width * channels + _SLACK
    free = shutil.disk_usage(folder).free
    if images and free < need:
        text = f"No space left on device: {images} images need {need / 1e6:,.1f} MB, free are {free / 1e6:,.1f} MB"
        raise OSError(errno.ENOSPC, text, str(folder))
