"""What the loop benchmark compares: ours, the opponents, and what each says where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop import child as loop_child
from loop import variants as loop_variants
from loop.models import HIDDEN, MODELS
from loop.variants import VARIANTS, CannotRun, Task, parts_of, prepare
from modiff import ModiffConfig, presets

TINY = HIDDEN["tiny"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute and is torch's business."""
    monkeypatch.setattr(loop_variants, "compiler", lambda *_: lambda net, **_words: net)


def test_the_table_has_the_variants_and_models_of_the_benchmark() -> None:
    assert list(VARIANTS) == [
        "fp32-eager", "fp32-compiled", "bf16-eager", "bf16-compiled", "torchao-int8", "torchao-float8",
        "openvino-int8", "deepcache-2", "deepcache-3", "fewer-steps-2", "plain-w8a8", "modulated-w8a8",
        "modulated-w8a8-fp16", "modulated-w8a8-int16", "modulated-w8a7", "modulated-w8a4", "gated",
    ]  # fmt: skip
    assert list(MODELS) == ["embedded", "ddpm-cifar10", "sd15", "sdxl", "dit-xl"]
    assert [m.size[0] for m in MODELS.values()] == [16, 8, 2, 4, 2]
    assert [m.on("cpu").timed for m in MODELS.values()] == [50, 50, 6, 6, 6]
    assert [m.on("cuda").size[0] for m in MODELS.values()] == [16, 256, 2, 4, 32]
    assert [m.on("cuda").timed for m in MODELS.values()] == [50] * 5
    assert [m.random_weights for m in MODELS.values()] == [False, True, True, True, True]


def test_bf16_counts_only_where_the_instructions_are_and_may_be_used() -> None:
    has = loop_variants.has_bf16
    amx, old = {"amx_bf16": True, "avx512_bf16": True}, {"avx512_vnni": True}
    assert has(amx, "", "cpu")
    assert has({"avx512_bf16": True}, "AVX512_CORE_BF16", "cpu")
    assert not has(amx, "AVX512_CORE_VNNI", "cpu")
    assert not has(amx, "AVX2", "cpu")
    assert not has(old, "", "cpu")
    assert has(old, "", "cuda")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("variant", "preset"),
    [("plain-w8a8", presets.plain()), ("modulated-w8a8", presets.w8a8()), ("modulated-w8a7", presets.modulated(8, 7)),
     ("modulated-w8a4", presets.w8a4())],
)  # fmt: skip
def test_our_variants_run_the_presets_on_integers(
    variant: str, preset: ModiffConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[ModiffConfig] = []
    monkeypatch.setattr(loop_variants.modiff, "apply", lambda _, config: applied.append(config))
    prepare(Task(TINY, variant, timed=2))
    assert applied == [preset.on_integers()]


def test_without_a_compiler_the_compiled_variants_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_variants.shutil, "which", lambda _: None)
    for variant in ("fp32-compiled", "deepcache-2", "fewer-steps-2"):
        with pytest.raises(CannotRun, match="no C\\+\\+ compiler"):
            prepare(Task(TINY, variant, timed=2))


def test_layers_that_see_one_row_an_image_are_told_from_those_that_see_pixels() -> None:
    parts = parts_of(Task(TINY, "torchao-int8", timed=2))
    with torch.inference_mode():
        found = loop_variants.layers_of_many_rows(parts, parts.net, torch.float32)
    linear = {name for name, module in parts.net.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == {name for name in linear if ".to_" in name}, "2 images of 16 pixels"
    assert linear - found >= {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert not any(module._forward_pre_hooks for module in parts.net.modules())


def test_float8_is_for_gpus() -> None:
    with pytest.raises(CannotRun, match="float8 is compared on GPUs only"):
        prepare(Task(TINY, "torchao-float8", timed=1))


@pytest.mark.parametrize(("variant", "device", "other"), [("fp16", "cuda", "cpu"), ("int16", "cpu", "cuda")])
def test_states_of_16_bits_are_floats_on_gpus_and_integers_on_cpus(
    variant: str, device: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(TINY, f"modulated-w8a8-{variant}", timed=1)
    parts = parts_of(task)
    applied: list[ModiffConfig] = []
    monkeypatch.setattr(loop_variants.modiff, "apply", lambda _, config: applied.append(config))
    monkeypatch.setattr(loop_variants, "modulated", lambda _: None)
    parts.loop.device = torch.device(other)
    with pytest.raises(CannotRun, match=f"16 states are compared on {'GPUs' if other == 'cpu' else 'CPUs'} only"):
        VARIANTS[task.variant](parts)
    parts.loop.device = torch.device(device)
    VARIANTS[task.variant](parts)
    assert [config.layer.modulation.state_dtype for config in applied] == [f"{variant.replace('fp', 'float')}"]
    assert applied[0].layer.execution == "integer"


@pytest.mark.usefixtures("uncompiled")
def test_a_modulated_variant_counts_its_states_and_leaves_none() -> None:
    ready = prepare(Task(TINY, "modulated-w8a8", timed=3))
    with torch.inference_mode():
        images, state = loop_child.one_loop(ready)
        again, _ = loop_child.one_loop(ready)
        assert state > 0
        assert ready.state() == 0
        assert torch.equal(images, again)
        exact, none = loop_child.one_loop(prepare(Task(TINY, "fp32-eager", timed=3)))
    assert none == 0
    assert 0 < float((images - exact).norm() / exact.norm()) < 0.1


@pytest.mark.usefixtures("uncompiled")
def test_the_gate_is_followed_and_where_nothing_pays_the_baseline_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def autotune(pays: bool) -> Callable[..., Any]:
        def found(net: Any, run: Callable[[], object]) -> Any:
            run()
            asked.append(net)
            return Found(presets.w8a8().on_integers() if pays else None, pays)

        return found

    class Found(SimpleNamespace):
        def __init__(self, config: Any, pays: bool) -> None:
            super().__init__(config=config, pays=pays)

        def __str__(self) -> str:
            return "1 float, 2 plain; layers of one evaluation"

    monkeypatch.setattr(loop_variants.modiff, "autotune", autotune(True))
    with torch.inference_mode():
        images, state = loop_child.one_loop(ready := prepare(Task(TINY, "gated", timed=3)))
        assert (ready.note, state > 0) == ("1 float, 2 plain", True)
        assert torch.equal(images, loop_child.one_loop(prepare(Task(TINY, "modulated-w8a8", timed=3)))[0])
        monkeypatch.setattr(loop_variants.modiff, "autotune", autotune(False))
        images, state = loop_child.one_loop(prepare(Task(TINY, "gated", timed=3)))
        assert state == 0
        assert torch.equal(images, loop_child.one_loop(prepare(Task(TINY, "fp32-eager", timed=3)))[0])
    assert len(asked) == 2
