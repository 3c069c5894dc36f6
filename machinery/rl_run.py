"""What a reinforcement learning run carries from step to step; how it begins, goes on after a kill, saves and stops.

train_countdown.py and the study of process rewards (experiments/prm.py) have loops of their own over these pieces.
config is train_countdown.Config.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from machinery import distributed
from machinery.checkpoints import DTYPES, BrokenWeights, load
from machinery.data import check_unchanged, read_jsonl
from machinery.flags import StopRequest, fail
from machinery.judging import Judges
from machinery.lora import add_lora, merged
from machinery.memory import check_fits
from machinery.optimizer import MasterAdamW
from machinery.plots import plot_run
from machinery.rollouts import Rollout
from machinery.run_folder import (append_jsonl, find_checkpoint, load_checkpoint, rewind_log, save_checkpoint,
                                  what_to_do)
from machinery.text import opened_thinking
from model import Model


@dataclass
class Run:
    folder: Path
    policy: Model
    tokenizer: object
    began: str               # the checkpoint that training began with
    device: str
    own_groups: range        # of a step's problems those that this process takes; alone: all
    first_rank: bool         # the process that prints, logs and saves; alone: always
    optimizer: MasterAdamW
    ref_policy: Model | None = None  # the KL's reference; None with LoRA: the frozen model is it
    step: int = 0            # optimizer steps that are done
    started: float = field(default_factory=time.time)  # moved back by what earlier attempts took
    stop: StopRequest | None = None
    bar: tqdm | None = None
    judges: Judges | None = None
    evaluation_seconds: float = 0.0  # of the last one
    inputs: dict = field(default_factory=dict)  # path -> fingerprint of what a resumed run must find unchanged

    def minutes(self) -> float:
        return (time.time() - self.started) / 60


def open_run(config) -> Run:
    """Device, policy, tokenizer and optimizer, of the model or of the checkpoint to resume; a new run's folder is not
    made yet. Raises ValueError or FileNotFoundError for whatever is wrong with them."""
    device = distributed.start(config.device)  # under torchrun: this process's GPU
    if config.fsdp and config.dtype == "bfloat16" and not distributed.started():
        raise ValueError("got --fsdp without torchrun, expected torchrun --nproc-per-node N train_countdown.py ...; "
                         "N may be 1")
    directory = find_checkpoint(config.resume) if config.resume else config.model
    check_fits(config, model=directory, world_size=distributed.world_size())
    own_groups = distributed.own_part(config.batch_size // config.group_size)
    dtype = torch.float32 if config.fsdp else DTYPES[config.dtype]  # FSDP keeps fp32, and casts itself
    saved = None
    if config.resume:
        policy, tokenizer, saved = load_checkpoint(config.resume, dtype=dtype, device=device)
        check_unchanged(saved, config.resume)
    if not config.resume or config.lora_rank:  # a checkpoint has adapters merged; they belong on the first model
        policy, tokenizer = load(config.model, dtype=dtype, device=device)
    policy.activation_checkpointing = config.activation_checkpointing
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, config.seed)
    if config.fsdp:
        distributed.shard(policy, dtype=DTYPES[config.dtype])
    optimizer = MasterAdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                            weight_decay=config.weight_decay, offload=config.offload_optimizer)
    run = Run(Path(config.resume or config.out), policy, tokenizer, config.model, device, own_groups, distributed.rank() == 0,
              optimizer)
    if config.kl_coef and not config.lora_rank:
        run.ref_policy = load(config.model, dtype=DTYPES[config.dtype], device=device)[0]
    if saved:
        run.step, run.started = saved["step"], run.started - 60 * saved["minutes"]
        run.inputs = saved.get("inputs", {})
        policy.load_state_dict(saved["adapters"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        if run.ref_policy and saved["ref_model"]:
            run.ref_policy.load_state_dict(saved["ref_model"])
        for name in ("metrics.jsonl", "rollouts.jsonl") if run.first_rank else ():
            rewind_log(run.folder / name, run.step)
    return run


@contextmanager
def sampling_weights(run: Run):
    """The policy as it samples: adapters merged into the weights, weights that are split over GPUs put together. Where
    what stands inside finds them broken, the run ends in one line."""
    try:
        with distributed.whole_weights(run.policy) as whole, merged(whole):
            yield whole
    except BrokenWeights as error:
        fail(f"{error}{what_to_do(run.folder, run.step, run.began)}")


def trained_source(run: Run) -> str:
    """What messages call the policy once it has been trained."""
    return f"the policy of {run.folder} after step {run.step}"


def save(run: Run, config) -> None:
    """All ranks: the run's checkpoint, from which --resume goes on."""
    policy = run.policy
    adapters = {name: p.detach() for name, p in policy.named_parameters() if config.lora_rank and p.requires_grad}
    with merged(policy):
        save_checkpoint(run.folder, policy, run.tokenizer, {
            "step": run.step, "inputs": run.inputs, "minutes": run.minutes(),
            "optimizer": run.optimizer.state_dict(), "adapters": adapters,
            "ref_model": run.ref_policy.state_dict() if run.ref_policy and config.ref_every else None})


def save_or_stop(run: Run, config, go_on: str) -> None:
    """All ranks, at the end of a step: the checkpoint where one is due; and the end, with exit code 130, after Ctrl-C.
    go_on: the command that continues."""
    stopping = distributed.any_rank(run.stop.requested)  # Ctrl-C may have reached one process only
    if run.step % config.save_every == 0 or run.step == config.steps or stopping:
        save(run, config)
    if stopping and run.step < config.steps:
        run.bar.close()
        if run.first_rank:
            print(f"stopped after step {run.step}; continue with: {go_on}")
        raise SystemExit(130)


def stop_on_broken_gradient(norm: float, run: Run, config) -> None:
    """Log-probs were finite when the tokens were sampled: what broke is the loss, its gradient, or an epoch's update."""
    if math.isfinite(norm):
        return
    said = f"got a gradient norm of {norm} at step {run.step + 1}, expected a finite one"
    if run.step == 0 and config.inner_epochs == 1:  # before the first update no setting of the optimizer is to blame
        fail(f"{said}: {config.model} is as it was read, and the loss or its gradient is too large for {config.dtype}")
    if config.inner_epochs == 1:  # else the policy may be in the middle of a step: the last checkpoint is the good one
        save(run, config)
    fail(f"{said}; the last good weights are in {run.folder / 'checkpoint'}. Lower --learning-rate")


def log(run: Run, row: dict, rollouts: list[Rollout], config) -> None:
    """metrics.jsonl, rollouts.jsonl, the bar, and now and then a sample on the screen; the first rank's work."""
    if not run.first_rank:
        return
    if run.bar.n == run.bar.initial:
        evaluations = math.ceil((config.steps - run.step) / config.eval_every)
        minutes = ((config.steps - run.step) * row["seconds"] + evaluations * run.evaluation_seconds) / 60
        tqdm.write(f"the first step took {row['seconds']:.1f} s here: {minutes:.0f} to {2.5 * minutes:.0f} minutes for all "
                   f"{config.steps}, as completions may grow")
    run.bar.update()
    accuracy = {"accuracy": f"{row['accuracy']:.0%}"} if "accuracy" in row else {}
    run.bar.set_postfix(reward=f"{row['reward']:.2f}", **accuracy, length=f"{row['completion_tokens']:.0f}",
                        tokens_per_s=f"{row['tokens_per_second']:,.0f}")
    shown = run.step % config.sample_every == 0 or run.step == 1
    if shown:
        tqdm.write(f"--- step {run.step}, reward {rollouts[0].score.reward:.2f}")
        prompt = rollouts[0].prompt
        tqdm.write(f"{prompt.removesuffix(opened_thinking(prompt))}{rollouts[0].text}\n")
    if config.rollouts == "every" or config.rollouts == "sampled" and shown:
        append_jsonl(run.folder / "rollouts.jsonl", *(rollout.row(run.step) for rollout in rollouts))
    append_jsonl(run.folder / "metrics.jsonl", {**row, "minutes": run.minutes()})


def finish(run: Run) -> None:
    """All ranks: the picture, and the last line, which says what came out."""
    run.bar.close()
    run.stop.end()
    distributed.stop()
    if not run.first_rank:
        return
    metrics = read_jsonl(run.folder / "metrics.jsonl")
    plot_run(run.folder)
    before, after = metrics[0], metrics[-1]
    print(f"validation pass@1 {before['eval_pass@1']:.1%} -> {after['eval_pass@1']:.1%} "
          f"(95% interval {after['eval_pass@1_low']:.1%} to {after['eval_pass@1_high']:.1%}, n = {after['eval_n']}), "
          f"{before['eval_completion_tokens']:.0f} -> {after['eval_completion_tokens']:.0f} tokens a completion, "
          f"{run.minutes():.1f} minutes; the run is in {run.folder}")
