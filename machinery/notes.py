"""What cannot be right and yet may be meant: counted, said once on stderr, and the work goes on."""

import os
import sys
import unicodedata

from tqdm import tqdm

FEW = 0.03          # share of unknown tokens that is no reason to say anything
TINY_MODEL = 20e6   # parameters; the default learning rates are for models below that
said = set()        # by this script; flags.parse_config empties it


def note(text: str, key: str = "") -> None:
    """Once for each key, which is the text where there is none; under torchrun by the first process."""
    if (key or text) not in said and os.environ.get("RANK", "0") == "0":
        said.add(key or text)
        tqdm.write(f"note: {text}", file=sys.stderr)  # print() would go on in a bar's line


def check_learning_rate(model, learning_rate: float, highest: float) -> None:
    """highest: that a real checkpoint survives."""
    parameters = sum(p.numel() for p in model.parameters())
    if learning_rate > highest and parameters > TINY_MODEL:
        note(f"--learning-rate {learning_rate:g} is for models of about a million parameters, and {model.source} has "
             f"{parameters / 1e6:,.0f} million: take {highest:g} or less")


def check_truncated(completions, ends: list[str]) -> None:
    """All completions cut off: nothing ends, or there is no room to end in."""
    if len(completions) > 1 and all(completion.truncated for completion in completions):
        note(f"all {len(completions)} completions were cut off at {len(completions[0].token_ids)} tokens (truncated 100%); "
             f"none wrote {' or '.join(map(repr, ends))}, which ends one. Raise --max-new-tokens, or see whether another "
             "token ends a turn of this checkpoint (eos_token_id in generation_config.json)", "truncated")


def check_unknown(tokenizer, texts: list[str], rows: list[list[int]], what: str) -> None:
    """The share of tokens that the tokenizer does not know, or, where it has no word for those, of dropped characters."""
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown = None  # a name that says nothing: byte-level tokenizers often give it their EOS
    if not texts:
        return
    if unknown is not None:
        share, counted = sum(row.count(unknown) for row in rows) / max(1, sum(map(len, rows))), "tokens"
    else:
        texts, rows = texts[:256], rows[:256]
        back = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        given = sum(len(unicodedata.normalize("NFC", text)) for text in texts)
        share, counted = 1 - sum(map(len, back)) / max(1, given), "characters"
    if share > FEW:
        note(f"{share:.0%} of the {counted} of {what} are unknown to this checkpoint's tokenizer", f"unknown {what}")
