"""The words that end an analysis, on analyses whose right words are obvious."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from modiff import presets
from modiff.cli import app
from modiff.evaluate.analysis.findings import findings

BITS = (8, 4, 2)
FLOAT_WEIGHTS = presets.modulated(None, 4)
MEANING = "(error of the output, same inputs, mean of the steps): "
OUT = f"Layers that stand out {MEANING}"
NOT_SAFE = {"plain": (0.3, 0.3), "modulated": (0.1, 0.2)}
GOOD = {"plain": (0.019, 0.5, 0.9), "modulated": (0.001, 0.005, 0.3), "tuned": (0.001, 0.002, 0.02)}


def analysis(
    sweep: dict[str, tuple[float | None, ...]] = GOOD,
    layers: tuple[float, ...] = (0.01, 0.011, 0.012),
    config: Any = FLOAT_WEIGHTS,
    **rest: Any,
) -> dict[str, Any]:
    """Errors of each mode at BITS, and of each layer, mean over two steps."""
    traces = [
        {"name": f"block.{i}", "call": 0, "steps": [{"output_relative_l2": 0.0}, {"output_relative_l2": 2 * error}]}
        for i, error in enumerate(layers)
    ]
    rows = [
        {"mode": m, "bits": b, "relative_l2": e} for m, row in sweep.items() for b, e in zip(BITS, row, strict=False)
    ]
    settings = {"steps": 50, "num_images": 4, "config": config.to_dict(), "prompts": None, "labels": None} | rest
    return {"layers": traces, "sweep": rows, "settings": settings, "outliers": [{"advice": "block.1: leave it"}]}


def told(values: dict[str, Any]) -> list[str]:
    return findings(values, "my model").splitlines()


def test_a_model_that_modulation_suits_is_told_so_in_four_lines() -> None:
    assert told(analysis()) == [
        "Safe down to: plain 8 bits, modulated 4 bits, tuned 2 bits (4 images at most 0.02 from full precision, "
        "weights in full precision).",
        "Modulation helps: at 4 bits the error is 0.005 instead of 0.5, 100 times less; and it does at all bits that "
        "ran.",
        "No layer stands out (error of the output, same inputs, mean of the steps): block.2 (0.012) is the worst, the "
        "median layer has 0.011.",
        "block.1: leave it",
        "Next: the same with weights at 8 bits: modiff analyze 'my model' --steps 50 -o analysis-2 --config "
        "modulated:8:4",
    ]


@pytest.mark.parametrize(
    ("sweep", "safe", "gain"),
    [
        # a good error at few bits is luck where more bits fail
        ({"plain": (0.03, 0.01, 0.9), "modulated": (0.001, 0.03, 0.01)},
         "plain none (0.01), modulated 8 bits",
         "helps: at 2 bits the error is 0.01 instead of 0.9, 90 times less; not at 4 bits."),
        ({"plain": (0.01, 0.1, 0.3), "modulated": (0.02, 0.1, 0.4)}, "plain 8 bits, modulated 8 bits",
         "does not help: at 2 bits the error is 0.4 instead of 0.3, and that is where it does best."),
        ({"plain": (0.01, None, None), "modulated": (0.01, 0.01, None)}, "plain 8 bits, modulated 4 bits",
         "helps: at 4 bits the error is 0.01 instead of not finite; not at 8 and 2 bits."),
        ({"plain": (0.01,), "modulated": (None,)}, "plain 8 bits, modulated none (not finite)",
         "does not help: at 8 bits the error is not finite instead of 0.01"),
        ({"plain": (0.02,), "modulated": (0.0,)}, "plain 8 bits, modulated 8 bits",
         "helps: at 8 bits the error is 0 instead of 0.02; and it does at all bits that ran."),
        ({"plain": (0.0, None), "modulated": (0.0, None)}, "plain 8 bits, modulated 8 bits",
         "helps is not to be seen: with and without it the images are the same, or not finite."),
    ],
)  # fmt: skip
def test_safe_bits_and_the_gain_also_where_there_is_none_or_images_are_not_finite(
    sweep: dict[str, tuple[float | None, ...]], safe: str, gain: str
) -> None:
    first, second, *_ = told(analysis(sweep))
    assert first.startswith(f"Safe down to: {safe} (")
    assert gain in second
    broken = [f"{m} at {b} bits" for m, row in sweep.items() for b, e in zip(BITS, row, strict=False) if e is None]
    assert all(text in first.partition("Not usable, images not finite: ")[2] for text in broken)
    assert ("Not usable" in first) == bool(broken)


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ((0.01, 0.01, 0.03, 0.01), f"{OUT}block.2 (0.03); the median layer has 0.01."),
        ((0.2, 0.5, 0.4, 0.3, *[0.1] * 9),
         f"{OUT}block.1 (0.5), block.2 (0.4), block.3 (0.3) and 1 more; the median layer has 0.1."),
        ((0.0, 0.0, 0.1), f"{OUT}block.2 (0.1); the median layer has 0."),
        ((0.25,), f"No layer stands out {MEANING}block.0 (0.25) is the worst, the median layer has 0.25."),
    ],
)  # fmt: skip
def test_layers_that_stand_out_are_named_the_worst_first(layers: tuple[float, ...], line: str) -> None:
    assert told(analysis(layers=layers))[2].endswith(line)


PROMPT = shlex.join(["--prompt", "a 'fox'"])


@pytest.mark.parametrize(
    ("values", "command"),
    [
        ({"sweep": NOT_SAFE, "steps": 10}, "analyze 'my model' --steps 20 -o analysis-2"),
        ({"sweep": NOT_SAFE, "config": presets.w4a8()}, "--steps 50 -o analysis-2 --config modulated:32:4"),
        ({"sweep": GOOD | {"uncompensated": (0.01, 0.02, 0.3)}, "config": presets.w8a4(), "prompts": ["a 'fox'"]},
         f"evaluate 'my model' {PROMPT} --steps 50 --configs "
         "plain:8:8,modulated:8:4,tuned:8:2 --report report"),
        ({"labels": [0]}, "analyze 'my model' --label 0 --steps 50 -o analysis-2 --config modulated:8:4"),
    ],
)  # fmt: skip
def test_the_last_line_is_the_command_that_answers_what_is_open(
    values: dict[str, Any], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    last = told(analysis(**values))[-1]
    assert last.endswith(command)
    name, *words = shlex.split(last.partition(": modiff ")[2])
    get_command(app).commands[name].make_context(name, words)  # raises for what the command does not take
