"""The page: its layout, and what each control calls. Gradio draws it."""

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from modiff.errors import ModiffError
from modiff.generate.samplers import SAMPLERS
from modiff.presets import PRESETS
from modiff.web import views
from modiff.web.compare import MOST_IMAGES, MOST_STEPS, Comparison, Settings, compare, heat_map, in_words
from modiff.web.export import export
from modiff.web.jobs import Cancelled, Job, Jobs
from modiff.web.models import Models

TITLE = "modiff"
OWN = "the model's own"
CONFIGURATION, ACCELERATE = "Configuration", "Accelerate"
FAMILIES = ("plain:8:4", "published:8:4", "tuned:8:4", "w8a8", "w8a4", "w4a8", "w4a4")
INTRO = (
    '<header class="m-head"><h1>modiff</h1><p>The same model, the same noise: full precision next to quantized. '
    "Everything runs on this machine.</p></header>"
)
MODEL_INFO = "A model of the package, or a diffusers folder inside the one that modiff ui was started with."
CONFIG_INFO = "Bits of weights and activations, a family such as tuned:8:4, or a JSON file in the folder."


class Page:
    """What the controls of one server do. folder: where files to download are written."""

    def __init__(self, models: Models, jobs: Jobs, folder: Path) -> None:
        self.models, self.jobs, self.folder = models, jobs, folder

    def chosen(self, model: str) -> tuple[Any, ...]:
        """A model was picked: show what it takes. Outputs: facts, prompt, label."""
        try:
            facts = self.models.facts(model or "")
        except ModiffError as error:
            return views.error_line(in_words(error)), gr.skip(), gr.skip()
        takes = "a prompt" if facts.prompt else "a class" if facts.label else "no prompt"
        shown = views.note(f"{facts.pipeline}, takes {takes}")
        return shown, gr.update(visible=facts.prompt), gr.update(visible=facts.label)

    def generate(
        self, request: gr.Request, model: str, mode: str, config: str, integers: bool, max_error: float, compiled: bool,
        sampler: str, prompt: str, label: str, steps: float, num_images: float, seed: float,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Outputs: status, pictures, summary, layers, heat, result, report, config, stop. An error loses nothing."""
        keep = (gr.skip(),) * 7
        try:
            facts = self.models.facts(model or "")
            settings = Settings(
                model or "", (config or "") if mode == CONFIGURATION else None, integers, float(max_error or 0),
                compiled, None if sampler == OWN else sampler, prompt if facts.prompt else "",
                label if facts.label else "", *map(_whole, (steps, num_images, seed)),
            )  # fmt: skip
            job = self.jobs.start(_owner(request), lambda job: compare(job, self.models, settings))
        except ModiffError as error:
            yield views.error_line(in_words(error)), *keep, gr.skip()
            return
        name = settings.config or "accelerate"
        for _ in job.follow():
            if not job.done:
                view = job.view
                seen = view is not None and view.full is not None
                shown = views.pictures(view.full, view.quantized, name, settings.seed) if seen else gr.skip()
                yield views.progress(job), shown, *keep[1:], gr.update(interactive=True)
        idle = gr.update(interactive=False)
        if job.error is not None:
            yield _failed(job.error), *keep, idle
            return
        done: Comparison = job.result
        files = (
            gr.update(value=path and str(path), interactive=path is not None) for path in export(done, self.folder)
        )
        yield (views.note("done"), views.images_of(done), views.summary(done), views.layers(done), "", done,
               *files, idle)  # fmt: skip

    def look(self, request: gr.Request, done: Comparison | None) -> Iterator[tuple[Any, ...]]:
        """Outputs: status, heat, result, report, stop."""
        try:
            if done is None:
                raise ModiffError(
                    "heat map: expected a result, got none. It shows where its error arises. Generate first."
                )
            job = self.jobs.start(_owner(request), lambda job: heat_map(job, self.models, done))
        except ModiffError as error:
            yield views.error_line(in_words(error)), *(gr.skip(),) * 4
            return
        for _ in job.follow():
            if not job.done:
                yield views.progress(job), *(gr.skip(),) * 3, gr.update(interactive=True)
        idle = gr.update(interactive=False)
        if job.error is not None:
            yield _failed(job.error), *(gr.skip(),) * 3, idle
            return
        report = str(export(job.result, self.folder)[0])
        yield views.note("done"), views.heat(job.result.heat), job.result, gr.update(value=report), idle

    def stop(self, request: gr.Request) -> None:
        """Stop what this tab has asked for; also called when the tab is closed."""
        self.jobs.stop(_owner(request))


def _owner(request: gr.Request) -> str:
    return str(request.session_hash)


def _whole(value: float | None) -> int:
    """A number of a field; an empty one is refused later, as a count of 0 or a seed of -1 is."""
    return int(value) if value is not None and value == int(value) else -1


def _failed(error: BaseException) -> str:
    if isinstance(error, Cancelled):
        return views.note("stopped: nothing is left of it, and the model can be used at once")
    if not isinstance(error, ModiffError):
        traceback.print_exception(error, file=sys.stderr)
    return views.error_line(in_words(error))


def build(page: Page) -> gr.Blocks:
    """The page as Gradio's Blocks; nothing is served yet."""
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(INTRO)
        with gr.Row(elem_id="m-main"):
            with gr.Column(scale=1, min_width=280):
                controls, facts, ask = _controls(page)
                with gr.Row(elem_id="m-buttons"):
                    start = gr.Button("Generate", variant="primary", elem_id="m-generate", min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="m-stop", interactive=False, min_width=80)
            with gr.Column(scale=2, min_width=280, elem_id="m-results"):
                status = gr.HTML(views.note("Choose, then press Generate."), elem_id="m-status")
                summary = gr.HTML(elem_id="m-summary")
                pictures = gr.HTML(elem_id="m-pictures")
                with gr.Accordion("Layers, bits and backends", open=False, elem_id="m-layers-box"):
                    layers = gr.HTML(views.note("Generate first."), elem_id="m-layers")
                with gr.Accordion("Error of each layer and step", open=False, elem_id="m-heat-box"):
                    look = gr.Button("Draw the map", size="sm", elem_id="m-look")
                    heat = gr.HTML(elem_id="m-heat")
                with gr.Row():
                    report = gr.DownloadButton("Report (HTML)", interactive=False, size="sm", elem_id="m-report")
                    config = gr.DownloadButton("Configuration (JSON)", interactive=False, size="sm", elem_id="m-config")
        result = gr.State(None, time_to_live=3600)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (blocks.load, controls[0].change):
            event(page.chosen, controls[0], [facts, *ask], **quiet)
        start.click(page.generate, controls, [status, pictures, summary, layers, heat, result, report, config, stop],
                    concurrency_limit=None, **quiet)  # fmt: skip
        look.click(page.look, result, [status, heat, result, report, stop], concurrency_limit=None, **quiet)
        stop.click(page.stop, None, None, queue=False, **quiet)
        blocks.unload(page.stop)
    return blocks


def _controls(page: Page) -> tuple[list[Any], gr.HTML, list[Any]]:
    """What is chosen, in the order of `Page.generate`; the line of facts; prompt and class."""
    model = gr.Dropdown(page.models.choices(), value="embedded", label="Model", info=MODEL_INFO, elem_id="m-model",
                        allow_custom_value=True)  # fmt: skip
    facts = gr.HTML(elem_id="m-facts")
    prompt = gr.Textbox(label="Prompt", visible=False, elem_id="m-prompt", max_length=2000)
    label = gr.Textbox("0", label="Class", info="A number; or several, as 0-3,7.", visible=False, elem_id="m-label")
    mode = gr.Radio([CONFIGURATION, ACCELERATE], value=CONFIGURATION, show_label=False, elem_id="m-mode")
    with gr.Group() as chosen:
        config = gr.Dropdown(list(dict.fromkeys([*PRESETS, *FAMILIES])), value="w8a4", label="Configuration",
                             info=CONFIG_INFO, allow_custom_value=True, elem_id="m-configuration")  # fmt: skip
        integers = gr.Checkbox(True, label="Run on integers (simulated in floats otherwise)", elem_id="m-integers")
    with gr.Group(visible=False) as searched:
        max_error = gr.Number(0.02, label="Allowed error (relative L2)", minimum=0, maximum=1, step=0.005,
                              info="modiff times the layers of this machine and picks the fastest settings within it.",
                              elem_id="m-error")  # fmt: skip
        compiled = gr.Checkbox(True, label="Compile (faster, takes longer to prepare)", elem_id="m-compile")
    steps = gr.Slider(1, MOST_STEPS, 50, step=1, label="Steps", elem_id="m-steps")
    images = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="m-images")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="m-seed")
        sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler", min_width=140, elem_id="m-sampler")
    mode.change(lambda mode: (gr.update(visible=mode == CONFIGURATION), gr.update(visible=mode == ACCELERATE)),
                mode, [chosen, searched], show_progress="hidden", api_visibility="private", queue=False)  # fmt: skip
    controls = [model, mode, config, integers, max_error, compiled, sampler, prompt, label, steps, images, seed]
    return controls, facts, [prompt, label]
