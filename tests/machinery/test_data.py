"""What users bring as data: encodings, conversations, what is refused, what is counted."""

import json
import shutil
import sys

import pytest

import preference
import sft
import train_countdown
from machinery.checkpoints import end_tokens, load
from machinery.data import check_rows, check_unchanged, fingerprint, keep_out, read_jsonl
from machinery.run_folder import append_jsonl, load_checkpoint
from machinery.tasks import find_tasks
from machinery.text import decode, prompt_key

ROWS = [{"prompt": "Größe\u2028?", "completion": "ja"}, {"prompt": "b", "completion": ""}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
PAIR = ("prompt", "completion")
USER, REPLY, AGAIN = ({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))


# ------------------------------------------------------------------------------------------------------------- encodings
@pytest.mark.parametrize("content", (
    TEXT.encode(), b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), TEXT.encode() + b"\n\n \r\n\t\n",
    TEXT.encode("utf-16"), b"\xfe\xff" + TEXT.replace("\n", "\r\n").encode("utf-16-be"),
), ids=("plain", "BOM", "CRLF", "blank lines at the end", "UTF-16", "UTF-16 of PowerShell, big end first"))
def test_what_editors_and_shells_write_is_read(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert read_jsonl(tmp_path / "rows.jsonl") == ROWS


@pytest.mark.parametrize("content, says", (
    (b'{"a": 1}\n{"a": "\xe4"}\n', "rows.jsonl, line 2, which is no UTF-8"),
    (TEXT.encode("utf-16-le"), "rows.jsonl, line 1"),
    (b'[\n{"a": 1}\n]', "line 1: .*; the file looks like one JSON array; expected one JSON object a line"),
    (b'{"a": 1}\n\n{"a": 1}\n', "rows.jsonl, line 2: .*; expected one JSON object a line"),
    (b'prompt,completion\nhi,hello\n', "rows.jsonl, line 1: .*; expected one JSON object a line"),
    (b'{"a": 1} {"a": 2}', "rows.jsonl, line 1: .*; expected one JSON object a line"),
    (b'{"a": 1}\n"text"', "got str in .*rows.jsonl, line 2; expected a JSON object"),
    (b'{"a": ' + b"1" * 5000 + b"}", "rows.jsonl, line 1: .*expected one JSON object a line"), (b"[" * 100_000, "rows.jsonl, line 1: .*expected one JSON object a line"),
    (b"PAR1\x15\x04", "rows.jsonl, a Parquet file, expected a text file"),
    (b"\x1f\x8b\x08\x00", "rows.jsonl, a gzip archive"), (b"PK\x03\x04", "rows.jsonl, a zip archive"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "rows.jsonl, a Git LFS pointer"),
), ids=("Latin-1", "UTF-16 without a mark", "an array", "a blank line inside", "CSV", "two objects a line", "no object",
        "a long number", "too deep", "Parquet", "gzip", "zip", "LFS"))
def test_anything_else_is_refused_with_its_file_and_line(content, says, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_jsonl(tmp_path / "rows.jsonl")


def test_every_reader_takes_them(tmp_path, base):
    """A task of questions, pairs, and the config of a run that was edited on Windows."""
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(
        json.dumps({"question": f"{i}?", "answer": str(i)}).encode() for i in range(30)) + b"\r\n\r\n")
    assert len(find_tasks(str(tmp_path / "q.jsonl"))) == 1
    pairs = [{"prompt": "hi\n", "chosen": "hello", "rejected": "go away"}] * 2
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(map(json.dumps, pairs)).encode("utf-16"))
    assert len(preference.read_pairs(tmp_path / "p.jsonl", load(base)[1], 99)) == 2
    from machinery.run_folder import create_run, read_run_config
    run = create_run(tmp_path / "run", sft.Config())
    (run / "config.json").write_bytes(b"\xef\xbb\xbf" + (run / "config.json").read_bytes().replace(b"\n", b"\r\n"))
    assert read_run_config(run, sft.Config) == sft.Config()


# --------------------------------------------------------------------------------------------------------- conversations
@pytest.mark.parametrize("row, expected", (
    ({"messages": [USER, REPLY]}, [([USER], "b")]),
    ({"messages": [{"role": "system", "content": "s"}, USER, REPLY]}, [([{"role": "system", "content": "s"}, USER], "b")]),
    ({"messages": [USER, REPLY, AGAIN, REPLY]}, [([USER], "b"), ([USER, REPLY, AGAIN], "b")]),
    ({"messages": [USER, REPLY | {"weight": 0}, AGAIN, REPLY]}, [([USER, REPLY, AGAIN], "b")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, REPLY]}, [([USER], "b")]),
    ({"prompt": "a title", "messages": [USER, REPLY]}, [([USER], "b")]),
    ({"prompt": [USER], "completion": [REPLY]}, [([USER], "b")]), ({"prompt": [USER], "completion": "b"}, [([USER], "b")]),
    ({"prompt": "a", "completion": "b"}, [("a", "b")]),
), ids=("messages", "system", "two turns", "weight 0", "parts", "a prompt beside", "prompt and completion", "text as completion", "text"))
def test_conversations_of_openai_and_trl_are_rows(row, expected):
    rows = check_rows([row], "x", PAIR, "both")
    assert [(row["prompt"], row["completion"]) for row in rows] == expected


@pytest.mark.parametrize("row", (
    {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "x"}]},
    {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "x"}]},
), ids=("prompt", "the same beginning"))
def test_preferences_over_conversations_are_pairs(row):
    found, = check_rows([row], "x", ("prompt", "chosen", "rejected"), "all three")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([USER], "b", "x")


@pytest.mark.parametrize("row, says", (
    ({"messages": [USER]}, "expected a user's first and an assistant's behind it"),
    ({"messages": [REPLY, USER]}, "expected a user's first"), ({"messages": []}, "without a message"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "expected role and content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, "expected role and content"),
    ({"messages": [USER, REPLY | {"reasoning_content": "because"}]}, "with reasoning_content in a message"),
    ({"messages": [USER, REPLY | {"content": "", "tool_calls": [1]}, AGAIN, REPLY]}, "with tool_calls in a message"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, REPLY]}, "expected role and content"),
    ({"messages": [USER | {"content": " "}, REPLY]}, "with an empty message of the user"),
    ({"messages": [USER, REPLY], "tools": [{}]}, "with tools"),
    ({"messages": "a"}, "without a message"), ({"prompt": [USER], "completion": [USER]}, "expected one, of the assistant"),
    ({"prompt": [USER], "completion": [REPLY], "tools": [{}]}, "with tools"),
    ({"instruction": "a", "output": "b"}, "without text in prompt and completion; expected both.* it has instruction, output"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "it has conversations"), ({"text": "a"}, "it has text"),
    ({"prompt": "\ud83d", "completion": "b"}, "half a character"), ({}, "no field"),
), ids=("no reply", "reply first", "no message", "tool call", "image", "thinking elsewhere", "words and a tool call",
        "a part without text", "empty question", "messages with tools", "no list", "two users", "tools", "Alpaca", "ShareGPT",
        "text", "half a character", "empty"))
def test_other_rows_are_refused_with_their_line(row, says):
    with pytest.raises(ValueError, match=f"got x, line 2 .*{says}"):
        check_rows([{"prompt": "a", "completion": "b"}, row], "x", PAIR, "both")


def test_preferences_that_begin_differently_are_refused():
    with pytest.raises(ValueError, match="line 1 whose chosen and rejected begin differently"):
        check_rows([{"chosen": [USER, REPLY], "rejected": [AGAIN, REPLY]}], "x", ("prompt", "chosen", "rejected"), "all")


def test_a_conversation_goes_through_the_chat_template_whatever_the_style(stranger, base, tmp_path):
    """The reply itself does not: templates of thinking models would take its chain of thought out."""
    model, tokenizer = load(stranger(bos=True))
    rows = [{"messages": [USER, {"role": "assistant", "content": "<think>t</think>b"}]}, {"prompt": "a", "completion": "b"}]
    (prompt, completion), (text, _) = sft.tokenize(rows, tokenizer, "x", "tiny", end_tokens(model, tokenizer))
    assert decode(tokenizer, [prompt, completion, text]) == ["<|user|>a<|end|><|assistant|>", "<think>t</think>b<|end|>",
                                                             "<|begin|>a"]
    with pytest.raises(ValueError, match="no chat template"):
        sft.tokenize(rows, load(base)[1], "x")


# ---------------------------------------------------------------------------------------------------------- held-out rows
def keys_of(rows, style="tiny", tokenizer=None):
    return [prompt_key(row["prompt"], style, tokenizer) for row in rows]


def test_rows_of_one_prompt_are_on_one_side():
    """Four rows a prompt, as rejection sampling writes them; the split is by prompt, in the order of rows as it was for
    rows that are all different."""
    rows = [{"prompt": f"{i % 50}\n" if i % 2 else f"{i % 50}", "completion": str(i)} for i in range(200)]
    held_out, rest = keep_out(keys_of(rows), rows, 20, seed=0)
    assert not set(keys_of(held_out)) & set(keys_of(rest))
    assert 20 <= len(held_out) <= 23 and len(held_out) + len(rest) == 200
    different = [{"prompt": str(i), "completion": ""} for i in range(200)]
    held_out, rest = keep_out(keys_of(different), different, 20, seed=0)
    import random
    random.Random(0).shuffle(different)
    assert held_out + rest == different


def test_a_frequent_prompt_stays_in_training_as_long_as_there_are_others():
    rows = [{"prompt": "hello", "completion": str(i)} for i in range(100)] + [{"prompt": str(i)} for i in range(30)]
    for n, hello in ((16, 0), (31, 100)):
        held_out, rest = keep_out(keys_of(rows), rows, n, seed=0)
        assert sum(row["prompt"] == "hello" for row in held_out) == hello


def test_a_prompt_of_many_rows_is_held_out_no_sooner_than_any_other():
    """Else the held-out rows of a small corpus would be its greetings, and hardly anything else."""
    rows = [{"prompt": f"often {i % 5}"} for i in range(200)] + [{"prompt": str(i)} for i in range(1800)]
    shares = [sum(row["prompt"].startswith("often") for row in keep_out(keys_of(rows), rows, 320, seed)[0]) / 320
              for seed in range(20)]
    assert 0.05 < sum(shares) / 20 < 0.18  # a tenth of all rows


def test_turns_of_one_conversation_are_on_one_side(stranger):
    _, tokenizer = load(stranger())
    rows = check_rows([{"messages": [{"role": "user", "content": str(i)}, REPLY, AGAIN, REPLY]} for i in range(20)], "x",
                      PAIR, "both")
    held_out, rest = keep_out(keys_of(rows, "chat", tokenizer), rows, 8, seed=0)
    firsts = [{row["prompt"][0]["content"] for row in side} for side in (held_out, rest)]
    assert len(rows) == 40 and len(held_out) == 8 and not firsts[0] & firsts[1]


def test_what_the_model_reads_decides_whether_prompts_are_the_same(stranger):
    """Text in chat style and a conversation of the same words; white space that the template takes off; a system prompt
    that the template writes itself; letters that are composed or not."""
    template = ("{% if messages[0]['role'] != 'system' %}<|user|>be kind<|end|>{% endif %}{% for message in messages %}"
                "<|user|>{{ message['content'] | trim }}<|end|>{% endfor %}")
    _, tokenizer = load(stranger(template=template))
    user = {"role": "user", "content": "a\u0308 b"}
    rows = [{"prompt": text} for text in ("\u00e4 b", [user], [user | {"content": "\u00e4 b \n"}],
                                          [{"role": "system", "content": "be kind"}, user], [user, REPLY, AGAIN])]
    assert len(set(keys_of(rows, "chat", tokenizer))) == 1


def test_a_held_out_loss_is_no_memory(base, monkeypatch, tmp_path, capfd):
    """Every prompt three times with the same completion, which is random: what is learnt by heart shows in training, and
    not in the held-out loss, which stays above that of guessing among the four."""
    import random
    rng, words = random.Random(0), ["go away", "hello", "42", "7"]
    rows = [{"prompt": f"using {i % 7} {i // 7} make {i}\n", "completion": rng.choice(words)} for i in range(60)] * 3
    append_jsonl(tmp_path / "rows.jsonl", *rows)
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path / "rows.jsonl"), "--model", str(base), "--epochs", "40",
                                      "--learning-rate", "1e-2", "--eval-rows", "30", "--batch-tokens", "1000",
                                      "--out", str(tmp_path / "run")])
    sft.main()
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["loss"] < 0.1 < 0.4 < last["held_out_loss"]


# ---------------------------------------------------------------------------------------------------- counted and said
def test_empty_and_unknown_rows_are_counted(base, capfd):
    rows = [{"prompt": "hello\n", "completion": ""}, {"prompt": "hi\n", "completion": ""},
            {"prompt": "xyz qq", "completion": "42"}, {"prompt": "hello\n", "completion": "zz"},
            {"prompt": "hello\n", "completion": "42"}]
    sft.tokenize(rows, load(base)[1], "my.jsonl")
    error = capfd.readouterr().err
    assert "note: 2 of the 5 rows of my.jsonl have an empty completion" in error
    assert "note: 2 of the 5 rows of my.jsonl have a prompt or a completion of unknown tokens alone" in error
    assert "of the tokens of my.jsonl are unknown" in error


def test_completions_that_never_close_the_thinking_of_their_prompt_are_counted(stranger, capfd):
    from conftest import CHAT
    _, tokenizer = load(stranger(template=CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")))
    rows = [{"prompt": "a", "completion": text} for text in ("<think>\nb</think>c", "b</think>c", "hello")]
    sft.tokenize(rows, tokenizer, "my.jsonl", "chat")
    assert "note: 1 of the 3 completions of my.jsonl never close" in capfd.readouterr().err


# ------------------------------------------------------------------------------------- data that changed before --resume
def test_data_that_changed_is_noticed_when_supervised_training_is_resumed(base, monkeypatch, refused, tmp_path):
    """Longer, shorter, or of the same length: the run would train on other rows, or end without a word."""
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"prompt": f"using {i} make {i}\n", "completion": "yes"} for i in range(40)]
    append_jsonl(data, *rows)
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(data), "--model", str(base), "--eval-rows", "4", "--batch-tokens",
                                      "100", "--out", str(run)])
    sft.main()
    before = data.read_bytes()
    for changed in (before + before.replace(b"yes", b"no"), before[:200].rpartition(b"\n")[0], before.replace(b"yes", b"not")):
        data.write_bytes(changed)
        refused(sft, "--resume", run, says=(f"got {data}, which is not what it was when {run} began", "put it back",
                                            f"--model {run / 'checkpoint'}"))
    data.write_bytes(before)
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(run)])
    sft.main()


def test_questions_that_changed_are_noticed_when_reinforcement_learning_is_resumed(base, monkeypatch, refused, tmp_path,
                                                                                   quiet_training):
    data, run = tmp_path / "q.jsonl", tmp_path / "run"
    append_jsonl(data, *({"question": f"make {i}", "answer": str(i)} for i in range(40)))
    monkeypatch.setattr(sys, "argv", ["x", "--task", str(data), "--model", str(base), "--steps", "1", "--batch-size", "8",
                                      "--group-size", "4", "--max-new-tokens", "8", "--eval-n", "4", "--out", str(run)])
    train_countdown.main()
    assert load_checkpoint(run)[2]["inputs"] == {str(data): fingerprint(data)}
    append_jsonl(data, {"question": "one more", "answer": "1"})
    refused(train_countdown, "--resume", run, says=(f"got {data}, which is not what it was when {run} began",))


def test_what_is_read_anew_is_remembered(base, monkeypatch, tmp_path, quiet_training):
    """The first model, where it is the reference or carries adapters."""
    shutil.copytree(base, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path / "model"), "--steps", "1", "--batch-size", "8",
                                      "--group-size", "4", "--max-new-tokens", "8", "--eval-n", "4", "--kl-coef", "0.1",
                                      "--out", str(tmp_path / "run")])
    train_countdown.main()
    state = load_checkpoint(tmp_path / "run")[2]
    assert state["inputs"] == {str(tmp_path / "model"): fingerprint(base)}
    check_unchanged(state, tmp_path / "run")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja"):
        path = tmp_path / "model" / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b" ")
        with pytest.raises(ValueError, match="which is not what it was"):
            check_unchanged(state, tmp_path / "run")
        path.unlink() if before is None else path.write_bytes(before)


def test_pairs_that_teach_nothing_and_prompts_on_both_sides_are_counted(base, monkeypatch, tmp_path, capfd):
    """Of reward model's pairs: a frequent prompt may stand on both sides, and then the held-out figure says so."""
    chosen = ["hello"] * 4 + ["hi", "hello, hi", "hi, hi", "thank you"]
    pairs = [{"prompt": "hi\n", "chosen": chosen[i], "rejected": "hello" if i < 3 else "go away"} for i in range(8)]
    append_jsonl(tmp_path / "pairs.jsonl", *pairs)
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path / "pairs.jsonl"), "--model", str(base), "--eval-pairs", "2",
                                      "--out", str(tmp_path / "run")])
    preference.main()
    error = capfd.readouterr().err
    assert "note: 3 of the 8 pairs of" in error and "note: 2 of the 2 held-out pairs have a prompt" in error


def test_flaws_of_any_type_group_the_report_and_a_reserved_name_is_refused(base, tmp_path):
    tokenizer = load(base)[1]
    pairs = [{"prompt": "hi\n", "chosen": "hello", "rejected": "go away", "flaw": flaw} for flaw in (None, 3, ["a"], "rude")]
    append_jsonl(tmp_path / "a.jsonl", *pairs)
    assert [pair["flaw"] for pair in preference.read_pairs(tmp_path / "a.jsonl", tokenizer, 99)] == ["all", "3", "['a']", "rude"]
    append_jsonl(tmp_path / "a.jsonl", pairs[0] | {"flaw": "loss"})
    with pytest.raises(ValueError, match="a flaw called 'loss'"):
        preference.read_pairs(tmp_path / "a.jsonl", tokenizer, 99)


@pytest.mark.parametrize("n", (20, 300))
def test_unknown_tokens_of_pairs_are_counted_however_many_there_are(n, base, tmp_path, capfd):
    append_jsonl(tmp_path / "a.jsonl", *[{"prompt": "hi\n", "chosen": "zz qq", "rejected": "go away"}] * n)
    preference.read_pairs(tmp_path / "a.jsonl", load(base)[1], 99)
    assert "of the tokens of" in capfd.readouterr().err
