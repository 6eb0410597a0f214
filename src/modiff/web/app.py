"""The page: its layout, and what each control calls. Gradio draws it."""

import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from modiff.errors import ModiffError
from modiff.generate.samplers import SAMPLERS
from modiff.presets import PRESETS
from modiff.web import views
from modiff.web.compare import MOST_IMAGES, MOST_STEPS, Compared, Progress, Settings, compare, heat_map
from modiff.web.export import export
from modiff.web.jobs import Cancelled, Jobs, Request
from modiff.web.models import Models

Updates = dict[Any, Any]  # components and their new values
OWN = "model's own"
CONFIGURATION, ACCELERATE = "Configuration", "Accelerate"
FAMILIES = ("plain:8:4", "published:8:4", "tuned:8:4")
INTRO = (
    '<header class="m-head"><h1>modiff</h1><p>The same model, the same noise: full precision next to quantized. '
    "Everything runs on this machine.</p></header>"
)
MODEL_INFO = "A model of the package, or a diffusers folder inside the one that modiff ui was started with."
CONFIG_INFO = "Bits of weights and activations, a family such as tuned:8:4, or a JSON file in the folder."


class Page:
    """The layout, and what its controls do. folder: where files to download are written."""

    def __init__(self, models: Models, jobs: Jobs, folder: Path) -> None:
        self.models, self.jobs, self.folder = models, jobs, folder
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        with gr.Blocks(analytics_enabled=False, title="modiff", delete_cache=(3600, 3600)) as self.blocks:
            gr.HTML(INTRO)
            with gr.Row(elem_id="m-main"):
                with gr.Column(scale=1, min_width=280):
                    controls, asks = _controls(models.choices(), quiet)
                    with gr.Row(elem_id="m-buttons"):
                        start = gr.Button("Generate", variant="primary", elem_id="m-generate", min_width=120)
                        self.end = gr.Button("Stop", variant="stop", elem_id="m-stop", interactive=False, min_width=80)
                with gr.Column(scale=2, min_width=280, elem_id="m-results"):
                    self.status = gr.HTML(views.note("Choose, then press Generate."), elem_id="m-status")
                    self.summary = gr.HTML(elem_id="m-summary")
                    self.pictures = gr.HTML(elem_id="m-pictures")
                    with gr.Accordion("Layers, bits and backends", open=False, elem_id="m-layers-box"):
                        self.layers = gr.HTML(views.note("Generate first."), elem_id="m-layers")
                    with gr.Accordion("Error of each layer and step", open=False, elem_id="m-heat-box"):
                        draw = gr.Button("Draw the map", size="sm", elem_id="m-look")
                        self.heat = gr.HTML(elem_id="m-heat")
                    with gr.Row():
                        names = {"Report (HTML)": "m-report", "Configuration (JSON)": "m-config"}
                        self.files = [gr.DownloadButton(text, interactive=False, size="sm", elem_id=name)
                                      for text, name in names.items()]  # fmt: skip
            self.result = gr.State(None, time_to_live=3600)
            outputs = [self.status, self.summary, self.pictures, self.layers, self.heat, self.result, self.end]
            for event in (self.blocks.load, controls[0].change):
                event(self.choose, controls[0], asks, **quiet)
            start.click(self.generate, controls, outputs + self.files, concurrency_limit=None, **quiet)
            draw.click(self.draw, self.result, outputs + self.files, concurrency_limit=None, **quiet)
            self.end.click(self.stop, None, None, queue=False, **quiet)
            self.blocks.unload(self.stop)

    def choose(self, model: str) -> tuple[Any, ...]:
        """A model was picked: say what it is, and ask for what it takes. Outputs: a line, prompt, class."""
        try:
            facts = self.models.facts(model or "")
        except ModiffError as error:
            return views.error_line(error), gr.skip(), gr.skip()
        takes = "a prompt" if facts.prompt else "a class" if facts.label else "no prompt"
        label = gr.update(visible=True, value="0") if facts.label else gr.update(visible=False, value="")
        prompt = gr.update(visible=True) if facts.prompt else gr.update(visible=False, value="")
        return views.note(f"{facts.pipeline}, takes {takes}"), prompt, label

    def generate(
        self, request: gr.Request, model: str, mode: str, config: str, integers: bool, max_error: float, compiled: bool,
        sampler: str, prompt: str, label: str, steps: float, num_images: float, seed: float,
    ) -> Iterator[Updates]:  # fmt: skip
        """Full precision and quantized, with what they look like meanwhile."""
        chosen = Settings(model or "", (config or "") if mode == CONFIGURATION else None, integers, max_error or 0.0,
                          compiled, None if sampler == OWN else sampler, prompt, label,
                          *map(_whole, (steps, num_images, seed)))  # fmt: skip

        def shown(view: Progress) -> Updates:
            return {self.pictures: views.pictures(view.full, view.quantized, chosen.name, chosen.seed)}

        for update in self._follow(request, lambda job: compare(job, self.models, chosen), shown):
            done = update.get(self.result)
            if done is not None:
                update |= {self.pictures: views.images_of(done), self.summary: views.summary(done),
                           self.layers: views.layers(done)}  # fmt: skip
            yield update

    def draw(self, request: gr.Request, done: Compared | None) -> Iterator[Updates]:
        """The map of errors of the last result."""
        yield from self._follow(request, lambda job: heat_map(job, self.models, done))

    def stop(self, request: gr.Request) -> None:
        """Stop what this tab has asked for; also called when the tab is closed."""
        self.jobs.stop(str(request.session_hash))

    def _follow(
        self, tab: gr.Request, work: Callable[[Request], Compared], shown: Callable[[Progress], Updates] | None = None
    ) -> Iterator[Updates]:
        """Start a request and say where it stands; an error is a line, and what was there before stays."""
        try:
            job = self.jobs.start(str(tab.session_hash), work)
        except ModiffError as error:
            yield {self.status: views.error_line(error)}
            return
        for _ in job.follow():
            if not job.done:
                seen = shown(job.view) if shown and job.view is not None and job.view.full is not None else {}
                yield {self.status: views.progress(job), self.end: gr.update(interactive=True)} | seen
        idle = {self.end: gr.update(interactive=False)}
        if not job.done or isinstance(job.error, Cancelled):
            yield idle | {self.status: views.stopped(job)}
        elif job.error is not None:
            if not isinstance(job.error, ModiffError):
                traceback.print_exception(job.error, file=sys.stderr)
            yield idle | {self.status: views.error_line(job.error)}
        else:
            paths = zip(self.files, export(job.result, self.folder), strict=True)
            files = {b: gr.update(value=path and str(path), interactive=path is not None) for b, path in paths}
            yield idle | files | {self.status: views.note("done"), self.heat: views.heat(job.result.heat),
                                  self.result: job.result}  # fmt: skip


def _whole(value: float | None) -> int:
    """A number of a field; an empty one is refused later, as a count of 0 or a seed of -1 is."""
    return int(value) if value is not None and value == int(value) else -1


def _controls(models: list[str], quiet: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What is chosen, in the order of `Page.generate`; and what `Page.choose` changes."""
    model = gr.Dropdown(models, value="embedded", label="Model", info=MODEL_INFO, elem_id="m-model",
                        allow_custom_value=True)  # fmt: skip
    facts = gr.HTML(elem_id="m-facts")
    prompt = gr.Textbox(label="Prompt", visible=False, elem_id="m-prompt", max_length=2000)
    label = gr.Textbox(label="Class", info="A number; or several, as 0-3,7.", visible=False, elem_id="m-label")
    mode = gr.Radio([CONFIGURATION, ACCELERATE], value=CONFIGURATION, show_label=False, elem_id="m-mode")
    with gr.Group() as chosen:
        config = gr.Dropdown([*PRESETS, *FAMILIES], value="w8a4", label="Configuration",
                             info=CONFIG_INFO, allow_custom_value=True, elem_id="m-configuration")  # fmt: skip
        integers = gr.Checkbox(True, label="Run on integers (simulated in floats otherwise)", elem_id="m-integers")
    with gr.Group(visible=False) as searched:
        max_error = gr.Number(0.02, label="Allowed error (relative L2)", step=0.005,
                              info="modiff times the layers of this machine and picks the fastest settings within it.",
                              elem_id="m-error")  # fmt: skip
        compiled = gr.Checkbox(True, label="Compile (faster, takes longer to prepare)", elem_id="m-compile")
    steps = gr.Slider(1, MOST_STEPS, 50, step=1, label="Steps", elem_id="m-steps")
    images = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="m-images")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=100, elem_id="m-seed")
        sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler", min_width=140, elem_id="m-sampler")
    mode.change(lambda mode: (gr.update(visible=mode == CONFIGURATION), gr.update(visible=mode == ACCELERATE)),
                mode, [chosen, searched], queue=False, **quiet)  # fmt: skip
    controls = [model, mode, config, integers, max_error, compiled, sampler, prompt, label, steps, images, seed]
    return controls, [facts, prompt, label]
