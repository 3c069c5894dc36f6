"""How fast: our sampler against transformers.generate, our whole training step against TRL's GRPOTrainer, side by side.

The workload is the quickstart's own: 256 completions of 16 train puzzles (16 each), at most 512 new tokens, temperature
1, fp32, the same weights and the same machine in the same run. Runs alternate, so a machine that slows down slows both;
the ratio is what to read. Only completion tokens count, EOS included and padding not.

    python benchmark.py           # sampler, and the step if TRL is installed: pip install trl; 7 minutes on 2 cores
    python benchmark.py --no-trl  # the sampler alone, 1 minute
"""

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from countdown import make_prompt, sample_puzzle
from model import load
from rewards import reward
from run_folder import bad_input_exits, fail, parse_config
from sampling import complete


@dataclass(frozen=True)
class Config:
    model: str = "models/tiny-base"  # checkpoint directory or hub id
    prompts: int = 16                # puzzles
    group_size: int = 16             # completions of each
    max_new_tokens: int = 512        # limit of a completion
    repeats: int = 5                 # alternating runs of each sampler; the medians are compared
    steps: int = 4                   # training steps per trainer and round, of two; the first of a round is not counted
    trl: bool = True                 # compare the whole step with TRL, if it is installed
    seed: int = 0                    # which puzzles


def time_generate(hf_model, tokenizer, prompts: list[str], config: Config) -> tuple[int, float]:
    """transformers.generate on the whole batch, padded on the left -> completion tokens, seconds."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    started = time.perf_counter()
    with torch.no_grad():
        output = hf_model.generate(**inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                                   max_new_tokens=config.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                                   eos_token_id=tokenizer.eos_token_id)
    seconds = time.perf_counter() - started
    completions = output[:, inputs["input_ids"].shape[1]:]
    ended = (completions == tokenizer.eos_token_id).int().cumsum(1)  # 0 before EOS, 1 from it on
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum()), seconds


def time_sampler(model, tokenizer, prompts: list[str], config: Config, seed: int) -> tuple[int, float]:
    started = time.perf_counter()
    _, completions, _ = complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, seed=seed)
    return sum(len(completion.token_ids) for completion in completions), time.perf_counter() - started


def time_our_steps(config: Config, directory: Path) -> list[float]:
    """train_countdown.py as a user runs it -> tokens per second of each step but the first, from its own log."""
    out = directory / f"ours-{time.time()}"
    flags = {"--model": config.model, "--out": out, "--steps": config.steps, "--eval-n": 8,
             "--group-size": config.group_size, "--batch-size": config.prompts * config.group_size,
             "--max-new-tokens": config.max_new_tokens}
    done = subprocess.run([sys.executable, "train_countdown.py", *(str(w) for pair in flags.items() for w in pair)],
                          capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        fail(f"train_countdown.py ended with exit code {done.returncode}: {done.stderr[-500:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["tokens_per_second"] for row in rows if row["step"] > 1]


def time_trl_steps(config: Config, directory: Path) -> list[float]:
    """TRL's GRPOTrainer on the same puzzles, rewards, groups, limits -> tokens a second of each step but the first."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rng, batch = random.Random(config.seed), config.prompts * config.group_size
    puzzles = [sample_puzzle(rng, held_out=False) for _ in range(config.prompts * config.steps)]
    rows = [{"prompt": make_prompt(p), "numbers": list(p.numbers), "target": p.target} for p in puzzles]
    tokens, seconds = [], []

    def score(completions, completion_ids, numbers, target, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [reward(*row)["reward"] for row in zip(completions, numbers, target)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            seconds.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds[-1] = time.perf_counter() - seconds[-1]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32), reward_funcs=score,
        processing_class=AutoTokenizer.from_pretrained(config.model), callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(output_dir=str(directory / "trl"), max_steps=config.steps, per_device_train_batch_size=batch,
                        num_generations=config.group_size, max_completion_length=config.max_new_tokens,
                        temperature=1.0, beta=0.0, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
                        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                        seed=config.seed, disable_tqdm=True))
    trainer.train()
    return [t / s for t, s in zip(tokens, seconds)][1:]


def report(name: str, ours: list[float], other_name: str, other: list[float]) -> None:
    a, b = statistics.median(ours), statistics.median(other)
    print(f"{name}: ours {a:,.0f} completion tokens/s ({min(ours):,.0f} to {max(ours):,.0f}), {other_name} {b:,.0f} "
          f"({min(other):,.0f} to {max(other):,.0f}); ratio {a / b:.1f}", flush=True)


def main() -> None:
    config = parse_config(Config, __doc__)
    with bad_input_exits():
        model, tokenizer = load(config.model)
    from transformers import AutoModelForCausalLM
    hf_model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    rng = random.Random(config.seed)
    prompts = [make_prompt(sample_puzzle(rng, held_out=False)) for _ in range(config.prompts)]
    prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
    print(f"{len(prompts)} completions of {config.prompts} puzzles, at most {config.max_new_tokens} tokens each; "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    torch.manual_seed(config.seed)
    ours, theirs = [], []
    for repeat in range(config.repeats + 1):  # the first pair warms up
        for speeds, (tokens, seconds) in ((ours, time_sampler(model, tokenizer, prompts, config, repeat)),
                                          (theirs, time_generate(hf_model, tokenizer, prompts, config))):
            speeds.append(tokens / seconds)
    report("sampling", ours[1:], "transformers.generate", theirs[1:])

    if not config.trl:
        return
    if importlib.util.find_spec("trl") is None:
        print("whole training step: not measured, TRL is not installed (pip install trl)")
        return
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = [], []
        for _ in range(2):
            ours += time_our_steps(config, Path(directory))
            theirs += time_trl_steps(config, Path(directory))
    report("whole training step", ours, "TRL", theirs)


if __name__ == "__main__":
    main()
