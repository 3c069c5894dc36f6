"""Between text and token ids: BOS, end of a turn, the thinking that a prompt opens. Every script encodes and decodes here.

A completion begins where its prompt ends. So where a prompt ends in <think>, the tag and white space behind it are the
prompt's, are put back before rewards read the completion, and are taken off the completions that sft.py learns from.
"""

import json
import math
import re
import unicodedata
from pathlib import Path

from countdown import fill_template
from machinery.data import short
from machinery.notes import check_unknown, note
from rewards import END_THINK, THINK

# token ids and the way back are held to tokenizer.json on this text: spaces, digits, other scripts, bytes
PROBE = "Using the numbers 3, 7 and 12, make 40.\n\nLet's see:  (3 + 7) * 4 = 40?\tGröße, 中文 🙂 yes.\n"
TINY_UNKNOWN = "<|unknown|>"  # of the tiny base's tokenizer (corpus.py), and of no other


def encode_prompts(tokenizer, prompts: list[str], style: str | list[str]) -> list[list[int]]:
    """Token ids; style: of all, or of each. What the tokenizer puts first, BOS mostly, comes once; a chat template brings
    its own or wants none, as apply_chat_template(tokenize=True) has it."""
    if not prompts:
        return []
    rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    styles = [style] * len(rows) if isinstance(style, str) else style
    letter, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    first = next((whole[:k] for k in range(len(whole)) if whole[k:k + len(letter)] == letter), [])
    return [row if style == "chat" or row[:len(first)] == first else first + row for row, style in zip(rows, styles)]


def encode_completions(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of what goes on where a prompt ended. A SentencePiece tokenizer puts a space before a text; there is none,
    so it reads the text behind a character that stays a token of its own, and is taken off again."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    letter, behind = tokenizer(["a", "\na"], add_special_tokens=False)["input_ids"]
    if behind[-len(letter):] == letter:
        return rows
    left = list(range(len(texts)))
    for anchor in "\n:=a":
        start, = tokenizer([anchor], add_special_tokens=False)["input_ids"]
        longer = tokenizer([anchor + texts[i] for i in left], add_special_tokens=False)["input_ids"] if left else []
        for i, long in zip(left, longer):
            rows[i] = long[len(start):] if long[:len(start)] == start else rows[i]
        left = [i for i, long in zip(left, longer) if long[:len(start)] != start]
    return rows


def decode(tokenizer, rows: list[list[int]]) -> list[str]:
    """Texts with every space and special token that they have."""
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def read_tokenizer(directory: Path, vocab_size: float = math.inf):
    """As AutoTokenizer reads it, and where that gives other token ids than tokenizer.json itself, or adds tokens of its own
    for which an embedding of vocab_size has no room, as tokenizer.json says."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path, tokenizer_config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        itself = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"got {path}, which this version of tokenizers cannot read ({short(error)}); it may be of a "
                         "newer one, or broken: update transformers, or copy it again") from None
    itself.no_truncation()
    itself.no_padding()
    expected = itself.encode(PROBE, add_special_tokens=False).ids
    problem = ""
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            tokenizer = reader.from_pretrained(directory, trust_remote_code=False)
            ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            own = [name for name, i in tokenizer.get_vocab().items() if i >= vocab_size and itself.token_to_id(name) != i]
            listed = tokenizer_config.read_text(encoding="utf-8") if own and tokenizer_config.exists() else ""
            if invented := [name for name in own if json.dumps(name, ensure_ascii=False) not in listed]:
                problem = problem or f"AutoTokenizer adds {invented[0]}"
                continue
            if ids == expected and decode(tokenizer, [ids])[0] == itself.decode(ids, skip_special_tokens=False):
                if problem:
                    note(f"{directory}: {problem}; its tokenizer.json is used as it is")
                return tokenizer
            problem = problem or (f"AutoTokenizer reads other tokens ({tokenizer.convert_ids_to_tokens(ids)[:4]} ...) than its "
                                  f"tokenizer.json ({tokenizer.convert_ids_to_tokens(expected)[:4]} ...)")
        except Exception as error:  # code of its own, a missing library, a broken field
            problem = problem or f"AutoTokenizer cannot read it ({type(error).__name__}: {short(error)})"
    raise ValueError(f"got a tokenizer in {directory} whose token ids cannot be had: {problem}; expected what "
                     "tokenizer.json says. See tokenizer_class in tokenizer_config.json")


def check_room(tokenizer, prompts: list[str], style: str, max_new_tokens: int, context: int) -> None:
    """Raises ValueError where the longest prompt and a completion are more than the context holds; and check_numbers()."""
    check_numbers(tokenizer, prompts, style)
    longest = max(map(len, encode_prompts(tokenizer, prompts, style)))
    if longest + max_new_tokens > context:
        raise ValueError(f"got prompts of up to {longest} tokens and max_new_tokens {max_new_tokens}, together more than the "
                         f"model's context of {context}; lower --max-new-tokens")


def check_numbers(tokenizer, prompts: list[str], style: str) -> None:
    """Raises ValueError for numbers that a tiny model never read: above 100, and those that its vocabulary lacks."""
    if tokenizer.unk_token == TINY_UNKNOWN and style == "tiny":
        known = tokenizer(list(map(str, range(101))))["input_ids"]
        largest = max(n for n in range(101) if tokenizer.unk_token_id not in known[n])
        asked = max((int(number) for prompt in prompts for number in re.findall("[0-9]{1,9}", prompt)), default=0)
        if asked > largest:
            raise ValueError(f"got a prompt with the number {asked}, but this tiny model read no number above {largest}; "
                             "expected another --level, or another --model")


def opened_thinking(prompt: str) -> str:
    """<think> and the white space behind it, where a prompt ends in them; else ""."""
    match = re.search(rf"{THINK}\s*\Z", prompt)
    return match[0] if match else ""


def continue_prompt(prompt: str, completion: str) -> str:
    """A row's completion without the opening tag that its prompt has already."""
    if not (opened := opened_thinking(prompt)) or not completion.lstrip().startswith(THINK):
        return completion
    return completion.lstrip().removeprefix(THINK).removeprefix(opened.removeprefix(THINK))


def end_of_text(tokenizer, eos_ids: set[int]) -> int:
    """The token that ends a completion in training: the tokenizer's EOS, or, where generate() does not stop at that, one
    at which it does. eos_ids: those; none: the tokenizer's."""
    if not eos_ids or tokenizer.eos_token_id in eos_ids:
        return tokenizer.eos_token_id
    end = min(eos_ids)
    note(f"the tokenizer's EOS is {tokenizer.eos_token}, but the checkpoint's configs end at "
         f"{tokenizer.convert_ids_to_tokens(end)}, as generate() does: completions are taught to end with that")
    return end


def end_of_turn(tokenizer, eos_ids: set[int]) -> int:
    """The token with which the chat template ends a reply, where generate() stops at it; else end_of_text."""
    mark, behind = "a reply", ""
    asked = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
    try:
        _, found, behind = fill_template(asked, tokenizer=tokenizer, reply=False).rpartition(mark)
    except ValueError:  # no template, or one that wants another conversation
        found = ""
    first = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"][:1] if found and behind.strip() else []
    if first and first[0] in eos_ids:
        return first[0]
    if first and first[0] in tokenizer.added_tokens_decoder:
        note(f"the chat template ends a reply with {tokenizer.convert_ids_to_tokens(first[0])}, which is none of the "
             "checkpoint's end tokens: completions may go on behind it. Add it to eos_token_id in "
             "generation_config.json")
    return end_of_text(tokenizer, eos_ids)


def prompt_key(prompt: str | list, style: str, tokenizer) -> str:
    """What makes the prompts of two rows the same: what the model reads, white space aside; of a conversation all before
    its first reply."""
    if isinstance(prompt, list):
        first = next((i for i, turn in enumerate(prompt) if turn["role"] == "assistant"), len(prompt))
        prompt = prompt[:first]
    return " ".join(unicodedata.normalize("NFC", fill_template(prompt, style, tokenizer)).split())


def check_style_fits(model, tokenizer, style: str, eos_ids: set[int]) -> None:
    """Says what looks wrong in the pair of prompt style and checkpoint."""
    tiny = tokenizer.unk_token == TINY_UNKNOWN
    if style == "tiny" and not tiny:
        note(f"--style tiny is the notation of the tiny base, and {model.source} has another vocabulary, of "
             f"{len(tokenizer):,} tokens: unless it was fine-tuned on that notation, take --style "
             f"{'chat' if tokenizer.chat_template else 'base'}")
    if style == "base" and tiny:
        note(f"--style base is for real checkpoints; {model.source} has the tiny base's vocabulary, without most words of "
             "that prompt: take --style tiny")
    if style != "chat":
        return
    prompt = fill_template("question", "chat", tokenizer)
    if prompt.rstrip().endswith(END_THINK):
        note(f"the chat template of {model.source} closes the thinking in the prompt, so thinking is off: rewards read "
             "the completion alone, and the format reward asks for a <think> block that it writes itself. Where it shall "
             "answer directly, take --weights format=0")
    if prompt == fill_template("question", "chat", tokenizer, reply=False):
        note(f"the chat template of {model.source} knows no add_generation_prompt: a completion has to begin the "
             "assistant's turn by itself")
    end_of_turn(tokenizer, eos_ids)


def check_examples(tokenizer, texts: list[tuple], examples: list[tuple], path: str) -> None:
    """texts: (prompt, completion) a row; examples: their ids. Says what cannot teach what it should."""
    unclosed = sum(bool(opened_thinking(prompt)) and END_THINK not in completion for prompt, completion in texts)
    if unclosed:
        note(f"{unclosed:,} of the {len(texts):,} completions of {path} never close the thinking that their prompt opens "
             f"({END_THINK} is missing): they teach to answer inside it")
    check_unknown(tokenizer, ["".join(text) for text in texts], [prompt + end for prompt, end in examples], path)
    unknown = {tokenizer.unk_token_id}
    if only := sum(set(prompt) == unknown or set(completion[:-1]) == unknown for prompt, completion in examples):
        note(f"{only:,} of the {len(texts):,} rows of {path} have a prompt or a completion of unknown tokens alone")
