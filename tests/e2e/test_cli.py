"""What is wrong with an input, told by the command: one sentence, the right exit code, no replica."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from tests.conformance.released import flat_config, split, write_backbone, write_vq, write_wallaroo
from wallaroo.jobs import cli
from wallaroo.jobs.make_tiny import tokenizer_json
from wallaroo.model.checkpoint import TINY, disk_tensors, load_config
from wallaroo.model.config import VQConfig
from wallaroo.model.training.fresh import fresh_model

GOOD = {"id": "good", "prompt": "a red circle", "width": 64, "height": 96}


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_lines(tmp_path / "good.jsonl", [GOOD])


@pytest.fixture
def wallaroo(capsys):
    """Runs the command in this process: exit code, stdout, and the one complaint on stderr, if any."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        complaints = [line for line in err.splitlines() if line.startswith("wallaroo: ")]
        assert len(complaints) <= 1
        return left.value.code, out, complaints[0].removeprefix("wallaroo: ") if complaints else ""

    return run


def nothing_was_made(output) -> bool:
    """No replica has run: there is neither a row nor the record that a run writes before replicas start."""
    return not any((Path(output) / name).exists() for name in ("data", "runs"))


# Faults of a run that are found without Ray, so that they are told in a moment


def test_no_such_manifest(wallaroo, tmp_path):
    code, _, complaint = wallaroo("generate", tmp_path / "absent.jsonl", tmp_path / "out")
    assert code == 1
    assert "absent.jsonl cannot be read, there is no such file or folder" in complaint
    assert nothing_was_made(tmp_path / "out")


def test_a_size_that_the_model_lacks(wallaroo, manifest, tmp_path):
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--width", 80, "--height", 64)
    assert code == 2
    assert "80x64" in complaint and "nearest is 128x96" in complaint
    assert nothing_was_made(tmp_path / "out")


def test_no_such_model(wallaroo, manifest, tmp_path):
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--model", tmp_path / "absent")
    assert code == 1
    assert "absent is not a checkpoint" in complaint


@pytest.mark.parametrize(
    "tensor, replacement, words",
    [
        ("gen_image_head.0.bias", None, "missing"),
        ("gen_image_head.0.bias", np.zeros(7, np.float32), "shape"),
    ],
)
def test_a_model_with_a_wrong_tensor(wallaroo, manifest, tmp_path, tensor, replacement, words):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tensors = {
        # The arrays only have to have their names and shapes.
        name: np.zeros(part.get_slice(name).get_shape(), np.float32)
        for part in [safetensors.safe_open(model / "model.safetensors", "np")]
        for name in part.keys()  # noqa: SIM118
    }
    del tensors[tensor]
    if replacement is not None:
        tensors[tensor] = replacement
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    rewrite_file_list(model)
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--model", model)
    assert code == 1
    assert tensor in complaint and words in complaint
    assert nothing_was_made(tmp_path / "out")


def rewrite_file_list(model: Path) -> None:
    from hashlib import sha256

    listed = json.loads((model / "checkpoint.json").read_text())
    for name, entry in listed["files"].items():
        data = (model / name).read_bytes()
        entry |= {"size": len(data), "sha256": sha256(data).hexdigest()}
    (model / "checkpoint.json").write_text(json.dumps(listed))


def test_an_unreachable_endpoint(wallaroo, manifest, tmp_path, monkeypatch):
    from wallaroo.workflows import storage

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    storage.forget_clients()
    for paths in (("s3://bucket/m.jsonl", tmp_path / "out"), (manifest, "s3://bucket/out")):
        code, _, complaint = wallaroo("generate", *paths)
        assert code == 1
        assert "s3://bucket/" in complaint and "secret" not in complaint
    storage.forget_clients()


def test_a_bucket_that_is_not_there_or_forbidden(wallaroo, manifest, tmp_path, s3, s3_server, monkeypatch):
    from wallaroo.workflows import storage

    code, _, complaint = wallaroo("generate", "s3://no-such-bucket-here/m.jsonl", tmp_path / "out")
    assert code == 1
    assert "s3://no-such-bucket-here/m.jsonl" in complaint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.stranger)
    storage.forget_clients()
    for paths in ((f"{s3}/m.jsonl", tmp_path / "out"), (manifest, f"{s3}/out")):
        code, _, complaint = wallaroo("generate", *paths)
        assert code == 1
        assert f"{s3}/" in complaint
        assert s3_server.secret not in complaint
    assert nothing_was_made(tmp_path / "out")


# Faults that only the contents of the manifest show; each is told before a replica starts


@pytest.mark.parametrize(
    "name, contents, code, words",
    [
        ("empty.jsonl", b"", 1, "has no rows: correct it"),
        ("names.jsonl", b'{"promt": "a cat"}\n', 1, "no column 'prompt'; did you mean 'promt'?"),
        ("corrupt.parquet", b"PAR1 is not all that there is to a file PAR1", 1, "corrupt.parquet"),
        ("header.csv", b"prompt,\xff\xfe\na,b\n", 1, "header.csv is not valid UTF-8"),
    ],
)
def test_a_manifest_that_cannot_be_planned(wallaroo, tmp_path, name, contents, code, words):
    folder = tmp_path / "manifest"
    folder.mkdir()
    (folder / name).write_bytes(contents)
    if "parquet" in name:
        pq.write_table(pa.table({"prompt": ["a cat"]}), folder / "good.parquet")
    got, _, complaint = wallaroo("generate", folder, tmp_path / "out")
    assert got == code
    assert words in complaint
    assert nothing_was_made(tmp_path / "out")


def test_a_where_that_is_no_sql(wallaroo, manifest, tmp_path):
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--where", "colour = 'red'")
    assert code == 2
    assert "colour" in complaint
    assert nothing_was_made(tmp_path / "out")


# Runs


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A folder of two manifests with all that may be wrong with a row, and rows that are right."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        GOOD,
        GOOD | {"prompt": "again"},
        {"id": "empty", "prompt": ""},
        {"id": "blank", "prompt": " \t\n"},
        {"id": "null", "prompt": None},
        {"id": "long", "prompt": "a cat " * 20_000},
        {"id": "cfg-nan", "prompt": "a cat", "cfg": float("nan")},
        {"id": "cfg-negative", "prompt": "a cat", "cfg": -1},
        {"id": "top-k-negative", "prompt": "a cat", "top_k": -1},
        {"id": "top-p-zero", "prompt": "a cat", "top_p": 0},
        {"id": "top-p-high", "prompt": "a cat", "top_p": 1.5},
        {"id": "temperature", "prompt": "a cat", "temperature": -0.5},
        {"id": "size", "prompt": "a cat", "width": 80, "height": 64},
        {"id": "width", "prompt": "a cat", "width": 64},
        {"id": "language", "prompt": "a cat", "language": "de"},
        {"id": "samples", "prompt": "a cat", "samples": -2},
        {"id": "off", "prompt": "a cat", "top_k": 0, "top_p": 1, "width": 96, "height": 64},
    ]
    write_lines(folder / "a.jsonl", rows)
    (folder / "b.csv").write_bytes(b"id,prompt\ncsv,a dog\nbytes,caf\xe9\n")
    return folder


FAULTS = {
    "empty": "prompt",
    "blank": "prompt",
    "null": "prompt",
    "long": "prompt",
    "cfg-negative": "sampling",
    "top-k-negative": "sampling",
    "top-p-zero": "sampling",
    "top-p-high": "sampling",
    "temperature": "sampling",
    "size": "size",
    "width": "size",
    "language": "language",
    "samples": "samples",
    "bytes": "manifest",
}


def test_rows_that_are_wrong_become_error_rows(wallaroo, local_ray, hostile, tmp_path):
    output = tmp_path / "out"
    code, out, complaint = wallaroo("generate", hostile, output)
    assert (code, complaint) == (3, "")
    table = pq.read_table(output / "data").to_pylist()
    assert [row["row_id"] for row in table] == list(range(len(table)))
    assert [row["id"] for row in table if row["status"] == "ok"] == ["good", "cfg-nan", "off", "csv"]
    errors = [row for row in table if row["status"] == "error"]
    assert [row["id"] for row in errors if row["error_type"] == "id"] == ["good"]
    assert {row["id"]: row["error_type"] for row in errors if row["error_type"] != "id"} == FAULTS
    for row in errors:
        assert len(row["error_message"]) < 1000 and "\n" not in row["error_message"]
    assert "128x96" in next(row["error_message"] for row in errors if row["id"] == "size")
    assert f"{len(table)} rows: 4 ok, {len(errors)} errors" in out
    assert wallaroo("verify", output)[0] == 0
    # A second try of what is not corrected has the same errors. The row that repeated an id is alone now, and
    # of the row that could not be read nothing is left.
    second = tmp_path / "second.jsonl"
    assert wallaroo("plan", "generate", output / "errors.jsonl", "--errors", second)[0] == 0
    told = {line["id"]: line for line in map(json.loads, second.read_text().splitlines())}
    assert {name: line["kind"] for name, line in told.items()} == FAULTS | {"bytes": "prompt"}
    assert told["language"]["language"] == "de" and told["cfg-negative"]["cfg"] == -1
    assert told["samples"]["samples"] == -2 and "seed" not in told["samples"]
    # The same again has nothing to do, and says the same.
    code, out, _ = wallaroo("generate", hostile, output)
    assert code == 3
    assert "nothing to do" in out


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory) -> Path:
    """The output of a run of one row."""
    folder = tmp_path_factory.mktemp("finished")
    write_lines(folder / "m.jsonl", [GOOD])
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", str(folder / "m.jsonl"), str(folder / "out"), "--cfg", "1"])
    assert left.value.code == 0
    return folder


def test_an_output_that_belongs_to_another_run(wallaroo, finished):
    arguments = ("generate", finished / "m.jsonl", finished / "out", "--cfg", 2, "--seed", 5)
    code, _, complaint = wallaroo(*arguments)
    assert code == 1
    assert "sampling.cfg is 1.0 in the output and 2.0 in this run" in complaint
    assert "seed is 0 in the output and 5 in this run" in complaint


def test_a_second_run_on_the_same_output(wallaroo, finished):
    from wallaroo.workflows.outputs.lock import OutputLock

    with OutputLock(str(finished / "out"), "of this test"):
        code, _, complaint = wallaroo("generate", finished / "m.jsonl", finished / "out", "--cfg", 1)
    assert code == 4
    assert "of this test" in complaint


def test_a_gpu_that_is_not_there_says_what_to_do(wallaroo, local_ray, manifest, tmp_path):
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--device", "cuda")
    assert (code, complaint) == (
        1,
        "1 replica needs a GPU, but this machine has 0: give --device cpu, or the --address of a cluster "
        "with GPUs.",
    )
    assert nothing_was_made(tmp_path / "out")


def test_a_run_on_a_cluster_without_gpus_waits_for_one_and_says_so(local_ray, manifest, tmp_path, caplog):
    """This process is connected already, so that any address of a cluster is that of its Ray."""
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        cli.main(
            [
                *("generate", str(manifest), str(output), "--address", "10.0.0.1:6379"),
                *("--device", "cuda", "--deadline", "4s", "--grace", "0s"),
            ]
        )
    assert left.value.code == 5
    words = "The cluster at 10.0.0.1:6379 has no GPU now, so this run waits for one."
    assert words in caplog.text and "stop the run and give --device cpu." in caplog.text
    assert not (output / "data").exists()


def test_a_plan_is_what_the_run_goes_on_with(wallaroo, local_ray, manifest, tmp_path):
    code, out, _ = wallaroo("plan", "generate", manifest, "--samples", 2)
    assert code == 0
    assert "2 rows" in out
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl"}
    code, out, _ = wallaroo("plan", "generate", manifest, tmp_path / "out", "--samples", 2)
    assert code == 0
    planned = {path: path.read_bytes() for path in (tmp_path / "out" / "plan").iterdir()}
    assert nothing_was_made(tmp_path / "out")
    code, _, complaint = wallaroo("generate", manifest, tmp_path / "out", "--samples", 3)
    assert code == 1
    assert "samples is 2 in the output and 3 in this run" in complaint
    assert wallaroo("generate", manifest, tmp_path / "out", "--samples", 2)[0] == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "plan").iterdir()} == planned
    assert wallaroo("verify", tmp_path / "out")[0] == 0


def test_ctrl_c_ends_in_a_sentence_and_the_same_command_goes_on(tmp_path):
    write_lines(tmp_path / "m.jsonl", [{"prompt": f"a cat, number {i}"} for i in range(12)])
    command = [
        sys.executable,
        "-m",
        "wallaroo.jobs.cli",
        "generate",
        str(tmp_path / "m.jsonl"),
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "out" / "runs").glob("*.json")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 5, err
    assert re.fullmatch(
        r"wallaroo: stopped by Ctrl-C\. Finished shards are kept(, \d+ of 12 rows)?; "
        r"re-run the same command to resume\.",
        err.splitlines()[-1],
    )
    assert "Traceback" not in err
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_benchmark_tells_of_its_rounds_and_of_its_end():
    words = ("bench", "engine", "--model", "tiny", "--rounds", "99")
    command = [sys.executable, "-m", "wallaroo.jobs.cli", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "tiny, 128x128: round 0 of 99, not measured\n"
    assert re.fullmatch(r"tiny, 128x128: round 1 of 99, \d+ s so far\n", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == (
        "wallaroo: Interrupted. A benchmark keeps nothing; fewer --rounds take less time."
    )


def test_from_the_published_files_to_a_picture(wallaroo, local_ray, manifest, tmp_path):
    """The way that the README shows, with small random weights in the published layout."""
    config = dataclasses.replace(load_config(TINY), vq=VQConfig(channels=32, codebook_size=512))
    weights, vq = split(disk_tensors(fresh_model(config, 0)))
    qwen = flat_config(config.decoder, config.vision)
    files = (
        *("--wallaroo", write_wallaroo(tmp_path / "wallaroo.ckpt", weights)),
        *("--vq", write_vq(tmp_path / "vq_ds16_t2i.pt", vq)),
        *("--backbone", write_backbone(tmp_path / "qwen", qwen, tokenizer_json(controls=False))),
    )
    model = tmp_path / "converted"
    assert wallaroo("convert", *files, model) == (0, f"{model}\n", "")
    write_lines(manifest, [{"prompt": "a red circle on a white background"}])
    assert wallaroo("generate", manifest, tmp_path / "out", "--model", model)[0] == 0
    [row] = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert (row["width"], row["height"], row["output_tokens"]) == (512, 512, 1024)
    assert wallaroo("verify", tmp_path / "out")[0] == 0
