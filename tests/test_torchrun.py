"""train_countdown.py in several processes, as torchrun runs it, on the CPU: the run of one process comes out, whoever
saves others can resume, and what goes wrong in one process ends all of them.

Starting Python takes seconds, nearly all of it imports. So a server imports once, every process is a fork of it
(multiprocessing calls that a forkserver) with torchrun's environment variables, and torchrun itself is started only
where it has something to do: when a process dies, and on Ctrl-C. Nothing here waits for longer than LIMIT.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the processes know nothing of conftest.py

import countdown
import train_countdown
from machinery import checkpoints as directories, rl_run, run_folder
from machinery.data import read_jsonl
from rewards import extract_answer, verify

pytestmark = pytest.mark.slow

LIMIT = 180  # seconds for one start; on busy cores nearly all of it are torchrun's imports
TIMES = ("seconds", "sampling_seconds", "tokens_per_second", "minutes")
# 3 groups of 4: of two processes one takes a group and the other takes two
FLAGS = ("--steps", 3, "--batch-size", 12, "--group-size", 4, "--max-new-tokens", 24, "--learning-rate", 3e-3,
         "--warmup-steps", 1, "--micro-batch-tokens", 128, "--eval-n", 4, "--eval-every", 100, "--save-every", 100,
         "--sample-every", 1)


# ------------------------------------------------------------------------------------------------- what a process does


SEEN = []  # (text, numbers, target, reward) of every completion that this process rewarded


def digit_score(puzzle, text):
    """The share of digits: a random model solves no puzzle, and without a difference in reward nothing is trained."""
    share = sum(c.isdigit() for c in text) / max(1, len(text))
    return {"accuracy": share, "format": 0.0}, verify(extract_answer(text), *puzzle)[1]


def train() -> None:
    """train_countdown.py without a picture and with the easy reward."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # a deadlock ends here, and shows where
    countdown.score, rl_run.plot_run = digit_score, lambda run: None
    score = train_countdown.score_completions

    def score_and_keep(drawn, prompts, texts, *rest):
        scores = score(drawn, prompts, texts, *rest)
        SEEN.extend((text, *puzzle, s.reward) for (_, puzzle), text, s in zip(drawn, texts, scores))
        return scores
    train_countdown.score_completions = score_and_keep
    train_countdown.main()


def forked(folder: Path, rank: int, environment: dict, flags: list[str], mishap) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = ["train_countdown.py", *flags]
    torch.set_num_threads(1)
    mishap(rank)
    try:
        train()
    finally:
        (folder / f"seen{rank}").write_text(json.dumps(SEEN))


# mishaps: what happens to a process. They are put in before it starts; the product knows nothing of them


def nothing(rank: int) -> None:
    pass


def stop_in_step_2(rank: int) -> None:
    """The last process alone gets the signal."""
    class Stop:
        steps = 0

        @property
        def requested(self) -> bool:
            self.steps += 1
            return self.steps == 2 and rank == int(os.environ.get("WORLD_SIZE", 1)) - 1

        def end(self) -> None:
            pass
    train_countdown.StopRequest = Stop


def in_step_2(action):
    """Before the second step is rewarded, and so before its update."""
    describe, steps = train_countdown.group_advantages, []

    def spy(*args, **settings):
        steps.append(1)
        if len(steps) == 2:
            action()
        return describe(*args, **settings)
    train_countdown.group_advantages = spy


def last_process_dies(rank: int) -> None:
    def die():
        raise OverflowError("the process of rank 1 dies in step 2")
    if rank == 1:
        in_step_2(die)


def gpu_memory_is_full(rank: int) -> None:
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
    in_step_2(fill)


def host_memory_is_full(rank: int) -> None:
    def fill():
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 28, resource.RLIM_INFINITY))
        torch.empty(2 ** 31)
    in_step_2(fill)


def memory_of_the_last_process_is_full(rank: int) -> None:
    if rank == 1:
        gpu_memory_is_full(rank)


def no_network(rank: int) -> None:
    def unknown(*args, **settings):
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    socket.getaddrinfo = unknown


# ----------------------------------------------------------------------------------------------------------- starting
@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports this file, and what load() imports late, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([Path(__file__).stem, "transformers.models.auto.tokenization_auto",
                                        "transformers.models.qwen2.configuration_qwen2"])
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """start(*flags, world=2) -> exit code, output, errors and rewarded completions of each process, in order of rank.
    world=0: without torchrun."""
    def run(*flags, world: int = 0, mishap=nothing):
        folder = tmp_path_factory.mktemp("processes")
        processes = [server.Process(target=forked, args=(folder, rank, environment, list(map(str, flags)), mishap))
                     for rank, environment in enumerate(torchrun_environments(world) or [{}])]
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not hung, f"ranks {hung} hang: {[(folder / f'err{rank}').read_text() for rank in hung]}"
        return [SimpleNamespace(code=process.exitcode, out=(folder / f"out{rank}").read_text(),
                                error=(folder / f"err{rank}").read_text(),
                                seen=json.loads((folder / f"seen{rank}").read_text()))
                for rank, process in enumerate(processes)]
    return run


def torchrun_environments(world: int) -> list[dict[str, str]]:
    """Of each process; torchrun's documentation lists them under "Environment Variables".

    Those on this machine are said to be as many as its cores: a thread each, as threads wait long on busy cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
             "LOCAL_WORLD_SIZE": str(os.cpu_count()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in range(world)]


@contextmanager
def torchrun(*flags, mishap=nothing):
    """The real one, with two processes of this file."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
         mishap.__name__, *map(str, flags)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()  # the two end themselves after LIMIT, if they are still there


@pytest.fixture(scope="module")
def runs(start, base, tmp_path_factory):
    """Run folders by name. "whole" is the run of one process; the others stopped after step 2."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"whole": SimpleNamespace(run=folder / "whole", processes=start(
        "--model", base, "--out", folder / "whole", *FLAGS))}
    for name, world, fsdp in (("one", 0, False), ("two", 2, False), ("two, fsdp", 2, True), ("one, fsdp", 1, True)):
        flags = ("--model", base, "--out", folder / name, *FLAGS, *(["--fsdp"] if fsdp else []))
        found[name] = SimpleNamespace(run=folder / name, processes=start(*flags, world=world, mishap=stop_in_step_2))
    for name, saved in found.items():
        codes = [process.code for process in saved.processes]
        assert set(codes) == {0 if name == "whole" else 130}, (name, codes, saved.processes[-1].error)
    return found


def rows_of(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES}
            for row in read_jsonl(run / "metrics.jsonl")]


def assert_same_rows(rows, expected, tolerance=1e-4):
    """One row a step, to rounding; a gap between two log-probs is rounding and nothing else."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        assert row == {name: pytest.approx(value, rel=tolerance, abs=2e-6) for name, value in other.items()}


def weights(run: Path) -> dict:
    return load_file(run / "checkpoint" / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- the run
@pytest.mark.parametrize("name", ["two", "two, fsdp", "one, fsdp"])
def test_processes_together_draw_and_reward_what_one_does(runs, name):
    """Puzzles, completions and rewards of step 1, in order of ranks: the same, to the last bit."""
    shares = [[1, 2], [3]]["one" in name]  # groups of each rank
    step_1 = [row for groups, process in zip(shares, runs[name].processes) for row in process.seen[:4 * groups]]
    assert step_1 == runs["one"].processes[0].seen[:12]
    assert [len(process.seen) for process in runs[name].processes] == [2 * 4 * groups for groups in shares]


@pytest.mark.parametrize("name", ["one", "two", "two, fsdp", "one, fsdp"])
def test_processes_together_log_what_one_does(runs, name):
    """Steps 0 to 2 with reward, loss, entropy, gradient norm: one row a step, as only rank 0 logs."""
    rows = rows_of(runs["whole"].run)[:3]
    assert all(row["gradient_norm"] > 0.01 and row["equal_groups"] == 0 for row in rows[1:])
    assert_same_rows(rows_of(runs[name].run), rows)
    assert [row["step"] for row in read_jsonl(runs[name].run / "rollouts.jsonl")] == [1] * 12 + [2] * 12


@pytest.mark.parametrize("name", ["two", "two, fsdp", "one, fsdp"])
def test_processes_together_train_as_one_does(runs, base, name):
    """Two steps of AdamW: where the weights went, relative to the length of the way."""
    before, one, other = load_file(base / "model.safetensors"), weights(runs["one"].run), weights(runs[name].run)
    assert before.keys() == one.keys() == other.keys()
    for key in before:
        assert (other[key] - one[key]).norm() <= 1e-3 * (one[key] - before[key]).norm(), key


def test_only_rank_0_prints(runs):
    for name in ("two", "two, fsdp"):
        first, second = runs[name].processes
        assert "stopped after step 2; continue with" in first.out and second.out == ""


# -------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("saved, world", [("one", 2), ("two", 0), ("two", 3), ("one, fsdp", 2), ("two, fsdp", 1),
                                          ("two, fsdp", 0), ("two, fsdp", 3)])
def test_a_run_resumes_on_another_number_of_processes(start, runs, tmp_path, saved, world):
    """The last step is that of the run which was never interrupted."""
    shutil.copytree(runs[saved].run, tmp_path / "run")
    processes = start("--resume", tmp_path / "run", world=world)
    assert [process.code for process in processes] == [0] * max(1, world), processes[-1].error
    assert_same_rows(rows_of(tmp_path / "run"), rows_of(runs["whole"].run), 1e-3)


# ----------------------------------------------------------------------------------------------------------- accidents
def test_when_a_process_dies_torchrun_ends_the_others_and_the_run_can_go_on(base, start, runs, tmp_path):
    """Rank 1 raises in step 2, rank 0 waits for it in the gather. The checkpoint is that of step 1."""
    flags = (*FLAGS, "--save-every", 1)
    with torchrun("--model", base, "--out", tmp_path / "run", *flags, mishap=last_process_dies) as process:
        _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "OverflowError: the process of rank 1 dies in step 2" in error
    assert run_folder.load_checkpoint(tmp_path / "run")[2]["step"] == 1
    assert start("--resume", tmp_path / "run")[0].code == 0
    assert_same_rows(rows_of(tmp_path / "run"), rows_of(runs["whole"].run), 1e-3)


def test_ctrl_c_under_torchrun_saves_once_and_stops_all_at_the_same_step(base, tmp_path):
    """The terminal sends SIGINT to torchrun alone, since its processes are sessions of their own. It passes the signal
    on, once (a second would kill them), and waits for 30 seconds, or for --shutdown-timeout."""
    run = tmp_path / "run"
    log, deadline = run / "metrics.jsonl", time.monotonic() + LIMIT
    with torchrun("--model", base, "--out", run, *FLAGS, "--steps", 100_000, "--save-every", 100_000) as process:
        while process.poll() is None and time.monotonic() < deadline and not (
                log.exists() and log.read_text().count("\n") > 2):  # two steps are done
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=LIMIT)
    assert log.exists(), error
    last = rows_of(run)[-1]["step"]
    assert out.count(f"stopped after step {last}; continue with") == 1, error
    assert error.count("stopping after this step") == 2
    assert run_folder.load_checkpoint(run)[2]["step"] == last >= 2


@pytest.mark.parametrize("mishap", [gpu_memory_is_full, pytest.param(host_memory_is_full, marks=pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="no /proc to read the memory in use from"))])
def test_out_of_memory_says_what_to_lower_and_the_run_can_go_on(base, start, runs, tmp_path, mishap):
    """In step 2, with a checkpoint of step 1. Smaller micro-batches change no row."""
    process, = start("--model", base, "--out", tmp_path / "run", *FLAGS, "--save-every", 1, mishap=mishap)
    line, = [line for line in process.error.splitlines() if "error:" in line]  # the others are the bar's
    assert process.code == 2 and "Traceback" not in process.error
    assert re.match(r"error: out of memory \([Tt]ried to allocate [\d.]+ \w+\); lower --micro-batch-tokens", line)
    assert "the last checkpoint is whole" in line
    assert run_folder.load_checkpoint(tmp_path / "run")[2]["step"] == 1
    assert start("--resume", tmp_path / "run", "--micro-batch-tokens", 64)[0].code == 0
    assert_same_rows(rows_of(tmp_path / "run"), rows_of(runs["whole"].run), 1e-3)


def test_when_one_process_gives_up_the_other_does_not_wait_for_it(base, start, runs, tmp_path):
    """Even without torchrun to end it: memory runs out on rank 1; the log that rank 0 alone continues is broken."""
    flags = ("--model", base, "--out", tmp_path / "run", *FLAGS, "--save-every", 1)
    first, last = start(*flags, world=2, mishap=memory_of_the_last_process_is_full)
    assert last.code == 2 and last.error.startswith("error: out of memory") and first.code not in (0, None)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "rew')
    first, last = start("--resume", tmp_path / "run", world=2)
    assert first.code == 2 and "metrics.jsonl, line 3" in first.error and last.code not in (0, None)


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("flags, says", [
    (("--batch-size", 4), "got 1 prompts a step for 2 processes, expected at least one each; raise --batch-size"),
    (("--fsdp", "--lora-rank", 4), "got lora_rank 4, expected at least 0, and without --fsdp"),
    (("--model", "no/model"), "got model 'no/model', which is no directory here and could not be fetched"),
])
def test_every_process_says_the_same_line(base, start, tmp_path, flags, says):
    """Exit code 2, one line, nothing written; nobody waits for the others."""
    processes = start("--model", base, "--out", tmp_path / "run", *FLAGS, *flags, world=2, mishap=no_network)
    for process in processes:
        assert process.code == 2 and process.error.count("\n") == 1 and process.error.startswith(f"error: {says}")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_by_every_process(base, start, runs):
    """Rank 0 alone makes the folder. If it alone looked, the others would go on and fail later, with a traceback."""
    before = {path: path.read_bytes() for path in runs["two"].run.rglob("*") if path.is_file()}
    for process in start("--model", base, "--out", runs["two"].run, *FLAGS, world=2):
        assert process.code == 2 and process.error.count("\n") == 1
        assert process.error.startswith(f"error: got output folder {runs['two'].run}, which already holds a run")
    assert {path: path.read_bytes() for path in runs["two"].run.rglob("*") if path.is_file()} == before


def test_without_a_network_a_hub_id_ends_at_once(monkeypatch):
    """One line, which names the way out: a directory."""
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="check the name and the network, or download it elsewhere and pass its "
                                                "directory"):
        directories.find_directory("no/model")
    assert time.monotonic() - started < 30


if __name__ == "__main__":
    globals()[sys.argv.pop(1)](int(os.environ["RANK"]))
    train()
