"""Training and sampling of the transformer: what the folder holds, how it starts, which labels it never sees."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from modiff.hosts.diffusers.load import load_model

WEIGHTS = Path("pipeline") / "transformer" / "diffusion_pytorch_model.safetensors"
CLASSES = 3


@pytest.fixture(scope="module")
def trainer(script):
    return script("train_dit")


@pytest.fixture(scope="module")
def tiny(images, tmp_path_factory):
    """Options for a transformer of two blocks on twelve images of three classes."""
    labels = tmp_path_factory.mktemp("labels") / "labels.npy"
    np.save(labels, np.arange(12) % CLASSES)
    words = f"--images {images} --labels {labels} --size 8 --width 16 --heads 2 --depth 2 --batch 4 --threads 1"
    return [*words.split(), "--device", "cpu", "--anneal", "1e-9", "--warmup", "1"]


@pytest.fixture(scope="module")
def run(ticking, trainer, tiny):
    """`ticking` with this script and its smallest options."""
    return partial(ticking, trainer, tiny)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of four steps; tests only read it."""
    return run(tmp_path_factory.mktemp("runs") / "whole", 4)


def test_a_run_writes_a_network_that_modiff_loads_and_its_scheduler(whole):
    assert {t.dtype for t in load_file(whole / WEIGHTS).values()} == {torch.float16}
    net = load_model(whole / "pipeline" / "transformer")
    assert (net.config.sample_size, net.config.in_channels, net.config.out_channels) == (8, 1, 1)
    assert (net.config.num_layers, net.config.num_embeds_ada_norm, net.config.norm_type) == (2, 3, "ada_norm_zero")
    scheduler = DDIMScheduler.from_pretrained(whole / "pipeline" / "scheduler")
    assert scheduler.config.num_train_timesteps == 1000
    text = (whole / "training.json").read_text()
    record = json.loads(text)
    assert (record["step"], record["images_seen"], record["labels"]) == (4, 16, "labels.npy")
    assert str(whole.parent) not in text


def test_a_hidden_label_is_hidden_from_every_block(trainer, tiny):
    torch.manual_seed(0)
    model = trainer.build_model(trainer.parse_arguments([*tiny, "-o", "unused"]), 1, CLASSES).train()
    seen: list[torch.Tensor] = []
    for block in model.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table
        table.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    labels = torch.tensor([0, 1, 2, CLASSES] * 25)
    model(torch.randn(100, 1, 8, 8), torch.zeros(100, dtype=torch.long), class_labels=labels)
    assert len(seen) == 3  # two blocks, and the first one's embedding again for the output
    assert all(torch.equal(label, labels) for label in seen)


def test_the_sampler_draws_every_class_and_says_how_far_codes_are(script, whole, tmp_path, capsys):
    picture = tmp_path / "grid.png"
    words = ["--run", str(whole), "--config", "w8a8", "--steps", "3", "--device", "cpu", "-o", str(picture)]
    script("sample_dit").main(words)
    with Image.open(picture) as grid:
        assert grid.size == (CLASSES * 18 + 2, CLASSES * 18 + 2)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("w8a8: relative L2 ")
    assert float(line.split()[3]) < 0.05
    elsewhere, unknown = [*words[:1], str(tmp_path), *words[2:]], [*words[:3], "w9", *words[4:]]
    for wrong, message in ((elsewhere, "config.json"), (unknown, "w9")):
        with pytest.raises(SystemExit, match=message):
            script("sample_dit").main(wrong)
