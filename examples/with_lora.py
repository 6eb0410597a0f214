"""Use a LoRA with a quantized Stable Diffusion U-Net: load it, scale it, take it off.

python examples/with_lora.py
"""

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import modiff

torch.manual_seed(0)
unet = UNet2DConditionModel(  # a tiny one; with a pipeline: pipe.load_lora_weights(...) and pipe.set_adapters(...)
    sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
    attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()  # fmt: skip
noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 32)


@torch.no_grad()
def sample():
    x = noise
    with modiff.trajectory(unet):
        for t in range(900, 0, -100):
            x = x - 0.1 * unet(x, t, text).sample
    return x


modiff.apply(unet, "w8a8")
before = sample()
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
for weight in (1.0, 0.5):
    unet.set_adapters(["style"], [weight])
    print(f"adapter at {weight}: changes the sample by {(sample() - before).norm() / before.norm():.4f}")
unet.delete_adapters(["style"])
print("without it the bits are those of before:", torch.equal(sample(), before))
