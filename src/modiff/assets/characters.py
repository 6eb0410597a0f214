"""A small text model in the form of diffusers: letters in, logits of letters out, each position sees all others."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional

from modiff.errors import ConfigError


@dataclass
class LogitsOutput(BaseOutput):
    """logits: (rows, length, vocabulary), unnormalized log-probabilities of each position's letter."""

    logits: Tensor


class CharacterAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all positions, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x: (rows, length, width). turns: cosines and sines. mask: (rows, 1, 1, length), True where a key counts."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in
                   (self.to_q(x), self.to_k(x), self.to_v(x)))  # fmt: skip
        q, k = _rotated(q, *turns), _rotated(k, *turns)
        if self.training:  # on CPUs the backward of the fused form takes five times as long
            heads = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(heads.transpose(1, 2).flatten(2))


class CharacterBlock(nn.Module):
    """Attention, and an MLP that also reads a quarter of the channels of either neighbour."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = CharacterAttention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.attention.to_out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """As `CharacterAttention`."""
        x = x + self.attention(self.norm_1(x), turns, mask)
        left, right, rest = self.norm_2(x).split_with_sizes(_quarters(x.shape[-1]), -1)
        left, right = functional.pad(left[:, :-1], (0, 0, 1, 0)), functional.pad(right[:, 1:], (0, 0, 0, 1))
        return x + self.down(functional.gelu(self.up(torch.cat([left, right, rest], -1)), approximate="tanh"))


class CharacterTransformer(ModelMixin, ConfigMixin):
    """A bidirectional transformer without a time input: tokens (rows, length) int64 -> logits.

    Token i is letter i of the alphabet, and the one after the last letter stands for a masked position.

    Args:
        alphabet: the letters. width, layers, heads: of the transformer. rotary_base: the slowest turn of positions.
    """

    @register_to_config
    def __init__(
        self, alphabet: str = " abcdefghijklmnopqrstuvwxyz", width: int = 192, layers: int = 4, heads: int = 4,
        rotary_base: float = 1000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask_token_id = len(alphabet)
        self.embed = nn.Embedding(len(alphabet) + 1, width)
        self.blocks = nn.ModuleList(CharacterBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, len(alphabet) + 1)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> LogitsOutput:
        """Logits of all positions.

        Args:
            attention_mask: (rows, length), 0 where nothing is to be read. position_ids: (rows or 1, length).
        """
        x = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=x.device)[None] if position_ids is None else position_ids
        half = self.config.width // self.config.heads // 2
        rates = self.config.rotary_base ** (-torch.arange(half, device=x.device) / half)
        angles = (positions[:, None, :, None] * rates).float()
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), mask)
        return LogitsOutput(self.head(self.norm(x)))

    def encode(self, text: str) -> Tensor:
        """Token of each letter, (length,). Raises: ConfigError for a letter outside of the alphabet."""
        alphabet = self.config.alphabet
        if strange := sorted(set(text) - set(alphabet)):
            raise ConfigError(f"encode: expected letters of {alphabet!r}, got {''.join(strange)!r}. The model has no "
                              "tokens for others. Write it in lower case, without marks.")  # fmt: skip
        return torch.tensor([alphabet.index(letter) for letter in text])

    def decode(self, tokens: Tensor) -> str:
        """The text of one row of tokens; masked positions are underscores."""
        return "".join((self.config.alphabet + "_")[token] for token in tokens.tolist())


def _quarters(width: int) -> list[int]:
    return [width // 4, width // 4, width - 2 * (width // 4)]


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of channels turned by their position's angles."""
    first, second = x.chunk(2, -1)
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    return torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)
