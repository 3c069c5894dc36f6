"""GRPO by hand: every number here can be worked out on paper. rewards (P, G), log-probs and masks (B, T)."""

import math

import pytest
import torch

from experiments.line_rewards import step_advantages
from grpo import group_advantages, grpo_loss, k3_kl, token_weights


def tensor(*rows, grad=False):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


def logs(*rows, grad=False):
    """Probabilities -> log-probs."""
    return tensor(*rows).log().requires_grad_(grad)


# ----------------------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("rewards, expected", (
    ([1, 0, 0, 1], [1, -1, -1, 1]),                          # mean 1/2, deviation 1/2
    ([1, 0, 0, 0], [3 ** 0.5, *[-(3 ** -0.5)] * 3]),         # mean 1/4, deviation sqrt(3)/4
    ([3, 1], [1, -1]),
    ([10.1, 10.0, 10.0, 10.1], [1, -1, -1, 1]),              # neither the scale nor the level of rewards matters
))
def test_advantages_are_standard_scores_within_the_group(rewards, expected):
    """A = (r - mean) / std, with the population's deviation (DeepSeek-R1, equation 3); std + 1e-6 costs the fifth
    digit."""
    assert group_advantages(tensor(rewards))[0].tolist() == pytest.approx(expected, abs=1e-4)



def test_a_token_s_process_advantage_is_the_sum_of_what_it_led_to():
    """DeepSeekMath, section 4.1.3, rewards 1, 0 and 1, 0: mean 1/2, deviation 1/2, so steps are worth 1, -1 and 1, -1.
    The first completion ends its steps at tokens 1 and 3 of 5, the second at 0 and 1 of 2."""
    rows = step_advantages([[1.0, 0.0], [1.0, 0.0]], [[1, 3], [0, 1]], [5, 2])
    assert rows[0] == pytest.approx([0, 0, -1, -1, 0], abs=1e-4) and rows[1] == pytest.approx([0, -1], abs=1e-4)


def test_process_rewards_are_normalised_over_the_group_and_not_over_a_completion():
    """One good step against three bad ones: mean 1/4, deviation sqrt(3)/4, as for outcome rewards 1, 0, 0, 0."""
    rows = step_advantages([[1.0], [0.0, 0.0], [0.0]], [[0], [0, 1], [0]], [1, 2, 1])
    assert rows[0] == pytest.approx([3 ** 0.5], abs=1e-4)
    assert rows[1] == pytest.approx([-2 * 3 ** -0.5, -(3 ** -0.5)], abs=1e-4)


@pytest.mark.parametrize("rewards", ([[], []], [[0.3], []], [[0.3, 0.3], [0.3]]))
def test_steps_that_are_all_alike_have_no_process_advantage(rewards):
    ends = [list(range(len(row))) for row in rewards]
    assert step_advantages(rewards, ends, [2, 3]) == [[0.0] * 2, [0.0] * 3]


def test_an_advantage_per_token_weighs_each_token_by_its_own():
    """On policy, where every ratio is 1, the gradient of -log p is the token's own advantage over divisor."""
    logprobs = logs([0.5, 0.25, 0.5], grad=True)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), tensor([2, -1, 5]), tensor([1, 1, 0]), divisor=4)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 1) / 4)
    assert logprobs.grad[0].tolist() == pytest.approx([-2 / 4, 1 / 4, 0])


def test_the_same_advantage_at_every_token_is_one_for_the_completion():
    logprobs, old = logs([0.5, 0.25], [0.2, 0.9], grad=True), logs([0.4, 0.5], [0.3, 0.9])
    one, _ = grpo_loss(logprobs, old, torch.tensor([1.5, -0.5], dtype=torch.float64), tensor([1, 1], [1, 0]), divisor=3)
    each, _ = grpo_loss(logprobs, old, tensor([1.5, 1.5], [-0.5, -0.5]), tensor([1, 1], [1, 0]), divisor=3)
    assert one.item() == each.item()


def test_groups_do_not_see_each_other():
    together = group_advantages(tensor([1, 0, 0, 1], [5, 5, 5, 9], [0, 0, 0, 0]))
    alone = [group_advantages(tensor(row))[0].tolist() for row in ([1, 0, 0, 1], [5, 5, 5, 9], [0, 0, 0, 0])]
    assert together.tolist() == alone


@pytest.mark.parametrize("value", (0.0, 1.0, 0.1 + 0.2, 1.1, 1e6 + 0.1, -0.7))
@pytest.mark.parametrize("normalize_std", (True, False))
@pytest.mark.parametrize("size", (3, 7, 16))
def test_equal_rewards_give_exactly_zero_advantage(value, normalize_std, size):
    """The mean of equal floats can be off by one rounding; divided by a deviation of about 0 that would be noise of
    full size."""
    assert group_advantages(torch.full((2, size), value), normalize_std=normalize_std).tolist() == [[0.0] * size] * 2


def test_without_the_deviation_rewards_are_only_centred():
    """Dr. GRPO, arXiv 2503.20783: A = r - mean."""
    assert group_advantages(tensor([1, 0, 0, 0]), normalize_std=False).tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_advantages_leave_the_rewards_alone_and_want_a_row_per_prompt():
    rewards = tensor([1, 0])
    group_advantages(rewards)
    assert rewards.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"got rewards of shape \(4,\), expected \(P, G\)"):
        group_advantages(torch.ones(4))


# ----------------------------------------------------------------------------------------------------- the clipped loss
def test_loss_of_two_completions_by_hand():
    """-(1/N) sum min(ratio A, clip(ratio) A), N = 5 tokens.

    A = +2, old 0.5: new 0.55, 0.5, 0.4 -> ratios 1.1, 1.0, 0.8         2 * (1.1 + 1.0 + 0.8) = 5.8
    A = -1, old 0.2: new 0.3, 0.2       -> ratios 1.5, 1.0; the third token is padding   -1 * (1.5 + 1.0) = -2.5"""
    new, old = logs([0.55, 0.5, 0.4], [0.3, 0.2, 0.9]), logs([0.5] * 3, [0.2] * 3)
    loss, stats = grpo_loss(new, old, torch.tensor([2.0, -1.0]), tensor([1, 1, 1], [1, 1, 0]), divisor=5)
    assert loss.item() == pytest.approx(-(5.8 - 2.5) / 5)
    assert stats["ratio"] == pytest.approx(1.1 + 1.0 + 0.8 + 1.5 + 1.0)
    assert stats["k1_kl_old"] == pytest.approx(-math.log(1.1 * 0.8 * 1.5))  # old - new
    assert stats["clip_frac"] == 0  # 0.8 is the edge, and 1.5 with A < 0 is not held back


@pytest.mark.parametrize("advantage, ratio, objective, gradient", (
    (+1.0, 1.5, 1.2, 0.0),    # better, and already likelier than the clip allows: nothing more to gain
    (+1.0, 0.5, 0.5, 0.5),    # better, but the policy moved away from it: full gradient back
    (-1.0, 1.5, -1.5, -1.5),  # worse, and the policy moved towards it: full gradient away
    (-1.0, 0.5, -0.8, 0.0),   # worse, and already rarer than the clip allows: nothing more to gain
    (+1.0, 1.1, 1.1, 1.1),    # inside the clip: min has no choice
    (-1.0, 0.9, -0.9, -0.9),
))
def test_the_clip_is_pessimistic_for_both_signs(advantage, ratio, objective, gradient):
    """PPO, equation 7. d(ratio A)/d logprob = ratio A where the unclipped branch is the smaller one, else 0."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo_loss(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), divisor=1)
    loss.backward()
    assert -loss.item() == pytest.approx(objective)
    assert -logprobs.grad.item() == pytest.approx(gradient)
    assert stats["clip_frac"] == (gradient == 0)


@pytest.mark.parametrize("clip_low, clip_high, ratio, advantage, objective", (
    (0.2, 0.28, 1.25, 1.0, 1.25), (0.2, 0.28, 1.4, 1.0, 1.28), (0.2, 0.28, 0.7, -1.0, -0.8),
    (0.4, 0.1, 0.7, -1.0, -0.7), (0.4, 0.1, 0.5, -1.0, -0.6), (0.4, 0.1, 1.25, 1.0, 1.1),
))
def test_clip_low_and_clip_high_are_separate(clip_low, clip_high, ratio, advantage, objective):
    """The ratio stays within [1 - clip_low, 1 + clip_high]; DAPO's clip-higher raises the upper end alone (arXiv
    2503.14476)."""
    loss, _ = grpo_loss(logs([ratio]), logs([1.0]), tensor(advantage), tensor([1]), divisor=1, clip_low=clip_low,
                        clip_high=clip_high)
    assert -loss.item() == pytest.approx(objective)


def test_the_first_on_policy_step_is_reinforce():
    """At ratio 1 the gradient of the loss is -A / N on every token, as in REINFORCE, wherever the clip lies."""
    logprobs = logs([0.5, 0.1, 0.3], [0.2, 0.9, 0.4], grad=True)
    loss, stats = grpo_loss(logprobs, logprobs.detach(), torch.tensor([1.5, -0.5]), tensor([1, 1, 0], [0, 1, 1]),
                            divisor=8, clip_low=1e-6, clip_high=1e-6)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([-1.5, -1.5, 0], [0, 0.5, 0.5]) / 8)
    assert stats["ratio"] == 4 and stats["clip_frac"] == 0 and stats["k1_kl_old"] == 0


# ------------------------------------------------------------------------------------------------------------------- KL
def test_k3_has_the_reference_over_the_policy():
    """k3 = q/p - log(q/p) - 1, q the reference's and p the policy's probability of the token that the policy sampled.

    p = 0.5, q = 0.25: 0.5 + log 2 - 1 = 0.193; p = 0.25, q = 0.5: 2 - log 2 - 1 = 0.307. The wrong way round swaps
    them. """
    k3 = k3_kl(logs([0.5, 0.25, 0.4]), logs([0.25, 0.5, 0.4]))
    assert k3[0].tolist() == pytest.approx([0.5 + math.log(2) - 1, 2 - math.log(2) - 1, 0], abs=1e-12)


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """The policy's own mean of k3 over all tokens is KL(p || q) = sum p log(p/q), exactly, as sum p * (q/p - 1) = 0."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    assert (p * k3_kl(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_k3_is_never_negative_and_flat_where_both_agree():
    logprobs = torch.linspace(-8, 0, 81, dtype=torch.float64)[None].requires_grad_()
    assert (k3_kl(logprobs, torch.full((1, 81), -3.0)) >= 0).all()
    k3 = k3_kl(logprobs, logprobs.detach())
    k3.sum().backward()
    assert k3.tolist() == logprobs.grad.tolist() == [[0.0] * 81]


def test_the_kl_penalty_pulls_the_policy_towards_the_reference():
    """d k3 / d logprob = 1 - q/p: positive where the policy is above the reference, so that descent lowers it, and the
    other way round. With p = 0.5, q = 0.25 it is 1/2; with p = 0.2, q = 0.4 it is -1. The loss adds kl_coef / N times
    that."""
    logprobs = logs([0.5, 0.2], grad=True)
    loss, stats = grpo_loss(logprobs, logprobs.detach(), torch.zeros(1), tensor([1, 1]), divisor=4,
                            ref_logprobs=logs([0.25, 0.4]), kl_coef=0.1)
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0.1 * 0.5 / 4, 0.1 * -1.0 / 4])
    assert stats["k3_kl_ref"] == pytest.approx(0.5 + math.log(2) - 1 + 2 - math.log(2) - 1)
    assert loss.item() == pytest.approx(0.1 * stats["k3_kl_ref"] / 4)


# ---------------------------------------------------------------------------------------------------- weights of tokens


MASK = tensor([0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0])  # completions of 4, 1 and 2 tokens


@pytest.mark.parametrize("average, expected", (
    ("token", [[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]),
    ("sequence", [[0, 1 / 4, 1 / 4, 1 / 4, 1 / 4], [0, 0, 1, 0, 0], [0, 1 / 2, 1 / 2, 0, 0]]),
    ("constant", [[0, 0.1, 0.1, 0.1, 0.1], [0, 0, 0.1, 0, 0], [0, 0.1, 0.1, 0, 0]]),
))
def test_token_weights_by_hand(average, expected):
    torch.testing.assert_close(token_weights(MASK, average, max_new_tokens=10), tensor(*expected))


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="got average 'mean', expected token, sequence or constant"):
        token_weights(MASK, "mean")


@pytest.mark.parametrize("average, divisor", (("token", 7), ("sequence", 3), ("constant", 3)))
def test_averages_equal_their_papers_double_loops(average, divisor):
    """token (DAPO): 1/7 sum over all tokens. sequence (DeepSeekMath, equation 3): 1/3 sum_i 1/|o_i| sum_t.
    constant (Dr. GRPO): 1/3 sum_i 1/limit sum_t, here with limit 10."""
    new, old, advantages = random_step(rows=3, width=5)
    loss, _ = grpo_loss(new, old, advantages, token_weights(MASK, average, max_new_tokens=10), divisor=divisor)
    expected = 0.0
    for i, length in enumerate((4, 1, 2)):
        total = 0.0
        for t in range(5):
            if MASK[i, t]:
                ratio, a = math.exp(new[i, t] - old[i, t]), advantages[i].item()
                total += min(ratio * a, max(0.8, min(1.2, ratio)) * a)
        expected += total / {"token": 7, "sequence": 3 * length, "constant": 3 * 10}[average]
    assert loss.item() == pytest.approx(-expected)


# ----------------------------------------------------------------------------------------------- micro-batches, padding
def random_step(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("average", ("token", "sequence", "constant"))
@pytest.mark.parametrize("groups", ([[0], [1], [2], [3]], [[3, 0], [1, 2]], [[2], [0, 1, 3]]))
def test_no_split_into_micro_batches_changes_loss_gradient_or_statistics(groups, average):
    """divisor belongs to the step, so that losses, gradients and the logged sums add up, whatever stands
    together."""
    new, old, advantages = random_step(rows=4, width=6)
    lengths = torch.tensor([6, 1, 3, 2])
    weights = token_weights((torch.arange(6) < lengths[:, None]).double(), average, max_new_tokens=6)
    divisor = 12 if average == "token" else 4

    def step(groups):
        logprobs, total, sums = new.clone().requires_grad_(), 0.0, {}
        for rows in groups:
            loss, stats = grpo_loss(logprobs[rows], old[rows], advantages[rows], weights[rows], divisor=divisor,
                                    ref_logprobs=old[rows] - 0.1, kl_coef=0.05)
            loss.backward()
            total += loss.item()
            sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
        return logprobs.grad, total, sums
    gradient, total, sums = step(groups)
    whole_gradient, whole, whole_sums = step([[0, 1, 2, 3]])
    torch.testing.assert_close(gradient, whole_gradient)
    assert total == pytest.approx(whole) and sums == pytest.approx(whole_sums)
    assert {"clip_frac", "ratio", "k1_kl_old", "k3_kl_ref"} == sums.keys() and 0 < sums["clip_frac"]


@pytest.mark.parametrize("rubbish", (math.nan, math.inf, -math.inf, 1e30))
def test_padding_changes_neither_loss_nor_gradient(rubbish):
    """What stands on prompts and padding may be anything. NaN * 0 is NaN, so a product with the mask would not be
    enough."""
    new, old, advantages = random_step(rows=3, width=5)
    ref = old - 0.1

    def run(value):
        hidden = torch.full_like(new, value).masked_fill(MASK > 0, 0.0)
        logprobs = (new * MASK + hidden).requires_grad_()
        loss, stats = grpo_loss(logprobs, old * MASK + hidden, advantages, MASK, divisor=7,
                                ref_logprobs=ref * MASK + hidden, kl_coef=0.1)
        loss.backward()
        per_token = advantages[:, None] * MASK + hidden
        assert grpo_loss(logprobs, old * MASK + hidden, per_token, MASK, divisor=7, ref_logprobs=ref * MASK + hidden,
                         kl_coef=0.1)[0].item() == loss.item()
        return loss.item(), logprobs.grad.tolist(), stats
    loss, gradient, stats = run(rubbish)
    assert (loss, gradient, stats) == run(0.0)
    assert all(g == 0 for row, used in zip(gradient, MASK.tolist()) for g, u in zip(row, used) if not u)


def test_old_and_ref_logprobs_get_no_gradient_and_stay_unchanged():
    new, old, advantages = random_step(rows=3, width=5)
    before = [t.clone() for t in (new, old, advantages, MASK)]
    new.requires_grad_()
    loss, stats = grpo_loss(new, old, advantages, MASK, divisor=7, ref_logprobs=old, kl_coef=0.1)
    loss.backward()
    assert old.grad is None and all(torch.equal(a, b) for a, b in zip(before, (new, old, advantages, MASK)))
    assert all(isinstance(value, float) for value in stats.values())
