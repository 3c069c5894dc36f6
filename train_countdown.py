"""Reinforcement learning on Countdown. By default R1-Zero: pure GRPO on a base model, accuracy and format rewards only.

    python train_countdown.py                    # 2 CPU cores: 5 minutes, held-out pass@1 from about 35% to over 90%
    python train_countdown.py --resume runs/zero # continue after Ctrl-C or a kill

The algorithm, one optimizer step (DeepSeek-R1, arXiv 2501.12948, section 2.2; the loss is in grpo.py):

    1. draw P train puzzles                     5. score the tokens under ref_policy, only with --kl-coef
    2. sample G completions of each             6. update the policy on all tokens of the step
    3. reward them: accuracy, format            7. log; now and then evaluate on held-out puzzles, print a sample, save
    4. advantages: who beat the group's mean

Where we differ from the paper, on purpose: the loss is averaged over tokens, not over completions (grpo.py says why);
no KL by default, since rules are harder to fool than a learnt judge and the reference would cost a third forward pass;
batch 256, and a learning rate for 0.8M parameters that falls to a tenth. You see accuracy and thinking time rise
together; the last line says pass@1 before -> after.

Shapes: P prompts, G completions per prompt, B = P * G sequences, T tokens.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from batching import micro_batches, pad_batch, pad_rows, token_logprobs
from countdown import check_task, make_prompt, sample_puzzle, sample_puzzles
from grpo import group_advantages, grpo_loss, token_weights
from model import load
from plots import plot_run
from rewards import ONLY_IN, reward
from run_folder import (StopRequest, append_jsonl, bad_input_exits, create_run, fail, load_checkpoint, parse_config,
                        read_jsonl, read_run_config, rewind_log, save_checkpoint)
from sampling import complete


@dataclass(frozen=True)
class Config:
    model: str = "models/tiny-base"  # checkpoint directory or hub id to start from
    out: str = "runs/zero"           # run folder to create
    resume: str = ""                 # continue this run folder; its own config.json holds, other flags are ignored
    level: str = "laptop"            # puzzles: laptop, laptop4 or tinyzero
    style: str = "tiny"              # prompt template: tiny, base or chat
    steps: int = 80                  # optimizer steps, one batch of fresh completions each
    batch_size: int = 256            # completions per step, B = P * G; DeepSeek-R1-Zero uses 512
    group_size: int = 16             # completions per prompt, G, as in DeepSeek-R1-Zero
    max_new_tokens: int = 512        # longer completions are cut off and score 0
    temperature: float = 1.0         # of the policy that samples and trains
    learning_rate: float = 1e-3      # AdamW peak; for 0.8M parameters. DeepSeek-R1-Zero: 3e-6
    warmup_steps: int = 5            # steps with linearly rising learning rate
    final_lr: float = 0.1            # then it falls linearly to this share of the peak; 1 keeps it, as the paper does
    weight_decay: float = 0.0        # decoupled; pulling a good policy towards zero helps nothing
    clip_norm: float = 1.0           # gradient norm limit
    inner_epochs: int = 1            # passes over the same completions; above 1: off-policy, so ratio and clip do work
    clip_low: float = 0.2            # the ratio's lower clip, 1 - clip_low
    clip_high: float = 0.2           # the ratio's upper clip, 1 + clip_high; DAPO's clip-higher: 0.28
    kl_coef: float = 0.0             # weight of the k3 KL to the reference, per token; DeepSeek-R1-Zero: 0.001
    ref_every: int = 0               # replace the reference by the policy every N steps, 0: never; R1-Zero: 400
    average: str = "token"           # token, sequence (GRPO as published) or constant (Dr. GRPO): grpo.token_weights
    normalize_std: bool = True       # divide advantages by their group's deviation; Dr. GRPO does not
    drop_truncated: bool = False     # leave truncated completions out of the loss (DAPO's overlong filtering)
    format_weight: float = 0.2       # reward for the tags, next to 1 for a right answer
    language_weight: float = 0.0     # reward for the share of words in --language; R1's second stage adds it with 1
    language: str = "en"             # the language that consistency is measured against
    micro_batch_tokens: int = 4096   # tokens per training pass, padding included; memory and speed, never the loss
    eval_every: int = 20             # steps between evaluations on held-out puzzles
    eval_n: int = 512                # held-out puzzles per evaluation, one sample each
    save_every: int = 20             # steps between checkpoints
    sample_every: int = 5            # steps between samples on the screen
    seed: int = 0                    # puzzles and sampling
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        check_task(self.level, self.style)
        if self.average not in ("token", "sequence", "constant"):
            raise ValueError(f"got average {self.average!r}, expected token, sequence or constant")
        for name in ("steps", "batch_size", "max_new_tokens", "temperature", "learning_rate", "inner_epochs",
                     "micro_batch_tokens", "clip_norm", "eval_every", "eval_n", "save_every", "sample_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name} {getattr(self, name)}, expected more than 0")
        if not 0 <= self.final_lr <= 1 or self.warmup_steps < 1:
            raise ValueError(f"got final_lr {self.final_lr} and warmup_steps {self.warmup_steps}, expected a share "
                             "within [0, 1] and at least 1 step")
        if self.language not in ONLY_IN:
            raise ValueError(f"got language {self.language!r}, expected one of {', '.join(ONLY_IN)}")
        if min(self.format_weight, self.language_weight, self.weight_decay) < 0 or self.batch_size < 2:
            raise ValueError("expected format_weight, language_weight and weight_decay of at least 0, batch_size of at "
                             "least 2")
        if self.group_size < 2:
            raise ValueError(f"got group_size {self.group_size}, expected at least 2: a group of one has no advantage")
        if self.batch_size % self.group_size:
            divisors = [g for g in range(2, self.batch_size + 1) if self.batch_size % g == 0]
            nearest = min(divisors, key=lambda g: abs(g - self.group_size))
            raise ValueError(f"got group_size {self.group_size}, which must divide batch_size {self.batch_size}; "
                             f"try {nearest}")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.kl_coef < 0 or self.ref_every < 0:
            raise ValueError("expected clip_low within (0, 1), clip_high above 0, kl_coef and ref_every of at least 0")


def measure(model, tokenizer, config: Config) -> dict:
    """Held-out pass@1 and looks of the policy as it samples: the same puzzles and random numbers every time."""
    table, _ = evaluate.evaluate(model, tokenizer, evaluate.Config(
        level=config.level, style=config.style, n=config.eval_n, temperature=config.temperature,
        max_new_tokens=config.max_new_tokens, language=config.language))
    return {f"eval_{name}": value for name, value in table.items()}


@torch.no_grad()
def score(model, batch: list[tuple], config: Config):
    """Log-probs of a batch's completions under a model that does not train, as rows like the sampler's."""
    rows: list = [None] * len(batch)
    lengths = [len(prompt) + len(completion.token_ids) for prompt, completion in batch]
    for group in micro_batches(lengths, config.micro_batch_tokens):
        prompts, completions = [batch[i][0] for i in group], [batch[i][1].token_ids for i in group]
        input_ids, _ = pad_batch(prompts, completions, device=config.device)  # (B, T)
        logprobs, _ = token_logprobs(model, input_ids, config.temperature)  # (B, T-1)
        for row, i in enumerate(group):
            start = len(batch[i][0]) - 1
            rows[i] = logprobs[row, start:start + len(batch[i][1].token_ids)].tolist()
    return rows


def aligned(values: list[list[float]], prompt_ids: list[list[int]], device):
    """A value per completion token -> (B, T-1), each where its token is predicted; 0 elsewhere."""
    rows = [[0.0] * (len(prompt) - 1) + row for prompt, row in zip(prompt_ids, values, strict=True)]
    return pad_rows(rows, 0.0, dtype=torch.float32, device=device)


def main() -> None:
    config = parse_config(Config, __doc__)

    # 0. model, run folder, optimizer; everything that can be wrong with the input is said here
    with bad_input_exits():
        if config.resume:
            run, config = Path(config.resume), read_run_config(config.resume, Config)
            model, tokenizer, state = load_checkpoint(run, device=config.device)
        else:
            model, tokenizer = load(config.model, device=config.device)
            state = None
        puzzles = sample_puzzles(config.eval_n, level=config.level, held_out=True, seed=0)  # are there that many?
        prompts = [make_prompt(puzzle, config.style, tokenizer) for puzzle in puzzles]
        longest = max(map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"]))
        if longest + config.max_new_tokens > model.config.context:
            raise ValueError(f"got prompts of up to {longest} tokens and max_new_tokens {config.max_new_tokens}, "
                             f"together more than the model's context of {model.config.context}; "
                             "lower --max-new-tokens")
        ref_model = load(config.model, device=config.device)[0] if config.kl_coef else None
        if state is None:
            run = create_run(config.out, config)
    print(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay)
    step, minutes = 0, 0.0
    if state:
        step, minutes = state["step"], state["minutes"]
        optimizer.load_state_dict(state["optimizer"])
        if ref_model and state["ref_model"]:
            ref_model.load_state_dict(state["ref_model"])
        with bad_input_exits():
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind_log(run / name, step)
    stop, started = StopRequest(), time.time() - 60 * minutes

    def checkpoint() -> None:
        save_checkpoint(run, model, tokenizer, {
            "step": step, "minutes": (time.time() - started) / 60, "optimizer": optimizer.state_dict(),
            "ref_model": ref_model.state_dict() if ref_model and config.ref_every else None})

    if not state:
        before = measure(model, tokenizer, config)
        append_jsonl(run / "metrics.jsonl", {"step": 0, **before})
        checkpoint()
        print(f"step 0: held-out pass@1 {before['eval_pass@1']:.1%}, "
              f"{before['eval_completion_tokens']:.0f} tokens a completion")
    bar = tqdm(total=config.steps, initial=step, desc="grpo")
    while step < config.steps:
        step_started = time.time()

        # 1. prompts: P train puzzles, drawn by seed and step alone, so that a resumed run draws the same ones
        rng = random.Random(f"{config.seed}, {step}")
        puzzles = [sample_puzzle(rng, config.level, held_out=False)
                   for _ in range(config.batch_size // config.group_size)]  # P
        puzzles = [puzzle for puzzle in puzzles for _ in range(config.group_size)]  # B
        prompts = [make_prompt(puzzle, config.style, tokenizer) for puzzle in puzzles]  # B

        # 2. rollouts: G completions of each prompt, with the log-probs of the policy that sampled them
        prompt_ids, completions, texts = complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens,
                                                  temperature=config.temperature, seed=rng.getrandbits(32))
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        sampled = time.time()
        if not all(math.isfinite(logprob) for completion in completions for logprob in completion.logprobs):
            fail(f"got log-probs of nan at step {step + 1}, expected finite ones: the weights are broken; the checkpoint "
                 f"before that is kept in {run / 'checkpoint'}. Lower --learning-rate")

        # 3. rewards: each completion's accuracy and format, and with --language-weight its language
        parts = [reward(text, *puzzle, format_weight=config.format_weight, language_weight=config.language_weight,
                        language=config.language) for text, puzzle in zip(texts, puzzles)]
        rewards = torch.tensor([part["reward"] for part in parts]).view(-1, config.group_size)  # (P, G)

        # 4. advantages: within each group, how far above or below its mean. A group whose rewards are all equal has
        #    no gradient, so without a KL it is not even computed
        advantages = group_advantages(rewards, normalize_std=config.normalize_std)  # (P, G)
        equal_groups = (advantages == 0).all(dim=1)  # (P,)
        trained = [i for i, completion in enumerate(completions)
                   if (config.kl_coef or not equal_groups[i // config.group_size])
                   and not (config.drop_truncated and completion.truncated)]
        batch, advantages = [(prompt_ids[i], completions[i]) for i in trained], advantages.flatten()[trained]

        # 5. the same tokens under ref_policy, for the KL
        ref_rows = score(ref_model, batch, config) if ref_model else None

        # 6. update: one optimizer step per inner epoch, summed over micro-batches, divided by the whole step's tokens
        #    (or completions)
        kept = [completion for completion in completions if not (config.drop_truncated and completion.truncated)]
        divisor = sum(len(c.token_ids) for c in kept) if config.average == "token" else len(kept)
        decay = 1 - (1 - config.final_lr) * step / config.steps
        learning_rate = config.learning_rate * min((step + 1) / config.warmup_steps, decay)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        lengths = [len(prompt) + len(completion.token_ids) for prompt, completion in batch]
        for epoch in range(config.inner_epochs):
            sums = {"loss": 0.0, "entropy": 0.0, "gap": 0.0, "max_gap": 0.0}
            for rows in micro_batches(lengths, config.micro_batch_tokens):
                row_prompts, row_completions = zip(*(batch[i] for i in rows))
                input_ids, mask = pad_batch(row_prompts, [completion.token_ids for completion in row_completions],
                                            device=config.device)  # (B, T), (B, T-1)
                old_logprobs = aligned([completion.logprobs for completion in row_completions], row_prompts,
                                       config.device)  # (B, T-1)
                ref_logprobs = aligned([ref_rows[i] for i in rows], row_prompts, config.device) if ref_rows else None
                weights = token_weights(mask, config.average, max_new_tokens=config.max_new_tokens)  # (B, T-1)

                logprobs, entropy = token_logprobs(model, input_ids, config.temperature, with_entropy=True)
                loss, stats = grpo_loss(
                    logprobs, old_logprobs, advantages[rows].to(config.device), weights, num_tokens=divisor,
                    clip_low=config.clip_low, clip_high=config.clip_high, ref_logprobs=ref_logprobs,
                    kl_coef=config.kl_coef)
                loss.backward()

                gap = (logprobs.detach() - old_logprobs).abs() * mask
                sums["loss"] += loss.item()
                sums["entropy"] += (entropy * mask).sum().item()
                sums["gap"] += gap.sum().item()
                sums["max_gap"] = max(sums["max_gap"], gap.max().item())
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + value
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not torch.isfinite(norm):
                if epoch == 0:  # later, the policy is in the middle of a step, and the last checkpoint is the good one
                    checkpoint()
                fail(f"got a gradient norm of {norm} at step {step + 1}, expected a finite one; the last good weights "
                     f"are in {run / 'checkpoint'}. Lower --learning-rate or --clip-norm")
            optimizer.step()
            optimizer.zero_grad()
            if epoch == 0:
                first = sums
        step += 1
        if ref_model and config.ref_every and step % config.ref_every == 0:
            ref_model.load_state_dict(model.state_dict())

        # 7. log, evaluate, print a sample, save
        seconds = time.time() - step_started
        trained_tokens = max(1, sum(len(completion.token_ids) for _, completion in batch))
        row = {"step": step, "reward": rewards.mean().item(),
               "accuracy": sum(part["accuracy"] for part in parts) / len(parts),
               **evaluate.describe(texts, completions, config.language),
               "equal_groups": equal_groups.float().mean().item(), "entropy": first["entropy"] / trained_tokens,
               "logprob_gap": first["gap"] / trained_tokens, "logprob_gap_max": first["max_gap"],
               "loss": sums["loss"], **{name: sums[name] / trained_tokens for name in sums if name in
                                        ("ratio", "clip_frac", "k1_kl_old", "k3_kl_ref")},
               "gradient_norm": norm.item(), "learning_rate": learning_rate, "tokens": num_tokens, "seconds": seconds,
               "sampling_seconds": sampled - step_started, "tokens_per_second": num_tokens / seconds}
        bar.update()
        bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row['accuracy']:.0%}",
                        length=f"{row['completion_tokens']:.0f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")
        if step % config.sample_every == 0 or step == 1:
            sample = {"step": step, "prompt": prompts[0], "completion": texts[0], **parts[0]}
            append_jsonl(run / "samples.jsonl", sample)
            tqdm.write(f"--- step {step}, reward {parts[0]['reward']:.2f}")
            tqdm.write(prompts[0].removesuffix("<think>") + texts[0] + "\n")
        if step % config.eval_every == 0 or step == config.steps:
            row |= measure(model, tokenizer, config)
            tqdm.write(f"step {step}: held-out pass@1 {row['eval_pass@1']:.1%}, "
                       f"{row['eval_completion_tokens']:.0f} tokens a completion")
        append_jsonl(run / "metrics.jsonl", row)
        if step % config.save_every == 0 or step == config.steps or stop.requested:
            checkpoint()
        if stop.requested and step < config.steps:
            bar.close()
            print(f"stopped after step {step}; continue with: python train_countdown.py --resume {run}")
            raise SystemExit(130)
    bar.close()

    metrics = read_jsonl(run / "metrics.jsonl")
    plot_run(run)
    after = metrics[-1]
    print(f"held-out pass@1 {metrics[0]['eval_pass@1']:.1%} -> {after['eval_pass@1']:.1%} "
          f"(95% interval {after['eval_pass@1_low']:.1%} to {after['eval_pass@1_high']:.1%}, n = {after['eval_n']}), "
          f"{metrics[0]['eval_completion_tokens']:.0f} -> {after['eval_completion_tokens']:.0f} tokens a completion, "
          f"{(time.time() - started) / 60:.1f} minutes; the run is in {run}")


if __name__ == "__main__":
    main()
