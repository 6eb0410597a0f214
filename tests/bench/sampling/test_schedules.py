"""Distances of learned schedules and of DDM: a row for each sampler, kept when it is finished; and injected noise."""

import json

import numpy as np

from sampling import injected_noise, schedules


def test_a_row_is_measured_once_and_printed_with_its_interval(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(schedules, "CONFIGS", ("", "plain:8:4"))
    monkeypatch.setattr(schedules, "LEARNED", {", linear betas, adjusted": {}})
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), dtype=np.uint8))
    words = [
        "--reference",
        str(tmp_path / "data.npy"),
        "--num-images",
        "4",
        "--batch",
        "4",
        "--steps",
        "2",
        "--resamples",
        "2",
    ]
    words += ["--only", "ddim", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    schedules.main(words)
    first = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["sampler"] for row in first[:2]] == ["ddim", "ddim, linear betas, adjusted"]
    assert [row["config"] for row in first[2:]] == ["plain:8:4"]
    assert len({row["fd_data"]["estimate"] for row in first}) == len(first)
    for path in (tmp_path / "work").glob("row-ddim-2-plain*"):
        path.unlink()
    schedules.main(words)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == first
    assert capsys.readouterr().out.count("\n| ddim") == 2 * len(first)


def test_plain_quantization_injects_more_noise_than_modulated_as_the_estimate_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(injected_noise, "CONFIGS", ("", "modulated:8:4", "plain:8:4"))
    file = tmp_path / "out.json"
    injected_noise.main(["--steps", "10", "--num-images", "2", "--json", str(file)])
    exact, modulated, plain = json.loads(file.read_text())["rows"]
    assert exact["relative_l2"] == [0.0] * 11
    assert modulated["relative_l2"][-1] < plain["relative_l2"][-1]
    gaps = [abs(np.log(row["noise"]) - np.log(exact["noise"])).mean() for row in (modulated, plain)]
    assert gaps[0] < gaps[1]
    assert capsys.readouterr().out.count("\n| ") == 3
