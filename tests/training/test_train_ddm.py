"""Training of the decoupled diffusion model: what it begins with, its loss, and what is refused."""

import json
from functools import partial

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

from modiff.generate.samplers import UnconditionalPipeline
from modiff.sampling.ddm import OUTPUTS, DDMScheduler


@pytest.fixture(scope="module")
def ddm(script):
    return script("train_ddm")


@pytest.fixture(scope="module")
def run(ticking, ddm, tiny_unet):
    """`ticking` with this script and its smallest options."""
    return partial(ticking, ddm, tiny_unet)


@pytest.mark.parametrize("attenuation", OUTPUTS["decomposition"])
def test_a_run_writes_a_pipeline_that_samples_and_goes_on_where_it_stopped(run, tmp_path, attenuation):
    run(tmp_path, 2, "--attenuation", attenuation)
    run(tmp_path, 4, "--attenuation", attenuation)
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["step"], record["attenuation"]) == (4, attenuation)
    pipe = UnconditionalPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.attenuation == attenuation
    drawn = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)
    assert drawn.min() < drawn.max()


def test_each_output_begins_with_the_noise_of_the_model_that_it_begins_with(ddm, script, ticking, tiny_unet, tmp_path):
    ticking(script("train_reference"), tiny_unet, tmp_path, 2)
    trained = DDIMPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32).unet
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.5, 700.0])
    begun = ddm.begun_with(str(tmp_path / "pipeline"), 2)
    torch.testing.assert_close(begun(x, t).sample, trained(x, t).sample.repeat(1, 2, 1, 1))
    assert str(tmp_path) not in begun.to_json_string()  # what is shipped names no folder of who trained it
    with pytest.raises(SystemExit, match=r"expected a model of 1 channels at --size 8, got 1 at 32\.") as caught:
        ddm.train(ddm.parse_arguments([*tiny_unet, "-o", str(tmp_path / "other"), "--begin-with", "embedded"]))
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_begun_with_is_named(ddm, tmp_path):
    with pytest.raises(SystemExit, match=f"--begin-with {tmp_path}: expected a pipeline folder with a UNet2DModel"):
        ddm.begun_with(str(tmp_path), 2)
    two = UNet2DModel(sample_size=8, in_channels=1, out_channels=2, block_out_channels=(16,), norm_num_groups=8,
                      down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    two.save_pretrained(tmp_path / "unet")
    with pytest.raises(SystemExit, match="expected 1 output channels, those of the noise, got 2"):
        ddm.begun_with(str(tmp_path), 2)


@pytest.mark.parametrize("attenuation", OUTPUTS["decomposition"])
def test_the_loss_is_zero_for_exact_outputs_and_weighs_an_error_as_published(ddm, attenuation, monkeypatch):
    """A network that knows the images finds eps, K and v from what it sees; one that errs by e in eps pays for that."""
    scheduler = DDMScheduler(attenuation=attenuation, prediction_type="decomposition")
    images = torch.rand(512, 1, 4, 4) * 2 - 1
    add_noise, known = scheduler.add_noise, {}

    def noted(batch, noise, time, curve):
        known.update(noise=noise, time=time, curve=curve)
        return add_noise(batch, noise, time, curve)

    monkeypatch.setattr(scheduler, "add_noise", noted)
    for error in (0.0, 0.5):

        def network(x, timesteps, return_dict, error=error):
            t = known["time"].reshape(-1, 1, 1, 1)
            a, s = scheduler.levels(t)
            n = (a**2 + s**2).sqrt()
            v = (a * x - n * images) / s  # from C = -x_0 - K / 2
            kept = [known["curve"]] if scheduler.outputs == 3 else []
            return (torch.cat([*kept, v, known["noise"] + error], 1),)

        loss = float(ddm.loss_of(scheduler)(network, images))
        t = known["time"].double()
        weight = 1 + (t / (1 - t)) ** 2 if attenuation == "const_2" else 1 / (1 - t)
        s = t if attenuation == "const_2" else t.sqrt()
        expected = (weight.clamp(max=10) * error**2 + (1 - t) ** 2 * s * error).mean()
        assert loss == pytest.approx(float(expected), abs=1e-3, rel=1e-3)
