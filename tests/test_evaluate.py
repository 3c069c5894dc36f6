"""The evaluator: estimators by hand, and what it asks, of which puzzles, how often. Texts come from a fake sampler
where they must be known."""

import json
import math
import random
import re
import sys
from itertools import combinations

import pytest
import torch

import evaluate
import sft
import corpus
from countdown import Puzzle, make_prompt, sample_puzzles, solve, split_of, vote, watch
from evaluate import Config, looks, pass_at_k
from machinery.checkpoints import save
from machinery.rollouts import Rollout
from machinery.statistics import scores_of, wilson_interval
from machinery.tasks import Score, find_tasks
from rewards import accuracy_reward, format_reward, verify
from sampling import Completion
from tasks.general import draw_sum, small_talk

TOKENIZER = corpus.build_tokenizer()


@pytest.fixture(scope="module")
def random_model():
    """One layer that knows nothing -> (model, tokenizer)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "test", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                    num_attention_heads=2, num_key_value_heads=1, head_dim=16))
        return sft.new_model("test", seed=0)


@pytest.fixture
def fake_sampler(monkeypatch):
    """Puts write(prompt, i) in the place of complete(), i counting the prompts of one call; returns the calls'
    prompts."""
    def install(write):
        calls = []

        def complete(model, tokenizer, prompts, **settings):
            calls.append((prompts, settings))
            texts = [write(prompt, i) for i, prompt in enumerate(prompts)]
            return [[0]] * len(texts), [Completion([1] * 5, [0.0] * 5, truncated=False)] * len(texts), texts
        monkeypatch.setattr(evaluate, "complete", complete)
        return calls
    return install


def answer(expression: str) -> str:
    return f"<think>\n1+1=2\n</think>\n<answer>{expression}</answer>"


# ----------------------------------------------------------------------------------------------------------- estimators
def test_pass_at_k_by_hand():
    """1 - C(n-c, k) / C(n, k): of 4 samples with 1 right one, two drawn hold it in 3 of 6 pairs."""
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(16, 0, 16) == 0.0 and pass_at_k(16, 16, 1) == 1.0
    assert pass_at_k(256, 1, 16) == pytest.approx(16 / 256)


@pytest.mark.parametrize("n", (3, 6))
def test_pass_at_k_equals_the_share_of_all_draws(n):
    """Unbiased: exactly the share of the k-subsets of n samples that hold one of the c right ones."""
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = [min(draw) < c for draw in combinations(range(n), k)]  # samples 0 .. c-1 are right
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))


# -------------------------------------------------------------------------------------------------------- majority vote
@pytest.mark.parametrize("expressions, winner", (
    (["(4+5)*3", "4*5+3", "3*(5+4)"], "(4+5)*3"),          # 27, 23, 27: different expressions of one value agree
    (["4*5+3", "3*4+5", "5+4*3"], "3*4+5"),                # 23, 17, 17: the vote may be wrong, 27 or not
    (["4*5+3", "3*5+4"], "4*5+3"),                         # 23, 19: a tie goes to the value that came first
    (["3*5+4", "4*5+3"], "3*5+4"),
    (["27", "27", "27", "4*5+3"], "4*5+3"),                # not the puzzle's numbers: no vote
    (["4*5", "4*5", "4+5+3+3", "3*5+4"], "3*5+4"),         # too few and too many of them: no vote
    (["(4+5", "import os", "", "5-4/3"], "5-4/3"),         # what does not parse has no vote; 11/3 has one
    (["3/(5-5)", "3*4*5"], "3*4*5"),                       # nor has a division by zero
    (["3/5*4", "5-3-4", "4*3/5"], "3/5*4"),                # fractions are exact: 12/5 twice
    (["hello", "27"], None),
    ([], None),
))
def test_majority_vote_by_hand(expressions, winner):
    """Puzzle 3 4 5. A voter's value counts, not its text; whoever has no valid expression over the puzzle's numbers has
    no vote."""
    assert vote(Puzzle((3, 4, 5), 27), [answer(expression) for expression in expressions]) == winner


def test_only_one_final_answer_votes():
    texts = [answer("3*4+5") + "<answer>3*4+5</answer>", "3*4+5", "<think>3*4+5", answer("4*5+3")]
    assert vote(Puzzle((3, 4, 5), 27), texts) == "4*5+3"


def test_the_vote_never_sees_the_target():
    """The same votes give the same winner, whatever had to be made."""
    texts = [answer("(4+5)*3"), answer("4*5+3"), answer("5*4+3")]
    assert {vote(Puzzle(numbers, target), texts) for numbers in ((3, 4, 5), (5, 4, 3)) for target in (27, 23, 1)} == {
        "4*5+3"}


# ---------------------------------------------------------------------------------------------------------------- looks
def test_looks_are_means_over_completions():
    """Of two completions one is cut off after 9 tokens with two failed lines, two "wait" and a German word."""
    texts = ["<think>\n4+5=9,9 3:9*3=27?27 yes\n</think>\n<answer>(4+5)*3</answer>",
             "<think>\n5-4=1,?27 no wait,\n4-3=1, wait, nein\n5+4=9"]
    row = looks(texts, [Completion([1] * 5, [], truncated=False), Completion([1] * 9, [], truncated=True)])
    assert row == {"completion_tokens": 7.0, "truncated": 0.5, "reflection_words": 1.0, "language": (1 + 3 / 4) / 2,
                   "mixed": 0.5}
    puzzle = Puzzle((3, 4, 5), 27)
    assert [watch(puzzle, text) for text in texts] == [{"verifications": 1, "backtracks": 0},
                                                       {"verifications": 1, "backtracks": 2}]


def test_accuracy_is_given_of_each_group_alone():
    """Of three completions for three numbers two are right, of the one for four none; a task without groups has no such
    row, a second task has its own under its name."""
    def rollout(task, group, accuracy):
        score = Score(accuracy, {"accuracy": accuracy}, {}, "", group)
        return Rollout(0, task, "", "", Completion([1], [], truncated=False), score, 0.0, 0.0, 0.0, True)
    puzzles = [rollout("countdown", f"{n}_numbers", right) for n, right in ((3, 1.0), (4, 0.0), (3, 0.0), (3, 1.0))]
    sums, chat = rollout("sums", "", 1.0), rollout("chat", "small_talk", 0.5)
    row = evaluate.describe_step([*puzzles, sums, chat], "en")
    assert {name: value for name, value in row.items() if "accuracy" in name} == {
        "accuracy": 0.5, "accuracy_3_numbers": 2 / 3, "accuracy_4_numbers": 0.0, "sums_accuracy": 1.0,
        "chat_accuracy": 0.5, "chat_accuracy_small_talk": 0.5}


# ------------------------------------------------------------------------------------------------------------ the whole
def test_every_puzzle_counts_once_and_none_is_dropped(fake_sampler):
    """n = 7 with the first 3 right: pass@1 is 3/7 exactly; all 7 are test puzzles, different, and asked in one call."""
    puzzles = sample_puzzles(7, split="test", seed=5)
    calls = fake_sampler(lambda prompt, i: answer(solve(*puzzles[i])) if i < 3 else "no idea")
    table, records = evaluate.evaluate(None, TOKENIZER, Config(n=7, seed=5))
    assert table["pass@1"] == 3 / 7 and (table["pass@1_low"], table["pass@1_high"]) == wilson_interval(3 / 7, 7)
    assert table["n"] == len(records) == len(calls[0][0]) == 7
    asked = [Puzzle(record["numbers"], record["target"]) for record in records]
    assert {split_of(puzzle) for puzzle in asked} == {"test"}
    assert len({(tuple(sorted(numbers)), target) for numbers, target in asked}) == 7
    assert [record["verdict"] for record in records] == ["correct"] * 3 + ["no single final answer"] * 4
    assert table["format"] == 3 / 7 and table["truncated"] == 0 and "maj@1" not in table
    for count in (3, 4):
        right = [i < 3 for i, puzzle in enumerate(puzzles) if len(puzzle.numbers) == count]
        assert table[f"pass@1_{count}_numbers"] == sum(right) / len(right)


@pytest.mark.parametrize("split", ("train", "validation"))
def test_a_split_is_asked_alone(fake_sampler, split):
    calls = fake_sampler(lambda prompt, i: "")
    table, records = evaluate.evaluate(None, TOKENIZER, Config(n=20, split=split))
    assert {split_of(Puzzle(record["numbers"], record["target"])) for record in records} == {split}
    assert ("new_greetings" in table) == (split != "train")  # of what nothing trains on
    sums = [prompt.split()[-1][:-1] for prompt in calls[1][0] if prompt.startswith(("what is", "was ist"))]
    drawn = {question["prompt"] for rng in [random.Random(0)] for _ in range(3000)
             for question in [draw_sum(rng, split)]}
    assert len(sums) == 20 and all(f"what is {text}?\n" in drawn for text in sums)


def test_several_samples_give_pass_at_k_and_the_vote(fake_sampler):
    """4 samples of each of 3 puzzles. Right: all of the first, one of the second (two that agree outvote it), none
    else.

    pass@1 = (1 + 1/4 + 0) / 3, pass@4 = 2/3, maj@4 = 1/3."""
    puzzles = sample_puzzles(3, split="test", seed=0)

    def write(prompt, i):
        puzzle, sample = puzzles[i // 4], i % 4
        wrong = next(op.join(map(str, puzzle.numbers)) for op in "+-" if not verify(
            op.join(map(str, puzzle.numbers)), *puzzle)[0])
        right = i // 4 == 0 or (i // 4 == 1 and sample == 0)
        return answer(solve(*puzzle) if right else wrong if sample > 1 else "0")
    calls = fake_sampler(lambda prompt, i: write(prompt, i) if i < 12 else "hello")
    table, records = evaluate.evaluate(None, TOKENIZER, Config(n=3, samples=4))
    assert calls[0][0] == [make_prompt(puzzle) for puzzle in puzzles for _ in range(4)] and len(records) == 12
    assert [table[name] for name in ("pass@1", "pass@4", "maj@4")] == pytest.approx([1.25 / 3, 2 / 3, 1 / 3])
    assert table["wrong_numbers"] == 3 / 12  # the answers "0"; 1+2+3 uses the right ones
    own = evaluate.by_problem(records, 4)
    assert own["right"] == [4, 1, 0] and own["votes"] == [1, 0, 0]
    assert scores_of({"samples": 4, **own}).values == [1, 0.25, 0] and scores_of({"samples": 4, **own}, "votes").values == [1, 0, 0]


def test_greetings_and_arithmetic_are_asked_and_judged_by_the_rule(fake_sampler):
    """The second call: about as many of each kind as there are puzzles. Every other greeting is thought over, the
    others get a reply that is good for some; every fourth sum is right."""
    def write(prompt, i):
        if prompt.startswith(("what is", "was ist")):
            return str(eval(prompt.split()[-1].rstrip("?").replace("/", "//"))) if i % 4 == 0 else "-1"
        return good if i % 2 else "<think>hello</think>"
    good = "hello, how are you?"
    calls = fake_sampler(write)
    table, _ = evaluate.evaluate(None, TOKENIZER, Config(n=64))
    asked = calls[1][0]
    known, new = ([question["prompt"] for question in small_talk(split)] for split in ("train", "test"))
    assert asked[:60] == known * 5 and asked[60:120] == new * 10 and not set(known) & set(new)
    assert len(asked) == 184 and all(prompt.startswith(("what is", "was ist")) for prompt in asked[120:])
    assert table["needless_thinking"] == 0.5
    answers = {question["prompt"]: question["good"] for split in ("train", "test") for question in small_talk(split)}
    for name, places in (("greetings", range(60)), ("new_greetings", range(60, 120))):
        assert table[name] == sum(i % 2 and good in answers[asked[i]] for i in places) / 60 > 0
    assert table["arithmetic"] == sum(i % 4 == 0 for i in range(120, 184)) / 64


def test_few_shot_prompts_hold_solved_train_puzzles(fake_sampler):
    calls = fake_sampler(lambda prompt, i: "")
    evaluate.evaluate(None, TOKENIZER, Config(n=3, shots=2))
    shots = ["".join(prompt + text + "\n\n" for prompt, text in corpus.examples(random.Random(f"0, {i}"), "laptop", 2))
             for i in range(3)]
    puzzles = sample_puzzles(3, split="test", seed=0)
    assert calls[0][0] == [own + make_prompt(puzzle) for own, puzzle in zip(shots, puzzles)] and len(set(shots)) == 3


@pytest.mark.parametrize("style, level", (
    ("tiny", "laptop"), ("tiny", "three"), ("base", "tinyzero"), ("chat", "laptop")))
def test_few_shot_examples_are_right_well_formed_and_not_held_out(style, level):
    task, = find_tasks("countdown", level)
    examples = corpus.examples(random.Random(3), level, 12) if style == "tiny" else task.examples(12, style, random.Random(3))
    for question, text in examples:
        *numbers, target = map(int, re.findall(r"\d+", question.split("(1+2)/3")[0].replace("each number exactly once", "")))
        assert split_of(Puzzle(tuple(numbers), target)) == "train"
        assert accuracy_reward(text, numbers, target) == format_reward(text) == 1.0


@pytest.mark.parametrize("settings", ({}, {"temperature": 0.0}, {"top_p": 0.9, "temperature": 0.6}, {"samples": 4}))
def test_a_seed_gives_the_same_table_every_time(random_model, settings):
    """A true model, twice: puzzles and random streams follow the seed, whatever torch's own generator does in
    between."""
    tables = []
    for _ in range(2):
        torch.rand(3)
        tables.append(evaluate.evaluate(*random_model, Config(n=9, max_new_tokens=12, seed=1, **settings)))
    assert tables[0] == tables[1]
    other, records = evaluate.evaluate(*random_model, Config(n=9, max_new_tokens=12, seed=2, **settings))
    assert records != tables[0][1] and len(records) == 9 * other["samples"]
    assert all(math.isfinite(value) for value in other.values())


def test_the_command_line_prints_and_writes_the_table(random_model, tmp_path, monkeypatch, capsys):
    """pass@1 with its interval and n on the screen, the same numbers and the settings in --json, --show completions
    with verdicts."""
    save(*random_model, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(tmp_path / "model"), "--n", "5", "--samples", "2",
                                      "--max-new-tokens", "8", "--show", "3", "--json", str(tmp_path / "table.json")])
    evaluate.main()
    out = capsys.readouterr().out
    assert "pass@1  0.0%  (95% interval 0.0% to 43.4%, n = 5 test problems x 2)" in out
    assert all(name in out for name in ("pass@1_3_numbers", "pass@1_4_numbers", "pass@2", "maj@2", "format",
                                        "truncated", "completion_tokens", "backtracks", "reflection_words", "language",
                                        "needless_thinking", "new_greetings"))
    assert out.count("=> ") == 3
    assert all(make_prompt(puzzle) in out for puzzle in sample_puzzles(3, split="test", seed=0))
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["pass@1"] == 0 and table["n"] == 5 and isinstance(table["language"], float)
    assert {name: table["settings"][name] for name in ("model", "split", "seed", "language")} == {
        "model": str(tmp_path / "model"), "split": "test", "seed": 0, "language": "en"}
