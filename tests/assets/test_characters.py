"""The character model: letters, what it must not see, and that its two forms of attention are one."""

import pytest
import torch

from modiff import ConfigError
from tests.sampling.test_masked import characters


def test_letters_are_tokens_and_back_and_others_are_refused():
    model = characters()
    tokens = model.encode("in the beginning")
    assert model.decode(torch.cat([tokens, torch.tensor([27])])) == "in the beginning_"
    with pytest.raises(ConfigError, match=r"expected letters of ' abc.*', got ',I'"):
        model.encode("In,")


def test_training_and_evaluation_compute_the_same_and_positions_count_from_zero_unless_given():
    model, tokens = characters(), torch.randint(28, (2, 20))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(model.train()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        model.eval()
        torch.testing.assert_close(model(tokens, position_ids=torch.arange(20)[None]).logits, expected)
        shifted = model(tokens, position_ids=torch.arange(20).expand(2, -1) + 50).logits
        torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)  # rotary positions are relative
        stretched = model(tokens, position_ids=2 * torch.arange(20)[None]).logits
    assert (stretched - expected).abs().max() > 0.01


def test_keys_that_are_masked_away_are_not_read():
    model, tokens = characters(), torch.randint(27, (1, 20))
    other, mask = tokens.clone(), torch.ones_like(tokens)
    other[0, 18:], mask[0, 16:] = 3, 0
    with torch.no_grad():
        near = slice(0, 14)  # the MLPs of two blocks read two neighbours further
        first, second = (model(t, attention_mask=mask).logits[:, near] for t in (tokens, other))
        torch.testing.assert_close(first, second)
        assert (model(tokens).logits - model(other).logits)[:, near].abs().max() > 1e-4
