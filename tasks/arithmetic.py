"""Arithmetic: sums, products and chains of both, with numbers of so many digits as the level says. For any checkpoint.

    python evaluate.py --task arithmetic --level one-digit --show 5
    python train_countdown.py --task countdown=3,arithmetic=1 --out runs/sums

"what is 7+4*3?" wants 19, in <answer></answer> or as nothing but the number. No torch in here.
"""

import random
from typing import NamedTuple

from countdown import check_split, split_of
from rewards import format_reward, parse_expression
from tasks import ask
from tasks.questions import check_answer

ALL = ("{}+{}", "{}*{}", "{}+{}*{}", "{}*{}+{}", "{}+{}+{}")
LEVELS = {  # shapes, digits of the first number, digits of the others
    "sums": (ALL[:1], 2, 1),  # 34+5: the tiny base is right about four in ten, by heart
    "one-digit": (ALL, 1, 1),
    "two-digit-sums": (ALL[:1], 2, 2),  # 34+58
    "two-digits": (ALL, 2, 2),
    "three-digits": (ALL, 3, 3),
    "four-digits": (ALL, 4, 4),
}
WEIGHTS = {"accuracy": 1.0, "format": 0.2, "language": 0.0}


class Problem(NamedTuple):
    expression: str
    value: int


def draw(rng: random.Random, level: str, split: str) -> Problem:
    check_split(split)
    shapes, first, others = LEVELS[level]
    while True:
        shape = rng.choice(shapes)
        digits = [first] + [others] * (shape.count("{}") - 1)
        expression = shape.format(*(rng.randint(10 ** (d - 1), 10 ** d - 1) for d in digits))
        problem = Problem(expression, int(parse_expression(expression)[0]))
        if split_of(key(problem)) == split:
            return problem


def key(problem: Problem) -> str:
    """3+4*2 and 2*4+3 are the same, and so of the same split."""
    products = ("*".join(sorted(product.split("*"), key=int)) for product in problem.expression.split("+"))
    return "+".join(sorted(products, key=lambda product: (len(product), product)))  # by size, as tasks/general.py has sums


def question(problem: Problem, style: str) -> str:
    return ask(f"{'what' if style == 'tiny' else 'What'} is {problem.expression}?", style, "the number")


def score(problem: Problem, text: str) -> tuple[dict[str, float], str]:
    verdict = check_answer(text, str(problem.value))
    return {"accuracy": float(verdict == "correct"), "format": format_reward(text)}, verdict


def gold(problem: Problem) -> str:
    return f"<think>\n{problem.expression} = {problem.value}\n</think>\n<answer>{problem.value}</answer>"
