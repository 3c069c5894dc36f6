"""Stages: what is done is skipped, what changed is made again, what was killed goes on, and nothing is lost."""

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from machinery import stages
from machinery.data import fingerprint
from machinery.stages import Stage, check_inputs, disk_use, is_done, read_record, run_stage


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A script "copy" that writes --text and the content of --data into --out; returns the command lines it got."""
    calls = []

    @dataclass(frozen=True)
    class Config:
        text: str = "a"
        data: str = ""
        loud: bool = False

    def main():
        flags = sys.argv[1:]
        calls.append(flags)
        given = dict(zip(flags[::2], flags[1::2]))
        if given.get("--text") == "fails":
            raise SystemExit(2)
        if given.get("--text") == "killed":
            Path(given["--out"]).write_text("half")
            raise KeyboardInterrupt
        Path(given["--out"]).write_text(given.get("--text", "a") + Path(given["--data"]).read_text())

    monkeypatch.setitem(sys.modules, "copy_script", types.SimpleNamespace(main=main, Config=Config))
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("1")
    return calls


def stage(text: str = "a", data: str = "in.txt", name: str = "one") -> Stage:
    return Stage(name, f"python copy_script.py --text {text} --data {data} --out {name}.txt")


def run(*stages_):
    return [run_stage(Path("."), stage, list(stages_), "python all.py") for stage in stages_]


def test_a_done_stage_is_skipped(script):
    (first,), (second,) = run(stage()), run(stage())
    assert len(script) == 1 and Path("one.txt").read_text() == "a1" and first == second
    assert read_record(Path("."), stage()) == first and first["minutes"] >= 0
    assert first["command"] == "python copy_script.py --data in.txt --out one.txt"


@pytest.mark.parametrize("change", ("flag", "input", "output", "no output", "no record", "broken record"))
def test_what_changed_is_made_again_and_the_old_is_kept(script, change):
    run(stage())
    if change == "input":
        Path("in.txt").write_text("2")
    elif change == "output":
        Path("one.txt").write_text("edited")
    elif change == "no output":
        Path("one.txt").unlink()
    elif change == "no record":
        Path("stages/one.json").unlink()
    elif change == "broken record":
        Path("stages/one.json").write_text('{"argum')
    before = Path("one.txt").read_text() if change != "no output" else None
    run(stage("b" if change == "flag" else "a"))
    assert len(script) == 2 and Path("one.txt").read_text() == {"flag": "b1", "input": "a2"}.get(change, "a1")
    assert before is None or Path("one.txt.old").read_text() == before


def test_a_new_output_makes_what_follows_again_but_an_equal_one_does_not(script):
    def both(text):
        return run(stage(text), stage("b", "one.txt", "two"))
    both("a")
    Path("stages/one.json").unlink()
    both("a")
    assert len(script) == 3  # one again, with the same content, so two stays
    both("c")
    assert len(script) == 5 and Path("two.txt").read_text() == "bc1" and Path("two.txt.old").read_text() == "ba1"


def test_old_outputs_are_numbered(script):
    for text in "abcd":
        run(stage(text))
    assert [Path(f"one.txt{old}").read_text() for old in ("", ".old", ".old2", ".old3")] == ["d1", "a1", "b1", "c1"]


def test_a_moved_default_is_no_change(script):
    """The command is for the reader: without the flags at their default. Arguments and inputs decide."""
    run(stage())
    config = sys.modules["copy_script"].Config
    del sys.modules["copy_script"].Config  # no defaults known: every flag is written out
    assert stage().short_command == "python copy_script.py --text a --data in.txt --out one.txt"
    run(stage())
    assert len(script) == 1
    sys.modules["copy_script"].Config = config
    assert Stage("x", "python -m copy_script word --text a --no-loud --data 'a b' --json o").short_command == (
        "python -m copy_script word --no-loud --data 'a b' --json o")


def test_a_killed_stage_is_made_again_from_nothing_where_it_cannot_resume(script):
    with pytest.raises(KeyboardInterrupt):
        run(stage("killed"))
    assert not is_done(Path("."), stage("killed")) and Path("one.txt").read_text() == "half"
    with pytest.raises(KeyboardInterrupt):
        run(stage("killed"))
    assert not Path("one.txt.old").exists()  # half a file of our own is nothing to keep
    run(stage("b"))
    assert Path("one.txt").read_text() == "b1" and Path("one.txt.old").exists()  # of another command it is


@pytest.mark.parametrize("saved", ("checkpoint", "checkpoint.old"))
def test_a_killed_training_run_is_resumed_and_its_minutes_count(script, monkeypatch, saved):
    monkeypatch.setattr(stages, "RESUMABLE", ("copy_script",))
    monkeypatch.setattr(sys.modules["copy_script"], "main", lambda: train(script, saved))
    training = Stage("run", "python copy_script.py --data in.txt --out run")
    with pytest.raises(KeyboardInterrupt):
        run(training)
    record = read_record(Path("."), training)
    record["started"] -= 600  # as if the checkpoint had been ten minutes of work
    stages.write_record(Path("."), training, record)
    (record,) = run(training)
    assert script == [["--data", "in.txt", "--out", "run"], ["--resume", "run"]]
    assert 10 <= record["minutes"] < 10.5 and is_done(Path("."), training)


def train(calls, saved):
    calls.append(sys.argv[1:])
    directory = Path("run") / ("checkpoint" if "--resume" in sys.argv else saved)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text("weights")
    if "--resume" not in sys.argv:
        raise KeyboardInterrupt


def test_a_stage_that_fails_keeps_its_exit_code_and_says_how_to_go_on(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(stage("fails"))
    assert stop.value.code == 2 and "continue with: python all.py" in capsys.readouterr().err
    assert not is_done(Path("."), stage("fails")) and sys.argv[0] != "copy_script.py"


def test_a_missing_input_names_the_command_that_makes_it(script):
    one, two = stage(), stage("b", "one.txt", "two")
    with pytest.raises(FileNotFoundError, match=r"stage two without its input one.txt, which stage one makes: "
                                                r"python copy_script.py --data in.txt --out one.txt"):
        check_inputs(two, [one, two])
    for name in ("nowhere.jsonl", "nowhere/checkpoint"):
        with pytest.raises(FileNotFoundError, match=f"without its input {name}; is it spelt right"):
            check_inputs(stage("b", name), [])
    check_inputs(Stage("x", "python copy_script.py --model Qwen/Qwen2.5-1.5B --out x"), [])  # a hub id


def test_a_fingerprint_is_of_weights_and_config(tmp_path):
    directory = tmp_path / "run" / "checkpoint"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "run") == "" == fingerprint(tmp_path / "none")  # no weights, no checkpoint
    save_file({"a": torch.zeros(3)}, directory / "model.safetensors")
    first = fingerprint(tmp_path / "run")
    assert first == fingerprint(directory) != ""
    (directory / "trainer_state.pt").write_text("x")
    assert fingerprint(directory) == first  # what is not the model does not count
    save_file({"a": torch.ones(3)}, directory / "model.safetensors")
    assert fingerprint(directory) != first


def test_disk_use_counts_all_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"0" * 2 ** 20)
    (tmp_path / "c").write_bytes(b"0" * 2 ** 19)
    assert disk_use(tmp_path) == 1.5


# -------------------------------------------------------------------------------------------------- the lists of stages
def recipe(**settings) -> list[Stage]:
    import r1
    return r1.all_stages(r1.Config(**settings), 0)


def comparison(**settings) -> list[Stage]:
    import distill
    return distill.student_stages(distill.Config(**settings))


@pytest.mark.parametrize("list_", (
    recipe(), recipe(style="chat", level="tinyzero", model="some/model", rl_flags="--batch-size 64 --lora-rank 8"),
    recipe(out="my runs/it's r1", model="my models/base"), comparison(out="a b", student="c d", teacher="e f"), comparison(), comparison(logits=True), comparison(data="traces.jsonl"), comparison(non_cot=False, style="chat")),
    ids=("r1", "r1 chat", "r1 spaces", "distill spaces", "distill", "distill logits", "distill data", "distill chat"))
def test_every_command_is_one_that_its_script_takes(list_):
    """Each is parsed as its script parses it, so a flag that was renamed is found here and not after an hour."""
    from machinery.flags import parse_config
    for stage_ in list_:
        module = importlib.import_module(stage_.script)
        flag, out = stage_.words[-2:]
        if stage_.script == "tasks.general":
            assert stage_.flags[0] in ("replies", "pairs") and flag == "--out"
        else:
            config = parse_config(module.Config, "", [*stage_.flags, flag, out])
            assert getattr(config, flag[2:]) == out == str(stage_.out)


@pytest.mark.parametrize("list_", (recipe(), comparison(logits=True, teacher="models/tiny-base"),
                                   comparison(teacher="models/tiny-base", student="models/tiny-llama")),
                         ids=("r1", "distill", "distill into the other family"))
def test_every_input_ships_or_is_made_before(list_):
    made, names = {f"models/tiny-{name}" for name in ("base", "student", "llama")}, [stage_.name for stage_ in list_]
    for stage_ in list_:
        assert set(stage_.inputs) <= made, stage_.name
        made |= {str(stage_.out), str(stage_.out / "checkpoint")}
    assert len(set(names)) == len(names) and len({stage_.out for stage_ in list_}) == len(list_)
