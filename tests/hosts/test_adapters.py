"""IP-Adapter, ControlNet, LoRA and the other kinds of PEFT, there before `apply` or loaded after it."""

import dataclasses
from importlib.util import find_spec

import diffusers
import pytest
import torch
from torch import nn

import modiff
from modiff import StateError, presets
from modiff.model.attach import attachment_of
from modiff.nn import ModulatedLayer
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS, WIDTH, drawn
from tests.model.toys import generate, sample, toy

HOST = HOSTS["sd"]
CONFIG = presets.published(8, 8)  # anchors with the quantized weights, so that packing changes no bit
IMAGE = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))


def with_ip_adapter(pipe):
    """Drawn projections of an image to four tokens, and of the tokens to keys and values."""
    unet, generator, weights = pipe.unet, torch.Generator().manual_seed(5), {}
    for i, name in enumerate(n for n in unet.attn_processors if n.endswith("attn2.processor")):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for leaf in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{leaf}.weight"] = torch.randn(width, WIDTH, generator=generator) * WIDTH**-0.5
    projection = {"proj.weight": torch.randn(4 * WIDTH, WIDTH, generator=generator) * WIDTH**-0.5,
                  "proj.bias": torch.zeros(4 * WIDTH), "norm.weight": torch.ones(WIDTH),
                  "norm.bias": torch.zeros(WIDTH)}  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def call(pipe, scale=0.7):
    pipe.set_ip_adapter_scale(scale)
    return HOST.call(pipe, ip_adapter_image_embeds=[torch.stack([torch.zeros(1, WIDTH), IMAGE])])


@pytest.mark.parametrize("packed", [False, True])
def test_an_ip_adapter_works_in_either_order_and_goes_again(packed, tmp_path):
    first, after, plain = with_ip_adapter(HOST.build()), HOST.build(), HOST.build()
    exact = call(first)
    for pipe in (first, after, plain):
        modiff.apply(pipe, CONFIG)
        if packed:
            modiff.pack(pipe)
    assert attachment_of(first.unet).layers.keys() == attachment_of(after.unet).layers.keys()
    with_ip_adapter(after)
    without = HOST.call(plain)
    expected = call(first)
    assert relative_error(expected, exact) < 0.05 < relative_error(without, exact)
    assert_same_bits(call(after), expected)
    assert_same_bits(call(after, 0.2), call(first, 0.2))
    if packed:
        with pytest.raises(StateError, match="fuse_lora: expected float weights to add the LoRA to"):
            first.unet.fuse_lora()
    for pipe in (first, after):
        with pytest.raises(StateError, match=r"without adapters, got .*unload_ip_adapter"):
            modiff.save(pipe, tmp_path / "refused")
        pipe.unload_ip_adapter()
        assert_same_bits(HOST.call(pipe), without)
    modiff.save(first, tmp_path / "saved")
    assert_same_bits(HOST.call(modiff.load(tmp_path / "saved")), without)


@pytest.mark.parametrize("first", [False, True])
def test_remove_gives_back_the_model_with_its_ip_adapter(first):
    pipe = HOST.build()
    expected = call(with_ip_adapter(HOST.build()))
    pipe = with_ip_adapter(pipe) if first else pipe
    modiff.apply(pipe, presets.modulated(None, None))
    pipe = pipe if first else with_ip_adapter(pipe)
    assert relative_error(call(pipe), expected) < 1e-5
    modiff.remove(pipe)
    assert_same_bits(call(pipe), expected)
    pipe.unload_ip_adapter()
    assert_same_bits(HOST.call(pipe), HOST.call(HOST.build()))


def control_net(pipe, number):
    nets = [drawn(lambda: diffusers.ControlNetModel.from_unet(HOST.build().unet), seed=3 + i) for i in range(number)]
    net = diffusers.MultiControlNetModel(nets) if number > 1 else nets[0]
    return diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)


@pytest.mark.parametrize("number", [1, 2])
def test_a_control_net_is_not_quantized_and_may_join_later(number, tmp_path):
    image = [torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))] * number
    image = image if number > 1 else image[0]
    first, pipe = control_net(HOST.build(), number), HOST.build()
    exact = HOST.call(first, image=image, steps=2)
    for target in (first, pipe):
        modiff.apply(target, CONFIG)
    expected = HOST.call(first, image=image, steps=2)
    assert 0 < relative_error(expected, exact) < 0.1
    later = control_net(pipe, number)
    for _ in range(2):
        assert_same_bits(HOST.call(later, image=image, steps=2), expected)
    modiff.save(later, tmp_path / "saved")
    assert_same_bits(HOST.call(modiff.load(tmp_path / "saved"), image=image, steps=2), expected)
    modiff.remove(first)
    assert_same_bits(HOST.call(first, image=image, steps=2), exact)


needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")


BOTH, LINEAR = ["to_q", "conv1"], ["attn1.to_q"]
TUNERS = {  # one for each way in which an adapter gets at the layer that it is put around
    "LoRA, adds to the output": ("LoraConfig", {"r": 4, "target_modules": BOTH, "init_lora_weights": False}),
    "DoRA, reads the norm of the weight": (
        "LoraConfig", {"r": 4, "use_dora": True, "target_modules": BOTH, "init_lora_weights": False},
    ),
    "LoRA with a copy of a layer that learns": (
        "LoraConfig",
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["conv_in"], "init_lora_weights": False},
    ),
    "LoKr, changes the weight": ("LoKrConfig", {"r": 4, "target_modules": BOTH, "init_weights": False}),
    "OFT, turns the input": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": BOTH, "init_weights": False}),
    "HRA, turns the weight": ("HRAConfig", {"r": 4, "target_modules": BOTH, "init_weights": False}),
    "IA3, scales": ("IA3Config", {"target_modules": BOTH, "feedforward_modules": ["conv1"], "init_ia3_weights": False}),
    "PVeRA, draws while it learns": ("PveraConfig", {"r": 4, "target_modules": LINEAR, "init_weights": False}),
    "AdaLoRA, freezes the weight": ("AdaLoraConfig", {"init_r": 4, "total_step": 10, "target_modules": LINEAR}),
    "GLoRA, computes by itself": ("GloraConfig", {"r": 4, "target_modules": LINEAR, "init_weights": False}),
    "OSF, factors the weight": ("OSFConfig", {"target_modules": LINEAR}),
    "tuned norms": ("LNTuningConfig", {"target_modules": ["norm1"]}),
}  # fmt: skip


def adapted(pipe, kind):
    """Drawn parameters of the adapter; not to learn, where some draw at each call."""
    import peft

    name, settings = TUNERS[kind]
    torch.manual_seed(1)
    pipe.unet = peft.get_peft_model(pipe.unet, getattr(peft, name)(**settings), "x").eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, pipe.unet.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return pipe


def refuses_ours(kind, pipe):
    """Whether PEFT takes nothing but `type(layer) is nn.Linear` for this kind, and says so."""
    if kind.startswith("GLoRA"):
        with pytest.raises(ValueError, match=r"not a plain torch\.nn\.Linear"):
            adapted(pipe, kind)
    return kind.startswith("GLoRA")


def drawn_call(pipe):
    torch.manual_seed(0)
    return HOST.call(pipe, steps=2)


warns_of_norms = pytest.mark.filterwarnings("ignore:Unsupported layer type")


@needs_peft
@warns_of_norms
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", TUNERS)
def test_every_kind_of_adapter_does_what_it_does_on_plain_layers(kind, first, tmp_path):
    pipe = adapted(HOST.build(), kind)
    expected, plain = drawn_call(pipe), drawn_call(HOST.build())
    assert relative_error(expected, plain) > 1e-4
    pipe = pipe if first else HOST.build()
    modiff.apply(pipe, presets.modulated(None, None))
    if not first and refuses_ours(kind, pipe):
        return
    pipe = pipe if first else adapted(pipe, kind)
    assert relative_error(drawn_call(pipe), expected) < 1e-4
    with pipe.unet.disable_adapter():
        assert relative_error(drawn_call(pipe), plain) < 1e-4
    with pytest.raises(StateError, match="without adapters"):
        modiff.save(pipe, tmp_path / "refused")
    modiff.remove(pipe)
    assert_same_bits(drawn_call(pipe), expected)


@needs_peft
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["body", "attention"])  # a layer, and a module of four
def test_a_copy_that_learns_is_made_of_floats_of_torch_and_stays_when_it_is_merged(name, packed, tmp_path):
    import peft

    def learned(model):
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["tiny"], modules_to_save=[name]), "x").eval()
        with torch.no_grad():
            for parameter in model.get_submodule(f"base_model.model.{name}").modules_to_save["x"].parameters():
                parameter.mul_(0.5)
        return model

    expected = torch.stack(sample(learned(toy())))
    modiff.apply(model := toy(), dataclasses.replace(CONFIG, min_weights=0))
    if packed:
        modiff.pack(model)
    after = learned(model)
    assert relative_error(torch.stack(generate(model)), expected) < 0.02
    copied = after.get_submodule(f"base_model.model.{name}").modules_to_save["x"]
    assert not any(isinstance(module, ModulatedLayer) for module in copied.modules())
    if packed:  # which no LoRA is merged into
        return
    merged = after.merge_and_unload()
    assert relative_error(torch.stack(generate(merged)), expected) < 0.02
    with pytest.raises(StateError, match=f"{name}.*: expected the layer that modiff put there, got another one"):
        modiff.save(merged, tmp_path / "saved")
    modiff.remove(merged)
    assert_same_bits(torch.stack(sample(merged)), expected)


@needs_peft
@warns_of_norms
@pytest.mark.parametrize("kind", [kind for kind in TUNERS if "copy" not in kind])  # PEFT leaves the copy in place
def test_every_kind_of_adapter_leaves_packed_layers_as_they_were(kind):
    pipe, exact = HOST.build(), drawn_call(adapted(HOST.build(), kind))
    modiff.apply(pipe, CONFIG)
    modiff.pack(pipe)
    without = drawn_call(pipe)
    if refuses_ours(kind, pipe):
        return
    expected = drawn_call(adapted(pipe, kind))
    assert relative_error(expected, exact) < 0.05
    if kind != "tuned norms":
        with pytest.raises(StateError, match="expected a float weight, got a packed one"):
            pipe.unet.merge_adapter()
    assert_same_bits(drawn_call(pipe), expected)
    pipe.unet = pipe.unet.unload()
    assert_same_bits(drawn_call(pipe), without)


@needs_peft
def test_torch_s_attention_is_left_inside_of_an_adapter_as_outside():
    import peft

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 3, enable_nested_tensor=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn"])).get_base_model()
    reasons = {entry.name: entry.reason for entry in modiff.select(model, "w8a8").entries}
    assert reasons["layers.1.self_attn.out_proj"] == "MultiheadAttention reads its weight and never calls it"
