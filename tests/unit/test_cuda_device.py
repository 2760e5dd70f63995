"""What is only for CUDA and can be told without a GPU: failed recordings, libraries that do not work."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from wallaroo.model.cuda.fake import FakeCuda
from wallaroo.model.cuda.fake_runtime import missing
from wallaroo.model.cuda.graphs import GraphRecorder
from wallaroo.model.engine import backends

needs_fake = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a device")


@needs_fake
def test_a_function_that_cannot_be_recorded_runs_as_it_is_and_says_so_once() -> None:
    calls = 0

    def waits() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    failures: list[str] = []
    with FakeCuda():
        stream = torch.cuda.current_stream()
        one, other = (GraphRecorder(failures)(waits) for _ in range(2))
        one()
        with pytest.warns(RuntimeWarning, match="operation not permitted when stream is capturing$"):
            one()
        assert calls == 3  # once in the recording that failed, and then as it is
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                one()
                other()
        assert torch.cuda.current_stream() is stream
    assert calls == 9 and one.graph is None and other.graph is None
    assert failures == ["operation not permitted when stream is capturing"]


@needs_fake
def test_a_recorder_that_is_cleared_leaves_its_pool() -> None:
    with FakeCuda():
        recorder = GraphRecorder()
        before = recorder(lambda: None)
        recorder.clear()
        assert recorder.pool is None
        after = recorder(lambda: None)
    assert before.pool is not None and after.pool is not None


def test_a_broken_flash_attention_is_told_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: of another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    backends._fastest.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="flash-attn is installed but does not run: .*another torch"):
            assert backends.default_backend(torch.device("cuda"), torch.bfloat16) == "sdpa"
    finally:
        backends._fastest.cache_clear()
