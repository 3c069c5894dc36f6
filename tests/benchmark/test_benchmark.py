"""What the benchmark counts and how it compares; how fast anything is depends on the machine and is not tested."""

import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from benchmark import speed as benchmark, timing
from benchmark.speed import Config, format_table, random_models, table_rows
from benchmark.timing import DoesNotRun, Result, Workload, alternate, decode_bytes, matrix_parameters, training_flops
from machinery.plots import plot_growth
from model import Model

# width D, layers L, query heads H, key/value heads K, head dimension E, MLP I, vocabulary V
SHAPE = SimpleNamespace(hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=3, intermediate_size=5,
                        vocab_size=7)
LAYERS = 2 * (4 * 6 + 4 * 3 + 4 * 3 + 6 * 4 + 3 * 4 * 5)  # q, k, v, o, MLP: 2 * 132 = 264
HEAD = 7 * 4
CONFIG = Config(out="none.json", repeats=2)


# ------------------------------------------------------------------------------------------------------------- formulas
def test_matrix_parameters_are_those_of_qwen_0_5b():
    """494,032,768 parameters by its model card; 71,552 of them are norms and biases of q, k and v."""
    hf_config = Qwen2Config(**benchmark.QWEN["qwen0.5b"], num_key_value_heads=2, vocab_size=151936,
                            tie_word_embeddings=True, max_position_embeddings=64)
    with torch.device("meta"):
        model = Model(hf_config)
    norms_and_biases = (2 * 24 + 1) * 896 + 24 * (896 + 128 + 128)
    assert sum(matrix_parameters(model.config)) == 494_032_768 - norms_and_biases
    assert matrix_parameters(SHAPE) == (LAYERS, HEAD) == (264, 28)


def test_decode_reads_weights_and_cache_once_a_step():
    """2 rows with prompts of 3, 2 steps, 4 bytes: the weights twice; 4 cached tokens a row at step 1 and 5 at step 2,
    of 2*L*K*E = 12 numbers each."""
    weights, cache = 2 * (264 + 28) * 4, 2 * (4 + 5) * 12 * 4
    assert decode_bytes(SHAPE, rows=2, prompt_tokens=3, steps=2, bytes_per_number=4) == weights + cache == 2336 + 864


def test_training_flops():
    """2 rows, prompt 1, completion 3: 3 tokens pass through the layers, 3 are scored by the head, 6 FLOPs a weight.
    Attention: the tokens see 1, 2 and 3 others, 4*H*E = 24 FLOPs each, 2 layers, and thrice for the backward pass."""
    matrices, attention = 2 * 6 * (264 * 3 + 28 * 3), 2 * 3 * 2 * 24 * (1 + 2 + 3)
    assert training_flops(SHAPE, rows=2, prompt_tokens=1, completion_tokens=3) == matrices + attention == 10512 + 1728


def test_head_is_not_needed_for_prompts():
    """3 more prompt tokens, one row: 6 FLOPs for every weight of the layers and none of the head."""
    short, long = (training_flops(SHAPE, rows=1, prompt_tokens=p, completion_tokens=2) for p in (1, 4))
    assert long - short == 6 * 264 * 3 + 3 * 2 * 24 * (3 + 4 + 5)


# ------------------------------------------------------------------------------------------------------------- counting
class HandMade:
    """Stands in for transformers' model: generate returns its inputs and, behind them, these completions."""

    def __init__(self, completions):
        self.completions = torch.tensor(completions)

    def generate(self, input_ids, attention_mask):
        self.input_ids, self.attention_mask = input_ids, attention_mask
        return torch.cat([input_ids, self.completions], dim=1)


def test_generate_counts_eos_and_no_padding():
    """Padding is EOS again, as in SmolLM2: 2 tokens with EOS, 4 truncated ones, 1 that is EOS itself."""
    model = HandMade([[5, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])
    tokens, seconds = timing.time_generate(model, Workload("", [[3, 4], [3], [0, 3]], 4, frozenset({0})), "cpu")
    assert tokens == 2 + 4 + 1 and seconds > 0
    assert model.input_ids.tolist() == [[3, 4], [0, 3], [0, 3]]
    assert model.attention_mask.tolist() == [[1, 1], [0, 1], [1, 1]]  # a 0 that belongs to the prompt is not padding


def test_generate_stops_counting_at_any_eos():
    tokens, _ = timing.time_generate(HandMade([[5, 9, 0, 0], [5, 6, 0, 0]]),
                                     Workload("", [[3], [3]], 4, frozenset({9, 6})), "cpu")
    assert tokens == 2 + 2


def test_ours_counts_all_tokens_of_the_completions(monkeypatch):
    monkeypatch.setattr(timing, "sample", lambda *_, **__: [SimpleNamespace(token_ids=[5, 0]),
                                                            SimpleNamespace(token_ids=[5, 6, 7])])
    assert timing.time_ours(None, Workload("", [[3], [3]], 3, frozenset({0})), "cpu", seed=0)[0] == 2 + 3


@pytest.fixture(scope="module")
def models():
    return random_models(Qwen2Config(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
                                     eos_token_id=7, max_position_embeddings=64), torch.float32, CONFIG)


def test_shared_weights_give_equal_logits(models):
    """One set of tensors, two programs."""
    model, hf_model = models
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf_model(ids).logits, rtol=1e-4, atol=1e-5)
    theirs = dict(hf_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name


needs_psutil = pytest.mark.skipif(not find_spec("psutil"), reason="transformers' continuous batching asks psutil for "
                                  "a CPU's free memory: pip install psutil")


@pytest.mark.parametrize("name", ["ours", "transformers.generate",
                                  pytest.param("transformers continuous batching", marks=needs_psutil),
                                  "transformers.generate"])  # again: continuous batching leaves the model as it was
def test_without_eos_every_sampler_writes_all_tokens(models, name):
    """Also where the model's own config names an EOS: 4 prompts of different lengths, 12 tokens each."""
    workload = Workload("", [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], 12)
    run = benchmark.samplers(*models, workload, CONFIG)[name]
    tokens, seconds = run(0)
    assert tokens == 4 * 12 and seconds > 0


def test_without_psutil_the_row_says_what_to_install(models, monkeypatch):
    """transformers takes a CPU's free memory for 0 then, and says no more than MemoryError. The model is left as it
    was: generate still runs."""
    monkeypatch.setattr("transformers.generation.continuous_batching.requests.is_psutil_available", lambda: False)
    monkeypatch.setattr(timing, "find_spec", lambda name: None)
    workload = Workload("", [[1, 2, 3], [4]], 3)
    with pytest.raises(DoesNotRun, match="^pip install psutil; MemoryError"):
        timing.time_continuous(models[1], workload, "cpu")
    assert timing.time_generate(models[1], workload, "cpu")[0] == 2 * 3


# ------------------------------------------------------------------------------------------------------------ comparing
def test_runners_alternate_and_the_first_round_does_not_count():
    calls = []

    def runner(name, speeds):
        return lambda round_number: calls.append((name, round_number)) or (speeds[round_number], 0.5)

    results = alternate({"ours": runner("ours", [1, 10, 20]), "other": runner("other", [1, 3, 4])}, CONFIG)
    assert calls == [("ours", 0), ("other", 0), ("ours", 1), ("other", 1), ("ours", 2), ("other", 2)]
    assert results["ours"].speeds == [20, 40] and results["other"].speeds == [6, 8]


def test_what_does_not_run_is_said_and_stops_nothing():
    def broken(round_number):
        raise DoesNotRun("no paged\n  kernel | here")

    rows = table_rows("sampling", "tokens/s", alternate({"ours": lambda _: (8, 2), "theirs": broken}, CONFIG))
    assert rows[0]["ours"]["speeds"] == [4, 4] and rows[0]["ratio"] is None
    assert "| theirs: does not run on cpu: no paged kernel / here | - " in format_table(rows).splitlines()[2]


def test_ratio_is_that_of_medians():
    """20 / 5: a round that was twenty times faster than the others (100) changes the range only."""
    rows = table_rows("decode", "GB/s", {"ours": Result([10e9, 60e9, 20e9]), "memory": Result([5e9, 4e9, 100e9])}, 1e-9)
    assert rows[0]["ratio"] == pytest.approx(4.0)
    cells = [cell.strip() for cell in format_table(rows).splitlines()[2].split("|")]
    assert cells[1:-1] == ["decode", "GB/s", "20 (10 to 60)", "memory: 5 (4 to 100)", "4"]


def test_memory_has_a_column_where_it_was_measured():
    rows = table_rows("sampling", "tokens/s", {"ours": Result([8.0], peak_gib=1.25), "other": Result([4.0], 2.5)})
    assert format_table(rows).splitlines()[0].endswith("| peak GiB, ours / other |")
    assert format_table(rows).splitlines()[2].rstrip(" |").endswith("1.2 / 2.5")


# ----------------------------------------------------------------------------------------------------- the whole script
def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    benchmark.main()


@pytest.mark.parametrize("flags, says", [
    (("--sizes", "tiny,huge"), "got size 'huge' in --sizes, expected some of tiny,smollm2"),
    (("--sizes", "smollm2"), "expected --smollm2 with a directory"),
    (("--repeats", 0), "got repeats 0, expected at least 1"),
    (("--steps", 1), "got steps 1, expected at least 2"),
    (("--growth-seconds", 0), "got growth_seconds 0.0, expected more than 0"),
    (("--dtype", "fp64"), "dtype 'fp64', expected cpu or cuda, and float32 or bfloat16"),
    (("--device", "gpu"), "got device 'gpu'"),
    (("--max-new-tokens", 3000), "lower --max-new-tokens"),
    (("--model", "no/such/place"), "got model 'no/such/place'"),
])
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--out", tmp_path / "b.json", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


def test_unknown_flag_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--out", tmp_path / "b.json", "--repeat", 3)
    assert stop.value.code == 2


def test_table_and_json_are_written_and_never_overwritten(monkeypatch, tmp_path, capsys):
    """Two tiny-base completions; the ratio that is printed is the one in the file, or a dash and why there is none."""
    out = tmp_path / "new" / "b.json"
    flags = ("--no-trl", "--no-limits", "--prompts", 1, "--group-size", 2, "--max-new-tokens", 4, "--repeats", 1)
    run(monkeypatch, *flags, "--out", out)
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["other"]["name"] for row in report["rows"]] == ["transformers.generate",
                                                                "transformers continuous batching"]
    for row, line in zip(report["rows"], printed.splitlines()[-2:]):
        if row["other"]["name"].endswith("batching") and not find_spec("psutil"):
            assert row["ratio"] is None and "does not run on cpu: pip install psutil" in line
            continue
        assert row["ratio"] == pytest.approx(row["ours"]["speeds"][0] / row["other"]["speeds"][0])
        assert line.split("|")[5].strip() == f"{row['ratio']:.3g}"
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags, "--out", out)
    assert stop.value.code == 2 and "exists; name a new file with --out" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_growth_ends_a_curve_at_its_first_slow_point(models, monkeypatch, tmp_path):
    """generate takes 100 seconds from batch 2 on, so 2 is its last point; the picture is written all the same."""
    def taking(seconds):
        return lambda _, work, *__: (len(work.prompts) * work.max_new_tokens, seconds(len(work.prompts)))

    monkeypatch.setattr(benchmark, "GROWTH", {"batch": (1, 2, 4), "length": (8, 16)})
    monkeypatch.setattr(benchmark, "time_ours", taking(lambda rows: 2.0))
    monkeypatch.setattr(benchmark, "time_generate", taking(lambda rows: 100.0 if rows > 1 else 1.0))
    growth = benchmark.measure_growth(*models, Config(out="none.json", repeats=1, growth_seconds=50.0))
    assert growth["batch"]["ours"] == {1: [64.0], 2: [128.0], 4: [256.0]}
    assert growth["batch"]["transformers.generate"] == {1: [128.0], 2: [2.56]}
    assert growth["length"]["ours"] == {8: [64.0], 16: [128.0]}
    picture = plot_growth(growth, tmp_path / "growth.png", "")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_page_of_speed_has_the_committed_table_and_ratios():
    """docs/speed: what three runs wrote, and the growth of a fourth."""
    docs = Path(benchmark.__file__).parent.parent / "docs"
    page, found = (docs / "speed.md").read_text(), {path.stem: json.loads(path.read_text()) for path in (docs / "speed").glob("*.json")}
    assert format_table([row for name in ("samplers", "smollm2", "step") for row in found[name]["rows"]]) in page
    ratios = {axis: {x: statistics.median(speeds) / statistics.median(curves["transformers.generate"][x])
                     for x, speeds in curves["ours"].items() if x in curves["transformers.generate"]}
              for axis, curves in found["growth"]["growth"].items()}
    every, (most, ratio) = [own for axis in ratios.values() for own in axis.values()], list(ratios["batch"].items())[-1]
    assert (f"{min(every):.2g} to {max(every):.1f} times `generate` over all points, {ratio:.1f} times at {most} sequences"
            in page)
