"""What does each published method give at each pair of bit widths? Writes docs/methods.md and its figures.

python bench/methods.py --reference images.npy --json docs/results/methods.json --num-images 256 --batch 64

With --work bench/results/methods it goes on with the rows that lie there; 2,000 images take days on two cores. Rows in
the --json file stay unless the same row is run again with as many images; the page has them all.

Each row runs in a process of its own and is kept when it is finished: stopped at any time, the same command goes on
where it was. Rows are trajectories of DDIM; every image comes from the noise of its index, as in full precision.
"""

import argparse
import json
import math
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from modiff.api import save
from modiff.cli.options import quiet_pipeline
from modiff.config import JsonConfig
from modiff.errors import ConfigError, FormatError, ModiffError
from modiff.evaluate.features.extractor import FeatureExtractor
from modiff.evaluate.features.load import DEFAULT_EXTRACTOR, load_extractor
from modiff.evaluate.metrics.frechet import Moments, frechet_interval
from modiff.evaluate.metrics.paired import psnr, relative_l2
from modiff.evaluate.suite.images import read_reference, reference_digest
from modiff.files import ResumableFolder, check_writable, write_atomically, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.generate.worker import digest
from modiff.hosts.diffusers.runs import noise_generators
from modiff.methods.registry import METHODS, method_config, quantize

MODES = ("plain", "modulated")
BITS = ((8, 8), (4, 8), (8, 4), (4, 4))
FIRST_NOISE = 1_000_000  # calibration draws from 0 on: no method sees the noise that it is judged on
IDENTITY = ("method", "weight_bits", "activation_bits", "modulated", "anchors")
FIELDS = (*IDENTITY, "images", "relative_l2", "psnr_db", "fd_full_precision", "fd_full_precision_interval", "fd_data",
          "fd_data_interval", "calibration_seconds", "peak_mib", "checkpoint_bytes")  # fmt: skip
FULL_PRECISION = "full_precision"
MARKS = "<!-- from here on by bench/methods.py -->\n", "<!-- up to here -->\n"
"""What others write around them on the page stays."""
INTRODUCTION = """\
The last command: `{command}`.

`{model}`, DDIM, {steps} steps, settings of calibration: {calibration}. Relative L2 and PSNR: final images in [0, 1]
against full precision from the same noise, which no method was calibrated on. FD: Frechet distance of the features of
`{extractor}`, with 95 % bootstrap intervals; it is biased upwards at few images, so compare it between rows of as many
images. Anchors: of modulated layers, the weights at their first step. Calibration and peak: one run in a separate
process; seconds of processor time over all threads; the peak is the most memory it held until calibration was done,
with the model and the libraries. Checkpoint: all weight files, without codes for exact anchors (a byte a weight more).

Every layer has these bits, the first, the last and the embeddings included, except where a line below says otherwise.
modiff's presets leave those in full precision, so do not compare these rows with those of pages that use presets.
"""
NEAREST = {"rounding": "nearest"}
MINMAX = {"search": "minmax"}
MEASURED = NEAREST | MINMAX | {"scales": "measured"}
EXACT: dict[str, Any] = {"kind": "dynamic", "modulation": {"anchor_weights": "exact"}}
AGAIN = {"modulation": EXACT["modulation"] | {"reanchor_every": 10}}


@dataclass(frozen=True)
class Recipe:
    """A row's method: a name of the registry, fields of its settings, what the page says of it, its pairs of bits."""

    method: str
    fields: dict[str, Any]
    about: str
    bits: tuple[tuple[int, int], ...] = BITS


RECIPES: dict[str, Recipe] = {
    "minmax": Recipe("q_diffusion", MEASURED, "round to nearest, static min-max ranges; layers as in Q-Diffusion"),
    "ptq4dm": Recipe("ptq4dm", {}, "NDTC states, searched ranges; first and last layer at 8 bits"),
    "q_diffusion": Recipe("q_diffusion", {}, "learned rounding and scales; attention products quantized too"),
    "tfmq_dm": Recipe("tfmq_dm", {}, "temporal block apart, with scales per step; first and last layer 8 bits"),
    "accuquant": Recipe("accuquant", {}, "scales of groups of 4 steps learned on the quantized trajectory"),
    "ptqd": Recipe("ptqd", {}, "as minmax, then slope, mean and noise of the error corrected in the sampler"),
    "ptqd_mixed": Recipe("ptqd", {"step_bits": [4, 8]}, "ptqd, 4 or 8 bits of activations by step", ((8, 8), (4, 8))),
    "ptqd_any": Recipe("ptqd", {"slope": "any"}, "ptqd with slopes of either sign, instead of k of 0 or more"),
    "tac": Recipe("tac", {}, "as minmax, then a factor by least squares and a shift for each step"),
    "modiff_dynamic": Recipe("modiff", {"kind": "dynamic"}, "learned rounding, dynamic scales per token or sample"),
    "modiff_static_minmax": Recipe("modiff", {"kind": "static_minmax"}, "learned rounding, static residual ranges"),
    "modiff_static_steps": Recipe("modiff", {"kind": "static_steps"}, "learned rounding, ranges of 10 groups of steps"),
    "modiff_static_learned": Recipe("modiff", {"kind": "static_learned"}, "learned rounding and residual scales"),
    "eda_dm": Recipe("eda_dm", {}, "TDAC states, losses of layers, QDrop; first and last layer 8 bits"),
    "gradient_aligned": Recipe("gradient_aligned", {}, "as tfmq_dm, with samples weighed for gradients that agree"),
    "qncd": Recipe("qncd", {}, "smoothed convolutions, learned rounding, bias taken off in the sampler"),
    "nearest_exact": Recipe("modiff", EXACT | NEAREST, "round to nearest, dynamic scales, exact anchors"),
    "nearest_again": Recipe("modiff", EXACT | NEAREST | AGAIN, "the same, layers anchored again every 10 steps"),
    "nearest_minmax": Recipe("modiff", EXACT | NEAREST | MINMAX, "round to nearest, min-max ranges; no calibration"),
    "learned_exact": Recipe("modiff", EXACT, "learned rounding, dynamic scales, exact anchors"),
    "learned_again": Recipe("modiff", EXACT | AGAIN, "the same, layers anchored again every 10 steps"),
}


@dataclass(frozen=True)
class Row:
    """A row to be run."""

    recipe: str
    weight_bits: int
    activation_bits: int
    modulated: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.recipe}-w{self.weight_bits}a{self.activation_bits}-{MODES[self.modulated]}"

    def config(self, calibration: str, steps: int) -> JsonConfig:
        """The method's settings. Raises: ConfigError for a combination that is refused."""
        recipe = RECIPES[self.recipe]
        changes = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits, "steps": steps}
        return method_config(recipe.method, quick=calibration == "quick", values=recipe.fields,
                             modulated=self.modulated, changes=changes)  # fmt: skip


def rows(
    recipes: Iterable[str], bits: Iterable[tuple[int, int]], modes: Iterable[str] = MODES
) -> tuple[list[Row], dict[str, str]]:
    """The rows that mean something, and why the others are refused."""
    bits, modes, kept, refused = list(bits), list(modes), [], {}
    for recipe in recipes:
        method = METHODS[RECIPES[recipe].method]
        for mode in modes:
            modulated = mode == "modulated"
            if reason := method.modulated if modulated else method.plain:
                refused[f"{recipe}, {mode}"] = reason
            else:
                kept += [Row(recipe, w, a, modulated) for w, a in bits if (w, a) in RECIPES[recipe].bits]
    return kept, refused


def _pooled(extractor: FeatureExtractor, images: np.ndarray) -> torch.Tensor:
    return torch.cat([extractor(batch).pooled for batch in torch.as_tensor(images).split(64)])


def run_row(row: Row | None, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Calibrate, measure the cost, save, sample and compare; None is full precision, whose images the others need."""
    pipe = set_scheduler(quiet_pipeline(settings["model"], "cpu"), "ddim")
    extractor = load_extractor(settings["extractor"])
    seconds = size = peak = 0.0
    if row is not None:
        config = row.config(settings["calibration"], settings["steps"])
        start = time.process_time()  # of all threads: other work on the machine is not counted
        quantize(pipe, config, progress=False)
        seconds, peak = time.process_time() - start, peak_mib()
        with tempfile.TemporaryDirectory() as folder:
            save(pipe, Path(folder) / "checkpoint")
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    images = np.concatenate(list(_batches(pipe, settings)))
    features = _pooled(extractor, as_bytes(images))
    reference = work / f"{FULL_PRECISION}.npz"
    if row is None:
        write_atomically(reference, lambda file: np.savez(file, images=images, features=features.numpy()))
    with np.load(reference) as arrays:
        exact, exact_features = arrays["images"], torch.from_numpy(arrays["features"])
    finite = bool(np.isfinite(images).all())
    return {
        "relative_l2": relative_l2(images, exact) if finite else None,
        "psnr_db": value if math.isfinite(value := psnr(images, exact)) else None,
        **_distances("fd_full_precision", features, exact_features if row is not None else None, "paired"),
        **_distances("fd_data", features, _data(settings, work, extractor, images.shape[1:]), "independent"),
        "calibration_seconds": seconds,
        "peak_mib": peak,
        "checkpoint_bytes": int(size),
    }


def peak_mib() -> float:
    """The most memory that this process ever held; Linux counts KiB, macOS bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def as_bytes(images: np.ndarray) -> Tensor:
    """Images in [0, 1] as they are saved, uint8."""
    return torch.from_numpy(np.rint(np.nan_to_num(images).clip(0, 1) * 255).astype(np.uint8))


def _batches(pipe: DiffusionPipeline, settings: dict[str, Any]) -> Iterator[np.ndarray]:
    for first in range(0, settings["num_images"], settings["batch"]):
        indices = range(first, min(first + settings["batch"], settings["num_images"]))
        noise = noise_generators(FIRST_NOISE + settings["seed"], indices)
        yield pipe(batch_size=len(indices), num_inference_steps=settings["steps"], generator=noise,
                   output_type="np").images  # fmt: skip


def _distances(name: str, features: Tensor, reference: Tensor | Moments | None, draw: Any) -> dict[str, Any]:
    """The distance, and its interval under a name of its own; None without reference."""
    if reference is None or not torch.isfinite(features).all():
        return {name: None}
    interval = frechet_interval(features, reference, resamples=100, draw=draw)
    return {name: interval["estimate"], f"{name}_interval": [interval["low"], interval["high"]]}


def _data(settings: dict[str, Any], work: Path, extractor: Any, shape: tuple[int, ...]) -> Moments | None:
    """Moments of the real images, kept in the work folder; smaller images get a black border."""
    if settings["reference"] is None:
        return None
    kept = work / "data.npz"
    if not kept.exists():
        moments = Moments(extractor.dimension)
        for images in read_reference(Path(settings["reference"])):
            moments.update(_pooled(extractor, bordered(images, shape)))
        mean, scatter = moments.mean.numpy(), moments.scatter.numpy()
        write_atomically(kept, lambda file: np.savez(file, mean=mean, scatter=scatter, count=moments.count))
    moments = Moments(extractor.dimension)
    with np.load(kept) as arrays:
        moments.count, (mean, scatter) = int(arrays["count"]), (arrays[name] for name in ("mean", "scatter"))
    moments.mean, moments.scatter = torch.from_numpy(mean), torch.from_numpy(scatter)
    return moments


def bordered(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images (N, H, W, C) in the middle of (N, *shape), black around. Raises: FormatError if they do not fit."""
    rest = [whole - size for whole, size in zip(shape, images.shape[1:], strict=True)]
    if min(rest) < 0 or rest[2] or rest[0] % 2 or rest[1] % 2:
        raise FormatError(
            f"--reference: expected images of at most {shape}, got {images.shape[1:]}. The model makes images of this "
            "size. Resize them."
        )
    return np.pad(images, [(0, 0), *[(n // 2, n // 2) for n in rest[:2]], (0, 0)])


def run_all(chosen: list[Row], settings: dict[str, Any], work: Path) -> dict[str, dict[str, Any]]:
    """What is missing, each in a process of its own, full precision first; by row name.

    The data count by their digest, wherever they lie: a folder goes on on another machine.
    """
    rows: dict[str, dict[str, Any]] = {}
    job = {key: value for key, value in settings.items() if key != "reference"}
    with ResumableFolder(work, job, record="settings.json"):
        for row in tqdm([None, *chosen], desc="methods", unit="row"):
            name = FULL_PRECISION if row is None else row.name
            path = work / f"{name}.json"
            if not path.exists() or (row is None and not path.with_suffix(".npz").exists()):
                task = {"row": None if row is None else asdict(row), "settings": settings, "out": str(path)}
                done = subprocess.run([sys.executable, __file__, "--task", json.dumps(task)], check=False)
                if done.returncode:
                    raise SystemExit(done.returncode)
            rows[name] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def run_task(text: str) -> None:
    """The inside of such a process."""
    row, settings, out = json.loads(text).values()
    write_json(Path(out), run_row(None if row is None else Row(**row), settings, Path(out).parent))


def json_rows(chosen: list[Row], results: dict[str, dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with exactly the fields of the table, full precision first."""
    named = [dict.fromkeys(IDENTITY) | {"method": FULL_PRECISION} | results[FULL_PRECISION]]
    for row in chosen:
        loop = getattr(row.config(settings["calibration"], settings["steps"]), "modulation", None)
        anchors = None if loop is None else loop.anchor_weights
        named.append({"method": row.recipe, "anchors": anchors} | asdict(row) | results[row.name])
    return [{field: (values | {"images": settings["num_images"]}).get(field) for field in FIELDS} for values in named]


def merged(known: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows in the order of the table; a fresh one replaces a known one of the same identity and images."""

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*(row[name] for name in IDENTITY), row["images"])

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        bits = row["weight_bits"], row["activation_bits"]
        place = names.index(row["method"]), bool(row["modulated"]), str(row["anchors"])
        return (*place, BITS.index(bits) if bits in BITS else -1, row["images"])

    names = [FULL_PRECISION, *RECIPES]
    return sorted({identity(row): row for row in (*known, *fresh)}.values(), key=order)


def page(rows: list[dict[str, Any]], refused: dict[str, str], settings: dict[str, Any], command: str) -> str:
    """What docs/methods.md has between the marks."""
    head = ("method", "bits", "mode", "anchors", "images", "relative L2", "PSNR dB", "FD to full precision",
            "FD to data", "calibration CPU s", "peak MiB", "checkpoint KiB")  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        exact = row["method"] == FULL_PRECISION
        cells = [row["method"], "-" if exact else f"W{row['weight_bits']}A{row['activation_bits']}"]
        cells += ["-" if exact else MODES[row["modulated"]], row["anchors"] or "-", str(row["images"])]
        cells += [_cell(row["relative_l2"], ".4f"), _cell(row["psnr_db"], ".1f")]
        cells += [_distance(row, name) for name in ("fd_full_precision", "fd_data")]
        cells += [_cell(row["calibration_seconds"], ".0f"), _cell(row["peak_mib"], ".0f")]
        lines.append(" | ".join([*cells, f"{row['checkpoint_bytes'] / 1024:.0f}"]))
    where = ", ".join(f"{key} {value}" for key, value in environment().items() if value is not None)
    names = {"model": _name(settings["model"]), "extractor": _name(settings["extractor"])}
    used, table = {row["method"] for row in rows}, [f"| {line} |" for line in lines]
    about = [f"- {name}: {recipe.about}." for name, recipe in RECIPES.items() if name in used]
    notes = [f"Refused: {name}. {reason}.\n" for name, reason in refused.items()]
    intro = INTRODUCTION.format(**settings | names, command=command)
    return "\n".join([intro, *about, "", *table, "", *notes, f"Environment: {where}.", ""])


def between_marks(path: Path, text: str) -> str:
    """The page with `text` between the marks, and all around them as it was."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# The methods, side by side\n\n" + "".join(MARKS)
    if any(mark not in old for mark in MARKS):
        raise FormatError(f"--page: expected the lines {' and '.join(map(str.strip, MARKS))}, got none in {path.name}. "
                          "The table goes between them. Add them.")  # fmt: skip
    before, rest = old.split(MARKS[0])
    return before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _distance(values: dict[str, Any], name: str) -> str:
    if values[name] is None or values[f"{name}_interval"] is None:
        return _cell(values[name], ".3g")
    low, high = values[f"{name}_interval"]
    return f"{values[name]:.3g} ({low:.3g} to {high:.3g})"


def _some(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names between the commas. Raises: ConfigError for one that is not known."""
    for name in (names := text.split(",")):
        if name not in known:
            raise ConfigError(f"{option}: expected some of {', '.join(known)}, got {name!r}. Pick of them.")
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="or a local pipeline folder")
    parser.add_argument("--calibration", choices=("quick", "published"), default="quick")
    parser.add_argument("--methods", default=",".join(RECIPES), help="rows, between commas")
    parser.add_argument("--modes", default=",".join(MODES), help="rows, between commas")
    parser.add_argument("--bits", default="8:8,4:8,8:4,4:4", help="weight:activation, between commas")
    parser.add_argument("--reference", type=Path, help="real images, .npy, .npz or a folder")
    parser.add_argument("--extractor", default=DEFAULT_EXTRACTOR)
    for name, number in (("num-images", 2000), ("steps", 50), ("batch", 50), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--work", type=Path, default=Path("methods-bench"), help="folder of finished rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/methods.md"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the figures and the page."""
    options = _options()
    if options.task:
        run_task(options.task)
        return
    recipes, modes = _some("--methods", options.methods, RECIPES), _some("--modes", options.modes, MODES)
    named = {f"{weight}:{activation}": (weight, activation) for weight, activation in BITS}
    chosen, _ = rows(recipes, [named[name] for name in _some("--bits", options.bits, named)], modes)
    names = ("model", "num_images", "steps", "batch", "seed", "calibration", "extractor")
    settings = {
        **{name: getattr(options, name) for name in names},
        "reference": None if options.reference is None else str(options.reference.resolve()),
        "model_digest": digest(quiet_pipeline(options.model, "cpu"))[:16],
        "reference_digest": None if options.reference is None else reference_digest(options.reference),
    }
    for path in filter(None, (options.json, options.page)):
        check_writable(path)
    rows_of_table = json_rows(chosen, run_all(chosen, settings, options.work), settings)
    if options.json is not None:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
        rows_of_table = merged(known, rows_of_table)
        write_json(options.json, rows_of_table)
    command = shlex.join(["python", "bench/methods.py", *map(_name, sys.argv[1:])])
    text = page(rows_of_table, rows(RECIPES, BITS)[1], settings, command)
    write_atomically(options.page, lambda file: file.write(between_marks(options.page, text).encode()))
    print(text)


def _name(text: str) -> str:
    """A file without its place; other words as they are."""
    return Path(text).name if Path(text).is_absolute() else text


if __name__ == "__main__":
    try:
        main()
    except (ModiffError, OSError) as mistake:
        sys.exit(f"methods: {mistake}")
