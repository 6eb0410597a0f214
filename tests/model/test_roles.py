"""What layers are for: ends, embeddings and layers that never run, by the source of `forward` and by what runs."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, QuantizerConfig, presets
from modiff.errors import ModiffWarning
from modiff.hosts.names import DEFAULT_EXCLUDE
from modiff.model.attach import attachment_of
from modiff.model.roles import ChannelMaxima
from modiff.model.select import matches
from tests.model.toys import applied, assert_equal, generate, sample, toy


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.errors._WARNED", set())


class Inside(nn.Module):
    """An embedding is added between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.emb = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 16)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.late(self.early(x) + self.emb(emb)[..., None, None])


class Published(nn.Module):
    """As published U-Nets are written: embeddings and the way out are registered before the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.out = nn.Sequential(nn.GroupNorm(2, 16), nn.Conv2d(16, 3, 3, padding=1))
        self.middle = Inside()
        self.inputs = nn.ModuleDict({"first": nn.Conv2d(3, 16, 3, padding=1), "second": Inside()})
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: float, y: Tensor | None = None) -> Tensor:
        emb = self.embed(torch.full((x.shape[0], 16), timestep / 1000, dtype=x.dtype))
        h = x.type(torch.float32)
        for name, block in self.inputs.items():
            h = block(h) if name == "first" else block(h, emb)
        h = self.middle(h, emb)
        return self.out(h.type(x.dtype))


class Late(Published):
    """Its source tells nothing: the method that runs is found at runtime."""

    def forward(self, *args: object) -> Tensor:
        return getattr(super(), "forward")(*args)  # noqa: B009


def test_embeddings_of_published_code_are_known_by_name():
    names = ("time_embed.0", "input_blocks.1.0.emb_layers.1", "label_emb.0.2", "map_layer0", "enc.8x8.affine",
             "down.0.block.0.temb_proj", "mapping.out", "blocks.0.adaLN_modulation.1", "t_embedder.mlp.0")  # fmt: skip
    assert all(matches(name, DEFAULT_EXCLUDE) for name in names)
    others = ("input_blocks.1.0.in_layers.2", "middle_block.1.qkv", "blocks.0.mlp.fc1", "down.0.block.0.conv1")
    assert not any(matches(name, DEFAULT_EXCLUDE) for name in others)


STATIC = LayerConfig(activation=QuantizerConfig(dynamic=False))
EMBEDDINGS = ("embed.0", "embed.2", "middle.emb", "inputs.second.emb")
CONVOLUTIONS = ("middle.late", "middle.early", "inputs.second.late", "inputs.second.early")


def published(kind: type[nn.Module] = Published) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def test_the_ends_are_found_in_the_source_of_forward_and_the_report_says_so():
    reasons = {e.name: e.reason for e in modiff.select(published(), presets.w8a8()).left}
    assert reasons == dict.fromkeys(("inputs.first", "out.1"), "first or last layer (as forward is written)")
    reasons = {e.name: e.reason for e in modiff.select(published(Late), presets.w8a8()).left}
    assert reasons == dict.fromkeys(("embed.0", "unused"), "first or last layer (by registration)")


@pytest.mark.parametrize("kind", [Published, Late])
def test_a_run_tells_which_layers_keep_their_floats_and_tune_and_autotune_leave_them(kind, recwarn):
    model = published(kind)
    tuned = modiff.tune(model, 4, run=lambda: sample(model))
    assert tuple(e.name for e in modiff.apply(model, tuned).taken) == CONVOLUTIONS
    modiff.remove(model)
    rows = modiff.autotune(model, "w8a8", run=lambda: sample(model), tolerance=10.0).rows
    assert tuple(row.name for row in rows) == CONVOLUTIONS
    (first, *_) = (str(w.message) for w in recwarn if w.category is ModiffWarning)
    assert first.startswith("tune: expected layers that quantizing suits, got ")
    assert ("unused (never called" in first) == (kind is Published)
    assert re.search(r"embed\.2, .* \(reads one row a sample: an embedding\)", first)


def test_what_is_quantized_against_its_role_is_named_once_with_what_to_type(recwarn):
    model = copy.deepcopy(applied(make=lambda: published(Late)))
    generate(model)
    generate(model)
    (warning,) = (str(w.message) for w in recwarn if w.category is ModiffWarning)
    assert "embed.2, inputs.second.emb, middle.emb (reads one row a sample: an embedding)" in warning
    assert "inputs.first (runs first)" in warning
    assert "out.1 (runs last)" in warning
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
@pytest.mark.parametrize("kind", [Published, Late])
def test_apply_with_a_run_takes_what_runs_inside_and_leaves_the_rest_with_the_reason(kind):
    model = published(kind)
    report = modiff.apply(model, "w8a8", run=lambda: sample(model))
    assert tuple(e.name for e in report.taken) == CONVOLUTIONS
    reasons = {e.name: e.reason for e in report.left}
    ends = {"inputs.first": "runs first", "out.1": "runs last"}
    if kind is Published:
        ends = dict.fromkeys(ends, "first or last layer (as forward is written)")
    assert reasons.items() >= (ends | dict.fromkeys(EMBEDDINGS[1:], "reads one row a sample: an embedding")).items()
    generate(model)  # nothing is left to say


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
def test_apply_with_a_run_takes_the_layers_that_stand_at_the_ends_and_run_inside():
    class Backwards(nn.Sequential):
        def forward(self, *inputs):
            (x, _timestep), layers = inputs, list(self)
            for layer in (layers[2], layers[0], layers[3], layers[1]):
                x = layer(x)
            return x

    model = Backwards(*(nn.Conv2d(i, o, 3, padding=1) for i, o in ((16, 16), (16, 3), (3, 16), (16, 16)))).eval()
    assert [e.name for e in modiff.select(model, "w8a8").taken] == ["1", "2"]
    report = modiff.apply(model, "w8a8", run=lambda: sample(model))
    assert [e.name for e in report.taken] == ["0", "3"]
    generate(model)


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
@pytest.mark.parametrize("field", ["exclude", "include"])
def test_layers_that_the_config_names_are_not_warned_about(field):
    names = (*EMBEDDINGS, "inputs.first", "out.1", *(CONVOLUTIONS if field == "include" else ()))
    generate(applied(ModiffConfig(**{field: names}), make=lambda: published(Late)))


@pytest.mark.filterwarnings("error::modiff.ModiffWarning")
def test_a_config_that_replaces_the_default_exclusions_has_decided_on_ends_and_embeddings():
    generate(applied(ModiffConfig(default_exclude=(), exclude=("unused",)), make=lambda: published(Late)))


def test_names_that_are_no_patterns_of_themselves_are_written_as_patterns():
    model = published()
    model.inputs["second[1]"] = model.inputs.pop("second")
    config = modiff.autotune(model, "w8a8", run=lambda: sample(model), tolerance=1e-9).config
    assert {"inputs.second[[]1].emb", "inputs.second[[]1].late"} <= {*config.exclude}, "embedding, inexact"


@pytest.mark.parametrize("compiled", ["nothing", "", "middle"])
def test_a_layer_that_never_runs_is_named_after_the_first_trajectory_and_in_the_report(compiled):
    model = published()
    model.middle.never = nn.Linear(16, 16)
    modiff.apply(model, ModiffConfig(exclude=EMBEDDINGS))
    if compiled != "nothing":
        model.get_submodule(compiled).compile(backend="eager")
    with pytest.warns(ModiffWarning, match=r"Published: .*middle\.never, unused \(never called.*exclude="):
        generate(model)
    entries = {e.name: e for e in modiff.report(model).entries}
    assert entries["unused"].execution == entries["middle.never"].execution == "not run"
    assert entries["unused"].reason.startswith("never called")
    assert entries["middle.late"].reason == ""
    assert attachment_of(model).roles is None


@pytest.mark.parametrize("evaluate", [nullcontext, modiff.trajectory])
def test_a_network_that_calls_none_of_its_layers_names_all_of_them(evaluate):
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self[0].weight), self[1].weight)

    model, x = Reads(nn.Linear(64, 64), nn.Linear(64, 64)), torch.ones(2, 64)
    modiff.apply(model, ModiffConfig(layer=presets.plain().layer, first_last="quantize"))
    with pytest.warns(ModiffWarning, match=r"Reads: .* got 0, 1 \(never called"), evaluate(model):
        model(x)
    assert {e.execution for e in modiff.report(model).taken} == {"not run"}
    modiff.remove(model)
    with pytest.raises(modiff.ConfigError, match="got none of 2"):
        modiff.apply(model, ModiffConfig(first_last="quantize"), run=lambda: model(x))


class Encoder(nn.Module):
    """torch's own transformer, which reads weights by itself where it may."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0, **settings)
        self.enter, self.encoder, self.out = nn.Linear(4, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 4)

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        x = sample.flatten(2).mT if sample.dim() == 4 else sample
        x = nn.functional.pad(x, (0, 1)) + timestep / 1000
        padded = torch.arange(x.shape[1])[None] >= torch.tensor([[x.shape[1]], [x.shape[1] - 2]])
        return self.out(self.encoder(self.enter(x), src_key_padding_mask=padded))[..., :3].mT.reshape(sample.shape)


@pytest.mark.filterwarnings("ignore:.*ested:UserWarning", "error::modiff.ModiffWarning")
@pytest.mark.parametrize("settings", [{}, {"norm_first": True}])
def test_layers_of_torch_s_transformer_run_and_those_that_it_reads_by_itself_are_left(settings):
    torch.manual_seed(0)
    model = Encoder(**settings).eval()
    exact = sample(model)
    report = modiff.apply(model, presets.plain(2, 2))
    assert {e.name.rpartition(".")[2] for e in report.taken} == {"linear1", "linear2"}
    left = {e.name.rpartition(".")[2]: e.reason for e in report.left}
    assert left["out_proj"] == "MultiheadAttention reads its weight and never calls it"
    assert left["in_proj_weight"] == "no layer of its own"
    quantized = generate(model)
    assert float((quantized[-1] - exact[-1]).norm() / exact[-1].norm()) > 0.01
    modiff.remove(model)
    assert_equal(sample(model), exact)
    modiff.apply(model, modiff.tune(model, 4, run=lambda: sample(model)))
    modiff.pack(model)
    assert all(output.isfinite().all() for output in generate(model))


def test_a_tiny_network_is_taken_all_the_same_and_a_limit_of_the_user_s_stands():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    assert [e.name for e in modiff.select(model, "w8a8").taken] == ["1", "2"]
    with pytest.raises(modiff.ConfigError, match=r"got none of 4: 2 first or last layer .*; 2 tiny"):
        modiff.select(model, ModiffConfig(min_weights=255))
    assert len(modiff.select(toy(), ModiffConfig()).taken) == 5


def test_calibrating_leaves_a_layer_that_never_runs_without_scales_and_says_so():
    model = applied(ModiffConfig(layer=STATIC, exclude=EMBEDDINGS), make=published)
    with pytest.warns(ModiffWarning, match=r"calibrate: .* got unused \(no coded step\)"):
        modiff.calibrate(model, lambda: generate(model))
    assert all(output.isfinite().all() for output in generate(model))
    assert model.unused.quantizer.static is None


def test_calibrating_leaves_layers_that_run_first_or_last_or_read_a_row_a_sample_in_full_precision(tmp_path):
    model = applied(ModiffConfig(layer=STATIC), make=lambda: published(Late))
    exact = sample(published(Late))
    with pytest.warns(ModiffWarning, match=r"calibrate: .*inputs.first \(runs first\).*They run in full precision now"):
        modiff.calibrate(model, lambda: generate(model))
    reasons = {entry.name: entry.reason for entry in modiff.report(model).left}
    assert reasons["inputs.first"] == "runs first"
    assert type(model.inputs["first"]) is nn.Conv2d
    modiff.save(model, tmp_path / "saved")
    expected = generate(modiff.load(tmp_path / "saved", into=published(Late)))
    modiff.remove(model)
    assert_equal(sample(model), exact)
    assert all(output.isfinite().all() for output in expected)


def test_apply_names_a_layer_whose_channels_no_scale_fits_after_its_first_evaluation(monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model = applied(ModiffConfig(layer=presets.w8a8().layer))
    with torch.no_grad():
        model.attention.to_v.weight[3] *= 1e5  # the values of one channel, which to_out reads
    with pytest.warns(ModiffWarning, match=r"attention\.to_out\.0 \(channels reach .*exclude"):
        generate(model)
    modiff.remove(model)
    modiff.apply(model, ModiffConfig(layer=presets.w8a8().layer, include=("*", "attention.to_out.0")))
    generate(model)  # warnings are errors


def test_a_channel_that_dwarfs_its_layer_is_named_with_advice_and_large_layers_or_dead_channels_are_not():
    linear, convolution, seen = nn.Linear(8, 4), nn.Conv2d(8, 4, 3), ChannelMaxima()
    torch.manual_seed(0)
    seen.see("a", linear, torch.randn(5, 8))
    seen.see("b", convolution, torch.randn(2, 8, 5, 5))
    seen.see("large", linear, 1e8 * torch.randn(5, 8))
    dead, jumping = torch.zeros(5, 8), torch.randn(2, 8, 5, 5)
    dead[:, 0] = 3
    jumping[0, 2] *= 1e9
    seen.see("dead", linear, dead)
    seen.see("shortcut", convolution, torch.ones(2, 8, 5, 5))
    seen.see("near", linear, torch.tensor([800.0, *[4] * 7]).expand(5, 8))
    assert seen.outliers() == []
    seen.see("shortcut", convolution, jumping)  # one of many steps is enough
    (outlier,) = seen.outliers()
    assert (outlier.name, outlier.channels) == ("shortcut", 1)
    assert outlier.largest == jumping.abs().max()
    assert outlier.median == pytest.approx(float(jumping.abs().amax((0, 2, 3)).clamp(min=1).median()))
    assert "exclude=('shortcut',)" in str(outlier)
    seen.see("near", linear, torch.tensor([1200.0, *[4] * 7]).expand(5, 8))  # 4 is less than half an 8-bit code of it
    assert [outlier.name for outlier in seen.outliers()] == ["shortcut", "near"]
    most = torch.randn(5, 8) * torch.tensor([1.0, 1, 1, 1e6, 1e7, 1e8, 1e8, 1e8])
    seen.see("most", linear, most)  # the few that are dwarfed are what one scale loses
    assert (outlier := seen.outliers()[1]).name == "most"
    assert sorted(outlier.large) == [3, 4, 5, 6, 7]
    assert outlier.median == float(most.abs().amax(0)[:3].median())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_gives_padded_positions_the_values_of_its_slow_path_and_all_others_the_same():
    """Torch's nested tensors set padded positions to zero; modulated layers keep the encoder from those."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x, padded = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[4], [5], [6]])
    slow = encoder(x, src_key_padding_mask=padded).detach()
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padded)
        modiff.apply(encoder, presets.modulated(None, None))
        with modiff.trajectory(encoder):
            ours = encoder(x, src_key_padding_mask=padded)
        modiff.remove(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=padded), fast)
    assert torch.equal(ours, slow)
    torch.testing.assert_close(ours[~padded], fast[~padded])
    assert not fast[padded].any()
    assert ours[padded].abs().amin() > 0
