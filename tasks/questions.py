"""Questions of your own: a JSONL file, {"question": ..., "answer": ...} a line, is a task. GSM8K's files are such files.

    python train_countdown.py --task my_questions.jsonl --model Qwen/Qwen2.5-1.5B-Instruct --style chat ...

A hash of the question decides its split: 70% train, 15% validation, 15% test (countdown.split_of). Answers are compared
exactly: as numbers where both are numbers (1,234 is 1234, 0.50 is 1/2, -3 is not 3), else as text, letter case and white
space aside. In an answer with `#### 42` or `\\boxed{42}` that is what counts, in the file and in what the model writes. A
model answers in <answer></answer>, or with nothing but the answer. Questions without any answer in the whole file have no
rule: then a reward model judges (--preference). No torch in here.
"""

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from countdown import SPLITS, split_of
from rewards import answer_or_text, format_reward
from tasks import ask

EXPECTED = '{"question": "...", "answer": "..."} with text in both, or a number as the answer'
NUMBER = re.compile(r"([+-]?)\s*(?:([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(\.[0-9]+)?|([0-9]+)\s*/\s*([0-9]+))")


def final_value(text: str) -> Fraction | str:
    """What an answer comes down to: an exact number, or text to compare."""
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)  # one pair of braces inside: \boxed{\frac{1}{2}}
    text = boxed[-1] if boxed else text.rpartition("####")[2]
    text = re.sub(r"\\d?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text).strip().strip("$").removesuffix(".").strip()
    match = NUMBER.fullmatch(text) if len(text) <= 100 else None
    if not match or not any(match.groups()[1:]) or match[5] and not int(match[5]):
        return " ".join(text.lower().split())
    value = Fraction(int(match[4]), int(match[5])) if match[4] else Fraction(
        f"{(match[2] or '0').replace(',', '')}{match[3] or ''}")
    return -value if match[1] == "-" else value


def same_words(question: str) -> str:
    """What makes two questions the same: white space aside, so that none is in two splits."""
    return " ".join(question.split())


def by_split(path: Path, rows: list[dict]) -> dict[str, list[dict]]:
    """Raises ValueError where a split gets none."""
    found = {split: [row for row in rows if split_of(same_words(row["question"])) == split] for split in SPLITS}
    if not all(found.values()):
        counts = ", ".join(f"{len(own)} are for {split}" for split, own in found.items())
        questions = {same_words(row["question"]) for row in rows}
        raise ValueError(f"got {path} with {len(questions)} questions, of which {counts}; expected some of each: bring more")
    return found


def check_answer(text: str, expected: str) -> str:
    """correct, or why not."""
    answer = answer_or_text(text)
    if not answer:
        return "no single final answer"
    value, wanted = final_value(answer), final_value(expected)
    return "correct" if value == wanted else f"{str(value)[:60]} is not {wanted}"


@dataclass(frozen=True, eq=False)  # one file, one object: it can be a key
class Questions:
    """The task that a file makes."""
    path: Path
    rows: dict[str, list[dict]]  # of each split
    WEIGHTS: dict[str, float]
    LEVELS = {"all": None}

    @classmethod
    def read(cls, path: Path) -> "Questions":
        """Raises ValueError with the file and the line where a row is wrong."""
        from machinery.data import check_characters, read_jsonl
        rows, lines = [], {}
        given = read_jsonl(path)
        judged = not any("answer" in row for row in given)
        for number, row in enumerate(given, 1):
            question, answer = row.get("question"), row.get("answer", "?" if judged else "")
            answer = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
            if not all(isinstance(text, str) and text.strip() for text in (question, answer)) or final_value(answer) == "":
                raise ValueError(f"got {path}, line {number}: {str(row)[:80]}; expected {EXPECTED}")
            try:
                check_characters(question + answer)
            except ValueError as error:
                raise ValueError(f"got {path}, line {number} {error}") from None
            first, known = lines.setdefault(same_words(question), (number, answer))
            if final_value(known) != final_value(answer):
                raise ValueError(f"got {path}, line {number}, with the question of line {first} and another answer; "
                                 "expected one answer for it")
            rows.append({"question": question, "answer": answer})
        return cls(path, by_split(path, rows), {"preference": 1.0} if judged else {"accuracy": 1.0, "format": 0.2, "language": 0.0})

    def draw(self, rng: random.Random, level: str, split: str) -> dict:
        return rng.choice(self.rows[split])

    def key(self, problem: dict) -> str:
        return same_words(problem["question"])

    def question(self, problem: dict, style: str) -> str:
        return problem["question"] if "preference" in self.WEIGHTS else ask(problem["question"], style)

    def score(self, problem: dict, text: str) -> tuple[dict[str, float], str]:
        if "preference" in self.WEIGHTS:
            return {}, "correct"  # no rule says no
        verdict = check_answer(text, problem["answer"])
        return {"accuracy": float(verdict == "correct"), "format": format_reward(text)}, verdict

    def gold(self, problem: dict) -> str:
        thinking, _, _ = problem["answer"].rpartition("####")
        value = final_value(problem["answer"])
        return f"<think>\n{thinking.strip() or value}\n</think>\n<answer>{value}</answer>"
