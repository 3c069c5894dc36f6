"""Reinforcement learning on Countdown. By default R1-Zero: pure GRPO on a base model, accuracy and format rewards only.

    python train_countdown.py                    # 2 CPU cores: 4 minutes, held-out pass@1 42% -> 97%
    python train_countdown.py --resume runs/zero # continue after Ctrl-C or a kill
    python train_countdown.py --model runs/sft/checkpoint --language-weight 0.5 --out runs/rl     # R1's first RL
    python train_countdown.py --preset gpu-24gb --out runs/qwen                            # a real checkpoint, one GPU
    torchrun --nproc-per-node 4 train_countdown.py --preset gpu-80gb --out runs/qwen       # several GPUs

The algorithm, one optimizer step (DeepSeek-R1, arXiv 2501.12948, section 2.2; the loss is in grpo.py):

    1. draw P train puzzles                     5. score the tokens under ref_policy, only with --kl-coef
    2. sample G completions of each             6. update the policy on all tokens of the step
    3. reward them: accuracy, format            7. log; now and then evaluate on held-out puzzles, print a sample, save
    4. advantages: who beat the group's mean

Where we differ from the paper, on purpose: the loss is averaged over tokens, not over completions (grpo.py says why);
no KL by default, since rules are harder to fool than a learnt judge and the reference would cost a third forward pass;
batch 256, and a learning rate for 0.8M parameters that falls to a tenth. You see accuracy and thinking time rise
together; the last line says pass@1 before -> after.

Shapes: P prompts, G completions per prompt, B = P * G sequences, T tokens. With several processes (distributed.py) P and
B are this process's own; what begins with all_ is everybody's.
"""

import math
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import evaluate
from batching import aligned, micro_batches, pad_batch, score, token_logprobs
from countdown import Puzzle, check_task, make_prompt, sample_puzzle, sample_puzzles
from general import read_questions, reward_completions
from grpo import group_advantages, grpo_loss, token_weights
from memory import MEMORY_ONLY, check_fits
from model import DTYPES, add_lora, check_dtype, load, merged, without_lora
from optimizer import MasterAdamW, clip_gradients
from plots import plot_run
from preference import load_reward_model, preference_scores
from presets import PRESETS
from rewards import ONLY_IN
from run_folder import (StopRequest, append_jsonl, bad_input_exits, create_run, fail, find_checkpoint,
                        load_checkpoint, out_of_memory_exits, parse_config, read_jsonl, rewind_log, save_checkpoint)
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
    general: str = ""                # JSONL of general prompts (general.py questions), for the last --general-steps
    general_steps: int = 0           # last steps that mix them in; DeepSeek-R1: the last 400 of 1,700
    general_share: float = 0.25      # share of the prompts that is general then
    preference: str = ""             # reward model (preference.py) that scores the replies to them
    micro_batch_tokens: int = 2048   # tokens per training pass, padding included; memory and speed, never the loss
    slots: int = 256                 # rows that decode at the same time; memory and speed, never the tokens
    dtype: str = "float32"           # what the model computes in: float32, or bfloat16 with fp32 master weights
    activation_checkpointing: bool = False  # keep a block's input only, compute the rest again in the backward pass
    offload_optimizer: bool = False  # master weights and AdamW's moments in host memory
    lora_rank: int = 0               # train adapters of this rank on a frozen model (LoRA); 0: all weights
    lora_alpha: float = 32.0         # their scale is lora_alpha / lora_rank
    fsdp: bool = False               # with torchrun: split weights, gradients and optimizer over the GPUs (FSDP2)
    eval_every: int = 20             # steps between evaluations on held-out puzzles
    eval_n: int = 512                # held-out puzzles per evaluation, one sample each
    save_every: int = 20             # steps between checkpoints
    sample_every: int = 5            # steps between samples on the screen
    seed: int = 0                    # puzzles and sampling
    device: str = "cpu"              # cpu or cuda; under torchrun each process takes its own GPU

    def __post_init__(self):
        check_task(self.level, self.style)
        if self.average not in ("token", "sequence", "constant"):
            raise ValueError(f"got average {self.average!r}, expected token, sequence or constant")
        check_dtype(self.dtype)
        for name in ("steps", "batch_size", "max_new_tokens", "slots", "lora_alpha", "temperature", "learning_rate",
                     "inner_epochs", "micro_batch_tokens", "clip_norm", "eval_every", "eval_n", "save_every",
                     "sample_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name} {getattr(self, name)}, expected more than 0")
        if self.general_steps and not (self.general and self.preference and 0 < self.general_share <= 1):
            raise ValueError(f"got general_steps {self.general_steps}, expected with it --general FILE.jsonl, "
                             "--preference MODEL and a general_share within (0, 1]")
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
        if self.lora_rank < 0 or self.lora_rank and (self.fsdp or self.ref_every):
            raise ValueError(f"got lora_rank {self.lora_rank}, expected at least 0, and without --fsdp (adapters are "
                             "too small to split) and --ref-every (the frozen model is the reference)")
        if self.fsdp and self.offload_optimizer:
            raise ValueError("got --fsdp with --offload-optimizer, expected one of them: FSDP has split the optimizer")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.kl_coef < 0 or self.ref_every < 0:
            raise ValueError("expected clip_low within (0, 1), clip_high above 0, kl_coef and ref_every of at least 0")


# what may change when a run is resumed, since it changes memory and speed and not the algorithm
CHANGEABLE = (*MEMORY_ONLY, "device")


@contextmanager
def sampling_weights(model):
    """The policy as it samples: adapters merged into the weights, weights that are split over GPUs put together."""
    with distributed.whole_weights(model) as whole, merged(whole):
        yield whole


def measure(model, tokenizer, config: Config) -> dict:
    """Held-out pass@1 and looks of the policy as it samples: the same puzzles and random numbers every time."""
    table, _ = evaluate.evaluate(model, tokenizer, evaluate.Config(
        level=config.level, style=config.style, n=config.eval_n, temperature=config.temperature,
        max_new_tokens=config.max_new_tokens, slots=config.slots, language=config.language))
    return {f"eval_{name}": value for name, value in table.items()}


@out_of_memory_exits("lower --micro-batch-tokens (if it was training) or --slots (if it was sampling), or add "
                     "--activation-checkpointing; the last checkpoint is whole, and --resume RUN takes these flags too")
def main(process=None) -> None:
    """process: process(tasks, prompt_ids, completions, advantages (P, G)) -> (an advantage per token for each of the B
    completions, {name: float} for the log); experiments/prm.py rewards single steps with it."""
    config = parse_config(Config, __doc__, presets=PRESETS, changeable=CHANGEABLE)

    # 0a. model and run folder; everything that can be wrong with the input is said here
    with bad_input_exits():
        device = distributed.start(config.device)  # under torchrun: this process's GPU
        first_rank = distributed.rank() == 0  # the process that prints, logs and saves; alone: always
        dtype, state = DTYPES[config.dtype], None
        if config.fsdp and config.dtype == "bfloat16" and not distributed.started():
            raise ValueError("got --fsdp without torchrun, expected torchrun --nproc-per-node N train_countdown.py ...; "
                             "N may be 1")
        directory = find_checkpoint(config.resume) if config.resume else config.model
        check_fits(config, model=directory, world_size=distributed.world_size())
        share = distributed.share(config.batch_size // config.group_size)  # this process's of a step's prompts; alone: all
        settings = dict(dtype=torch.float32 if config.fsdp else dtype, device=device)  # FSDP keeps fp32, and casts itself
        if config.resume:
            run = Path(config.resume)
            model, tokenizer, state = load_checkpoint(run, **settings)
        if not config.resume or config.lora_rank:  # a checkpoint has adapters merged; they belong on the first model
            model, tokenizer = load(config.model, **settings)
        held_out = sample_puzzles(config.eval_n, level=config.level, held_out=True, seed=0)  # are there that many?
        held_out = [make_prompt(puzzle, config.style, tokenizer) for puzzle in held_out]
        questions = read_questions(config.general) if config.general_steps else []
        judge = None
        if config.general_steps:
            judge = partial(preference_scores, *load_reward_model(config.preference, dtype=dtype, device=device))
        held_out += [question["prompt"] for question in questions]
        longest = max(map(len, tokenizer(held_out, add_special_tokens=False)["input_ids"]))
        if longest + config.max_new_tokens > model.config.context:
            raise ValueError(f"got prompts of up to {longest} tokens and max_new_tokens {config.max_new_tokens}, "
                             f"together more than the model's context of {model.config.context}; "
                             "lower --max-new-tokens")
        ref_model = None  # with LoRA the frozen model is the reference
        if config.kl_coef and not config.lora_rank:
            ref_model = load(config.model, dtype=dtype, device=device)[0]
        if state is None:
            run = create_run(config.out, config)
    if first_rank:
        print(config)

    # 0b. what is trained, and where a resumed run stopped
    model.activation_checkpointing = config.activation_checkpointing
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
    if config.fsdp:
        distributed.shard(model, dtype=dtype)
    optimizer = MasterAdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                            weight_decay=config.weight_decay, offload=config.offload_optimizer)
    step, minutes = 0, 0.0
    if state:
        step, minutes = state["step"], state["minutes"]
        model.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        if ref_model and state["ref_model"]:
            ref_model.load_state_dict(state["ref_model"])
        if first_rank:
            with bad_input_exits():
                for name in ("metrics.jsonl", "samples.jsonl"):
                    rewind_log(run / name, step)
    stop, started = StopRequest(), time.time() - 60 * minutes

    # 0c. what is saved, and how it is evaluated
    def checkpoint() -> None:
        adapters = {name: p.detach() for name, p in model.named_parameters() if config.lora_rank and p.requires_grad}
        with merged(model):
            save_checkpoint(run, model, tokenizer, {
                "step": step, "minutes": (time.time() - started) / 60, "optimizer": optimizer.state_dict(),
                "adapters": adapters,
                "ref_model": ref_model.state_dict() if ref_model and config.ref_every else None})

    def evaluation() -> dict:
        with sampling_weights(model) as policy:
            table = measure(policy, tokenizer, config) if first_rank else {}
            distributed.barrier()  # the others wait for the first, and get no table
        return table

    if not state:
        before = evaluation()
        if first_rank:
            append_jsonl(run / "metrics.jsonl", {"step": 0, **before})
            print(f"step 0: held-out pass@1 {before['eval_pass@1']:.1%}, "
                  f"{before['eval_completion_tokens']:.0f} tokens a completion")
        checkpoint()
    bar = tqdm(total=config.steps, initial=step, desc="grpo", disable=not first_rank)
    while step < config.steps:
        step_started = time.time()

        # 1. prompts: P train puzzles, drawn by seed and step alone, so that a resumed run draws the same ones; in R1's
        #    last steps some of them are general prompts instead
        rng, P = random.Random(f"{config.seed}, {step}"), config.batch_size // config.group_size
        general = max(1, round(config.general_share * P)) if step >= config.steps - config.general_steps else 0
        all_tasks = [sample_puzzle(rng, config.level, held_out=False) for _ in range(P - general)]
        all_tasks += rng.choices(questions, k=general) if general else []
        tasks = [all_tasks[i] for i in share for _ in range(config.group_size)]  # B
        prompts = [make_prompt(task, config.style, tokenizer) if isinstance(task, Puzzle) else task["prompt"]
                   for task in tasks]  # B

        # 2. rollouts: G completions of each prompt, with the log-probs of the policy that sampled them
        with sampling_weights(model) as policy:
            prompt_ids, completions, texts = complete(
                policy, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                seed=rng.getrandbits(32), first_index=share.start * config.group_size, slots=config.slots)
        sampled = time.time()
        if not all(math.isfinite(logprob) for completion in completions for logprob in completion.logprobs):
            fail(f"got log-probs of nan at step {step + 1}, expected finite ones: the weights are broken; the "
                 f"checkpoint before that is kept in {run / 'checkpoint'}. Lower --learning-rate")

        # 3. rewards: a puzzle's accuracy and format, with --language-weight its language; a general prompt's preference
        parts = reward_completions(tasks, prompts, texts, judge, format_weight=config.format_weight,
                                   language_weight=config.language_weight, language=config.language)
        rewards = torch.tensor([part["reward"] for part in parts]).view(-1, config.group_size)  # (P, G)

        # 4. advantages: within each group, how far above or below its mean. A group whose rewards are all equal has
        #    no gradient, so without a KL it is not even computed
        advantages, token_advantages, process_log = group_advantages(rewards, normalize_std=config.normalize_std), [], {}
        equal_groups = (advantages == 0).all(dim=1)  # (P,)
        if process:  # an advantage per token: B lists
            token_advantages, process_log = process(tasks, prompt_ids, completions, advantages)
            equal_groups = ~torch.tensor([any(row) for row in token_advantages]).view(-1, config.group_size).any(dim=1)
        trained = [i for i, completion in enumerate(completions)
                   if (config.kl_coef or not equal_groups[i // config.group_size])
                   and not (config.drop_truncated and completion.truncated)]
        batch, advantages = [(prompt_ids[i], completions[i]) for i in trained], advantages.flatten()[trained]
        token_advantages = [token_advantages[i] for i in trained] if process else []

        # everybody's, for the divisor and the log
        all_texts, all_completions, all_parts = zip(*distributed.gather(list(zip(texts, completions, parts))))
        all_equal_groups = distributed.gather(equal_groups.tolist())
        num_tokens = sum(len(completion.token_ids) for completion in all_completions)
        trained_tokens = sum(distributed.gather([sum(len(completion.token_ids) for _, completion in batch)]))

        # 5. the same tokens under ref_policy, for the KL
        ref_rows = None
        if config.kl_coef:
            with without_lora(model):
                ref_rows = score(ref_model or model, batch, config.temperature, config.micro_batch_tokens, device)

        # 6. update: one optimizer step per inner epoch, summed over micro-batches and processes, divided by the whole
        #    step's tokens (or completions)
        kept = [completion for completion in all_completions if not (config.drop_truncated and completion.truncated)]
        divisor = sum(len(c.token_ids) for c in kept) if config.average == "token" else len(kept)
        decay = 1 - (1 - config.final_lr) * step / config.steps
        learning_rate = config.learning_rate * min((step + 1) / config.warmup_steps, decay)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        lengths = [len(prompt) + len(completion.token_ids) for prompt, completion in batch]
        groups = micro_batches(lengths, config.micro_batch_tokens)
        for epoch in range(config.inner_epochs):
            sums, max_gap = {"loss": 0.0, "entropy": 0.0, "gap": 0.0}, 0.0
            distributed.even_passes(model, len(groups))  # --fsdp only: every process must make equally many
            for rows in groups:
                row_prompts, row_completions = zip(*(batch[i] for i in rows))
                input_ids, mask = pad_batch(row_prompts, [completion.token_ids for completion in row_completions],
                                            device=device)  # (B, T), (B, T-1)
                old_logprobs = aligned([completion.logprobs for completion in row_completions], row_prompts,
                                       device)  # (B, T-1)
                ref_logprobs = aligned([ref_rows[i] for i in rows], row_prompts, device) if ref_rows else None
                weights = token_weights(mask, config.average, max_new_tokens=config.max_new_tokens)  # (B, T-1)
                row_advantages = (aligned([token_advantages[i] for i in rows], row_prompts, device) if process  # (B, T-1)
                                  else advantages[rows].to(device))  # (B,)

                logprobs, entropy = token_logprobs(model, input_ids, mask, config.temperature, with_entropy=True)
                loss, stats = grpo_loss(
                    logprobs, old_logprobs, row_advantages, weights, num_tokens=divisor,
                    clip_low=config.clip_low, clip_high=config.clip_high, ref_logprobs=ref_logprobs,
                    kl_coef=config.kl_coef)
                loss.backward()

                gap = (logprobs.detach() - old_logprobs).abs() * mask
                sums["loss"] += loss.item()
                sums["entropy"] += (entropy * mask).sum().item()
                sums["gap"] += gap.sum().item()
                max_gap = max(max_gap, gap.max().item())
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + value
            sums = distributed.sum_over_ranks(sums)  # from here on: of the whole step
            max_gap = distributed.max_over_ranks(max_gap)
            norm = 0.0
            if trained_tokens:  # else all groups were equal, in every process
                gradients = optimizer.gradients()
                distributed.sum_gradients(gradients)
                norm = clip_gradients(gradients, config.clip_norm)
                if not math.isfinite(norm):
                    if epoch == 0:  # later, the policy is in the middle of a step: the last checkpoint is the good one
                        checkpoint()
                    fail(f"got a gradient norm of {norm} at step {step + 1}, expected a finite one; the last good "
                         f"weights are in {run / 'checkpoint'}. Lower --learning-rate or --clip-norm")
                optimizer.step()
            if epoch == 0:
                first, first_max_gap = sums, max_gap
        step += 1
        if ref_model and config.ref_every and step % config.ref_every == 0:
            with sampling_weights(model) as policy:
                ref_model.load_state_dict(policy.state_dict())

        # 7. log, evaluate, print a sample, save
        seconds = time.time() - step_started
        row = {"step": step, **evaluate.describe_step(all_parts, all_texts, all_completions, config.language),
               **process_log,
               "equal_groups": sum(all_equal_groups) / len(all_equal_groups),
               "entropy": first["entropy"] / max(1, trained_tokens),
               "logprob_gap": first["gap"] / max(1, trained_tokens), "logprob_gap_max": first_max_gap,
               "loss": sums["loss"], **{name: sums[name] / max(1, trained_tokens) for name in sums if name in
                                        ("ratio", "clip_frac", "k1_kl_old", "k3_kl_ref")},
               "gradient_norm": norm, "learning_rate": learning_rate, "tokens": num_tokens, "seconds": seconds,
               "sampling_seconds": sampled - step_started, "tokens_per_second": num_tokens / seconds}
        bar.update()
        bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row.get('accuracy', math.nan):.0%}",
                        length=f"{row['completion_tokens']:.0f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")
        if first_rank and (step % config.sample_every == 0 or step == 1):
            sample = {"step": step, "prompt": prompts[0], "completion": texts[0], **parts[0]}
            append_jsonl(run / "samples.jsonl", sample)
            tqdm.write(f"--- step {step}, reward {parts[0]['reward']:.2f}")
            tqdm.write(prompts[0].removesuffix("<think>") + texts[0] + "\n")
        if step % config.eval_every == 0 or step == config.steps:
            row |= evaluation()
        if first_rank:
            if "eval_pass@1" in row:
                tqdm.write(f"step {step}: held-out pass@1 {row['eval_pass@1']:.1%}, "
                           f"{row['eval_completion_tokens']:.0f} tokens a completion")
            append_jsonl(run / "metrics.jsonl", row)
        stopping = distributed.any_rank(stop.requested)  # Ctrl-C may have reached one process only
        if step % config.save_every == 0 or step == config.steps or stopping:
            checkpoint()
        if stopping and step < config.steps:
            bar.close()
            if first_rank:
                print(f"stopped after step {step}; continue with: python train_countdown.py --resume {run}")
            raise SystemExit(130)
    bar.close()

    distributed.stop()
    if not first_rank:
        return
    metrics = read_jsonl(run / "metrics.jsonl")
    plot_run(run)
    after = metrics[-1]
    print(f"held-out pass@1 {metrics[0]['eval_pass@1']:.1%} -> {after['eval_pass@1']:.1%} "
          f"(95% interval {after['eval_pass@1_low']:.1%} to {after['eval_pass@1_high']:.1%}, n = {after['eval_n']}), "
          f"{metrics[0]['eval_completion_tokens']:.0f} -> {after['eval_completion_tokens']:.0f} tokens a completion, "
          f"{(time.time() - started) / 60:.1f} minutes; the run is in {run}")


if __name__ == "__main__":
    main()
