"""Training of the noise level estimator: runs, its loss, how near it comes to the best one, and what is refused."""

from functools import partial

import pytest
import torch

from modiff.sampling.noise_level import NoiseLevelEstimator


@pytest.fixture(scope="module")
def level(script):
    return script("train_noise_level")


@pytest.fixture(scope="module")
def run(ticking, level, images):
    words = f"--images {images} --size 8 --channels 4,4 --batch 4 --threads 1 --device cpu --anneal 1e-9"
    return partial(ticking, level, words.split())


def test_a_run_writes_an_estimator_that_diffusers_loads_and_goes_on(run, tmp_path):
    run(tmp_path, 2)
    run(tmp_path, 3)
    estimator = NoiseLevelEstimator.from_pretrained(tmp_path / "pipeline" / "estimator")
    assert list(estimator.config.channels) == [4, 4]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 3
    torch.testing.assert_close(estimator.head.weight.half(), state["average"]["head.weight"].half())
    assert 0 < float(estimator.levels(torch.zeros(1, 1, 8, 8))) < 1


def test_more_convolutions_than_an_image_can_be_halved_are_refused(run, tmp_path):
    with pytest.raises(SystemExit, match=r"--channels 4,4,4,4: expected at most 3 of them\.") as caught:
        run(tmp_path, 2, "--channels", "4,4,4,4")
    assert "\n" not in str(caught.value)


def test_the_loss_is_the_square_of_the_error_of_the_logarithm(level, script):
    scheduler = script("train_reference").build_scheduler("linear")
    images, table = torch.zeros(4000, 1, 4, 4), (1 - scheduler.alphas_cumprod.double()).log()
    loss = level.loss_of(scheduler)(lambda noisy: torch.full((len(noisy),), -0.5), images)
    assert float(loss) == pytest.approx(float((table + 0.5).square().mean()), rel=0.15)


def test_on_normal_data_a_trained_estimator_comes_near_the_best_one(level, script):
    """Data N(0, 1/4): the best estimator of ab deviates by (ab / 4 + 1 - ab) sqrt(2 / d) / (3/4)."""
    torch.manual_seed(0)
    model, side, steps = NoiseLevelEstimator(1, (16, 32)), 8, 400
    loss = level.loss_of(script("train_reference").build_scheduler("linear"))
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, torch.randn(96, 1, side, side) / 2).backward()
        optimizer.step()
        rate.step()
    for ab in (0.1, 0.5, 0.9):
        clean, noise = torch.randn(2, 2000, 1, side, side)
        levels = model.levels(ab**0.5 * clean / 2 + (1 - ab) ** 0.5 * noise)
        best = (ab / 4 + 1 - ab) * (2 / side**2) ** 0.5 / 0.75
        assert float((levels - ab).square().mean().sqrt()) < 2 * best, ab
