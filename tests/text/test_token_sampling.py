import pytest
import torch

from emf_lightning.text.token_sampling import TokenSampler


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "settings", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}, {"temperature": 0.5, "top_p": 0.9}], ids=str
)
def test_tokens_come_as_often_as_the_warped_probabilities_say(settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampler = TokenSampler(**{"top_k": 50, "top_p": 1.0, **settings})
    scores = logits()
    for warper in (
        TemperatureLogitsWarper(sampler.temperature),
        TopKLogitsWarper(sampler.top_k),
        TopPLogitsWarper(sampler.top_p),
    ):
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0]
    count = 20_000  # evenly spaced numbers: frequencies are exact up to one sample
    tokens = sampler.sample(logits().expand(count, -1), (torch.arange(count) + 0.5) / count)
    share = torch.bincount(tokens, minlength=50) / count
    torch.testing.assert_close(share, expected, atol=2 / count, rtol=0)


def test_a_token_depends_on_its_own_uniform_number_alone():
    sampler, uniforms = TokenSampler(), torch.rand(6, generator=torch.Generator().manual_seed(1))
    together = sampler.sample(logits(6), uniforms)
    for row in range(6):
        assert together[row] == sampler.sample(logits(6)[row : row + 1], uniforms[row : row + 1])[0]


def test_the_largest_uniform_number_gives_one_of_the_top_k():
    nearly = torch.tensor([1 - 2**-24])
    tokens = TokenSampler(top_k=3).sample(logits(), nearly)
    assert tokens[0] in logits()[0].topk(3).indices


def test_chances_are_a_function_of_seed_and_caption():
    first = TokenSampler().uniforms(["a", "b"], 5)
    assert torch.equal(first, TokenSampler().uniforms(["b", "a"], 5).flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, TokenSampler(seed=1).uniforms(["a", "b"], 5))


@pytest.mark.parametrize("bad", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}], ids=str)
def test_senseless_settings_are_refused(bad):
    with pytest.raises(ValueError, match="TokenSampler: needs top_k >= 1"):
        TokenSampler(**bad)
