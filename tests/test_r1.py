"""The whole recipe in small, as one command: every stage runs, a second call runs none, and the table holds what the
evaluations say. The models know something here (they are the shipped ones), since a stage needs right completions."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distill
import r1
from countdown import split_of
from machinery import plots, rl_run, stages, statistics
from machinery.data import read_jsonl
from tasks import code
from tasks.general import NEW, draw_sum
from test_training import puzzles_of

pytestmark = pytest.mark.slow

ROOT = Path(r1.__file__).parent
SMALL = ("--zero-steps", 1, "--longer-steps", 1, "--rl-steps", 2, "--general-steps", 1, "--hacking-steps", 1, "--puzzles", 60, "--samples", 4,
         "--student-steps", 1, "--after-steps", 1, "--pairs", 700, "--eval-n", 16, "--eval-samples", 1, "--rl-flags",
         "--batch-size 24 --group-size 8 --sample-every 1", "--max-new-tokens", 64)


def call(out, *flags):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["r1.py", "--out", str(out), *map(str, (*SMALL, *flags))])
        patch.setattr(rl_run, "plot_run", lambda run: None)  # a second for each of eight runs
        patch.chdir(ROOT)
        try:
            r1.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The folder of a finished recipe."""
    call(out := tmp_path_factory.mktemp("r1") / "out")
    return out


def test_it_ends_with_a_table_and_two_pictures(recipe):
    table = json.loads((recipe / "table.json").read_text())
    assert list(table["rows"]) == list(r1.ROWS) and table["seeds"] == 1 and table["n"] == 16
    for name, row in table["rows"].items():
        evaluation = json.loads((recipe / "seed0" / f"eval-{name}.json").read_text())
        assert all(row[column] == evaluation[column] for column in r1.COLUMNS)
        assert row.get("on-code") == (json.loads((recipe / "seed0" / f"eval-{name}-on-code.json").read_text())["pass@1"]
                                   if name in ("base", "zero", "sft", "rl-all") else None)
        assert row["seeds"]["pass@1"] == [evaluation["pass@1"]]
    assert table["minutes_of_a_seed"] == pytest.approx(sum(table["minutes"].values())) and table["disk_mib"] > 10
    assert set(table["minutes"]) == {stage.name for stage in r1.all_stages(r1.Config(), 0)}
    flops = {name: row["flops"] for name, row in table["rows"].items()}
    assert flops["distill-rl"] > flops["distill"] > flops["student-base"] == 0 == flops["base"]
    assert flops["rl-all"] > flops["sft"] > flops["rl"] > flops["cold-start"] > flops["zero"] > 0
    assert flops["distill"] == distill.compute(r1.student_config(r1.Config(out=str(recipe)), 0))["distill"]
    markdown = (recipe / "table.md").read_text().splitlines()
    assert len(markdown) == 4 + len(r1.ROWS) + 3 + len(r1.CLAIMS) - 1  # one sample a problem has no vote
    assert all(line.count("|") == 17 for line in markdown[2:4 + len(r1.ROWS)])
    for claim, a, b in r1.CLAIMS:
        if "votes" not in a:
            own = statistics.difference(*([statistics.read_scores(recipe / "seed0" / f"eval-{name}.json")] for name in (a, b)))
            assert table["claims"][claim] == {"minus": [a, b], **own._asdict(), "verdict": own.verdict()}
    for name in ("ladder.png", "hacking.png"):
        assert (recipe / name).read_bytes().startswith(b"\x89PNG")


def test_the_minutes_of_a_row_are_those_of_the_stages_that_made_it(recipe):
    table = json.loads((recipe / "table.json").read_text())
    named = [stage for _, stages_, _ in r1.ROWS.values() for stage in stages_]
    assert len(named) == len(set(named))
    made = {stage.name for stage in r1.all_stages(r1.Config(), 0) if not stage.name.startswith("eval-")}
    assert set(named) == made  # none is forgotten
    assert table["rows"]["distill"]["minutes"] == pytest.approx(
        sum(table["minutes"][name] for name in ("student-replies", "student-traces", "distill")))


def test_general_prompts_come_in_the_last_steps_only(recipe):
    rows = read_jsonl(recipe / "seed0" / "rl-all" / "metrics.jsonl")
    assert ["general_preference" in row for row in rows if row["step"]] == [False, True]
    assert {"general_good", "general_thinking", "accuracy", "code_accuracy"} <= rows[-1].keys()
    (row,) = [row for row in read_jsonl(recipe / "seed0" / "hacking" / "metrics.jsonl") if row["step"]]
    assert "preference" in row and "accuracy" not in row  # general prompts alone


def test_the_dataset_of_r1_is_three_parts_thinking_and_one_part_not(recipe):
    rows = read_jsonl(recipe / "seed0" / "r1-data.jsonl")
    non_cot = sum(row["source"] == "general.py" for row in rows)
    assert non_cot == round((len(rows) - non_cot) / 3) > 0
    assert {row["source"] for row in rows} == {"general.py", str(recipe / "seed0" / "rl" / "checkpoint")}


def test_no_row_of_any_stage_is_of_the_validation_or_the_test_split(recipe):
    """By key: what SFT reads, what the reward model reads, what RL sampled; puzzles, greetings and sums."""
    data = {path.relative_to(recipe / "seed0"): [row for row in read_jsonl(path) if "prompt" in row]
            for path in (recipe / "seed0").rglob("*.jsonl")}
    data = {str(path): rows for path, rows in data.items() if rows}
    assert set(data) == {"cold.jsonl", "r1-data.jsonl", "replies.jsonl", "pairs.jsonl", "student-replies.jsonl",
                         "student-traces.jsonl", *(f"{name}/rollouts.jsonl" for name in (
                             "zero", "zero-longer", "zero-language", "rl", "rl-all", "hacking", "student-rl", "distill-rl"))}
    without = {"replies.jsonl", "pairs.jsonl", "student-replies.jsonl", "hacking/rollouts.jsonl"}
    held_out = {f"{prompt}\n" for prompts in NEW.values() for prompt in prompts}
    held_out |= {draw_sum(rng, split)["prompt"] for split in NEW for rng in [random.Random(0)] for _ in range(3000)}
    programs = {code.question(code.draw(rng, next(iter(code.LEVELS)), split), "tiny") for split in NEW for rng in [random.Random(0)]
                for _ in range(500)}
    assert {row["task"] for row in data["rl-all/rollouts.jsonl"]} == {"countdown", "code", "general"}
    held_out |= programs
    for name, rows in data.items():
        prompts = [row["prompt"] for row in rows]
        puzzles = puzzles_of(prompts)
        assert {split_of(puzzle) for puzzle in puzzles} == (set() if name in without else {"train"}), name
        assert not held_out & set(prompts), name


def test_a_second_call_runs_nothing_and_says_the_same(recipe, monkeypatch, capfd):
    before = (recipe / "table.json").read_text()
    monkeypatch.setattr(stages, "run_stage", None)
    monkeypatch.setattr(stages.importlib, "import_module", no_stage(stages.importlib.import_module))
    call(recipe)
    assert (recipe / "table.json").read_text() == before
    printed = capfd.readouterr().out
    assert printed.count("done before") == len(r1.all_stages(r1.Config(), 0)) and "=== " not in printed


def no_stage(import_module):
    """importlib.import_module, whose scripts have a Config and refuse to run."""
    def refuse():
        raise AssertionError("a stage ran")

    def imported(name):
        return type("Script", (), {"Config": getattr(import_module(name), "Config", None), "main": staticmethod(refuse)})
    return imported


def test_stages_that_follow_each_other_draw_their_own_problems(recipe):
    """Each RL stage of the chain, and each sampling of a dataset; arms of a comparison draw the same."""
    seed0 = recipe / "seed0"
    puzzles = {name: {row["prompt"] for row in read_jsonl(seed0 / name / "rollouts.jsonl") if row["step"] == 1 and "make" in row["prompt"]}
               for name in ("zero", "zero-language", "rl", "rl-all", "student-rl", "distill-rl")}
    assert puzzles["zero"] == puzzles["zero-language"] == puzzles["student-rl"] == puzzles["distill-rl"]
    assert len(puzzles["zero"] | puzzles["rl"] | puzzles["rl-all"]) == 9  # three groups a step
    asked = [{row["prompt"] for row in read_jsonl(seed0 / f"{name}.jsonl") if "make" in row["prompt"]}
             for name in ("cold", "r1-data", "student-traces")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(asked[a] & asked[b]) < 0.2 * len(asked[a])


def test_quick_is_the_same_ladder_in_small(tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["r1.py", "--quick", "--list", "--out", str(tmp_path / "out")])
        r1.main()
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [stage.name for stage in r1.all_stages(r1.Config(), 0)]
    assert all("--level three" in line for line in lines if " train_countdown.py" in line and "--eval-task" not in line)
    assert all(f"{tmp_path}/out/" in line for line in lines)  # flags override


def test_the_list_of_commands_says_what_is_done(recipe, capfd):
    call(recipe, "--list")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(r1.all_stages(r1.Config(), 0)) and all(line.startswith("done ") for line in lines)
    assert all(" python " in line and (".py " in line or " -m tasks.general " in line) for line in lines)


def test_from_a_stage_on_everything_is_made_again(recipe, tmp_path, capfd):
    copy = tmp_path / "copy"  # of the last stages: what they read stays where it was
    shutil.copytree(recipe, copy)
    for path in (copy / "seed0" / "stages").glob("*.json"):
        path.write_text(path.read_text().replace(str(recipe), str(copy)))
    call(copy, "--from", "eval-student-rl")
    printed = capfd.readouterr().out
    assert [line[4:] for line in printed.splitlines() if line.startswith("=== ")] == [
        "eval-student-rl", "eval-distill-rl"]
    assert (copy / "seed0" / "eval-student-rl.json.old").exists()
    assert not (copy / "seed0" / "eval-distill.json.old").exists()


def test_stages_of_other_settings_are_named_before_they_are_made_again(recipe, tmp_path, capfd):
    """A changed flag in the middle of the ladder: the stages that it changes, in one line, before anything runs."""
    copy = tmp_path / "copy"
    shutil.copytree(recipe, copy)
    for path in (copy / "seed0" / "stages").glob("*.json"):
        path.write_text(path.read_text().replace(str(recipe), str(copy)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r1, "run_stage", lambda *given: sys.exit("a stage runs"))
        with pytest.raises(SystemExit, match="a stage runs"):
            call(copy, "--language-weight", 0.25)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1 and "other flags, inputs or outputs (zero-language, rl, rl-all)" in said[0] and "another --out" in said[0]


def test_one_stage_alone_says_what_it_lacks(tmp_path, refused):
    refused(r1, "--out", tmp_path / "out", "--only", "cold-start",
            says=("stage cold-start without its input", "cold.jsonl, which stage cold-data makes: python rejection.py"))


@pytest.mark.parametrize("flags, says", (
    (("--only", "nothing"), ("got --only 'nothing', expected a stage: eval-base, zero",)),
    (("--from", "nothing"), ("got --from 'nothing', expected a stage",)),
    (("--general-steps", 50), ("got general_steps 50, expected 1 to rl_steps 12",)),
    (("--rows", 0), ("rows",)),
    (("--style", "base"), ("got style base", "expected tiny or chat")),
    (("--seed", 1), ("got seed 1 with seeds 1, expected one below it",)),
    (("--level", "hard"), ("got level 'hard'",)),
    (("--seeds", 0), ("at least 1",)),
    (("--model", "models/none"), ("models/none",)),
    (("--beside", "code=1"), ("got beside 'code=1', expected general in it",)),
    (("--beside", "chess=1,general=1"), ("got task 'chess'",)),
    (("--task", "code"), ("got task code and beside", "expected --beside general=1")),
    (("--quick", "--task", "arithmetic"), ("got level 'three'",)),
    (("--beside", "arithmetic=1,general=1"), ("got n=512, but task arithmetic",)),
))
def test_bad_flags_are_refused(flags, says, tmp_path, refused):
    refused(r1, "--out", tmp_path / "out", *flags, says=says)
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_killed_recipe_goes_on_where_it_was(tmp_path, base):
    """SIGKILL in the middle of R1-Zero; the second call resumes that run instead of beginning it again."""
    zero = tmp_path / "seed0" / "zero"
    flags = ["--model", base, "--max-new-tokens", 24, "--zero-steps", 20, "--rl-flags",
             "--batch-size 32 --group-size 8 --save-every 1 --eval-every 99", "--only", "zero"]
    command = [sys.executable, "r1.py", "--out", tmp_path, *SMALL, *flags]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (zero / "metrics.jsonl").exists() or len((zero / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = read_jsonl(zero / "metrics.jsonl")
    call(tmp_path, *flags)
    after = read_jsonl(zero / "metrics.jsonl")
    assert [row["step"] for row in after] == list(range(21)) and after[:2] == before[:2]
    assert not (tmp_path / "seed0" / "zero.old").exists()


def test_the_ladder_draws_every_seed(recipe, tmp_path, monkeypatch):
    """Two seeds: two dots a row, and the hacking curve is their mean and range."""
    table = json.loads((recipe / "table.json").read_text())
    for row in table["rows"].values():
        row["seeds"] = {name: values * 2 for name, values in row["seeds"].items()}
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, out: figures.append(figure))
    plots.plot_ladder(table, tmp_path / "ladder.png")
    axis = figures[0].axes[0]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == len(r1.ROWS) and all(len(line.get_xdata()) == 2 for line in dots)
    logs = [[{"step": 0, "eval_pass@1": 0.9}, {"step": 1, "preference": p, "good": 0.5},
             {"step": 2, "preference": p, "good": 1.0, "eval_pass@1": 0.1}] for p in (1.0, 3.0)]
    plots.plot_hacking(logs, tmp_path / "hacking.png")
    assert figures[1].axes[0].lines[0].get_ydata().tolist() == [2.0, 2.0]
    assert figures[1].axes[1].lines[0].get_ydata().tolist() == [0.5, 1.0]
    assert figures[1].axes[2].lines[0].get_xdata().tolist() == [0, 2]


def test_every_number_of_a_row_stands_in_its_column():
    """An arm without a reply to greetings, as of a chat model, leaves those columns empty."""
    row = {"label": "R1-Zero", "pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6, "pass@1_3_numbers": 0.7,
           "pass@1_4_numbers": 0.3, "language": 0.9, "mixed": 0.2, "format": 0.8, "completion_tokens": 123.4,
           "needless_thinking": 0.1, "greetings": 0.91, "new_greetings": 0.61, "arithmetic": 0.41, "flops": 2.5e12,
           "minutes": 4.25, "on-code": 0.11, "seeds": {"pass@1": [0.45, 0.55], "on-code": [0.1, 0.12]}}
    chat = {name: row[name] for name in row if name not in ("greetings", "new_greetings", "arithmetic", "on-code")} | {"flops": 0}
    table = {"seeds": 2, "n": 64, "samples": 4, "minutes_of_a_seed": 30, "disk_mib": 20,
             "rows": {"base": row, "chat": chat}, "claims": {"votes help": {
                 "minus": ["zero's votes", "zero"], "mean": 0.05, "low": 0.01, "high": 0.1, "seeds": [0.04, 0.06],
                 "verdict": "better"}}}
    said, _, head, line, *rows = r1.markdown(table).splitlines()
    assert rows[-1] == "| votes help | majority of 4 minus zero: +5.0 (+1.0 to +10.0) | +4.0 +6.0 | better |"
    rows = rows[:2]
    assert said.startswith("2 seeds, 64 test puzzles x 4 samples")
    names, full, empty = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (head, *rows))
    assert dict(zip(names, full, strict=True)) == {
        "stage": "R1-Zero", "pass@1 (95% interval)": "50.0% (40.0% to 60.0%)", "of the seeds": "45.0% 55.0%",
        "3 numbers": "70.0%", "4 numbers": "30.0%", "English": "90.0%", "mixed": "20.0%", "format": "80.0%",
        "tokens": "123", "known greetings thought over": "10.0%", "known greetings": "91.0%", "new greetings": "61.0%",
        "sums": "41.0%", "on-code": "11.0%", "TFLOPs, with the stages before": "2.5", "own minutes": "4.2"}
    assert line == "|---" * len(names) + "|"
    assert [name for name, cell in zip(names, empty, strict=True) if not cell] == [
        "known greetings", "new greetings", "sums", "on-code", "TFLOPs, with the stages before"]


def test_the_ladder_s_page_shows_the_committed_runs():
    """docs/r1: every seed's evaluations and the table that r1.py made of them; the page's tables, the README's, and each
    claim's difference, computed again."""
    folder, page, readme = ROOT / "docs" / "r1", *((ROOT / name).read_text() for name in ("docs/r1.md", "README.md"))
    table, config = json.loads((folder / "table.json").read_text()), r1.Config(out=str(folder), seeds=3)
    stages, claims = "\n".join(r1.markdown(table).splitlines()[2:]).split("\n\n")
    assert stages in page and claims in page and table["seeds"] == 3
    for name, row in table["rows"].items():
        seeds = r1.evaluations(config, name)
        assert all((own["n"], own["samples"], own["settings"]["split"]) == (512, 4, "test") for own in seeds)
        assert row["seeds"]["pass@1"] == [own["pass@1"] for own in seeds] and row["pass@1"] == pytest.approx(sum(row["seeds"]["pass@1"]) / 3)
        assert (f"| {row['label']} | {row['pass@1']:.1%} ({row['pass@1_low']:.1%} to {row['pass@1_high']:.1%}) | "
                f"{row['pass@1_4_numbers']:.1%} | {row['language']:.1%} | "
                f"{row['needless_thinking']:.1%} | {row['completion_tokens']:.0f} |") in readme
    assert list(table["claims"]) == [claim for claim, _, _ in r1.CLAIMS]
    for claim, a, b in r1.CLAIMS:
        own = statistics.difference(r1.scores(config, a), r1.scores(config, b))
        assert table["claims"][claim] == {"minus": [a, b], **own._asdict(), "verdict": own.verdict()}


def test_r1_beside_as_much_compute_spent_on_r1_zero():
    """The default arm of experiments/longer.py, the same test puzzles and seeds."""
    long = [statistics.scores_of(json.loads((ROOT / f"experiments/results/longer/seed{seed}/default.json").read_text())["result"]) for seed in range(3)]
    page, ours = (ROOT / "docs" / "r1.md").read_text(), r1.scores(r1.Config(out=str(ROOT / "docs" / "r1"), seeds=3), "rl-all")
    constant = statistics.read_scores(ROOT / "docs" / "quickstart" / "64-steps-constant" / "evaluation.json")
    for own in (statistics.difference(ours, long), statistics.difference(ours[:1], [constant])):
        assert f"{in_points(own)}, {own.verdict()}" in page


def in_points(own) -> str:
    return f"{100 * own.mean:+.1f} ({100 * own.low:+.1f} to {100 * own.high:+.1f})"


def test_the_page_s_figures_of_one_column_are_over_seeds():
    """Of sums, which have no score a problem: Student's interval of the seeds' differences. Programs have one."""
    folder, page = ROOT / "docs" / "r1", (ROOT / "docs" / "r1.md").read_text()
    rows = json.loads((folder / "table.json").read_text())["rows"]
    own = statistics.difference(*([statistics.read_scores(folder / f"seed{seed}" / f"eval-{name}-on-code.json")
                                   for seed in range(3)] for name in ("zero", "base")))
    assert f"{in_points(own)}, {own.verdict()}" in page
    greetings = [sum(rows[name]["seeds"]["greetings"]) / 3 for name in ("base", "zero")]
    assert f"{100 * (greetings[0] - greetings[1]):.1f} points lower on known greetings" in page
    for a, b, column in (("zero", "base", "arithmetic"), ("hacking", "rl-all", "arithmetic")):
        own = statistics.over_seeds([x - y for x, y in zip(rows[a]["seeds"][column], rows[b]["seeds"][column])])
        assert f"{in_points(own)}, {own.verdict()}" in page, (a, b, column)


def test_the_page_s_table_of_the_preference_reward_is_of_the_committed_logs():
    page = (ROOT / "docs" / "r1.md").read_text()
    for seed in range(3):
        logs = {name: read_jsonl(ROOT / "docs" / "r1" / f"seed{seed}" / name / "metrics.jsonl") for name in ("hacking", "preference")}
        steps = [row for row in logs["hacking"] if row["step"]]
        first, last = ({name: sum(row[name] for row in part) / 4 for name in ("preference", "good")} for part in (steps[:4], steps[-4:]))
        puzzles = [row["eval_pass@1"] for row in logs["hacking"] if "eval_pass@1" in row]
        assert (f"| {seed} | {first['preference']:.2f} to {last['preference']:.2f} | {first['good']:.0%} to {last['good']:.0%} | "
                f"{puzzles[0]:.1%} to {puzzles[-1]:.1%} |") in page
        assert all(f"{logs['preference'][-1][name]:.1%}" in page for name in ("eval_all", "eval_wrong"))


def test_rl_after_distillation_on_validation_puzzles_is_that_of_the_committed_logs():
    ends = [[row["eval_pass@1"] for row in read_jsonl(ROOT / "docs" / "r1" / f"seed{seed}" / "distill-rl" / "metrics.jsonl")
             if "eval_pass@1" in row] for seed in range(3)]
    assert ("less on seed 0 ({} to {}) and more on the others ({} to {}, {} to {})".format(
        *(f"{own[i]:.1%}" for own in ends for i in (0, -1)))) in (ROOT / "docs" / "r1.md").read_text()


def test_the_page_s_llama_students_are_the_committed_ones():
    """docs/r1/llama: each arm's share and seeds, and both differences."""
    folder, page = ROOT / "docs" / "r1" / "llama", (ROOT / "docs" / "r1.md").read_text()
    runs = {arm: [statistics.read_scores(folder / f"seed{seed}" / f"eval-{arm}.json") for seed in range(3)]
            for arm in ("student-base", "student-rl", "distill", "distill-rl")}
    for arm, label in (("student-rl", "RL alone, 40 steps"), ("distill", "distilled"), ("distill-rl", "RL after distillation, 24 steps")):
        own = statistics.share(runs[arm])
        flops = [json.loads((folder / f"seed{seed}" / "table.json").read_text())[arm]["flops"] for seed in range(3)]
        assert (f"| {label} | {own.mean:.1%} | {' '.join(f'{seed:.1%}' for seed in own.seeds)} | "
                f"{sum(flops) / 3e12:.1f} |") in page
    for a, b in (("distill", "student-rl"), ("distill-rl", "distill")):
        own = statistics.difference(runs[a], runs[b])
        assert f"{in_points(own)}, {own.verdict()}" in page
