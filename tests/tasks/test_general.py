"""General prompts: their good replies, their bad ones, and what a step's rewards make of a mix of puzzles and them."""

import json
import random
import re

import pytest

from corpus import Config, build_tokenizer, write_corpus
from countdown import SPLITS, Puzzle, split_of
from machinery.tasks import find_tasks, score_completions
from preference import final_reply
from tasks import general
from tasks.general import FLAWS, NEW, SMALL_TALK, draw_question, flawed, is_good, needless_thinking, write_rows


def questions(n: int = 400, split: str = "train") -> list[dict]:
    rng = random.Random(0)
    return [draw_question(rng, split) for _ in range(n)]


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


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_half_arithmetic_half_small_talk_in_both_languages(split):
    rows = questions(split=split)
    arithmetic = [row for row in rows if row["kind"] == "arithmetic"]
    assert 160 < len(arithmetic) < 240
    assert {row["language"] for row in arithmetic} == {"en", "de"}
    assert {row["prompt"].strip() for row in rows if row["kind"] == "small_talk"} == set(NEW.get(split, SMALL_TALK))
    assert [general.group(row) for row in rows] == [row["kind"] for row in rows]


def a_op_b(row: dict) -> tuple[int, str, int]:
    a, op, b = re.fullmatch(r"(?:what is|was ist) (\d+)([-+*/])(\d+)\?\n", row["prompt"]).groups()
    return int(a), op, int(b)


@pytest.mark.parametrize("split", SPLITS)
def test_the_good_reply_to_a_sum_is_its_value(split):
    for row in questions(split=split):
        if row["kind"] == "arithmetic":
            a, op, b = a_op_b(row)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
            assert row["good"] == [str(int(value))] and value == int(value) >= 0


def test_a_sum_is_of_one_split_in_any_order_and_either_language():
    """3+4 and 4+3, what is and was ist; and there are some of each operation in every split."""
    sides = {split: {(min(a, b), op, max(a, b)) if op in "+*" else (a, op, b) for a, op, b in (
        a_op_b(row) for row in questions(2000, split) if row["kind"] == "arithmetic")} for split in SPLITS}
    assert {op for _, op, _ in sides["train"]} == {op for _, op, _ in sides["test"]} == set("+-*/")
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) > 250
    assert all(split_of("%d%s%d" % found) == split for split, side in sides.items() for found in side)


def test_an_evaluation_of_all_there_is_has_all_sums_too():
    """There are six prompts of small talk, and hundreds of sums, most of which come within so many draws."""
    problems = find_tasks("general")[0].problems(0, "test", 0)
    assert {row["prompt"].strip() for row in problems if row["kind"] == "small_talk"} == set(NEW["test"])
    assert len(problems) > 100


def test_held_out_small_talk_is_new_and_has_good_replies():
    """Of no split but its own, not among what training knows; and answered as the prompts that it is made of."""
    assert len({*NEW["validation"], *NEW["test"], *SMALL_TALK}) == 6 + 6 + len(SMALL_TALK)
    for split in ("validation", "test"):
        rows = {row["prompt"].strip(): row for row in questions(split=split) if row["kind"] == "small_talk"}
        for prompt, like in NEW[split].items():
            assert rows[prompt]["good"] == [reply for name in like for reply in SMALL_TALK[name][0]]
            assert len({name in general.GERMAN for name in like}) == 1
            assert rows[prompt]["language"] == ("de" if like[0] in general.GERMAN else "en")
        assert {row["language"] for row in rows.values()} == {"en", "de"}


@pytest.mark.parametrize("digits", [False, True])
def test_held_out_prompts_are_made_of_tokens_that_the_corpus_has_and_are_none_of_its_prompts(digits):
    """Their words are known, their order is not: otherwise the tiny model would see tokens that it never learnt."""
    documents = list(write_corpus(Config(n=3000, chat=1.0, programs=0.0)))
    tokenizer = build_tokenizer(digits)
    read = {i for row in tokenizer([d["prompt"] + d["completion"] for d in documents])["input_ids"] for i in row}
    for split in ("validation", "test"):
        for prompt in NEW[split]:
            assert read.issuperset(tokenizer(f"{prompt}\n")["input_ids"]), prompt
            assert f"{prompt}\n" not in {document["prompt"] for document in documents}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="got split 'held-out', expected one of test, validation, train"):
        draw_question(random.Random(0), "held-out")


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


@pytest.mark.parametrize("what", ("replies", "pairs"))
def test_rows_follow_from_their_seed(what):
    assert write_rows(what, 50, 0) == write_rows(what, 50, 0) != write_rows(what, 50, 1)


def test_replies_are_good_and_pairs_differ_in_one_flaw():
    good = {row["prompt"]: row["good"] for row in questions(2000)}
    for row in write_rows("replies", 300, 0):
        assert row["prompt"] not in good or is_good(row["completion"], good[row["prompt"]])
    pairs = write_rows("pairs", 600, 0)
    assert {pair["flaw"] for pair in pairs} == set(FLAWS)
    for pair in pairs:
        if pair["prompt"] in good:
            assert is_good(pair["chosen"], good[pair["prompt"]]) and not is_good(pair["rejected"], good[pair["prompt"]])
        assert needless_thinking(pair["rejected"]) == (pair["flaw"] == "thinking")


def test_a_row_holds_the_words_and_no_template():
    assert general.question({"prompt": "hello\n"}, "chat") == general.question({"prompt": "hello\n"}, "tiny") == "hello\n"
    with pytest.raises(ValueError, match="got general prompts with style 'base', expected tiny or chat"):
        general.question({"prompt": "hello\n"}, "base")


def test_puzzles_are_rewarded_by_rules_and_general_prompts_by_the_judge():
    """The judge gets the general prompts only, in order; its score is the reward, and what the rule says just stands
    beside it."""
    asked = []

    def judge(prompts, texts):
        asked.append((prompts, texts))
        return [0.25, -3.0]
    right, wrong = ("<think>\n1+2 yes\n</think>\n<answer>1+2</answer>", "no")
    puzzles, chat = find_tasks("countdown=3,general=1", weights="format=0.5")
    hi = {"prompt": "hi\n", "kind": "small_talk", "good": ["hello"]}
    drawn = [(puzzles, Puzzle((1, 2), 3)), (chat, hi), (puzzles, Puzzle((1, 2), 3)), (chat, hi)]
    scores = score_completions(drawn, ["a", "hi", "b", "why?"], [right, "hello", wrong, "<think>so"], judge, "en")
    assert asked == [(["hi", "why?"], ["hello", "<think>so"])]
    assert [score.reward for score in scores] == [1.5, 0.25, 0.0, -3.0]
    assert [score.parts for score in scores[1::2]] == [{"preference": 0.25}, {"preference": -3.0}]
    assert [score.watched for score in scores[1::2]] == [{"good": 1.0, "thinking": 0.0}, {"good": 0.0, "thinking": 1.0}]
    assert [score.verdict for score in scores] == ["correct", "correct", "no single final answer", "not good by the rule"]
    assert score_completions(drawn[:1], ["a"], ["no"], None, "en")[0].reward == 0.0  # and no judge is asked


def test_the_command_writes_a_file_and_overwrites_none(tmp_path, capsys):
    path = tmp_path / "new" / "replies.jsonl"
    general.main(["replies", "--n", "7", "--out", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == write_rows("replies", 7, 0) and capsys.readouterr().out == f"7 replies in {path}\n"
    for flags, says in ((("--out", path), "exists and is never overwritten"),
                        (("--out", tmp_path / "x", "--n", 0), "got --n 0, expected at least 1")):
        with pytest.raises(SystemExit) as stop:
            general.main(["pairs", *map(str, flags)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and not (tmp_path / "x").exists()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
