"""Storage on S3, against a real server: the same behaviour as on local paths, and its errors in words."""

import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.s3_proxy import proxy
from wallaroo.model.checkpoint import TINY, load_config, model_digest
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.plans import passes
from wallaroo.workflows.storage import checkpoints, clients, files, retries


def test_a_file_is_written_read_listed_and_deleted(s3):
    path = f"{s3}/folder/file"
    assert storage.info(path) is None and storage.list_files(f"{s3}/folder") == []
    storage.write_atomic(path, memoryview(b"one"))
    storage.write_atomic(f"{s3}/folder/a/b", b"two")
    storage.write_atomic(f"{s3}/folder-beside/c", b"three")
    assert storage.read_bytes(path) == b"one"
    found = storage.list_files(f"{s3}/folder")
    assert [(file.path, file.relative, file.size) for file in found] == [
        (f"{s3}/folder/a/b", "a/b", 3),
        (f"{s3}/folder/file", "file", 3),
    ]
    assert storage.info(path) == found[1]
    assert [file.relative for file in storage.match_files(f"{s3}/f*/*")] == ["folder-beside/c", "folder/file"]
    with storage.open_source(path, 1) as stream:
        assert stream.read() == b"ne"
    storage.delete(path)
    storage.delete(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)
    with pytest.raises(FileNotFoundError), storage.open_source(path):
        pass


def read_by_task(path):
    """Reads the file as a task of planning does, which hands its retries over."""
    answer = passes._answer({"index": 0, "item": pickle.dumps(path)}, storage.read_bytes, {})
    assert storage.take_retries() == 0
    storage.count_retries(answer["retries"])
    return pickle.loads(answer["answer"])


def read_by_stream(path):
    with storage.open_source(path) as stream:
        return stream.read()


@pytest.mark.parametrize("read", [storage.read_bytes, read_by_stream, read_by_task])
def test_each_client_counts_what_it_retries(read, s3, s3_server, monkeypatch):
    monkeypatch.setattr(retries, "_enabled", 0)  # a task enables them for its whole process
    storage.write_atomic(f"{s3}/file", b"one")
    storage.take_retries()
    # So small a share faults the first request alone.
    with proxy(s3_server.endpoint, share=1e-9) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        assert read(f"{s3}/file") == b"one"
        assert between.faults == {"throttle": 1} and storage.take_retries() == 1
    storage.forget_clients()


def test_threads_that_begin_together_share_a_client(s3):
    together = threading.Barrier(8)

    def take(_):
        together.wait()
        return clients.s3_client()

    with ThreadPoolExecutor(8) as pool:
        assert len({id(one) for one in pool.map(take, range(8))}) == 1


def test_a_client_that_another_thread_is_making_is_forgotten_too(s3, monkeypatch):
    storage.forget_clients()
    begun, make = threading.Event(), boto3.session.Session.client

    def slow(*args, **options):
        made = make(*args, **options)
        begun.set()
        time.sleep(0.5)
        return made

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        patch.setattr(boto3.session.Session, "client", slow)
        old = pool.submit(clients.s3_client)
        begun.wait()
        patch.undo()
        storage.forget_clients()
        old.result()
        storage.write_atomic(f"{s3}/one", b"one")


def test_many_files_are_deleted_by_few_requests(s3, s3_server, monkeypatch):
    for name in "abcde":
        storage.write_atomic(f"{s3}/{name}", b"")
    monkeypatch.setattr(files, "DELETED_AT_ONCE", 2)
    with proxy(s3_server.endpoint, share=0) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        storage.delete_all(f"{s3}/{name}" for name in ("a", "b", "absent", "d", "e"))
        assert between.kinds == {"POST": 3}
        assert [file.relative for file in storage.list_files(s3)] == ["c"]
        storage.delete_all([])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.stranger)
        storage.forget_clients()
        with pytest.raises(InputError, match="c cannot be used, access is denied"):
            storage.delete_all([f"{s3}/c"])


@pytest.mark.parametrize("code", ["NotImplemented", "MethodNotAllowed", "MalformedXML", "MissingContentMD5"])
def test_a_store_that_deletes_only_one_object_by_a_request(code, s3, s3_server, monkeypatch):
    for name in "abc":
        storage.write_atomic(f"{s3}/{name}", b"")
    with proxy(s3_server.endpoint, share=0) as between:
        between.refusal = code
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        storage.delete_all(f"{s3}/{name}" for name in ("a", "absent", "c"))
        assert between.kinds == {"POST": 1, "DELETE": 3}
    assert [file.relative for file in storage.list_files(s3)] == ["b"]


def test_the_object_that_stays_is_the_one_that_is_named(s3, s3_server, monkeypatch):
    storage.write_atomic(f"{s3}/first", b"")
    stays = b"<DeleteResult><Error><Key>second</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    with proxy(s3_server.endpoint, share=0) as between:
        between.deleted = stays
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        with pytest.raises(InputError, match=f"^{s3}/second cannot be used, access is denied"):
            storage.delete_all([f"{s3}/first", f"{s3}/second"])
        between.deleted = stays.replace(b"AccessDenied", b"NoSuchKey")  # as old stores say of an absent one
        storage.delete_all([f"{s3}/first", f"{s3}/second"])


def test_one_of_many_writers_puts_what_is_absent(s3):
    path, barrier, won = f"{s3}/file", threading.Barrier(8), []

    def put(number):
        barrier.wait()
        if storage.put_if_absent(path, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(path) == b"%d" % won[0]
    assert storage.put_if_absent(path, b"%d" % won[0])


def test_a_file_is_replaced_only_as_it_was_read(s3):
    path = f"{s3}/file"
    storage.write_atomic(path, b"one")
    etag = storage.read_with_etag(path)[1]
    newer = storage.replace_if_match(path, b"two", etag)
    assert newer == storage.read_with_etag(path)[1]
    assert storage.replace_if_match(path, b"three", etag) is None
    assert storage.read_bytes(path) == b"two"
    storage.delete(path)
    assert storage.replace_if_match(path, b"four", newer) is None
    assert not storage.exists(path)


def test_parquet_larger_than_a_part_goes_through_a_stream(s3):
    path = f"{s3}/t.parquet"
    table = pa.table({"a": [os.urandom(1 << 20) for _ in range(24)]})
    with storage.write_stream(path) as stream, pq.ParquetWriter(stream, table.schema) as writer:
        writer.write_table(table)
    filesystem, inner = storage.parquet_filesystem(path)
    assert pq.read_table(inner, filesystem=filesystem).equals(table)


def test_unfinished_uploads_are_removed_below_the_folder_only(s3):
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    for key in ("out/plan/file", "out2/file"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x")
    assert storage.remove_leftovers(f"{s3}/out") == 1
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["out2/file"]


def test_credentials_and_endpoint_come_from_a_profile(s3, s3_server, tmp_path, monkeypatch):
    storage.write_atomic(f"{s3}/file", b"one")
    (tmp_path / "config").write_text(
        f"[profile work]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
        f"aws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    storage.forget_clients()
    assert storage.read_bytes(f"{s3}/file") == b"one"
    assert [file.relative for file in storage.list_files(s3)] == ["file"]
    filesystem, inner = storage.parquet_filesystem(f"{s3}/file")
    with filesystem.open_input_file(inner) as file:
        assert file.read() == b"one"


def parquet_read(path):
    with storage.explained(path):
        filesystem, inner = storage.parquet_filesystem(path)
        filesystem.open_input_file(inner)


def stream_write(path):
    with storage.write_stream(path) as stream:
        stream.write(b"x")


def source_read(path):
    with storage.open_source(path) as stream:
        stream.read()


# One way through each library comes first, since each waits in its own way for an endpoint.
WAYS = [
    storage.read_bytes,
    storage.list_files,
    parquet_read,
    storage.info,
    source_read,
    stream_write,
    storage.remove_leftovers,
    lambda path: storage.write_atomic(path, b""),
    lambda path: storage.put_if_absent(path, b""),
]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "no answer.*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "localhost:8333"}, "AWS_ENDPOINT_URL is not a URL"),
        ({"AWS_ACCESS_KEY_ID": "stranger"}, "access is denied"),
        # Some answers have no body, and so no reason.
        ({"AWS_SECRET_ACCESS_KEY": "hunter2"}, "secret key is wrong|access is denied"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials"),
        ({"AWS_PROFILE": "absent"}, "profile named by AWS_PROFILE does not exist"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(s3, s3_server, monkeypatch, variables, words):
    storage.write_atomic(f"{s3}/file", b"one")
    for name, value in variables.items():
        value = s3_server.stranger if value == "stranger" else value
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    storage.forget_clients()
    for way in WAYS[:3] if "no answer" in words else WAYS:
        with pytest.raises(InputError, match=words) as caught:
            way(f"{s3}/file")
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
        assert str(caught.value).startswith(f"{s3}/file cannot be used")


def test_a_bucket_that_is_not_there_is_one_sentence(s3):
    for way in (storage.read_bytes, storage.list_files, source_read, parquet_read):
        with pytest.raises((InputError, FileNotFoundError)) as caught:
            way("s3://test-there-is-none/file")
        if caught.type is InputError:
            assert "its bucket does not exist" in str(caught.value)


def test_a_checkpoint_is_fetched_once_and_verified(s3, tmp_path):
    for file in TINY.iterdir():
        storage.write_atomic(f"{s3}/model/{file.name}", file.read_bytes())
    some = checkpoints.fetch_folder(f"{s3}/model", ("config.json",), cache=tmp_path)
    assert {path.name for path in some.iterdir() if not path.name.startswith(".")} == {
        "checkpoint.json",
        "config.json",
    }
    whole = checkpoints.fetch_folder(f"{s3}/model", cache=tmp_path)
    assert whole == some
    assert model_digest(whole) == model_digest(TINY)
    assert load_config(whole) == load_config(TINY)
    kept = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    for name in ("config.json", "model.safetensors"):
        storage.delete(f"{s3}/model/{name}")
    assert checkpoints.fetch_folder(f"{s3}/model", cache=tmp_path) == whole
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == kept


def test_a_fetch_that_was_cut_off_goes_on(s3, tmp_path, monkeypatch):
    """Ranges that are there are not fetched again; where the disk lost them, all are."""
    for file in TINY.iterdir():
        storage.write_atomic(f"{s3}/model/{file.name}", file.read_bytes())
    monkeypatch.setattr(checkpoints, "RANGE_BYTES", 1 << 20)
    size = (TINY / "model.safetensors").stat().st_size
    every = range(0, size, 1 << 20)
    read, asked = checkpoints._read_range, []

    def cut_off(path, start, stop):
        if start >= 3 << 20:
            raise ConnectionError
        return read(path, start, stop)

    def noted(path, start, stop):
        asked.append(start)
        return read(path, start, stop)

    def fetch(cache, way):
        monkeypatch.setattr(checkpoints, "_read_range", way)
        return (
            checkpoints.fetch_folder(f"{s3}/model", ("model.safetensors",), cache=cache) / "model.safetensors"
        )

    for name in ("kept", "lost"):
        with pytest.raises(InputError, match="no answer from its endpoint"):
            fetch(tmp_path / name, cut_off)
        assert not list((tmp_path / name).glob("*/model.safetensors"))
    whole = fetch(tmp_path / "kept", noted)
    assert sorted(asked) == [start for start in every if start >= 3 << 20]
    assert whole.read_bytes() == (TINY / "model.safetensors").read_bytes()

    (part,) = (tmp_path / "lost").glob("*/.model.safetensors.part")
    part.write_bytes(bytes(3 << 20))
    asked.clear()
    whole = fetch(tmp_path / "lost", noted)
    assert set(asked) == set(every)
    assert whole.read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_refused(s3, tmp_path):
    listing = json.loads((TINY / "checkpoint.json").read_text())
    listing["files"]["config.json"]["sha256"] = "0" * 64
    storage.write_atomic(f"{s3}/model/checkpoint.json", json.dumps(listing).encode())
    storage.write_atomic(f"{s3}/model/config.json", (TINY / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"config\.json is not the file that its checkpoint lists"):
        checkpoints.fetch_folder(f"{s3}/model", ("config.json",), cache=tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        checkpoints.fetch_folder(f"{s3}/model", ("tokenizer.json",), cache=tmp_path)
    with pytest.raises(InputError, match="is not a checkpoint"):
        checkpoints.fetch_folder(f"{s3}/other", cache=tmp_path)
    assert not list(tmp_path.glob("*/config.json"))
