"""A file of programs with tests: what of a completion is the program, what its tests say, and what is said of a wrong row."""

import json
import random

import pytest

import evaluate
from countdown import SPLITS
from machinery import notes, runner
from machinery.judging import Judges
from machinery.tasks import find_tasks
from tasks.code import Programs, extract_program, program_format

GOOD = "def add1(x): return x + 1"


def row(i: int, **changed) -> dict:
    return {"question": f"Write add{i}, which adds {i}.", "entry_point": f"add{i}", "tests": [f"assert add{i}(1) == {i + 1}"],
            "visible_tests": [f"assert add{i}(0) == {i}"], **changed}


def write(path, *rows: dict) -> str:
    good = [row(i, solution=f"def add{i}(x): return x + {i}") for i in range(1, 13)]
    path.write_text("".join(json.dumps(own) + "\n" for own in [*good, *rows]))
    return str(path)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "mine.jsonl"
    return find_tasks(write(path, {"question": "Print the sum.", "tests": [{"stdin": "1 2\n", "stdout": "3"}]}))[0]


# ------------------------------------------------------------------------------------------------------- the program
@pytest.mark.parametrize("text, program, well_formed", (
    (f"<think>\nplus\n</think>\n```python\n{GOOD}\n```", GOOD, 1), (f"<think>a</think> So:\n```py\n{GOOD}\n```\n", GOOD, 1),
    (f"```Python\n{GOOD}\n```", GOOD, 0), (f"<think></think>\n```python\n{GOOD}\n```", GOOD, 0),
    (f"<think>a</think>```python\nfirst\n```\n```python\n{GOOD}\n```", GOOD, 0),                   # the last one counts
    (f"<think>a</think>\n```python\n{GOOD}\n```\n```\n2\n```", GOOD, 0), (f"<think>a</think>\n```python\n{GOOD}\n``` done", GOOD, 0),
    (f"<think>```python\nno\n```</think>\n```python\n{GOOD}\n```", GOOD, 1),                       # thinking is thinking
    (f"<think>\n```python\n{GOOD}\n```", None, 0), (f"<think>a</think>\n{GOOD}", None, 0), ("", None, 0),
    (f"<think>a</think>\n```python\n{GOOD}", None, 0), (f"<think>a</think>\n```js\n{GOOD}\n```", None, 0),
    (f"<think>a</think></think>\n```python\n{GOOD}\n```", GOOD, 0),
))
def test_the_last_python_block_behind_the_thinking_is_the_program(text, program, well_formed):
    found = extract_program(text)
    assert (found and found.strip()) == program and program_format(text) == well_formed


@pytest.mark.parametrize("program, parts, seen, verdict", (
    (GOOD, (1, 1), (1, ""), "correct"),
    ("def add1(x): return 1", (0, 1), (0, "error_wrong"), "test 1: wrong"),                  # repeats what is visible
    ("def add1(x): return 2", (0, 0), (1, "error_wrong"), "visible test 1: wrong"),
    ("def add1(x) return x", (0, 0), (0, "error_syntax"), "visible test 1: SyntaxError"),
    ("def add1(x): return y", (0, 0), (0, "error_raised"), "visible test 1: NameError"),
    ("import os\nos._exit(0)", (0, 0), (0, "error_killed"), "visible test 1: killed"),
    ("while True: pass", (0, 0), (0, "error_timeout"), "visible test 1: timeout"),
    (None, (0, 0), (0, "error_no_program"), "no Python block behind the thinking"),
))
def test_all_tests_decide_and_the_first_failure_is_told(task, program, parts, seen, verdict):
    text = f"<think>\na\n</think>\n```python\n{program}\n```" if program else "I do not know"
    score, said = task.seam.score(row(1), text)
    watched = task.seam.watch(row(1), text)
    assert (score["accuracy"], score["visible"]) == parts and said == verdict and score["format"] == bool(program)
    assert watched["hidden_share"] == seen[0]
    assert [name for name, value in watched.items() if name.startswith("error") and value] == [seen[1]] * bool(seen[1])


def test_the_seam_draws_asks_and_knows_solutions(task):
    rng = random.Random(0)
    problems = [task.seam.draw(rng, "all", split) for split in SPLITS for _ in range(20)]
    solved = next(problem for problem in problems if problem["solution"])
    assert task.seam.score(solved, task.seam.gold(solved)) == ({"accuracy": 1.0, "format": 1.0, "visible": 1.0}, "correct")
    assert solved["entry_point"] in task.prompt(solved, "base") and "```python" in task.prompt(solved, "base")
    script = {"question": "Print the sum.", "tests": [{"stdin": "1 2\n", "stdout": "3"}], "visible_tests": [],
              "entry_point": "", "solution": ""}
    assert task.seam.gold(script) is None and "Name the function" not in task.seam.question(script, "chat")
    right = "```python\nprint(sum(map(int, input().split())))\n```"
    assert task.seam.score(script, right)[0] == {"accuracy": 1.0, "format": 0.0, "visible": 0.0}
    assert evaluate.votes_are_right(task, [script], ["```python\nprint(4)\n```", right, right], Judges()) == [True]
    assert len(task.examples(2, "base", random.Random(0))) == 2


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("wrong, says", (
    (row(99, tests=[]), "line 13 has no list of tests"), ({"question": "why?", "entry_point": "f"}, "line 13 has no list of tests"),
    (row(99, question=" "), "line 13 is"), (row(99, entry_point=""), "the entry_point ''"),
    (row(99, tests=["assert add99(1) =="]), "that is no Python"), (row(99, tests=[3]), "has a test 2 '3'"),
    (row(99, tests=[{"stdin": "1"}]), "has a test 2"), (row(99, tests=[{"stdin": "", "stdout": " "}]), "wants nothing printed"),
    (row(99, tests=["def check(f): assert f(1) == 100"]), "passes without a program"),
    (row(99, solution="def add99(x): return x"), "has a solution that fails test 1 (assert add99(0) == 99): wrong"),
    (row(99, solution="def add(x): return x + 99"), "the entry_point 'add99', which its solution never defines"),
    (row(99, solution="def add99(x): return y"), "fails test 1 (assert add99(0) == 99): NameError"),
    (row(1), "line 13 with the question of line 1"),
))
def test_a_wrong_row_is_refused_with_file_and_line(wrong, says, tmp_path, refused, monkeypatch):
    path = write(tmp_path / "mine.jsonl", wrong)
    monkeypatch.setattr(evaluate, "load", None)  # before any model is loaded
    refused(evaluate, "--task", path, says=(path, says))


def test_a_test_that_never_ends_is_refused(tmp_path, refused, monkeypatch):
    """The runner says so of one: tests/machinery/test_runner.py."""
    said = {None: "wrong", "unending": "unending"}
    monkeypatch.setattr(runner, "run_tests", lambda program, tests, *_, **more: [
        said.get("unending" if "while" in test else program, "passed") for test in tests])
    path = write(tmp_path / "mine.jsonl", row(99, tests=["while True: pass"]))
    refused(evaluate, "--task", path, says=(path, "line 13 has a test 2 (while True: pass) that never ends"))


@pytest.mark.parametrize("flags, says", (
    (("--sandbox", "nowhere run -i"), ("there is no command nowhere", "docker run --rm -i")),
    (("--sandbox", "false"), ("got --sandbox 'false', where no program runs",)),
    (("--task", "countdown", "--sandbox", "env"), ("got --sandbox 'env' and --task countdown, which runs no program",)),
))
def test_a_sandbox_that_cannot_be_is_refused(flags, says, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    refused(evaluate, "--task", write(tmp_path / "mine.jsonl"), *flags, says=says)


def test_what_a_system_cannot_take_away_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "lacking", lambda sandbox: ["network", "memory"])
    monkeypatch.setattr(runner, "run_tests", lambda program, tests, *_, **more: ["passed" if program else "wrong"] * len(tests))
    notes.said.clear()
    for name in ("a.jsonl", "b.jsonl"):
        Programs.read(write(tmp_path / name))
    assert capsys.readouterr().err.count("run without limits of network, memory, which this system does not give") == 1
