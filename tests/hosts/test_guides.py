"""The pages about kinds of pipelines say what works: their code, with tiny pipelines for the models they name."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import modiff
from tests.hosts.tiny import HOSTS

DOCS = Path(__file__).parents[2] / "docs"
KINDS = ("unet", "dit-pixart", "sd3-flux", "video", "lora-and-caches", "offload")
PAGES = ["tutorial", *(f"how-to/{kind}" for kind in KINDS)]
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "facebook/DiT-XL-2-256": "dit",
    "PixArt-alpha/PixArt-XL-2-512x512": "pixart",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
}


def with_lora(pipe: Any, _where: str, adapter_name: str) -> None:
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]), adapter_name)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models lead to folders of tiny ones, and calls of pipelines to arguments that fit these."""
    for base in (diffusers.DiffusionPipeline, diffusers.ModelMixin):
        read = base.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, _read: Any = read, **settings: Any) -> Any:
            if (host := MODELS.get(name)) is None:
                return _read(cls, name, **settings)
            if not (folder := tmp_path / "models" / host).is_dir():
                HOSTS[host].build().save_pretrained(folder)
            return _read(cls, folder, **settings)

        monkeypatch.setattr(base, "from_pretrained", classmethod(from_pretrained))
    for name in MODELS.values():
        kind = type(HOSTS[name].build())
        monkeypatch.setattr(kind, "__call__", fitting(kind.__call__, HOSTS[name].settings))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_weights", with_lora)
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(diffusers.DiffusionPipeline, offload, lambda _: None)  # there is no accelerator
    quick = functools.partial(modiff.accelerate, compile=False, progress=False)
    monkeypatch.setattr(modiff, "accelerate", quick)


def fitting(call: Any, settings: Any) -> Any:
    signature, sizes = inspect.signature(call), settings(1) | {"max_sequence_length": 8}

    @functools.wraps(call)
    def fitted(self: Any, *args: Any, **words: Any) -> Any:
        signature.bind(self, *args, **words)  # what the page gives is what the pipeline takes
        kept = {name: words[name] for name in ("generator", "output_type", "return_dict") if name in words}
        own = {n: v.to(self.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
               for n, v in settings(1).items()}  # fmt: skip
        return call(self, num_inference_steps=min(words.get("num_inference_steps", 4), 4), **own | kept)

    counts = {name: size for name, size in sizes.items() if isinstance(size, int)}
    usual = (p.replace(default=counts.get(p.name, p.default)) for p in signature.parameters.values())
    fitted.__signature__ = signature.replace(parameters=[*usual])  # from these modiff knows the size of a generation
    return fitted


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_on_a_tiny_model_of_the_kind(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)


def test_messages_that_the_faq_quotes_are_those_of_the_package():
    package = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", package)  # strings that go on in the next line
    headings = re.findall(r"^\*\*`.*(?=--)", (DOCS / "faq.md").read_text(encoding="utf-8"), re.M)
    quoted = [quote for heading in headings if "diffusers" not in heading for quote in re.findall(r"`(.+?)`", heading)]
    assert len(quoted) > 25
    pieces = [piece.strip() for quote in quoted for piece in re.split(r"\.\.\.|\bX\b|ModiffConfig\.exclude: ", quote)]
    assert [piece for piece in pieces if piece not in source] == []
