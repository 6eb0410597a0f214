"""Table 18: how the first step starts the states, and how many rounds it takes."""

from __future__ import annotations

from experiments.charts import Line, line_chart
from experiments.configs import looped
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import error, find, number, times
from modiff import presets

BITS = {False: (8, 4), True: (8, 6, 4, 3)}
ROUNDS = {False: (1, 2, 4), True: (1, 2, 3, 4, 5, 6)}
FULL = "first step in full precision"
PLAIN, PLAIN_WARM = "plain", f"plain, {FULL}"
CLOSED = f"modulated, {FULL}"
OPEN, OPEN_CODED = f"no compensation, {FULL}", "no compensation, first step coded once"


def measure(lab: Lab) -> Values:
    """Plain with and without an exact first step; modulated with an exact one and with rounds of codes."""
    steps = lab.settings.steps
    plan = []
    for bits in BITS[lab.settings.full]:
        plain, modulated = presets.plain(None, bits), presets.published(None, bits)
        plan += [
            (PLAIN, bits, Run(steps=steps, config=plain)),
            (PLAIN_WARM, bits, Run(steps=steps, config=plain, exact_first=True)),
            (CLOSED, bits, Run(steps=steps, config=modulated)),
        ]
        plan += [
            (_rounds(n), bits, Run(steps=steps, config=looped(modulated, first_step="coded", rounds=n)))
            for n in ROUNDS[lab.settings.full]
        ]
        open_loop = looped(modulated, first_step="coded", error_compensation="none")
        plan += [
            (OPEN, bits, Run(steps=steps, config=presets.uncompensated(None, bits))),
            (OPEN_CODED, bits, Run(steps=steps, config=open_loop)),
        ]
    return {"steps": steps, "rows": lab.rows([({"start": start, "bits": bits}, run) for start, bits, run in plan])}


def _rounds(count: int) -> str:
    return f"modulated, first step in {count} coded round{'s' if count > 1 else ''}"


def show(values: Values) -> Shown:
    """Starts down, widths across."""
    rows = values["rows"]
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    table = crossed(
        "study-first-step",
        f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps.",
        rows,
        down=("start", "start"),
        across="bits",
        titles={b: f"A{b}" for b in widths},
    )
    lines: list[Line] = []
    for i, bits in enumerate(widths):
        coded = [
            (int(row["start"].split(" in ")[1].split()[0]), error(row))
            for row in rows
            if row["bits"] == bits and "coded round" in row["start"]
        ]
        lines.append(Line(label=f"A{bits}, coded", x=[c[0] for c in coded], y=[c[1] for c in coded], colour=i))
        exact = error(find(rows, start=CLOSED, bits=bits))
        if exact is not None:
            lines.append(Line(label=f"A{bits}, full precision", level=exact, dashed=True, colour=i))
    figure = line_chart(
        "study-table18",
        lines,
        title="Warm-up rounds of the first step",
        x="rounds",
        y="relative L2 to full precision",
        caption="The first step in coded rounds, against one in full precision.",
    )
    plain, warm, closed, open_loop, open_coded = (
        error(find(rows, start=start, bits=4)) for start in (PLAIN, PLAIN_WARM, CLOSED, OPEN, OPEN_CODED)
    )
    once, four = (error(find(rows, start=_rounds(n), bits=4)) for n in (1, 4))
    return Shown(
        (
            f"At 4 bits a first step in full precision takes plain quantization from {number(plain)} to "
            f"{number(warm)}, and the modulated run, which has one, is at {number(closed)}. With its first step coded "
            f"once it is at {number(once)}, after four rounds at {number(four)}: {times(four, closed)} times a first "
            "step in full precision. Without compensation, which never sends the start's error again, it is "
            f"{number(open_loop)} after an exact start and {number(open_coded)} after a coded one.",
            table,
            figure,
        ),
        (
            "Table 18 is captioned LCQ, but its values are those of LTQ (the paper's Table 14). In print the first "
            f"step lowers the baseline by a factor of {times(306.06, 299.96)} at 4 bits and MoDiff by "
            f"{times(31.22, 28.19)}; here by {times(plain, warm)} and, against a start coded once, "
            f"{times(once, closed)}. Weights are in full precision in all rows here, so that they hide nothing.",
        ),
    )


EXPERIMENT = Experiment(
    name="table18",
    title="First-step precision and warm-up rounds (table 18)",
    printed=(
        "CIFAR-10, FID without and with a first step in full precision. 4 to 5 warm-up rounds are said to suffice at "
        "4 bits (appendix D.5).",
        printed_table(
            "study-printed-table18",
            "Table 18 as printed: no warm-up / warm-up.",
            "|baseline|MoDiff",
            ("A8|4.19 / 4.19|4.22 / 4.21", "A6|9.93 / 9.53|4.25 / 4.00", "A4|306.06 / 299.96|31.22 / 28.19"),
        ),
    ),
    measure=measure,
    show=show,
)
