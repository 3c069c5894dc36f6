"""Countdown: a target from a few numbers, each used exactly once, with + - * / and parentheses. "Using 3 4 5, make 27."

The task of TinyZero, and ours because it is the smallest task on which search pays: a guess is cheap to check, so a
model that tries, checks and goes back beats one that guesses. Everything about puzzles lives here: drawing them,
solving them exactly, the split into train, validation and test, and the prompts. The text that the tiny base model
learnt from is written by corpus.py.

    python countdown.py puzzles --level four --n 5            # draw puzzles, with a solution each
    python countdown.py solve 3 4 5 --target 27               # 3*(4+5)
    python countdown.py prompt 3 4 5 --target 27 --style base # what the model reads

No torch in here: a puzzle is a tuple of integers.
"""

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rewards import chain_of_thought, extract_answer, format_reward, parse_expression, verify


class Puzzle(NamedTuple):
    numbers: tuple[int, ...]
    target: int


class Level(NamedTuple):
    counts: tuple[int, ...]  # how many numbers a puzzle has; equally many puzzles of each
    largest: int             # numbers are drawn from 1..largest, repeats allowed
    targets: tuple[int, int]  # smallest and largest target


LEVELS = {
    "laptop": Level((3, 4), 10, (1, 30)),      # what the tiny base was pretrained on: 2,025 + 17,147 puzzles
    "three": Level((3,), 10, (1, 30)),         # its easier half
    "four": Level((4,), 10, (1, 30)),          # its harder half
    "hundred": Level((4,), 10, (31, 100)),     # beyond it: targets that no document asks for; RL still moves it
    "five": Level((5,), 10, (1, 30)),          # too far beyond it: one number more; base and R1-Zero solve 0 of 512
    "tinyzero": Level((3, 4), 99, (10, 100)),  # TinyZero's own level, for real checkpoints
}
SPLITS = {"test": 15, "validation": 15, "train": 70}  # percent: numbers that are reported, choices, and all training
PATIENCE = 3000  # draws in a row that bring nothing new, until a split counts as exhausted
MAX_NUMBERS = 6  # the solver below is exact, so its work grows about twentyfold with each number


# -------------------------------------------------------------------------------------------------------------- solving
def splits(numbers: tuple[int, ...]):
    """Every way to part the numbers into two non-empty groups; the last is always in the second: none comes twice."""
    for subset in range(1, 2 ** (len(numbers) - 1)):  # bit i set: numbers[i] goes into the first group
        yield (tuple(n for i, n in enumerate(numbers) if subset >> i & 1),
               tuple(n for i, n in enumerate(numbers) if not subset >> i & 1))


@lru_cache(maxsize=4096)
def reachable(numbers: tuple[int, ...]) -> dict[Fraction, tuple]:
    """Every value that uses each of the numbers exactly once, with one way to make it.

    A way is (op, left, right), where left and right are ways again or plain integers. Dynamic programming over splits:
    whatever the last operation is, it joins two non-empty groups of the numbers, so combine the values of every group
    with those of its complement. Exact, since values are fractions; complete, since every expression has a last
    operation."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): numbers[0]}
    ways: dict[Fraction, tuple] = {}
    for first, second in splits(numbers):
        for x, left in reachable(first).items():
            for y, right in reachable(second).items():
                ways.setdefault(x + y, ("+", left, right))
                ways.setdefault(x * y, ("*", left, right))
                ways.setdefault(x - y, ("-", left, right))
                ways.setdefault(y - x, ("-", right, left))
                if y:
                    ways.setdefault(x / y, ("/", left, right))
                if x:
                    ways.setdefault(y / x, ("/", right, left))
    return ways


@lru_cache(maxsize=2 ** 16)
def find_way(numbers: tuple[int, ...], target: int) -> tuple | int | None:
    """A way from exactly these numbers to the target, or None: meet in the middle at the last operation.

    For each value x of one group the operation fixes what the other group has to make, so a look-up replaces the loop.
    """
    if len(numbers) > MAX_NUMBERS:
        raise ValueError(f"got {len(numbers)} numbers, the exact solver takes at most {MAX_NUMBERS}")
    if len(numbers) == 1 or target == 0:  # zero has no such inverse: x * y = 0 holds for x = 0 and every y
        return reachable(numbers).get(Fraction(target))
    for first, second in splits(numbers):
        other = reachable(second)
        for x, left in reachable(first).items():
            for y, op, swap in ((target - x, "+", False), (x - target, "-", False), (target + x, "-", True),
                                (x and target / x, "*", False), (x / target, "/", False), (target * x, "/", True)):
                if y in other and (x or op in "+-"):  # x = 0 neither multiplies to the target nor divides
                    return (op, other[y], left) if swap else (op, left, other[y])
    return None


def write_expression(way) -> str:
    """(op, left, right) or an integer -> text; inner operations get parentheses, so nothing hangs on precedence."""
    if isinstance(way, int):
        return str(way)
    op, left, right = way
    left, right = (write_expression(side) if isinstance(side, int) else f"({write_expression(side)})"
                   for side in (left, right))
    return f"{left}{op}{right}"


def solve(numbers, target: int) -> str | None:
    """An expression over exactly these numbers with exactly this value, or None, which proves that there is none."""
    way = find_way(tuple(sorted(numbers)), target)
    return None if way is None else write_expression(way)


# -------------------------------------------------------------------------------------------------------------- puzzles
def split_of(problem) -> str:
    """train, validation or test, by a hash of the problem's key: of a puzzle, or of the key of any task's problem."""
    text = problem if isinstance(problem, str) else key(problem)
    place = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    for split, percent in SPLITS.items():
        if place < percent:
            return split
        place -= percent


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")


def sample_puzzle(rng: random.Random, level: str = "laptop", split: str = "train") -> Puzzle:
    """A solvable puzzle of this level and split. How many numbers it has is drawn first: no count is rarer than another
    because fewer of its puzzles are solvable."""
    check_split(split)
    counts, largest, (low, high) = LEVELS[level]
    count = rng.choice(counts)
    while True:
        puzzle = Puzzle(tuple(rng.randint(1, largest) for _ in range(count)), rng.randint(low, high))
        if split_of(puzzle) == split and solve(*puzzle):
            return puzzle


def sample_puzzles(n: int, *, level: str = "laptop", split: str, seed: int) -> list[Puzzle]:
    """n different solvable puzzles of one split. Raises ValueError where the level holds fewer."""
    rng = random.Random(seed)
    return distinct(n, lambda: sample_puzzle(rng, level, split), key, f"level {level!r}", f"{split} puzzles", group=group)


def distinct(n: int, draw, key, where: str, what: str, *, fewer: bool = False, group=lambda problem: "") -> list:
    """n different ones of what draw() returns. One that was there before is replaced by one of the same group, so that a
    small group is not crowded out. Where no new one comes any more: ValueError, or, with fewer, those."""
    found, misses, wanted, exhausted = {}, 0, None, set()
    while len(found) < n:
        problem = draw()
        if wanted in (None, group(problem)):
            wanted = group(problem) if key(problem) in found and group(problem) not in exhausted else None
            misses = misses + 1 if key(problem) in found else 0
            found.setdefault(key(problem), problem)
        if misses > PATIENCE:
            if fewer and wanted is not None:  # of other groups there may be more
                exhausted.add(wanted)
                misses, wanted = 0, None
                continue
            if fewer:
                break
            of_these = f" of {wanted.replace('_', ' ')}" if wanted else ""
            have = sum(group(problem) == wanted for problem in found.values()) if wanted else len(found)
            raise ValueError(f"got n={n}, but {where} has only about {have} {what}{of_these}; ask for fewer")
    return list(found.values())


# -------------------------------------------------------------------------------------------------------------- prompts
STYLES = ("tiny", "base", "chat")  # prompt templates, see fill_template
BASE_TEMPLATE = """A user asks a question and an assistant answers it. The assistant first reasons inside <think> and \
</think> tags, then gives its result inside <answer> and </answer> tags.
User: {question}
Assistant: Let me work through this step by step.
<think>"""


def check_style(style: str, styles: tuple[str, ...] = STYLES) -> None:
    if style not in styles:
        raise ValueError(f"got style {style!r}, expected {', '.join(styles[:-1])} or {styles[-1]}")


def question(puzzle: Puzzle, style: str = "tiny") -> str:
    """The puzzle in words, without any template. tiny: the line that the tiny base's corpus uses, with its newline."""
    numbers, target = puzzle
    if style == "tiny":
        return f"using {' '.join(map(str, numbers))} make {target}\n"
    tags = "in <think> </think>, then give the expression in" if style == "base" else (
        "inside <think> </think>, then, on a new line, give the expression inside")
    return (f"Using the numbers {', '.join(map(str, numbers))}, write an expression that equals {target}. Use each number "
            f"exactly once, only + - * / and parentheses. Reason {tags} <answer> </answer>, for example "
            "<answer>(1+2)/3</answer>.")


def fill_template(question: str | list, style: str = "tiny", tokenizer=None, examples=(), *, reply: bool = True) -> str:
    """A question of any task -> what stands before the completion; the completion begins right where it ends.

    tiny: the question as it is. base: for pretrained checkpoints without chat tuning, ends inside <think>. chat: the
    tokenizer's own chat template, ready for the assistant's first token. examples: (question, completion) pairs that
    come first, for few-shot prompts; in chat style as earlier turns. A question that is a conversation, [{"role",
    "content"}, ...], goes into the chat template whatever the style. reply=False: without the beginning of a reply.
    Raises ValueError where there is no such template, or it refuses the conversation."""
    style = "chat" if isinstance(question, list) else style
    if style == "tiny":
        return "".join(f"{example}{text}\n\n" for example, text in examples) + question
    if style == "base":
        shots = [BASE_TEMPLATE.format(question=example).removesuffix("<think>") + text + "\n\n"
                 for example, text in examples]
        return "".join(shots) + BASE_TEMPLATE.format(question=question)
    if style == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("got style 'chat' or a conversation with a tokenizer that has no chat template; "
                             "use style 'base' or a chat checkpoint")
        messages = [message for asked, text in examples for message in (
            {"role": "user", "content": asked.strip()}, {"role": "assistant", "content": text})]
        messages += [{"role": "user", "content": question.strip()}] if isinstance(question, str) else question
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # a template is a program, of somebody else
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"got a conversation ({roles}) that the chat template refuses ({error or type(error).__name__}); "
                             "expected one that it takes") from None
    raise ValueError(f"got prompt style {style!r}, expected tiny, base or chat")


def make_prompt(puzzle: Puzzle, style: str = "tiny", tokenizer=None, examples=()) -> str:
    """fill_template of a puzzle's question; examples: (puzzle, completion) pairs."""
    return fill_template(question(puzzle, style), style, tokenizer,
                         [(question(example, style), text) for example, text in examples])


# ------------------------------------------------------------------------------------- the seam: Countdown as a task
# With LEVELS and question these are all the names that a task has: machinery/tasks.py says what each has to do.
WEIGHTS = {"accuracy": 1.0, "format": 0.2, "language": 0.0}  # reward = their weighted sum; "language": see --language
draw = sample_puzzle
VERIFICATION = re.compile(r"\?\d+(?::[-+*/\d]+(?: (?:wait|halt),\d+[-+*/\d]*)*)? (?:yes|no|ja|nein)\b")


def key(puzzle: Puzzle) -> str:
    """A puzzle is its sorted numbers and its target, so reordering cannot leak it into another split."""
    return f"{sorted(puzzle.numbers)}->{puzzle.target}"


def group(puzzle: Puzzle) -> str:
    """Accuracy is also given for each of these alone."""
    return f"{len(puzzle.numbers)}_numbers"


def score(puzzle: Puzzle, text: str) -> tuple[dict[str, float], str]:
    """-> the reward's parts, and "correct" or why not."""
    correct, verdict = verify(extract_answer(text), *puzzle)
    return {"accuracy": float(correct), "format": format_reward(text)}, verdict


def gold(puzzle: Puzzle) -> str:
    """A solved puzzle in the format that rewards ask for, with nothing but the solution as its thinking."""
    solution = solve(*puzzle)
    return f"<think>\n{solution} = {puzzle.target}\n</think>\n<answer>{solution}</answer>"


def watch(puzzle: Puzzle, text: str) -> dict[str, float]:
    """Measured and never paid."""
    return {"verifications": count_verifications(text), "backtracks": count_backtracks(text)}


def vote(puzzle: Puzzle, texts: list[str]) -> str | None:
    """The majority vote over one puzzle's completions (R1: cons@k): an expression, or None if nobody has a valid one.

    Votes are for the exact value, so (4+5)*3 and 3*(5+4) agree. The vote never looks at the target: an answer takes part
    if it parses and uses the puzzle's numbers. On a tie the value that was found first wins."""
    votes, expressions = Counter(), {}
    for text in texts:
        value = answer_value(text, puzzle.numbers)
        if value is not None:
            votes[value] += 1
            expressions.setdefault(value, extract_answer(text))
    return expressions[votes.most_common(1)[0][0]] if votes else None


def answer_value(text: str, numbers) -> Fraction | None:
    """The exact value of the answer, if it is one over the puzzle's numbers: what a majority votes for."""
    try:
        value, used = parse_expression(extract_answer(text) or "")
    except ValueError:
        return None
    return value if sorted(used) == sorted(numbers) else None


def count_backtracks(completion: str) -> int:
    """How often the CoT left one line of attempts and went on to another.

    An attempt line holds "=" and does not begin with check or prüfe. It is abandoned if it does not end in the verdict
    yes or ja and another attempt line follows. So a search that gives up after three failed lines backtracked twice,
    and so did one that succeeded in its third. Made for the line-per-path searches of the tiny model; on free
    prose it is a rough count."""
    lines = [line.lower().split() for line in chain_of_thought(completion).splitlines() if "=" in line]
    attempts = [words for words in lines if words[0].strip(":,") not in ("check", "prüfe")]
    return sum(words[-1].strip(".,!") not in ("yes", "ja") for words in attempts[:-1])


def count_verifications(completion: str) -> int:
    """How often the CoT compared two numbers' results with their goal and wrote the verdict down: "9 2?18:+11-7*18 yes"
    is one, and so is "3+1=4?27 no".

    Made for the searches of the tiny model; prose that verifies in other words counts as 0."""
    return len(VERIFICATION.findall(chain_of_thought(completion)))


# --------------------------------------------------------------------------------------------------------- command line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    puzzles = commands.add_parser("puzzles", help="print solvable puzzles as JSON lines, each with a solution")
    puzzles.add_argument("--level", choices=LEVELS, default="laptop")
    puzzles.add_argument("--n", type=int, default=10)
    puzzles.add_argument("--seed", type=int, default=0)
    puzzles.add_argument("--split", choices=SPLITS, default="train")
    puzzles.add_argument("--traces", choices=STYLES, help="print question and completion instead: rows for sft.py with "
                         "this --style, which teach a real checkpoint the format")
    for name, text in (("solve", "find an exact solution or prove that there is none"),
                       ("prompt", "print the prompt of a puzzle")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("numbers", type=int, nargs="+")
        sub.add_argument("--target", type=int, required=True)
        if name == "prompt":
            sub.add_argument("--style", choices=("tiny", "base"), default="tiny",
                             help="chat needs a tokenizer; see evaluate.py --show")
    args = parser.parse_args()
    try:
        if args.command == "puzzles":
            for puzzle in sample_puzzles(args.n, level=args.level, split=args.split, seed=args.seed):
                row = {**puzzle._asdict(), "solution": solve(*puzzle)}
                if args.traces:
                    row = {"prompt": question(puzzle, args.traces), "completion": gold(puzzle), **row}
                print(json.dumps(row))
        elif args.command == "solve":
            print(solve(args.numbers, args.target) or f"no solution: {args.target} cannot be made from {args.numbers}")
        elif args.command == "prompt":
            print(make_prompt(Puzzle(tuple(args.numbers), args.target), args.style), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
