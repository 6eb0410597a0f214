"""A host from outside of the package: a masked-token denoiser without a time step, with a generate loop of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import AttentionConfig, Host, ModiffConfig, StateError, presets
from modiff.model import facts
from modiff.nn import ModulatedLayer

WORDS, WIDTH, MASK = 16, 32, 0


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = SelfAttention(), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(torch.relu(self.up(x)))


class TextModel(nn.Module):
    """Fills in the most certain masked token at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens * ~mask)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def generate(self, length: int = 8) -> Tensor:
        tokens = torch.full((1, length), MASK)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for _ in range(length):
            certainty, words = self(tokens, mask).softmax(-1).max(-1)
            at = certainty.masked_fill(~mask, -1).argmax()
            tokens[0, at], mask[0, at] = words[0, at], False
        return tokens


class TextHost(Host):
    generation = "generate"
    default_exclude = ("head", "*.down")
    block_classes = ("Block",)

    def is_attention(self, module: nn.Module) -> bool:
        return isinstance(module, SelfAttention)

    def run(self, target: TextModel, *, steps: int, batch: int, seed: int) -> Any:
        return lambda index: target.generate(steps)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(facts, "_FINDERS", [*facts._FINDERS])  # what the test registers goes with it
    host = TextHost()
    modiff.register_host(lambda target: host if isinstance(target, TextModel) else None)


def model() -> TextModel:
    torch.manual_seed(0)
    return TextModel().eval()


def states(target: TextModel) -> list[int]:
    """Of how many layers states are held, after each evaluation."""
    layers, seen = layers_of(target), []
    target.register_forward_hook(lambda *_: seen.append(sum(bool(layer.loop.tensors()) for layer in layers)))
    return seen


def layers_of(target: TextModel) -> list[Any]:
    return [module for module in target.modules() if isinstance(module, ModulatedLayer)]


def test_every_call_of_its_own_loop_is_a_trajectory_and_remove_gives_back_the_bits():
    target = model()
    plain, kind = target(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)), type(target)
    report = modiff.apply(target, presets.w8a8())
    left = {"head", "blocks.0.down", "blocks.1.down", "blocks.0.attention.qkv", "embed.weight"}
    assert {entry.name for entry in report.left} == left
    layers, seen = layers_of(target), states(target)
    assert len(layers) == len(report.taken) == 5
    first = target.generate()
    assert seen == [len(layers)] * 8
    assert not any(layer.loop.tensors() for layer in layers)
    assert torch.equal(target.generate(), first)
    with pytest.raises(StateError, match=r"modiff\.trajectory"):
        target(first, torch.zeros_like(first, dtype=torch.bool))
    modiff.remove(target)
    assert type(target) is kind
    again = target(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(again, plain)


def test_attention_blocks_and_runs_are_found_through_the_host():
    target = model()
    modiff.apply(target, ModiffConfig(attention=AttentionConfig()))
    assert target.generate().shape == (1, 8)
    modiff.remove(target)
    modiff.apply(target, presets.plain(4, None))
    quick = modiff.ReconstructConfig(iterations=4, batch=2, checks=1)
    report = modiff.reconstruct(target, lambda _: target.generate(4), quick, progress=False)
    assert [unit.name for unit in report.units] == ["blocks.0", "blocks.1"]
    modiff.remove(target)
    assert modiff.tune(target, 4, steps=4, num_images=1).layer.activation.bits == 4


def test_a_saved_model_generates_as_its_packed_original(tmp_path):
    target = model()
    modiff.apply(target, presets.w4a8())
    modiff.save(target, tmp_path / "saved")
    modiff.pack(target)
    assert torch.equal(modiff.load(tmp_path / "saved", into=model()).generate(), target.generate())
