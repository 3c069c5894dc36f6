"""Puzzles, the exact solver, the three splits, prompts."""

import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

import pytest

import countdown
from countdown import (SPLITS, Level, Puzzle, distinct, group, key, make_prompt, reachable, sample_puzzle, sample_puzzles,
                       solve, split_of)
from rewards import accuracy_reward, verify

ROOT = Path(countdown.__file__).parent


# -------------------------------------------------------------------------------------------------------------- solving
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


# -------------------------------------------------------------------------------------------------------------- puzzles
@lru_cache
def all_puzzles(count: int, largest: int = 10, targets=range(1, 31)) -> list[Puzzle]:
    """Every solvable one, its numbers in order."""
    return [Puzzle(numbers, target) for numbers in combinations_with_replacement(range(1, largest + 1), count)
            for target in targets if target in reachable(numbers)]


def test_reordering_the_numbers_never_changes_the_split():
    for puzzle in all_puzzles(3)[::20]:
        assert len({split_of(Puzzle(order, puzzle.target)) for order in permutations(puzzle.numbers)}) == 1


def test_the_split_depends_on_the_numbers_and_on_the_target():
    assert {split_of(Puzzle((3, 4, 5), target)) for target in range(1, 31)} == set(SPLITS)
    assert {split_of(puzzle) for puzzle in all_puzzles(3) if puzzle.target == 24} == set(SPLITS)


def test_70_15_and_15_percent_of_the_keys_are_train_validation_and_test():
    """Of 20,000 texts; four standard deviations of a fair draw are 1.3 points."""
    found = Counter(split_of(f"problem {i}") for i in range(20_000))
    for split, percent in (("train", 70), ("validation", 15), ("test", 15)):
        assert found[split] / 200 == pytest.approx(percent, abs=1.3)


@pytest.mark.parametrize("count, train, validation, test", [(3, 1394, 303, 328), (4, 12006, 2552, 2589)])
def test_the_split_never_moves(count, train, validation, test):
    """models/tiny-base was pretrained on the train split, so a new hash or share would leak what it has read into
    evaluations. All solvable puzzles of the default level: 2,025 of three numbers and 17,147 of four."""
    assert Counter(map(split_of, all_puzzles(count))) == {"train": train, "validation": validation, "test": test}
    assert train + validation + test == {3: 2025, 4: 17147}[count]


@pytest.mark.parametrize("numbers, target, place, split", [
    ((1, 2, 3), 24, 0, "test"), ((3, 2, 1), 16, 14, "test"), ((5, 4, 3), 14, 15, "validation"),
    ((4, 5, 6), 7, 29, "validation"), ((4, 3, 5), 24, 40, "train"), ((1, 2, 3), 5, 99, "train")])
def test_below_15_of_100_is_test_and_below_30_validation(numbers, target, place, split):
    """Its place is the sha256 of its key, as a number, modulo 100."""
    text = f"[{', '.join(map(str, sorted(numbers)))}]->{target}"
    assert int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 100 == place
    assert split_of(Puzzle(numbers, target)) == split_of(text) == split and key(Puzzle(numbers, target)) == text


@pytest.mark.parametrize("level, n, counts, largest, targets", [
    ("laptop", 400, {3, 4}, 10, (1, 30)), ("three", 400, {3}, 10, (1, 30)), ("four", 400, {4}, 10, (1, 30)),
    ("hundred", 300, {4}, 10, (31, 100)), ("five", 150, {5}, 10, (1, 30)), ("tinyzero", 100, {3, 4}, 99, (10, 100))])
def test_sampled_puzzles_are_solvable_and_fill_their_level(level, n, counts, largest, targets):
    """This seed reaches every end of every range."""
    rng = random.Random(0)
    puzzles = [sample_puzzle(rng, level) for _ in range(n)]
    assert all(solve(*puzzle) and split_of(puzzle) == "train" for puzzle in puzzles)
    assert {len(puzzle.numbers) for puzzle in puzzles} == counts
    drawn = [number for puzzle in puzzles for number in puzzle.numbers]
    assert (min(drawn), max(drawn)) == (1, largest)
    assert (min(puzzle.target for puzzle in puzzles), max(puzzle.target for puzzle in puzzles)) == targets
    assert any(len(set(puzzle.numbers)) < len(puzzle.numbers) for puzzle in puzzles), "numbers may repeat"


def test_no_count_of_numbers_is_rarer_because_fewer_of_its_puzzles_are_solvable():
    """A third of the draws of three numbers are solvable and four fifths of those of four."""
    rng = random.Random(0)
    threes = sum(len(sample_puzzle(rng).numbers) == 3 for _ in range(1000))
    assert threes / 1000 == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("split", SPLITS)
def test_sample_puzzles_are_different_and_of_one_split(split):
    puzzles = sample_puzzles(300, split=split, seed=5)
    assert len(puzzles) == 300 == len({(tuple(sorted(puzzle.numbers)), puzzle.target) for puzzle in puzzles})
    assert all(split_of(puzzle) == split and solve(*puzzle) for puzzle in puzzles)


def test_sample_puzzles_are_the_seed_s_own():
    puzzles = sample_puzzles(20, split="test", seed=5)
    assert puzzles == sample_puzzles(20, split="test", seed=5) != sample_puzzles(20, split="test", seed=6)


def test_a_small_group_is_not_crowded_out():
    """500 draws of validation are 250 of three numbers, of which there are only 303; a repeat is replaced by another of
    three, or but 170 would be left."""
    sampled = Counter(map(group, sample_puzzles(500, split="validation", seed=0)))
    assert sampled["3_numbers"] == pytest.approx(250, abs=45) and sampled.total() == 500


def test_sample_puzzles_raise_when_the_level_holds_fewer(monkeypatch):
    """Ones and twos make 1, 2, 3 and 4: 1-1, 1*1, 2-1, 2/1, 1+1, ... of which the train split has a handful."""
    monkeypatch.setitem(countdown.LEVELS, "ones and twos", Level((2,), 2, (1, 4)))
    n = sum(split_of(puzzle) == "train" for puzzle in all_puzzles(2, 2, range(1, 5)))
    assert len(sample_puzzles(n, level="ones and twos", split="train", seed=0)) == n > 3
    with pytest.raises(ValueError, match=f"got n={n + 1}, but level 'ones and twos' has only about {n} train puzzles "
                                         "of 2 numbers; ask for fewer"):
        sample_puzzles(n + 1, level="ones and twos", split="train", seed=0)


def test_level_three_has_no_400_test_puzzles(monkeypatch):
    """328; asked in vain until so many draws in a row bring nothing new (fewer here than it really waits for)."""
    monkeypatch.setattr(countdown, "PATIENCE", 500)
    with pytest.raises(ValueError, match=r"got n=400, but level 'three' has only about 3[12]\d test puzzles of 3 numbers"):
        sample_puzzles(400, level="three", split="test", seed=0)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="got split 'held-out', expected one of test, validation, train"):
        sample_puzzles(3, split="held-out", seed=0)


@pytest.mark.parametrize("n, fewer, expected", [(3, False, "abc"), (4, True, "abc"), (2, True, "ab")])
def test_distinct_keeps_the_first_of_each_key(n, fewer, expected):
    """a, b, a, b, c and so on in turn. Where more are asked for than there are, `fewer` says that this is fine."""
    drawn = itertools.cycle("ababc")
    assert "".join(distinct(n, lambda: next(drawn), str, "there", "letters", fewer=fewer)) == expected


def test_distinct_replaces_a_repeat_by_one_of_its_group():
    """After a1 a1 the b are passed over, until a2 comes. Where nothing new comes, it is said of which group."""
    drawn = iter(["a1", "a1", "b1", "b2", "a2", "b3", *["b3", "b2", "b1", "a3"] * 5000])
    found = distinct(3, lambda: next(drawn), str, "here", "words", group=lambda word: word[0])
    assert found == ["a1", "a2", "b3"]
    drawn = itertools.cycle(["a1", "b1", "b2"])
    with pytest.raises(ValueError, match="^got n=5, but here has only about 1 words of a; ask for fewer$"):
        distinct(5, lambda: next(drawn), str, "here", "words", group=lambda word: word[0])


# -------------------------------------------------------------------------------------------------------------- prompts
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


# -------------------------------------------------------------------------------------------------------- command lines
def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_command_solve_prints_what_the_verifier_accepts():
    assert verify(run("countdown.py", "solve", 3, 4, 5, "--target", 27).stdout.strip(), (3, 4, 5), 27) == (True, "correct")


def test_command_solve_says_that_there_is_no_solution():
    assert run("countdown.py", "solve", 1, 1, 1, "--target", 30).stdout == "no solution: 30 cannot be made from [1, 1, 1]\n"


def test_command_solve_refuses_too_many_numbers_without_a_traceback():
    refused = run("countdown.py", "solve", *range(1, 8), "--target", 9)
    assert refused.returncode == 2 and "at most 6" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("flags, split", [([], "train"), (["--split", "validation"], "validation"), (["--split", "test"], "test")])
def test_command_puzzles_prints_json_lines(flags, split, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["countdown.py", "puzzles", "--n", "4", "--level", "four", *flags])
    countdown.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert verify(line["solution"], line["numbers"], line["target"]) == (True, "correct") and len(line["numbers"]) == 4
        assert split_of(Puzzle(tuple(line["numbers"]), line["target"])) == split


def test_command_puzzles_refuses_more_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(countdown, "PATIENCE", 100)
    monkeypatch.setattr(sys, "argv", "countdown.py puzzles --n 400 --level three --split validation".split())
    with pytest.raises(SystemExit) as stop:
        countdown.main()
    assert stop.value.code == 2 and "level 'three' has only about" in capsys.readouterr().err


def test_command_prompt_prints_the_prompt_exactly():
    assert run("countdown.py", "prompt", 3, 4, 5, "--target", 27, "--style", "base").stdout == make_prompt(PUZZLE, "base")
