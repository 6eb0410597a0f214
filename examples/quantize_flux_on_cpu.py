"""Quantize Flux on a CPU, with a limit on the memory of states.

    python examples/quantize_flux_on_cpu.py [MODEL]

Without a model: a tiny random Flux that reads text embeddings, so that the script runs anywhere.
"""

import sys

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import modiff

if len(sys.argv) > 1:
    pipe = FluxPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    settings = {"prompt": "a red fox in the snow", "num_inference_steps": 28}
else:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():  # diffusers starts its last layer at zero
        torch.nn.init.normal_(parameter, std=0.15)
    pipe = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0).eval(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    settings |= {"height": 16, "width": 16, "num_inference_steps": 8}


def latents():
    return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="latent").images.float()


exact = latents()
modiff.apply(pipe, "w8a8:integer", state_memory="16GiB")  # layers that do not fit run plain at 8 bits
print(f"relative L2 of latents: {(latents() - exact).norm() / exact.norm():.4f}")
print(modiff.report(pipe).memory)
