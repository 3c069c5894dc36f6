"""One evaluator for every checkpoint: pass@1, pass@k, majority vote, format, length, reflection, language, small talk.

Test problems of a task, each one once, in an order that the seed fixes. Whoever chooses between two models or settings
looks at --split validation, so that the test problems say what was not chosen on them.

    python evaluate.py --model models/tiny-base                        # 512 test puzzles, a sample each, temperature 1
    python evaluate.py --model models/tiny-base --samples 16           # adds pass@16 and maj@16
    python evaluate.py --model runs/zero/checkpoint --show 3           # read what it writes, with verdicts
    python evaluate.py --model runs/zero/checkpoint --temperature 0    # greedy
    python evaluate.py --model Qwen/Qwen2.5-1.5B --style base --level tinyzero --max-new-tokens 1024 --shots 2
    python evaluate.py --task my_questions.jsonl --n 100               # a task of your own: docs/fork-it.md

DeepSeek-R1 (section 3) evaluates at temperature 0.6, top-p 0.95; the defaults, 1 and 1, are the policy as RL trains it.
"""

import contextlib
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from countdown import check_split, fill_template
from machinery.checkpoints import DTYPES, check_dtype, end_tokens, load
from machinery.flags import bad_input_exits, parse_config
from machinery.judging import Judges, Judging, check_judges, late_share
from machinery.run_folder import check_new_file, write_json
from machinery.statistics import name_problems, wilson_interval
from machinery.tasks import as_dict, find_tasks
from machinery.text import check_numbers, check_style_fits, opened_thinking
from rewards import REFLECTION_WORDS, WORD, chain_of_thought, language_counts, language_reward
from sampling import complete
from tasks.general import draw_sum, is_good, needless_thinking, small_talk

GENERAL_N = 512  # replies to greetings, and to arithmetic questions; fewer where fewer puzzles are asked


@dataclass(frozen=True)
class Config:
    model: str = "models/tiny-base"  # checkpoint directory or hub id
    task: str = "countdown"          # countdown, arithmetic, code, general, a .py or .jsonl file: machinery/tasks.py
    level: str = ""                  # of the task, such as four; empty: its first
    split: str = "test"              # test to report; validation to choose; train to see what was learnt by heart
    style: str = "tiny"              # prompt template: tiny, base or chat
    n: int = 0                       # problems; 0: 512, or as many as the task has
    samples: int = 1                 # completions per puzzle; pass@k and maj@k use all of them
    temperature: float = 1.0         # 0 is greedy
    top_p: float = 1.0               # nucleus sampling; DeepSeek-R1 evaluates with 0.95
    max_new_tokens: int = 1024       # a completion that has not ended by then counts as truncated, and as wrong
    shots: int = 0                   # solved examples before each prompt, drawn for each problem
    language: str = "en"             # the language that consistency is measured against
    sandbox: str = ""                # command that the answers of a task with tests run behind: docs/code.md
    judges: int = 0                  # verdicts at the same time, while others write; 0: one a core, on a CPU at the end
    verdict_seconds: float = 300.0   # for each; a later one counts as wrong
    show: int = 0                    # print this many completions with their verdicts
    json: str = ""                   # also write the settings and the table to this file
    seed: int = 0                    # which puzzles, and the sampling
    slots: int = 256                 # rows that decode at the same time; memory and speed, never the tokens
    dtype: str = "float32"           # what the model computes in: float32 or bfloat16
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        if len(find_tasks(self.task, self.level, "", self.style, sandbox=self.sandbox)) > 1:
            raise ValueError(f"got --task {self.task}, expected one: evaluate several one after the other")
        check_split(self.split)
        if min(self.samples, self.max_new_tokens, self.slots) < 1 or min(self.n, self.shots) < 0:
            raise ValueError("expected samples, max_new_tokens and slots of at least 1, n and shots of at least 0")
        check_dtype(self.dtype)
        check_judges(self.judges, self.verdict_seconds)
        if not (self.temperature == 0 or self.temperature >= 0.01) or not 0 < self.top_p <= 1:
            raise ValueError(f"got temperature {self.temperature} and top_p {self.top_p}, "
                             "expected at least 0.01, or 0 for greedy, and within (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"got samples {self.samples} at temperature 0, where all samples are the same; "
                             "use --samples 1")


# ----------------------------------------------------------------------------------------------------------- estimators
def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of pass@k of arXiv 2107.03374."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


# --------------------------------------------------------------------------------------- what is watched and never paid
def reflection_words(completion: str) -> dict[str, int]:
    """Each reflection word of either language in the CoT -> how often; whole words only, upper and lower case alike."""
    words = Counter(WORD.findall(chain_of_thought(completion).lower()))
    return {word: n for word, n in words.items() if any(word in known for known in REFLECTION_WORDS.values())}


def is_mixed(completion: str) -> bool:
    """Whether the CoT holds words of both languages; what R1-Zero drifts to, and what rejection sampling drops."""
    return all(language_counts(completion).values())


def looks(texts: list[str], completions, language: str = "en") -> dict[str, float]:
    """Means over completions of what can be said of those of any task; the same names in training and evaluation logs."""
    return {"completion_tokens": mean(len(c.token_ids) for c in completions),
            "truncated": mean(c.truncated for c in completions),
            "reflection_words": mean(sum(reflection_words(text).values()) for text in texts),
            "language": mean(language_reward(text, language) for text in texts),
            "mixed": mean(map(is_mixed, texts))}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of dictionaries, each name over those that have it: nothing is watched where a verdict came too late."""
    return {name: mean(row[name] for row in rows if name in row) for name in dict.fromkeys(name for row in rows for name in row)}


# ------------------------------------------------------------------------------------------------------------ measuring
def by_group(name: str, groups: list[str], values: list[float]) -> dict[str, float]:
    """{"pass@1_3_numbers": mean of that group's values}; nothing for a task without groups."""
    return {f"{name}_{group}": mean(value for own, value in zip(groups, values, strict=True) if own == group)
            for group in sorted(set(groups)) if group}


def describe_step(rollouts, language: str) -> dict[str, float]:
    """The step's log: reward, its parts, what the task watches, and looks, of the first task; and beside them, with the
    task's name before each, reward, parts and what is watched of the others. rollouts: machinery.rollouts.Rollout, of
    all processes."""
    row, names = {}, list(dict.fromkeys(rollout.task for rollout in rollouts))
    for name in names:
        own = [rollout for rollout in rollouts if rollout.task == name]
        table = {"reward": mean(r.score.reward for r in own), **means([r.score.parts for r in own]),
                 **means([r.score.watched for r in own])}
        if "accuracy" in table:
            table |= by_group("accuracy", [r.score.group for r in own], [r.score.parts.get("accuracy", 0.0) for r in own])
        if name == names[0]:
            row = table | looks([r.text for r in own], [r.completion for r in own], language) | by_group(
                "completion_tokens", [r.score.group for r in own], [len(r.completion.token_ids) for r in own])
        else:
            row |= {f"{name}_{column}": value for column, value in table.items()}
    return row


def evaluate_general(model, tokenizer, n: int, config: Config, settings: dict) -> dict[str, float]:
    """What R1 is asked beside puzzles: the share of 512 replies to greetings that think, and, for the tiny model, the
    shares that are good by the rule: of these greetings, which training knows, of about 512 replies to ones that nothing
    ever trained on, and of 512 sums of the split."""
    rng, n = random.Random(config.seed), min(n, GENERAL_N)
    asked = {"greetings": small_talk("train") * max(1, n // len(small_talk("train")))}
    if config.style == "tiny":
        new = [] if config.split == "train" else small_talk(config.split)
        asked |= {"new_greetings": new * max(1, n // max(1, len(new))),
                  "arithmetic": [draw_sum(rng, config.split) for _ in range(n)]}
    questions = [question for own in asked.values() for question in own]
    _, _, replies = complete(model, tokenizer, [fill_template(question["prompt"], config.style, tokenizer)
                                                for question in questions],
                             max_new_tokens=min(64, config.max_new_tokens), check_ends=False,
                             progress="greetings and sums", **settings)
    table = {"needless_thinking": mean(map(needless_thinking, replies[:len(asked["greetings"])]))}
    good = iter([is_good(reply, question["good"]) for reply, question in zip(replies, questions)])
    shares = {name: mean(next(good) for _ in own) for name, own in asked.items() if own}
    return table | (shares if config.style == "tiny" else {})


def votes_are_right(task, problems: list, texts: list[str], judges: Judges) -> list[bool]:
    """Of each problem whether the majority of its texts is right."""
    k = len(texts) // len(problems)
    winners = [task.majority(problem, texts[i * k:(i + 1) * k]) for i, problem in enumerate(problems)]
    judged = Judging(judges, [(task, problem) for problem in problems]).verdicts([winner or "" for winner in winners])
    return [winner is not None and one.verdict == "correct" for winner, one in zip(winners, judged)]


def draw_examples(task, config: Config, i: int) -> list[tuple[str, str]]:
    """The solved examples before the i-th problem's prompt: each problem has its own, so none speaks for all."""
    rng = random.Random(f"{config.seed}, {i}")
    if task.name == "countdown" and config.style == "tiny":  # as the tiny base has read them
        import corpus
        return corpus.examples(rng, task.level, config.shots)
    return task.examples(config.shots, config.style, rng)


def evaluate(model, tokenizer, config: Config, judges: Judges | None = None) -> tuple[dict, list[dict]]:
    """-> (the table's numbers, a record per completion). judges: those of a run that evaluates; None: some of its own.
    Raises ValueError where a prompt does not fit the context."""
    if not judges:
        with contextlib.closing(Judges(config.judges, config.verdict_seconds, config.device)) as own:
            return evaluate(model, tokenizer, config, own)
    task, = find_tasks(config.task, config.level, "", config.style, sandbox=config.sandbox)
    problems = task.problems(config.n, config.split, config.seed)
    prompts = [task.prompt(problem, config.style, tokenizer, draw_examples(task, config, i))
               for i, problem in enumerate(problems)]
    settings = dict(style=config.style, temperature=config.temperature, top_p=config.top_p, seed=config.seed,
                    slots=config.slots)
    check_numbers(tokenizer, prompts, config.style)
    n, k = len(problems), config.samples
    drawn = [problem for problem in problems for _ in range(k)]
    judging = Judging(judges, [(task, problem) for problem in drawn])
    _, completions, texts = complete(model, tokenizer, [prompt for prompt in prompts for _ in range(k)],
                                     max_new_tokens=config.max_new_tokens, progress=f"{config.split} problems",
                                     finished=judging.begin, **settings)
    judged = judging.verdicts(texts)
    right = [[one.verdict == "correct" for one in judged[i:i + k]] for i in range(0, len(judged), k)]
    shares = [sum(row) / k for row in right]
    pass_1 = sum(shares) / n
    low, high = wilson_interval(pass_1, n)
    table = {"pass@1": pass_1, "pass@1_low": low, "pass@1_high": high, "n": n, "samples": k,
             **by_group("pass@1", list(map(task.group, problems)), shares)}
    if k > 1:
        for size in sorted({size for size in (4, 16, 64, 256) if size < k} | {k}):
            table[f"pass@{size}"] = sum(pass_at_k(k, sum(row), size) for row in right) / n
        votes = votes_are_right(task, problems, texts, judges)
        table[f"maj@{k}"] = mean(votes)
    parts = means([one.parts for one in judged])
    parts.pop("accuracy", None)  # it is pass@1
    table |= parts | means([one.watched for one in judged]) | late_share([one.verdict for one in judged])
    table |= looks(texts, completions, config.language)
    table |= by_group("completion_tokens", list(map(task.group, drawn)), [len(c.token_ids) for c in completions])
    if task.name == "countdown":
        table["wrong_numbers"] = mean(one.verdict.startswith("uses") for one in judged)
        if config.style != "base":  # a base prompt asks for thinking, so there is no small talk to measure
            table |= evaluate_general(model, tokenizer, n, config, settings)
    records = [{**as_dict(problem), "key": task.seam.key(problem), "prompt": prompts[i // k], "completion": text,
                "verdict": one.verdict, **({"vote": votes[i // k]} if k > 1 else {})}
               for i, (problem, text, one) in enumerate(zip(drawn, texts, judged))]
    return table, records


def by_problem(records: list[dict], samples: int) -> dict:
    """For machinery/statistics.py: which problems these are, as a hash, how many samples of each are right, and, of
    several, whether their majority is."""
    right = [record["verdict"] == "correct" for record in records]
    return {"problems": name_problems(record["key"] for record in records[::samples]),
            "right": [sum(right[i:i + samples]) for i in range(0, len(right), samples)],
            **({"votes": [int(record["vote"]) for record in records[::samples]]} if samples > 1 else {})}


def print_table(table: dict, split: str) -> None:
    print(f"{'pass@1':>20}  {table['pass@1']:.1%}  (95% interval {table['pass@1_low']:.1%} to "
          f"{table['pass@1_high']:.1%}, n = {table['n']} {split} problems x {table['samples']})")
    for name, value in table.items():
        if name not in ("pass@1", "pass@1_low", "pass@1_high", "n", "samples"):
            counted = name.startswith(("completion_tokens", "verifications", "backtracks", "reflection_words", "attempts"))
            print(f"{name:>20}  {f'{value:.2f}' if counted else f'{value:.1%}'}")


def main() -> None:
    config = parse_config(Config, __doc__)
    with bad_input_exits():
        check_new_file("--json", config.json)
        model, tokenizer = load(config.model, dtype=DTYPES[config.dtype], device=config.device)
        check_style_fits(model, tokenizer, config.style, end_tokens(model, tokenizer))
        table, records = evaluate(model.eval(), tokenizer, config)
    for record in records[:config.show * config.samples:config.samples]:
        prompt = record['prompt'].removesuffix(opened_thinking(record['prompt']))
        print(f"{prompt}{record['completion']}\n=> {record['verdict']}\n")
    print_table(table, config.split)
    if config.json:
        write_json(Path(config.json), {"settings": asdict(config), **table, **by_problem(records, config.samples)})


if __name__ == "__main__":
    main()
