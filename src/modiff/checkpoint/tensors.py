"""The tensors of a quantized checkpoint: what a model writes, what files claim and must hold, and what came back."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modiff.checkpoint.layout import FORMAT_VERSION, METHOD, Layout, misfit
from modiff.config import PackedAnchors
from modiff.core.affine import qrange
from modiff.core.step_sets import StepSizes
from modiff.errors import ConfigError, FormatError, StateError
from modiff.files import read_json, reading
from modiff.kernels.layout import weight_codes
from modiff.model.attach import Attachment, required_attachment
from modiff.model.calibrate import quantizers_of
from modiff.model.pack import rebuild
from modiff.nn import quantized_class
from modiff.nn.adapters import adapter_on
from modiff.nn.weight import ERROR, ERROR_SCALE, SCALE, packed_storage, turned

METADATA = {"quant_method": METHOD, "format_version": str(FORMAT_VERSION)}
"""What each safetensors file says of itself."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What modiff writes and reads, by the names of safetensors."""


class Claim(NamedTuple):
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class Expected(NamedTuple):
    """What a tensor must be. dtype: None for any floating-point one, which is cast when it is read."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def read_headers(files: Iterable[str | Path]) -> dict[str, Claim]:
    """The claims of all files together, from their headers alone.

    Raises: FormatError for a file that is no safetensors file, is cut, claims sizes that it does not have, holds a
        tensor of an unknown dtype, or one that another file holds as well.
    """
    claims: dict[str, Claim] = {}
    for path in map(Path, files):
        with reading(path, "a safetensors file", "Copy it again."), safe_open(path, "pt") as file:
            for name in file.keys():  # not a mapping
                if name in claims:
                    raise FormatError(f"{path}: expected each tensor once, got {name} also in "
                                      f"{claims[name].file.name}. The shards of two checkpoints are mixed. Copy the "
                                      "folder again.")  # fmt: skip
                view = file.get_slice(name)
                if (dtype := DTYPES.get(view.get_dtype())) is None:
                    raise FormatError(f"{path}: expected numbers that modiff writes in {name}, got {view.get_dtype()}. "
                                      "The file comes from another program. Save it with modiff.save.")  # fmt: skip
                claims[name] = Claim(dtype, tuple(view.get_shape()), path)
    return claims


def check_claims(where: str | Path, claims: Mapping[str, Claim], expected: Mapping[str, Expected]) -> None:
    """Make sure that files hold exactly the tensors that the config promises. Raises: FormatError if not."""
    for kind, names in (("no", expected.keys() - claims.keys()), ("an unknown", claims.keys() - expected.keys())):
        if names:
            raise misfit(where, f"{len(expected)} tensors", f"{kind} {min(names)} ({len(names)} such)")
    for name, (dtype, shape) in expected.items():
        claim = claims[name]
        fits = claim.dtype.is_floating_point if dtype is None else claim.dtype == dtype
        if claim.shape != shape or not fits:
            kind = dtype or "floating point"
            raise misfit(where, f"{name} of shape {shape} in {kind}", f"{claim.shape} in {claim.dtype}")


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """`stem`.safetensors in a folder, or the shards that `stem`.safetensors.index.json lists.

    Raises: FormatError if the index is damaged, or points outside the folder or at nothing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return (single,)
    what, advice = "the index of a sharded checkpoint", "Copy the folder again."
    with reading(index, what, advice):
        shards = sorted({str(name) for name in read_json(index, what, advice)["weight_map"].values()})
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FormatError(f"{index}: expected the names of files next to it, got {shard!r}. A shard is missing or "
                              "the index was changed. Copy the folder again.")  # fmt: skip
    return tuple(folder / shard for shard in shards)


scale_key = "{}.activation.{}".format
"""(quantizer, name) -> the name in the files of one tensor of a quantizer's measured scales."""


def scale_keys(layout: Layout) -> set[str]:
    """The names in the files of all measured scales."""
    return {scale_key(quantizer, name) for quantizer, names in layout.scales.items() for name in names}


def quantized_state(
    model: nn.Module, state: Mapping[str, Tensor], anchor_weights: PackedAnchors = "quantized"
) -> dict[str, Tensor]:
    """The tensors to write for a model: its state dict with packed weights, their scales, and measured scales.

    Raises: StateError if adapters are loaded, layers were wrapped since, or are offloaded to the meta device.
    """
    tensors = dict(state)
    check_bare(model)
    modules = dict(model.named_modules())
    for name, quantized in required_attachment(model, "save").layers.items():
        quantized.check_own("save")
        if modules.get(name) is not quantized:
            raise StateError(f"{name}: expected the layer that modiff put there, got another one, or one around it. "
                             "A checkpoint holds ours. Take it away, or call modiff.remove, then apply.")  # fmt: skip
        if state[f"{name}.weight"].is_meta:
            raise StateError(f"{name}: expected a weight in memory, got one on the meta device. It is offloaded. "
                             "Remove the offloading hooks, then save.")  # fmt: skip
        if quantized.config.weight.bits is not None:
            tensors |= {f"{name}.{leaf}": value for leaf, value in quantized.packed_state(anchor_weights).items()}
    for name, quantizer in quantizers_of(model).items():
        for key, tensor in quantizer.state_dict_tensors().items():
            tensors[scale_key(name, key)] = tensor
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise StateError(f"{name}: expected a common dtype, got {tensor.dtype}. Layerwise casting keeps it so, and "
                             "its rounding would be saved. Save before enable_layerwise_casting.")  # fmt: skip
    return tensors


def check_bare(model: nn.Module) -> None:
    """Make sure that no adapter is on a model. Raises: StateError if there is one."""
    if (adapter := adapter_on(model)) is not None:
        raise StateError(
            f"save: expected {type(model).__name__} without adapters, got {adapter}. Its checkpoint cannot hold them. "
            "Call pipe.unload_lora_weights() or pipe.unload_ip_adapter() first, and load them again afterwards."
        )


def check_files(where: str, claims: Mapping[str, Claim], layout: Layout, model: nn.Module) -> None:
    """Make sure that files hold exactly what a layout promises for a plain `model`. Raises: FormatError if not."""
    modules = dict(model.named_modules())
    expected = {
        name: Expected(None if value.is_floating_point() else value.dtype, tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    for name, layer in layout.layers.items():
        module = modules.get(name)
        if module is None or (kind := quantized_class(module)) is None:
            got = "no such module" if module is None else f"a {type(module).__name__} there"
            raise FormatError(
                f"{where}: expected a layer {name} in {type(model).__name__} that modiff can replace, got {got}. The "
                "checkpoint belongs to another model. Give the model that it was saved from."
            )
        if not kind.keeps(module):  # what made its weight and bias is not saved
            own = {f"{name}.{leaf}" for leaf in module.state_dict()}
            made = {f"{name}.{leaf}": getattr(module, leaf) for leaf in ("weight", "bias")}
            expected = {key: value for key, value in expected.items() if key not in own}
            expected |= {key: Expected(None, tuple(v.shape)) for key, v in made.items() if v is not None}
        if layer.config.weight.bits is not None:
            spec, error = kind.spec_of(module, name, layer.config, layer.split), layer.anchor_weights == "int8"
            shape = tuple(turned(module.weight, spec.transposed).shape)
            stored = packed_storage(layer.config.weight.bits, shape, len(spec.runs), error=error)
            expected |= {f"{name}.{leaf}": Expected(*storage) for leaf, storage in stored.items()}
    for name in scale_keys(layout):  # each quantizer refuses scales whose shapes do not fit it
        expected[name] = Expected(*claims[name][:2]) if name in claims else Expected(None, ())
    check_claims(where, claims, expected)


def rebuild_from(where: str, model: nn.Module, layout: Layout) -> Attachment:
    """Packed layers in a plain model, without their weights. Raises: FormatError if the layout does not fit them."""
    layers = {name: layer.config for name, layer in layout.layers.items()}
    splits = {name: layer.split for name, layer in layout.layers.items() if layer.split is not None}
    try:
        anchored = {name for name, layer in layout.layers.items() if layer.anchor_weights == "int8"}
        return rebuild(model, layout.config, layers, splits, anchored)
    except ConfigError as error:
        raise FormatError(f"{where}: expected settings that fit {type(model).__name__}, got: {error}") from error


def load_scales(where: str, model: nn.Module, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Give each quantizer the scales that were measured for it. Raises: FormatError if they do not fit it."""
    required_attachment(model, "load").step_sizes = StepSizes(layout.largest_step)
    quantizers = quantizers_of(model)
    for name, keys in layout.scales.items():
        if name not in quantizers:
            raise misfit(where, "a layer or attention module that quantizes its input", name)
        quantizers[name].load_tensors({key: tensors[scale_key(name, key)] for key in keys})


def check_values(where: str, attachment: Attachment) -> None:
    """Make sure that codes lie in the range of their bits and scales are positive. Raises: FormatError if not."""
    for name, quantized in attachment.layers.items():
        bits = quantized.config.weight.bits
        if bits is None:
            continue
        tensors = quantized.packed_state()
        if any(tensor.is_meta for tensor in tensors.values()):
            raise misfit(where, f"a weight and scales for {name}", "none")
        weight = tensors["weight"]
        _check_codes(where, name, weight_codes(weight, (weight.shape[0], 2 * weight.shape[1])), bits, tensors[SCALE])
        if ERROR in tensors:
            _check_codes(where, f"{name}.{ERROR}", tensors[ERROR], 8, tensors[ERROR_SCALE])


def _check_codes(where: str, name: str, codes: Tensor, bits: int, scale: Tensor) -> None:
    low, high = (int(extreme) for extreme in torch.aminmax(codes)) if codes.numel() else (0, 0)
    qmin, qmax = qrange(bits)
    if low < qmin or high > qmax or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise misfit(where, f"codes from {qmin} to {qmax} and positive scales in {name}", "others")
