"""Trajectories, contexts and copies on a whole model, and what observers see of it."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModiffWarning, ModulationConfig, StateError, presets
from modiff.kernels.backend import PREPACKED
from modiff.model.attach import attachment_of
from modiff.model.observe import observe
from modiff.model.trajectory import state_bytes
from tests.helpers import assert_same_bits, relative_error
from tests.model.toys import activations_only, applied, assert_equal, generate, sample, toy

LINEAR = ModiffConfig(layer=LayerConfig(modulation=ModulationConfig(predictor="linear", gain=0.8)))


def test_states_are_freed_when_the_body_raises_and_the_next_trajectory_is_a_fresh_one():
    model = applied(presets.w8a4())
    expected = generate(model)

    def interrupted() -> None:
        with modiff.trajectory(model):
            sample(model, steps=3, seed=5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state_bytes(model) == 0
    compiled = torch.compile(model, backend="eager")  # it has the trajectories of the model behind it
    assert_equal(generate(compiled), expected)


def test_trajectories_of_one_model_cannot_nest_and_a_second_request_is_told_what_to_do():
    model = applied(presets.w8a4())
    with modiff.trajectory(model):
        sample(model, steps=2)
        with pytest.raises(StateError, match=r"Toy: expected no running trajectory.*modiff\.clone\(target\)"):
            generate(model)
        assert state_bytes(model) > 0


@pytest.mark.parametrize("config", [LINEAR, presets.w8a4().on_integers()])
def test_contexts_and_batches_of_another_size_have_states_of_their_own(config):
    model, times, expected = applied(config), (900.0, 800.0, 700.0), {}
    inputs = {"cond": torch.randn(2, 3, 4, 4), "uncond": torch.randn(2, 3, 4, 4), "default": torch.randn(1, 3, 4, 4)}
    with torch.no_grad():
        for name, x in inputs.items():
            with modiff.trajectory(model):
                expected[name] = [model(x * (1 + t / 1e4), t) for t in times]
        with modiff.trajectory(model):
            for i, t in enumerate(times):
                for name, x in inputs.items():
                    with modiff.context(model, name.replace("default", "uncond")):
                        assert_same_bits(model(x * (1 + t / 1e4), t), expected[name][i])
            with pytest.raises(ValueError, match="inner"), modiff.context(model, "inner"):
                raise ValueError(attachment_of(model).clock.context)
            assert attachment_of(model).clock.context == "default"


class Experts(nn.Module):
    """Each of two experts gets the rows that `route` sends to it at this timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        x = self.head(x)
        route = torch.arange(len(x)) < timestep
        y = torch.zeros_like(x)
        for expert, rows in zip(self.experts, (route, ~route), strict=True):
            y[rows] = expert(x[rows])
        return self.tail(y)


@pytest.mark.parametrize("config", [presets.w8a8(), presets.w8a8().on_integers(), presets.tuned(8, 8)])
def test_experts_that_get_other_rows_at_each_step_run_and_are_named_once(config, monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model = Experts()
    x, times = torch.randn(4, 16), (4.0, 3.0, 1.0, 0.0)
    with torch.no_grad():
        exact = [model(x + 0.1 * t, t) for t in times]
        modiff.apply(model, config)
        with warnings.catch_warnings(record=True) as seen, modiff.trajectory(model):
            warnings.simplefilter("always", ModiffWarning)
            for t, expected in zip(times, exact, strict=True):
                assert relative_error(model(x + 0.1 * t, t), expected) < 0.02
    (message,) = [str(warning.message) for warning in seen if "begin again" in str(warning.message)]
    assert message.startswith(
        "experts.0: expected an input of shape (4, 16) on cpu, as in the step before, got (3, 16)"
    )


def test_the_timestep_reaches_the_clock_by_position_or_by_name():
    model, x = applied(activations_only(4)), torch.randn(2, 3, 4, 4)
    with modiff.trajectory(model), torch.no_grad():
        model(x, 1000.0)
        model(sample=x, timestep=torch.tensor(900))
        model(x, timestep=torch.tensor([850.0, 850.0]))
        assert float(attachment_of(model).clock.ratio) == 0.5
        assert attachment_of(model).clock.step == 2


class TwoReaders(nn.Module):
    """Two layers that read one tensor, between ends that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.to_q, self.to_k, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.to_q(x) * self.to_k(x))


@pytest.mark.parametrize(("config", "copies"), [(presets.plain(8, 8), 0), (presets.modulated(8, 4), 1), (LINEAR, 2)])
def test_state_bytes_by_hand_shared_inputs_once_and_each_context(config, copies):
    """Linear predictors keep the last move of each state from the second step on; plain layers keep nothing."""
    model, each = TwoReaders(), 4 * 3 * 16
    modiff.apply(model, config)
    with torch.no_grad(), modiff.trajectory(model):
        for count, name in enumerate(("cond", "uncond"), 1):
            with modiff.context(model, name):
                model(torch.randn(3, 16))
                model(torch.randn(3, 16))
            assert state_bytes(model) == count * copies * 3 * each


def test_a_third_evaluation_at_one_timestep_in_one_context_warns_once(monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model, x = applied(presets.w8a4()), torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ModiffWarning)
        for tiles in (("a", "b", "c"), ("default", "default", "default")):
            with modiff.trajectory(model), torch.no_grad():
                for t in (900.0, 800.0):
                    for tile in tiles:
                        with modiff.context(model, tile):
                            model(x, t)
                            model(x, torch.tensor(t))  # samplers of second order evaluate twice
            assert len(seen) == (tiles[0] == "default")
    assert "two at most in a loop of yours, got another number under the same conditions at timestep 900" in str(
        seen[0].message
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [presets.w8a4(), presets.w8a4().on_integers()])
def test_it_has_the_same_tensors_and_generates_the_same_while_the_original_goes_on(config, packed):
    model = applied(config)
    if packed:
        modiff.pack(model)
    first, other = generate(model), generate(model, seed=1)
    gc.collect()
    held = PREPACKED.bytes_held()
    with modiff.trajectory(model):
        sample(model, steps=2)
        bytes_before = state_bytes(model)
        copied = modiff.clone(model)
        assert state_bytes(copied) == 0
        with ThreadPoolExecutor(2) as pool:
            assert_equal(pool.submit(generate, copied, seed=1).result(), other)
        assert state_bytes(model) == bytes_before
    assert PREPACKED.bytes_held() <= held
    assert_equal(generate(copied), first)
    for (name, tensor), same in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert tensor is same, name
    for layer, same in zip(*(attachment_of(m).layers.values() for m in (model, copied)), strict=True):
        assert layer.clock is not same.clock
        for (codes, _), (shared, _) in zip(layer.quantized_weight.codes(layer.weight),
                                           same.quantized_weight.codes(same.weight), strict=True):  # fmt: skip
            assert packed or codes is shared


@pytest.mark.parametrize("packed", [False, True])
def test_copies_made_before_the_first_run_share_codes_and_kernels(packed):
    model = applied(presets.w8a4().on_integers())
    if packed:
        modiff.pack(model)
    copies = [modiff.clone(model) for _ in range(2)]
    assert_equal(*map(generate, copies))
    for one, other in zip(*(attachment_of(copied).layers.values() for copied in copies), strict=True):
        assert one.loop.kernels[0] is other.loop.kernels[0]


def test_a_copy_of_a_plain_model_is_one_and_modiff_comes_off_each_alone():
    model = toy()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        plain = model(x, 5.0)
        copied = modiff.clone(model)
        modiff.apply(copied, presets.w8a4())
        another = modiff.clone(copied)
        modiff.remove(copied)
        for each in (model, copied):
            assert_same_bits(each(x, 5.0), plain)
        assert attachment_of(another) is not None


class Writes(nn.Module):
    """Doubles its input in place, and returns nothing else."""

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x.mul_(scale)


def test_layers_and_evaluations_are_seen_in_the_order_of_execution() -> None:
    """What the functions return, here a number, does not replace an output."""
    model, seen = toy(), []
    expected = sample(model, steps=2)

    def see(*words: object) -> int:
        seen.append(words[0])
        return 0

    with torch.inference_mode(), observe(
        model, lambda name, *_: see(name), lambda *_: see("end"), layers=["conv_out", "body", ""],
        before_layer=lambda name, *_: see(f"before {name}"), before_step=lambda *_: see("begin"),
    ):  # fmt: skip
        outputs = sample(model, steps=2)
    assert seen == ["begin", "before ", "before body", "body", "before conv_out", "conv_out", "", "end"] * 2
    assert all(map(torch.equal, outputs, expected))


def test_before_sees_inputs_that_the_layer_overwrites_and_on_layer_those_given_by_keyword() -> None:
    model, seen = nn.Sequential(Writes()), []
    with observe(
        model,
        lambda name, layer, inputs, output: seen.append((inputs, output is inputs[0])),
        layers=["0"],
        before_layer=lambda name, layer, args, kwargs: seen.append((args[0].clone(), kwargs)),
    ):
        model[0](torch.ones(1), scale=3.0)
    assert seen[0] == (torch.ones(1), {"scale": 3.0})
    assert seen[1] == ((torch.full((1,), 3.0), 3.0), True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_behind_when_the_body_raises(error: type[BaseException]) -> None:
    model = toy()
    with pytest.raises(error), observe(model, print, print, layers=["body"], before_layer=print, before_step=print):
        raise error
    with pytest.raises(AttributeError, match="nothing_here"), observe(model, print, layers=["body", "nothing_here"]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
