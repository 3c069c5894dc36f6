"""Every completion with its reward and its advantage: written by training, shown in a terminal of 80 columns.

    python -m machinery.rollouts runs/zero                        # the groups of the last step that was kept
    python -m machinery.rollouts runs/zero --show 12              # of step 12
    python -m machinery.rollouts runs/zero --show 12 --group 3    # the completions of one group in full

RUN/rollouts.jsonl has a line for each: step, group, prompt, completion, token ids and their log-probs (nats, of the
policy that sampled them, rounded to 1e-6), every reward part and their weighted sum, verdict, mean and deviation of the
group's rewards, advantage, and whether it was trained on (a group whose rewards are all equal has no gradient).
"""

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

from machinery.data import read_jsonl

KEPT = ("every", "sampled", "none")  # --rollouts: of every step, of those that print a sample, of no step
WIDTH = 80


@dataclass(frozen=True)
class Rollout:
    group: int                      # number of its prompt within the step
    task: str
    prompt: str
    text: str                       # of the completion, as the rewards read it
    completion: object              # sampling.Completion: token ids, log-probs, truncated or not
    score: object                   # tasks.Score: reward, its parts, what is watched, verdict
    group_mean: float               # of the rewards of its group
    group_std: float
    advantage: float | list[float]  # of the completion, or of each of its tokens
    trained: bool

    def row(self, step: int) -> dict:
        """The line of rollouts.jsonl."""
        return {"step": step, "group": self.group, "task": self.task, "prompt": self.prompt, "completion": self.text,
                "reward": self.score.reward, "parts": self.score.parts, "watched": self.score.watched,
                "verdict": self.score.verdict, "group_mean": self.group_mean, "group_std": self.group_std,
                "advantage": self.advantage, "trained": self.trained, "truncated": self.completion.truncated,
                "token_ids": self.completion.token_ids,
                "logprobs": [round(logprob, 6) for logprob in self.completion.logprobs]}


def collect(problems, prompts, texts, completions, scores, rewards, advantages, trained,
            first_group: int) -> list[Rollout]:
    """Lists of B, problems as (task, problem), rewards (P, G), advantages (B,) or (B, T), indices of those trained on ->
    B rollouts."""
    size, trained = rewards.shape[1], set(trained)
    means, stds = rewards.mean(dim=1).tolist(), rewards.std(dim=1, correction=0).tolist()
    return [Rollout(first_group + i // size, problems[i][0].name, prompts[i], texts[i], completions[i], scores[i],
                    means[i // size], stds[i // size],
                    advantage[:len(completions[i].token_ids)] if isinstance(advantage, list) else advantage, i in trained)
            for i, advantage in enumerate(advantages.tolist())]


def read_step(run: str, step: int | None) -> list[dict]:
    """Its rows, step None: the last one's. Raises ValueError where that step was not kept or the file is cut."""
    path = Path(run) / "rollouts.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"got {run} without rollouts.jsonl; expected the folder of a reinforcement learning run "
                                "that keeps them (--rollouts every or sampled)")
    rows = read_jsonl(path)
    kept = sorted({row["step"] for row in rows})
    if not kept:
        raise ValueError(f"got {path} without a row; expected at least one finished step")
    step = kept[-1] if step is None else step
    if step not in kept:
        raise ValueError(f"got --show {step}, but {path} keeps {len(kept)} steps from {kept[0]} to {kept[-1]}; the "
                         f"nearest one is {min(kept, key=lambda one: abs(one - step))}")
    return [row for row in rows if row["step"] == step]


def describe_groups(rows: list[dict]) -> str:
    """A line a group, below it a line a completion, best first."""
    lines, groups = [], {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for number, group in groups.items():
        first = group[0]
        unused = "" if any(row["trained"] for row in group) else ", not trained on"
        lines += ["", shortened(f"group {number}: {first['prompt'].strip()}"),
                  f"  rewards {first['group_mean']:.2f} +- {first['group_std']:.2f}{unused}",
                  "  reward advantage tokens  verdict"]
        for row in sorted(group, key=lambda row: -row["reward"]):
            lines.append(shortened(f"  {row['reward']:6.2f} {overall(row['advantage']):+9.2f} "
                                   f"{len(row['token_ids']):6d}  {row['verdict']}"))
    return "\n".join(lines).lstrip("\n")


def describe_completions(group: list[dict]) -> str:
    """The completions of one group in full."""
    lines = [*wrapped(group[0]["prompt"].strip())]
    for row in sorted(group, key=lambda row: -row["reward"]):
        words = ", ".join(f"{name} {value:.2g}" for name, value in row["parts"].items())
        lines += ["", *textwrap.wrap(f"--- reward {row['reward']:.2f} ({words}), advantage "
                                     f"{overall(row['advantage']):+.2f}: {row['verdict']}", WIDTH)]
        for line in row["completion"].splitlines():
            lines += wrapped(line)
    return "\n".join(lines)


def overall(advantage: float | list[float]) -> float:
    """An advantage per token: their mean."""
    return sum(advantage) / max(1, len(advantage)) if isinstance(advantage, list) else advantage


def shortened(line: str) -> str:
    line = " ".join(line.split()) if len(line) > WIDTH and not line.startswith(" ") else line
    return line if len(line) <= WIDTH else line[:WIDTH - 3] + "..."


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, drop_whitespace=False, replace_whitespace=False) or [""]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m machinery.rollouts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train_countdown.py")
    parser.add_argument("--show", type=int, metavar="STEP", help="default: the last step that was kept")
    parser.add_argument("--group", type=int, metavar="N", help="only this group, its completions in full")
    args = parser.parse_args(arguments)
    try:
        rows = read_step(args.run, args.show)
        group = [row for row in rows if row["group"] == args.group]
        if args.group is not None and not group:
            raise ValueError(f"got --group {args.group}, expected 0 to {rows[-1]['group']}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    trained = sum(row["trained"] for row in rows)
    print(f"step {rows[0]['step']} of {args.run}: {len(rows)} completions, {trained} trained on\n")
    print(describe_completions(group) if group else describe_groups(rows))


if __name__ == "__main__":
    main()
