"""Table 18: how the first step starts the states, and how many rounds it takes."""

from dataclasses import replace

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, number, printed_table, times
from experiments.lab import Lab
from experiments.runs import PAPER, Run, looped
from modiff import presets

BITS = {False: (8, 4), True: (8, 6, 4, 3)}
ROUNDS = {False: (1, 2, 4), True: (1, 2, 3, 4, 5, 6)}
FULL = "first step in full precision"
PLAIN, PLAIN_WARM = "plain", f"plain, {FULL}"
CLOSED = f"modulated, {FULL}"
OPEN, OPEN_CODED = f"no compensation, {FULL}", "no compensation, first step coded once"


def measure(lab: Lab) -> Values:
    """Plain with and without an exact first step; modulated with an exact one and with rounds of codes."""
    steps, plan = lab.settings.steps, []
    for bits in BITS[lab.settings.full]:
        plain, modulated = presets.plain(None, bits), presets.published(None, bits)
        runs = {
            PLAIN: Run(steps=steps, config=plain),
            PLAIN_WARM: Run(steps=steps, config=plain, exact_first=True),
            CLOSED: Run(steps=steps, config=modulated),
        }
        for n in ROUNDS[lab.settings.full]:
            runs[_rounds(n)] = Run(steps=steps, config=looped(modulated, replace(PAPER, first_step="coded", rounds=n)))
        open_loop = looped(modulated, replace(PAPER, first_step="coded", error_compensation="none"))
        runs[OPEN] = Run(steps=steps, config=presets.uncompensated(None, bits))
        runs[OPEN_CODED] = Run(steps=steps, config=open_loop)
        plan += [({"start": start, "bits": bits}, run) for start, run in runs.items()]
    return {"steps": steps, "rows": lab.rows(plan)}


def _rounds(count: int) -> str:
    return f"modulated, first step in {count} coded round{'s' if count > 1 else ''}"


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows = values["rows"]
    lines: list[Line] = []
    for i, bits in enumerate(dict.fromkeys(row["bits"] for row in rows)):
        coded = {n: error(rows, start=_rounds(n), bits=bits) for n in ROUNDS[True]}
        x = [n for n in coded if any(row["start"] == _rounds(n) for row in rows)]
        lines.append(Line(label=f"A{bits}, coded", x=x, y=[coded[n] for n in x], colour=i))
        exact = error(rows, start=CLOSED, bits=bits)
        if exact is not None:
            lines.append(Line(label=f"A{bits}, full precision", level=exact, dashed=True, colour=i))
    caption = f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps."
    starts = (PLAIN, PLAIN_WARM, CLOSED, OPEN, OPEN_CODED, _rounds(1), _rounds(4))
    plain, warm, closed, open_loop, open_coded, once, four = (error(rows, start=s, bits=4) for s in starts)
    return Shown(
        (
            f"At 4 bits a first step in full precision takes plain quantization from {number(plain)} to "
            f"{number(warm)}. Modulated, the error is {number(closed)} with such a step, {number(once)} with a first "
            f"step coded once and {number(four)} after four rounds. Without compensation, which never sends the "
            f"start's error again, it is {number(open_loop)} after an exact start and {number(open_coded)} after a "
            "coded one.",
            crossed("study-first-step", caption, rows, down="start", across="bits", head="A{}"),
            line_chart(
                "study-table18",
                lines,
                title="Warm-up rounds of the first step",
                x="rounds",
                caption="The first step in coded rounds, against one in full precision.",
            ),
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
