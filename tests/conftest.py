"""Puts the repository root on sys.path, so that `pytest` finds the scripts from any directory; a model that many use."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16)


@pytest.fixture
def quiet_training(monkeypatch):
    """Training takes Ctrl-C for itself, the test takes it back. A picture takes a second, and few tests need one."""
    import train_countdown
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train_countdown, "plot_run", lambda run: None)
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
