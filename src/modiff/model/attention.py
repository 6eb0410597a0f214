"""Quantize the operands of a model's attention products, and undo it."""

from torch import nn

from modiff.config import AttentionConfig
from modiff.core.quantizer import Quantizer
from modiff.errors import ConfigError
from modiff.model.attach import attachment_of
from modiff.model.facts import facts_of
from modiff.model.select import check_patterns, matches
from modiff.nn.adapters import modules_of
from modiff.nn.attention import QuantizedAttention

ATTRIBUTE = "_modiff_attention"


def attention_modules(model: nn.Module, config: AttentionConfig) -> dict[str, nn.Module]:
    """The attention modules that a config takes, of those that its host knows. Raises: ConfigError if none."""
    facts = facts_of(model)
    known = {name: module for name, module in modules_of(model).items() if facts.is_attention(module)}
    taken = {n: m for n, m in known.items() if matches(n, config.include) and not matches(n, config.exclude)}
    own = {"AttentionConfig.include": config.include, "AttentionConfig.exclude": config.exclude}
    check_patterns(own, [*known], "an attention module")
    if not taken:
        raise ConfigError(
            f"{type(model).__name__}: expected at least one attention module to take, got none of {len(known)}. "
            "Attention is found by the processor that diffusers' modules hold. Use ModiffConfig(attention=None)."
        )
    return taken


def apply_attention(model: nn.Module, config: AttentionConfig | None) -> tuple[str, ...]:
    """Quantize q, k, v and softmax outputs of the model's attention from now on; the names of the modules taken."""
    if config is None:
        return ()
    modules = attention_modules(model, config)
    attachment = attachment_of(model)
    clock = None if attachment is None else attachment.clock
    model.__dict__[ATTRIBUTE] = {name: QuantizedAttention(config, name, clock) for name in modules}
    for name, quantized in model.__dict__[ATTRIBUTE].items():
        quantized.attach(modules[name])
    return tuple(modules)


def remove_attention(model: nn.Module) -> None:
    """Undo `apply_attention`, bit for bit; nothing happens where it was not called."""
    modules = modules_of(model)
    for name, quantized in model.__dict__.pop(ATTRIBUTE, {}).items():
        if quantized.attached(module := modules.get(name, model)):
            quantized.detach(module)


def quantized_attention(model: nn.Module) -> dict[str, QuantizedAttention]:
    """What `apply_attention` put on the model, by the names of its modules; {} where it was not called."""
    return model.__dict__.get(ATTRIBUTE, {})


def attention_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of attention by name, "<module>.q", "<module>.softmax", ...; {} where there are none."""
    modules = quantized_attention(model).items()
    return {f"{n}.{operand}": c for n, m in modules for operand, c in m.quantizers.items() if c is not None}
