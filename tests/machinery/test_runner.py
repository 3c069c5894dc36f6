"""Programs that nobody has read: which tests they pass, what they try instead, and what is left of them."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from machinery import runner
from machinery.runner import Limits, lacking, pack, run_tests, unpack

QUICK = Limits(cpu=1, wall=2.0)
MISSING = lacking()
confined = pytest.mark.skipif("network" in MISSING, reason=f"this system leaves programs their {', '.join(MISSING)}")


def verdict(program: str, test: str = "assert f() == 42", **settings) -> str:
    found, = run_tests(textwrap.dedent(program), [textwrap.dedent(test)], "f", limits=QUICK, **settings)
    return found


def left() -> set[str]:
    """The command lines of all processes with a runner or a program in them, and all folders of answers."""
    found = set(map(str, Path(tempfile.gettempdir()).glob("answer-*")))
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if " child" in line[-10:] or line.rstrip().endswith("runner.py supervise"):
            found.add(f"{folder.name} {line[-40:]}")
    return found


def nothing_is_left(before: set[str]) -> bool:
    """Soon: the system takes a moment to end what a namespace held."""
    end = time.time() + 5
    while left() - before and time.time() < end:
        time.sleep(0.05)
    return not left() - before


@pytest.fixture(autouse=True)
def leaves_nothing():
    before = left()
    yield
    assert nothing_is_left(before), left() - before


# ------------------------------------------------------------------------------------------------------ what passes
@pytest.mark.parametrize("program, test, said", (
    ("def f(): return 42", "assert f() == 42", "passed"),
    ("def f(): return 42", "assert candidate() == 42", "passed"),
    ("def f(): return 41", "assert f() == 42", "wrong"),
    ("f = lambda a, *, b: (a, {b: [1.5, None, True, b'x', {3}, '\\ud83d']})",
     "assert f((1, 2), b='k') == ((1, 2), {'k': [1.5, None, True, b'x', {3}, '\\ud83d']})", "passed"),
    ("from collections import Counter\ndef f(): return Counter('aab')", "assert f() == {'a': 2, 'b': 1}", "passed"),
    ("def f(): return float('nan'), float('inf')", "import math\na, b = f()\nassert math.isnan(a) and b > 1e308", "passed"),
    ("def f(): return 10 ** 3000", "assert f() == 10 ** 3000", "passed"),
    ("def f(n): return 1 if n < 2 else n * f(n - 1)", "assert [f(i) for i in range(5)] == [1, 1, 2, 6, 24]", "passed"),
    ("import math, re, itertools, collections, functools, heapq, string, random, datetime, decimal, fractions, json\n"
     "def f(): return math.comb(9, 3)", "assert f() == 84", "passed"),
    ("def f(): raise ValueError('no')", "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
     "else:\n    assert False", "passed"),
    ("def f(): raise KeyError", "f()", "KeyError"), ("def f(): return g()", "f()", "NameError"), ("", "f()", "NameError"),
    ("def f(:", "f()", "SyntaxError"), ("class E(Exception): pass\ndef f(): raise E", "f()", "Exception"),
    ("def f(): assert False", "f()", "AssertionError"), ("import sys\nsys.exit(0)", "f()", "SystemExit"),
    ("def f(): return print", "f()", "TypeError"), ("def f(x): return x", "f(print)", "wrong"),
    ("def f(): return None", "assert f() < 3", "wrong"), (None, "f()", "wrong"), (None, "assert True", "passed"),
))
def test_a_test_says_whether_the_program_is_right(program, test, said):
    assert run_tests(program, [test], "f") == [said]


@pytest.mark.parametrize("program, stdin, stdout, said", (
    ("print(sum(map(int, input().split())))", "1 2 3\n", "6\n", "passed"),
    ("import sys\nfor line in sys.stdin: print(line.strip()[::-1], '')", "ab\ncd\n", "ba\ndc", "passed"),
    ("print(open(0).read().upper(), end='')", "größe", "GRÖSSE", "passed"),
    ("import os\nos.write(1, os.read(0, 99))", "x\n", "x\n", "passed"), ("print(1)\nexit(0)", "", "1", "passed"),
    ("print(1)\nexit(3)", "", "1", "SystemExit"), ("print(2)", "", "1", "wrong"), ("print(input())", "", "1", "EOFError"),
    ("if __name__ == '__main__': print(1)", "", "1", "passed"), ("print(1)\nimport os\nos._exit(0)", "", "1", "killed"),
    ("while True: print('x' * 1000)", "", "x", "OSError"),
))
def test_a_script_is_compared_by_what_it_prints(program, stdin, stdout, said):
    assert run_tests(program, [{"stdin": stdin, "stdout": stdout}], limits=QUICK) == [said]


def test_each_test_has_a_process_and_a_folder_of_its_own():
    """What one leaves, memory and files, the next does not meet."""
    program = "import os\nn = 0\ndef f():\n    global n\n    n += 1\n    open(str(n), 'w').close()\n    return n, os.listdir('.')"
    assert run_tests(program, ["assert f() == (1, ['1'])"] * 3, "f") == ["passed"] * 3
    assert run_tests("def f(x):\n    while x: pass\n    return x", ["assert f(0) == 0", "f(1)", "assert f(0) == 0"], "f",
                     limits=QUICK) == ["passed", "timeout", "passed"]


def test_what_is_packed_comes_back_as_it_was_and_as_plain():
    class Everything(int):
        def __eq__(self, other):
            return True
        __hash__ = int.__hash__

    value = (1, [2.5, "x", None, True], {"a": {3}, 4: frozenset((5,))}, b"\0", -10 ** 50)
    assert unpack(pack(value)) == value and type(unpack(pack(Everything(3)))) is int
    for wrong in (["print", [1]], ["list"], ["dict", [1]], ["set", [["list", []]]], {}, ["bytes", "x"]):
        with pytest.raises(ValueError):
            unpack(wrong)
    with pytest.raises(TypeError):
        pack(print)


# -------------------------------------------------------------------------------------------------------- escapes
ESCAPES = {  # program; "assert f() == 42" does not pass, and nothing is left of it
    "equals everything": "class E:\n    def __eq__(self, other): return True\ndef f(): return E()",
    "an int that equals everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(): return E(1)",
    "a class of the verdict's name": "class passed(Exception): pass\ndef f(): raise passed('passed')",
    "patched builtins": """
        import builtins, json
        builtins.AssertionError = builtins.Exception = builtins.ValueError = type('A', (BaseException,), {})
        builtins.compile = builtins.exec = builtins.isinstance = lambda *a, **k: True
        def f(): return 41""",
    "an end that looks well": "import os\nos._exit(0)",
    "an end in the middle": "import os\ndef f(): os._exit(0)",
    "printing a verdict": """
        import os, sys
        for _ in range(20): print('"passed"', file=sys.__stdout__, flush=True)
        for d in range(3, 30):
            try: os.write(d, b'"passed"\\n' * 20)
            except OSError: pass
        def f(): return 41""",
    "a verdict at the end": "import atexit\natexit.register(print, '\"passed\"')\ndef f(): return 41",
    "output without end": "def f():\n    while True: print('passed' * 1000)",
    "an answer without end": "def f(): return 'x' * 10 ** 8",
    "a line without end": """
        import os
        def f():
            for d in range(3, 30):
                try:
                    while True: os.write(d, b'x' * 65536)
                except OSError: pass""",
    "an endless loop": "while True: pass",
    "a loop that hears no signal": """
        import signal
        for s in range(1, 65):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True:
            try:
                while True: pass
            except BaseException: pass""",
    "sleep": "import time\ndef f(): time.sleep(60)",
    "memory": "def f(): return len([bytearray(2 ** 20) for _ in range(10 ** 5)])",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()",
    "a deep answer": "def f():\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "a crash": "import ctypes\ndef f(): ctypes.string_at(0)",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading\ndef f():\n    while True: threading.Thread(target=f, daemon=True).start()",
    "a grandchild that stays": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(60)
            os._exit(0)
        def f(): return 41""",
    "a session of its own": "import os, time\nos.setsid()\nos.fork()\ntime.sleep(60)",
    "a file too large": "def f(): open('x', 'wb').write(bytes(10 ** 8))",
    "files left in its folder": """
        import os
        for i in range(50): open(str(i), 'w').close()
        os.makedirs('a/b/c'); os.symlink('/', 'a/b/root'); os.chmod('a/b', 0); os.chmod('a', 0)
        def f(): return 41""",
    "the tests, through frames": """
        import gc, sys
        def f():
            frame, found = sys._getframe(), []
            while frame: found += [*frame.f_locals.values(), *frame.f_globals.values()]; frame = frame.f_back
            found += gc.get_objects()
            wanted = 'f() ' + '== 4'
            return 42 if any(isinstance(x, str) and wanted in x for x in found) else 41""",
}
CONFINED = {  # what only a namespace prevents
    "signals": """
        import os, signal
        def f():
            for pid in (os.getppid(), os.getpgid(0), 1, *range(2, 400)):
                if pid != os.getpid():
                    try: os.kill(pid, signal.SIGKILL)
                    except OSError: pass
            return 41""",
    "a signal to everybody": "import os, signal\ndef f():\n    os.kill(-1, signal.SIGKILL)\n    return 41",
    "the environment": """
        import glob, os
        def f():
            for path in ['/proc/self/environ', *glob.glob('/proc/*/environ')]:
                try:
                    if b'A_SECRET_OF_MINE' in open(path, 'rb').read(): return 42
                except OSError: pass
            return 42 if 'A_SECRET_OF_MINE' in os.environ else 41""",
    "the tests, through /proc": """
        import glob
        wanted = b'f() ' + b'== 4'
        def f():
            for path in glob.glob('/proc/[0-9]*/maps'):
                try:
                    with open(path) as maps, open(path[:-4] + 'mem', 'rb') as memory:
                        for line in maps:
                            a, b = (int(x, 16) for x in line.split()[0].split('-'))
                            if 'rw' in line and b - a < 2 ** 26:
                                memory.seek(a)
                                if wanted in memory.read(b - a): return 42
                except (OSError, ValueError, OverflowError): pass
            return 41""",
    "another process": """
        import ctypes, os
        def f(): return 42 if not ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) else 41""",
    "rights of a namespace inside": """
        import ctypes
        def f(): return 42 if not ctypes.CDLL(None).unshare(0x10000000 | 0x20000) else 41""",
    "out of its root": """
        import os
        def f():
            try:
                os.mkdir('x'); os.chroot('x')
            except OSError: return 41
            for _ in range(20): os.chdir('..')
            os.chroot('.')
            return 42""",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape_is_paid(name):
    assert verdict(ESCAPES[name]) != "passed"


@confined
@pytest.mark.parametrize("name", CONFINED)
def test_no_escape_gets_to_the_outside(name, monkeypatch):
    monkeypatch.setenv("A_SECRET_OF_MINE", "1")
    assert verdict(CONFINED[name]) != "passed"  # and nobody killed us


@confined
def test_no_file_is_read_or_written_and_no_network_is_there(tmp_path):
    """And all the while a file of ours is there, and somebody listens."""
    (tmp_path / "secret").write_text("42")
    tmp_path.chmod(0o777)
    assert verdict(f"def f(): return int(open({str(tmp_path / 'secret')!r}).read())") == "FileNotFoundError"
    for folder in (tmp_path, Path.home(), tempfile.gettempdir(), Path(runner.__file__).parent, "/usr", "/var/tmp", "/dev/shm"):
        path = Path(folder) / "written-by-an-answer"
        assert verdict(f"open({str(path)!r}, 'w').write('x')\ndef f(): return 42") in (
            "FileNotFoundError", "OSError", "PermissionError", "NotADirectoryError") and not path.exists()
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\ndef f():\n    socket.create_connection({server.getsockname()}, 1)\n    return 42"
        assert verdict(connect) == "OSError"
        namespace = {}
        exec(connect, namespace)
        assert namespace["f"]() == 42  # from here it works


@pytest.mark.skipif(not shutil.which("setpriv") or os.name == "nt" or os.geteuid() != 0, reason="needs root, to take rights away")
@pytest.mark.parametrize("name", sorted({*ESCAPES} - {"a fork bomb", "a grandchild that stays", "a session of its own", "threads"}))
def test_no_escape_is_paid_where_there_are_no_namespaces(name):
    """As in a container. More processes are then no more root's to lose than its own are."""
    bare = "setpriv --bounding-set=-all --inh-caps=-all"
    assert "network" in lacking(bare) and verdict(ESCAPES[name], sandbox=bare) != "passed"


# ------------------------------------------------------------------------------------------------ ends, and bad input
SLOW = "from machinery.runner import *\nprint(run_tests('import time\\ntime.sleep(60)', ['f()'], 'f', limits=Limits(wall=60.0)))"


def until_it_runs(before: set[str]) -> None:
    """The supervisor, and whatever there is of its child."""
    end = time.time() + 20
    while not all(any(line.endswith(name) for line in left() - before) for name in ("supervise ", " child ")):
        assert time.time() < end
        time.sleep(random.random() / 10)


@pytest.mark.parametrize("told", ("SIGKILL", "SIGINT", "SIGTERM"))
def test_an_end_of_the_trainer_is_the_end_of_all(told):
    before = left()
    trainer = subprocess.Popen([sys.executable, "-c", SLOW], cwd=Path(runner.__file__).parents[1], stderr=subprocess.DEVNULL)
    until_it_runs(before)
    trainer.send_signal(getattr(signal, told))
    trainer.wait(10)
    assert nothing_is_left(before)


@pytest.mark.parametrize("victim", ("supervise", "child"))
def test_a_killed_runner_is_no_verdict(victim):
    before = left()
    trainer = subprocess.Popen([sys.executable, "-c", SLOW], cwd=Path(runner.__file__).parents[1], stdout=subprocess.PIPE)
    until_it_runs(before)
    for line in left() - before:
        if f" {victim}" in line:
            with contextlib.suppress(ProcessLookupError):  # one ends with the other
                os.kill(int(line.split()[0]), signal.SIGKILL)
    assert trainer.communicate(timeout=20)[0] in (b"['killed']\n", b"['timeout']\n") and nothing_is_left(before)


def test_a_test_that_never_ends_is_ended():
    assert run_tests("def f(): return 1", ["assert f() == 1", "while True: pass"], "f", limits=Limits(wall=1.0)) == [
        "passed", "unending"]


def test_a_sandbox_is_a_command():
    assert run_tests("def f(): return 42", ["assert f() == 42"], "f", sandbox="env A=1") == ["passed"]
    with pytest.raises(FileNotFoundError, match="no command nowhere"):
        lacking("nowhere run --rm")
    with pytest.raises(RuntimeError, match="--sandbox 'false', where no program runs"):
        lacking("false")
