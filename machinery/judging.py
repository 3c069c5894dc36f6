"""Verdicts while completions are still written.

A task's score may take seconds: it runs tests, or asks a machine far away. It stays a function that returns when it is
done, and is called on threads: the sampler hands each completion over at the moment it ends, and those that are judged
cost no time of their own while others still write. No token depends on it, and no reward: tests/machinery/test_judging.py
holds it to judging one after the other. docs/slow-rewards.md measures what it saves.

A score that never returns is given up after --verdict-seconds. It counts as wrong, and the log counts it ("no_verdict").
Threads are daemons, so nothing waits for it when the script ends.
"""

import contextlib
import os
import threading
import time
from queue import Empty, SimpleQueue
from typing import NamedTuple

from tqdm import tqdm

from machinery.notes import note

NO_VERDICT = "no verdict"
FILLED_IN = ("language", "preference")  # parts that are not the task's to score


class Judged(NamedTuple):
    parts: dict[str, float]    # of the task's score
    verdict: str               # correct, or why not
    watched: dict[str, float]  # of the task's watch


def judge(task, problem, text: str) -> Judged:
    parts, verdict = task.seam.score(problem, text)
    return Judged(parts, verdict, task.watch(problem, text))


class Judging:
    """The verdicts on the completions of a batch, drawn being a (task, problem) pair for each.

    judges: threads; 0: one a core. seconds: for each verdict. Raises ValueError where so many do not start."""

    def __init__(self, drawn: list[tuple], judges: int = 0, seconds: float = 300.0):
        self.drawn, self.seconds, self.judges = drawn, seconds, 0
        self.waiting, self.answers = SimpleQueue(), SimpleQueue()  # (index, text); (index, Judged or what was raised)
        self.handed_over, self.begun = set(), {}  # indices; index -> when a judge took it
        own_cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes share them
        wanted = min(judges or max(1, own_cores), max(1, len(drawn)))
        try:
            while self.judges < wanted:
                threading.Thread(target=self.work, daemon=True).start()
                self.judges += 1
        except RuntimeError:
            self.close()
            raise ValueError(f"got --judges {judges}, of which this machine starts {self.judges}; expected fewer") from None

    def begin(self, index: int, text: str) -> int:
        """Hands a completion over; -> how many verdicts there are."""
        self.handed_over.add(index)
        self.waiting.put((index, text))
        return self.answers.qsize()

    def work(self) -> None:
        while job := self.waiting.get():
            index, text = job
            self.begun[index] = time.monotonic()
            try:
                said = judge(*self.drawn[index], text)
            except Exception as error:  # raised where the verdicts are wanted
                said = error
            if not self.begun.pop(index, None):
                return  # given up, and another judge has this one's place
            self.answers.put((index, said))

    def verdicts(self, texts: list[str]) -> list[Judged]:
        """In the order of drawn; texts that nobody has handed over are judged now. Raises what a score raised."""
        found, late = {}, 0
        for index, text in enumerate(texts):
            if index not in self.handed_over:
                self.begin(index, text)
        with contextlib.closing(self), tqdm(total=len(self.drawn), desc="verdicts", delay=2, leave=False) as bar:
            while len(found) < len(self.drawn):
                with contextlib.suppress(Empty):
                    index, said = self.answers.get(timeout=min(1.0, self.seconds))
                    if isinstance(said, Exception):
                        raise said
                    found[index] = said
                for index, began in list(self.begun.items()):
                    if time.monotonic() - began > self.seconds and self.begun.pop(index, None):
                        found[index], late = self.no_verdict(index), late + 1
                        threading.Thread(target=self.work, daemon=True).start()
                bar.update(len(found) - bar.n)
        if late:
            note(f"{late} of {len(found)} verdicts took longer than --verdict-seconds {self.seconds:g}; they count as wrong")
        return [found[index] for index in range(len(self.drawn))]

    def no_verdict(self, index: int) -> Judged:
        task, _ = self.drawn[index]
        parts = {name: 0.0 for name in task.weights if name not in FILLED_IN}
        return Judged(parts, f"{NO_VERDICT} within {self.seconds:g} s", {})

    def close(self) -> None:
        for _ in range(self.judges):
            self.waiting.put(None)


def check_judges(judges: int, seconds: float) -> None:
    """Raises ValueError for numbers that cannot be, and for more threads than this machine starts."""
    if judges < 0 or seconds <= 0:
        raise ValueError(f"got --judges {judges} and --verdict-seconds {seconds:g}, expected at least 0, and more than 0 seconds")
    Judging([None] * judges, judges).close()
