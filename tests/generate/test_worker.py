"""Drawing spans: the same image in whatever span, on every kind of pipeline; digests tell models apart."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import modiff
from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, QuantizerConfig
from modiff.errors import CalibrationError, StateError
from modiff.generate import worker
from modiff.generate.environment import environment
from modiff.generate.job import Conditions, Job
from modiff.generate.run import LocalEngine
from modiff.generate.shards import Span
from modiff.generate.worker import digest
from modiff.hosts.diffusers.load import load_pipeline
from tests.pixels import pixel_pipeline


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    worker.opened.cache_clear()


def job(folder: Path, **changes: Any) -> Job:
    return Job(**{"model": str(folder), "num_images": 9, "steps": 2} | changes)


def drawn(job: Job, first: int, count: int, batch_size: int = 2) -> np.ndarray:
    return worker.draw_span(job, batch_size, Span(first=first, count=count)).images


@pytest.mark.parametrize("config", [None, presets.plain(8, 4), presets.w8a4()])
def test_an_image_has_the_same_bits_whatever_span_it_is_drawn_in(model: Path, config: ModiffConfig | None) -> None:
    noisy = job(model, config=config, scheduler="ddpm")  # ddpm draws noise at each step, too
    whole = drawn(noisy, 0, 6)
    assert whole.dtype == np.uint8
    assert len({image.tobytes() for image in whole}) == 6
    # the last batch is whole, though one image of it is dropped
    assert np.array_equal(drawn(noisy, 0, 5), whole[:5])
    worker.opened.cache_clear()
    assert np.array_equal(drawn(noisy, 2, 4), whole[2:])


def test_every_batch_has_the_same_size_and_progress_hears_of_each(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # at 8 bits the tiny model hides what another batch does to its sums: so look at the batches
    batches: list[list[int]] = []
    ticks: list[int] = []

    def noted(pipe: Any, indices: Any, **options: Any) -> np.ndarray:
        batches.append(list(indices))
        return np.full((len(indices), 8, 8, 1), 0.5)

    monkeypatch.setattr(worker, "draw", noted)
    images = worker.draw_span(job(model), 2, Span(first=4, count=3), ticks.append).images
    assert images.shape == (3, 8, 8, 1)
    assert (batches, ticks) == ([[4, 5], [6, 7]], [2, 1])


def test_a_pipeline_that_was_quantized_and_saved_draws_the_same_again(model: Path, tmp_path: Path) -> None:
    pipe, folder = pixel_pipeline(), tmp_path / "saved"
    modiff.apply(pipe, ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(bits=4, dynamic=False))))
    modiff.calibrate(pipe, lambda: pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(9)))
    modiff.pack(pipe)
    modiff.save(pipe, folder)
    facts, span = worker.describe(job(folder))[0], drawn(job(folder), 2, 4)
    worker.opened.cache_clear()
    assert worker.describe(job(folder))[0] == facts
    assert np.array_equal(drawn(job(folder), 0, 6)[2:], span)
    full = drawn(job(model), 2, 4).astype(int)
    assert 0 < np.abs(span - full).mean() < np.abs(full[0] - full[1]).mean()
    with pytest.raises(StateError):
        worker.describe(job(folder, config=presets.w8a8()))


def test_pixels_that_are_not_finite_and_scales_that_were_never_measured_are_errors(tmp_path: Path) -> None:
    pipe = pixel_pipeline()
    pipe.unet.conv_out.bias.data.fill_(3e38)  # finite, so it loads; the sum is not
    pipe.unet.conv_out.weight.data.fill_(3e38)
    with pytest.raises(StateError, match="image 4: expected finite pixels"):
        worker.draw(pipe, [4], steps=2, seed=0, conditions=Conditions())
    pipe = pixel_pipeline()
    modiff.apply(pipe, ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(dynamic=False))))
    with pytest.raises(CalibrationError):
        worker.draw(pipe, [0], steps=2, seed=0, conditions=Conditions())


def test_the_engine_of_this_process_gives_its_threads_back_and_lets_go_of_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, engine = torch.get_num_threads(), LocalEngine()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    more = job(model, threads=threads + 1)
    facts, _ = engine.describe(more)
    (span,) = engine.draw(more, 2, [Span(first=2, count=1)], lambda images: None)
    assert (span.first, span.environment["threads"], span.digest) == (2, threads + 1, facts["model"])
    assert not torch.backends.cudnn.allow_tf32  # images of full precision are not rounded
    engine.close()
    assert (torch.get_num_threads(), worker.opened.cache_info().currsize) == (threads, 0)


def test_the_same_model_from_a_folder_or_with_another_scheduler_has_the_same_digest(model: Path) -> None:
    sampled = pixel_pipeline()
    sampled.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    assert {digest(load_pipeline(model)), digest(sampled)} == {digest(pixel_pipeline())}


def test_every_weight_buffer_and_setting_counts() -> None:
    pipe, digests = pixel_pipeline(), {digest(pixel_pipeline())}
    weight = pipe.unet.conv_out.weight.data.view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))  # its last bit
    digests.add(digest(pipe))
    pipe.unet.register_to_config(flip_sin_to_cos=False)
    digests.add(digest(pipe))
    pipe.unet.register_buffer("table", torch.zeros(0))
    assert len(digests | {digest(pipe)}) == 4


def test_the_environment_names_the_versions_and_not_the_machine() -> None:
    values = environment()
    assert (values["modiff"], values["threads"]) == (modiff.__version__, torch.get_num_threads())
    assert not [word for word in (socket.gethostname(), "/home", "/root") if word in json.dumps(values)]
