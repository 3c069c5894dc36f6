"""Rejection sampling: many completions from a checkpoint, of which only the correct and readable ones become a dataset.

DeepSeek-R1 (arXiv 2501.12948), section 2.3.1, gathers its cold start this way among others (readable outputs of
R1-Zero), and section 2.3.3 its 600k reasoning rows: sample from the RL checkpoint, keep what is correct, drop mixed
languages, long paragraphs and code blocks. Here each filter is a function from a completion to keep or drop, the report
counts what each took, and --non-cot adds rows without thinking, three to one, as the paper's 600k and 200k.

    python rejection.py --model runs/zero/checkpoint --out data/cold.jsonl
    python rejection.py --model runs/rl/checkpoint --non-cot data/replies.jsonl --out data/r1.jsonl
    python rejection.py --model runs/zero/checkpoint --rounds 3 --out data/rounds.jsonl # sample, fine-tune, sample, ...

One JSON object a line: prompt, completion, and where it came from: numbers, target, language, tokens, source, round,
seed, index. The report stands beside it as FILE.report.json.
"""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from machinery.checkpoints import (DTYPES, check_device, check_dtype, end_tokens, find_directory, load,
                                   read_hf_config)
from machinery.data import check_rows, fingerprint, read_jsonl
from machinery.flags import bad_input_exits, check_positive, fail, parse_config
from machinery.judging import Judges, Judging, check_judges
from machinery.notes import note
from machinery.run_folder import append_jsonl, saved_checkpoint, write_whole
from machinery.tasks import as_dict, find_tasks, shares
from machinery.text import check_room, check_style_fits
from rewards import ONLY_IN, chain_of_thought, language_reward
from sampling import Completion, complete
from sft import Config as SftConfig

CHUNK = 2048  # completions that are sampled, filtered and written down together; with --limit a quarter of that


@dataclass(frozen=True)
class Config:
    model: str = "runs/zero/checkpoint"  # checkpoint directory or hub id to sample from
    out: str = "data/traces.jsonl"   # JSONL file to write; its report stands beside it
    task: str = "countdown"          # countdown, arithmetic, code, a .py or .jsonl file, or several: machinery/tasks.py
    level: str = ""                  # of the task, such as four; empty: its first. Only train problems
    style: str = "tiny"              # prompt template: tiny, base or chat
    weights: str = ""                # of the reward's parts; format=0: a completion without tags is kept too
    sandbox: str = ""                # command that the answers of a task with tests run behind: docs/code.md
    n: int = 1200                    # different problems; countdown's laptop level has about 13,000 for training
    samples: int = 8                 # completions per problem
    temperature: float = 1.0         # of the sampler
    top_p: float = 1.0               # nucleus sampling
    max_new_tokens: int = 1024       # a completion that has not ended by then is dropped
    max_tokens: int = 800            # drop longer completions: over-long ones are mostly lost
    max_repeats: int = 1             # drop completions that write a line of thinking more often than this
    language: str = "en"             # drop completions with a word of another language
    per_puzzle: int = 4              # keep at most this many different completions of a problem
    limit: int = 0                   # ask until so many rows are kept, of n problems at most; 0: ask all n
    non_cot: str = ""                # JSONL of rows without thinking to mix in (tasks.general replies)
    non_cot_share: float = 0.25      # their share of the dataset; DeepSeek-R1: 200k of 800k
    rounds: int = 1                  # after each but the last, fine-tune --base on all rows so far and sample from that
    base: str = "models/tiny-base"   # what --rounds fine-tunes
    sft_flags: str = "--learning-rate 1e-3 --epochs 2"  # flags of sft.py for --rounds
    judges: int = 0                  # verdicts at the same time, while others write; 0: one a core, on a CPU at the end
    verdict_seconds: float = 300.0   # for each; a later one counts as wrong
    slots: int = 256                 # rows that decode at the same time; memory and speed, never the tokens
    dtype: str = "float32"           # what the model computes in: float32 or bfloat16
    seed: int = 0                    # which puzzles, and the sampling
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        shares(find_tasks(self.task, self.level, self.weights, self.style, sandbox=self.sandbox), self.n)
        check_dtype(self.dtype)
        check_judges(self.judges, self.verdict_seconds)
        check_positive(self, "n", "samples", "temperature", "max_new_tokens", "max_tokens", "max_repeats",
                       "per_puzzle", "rounds", "slots")
        if self.language not in ONLY_IN:
            raise ValueError(f"got language {self.language!r}, expected one of {', '.join(ONLY_IN)}")
        if self.rounds > 1:  # else it would be said after a round of sampling
            parse_config(SftConfig, "", self.sft_flags.split())
        if self.limit and self.rounds > 1:
            raise ValueError(f"got --limit {self.limit} with --rounds {self.rounds}, expected one of them: a round asks all "
                             "n problems")
        if not 0 < self.top_p <= 1 or not 0 < self.non_cot_share < 1 or self.limit < 0:
            raise ValueError("expected top_p within (0, 1], non_cot_share within (0, 1) and a limit of at least 0")


# -------------------------------------------------------------------------------------------------------------- filters
# Each takes (text, completion, score, config), score being the task's (parts, verdict), and says whether to keep it. They
# are asked in this order, and a completion is counted for the first one that drops it.


def correct(text: str, completion: Completion, score: tuple, config: Config) -> bool:
    return score[1] == "correct"


def well_formatted(text: str, completion: Completion, score: tuple, config: Config) -> bool:
    return score[0].get("format", 1.0) == 1.0  # where the format weighs nothing, none is asked for


def one_language(text: str, completion: Completion, score: tuple, config: Config) -> bool:
    return language_reward(text, config.language) == 1.0


def short_enough(text: str, completion: Completion, score: tuple, config: Config) -> bool:
    return not completion.truncated and len(completion.token_ids) <= config.max_tokens


def not_repetitive(text: str, completion: Completion, score: tuple, config: Config) -> bool:
    """No line of thinking stands there twice; a model that goes round in circles teaches just that."""
    lines = Counter(line.strip() for line in chain_of_thought(text).splitlines() if line.strip())
    return not lines or max(lines.values()) <= config.max_repeats


FILTERS = (correct, well_formatted, one_language, short_enough, not_repetitive)


# ------------------------------------------------------------------------------------------------------------- sampling
def sample_rows(model, tokenizer, source: str, round_: int, config: Config, known: dict, keep) -> tuple[list, dict]:
    """-> (rows that passed, report). Raises ValueError where nothing passed, with the filter that took the last.

    known holds what a killed run had already sampled, as {(round, first problem): chunk}; keep(chunk) writes one down.
    """
    tasks = find_tasks(config.task, config.level, config.weights, config.style, sandbox=config.sandbox)
    drawn = [(task, problem) for task, count in zip(tasks, shares(tasks, config.n))
             for problem in task.problems(count, "train", config.seed)]
    if len(tasks) > 1:  # so that a limit takes each task's share
        random.Random(f"{config.seed}, order").shuffle(drawn)
    prompts = [task.prompt(problem, config.style, tokenizer) for task, problem in drawn]
    check_room(tokenizer, prompts, config.style, config.max_new_tokens, model.config.context)
    dropped = Counter({name: 0 for name in [*(f.__name__ for f in FILTERS), "duplicates", "per_puzzle"]})
    rows, tokens, at_once = [], 0, max(1, CHUNK // (4 if config.limit else 1) // config.samples)
    judges = Judges(config.judges, config.verdict_seconds, config.device)
    for start in tqdm(range(0, len(drawn), at_once), desc=f"round {round_}", unit="chunk"):
        if config.limit and len(rows) >= config.limit:
            break
        asked = min(start + at_once, len(drawn))
        chunk = known.get((round_, start))
        if chunk is None:
            chunk = sample_chunk(model, tokenizer, drawn, prompts, start, at_once, source, round_, config, judges)
            keep(chunk)
        rows += chunk["rows"]
        tokens += chunk["tokens"]
        dropped.update(chunk["dropped"])
    judges.close()
    report = {"source": source, "parameters": sum(p.numel() for p in model.parameters()), "round": round_,
              "puzzles": asked, "sampled": asked * config.samples, "sampled_tokens": tokens, "dropped": dict(dropped), "kept": len(rows),
              "puzzles_kept": len({row["prompt"] for row in rows})}
    if not rows:
        last = [name for name, count in dropped.items() if count][-1]
        raise ValueError(f"got {report['sampled']} completions of {source} and none was left after the filter {last}, "
                         f"which took the last {dropped[last]} (in all: {describe(report)}); expected some to pass: "
                         "sample more, loosen that filter, or train the model further")
    return rows, report


def sample_chunk(model, tokenizer, drawn, prompts, start: int, at_once: int, source, round_: int, config, judges) -> dict:
    """The completions of at_once problems from start on, filtered. Each has its own random stream (sampling.py), so
    chunks change no token."""
    repeated = [i for i in range(start, min(start + at_once, len(drawn))) for _ in range(config.samples)]
    judging = Judging(judges, [drawn[i] for i in repeated])
    _, completions, texts = complete(
        model, tokenizer, [prompts[i] for i in repeated], style=config.style, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_p=config.top_p, slots=config.slots, first_index=start * config.samples,
        seed=random.Random(f"{config.seed}, {round_}").getrandbits(32), progress="sampling", finished=judging.begin)
    rows, dropped, seen = [], Counter(), Counter()
    for index, (i, completion, text, judged) in enumerate(zip(repeated, completions, texts, judging.verdicts(texts)),
                                                          start * config.samples):
        task, problem = drawn[i]
        score = {name: value for name, value in judged.parts.items() if task.weights.get(name)}, judged.verdict
        reason = next((f.__name__ for f in FILTERS if not f(text, completion, score, config)), None)
        if reason is None:
            reason = "duplicates" if seen[i, text] else "per_puzzle" if seen[i] == config.per_puzzle else None
        if reason:
            dropped[reason] += 1
            continue
        seen[i, text] += 1
        seen[i] += 1
        rows.append({**as_dict(problem), "prompt": task.seam.question(problem, config.style), "completion": text,
                     "language": config.language, "tokens": len(completion.token_ids), "source": source,
                     "round": round_, "seed": config.seed, "index": index})
    return {"round": round_, "start": start, "rows": rows, "dropped": dict(dropped),
            "tokens": sum(len(completion.token_ids) for completion in completions)}


def read_partial(path: Path, header: dict) -> dict:
    """What a killed run of the same flags and the same model had sampled -> {(round, first problem): chunk}."""
    lines = open(path, encoding="utf-8").readlines() if path.exists() else []  # splitlines() would part at U+2028 too
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the line that was being written
            break
    if not found or found[0] != header:
        path.unlink(missing_ok=True)
        append_jsonl(path, header)
        return {}
    return {(chunk["round"], chunk["start"]): chunk for chunk in found[1:]}


def describe(report: dict) -> str:
    return f"{report['sampled']} sampled, dropped " + ", ".join(f"{count} by {name}" for name, count in report["dropped"].items())


def fine_tune(rows: list[dict], round_: int, config: Config) -> str:
    """SFT of --base on the rows of all rounds so far -> the checkpoint that the next round samples from. One that was
    killed goes on."""
    folder = Path(f"{config.out}.round{round_}")
    data, run = folder / "rows.jsonl", folder / "sft"
    flags = ["--resume", run]
    if not saved_checkpoint(run) or not data.exists() or read_jsonl(data) != rows:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        append_jsonl(data, *rows)
        flags = ["--data", data, "--model", config.base, "--out", run, "--eval-rows", max(1, len(rows) // 20),
                 "--style", config.style, "--device", config.device, "--seed", config.seed, *config.sft_flags.split()]
    sft = Path(__file__).parent / "sft.py"
    if subprocess.run([sys.executable, sft, *map(str, flags)]).returncode:
        fail(f"sft.py failed in round {round_}; its error stands above")
    return str(run / "checkpoint")


def main() -> None:
    config = parse_config(Config, __doc__)
    out, report_path = Path(config.out), Path(f"{config.out}.report.json")
    with bad_input_exits():
        if out.exists():
            raise FileExistsError(f"got --out {out}, which exists and is never overwritten; name another file")
        non_cot = read_jsonl(config.non_cot) if config.non_cot else []
        non_cot = check_rows(non_cot, config.non_cot, ("prompt", "completion"),
                             "both, as python -m tasks.general replies writes them")
        most = config.n * min(config.samples, config.per_puzzle) * config.rounds
        most = min(most, config.limit or most)
        wanted = math.ceil(most * config.non_cot_share / (1 - config.non_cot_share))
        if config.non_cot and len(non_cot) < wanted:  # said now, and not when the sampling is done
            raise ValueError(f"got {len(non_cot)} rows in {config.non_cot}, expected {wanted}: a share of "
                             f"{config.non_cot_share} beside up to {most} rows with thinking; write more "
                             "(python -m tasks.general replies), or lower --n, --per-puzzle, --limit or --non-cot-share")
        if config.rounds > 1:
            read_hf_config(find_directory(config.base))
        check_device(config.device)

        # 1. rounds: sample, filter, add to the dataset; between rounds the base is fine-tuned on it
        rows, reports, source, started = [], [], config.model, time.time()
        model, tokenizer = load(source, dtype=DTYPES[config.dtype], device=config.device)
        check_style_fits(model, tokenizer, config.style, end_tokens(model, tokenizer))
        out.parent.mkdir(parents=True, exist_ok=True)
        partial_path = Path(f"{out}.partial")  # what is sampled so far; after a kill the same command goes on there
        tasks = [task.spec for task in find_tasks(config.task, config.level, config.weights, config.style, sandbox=config.sandbox)]
        known = read_partial(partial_path, {**asdict(config), "inputs": [fingerprint(path)
                                                                         for path in (config.model, *tasks)]})
        for round_ in range(1, config.rounds + 1):
            try:
                found, report = sample_rows(model.eval(), tokenizer, source, round_, config, known,
                                            partial(append_jsonl, partial_path))
            except ValueError:  # the same command would end the same way
                partial_path.unlink()
                raise
            earlier = {(row["prompt"], row["completion"]) for row in rows}
            found = [row for row in found if (row["prompt"], row["completion"]) not in earlier]
            rows += found
            reports.append({**report, "new": len(found)})
            print(f"round {round_}: {describe(report)}; kept {report['kept']} of {report['puzzles_kept']} puzzles, "
                  f"{len(found)} of these rows are new")
            if round_ < config.rounds:
                source = fine_tune(rows, round_, config)
                model, tokenizer = load(source, dtype=DTYPES[config.dtype], device=config.device)

        # 2. the dataset: at most --limit rows, and rows without thinking
        rng = random.Random(config.seed)
        if config.limit and len(rows) > config.limit:
            rows = rng.sample(rows, config.limit)
        elif len(rows) < config.limit:
            note(f"{len(rows)} rows are kept of the --limit {config.limit} that was asked for, after all {config.n} problems; "
                 "raise --n or --samples")
        if config.non_cot:
            rows += rng.sample(non_cot, round(len(rows) * config.non_cot_share / (1 - config.non_cot_share)))
        rng.shuffle(rows)

    # 3. written whole or not at all
    write_whole(report_path, json.dumps({"rows": len(rows), "minutes": (time.time() - started) / 60, "rounds": reports,
                                       "config": asdict(config)}, indent=2) + "\n")
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial_path.unlink()
    print(f"{len(rows)} rows in {out}, the report in {report_path}, {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
