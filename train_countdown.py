"""Reinforcement learning on Countdown or any task. By default R1-Zero: pure GRPO on a base, rewards by rules only.

    python train_countdown.py                    # 2 CPU cores: 4 minutes, validation pass@1 33% -> 70%
    python train_countdown.py --resume runs/zero # continue after Ctrl-C or a kill
    python train_countdown.py --model runs/cold-start/checkpoint --weights language=0.5 --out runs/rl  # another reward
    python train_countdown.py --task my_questions.jsonl --out runs/mine        # questions of your own: docs/fork-it.md
    python train_countdown.py --preset gpu-24gb --out runs/qwen                            # a real checkpoint, one GPU
    torchrun --nproc-per-node 4 train_countdown.py --preset gpu-80gb --out runs/qwen       # several GPUs

The algorithm, one step (DeepSeek-R1, arXiv 2501.12948, section 2.2; the loss is in grpo.py):

    1. draw P train problems
    2. sample G completions of each; with --judges those that have ended are judged while others are still written
    3. reward them: accuracy, format, whatever else the task weighs
    4. advantages: who beat the group's mean, and by how much
    5. log-probs of the same tokens under ref_policy, only with --kl-coef
    6. update the policy on the tokens of all groups that say something (with a KL: of all)
    7. log; now and then evaluate on validation puzzles, print a sample, save

One update a batch, so that the ratio is 1, up to rounding, and the clip idle unless --inner-epochs or --stale says
otherwise; no KL unless asked for: the README's last table says where we differ from the paper, and why.
`python -m machinery.rollouts RUN --show 12` prints all completions of step 12.

Shapes: P problems, G completions of each, B = P * G sequences, N of them trained on, b of these in a micro-batch, T
tokens, M max_new_tokens. With several processes (machinery/distributed.py) P, B and N are this process's own; what
begins with all_ is everybody's, and "all ranks" means that every process has to call. What saves and resumes is in
machinery/rl_run.py.
"""

import machinery  # noqa: F401, I001  (first: from here on Ctrl-C ends in one line)
import math
import random
import time
from collections import deque
from dataclasses import dataclass

import torch
from tqdm import tqdm

import evaluate
from grpo import group_advantages, grpo_loss, token_weights
from machinery import distributed
from machinery.batching import aligned, micro_batches, pad_batch, score, token_logprobs
from machinery.checkpoints import DTYPES, check_dtype, end_tokens
from machinery.data import fingerprint
from machinery.flags import (StopRequest, bad_input_exits, broken_weights_exit, check_positive, disk_full_exits,
                             out_of_memory_exits, parse_config)
from machinery.judging import Judges, Judging, check_judges, late_share
from machinery.lora import without_lora
from machinery.memory import MEMORY_ONLY
from machinery.notes import check_learning_rate
from machinery.optimizer import clip_gradients
from machinery.presets import PRESETS
from machinery.rl_run import (Run, finish, log, open_run, sampling_weights, save, save_or_stop, stop_on_broken_gradient,
                              trained_source)
from machinery.rollouts import KEPT, Rollout, collect
from machinery.run_folder import append_jsonl, create_run
from machinery.tasks import BUILT_IN, Task, draw_problems, find_tasks, score_completions, shares
from machinery.text import check_room, check_style_fits
from preference import load_judge
from rewards import ONLY_IN
from sampling import complete


@dataclass(frozen=True)
class Config:
    # the algorithm
    model: str = "models/tiny-base"  # checkpoint directory or hub id to start from
    task: str = "countdown"          # countdown, arithmetic, code, general, a .py or .jsonl; or countdown=3,general=1
    level: str = ""                  # of the task, such as four; of several with commas; empty: their first
    style: str = "tiny"              # prompt template: tiny, base or chat
    steps: int = 12                  # one batch of fresh completions each, and an optimizer step per inner epoch
    batch_size: int = 256            # completions per step, of all processes; DeepSeek-R1-Zero uses 512
    group_size: int = 16             # completions per prompt, G, as in DeepSeek-R1-Zero
    max_new_tokens: int = 1024       # longer completions are cut off, and so never get to their answer
    temperature: float = 1.0         # of the policy that samples and trains
    learning_rate: float = 7e-4      # of AdamW; for 0.8M parameters. DeepSeek-R1-Zero: 3e-6
    warmup_steps: int = 2            # first steps, with linearly rising learning rate
    final_lr: float = 1.0            # share of learning_rate at the end of its linear fall; 1: no fall, as in the paper
    weight_decay: float = 0.0        # decoupled; pulling a good policy towards zero helps nothing
    clip_norm: float = 1.0           # gradient norm limit
    inner_epochs: int = 1            # passes over the same completions; above 1: off-policy, ratio and clip matter
    stale: int = 0                   # steps that sampling is ahead of training, while slow verdicts come; off-policy, too
    clip_low: float = 0.2            # the ratio's lower clip, 1 - clip_low
    clip_high: float = 0.2           # the ratio's upper clip, 1 + clip_high; DAPO's clip-higher: 0.28
    kl_coef: float = 0.0             # weight of the k3 KL to the reference, per token; DeepSeek-R1-Zero: 0.001
    ref_every: int = 0               # steps until the policy replaces the reference, 0: never; DeepSeek-R1-Zero: 400
    average: str = "token"           # token, sequence (GRPO as published) or constant (Dr. GRPO): grpo.token_weights
    normalize_std: bool = True       # divide advantages by their group's deviation; Dr. GRPO does not
    drop_truncated: bool = False     # leave truncated completions out of the loss (DAPO's overlong filtering)
    weights: str = ""                # of the reward's parts, over the task's own: format=1 (R1-Zero), language=0.5 (R1)
    language: str = "en"             # the language that consistency is measured against
    mix_steps: int = 0               # only so many last steps draw from all tasks, those before from the first; 0: all
    eval_task: str = ""              # measured in place of --task
    preference: str = ""             # reward model (preference.py), for tasks that weigh "preference"
    sandbox: str = ""                # command that the answers of a task with tests run behind: docs/code.md
    lora_rank: int = 0               # train adapters of this rank on a frozen model (LoRA); 0: all weights
    lora_alpha: float = 32.0         # their scale is lora_alpha / lora_rank
    seed: int = 0                    # train problems, sampling, adapters

    # the machine and the run folder
    out: str = "runs/zero"           # run folder to create
    resume: str = ""                 # continue this run folder with its own config.json; only CHANGEABLE flags go with it
    eval_every: int = 6              # steps between evaluations on validation problems
    eval_n: int = 0                  # of them per evaluation, one sample each; 0: 512, or what the task has
    save_every: int = 6              # steps between checkpoints
    sample_every: int = 4            # steps between samples on the screen
    rollouts: str = "every"          # completions kept in rollouts.jsonl: every, sampled (steps with a sample) or none
    micro_batch_tokens: int = 2048   # tokens per training pass, padding included; memory and speed, never the loss
    slots: int = 256                 # rows that decode at the same time; memory and speed, never the tokens
    judges: int = 0                  # verdicts at the same time, while others write; 0: one a core, on a CPU at the end
    verdict_seconds: float = 300.0   # for each; a later one counts as wrong
    dtype: str = "float32"           # what the model computes in: float32, or bfloat16 with fp32 master weights
    activation_checkpointing: bool = False  # keep a block's input only, compute the rest again in the backward pass
    offload_optimizer: bool = False  # master weights and AdamW's moments in host memory
    fsdp: bool = False               # with torchrun: split weights, gradients and optimizer over the GPUs (FSDP2)
    device: str = "cpu"              # cpu or cuda; under torchrun each process takes its own GPU

    def __post_init__(self):
        check(self)


# what may change when a run is resumed, since it changes memory, speed and logs and not the algorithm
CHANGEABLE = (*MEMORY_ONLY, "device", "rollouts", "judges")


@broken_weights_exit()
@out_of_memory_exits("lower --micro-batch-tokens (if it was training) or --slots (if it was sampling), or add "
                     "--activation-checkpointing; the last checkpoint is whole, and --resume RUN takes these flags too")
@disk_full_exits("make room, or keep fewer completions (--rollouts sampled or none); the last checkpoint is whole, and "
                 "--resume RUN takes that flag too")
def main() -> None:
    config = parse_config(Config, __doc__, presets=PRESETS, changeable=CHANGEABLE)
    run, tasks, reward_model = start(config)
    G, policy, ahead = config.group_size, run.policy, deque()  # batches that are sampled and not yet trained on

    while run.step < config.steps:
        step_started = time.time()

        # 1. and 2. a completion of each of B prompts; with --stale also those of the next steps, while judges think
        while len(ahead) <= config.stale and run.step + len(ahead) < config.steps:
            ahead.append(roll_out(run, tasks, run.step + len(ahead), config))
        problems, prompts, prompt_ids, completions, texts, judging = ahead.popleft()  # B each
        sampling_seconds = time.time() - step_started

        # 3. rewards: a puzzle's accuracy and format, its language with --weights; a general prompt's preference
        scores = score_completions(problems, prompts, texts, reward_model, config.language, judging.verdicts(texts))  # B
        rewards = torch.tensor([score.reward for score in scores]).view(-1, G)  # (P, G)

        # 4. advantages: how far above or below the mean of its group a completion is
        advantages = group_advantages(rewards, normalize_std=config.normalize_std).flatten()  # (B,)
        trained = with_gradient(advantages, completions, config)  # indices of N <= B completions
        batch = [(prompt_ids[i], completions[i]) for i in trained]

        # 5. the same tokens under ref_policy, for the KL; with LoRA, and only then, that is the policy without adapters
        ref_logprobs = None
        if config.kl_coef:
            with without_lora(policy):
                ref_logprobs = score(run.ref_policy or policy, batch, config.temperature, config.micro_batch_tokens,
                                     run.device)  # N lists

        # 6. one optimizer step (per inner epoch), on the tokens of all micro-batches and processes
        stats = update(run, batch, advantages[trained], ref_logprobs, loss_divisor(completions, config), config)
        stop_on_broken_gradient(stats["gradient_norm"], run, config)
        run.step += 1
        policy.source = trained_source(run)
        if run.ref_policy and config.ref_every and run.step % config.ref_every == 0:
            with sampling_weights(run) as new_policy:
                run.ref_policy.load_state_dict(new_policy.state_dict())

        # 7. log; now and then evaluate, print a sample, save
        all_rollouts = distributed.gather(collect(problems, prompts, texts, completions, scores, rewards, advantages,
                                                  trained, first_group=run.own_groups.start))
        row = log_row(run, all_rollouts, stats, step_started, sampling_seconds, config)
        if run.step % config.eval_every == 0 or run.step == config.steps:
            row |= evaluate_policy(run, config)
        log(run, row, all_rollouts, config)
        save_or_stop(run, config, f"python train_countdown.py --resume {run.folder}")
    finish(run)


def roll_out(run: Run, tasks: tuple[Task, ...], step: int, config: Config) -> tuple:
    """All ranks: -> (problems, prompts, prompt ids, completions, texts), B each, and the Judging that has their verdicts."""
    # 1. train problems, drawn by seed and step alone, so that a resumed run draws the same ones
    rng, G = random.Random(f"{config.seed}, {step}"), config.group_size
    mixed = not config.mix_steps or step >= config.steps - config.mix_steps
    all_problems = draw_problems(tasks if mixed else tasks[:1], config.batch_size // G, rng)  # (task, problem) pairs
    problems = [all_problems[p] for p in run.own_groups for _ in range(G)]  # B: its own P, each G times
    prompts = [task.prompt(problem, config.style, run.tokenizer) for task, problem in problems]  # B

    # 2. a completion of each of the B prompts; the judges hear of each when it ends
    judging = Judging(run.judges, problems)
    with sampling_weights(run) as old_policy:  # the policy's weights, as the sampler wants them (LoRA, FSDP)
        prompt_ids, completions, texts = complete(
            old_policy, run.tokenizer, prompts, style=config.style, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, seed=rng.getrandbits(32), first_index=run.own_groups.start * G,
            slots=config.slots, progress="sampling", finished=judging.begin)  # B each
    return problems, prompts, prompt_ids, completions, texts, judging


# ---------------------------------------------------------------------------------------------------------- the beginning
def check(config: Config) -> None:
    tasks = find_tasks(config.task, config.level, config.weights, config.style, config.eval_task, config.sandbox)
    if config.average not in ("token", "sequence", "constant"):
        raise ValueError(f"got average {config.average!r}, expected token, sequence or constant")
    check_dtype(config.dtype)
    check_judges(config.judges, config.verdict_seconds)
    if not 0 <= config.stale <= 8 or config.stale and config.inner_epochs > 1:
        raise ValueError(f"got stale {config.stale} and inner_epochs {config.inner_epochs}, expected 0 to 8 steps, and one epoch "
                         "where it is above 0: the ratio cannot carry both")
    if config.rollouts not in KEPT:
        raise ValueError(f"got rollouts {config.rollouts!r}, expected one of {', '.join(KEPT)}")
    check_positive(config, "steps", "batch_size", "max_new_tokens", "slots", "lora_alpha", "temperature", "learning_rate",
                   "inner_epochs", "micro_batch_tokens", "clip_norm", "eval_every", "save_every", "sample_every")
    if any("preference" in task.weights for task in tasks) and not config.preference:
        raise ValueError(f"got --task {config.task}, which weighs preference, expected with it --preference MODEL: "
                         "python preference.py makes one")
    if not 0 <= config.final_lr <= 1 or config.warmup_steps < 1:
        raise ValueError(f"got final_lr {config.final_lr} and warmup_steps {config.warmup_steps}, expected a share "
                         "within [0, 1] and at least 1 step")
    if config.language not in ONLY_IN:
        raise ValueError(f"got language {config.language!r}, expected one of {', '.join(ONLY_IN)}")
    if min(config.weight_decay, config.mix_steps, config.eval_n) < 0 or config.batch_size < 2:
        raise ValueError("expected weight_decay, mix_steps and eval_n of at least 0, batch_size of at least 2")
    if config.group_size < 2:
        raise ValueError(f"got group_size {config.group_size}, expected at least 2: a group of one has no advantage")
    if config.batch_size % config.group_size:
        nearest = min((size for size in range(2, config.batch_size + 1) if config.batch_size % size == 0),
                      key=lambda size: abs(size - config.group_size))
        raise ValueError(f"got group_size {config.group_size}, which must divide batch_size {config.batch_size}; try {nearest}")
    shares(tasks, config.batch_size // config.group_size)
    if config.lora_rank < 0 or config.lora_rank and (config.fsdp or config.ref_every):
        raise ValueError(f"got lora_rank {config.lora_rank}, expected at least 0, and without --fsdp (adapters are too small to "
                         "split) and --ref-every (the frozen model is the reference)")
    if config.fsdp and config.offload_optimizer:
        raise ValueError("got --fsdp with --offload-optimizer, expected one of them: FSDP has split the optimizer")
    if not 0 < config.clip_low < 1 or config.clip_high <= 0 or config.kl_coef < 0 or config.ref_every < 0:
        raise ValueError("expected clip_low within (0, 1), clip_high above 0, kl_coef and ref_every of at least 0")


def start(config: Config):
    """-> (run, tasks, the reward model for completions of tasks that weigh "preference" or None). What can be wrong with
    the input is reported here, before anything is written; a new run is evaluated and saved before its first step."""
    with bad_input_exits():
        run, reward_model = open_run(config), None
        tasks = find_tasks(config.task, config.level, config.weights, config.style, config.eval_task, config.sandbox)
        run.judges = Judges(config.judges, config.verdict_seconds, "" if config.stale else run.device)
        prompts = [task.prompt(problem, config.style, run.tokenizer) for task in evaluated_tasks(config)
                   for problem in task.problems(config.eval_n, "validation", seed=0)]  # do they fit? And of 20 steps:
        prompts += [task.prompt(problem, config.style, run.tokenizer) for seed in range(20) for task, problem in
                    draw_problems(tasks, config.batch_size // config.group_size, random.Random(seed))]
        prompts += [task.prompt(problem, config.style, run.tokenizer) for task in tasks
                    for problem in getattr(task.seam, "rows", {}).get("train", ())]  # of a file: all
        if any("preference" in task.weights for task in tasks):
            reward_model = load_judge(config.preference, run.tokenizer, config.style, dtype=DTYPES[config.dtype],
                                      device=run.device)
        check_room(run.tokenizer, prompts, config.style, config.max_new_tokens, run.policy.config.context)
        # what a resumed run reads anew has to be what it was: task files, reward model, reference, what adapters stand on
        first = [config.model] * bool(config.kl_coef or config.lora_rank)
        files = [task.spec for task in (*tasks, *evaluated_tasks(config)) if task.spec not in BUILT_IN]
        run.inputs = run.inputs or {path: fingerprint(path) for path in (*files, *first, config.preference) if path}
        check_style_fits(run.policy, run.tokenizer, config.style, end_tokens(run.policy, run.tokenizer))
        check_learning_rate(run.policy, config.learning_rate, 1e-3 if config.lora_rank else 1e-4)
        if not config.resume:
            create_run(config.out, config)
    if run.first_rank:
        print(config)
    run.stop = StopRequest()
    if not config.resume:
        before = evaluate_policy(run, config)
        if run.first_rank:
            append_jsonl(run.folder / "metrics.jsonl", {"step": 0, **before})
        save(run, config)
    run.bar = tqdm(total=config.steps, initial=run.step, desc="grpo", disable=not run.first_rank)
    return run, tasks, reward_model


# ----------------------------------------------------------------------------------------------------- one optimizer step
def with_gradient(advantages, completions, config: Config) -> list[int]:
    """Which of the B completions are trained on: without a KL none of a group whose advantages are all zero, which has no
    gradient and need not be computed; with --drop-truncated none that is truncated. advantages (B,), or (B, M) where
    each token of a completion has its own (experiments/line_rewards.py)."""
    has_gradient = (advantages != 0).reshape(-1, config.group_size * advantages[0].numel()).any(dim=1).tolist()  # P
    return [i for i, completion in enumerate(completions) if (config.kl_coef or has_gradient[i // config.group_size])
            and not (config.drop_truncated and completion.truncated)]


def loss_divisor(completions, config: Config) -> int:
    """All ranks: what the step's loss is divided by: the completion tokens of the whole step, or with --average sequence
    or constant its completions. Those without gradient count too, those that --drop-truncated drops do not."""
    lengths = [len(c.token_ids) for c in completions if not (config.drop_truncated and c.truncated)]
    return sum(distributed.gather(lengths if config.average == "token" else [1] * len(lengths)))


def learning_rate(step: int, config: Config) -> float:
    """The lower of two lines: up to the whole rate in warmup_steps, and down from it to final_lr of it over all steps."""
    decay = 1 - (1 - config.final_lr) * step / config.steps
    return config.learning_rate * min((step + 1) / config.warmup_steps, decay)


def update(run: Run, batch: list[tuple], advantages, ref_logprobs, divisor: int, config: Config) -> dict[str, float]:
    """All ranks: one optimizer step per inner epoch on (prompt ids, Completion) pairs -> what the log says of it.

    advantages (N,), or (N, M) with one for each of a completion's tokens, in the batch's order; ref_logprobs: N lists,
    or None. The gradient is the sum over micro-batches and processes, since each loss is divided by the whole step's
    divisor. Where its norm is not finite, no step is taken. Entropy and logprob_gap are of the first epoch, when the
    policy is still the one that sampled (but for --stale), all else is of the last."""
    optimizer, norm = run.optimizer, 0.0
    optimizer.set_learning_rate(learning_rate(run.step, config))
    lengths = [len(prompt) + len(completion.token_ids) for prompt, completion in batch]
    cuts = micro_batches(lengths, config.micro_batch_tokens)  # each the places of b sequences in the batch
    tokens = sum(distributed.gather([sum(len(completion.token_ids) for _, completion in batch)]))
    for epoch in range(config.inner_epochs):
        sums, gaps = {"loss": 0.0, "entropy": 0.0, "logprob_gap": 0.0}, [0.0]
        distributed.add_missing_passes(run.policy, len(cuts))  # --fsdp only: all ranks must make equally many
        for cut in tqdm(cuts, desc="training", delay=2, leave=False, disable=not run.first_rank):
            loss, stats, gap = micro_batch_loss(run, batch, cut, advantages, ref_logprobs, divisor, config)
            loss.backward()
            gaps.append(gap)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        if tokens:  # else no completion of any process has a gradient
            gradients = optimizer.gradients()
            distributed.sum_gradients(gradients)
            norm = clip_gradients(gradients, config.clip_norm)
            if math.isfinite(norm):
                optimizer.step()  # and zero the gradients
        sums = distributed.sum_over_ranks(sums)
        averages = {name: value if name == "loss" else value / max(1, tokens) for name, value in sums.items()}
        if epoch == 0:
            first_epoch = {"entropy": averages["entropy"], "logprob_gap": averages["logprob_gap"],
                           "logprob_gap_max": distributed.max_over_ranks(gaps)}
        if not math.isfinite(norm):
            break
    if not tokens:  # nothing was computed, so nothing is known of these
        averages, first_epoch = {"loss": 0.0}, {}
    return {**first_epoch, **{name: value for name, value in averages.items() if name not in first_epoch},
            "trained_tokens": tokens * config.inner_epochs, "gradient_norm": norm, "learning_rate": learning_rate(run.step, config)}


def micro_batch_loss(run: Run, batch: list, cut: list[int], advantages, ref_logprobs, divisor: int, config: Config):
    """-> the loss, sums over tokens for the log, and the largest gap between the log-probs of sampler and trainer."""
    prompts, completions = zip(*(batch[i] for i in cut))
    input_ids, mask = pad_batch(prompts, [c.token_ids for c in completions], device=run.device)  # (b, T), (b, T-1)
    old_logprobs = aligned([c.logprobs for c in completions], prompts, run.device)  # (b, T-1)
    ref = aligned([ref_logprobs[i] for i in cut], prompts, run.device) if ref_logprobs else None  # (b, T-1)
    if advantages.dim() == 1:
        own = advantages[cut].to(run.device)  # (b,)
    else:
        own = aligned([advantages[i, :len(c.token_ids)].tolist() for i, c in zip(cut, completions)], prompts,
                      run.device)  # (b, T-1)

    logprobs, entropy = token_logprobs(run.policy, input_ids, mask, config.temperature, with_entropy=True)  # (b, T-1)
    weights = token_weights(mask, config.average, max_new_tokens=config.max_new_tokens)
    loss, stats = grpo_loss(logprobs, old_logprobs, own, weights, divisor=divisor, clip_low=config.clip_low,
                            clip_high=config.clip_high, ref_logprobs=ref, kl_coef=config.kl_coef)
    gap = (logprobs.detach() - old_logprobs).abs()  # (b, T-1); they and entropy are 0 where the mask is 0
    sums = {"loss": loss.item(), "entropy": entropy.sum().item(), "logprob_gap": gap.sum().item(), **stats}
    return loss, sums, gap.max().item()


# ------------------------------------------------------------------------------------------------------ measure and tell
def evaluate_policy(run: Run, config: Config) -> dict:
    """All ranks: validation pass@1 and what completions look like, with the same problems and random numbers every time;
    of a second task under eval_NAME_pass@1. The first rank measures; the others wait for it and get an empty table."""
    started, found = time.time(), {}
    with sampling_weights(run) as policy:
        for i, task in enumerate(evaluated_tasks(config) if run.first_rank else ()):
            table, _ = evaluate.evaluate(policy, run.tokenizer, evaluate.Config(
                task=task.spec, level=task.level, split="validation", style=config.style, n=config.eval_n,
                temperature=config.temperature, max_new_tokens=config.max_new_tokens, slots=config.slots,
                language=config.language, sandbox=getattr(task.seam, "sandbox", "")), run.judges)
            tqdm.write(f"step {run.step}: validation pass@1 {table['pass@1']:.1%}, {table['completion_tokens']:.0f} tokens "
                       f"a completion{f', {task.name}' if i else ''}")
            found |= {f"eval_{f'{task.name}_' if i else ''}{name}": value for name, value in table.items()}
        distributed.barrier()
    run.evaluation_seconds = time.time() - started
    return found


def evaluated_tasks(config: Config) -> list[Task]:
    """Those of --eval-task or --task that a rule can judge; where there is none, all."""
    tasks = find_tasks(config.eval_task or config.task, config.level, "", config.style, config.task, config.sandbox)
    return [task for task in tasks if "accuracy" in task.weights] or list(tasks)


def log_row(run: Run, rollouts: list[Rollout], stats: dict, step_started: float, sampling_seconds: float,
            config: Config) -> dict:
    """The step's line of metrics.jsonl, of all processes' rollouts."""
    tokens, seconds = sum(len(r.completion.token_ids) for r in rollouts), time.time() - step_started
    has_advantage = [any(r.advantage) if isinstance(r.advantage, list) else r.advantage != 0 for r in rollouts]
    equal = [not any(has_advantage[i:i + config.group_size]) for i in range(0, len(rollouts), config.group_size)]
    return {"step": run.step, **evaluate.describe_step(rollouts, config.language),
            "equal_groups": sum(equal) / len(equal), **stats,
            **late_share([r.score.verdict for r in rollouts]), "tokens": tokens, "seconds": seconds,
            "sampling_seconds": sampling_seconds, "tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    main()
