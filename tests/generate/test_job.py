"""A job says no to what means nothing, before any model is open; prompts and classes go by the index of the image."""

from pathlib import Path
from typing import Any

import pytest

from modiff.config import LayerConfig, ModiffConfig, QuantizerConfig
from modiff.errors import ConfigError, FormatError
from modiff.generate.job import Conditions, Job, parse_labels, read_prompts


def job(**changes: Any) -> Job:
    return Job(**{"model": "m", "num_images": 1000} | changes)


def test_sizes_of_a_new_folder() -> None:
    assert (job().sizes(), job(num_images=7).sizes(), job(batch_size=30).sizes()) == ((50, 100), (7, 105), (30, 120))
    assert [job(shard_size=size, num_images=9).sizes() for size in (101, 64)] == [(1, 101), (8, 64)]
    assert job(shard_size=64, batch_size=4).sizes() == (4, 64)


STATIC = LayerConfig(activation=QuantizerConfig(dynamic=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "threads: expected 1 or more"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"seed": 2**62}, r"less than 2\*\*62"),
        ({"batch_size": 3, "shard_size": 100}, "expected a multiple of batch_size=3, got 100"),
        ({"config": ModiffConfig(overrides=(("mid*", STATIC),))}, "expected dynamic scales, got 'static ones'"),
    ],
)
def test_a_job_that_means_nothing_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**changes)


def test_a_config_without_activations_to_scale_is_no_static_one() -> None:
    layer = LayerConfig(activation=QuantizerConfig(bits=None, dynamic=False))
    assert job(config=ModiffConfig(layer=layer)).config is not None


def test_images_take_prompts_and_classes_in_turn_by_their_index() -> None:
    conditions = Conditions(prompts=("a", "b", "c"), labels=(5, 9))
    assert conditions.of(range(4, 8)) == {"prompt": ["b", "c", "a", "b"], "label": [5, 9, 5, 9]}
    assert Conditions().of([0]) == {"prompt": None, "label": None}


def test_labels_are_numbers_and_ranges() -> None:
    assert [parse_labels(text) for text in ("7", "0-1, 5-5,2", "3,1,1")] == [(7,), (0, 1, 5, 2), (3, 1, 1)]
    for text in ("", "a", "3-1", "-1", "1,", "1-2-3", "0.5", "0-99999,1"):
        with pytest.raises(ConfigError, match="labels: expected numbers and ranges"):
            parse_labels(text)


def test_a_prompt_is_a_line_that_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content in (None, b" \n\n", b"\xff\xfe\x00bad"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FormatError, match=r"prompts\.txt: expected a text file with a prompt in each line"):
            read_prompts(path)
    path.write_bytes(b"a red fox\n\n  two c\xc3\xa4ts, sitting \r\n")
    assert read_prompts(path) == ("a red fox", "two cäts, sitting")
