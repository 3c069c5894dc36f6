"""Means, spreads and differences: whatever a script reports of checkpoints has its interval from here.

    wilson_interval   a share of n problems, one checkpoint: what other problems would have given
    t_interval        one number of each seed: what other seeds would have given
    interval, share   each problem's score for each seed: what other problems and other seeds would have given
    difference        the same of two arms, paired: each problem, and each seed, is compared with itself

Two intervals that overlap say nothing about a difference: where both arms fail at the same problems, those problems cancel
out. So a comparison is always difference(), and it is told apart where its interval does not hold 0.

    python -m machinery.statistics a.json                              # of evaluate.py --json
    python -m machinery.statistics a0.json a1.json a2.json             # three seeds of one arm
    python -m machinery.statistics a0.json a1.json --against b0.json b1.json
    python -m machinery.statistics a0.json a1.json a2.json --column completion_tokens   # what has no right and wrong
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t with 1, 2, ... degrees of freedom


class Scores(NamedTuple):
    """Of one checkpoint."""
    problems: str        # which they are and in which order: a hash of their keys
    values: list[float]  # of each: 1.0 or 0.0, or the share of its samples that are right


class Estimate(NamedTuple):
    mean: float
    low: float           # 95% interval
    high: float
    seeds: list[float]   # each seed's own mean

    def verdict(self) -> str:
        """Of a difference."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


def wilson_interval(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share p of n problems (Wilson 1927), one checkpoint; too wide with several samples a problem."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def t_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean of what seeds gave (Student 1908). With more than ten seeds it is that of ten, a little
    too wide. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"got {len(values)} seed, expected at least 2: one run has no spread; run more seeds")
    width = T_975[min(len(values), len(T_975) + 1) - 2] * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - width), float(np.mean(values) + width)


def over_seeds(values: list[float]) -> Estimate:
    """Of one number of each seed, or of its difference between two arms. Raises ValueError for fewer than two."""
    return Estimate(float(np.mean(values)), *t_interval(values), values)


def interval(runs: list[Scores], resamples: int = RESAMPLES) -> Estimate:
    """95% interval of the mean over S seeds and N problems, by bootstrap (Efron 1979).

    Every resample draws N problems with replacement, the same for all seeds that were asked the same ones, and moves the
    mean over seeds by t * sd(m_s) / sqrt(S), m_s being the seeds' means on all problems and t drawn from Student's t with
    S - 1 degrees of freedom: three seeds are too few to be drawn from. What chance a seed's samples have is in both, so
    the interval is a little too wide rather than too narrow. With one seed it is the interval over problems alone."""
    rng, S, drawn = np.random.default_rng(0), len(runs), {}
    means = np.empty((resamples, S))
    for s, run in enumerate(runs):
        if run.problems not in drawn:
            drawn[run.problems] = rng.multinomial(len(run.values), [1 / len(run.values)] * len(run.values), resamples)
        means[:, s] = drawn[run.problems] @ np.array(run.values) / len(run.values)
    seeds, centres = [float(np.mean(run.values)) for run in runs], means.mean(axis=1)
    if S > 1:
        centres += rng.standard_t(S - 1, resamples) * np.std(seeds, ddof=1) / math.sqrt(S)
    return Estimate(float(np.mean(seeds)), *map(float, np.percentile(centres, [2.5, 97.5])), seeds)


def share(runs: list[Scores]) -> Estimate:
    """interval() of shares: within [0, 1], and Wilson's for one checkpoint with one sample a problem, and where all
    problems of all seeds have the same result, since no resample of them differs."""
    own, found = interval(runs), {value for run in runs for value in run.values}
    if len(found) == 1 or len(runs) == 1 and found == {0, 1}:
        return own._replace(**dict(zip(("low", "high"), wilson_interval(own.mean, len(runs[0].values)))))
    return own._replace(low=max(0.0, own.low), high=min(1.0, own.high))


def check_pairs(a: list, b: list) -> None:
    if len(a) != len(b):
        raise ValueError(f"got {len(a)} and {len(b)} seeds, expected as many of both arms: they are compared in pairs")


def difference(a: list[Scores], b: list[Scores], resamples: int = RESAMPLES) -> Estimate:
    """interval() of a minus b, problem by problem and seed by seed. Raises ValueError where a seed's problems differ."""
    check_pairs(a, b)
    for seed, (own, other) in enumerate(zip(a, b)):
        if own.problems != other.problems or len(own.values) != len(other.values):
            raise ValueError(f"got different problems of the arms' runs number {seed}, expected the same ones: evaluate both "
                             "with the same --task, --level, --split, --n and --seed")
    return interval([Scores(own.problems, [x - y for x, y in zip(own.values, other.values)]) for own, other in zip(a, b)],
                    resamples)


def name_problems(keys) -> str:
    """Which problems these are, and in which order."""
    return hashlib.sha256("\n".join(map(str, keys)).encode()).hexdigest()[:16]


def scores_of(table: dict, name: str = "right") -> Scores:
    """Of what evaluate.py --json writes: of its samples, or, with the name votes, of their majority."""
    return Scores(table["problems"], [value / (table["samples"] if name == "right" else 1) for value in table[name]])


def read_table(path, name: str) -> dict:
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    if name not in table:
        raise ValueError(f"got {path} without {name!r}; expected a file of evaluate.py --json that has it; make it again")
    return table


def read_scores(path, name: str = "right") -> Scores:
    return scores_of(read_table(path, name), name)


def show(files: list[str], against: list[str]) -> None:
    a, b = list(map(read_scores, files)), list(map(read_scores, against))
    for runs in (a, b)[:1 + bool(b)]:
        own, over = share(runs), "problems" if len(runs) == 1 else "problems and seeds"
        print(f"pass@1 {own.mean:.1%} (95% interval over {over} {own.low:.1%} to {own.high:.1%}; seeds "
              f"{', '.join(f'{seed:.1%}' for seed in own.seeds)}; n = {len(runs[0].values)} problems)")
    if b:
        own = difference(a, b)
        print(f"difference {100 * own.mean:+.1f} points ({100 * own.low:+.1f} to {100 * own.high:+.1f}): {own.verdict()}")


def show_column(files: list[str], against: list[str], column: str) -> None:
    a, b = ([read_table(path, column)[column] for path in paths] for paths in (files, against))
    check_pairs(a, b or a)
    for name, values in ((column, a), (column, b), ("difference", [x - y for x, y in zip(a, b)])):
        if values:
            own = over_seeds(values)
            print(f"{name} {own.mean:.4g} (95% t-interval over seeds {own.low:.4g} to {own.high:.4g}; seeds "
                  f"{', '.join(f'{value:.4g}' for value in values)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", help="files of evaluate.py --json, a seed each")
    parser.add_argument("--against", nargs="+", default=[], help="those of another arm, seeds in the same order")
    parser.add_argument("--column", default="", help="any number of these files; over seeds alone")
    args = parser.parse_args()
    try:
        if args.column:
            show_column(args.evaluations, args.against, args.column)
        else:
            show(args.evaluations, args.against)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
