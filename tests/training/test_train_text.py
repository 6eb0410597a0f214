"""Training of the text model: what it reads, its loss, and that an interrupted run goes on as if it had not been."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers import assert_same_tensors
from tests.training.conftest import Clock


@pytest.fixture(scope="module")
def text(script):
    return script("train_text")


@pytest.fixture
def verses(tmp_path):
    path = tmp_path / "verses.jsonl"
    lines = [
        {"book": "A", "chapter": i // 2, "text": f"The Lord's word, {'abcdefghij'[i % 10] * 9}."} for i in range(80)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def options(text, verses, folder, *more):
    small = "--minutes 0.2 --width 16 --layers 1 --heads 1 --length 12 --batch 4 --threads 1 --save-every 1e9".split()
    return text.parse_arguments(["--text", str(verses), "-o", str(folder), *small, *more])


def test_letters_are_words_of_a_to_z_and_every_twentieth_document_is_held_out(text, verses):
    assert text.letters("God's  WORD, said:\n“It is 1 good.”") == "gods word said it is good"
    chapters = text.documents(verses)
    assert len(chapters) == 40
    assert chapters["A 0"] == "the lords word aaaaaaaaa the lords word bbbbbbbbb"
    train, held = text.divided(chapters)
    assert held == f"{chapters['A 10']} {chapters['A 30']}"
    assert len(train) == sum(len(c) + 1 for c in chapters.values()) - len(held) - 2


def test_the_loss_is_the_bound_which_a_model_that_knows_nothing_meets_at_the_logarithm_of_the_vocabulary(text, verses):
    tokens = torch.arange(1000) % 26
    rows, weights = text.masked_rows(tokens, 64, 20, torch.Generator().manual_seed(0))
    assert ((rows[:, 1:] - rows[:, :-1]) % 26 == 1).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(64))  # a mean over what is masked
    counts = (weights > 0).sum(1)
    assert counts.min() == 1
    assert counts.max() == 20
    assert abs(counts.double().mean() - 10.5) < 0.3  # evenly drawn
    model = text.CharacterTransformer(width=16, layers=1, heads=1)
    assert text.bound(model, rows, weights).item() == pytest.approx(math.log(28), abs=0.06)
    assert text.held_out_bits(model, tokens, 20, 1) == pytest.approx(math.log2(28), abs=0.08)


def test_a_run_learns_and_one_that_is_interrupted_ends_with_the_same_bits(text, verses, tmp_path, monkeypatch):
    saved = []
    for name, interrupt_at in (("whole", 0), ("halves", 9)):
        clock = Clock(interrupt_at)
        clock.process_time = clock.time
        monkeypatch.setattr(text, "time", clock)
        text.train(options(text, verses, tmp_path / name))
        if interrupt_at:
            assert json.loads((tmp_path / name / "training.json").read_text())["step"] < 12
            text.train(options(text, verses, tmp_path / name))
        saved.append(load_file(tmp_path / name / "pipeline" / "model" / "diffusion_pytorch_model.safetensors"))
        card = json.loads((tmp_path / name / "training.json").read_text())
        assert (card["step"], card["text"], card["rows_seen"]) == (12, "verses.jsonl", 48)
    assert_same_tensors(*saved)
    model = text.CharacterTransformer.from_pretrained(tmp_path / "whole" / "pipeline" / "model")
    assert next(model.parameters()).dtype == torch.float32
    assert all(tensor.dtype == torch.float16 for tensor in saved[0].values())
    assert isinstance(model.norm, nn.RMSNorm)
    assert card["held_out_bits"] < math.log2(28) - 0.03


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"book": 1}\n', (), r"expected a .jsonl of verses or a .txt, got KeyError"),
        ("not json\n", (), "got JSONDecodeError"),
        ('{"book": "A", "chapter": 1, "text": "short"}\n', (), "expected 20 documents of --length 12"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_refused_in_one_line(text, tmp_path, content, more, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        text.train(options(text, path, tmp_path / "run", *more))
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="got FileNotFoundError"):
        text.documents(tmp_path / "none.txt")


def test_a_checkpoint_of_another_text_or_model_is_refused(text, verses, tmp_path, monkeypatch):
    clock = Clock()
    clock.process_time = clock.time
    monkeypatch.setattr(text, "time", clock)
    text.train(options(text, verses, tmp_path / "run"))
    for more, message in (
        (("--length", "8"), "one with another length"),
        (("--width", "32"), "checkpoint of this model"),
    ):
        with pytest.raises(SystemExit, match=message):
            text.train(options(text, verses, tmp_path / "run", *more))
