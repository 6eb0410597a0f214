"""A quantized torch module as a folder: config.json and safetensors, to be read into a module of the same class."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import nn

from modiff.checkpoint.layout import Layout
from modiff.checkpoint.tensors import (
    METADATA,
    check_files,
    check_values,
    load_scales,
    quantized_state,
    read_headers,
    rebuild_from,
    weight_files,
)
from modiff.config import PackedAnchors
from modiff.errors import FormatError
from modiff.files import new_folder, read_json, write_json
from modiff.model.apply import uninstall
from modiff.model.attach import check_plain
from modiff.model.pack import seal
from modiff.nn.weight import PACKED

CONFIG = "config.json"
CLASS = "modiff_module"
"""The field of config.json that tells a folder of a torch module from one of diffusers."""
_STEM = "model"


def save_module(model: nn.Module, folder: str | Path, max_shard_size: int, anchor_weights: PackedAnchors) -> None:
    """Write the quantized weights and settings of a module with modulated layers, as `modiff.save` says; size in bytes.

    Raises: StateError if modiff was not applied or a layer was wrapped since; FormatError for a folder with files;
        OSError.
    """
    layout, state = Layout.of(model, anchor_weights), quantized_state(model, model.state_dict(), anchor_weights)
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    with new_folder(folder) as partial:
        for name, keys in split.filename_to_tensors.items():
            # clones: safetensors refuses tensors that share memory, as tied weights do
            shard = {key: state[key].detach().cpu().contiguous().clone() for key in keys}
            save_file(shard, partial / name, {"format": "pt", **METADATA})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(partial / f"{_STEM}.safetensors.index.json", index)
        write_json(partial / CONFIG, {CLASS: type(model).__name__, "quantization_config": layout.to_dict()})


def load_module(folder: str | Path, model: nn.Module) -> nn.Module:
    """Read what `save_module` wrote into a full-precision module of the same class, in place.

    Parameters that stay floats keep the dtype and device of `model`; on the meta device they take those of the file.
    Returns: the module, packed. Each generation needs `with modiff.trajectory(model):`, as after `apply`.
    Raises: FormatError for a damaged, hostile or foreign folder, StateError for a module that carries modiff already;
        the module is as it was then.
    """
    check_plain(model, "load", "The checkpoint brings its own. Call modiff.remove(model) first, or give a new model.")
    folder = Path(folder)
    where, config = str(folder / CONFIG), read_config(folder)
    if config.get(CLASS) != type(model).__name__:
        raise FormatError(
            f"{where}: expected the config of a {type(model).__name__}, got one of {config.get(CLASS)!r}. Weights fit "
            "the class that they were saved from. Give a module of that class."
        )
    layout = Layout.from_dict(where, config.get("quantization_config"))
    files = weight_files(folder, _STEM)
    check_files(where, read_headers(files), layout, model)
    attachment = rebuild_from(where, model, layout)
    try:
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for name, quantized in attachment.layers.items():
            if quantized.packed:
                was = next(attachment.originals[name].parameters())
                device = torch.device("cpu") if was.is_meta else was.device
                leaves = quantized.packed_state()
                quantized.hold_packed({leaf: tensors[f"{name}.{leaf}"].clone().to(device) for leaf in leaves})
        check_values(where, attachment)
        load_scales(where, model, layout, tensors)
    except BaseException:
        uninstall(model)
        raise
    seal(attachment)
    now = model.state_dict()
    packed = {f"{name}.{leaf}" for name, quantized in attachment.layers.items() if quantized.packed for leaf in PACKED}
    rest = {name: tensors[name].clone() for name in now.keys() - packed}  # not views of the file: it may change
    model.load_state_dict(rest, strict=False, assign=any(now[name].is_meta for name in rest))
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`. Raises: FormatError if the folder has no such file, or it is damaged."""
    return read_json(
        folder / CONFIG, "the config of a saved model", "Give a folder that modiff.save or diffusers wrote."
    )
