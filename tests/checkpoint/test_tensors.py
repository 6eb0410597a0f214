"""Weight files are looked at before they are believed: cut, hostile or mixed ones cost a line and no memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modiff.checkpoint.tensors import Expected, check_claims, read_headers, weight_files
from modiff.errors import FormatError

TENSORS = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int8)}


def raw(path: Path, header: object, data: bytes = b"", claimed: int | None = None) -> Path:
    """A file with this header, whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EXPECTED = {"a": Expected(None, (2, 3)), "b": Expected(torch.int8, (4,))}


def test_claims_tell_dtype_and_shape_and_any_floating_dtype_will_do_where_it_is_cast(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({"a": TENSORS["a"].to(dtype)}, tmp_path / "x.safetensors")
        save_file({"b": TENSORS["b"]}, tmp_path / "y.safetensors")
        claims = read_headers([tmp_path / "x.safetensors", str(tmp_path / "y.safetensors")])
        assert {name: (c.dtype, c.shape) for name, c in claims.items()} == {
            "a": (dtype, (2, 3)),
            "b": (torch.int8, (4,)),
        }
        check_claims("here", claims, EXPECTED)


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        (b"", b"", 0),
        (b"{}", b"", 2**64 - 1),
        (b"not json", b"", None),
        (b"[" * 50_000, b"", None),
        ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"1234", None),
        ({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}, bytes(8), None),
        ({"a": entry(offsets=(8, 0))}, bytes(8), None),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(0, 8))}, bytes(8), None),
        ({"a": entry()}, bytes(7), None),
        ({"a": entry(dtype="F99")}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_read(tmp_path, header, data, claimed) -> None:
    path = raw(tmp_path / "x.safetensors", header, data, claimed)
    with pytest.raises(FormatError, match=r"x\.safetensors: expected a safetensors file, got .*Copy it again\.$"):
        read_headers([path])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(content)):
        (tmp_path / "x.safetensors").write_bytes(content[:length])
        with pytest.raises(FormatError, match="missing or damaged"):
            read_headers([tmp_path / "x.safetensors"])


def test_a_missing_file_a_foreign_dtype_and_a_tensor_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.safetensors: expected a safetensors file, got FileNotFoundError"):
        read_headers([tmp_path / "gone.safetensors"])
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    with pytest.raises(FormatError, match="expected numbers that modiff writes in a, got F8_E4M3"):
        read_headers([tmp_path / "f8.safetensors"])
    for name in ("x", "y"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"y.safetensors: expected each tensor once, got a also in x\.safetensors"):
        read_headers([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, r"expected 2 tensors, got no a \(1 such\)"),
        ({"c": torch.zeros(1)}, r"expected 2 tensors, got an unknown c \(1 such\)"),
        ({"a": torch.zeros(3, 2)}, r"expected a of shape \(2, 3\) in floating point, got \(3, 2\) in torch.float32"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, r"in floating point, got \(2, 3\) in torch.int32"),
        ({"b": torch.zeros(4, dtype=torch.uint8)}, r"b of shape \(4,\) in torch.int8, got \(4,\) in torch.uint8"),
    ],
)
def test_files_must_hold_what_the_config_promises_and_no_more(tmp_path, change, message) -> None:
    tensors = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=f"^here: .*{message}.*Copy the folder again"):
        check_claims("here", read_headers([tmp_path / "x.safetensors"]), EXPECTED)


def test_weights_are_one_file_or_the_shards_of_an_index(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected model.safetensors, got none"):
        weight_files(tmp_path, "model")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert weight_files(tmp_path, "model") == (tmp_path / "model.safetensors",)
    for name in ("m1", "m2"):
        (tmp_path / name).write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m2", "b": "m1", "c": "m2"}}))
    assert weight_files(tmp_path, "model") == (tmp_path / "m1", tmp_path / "m2")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', "[" * 50_000, '{"weight_map": null}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="expected the index of a sharded checkpoint"):
        weight_files(tmp_path, "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "sub/m1", "gone", "", ".."])
def test_an_index_points_at_files_next_to_it_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m1").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="expected the names of files next to it"):
        weight_files(tmp_path, "model")
