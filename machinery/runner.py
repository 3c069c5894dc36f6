"""Runs programs that nobody has read, and says which tests they pass. Standard library only; runs alone, too.

    >>> run_tests("def add(a, b): return a + b", ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], "add")
    ['passed', 'wrong']
    >>> run_tests("print(int(input()) + 1)", [{"stdin": "41\\n", "stdout": "42\\n"}])
    ['passed']

Three processes for an answer. The trainer asks a supervisor, which is this file started anew and which runs the tests:
they are yours and trusted. Each test gets a fresh child, which runs the program and never sees a test: where a test
calls the function, arguments go to the child as plain literals and a plain literal comes back. So nothing that a program
prints, patches or overloads is a verdict; all it can do is return values.

What a child has: Python's standard library, an empty folder of its own, no environment, no standard input but the test's,
limits on processor time, wall time, memory and file size, no second process or thread. On Linux with namespaces (any user,
where the system allows it) it also has: no network, no sight of other processes, no files but /usr, /lib and Python's own,
read-only; and whatever it leaves dies with it. Elsewhere `lacking` names what is missing, and scripts say it once.

What this does not protect against: faults of the kernel or of Python; timing and load as channels to the outside; where
namespaces are missing, a program run by your own user reads your files and environment (through /proc), uses the network,
and may signal your processes. On Windows only wall time is limited. For programs that you fear, prefix a command that
starts them elsewhere: sandbox="docker run --rm -i --network none python:3.12-slim".
"""

import builtins
import contextlib
import json
import os
import signal
import sys
from collections import namedtuple
from functools import lru_cache

if sys.argv[1:] != ["child"]:  # which needs none of these, and starts sooner
    import shlex
    import shutil
    import subprocess
    import tempfile
    import threading

LINUX, WINDOWS = sys.platform == "linux", os.name == "nt"
PYTHON = getattr(sys, "_base_executable", "") or sys.executable  # not a virtual environment's: -S wants none of it
NOBODY = 65534
ENVIRONMENT = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows starts nothing without it
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
OUT_OF_TIME = () if WINDOWS else (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
OUTSIDE = ["network", "files", "other processes"]  # what a program may be kept from
LIMITED = ["memory", "processor time", "file size", "more processes", "descriptors", "core files"]
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, CAPABILITIES_3 = 1, 4, 38, 0x20080522  # Linux's, from its headers
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, AT_RECURSIVE, SYS_mount_setattr = 1, 2, 4, 0x8000, 442

# of each test: seconds of the processor, seconds, bytes of address space, bytes of a file, and of what is printed or returned
Limits = namedtuple("Limits", "cpu wall memory written", defaults=(2, 4.0, 512 << 20, 1 << 20))


# --------------------------------------------------------------------------------------------- what goes to and fro
def pack(value):
    """A plain literal as JSON that keeps its type: (1, {2}) -> ["tuple", [1, ["set", [2]]]]. What is made of plain ones
    becomes plain: an int that compares equal to everything is an int again."""
    if value is None or type(value) is bool:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [pack(item) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    raise TypeError(f"a {type(value).__name__} is no plain literal")


def unpack(packed):
    """The way back. Raises ValueError for what pack never writes."""
    if packed is None or isinstance(packed, (bool, int, float, str)):
        return packed
    try:
        name, items = packed
        if name == "bytes":
            return bytes.fromhex(items)
        if name == "dict":
            return {unpack(key): unpack(item) for key, item in items}
        return SEQUENCES[name](unpack(item) for item in items)
    except (TypeError, KeyError):
        raise ValueError("no plain literal") from None


# -------------------------------------------------------------------------------------------------- in the trainer
def run_tests(program: str | None, tests: list, entry_point: str = "", *, sandbox: str = "", limits: Limits = Limits()
              ) -> list[str]:
    """For each test "passed" or why not: "wrong", "timeout", "killed" (it ended without an answer), or the name of what was
    raised, as NameError.

    A test is Python text that asserts something of entry_point (or of `candidate`, another name for it), or a dict of
    stdin and stdout: then the program runs as a script, and what it prints has to be that, white space at the ends of
    lines aside. None is a program that defines nothing. "unending" is a test that is itself not done in all that time."""
    missing = lacking(sandbox)
    at_home = "files" in missing  # else a program has a file system of its own
    with tempfile.TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) if at_home else contextlib.nullcontext("/") as folder:
        supervisor = subprocess.Popen([PYTHON, "-I", "-S", "-X", "utf8", __file__, "supervise"], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
                                      env=None if sandbox else ENVIRONMENT, start_new_session=not WINDOWS)
        job = {"program": program, "tests": tests, "entry_point": entry_point, "sandbox": sandbox, "limits": limits,
               "missing": missing}
        patience = threading.Timer((limits.wall + 1) * len(tests) + 5, supervisor.kill)
        patience.start()
        verdicts = []
        try:  # its standard input stays open: where that ends, the trainer is gone, and the supervisor cleans up
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(json.dumps(job).encode() + b"\n")
                supervisor.stdin.flush()
            verdicts = [json.loads(line) for line in supervisor.stdout]
        finally:
            unending = not patience.is_alive()
            patience.cancel()
            supervisor.stdin.close()
            try:
                supervisor.wait(5)  # it kills the child first
            except subprocess.TimeoutExpired:
                supervisor.kill()
            supervisor.stdout.close()
        return verdicts + ["unending" if unending else "killed"] * (len(tests) - len(verdicts))


@lru_cache
def lacking(sandbox: str = "") -> list[str]:
    """What this system does not take away from a child. Raises FileNotFoundError where the sandbox's command is missing,
    RuntimeError where nothing runs in it."""
    if sandbox and not shutil.which(command := shlex.split(sandbox)[0]):
        raise FileNotFoundError(f"got --sandbox {sandbox!r}, but there is no command {command}; expected one that starts a "
                                "Python where programs may do what they like, as docker run --rm -i --network none "
                                "python:3.12-slim")
    child = Child("/", sandbox, Limits(wall=60.0), [*OUTSIDE, *LIMITED])
    try:
        return child.ask("lacking")
    except Gone as error:
        raise RuntimeError(f"got {f'--sandbox {sandbox!r}, where' if sandbox else 'a system where'} no program runs "
                           f"({error}); expected Python 3.11 or newer and a standard input that stays open") from None
    finally:
        child.kill()


# ----------------------------------------------------------------------------------------------- the supervisor
class Gone(Exception):
    """The child has ended: timeout, or killed, which is also what its answer is where it is none."""


class Child:
    """A fresh process for one test. ask() sends a message, a JSON list a line, and waits for the answer."""

    def __init__(self, folder: str, sandbox: str, limits: Limits, missing: list[str]):
        with open(__file__, encoding="utf8") as file:
            source = file.read()  # a container has no such file
        self.limits, self.late, self.raised, self.name = limits, False, None, ""  # name of what was raised
        python = [*shlex.split(sandbox), "python3"] if sandbox else [PYTHON]
        self.process = subprocess.Popen([*python, "-I", "-S", "-X", "utf8", "-c", source, "child"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
                                        env=None if sandbox else ENVIRONMENT, start_new_session=not WINDOWS)
        self.timer = threading.Timer(limits.wall, self.expire)
        self.timer.start()
        self.send([list(limits), missing, 0 if sandbox or WINDOWS else os.getpid()])

    def send(self, message: list) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, *message):
        """The value that comes back. Raises what the program raised, as an exception of Python's own, or Gone."""
        self.send(message)
        line = self.process.stdout.readline(8 * self.limits.written)
        if not line.endswith(b"\n"):
            self.kill()
            raise Gone("timeout" if self.late or self.process.returncode in OUT_OF_TIME else "killed")
        try:
            status, *rest = json.loads(line)
            if status == "value":
                return unpack(*rest)
            name, said = map(str, rest)
        except (ValueError, TypeError, RecursionError):
            raise Gone("killed") from None
        kind = getattr(builtins, name, None)
        known = isinstance(kind, type) and issubclass(kind, BaseException)
        self.name = name if known else "Exception"  # a class may be called anything, passed for one
        kind = kind if known and issubclass(kind, Exception) else RuntimeError
        self.raised = kind.__new__(kind)  # UnicodeDecodeError() wants five arguments
        self.raised.args = (said,)
        raise self.raised

    def expire(self):
        self.late = True
        self.kill()

    def kill(self) -> None:
        """SIGTERM: the child's first process then kills the others, in a container, too."""
        self.timer.cancel()
        with contextlib.suppress(OSError):
            self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def supervise() -> None:
    """One job on standard input, a verdict a line on standard output, until standard input ends."""
    folder, starting, child = os.getcwd(), threading.Lock(), None

    def clean_up():
        if child:
            child.kill()
        if os.path.basename(folder).startswith("answer-"):
            shutil.rmtree(folder, ignore_errors=True)

    try:
        job = json.loads(sys.stdin.buffer.readline())
    except ValueError:  # the trainer is gone already
        return clean_up()
    say, limits, own = os.dup(1), Limits(*job["limits"]), "/"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for tests that print

    def wait_for_the_end():
        sys.stdin.buffer.read()
        starting.acquire()  # from here on nobody starts a child, or leaves
        clean_up()
        os._exit(0)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    if folder != "/":
        os.chmod(folder, 0o711)  # root's child becomes nobody
    for number, test in enumerate(job["tests"]):
        with starting:
            if folder != "/":
                os.mkdir(own := os.path.join(folder, str(number)))
                os.chmod(own, 0o777)
            if job["program"] is not None:
                child = Child(own, job["sandbox"], limits, job["missing"])
        verdict = verdict_of(test, job["program"], job["entry_point"], child)
        if child:
            child.kill()
        with contextlib.suppress(BrokenPipeError):  # then somebody is cleaning up
            os.write(say, json.dumps(verdict).encode() + b"\n")
    starting.acquire()
    os._exit(0)  # a test's own threads are no reason to stay


def verdict_of(test: str | dict, program: str | None, entry_point: str, child: Child | None) -> str:
    def candidate(*args, **kwargs):
        if not child:
            raise NameError
        return child.ask("call", entry_point, pack(args), pack(kwargs))

    try:
        if child is None and isinstance(test, dict):
            return "wrong"
        if isinstance(test, dict):
            printed = child.ask("script", program, test["stdin"])
            return "passed" if stripped(printed) == stripped(test["stdout"]) else "wrong"
        if child:
            child.ask("define", program)
        exec(compile(test, "test", "exec"), {"__name__": "test", entry_point: candidate, "candidate": candidate})
        return "passed"
    except Gone as error:
        return str(error)
    except BaseException as error:  # whatever a test does: it has not passed
        return child.name if child and error is child.raised else "wrong"


def stripped(text) -> list[str]:
    return [line.rstrip() for line in str(text).rstrip().split("\n")]


# ------------------------------------------------------------------------------------------------------ the child
def serve() -> None:
    """Gives up all that it can, then does what the messages on standard input say, an answer a line."""
    requests, answers = open(os.dup(0), "rb"), os.dup(1)
    limits, known, supervisor = json.loads(requests.readline())
    limits = Limits(*limits)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    missing = [*OUTSIDE, *LIMITED] if WINDOWS else isolate(limits, supervisor)
    if not set(missing) <= set(known):
        return  # less than this system could take away a moment ago: run nothing
    if not os.access(".", os.W_OK):
        with contextlib.suppress(OSError):
            os.chdir("/tmp")  # of a container
    names, sys.argv, builtins.exit, builtins.quit = {"__name__": "answer"}, ["answer.py"], sys.exit, sys.exit  # -S has no exit
    for line in requests:
        do, *rest = json.loads(line)
        try:
            if do == "lacking":
                value = missing
            elif do == "define":
                value = exec(compile(rest[0], "answer", "exec"), names)
            elif do == "script":
                value = run_script(*rest, limits)
            elif rest[0] not in names:
                raise NameError(f"{rest[0]} is not defined")
            else:
                value = names[rest[0]](*unpack(rest[1]), **unpack(rest[2]))
            answer = json.dumps(["value", pack(value)])
        except BaseException as error:  # SystemExit, too
            answer = json.dumps(["raised", type(error).__name__, str(error)[:200]])
        written = answer.encode() + b"\n"
        while written:
            written = written[os.write(answers, written):]


def run_script(program: str, stdin: str, limits: Limits) -> str:
    """What it prints. Descriptors 0 and 1 are files, for programs that open(0)."""
    with open("stdin", "w+b") as given, open("stdout", "w+b") as printed:
        given.write(stdin.encode())
        given.seek(0)
        os.dup2(given.fileno(), 0), os.dup2(printed.fileno(), 1)
        try:
            exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            if error.code:
                raise
        sys.stdout.flush()
        printed.seek(0)
        return printed.read(limits.written).decode(errors="replace")


def isolate(limits: Limits, supervisor: int) -> list[str]:
    """Returns in a process that has the rights and limits of the head of this file, with the names of those it lacks. The
    processes above it wait, and end what is below them when they are told to, or when nothing above them is left."""
    import resource
    missing, libc = [], None
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
    try:
        enter_namespaces(libc)
        hide_files(libc)
    except (OSError, AttributeError, TypeError):
        missing += OUTSIDE
    keep_watch(libc, limits, supervisor)  # over the first process of the namespace
    keep_watch(libc, limits)  # that is over the program: what a first process leaves, the system ends
    parts = os.__file__.split("/")
    if os.geteuid() == 0 and all(os.stat("/".join(parts[:i]) or "/").st_mode & 1 for i in range(1, len(parts))):
        with contextlib.suppress(OSError):  # nobody may read Python's own files
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    if LINUX and libc:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)())
    most = {"AS": limits.memory, "CPU": limits.cpu, "FSIZE": limits.written, "NPROC": 0, "NOFILE": 32, "CORE": 0}
    for what, name in zip(LIMITED, most):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most[name], most[name] + (name == "CPU")))
        except (OSError, ValueError, AttributeError):
            missing.append(what)
    if sys.platform == "darwin":
        missing.append("memory")  # it takes the limit and does not hold it
    if os.geteuid() == 0:
        missing.append("more processes")  # no limit holds for root
    return missing


def check(result: int) -> None:
    if result:
        import ctypes
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter_namespaces(libc) -> None:
    """Of its own: users, unless it is root; mounts, processes to come, network, shared memory. Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | (CLONE_NEWUSER if user else 0)))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        if user:
            with open(f"/proc/self/{name}", "w", encoding="utf8") as file:
                file.write(text)


def hide_files(libc) -> None:
    """A new root that has an empty folder, and read-only what Python needs. It lies over /proc, which every system has.
    Raises OSError."""
    import ctypes
    root, seen = "/proc", []
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"none", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64m,mode=755"))
    for path in ("/usr", "/lib", "/lib64", sys.base_prefix, sys.base_exec_prefix):
        if os.path.isdir(path) and not any(path == other or path.startswith(f"{other}/") for other in seen):
            seen.append(path)
            os.makedirs(root + path)
            check(libc.mount(path.encode(), (root + path).encode(), None, MS_BIND | MS_REC, None))
            flags = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
            check(libc.syscall(SYS_mount_setattr, -1, (root + path).encode(), AT_RECURSIVE, flags, 32))
    os.mkdir(f"{root}/answer")
    os.chmod(f"{root}/answer", 0o777)  # root's child becomes nobody
    os.chroot(root)  # nobody can leave it: that takes a right that the program has not, and gets in no namespace in here
    os.chdir("/answer")


def keep_watch(libc, limits: Limits, supervisor: int = 0) -> None:
    """Forks. The child goes on; its parent waits, and ends as the child has ended."""
    told = (signal.SIGTERM, signal.SIGALRM)
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # until somebody can hear them
    below = os.fork()

    def stop(*_):
        os.kill(below, signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)

    if LINUX and libc:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM if below else signal.SIGKILL, 0, 0, 0)
    for number in told if below else ():
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
    if not below:
        return
    if supervisor and os.getppid() != supervisor:  # it was gone before the system could be asked to say so
        stop()
    signal.alarm(int(limits.wall) + 2)  # in a container nobody else may be able to
    if LINUX and libc:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program may not look into it
    code = os.waitstatus_to_exitcode(os.waitpid(below, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    {"supervise": supervise, "child": serve}[sys.argv[1]]()
