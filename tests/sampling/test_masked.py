"""Masked diffusion: its law by enumeration, evaluations that are reused, prompts, rows of their own, files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import modiff
from modiff import ConfigError
from modiff.assets.characters import CharacterTransformer
from modiff.sampling.masked import MaskedScheduler, MaskedTextPipeline
from tests.helpers import assert_same_bits
from tests.reference.masked import MASK, random_toy, variation
from tests.sampling.toys import Exact, shares

TOY = random_toy()


def pipeline(model: nn.Module, **settings: float) -> MaskedTextPipeline:
    mask = getattr(model, "mask_token_id", MASK)
    pipe = MaskedTextPipeline(model, MaskedScheduler(mask_token_id=mask, **settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> torch.Generator | list[torch.Generator]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def characters() -> CharacterTransformer:
    torch.manual_seed(0)
    model = CharacterTransformer(width=32, layers=2, heads=2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("remask", [0.0, 0.5])
def test_texts_have_the_law_of_the_product_of_all_transitions(remask):
    texts = pipeline(Exact(TOY), remask=remask)(100_000, 3, num_inference_steps=4, generator=seeded(0)).sequences
    law = TOY.law(4, remask)
    assert variation(shares(texts), law) < 0.01
    assert variation(law, TOY.joint) == pytest.approx({0.0: 0.152, 0.5: 0.177}[remask], abs=6e-4)


def test_chances_are_those_of_mdlm_and_remasking_is_bounded_by_its_share_its_cap_and_the_end():
    plain, cap = MaskedScheduler(5), MaskedScheduler(5, remask=1.0, most_remasked=0.008)
    for scheduler in (plain, cap):
        scheduler.set_timesteps(2)
    now, then = 0.001, 0.5005
    assert plain.chances(0) == (pytest.approx((then - now) / (1 - now)), 0.0)
    assert plain.chances(1) == (pytest.approx(1.0), 0.0)
    assert cap.chances(0)[1] == 0.008
    assert cap.chances(1) == (pytest.approx(1.0), 0.0)  # nothing is masked at the end
    half = MaskedScheduler(5, remask=0.5)
    half.set_timesteps(4)
    assert half.chances(2)[1] == pytest.approx(0.5 * (1 - 0.75025) / 0.5005)


def test_tokens_are_drawn_from_the_fewest_that_have_the_share_top_p_and_never_the_mask():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05, 9.0]]).log()
    p = MaskedScheduler(4, top_p=0.7).probabilities(logits)
    torch.testing.assert_close(p, torch.tensor([[0.625, 0.375, 0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(MaskedScheduler(4).probabilities(logits)[0, :4], logits[0, :4].exp().double())


def test_a_step_without_a_change_evaluates_nothing_and_the_texts_are_those_of_evaluating_always():
    model = Exact(TOY)
    output = pipeline(model)(2, 3, num_inference_steps=50, generator=seeded(1))
    states = torch.stack(model.evaluated)
    assert output.evaluations == len(states) < 8
    assert (states[1:] != states[:-1]).flatten(1).any(1).all()
    scheduler, tokens, generator = MaskedScheduler(MASK), torch.full((2, 3), MASK), seeded(1)
    scheduler.set_timesteps(50)
    for step in scheduler.timesteps:
        tokens = scheduler.step(model(tokens).logits, step, tokens, generator).prev_sample
    assert torch.equal(tokens, output.sequences)


def test_a_prompt_stays_and_a_row_with_its_own_generator_is_the_same_in_any_batch():
    prompt = torch.tensor([[0, MASK, 2]]).expand(2000, 3)
    pipe = pipeline(Exact(TOY), remask=1.0)
    texts = pipe(input_ids=prompt, num_inference_steps=8, generator=seeded(0)).sequences
    assert texts[:, 0].eq(0).all()
    assert texts[:, 2].eq(2).all()
    assert 0 < np.count_nonzero(shares(texts)) <= 3
    both = pipe(2, 3, generator=seeded(5, 6)).sequences
    assert torch.equal(both[1:], pipe(1, 3, generator=[seeded(6)]).sequences)


def test_a_callback_sees_each_step_and_what_it_returns_is_gone_on_from():
    seen = []

    def masked_again(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["tokens"]))
        return {"tokens": torch.full_like(tensors["tokens"], MASK)} if step == 5 else {}

    output = pipeline(Exact(TOY))(2, 3, num_inference_steps=6, callback_on_step_end=masked_again)
    assert [step[:2] for step in seen] == [(i, i) for i in range(6)]
    assert seen[-1][2].ne(MASK).all()
    assert output.sequences.eq(MASK).all()


@pytest.mark.parametrize("bits", ["w8a8", "w8a4"])
def test_a_quantized_pipeline_is_saved_and_loaded_with_its_texts_and_frees_its_states(bits, tmp_path):
    pipe = pipeline(characters())
    expected = pipe(2, 16, generator=seeded(0))
    assert expected.texts == [pipe.model.decode(row) for row in expected.sequences]
    pipe.save_pretrained(tmp_path / "plain")
    again = MaskedTextPipeline.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(2, 16, generator=seeded(0)).sequences, expected.sequences)
    modiff.apply(pipe, bits)
    modiff.save(pipe, tmp_path / "packed", anchor_weights="quantized")
    loaded = modiff.load(tmp_path / "packed")
    modiff.pack(pipe)
    with torch.no_grad(), modiff.trajectory(pipe), modiff.trajectory(loaded):
        for tokens in (expected.sequences.fill_(pipe.model.mask_token_id), again(2, 16, generator=seeded(3)).sequences):
            assert_same_bits(loaded.model(tokens).logits, pipe.model(tokens).logits)
    assert torch.equal(loaded(2, 16, generator=seeded(0)).sequences, pipe(2, 16, generator=seeded(0)).sequences)


BAD = {
    "mask_token_id: expected 0 or more, got -1": lambda: MaskedScheduler(-1),
    "remask: expected 0 to 1, got 2": lambda: MaskedScheduler(1, remask=2),
    "top_p: expected more than 0": lambda: MaskedScheduler(1, top_p=0.0),
    "num_inference_steps: expected 1 or more, got 0": lambda: MaskedScheduler(1).set_timesteps(0),
    "num_inference_steps: expected a whole number, got 2.5": lambda: MaskedScheduler(1).set_timesteps(2.5),
    "expected a MaskedScheduler, got DDIMScheduler": lambda: MaskedTextPipeline(Exact(TOY), DDIMScheduler()),
    r"input_ids: expected \(rows, length\) int64": lambda: pipeline(Exact(TOY))(input_ids=torch.zeros(2, 3)),
    r"input_ids: expected \(rows, length\) int64 tokens, got list": lambda: pipeline(Exact(TOY))(input_ids=[[3]]),
    "length: expected 1 or more": lambda: pipeline(Exact(TOY))(2, 0),
    "length: expected a whole number, got 1.5": lambda: pipeline(Exact(TOY))(2, 1.5),
    "mask_token_id: expected 27, the model's, got 28": lambda: MaskedTextPipeline(characters(), MaskedScheduler(28)),
    "mask_token_id: expected a token of the model, 0 to 27, got 28": lambda: MaskedTextPipeline(
        SimpleNamespace(config=SimpleNamespace(vocab_size=28)), MaskedScheduler(28)
    ),
    "logits: expected scores, got NaN": lambda: pipeline(
        Returns(SimpleNamespace(logits=torch.full((1, 128, 4), torch.nan)))
    )(),
    r"model: expected .logits of shape \(1, 128, 'more than 3'\), got Tensor": lambda: pipeline(nn.Identity())(),
    "generator: expected one, or one for each of 3 rows, got 2": lambda: pipeline(characters())(
        3, 4, 2, generator=seeded(1, 2)
    ),
    "got SimpleNamespace": lambda: pipeline(Returns(SimpleNamespace(logits=None)))(),
    r"got \(1, 128, 3\)": lambda: pipeline(Returns(SimpleNamespace(logits=torch.zeros(1, 128, 3))))(),
}


class Returns(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: torch.Tensor) -> object:
        return self.output


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_sampled_is_refused_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as error:
        BAD[message]()
    assert "\n" not in str(error.value)
