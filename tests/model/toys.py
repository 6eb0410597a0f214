"""Networks of a few hundred weights with every role that the verbs tell apart, and a sampler that makes them drift."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import modiff.api  # with it, hosts say what is left out
from modiff import LayerConfig, ModiffConfig, QuantizerConfig, WeightConfig
from tests.helpers import assert_same_bits

SHAPE = (2, 3, 4, 4)


class Clamped(nn.ConvTranspose2d):
    """Computes more than its own linear map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1e4, 1e4)


class Attention(nn.Module):
    """Self-attention on tokens; q, k and v read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.to_out = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.to_q(tokens) @ self.to_k(tokens).mT / 4
        return self.to_out[0](scores.softmax(-1) @ self.to_v(tokens))


class Toy(nn.Module):
    """conv_in, a convolution, attention, a time embedding, a tiny and a transposed layer, conv_out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.time_embedding = nn.Linear(16, 16)
        self.norm = nn.GroupNorm(2, 16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.attention = Attention()
        self.tiny = nn.Linear(16, 2)
        self.back = Clamped(16, 16, 1)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        t = torch.as_tensor(timestep, dtype=sample.dtype).flatten()[0] / 1000
        t = t * torch.linspace(0, 1, 16, dtype=sample.dtype)
        h = self.conv_in(sample) + self.time_embedding(t)[:, None, None]
        h = h + self.body(torch.nn.functional.silu(self.norm(h)))
        tokens = h.flatten(2).mT
        h = h + self.attention(tokens).mT.reshape(h.shape) + self.tiny(tokens).mean()
        return self.conv_out(self.back(h))


TAKEN = ("body", "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")


def toy(seed: int = 0) -> Toy:
    """A toy with drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Toy().eval()


def sample(model: Callable[..., Tensor], steps: int = 6, seed: int = 0, batch: int = 2) -> list[Tensor]:
    """The outputs of the network along a trajectory of its own samples, step size falling from 1000 to 0."""
    x = torch.randn((batch, *SHAPE[1:]), generator=torch.Generator().manual_seed(seed))
    outputs = []
    with torch.no_grad():
        for i in range(steps):
            outputs.append(model(x, 1000.0 * (1 - i / steps)))
            x = x - 0.1 * outputs[-1]
    return outputs


def applied(config: ModiffConfig | None = None, make: Callable[[], nn.Module] = toy) -> nn.Module:
    """A network with modulated layers."""
    model = make()
    modiff.apply(model, config)
    return model


def generate(model: nn.Module, **options: int) -> list[Tensor]:
    """`sample` as a trajectory."""
    with modiff.trajectory(model):
        return sample(model, **options)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The same bits at each step."""
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def activations_only(bits: int | None, **settings) -> ModiffConfig:
    """Full-precision weights, modulated activations; `settings` are fields of QuantizerConfig."""
    layer = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=bits, **settings))
    return ModiffConfig(layer=layer)


class ResidualBlock(nn.Module):
    """As in a U-Net: two convolutions, and a shortcut where the channels change."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(torch.nn.functional.silu(self.conv1(x)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Block(nn.Module):
    """One level."""

    def __init__(self, resnets: list[ResidualBlock], down: int = 0) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([nn.Conv2d(down, down, 3, stride=2, padding=1)]) if down else None


class ToyUNet(nn.Module):
    """Two levels with diffusers' names: conv_in, down_blocks, up_blocks, conv_out; skips of 8, 8, 8 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([Block([ResidualBlock(8, 8)], down=8), Block([ResidualBlock(8, 16)])])
        self.up_blocks = nn.ModuleList(
            [Block([ResidualBlock(16 + 16, 16), ResidualBlock(16 + 8, 16)]),
             Block([ResidualBlock(16 + 8, 8), ResidualBlock(8 + 8, 8)])]
        )  # fmt: skip
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        h = self.conv_in(sample) + timestep / 1000
        skips = [h]
        for block in self.down_blocks:
            for resnet in block.resnets:
                skips.append(h := resnet(h))
            for downsampler in block.downsamplers or ():
                skips.append(h := downsampler(h))
        for i, block in enumerate(self.up_blocks):
            for resnet in block.resnets:
                h = resnet(torch.cat([h, skips.pop()], 1))
            h = nn.functional.interpolate(h, scale_factor=2.0) if i == 0 else h
        return self.conv_out(h)


SPLITS = {
    f"up_blocks.{block}.resnets.{resnet}.{conv}": 8 if block == resnet == 1 else 16
    for block in (0, 1) for resnet in (0, 1) for conv in ("conv1", "conv_shortcut")
}  # fmt: skip


def toy_unet(seed: int = 0) -> ToyUNet:
    """A U-Net with drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyUNet().eval()
