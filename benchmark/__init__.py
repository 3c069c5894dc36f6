"""Our speed beside that of transformers and TRL, and beside what the machine can do: python -m benchmark.speed."""
import machinery  # noqa: F401  (from here on Ctrl-C ends in one line)
