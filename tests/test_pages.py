"""README and docs say what is there: commands that scripts take, links and pictures that exist, files in their places."""

import ast
import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import train_countdown
from experiments.endings import ENDINGS
from machinery.data import read_jsonl
from machinery.flags import parse_config
from machinery.statistics import difference, read_scores, scores_of, share

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]
ROOMS = ("", "machinery", "tasks", "benchmark", "experiments")


def commands(page: Path) -> list[str]:
    """Everything after python in code blocks and in `code`."""
    text = page.read_text().replace("\\\n", " ")
    spans = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"`(python [^`]*)`", text)
    return [line for span in spans for line in span.splitlines() if re.match(r"(\.venv/bin/)?python\s", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_script_and_flags_that_exist(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        if words[:2] == ["-m", "pytest"]:
            continue
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert path.exists(), command
        text = path.read_text()
        config = getattr(importlib.import_module(module), "Config", None)
        for flag in [word for word in words if word.startswith("--")]:
            name = flag[2:].split("=")[0].removeprefix("no-").replace("-", "_")
            known = config and {name, f"{name}_"} & config.__dataclass_fields__.keys()
            assert known or f'"{flag}"' in text or flag in ("--preset", "--help"), f"{flag} in: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_exists(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_its_tables_are_narrow():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 25_000
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows) <= 7


def test_no_file_is_longer_than_400_lines_and_the_loop_is_within_90():
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            limit = 430 if path.stem == "runner" else 400  # that one is sent to a container whole
            assert len(path.read_text().splitlines()) <= limit, path
    main = next(node for node in ast.parse((ROOT / "train_countdown.py").read_text()).body
                if isinstance(node, ast.FunctionDef) and node.name == "main")
    loop = next(node for node in ast.walk(main) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno < 90


def test_imports_make_no_circle_and_what_lies_below_imports_nothing_above():
    """Imports inside functions count too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
               for room in ROOMS for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}
    imports = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        imports[name] = found & modules.keys()
    done = []
    while len(done) < len(modules):
        free = [name for name in modules if name not in done and imports[name] <= set(done)]
        assert free, f"a circle among {sorted(set(modules) - set(done))}"
        done += free
    for name, found in imports.items():
        if name.startswith("machinery."):
            assert all(other.startswith("machinery.") or other in ("model", "grpo", "rewards", "countdown")
                       for other in found), (name, found)
        if name in ("model", "grpo", "rewards", "countdown"):
            assert not found - {"rewards", "countdown"}, (name, found)
        assert name.startswith("experiments.") or not any(other.startswith("experiments.") for other in found)


def test_the_figures_of_the_quickstart_are_those_of_its_committed_runs():
    """Every seed's row of docs/results.md, before training and after it, and the README's sentence about seed 0."""
    page, folders = (ROOT / "docs" / "results.md").read_text(), sorted((ROOT / "docs" / "quickstart").glob("seed*"))
    assert [folder.name for folder in folders] == [f"seed{seed}" for seed in range(5)]
    for seed, folder in enumerate(folders):
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval_pass@1" in row]
        test = json.loads((folder / "evaluation.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        defaults = vars(train_countdown.Config())  # a flag that is newer than the run has its default
        assert {**defaults, **config} == {**defaults, "seed": seed, "out": config["out"]}
        assert test["settings"]["split"] == "test" and test["n"] == rows[-1]["eval_n"] == 512
        for table, name, end in ((rows[-1], "eval_", f"{rows[-1]['minutes']:.1f} |"), (test, "", "")):
            share = {column: f"{table[name + column]:.1%}" for column in (
                "pass@1", "pass@1_low", "pass@1_high", "pass@1_3_numbers", "pass@1_4_numbers", "truncated")}
            assert (f"| {seed} | {share['pass@1']} ({share['pass@1_low']} to {share['pass@1_high']}) | "
                    f"{share['pass@1_3_numbers']} | {share['pass@1_4_numbers']} | {table[f'{name}completion_tokens']:.0f} | "
                    f"{share['truncated']} | {end}".rstrip() in page), (seed, name)
        if seed == 0:
            own, other = (read_jsonl(path / "metrics.jsonl") for path in (folder, ROOT / "docs" / "runs" / "quickstart"))
            for column in ("reward", "completion_tokens", "eval_pass@1", "tokens"):
                assert [row.get(column) for row in own] == [row.get(column) for row in other]
            assert f"it took {other[-1]['minutes']:.1f}," in page
            # what differs in the two longer runs is their length and the rate's fall
            for name, final_lr in (("64-steps", 0.1), ("64-steps-constant", 1.0)):
                other = json.loads((folder.parent / name / "config.json").read_text())
                assert other == {**config, "steps": 64, "final_lr": final_lr, "out": other["out"]}
            before, after = (f"{row['eval_pass@1']:.1%}" for row in (rows[0], rows[-1]))
            assert f"from {before} to {after} (95% interval {rows[-1]['eval_pass@1_low']:.1%}" in (
                ROOT / "README.md").read_text()


def test_a_whole_run_folder_is_here_to_look_at():
    """With the completions of its first and its last step, as its log has them, and small."""
    folder = ROOT / "docs" / "runs" / "quickstart"
    steps, written = {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}, read_jsonl(folder / "rollouts.jsonl")
    for step in (1, 12):
        own = [row for row in written if row["step"] == step]
        assert len(own) == 256 and sum(len(row["token_ids"]) for row in own) / 256 == pytest.approx(steps[step]["completion_tokens"])
        assert sum(row["reward"] for row in own) / 256 == pytest.approx(steps[step]["reward"])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * 2 ** 20 and len(written) == 512


CARD = ("## What it is for, and what not", "## What it read", "## How to make it again", "## Figures")


@pytest.mark.parametrize("folder", sorted(path.parent for path in ROOT.glob("models/*/config.json")), ids=lambda folder: folder.name)
def test_a_card_is_of_the_checkpoint_beside_it(folder):
    """All in one form; the weights are those whose figures it shows, on test puzzles."""
    card, table = (folder / "README.md").read_text(), json.loads((folder / "evaluation.json").read_text())
    assert [line for line in card.splitlines() if line in CARD] == list(CARD)
    assert f"SHA-256 `{hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()}`" in card
    assert table["settings"]["split"] == "test" and table["n"] == 512
    cells = (f"{table['pass@1']:.1%} ({table['pass@1_low']:.1%} to {table['pass@1_high']:.1%})", f"{table['completion_tokens']:.0f}",
             *(f"{table[name]:.1%}" for name in ("pass@1_3_numbers", "pass@1_4_numbers", "format", "mixed", "needless_thinking",
                                                 "greetings", "new_greetings", "arithmetic")))
    assert all(f"| {cell} |" in card for cell in cells)


def test_the_figures_of_the_longer_runs_are_those_of_their_logs():
    page, runs = (ROOT / "docs" / "results.md").read_text(), []
    for name in ("64-steps-constant", "64-steps"):
        folder = ROOT / "docs" / "quickstart" / name
        runs.append({row["step"]: row for row in read_jsonl(folder / "metrics.jsonl") if "eval_pass@1" in row})
        test = json.loads((folder / "evaluation.json").read_text())
        assert f"{test['pass@1']:.1%} ({test['pass@1_low']:.1%} to {test['pass@1_high']:.1%}; " in page
    for step in (12, 24, 36, 48, 54, 60, 64):
        cells = [f"{row['eval_pass@1']:.1%} | {row['eval_pass@1_4_numbers']:.1%} | {row['minutes']:.1f}"
                 for row in (run[step] for run in runs)]
        assert f"| {step} | {' | '.join(cells)} |" in page
    hard = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "quickstart" / "hundred").glob("eval*.json")}
    assert all(table["settings"]["split"] == "test" and table["n"] == 512 for table in hard.values())
    base, long, own = (hard[f"evaluation{name}"] for name in ("-base", "-64-steps", ""))
    own_laptop = hard["evaluation-laptop"]["pass@1"]
    for before, table, after in (("34.8%", base, "0.0%"), (f"{test['pass@1']:.1%}", long, "0.0%"),
                                 (f"{own_laptop:.1%}", own, "not measured")):
        assert (f"| {before} | {table['pass@1']:.1%} ({table['pass@1_low']:.1%} to {table['pass@1_high']:.1%}) | "
                f"{table['completion_tokens']:.0f} | {table['truncated']:.1%} | {after} |") in page
    assert hard["evaluation-five-base"]["pass@1"] == hard["evaluation-five-64-steps"]["pass@1"] == 0
    longest = read_jsonl(ROOT / "docs" / "quickstart" / "420-steps" / "metrics.jsonl")[-1]
    long = json.loads((ROOT / "docs" / "quickstart" / "420-steps" / "evaluation.json").read_text())
    last, default = runs[1][64], json.loads((ROOT / "experiments" / "results" / "longer.json").read_text())["arms"]["default"]["pass@1"]
    assert (f"reaches {last['eval_pass@1']:.1%} (four numbers {last['eval_pass@1_4_numbers']:.1%}) in {last['minutes']:.0f} "
            f"minutes, and {test['pass@1']:.1%} on test puzzles (three seeds, four samples: {default['mean']:.1%}); 420 steps {longest['eval_pass@1']:.1%}, and {long['pass@1']:.1%} on "
            "test") in (ROOT / "README.md").read_text()


def test_where_it_stops_and_what_stops_it_are_those_of_the_longest_run():
    page, folder = (ROOT / "docs" / "results.md").read_text(), ROOT / "docs" / "quickstart" / "420-steps"
    rows = read_jsonl(folder / "metrics.jsonl")
    long = json.loads((folder / "evaluation.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    short = json.loads((folder.parent / "64-steps" / "config.json").read_text())
    assert config == {**short, "steps": 420, "eval_every": 20, "out": config["out"]} and long["settings"]["split"] == "test"
    for row in rows:
        if row["step"] in (20, 60, 100, 180, 260, 340, 420):
            assert (f"| {row['step']} | {row['eval_pass@1']:.1%} | {row['eval_pass@1_3_numbers']:.1%} | "
                    f"{row['eval_pass@1_4_numbers']:.1%} | {row['eval_truncated']:.1%} | {row['eval_completion_tokens']:.0f} | "
                    f"{row['entropy']:.3f} | {row['equal_groups']:.1%} | {row['minutes']:.1f} |") in page, row["step"]
    equal = [sum(row["equal_groups"] for row in part) / 60 for part in (rows[1:61], rows[-60:])]
    assert f"{equal[1]:.0%} of the groups have equal rewards ({equal[0]:.0%} in the first 60)" in page
    assert (f"{long['pass@1']:.1%} on test puzzles ({long['pass@1_low']:.1%} to {long['pass@1_high']:.1%}; three numbers "
            f"{long['pass@1_3_numbers']:.1%}, four {long['pass@1_4_numbers']:.1%})") in page
    gain = difference(*([read_scores(folder.parent / name / "evaluation.json")] for name in ("420-steps", "64-steps")))
    assert f"{100 * gain.mean:.1f} points more than after 64 steps ({100 * gain.low:.1f} to {100 * gain.high:.1f})" in page
    found = json.loads((folder.parent / "endings.json").read_text())
    for name, words, than in (("temperature-0.6", "at temperature 0.6 solves {:.1%} of the test puzzles (",
                               " than with four samples at temperature 1"), ("greedy", "`--temperature 0`, {:.1%} (", "")):
        own = json.loads((folder / f"{name}.json").read_text())["pass@1"]
        gain = difference([read_scores(folder / f"{name}.json")], [scores_of(found["runs/zero-420/checkpoint"])])
        assert words.format(own) + (f"{100 * gain.mean:.1f} points more{than}, {100 * gain.low:.1f} to "
                                    f"{100 * gain.high:.1f})") in page, name
    shown = {row["step"]: row for row in rows if "eval_pass@1" in row}
    assert f"rises to {shown[80]['eval_mixed']:.1%} at step 80 and ends at {shown[420]['eval_mixed']:.1%}" in page
    parts = [[row["eval_pass@1"] for step, row in shown.items() if first <= step <= last] for first, last in ((180, 280), (300, 420))]
    early, late = (sum(part) / len(part) for part in parts)
    assert f"{early:.1%} in the mean of those at 180 to 280, {late:.1%} at 300 to 420." in page
    for label, name in (("base", "models/tiny-base"), ("12 steps", "runs/zero/checkpoint"),
                        ("420 steps", "runs/zero-420/checkpoint")):
        for numbers, own in found[name]["endings"].items():
            assert f"| {label} | {numbers} | {' | '.join(f'{own[kind]:.1%}' for kind in ENDINGS)} |" in page


def runs_of_the_pages() -> dict[str, dict]:
    """docs/runs: name -> {step: its log's row}."""
    return {folder.name: {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}
            for folder in sorted((ROOT / "docs" / "runs").iterdir())}


def test_the_runs_of_the_pages_have_the_commands_that_stand_there():
    """python train_countdown.py ... --out runs/NAME, and docs/runs/NAME is what it made."""
    found = {}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for flags, name in re.findall(r"python train_countdown.py([^`\n]*?) --out runs/([\w.-]+)", path.read_text()):
            found.setdefault(name, set()).add(flags)
    for name in runs_of_the_pages():
        config = json.loads((ROOT / "docs" / "runs" / name / "config.json").read_text())
        for flags in found[name]:
            if config["task"].endswith((".py", ".jsonl")):  # the reader's own file, which is not here
                flags, config["task"] = flags.replace(f"--task {config['task']}", ""), train_countdown.Config().task
            own = vars(parse_config(train_countdown.Config, "", [*shlex.split(flags), "--out", config["out"]]))
            assert {**vars(train_countdown.Config()), **config} == own, name


def test_tables_of_steps_are_those_of_their_logs():
    """Below the run's --out or link, its steps: every cell is what its log says, to the digits that are shown."""
    logs, run, columns, seen = runs_of_the_pages(), "", [], 0
    for line in (ROOT / "docs" / "is-it-learning.md").read_text().splitlines():
        named = re.findall(r"(?:--out |\]\()runs/([\w.-]+)", line)
        run = named[-1] if named else run
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        columns = cells if cells[:1] == ["step"] else columns if cells else []
        for column, cell in zip(columns, cells if cells[:1] != ["step"] and "---" not in line else ()):
            value = logs[run][int(cells[0])].get({"tokens": "completion_tokens"}.get(column, column))
            digits = len(cell.rstrip("%").partition(".")[2])
            assert cell == ("" if value is None else f"{value:.{digits}%}" if "%" in cell else f"{value:.{digits}f}"), (run, line)
            seen += 1
    assert seen > 60


def test_the_figures_of_the_exercises_are_those_of_their_logs():
    """Exercises 2 to 6 of the README, and the yardstick."""
    readme, logs = (ROOT / "README.md").read_text(), runs_of_the_pages()

    def shown(run: str, step: int, name: str) -> str:
        value = logs[run][step][name]
        return f"{value:.0f} tokens" if "tokens" in name else f"{value:.1%}"

    end = {run: {name: shown(run, max(log), f"eval_{name}") for name in ("pass@1", "format", "completion_tokens")}
           for run, log in logs.items() if run == "quickstart" or re.fullmatch(r"ex\d\w?", run)}
    before = {run: {name: shown(run, 0, f"eval_{name}") for name in ("pass@1", "format")} for run in end}
    for words in ("pass@1 {quickstart[pass@1]}, format {quickstart[format]}, {quickstart[completion_tokens]}",
                  "{ex2[format]}, pass@1 is {ex2[pass@1]}:", "format {ex3[format]}, pass@1 {ex3[pass@1]}, {ex3[completion_tokens]}:",
                  "and {ex6[pass@1]} after, and completions *shrink* to {ex6[completion_tokens]}",
                  "it is {ex6b[completion_tokens]}, and {ex6b[pass@1]} |"):
        assert words.format(**end) in readme
    assert f"{before['ex2']['format']} to {end['ex2']['format']}" in readme and f"{before['ex6']['pass@1']} before" in readme
    assert f"{shown('ex4', 1, 'accuracy')} right at step 1, {shown('ex4', 2, 'accuracy')} at step 2, none" in readme
    assert all(row["accuracy"] == 0 for step, row in logs["ex4"].items() if step > 2) and logs["ex4"][4]["equal_groups"] == 1


def test_the_figures_of_fork_it_are_those_of_their_logs():
    page, logs = (ROOT / "docs" / "fork-it.md").read_text(), runs_of_the_pages()

    def shown(run: str, step: int, name: str = "pass@1", limits: bool = True) -> str:
        own, low, high = (f"{logs[run][step].get(f'eval_{name}{end}', 0):.1%}" for end in ("", "_low", "_high"))
        return f"{own} ({low} to {high}" if limits else own

    for run in ("sums", "largest"):
        last = max(logs[run])
        assert (f"from {shown(run, 0, limits=False)} to {shown(run, last)}, n = {logs[run][last]['eval_n']}" in page
                and f" in {60 * logs[run][last]['minutes']:.0f} seconds" in page)
    runs, zero = ROOT / "docs" / "runs", ROOT / "docs" / "r1" / "seed0" / "eval-zero.json"  # the quickstart, four samples
    brief, gspo, two, one = (read_scores(path) for path in (*(runs / name / "evaluation.json" for name in ("brief", "gspo", "grpo-2")), zero))
    tokens = [json.loads(path.read_text())["completion_tokens"] for path in (runs / "brief" / "evaluation.json", zero)]
    means = {name: f"{100 * share([own]).mean:.1f}%" for name, own in dict(brief=brief, gspo=gspo, two=two, one=one).items()}
    gains = ["{:+.1f}{}{:+.1f} to {:+.1f}".format(*(100 * gain[0], words, 100 * gain[1], 100 * gain[2])) for gain, words in (
        (difference([brief], [one]), " points, "), (difference([gspo], [two]), " points, "), (difference([two], [one]), ", "))]
    assert (f"{means['brief']} with {tokens[0]:.0f} tokens, where the quickstart, the same command without the change, has "
            f"{means['one']} with {tokens[1]:.0f} ([four samples](r1/seed0/eval-zero.json); pass@1 {gains[0]}, not told apart)") in page
    assert (f"GSPO has {means['gspo']}, GRPO {means['two']} ({gains[1]}, not told apart). The quickstart, half the updates, has "
            f"{means['one']} (GRPO's two passes {gains[2]}: better over puzzles alone, one seed each;") in page
    assert "GSPO, with the narrow clips above, {:.1%} at step 1 and {:.1%} at step 12; GRPO, with 0.2, {:.1%} and {:.1%}.".format(
        *(logs[run][step]["clip_frac"] for run in ("gspo", "grpo-2") for step in (1, 12))) in page
    assert f"from {shown('largest', 0, 'close', False)} to {shown('largest', 12, 'close', False)}" in page
    for task, name, n in (("countdown", "pass@1", "eval_n"), ("arithmetic", "arithmetic_pass@1", "eval_arithmetic_n")):
        cells = [f"{shown('two-tasks', step, name)})" for step in (0, 10, 20, 30, 40)]
        assert f"| {task} (n = {logs['two-tasks'][0][n]}) | {' | '.join(cells)} |" in page


def test_the_table_of_the_real_checkpoint_is_that_of_its_evaluations():
    page, folder = (ROOT / "docs" / "gpu.md").read_text(), ROOT / "docs" / "smollm2"
    for name, seeds in (("0", [0]), ("1", [1]), ("2", [2]), ("all", [0, 1, 2])):
        cells = [name]
        for kind in ("evaluation", "greedy"):
            before, after = ([read_scores(folder / f"seed{seed}" / f"{kind}{end}.json") for seed in seeds] for end in ("-sft", ""))
            cells += [f"{own.mean:.1%} ({own.low:.1%} to {own.high:.1%})" for own in (share(before), share(after))]
            gain = difference(after, before)
            cells.append(f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})")
        assert f"| {' | '.join(cells)} |" in page
    assert gain.verdict() == "not told apart" and "over three seeds it is not told apart" in page
    logs = [read_jsonl(folder / name / "metrics.jsonl") for name in ("seed0", "seed1", "seed2", "rate-1e-5")]
    at = [next(row["eval_pass@1"] for row in log if row["step"] == 40) for log in (logs[3], logs[0])]
    assert f"end at {at[0]:.1%} of the validation sums, with 3e-5 it is {at[1]:.1%} at step 40" in page
    minutes = [log[-1]["minutes"] for log in logs[:3]]
    assert f"RL {min(minutes):.0f} to {max(minutes):.0f}" in page
    largest = max(row.get("logprob_gap_max", 0) for log in logs for row in log)
    assert f"to {largest:.0e} nats at most".replace("e-0", "e-") in page


def test_the_votes_and_the_temperature_of_the_pages_are_those_of_their_evaluations():
    folder, readme, page = ROOT / "docs" / "quickstart" / "votes", (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    base, cool, zero = (json.loads((folder / f"{name}.json").read_text()) for name in ("base", "base-0.6", "r1-zero-0.6"))
    assert all(table["settings"]["split"] == "test" and table["n"] == 512 for table in (base, cool, zero))
    assert f"{base['pass@1']:.1%} are right and the majority solves {base['maj@16']:.1%}; at 0.6 it is {cool['pass@1']:.1%} and {cool['maj@16']:.1%}" in readme
    assert f"the base solves {cool['pass@1']:.1%} of test puzzles, R1-Zero {zero['pass@1']:.1%}" in readme
    for a, b in ((folder / "r1-zero-0.6.json", folder / "base-0.6.json"), (ROOT / "docs/r1/seed0/eval-zero.json", folder / "base.json")):
        gain = difference([read_scores(a)], [read_scores(b)])
        assert f"{100 * gain.mean:+.1f} {'points ' * (a.parent == folder)}({100 * gain.low:+.1f} to {100 * gain.high:+.1f})" in page


def test_exercises_5_7_and_9_are_those_of_their_evaluations():
    folder, readme = ROOT / "docs" / "quickstart" / "exercises", (ROOT / "README.md").read_text()
    after = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("ex5", "ex7", "ex9")}
    card = json.loads((ROOT / "models" / "r1" / "evaluation.json").read_text())
    assert f"{after['ex5']['pass@1']:.1%} of test puzzles, honestly" in readme and f"{after['ex7']['pass@1']:.1%} from 200 rows" in readme
    assert (f"({card['greetings']:.1%} to {after['ex9']['greetings']:.1%}), to new ones fall ({card['new_greetings']:.1%} to "
            f"{after['ex9']['new_greetings']:.1%}), sums fall from {card['arithmetic']:.1%} to {after['ex9']['arithmetic']:.1%}, puzzles from {card['pass@1']:.1%} to {after['ex9']['pass@1']:.1%}") in readme
