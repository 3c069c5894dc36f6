"""RL on all prompts: general prompts in the last steps, scored by a reward model, in the tiny and in a chat style."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train_countdown
from countdown import fill_template
from machinery.checkpoints import load, save
from machinery.data import read_jsonl
from preference import RewardModel, save_reward_model

pytestmark = pytest.mark.usefixtures("quiet_training")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}make{% endif %}"
TIMES = ("seconds", "sampling_seconds", "tokens_per_second", "minutes")


@pytest.fixture(scope="module", params=("tiny", "chat"))
def world(request, base, tmp_path_factory):
    """-> (style, model directory, reward model directory). A chat model is one with a template."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = load(base)
    if request.param == "chat":
        tokenizer.chat_template = TEMPLATE
    save(model, tokenizer, folder / "model")
    torch.manual_seed(0)
    save_reward_model(RewardModel(model), tokenizer, folder / "judge")
    return request.param, folder / "model", folder / "judge"


def flags(world, out, **more) -> list[str]:
    style, model, judge = world
    settings = dict(model=model, style=style, task="countdown=3,general=1", preference=judge, out=out, steps=3,
                    mix_steps=2, batch_size=16, group_size=4, max_new_tokens=16, learning_rate=1e-2, eval_n=8, eval_every=9,
                    save_every=1, sample_every=1) | more
    return ["train_countdown.py", *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]


def rows_of(run) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES}
            for row in read_jsonl(run / "metrics.jsonl")]


@pytest.mark.parametrize("task, of_four", (("countdown=99,general=1", 1), ("countdown,general", 2), ("general", 4)))
def test_general_prompts_take_their_share_of_the_last_steps(world, tmp_path, monkeypatch, task, of_four):
    asked, score = [], train_countdown.score_completions
    monkeypatch.setattr(train_countdown, "score_completions", lambda drawn, *rest: asked.append(
        [task.name for task, _ in drawn[::4]]) or score(drawn, *rest))
    alone = {"eval_task": "countdown", "mix_steps": 0} if of_four == 4 else {}
    monkeypatch.setattr(sys, "argv", flags(world, tmp_path / "run", task=task, **alone))
    train_countdown.main()
    assert [names.count("general") for names in asked] == [4 if alone else 0, of_four, of_four]
    assert all(len(names) == 4 for names in asked)
    rows = rows_of(tmp_path / "run")
    assert all("eval_pass@1" in row and "eval_general_pass@1" not in row for row in (rows[0], rows[-1]))
    if alone:
        assert all({"preference", "good", "thinking"} <= row.keys() and "accuracy" not in row for row in rows[1:])
    else:
        assert ["general_preference" in row for row in rows[1:]] == [False, True, True]
        assert all("accuracy" in row and "preference" not in row for row in rows[1:])
    assert all(row["gradient_norm"] > 0 for row in rows[2:])  # scores differ, so there is something to learn


def test_a_resumed_run_with_general_prompts_equals_the_uninterrupted_one(world, tmp_path, monkeypatch):
    """Stopped after step 2, in the middle of the general ones."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(sys, "argv", flags(world, whole))
    train_countdown.main()
    with monkeypatch.context() as patch:
        patch.setattr(train_countdown, "StopRequest", lambda: type("Stop", (), {
            "requested": property(lambda self: len(rows_of(parts)) == 3), "end": lambda self: None})())
        patch.setattr(sys, "argv", flags(world, parts))
        with pytest.raises(SystemExit):
            train_countdown.main()
    assert len(rows_of(parts)) == 3
    monkeypatch.setattr(sys, "argv", ["train_countdown.py", "--resume", str(parts)])
    train_countdown.main()
    assert rows_of(parts) == rows_of(whole)
    ours, theirs = (load_file(run / "checkpoint" / "model.safetensors") for run in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_greetings_are_evaluated_in_the_models_own_style(world, monkeypatch):
    style, directory, _ = world
    model, tokenizer = load(directory)
    asked, complete = [], evaluate.complete
    monkeypatch.setattr(evaluate, "complete", lambda model, tokenizer, prompts, **settings: asked.append(
        prompts) or complete(model, tokenizer, prompts, **settings))
    table, _ = evaluate.evaluate(model, tokenizer, evaluate.Config(style=style, n=8, max_new_tokens=8))
    assert asked[1][0] == fill_template("hello\n", style, tokenizer)
    assert ("greetings" in table) == (style == "tiny")  # what a good reply is, is only known of the tiny world
    assert 0 <= table["needless_thinking"] <= 1


def test_what_general_prompts_need_is_said(base, refused, tmp_path):
    for given, says in ((("--task", "countdown=3,general=1"), "expected with it --preference MODEL"),
                        (("--task", "general", "--preference", base), "is a language model; expected a reward model"),
                        (("--task", "general", "--style", "base"), "with style 'base', expected tiny or chat"),
                        (("--task", "countdown=3,general=1", "--preference", base, "--mix-steps", -1), "mix_steps")):
        refused(train_countdown, "--model", base, "--out", tmp_path / "run", "--batch-size", 32, "--eval-n", 8, *given,
                says=(says,))
    assert not (tmp_path / "run").exists()
