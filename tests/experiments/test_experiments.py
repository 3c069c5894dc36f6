"""The four studies: their parts by hand."""

import math
import random
from fractions import Fraction

import pytest
import torch

import corpus
import evaluate
import sft
from countdown import Puzzle, answer_value, fill_template, make_prompt, question, sample_puzzle, split_of, vote
from experiments import aha, line_rewards, mcts, prm, scorer, tree
from sampling import Completion

PUZZLE = Puzzle((3, 4, 5), 27)  # (4+5)*3
FOUR = Puzzle((9, 1, 9, 2), 26)  # ((9*2)-1)+9
TRACE = ("<think>\n5-4=1,3 1?27:+4-2*3/3 no\n27/3=9 need,5 4?9:+9 yes\ncheck (5+4)*3=27 yes\n</think>\n"
         "<answer>(5+4)*3</answer>")


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.build_tokenizer()


# ---------------------------------------------------------------------------------------------- the PRM: labels, steps
@pytest.mark.parametrize("puzzle, header, reaches, why", (
    (PUZZLE, "5+4=9,9 3?27:", True, "9*3"),
    (PUZZLE, "5+4=9,9 3:", True, "no goal is written without verification"),
    (PUZZLE, "5+4=9,3 9?27:", True, "the order of what is left does not matter"),
    (PUZZLE, "5-4=1,3 1?27:", False, "3 and 1 make 4, 2, 3, and 1/3"),
    (PUZZLE, "27/3=9 need,5 4?9:", True, "5+4 is 9, and 9*3 is 27"),
    (PUZZLE, "27/3=9 brauche,5 4?9:", True, "in German"),
    (PUZZLE, "27-3=24 need,5 4?24:", False, "5 and 4 make no 24"),
    (PUZZLE, "27/3=9 need,5 4?27:", False, "9 is needed"),
    (PUZZLE, "27/3=9,5 4?9:", False, "without the word, 27 is no number of the puzzle"),
    (PUZZLE, "5+4=8,8 3?27:", False, "a slip"),
    (PUZZLE, "5+4=9,9 4?27:", False, "4 twice, 3 never"),
    (PUZZLE, "5+5=10,10 3?27:", False, "5 twice"),
    (PUZZLE, "27/3=9 need,5 3?9:", False, "3 was used up"),
    (PUZZLE, "3+24=27,27 5 4.5-4=1,27 1?27:", False, "24 is no number of the puzzle"),
    (PUZZLE, "28/3=9 need,5 4?9:", False, "28 is not the target"),
    (PUZZLE, "27/4=6 need,5 3?6:", False, "27/4 is no 6"),
    (PUZZLE, "5/0=5,5 3?27:", False, "division by zero"),
    (PUZZLE, "hello:", False, "no header"),
    (FOUR, "26-9=17 need,9 2 1.17+1=18 need,9 2?18:", True, "9*2 is 18, and 18-1+9 is 26"),
    (FOUR, "26-9=17 need,9 2 1.17-9=8 need,2 1?8:", False, "2 and 1 make no 8"),
    (FOUR, "26-9=17 need,9 2 1.9*2=18,18 1?17:", True, "backwards, then forwards: 18-1 is 17"),
    (FOUR, "9*2=18,18 9 1.26-9=17 need,18 1?17:", True, "the same the other way round"),
    (FOUR, "26-9=17 need,9 2 1.26+1=27 need,9 2?27:", False, "17 is the goal by then, not 26"),
    (FOUR, "26-9=17 need,9 2 1.9*9=81,81 2?17:", False, "the first 9 was used up"),
    (FOUR, "26-9=16 need,9 2 1.16+1=17 need,9 2?17:", False, "a slip in the first move"),
    (FOUR, "26-9=17 need,9 2 1?17:", False, "a path ends at two numbers"),
    (Puzzle((2, 2, 1, 1), 9), "2+1=3 need,2 1?3:", False, "9 is the goal, and it is not in there"),
    (Puzzle((5, 5, 3, 3), 4), "5-5=0,3 3 0.4*0=0 need,3 3?0:", False, "3-3 is 0, but 0/0 is not 4"),
))
def test_a_line_s_label_is_whether_its_path_ends_where_the_goal_is_reached(puzzle, header, reaches, why):
    assert line_rewards.still_reaches(header, puzzle) == reaches, why


def test_labels_agree_with_the_lines_that_the_corpus_writes():
    """Paths of moves in both directions, for three and four numbers: by the corpus the pair at the end makes the goal
    or does not, and by the exact solver, which reads the text alone, likewise."""
    rng, labels = random.Random(0), []
    for puzzle in (sample_puzzle(rng) for _ in range(60)):
        left = tuple(sorted(puzzle.numbers, reverse=True))
        start = corpus.State(left, puzzle.target, tuple(map(str, left)), "{}")
        for _ in range(40):
            path = corpus.any_path(start, [rng.random() < 0.5 for _ in left[2:]], rng)
            if path:
                text, _ = corpus.write_line(path, lambda name: name, corpus.Draws(rng.random()), corpus.Config())
                labels.append(line_rewards.still_reaches(text.partition(":")[0] + ":", puzzle))
                assert labels[-1] == corpus.works(path[-1].state), (puzzle, text)
    assert 100 < sum(labels) < len(labels) - 100


def test_steps_are_the_lines_of_a_search_and_its_answer(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(TRACE)["input_ids"])
    steps = line_rewards.find_steps(tokens, PUZZLE)
    assert [(step.kind, step.label) for step in steps] == [
        ("ahead", 0.0), ("line", 0.0), ("ahead", 1.0), ("line", 1.0), ("answer", 1.0)]
    texts = ["".join(tokens[:step.index + 1]) for step in steps]
    assert texts[0].endswith("\n5-4=1,3 1?27:") and texts[1].endswith("/3 no\n") and texts[2].endswith("need,5 4?9:")
    assert texts[3].endswith(":+9 yes\n") and texts[4] == TRACE


def test_a_line_that_is_cut_off_is_judged_where_it_ends(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<think>\n5+4=9,9 3?27:+12-")["input_ids"])
    assert line_rewards.find_steps(tokens, PUZZLE)[-1] == line_rewards.Step(len(tokens) - 1, "line", 1.0)
    assert line_rewards.find_steps(tokens[:3], PUZZLE) == []


def test_noise_flips_that_share_of_the_labels(tokenizer):
    ids = tokenizer(TRACE)["input_ids"]
    steps = line_rewards.find_steps(tokenizer.convert_ids_to_tokens(ids), PUZZLE)
    traces = [line_rewards.Trace(PUZZLE, [5, 6], ids, TRACE, steps)] * 1000
    clean = prm.scorer_examples(traces, 0.0, seed=0)
    assert clean[0] == ([5, 6] + ids, [2 + step.index for step in steps], [step.label for step in steps])
    noisy = prm.scorer_examples(traces, 0.2, seed=0)
    flipped = [abs(a - b) for (_, _, a), (_, _, b) in zip(clean, noisy) for a, b in zip(a, b)]
    assert sum(flipped) / len(flipped) == pytest.approx(0.2, abs=0.02)


def test_reliability_by_hand():
    """Bins 0.2 and 0.8: in the first 1 of 2 is true, in the second 2 of 3."""
    table = scorer.reliability([(0.21, 0.0), (0.29, 1.0), (0.81, 1.0), (0.82, 1.0), (0.83, 0.0)])
    assert table["accuracy"] == 3 / 5 and table["majority_class"] == 3 / 5 and table["n"] == 5
    assert table["calibration_error"] == pytest.approx((2 * (0.5 - 0.25) + 3 * (0.82 - 2 / 3)) / 5)
    assert table["curve"] == [(pytest.approx(0.25), 0.5, 2), (pytest.approx(0.82), pytest.approx(2 / 3), 3)]


# ------------------------------------------------------------------------------------------- choosing one of N answers
def test_votes_and_best_count_valid_answers_only():
    values = [None, Fraction(9), Fraction(27), Fraction(27), None]
    assert scorer.vote(values, [1.0] * 5) == 27 and scorer.vote(values, [9, 3, 1, 1, 9]) == 9
    assert scorer.best(values, [9, 3, 1, 4, 9]) == 27
    assert scorer.vote([None], [1.0]) is None and scorer.best([None], [1.0]) is None
    assert scorer.vote([Fraction(9), Fraction(27)], [1.0, 1.0]) == 9  # the first on a tie


def test_the_plain_vote_is_the_evaluator_s():
    texts = [*(f"<answer>{answer}</answer>" for answer in ("3+4+5", "5+4+3", "(4+5)*3", "27")), "nothing"]
    for size in range(1, 6):
        chosen = scorer.vote([answer_value(text, PUZZLE.numbers) for text in texts[:size]], [1.0] * size)
        winner = vote(PUZZLE, texts[:size])
        assert chosen == answer_value(f"<answer>{winner}</answer>", PUZZLE.numbers)


def test_a_search_in_one_number():
    steps = [line_rewards.Step(i, kind, label) for i, (kind, label) in enumerate((
        ("ahead", 0), ("line", 0), ("ahead", 1), ("line", 1), ("answer", 1)))]
    assert prm.weigh(steps, [0.9, 0.2, 0.9, 0.6, 0.7]) == {"mean": 0.4, "min": 0.2, "last": 0.6, "answer": 0.7}
    assert prm.weigh([], []) == {"mean": 0.0, "min": 0.0, "last": 0.0, "answer": 0.0}


def test_rerank_by_hand():
    """Two of four answers are right, and the scorer likes one of them best. Blocks of two: right and wrong, right and
    wrong; by score the first block takes the right one, the second the wrong one."""
    right, wrong = "<answer>(4+5)*3</answer>", "<answer>4+5+3</answer>"
    steps = [line_rewards.Step(0, "line", 1.0), line_rewards.Step(1, "answer", 1.0)]
    traces = [line_rewards.Trace(PUZZLE, [1], [1, 2], text, steps) for text in (right, wrong, wrong, right)]
    ways = prm.rerank(traces, [[0.9, 0.9], [0.1, 0.1], [0.5, 0.5], [0.2, 0.2]], 4)
    assert ways["PRM, last"] == {1: [0.5], 2: [0.5], 4: [1.0]}  # of the one puzzle
    assert ways["majority"] == {1: [0.5], 2: [0.5], 4: [1.0]}  # ties go to the first
    assert ways["pass@N"] == {1: [0.5], 2: [pytest.approx(5 / 6)], 4: [1.0]}


# --------------------------------------------------------------------------------------------- rewards of single lines
@pytest.fixture
def two_searches(tokenizer):
    """Of one group: a line that ends in yes, one that ends in no, each with two tokens behind it."""
    texts = ("5+4=9,9 3?27:+12-6*27 yes\nxx", "5-4=1,3 1?27:+4-2*3/3 no\nxx")
    completions = [Completion(tokenizer(text)["input_ids"], [], False) for text in texts]
    return completions, [c.token_ids.index(tokenizer.convert_tokens_to_ids("\n")) for c in completions]


class Yes:
    """A scorer with log-odds 2 where a row has " yes" in it, -2 where it has not."""
    def __init__(self, tokenizer):
        self.token = tokenizer.convert_tokens_to_ids(" yes")

    def __call__(self, rows, positions):
        return torch.tensor([2.0 if self.token in row[:i] else -2.0 for row, own in zip(rows, positions) for i in own])


@pytest.mark.parametrize("form, behind", (("normalised", 0.0), ("paid", 1.0)))
def test_step_rewards_reach_the_tokens_of_their_lines(tokenizer, two_searches, form, behind):
    """Two scores in a group are worth 1 and -1: normalised, up to the line's end and not behind it; paid, on the whole
    completion. Weighted 0.5, and the outcome's 2 and -2 on top."""
    completions, ends = two_searches
    advantages, log = line_rewards.line_advantages(Yes(tokenizer), tokenizer, [PUZZLE] * 2, [[7]] * 2, completions,
                                                   torch.tensor([[2.0, -2.0]]), (1.0, 0.5, form))
    for completion, row, end, sign in zip(completions, advantages, ends, (1, -1)):
        row, behind_it = row[:len(completion.token_ids)].tolist(), row[len(completion.token_ids):]
        assert not behind_it.any()
        assert row[:end + 1] == pytest.approx([sign * 2.5] * (end + 1), abs=1e-4)
        assert row[end + 1:] == pytest.approx([sign * (2.0 + 0.5 * behind)] * (len(row) - end - 1), abs=1e-4)
    assert log == {"prm_score": pytest.approx(0.5), "lines": 1.0, "lines_that_reach": 0.5}


def test_the_scorer_and_not_the_truth_rewards_a_line(tokenizer):
    """"4+4=8,8 3?27:+11-5*27 yes" is false twice, and the scorer that looks for a yes pays it as much as a true one."""
    completions = [Completion(tokenizer(text)["input_ids"], [], False) for text in
                   ("4+4=8,8 3?27:+11-5*27 yes\n", "5+4=9,9 3?27:+12-6*27 yes\n")]
    advantages, log = line_rewards.line_advantages(Yes(tokenizer), tokenizer, [PUZZLE] * 2, [[7]] * 2, completions,
                                                   torch.tensor([[2.0, -2.0]]), (0.0, 1.0, "normalised"))
    assert not advantages.any() and log["lines_that_reach"] == 0.5
    exact, log = line_rewards.line_advantages(None, tokenizer, [PUZZLE] * 2, [[7]] * 2, completions,
                                              torch.tensor([[2.0, -2.0]]), (0.0, 1.0, "normalised"))  # the truth does, then
    assert exact[0, 0] == pytest.approx(-1.0, abs=1e-4) and exact[1, 0] == pytest.approx(1.0, abs=1e-4)
    assert log["prm_score"] == log["lines_that_reach"] == 0.5


# ------------------------------------------------------------------------------------------------------------ the tree
def test_selection_weighs_value_prior_and_visits():
    """Q + prior * sqrt(N) / (1 + n), N = 4: a has 0.5 + 0.6 * 2 / 3 = 0.9, b has 0.4 + 0.4 * 2 / 2 = 0.8. With twice
    the exploration: 1.3 against 1.2; after one more visit of a without value, 1/3 + 2 * 0.6 * sqrt(5) / 4 = 1.004."""
    root = tree.Node([1], visits=4)
    a, b = tree.Node([2], 0.6, root, visits=2, total=1.0), tree.Node([3], 0.4, root, visits=1, total=0.4)
    root.children = [a, b]
    assert tree.select(root, 1.0) is a and tree.select(root, 2.0) is a
    tree.back_up(a, 0.0)
    assert (a.visits, a.total, root.visits) == (3, 1.0, 5)
    assert tree.select(root, 2.0) is b
    assert b.path() == [1, 3]


def test_a_line_written_twice_is_one_child_and_costs_twice(tokenizer):
    root = tokenizer(make_prompt(PUZZLE) + tree.START)["input_ids"]
    own = tree.Search(PUZZLE, root)
    line = tokenizer("5-4=1,3 1?27:+4-2*3/3 no\n")["input_ids"]
    end = [*tokenizer("</think><answer>(4+5)*3</answer>")["input_ids"], tokenizer.eos_token_id]
    lines = [Completion(line, [math.log(0.5)] + [0.0] * (len(line) - 1), False)] * 2
    lines += [Completion(end, [math.log(0.25)] + [0.0] * (len(end) - 1), False), Completion([9, 9], [-20.0] * 2, True)]
    own.add(own.root, lines, [0.4, 0.4, 0.9, 0.8], tokenizer, {tokenizer.eos_token_id})
    assert [child.over for child in own.root.children] == [False, True, True]
    assert [child.prior for child in own.root.children] == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-4)
    assert [child.total for child in own.root.children] == [0.4, 0.9, 0.0]  # a line that never ends is worth nothing
    assert own.spent == 2 * sum(len(line.token_ids) for line in lines) and own.nodes_by_depth == {1: 3}
    assert own.choose() == {"best value": True, "vote": True, "found": True, "tokens": own.spent}
    assert own.finished[0][3] == tree.START + "</think><answer>(4+5)*3</answer>"


def test_a_search_keeps_to_its_budget_and_says_what_it_had_by_then(base):
    """A random policy: nothing is solved, but the tokens are counted, and a search that can add nothing stops."""
    from machinery.checkpoints import load
    model, tokenizer = load(base)
    puzzles = scorer.test_puzzles(3, 0)
    asked = []

    def value_of(rows):
        asked.append(sum(map(len, rows)))
        return [0.5] * len(rows)

    trees, table = tree.search(model, tokenizer, value_of, puzzles, budgets=[10, 2000], width=2, explore=1.0, seed=0,
                               what="test")
    assert all(one.spent >= 2000 or one.next_leaf(1.0) is None for one in trees)
    assert table["stuck"] == sum(one.spent < 2000 for one in trees) / 3
    assert table["found"][10] == [0.0] * 3 and set(table) == {"best value", "vote", "found", "tokens", "stuck"}
    assert all(spent <= budget for budget, row in table["tokens"].items() for spent in row) and max(table["tokens"][2000]) > 10
    again, table_again = tree.search(model, tokenizer, value_of, puzzles, budgets=[10, 2000], width=2, explore=1.0,
                                     seed=0, what="test")
    assert table == table_again and [one.spent for one in trees] == [one.spent for one in again]


def test_visits_to_what_is_over_lead_elsewhere_or_the_search_is_stuck():
    """The finished line has value 0.9, its open sibling 0.1 and half of the prior. Visits that add nothing make the
    sibling's turn come; where both are over, it never does."""
    own = tree.Search(PUZZLE, [1])
    done, open_ = tree.Node([2], 0.5, own.root, over=True), tree.Node([3], 0.5, own.root)
    own.root.children = [done, open_]
    tree.back_up(done, 0.9)
    tree.back_up(open_, 0.1)
    assert tree.select(own.root, 1.0) is done and own.next_leaf(1.0) is open_
    assert done.visits > 1 and done.total == pytest.approx(0.9 * done.visits) and open_.visits == 1
    open_.over = True
    assert own.next_leaf(1.0) is None


def test_a_path_ends_where_the_policy_s_context_does(tokenizer):
    own = tree.Search(PUZZLE, [1] * (tree.CONTEXT - tree.MAX_LINE - 2))
    own.add(own.root, [Completion([5, 6], [-1.0] * 2, False), Completion([5, 6, 7], [-1.0] * 3, False)], [0.5, 0.5],
            tokenizer, {tokenizer.eos_token_id})
    assert [child.over for child in own.root.children] == [False, True]


def test_growth_counts_different_beginnings():
    """Rows 1 1 0 2, 1 1 0 3, 4, with 0 as the newline: 2 and then 2 beginnings by token; one line, in two rows."""
    groups = [[(None, Completion(row, [], False), "") for row in ([1, 1, 0, 2], [1, 1, 0, 3], [4])]]
    table = mcts.growth(groups, newline=0, lines=2, tokens=4)
    assert table["tokens"]["different"] == [2, 1, 1, 2] and table["tokens"]["completions"] == [3, 2, 2, 2]
    assert table["lines"]["different"] == [1, 0] and table["lines"]["completions"] == [2, 0]


def test_returns_stand_at_every_end_of_a_line_and_shuffling_moves_them_whole():
    rows = [[1, 0, 2, 0, 3], [5, 0, 6]]
    groups = [[([9], Completion(row, [], False), text)] for row, text in
              zip(rows, ("<answer>(4+5)*3</answer>", "<answer>4</answer>"))]
    plain = mcts.value_examples(groups, [PUZZLE] * 2, newline=0)
    assert plain == [([9, 1, 0, 2, 0, 3], [2, 4, 5], [1.0] * 3), ([9, 5, 0, 6], [2, 3], [0.0] * 2)]
    labels = {tuple(example[2][0] for example in mcts.value_examples(groups, [PUZZLE] * 2, 0, random.Random(seed)))
              for seed in range(8)}
    assert labels == {(1.0, 0.0), (0.0, 1.0)}


def test_seeds_are_measured_on_different_test_puzzles():
    sets = [set(scorer.test_puzzles(50, seed)) for seed in range(3)]
    assert {split_of(puzzle) for own in sets for puzzle in own} == {"test"}
    assert len(set.union(*sets)) == 150


# -------------------------------------------------------------------------------------------------- pages and examples
def test_the_corpus_s_pages_are_the_prompts_of_the_few_shot_study(tokenizer):
    """What evaluate.py --shots puts before a puzzle is in the form of a page, and eight of them fit the context."""
    def prompt_of(seed):
        return fill_template(question(PUZZLE), examples=corpus.examples(random.Random(seed), "three", 8))
    prompt = prompt_of(0)
    page = next(d["prompt"] for d in corpus.write_corpus(corpus.Config(n=400, level="three", pages=1.0))
                if d["prompt"].count("using") == 9)
    assert prompt.count("\n\nusing") == page.count("\n\nusing") == 8
    assert tokenizer.unk_token_id not in tokenizer(prompt)["input_ids"]
    prompts = list(map(prompt_of, range(50)))
    longest = max(map(len, tokenizer(prompts)["input_ids"]))
    context = sft.new_model("student", seed=0)[0].config.context
    assert longest + evaluate.Config().max_new_tokens <= context


def test_arms_of_the_aha_study_differ_in_one_switch():
    for arm, flags in aha.ARMS.items():
        assert flags.count("--") == (arm != "full")
        own, full = (aha.arm_stages(aha.Config(), name, 1) for name in (arm, "full"))
        assert [flag for flag in own[0].flags if flag not in flags.split()] == full[0].flags
        for stage, other in zip(own[1:], full[1:]):  # the base, and RL
            assert [flag.replace(arm.replace(" ", "-"), "full") for flag in stage.flags] == other.flags
        assert all(stage.flags.count("1") == 1 for stage in full)  # the seed
