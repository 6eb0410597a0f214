"""Every code block of docs/extending.md runs as printed, in a process that the registered things do not outlive."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_its_blocks_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(blocks) == 6
    assert re.search(r"Choice\(backend='counting'.*\n.*refusals=\(\('counting', 'counts to 64'\)", done.stdout)
    assert "layers taken" in done.stdout
