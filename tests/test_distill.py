"""Distillation: the KL to a teacher by hand, compute by hand, and what cannot be compared."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import corpus
import distill
import sft
from conftest import TINY
from distill import Config, compute, parameters, student_stages
from machinery.batching import pad_batch, teacher_kl
from machinery.checkpoints import load, read_hf_config, save
from machinery.data import read_jsonl
from machinery.run_folder import append_jsonl
from machinery.stages import Stage


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another random model with the same tokenizer, twice as wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "test", {**TINY, "hidden_size": 64})
        model, tokenizer = sft.new_model("test", seed=1)
    with torch.no_grad():
        model.model["embed_tokens"].weight *= 5
    save(model, tokenizer, directory := tmp_path_factory.mktemp("teacher") / "model")
    return directory


def batch():
    return pad_batch([[5, 6], [7]], [[8, 9, 10], [11, 0]])


def test_the_kl_is_of_whole_distributions_by_hand(base, teacher):
    """sum over the vocabulary of q log(q / p), q the teacher's, where the mask is 1; 0 elsewhere."""
    (student, _), (model, _) = load(base), load(teacher)
    input_ids, mask = batch()
    kl = teacher_kl(student, model, input_ids, mask)
    p, q = student(input_ids)[:, :-1].softmax(-1), model(input_ids)[:, :-1].softmax(-1)
    by_hand = (q * (q / p).log()).sum(-1)
    assert torch.allclose(kl, by_hand * mask, atol=1e-5)
    assert (kl[mask > 0] > 0.1).all() and (kl[mask == 0] == 0).all()  # they are far apart, so this says something


def test_the_student_is_taught_and_the_teacher_is_not(base, teacher):
    (student, _), (model, _) = load(base), load(teacher)
    teacher_kl(student, model, *batch()).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert sum(p.grad.abs().sum() for p in student.parameters()) > 0


def test_a_student_that_agrees_has_no_loss_and_no_gradient(base):
    (student, _), (same, _) = load(base), load(base)
    loss = teacher_kl(student, same, *batch())
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 and max(p.grad.abs().max() for p in student.parameters()) < 1e-4


def test_chunks_of_the_vocabulary_change_neither_kl_nor_gradient(base, teacher, monkeypatch):
    results = []
    for at_once in (2 ** 26, 255):  # all tokens at once, one after the other
        monkeypatch.setattr("machinery.batching.LOGITS_AT_ONCE", at_once)
        (student, _), (model, _) = load(base), load(teacher)
        loss = teacher_kl(student, model, *batch()).sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in student.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


def traces(path, n: int = 60):
    append_jsonl(path, *({"prompt": f"using {i % 9} 4 5 make 27\n", "completion": f"<think>\n{i}+4=9 yes\n</think>"}
                         for i in range(n)))
    return path


def test_sft_with_a_teacher_comes_closer_to_it(base, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--data", str(traces(tmp_path / "traces.jsonl")), "--model", str(base),
                                      "--teacher", str(teacher), "--out", str(tmp_path / "run"), "--eval-rows", "10",
                                      "--batch-tokens", "200", "--epochs", "4", "--learning-rate", "1e-2",
                                      "--eval-every", "1"])
    sft.main()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] < 0.7 * rows[0]["held_out_loss"]


@pytest.fixture(scope="module")
def stranger(teacher, tmp_path_factory):
    """The teacher with two words of its vocabulary exchanged."""
    directory = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(teacher, directory)
    text = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
    (directory / "tokenizer.json").write_text(json.dumps(text))
    return directory


@pytest.mark.parametrize("script", (sft, distill), ids=("sft", "distill"))
def test_logits_of_another_tokenizer_are_refused(script, base, stranger, refused, tmp_path):
    flags = (("--model", base, "--data", traces(tmp_path / "traces.jsonl")) if script is sft else
             ("--student", base, "--logits"))
    refused(script, *flags, "--teacher", stranger, "--out", tmp_path / "run",
            says=("another tokenizer", "263 and 263 tokens, 2 of them different", "distil by text instead"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random student of the other family, whose tokenizer is its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "llama-test", TINY)
        model, tokenizer = sft.new_model("llama-test", seed=0)
    save(model, tokenizer, directory := tmp_path_factory.mktemp("llama") / "model")
    return directory


def test_a_student_of_the_other_family_learns_from_text_and_not_from_logits(base, llama, refused, tmp_path, monkeypatch,
                                                                           quiet_training):
    """The whole comparison, with the text of a Qwen3 of 263 tokens: the Llama reads it in its own 172."""
    refused(distill, "--teacher", base, "--student", llama, "--logits", "--out", tmp_path / "logits",
            says=(f"teacher {base} with another tokenizer than {llama}", "263 and 172 tokens", "distil by text instead"))
    assert not (tmp_path / "logits").exists()
    flags = ("--data", traces(tmp_path / "traces.jsonl"), "--student", llama, "--out", tmp_path / "run", "--eval-n", 8,
             "--eval-samples", 1, "--max-new-tokens", 8, "--rl-steps", 1, "--after-steps", 1, "--rl-flags",
             "--batch-size 8 --group-size 4", "--batch-tokens", 300, "--sft-learning-rate", 1e-2, "--seeds", 2)
    refused(distill, *flags[:-1], 0, says=("got seeds 0, expected at least 1",))
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, flags)])
    distill.main()
    losses = [row["held_out_loss"] for row in read_jsonl(tmp_path / "run" / "seed0" / "distill" / "metrics.jsonl") if
              "held_out_loss" in row]
    assert losses[-1] < 0.8 * math.log(172)
    _, tokenizer = load(checkpoint := tmp_path / "run" / "seed1" / "distill" / "checkpoint")
    assert read_hf_config(checkpoint).model_type == "llama"
    assert tokenizer.get_vocab() == corpus.build_tokenizer(digits=True).get_vocab()
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert set(table) == {"student-base", "distill", "student-rl", "distill-rl"}
    rows = [json.loads((tmp_path / "run" / f"seed{seed}" / "eval-distill.json").read_text()) for seed in (0, 1)]
    assert table["distill"]["seeds"] == [row["pass@1"] for row in rows] and table["distill"]["completion_tokens"] == (
        rows[0]["completion_tokens"] + rows[1]["completion_tokens"]) / 2


def test_logits_need_a_teacher_not_its_text(refused, tmp_path):
    refused(distill, "--logits", "--data", "x.jsonl", says=("got --logits with --data, expected --teacher",))


def test_a_missing_teacher_is_said_before_anything_runs(refused, tmp_path):
    refused(distill, "--teacher", tmp_path / "none" / "checkpoint", "--out", tmp_path / "out",
            says=("without its input", "none/checkpoint"))
    refused(distill, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out", says=("none.jsonl",))
    assert not (tmp_path / "out").exists()


def test_parameters_are_counted_from_the_weight_files(base, teacher):
    for directory in (base, teacher):
        assert parameters(directory) == sum(p.numel() for p in load(directory)[0].parameters())


def test_compute_by_hand(base, teacher, tmp_path):
    """2 FLOPs a parameter and token for reading or writing, 6 for training, of the tokens that were trained on."""
    config = replace(Config(), out=str(tmp_path), student=str(base), teacher=str(teacher), logits=True)
    s, t = parameters(base), parameters(teacher)
    (tmp_path / "student-traces.jsonl.report.json").write_text(json.dumps({"rounds": [
        {"sampled_tokens": 1000, "source": "runs/gone", "parameters": t}]}))
    for name, rows in (("distill", [{"tokens": 300}, {"tokens": 200}]),
                       ("student-rl", [{"step": 0}, {"step": 1, "tokens": 4000, "trained_tokens": 2500}]),
                       ("logits", [{"tokens": 300}, {"tokens": 200}]),
                       ("distill-rl", [{"step": 0}, {"step": 1, "tokens": 100, "trained_tokens": 0}])):
        (tmp_path / name).mkdir()
        append_jsonl(tmp_path / name / "metrics.jsonl", *rows)
    shutil.copytree(base, tmp_path / "distill" / "checkpoint")  # whose RL it is
    flops = compute(config)
    assert flops["distill"] == 2 * t * 1000 + 6 * s * 500
    assert flops["student-rl"] == (2 * 4000 + 6 * 2500) * s
    assert flops["distill-rl"] == flops["distill"] + 100 * 2 * s
    assert flops["logits"] == flops["distill"] + 2 * t * 500
    (tmp_path / "student-traces.jsonl.report.json").rename(tmp_path / "mine.jsonl.report.json")
    assert compute(replace(config, logits=False, data=str(tmp_path / "mine.jsonl"))) == {
        name: flops[name] for name in ("distill", "student-rl", "distill-rl")}  # who wrote the traces counts here too
    (tmp_path / "mine.jsonl.report.json").unlink()
    assert compute(replace(config, logits=False, data=str(tmp_path / "mine.jsonl")))["distill"] == 6 * s * 500  # a stranger's


def test_the_arms_differ_in_what_they_should():
    stages = {stage.name: stage for stage in student_stages(Config(logits=True, rl_steps=7, after_steps=5))}
    assert [name for name, stage in stages.items() if "--no-normalize-std" in stage.flags] == ["distill-rl"]
    stages["distill-rl"] = Stage("distill-rl", stages["distill-rl"].command.replace(" --no-normalize-std", ""))
    flags = {name: dict(zip(stage.flags[::2], stage.flags[1::2])) for name, stage in stages.items()}
    assert flags["logits"] == flags["distill"] | {"--teacher": Config().teacher}
    differ = {name for name in flags["student-rl"] if flags["student-rl"][name] != flags["distill-rl"].get(name)}
    assert differ == {"--model", "--steps", "--learning-rate", "--final-lr"}
    assert flags["student-rl"]["--model"] == "models/tiny-student" and flags["student-rl"]["--steps"] == "7"
    assert str(flags["distill-rl"]["--model"]) == "runs/distill/distill/checkpoint"
    evaluations = [flags[name] for name in flags if name.startswith("eval-")]
    assert len(evaluations) == 5 and all({**e, "--model": 0} == {**evaluations[0], "--model": 0} for e in evaluations)
