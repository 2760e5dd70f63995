"""Votes in their file."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows.viewer import votes
from wallaroo.workflows.viewer.votes import Key, Votes, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (9, 10, 0.5958, 0.9821)],
)
def test_wilson_interval(hits, count, low, high):
    found = wilson(hits, count)
    assert found == pytest.approx((low, high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_votes_are_kept_replaced_and_summed(tmp_path):
    path = str(tmp_path / "a.votes.parquet")
    mine, theirs = Votes(path, ["/o/a", "/o/b"]), Votes(path, ["/o/b", "/o/a"])
    mine.cast(Key("x", 0, 0), ["1", "2"], "/o/a")
    # Both began with the same file; neither loses the other's vote.
    theirs.cast(Key("y", 0, 1), ["3", "4"], "/o/b")
    mine.cast(Key("z", 0, 0), ["5", "6"], votes.TIE)
    mine.cast(Key("x", 0, 0), ["1", "2"], "/o/b")
    Votes(path, ["/o/a", "/o/c"]).cast(Key("x", 0, 0), ["1", "7"], votes.BAD)
    found = Votes(path, ["/o/a", "/o/b"])
    assert found.choices() == {Key("x", 0, 0): "/o/b", Key("y", 0, 1): "/o/b", Key("z", 0, 0): "tie"}
    summary = found.summary()
    assert (summary.votes, summary.ties, summary.bad) == (3, 1, 0)
    assert [(share.votes, share.decided) for share in summary.shares] == [(0, 2), (2, 2)]
    found.cast(Key("z", 0, 0), [], None)
    table = pq.read_table(path)
    assert table.num_rows == 3 and table.column("choice").to_pylist().count("/o/b") == 2
    rows = {(row["id"], tuple(row["outputs"])): row["sha256"] for row in table.to_pylist()}
    assert rows["x", ("/o/a", "/o/b")] == ["1", "2"]
    with pytest.raises(ValueError, match="choice 'c'"):
        found.cast(Key("x", 0, 0), [], "c")


def test_another_file_is_never_taken_for_votes(tmp_path):
    for name, data in (("a.parquet", b"notes"), ("b.parquet", None)):
        path = tmp_path / name
        if data is None:
            pq.write_table(pa.table({"id": ["x"]}), path)
        else:
            path.write_bytes(data)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"is not a file of votes: give another --votes PATH\."):
            Votes(str(path), ["a", "b"])
        assert path.read_bytes() == before


def test_votes_lie_beside_the_output():
    assert votes.default_path("/x/out/") == "/x/out.votes.parquet"
    assert votes.default_path("s3://bucket/a/b") == "s3://bucket/a/b.votes.parquet"
    with pytest.raises(InputError, match="whole bucket"):
        votes.default_path("s3://bucket/")
