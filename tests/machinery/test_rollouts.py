"""Every rollout can be seen: what is written, what is shown, what is said where a step or half a file is missing."""

import os

import pytest

import countdown
import train_countdown
from conftest import assert_one_line
from machinery import rl_run, rollouts
from machinery.data import read_jsonl
from machinery.run_folder import load_checkpoint, rewind_log
from test_training import call, digit_score, quiet_machine, train  # noqa: F401

PARTS = {"accuracy", "format", "language"}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """3 steps of 4 groups of 4; reward is the share of digits, by test_training."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_run, "plot_run", lambda run: None)
        patch.setattr(countdown, "score", digit_score)
        train(patch, base, folder, steps=3)
    return folder


def show(capsys, *arguments) -> str:
    rollouts.main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_a_row_has_all_that_became_of_a_completion(run):
    """Mean, deviation and advantages are those of the group's rewards, worked out again; ids decode to the text."""
    from machinery.checkpoints import load
    _, tokenizer = load(run / "checkpoint")
    rows = read_jsonl(run / "rollouts.jsonl")
    assert len(rows) == 48 and [row["group"] for row in rows[:16]] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    for i in range(0, 48, 4):
        group = rows[i:i + 4]
        rewards = [row["reward"] for row in group]
        mean = sum(rewards) / 4
        deviation = (sum((r - mean) ** 2 for r in rewards) / 4) ** 0.5
        assert len({row["prompt"] for row in group}) == 1
        for row in group:
            assert {"reward", "verdict", "trained", "truncated", "watched"} <= row.keys() and row["parts"].keys() == PARTS
            assert row["task"] == "countdown"
            assert row["group_mean"] == pytest.approx(mean, abs=1e-5)
            assert row["group_std"] == pytest.approx(deviation, abs=1e-5)
            assert row["advantage"] == pytest.approx((row["reward"] - mean) / (deviation + 1e-6), abs=1e-3)
            assert len(row["token_ids"]) == len(row["logprobs"]) and max(row["logprobs"]) <= 0
            ids = row["token_ids"] if row["truncated"] else row["token_ids"][:-1]
            assert tokenizer.decode(ids) == row["completion"]
            assert row["trained"] == (deviation > 0)


@pytest.mark.parametrize("kept, steps", (("every", [1, 2, 3, 4]), ("sampled", [1, 2, 4]), ("none", [])))
def test_the_disk_space_is_the_user_s_choice(monkeypatch, base, tmp_path, kept, steps):
    train(monkeypatch, base, tmp_path / "run", rollouts=kept)
    path = tmp_path / "run" / "rollouts.jsonl"
    assert sorted({row["step"] for row in read_jsonl(path)} if path.exists() else []) == steps


def test_a_step_is_shown_in_80_columns_with_rewards_and_advantages(run, capsys):
    printed = show(capsys, run, "--show", 2)
    assert max(map(len, printed.splitlines()[1:])) <= 80
    rows = [row for row in read_jsonl(run / "rollouts.jsonl") if row["step"] == 2]
    for row in rows:
        assert f"{row['reward']:6.2f} {row['advantage']:+9.2f} {len(row['token_ids']):6d}" in printed
    assert printed.count("\ngroup ") == 4 and show(capsys, run).startswith("step 3 of")


def test_a_group_is_shown_in_full(run, capsys):
    printed = show(capsys, run, "--show", 1, "--group", 2)
    assert max(map(len, printed.splitlines()[1:])) <= 80
    for row in read_jsonl(run / "rollouts.jsonl"):
        if (row["step"], row["group"]) == (1, 2):
            assert "".join(row["completion"].split()) in "".join(printed.split())


@pytest.mark.parametrize("flags, says", (
    (("--show", "7"), ("got --show 7", "3 steps from 1 to 3", "nearest one is 3")),
    (("--show", "1", "--group", "9"), ("got --group 9", "expected 0 to 3")),
))
def test_what_was_not_kept_is_said_in_one_line(run, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        rollouts.main([str(run), *flags])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, *says)


@pytest.mark.parametrize("text, says", ((None, "without rollouts.jsonl"), ("", "without a row"),
                                        ('{"step": 1, "group": 0, "pro', "rollouts.jsonl, line 1")))
def test_a_folder_without_them_or_half_a_file_is_said_in_one_line(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "rollouts.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        rollouts.main([str(tmp_path)])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, says)


@pytest.mark.parametrize("log, kept", (
    ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2),        # past the checkpoint
    ('{"step": 1}\n{"step": 2}\n{"step": 3, "gro', 2),      # a kill in the middle of a line
    ('{"step": 1}\n{"step": 2}\n{"st', 2),                  # so early that its step is not to be read
    ('{"step": 1}\n{"step": 2, "gro', None),                 # but what the checkpoint stands on is missing
    ('{"step": 1, "gro\n{"step": 2}\n', None),
    ('{"step": 1, "text": "a\u2028b\x85c"}\n{"step": 2}\n{"step": 3}\n', 2),  # no ends of lines: a model wrote them
))
def test_a_log_is_rewound_to_the_checkpoint_of_step_2(tmp_path, log, kept):
    path = tmp_path / "log.jsonl"
    path.write_text(log, encoding="utf-8")
    if kept is None:
        with pytest.raises(ValueError, match="log.jsonl, line"):
            rewind_log(path, 2)
        assert path.read_text(encoding="utf-8") == log
    else:
        rewind_log(path, 2)
        assert [row["step"] for row in read_jsonl(path)] == [1, 2][:kept]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_ends_in_one_line_and_the_checkpoint_is_whole(monkeypatch, base, tmp_path, capfd):
    """The disk is full when the rollouts of the first step are written: the checkpoint of step 0 resumes."""
    out = tmp_path / "run"
    start = train_countdown.start

    def fill_the_disk(config):
        result = start(config)
        (out / "rollouts.jsonl").symlink_to("/dev/full")
        return result
    with monkeypatch.context() as patch:
        patch.setattr(train_countdown, "start", fill_the_disk)
        train(patch, base, out, code=2)
    assert_one_line(capfd.readouterr().err, "the disk is full", "--rollouts sampled or none", "the last checkpoint is whole")
    assert load_checkpoint(out)[2]["step"] == 0
    (out / "rollouts.jsonl").unlink()
    assert call(monkeypatch, train_countdown, resume=out, rollouts="none") is None
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_an_unknown_choice_is_refused(refused, base, tmp_path):
    refused(train_countdown, "--model", base, "--out", tmp_path / "run", "--rollouts", "some",
            says=("got rollouts 'some'", "expected one of every, sampled, none"))
    assert not (tmp_path / "run").exists()
