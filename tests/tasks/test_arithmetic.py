"""Arithmetic problems: their digits, their values, and what counts as the same one."""

import random

import pytest

from countdown import SPLITS
from tasks import arithmetic
from tasks.arithmetic import LEVELS, Problem, draw, key


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_values_are_those_of_python_and_numbers_have_the_level_s_digits(level, split):
    rng, shapes = random.Random(0), set()
    for _ in range(200):
        expression, value = draw(rng, level, split)
        numbers = expression.replace("*", "+").split("+")
        shapes.add("".join(c for c in expression if c in "+*"))
        _, first, others = LEVELS[level]
        assert value == eval(expression) and [len(number) for number in numbers] == [first] + [others] * (len(numbers) - 1)
    assert shapes == ({"+"} if "sums" in level else {"+", "*", "+*", "*+", "++"})


@pytest.mark.parametrize("a, b, same", (
    ("3+4*2", "2*4+3", True), ("3+4", "4+3", True), ("3*4", "4*3", True), ("3+4+5", "5+3+4", True),
    ("3+4*2", "3*4+2", False), ("3+4", "3*4", False), ("12+3", "1+23", False),
    ("10+2", "2+10", True), ("10*2+3", "3+2*10", True), ("21+3*4", "4*3+21", True),
))
def test_order_makes_no_other_problem(a, b, same):
    assert (key(Problem(a, 0)) == key(Problem(b, 0))) == same


def test_a_sum_is_of_the_split_that_general_prompts_give_it():
    """The tiny base has read their train sums: what is 10+2? So the key of two plain numbers is theirs, smaller first."""
    for a in range(1, 11):
        for b in range(1, 11):
            assert key(Problem(f"{a}+{b}", a + b)) == f"{min(a, b)}+{max(a, b)}"
            assert key(Problem(f"{a}*{b}", a * b)) == f"{min(a, b)}*{max(a, b)}"


@pytest.mark.parametrize("text, accuracy", (
    ("19", 1.0), ("<think>\n4*3=12\n</think>\n<answer>19</answer>", 1.0), ("19.0", 1.0), ("20", 0.0), ("19 or 20", 0.0),
    ("<answer>7+4*3</answer>", 0.0), ("<think>19", 0.0), ("", 0.0),
))
def test_a_number_in_tags_or_alone_is_the_answer(text, accuracy):
    assert arithmetic.score(Problem("7+4*3", 19), text)[0]["accuracy"] == accuracy
