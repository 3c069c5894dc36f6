"""Rewards: text -> number, by rules alone. No network judges here: a learnt judge is one that a policy learns to fool.

DeepSeek-R1 (arXiv 2501.12948), section 2.2.2: R1-Zero is rewarded for accuracy and for format, nothing else. Section
2.3.2: R1 adds the share of the chain of thought (CoT) that is in the target language. What is paid is the parts' weighted
sum: countdown.WEIGHTS, machinery/tasks.py.

    >>> verify("(4+5)*3", numbers=[3, 4, 5], target=27)
    (True, 'correct')
    >>> verify("4*5+3", [3, 4, 5], 27)
    (False, 'value 23 is not 27')
    >>> format_reward("<think>4+5=9, 9*3=27 yes</think>\\n<answer>(4+5)*3</answer>")
    1.0

The text comes from a policy that is paid to find our mistakes. So an answer is parsed, never evaluated; every reward
takes any string at all and returns a number, in time that grows no faster than the text; and what is refused is refused
with a reason.

Where we differ from the paper: it weights accuracy and format alike; we weight format 0.2, so that neat tags are no
rival to a right answer. Its language reward counts all words; ours counts those that it knows to be English or German,
for "5-4=1" is neither. Both lists are below, to read and to extend.

No torch in here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_LENGTH = 200  # characters of an answer; six numbers with every parenthesis need about 40
MAX_DEPTH = 20    # parentheses inside parentheses; an expression over n numbers never needs more than n - 2


# ------------------------------------------------------------------------------------------------------------- accuracy
def extract_answer(completion: str) -> str | None:
    """The one final <answer>, without the white space around it; None if there is not exactly one.

    Final means that the thinking is over (no <think> is still open before it, so a missing </think> costs the answer
    too) and that only white space follows it. One means that no other <answer> or </answer> stands anywhere: a policy
    that may answer twice learns to list guesses. Think tags are not required, for format has its own reward. An empty
    answer comes back as "", and verify refuses it."""
    before, _, rest = completion.partition(ANSWER)
    answer, closing, after = rest.partition(END_ANSWER)
    if not closing or after.strip() or END_ANSWER in before:  # where nothing opened, nothing is left to close
        return None
    if before.rfind(THINK) > before.rfind(END_THINK) or any(tag in answer for tag in TAGS):
        return None
    return answer.strip()


def answer_or_text(completion: str) -> str:
    """The final answer, or where no tag stands at all the whole completion: a model may answer directly. "" for neither."""
    return ((extract_answer(completion) or "") if any(tag in completion for tag in TAGS) else completion).strip()


def parse_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers in it in order. Raises ValueError with the reason.

        expression = product (("+" | "-") product)*
        product    = factor (("*" | "/") factor)*
        factor     = digits | "(" expression ")"

    One function per rule, and that is the whole language: no signs, powers, decimals, names or "= 27". Spaces may part
    tokens. Text longer than MAX_LENGTH is refused unread, parentheses deeper than MAX_DEPTH when met, so the recursion
    is bounded."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{len(text)} characters, at most {MAX_LENGTH} are read")
    tokens = re.findall(r"[0-9]+|[^ ]", text)  # not \d, which takes Thai digits too
    tokens = ["the end", *reversed(tokens)]  # tokens[-1] is next
    numbers: list[int] = []

    def expression(depth: int) -> Fraction:
        value = product(depth)
        while tokens[-1] in ("+", "-"):
            operator, right = tokens.pop(), product(depth)
            value = value + right if operator == "+" else value - right
        return value

    def product(depth: int) -> Fraction:
        value = factor(depth)
        while tokens[-1] in ("*", "/"):
            operator, right = tokens.pop(), factor(depth)
            if operator == "/" and right == 0:
                raise ValueError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def factor(depth: int) -> Fraction:
        token = tokens.pop()
        if token == "(":
            if depth == MAX_DEPTH:
                raise ValueError(f"parentheses deeper than {MAX_DEPTH}")
            value = expression(depth + 1)
            if (token := tokens.pop()) != ")":
                raise ValueError(f"expected an operator or ')', got {token!r}")
            return value
        if token[0] not in "0123456789":
            raise ValueError(f"expected a number or '(', got {token!r}")
        if token[0] == "0" and token != "0":
            raise ValueError(f"leading zero in {token!r}")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    value = expression(0)
    if tokens != ["the end"]:
        raise ValueError(f"expected an operator or the end, got {tokens[-1]!r}")
    return value, numbers


def verify(expression: str | None, numbers: Sequence[int], target: int) -> tuple[bool, str]:
    """Whether the expression uses each of the numbers exactly once and has exactly the target's value, and the reason.

    Any way there is welcome, also through negatives and fractions: 8/(3-8/3) is 24. None stands for an answer that was
    not found."""
    if expression is None:
        return False, "no single final answer"
    try:
        value, used = parse_expression(expression)
    except ValueError as error:
        return False, str(error)
    if sorted(used) != sorted(numbers):
        return False, f"uses {' '.join(map(str, sorted(used)))} instead of {' '.join(map(str, sorted(numbers)))}"
    if value != target:
        return False, f"value {value} is not {target}"
    return True, "correct"


def accuracy_reward(completion: str, numbers: Sequence[int], target: int) -> float:
    """1.0 if the one final answer is correct, else 0.0; nothing between. verify(extract_answer(...), ...) says why."""
    correct, _ = verify(extract_answer(completion), numbers, target)
    return float(correct)


# --------------------------------------------------------------------------------------------------------------- format
def format_reward(completion: str) -> float:
    """1.0 iff the whole completion is <think>...</think>, one newline, <answer>...</answer>, each tag once; else 0.0.

    Neither "..." may be empty or only white space; each may hold newlines. Nothing may stand before <think>, and
    nothing behind </answer> except one newline, which some checkpoints write before they stop. Whether the answer is
    right does not matter here."""
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    think, separator, answer = completion.removesuffix("\n").partition(f"{END_THINK}\n{ANSWER}")
    in_place = separator and think.startswith(THINK) and answer.endswith(END_ANSWER)
    return float(bool(in_place and think.removeprefix(THINK).strip() and answer.removesuffix(END_ANSWER).strip()))


# ------------------------------------------------------------------------------------------------------------- language
REFLECTION_WORDS = {  # the English ones are those that the paper counts over the training of R1-Zero
    "en": frozenset("wait mistake however but retry error verify wrong evaluate check".split()),
    "de": frozenset("halt warte fehler jedoch aber nochmal überprüfe überprüfen prüfe prüfen falsch bewerte "
                    "bewerten".split()),
}
COMMON_WORDS = {  # a word of both languages (was, die, an, in, so, war) stands in both lists and counts for neither
    "en": REFLECTION_WORDS["en"] | frozenset("""
        yes no need the of to and or if then than because when which what where how who why it its is are be been being
        have has had do does did can could would should shall may might must you your he she they them we us our my me
        that this there here with without for from by as at on not only first second next last one two three try trying
        using use make makes get gives number numbers target left right close equals equal answer think know now again
        too more less other each both let okay
        was die an in so war also man hat am will her all bin fast plus minus""".split()),
    "de": REFLECTION_WORDS["de"] | frozenset("""
        ja nein brauche brauchen der das den dem ein eine einen einem einer und oder wenn dann weil dass ob wie wo wer
        warum es ist sind sein habe haben hatte kann können könnte wird werden würde soll sollte muss müssen du ihr sie
        er ich wir uns mir mich dir dein mein diese dieser dieses hier da dort mit ohne für von vom zu zum zur bei nach
        aus auf über unter nicht nur noch schon erste zweite eins zwei drei versuche versuchen benutze nehme mache
        ergibt gibt zahl zahlen ziel gleich antwort jetzt wieder auch mehr weniger andere jede beide mal geteilt richtig
        zuerst als sehr gut
        was die an in so war also man hat am will her all bin fast plus minus""".split()),
}
ONLY_IN = {"en": COMMON_WORDS["en"] - COMMON_WORDS["de"], "de": COMMON_WORDS["de"] - COMMON_WORDS["en"]}
WORD = re.compile(r"[^\W\d_]{2,}")  # a run of letters; a single letter is more often a variable than a word


def chain_of_thought(completion: str) -> str:
    """What is said before the answer: all up to the last <answer>, or all if there is none; each tag becomes a newline.

    In a well-formed completion this is the inside of the think block. In any other it is the same text and whatever
    stands around the block, so closing </think> early and thinking on outside hides nothing from the rewards and counts
    below."""
    before, tag, rest = completion.rpartition(ANSWER)
    text = before if tag else rest
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return text


def language_counts(completion: str) -> dict[str, int]:
    """How many words of the CoT are only English and only German. Unknown words and those of both do not count."""
    words = Counter(WORD.findall(chain_of_thought(completion).lower()))
    return {language: sum(n for word, n in words.items() if word in known) for language, known in ONLY_IN.items()}


def language_reward(completion: str, language: str = "en") -> float:
    """Share of the CoT's counted words that are of the target language, in [0, 1] (section 2.3.2).

    1.0 where nothing was counted: a CoT of sums alone mixes nothing, and a reward for adding words would be paid for
    decoration. Raises ValueError for a language without a word list."""
    if language not in ONLY_IN:
        raise ValueError(f"got language {language!r}, expected {' or '.join(ONLY_IN)}; "
                         "a new one needs its list in COMMON_WORDS")
    counts = language_counts(completion)
    return counts[language] / sum(counts.values()) if any(counts.values()) else 1.0
