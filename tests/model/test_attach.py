"""Where trajectories begin by themselves, and what threads and Ctrl-C leave behind."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import LayerConfig, ModiffConfig, ModiffWarning, StateError, presets
from modiff.model.apply import install
from modiff.model.attach import Automatic, attachment_of
from modiff.model.attention import apply_attention
from modiff.nn import Clock
from modiff.nn.branches import Inputs
from tests.helpers import assert_same_bits, relative_error
from tests.model.test_attention import X, coarse, network
from tests.model.toys import assert_equal, generate, sample, toy
from tests.recipes import state_of

ONES = torch.ones(2, 3, 4, 4)


def modulated(model: nn.Module | None = None, bits: int = 4, *, automatic: bool = True) -> nn.Module:
    model = model or toy()
    modiff.apply(model, presets.published(8, bits))
    if automatic:
        attachment_of(model).automatic = Automatic(attachment_of(model).clock)
    return model


@pytest.mark.parametrize(
    ("times", "starts"),
    [
        ([999, 666, 333, 999, 666, 333], [0, 3]),
        ([999, 500, 500, 0, 999, 500, 500, 0], [0, 4]),  # Heun evaluates twice at a time
        ([999, 500, 999, 500], [0, 2]),
        ([0.0, 0.3, 0.9, 0.0, 0.3], [0, 3]),  # flows that count upwards
        ([999, 999, 999], [0, 1, 2]),  # one step each
        ([999, 666, 800, 400], [0, 2]),  # image to image, from the middle
        ([999, 888, 811.9, 812, 812, 735, 15, 8.66, 9, 9, 0.2], [0]),  # an ancestral sampler that rounds
        ([1000, 1], [0]),
        ([[0, 0, t, t] for t in (999, 666, 333, 999, 666)], [0, 3]),  # tokens of the first frame stay where they are
        ([[1000, 1000, t, t] for t in (999, 666, 333, 999, 666)], [0, 3]),
    ],
)
def test_one_ends_where_time_turns_round(times, starts):
    clock, began = Clock("model"), []
    automatic = Automatic(clock)
    clock.on_reset(lambda: began.append(True))
    seen = []
    for i, t in enumerate(times):
        before = len(began)
        automatic.before(torch.tensor(t))
        clock.call(torch.tensor(t), Inputs())
        clock.returned()
        seen += [i] if len(began) > before else []
        assert clock.active
        assert clock.context == "default"
    assert seen == starts


@pytest.mark.parametrize("tiles", [3, 1])  # or three trajectories of one step before another
def test_tiles_of_the_first_timestep_are_told_from_trajectories_of_one_step(tiles):
    clock, contexts = Clock("model"), []
    automatic = Automatic(clock)
    for timestep in [9] * 3 + [6] * tiles + [3] * tiles:
        automatic.before(timestep)
        clock.call(timestep, Inputs())
        contexts.append(clock.context)
        clock.returned()
    assert contexts[3:] == ["default", "default #1", "default #2"][:tiles] * 2


@pytest.mark.parametrize("other", ["batch", "thread"])
def test_another_batch_or_thread_is_another_trajectory_though_time_goes_on(other):
    model, x = modulated(), torch.ones(1 if other == "batch" else 2, 3, 4, 4)
    evaluate = torch.no_grad()(model)
    expected = evaluate(x, 400.0)
    attachment_of(model).automatic.end()
    sample(model, steps=2)  # ends at t = 500
    with ThreadPoolExecutor(1) as pool:
        assert_same_bits(evaluate(x, 400.0) if other == "batch" else pool.submit(evaluate, x, 400.0).result(), expected)


def test_threads_that_evaluate_in_turn_are_told_that_nothing_is_gained(monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model = modulated()
    evaluate = torch.no_grad()(model)
    with ThreadPoolExecutor(1) as pool:
        evaluate(ONES, 900.0)
        pool.submit(evaluate, ONES, 900.0).result()
        with pytest.warns(ModiffWarning, match=r"two threads in turn.*modiff\.clone"):
            evaluate(ONES, 600.0)


def test_generations_in_a_row_equal_those_in_trajectories_of_their_own():
    model, guarded = modulated(), modulated(automatic=False)
    for seed, batch in ((0, 2), (1, 1), (0, 2)):
        assert_equal(sample(model, seed=seed, batch=batch), generate(guarded, seed=seed, batch=batch))
    modiff.pack(model)  # waits for no trajectory that began by itself
    assert_equal(sample(model), generate(guarded))


def test_a_trajectory_of_somebody_else_is_left_alone_and_takes_over():
    model = modulated(bits=0)
    sample(model)  # one that began by itself still runs
    with modiff.trajectory(model):
        sample(model)
        before = state_of(model.body).input.clone()
        sample(model, seed=1)  # time turns round, but this is one trajectory: at 0 bits the state stays
        assert_same_bits(state_of(model.body).input, before)
        attachment_of(model).automatic.end()
        assert attachment_of(model).clock.active
    assert not attachment_of(model).clock.active
    sample(model, seed=1)
    assert not torch.equal(state_of(model.body).input, before)


class Waits(nn.Module):
    """Passes its input through; the first call says that it is inside and waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside.is_set():
            self.inside.set()
            self.go_on.wait(10)
        return x


@pytest.mark.parametrize("automatic", [False, True])
def test_an_evaluation_inside_that_of_another_thread_is_refused_and_disturbs_nothing(automatic):
    model, waits = modulated(automatic=automatic), Waits()
    expected = generate(model)
    model.norm = nn.Sequential(model.norm, waits)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(sample if automatic else generate, model)
        waits.inside.wait(10)
        with pytest.raises(StateError, match="Toy: expected one evaluation at a time, got one while another thread"):
            sample(model, seed=1)
        waits.go_on.set()
        assert_equal(other.result(), expected)


def test_of_threads_that_start_one_trajectory_at_once_one_does_and_each_other_is_told():
    for _ in range(20):
        clock, barrier = Clock("model"), threading.Barrier(4)
        for _ in range(50):
            clock.on_reset(lambda: threading.Event().wait(1e-4))  # while one thread frees states, others run

        def start(clock: Clock = clock, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(10)
            try:
                clock.start()
            except StateError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            started = [future.result() for future in [pool.submit(start) for _ in range(4)]]
        assert sum(started) == 1


class Interrupts(nn.Module):
    """Passes its input through; raises at the call `at`."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return x


def interrupted_toy(error: type[BaseException] = KeyboardInterrupt, **options: bool) -> nn.Module:
    """Modulated; the third evaluation is interrupted behind half of its layers."""
    model = toy()
    model.attention = nn.Sequential(model.attention, Interrupts(3, error))
    return modulated(model, **options)


def test_an_interrupt_inside_attention_leaves_other_attention_in_full_precision():
    model = network()
    apply_attention(model, coarse())
    model.second.to_v = nn.Sequential(model.second.to_v, Interrupts(1))
    expected = functional.scaled_dot_product_attention(X, X, X)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(X, 5.0)
    assert_same_bits(functional.scaled_dot_product_attention(X, X, X), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_step_after_an_interrupted_one_is_refused_inside_the_same_trajectory(error):
    model = interrupted_toy(error, automatic=False)
    with modiff.trajectory(model):
        with pytest.raises(error):
            sample(model)
        with pytest.raises(StateError, match=r"Toy: expected a trajectory .* Begin the trajectory again"):
            sample(model, steps=1)
    generate(model, steps=1)
    with modiff.trajectory(model), pytest.raises(StateError, match="body: expected a call of Toy, got one of a module"):
        model.body(torch.randn(2, 16, 4, 4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_run_that_begins_by_itself_after_an_interrupted_one_starts_with_no_states(error):
    """Text-to-image interrupted at t = 666, then image-to-image from t = 500: time goes on, the image is another."""
    model = interrupted_toy(error)
    with torch.no_grad():
        expected = [model(ONES, t) for t in (500.0, 333.0)]
        attachment_of(model).automatic.end()
        model.attention[1].calls = 0
        with pytest.raises(error):
            sample(model)
        assert_equal([model(ONES, t) for t in (500.0, 333.0)], expected)


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_apply_leaves_the_model_as_it_was(late, monkeypatch):
    model = toy()
    before, attributes = dict(model.named_modules()), set(model.__dict__)
    set_module, sets = nn.Module.__setattr__, []

    def interrupted(self: nn.Module, name: str, value: object) -> None:
        set_module(self, name, value)
        if name == "to_k":
            sets.append(name)
            if len(sets) == 1:
                raise KeyboardInterrupt

    if late:
        monkeypatch.setattr("modiff.model.apply.apply_attention", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(model, presets.w8a8())
    assert dict(model.named_modules()) == before
    assert set(model.__dict__) == attributes
    assert not any(model.__dict__[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks"))


def test_a_network_that_returns_nothing_did_not_fail():
    class Writes(nn.Module):
        """Its result goes to a buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.result = toy(), torch.empty(0)

        def forward(self, sample: Tensor, timestep: float) -> None:
            self.result = self.net(sample, timestep)

    model = modulated(Writes(), automatic=False)
    with torch.no_grad(), modiff.trajectory(model):
        for step in range(3):
            model(ONES, 1000.0 - 100 * step)
            assert model.result.isfinite().all()


PLAIN = presets.plain().layer


@pytest.mark.parametrize(
    ("layer", "within"),
    [
        (LayerConfig(), modiff.trajectory), (PLAIN, modiff.trajectory), (PLAIN, nullcontext),
        (dataclasses.replace(PLAIN, execution="integer"), nullcontext),
    ],
)  # fmt: skip
def test_all_layers_look_at_their_weights_as_soon_as_one_found_another(layer, within):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))).eval()
    exact, x = copy.deepcopy(model), torch.randn(2, 16)
    modiff.apply(model, ModiffConfig(layer=layer, first_last="quantize"))
    weights = [layer.weight for layer in model]

    def written(*numbers: int) -> None:
        for i in numbers:
            exact[i].weight.data.mul_(1.5)
            weights[i].data.mul_(1.5)

    with torch.no_grad(), within(model):
        model(x)
        written(*range(6))
        assert relative_error(model(x), exact(x)) < 0.02
        written(1, 4)  # it is the turn of neither
        assert model[4].weight is weights[4]  # read by others, which may write it
        model(x)
        assert relative_error(model(x), exact(x)) < 0.02
        written(5)
        assert relative_error([model(x) for _ in range(6)][-1], exact(x)) < 0.02
    written(0, 5)
    modiff.pack(model)
    with torch.no_grad(), within(model):
        assert relative_error(model(x), exact(x)) < 0.02
