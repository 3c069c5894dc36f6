"""General prompts: their good replies, their bad ones, and what a step's rewards make of a mix of puzzles and them."""

import json
import random

import pytest

from countdown import Puzzle
from preference import final_reply
from tasks import general
from tasks.general import (FLAWS, SMALL_TALK, draw_question, flawed, is_good, needless_thinking, question_prompt,
                           reward_completions, write_rows)


def questions(n: int = 400) -> list[dict]:
    rng = random.Random(0)
    return [draw_question(rng) for _ in range(n)]


def flaws_of(question: dict) -> list[str]:
    return [flaw for flaw in FLAWS if flaw != ("rude" if question["kind"] == "arithmetic" else "wrong")]


@pytest.mark.parametrize("text, reply", (
    ("hello", "hello"),
    ("<think>\nhello wait\n</think>\nhello", "hello"),
    ("<think>a</think>b<think>c</think> d", "b d"),            # every chain of thought is taken out
    ("<think>it never ends", ""),                              # the user sees nothing
    ("<think>a</think><answer>5</answer>", "<answer>5</answer>"),  # an answer's tags are seen
    ("no tag</think> here", "no tag</think> here"),            # nothing was opened, so nothing is hidden
    (" \n", ""),
))
def test_the_final_reply_is_what_the_user_sees(text, reply):
    assert final_reply(text) == reply


def test_questions_are_half_arithmetic_half_small_talk_in_both_languages():
    rows = questions()
    arithmetic = [row for row in rows if row["kind"] == "arithmetic"]
    assert 160 < len(arithmetic) < 240
    assert {row["language"] for row in arithmetic} == {"en", "de"}
    assert {row["prompt"].strip() for row in rows if row["kind"] == "small_talk"} == set(SMALL_TALK)


def test_the_good_reply_to_a_sum_is_its_value():
    for row in questions():
        if row["kind"] == "arithmetic":
            a, op, b = row["prompt"].split()[-1].rstrip("?").replace("+", " + ").replace("-", " - ").replace(
                "*", " * ").replace("/", " / ").split()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op]
            assert row["good"] == [str(int(value))] and value == int(value) >= 0


def test_every_flaw_makes_a_good_reply_bad():
    rng = random.Random(1)
    for question in questions():
        for reply in question["good"]:
            assert is_good(reply, question["good"]) and is_good(f" {reply}\n", question["good"])
            for flaw in flaws_of(question):
                assert not is_good(flawed(question, reply, flaw, rng), question["good"]), (question, flaw)


@pytest.mark.parametrize("completion, good", (
    ("hello", True), ("hello hello", False), ("go away", False), ("", False),
    ("<think>hello</think>hello", False),           # the reward model would not see this one; the rule does
    ("hello</answer>", False),
))
def test_a_good_reply_is_said_once_and_without_thinking(completion, good):
    assert is_good(completion, ["hello"]) == good


@pytest.mark.parametrize("what", ("questions", "replies", "pairs"))
def test_rows_follow_from_their_seed(what):
    assert write_rows(what, 50, 0) == write_rows(what, 50, 0) != write_rows(what, 50, 1)


def test_replies_are_good_and_pairs_differ_in_one_flaw():
    good = {row["prompt"]: row["good"] for row in write_rows("questions", 2000, 5)}
    for row in write_rows("replies", 300, 0):
        assert row["prompt"] not in good or is_good(row["completion"], good[row["prompt"]])
    pairs = write_rows("pairs", 600, 0)
    assert {pair["flaw"] for pair in pairs} == set(FLAWS)
    for pair in pairs:
        if pair["prompt"] in good:
            assert is_good(pair["chosen"], good[pair["prompt"]]) and not is_good(pair["rejected"], good[pair["prompt"]])
        assert needless_thinking(pair["rejected"]) == (pair["flaw"] == "thinking")


class ChatTokenizer:
    def apply_chat_template(self, messages, **settings):
        assert settings == {"tokenize": False, "add_generation_prompt": True}
        return f"<user>{messages[0]['content']}<assistant>"


def test_a_row_holds_the_prompt_as_the_model_reads_it():
    assert question_prompt("hello\n", "tiny") == "hello\n"
    assert question_prompt("hello\n", "chat", ChatTokenizer()) == "<user>hello<assistant>"
    with pytest.raises(ValueError, match="got general prompts with style 'base', expected tiny or chat"):
        question_prompt("hello\n", "base")
    assert all(row["prompt"].startswith("<user>") for what in ("questions", "replies", "pairs")
               for row in write_rows(what, 5, 0, "chat", ChatTokenizer()))


def test_puzzles_are_rewarded_by_rules_and_general_prompts_by_the_judge():
    """The judge gets the general prompts only, in order; its score is the reward, and the rule's verdict just stands
    beside it, where the rule knows the good replies."""
    asked = []

    def judge(prompts, texts):
        asked.append((prompts, texts))
        return [0.25, -3.0]
    right, wrong = ("<think>\n1+2 yes\n</think>\n<answer>1+2</answer>", "no")
    tasks = [Puzzle((1, 2), 3), {"prompt": "hi", "good": ["hello"]}, Puzzle((1, 2), 3), {"prompt": "why?"}]
    parts = reward_completions(tasks, ["a", "hi", "b", "why?"], [right, "hello", wrong, "<think>so"], judge,
                               format_weight=0.5, language_weight=0.0, language="en")
    assert asked == [(["hi", "why?"], ["hello", "<think>so"])]
    assert [part["reward"] for part in parts] == [1.5, 0.25, 0.0, -3.0]
    assert parts[1] == {"reward": 0.25, "preference": 0.25, "general_thinking": False, "general_good": True}
    assert parts[3] == {"reward": -3.0, "preference": -3.0, "general_thinking": True}
    assert "accuracy" in parts[0] and "preference" not in parts[0]


def test_without_general_prompts_no_judge_is_asked():
    assert reward_completions([Puzzle((1, 2), 3)], ["a"], ["no"], None)[0]["reward"] == 0.0


def test_the_command_writes_a_file_and_overwrites_none(tmp_path, capsys):
    path = tmp_path / "new" / "replies.jsonl"
    general.main(["replies", "--n", "7", "--out", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == write_rows("replies", 7, 0) and capsys.readouterr().out == f"7 replies in {path}\n"
    for flags, says in ((("--out", path), "exists and is never overwritten"),
                        (("--out", tmp_path / "x", "--n", 0), "got --n 0, expected at least 1"),
                        (("--out", tmp_path / "x", "--style", "chat", "--model", "no/where/to"), "got --style chat")):
        with pytest.raises(SystemExit) as stop:
            general.main(["pairs", *map(str, flags)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and not (tmp_path / "x").exists()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


@pytest.mark.parametrize("lines, says", (
    ([], "without a row"), (['{"prompt": "a"}', '{"prompt": 1}'], "line 2 without text in prompt"),
    (['{"prompt": "a"}', '{"prompt"'], "line 2"), (['[]'], "line 1"), (['{"prompt": " "}'], "line 1 without text"),
))
def test_bad_questions_are_refused_with_their_line(lines, says, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=says):
        general.read_questions(str(path))
