"""Directories of strangers: read as transformers reads them, or refused in one line that says what they are."""

import json
import shutil

import pytest
import torch
from conftest import CHAT, edit_json
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import preference
import sft
import train_countdown
from countdown import fill_template
from machinery.batching import score
from machinery.checkpoints import BrokenWeights, end_tokens, load, save
from machinery.text import encode_prompts
from sampling import Completion, sample

TEXT = "Using the numbers 3 4 5, make 27.\n\tSo: (3 + 4) ..."
SHORT = ("--steps", "2", "--batch-size", "8", "--group-size", "4", "--max-new-tokens", "8", "--eval-n", "8")


def change(directory, function):
    """Applies function to the dict of weights."""
    state = load_file(directory / "model.safetensors")
    function(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def logits(model):
    return getattr(out := model(torch.arange(5, 60)[None]), "logits", out)


# -------------------------------------------------------------------------------------------------------- the tokenizer
def test_a_tokenizer_that_loses_spaces_is_read_from_tokenizer_json(stranger, tmp_path, capfd):
    """As the DeepSeek-R1-Distill checkpoints have it: a byte-level tokenizer.json under the name LlamaTokenizerFast, of
    which AutoTokenizer makes a SentencePiece one. It is said, and what we save reads right everywhere."""
    directory = stranger(tokenizer_config=dict(tokenizer_class="LlamaTokenizerFast"))
    expected = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"] != expected
    model, tokenizer = load(directory)
    save(model, tokenizer, tmp_path / "saved")
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved"), load(tmp_path / "saved")[1]):
        ids = reader(TEXT, add_special_tokens=False)["input_ids"]
        assert ids == expected and reader.decode(ids) == TEXT
        assert reader.eos_token == "<|end|>" and reader.chat_template == CHAT
    assert "note: " in (said := capfd.readouterr().err) and str(directory) in said and "tokenizer.json" in said


@pytest.mark.parametrize("name", ("PreTrainedTokenizerFast", "Qwen2TokenizerFast", "GemmaTokenizer", "CodeLlamaTokenizer",
                                  "UnheardOfTokenizer", None))
def test_whatever_the_tokenizer_is_called_its_ids_are_those_of_tokenizer_json(name, stranger):
    directory = stranger(tokenizer_config=dict(tokenizer_class=name))
    ids = load(directory)[1](TEXT, add_special_tokens=False)["input_ids"]
    assert ids == Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids


def test_truncation_and_padding_that_stand_in_tokenizer_json_change_nothing(stranger):
    """As some training scripts leave them behind."""
    directory = stranger(tokenizer=dict(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|end|>"}))
    tokenizer = load(directory)[1]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_a_tokenizer_json_of_another_version_is_refused_by_name(stranger):
    directory = stranger(tokenizer=dict(model={"type": "BPE2"}))
    with pytest.raises(ValueError, match="tokenizer.json, which this version of tokenizers cannot read"):
        load(directory)


def test_tokens_without_a_row_of_the_embedding_are_refused_before_a_folder_is_made(stranger, refused, tmp_path):
    """add_tokens without resize_token_embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(directory := stranger())
    rows = len(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(directory)
    run = tmp_path / "run"
    refused(train_countdown, "--model", directory, "--style", "chat", "--out", run, *SHORT,
            says=(directory, f"{rows + 2} tokens", f"{rows} rows", "(<think>, </think>)", "resize_token_embeddings"))
    assert not run.exists()


# ------------------------------------------------------------------------------------------------------ where it stops
@pytest.mark.parametrize("edits, expected", (
    (dict(tokenizer_config=dict(eos_token="<|end|>"), config=dict(eos_token_id=None)), {"<|end|>"}),
    (dict(tokenizer_config=dict(eos_token=None), config=dict(eos_token_id=4)), {"<|eot|>"}),
    (dict(tokenizer_config=dict(eos_token=None), config=dict(eos_token_id=None),
          generation_config=dict(eos_token_id=4)), {"<|eot|>"}),
    (dict(generation_config=dict(eos_token_id=[1, 4], temperature=0.6)), {"<|end|>", "<|user|>", "<|eot|>"}),
    (dict(generation_config=dict(eos_token_id=None, temperature=0.6)), {"<|end|>"}),
), ids=("tokenizer", "config", "generation config", "all three", "a generation config without"))
def test_eos_counts_wherever_it_stands(edits, expected, stranger, tmp_path):
    """And the file that may be the only one with it is kept as it is."""
    directory = stranger(**edits)
    model, tokenizer = load(directory)
    assert set(tokenizer.convert_ids_to_tokens(sorted(end_tokens(model, tokenizer)))) == expected
    assert tokenizer.eos_token in expected
    save(model, tokenizer, tmp_path / "saved")
    assert end_tokens(*load(tmp_path / "saved")) == end_tokens(model, tokenizer)
    path = directory / "generation_config.json"
    if path.exists():
        assert json.loads((tmp_path / "saved" / path.name).read_text()) == json.loads(path.read_text())
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        assert not (tmp_path / "saved" / path.name).exists()


@pytest.mark.parametrize("style", ("base", "chat"))
@pytest.mark.parametrize("bos", (True, False), ids=("BOS", "no BOS"))
def test_greedy_completions_are_those_of_generate(bos, style, stranger):
    """From the text on: BOS, ids, logits, the token where it stops. The end token stands in generation_config.json alone,
    and is one that this random model writes."""
    probe = stranger("probe", bos)
    reference, theirs = AutoModelForCausalLM.from_pretrained(probe), AutoTokenizer.from_pretrained(probe)
    prompts = [fill_template(words, style, theirs) for words in ("make 27", "make 5", "make 1 from 9 9")]
    rows = [theirs(prompt, add_special_tokens=style == "base")["input_ids"] for prompt in prompts]

    def generate(model, row, **settings):  # with a mask, else it takes the <|end|> of a turn for padding
        ids = torch.tensor([row])
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0,
                              **settings)[0, len(row):].tolist()
    free = [generate(reference, row, eos_token_id=None) for row in rows]
    directory = stranger("named", bos, generation_config=dict(eos_token_id=[free[0][5], free[1][8]]))
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    model, tokenizer = load(directory)
    expected = [generate(theirs, row) for row in rows]
    assert min(map(len, expected)) < 12
    assert encode_prompts(tokenizer, prompts, style) == rows
    ours = sample(model, rows, max_new_tokens=12, temperature=0, eos_ids=end_tokens(model, tokenizer), seed=0)
    assert [c.token_ids for c in ours] == expected


# --------------------------------------------------------------------------------------------------------- the weights
def test_rotary_frequencies_among_the_weights_are_ignored(stranger):
    directory = stranger()
    expected = logits(load(directory)[0])
    change(directory, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                                                  "model.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(load(directory)[0]), expected)


def test_one_weights_file_goes_before_an_index_that_was_left_behind(stranger):
    """As transformers chooses; the old shards hold other weights."""
    directory = stranger()
    shutil.copy(directory / "model.safetensors", directory / "old.safetensors")
    names = load_file(directory / "old.safetensors")
    edit_json(directory / "model.safetensors.index.json", weight_map=dict.fromkeys(names, "old.safetensors"))
    change(directory, lambda state: state["model.norm.weight"].mul_(2))
    assert torch.allclose(logits(load(directory)[0]), logits(AutoModelForCausalLM.from_pretrained(directory)), atol=1e-4)


@pytest.mark.parametrize("drop", ((), ("lm_head.weight",), ("model.embed_tokens.weight",)),
                         ids=("both, different", "embedding alone", "head alone"))
def test_tied_embeddings_are_tied_as_transformers_ties_them(drop, stranger, tmp_path, capfd):
    directory = stranger(config=dict(tie_word_embeddings=True))
    change(directory, lambda state: [state.pop(name) for name in drop])
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    model, tokenizer = load(directory)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert ("are kept apart" in capfd.readouterr().err) == (not drop)
    save(model, tokenizer, tmp_path / "saved")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected, atol=1e-4)


def renamed(name):
    return lambda directory: (directory / "model.safetensors").rename(directory / name)


def adapter(directory):
    edit_json(directory / "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen2.5-1.5B")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "config.json").unlink()


def pointer(name):
    return lambda directory: (directory / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def moved_into(folder):
    """What a user names is the folder above: of a training run, or of the hub's cache."""
    def spoil(directory):
        (directory / folder).mkdir(parents=True)
        for path in [path for path in directory.iterdir() if path.is_file()]:
            path.rename(directory / folder / path.name)
    return spoil


def old_tokenizer(directory):
    (directory / "tokenizer.json").rename(directory / "vocab.json")


def edited(name, **changes):
    return lambda directory: edit_json(directory / name, **changes)


def broken_index(content):
    def spoil(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(content)
    return spoil


@pytest.mark.parametrize("spoil, says", (
    (adapter, ("an adapter of PEFT (LoRA)", "merge")),
    (renamed("pytorch_model.bin"), ("an unsafe .bin", "save_pretrained")),
    (renamed("pytorch_model-00001-of-00002.bin"), ("an unsafe .bin", "save_pretrained")),
    (renamed("model-Q4_K_M.gguf"), ("model-Q4_K_M.gguf", "a GGUF file", "gguf_file=")),
    (renamed("consolidated.00.pth"), ("consolidated.00.pth", "-hf")),
    (renamed("flax_model.msgpack"), ("Flax weights", "safetensors")),
    (renamed("tf_model.h5"), ("TensorFlow weights", "safetensors")),
    (pointer("model.safetensors"), ("model.safetensors, which is a Git LFS pointer", "git lfs pull")),
    (pointer("tokenizer.json"), ("tokenizer.json, which is a Git LFS pointer", "git lfs pull")),
    (edited("config.json", quantization_config={"quant_method": "awq"}), ("quantised weights (awq)", "expected float32")),
    (edited("config.json", quantization={"bits": 4, "group_size": 64}), ("quantised weights", "expected float32")),
    (edited("config.json", hidden_size="32"), ("config.json, which transformers cannot read", "hidden_size")),
    (broken_index("{"), ("corrupt or truncated", "model.safetensors.index.json")),
    (broken_index("{}"), ("model.safetensors.index.json without weight_map",)),
    (lambda d: (d / "config.json").write_text("[]"), ("config.json with a list", "expected a JSON object")),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), ("corrupt or truncated", "config.json")),
    (lambda d: (d / "generation_config.json").write_text("{"), ("corrupt or truncated", "generation_config.json")),
    (lambda d: change(d, lambda state: state.update({"lm_head.weight": state["lm_head.weight"].to(torch.int8)})),
     ("lm_head.weight as int8", "expected float32")),
    (lambda d: change(d, lambda state: state.update({"model.norm.weight": state["model.norm.weight"] * torch.nan})),
     ("model.norm.weight", "not finite (nan or inf)")),
    (moved_into("checkpoint-500"), ("without config.json", "did you mean", "checkpoint-500?")),
    (moved_into("snapshots/8faed7"), ("without config.json", "did you mean", "snapshots/8faed7?")),
    (old_tokenizer, ("without tokenizer.json", "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")),
    (renamed("__0_0.distcp"), ("an FSDP checkpoint", "merge-weights")),
    (renamed("model_world_size_4_rank_0.pt"), ("a PyTorch file", "save_pretrained")),
), ids=("PEFT", ".bin", ".bin in parts", "GGUF", ".pth", "Flax", "TensorFlow", "LFS weights", "LFS tokenizer", "AWQ", "MLX",
        "a field of a wrong type", "broken index", "empty index", "a list", "UTF-16", "broken generation config", "int8",
        "nan", "a run's folder", "the cache", "old tokenizer", "FSDP", ".pt"))
def test_what_is_no_checkpoint_for_us_is_called_by_its_name(spoil, says, stranger, refused):
    directory = stranger()
    spoil(directory)
    refused(evaluate, "--model", directory, "--style", "chat", says=(directory, *says))


def test_a_file_in_place_of_its_directory_is_said(stranger, refused):
    directory = stranger()
    refused(evaluate, "--model", directory / "model.safetensors", says=("which is a file", "expected the directory"))
    (directory / "model.safetensors").rename(directory / "model.gguf")
    refused(evaluate, "--model", directory / "model.gguf", says=("a GGUF file", "gguf_file="))


# ------------------------------------------------------------------------------------- numbers that are not finite
@pytest.fixture
def overflowing(stranger):
    """Every weight is finite, the logits are not."""
    def grow(state):
        state["lm_head.weight"].mul_(1e38)
    change(directory := stranger("overflowing"), grow)
    return directory


PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "no"}


@pytest.mark.parametrize("script, flags", (
    (evaluate, ("--n", "4", "--max-new-tokens", "8")), (train_countdown, SHORT), (sft, ("--data", "rows.jsonl")),
), ids=("evaluate", "train_countdown", "sft"))
def test_who_brought_numbers_that_are_not_finite_is_said(script, flags, overflowing, refused, tmp_path, monkeypatch, capfd):
    """The checkpoint is named, and no advice is given that cannot help: nothing has been trained yet, no good weights are
    kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"hi {i}", "completion": "hello"}) + "\n"
                                                 for i in range(8)))
    flags += () if script is evaluate else ("--out", tmp_path / "run")
    flags += ("--eval-rows", "2") if script is sft else ()
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr("sys.argv", ["x", "--model", str(overflowing), "--style", "chat", *map(str, flags)])
        script.main()
    said = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(said) == 1
    assert str(overflowing) in said[0] and ("nan" in said[0] or "inf" in said[0])
    assert "learning-rate" not in said[0] and "good weights" not in said[0]


def test_a_folder_without_a_checkpoint_does_not_block_a_retry(overflowing, stranger, monkeypatch, tmp_path, quiet_training):
    """The run above left nothing but its config.json; a good model may take the place."""
    for directory, code in ((overflowing, 2), (stranger("good"), None)):
        monkeypatch.setattr("sys.argv", ["x", "--model", str(directory), "--style", "chat", *SHORT, "--out",
                                         str(tmp_path / "run")])
        try:
            train_countdown.main()
            assert code is None
        except SystemExit as stop:
            assert stop.code == code
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == str(directory)


def test_scorers_notice_too(overflowing, base, tmp_path, monkeypatch):
    model, tokenizer = load(overflowing)
    with pytest.raises(BrokenWeights, match=str(overflowing)):
        score(model, [([5, 6], Completion([7, 8], [0.0, 0.0], False))], 1.0, 100, "cpu")
    judge = preference.RewardModel(load(base)[0])
    with torch.no_grad():
        judge.score.weight.fill_(torch.inf)
    with pytest.raises(BrokenWeights, match=f"scores from {base}"):
        preference.preference_scores(judge, load(base)[1], ["hi\n"], ["hello"])
    from experiments.scorer import score_positions
    with pytest.raises(BrokenWeights, match=f"scores from {base}"):
        score_positions(judge, [[1, 2, 3]], [[2]])


# -------------------------------------------------------------------------------- what a hostile reader found beside these
@pytest.mark.parametrize("config, says", (
    (dict(is_causal=False), "is_causal=False"), (dict(num_key_value_heads=3), "the key/value heads divide"),
    (dict(num_hidden_layers=0), "at least 1 each"), (dict(max_position_embeddings=10 ** 10), "at most"),
    (dict(eos_token_id="4"), "eos_token_id"), (dict(eos_token_id=9999), "eos_token_id 9999"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": "1000"}), "rope"),
), ids=str)
def test_a_config_that_cannot_be_computed_is_refused(config, says, stranger):
    with pytest.raises(ValueError, match=says):
        load(stranger(config=config))


def test_an_original_context_outside_of_the_rope_parameters_counts(stranger):
    rope = dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)
    directory = stranger(config=dict(rope_parameters=rope, original_max_position_embeddings=16))
    assert torch.allclose(logits(load(directory)[0]), logits(AutoModelForCausalLM.from_pretrained(directory)), atol=1e-4)


@pytest.mark.parametrize("prefix, name", (("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")))
def test_weights_saved_from_inside_a_wrapper_are_called_that(prefix, name, stranger):
    directory = stranger()
    state = load_file(directory / "model.safetensors")
    save_file({prefix + key: tensor for key, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"saved from inside {name}"):
        load(directory)


def test_a_tokenizer_that_is_missing_beside_good_weights_is_what_is_said(stranger):
    """A checkpoint of a trainer, with its own state in .pt and .pth files."""
    directory = stranger()
    (directory / "tokenizer.json").unlink()
    for name in ("optimizer.pt", "rng_state.pth"):
        (directory / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="without tokenizer.json"):
        load(directory)


def test_training_ends_completions_where_generate_stops(stranger, capfd):
    """The tokenizer's EOS is token 0, both configs say 4, as in a checkpoint whose tokenizer was converted carelessly."""
    from machinery.checkpoints import generate_ends
    model, tokenizer = load(stranger(config=dict(eos_token_id=4), generation_config=dict(eos_token_id=4)))
    rows = [{"prompt": "a", "completion": "b"}]
    (_, completion), = sft.tokenize(rows, tokenizer, "x", "base", generate_ends(model))
    assert completion[-1] == 4 and "configs end at <|eot|>" in capfd.readouterr().err
    assert end_tokens(model, tokenizer) == {0, 4}


def test_a_teacher_with_a_higher_embedding_teaches_the_tokens_that_both_have(stranger, monkeypatch, tmp_path):
    """As Qwen2.5-7B and 0.5B: the same tokenizer, 152,064 and 151,936 rows. The KL of a model to itself stays 0."""
    from machinery.batching import pad_batch, teacher_kl
    model, _ = load(directory := stranger())
    higher = tmp_path / "higher"
    shutil.copytree(directory, higher)
    rows = model.config.vocab_size

    def grow(state):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            state[name] = torch.cat([state[name], torch.ones(16, state[name].shape[1])])
    change(higher, grow)
    edit_json(higher / "config.json", vocab_size=rows + 16)
    input_ids, mask = pad_batch([[5, 6]], [[7, 8, 9]])
    assert teacher_kl(model, load(higher)[0], input_ids, mask).abs().max() < 1e-5


def test_a_teacher_with_less_room_is_refused_before_a_folder_is_made(stranger, refused, tmp_path):
    teacher = stranger("teacher", config=dict(max_position_embeddings=8))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"make {i}", "completion": "a" * 20}) + "\n" for i in range(8)))
    refused(sft, "--model", stranger(), "--teacher", teacher, "--data", data, "--style", "base", "--eval-rows", "2", "--out",
            tmp_path / "run", says=("got a row of", "context of 8"))
    assert not (tmp_path / "run").exists()
