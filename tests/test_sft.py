"""Supervised training from end to end, on random models of one layer: its loss, its data, what it continues."""

import math

import pytest
import torch

import corpus
import sft
from machinery import run_folder
from machinery.checkpoints import find_directory, load, read_hf_config
from test_training import Killed, assert_equal_weights, call, gradients, interrupt, quiet_machine, rows_of, weights  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    run_folder.append_jsonl(path, *corpus.write_corpus(corpus.Config(n=120, seed=1)))
    return path


def supervised(monkeypatch, data, out, code=None, **flags):
    settings = dict(data=data, from_scratch="test", out=out, epochs=2, batch_tokens=1200, eval_rows=20, eval_every=4,
                    save_every=3, learning_rate=1e-2)
    assert call(monkeypatch, sft, **{**settings, **flags}) == code
    return rows_of(out)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_the_supervised_loss_falls(monkeypatch, data, tmp_path, optimizer):
    """From ln V, a policy that knows nothing, on rows that it trains on and on rows that it never sees."""
    rows = supervised(monkeypatch, data, tmp_path / "run", optimizer=optimizer)
    assert rows[0]["loss"] == pytest.approx(math.log(len(corpus.build_tokenizer())), abs=0.1)
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"] and rows[-1]["held_out_loss"] < 0.75 * rows[0]["loss"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_only_completions_are_trained_and_eos_is(base):
    """The loss is -sum log p over the completion's tokens and EOS, each given all that stands before it; the prompt
    adds nothing."""
    model, tokenizer = load(base)
    rows = [{"prompt": "using 3 4 5 make 27\n", "completion": "5-4=1"}, {"prompt": "hi\n", "completion": "hello"}]
    examples = sft.tokenize(rows, tokenizer, "rows")
    assert [completion[-1] for _, completion in examples] == [tokenizer.eos_token_id] * 2
    assert [len(completion) for _, completion in examples] == [6, 2]
    expected = 0.0
    for prompt, completion in examples:
        for t, token in enumerate(completion):
            expected -= model(torch.tensor([prompt + completion[:t]]))[0, -1].log_softmax(-1)[token].item()
    losses = list(sft.completion_losses(model, examples, sft.Config()))
    assert sum(loss.item() for loss, _ in losses) == pytest.approx(expected, rel=1e-5)
    assert sum(tokens for _, tokens in losses) == 8


def test_micro_batches_change_no_supervised_gradient(monkeypatch, data, tmp_path):
    collected = gradients(monkeypatch, sft)
    for budget in (200, 100_000):
        supervised(monkeypatch, data, tmp_path / f"{budget}", micro_batch_tokens=budget, batch_tokens=100_000, epochs=1)
    assert len(collected) == 2
    for small, large in zip(*collected, strict=True):
        torch.testing.assert_close(small, large, atol=1e-7, rtol=1e-4)


def test_held_out_rows_are_never_trained_on(monkeypatch, data, tmp_path):
    trained, held_out, losses = [], [], sft.completion_losses

    def spy(model, examples, *settings):
        (trained if torch.is_grad_enabled() else held_out).extend(map(id, examples))
        return losses(model, examples, *settings)
    monkeypatch.setattr(sft, "completion_losses", spy)
    supervised(monkeypatch, data, tmp_path / "run", epochs=2)
    assert len(trained) == 2 * 100 and len(set(trained)) == 100  # each row once an epoch
    assert len(set(held_out)) == 20 and not set(held_out) & set(trained)


def test_epochs_are_shuffled_by_their_seed_and_cut_by_tokens():
    """A step ends with the row that fills it; the last one may be short. Same seed, same order; another epoch, another
    order."""
    examples = [([0] * 3, [0] * (i % 5 + 1)) for i in range(50)]
    batches = sft.epoch_batches(examples, 30, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    sizes = [[len(p) + len(c) for p, c in (examples[i] for i in batch)] for batch in batches]
    assert all(sum(batch) >= 30 > sum(batch[:-1]) for batch in sizes[:-1])
    assert sft.epoch_batches(examples, 30, seed=1) == batches != sft.epoch_batches(examples, 30, seed=2)
    two = batches + sft.epoch_batches(examples, 30, seed=2)
    settings = dict(batch_tokens=30, seed=1)
    assert sft.all_batches(examples, sft.Config(epochs=2, **settings)) == two
    for steps in (1, len(batches), len(two)):  # with less or more than an epoch
        assert sft.all_batches(examples, sft.Config(steps=steps, **settings)) == two[:steps]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    """Warm-up over 10 of 110 steps: 0.1 ... 1. Then final + (1 - final) (1 + cos(pi x)) / 2: 1, 0.55 halfway, 0.1."""
    config = sft.Config(warmup=10 / 110, final_lr=0.1)
    shares = [sft.schedule(step, 110, config) for step in range(111)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert (shares[10], shares[60], shares[110]) == pytest.approx((1.0, 0.55, 0.1))


def test_muon_gets_the_matrices_and_adamw_the_rest(base):
    """Every parameter in exactly one optimizer; embeddings are rows to look up, not a matrix to orthogonalise."""
    model, _ = load(base)
    muon, adamw = sft.build_optimizers(model, sft.Config(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, rest = ([names[id(p)] for settings in optimizer.param_groups for p in settings["params"]]
                      for optimizer in (muon, adamw.adamw))
    assert sorted(matrices + rest) == sorted(names.values())
    assert len(matrices) == 7 and all("proj" in name for name in matrices)


def test_the_same_seed_gives_the_same_weights(monkeypatch, data, tmp_path):
    first, again, other = (supervised(monkeypatch, data, tmp_path / name, seed=seed, epochs=1)
                           for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first == again != other
    assert_equal_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("how", ("stopped", "killed"))
def test_a_resumed_supervised_run_equals_the_uninterrupted_one(monkeypatch, data, tmp_path, capsys, optimizer, how):
    """Stopped after step 2, or killed after step 5 with the last checkpoint at step 3."""
    expected = supervised(monkeypatch, data, tmp_path / "whole", optimizer=optimizer)
    run = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt(patch, sft, run, rows=2 if how == "stopped" else 5, how=how)
        if how == "stopped":
            supervised(patch, data, run, code=130, optimizer=optimizer)
            assert f"continue with: python sft.py --resume {run}" in capsys.readouterr().out
        else:
            with pytest.raises(Killed):
                supervised(patch, data, run, optimizer=optimizer)
    assert call(monkeypatch, sft, resume=run) is None
    assert rows_of(run) == expected and len(expected) > 6
    assert_equal_weights(weights(run), weights(tmp_path / "whole"))


def test_a_finished_supervised_run_resumes_to_nothing(monkeypatch, data, tmp_path):
    """As a finished reinforcement learning run does: no step is left, the model stays as it is, and the exit is a
    regular one."""
    expected = supervised(monkeypatch, data, tmp_path / "run", epochs=1)
    before = weights(tmp_path / "run")
    assert call(monkeypatch, sft, resume=tmp_path / "run") is None
    assert rows_of(tmp_path / "run") == expected
    assert_equal_weights(weights(tmp_path / "run"), before)


def test_sft_makes_room_for_longer_rows(monkeypatch, base, tmp_path):
    """Rotary positions go on: logits of the places that both have are the same, and the config says the new context."""
    path = tmp_path / "rows.jsonl"
    run_folder.append_jsonl(path, *({"prompt": f"using 3 4 5 make {i}\n" * 260, "completion": "yes"} for i in range(4)))
    flags = dict(data=path, model=base, eval_rows=1, learning_rate=1e-9)
    assert call(monkeypatch, sft, out=tmp_path / "short", **flags) == 2  # 2,080 tokens and more
    assert call(monkeypatch, sft, out=tmp_path / "long", context=4096, **flags) is None
    short, long = (load(path)[0] for path in (base, tmp_path / "long" / "checkpoint"))
    assert (short.config.context, long.config.context) == (2048, 4096)
    ids = torch.arange(3, 200)[None]
    assert torch.allclose(short(ids), long(ids), atol=1e-4)
    assert long(torch.full((1, 3000), 7)).isfinite().all()


def test_the_llama_student_is_one_for_transformers_and_reads_digit_by_digit(monkeypatch, data, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    rows = supervised(monkeypatch, data, tmp_path / "run", from_scratch="llama-student", epochs=1)
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(math.log(172), abs=0.1)
    model, tokenizer = load(tmp_path / "run" / "checkpoint")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    ids = torch.tensor([tokenizer("using 10 9 1 make 26\n")["input_ids"]])
    assert isinstance(theirs, LlamaForCausalLM) and torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)
    assert tokenizer.convert_ids_to_tokens(ids[0])[1:4] == [" ", "1", "0"]
    tiny = corpus.build_tokenizer()
    assert tiny.get_vocab()[" make"] != tokenizer.get_vocab()[" make"]


@pytest.mark.parametrize("name, digits, family", (("tiny-base", False, "qwen3"), ("tiny-student", False, "qwen3"),
                                                  ("tiny-llama", True, "llama")))
def test_a_shipped_model_speaks_the_corpus_as_it_is_now(name, digits, family):
    """Its vocabulary is the corpus's, token by token, and transformers computes the same logits with it."""
    from transformers import AutoModelForCausalLM
    model, tokenizer = load(directory := find_directory(f"models/{name}"))
    assert tokenizer.get_vocab() == corpus.build_tokenizer(digits).get_vocab()
    document = next(row for row in corpus.write_corpus(corpus.Config(n=20, seed=5)) if row["kind"] == "search")
    ids = torch.tensor([tokenizer(document["prompt"] + document["completion"])["input_ids"]])
    assert tokenizer.unk_token_id not in ids and read_hf_config(directory).model_type == family
    assert model.config.context == 2048
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
        torch.testing.assert_close(model(ids), theirs, atol=2e-4, rtol=1e-4)
