"""Calibration sets on disk: what comes back is what went in, and nothing else is taken for a set."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from modiff import CalibrationError, CalibrationSet, Call, ConfigError, FormatError
from modiff.calibration import data as shards
from modiff.calibration.data import LazyCalls
from tests.helpers import assert_same_bits


def call(step: int = 0, trajectory: int = 0, previous: Call | None = None, **kwargs) -> Call:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step + 100 * trajectory))
    return Call((x, 1000 - step), kwargs, step, 1000.0 - step, "default", trajectory, (0, 2), previous)


def test_a_set_comes_back_with_every_bit_and_every_kind_of_value(tmp_path):
    text = torch.randn(2, 4).half()
    nested = {"a": [torch.arange(3), None], "b": (torch.tensor(True), 0.1, "word", -1, False)}
    first = call(0, nested=nested, text=text, same=text)
    written = [first, call(1, previous=first), call(0, trajectory=3)]
    CalibrationSet(written, {"steps": 4}).save(tmp_path)
    loaded = CalibrationSet.load(tmp_path)
    assert loaded.settings == {"steps": 4}
    assert len(loaded) == 3
    for mine, true in zip(loaded, written, strict=True):
        for field in ("step", "timestep", "context", "trajectory", "rows"):
            assert getattr(mine, field) == getattr(true, field)
        assert_same_bits(mine.args[0], true.args[0])
        assert mine.args[1] == true.args[1]
    assert list(loaded[0].kwargs) == ["nested", "text", "same"]
    again = loaded[0].kwargs["nested"]
    assert_same_bits(again["a"][0], torch.arange(3))
    assert (type(again["a"]), again["a"][1], again["b"][1:]) == (list, None, (0.1, "word", -1, False))
    assert_same_bits(loaded[0].kwargs["text"], text)
    assert_same_bits(loaded[1].previous.args[0], first.args[0])
    assert loaded[1].previous.previous is loaded[0].previous is None


def test_a_tensor_that_calls_share_is_stored_once_and_views_of_one_memory_each(tmp_path):
    text, memory = torch.randn(1000), torch.arange(12.0).reshape(3, 4)
    CalibrationSet([call(0, text=text), call(1, text=text, a=memory[1:], b=memory.T)]).save(tmp_path)
    with safe_open(shards._shard_path(tmp_path, 0, 0), "pt") as file:
        assert sum(file.get_tensor(name).numel() == 1000 for name in file.keys()) == 1
    loaded = CalibrationSet.load(tmp_path)[1]
    assert_same_bits(loaded.kwargs["a"], memory[1:])
    assert_same_bits(loaded.kwargs["b"], memory.T)


def test_what_needs_pickle_is_refused_and_leaves_no_shard_and_sets_do_not_mix(tmp_path):
    with pytest.raises(CalibrationError, match="expected tensors, numbers, strings and containers of them, got object"):
        CalibrationSet([call(0, odd=object())]).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "calibration.json"]
    with pytest.raises(ConfigError, match="got one with another seed and steps"):
        CalibrationSet([call()], {"steps": 5, "seed": 1}).save(tmp_path)


SHARD = "trajectory-00000-000.safetensors"
NO_CALLS = {"format": shards.FORMAT, "format_version": "1", "last": "True", "calls": "[3]"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("calibration.json", b"{", "expected the settings of a calibration set, got JSONDecodeError"),
        ("calibration.json", b'{"format_version": 99}', "expected format_version 1, got 99"),
        (SHARD, b"\0" * 100, "expected a shard of a calibration set, got SafetensorError"),
        (SHARD, save({"x": torch.zeros(1)}, {"format": "pt"}), "got ValueError: a file of format 'pt'"),
        (SHARD, save({"x": torch.zeros(1)}, NO_CALLS), "got TypeError: calls that are no list"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, name, content, message):
    CalibrationSet([call()]).save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        CalibrationSet.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("args", [{"tuple": [{"tensor": "t99"}]}, {"set": [1]}, {"tuple": 3}, {"a": 1, "b": 2}])
def test_a_header_that_does_not_fit_its_file_is_one_clear_error(tmp_path, args):
    CalibrationSet([call()]).save(tmp_path)
    path = shards._shard_path(tmp_path, 0, 0)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    calls = json.loads(header["calls"])
    save_file({"t0": torch.zeros(1)}, path, metadata=header | {"calls": json.dumps([calls[0] | {"args": args}])})
    with pytest.raises(FormatError, match="expected a shard of a calibration set"):
        CalibrationSet.load(tmp_path)[0]


def test_a_set_of_which_a_trajectory_or_a_last_shard_is_missing_is_not_taken_for_a_smaller_one(tmp_path):
    with shards.shard_folder(tmp_path / "parts", {}):
        pass
    for trajectory, number, last in ((0, 0, False), (1, 0, False), (1, 1, True), (1, 2, True)):  # the last is left over
        shards.write_shard(tmp_path / "parts", trajectory, number, [call(number, trajectory)], last=last)
    assert [(c.trajectory, c.step) for c in CalibrationSet.load(tmp_path / "parts")] == [(1, 0), (1, 1)]
    CalibrationSet([call(0), call(0, 1), call(0, 2)], {"trajectories": 3}).save(tmp_path)
    chosen = LazyCalls([2, 1], CalibrationSet.load(tmp_path).__getitem__)  # each is read when it is asked for
    assert [(len(c), c[-1].trajectory) for c in (chosen, chosen[1:], chosen[:1])] == [(2, 1), (1, 1), (1, 2)]
    shards._shard_path(tmp_path, 1, 0).unlink()
    assert chosen[0].trajectory == 2
    with pytest.raises(FormatError):
        chosen[1]
    with pytest.raises(FormatError, match="expected 3 trajectories, got 2 complete ones"):
        CalibrationSet.load(tmp_path)
