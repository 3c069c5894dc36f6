"""GRPO with rewards for single lines of the search: what a line is, whether it still reaches the target, advantages a
token, and a training loop of its own over the pieces of train_countdown.py.

prm.py trains the scorer and compares the arms.
"""

import random
import re
import time
from collections import Counter
from typing import NamedTuple

import torch

from countdown import Puzzle, solve
from experiments.scorer import score_positions
from grpo import group_advantages
from machinery.rl_run import finish, log, sampling_weights, save_or_stop, stop_on_broken_gradient, trained_source
from machinery.rollouts import collect
from machinery.tasks import draw_problems, score_completions
from rewards import accuracy_reward, verify
from sampling import complete
from train_countdown import evaluate_policy, log_row, loss_divisor, start, update, with_gradient

MOVE = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)( need| brauche)?,([\d ]+)")


class Step(NamedTuple):
    index: int    # of the token behind which it is judged, within the completion
    kind: str     # ahead: the line's ":", before any result; line: the line's end; answer
    label: float  # 1.0 if the goal can still be reached from the two numbers left; of an answer: if it is right


def still_reaches(header: str, puzzle: Puzzle) -> bool:
    """Whether the path is true, and the two numbers that it leaves can still make its goal: by the exact solver. True
    moves cannot come back from where nothing is solvable, so the end of the path speaks for all of it.

    "5-4=1,3 1?27:" uses two numbers, and 1 and 3 have to make the target. "27/3=9 need,5 4?9:" works backwards from the
    goal with one number, and the others have to make 9. Anything else, a slip in it included, leads nowhere."""
    left, goal = Counter(puzzle.numbers), puzzle.target
    path, _, shown = header.removesuffix(":").partition("?")
    for match in map(MOVE.fullmatch, path.split(".")):
        if not match:
            return False
        a, op, b, value = int(match[1]), match[2], int(match[3]), int(match[4])
        used, made = Counter((a, b)), Counter((value,))
        true, _ = verify(f"{a}{op}{b}", (a, b), value)
        if match[5]:  # backwards: the goal and one number are used up
            true = true and goal in used
            used, made, goal = used - Counter((goal,)), Counter(), value
            true = true and not (0 in used and op in "*/")  # which nothing undoes
        if not (true and used <= left and left - used + made == Counter(map(int, match[6].split()))):
            return False
        left = left - used + made
    return left.total() == 2 and shown in ("", str(goal)) and solve(left.elements(), goal) is not None


def find_steps(tokens: list[str], puzzle: Puzzle) -> list[Step]:
    """The steps of a completion, given as the texts of its tokens. A line without a ":" (a tag, a check) is none."""
    steps, line, label = [], "", None  # label: of the line that is being read, once its ":" has come
    for index, token in enumerate(tokens):
        if label is not None and (token == "\n" or index == len(tokens) - 1):
            steps.append(Step(index, "line", label))
        line, label = ("", None) if token == "\n" else (line + token, label)
        if token == ":" and label is None:
            label = float(still_reaches(line, puzzle))
            steps.append(Step(index, "ahead", label))
        elif token == "</answer>":
            steps.append(Step(index, "answer", accuracy_reward("".join(tokens[:index + 1]), *puzzle)))
    return steps


class Trace(NamedTuple):
    puzzle: Puzzle
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    steps: list[Step]


def score_traces(scorer, traces: list[Trace]) -> list[list[float]]:
    """The probability of every step of every trace."""
    return score_positions(scorer, [t.prompt_ids + t.token_ids for t in traces],
                           [[len(t.prompt_ids) + step.index for step in t.steps] for t in traces])


def step_advantages(step_rewards: list[list[float]], step_ends: list[list[int]],
                    lengths: list[int]) -> list[list[float]]:
    """Rewards of single steps -> an advantage per token, within one group. (DeepSeekMath, section 4.1.3.)

    step_rewards and step_ends hold for each of the G completions a reward per step and the index of the token that ends
    it; lengths are the completions' tokens. All step rewards of the group are normalised together, and a token's
    advantage is the sum over the steps that end at it or later: it is paid for what it led to. A group without two
    different step rewards gets zeros."""
    flat = torch.tensor([reward for rewards in step_rewards for reward in rewards])
    if len(flat) < 2 or (flat == flat[0]).all():
        return [[0.0] * length for length in lengths]
    mean, std = flat.mean().item(), flat.std(correction=0).item() + 1e-6
    advantages = []
    for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True):
        row = [0.0] * length
        for reward, end in zip(rewards, ends, strict=True):
            row[end] += (reward - mean) / std
        for t in range(length - 2, -1, -1):
            row[t] += row[t + 1]
        advantages.append(row)
    return advantages


def line_advantages(scorer, tokenizer, puzzles, prompt_ids, completions, outcome, arm: tuple):
    """outcome (P, G), the advantages of the outcome reward -> advantages (B, T) of single tokens, 0 behind a completion's
    end, and what the log says of the lines. arm: (weight of the outcome, weight of the lines, how these are rewarded).
    scorer None: the lines are rewarded with the exact solver's labels, as by a scorer that is never wrong.

    normalised: DeepSeekMath's process supervision; a line below the group's mean costs. paid: a completion's reward is
    the sum over its lines, and its advantage is that of any reward; a line never costs."""
    outcome_weight, line_weight, form = arm
    G, lengths = outcome.shape[1], [len(c.token_ids) for c in completions]
    traces = [Trace(puzzle, prompt, c.token_ids, "", [step for step in find_steps(
        tokenizer.convert_ids_to_tokens(c.token_ids), puzzle) if step.kind == "line"])
        for puzzle, prompt, c in zip(puzzles, prompt_ids, completions)]
    labels = [[step.label for step in trace.steps] for trace in traces]
    scores = score_traces(scorer, traces) if scorer else labels
    rows = []  # a list of advantages a completion
    if form == "paid":
        sums = group_advantages(torch.tensor(list(map(sum, scores))).view(-1, G)).flatten().tolist()
        rows = [[a] * length for a, length in zip(sums, lengths)]
    else:
        for i in range(0, len(traces), G):
            ends = [[step.index for step in trace.steps] for trace in traces[i:i + G]]
            rows += step_advantages(scores[i:i + G], ends, lengths[i:i + G])
    advantages = torch.zeros(len(rows), max(lengths))
    for i, (a, row) in enumerate(zip(outcome.flatten().tolist(), rows)):
        advantages[i, :len(row)] = torch.tensor([outcome_weight * a + line_weight * value for value in row])
    lines = sum(map(len, labels))
    return advantages, {"prm_score": sum(map(sum, scores)) / max(1, lines), "lines": lines / len(traces),
                        "lines_that_reach": sum(map(sum, labels)) / max(1, lines)}


def train_on_lines(config, scorer, tokenizer, arm: tuple, go_on: str) -> None:
    """train_countdown.main() with advantages a token; config is train_countdown.Config."""
    run, tasks, _ = start(config)
    G = config.group_size
    while run.step < config.steps:
        step_started, rng = time.time(), random.Random(f"{config.seed}, {run.step}")
        problems = [drawn for drawn in draw_problems(tasks, config.batch_size // G, rng) for _ in range(G)]  # B
        prompts = [task.prompt(puzzle, config.style, tokenizer) for task, puzzle in problems]
        with sampling_weights(run) as old_policy:
            prompt_ids, completions, texts = complete(
                old_policy, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                seed=rng.getrandbits(32), slots=config.slots)
        sampling_seconds = time.time() - step_started
        scores = score_completions(problems, prompts, texts, None, config.language)
        rewards = torch.tensor([score.reward for score in scores]).view(-1, G)  # (P, G)
        outcome = group_advantages(rewards, normalize_std=config.normalize_std)  # (P, G)
        advantages, of_lines = line_advantages(scorer, tokenizer, [puzzle for _, puzzle in problems], prompt_ids,
                                               completions, outcome, arm)  # (B, T)
        trained = with_gradient(advantages, completions, config)
        stats = update(run, [(prompt_ids[i], completions[i]) for i in trained], advantages[trained], None,
                       loss_divisor(completions, config), config)
        stop_on_broken_gradient(stats["gradient_norm"], run, config)
        run.step += 1
        run.policy.source = trained_source(run)
        rollouts = collect(problems, prompts, texts, completions, scores, rewards, advantages, trained, first_group=0)
        row = log_row(run, rollouts, stats, step_started, sampling_seconds, config) | of_lines
        if run.step % config.eval_every == 0 or run.step == config.steps:
            row |= evaluate_policy(run, config)
        log(run, row, rollouts, config)
        save_or_stop(run, config, go_on)
    finish(run)
