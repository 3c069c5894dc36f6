"""What users bring: JSONL in the encodings that editors and shells write, text or conversations; refused with file and
line where it is anything else.

A conversation is a list of {"role", "content"}, as OpenAI and TRL write it, in place of a prompt's text; the checkpoint's
chat template makes the prompt of it (countdown.fill_template), whatever --style says. Of {"messages": [...]} each reply of
the assistant is a row of its own, with all that stands before it as its prompt.
"""

import hashlib
import json
import random
from pathlib import Path

from machinery.notes import note

OTHER_FILES = {b"PAR1": "a Parquet file", b"\x1f\x8b": "a gzip archive", b"PK": "a zip archive", b"ARROW1": "an Arrow file",
               b"(\xb5/\xfd": "a zstd archive", b"version https://git-lfs": "a Git LFS pointer (run git lfs pull)"}
READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


# ----------------------------------------------------------------------------------------------------------------- files
def read_text(path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one (what > writes in Windows
    PowerShell 5). Raises ValueError with the file, and the line where it is neither."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"got {path}, but there is no such file")
    content = Path(path).read_bytes()
    for beginning, name in OTHER_FILES.items():
        if content.startswith(beginning):
            raise ValueError(f"got {path}, {name}, expected a text file in UTF-8")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"got {path}, line {line}, which is no {encoding.removesuffix('-sig').upper()} "
                         f"({error.reason}); save the file as UTF-8") from None


def read_jsonl(path) -> list[dict]:
    """Rows of a JSONL file; blank lines at its end are none. Raises ValueError with file and line number at a line that is
    no JSON object."""
    lines = read_text(path).rstrip("\r\n \t").split("\n")  # splitlines() would also part at U+2028, which JSON may hold
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits, too
            array = "; the file looks like one JSON array" if number == 1 and line.lstrip().startswith("[") else ""
            raise ValueError(f"got a broken line in {path}, line {number}: {error or 'too deep'}{array}; "
                             "expected one JSON object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"got {type(row).__name__} in {path}, line {number}; expected a JSON object")
        rows.append(row)
    return rows


def short(error: Exception) -> str:
    """Of another library's error, what fits into our line."""
    return " ".join(str(error).split())[:200]


def beside_scripts(path) -> Path:
    """The path; what is not there, as models/tiny-base in another folder than this repository, beside the scripts."""
    path, here = Path(path), Path(__file__).resolve().parent.parent
    return here / path if not path.exists() and path.parts[:1] == ("models",) else path


def fingerprint(path) -> str:
    """SHA-256 of a file, of all that is read of a model directory or a run's checkpoint; "" if it is not there."""
    path = beside_scripts(path)
    if path.is_dir():
        directory = path / "checkpoint" if (path / "checkpoint").exists() else path
        weights = sorted(directory.glob("*.safetensors"))
        return " ".join(fingerprint(file) for file in (*(directory / name for name in READ), *weights) if file.exists()
                        ) if weights else ""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(state: dict, run) -> None:
    """state: of a checkpoint, with the fingerprints of what the run reads as "inputs". Raises ValueError where one is
    another now: the run would go on with other data."""
    for path, before in state.get("inputs", {}).items():
        if not before:  # a hub id
            continue
        if fingerprint(path) not in (before, ""):  # what is not there any more, its reader says
            raise ValueError(f"got {path}, which is not what it was when {run} began, expected the same content: put it "
                             f"back, or begin a new run from these weights with --model {Path(run) / 'checkpoint'}")


# ------------------------------------------------------------------------------------------------------------------ rows
def check_rows(rows: list[dict], path, fields: tuple[str, ...], expected: str) -> list[dict]:
    """Rows with text in all of these fields, where the first one, the prompt, may be a conversation. Raises ValueError
    with the line number where a field is missing, no text, or empty; a completion may be empty."""
    checked = []
    for number, row in enumerate(rows, 1):
        try:
            checked += one_row(row, fields, expected)
        except ValueError as error:
            raise ValueError(f"got {path}, line {number} {error}") from None
    empty = sum(not row[fields[-1]].strip() for row in checked)
    if empty:
        note(f"{empty:,} of the {len(checked):,} rows of {path} have an empty {fields[-1]}: they teach to end at once")
    return checked


def one_row(row: dict, fields: tuple[str, ...], expected: str) -> list[dict]:
    """-> the row, or the rows that a conversation is."""
    if row.get("tools"):
        raise ValueError("with tools, expected conversations of words alone")
    messages = row.get("messages")
    if messages is not None and fields[1:] == ("completion",) and "completion" not in row:
        rest, turns = {name: value for name, value in row.items() if name != "messages"}, conversation(messages)
        replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"
                   and messages[i].get("weight") != 0 and messages[i].get("train") is not False]
        if not replies or replies[0] == 0:
            raise ValueError("with messages, expected a user's first and an assistant's behind it")
        return [{**rest, "prompt": turns[:i], "completion": turns[i]["content"]} for i in replies]
    row = dict(row)
    if fields[0] not in row and all(isinstance(row.get(name), list) and row[name] for name in fields[1:]):
        row[fields[0]] = row[fields[1]][:-1]  # TRL's implicit prompt: what all replies have before them
        if any(row[name][:-1] != row[fields[0]] for name in fields[1:]):
            raise ValueError(f"whose {' and '.join(fields[1:])} begin differently, expected one conversation up to its "
                             "last message")
        row |= {name: row[name][-1:] for name in fields[1:]}
    for name in fields:
        if isinstance(row.get(name), list):
            turns = conversation(row[name])
            if name == fields[0]:
                row[name] = turns
                continue
            if len(turns) != 1 or turns[0]["role"] != "assistant":
                raise ValueError(f"with {len(turns)} messages in {name}, expected one, of the assistant")
            row[name] = turns[0]["content"]
        if not isinstance(row.get(name), str) or not row[name].strip() and name != "completion":
            words = fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"
            raise ValueError(f"without text in {words}; expected {expected}, or conversations as messages; "
                             f"it has {', '.join(map(str, row)) or 'no field'}")
        check_characters(row[name])
    return [row]


ELSEWHERE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what content does not hold


def conversation(messages) -> list[dict]:
    """[{"role", "content"}, ...] with the content as text."""
    turns = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
            content = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"with a message {str(message)[:60]}, expected role and content, both of them text")
        if message["role"] == "user" and not content.strip():
            raise ValueError("with an empty message of the user, expected text")
        if elsewhere := [name for name in ELSEWHERE if message.get(name)]:
            raise ValueError(f"with {elsewhere[0]} in a message, expected words alone, all of them in content; thinking as "
                             "<think>...</think>")
        check_characters(message["role"] + content)
        turns.append({"role": message["role"], "content": content})
    if not turns:
        raise ValueError("without a message, expected a list of role and content")
    return turns


def check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("with half a character (a lone surrogate, as \\ud83d), expected whole ones") from None


def keep_out(keys: list[str], examples: list, n: int, seed: int) -> tuple[list, list]:
    """-> (n held-out examples or a few more, the rest, shuffled): all with one key are on the same side: a prompt
    (text.prompt_key), or a pair's prompt and replies. A key of more than an eighth of n stays in training, as long as
    there are others."""
    order, rows = list(range(len(examples))), {}
    random.Random(seed).shuffle(order)
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    groups = list(rows)  # each as likely as any other, however many rows it has
    random.Random(seed).shuffle(groups)
    held_out: dict[int, None] = {}
    for group in sorted(groups, key=lambda group: len(rows[group]) > max(1, n // 8)):
        if len(held_out) >= n:
            break
        held_out |= dict.fromkeys(rows[group])
    return [examples[i] for i in held_out], [examples[i] for i in order if i not in held_out]
