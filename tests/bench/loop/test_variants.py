"""What the loop benchmark compares: ours, the opponents, and what each says where it cannot run."""

from types import SimpleNamespace

import pytest
import torch

from loop import child as loop_child
from loop import variants as loop_variants
from loop.models import HIDDEN
from loop.variants import CannotRun, Task, prepare
from modiff import ModiffConfig, presets

TINY = HIDDEN["tiny"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes a minute and is torch's business; bf16 is a matter of the processor."""
    monkeypatch.setattr(loop_variants, "compiler", lambda *_: lambda net, **_words: net)
    monkeypatch.setattr(loop_variants, "has_bf16", lambda *_: False)


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
     ("modulated-w8a8-fp16", "16 states are compared on GPUs only")],
)  # fmt: skip
def test_a_variant_says_why_it_cannot_run(variant, why, monkeypatch):
    monkeypatch.setattr(loop_variants.shutil, "which", lambda _: None)
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
