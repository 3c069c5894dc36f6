"""The training scripts from end to end, on a random model of one layer: what they write, what they continue, what they
may not change.

A model that knows nothing solves no puzzle, and groups without a difference carry no gradient. So the reward here is an
easy one, the share of digits in the text, and every test that speaks of training trains. """

import json
import random
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import countdown
import evaluate
import sft
import train_countdown
from conftest import TINY
from countdown import split_of
from machinery import run_folder
from machinery.checkpoints import load
from machinery.data import read_jsonl
from rewards import extract_answer, verify
from sampling import sample
from tasks.general import NEW, draw_sum

TIMES = ("seconds", "sampling_seconds", "tokens_per_second", "minutes")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, quiet_training):
    monkeypatch.setitem(sft.TINY_MODELS, "test", TINY)
    monkeypatch.setattr(countdown, "score", digit_score)


def digit_score(puzzle, text):
    share = sum(c.isdigit() for c in text) / max(1, len(text))
    return {"accuracy": share, "format": 0.0}, verify(extract_answer(text), *puzzle)[1]


def call(monkeypatch, script, **flags):
    """script.main() with --flag=value for each, --flag alone for True; returns the exit code, None at the regular
    end."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
    try:
        script.main()
    except SystemExit as stop:
        return stop.code


def train(monkeypatch, base, out, code=None, **flags):
    settings = dict(model=base, out=out, steps=4, batch_size=16, group_size=4, max_new_tokens=24, learning_rate=1e-2,
                    eval_n=8, eval_every=2, save_every=2, sample_every=2)
    assert call(monkeypatch, train_countdown, **{**settings, **flags}) == code
    return rows_of(out)


def rows_of(run):
    rows = read_jsonl(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(run):
    return load_file(run / "checkpoint" / "model.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    """What a kill looks like from inside: no handler runs, nothing more is written."""


def interrupt(monkeypatch, script, run, rows: int, how: str):
    """Ctrl-C, or a kill before the next checkpoint, as soon as the run has logged so many rows."""
    class Stop:
        @property
        def requested(self):
            if len(rows_of(run)) < rows:
                return False
            if how == "killed":
                raise Killed
            return True

        def end(self):
            pass
    monkeypatch.setattr(script, "StopRequest", Stop)


# ---------------------------------------------------------------------------------------------------------- RL: the run
def test_a_step_with_a_gradient_logs_what_it_measured(monkeypatch, base, tmp_path):
    row = train(monkeypatch, base, tmp_path / "run", kl_coef=0.1, steps=1)[1]
    assert {"entropy", "logprob_gap", "logprob_gap_max", "clip_frac"} <= row.keys() and row["entropy"] > 0


def test_a_run_is_a_folder_that_other_tools_read(monkeypatch, base, tmp_path, capsys):
    """config.json, metrics.jsonl with a row per step, rollouts.jsonl, curve.png, a checkpoint for AutoModelForCausalLM;
    a last line with pass@1 before and after."""
    monkeypatch.undo()
    run = tmp_path / "run"
    rows = train(monkeypatch, base, run)
    assert rows[1]["equal_groups"] == 1.0 and rows[1]["gradient_norm"] == 0.0
    assert not {"entropy", "logprob_gap"} & rows[1].keys()  # no token was trained on: not measured, which is not 0
    assert json.loads((run / "config.json").read_text())["batch_size"] == 16
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_pass@1" in row] == [0, 2, 4]
    assert {"eval_pass@1_3_numbers", "eval_pass@1_4_numbers"} <= rows[0].keys()
    assert {"reward", "accuracy", "format", "completion_tokens", "truncated", "backtracks", "reflection_words", "mixed",
            "equal_groups", "loss", "gradient_norm", "learning_rate", "tokens"} <= rows[1].keys()
    assert [row["step"] for row in read_jsonl(run / "rollouts.jsonl")] == [1] * 16 + [2] * 16 + [3] * 16 + [4] * 16
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    model, _ = load(run / "checkpoint")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(run / "checkpoint")(ids).logits
        torch.testing.assert_close(theirs, model(ids), atol=1e-4, rtol=0)
    assert {path.name for path in run.iterdir()} == {"checkpoint", "config.json", "curve.png", "metrics.jsonl",
                                                     "rollouts.jsonl"}
    out = capsys.readouterr().out
    assert re.search(r"the first step took [\d.]+ s here: \d+ to \d+ minutes for all 4", out)
    last = out.splitlines()[-1]
    assert last.startswith("validation pass@1 0.0% -> 0.0%") and str(run) in last and "n = 8" in last


def puzzles_of(prompts) -> list[countdown.Puzzle]:
    words = [prompt.split() for prompt in prompts if prompt.startswith("using")]
    return [countdown.Puzzle(tuple(map(int, w[1:-2])), int(w[-1])) for w in words]


def test_training_is_on_train_puzzles_and_looks_at_validation_and_never_at_test(monkeypatch, base, tmp_path):
    """Every prompt that a run reads, by key: before and after training, and in its step. Greetings and sums, too."""
    asked, complete = [], evaluate.complete
    monkeypatch.setattr(evaluate, "complete", lambda model, tokenizer, prompts, **settings: asked.extend(
        prompts) or complete(model, tokenizer, prompts, **settings))
    train(monkeypatch, base, tmp_path / "run", steps=1)
    evaluated = puzzles_of(asked)
    assert len(evaluated) == 2 * 8 and {split_of(puzzle) for puzzle in evaluated} == {"validation"}
    trained = puzzles_of(row["prompt"] for row in read_jsonl(tmp_path / "run" / "rollouts.jsonl"))
    assert len(trained) == 16 and {split_of(puzzle) for puzzle in trained} == {"train"}
    assert {f"{prompt}\n" for prompt in NEW["validation"]} <= set(asked)
    assert not {f"{prompt}\n" for prompt in NEW["test"]} & set(asked)
    sums = [prompt for prompt in asked if prompt.startswith(("what is", "was ist"))]
    test_sums = {draw_sum(rng, "test")["prompt"] for rng in [random.Random(0)] for _ in range(3000)}
    assert len(sums) == 2 * 8 and not test_sums & set(sums)


def test_accuracy_is_logged_of_three_and_of_four_numbers_apart(monkeypatch, base, tmp_path):
    """Each is the mean over the step's completions for puzzles with so many numbers, worked out again from its
    rollouts; a step without such puzzles does not name them."""
    rows = train(monkeypatch, base, tmp_path / "run", steps=3, group_size=2, batch_size=8)
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    for row in rows[1:]:
        expected = {}
        for rollout in rollouts:
            if rollout["step"] == row["step"]:
                puzzle, = puzzles_of([rollout["prompt"]])
                expected.setdefault(f"accuracy_{len(puzzle.numbers)}_numbers", []).append(rollout["parts"]["accuracy"])
        logged = {name: value for name, value in row.items() if name.startswith("accuracy_")}
        assert logged == {name: pytest.approx(sum(values) / len(values)) for name, values in expected.items()}
    assert {"accuracy_3_numbers", "accuracy_4_numbers"} <= set().union(*rows)


def test_the_learning_rate_warms_up_and_falls(monkeypatch, base, tmp_path):
    """Step s of 4, from 0: 0.01 * min((s + 1) / 3, 1 - 0.9 s / 4). So 1/3, 2/3 of the peak, then 0.55 and 0.325."""
    rows = train(monkeypatch, base, tmp_path / "run", warmup_steps=3, final_lr=0.1)
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.0055, 0.00325])


def test_training_raises_its_reward(monkeypatch, base, tmp_path):
    """15 steps on the share of digits: from about 0.2 to nearly all, and never through puzzles that evaluation uses."""
    seen = []
    score = train_countdown.score_completions
    monkeypatch.setattr(train_countdown, "score_completions", lambda drawn, *rest: seen.extend(
        puzzle for _, puzzle in drawn) or score(drawn, *rest))
    rows = train(monkeypatch, base, tmp_path / "run", steps=15, batch_size=32, group_size=8, warmup_steps=1,
                 eval_every=100, learning_rate=4e-2)
    rewards = [row["reward"] for row in rows[1:]]
    assert rewards[0] < 0.4 and min(rewards[-3:]) > 0.8
    assert len(seen) == 15 * 32 and {split_of(puzzle) for puzzle in seen} == {"train"}
    assert len({puzzle for puzzle in seen}) > 15 * 3  # 4 fresh puzzles a step


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_sampler_and_trainer_agree_on_the_logprobs(monkeypatch, base, tmp_path, temperature):
    """Both are at the sampling temperature, of the policy that sampled. One epoch is on-policy: ratio 1, nothing is
    clipped."""
    for row in train(monkeypatch, base, tmp_path / "run", temperature=temperature)[1:]:
        assert row["equal_groups"] == 0 and 0 <= row["logprob_gap"] <= row["logprob_gap_max"] < 1e-3
        assert row["ratio"] == pytest.approx(1, abs=1e-4) and row["clip_frac"] == 0


def test_inner_epochs_use_the_stored_logprobs(monkeypatch, base, tmp_path):
    """In the second epoch the policy has moved: the ratio to the recorded log-probs is no longer 1. The gap is the
    first epoch's."""
    rows = train(monkeypatch, base, tmp_path / "run", inner_epochs=2, warmup_steps=1)[1:]
    assert all(abs(row["k1_kl_old"]) > 1e-4 and row["logprob_gap_max"] < 1e-3 for row in rows)
    assert max(row["clip_frac"] for row in rows) > 0


def test_the_reference_is_replaced_every_n_steps(monkeypatch, base, tmp_path):
    """k3 to the reference is 0 in each step that follows a replacement, and grows where the first policy stays the
    reference."""
    kl = {}
    for every in (0, 2):
        rows = train(monkeypatch, base, tmp_path / f"run{every}", kl_coef=0.01, ref_every=every)
        kl[every] = [row["k3_kl_ref"] for row in rows[1:]]
    assert kl[0][0] < 1e-6 < kl[0][1] < kl[0][2] < kl[0][3]
    assert kl[2][0] < 1e-6 < kl[2][1] and kl[2][2] < 1e-6 < kl[2][3]


# ------------------------------------------------------------------------------------------------------- RL: the update
def gradients(monkeypatch, script):
    """Collects the gradients of every optimizer step, before they are clipped."""
    collected, clip = [], script.clip_gradients

    def spy(gradients, limit):
        collected.append([gradient.clone() for gradient in gradients])
        return clip(gradients, limit)
    monkeypatch.setattr(script, "clip_gradients", spy)
    return collected


@pytest.mark.parametrize("average", ("token", "sequence", "constant"))
def test_micro_batches_change_neither_gradient_nor_loss(monkeypatch, base, tmp_path, average):
    """Adam hides a gradient of the wrong size, so the gradient itself is compared, and then the weights."""
    collected, calls, loss = gradients(monkeypatch, train_countdown), [], train_countdown.grpo_loss
    monkeypatch.setattr(train_countdown, "grpo_loss", lambda *args, **kwargs: calls.append(1) or loss(*args, **kwargs))
    rows = {}
    for budget in (64, 100_000):
        rows[budget] = train(monkeypatch, base, tmp_path / f"{budget}", steps=1, micro_batch_tokens=budget,
                             average=average, learning_rate=1e-4)[1]
    assert len(calls) > 8  # many, then one
    assert len(collected) == 2
    for small, large in zip(*collected, strict=True):
        torch.testing.assert_close(small, large, atol=1e-7, rtol=1e-4)
    assert rows[64] == {name: pytest.approx(value, abs=1e-6) for name, value in rows[100_000].items()}
    ours, theirs = weights(tmp_path / "64"), weights(tmp_path / "100000")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


@pytest.mark.parametrize("average", ("token", "sequence", "constant"))
def test_the_divisor_counts_the_whole_step(monkeypatch, base, tmp_path, average):
    """All completion tokens of the step, or all 16 completions, though groups whose rewards are equal are not computed:
    a step in which few groups differ is a small step, not a loud one."""
    divisors, loss = [], train_countdown.grpo_loss
    monkeypatch.setattr(countdown, "score", lambda puzzle, text: digit_score(puzzle, text if puzzle.target > 15 else ""))
    monkeypatch.setattr(train_countdown, "grpo_loss", lambda *args, divisor, **settings: divisors.append(divisor)
                        or loss(*args, divisor=divisor, **settings))
    row = train(monkeypatch, base, tmp_path / "run", steps=1, average=average, micro_batch_tokens=64)[1]
    assert 0 < row["equal_groups"] < 1
    assert set(divisors) == {row["tokens"] if average == "token" else 16}


def test_groups_that_all_got_the_same_train_nothing(monkeypatch, base, tmp_path):
    monkeypatch.setattr(countdown, "score", lambda *args: ({"accuracy": 1.0, "format": 1.0}, "correct"))
    rows = train(monkeypatch, base, tmp_path / "run", weight_decay=0.1)
    assert all(row["equal_groups"] == 1 and row["gradient_norm"] == 0 for row in rows[1:])
    assert_equal_weights(weights(tmp_path / "run"), load_file(base / "model.safetensors"))


def test_truncated_completions_are_counted_and_can_be_left_out(monkeypatch, base, tmp_path):
    """DAPO's overlong filtering: two tokens are too few for an EOS, so with drop_truncated nothing is left to train
    on."""
    kept = train(monkeypatch, base, tmp_path / "kept", steps=1, max_new_tokens=2)[1]
    dropped = train(monkeypatch, base, tmp_path / "dropped", steps=1, max_new_tokens=2, drop_truncated=True)[1]
    assert kept["truncated"] == dropped["truncated"] == 1
    assert kept["gradient_norm"] > 0 == dropped["gradient_norm"]


# ----------------------------------------------------------------------------------------------------------- RL: resume
@pytest.mark.parametrize("how", ("stopped", "killed"))
@pytest.mark.parametrize("flags", (
    {}, {"inner_epochs": 2, "kl_coef": 0.01, "ref_every": 1}, {"kl_coef": 0.01, "ref_every": 0},
), ids=("plain", "inner epochs, new reference", "first reference"))
def test_a_resumed_run_equals_the_uninterrupted_one(monkeypatch, base, tmp_path, capsys, flags, how):
    """Stopped after step 1 (a checkpoint there), or killed after step 3 (the last one is of step 2, and row 3 is
    written again): same metrics, same rollouts, same weights to the last bit."""
    whole, run = tmp_path / "whole", tmp_path / "parts"
    expected = train(monkeypatch, base, whole, **flags)
    with monkeypatch.context() as patch:
        interrupt(patch, train_countdown, run, rows=2 if how == "stopped" else 4, how=how)
        if how == "stopped":
            train(patch, base, run, code=130, **flags)
            assert f"continue with: python train_countdown.py --resume {run}" in capsys.readouterr().out
        else:
            with pytest.raises(Killed):
                train(patch, base, run, **flags)
    assert len(rows_of(run)) == (2 if how == "stopped" else 4)
    assert call(monkeypatch, train_countdown, resume=run) is None
    assert rows_of(run) == expected
    assert (run / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert_equal_weights(weights(run), weights(whole))
    assert any(row["gradient_norm"] > 0 for row in expected[1:])


def test_a_run_killed_while_its_checkpoint_was_replaced_still_resumes(monkeypatch, base, tmp_path):
    """Between two renames the checkpoint is called checkpoint.old. The finished run below resumes, and finds nothing
    left to do."""
    run = tmp_path / "run"
    expected = train(monkeypatch, base, run, steps=2)
    before = weights(run)
    (run / "checkpoint").rename(run / "checkpoint.old")
    assert call(monkeypatch, train_countdown, resume=run) is None
    assert rows_of(run) == expected
    assert_equal_weights(load_file(run_folder.find_checkpoint(run) / "model.safetensors"), before)


def step(base, tmp_path, advantages, monkeypatch):
    """One update on four completions of a sharp model, with these advantages -> its stats and the new weights."""
    config = train_countdown.Config(model=str(base), out=str(tmp_path / "run"), batch_size=4, group_size=4, max_new_tokens=8,
                                    eval_n=4, rollouts="none")
    run, _, _ = train_countdown.start(config)
    prompts = [[5, 6, 7]] * 4
    completions = sample(run.policy, prompts, max_new_tokens=8, eos_ids={0}, seed=0)
    trained = train_countdown.with_gradient(advantages, completions, config)
    stats = train_countdown.update(run, [(prompts[i], completions[i]) for i in trained], advantages[trained], None,
                                   train_countdown.loss_divisor(completions, config), config)
    return stats, {name: value.clone() for name, value in run.policy.state_dict().items()}


def test_an_advantage_per_token_trains_as_the_completion_s_own_does(monkeypatch, base, tmp_path):
    """(B, T) with the same number on every token of a completion is (B,)."""
    own = torch.tensor([1.0, -1.0, 0.5, -0.5])
    one, weights_of_one = step(base, tmp_path / "a", own, monkeypatch)
    each, weights_of_each = step(base, tmp_path / "b", own[:, None].expand(4, 8), monkeypatch)
    assert one == each and one["gradient_norm"] > 0
    assert_equal_weights(weights_of_one, weights_of_each)


def test_tokens_without_an_advantage_train_nothing(monkeypatch, base, tmp_path):
    stats, weights_after = step(base, tmp_path, torch.zeros(4, 8), monkeypatch)
    assert stats["gradient_norm"] == 0.0
    before = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], weights_after[name]) for name in before)
