"""Many images in a folder: shards of a fixed size, each whole or not there, and a manifest that says what they are.

A shard is a safetensors file with one tensor, `images` (N, H, W, C) uint8, and as metadata the job that it belongs to,
its first index and a checksum. So a shard that was finished just before a kill is known without the manifest.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from modiff.config import check
from modiff.errors import ConfigError, FormatError
from modiff.files import read_json, read_tensors, reading, write_atomically, write_json, write_tensors

MANIFEST = "manifest.json"
SHARDS = "shard-*.safetensors"
FORMAT = 1
ROUNDING = "round half to even of clamp(x / 2 + 0.5, 0, 1) * 255"
ARRAY = "arr_0"
_NOTE = "modiff"
_AGAIN = "Run modiff generate again with the same options: it makes again what is not whole."


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as codes 0 to 255: round half to even of 255 x, in float64, where the product is exact.

    Args:
        images: any shape, finite; values outside [0, 1] are clipped.

    >>> to_uint8(np.array([0.0, 0.5, 1.5 / 255, 1.0]))
    array([  0, 128,   2, 255], dtype=uint8)
    """
    return np.rint(np.clip(images.astype(np.float64), 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Images first, ..., first + count - 1."""

    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Shard(Span):
    """A file of whole images. sha256: of the file. environment: where it was made, as `generate.environment` tells."""

    file: str
    sha256: str
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds.

    model: as it was typed, for the reader only. request: all that shapes the images (digest of the model, config,
        scheduler, steps, seed, prompts, labels); plain JSON values.
    num_images: of the last job; a folder may hold more. shape: (H, W, C) of one image.
    batch_size, shard_size: images computed at a time, which decides how kernels sum, and per file; fixed for a folder.
    """

    model: str
    request: dict[str, Any]
    num_images: int
    shape: tuple[int, int, int]
    batch_size: int
    shard_size: int
    shards: tuple[Shard, ...] = ()

    @property
    def job(self) -> dict[str, Any]:
        """All that decides the content of the shards, as JSON values."""
        sizes = {"batch_size": self.batch_size, "shard_size": self.shard_size, "shape": list(self.shape)}
        return {"format": FORMAT, "rounding": ROUNDING} | self.request | sizes

    @property
    def fingerprint(self) -> str:
        """sha256 of what every shard of this folder has in common."""
        return hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()

    @property
    def missing(self) -> tuple[Span, ...]:
        """The shards to make: those that are not there, and those with too few images."""
        there = {shard.first: shard.count for shard in self.shards}
        spans = (
            Span(first=first, count=min(self.shard_size, self.num_images - first))
            for first in range(0, self.num_images, self.shard_size)
        )
        return tuple(span for span in spans if there.get(span.first, 0) < span.count)

    @property
    def present(self) -> int:
        """How many of the `num_images` images are there."""
        return self.num_images - sum(span.count for span in self.missing)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where the shards were made; more than one means that images are repeatable only up to float rounding."""
        unique: list[dict[str, Any]] = []
        for shard in self.shards:
            unique += [] if shard.environment in unique else [shard.environment]
        return unique

    def file_of(self, first: int) -> str:
        """The name of the shard that begins with image `first`."""
        return f"shard-{first // self.shard_size:06d}.safetensors"

    def with_shard(self, shard: Shard) -> Self:
        """This manifest and one shard more, which replaces one with the same first image."""
        shards = {one.first: one for one in (*self.shards, shard)}
        return dataclasses.replace(self, shards=tuple(shards[first] for first in sorted(shards)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Shards refer to the list of environments."""
        environments = self.environments
        shards = [vars(shard) | {"environment": environments.index(shard.environment)} for shard in self.shards]
        listed = {"shape": list(self.shape), "environments": environments, "shards": shards}
        return {"format": FORMAT, "rounding": ROUNDING} | vars(self) | listed

    def save(self, folder: Path) -> None:
        """Write it into the folder, atomically. Raises: OSError that names the file."""
        write_json(folder / MANIFEST, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read it from a folder. Raises: FormatError if there is none, or it cannot be read."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FormatError(
                f"{folder}: expected a folder of modiff generate, got one without {MANIFEST}. Nothing says what its "
                "files are. Make one with modiff generate MODEL -o DIR."
            )
        with reading(path, f"the manifest of modiff generate, format {FORMAT}", _AGAIN):
            values = read_json(path, "the manifest of modiff generate", _AGAIN)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            places = dict(enumerate(values.pop("environments")))
            shards = [Shard(**entry | {"environment": places[entry["environment"]]}) for entry in values["shards"]]
            del values["rounding"]
            height, width, channels = values["shape"]
            fields: dict[str, Any] = {"shape": (height, width, channels), "request": dict(values["request"])}
            made = cls(**values | fields | {"shards": tuple(shards)})
            sizes = [made.num_images, made.batch_size, made.shard_size, height, width, channels]
            sizes += [number for shard in shards for number in (shard.count, shard.first + 1)]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"sizes {sizes}")
            for shard in shards:
                if shard.file != made.file_of(shard.first):  # nothing outside the folder is read
                    raise ValueError(f"file {shard.file} for the images from {shard.first} on")
        return made


def write_images(
    folder: Path, manifest: Manifest, first: int, images: np.ndarray, environment: dict[str, Any]
) -> Shard:
    """Write images first, first + 1, ... to their file, atomically: the same bytes whenever the images are the same.

    Raises: OSError that names the file.
    """
    images = np.ascontiguousarray(images)
    note = {"job": manifest.fingerprint, "first": first, "environment": environment}
    # one key: safetensors does not keep the order of several
    facts = {_NOTE: json.dumps(note | {"sha256": _checksum(note, images)})}
    name = manifest.file_of(first)
    write_tensors(folder / name, {"images": torch.from_numpy(images)}, facts)
    return Shard(file=name, first=first, count=len(images), sha256=_sha256(folder / name), environment=environment)


def read_shard(folder: Path, file: str, manifest: Manifest) -> tuple[Shard, np.ndarray]:
    """A shard and its images, checked against its own checksum.

    Raises: FormatError if it is damaged; ConfigError if it is whole and belongs to another job or another index.
    """
    path = folder / file
    with reading(path, "a whole shard", _AGAIN):
        tensors, facts = read_tensors(path, "a whole shard", _AGAIN)
        images, note = tensors["images"].numpy(), json.loads(facts[_NOTE])
        checksum = note.pop("sha256")
        job, first, environment = note["job"], note["first"], note["environment"]
        if checksum != _checksum(note, images) or images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError("another checksum than it was written with")
    if job != manifest.fingerprint or manifest.file_of(first) != file:
        got = "one of another job" if job != manifest.fingerprint else f"the images from {first} on"
        raise ConfigError(
            f"{path}: expected a shard of this job under its own name, got {got}. It would be mixed with images "
            "that it does not belong to. Move it away, or give another folder."
        )
    return Shard(file=file, first=first, count=len(images), sha256=_sha256(path), environment=environment), images


def whole_shards(folder: Path, manifest: Manifest) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """The shards that lie in the folder, listed in the manifest or not, and the names of those that are damaged.

    Raises: ConfigError for a shard of another job.
    Cost: reads every shard once.
    """
    whole: list[Shard] = []
    damaged: list[str] = []
    for path in sorted(folder.glob(SHARDS)):
        try:
            whole.append(read_shard(folder, path.name, manifest)[0])
        except FormatError:
            damaged.append(path.name)
    return tuple(sorted(whole, key=lambda shard: shard.first)), tuple(damaged)


def read_images(folder: str | Path, num_images: int | None = None) -> Iterator[np.ndarray]:
    """The images of a folder in index order, a shard at a time: uint8 (n, H, W, C), n at most the shard size.

    Args:
        num_images: the first ones; None for those of the last job.
    Raises: FormatError, at once, if the folder holds fewer or has no manifest, and on the way if a shard is damaged.
    Cost: one shard in memory.
    """
    folder, listed = Path(folder), Manifest.load(folder)
    count = listed.num_images if num_images is None else num_images
    manifest = dataclasses.replace(listed, num_images=count)
    if count < 1 or manifest.missing:
        raise FormatError(
            f"{folder}: expected {count} images, got {manifest.present} in whole shards. The job is not at its end, or "
            "was for fewer. Run modiff generate again with the same options: it goes on where it stopped."
        )
    return (_listed(folder, shard, manifest)[: count - shard.first] for shard in manifest.shards if shard.first < count)


def _listed(folder: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    read, images = read_shard(folder, shard.file, manifest)
    with reading(folder / shard.file, "a whole shard", _AGAIN):
        if read.sha256 != shard.sha256:
            raise ValueError(f"another sha256 than {MANIFEST} says")
    return images


def export_npz(
    folder: str | Path, path: str | Path, *, num_images: int | None = None, rgb: bool = False
) -> tuple[int, int, int, int]:
    """Write the images of a folder, in index order, as `arr_0` (N, H, W, C) uint8 into an npz file, atomically.

    num_images: the first ones; None for those of the last job.
    rgb: repeat grey images in three channels, which Inception networks expect.
    Returns: the shape of the array.
    Raises: FormatError if images are missing or damaged; ConfigError for `rgb` with two or four channels; OSError.
    Cost: one shard in memory; the same bytes in the file for the same images.
    """
    read_images(folder, num_images)  # complete? asked before a file is touched
    manifest = Manifest.load(folder)
    height, width, channels = manifest.shape
    check("rgb", channels, not rgb or channels in (1, 3), "images of 1 or 3 channels", "Leave `rgb` out.")
    shape = (num_images or manifest.num_images, height, width, 3 if rgb else channels)
    write_atomically(path, lambda file: _write(file, folder, shape))
    return shape


def _write(file: BinaryIO, folder: str | Path, shape: tuple[int, int, int, int]) -> None:
    """An npz by hand, because numpy wants the whole array at once: a stored zip member with an npy header."""
    head = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:  # dated 1980, so bytes repeat
            np.lib.format.write_array_header_1_0(member, head)
            for images in read_images(folder, shape[0]):
                full = np.broadcast_to(images, (len(images), *shape[1:]))
                member.write(np.ascontiguousarray(full).data)


def _checksum(note: dict[str, Any], images: np.ndarray) -> str:
    """sha256 over a shard's note and pixels."""
    total = hashlib.sha256(json.dumps(note).encode())
    total.update(images.reshape(-1).data)
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
