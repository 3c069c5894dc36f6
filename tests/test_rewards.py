"""What each reward pays for, as tables: the text, the score, and why. The cheats are those that policies and people try."""

import doctest
import random
import subprocess
import sys
from pathlib import Path

import pytest

import corpus
import rewards
from countdown import LEVELS, Puzzle, count_backtracks, make_prompt, sample_puzzle, score, solve
from evaluate import is_mixed, reflection_words
from machinery.tasks import find_tasks, score_completions
from rewards import accuracy_reward, extract_answer, format_reward, language_reward, parse_expression, verify
from tasks.general import needless_thinking

NUMBERS, TARGET = (3, 4, 5), 27  # (4+5)*3
RIGHT = "<answer>(4+5)*3</answer>"
WELL_FORMED = f"<think>\n4+5=9,9 3:9*3=27?27 yes\n</think>\n{RIGHT}"


def table(*rows):
    """Rows whose last column is the reason; it becomes the test's name."""
    return [pytest.param(*row[:-1], id=row[-1]) for row in rows]


# ---------------------------------------------------------------------------------------------------------------- the verifier
@pytest.mark.parametrize("expression, numbers, target", table(
    ("(4+5)*3", (3, 4, 5), 27, "9*3"),
    ("(4+5)*3", [5, 4, 3], 27, "the order in the puzzle does not matter"),
    (" ( 4 + 5 )  * 3 ", (3, 4, 5), 27, "spaces between tokens"),
    ("((((4)+5)))*(3)", (3, 4, 5), 27, "needless parentheses"),
    ("2+3*4", (2, 3, 4), 14, "* before +"),
    ("20-8/4", (4, 8, 20), 18, "division before -"),
    ("3-4-5", (3, 4, 5), -6, "minus from the left, not 3-(4-5)"),
    ("3-5+4", (3, 4, 5), 2, "plus after minus from the left, not 3-(5+4)"),
    ("40/5/2", (2, 5, 40), 4, "division from the left, not 40/(5/2)"),
    ("12/3*4", (3, 4, 12), 16, "times after division from the left, not 12/(3*4)"),
    ("(3-5)*(4-6)", (3, 4, 5, 6), 4, "through negatives: -2 times -2"),
    ("8/(3-8/3)", (3, 3, 8, 8), 24, "through fractions: 8 / (1/3)"),
    ("1/49*49", (1, 49, 49), 1, "exact where floats are not: they make it 0.9999999999999999"),
    ("(5-5)*3", (3, 5, 5), 0, "zero may come up and may be the target"),
    ("0+7", (0, 7), 7, "a lone 0 is a number"),
    ("1+" * 99 + "1 ", [1] * 100, 100, "200 characters are still read"),
    ("(" * 20 + "3" + ")" * 20, [3], 3, "20 parentheses deep is still read"),
    ("+".join(["(1)"] * 25), [1] * 25, 25, "25 parentheses side by side are not deep"),
))
def test_verify_accepts_any_exact_way(expression, numbers, target):
    assert verify(expression, numbers, target) == (True, "correct")


@pytest.mark.parametrize("expression, numbers, target, reason", table(
    # wrong, but honest
    ("4*5+3", (3, 4, 5), 27, "value 23 is not 27", "wrong value"),
    ("5/2", (2, 5), 2, "value 5/2 is not 2", "nothing is rounded down"),
    ("2/3", (2, 3), 1, "value 2/3 is not 1", "nothing is rounded up"),
    ("3-5", (3, 5), 2, "value -2 is not 2", "the sign counts"),
    # other numbers than the puzzle's
    ("27", (3, 4, 5), 27, "uses 27 instead of 3 4 5", "the target itself"),
    ("3*9", (3, 4, 5), 27, "uses 3 9 instead of 3 4 5", "an intermediate result as a number"),
    ("3*3*3", (3, 4, 5), 27, "uses 3 3 3 instead of 3 4 5", "one number again and again"),
    ("4+5", (3, 4, 5), 9, "uses 4 5 instead of 3 4 5", "one number left out"),
    ("3+3", (3, 3, 3), 6, "uses 3 3 instead of 3 3 3", "one of three equal numbers left out"),
    ("(4+5)*3+0", (3, 4, 5), 27, "uses 0 3 4 5 instead of 3 4 5", "a zero added"),
    ("(4+5)*3*1", (3, 4, 5), 27, "uses 1 3 4 5 instead of 3 4 5", "a one multiplied"),
    ("34-7", (3, 4, 7), 27, "uses 7 34 instead of 3 4 7", "digits glued together"),
    ("(1+2)/3", (3, 4, 5), 1, "uses 1 2 3 instead of 3 4 5", "the prompt's own example"),
    # other mathematics than + - * / ( )
    ("1.5*4", (1, 4, 5), 6, "expected an operator or the end, got '.'", "a decimal point"),
    ("2**5", (2, 5), 32, "expected a number or '(', got '*'", "a power"),
    ("2^5", (2, 5), 32, "expected an operator or the end, got '^'", "a power written ^"),
    ("7//2", (2, 7), 3, "expected a number or '(', got '/'", "integer division"),
    ("7%4", (4, 7), 3, "expected an operator or the end, got '%'", "a remainder"),
    ("3!", (3,), 6, "expected an operator or the end, got '!'", "a factorial"),
    ("3e1", (1, 3), 30, "expected an operator or the end, got 'e'", "scientific notation"),
    ("0x3+4", (3, 4), 7, "expected an operator or the end, got 'x'", "hexadecimal"),
    ("3_4", (34,), 34, "expected an operator or the end, got '_'", "Python's 3_4"),
    # unary tricks
    ("-3", (3,), -3, "expected a number or '(', got '-'", "a sign"),
    ("+3", (3,), 3, "expected a number or '(', got '+'", "a plus sign"),
    ("-(-3)", (3,), 3, "expected a number or '(', got '-'", "two signs"),
    ("4--3", (3, 4), 7, "expected a number or '(', got '-'", "minus a negative"),
    ("4*-3", (3, 4), -12, "expected a number or '(', got '-'", "times a negative"),
    ("(-3)+4", (3, 4), 1, "expected a number or '(', got '-'", "a sign in parentheses"),
    ("~3", (3,), -4, "expected a number or '(', got '~'", "a bitwise not"),
    # digits that are none, and digits that hide
    ("03+4+5", (3, 4, 5), 12, "leading zero in '03'", "a leading zero"),
    ("00", (0,), 0, "leading zero in '00'", "two zeros"),
    ("\uff13+4+5", (3, 4, 5), 12, "expected a number or '(', got '\uff13'", "a fullwidth 3"),
    ("\u0663+4+5", (3, 4, 5), 12, "expected a number or '(', got '\u0663'", "an Arabic 3"),
    ("3+4+\u0e55", (3, 4, 5), 12, "expected a number or '(', got '\u0e55'", "a Thai 5"),
    ("3\u0663", (33,), 33, "expected an operator or the end, got '\u0663'", "an Arabic 3 behind a plain one"),
    ("3\u00b2+4", (2, 3, 4), 13, "expected an operator or the end, got '\u00b2'", "a superscript 2"),
    ("(4+5)\u00d73", (3, 4, 5), 27, "expected an operator or the end, got '\u00d7'", "a multiplication sign that is no *"),
    ("5\u22124", (4, 5), 1, "expected an operator or the end, got '\u2212'", "a minus that is no -"),
    # implicit multiplication
    ("3(4+5)", (3, 4, 5), 27, "expected an operator or the end, got '('", "a number before parentheses"),
    ("(4+5)3", (3, 4, 5), 27, "expected an operator or the end, got '3'", "a number behind parentheses"),
    ("(4+5)(3)", (3, 4, 5), 27, "expected an operator or the end, got '('", "two parentheses"),
    ("3 4", (3, 4), 34, "expected an operator or the end, got '4'", "two numbers with a space"),
    ("(3 4)", (3, 4), 34, "expected an operator or ')', got '4'", "two numbers with a space in parentheses"),
    # more, or less, than one expression
    ("(4+5)*3=27", (3, 4, 5), 27, "expected an operator or the end, got '='", "an equation"),
    ("=27", (3, 4, 5), 27, "expected a number or '(', got '='", "only the right-hand side"),
    ("(4+5)*3, 3*9", (3, 4, 5), 27, "expected an operator or the end, got ','", "two expressions"),
    ("(4+5)*3 # yes", (3, 4, 5), 27, "expected an operator or the end, got '#'", "a comment"),
    ("(4+5)*\n3", (3, 4, 5), 27, "expected a number or '(', got '\\n'", "a line break is no space"),
    ("", (3, 4, 5), 27, "expected a number or '(', got 'the end'", "nothing"),
    ("   ", (3, 4, 5), 27, "expected a number or '(', got 'the end'", "spaces only"),
    ("", (), 0, "expected a number or '(', got 'the end'", "nothing is not zero"),
    ("()", (), 0, "expected a number or '(', got ')'", "empty parentheses"),
    ("(4+5", (4, 5), 9, "expected an operator or ')', got 'the end'", "a parenthesis left open"),
    ("4+5)", (4, 5), 9, "expected an operator or the end, got ')'", "a parenthesis too many"),
    (")4(", (4,), 4, "expected a number or '(', got ')'", "parentheses the wrong way round"),
    ("4+", (4,), 4, "expected a number or '(', got 'the end'", "an operator at the end"),
    (None, (3, 4, 5), 27, "no single final answer", "no answer was found"),
    # code
    ("__import__('os')", (3, 4, 5), 27, "expected a number or '(', got '_'", "an import"),
    ("max(3,4,5)", (3, 4, 5), 5, "expected a number or '(', got 'm'", "a call"),
    ("x", (3,), 3, "expected a number or '(', got 'x'", "a name"),
    ("the end", (), 0, "expected a number or '(', got 't'", "the parser's own word for the end"),
    # work
    ("3/(5-5)", (3, 5, 5), 0, "division by zero", "division by zero"),
    ("0*(3/0)", (0, 0, 3), 0, "division by zero", "division by zero, then times zero"),
    ("1+" * 99 + "1  ", [1] * 100, 100, "201 characters, at most 200 are read", "201 characters"),
    ("(" * 21 + "3" + ")" * 21, (3,), 3, "parentheses deeper than 20", "21 parentheses deep"),
    ("(" * 5000 + "3" + ")" * 5000, (3,), 3, "10001 characters, at most 200 are read", "thousands of parentheses"),
    ("9" * 1_000_000, (9,), 9, "1000000 characters, at most 200 are read", "a million digits"),
))
def test_verify_refuses_and_says_why(expression, numbers, target, reason):
    assert verify(expression, numbers, target) == (False, reason)


def test_parse_returns_the_value_and_the_numbers_in_order_of_appearance():
    """5 - 3/4 = 17/4"""
    value, used = parse_expression("5-3/4")
    assert (value.numerator, value.denominator) == (17, 4) and used == [5, 3, 4]


def test_parse_raises_value_error():
    with pytest.raises(ValueError, match="leading zero in '07'"):
        parse_expression("(1+07)")


@pytest.mark.parametrize("level", LEVELS)
def test_verify_accepts_whatever_the_solver_finds(level):
    rng = random.Random(1)
    for _ in range(200):
        puzzle = sample_puzzle(rng, level)
        assert verify(solve(*puzzle), *puzzle) == (True, "correct")


# ---------------------------------------------------------------------------------------------------------------- accuracy
COMPLETIONS = table(  # completion, the answer in it, its accuracy for 3 4 5 -> 27, why
    (WELL_FORMED, "(4+5)*3", 1.0, "thinks, then answers"),
    (f"4+5=9, 9*3=27\n{RIGHT}", "(4+5)*3", 1.0, "no think tags: that is for the format reward to mind"),
    (RIGHT, "(4+5)*3", 1.0, "the answer alone"),
    (f"4+5=9</think>\n{RIGHT}", "(4+5)*3", 1.0, "the prompt had opened <think>"),
    (f"<think>a</think>{RIGHT}\n \t\n", "(4+5)*3", 1.0, "white space behind the answer"),
    ("<answer>\n (4+5)*3 \n</answer>", "(4+5)*3", 1.0, "white space inside the answer, at its ends"),
    (f"<think>a</think> hm <think>b</think>{RIGHT}", "(4+5)*3", 1.0, "thinks twice and is done thinking"),
    ("<answer>4*5+3</answer>", "4*5+3", 0.0, "a wrong answer"),
    ("<answer></answer>", "", 0.0, "an empty answer"),
    ("<answer> \n</answer>", "", 0.0, "a blank answer"),
    ("<answer>(4+5)*3=27</answer>", "(4+5)*3=27", 0.0, "an equation is no expression"),
    ("<answer>(1+2)/3</answer>", "(1+2)/3", 0.0, "the prompt's example, copied"),
    ("", None, 0.0, "nothing"),
    (" \n ", None, 0.0, "white space"),
    ("(4+5)*3", None, 0.0, "no tags"),
    (f"{RIGHT}{RIGHT}", None, 0.0, "the right answer twice"),
    (f"<answer>3*9</answer>\n{RIGHT}", None, 0.0, "a list of guesses, the right one last"),
    (f"{RIGHT}\n<answer>3*9</answer>", None, 0.0, "a list of guesses, the right one first"),
    (f"<think>maybe {RIGHT}</think>", None, 0.0, "inside the think block"),
    (f"<think>maybe {RIGHT}</think>\n{RIGHT}", None, 0.0, "inside the think block and behind it"),
    (f"<think>4+5=9\n{RIGHT}", None, 0.0, "the think block was never closed"),
    (f"<think>a</think><think>b\n{RIGHT}", None, 0.0, "a second think block was never closed"),
    (f"<think>{RIGHT}<answer>", None, 0.0, "an answer, then one that is only opened"),
    (f"</answer>{RIGHT}", None, 0.0, "a stray closing tag before"),
    (f"{RIGHT}</answer>", None, 0.0, "a stray closing tag behind"),
    (f"<answer>{RIGHT}</answer>", None, 0.0, "an answer in an answer"),
    (f"<answer>{RIGHT}", None, 0.0, "the tag opened twice"),
    ("<answer>(4+5)*3", None, 0.0, "never closed"),
    ("(4+5)*3</answer>", None, 0.0, "never opened"),
    ("</answer>(4+5)*3<answer>", None, 0.0, "the tags the wrong way round"),
    ("<answer><think>(4+5)*3</think></answer>", None, 0.0, "thinking inside the answer"),
    (f"{RIGHT}</think>", None, 0.0, "</think> comes late"),
    (f"{RIGHT} is right", None, 0.0, "text behind the answer"),
    ("<Answer>(4+5)*3</Answer>", None, 0.0, "tags are lower case"),
    (make_prompt(Puzzle(NUMBERS, TARGET), "base") + f"a</think>\n{RIGHT}", None, 0.0, "the prompt repeated, example and all"),
    ("(" * 5000 + RIGHT + ")" * 5000, None, 0.0, "thousands of parentheses around it"),
    ("<answer>" + "(" * 5000 + "4+5" + ")" * 5000 + "*3</answer>", "(" * 5000 + "4+5" + ")" * 5000 + "*3", 0.0, "and inside it"),
)


@pytest.mark.parametrize("completion, answer, accuracy", COMPLETIONS)
def test_accuracy_pays_the_one_final_answer(completion, answer, accuracy):
    assert extract_answer(completion) == answer
    assert accuracy_reward(completion, NUMBERS, TARGET) == accuracy


# ---------------------------------------------------------------------------------------------------------------- format
@pytest.mark.parametrize("completion, score", table(
    (WELL_FORMED, 1.0, "<think>, text, </think>, newline, <answer>, text, </answer>"),
    ("<think>x</think>\n<answer>y</answer>", 1.0, "right or wrong does not matter"),
    ("<think>x\n\ny</think>\n<answer>y\n</answer>", 1.0, "newlines inside either"),
    (WELL_FORMED + "\n", 1.0, "one newline at the end"),
    (WELL_FORMED + "\n\n", 0.0, "two newlines at the end"),
    (WELL_FORMED + " ", 0.0, "a space at the end"),
    (WELL_FORMED + " done", 0.0, "text at the end"),
    ("\n" + WELL_FORMED, 0.0, "a newline at the start"),
    ("sure! " + WELL_FORMED, 0.0, "text at the start"),
    ("<think>x</think><answer>y</answer>", 0.0, "no newline between the blocks"),
    ("<think>x</think>\n\n<answer>y</answer>", 0.0, "two newlines between the blocks"),
    ("<think>x</think> \n<answer>y</answer>", 0.0, "a space between the blocks"),
    ("<think>x</think>\nso\n<answer>y</answer>", 0.0, "text between the blocks"),
    ("<think></think>\n<answer>y</answer>", 0.0, "no thought"),
    ("<think>\n \n</think>\n<answer>y</answer>", 0.0, "a blank thought"),
    ("<think>x</think>\n<answer></answer>", 0.0, "no answer"),
    ("<think>x</think>\n<answer> </answer>", 0.0, "a blank answer"),
    ("x</think>\n<answer>y</answer>", 0.0, "<think> is missing"),
    ("<think>x\n<answer>y</answer>", 0.0, "</think> is missing"),
    ("<think>x</think>\ny</answer>", 0.0, "<answer> is missing"),
    ("<think>x</think>\n<answer>y", 0.0, "</answer> is missing"),
    ("<answer>y</answer>\n<think>x</think>", 0.0, "the blocks the wrong way round"),
    ("x<think></think>\n<answer>y</answer>", 0.0, "the thought stands before its tag"),
    ("<think>x</think>\n<answer></answer>y", 0.0, "the answer stands behind its tag"),
    ("<think>x<think></think>\n<answer>y</answer>", 0.0, "<think> twice"),
    ("<think>x</think></think>\n<answer>y</answer>", 0.0, "</think> twice"),
    ("<think>x<answer></think>\n<answer>y</answer>", 0.0, "<answer> twice"),
    ("<think>x</answer></think>\n<answer>y</answer>", 0.0, "</answer> twice"),
    ("<THINK>x</THINK>\n<ANSWER>y</ANSWER>", 0.0, "tags are lower case"),
    ("", 0.0, "nothing"),
))
def test_format_pays_only_the_whole_pattern(completion, score):
    assert format_reward(completion) == score


@pytest.mark.parametrize("completion, needless", table(
    ("hello, how can i help you?", False, "a reply"),
    ("i think < you", False, "the word, not the tag"),
    ("", False, "nothing"),
    ("<think>hello wait</think>\n<answer>hello</answer>", True, "a search where a reply was wanted"),
    ("<think>hello", True, "<think> alone"),
    ("</think>hello", True, "</think> alone"),
    ("<answer>hello", True, "<answer> alone"),
    ("hello</answer>", True, "</answer> alone"),
))
def test_needless_thinking_is_any_tag(completion, needless):
    assert needless_thinking(completion) is needless


# ---------------------------------------------------------------------------------------------------------------- language
@pytest.mark.parametrize("completion, english, german, mixed", table(
    ("<think>5-4=1?27 no, wrong,\n9*3=27?27 yes</think>\n<answer>9*3</answer>", 1.0, 0.0, False, "no wrong yes"),
    ("<think>5-4=1?27 nein, falsch,\n9*3=27?27 ja</think>\n<answer>9*3</answer>", 0.0, 1.0, False, "nein falsch ja"),
    ("<think>4=4?27 no,5=5?27 nein,6=6?27 no,27=27?27 yes</think>", 0.75, 0.25, True, "three of four words are English"),
    ("<think>NO Nein PRÜFE</think>", 1 / 3, 2 / 3, True, "upper case too, umlauts too"),
    ("<think>4+5=9, 9*3=27</think>\n<answer>(4+5)*3</answer>", 1.0, 1.0, False, "no words: nothing was mixed"),
    ("", 1.0, 1.0, False, "nothing at all"),
    ("<think>was die an in so war</think>", 1.0, 1.0, False, "words of both languages count for neither"),
    ("<think>no, donc zut voilà, blorp</think>", 1.0, 0.0, False, "words of neither are not counted"),
    ("<think>n o n e i n, nothingno, xnein, no2</think>", 1.0, 0.0, False, "whole words, of which only no is known"),
    ("<think>no</think>\n<answer>nein nein</answer>", 1.0, 0.0, False, "the answer is no thought"),
    ("<think>no</think> nein nein nein <answer>1</answer>", 0.25, 0.75, True, "thinking on behind </think> hides nothing"),
    ("nein <think>no</think>\n<answer>1</answer>", 0.5, 0.5, True, "nor does thinking before <think>"),
    ("<answer>nein</answer>", 1.0, 1.0, False, "an answer without a thought"),
    ("<answer>a</answer> nein <answer>b</answer>", 0.0, 1.0, False, "nor between two answers"),
    ("no nein <answer>ja</answer>", 0.5, 0.5, True, "no think tags: what stands before the answer"),
    ("no nein nein nein", 0.25, 0.75, True, "no tags at all: everything"),
    ("no</think>nein", 0.5, 0.5, True, "a tag parts words"),
    ("<think>First, I try the two numbers that are left. However, this does not make the target, so we need another way.</think>",
     1.0, 0.0, False, "plain English"),
    ("<think>Zuerst versuche ich die zwei Zahlen, das ergibt aber nicht das Ziel, also brauche ich noch eine andere.</think>",
     0.0, 1.0, False, "plain German"),
))
def test_language_reward_is_the_share_of_known_words(completion, english, german, mixed):
    assert language_reward(completion, "en") == language_reward(completion) == pytest.approx(english)
    assert language_reward(completion, "de") == pytest.approx(german)
    assert is_mixed(completion) is mixed


def test_a_word_of_both_languages_counts_for_neither():
    assert not rewards.ONLY_IN["en"] & rewards.ONLY_IN["de"]
    for word in "was die an in so war also man hat am will her all bin fast".split():
        assert word not in rewards.ONLY_IN["en"] | rewards.ONLY_IN["de"], f"{word} is written alike in both languages"


@pytest.mark.parametrize("language", corpus.WORDS)
def test_every_word_of_the_corpus_is_known_to_its_language(language):
    other = "de" if language == "en" else "en"
    for word in corpus.WORDS[language].values():
        assert language_reward(f"<think>{word}</think>", language) == 1.0, word
        assert language_reward(f"<think>{word}</think>", other) == 0.0, word


def test_language_reward_agrees_with_the_language_that_the_corpus_wrote():
    """English and German searches are pure; a mixed one draws a language for every word, so most come out mixed."""
    documents = [d for d in corpus.write_corpus(corpus.Config(n=600, seed=2, chat=0)) if d["kind"] == "search"]
    for document in documents:
        if document["language"] in ("en", "de"):
            assert language_reward(document["completion"], document["language"]) == 1.0
            assert not is_mixed(document["completion"])
    mixed = [is_mixed(d["completion"]) for d in documents if d["language"] == "mixed"]
    assert sum(mixed) / len(mixed) > 0.6


def test_language_without_a_word_list_is_refused():
    with pytest.raises(ValueError, match="got language 'fr', expected en or de"):
        language_reward("oui", "fr")


# ---------------------------------------------------------------------------------------------------------------- the sum
def scored(completion: str, weights: str = "", language: str = "en"):
    drawn = [(find_tasks("countdown", weights=weights)[0], Puzzle(NUMBERS, TARGET))]
    return score_completions(drawn, [""], [completion], None, language)[0]


@pytest.mark.parametrize("completion, accuracy, format_, language, total", table(
    (WELL_FORMED, 1.0, 1.0, 1.0, 1.6, "1 + 0.1*1 + 0.5*1"),
    (f"<think>9?27 no, nein, nein, nein,</think>\n{RIGHT}", 1.0, 1.0, 0.25, 1.225, "1 + 0.1*1 + 0.5*0.25"),
    ("<think>no</think>\n<answer>3*9</answer>", 0.0, 1.0, 1.0, 0.6, "0 + 0.1*1 + 0.5*1"),
    (f"nein {RIGHT}", 1.0, 0.0, 0.0, 1.0, "1 + 0.1*0 + 0.5*0"),
    ("nein", 0.0, 0.0, 0.0, 0.0, "nothing earned"),
))
def test_reward_is_the_weighted_sum_of_its_parts(completion, accuracy, format_, language, total):
    reward, parts, *_ = scored(completion, "format=0.1,language=0.5")
    assert parts == {"accuracy": accuracy, "format": format_, "language": language} and reward == pytest.approx(total)


def test_reward_by_default_is_accuracy_and_a_fifth_of_format():
    assert scored(f"<think>nein</think>\n{RIGHT}").reward == pytest.approx(1.2)
    assert scored("<think>nein</think>\n<answer>3*9</answer>").reward == pytest.approx(0.2)


def test_reward_measures_the_language_it_is_told():
    assert scored(f"<think>nein</think>\n{RIGHT}", "language=1", "de").reward == pytest.approx(2.2)


# ------------------------------------------------------------------------------------------------------------- any string at all
@pytest.mark.parametrize("text", table(
    ("", "nothing"),
    ("\0\x1b\x7f", "control characters"),
    ("\ud800\udfff", "lone surrogates"),
    ("=\n=\x1c=\u2028=", "every kind of line end"),
    ("\u0327\u0301" * 1000, "combining marks without letters"),
    ("<answer>" * 125_000, "a million characters of <answer>"),
    ("<think>" * 70_000 + "</think>" * 70_000, "a million characters of nested thinking"),
    ("<think>" + "wait " * 200_000, "a million characters of waiting"),
    ("4=4\n" * 250_000, "a million characters of attempts"),
    ("a" * 1_000_000, "a word of a million letters"),
    (" " * 1_000_000, "a million spaces"),
    ("<answer>" + "(" * 1_000_000 + "</answer>", "a million parentheses"),
    ("<answer>" + "1+" * 500_000 + "1</answer>", "a sum of half a million ones"),
))
def test_every_reward_takes_any_string(text):
    parts = scored(text).parts
    assert parts["accuracy"] == parts["format"] == 0.0 and 0.0 <= parts["language"] <= 1.0
    assert isinstance(is_mixed(text), bool) and isinstance(needless_thinking(text), bool)
    assert isinstance(reflection_words(text), dict) and count_backtracks(text) >= 0


def test_random_soup_of_tags_and_symbols_never_raises():
    """And where the accuracy is 1, the text holds the right answer exactly once: a second road to 1 would show up here."""
    rng = random.Random(0)
    pieces = [*rewards.TAGS, "\n", " ", "(4+5)*3", "4*5+3", "(", ")", "*", "3", "yes", "nein", "=", RIGHT]
    paid = 0
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        parts, _ = score(Puzzle(NUMBERS, TARGET), text)
        paid += parts["accuracy"] == 1.0
        if parts["accuracy"] or parts["format"]:
            assert text.count("<answer>") == text.count("</answer>") == 1 and text.rstrip().endswith("</answer>")
        count_backtracks(text), reflection_words(text), is_mixed(text)
    assert paid > 50


def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(rewards)
    assert result.attempted >= 3 and result.failed == 0


def test_rewards_and_countdown_load_without_torch():
    code = "import sys, rewards, countdown, corpus; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(rewards.__file__).parent).returncode == 0
