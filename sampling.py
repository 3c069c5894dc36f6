"""The sampling loop: prompts in, completions with their log-probs out, at the speed of the rows that are still writing.

A padded batch waits for its longest row. Here rows live in slots that stay full: a finished row makes room for the next
prompt, and when no prompt is left the remaining rows are moved together. The prompt of a group is read once, then its
keys and values are copied to the group's rows. All rows write into the same cache column, the cursor (model.KVCache),
so a row is its column range:

    columns   0  1  2  3  4  5  6  7 cursor
    row 0     .  p  p  t  t  t  t  t  <-       p prompt, t token, . not this row's: masked
    row 1     .  .  .  .  p  p  p  t  <-       a later prompt, put right before the cursor

Each completion draws from its own random stream, (seed, index), so its tokens do not depend on the rows that share its
batch, on the number of slots or on the order in which others finish, up to ties within floating-point rounding.

R rows in use, V vocabulary, U different prompts in one prefill; model.py explains the other letters.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import torch

from batching import pad_rows
from model import KVCache, end_tokens


@dataclass
class Completion:
    token_ids: list[int]   # EOS included, unless truncated
    logprobs: list[float]  # nats, of softmax(logits / temperature), before any top-p truncation
    truncated: bool        # no EOS within max_new_tokens


def complete(model, tokenizer, prompts: list[str], **settings) -> tuple[list[list[int]], list[Completion], list[str]]:
    """Text in, text out: -> prompt ids, completions, and their texts as rewards read them. settings go to sample().

    The text has no EOS, and where a prompt already ends in <think> the tag is put back, so that rewards always see
    <think>...</think>.
    """
    unique = list(dict.fromkeys(prompts))
    ids = dict(zip(unique, tokenizer(unique, add_special_tokens=False)["input_ids"]))
    ends = end_tokens(model, tokenizer)
    prompt_ids = [ids[prompt] for prompt in prompts]
    completions = sample(model, prompt_ids, eos_ids=ends, **settings)
    without_eos = [c.token_ids if c.truncated else c.token_ids[:-1] for c in completions]
    texts = tokenizer.batch_decode(without_eos, skip_special_tokens=False)
    texts = ["<think>" * prompt.endswith("<think>") + text for prompt, text in zip(prompts, texts)]
    return prompt_ids, completions, texts


def choose_tokens(logits, uniforms, *, temperature: float, top_p: float):
    """logits (R, V), uniforms (R,) in [0, 1) -> tokens (R,), logprobs (R,).

    Inverse-CDF sampling: the token at which the cumulative probability passes the uniform number, one number a token.
    Temperature 0 is greedy, with log-probs at temperature 1. top_p keeps the smallest set of most likely tokens that
    holds that much probability (nucleus sampling, arXiv 1904.09751); it is for evaluation only, because the trainer
    scores the untruncated policy.
    """
    log_softmax = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (R, V)
    if temperature == 0:
        tokens = log_softmax.argmax(-1)
    else:
        probs = log_softmax.double().exp()
        if top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # drop a token when those before it already hold top_p
            probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        # in float64: a float32 sum over 150,000 tokens would be off by more than a rare token's share
        cumulative = probs.cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, log_softmax.gather(-1, tokens[:, None]).squeeze(-1)


@torch.no_grad()
def sample(model, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
           eos_ids, seed: int, slots: int = 256) -> list[Completion]:
    """One completion per prompt, in the order of prompts; repeat a prompt to get a group.

    slots: rows that decode at the same time; a memory and speed setting that does not change the tokens.
    Raises ValueError for an empty prompt, or where prompt and max_new_tokens together exceed the model's context.
    """
    config, weight = model.config, model.lm_head.weight
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=1) == 0:
        raise ValueError("got an empty prompt; expected at least one token to continue from")
    if longest + max_new_tokens > config.context:
        raise ValueError(f"got a prompt of {longest} tokens and max_new_tokens {max_new_tokens}, together more than "
                         f"the model's context of {config.context}; lower max_new_tokens to "
                         f"{max(0, config.context - longest)} or shorten the prompt")
    completions = [Completion([], [], truncated=True) for _ in prompts]
    queue = deque(range(len(prompts)))  # indices of completions that have not begun
    waiting = Counter(map(tuple, prompts))  # how many completions still need a prompt's keys and values
    prefilled = {}  # prompt -> keys, values (L, K, T, E) and the logits after its last token (V,)

    rows = min(slots, len(prompts))
    width = longest + max_new_tokens  # the most columns a row can need
    cache = KVCache(config, rows, width + width // 4, device=weight.device, dtype=weight.dtype)
    cache.begin = cache.end = longest  # room for every prompt to the left of the cursor
    # (R, S): 0 on a row's own columns, -inf elsewhere
    mask = torch.full((rows, cache.keys.shape[3]), -torch.inf, device=weight.device, dtype=weight.dtype)
    logits = torch.zeros(rows, config.vocab_size, device=weight.device)
    uniforms = torch.zeros(rows, max_new_tokens, dtype=torch.float64, device=weight.device)
    owner = [-1] * rows  # which completion a row is writing; -1: none
    begins = [0] * rows  # the row's first column

    def fill(free: list[int]) -> None:
        """Puts the next prompts of the queue into these rows."""
        taken = [(row, queue.popleft()) for row in free[:len(queue)]]
        new = list(dict.fromkeys(prompt for _, index in taken if (prompt := tuple(prompts[index])) not in prefilled))
        if new:
            prefilled.update(zip(new, prefill(model, new)))
        for prompt in dict.fromkeys(tuple(prompts[index]) for _, index in taken):
            group = [(row, index) for row, index in taken if tuple(prompts[index]) == prompt]
            keys, values, last_logits = prefilled[prompt]
            group_rows, begin = torch.tensor([row for row, _ in group], device=weight.device), cache.end - len(prompt)
            cache.begin = min(cache.begin, begin)  # so that rows moved before step 3 keep their prompts
            cache.keys[:, group_rows, :, begin:cache.end] = keys[:, None]
            cache.values[:, group_rows, :, begin:cache.end] = values[:, None]
            mask[group_rows] = -torch.inf
            mask[group_rows, begin:cache.end] = 0
            logits[group_rows] = last_logits
            for row, index in group:
                owner[row], begins[row] = index, begin
                uniforms[row] = torch.from_numpy(np.random.default_rng([seed, index]).random(max_new_tokens))
            waiting[prompt] -= len(group)
            if not waiting[prompt]:
                del prefilled[prompt]

    fill(list(range(rows)))
    while rows:
        # 1. one token for every row, from the logits of the last step or of the prefill
        lengths = torch.tensor([len(completions[index].token_ids) if index >= 0 else 0 for index in owner],
                               device=weight.device)
        drawn = uniforms.gather(1, lengths[:, None]).squeeze(1)  # (R,)
        tokens, logprobs = choose_tokens(logits, drawn, temperature=temperature, top_p=top_p)
        free = []
        for row, (index, token, logprob) in enumerate(zip(owner, tokens.tolist(), logprobs.tolist())):
            if index >= 0:
                completion = completions[index]
                completion.token_ids.append(token)
                completion.logprobs.append(logprob)
                completion.truncated = token not in eos_ids
                if not completion.truncated or len(completion.token_ids) == max_new_tokens:
                    owner[row] = -1
            if owner[row] < 0:
                free.append(row)

        # 2. rows that stopped are dropped once they are a quarter of all (moving the others costs about one step)
        if not queue and len(free) > rows // 4:
            keep = torch.tensor([row for row in range(rows) if owner[row] >= 0], dtype=torch.long, device=weight.device)
            owner, begins = [owner[row] for row in keep.tolist()], [begins[row] for row in keep.tolist()]
            cache.keep_rows(keep)
            mask, uniforms, tokens, lengths = mask[keep], uniforms[keep], tokens[keep], lengths[keep]
            rows, free = len(owner), []
            if not rows:
                break

        # 3. forward: every row's token goes into the cursor's column
        if len(free) < rows:
            cache.begin = min(begin for begin, index in zip(begins, owner) if index >= 0)
            if cache.end == cache.keys.shape[3]:
                shift = min(cache.begin, cache.end - longest)  # prompts still need their room to the left of the cursor
                begins = [begin - shift for begin in begins]
                mask = torch.cat([mask[:, shift:], torch.full_like(mask[:, :shift], -torch.inf)], dim=1)
                cache.shift_left(shift)
            mask[:, cache.end] = 0
            positions = cache.end - torch.tensor(begins, device=weight.device)[:, None]  # (R, 1): its columns so far
            logits = model(tokens[:, None], positions=positions.clamp(0, config.context - 1), cache=cache,
                           mask=mask[:, None, None, cache.begin:cache.end + 1])[:, 0]  # (R, V)

        # 4. free rows take the next prompts, right before the cursor
        if queue and free:
            fill(free)
    return completions


def prefill(model, prompts: list[tuple[int, ...]]):
    """Reads U prompts in one forward pass; yields their keys, values (L, K, T, E) and logits (V,) after the last token.

    Rows are padded on the right, where causal attention lets no prompt token see the padding.
    """
    weight = model.lm_head.weight
    input_ids = pad_rows([list(prompt) for prompt in prompts], 0, dtype=torch.long, device=weight.device)  # (U, T)
    cache = KVCache(model.config, *input_ids.shape, device=weight.device, dtype=weight.dtype)
    hidden = model.hidden(input_ids, cache=cache)  # (U, T, D)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=weight.device)
    logits = model.lm_head(hidden[torch.arange(len(prompts), device=weight.device), last])  # (U, V)
    for u, prompt in enumerate(prompts):
        yield cache.keys[:, u, :, :len(prompt)], cache.values[:, u, :, :len(prompt)], logits[u]
