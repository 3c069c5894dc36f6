"""What waiting for verdicts costs RL, and what helps (arXiv 2501.12948, section 5: evaluation that takes long is why
DeepSeek-R1 had little RL on software engineering; rejection sampling and asynchronous evaluation are what it points to).

A verdict takes 0, 0.1, 1 or 3 seconds: sleeping, as a remote build does (64 judges), or burning a core of this machine
(as many judges as cores). The ways:

    a  all verdicts when the batch is written, one after the other
    b  all when it is written, in parallel: without --judges on a CPU
    c  each from the moment its completion ends, while others still write: with --judges, and wherever a GPU samples
    d  --stale 1: c, and the next batch is sampled while the last one is judged, so training is a step behind sampling
    e  offline: rejection sampling from the base with the same number of completions, then SFT

a, b and c sample and train the same tokens, so steps of each are timed and one run's accuracy holds for all three. d, and
--stale 4 beside it, and e train anew.

    python -m experiments.slow_rewards                   # 3 seeds; 2 cores: see minutes in the JSON
    python -m experiments.slow_rewards --seed 1          # the training of one seed, a terminal each
    python -m experiments.slow_rewards --quick           # a minute: does it run?
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

import evaluate
import train_countdown
from evaluate import mean
from experiments.study import (average, begin, finish, has_pieces, judged, markdown, measured, paired, piece, points,
                               run_stages, seed_folder, seeds_to_run, share_axis, text)
from machinery.checkpoints import load
from machinery.data import read_jsonl
from machinery.plots import write_figure
from machinery.stages import Stage, read_record
from machinery.statistics import scores_of
from sampling import complete

WAYS = {"a": "at the end, one after the other", "b": "at the end, in parallel", "c": "while others write", "d": "c, one step stale"}
STALE = {"fresh": 0, "one-step-stale": 1, "four-steps-stale": 4}
TIMED = (2, 3)      # of 4 steps; the first one fills what is sampled ahead, the last samples nothing more
MEASURED_UP_TO = {("sleep", "a"): 0.1, ("burn", "a"): 0.1, ("burn", "b"): 0.1, ("burn", "c"): 0.1, ("burn", "d"): 0.1}

TASK = '''"""countdown.py, and a verdict takes {delay} seconds, but for those that a script asks for before it begins."""

import countdown
from countdown import *
from experiments.slow_rewards import wait


def score(problem, text):
    if text != gold(problem):
        wait({kind!r}, {delay})
    return countdown.score(problem, text)
'''


@dataclass(frozen=True)
class Config:
    out: str = "runs/slow_rewards"  # folder of the study
    seeds: int = 3                  # seeds 0, 1, ... of what trains
    seed: int = -1                  # of those only this one, without timings and picture
    quick: bool = False             # a minute, to see that it runs
    model: str = "models/tiny-base"
    delays: str = "0,0.1,1,3"       # seconds that a verdict takes, with commas between
    judges: int = 64                # at the same time, where a verdict sleeps
    steps: int = 24                 # of GRPO; the learning rate falls to a tenth
    batch_size: int = 256           # completions a step
    eval_every: int = 4             # steps between evaluations on validation puzzles
    n: int = 512                    # test puzzles
    samples: int = 4                # completions of each
    max_new_tokens: int = 1024      # a longer completion is cut off

    def __post_init__(self):
        if not all(delay.strip().replace(".", "", 1).isdigit() for delay in self.delays.split(",")):
            raise ValueError(f"got delays {self.delays!r}, expected seconds of at least 0 with commas between, such as 0,0.1,1")
        if max(self.seconds()) > 0.1 and not any(0 < delay <= 0.1 for delay in self.seconds()):
            raise ValueError(f"got delays {self.delays!r}, expected one of at most 0.1 among them: what takes hours is computed from it")

    def seconds(self) -> list[float]:
        return sorted({0.0, *map(float, self.delays.split(","))})  # 0: what the others are compared with


QUICK = dict(seeds=1, delays="0.01", steps=4, batch_size=32, eval_every=2, n=8, samples=2, max_new_tokens=48)


# ------------------------------------------------------------------------------------------------------------- step times
def wait(kind: str, seconds: float) -> None:
    """On a judge's thread. Burning is hashing, which lets other threads run, as tests in processes of their own do."""
    if kind == "sleep":
        return time.sleep(seconds)
    until, block = time.thread_time() + seconds, bytes(1 << 18)
    while time.thread_time() < until:
        hashlib.sha256(block).digest()


def time_steps(config: Config, kind: str, delay: float) -> dict:
    """{way: {"seconds" of the timed steps, "cores" in use over the whole run}}, of the ways that are measured here."""
    folder = Path(config.out) / "timings" / f"{kind}-{delay:g}"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed attempt
    folder.mkdir(parents=True)
    task = folder / "slow.py"
    task.write_text(TASK.format(kind=kind, delay=delay), encoding="utf-8")
    found = {}
    for way in WAYS:
        if delay > MEASURED_UP_TO.get((kind, way), delay):
            continue
        judges = 1 if way == "a" else config.judges if kind == "sleep" and delay else os.cpu_count()
        began, worked = time.time(), time.process_time()
        with all_at_the_end() if way in "ab" else contextlib.nullcontext():
            run_stages(folder, [Stage(way, f"python train_countdown.py --model {shlex.quote(config.model)} --task {shlex.quote(str(task))} "
                       f"--steps {TIMED[-1] + 1} --judges {judges} --batch-size {config.batch_size} --stale {int(way == 'd')} "
                       f"--max-new-tokens {config.max_new_tokens} --eval-n 2 --eval-every 1000 --save-every 1000 "
                       f"--rollouts none --out {shlex.quote(str(folder / way))}")], "python -m experiments.slow_rewards")
        rows = read_jsonl(folder / way / "metrics.jsonl")
        found[way] = {"seconds": [row["seconds"] for row in rows if row["step"] in TIMED],
                      "sampling": [row["sampling_seconds"] for row in rows if row["step"] in TIMED],
                      "cores": (time.process_time() - worked) / (time.time() - began)}
    return found


@contextlib.contextmanager
def all_at_the_end():
    """No completion is handed over before all are written."""
    train_countdown.complete = lambda *given, finished, **settings: complete(*given, **settings)
    try:
        yield
    finally:
        train_countdown.complete = complete


def step_seconds(config: Config, timings: dict) -> dict:
    """{kind: {delay: {way: [seconds, "measured" or "computed"]}}}. Computed: a's 256 delays are added to its step without
    one; of the burning ways, what 0.1 s adds, times so much more."""
    found = {}
    for kind, own in timings.items():
        plain = {way: mean(entry["seconds"]) for way, entry in own["0"].items()}
        found[kind] = {}
        for delay in config.seconds():
            row = found[kind][f"{delay:g}"] = {}
            for way in WAYS:
                if way in own[f"{delay:g}"]:
                    row[way] = [mean(own[f"{delay:g}"][way]["seconds"]), "measured"]
                elif way == "a":
                    row[way] = [plain[way] + config.batch_size * delay, "computed"]
                else:
                    short = max(other for other in config.seconds() if other <= 0.1)
                    added = mean(own[f"{short:g}"][way]["seconds"]) - plain[way]
                    row[way] = [plain[way] + added * delay / short, "computed"]
    return found


# --------------------------------------------------------------------------------------------------------------- training
def stages(config: Config, seed: int) -> list[Stage]:
    folder, model = shlex.quote(str(seed_folder(config, seed))), shlex.quote(config.model)
    small = "--eval-n 16 " * config.quick
    rl = [Stage(arm, f"python train_countdown.py --model {model} --steps {config.steps} --final-lr 0.1 --stale {stale} "
                f"--batch-size {config.batch_size} --eval-every {config.eval_every} --max-new-tokens {config.max_new_tokens} "
                f"--rollouts none {small}--seed {seed} --out {folder}/{arm}") for arm, stale in STALE.items()]
    return [*rl, Stage("sampled", f"python rejection.py --model {model} --n {config.steps * config.batch_size // 16} --samples 16 "
                       f"--max-new-tokens {config.max_new_tokens} --seed {seed} --out {folder}/sampled.jsonl"),
            Stage("offline", f"python sft.py --data {folder}/sampled.jsonl --model {model} --epochs 2 --learning-rate 1e-3 "
                  f"--batch-tokens 4096 --eval-rows {4 if config.quick else 128} --seed {seed} --out {folder}/offline")]


def measure(config: Config, checkpoint, seed: int) -> dict:
    """On test puzzles, at temperature 1."""
    model, tokenizer = load(checkpoint)
    table, records = evaluate.evaluate(model.eval(), tokenizer, evaluate.Config(
        n=config.n, samples=config.samples, seed=seed, max_new_tokens=config.max_new_tokens))
    return {"tokens": table["completion_tokens"], "samples": config.samples, **evaluate.by_problem(records, config.samples)}


def train(config: Config, seed: int) -> None:
    folder, own = seed_folder(config, seed), stages(config, seed)
    names = [*(stage.name for stage in own if stage.name != "sampled"), "curves"]
    if not has_pieces(folder, names):
        run_stages(folder, own, "python -m experiments.slow_rewards")
    for stage in own:
        if stage.name != "sampled":
            piece(folder, stage.name, lambda: measure(config, stage.out / "checkpoint", seed))
    piece(folder, "curves", lambda: {
        "sft seconds": 60 * read_record(folder, own[-1])["minutes"],
        **{stage.name: [{name: row[name] for name in ("step", "eval_pass@1", "ratio", "clip_frac", "k1_kl_old") if name in row}
                        for row in read_jsonl(stage.out / "metrics.jsonl")] for stage in own[:3]}})


def collect(config: Config) -> dict:
    timings = {kind: {f"{delay:g}": piece(Path(config.out) / "timings", f"{kind} {delay:g}") for delay in config.seconds()}
               for kind in ("sleep", "burn")}
    seconds = step_seconds(config, timings)
    folders, arms = [seed_folder(config, seed) for seed in range(config.seeds)], {}
    curves = [piece(folder, "curves") for folder in folders]
    runs = {name: [piece(folder, name) for folder in folders] for name in (*STALE, "offline")}
    scores = {name: list(map(scores_of, tables)) for name, tables in runs.items()}
    for name, tables in runs.items():
        arms[name] = {"pass@1": measured(scores[name]), "minus fresh": paired(scores[name], scores["fresh"]),
                      "minus one step stale": paired(scores[name], scores["one-step-stale"]),
                      "tokens": average([table["tokens"] for table in tables])}
        if name != "offline":
            rows = [row for curve in curves for row in curve[name] if row["step"] > 0 and "ratio" in row]
            arms[name] |= {column: mean([row[column] for row in rows]) for column in ("ratio", "clip_frac", "k1_kl_old")}
            arms[name]["curve"] = [[(row["step"], row["eval_pass@1"]) for row in curve[name] if "eval_pass@1" in row]
                                   for curve in curves]
    return {"steps of": config.batch_size, "step seconds": seconds, "arms": arms,
            "sampling seconds": {kind: {delay: mean(own[delay].get("c", own["0"]["c"])["sampling"]) for delay in own}
                                 for kind, own in timings.items()},
            "cores in use": {kind: {delay: {way: entry["cores"] for way, entry in ways.items()} for delay, ways in own.items()}
                             for kind, own in timings.items()},
            "sft seconds": mean([curve["sft seconds"] for curve in curves])}


# ------------------------------------------------------------------------------------------------------------ what it says
def minutes_of(record: dict, kind: str, delay: str) -> dict[str, float]:
    """Of all steps, or of e's sampling and SFT: computed from the step times."""
    seconds, steps = record["step seconds"][kind][delay], record["config"]["steps"]
    training = record["step seconds"][kind]["0"]["c"][0] - record["sampling seconds"][kind]["0"]
    offline = steps * (seconds["c"][0] - training) + record["sft seconds"]
    return {**{way: steps * entry[0] / 60 for way, entry in seconds.items()}, "e": offline / 60}


def draw(record: dict, path) -> None:
    delays = list(record["step seconds"]["sleep"])
    figure, axes = plt.subplots(1, 2 + len(delays[-2:]), figsize=(19, 4.2), constrained_layout=True)
    for axis, kind in zip(axes, ("sleep", "burn")):
        own = record["step seconds"][kind]
        for i, (way, label) in enumerate(WAYS.items()):
            x = [str(delay) for delay in own]
            axis.plot(x, [entry[way][0] for entry in own.values()], "o-", color=f"C{i}", markersize=4, label=f"{way}: {label}")
        axis.set_yscale("log")
        axis.set_title(f"seconds a step, verdicts {kind}", fontsize=10)
        axis.set_xlabel("seconds a verdict")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    for axis, delay in zip(axes[2:], delays[-2:]):
        minutes, steps = minutes_of(record, "sleep", delay), record["config"]["steps"]
        for way, name, colour in (("a", "fresh", "C0"), ("b", "fresh", "C1"), ("c", "fresh", "C2"), ("d", "one-step-stale", "C3")):
            curve = list(zip(*record["arms"][name]["curve"]))  # of the steps: the seeds' (step, share) pairs
            x = [minutes[way] * rows[0][0] / steps for rows in curve]
            shares = [[share for _, share in rows] for rows in curve]
            axis.plot(x, list(map(mean, shares)), "o-", color=colour, markersize=3, label=way)
            axis.fill_between(x, list(map(min, shares)), list(map(max, shares)), color=colour, alpha=0.12)
        axis.plot([minutes["e"]], [record["arms"]["offline"]["pass@1"]["mean"]], "*", color="C4", markersize=10, label="e (test puzzles)")
        axis.set_title(f"validation pass@1, verdicts sleep {delay} s", fontsize=10)
        share_axis(axis, "minutes, computed from steps 2 and 3", log=False)
        axis.set_xscale("log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    write_figure(figure, path)


def table(record: dict) -> str:
    rows = []
    for kind, own in record["step seconds"].items():
        for delay, ways in own.items():
            cores = record["cores in use"][kind][delay]
            rows.append([kind, delay, *(f"{seconds:.1f}{'' if how == 'measured' else ' (computed)'}" for seconds, how in ways.values()),
                         f"{ways['c'][0] / ways['b'][0]:.2f}", f"{ways['d'][0] / ways['c'][0]:.2f}",
                         f"{cores['c']:.2f}" if "c" in cores else ""])
    arms = []
    for name, arm in record["arms"].items():
        arms.append([name.replace("-", " "), text(arm["pass@1"]), " ".join(f"{seed:.1%}" for seed in arm["pass@1"]["seeds"]),
                     *("" if name in (first, "fresh") else judged(arm[f"minus {first.replace('-', ' ')}"])
                       for first in ("fresh", "one-step-stale")), f"{arm['tokens']['mean']:.0f}",
                     *(f"{arm[column]:.4f}" if column in arm else "" for column in ("clip_frac", "k1_kl_old"))])
    delays = list(record["step seconds"]["sleep"])
    wall = [[f"{kind}, {delay} s", *(f"{minutes:.1f}" for minutes in minutes_of(record, kind, delay).values())]
            for kind in record["step seconds"] for delay in delays]
    return "\n\n".join((
        markdown(["verdicts", "seconds each", *(f"{way}: {label}" for way, label in WAYS.items()), "c / b", "d / c", "cores in use, c"], rows),
        markdown(["training", "test pass@1", "of the seeds", "minus fresh, paired", "minus one step stale", "tokens", "clipped",
                  "KL to the sampler"], arms),
        markdown([f"minutes for {record['config']['steps']} steps as short as those", *WAYS, "e"], wall)))


def verdict(record: dict) -> str:
    arms, longest = record["arms"], list(record["step seconds"]["sleep"])[-1]
    four, offline = (arms[name]["minus one step stale"] for name in ("four-steps-stale", "offline"))
    own = record["step seconds"]["sleep"][longest]
    return (f"With verdicts that sleep {longest} s, a step takes {own['a'][0]:.0f} s one after the other, {own['b'][0]:.1f} s in parallel, "
            f"{own['c'][0]:.1f} s while others write, {own['d'][0]:.1f} s one step stale. Trained one step stale ends "
            f"{points(arms['one-step-stale']['minus fresh'])} from fresh ({arms['one-step-stale']['minus fresh']['verdict']}), four steps "
            f"{points(arms['four-steps-stale']['minus fresh'])} ({arms['four-steps-stale']['minus fresh']['verdict']}); offline rejection "
            f"sampling {points(arms['offline']['minus fresh'])} ({arms['offline']['minus fresh']['verdict']}). Against "
            f"one step stale, four steps are {points(four)} ({four['verdict']}), offline {points(offline)} ({offline['verdict']}).")


def main() -> None:
    config = begin(Config, __doc__, QUICK)
    for seed in seeds_to_run(config):
        train(config, seed)
    if config.seed < 0:
        for kind in ("sleep", "burn"):
            for delay in config.seconds():
                once = kind if delay else "sleep"  # nothing is done in no time, in either way
                timings = piece(Path(config.out) / "timings", f"{once} {delay:g}", lambda: time_steps(config, once, delay))
                piece(Path(config.out) / "timings", f"{kind} {delay:g}", lambda: timings)
        finish(config, "slow_rewards", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
