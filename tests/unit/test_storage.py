"""Storage on local paths: whole files or none, conditional writes, listings, and errors in words."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import boto3.session
import botocore.session
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.storage import checkpoints, clients


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("/a/b", "c"), "/a/b/c"),
        (("/a/b/", "c", "d"), "/a/b/c/d"),
        (("/", "c"), "/c"),
        (("s3://bucket", "key"), "s3://bucket/key"),
        (("s3://bucket/", "key"), "s3://bucket/key"),
        (("relative", "c"), "relative/c"),
    ],
)
def test_join(parts, joined):
    assert storage.join(*parts) == joined


def test_only_s3_and_local_paths_are_known():
    assert storage.is_s3("s3://bucket/key")
    assert not storage.is_s3("/a/b") and not storage.is_s3("a:b") and not storage.is_s3("odd name://x")
    with pytest.raises(InputError, match=r"gs:// is not known.*s3://"):
        storage.is_s3("gs://bucket/key")


@pytest.mark.parametrize("path", ["s3://user:hunter2@bucket/key", "s3://bucket:9000/key"])
def test_a_path_never_holds_credentials_and_they_are_not_repeated(path):
    with pytest.raises(InputError, match="AWS variables") as caught:
        storage.read_bytes(path)
    assert "hunter2" not in str(caught.value)


def test_a_path_that_is_not_utf_8_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^the path /x/caf\\xe9/a\.csv is not UTF-8: rename the file or"):
        storage.absolute_path(os.fsdecode(b"/x/caf\xe9/a.csv"))
    with pytest.raises(InputError, match=r"^the path s3://b/\\xff is not UTF-8"):
        storage.absolute_path("s3://b/\udcff")
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"^the path /.*/caf\\xe9/a\.csv is not UTF-8: rename"):
        storage.absolute_path("a.csv")
    assert storage.absolute_path("/x/é.csv") == "/x/é.csv"


def test_a_write_replaces_all_or_nothing(tmp_path):
    path = str(tmp_path / "new" / "folder" / "file")
    storage.write_atomic(path, b"one")
    storage.write_atomic(path, memoryview(b"two"))
    assert storage.read_bytes(path) == b"two"
    with pytest.raises(RuntimeError, match="midway"), storage.write_stream(path) as stream:
        stream.write(b"half of it")
        raise RuntimeError("midway")
    assert storage.read_bytes(path) == b"two"
    assert names(tmp_path / "new" / "folder") == ["file"]


def test_parquet_goes_through_a_stream(tmp_path):
    path, table = str(tmp_path / "t.parquet"), pa.table({"a": [1, 2, 3]})
    with storage.write_stream(path) as stream, pq.ParquetWriter(stream, table.schema) as writer:
        writer.write_table(table)
    filesystem, inner = storage.parquet_filesystem(path)
    assert pq.read_table(inner, filesystem=filesystem).equals(table)


def test_a_file_of_few_eyes_stays_so(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    path.chmod(0o600)
    storage.write_atomic(str(path), b"two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    umask = os.umask(0o027)
    try:
        storage.write_atomic(str(tmp_path / "other"), b"")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o640


def test_one_of_many_writers_puts_what_is_absent(tmp_path):
    path, barrier, won = str(tmp_path / "file"), threading.Barrier(16), []

    def put(number):
        barrier.wait()
        if storage.put_if_absent(path, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(path) == b"%d" % won[0]
    assert names(tmp_path) == ["file"]


def test_a_repeated_put_of_the_same_data_still_counts(tmp_path):
    path = str(tmp_path / "file")
    assert storage.put_if_absent(path, b"one")
    assert storage.put_if_absent(path, b"one")
    assert not storage.put_if_absent(path, b"two")
    assert storage.read_bytes(path) == b"one"


def test_a_file_is_replaced_only_as_it_was_read(tmp_path):
    path = str(tmp_path / "file")
    storage.write_atomic(path, b"one")
    data, etag = storage.read_with_etag(path)
    assert data == b"one"
    newer = storage.replace_if_match(path, b"two", etag)
    assert newer == storage.read_with_etag(path)[1]
    assert storage.replace_if_match(path, b"three", etag) is None
    assert storage.read_bytes(path) == b"two"
    storage.delete(path)
    storage.delete(path)
    assert storage.replace_if_match(path, b"four", newer) is None
    assert not storage.exists(path)


def test_those_of_many_that_are_there_are_deleted(tmp_path):
    for name in "abc":
        storage.write_atomic(str(tmp_path / name), b"")
    storage.delete_all(str(tmp_path / name) for name in ("a", "absent", "c"))
    assert names(tmp_path) == ["b"]


def test_one_of_many_replaces(tmp_path):
    path, barrier, won = str(tmp_path / "file"), threading.Barrier(16), []
    storage.write_atomic(path, b"before")
    etag = storage.read_with_etag(path)[1]

    def replace(number):
        barrier.wait()
        if storage.replace_if_match(path, b"%d" % number, etag):
            won.append(number)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(path) == b"%d" % won[0]


def test_a_listing_has_all_finished_files(tmp_path):
    for name in ("b", "a/c", "a/d/e"):
        storage.write_atomic(str(tmp_path / name), name.encode())
    (tmp_path / "a" / f"{storage.TEMPORARY}1-2").write_bytes(b"unfinished")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    found = storage.list_files(str(tmp_path))
    assert [file.relative for file in found] == ["a/c", "a/d/e", "b"]
    assert [file.size for file in found] == [3, 5, 1]
    assert all(storage.read_bytes(file.path) == file.relative.encode() for file in found)
    assert storage.list_files(str(tmp_path / "absent")) == []
    assert storage.info(str(tmp_path / "a")) is None
    assert storage.info(str(tmp_path / "b")) == found[2]


def test_an_etag_changes_with_the_file(tmp_path):
    path = str(tmp_path / "file")
    storage.write_atomic(path, b"one")
    before = storage.info(path)
    storage.write_atomic(path, b"three")
    assert storage.info(path).etag != before.etag


def test_patterns(tmp_path):
    for name in ("x/a.csv", "x/y/b.csv", "x/c.txt"):
        storage.write_atomic(str(tmp_path / name), b"")
    assert [file.relative for file in storage.match_files(f"{tmp_path}/x/*.csv")] == ["a.csv"]
    assert [file.relative for file in storage.match_files(f"{tmp_path}/**/*.csv")] == ["x/a.csv", "x/y/b.csv"]
    assert storage.match_files(f"{tmp_path}/x/*.parquet") == []


def test_leftovers_go_and_files_stay(tmp_path):
    storage.write_atomic(str(tmp_path / "data" / "file"), b"")
    (tmp_path / "data" / f"{storage.TEMPORARY}1-2").write_bytes(b"unfinished")
    assert storage.remove_leftovers(str(tmp_path)) == 1
    assert names(tmp_path / "data") == ["file"]
    assert storage.remove_leftovers(str(tmp_path / "absent")) == 0


def test_a_missing_file_is_for_the_caller_to_explain(tmp_path):
    for read in (storage.read_bytes, storage.read_with_etag):
        with pytest.raises(FileNotFoundError):
            read(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError), storage.open_source(str(tmp_path / "absent")):
        pass


def test_other_errors_are_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for action, words in (
        (lambda: storage.write_atomic(str(tmp_path / "file" / "below"), b""), "is a file"),
        (lambda: storage.read_bytes(str(tmp_path)), "is a folder"),
        (lambda: storage.write_atomic(str(tmp_path / ("x" * 300)), b""), "shorter"),
        (lambda: storage.write_atomic("/proc/absent", b""), "cannot be used"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_source_is_read_from_anywhere(tmp_path):
    storage.write_atomic(str(tmp_path / "file"), b"0123456789")
    with storage.open_source(str(tmp_path / "file"), 4) as stream:
        assert stream.read(3) == b"456"


def test_a_local_checkpoint_is_used_where_it_is(tmp_path):
    assert checkpoints.fetch_folder(str(tmp_path)) == tmp_path


def test_threads_take_turns_with_the_session(monkeypatch):
    """boto3 allows one thread at a time in a session: while one asks it, no other gets at it."""
    asked = []

    def is_free():
        free = clients._making.acquire(blocking=False)
        if free:
            clients._making.release()
        return free

    def alone(kind, name):
        plain = getattr(kind, name)

        def asking(*given, **named):
            with ThreadPoolExecutor(1) as pool:
                asked.append((name, pool.submit(is_free).result()))
            return plain(*given, **named)

        monkeypatch.setattr(kind, name, asking)

    variables = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a"}
    for name, value in (variables | {"AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    clients._arrow_s3.cache_clear()
    alone(boto3.session.Session, "get_credentials")
    alone(botocore.session.Session, "get_config_variable")
    try:
        storage.parquet_filesystem("s3://bucket/key")
    finally:
        storage.forget_clients()
        clients._arrow_s3.cache_clear()
    assert {name for name, _ in asked} == {"get_credentials", "get_config_variable"}
    assert not any(free for _, free in asked)
