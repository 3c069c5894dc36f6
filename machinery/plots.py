"""Every picture: the curve of one run, several runs side by side, and seeds of one setting as one line with a band.

    python -m machinery.plots runs/zero                                              # runs/zero/curve.png, as training
    python -m machinery.plots runs/zero runs/zero-seed1 runs/zero-seed2 --out docs/zero.png  # a line a run
    python -m machinery.plots "runs/zero*" "runs/dr-grpo*" --mean --out compare.png  # a line a pattern: mean and range
"""

import argparse
import glob
import json
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from matplotlib.ticker import LogLocator, PercentFormatter  # noqa: E402

from machinery.data import read_jsonl  # noqa: E402
from machinery.tasks import find_tasks  # noqa: E402

PANELS = (  # title, metric of the training completions, validation metric or None, share (drawn from 0 to 1) or not
    ("accuracy", "accuracy", "eval_pass@1", True),
    ("accuracy, 3 numbers", "accuracy_3_numbers", "eval_pass@1_3_numbers", True),
    ("accuracy, 4 numbers", "accuracy_4_numbers", "eval_pass@1_4_numbers", True),
    ("format", "format", "eval_format", True),
    ("completion length (tokens)", "completion_tokens", "eval_completion_tokens", False),
    ("backtracks per completion", "backtracks", "eval_backtracks", False),
    ("reflection words per completion", "reflection_words", "eval_reflection_words", False),
    ("completions that mix languages", "mixed", "eval_mixed", True),
    ("truncated", "truncated", "eval_truncated", True),
    ("entropy (nats per token)", "entropy", None, False),
)


def read_metrics(run) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"got {run} without metrics.jsonl; expected the folder of a reinforcement learning run")
    rows = read_jsonl(path)
    if not any("eval_pass@1" in row for row in rows):
        raise ValueError(f"got {path} without eval_pass@1; expected the log of train_countdown.py")
    return rows


def panels_of(run) -> tuple:
    """PANELS, and one for each reward part that they lack and for each other task of the run."""
    more = []
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        tasks = find_tasks(config["task"], config["level"], config["weights"], config["style"], config["eval_task"],
                           config.get("sandbox", ""))
    except (OSError, KeyError, ValueError):  # an older run, or the task's file has moved
        return PANELS
    for i, task in enumerate(tasks):
        prefix = f"{task.name}_" if i else ""
        if i and "accuracy" in task.weights:
            more.append((f"{task.name}: accuracy", f"{prefix}accuracy", f"eval_{prefix}pass@1", True))
        more += [(f"{task.name}: {part}", f"{prefix}{part}", f"eval_{prefix}{part}", False) for part in task.weights
                 if part not in ("accuracy", "format", "language")]
    return *PANELS, *more


def series(groups: list[list[dict]], name: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and mean, smallest and largest value over the runs of one line at each step that all of them logged."""
    logs = [{row["step"]: row[name] for row in rows if name in row} for rows in groups]
    steps = sorted(set.intersection(*map(set, logs)))
    values = [[log[step] for log in logs] for step in steps]
    return steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def plot_lines(lines: dict[str, list[list[dict]]], out, panels=PANELS) -> Path:
    """One figure of panels against steps. Thin: the step's own training completions; dots: validation problems. A panel that
    would show nothing, or nothing but zeros, is left out."""
    panels = [panel for panel in panels if any(any(series(groups, name)[3]) for groups in lines.values()
                                               for name in panel[1:3] if name)]
    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(15, 3.1 * rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (title, train, validation, share) in zip(axes.flat, panels):
        for i, (label, groups) in enumerate(lines.items()):
            colour = colours[i % len(colours)]
            steps, mean, low, high = series(groups, train)
            axis.plot(steps, mean, color=colour, alpha=0.45 if validation else 1, linewidth=1 if validation else 1.5,
                      label="train, each step" if len(lines) == 1 else None)
            if validation:
                steps, mean, low, high = series(groups, validation)
                axis.plot(steps, mean, "o-", color=colour, markersize=4, label="validation" if len(lines) == 1 else label)
            if len(groups) > 1:
                axis.fill_between(steps, low, high, color=colour, alpha=0.15)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if share:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(-0.03, 1.03) if title != "truncated" else axis.set_ylim(bottom=0)
        else:
            axis.set_ylim(bottom=0)
    for axis in axes.flat[max(0, len(panels) - 4):len(panels)]:
        axis.set_xlabel("step")
    if len(lines) > 3:  # too many for a panel
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
    else:
        axes[0, 0].legend(fontsize=8, loc="lower right")
    return write_figure(figure, out)


def plot_run(run) -> Path:
    """RUN/curve.png."""
    return plot_lines({Path(run).name: [read_metrics(run)]}, Path(run) / "curve.png", panels_of(run))


def plot_growth(growth: dict, out, title: str) -> Path:
    """Two panels of completion tokens per second: against sequences at a time, and against the completions' length.

    growth is {"batch" and "length": {sampler: {x: speeds}}}, as benchmark/speed.py measures it. Medians and ranges."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    for axis, key, label in zip(axes, ("batch", "length"), ("sequences at a time", "tokens per completion")):
        for sampler, points in growth[key].items():
            x, speeds = list(points), list(points.values())
            axis.fill_between(x, list(map(min, speeds)), list(map(max, speeds)), alpha=0.2)
            axis.plot(x, list(map(median, speeds)), "o-", markersize=4, label=sampler)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted(set().union(*growth[key].values())))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("completion tokens per second")
    axes[0].legend(fontsize=9)
    figure.suptitle(title, fontsize=10)
    return write_figure(figure, out)


def plot_ladder(table: dict, out) -> Path:
    """R1, stage by stage: a bar a checkpoint, the mean over seeds; dots are the seeds, whiskers pass@1's 95% interval.

    table is what r1.py collects: {"rows": {name: {"label", "pass@1", ..., "seeds": {column: values}}}}."""
    panels = (("pass@1", "pass@1"), ("language", "words in English"),
              ("needless_thinking", "known greetings thought over"), ("arithmetic", "direct arithmetic right"),
              ("completion_tokens", "tokens a completion"))
    rows = list(table["rows"].values())[::-1]  # the first on top
    colours = ["tab:green" if "student" in row["label"] else "tab:blue" for row in rows]
    size = 17, 0.4 * len(rows) + 1.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, constrained_layout=True, sharey=True)
    for axis, (name, title) in zip(axes, panels):
        values = [row.get(name, 0.0) for row in rows]
        axis.barh(range(len(rows)), values, color=colours, alpha=0.55)
        if name == "pass@1":
            errors = [[row["pass@1"] - row["pass@1_low"] for row in rows],
                      [row["pass@1_high"] - row["pass@1"] for row in rows]]
            axis.errorbar(values, range(len(rows)), xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for y, row in enumerate(rows):
            own = row["seeds"].get(name, [])
            axis.plot(own, [y] * len(own), "o", color="black", markersize=3, alpha=0.6)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.25)
        axis.set_xlim(left=0)
        if name != "completion_tokens":
            axis.set_xlim(0, 1.02 if name != "needless_thinking" else max(0.05, 1.1 * max(values)))
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_yticks(range(len(rows)), [row["label"].replace("*", "") for row in rows], fontsize=9)
    return write_figure(figure, out)


def plot_hacking(runs: list[list[dict]], out) -> Path:
    """A policy that trains on the reward model's score alone: the score, what the rule says of the same replies, and
    what is left of the validation puzzles. Thin: each step, whose questions differ; thick: the mean of ten; band: range
    of the runs."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), constrained_layout=True)
    for axis, name, label, colour in (
            (axes[0], "preference", "reward model's score (what it trains on)", "tab:orange"),
            (axes[1], "good", "replies that are good by the rule", "tab:blue"),
            (axes[2], "eval_pass@1", "validation puzzles: pass@1", "tab:green")):
        steps, mean, low, high = series(runs, name)
        if len(steps) > 20:
            axis.plot(steps, mean, color=colour, alpha=0.4, linewidth=1)
            mean = [sum(window) / len(window) for window in (mean[max(0, i - 9):i + 1] for i in range(len(mean)))]
        axis.plot(steps, mean, color=colour, linewidth=2)
        axis.fill_between(steps, low, high, alpha=0.15, color=colour)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if name != "preference":
            axis.set_ylim(-0.03, 1.03)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return write_figure(figure, out)


def write_figure(figure, out) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or quoted patterns with --mean")
    parser.add_argument("--out", default="", help="PNG file; for a single run the default is its curve.png")
    parser.add_argument("--mean", action="store_true",
                        help="one line per argument: the mean of the runs that its pattern matches, with their range")
    args = parser.parse_args()
    try:
        if len(args.runs) == 1 and not args.out and not args.mean:
            print(plot_run(args.runs[0]))
        elif not args.out:
            parser.error("expected --out FILE.png for several runs")
        elif args.mean:
            found = {pattern: sorted(glob.glob(pattern)) for pattern in args.runs}
            if empty := [pattern for pattern, runs in found.items() if not runs]:
                parser.error(f"got {empty[0]!r}, which matches no run folder")
            if max(map(len, found.values())) == 1:
                parser.error("got one run a pattern, expected several of at least one: one run has no spread; drop --mean")
            print(plot_lines({f"{Path(pattern).name}: {len(runs)} run{'s' * (len(runs) > 1)}": list(map(read_metrics, runs))
                              for pattern, runs in found.items()}, args.out))
        else:
            print(plot_lines({Path(run).name: [read_metrics(run)] for run in args.runs}, args.out))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
