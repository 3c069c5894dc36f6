"""Puts the repository root on sys.path, so that `pytest` finds the scripts from any directory; the whole suite in several
processes; models that many use."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16)
HELPERS = min(os.cpu_count() or 1, 4)  # processes beside the first: one more than cores in all, since some tests wait
CLAIMS = os.environ.pop("CLAIMED_TEST_FILES", "")  # a folder: what of the suite one of the processes has taken
OURS, OTHERS, PARENT = set(), [], os.getppid() if CLAIMS else 0  # 0: this is the first process


def pytest_sessionstart(session):
    """pytest without any flag: other processes take test files, too. The models are tiny: a core for each process is faster
    than several for one."""
    global CLAIMS
    if CLAIMS or session.config.invocation_params.args or Path.cwd() != ROOT or HELPERS < 2:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CLAIMS = tempfile.mkdtemp(prefix="claims-")
    for _ in range(HELPERS):
        said = tempfile.TemporaryFile("w+")
        OTHERS.append((said, subprocess.Popen([sys.executable, "-m", "pytest"], stdout=said, stderr=said,
                                              env={**os.environ, "CLAIMED_TEST_FILES": CLAIMS})))


def pytest_runtest_protocol(item, nextitem):
    """True: done, as another process does it."""
    if PARENT and os.getppid() != PARENT:
        os._exit(1)  # the first process was killed
    if CLAIMS and item.path not in OURS:
        try:
            os.mkdir(os.path.join(CLAIMS, "-".join(item.path.parts[-3:])))
            OURS.add(item.path)
        except FileExistsError:
            item.session._setupstate.teardown_exact(nextitem)  # what the last test of another folder has left to it
            return True


def pytest_sessionfinish(session):
    for said, process in OTHERS:
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            process.terminate()
        failed = process.wait()
        said.seek(0)
        lines = said.read().splitlines()
        print("\n\nin another process:", *(lines if failed else lines[-1:]), sep="\n")
        session.exitstatus = session.exitstatus or failed
    if OTHERS:
        shutil.rmtree(CLAIMS)


@pytest.fixture
def quiet_training(monkeypatch):
    """Training takes Ctrl-C for itself, the test takes it back. A picture takes a second, and few tests need one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    from machinery import rl_run
    monkeypatch.setattr(rl_run, "plot_run", lambda run: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a random model of one layer over the corpus's vocabulary, a little sharper than new weights."""
    import torch

    import sft
    from machinery.checkpoints import save
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "test", TINY)
        model, tokenizer = sft.new_model("test", seed=0)
    with torch.no_grad():
        model.model["embed_tokens"].weight *= 5
    save(model, tokenizer, directory := tmp_path_factory.mktemp("base") / "model")
    return directory


CHAT = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture
def stranger(tmp_path):
    """stranger(...): the directory of a small random Llama with a byte-level tokenizer, as people bring them.

    bos: the tokenizer puts <|begin|> first. template: of chats. edits: {file: {key: value, or None for no such key}}."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    def write(name="stranger", bos=False, template=CHAT, **edits):
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<|end|>", "<|user|>", "<|assistant|>", "<|begin|>", "<|eot|>"]
        raw.train_from_iterator(["using 3 4 5 make 27 the numbers"] * 3, trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if bos:
            raw.post_processor = processors.TemplateProcessing(
                single="<|begin|> $A", special_tokens=[("<|begin|>", raw.token_to_id("<|begin|>"))])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|begin|>")
        tokenizer.chat_template = template
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=0,
            bos_token_id=3))
        with torch.no_grad():
            model.lm_head.weight *= 20
        model.save_pretrained(directory := tmp_path / name)
        tokenizer.save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        for file, changes in edits.items():
            edit_json(directory / f"{file}.json", **changes)
        return directory
    return write


def edit_json(path, **changes):
    """Sets keys of a JSON file, which is made where there is none; None removes the key."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def refused(monkeypatch, capfd):
    """refused(script, *flags, says=...): exit code 2 and exactly one error line, which says all of that."""
    def run(script, *flags, says: tuple):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2
        error = capfd.readouterr().err
        assert_one_line(error, *says)
    return run


def assert_one_line(error: str, *says):
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in error
    assert [text for text in says if str(text) not in lines[0]] == []
