"""`python -m wallaroo.model.gpu_check` on a CPU at toy size: each part reports, and none stops the others."""

import json
from pathlib import Path

import pytest
import torch

from wallaroo.model.gpu_check import PARTS, SECONDS, main, run_part, start_part, to_text, wrong
from wallaroo.model.gpu_parts import Compared, distance


@pytest.mark.parametrize("name", PARTS)
def test_each_part_reports_and_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    run_part(name, "cpu", "tiny", 300, tmp_path / "out")
    reported = dict(json.loads(line) for line in (tmp_path / "out").read_text().splitlines())
    assert reported.pop("done", False), reported.get("traceback")
    assert len(reported) >= 3
    result = {name: {"status": "done", "seconds": 1.0, "reported": reported}}
    assert not wrong(result)
    assert f"| {name} | done |" in to_text(result)


def test_the_whole_is_under_nine_minutes() -> None:
    assert SECONDS < 9 * 60


def test_one_run_writes_its_json_in_any_working_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "found.json"
    given = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--only",
        "machine",
        "--only",
        "equal-tiny",
        "--json",
        str(out),
    ]
    assert main(given) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "equal-tiny"}
    assert found["equal-tiny"]["reported"]["is_same_tokens_alone"] is True
    assert "| same tokens alone | yes |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_part_that_fails_is_told_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    given = ["--device", "cuda", "--model", "tiny", "--json", str(out)]
    assert main([*given, "--only", "machine", "--only", "tokenizer"]) == 1
    found = json.loads(out.read_text())
    assert [result["status"].partition(":")[0] for result in found.values()] == ["failed", "failed"]
    assert "WRONG: tokenizer" in capsys.readouterr().out


def test_a_part_whose_time_is_over_is_ended() -> None:
    found = start_part("profile", "cpu", "tiny", -4.9)
    assert found["status"] == "out of time"
    assert not wrong({"profile": found})


def test_a_false_check_is_wrong() -> None:
    reported = {"is_same_tokens_alone": False, "is_near_swiglu": True, "milliseconds": 0.0}
    result = {"equal-tiny": {"status": "done", "seconds": 1.0, "reported": reported}}
    assert wrong(result) == ["equal-tiny is_same_tokens_alone"]
    assert "| same tokens alone | NO |" in to_text(result)


def test_a_wrong_kernel_is_far_from_its_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from wallaroo.model.cuda import ops
    from wallaroo.model.cuda.operators import OPERATORS

    x = torch.randn(3, 32)
    with Compared() as compared:
        ops.swiglu(x)
    assert compared.distance == {"wallaroo::swiglu": 0.0}
    operator = OPERATORS["wallaroo::swiglu"]
    other = operator._replace(plain=lambda gate_up, out: operator.plain(gate_up.roll(1, 0), out))
    monkeypatch.setitem(OPERATORS, "wallaroo::swiglu", other)
    with Compared() as compared:
        ops.swiglu(x)
    assert compared.distance["wallaroo::swiglu"] > 0.1


def test_distances() -> None:
    one = torch.tensor([1.0, -4.0])
    assert distance(one, one) == 0
    assert distance(one, torch.tensor([1.0, -3.0])) == pytest.approx(1 / 3)
    assert distance(torch.tensor([1.0, float("nan")]), one) == float("inf")
    assert distance(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
