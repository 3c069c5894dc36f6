"""The room for statistics: known answers by hand, coverage by simulation, and what pairs show that intervals hide."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from machinery import plots, statistics
from machinery.statistics import Estimate, Scores, difference, interval, t_interval, wilson_interval

ROOT = Path(__file__).parent.parent.parent


def runs(*seeds, problems="the same"):
    return [Scores(problems, list(values)) for values in seeds]


@pytest.mark.parametrize("p, n, low, high", (
    (0.5, 100, 0.40383, 0.59617),   # (0.5 + 0.019208 -+ 1.96 sqrt(0.0025 + 0.00009604)) / 1.038416
    (0.0, 10, 0.0, 0.27754),        # z^2 / (n + z^2) = 3.8416 / 13.8416
    (1.0, 10, 0.72246, 1.0),
    (0.9, 512, 0.87096, 0.92308),
))
def test_wilson_interval_by_hand(p, n, low, high):
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96: no point at 0 and 1, and not symmetric near
    them."""
    assert wilson_interval(p, n) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_never_leaves_0_to_1():
    """Not by a rounding either, which would print as -0.0%."""
    bounds = [bound for n in range(1, 1000) for p in (0.0, 1.0) for bound in wilson_interval(p, n)]
    assert min(bounds) == 0 and max(bounds) == 1


def test_student_by_hand():
    """1, 2, 3: sd 1, standard error 1/sqrt(3), 4.303 with two degrees of freedom."""
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == 2 and (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3))
    assert t_interval([2.0, 2.0]) == (2.0, 2.0)
    narrow, wide = t_interval([0.0, 1.0] * 10), t_interval([0.0, 1.0] * 5)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_one_run_has_no_spread():
    with pytest.raises(ValueError, match="got 1 seed, expected at least 2: .*run more seeds"):
        t_interval([0.5])


def test_a_picture_of_a_mean_wants_several_runs(refused, tmp_path):
    refused(plots, "--mean", ROOT / "docs" / "quickstart" / "seed0", "--out", tmp_path / "mean.png",
            says=("got one run a pattern", "expected several"))
    assert not (tmp_path / "mean.png").exists()


def test_of_one_seed_the_interval_is_that_of_a_share():
    """40 of 100: the normal one is 0.4 +- 1.96 sqrt(0.4 * 0.6 / 100) = 0.4 +- 0.096."""
    own = interval(runs([1.0] * 40 + [0.0] * 60))
    assert own.mean == 0.4 and own.seeds == [0.4]
    assert (own.low, own.high) == (pytest.approx(0.304, abs=0.011), pytest.approx(0.496, abs=0.011))


def test_seeds_that_differ_and_problems_that_do_not_leave_student_s_interval():
    """Every problem's score is its seed's: what is left of the bootstrap is t with two degrees of freedom."""
    own = interval(runs(*([value] * 50 for value in (0.1, 0.2, 0.3))))
    low, high = t_interval([0.1, 0.2, 0.3])
    assert own.mean == pytest.approx(0.2) and own.seeds == pytest.approx([0.1, 0.2, 0.3])
    assert own.high - own.low == pytest.approx(high - low, rel=0.15)


@pytest.mark.parametrize("S", (1, 3, 5))
@pytest.mark.parametrize("shared", (True, False))
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(S, shared):
    """Made-up arms: problems of uneven difficulty, seeds that differ by 3 points, one arm 5 points better in truth. Of
    400 such experiments 95% hold the truth, but for chance (three standard errors) or more: both sides of it count the
    noise of single answers. With one seed, whose own luck no interval can know, seeds do not differ."""
    rng, held, N, repeats = np.random.default_rng(0), 0, 80, 400
    for _ in range(repeats):
        arms = [[], []]
        difficulty = rng.uniform(0.2, 0.8, N)
        for s in range(S):
            if not shared:
                difficulty = rng.uniform(0.2, 0.8, N)
            for arm, gain in zip(arms, (0.05, 0.0)):
                chance = difficulty + gain + (rng.normal(0, 0.03) if S > 1 else 0.0)
                arm.append(Scores("same" if shared else f"of {s}", (rng.random(N) < chance).astype(float).tolist()))
        own = difference(*arms, resamples=500)
        held += own.low <= 0.05 <= own.high
    assert held / repeats >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)
    assert S > 1 or held / repeats <= 0.95 + 3 * math.sqrt(0.95 * 0.05 / repeats)


def test_pairs_show_a_difference_that_overlapping_intervals_hide():
    """Of 200 problems both arms solve 100 and fail at 85; the better one solves the other 15."""
    better, worse = [1.0] * 115 + [0.0] * 85, [1.0] * 100 + [0.0] * 100
    assert wilson_interval(0.5, 200)[1] > wilson_interval(0.575, 200)[0]
    own = difference(runs(better), runs(worse))
    assert own.mean == pytest.approx(0.075) and own.verdict() == "better"
    assert difference(runs(worse), runs(better)).verdict() == "worse"


def test_intervals_of_problems_part_where_seeds_do_not_tell_the_arms_apart():
    """1,000 problems: 60% against 50%, far apart as shares of problems; but the seeds gave 80, 60, 40 and 40, 60, 50."""
    def arm(*shares):
        return runs(*([1.0] * round(1000 * share) + [0.0] * round(1000 * (1 - share)) for share in shares))
    a, b = arm(0.8, 0.6, 0.4), arm(0.4, 0.6, 0.5)
    assert wilson_interval(0.6, 1000)[0] > wilson_interval(0.5, 1000)[1]
    assert difference(a, b).verdict() == "not told apart"


def test_a_share_stays_a_share():
    """Two seeds that differ: Student's t with one degree of freedom goes far beyond 1. And nothing seen in 20 problems and
    two seeds leaves Wilson's interval of 20."""
    assert statistics.share(runs([1.0] * 9 + [0.0], [1.0] * 6 + [0.0] * 4)).high == 1
    own = statistics.share(runs([0.0] * 20, [0.0] * 20))
    assert (own.low, own.high) == wilson_interval(0.0, 20)
    own = statistics.share(runs([1.0] * 9 + [0.0]))  # as evaluate.py prints it
    assert (own.low, own.high) == wilson_interval(0.9, 10) and statistics.share(runs([0.5, 1.0])).low == 0.5


def test_equal_arms_are_not_told_apart():
    assert difference(runs([1.0, 0.0]), runs([1.0, 0.0])) == Estimate(0.0, 0.0, 0.0, [0.0])
    assert difference(runs([1.0, 0.0]), runs([1.0, 0.0])).verdict() == "not told apart"


def test_what_cannot_be_compared_is_refused(tmp_path, capsys, monkeypatch):
    one, other = runs([1.0, 0.0]), runs([1.0, 0.0], problems="others")
    with pytest.raises(ValueError, match="got different problems of the arms' runs number 0, expected the same"):
        difference(one, other)
    with pytest.raises(ValueError, match="got 1 and 2 seeds"):
        difference(one, one * 2)
    (tmp_path / "old.json").write_text(json.dumps({"pass@1": 0.5}))
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path / "old.json")])
    with pytest.raises(SystemExit) as stop:
        statistics.main()
    assert stop.value.code == 2 and "old.json without 'right'" in capsys.readouterr().err


def test_files_of_the_evaluator_are_compared(tmp_path, capsys, monkeypatch):
    for name, right in (("a", [4, 4, 2, 0]), ("b", [2, 0, 0, 0])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"problems": "x", "samples": 4, "right": right,
                                                           "tokens": sum(right) * 10}))
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path / "a.json"), "--against", str(tmp_path / "b.json")])
    statistics.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("pass@1 62.5%") and said[1].startswith("pass@1 12.5%")
    assert said[2].startswith("difference +50.0 points (+12.5 to +87.5): better")

    def column(*files):
        monkeypatch.setattr("sys.argv", ["statistics", *(str(tmp_path / f"{file}.json") for file in files), "--column",
                                         "tokens"])
        statistics.main()
    column("a", "b")  # 100 and 20: 60 -+ 12.706 * 80 / sqrt(2) / sqrt(2)
    assert capsys.readouterr().out == "tokens 60 (95% t-interval over seeds -448.2 to 568.2; seeds 100, 20)\n"
    with pytest.raises(SystemExit):
        column("a")
    assert "got 1 seed, expected at least 2" in capsys.readouterr().err
