"""Our speed beside that of transformers and TRL, and beside what the machine can do: python -m benchmark.speed."""
