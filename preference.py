"""A reward model for general prompts: the Bradley-Terry model of pairs, in which one reply was preferred to another.

DeepSeek-R1 (arXiv 2501.12948), section 2.3.4: where no rule can tell good from bad, a model that was trained on
preferences does. It reads the prompt and the final reply, what a user sees, and never the chain of thought. A language
model whose last layer is one number is all it is; the Bradley-Terry model (1952) turns two scores into a probability:

    P(chosen over rejected) = sigmoid(score(prompt, chosen) - score(prompt, rejected))

    python -m tasks.general pairs --n 3000 --out data/pairs.jsonl
    python preference.py --data data/pairs.jsonl --out runs/preference     # half a minute on 2 cores
    python preference.py --model runs/preference/checkpoint --say "hello" "hello, how can i help you?" "go away"

You see the share of held-out pairs that it orders right, for each flaw of the rejected reply. The checkpoint is a
Hugging Face directory that AutoModelForSequenceClassification loads. What happens to a policy that trains on such a
score for too long is in docs/r1.md: the score does not see what is lost.

Shapes: B replies, T tokens, D width.
"""

import machinery  # noqa: F401, I001  (first: from here on Ctrl-C ends in one line)
import math
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from countdown import check_style, fill_template
from machinery.batching import micro_batches, pad_rows
from machinery.checkpoints import (DTYPES, check_device, check_dtype, check_finite, end_tokens, find_directory, load,
                                   read_directory, save)
from machinery.data import check_rows, keep_out, read_jsonl, short
from machinery.flags import (bad_input_exits, broken_weights_exit, check_positive, disk_full_exits, fail,
                             parse_config)
from machinery.notes import check_learning_rate, check_unknown, note
from machinery.optimizer import MasterAdamW, clip_gradients
from machinery.run_folder import append_jsonl, check_free, create_run, what_to_do
from machinery.text import check_style_fits, encode_completions, encode_prompts, prompt_key
from model import Model
from rewards import END_THINK, THINK


@dataclass(frozen=True)
class Config:
    data: str = "data/pairs.jsonl"   # JSONL, one {"prompt", "chosen", "rejected"} a line; "flaw" groups the report
    model: str = "models/tiny-base"  # language model to start from, a directory or hub id
    style: str = "tiny"              # template that a prompt is put into: tiny (as it is) or chat
    out: str = "runs/preference"     # run folder to create
    epochs: int = 1                  # passes over the pairs; more, and it learns their wording by heart
    batch_size: int = 32             # pairs per optimizer step
    micro_batch_tokens: int = 8192   # tokens per forward pass, padding included; memory and speed, never the loss
    learning_rate: float = 5e-4      # AdamW peak, falling linearly to zero; for 0.8M parameters
    clip_norm: float = 1.0           # gradient norm limit
    eval_pairs: int = 512            # pairs kept out of training
    seed: int = 0                    # the new last layer, split and order of the pairs
    dtype: str = "float32"           # what the model computes in: float32, or bfloat16 with fp32 master weights
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        check_dtype(self.dtype)
        check_style(self.style, ("tiny", "chat"))
        check_positive(self, "epochs", "batch_size", "micro_batch_tokens", "learning_rate", "clip_norm", "eval_pairs")


class RewardModel(nn.Module):
    """Token rows (prompt, final reply, EOS) -> a score each. The score reads the last token's state: all was seen.

    With positions it scores prefixes of a row instead: what a process reward model or a value model does."""

    def __init__(self, backbone: Model):
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(backbone.config.hidden_size, 1, bias=False)

    def forward(self, rows: list[list[int]], positions: list[list[int]] | None = None):
        """rows of different lengths -> (B,); with positions in each row -> the scores there, row after row. Raises
        BrokenWeights where one is not finite."""
        device = self.score.weight.device
        input_ids = pad_rows(rows, 0, dtype=torch.long, device=device)  # (B, T), padded on the right
        hidden = self.backbone.hidden(input_ids)  # (B, T, D)
        positions = positions or [[len(row) - 1] for row in rows]
        where = torch.tensor([(b, t) for b, row in enumerate(positions) for t in row], device=device)  # (N, 2)
        scores = self.score(hidden[where[:, 0], where[:, 1]]).float().squeeze(-1)
        check_finite(scores, self.backbone.source, "scores")
        return scores


def load_reward_model(directory, *, dtype=torch.float32, device="cpu"):
    """What save_reward_model wrote -> (reward model, tokenizer). Raises ValueError for a plain language model."""
    check_device(device)
    hf_config, generation_config, tokenizer, state = read_directory(find_directory(directory))
    if "score.weight" not in state:
        raise ValueError(f"got {directory}, which is a language model; expected a reward model: "
                         "python preference.py --data PAIRS.jsonl makes one")
    reward_model = RewardModel(Model(hf_config))
    reward_model.backbone.source, reward_model.backbone.generation_config = str(directory), generation_config
    try:
        reward_model.score.load_state_dict({"weight": state.pop("score.weight")})
        missing, unexpected = reward_model.backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"got {directory}, whose tensors have other shapes than a reward model with one score of this "
                         f"config ({short(error)})") from None
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"got weights in {directory} that do not fit its config: missing {missing[:3]}, "
                         f"unexpected {unexpected[:3]}")
    return reward_model.to(device, dtype).eval(), tokenizer


def save_reward_model(reward_model: RewardModel, tokenizer, directory) -> None:
    """As transformers' ...ForSequenceClassification with one label."""
    backbone = reward_model.backbone
    backbone.hf_config.architectures = [{"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[
        backbone.hf_config.model_type] + "ForSequenceClassification"]
    backbone.hf_config.num_labels = 1
    state = {name: tensor for name, tensor in backbone.state_dict().items() if name != "lm_head.weight"}
    save(backbone, tokenizer, directory, {**state, "score.weight": reward_model.score.weight})


def final_reply(completion: str) -> str:
    """What the user sees: all but the chain of thought, without white space around it; nothing where it never ends.

    The only thing that a reward model judges (section 2.3.4: helpfulness by the final summary alone)."""
    return re.sub(f"{THINK}.*?({END_THINK}|$)", "", completion, flags=re.DOTALL).strip()


def rows_to_score(tokenizer, prompts: list[str], completions: list[str],
                  style: str | list[str] = "tiny") -> list[list[int]]:
    """Ids of prompt, final reply and EOS; the chain of thought is taken out before. style: of all prompts, or of each."""
    if not prompts:
        return []
    prompt_ids = encode_prompts(tokenizer, prompts, style)
    reply_ids = encode_completions(tokenizer, [final_reply(text) for text in completions])
    return [prompt + reply + [tokenizer.eos_token_id] for prompt, reply in zip(prompt_ids, reply_ids, strict=True)]


@torch.no_grad()
def preference_scores(reward_model, tokenizer, prompts: list[str], completions: list[str],
                      style: str = "tiny", token_budget: int = 8192) -> list[float]:
    """A score per completion, higher is better; only differences between replies to one prompt mean anything.

    A reply longer than the context scores as its beginning does: a policy must not end a run by rambling."""
    context = reward_model.backbone.config.context
    rows = [tuple(row[:context]) for row in rows_to_score(tokenizer, prompts, completions, style)]
    different, scores = list(dict.fromkeys(rows)), {}  # once: another batch rounds otherwise, and advantages would see it
    for micro_batch in micro_batches(list(map(len, different)), token_budget):
        own = [different[i] for i in micro_batch]
        scores |= zip(own, reward_model(list(map(list, own))).tolist())
    return [scores[row] for row in rows]


def load_judge(directory, tokenizer, style: str, *, dtype=torch.float32, device="cpu"):
    """-> judge(prompts, completions) -> scores, for prompts that the policy's tokenizer put into this style. Raises
    ValueError where the reward model would read chat markup that it does not know."""
    reward_model, own = load_reward_model(directory, dtype=dtype, device=device)
    if style == "chat" and own.chat_template != tokenizer.chat_template:
        raise ValueError(f"got {directory} with another chat template than the policy's, whose prompts it would read; "
                         "expected the same: train it with preference.py --model on a checkpoint of that family")
    return partial(preference_scores, reward_model, own, style=style)


def read_pairs(path: str, tokenizer, context: int, style: str = "tiny") -> list[dict]:
    """Pairs with their token rows. Raises ValueError with the line number where a field is missing or too long."""
    pairs = read_jsonl(path)
    pairs = check_rows(pairs, path, ("prompt", "chosen", "rejected"), "all three")
    prompts = [fill_template(pair["prompt"], style, tokenizer) for pair in pairs]
    styles = ["chat" if isinstance(pair["prompt"], list) else style for pair in pairs]
    chosen, rejected = (rows_to_score(tokenizer, prompts, [pair[name] for pair in pairs], styles)
                        for name in ("chosen", "rejected"))
    read = [prompt + final_reply(pair["chosen"]) for prompt, pair in zip(prompts, pairs)]
    check_unknown(tokenizer, read, chosen, path)
    if same := sum(c == r for c, r in zip(chosen, rejected)):
        note(f"{same:,} of the {len(pairs):,} pairs of {path} have the same reply on both sides: they teach nothing")
    for number, rows in enumerate(zip(chosen, rejected), 1):
        if max(map(len, rows)) > context:
            raise ValueError(f"got {path}, line {number} of {max(map(len, rows))} tokens, more than the model's "
                             f"context of {context}; leave it out")
    flaws = [str(pair.get("flaw") or "all") for pair in pairs]
    if reserved := {"loss"} & set(flaws):
        raise ValueError(f"got {path} with a flaw called {reserved.pop()!r}, which is a column of the report; rename it")
    return [{"flaw": flaw, "key": prompt_key(pair["prompt"], style, tokenizer), "chosen": c, "rejected": r}
            for pair, flaw, c, r in zip(pairs, flaws, chosen, rejected)]


def margins(reward_model, pairs: list[dict], token_budget: int):
    """Yields (score(chosen) - score(rejected), indices of the pairs) for one micro-batch after the other."""
    for rows in micro_batches([2 * max(len(p["chosen"]), len(p["rejected"])) for p in pairs], token_budget):
        scores = reward_model([pairs[i][side] for side in ("chosen", "rejected") for i in rows])  # (2B,)
        yield scores[:len(rows)] - scores[len(rows):], rows


@torch.no_grad()
def agreement(reward_model, pairs: list[dict], token_budget: int) -> dict[str, float]:
    """Share of pairs ordered as the data says, in all and for each flaw; and the Bradley-Terry loss, nats a pair."""
    right, losses = defaultdict(list), []
    for margin, rows in margins(reward_model, pairs, token_budget):
        losses += F.softplus(-margin).tolist()
        for i, m in zip(rows, margin.tolist()):
            right["all"].append(m > 0)
            if pairs[i]["flaw"] != "all":
                right[pairs[i]["flaw"]].append(m > 0)
    return {"loss": sum(losses) / len(losses), **{flaw: sum(r) / len(r) for flaw, r in sorted(right.items())}}


@broken_weights_exit()
@disk_full_exits("make room and run it again")
def main() -> None:
    if "--say" in sys.argv:
        return say()
    config = parse_config(Config, __doc__)

    # 1. model, pairs and run folder; everything that can be wrong with the input is said here
    with bad_input_exits():
        check_free(config.out)
        backbone, tokenizer = load(config.model, dtype=DTYPES[config.dtype], device=config.device)
        pairs = read_pairs(config.data, tokenizer, backbone.config.context, config.style)
        content = [str((pair["chosen"], pair["rejected"])) for pair in pairs]  # prompt and replies
        held_out, pairs = keep_out(content, pairs, config.eval_pairs, config.seed)
        if not pairs or not held_out:
            raise ValueError(f"got {len(held_out) + len(pairs)} pairs in {config.data}, of which --eval-pairs "
                             f"{config.eval_pairs} are kept out; expected at least one on each side, and equal pairs on one")
        trained = {pair["key"] for pair in pairs}
        if seen := sum(pair["key"] in trained for pair in held_out):
            note(f"{seen} of the {len(held_out)} held-out pairs have a prompt that training pairs have too, none of them "
                 "with both replies: what is measured there is new replies, not new prompts")
        check_style_fits(backbone, tokenizer, config.style, end_tokens(backbone, tokenizer))
        check_learning_rate(backbone, config.learning_rate, 1e-4)
        run = create_run(config.out, config)
    print(f"{config}\n{len(pairs):,} pairs, {len(held_out)} held out")
    reward_model = RewardModel(backbone)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        reward_model.score.weight.copy_(torch.randn(reward_model.score.weight.shape, generator=generator) * 0.02)
    reward_model.to(config.device, DTYPES[config.dtype])
    backbone.lm_head.requires_grad_(backbone.config.tied_embeddings)  # an untied one is never used
    optimizer = MasterAdamW([p for p in reward_model.parameters() if p.requires_grad], lr=config.learning_rate,
                            betas=(0.9, 0.95), weight_decay=0.0)

    # 2. the loop: -log sigmoid(score(chosen) - score(rejected)), the mean over the step's pairs
    order, log, started = [], [], time.time()
    for epoch in range(config.epochs):
        order += random.Random(f"{config.seed}, {epoch}").sample(range(len(pairs)), len(pairs))
    steps = math.ceil(len(order) / config.batch_size)
    for step in tqdm(range(steps), desc="preference", mininterval=1.0):
        batch = [pairs[i] for i in order[step * config.batch_size:(step + 1) * config.batch_size]]
        total, tokens = 0.0, sum(len(pair[side]) for pair in batch for side in ("chosen", "rejected"))
        for margin, _ in margins(reward_model, batch, config.micro_batch_tokens):
            loss = F.softplus(-margin).sum() / len(batch)  # softplus(-x) = -log sigmoid(x)
            loss.backward()
            total += loss.item()
        norm = clip_gradients(optimizer.gradients(), config.clip_norm)
        if not math.isfinite(norm):
            fail(f"got a gradient norm of {norm} at step {step + 1} from {backbone.source}, expected a finite one"
                 f"{what_to_do(run, step, config.model)}")
        optimizer.set_learning_rate(config.learning_rate * min((step + 1) / 10, 1 - step / steps))
        optimizer.step()
        reward_model.zero_grad()
        backbone.source = f"the reward model of {run} after step {step + 1}"
        log.append({"step": step + 1, "loss": total, "gradient_norm": norm, "tokens": tokens})

    # 3. what it has learnt, on pairs that it never saw
    table = agreement(reward_model, held_out, config.micro_batch_tokens)
    append_jsonl(run / "metrics.jsonl", *log, {"step": steps, "n": len(held_out),
                                         **{f"eval_{name}": value for name, value in table.items()}})
    save_reward_model(reward_model, tokenizer, run / "checkpoint")
    flaws = ", ".join(f"{name} {value:.1%}" for name, value in table.items() if name not in ("all", "loss"))
    print(f"orders {table['all']:.1%} of {len(held_out)} held-out pairs right ({flaws}), loss {table['loss']:.3f} nats "
          f"a pair, {(time.time() - started) / 60:.1f} minutes; the model is in {run / 'checkpoint'}")


def say() -> None:
    """--say PROMPT REPLY...: each reply with its score."""
    at = sys.argv.index("--say")
    if len(sys.argv) < at + 3:
        fail("got --say without a prompt and a reply, expected --say PROMPT REPLY...")
    prompt, replies = sys.argv[at + 1], sys.argv[at + 2:]
    config = parse_config(Config, __doc__, sys.argv[1:at])
    with bad_input_exits():
        reward_model, tokenizer = load_reward_model(config.model, device=config.device)
        prompt = fill_template(f"{prompt}\n", config.style, tokenizer)
    scores = preference_scores(reward_model, tokenizer, [prompt] * len(replies), replies, config.style)
    for reply, score in zip(replies, scores):
        print(f"{score:8.2f}  {reply}")


if __name__ == "__main__":
    main()
