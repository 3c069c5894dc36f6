"""What a script does before its recipe and around it: flags from a dataclass, and errors of one line."""

import argparse
import dataclasses
import errno
import inspect
import math
import os
import re
import signal
import sys
import typing
from contextlib import contextmanager

import torch
from tqdm import tqdm

from machinery.checkpoints import BrokenWeights
from machinery.notes import said
from machinery.run_folder import read_run_config


def parse_config(config_class, doc: str, arguments: list[str] | None = None, *, presets: dict[str, dict] | None = None,
                 quick: dict | None = None, changeable: tuple[str, ...] = ()):
    """A frozen dataclass -> its command line -> an instance. Defaults come from fields, help texts from their comments.

    presets adds --preset NAME: a named set of values, which flags override; quick are those of --quick. --resume RUN
    takes all values from that run's config.json; only changeable flags may stand beside it. argparse ends with exit code 2
    on unknown flags and wrong types, the dataclass's own __post_init__ raises ValueError on bad values."""
    said.clear()
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
    values = quick or {} if given.get("quick") else (presets or {}).get(given.pop("preset", None), {})
    with bad_input_exits():
        if given.get("resume"):
            values = dataclasses.asdict(read_run_config(given["resume"], config_class))
        config = config_class(**{**values, **given})
        for name, value in vars(config).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"got {name} {value}, expected a finite number")
        return config


def check_positive(config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"got {name} {getattr(config, name)}, expected more than 0")


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
def broken_weights_exit():
    """Numbers from a model that are not finite end in one line and exit code 2."""
    try:
        yield
    except BrokenWeights as error:
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


@contextmanager
def disk_full_exits(advice: str):
    """Training stands inside: a full disk ends in one line and exit code 2. Checkpoints are built beside their place, so
    the last one stays whole."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and "PytorchStreamWriter" not in str(error):  # torch.save's, which keeps no errno
            raise
        fail(f"the disk is full ({error}); {advice}")


class StopRequest:
    """Ctrl-C (or SIGTERM) lets the step in progress finish, so no checkpoint is taken mid-update. A second kills."""

    def __init__(self):
        self.requested = False
        self.earlier = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(self) -> None:
        """Ctrl-C does again what it did before."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.requested:
            os._exit(130)
        self.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop at once and lose it", file=sys.stderr)
