"""What does each experiment of the paper give on the embedded model? Writes docs/study.md and its figures.

python bench/study.py --work study --preset quick

Stopped at any time, the same command goes on where it was. About 20 minutes on two free cores at "quick".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from modiff.evaluate.report.document import Document
from modiff.evaluate.report.markdown import file_name, markdown
from modiff.evaluate.study.registry import experiment_names
from modiff.evaluate.study.settings import IMAGES, settings_for
from modiff.evaluate.study.study import run_study
from modiff.files import check_writable, write_atomically, write_json
from modiff.hosts.load import load_pipeline

PAGE, FIGURES, RESULTS = "study.md", "figures", "results/study.json"


def write_page(document: Document, docs: Path) -> list[Path]:
    """docs/study.md and its pictures in docs/figures; figures of a study before that are not drawn any more go."""
    wanted = {file_name(figure): figure.data for figure in document.figures()}
    for name, data in wanted.items():
        path = docs / FIGURES / name
        check_writable(path)
        write_atomically(path, lambda file, data=data: file.write(data))
    for path in (docs / FIGURES).glob("study-*.png"):
        if path.name not in wanted:
            path.unlink()
    page = docs / PAGE
    check_writable(page)
    write_atomically(page, lambda file: file.write(markdown(document, FIGURES).encode()))
    return [page, *(docs / FIGURES / name for name in wanted)]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder of what is finished")
    parser.add_argument("--preset", choices=list(IMAGES), default="quick")
    parser.add_argument("--study", default="all", help="experiments, between commas")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    settings = settings_for(
        options.preset,
        num_images=options.num_images,
        steps=options.steps,
        seed=options.seed,
        experiments=experiment_names(options.study),
        model=options.model,
    )
    check_writable(options.docs / PAGE)
    result = run_study(load_pipeline(options.model), settings, options.work)
    results = options.docs / RESULTS
    check_writable(results)
    write_json(results, result.to_dict())
    print(*write_page(result.document("The trajectory study"), options.docs), results, sep="\n")


if __name__ == "__main__":
    main()
