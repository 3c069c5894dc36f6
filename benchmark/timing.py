"""All that speed.py times. A time_* function returns an amount (completion tokens, bytes or FLOPs) and seconds.

The last part is what the machine allows. A ratio to another program says which of the two is slower; a share of the
physical limit says what is left to gain. Decoding reads all weights and the whole cache for one token a row, so memory
bandwidth bounds it; training reuses each weight for thousands of tokens, so arithmetic bounds it. Both peaks are
measured rather than read from a data sheet, so that they hold for this machine, this dtype and this moment. Only what
is unavoidable is counted: whatever our code reads or computes beyond that lowers its share.

Letters as in model.py: D width, L layers, H query heads, K key/value heads, E head dimension, V vocabulary.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

import countdown
import train_countdown
from countdown import WEIGHTS, Puzzle, make_prompt, sample_puzzle
from grpo import grpo_loss
from machinery.batching import pad_batch, token_logprobs
from machinery.flags import fail
from sampling import sample


def now(device) -> float:
    """Seconds on a clock that has waited for the device's work."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class DoesNotRun(Exception):
    """The other side failed here; its row says why and the others go on."""


@dataclass
class Result:
    speeds: list[float] = field(default_factory=list)  # a second, one a counted round
    peak_gib: float | None = None                      # device memory at its fullest, weights included; cuda only
    error: str = ""                                    # why there are no speeds


def alternate(runners: dict, config) -> dict[str, Result]:
    """Each runner in turn, once to warm up and then `repeats` times. A runner takes the round -> (amount, seconds)."""
    results = {name: Result() for name in runners}
    for round_number in range(config.repeats + 1):
        for name, run in runners.items():
            result = results[name]
            if result.error:
                continue
            if config.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                amount, seconds = run(round_number)
            except DoesNotRun as error:
                result.error = f"does not run on {config.device}: {' '.join(str(error).split())[:200]}"
                continue
            if config.device == "cuda":
                result.peak_gib = max(result.peak_gib or 0, torch.cuda.max_memory_allocated() / 2 ** 30)
            if round_number:
                result.speeds.append(amount / seconds)
    return results


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: list[list[int]]  # token ids, a list a completion
    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()  # empty: every completion has max_new_tokens


def time_ours(model, workload: Workload, device: str, seed: int) -> tuple[int, float]:
    """sampling.sample -> completion tokens, seconds."""
    started = now(device)
    completions = sample(model, workload.prompts, max_new_tokens=workload.max_new_tokens, eos_ids=set(workload.eos_ids),
                         seed=seed, slots=len(workload.prompts))
    seconds = now(device) - started
    return sum(len(completion.token_ids) for completion in completions), seconds


def generation_config(workload: Workload):
    from transformers import GenerationConfig
    return GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
                            eos_token_id=sorted(workload.eos_ids) or None, max_new_tokens=workload.max_new_tokens)


def time_generate(hf_model, workload: Workload, device: str) -> tuple[int, float]:
    """transformers.generate on the whole batch, padded on the left -> completion tokens, seconds."""
    width = max(map(len, workload.prompts))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in workload.prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in workload.prompts]
    hf_model.generation_config = generation_config(workload)  # as an argument it would be completed from this one
    started = now(device)
    output = hf_model.generate(input_ids=torch.tensor(rows, device=device),
                               attention_mask=torch.tensor(mask, device=device))
    seconds = now(device) - started
    completions = output[:, width:].cpu()
    is_eos = torch.isin(completions, torch.tensor(sorted(workload.eos_ids), dtype=completions.dtype))
    ended = is_eos.int().cumsum(1)  # 0 before EOS, at least 1 from it on: padding may be EOS again
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum()), seconds


def time_continuous(hf_model, workload: Workload, device: str) -> tuple[int, float]:
    """transformers' continuous batching -> completion tokens, seconds. Its manager is started before the clock.

    Without flash attention each new token is scored against the cache of all requests in flight and masked, so on a CPU
    only 32 are in flight: more were not faster. Its cache is sized for them; the default takes 90% of the free memory,
    a CPU's main memory too."""
    from transformers import ContinuousBatchingConfig
    in_flight = min(len(workload.prompts), 32 if device == "cpu" else 1024)
    longest = max(map(len, workload.prompts)) + workload.max_new_tokens
    sizes = ContinuousBatchingConfig(num_blocks=in_flight * -(-longest // 256), max_requests_per_batch=in_flight,
                                     max_batch_tokens=2048 if device == "cuda" else 512)
    settings, tokens, unfinished = generation_config(workload), 0, len(workload.prompts)
    settings.eos_token_id = settings.eos_token_id or -1
    attention = hf_model.config._attn_implementation
    try:
        with hf_model.continuous_batching_context_manager(settings, continuous_batching_config=sizes) as manager:
            started = now(device)
            manager.add_requests(workload.prompts, max_new_tokens=workload.max_new_tokens)
            while unfinished:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise DoesNotRun("its thread ended early")
                if result is not None and result.error:
                    raise DoesNotRun(result.error)
                if result is not None and result.is_finished():
                    tokens, unfinished = tokens + len(result.generated_tokens), unfinished - 1
            return tokens, now(device) - started
    except DoesNotRun:
        raise
    except Exception as error:  # a row beside ours: whatever breaks in it must not stop the rest
        blind = isinstance(error, MemoryError) and device == "cpu" and not find_spec("psutil")  # takes memory for 0
        raise DoesNotRun(f"{'pip install psutil; ' if blind else ''}{type(error).__name__}: {error}") from None
    finally:  # it switches to a paged one, with which generate would not run
        hf_model.set_attn_implementation(attention)


def time_our_steps(config, directory: Path) -> list[float]:
    """train_countdown.py as a user runs it, but for the warm-up -> tokens per second of each step but the first, from
    its own log."""
    out = directory / f"ours-{time.time()}"
    flags = {"--model": config.model, "--out": out, "--steps": config.steps, "--eval-n": 8, "--warmup-steps": 1,
             "--group-size": config.group_size, "--batch-size": config.prompts * config.group_size,
             "--max-new-tokens": config.max_new_tokens, "--device": config.device}
    environment = os.environ | ({"OMP_NUM_THREADS": str(config.threads)} if config.threads else {})
    done = subprocess.run([sys.executable, "train_countdown.py", *(str(w) for pair in flags.items() for w in pair)],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
    if done.returncode:
        fail(f"train_countdown.py ended with exit code {done.returncode}: {done.stderr[-500:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["tokens_per_second"] for row in rows if row["step"] > 1]


def time_trl_steps(config, directory: Path, micro_batch: int) -> list[float]:
    """TRL's GRPOTrainer on the same puzzles, rewards, groups, limits and schedule, so many completions a pass
    -> tokens a second of each step but the first."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rng, batch = random.Random(config.seed), config.prompts * config.group_size
    puzzles = [sample_puzzle(rng) for _ in range(config.prompts * config.steps)]
    rows = [{"prompt": make_prompt(p), "numbers": list(p.numbers), "target": p.target} for p in puzzles]
    tokens, seconds = [], []

    def score(completions, completion_ids, numbers, target, **_):
        tokens.append(sum(map(len, completion_ids)))
        parts = [countdown.score(Puzzle(*row[1:]), row[0])[0] for row in zip(completions, numbers, target)]
        return [sum(WEIGHTS[name] * part for name, part in row.items()) for row in parts]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            seconds.append(now(config.device))

        def on_step_end(self, *_, **__):
            seconds[-1] = now(config.device) - seconds[-1]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32), reward_funcs=score,
        processing_class=AutoTokenizer.from_pretrained(config.model), callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(output_dir=str(directory / "trl"), max_steps=config.steps,
                        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=batch // micro_batch,
                        num_generations=config.group_size, max_completion_length=config.max_new_tokens,
                        temperature=1.0, beta=0.0, learning_rate=train_countdown.Config.learning_rate, logging_steps=1,
                        lr_scheduler_type="constant",
                        save_strategy="no", report_to="none", use_cpu=config.device == "cpu", bf16=False,
                        gradient_checkpointing=False, seed=config.seed, disable_tqdm=True))
    with contextlib.redirect_stdout(sys.stderr):  # its log
        trainer.train()
    return [t / s for t, s in zip(tokens, seconds)][1:]


def matrix_parameters(config) -> tuple[int, int]:
    """Weights that multiply every token -> (all layers together, the output head).

    A layer: D*H*E each for q and o, D*K*E each for k and v, 3*D*I for the MLP. The head: V*D, tied or not. Without the
    embedding, of which a token reads one row, and without norms and biases, a thousandth of the rest."""
    D, heads = config.hidden_size, 2 * (config.num_heads + config.num_kv_heads)
    layer = D * heads * config.head_dim + 3 * D * config.intermediate_size
    return config.num_layers * layer, config.vocab_size * D


def decode_bytes(config, *, rows: int, prompt_tokens: int, steps: int, bytes_per_number: int) -> int:
    """Bytes that so many decoding steps of equally long rows cannot avoid to read.

    Each step: every weight matrix once, and of every row the keys and values (2*L*K*E numbers a token) of all its
    tokens so far, the new one included: prompt_tokens + 1 at step 1, prompt_tokens + steps at the last."""
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    tokens = rows * (steps * prompt_tokens + steps * (steps + 1) // 2)
    return bytes_per_number * (steps * sum(matrix_parameters(config)) + tokens * cached)


def training_flops(config, *, rows: int, prompt_tokens: int, completion_tokens: int) -> int:
    """FLOPs of forward and backward through right-sized rows; backward costs two forwards, hence 6 and not 2.

    The last token is only a label, so T = prompt + completion - 1 tokens a row pass through the layers, and the head is
    needed only where a completion token is predicted:

        6 * rows * (layers * T + head * completion)  +  3 * rows * L * 4*H*E * T*(T+1)/2

    The second term is causal attention: q k^T and its product with v are 2*H*E FLOPs each for every pair of a token and
    one that it sees. Nothing is added for recomputed activations."""
    layers, head = matrix_parameters(config)
    T = prompt_tokens + completion_tokens - 1
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * (T * (T + 1) // 2)
    return rows * (6 * (layers * T + head * completion_tokens) + 3 * attention)


def time_memory(device) -> tuple[float, float]:
    """Bytes and seconds of the faster of two passes over large buffers: a read (their sum) and a copy (counted twice).

    1 GiB on a GPU, 512 MiB on a CPU, far beyond the caches of both."""
    size = 2 ** 30 if str(device).startswith("cuda") else 2 ** 29
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    passes, results = 8, []
    for run, moved in ((source.sum, size), (lambda: target.copy_(source), 2 * size)):
        run()
        started = now(device)
        for _ in range(passes):
            run()
        results.append((passes * moved, now(device) - started))
    return max(results, key=lambda result: result[0] / result[1])


def time_matmul(device, dtype) -> tuple[float, float]:
    """FLOPs and seconds of products of large square matrices: 2 n^3 each, n = 8192 on a GPU and 2048 on a CPU."""
    n, passes = (8192, 16) if str(device).startswith("cuda") else (2048, 2)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    started = now(device)
    for _ in range(passes):
        a @ b
    return passes * 2 * n ** 3, now(device) - started


def random_rows(rows: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, tokens), generator=generator).tolist()


def time_decode(model, *, rows: int, prompt_tokens: int, steps: int, seed: int) -> tuple[int, float]:
    """Bytes that decoding must read, and seconds: those of steps + 1 tokens less those of 1, which only prefills."""
    weight, prompts, seconds = model.lm_head.weight, random_rows(rows, prompt_tokens, model.config.vocab_size, seed), []
    for max_new_tokens in (1, steps + 1):
        started = now(weight.device)
        sample(model, prompts, max_new_tokens=max_new_tokens, eos_ids=set(), seed=seed, slots=rows)
        seconds.append(now(weight.device) - started)
    amount = decode_bytes(model.config, rows=rows, prompt_tokens=prompt_tokens, steps=steps,
                          bytes_per_number=weight.element_size())
    return amount, seconds[1] - seconds[0]


def time_training(model, *, rows: int, prompt_tokens: int, completion_tokens: int, seed: int) -> tuple[int, float]:
    """FLOPs that one micro-batch of GRPO needs, and the seconds of forward, loss and backward. No optimizer step."""
    device = model.lm_head.weight.device
    ids = random_rows(rows, prompt_tokens + completion_tokens, model.config.vocab_size, seed)
    input_ids, mask = pad_batch([row[:prompt_tokens] for row in ids], [row[prompt_tokens:] for row in ids],
                                device=device)  # (B, T), (B, T-1)
    advantages = torch.linspace(-1, 1, rows, device=device)  # (B,)
    started = now(device)
    logprobs, _ = token_logprobs(model, input_ids, mask, with_entropy=True)  # (B, T-1); the entropy is for the log
    loss, _ = grpo_loss(logprobs, logprobs.detach(), advantages, mask, divisor=rows * completion_tokens)
    loss.backward()
    seconds = now(device) - started
    model.zero_grad(set_to_none=True)
    return training_flops(model.config, rows=rows, prompt_tokens=prompt_tokens,
                          completion_tokens=completion_tokens), seconds
