"""What is watched in a chain of thought and never paid: reflection words, backtracks, verifications."""

import pytest

from countdown import count_backtracks, count_verifications
from evaluate import reflection_words
from test_rewards import RIGHT, WELL_FORMED, table


@pytest.mark.parametrize("completion, counts", table(
    (WELL_FORMED, {}, "none"),
    ("<think>9?27 no, wrong,\n3+4=8 wait,7?27 no, Wait! retry</think>", {"wrong": 1, "wait": 2, "retry": 1}, "counted, any case"),
    ("<think>mistake however but error verify evaluate check</think>",
     dict.fromkeys("mistake however but error verify evaluate check".split(), 1), "all of the paper's others"),
    ("<think>8 halt,7 falsch, nochmal, prüfe Überprüfe Überprüfe</think>",
     {"halt": 1, "falsch": 1, "nochmal": 1, "prüfe": 1, "überprüfe": 2}, "German"),
    ("<think>warte, ein Fehler, aber jedoch bewerte</think>",
     dict.fromkeys("warte fehler aber jedoch bewerte".split(), 1), "more German"),
    ("<think>waiting, buttons, checked, terror</think>", {}, "whole words only"),
    ("<think>no</think>\n<answer>wait</answer>", {}, "the answer is no thought"),
    ("check", {"check": 1}, "no tags at all"),
))
def test_reflection_words_are_counted(completion, counts):
    assert reflection_words(completion) == counts


FAIL, WIN, SUBGOAL = "5-4=1,3 1:3+1=4?27 no,3*1=3?27 no,", "4+5=9,9 3:9*3=27?27 yes", "27/3=9 need,5 4:5+4=9?9 ja"
PATH_FAILS, PATH_WINS = (f"26-9=17 need,9 2 1.17{rest}" for rest in ("-9=8 need,2 1?8:+3-1*2/2 no",
                                                                     "+1=18 need,9 2?18:+11-7*18 yes"))


@pytest.mark.parametrize("lines, backtracks", table(
    ([], 0, "nothing tried"),
    ([WIN], 0, "right at once"),
    ([FAIL], 0, "gave up at once: there was no other attempt"),
    ([FAIL, WIN], 1, "one line abandoned"),
    ([FAIL, FAIL, SUBGOAL], 2, "two lines abandoned"),
    ([FAIL, FAIL, FAIL], 2, "two abandoned, then gave up"),
    ([FAIL + " wrong,", FAIL + " nochmal,", WIN], 2, "a remark does not hide the line"),
    ([WIN, FAIL], 0, "a line that succeeded was not abandoned"),
    ([SUBGOAL, FAIL], 0, "nor was one that succeeded in German"),
    ([WIN + " \t", FAIL], 0, "nor one with white space at its end"),
    ([WIN, "check (4+5)*3=27 yes"], 0, "a check is no attempt"),
    ([FAIL, "check (4+5)*3=27 no"], 0, "nor is a check that fails"),
    ([FAIL, "Check: (4+5)*3=27 no."], 0, "nor is one with a colon"),
    ([WIN + ".", FAIL], 0, "nor does a full stop hide a success"),
    ([FAIL, "prüfe (4+5)*3=27 nein", FAIL], 1, "nor is a German one"),
    ([FAIL, "wait", "let me see", WIN], 1, "lines without = are no attempts"),
    ([FAIL, "", "", ""], 0, "nor are empty ones"),
    (["4+5=9 yes and 9*3=26?27 no", WIN], 1, "a yes in the middle is not the line's verdict"),
    ([FAIL + "</think>" + FAIL + "<think>" + WIN], 2, "a tag ends a line"),
    ([PATH_FAILS, PATH_FAILS, PATH_WINS], 2, "a path of two moves is one attempt"),
    ([PATH_WINS, PATH_FAILS], 0, "and one that works was not abandoned"),
    ([PATH_FAILS + " retry", "prüfe ((9*2)-1)+9=26 nein", PATH_WINS], 1, "with a remark, and a check behind it"),
))
def test_backtracks_are_abandoned_lines_with_another_attempt_behind(lines, backtracks):
    text = "\n".join(lines)
    assert count_backtracks(f"<think>\n{text}\n</think>\n<answer>1=1\n2=2</answer>") == backtracks
    assert count_backtracks(f"<think>{text}</think>{RIGHT}") == backtracks
    assert count_backtracks(text) == backtracks


@pytest.mark.parametrize("text, verifications", table(
    ("5-4=1,3 1:3+1=4?27 no,3*1=3?27 nein,", 2, "a verdict in either language"),
    ("3-1=2 wait,3?27 no,", 1, "a slip that was mended before"),
    ("27/3=9 need,5 4:5+4=9?9 yes", 1, "a subgoal is a goal"),
    ("5-4=1,3 1:3+1=4,3*1=3,", 0, "results without a verdict"),
    ("check (5+4)*3=27 yes", 0, "nothing is compared with a goal"),
    ("is 4 the same as 27? no", 0, "prose"),
    ("", 0, "nothing"),
    ("26-9=17 need,9 2 1.17-9=8 need,2 1?8:+3-1*2/2 no\n26-9=17 brauche,9 2 1.17+1=18 brauche,9 2?18:+11-7*18 ja", 2,
     "one a path, however many results are compared"),
    ("5-4=1,3 1?27:+4-2*3/3 no wrong", 1, "with a remark behind it"),
    ("5-4=1,3 1?27:+4-1 wait,2*4 halt,3/3 nein", 1, "slips mended in the middle of it"),
    ("5-4=1,3 1:+4-2*3/3", 0, "only made, not compared"),
    ("5-4=1,3 1?27:+4-2*3/3", 0, "compared, and no verdict written"),
))
def test_verifications_are_results_compared_with_a_goal(text, verifications):
    assert count_verifications(f"<think>\n{text}\n</think>\n<answer>1=1?1 yes</answer>") == verifications
    assert count_verifications(text) == verifications
