"""Adapters around layers, as PEFT makes them: their matrices stay, and the layers go by the names they have without."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import StateError, presets
from modiff.model.attach import attachment_of
from modiff.nn import ModulatedConv2d, ModulatedLinear
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS
from tests.model.toys import SHAPE, Toy, toy

NAMES = ("attention.to_q", "attention.to_v")
BITS = modiff.ModiffConfig(layer=presets.w8a8().layer, first_last="quantize", min_weights=0)


class Adapter(nn.Module):
    """W x + B A x."""

    merged = False

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora = nn.ModuleDict({"a": nn.Linear(layer.in_features, 2), "b": nn.Linear(2, layer.out_features)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora["b"](self.lora["a"](x))


def load(model: Toy) -> Toy:
    torch.manual_seed(0)
    model.attention.to_q, model.attention.to_v = Adapter(model.attention.to_q), Adapter(model.attention.to_v)
    return model


def unload(model: Toy) -> Toy:
    model.attention.to_q, model.attention.to_v = model.attention.to_q.base_layer, model.attention.to_v.base_layer
    return model


def applied(model: Toy) -> Toy:
    modiff.apply(model, BITS)
    return model


def run(model: nn.Module) -> Tensor:
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad(), nullcontext() if attachment_of(model) is None else modiff.trajectory(model):
        return torch.stack([model(x[i], t[i]) for i in range(3)])


def test_the_order_of_apply_and_load_does_not_matter_and_remove_leaves_the_adapter():
    first, after = load(applied(toy())), applied(load(toy()))
    assert attachment_of(first).layers.keys() == attachment_of(after).layers.keys()
    assert_same_bits(run(first), run(after))
    expected = run(load(toy()))
    for model in (first, after):
        assert all(type(model.get_submodule(name).lora["a"]) is nn.Linear for name in NAMES)
        modiff.remove(model)
        assert_same_bits(run(model), expected)
        assert_same_bits(run(unload(model)), run(toy()))


def test_layers_go_by_the_same_names_after_it_was_unloaded(tmp_path):
    model = unload(applied(load(toy())))
    assert_same_bits(run(model), run(applied(toy())))
    modiff.save(model, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved", into=toy())
    modiff.pack(model)
    assert_same_bits(run(loaded), run(model))
    modiff.remove(again := unload(applied(load(toy()))))
    assert_same_bits(run(again), run(toy()))


def test_what_a_checkpoint_or_integers_cannot_hold_is_refused_before_anything_changes(tmp_path):
    model = applied(load(toy()))
    expected = run(model)
    with pytest.raises(StateError, match=r"without adapters, got attention\.to_q\.lora.*unload_lora_weights"):
        modiff.save(model, tmp_path / "saved")
    model.attention.to_v.merged = True
    with pytest.raises(StateError, match=r"no fused adapters, got one in attention\.to_v.*unload_lora_weights"):
        modiff.pack(model)
    model.attention.to_v.merged = False
    assert_same_bits(run(model), expected)
    modiff.pack(model)
    other = applied(toy())
    modiff.pack(other)
    assert_same_bits(run(model), run(load(other)))


def test_a_model_that_peft_returned_is_the_one_inside():
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = load(toy())

        def get_base_model(self) -> nn.Module:
            return self.inner

    modiff.apply(outer := Returned(), BITS)
    assert_same_bits(run(outer.inner), run(applied(load(toy()))))
    modiff.remove(outer)
    assert attachment_of(outer.inner) is None


@pytest.mark.parametrize("name", ["ddim", "sd", "flux"])
def test_layers_are_chosen_as_without_adapters_also_where_each_has_one(name):
    host = HOSTS[name]
    plain, adapted = host.build(), host.build()
    for path, module in list(host.network(adapted).named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            wrapper = nn.Module()
            wrapper.base_layer, wrapper.lora = module, nn.Linear(2, 2)
            parent, _, leaf = path.rpartition(".")
            setattr(host.network(adapted).get_submodule(parent), leaf, wrapper)
    entries = [entry for entry in modiff.select(adapted, "w8a8").entries if entry.reason != "belongs to an adapter"]
    assert entries == list(modiff.select(plain, "w8a8").entries)


@pytest.mark.parametrize(("kind", "plain", "sizes"), [(ModulatedLinear, nn.Linear, (4, 2)),
                                                      (ModulatedConv2d, nn.Conv2d, (4, 2, 3))])  # fmt: skip
def test_a_layer_made_of_the_class_of_a_modulated_one_is_the_plain_layer(kind, plain, sizes):
    layer = kind(*sizes, bias=False)
    assert type(layer) is plain
    assert layer.bias is None
