"""Any folder of the format is read, and nothing that is missing or altered there goes unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import published

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    """A copy of the published numbers."""
    return shutil.copytree(goldens, tmp_path / "other", copy_function=shutil.copyfile)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy, in use in this process."""
    monkeypatch.setattr(published, "FOLDER", folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    published._arrays.cache_clear()
    published.metadata.cache_clear()


def rewrite(file: Path, **changes: np.ndarray | None) -> None:
    """Replaces arrays of an `.npz`, or with None removes them."""
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files} | changes
    np.savez(file, **{key: values for key, values in arrays.items() if values is not None})


def run_suite(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"tests/conformance/{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"GOLDENS": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_untouched_copy_passes(folder: Path):
    run = run_suite("test_sampling.py", folder)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("module", "family", "key", "step", "by"),
    [
        ("test_sampling.py", "sampling", "s02.probs", 1, 1e-3),
        ("test_understand.py", "mmu", "m01.tf_logits", 7, 3e-4),
    ],
)
def test_an_altered_number_fails(folder: Path, module: str, family: str, key: str, step: int, by: float):
    file = folder / f"{family}.npz"
    with np.load(file) as arrays:
        values = arrays[key].copy()
    values[step, 5] += by
    rewrite(file, **{key: values})
    run = run_suite(module, folder)
    assert run.returncode == 1
    case, array = key.split(".")
    assert f"family {family}, case {case}, {array}" in run.stdout, run.stdout
    assert f"first at step {step}: largest difference {by:.1g}"[:-1] in run.stdout, run.stdout


def test_another_salt_gives_other_weights(folder: Path):
    manifest = json.loads((folder / "tiny_model.json").read_text())
    (folder / "tiny_model.json").write_text(json.dumps(manifest | {"salt": manifest["salt"] + "2"}))
    run = run_suite("test_weights.py", folder, "-k", "tiny")
    assert run.returncode == 1
    assert "has another hash" in run.stdout


def test_a_missing_family_fails(here: Path):
    (here / "t2i.npz").unlink()
    with pytest.raises(published.Missing, match=r"family t2i: .*t2i\.npz is missing"):
        published.cases("t2i")
    (here / "buckets.json").unlink()
    with pytest.raises(published.Missing, match=r"buckets\.json is missing"):
        published.metadata("buckets")


def test_a_missing_case_fails_on_either_side(here: Path):
    listed = json.loads((here / "mmu_meta.json").read_text())
    (here / "mmu_meta.json").write_text(json.dumps(listed[1:]))
    with pytest.raises(published.Missing, match="family mmu: the metadata names the cases"):
        published.cases("mmu")
    (here / "mmu_meta.json").write_text(json.dumps(listed))
    forget()
    with np.load(here / "mmu.npz") as arrays:
        gone = [key for key in arrays.files if key.startswith("m02.")]
    rewrite(here / "mmu.npz", **dict.fromkeys(gone))
    with pytest.raises(published.Missing, match="family mmu: the metadata names the cases"):
        published.cases("mmu")
    (here / "mmu_meta.json").write_text("[]")
    forget()
    with pytest.raises(published.Missing):
        published.cases("mmu")


def test_a_missing_array_fails(here: Path):
    rewrite(here / "vq.npz", **{"v00.dec": None})
    arrays = published.Family("vq", "v00")
    assert arrays["u8"].dtype == np.uint8
    with pytest.raises(published.Missing, match=r"family vq: .*vq\.npz has no array 'v00\.dec'"):
        arrays["dec"]


def test_what_a_comparison_finds():
    where = published.Where("some", "case", "array")
    expected = np.zeros((3, 2))
    published.assert_close(expected + 1e-6, where, expected, 1e-5)
    for ours, words in (
        (np.zeros((2, 2)), "shape"),
        (np.array([[0, 0], [0, np.nan], [0, 0]]), "first at step 1"),
        (np.array([[0, 0], [0, 0], [2e-5, 0]]), "first at step 2: largest difference 2e-05, allowed 1e-05"),
    ):
        with pytest.raises(AssertionError, match=f"family some, case case, array.*{words}"):
            published.assert_close(ours, where, expected, 1e-5)
    del published.SEEN["some", "array", ""]


def test_a_greedy_token_may_differ_only_where_it_is_a_close_call():
    where = published.Where("some", "case", "array")
    logits = np.array([[5.0, 1.0], [1.0, 1.00001], [0.0, 3.0]])
    published.assert_greedy(np.array([0, 1, 1]), logits, where, np.array([0, 0, 0]), 1e-4)
    with pytest.raises(AssertionError, match="at step 2"):
        published.assert_greedy(np.array([0, 1, 1]), logits, where, np.array([0, 1, 0]), 1e-4)
    del published.SEEN["some", "array", ""]
