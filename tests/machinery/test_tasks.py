"""The seam for tasks: every task is held to its gold, its split and its determinism; a stranger's file is looked at before
any model is loaded."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

import evaluate
import rejection
import train_countdown
from countdown import SPLITS, split_of
from machinery import plots
from machinery.data import read_jsonl
from machinery.run_folder import append_jsonl
from machinery.tasks import BUILT_IN, Task, draw_problems, find_tasks, pairs, shares
from sampling import Completion
from test_training import train

pytestmark = pytest.mark.usefixtures("quiet_training")

ROOT = Path(__file__).resolve().parents[2]
OWN = re.search(r"```python\n# largest\.py\n(.*?)```", (ROOT / "docs" / "fork-it.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The task file of docs/fork-it.md, and a file of 200 questions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "largest.py").write_text(OWN)
    append_jsonl(folder / "sums.jsonl", *({"question": f"what is {a}+{b}?", "answer": a + b}
                                          for a in range(10) for b in range(20)))
    return {"largest": str(folder / "largest.py"), "sums": str(folder / "sums.jsonl")}


@pytest.fixture(params=[(name, level) for name in BUILT_IN for level in find_tasks(name)[0].seam.LEVELS]
                + [("largest", ""), ("sums", "")], ids="-".join)
def task(request, files) -> Task:
    name, level = request.param
    return find_tasks(files.get(name, name), level)[0]


def test_gold_scores_full_marks_in_every_part_that_a_rule_gives(task):
    for split in SPLITS:
        rng = random.Random(1)
        for problem in (task.seam.draw(rng, task.level, split) for _ in range(30)):
            parts, verdict = task.seam.score(problem, task.seam.gold(problem))
            assert verdict == "correct" and all(value == 1.0 for value in parts.values()), problem
            assert set(task.weights) <= {*parts, "language", "preference"}
            majority = task.majority(problem, ["<answer>-1</answer>", *[task.seam.gold(problem)] * 2])
            assert task.seam.score(problem, majority)[1] == "correct"


def test_draws_follow_from_their_seed_and_stay_on_their_side(task):
    drawn = {split: [task.seam.draw(rng, task.level, split) for rng in [random.Random(3)] for _ in range(60)]
             for split in SPLITS}
    again = [task.seam.draw(rng, task.level, "train") for rng in [random.Random(3)] for _ in range(60)]
    assert again == drawn["train"] and len({task.seam.key(problem) for problem in again}) > 5
    keys = {split: {task.seam.key(problem) for problem in problems} for split, problems in drawn.items()}
    assert len(set.union(*keys.values())) == sum(map(len, keys.values()))  # no key is of two splits
    json.dumps(drawn)  # a problem is JSON


def test_no_text_makes_a_score_fail(task):
    problem = task.seam.draw(random.Random(0), task.level, "train")
    for text in ("", "<answer>", "<answer></answer>", "<think>\n</think>\n<answer>1e999</answer>", "\ud800", "(" * 10_000,
                 "<answer>" + "9" * 10_000 + "</answer>", "<answer>٣</answer>", "<answer>\\boxed{}</answer>", "#### "):
        parts, verdict = task.seam.score(problem, text)
        assert verdict != "correct" or not parts
        assert parts.get("accuracy", 0.0) < 1.0 and task.watch(problem, text) is not None


def test_problems_are_different_and_fixed_by_the_seed(task):
    problems = task.problems(6, "test", 5)
    assert len({task.seam.key(problem) for problem in problems}) == 6
    assert problems == task.problems(6, "test", 5) != task.problems(6, "test", 6)


def test_a_task_with_few_problems_gives_what_it_has_or_says_so(files):
    task, = find_tasks(files["sums"])
    held_out = task.seam.rows["test"]
    assert sorted(map(task.seam.key, task.problems(0, "test", 1))) == sorted(map(task.seam.key, held_out))
    with pytest.raises(ValueError, match=f"got n=500, but task sums .* only about {len(held_out)} test problems"):
        task.problems(500, "test", 1)


def test_a_prompt_is_the_question_in_the_template_of_its_style():
    class Chat:
        chat_template = "some"

        def apply_chat_template(self, messages, **settings):
            return "|".join(message["content"] for message in messages)
    for name in ("countdown", "arithmetic"):
        task, = find_tasks(name)
        problem = task.seam.draw(random.Random(0), task.level, "train")
        examples = task.examples(1, "chat", random.Random(0))
        assert task.prompt(problem, "tiny") == task.seam.question(problem, "tiny")
        assert task.prompt(problem, "base").endswith("<think>")
        assert f"User: {task.seam.question(problem, 'base')}\n" in task.prompt(problem, "base")
        assert task.prompt(problem, "chat", Chat(), examples) == "|".join(
            [*examples[0], task.seam.question(problem, "chat")])
        assert "<answer>" in task.seam.question(problem, "chat")


# ------------------------------------------------------------------------------------------------------ what --task says
def test_several_tasks_share_a_step_by_their_weights():
    tasks = find_tasks("countdown=3,arithmetic=1", "two-digits")
    assert [(task.name, task.level, task.share) for task in tasks] == [("countdown", "laptop", 0.75),
                                                                      ("arithmetic", "two-digits", 0.25)]
    assert shares(tasks, 16) == [12, 4] and shares(tasks, 2) == [1, 1]
    drawn = draw_problems(tasks, 8, random.Random(0))
    assert [task.name for task, _ in drawn] == ["countdown"] * 6 + ["arithmetic"] * 2
    assert pairs("a=3,b=0.5", "x") == {"a": 3.0, "b": 0.5} and pairs("", "weights") == {}


def test_weights_override_the_tasks_own():
    countdown, arithmetic = find_tasks("countdown,arithmetic", weights="accuracy=2,language=0.5")
    assert countdown.weights == {"accuracy": 2.0, "format": 0.2, "language": 0.5} == arithmetic.weights
    assert find_tasks("countdown")[0].weights == {"accuracy": 1.0, "format": 0.2, "language": 0.0}


@pytest.mark.parametrize("flags, says", (
    (("--task", "chess"), ("got task 'chess', expected one of countdown, arithmetic, code, general, a .py or a .jsonl",)),
    (("--task", "no.py"), ("got task 'no.py', but there is no such file",)),
    (("--task", "countdown,countdown"), ("expected every name once",)),
    (("--task", "countdown=0"), ("where countdown has weight 0; expected more than 0",)),
    (("--task", "countdown=many"), ("expected NAME=NUMBER",)),
    (("--task", ""), ("got an empty --task",)),
    (("--level", "hard"), ("got level 'hard', expected one of laptop, three, four, hundred, five, tinyzero",)),
    (("--task", "arithmetic", "--level", "laptop"), ("got level 'laptop', expected one of sums, one-digit",)),
    (("--style", "haiku"), ("got style 'haiku', expected tiny, base or chat",)),
    (("--weights", "beauty=1"), ("got --weights with 'beauty', expected some of accuracy, format, language",)),
    (("--task", "countdown=1,arithmetic=1,general=1", "--batch-size", 32, "--preference", "x"), ("2 problems at a time for 3",)),
))
def test_what_task_level_and_weights_cannot_be(flags, says, refused, monkeypatch, tmp_path):
    no_model(monkeypatch)
    refused(train_countdown, "--out", tmp_path / "run", *flags, says=says)


def no_model(monkeypatch):
    """Nothing is loaded before the tasks are right."""
    for module in (train_countdown, evaluate, rejection):
        monkeypatch.setattr(module, "load" if module is not train_countdown else "open_run", None)


@pytest.mark.parametrize("old, new, says", (
    ("def gold(", "def silver(", ("got task", "without gold", "expected LEVELS, WEIGHTS, draw, key, question, score, gold")),
    ("import split_of", "import splitter", ("which does not import (ImportError",)),
    ("WEIGHTS = {", "WEIGHTS = {} or {'beauty': 1.0, ", ("whose WEIGHTS name 'beauty'", "a part that its score gives")),
    ("rng.randint", "rng.randnit", ("which fails on its own problems (AttributeError",)),
    ("== split:", "== 'train':", ("draws", "for test and for validation")),
    ("== split:", "== split == 'train':", ("without a test problem", "to know test, validation, train")),
    ("== split:", "== split != 'validation':", ("without a validation problem", "to know test, validation, train")),
    ("LEVELS = {", "LEVELS = {} and {", ("with LEVELS {}",)),
))
def test_a_task_file_is_looked_at_before_any_model(old, new, says, refused, monkeypatch, tmp_path):
    no_model(monkeypatch)
    monkeypatch.setattr("machinery.tasks.Limited.left", 50_000)  # a million draws take two seconds
    assert OWN.count(old) == 1
    path = tmp_path / "own.py"
    path.write_text(OWN.replace(old, new))
    for script in (train_countdown, evaluate, rejection):
        refused(script, "--task", path, "--json" if script is evaluate else "--out", tmp_path / "out", says=says)


def test_a_gold_that_does_not_score_is_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN.replace("gold(", "in_order(") + "\n\ndef gold(problem):\n    return 'no'\n")
    with pytest.raises(ValueError, match="whose score calls its own gold .* expected 'correct'"):
        find_tasks(str(path))


# -------------------------------------------------------------------------------------------------- a stranger's own task
def test_a_file_of_ones_own_trains_evaluates_and_is_sampled_from(files, base, tmp_path, monkeypatch, capsys):
    """Without touching another file; its reward parts reach metrics, rollouts and the plot by themselves."""
    assert len(OWN.splitlines()) <= 60
    rows = train(monkeypatch, base, tmp_path / "run", task=files["largest"], steps=2, eval_n=8, eval_every=1,
                 sample_every=1)
    assert {"accuracy", "close", "reward"} <= rows[1].keys() and {"eval_pass@1", "eval_close"} <= rows[1].keys()
    rollout = read_jsonl(tmp_path / "run" / "rollouts.jsonl")[0]
    assert rollout["task"] == "largest" and rollout["parts"].keys() == {"accuracy", "close"}
    assert "largest: close" in [title for title, *_ in plots.panels_of(tmp_path / "run")]
    plots.plot_run(tmp_path / "run")
    assert (tmp_path / "run" / "curve.png").exists()
    monkeypatch.setattr(rejection, "FILTERS", (rejection.one_language,))  # a random model is never right
    monkeypatch.setattr(sys, "argv", ["rejection.py", "--model", str(base), "--task", files["largest"], "--n", "8",
                                      "--max-new-tokens", "8", "--out", str(tmp_path / "rows.jsonl")])
    rejection.main()
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert rows and all(split_of(" ".join(map(str, sorted(row["numbers"])))) == "train" for row in rows)


def test_two_tasks_in_one_run_are_logged_and_evaluated_apart(files, base, tmp_path, monkeypatch):
    rows = train(monkeypatch, base, tmp_path / "run", task=f"countdown=1,{files['sums']}=1", steps=1, eval_n=8)
    assert {"accuracy", "sums_accuracy", "sums_reward", "eval_pass@1", "eval_sums_pass@1"} <= rows[1].keys()
    assert "needless_thinking" not in {name.removeprefix("eval_sums_") for name in rows[1] if "sums" in name}
    titles = [title for title, *_ in plots.panels_of(tmp_path / "run")]
    assert titles[len(plots.PANELS):] == ["sums: accuracy"]


def test_answers_without_tags_are_kept_where_the_format_weighs_nothing(files, base, tmp_path, monkeypatch, refused):
    def complete(model, tokenizer, prompts, **settings):
        texts = [str(eval(prompt.split()[-1].rstrip("?"))) for prompt in prompts]
        return None, [Completion([1, 2], [0.0, 0.0], truncated=False)] * len(texts), texts
    monkeypatch.setattr(rejection, "complete", complete)
    flags = ("--model", base, "--task", files["sums"], "--n", 8, "--samples", 2, "--out", tmp_path / "rows.jsonl")
    refused(rejection, *flags, says=("none was left after the filter well_formatted",))
    monkeypatch.setattr(sys, "argv", ["rejection.py", *map(str, flags), "--weights", "format=0"])
    rejection.main()
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 8 and all(row["completion"] == row["answer"] for row in rows)
    assert all(row["prompt"] == f"{row['question']}\n" and split_of(row["question"]) == "train" for row in rows)
