"""Build the wheel and use it as a user would: a new environment, an empty folder, no repository.

    make wheel

Installs torch first, as the Makefile does, then the wheel, and runs `modiff --version` and `modiff demo --quick`.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 15_000_000
"""Bytes of a wheel."""


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel: its size, and files that are no part of the package."""
    size = wheel.stat().st_size
    large = [f"{wheel.name}: expected at most {LARGEST:,} bytes, got {size:,}"] if size > LARGEST else []
    with zipfile.ZipFile(wheel) as file:
        folders = {Path(name).parts[0] for name in file.namelist()}
    return large + [f"{name}/: expected no such folder" for name in sorted(folders) if not name.startswith("modiff")]


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command that sees neither the repository nor the environment of this process."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([str(word) for word in command], cwd=cwd, env=environment, check=True)


def main(torch: str) -> None:
    """Build, check, install, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = (sys.executable, "-m", "pip")
        run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.glob("modiff-*.whl")
        if wrong := problems(wheel):
            sys.exit("\n".join(wrong))
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        python = folder / "env" / "bin" / "python"
        install = (*pip, "--python", python, "install", "-qq", "--constraint", ROOT / "constraints.txt")
        run(*install, torch)
        run(*install, wheel)
        (empty := folder / "empty").mkdir()
        run(python.with_name("modiff"), "--version", cwd=empty)
        run(python.with_name("modiff"), "--quiet", "demo", "--quick", cwd=empty)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, installed and run in a new environment")


if __name__ == "__main__":
    main(sys.argv[1])
