"""Images to compare with, from a file or a folder, a part at a time."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from modiff.errors import FormatError
from modiff.generate.shards import MANIFEST, read_images

CHUNK = 500
"""Images at a time."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_reference(path: Path) -> Iterator[np.ndarray]:
    """The images of `path` as uint8 (n, H, W, C), at most CHUNK at a time.

    Args:
        path: an .npz with the images in `arr_0`, or else in its first array; an .npy; a folder of `modiff generate`; or
            one of arrays or of pictures, in the order of their names, numbers by value. Images (N, H, W, C), or grey
            ones (N, H, W).
    Raises: FormatError if there are none, they are not uint8, or their sizes differ.
    """
    if (path / MANIFEST).is_file():
        yield from read_images(path)
        return
    shape: tuple[int, ...] | None = None
    for file in _files(path):
        images = _images(file)
        if shape not in (None, images.shape[1:]):
            raise FormatError(
                f"{file}: expected images of {_size(shape or ())} like those before, got {_size(images.shape[1:])}. "
                "A set has one size. Resize them, or take them out."
            )
        shape = images.shape[1:]
        for first in range(0, len(images), CHUNK):
            yield images[first : first + CHUNK]


def reference_digest(path: Path) -> str:
    """A digest of all bytes that `read_reference` would read. Raises: FormatError if there is nothing."""
    digest = hashlib.sha256()
    manifest = path / MANIFEST
    for file in [manifest] if manifest.is_file() else _files(path):  # the manifest holds the digests of its shards
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """The files that hold the images, in order: all arrays of a folder, or else all its pictures."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FormatError(
            f"{path}: expected a file or a folder of images, got nothing there. Give an .npz, an .npy or a folder."
        )
    inside = sorted(path.iterdir(), key=lambda file: [(0, int(part), "") if part.isdecimal() else (1, 0, part)
                                                      for part in re.split(r"(\d+)", file.name)])  # fmt: skip
    for suffixes in ((".npz", ".npy"), _PICTURES):
        found = [file for file in inside if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        if found:
            return found
    raise FormatError(
        f"{path}: expected shards (.npz, .npy) or pictures ({', '.join(_PICTURES)}), got a folder without any. "
        "Give the folder that holds the images."
    )


def _images(file: Path) -> np.ndarray:
    try:
        if file.suffix.lower() in _PICTURES:
            with Image.open(file) as picture:
                found = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))[None]
        else:
            found = _array(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{file}: expected images, got {type(error).__name__}: {error}. The file is damaged or holds something "
            "else. Write it with numpy.save or numpy.savez."
        ) from error
    if found.dtype != np.uint8 or found.ndim not in (3, 4) or not found.size:
        raise FormatError(
            f"{file}: expected uint8 images (N, H, W, C), got {found.dtype} {found.shape}. Values are 0 to 255. "
            "Convert them first, for example numpy.rint(x * 255).astype('uint8')."
        )
    return found if found.ndim == 4 else found[..., None]


def _array(file: Path) -> np.ndarray:
    with file.open("rb") as opened:
        found = np.load(opened, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            if not found.files:
                raise ValueError("no array in it")
            return found["arr_0" if "arr_0" in found.files else found.files[0]]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
