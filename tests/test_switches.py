"""Every behaviour of the corpus has a switch, and two corpora that differ in one differ in nothing else; and nothing that
is written, for whatever stage, is of the validation or the test split."""

import random
import re
from collections import Counter

import pytest

import corpus
import countdown
from countdown import Puzzle, split_of
from rewards import TAGS, extract_answer, format_reward, verify
from tasks import arithmetic, code, general
from tasks.general import NEW
from test_corpus import documents, lines_of, paths_of, searches, share, text_of, without_tags

TO_ENGLISH = dict(zip(corpus.WORDS["de"].values(), corpus.WORDS["en"].values()))


# ------------------------------------------------------------------------------------------------------------- switches
def without_verdicts(text: str) -> str:
    text = re.sub(r"^(check|prüfe) .*\n", "", re.sub(r"\?\d+:", ":", text), flags=re.M)
    return re.sub(r"(:.*) (?:yes|no|ja|nein)( \w+)?$", r"\1\2", text, flags=re.M)


def without_reflection(text: str) -> str:
    text = re.sub(r"^(check|prüfe) .*\n", "", re.sub(r"\d+ (?:wait|halt),", "", text), flags=re.M)
    return re.sub(r" (wrong|retry|falsch|nochmal)$", "", text, flags=re.M)


def in_english(text: str) -> str:
    return re.sub(r"[a-zäöü]+", lambda word: TO_ENGLISH.get(word[0], word[0]), text)


def has_subgoals(document) -> bool:
    return "need" in in_english(document["completion"])


def the_first_line_is_all(long, short) -> bool:
    """If it failed. One that works ends the search anyway, and then nothing at all may differ."""
    return lines_of(short) == lines_of(long)[:1] and not re.search(" (yes|ja)$", lines_of(short)[0])


def one_goes_on_where_the_other_ends(a, b) -> bool:
    shorter, longer = sorted((lines_of(a), lines_of(b)), key=len)
    return shorter == longer[:len(shorter)] and len(shorter) < len(longer)


def the_same_until_luck_comes(a, b) -> bool:
    """Which is in the last line of the lucky one, a program's checked on all examples."""
    lucky, plain = paths_of(a), paths_of(b)
    return lucky[:-1] == plain[:len(lucky) - 1] and lines_of(a)[-1] not in lines_of(b)[:len(lucky)]


def the_same_until_a_slip_hides_a_success(right, slipped) -> bool:
    """Then the search goes on."""
    return paths_of(slipped)[:len(paths_of(right))] == paths_of(right)


def of_one_kind(document) -> bool:
    return len({"need" in move for path in paths_of(document) for move in in_english(path).split(".")}) == 1


def tags_of(document) -> list[bool]:
    return [tag in document["completion"] for tag in TAGS]


QUIET = dict(slips=0.0)  # so that a line that works ends the search
SWITCHES = {  # what both corpora are set to; what the second one is set to besides; how documents that differ may differ
    "verification": ({}, dict(verification=False), lambda a, b: without_verdicts(text_of(a)) == text_of(b)),
    "backtracking": (QUIET, dict(backtracking=False), the_first_line_is_all),
    "subgoals": ({}, dict(subgoals=False), lambda a, b: has_subgoals(a) and not has_subgoals(b)),
    "reflection": (dict(slips=0.2), dict(reflection=False), lambda a, b: without_reflection(text_of(a)) == text_of(b)),
    "languages": ({}, dict(languages=False), lambda a, b: in_english(text_of(a)) == text_of(b) and b["language"] == "en"),
    "tags": ({}, dict(tags=0.0), lambda a, b: without_tags(text_of(a)) == without_tags(text_of(b))),
    "luck": (QUIET, dict(luck=0.0), the_same_until_luck_comes),
    "give_up": (QUIET, dict(give_up=0.2), one_goes_on_where_the_other_ends),
    "patience": ({}, dict(patience=1.0), lambda a, b: of_one_kind(b)),
    "wrong_answers": (QUIET, dict(wrong_answers=0.5), lambda a, b: lines_of(a) == lines_of(b)),
    "slips": (QUIET, dict(slips=0.3), the_same_until_a_slip_hides_a_success),
    "pages": ({}, dict(pages=0.3),
              lambda a, b: b["prompt"].endswith(f"\n\n{a['prompt']}") and a["language"] == b["language"]),
}
IN_PROGRAMS_TOO = ("tags", "luck", "give_up", "patience")


@pytest.mark.parametrize("switch", SWITCHES)
def test_two_corpora_that_differ_in_one_switch_differ_in_nothing_else(switch):
    """Document by document, by their text. Small talk and sums stay byte for byte, and for most switches programs."""
    both, changed, may_differ = SWITCHES[switch]
    pairs = list(zip(documents(**both), documents(**both | changed)))
    for a, b in pairs:
        assert a == b or may_differ(a, b), f"{text_of(a)}\n\n{text_of(b)}"
        assert a == b or a["kind"] == "search" or a["kind"] == "program" and switch in IN_PROGRAMS_TOO
        assert switch in ("tags", "pages") or tags_of(a) == tags_of(b)
        assert all(a[name] == b[name] for name in ("kind", "numbers", "target", "function", "examples") if name in a)
    assert 0.03 < share(a != b for a, b in pairs) < 0.9


def test_a_switch_that_is_off_leaves_no_trace():
    signs = {"verification": r"\?\d+:", "subgoals": "need|brauche",
             "languages": "ja|nein|brauche|halt|falsch|nochmal|prüfe",
             "reflection": "wait|halt|wrong|falsch|retry|nochmal|check|prüfe"}
    for switch, sign in signs.items():
        assert share(re.search(sign, document["completion"]) for document in searches(300)) > 0.1
        assert not any(re.search(sign, document["completion"]) for document in searches(300, **{switch: False}))


def test_patience_says_who_is_patient():
    """A document of a corpus of both kinds of writers is one of a corpus of either."""
    for both, hasty, patient in zip(*(documents(patience=patience) for patience in (0.5, 0.0, 1.0))):
        assert both in (hasty, patient)


def test_patience_does_not_say_who_is_lucky():
    """With programs: who begins with an exception (a if x==k else b) had intuition."""
    lucky = [[lines_of(document)[0].startswith(document["function"]) for document in documents(
        1500, chat=0.0, programs=1.0, luck=0.3, patience=patience) if "if" in document["function"]]
        for patience in (0.0, 1.0)]
    assert lucky[0] == lucky[1] and 0.15 < share(lucky[0]) < 0.45


@pytest.mark.parametrize("kind, names", [("chat", ("arithmetic", "small_talk")), ("programs", ("program",))])
def test_a_kind_that_is_left_out_leaves_the_other_documents_as_they_are(kind, names):
    pairs = list(zip(documents(), documents(**{kind: 0.0})))
    assert all(b["kind"] == "search" if a["kind"] in names else a == b for a, b in pairs)
    assert any(a != b for a, b in pairs)


# --------------------------------------------------------------------------------------------------------------- splits
def puzzles_in(prompt: str) -> list[str]:
    """A page has several."""
    return [f"{line}\n" for line in prompt.splitlines() if line.startswith("using")]


def everything_written() -> list[dict]:
    """The corpus, also with pages; few-shot examples; the rows of general prompts for SFT and for the reward model."""
    shots = corpus.examples(random.Random(0), "laptop", 100)
    return [*documents(1500, seed=3, chat=0.3, programs=0.3), *searches(150, pages=1.0),
            *({"prompt": prompt, "completion": text} for prompt, text in shots),
            *general.write_rows("replies", 500, 0), *general.write_rows("pairs", 500, 0)]


def test_everything_that_is_written_is_of_the_train_split_by_key():
    """Puzzles, functions and sums."""
    seen = Counter()
    for row in everything_written():
        for prompt in puzzles_in(row["prompt"]):
            *numbers, target = map(int, re.findall(r"\d+", prompt))
            seen["puzzle", split_of(Puzzle(tuple(numbers), target))] += 1
        if row.get("kind") == "program":
            seen["program", split_of(row["function"])] += 1
        if found := re.search(r"(\d+)([-+*/])(\d+)\?\n", row["prompt"]):
            a, op, b = int(found[1]), found[2], int(found[3])
            seen["sum", split_of(f"{min(a, b)}{op}{max(a, b)}" if op in "+*" else f"{a}{op}{b}")] += 1
    assert seen.keys() == {(kind, "train") for kind in ("puzzle", "program", "sum")} and min(seen.values()) > 300


def test_no_validation_or_test_prompt_of_any_task_is_written():
    """By the letter, over all tasks: a sum that general prompts have for train is no test problem of arithmetic."""
    written = {prompt for row in everything_written() for prompt in (row["prompt"], *puzzles_in(row["prompt"]))}
    for seam, level in ((countdown, "laptop"), (code, "one line"), (general, "tiny world"), (arithmetic, "sums"),
                        (arithmetic, "one-digit")):
        for split in ("validation", "test"):
            rng = random.Random(1)
            asked = {seam.question(seam.draw(rng, level, split), "tiny") for _ in range(500)}
            assert not asked & written, (seam.__name__, split)
    assert not {f"{prompt}\n" for prompts in NEW.values() for prompt in prompts} & written


def test_few_shot_examples_are_right_tidy_and_in_english():
    for prompt, text in corpus.examples(random.Random(1), "laptop", 50):
        *numbers, target = map(int, re.findall(r"\d+", prompt))
        assert verify(extract_answer(text), numbers, target)[0] and format_reward(text)
        assert text == in_english(text) and " wait" not in text
