"""What the scripts stand on and a first reading skips; README has a line on each file.

Importing any of it makes a process fit for a stranger's machine: a console that lacks a character shows ? in its place,
and Ctrl-C ends in one line, whenever it comes."""

import os
import sys

if sys.version_info < (3, 11):
    raise SystemExit(f"error: got Python {sys.version.split()[0]}, expected 3.11 or newer; make the virtual environment with one")


def end_in_one_line(kind, error, traceback) -> None:
    """sys.excepthook."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("\nstopped by Ctrl-C; nothing is half written, and the same command again goes on from what is finished",
          file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)


sys.excepthook = end_in_one_line
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a captured one has not
        stream.reconfigure(errors="replace")
