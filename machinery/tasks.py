"""Tasks behind one seam: found by name, drawn from, put into prompts, scored. A task is a module with these names:

    LEVELS     {name: whatever the task wants}; the first is the default
    WEIGHTS    {"accuracy": 1.0, "format": 0.2}: the reward is the sum of weight * part
    draw(rng, level, split) -> problem       a NamedTuple or a dict of JSON values; split: countdown.SPLITS
    key(problem) -> str                      what makes two problems the same: for the split, and for distinct draws
    question(problem, style) -> str          words only: no chat template, no BOS, no <think>; in style tiny all of it
    score(problem, text) -> (parts, verdict) {"accuracy": 1.0, ...}, and "correct" or why not; never raises on text, may
                                             take its time, and is called on threads (machinery/judging.py)
    gold(problem) -> str                     a completion that score calls correct; None where nobody knows one

and, where it has them, watch(problem, text) -> {name: number}, measured and never paid; group(problem) -> str, a kind
of problem whose accuracy is also given alone; vote(problem, texts) -> answer of the majority (else the commonest answer
as text); examples(rng, level, style, n) -> [(question, completion)] for few-shot prompts (else train problems with their
gold). Two parts are not the task's to score, and are filled in where WEIGHTS names them: "language" (share of the
thinking in --language) and "preference" (a reward model's score, in a batch). countdown.py is one, a JSONL file of
questions and answers another (tasks/questions.py); docs/fork-it.md shows more.

    --task countdown | arithmetic | code | general | my_task.py | my_questions.jsonl | countdown=3,general=1
"""

import contextlib
import importlib
import importlib.util
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from countdown import SPLITS, check_split, check_style, distinct, fill_template
from machinery.flags import fail
from machinery.judging import FILLED_IN, Judged, Judges, Judging, judge
from rewards import answer_or_text, language_reward

BUILT_IN = {"countdown": "countdown", "arithmetic": "tasks.arithmetic", "code": "tasks.code", "general": "tasks.general"}
NAMES = ("LEVELS", "WEIGHTS", "draw", "key", "question", "score", "gold")
PATIENCE = 1_000_000  # random numbers that a draw may take before its split counts as empty


@dataclass(frozen=True)
class Task:
    name: str
    spec: str                  # as --task names it: the name, or a file
    seam: object               # the module, with the names above
    level: str
    share: float               # of the problems, where a run has several tasks
    weights: dict[str, float]  # WEIGHTS, and what --weights says

    def prompt(self, problem, style: str, tokenizer=None, examples=()) -> str:
        return fill_template(self.seam.question(problem, style), style, tokenizer, examples)

    def problems(self, n: int, split: str, seed: int) -> list:
        """n different ones, in an order that the seed fixes; n = 0: 512, or as many as there are. Raises ValueError where
        the task has fewer."""
        return list(distinct_problems(self.name, self.seam, self.level, n, split, seed))

    def examples(self, n: int, style: str, rng: random.Random) -> list[tuple[str, str]]:
        if hasattr(self.seam, "examples"):
            return self.seam.examples(rng, self.level, style, n)
        drawn = [self.seam.draw(rng, self.level, "train") for _ in range(n)]
        return [(self.seam.question(problem, style), self.seam.gold(problem)) for problem in drawn]

    def watch(self, problem, text: str) -> dict[str, float]:
        return self.seam.watch(problem, text) if hasattr(self.seam, "watch") else {}

    def group(self, problem) -> str:
        return self.seam.group(problem) if hasattr(self.seam, "group") else ""

    def majority(self, problem, texts: list[str]) -> str | None:
        """A text that answers as the majority does; None where nobody answers."""
        if hasattr(self.seam, "vote"):
            winner = self.seam.vote(problem, texts)
            return None if winner is None else f"<answer>{winner}</answer>"
        answers = list(map(answer_or_text, texts))
        votes = Counter(filter(None, answers)).most_common(1)  # on a tie the first one wins
        return texts[answers.index(votes[0][0])] if votes else None


@lru_cache(maxsize=16)
def distinct_problems(name: str, seam, level: str, n: int, split: str, seed: int) -> list:
    """Task.problems, drawn once: an evaluation asks for the same ones each time, and a large level takes seconds."""
    check_split(split)
    rng = random.Random(seed)
    return distinct(n or 512, lambda: seam.draw(rng, level, split), seam.key, f"task {name} at level {level!r}",
                    f"{split} problems", fewer=not n, group=getattr(seam, "group", lambda problem: ""))


class Score(NamedTuple):
    reward: float            # the weighted sum
    parts: dict[str, float]
    watched: dict[str, float]
    verdict: str             # correct, or why not
    group: str               # of the problem, "" for a task without groups


def score_completions(drawn: list[tuple], prompts: list[str], texts: list[str], reward_model, language: str,
                      judged: list[Judged] | None = None) -> list[Score]:
    """drawn: a (task, problem) pair a completion. reward_model(prompts, texts) -> scores is asked once, for all
    completions of tasks that weigh "preference". judged: by judging.Judging; None: here, one after the other."""
    preferred = [i for i, (task, _) in enumerate(drawn) if "preference" in task.weights]
    preference = dict(zip(preferred, reward_model([prompts[i] for i in preferred], [texts[i] for i in preferred]))
                      ) if preferred else {}
    scores = []
    for i, ((task, problem), text) in enumerate(zip(drawn, texts, strict=True)):
        parts, verdict, watched = judged[i] if judged else judge(task, problem, text)
        if "language" in task.weights:
            parts = {**parts, "language": language_reward(text, language)}
        if i in preference:
            parts = {**parts, "preference": preference[i]}
        reward = sum(weight * parts[name] for name, weight in task.weights.items())
        if not math.isfinite(reward):
            fail(f"got a reward of {reward} from task {task.name} for {text[:60]!r} ({parts}), expected a finite number")
        scores.append(Score(reward, parts, watched, verdict, task.group(problem)))
    return scores


def shares(tasks: tuple[Task, ...], n: int) -> list[int]:
    """How many of n problems each task gets: its rounded share, at least one; the first gets what is left."""
    others = [max(1, round(task.share * n)) for task in tasks[1:]]
    if sum(others) >= n:
        raise ValueError(f"got {n} problems at a time for {len(tasks)} tasks, expected at least one for each; ask for more "
                         "(--batch-size, or --n), or name fewer tasks")
    return [n - sum(others), *others]


def draw_problems(tasks: tuple[Task, ...], n: int, rng: random.Random) -> list[tuple]:
    """n (task, train problem) pairs, task after task."""
    return [(task, task.seam.draw(rng, task.level, "train"))
            for task, count in zip(tasks, shares(tasks, n)) for _ in range(count)]


def as_dict(problem) -> dict:
    return problem._asdict() if hasattr(problem, "_asdict") else dict(problem)


@lru_cache
def find_tasks(tasks: str, level: str = "", weights: str = "", style: str = "tiny", beside: str = "", sandbox: str = ""
               ) -> tuple[Task, ...]:
    """What --task, --level, --weights and --style say. Raises ValueError for whatever is wrong with them, and with a task
    file: it is drawn from and scored here, before a model is loaded.

    level: with commas between, one for each task that shall not take its first. beside: tasks named by another flag,
    which may know a level too. sandbox: command that programs run behind (tasks/code.py)."""
    check_style(style)
    named, found = pairs(tasks, "task", 1.0), []
    levels, changed = [name for name in level.split(",") if name], pairs(weights, "weights")
    for name, share in named.items():
        if not share > 0:
            raise ValueError(f"got --task {tasks}, where {name} has weight {share:g}; expected more than 0, or leave "
                             "it out")
        seam = load_seam(name, sandbox)
        own_level = next((known for known in levels if known in seam.LEVELS), next(iter(seam.LEVELS)))
        own_weights = {**seam.WEIGHTS, **{part: weight for part, weight in changed.items() if part in seam.WEIGHTS}}
        found.append(Task(Path(name).stem, name, seam, own_level, share / sum(named.values()), own_weights))
        try:
            check_task(found[-1], style)
        except ValueError:
            raise
        except Exception as error:  # somebody's own code
            raise ValueError(f"got task {name}, which fails on its own problems ({type(error).__name__}: {error}); "
                             "expected draw, key, question, score and gold to take what draw returns") from None
    others = [load_seam(name, sandbox) for name in pairs(beside, "task", 1.0)] if beside else []
    if sandbox and not any(hasattr(seam, "sandbox") for seam in [*(task.seam for task in found), *others]):
        raise ValueError(f"got --sandbox {sandbox!r} and --task {tasks}, which runs no program; leave it out")
    every = {known: None for seam in [*(task.seam for task in found), *others] for known in seam.LEVELS}
    if unknown := [name for name in levels if name not in every]:
        raise ValueError(f"got level {unknown[0]!r}, expected one of {', '.join(every)}")
    if unknown := [name for name in changed if not any(name in task.weights for task in found)]:
        known = {name: None for task in found for name in task.weights}
        raise ValueError(f"got --weights with {unknown[0]!r}, expected some of {', '.join(known)}")
    if len({task.name for task in found}) < len(found):
        raise ValueError(f"got --task {tasks}, where two tasks have the same name; rename a file")
    return tuple(found)


def pairs(text: str, flag: str, default: float | None = None) -> dict[str, float]:
    """"a=3,b=1" -> {"a": 3.0, "b": 1.0}"""
    found = {}
    for item in filter(None, text.split(",")):
        name, equals, number = item.rpartition("=")
        if not equals and default is not None:
            name, number = item, default
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"got --{flag} {text}, expected NAME=NUMBER with commas between") from None
        if not math.isfinite(value):
            raise ValueError(f"got --{flag} {text}, expected finite numbers")
        if name in found or not name:
            raise ValueError(f"got --{flag} {text}, expected every name once")
        found[name] = value
    if not found and default is not None:
        raise ValueError(f"got an empty --{flag}, expected one of {', '.join(BUILT_IN)}, a .py or a .jsonl file")
    return found


def load_seam(name: str, sandbox: str = ""):
    path = Path(name)
    if name in BUILT_IN:
        seam = importlib.import_module(BUILT_IN[name])
    elif path.suffix.lower() not in (".py", ".jsonl"):
        raise ValueError(f"got task {name!r}, expected one of {', '.join(BUILT_IN)}, a .py or a .jsonl file")
    elif not path.is_file():
        raise FileNotFoundError(f"got task {name!r}, but there is no such file")
    elif path.suffix.lower() == ".jsonl":
        from machinery.data import read_jsonl
        programs = any("tests" in row or "entry_point" in row for row in read_jsonl(path))
        seam = importlib.import_module("tasks.code").Programs.read(path, sandbox) if programs else importlib.import_module(
            "tasks.questions").Questions.read(path)
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        seam = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(seam)
        except Exception as error:  # it is somebody's own code
            raise ValueError(f"got task {name}, which does not import ({type(error).__name__}: {error})") from None
    if missing := [needed for needed in NAMES if not hasattr(seam, needed)]:
        raise ValueError(f"got task {name} without {', '.join(missing)}; expected {', '.join(NAMES)}: "
                         "docs/fork-it.md says what each does")
    if not seam.LEVELS or not seam.WEIGHTS:
        raise ValueError(f"got task {name} with LEVELS {seam.LEVELS} and WEIGHTS {seam.WEIGHTS}, expected one of each")
    return seam


class Limited(random.Random):
    """Gives up where a split is empty, instead of drawing for ever."""
    left = PATIENCE

    def random(self):
        return self.count() or super().random()

    def getrandbits(self, k):
        return self.count() or super().getrandbits(k)

    def count(self):
        self.left -= 1
        if self.left < 0:
            raise ValueError("an empty split")


def check_task(task: Task, style: str) -> None:
    """Raises ValueError unless all splits can be drawn from and none meet, and every gold is correct; judges ask,
    so that what cannot be called on threads is found out here."""
    seam, keys, golds = task.seam, {}, []
    for split in SPLITS:
        rng = Limited(0)
        try:
            problems = [seam.draw(rng, task.level, split) for _ in range(20)]
        except ValueError as error:
            if rng.left >= 0:
                raise
            raise ValueError(f"got task {task.name} without a {split} problem at level {task.level!r} ({error}); "
                             f"expected draw(rng, level, split) to know {', '.join(SPLITS)}") from None
        for problem in problems:
            if keys.setdefault(seam.key(problem), split) != split:
                raise ValueError(f"got task {task.name}, which draws {seam.key(problem)!r} for {keys[seam.key(problem)]} and "
                                 f"for {split}; expected each key in one of them: see countdown.split_of")
        for problem in problems:
            seam.question(problem, style)
            if (gold := seam.gold(problem)) is not None:
                golds.append((problem, gold))
    with contextlib.closing(Judges()) as judges:
        try:
            judged = Judging(judges, [(task, problem) for problem, _ in golds]).verdicts([gold for _, gold in golds])
        except Exception as error:
            raise ValueError(f"got task {task.name}, whose score fails on its own gold ({type(error).__name__}: {error}); expected "
                             "one that judges can call, on threads and so without signals") from None
    for (problem, _), (parts, verdict, _) in zip(golds, judged):
        if verdict != "correct":
            raise ValueError(f"got task {task.name}, whose score calls its own gold {verdict!r} for {problem}; "
                             "expected 'correct'")
        if missing := [name for name in task.weights if name not in (*parts, *FILLED_IN)]:
            raise ValueError(f"got task {task.name}, whose WEIGHTS name {missing[0]!r}; expected a part that its "
                             f"score gives ({', '.join(parts) or 'none'})")
