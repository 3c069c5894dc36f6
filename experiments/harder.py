"""Increasingly complex tasks: R1-Zero extends its thinking and solves harder problems (arXiv 2501.12948, section 2.2.4).

One run of GRPO on puzzles of three and of four numbers, and one with as many steps on three numbers alone. Both, and the
base, then answer test puzzles of three levels: three numbers, four numbers, and four numbers with targets from 31 to 100,
which neither corpus nor RL ever asked for. Measured: accuracy and thinking over steps, for each count of numbers; what a
limit on tokens costs, and what votes bring, before and after; what RL on easy puzzles does to hard ones.

    python -m experiments.harder             # 3 seeds; 2 cores: see minutes in experiments/results/harder.json
    python -m experiments.harder --seed 0    # one seed, a terminal each; then without --seed for the picture
    python -m experiments.harder --quick     # a minute: does it run? Its numbers mean nothing

All models and seeds are asked the same test puzzles, so differences are paired (machinery/statistics.py). A completion's
tokens do not depend on its limit: what a limit of 128 leaves is counted on the completions with 1,024.
"""

import shlex
from dataclasses import dataclass

import matplotlib.pyplot as plt

from countdown import answer_value, key, sample_puzzles
from experiments.scorer import check_sizes, choose_from_n, powers_of_two, vote
from experiments.study import (begin, finish, has_pieces, judged, markdown, measured, paired, piece, points,
                               run_stages, sample_groups, seed_folder, seeds_to_run, share_axis, text)
from machinery.checkpoints import load
from machinery.data import read_jsonl
from machinery.plots import series, write_figure
from machinery.stages import Stage
from machinery.statistics import Scores, name_problems


@dataclass(frozen=True)
class Config:
    out: str = "runs/harder"       # folder of the study
    seeds: int = 3                 # seeds 0, 1, ...
    seed: int = -1                 # of those only this one, without the picture
    quick: bool = False            # a minute, to see that it runs
    model: str = "models/tiny-base"
    steps: int = 64                # of GRPO, of either run; its learning rate falls to a tenth
    eval_every: int = 8            # steps between evaluations on validation puzzles
    n: int = 128                   # test puzzles of each level
    samples: int = 16              # completions of each: votes of 1 to this many
    max_new_tokens: int = 1024     # a longer completion is cut off

    def __post_init__(self):
        check_sizes(self, "samples")


QUICK = dict(seeds=1, steps=2, eval_every=1, n=4, samples=2, max_new_tokens=64)
LEVELS = {"three": "three numbers", "four": "four numbers", "hundred": "four, targets 31 to 100"}
ARMS = {"base": "base", "easy": "RL on three numbers", "mixed": "RL on three and four"}
COLOURS = {"three": "tab:blue", "four": "tab:orange", "hundred": "tab:green"}


def training(config: Config, seed: int) -> list[Stage]:
    folder, model = shlex.quote(str(seed_folder(config, seed))), shlex.quote(config.model)
    return [Stage(arm, f"python train_countdown.py --model {model} --steps {config.steps} --final-lr 0.1 --level {level} "
                  f"--eval-every {config.eval_every} --max-new-tokens {config.max_new_tokens} --rollouts none "
                  f"{'--batch-size 32 --eval-n 16 ' * config.quick}--seed {seed} --out {folder}/{arm}")
            for arm, level in (("mixed", "laptop"), ("easy", "three"))]


def limits(config: Config) -> list[int]:
    return sorted({config.max_new_tokens, *(limit for limit in powers_of_two(config.max_new_tokens) if limit >= 32)})


def measure(config: Config, arm: str, level: str, seed: int) -> dict:
    """Of each test puzzle: the share of its completions that are right within a limit of tokens, and the share of right
    votes among so many of them."""
    checkpoint = config.model if arm == "base" else seed_folder(config, seed) / arm / "checkpoint"
    model, tokenizer = load(checkpoint)
    puzzles = sample_puzzles(config.n, level=level, split="test", seed=0)
    groups = sample_groups(model.eval(), tokenizer, puzzles, config.samples, config.max_new_tokens, seed, f"{arm}, {level}")
    within, votes, tokens = {limit: [] for limit in limits(config)}, {n: [] for n in powers_of_two(config.samples)}, []
    for puzzle, group in zip(puzzles, groups):
        values = [answer_value(words, puzzle.numbers) for _, _, words in group]
        lengths = [len(completion.token_ids) for _, completion, _ in group]
        for limit, shares in within.items():
            shares.append(sum(value == puzzle.target and length <= limit for value, length in zip(values, lengths))
                          / len(group))
        curve = choose_from_n(values, puzzle.target, {"majority": (vote, [1.0] * len(values))})["majority"]
        for n, shares in votes.items():
            shares.append(curve[n])
        tokens.append(sum(lengths) / len(lengths))
    return {"problems": name_problems(map(key, puzzles)), "within": within, "votes": votes, "tokens": tokens}


def over_steps(config: Config, arm: str, columns: list[str]) -> dict:
    """Validation: {column: {"steps", "mean", "low", "high"}}, the mean over seeds and their range."""
    logs = [read_jsonl(seed_folder(config, seed) / arm / "metrics.jsonl") for seed in range(config.seeds)]
    return {column: dict(zip(("steps", "mean", "low", "high"), series(logs, f"eval_{column}"))) for column in columns}


def collect(config: Config) -> dict:
    found = {(arm, level): [piece(seed_folder(config, seed), f"{arm} {level}") for seed in range(config.seeds)]
             for arm in ARMS for level in LEVELS}

    def runs(arm: str, level: str, table: str, column) -> list[Scores]:
        own = [Scores(one["problems"], one[table][str(column)]) for one in found[arm, level]]
        if arm == "base":  # one checkpoint, whose seeds are more samples of it: the same mean stands against every run
            pooled = [sum(values) / len(own) for values in zip(*(run.values for run in own))]
            return [Scores(own[0].problems, pooled)] * len(own)
        return own

    full = config.max_new_tokens
    tests = {arm: {level: {
        "pass@1": measured(runs(arm, level, "within", full)),
        "tokens": sum(sum(one["tokens"]) / len(one["tokens"]) for one in found[arm, level]) / config.seeds,
        "within": {limit: measured(runs(arm, level, "within", limit)) for limit in limits(config)},
        "votes": {n: measured(runs(arm, level, "votes", n)) for n in powers_of_two(config.samples)},
    } for level in LEVELS} for arm in ARMS}
    pairs = {f"{a} - {b}": {level: paired(runs(a, level, "within", full), runs(b, level, "within", full))
                            for level in LEVELS} for a, b in (("mixed", "base"), ("easy", "base"), ("mixed", "easy"))}
    counts = [f"{column}_{count}_numbers" for column in ("pass@1", "completion_tokens") for count in (3, 4)]
    return {"steps": {"mixed": over_steps(config, "mixed", counts), "easy": over_steps(config, "easy", counts[::2])},
            "test": tests, "differences": pairs}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(1, 5, figsize=(22, 4.2), constrained_layout=True)
    for axis, column, title in ((axes[0], "pass@1", "validation pass@1"),
                                (axes[1], "completion_tokens", "tokens a completion, validation")):
        for count, level in ((3, "three"), (4, "four")):
            line = record["steps"]["mixed"][f"{column}_{count}_numbers"]
            axis.plot(line["steps"], line["mean"], "o-", color=COLOURS[level], markersize=3, label=LEVELS[level])
            axis.fill_between(line["steps"], line["low"], line["high"], color=COLOURS[level], alpha=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step of RL on both")
        axis.set_ylim(bottom=0)
    share_axis(axes[0], "step of RL on both", log=False)
    for axis, table, title in ((axes[2], "within", "limit on tokens"), (axes[3], "votes", "completions that vote")):
        for level in LEVELS:
            for arm, style in (("base", "--"), ("mixed", "-")):
                points = record["test"][arm][level][table]
                x, own = list(map(int, points)), list(points.values())
                axis.plot(x, [point["mean"] for point in own], style, marker="o", markersize=3, color=COLOURS[level],
                          label=f"{LEVELS[level]}, {'before' if arm == 'base' else 'after'}")
                axis.fill_between(x, [point["low"] for point in own], [point["high"] for point in own],
                                  color=COLOURS[level], alpha=0.1)
        axis.set_title(f"test pass@1 against {title}" if table == "within" else "test maj@N", fontsize=10)
        share_axis(axis, title)
    for i, (arm, label) in enumerate(ARMS.items()):
        own = [record["test"][arm][level]["pass@1"] for level in LEVELS]
        places = [place + 0.27 * (i - 1) for place in range(len(LEVELS))]
        mean = [entry["mean"] for entry in own]
        axes[4].bar(places, mean, 0.25, color=f"C{3 + i}", alpha=0.6, label=label)
        axes[4].errorbar(places, mean, [[max(0.0, entry["mean"] - entry["low"]) for entry in own],
                                        [max(0.0, entry["high"] - entry["mean"]) for entry in own]],
                         fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes[4].set_xticks(range(len(LEVELS)), LEVELS.values(), fontsize=8)
    axes[4].set_title("test pass@1, 95% intervals", fontsize=10)
    share_axis(axes[4], "", log=False)
    for axis in axes[[0, 4]]:
        axis.legend(fontsize=7)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
    write_figure(figure, path)


def table(record: dict) -> str:
    tests, most = record["test"], record["config"]["samples"]
    rows = []
    for level in LEVELS:
        for arm, own in ((arm, tests[arm][level]) for arm in ARMS):
            seeds = "one checkpoint" if arm == "base" else " ".join(f"{seed:.1%}" for seed in own["pass@1"]["seeds"])
            rows.append([ARMS[arm], LEVELS[level], text(own["pass@1"]), seeds, text(own["votes"][str(most)]),
                         f"{own['tokens']:.0f}"])
    pairs = [[" ".join(ARMS.get(word, "minus") for word in pair.split()), *(judged(own[level]) for level in LEVELS)]
             for pair, own in record["differences"].items()]
    return (markdown(["model", "test puzzles", "pass@1", "of the seeds", f"maj@{most}", "tokens"], rows) + "\n\n"
            + markdown(["paired difference", *LEVELS.values()], pairs))


def verdict(record: dict) -> str:
    tests, pairs, steps = record["test"], record["differences"], record["steps"]["mixed"]
    tokens = {count: steps[f"completion_tokens_{count}_numbers"]["mean"] for count in (3, 4)}
    four = tests["mixed"]["four"]
    return (f"RL takes four numbers from {text(tests['base']['four']['pass@1'])} to {text(four['pass@1'])}, "
            f"{points(pairs['mixed - base']['four'])}, and three from {text(tests['base']['three']['pass@1'])} to "
            f"{text(tests['mixed']['three']['pass@1'])}; a completion grows from {tokens[4][0]:.0f} to "
            f"{tokens[4][-1]:.0f} tokens with four numbers and from {tokens[3][0]:.0f} to {tokens[3][-1]:.0f} with "
            f"three. RL on three numbers alone moves four by "
            f"{points(pairs['easy - base']['four'])} ({pairs['easy - base']['four']['verdict']}); targets that nobody ever "
            f"asked for move by {points(pairs['mixed - base']['hundred'])} ({pairs['mixed - base']['hundred']['verdict']}).")


def main() -> None:
    config = begin(Config, __doc__, QUICK, levels=tuple(LEVELS))
    for seed in seeds_to_run(config):
        folder = seed_folder(config, seed)
        if not has_pieces(folder, [f"{arm} {level}" for arm in ARMS for level in LEVELS]):
            run_stages(folder, training(config, seed), "python -m experiments.harder")
        for arm in ARMS:
            for level in LEVELS:
                piece(folder, f"{arm} {level}", lambda: measure(config, arm, level, seed))
    if config.seed < 0:
        finish(config, "harder", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
