"""Programs: a function of one integer from three examples of it. `f(1)=3 f(2)=5 f(4)=9` wants def f(x): return 2*x+1.

    python evaluate.py --task code --show 3
    python train_countdown.py --task code --out runs/code

Three more examples, which no prompt shows, say whether it is right: an answer that only repeats what it was shown
(3 if x==1 else 5) fails on them. What the tiny base read of it (write_thinking) tries one function after the other and
checks each on the examples. An answer is parsed into a syntax tree, of which only + - * and `a if x==k else b` are
computed; it is never run. Functions are split by a hash of their text. No torch in here.
"""

import ast
import random
import re
import warnings
from typing import NamedTuple

from countdown import check_split, split_of
from rewards import MAX_LENGTH, extract_answer, format_reward
from tasks import ask

LEVELS = {"one line": None}
WEIGHTS = {"accuracy": 1.0, "format": 0.2, "language": 0.0}
SHOWN = 3
OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}


class Problem(NamedTuple):
    function: str                              # of x, as 2*x+1
    examples: tuple[tuple[int, int], ...]      # (x, value); the first SHOWN are in the prompt, the others are hidden


# --------------------------------------------------------------------------------------------------- functions, values
def compute(tree, x: int) -> int:
    """The value of a syntax tree of integers, x, + - * and `a if x==k else b`. Raises ValueError for anything else."""
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name) and tree.id == "x":
        return x
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATORS:
        return OPERATORS[type(tree.op)](compute(tree.left, x), compute(tree.right, x))
    if isinstance(tree, ast.IfExp) and isinstance(tree.test, ast.Compare) and len(tree.test.ops) == 1 and isinstance(
            tree.test.ops[0], ast.Eq):
        same = compute(tree.test.left, x) == compute(tree.test.comparators[0], x)
        chosen, other = compute(tree.body, x), compute(tree.orelse, x)  # what is not chosen has to be a function, too
        return chosen if same else other
    raise ValueError(f"{ast.unparse(tree)[:40]} is none of integers, x, + - * and a if x==k else b")


def parse_function(text: str):
    """`def f(x): return ...` -> the syntax tree behind return. Raises ValueError with the reason."""
    if len(text) > MAX_LENGTH or not text.isascii():
        raise ValueError(f"expected at most {MAX_LENGTH} characters of ASCII")
    head, found, body = text.partition("def f(x): return ")
    if head or not found:
        raise ValueError("expected def f(x): return and an expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `9if x==1 else 3`, on the screen of whoever trains
            return ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"cannot be parsed: {body[:40]}") from None


def value(function: str, x: int) -> int:
    return compute(ast.parse(function, mode="eval").body, x)


def with_constant(slope: str, b: int) -> str:
    """2*x and 1 -> 2*x+1."""
    return slope + (f"{b:+d}" if b else "")


def draw_function(rng: random.Random) -> str:
    shape = rng.randrange(6)
    if shape == 0:
        return str(rng.randint(0, 20))
    if shape == 1:
        return with_constant("x", rng.randint(-9, 20))
    if shape == 2:
        return with_constant(f"{rng.randint(2, 9)}*x", rng.randint(-9, 20))
    if shape == 3:
        return with_constant("x*x", rng.randint(-9, 20))
    if shape == 4:
        return f"{rng.randint(9, 30)}-x"
    a, b = rng.sample(range(21), 2)
    return f"{a} if x=={rng.randint(0, 9)} else {b}"


def candidates(x: int, y: int) -> list[tuple[str, str]]:
    """(how its constant is found, function) of those that are right about the first example, in the order in which a
    patient writer tries them."""
    found = [("", str(y)), (f"{y}-{x}={y - x},", with_constant("x", y - x)), (f"{y}+{x}={y + x},", f"{y + x}-x")]
    for slope in (*(f"{a}*x" for a in range(2, 10)), "x*x"):
        product = value(slope, x)
        found.append((f"{slope.replace('x', str(x))}={product},{y}-{product}={y - product},",
                      with_constant(slope, y - product)))
    return found


def worked(function: str, x: int) -> str:
    """f(7)=14+31=45: a product and a constant are two steps."""
    parts = re.fullmatch(r"(.+\*x)([+-].+)", function)
    return f"f({x})={f'{value(parts[1], x)}{parts[2]}=' if parts else ''}{value(function, x)}"


# ------------------------------------------------------------------------------------------- the seam: code as a task
def draw(rng: random.Random, level: str, split: str) -> Problem:
    """Arguments are 0 to 9 and values 0 to 100. Of a function with an exception, the exception is shown."""
    check_split(split)
    while True:
        function = draw_function(rng)
        if split_of(function) != split:
            continue
        arguments = [x for x in range(10) if 0 <= value(function, x) <= 100]
        if len(arguments) < 2 * SHOWN:
            continue
        arguments = rng.sample(arguments, 2 * SHOWN)
        problem = Problem(function, tuple((x, value(function, x)) for x in arguments))
        if "if" not in function or len({y for _, y in problem.examples[:SHOWN]}) > 1:
            return problem


def key(problem: Problem) -> str:
    """The split is by the function alone; it may be asked for with several examples."""
    return f"{problem.function} {question(problem, 'tiny').strip()}"


def show(x: int, y: int) -> str:
    return f"f({x})={y}"


def question(problem: Problem, style: str) -> str:
    shown = " ".join(show(x, y) for x, y in problem.examples[:SHOWN])
    return f"{shown}\n" if style == "tiny" else ask(
        f"{shown}. Write f as one line of Python, as def f(x): return ...", style, "that line")


def score(problem: Problem, text: str) -> tuple[dict[str, float], str]:
    verdict, answer = "correct", extract_answer(text)
    try:
        tree = parse_function(answer or "")
        for x, y in problem.examples:
            if (got := compute(tree, x)) != y:
                verdict = f"f({x}) is {str(got)[:20]}, not {y}"
                break
    except (ValueError, RecursionError) as error:
        verdict = "no single final answer" if answer is None else str(error)
    return {"accuracy": float(verdict == "correct"), "format": format_reward(text)}, verdict


def gold(problem: Problem) -> str:
    checks = " ".join(f"{worked(problem.function, x)} yes" for x, _ in problem.examples[:SHOWN])
    return f"<think>\n{problem.function}:{checks}\n</think>\n<answer>def f(x): return {problem.function}</answer>"


# ---------------------------------------------------------------------------------------------------------- the corpus
def write_thinking(problem: Problem, patient: bool, luck: float, give_up: float, rng: random.Random
                   ) -> tuple[list[str], str]:
    """-> (one line a guess, the last one). A guess is checked on the shown examples until one is wrong; on the first only
    where it is not made from it."""
    shown = problem.examples[:SHOWN]
    untried = candidates(*shown[0])
    rng.shuffle(shuffled := untried.copy())  # drawn by the patient, too: luck must come to the same problems
    untried = untried if patient else shuffled
    if rng.random() < luck:  # intuition
        untried = [(None, problem.function)]
    elif "if" in problem.function:  # nothing simpler fits, which is how one knows
        untried = untried[:rng.randint(1, 4)] + [(None, problem.function)]
    lines = []
    for how, guess in untried:
        checks = []
        for x, wanted in shown if how is None else shown[1:]:
            right = value(guess, x) == wanted
            checks.append(f"{worked(guess, x)} {'yes' if right else 'no'}")
            if not right:
                break
        lines.append(f"{how or ''}{guess}:{' '.join(checks)}")
        if right or rng.random() < give_up:
            break
    return lines, guess
