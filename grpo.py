"""GRPO: group advantages, the k3 KL and the clipped loss. Tensor maths only: no model, no text, no files.

DeepSeekMath (arXiv 2402.03300, equations 3 and 4) and DeepSeek-R1 (arXiv 2501.12948, equations 1 to 3):

    A_i = (r_i - mean(r)) / std(r)                                      over the G completions of one prompt
    ratio = exp(logprob - old_logprob)                                  old_policy sampled, policy trains
    J = mean over tokens of [ min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) - beta * k3 ]
    k3 estimates KL(policy || ref), per token

Where we differ, on purpose: the published J takes the mean of each completion first and then the mean of the
completions, so that each token of a long completion counts less than one of a short completion, and a wrong answer
costs no more for being long. We average over all completion tokens of the optimizer step (DAPO, arXiv 2503.14476,
equation 8). The published mean and that of Dr. GRPO (arXiv 2503.20783) are the averages "sequence" and
"constant" of token_weights.

Shapes: P prompts, G completions of each; B sequences, all P * G or those of a micro-batch; T places at which a token is
predicted, one fewer than the sequence has tokens (train_countdown.py's T - 1).
"""

import torch


def group_advantages(rewards, *, normalize_std: bool = True):
    """Raw rewards -> advantages within each group. (P, G) -> (P, G).

    The group's mean is the baseline, where PPO trains a value model. normalize_std divides by the group's standard
    deviation (DeepSeek-R1, equation 3; over G, not G - 1). Dr. GRPO does not divide: division gives more weight to
    prompts that are almost always or almost never solved. A group whose rewards are all equal gets exactly zero: it says
    nothing about which completion was better."""
    if rewards.dim() != 2:
        raise ValueError(f"got rewards of shape {tuple(rewards.shape)}, expected (P, G): one row per prompt")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)
    # equal rewards: their mean may be off by a bit, which the division would make large
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (P, 1)
    return advantages.masked_fill(same, 0.0)


def k3_kl(logprobs, ref_logprobs):
    """Estimates KL(policy || ref_policy) per token, nats, from tokens the policy sampled. (B, T), (B, T) -> (B, T).

    k3 = exp(ref - policy) - (ref - policy) - 1 (Schulman 2020; DeepSeekMath, equation 4): never negative, zero with
    zero gradient where both agree. Its plain cousin k1 = policy - ref has the right mean too, but as a loss it does
    nothing: its gradient is zero on average. The value of k3 is an estimate of KL(policy || ref_policy). Its gradient,
    when it is a loss as here, is on average that of KL(ref_policy || policy): it pulls the policy to the reference
    wherever the reference puts weight."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def token_weights(mask, average: str = "token", *, max_new_tokens: int | None = None):
    """How much each completion token counts: the mask of grpo_loss, which also takes the divisor that belongs to it.

        average    a token's weight            divisor of the step     whose loss
        token      1                           completion tokens       DAPO, and ours: every token counts the same
        sequence   1 / length of completion    completions             GRPO as published
        constant   1 / max_new_tokens (given)  completions             Dr. GRPO (with normalize_std=False)

    mask (B, T), 1 on completion tokens and 0 elsewhere -> (B, T)."""
    if average == "token":
        return mask
    if average == "sequence":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if average == "constant":
        return mask / max_new_tokens
    raise ValueError(f"got average {average!r}, expected token, sequence or constant")


def grpo_loss(logprobs, old_logprobs, advantages, mask, *, divisor, clip_low: float = 0.2, clip_high: float = 0.2,
              ref_logprobs=None, kl_coef: float = 0.0):
    """The clipped surrogate, negated, plus the KL penalty. Returns (loss, dict of floats).

    The loss is divided by the whole step's divisor already, so the losses of micro-batches and ranks simply add up. The
    floats are sums over this micro-batch's completion tokens: add them up too, then divide by the number of completion
    tokens that were trained on, whatever the divisor is.

    logprobs      (B, T) nats, of the policy that trains, at the sampling temperature; the only argument with a gradient
    old_logprobs  (B, T) of the policy that sampled, as the sampler recorded them
    advantages    (B,)   one number a completion; or (B, T), a number a token, as a process reward model gives
    mask          (B, T) weight of each token (token_weights), 0 on prompts and padding; where it is 0, whatever the
                  other (B, T) tensors hold has no effect, NaN included
    divisor       completion tokens of the whole optimizer step, over all micro-batches and ranks; with the weights
                  "sequence" and "constant" the number of its completions instead
    clip_low, clip_high   the ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO's clip-higher raises clip_high
    ref_logprobs, kl_coef (B, T) of the reference, and the weight of the k3 KL to it; None: no KL"""
    used = mask > 0
    # masked_fill and not a product: NaN * 0 is NaN, in the value and in the gradient
    logprobs, old_logprobs = logprobs.masked_fill(~used, 0.0), old_logprobs.masked_fill(~used, 0.0)
    ratio = torch.exp(logprobs - old_logprobs)  # (B, T)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages.masked_fill(~used, 0.0)  # (B, 1 or T)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.min(unclipped, clipped)  # the pessimistic one, for both signs of the advantage (PPO, equation 7)
    statistics = {"clip_frac": clipped < unclipped, "ratio": ratio,
                  "k1_kl_old": old_logprobs - logprobs}  # of KL(old_policy || policy): old_policy sampled
    if ref_logprobs is not None:
        k3 = k3_kl(logprobs, ref_logprobs.masked_fill(~used, 0.0))
        objective = objective - kl_coef * k3
        statistics["k3_kl_ref"] = k3
    loss = -(objective * mask).sum() / divisor
    return loss, {name: value[used].float().sum().item() for name, value in statistics.items()}
