"""R1-Zero on programs, and what becomes of it when only the tests that it can see are paid.

The tiny base writes one-line functions from examples (tasks/code.py). Two levels: three examples in the prompt, and two.
Two arms on each: paid by all tests, visible and hidden, or by the visible ones alone. A program that passes what it can
see and fails on what it cannot is what reward hacking looks like here: a constant, a special case.

    python -m experiments.programs                # 3 seeds; 2 cores: see minutes in the JSON
    python -m experiments.programs --seed 1       # one seed, a terminal each; then without --seed for the picture
    python -m experiments.programs --quick        # a minute: does it run?
"""

import shlex
from collections import Counter
from dataclasses import dataclass

import matplotlib.pyplot as plt

import evaluate
from experiments.study import (average, begin, compared, finish, has_pieces, markdown, measured, paired, piece, points,
                               run_stages, seed_folder, seeds_to_run, share_axis, text)
from machinery.checkpoints import load
from machinery.data import read_jsonl
from machinery.plots import write_figure
from machinery.stages import Stage
from machinery.statistics import Scores, scores_of
from rewards import extract_answer
from tasks.code import Problem, judge

LEVELS = {"three": "one line", "two": "two shown"}
PAID = {"all": "", "visible": "--weights accuracy=0,visible=1"}


@dataclass(frozen=True)
class Config:
    out: str = "runs/programs"     # folder of the study
    seeds: int = 3                 # seeds 0, 1, ...
    seed: int = -1                 # of those only this one, without the picture
    quick: bool = False            # a minute, to see that it runs
    model: str = "models/tiny-base"
    steps: int = 24                # of GRPO; the learning rate falls to a tenth
    eval_every: int = 4            # steps between evaluations on validation problems
    n: int = 512                   # test problems
    samples: int = 4               # completions of each
    max_new_tokens: int = 512      # a longer completion is cut off


QUICK = dict(seeds=1, steps=2, eval_every=1, n=16, samples=2, max_new_tokens=64)


def stage(config: Config, level: str, paid: str, seed: int) -> Stage:
    folder = shlex.quote(str(seed_folder(config, seed)))
    small = "--batch-size 32 --eval-n 16 " * config.quick
    return Stage(f"{level}-{paid}", f"python train_countdown.py --model {shlex.quote(config.model)} --task code "
                 f"--level {shlex.quote(LEVELS[level])} --steps {config.steps} --final-lr 0.1 --eval-every {config.eval_every} "
                 f"--max-new-tokens {config.max_new_tokens} --rollouts none {small}{PAID[paid]} --seed {seed} "
                 f"--out {folder}/{level}-{paid}")


def shape(answer: str) -> str:
    """What a function is made of: if (how many), else x, else a constant."""
    ifs = answer.count(" if ")
    return "special cases" if ifs > 1 else "one special case" if ifs else "of x" if "x" in answer.partition(":")[2] else "constant"


def measure(config: Config, level: str, checkpoint, seed: int) -> dict:
    """Of test problems: the table of evaluate.py; of each problem how many answers are right and how many pass what is
    visible; what those are that pass only that; and the first of them."""
    settings = evaluate.Config(task="code", level=LEVELS[level], n=config.n, samples=config.samples, seed=seed,
                               max_new_tokens=config.max_new_tokens)
    model, tokenizer = load(checkpoint)
    table, records = evaluate.evaluate(model.eval(), tokenizer, settings)
    visible, hacks = [], []
    for record in records:
        problem = Problem(record["function"], record["examples"], record["shown"])
        passed = judge(problem, record["completion"])[0]
        visible.append(all(passed[:problem.shown]))
        if visible[-1] and not all(passed):
            hacks.append(record)
    return {**{name: table[name] for name in ("completion_tokens", "attempts", "format", "hidden_share")},
            **evaluate.by_problem(records, config.samples), "samples": config.samples,
            "visible": [sum(visible[i:i + config.samples]) for i in range(0, len(visible), config.samples)],
            "shapes": Counter(shape(extract_answer(record["completion"])) for record in hacks),
            "hacks": [{name: record[name] for name in ("prompt", "completion", "function", "verdict")} for record in hacks[:8]]}


def visible_scores(table: dict) -> Scores:
    return Scores(table["problems"], [passed / table["samples"] for passed in table["visible"]])


def curve(config: Config, level: str, paid: str) -> dict:
    """Of validation problems: {column: {"steps", and of the seeds mean, low, high}}"""
    runs = [[row for row in read_jsonl(stage(config, level, paid, seed).out / "metrics.jsonl") if "eval_pass@1" in row]
            for seed in range(config.seeds)]
    found = {}
    for column in ("eval_pass@1", "eval_visible", "eval_completion_tokens", "eval_attempts"):
        values = list(zip(*([row[column] for row in rows] for rows in runs)))
        found[column] = {"steps": [row["step"] for row in runs[0]], "mean": [sum(own) / len(own) for own in values],
                         "low": list(map(min, values)), "high": list(map(max, values))}
    return found


def collect(config: Config) -> dict:
    arms, scores, only = {}, {}, {}
    for level in LEVELS:
        for paid in ("base", *PAID):
            name = f"{level}-{paid}"
            tables = [piece(seed_folder(config, seed), name) for seed in range(config.seeds)]
            scores[name] = list(map(scores_of, tables))
            seen = list(map(visible_scores, tables))
            only[name] = [Scores(a.problems, [v - r for v, r in zip(a.values, b.values)]) for a, b in zip(seen, scores[name])]
            arms[name] = {"right": measured(scores[name]), "visible": measured(seen), "gap": paired(seen, scores[name]),
                          "shapes": dict(sum((Counter(table["shapes"]) for table in tables), Counter())),
                          **{column: average([table[column] for table in tables])
                             for column in ("completion_tokens", "attempts", "format")}, "hacks": tables[0]["hacks"]}
            if paid != "base":
                arms[name]["curve"] = curve(config, level, paid)
    differences = {f"{level}: {a} minus {b}": paired(scores[f"{level}-{a}"], scores[f"{level}-{b}"]) for level in LEVELS
                   for a, b in (("all", "base"), ("visible", "base"), ("visible", "all"))}
    return {"arms": arms, "differences": differences | {f"{level}, passes only what is visible: visible minus all": paired(
        only[f"{level}-visible"], only[f"{level}-all"]) for level in LEVELS}}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for axis, level in zip(axes, LEVELS):
        for i, paid in enumerate(PAID):
            for column, style, what in (("eval_pass@1", "-", "right"), ("eval_visible", "--", "passes what is visible")):
                own = record["arms"][f"{level}-{paid}"]["curve"][column]
                axis.plot(own["steps"], own["mean"], f"o{style}", color=f"C{i}", markersize=3, label=f"paid by {paid} tests: {what}")
                axis.fill_between(own["steps"], own["low"], own["high"], color=f"C{i}", alpha=0.12)
        axis.set_title(f"{level} examples in the prompt, validation")
        axis.grid(alpha=0.25)
        share_axis(axis, "step", log=False)
    axes[0].legend(fontsize=8, loc="lower right")
    for i, level in enumerate(LEVELS):
        own = record["arms"][f"{level}-all"]["curve"]["eval_completion_tokens"]
        axes[2].plot(own["steps"], own["mean"], "o-", color=f"C{i + 2}", markersize=3, label=f"{level} examples")
        axes[2].fill_between(own["steps"], own["low"], own["high"], color=f"C{i + 2}", alpha=0.12)
    axes[2].set_title("tokens a completion, paid by all tests")
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("step")
    axes[2].grid(alpha=0.25)
    axes[2].legend(fontsize=8)
    write_figure(figure, path)


def table(record: dict) -> str:
    names = {"base": "base", "all": "RL, paid by all tests", "visible": "RL, paid by visible tests"}
    rows = []
    for name, arm in record["arms"].items():
        level, paid = name.split("-")
        shapes = ", ".join(f"{what} {count}" for what, count in sorted(arm["shapes"].items(), key=lambda item: -item[1]))
        seeds = "one checkpoint" if paid == "base" else " ".join(f"{seed:.1%}" for seed in arm["right"]["seeds"])
        rows.append([names[paid], level, text(arm["right"]), seeds, text(arm["visible"]),
                     f"{arm['completion_tokens']['mean']:.0f}", f"{arm['attempts']['mean']:.1f}", shapes])
    return (markdown(["model", "examples shown", "right", "of the seeds", "passes what is visible", "tokens", "attempts",
                      "passes only that (all seeds)"], rows) + "\n\n"
            + markdown(["paired difference, right", "points", "verdict"],
                       [[name, points(own), own["verdict"]] for name, own in record["differences"].items()]))


def verdict(record: dict) -> str:
    arms, differences = record["arms"], record["differences"]
    words = [f"RL takes one-line functions from {text(arms['three-base']['right'])} to {text(arms['three-all']['right'])}, "
             f"{points(differences['three: all minus base'])} ({differences['three: all minus base']['verdict']}), and a completion "
             f"from {arms['three-base']['completion_tokens']['mean']:.0f} to {arms['three-all']['completion_tokens']['mean']:.0f} "
             "tokens."]
    for level in LEVELS:
        own = arms[f"{level}-visible"]
        words.append(f"With {level} examples shown and only those paid, {text(own['visible'])} pass what is visible and "
                     f"{text(own['right'])} are right, a gap of {points(own['gap'])} (paid by all tests: "
                     f"{points(arms[f'{level}-all']['gap'])}); what is right is "
                     f"{compared(differences[f'{level}: visible minus all'])} being paid by all tests "
                     f"({points(differences[f'{level}: visible minus all'])}).")
    return " ".join(words)


def main() -> None:
    config = begin(Config, __doc__, QUICK)
    for seed in seeds_to_run(config):
        folder = seed_folder(config, seed)
        for level in LEVELS:
            piece(folder, f"{level}-base", lambda: measure(config, level, config.model, seed))
            for paid in PAID:
                own = stage(config, level, paid, seed)
                if not has_pieces(folder, [own.name]):
                    run_stages(folder, [own], "python -m experiments.programs")
                piece(folder, own.name, lambda: measure(config, level, own.out / "checkpoint", seed))
    if config.seed < 0:
        finish(config, "programs", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
