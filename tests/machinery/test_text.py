"""Text and token ids: BOS, the thinking that a template opens, the end of a turn, conversations."""

import json

import pytest
from conftest import CHAT

import corpus
import evaluate
import rejection
import sampling
import sft
import train_countdown
from countdown import fill_template, make_prompt, sample_puzzles
from machinery.checkpoints import end_tokens, load
from machinery.data import read_jsonl
from machinery.text import (continue_prompt, decode, encode_completions, encode_prompts, end_of_turn, opened_thinking)
from rewards import format_reward
from sampling import Completion, complete

OPEN = CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")
CLOSED = CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n\n</think>\n\n{% endif")
WITH_BOS = "<|begin|>" + CHAT


# ------------------------------------------------------------------------------------------------------------------ BOS
@pytest.mark.parametrize("bos, template, style, expected", (
    (True, CHAT, "base", 1), (True, CHAT, "tiny", 1), (False, CHAT, "base", 0),
    (True, CHAT, "chat", 0), (True, WITH_BOS, "chat", 1), (False, WITH_BOS, "chat", 1),
), ids=("base", "tiny", "a tokenizer without", "a template without", "a template with", "the template alone"))
def test_bos_comes_first_and_once(bos, template, style, expected, stranger, monkeypatch):
    """In every script: what complete() samples from, what sft.py trains on. A template brings its own, or wants none."""
    model, tokenizer = load(stranger(bos=bos, template=template))
    bos_id, calls = tokenizer.convert_tokens_to_ids("<|begin|>"), []
    monkeypatch.setattr(sampling, "sample", lambda *args, **settings: calls.append(args[1]) or [
        Completion([5], [0.0], True)])
    complete(model, tokenizer, [fill_template("make 27", style, tokenizer)], style=style, max_new_tokens=1, seed=0)
    rows = [{"prompt": "make 27", "completion": "3*9"}, {"prompt": "make 2", "completion": "<|begin|>"}]
    examples = sft.tokenize(rows[:1], tokenizer, "rows.jsonl", style)
    for ids in (calls[0][0], examples[0][0]):
        assert ids.count(bos_id) == expected and (ids[0] == bos_id) == bool(expected)
    assert bos_id not in examples[0][1]


def test_a_text_that_begins_with_bos_gets_no_second_one(stranger):
    _, tokenizer = load(stranger(bos=True))
    once, = encode_prompts(tokenizer, ["make 27"], "base")
    assert encode_prompts(tokenizer, ["<|begin|>make 27"], "base") == [once]


def test_completions_of_a_sentencepiece_tokenizer_begin_without_a_space():
    """Such a tokenizer puts a space before any text. A completion goes on where its prompt ended, without one."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    pieces = ["<unk>", "</s>", "▁", "\n", *"abc3*9=27<>/", "▁a", "▁3"]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "3")], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("3*9")["input_ids"]) == ["▁3", "*", "9"]
    rows = encode_completions(tokenizer, ["3*9", "a 3", "\nab"])
    assert [tokenizer.convert_ids_to_tokens(row) for row in rows] == [["3", "*", "9"], ["a", "▁3"], ["\n", "a", "b"]]


# ------------------------------------------------------------------------------------------------------------- thinking
@pytest.mark.parametrize("prompt, opened", (
    ("a<think>", "<think>"), ("a<think>\n", "<think>\n"), ("a<think>\n\n ", "<think>\n\n "), ("a", ""),
    ("a<think>\n\n</think>\n\n", ""), ("<think> b", "")))
def test_white_space_behind_the_tag_belongs_to_the_prompt(prompt, opened):
    assert opened_thinking(prompt) == opened


@pytest.mark.parametrize("prompt, completion, rest", (
    ("a<think>", "<think>\nb</think>", "\nb</think>"), ("a<think>\n", "<think>\nb</think>", "b</think>"),
    ("a<think>\n", "<think>b</think>", "b</think>"), ("a<think>\n", "\n<think>\nb</think>", "b</think>"),
    ("a<think>\n", "b</think>", "b</think>"), ("a", "<think>\nb</think>", "<think>\nb</think>"),
    ("a<think>\n\n</think>\n\n", "<think>b</think>", "<think>b</think>")))
def test_a_completion_goes_on_behind_the_tag_that_its_prompt_has(prompt, completion, rest):
    assert continue_prompt(prompt, completion) == rest


def writes(monkeypatch, tokenizer, texts):
    """Every script samples these texts, in turn."""
    def sample(model, prompts, *, eos_ids, **settings):
        rows = [tokenizer(texts[i % len(texts)], add_special_tokens=False)["input_ids"] for i in range(len(prompts))]
        return [Completion([*row, min(eos_ids)], [-1.0] * (len(row) + 1), False) for row in rows]
    monkeypatch.setattr(sampling, "sample", sample)


def solved(n: int) -> list[str]:
    """What a policy behind <think> and a newline writes to solve the first n train puzzles of rejection.py."""
    import countdown
    return [countdown.gold(puzzle).removeprefix("<think>\n") for puzzle in sample_puzzles(n, split="train", seed=0)]


def test_rewards_read_the_tag_that_the_template_opened(stranger, monkeypatch, tmp_path):
    """evaluate, rejection and sft on a template that ends in <think> and a newline: format 100% where it was 0%, every
    completion is kept where none was, and a kept row is trained on as the very tokens that were sampled."""
    directory = stranger(template=OPEN)
    model, tokenizer = load(directory)
    writes(monkeypatch, tokenizer, texts := solved(4))
    table, records = evaluate.evaluate(model, tokenizer, evaluate.Config(n=4, style="chat", max_new_tokens=100))
    assert table["format"] == 1.0 and records[0]["completion"].startswith("<think>\n")

    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["x", "--model", str(directory), "--style", "chat", "--n", "4", "--samples", "1",
                                     "--max-new-tokens", "100", "--out", str(out)])
    rejection.main()
    rows = read_jsonl(out)
    assert len(rows) == 4 and all(format_reward(row["completion"]) == 1.0 for row in rows)
    examples = sft.tokenize(rows, tokenizer, str(out), "chat", end_tokens(model, tokenizer))
    for (prompt, completion), row in zip(examples, rows):
        assert decode(tokenizer, [prompt])[0].endswith("<|assistant|><think>\n")
        assert row["completion"].removeprefix("<think>\n") in texts
        assert decode(tokenizer, [completion])[0] == row["completion"].removeprefix("<think>\n") + "<|end|>"


def test_training_reads_the_tag_too(stranger, monkeypatch, tmp_path, quiet_training):
    directory = stranger(template=OPEN)
    writes(monkeypatch, load(directory)[1], ["1+2\n</think>\n<answer>1+2</answer>", "no"])
    monkeypatch.setattr("sys.argv", ["x", "--model", str(directory), "--style", "chat", "--steps", "1", "--batch-size", "8",
                                     "--group-size", "4", "--max-new-tokens", "60", "--eval-n", "8",
                                     "--out", str(tmp_path / "run")])
    train_countdown.main()
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["format"] == 0.5


def test_a_closed_thinking_block_is_said_and_rewards_read_the_completion_alone(stranger, monkeypatch, capfd):
    directory = stranger(template=CLOSED)
    model, tokenizer = load(directory)
    writes(monkeypatch, tokenizer, ["<answer>1+2</answer>", "<think>\nx\n</think>\n<answer>1+2</answer>"])
    monkeypatch.setattr("sys.argv", ["x", "--model", str(directory), "--style", "chat", "--n", "4"])
    evaluate.main()
    out, said = capfd.readouterr()
    assert "format  50.0%" in out
    assert all(words in said for words in ("note: ", str(directory), "thinking is off", "--weights format=0"))


# ----------------------------------------------------------------------------------------------------- the end of a turn
def test_a_reply_ends_as_the_chat_template_ends_it(stranger, capfd):
    """Where sampling stops at that token; else EOS, and it is said."""
    template = CHAT.replace("<|end|>", "<|eot|>")
    model, tokenizer = load(stranger("stops", template=template, generation_config=dict(eos_token_id=[0, 4])))
    ends = end_tokens(model, tokenizer)
    assert end_of_turn(tokenizer, ends) == 4 and "note" not in capfd.readouterr().err
    (_, completion), = sft.tokenize([{"prompt": "a", "completion": "b"}], tokenizer, "x", "chat", ends)
    assert completion[-1] == 4
    (_, completion), = sft.tokenize([{"prompt": "a", "completion": "b"}], tokenizer, "x", "base", ends)
    assert completion[-1] == tokenizer.eos_token_id == 0
    model, tokenizer = load(stranger("goes on", template=template))
    assert end_of_turn(tokenizer, end_tokens(model, tokenizer)) == 0
    assert "ends a reply with <|eot|>, which is none of the checkpoint's end tokens" in capfd.readouterr().err


def test_an_end_token_that_a_row_has_already_is_not_doubled(stranger):
    _, tokenizer = load(stranger())
    (_, completion), = sft.tokenize([{"prompt": "a", "completion": "b<|end|>"}], tokenizer, "x", "chat")
    assert decode(tokenizer, [completion]) == ["b<|end|>"]


def test_decoding_keeps_every_space(stranger):
    """clean_up_tokenization_spaces, which some checkpoints set, would take them from before a full stop."""
    _, tokenizer = load(stranger(tokenizer_config=dict(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)))
    text = "3 . 5 , ( 2 ) do n't ?"
    assert decode(tokenizer, tokenizer([text])["input_ids"]) == [text]


# ----------------------------------------------------------------------------------------------------------------- notes
@pytest.mark.parametrize("flags, words", (
    (("--style", "tiny"), ("--style tiny", "take --style chat")), (("--style", "chat"), ()),
), ids=("tiny", "chat"))
def test_a_style_that_does_not_fit_a_real_checkpoint_is_said(flags, words, stranger, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(stranger()), "--n", "4", "--max-new-tokens", "8", *flags])
    evaluate.main()
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: --style")]
    assert len(notes) == bool(words) and all(word in notes[0] for word in words)


def test_the_base_style_with_a_tiny_model_is_said_with_the_share_of_unknown_tokens(base, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(base), "--n", "4", "--max-new-tokens", "8", "--style", "base"])
    evaluate.main()
    error = capfd.readouterr().err
    tokenizer, prompt = corpus.build_tokenizer(), make_prompt(sample_puzzles(1, split="test", seed=0)[0], "base")
    ids = tokenizer(prompt)["input_ids"]
    share = ids.count(tokenizer.unk_token_id) / len(ids)
    assert "take --style tiny" in error and f"note: {share:.0%} of the tokens of the prompts are unknown" in error


def test_completions_that_never_end_are_said_once(stranger, monkeypatch, capfd):
    """Two tokens are room for none; greetings and sums, which are asked beside it, do not say it again."""
    monkeypatch.setattr("sys.argv", ["x", "--model", str(stranger()), "--n", "16", "--max-new-tokens", "2", "--style", "chat"])
    evaluate.main()
    lines = [line for line in capfd.readouterr().err.splitlines() if "cut off" in line]
    assert len(lines) == 1
    assert all(words in lines[0] for words in ("all 16 completions", "at 2 tokens", "'<|end|>'", "--max-new-tokens"))


@pytest.mark.parametrize("script, flags", ((train_countdown, ("--max-new-tokens", "64")),
                                           (sft, ("--learning-rate", "1e-3"))),
                         ids=("train_countdown", "sft"))
def test_a_learning_rate_for_tiny_models_is_said_of_a_large_one(script, flags, stranger, monkeypatch, capfd, tmp_path):
    """The default of train_countdown.py is one; what counts as large is patched, for the sake of a quick test."""
    from machinery import notes
    directory = stranger()
    for most, expected in ((1e9, 0), (1e4, 1)):
        monkeypatch.setattr(notes, "TINY_MODEL", most)
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(4)))
        more = ("--data", data, "--eval-rows", "1") if script is sft else ()
        monkeypatch.setattr("sys.argv", ["x", *map(str, ("--model", directory, "--style", "chat", *flags, *more,
                                                         "--out", tmp_path / str(most)))])
        script.start(script.parse_config(script.Config, ""))
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: --learning-rate")]
        assert len(lines) == expected and all("--learning-rate 0.00" in line for line in lines)


def test_a_template_without_a_generation_prompt_or_one_that_refuses_is_said(stranger, monkeypatch, refused, capfd):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(stranger("without", template=CHAT.split("{% if add")[0])), "--style",
                                     "chat", "--n", "4", "--max-new-tokens", "4"])
    evaluate.main()
    assert "knows no add_generation_prompt" in capfd.readouterr().err
    refused(evaluate, "--model", stranger("refuses", template="{{ raise_exception('only system roles') }}"), "--style",
            "chat", says=("chat template refuses", "only system roles"))


def test_all_that_a_tokenizer_puts_first_comes_first(stranger):
    """Two tokens, or one that is not called BOS."""
    from tokenizers import processors
    directory = stranger(bos=True)
    _, tokenizer = load(directory)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|user|> $A", special_tokens=[("<|begin|>", 3), ("<|user|>", 1)])
    assert encode_prompts(tokenizer, ["make 27"], "base") == [tokenizer("make 27")["input_ids"]]
    _, tokenizer = load(stranger("unnamed", bos=True, tokenizer_config=dict(bos_token=None)))
    assert encode_prompts(tokenizer, ["make 27"], "base") == [tokenizer("make 27")["input_ids"]]


def test_no_false_note_of_unknown_tokens(stranger, capfd):
    """An unknown token that is another name of EOS, as of SmolLM2 and GPT-2; no text at all; decomposed letters."""
    from machinery import notes
    notes.said.clear()
    _, tokenizer = load(stranger(tokenizer_config=dict(unk_token="<|end|>")))
    texts = ["a<|end|>b<|end|>", "a\u0308" * 20]
    notes.check_unknown(tokenizer, texts, tokenizer(texts)["input_ids"], "these")
    notes.check_unknown(tokenizer, [], [], "nothing")
    assert "unknown" not in capfd.readouterr().err


def test_a_row_that_the_template_refuses_is_named(stranger):
    _, tokenizer = load(stranger(template="{{ 1 // (messages[0]['content'] | length - 3) }}" + CHAT))
    with pytest.raises(ValueError, match="my.jsonl, row 2: got a conversation .*refuses"):
        sft.tokenize([{"prompt": "four", "completion": "b"}, {"prompt": "two", "completion": "b"}], tokenizer, "my.jsonl", "chat")


def test_a_judge_of_another_family_is_refused(stranger, monkeypatch, refused, tmp_path):
    """It would read the policy's chat markup letter by letter."""
    import preference
    model, tokenizer = load(stranger("judge", template=CHAT.replace("<|user|>", "[user]").replace("<|", "[")))
    preference.save_reward_model(preference.RewardModel(model), tokenizer, tmp_path / "reward")
    task = tmp_path / "ask.jsonl"
    task.write_text("".join(json.dumps({"question": f"is {i} odd?"}) + "\n" for i in range(40)))
    refused(train_countdown, "--model", stranger(), "--style", "chat", "--task", task, "--preference", tmp_path / "reward",
            "--max-new-tokens", 8, "--out", tmp_path / "run", says=("another chat template", "expected the same"))


def test_a_long_question_of_a_file_is_found_before_training(stranger, refused, tmp_path):
    """However rare it is drawn: all rows of a file are looked at."""
    task = tmp_path / "ask.jsonl"
    task.write_text("".join(json.dumps({"question": f"{i}?" if i else "x " * 600, "answer": "1"}) + "\n" for i in range(400)))
    refused(train_countdown, "--model", stranger(), "--style", "base", "--task", task, "--max-new-tokens", 8, "--batch-size",
            4, "--group-size", 4, "--out", tmp_path / "run", says=("got prompts of up to", "context of 512"))


def test_a_reward_that_is_no_number_names_its_task(base, monkeypatch, capfd, tmp_path):
    from machinery.tasks import find_tasks, score_completions
    import countdown
    task, = find_tasks("countdown")
    problem = task.problems(1, "train", 0)[0]
    monkeypatch.setattr(countdown, "score", lambda puzzle, text: ({"accuracy": float("nan"), "format": 0.0}, "no"))
    with pytest.raises(SystemExit):
        score_completions([(task, problem)], ["p"], ["t"], None, "en")
    assert "a reward of nan from task countdown" in capfd.readouterr().err
