"""The sampler with its slots, cache and moving rows, against the plainest one there is: one row, no cache, the same
random numbers."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import corpus
import sampling
from machinery.batching import pad_batch, token_logprobs
from machinery.checkpoints import save
from model import KVCache, Model, init_weights
from sampling import Completion, choose_tokens, complete, sample, sample_plainly

V, EOS = 16, {3}
LENGTHS = (2, 7, 3, 3, 9, 2, 5, 2, 8, 4, 2, 6)
PROMPTS = [np.random.default_rng(i).integers(4, V, length).tolist() for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model():
    """Two layers, 16 tokens, weights large enough for an entropy of about half of the uniform one."""
    model = Model(Qwen3Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
                              tie_word_embeddings=False,
                              rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    init_weights(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 8
    return model


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def assert_same(completions, expected):
    assert tokens_of(completions) == tokens_of(expected)
    assert [completion.truncated for completion in completions] == [completion.truncated for completion in expected]
    for completion, other in zip(completions, expected):
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ the same tokens
@pytest.mark.parametrize("static", (False, True), ids=("plain", "static"))
@pytest.mark.parametrize("slots", (1, 3, 12, 256))
@pytest.mark.parametrize("eos_ids", ({3}, {3, 4, 5, 6}, set(range(10))), ids=("long", "short", "most stop at once"))
def test_slots_change_neither_tokens_nor_logprobs(model, slots, eos_ids, static):
    """12 prompts of 2 to 9 tokens: rows wait, share a batch, are moved together, and still write what each would write
    alone."""
    expected = sample_plainly(model, PROMPTS, max_new_tokens=20, eos_ids=eos_ids, seed=7)
    assert_same(sample(model, PROMPTS, max_new_tokens=20, eos_ids=eos_ids, seed=7, slots=slots, static=static),
                expected)


def test_a_late_long_prompt_survives_when_its_row_is_moved(model):
    """Two slots. B stops at once, the long C takes its row, A stops, C moves to row 0: from its first column on, left
    of A's first."""
    prompts = [PROMPTS[0], PROMPTS[5], PROMPTS[4]]  # 2, 2 and 9 tokens
    alone = sample_plainly(model, prompts, max_new_tokens=6, eos_ids=set(), seed=0)
    a, b = alone[0].token_ids, alone[1].token_ids
    eos_ids = {b[0], a[1]}
    expected = sample_plainly(model, prompts, max_new_tokens=6, eos_ids=eos_ids, seed=0)
    lengths = [len(completion.token_ids) for completion in expected]
    assert lengths[:2] == [2, 1] and lengths[2] > 2  # the story above happens
    assert_same(sample(model, prompts, max_new_tokens=6, eos_ids=eos_ids, seed=0, slots=2), expected)


def test_a_prompt_of_one_token_is_enough(model):
    prompts = [[5], [9], [5]]
    settings = dict(max_new_tokens=8, eos_ids=EOS, seed=0)
    assert_same(sample(model, prompts, **settings), sample_plainly(model, prompts, **settings))


def test_a_completion_depends_on_its_index_not_on_the_rest_of_the_list(model):
    """The stream is (seed, index): the first 5 prompts alone give the first 5 completions of all 12; another seed gives
    others."""
    settings = dict(max_new_tokens=12, eos_ids=EOS, slots=3)
    everything = tokens_of(sample(model, PROMPTS, seed=1, **settings))
    assert tokens_of(sample(model, PROMPTS[:5], seed=1, **settings)) == everything[:5]
    assert tokens_of(sample(model, PROMPTS, seed=2, **settings)) != everything
    group = tokens_of(sample(model, [PROMPTS[1]] * 4, seed=1, **settings))
    assert len(set(map(tuple, group))) == 4  # completions of one prompt differ
    assert sample(model, [], seed=1, **settings) == []


@pytest.mark.parametrize("slots", (1, 3))
def test_the_cache_is_shifted_when_its_cursor_reaches_the_end(model, monkeypatch, slots):
    """Many short completions pass the cache's capacity several times; no token changes, and the longest prompt still
    finds its room to the left of the cursor."""
    shifts, shift_left = [], KVCache.shift_left
    monkeypatch.setattr(KVCache, "shift_left", lambda cache, n: shifts.append(n) or shift_left(cache, n))
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[4]] * 28  # 2, 3 and 9 tokens
    settings = dict(max_new_tokens=10, eos_ids={3, 4, 5, 6, 7, 8}, seed=3)
    assert_same(sample(model, prompts, slots=slots, **settings), sample_plainly(model, prompts, **settings))
    assert len(shifts) > 1 and min(shifts) > 0


def test_greedy_equals_transformers_generate(model, tmp_path):
    """Temperature 0: the most likely token each time, as generate(do_sample=False) does; log-probs are those at
    temperature 1."""
    save(model, corpus.build_tokenizer(), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    completions = sample(model, PROMPTS, max_new_tokens=16, temperature=0, eos_ids=EOS, seed=0, slots=4)
    for prompt, completion in zip(PROMPTS, completions):
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=3,
                                   pad_token_id=0)
        assert completion.token_ids == expected[0, len(prompt):].tolist()
    with torch.no_grad():
        first = model(torch.tensor([PROMPTS[0]]))[0, -1].log_softmax(-1)
    assert completions[0].logprobs[0] == pytest.approx(first.max().item(), abs=1e-4)


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (0.6, 1.0), (1.0, 0.5)))
def test_logprobs_are_those_that_the_trainer_computes(model, temperature, top_p):
    """One padded forward pass without a cache over all rows, at the sampling temperature: at most 1e-4 nats away. top_p
    truncates the choice of tokens and not their log-probs."""
    completions = sample(model, PROMPTS, max_new_tokens=20, temperature=temperature, top_p=top_p, eos_ids=EOS, seed=5,
                         slots=5)
    input_ids, mask = pad_batch(PROMPTS, tokens_of(completions))
    with torch.no_grad():
        logprobs, _ = token_logprobs(model, input_ids, mask, temperature)
    for row, completion in enumerate(completions):
        assert logprobs[row][mask[row] > 0].tolist() == pytest.approx(completion.logprobs, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- where it ends
def test_eos_is_part_of_the_completion_and_a_cut_one_is_marked(model):
    """Either EOS stands at the end and nowhere else, or there are max_new_tokens tokens, none of them EOS, and
    truncated says so."""
    completions = sample(model, PROMPTS, max_new_tokens=12, eos_ids={3, 7}, seed=4)
    assert {completion.truncated for completion in completions} == {True, False}
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        ends = [token in (3, 7) for token in completion.token_ids]
        assert ends == ([False] * 12 if completion.truncated else [False] * (len(ends) - 1) + [True])


def test_a_shorter_limit_cuts_the_same_completions(model):
    """EOS as the very last token that fits is an end; one token less, and the completion is truncated."""
    settings = dict(eos_ids=EOS, seed=4)
    completions = sample(model, PROMPTS, max_new_tokens=20, **settings)
    limit = next(len(c.token_ids) for c in completions if not c.truncated and len(c.token_ids) > 2)
    for shorter in (limit, limit - 1):
        cut = sample(model, PROMPTS, max_new_tokens=shorter, **settings)
        assert tokens_of(cut) == [c.token_ids[:shorter] for c in completions]
        assert [c.truncated for c in cut] == [c.truncated or len(c.token_ids) > shorter for c in completions]


def test_an_empty_prompt_and_a_long_one_are_refused_with_the_limit(model):
    with pytest.raises(ValueError, match="got an empty prompt; expected at least one token"):
        sample(model, [[5, 6], []], max_new_tokens=4, eos_ids=EOS, seed=0)
    with pytest.raises(ValueError, match="50 tokens and max_new_tokens 15.*context of 64; lower max_new_tokens to 14"):
        sample(model, [[5] * 50], max_new_tokens=15, eos_ids=EOS, seed=0)
    assert len(sample(model, [[5] * 50], max_new_tokens=14, eos_ids=set(), seed=0)[0].token_ids) == 14  # exactly full


# -------------------------------------------------------------------------------------------------------- what it costs
def test_the_prompt_of_a_group_is_read_once(model, monkeypatch):
    """3 prompts, 8 completions each, 4 slots: three rows of prompt tokens in all, however the group is spread over
    time."""
    read, hidden = [], Model.hidden

    def spy(self, input_ids, **settings):
        read.extend(input_ids.tolist() if input_ids.shape[1] > 1 else [])
        return hidden(self, input_ids, **settings)
    monkeypatch.setattr(Model, "hidden", spy)
    prompts = [prompt for prompt in PROMPTS[1:4] for _ in range(8)]
    sample(model, prompts, max_new_tokens=10, eos_ids={3, 4, 5}, seed=0, slots=4)
    assert [row[:len(prompt)] for row, prompt in zip(read, PROMPTS[1:4], strict=True)] == PROMPTS[1:4]


def test_a_step_costs_the_rows_and_columns_in_use(model, monkeypatch):
    """Slots are full while prompts wait; then stopped rows are dropped, so that no more than a quarter of a step is
    waste."""
    steps, forward = [], Model.forward  # (rows, columns) of every decoding step

    def spy(self, input_ids, *, mask, **settings):
        steps.append((len(input_ids), mask.shape[-1]))
        return forward(self, input_ids, mask=mask, **settings)
    monkeypatch.setattr(Model, "forward", spy)
    completions = sample(model, PROMPTS * 3, max_new_tokens=20, eos_ids={3, 4}, seed=0, slots=8)
    useful = sum(len(completion.token_ids) - 1 for completion in completions)  # nothing follows the last token
    rows = [rows for rows, _ in steps]
    assert rows == sorted(rows, reverse=True) and rows[0] == 8 and rows[-1] < 3
    assert useful > 0.75 * sum(rows)
    assert max(columns for _, columns in steps) <= max(LENGTHS) + 20  # a row's length, not all columns written so far


# ------------------------------------------------------------------------------------------------------------ one token
def choose(probabilities, *uniforms, temperature=1.0, top_p=1.0):
    """-> tokens, log-probs, one for each of the uniform numbers."""
    logits = torch.tensor([probabilities] * len(uniforms)).log()
    return choose_tokens(logits, torch.tensor(uniforms, dtype=torch.float64), temperature=temperature, top_p=top_p)


def counts(probabilities, n, **settings):
    """How often n evenly spaced uniform numbers choose each token; exact where n * p is a whole number."""
    tokens, _ = choose(probabilities, *((i + 0.5) / n for i in range(n)), **settings)
    return torch.bincount(tokens, minlength=len(probabilities)).tolist()


def test_frequencies_equal_the_probabilities():
    assert counts([0.5, 0.25, 0.125, 0.125], 8) == [4, 2, 1, 1]
    assert counts([0.1, 0.0, 0.7, 0.2], 1000) == [100, 0, 700, 200]


def test_temperature_is_a_power_of_the_probabilities():
    """p^(1/T), normalised. T = 1/2 squares: (16, 4, 1, 1) / 22. T = 2 takes roots: (0.8, 0.4, 0.2) / 1.4 of 0.64, 0.16
    and 0.04."""
    assert counts([0.5, 0.25, 0.125, 0.125], 22, temperature=0.5) == [16, 4, 1, 1]
    assert counts([0.64, 0.16, 0.04], 70, temperature=2.0) == [40, 20, 10]
    _, logprobs = choose([0.5, 0.25, 0.125, 0.125], 0.0, temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(16 / 22), abs=1e-6)


@pytest.mark.parametrize("top_p, n, expected", (
    (0.3, 5, [5, 0, 0, 0]),    # 0.4 alone holds 0.3
    (0.45, 7, [4, 0, 3, 0]),   # 0.4 does not hold 0.45, 0.4 + 0.3 does; renormalised to 4/7 and 3/7
    (0.65, 7, [4, 0, 3, 0]),
    (0.75, 9, [4, 0, 3, 2]),
    (0.95, 10, [4, 1, 3, 2]),
    (1.0, 10, [4, 1, 3, 2]),
))
def test_top_p_keeps_the_smallest_set_that_holds_p(top_p, n, expected):
    """Probabilities 0.4, 0.1, 0.3, 0.2 (nucleus sampling, arXiv 1904.09751); the log-prob stays that of the whole
    distribution."""
    assert counts([0.4, 0.1, 0.3, 0.2], n, top_p=top_p) == expected
    _, logprobs = choose([0.4, 0.1, 0.3, 0.2], 0.0, top_p=top_p)
    assert logprobs.item() == pytest.approx(math.log(0.4), abs=1e-6)


def test_the_ends_of_the_unit_interval_choose_possible_tokens():
    """Uniforms lie in [0, 1). A token of probability 0 is never chosen, neither by 0 nor by the largest number below
    1."""
    assert choose([0.0, 1.0, 0.0], 0.0, 1 - 2.0 ** -53)[0].tolist() == [1, 1]


def test_a_rare_token_is_not_lost_to_rounding():
    """Probabilities 1/2, 1e-9, 1/2: the uniform number 0.5 lies in the middle of the rare one's share. A float32 sum
    has no such share."""
    tokens, logprobs = choose([0.5, 1e-9, 0.5], 0.5)
    assert tokens.tolist() == [1] and logprobs.item() == pytest.approx(math.log(1e-9), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------- text
def test_complete_returns_text_as_rewards_read_it(model, monkeypatch):
    """No EOS in the text, <think> put back where the prompt ends in it, and the ids are the sampler's own, never
    tokenised again."""
    tokenizer = corpus.build_tokenizer()
    ids = tokenizer("5-4=1</think>")["input_ids"]
    eos = tokenizer.eos_token_id
    sampled = [Completion([*ids, eos], [0.0] * 6, truncated=False), Completion(ids, [0.0] * 5, truncated=True),
               Completion([*ids, eos], [0.0] * 6, truncated=False)]
    calls = []
    monkeypatch.setattr(sampling, "sample", lambda *args, **settings: calls.append((args[1], settings)) or sampled)
    prompts = ["using 3 4 5 make 27\n", "using 3 4 5 make 27\n<think>", "<think> hello\n"]
    prompt_ids, completions, texts = complete(model, tokenizer, prompts, seed=11)
    assert texts == ["5-4=1</think>", "<think>5-4=1</think>", "5-4=1</think>"]
    assert completions is sampled
    assert prompt_ids == calls[0][0] == [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert calls[0][1]["seed"] == 11 and eos in calls[0][1]["eos_ids"]
