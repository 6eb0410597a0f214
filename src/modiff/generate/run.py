"""A job into a folder of shards: taken up again after any interruption, never mixed with another job."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from modiff.config import ModiffConfig
from modiff.errors import ConfigError, StateError
from modiff.files import check_writable
from modiff.generate.engines import Engine, LocalEngine
from modiff.generate.job import Job
from modiff.generate.shards import MANIFEST, SHARDS, Manifest, whole_shards, write_shard
from modiff.generate.worker import Description, Drawn

LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """made, kept: how many of the images asked for, now and before. damaged: shards that were made anew."""

    manifest: Manifest
    made: int
    kept: int
    damaged: tuple[str, ...]
    seconds: float


def generate_to_shards(job: Job, folder: str | Path, *, engine: Engine | None = None) -> Manifest:
    """Generate the images of a job into a folder of shards and a manifest; what is there already is kept.

    Image i comes from the noise of seed + i. It has the same bits whatever num_images, the number of restarts and the
    engine, for one batch size (fixed by the folder), processor, number of threads and versions of the libraries; else
    it is equal up to float rounding. The manifest tells where each shard was made.

    A process that is killed at any moment loses the shard that it was at, and nothing else. The folder may then be
    extended (more images) or read in part (fewer).

    Args:
        engine: this process, if None.
    Raises: ConfigError for a job that the model cannot do, or a folder of another job; StateError if another process
        writes to the folder, or images are not finite; FormatError for a model or manifest that cannot be read;
        OSError that names the file, also if the disk has no room for the images.
    """
    return run_job(job, folder, engine=engine).manifest


def run_job(job: Job, folder: str | Path, *, engine: Engine | None = None, progress: bool = False) -> Outcome:
    """As `generate_to_shards`, and say what was done; `progress` shows a bar with rate and time left."""
    folder = Path(folder)
    check_writable(folder / MANIFEST)
    with _alone(folder), engine or LocalEngine() as engine:
        manifest = _claim(folder, job, engine.describe(job))
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
    return Outcome(manifest=manifest, made=job.num_images - kept, kept=kept, damaged=remade, seconds=seconds)


def _keep(folder: Path, manifest: Manifest, drawn: Drawn) -> Manifest:
    """Write a shard, then the manifest that lists it: killed in between, the shard is found by its own note."""
    if drawn.digest != manifest.request["digest"]:
        raise StateError(
            f"{manifest.model}: expected the same model on every machine, got another on one. Its images would be "
            "mixed with others. Copy the same folder to all machines, then run the command again."
        )
    shard = write_shard(folder, manifest, drawn.first, drawn.images, drawn.environment)
    manifest = manifest.with_shard(shard)
    manifest.save(folder)
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when a process dies; clear what a killed one left half written."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(
            f"{folder}: expected a folder that no other process writes to, got one in use. Two would draw the same "
            "images. Wait for the other one, or give another folder."
        ) from error
    try:
        for pattern in (f".{SHARDS}.*.tmp", f".{MANIFEST}.*.tmp"):
            for half in folder.glob(pattern):
                half.unlink()
        yield
    finally:
        lock.release()


def _claim(folder: Path, job: Job, found: Description) -> Manifest:
    """The manifest of a new folder, or the one that is there, if it is of the same job; with the job's num_images."""
    config = job.modiff_config
    request = {
        "digest": found.digest,
        "pipeline": found.pipeline,
        "scheduler": found.scheduler,
        "config": None if config is None else config.to_dict(),
        "steps": job.steps,
        "seed": job.seed,
        "prompt": job.prompt,
        "label": job.label,
        "prompts": None if job.prompts is None else list(job.prompts),
        "labels": None if job.labels is None else list(job.labels),
    }
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        _check_same(folder, job, manifest, json.loads(json.dumps(request)))
        return dataclasses.replace(manifest, num_images=job.num_images)
    foreign = sorted(folder.glob(SHARDS))
    if foreign:
        raise ConfigError(
            f"{folder}: expected a folder without shards, got {foreign[0].name} and no {MANIFEST}. Nothing says what "
            "these images are. Give another folder."
        )
    batch, shard = job.sizes()
    return Manifest(
        model=job.model,
        request=request,
        num_images=job.num_images,
        shape=found.shape,
        batch_size=batch,
        shard_size=shard,
    )


def _check_same(folder: Path, job: Job, manifest: Manifest, request: dict[str, Any]) -> None:
    past = manifest.request
    if past.get("config") is not None:  # written before a setting existed: it had the value that is now the default
        past = past | {"config": ModiffConfig.from_dict(past["config"]).to_dict()}
    names = {"digest": "model"}
    differing = [names.get(key, key) for key in request if request[key] != past.get(key)]
    sizes = {"batch-size": (job.batch_size, manifest.batch_size), "shard-size": (job.shard_size, manifest.shard_size)}
    differing += [name for name, (asked, there) in sizes.items() if asked not in (None, there)]
    if differing:
        raise ConfigError(
            f"{folder}: expected a folder of the same job, got one with another {' and '.join(differing)}. Its images "
            f"do not belong to this job. Give another folder, or the options that {MANIFEST} tells."
        )


def _check_space(folder: Path, manifest: Manifest) -> None:
    """Raises: OSError if the images that are missing do not fit on the disk. Shards are not compressed."""
    height, width, channels = manifest.shape
    images = sum(span.count for span in manifest.missing)
    # the last term: one shard while it takes the place of a shorter one, headers, and the manifest
    need = (images + manifest.shard_size) * height * width * channels + _SLACK
    free = shutil.disk_usage(folder).free
    if images and free < need:
        text = f"No space left on device: {images} images need {_megabytes(need)}, free are {_megabytes(free)}"
        raise OSError(errno.ENOSPC, text, str(folder))


_SLACK = 1 << 20


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
