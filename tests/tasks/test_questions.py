"""A file of questions and answers: how answers are read and compared, and what is said of a wrong row."""

import json
from fractions import Fraction

import pytest

import evaluate
from countdown import SPLITS
from tasks.questions import Questions, check_answer, final_value


@pytest.mark.parametrize("text, value", (
    ("42", 42), (" 42. ", 42), ("+42", 42), ("-42", -42), ("- 42", -42), ("$42", 42), ("007", 7),
    ("1,234", 1234), ("1,234,567.5", Fraction(2469135, 2)), ("0.50", Fraction(1, 2)), (".5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)), ("-3 / 4", Fraction(-3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{1}{2}", Fraction(-1, 2)),
    ("He has 5 + 6 = 11 apples.\n#### 11", 11), ("#### 1,000", 1000), (r"so \boxed{7}", 7),
    (r"first \boxed{1}, then \boxed{\frac{1}{2}}", Fraction(1, 2)), (r"$\boxed{42}$", 42),
    ("Paris", "paris"), (" New  York ", "new york"), ("1,23", "1,23"), ("1/0", "1/0"), ("12 apples", "12 apples"),
    ("1e3", "1e3"), ("--1", "--1"), ("٣", "٣"), ("", ""), ("9" * 200, "9" * 200),
))
def test_an_answer_comes_down_to_an_exact_number_or_to_text(text, value):
    assert final_value(text) == value and isinstance(final_value(text), str) == isinstance(value, str)


@pytest.mark.parametrize("text, expected, verdict", (
    ("<think>\n6*7\n</think>\n<answer>42</answer>", "42", "correct"),
    ("<answer>42.0</answer>", "42", "correct"), ("42", "#### 42", "correct"), (r"It is \boxed{42}", "42", "correct"),
    ("<answer>1234</answer>", "1,234", "correct"), ("<answer>0.5</answer>", "1/2", "correct"),
    ("<answer>-3</answer>", "3", "-3 is not 3"), ("<answer>41</answer>", "42", "41 is not 42"),
    ("it is 42", "42", "it is 42 is not 42"),                                     # nothing but the answer, or tags
    ("<think>42", "42", "no single final answer"), ("", "42", "no single final answer"),
    ("<answer>41</answer><answer>42</answer>", "42", "no single final answer"),
    ("<answer>PARIS</answer>", "Paris", "correct"),
))
def test_a_completion_is_compared_exactly(text, expected, verdict):
    assert check_answer(text, expected) == verdict


def rows(*lines: str) -> str:
    good = [f'{{"question": "what is {i}+1?", "answer": {i + 1}}}' for i in range(20)]
    return "\n".join([*good, *lines]) + "\n"


@pytest.mark.parametrize("text, says", (
    (rows('{"question": "why?"}'), "line 21: {'question': 'why?'}; expected {\"question\": \"...\", \"answer\": \"...\"}"),
    (rows('{"question": "", "answer": "1"}'), "line 21"), (rows('{"answer": "1"}'), "line 21"),
    (rows('{"question": "a", "answer": null}'), "line 21"), (rows('{"question": "a", "answer": true}'), "line 21"),
    (rows('{"question": "a", "answer": "because ####"}'), "line 21"), (rows('{"question": "a"'), "a broken line in"),
    (rows('{"question": "what is 0+1?", "answer": 2}'), "line 21, with the question of line 1 and another answer"),
    ('{"question": "what is 0+1?", "answer": 1}\n', "with 1 questions"), ("", "with 0 questions"),
))
def test_a_wrong_row_is_refused_with_file_and_line(text, says, tmp_path, refused, monkeypatch):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    monkeypatch.setattr(evaluate, "load", None)  # before any model is loaded
    refused(evaluate, "--task", path, says=(path, says))


def test_the_same_question_twice_with_the_same_answer_is_one_question(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(rows('{"question": "what is 3+1?", "answer": "4.0"}'))
    assert Questions.read(path).WEIGHTS == {"accuracy": 1.0, "format": 0.2, "language": 0.0}


def test_a_file_without_answers_is_for_a_reward_model(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"question": "tell me of {i}"}}\n' for i in range(20)))
    assert Questions.read(path).WEIGHTS == {"preference": 1.0}


def test_white_space_puts_no_question_into_two_splits(tmp_path):
    """A hash of the words decides: the same question with another space or newline is the same question."""
    write = tmp_path / "q.jsonl"
    write.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for i in range(40)
                             for text in (f"is {i} odd?", f" is  {i} odd?\n")))
    task = Questions.read(write)
    keys = [{task.key(row) for row in task.rows[split]} for split in SPLITS]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 40
