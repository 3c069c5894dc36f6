"""Do examples in the prompt help? DeepSeek-R1 (arXiv 2501.12948), section 5: few-shot prompts make R1 worse.

models/tiny-student never saw two documents in one context, so a second one throws it out of its world. So it reads on
for this study, mostly pages: 1 to 8 searches by one writer, careful or careless, before the one that it learns from
(corpus.py --pages). From it come R1-Zero and R1, by the stages of r1.py, whose prompts never hold an example. Then
evaluate.py with 0, 1, 2, 4 and 8. Puzzles are of level three, so that a page of nine searches fits the context.

    python -m experiments.few_shot             # 3 seeds; 2 cores: see minutes in experiments/results/few_shot.json
    python -m experiments.few_shot --seed 0    # one seed, a terminal each; then without --seed for the picture
    python -m experiments.few_shot --quick     # a minute: does it run? Its numbers mean nothing

The base is the same for all seeds, and evaluated once; a seed fixes RL and sampling. Each puzzle has examples of its
own. You see pass@1, length, what the examples teach (all are well formatted) and what they confuse (numbers) against how
many there are.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

import r1
from experiments.study import (average, begin, compared, finish, judged, markdown, measured, paired, points,
                               run_stages, seed_folder, seeds_to_run, share_axis, text)
from machinery.plots import write_figure
from machinery.stages import Stage
from machinery.statistics import scores_of


@dataclass(frozen=True)
class Config:
    out: str = "runs/few_shot"   # folder of the study
    seeds: int = 3               # seeds 0, 1, ...
    seed: int = -1               # of those only this one, without the picture
    quick: bool = False          # a minute, to see that it runs
    model: str = "models/tiny-student"  # reads on with pages
    documents: int = 30000       # that it reads, seven of ten at the end of a page
    zero_steps: int = 50         # of R1-Zero's GRPO
    rl_steps: int = 30           # of each RL stage of R1
    batch_size: int = 128        # completions a step, in groups of 16
    puzzles: int = 600           # that rejection sampling asks, 8 completions each
    n: int = 300                 # test puzzles, of the 328 that there are; and validation puzzles of GRPO's curves
    max_new_tokens: int = 1024   # a longer completion is cut off


QUICK = dict(seeds=1, documents=20, zero_steps=1, rl_steps=1, batch_size=32, puzzles=40, n=16, max_new_tokens=64)
SHOTS = (0, 1, 2, 4, 8)
R1_STAGES = ("zero", "cold-data", "cold-start", "rl", "replies", "r1-data", "sft", "pairs", "preference", "rl-all")
MODELS = {"base": "base", "zero": "R1-Zero", "rl-all": "R1", "without pages": "shipped base, no pages"}


def base_stages(config: Config) -> list[Stage]:
    folder, model = shlex.quote(f"{config.out}/base"), shlex.quote(config.model)
    return [Stage("pages", f"python corpus.py --n {config.documents} --seed 1 --level three --pages 0.7 "
                  f"--out {folder}/pages.jsonl"),
            Stage("base", f"python sft.py --data {folder}/pages.jsonl --model {model} --optimizer muon "
                  "--learning-rate 3e-3 --batch-tokens 4096 --micro-batch-tokens 4096 "
                  f"--eval-rows {max(1, config.documents // 100)} --out {folder}/base")]


def ladder(config: Config, seed: int) -> list[Stage]:
    """R1-Zero and R1 as r1.py makes them, from the base that has read pages."""
    recipe = r1.Config(model=str(base_stages(config)[-1].out / "checkpoint"), out=config.out, level="three", beside="general=1",
                       zero_steps=config.zero_steps, rl_steps=config.rl_steps, rl_learning_rate=5e-4,
                       general_steps=max(1, config.rl_steps // 4), puzzles=config.puzzles, rows=4 * config.puzzles, eval_n=config.n,
                       pairs=max(600, 5 * config.puzzles), max_new_tokens=config.max_new_tokens,
                       rl_flags=f"--batch-size {config.batch_size}")
    stages = {stage.name: stage for stage in r1.all_stages(recipe, seed)}
    return [stages[name] for name in R1_STAGES]


def evaluations(config: Config, folder: Path, checkpoints: dict, *flags) -> dict[tuple[str, int], Stage]:
    return {(name, shots): Stage(stage := f"eval-{name.replace(' ', '-')}-{shots}", shlex.join(map(str, (
                "python", "evaluate.py", "--model", checkpoint, "--level", "three", "--n", config.n,
                "--max-new-tokens", config.max_new_tokens, "--shots", shots, *flags, "--json", folder / f"{stage}.json"))))
            for name, checkpoint in checkpoints.items() for shots in SHOTS}


def of_bases(config: Config) -> dict[tuple[str, int], Stage]:
    """One checkpoint each, so its seeds would be samples: three of a puzzle."""
    return evaluations(config, Path(config.out) / "base", {"base": base_stages(config)[-1].out / "checkpoint",
                                                           "without pages": Path(config.model)}, "--samples", 3)


def of_policies(config: Config, seed: int) -> dict[tuple[str, int], Stage]:
    folder = seed_folder(config, seed)
    return evaluations(config, folder, {name: folder / name / "checkpoint" for name in ("zero", "rl-all")}, "--seed", seed)


def collect(config: Config) -> dict:
    rows, runs, policies = {name: {} for name in MODELS}, {}, [of_policies(config, seed) for seed in range(config.seeds)]
    stages = {key: [stage] for key, stage in of_bases(config).items()}
    stages |= {key: [own[key] for own in policies] for key in policies[0]}
    for (name, shots), own in stages.items():
        tables = [json.loads(stage.out.read_text(encoding="utf-8")) for stage in own]
        runs[name, shots] = list(map(scores_of, tables))
        rows[name][shots] = {"pass@1": measured(runs[name, shots]),
                             "minus none": paired(runs[name, shots], runs[name, 0]),
                             **{column: average([table[column] for table in tables]) for column in
                                ("format", "language", "wrong_numbers", "completion_tokens", "truncated",
                                 "verifications", "backtracks")}}
    return {"models": rows}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    panels = (("pass@1", "test pass@1"), ("format", "well formatted, as the examples are"),
              ("wrong_numbers", "answers with wrong numbers"), ("completion_tokens", "completion length (tokens)"))
    for axis, (column, title) in zip(axes, panels):
        for i, (name, label) in enumerate(MODELS.items()):
            entries = record["models"][name]
            x = range(len(SHOTS))
            mean = [entry[column]["mean"] for entry in entries.values()]
            axis.plot(x, mean, "o-", color=f"C{i}", label=label, markersize=4)
            if column == "pass@1":
                axis.fill_between(x, [e[column]["low"] for e in entries.values()],
                                  [e[column]["high"] for e in entries.values()], color=f"C{i}", alpha=0.15)
            for place, entry in zip(x, entries.values()):
                axis.plot([place] * len(entry[column]["seeds"]), entry[column]["seeds"], ".", color=f"C{i}", alpha=0.6)
        axis.set_xticks(range(len(SHOTS)), SHOTS)
        axis.set_xlabel("examples in the prompt")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        if column != "completion_tokens":
            share_axis(axis, "examples in the prompt", log=False)
    axes[0].legend(fontsize=8)
    write_figure(figure, path)


def table(record: dict) -> str:
    rows = []
    for name, label in MODELS.items():
        entries = record["models"][name]
        rows.append([label] + [f"{text(entries[str(shots)]['pass@1'])}, "
                               f"{entries[str(shots)]['completion_tokens']['mean']:.0f} tokens, format "
                               f"{text(entries[str(shots)]['format'])}, wrong numbers {text(entries[str(shots)]['wrong_numbers'])}"
                               for shots in SHOTS])
    pairs = [[label, *(judged(record["models"][name][str(shots)]["minus none"]) for shots in SHOTS[1:])]
             for name, label in MODELS.items()]
    names = [f"{shots} example{'s' * (shots != 1)}" for shots in SHOTS]
    return f"{markdown(['pass@1 with', *names], rows)}\n\n{markdown(['minus none, paired', *names[1:]], pairs)}"


def verdict(record: dict) -> str:
    rows, most = record["models"], str(SHOTS[-1])

    def line(name: str) -> str:
        first, last = (rows[name][shots]["minus none"] for shots in ("1", most))
        return f"{MODELS[name]} is {compared(first)} none ({points(first)}), with {most} {compared(last)} none ({points(last)})"

    none, many = rows["base"]["0"], rows["base"][most]
    moved = "; ".join(f"{words} {text(none[column])} to {text(many[column])}" for words, column in (
        ("well formatted", "format"), ("answers with wrong numbers", "wrong_numbers"), ("English words", "language")))
    return (f"With one example the {line('base')}; {line('zero')}; {line('rl-all')}. What {most} examples, all well formatted and English, "
            f"change of the base's completions: {moved}.")


def main() -> None:
    config = begin(Config, __doc__, QUICK, levels=("three",))
    go_on = "python -m experiments.few_shot"
    run_stages(Path(config.out) / "base", [*base_stages(config), *of_bases(config).values()], go_on)
    for seed in seeds_to_run(config):
        run_stages(seed_folder(config, seed), [*ladder(config, seed), *of_policies(config, seed).values()], go_on)
    if config.seed < 0:
        finish(config, "few_shot", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
