"""Tasks beside Countdown, each one file behind the seam of machinery/tasks.py."""


def ask(words: str, style: str, what: str = "the answer") -> str:
    """A question as a model of this style wants it: tiny models get the words alone, others are told of the tags."""
    if style == "tiny":
        return f"{words}\n"
    return f"{words} Reason inside <think> </think>, then, on a new line, give {what} inside <answer> </answer>."
