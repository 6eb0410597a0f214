"""Images as bytes: those that were drawn, and real ones from files."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from modiff.errors import FormatError
from modiff.evaluate.pipelines import DrawnImages
from modiff.files import reading
from modiff.generate.shards import MANIFEST, read_images, to_uint8

CHUNK = 500
"""Real images at a time."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def as_bytes(drawn: DrawnImages) -> DrawnImages:
    """Images in [0, 1] as `to_uint8` rounds them; NaN becomes 0, and images that are not finite are counted."""
    broken = int((~np.isfinite(drawn.images)).any(axis=(1, 2, 3)).sum())
    return drawn._replace(images=to_uint8(np.nan_to_num(drawn.images, nan=0.0)), broken=broken)


def read_reference(path: Path) -> Iterator[np.ndarray]:
    """The real images of `path` as uint8 (n, H, W, C), at most CHUNK at a time.

    Args:
        path: an .npz with the images in `arr_0`, or otherwise in its first array; an .npy; a folder of `modiff
            generate`; or one of pictures. Images (N, H, W, C), or grey ones (N, H, W).
    Raises: FormatError if there are none, they are not uint8, or their sizes differ.
    """
    if (path / MANIFEST).is_file():
        yield from read_images(path)
        return
    shape: tuple[int, ...] | None = None
    for file in _files(path):
        images = _read_file(file)
        if shape not in (None, images.shape[1:]):
            raise FormatError(
                f"{file}: expected images of {_size(shape or ())} like those before, got {_size(images.shape[1:])}. "
                "A set has one size. Resize them, or take them out."
            )
        shape = images.shape[1:]
        for first in range(0, len(images), CHUNK):
            yield images[first : first + CHUNK]


def reference_digest(path: Path, shape: tuple[int, ...] | None = None, least: int = 1) -> str:
    """A digest of the images of `read_reference`, in whatever files.

    Raises: FormatError if there is nothing, fewer images than `least`, or another size than `shape`.
    """
    digest, count, size = hashlib.sha256(), 0, ()
    for images in read_reference(path):
        size = images.shape[1:]
        digest.update((b"" if count else f"{size}".encode()) + images.tobytes())
        count += len(images)
    if shape not in (None, size) or count < least:
        raise FormatError(
            f"{path}: expected {least} images or more of {_size(shape or size)} like those of the model, got {count} "
            f"of {_size(size)}. A distance of sets needs a set, and features change with the size. Give more images, "
            "or pad or resize them as the model's training did."
        )
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """A file, or the pictures of a folder in the order of their names, numbers by value."""
    if path.is_file():
        return [path]
    inside = sorted(path.iterdir(), key=lambda file: [(0, int(text), "") if text.isdecimal() else (1, 0, text)
                                                      for text in re.split(r"(\d+)", file.name)]
                    ) if path.is_dir() else []  # fmt: skip
    files = [file for file in inside if file.suffix.lower() in _PICTURES and not file.name.startswith(".")]
    if not files:
        raise FormatError(
            f"{path}: expected a file or a folder of pictures ({', '.join(_PICTURES)}), got none there. Give an .npz, "
            "an .npy or the folder that holds the images."
        )
    return files


def _read_file(file: Path) -> np.ndarray:
    advice = "Values are 0 to 255, for example from numpy.rint(x * 255).astype('uint8')."
    with reading(file, "uint8 images (N, H, W, C)", advice):
        if file.suffix.lower() in _PICTURES:
            with Image.open(file) as picture:
                images = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))[None]
        else:
            with file.open("rb") as opened:
                images = np.load(opened, allow_pickle=False)
                if not isinstance(images, np.ndarray):
                    images = images["arr_0" if "arr_0" in images.files else images.files[0]]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
            raise ValueError(f"{images.dtype} {images.shape}")
    return images if images.ndim == 4 else images[..., None]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
