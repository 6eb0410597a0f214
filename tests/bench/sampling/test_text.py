"""The figures of text: the judge by hand, the reward's sign, and a run that goes on where it was."""

import json

import numpy as np
import pytest
import torch

from modiff.sampling.masked import MaskedScheduler, MaskedTextPipeline
from sampling import text
from tests.sampling.test_masked import characters

POETRY, LAW = "o sing unto the lord a new song", "ye shall keep all my statutes and do them"


def verses(path):
    books = ["Psalms", "Psalms", "Leviticus", "Leviticus"] * 10
    lines = [{"book": b, "chapter": i, "text": POETRY if b == "Psalms" else LAW} for i, b in enumerate(books)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_judge_backs_off_as_witten_and_bell_do():
    tokens = np.array([0, 1, 0, 2, 0, 1])
    model = text.NGram(tokens, 2)
    flat = 1 / 27
    single = [(3 + 3 * flat) / 9, (2 + 3 * flat) / 9, (1 + 3 * flat) / 9]
    after_0 = [(2 * single[0]) / 5, (2 + 2 * single[1]) / 5, (1 + 2 * single[2]) / 5]
    np.testing.assert_allclose(model.table[0, :3], after_0, rtol=1e-5)
    np.testing.assert_allclose(model.table.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.table[5, :3], single, rtol=1e-5)  # a context that was never seen
    assert float(model.bits(torch.tensor([[2, 0, 1]]))[0]) == pytest.approx(
        -np.log2(model.table[2, 0] * model.table[0, 1]) / 2, rel=1e-5
    )


def test_a_run_writes_every_row_rewards_poetry_and_measures_nothing_twice(tmp_path, capsys):
    judges = text.Judges(text.documents(verses(tmp_path / "verses.jsonl")))
    rows = torch.stack([characters().encode(words[:30]) for words in (POETRY, LAW)])
    for half in (0, 1):
        reward = judges.reward(rows, half)
        assert reward[0] > 0.5
        assert reward[1] < -0.5
    MaskedTextPipeline(characters(), MaskedScheduler(27)).save_pretrained(tmp_path / "model")
    command = f"--text {tmp_path}/verses.jsonl --model {tmp_path}/model --json {tmp_path}/out.json"
    command += " --rows 2 --steps 4 --chains 2 --budgets 8"
    text.main(command.split())
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result) == 1 + 2 * len(text.BITS) + 3  # a budget of 8 has no sweeps of 16 particles
    assert result["W8A8 modulated"]["logits_error"] < result["W8A4 modulated"]["logits_error"]
    assert {row["evaluations"] for name, row in result.items() if name.endswith(" 8")} == {8 * 32}
    capsys.readouterr()
    text.main(command.split())
    assert capsys.readouterr().out == ""
