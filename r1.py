"""The whole of DeepSeek-R1 (arXiv 2501.12948) in one command, a stage after the other, each a command of its own.

    base --RL--> R1-Zero --rejection sampling--> cold start data --SFT of the base--> cold start
         --RL with language consistency--> R1's first RL --rejection sampling, three parts of it and one part of replies
         without thinking--> the "600k + 200k" --SFT of the base--> SFT --RL on all prompts--> R1
         --rejection sampling--> traces --SFT of a small base--> distilled student --RL--> RL after distillation

    python r1.py                          # seed 0: table, pictures, checkpoints
    python r1.py --quick                  # in small, puzzles of three numbers only: minutes, and every stage's effect
    python r1.py --seeds 3                # seeds 0, 1 and 2
    python r1.py --list                   # the stages' own commands, to read or to paste one by one
    python r1.py --only rl                # one stage, once what it needs is there
    python r1.py --from sft               # that stage and all that follow, again

A stage that is done is skipped (machinery/stages.py says what done means), so after Ctrl-C, a kill or a changed flag
the same command goes on where it has to. You end with runs/r1/table.md, table.json and ladder.png: what each stage
changed, and each claim of the paper with its paired difference.
"""

import machinery  # noqa: F401, I001  (first: from here on Ctrl-C ends in one line)
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import distill
from evaluate import mean
from machinery.checkpoints import check_device, check_dtype
from machinery.data import read_jsonl
from machinery.flags import bad_input_exits, parse_config
from machinery.notes import note
from machinery.plots import plot_hacking, plot_ladder
from machinery.run_folder import write_whole
from machinery.stages import Stage, check_stages, disk_use, is_done, read_record, run_stage, set_aside
from machinery.statistics import difference, read_scores, share
from machinery.tasks import find_tasks


@dataclass(frozen=True)
class Config:
    model: str = "models/tiny-base"  # base: checkpoint directory or hub id
    student: str = "models/tiny-student"  # smaller base for distillation
    out: str = "runs/r1"             # folder of everything
    seeds: int = 1                   # seeds 0, 1, ...; each has its folder
    seed: int = -1                   # only this one of them (a terminal each); run without it last
    quick: bool = False              # the whole ladder in minutes, on puzzles of three numbers, into runs/r1-quick
    only: str = ""                   # run this stage alone
    from_: str = ""                  # run this stage and those behind it again, even if they are done
    list: bool = False               # print the stages' commands and stop
    task: str = "countdown"          # countdown, arithmetic, code, a .py or .jsonl file: machinery/tasks.py
    level: str = ""                  # of the task; empty: its first
    beside: str = "code=1,general=1"  # tasks beside three parts of --task in the last RL stage
    sandbox: str = ""                # command that the answers of a task with tests run behind: docs/code.md
    style: str = "tiny"              # prompt template: tiny or chat
    zero_steps: int = 12             # RL steps of R1-Zero
    longer_steps: int = 28           # of R1-Zero once more, for no less compute than the cold start with what it stands on
    rl_steps: int = 12               # of each RL stage of R1
    general_steps: int = 6           # of the last RL stage's, with the prompts of --beside; DeepSeek-R1: 400 of 1,700
    hacking_steps: int = 24          # of the run that trains on the preference reward alone, for too long
    student_steps: int = 40          # of RL on the student alone: no less compute than distillation
    after_steps: int = 24            # of RL after distillation
    rl_learning_rate: float = 7e-4   # AdamW peak of R1-Zero; for 0.8M parameters
    rl2_learning_rate: float = 3e-4  # of the RL stages behind SFT, the student's too
    sft_learning_rate: float = 1e-3  # of SFT, distillation too; DeepSeek-R1: 5e-5
    student_rl_learning_rate: float = 5e-4   # of the student's RL alone
    language_weight: float = 0.5     # reward for language consistency in R1's RL
    puzzles: int = 2400              # train problems that rejection sampling asks a checkpoint, at most
    samples: int = 8                 # completions of each; of the teacher's, half as many
    rows: int = 1600                 # completions that it keeps: it asks until they are there
    max_new_tokens: int = 1024       # a longer completion is cut off
    pairs: int = 6000                # preference pairs for the reward model
    eval_n: int = 512                # validation problems while training, test problems for the table
    eval_samples: int = 4            # completions of each
    rl_flags: str = ""               # more flags for every train_countdown.py, such as "--batch-size 128"
    dtype: str = "float32"           # what the models compute in: float32 or bfloat16
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        find_tasks(self.task, self.level, "", self.style)
        if self.task in others(self):
            raise ValueError(f"got task {self.task} and beside {self.beside!r}, which names it again; expected --beside general=1")
        check_dtype(self.dtype)
        if self.style == "base":
            raise ValueError("got style base, which asks for thinking everywhere; expected tiny or chat")
        names = [task.name for task in find_tasks(f"{self.task}=3,{self.beside}", style=self.style, sandbox=self.sandbox)]
        if "general" not in names:
            raise ValueError(f"got beside {self.beside!r}, expected general in it: the reward model judges its prompts")
        if self.seed >= self.seeds:
            raise ValueError(f"got seed {self.seed} with seeds {self.seeds}, expected one below it")
        if self.pairs < 8:
            raise ValueError(f"got pairs {self.pairs}, expected at least 8: a quarter of them is kept out")
        if min(self.seeds, self.zero_steps, self.longer_steps, self.rl_steps, self.hacking_steps, self.student_steps,
               self.after_steps, self.puzzles, self.samples, self.rows, self.eval_n, self.eval_samples) < 1:
            raise ValueError("expected seeds, steps, puzzles, samples, rows and eval_n of at least 1")
        if not 0 < self.general_steps <= self.rl_steps:
            raise ValueError(f"got general_steps {self.general_steps}, expected 1 to rl_steps {self.rl_steps}")


QUICK = dict(out="runs/r1-quick", level="three", zero_steps=5, longer_steps=12, rl_steps=5, general_steps=3,
             hacking_steps=16, student_steps=20, after_steps=6, puzzles=1000, rows=500, pairs=2000, eval_n=128,
             rl_flags="--batch-size 128 --eval-every 1000")


def student_config(config: Config, seed: int) -> distill.Config:
    folder = Path(config.out) / f"seed{seed}"
    return distill.Config(
        teacher=str(folder / "rl-all" / "checkpoint"), student=config.student, out=str(folder),
        task=config.task, level=config.level, style=config.style, sandbox=config.sandbox, n=config.puzzles,
        samples=max(1, config.samples // 2), rows=config.rows, rl_steps=config.student_steps, after_steps=config.after_steps,
        rl_learning_rate=config.student_rl_learning_rate, after_learning_rate=config.rl2_learning_rate,
        sft_learning_rate=config.sft_learning_rate, rl_flags=config.rl_flags, max_new_tokens=config.max_new_tokens,
        eval_n=config.eval_n, eval_samples=config.eval_samples, dtype=config.dtype, device=config.device, seed=seed)


def others(config: Config) -> list[str]:
    """The tasks beside, but for general prompts, which every evaluation asks."""
    names = [name.partition("=")[0] for name in config.beside.split(",")]
    return [name for name in names if name != "general"]


def alone(config: Config, other: str) -> Config:
    """The same, asking a task beside instead of its own, at that task's first level."""
    return replace(config, task=other, level="", beside="general=1")


def all_stages(config: Config, seed: int) -> list[Stage]:
    """The recipe, in order. Stages that follow each other draw problems and random numbers of their own, by their seed."""
    folder, base = (shlex.quote(str(path)) for path in (Path(config.out) / f"seed{seed}", config.model))
    task = distill.task_flags(config)
    machine = f"--device {config.device} --dtype {config.dtype}"
    length = f"--max-new-tokens {config.max_new_tokens} {machine}"
    asked = f"{task} {length} --n {config.puzzles} --samples {config.samples} --limit {config.rows}"
    rl = f"{length} --eval-n {config.eval_n} --rollouts sampled {config.rl_flags}"
    later = f"--steps {config.rl_steps} --learning-rate {config.rl2_learning_rate} {rl}"
    language = f"--weights language={config.language_weight}"
    judge = f"--preference {folder}/preference/checkpoint"
    sft = (f"--model {base} --epochs 2 --learning-rate {config.sft_learning_rate} --batch-tokens 4096 "
           f"--style {config.style} --eval-rows {max(1, config.eval_n // 4)} --seed {seed} {machine}")
    measured = f"--n {config.eval_n} {length} --samples {config.eval_samples}"

    def evaluation(name: str, model: str = "") -> Stage:
        return Stage(f"eval-{name}", f"python evaluate.py --model {model or f'{folder}/{name}/checkpoint'} "
                     f"{task} {measured} --json {folder}/eval-{name}.json")

    def from_base(steps: int) -> str:
        return f"--model {base} --steps {steps} --learning-rate {config.rl_learning_rate} {task} {rl} --seed {seed}"

    def own(number: int) -> str:
        return f"--seed {seed + 100 * number}"

    stages = [
        # 1. R1-Zero: RL on the base, rules only
        evaluation("base", base),
        Stage("zero", f"python train_countdown.py {from_base(config.zero_steps)} --out {folder}/zero"),
        evaluation("zero"),
        #    and what more of the same gives, for the compute of the next two stages, with a rate that falls as their SFT's does
        Stage("zero-longer", f"python train_countdown.py {from_base(config.longer_steps)} --final-lr 0.1 --out {folder}/zero-longer"),
        evaluation("zero-longer"),
        #    and once more with the language reward: what it removes, and what it costs
        Stage("zero-language", f"python train_countdown.py {from_base(config.zero_steps)} {language} --out {folder}/zero-language"),
        evaluation("zero-language"),
        # 2. the cold start: its readable English completions, and SFT of the base on them
        Stage("cold-data", f"python rejection.py --model {folder}/zero/checkpoint {asked} {own(0)} --out {folder}/cold.jsonl"),
        Stage("cold-start", f"python sft.py --data {folder}/cold.jsonl {sft} --out {folder}/cold-start"),
        evaluation("cold-start"),
        # 3. RL with accuracy, format and language
        Stage("rl", f"python train_countdown.py --model {folder}/cold-start/checkpoint {task} {later} {language} {own(1)} "
              f"--out {folder}/rl"),
        evaluation("rl"),
        # 4. the "600k + 200k" in small: three parts reasoning from that checkpoint, one part replies without thinking
        Stage("replies", f"python -m tasks.general replies --n {config.rows} --seed {seed} --out {folder}/replies.jsonl"),
        Stage("r1-data", f"python rejection.py --model {folder}/rl/checkpoint --non-cot {folder}/replies.jsonl {asked} {own(1)} "
              f"--out {folder}/r1-data.jsonl"),
        Stage("sft", f"python sft.py --data {folder}/r1-data.jsonl {sft} --out {folder}/sft"),
        evaluation("sft"),
        # 5. RL on all prompts: rules for puzzles and, in the last steps, for programs, and a reward model for general prompts
        Stage("pairs", f"python -m tasks.general pairs --n {config.pairs} --seed {seed} --out {folder}/pairs.jsonl"),
        Stage("preference", f"python preference.py --data {folder}/pairs.jsonl --model {base} --style {config.style} "
              f"--eval-pairs {min(512, config.pairs // 4)} --seed {seed} {machine} --out {folder}/preference"),
        Stage("rl-all", f"python train_countdown.py --model {folder}/sft/checkpoint "
              f"{distill.task_flags(config, f'=3,{config.beside}')} --mix-steps {config.general_steps} {later} {language} "
              f"{judge} {own(2)} --out {folder}/rl-all"),
        evaluation("rl-all"),
        #    and what becomes of a policy that goes on with the reward model alone: R1-Zero's learning rate, general
        #    prompts only, and for so many steps
        Stage("hacking", f"python train_countdown.py --model {folder}/rl-all/checkpoint {rl} {judge} "
              f"{task.replace('--task', '--task general --eval-task', 1)} --steps {config.hacking_steps} "
              f"--learning-rate {config.rl_learning_rate} {own(3)} --out {folder}/hacking"),
        evaluation("hacking"),
    ]
    for other in others(config):  # what the ladder loses, or gains, elsewhere
        flags, on = distill.task_flags(alone(config, other)), f"on-{Path(other).stem}"
        for name, model in (("base", base), *((name, f"{folder}/{name}/checkpoint") for name in ("zero", "sft", "rl-all"))):
            stages.append(Stage(f"eval-{name}-{on}", f"python evaluate.py --model {model} {flags} {measured} "
                                f"--json {folder}/eval-{name}-{on}.json"))
    # 6. the student
    return stages + distill.student_stages(student_config(config, seed))


ROWS = {  # evaluation -> (what the table calls it, the stages that made it, the row that these stand on)
    "base": ("base", (), ""),
    "zero": ("R1-Zero", ("zero",), ""),
    "zero-longer": ("R1-Zero for no less compute than the cold start", ("zero-longer",), ""),
    "zero-language": ("R1-Zero with the language reward", ("zero-language",), ""),
    "cold-start": ("cold start", ("cold-data", "cold-start"), "zero"),
    "rl": ("RL with the language reward", ("rl",), "cold-start"),
    "sft": ("SFT of the base on CoT and non-CoT", ("replies", "r1-data", "sft"), "rl"),
    "rl-all": ("**R1**: RL on all prompts", ("pairs", "preference", "rl-all"), "sft"),
    "hacking": ("R1 on the preference reward for too long", ("hacking",), "rl-all"),
    "student-base": ("student base", (), ""),
    "student-rl": ("student, RL alone", ("student-rl",), ""),
    "distill": ("**distilled student**", ("student-replies", "student-traces", "distill"), ""),
    "distill-rl": ("distilled student, then RL", ("distill-rl",), "distill"),
}
CLAIMS = (  # what the paper says, and the two rows whose paired difference says whether it holds here
    ("pure RL teaches reasoning", "zero", "base"),
    ("a majority of its answers is better still", "zero's votes", "zero"),
    ("the language reward costs little", "zero-language", "zero"),
    ("cold start helps", "cold-start", "zero"),
    ("cold start is worth its compute", "cold-start", "zero-longer"),
    ("RL after it helps", "rl", "cold-start"),
    ("rejection sampling and SFT help", "sft", "rl"),
    ("RL on all prompts keeps it", "rl-all", "sft"),
    ("the stages behind the cold start add", "rl-all", "cold-start"),
    ("R1 is better than R1-Zero", "rl-all", "zero"),
    ("distillation beats RL on the small model", "distill", "student-rl"),
    ("RL after distillation adds", "distill-rl", "distill"),
    ("a preference reward for too long hurts", "hacking", "rl-all"),
)
COLUMNS = ("pass@1", "pass@1_3_numbers", "pass@1_4_numbers", "language", "mixed", "format", "completion_tokens",
           "needless_thinking", "greetings", "new_greetings", "arithmetic")


def evaluations(config: Config, name: str) -> list[dict]:
    """Of each seed."""
    return [json.loads((Path(config.out) / f"seed{seed}" / f"eval-{name}.json").read_text(encoding="utf-8"))
            for seed in range(config.seeds)]


def scores(config: Config, name: str) -> list:
    """Of each seed, for machinery/statistics.py."""
    name, _, votes = name.partition("'s ")
    return [read_scores(Path(config.out) / f"seed{seed}" / f"eval-{name}.json", votes or "right") for seed in range(config.seeds)]


def collect(config: Config) -> dict:
    """Every number of the recipe: for each row the mean over seeds, the seeds' own, minutes, and compute."""
    folders = [Path(config.out) / f"seed{seed}" for seed in range(config.seeds)]
    stages = [{stage.name: stage for stage in all_stages(config, seed)} for seed in range(config.seeds)]
    table = {"seeds": config.seeds, "n": config.eval_n, "samples": config.eval_samples, "rows": {}, "claims": {},
             "minutes": {name: mean(read_record(folder, own[name])["minutes"] for folder, own in zip(folders, stages))
                         for name in stages[0]}, "disk_mib": mean(map(disk_use, folders))}
    table["minutes_of_a_seed"] = sum(table["minutes"].values())
    for name, (label, made_by, before) in ROWS.items():
        seeds = evaluations(config, name)
        row = {"label": label, "minutes": sum(table["minutes"][stage] for stage in made_by)}
        row |= {column: mean(seed[column] for seed in seeds) for column in COLUMNS if column in seeds[0]}
        row["seeds"] = {column: [seed[column] for seed in seeds] for column in COLUMNS if column in seeds[0]}
        own = share(scores(config, name))  # over puzzles and seeds
        row["pass@1_low"], row["pass@1_high"] = own.low, own.high
        row["flops"] = mean(sum(distill.flops(own[stage]) for stage in made_by) for own in stages)
        row["flops"] += table["rows"][before]["flops"] if before else 0.0
        for on in (f"on-{Path(other).stem}" for other in others(config)):
            if f"eval-{name}-{on}" in stages[0]:
                row["seeds"][on] = [seed["pass@1"] for seed in evaluations(config, f"{name}-{on}")]
                row[on] = mean(row["seeds"][on])
        table["rows"][name] = row
    for claim, a, b in CLAIMS:
        if "votes" not in a or config.eval_samples > 2:  # a majority of two is the first
            own = difference(scores(config, a), scores(config, b))
            table["claims"][claim] = {"minus": [a, b], **own._asdict(), "verdict": own.verdict()}
    return table


def markdown(table: dict) -> str:
    """The tables as docs/r1.md shows them."""
    others = [name for name in table["rows"]["base"]["seeds"] if name.startswith("on-")]
    lines = [f"{table['seeds']} seed{'s' * (table['seeds'] > 1)}, {table['n']} test puzzles x {table['samples']} "
             f"samples at temperature 1; {table['minutes_of_a_seed']:.0f} minutes a seed, {table['disk_mib']:.0f} MiB.", "",
             "| stage | pass@1 (95% interval) | of the seeds | 3 numbers | 4 numbers | English | mixed | format | tokens | "
             "known greetings thought over | known greetings | new greetings | sums | "
             f"{''.join(f'{name} | ' for name in others)}TFLOPs, with the stages before | own minutes |",
             "|---" * (15 + len(others)) + "|"]
    for row in table["rows"].values():
        share = [f"{row[name]:.1%}" if name in row else "" for name in (*COLUMNS[1:], *others) if name != "completion_tokens"]
        lines.append("| " + " | ".join([
            row["label"], f"{row['pass@1']:.1%} ({row['pass@1_low']:.1%} to {row['pass@1_high']:.1%})",
            " ".join(f"{value:.1%}" for value in row["seeds"]["pass@1"]), *share[:5], f"{row['completion_tokens']:.0f}",
            *share[5:], f"{row['flops'] / 1e12:.1f}" if row["flops"] else "", f"{row['minutes']:.1f}"]) + " |")
    lines += ["", "| the paper | here, in points, paired (95% interval) | of the seeds | |", "|---|---|---|---|"]
    for claim, own in table["claims"].items():
        label = " minus ".join(name.replace("zero's votes", f"majority of {table['samples']}") for name in own["minus"])
        lines.append(f"| {claim} | {label}: {100 * own['mean']:+.1f} ({100 * own['low']:+.1f} to {100 * own['high']:+.1f}) | "
                     f"{' '.join(f'{100 * seed:+.1f}' for seed in own['seeds'])} | {own['verdict']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    config = parse_config(Config, __doc__, quick=QUICK)
    seeds = range(config.seeds) if config.seed < 0 else [config.seed]
    runs = {seed: all_stages(config, seed) for seed in seeds}
    names = [stage.name for stage in runs[seeds[0]]]
    with bad_input_exits():
        for flag, name in (("--only", config.only), ("--from", config.from_)):
            if name and name not in names:
                raise ValueError(f"got {flag} {name!r}, expected a stage: {', '.join(names)}")
        if not config.list:
            check_device(config.device)
            check_stages([stage for stages in runs.values() for stage in stages])
            distill.check_beforehand(config, config.puzzles, config.model)
            for other in others(config):
                distill.check_beforehand(alone(config, other), 0, config.model)
        for seed, stages in runs.items():
            folder = Path(config.out) / f"seed{seed}"
            changed = [stage.name for stage in stages if read_record(folder, stage).get("output") and not is_done(folder, stage)]
            if changed and not config.list:
                note(f"{folder} has stages of other flags, inputs or outputs ({', '.join(changed)}): where they run, they, and "
                     "what stands on them, are made again, and the old ones moved aside; for both side by side give another --out")
            for number, stage in enumerate(stages, 1):
                done = is_done(folder, stage)
                if config.list:
                    print(f"{'done' if done else '    '} {stage.name:>16}  {stage.short_command}")
                elif not config.only or stage.name == config.only:
                    if done and config.from_ and number > names.index(config.from_):
                        set_aside(stage.out)
                        done = False
                    print(f"\nseed {seed}, stage {number} of {len(stages)}: {stage.name}"
                          f"{', done before' if done else ''}", flush=True)
                    record = run_stage(folder, stage, stages, "the same command")
                    print(f"{stage.name}: {record['minutes']:.1f} minutes, {disk_use(folder):.0f} MiB in {folder}")
    if config.list or config.only or config.seed >= 0:
        return
    with bad_input_exits():  # evaluations of an older version
        table, out = collect(config), Path(config.out)
    write_whole(out / "table.json", json.dumps(table, indent=2) + "\n")
    write_whole(out / "table.md", markdown(table))
    plot_ladder(table, out / "ladder.png")
    plot_hacking([read_jsonl(out / f"seed{seed}" / "hacking" / "metrics.jsonl") for seed in runs], out / "hacking.png")
    print(f"\n{markdown(table)}\n{out}/table.md, table.json, ladder.png and hacking.png")


if __name__ == "__main__":
    main()
