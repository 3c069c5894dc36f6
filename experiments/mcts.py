"""Monte Carlo tree search over the lines of a search: what DeepSeek-R1 (arXiv 2501.12948), section 4.2, gave up.

The paper's reasons: the space of tokens is far larger than that of a board game, a limit on each node's extensions leads
to local optima, and the value model that has to guide all of it is hard to train. Each is measured here:

    search     actions are lines (tree.py). From a node the policy writes `width` of them, which is the limit; their
               priors are the policy's probabilities, their values come from a value model
    beside it  plain sampling with majority voting and best of N by the same value model, at equal tokens: the policy's
               and those that the value model reads
    growth     different prefixes among 256 completions, by lines and by tokens
    width      the limit from 2 to 16: how often is the solution in the tree at all?
    value      the same search with a value model that has learnt nothing, and with none (counted as if it read too)
    training   one round: SFT of the base on what the search solved, and on what as many tokens of plain samples solved; as
               many steps of both

    python -m experiments.mcts                 # 3 seeds; 2 cores: see minutes in experiments/results/mcts.json
    python -m experiments.mcts --seed 0        # one seed, a terminal each; then without --seed for the picture
    python -m experiments.mcts --quick         # a minute: does it run? Its numbers mean nothing

The value model learns, at the end of each line, whether the rollout that it stands in ended right; rollouts are of
train puzzles, what is reported is of test ones, and nothing is chosen on these. No search looks at the verifier. A tree
is stuck, and ends with what it has, when 1,000 selections in a row lead to finished lines: a favourite that nothing
outbids any more.
"""

import json
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from countdown import Puzzle, answer_value, make_prompt, sample_puzzles
from evaluate import mean
from experiments.scorer import (best, by_puzzle, check_sizes, choose_from_n, measured_curves, names_of_test_puzzles,
                                powers_of_two, reliability, runs_of, score_positions, test_puzzles, train_scorer, vote)
from experiments.study import (average, begin, compared, draw_shares, finish, markdown, measured, paired, piece, points,
                               run_stages, sample_groups, seed_folder, seeds_to_run, share_axis, text)
from experiments.tree import MAX_DEPTH, START, search
from machinery.checkpoints import load
from machinery.plots import write_figure
from machinery.stages import Stage
from machinery.statistics import scores_of
from preference import load_reward_model, save_reward_model
from rewards import accuracy_reward


@dataclass(frozen=True)
class Config:
    out: str = "runs/mcts"           # folder of the study
    seeds: int = 3                   # seeds 0, 1, ...
    seed: int = -1                   # of those only this one, without the picture
    quick: bool = False              # a minute, to see that it runs
    model: str = "models/tiny-student"  # the policy, and where the value model starts
    train_puzzles: int = 1200        # train puzzles whose rollouts the value model learns from
    train_samples: int = 8           # rollouts of each
    epochs: int = 1                  # passes over them
    n: int = 100                     # test puzzles a seed; seeds take different ones
    samples: int = 256               # the largest budget: as many tokens as so many completions have
    width: int = 4                   # lines that the policy writes at a node, the limit of its extensions
    explore: float = 1.0             # c of the selection rule
    ablation_budget: int = 64        # of the searches with other widths and other values, in completions
    sft_puzzles: int = 400           # train puzzles that are searched for the training round
    sft_budget: int = 16             # completions' worth of tokens for each
    sft_steps: int = 60              # of both arms, however much of it was solved
    eval_n: int = 512                # test puzzles that the trained models are measured on
    max_new_tokens: int = 1024       # a longer completion is cut off

    def __post_init__(self):
        if self.width not in WIDTHS or self.samples < 2 or self.ablation_budget > self.samples:
            raise ValueError(f"got width {self.width}, samples {self.samples}, ablation_budget {self.ablation_budget}; "
                             f"expected a width of {', '.join(map(str, WIDTHS))}, at least 2 samples and no larger "
                             "budget")
        check_sizes(self, "samples", "ablation_budget")


QUICK = dict(seeds=1, train_puzzles=16, train_samples=4, epochs=1, n=8, samples=8, ablation_budget=4, sft_puzzles=32,
             sft_budget=8, sft_steps=2, eval_n=16, max_new_tokens=64)
WIDTHS = (2, 4, 8, 16)


def value_examples(groups, puzzles: list[Puzzle], newline: int, shuffled: random.Random | None = None) -> list[tuple]:
    """Token rows, the ends of their lines, and at each whether the rollout ended right; shuffled: some other rollout."""
    examples, returns = [], []
    for puzzle, group in zip(puzzles, groups):
        for prompt, completion, words in group:
            ends = [i for i, token in enumerate(completion.token_ids) if token == newline]
            ends = sorted({*ends, len(completion.token_ids) - 1})
            examples.append((prompt + completion.token_ids, [len(prompt) + i for i in ends]))
            returns.append(accuracy_reward(words, *puzzle))
    if shuffled:
        shuffled.shuffle(returns)
    return [(row, ends, [label] * len(ends)) for (row, ends), label in zip(examples, returns)]


def last_scores(value_model, rows: list[list[int]]) -> list[float]:
    return [scores[0] for scores in score_positions(value_model, rows, [[len(row) - 1] for row in rows])]


def growth(groups, newline: int, lines: int = 8, tokens: int = 60) -> dict:
    """Different beginnings among a puzzle's completions, by number of lines and of tokens: the mean over puzzles; and
    how many completions are that long."""
    def count(length_of, depths):
        different, alive = [], []
        for depth in depths:
            cut = [[row[:length_of(row, depth)] for row in rows if length_of(row, depth)] for rows in token_rows]
            different.append(sum(len(set(map(tuple, rows))) for rows in cut) / len(cut))
            alive.append(sum(map(len, cut)) / len(cut))
        return {"depth": list(depths), "different": different, "completions": alive}

    def end_of_line(row, depth):
        ends = [i + 1 for i, token in enumerate(row) if token == newline]
        return ends[depth - 1] if depth <= len(ends) else 0

    token_rows = [[completion.token_ids for _, completion, _ in group] for group in groups]
    return {"lines": count(end_of_line, range(1, lines + 1)),
            "tokens": count(lambda row, depth: depth if depth <= len(row) else 0, range(1, tokens + 1))}


def train_values(config: Config, folder: Path, seed: int) -> dict:
    """The value model and one that learnt from shuffled returns, kept in FOLDER/value and FOLDER/shuffled."""
    model, tokenizer = load(config.model)
    newline = tokenizer.convert_tokens_to_ids("\n")
    puzzles = sample_puzzles(config.train_puzzles, split="train", seed=seed)
    rollouts = sample_groups(model, tokenizer, puzzles, config.train_samples, config.max_new_tokens, seed, "rollouts",
                             START)
    asked = test_puzzles(config.n, seed)
    test_rollouts = sample_groups(model, tokenizer, asked, 4, config.max_new_tokens, seed + 2000, "test rollouts",
                                  START)
    test = value_examples(test_rollouts, asked, newline)
    result = {}
    for name, shuffled in (("value", None), ("shuffled", random.Random(seed))):
        examples = value_examples(rollouts, puzzles, newline, shuffled)
        value_model = train_scorer(config.model, examples, epochs=config.epochs, learning_rate=1e-3, seed=seed,
                                   what=name)
        save_reward_model(value_model, tokenizer, folder / name)
        scores = score_positions(value_model, [row for row, _, _ in test], [ends for _, ends, _ in test])
        pairs = [(p, label) for own, (_, _, labels) in zip(scores, test) for p, label in zip(own, labels)]
        inner = [(p, label) for own, (_, _, labels) in zip(scores, test) for p, label in zip(own[:-2], labels)]
        result[name] = {"all": reliability(pairs), "before the answer": reliability(inner)}
    return result


def compare(config: Config, folder: Path, seed: int) -> None:
    """Plain sampling and search on the same test puzzles; widths and values at a smaller budget."""
    model, tokenizer = load(config.model)
    puzzles = test_puzzles(config.n, seed)
    newline = tokenizer.convert_tokens_to_ids("\n")
    value_model, shuffled = (load_reward_model(folder / name)[0] for name in ("value", "shuffled"))

    def trained(rows):
        return last_scores(value_model, rows)

    def sample_plainly():
        groups = sample_groups(model, tokenizer, puzzles, config.samples, config.max_new_tokens, seed + 1000,
                               "plain sampling", START)
        scores = [trained([prompt + completion.token_ids for prompt, completion, _ in group]) for group in groups]
        tokens = sum(len(c.token_ids) for group in groups for _, c, _ in group) / config.n / config.samples
        # of each puzzle the share solved with N completions by majority vote, best value, vote weighted by value; and pass@N
        plain_ = by_puzzle([choose_from_n(
            [answer_value(words, puzzle.numbers) for _, _, words in group], puzzle.target,
            {"majority": (vote, [1.0] * config.samples), "best of N": (best, own), "weighted vote": (vote, own)})
            for puzzle, group, own in zip(puzzles, groups, scores)])
        return {"tokens": tokens, "plain": plain_, "growth": growth(groups, newline)}

    tokens = piece(folder, "plain", sample_plainly)["tokens"]
    sizes = powers_of_two(config.samples)

    def measure(name: str, value_of, width: int, most: int):
        def table():
            trees, table = search(model, tokenizer, value_of, puzzles, width=width, explore=config.explore, seed=seed,
                                  what=name, budgets=[size * tokens for size in sizes if size <= most])
            by_completions = {way: {round(budget / tokens): value for budget, value in row.items()}
                              if isinstance(row, dict) else row for way, row in table.items()}
            return by_completions | {"nodes_by_depth": [
                sum(tree.nodes_by_depth.get(depth, 0) for tree in trees) / len(trees)
                for depth in range(1, MAX_DEPTH + 1)]}
        piece(folder, name, table)

    measure("mcts", trained, config.width, config.samples)
    for width in WIDTHS:
        measure(f"width {width}", trained, width, config.ablation_budget)
    measure("values shuffled", lambda rows: last_scores(shuffled, rows), config.width, config.ablation_budget)
    measure("values none", lambda rows: [0.5] * len(rows), config.width, config.ablation_budget)


def write_training_data(config: Config, folder: Path, seed: int) -> dict:
    """What search and plain sampling solve of the same train puzzles at the same budget: up to 4 texts a puzzle."""
    model, tokenizer = load(config.model)
    value_model = load_reward_model(folder / "value")[0]
    puzzles = sample_puzzles(config.sft_puzzles, split="train", seed=seed + 3000)
    groups = sample_groups(model, tokenizer, puzzles, config.sft_budget, config.max_new_tokens, seed + 4000,
                           "plain sampling", START)
    tokens = sum(len(c.token_ids) for group in groups for _, c, _ in group) / len(puzzles)
    trees, _ = search(model, tokenizer, lambda rows: last_scores(value_model, rows), puzzles, budgets=[tokens],
                      width=config.width, explore=config.explore, seed=seed + 4000, what="MCTS of train puzzles")
    texts = {"plain": [[words for _, _, words in group] for group in groups],
             "mcts": [[words for _, _, _, words in sorted(tree.finished, key=lambda item: -item[2])] for tree in trees]}
    counts = {}
    for name, solved in texts.items():
        rows = []
        for puzzle, own in zip(puzzles, solved):
            right = [words for words in dict.fromkeys(own) if accuracy_reward(words, *puzzle)][:4]
            rows += [{"prompt": make_prompt(puzzle), "completion": words, **puzzle._asdict()} for words in right]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts[name] = {"rows": len(rows), "puzzles": len({(tuple(row["numbers"]), row["target"]) for row in rows})}
    return counts


def training_stages(config: Config, folder: Path, seed: int) -> list[Stage]:
    place = shlex.quote(str(folder))
    stages, models = [], {"base": shlex.quote(config.model)}
    for name in ("plain", "mcts"):
        models[name] = f"{place}/sft-{name}/checkpoint"
        stages.append(Stage(f"sft-{name}", f"python sft.py --data {place}/{name}.jsonl --model {models['base']} "
                            f"--steps {config.sft_steps} --learning-rate 1e-3 --batch-tokens 4096 --eval-rows 4 --seed {seed} "
                            f"--out {place}/sft-{name}"))
    return stages + [Stage(f"eval-{name}", f"python evaluate.py --model {model} --n {config.eval_n} --samples 4 "
                           f"--max-new-tokens {config.max_new_tokens} "
                           f"--json {place}/eval-{name}.json") for name, model in models.items()]


def collect(config: Config) -> dict:
    """The committed JSON."""
    folders = [seed_folder(config, seed) for seed in range(config.seeds)]

    def pieces(name):
        return [piece(folder, name) for folder in folders]

    values, data, plain_, mcts = map(pieces, ("value-model", "training-data", "plain", "mcts"))
    asked, sampled = names_of_test_puzzles(config.n, config.seeds), [run["plain"] for run in plain_]

    def searches(tables):
        curves = [{way: table[way] for way in ("best value", "vote", "found")} for table in tables]
        return measured_curves(asked, curves) | {
            "tokens": {size: average([mean(table["tokens"][size]) for table in tables]) for size in tables[0]["tokens"]},
            "stuck": average([table["stuck"] for table in tables])}

    def means(rows):
        return list(map(mean, zip(*rows)))

    trained, runs = {}, {}
    for name in ("base", "plain", "mcts"):
        tables = [json.loads((folder / f"eval-{name}.json").read_text(encoding="utf-8")) for folder in folders]
        runs[name] = list(map(scores_of, tables))
        trained[name] = {"pass@1": measured(runs[name]),
                         **{column: average([table[column] for table in tables]) for column in
                            ("pass@1_3_numbers", "pass@1_4_numbers", "completion_tokens")},
                         **{column: average([d[name][column] for d in data]) for column in data[0].get(name, {})}}
    return {"tokens_a_completion": average([run["tokens"] for run in plain_]),
            "plain": measured_curves(asked, sampled), "mcts": searches(mcts),
            "mcts - majority": {size: paired(runs_of(asked, mcts, "best value", size),
                                             runs_of(asked, sampled, "majority", size)) for size in mcts[0]["best value"]},
            "mcts - plain, chosen alike": {way: {size: paired(
                runs_of(asked, mcts, own, size), runs_of(asked, sampled, other, str(int(size) // 2)))
                for size in mcts[0][own] if str(int(size) // 2) in sampled[0][other]}
                for way, own, other in (("by value", "best value", "best of N"), ("by a vote weighted by value", "vote", "weighted vote"))},
            "SFT on searched - on sampled": paired(runs["mcts"], runs["plain"]),
            "widths": {width: searches(pieces(f"width {width}")) for width in WIDTHS},
            "values": {name: searches(pieces(f"values {name}")) for name in ("shuffled", "none")},
            "value_models": {name: {part: {column: average([v[name][part][column] for v in values]) for column in
                                           ("n", "accuracy", "majority_class", "calibration_error")}
                                    for part in values[0][name]} for name in values[0]},
            "growth": {level: {column: means([run["growth"][level][column] for run in plain_])
                               for column in ("depth", "different", "completions")} for level in ("lines", "tokens")},
            "nodes_by_depth": means([table["nodes_by_depth"] for table in mcts]),
            "training": trained}


def draw(record: dict, path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(16, 8.4), constrained_layout=True)
    (compare_axis, width_axis, value_axis), (lines_axis, tokens_axis, training_axis) = axes
    plain_, mcts = record["plain"], record["mcts"]
    for i, (label, entries, cost, style) in enumerate((
            ("majority of N", plain_["majority"], 1, "-"), ("best of N by value", plain_["best of N"], 2, "-"),
            ("vote weighted by value", plain_["weighted vote"], 2, "-"),
            ("MCTS, best value", mcts["best value"], 1, "-"), ("MCTS, vote weighted by value", mcts["vote"], 1, "-"),
            ("pass@N: in the samples", plain_["pass@N"], 1, ":"),
            ("MCTS: in the tree", mcts["found"], 1, ":"))):
        draw_shares(compare_axis, entries, cost, f"C{i}", label, style)
    compare_axis.set_title("puzzles solved at equal tokens", fontsize=10)
    for i, (width, table) in enumerate(record["widths"].items()):
        draw_shares(width_axis, table["found"], 1, f"C{i}", f"at most {width} lines a node: in the tree", ":")
        draw_shares(width_axis, table["best value"], 1, f"C{i}", f"at most {width}: answered")
    width_axis.set_title("the limit of a node's extensions", fontsize=10)
    trained = record["widths"][str(record["config"]["width"])]
    for i, (name, table) in enumerate({"trained on rollouts": trained, **record["values"]}.items()):
        draw_shares(value_axis, table["best value"], 1, f"C{i}", f"value model: {name}")
        draw_shares(value_axis, table["found"], 1, f"C{i}", f"{name}: in the tree", ":")
    value_axis.set_title("the value model", fontsize=10)
    for axis in (compare_axis, width_axis, value_axis):
        share_axis(axis, "tokens of policy and value model, in completions")
        axis.legend(fontsize=7)
    for axis, level in ((lines_axis, "lines"), (tokens_axis, "tokens")):
        entry = record["growth"][level]
        axis.plot(entry["depth"], entry["different"], "-", label="different beginnings")
        axis.plot(entry["depth"], entry["completions"], ":", color="grey", label="completions that long")
        if level == "lines":
            depths = [depth for depth, nodes in enumerate(record["nodes_by_depth"], 1) if nodes][:8]
            axis.plot(depths, record["nodes_by_depth"][:len(depths)], "--", label="nodes of the MCTS tree")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel(f"{level} from the start")
        axis.set_title(f"growth by {level}: {record['config']['samples']} completions of a puzzle", fontsize=10)
        axis.legend(fontsize=8)
    names = ("base", "SFT on sampled\nsolutions", "SFT on searched\nsolutions")
    entries = [record["training"][name]["pass@1"] for name in ("base", "plain", "mcts")]
    means_ = [entry["mean"] for entry in entries]
    training_axis.bar(names, means_, color=("grey", "C0", "C3"), alpha=0.55)
    training_axis.errorbar(names, means_, yerr=[[e["mean"] - e["low"] for e in entries],
                                                [e["high"] - e["mean"] for e in entries]], fmt="none", ecolor="black")
    for name, entry in zip(names, entries):
        training_axis.plot([name] * len(entry["seeds"]), entry["seeds"], "o", color="black", markersize=3, alpha=0.6)
    training_axis.set_ylim(0, 1.03)
    training_axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    training_axis.set_title("one round of training: test pass@1", fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    write_figure(figure, path)


def table(record: dict) -> str:
    plain_, mcts = record["plain"], record["mcts"]
    sizes = list(plain_["majority"])[::2]
    ways = [("majority of N", plain_["majority"], 1), ("best of N / 2 by value", plain_["best of N"], 2),
            ("vote of N / 2 weighted by value", plain_["weighted vote"], 2), ("MCTS, best value", mcts["best value"], 1),
            ("MCTS, vote weighted by value", mcts["vote"], 1), ("in the tree of MCTS", mcts["found"], 1), ("pass@N", plain_["pass@N"], 1)]
    spent = [f"{mcts['tokens'][size]['mean'] / record['tokens_a_completion']['mean']:.1f}" for size in sizes]
    rows = [[label] + [text(entries[str(int(size) // cost)]) if str(int(size) // cost) in entries else ""
                       for size in sizes] for label, entries, cost in ways] + [["spent by MCTS, in completions", *spent]]
    solved = markdown(["solved with the tokens of N completions", *(f"N = {size}" for size in sizes)], rows)
    last = list(record["values"]["none"]["found"])[-1]
    middle = list(record["values"]["none"]["found"])[-3:][0]
    searches = {f"at most {width} lines a node": entry for width, entry in record["widths"].items()}
    searches |= {f"value model: {name}": entry for name, entry in record["values"].items()}
    searches = markdown(["MCTS", f"N = {middle}: in the tree", "answered", f"N = {last}: in the tree", "answered",
                         "stuck before that"],
                        [[name, *(text(entry[way][size]) for size in (middle, last) for way in ("found", "best value")),
                          text(entry["stuck"])] for name, entry in searches.items()])
    beginnings = []
    for level, depths in (("lines", (1, 2, 3, 4)), ("tokens", (1, 2, 4, 8, 16, 32))):
        growth_ = record["growth"][level]
        for depth in depths:
            beginnings.append([f"{depth} {level}", f"{growth_['different'][depth - 1]:.1f} of "
                               f"{growth_['completions'][depth - 1]:.1f}",
                               f"{record['nodes_by_depth'][depth - 1]:.1f}" if level == "lines" else ""])
    beginnings = markdown(["after", f"different beginnings among {record['config']['samples']} completions",
                           "nodes of the MCTS tree"], beginnings)
    values = [[f"trained on {name}", *(text(own["before the answer"][column]) for column in ("accuracy", "majority_class")),
               f"{own['before the answer']['calibration_error']['mean']:.3f}"]
              for name, own in zip(("rollouts", "shuffled returns"), record["value_models"].values())]
    values = markdown(["value model", "right at the ends of lines", "always the more frequent outcome", "calibration error"], values)
    taught = [[label, text(own["pass@1"]), " ".join(f"{seed:.1%}" for seed in own["pass@1"]["seeds"]), text(own["pass@1_3_numbers"]),
               text(own["pass@1_4_numbers"]), *(f"{own[column]['mean']:.0f}" if column in own else "" for column in ("puzzles", "rows"))]
              for label, own in zip(("none", "plain samples", "MCTS"), record["training"].values())]
    taught = markdown(["SFT on what was solved by", "test pass@1", "of the seeds", "3 numbers", "4 numbers", "puzzles solved", "rows"], taught)
    return f"{solved}\n\n{searches}\n\n{values}\n\n{taught}\n\n{beginnings}"


def verdict(record: dict) -> str:
    plain_, mcts, sizes = record["plain"], record["mcts"], list(record["plain"]["majority"])
    few, many = sizes[min(4, len(sizes) - 1)], sizes[-1]
    spent = mcts["tokens"][many]["mean"] / record["tokens_a_completion"]["mean"]
    taught = record["SFT on searched - on sampled"]

    def line(size: str) -> str:
        pair = record["mcts - majority"][size]
        return (f"{text(mcts['best value'][size])}, {compared(pair)} the majority of plain samples, {text(plain_['majority'][size])} "
                f"({points(pair)})")

    alike = "; ".join(f"{way} it is {compared(pairs[many])} them ({points(pairs[many])})"
                      for way, pairs in record["mcts - plain, chosen alike"].items())
    return (f"With the tokens of {few} completions MCTS solves {line(few)}; with at most those of {many}, of which it has "
            f"spent {spent:.0f} on average when {text(mcts['stuck'])} of the trees are stuck, {line(many)}. Where the value "
            f"model chooses among the plain samples too, and its reading counts: {alike}. SFT on what the search solved is "
            f"{compared(taught)} SFT on what plain samples with the same limit of tokens solved ({points(taught)}).")


def main() -> None:
    config = begin(Config, __doc__, QUICK)
    for seed in seeds_to_run(config):
        folder = seed_folder(config, seed)
        piece(folder, "value-model", lambda: train_values(config, folder, seed))
        compare(config, folder, seed)
        piece(folder, "training-data", lambda: write_training_data(config, folder, seed))
        run_stages(folder, training_stages(config, folder, seed), "python -m experiments.mcts")
    if config.seed < 0:
        finish(config, "mcts", collect(config), draw, table, verdict)


if __name__ == "__main__":
    main()
