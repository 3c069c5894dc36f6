"""How fast: our sampler and our whole training step beside transformers and TRL, and beside what this machine can do.

One run prints one table of ratios and writes it to --out as JSON. In every row two runners alternate (ours, theirs,
ours, ...), so a machine that slows down slows both; the first round warms up, the others give median and range. Only
completion tokens count, EOS included and padding not.

    row               ours                                       beside it
    sampling          sampling.sample                            transformers: generate, and its continuous batching
    training step     train_countdown.py, as a user runs it      TRL's GRPOTrainer, if it is installed
    decode            bytes that decoding must read / second     memory bandwidth, measured
    training          FLOPs of forward and backward / second     a large matrix product, measured

Sizes: `tiny` is the quickstart's own workload, 256 completions of 16 train puzzles, of up to 512 tokens. (At its limit of
1,024 transformers' generate, which carries finished rows along, needs four minutes a round.) `smollm2` is a real
checkpoint, SmolLM2-135M-Instruct: one completion alone, and 16 prompts of very different lengths whose completions end
where EOS says. `qwen0.5b` and `qwen1.5b` have the shapes of Qwen2.5 and random weights, which transformers' model and
ours share; every completion has the same length; on a CPU they are cut to 8 completions of 32 tokens. Always
temperature 1.

    python -m benchmark.speed                     # with TRL, if it is there (pip install trl); minutes: docs/speed.md
    python -m benchmark.speed --no-trl
    python -m benchmark.speed --growth --no-trl   # and a picture: speed against batch size and completion length
    python -m benchmark.speed --device cuda --sizes qwen0.5b --no-trl --out runs/qwen.json
"""

import copy
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmark.timing import (Result, Workload, alternate, random_rows, time_continuous, time_decode, time_generate,
                              time_matmul, time_memory, time_our_steps, time_ours, time_training, time_trl_steps)
from countdown import make_prompt, sample_puzzle, solve
from machinery.checkpoints import DTYPES, check_device, load
from machinery.flags import bad_input_exits, parse_config
from machinery.plots import plot_growth
from model import Model, rotary_tables

SIZES = ("tiny", "smollm2", "qwen0.5b", "qwen1.5b")
QWEN = {
    "qwen0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
}
GROWTH = {"batch": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),  # sequences at a time, of 128 new tokens
          "length": (64, 128, 256, 512, 1024, 2048, 4096)}   # new tokens of 16 sequences


@dataclass(frozen=True)
class Config:
    out: str = "runs/benchmark.json"  # the table as JSON; the picture of --growth stands beside it
    sizes: str = ""                  # of tiny,smollm2,qwen0.5b,qwen1.5b; empty: tiny, on cuda the qwens too
    model: str = "models/tiny-base"  # checkpoint of size tiny and of the training step, a directory or hub id
    smollm2: str = ""                # directory or hub id of SmolLM2-135M-Instruct; adds its size to the default ones
    prompts: int = 16                # different prompts, except in size smollm2
    group_size: int = 16             # completions of each
    max_new_tokens: int = 512        # limit of a completion
    repeats: int = 3                 # counted rounds of each row but the training step; the medians are compared
    steps: int = 2                   # training steps per trainer and round, of two; the first of a round is not counted
    sampling: bool = True            # measure the samplers
    trl: bool = True                 # compare the whole step with TRL, if it is installed
    limits: bool = True              # measure the shares of the physical limits
    growth: bool = False             # speed against batch size and length, of the first of the sizes; adds minutes
    growth_seconds: float = 10.0     # a sampler's curve ends at the first point that takes longer
    device: str = "cpu"              # cpu or cuda
    dtype: str = ""                  # float32 or bfloat16; empty: float32, on cuda bfloat16 for all sizes but tiny
    threads: int = 0                 # CPU threads; 0: as many as PyTorch takes
    seed: int = 0                    # prompts and sampling

    def __post_init__(self):
        for size in self.sizes.split(",") if self.sizes else ():
            if size not in SIZES:
                raise ValueError(f"got size {size!r} in --sizes, expected some of {','.join(SIZES)}")
        if "smollm2" in self.sizes and not self.smollm2:
            raise ValueError("got size smollm2 without a checkpoint, expected --smollm2 with a directory or hub id, "
                             "such as HuggingFaceTB/SmolLM2-135M-Instruct")
        for name, least in (("prompts", 1), ("group_size", 2), ("max_new_tokens", 2), ("repeats", 1), ("steps", 2),
                            ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"got {name} {getattr(self, name)}, expected at least {least}")
        if self.growth_seconds <= 0:
            raise ValueError(f"got growth_seconds {self.growth_seconds}, expected more than 0")
        if self.device not in ("cpu", "cuda") or self.dtype not in ("", *DTYPES):
            raise ValueError(f"got device {self.device!r} and dtype {self.dtype!r}, expected cpu or cuda, and float32 "
                             "or bfloat16")
        if Path(self.out).suffix != ".json":
            raise ValueError(f"got --out {self.out}, expected the name of a .json file")
        for path in [Path(self.out)] + [Path(self.out).with_suffix(".png")] * self.growth:
            if path.exists():
                raise FileExistsError(f"got --out {self.out}, but {path} exists; name a new file with --out")
        check_device(self.device)

    def chosen_sizes(self) -> list[str]:
        default = {"tiny"} | ({"qwen0.5b", "qwen1.5b"} if self.device == "cuda" else set())
        chosen = set(self.sizes.split(",")) if self.sizes else default | ({"smollm2"} if self.smollm2 else set())
        return [size for size in SIZES if size in chosen]

    def chosen_dtype(self, size: str) -> str:
        default = "bfloat16" if self.device == "cuda" and size != "tiny" else "float32"  # tiny: as the quickstart
        return self.dtype or default


def tiny_workloads(tokenizer, config: Config) -> list[Workload]:
    """The first rollout of the quickstart, but for the puzzles."""
    rng = random.Random(config.seed)
    prompts = tokenizer([make_prompt(sample_puzzle(rng)) for _ in range(config.prompts)],
                        add_special_tokens=False)["input_ids"]
    prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
    return [Workload(f"{len(prompts)} completions of up to {config.max_new_tokens} tokens", prompts,
                     config.max_new_tokens, frozenset({tokenizer.eos_token_id}))]


def smollm2_workloads(tokenizer, config: Config) -> list[Workload]:
    """One completion alone; then prompts with no, one or two solved examples, whose completions end where EOS says."""
    rng = random.Random(config.seed)
    puzzles = [sample_puzzle(rng, "tinyzero") for _ in range(18)]
    examples = [(puzzle, f" {solve(*puzzle)} = {puzzle.target}</think>\n<answer>{solve(*puzzle)}</answer>")
                for puzzle in puzzles[:2]]
    texts = [make_prompt(puzzle, "base", examples=examples[:i % 4 - 1]) if i % 4 else make_prompt(puzzle)
             for i, puzzle in enumerate(puzzles[2:])]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths, alone, limit = [len(p) for p in prompts], min(128, config.max_new_tokens), min(256, config.max_new_tokens)
    return [Workload(f"1 completion of {alone} tokens", prompts[1:2], alone),
            Workload(f"16 prompts of {min(lengths)} to {max(lengths)} tokens, completions of up to {limit}", prompts,
                     limit, frozenset({tokenizer.eos_token_id}))]


def random_workload(prompts: int, group_size: int, prompt_tokens: int, new_tokens: int, vocab_size: int,
                    seed: int) -> Workload:
    rows = random_rows(prompts, prompt_tokens, vocab_size, seed)
    return Workload(f"{prompts * group_size} completions of {new_tokens} tokens",
                    [row for row in rows for _ in range(group_size)], new_tokens)


def random_models(hf_config, dtype, config: Config):
    """-> our model and transformers', of random weights, which are the very same tensors: no second copy in memory."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(config.seed)
    with torch.device(config.device):
        hf_model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
    with torch.device("meta"):
        model = Model(hf_config)
    model.load_state_dict(hf_model.state_dict(), assign=True)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.cos, model.sin = (table.to(config.device) for table in rotary_tables(model.config))
    return model, hf_model


def qwen(size: str, config: Config):
    """-> our model, transformers' model, the workload."""
    from transformers import Qwen2Config
    hf_config = Qwen2Config(**QWEN[size], num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
                            max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    shape = (config.prompts, config.group_size, 128, config.max_new_tokens)
    if config.device == "cpu":
        shape = tuple(map(min, shape, (2, 4, 32, 32)))
    workload = random_workload(*shape, hf_config.vocab_size, config.seed)
    return *random_models(hf_config, DTYPES[config.chosen_dtype(size)], config), [workload]


def samplers(model, hf_model, workload: Workload, config: Config) -> dict:
    return {"ours": lambda round_number: time_ours(model, workload, config.device, config.seed + round_number),
            "transformers.generate": lambda _: time_generate(hf_model, workload, config.device),
            "transformers continuous batching": lambda _: time_continuous(hf_model, workload, config.device)}


def measure_limits(size: str, label: str, model, config: Config) -> list[dict]:
    """The shares of memory bandwidth and of matrix throughput, on rows of equal length."""
    shapes = {"tiny": (256, 16, 112), "cuda": (256, 128, 512), "cpu": (4, 32, 32)}
    rows, prompt, new = shapes["tiny" if size == "tiny" else config.device]
    rows, new = min(rows, config.prompts * config.group_size), min(new, config.max_new_tokens)
    few = max(1, min(rows, 4096 // (prompt + new)))  # train_countdown.py's micro-batch
    decode = alternate({
        "ours": lambda _: time_decode(model, rows=rows, prompt_tokens=prompt, steps=new, seed=config.seed),
        "memory read or copy": lambda _: time_memory(config.device)}, config)
    training = alternate({
        "ours": lambda _: time_training(model, rows=few, prompt_tokens=prompt, completion_tokens=new, seed=config.seed),
        "large matrix product": lambda _: time_matmul(config.device, DTYPES[config.chosen_dtype(size)])}, config)
    return (table_rows(f"decode, {label}: {rows} rows, {prompt} + {new} tokens", "GB/s", decode, scale=1e-9)
            + table_rows(f"training, {label}: {few} rows, {prompt} + {new} tokens", "GFLOP/s", training, scale=1e-9))


def measure_step(config: Config) -> list[dict]:
    """The whole training step of both trainers, two rounds each: TRL's with all completions in one pass, and in the
    smaller micro-batches that one round finds to be the fastest here."""
    batch, results = config.prompts * config.group_size, {"ours": Result(), "TRL, one pass": Result()}
    if importlib.util.find_spec("trl") is None:
        results["TRL, one pass"].error = "not measured: it is not installed (pip install trl)"
    else:
        with tempfile.TemporaryDirectory() as directory:
            tried = {size: statistics.median(time_trl_steps(config, Path(directory), size))
                     for size in (batch // 4, batch // 8, batch // 16) if size and batch % size == 0}
            best = max(tried, key=tried.get, default=batch)
            results[f"TRL, {best} a pass"] = Result()
            for _ in range(2):
                results["ours"].speeds += time_our_steps(config, Path(directory))
                for name, size in (("TRL, one pass", batch), (f"TRL, {best} a pass", best)):
                    results[name].speeds += time_trl_steps(config, Path(directory), size)
    return table_rows(f"training step: {config.prompts} x {config.group_size} completions of up to "
                      f"{config.max_new_tokens} tokens", "tokens/s", results)


def measure_growth(model, hf_model, config: Config) -> dict:
    """Speeds against the batch and against the length -> {"batch" or "length": {sampler: {x: speeds}}}."""
    longest = max(GROWTH["length"]) + 16
    if model.config.context < longest:  # speed does not depend on weights: random ones, with room for the longest
        hf_config = copy.deepcopy(hf_model.config)
        hf_config.max_position_embeddings = longest
        model, hf_model = random_models(hf_config, model.lm_head.weight.dtype, config)
    growth = {}
    for axis, values in GROWTH.items():
        curves = {"ours": {}, "transformers.generate": {}}
        running = set(curves)
        for value in values:
            rows, new_tokens = (value, 128) if axis == "batch" else (16, value)
            workload = random_workload(1, rows, 16, new_tokens, model.config.vocab_size, config.seed)
            runners = samplers(model, hf_model, workload, config)
            for name, result in alternate({name: runners[name] for name in curves if name in running}, config).items():
                curves[name][value] = result.speeds
                if rows * new_tokens / min(result.speeds) > config.growth_seconds:
                    running.remove(name)
                print(f"growth, {axis} {value}: {name} {describe(result.speeds)}", file=sys.stderr)
        growth[axis] = curves
    return growth


def table_rows(what: str, unit: str, results: dict[str, Result], scale: float = 1.0) -> list[dict]:
    """The first result is ours; each other one beside it makes a row."""
    ours, *others = ({"name": name, **asdict(result), "speeds": [speed * scale for speed in result.speeds]}
                     for name, result in results.items())
    rows = []
    for other in others:
        complete = ours["speeds"] and other["speeds"]
        ratio = statistics.median(ours["speeds"]) / statistics.median(other["speeds"]) if complete else None
        rows.append({"what": what, "unit": unit, "ours": ours, "other": other, "ratio": ratio})
    return rows


def describe(speeds: list[float]) -> str:
    """median (smallest to largest)"""
    middle, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                         for value in (statistics.median(speeds), min(speeds), max(speeds)))
    return f"{middle} ({low} to {high})"


def format_table(rows: list[dict]) -> str:
    """Markdown, with columns lined up. A row whose other side did not run says why and has no ratio."""
    with_memory = any(row["ours"]["peak_gib"] for row in rows)
    lines = [["what", "unit", "ours", "beside it", "ratio"] + ["peak GiB, ours / other"] * with_memory]
    for row in rows:
        ours, other = row["ours"], row["other"]
        beside = describe(other["speeds"]) if other["speeds"] else other["error"].replace("|", "/")
        memory = " / ".join("-" if side["peak_gib"] is None else f"{side['peak_gib']:.1f}" for side in (ours, other))
        lines.append([row["what"], row["unit"], describe(ours["speeds"]) if ours["speeds"] else "-",
                      f"{other['name']}: {beside}", f"{row['ratio']:.3g}" if row["ratio"] else "-"]
                     + [memory] * with_memory)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def main() -> None:
    config = parse_config(Config, __doc__)

    # 1. what can be wrong with the input is said here
    sizes, checkpoints = config.chosen_sizes(), {}
    with bad_input_exits():
        for size, path, workloads in (("tiny", config.model, tiny_workloads),
                                      ("smollm2", config.smollm2, smollm2_workloads)):
            if size in sizes or size == "tiny" and config.trl:
                model, tokenizer = load(path, dtype=DTYPES[config.chosen_dtype(size)], device=config.device)
                checkpoints[size] = model, path, workloads(tokenizer, config)
                for workload in checkpoints[size][2]:
                    longest = max(map(len, workload.prompts))
                    if longest + workload.max_new_tokens > model.config.context:
                        raise ValueError(f"got prompts of {longest} tokens and max_new_tokens "
                                         f"{workload.max_new_tokens}, together more than the context of {path}, "
                                         f"{model.config.context}; lower --max-new-tokens")
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # transformers draws from the global generator
    device_name = f"cpu, threads: {torch.get_num_threads()}"
    if config.device == "cuda":
        device_name = torch.cuda.get_device_name()
    report = {"config": asdict(config), "device": device_name, "torch": torch.__version__,
              "transformers": transformers.__version__, "rows": [], "growth": {}}
    print(f"{device_name}, torch {torch.__version__}, transformers {transformers.__version__}\n{config}", flush=True)

    def add(rows: list[dict]) -> None:  # written after each row, so that a run that is killed leaves what it has
        report["rows"] += rows
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            print(f"{row['what']} | {row['other']['name']}: {row['ratio'] or row['other']['error']}", file=sys.stderr)

    # 2. the sizes, one after the other: samplers, shares of the limits, growth
    for size in sizes:
        if size in checkpoints:
            model, path, workloads = checkpoints[size]
            hf_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[config.chosen_dtype(size)])
            hf_model = hf_model.to(config.device).eval()
        else:
            model, hf_model, workloads = qwen(size, config)
        label = f"{size} {config.chosen_dtype(size)}"
        for workload in workloads if config.sampling else ():
            add(table_rows(f"sampling, {label}: {workload.name}", "tokens/s",
                           alternate(samplers(model, hf_model, workload, config), config)))
        if config.limits:
            add(measure_limits(size, label, model, config))
        if config.growth and size == sizes[0]:
            report["growth"] = measure_growth(model, hf_model, config)
            add([])
            picture = plot_growth(report["growth"], out.with_suffix(".png"), f"{label}, {device_name}")
            print(f"growth: {picture}", file=sys.stderr)

    # 3. whole training steps
    if config.trl:
        add(measure_step(config))
    if report["rows"]:
        print(format_table(report["rows"]))


if __name__ == "__main__":
    main()
