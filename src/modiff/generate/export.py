"""All images of a folder as one array in a file that numpy and the ADM evaluation suite read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modiff.errors import ConfigError
from modiff.files import write_atomically
from modiff.generate.shards import Manifest, read_images

ARRAY = "arr_0"


def export_npz(
    folder: str | Path, path: str | Path, *, num_images: int | None = None, rgb: bool = False
) -> tuple[int, int, int, int]:
    """Write the images of a folder, in index order, as `arr_0` (N, H, W, C) uint8 into an npz file, atomically.

    Args:
        num_images: the first ones; None for those of the last job.
        rgb: repeat grey images in three channels, which Inception networks expect.
    Returns: the shape of the array.
    Raises: FormatError if images are missing or damaged; ConfigError for `rgb` with images of two or four channels;
        OSError that names the file.
    Cost: one shard in memory; the same bytes in the file for the same images.
    """
    read_images(folder, num_images)  # complete? asked before a file is touched
    manifest = Manifest.load(folder)
    height, width, channels = manifest.shape
    if rgb and channels not in (1, 3):
        raise ConfigError(
            f"--rgb: expected images of 1 or 3 channels, got {channels}. Only grey has a meaning in three channels. "
            "Leave --rgb out."
        )
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
