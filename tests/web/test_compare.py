"""A request from end to end, without a browser: what is compared, kept, stopped and refused."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modiff
from modiff.errors import ConfigError, ModiffError
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import followed
from modiff.model.accelerate.search import AccelerateResult
from modiff.model.trajectory import state_bytes
from modiff.web import views
from modiff.web.compare import Compared, Progress, Settings, compare, heat_map
from modiff.web.export import document, export
from modiff.web.jobs import Cancelled, Jobs, Request
from modiff.web.models import Models
from modiff.web.previews import Previews
from tests.hosts.tiny import HOSTS
from tests.pixels import saved_pipeline

TINY = Settings(model="tiny", config="w8a4", integers=False, steps=4, num_images=2, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    saved_pipeline(root / "tiny")
    for name in ("sd", "dit"):
        HOSTS[name].build().save_pretrained(root / name)
    return root


@pytest.fixture
def models(root: Path) -> Models:
    return Models(root, load_pipeline)


def done(models: Models, settings: Settings, work: Callable[..., Any] = compare, on: Any = None) -> Compared:
    job = Jobs().start("tab", lambda job: work(job, models, on or settings))
    *_, last = job.follow(0.01)
    if last.error is not None:
        raise last.error
    return last.result


def reference(settings: Settings, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Full precision and quantized by the public verbs alone."""
    pipe, images = load_pipeline(root / settings.model), []
    for _ in range(2):
        noise = [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.num_images)]
        images.append(pipe(batch_size=settings.num_images, generator=noise, num_inference_steps=settings.steps,
                           output_type="np").images)  # fmt: skip
        if len(images) == 1:
            modiff.apply(pipe, settings.config)
    return images[0], images[1]


def test_the_images_are_those_of_the_public_verbs_bit_for_bit(models: Models, root: Path) -> None:
    result = done(models, TINY)
    full, quantized = reference(TINY, root)
    assert result.quantized is not None
    np.testing.assert_array_equal(result.full.images, full)
    np.testing.assert_array_equal(result.quantized.images, quantized)
    error = np.linalg.norm(quantized.astype(float) - full) / np.linalg.norm(full)
    assert result.error["relative_l2"] == pytest.approx(error, rel=1e-6)
    assert len(result.full.steps) == len(result.quantized.previews) == TINY.steps
    assert result.full.seconds >= sum(result.full.steps) * 0.5


def test_full_precision_is_drawn_again_only_where_more_than_the_configuration_changed(models: Models) -> None:
    first = done(models, TINY)
    assert done(models, replace(TINY, config="w4a4")).full is first.full
    assert done(models, replace(TINY, seed=4)).full is not first.full


def test_a_stop_in_the_middle_leaves_the_model_plain_and_the_next_request_whole(
    models: Models, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.load("tiny")
    seen: list[int] = []
    show = Request.show

    def stop_at_the_second_quantized_step(self: Request, view: Progress) -> None:
        if view.stage == "quantized" and view.step == 2:
            seen.append(view.step)
            self.cancel()
        show(self, view)

    with monkeypatch.context() as patch:
        patch.setattr(Request, "show", stop_at_the_second_quantized_step)
        with pytest.raises(Cancelled):
            done(models, TINY)
    assert seen == [2]
    assert loaded.quantized is not None
    assert state_bytes(loaded.quantized[1][0].unet) == 0
    modiff.remove(modiff.clone(loaded.quantized[1][0]))  # removable at once
    with pytest.raises(modiff.StateError):
        modiff.report(loaded.pipe)
    result = done(models, TINY)
    assert result.quantized is not None
    np.testing.assert_array_equal(result.quantized.images, reference(TINY, root)[1])
    assert "step" not in vars(loaded.sampling(None).scheduler)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "a fox"}, "no `prompt`"),
        ({"model": "sd"}, "expected `prompt`"),
        ({"model": "dit"}, "expected `label`"),
        ({"model": "dit", "label": "1000"}, "0 to 999"),
        ({"model": "dit", "label": "cat"}, "numbers and ranges"),
        ({"steps": 0}, "steps"),
        ({"steps": 251}, "at most 250"),
        ({"num_images": 9}, "at most 8"),
        ({"seed": -1}, "seed"),
        ({"max_error": 0.0}, "max_error"),
        ({"sampler": "flow-euler"}, "scheduler"),
        ({"config": "w9a9"}, "w9a9"),
        ({"model": "../tiny"}, "inside the folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(models: Models, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModiffError, match=words) as raised:
        done(models, replace(TINY, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("changes", [{"model": "sd", "prompt": "abc"}, {"model": "dit", "label": "1,2"}])
def test_prompts_and_classes_are_drawn_and_latents_are_shown_as_pictures(
    models: Models, changes: dict[str, Any]
) -> None:
    result = done(models, replace(TINY, **changes, num_images=2, steps=3))
    assert result.quantized is not None
    assert result.full.previews[0].shape[:1] + result.full.previews[0].shape[-1:] == (2, 3)
    assert np.isfinite(result.quantized.images).all()


@pytest.mark.parametrize("name", ["sd", "pixart", "sd3", "flux"])
def test_previews_of_the_last_step_are_the_images(name: str) -> None:
    host, shown = HOSTS[name], []
    pipe = host.build()
    previews = Previews(pipe, 1)

    def after(sample: torch.Tensor) -> None:
        previews.seconds = 0.0  # it is always time
        shown.append(previews.of(sample))

    with followed(pipe, after):
        image = host.call(pipe, steps=2, output_type="np")[0]
    assert len(shown) == 2
    np.testing.assert_allclose(shown[-1][0], np.round(255 * image), atol=1)


def test_previews_take_a_small_share_of_the_time() -> None:
    pipe = HOSTS["sd"].build()
    previews = Previews(pipe, 1)
    previews.seconds = 1e6
    assert previews.of(torch.zeros(1, 4, 8, 8)) is None


def test_accelerate_says_what_it_did_and_its_model_is_left_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, config=None, compile=False, max_error=1e-6)
    result = done(models, settings)
    assert result.accelerated is not None
    assert not result.accelerated.accelerated
    assert result.quantized is None
    assert views.in_words(result) == f"The model was left as it is: {result.accelerated.reason}."
    with pytest.raises(ConfigError, match="expected quantized images"):
        done(models, settings, heat_map, on=result)


def test_what_accelerate_found_serves_other_seeds_too(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def accelerate(pipe: Any, max_error: float, example: Callable[[], object], *_: Any, **__: Any) -> AccelerateResult:
        calls.append(example())
        report = modiff.apply(pipe, "w8a8")
        return AccelerateResult(
            1.0, max_error, True, floats=1.0, after=2.0, config=modiff.presets.w8a8(), report=report
        )

    monkeypatch.setattr("modiff.api.accelerate", accelerate)
    first, second = (done(models, replace(TINY, config=None, seed=seed)) for seed in (3, 4))
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], first.full.images)
    for result in (first, second):
        assert result.quantized is not None
        np.testing.assert_array_equal(
            result.quantized.images, done(models, replace(result.settings, config="w8a8")).quantized.images
        )


def test_two_users_of_a_model_get_what_each_asked_for(models: Models, root: Path) -> None:
    jobs, settings = Jobs(), [replace(TINY, config=config, seed=seed) for config, seed in (("w8a4", 1), ("w4a4", 2))]
    started = [jobs.start(s.name, lambda job, s=s: compare(job, models, s)) for s in settings]
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda job: [*job.follow(0.01)][-1], started))
    for end, chosen in zip(ends, settings, strict=True):
        np.testing.assert_array_equal(end.result.quantized.images, reference(chosen, root)[1])


def test_the_heat_map_and_the_report_show_layers_steps_and_settings(models: Models, tmp_path: Path) -> None:
    result = done(models, TINY)
    result = done(models, TINY, heat_map, on=result)
    assert result.heat is not None
    assert b"<svg" in result.heat.data
    report, config = export(result, tmp_path)
    text = report.read_text(encoding="utf-8")
    assert all(word in text for word in ("conv_in", "seed 3", "simulated in floats", "Where the error arises"))
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert config is not None
    assert modiff.ModiffConfig.from_json(config.read_text()) == modiff.presets.w8a4()
    assert document(result).sections[0].title == "Result"


def test_simulation_is_not_called_fast_and_integers_are_compared_by_the_median_step(models: Models) -> None:
    simulated = done(models, TINY)
    assert "nothing is faster" in views.in_words(simulated)
    integers = done(models, replace(TINY, integers=True))
    assert "A step on integers is" in views.in_words(integers)
    raced = AccelerateResult(
        before=1.0, max_error=0.02, accelerated=True, floats=2.0, after=3.0, reason="both compiled"
    )
    assert "1.50 times as fast as floats (both compiled)" in views.in_words(replace(integers, accelerated=raced))
    assert "do not trust the times" in views.in_words(replace(integers, crowded=True))
    assert "not finite" in views.in_words(replace(integers, error={"relative_l2": None, "psnr_db": None}))


def test_text_of_a_model_is_escaped_and_the_gain_is_printed(models: Models) -> None:
    result = done(models, TINY)
    odd = replace(result, settings=replace(TINY, config="<script>"))
    html = views.summary(odd) + views.images_of(odd) + views.error_line(ValueError("<script>"))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("difference ×8") == 2 * TINY.num_images
    assert views.layers(result).count("<tr>") == 1 + len(result.report.entries if result.report else ())


def test_a_wait_and_a_step_are_told() -> None:
    job = Request(Jobs(), lambda job: None)
    job.view = Progress("quantized", 3, 7)
    assert "quantized: 3 of 7" in views.progress(job)
    job.ahead = 2
    assert "2 requests" in views.progress(job)
    job.cancel()
    assert "stopping" in views.progress(job)
