"""`modiff explain`: the table and the JSON."""

import json
from pathlib import Path

from tests.cli.commands import done, modiff
from tests.hosts.tiny import HOSTS


def test_every_layer_has_a_choice_times_errors_and_what_its_state_costs(tmp_path: Path) -> None:
    HOSTS["ddim"].build().save_pretrained(tmp_path / "model")
    results = tmp_path / "explain.json"
    words = ["--steps", 3, "-n", 1, "--config", "modulated:8:4", "--tolerance", 0.3, "--json", results]
    text, _, integers = done(modiff("explain", tmp_path / "model", *words)).output.partition("on integers:")
    written = json.loads(results.read_text())
    assert written["machine"] in text
    assert written["tolerance"] == 0.3
    assert "input side: " in text
    for row in written["layers"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {row['name']} ")]
        assert row["choice"] in line
        assert row["reason"] in line
        assert f"state {row['state_bytes'] / 2**20:.2f} MiB" in line
        assert f"plain {1e3 * row['seconds']['plain']:.3f}" in line
    for entry in written["on_integers"]["layers"]:
        if entry["setting"] != "full precision":
            assert f"  {entry['name']}  {entry['execution']}: {entry['why']}" in integers
            assert entry["execution"].startswith("integers on ") or entry["why"]
