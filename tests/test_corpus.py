"""What the tiny base reads: searches line by line, small talk and sums, the tokenizers. Programs: tasks/test_code.py; what
the switches do, and that all of it is of the train split: test_switches.py."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

import corpus
from corpus import MOST_LINES, State, all_paths
from countdown import Puzzle, make_prompt, solve
from rewards import TAGS, extract_answer, format_reward, parse_expression, verify
from tasks.general import SMALL_TALK, needless_thinking

ROOT = Path(corpus.__file__).parent
MOVE = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)( need| brauche)?,([\d ]+)")
RESULT = re.compile(r"([-+*/])(\d+)(?: (?:wait|halt),(\d+))?")  # what was written, and what mended it
LINE = re.compile(r"(.+)\?(\d+):([-+*/\d]+(?: (?:wait|halt),\d+[-+*/\d]*)*) (yes|ja|no|nein)"
                  r"(?: (?:wrong|falsch|retry|nochmal))?")


@lru_cache(maxsize=None)
def documents(n=500, **settings) -> list[dict]:
    return list(corpus.write_corpus(corpus.Config(n=n, **settings)))


def searches(n=500, **settings) -> list[dict]:
    return documents(n, chat=0.0, programs=0.0, **settings)


def puzzle_of(document) -> Puzzle:
    return Puzzle(document["numbers"], document["target"])


def text_of(document) -> str:
    return document["prompt"] + document["completion"]


def without_tags(text: str) -> str:
    return re.sub(r"<think>\n|\n</think>|</?answer>", "", text)


def lines_of(document) -> list[str]:
    """Of the thinking. The answer is the last line, with or without its tags."""
    return without_tags(document["completion"]).splitlines()[:-1]


def paths_of(document) -> list[str]:
    """What stands before each ?goal, and before each guess's checks. Lines that begin with check have neither."""
    return [re.split("[?:]", line)[0] for line in lines_of(document) if ":" in line]


def said_yes(document) -> bool:
    return any(re.search(r" (yes|ja)$", line) for line in lines_of(document))


def is_right(document) -> bool:
    return verify(extract_answer(document["completion"]), *puzzle_of(document))[0]


def share(flags) -> float:
    flags = [bool(flag) for flag in flags]
    return sum(flags) / len(flags)


def value(a: int, op: str, b: int) -> Fraction | None:
    if op == "/":
        return Fraction(a, b) if b else None
    return Fraction({"+": a + b, "-": a - b, "*": a * b}[op])


def follow(path: str, puzzle: Puzzle) -> tuple[list[int], int]:
    """-> the two numbers that are left and what they have to make. Every move is right, and takes what is there."""
    left, goal = sorted(puzzle.numbers), puzzle.target
    for move in path.split("."):
        a, op, b, result, need, shown = MOVE.fullmatch(move).groups()
        a, b, result = int(a), int(b), int(result)
        assert value(a, op, b) == result <= 100
        if need:  # the goal and one of the numbers become another goal
            assert goal in (a, b)
            left.remove(b if goal == a else a)
            goal = result
        else:
            left.remove(a)
            left.remove(b)
            left.append(result)
        left.sort(reverse=True)
        assert left == list(map(int, shown.split()))
    return left, goal


# ------------------------------------------------------------------------------------------------------------- searches
def test_documents_follow_from_seed_and_index_alone():
    """The first 50 of 100 are the 50 of 50, so a longer corpus only goes on."""
    for kinds in ({}, dict(chat=1.0, programs=0.0), dict(chat=0.0, programs=1.0)):
        assert documents(100, seed=1, **kinds)[:50] == documents(50, seed=1, **kinds) != documents(50, seed=2, **kinds)


@pytest.mark.parametrize("level, count, n", [("three", 3, 200), ("four", 4, 200), ("five", 5, 50)])
def test_every_line_is_a_right_path_to_a_pair_and_a_right_verdict(level, count, n):
    """`26-9=17 need,9 2 1.17-9=8 need,2 1?8:+3-1*2/2 no`: all but two numbers are moved away; then + - * / in this order,
    where the result is whole and at most 100, until one of them is the goal."""
    for document in searches(n, level=level, slips=0.0):
        for line in lines_of(document):
            if line.startswith(("check", "prüfe")):
                answer, target = line.split()[1].split("=")
                assert int(target) == document["target"] and verify(answer, *puzzle_of(document))[0]
            else:
                path, goal, results, verdict = LINE.fullmatch(line).groups()
                (a, b), wanted = follow(path, puzzle_of(document))
                assert path.count(".") == count - 3 and int(goal) == wanted
                every = {op: value(a, op, b) for op in "+-*/"}
                every = [(op, int(x)) for op, x in every.items() if x is not None and x.denominator == 1 and x <= 100]
                met = next((i for i, (_, x) in enumerate(every) if x == wanted), None)
                assert [(op, int(x)) for op, x, _ in RESULT.findall(results)] == every[:None if met is None else met + 1]
                assert (verdict in ("yes", "ja")) == (met is not None), line


def test_the_lines_that_a_puzzle_offers_by_hand():
    """5 4 3 for 27. Forwards 5-4=1,3 1 makes at most 4; backwards 27-5=22 is more than 4*3, and 27/5 is not whole."""
    state = State((5, 4, 3), 27, ("5", "4", "3"), "{}")
    forward, backward = ([move.text for path in all_paths(state, kind) for move in path] for kind in (True, False))
    assert forward == ["5+4=9,9 3", "5*4=20,20 3", "5+3=8,8 4", "5*3=15,15 4", "4+3=7,7 5", "4*3=12,12 5"]
    assert backward == ["27/3=9 {need},5 4"]


def test_numbers_are_whole_and_at_most_100():
    """Slips too: the vocabulary has a token for each of them, and for none above."""
    for document in searches(1000, slips=1.0):
        assert max(map(int, re.findall(r"\d+", document["completion"]))) <= 100, document["completion"]


def test_either_kind_of_move_alone_solves_every_puzzle_of_three_numbers():
    """All 2,025. Of four numbers (a few hundred of the 17,147) about 98% forwards and 95% backwards: what is
    missing needs fractions, numbers above 100, or both kinds of move."""
    for count, step, least in ((3, 1, 1.0), (4, 110, 0.91)):
        every = [Puzzle(numbers, target) for numbers in combinations_with_replacement(range(1, 11), count)
                 for target in range(1, 31)][::step]
        starts = [State(tuple(sorted(puzzle.numbers, reverse=True)), puzzle.target, ("",) * count, "")
                  for puzzle in every if solve(*puzzle)]
        for forward in (True, False):
            found = share(any(corpus.works(path[-1].state) for path in all_paths(start, forward)) for start in starts)
            assert least <= found and (found == 1) == (count == 3)


@pytest.mark.parametrize("numbers, target", [((1, 1, 1, 3), 8), ((2, 2, 3, 3), 25)])
def test_every_search_has_a_line(numbers, target):
    """(1+1)*(1+3) and (2+3)*(2+3) have no backward moves: whatever pair they leave is out of reach."""
    config = corpus.Config(patience=1.0, tags=1.0)
    texts = [corpus.write_search(Puzzle(numbers, target), "en", corpus.Draws(seed), config) for seed in range(20)]
    assert all(map(format_reward, texts))


def test_wait_mends_a_slip():
    """Before it stands a wrong result, behind it the right one; a slip that nobody noticed never claims success."""
    mends = unnoticed = 0
    for document in searches(slips=0.3):
        for path, goal, results, verdict in (match.groups() for match in map(LINE.fullmatch, lines_of(document)) if match):
            (a, b), _ = follow(path, puzzle_of(document))
            for op, shown, mended in RESULT.findall(results):
                assert not mended or value(a, op, b) == int(mended) != int(shown)
                mends, unnoticed = mends + bool(mended), unnoticed + (not mended and value(a, op, b) != int(shown))
            assert (verdict in ("yes", "ja")) == ((mended or shown) == goal)
            assert verdict in ("no", "nein") or value(a, op, b) == int(goal)
    assert mends > 2 * unnoticed > 200


@pytest.mark.parametrize("patience", [0.0, 1.0])
def test_a_search_that_said_yes_has_the_right_answer(patience):
    """Through all kinds of moves, slips and checks alike; any other answer is made up of the puzzle's numbers."""
    docs = searches(tags=1.0, wrong_answers=0.0, slips=0.1, patience=patience)
    assert 0.2 < share(map(said_yes, docs)) < 0.8 and all(is_right(document) for document in docs if said_yes(document))
    for document in docs:
        assert format_reward(document["completion"])
        used = parse_expression(extract_answer(document["completion"]))[1]
        assert sorted(used) == sorted(document["numbers"])


def test_a_patient_search_is_depth_first_and_of_one_kind():
    """Who has left a beginning does not come back to it; so a line copies the beginning of the one before."""
    docs = searches(200, level="four", patience=1.0, give_up=0.0, luck=1.0, languages=False)
    assert share(len(paths_of(document)) > 5 for document in docs) > 0.3
    for document in docs:
        paths = [path.split(".") for path in paths_of(document)]
        assert len({"need" in move for path in paths for move in path}) == 1
        first_moves = [path[0] for path in paths]
        entered = [b for a, b in zip([None, *first_moves], first_moves) if a != b]
        assert len(set(entered)) == len(entered) and len(set(map(tuple, paths))) == len(paths)


def test_a_hasty_search_never_repeats_a_line():
    for document in searches(200, patience=0.0, give_up=0.0, luck=0.0, languages=False):
        assert len(set(paths_of(document))) == len(paths_of(document)) > 0


def test_nobody_is_more_patient_than_the_most_lines():
    docs = searches(200, level="four", patience=1.0, give_up=0.0)
    assert max(len(paths_of(document)) for document in docs) == MOST_LINES


def test_giving_up_ends_the_search():
    """At 1 after the first line; at 0 only a line that works ends it."""
    assert {len(paths_of(document)) for document in searches(200, give_up=1.0, patience=0.0)} == {1}
    whole = dict(level="three", give_up=0.0, patience=1.0, slips=0.0, wrong_answers=0.0, tags=1.0)
    assert all(map(is_right, searches(200, **whole)))


def test_luck_is_a_line_that_works():
    once = dict(give_up=1.0, patience=0.0, slips=0.0, wrong_answers=0.0, tags=1.0)
    assert share(map(is_right, searches(300, luck=1.0, **once))) > 0.9
    assert share(map(is_right, searches(300, luck=0.0, **once))) < 0.4


def test_wrong_answers_alone_leave_no_right_one():
    docs = searches(300, wrong_answers=1.0, tags=1.0)
    assert not any(map(is_right, docs)) and share(map(said_yes, docs)) > 0.3


def test_a_page_is_searches_of_one_writer_that_end_in_the_row_s_own():
    """What few-shot prompts look like: prompt, search, an empty line, and so on. One writer closes tags or does not on
    all of the page."""
    sizes, tidy = set(), []
    for document in searches(150, pages=1.0, languages=False):
        page = text_of(document).split("\n\nusing")
        sizes.add(len(page))
        assert document["prompt"].endswith(make_prompt(puzzle_of(document))) and "make" not in document["completion"]
        tidy.append({all(tag in text for tag in TAGS) for text in page})
    assert sizes == set(range(2, 10)) and set(map(len, tidy)) == {1} and 0.5 < share(True in own for own in tidy) < 0.9


# ------------------------------------------------------------------------------------------------- shares, chat and sums
def test_shares_are_those_that_were_asked_for():
    docs = documents(2000, seed=1)
    for kind, expected in (("search", 0.78), ("program", 0.10), ("arithmetic", 0.06), ("small_talk", 0.06)):
        assert share(document["kind"] == kind for document in docs) == pytest.approx(expected, abs=0.02)
    found = [document for document in docs if document["kind"] == "search"]
    for language, expected in (("en", 0.45), ("de", 0.25), ("mixed", 0.30)):
        assert share(document["language"] == language for document in found) == pytest.approx(expected, abs=0.03)
    for docs in (found, [document for document in docs if document["kind"] == "program"]):
        assert share(format_reward(document["completion"]) for document in docs) == pytest.approx(0.70, abs=0.08)
    assert share(len(document["numbers"]) == 3 for document in found) == pytest.approx(0.5, abs=0.03)
    assert 0.2 < share(map(is_right, found)) < 0.6, "a base that is never right cannot learn, one that always is need not"


def test_direct_arithmetic_knows_its_result_and_mostly_replies_it():
    """what is 6/2? -> 3: the result field is exact, 95% of the replies (and a few of the random others) are it."""
    docs = [document for document in documents(2500, chat=1.0, programs=0.0) if document["kind"] == "arithmetic"]
    for document in docs:
        question, expression = re.fullmatch(r"(what is|was ist) (\S+)\?\n", document["prompt"]).groups()
        assert document["language"] == {"what is": "en", "was ist": "de"}[question]
        assert document["result"] == parse_expression(expression)[0] and not needless_thinking(document["completion"])
    assert share(document["completion"] == str(document["result"]) for document in docs) == pytest.approx(0.95, abs=0.02)


def test_small_talk_is_mostly_friendly_and_now_and_then_needlessly_thought_over():
    docs = [document for document in documents(2500, chat=1.0, programs=0.0) if document["kind"] == "small_talk"]
    friendly = (document["completion"] in SMALL_TALK[document["prompt"].strip()][0] for document in docs)
    assert share(friendly) == pytest.approx(0.66, abs=0.05)
    assert share(needless_thinking(document["completion"]) for document in docs) == pytest.approx(0.10, abs=0.03)


# ----------------------------------------------------------------------------------------------------------- tokenizers
@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "digits"])
def tokenizer(request):
    return corpus.build_tokenizer(digits=request.param)


def ids_of(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_tokenizer_reads_and_writes_every_document(tokenizer):
    texts = [text_of(document) for document in (*documents(2000, seed=1), *searches(50, pages=1.0, slips=1.0))]
    ids = ids_of(tokenizer, texts)
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer.batch_decode(ids) == texts


def test_every_row_fits_the_context(tokenizer):
    """2,048 tokens, and the one that ends it: who never gives up writes the longest rows."""
    texts = [text_of(document) for document in searches(200, level="four", patience=1.0, give_up=0.0)]
    texts += [text_of(document) for document in searches(200, level="four", patience=0.0, give_up=0.0, luck=0.0)]
    assert 1200 < max(map(len, ids_of(tokenizer, sorted(texts, key=len)[-40:]))) < 2048


def test_prompt_and_completion_never_share_a_token(tokenizer):
    """Otherwise a sampled completion would begin with a token that pretraining never saw there."""
    whole = ids_of(tokenizer, list(map(text_of, documents())))
    parts = (ids_of(tokenizer, [document[part] for document in documents()]) for part in ("prompt", "completion"))
    assert whole == [prompt + completion for prompt, completion in zip(*parts)]


def test_tags_and_words_are_one_token_each(tokenizer):
    pieces = [*TAGS, "\n", " yes", " nein", " prüfe", "prüfe", " need,", " wait,", "def", " return", *map(str, range(10))]
    assert all(len(row) == 1 for row in ids_of(tokenizer, pieces))


def test_a_number_is_one_token_of_the_one_family_and_its_digits_of_the_other():
    """Nearly every id means another token there, so nothing but text can pass between the two."""
    ours, theirs = corpus.build_tokenizer(), corpus.build_tokenizer(digits=True)
    numbers = list(map(str, range(101)))
    assert [len(row) for row in ids_of(ours, numbers)] == [1] * 101
    assert [len(row) for row in ids_of(theirs, numbers)] == [1] * 10 + [2] * 90 + [3]
    assert not [token for token in theirs.get_vocab() if re.search(r"\d\d", token)]
    same = ours.get_vocab().items() & theirs.get_vocab().items()
    assert {corpus.EOS, corpus.PAD, corpus.UNKNOWN} <= {token for token, _ in same} and len(same) < 6


def test_words_that_it_never_read_are_unknown(tokenizer):
    assert ids_of(tokenizer, [" zebra"]) == [[tokenizer.unk_token_id]]


def test_end_padding_and_unknown_are_three_tokens(tokenizer):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    assert ids_of(tokenizer, [corpus.EOS]) == [[tokenizer.eos_token_id]]


# --------------------------------------------------------------------------------------------------------- command line
def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_command_corpus_writes_the_same_bytes_in_any_process(tmp_path):
    path = tmp_path / "new folder" / "corpus.jsonl"
    assert run("corpus.py", "--n", 60, "--seed", 3, "--no-languages", "--out", path).returncode == 0
    here = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents(60, seed=3, languages=False))
    assert path.read_text(encoding="utf-8") == here


def test_command_corpus_never_overwrites(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        corpus.main(["--n", "3", "--out", str(path)])
    assert stop.value.code == 2 and "exists and is never overwritten" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("flags, says", [
    ("--n 0", "n of at least 1"), ("--tags 1.5", "every share between 0 and 1"), ("--give-up -0.1", "every share"),
    ("--luck nan", "every share"), ("--chat 0.6 --programs 0.5", "got chat 0.6 and programs 0.5, expected at most 1 together"),
    ("--level tinyzero", "got level 'tinyzero', expected one whose numbers go to 10: laptop, three, four, hundred, five"),
    ("--level nowhere", "got level 'nowhere'"), ("--no-surprise", "--no-surprise")])
def test_command_corpus_refuses_senseless_settings(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        corpus.main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error:" in error and says in " ".join(error.split())
