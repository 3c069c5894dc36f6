"""What every script does around its recipe: flags from a dataclass, one-line errors, run folders and checkpoints.

A run is a folder:  config.json  metrics.jsonl  samples.jsonl  curve.png
                    checkpoint/ (a Hugging Face directory plus trainer_state.pt)
"""

import argparse
import dataclasses
import inspect
import json
import pickle
import re
import signal
import sys
import typing
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from directories import replace_directory
from distributed import any_rank, barrier, full_state, rank
from model import load, save


# -------------------------------------------------------------------------------------------------------- flags, errors


def parse_config(config_class, doc: str, arguments: list[str] | None = None, *, presets: dict[str, dict] | None = None,
                 changeable: tuple[str, ...] = ()):
    """A frozen dataclass -> its command line -> an instance. Defaults come from fields, help texts from their comments.

    presets adds --preset NAME: a named set of values, which flags override. --resume RUN takes all values from that
    run's config.json; only changeable flags may stand beside it. argparse ends with exit code 2 on unknown flags and
    wrong types, the dataclass's own __post_init__ raises ValueError on bad values.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), flags=re.MULTILINE))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # only flags given
    if presets:
        parser.add_argument("--preset", choices=presets, help="a named set of values; flags override them")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        text = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        action = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            action = {"action": argparse.BooleanOptionalAction}
        flag = f"--{field.name.rstrip('_').replace('_', '-')}"  # a field from_ is --from, which Python keeps for itself
        parser.add_argument(flag, dest=field.name, help=text, **action)
    given = vars(parser.parse_args(arguments))
    fixed = [name for name in given if name != "resume" and name not in changeable]
    if given.get("resume") and fixed:
        allowed = " or with " + ", ".join(f"--{name.replace('_', '-')}" for name in changeable) if changeable else ""
        parser.error(f"got --resume together with --{fixed[0].replace('_', '-')}; a resumed run keeps every setting of "
                     f"its config.json, so give --resume alone{allowed}")
    values = (presets or {}).get(given.pop("preset", None), {})
    with bad_input_exits():
        if given.get("resume"):
            values = dataclasses.asdict(read_run_config(given["resume"], config_class))
        return config_class(**{**values, **given})


def fail(message) -> typing.NoReturn:
    """One line on stderr and exit code 2."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)  # print() would go on in the bar's line
    raise SystemExit(2) from None


@contextmanager
def bad_input_exits():
    """Start-up code stands inside: what the user can mend ends in one line and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


@contextmanager
def out_of_memory_exits(advice: str):
    """Training stands inside: running out of memory ends in one line and exit code 2; the last checkpoint stays."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # plain RuntimeErrors
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(k in str(error) for k in known):
            raise
        what = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        fail(f"out of memory{f' ({what[0]})' if what else ''}; {advice}")


class StopRequest:
    """Ctrl-C (or SIGTERM) lets the step in progress finish, so no checkpoint is taken mid-update. A second kills."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step; press Ctrl-C again to stop at once and lose it", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- the folder


def create_run(out: str, config) -> Path:
    """A new run folder with its config.json. Raises FileExistsError if something is there: nothing is overwritten.

    All ranks: each looks, and after that the first one makes it.
    """
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


def rewind_log(path: Path, step: int) -> None:
    """Drops the rows that a killed run wrote past its checkpoint at this step; the resumed run writes them again."""
    if path.exists():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        staging = path.with_suffix(".tmp")
        staging.unlink(missing_ok=True)
        append_jsonl(staging, *kept)
        staging.replace(path)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, model, tokenizer, trainer_state: dict) -> None:
    """checkpoint/ = a model directory that any tool loads, plus trainer_state.pt (optimizer, step). Replaced whole.

    All ranks: under FSDP each has a part of every tensor; the first one writes.
    """
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
