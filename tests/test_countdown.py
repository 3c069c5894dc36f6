"""Puzzles, the exact solver, the held-out split, prompts."""

import json
import random
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

import pytest

import countdown
from countdown import Level, Puzzle, is_held_out, make_prompt, sample_puzzle, sample_puzzles, solve
from rewards import accuracy_reward, verify

ROOT = Path(countdown.__file__).parent
LAPTOP = [Puzzle(numbers, target) for numbers in combinations_with_replacement(range(1, 11), 3) for target in range(1, 31)]


# ---------------------------------------------------------------------------------------------------------------- solving
@lru_cache(maxsize=None)
def by_brute_force(numbers: tuple) -> frozenset:
    """Every value, by trying: replace two of the numbers, in either order, by the result of an operation, until one is left."""
    if len(numbers) == 1:
        return frozenset(numbers)
    values = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = Fraction(numbers[i]), numbers[j]
        for result in [a + b, a - b, a * b] + ([a / b] if b else []):
            values |= by_brute_force(tuple(sorted([*rest, result])))
    return frozenset(values)


def check_against_brute_force(numbers, targets):
    for target in targets:
        expression = solve(numbers, target)
        assert (expression is not None) == (target in by_brute_force(tuple(sorted(numbers)))), (numbers, target, expression)
        if expression is not None:
            assert verify(expression, numbers, target) == (True, "correct")


@pytest.mark.parametrize("count, largest", [(1, 10), (2, 10), (3, 10)])
def test_solver_finds_all_that_brute_force_finds_and_nothing_else(count, largest):
    """All 220 laptop triples with every target from -5 to 30: a solution wherever there is one, and None is a proof."""
    for numbers in combinations_with_replacement(range(1, largest + 1), count):
        check_against_brute_force(numbers, range(-5, 31))


@pytest.mark.parametrize("numbers", [
    (3, 3, 8, 8), (1, 5, 5, 5), (1, 1, 1, 1), (2, 2, 7, 7), (99, 98, 1, 2), (4, 4, 4, 9), (10, 3, 7, 6)])
def test_solver_agrees_with_brute_force_on_four_numbers(numbers):
    check_against_brute_force(numbers, range(-10, 70))


@pytest.mark.parametrize("numbers, target, solvable, why", [
    ((3, 4, 5), 27, True, "(4+5)*3"),
    ((5, 4, 3), 27, True, "the order does not matter"),
    ((3, 3, 8, 8), 24, True, "only as 8/(3-8/3)"),
    ((1, 5, 5, 5), 24, True, "only as 5*(5-1/5)"),
    ((4, 7), 11, True, "two numbers"),
    ((7,), 7, True, "one number is its own expression"),
    ((7,), 8, False, "and nothing else"),
    ((1, 2, 3), 0, True, "1+2-3: zero as a difference"),
    ((3, 5, 5), 0, True, "(5-5)*3: zero only as a product"),
    ((2, 3, 7), 0, False, "no two sides are equal and no difference vanishes"),
    ((5, 5, 7), 7, True, "7+(5-5): through a zero"),
    ((1, 1, 1), 30, False, "3 is the most that three ones make"),
    ((1, 1, 1, 1, 1, 1), 9, True, "(1+1+1)*(1+1+1): six numbers"),
    ((1, 1, 1, 1, 1, 1), 10, False, "9 is the most that six ones make"),
])
def test_solver_by_hand(numbers, target, solvable, why):
    expression = solve(numbers, target)
    assert verify(expression, numbers, target)[0] is solvable and (expression is not None) is solvable


def test_solver_refuses_more_numbers_than_it_can_search():
    with pytest.raises(ValueError, match="got 7 numbers, the exact solver takes at most 6"):
        solve(range(1, 8), 10)


# ---------------------------------------------------------------------------------------------------------------- puzzles
def test_reordering_the_numbers_never_changes_sides():
    for puzzle in LAPTOP[::50]:
        assert len({is_held_out(Puzzle(order, puzzle.target)) for order in permutations(puzzle.numbers)}) == 1


def test_split_depends_on_the_numbers_and_on_the_target():
    assert len({is_held_out(Puzzle((3, 4, 5), target)) for target in range(1, 31)}) == 2
    assert len({is_held_out(puzzle) for puzzle in LAPTOP if puzzle.target == 24}) == 2


def test_about_30_percent_are_held_out():
    """Of 6,600 laptop puzzles; three standard deviations of a fair draw are 1.7 points."""
    assert 0.283 < sum(map(is_held_out, LAPTOP)) / len(LAPTOP) < 0.317


def test_the_split_never_moves():
    """models/tiny-base was pretrained on the train side, so a new hash or share would leak what it has read into evaluations."""
    solvable = [puzzle for puzzle in LAPTOP if solve(*puzzle)]
    assert (len(solvable), sum(map(is_held_out, solvable))) == (2025, 631)


@pytest.mark.parametrize("level, n, counts, largest, targets", [
    ("laptop", 400, {3}, 10, (1, 30)), ("laptop4", 400, {4}, 10, (1, 30)), ("tinyzero", 150, {3, 4}, 99, (10, 100))])
def test_sampled_puzzles_are_solvable_and_fill_their_level(level, n, counts, largest, targets):
    """This seed reaches every end of every range."""
    rng = random.Random(0)
    puzzles = [sample_puzzle(rng, level) for _ in range(n)]
    assert all(solve(*puzzle) for puzzle in puzzles)
    assert {len(puzzle.numbers) for puzzle in puzzles} == counts
    drawn = [number for puzzle in puzzles for number in puzzle.numbers]
    assert (min(drawn), max(drawn)) == (1, largest)
    assert (min(puzzle.target for puzzle in puzzles), max(puzzle.target for puzzle in puzzles)) == targets
    assert any(len(set(puzzle.numbers)) < len(puzzle.numbers) for puzzle in puzzles), "numbers may repeat"
    assert {is_held_out(puzzle) for puzzle in puzzles} == {True, False}


@pytest.mark.parametrize("held_out", [True, False])
def test_sample_puzzles_are_different_and_from_one_side(held_out):
    puzzles = sample_puzzles(300, held_out=held_out, seed=5)
    assert len(puzzles) == 300 == len({(tuple(sorted(puzzle.numbers)), puzzle.target) for puzzle in puzzles})
    assert all(is_held_out(puzzle) is held_out and solve(*puzzle) for puzzle in puzzles)


def test_sample_puzzles_are_the_seed_s_own():
    puzzles = sample_puzzles(20, held_out=True, seed=5)
    assert puzzles == sample_puzzles(20, held_out=True, seed=5) != sample_puzzles(20, held_out=True, seed=6)


def test_sample_puzzles_raise_when_the_level_holds_fewer(monkeypatch):
    """Ones and twos make 1, 2, 3 and 4: 1-1, 1*1, 2-1, 2/1, 1+1, ... of which the train side has a handful."""
    monkeypatch.setitem(countdown.LEVELS, "ones and twos", Level((2,), 2, (1, 4)))
    everything = [Puzzle(numbers, target) for numbers in ((1, 1), (1, 2), (2, 2)) for target in range(1, 5)]
    train = [puzzle for puzzle in everything if solve(*puzzle) and not is_held_out(puzzle)]
    n = len(train)
    assert len(sample_puzzles(n, level="ones and twos", held_out=False, seed=0)) == n
    with pytest.raises(ValueError, match=f"got n={n + 1}, but level 'ones and twos' has only about {n} train puzzles"):
        sample_puzzles(n + 1, level="ones and twos", held_out=False, seed=0)


# ---------------------------------------------------------------------------------------------------------------- prompts
PUZZLE = Puzzle((3, 4, 5), 27)


class ChatTokenizer:
    """The two things that make_prompt needs of a tokenizer."""
    chat_template = "a template"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


def test_tiny_prompt_is_the_corpus_line():
    assert make_prompt(PUZZLE) == make_prompt(PUZZLE, "tiny") == "using 3 4 5 make 27\n"


def test_base_prompt_ends_inside_the_think_block():
    prompt = make_prompt(PUZZLE, "base")
    assert "the numbers 3, 4, 5, write an expression that equals 27." in prompt and prompt.endswith("\n<think>")
    assert "{" not in prompt


def test_chat_prompt_is_one_user_message_in_the_tokenizer_s_template():
    prompt = make_prompt(PUZZLE, "chat", ChatTokenizer())
    assert prompt.startswith("[user]Using the numbers 3, 4, 5, write an expression that equals 27.")
    assert prompt.endswith("[assistant]") and "{" not in prompt


@pytest.mark.parametrize("style, tokenizer, message", [
    ("chat", None, "no chat template; use style 'base'"),
    ("chat", type("Bare", (), {"chat_template": None})(), "no chat template; use style 'base'"),
    ("haiku", None, "got prompt style 'haiku', expected tiny, base or chat"),
])
def test_prompt_that_cannot_be_made_says_how_to_mend_it(style, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        make_prompt(PUZZLE, style, tokenizer)


def test_no_prompt_gives_the_answer_away():
    for style in ("tiny", "base", "chat"):
        prompt = make_prompt(PUZZLE, style, ChatTokenizer())
        assert accuracy_reward(prompt, *PUZZLE) == accuracy_reward(prompt.rpartition("<answer>")[0], *PUZZLE) == 0.0


# ---------------------------------------------------------------------------------------------------------------- command lines
def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_command_solve_prints_what_the_verifier_accepts():
    assert verify(run("countdown.py", "solve", 3, 4, 5, "--target", 27).stdout.strip(), (3, 4, 5), 27) == (True, "correct")


def test_command_solve_says_that_there_is_no_solution():
    assert run("countdown.py", "solve", 1, 1, 1, "--target", 30).stdout == "no solution: 30 cannot be made from [1, 1, 1]\n"


def test_command_solve_refuses_too_many_numbers_without_a_traceback():
    refused = run("countdown.py", "solve", *range(1, 8), "--target", 9)
    assert refused.returncode == 2 and "at most 6" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("flags, held_out", [([], False), (["--held-out"], True)])
def test_command_puzzles_prints_json_lines(flags, held_out):
    printed = run("countdown.py", "puzzles", "--n", 4, "--level", "laptop4", *flags).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert verify(line["solution"], line["numbers"], line["target"]) == (True, "correct")
        assert is_held_out(Puzzle(tuple(line["numbers"]), line["target"])) is held_out


def test_command_prompt_prints_the_prompt_exactly():
    assert run("countdown.py", "prompt", 3, 4, 5, "--target", 27, "--style", "base").stdout == make_prompt(PUZZLE, "base")
