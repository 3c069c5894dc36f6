"""Distillation: a small student learns from the text of a large teacher, against reinforcement learning on its own.

DeepSeek-R1 (arXiv 2501.12948), sections 2.4 and 4.1: SFT on the teacher's traces alone makes small models reason better
than large-scale RL on the same small model does, and RL after distillation is left to others. Here are all three, on
the same student and from the same base, at no less compute for RL than for distillation:

    traces        rejection.py   correct, readable completions of the teacher, and rows without thinking
    distill       sft.py         student base -> distilled student
    student-rl    train_countdown.py   student base -> RL alone
    distill-rl    train_countdown.py   distilled student -> RL after distillation
    logits        sft.py --teacher     with --logits: the teacher's whole distribution at each token, not just its text

The loss is the cross-entropy of sft.completion_losses on the teacher's text, the one that sft.py always has; with
--logits the KL(teacher || student) of machinery/batching.teacher_kl. What is here is the list of commands.

    python distill.py --teacher runs/r1/seed0/rl-all/checkpoint             # that of r1.py
    python distill.py --seeds 3                                             # seeds 0, 1 and 2, and means over them
    python distill.py --data traces.jsonl --out runs/distill-mine           # any JSONL of prompt and completion
    python distill.py --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B --style chat --device cuda ...

The last lines are a table: pass@1 with its interval (machinery/statistics.py), tokens, minutes, and compute in TFLOPs
(2 a parameter and completion token read or written, 6 where it is trained on; the teacher's writing counts, its own
training does not).
Each stage is skipped when it is done (machinery/stages.py), so an interrupted comparison goes on with the same command.
"""

import machinery  # noqa: F401, I001  (first: from here on Ctrl-C ends in one line)
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from machinery.checkpoints import check_device, check_dtype, find_directory, read_hf_config
from machinery.data import read_jsonl
from machinery.flags import bad_input_exits, parse_config
from machinery.run_folder import write_whole
from machinery.stages import Stage, check_stages, read_record, run_stage
from machinery.statistics import read_scores, share
from machinery.tasks import find_tasks, shares
from machinery.text import read_tokenizer
from model import Model
from sft import Config as SftConfig
from sft import check_same_tokenizer


@dataclass(frozen=True)
class Config:
    teacher: str = "runs/r1/seed0/rl-all/checkpoint"  # checkpoint directory or hub id that writes the traces
    student: str = "models/tiny-student"  # base that learns: a directory or hub id
    data: str = ""                   # JSONL of traces to use instead of asking the teacher
    out: str = "runs/distill"        # folder of the whole comparison
    logits: bool = False             # one arm more: token-level KL to the teacher; both need the same tokenizer
    task: str = "countdown"          # countdown, arithmetic, code, a .py or .jsonl file: machinery/tasks.py
    level: str = ""                  # of the task; empty: its first
    sandbox: str = ""                # command that the answers of a task with tests run behind: docs/code.md
    style: str = "tiny"              # prompt template: tiny, base or chat
    n: int = 2400                    # train problems that the teacher is asked, at most
    samples: int = 4                 # completions of each
    rows: int = 1600                 # traces to keep: it is asked until they are there; 0: all n are asked
    non_cot: bool = True             # a quarter of the rows are replies without thinking (tasks.general replies)
    epochs: int = 3                  # passes over the traces; the paper: 2 to 3
    sft_learning_rate: float = 1e-3  # AdamW peak; for 0.2M parameters
    batch_tokens: int = 4096         # tokens per optimizer step of SFT
    rl_steps: int = 40               # of RL alone; enough that it costs no less than distillation
    after_steps: int = 24            # of RL after distillation
    rl_learning_rate: float = 5e-4   # AdamW peak of RL alone; for 0.2M parameters
    after_learning_rate: float = 3e-4  # AdamW peak of RL after distillation: less, so as not to undo what was learnt
    rl_flags: str = ""               # more flags for both train_countdown.py runs
    max_new_tokens: int = 1024       # a longer completion is cut off
    eval_n: int = 512                # validation problems while training, test problems for the table
    eval_samples: int = 4            # completions of each
    dtype: str = "float32"           # what the models compute in: float32 or bfloat16
    seed: int = 0                    # problems, sampling, order of the data
    seeds: int = 1                   # so many of them, from seed on; each has its folder OUT/seed0, OUT/seed1, ...
    device: str = "cpu"              # cpu or cuda

    def __post_init__(self):
        find_tasks(self.task, self.level, "", self.style, sandbox=self.sandbox)
        check_dtype(self.dtype)
        if self.seeds < 1:
            raise ValueError(f"got seeds {self.seeds}, expected at least 1")
        if self.logits and self.data:
            raise ValueError("got --logits with --data, expected --teacher: only a model has logits")


def task_flags(config, more: str = "") -> str:
    level = f" --level {shlex.quote(config.level)}" if config.level else ""
    programs = config.sandbox and any(hasattr(task.seam, "sandbox") for task in find_tasks(config.task + more, style=config.style))
    sandbox = f" --sandbox {shlex.quote(config.sandbox)}" if programs else ""
    return f"--task {shlex.quote(config.task + more)}{level} --style {config.style}{sandbox}"


def student_stages(config: Config) -> list[Stage]:
    folder, student, teacher = (shlex.quote(str(path)) for path in (Path(config.out), config.student, config.teacher))
    task = task_flags(config)
    machine = f"--device {config.device} --dtype {config.dtype}"
    stages, data = [], shlex.quote(config.data)
    if not config.data:
        non_cot, data = "", f"{folder}/student-traces.jsonl"
        if config.non_cot:
            non_cot = f"--non-cot {folder}/student-replies.jsonl "
            stages.append(Stage("student-replies", f"python -m tasks.general replies --n {config.rows or 2 * config.n} "
                                f"--seed {config.seed} --out {folder}/student-replies.jsonl"))
        stages.append(Stage("student-traces", f"python rejection.py --model {teacher} {non_cot}{task} --n {config.n} "
                            f"--samples {config.samples} --limit {config.rows} --max-new-tokens {config.max_new_tokens} "
                            f"--seed {config.seed + 200} {machine} --out {data}"))  # r1.py has asked those of two other seeds
    sft = (f"python sft.py --data {data} --model {student} --epochs {config.epochs} "
           f"--learning-rate {config.sft_learning_rate} --batch-tokens {config.batch_tokens} "
           f"--style {config.style} --eval-rows {max(1, config.eval_n // 2)} --seed {config.seed} {machine}")
    rl = (f"{task} --max-new-tokens {config.max_new_tokens} --eval-n {config.eval_n} --seed {config.seed} {machine} "
          f"--rollouts sampled {config.rl_flags}")
    stages += [
        Stage("distill", f"{sft} --out {folder}/distill"),
        # RL alone: R1-Zero's settings, but for a rate that falls, as that of SFT does
        Stage("student-rl", f"python train_countdown.py --model {student} --steps {config.rl_steps} "
              f"--learning-rate {config.rl_learning_rate} --final-lr 0.1 {rl} --out {folder}/student-rl"),
        # RL after distillation differs from RL alone in what it starts from, its steps, a lower rate that does not fall,
        # and advantages that are not divided by their group's deviation (Dr. GRPO): where groups are nearly all right, as
        # on the earlier level, a rare slip would count for more than anything else
        Stage("distill-rl", f"python train_countdown.py --model {folder}/distill/checkpoint --steps {config.after_steps} "
              f"--learning-rate {config.after_learning_rate} --no-normalize-std {rl} --out {folder}/distill-rl")]
    models = {"student-base": student, **{name: f"{folder}/{name}/checkpoint" for name in
                                          ("distill", "student-rl", "distill-rl")}}
    if config.logits:
        stages.append(Stage("logits", f"{sft} --teacher {teacher} --out {folder}/logits"))
        models["logits"] = f"{folder}/logits/checkpoint"
    return stages + [
        Stage(f"eval-{name}", f"python evaluate.py --model {model} {task} --n {config.eval_n} "
              f"--samples {config.eval_samples} --max-new-tokens {config.max_new_tokens} {machine} "
              f"--json {folder}/eval-{name}.json") for name, model in models.items()]


def check_beforehand(config, n: int, model: str) -> None:
    """Raises ValueError where the task has fewer problems than are asked for, or a model less room than a completion
    needs: what the last stages would find out."""
    tasks = find_tasks(config.task, config.level, "", config.style, sandbox=config.sandbox)
    for task, own, measured in zip(tasks, shares(tasks, n or len(tasks)), shares(tasks, config.eval_n)):
        task.problems(own, "train", 0)
        for split in ("validation", "test"):
            task.problems(measured, split, 0)
    for name in filter(None, (model, config.student)):
        context = read_hf_config(find_directory(name)).max_position_embeddings
        if config.max_new_tokens >= context:
            raise ValueError(f"got max_new_tokens {config.max_new_tokens} and {name} with a context of {context}; lower "
                             "--max-new-tokens")


def parameters(directory) -> int:
    """Of a checkpoint, by its config; tied embeddings count once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(read_hf_config(find_directory(directory))).parameters())


def flops(stage: Stage) -> float:
    """Of its own, by the rule of 2 a parameter and completion token for a forward pass and 6 for training."""
    given = dict(zip(stage.flags, stage.flags[1:]))
    if stage.script == "rejection":
        return written(stage.out)
    if stage.script not in ("sft", "preference", "train_countdown"):
        return 0.0  # what is measured does not count
    size, rows = parameters(given["--model"]), [row for row in read_jsonl(stage.out / "metrics.jsonl") if "tokens" in row]
    if stage.script == "train_countdown" and any("trained_tokens" not in row for row in rows):
        raise ValueError(f"got {stage.out} of an earlier version, whose log lacks trained_tokens; move it away and run the same "
                         "command again")
    if stage.script != "train_countdown":
        reads = 2 * parameters(given["--teacher"]) if "--teacher" in given else 0
        return sum(row["tokens"] * (6 * size + reads) for row in rows)
    return sum((2 * row["tokens"] + 6 * row["trained_tokens"]) * size for row in rows)


def written(data) -> float:
    """FLOPs of what rejection.py sampled for this file; 0 where no report says how large the model was."""
    report = Path(f"{data}.report.json")
    rounds = json.loads(report.read_text(encoding="utf-8"))["rounds"] if report.exists() else []
    return float(sum(2 * own.get("parameters", 0) * own["sampled_tokens"] for own in rounds))


def compute(config: Config) -> dict[str, float]:
    """FLOPs of each arm, with what it stands on."""
    own = {stage.name: flops(stage) for stage in student_stages(config)}
    traces = own["student-traces"] if not config.data else written(config.data)
    arms = {"distill": traces + own["distill"], "student-rl": own["student-rl"]}
    arms["distill-rl"] = arms["distill"] + own["distill-rl"]
    return arms | ({"logits": traces + own["logits"]} if config.logits else {})


def results(config: Config) -> dict[str, dict]:
    """arm -> its evaluation, minutes (with those of the arms that it stands on) and FLOPs."""
    folder, stages = Path(config.out), {stage.name: stage for stage in student_stages(config)}
    minutes = {name: read_record(folder, stage).get("minutes", 0.0) for name, stage in stages.items()}
    data = minutes.get("student-replies", 0.0) + minutes.get("student-traces", 0.0)
    total = {"student-base": 0.0, "distill": data + minutes["distill"], "student-rl": minutes["student-rl"],
             "distill-rl": data + minutes["distill"] + minutes["distill-rl"]}
    if config.logits:
        total["logits"] = data + minutes["logits"]
    spent = compute(config)
    return {name: {**json.loads((folder / f"eval-{name}.json").read_text(encoding="utf-8")), "minutes": value,
                   "flops": spent.get(name, 0.0)} for name, value in total.items()}


def mean_table(configs: list[Config]) -> dict[str, dict]:
    """results() of all seeds: means, pass@1's interval over problems and seeds, and the seeds' own pass@1."""
    tables, mean = [results(config) for config in configs], {}
    for name in tables[0]:
        own = share([read_scores(Path(config.out) / f"eval-{name}.json") for config in configs])
        mean[name] = {column: sum(table[name][column] for table in tables) / len(tables)
                      for column, value in tables[0][name].items() if isinstance(value, (int, float))}
        mean[name] |= {"pass@1": own.mean, "pass@1_low": own.low, "pass@1_high": own.high, "seeds": own.seeds}
    return mean


def main() -> None:
    config = parse_config(Config, __doc__)
    configs = [config] if config.seeds == 1 else [
        replace(config, seeds=1, seed=seed, out=f"{config.out}/seed{seed}")
        for seed in range(config.seed, config.seed + config.seeds)]
    with bad_input_exits():
        check_device(config.device)
        if config.logits:  # said before an hour of work, not after it
            student, teacher = (read_tokenizer(find_directory(name)) for name in (config.student, config.teacher))
            check_same_tokenizer(student, teacher, SftConfig(model=config.student, teacher=config.teacher))
        check_stages(student_stages(configs[0]))
        check_beforehand(config, 0 if config.data else config.n, "" if config.data else config.teacher)
        for own in configs:
            stages = student_stages(own)
            for stage in stages:
                run_stage(Path(own.out), stage, stages, "the same command")
        table = mean_table(configs)
    print(f"\n{'':>14}  pass@1 (95% interval)      tokens  minutes  TFLOPs  seeds")
    for name, row in table.items():
        print(f"{name:>14}  {row['pass@1']:6.1%} ({row['pass@1_low']:.1%} to {row['pass@1_high']:.1%})  "
              f"{row['completion_tokens']:8.0f} {row['minutes']:8.1f} {row['flops'] / 1e12:7.2f}  "
              + " ".join(f"{seed:.1%}" for seed in row["seeds"]))
    write_whole(Path(config.out) / "table.json", json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
