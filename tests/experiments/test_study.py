"""What the studies share: pieces, shares and comparisons, each study from end to end in small, and the words and numbers
of their pages, which are those of the committed results."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest

from experiments import aha, few_shot, harder, longer, mcts, prm, slow_rewards, study
from machinery import rl_run
from machinery.statistics import Estimate, Scores

ROOT = Path(study.__file__).parent.parent
STUDIES = ("prm", "mcts", "few_shot", "aha")


def test_a_piece_is_computed_once(tmp_path):
    calls = []
    for _ in range(2):
        assert study.piece(tmp_path, "a name", lambda: calls.append(1) or {"x": 1.5}) == {"x": 1.5}
    assert calls == [1] and study.piece(tmp_path, "a name") == {"x": 1.5}
    with pytest.raises(FileNotFoundError):
        study.piece(tmp_path, "never made")


def test_a_share_says_its_seeds_and_an_interval_over_both():
    """Seeds at 40% and 60% of 100 puzzles: two of them leave everything open, which puzzles alone would not say."""
    entry = study.measured([Scores("a", [1.0] * right + [0.0] * (100 - right)) for right in (40, 60)])
    assert entry["mean"] == 0.5 and entry["seeds"] == [0.4, 0.6] and entry["low"] < 0.1 and entry["high"] > 0.9
    assert study.text({**entry, "low": 0.404, "high": 0.596}) == "50.0% (40.4% to 59.6%)"


@pytest.mark.parametrize("a, b, words", (
    ([1, 1, 1, 1, 0] * 20, [1, 1, 1, 0, 0] * 20, "better than"), ([0] * 100, [1, 0] * 50, "worse than"),
    ([1, 0] * 50, [0, 1] * 50, "not told apart from")))
def test_arms_are_compared_puzzle_by_puzzle(a, b, words):
    pair = study.paired([Scores("same", a)], [Scores("same", b)])
    assert study.compared(pair) == words and study.points(pair).startswith(f"{sum(a) - sum(b):+}.0 points, ")


def run(study_name, *flags):
    """The study's main(); StopRequest takes Ctrl-C, the test takes it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{study_name}.py", *map(str, flags)])
        patch.setattr(rl_run, "plot_run", lambda run: None)  # a second for each run
        patch.chdir(ROOT)
        try:
            importlib.import_module(f"experiments.{study_name}").main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*STUDIES, "harder", "longer", "programs", "slow_rewards"))
def test_a_study_runs_in_small_and_a_second_call_does_nothing_again(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(few_shot, "SHOTS", (0, 1, 8))
    monkeypatch.setattr(longer, "ARMS", {"default": "", "clip-higher": longer.ARMS["clip-higher"]})
    monkeypatch.setattr(slow_rewards, "TIMED", (1,))
    folder = tmp_path / "out"
    run(name, "--quick", "--out", folder)
    results, study_ = json.loads((folder / f"{name}.json").read_text()), importlib.import_module(f"experiments.{name}")
    words = f"{study_.verdict(results)}\n\n{study_.table(results)}\n"
    assert (folder / f"{name}.png").stat().st_size > 20_000
    assert (folder / f"{name}.md").read_text() == words and words in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    run(name, "--quick", "--out", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    again = json.loads((folder / f"{name}.json").read_text())
    assert again == results
    if name in ("harder", "longer"):  # whose committed pieces need no checkpoint
        for path in before:
            path.unlink()
        run(name, "--quick", "--out", tmp_path / "out")
        assert json.loads((folder / f"{name}.json").read_text()) == results and not list(folder.rglob("*.safetensors"))


def test_a_folder_holds_one_set_of_settings(tmp_path, refused):
    study.write_json(tmp_path / "out" / "config.json", {"n": 3})
    refused(prm, "--out", tmp_path / "out", says=("other settings", "n", "another --out"))
    (tmp_path / "three" / "seed2").mkdir(parents=True)
    refused(prm, "--seeds", 2, "--out", tmp_path / "three", says=("got seeds 2", "seed2 too", "another --out"))
    refused(prm, "--seed", 5, "--out", tmp_path / "new", says=("got seed 5 with seeds 3",))
    refused(prm, "--model", "models/none", "--out", tmp_path / "new", says=("models/none", "no such directory"))
    refused(prm, "--steps", 0, "--out", tmp_path / "new", says=("got steps 0", "more than 0"))
    for study_, flag in ((prm, "samples"), (mcts, "samples"), (mcts, "ablation-budget"), (harder, "samples")):
        refused(study_, f"--{flag}", 192, "--out", tmp_path / "new", says=(f"got {flag.replace('-', '_')} 192", "a power of two"))
    for study_ in (prm, mcts):
        refused(study_, "--eval-n", 2, "--out", tmp_path / "new", says=("got eval_n 2", "at least 16"))
    refused(aha, "--samples", 1, "--out", tmp_path / "new", says=("samples 1", "at least 2 that vote"))
    refused(mcts, "--width", 3, "--out", tmp_path / "new", says=("got width 3", "2, 4, 8, 16"))
    refused(aha, "--arm", "none", "--out", tmp_path / "new", says=("got arm 'none'", "no backtracking"))
    refused(longer, "--again", "none", "--out", tmp_path / "new", says=("got arm 'none'", "clip-higher"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, page", (*((name, "studies") for name in STUDIES), ("harder", "harder"), ("longer", "results"), ("programs", "code"),
                                         ("slow_rewards", "slow-rewards")))
def test_the_page_of_the_studies_has_the_committed_results_in_words_picture_and_command(name, page):
    """Both sentences and all tables are those that the study itself made from its JSON."""
    study_, folder = importlib.import_module(f"experiments.{name}"), ROOT / "experiments" / "results"
    results, page = json.loads((folder / f"{name}.json").read_text()), (ROOT / "docs" / f"{page}.md").read_text()
    verdict, tables = (folder / f"{name}.md").read_text().split("\n\n", 1)
    assert verdict in page and tables in page
    assert f"](../experiments/results/{name}.png)" in page and f"python -m experiments.{name}" in page
    assert results["command"] == f"python -m experiments.{name}"
    assert (folder / f"{name}.png").stat().st_size > 20_000
    assert not results["config"]["quick"] and 2 <= results["config"]["seeds"] <= study_.Config().seeds


def test_the_claims_at_the_top_of_the_page_are_those_of_the_json():
    records = {name: json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text()) for name in STUDIES}
    bases, rewards, models = records["aha"]["arms"], records["prm"]["arms"], records["few_shot"]["models"]
    pairs = [bases[arm]["minus full"] for arm in ("no backtracking", "no verification", "no reflection", "wrong answers")]
    pairs += [list(own.values())[-1] for own in records["prm"]["of N / 2 - majority of N"].values()]
    pairs += [rewards[arm]["after - before"] for arm in ("PRM alone", "PRM alone, paid per line")]
    pairs += [rewards[arm]["after - outcome"] for arm in ("outcome + PRM", "outcome + PRM, paid per line", prm.EXACT)]
    pairs += [records["mcts"]["mcts - majority"][size] for size in ("16", "256")]
    pairs += [own["256"] for own in records["mcts"]["mcts - plain, chosen alike"].values()]
    pairs += [records["mcts"]["SFT on searched - on sampled"]]
    pairs += [models[name][shots]["minus none"] for name in ("base", "zero", "rl-all") for shots in ("1", "8")]
    table = [line for line in (ROOT / "docs" / "studies.md").read_text().split("## ")[0].splitlines() if line.startswith("|")][2:]
    for line, arm in zip(table, ("no reflection", "full")):
        own = bases[arm]["moved"]["reflection_words"]
        assert line.endswith(f" | {own['mean']:+.2f} words, {own['low']:+.2f} to {own['high']:+.2f} | {Estimate(**own).verdict()} |")
    for line, pair in zip(table[2:], pairs, strict=True):
        assert line.endswith(f" | {study.points(pair)} | {pair['verdict']} |")


def test_the_readme_s_figures_of_the_studies_are_those_of_the_json():
    readme, folder = (ROOT / "README.md").read_text(), ROOT / "experiments" / "results"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in (*STUDIES, "harder", "programs")}

    def share(entry):
        return f"{entry['mean']:.1%}"

    chosen, rewards, models = found["prm"]["scorers"]["0.0"]["rerank"], found["prm"]["arms"], found["few_shot"]["models"]
    weighted = found["prm"]["of N / 2 - majority of N"]["PRM-weighted vote"]["64"]["verdict"]
    assert (f"best of 32 solves {share(chosen['PRM, last']['32'])} (by the answer {share(chosen['PRM, answer']['32'])}), the majority "
            f"of 64, for the same tokens, {share(chosen['majority']['64'])}; as a weight of votes it is {weighted}. As a normalised "
            f"reward beside the outcome it is hacked: {share(rewards['outcome + PRM']['after'])}; exact labels "
            f"{share(rewards[prm.EXACT]['after'])}, neither {share(rewards['outcome']['after'])} "
            f"(these two {rewards[prm.EXACT]['after - outcome']['verdict']})") in readme
    plain, alike = found["mcts"]["plain"], found["mcts"]["mcts - plain, chosen alike"]
    spent = found["mcts"]["mcts"]["tokens"]["256"]["mean"] / found["mcts"]["tokens_a_completion"]["mean"]
    assert (f"({spent:.0f} spent) solves {share(found['mcts']['mcts']['best value']['256'])}, worse than the majority of 256 plain samples, "
            f"{share(plain['majority']['256'])} (of 64: {share(plain['majority']['64'])}); {alike['by value']['256']['verdict']} from what its "
            f"value model chooses among 128, {share(plain['best of N']['128'])}.") in readme
    assert found["mcts"]["mcts - majority"]["256"]["verdict"] == "worse"
    full, without = (found["aha"]["arms"][arm] for arm in ("full", "no verification"))
    assert "verifications {:.2f} to {:.2f}; {:.2f} to {:.2f} on bases without".format(
        *(arm[when]["verifications"]["mean"] for arm in (full, without) for when in ("base", "rl"))) in readme
    assert "(eight: {} to {}), not what RL makes of it: R1-Zero {} to {} (not told apart), R1 {} to {} (worse, just)".format(
        *(share(models[name][shots]["pass@1"]) for name in ("base", "zero", "rl-all") for shots in ("0", "8"))) in readme
    four = {arm: f"{found['harder']['test'][arm]['four']['pass@1']['mean']:.0%}" for arm in ("base", "mixed", "easy")}
    assert f"RL takes four numbers from {four['base']} to {four['mixed']}, RL on three alone to {four['easy']}" in readme
    programs = (share(found["programs"]["arms"][arm]["right"]) for arm in ("three-base", "three-all"))
    assert "programs that pass tests: {} to {}".format(*programs) in readme
