"""A run is a folder:  config.json  metrics.jsonl  rollouts.jsonl  curve.png
                    checkpoint/ (a Hugging Face directory plus trainer_state.pt)
"""

import dataclasses
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from machinery.checkpoints import load, replace_directory, save
from machinery.distributed import any_rank, barrier, full_state, rank


def create_run(out: str, config) -> Path:
    """A new run folder with its config.json. Raises FileExistsError if something is there: nothing is overwritten.

    All ranks: each looks, and after that the first one makes it."""
    run = Path(out)
    if any_rank(run.exists() and any(run.iterdir())):
        raise FileExistsError(f"got output folder {run}, which already holds a run; name a new one with --out, "
                              f"or continue it with --resume {run}")
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return run


def append_jsonl(path: Path, *rows: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path) -> list[dict]:
    """Rows of a JSONL file. Raises ValueError with file and line number at a line that is no JSON object."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"got a broken line in {path}, line {number}: {error}; "
                                 "expected one JSON object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"got {type(row).__name__} in {path}, line {number}; expected a JSON object")
            rows.append(row)
    return rows


def check_rows(rows: list[dict], path, fields: tuple[str, ...], expected: str) -> None:
    """Raises ValueError with the line number where a field is missing, no text, or empty; a completion may be empty."""
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) and (row[name].strip() or name == "completion") for name in fields):
            words = fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"
            raise ValueError(f"got {path}, line {number} without text in {words}; expected {expected}")


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a kill leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


def rewind_log(path: Path, step: int) -> None:
    """Drops the rows that a killed run wrote past its checkpoint at this step; the resumed run writes them again.

    Rows stand in the order of their steps, "step" first. Half a line past the checkpoint is what a kill leaves. Raises
    ValueError with the line number where a line before it is broken."""
    if not path.exists():
        return
    kept, last = [], -1
    with open(path, encoding="utf-8") as file:
        lines = list(file)  # splitlines() would also part at U+2028, which stands in a model's text as it is
    for number, line in enumerate(lines, 1):
        try:
            last = json.loads(line)["step"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            begun = re.match(r'{"step": (\d+)\D', line)
            past = int(begun[1]) > step if begun else last == step
            if number < len(lines) or not past:
                raise ValueError(f"got a broken line in {path}, line {number}: {error}; expected one JSON object a line; "
                                 "mend it, or move the file away") from None
            break
        if last > step:
            break
        kept.append(line)
    write_whole(path, "".join(kept))


def save_checkpoint(run: Path, model, tokenizer, trainer_state: dict) -> None:
    """checkpoint/ = a model directory that any tool loads, plus trainer_state.pt (optimizer, step). Replaced whole.

    All ranks: under FSDP each has a part of every tensor; the first one writes."""
    state, trainer_state = full_state(model.state_dict()), full_state(trainer_state)
    if rank() == 0:
        staging = run / "checkpoint.new"
        save(model, tokenizer, staging, state)
        torch.save(trainer_state, staging / "trainer_state.pt")
        replace_directory(staging, run / "checkpoint")
    barrier()


def load_checkpoint(run, *, dtype=torch.float32, device="cpu"):
    """-> (model, tokenizer, trainer_state). Raises FileNotFoundError if missing, ValueError if corrupt or truncated."""
    directory = find_checkpoint(run)
    path = directory / "trainer_state.pt"
    if not path.exists():
        raise FileNotFoundError(f"got checkpoint {directory} without trainer_state.pt, so training cannot continue "
                                f"exactly; start a new run from it with --model {directory}")
    model, tokenizer = load(directory, dtype=dtype, device=device)
    try:
        if not zipfile.is_zipfile(path):  # torch.load would take it for another format and raise whatever that raises
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"got a corrupt or truncated {path} ({type(error).__name__}); start a new run from its "
                         f"weights with --model {directory}") from None
    return model, tokenizer, state


def saved_checkpoint(run) -> Path | None:
    names = ("checkpoint", "checkpoint.old")  # .old: killed between the two renames of replace_directory
    return next((Path(run) / name for name in names if (Path(run) / name).is_dir()), None)


def find_checkpoint(run) -> Path:
    if found := saved_checkpoint(run):
        return found
    raise FileNotFoundError(f"got run folder {run} without a checkpoint; expected {Path(run) / 'checkpoint'}, "
                            "as training scripts write it")


def read_run_config(run, config_class):
    """The resolved config of an existing run; --resume uses it instead of the command line's other flags."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"got --resume {run}, but there is no {path}; expected the folder of a run")
    try:
        return config_class(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"got a config in {path} that this script cannot read ({error}); "
                         "was it written by another script?") from None
