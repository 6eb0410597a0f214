"""Jobs into folders: nothing lost, nothing doubled, nothing mixed, whatever happens on the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modiff import presets
from modiff.errors import ConfigError, StateError
from modiff.generate.job import Conditions
from modiff.generate.shards import Manifest, Span, read_images
from tests.generate.fakes import FakeEngine, image, run
from tests.kills import check_kills, content


def pixels(folder: Path) -> np.ndarray:
    return np.concatenate(list(read_images(folder)))


def expected(num_images: int, seed: int = 0) -> np.ndarray:
    return np.stack([image(seed + index) for index in range(num_images)])


def test_a_folder_holds_the_images_of_the_indices_and_drawing_again_changes_no_byte(tmp_path: Path) -> None:
    done = run(tmp_path, seed=40)
    assert np.array_equal(pixels(tmp_path), expected(11, seed=40))
    assert (done.made, done.kept, done.damaged) == (11, 0, ())
    assert done.manifest == Manifest.load(tmp_path)
    before, fake = content(tmp_path), FakeEngine()
    done = run(tmp_path, engine=fake, seed=40)
    assert (done.made, done.kept, fake.drawn) == (0, 11, [])
    assert content(tmp_path) == before


def test_killed_before_any_file_operation_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    check_kills("tests.generate.fakes:extended", tmp_path, at_least=20)


def test_more_images_extend_a_folder_to_the_bytes_of_one_that_began_with_them(tmp_path: Path) -> None:
    run(tmp_path / "grown", 5)
    fake = FakeEngine()
    done = run(tmp_path / "grown", 11, fake)
    # the shard that had one image is made again with four
    assert (fake.drawn, done.kept) == ([Span(first=4, count=4), Span(first=8, count=3)], 4)
    run(tmp_path / "whole", 11)
    assert content(tmp_path / "grown") == content(tmp_path / "whole")
    fake = FakeEngine()
    for num_images in (3, 9, 11):  # fewer are the first ones, and the others stay for later
        assert run(tmp_path / "grown", num_images, fake).kept == num_images
        assert np.array_equal(pixels(tmp_path / "grown"), expected(num_images))
    assert fake.drawn == []


@pytest.mark.parametrize("how", ["a pixel", "gone", "manifest"])
def test_what_is_damaged_is_made_again_and_named(tmp_path: Path, how: str) -> None:
    run(tmp_path)
    before = content(tmp_path)
    path = tmp_path / ("manifest.json" if how == "manifest" else "shard-000001.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if how == "gone":
        path.unlink()
    fake = FakeEngine()
    done = run(tmp_path, engine=fake)
    assert fake.drawn == ([] if how == "manifest" else [Span(first=4, count=4)])
    assert done.damaged == ((path.name,) if how == "a pixel" else ())
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"config": presets.w8a8()}, "another config"),
        ({"conditions": Conditions(prompts=("a fox",), labels=(3,))}, "another labels and prompts"),
        ({"batch_size": 4}, "another batch_size"),
        ({"engine": FakeEngine(digest="other")}, "another model"),
    ],
)
def test_a_folder_never_mixes_two_jobs(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    run(tmp_path, 5)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, 11, **other)
    assert content(tmp_path) == before
    # the weights make the job, not their path; sizes that are left open are the folder's
    assert run(tmp_path, 11, model="/moved", batch_size=None, shard_size=None).made == 7


def test_a_worker_with_another_model_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine(digest="other")
    monkeypatch.setattr(fake, "describe", FakeEngine().describe)
    with pytest.raises(StateError, match="expected the same model on every machine"):
        run(tmp_path, engine=fake)
    assert sorted(content(tmp_path)) == ["job.json", "manifest.json"]
