"""What safetensors files claim to hold, compared with what they must hold, before any tensor is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from modiff.errors import FormatError
from modiff.files import read_json, reading

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What modiff writes and reads, by the names of safetensors."""


class Claim(NamedTuple):
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class Expected(NamedTuple):
    """What a tensor must be. dtype: None for any floating-point one, which is cast when it is read."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def read_headers(files: Iterable[str | Path]) -> dict[str, Claim]:
    """The claims of all files together.

    Raises: FormatError for a file that is no safetensors file, is cut, claims sizes that it does not have, holds a
        tensor of an unknown dtype, or one that another file holds as well.
    Cost: reads headers only.
    """
    claims: dict[str, Claim] = {}
    for path in map(Path, files):
        with reading(path, "a safetensors file", "Copy it again."), safe_open(path, "pt") as file:
            for name in file.keys():  # not a mapping
                if name in claims:
                    raise FormatError(f"{path}: expected each tensor once, got {name} also in "
                                      f"{claims[name].file.name}. The shards of two checkpoints are mixed. Copy the "
                                      "folder again.")  # fmt: skip
                view = file.get_slice(name)
                claims[name] = Claim(_dtype(path, name, view.get_dtype()), tuple(view.get_shape()), path)
    return claims


def _dtype(path: Path, name: str, text: str) -> torch.dtype:
    if text not in DTYPES:
        raise FormatError(f"{path}: expected numbers that modiff writes in {name}, got {text}. The file comes from "
                          "another program. Save it with modiff.save.")  # fmt: skip
    return DTYPES[text]


def check_claims(where: str | Path, claims: Mapping[str, Claim], expected: Mapping[str, Expected]) -> None:
    """Make sure that files hold exactly the tensors that the config promises. Raises: FormatError if not."""
    for kind, names in (("no", expected.keys() - claims.keys()), ("an unknown", claims.keys() - expected.keys())):
        if names:
            raise FormatError(
                f"{where}: expected {len(expected)} tensors, got {kind} {min(names)} ({len(names)} such). The weights "
                "belong to another config or were changed. Copy the folder again."
            )
    for name, (dtype, shape) in expected.items():
        claim = claims[name]
        fits = claim.dtype.is_floating_point if dtype is None else claim.dtype == dtype
        if claim.shape != shape or not fits:
            raise FormatError(
                f"{where}: expected {name} of shape {shape} in {dtype or 'floating point'}, got {claim.shape} in "
                f"{claim.dtype}. The weights belong to another config or were changed. Copy the folder again."
            )


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """`stem`.safetensors in a folder, or the shards that `stem`.safetensors.index.json lists.

    Raises: FormatError if there is neither, the index is damaged, or it points outside the folder or at nothing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise FormatError(f"{folder}: expected {single.name}, got none. The weights are missing. Copy the folder "
                              "again.")  # fmt: skip
        return (single,)
    what, advice = "the index of a sharded checkpoint", "Copy the folder again."
    with reading(index, what, advice):
        shards = sorted({str(name) for name in read_json(index, what, advice)["weight_map"].values()})
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FormatError(f"{index}: expected the names of files next to it, got {shard!r}. A shard is missing or "
                              "the index was changed. Copy the folder again.")  # fmt: skip
    return tuple(folder / shard for shard in shards)
