"""Programs, and tests that decide: DeepSeek-R1's second reward for accuracy (arXiv 2501.12948, section 2.2.2). Two worlds.

For tiny models a function of one integer from examples of it: `f(1)=3 f(2)=5 f(4)=9` wants def f(x): return 2*x+1.

    python evaluate.py --task code --show 3
    python train_countdown.py --task code --out runs/code
    python train_countdown.py --task code --weights accuracy=0,visible=1 --out runs/visible  # paid by what it can see

The examples shown are visible tests, the others of the six are hidden. Right is what passes them all: an answer that only
repeats what it was shown (3 if x==1 else 5) fails on the hidden ones; --level "two shown" invites it. What the tiny base read of it (write_thinking) tries
one function after the other and checks each on the examples. An answer is parsed into a syntax tree, of which only + - *
and `a if x==k else b` are computed; it is never run. Functions are split by a hash of their text.

For real checkpoints a JSONL file of your own, tests in every line (Programs, below; docs/code.md):

    python evaluate.py --task my_programs.jsonl --model Qwen/Qwen2.5-Coder-1.5B-Instruct --style chat

There an answer is run, by machinery/runner.py. No torch in here.
"""

import ast
import json
import random
import re
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from countdown import check_split, split_of
from rewards import END_THINK, MAX_LENGTH, TAGS, THINK, extract_answer, format_reward
from tasks import ask
from tasks.questions import by_split, same_words

LEVELS = {"one line": 3, "two shown": 2}  # examples in the prompt; the corpus has three
WEIGHTS = {"accuracy": 1.0, "format": 0.2, "visible": 0.0, "language": 0.0}
EXAMPLES = 6
MAX_VALUE = 10 ** 9  # of anything that is computed
OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}


class Problem(NamedTuple):
    function: str                              # of x, as 2*x+1
    examples: tuple[tuple[int, int], ...]      # (x, value)
    shown: int = 3                             # of these the first are in the prompt, the others are hidden


# --------------------------------------------------------------------------------------------------- functions, values
def compute(tree, x: int) -> int:
    """The value of a syntax tree of integers, x, + - * and `a if x==k else b`. Raises ValueError for anything else, and for
    a value beyond MAX_VALUE. The tree is as deep as its text is long, at most (MAX_LENGTH)."""
    value = bare_value(tree, x)
    if abs(value) > MAX_VALUE:
        raise ValueError(f"a value beyond {MAX_VALUE:,}")
    return value


def bare_value(tree, x: int) -> int:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name) and tree.id == "x":
        return x
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATORS:
        return OPERATORS[type(tree.op)](compute(tree.left, x), compute(tree.right, x))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -compute(tree.operand, x)
    if isinstance(tree, ast.IfExp) and isinstance(tree.test, ast.Compare) and len(tree.test.ops) == 1 and isinstance(
            tree.test.ops[0], ast.Eq):
        same = compute(tree.test.left, x) == compute(tree.test.comparators[0], x)
        chosen, other = compute(tree.body, x), compute(tree.orelse, x)  # what is not chosen has to be a function, too
        return chosen if same else other
    raise ValueError(f"{ast.unparse(tree)[:40]} is none of integers, x, + - * and a if x==k else b")


SILENCE = threading.Lock()


def parse_function(text: str):
    """`def f(x): return ...` -> the syntax tree behind return. Raises ValueError with the reason."""
    if len(text) > MAX_LENGTH or not text.isascii():
        raise ValueError(f"expected at most {MAX_LENGTH} characters of ASCII")
    head, found, body = text.partition("def f(x): return ")
    if head or not found:
        raise ValueError("expected def f(x): return and an expression")
    try:
        with SILENCE, warnings.catch_warnings():  # it changes what all threads see
            warnings.simplefilter("ignore")  # of `9if x==1 else 3`, on the screen of whoever trains
            return ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"cannot be parsed: {body[:40]}") from None


def value(function: str, x: int) -> int:
    return compute(ast.parse(function, mode="eval").body, x)


def with_constant(slope: str, b: int) -> str:
    """2*x and 1 -> 2*x+1."""
    return slope + (f"{b:+d}" if b else "")


def draw_function(rng: random.Random) -> str:
    shape = rng.randrange(6)
    if shape == 0:
        return str(rng.randint(0, 20))
    if shape == 1:
        return with_constant("x", rng.randint(-9, 20))
    if shape == 2:
        return with_constant(f"{rng.randint(2, 9)}*x", rng.randint(-9, 20))
    if shape == 3:
        return with_constant("x*x", rng.randint(-9, 20))
    if shape == 4:
        return f"{rng.randint(9, 30)}-x"
    a, b = rng.sample(range(21), 2)
    return f"{a} if x=={rng.randint(0, 9)} else {b}"


def candidates(x: int, y: int) -> list[tuple[str, str]]:
    """(how its constant is found, function) of those that are right about the first example, in the order in which a
    patient writer tries them."""
    found = [("", str(y)), (f"{y}-{x}={y - x},", with_constant("x", y - x)), (f"{y}+{x}={y + x},", f"{y + x}-x")]
    for slope in (*(f"{a}*x" for a in range(2, 10)), "x*x"):
        product = value(slope, x)
        found.append((f"{slope.replace('x', str(x))}={product},{y}-{product}={y - product},",
                      with_constant(slope, y - product)))
    return found


def worked(function: str, x: int) -> str:
    """f(7)=14+31=45: a product and a constant are two steps."""
    parts = re.fullmatch(r"(.+\*x)([+-].+)", function)
    return f"f({x})={f'{value(parts[1], x)}{parts[2]}=' if parts else ''}{value(function, x)}"


# ------------------------------------------------------------------------------------------- the seam: code as a task
def draw(rng: random.Random, level: str, split: str) -> Problem:
    """Arguments are 0 to 9 and values 0 to 100. Of a function with an exception, the exception is shown."""
    check_split(split)
    while True:
        function = draw_function(rng)
        if split_of(function) != split:
            continue
        arguments = [x for x in range(10) if 0 <= value(function, x) <= 100]
        if len(arguments) < EXAMPLES:
            continue
        arguments = rng.sample(arguments, EXAMPLES)
        problem = Problem(function, tuple((x, value(function, x)) for x in arguments), LEVELS[level])
        if "if" not in function or len({y for _, y in problem.examples[:problem.shown]}) > 1:
            return problem


def key(problem: Problem) -> str:
    """The split is by the function alone; it may be asked for with several examples."""
    return f"{problem.function} {question(problem, 'tiny').strip()}"


def show(x: int, y: int) -> str:
    return f"f({x})={y}"


def question(problem: Problem, style: str) -> str:
    shown = " ".join(show(x, y) for x, y in problem.examples[:problem.shown])
    return f"{shown}\n" if style == "tiny" else ask(
        f"{shown}. Write f as one line of Python, as def f(x): return ...", style, "that line")


def judge(problem: Problem, text: str) -> tuple[list[bool], str, str]:
    """-> (which examples it passes, "correct" or why not, the kind of error)"""
    answer = extract_answer(text)
    if answer is None:
        return [False] * len(problem.examples), "no single final answer", "no_answer"
    try:
        tree = parse_function(answer)
        values = [compute(tree, x) for x, _ in problem.examples]
    except (ValueError, RecursionError) as error:
        return [False] * len(problem.examples), str(error), "no_function"
    for got, (x, y) in zip(values, problem.examples):
        if got != y:
            return [got == y for got, (_, y) in zip(values, problem.examples)], f"f({x}) is {got}, not {y}", "wrong"
    return [True] * len(problem.examples), "correct", ""


def score(problem: Problem, text: str) -> tuple[dict[str, float], str]:
    passed, verdict, _ = judge(problem, text)
    return {"accuracy": float(all(passed)), "format": format_reward(text), "visible": float(all(passed[:problem.shown]))}, verdict


def watch(problem: Problem, text: str) -> dict[str, float]:
    """The functions that the thinking tries, the share of the hidden examples that the answer passes, and its error."""
    passed, _, error = judge(problem, text)
    return {"attempts": sum(":f(" in line for line in text.partition(END_THINK)[0].splitlines()),
            "hidden_share": sum(passed[problem.shown:]) / (EXAMPLES - problem.shown),
            **{f"error_{kind}": float(kind == error) for kind in ("no_answer", "no_function", "wrong")}}


def gold(problem: Problem) -> str:
    checks = " ".join(f"{worked(problem.function, x)} yes" for x, _ in problem.examples[:problem.shown])
    return f"<think>\n{problem.function}:{checks}\n</think>\n<answer>def f(x): return {problem.function}</answer>"


# ---------------------------------------------------------------------------------------------------------- the corpus
def write_thinking(problem: Problem, patient: bool, luck: float, give_up: float, rng: random.Random
                   ) -> tuple[list[str], str]:
    """-> (one line a guess, the last one). A guess is checked on the shown examples until one is wrong; on the first only
    where it is not made from it."""
    shown = problem.examples[:problem.shown]
    untried = candidates(*shown[0])
    rng.shuffle(shuffled := untried.copy())  # drawn by the patient, too: luck must come to the same problems
    untried = untried if patient else shuffled
    if rng.random() < luck:  # intuition
        untried = [(None, problem.function)]
    elif "if" in problem.function:  # nothing simpler fits, which is how one knows
        untried = untried[:rng.randint(1, 4)] + [(None, problem.function)]
    lines = []
    for how, guess in untried:
        checks = []
        for x, wanted in shown if how is None else shown[1:]:
            right = value(guess, x) == wanted
            checks.append(f"{worked(guess, x)} {'yes' if right else 'no'}")
            if not right:
                break
        lines.append(f"{how or ''}{guess}:{' '.join(checks)}")
        if right or rng.random() < give_up:
            break
    return lines, guess


# ------------------------------------------------------------------------------------------- programs of your own
EXPECTED = ('{"question": "...", "tests": [...]}, each test Python text that asserts something of "entry_point": "its name", '
            'or {"stdin": "...", "stdout": "..."}')
ERRORS = ("no_program", "syntax", "raised", "wrong", "timeout", "killed")


def extract_program(text: str) -> str | None:
    """The last Python block behind the thinking; None if there is none, or the thinking is not over."""
    if text.rfind(THINK) > text.rfind(END_THINK):
        return None
    blocks = re.findall(r"```(?:python|py)3?[ \t]*\n(.*?)```", text.rpartition(END_THINK)[2], re.DOTALL | re.IGNORECASE)
    return blocks[-1] if blocks else None


def program_format(text: str) -> float:
    """1.0 iff it is <think>...</think> and then one Python block, which ends it; words may stand between."""
    thinking, _, rest = text.removeprefix(THINK).partition(END_THINK)
    return float(text.startswith(THINK) and bool(thinking.strip()) and not any(tag in thinking + rest for tag in TAGS)
                 and rest.count("```") == 2 and rest.rstrip().endswith("```") and extract_program(text) is not None)


@lru_cache(maxsize=4096)  # a group's completions are often the same program
def verdicts(program: str | None, tests: str, entry_point: str, sandbox: str) -> list[str]:
    from machinery.runner import Limits, run_tests
    limits = Limits() if program else Limits(wall=1.0)  # a test alone takes no time
    return run_tests(program, json.loads(tests), entry_point, sandbox=sandbox, limits=limits)


def checked_row(row: dict) -> dict:
    """With all fields. Raises ValueError, whose words go on behind the line's number."""
    from machinery.data import check_characters
    from machinery.runner import Limits
    question, tests, visible = row.get("question"), row.get("tests"), row.get("visible_tests", [])
    name, solution = row.get("entry_point") or "", row.get("solution") or ""
    if not all(isinstance(text, str) for text in (question, name, solution)) or not question.strip():
        raise ValueError(f"is {str(row)[:80]}; expected {EXPECTED}")
    if not isinstance(tests, list) or not tests or not isinstance(visible, list):
        raise ValueError(f"has no list of tests; expected {EXPECTED}")
    for number, test in enumerate(visible + tests, 1):
        if isinstance(test, dict) and all(isinstance(test.get(end), str) for end in ("stdin", "stdout")):
            if not test["stdout"].strip() or max(map(len, test.values())) > Limits().written // 4:
                raise ValueError(f"has a test {number} that wants nothing printed, or reads or prints more than "
                                 f"{Limits().written // 4:,} characters")
            continue
        if not isinstance(test, str) or not name.isidentifier():
            raise ValueError(f"has a test {number} {str(test)[:60]!r} and the entry_point {name!r}; expected {EXPECTED}")
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"has a test {number} {test[:60]!r} that is no Python: {error}") from None
    check_characters(json.dumps(row, ensure_ascii=False))
    return {"question": question, "tests": tests, "visible_tests": visible, "entry_point": name, "solution": solution}


def try_tests(row: dict, sandbox: str) -> str:
    """What is wrong with them, or with the solution."""
    tests, name = row["visible_tests"] + row["tests"], row["entry_point"]
    for solution in (None, *filter(None, [row["solution"]])):
        for number, said in enumerate(verdicts(solution, json.dumps(tests), name, sandbox), 1):
            test = str(tests[number - 1])[-60:]
            if said == "unending":
                return f"has a test {number} ({test}) that never ends; expected one that does whatever the program returns"
            if solution is None and said == "passed":
                return f"has a test {number} ({test}) that passes without a program; expected one that calls {name}"
            if solution and said == "NameError" and not re.search(rf"\b{name}\b\s*[=(:]", solution):
                return f"has the entry_point {name!r}, which its solution never defines"
            if solution and said != "passed":
                return f"has a solution that fails test {number} ({test}): {said}; expected one that passes them all"
    return ""


@dataclass(frozen=True, eq=False)  # one file, one object: it can be a key
class Programs:
    """The task that a file makes: a question, the tests of its program, and maybe visible_tests, of the same form, which
    the question shows, and a solution, which has to pass them all."""
    path: Path
    rows: dict[str, list[dict]]  # of each split
    sandbox: str                 # command that programs run behind
    WEIGHTS = {"accuracy": 1.0, "format": 0.2, "visible": 0.0, "language": 0.0}
    LEVELS = {"all": None}

    @classmethod
    @lru_cache
    def read(cls, path: Path, sandbox: str = "") -> "Programs":
        """Raises ValueError with the file and the line where a row is wrong: tests are tried without a program, which none
        may pass, and with the solution where there is one."""
        from machinery.data import read_jsonl
        from machinery.notes import note
        from machinery.runner import lacking
        try:
            missing = lacking(sandbox)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        if missing:
            note(f"programs of {path} run without limits of {', '.join(missing)}, which this system does not give: see "
                 "docs/code.md", "runner")
        rows, seen = [], {}
        for number, row in enumerate(read_jsonl(path), 1):
            try:
                rows.append(checked_row(row))
                first = seen.setdefault(same_words(row["question"]), number)
                if first != number:
                    raise ValueError(f"with the question of line {first}; expected each question once")
            except ValueError as error:
                raise ValueError(f"got {path}, line {number} {error}") from None
        with ThreadPoolExecutor() as pool:
            for number, wrong in enumerate(pool.map(lambda row: try_tests(row, sandbox), rows), 1):
                if wrong:
                    raise ValueError(f"got {path}, line {number} {wrong}")
        return cls(path, by_split(path, rows), sandbox)

    def draw(self, rng: random.Random, level: str, split: str) -> dict:
        return rng.choice(self.rows[split])

    def key(self, problem: dict) -> str:
        return same_words(problem["question"])

    def question(self, problem: dict, style: str) -> str:
        named = f" Name the function {problem['entry_point']}." if problem["entry_point"] else ""
        return f"{problem['question']}\n" if style == "tiny" else (
            f"{problem['question']}{named} Reason inside <think> </think>, then, on a new line, give the whole program in one "
            "block that begins with ```python and ends with ```.")

    def score(self, problem: dict, text: str) -> tuple[dict[str, float], str]:
        """Parts as in the tiny world; visible is 0.0 in a row without visible tests. The verdict is the first test that
        fails."""
        program, shown, hidden = self.run(problem, text)
        failed = [f"{name} {i}: {said}" for name, found in (("visible test", shown), ("test", hidden))
                  for i, said in enumerate(found, 1) if said != "passed"]
        verdict = "no Python block behind the thinking" if program is None else failed[0] if failed else "correct"
        return {"accuracy": float(not failed), "format": program_format(text),
                "visible": float(bool(shown) and set(shown) == {"passed"})}, verdict

    def run(self, problem: dict, text: str) -> tuple[str | None, list[str], list[str]]:
        """-> (program, what runner.run_tests says of each visible test, and of each hidden one)"""
        program, tests, n = extract_program(text), problem["visible_tests"] + problem["tests"], len(problem["visible_tests"])
        found = ["no_program"] * len(tests) if program is None else verdicts(program, json.dumps(tests), problem["entry_point"],
                                                                             self.sandbox)
        return program, found[:n], found[n:]

    def watch(self, problem: dict, text: str) -> dict[str, float]:
        """The share of hidden tests passed, and of what kind (ERRORS) the first failure is."""
        _, shown, hidden = self.run(problem, text)
        error = next((said for said in shown + hidden if said != "passed"), "")
        if error not in ("", *ERRORS):
            error = "syntax" if error in ("SyntaxError", "IndentationError", "TabError") else "raised"
        return {"hidden_share": hidden.count("passed") / len(hidden), **{f"error_{kind}": float(kind == error) for kind in ERRORS}}

    def gold(self, problem: dict) -> str | None:
        return f"<think>\nI know this one.\n</think>\n```python\n{problem['solution'].strip()}\n```" if problem["solution"] else None

    def examples(self, rng: random.Random, level: str, style: str, n: int) -> list[tuple[str, str]]:
        solved = [problem for problem in self.rows["train"] if problem["solution"]]
        if n and not solved:
            raise ValueError(f"got {self.path} without a solution among its train rows, expected one for few-shot prompts")
        return [(self.question(problem, style), self.gold(problem)) for problem in rng.choices(solved, k=n)] if n else []

    def vote(self, problem: dict, texts: list[str]) -> str | None:
        programs = Counter(filter(None, map(extract_program, texts))).most_common(1)
        return f"```python\n{programs[0][0]}```" if programs else None
