"""Monte Carlo tree search in text: nodes are lines, the policy writes them, a value model judges them.

    select     from the root down to a node without children, by Q + c * prior * sqrt(N) / (1 + n) (AlphaGo Zero)
    expand     the policy writes `width` lines there; their priors are its probabilities
    evaluate   the value model reads each path to its end; no rollout, and no look at the verifier
    back up    the value is added to the new node and to all above it

Trees of many puzzles grow in step, so that policy and value model work on batches.
"""

import math
from dataclasses import dataclass, field

from tqdm import tqdm

from countdown import Puzzle, answer_value, make_prompt
from experiments.scorer import best, vote
from machinery.checkpoints import end_tokens
from sampling import sample

START = "<think>\n"  # every search and every completion begins behind it
MAX_LINE, MAX_DEPTH, CONTEXT = 80, 48, 2048  # tokens of a line; lines of a search; tokens that the policy can read
PATIENCE = 1000  # selections in a row that end where nothing can be added: the search is stuck


@dataclass
class Node:
    token_ids: list[int]             # of its line
    prior: float = 1.0               # the policy's probability of the line, among its siblings
    parent: "Node | None" = None
    depth: int = 0
    over: bool = False               # a finished or hopeless completion
    visits: int = 0
    total: float = 0.0               # sum of the values backed up through it
    children: list["Node"] = field(default_factory=list)

    def path(self) -> list[int]:
        """All tokens from the root's to its own."""
        return (self.parent.path() if self.parent else []) + self.token_ids


def select(node: Node, explore: float) -> Node:
    """Down to a node without children, by UCT with the policy's prior (Silver et al. 2017)."""
    while node.children:
        root = math.sqrt(node.visits)
        node = max(node.children, key=lambda child: child.total / max(1, child.visits)
                   + explore * child.prior * root / (1 + child.visits))
    return node


def back_up(node: Node | None, value: float) -> None:
    while node:
        node.visits, node.total = node.visits + 1, node.total + value
        node = node.parent


class Search:
    """The tree of one puzzle, and what it would answer."""

    def __init__(self, puzzle: Puzzle, root_ids: list[int]):
        self.puzzle, self.root, self.spent = puzzle, Node(root_ids), 0
        self.finished, self.nodes_by_depth = [], {}  # finished: (node, answer's value, value model's score, text)

    def next_leaf(self, explore: float) -> Node | None:
        """The node to go on from. One that is over gets another visit, which makes the others more attractive; None if
        that does not help for PATIENCE visits: the search is stuck."""
        for _ in range(PATIENCE):
            leaf = select(self.root, explore)
            if not leaf.over:
                return leaf
            back_up(leaf, leaf.total / leaf.visits)
        return None

    def add(self, leaf: Node, completions, values: list[float], tokenizer, ends: set[int]) -> None:
        """Puts the policy's lines below a node; a line that it wrote twice becomes one child."""
        lines = {}
        for completion, value in zip(completions, values):
            lines.setdefault(tuple(completion.token_ids), (completion, value))
            self.spent += 2 * len(completion.token_ids)  # written by the policy, read by the value model
        weights = [math.exp(sum(completion.logprobs)) for completion, _ in lines.values()]
        for (completion, value), weight in zip(lines.values(), weights):
            ended = completion.token_ids[-1] in ends
            child = Node(completion.token_ids, weight / sum(weights), leaf, leaf.depth + 1)
            child.over = (ended or completion.truncated or child.depth == MAX_DEPTH
                          or len(child.path()) + MAX_LINE > CONTEXT)
            leaf.children.append(child)
            self.nodes_by_depth[child.depth] = self.nodes_by_depth.get(child.depth, 0) + 1
            if ended:
                words = START + tokenizer.decode(child.path()[len(self.root.token_ids):-1])
                self.finished.append((child, answer_value(words, self.puzzle.numbers), value, words))
            back_up(child, value if ended or not child.over else 0.0)

    def choose(self) -> dict:
        """Whether its answer is right, by each way to choose one; found: whether a right one is there to be chosen; and the
        tokens that it cost, written and read."""
        answers = [answer for _, answer, _, _ in self.finished]
        scores = [score for _, _, score, _ in self.finished]
        chosen = {"best value": best(answers, scores), "vote": vote(answers, scores)}
        return {way: answer == self.puzzle.target for way, answer in chosen.items()} | {
            "found": self.puzzle.target in answers, "tokens": self.spent}


def search(model, tokenizer, value_of, puzzles: list[Puzzle], *, budgets: list[float], width: int, explore: float,
           seed: int, what: str) -> tuple[list[Search], dict]:
    """One tree a puzzle, all in step: each round every tree selects a node, the policy writes lines below all of them at
    once, and value_of(token rows) judges these. -> the trees, and {way: {budget in tokens: is each puzzle answered right?}}
    with the "tokens" really spent beside the ways.

    A result belongs to a budget as long as no token beyond it was spent."""
    ends = end_tokens(model, tokenizer)
    newline = tokenizer.convert_tokens_to_ids("\n")
    roots = tokenizer([make_prompt(puzzle) + START for puzzle in puzzles], add_special_tokens=False)["input_ids"]
    searches = [Search(puzzle, root) for puzzle, root in zip(puzzles, roots)]
    results = [{} for _ in searches]  # a puzzle's choices by budget

    def record(i: int, choice: dict, spent: float) -> None:
        for budget in budgets:
            if budget < spent:
                results[i].setdefault(budget, choice)

    round_, bar = 0, tqdm(total=len(puzzles), desc=what, unit="tree", mininterval=1.0)
    open_ = list(range(len(searches)))
    while open_:
        leaves = {i: searches[i].next_leaf(explore) for i in open_}
        grown = [i for i in open_ if leaves[i]]
        prefixes = [leaves[i].path() for i in grown for _ in range(width)]
        lines = sample(model, prefixes, max_new_tokens=MAX_LINE, eos_ids=ends | {newline}, seed=seed * 100003 + round_)
        values = value_of([prefix + line.token_ids for prefix, line in zip(prefixes, lines)])
        for place, i in enumerate(grown):
            before, own = searches[i].choose(), slice(place * width, (place + 1) * width)
            searches[i].add(leaves[i], lines[own], values[own], tokenizer, ends)
            record(i, before, searches[i].spent)
        still = [i for i in grown if searches[i].spent < max(budgets)]
        bar.update(len(open_) - len(still))
        open_, round_ = still, round_ + 1
    bar.close()
    for i, tree in enumerate(searches):
        record(i, tree.choose(), math.inf)
    table = {way: {budget: [float(result[budget][way]) for result in results] for budget in budgets}
             for way in ("best value", "vote", "found", "tokens")}
    table["stuck"] = sum(tree.spent < max(budgets) for tree in searches) / len(searches)
    return searches, table
