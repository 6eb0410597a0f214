"""What the loop benchmark compares: ours, the opponents, and what each says where it cannot run."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig

from loop import child as loop_child
from loop import opponents, task
from loop import variants as loop_variants
from loop.models import HIDDEN, LoopModel, drawn, scheduler_of
from loop.task import CannotRun, Task
from loop.variants import prepare
from modiff import ModiffConfig, presets

TINY = HIDDEN["tiny"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes a minute and is torch's business; bf16 is a matter of the processor."""
    for module in (task, opponents, loop_variants):
        monkeypatch.setattr(module, "compiler", lambda *_: lambda net, **_words: net)
    monkeypatch.setattr(task, "has_bf16", lambda *_: False)


@pytest.mark.usefixtures("uncompiled")
def test_our_variants_run_the_presets_on_integers(monkeypatch):
    applied: list[ModiffConfig] = []
    monkeypatch.setattr(loop_variants.modiff, "apply", lambda _, config: applied.append(config))
    for variant in ("plain-w8a8", "modulated-w8a8", "modulated-w8a7", "modulated-w8a4", "modulated-w4a4"):
        prepare(Task(TINY, variant, timed=2))
    configs = presets.plain(), presets.w8a8(), presets.modulated(8, 7), presets.w8a4(), presets.w4a4()
    assert applied == [config.on_integers() for config in configs]


@pytest.mark.parametrize(
    ("variant", "why"),
    [("fp32-compiled", "no C\\+\\+ compiler"), ("torchao-float8", "float8 is compared on GPUs only"),
     ("modulated-w8a8-fp16", "16 states are compared on GPUs only"), ("first-block-cache", "is for transformers")],
)  # fmt: skip
def test_a_variant_says_why_it_cannot_run(variant, why, monkeypatch):
    monkeypatch.setattr(task.shutil, "which", lambda _: None)
    with pytest.raises(CannotRun, match=why):
        prepare(Task(TINY, variant, timed=2))


@pytest.mark.usefixtures("uncompiled")
def test_a_modulated_variant_counts_its_states_and_leaves_none():
    ready = prepare(Task(TINY, "modulated-w8a8", timed=3))
    with torch.inference_mode():
        images, state = loop_child.one_loop(ready)
        again, _ = loop_child.one_loop(ready)
        exact, none = loop_child.one_loop(prepare(Task(TINY, "fp32-eager", timed=3)))
    assert state > 0 == ready.state() == none
    assert torch.equal(images, again)
    assert 0 < float((images - exact).norm() / exact.norm()) < 0.1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("pays", "same_as"), [(True, "modulated-w8a8"), (False, "fp32-eager")])
def test_autotune_is_followed_and_where_nothing_pays_the_baseline_runs(pays, same_as, monkeypatch):
    class Found(SimpleNamespace):
        def __str__(self) -> str:
            return "1 float, 2 plain; layers of one evaluation"

    found = Found(config=presets.w8a8().on_integers(), pays=pays)
    monkeypatch.setattr(loop_variants.modiff, "autotune", lambda net, run: (run(), found)[1])
    with torch.inference_mode():
        images, state = loop_child.one_loop(ready := prepare(Task(TINY, "gated", timed=3)))
        assert (ready.note, state > 0) == ("1 float, 2 plain", pays)
        assert torch.equal(images, loop_child.one_loop(prepare(Task(TINY, same_as, timed=3)))[0])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("wins", "same_as"), [(True, "modulated-w8a8"), (False, "fp32-eager")])
def test_the_network_that_accelerate_leaves_is_timed_on_whole_trajectories_of_other_noise(wins, same_as, monkeypatch):
    def accelerate(net, example, progress):
        lasts.append(example())
        if wins:
            loop_variants.modiff.apply(net, presets.w8a8().on_integers())
        return SimpleNamespace(accelerated=wins)

    lasts: list[torch.Tensor] = []
    monkeypatch.setattr(loop_variants.modiff, "accelerate", accelerate)
    with torch.inference_mode():
        images, state = loop_child.one_loop(prepare(Task(TINY, "accelerate", timed=3)))
        other, _ = loop_child.one_loop(prepare(Task(TINY, same_as, timed=3)))  # its channels lie innermost
        torch.testing.assert_close(images, other, rtol=0, atol=1e-2)  # a last bit may turn up a scale of the grid
        assert (lasts[0].shape, state > 0) == (images.shape, wins)
        assert not torch.equal(lasts[0], images)


@pytest.mark.usefixtures("uncompiled")
def test_dpm_solver_takes_half_of_the_steps_and_begins_each_loop_from_nothing():
    ready, fewer = (prepare(Task(TINY, name, timed=10)) for name in ("dpm-solver-2", "fewer-steps-2"))
    with torch.inference_mode():
        images = [loop_child.one_loop(loop)[0] for loop in (ready, ready, fewer)]
    assert torch.equal(images[0], images[1])
    assert len(ready.loop.seconds) == 5
    assert not torch.allclose(images[0], images[2], atol=1e-3)


def dit(device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor], object]:
    config = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "sample_size": 8,
              "out_channels": 2, "norm_num_groups": 8}  # fmt: skip
    return drawn(DiTTransformer2DModel, config, device), {"class_labels": torch.tensor([1])}, scheduler_of()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("threshold", "runs"), [(0.0, 10), (1e9, 1)])
def test_first_block_cache_runs_the_other_blocks_where_the_first_one_changed_and_at_each_first_step(
    threshold, runs, monkeypatch
):
    monkeypatch.setattr(opponents, "FirstBlockCacheConfig", lambda: FirstBlockCacheConfig(threshold))
    model = LoopModel("dit", dit, (2, 1, 8, 8), 10, 10, unet=False)
    calls = list[int]()
    monkeypatch.setattr(opponents, "as_compiled", lambda parts, net, dtype: (
        net.transformer_blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1)),
        task.as_compiled(parts, net, dtype))[1])  # fmt: skip
    with torch.inference_mode():
        ready = prepare(Task(model, "first-block-cache", timed=10))
        images = [loop_child.one_loop(ready)[0] for _ in range(2)]
        exact, _ = loop_child.one_loop(prepare(Task(model, "fp32-eager", timed=10)))
    assert len(calls) == 2 * runs
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], exact) == (threshold == 0.0)
