"""Token lists -> padded batches -> log-probs of completions. Supervised and reinforcement training share this file.

Shapes: B sequences, T tokens (prompt and completion, padded on the right), V vocabulary.
"""

import torch


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in groups of rows of like length, rows * longest row <= token_budget (a row longer than that: alone).

    A memory and speed setting only: losses are summed over the step's tokens, so grouping never changes the gradient.
    """
    groups, group = [], []
    ascending = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for index in ascending:  # so this row is the group's longest
        if group and (len(group) + 1) * lengths[index] > token_budget:
            groups.append(group)
            group = []
        group.append(index)
    return groups + [group] if group else groups


def pad_rows(rows: list[list[float]], value, *, dtype, device="cpu"):
    """Lists of different lengths -> (B, longest), filled up with value on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=dtype, device=device)


def pad_batch(prompts: list[list[int]], completions: list[list[int]], *, pad_id: int = 0, device="cpu"):
    """-> input_ids (B, T), mask (B, T-1). mask[b, t] is 1 where input_ids[b, t+1] is a completion token, EOS included.

    The mask comes from lengths. Comparing ids with the pad id would drop the EOS of every tokenizer that pads with EOS.
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids = pad_rows(rows, pad_id, dtype=torch.long, device=device)  # (B, T)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None] - 1
    stops = starts + torch.tensor([len(completion) for completion in completions], device=device)[:, None]
    columns = torch.arange(input_ids.shape[1] - 1, device=device)[None]
    return input_ids, ((columns >= starts) & (columns < stops)).float()  # (B, T), (B, T-1)


def token_logprobs(model, input_ids, temperature: float = 1.0, *, with_entropy: bool = False):
    """Log-probs (nats) that the model gives input_ids[:, 1:] at this temperature -> logprobs, entropy, each (B, T-1).

    The temperature is the sampler's: the policy that RL improves is the one that samples,
    softmax(logits / temperature). The entropy, None unless asked for, is of the full vocabulary, without gradient.
    """
    logits = model(input_ids[:, :-1]).float()  # (B, T-1, V)
    if temperature != 1.0:
        logits = logits / temperature
    log_softmax = logits.log_softmax(-1)  # (B, T-1, V)
    logprobs = log_softmax.gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # (B, T-1)
    entropy = -(log_softmax.detach().exp() * log_softmax.detach()).sum(-1) if with_entropy else None  # (B, T-1)
    return logprobs, entropy
