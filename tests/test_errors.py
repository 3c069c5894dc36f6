"""Bad input, as a user meets it: one line that says what was got, what was expected and how to mend it; exit code 2;
nothing is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import corpus
import countdown
import evaluate
import sft
import train_countdown
from conftest import TINY
from experiments import harder
from machinery import rl_run, run_folder
from machinery.checkpoints import load, save
from machinery.data import read_jsonl
from test_training import digit_score

ROOT = Path(train_countdown.__file__).parent
QUICK = ("--steps", "4", "--batch-size", "16", "--group-size", "4", "--max-new-tokens", "16", "--eval-n", "8",
         "--eval-every", "100", "--save-every", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a random model of one layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "test", TINY)
        model, tokenizer = sft.new_model("test", seed=0)
    save(model, tokenizer, directory := tmp_path_factory.mktemp("base") / "model")
    return directory


@pytest.fixture(autouse=True)
def easy_reward(monkeypatch, quiet_training):
    """The share of digits, so that there is something to train."""
    monkeypatch.setattr(countdown, "score", digit_score)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a finished run of one step."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--model", str(base), "--out", str(run), *QUICK, "--steps", "1"])
        patch.setattr(rl_run, "plot_run", lambda run: None)
        train_countdown.main()
    return run


def cases(*rows):
    """Rows that end in (flags, says), named by their flags."""
    return [pytest.param(*row, id=" ".join(row[-2])) for row in rows]


def content(directory) -> dict:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("script", (train_countdown, sft, evaluate), ids=lambda script: script.__name__)
def test_unknown_flags_abbreviations_and_wrong_types_are_refused(script, refused):
    refused(script, "--learning-rat", "1", says=("unrecognized arguments: --learning-rat",))
    refused(script, "--mod", "x", says=("unrecognized arguments: --mod",))
    refused(script, "--seed", "three", says=("--seed", "invalid int value: 'three'"))


@pytest.mark.parametrize("flags, says", cases(
    (("--group-size", "7"), ("got group_size 7", "must divide batch_size 256", "try 8")),
    (("--batch-size", "24", "--group-size", "9"), ("got group_size 9", "must divide batch_size 24", "try 8")),
    (("--batch-size", "1", "--group-size", "16"), ("batch_size", "expected")),
    (("--group-size", "1"), ("got group_size 1", "expected at least 2")),
    (("--steps", "0"), ("got steps 0", "expected more than 0")),
    (("--temperature", "0"), ("got temperature 0", "expected more than 0")),
    (("--learning-rate", "nan"), ("got learning_rate nan", "expected more than 0")),
    (("--warmup-steps", "0"), ("warmup_steps 0", "expected", "at least 1")),
    (("--level", "hard"), ("got level 'hard'", "expected one of laptop")),
    (("--style", "poem"), ("got style 'poem'", "expected tiny, base or chat")),
    (("--average", "mean"), ("got average 'mean'", "expected token, sequence or constant")),
    (("--language", "fr"), ("got language 'fr'", "expected")),
    (("--clip-low", "1.5"), ("expected clip_low within (0, 1)",)),
    (("--eval-n", "1000"), ("got n=1000", "ask for fewer")),
    (("--dtype", "float16"), ("got dtype 'float16'", "expected one of float32, bfloat16")),
    (("--slots", "0"), ("got slots 0", "expected more than 0")),
    (("--fsdp", "--dtype", "bfloat16"), ("got --fsdp without torchrun", "expected torchrun --nproc-per-node")),
    (("--fsdp", "--offload-optimizer"), ("got --fsdp with --offload-optimizer", "expected one of them")),
    (("--lora-rank", "4", "--fsdp"), ("got lora_rank 4", "without --fsdp")),
))
def test_bad_values_are_refused_before_anything_is_written(flags, says, base, refused, tmp_path):
    refused(train_countdown, "--model", base, "--out", tmp_path / "run", *flags, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, flags, says", cases(
    (evaluate, ("--n", "-1"), ("expected samples, max_new_tokens and slots of at least 1, n and shots of at least 0",)),
    (evaluate, ("--n", "1000"), ("got n=1000", "ask for fewer")),
    (evaluate, ("--temperature", "0", "--samples", "4"), ("got samples 4 at temperature 0", "--samples 1")),
    (evaluate, ("--top-p", "0"), ("top_p 0", "within (0, 1]")),
    (evaluate, ("--language", "fr"), ("got language 'fr'", "expected")),
    (evaluate, ("--style", "chat"), ("no chat template", "style 'base'")),
    (sft, ("--optimizer", "sgd"), ("got optimizer 'sgd'", "expected adamw or muon")),
    (sft, ("--from-scratch", "huge"), ("got from_scratch 'huge'", "expected one of tiny, student, llama-student")),
    (sft, ("--epochs", "0"), ("got epochs 0", "expected more than 0")),
    (sft, ("--optimizer", "muon", "--dtype", "bfloat16"), ("got optimizer muon with --dtype bfloat16", "adamw")),
    (sft, ("--dtype", "half"), ("got dtype 'half'", "expected one of float32, bfloat16")),
))
def test_bad_values_are_refused_by_the_other_scripts(script, flags, says, base, refused):
    refused(script, "--model", base, *flags, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", (train_countdown, sft, evaluate), ids=lambda script: script.__name__)
def test_a_gpu_that_is_not_there_is_said_in_one_line(script, base, refused, tmp_path):
    """Before anything else, the estimate of what fits on it included."""
    flags = () if script is evaluate else ("--out", tmp_path / "run")
    refused(script, "--model", base, "--device", "cuda", *flags, says=("got device 'cuda'", "use --device cpu"))
    assert not (tmp_path / "run").exists()


def test_a_true_command_line_ends_without_a_traceback():
    """As a shell sees it: exit code 2, one line, nothing on the screen besides."""
    command = [sys.executable, ROOT / "train_countdown.py", "--batch-size", "20", "--group-size", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: got group_size 6, which must divide batch_size 20; try 5\n"


# ------------------------------------------------------------------------------------------------------------ the model
def edit(name, **changes):
    def spoil(directory):
        old = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps({key: value for key, value in old.items() if value is not None}))
    return spoil


def without_eos(directory):
    edit("tokenizer_config.json", eos_token=None)(directory)
    edit("config.json", eos_token_id=None)(directory)


@pytest.mark.parametrize("script", (train_countdown, sft, evaluate), ids=lambda script: script.__name__)
@pytest.mark.parametrize("spoil, says", (
    (lambda d: (d / "model.safetensors").unlink(), ("without model.safetensors", "expected the weights as")),
    (lambda d: (d / "tokenizer.json").unlink(), ("without tokenizer.json", "expected config.json")),
    (lambda d: (d / "config.json").unlink(), ("without config.json", "expected config.json")),
    (edit("config.json", model_type="gpt2"), ("architecture 'gpt2'", "expected one of qwen2, qwen3, llama")),
    (without_eos, ("without an EOS token", "Set eos_token")),
    (lambda d: shutil.rmtree(d), ("no directory here and no hub id",)),
), ids=("no weights", "no tokenizer", "no config", "architecture", "no EOS", "nothing there"))
def test_a_bad_model_directory_ends_in_one_line(script, spoil, says, base, refused, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    spoil(tmp_path / "model")
    where = () if script is evaluate else ("--out", tmp_path / "run")
    refused(script, "--model", tmp_path / "model", *where, says=says)
    assert not (tmp_path / "run").exists()


def test_prompts_longer_than_the_context_are_refused(base, refused, tmp_path):
    """Before work starts: the context of this model is 2,048 tokens."""
    refused(train_countdown, "--model", base, "--out", tmp_path / "run", "--max-new-tokens", "2040",
            says=("max_new_tokens 2040", "context of 2048", "lower --max-new-tokens"))
    refused(evaluate, "--model", base, "--max-new-tokens", "2040",
            says=("max_new_tokens 2040", "context of 2048", "lower max_new_tokens to 20"))
    data = tmp_path / "data.jsonl"
    run_folder.append_jsonl(data, *({"prompt": "hi\n", "completion": text} for text in ("+" * 2100, "hello")))
    refused(sft, "--model", base, "--data", data, "--eval-rows", "1", "--out", tmp_path / "run",
            says=("got a row of 2103 tokens", "row 1", "context of 2048"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lines, says", (
    (None, ("data.jsonl",)),
    (['{"prompt": "hi", "completion": "hello"}', "{broken"], ("data.jsonl, line 2", "expected one JSON object a line")),
    (['{"prompt": "hi", "completion": "hello"}', "[1, 2]"], ("line 2", "expected a JSON object")),
    (['{"prompt": "hi", "completion": "hello"}', '{"prompt": "hi"}'], ("line 2", "without text in prompt")),
    (['{"prompt": "hi", "completion": "hello"}'], ("got 1 rows", "expected at least one on each side")),
), ids=("missing", "broken line", "no object", "no completion", "too few"))
def test_bad_data_is_refused_with_its_line(lines, says, base, refused, tmp_path):
    if lines:
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
    refused(sft, "--model", base, "--data", tmp_path / "data.jsonl", "--eval-rows", "1", "--out", tmp_path / "run",
            says=says)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- nothing is overwritten
@pytest.mark.parametrize("script", (train_countdown, sft), ids=lambda script: script.__name__)
def test_a_folder_that_holds_a_run_is_left_alone(script, base, finished, refused, tmp_path):
    data = tmp_path / "data.jsonl"
    run_folder.append_jsonl(data, *[{"prompt": "hi\n", "completion": "hello"}] * 3)
    before = content(finished)
    flags = ("--data", data, "--eval-rows", "1") if script is sft else QUICK
    refused(script, "--model", base, "--out", finished, *flags,
            says=(f"got output folder {finished}", "already holds a run", "--out", f"--resume {finished}"))
    assert content(finished) == before


def test_an_evaluation_never_overwrites_its_table_and_never_loses_it(base, refused, tmp_path):
    """An existing file and a folder that is not there are both found out before the evaluation, not after it."""
    table = tmp_path / "table.json"
    table.write_text("precious")
    flags = ("--model", base, "--n", "4", "--max-new-tokens", "8", "--json")
    refused(evaluate, *flags, table, says=(f"got --json {table}", "name another file"))
    assert table.read_text() == "precious"
    refused(evaluate, *flags, tmp_path / "no" / "table.json", says=(tmp_path / "no",))


# --------------------------------------------------------------------------------------------------------------- resume
def shorten(name, share):
    def spoil(run):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:int(share * len(whole))])
    return spoil


@pytest.mark.parametrize("spoil, says", (
    (shorten("checkpoint/trainer_state.pt", 0.7), ("corrupt or truncated", "trainer_state.pt", "--model")),
    (shorten("checkpoint/trainer_state.pt", 0), ("corrupt or truncated", "trainer_state.pt", "--model")),
    (lambda run: (run / "checkpoint/trainer_state.pt").write_bytes(b"rubbish" * 1000),
     ("corrupt or truncated", "trainer_state.pt", "--model")),
    (lambda run: (run / "checkpoint/trainer_state.pt").unlink(), ("without trainer_state.pt", "--model")),
    (shorten("checkpoint/model.safetensors", 0.7), ("corrupt or truncated weights file", "model.safetensors")),
    (shorten("checkpoint/config.json", 0.7), ("checkpoint/config.json", "got")),
    (lambda run: shutil.rmtree(run / "checkpoint"), ("without a checkpoint", "expected")),
    (lambda run: (run / "config.json").unlink(), ("there is no", "config.json", "expected the folder of a run")),
    (shorten("config.json", 0.5), ("config.json", "cannot read")),
    (lambda run: (run / "config.json").write_text('{"colour": "red"}'), ("config.json", "cannot read", "another")),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew'),
     ("metrics.jsonl, line 2", "expected one JSON object a line")),
), ids=("state cut", "state empty", "state rubbish", "no state", "weights cut", "model config cut", "no checkpoint",
        "no config", "config cut", "another script's config", "half a line in the log"))
def test_a_corrupt_run_is_not_continued_and_not_touched(spoil, says, finished, refused, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    spoil(run)
    before = content(run)
    refused(train_countdown, "--resume", run, says=says)
    assert content(run) == before


def test_a_resumed_run_keeps_its_settings(finished, refused):
    """Its own config.json holds. A flag beside --resume would be ignored without a word, so it is refused."""
    before = content(finished)
    refused(train_countdown, "--resume", finished, "--steps", "9", says=("--steps", "give --resume alone"))
    assert content(finished) == before


def test_a_resumed_run_needs_its_first_model_for_the_kl(monkeypatch, base, refused, tmp_path):
    """The reference is the model that the run began with; if that directory is gone, one line says so."""
    shutil.copytree(base, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), *QUICK,
                                      "--steps", "1", "--kl-coef", "0.1"])
    train_countdown.main()
    shutil.rmtree(tmp_path / "model")
    refused(train_countdown, "--resume", tmp_path / "run", says=(tmp_path / "model", "no directory here"))


# ------------------------------------------------------------------------------------------------------------------ NaN
def is_finite(run) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in load_file(run / "checkpoint" / "model.safetensors").values())


def test_a_nan_loss_ends_the_run_with_the_last_good_weights(monkeypatch, base, refused, tmp_path):
    """Step 3's loss is NaN: the weights of step 2 are what the checkpoint holds, and a resumed run goes on from them as
    if nothing had happened."""
    run, calls, loss = tmp_path / "run", [], train_countdown.grpo_loss

    def nan_in_step_3(*args, **settings):
        calls.append(args)
        value, stats = loss(*args, **settings)
        return (value * math.nan if len(calls) == 3 else value), stats
    with monkeypatch.context() as patch:
        patch.setattr(train_countdown, "grpo_loss", nan_in_step_3)
        refused(train_countdown, "--model", base, "--out", run, *QUICK, "--save-every", "100",
                says=("gradient norm of nan at step 3", "expected a finite one", "checkpoint", "Lower --learning-rate"))
    assert is_finite(run) and run_folder.load_checkpoint(run)[2]["step"] == 2
    for flags in (("--resume", run), ("--model", base, "--out", tmp_path / "whole", *QUICK)):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
        train_countdown.main()
    resumed, whole = (load_file(out / "checkpoint" / "model.safetensors") for out in (run, tmp_path / "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def break_weights_at_step(monkeypatch, n: int):
    """The n-th optimizer step writes NaN, as an exploding update does: its own gradient was still finite."""
    calls, step = [], torch.optim.AdamW.step

    def broken(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == n:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)


def test_broken_weights_end_the_run_and_never_replace_a_good_checkpoint(monkeypatch, base, refused, tmp_path):
    """NaN weights sample the same token for ever, so that all rewards are equal and no gradient is computed that could
    be NaN. The checkpoint of step 2 stays as it was, instead of NaN weights over it."""
    break_weights_at_step(monkeypatch, 3)
    refused(train_countdown, "--model", base, "--out", tmp_path / "run", *QUICK, "--save-every", "2",
            says=("nan", "expected", "checkpoint"))
    assert is_finite(tmp_path / "run") and run_folder.load_checkpoint(tmp_path / "run")[2]["step"] == 2


def test_broken_weights_end_supervised_training_too(monkeypatch, base, refused, tmp_path):
    run_folder.append_jsonl(tmp_path / "data.jsonl", *corpus.write_corpus(corpus.Config(n=60)))
    break_weights_at_step(monkeypatch, 3)
    refused(sft, "--model", base, "--data", tmp_path / "data.jsonl", "--eval-rows", "10", "--batch-tokens", "500",
            "--save-every", "2", "--out", tmp_path / "run", says=("loss of nan", "at step 4", "expected finite", "the last good weights are in", "checkpoint"))
    assert is_finite(tmp_path / "run") and run_folder.load_checkpoint(tmp_path / "run")[2]["step"] == 2


# --------------------------------------------------------------------------------------------------------------- Ctrl-C
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(base, tmp_path):
    """A true process and a true signal: exit code 130, the step in progress is finished and saved, and the resumed run
    goes on there."""
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "train_countdown.py", "--model", base, "--out", run, *QUICK, "--steps", "100000",
               "--save-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = run / "metrics.jsonl"
    try:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):  # two steps are done
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert f"continue with: python train_countdown.py --resume {run}" in out and "Traceback" not in error
    last = read_jsonl(log)[-1]["step"]
    _, _, state = run_folder.load_checkpoint(run)
    assert state["step"] == last >= 2 and load(run / "checkpoint")


# ----------------------------------------------------------------------------------------- levels, splits, vocabularies
@pytest.mark.parametrize("script, flags, says", (
    (evaluate, ("--split", "held-out"), ("got split 'held-out', expected one of test, validation, train",)),
    (evaluate, ("--level", "three", "--n", 500), ("n=500", "about 328 test problems of 3 numbers", "ask for fewer")),
    (train_countdown, ("--level", "three", "--eval-n", 500), ("n=500", "about 303 validation problems of 3 numbers")),
    (train_countdown, ("--level", "hundreds", "--eval-n", 2, "--batch-size", 2, "--group-size", 2),
     ("got a prompt with the number", "read no number above 100", "another --level")),
), ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "")
def test_a_level_that_cannot_be_asked_is_refused(script, flags, says, base, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(countdown.LEVELS, "hundreds", countdown.Level((1,), 120, (101, 120)))
    where = () if script is evaluate else ("--out", tmp_path / "run")
    refused(script, "--model", base, *flags, *where, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, level", ((evaluate, "hundred"), (train_countdown, "hundred"), (harder, "")))
def test_a_level_that_the_base_s_vocabulary_cannot_write_is_refused(script, level, base, refused, tmp_path):
    """A base whose numbers end at 60, as those of an earlier corpus did. Levels below that are no matter."""
    old = shutil.copytree(base, tmp_path / "old")
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    for number in range(61, 101):
        del tokenizer["model"]["vocab"][str(number)]
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))
    small = ("--level", level, "--max-new-tokens", 40) if level else ("--n", 20)
    where = () if script is evaluate else ("--out", tmp_path / "run")
    refused(script, "--model", old, *small, *where,
            says=("got a prompt with the number 100", "read no number above 60", "another --level"))
    assert not (tmp_path / "run").exists()


def test_a_tiny_model_of_an_earlier_corpus_does_not_read_this_one(base, refused, tmp_path):
    """Here one without a word for programs. Rows of which it knows every word it may learn, and of a model with the
    corpus's own vocabulary no row is refused."""
    old = shutil.copytree(base, tmp_path / "old")
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["def"]
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = tmp_path / "data.jsonl"
    run_folder.append_jsonl(data, *corpus.write_corpus(corpus.Config(n=40, programs=1.0, chat=0.0)))
    refused(sft, "--model", old, "--data", data, "--eval-rows", 4, "--out", tmp_path / "run",
            says=(old, "262 tokens of another version of the corpus", "expected models/tiny-base"))
    assert not (tmp_path / "run").exists()
    corpus.check_vocabulary(load(old)[1], False, "old")
    for digits in (False, True):
        corpus.check_vocabulary(corpus.build_tokenizer(digits), True, "new")
