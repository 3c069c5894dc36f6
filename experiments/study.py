"""What the four studies share: one command each, seeds that may run in a terminal each, and results to look at.

A study is a list of pieces of work for each seed. A piece is either a command of the recipe (stages.Stage) or a function
whose result is kept as JSON; both are skipped when they are done, so an interrupted study goes on with the same command.

    OUT/config.json            the settings; a folder holds one set of them
    OUT/seed0/...              runs, datasets and pieces of a seed
    OUT/NAME.json, .png, .md   results of all seeds; the ones that we ran are in experiments/results/
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

from countdown import make_prompt, sample_puzzles
from machinery.checkpoints import read_hf_config
from machinery.data import fingerprint
from machinery.flags import bad_input_exits, parse_config
from machinery.run_folder import write_json, write_whole
from machinery.stages import Stage, check_stages, run_stage
from machinery.statistics import Scores, difference, share
from machinery.text import check_room, read_tokenizer
from sampling import complete

RUN_ONLY = ("out", "seeds", "seed", "arm", "again")  # what does not change a seed's numbers


def begin(config_class, doc: str, quick: dict, levels: tuple[str, ...] = ("laptop",)):
    """Flags -> config, --quick being the values of quick and a folder of its own. Ends in one line where OUT holds other
    settings or more seeds, and where the model cannot read the test puzzles of these levels, or there are fewer than are
    asked for."""
    config = parse_config(config_class, doc, quick=quick | {"out": f"{config_class.out}-quick"})
    settings = {name: value for name, value in asdict(config).items() if name not in RUN_ONLY}
    with bad_input_exits():
        if not -1 <= config.seed < config.seeds or config.seeds < 1:
            raise ValueError(f"got seed {config.seed} with seeds {config.seeds}, expected one below it")
        for name, value in settings.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"got {name} {value}, expected more than 0")
        if "/" in settings["model"] and not Path(settings["model"]).is_dir():
            raise FileNotFoundError(f"got model {settings['model']}, but there is no such directory")
        directory = Path(settings["model"])
        for level in levels:
            puzzles = sample_puzzles(settings.get("n") or settings["eval_n"], level=level, split="test", seed=0)
            if directory.is_dir():
                check_room(read_tokenizer(directory), list(map(make_prompt, puzzles)), "tiny", config.max_new_tokens,
                           read_hf_config(directory).max_position_embeddings)
        settings |= {f"{name} weights": fingerprint(value) for name, value in settings.items()
                     if isinstance(value, str) and Path(value).is_dir()}
        if more := sorted(path.name for path in Path(config.out).glob("seed*")
                           if path.name[4:].isdigit() and int(path.name[4:]) >= config.seeds):
            raise ValueError(f"got seeds {config.seeds} and {config.out}, which has {', '.join(more)} too; expected --seeds "
                             "that counts them, or another --out")
        path = Path(config.out) / "config.json"
        if path.exists() and (held := json.loads(path.read_text(encoding="utf-8"))) != settings:
            differ = [name for name in held | settings if held.get(name) != settings.get(name)]
            raise ValueError(f"got {config.out}, which holds this study with other settings ({', '.join(differ)}); "
                             "expected the same, or another --out")
        write_json(path, settings)
    return config


def seeds_to_run(config) -> list[int]:
    return list(range(config.seeds)) if config.seed < 0 else [config.seed]


def seed_folder(config, seed: int) -> Path:
    folder = Path(config.out) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def piece(folder: Path, name: str, make=None):
    """make()'s result, kept in FOLDER/NAME.json: computed once. JSON turns the keys of a dictionary into text."""
    path = folder / f"{name.replace(' ', '-')}.json"
    if make and not path.exists():
        started = time.time()
        result = make()
        write_json(path, {"minutes": (time.time() - started) / 60, "result": result})
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def has_pieces(folder: Path, names) -> bool:
    """Whether all are there; then nobody needs the checkpoints that they were measured on."""
    return all((folder / f"{name.replace(' ', '-')}.json").exists() for name in names)


def wait_for(file) -> None:
    """Until no other process holds this open file; it lets go when it is closed, or dies."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    except ImportError:  # Windows
        import msvcrt
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            except OSError:  # it gives up after ten seconds
                pass


def run_stages(folder: Path, stages: list[Stage], go_on: str, lock: str = "lock") -> None:
    """One process at a time in a folder: a second terminal waits here for the base that both need. lock: another file, for
    stages that nobody shares."""
    folder.mkdir(parents=True, exist_ok=True)
    with bad_input_exits():
        check_stages(stages)
    with open(folder / lock, "w", encoding="utf-8") as file:
        wait_for(file)
        for stage in tqdm(stages, desc=str(folder), unit="stage"):
            run_stage(folder, stage, stages, go_on)


def sample_groups(model, tokenizer, puzzles, samples: int, max_new_tokens: int, seed: int, what: str,
                  start: str = "") -> list[list[tuple]]:
    """(prompt ids, Completion, text) of each puzzle's samples, a group a puzzle; all begin with start, which belongs to
    the prompt's ids and to the text. In chunks, for the progress bar: they change no token."""
    groups, size = [], max(1, 1024 // samples)  # puzzles at a time
    for first in tqdm(range(0, len(puzzles), size), desc=what, unit="batch"):
        prompts = [make_prompt(puzzle) + start for puzzle in puzzles[first:first + size] for _ in range(samples)]
        prompt_ids, completions, texts = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed,
                                                  first_index=first * samples)
        rows = list(zip(prompt_ids, completions, [start + words for words in texts]))
        groups += [rows[i:i + samples] for i in range(0, len(rows), samples)]
    return groups


def minutes(folder: Path) -> float:
    """Of all stages and pieces in a seed's folder."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (*folder.glob("*.json"), *folder.glob("stages/*.json"))]
    return sum(record.get("minutes", 0.0) for record in records)


def measured(runs: list[Scores]) -> dict:
    """A share of puzzles: the mean over seeds, its 95% interval over puzzles and seeds, and the seeds' own values."""
    return share(runs)._asdict()


def paired(a: list[Scores], b: list[Scores]) -> dict:
    """a minus b, puzzle by puzzle and seed by seed, with its 95% interval and what that says."""
    own = difference(a, b)
    return own._asdict() | {"verdict": own.verdict()}


def average(values: list[float]) -> dict:
    """Of what is no share of puzzles: the mean over seeds, and the seeds' own values."""
    return {"mean": sum(values) / len(values), "seeds": values}


def rounded(value):
    """Floats to 5 significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def text(entry: dict, interval: bool = True, seeds: bool = False) -> str:
    """As docs/studies.md writes it: 42.0% (37.8% to 46.3%), or with the seeds of a training run: 42.0% (41.0%, 43.0%)."""
    if seeds:
        return f"{entry['mean']:.1%} ({', '.join(f'{value:.1%}' for value in entry['seeds'])})"
    if interval and "low" in entry:
        return f"{entry['mean']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"
    return f"{entry['mean']:.1%}"


def points(pair: dict) -> str:
    return f"{100 * pair['mean']:+.1f} points, {100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"


def judged(pair: dict) -> str:
    return f"{points(pair)}: {pair['verdict']}"


def compared(pair: dict) -> str:
    """A paired difference, to stand before what it is compared with."""
    return {"better": "better than", "worse": "worse than", "not told apart": "not told apart from"}[pair["verdict"]]


def draw_shares(axis, entries: dict, cost: float, colour: str, label: str, style: str = "-") -> None:
    """Shares by number of completions, each as many tokens as `cost` of them, with their intervals."""
    x = [cost * int(size) for size in entries]
    mean = [entry["mean"] for entry in entries.values()]
    axis.plot(x, mean, style, marker="o", markersize=3, color=colour, label=label)
    axis.fill_between(x, [entry["low"] for entry in entries.values()], [entry["high"] for entry in entries.values()],
                      color=colour, alpha=0.1)


def share_axis(axis, label: str, log: bool = True) -> None:
    if log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(label)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def markdown(header: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def finish(config, name: str, results: dict, draw, table, verdict) -> None:
    """OUT/NAME.json, NAME.png, and NAME.md: what docs/studies.md says. draw(results, path) draws, table(results) ->
    markdown, verdict(results) -> two sentences."""
    folder = Path(config.out)
    record = {"command": f"python -m experiments.{name}", "config": asdict(config),
              "minutes": {path.name: round(minutes(path), 1) for path in sorted(folder.iterdir()) if path.is_dir()},
              "torch": torch.__version__, "threads": torch.get_num_threads(), **results}
    record = json.loads(json.dumps(rounded(record)))  # as a reader of the file will find it
    write_json(folder / f"{name}.json", record)
    draw(record, folder / f"{name}.png")
    words = f"{verdict(record)}\n\n{table(record)}\n"
    write_whole(folder / f"{name}.md", words)
    print(f"\n{words}\n{folder / name}.json, .png and .md; minutes: {record['minutes']}"
          + " (--quick: the numbers mean nothing)" * config.quick)
