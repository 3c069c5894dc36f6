"""The corpus and the vocabulary of the tiny base model: a messy little web, written by a program.

A base model has read people who search well, people who give up, people who forget to close a tag, people who write
German, and people who only say hello. GRPO can amplify nothing that the base never does, so all of that is in here on
purpose, and every behaviour has a switch, so that you can take one away and see what reinforcement learning still makes
of the rest. A search:

    using 3 4 5 make 27                                          the prompt
    <think>
    5-4=1,3 1:3+1=4?27 no,3-1=2?27 no,3*1=3?27 no,3/1=3?27 no,  a first move, then what is left, every attempt checked
    27/3=9 need,5 4:5+4=9?9 yes                                  a subgoal: 9 would do, because 9*3=27
    </think>
    <answer>(5+4)*3</answer>

    python corpus.py --n 200000 --out data/corpus.jsonl                      # 20 seconds; what models/tiny-base read
    python corpus.py --n 100000 --out data/no-check.jsonl --no-verification  # one behaviour less
    python corpus.py --n 5 --seed 1                                          # to the screen, to read

Only train puzzles are used (countdown.is_held_out). One JSON object a line: prompt, completion, kind, language,
numbers, target.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

from countdown import Puzzle, gold, make_prompt, sample_puzzle
from rewards import verify
from tasks.general import SMALL_TALK, write_chat


@dataclass(frozen=True)
class Config:
    n: int = 5                      # documents
    seed: int = 0
    out: str = ""                   # JSONL file; empty prints readable text
    verification: bool = True       # write every comparison out (3+1=4?27 no) instead of only the result
    backtracking: bool = True       # go on to another first move when one fails, instead of answering at once
    subgoals: bool = True           # some lines work backwards from the target (27/3=9 need)
    reflection: bool = True         # wait, wrong, retry, check: a "wait" always mends a slip, the others are for show
    languages: bool = True          # German and mixed searches too, not English only
    tags: float = 0.70              # share of searches with every tag in its place
    luck: float = 0.15              # how often the next line works, beyond chance: what intuition can be learnt from
    give_up: float = 0.70           # chance that a hasty writer gives up after a failed line, with a made-up answer
    patience: float = 0.50          # share of writers who are patient: a tenth of it, and line after line in order
    wrong_answers: float = 0.05     # share of searches whose answer is not what they found; 1: no answer is right
    slips: float = 0.02             # share of attempts with an arithmetic slip
    chat: float = 0.17              # share of documents that are no search: half direct arithmetic, half small talk
    pages: float = 0.0              # share of searches that stand behind 1 to 8 others, a page by one writer; its last
                                    # search is the row's completion. A base that has read pages takes few-shot prompts

    def __post_init__(self):
        if self.n < 1 or any(not 0 <= getattr(self, f.name) <= 1 for f in fields(self) if f.type is float):
            raise ValueError("expected n of at least 1 and every share between 0 and 1")


WORDS = {  # each language's word for the same thing; a mixed document draws a language for every word
    "en": {"yes": "yes", "no": "no", "need": "need",
           "wait": "wait", "wrong": "wrong", "retry": "retry", "check": "check"},
    "de": {"yes": "ja", "no": "nein", "need": "brauche",
           "wait": "halt", "wrong": "falsch", "retry": "nochmal", "check": "prüfe"},
}
EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
# One token each: a number up to 100, a word with the space before it and the comma behind it, a tag.
TOKEN_PATTERN = r"</?(?:think|answer)>|100|[1-9]\d|\d| ?[A-Za-zÄÖÜäöüß]+,?|[^A-Za-zÄÖÜäöüß\d]"


# ------------------------------------------------------------------------------------------------------------- searches
@dataclass(frozen=True)
class Line:
    """One line of a search: a header, then the four operations on the two numbers left, each compared with the goal."""
    header: str             # "5-4=1," or "27/3=9 need,"
    left: tuple[int, int]   # the two numbers to combine, larger first
    goal: int
    first: str | None       # forward: the first move's expression, which stands for its value in the answer
    value: int | None
    wrap: str | None        # backward: how the answer follows from the attempt that meets the goal, "({})*3"


def operations(a: int, b: int) -> list[tuple[str, int]]:
    """(op, result) for a >= b >= 0, in the order in which every search tries them; only whole numbers up to 100."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)] + ([("/", a // b)] if b and a % b == 0 else [])
    return [(op, result) for op, result in results if result <= 100]


def candidate_lines(puzzle: Puzzle, config: Config) -> list[Line]:
    numbers, target, lines = puzzle.numbers, puzzle.target, []
    for k in range(3):  # numbers[k] is the one that waits for the second step
        c, (b, a) = numbers[k], sorted(numbers[:k] + numbers[k + 1:])
        for op, value in operations(a, b):
            left = max(value, c), min(value, c)
            lines.append(Line(f"{a}{op}{b}={value},", left, target, f"({a}{op}{b})", value, None))
        if config.subgoals:
            goals = [("+", c, target + c, f"({{}})-{c}")] if target + c <= 100 else []
            goals += [("*", c, target * c, f"({{}})/{c}")] if target * c <= 100 else []
            goals += [("-", c, target - c, f"({{}})+{c}")] if target >= c else [("-", -1, c - target, f"{c}-({{}})")]
            goals += [("/", c, target // c, f"({{}})*{c}")] if target % c == 0 else []
            goals += [("/", -1, c // target, f"{c}/({{}})")] if c > target and c % target == 0 else []
            for op, right, goal, wrap in goals:
                step = f"{c}{op}{target}" if right == -1 else f"{target}{op}{c}"
                lines.append(Line(f"{step}={goal} {{need}},", (a, b), goal, None, None, wrap))
    return list(dict.fromkeys(lines))


def solutions(line: Line) -> list[str]:
    """The answers that this line leads to."""
    a, b = line.left
    found = []
    for op, result in operations(a, b):
        if result == line.goal:
            if line.wrap:
                found.append(line.wrap.format(f"{a}{op}{b}"))
            else:  # the first move's value is one of the two numbers; its expression goes there instead
                found.append(f"{line.first}{op}{b}" if a == line.value else f"{a}{op}{line.first}")
    return found


def write_line(line: Line, word, rng: random.Random, config: Config) -> tuple[str, bool]:
    """The text of a line, up to the attempt that meets the goal, and whether one did."""
    a, b = line.left
    text = re.sub(r"\{(\w+)\}", lambda match: word(match[1]), line.header) + f"{a} {b}:"
    for op, result in operations(a, b):
        shown = result
        if rng.random() < config.slips:
            shown = max(0, result + rng.choice((-2, -1, 1, 2)))
        noticed = shown != result and (shown == line.goal or rng.random() < 0.7)  # most slips are noticed
        if noticed and not config.reflection:  # without a word to mend it, it is not made
            shown, noticed = result, False
        text += f"{a}{op}{b}={shown}"
        if noticed:
            text += f" {word('wait')},{result}"
            shown = result
        found = shown == line.goal
        text += f"?{line.goal} {word('yes' if found else 'no')}" if config.verification else ""
        if found:
            return text, True
        text += ","
    if config.reflection and rng.random() < 0.1:
        text += f" {word(rng.choice(('wrong', 'retry')))},"
    return text, False


def made_up_answer(puzzle: Puzzle, rng: random.Random) -> str:
    a, b, c = rng.sample(puzzle.numbers, 3)
    return rng.choice((f"({a}{rng.choice('+-*')}{b}){rng.choice('+-*')}{c}",
                       f"{a}{rng.choice('+-*')}({b}{rng.choice('+-*')}{c})"))


def choose_line(lines: list[Line], rng: random.Random, config: Config) -> int:
    """Index of the line to try: any, but with the luck that intuition brings, one that works."""
    working = [i for i, line in enumerate(lines) if solutions(line)]
    return rng.choice(working) if working and rng.random() < config.luck else rng.randrange(len(lines))


def write_search(puzzle: Puzzle, language: str, rng: random.Random, config: Config) -> str:
    """A completion: lines until one works or the writer gives up, then an answer, in tags or what is left of them."""
    def word(name: str) -> str:
        return WORDS[rng.choice(("en", "de")) if language == "mixed" else language][name]

    untried = candidate_lines(puzzle, config)
    patient = rng.random() < config.patience
    if patient:  # one kind of line only, since each kind alone is a complete search; in order, from some line on
        forward = not config.subgoals or rng.random() < 0.5
        untried = [line for line in untried if (line.wrap is None) == forward]
        start = choose_line(untried, rng, config)
        untried = untried[start:] + untried[:start]
    lines, answer = [], None
    while answer is None:
        line = untried.pop(0 if patient else choose_line(untried, rng, config))
        text, found = write_line(line, word, rng, config)
        lines.append(text)
        if found:
            answer = solutions(line)[0]
            if config.reflection and config.verification and rng.random() < 0.15:
                lines.append(f"{word('check')} {answer}={puzzle.target} {word('yes')}")
        elif not config.backtracking or not untried or rng.random() < config.give_up * (0.1 if patient else 1.0):
            answer = made_up_answer(puzzle, rng)
    if rng.random() < config.wrong_answers:
        answer = made_up_answer(puzzle, rng)
    while config.wrong_answers == 1 and verify(answer, *puzzle)[0]:  # made up, and right by chance
        answer = made_up_answer(puzzle, rng)
    tags = ["<think>\n", "\n</think>", "\n<answer>", "</answer>"]
    if rng.random() >= config.tags:
        for i in rng.choice(((0, 1), (2, 3), (1,), (0, 1, 2, 3))):
            tags[i] = "\n" if i == 2 else ""
    return tags[0] + "\n".join(lines) + tags[1] + tags[2] + answer + tags[3]


# ------------------------------------------------------------------------------------------------------------ documents
def write_corpus(config: Config) -> Iterator[dict]:
    rng = random.Random(config.seed)
    for _ in range(config.n):
        if rng.random() < config.chat:
            yield write_chat(rng)
            continue
        puzzle = sample_puzzle(rng, "laptop", held_out=False)
        language = rng.choices(("en", "de", "mixed"), (0.45, 0.25, 0.30))[0] if config.languages else "en"
        writer, page = config, []
        if config.pages and rng.random() < config.pages:  # (puzzle, search) pairs of one careful or careless writer
            writer = replace(config, **{habit: float(rng.random() < getattr(config, habit)) for habit in
                                        ("patience", "tags")})
            for _ in range(rng.randint(1, 8)):
                page.append((another := sample_puzzle(rng, "laptop", held_out=False),
                             write_search(another, language, rng, writer)))
        yield {"prompt": make_prompt(puzzle, examples=page), "completion": write_search(puzzle, language, rng, writer),
               "kind": "search", "language": language, **puzzle._asdict()}


def examples(rng: random.Random, level: str, n: int) -> list[tuple[str, str]]:
    """n solved train puzzles, (prompt, completion): clean searches in English, for few-shot prompts."""
    clean, found = Config(tags=1.0, give_up=0.0, wrong_answers=0.0, slips=0.0, luck=0.5), []
    for _ in range(n):
        puzzle = sample_puzzle(rng, level, held_out=False)
        found.append((make_prompt(puzzle), write_search(puzzle, "en", rng, clean) if len(puzzle.numbers) == 3
                      else gold(puzzle)))
    return found


def build_tokenizer():
    """The tiny base's tokenizer: a token per word, number, tag and symbol of the corpus; all else is <|unknown|>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("using", "make", "what", "is", "was", "ist", *WORDS["en"].values(), *WORDS["de"].values())
    text = "\n".join(f"{prompt} {w} {w},\n" + "\n".join(f"{reply} {reply}" for reply in friendly + rude)
                     for prompt, (friendly, rude) in SMALL_TALK.items() for w in words)
    text += "\nusing\nwhat\nwas\ncheck\nprüfe\n" + " ".join(f" {prompt}" for prompt in SMALL_TALK)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", *map(str, range(101)), *"\n ()+-*/=?:,.!"]
    pieces += sorted(set(re.findall(TOKEN_PATTERN, text)) - set(pieces))
    vocabulary = {token: i for i, token in enumerate([EOS, PAD, UNKNOWN, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()  # tokens carry their own spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
                                   clean_up_tokenization_spaces=False)


def main(arguments: list[str] | None = None) -> None:
    from machinery.flags import bad_input_exits, parse_config  # brings torch along, which writing needs not
    config = parse_config(Config, __doc__, arguments)
    if not config.out:
        for document in write_corpus(config):
            print(document["prompt"] + document["completion"] + "\n")
        return
    path = Path(config.out)
    with bad_input_exits():
        if path.exists():
            raise FileExistsError(f"{path} exists and is never overwritten; name another file or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for document in tqdm(write_corpus(config), total=config.n, desc="corpus", unit="document", delay=2):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
    print(f"{config.n} documents in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
