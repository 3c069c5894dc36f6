"""Token lists -> padded batches -> log-probs of completions. Supervised and reinforcement training share this file.

Shapes: B sequences, T tokens (prompt and completion, padded on the right), V vocabulary.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from machinery.checkpoints import check_finite

LOGITS_AT_ONCE = 2 ** 26  # tokens x vocabulary: 256 MiB in fp32


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices of rows of like length, put together so that rows * longest row <= token_budget (a row longer than that:
    alone).

    A memory and speed setting only: losses are summed over the step's tokens, so no cut changes the gradient."""
    batches, batch = [], []
    ascending = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for index in ascending:  # so this row is the longest of its micro-batch
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            batches.append(batch)
            batch = []
        batch.append(index)
    return batches + [batch] if batch else batches


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


def token_logprobs(model, input_ids, mask, temperature: float = 1.0, *, with_entropy: bool = False):
    """Log-probs (nats) that the model gives input_ids[:, 1:] where mask (B, T-1) > 0 -> logprobs, entropy, each
    (B, T-1), 0 elsewhere.

    The temperature is the sampler's: the policy that RL improves is the one that samples,
    softmax(logits / temperature). The entropy, None unless asked for, is of the full vocabulary, without gradient.

    The logits of 8,192 tokens of a 151,936-token vocabulary are 5 GB in fp32, and softmax and gradient want as much
    again. So they never exist all at once: prompts and padding get none, and the others are cut into chunks, which the
    backward pass computes anew."""
    used = mask > 0
    targets = input_ids[:, 1:][used]  # (N,)

    def head(lm_head, hidden):  # hidden (B, T-1, D)
        chunk = max(1, LOGITS_AT_ONCE // lm_head.out_features)
        score = chosen_logprobs
        if len(targets) > chunk and torch.is_grad_enabled():
            score = partial(checkpoint, chosen_logprobs, use_reentrant=False)
        parts = [score(lm_head, h, t, temperature, with_entropy)
                 for h, t in zip(hidden[used].split(chunk), targets.split(chunk))]
        return [None if column[0] is None else torch.zeros_like(mask).masked_scatter(used, torch.cat(column))
                for column in zip(*parts)]

    logprobs, entropy = model(input_ids[:, :-1], head=head)
    return logprobs, entropy


def chosen_logprobs(lm_head, hidden, targets, temperature: float, with_entropy: bool):
    """hidden (N, D), targets (N,) -> the targets' log-probs, the entropies or None, each (N,) in fp32."""
    logits = lm_head(hidden).float()  # (N, V)
    if temperature != 1.0:
        logits = logits / temperature
    log_softmax = logits.log_softmax(-1)  # (N, V)
    entropy = -(log_softmax.detach().exp() * log_softmax.detach()).sum(-1) if with_entropy else None
    return log_softmax.gather(-1, targets[:, None]).squeeze(-1), entropy


def teacher_kl(model, teacher, input_ids, mask):
    """KL(teacher || model) in nats at each place where mask (B, T-1) > 0 -> (B, T-1), 0 elsewhere.

    Over the full vocabulary, at temperature 1; gradient reaches the model only. A token of a text says which of 255
    came next, this says how likely each of them was (Hinton et al., arXiv 1503.02531). In chunks, as token_logprobs."""
    used = mask > 0
    with torch.no_grad():
        teacher_hidden = teacher.hidden(input_ids[:, :-1])[used]  # (N, teacher's D)

    def head(lm_head, hidden):  # hidden (B, T-1, D)
        def chunk_kl(h, t):
            logits, theirs = lm_head(h).float(), teacher.lm_head(t).float().detach()
            V = min(logits.shape[-1], theirs.shape[-1])  # rows behind the last token pad the larger embedding
            log_p, log_q = logits[:, :V].log_softmax(-1), theirs[:, :V].log_softmax(-1)  # (N, V)
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        chunk = max(1, LOGITS_AT_ONCE // lm_head.out_features)
        parts = [checkpoint(chunk_kl, h, t, use_reentrant=False)
                 for h, t in zip(hidden[used].split(chunk), teacher_hidden.split(chunk))]
        return torch.zeros_like(mask).masked_scatter(used, torch.cat(parts))

    return model(input_ids[:, :-1], head=head)


@torch.no_grad()
def score(model, batch: list[tuple], temperature: float, micro_batch_tokens: int, device) -> list[list[float]]:
    """Log-probs of (prompt ids, Completion) pairs under a model that does not train, as rows like the sampler's. Raises
    BrokenWeights where they are not finite."""
    rows: list = [None] * len(batch)
    lengths = [len(prompt) + len(completion.token_ids) for prompt, completion in batch]
    for micro_batch in micro_batches(lengths, micro_batch_tokens):
        prompts, completions = [batch[i][0] for i in micro_batch], [batch[i][1].token_ids for i in micro_batch]
        input_ids, mask = pad_batch(prompts, completions, device=device)  # (B, T), (B, T-1)
        logprobs, _ = token_logprobs(model, input_ids, mask, temperature)  # (B, T-1)
        check_finite(logprobs, model.source)
        for row, i in enumerate(micro_batch):
            start = len(batch[i][0]) - 1
            rows[i] = logprobs[row, start:start + len(batch[i][1].token_ids)].tolist()
    return rows


def aligned(values: list[list[float]], prompt_ids: list[list[int]], device):
    """A value per completion token -> (B, T-1), each where its token is predicted; 0 elsewhere."""
    rows = [[0.0] * (len(prompt) - 1) + row for prompt, row in zip(prompt_ids, values, strict=True)]
    return pad_rows(rows, 0.0, dtype=torch.float32, device=device)
