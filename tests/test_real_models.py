"""What only real checkpoints need: bf16, large vocabularies, CUDA graphs, presets, and running out of memory."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train_countdown
from machinery import run_folder
from machinery.batching import pad_batch, token_logprobs
from machinery.checkpoints import load, save
from machinery.flags import out_of_memory_exits, parse_config
from machinery.presets import PRESETS
from model import KVCache, Model, init_weights
from sampling import inverse_cdf, sample
from test_model import CONFIGS, SMALL, write
from test_training import call, interrupt, quiet_machine, rows_of, train  # noqa: F401

LONG = 300  # tokens: an angle in bf16 is off by up to 1 there
IDS = torch.randint(0, 263, (2, LONG), generator=torch.Generator().manual_seed(0))  # (B, T)
V = 5000    # tokens: more than inverse_cdf puts into one block


# ----------------------------------------------------------------------------------------------------------------- bf16
def reference(name: str, directory):
    """test_model.reference with room for 300 positions, written and read in bf16. (model.bfloat16() would round its
    rotary frequencies too; from_pretrained does not.)"""
    config_class, settings = CONFIGS[name]
    config = config_class(**{**SMALL, **settings, "max_position_embeddings": 512}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 * (parameter.dim() == 1), 0.15, generator=generator)
    write(model.to(torch.bfloat16), directory)
    return AutoModelForCausalLM.from_pretrained(directory)


@torch.no_grad()
def one_pass(model):
    return getattr(out := model(IDS), "logits", out)


@torch.no_grad()
def prefill_and_steps(model):
    """280 tokens in one pass, 20 single ones after it."""
    cache = KVCache(model.config, rows=2, columns=LONG, dtype=torch.bfloat16)
    pieces = [model(IDS[:, :280], cache=cache)]
    for t in range(280, LONG):
        mask = torch.zeros(2, 1, 1, t + 1, dtype=torch.bfloat16)
        pieces.append(model(IDS[:, t:t + 1], positions=torch.full((2, 1), t), cache=cache, mask=mask))
    return torch.cat(pieces, dim=1)


def distance(a, b) -> float:
    """Mean distance of the logits of the last 20 tokens, the ones far from position 0."""
    return (a[:, -20:].float() - b[:, -20:].float()).abs().mean().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_logits_are_those_of_transformers_in_bf16(name, tmp_path):
    """Rounding alone: 0.0034 to 0.0078 apart on average, of logits of deviation 0.9, and 0.074 at most. Rotary angles
    computed in bf16 make 0.021 to 0.097, a missing q_norm 0.15. (A softmax or a norm in bf16 hides in the rounding:
    0.004 to 0.0095. The next test finds the norm.)"""
    theirs = reference(name, tmp_path / "hf")
    model, _ = load(tmp_path / "hf", dtype=torch.bfloat16)
    expected = one_pass(theirs)
    assert expected.dtype == torch.bfloat16 and 0.7 < expected.float().std() < 1.1
    for logits in (one_pass(model), prefill_and_steps(model)):
        assert logits.dtype == torch.bfloat16 and (logits - expected).abs().max() < 0.11
        assert distance(logits, expected) < 0.01

    angles = torch.outer(torch.arange(512).bfloat16(), model.cos[1, :model.config.head_dim // 2].acos().bfloat16())
    model.cos, model.sin = angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    assert distance(one_pass(model), expected) > 0.018  # the tolerance above can fail


def test_a_norm_in_bf16_computes_in_fp32():
    """The mean of squares, the root and the quotient are fp32, and rounded to bf16 twice: before the weight and after.
    Transformers' norm does the same; a norm that computes in bf16 differs in a quarter of all numbers."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    from model import RMSNorm
    ours, theirs = RMSNorm(256, 1e-6).bfloat16(), Qwen3RMSNorm(256, 1e-6).bfloat16()
    x = (3 * torch.randn(200, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.no_grad():
        ours.weight.normal_(1, 0.2, generator=torch.Generator().manual_seed(1))
        theirs.weight.copy_(ours.weight)
        assert (ours(x) != theirs(x)).float().mean() < 0.01
        all_in_bf16 = ours.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        assert (all_in_bf16 != theirs(x)).float().mean() > 0.1


@pytest.mark.parametrize("name", ("qwen2", "qwen3", "llama3"))
def test_transformers_loads_a_saved_bf16_checkpoint(name, tmp_path):
    """As bf16, without being told, and with the logits of the checkpoint that we read."""
    theirs = reference(name, tmp_path / "hf")
    model, tokenizer = load(tmp_path / "hf", dtype=torch.bfloat16)
    save(model, tokenizer, tmp_path / "ours")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.dtype == torch.bfloat16
    assert torch.equal(one_pass(reread), one_pass(theirs))
    assert torch.equal(one_pass(load(tmp_path / "ours", dtype=torch.bfloat16)[0]), one_pass(model))


@pytest.mark.parametrize("name", ("qwen2", "qwen3"))
def test_activation_checkpointing_changes_no_gradient(name):
    """It computes a block's forward pass twice, and nothing else."""
    gradients, passes = [], []
    for checkpointing in (False, True):
        config_class, settings = CONFIGS[name]
        model = Model(config_class(**{**SMALL, **settings}, tie_word_embeddings=True))
        init_weights(model, seed=0)
        model.activation_checkpointing = checkpointing
        runs = []
        model.model["layers"][0].register_forward_pre_hook(lambda *_: runs.append(1))
        input_ids, mask = pad_batch([[1, 2, 3], [4, 5]], [[6, 7, 8], [9, 10]])
        token_logprobs(model, input_ids, mask)[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        passes.append(len(runs))
    assert passes == [1, 2]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    assert gradients[0]["model.layers.0.mlp.up_proj.weight"].abs().max() > 0


# --------------------------------------------------------------------------------------------------- large vocabularies
@pytest.fixture(scope="module")
def wide_model():
    """A vocabulary of 5,000, weights large enough that the most likely token has a few percent."""
    config_class, settings = CONFIGS["qwen2"]
    model = Model(config_class(**{**SMALL, **settings, "vocab_size": V}, tie_word_embeddings=False))
    init_weights(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 20
    return model


PROMPTS = [np.random.default_rng(i).integers(0, V, length).tolist() for i, length in enumerate((3, 9, 2, 5, 5, 12))] * 2
SETTINGS = dict(max_new_tokens=24, eos_ids=set(range(0, V, 25)), seed=3, slots=5)  # a token in 25 ends a completion


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0, 1.0)))
def test_fixed_shapes_give_the_same_tokens(wide_model, temperature, top_p):
    """static=True is what a GPU runs, here without its graphs: 16 steps between two looks, a window of whole multiples
    of 128 columns, rows dropped by halves."""
    plain, static = (sample(wide_model, PROMPTS, temperature=temperature, top_p=top_p, static=static, **SETTINGS)
                     for static in (False, True))
    assert [c.token_ids for c in static] == [c.token_ids for c in plain]
    assert [c.truncated for c in static] == [c.truncated for c in plain]
    for ours, theirs in zip(static, plain, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    lengths = {len(c.token_ids) for c in plain}
    assert len(lengths) > 4 and len({token for c in plain for token in c.token_ids}) > 30


def test_blocks_choose_what_a_plain_cumulative_sum_chooses():
    """The first token whose cumulative weight exceeds uniform * total; a third of the weights are zero, also the first
    and the last ones, and a zero weight is never chosen."""
    rng = np.random.default_rng(0)
    weights = rng.random((4, V)) * (rng.random((4, V)) > 1 / 3)
    weights[:, :40] = weights[:, -300:] = 0
    weights[1] *= rng.random(V) ** 20  # nearly all of it on a few tokens
    weights = torch.from_numpy(weights).float()
    cumulative = np.cumsum(weights.double().numpy(), axis=1)
    for uniform in [0.0, 2 ** -53, 1 - 2 ** -53, *rng.random(500)]:
        chosen = inverse_cdf(weights, torch.full((4,), uniform, dtype=torch.float64)).tolist()
        for row, token in enumerate(chosen):
            assert weights[row, token] > 0
            target = uniform * cumulative[row, -1]
            before = cumulative[row, token] - weights[row, token].item()
            slack = 1e-12 * cumulative[row, -1]  # sums in another order
            assert before - slack <= target <= cumulative[row, token] + slack
    first, last = (weights[0] > 0).nonzero()[[0, -1], 0].tolist()
    ends = inverse_cdf(weights[:1].repeat(2, 1), torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64))
    assert ends.tolist() == [first, last]


@pytest.mark.parametrize("size", (900, V))
def test_rounding_never_leads_past_the_last_weight(size):
    """Weights over ten orders of magnitude: their sum and the end of their cumulative sum differ in the last bits, and
    uniform * sum can lie above it. What follows the last token, as the padding of an embedding matrix, has weight 0."""
    weights = torch.exp(5 * torch.randn(300, size, generator=torch.Generator().manual_seed(0)))
    weights[:, -60:] = 0
    chosen = inverse_cdf(weights, torch.full((300,), 1 - 2 ** -53, dtype=torch.float64))
    assert (weights.gather(1, chosen[:, None]) > 0).all()


@pytest.mark.parametrize("where", (0, 127, 128, 1023, 1024, 2500, 4999), ids=str)
def test_a_rare_token_between_big_ones_is_found(where):
    """All weights are zero, but for a token of 1e-9 at the edges of blocks and its neighbours of 1. In fp32 1 + 1e-9 is
    1, and no uniform number would lead to it."""
    weights = torch.zeros(3, V)
    big = [token for token in (where - 1, where + 1) if 0 <= token < V]
    weights[:, big], weights[:, where] = 1.0, 1e-9
    below = float(where - 1 in big)
    total = len(big) + 1e-9
    uniforms = torch.tensor([(below + share * 1e-9) / total for share in (0.5, -0.5, 1.5)], dtype=torch.float64)
    chosen = inverse_cdf(weights, uniforms.clamp(0, 1 - 2 ** -53)).tolist()
    assert chosen[0] == where
    assert chosen[1] == (where - 1 if below else where) and chosen[2] == (where + 1 if where + 1 in big else where)


# ---------------------------------------------------------------------------------------------------------- CUDA graphs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and PyTorch sees none")
def test_captured_steps_give_the_same_tokens_on_a_gpu(wide_model, capsys):
    """A replayed graph against the plain path, both on the GPU. fp32: the same tokens, log-probs within 1e-4. bf16: the
    log-probs that trainer and sampler give the sampled tokens differ by rounding; the gap is printed."""
    model = wide_model.to("cuda")
    try:
        plain, captured = (sample(model, PROMPTS, static=static, **SETTINGS) for static in (False, True))
        assert [c.token_ids for c in captured] == [c.token_ids for c in plain]
        for ours, theirs in zip(captured, plain, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)

        model.bfloat16()
        model.cos, model.sin = model.cos.float(), model.sin.float()
        captured = sample(model, PROMPTS, static=True, **SETTINGS)
        input_ids, mask = pad_batch(PROMPTS, [c.token_ids for c in captured], device="cuda")
        with torch.no_grad():
            logprobs, _ = token_logprobs(model, input_ids, mask)
        sampled = torch.tensor([value for c in captured for value in c.logprobs], device="cuda")
        gap = (logprobs[mask > 0] - sampled).abs()
        with capsys.disabled():
            print(f"\nbf16 log-prob gap on {torch.cuda.get_device_name()}: mean {gap.mean():.4f}, max {gap.max():.4f}")
        assert gap.mean() < 0.05
    finally:
        model.to("cpu", torch.float32)


# ---------------------------------------------------------------------------------------------------- presets and flags
def parsed(*flags):
    return parse_config(train_countdown.Config, "", list(flags), presets=PRESETS,
                        changeable=train_countdown.CHANGEABLE)


def refusal(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_named_set_of_values(name):
    """Every name is a field of Config, the whole is valid, and what a preset does not name keeps its default."""
    default = dataclasses.asdict(train_countdown.Config())
    assert PRESETS[name].keys() <= default.keys()
    assert dataclasses.asdict(parsed("--preset", name)) == default | PRESETS[name]


def test_flags_override_a_preset():
    """Also where the flag gives the very default of the script, which a comparison with defaults would not notice."""
    default = train_countdown.Config()
    preset = PRESETS["gpu-24gb"]
    assert preset["slots"] != default.slots and preset["dtype"] != default.dtype and preset["offload_optimizer"]
    for flags in (["--preset", "gpu-24gb"], []):
        before, after = flags, [] if flags else ["--preset", "gpu-24gb"]
        config = parsed(*before, "--slots", str(default.slots), "--dtype", default.dtype, "--no-offload-optimizer",
                        "--steps", "3", *after)
        assert (config.slots, config.dtype, config.offload_optimizer, config.steps) == (
            default.slots, default.dtype, False, 3)
        assert config.model == preset["model"] and config.activation_checkpointing is True


def test_an_unknown_preset_is_refused_with_the_names(capsys):
    error = refusal(capsys, "--preset", "gpu-8gb")
    assert "--preset: invalid choice: 'gpu-8gb'" in error and all(name in error for name in PRESETS)


def test_a_preset_is_checked_together_with_the_flags(capsys):
    """256 completions in groups of 7 cannot be."""
    assert "got group_size 7, which must divide batch_size 256; try 8" in refusal(
        capsys, "--preset", "gpu-24gb", "--group-size", "7")


def test_a_run_is_resumed_with_other_memory_settings_only(tmp_path, capsys):
    """What changes memory and speed may stand beside --resume; what changes the algorithm may not, nor a preset. All
    other values are the run's own, not the defaults."""
    run = tmp_path / "run"
    run_folder.create_run(run, train_countdown.Config(steps=7, slots=9, learning_rate=0.5, micro_batch_tokens=100))
    config = parsed("--resume", str(run), "--slots", "3", "--activation-checkpointing")
    assert (config.resume, config.slots, config.activation_checkpointing) == (str(run), 3, True)
    assert (config.steps, config.learning_rate, config.micro_batch_tokens) == (7, 0.5, 100)
    for flags in (["--learning-rate", "1"], ["--slots", "3", "--steps", "7"], ["--preset", "gpu-24gb"]):
        error = refusal(capsys, "--resume", str(run), *flags)
        assert f"got --resume together with {flags[-2]}" in error
        assert "or with --micro-batch-tokens, --slots" in error


def test_other_memory_settings_continue_the_same_run(monkeypatch, base, tmp_path):
    """Fewer slots and smaller micro-batches: the same tokens and, but for the order of sums, the same numbers."""
    expected = train(monkeypatch, base, tmp_path / "whole", learning_rate=1e-4)
    run = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt(patch, train_countdown, run, rows=2, how="stopped")
        train(patch, base, run, code=130, learning_rate=1e-4)
    seen, complete = [], train_countdown.complete
    monkeypatch.setattr(train_countdown, "complete", lambda *args, **settings: seen.append(settings["slots"]) or
                        complete(*args, **settings))
    assert call(monkeypatch, train_countdown, resume=run, slots=3, micro_batch_tokens=64) is None
    assert seen == [3, 3, 3]
    for row, other in zip(rows_of(run), expected, strict=True):
        assert row == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in other.items()}
    assert json.loads((run / "config.json").read_text())["slots"] == train_countdown.Config().slots


# -------------------------------------------------------------------------------------------------------- out of memory
@pytest.mark.parametrize("error, amount", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.6 GiB"),
     " (Tried to allocate 2.50 GiB)"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 123 bytes. Error code 12 (Cannot allocate memory)"), " (tried to allocate 123 bytes)"),
    (MemoryError(), ""),
), ids=("CUDA", "CPU", "Python"))
def test_out_of_memory_is_one_line_with_advice(error, amount, capsys):
    with pytest.raises(SystemExit) as stop, out_of_memory_exits("lower --slots"):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: out of memory{amount}; lower --slots\n"


@pytest.mark.parametrize("error", (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("slots"),
                                   KeyboardInterrupt()), ids=("RuntimeError", "KeyError", "Ctrl-C"))
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught, out_of_memory_exits("lower --slots"):
        raise error
    assert caught.value is error


def test_a_real_allocation_that_fails_is_recognised(capsys):
    """A pebibyte: the message is this PyTorch's own."""
    with pytest.raises(SystemExit), out_of_memory_exits("lower --slots"):
        torch.empty(2 ** 50)
    assert f"(tried to allocate {4 * 2 ** 50} bytes); lower --slots" in capsys.readouterr().err


def test_training_that_runs_out_of_memory_keeps_its_checkpoint(monkeypatch, base, tmp_path, capsys):
    """In step 3: one line that names the flags, exit code 2, and the run can be resumed with them to the end."""
    calls, backward = [], train_countdown.grpo_loss

    def full(*args, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return backward(*args, **settings)
    monkeypatch.setattr(train_countdown, "grpo_loss", full)
    rows = train(monkeypatch, base, tmp_path / "run", code=2)
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and "(Tried to allocate 1.00 GiB); lower --micro-batch-tokens" in error[0]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert call(monkeypatch, train_countdown, resume=tmp_path / "run", micro_batch_tokens=1000) is None
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3, 4]
