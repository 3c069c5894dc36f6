"""Adapters on a frozen model: a new one changes nothing, a trained one can be merged and taken out again without a
trace, and what is saved is a plain model."""


import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import corpus
import train_countdown
from machinery import rl_run
from machinery.checkpoints import load, save
from machinery.lora import LoraLinear, add_lora, lora_layers, merged, without_lora
from machinery.optimizer import MasterAdamW
from model import Linear, Model, init_weights
from test_model import CONFIGS, IDS, SMALL, logits_of
from test_training import (Killed, assert_equal_weights, call, interrupt, quiet_machine, rows_of,  # noqa: F401
                           train, weights)

RANK, ALPHA = 4, 8.0
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def new_model(name="qwen2", dtype=torch.float32):
    """Weights of deviation 0.15, so that logits differ by more than a tolerance."""
    config_class, settings = CONFIGS[name]
    model = Model(config_class(**{**SMALL, **settings}, tie_word_embeddings=True))
    init_weights(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 8
    return model.to(dtype)


def adapted_model(seed=1, **settings):
    """With a B that has left zero."""
    model = new_model(**settings)
    add_lora(model, RANK, ALPHA, seed=0)
    change_b(model, seed)
    return model


@torch.no_grad()
def change_b(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for module in lora_layers(model):
        module.lora_b.normal_(0, 0.1, generator=generator)


def frozen(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if "lora_" not in name}


# ---------------------------------------------------------------------------------------------------------- the adapter
@DTYPES
@pytest.mark.parametrize("name", ("qwen2", "qwen3", "llama"))
def test_a_new_adapter_changes_no_logit(name, dtype):
    """B is zero, so W + scale * B A is W: training starts from the frozen model, bit for bit."""
    model = new_model(name, dtype)
    expected = logits_of(model)
    add_lora(model, RANK, ALPHA, seed=0)
    assert torch.equal(logits_of(model), expected)
    change_b(model, seed=1)
    assert (logits_of(model) - expected).abs().max() > 0.1


def test_only_adapters_of_the_blocks_are_trained():
    """Seven matrices in each of two layers have one; embeddings, norms, biases and lm_head stay. A is random, of
    deviation in^-0.5, by its seed; B is zero."""
    model = new_model("qwen2")
    add_lora(model, RANK, ALPHA, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    matrices = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert trained == {f"model.layers.{i}.{matrix}.lora_{x}" for i in (0, 1) for matrix in matrices for x in "ab"}
    assert len(MasterAdamW(model.parameters(), lr=1.0).masters) == 28
    assert all((module.lora_b == 0).all() for module in lora_layers(model))
    a = torch.cat([(module.lora_a * module.in_features ** 0.5).flatten() for module in lora_layers(model)])
    assert a.std().item() == pytest.approx(1, abs=0.1)
    again, other = new_model("qwen2"), new_model("qwen2")
    add_lora(again, RANK, ALPHA, seed=0)
    add_lora(other, RANK, ALPHA, seed=1)
    ours, same, another = (lora_layers(m)[0].lora_a for m in (model, again, other))
    assert torch.equal(ours, same) and not torch.equal(ours, another)


def test_an_adapter_has_rank_times_in_plus_out_numbers():
    """D 32, I 48, H 4, K 2, E 8. q and o: 32 + 32; k and v: 32 + 16; gate, up and down: 32 + 48. Together 464 a layer,
    two layers: 928 times the rank."""
    for rank in (1, 4):
        model = new_model("qwen2")
        before = sum(p.numel() for p in model.parameters())
        add_lora(model, rank, ALPHA, seed=0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 928 * rank
        assert sum(p.numel() for p in model.parameters()) == before + 928 * rank


def one_linear():
    """W = [[1, 0], [0, 1]], A = [[1, 2]], B = [[3], [4]], scale 2: rank 1."""
    linear = Linear(2, 2, bias=False)
    linear.weight = torch.nn.Parameter(torch.eye(2), requires_grad=False)
    adapted = LoraLinear(linear, 1, 2.0, torch.Generator())
    adapted.lora_a.data, adapted.lora_b.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    return adapted


def test_output_and_gradients_of_one_adapter_by_hand():
    """x = (5, 6): A x = 17, y = x + 2 * 17 * (3, 4) = (107, 142). For the loss y0 + 10 y1, dy = (1, 10):
    dB = scale * dy (A x)^T = (34, 340), dA = scale * (B^T dy) x^T = 2 * 43 * (5, 6) = (430, 516)."""
    linear = one_linear()
    y = linear(torch.tensor([[5.0, 6.0]]))
    assert y.tolist() == [[107.0, 142.0]]
    (y[0, 0] + 10 * y[0, 1]).backward()
    assert linear.lora_b.grad.tolist() == [[34.0], [340.0]]
    assert linear.lora_a.grad.tolist() == [[430.0, 516.0]]
    assert linear.weight.grad is None
    linear.adapted = False
    assert linear(torch.tensor([[5.0, 6.0]])).tolist() == [[5.0, 6.0]]


def test_the_scale_is_alpha_over_rank():
    """So that a rank can be changed without a new learning rate."""
    model = new_model("qwen2")
    add_lora(model, 4, 32.0, seed=0)
    assert {module.scale for module in lora_layers(model)} == {8.0}


# --------------------------------------------------------------------------------------------------- in, out, and saved
@pytest.mark.parametrize("name", ("qwen2", "qwen3", "llama"))
def test_merged_weights_compute_what_the_adapters_compute(name):
    model = adapted_model(name=name)
    expected = logits_of(model)
    with merged(model):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
        assert not any(module.adapted for module in lora_layers(model))  # else the adapter would count twice
    assert torch.equal(logits_of(model), expected)


@DTYPES
def test_merging_leaves_no_trace_in_the_frozen_weights(dtype):
    """Adding and subtracting would: each of these merges, with another B, is rounded. Also after an error inside."""
    model = adapted_model(dtype=dtype)
    before = frozen(model)
    for seed in range(4):
        change_b(model, seed)
        with merged(model):
            assert not torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"],
                                   before["model.layers.0.mlp.up_proj.weight"])
        assert_equal_weights(frozen(model), before)
    with pytest.raises(RuntimeError, match="out of memory"), merged(model):
        raise RuntimeError("out of memory")
    assert_equal_weights(frozen(model), before)
    assert all(module.adapted for module in lora_layers(model))


def test_a_merge_takes_the_newest_adapters():
    """The copy in host memory is made once; what is added to it is what B A is now."""
    model = adapted_model()
    for seed in (1, 2, 3):
        change_b(model, seed)
        expected = logits_of(model)
        with merged(model):
            torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


def test_in_bf16_the_sum_is_rounded_once():
    """scale * B A is computed in fp32: the merged weight is the bf16 number next to the exact one."""
    model = adapted_model(dtype=torch.bfloat16)
    exact = [module.weight.double() + module.scale * module.lora_b.double() @ module.lora_a.double()
             for module in lora_layers(model)]
    with merged(model):
        for module, expected in zip(lora_layers(model), exact, strict=True):
            step = 2.0 ** (expected.abs().log2().floor() - 7)
            assert ((module.weight.double() - expected).abs() <= 0.5001 * step).all()


def test_a_model_without_adapters_is_left_alone():
    model = new_model()
    before = frozen(model)
    with merged(model):
        assert_equal_weights(frozen(model), before)
        assert not any(hasattr(module, "frozen") for module in lora_layers(model))  # no second copy


@DTYPES
def test_without_lora_is_the_frozen_model(dtype):
    """The KL's reference: the base's logits inside, the adapted ones before and after, also after an error."""
    expected = logits_of(new_model(dtype=dtype))
    model = adapted_model(dtype=dtype)
    adapted = logits_of(model)
    assert not torch.equal(adapted, expected)
    with without_lora(model):
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), adapted)
    with pytest.raises(KeyError), without_lora(model):
        raise KeyError
    assert torch.equal(logits_of(model), adapted)


@DTYPES
def test_save_inside_merged_writes_a_plain_model(dtype, tmp_path):
    """AutoModelForCausalLM loads it, without PEFT, with our logits; no name speaks of LoRA."""
    model = adapted_model(dtype=dtype)
    with merged(model):
        save(model, corpus.build_tokenizer(), tmp_path / "model")
        expected = logits_of(model)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("lora" in name for name in written)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(theirs), expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)
    again, _ = load(tmp_path / "model", dtype=dtype)
    assert torch.equal(logits_of(again), expected)


# ---------------------------------------------------------------------------------------------------- few rows on a CPU
@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("shape", ((1040, 256), (256, 1040)), ids=("wide", "tall"))
@pytest.mark.parametrize("rows", range(1, 10))
def test_few_rows_times_a_large_matrix(shape, rows, bias, dtype, monkeypatch):
    """W X^T instead of X W^T, for 1 to 8 rows where the matrix is wide and 1 to 4 where it is tall; other numbers of
    rows, and anything with gradients, take the usual way. Same results, whatever the leading dimensions."""
    outputs, inputs = shape
    linear = Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = F.linear(x, linear.weight, linear.bias)
    fast = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args: fast.append(1) or mm(*args))
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)
    for given in (x, x[:, None], x[None]):  # (R, in), (R, 1, in), (1, R, in)
        y = linear(given)
        assert y.shape == (*given.shape[:-1], outputs)
        torch.testing.assert_close(y.reshape(rows, outputs), expected, **tolerance)
    assert len(fast) == (3 if rows <= (8 if outputs > inputs else 4) else 0)
    with torch.enable_grad():
        assert linear(x).requires_grad and len(fast) in (0, 3)


# ------------------------------------------------------------------------------------------------------------- training


LORA = dict(lora_rank=4, lora_alpha=8.0, learning_rate=2e-2, warmup_steps=1)


def models_of(monkeypatch):
    """The models that runs train, as add_lora gets them."""
    models, add = [], rl_run.add_lora
    monkeypatch.setattr(rl_run, "add_lora", lambda model, *args: models.append(model) or add(model, *args))
    return models


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_run_trains_adapters_and_saves_a_plain_model(monkeypatch, base, tmp_path, dtype):
    """The frozen weights are those on disk to the end; the checkpoint's matrices have moved, its embeddings and norms
    have not; sampler and trainer agree."""
    models = models_of(monkeypatch)
    rows = train(monkeypatch, base, tmp_path / "run", dtype=dtype, **LORA)
    assert all(row["gradient_norm"] > 0 for row in rows[1:])
    assert max(row["logprob_gap"] for row in rows[1:]) < (1e-4 if dtype == "float32" else 0.03)
    model, = models
    start, _ = load(base, dtype=getattr(torch, dtype))
    assert_equal_weights(frozen(model), frozen(start))
    assert all((module.lora_b != 0).any() for module in lora_layers(model))

    written, first = weights(tmp_path / "run"), start.state_dict()
    assert written.keys() == load_file(base / "model.safetensors").keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, first[name]) == ("proj" not in name)
    with merged(model):
        expected = model(IDS[:, :10] % 40)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    torch.testing.assert_close(theirs(IDS[:, :10] % 40).logits, expected, rtol=0,
                               atol=1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("how", ("stopped", "killed"))
@pytest.mark.parametrize("flags", ({}, {"kl_coef": 0.01, "inner_epochs": 2}, {"dtype": "bfloat16"},
                                   {"dtype": "bfloat16", "offload_optimizer": True}),
                         ids=("fp32", "kl", "bf16", "bf16 offload"))
def test_a_resumed_run_with_adapters_equals_the_uninterrupted_one(monkeypatch, base, tmp_path, flags, how):
    """trainer_state.pt holds A and B and their masters; the frozen weights come from the first model again, and not
    from the checkpoint, in which the adapters are merged."""
    whole, run = tmp_path / "whole", tmp_path / "parts"
    expected = train(monkeypatch, base, whole, **LORA, **flags)
    with monkeypatch.context() as patch:
        interrupt(patch, train_countdown, run, rows=2 if how == "stopped" else 4, how=how)
        if how == "stopped":
            train(patch, base, run, code=130, **LORA, **flags)
        else:
            with pytest.raises(Killed):
                train(patch, base, run, **LORA, **flags)
    assert call(monkeypatch, train_countdown, resume=run) is None
    assert rows_of(run) == expected
    assert (run / "checkpoint" / "model.safetensors").read_bytes() == (
        whole / "checkpoint" / "model.safetensors").read_bytes()
    assert any(row["gradient_norm"] > 0 for row in expected[1:])


def test_the_kl_of_adapters_is_to_the_frozen_model(monkeypatch, base, tmp_path):
    """No second model is loaded: 0 in the first step, when B is zero, and more in each one after it. ref_model being
    the policy itself would keep it at 0."""
    loaded, load_one = [], rl_run.load
    monkeypatch.setattr(rl_run, "load", lambda *args, **settings: loaded.append(1) or load_one(
        *args, **settings))
    rows = train(monkeypatch, base, tmp_path / "run", kl_coef=0.01, **LORA)
    kl = [row["k3_kl_ref"] for row in rows[1:]]
    assert kl[0] < 1e-6 and min(kl[1:]) > 1e-5
    assert len(loaded) == 1


def test_adapters_refuse_what_they_do_not_go_with(monkeypatch, base, tmp_path, capsys):
    for flags in (dict(fsdp=True), dict(ref_every=1), dict(lora_rank=-1)):
        assert call(monkeypatch, train_countdown, model=base, out=tmp_path / "run", **{"lora_rank": 4, **flags}) == 2
        assert "got lora_rank" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
