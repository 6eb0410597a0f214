"""What the page shows, as HTML in which every text is escaped: progress, pictures, figures, layers."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from modiff.errors import ModiffError
from modiff.evaluate.report.charts import GAIN, differences
from modiff.evaluate.report.document import Cell, Figure
from modiff.web.compare import Compared, Progress
from modiff.web.jobs import Request

PIXELS, LONGEST = 96, 512  # images with shorter sides show sharp pixels; the page gets none with longer ones
LAYER_HEAD = ("layer", "kind", "bits", "runs", "why")


def error_line(error: BaseException) -> str:
    """One line that says what is wrong; of errors that nobody meant to raise, their kind too."""
    text = str(error).strip().partition("\n")[0]
    if not isinstance(error, ModiffError):
        text = f"{type(error).__name__}: {text[:200] or 'no reason given'}. The server's own output says more."
    return f'<p class="m-error" role="alert">{escape(text)}</p>'


def note(text: str) -> str:
    """One line of plain text."""
    return f'<p class="m-note" role="status">{escape(text)}</p>'


def progress(job: Request) -> str:
    """Where a request stands: waiting for others, or at which step."""
    if job.ahead and not job.stopping:
        return note(f"waiting: {job.ahead} request{'s' * (job.ahead > 1)} for this model before yours")
    view, value = job.view or Progress("starting"), ""
    stage = "stopping as soon as this step or compilation ends" if job.stopping else view.stage
    if view.total and not job.stopping:
        stage, value = f"{stage}: {view.step} of {view.total}", f' max="{view.total}" value="{view.step}"'
    return f'{note(stage)}<progress class="m-bar"{value}></progress>'


def stopped(job: Request) -> str:
    """What is left of a request that was stopped: nothing, or a step or a compilation, which nothing interrupts."""
    later = "what it had begun ends first: a step, or a compilation. The next request for this model waits for it"
    return note(f"stopped: {'nothing is left of it, and the model can be used at once' if job.done else later}")


def pictures(full: np.ndarray | None, quantized: np.ndarray | None, name: str, seed: int) -> str:
    """A card for each image: full precision, quantized, and their difference. uint8 (N, H, W, C); None: not yet."""
    if full is None or len(full) == 0:
        return ""
    quantized = None if quantized is None or quantized.shape != full.shape else quantized
    maps = None if quantized is None else (255 * differences(quantized, full)).round().astype(np.uint8)
    columns = [("full precision", full), (name, quantized), (f"difference ×{GAIN}", maps)]
    cards: list[str] = []
    for i in range(len(full)):
        shown = "".join(_figure(None if images is None else images[i], caption) for caption, images in columns)
        cards.append(f'<div class="m-card" aria-label="seed {seed + i}">{shown}</div>')
    legend = (f"Same noise in each row, seeds {seed} to {seed + len(full) - 1}. Difference: red brighter, blue darker, "
              f"white equal, the same gain of {GAIN} everywhere.")  # fmt: skip
    return f'<div class="m-cards">{"".join(cards)}</div><p class="m-legend">{escape(legend)}</p>'


def _figure(image: np.ndarray | None, caption: str) -> str:
    shown = '<div class="m-empty"></div>'
    if image is not None:
        small = ' class="pixels"' if min(image.shape[:2]) < PIXELS else ""
        shown = f'<img{small} src="{_uri(image)}" alt="{escape(caption)}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _uri(image: np.ndarray) -> str:
    """An image as a data URI: no file, no second request."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((LONGEST, LONGEST))
    kind = "PNG" if max(picture.size) <= PIXELS else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def images_of(done: Compared) -> str:
    """The pictures of a result."""
    quantized = None if done.quantized is None else done.quantized.bytes
    return pictures(done.full.bytes, quantized, done.settings.name, done.settings.seed)


def in_words(done: Compared) -> str:
    """The result in a sentence or two: how far off, and how fast, without calling simulation fast."""
    if done.quantized is None or done.report is None:
        reason = done.accelerated.reason if done.accelerated else "nothing was quantized"
        return f"The model was left as it is: {reason}."
    error = done.error["relative_l2"]
    if error is None:
        return "The quantized images hold values that are not finite: this configuration does not work for the model."
    counts = Counter(entry.execution.startswith("integers on") for entry in done.report.taken)
    ratio = done.full.pace / done.quantized.pace
    how = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as slow"
    speed = f"A step on integers is {how} as one in uncompiled floats."
    if counts[True] == 0:
        speed = "Its integers are simulated in floats: the error is real, the time is not, and nothing is faster."
    elif counts[False]:
        speed += f" {counts[False]} of {len(done.report.taken)} layers are simulated, which is slower."
    if done.accelerated is not None:
        speed += f" In a race it was {done.accelerated.gain:.2f} times as fast as floats ({done.accelerated.reason})."
    if done.crowded:
        speed += " Other models were at work at the same time: do not trust the times."
    return f"The images differ by {100 * error:.2g} % (relative L2) from those of full precision. {speed}"


def measures(done: Compared) -> list[tuple[str, str, str]]:
    """Rows of (what, full precision, quantized)."""
    full, quantized = done.full, done.quantized
    rows = [(text, Cell.number(value(full), form).text, "-" if quantized is None else f"{value(quantized):{form}}")
            for text, value, form in (("seconds", lambda run: run.seconds, ".2f"),
                                      ("ms a step, median", lambda run: 1000 * run.pace, ".1f"))]  # fmt: skip
    if done.error:
        rows += [("relative L2", "0", Cell.number(done.error["relative_l2"], ".4f").text),
                 ("PSNR, dB", "-", Cell.number(done.error["psnr_db"], ".1f").text)]  # fmt: skip
    return rows


def summary(done: Compared) -> str:
    """The conclusion and the figures below it."""
    head = ("", "full precision", done.settings.name)
    small = "Seconds leave previews out. The first steps also prepare weights, so the median of the steps says more."
    words = f'<p class="m-conclusion" role="status">{escape(in_words(done))}</p>'
    return f'{words}{_table(head, measures(done))}<p class="m-legend">{small}</p>'


def layers(done: Compared) -> str:
    """Each layer: taken or left, bits, backend, and why."""
    if done.report is None:
        return note("Nothing was quantized.")
    counts = Counter(entry.execution for entry in done.report.taken)
    where = ", ".join(f"{count} {execution}" for execution, count in counts.most_common())
    line = f"{len(done.report.taken)} layers taken ({where}), {len(done.report.left)} left in floats."
    return f"{note(line)}{_table(LAYER_HEAD, layer_rows(done), tall=True)}"


def layer_rows(done: Compared) -> list[tuple[str, ...]]:
    """As LAYER_HEAD says."""
    entries = () if done.report is None else done.report.entries
    return [(e.name, e.kind, e.setting, e.execution or "floats", e.why or e.reason) for e in entries]


def heat(figure: Figure | None) -> str:
    """The map of errors, as a picture."""
    if figure is None:
        return ""
    source = f"data:image/svg+xml;base64,{base64.b64encode(figure.data).decode()}"
    picture = f'<img class="m-heat" src="{source}" alt="{escape(figure.alt)}">'
    return f'{picture}<p class="m-legend">{escape(figure.caption)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, tall: bool = False) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    kind = "m-scroll" + " m-tall" * tall
    return f'<div class="{kind}" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
