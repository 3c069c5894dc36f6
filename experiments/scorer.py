"""What the PRM and the value model of the tree search share: a model that scores prefixes of a completion, how well it
does so, and how one of N answers is chosen with such scores.
"""

import random
from collections import defaultdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from countdown import Puzzle, key, sample_puzzles
from evaluate import pass_at_k
from experiments.study import measured
from machinery.batching import micro_batches
from machinery.checkpoints import load
from machinery.optimizer import MasterAdamW, clip_gradients
from machinery.statistics import Scores, name_problems
from preference import RewardModel


def test_puzzles(n: int, seed: int) -> list[Puzzle]:
    """n test puzzles; different seeds take different ones, as long as the level has them."""
    return sample_puzzles((seed + 1) * n, split="test", seed=0)[seed * n:]


def names_of_test_puzzles(n: int, seeds: int) -> list[str]:
    return [name_problems(map(key, test_puzzles(n, seed))) for seed in range(seeds)]


def train_scorer(model: str, examples: list[tuple], *, epochs: int, learning_rate: float, seed: int, what: str):
    """examples: (token row, positions in it, a label in [0, 1] at each). -> a RewardModel that starts from this language
    model, whose score at a position is the log-odds of the label there: binary cross-entropy, mean over labels."""
    scorer = RewardModel(load(model)[0])
    torch.nn.init.normal_(scorer.score.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    optimizer = MasterAdamW(scorer.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = [i for epoch in range(epochs) for i in random.Random(f"{seed}, {epoch}").sample(range(len(examples)),
                                                                                           len(examples))]
    batches = [order[i:i + 64] for i in range(0, len(order), 64)]
    for step, batch in enumerate(tqdm(batches, desc=what, mininterval=1.0)):
        rows, positions, labels = zip(*(examples[i] for i in batch))
        for micro_batch in micro_batches(list(map(len, rows)), 4096):
            scores = scorer([rows[i] for i in micro_batch], [positions[i] for i in micro_batch])
            target = torch.tensor([label for i in micro_batch for label in labels[i]])
            loss = F.binary_cross_entropy_with_logits(scores, target, reduction="sum")
            (loss / sum(map(len, labels))).backward()
        clip_gradients(optimizer.gradients(), 1.0)
        optimizer.set_learning_rate(learning_rate * min((step + 1) / 20, 1 - step / len(batches)))
        optimizer.step()
        scorer.zero_grad()
    return scorer.eval()


@torch.no_grad()
def score_positions(scorer, rows: list[list[int]], positions: list[list[int]]) -> list[list[float]]:
    """Probabilities at each row's positions; a row without any costs nothing."""
    probabilities = [[] for _ in rows]
    wanted = [i for i, places in enumerate(positions) if places]
    for micro_batch in micro_batches([len(rows[i]) for i in wanted], 8192):
        scored = [wanted[i] for i in micro_batch]
        flat = iter(scorer([rows[i] for i in scored], [positions[i] for i in scored]).sigmoid().tolist())
        for i in scored:
            probabilities[i] = [next(flat) for _ in positions[i]]
    return probabilities


def reliability(pairs: list[tuple[float, float]], bins: int = 10) -> dict:
    """(probability, label) -> accuracy at 1/2, that of always saying what is more frequent, expected calibration error,
    and for each bin its mean probability, its share of true labels, and its size."""
    filled = defaultdict(list)
    for probability, label in pairs:
        filled[min(bins - 1, int(probability * bins))].append((probability, label))
    curve = [(sum(p for p, _ in inside) / len(inside), sum(label for _, label in inside) / len(inside), len(inside))
             for _, inside in sorted(filled.items())]
    positive = sum(label for _, label in pairs) / len(pairs)
    return {"n": len(pairs), "accuracy": sum((p > 0.5) == label for p, label in pairs) / len(pairs),
            "majority_class": max(positive, 1 - positive),
            "calibration_error": sum(abs(p - share) * size for p, share, size in curve) / len(pairs), "curve": curve}


def vote(values: list, weights: list[float]):
    """The value with the most weight, the first one on a tie; None where nobody has a valid answer."""
    totals = {}
    for value, weight in zip(values, weights):
        if value is not None:
            totals[value] = totals.get(value, 0.0) + weight
    return max(totals, key=totals.get) if totals else None


def best(values: list, weights: list[float]):
    """The value of the answer with the highest weight."""
    valid = [i for i, value in enumerate(values) if value is not None]
    return values[max(valid, key=lambda i: weights[i])] if valid else None


def powers_of_two(most: int) -> list[int]:
    return [2 ** i for i in range(most.bit_length())]


def check_sizes(config, *names: str) -> None:
    """Raises ValueError for a number of completions that no curve over N = 1, 2, 4, ... would end at, and for so few
    puzzles that none of them may have four numbers."""
    for name in names:
        if getattr(config, name) not in powers_of_two(max(1, getattr(config, name))):
            raise ValueError(f"got {name} {getattr(config, name)}, expected a power of two: curves go over 1, 2, 4, ... of them")
    if getattr(config, "eval_n", 16) < 16:
        raise ValueError(f"got eval_n {config.eval_n}, expected at least 16: puzzles of three and of four numbers")


def choose_from_n(values: list, target: int, ways: dict[str, tuple]) -> dict[str, dict[int, float]]:
    """One puzzle's answers; ways are {name: (vote or best, a weight per answer)}. -> for each way the share of right
    choices among N of them, N = 1, 2, 4, ...: the mean over disjoint blocks of N. pass@N is the unbiased estimator."""
    sizes, right = powers_of_two(len(values)), sum(value == target for value in values)
    curves = {}
    for name, (choose, weights) in ways.items():
        curves[name] = {}
        for size in sizes:
            blocks = [slice(i, i + size) for i in range(0, len(values) - size + 1, size)]
            curves[name][size] = sum(choose(values[b], weights[b]) == target for b in blocks) / len(blocks)
    return curves | {"pass@N": {size: pass_at_k(len(values), right, size) for size in sizes}}


def by_puzzle(curves: list[dict]) -> dict[str, dict[int, list[float]]]:
    """{way: {N: share}} of each puzzle -> {way: {N: a share of each puzzle}}."""
    return {way: {size: [one[way][size] for one in curves] for size in curves[0][way]} for way in curves[0]}


def measured_curves(problems: list[str], tables: list[dict]) -> dict:
    """{way: {N: a share of each puzzle}} of each seed, and which puzzles each was asked -> means with intervals."""
    return {way: {size: measured(runs_of(problems, tables, way, size)) for size in sizes}
            for way, sizes in tables[0].items()}


def runs_of(problems: list[str], tables: list[dict], way: str, size) -> list[Scores]:
    return [Scores(name, table[way][size]) for name, table in zip(problems, tables)]
