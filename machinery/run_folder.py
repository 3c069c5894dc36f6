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

from machinery.checkpoints import check_finite, load, replace_directory, save
from machinery.data import read_text
from machinery.distributed import any_rank, barrier, full_state, rank


def create_run(out: str, config) -> Path:
    """A new run folder with its config.json. Raises FileExistsError if something is there: nothing is overwritten but the
    config.json of a run that ended before it had anything to keep.

    All ranks: each looks, and after that the first one makes it."""
    run = Path(out)
    check_free(run)
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return run


def check_free(out) -> None:
    """Raises FileExistsError where a run folder, or anything else, is in the way, and PermissionError where none can be
    made; all ranks."""
    run, began = Path(out), Path(out) / "config.json"  # all there is of a run that ended before its first step
    empty = run.exists() and list(run.iterdir()) == [began] and b'"out": ' in began.read_bytes()
    if any_rank(run.exists() and not empty and any(run.iterdir())):
        go_on = f"continue it with --resume {run}" if saved_checkpoint(run) else (
            "delete it: it has no checkpoint to go on from")
        raise FileExistsError(f"got output folder {run}, which already holds a run; name a new one with --out, or {go_on}")
    above = next(path for path in (run, *run.absolute().parents) if path.exists())
    if any_rank(not os.access(above, os.W_OK)):
        raise PermissionError(f"got output folder {run}, but {above} cannot be written to; name another one with --out")


def check_new_file(flag: str, path: str) -> None:
    """Raises OSError where a table could not be written after the work. "" stands for no file."""
    if path and Path(path).exists():
        raise FileExistsError(f"got {flag} {path}, which exists and is never overwritten; name another file")
    if path and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"got {flag} {path}, but there is no folder {Path(path).parent}; make it first")
    if path and not os.access(Path(path).parent, os.W_OK):
        raise PermissionError(f"got {flag} {path}, but {Path(path).parent} cannot be written to")


def append_jsonl(path: Path, *rows: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a kill leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


def write_json(path: Path, value) -> None:
    """Whole or not at all; what holds nothing nested stands on one line."""
    pretty = json.dumps(value, indent=1)
    write_whole(path, re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: " ".join(match[0].split()), pretty) + "\n")


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
    """checkpoint/ = a model directory that any tool loads, plus trainer_state.pt (optimizer, step). Replaced whole, and
    never by broken weights: then it raises BrokenWeights.

    All ranks: under FSDP each has a part of every tensor; the first one writes."""
    state, trainer_state = full_state(model.state_dict()), full_state(trainer_state)
    if rank() == 0:
        for name, tensor in state.items():
            check_finite(tensor, model.source, name)
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


def what_to_do(run, step: int, began: str) -> str:
    """After numbers that are not finite: nothing that training did, before its first step; weights to go on with, if any
    were saved (none that are broken ever are). began: the checkpoint that training began with."""
    if not step:
        return ""
    saved = saved_checkpoint(run)
    return (f". Lower --learning-rate; where that does not help, {began} brought them, or the data"
            f"{f'; the last good weights are in {saved}' if saved else ''}")


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
        return config_class(**json.loads(read_text(path)))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"got a config in {path} that this script cannot read ({error}); "
                         "was it written by another script?") from None
