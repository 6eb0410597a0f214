"""python -m experiments table6 --model embedded -o out: run experiments of the paper, print and write what they give.

Stopped at any time, the same command goes on where it was. All of them at --preset quick take about 20 minutes on two
free cores. OUT holds report.html, report.md with its figures, results.json, and the files of what is finished.
"""

import argparse
import sys
from pathlib import Path

from experiments.lab import IMAGES, StudySettings
from experiments.paper import EXPERIMENTS, experiment_names
from experiments.study import StudyResult, run_study
from modiff.errors import ModiffError
from modiff.evaluate.report.document import Document
from modiff.evaluate.report.page import markdown, write_report
from modiff.files import check_writable, read_json, write_atomically, write_json
from modiff.hosts.diffusers.load import load_pipeline

RESULTS = "results.json"
PAGE, FIGURES, PAGE_RESULTS = "project/study.md", "figures", "results/study.json"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print what each experiment says, write the report; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        result = _result(options)
        document = result.document(options.model)
        for section in document.sections[:-1]:
            print(f"{section.title}\n  {next(b for b in section.blocks if str(b).startswith('Here: '))}\n")
        if options.results is None:
            write_json(options.output / RESULTS, result.to_dict())
            print(f"report: {write_report(document, options.output)[0]}")
        if options.docs is not None:
            write_json(options.docs / PAGE_RESULTS, result.to_dict())
            print(*write_page(document, options.docs), sep="\n")
    except (ModiffError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    return 0


def _result(options: argparse.Namespace) -> StudyResult:
    names = experiment_names(options.names)  # before the model is loaded: a name may be wrong
    if options.docs is not None:
        for path in (options.docs / PAGE, options.docs / PAGE_RESULTS):
            check_writable(path)
    if options.results is not None:
        return StudyResult.from_dict(read_json(options.results, "results of experiments", "Leave out --results."))
    settings = StudySettings(
        depth=options.preset,
        num_images=IMAGES[options.preset] if options.num_images is None else options.num_images,
        steps=options.steps,
        seed=options.seed,
    )
    pipe = load_pipeline(options.model, device=options.device)
    return run_study(pipe, names, settings, options.output)


def write_page(document: Document, docs: Path) -> list[Path]:
    """docs/project/study.md and its pictures in docs/figures; pictures of earlier studies go."""
    pictures = {f"{figure.name}.{figure.kind}": figure.data for figure in document.figures()}
    for name, data in pictures.items():
        path = docs / FIGURES / name
        check_writable(path)
        write_atomically(path, lambda file, data=data: file.write(data))
    for path in (docs / FIGURES).glob("study-*.png"):
        if path.name not in pictures:
            path.unlink()
    write_atomically(docs / PAGE, lambda file: file.write(markdown(document, f"../{FIGURES}").encode()))
    return [docs / PAGE, *(docs / FIGURES / name for name in pictures)]


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {e.name:12} {e.title}" for e in EXPERIMENTS.values())
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        epilog=f"experiments:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="all, or experiments of the list below")
    parser.add_argument("--model", default="embedded", help="a local diffusers folder, or embedded")
    parser.add_argument("-o", "--output", type=Path, default=Path("study"), metavar="OUT", help="default: study")
    parser.add_argument("--preset", choices=list(IMAGES), default="quick", help="quick: 8 images, coarse grids")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("-n", "--num-images", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--docs", type=Path, metavar="DIR", help=f"also write DIR/{PAGE}, its figures and results")
    parser.add_argument("--results", type=Path, metavar="FILE", help="show the results in FILE instead of running")
    return parser


if __name__ == "__main__":
    sys.exit(main())
