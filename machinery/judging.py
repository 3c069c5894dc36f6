"""Verdicts while completions are still written.

A task's score may take seconds: it runs tests, or asks a machine far away. It stays a function that returns when it is
done, and is called on threads: the sampler hands each completion over at the moment it ends, and whoever waits for its
verdict waits while others still write. Python computes on one thread at a time, so a score gains by this where it
waits, starts processes or computes outside Python. No token depends on it: tests/machinery/test_judging.py holds it
to judging one after the other. docs/slow-rewards.md measures what it saves, and where it costs: verdicts that compute on
the cores that sample. So on a CPU they begin when all is written, unless --judges is given.

A verdict that takes longer than --verdict-seconds is none: all its parts are 0, and the log counts it ("no_verdict").
Threads are daemons, so nothing waits for them when the script ends.
"""

import contextlib
import os
import threading
import time
from queue import Empty, SimpleQueue
from typing import NamedTuple

from tqdm import tqdm

from machinery.distributed import local_size
from machinery.flags import fail
from machinery.notes import note

MOST = 4096  # judges
NO_VERDICT = "no verdict"
FILLED_IN = ("language", "preference")  # parts that are not the task's to score


class Judged(NamedTuple):
    parts: dict[str, float]    # of the task's score
    verdict: str               # correct, or why not
    watched: dict[str, float]  # of the task's watch


def judge(task, problem, text: str) -> Judged:
    parts, verdict = task.seam.score(problem, text)
    return Judged(parts, verdict, task.watch(problem, text))


class Judges:
    """Threads, so many of this process; 0: one a core. What is handed over first is judged first, whatever batch it is
    of. seconds: for each verdict; device: the sampler's, whose cores they leave alone where it is "cpu" and number 0.
    Raises ValueError where the machine does not start so many."""

    def __init__(self, number: int = 0, seconds: float = 300.0, device=""):
        cores = (os.cpu_count() or 1) // local_size()
        self.stand_back = not number and str(device) == "cpu"
        self.number, self.seconds, self.waiting = number or max(1, cores), seconds, SimpleQueue()
        for started in range(self.number):
            try:
                self.start()
            except RuntimeError:
                self.number = started
                self.close()
                raise ValueError(f"got --judges {number}, of which this machine starts {started}; expected fewer") from None

    def start(self) -> None:
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while job := self.waiting.get():
            judging, index, text = job
            if not judging.judge(index, text):
                return  # given up, and another has this one's place

    def close(self) -> None:
        for _ in range(self.number):
            self.waiting.put(None)


class Judging:
    """The verdicts on a batch of completions, drawn being a (task, problem) pair for each."""

    def __init__(self, judges: Judges, drawn: list[tuple]):
        self.judges, self.drawn, self.answers = judges, drawn, SimpleQueue()  # (index, Judged or what was raised)
        self.handed_over, self.begun = set(), {}  # indices; index -> when a judge took it

    def begin(self, index: int, text: str) -> int:
        """A completion has ended, while others are still written; -> how many verdicts there are."""
        if not self.judges.stand_back:
            self.handed_over.add(index)
            self.judges.waiting.put((self, index, text))
        return self.answers.qsize()

    def judge(self, index: int, text: str) -> bool:
        """On a judge's thread -> whether the verdict was still wanted."""
        began = self.begun[index] = time.monotonic()
        try:
            said = judge(*self.drawn[index], text)
        except BaseException as error:  # raised where the verdicts are wanted
            said = error
        if time.monotonic() - began > self.judges.seconds:
            said = self.no_verdict(index)
        wanted = self.begun.pop(index, None) is not None
        if wanted:
            self.answers.put((index, said))
        return wanted

    def verdicts(self, texts: list[str]) -> list[Judged]:
        """In the order of drawn; texts that nobody has handed over are judged now. Raises what a score raised, and ends
        in one line where no verdict comes at all."""
        found, late, seconds = {}, 0, self.judges.seconds
        for index in set(range(len(texts))) - self.handed_over:
            self.judges.waiting.put((self, index, texts[index]))
        with tqdm(total=len(self.drawn), desc="verdicts", delay=2, leave=False) as bar:
            while len(found) < len(self.drawn):
                with contextlib.suppress(Empty):
                    index, said = self.answers.get(timeout=min(1.0, seconds))
                    if isinstance(said, BaseException):
                        raise said
                    found[index], late = said, late + said.verdict.startswith(NO_VERDICT)
                for index, began in list(self.begun.items()):
                    if time.monotonic() - began > seconds and self.begun.pop(index, None):
                        found[index], late = self.no_verdict(index), late + 1
                        self.judges.start()
                if late == len(found) >= 2 * self.judges.number:
                    fail(f"got no verdict on the first {late} completions within --verdict-seconds {seconds:g}; expected a score "
                         "that returns: is what it asks still there?")
                bar.update(len(found) - bar.n)
        if late:
            note(f"{late} of {len(found)} verdicts took longer than --verdict-seconds {seconds:g}: all their parts are 0")
        return [found[index] for index in range(len(self.drawn))]

    def no_verdict(self, index: int) -> Judged:
        task, _ = self.drawn[index]
        parts = {name: 0.0 for name in task.weights if name not in FILLED_IN}
        return Judged(parts, f"{NO_VERDICT} within {self.judges.seconds:g} s", {})


def late_share(verdicts: list[str]) -> dict[str, float]:
    """For a log or a table: {"no_verdict": share}, where there are any."""
    late = sum(verdict.startswith(NO_VERDICT) for verdict in verdicts)
    return {"no_verdict": late / len(verdicts)} if late else {}


def check_judges(judges: int, seconds: float) -> None:
    """Raises ValueError for numbers that cannot be."""
    if not 0 <= judges <= MOST or seconds <= 0:
        raise ValueError(f"got --judges {judges} and --verdict-seconds {seconds:g}, expected 0 to {MOST}, and more than 0 seconds")
