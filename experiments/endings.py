"""How searches end: what stands between a policy and the puzzles that it does not solve.

    right           the answer is right
    false yes       wrong, and the last path that says "yes" is none: its moves use numbers that are not there, its results
                    are wrong, or nothing makes its goal
    wrong answer    wrong, though that path is true: the answer was not put together as it says
    gave up         wrong, and no path says "yes"
    cut off         no end within the limit of tokens
    in circles      of all completions, those cut off where more than a third of the lines stood there before
    no answer       not one final answer, or none that can be read

    python -m experiments.endings models/tiny-base runs/zero/checkpoint              # test puzzles
    python -m experiments.endings models/tiny-base --level hundred --json endings.json

Which path is true is decided by the exact solver (line_rewards.still_reaches), in the tiny models' notation only.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from countdown import LEVELS, SPLITS, Puzzle, key, make_prompt, sample_puzzles
from experiments.line_rewards import still_reaches
from experiments.study import markdown, sample_groups
from machinery.checkpoints import find_directory, load
from machinery.flags import bad_input_exits
from machinery.run_folder import check_new_file, write_json
from machinery.statistics import name_problems
from machinery.text import check_numbers
from rewards import chain_of_thought, extract_answer, verify

ENDINGS = ("right", "false yes", "wrong answer", "gave up", "cut off", "no answer")
YES = re.compile(r"^(.*:).* (?:yes|ja)$", re.MULTILINE)  # a path that says so, up to its results


def ending(text: str, puzzle: Puzzle, truncated: bool) -> str:
    """One of ENDINGS. text: a completion."""
    right, reason = verify(extract_answer(text), *puzzle)
    if right:
        return "right"
    if truncated:
        return "cut off"
    if not reason.startswith(("uses", "value")):
        return "no answer"
    found = YES.findall(chain_of_thought(text))
    if not found:
        return "gave up"
    return "wrong answer" if still_reaches(found[-1], puzzle) else "false yes"


def in_circles(text: str) -> bool:
    """Of a completion that was cut off: more than a third of its lines stood there before."""
    lines = [line for line in text.splitlines() if ":" in line]
    return 3 * (len(lines) - len(set(lines))) > len(lines)


def measure(checkpoint, puzzles: list[Puzzle], *, samples: int = 4, max_new_tokens: int = 1024, seed: int = 0) -> dict:
    """{"endings": {3: {ending: share of the completions of puzzles with three numbers, ...}, 4: ...}, ...}, and for
    machinery.statistics.scores_of() how many completions of each puzzle are right."""
    model, tokenizer = load(checkpoint)
    check_numbers(tokenizer, list(map(make_prompt, puzzles)), "tiny")
    groups = sample_groups(model.eval(), tokenizer, puzzles, samples, max_new_tokens, seed, str(checkpoint))
    counts, right = {}, []
    for puzzle, rows in zip(puzzles, groups):
        kinds = [ending(text, puzzle, completion.truncated) for _, completion, text in rows]
        right.append(kinds.count("right"))
        own = counts.setdefault(len(puzzle.numbers), Counter())
        own.update(kinds)
        own["in circles"] += sum(in_circles(text) for kind, (_, _, text) in zip(kinds, rows) if kind == "cut off")
    return {"problems": name_problems(map(key, puzzles)), "samples": samples, "right": right,
            "tokens": sum(len(completion.token_ids) for rows in groups for _, completion, _ in rows) / samples / len(puzzles),
            "endings": {numbers: {kind: own[kind] / sum(own[kind] for kind in ENDINGS) for kind in (*ENDINGS, "in circles")}
                        for numbers, own in sorted(counts.items())}}


def table(found: dict[str, dict], what: str = "checkpoint") -> str:
    rows = [[checkpoint, numbers, *(f"{shares[kind]:.1%}" for kind in (*ENDINGS, "in circles"))]
            for checkpoint, own in found.items() for numbers, shares in own["endings"].items()]
    return markdown([what, "numbers", *ENDINGS, "of it in circles"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="directories or hub ids")
    parser.add_argument("--level", choices=LEVELS, default="laptop")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--n", type=int, default=512, help="puzzles")
    parser.add_argument("--samples", type=int, default=4, help="completions of each")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="a longer completion is cut off")
    parser.add_argument("--json", default="", help="file to write the shares to")
    args = parser.parse_args()
    with bad_input_exits():
        check_new_file("--json", args.json)
        puzzles = sample_puzzles(args.n, level=args.level, split=args.split, seed=0)
        found = {str(name): measure(find_directory(name), puzzles, samples=args.samples, max_new_tokens=args.max_new_tokens)
                 for name in args.checkpoints}
        if args.json:
            write_json(Path(args.json), {"settings": vars(args), **found})
    print(table(found))


if __name__ == "__main__":
    main()
