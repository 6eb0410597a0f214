"""Write the golden trajectories anew: make golden. Read the diff of what changed, and say why, before you commit it."""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.golden.trajectories import HERE, MODES, NETWORKS, record


def main() -> None:
    """One file a network and mode, and a line on how far each moved."""
    for network in NETWORKS:
        for mode in MODES:
            path = HERE / f"{network}_{mode}.safetensors"
            tensors = record(network, mode)
            moved = "new"
            if path.exists():
                old = load_file(path)
                moved = f"moved {max(float((old[k] - v).abs().max()) for k, v in tensors.items() if k in old):.1e}"
            save_file(tensors, path)
            print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size // 1024} kB, {moved}")


if __name__ == "__main__":
    main()
