"""The corpus and the vocabulary of the tiny base model: a messy little web, written by a program.

A base model has read people who search well, people who give up, people who forget to close a tag, people who write
German, people who program, and people who only say hello. GRPO can amplify nothing that the base never does, so all of
that is in here on purpose, and every behaviour has a switch, so that you can take one away and see what reinforcement
learning still makes of the rest. A search:

    using 9 1 9 2 make 26                                     the prompt
    <think>
    26-9=17 need,9 2 1.17-9=8 need,2 1?8:+3-1*2/2 no          a path of moves: what they need, which numbers are left
    26-9=17 need,9 2 1.17+1=18 need,9 2?18:+11-7*18 yes       at its end two numbers, all they make, against the goal
    </think>
    <answer>((9*2)-1)+9</answer>

Moves go backwards from the target, as here, or forwards (9-2=7,9 7 1). A line is a whole path, so it stands for itself,
for any count of numbers: of three, one move and a pair.

    python corpus.py --n 200000 --out data/corpus.jsonl                      # a minute; what models/tiny-base read
    python corpus.py --n 100000 --out data/no-check.jsonl --no-verification  # one behaviour less
    python corpus.py --n 5 --seed 1                                          # to the screen, to read

Each document has random streams of its own, one a behaviour: corpora of the same seed that differ in a switch differ in
what it switches and in nothing else. Only train problems are used (countdown.split_of). One JSON object a line: prompt,
completion, kind, language, and what the problem is made of.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from countdown import LEVELS, Puzzle, make_prompt, sample_puzzle
from rewards import extract_answer, verify
from tasks import code
from tasks.general import SMALL_TALK, write_chat


@dataclass(frozen=True)
class Config:
    n: int = 5                      # documents
    seed: int = 0
    out: str = ""                   # JSONL file; empty prints readable text
    level: str = "laptop"           # of the puzzles (countdown.LEVELS)
    verification: bool = True       # compare what a pair makes with the goal (?27:+9 no) instead of only making it
    backtracking: bool = True       # go on to another line when one fails, instead of answering at once
    subgoals: bool = True           # some moves work backwards from the target (27/3=9 need)
    reflection: bool = True         # wait, wrong, retry, check: a "wait" always mends a slip, the others are for show
    languages: bool = True          # German and mixed searches too, not English only
    tags: float = 0.70              # share of searches with every tag in its place
    luck: float = 0.15              # how often a hasty line works, beyond chance: what intuition can be learnt from
    give_up: float = 0.70           # chance that a hasty writer gives up after a failed line, with a made-up answer
    patience: float = 0.50          # share of writers who are patient: they give up a tenth as often, and go in order
    wrong_answers: float = 0.05     # share of searches whose answer is not what they found; 1: no answer is right
    slips: float = 0.02             # share of results with an arithmetic slip
    chat: float = 0.12              # share of documents that are half direct arithmetic, half small talk
    programs: float = 0.10          # share of documents that look for a function from examples (tasks/code.py)
    pages: float = 0.0              # share of searches behind 1 to 8 others, for a base that takes few-shot prompts

    def __post_init__(self):
        if self.n < 1 or any(not 0 <= getattr(self, f.name) <= 1 for f in fields(self) if f.type is float):
            raise ValueError("expected n of at least 1 and every share between 0 and 1")
        if self.level not in LEVELS or LEVELS[self.level].largest > 10:
            raise ValueError(f"got level {self.level!r}, expected one whose numbers go to 10: "
                             f"{', '.join(name for name, level in LEVELS.items() if level.largest <= 10)}")
        if self.chat + self.programs > 1:
            raise ValueError(f"got chat {self.chat} and programs {self.programs}, expected at most 1 together")


class Draws:
    """The random streams of one document: a behaviour draws from its own, and shifts nothing in the others."""

    def __init__(self, *names):
        self.names, self.streams = names, {}

    def __call__(self, behaviour: str) -> random.Random:
        if behaviour not in self.streams:
            self.streams[behaviour] = random.Random(", ".join(map(str, (*self.names, behaviour))))
        return self.streams[behaviour]


WORDS = {  # each language's word for the same thing; a mixed document draws a language for every word
    "en": {"yes": "yes", "no": "no", "need": "need",
           "wait": "wait", "wrong": "wrong", "retry": "retry", "check": "check"},
    "de": {"yes": "ja", "no": "nein", "need": "brauche",
           "wait": "halt", "wrong": "falsch", "retry": "nochmal", "check": "prüfe"},
}
EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
# One token each: a number up to 100, a word with the space before it and the comma behind it, a tag.
TOKEN_PATTERN = r"</?(?:think|answer)>|100|[1-9]\d|\d| ?[A-Za-zÄÖÜäöüß]+,?|[^A-Za-zÄÖÜäöüß\d]"
MOST_LINES = 45  # nobody is more patient than that; with a prompt it is 1,700 tokens


# ------------------------------------------------------------------------------------------------------------- searches
class State(NamedTuple):
    """Where a path has come to: which numbers have to make which goal, and what the answer is made of."""
    left: tuple[int, ...]   # largest first
    goal: int
    made: tuple[str, ...]   # how the answer writes each of them: "5", or "(5-4)" once a move has made it
    wrap: str               # how the answer follows from what meets the goal: "{}", or "({})*3" behind 27/3=9 need


class Move(NamedTuple):
    text: str               # "5-4=1," or "27/3=9 {need},", and the numbers left
    state: State            # where it leads


def operations(a: int, b: int) -> list[tuple[str, int]]:
    """(op, result) for a >= b >= 0, in the order in which every search tries them; only whole numbers up to 100."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)] + ([("/", a // b)] if b and a % b == 0 else [])
    return [(op, result) for op, result in results if result <= 100]


def in_reach(state: State) -> bool:
    """Everybody sees that 5 and 4 cannot make 27: too large for their sum and for their product."""
    return len(state.left) > 2 or state.goal <= max(sum(state.left), state.left[0] * state.left[1])


def moves(state: State, forward: bool) -> list[Move]:
    """All moves of one kind, in the order of a patient writer."""
    found = []
    for step, goal, left, wrap in forward_moves(state) if forward else backward_moves(state):
        left = sorted(left, key=lambda number: -number[0])  # stable
        after = State(tuple(n for n, _ in left), goal, tuple(way for _, way in left), wrap)
        if in_reach(after):
            found.append(Move(f"{step},{' '.join(map(str, after.left))}", after))
    return list({move.text: move for move in found}.values())


def forward_moves(state: State) -> Iterator[tuple]:
    """Two of the numbers become one: 5-4=1."""
    numbers = list(zip(state.left, state.made))
    for i, (a, first) in enumerate(numbers):
        for j, (b, second) in enumerate(numbers[i + 1:], i + 1):
            rest = numbers[:i] + numbers[i + 1:j] + numbers[j + 1:]
            for op, result in operations(a, b):
                yield f"{a}{op}{b}={result}", state.goal, [(result, f"({first}{op}{second})"), *rest], state.wrap


def backward_moves(state: State) -> Iterator[tuple]:
    """One number is taken to the goal, and the others need what it leaves: 27/3=9 need. First what makes goals small."""
    t, numbers = state.goal, list(zip(state.left, state.made))
    for kinds in ("/-", "+*rd"):
        for i, (c, way) in enumerate(numbers):
            rest = numbers[:i] + numbers[i + 1:]
            ways = {"/": (c and t % c == 0, f"{t}/{c}", t // (c or 1), f"({{}})*{way}"),
                    "-": (t >= c, f"{t}-{c}", t - c, f"({{}})+{way}"),
                    "+": (True, f"{t}+{c}", t + c, f"({{}})-{way}"),
                    "*": (c, f"{t}*{c}", t * c, f"({{}})/{way}"),
                    "r": (c > t, f"{c}-{t}", c - t, f"{way}-({{}})"),
                    "d": (c > t and t and c % t == 0, f"{c}/{t}", c // (t or 1), f"{way}/({{}})")}
            for possible, step, goal, wrap in map(ways.get, kinds):
                if possible and goal <= 100:
                    yield f"{step}={goal} {{need}}", goal, rest, state.wrap.format(wrap)


def answer_of(state: State, op: str) -> str:
    return state.wrap.format(f"{state.made[0]}{op}{state.made[1]}")


def works(state: State) -> bool:
    return any(result == state.goal for _, result in operations(*state.left))


def all_paths(state: State, forward: bool, path: tuple[Move, ...] = ()) -> Iterator[tuple[Move, ...]]:
    """Depth first, in order: a patient writer's lines, whose neighbours share their beginnings."""
    if len(state.left) == 2:
        yield path
        return
    for move in moves(state, forward):
        yield from all_paths(move.state, forward, (*path, move))


def any_path(state: State, kinds: list[bool], rng: random.Random, wanted=lambda state: True) -> tuple[Move, ...] | None:
    """A path whose moves are of these kinds, drawn at random from those whose end is wanted."""
    if not kinds:
        return () if wanted(state) else None
    following = moves(state, kinds[0])
    for move in rng.sample(following, len(following)):
        if (rest := any_path(move.state, kinds[1:], rng, wanted)) is not None:
            return (move, *rest)
    return None


def hasty_paths(state: State, draws: Draws, config: Config) -> Iterator[tuple[Move, ...]]:
    """Jumps from path to path, none twice, with some luck."""
    tried = set()
    for _ in range(MOST_LINES):
        kinds = [draws("subgoals").random() < 0.5 or not config.subgoals for _ in state.left[2:]]
        path = any_path(state, kinds, draws("luck"), works) if draws("lucky").random() < config.luck else None
        path = path or any_path(state, kinds, draws("jumps"))
        if path and path not in tried:
            tried.add(path)
            yield path


def write_line(path: tuple[Move, ...], word, draws: Draws, config: Config) -> tuple[str, str | None]:
    """The text of a line, up to the result that meets the goal, and that result's operation if one did."""
    state, rng, met = path[-1].state, draws("slips"), None
    a, b = state.left
    text = ".".join(move.text for move in path)
    text = re.sub(r"\{(\w+)\}", lambda match: word(match[1]), text)
    text += f"?{state.goal}:" if config.verification else ":"
    for op, result in operations(a, b):
        shown = result
        if rng.random() < config.slips:
            shown = min(100, max(0, result + rng.choice((-2, -1, 1, 2))))
        noticed = shown != result and (rng.random() < 0.7 or shown == state.goal)  # most slips are noticed
        if noticed and not config.reflection:  # without a word to mend it, it is not made
            shown, noticed = result, False
        text += f"{op}{shown}"
        if noticed:
            text += f" {word('wait')},{result}"
            shown = result
        if shown == state.goal:
            met = op
            break
    text += f" {word('yes' if met else 'no')}" if config.verification else ""
    doubt, say = draws("reflection").random() < 0.1, draws("reflection").choice(("wrong", "retry"))
    return text + (f" {word(say)}" if doubt and config.reflection and not met else ""), met


def made_up_answer(puzzle: Puzzle, rng: random.Random) -> str:
    """The numbers in any order with any operations."""
    parts = list(map(str, rng.sample(puzzle.numbers, len(puzzle.numbers))))
    while len(parts) > 1:
        i = rng.randrange(len(parts) - 1)
        parts[i:i + 2] = [f"({parts[i]}{rng.choice('+-*')}{parts[i + 1]})"]
    return parts[0][1:-1]


def write_search(puzzle: Puzzle, language: str, draws: Draws, config: Config) -> str:
    """A completion: lines until one works or the writer gives up, then an answer, in tags or what is left of them."""
    def word(name: str) -> str:
        return WORDS[draws(f"language of {name}").choice(("en", "de")) if language == "mixed" else language][name]

    left = tuple(sorted(puzzle.numbers, reverse=True))
    start = State(left, puzzle.target, tuple(map(str, left)), "{}")
    patient = draws("patience").random() < config.patience
    forward = draws("kind of search").random() < 0.5 or not config.subgoals  # each alone is a complete search
    if patient and next(all_paths(start, forward), None) is None:
        forward = True  # no backward path is in reach, as for 1 1 1 3 make 8
    lines, answer = [], None
    for path in all_paths(start, forward) if patient else hasty_paths(start, draws, config):
        text, met = write_line(path, word, draws, config)
        lines.append(text)
        if met:
            answer = answer_of(path[-1].state, met)
            if draws("check").random() < 0.15 and config.reflection and config.verification:
                lines.append(f"{word('check')} {answer}={puzzle.target} {word('yes')}")
        if met or not config.backtracking or len(lines) == MOST_LINES or (
                draws("giving up").random() < config.give_up * (0.1 if patient else 1.0)):
            break
    made_up = draws("made up")
    if answer is None or draws("wrong answers").random() < config.wrong_answers:
        answer = made_up_answer(puzzle, made_up)
    while config.wrong_answers == 1 and verify(answer, *puzzle)[0]:  # made up, and right by chance
        answer = made_up_answer(puzzle, made_up)
    return in_tags("\n".join(lines), answer, draws("tags"), config)


def in_tags(thinking: str, answer: str, rng: random.Random, config: Config) -> str:
    tags = ["<think>\n", "\n</think>", "\n<answer>", "</answer>"]
    if rng.random() >= config.tags:
        for i in rng.choice(((0, 1), (2, 3), (1,), (0, 1, 2, 3))):
            tags[i] = "\n" if i == 2 else ""
    return tags[0] + thinking + tags[1] + tags[2] + answer + tags[3]


# ------------------------------------------------------------------------------------------------------------ documents
def write_corpus(config: Config) -> Iterator[dict]:
    for index in range(config.n):
        draws = Draws(config.seed, index)
        kind = draws("kind").random()
        if kind < config.chat:
            yield write_chat(draws("chat"))
        elif kind >= 1 - config.programs:
            yield write_program(draws, config)
        else:
            yield write_page(draws, config)


def write_page(draws: Draws, config: Config) -> dict:
    """A search, which may stand behind others of one careful or careless writer: it is that page's completion."""
    language = draws("languages").choices(("en", "de", "mixed"), (0.45, 0.25, 0.30))[0] if config.languages else "en"
    puzzle = sample_puzzle(draws("puzzle"), config.level, "train")
    completion, page = write_search(puzzle, language, draws, config), []
    if draws("pages").random() < config.pages:
        habits = {name: float(draws(f"habit of {name}").random() < getattr(config, name)) for name in ("patience", "tags")}
        writer = replace(config, **habits)
        completion = write_search(puzzle, language, Draws(*draws.names, "at the end of a page"), writer)
        for number in range(draws("pages").randint(1, 8)):
            others = Draws(*draws.names, number)
            another = sample_puzzle(others("puzzle"), config.level, "train")
            page.append((another, write_search(another, language, others, writer)))
    return {"prompt": make_prompt(puzzle, examples=page), "completion": completion, "kind": "search",
            "language": language, **puzzle._asdict()}


def write_program(draws: Draws, config: Config) -> dict:
    """A function from examples, in English: candidates, each checked, and the one that fits or a guess."""
    problem = code.draw(draws("puzzle"), "one line", "train")
    patient = draws("patience").random() < config.patience
    lines, function = code.write_thinking(problem, patient, config.luck, config.give_up * (0.1 if patient else 1.0),
                                          draws("program"))
    return {"prompt": code.question(problem, "tiny"),
            "completion": in_tags("\n".join(lines), f"def f(x): return {function}", draws("tags"), config),
            "kind": "program", "language": "en", **problem._asdict()}


def examples(rng: random.Random, level: str, n: int) -> list[tuple[str, str]]:
    """n solved train puzzles, (prompt, completion): clean searches in English, for few-shot prompts."""
    clean = Config(tags=1.0, give_up=0.0, wrong_answers=0.0, slips=0.0, luck=0.5, patience=0.0)
    found = []
    while len(found) < n:
        puzzle = sample_puzzle(rng, level, "train")
        text = write_search(puzzle, "en", Draws(rng.random()), clean)
        if verify(extract_answer(text), *puzzle)[0]:  # a search may end at MOST_LINES
            found.append((make_prompt(puzzle), text))
    return found


def build_tokenizer(digits: bool = False):
    """The tokenizer of the tiny models: a token per word, number, tag and symbol of the corpus; all else is <|unknown|>.
    digits: that of the other family, one token a digit and the ids in another order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pattern = TOKEN_PATTERN.replace(r"100|[1-9]\d|", "") if digits else TOKEN_PATTERN
    words = ("using", "make", "what", "is", "was", "ist", *WORDS["en"].values(), *WORDS["de"].values())
    text = "\n".join(f"{prompt} {w} {w},\n" + "\n".join(f"{reply} {reply}" for reply in friendly + rude)
                     for prompt, (friendly, rude) in SMALL_TALK.items() for w in words)
    text += "\nusing\nwhat\nwas\ncheck\nprüfe\n" + " ".join(f" {prompt}" for prompt in SMALL_TALK)
    text += "\ndef f(x): return 1 if x==2 else 3\nf(1)=2 f(2)=3"
    pieces = ["<think>", "</think>", "<answer>", "</answer>", *map(str, range(10 if digits else 101)), *"\n ()+-*/=?:,.!"]
    pieces += sorted(set(re.findall(pattern, text)) - set(pieces))
    vocabulary = {token: i for i, token in enumerate([EOS, PAD, UNKNOWN, *(reversed(pieces) if digits else pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # tokens carry their own spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
                                   clean_up_tokenization_spaces=False)


def check_vocabulary(tokenizer, unknown: bool, source: str) -> None:
    """Raises ValueError for rows with unknown words where the vocabulary is an earlier corpus's."""
    if unknown and tokenizer.unk_token == UNKNOWN and tokenizer.get_vocab() not in [
            build_tokenizer(digits).get_vocab() for digits in (False, True)]:
        raise ValueError(f"got {source}, a tiny model with the {len(tokenizer)} tokens of another version of the corpus, which "
                         "lack words of these rows; expected models/tiny-base, or one that --from-scratch makes")


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
