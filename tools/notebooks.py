"""Run the notebooks of examples/ and keep what they print, after a change of them.

python tools/notebooks.py
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
SETTINGS = {"coalesce_streams": True, "record_timing": False, "startup_timeout": 120}
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def executed(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """A notebook after all its cells ran in a folder, in a process of its own; what went to stderr is left out.

    Raises: nbclient.exceptions.CellExecutionError for a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **SETTINGS)
    client.execute(env={**os.environ, **INLINE})
    notebook.metadata = metadata  # the kernel adds its version
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for notebook in map(Path, sys.argv[1:] or NOTEBOOKS):
        with TemporaryDirectory() as empty:
            nbformat.write(executed(notebook, empty), notebook)
