"""How searches end, by hand, and the table of two checkpoints."""

import json
import sys

import pytest

from countdown import Puzzle
from experiments import endings

PUZZLE = Puzzle((3, 4, 5), 27)


def completion(*lines, answer="3*(4+5)"):
    return "\n".join(["<think>", *lines, "</think>", f"<answer>{answer}</answer>"])


TRUE, NO = "5+4=9,9 3?27:+12-6*27 yes", "5-4=1,3 1?27:+4-2*3/3 no"


@pytest.mark.parametrize("text, truncated, kind", (
    (completion(NO, TRUE), False, "right"),
    (completion(), False, "right"),                                    # by luck
    (completion(TRUE, answer="3*(4+3)"), False, "wrong answer"),
    (completion(NO, "27/3=9 brauche,5 4?9:+9 ja", answer="(5+4)+3"), False, "wrong answer"),
    (completion("5+4=10,10 3?27:+13-7*27 yes", answer="3*4+5"), False, "false yes"),    # a result
    (completion("3*4=12,12 4?27:+27 yes", answer="3*4+5"), False, "false yes"),         # what is left
    (completion("5*3=15,15 4?27:+19-11*27 yes", answer="(5*3)*4"), False, "false yes"),  # the pair's results
    (completion(TRUE, "5*3=15,15 4?27:+27 yes", answer="(5*3)*4"), False, "false yes"),  # the last one counts
    (completion(NO, answer="3+4+5"), False, "gave up"),
    (completion(NO, answer="3+4+6"), False, "gave up"),
    (completion(NO, answer="3+"), False, "no answer"),
    (completion(NO).replace("</answer>", ""), False, "no answer"),
    ("<think>\n" + "\n".join([NO] * 9), True, "cut off"),
))
def test_an_ending_by_hand(text, truncated, kind):
    assert endings.ending(text, PUZZLE, truncated) == kind


def test_a_circle_is_a_third_of_lines_again():
    lines = [NO, TRUE, "3-4=1"]
    assert endings.in_circles("\n".join([NO, TRUE] * 2)) and not endings.in_circles("\n".join(lines))
    assert not endings.in_circles("\n".join([NO, TRUE, NO])) and not endings.in_circles("")


def test_shares_of_all_endings_sum_to_one(base, tmp_path, monkeypatch, capfd, refused):
    flags = [str(base), "--n", "6", "--samples", "2", "--max-new-tokens", "30", "--json", str(tmp_path / "endings.json")]
    monkeypatch.setattr(sys, "argv", ["endings", *flags])
    endings.main()
    found = json.loads((tmp_path / "endings.json").read_text())[str(base)]
    assert set(found["endings"]) == {"3", "4"} and len(found["right"]) == 6
    for own in found["endings"].values():
        assert sum(own[kind] for kind in endings.ENDINGS) == pytest.approx(1) and own["in circles"] <= own["cut off"]
    assert capfd.readouterr().out.splitlines()[0].startswith("| checkpoint | numbers | right | false yes |")
    refused(endings, *flags, says=("endings.json, which exists and is never overwritten",))
    refused(endings, tmp_path / "none", says=(tmp_path / "none",))
