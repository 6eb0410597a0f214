"""A job into a folder of shards: resumed after any interruption, never mixed with another job."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from modiff.errors import StateError
from modiff.files import ResumableFolder, check_writable, read_json
from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.shards import MANIFEST, SHARDS, Manifest, Span, whole_shards, write_images
from modiff.generate.worker import Description, DrawnSpan
from modiff.progress import Bar

RECORD = "job.json"


class LocalEngine:
    """Draws spans in this process, one after the other; another engine may do so in any order, on other machines."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()

    def describe(self, job: Job) -> Description:
        """Open the model and see what it makes."""
        return worker.describe(job)

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        """The spans as they are done; `tick` hears of the images."""
        return (worker.draw_span(job, batch_size, span, tick) for span in spans)

    def close(self) -> None:
        """Let go of the model; the process has its threads again."""
        torch.set_num_threads(self._threads)
        worker.opened.cache_clear()


@dataclass(frozen=True, kw_only=True)
class Generated:
    """made, kept: images drawn now, and those that were there. damaged: shards that were made again."""

    manifest: Manifest
    made: int
    kept: int
    damaged: tuple[str, ...]
    seconds: float


def run_job(job: Job, folder: str | Path, *, engine: LocalEngine | None = None) -> Generated:
    """Generate the images of a job into a folder of shards and a manifest; what is there already is kept.

    Image i comes from the noise of seed + i. It has the same bits whatever num_images, the number of restarts and the
    engine, for one batch size (fixed by the folder), processor, number of threads and versions of the libraries;
    otherwise it is equal up to float rounding. A process that is killed loses the shard that it was at.

    engine: this process, if None.
    Raises: ConfigError for a job that the model cannot do, or a folder of another job; StateError if another process
        writes to the folder, or images are not finite; FormatError for a model or record that cannot be read; OSError
        that names the file.
    """
    folder = Path(folder)
    check_writable(folder / MANIFEST)
    with closing(engine or LocalEngine()) as engine:
        manifest = _manifest(folder, job, engine.describe(job))
        with ResumableFolder(folder, manifest.job, record=RECORD, items=SHARDS):
            shards, damaged = whole_shards(folder, manifest)
            manifest = dataclasses.replace(manifest, shards=shards)
            manifest.save(folder)
            kept, spans, start = manifest.present, manifest.missing, time.perf_counter()
            with Bar(total=job.num_images, initial=kept, unit="image") as bar:
                for drawn in engine.draw(job, manifest.batch_size, spans, bar.update) if spans else ():
                    manifest = _keep(folder, manifest, drawn)
            seconds = time.perf_counter() - start
    remade = tuple(name for name in damaged if name in {manifest.file_of(span.first) for span in spans})
    return Generated(manifest=manifest, made=job.num_images - kept, kept=kept, damaged=remade, seconds=seconds)


def _manifest(folder: Path, job: Job, description: Description) -> Manifest:
    """The manifest of the job, without shards yet. Sizes that the job leaves open are those of the folder."""
    facts, shape = description
    config = None if job.config is None else job.config.to_dict()
    request = facts | {"config": config, "steps": job.steps, "seed": job.seed}
    batch, shard = job.sizes()
    if (folder / RECORD).is_file():
        past = read_json(folder / RECORD, "the settings of a job", "Give another folder, or delete this one.")
        batch, shard = job.batch_size or past.get("batch_size", batch), job.shard_size or past.get("shard_size", shard)
    return Manifest(model=job.model, request=request | job.conditions.to_dict(), num_images=job.num_images,
                    shape=shape, batch_size=batch, shard_size=shard)  # fmt: skip


def _keep(folder: Path, manifest: Manifest, drawn: DrawnSpan) -> Manifest:
    """Write a shard, then the manifest that lists it: killed in between, the shard is known by its own note."""
    if drawn.digest != manifest.request["model"]:
        raise StateError(
            f"{manifest.model}: expected the same model on every machine, got another on one. Its images would be "
            "mixed with others. Copy the same folder to all machines, then run the command again."
        )
    manifest = manifest.with_shard(write_images(folder, manifest, drawn.first, drawn.images, drawn.environment))
    manifest.save(folder)
    return manifest
