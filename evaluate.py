"""One evaluator for every checkpoint: pass@1, pass@k, majority vote, format, length, reflection, language, small talk.

Held-out puzzles only (countdown.is_held_out), each one once, in an order that the seed fixes; no batch is dropped.

    python evaluate.py --model models/tiny-base                        # 512 puzzles, one sample each, temperature 1
    python evaluate.py --model models/tiny-base --samples 16           # adds pass@16 and maj@16; 40 seconds on 2 cores
    python evaluate.py --model runs/zero/checkpoint --show 3           # read what it writes, with verdicts
    python evaluate.py --model runs/zero/checkpoint --temperature 0    # greedy
    python evaluate.py --model Qwen/Qwen2.5-1.5B --style base --level tinyzero --max-new-tokens 1024 --shots 2

DeepSeek-R1 (section 3) evaluates at temperature 0.6, top-p 0.95; the defaults, 1 and 1, are the policy as RL trains it.
"""

import json
import math
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from countdown import check_level_and_style, make_prompt, sample_puzzle, sample_puzzles, shortest_completion
from machinery.checkpoints import DTYPES, check_dtype, load
from machinery.flags import bad_input_exits, parse_config
from rewards import (REFLECTION_WORDS, WORD, accuracy_reward, chain_of_thought, extract_answer, format_reward,
                     language_counts, language_reward, parse_expression, verify)
from sampling import complete
from tasks.general import SMALL_TALK, draw_question, is_good, needless_thinking, question_prompt

GREETINGS = ("hello", "hi", "good morning", "how are you?", "thank you", "goodbye", "who are you?", "have a good day")
GENERAL_N = 512  # replies to greetings, and to arithmetic questions; fewer where fewer puzzles are asked


@dataclass(frozen=True)
class Config:
    model: str = "models/tiny-base"  # checkpoint directory or hub id
    level: str = "laptop"            # laptop, laptop4 or tinyzero
    style: str = "tiny"              # prompt template: tiny, base or chat
    n: int = 512                     # held-out puzzles
    samples: int = 1                 # completions per puzzle; pass@k and maj@k use all of them
    temperature: float = 1.0         # 0 is greedy
    top_p: float = 1.0               # nucleus sampling; DeepSeek-R1 evaluates with 0.95
    max_new_tokens: int = 512        # a completion that has not ended by then counts as truncated, and as wrong
    shots: int = 0                   # solved examples before each prompt
    language: str = "en"             # the language that consistency is measured against
    show: int = 0                    # print this many completions with their verdicts
    json: str = ""                   # also write the table to this file
    seed: int = 0                    # which puzzles, and the sampling
    slots: int = 256                 # rows that decode at the same time; memory and speed, never the tokens
    dtype: str = "float32"           # what the model computes in: float32 or bfloat16
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        check_level_and_style(self.level, self.style)
        if min(self.n, self.samples, self.max_new_tokens, self.slots) < 1 or self.shots < 0:
            raise ValueError("expected n, samples, max_new_tokens and slots of at least 1 and shots of at least 0")
        check_dtype(self.dtype)
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"got temperature {self.temperature} and top_p {self.top_p}, "
                             "expected at least 0 and within (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"got samples {self.samples} at temperature 0, where all samples are the same; "
                             "use --samples 1")


# ----------------------------------------------------------------------------------------------------------- estimators
def wilson_interval(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share p of n puzzles (Wilson 1927); with several samples a puzzle on the wide, safe side."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of pass@k of arXiv 2107.03374."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def answer_value(completion: str, numbers) -> Fraction | None:
    """The exact value of the answer, if it is one over the puzzle's numbers: what a majority votes for."""
    try:
        value, used = parse_expression(extract_answer(completion) or "")
    except ValueError:
        return None
    return value if sorted(used) == sorted(numbers) else None


def majority_answer(completions: list[str], numbers) -> str | None:
    """The majority vote over one puzzle's completions (R1: cons@k): an expression, or None if nobody has a valid one.

    Votes are for the exact value, so (4+5)*3 and 3*(5+4) agree. The vote sees the prompt and never the target: an
    answer takes part if it parses and uses the puzzle's numbers. On a tie the value that was found first wins."""
    votes, expressions = Counter(), {}
    for completion in completions:
        value = answer_value(completion, numbers)
        if value is not None:
            votes[value] += 1
            expressions.setdefault(value, extract_answer(completion))
    return expressions[votes.most_common(1)[0][0]] if votes else None


# --------------------------------------------------------------------------------------- what is watched and never paid
VERIFICATION = re.compile(r"\?\d+ (?:yes|no|ja|nein)\b")


def reflection_words(completion: str) -> dict[str, int]:
    """Each reflection word of either language in the CoT -> how often; whole words only, upper and lower case alike."""
    words = Counter(WORD.findall(chain_of_thought(completion).lower()))
    return {word: n for word, n in words.items() if any(word in known for known in REFLECTION_WORDS.values())}


def count_backtracks(completion: str) -> int:
    """How often the CoT left one line of attempts and went on to another.

    An attempt line holds "=" and does not begin with check or prüfe. It is abandoned if it does not end in the verdict
    yes or ja and another attempt line follows. So a search that gives up after three failed lines backtracked twice,
    and so did one that succeeded in its third. Made for the line-per-first-move searches of the tiny model; on free
    prose it is a rough count."""
    lines = [line.lower().split() for line in chain_of_thought(completion).splitlines() if "=" in line]
    attempts = [words for words in lines if words[0].strip(":,") not in ("check", "prüfe")]
    return sum(words[-1].strip(".,!") not in ("yes", "ja") for words in attempts[:-1])


def count_verifications(completion: str) -> int:
    """How often the CoT compared a result with its goal and wrote the verdict down: "3+1=4?27 no" is one.

    Made for the searches of the tiny model; prose that verifies in other words counts as 0."""
    return len(VERIFICATION.findall(chain_of_thought(completion)))


def is_mixed(completion: str) -> bool:
    """Whether the CoT holds words of both languages; what R1-Zero drifts to, and what rejection sampling drops."""
    return all(language_counts(completion).values())


def describe(texts: list[str], completions, language: str = "en") -> dict[str, float]:
    """Means over completions of what they look like, right or wrong; the same names in training and evaluation logs."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values)
    return {"format": mean(map(format_reward, texts)),
            "completion_tokens": mean(len(c.token_ids) for c in completions),
            "truncated": mean(c.truncated for c in completions),
            "verifications": mean(map(count_verifications, texts)),
            "backtracks": mean(map(count_backtracks, texts)),
            "reflection_words": mean(sum(reflection_words(text).values()) for text in texts),
            "language": mean(language_reward(text, language) for text in texts),
            "mixed": mean(map(is_mixed, texts))}


# ------------------------------------------------------------------------------------------------------------ measuring
def describe_step(rollouts, language: str) -> dict[str, float]:
    """The step's log: rewards and looks of its puzzles (of all completions where it has none), and beside them the
    means of what only general prompts have. rollouts: machinery.rollouts.Rollout, of all processes."""
    puzzles, row = [rollout for rollout in rollouts if "accuracy" in rollout.parts] or rollouts, {}
    for name in ("reward", "accuracy", "preference", "general_good", "general_thinking"):
        values = [r.parts[name] for r in (puzzles if name == "reward" else rollouts) if name in r.parts]
        row |= {name: sum(values) / len(values)} if values else {}
    return row | describe([r.text for r in puzzles], [r.completion for r in puzzles], language)


def few_shot_examples(shots: int, style: str, level: str, seed: int) -> list[tuple]:
    """Solved train puzzles: searches as in the tiny base's corpus, or for other styles one line of thinking."""
    import corpus
    rng, examples = random.Random(seed), []
    clean = corpus.Config(tags=1.0, give_up=0.0, wrong_answers=0.0, slips=0.0, luck=0.5)
    for _ in range(shots):
        puzzle = sample_puzzle(rng, level, held_out=False)
        if style == "tiny" and len(puzzle.numbers) == 3:
            examples.append((puzzle, corpus.write_search(puzzle, "en", rng, clean)))
        else:
            examples.append((puzzle, shortest_completion(puzzle)))
    return examples


def evaluate_general(model, tokenizer, config: Config, settings: dict) -> dict[str, float]:
    """Shares of 512 replies to greetings that think, and, for the tiny model, that are good by the rule; and of 512
    direct arithmetic questions those that are answered right and without thinking."""
    rng, each = random.Random(config.seed), max(1, min(config.n, GENERAL_N) // len(GREETINGS))
    n = each * len(GREETINGS)
    questions = [{"prompt": f"{greeting}\n"} for greeting in GREETINGS for _ in range(each)]
    if config.style == "tiny":
        for question in questions:
            question["good"] = SMALL_TALK[question["prompt"].strip()][0]
        while len(questions) < 2 * n:
            question = draw_question(rng)
            questions += [question] if question["kind"] == "arithmetic" else []
    _, _, replies = complete(model, tokenizer, [question_prompt(question["prompt"], config.style, tokenizer)
                                                for question in questions],
                             max_new_tokens=min(64, config.max_new_tokens), progress="greetings and sums",
                             **settings)
    table = {"needless_thinking": sum(map(needless_thinking, replies[:n])) / n}
    if config.style == "tiny":
        good = [is_good(reply, question["good"]) for reply, question in zip(replies, questions)]
        table |= {"greetings": sum(good[:n]) / n, "arithmetic": sum(good[n:]) / n}
    return table


def evaluate(model, tokenizer, config: Config) -> tuple[dict, list[dict]]:
    """-> (the table's numbers, a record per completion). Raises ValueError where a prompt does not fit the context."""
    puzzles = sample_puzzles(config.n, level=config.level, held_out=True, seed=config.seed)
    examples = few_shot_examples(config.shots, config.style, config.level, config.seed)
    prompts = [make_prompt(puzzle, config.style, tokenizer, examples) for puzzle in puzzles]
    settings = dict(temperature=config.temperature, top_p=config.top_p, seed=config.seed, slots=config.slots)
    repeated = [prompt for prompt in prompts for _ in range(config.samples)]
    _, completions, texts = complete(model, tokenizer, repeated, max_new_tokens=config.max_new_tokens,
                                     progress="held-out puzzles", **settings)
    groups = [texts[i * config.samples:(i + 1) * config.samples] for i in range(len(puzzles))]
    correct = [[accuracy_reward(text, *puzzle) for text in group] for puzzle, group in zip(puzzles, groups)]
    pass_1 = sum(sum(row) / config.samples for row in correct) / config.n
    low, high = wilson_interval(pass_1, config.n)
    table = {"pass@1": pass_1, "pass@1_low": low, "pass@1_high": high, "n": config.n, "samples": config.samples}
    k = config.samples
    if k > 1:
        for size in sorted({size for size in (4, 16, 64, 256) if size < k} | {k}):
            table[f"pass@{size}"] = sum(pass_at_k(k, int(sum(row)), size) for row in correct) / config.n
        winners = [majority_answer(group, puzzle.numbers) for puzzle, group in zip(puzzles, groups)]
        right = sum(winner is not None and verify(winner, *puzzle)[0] for winner, puzzle in zip(winners, puzzles))
        table[f"maj@{k}"] = right / config.n
    table |= describe(texts, completions, config.language)
    if config.style != "base":  # a base prompt asks for thinking, so there is no small talk to measure
        table |= evaluate_general(model, tokenizer, config, settings)
    records = [{"numbers": puzzle.numbers, "target": puzzle.target, "prompt": prompts[i], "completion": text,
                "verdict": verify(extract_answer(text), *puzzle)[1]}
               for i, puzzle in enumerate(puzzles) for text in groups[i]]
    table["wrong_numbers"] = sum(record["verdict"].startswith("uses") for record in records) / len(records)
    return table, records


def print_table(table: dict) -> None:
    print(f"{'pass@1':>20}  {table['pass@1']:.1%}  (95% interval {table['pass@1_low']:.1%} to "
          f"{table['pass@1_high']:.1%}, n = {table['n']} puzzles x {table['samples']})")
    for name, value in table.items():
        if name not in ("pass@1", "pass@1_low", "pass@1_high", "n", "samples"):
            counted = name in ("completion_tokens", "verifications", "backtracks", "reflection_words")
            print(f"{name:>20}  {f'{value:.2f}' if counted else f'{value:.1%}'}")


def main() -> None:
    config = parse_config(Config, __doc__)
    with bad_input_exits():
        if config.json and Path(config.json).exists():
            raise FileExistsError(f"got --json {config.json}, which exists and is never overwritten; name another file")
        if config.json and not Path(config.json).parent.is_dir():
            raise FileNotFoundError(f"got --json {config.json}, but there is no folder {Path(config.json).parent}; "
                                    "make it first")
        model, tokenizer = load(config.model, dtype=DTYPES[config.dtype], device=config.device)
        table, records = evaluate(model.eval(), tokenizer, config)
    for record in records[:config.show * config.samples:config.samples]:
        print(f"{record['prompt'].removesuffix('<think>')}{record['completion']}\n=> {record['verdict']}\n")
    print_table(table)
    if config.json:
        Path(config.json).write_text(json.dumps({**asdict(config), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
