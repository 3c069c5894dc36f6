"""Programs: what counts as a right function, and what is tried instead; the problems; what the tiny base reads of them."""

import random
import re
import time

import pytest

from countdown import SPLITS, split_of
from machinery.tasks import find_tasks
from tasks.code import Problem, candidates, draw, gold, question, score, value, watch, write_thinking

LINE = Problem("2*x+1", ((1, 3), (2, 5), (4, 9), (3, 7), (0, 1), (8, 17)))           # the last three are hidden
EXCEPTION = Problem("5 if x==2 else 9", ((1, 9), (2, 5), (7, 9), (3, 9), (0, 9), (8, 9)))
ONLY = "is none of integers, x, + - * and a if x==k else b"


def verdict(problem: Problem, function: str) -> str:
    parts, reason = score(problem, f"<think>\nso\n</think>\n<answer>def f(x): return {function}</answer>")
    assert parts["accuracy"] == (reason == "correct") and parts["format"] == 1.0 and parts["visible"] >= parts["accuracy"]
    return reason


def problems(split: str, n: int = 300) -> list[Problem]:
    rng = random.Random(0)
    return [draw(rng, "one line", split) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------- score
@pytest.mark.parametrize("function, reason", (
    ("2*x+1", "correct"), ("1+x*2", "correct"), ("x+x+1", "correct"), ("(x+1)*2-1", "correct"), ("2 * x + 1", "correct"),
    ("x-(0-x)+1", "correct"), ("-x+3*x+1", "correct"), ("x--x+1", "correct"),                                       # any way of writing it, with what is allowed
    ("3 if x==1 else 2*x+1", "correct"),                            # needless and right
    ("2*x", "f(1) is 2, not 3"), ("0-x", "f(1) is -1, not 3"), ("5", "f(1) is 5, not 3"),
    ("3 if x==1 else 5 if x==2 else 9", "f(3) is 9, not 7"),        # repeats what it was shown: the hidden ones decide
    ("3 if x==1 else (5 if x==2 else (9 if x==4 else 0))", "f(3) is 0, not 7"),
    ("x*x-x+3 if x==1 else x*x-3*x+7 if x==2 else 9", "f(3) is 9, not 7"),
    ("2*x+1 if x==x else __import__('os')", ONLY),                  # what is never chosen has to be a function, too
    ("2*x+1 if x==x else y", ONLY), ("2*x+1 if x==x else 2**x", ONLY),
))
def test_a_function_is_right_on_the_hidden_examples_too(function, reason):
    assert reason in verdict(LINE, function)


@pytest.mark.parametrize("function", (
    "__import__('os').system('true')", "open('f')", "print(3)", "f(x)", "int(x)", "x.real*2+1", "(lambda x: 2*x+1)(x)",
    "y", "y if x==1 else 2*x+1", "[3,5,9,7][x]", "{1:3}[x]", "(3,5)[x]", "(x, 3)", "lambda: 3", "(y:=2)*x+1", "'3'",
    "f'{x}'", "[x for x in x]", "sum(i for i in x)", "2**x", "9**9**9**9", "6*x//3+1", "x/1*2+1", "x%9*2+1", "x<<1|1",
    "+x", "~x", "not x", "2.0*x+1", "1e9", "2j", "None", "...", "True", "2*x+True", "x==1", "3 if x else 5",
    "3 if True else 5", "3 if x==True else 2*x+1", "3 if x!=1 else 2*x+1", "3 if x<2 else 5", "3 if x is 1 else 5",
    "3 if x in (1, 2) else 5", "3 if 1==x==1 else 2*x+1", "3 if x==1 or x==2 else 5", "x==1 and 3", "(yield)", "await x",
))
def test_only_integers_x_three_operations_and_equality_are_computed(function):
    assert ONLY in verdict(LINE, function)


@pytest.mark.parametrize("function, reason", (
    ("2*", "cannot be parsed"), ("2x+1", "cannot be parsed"), ("2*x+1)", "cannot be parsed"), ("007", "cannot be parsed"),
    ("2*x+1; import os", "cannot be parsed"), ("2*x+1\nimport os", "cannot be parsed"), ("x = 3", "cannot be parsed"),
    ("2*x+1\n\ndef f(x): return 3", "cannot be parsed"), ("return 2*x+1", "cannot be parsed"),
    ("2*x+1\0", "cannot be parsed"), ("*x", "cannot be parsed"), ("x:=1", "cannot be parsed"),
    ("２*x+1", "ASCII"), ("2*х+1", "ASCII"), ("2*x+١", "ASCII"), ("2·x+1", "ASCII"),  # other digits, a Cyrillic x
    ("x+" * 100 + "1", "at most 200"), (" " * 200 + "2*x+1", "at most 200"),
))
def test_more_than_an_expression_in_ascii_is_refused(function, reason):
    assert reason in verdict(LINE, function)


@pytest.mark.parametrize("text, reason", (
    ("<answer>def f(x): return 2*x+1</answer>", "correct"),
    ("<answer> def f(x): return 2*x+1\n</answer>\n", "correct"),                    # white space around it
    ("def f(x): return 2*x+1", "no single final answer"),
    ("<answer>2*x+1</answer>", "expected def f(x): return"),
    ("<answer>f(x)=2*x+1</answer>", "expected def f(x): return"),
    ("<answer>so def f(x): return 2*x+1</answer>", "expected def f(x): return"),       # text before def
    ("<answer>import os\ndef f(x): return 2*x+1</answer>", "expected def f(x): return"),
    ("<answer>def g(x): return 2*x+1</answer>", "expected def f(x): return"),
    ("<answer>def f(y): return 2*y+1</answer>", "expected def f(x): return"),
    ("<answer>def f(x):\n return 2*x+1</answer>", "expected def f(x): return"),
    ("<answer>def f(x): return 3</answer><answer>def f(x): return 2*x+1</answer>", "no single final answer"),
    ("<answer>def f(x): return 2*x+1</answer> or 3", "no single final answer"),
    ("<think>\n<answer>def f(x): return 2*x+1</answer>", "no single final answer"),
    ("<answer>def f(x): return </answer>", "expected def f(x): return"),
    ("<answer></answer>", "expected def f(x): return"), ("", "no single final answer"), ("<answer>", "no single final answer"),
))
def test_the_answer_is_one_line_that_defines_f(text, reason):
    parts, said = score(LINE, text)
    assert reason in said and parts["accuracy"] == (reason == "correct")


@pytest.mark.parametrize("function, reason", (
    ("5 if x==2 else 9", "correct"), ("5 if 2==x else 9", "correct"), ("9-4 if x==2 else 9", "correct"),
    ("9 if x==1 else 5 if x==2 else 9", "correct"), ("9", "f(2) is 9, not 5"), ("9 if x==1 else 5", "f(7) is 5, not 9"),
    ("9 if x==1 else 9 if x==7 else 5", "f(3) is 5, not 9"), ("5 if x==3 else 9", "f(2) is 9, not 5"),
))
def test_an_exception_is_a_function_too(function, reason):
    assert verdict(EXCEPTION, function) == reason


@pytest.mark.parametrize("function", (
    "9*" * 80 + "9", "x*" * 80 + "x", "(" * 80 + "x" + ")" * 80, "9" * 180, "x+" * 80 + "x", "x if x==1 else " * 11 + "x",
    "-" * 170 + "x", "~" * 170 + "x", "not " * 40 + "x", "x" + ".a" * 80, "x" + "()" * 80, "x" + "[x" * 50 + "]" * 50,
    "[" * 80 + "]" * 80, "lambda:" * 24 + "x", "x" + "==x" * 50, "x**" * 50 + "x", "(" * 170, "{" * 170, "'" * 151,
    "\\\n" * 80))
def test_the_worst_of_200_characters_are_refused_or_computed_at_once(function):
    """A product of what 200 characters hold has at most 200 digits, and its parentheses are as deep as half of that."""
    started = time.perf_counter()
    assert verdict(LINE, function) != "correct" and len(verdict(LINE, function)) < 120
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("function", ("9999*9999*9999", "1000000001", "2*x+1 if x==x else 9*x*100000*100000"))
def test_no_value_is_beyond_a_billion(function):
    assert "beyond 1,000,000,000" in verdict(LINE, function)


@pytest.mark.parametrize("function, visible, hidden, error", (
    ("2*x+1", 1, 1, ""), ("3 if x==1 else 5 if x==2 else 9", 1, 0, "error_wrong"), ("7", 0, 1 / 3, "error_wrong"),
    ("y", 0, 0, "error_no_function")))
def test_what_is_visible_can_be_paid_and_what_is_hidden_is_watched(function, visible, hidden, error):
    """A memory of the shown examples passes them, and none of the others."""
    text = f"<think>\n2:f(1)=2 no\n2*x+1:f(2)=4+1=5 yes\n</think>\n<answer>def f(x): return {function}</answer>"
    seen = watch(LINE, text)
    assert score(LINE, text)[0]["visible"] == visible and seen["hidden_share"] == hidden and seen["attempts"] == 2
    assert [name for name, value in seen.items() if name.startswith("error") and value] == [error] * bool(error)
    assert watch(LINE, "<answer>")["error_no_answer"] == 1.0


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, of 9if
def test_no_text_raises():
    """Pieces of code in any order, well formed or not."""
    rng, pieces = random.Random(0), [*"x19+-*/()[]=:.,'#\n\t\\\0é", " if ", " else ", "==", "lambda ", "not ",
                                     "def f(x): return ", "<answer>", "</answer>"]
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 25)))
        for wrapped in (text, f"<answer>{text}</answer>", f"<answer>def f(x): return {text}</answer>"):
            parts, said = score(LINE, wrapped)
            assert parts["accuracy"] == (said == "correct")


# ------------------------------------------------------------------------------------------------------------- problems
@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_right_about_themselves(split):
    """Six different arguments from 0 to 9, values from 0 to 100; and what is called gold is correct and well formed."""
    shapes = set()
    for problem in problems(split):
        arguments = [x for x, _ in problem.examples]
        assert split_of(problem.function) == split and len(set(arguments)) == 6 and set(arguments) <= set(range(10))
        assert all(y == eval(problem.function, {"x": x}) == value(problem.function, x) for x, y in problem.examples)
        assert all(0 <= y <= 100 for _, y in problem.examples)
        assert score(problem, gold(problem)) == ({"accuracy": 1.0, "format": 1.0, "visible": 1.0}, "correct")
        shapes.add(re.sub(r"\d+", "n", problem.function))
    assert {"n", "x+n", "n*x+n", "n*x-n", "x*x+n", "n-x", "n if x==n else n"} <= shapes


def test_splits_share_no_function_and_no_question():
    """A function is on one side with all its examples."""
    for name in (lambda problem: problem.function, lambda problem: question(problem, "tiny")):
        sides = [set(map(name, problems(split, 600))) for split in SPLITS]
        assert len(set().union(*sides)) == sum(map(len, sides))


def test_an_evaluation_has_as_many_exceptions_as_its_draws():
    """One in fifteen, and not all that there are: a split has thousands of exceptions and 55 other functions, which may
    come again with other examples."""
    drawn, different = problems("test", 1000), find_tasks("code")[0].problems(300, "test", 0)
    shares = [sum("if" in problem.function for problem in found) / len(found) for found in (drawn, different)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_every_exception_is_shown():
    """Or nobody could know it. Constants and the rest of an exception look alike otherwise."""
    exceptions = [problem for problem in problems("train", 1000) if "if" in problem.function]
    assert len(exceptions) > 50
    for problem in exceptions:
        assert int(re.search("==(.)", problem.function)[1]) in [x for x, _ in problem.examples[:3]]


def test_a_question_shows_three_examples_and_hides_three():
    assert question(LINE, "tiny") == "f(1)=3 f(2)=5 f(4)=9\n"
    chat = question(LINE, "chat")
    assert chat.startswith("f(1)=3 f(2)=5 f(4)=9. Write f as one line of Python") and not re.search(r"2\*x|f\(3\)", chat)
    assert gold(LINE) == ("<think>\n2*x+1:f(1)=2+1=3 yes f(2)=4+1=5 yes f(4)=8+1=9 yes\n</think>\n"
                          "<answer>def f(x): return 2*x+1</answer>")


# ---------------------------------------------------------------------------------------------------------- the corpus
def functions(x: int, y: int) -> list[str]:
    return [function for _, function in candidates(x, y)]


def check_equations(text: str) -> None:
    """2*7=14,45-14=31 and f(7)=14+31=45: all that stands between two equals signs has the same value."""
    for equation in text.split(","):
        assert len({eval(side) for side in equation.split("=")}) == 1, text


def test_candidates_are_all_right_about_the_first_example():
    assert functions(2, 5) == ["5", "x+3", "7-x", "2*x+1", "3*x-1", "4*x-3", "5*x-5", "6*x-7", "7*x-9", "8*x-11", "9*x-13",
                               "x*x+1"]
    for x in range(10):
        for y in range(0, 101, 7):
            assert {value(function, x) for function in functions(x, y)} == {y} and len(set(functions(x, y))) == 12


def test_a_candidate_says_how_its_constant_is_found():
    """From the first example alone: f(7)=45 with 2*x wants 45-14."""
    assert candidates(7, 45)[:4] == [("", "45"), ("45-7=38,", "x+38"), ("45+7=52,", "52-x"), ("2*7=14,45-14=31,", "2*x+31")]
    for x in range(10):
        for how, function in candidates(x, 13)[1:]:
            check_equations(how.rstrip(","))
            constant = how.rstrip(",").rpartition("=")[2]
            assert constant in ("0", *function.replace("+", " ").replace("-", " -").replace(" -x", "").split())


def test_exactly_one_candidate_fits_three_examples_of_anything_but_an_exception():
    """So what fits what is shown is right about what is hidden."""
    for problem in problems("train"):
        fitting = [function for function in functions(*problem.examples[0])
                   if all(value(function, x) == y for x, y in problem.examples[:3])]
        assert fitting == ([] if "if" in problem.function else [problem.function])


def thoughts(n: int = 300, **settings) -> list[tuple[Problem, list[str], str]]:
    settings = dict(patient=True, luck=0.0, give_up=0.0) | settings
    rng = random.Random(1)
    return [(problem, *write_thinking(problem, rng=rng, **settings)) for problem in problems("train", n)]


def guess_of(line: str) -> str:
    return line.partition(":")[0].rpartition(",")[2]


@pytest.mark.parametrize("patient", [True, False])
def test_checks_are_right_and_end_at_the_first_that_fails(patient):
    """5*3=15,26-15=11,5*x+11:f(4)=20+11=31 yes f(5)=25+11=36 yes. A guess that is made from the first example need not be
    checked on it; the others are checked in order."""
    for problem, lines, last in thoughts(patient=patient, luck=0.2, give_up=0.2):
        shown = dict(problem.examples[:3])
        for line in lines:
            how, colon, checks = line.partition(f"{guess_of(line)}:")
            assert colon and (not how or (how, guess_of(line)) in candidates(*problem.examples[0]))
            found = re.findall(r"f\((\d)\)=(\S+) (yes|no)(?: |$)", checks)
            assert checks == " ".join(f"f({x})={got} {said}" for x, got, said in found)
            for x, got, said in found:
                check_equations(f"{value(guess_of(line), int(x))}={got}")
                assert (said == "yes") == (eval(got.rpartition("=")[2]) == shown[int(x)])
            order, arguments = list(shown), [int(x) for x, *_ in found]
            assert arguments in (order[:len(found)], order[1:1 + len(found)])
            assert [said for *_, said in found[:-1]] == ["yes"] * (len(found) - 1)
            assert arguments[-1] == order[-1] or found[-1][-1] == "no"
        assert guess_of(lines[-1]) == last and all(line.endswith(" no") for line in lines[:-1])
        assert len(set(map(guess_of, lines))) == len(lines)


@pytest.mark.parametrize("patient", [True, False])
def test_who_never_gives_up_ends_at_a_function_that_is_right(patient):
    """Patient writers try in order, hasty ones in any; none is tried again."""
    in_order = 0
    for problem, lines, last in thoughts(patient=patient):
        assert last == problem.function and " no" not in lines[-1]
        failed, order = [guess_of(line) for line in lines[:-1]], functions(*problem.examples[0])
        in_order += failed == order[:len(failed)]
    assert in_order == 300 if patient else in_order < 100


def test_who_gives_up_at_once_has_one_guess_and_luck_is_the_function_itself():
    assert {len(lines) for _, lines, _ in thoughts(give_up=1.0)} == {1}
    assert all(last == problem.function and len(lines) == 1 for problem, lines, last in thoughts(luck=1.0))
    right = sum(last == problem.function for problem, _, last in thoughts(give_up=1.0, patient=False))
    assert 0 < right < 60  # of 300: one candidate in twelve, and no exception
