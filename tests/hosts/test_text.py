"""Text models as targets: what is taken, trajectories of their pipelines, and what unchanged tokens send."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import modiff
from modiff import ConfigError, StateError
from modiff.hosts.host import host_of
from modiff.hosts.text import text_network
from modiff.model.attach import attachment_of
from modiff.model.trajectory import state_bytes
from modiff.sampling.masked import MaskedScheduler, MaskedTextPipeline
from tests.helpers import assert_same_bits, relative_error
from tests.sampling.test_masked import characters

MASK = 27


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=28, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


class Plain(nn.Module):
    """Neither of diffusers nor of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(28, 32), nn.Linear(32, 64), nn.Linear(64, 28)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.up(self.table(input_ids)).relu()))


MODELS = {"characters": characters, "bert": bert, "plain": Plain}


def llada(model: nn.Module, **settings: object) -> Tensor:
    pipe = settings.pop("pipe", None) or LLaDA2Pipeline(model, BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        input_ids=torch.arange(1, 5)[None], gen_length=12, block_length=8, num_inference_steps=8, mask_token_id=MASK,
        output_type="seq", temperature=1.0, generator=torch.Generator().manual_seed(0), eos_early_stop=False,
    )  # fmt: skip
    return output.sequences


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_after_the_table_are_taken_and_the_head_keeps_its_floats(name):
    model = MODELS[name]()
    report = modiff.apply(model, "w8a8")
    first = {
        "characters": "blocks.0.attention.to_q",
        "bert": "bert.encoder.layer.0.attention.self.query",
        "plain": "up",
    }
    assert first[name] in {entry.name for entry in report.taken}
    assert {entry.name for entry in report.left if entry.is_layer} <= {"head", "cls.predictions.decoder"}
    tokens = torch.randint(27, (2, 12))
    with pytest.raises(StateError, match=r"modiff\.trajectory"):
        model(tokens)
    assert report.memory.expected > 0  # known before the first run
    with modiff.trajectory(model), torch.no_grad():
        model(tokens)
        assert 0 < state_bytes(model)
    modiff.remove(model)
    assert attachment_of(model) is None


@pytest.mark.parametrize("name", ["characters", "bert"])
def test_it_runs_in_llada2_where_each_call_is_a_trajectory_whose_blocks_have_states_of_their_own(name):
    model = MODELS[name]()
    plain = llada(model)
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler())
    modiff.apply(pipe, "w8a8")
    contexts = set()
    layer = next(iter(attachment_of(model).layers.values()))
    model.register_forward_hook(lambda *_: contexts.update(layer.loop.memories))
    quantized = llada(model, pipe=pipe)
    assert quantized.shape == plain.shape
    assert (quantized == plain).float().mean() > 0.7
    assert len(contexts) == 2
    assert state_bytes(model) == 0
    assert torch.equal(llada(model, pipe=pipe), quantized)
    modiff.remove(pipe)
    assert torch.equal(llada(model), plain)


@pytest.mark.parametrize("bits", ["w8a8", "w8a4"])
def test_tokens_that_did_not_change_send_exactly_zero_into_the_layers_that_read_one_token(bits):
    model, codes = characters(), []
    modiff.apply(model, bits)
    inputs = attachment_of(model).layers["blocks.0.attention.to_q"].inputs
    tokens = torch.full((2, 12), MASK)
    with modiff.trajectory(model), torch.no_grad():
        anchored = model(tokens).logits
        before = inputs.states[0].state.value
        assert_same_bits(model(tokens).logits, anchored)  # nothing changed: the whole network is silent
        changed = torch.zeros_like(tokens, dtype=torch.bool)
        changed[0, 3], changed[1, 7:9] = True, True
        model(tokens.masked_fill(changed, 5))
        after = inputs.states[0].state.value
        codes = (after - before).abs().amax(-1)
    assert codes[~changed].eq(0).all()
    assert codes[changed].gt(0).all()


def test_settings_that_share_one_scale_are_worse_than_scales_per_token():
    model, tokens = characters(), torch.full((1, 48), MASK)
    filled = tokens.clone()
    filled[0, ::5] = torch.randint(27, (10,))
    with torch.no_grad():
        expected, errors = model(filled).logits, {}
        for granularity in ("token", "tensor"):
            quantizer = modiff.QuantizerConfig(bits=4, granularity=granularity)
            modiff.apply(model, modiff.ModiffConfig(layer=modiff.LayerConfig(activation=quantizer)))
            with modiff.trajectory(model):
                model(tokens)
                errors[granularity] = relative_error(model(filled).logits, expected)
            modiff.remove(model)
    assert errors["token"] < 0.8 * errors["tensor"]


@pytest.mark.parametrize(("kind", "reads"), [("Cosmos3OmniTransformer", False), ("UVit2DModel", True)])
def test_a_network_that_reads_words_and_time_steps_is_none_of_text(kind, reads):
    network = getattr(diffusers, kind).__new__(getattr(diffusers, kind))
    nn.Module.__init__(network)
    assert (text_network(network) is not None) == reads


def test_verbs_that_generate_ask_pipelines_that_begin_with_masks_and_refuse_others():
    pipe = MaskedTextPipeline(characters(), MaskedScheduler(MASK))
    pipe.set_progress_bar_config(disable=True)
    host = host_of(pipe)
    assert host.evaluations(pipe, 7) == 7
    assert host.run(pipe, steps=3, batch=2, seed=0)(1).sequences.shape == (2, 128)
    other = LLaDA2Pipeline(characters(), BlockRefinementScheduler())
    with pytest.raises(ConfigError, match="LLaDA2Pipeline: expected run="):
        host_of(other).run(other, steps=3, batch=2, seed=0)
