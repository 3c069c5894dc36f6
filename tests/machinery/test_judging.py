"""Verdicts on threads: the plain ones, whatever they take; what never comes is given up, counted, and holds nothing back."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import countdown
import evaluate
import train_countdown
from countdown import sample_puzzles
from experiments import slow_rewards
from machinery.checkpoints import load
from machinery.judging import Judges, Judging, judge
from machinery.rollouts import Rollout
from machinery.tasks import Score, find_tasks, score_completions
from sampling import Completion, complete
from test_training import digit_score, train

ROOT = Path(train_countdown.__file__).parent


def drawn_with(score, n: int, watch=lambda problem, text: {"letters": len(text)}) -> list[tuple]:
    """n (task, problem) pairs, problems being numbers."""
    return [(SimpleNamespace(name="made up", weights={"accuracy": 1.0, "language": 0.0}, watch=watch, group=lambda problem: "",
                             seam=SimpleNamespace(score=score)), i) for i in range(n)]


def verdicts_of(drawn, judges=4, seconds=30.0):
    """Of completions of 0, 1, 2 ... letters; half of them handed over one by one, the last first."""
    texts = ["x" * i for i in range(len(drawn))]
    with contextlib.closing(Judges(judges, seconds)) as own:
        judging = Judging(own, drawn)
        for i in reversed(range(0, len(drawn), 2)):
            judging.begin(i, texts[i])
        return judging.verdicts(texts)


def test_verdicts_stand_in_the_order_of_the_problems_whatever_each_takes():
    def score(problem, text):
        time.sleep(0.02 * (problem % 3))
        return {"accuracy": float(problem % 2)}, "correct" if problem % 2 else "wrong"

    drawn = drawn_with(score, 12)
    assert verdicts_of(drawn) == [judge(*pair, "x" * i) for i, pair in enumerate(drawn)]


def test_as_many_verdicts_as_judges_at_the_same_time():
    """Each waits until three are there: two judges would wait for ever."""
    together = threading.Barrier(3, timeout=20)
    drawn = drawn_with(lambda problem, text: (together.wait() >= 0, ({"accuracy": 1.0}, "correct"))[1], 6)
    assert {one.verdict for one in verdicts_of(drawn, judges=3)} == {"correct"}


def test_one_that_never_returns_is_given_up_and_its_judge_replaced(capsys):
    """One judge, and the first verdict that it takes never comes: the others do. Its reward is that of a wrong answer."""
    never = threading.Event()
    drawn = drawn_with(lambda problem, text: (problem != 3 or never.wait(), ({"accuracy": 1.0}, "correct"))[1], 4)
    judged = verdicts_of(drawn, judges=1, seconds=0.2)
    assert [one.parts["accuracy"] for one in judged] == [1, 1, 1, 0]
    assert judged[3].verdict == "no verdict within 0.2 s" and judged[3].watched == {}
    assert "1 of 4 verdicts took longer than --verdict-seconds 0.2" in capsys.readouterr().err
    scores = score_completions(drawn, [""] * 4, ["", "x", "xx", "xxx"], None, "en", judged)
    assert [score.reward for score in scores] == [1, 1, 1, 0]
    never.set()


@pytest.mark.parametrize("raised", (ZeroDivisionError, SystemExit))
def test_what_a_score_raises_is_raised_where_the_verdicts_are_wanted(raised):
    def score(problem, text):
        raise raised(f"of {problem}")

    with pytest.raises(raised, match="of "):
        verdicts_of(drawn_with(score, 3))


def test_a_late_verdict_counts_as_wrong_though_it_comes():
    """Whether the sampler was still writing when it came must not decide."""
    drawn = drawn_with(lambda problem, text: (time.sleep(0.1 * (problem == 1)), ({"accuracy": 1.0}, "correct"))[1], 3)
    with contextlib.closing(Judges(2, seconds=0.05)) as judges:
        judging = Judging(judges, drawn)
        for i in range(3):
            judging.begin(i, "x")
        time.sleep(0.3)
        assert [one.parts["accuracy"] for one in judging.verdicts(["x"] * 3)] == [1, 0, 1]


def test_where_no_verdict_comes_at_all_it_ends_in_one_line(capfd):
    never = threading.Event()
    with pytest.raises(SystemExit):
        verdicts_of(drawn_with(lambda problem, text: never.wait(), 9), judges=2, seconds=0.1)
    assert "error: got no verdict on the first 4 completions within --verdict-seconds 0.1" in capfd.readouterr().err
    never.set()


@pytest.mark.parametrize("number, device, while_others_write", ((0, "cpu", False), (2, "cpu", True), (0, "cuda:0", True)))
def test_on_a_cpu_verdicts_leave_the_sampler_its_cores_unless_judges_are_given(number, device, while_others_write):
    asked = threading.Event()
    drawn = drawn_with(lambda problem, text: (asked.set(), ({"accuracy": 1.0}, "correct"))[1], 2)
    with contextlib.closing(Judges(number, device=device)) as judges:
        judging = Judging(judges, drawn)
        judging.begin(0, "")
        assert asked.wait(5 if while_others_write else 0.2) == while_others_write
        assert len(judging.verdicts(["", ""])) == 2


def test_batches_share_the_judges_and_the_older_one_is_judged_first():
    at_once, most, order, lock = [0], [0], [], threading.Lock()

    def score(problem, text):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            order.append(text)
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        return {"accuracy": 1.0}, "correct"

    with contextlib.closing(Judges(2)) as judges:
        batches = [Judging(judges, drawn_with(score, 6)) for _ in range(2)]
        for number, batch in enumerate(batches):
            for i in range(6):
                batch.begin(i, str(number))
        for number, batch in enumerate(batches):
            assert len(batch.verdicts([str(number)] * 6)) == 6
    assert most == [2] and order == sorted(order)


def test_a_late_verdict_in_a_task_that_does_not_weigh_accuracy_is_logged():
    """Its parts are those that the task weighs; the log's accuracy counts it as wrong."""
    score = Score(0.0, {"close": 0.0}, {}, "no verdict within 1 s", "")
    rows = [Rollout(0, "t", "", "", Completion([1], [0.0], False), own, 0.0, 0.0, 0.0, True)
            for own in (score, score._replace(parts={"accuracy": 1.0, "close": 1.0}))]
    row = evaluate.describe_step(rows, "en")
    assert row["close"] == 0.5 and row["accuracy"] == 1.0 and "accuracy_" not in row


def test_the_judges_of_several_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    judges = Judges()
    judges.close()
    assert judges.number == 2


def test_a_majority_s_verdict_has_its_limit_too(base):
    """Two samples a problem: what was given up among them is asked once more for the vote, and given up again."""
    model, tokenizer = load(base)
    with pytest.MonkeyPatch.context() as patch:
        never = threading.Event()
        patch.setattr(countdown, "vote", lambda problem, texts: "stuck")
        patch.setattr(countdown, "score", lambda problem, text: (text == "<answer>stuck</answer>" and never.wait(),
                                                                 ({"accuracy": 1.0, "format": 1.0}, "correct"))[1])
        table, _ = evaluate.evaluate(model, tokenizer, evaluate.Config(n=2, samples=2, max_new_tokens=8, judges=4,
                                                                       verdict_seconds=0.3))
        assert table["pass@1"] == 1 and table["maj@2"] == 0
        never.set()


def test_threads_end_with_their_batch():
    before = threading.active_count()
    verdicts_of(drawn_with(lambda problem, text: ({}, "wrong"), 8), judges=8)
    deadline = time.time() + 10
    while threading.active_count() > before:
        assert time.time() < deadline
        time.sleep(0.01)


def test_completions_are_handed_over_while_others_write_and_are_those_of_the_end(base):
    """sample() calls back once for each, with its own text, in the order in which they end; tokens stay as they are."""
    model, tokenizer = load(base)
    task, = find_tasks("countdown")
    prompts = [task.prompt(puzzle, "tiny") for puzzle in sample_puzzles(8, split="train", seed=0) for _ in range(3)]
    settings = dict(max_new_tokens=60, seed=1, slots=6)
    seen, open_at = {}, []

    def finished(index, text):
        assert index not in seen
        seen[index] = text
        open_at.append(len(prompts) - len(seen))
        return len(seen)

    plain = complete(model, tokenizer, prompts, **settings)
    assert complete(model, tokenizer, prompts, finished=finished, **settings) == plain
    assert [seen[i] for i in range(len(prompts))] == plain[2]
    assert list(seen) != sorted(seen)  # not in the order of prompts: as they end
    assert open_at == list(range(len(prompts) - 1, -1, -1))


@pytest.mark.usefixtures("quiet_training")
def test_judges_change_no_token_and_no_reward(monkeypatch, base, tmp_path):
    """The same run with one judge, with eight, and with rewards computed one after the other at the end."""
    monkeypatch.setattr(countdown, "score", digit_score)
    one, eight = (train(monkeypatch, base, tmp_path / f"judges{n}", judges=n) for n in (1, 8))
    score = train_countdown.score_completions
    monkeypatch.setattr(train_countdown, "score_completions", lambda *args: score(*args[:5]))
    assert one == eight == train(monkeypatch, base, tmp_path / "plain")
    assert one[-1]["gradient_norm"] > 0


@pytest.mark.usefixtures("quiet_training")
def test_a_stale_run_trains_on_what_an_earlier_policy_sampled(monkeypatch, base, tmp_path):
    """--stale 1: the first two batches are the base's own. From the second step on the ratio is not 1 any more."""
    monkeypatch.setattr(countdown, "score", digit_score)
    fresh, stale = (train(monkeypatch, base, tmp_path / f"stale{n}", stale=n, warmup_steps=1) for n in (0, 1))
    assert stale[1] == fresh[1]
    assert abs(stale[2]["ratio"] - 1) > 1e-4 > abs(fresh[2]["ratio"] - 1)
    assert [row["step"] for row in stale] == [row["step"] for row in fresh] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("flags, says", (
    (("--judges", -1), ("got --judges -1", "expected 0 to 4096")), (("--verdict-seconds", 0), ("--verdict-seconds 0", "more than 0 seconds")),
    (("--stale", -1), ("got stale -1",)), (("--stale", 1, "--inner-epochs", 2), ("stale 1 and inner_epochs 2", "cannot carry"))))
def test_what_cannot_be_is_refused(refused, tmp_path, base, flags, says):
    refused(train_countdown, "--model", base, "--out", tmp_path / "run", *flags, says=says)
    assert not (tmp_path / "run").exists()


def test_more_judges_than_the_machine_starts_are_refused(refused, tmp_path, base, monkeypatch):
    start, started = threading.Thread.start, []

    def no_more_than_five(thread):
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more_than_five)
    refused(evaluate, "--model", base, "--judges", 9, says=("got --judges 9, of which this machine starts ", "fewer"))


def test_a_score_that_wants_the_main_thread_is_refused_at_the_start(refused, tmp_path, base):
    """As libraries do that stop themselves after some seconds with a signal."""
    (tmp_path / "alarmed.py").write_text("import signal\nimport countdown\nfrom countdown import *\n\ndef score(problem, text):\n"
                                         "    signal.signal(signal.SIGALRM, signal.SIG_DFL)\n    return countdown.score(problem, text)\n")
    refused(evaluate, "--model", base, "--task", tmp_path / "alarmed.py", says=("alarmed", "main thread", "on threads and so without signals"))


def test_a_delay_below_0_is_refused(refused, tmp_path):
    refused(slow_rewards, "--delays=-1,2", "--out", tmp_path / "slow", says=("got delays '-1,2'", "at least 0"))
    refused(slow_rewards, "--delays", "1,3", "--out", tmp_path / "slow", says=("got delays '1,3'", "one of at most 0.1"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_an_evaluation_whose_judge_never_returns(base, tmp_path):
    (tmp_path / "stuck.py").write_text("import time\nimport countdown\nfrom countdown import *\n\ndef score(problem, text):\n"
                                       "    if 'answer' not in text:\n        time.sleep(10_000)\n"
                                       "    return countdown.score(problem, text)\n")
    process = subprocess.Popen([sys.executable, ROOT / "evaluate.py", "--model", base, "--task", tmp_path / "stuck.py", "--n", "4",
                                "--max-new-tokens", "8"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while "verdicts:" not in (said := process.stderr.read(20)):
            assert said, "it ended by itself"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
