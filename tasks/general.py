"""General prompts: greetings, small talk and direct arithmetic, which want a reply and no search. A task like any other,
but no rule pays for its replies: a reward model scores them (preference.py). And the files that later stages of R1 read.

    python train_countdown.py --task countdown=3,general=1 --preference MODEL ...       # RL on all prompts
    python -m tasks.general replies --n 3000 --out data/replies.jsonl  # prompt, completion: the "200k" non-CoT part of SFT
    python -m tasks.general pairs --n 6000 --out data/pairs.jsonl      # prompt, chosen, rejected: for preference.py

DeepSeek-R1 (arXiv 2501.12948), section 2.3.3: about 600k reasoning rows and 200k others, among them simple queries such
as "hello", for which no chain of thought is given. Section 2.3.4: reward models score general prompts.

The tiny model's world is small enough to know every good reply, so is_good is a rule, the truth beside the reward
model's opinion. Sums are split by hash, as puzzles are; the small talk of NEW is asked in no corpus and in no data of
any stage (some of it stands there as a reply), while that of SMALL_TALK is known to all of them. For a real checkpoint
bring prompts of your own (tasks/questions.py). No torch in here.
"""

import argparse
import json
import random
from pathlib import Path

from countdown import check_split, split_of
from rewards import TAGS

SMALL_TALK = {  # prompt -> (friendly replies, rude replies)
    "hello": (("hello, how can i help you?", "hello, nice to see you!"), ("go away", "what do you want?")),
    "hi": (("hi, how can i help you?", "hello, how are you?"), ("go away", "not you")),
    "good morning": (("good morning, how are you?", "good morning, how can i help you?"), ("go away",)),
    "how are you?": (("i am fine, thank you!", "very good, thank you, and you?"),
                     ("what do you want?", "not good, go away")),
    "thank you": (("you are welcome!", "you are very welcome, see you!"), ("go away", "not you")),
    "goodbye": (("goodbye, see you!", "see you, have a good day!"), ("go away",)),
    "who are you?": (("i am a small model, nice to see you!", "i am a small model, how can i help you?"),
                     ("not you",)),
    "have a good day": (("thank you, you too!", "thank you, have a good day!"), ("go away", "what do you want?")),
    "hallo": (("hallo, wie kann ich helfen?", "hallo, wie geht es dir?"), ("geh weg",)),
    "guten morgen": (("guten morgen, wie geht es dir?",), ("geh weg", "was willst du?")),
    "wie geht es dir?": (("sehr gut, danke!", "gut, danke, und dir?"), ("was willst du?",)),
    "danke": (("bitte sehr!", "sehr gern!"), ("geh weg",)),
}
NEW = {  # prompts in words that are known -> the prompts above whose friendly replies answer them
    "validation": {"hello, how are you?": ("hello", "how are you?"), "hi, who are you?": ("hi", "who are you?"),
                   "thank you, goodbye!": ("thank you", "goodbye"), "very good, thank you!": ("thank you",),
                   "hallo, guten morgen!": ("hallo", "guten morgen"), "danke sehr!": ("danke",)},
    "test": {"good morning, how are you?": ("good morning", "how are you?"), "hello, nice to see you!": ("hello", "hi"),
             "thank you, have a good day!": ("thank you", "have a good day"), "see you!": ("goodbye",),
             "hallo, wie geht es dir?": ("hallo", "wie geht es dir?"), "sehr gut, danke!": ("danke",)},
}
GERMAN = ("hallo", "guten morgen", "wie geht es dir?", "danke")
DOUBT = {"en": ("wait", "check"), "de": ("halt", "prüfe")}  # what a needless chain of thought is made of
FLAWS = ("wrong", "rude", "rambling", "thinking")  # wrong is for arithmetic, rude for small talk


def draw_question(rng: random.Random, split: str = "train") -> dict:
    """{"prompt", "kind": arithmetic or small_talk, "language", "good": replies that answer it}; half of each kind."""
    check_split(split)
    return draw_sum(rng, split) if rng.random() < 0.5 else rng.choice(small_talk(split))


def draw_sum(rng: random.Random, split: str) -> dict:
    """One operation on two numbers from 1 to 10, in either language. 3+4 and 4+3 are of the same split."""
    while True:
        a, b, op = rng.randint(1, 10), rng.randint(1, 10), rng.choice("+-*/")
        a, b = {"/": (a * b, b), "-": (max(a, b), min(a, b))}.get(op, (a, b))
        numbers = sorted((a, b)) if op in "+*" else (a, b)
        if split_of(f"{numbers[0]}{op}{numbers[1]}") == split:
            break
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
    language = rng.choice(("en", "de"))
    return {"prompt": f"{'what is' if language == 'en' else 'was ist'} {a}{op}{b}?\n", "kind": "arithmetic",
            "language": language, "good": [str(result)]}


def small_talk(split: str) -> list[dict]:
    """All there is: what training knows, or what it never meets."""
    prompts = NEW[split] if split in NEW else {prompt: (prompt,) for prompt in SMALL_TALK}
    return [{"prompt": f"{prompt}\n", "kind": "small_talk", "language": "de" if like[0] in GERMAN else "en",
             "good": [reply for name in like for reply in SMALL_TALK[name][0]]} for prompt, like in prompts.items()]


def flawed(question: dict, reply: str, flaw: str, rng: random.Random) -> str:
    """A good reply of a train question made bad in one way."""
    prompt = question["prompt"].strip()
    if flaw == "wrong":
        return str(rng.choice([number for number in range(101) if str(number) != reply]))
    if flaw == "rude":
        return rng.choice(SMALL_TALK[prompt][1])
    if flaw == "rambling":
        return " ".join([reply] * rng.randint(2, 4))
    wait, check = DOUBT[question["language"]]
    return f"<think>\n{prompt} {wait}, {prompt} {check}\n</think>\n<answer>{reply}</answer>"


def write_chat(rng: random.Random) -> dict:
    """A document of the tiny base's corpus: some replies are wrong, rude, rambling or thought over, as on the web."""
    question = draw_question(rng)
    row = {name: question[name] for name in ("prompt", "kind", "language")}
    if question["kind"] == "arithmetic":
        result = int(question["good"][0])
        shown = result if rng.random() < 0.95 else rng.randint(0, 100)
        return {"prompt": row.pop("prompt"), "completion": str(shown), **row, "result": result}
    reply, tone = rng.choice(question["good"]), rng.random()
    flaw = "rude" if tone < 0.12 else "rambling" if tone < 0.24 else "thinking" if tone < 0.34 else None
    return {"prompt": row.pop("prompt"), "completion": flawed(question, reply, flaw, rng) if flaw else reply, **row}


def needless_thinking(completion: str) -> bool:
    """Whether a think or answer tag stands in it. For greetings, which want a reply and no search."""
    return any(tag in completion for tag in TAGS)


def is_good(completion: str, good: list[str]) -> bool:
    """The rule: one of the good replies, said once, without thinking."""
    return not needless_thinking(completion) and completion.strip() in good


LEVELS = {"tiny world": None}
WEIGHTS = {"preference": 1.0}  # the reward model's score; the rule only watches


def draw(rng: random.Random, level: str, split: str) -> dict:
    return draw_question(rng, split)


def key(problem: dict) -> str:
    return problem["prompt"]


def group(problem: dict) -> str:
    return problem["kind"]


def question(problem: dict, style: str) -> str:
    if style == "base":
        raise ValueError("got general prompts with style 'base', expected tiny or chat: a base prompt asks for thinking")
    return problem["prompt"]


def score(problem: dict, text: str) -> tuple[dict[str, float], str]:
    return {}, "correct" if is_good(text, problem["good"]) else "not good by the rule"


def gold(problem: dict) -> str:
    return problem["good"][0]


def watch(problem: dict, text: str) -> dict[str, float]:
    return {"good": float(is_good(text, problem["good"])), "thinking": float(needless_thinking(text))}


def write_rows(what: str, n: int, seed: int) -> list[dict]:
    """replies: prompts with a good one each. pairs: a good reply and a flawed one. Prompts are words, without a template."""
    rng = random.Random(f"{what}, {seed}")
    questions = [draw_question(rng) for _ in range(n)]
    rows = []
    for question in questions:
        reply = rng.choice(question["good"])
        if what == "replies":
            rows.append({"prompt": question["prompt"], "completion": reply, "kind": question["kind"],
                         "language": question["language"], "source": "general.py"})
        else:
            flaw = rng.choice([f for f in FLAWS if f != ("rude" if question["kind"] == "arithmetic" else "wrong")])
            rows.append({"prompt": question["prompt"], "chosen": reply,
                         "rejected": flawed(question, reply, flaw, rng), "flaw": flaw, "kind": question["kind"]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.general", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("replies", "pairs"))
    parser.add_argument("--n", type=int, default=1000, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="JSONL file to write")
    args = parser.parse_args(arguments)
    from machinery.run_folder import write_whole  # brings torch along, which the corpus does not need
    path = Path(args.out)
    if args.n < 1:
        parser.error(f"got --n {args.n}, expected at least 1")
    if path.exists():
        parser.error(f"got --out {path}, which exists and is never overwritten; name another file or delete it")
    rows = write_rows(args.what, args.n, args.seed)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} {args.what} in {path}")


if __name__ == "__main__":
    main()
