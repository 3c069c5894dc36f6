"""Rejection sampling: what each filter drops, what the report counts, what the dataset holds. Texts come from a fake
sampler, since a random model solves no puzzle."""

import json
import sys
from collections import Counter

import pytest

import rejection
import sft
from countdown import Puzzle, make_prompt, question, sample_puzzles, score, solve, split_of
from machinery import tasks
from machinery.checkpoints import load
from machinery.data import read_jsonl
from machinery.run_folder import append_jsonl
from rejection import FILTERS, Config, sample_rows
from rewards import accuracy_reward
from sampling import Completion

PUZZLE = Puzzle((3, 4, 5), 27)


def written(thinking: str, answer: str = "(4+5)*3") -> str:
    return f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>"


def completion(text: str, tokens: int = 10, truncated: bool = False) -> Completion:
    return Completion([1] * tokens, [0.0] * tokens, truncated)


@pytest.mark.parametrize("text, done, dropped_by", (
    (written("4+5=9?27 no,\n9*3=27?27 yes"), {}, None),
    (written("4+5=9?27 no,"), {}, None),                                   # right is right, whatever was found
    (written("4+5=9 yes", "4+5+3"), {}, "correct"),
    ("5*4+7", {}, "correct"),
    ("<answer>(4+5)*3</answer>", {}, "well_formatted"),                    # right, but no thinking
    (written("4+5=9 yes") + " bye", {}, "correct"),                        # an answer must be final
    (written("4+5=9?27 nein,\n9*3=27?27 yes"), {}, "one_language"),
    (written("4+5=9?27 nein,\n9*3=27?27 ja"), {}, "one_language"),         # one language, but not the one asked for
    (written("4+5=9, 9*3=27"), {}, None),                                  # no words at all mix nothing
    (written("9 yes"), {"tokens": 800}, None),
    (written("9 yes"), {"tokens": 801}, "short_enough"),
    (written("9 yes"), {"truncated": True}, "short_enough"),
    (written("4+5=9 no,\n3*4=12 no,\n4+5=9 no,"), {}, "not_repetitive"),
    (written("4+5=9 no,\n\n\n3*4=12 no,"), {}, None),                      # empty lines repeat nothing
))
def test_which_filter_drops_a_completion(text, done, dropped_by):
    found = completion(text, **done)
    assert next((f.__name__ for f in FILTERS if not f(text, found, score(PUZZLE, text), Config())), None) == dropped_by


def test_the_filters_follow_their_settings():
    long, twice = written("9 yes"), written("no,\nno,")
    assert rejection.short_enough(long, completion(long, 801), score(PUZZLE, long), Config(max_tokens=801))
    assert rejection.not_repetitive(twice, completion(twice), score(PUZZLE, twice), Config(max_repeats=2))
    assert rejection.one_language(written("9 ja"), completion(long), score(PUZZLE, long), Config(language="de"))


@pytest.fixture
def fake_sampler(monkeypatch):
    """Puts write(numbers, target, i) in the place of complete(), i counting a puzzle's completions; returns the
    seeds."""
    def install(write):
        seeds = []

        def complete(model, tokenizer, prompts, *, seed, **settings):
            seeds.append(seed)
            counted, texts = Counter(), []
            for prompt in prompts:
                words = prompt.split("\n")[-2].split() if "User:" not in prompt else None
                numbers = tuple(int(word) for word in words[1:words.index("make")]) if words else ()
                texts.append(write(numbers, int(words[-1]) if words else 0, counted[prompt]))
                counted[prompt] += 1
            return [[0]] * len(texts), [completion(text) for text in texts], texts
        monkeypatch.setattr(rejection, "complete", complete)
        return seeds
    return install


@pytest.fixture(scope="module")
def model(base):
    return load(base)


def ignore(chunk):
    """Where nothing needs to be kept for after a kill."""


def right(numbers, target, i) -> str:
    return written(f"{'9 no,' * (i + 1)}\n9 yes", solve(numbers, target))


def test_every_completion_is_kept_or_counted(fake_sampler, model):
    """Of 6 completions a puzzle: 2 alike, 1 wrong, 1 German, and 2 others of which the cap leaves one."""
    def write(numbers, target, i):
        return (right(numbers, target, 0), right(numbers, target, 0), written("9 no,", "1"),
                right(numbers, target, 1).replace("no", "nein"), right(numbers, target, 2), right(numbers, target, 3))[i]
    fake_sampler(write)
    rows, report = sample_rows(*model, "here", 1, Config(n=20, samples=6, per_puzzle=2), {}, ignore)
    assert report["dropped"] == {"correct": 20, "well_formatted": 0, "one_language": 20, "short_enough": 0,
                                 "not_repetitive": 0, "duplicates": 20, "per_puzzle": 20}
    assert report["sampled"] == 120 == report["kept"] + sum(report["dropped"].values())
    assert (report["kept"], report["puzzles_kept"], len(rows), report["sampled_tokens"]) == (40, 20, 40, 1200)


def test_a_row_says_where_it_came_from(fake_sampler, model):
    fake_sampler(right)
    rows, _ = sample_rows(*model, "runs/x/checkpoint", 2, Config(n=30, samples=1, seed=7), {}, ignore)
    assert {len(row["numbers"]) for row in rows} == {3, 4}
    for index, row in enumerate(rows):
        assert row["prompt"] == f"using {' '.join(map(str, row['numbers']))} make {row['target']}\n"
        assert accuracy_reward(row["completion"], row["numbers"], row["target"]) == 1.0
        assert split_of(Puzzle(row["numbers"], row["target"])) == "train"  # the others teach nobody
        assert row | {"language": "en", "tokens": 10, "source": "runs/x/checkpoint", "round": 2, "seed": 7,
                      "index": index} == row


def test_a_row_holds_the_question_without_a_template(monkeypatch, model):
    """sft.py --style base puts it into the template, and takes the <think> that the prompt ends with from the
    completion."""
    puzzles = sample_puzzles(2, split="train", seed=0)

    def complete(model, tokenizer, prompts, **settings):
        assert prompts == [make_prompt(puzzle, "base") for puzzle in puzzles]
        texts = [right(*puzzle, 0) for puzzle in puzzles]
        return None, [completion(text) for text in texts], texts
    monkeypatch.setattr(rejection, "complete", complete)
    rows, _ = sample_rows(*model, "here", 1, Config(n=2, samples=1, style="base"), {}, ignore)
    assert [row["prompt"] for row in rows] == [question(puzzle, "base") for puzzle in puzzles]
    (prompt, text), _ = sft.tokenize(rows, model[1], "rows.jsonl", "base")
    prompt, text = map(model[1].decode, (prompt, text))
    assert prompt.endswith("<think>") and text.startswith("\n9 no")


def call(monkeypatch, tmp_path, *flags) -> list[dict]:
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["rejection.py", "--out", str(out), *map(str, flags)])
    rejection.main()
    return read_jsonl(out)


def replies_file(tmp_path, n: int):
    append_jsonl(path := tmp_path / "replies.jsonl", *({"prompt": "hi\n", "completion": str(i)} for i in range(n)))
    return path


def test_three_parts_thinking_and_one_part_without(monkeypatch, tmp_path, base, fake_sampler):
    fake_sampler(right)
    rows = call(monkeypatch, tmp_path, "--model", base, "--n", 30, "--samples", 2, "--non-cot",
                replies_file(tmp_path, 50))
    non_cot = [row["completion"] for row in rows if row["prompt"] == "hi\n"]
    assert len(rows) == 80 and len(non_cot) == 20 == len(set(non_cot))
    assert 0 < sum(row["prompt"] == "hi\n" for row in rows[:40]) < 20  # mixed, not one after the other
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["rows"] == 80 and report["rounds"][0]["kept"] == 60


def test_it_asks_until_it_has_enough(monkeypatch, tmp_path, base, fake_sampler, capfd):
    """One of three completions of a puzzle is right: 10 rows are there after 30 completions at the earliest, and not all
    90 are sampled. Where all are not enough it says so."""
    fake_sampler(lambda numbers, target, i: right(numbers, target, 0) if i == 0 else "no")
    monkeypatch.setattr(rejection, "CHUNK", 36)  # three puzzles at once
    rows = call(monkeypatch, tmp_path, "--model", base, "--n", 30, "--samples", 3, "--limit", 10)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())["rounds"][0]
    assert len(rows) == 10 and report["puzzles"] == 12 and report["sampled"] == 3 * report["puzzles"] == sum(
        report["dropped"].values()) + report["kept"]
    for path in tmp_path.glob("out.jsonl*"):
        path.unlink()
    assert len(call(monkeypatch, tmp_path, "--model", base, "--n", 30, "--samples", 3, "--limit", 31)) == 30
    assert "30 rows are kept of the --limit 31 that was asked for, after all 30 problems" in capfd.readouterr().err


def test_rounds_fine_tune_on_all_rows_so_far_and_add_what_is_new(monkeypatch, tmp_path, base, fake_sampler):
    """Round 2 samples from the fine-tuned checkpoint with other random numbers; what it writes again is no new row."""
    seeds, tuned = fake_sampler(lambda numbers, target, i: right(numbers, target, len(seeds) - 1 if i else 0)), []
    monkeypatch.setattr(rejection, "fine_tune",
                        lambda rows, round_, config: tuned.append((len(rows), round_)) or str(base))
    rows = call(monkeypatch, tmp_path, "--model", base, "--n", 20, "--samples", 2, "--rounds", 3)
    reports = json.loads((tmp_path / "out.jsonl.report.json").read_text())["rounds"]
    assert [(r["round"], r["kept"], r["new"]) for r in reports] == [(1, 20, 20), (2, 40, 20), (3, 40, 20)]
    assert tuned == [(20, 1), (40, 2)] and len(rows) == 60 and len(set(seeds)) == 3
    assert len({(row["prompt"], row["completion"]) for row in rows}) == 60


def test_a_round_is_an_sft_of_the_base(monkeypatch, tmp_path, base):
    rows = [{"prompt": f"using 3 4 5 make {i}\n", "completion": written("9 yes")} for i in range(8)]
    config = Config(out=str(tmp_path / "rounds.jsonl"), base=str(base), sft_flags="--batch-tokens 64")
    checkpoint = rejection.fine_tune(rows, 1, config)
    assert checkpoint == f"{tmp_path}/rounds.jsonl.round1/sft/checkpoint"
    assert load(checkpoint)[0].config == load(base)[0].config
    written_at = (tmp_path / "rounds.jsonl.round1" / "sft" / "config.json").stat().st_mtime_ns
    assert rejection.fine_tune(rows, 1, config) == checkpoint  # after a kill it goes on, here to nothing
    assert (tmp_path / "rounds.jsonl.round1" / "sft" / "config.json").stat().st_mtime_ns == written_at
    rejection.fine_tune(rows[1:], 1, config)  # other rows: from the beginning
    assert (tmp_path / "rounds.jsonl.round1" / "sft" / "config.json").stat().st_mtime_ns > written_at


def test_chunks_change_no_row(monkeypatch, model):
    """A true sampler, so right is what has an answer tag or not: the random streams are the completions' own."""
    monkeypatch.setattr(rejection, "FILTERS", (lambda text, *rest: "5" in text,))
    rejection.FILTERS[0].__name__ = "five"
    config, found = Config(n=10, samples=3, max_new_tokens=12), []
    for rejection.CHUNK in (2048, 6, 1):
        found.append(sample_rows(*model, "here", 1, config, {}, ignore))
    monkeypatch.undo()
    assert found[0] == found[1] == found[2] and 0 < len(found[0][0]) < 30
    assert len({row["index"] for row in found[0][0]}) == len(found[0][0])


def test_a_killed_run_goes_on_where_it_was(monkeypatch, tmp_path, base, fake_sampler):
    """Killed in the third of four chunks, in the middle of a line: two chunks are not sampled again."""
    monkeypatch.setattr(rejection, "CHUNK", 10)
    flags = ("--model", base, "--n", 20, "--samples", 2)
    fake_sampler(right)
    whole = call(monkeypatch, tmp_path, *flags)
    (tmp_path / "out.jsonl").unlink()
    calls = fake_sampler(lambda *puzzle: right(*puzzle) if len(calls) < 3 else kill())
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, tmp_path, *flags)
    partial = tmp_path / "out.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 1 + 2 and not (tmp_path / "out.jsonl").exists()
    partial.write_text(partial.read_text() + '{"round": 1, "sta')
    calls = fake_sampler(right)
    assert call(monkeypatch, tmp_path, *flags) == whole and len(calls) == 2
    assert not partial.exists()


def kill():
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ("flag", "weights"))
def test_what_other_flags_or_weights_sampled_is_not_used(monkeypatch, tmp_path, base, fake_sampler, change):
    fake_sampler(lambda *puzzle: kill())
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, tmp_path, "--model", base, "--n", 20, "--samples", 2)
    partial = tmp_path / "out.jsonl.partial"
    header = json.loads(partial.read_text())
    append_jsonl(partial, {"round": 1, "start": 0, "rows": [{"prompt": "old", "completion": ""}], "tokens": 1, "dropped": {}})
    if change == "weights":
        partial.write_text(partial.read_text().replace(header["weights"], "others"))
    fake_sampler(right)
    rows = call(monkeypatch, tmp_path, "--model", base, "--n", 20, "--samples", 2,
                *(("--seed", 1) if change == "flag" else ()))
    assert "old" not in {row["prompt"] for row in rows}


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("text, filter_", (
    (lambda *puzzle: "no", "correct"),
    (lambda numbers, target, i: f"<answer>{solve(numbers, target)}</answer>", "well_formatted"),
    (lambda numbers, target, i: written("9 nein,", solve(numbers, target)), "one_language"),
    (lambda numbers, target, i: written("9 no,\n9 no,", solve(numbers, target)), "not_repetitive"),
))
def test_when_nothing_is_left_the_filter_that_took_the_last_is_named(fake_sampler, base, refused, tmp_path, text, filter_):
    fake_sampler(text)
    refused(rejection, "--model", base, "--n", 5, "--samples", 2, "--out", tmp_path / "out.jsonl",
            says=("got 10 completions", f"none was left after the filter {filter_}, which took the last 10"))
    assert list(tmp_path.iterdir()) == []


def test_too_few_replies_are_refused_before_anything_is_sampled(fake_sampler, base, refused, tmp_path):
    asked = fake_sampler(right)
    refused(rejection, "--model", base, "--n", 30, "--samples", 2, "--out", tmp_path / "out.jsonl",
            "--non-cot", replies_file(tmp_path, 19), says=("got 19 rows", "expected 20", "beside up to 60 rows"))
    assert not (tmp_path / "out.jsonl").exists() and asked == []


def test_broken_replies_are_refused_before_anything_is_sampled(base, refused, tmp_path):
    for line, says in (('{"prompt": "a"}', "line 2 without text in prompt and completion"), ("{", "line 2: ")):
        (tmp_path / "replies.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
        refused(rejection, "--model", base, "--non-cot", tmp_path / "replies.jsonl", "--out", tmp_path / "out.jsonl",
                says=(tmp_path / "replies.jsonl", says))


@pytest.mark.parametrize("flags, says", (
    (("--n", 100_000), ("has only about", "ask for fewer")),
    (("--max-new-tokens", 2040), ("more than the model's context of 2048", "lower --max-new-tokens")),
    (("--language", "fr"), ("got language 'fr', expected one of en, de",)),
    (("--samples", 0), ("got samples 0, expected more than 0",)),
    (("--non-cot-share", 1), ("non_cot_share within (0, 1)",)),
    (("--non-cot", "no.jsonl"), ("no.jsonl",)),
))
def test_bad_flags_are_refused(base, refused, tmp_path, flags, says, monkeypatch):
    if flags[0] == "--n":  # counting a level's puzzles takes a minute
        monkeypatch.setattr(tasks, "distinct", few_puzzles)
    refused(rejection, "--model", base, "--out", tmp_path / "out.jsonl", *flags, says=says)
    assert not (tmp_path / "out.jsonl").exists()


def few_puzzles(n, *rest, **settings):
    raise ValueError(f"got n={n}, but task countdown has only about 13000 train problems; ask for fewer")


def test_a_model_that_is_not_there_leaves_nothing_behind(refused, tmp_path):
    refused(rejection, "--model", tmp_path / "none" / "checkpoint", "--out", tmp_path / "out.jsonl", says=("none",))
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_is_never_overwritten(base, refused, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    refused(rejection, "--model", base, "--out", tmp_path / "out.jsonl", says=("exists and is never overwritten",))
    assert (tmp_path / "out.jsonl").read_text() == "mine"
