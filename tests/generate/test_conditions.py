"""Prompts and classes by the index of the image, and how they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modiff.errors import ConfigError, FormatError
from modiff.generate.conditions import Conditions, parse_labels, read_prompts


def test_images_take_them_in_turn_by_their_index() -> None:
    conditions = Conditions(prompts=("a", "b", "c"), labels=(5, 9))
    assert conditions.prompts_of(range(4, 9)) == ["b", "c", "a", "b", "c"]
    assert conditions.labels_of([7, 0, 1, 2]) == [9, 5, 9, 5]
    assert (Conditions().prompts_of([0]), Conditions().labels_of([0])) == (None, None)


@pytest.mark.parametrize(("text", "labels"), [("7", (7,)), ("0-1, 5-5,2", (0, 1, 5, 2)), ("3,1,1", (3, 1, 1))])
def test_labels_are_numbers_and_ranges(text: str, labels: tuple[int, ...]) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,", "1-2-3", "0.5", "0-99999,1"])
def test_other_labels_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--labels: expected numbers and ranges"):
        parse_labels(text)


@pytest.mark.parametrize(
    "content", [None, b" \n\n", b"\xff\xfe\x00bad", b"a red fox\n\n  two c\xc3\xa4ts, sitting \r\n"]
)
def test_a_prompt_is_a_line_that_is_not_empty(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    if content and b"fox" in content:
        assert read_prompts(path) == ("a red fox", "two cäts, sitting")
    else:
        with pytest.raises(FormatError, match=r"prompts\.txt: expected a text file with a prompt in each line"):
            read_prompts(path)
