"""Runs commands of this repository one after the other, and skips what is done: r1.py and distill.py are lists of them.

A stage is one command with one output: a run folder, a JSONL file or a table. It is done when its record says so and
the record still tells the truth: the same command, inputs with the same content, an output with the same content. So a
changed flag, a new checkpoint upstream or a broken file makes a stage run again, and what follows it. A stage that was
killed goes on from its last checkpoint. What a new run replaces is moved aside to NAME.old, never deleted.

    FOLDER/stages/NAME.json     command, inputs, output, minutes: written when the stage begins and when it ends
"""

import importlib
import json
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from machinery.data import fingerprint
from machinery.flags import fail, parse_config
from machinery.run_folder import saved_checkpoint, write_whole

INPUT_FLAGS = ("--model", "--data", "--preference", "--non-cot", "--teacher")  # what they name is an input
RESUMABLE = ("train_countdown", "sft")


@dataclass(frozen=True)
class Stage:
    name: str
    command: str  # python SCRIPT.py or python -m MODULE, its flags, and last --out (or --json) with what it makes

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)

    @property
    def script(self) -> str:
        """The module to import."""
        return self.words[2] if self.words[1] == "-m" else self.words[1].removesuffix(".py")

    @property
    def flags(self) -> list[str]:
        """All but what it makes."""
        return self.words[3 if self.words[1] == "-m" else 2:-2]

    @property
    def out(self) -> Path:
        """A run folder, or a file."""
        return Path(self.words[-1])

    @property
    def short_command(self) -> str:
        """As one would type it: without the flags that name a default."""
        config = getattr(importlib.import_module(self.script), "Config", None)
        defaults = {f"--{field.name.replace('_', '-')}": str(field.default)
                    for field in fields(config) if field.type is not bool} if config else {}
        words, given = self.words[:3 if self.words[1] == "-m" else 2], iter(self.flags)
        for word in given:
            if word not in defaults:
                words.append(word)
            elif (value := next(given)) != defaults[word]:
                words += [word, value]
        return shlex.join(words + self.words[-2:])

    @property
    def inputs(self) -> list[str]:
        given = [value for flag, value in zip(self.flags, self.flags[1:]) if flag in INPUT_FLAGS]
        tasks = [name for flag, value in zip(self.flags, self.flags[1:]) if flag == "--task"
                 for name in re.split("[,=]", value) if name.lower().endswith((".py", ".jsonl"))]
        return given + tasks


def read_record(folder: Path, stage: Stage) -> dict:
    try:
        return json.loads((folder / "stages" / f"{stage.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_record(folder: Path, stage: Stage, record: dict) -> None:
    write_whole(folder / "stages" / f"{stage.name}.json", json.dumps(record, indent=2) + "\n")


def beginning(stage: Stage) -> dict:
    """What a stage depends on, as its record says from the start."""
    return {"arguments": stage.flags, "inputs": {name: fingerprint(name) for name in stage.inputs}}


def begins_with(record: dict, start: dict) -> bool:
    return all(record.get(name) == value for name, value in start.items())


def is_done(folder: Path, stage: Stage) -> bool:
    record = read_record(folder, stage)
    return bool(record.get("output")) and record["output"] == fingerprint(stage.out) and begins_with(
        record, beginning(stage))


def check_inputs(stage: Stage, stages: list[Stage], made: set[str] = frozenset()) -> None:
    """Raises FileNotFoundError with the command that makes what is missing. made: what will be there in time."""
    for name in stage.inputs:
        if name in made or fingerprint(name):
            continue
        maker = next((other for other in stages if name in (str(other.out), str(other.out / "checkpoint"))), None)
        if maker:
            raise FileNotFoundError(f"got stage {stage.name} without its input {name}, which stage {maker.name} makes: "
                                    f"{maker.short_command}")
        if name.endswith((".jsonl", "/checkpoint")):  # anything else may be a hub id
            raise FileNotFoundError(f"got stage {stage.name} without its input {name}; is it spelt right?")


def check_stages(stages: list[Stage]) -> None:
    """What can be known of all of them before the first one runs: flags that a script refuses, inputs that are not there
    and that no earlier stage makes."""
    made = set()
    for stage in stages:
        config = getattr(importlib.import_module(stage.script), "Config", None)
        if config:
            parse_config(config, f"stage {stage.name}", [*stage.flags, *stage.words[-2:]])
        check_inputs(stage, [], made)
        made |= {str(stage.out), str(stage.out / "checkpoint")}


def set_aside(path: Path) -> None:
    """Renames what is in the way to NAME.old, NAME.old2, ..."""
    old, number = path.with_name(path.name + ".old"), 1
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old{number}")
    path.rename(old)
    print(f"moved {path}, made by another command or from other inputs, to {old}")


def run_stage(folder: Path, stage: Stage, stages: list[Stage], go_on: str) -> dict:
    """Runs the stage unless it is done -> its record. go_on: the command that continues after an interruption."""
    if is_done(folder, stage):
        return read_record(folder, stage)
    check_inputs(stage, stages)
    record, start = read_record(folder, stage), beginning(stage)
    ours = begins_with(record, start) and not record.get("output")
    earlier = record.get("minutes", 0.0) if ours else 0.0
    arguments = stage.flags + stage.words[-2:]
    saved = saved_checkpoint(stage.out)
    if ours and stage.script in RESUMABLE and saved:
        earlier += max(0.0, saved.stat().st_mtime - record["started"]) / 60  # an attempt that was killed
        arguments = ["--resume", stage.out]
    elif stage.out.is_dir() and any(stage.out.iterdir()) or stage.out.is_file():
        if ours:  # killed before anything was worth keeping
            shutil.rmtree(stage.out) if stage.out.is_dir() else stage.out.unlink()
        else:
            set_aside(stage.out)
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    start = {"command": stage.short_command, **start}  # the command is for the reader; a default that moves changes it
    write_record(folder, stage, {**start, "minutes": earlier, "started": started})
    print(f"\n=== {stage.name}\n{stage.short_command}", flush=True)
    before, sys.argv = sys.argv, [f"{stage.script}.py", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        importlib.import_module(stage.script).main()
    except SystemExit as stop:
        if stop.code:
            minutes = earlier + (time.time() - started) / 60
            write_record(folder, stage, {**start, "minutes": minutes, "started": time.time()})
            print(f"stage {stage.name} stopped; continue with: {go_on}", file=sys.stderr)
            raise
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    record = {**start, "minutes": earlier + (time.time() - started) / 60, "output": fingerprint(stage.out)}
    if not record["output"]:
        fail(f"stage {stage.name} ended without {stage.out}; its own message stands above")
    write_record(folder, stage, record)
    return record


def disk_use(folder: Path) -> float:
    """MiB of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2 ** 20
