"""Sample text from a masked-diffusion model, run it on 8-bit residuals, and let a reward steer it.

python examples/text_model.py
"""

import torch

import modiff
from modiff.assets import text_folder
from modiff.sampling.masked import MaskedTextPipeline
from modiff.sampling.particle_gibbs import ParticleGibbsPipeline

pipe = MaskedTextPipeline.from_pretrained(text_folder())
pipe.set_progress_bar_config(disable=True)


def sample() -> torch.Tensor:
    """Two rows of 64 letters, the same at each call but for the model's precision."""
    output = pipe(2, 64, num_inference_steps=32, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    print(f"{output.evaluations} evaluations in 32 steps: {output.texts[0]!r}")
    return output.sequences


exact = sample()

# each call is a trajectory: layers quantize what changed since the step before, with a scale for each token
modiff.apply(pipe, "w8a8")
agreement = (sample() == exact).float().mean()
print(f"modulated W8A8: {agreement:.0%} of the letters are the same")

# infilling: underscores are masked positions
prompt = torch.tensor([[*pipe.model.encode("and the lord said unto "), *[pipe.model.mask_token_id] * 24]])
print(pipe(input_ids=prompt, num_inference_steps=16, generator=torch.Generator().manual_seed(0)).texts[0])


def many_e(tokens: torch.Tensor) -> torch.Tensor:
    """The share of the letter e in each row."""
    return (tokens == pipe.model.encode("e")).float().mean(1)


guided = ParticleGibbsPipeline(**pipe.components)
guided.set_progress_bar_config(disable=True)
modiff.remove(pipe)
modiff.apply(guided, "w8a8")  # a sweep is a trajectory; resampling takes the states of quantized layers along
output = guided(
    many_e, temperature=0.02, particles=4, sweeps=2, every=2, length=48, num_inference_steps=16,
    generator=torch.Generator().manual_seed(0),
)  # fmt: skip
print(f"{float(output.best_rewards):.0%} e: {guided.texts(output.best)[0]!r}")
