"""Is the aha moment in the base? The same GRPO on five bases whose corpora differ in one behaviour only.

DeepSeek-R1 (arXiv 2501.12948), section 2.2.4, sees reflection and the search for other ways "arise" under RL, without a
look at what the base had read. Here that is known, since we write the corpus:

    full              people who verify, go back and try again, and say "wait" where they mend a slip
    no verification   no comparison is written out: ":+4-2*3/3" instead of "?27:+4-2*3/3 no"
    no backtracking   one line, then an answer, right or wrong
    no reflection     without wait, wrong, retry and check, and so without the slips that a "wait" mends
    wrong answers     the full one, but no answer in it is right: the search is read, its use is not (Gandhi et al.,
                      arXiv 2503.01307, prime a base in this way, and RL improves it as well as with right answers)

    python -m experiments.aha                  # 3 seeds; 2 cores: see minutes in experiments/results/aha.json
    python -m experiments.aha --arm full       # one arm, a terminal each; then without --arm for the picture
    python -m experiments.aha --quick          # a minute: does it run? Its numbers mean nothing

Every base has the size of models/tiny-student and has read searches of three numbers in English, no programs and no
small talk. A seed is that of a corpus, of a base and of its GRPO: with the same seed the corpora of all arms differ in
the switch alone, so arms are compared in pairs, and their spread holds that of bases. You see one figure of five lines
(validation puzzles), and for each arm what the bases did and what they do after RL (test puzzles).
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import evaluate
from experiments.study import (average, begin, compared, finish, judged, markdown, measured, paired, piece, points,
                               run_stages, seed_folder, seeds_to_run, text)
from machinery import plots
from machinery.checkpoints import load
from machinery.plots import plot_lines, read_metrics
from machinery.stages import Stage
from machinery.statistics import over_seeds, scores_of
from rewards import chain_of_thought


@dataclass(frozen=True)
class Config:
    out: str = "runs/aha"        # folder of the study
    seeds: int = 3               # seeds 0, 1, ...
    seed: int = -1               # of those only this one, without the picture
    arm: str = ""                # only this arm, without the picture
    quick: bool = False          # a minute, to see that it runs
    model: str = "student"       # architecture of the bases: student (0.2M parameters) or tiny (0.8M)
    documents: int = 40000       # that each base reads, once
    batch_tokens: int = 4096     # per pretraining step: few documents want small steps
    steps: int = 30              # of GRPO
    batch_size: int = 128        # completions a step, in groups of 16
    eval_every: int = 10         # GRPO steps between evaluations
    eval_n: int = 300            # validation puzzles of the curves, test puzzles before and after RL
    samples: int = 4             # completions of each, before and after RL
    max_new_tokens: int = 1024   # a longer completion is cut off

    def __post_init__(self):
        if self.arm not in ("", *ARMS):
            raise ValueError(f"got arm {self.arm!r}, expected one of {', '.join(ARMS)}")
        if self.documents < 200 or self.batch_size % 16 or self.samples < 2:
            raise ValueError(f"got documents {self.documents}, batch_size {self.batch_size} and samples {self.samples}, "
                             "expected at least 200, groups of 16, and at least 2 that vote")


QUICK = dict(seeds=1, documents=300, steps=1, batch_size=16, eval_every=1, eval_n=8, samples=2,
             max_new_tokens=64)  # a base that has read 300 documents would never stop
ARMS = {
    "full": "",
    "no verification": "--no-verification",
    "no backtracking": "--no-backtracking",
    "no reflection": "--no-reflection",
    "wrong answers": "--wrong-answers 1.0",
}
LEVEL = "three"
BEHAVIOURS = ("verifications", "backtracks", "reflection_words")
MISSING = {"no verification": "verifications", "no backtracking": "backtracks", "no reflection": "reflection_words"}
VERIFICATIONS = ("verifications per completion", "verifications", "eval_verifications", False)
PANELS = tuple(VERIFICATIONS if panel[1] == "mixed" else panel for panel in plots.PANELS  # one language, nothing to mix
               if "numbers" not in panel[0])  # all puzzles have three


def arm_stages(config: Config, arm: str, seed: int) -> list[Stage]:
    """The corpus, the base that reads it, and RL."""
    name = arm.replace(" ", "-")
    folder = shlex.quote(str(Path(config.out) / f"seed{seed}" / name))
    return [
        Stage(f"{name}-corpus", f"python corpus.py --n {config.documents} --level {LEVEL} --chat 0.0 --programs 0.0 "
              f"--no-languages {ARMS[arm]} --seed {seed} --out {folder}/corpus.jsonl"),
        Stage(f"{name}-base", f"python sft.py --data {folder}/corpus.jsonl --from-scratch {config.model} --optimizer muon "
              f"--learning-rate 3e-3 --batch-tokens {config.batch_tokens} --micro-batch-tokens 4096 "
              f"--eval-rows {config.documents // 100} --seed {seed} --out {folder}/base"),
        Stage(f"{name}-rl", f"python train_countdown.py --model {folder}/base/checkpoint --level {LEVEL} --steps {config.steps} "
              f"--batch-size {config.batch_size} --eval-every {config.eval_every} --eval-n {config.eval_n} "
              f"--max-new-tokens {config.max_new_tokens} --learning-rate 5e-4 --final-lr 0.1 --seed {seed} --rollouts sampled "
              f"--out {folder}/rl"),
    ]


def measure(config: Config, checkpoint) -> dict:
    """A checkpoint's figures on test puzzles, and two that only this study wants: how many searches say yes to a
    result, and how many of these answer right."""
    model, tokenizer = load(checkpoint)
    table, records = evaluate.evaluate(model.eval(), tokenizer, evaluate.Config(
        level=LEVEL, n=config.eval_n, samples=config.samples, max_new_tokens=config.max_new_tokens))
    found = [record for record in records
             if any(word in chain_of_thought(record["completion"]) for word in (" yes", " ja"))]
    return {**table, **evaluate.by_problem(records, config.samples), "found": len(found) / len(records),
            "right_when_found": sum(r["verdict"] == "correct" for r in found) / max(1, len(found))}


def moved(before: list[float], after: list[float]) -> dict:
    """What RL adds to a number that each seed has one of, with its 95% interval over seeds, if there are several."""
    seeds = [y - x for x, y in zip(before, after)]
    return over_seeds(seeds)._asdict() if len(seeds) > 1 else average(seeds)


def collect(config: Config) -> dict:
    """The committed JSON: for each arm the base, the policy after RL, and the curves in between."""
    names = (f"pass@{config.samples}", f"maj@{config.samples}", "format", "found", "right_when_found",
             "completion_tokens", *BEHAVIOURS)
    wanted = {"step"} | {name for _, train, held_out, _ in PANELS for name in (train, held_out)}
    arms, runs = {}, {}
    for arm in ARMS:
        tables = {when: [piece(seed_folder(config, seed), f"{arm} {when}") for seed in range(config.seeds)]
                  for when in ("base", "rl")}
        before, runs[arm] = (list(map(scores_of, rows)) for rows in tables.values())
        arms[arm] = {when: {"pass@1": measured(list(map(scores_of, rows))),
                            **{name: average([t[name] for t in rows]) for name in names}} for when, rows in tables.items()}
        arms[arm]["rl - base"] = paired(runs[arm], before)
        arms[arm]["minus full"] = paired(runs[arm], runs["full"])
        arms[arm]["moved"] = {name: moved(*(arms[arm][when][name]["seeds"] for when in ("base", "rl"))) for name in BEHAVIOURS}
        arms[arm]["curves"] = [[{name: value for name, value in row.items() if name in wanted}
                                for row in read_metrics(arm_stages(config, arm, seed)[-1].out)]
                               for seed in range(config.seeds)]
    return {"arms": arms}


def draw(record: dict, path) -> None:
    plot_lines({arm: result["curves"] for arm, result in record["arms"].items()}, path, PANELS)


def table(record: dict) -> str:
    def change(arm: dict, name: str, form: str) -> str:
        before, after = arm["base"][name], arm["rl"][name]
        return (f"{before['mean']:{form}} -> {after['mean']:{form}} ({min(after['seeds']):{form}} to "
                f"{max(after['seeds']):{form}})")

    samples = record["config"]["samples"]
    columns = ((f"pass@{samples}", ".1%"), (f"maj@{samples}", ".1%"),
               ("completion_tokens", ".0f"), *((name, ".2f") for name in BEHAVIOURS), ("found", ".1%"),
               ("right_when_found", ".1%"))
    rows = [[name, f"{text(arm['base']['pass@1'])} -> {text(arm['rl']['pass@1'])}", points(arm["rl - base"]),
             judged(arm["minus full"]) if name != "full" else "",
             *(change(arm, column, form) for column, form in columns)] for name, arm in record["arms"].items()]
    names = [column.replace("completion_", "").replace("_", " ") for column, _ in columns]
    return markdown(["base", "pass@1", "by RL", "after RL, minus full", *names], rows)


def verdict(record: dict) -> str:
    arms = record["arms"]

    def added(arm: str, name: str) -> str:
        own, base = arms[arm]["moved"][name], arms[arm]["base"][name]["mean"]
        spread = f" ({own['low']:+.2f} to {own['high']:+.2f})" if "low" in own else ""
        return f"{own['mean']:+.2f}{spread} to {base:.2f}"

    pairs = {arm: own["minus full"] for arm, own in arms.items() if arm != "full"}
    apart = "; ".join(f"{arm} is {compared(pair)} full ({points(pair)})" for arm, pair in pairs.items())
    created = [name.replace("_", " ") for arm, name in MISSING.items() if arms[arm]["rl"][name]["mean"] >= 0.05]
    behaviours = "; ".join(f"{name.replace('_', ' ')} {added('full', name)} on the full base, {added(arm, name)} on the "
                           f"one that never read any" for arm, name in MISSING.items())
    did = f"RL created {' and '.join(created)}" if created else "RL created no behaviour that a base had not read"
    return f"After the same GRPO {apart}. {did}; what it adds to the base's own, per completion: {behaviours}."


def main() -> None:
    config = begin(Config, __doc__, QUICK, levels=(LEVEL,))
    go_on = "python -m experiments.aha"
    for arm in [config.arm] if config.arm else ARMS:
        for seed in seeds_to_run(config):
            folder, stages = seed_folder(config, seed), arm_stages(config, arm, seed)
            run_stages(folder, stages, go_on, lock=f"{arm}.lock")
            for when, stage in zip(("base", "rl"), stages[1:]):
                piece(folder, f"{arm} {when}", lambda: measure(config, stage.out / "checkpoint"))
    if config.seed < 0 and not config.arm:
        finish(config, "aha", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
