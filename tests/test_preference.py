"""The reward model: its loss by hand, what it sees and what it does not, and that other tools read it."""

import json
import math
import random
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import preference
from machinery.checkpoints import load
from machinery.run_folder import append_jsonl
from tasks.general import write_rows
from preference import (RewardModel, agreement, load_reward_model, margins, preference_scores, read_pairs,
                        rows_to_score, save_reward_model)


@pytest.fixture(scope="module")
def judge(base):
    """A reward model with random weights -> (reward model, tokenizer)."""
    model, tokenizer = load(base)
    torch.manual_seed(0)
    return RewardModel(model).eval(), tokenizer


def pairs_file(path, n: int = 300, flaw: bool = True):
    """Friendly over rude, in a few hundred wordings: easy to learn. The prompt says nothing about which is which."""
    rng = random.Random(0)
    prompts, friends = ("hello\n", "hi\n", "danke\n", "goodbye\n"), ("hello", "hi", "thank you", "good morning", "you are welcome!")
    append_jsonl(path, *({"prompt": rng.choice(prompts), "chosen": f"{rng.choice(friends)}, {rng.choice(friends)}",
                          "rejected": rng.choice(("go away", "not you", "go away, not you"))} | ({"flaw": "rude"} if flaw else {})
                         for _ in range(n)))
    return path


class Fixed:
    """A reward model whose score is the row's first token."""
    def __call__(self, rows):
        return torch.tensor([float(row[0]) for row in rows])


def test_the_loss_is_bradley_terry_by_hand():
    """-log sigmoid(chosen - rejected), and a tie is not right: margins 2, -1 and 0."""
    pairs = [{"chosen": [c], "rejected": [r], "flaw": flaw} for c, r, flaw in ((5, 3, "rude"), (1, 2, "rude"), (4, 4, "wrong"))]
    table = agreement(Fixed(), pairs, 100)
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)) + math.log(2)) / 3
    assert table == {"loss": pytest.approx(by_hand, abs=1e-6), "all": 1 / 3, "rude": 1 / 2, "wrong": 0.0}


@pytest.mark.parametrize("budget", (1, 40, 1000))
def test_micro_batches_change_no_margin(judge, budget):
    rng = random.Random(0)
    pairs = [{side: [rng.randrange(3, 200) for _ in range(rng.randint(2, 12))] for side in ("chosen", "rejected")}
             for _ in range(9)]
    found = {}
    for margin, group in margins(judge[0], pairs, budget):
        found |= dict(zip(group, margin.tolist()))
    alone = [(judge[0]([pair["chosen"]]) - judge[0]([pair["rejected"]])).item() for pair in pairs]
    assert [found[i] for i in range(9)] == pytest.approx(alone, abs=1e-5)


def test_a_score_depends_on_all_of_its_row_and_on_nothing_else(judge):
    rows = [[5, 6, 7], [5, 6, 7, 8, 9, 10], [9, 6, 7]]
    together = judge[0](rows).tolist()
    assert together == pytest.approx([judge[0]([row]).item() for row in rows], abs=1e-5)  # padding is not seen
    assert len(set(together)) == 3


def test_a_score_at_a_position_is_that_of_the_row_cut_there(judge):
    """Causal attention: what comes later changes nothing. So one pass scores every step of a search."""
    model, _ = judge
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    with torch.no_grad():
        together = model(rows, [[1, 4], [0]])
        alone = torch.cat([model([row]) for row in ([5, 6], rows[0], [10])])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5) and len(set(together.tolist())) == 3


def test_the_judge_never_sees_the_chain_of_thought(judge):
    plain, thought, open_, empty, tagged = preference_scores(
        *judge, ["hello\n"] * 5, ["hello", "<think>go away</think>\nhello", "<think>hello", "", "<answer>hello</answer>"])
    assert plain == thought and open_ == empty and len({plain, open_, tagged}) == 3


def test_scores_come_in_the_order_of_the_prompts(judge):
    texts = ["hello", "go away not you go away", "hi", ""]
    scores = preference_scores(*judge, ["hello\n"] * 4, texts, token_budget=8)
    assert scores == pytest.approx([preference_scores(*judge, ["hello\n"], [text])[0] for text in texts], abs=1e-5)
    assert preference_scores(*judge, [], []) == []


def test_a_reply_that_is_too_long_scores_as_its_beginning(judge):
    """The context of this model is 2,048 tokens: a policy that rambles must not end the run."""
    score, longer = preference_scores(*judge, ["hello\n"] * 2, [" hello" * 3000, " hello" * 4000])
    assert score == pytest.approx(longer, abs=1e-6) and math.isfinite(score)


def test_rows_end_with_eos_and_pairs_are_counted_by_their_flaw(judge, tmp_path):
    tokenizer = judge[1]
    (row,) = rows_to_score(tokenizer, ["hello\n"], ["<think>x</think>hi"])
    assert row == tokenizer("hello\nhi")["input_ids"] + [tokenizer.eos_token_id]
    assert {pair["flaw"] for pair in read_pairs(pairs_file(tmp_path / "a"), tokenizer, 99)} == {"rude"}
    assert {pair["flaw"] for pair in read_pairs(pairs_file(tmp_path / "b", flaw=False), tokenizer, 99)} == {"all"}


def test_other_tools_load_the_reward_model(judge, tmp_path):
    reward_model, tokenizer = judge
    save_reward_model(reward_model, tokenizer, tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).eval()
    rows = rows_to_score(tokenizer, ["hello\n", "danke\n"], ["hi", "bitte sehr!"])
    ours = reward_model(rows).tolist()
    for row, score in zip(rows, ours):
        assert theirs(torch.tensor([row])).logits.item() == pytest.approx(score, abs=1e-5)
    again, _ = load_reward_model(tmp_path / "model")
    assert again(rows).tolist() == ours


def train(monkeypatch, base, tmp_path, *flags):
    data = pairs_file(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(sys, "argv", ["preference.py", "--data", str(data), "--model", str(base), "--out",
                                      str(tmp_path / "run"), "--eval-pairs", "50", "--learning-rate", "1e-2", *flags])
    preference.main()
    return tmp_path / "run"


def test_it_learns_to_order_pairs_that_it_never_saw(monkeypatch, base, tmp_path, capsys):
    run = train(monkeypatch, base, tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 + 1  # about 250 pairs in steps of 32, and the last line
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # it begins with no opinion
    assert 50 <= rows[-1]["n"] < 56 and rows[-1]["eval_all"] == rows[-1]["eval_rude"] > 0.95
    assert f"orders 100.0% of {rows[-1]['n']} held-out pairs right" in capsys.readouterr().out
    scores = preference_scores(*load_reward_model(run / "checkpoint"), ["hi\n"] * 2, ["hello, hi", "go away"])
    assert scores[0] > scores[1] + 1

    monkeypatch.setattr(sys, "argv", ["preference.py", "--model", str(run / "checkpoint"), "--say", "hi", "hello, hi", "go away"])
    preference.main()
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == ["hello, hi", "go away"]


def test_no_held_out_pair_stands_in_training_word_for_word(monkeypatch, base, tmp_path, capsys):
    """Of the pairs that R1 trains on, which repeat themselves: a small world has few greetings."""
    rows = write_rows("pairs", 1500, 0)
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) < 0.8 * len(rows)
    append_jsonl(tmp_path / "rows.jsonl", *rows)
    split, keep_out = [], preference.keep_out
    monkeypatch.setattr(preference, "keep_out", lambda *given: split.append(keep_out(*given)) or split[0])
    train(monkeypatch, base, tmp_path, "--data", str(tmp_path / "rows.jsonl"))
    held_out, trained = ([(tuple(pair["chosen"]), tuple(pair["rejected"])) for pair in side] for side in split[0])
    assert 50 <= len(held_out) < 60 and not set(held_out) & set(trained) and len(held_out) + len(trained) == 1500
    assert "none of them with both replies" in capsys.readouterr().err


def test_equal_replies_have_equal_scores(judge):
    """Whatever shares their batch: a difference in the last bit would be an advantage of 1."""
    def noisy(rows):
        return torch.rand(len(rows))

    noisy.backbone = judge[0].backbone
    texts = ["hello", "hi", "<think>hi</think>hello", "go away not you", "hello", "hi"]
    scores = preference_scores(noisy, judge[1], ["hello\n"] * 5 + ["hi\n"], texts, token_budget=8)
    assert scores[0] == scores[2] == scores[4] and len(set(scores)) == 4  # the last prompt is another one


def test_the_same_seed_gives_the_same_reward_model(monkeypatch, base, tmp_path):
    states = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        run = train(monkeypatch, base, tmp_path / str(i), "--seed", str(seed))
        states.append(load_reward_model(run / "checkpoint")[0].score.weight.flatten().tolist())
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize("row, says", (
    ({"prompt": "a", "chosen": "b"}, "line 301 without text in prompt, chosen and rejected"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "line 301 without text"),
    ({"prompt": "a", "chosen": "b", "rejected": 5}, "line 301 without text"),
    ({"prompt": "a", "chosen": "hi " * 4000, "rejected": "b"}, "more than the model's context of 2048"),
))
def test_bad_pairs_are_refused_with_their_line(row, says, base, refused, tmp_path):
    append_jsonl(pairs_file(tmp_path / "pairs.jsonl"), row)
    refused(preference, "--data", tmp_path / "pairs.jsonl", "--model", base, "--out", tmp_path / "run", says=(says,))
    assert not (tmp_path / "run").exists()


def test_pairs_on_both_sides_and_a_free_folder_are_needed(base, refused, tmp_path):
    data = pairs_file(tmp_path / "pairs.jsonl", 20)
    refused(preference, "--data", data, "--model", base, "--eval-pairs", 20, "--out", tmp_path / "run",
            says=("got 20 pairs", "expected at least one on each side"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    refused(preference, "--data", data, "--model", base, "--eval-pairs", 5, "--out", tmp_path / "run",
            says=("already holds a run",))
    refused(preference, "--learning-rate", 0, says=("got learning_rate 0.0, expected more than 0",))


def test_a_language_model_is_no_reward_model(base):
    with pytest.raises(ValueError, match="is a language model; expected a reward model: python preference.py"):
        load_reward_model(base)
