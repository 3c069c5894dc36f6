"""Token lists -> padded batches -> log-probs: what is trained is decided here, by lengths."""

import math
import random

import pytest
import torch
from transformers import Qwen3Config

from machinery import batching
from machinery.batching import micro_batches, pad_batch, pad_rows, token_logprobs
from model import Model, init_weights


@pytest.mark.parametrize("budget", (1, 10, 64, 10_000))
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_hold_every_row_once_within_the_budget(budget, seed):
    """rows * longest row <= budget, padding included; only a row that is itself longer than the budget stands alone
    above it."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(50)]
    groups = micro_batches(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(50))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget for group in groups)


def test_micro_batches_put_like_lengths_together():
    """Lengths rise through the groups, so little is padding; by hand, with a budget of 12: 3 * 3, 2 * 6, then 13 on its
    own."""
    assert micro_batches([6, 3, 13, 2, 5, 3], 12) == [[3, 1, 5], [4, 0], [2]]
    assert micro_batches([4, 4, 4], 12) == [[0, 1, 2]]  # the budget itself still fits
    assert micro_batches([4, 4, 4], 11) == [[0, 1], [2]]
    assert micro_batches([], 12) == []


def test_pad_rows_fills_up_on_the_right():
    assert pad_rows([[1.0], [2.0, 3.0]], 0.5, dtype=torch.float32).tolist() == [[1.0, 0.5], [2.0, 3.0]]


@pytest.mark.parametrize("pad_id", (0, 2), ids=("pad is a token of its own", "pad is EOS"))
def test_the_mask_comes_from_lengths(pad_id):
    """mask[b, t] = 1 iff input_ids[b, t+1] is of the completion. EOS (2) is trained, prompts and padding never are.

    row 0: prompt 2 5 6, completion 7 2; row 1: prompt 5, completion 8 2 9 2; row 2: prompt 5 6, completion 9,
    truncated. """
    input_ids, mask = pad_batch([[2, 5, 6], [5], [5, 6]], [[7, 2], [8, 2, 9, 2], [9]], pad_id=pad_id)
    p = pad_id
    assert input_ids.tolist() == [[2, 5, 6, 7, 2], [5, 8, 2, 9, 2], [5, 6, 9, p, p]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]


def test_every_prompt_needs_its_completion():
    with pytest.raises(ValueError):
        pad_batch([[1], [2]], [[3]])


class Fixed:
    """A model that gives these logits (T, V) at every row; its head hands them on."""

    def __init__(self, logits):
        self.logits = logits if torch.is_tensor(logits) else torch.tensor(logits, dtype=torch.float64)

    def __call__(self, input_ids, head):
        lm_head = torch.nn.Identity()
        lm_head.out_features = self.logits.shape[-1]
        return head(lm_head, self.logits[:input_ids.shape[1]].expand(len(input_ids), -1, -1))


def ones(input_ids):
    return torch.ones(len(input_ids), input_ids.shape[1] - 1)


@pytest.mark.parametrize("temperature", (1.0, 0.5, 2.0))
def test_logprobs_are_of_the_next_token_at_the_sampling_temperature(temperature):
    """log softmax(logits / T) of input_ids[:, 1:]. Probabilities (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4), raised to 1/T and
    normalised."""
    p = [[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]
    model, ids = Fixed([[math.log(x) + 7 for x in row] for row in p]), torch.tensor([[0, 1, 2], [2, 0, 0]])  # +7: nothing
    logprobs, entropy = token_logprobs(model, ids, ones(ids), temperature, with_entropy=True)
    q = [[x ** (1 / temperature) / sum(y ** (1 / temperature) for y in row) for x in row] for row in p]
    expected = [[math.log(q[0][1]), math.log(q[1][2])], [math.log(q[0][0]), math.log(q[1][0])]]
    torch.testing.assert_close(logprobs.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    assert entropy[0].tolist() == pytest.approx([-sum(x * math.log(x) for x in row) for row in q], abs=1e-5)


def test_the_entropy_of_a_uniform_policy_is_the_logarithm_of_the_vocabulary():
    """Nats per token, over the full vocabulary: ln V. A policy that is sure has 0."""
    model, ids = Fixed([[0.0] * 50, [0.0] + [-200.0] * 49]), torch.tensor([[1, 2, 3]])
    _, entropy = token_logprobs(model, ids, ones(ids), with_entropy=True)
    assert entropy[0].tolist() == pytest.approx([math.log(50), 0.0], abs=1e-5)


def test_logprobs_carry_the_gradient_and_the_entropy_does_not():
    logits, ids = torch.zeros(2, 4, requires_grad=True), torch.tensor([[0, 1, 2]])
    logprobs, entropy = token_logprobs(Fixed(logits), ids, ones(ids), 0.5, with_entropy=True)
    assert not entropy.requires_grad
    logprobs.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.5, 1.5, -0.5, -0.5])  # (one-hot - softmax) / T


def test_only_what_the_mask_names_is_scored():
    """Elsewhere stands 0, with no gradient: a prompt's or padding's logits are never computed."""
    logits, ids = torch.zeros(3, 4, requires_grad=True), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    mask = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    logprobs, entropy = token_logprobs(Fixed(logits), ids, mask, with_entropy=True)
    for values in (-logprobs, entropy):
        assert values.tolist() == [[0, pytest.approx(math.log(4)), 0], [0, *[pytest.approx(math.log(4))] * 2]]
    logprobs.sum().backward()
    assert logits.grad[0].tolist() == [0, 0, 0, 0] and logits.grad[1].abs().min() > 0


def test_chunks_change_neither_logprobs_nor_gradients(monkeypatch):
    """The logits of 40 tokens at once, or of 3 at a time, computed again in the backward pass: the same numbers."""
    model = Model(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                              num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                              max_position_embeddings=64))
    init_weights(model, seed=0)
    ids = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12)[None] > torch.tensor([[1], [2], [3], [0]])).float()
    results, largest = [], []
    project = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: largest.append(len(hidden)) or project(hidden))
    for at_once in (64 * 1000, 64 * 3):
        monkeypatch.setattr(batching, "LOGITS_AT_ONCE", at_once)
        logprobs, entropy = token_logprobs(model, ids, mask, 0.7, with_entropy=True)
        (logprobs * torch.linspace(-1, 1, 12)).sum().backward()
        results.append([logprobs.detach(), entropy, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)
    assert largest[0] == mask.sum() and max(largest[1:]) == 3 and len(largest) > 2 * mask.sum() / 3  # twice each
