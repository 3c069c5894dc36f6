"""Machines of strangers, simulated where they cannot be had: other systems, consoles, folders, Ctrl-C at any moment."""

import ast
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import preference
import r1
import rejection
import sft
import train_countdown
from conftest import HELPERS
from machinery import checkpoints, memory
from machinery.checkpoints import check_device, find_directory, load, save
from machinery.optimizer import Muon, orthogonal
from machinery.run_folder import append_jsonl

ROOT = Path(r1.__file__).resolve().parent
SOURCES = [path for room in ("", "machinery", "tasks", "experiments", "benchmark") for path in (ROOT / room).glob("*.py")]


def start(*command, **environment):
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


# ------------------------------------------------------------------------------------------------------- other systems
def test_memory_is_known_without_sysconf(monkeypatch):
    """Windows has none; there its own call answers, in KiB. Where neither is, no model is called too large."""
    monkeypatch.delattr(os, "sysconf")
    assert memory.machine_memory() == math.inf and memory.available("cpu") == math.inf

    def installed(pointer):
        pointer._obj.value = 16 * 2 ** 20
        return 1
    kernel = types.SimpleNamespace(GetPhysicallyInstalledSystemMemory=installed)
    monkeypatch.setattr(memory.ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    assert memory.machine_memory() == 16 * 2 ** 30


def test_nothing_that_only_one_system_has_is_imported_at_the_top():
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"fcntl", "msvcrt", "resource", "termios", "pwd", "grp"} & set(names), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf8_whatever_the_system_says(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "w+b") for a in node.args) or ast.unparse(
            node.func) == "os.open"
        if name in ("write_text", "open") and not binary or name == "read_text" and isinstance(node.func, ast.Attribute):
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}, line {node.lineno}"


def test_a_console_without_a_character_shows_a_question_mark(base, tmp_path):
    """cp1252, as Windows has it, and no UTF-8 mode: what a policy wrote must not end its run."""
    task = tmp_path / "snow.jsonl"
    append_jsonl(task, *({"question": f"using {i} ☃ make {i}", "answer": str(i)} for i in range(20)))
    process = start(ROOT / "evaluate.py", "--model", base, "--task", task, "--max-new-tokens", 4, "--show", 1,
                    PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert b"? make" in out and b"pass@1" in out


def test_the_c_locale_without_utf8_mode_is_enough(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    append_jsonl(data, *({"prompt": f"using {i} make {i}\n", "completion": "prüfe ☃"} for i in range(6)))
    process = start(ROOT / "sft.py", "--model", base, "--data", data, "--eval-rows", 2, "--out", tmp_path / "run",
                    LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to read the mapped files from")
def test_a_loaded_model_holds_no_file_of_its_directory(base, tmp_path):
    """On Windows and NFS a mapped file cannot be replaced, and the checkpoint of a resumed run is."""
    model, tokenizer = load(base)
    save(model, tokenizer, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------------------------------- devices
@pytest.mark.parametrize("device, says", (
    ("mps", "expected cpu or cuda, .*MPS has no float64.*no Mac"), ("gpu", "got device 'gpu', expected cpu or cuda"),
    ("cuda:x", "expected cpu or cuda"), ("", "expected cpu or cuda"), ("CPU", "expected cpu or cuda")))
def test_a_device_that_is_none_is_refused(device, says):
    with pytest.raises(ValueError, match=says):
        check_device(device)
    check_device("cpu")


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """CUDA graphs are captured on the current device, which would be cuda:0."""
    chosen = []
    monkeypatch.setattr(checkpoints, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises((RuntimeError, AssertionError)):  # there is no such GPU here
        load(ROOT / "models" / "tiny-student", device="cuda:1")
    load(ROOT / "models" / "tiny-student")
    assert chosen == ["cuda:1"]


@pytest.mark.parametrize("script", (train_countdown, sft, evaluate, rejection, preference),
                         ids=lambda script: script.__name__)
def test_every_script_refuses_it_before_it_reads_a_model(script, refused, tmp_path):
    refused(script, "--device", "mps", "--model", "models/tiny-base",
            *(() if script is evaluate else ("--out", tmp_path / "run")), says=("got device 'mps'", "use --device cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("times, noted", ((30.0, True), (1.2, False)))
def test_bf16_on_a_cpu_without_its_units_is_said(times, noted, base, monkeypatch, capfd):
    monkeypatch.setattr(checkpoints, "slower_in_bf16", lambda: times)
    from machinery import notes
    notes.said.clear()
    load(base, dtype=torch.bfloat16)
    load(base, dtype=torch.float32)
    error = capfd.readouterr().err
    assert ("bfloat16 30 times slower than float32" in error and "--dtype float32" in error) == noted


def test_bf16_is_measured():
    assert 0.05 < checkpoints.slower_in_bf16(64) < 1000


def test_muon_is_that_of_torch_in_fp32():
    """torch.optim.Muon makes orthogonal in bf16: after ten steps of 0.02 the weights are within its rounding."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        first = torch.randn(shape, generator=generator)
        ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
        optimizers = Muon([ours], lr=0.02, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
        for _ in range(10):
            gradient = torch.randn(shape, generator=generator)
            for parameter, optimizer in zip((ours, theirs), optimizers):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert (ours - first).abs().mean() > 0.01 and (ours - theirs).abs().max() < 1e-3
        values = torch.linalg.svdvals(orthogonal(gradient))
        assert 0.6 < values.min() and values.max() < 1.3 and orthogonal(gradient).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ folders and disk
def test_shipped_models_are_found_from_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_directory("models/tiny-base") == ROOT / "models" / "tiny-base"
    process = start(ROOT / "evaluate.py", "--n", 4, "--max-new-tokens", 8)
    assert process.wait(timeout=120) == 0


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
@pytest.mark.parametrize("script", (train_countdown, sft, preference), ids=lambda script: script.__name__)
def test_a_folder_without_write_permission_is_noticed_before_the_work(script, base, refused, tmp_path):
    check_refused_folder(script, base, refused, tmp_path)


@pytest.mark.parametrize("script", (train_countdown, sft, preference, evaluate), ids=lambda script: script.__name__)
def test_permission_is_asked_for_before_the_work(script, base, refused, tmp_path, monkeypatch):
    """As any user, root too: os.access is the one that says no."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_refused_folder(script, base, refused, tmp_path)


def check_refused_folder(script, base, refused, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    append_jsonl(tmp_path / "d.jsonl", *({"prompt": f"{i}", "completion": "1", "chosen": "1", "rejected": "2"}
                                        for i in range(8)))
    flags = {sft: ("--data", tmp_path / "d.jsonl", "--eval-rows", 2),
             preference: ("--data", tmp_path / "d.jsonl", "--eval-pairs", 2)}.get(script, ())
    where = ("--json", locked / "table.json") if script is evaluate else ("--out", locked / "run")
    refused(script, "--model", base, *flags, *where, says=(locked, "cannot be written to"))
    assert not any(locked.iterdir())


# --------------------------------------------------------------------------------------------------------------- Ctrl-C
COMMANDS = {
    "evaluate": ("evaluate.py", "--samples", 64), "train_countdown": ("train_countdown.py", "--out", "RUN"),
    "sft": ("sft.py", "--from-scratch", "tiny", "--data", "ROWS", "--out", "RUN"),
    "rejection": ("rejection.py", "--model", "models/tiny-base", "--out", "RUN/rows.jsonl"),
    "preference": ("preference.py", "--data", "ROWS", "--out", "RUN"),
    "distill": ("distill.py", "--teacher", "models/tiny-base", "--out", "RUN"), "r1": ("r1.py", "--out", "RUN"),
    "a study": ("-m", "experiments.aha", "--out", "RUN"), "speed": ("-m", "benchmark.speed"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see from outside where a script is")
@pytest.mark.parametrize("name, seconds", [*((name, 0) for name in COMMANDS), ("r1", 5), ("sft", 5), ("rejection", 5)])
def test_ctrl_c_is_one_line_and_130(name, seconds, tmp_path):
    """While the script still imports torch, and seconds later, in its work: one line, exit code 130, nothing half
    written."""
    rows = tmp_path / "rows.jsonl"
    append_jsonl(rows, *({"prompt": f"using {i} make {i}\n", "completion": "1" * 400, "chosen": "1" * 200, "rejected": "2"}
                         for i in range(4000)))
    words = [str(word).replace("RUN", str(tmp_path / "run")).replace("ROWS", str(rows)) for word in COMMANDS[name]]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text(encoding="utf-8"):
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error and ("stopped by Ctrl-C" in error or "continue with: python" in out)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".new")]


# ------------------------------------------------------------------------------------- what can be known at the start
def test_few_pairs_are_enough_for_r1():
    """--pairs 400 ended at stage 18 of 35: 512 of them were to be kept out."""
    stage, = [stage for stage in r1.all_stages(r1.Config(pairs=400), 0) if stage.name == "preference"]
    assert stage.words[stage.words.index("--eval-pairs") + 1] == "100"
    stage, = [stage for stage in r1.all_stages(r1.Config(), 0) if stage.name == "preference"]
    assert "--eval-pairs" not in stage.short_command
    with pytest.raises(ValueError, match="pairs 4"):
        r1.Config(pairs=4)


@pytest.mark.parametrize("script, flags, says", (
    (r1, ("--puzzles", 1600, "--level", "three"), ("n=1600", "ask for fewer")),
    (r1, ("--eval-n", 400, "--level", "three", "--puzzles", 1000), ("n=400", "ask for fewer")),
    (r1, ("--max-new-tokens", 2048), ("max_new_tokens 2048", "context of 2048")),
    (r1, ("--student", "models/no"), ("models/no", "no directory here")),
    (r1, ("--rl-flags", "--group-size 7"), ("group_size 7", "must divide")),
    (r1, ("--device", "tpu"), ("got device 'tpu'",)),
    (distill, ("--teacher", "no/checkpoint"), ("no/checkpoint", "without its input")),
    (distill, ("--teacher", "models/tiny-base", "--level", "three", "--n", 1600), ("n=1600", "ask for fewer")),
    (distill, ("--data", "no.jsonl"), ("no.jsonl", "is it spelt right?")),
    (rejection, ("--model", "models/tiny-base", "--rounds", 2, "--base", "models/no"), ("models/no", "no directory here")),
    (rejection, ("--model", "models/tiny-base", "--rounds", 2, "--sft-flags", "--epochs 0"), ("epochs 0",)),
), ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else "")
def test_what_a_late_stage_would_refuse_is_refused_at_the_start(script, flags, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / ("rows.jsonl" if script is rejection else "out")
    refused(script, *flags, "--out", out, says=says)
    assert not list(tmp_path.rglob("*.json*"))


def test_distill_begins_in_a_new_folder(monkeypatch, tmp_path):
    """An early check wanted a file that the command's own first stage makes."""
    begun = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(distill, "run_stage", lambda folder, stage, *rest: begun.append(stage.name))
    monkeypatch.setattr(distill, "results", lambda config: {})
    monkeypatch.setattr(sys, "argv", ["x", "--teacher", "models/tiny-base", "--out", str(tmp_path / "new")])
    (tmp_path / "new").mkdir()
    distill.main()
    assert begun[:3] == ["student-replies", "student-traces", "distill"]


@pytest.mark.skipif(os.name == "nt" or HELPERS < 2, reason="several processes, and signals of POSIX")
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGINT))
def test_the_suite_s_other_processes_end_with_the_first(number, tmp_path):
    """Files of slow tests, one for each process, under this suite's conftest.py; each says which process has it."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    names = "abcde"[:HELPERS + 1]
    for name in names:
        (tmp_path / "tests" / f"test_{name}.py").write_text(
            "import os, time, pathlib, pytest\n@pytest.mark.parametrize('i', range(100))\ndef test(i):\n"
            f"    pathlib.Path('{name}.pid').write_text(str(os.getpid()))\n    time.sleep(0.2)\n")
    first = subprocess.Popen([sys.executable, "-m", "pytest"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files, deadline = [tmp_path / f"{name}.pid" for name in names], time.time() + 60
    while not all(path.exists() and path.read_text() for path in files):
        assert time.time() < deadline and first.poll() is None
        time.sleep(0.05)
    pids = {int(path.read_text()) for path in files}
    assert len(pids) == len(names) and first.pid in pids
    first.send_signal(number)
    first.wait(20)
    for other in pids - {first.pid}:
        while Path(f"/proc/{other}").exists() and "Z" not in Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[:1]:
            assert time.time() < deadline + 20
            time.sleep(0.05)
