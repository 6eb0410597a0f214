"""How long does a whole denoising loop take, and how far is its result: modiff on integers and its honest opponents.

python bench/denoising_loop.py --models embedded
python bench/denoising_loop.py --models sd15,dit-xl --isa vnni --threads 1
python bench/denoising_loop.py --device cuda --models ddpm-cifar10,sdxl,dit-xl

Each variant lives in a process of its own that runs one loop when it is told to, while all others wait: rounds are
interleaved, and peak memory, compiled code and instruction limits belong to one variant. docs/benchmarks.md explains.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from layers import commit
from loop.models import HIDDEN, MODELS, LoopModel
from loop.report import append_rows, plot, row_of, table
from loop.rounds import Record, Run, gpu_mib
from loop.task import GRAPHS, Task, has_bf16
from loop.variants import MODES, REFERENCE, VARIANTS
from modiff.errors import ConfigError, ModiffError
from modiff.generate.environment import environment
from modiff.kernels.isa import LIMIT, level_of

RESULTS = Path(__file__).parent / "results" / "loop.jsonl"
LIMITS = {"native": "", "vnni": "AVX512_CORE_VNNI", "avx2_vnni": "AVX2_VNNI", "avx2": "AVX2"}
CAPABILITY = {"vnni": "avx512", "avx2_vnni": "avx2", "avx2": "avx2"}
"""For ATen and inductor. Inductor uses AMX in max-autotune only, which nothing here asks for."""
NEEDED = {"vnni": ("avx512_vnni", "AVX-512 VNNI"), "avx2_vnni": ("avx2_vnni", "AVX-VNNI"), "avx2": ("avx2", "AVX2")}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def child_environment(isa: str, threads: int | None, capabilities: dict[str, Any]) -> dict[str, str]:
    """Variables of the children. Raises: ConfigError where the processor has less than `isa`."""
    variables = {name: str(threads) for name in THREADS} if threads else {}
    if isa == "native":
        return variables
    level, words = NEEDED[isa]
    got = level_of(capabilities, LIMITS[isa])
    if got != level:
        raise ConfigError(f"--isa {isa}: expected a processor with {words}, got one that reaches {got}. The limit only "
                          "takes instructions away. Leave --isa out.")  # fmt: skip
    return {**variables, LIMIT: LIMITS[isa], "ATEN_CPU_CAPABILITY": CAPABILITY[isa]}


def limit_of(isa: str) -> str:
    """oneDNN's limit: of --isa, else of the environment."""
    return LIMITS[isa] or os.environ.get(LIMIT, "")


def some(option: str, text: str, known: Iterable[str], hidden: Iterable[str] = ()) -> list[str]:
    """The names between the commas. Raises: ConfigError for one that is not known, or twice there."""
    names, known = text.split(","), list(known)
    for name in names:
        if name not in known and name not in hidden:
            raise ConfigError(f"{option}: expected some of {', '.join(known)}, got {name!r}. Pick of them.")
        if names.count(name) > 1:
            raise ConfigError(f"{option}: expected each name once, got {name!r} twice. Leave one out.")
    return names


def warnings_of(variants: Iterable[str], options: argparse.Namespace, capabilities: dict[str, Any]) -> list[str]:
    """What will be slow, before it is."""
    if has_bf16(capabilities, limit_of(options.isa), options.device):
        return []
    slow = [name for name in variants if name.startswith("bf16")]
    text = "no bf16 instructions here, so it will be slower than float32"
    return [f"{name}: {text}; --limit {options.limit:g} ends it" for name in slow]


def run_model(
    model: LoopModel, variants: list[str], options: argparse.Namespace, variables: dict[str, str]
) -> tuple[list[Record], Run]:
    """Every variant of one model."""
    model = model.on(options.device)
    timed = options.steps or (min(model.timed, 6) if options.quick else model.timed)
    if timed > model.steps:
        raise ConfigError(f"--steps: expected at most {model.steps}, got {timed}. The schedule of {model.name} has no "
                          "more. Give fewer.")  # fmt: skip
    shared = (timed, options.device, options.threads, limit_of(options.isa), options.mode)
    tasks = {name: Task(model, name, *shared) for name in (*variants, REFERENCE)}
    rounds = options.rounds or (2 if options.quick else 7)
    run = Run(rounds, options.limit, variables, say=lambda text: print(text, file=sys.stderr, flush=True))
    if options.device != "cpu":
        run.device_free = gpu_mib
    return run.all([tasks[name] for name in variants], tasks[REFERENCE]), run


def report(records: list[Record], run: Run, head: dict[str, str], json: Path | None) -> None:
    """Print the table of a model; append its rows and draw its plot where `json` is given."""
    rows = {r.task.variant: row for r in records if (row := row_of(r, run.reference, head)) is not None}
    print(table(records, rows) + "\n", flush=True)
    if json is None or not rows:
        return
    append_rows(json, rows.values())
    first, task = next(iter(rows.values())), records[0].task
    name = f"{json.stem}-{task.model.name}-{first['isa'].replace(' ', '-')}-{first['threads']}.png"
    title = f"{task.model.note(task.timed)}; {head['machine']}, {first['isa']}, {first['threads']} threads"
    plot(json.with_name(name), list(rows.values()), title)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help=f"between commas: {', '.join(MODELS)}; default: all, without sdxl on a CPU")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="between commas; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="6 steps, 2 rounds: does it run? Kept only with --json")
    parser.add_argument("--isa", choices=LIMITS, default="native", help="limit of the instructions")
    parser.add_argument("--threads", type=_count, help="of every variant; default: what torch takes")
    parser.add_argument("--rounds", type=_count, help="loops of each variant; default: 7")
    parser.add_argument("--steps", type=_count, help="timed steps of a loop; default: all; on CPUs 6 for sd15, dit-xl")
    parser.add_argument("--limit", type=_positive, default=3600, metavar="SECONDS",
                        help="a variant, building and compiling included; default: %(default)s")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", choices=MODES, default=GRAPHS, help="of torch.compile on GPUs; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: bench/results/{RESULTS.name}")
    return parser.parse_args()


def main() -> None:
    """Run, print, append."""
    options = _options()
    usual = ",".join(name for name, model in MODELS.items() if options.device != "cpu" or not model.gpu_only)
    models = [({**MODELS, **HIDDEN})[name] for name in some("--models", options.models or usual, MODELS, HIDDEN)]
    variants = some("--variants", options.variants, VARIANTS)
    capabilities: dict[str, Any] = dict(torch.cpu.get_capabilities())
    variables = child_environment(options.isa, options.threads, capabilities)
    for text in warnings_of(variants, options, capabilities):
        print(f"denoising_loop: {text}", file=sys.stderr)
    where = environment()
    head = {
        "commit": commit(),
        "machine": f"{where['cpu']}, {where['cores']} cores" + (f", {where['gpu']}" if where["gpu"] else "")
        + f", torch {where['torch']}",
        "command": shlex.join(["python", "bench/denoising_loop.py", *map(_shown, sys.argv[1:])]),
    }  # fmt: skip
    json = options.json or (None if options.quick else RESULTS)
    for model in models:
        records, run = run_model(model, variants, options, variables)
        report(records, run, head, json)


def _shown(text: str) -> str:
    """The name of a file, not its place."""
    return Path(text).name if Path(text).is_absolute() else text


if __name__ == "__main__":
    try:
        main()
    except (ModiffError, OSError) as mistake:
        sys.exit(f"denoising_loop: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
