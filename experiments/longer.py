"""What would let R1-Zero go on? One change each against the run of 64 steps.

The run of docs/results.md ("Longer runs") slows down. If what it lacks is exploration, one of these should help: a lower
learning rate, clip-higher (DAPO, arXiv 2503.14476), a KL to the base, a higher temperature, larger groups. Each arm is
that run with one flag changed, on seed 0. The best of them on validation puzzles (--again, several where they are next to
equal) and the default then run with all seeds, and are compared on test puzzles, paired.

    python -m experiments.longer --seeds 1                                   # all arms; 2 cores: see minutes in the JSON
    python -m experiments.longer --seeds 1 --arm "temperature 1.2"           # one arm, a terminal each
    python -m experiments.longer --again "temperature 1.2,KL to the base"    # 3 seeds of both and of the default
    python -m experiments.longer --quick                                     # a minute: does it run?

With one update a batch the ratio is 1 and no clip acts; so clip-higher stands beside two passes over a batch without it.
"""

import shlex
from dataclasses import dataclass

import matplotlib.pyplot as plt

from countdown import sample_puzzles
from experiments import endings
from experiments.study import (begin, finish, has_pieces, markdown, measured, paired, piece, points, run_stages,
                               seed_folder, seeds_to_run, share_axis, text)
from machinery.data import read_jsonl
from machinery.plots import write_figure
from machinery.stages import Stage
from machinery.statistics import scores_of

ARMS = {
    "default": "",
    "half the rate": "--learning-rate 3.5e-4",
    "two passes": "--inner-epochs 2",
    "clip-higher": "--inner-epochs 2 --clip-high 0.28",
    "KL to the base": "--kl-coef 0.01",
    "temperature 1.2": "--temperature 1.2",
    "groups of 32": "--group-size 32",
}


@dataclass(frozen=True)
class Config:
    out: str = "runs/longer"       # folder of the study
    seeds: int = 3                 # seeds 0, 1, ... of the default and of --again; of the other arms seed 0
    seed: int = -1                 # of those only this one, without the picture
    arm: str = ""                  # only this arm, without the picture
    again: str = ""                # the best arms on validation puzzles, with commas between
    quick: bool = False            # a minute, to see that it runs
    model: str = "models/tiny-base"
    steps: int = 64                # of GRPO; the learning rate falls to a tenth
    eval_every: int = 8            # steps between evaluations on validation puzzles
    n: int = 512                   # test puzzles
    samples: int = 4               # completions of each
    max_new_tokens: int = 1024     # a longer completion is cut off

    def __post_init__(self):
        for name in filter(None, (self.arm, *self.again.split(","))):
            if name not in ARMS:
                raise ValueError(f"got arm {name!r}, expected one of {', '.join(ARMS)}")


QUICK = dict(seeds=1, steps=2, eval_every=1, n=8, samples=2, max_new_tokens=64)


def stage(config: Config, arm: str, seed: int) -> Stage:
    folder, name = shlex.quote(str(seed_folder(config, seed))), arm.replace(" ", "-")
    small = "--batch-size 32 --eval-n 16 " * config.quick
    return Stage(name, f"python train_countdown.py --model {shlex.quote(config.model)} --steps {config.steps} --final-lr 0.1 "
                 f"--eval-every {config.eval_every} --max-new-tokens {config.max_new_tokens} --rollouts none {small}"
                 f"{ARMS[arm]} --seed {seed} --out {folder}/{name}")


def measure(config: Config, arm: str, seed: int, split: str = "test") -> dict:
    """At temperature 1. The run's own curve is at the arm's temperature, and so no basis for a choice."""
    puzzles = sample_puzzles(config.n, split=split, seed=0)
    checkpoint = config.model if arm == "base" else stage(config, arm, seed).out / "checkpoint"
    return endings.measure(checkpoint, puzzles, samples=config.samples, max_new_tokens=config.max_new_tokens, seed=seed)


def seeds_of(config: Config, arm: str) -> range:
    return range(config.seeds if arm in ("default", *config.again.split(",")) else 1)


def curve(config: Config, arm: str, seed: int) -> list[dict]:
    """Validation against sampled tokens."""
    tokens, rows = 0, []
    for row in read_jsonl(stage(config, arm, seed).out / "metrics.jsonl"):
        tokens += row.get("tokens", 0)
        if "eval_pass@1" in row:
            rows.append({"step": row["step"], "tokens": tokens, **{name: row[name] for name in (
                "eval_pass@1", "eval_pass@1_4_numbers", "eval_truncated", "entropy", "equal_groups") if name in row}})
    return rows


def collect(config: Config) -> dict:
    arms, runs = {}, {}
    for arm in ARMS:
        tables = [piece(seed_folder(config, seed), arm) for seed in seeds_of(config, arm)]
        runs[arm] = list(map(scores_of, tables))
        chosen_by = [scores_of(piece(seed_folder(config, seed), f"{arm} validation")) for seed in seeds_of(config, arm)]
        shared = min(len(runs[arm]), len(runs["default"]))
        arms[arm] = {"pass@1": measured(runs[arm]), "validation": measured(chosen_by),
                     "minus default": paired(runs[arm][:shared], runs["default"][:shared]),
                     "endings": tables[0]["endings"], "curves": [curve(config, arm, seed) for seed in seeds_of(config, arm)]}
    return {"base": piece(seed_folder(config, 0), "base")["endings"], "arms": arms}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    panels = (("eval_pass@1", "validation pass@1"), ("eval_pass@1_4_numbers", "four numbers"),
              ("entropy", "entropy (nats, at the arm's temperature)"))
    for axis, (column, title) in zip(axes, panels):
        for i, (name, arm) in enumerate(record["arms"].items()):
            for seed, rows in enumerate(arm["curves"]):
                rows = [row for row in rows if column in row]
                axis.plot([row["tokens"] / 1e6 for row in rows], [row[column] for row in rows], "o-", color=f"C{i}",
                          markersize=3, alpha=1 if seed == 0 else 0.4, label=name if seed == 0 else None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if column == "entropy":
            axis.set_ylim(bottom=0)
            axis.set_xlabel("sampled tokens (millions)")
        else:
            share_axis(axis, "sampled tokens (millions)", log=False)
    axes[0].legend(fontsize=8)
    write_figure(figure, path)


def table(record: dict) -> str:
    rows = []
    for name, arm in record["arms"].items():
        last = arm["curves"][0][-1]
        rows.append([name, text(arm["validation"]), text(arm["pass@1"]),
                     " ".join(f"{seed:.1%}" for seed in arm["pass@1"]["seeds"]),
                     "" if name == "default" else points(arm["minus default"]),
                     f"{last['tokens'] / 1e6:.1f}", f"{last['entropy']:.3f}" if "entropy" in last else ""])
    found = {"base": {"endings": record["base"]}} | record["arms"]
    return (markdown(["arm", "validation pass@1", "test pass@1", "of the seeds", "minus default, paired",
                      "sampled tokens, millions", "entropy at the end, at its own temperature"], rows)
            + "\n\n" + endings.table(found, "checkpoint, seed 0"))


def verdict(record: dict) -> str:
    arms = {name: arm for name, arm in record["arms"].items() if name != "default"}

    def said(own: dict) -> str:
        words = {word: [name for name, arm in own.items() if arm["minus default"]["verdict"] == word]
                 for word in ("better", "worse", "not told apart")}
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in words.items() if names)

    once = {name: arm for name, arm in arms.items() if len(arm["pass@1"]["seeds"]) == 1}
    again = {name: arm for name, arm in arms.items() if name not in once}
    return (f"The default ends at {text(record['arms']['default']['pass@1'])}. Against it, paired over test puzzles"
            + f" and seeds, {said(again)}; with one seed, over puzzles alone," * bool(again) + f" {said(once)}.")


def main() -> None:
    config = begin(Config, __doc__, QUICK)
    for arm in [config.arm] if config.arm else ARMS:
        for seed in seeds_to_run(config):
            if seed in seeds_of(config, arm):
                folder = seed_folder(config, seed)
                if not has_pieces(folder, [arm, f"{arm} validation"]):
                    own = stage(config, arm, seed)
                    run_stages(folder, [own], "python -m experiments.longer", lock=f"{own.name}.lock")
                piece(folder, arm, lambda: measure(config, arm, seed))
                piece(folder, f"{arm} validation", lambda: measure(config, arm, seed, "validation"))
    piece(seed_folder(config, 0), "base", lambda: measure(config, "base", 0))
    if config.seed < 0 and not config.arm:
        finish(config, "longer", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
