"""Trajectories that are timed: what an example returns, how far it is off, and the noise of a call."""

import math

import numpy as np
import pytest
import torch
from diffusers import ImagePipelineOutput
from PIL import Image

from modiff import ConfigError
from modiff.model.accelerate.loops import Trials, arrays, call_of, difference, watched
from tests.model.toys import sample, toy
from tests.pixels import pixel_pipeline

GREY = Image.new("L", (2, 2), 51)


@pytest.mark.parametrize(
    "value",
    [torch.full((1, 2, 2), 0.2), np.full((1, 2, 2), 0.2), [GREY], (None, "text", torch.full((1, 2, 2), 0.2)),
     ImagePipelineOutput(images=[GREY]), {"images": np.full((1, 2, 2), 0.2, np.float32), "more": torch.zeros(3)}],
    ids=["tensor", "array", "pictures", "tuple", "output", "mapping"],
)  # fmt: skip
def test_what_an_example_returns_is_one_array(value: object) -> None:
    (array,) = arrays(value)
    assert array.dtype == torch.float64
    torch.testing.assert_close(array, torch.full((1, 2, 2), 0.2, dtype=torch.float64))


def test_an_example_that_returns_nothing_is_judged_by_what_the_network_read_and_gave_last() -> None:
    model = toy()
    trials = Trials([model], lambda: sample(model, steps=3)[:0], lambda _: None, lambda: None)  # type: ignore[arg-type]
    with watched([model]) as trials.watches:
        read, gave = trials.trajectory("")
        assert len(trials.seconds()) == 3
    outputs = sample(toy(), steps=3)
    torch.testing.assert_close(gave, outputs[-1].double())
    x = torch.randn(read.shape, generator=torch.Generator().manual_seed(0)) - 0.1 * (outputs[0] + outputs[1])
    torch.testing.assert_close(read, x.double())
    assert model._compiled_call_impl is None


def test_the_difference_is_relative_and_the_largest_of_all_and_never_small_by_accident() -> None:
    a, b = torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 3.0]).double()
    assert difference([b], [a]) == pytest.approx(0.2)
    assert difference([b, a], [a, a]) == pytest.approx(0.2)
    assert [difference(*pair) for pair in (([], []), ([a], []), ([a[:1]], [a]), ([a * math.nan], [a]))] == [
        math.inf
    ] * 4


def test_a_call_has_the_same_noise_each_time_and_pictures_without_rounding() -> None:
    pipe = pixel_pipeline()
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    run = call_of(pipe, "__call__", {"batch_size": 2, "num_inference_steps": 2, "generator": generators})
    (first,), (second,) = arrays(run()), arrays(run())
    assert torch.equal(first, second)
    assert bool(((first * 255).round() - first * 255).any())


def test_a_call_of_a_module_and_a_compiled_network_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"accelerate\.example: expected a function .*, got \{\}"):
        call_of(toy(), "", {})
    model = toy()
    model.attention.compile(backend="eager")
    with (
        pytest.raises(ConfigError, match="expected a network that is not compiled, got Toy with a compiled call"),
        watched([model]),
    ):
        pass
