"""Countdown: a target from a few numbers, each used exactly once, with + - * / and parentheses. "Using 3 4 5, make 27."

The task of TinyZero, and ours because it is the smallest task on which search pays: a guess is cheap to check, so a
model that tries, checks and goes back beats one that guesses. Everything about puzzles lives here: drawing them,
solving them exactly, the split into train and held-out, and the prompts. The text that the tiny base model learnt from
is written by corpus.py.

    python countdown.py puzzles --level laptop --n 5          # draw puzzles, with a solution each
    python countdown.py solve 3 4 5 --target 27               # 3*(4+5)
    python countdown.py prompt 3 4 5 --target 27 --style base # what the model reads

No torch in here: a puzzle is a tuple of integers.
"""

import argparse
import hashlib
import json
import random
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Puzzle(NamedTuple):
    numbers: tuple[int, ...]
    target: int


class Level(NamedTuple):
    counts: tuple[int, ...]  # how many numbers a puzzle has; drawn evenly
    largest: int             # numbers are drawn from 1..largest, repeats allowed
    targets: tuple[int, int]  # smallest and largest target


LEVELS = {
    "laptop": Level((3,), 10, (1, 30)),        # what the tiny base was pretrained on
    "laptop4": Level((4,), 10, (1, 30)),       # one number more: generalisation, no stage trains on it
    "tinyzero": Level((3, 4), 99, (10, 100)),  # TinyZero's own level, for real checkpoints
}
STYLES = ("tiny", "base", "chat")  # prompt templates, see make_prompt
HELD_OUT_PERCENT = 30  # the laptop level has only 2,025 puzzles, and an evaluation wants over 512 of them
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


@lru_cache(maxsize=4096)
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
def check_level_and_style(level: str, style: str) -> None:
    """Raises ValueError for a level or a prompt style that does not exist; scripts call it before any work is done."""
    if level not in LEVELS:
        raise ValueError(f"got level {level!r}, expected one of {', '.join(LEVELS)}")
    if style not in STYLES:
        raise ValueError(f"got style {style!r}, expected tiny, base or chat")


def is_held_out(puzzle: Puzzle) -> bool:
    """The one split of the project. A puzzle is its sorted numbers and its target, so reordering cannot leak it."""
    key = f"{sorted(puzzle.numbers)}->{puzzle.target}"
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def sample_puzzle(rng: random.Random, level: str = "laptop", held_out: bool | None = None) -> Puzzle:
    """A solvable puzzle of this level; train or held-out as the hash says, or only the side that held_out names."""
    counts, largest, (low, high) = LEVELS[level]
    while True:
        numbers = tuple(rng.randint(1, largest) for _ in range(rng.choice(counts)))
        puzzle = Puzzle(numbers, rng.randint(low, high))
        if held_out in (None, is_held_out(puzzle)) and solve(*puzzle):
            return puzzle


def sample_puzzles(n: int, *, level: str = "laptop", held_out: bool, seed: int) -> list[Puzzle]:
    """n different solvable puzzles from one side of the split. Raises ValueError where the level holds fewer."""
    rng, puzzles, repeats = random.Random(seed), {}, 0
    while len(puzzles) < n:
        puzzle = sample_puzzle(rng, level, held_out)
        repeats += puzzles.setdefault((tuple(sorted(puzzle.numbers)), puzzle.target), puzzle) is not puzzle
        if repeats > 1000 + 20 * n:
            side = "held-out" if held_out else "train"
            raise ValueError(f"got n={n}, but level {level!r} has only about {len(puzzles)} {side} puzzles; "
                             "ask for fewer")
    return list(puzzles.values())


# -------------------------------------------------------------------------------------------------------------- prompts
BASE_PROMPT = """A user asks a question and an assistant answers it. The assistant first reasons inside <think> and \
</think> tags, then gives its result inside <answer> and </answer> tags.
User: Using the numbers {numbers}, write an expression that equals {target}. Use each number exactly once, \
only + - * / and parentheses. Reason in <think> </think>, then give the expression in <answer> </answer>, for example \
<answer>(1+2)/3</answer>.
Assistant: Let me work through this step by step.
<think>"""

CHAT_PROMPT = """Using the numbers {numbers}, write an expression that equals {target}. Use each number exactly once, \
only + - * / and parentheses. Reason inside <think> </think>, then, on a new line, give the expression inside \
<answer> </answer>, for example <answer>(1+2)/3</answer>."""


def make_prompt(puzzle: Puzzle, style: str = "tiny", tokenizer=None, examples=()) -> str:
    """What stands before the completion; the completion begins right where it ends.

    tiny: the line that the tiny base's corpus uses.
    base: for pretrained checkpoints without chat tuning, ends inside <think>.
    chat: the same question through the tokenizer's own chat template, ready for the assistant's first token.
    examples: (puzzle, completion) pairs that come first, for few-shot prompts; in chat style as earlier turns."""
    if style == "tiny":
        shots = [make_prompt(example) + text + "\n\n" for example, text in examples]
        return "".join(shots) + f"using {' '.join(map(str, puzzle.numbers))} make {puzzle.target}\n"
    fields = {"numbers": ", ".join(map(str, puzzle.numbers)), "target": puzzle.target}
    if style == "base":
        shots = [make_prompt(example, "base").removesuffix("<think>") + text + "\n\n" for example, text in examples]
        return "".join(shots) + BASE_PROMPT.format(**fields)
    if style == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("got style 'chat' with a tokenizer that has no chat template; "
                             "use style 'base' or a chat checkpoint")
        turns = [(CHAT_PROMPT.format(numbers=", ".join(map(str, example.numbers)), target=example.target), text)
                 for example, text in examples]
        messages = [message for question, text in turns for message in ({"role": "user", "content": question},
                                                                        {"role": "assistant", "content": text})]
        messages.append({"role": "user", "content": CHAT_PROMPT.format(**fields)})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    raise ValueError(f"got prompt style {style!r}, expected tiny, base or chat")


def shortest_completion(puzzle: Puzzle) -> str:
    """A solved puzzle in the format that rewards ask for, with nothing but the solution as its thinking."""
    solution = solve(*puzzle)
    return f"<think>\n{solution} = {puzzle.target}\n</think>\n<answer>{solution}</answer>"


# --------------------------------------------------------------------------------------------------------- command line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    puzzles = commands.add_parser("puzzles", help="print solvable puzzles as JSON lines, each with a solution")
    puzzles.add_argument("--level", choices=LEVELS, default="laptop")
    puzzles.add_argument("--n", type=int, default=10)
    puzzles.add_argument("--seed", type=int, default=0)
    puzzles.add_argument("--held-out", action="store_true", help="from the held-out side of the split; default: train")
    puzzles.add_argument("--traces", choices=("tiny", "base"), help="print prompt and completion instead, in this "
                         "prompt style: rows for sft.py that teach a real checkpoint the format")
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
            for puzzle in sample_puzzles(args.n, level=args.level, held_out=args.held_out, seed=args.seed):
                row = {**puzzle._asdict(), "solution": solve(*puzzle)}
                if args.traces:
                    prompt, completion = make_prompt(puzzle, args.traces), shortest_completion(puzzle)
                    completion = completion.removeprefix("<think>" * prompt.endswith("<think>"))
                    row = {"prompt": prompt, "completion": completion, **row}
                print(json.dumps(row))
        elif args.command == "solve":
            print(solve(args.numbers, args.target) or f"no solution: {args.target} cannot be made from {args.numbers}")
        elif args.command == "prompt":
            print(make_prompt(Puzzle(tuple(args.numbers), args.target), args.style), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
