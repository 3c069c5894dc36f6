"""A process reward model (PRM): reward each line of the search, not only the answer. DeepSeek-R1 (arXiv 2501.12948),
section 4.2, gave it up for three reasons: steps are hard to define, labels are hard to get, and a policy hacks it.

In Countdown a step is a line, a whole path of moves, and the exact solver labels it by where the path ends: behind
"26-9=17 need,9 2 1.17+1=18 need,9 2?18:", can 9 and 2 still make 18? So the second reason is gone, and the other two
can be measured:

    scorer     a step scorer on a checkpoint's traces, read at the end of each line and, to see how far it looks ahead,
               at its ":"; accuracy and calibration on traces of test puzzles
    rerank     best of N by its scores, against majority voting and pass@N, at equal tokens: the scorer reads what the
               policy writes, so it pays twice for a completion
    noise      the same with 10% and 20% of the training labels flipped
    reward     GRPO with the scores as rewards of single lines: normalised as in DeepSeekMath, section 4.1.3, beside the
               outcome reward and alone; and simply paid, line by line, beside it and alone. As a control, the exact
               solver's labels in place of the scores, normalised beside the outcome

    python -m experiments.prm                  # 3 seeds; 2 cores: see minutes in experiments/results/prm.json
    python -m experiments.prm --seed 0         # one seed, a terminal each; then without --seed for the picture
    python -m experiments.prm --quick          # a minute: does it run? Its numbers mean nothing

Traces for training are of train puzzles, what is reported is of test ones, the curves of GRPO of validation ones. Lines
are Countdown's own, so this study knows no other task; nor does mcts.py.
"""

import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt

import evaluate
import train_countdown
from countdown import answer_value, make_prompt, sample_puzzles
from experiments.line_rewards import Step, Trace, find_steps, score_traces, train_on_lines
from experiments.scorer import (best, by_puzzle, check_sizes, choose_from_n, measured_curves, names_of_test_puzzles,
                                reliability, runs_of, test_puzzles, train_scorer, vote)
from experiments.study import (average, begin, compared, draw_shares, finish, judged, markdown, measured, paired, piece,
                               points, sample_groups, seed_folder, seeds_to_run, share_axis, text)
from machinery.checkpoints import load
from machinery.data import read_jsonl
from machinery.plots import write_figure
from machinery.run_folder import saved_checkpoint
from machinery.statistics import scores_of
from preference import load_reward_model, save_reward_model


@dataclass(frozen=True)
class Config:
    out: str = "runs/prm"            # folder of the study
    seeds: int = 3                   # seeds 0, 1, ...
    seed: int = -1                   # of those only this one, without the picture
    quick: bool = False              # a minute, to see that it runs
    model: str = "models/tiny-student"  # the policy whose traces are scored, and where scorer and RL start
    train_puzzles: int = 1200        # train puzzles whose traces the scorer learns from
    train_samples: int = 4           # completions of each
    epochs: int = 2                  # passes over them
    learning_rate: float = 1e-3      # AdamW peak of the scorer, falling linearly to zero
    rl_learning_rate: float = 5e-4   # of GRPO, falling to a tenth; 7e-4 all along teaches this size nothing
    n: int = 200                     # test puzzles a seed; seeds take different ones
    samples: int = 64                # completions of each: best of 1 to this many
    steps: int = 40                  # of GRPO
    batch_size: int = 128            # completions a step, in groups of 16
    prm_weight: float = 1.0          # of the step rewards' advantages beside the outcome's
    eval_n: int = 512                # puzzles of GRPO's evaluations: validation in its curves, test before and after
    max_new_tokens: int = 1024       # a longer completion is cut off

    def __post_init__(self):
        if self.samples < 2 or self.batch_size % 16:
            raise ValueError(f"got samples {self.samples} and batch_size {self.batch_size}, expected at least 2, and "
                             "groups of 16")
        check_sizes(self, "samples")


QUICK = dict(seeds=1, train_puzzles=12, train_samples=4, epochs=1, n=8, samples=8, steps=1, batch_size=32, eval_n=16,
             max_new_tokens=64)
KINDS = ("ahead", "line", "answer")
NOISES = (0.0, 0.1, 0.2)  # shares of flipped training labels
EXACT = "outcome + exact labels"  # the arm without a scorer
ARMS = {  # (weight of the outcome's advantage, of the lines' advantages, how lines are rewarded)
    "outcome": (1, 0, "normalised"),
    "outcome + PRM": (1, 1, "normalised"),
    "PRM alone": (0, 1, "normalised"),
    "outcome + PRM, paid per line": (1, 1, "paid"),
    "PRM alone, paid per line": (0, 1, "paid"),
    EXACT: (1, 1, "normalised"),
}
JUDGES = ("PRM, last", "PRM, answer", "PRM-weighted vote")  # that are compared with the majority, puzzle by puzzle


def scorer_examples(traces: list[Trace], noise: float, seed: int) -> list[tuple]:
    """Traces with a step, as train_scorer takes them; a share of the labels flipped."""
    rng = random.Random(f"{seed}, {noise}")
    return [(t.prompt_ids + t.token_ids, [len(t.prompt_ids) + step.index for step in t.steps],
             [abs(step.label - (rng.random() < noise)) for step in t.steps]) for t in traces if t.steps]


def weigh(steps: list[Step], scores: list[float]) -> dict[str, float]:
    """One number for a whole search, in each way that one could mean it. A search without a line counts 0."""
    lines = [score for step, score in zip(steps, scores) if step.kind == "line"] or [0.0]
    answer = [score for step, score in zip(steps, scores) if step.kind == "answer"]
    return {"mean": sum(lines) / len(lines), "min": min(lines), "last": lines[-1],
            "answer": answer[-1] if answer else 0.0}


def rerank(traces: list[Trace], scores: list[list[float]], samples: int) -> dict[str, dict[int, list[float]]]:
    """Of each puzzle the share of right choices, by each way to choose one of N completions, N = 1, 2, 4, ... samples."""
    curves = []
    for first in range(0, len(traces), samples):
        group = traces[first:first + samples]
        weights = [weigh(trace.steps, row) for trace, row in zip(group, scores[first:first + samples])]
        by = {way: [weight[way] for weight in weights] for way in ("mean", "min", "last", "answer")}
        ways = {"majority": (vote, [1.0] * samples), "PRM-weighted vote": (vote, by["last"]),
                **{f"PRM, {way}": (best, own) for way, own in by.items()}}
        curves.append(choose_from_n([answer_value(trace.text, group[0].puzzle.numbers) for trace in group],
                                    group[0].puzzle.target, ways))
    return by_puzzle(curves)


def rl_config(config: Config, folder: Path, arm: str, seed: int) -> train_countdown.Config:
    return train_countdown.Config(
        model=config.model, steps=config.steps, batch_size=config.batch_size, learning_rate=config.rl_learning_rate, final_lr=0.1,
        eval_every=max(1, config.steps // 8), eval_n=config.eval_n, max_new_tokens=config.max_new_tokens, seed=seed,
        rollouts="sampled", out=str(folder / ("rl-" + re.sub(r"[^a-zA-Z]+", "-", arm))))


def resumed(settings: train_countdown.Config) -> train_countdown.Config:
    """The same run, from its checkpoint where a killed study left one."""
    if saved_checkpoint(settings.out):
        return replace(settings, resume=settings.out)
    shutil.rmtree(settings.out, ignore_errors=True)  # killed before anything was worth keeping
    return settings


def traces_of(config: Config, folder, seed: int) -> dict[str, list[Trace]]:
    """The policy's searches: of train puzzles for the scorer to learn from, and of test ones."""
    model, tokenizer = load(config.model)
    asked = {"train": (sample_puzzles(config.train_puzzles, split="train", seed=seed), config.train_samples, seed),
             "test": (test_puzzles(config.n, seed), config.samples, seed + 1000)}

    def write(puzzles, samples, seed, what):
        groups = sample_groups(model, tokenizer, puzzles, samples, config.max_new_tokens, seed, f"{what} traces")
        return [[completion.token_ids for _, completion, _ in group] for group in groups]

    traces = {}
    for what, (puzzles, samples, own_seed) in asked.items():
        rows = piece(folder, f"{what} traces", lambda: write(puzzles, samples, own_seed, what))
        prompts = tokenizer([make_prompt(puzzle) for puzzle in puzzles], add_special_tokens=False)["input_ids"]
        traces[what] = [Trace(puzzle, prompt, token_ids, tokenizer.decode(token_ids, skip_special_tokens=True),
                              find_steps(tokenizer.convert_ids_to_tokens(token_ids), puzzle))
                        for puzzle, prompt, group in zip(puzzles, prompts, rows) for token_ids in group]
    return traces


def score_and_rerank(config: Config, folder, traces: dict[str, list[Trace]], noise: float, seed: int) -> dict:
    """Trains a scorer on labels of which a share is flipped, and measures it. The clean one stays in FOLDER/scorer."""
    train, test = traces["train"], traces["test"]
    scorer = train_scorer(config.model, scorer_examples(train, noise, seed), epochs=config.epochs,
                          learning_rate=config.learning_rate, seed=seed, what=f"scorer, {noise:.0%} of labels flipped")
    if noise == 0:
        save_reward_model(scorer, load(config.model)[1], folder / "scorer")
    scores = score_traces(scorer, test)
    pairs = {kind: [(p, step.label) for t, row in zip(test, scores) for step, p in zip(t.steps, row)
                    if step.kind == kind] for kind in KINDS}
    return {**{kind: reliability(p) for kind, p in pairs.items()}, "rerank": rerank(test, scores, config.samples),
            "tokens_a_completion": sum(len(t.token_ids) for t in test) / len(test),
            "train_tokens": sum(len(t.token_ids) for t in train), "train_steps": sum(len(t.steps) for t in train)}


def on_test_puzzles(config: Config, checkpoint) -> dict:
    model, tokenizer = load(checkpoint)
    table, records = evaluate.evaluate(model.eval(), tokenizer, evaluate.Config(
        n=config.eval_n, max_new_tokens=config.max_new_tokens))
    return table | evaluate.by_problem(records, 1)


def collect(config: Config) -> dict:
    """The committed JSON."""
    folders = [seed_folder(config, seed) for seed in range(config.seeds)]
    scored = [{str(noise): piece(folder, f"scorer {noise}") for noise in NOISES} for folder in folders]
    asked, scorers = names_of_test_puzzles(config.n, config.seeds), {}
    for noise in map(str, NOISES):
        scorers[noise] = {
            kind: {**{name: average([s[noise][kind][name] for s in scored])
                      for name in ("n", "accuracy", "majority_class", "calibration_error")},
                   "curve": scored[0][noise][kind]["curve"]} for kind in KINDS}
        scorers[noise]["rerank"] = measured_curves(asked, [s[noise]["rerank"] for s in scored])
    clean = [s["0.0"]["rerank"] for s in scored]
    judges = {way: {size: paired(runs_of(asked, clean, way, str(int(size) // 2)), runs_of(asked, clean, "majority", size))
                    for size in list(clean[0]["majority"])[1:]} for way in JUDGES}  # equal tokens: the scorer reads them all
    parameters = sum(p.numel() for p in load(config.model)[0].parameters())
    arms, outcome = {}, None
    for arm, (_, prm_weight, _) in ARMS.items():
        logs = [read_jsonl(Path(rl_config(config, folder, arm, seed).out) / "metrics.jsonl")
                for seed, folder in enumerate(folders)]
        reads = 2 if prm_weight and arm != EXACT else 0
        curves = []
        for log, s in zip(logs, scored):  # 2 operations a parameter and token written or read, 6 where it is trained on
            flops = (2 + 6 * config.epochs) * s["0.0"]["train_tokens"] if reads else 0
            curve = []
            for row in log:
                flops += row.get("tokens", 0) * (2 + reads) + 6 * (row["trained_tokens"] if "tokens" in row else 0)
                curve.append({"tflops": flops * parameters / 1e12, **{name: row[name] for name in (
                    "step", "accuracy", "prm_score", "lines_that_reach", "lines", "completion_tokens", "truncated",
                    "eval_pass@1", "eval_completion_tokens") if name in row}})
                if "lines" in row:
                    curve[-1]["prm_sum"] = row["prm_score"] * row["lines"]  # of a completion
            curves.append(curve)
        last = {name: average([sum(row[name] for row in curve[1:][-5:]) / len(curve[1:][-5:]) for curve in curves])
                for name in ("prm_score", "prm_sum", "lines_that_reach", "lines", "completion_tokens", "truncated")}
        before, after = ([piece(folder, f"{name} on test puzzles") for folder in folders] for name in
                         ("base", Path(rl_config(config, folders[0], arm, 0).out).name))
        before_runs, after_runs = list(map(scores_of, before)), list(map(scores_of, after))
        outcome = outcome or after_runs
        arms[arm] = {"before": measured(before_runs), "after": measured(after_runs),
                     "after - before": paired(after_runs, before_runs), "after - outcome": paired(after_runs, outcome),
                     **{f"{count}_numbers": average([table[f"pass@1_{count}_numbers"] for table in after])
                        for count in (3, 4)},
                     "first_step": {name: average([c[1][name] for c in curves]) for name in last}, "last_5_steps": last,
                     "tflops": average([c[-1]["tflops"] for c in curves]), "curves": curves}
    return {"scorers": scorers, "of N / 2 - majority of N": judges, "arms": arms,
            "tokens_a_completion": average([s["0.0"]["tokens_a_completion"] for s in scored]),
            "train_steps": average([s["0.0"]["train_steps"] for s in scored])}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(16, 8.4), constrained_layout=True)
    (calibration, choice, noise), (score, reached, belief) = axes
    rerank = record["scorers"]["0.0"]["rerank"]
    calibration.plot([0, 1], [0, 1], ":", color="grey")
    for i, (flipped, entry) in enumerate(record["scorers"].items()):
        x, y, _ = zip(*entry["line"]["curve"])
        label = f"{float(flipped):.0%} of labels flipped"
        calibration.plot(x, y, "o-", color=f"C{i}", markersize=4,
                         label=f"{label}: {entry['line']['accuracy']['mean']:.1%} right")
        draw_shares(noise, entry["rerank"]["PRM, last"], 2, f"C{i}", f"best of N, {label}")
    for i, (way, entry) in enumerate(rerank.items()):
        cost = 2 if "PRM" in way else 1
        draw_shares(choice, entry, cost, "black" if way == "pass@N" else f"C{i}", way, ":" if way == "pass@N" else "-")
    draw_shares(noise, rerank["majority"], 1, "black", "majority")
    for axis in (choice, noise):
        share_axis(axis, "tokens written and read, in completions")
    calibration.set_title("lines: share that reach the target, by the scorer's probability (seed 0)", fontsize=10)
    choice.set_title("one of N completions, at equal tokens: puzzles solved", fontsize=10)
    noise.set_title("last line's score, noisy labels: puzzles solved", fontsize=10)
    for i, (arm, entry) in enumerate(record["arms"].items()):
        for axis, name, style in ((score, "prm_sum", "-"), (belief, "prm_score", "-"),
                                  (belief, "lines_that_reach", ":")):
            steps = [row["step"] for row in entry["curves"][0][1:]]
            values = [[curve[k][name] for curve in entry["curves"]] for k in range(1, len(steps) + 1)]
            axis.plot(steps, [sum(v) / len(v) for v in values], style, color=f"C{i}",
                      label=arm if style == "-" else None)
            if style == "-":
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=f"C{i}", alpha=0.15)
        measured = [[row for row in curve if "eval_pass@1" in row] for curve in entry["curves"]]
        x = [sum(rows[k]["tflops"] for rows in measured) / len(measured) for k in range(len(measured[0]))]
        values = [[rows[k]["eval_pass@1"] for rows in measured] for k in range(len(x))]
        reached.plot(x, [sum(v) / len(v) for v in values], "o-", color=f"C{i}", markersize=3, label=arm)
        reached.fill_between(x, list(map(min, values)), list(map(max, values)), color=f"C{i}", alpha=0.15)
    score.set_title("GRPO: the scorer's probabilities, summed over a completion's lines", fontsize=10)
    reached.set_title("GRPO: validation pass@1", fontsize=10)
    belief.set_title("lines that reach the target: scorer (solid), truth (dotted)", fontsize=10)
    share_axis(reached, "compute (TFLOPs), the scorer's training included", log=False)
    score.set_xlabel("step")
    share_axis(belief, "step", log=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7.5)
    write_figure(figure, path)


def table(record: dict) -> str:
    clean = record["scorers"]["0.0"]["rerank"]
    sizes = list(clean["majority"])[::2]
    rows = [[way] + [text(entry[size]) for size in sizes] for way, entry in clean.items()]
    rows += [[f"PRM, last, {float(noise):.0%} of labels flipped"] + [text(entry["rerank"]["PRM, last"][size])
             for size in sizes] for noise, entry in record["scorers"].items() if noise != "0.0"]
    choice = markdown(["chosen from N completions by", *(f"N = {size}" for size in sizes)], rows)
    rows = [[f"{float(noise):.0%}"] + [f"{text(entry[kind]['accuracy'])}, {entry[kind]['calibration_error']['mean']:.3f}"
                                       for kind in KINDS] for noise, entry in record["scorers"].items()]
    rows.append(["the more frequent label"] + [text(record["scorers"]["0.0"][kind]["majority_class"]) for kind in KINDS])
    scorer = markdown(["labels flipped", *(f"{name}: accuracy, calibration error" for name in
                                           ("at the ':'", "line", "answer"))], rows)
    rows = []
    for arm, entry in record["arms"].items():
        last = entry["last_5_steps"]
        rows.append([arm, f"{text(entry['before'], False)} -> {text(entry['after'], seeds=True)}",
                     judged(entry["after - outcome"]) if arm != "outcome" else "",
                     text(entry["3_numbers"]), text(entry["4_numbers"]),
                     f"{entry['first_step']['prm_score']['mean']:.2f} -> {last['prm_score']['mean']:.2f}",
                     f"{entry['first_step']['prm_sum']['mean']:.2f} -> {last['prm_sum']['mean']:.2f}",
                     text(last["lines_that_reach"]), f"{last['lines']['mean']:.1f}",
                     f"{last['completion_tokens']['mean']:.0f}", text(last["truncated"]),
                     f"{entry['tflops']['mean']:.2f}"])
    reward = markdown(["GRPO on", "test pass@1 (seeds)", "minus outcome alone", "3 numbers", "4 numbers", "scorer's probability of a line",
                       "its sum", "lines that reach the target", "lines", "tokens", "truncated", "TFLOPs"], rows)
    return f"{scorer}\n\n{choice}\n\n{reward}"


def verdict(record: dict) -> str:
    clean, arms = record["scorers"]["0.0"]["rerank"], record["arms"]
    half, most = list(clean["majority"])[-2:]

    def judge(way: str) -> str:
        pair = record["of N / 2 - majority of N"][way][most]
        return f"{text(clean[way][half])}, {compared(pair)} it ({points(pair)})"

    def reward(arm: str) -> str:
        first, last = arms[arm]["first_step"], arms[arm]["last_5_steps"]
        return (f"{compared(arms[arm]['after - before'])} before ({points(arms[arm]['after - before'])}), its probability of a line goes "
                f"{first['prm_score']['mean']:.2f} to {last['prm_score']['mean']:.2f} and its sum over a completion "
                f"{first['prm_sum']['mean']:.2f} to {last['prm_sum']['mean']:.2f}")

    normalised, paid, exact = (f"{compared(pair)} none ({points(pair)})" for pair in (
        arms[arm]["after - outcome"] for arm in ("outcome + PRM", "outcome + PRM, paid per line", EXACT)))
    return (
        f"As a judge: the majority of {most} solves {text(clean['majority'][most])}. For the same tokens the best of {half} "
        f"by the score of the last line solves {judge('PRM, last')}, by that of the answer {judge('PRM, answer')}, and a "
        f"vote of {half} weighted by that of the last line {judge('PRM-weighted vote')}. As the only reward, normalised, it "
        f"leaves a policy {reward('PRM alone')}; paid per line, one {reward('PRM alone, paid per line')}. Beside the outcome "
        f"reward, normalised, it is {normalised}, for "
        f"{arms['outcome + PRM']['tflops']['mean'] / arms['outcome']['tflops']['mean']:.1f} times the compute; paid per "
        f"line, {paid}. The exact labels in its place, normalised, are {exact}.")


def main() -> None:
    config = begin(Config, __doc__, QUICK)
    for seed in seeds_to_run(config):
        folder = seed_folder(config, seed)
        traces = traces_of(config, folder, seed)
        for noise in NOISES:
            piece(folder, f"scorer {noise}", lambda: score_and_rerank(config, folder, traces, noise, seed))
        scorer, tokenizer = load_reward_model(folder / "scorer")
        piece(folder, "base on test puzzles", lambda: on_test_puzzles(config, config.model))
        for arm, (outcome_weight, prm_weight, form) in ARMS.items():
            settings = rl_config(config, folder, arm, seed)
            piece(folder, Path(settings.out).name, lambda: train_on_lines(
                resumed(settings), None if arm == EXACT else scorer, tokenizer,
                (outcome_weight, config.prm_weight * prm_weight, form), "python -m experiments.prm"))
            piece(folder, f"{Path(settings.out).name} on test puzzles",
                  lambda: on_test_puzzles(config, Path(settings.out) / "checkpoint"))
    if config.seed < 0:
        finish(config, "prm", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
