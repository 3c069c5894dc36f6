"""The sampling loop: prompts in, completions with their log-probs out.

sample_plainly() is the whole definition, in a dozen lines: one row, no cache. sample() writes the same tokens many times
faster, knows temperature 0 and top-p, and is the one that scripts call; the tests hold it to the plain one.

A padded batch waits for its longest row. In sample() rows live in slots that stay full: a finished row makes room for
the next prompt, and when no prompt is left the remaining rows are compacted into fewer. The prompt of a group is read
once, then its keys and values are copied to the group's rows. All rows write into the same cache column, the cursor
(model.KVCache), so a row is its column range:

    columns   0  1  2  3  4  5  6  7 cursor
    row 0     .  p  p  t  t  t  t  t  <-       p prompt, t token, . not this row's: masked
    row 1     .  .  .  .  p  p  p  t  <-       a later prompt, put right before the cursor, which was at 7

The next column to write is cache.end, and on the device cache.cursor, the same number. Attention reads the window of
columns cache.begin..cache.stop (end + 1), and a mask hides from each row what is not its own. The model's forward pass
moves the cursor (cache.advance). In a StaticKVCache, as CUDA graphs need it, it moves cache.cursor alone, and sample()
sets end and stop.

Each completion draws from its own random stream, (seed, index), so its tokens do not depend on the rows that share its
batch, on the number of slots or on the order in which others finish, up to ties within floating-point rounding.

On a GPU a decoding step is one replay of a CUDA graph (machinery/cuda_graphs.py), and the host looks only every 16
steps at which rows are done.

R rows in use, S columns of the cache, W of them in the window, V vocabulary, U different prompts in one pass of prefill,
N completions, M max_new_tokens; T tokens, D width, L layers, K key/value heads, E head dimension.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from machinery.batching import micro_batches, pad_rows
from machinery.checkpoints import check_finite, end_tokens
from machinery.cuda_graphs import Graphs, StaticKVCache
from machinery.notes import check_truncated, check_unknown
from machinery.text import decode, encode_prompts, opened_thinking
from model import KVCache

WINDOW_MULTIPLE = 128  # under CUDA graphs the window begins and ends at multiples of so many columns: fewer shapes


@dataclass
class Completion:
    token_ids: list[int]   # EOS included, unless truncated
    logprobs: list[float]  # nats, of softmax(logits / temperature), before any top-p truncation; greedy: temperature 1
    truncated: bool        # no EOS within max_new_tokens


@torch.no_grad()
def sample_plainly(model, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 1.0, eos_ids: set[int],
                   seed: int) -> list[Completion]:
    """The sampling loop written down: a token is the first whose cumulative probability exceeds the next random number.

    Every token costs a pass over all tokens before it, which is what a KV cache saves."""
    completions = []
    for index, prompt in enumerate(prompts):
        uniforms, token_ids, logprobs = np.random.default_rng([seed, index]).random(max_new_tokens), [], []
        while len(token_ids) < max_new_tokens and not (token_ids and token_ids[-1] in eos_ids):
            logits = model(torch.tensor([prompt + token_ids]))[0, -1]  # (V,)
            log_softmax = (logits / temperature).log_softmax(-1)
            cumulative = np.cumsum(log_softmax.double().exp().numpy())
            token_ids.append(int(np.argmax(cumulative > uniforms[len(token_ids)] * cumulative[-1])))
            logprobs.append(log_softmax[token_ids[-1]].item())
        completions.append(Completion(token_ids, logprobs, truncated=token_ids[-1] not in eos_ids))
    return completions


def complete(model, tokenizer, prompts: list[str], *, style: str = "tiny", check_ends: bool = True, finished=None,
             **settings) -> tuple[list[list[int]], list[Completion], list[str]]:
    """Text in, text out: -> prompt ids, completions, and their texts as rewards read them. style: of the prompts;
    check_ends: say so where not one completion ends; finished(index, text) is called when a completion has ended, while
    others still write, and says how many of them are judged (machinery/judging.py); settings go to sample().

    The text has no EOS, and where a prompt already ends in <think> the tag is put back, with the white space behind it,
    so that rewards always see <think>...</think>."""
    different = list(dict.fromkeys(prompts))  # the prompts of a group are tokenized once
    different_ids, eos_ids = encode_prompts(tokenizer, different, style), end_tokens(model, tokenizer)
    check_unknown(tokenizer, different, different_ids, "the prompts")
    ids_of = dict(zip(different, different_ids))
    prompt_ids = [ids_of[prompt] for prompt in prompts]
    texts = {}

    def text_of(index: int, completion: Completion) -> str:
        if index not in texts:
            text, = decode(tokenizer, [completion.token_ids if completion.truncated else completion.token_ids[:-1]])
            texts[index] = opened_thinking(prompts[index]) + text
        return texts[index]

    completions = sample(model, prompt_ids, eos_ids=eos_ids, **settings,
                         finished=finished and (lambda index, completion: finished(index, text_of(index, completion))))
    if check_ends:
        check_truncated(completions, tokenizer.convert_ids_to_tokens(sorted(eos_ids)))
    return prompt_ids, completions, [text_of(index, completion) for index, completion in enumerate(completions)]


# ------------------------------------------------------------------------------------------------------------ one token
def choose_tokens(logits, uniforms, *, temperature: float, top_p: float):
    """logits (R, V), uniforms (R,) in [0, 1) -> tokens (R,), logprobs (R,). Nothing in it waits for a GPU.

    Inverse-CDF sampling: the token at which the cumulative probability passes the uniform number, one number a token.
    Temperature 0 is greedy, with log-probs at temperature 1. top_p keeps the smallest set of most likely tokens that
    holds that much probability (nucleus sampling, arXiv 1904.09751); it is for evaluation only, because the trainer
    scores the untruncated policy."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    log_softmax = logits.log_softmax(-1, dtype=torch.float32)  # (R, V)
    if temperature == 0:
        tokens = log_softmax.argmax(-1)
    else:
        probs = log_softmax.exp()
        if top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # drop a token when those before it already hold top_p
            probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        tokens = inverse_cdf(probs, uniforms)
    return tokens, log_softmax.gather(-1, tokens[:, None]).squeeze(-1)


def inverse_cdf(weights, uniforms, block: int = 128):
    """weights (R, V) >= 0, uniforms (R,) -> (R,): the first index whose cumulative weight exceeds uniform * total.

    Sums are in float64: in float32, a sum over 150,000 tokens is off by more than a rare token's share. float64 is slow
    on GPUs, so a large vocabulary is cut into blocks: first the block is chosen, then the token in it."""
    def first_above(weights, target):  # (R, n), (R,) -> (R,)
        cumulative = weights.double().cumsum(-1)
        target = torch.minimum(target, cumulative[:, -1] * (1 - 2 ** -53))  # else rounding could choose a weight of 0
        return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1).clamp(max=weights.shape[1] - 1)

    rows, size = weights.shape
    if size <= 8 * block:
        return first_above(weights, uniforms * weights.sum(-1, dtype=torch.float64))
    if size % block:  # the vocabularies of Qwen and Llama are multiples of 128, and are not copied
        weights = F.pad(weights, (0, -size % block))
    blocks = weights.view(rows, -1, block)  # (R, V / block, block)
    sums = blocks.sum(-1, dtype=torch.float64)  # (R, V / block)
    target = uniforms * sums.sum(-1)
    chosen = first_above(sums, target)[:, None]  # (R, 1)
    before = (sums.cumsum(-1) - sums).gather(1, chosen).squeeze(1)
    inside = first_above(blocks.gather(1, chosen[:, :, None].expand(-1, -1, block)).squeeze(1), target - before)
    return (chosen.squeeze(1) * block + inside).clamp(max=size - 1)


# ------------------------------------------------------------------------------------------------------------- the rows
class Rows:
    """The state of R rows on the device, and the decoding step, which changes it without asking the host.

    Line N of what is written is a scrap line: a row that has stopped goes on decoding and writes there, so that no step
    needs to know which rows still count."""

    def __init__(self, model, num_rows: int, columns: int, num_completions: int, max_new_tokens: int, *, static: bool,
                 eos_ids, temperature: float, top_p: float):
        weight = model.lm_head.weight
        device, dtype = weight.device, weight.dtype
        self.model, self.N, self.M = model, num_completions, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        # what has been written, a line a completion
        self.tokens = torch.zeros(self.N + 1, self.M, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.N + 1, self.M, device=device)
        self.uniforms = torch.zeros(self.N + 1, self.M, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(self.N + 1, dtype=torch.long, device=device)
        # the rows that write it
        self.owner = torch.full((num_rows,), self.N, device=device)  # (R,) which completion a row is writing
        self.begins = torch.zeros(num_rows, dtype=torch.long, device=device)  # (R,) its first column
        self.last = torch.zeros(num_rows, dtype=torch.long, device=device)  # (R,) its last token
        # (R, S): 0 on a row's own columns, -inf elsewhere
        self.mask = torch.full((num_rows, columns), -torch.inf, device=device, dtype=dtype)
        self.cache = (StaticKVCache if static else KVCache)(model.config, num_rows, columns, device=device, dtype=dtype)

    def write(self, rows, logits) -> None:
        """Chooses a token for each of these rows (indices or a slice) from logits (R, V) and writes it down."""
        owner = self.owner[rows]
        length = self.lengths[owner].clamp(max=self.M - 1)  # (R,)
        tokens, logprobs = choose_tokens(logits, self.uniforms[owner, length], temperature=self.temperature,
                                         top_p=self.top_p)
        self.tokens[owner, length], self.logprobs[owner, length] = tokens, logprobs
        self.lengths[owner] = length + 1
        stopped = (tokens[:, None] == self.eos_ids).any(1) | (length + 1 == self.M)
        self.last[rows] = tokens
        self.owner[rows] = owner.masked_fill(stopped, self.N)

    def completion(self, index: int, eos_ids) -> Completion:
        """One that has ended."""
        n = self.lengths[index].item()
        tokens, logprobs = self.tokens[index, :n].tolist(), self.logprobs[index, :n].tolist()
        return Completion(tokens, logprobs, truncated=tokens[-1] not in eos_ids)

    def step(self) -> None:
        """Every row's last token goes into the cursor's column, and the next one is chosen."""
        self.mask.index_fill_(1, self.cache.cursor, 0.0)
        # clamped for rows that have stopped: they go on decoding, past the context too
        positions = (self.cache.cursor - self.begins).clamp(0, self.model.config.context - 1)[:, None]  # (R, 1)
        mask = self.mask[:, None, None, self.cache.begin:self.cache.stop]  # (R, 1, 1, W)
        logits = self.model(self.last[:, None], positions=positions, cache=self.cache, mask=mask)[:, 0]  # (R, V)
        self.write(slice(None), logits)

    def start(self, rows: list[int], indices: list[int], uniforms, keys, values, logits) -> None:
        """Puts completions of one prompt into these rows, right before the cursor, and chooses their first tokens.

        uniforms (number of rows, M); keys, values (L, K, T, E) and logits (V,) are the prompt's, from prefill()."""
        device, end = self.owner.device, self.cache.end
        begin, where = end - keys.shape[2], torch.tensor(rows, device=device)
        self.cache.begin = min(self.cache.begin, begin)
        self.cache.keys[:, where, :, begin:end] = keys[:, None]
        self.cache.values[:, where, :, begin:end] = values[:, None]
        self.mask[where] = -torch.inf
        self.mask[where, begin:end] = 0
        self.begins[where], self.owner[where] = begin, torch.tensor(indices, device=device)
        self.uniforms[indices] = uniforms.to(device)
        self.write(where, logits.expand(len(rows), -1))

    def shrink(self, rows: int, live: list[int]) -> None:
        """Keeps only the first `rows` rows; live rows behind them move into the places of stopped ones."""
        movers = [row for row in live if row >= rows]
        holes = sorted(set(range(rows)) - set(live))[:len(movers)]
        for tensor in (self.owner, self.begins, self.last, self.mask):
            tensor[holes] = tensor[movers]
        self.cache.shrink(rows, holes, movers)
        self.owner, self.begins, self.last, self.mask = (
            tensor[:rows] for tensor in (self.owner, self.begins, self.last, self.mask))

    def shift_left(self, columns: int) -> None:
        self.cache.shift_left(columns)
        self.mask[:, :-columns] = self.mask[:, columns:].clone()
        self.mask[:, -columns:] = -torch.inf
        self.begins -= columns


# ------------------------------------------------------------------------------------------------------------- the loop
@torch.no_grad()
def sample(model, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
           eos_ids, seed: int, slots: int = 256, first_index: int = 0, static: bool | None = None,
           progress: str = "", finished=None) -> list[Completion]:
    """One completion per prompt, in the order of prompts; repeat a prompt to get a group.

    slots: rows that decode at the same time; a memory and speed setting that does not change the tokens.
    first_index: the random stream of the first completion, so that several processes can share one list of prompts.
    static: decode with fixed shapes, in CUDA graphs where there is a GPU; None: only on a GPU.
    progress: the name of a progress bar, shown where it takes longer than 2 seconds; empty: none.
    finished(index, completion): called when a completion has ended, with what it returns, if not 0, beside the bar.
    Raises ValueError for an empty prompt, or where prompt and max_new_tokens together exceed the model's context, and
    BrokenWeights where log-probs are not finite."""
    config, device = model.config, model.lm_head.weight.device
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=1) == 0:
        raise ValueError("got an empty prompt; expected at least one token to continue from")
    if longest + max_new_tokens > config.context:
        raise ValueError(f"got a prompt of {longest} tokens and max_new_tokens {max_new_tokens}, together more than "
                         f"the model's context of {config.context}; lower max_new_tokens to "
                         f"{max(0, config.context - longest)} or shorten the prompt")
    if not prompts:
        return []
    static = device.type == "cuda" if static is None else static
    steps = 16 if static else 1  # between two looks at which rows have stopped: a look waits for the GPU
    width = longest + max_new_tokens  # the most columns a row can need
    # some more, so that columns are shifted to the left now and then and not at every step
    columns = width + (max(width // 4, steps) if len(prompts) > slots else steps)
    columns += -columns % WINDOW_MULTIPLE if static else 0

    rows = Rows(model, min(slots, len(prompts)), columns, len(prompts), max_new_tokens, static=static,
                eos_ids=eos_ids, temperature=temperature, top_p=top_p)
    cache, graphs = rows.cache, Graphs(rows.step, device)
    cache.move_cursor(longest)  # room for every prompt to the left of the cursor
    cache.begin = longest
    queue = deque(range(len(prompts)))  # indices of completions that have not begun
    uses_left = Counter(map(tuple, prompts))  # how many completions still need a prompt's keys and values
    prefilled = {}  # prompt -> its keys, values and last logits
    writing, completions = set(), [None] * len(prompts)  # indices of completions that are being written; those that are
    bar = tqdm(total=len(prompts), desc=progress, unit="completion", delay=2, mininterval=1, leave=False,
               disable=not progress)

    def fill(free: list[int]) -> None:
        """Puts the next prompts of the queue into these rows."""
        starting = {}  # prompt -> (row, index of the completion) pairs
        for row in free[:len(queue)]:
            index = queue.popleft()
            writing.add(index)
            starting.setdefault(tuple(prompts[index]), []).append((row, index))
        prefilled.update(prefill(model, [prompt for prompt in starting if prompt not in prefilled]))
        for prompt, pairs in starting.items():
            places, indices = zip(*pairs)
            streams = [np.random.default_rng([seed, first_index + index]) for index in indices]
            uniforms = torch.from_numpy(np.stack([stream.random(max_new_tokens) for stream in streams]))
            rows.start(list(places), list(indices), uniforms, *prefilled[prompt])
            uses_left[prompt] -= len(pairs)
            if not uses_left[prompt]:
                del prefilled[prompt]

    while True:
        # 1. which rows have stopped; they take the next prompts
        owner = rows.owner.tolist()  # this waits for the device
        live = [row for row, index in enumerate(owner) if index < rows.N]
        free = [row for row, index in enumerate(owner) if index == rows.N]
        if len(live) < len(writing):
            for index in sorted(writing.difference(owner)):
                writing.remove(index)
                completions[index] = rows.completion(index, eos_ids)
                if finished and (judged := finished(index, completions[index])):
                    bar.set_postfix(judged=judged, refresh=False)
        bar.update(len(prompts) - len(queue) - len(live) - bar.n)
        if queue and free:
            fill(free)
            continue  # a first token can already be EOS
        if not live:
            break

        # 2. a row that is free here stays free, since no prompt is left: drop stopped rows, where that pays for moving
        #    others into their places: once over an eighth has stopped; under CUDA graphs by halves, a graph a size
        size = len(owner)
        if static:
            while len(live) <= size // 2:
                size //= 2
        elif len(free) > size // 8:
            size = len(live)
        if size < len(owner):
            rows.shrink(size, live)

        # 3. the columns in use, and room for the next ones
        begin = rows.begins.masked_fill(rows.owner == rows.N, columns).min().item()
        if cache.end + steps > columns:
            shift = min(begin, cache.end - longest)  # prompts still need their room to the left of the cursor
            rows.shift_left(shift)
            begin -= shift
        cache.begin = begin
        if static:
            cache.begin = begin - begin % WINDOW_MULTIPLE
            cache.stop = cache.end + steps + -(cache.end + steps) % WINDOW_MULTIPLE

        # 4. decode
        for _ in range(steps):
            graphs.run((size, cache.begin, cache.stop))  # one rows.step(); the shape only names its graph
            if static:
                cache.end += 1  # StaticKVCache moves only the cursor on the device
    bar.close()
    check_finite(rows.logprobs[:-1], model.source)
    return completions


def prefill(model, prompts: list[tuple[int, ...]]):
    """Reads prompts, U at a time; yields each with its keys, values (L, K, T, E) and logits (V,) after its last token.

    Rows are padded on the right, where causal attention lets no prompt token see the padding."""
    weight = model.lm_head.weight
    budget = 1024 if weight.is_cpu else 16384  # tokens in one pass; a CPU gains by less padding, a GPU by fewer passes
    for micro_batch in micro_batches([len(prompt) for prompt in prompts], budget):
        rows = [list(prompts[i]) for i in micro_batch]
        input_ids = pad_rows(rows, 0, dtype=torch.long, device=weight.device)  # (U, T)
        cache = KVCache(model.config, *input_ids.shape, device=weight.device, dtype=weight.dtype)
        hidden = model.hidden(input_ids, cache=cache)  # (U, T, D)
        last = torch.tensor([len(row) - 1 for row in rows], device=weight.device)
        logits = model.lm_head(hidden[torch.arange(len(rows), device=weight.device), last])  # (U, V)
        for u, row in enumerate(rows):
            yield tuple(row), (cache.keys[:, u, :, :len(row)], cache.values[:, u, :, :len(row)], logits[u])
