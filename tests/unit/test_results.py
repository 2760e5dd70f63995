"""The files of an output: their columns, their bytes, and who can read them."""

import dataclasses
import hashlib
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.damage import flip_bit
from wallaroo.actors.rows import Outcome, to_ipc
from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs import layout, run_file, shards, values
from wallaroo.workflows.outputs import rows as outputs_rows
from wallaroo.workflows.outputs import schema as outputs_schema
from wallaroo.workflows.outputs.rows import Producer, RunConstants, build_result_table, encode_image
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.runs.stages import picture_encoder
from wallaroo.workflows.sources.embedded import read_cells
from wallaroo.workflows.storage.s3 import Ranges


def test_columns_come_in_the_declared_order_with_their_types(outputs):
    schema = result_schema(outputs.CARRIED, save_tokens=True)
    names = """row_id shard id version sample task status error_type error_message prompt image mime_type
        width height sha256 text finish_reason prompt_tokens output_tokens source seed cfg temperature top_k
        top_p language mode model_digest config_digest environment_digest content_digest attempts replica
        started_at seconds tokens tag weight when include"""
    assert schema.names == names.split()
    assert schema.field("started_at").type == pa.timestamp("us", tz="UTC")
    assert schema.field("weight").type == pa.float32()
    assert pa.null() not in schema.types
    assert schema.metadata[b"wallaroo.json"] == b'["include"]'
    assert b"pandas" not in schema.metadata
    assert "tokens" not in result_schema(outputs.CARRIED).names


def test_a_carried_column_cannot_take_a_result_column_s_name():
    with pytest.raises(ValueError, match="sha256"):
        result_schema(pa.schema([("sha256", pa.string())]))


def test_a_type_that_parquet_cannot_hold_is_an_input_error():
    with pytest.raises(InputError, match="Parquet cannot hold"):
        result_schema(pa.schema([("span", pa.month_day_nano_interval())]))


def test_rows_hold_what_was_planned_and_what_became_of_it(outputs):
    plan = outputs.plan_table(errors=(1,))
    table = outputs.result_table(plan, failed=(2,), save_tokens=True)
    assert table.schema.equals(result_schema(outputs.CARRIED, save_tokens=True), check_metadata=True)
    rows = table.to_pylist()
    assert [row["row_id"] for row in rows] == list(range(6))
    assert [row["status"] for row in rows] == ["ok", "error", "error", "ok", "ok", "ok"]
    assert [row["error_type"] for row in rows] == ["", "size", "engine", "", "", ""]
    for row in rows:
        assert row["tag"] == f"t{row['row_id']}" and row["seed"] == 1000 + row["row_id"]
        if row["status"] == "error":
            assert row["image"] is None and row["sha256"] == "" and row["content_digest"] == ""
            continue
        data = row["image"]["bytes"]
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["image"]["path"] == f"row-{row['row_id']:08d}.png"
        decoded = np.asarray(Image.open(io.BytesIO(data)))
        assert decoded.shape == (row["height"], row["width"], 3)
        assert (decoded == outputs.picture(row["seed"], row["height"], row["width"])).all()
        assert row["tokens"] == list(range(20)) and row["output_tokens"] == 20
        assert row["started_at"] == outputs.STARTED


def test_pictures_that_a_replica_encoded_give_the_same_rows(outputs):
    plan = outputs.plan_table(errors=(1,))
    schema, given = result_schema(outputs.CARRIED), outputs.outcomes(plan, failed=(2,))
    encode = picture_encoder({"plan": to_ipc(plan)}, outputs.RUN)
    encoded = [
        one if one.pixels is None else dataclasses.replace(one, pixels=None, file=encode(one.row, one.pixels))
        for one in given
    ]
    tables = [build_result_table(plan, some, outputs.RUN, Producer(), schema) for some in (given, encoded)]
    assert tables[0].equals(tables[1]) and tables[0].column("status").to_pylist().count("ok") == 4


def test_a_compression_of_png_changes_bytes_and_no_pixel():
    ramp = np.arange(64, dtype=np.uint8)
    pixels = np.stack([ramp[:, None] + ramp, ramp[:, None] ^ ramp, np.tile(ramp, (64, 1))], axis=-1)
    fast, small, before = (encode_image(pixels, "png", None, one)[0] for one in ("fast", "small", None))
    assert fast != small == before
    for data in (fast, small):
        assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()


def test_no_row_may_be_lost_or_made_up(outputs):
    plan = outputs.plan_table(errors=(1,))
    schema = result_schema(outputs.CARRIED)
    given = outputs.outcomes(plan)
    for wrong in (
        given[1:],
        [*given, Outcome(1, outputs.STARTED, 0.5)],
        [*given, given[0]],
        [*given, Outcome(9, outputs.STARTED, 0.5)],
    ):
        with pytest.raises(ValueError, match="outcomes for 5 rows"):
            build_result_table(plan, wrong, outputs.RUN, Producer(), schema)


def test_an_ok_row_needs_a_picture(outputs):
    plan = outputs.plan_table(rows=1)
    with pytest.raises(ValueError, match="no image"):
        build_result_table(
            plan, [Outcome(0, outputs.STARTED, 0.5)], outputs.RUN, Producer(), result_schema(outputs.CARRIED)
        )


def test_content_digest_is_of_the_content_not_of_the_place(outputs):
    def digest_of(table):
        return table.column("content_digest")[0].as_py()

    plan = outputs.plan_table(rows=1)
    base = digest_of(outputs.result_table(plan))
    assert re.fullmatch("[0-9a-f]{64}", base)

    def planned(**changes):
        row = plan.to_pylist()[0] | changes
        return outputs.result_table(pa.Table.from_pylist([row], schema=plan.schema))

    assert digest_of(planned(row_id=7, shard=3, id="other", sample=1, tag="x")) == base
    for change in ({"prompt": "a dog"}, {"seed": 1}, {"cfg": 2.0}, {"top_k": 5}, {"language": "zh"}):
        assert digest_of(planned(**change)) != base
    jpeg = RunConstants("generate", "m" * 64, "c" * 64, image_format="jpeg")
    assert digest_of(outputs.result_table(plan, run=jpeg)) != base


@pytest.mark.parametrize(
    ("image_format", "quality", "lossless"),
    [
        ("png", None, True),
        ("webp", None, True),
        ("webp", 80, False),
        ("jpeg", None, False),
        ("jpeg", 60, False),
    ],
)
def test_pictures_are_encoded_the_same_every_time(outputs, image_format, quality, lossless):
    pixels = outputs.picture(1, 48, 80)
    data, mime_type = encode_image(pixels, image_format, quality)
    assert mime_type == f"image/{image_format}"
    assert encode_image(pixels[:, ::-1][:, ::-1], image_format, quality) == (data, mime_type)
    image = Image.open(io.BytesIO(data))
    assert image.format == image_format.upper() and image.size == (80, 48) and image.mode == "RGB"
    assert (np.asarray(image) == pixels).all() == lossless
    assert not image.info.get("exif")


def test_jpeg_keeps_colours_at_full_resolution():
    red_and_blue = np.zeros((16, 16, 3), np.uint8)
    red_and_blue[:, ::2, 0] = 255
    red_and_blue[:, 1::2, 2] = 255
    decoded = np.asarray(Image.open(io.BytesIO(encode_image(red_and_blue, "jpeg")[0]))).astype(int)
    assert abs(decoded - red_and_blue).max() < 40


def test_pixels_of_another_kind_are_refused(outputs):
    for wrong in (
        outputs.picture(1).astype(np.float32),
        outputs.picture(1)[..., 0],
        np.zeros((4, 4, 4), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected uint8"):
            encode_image(wrong, "png")


def test_names_of_shards_are_read_back_and_nothing_else_is():
    for shard in (0, 123, 99_999_999, 123_456_789):
        assert layout.shard_number(layout.shard_name(shard)) == shard
    assert layout.shard_name(123) == "shard-00000123.parquet"
    for name in (
        "shard-123.parquet",
        "shard-000000123.parquet",
        "shard-00000123.parquet.tmp",
        "x/shard-00000001.parquet",
    ):
        assert layout.shard_number(name) is None


def test_a_shard_written_twice_is_the_same_file(outputs, tmp_path):
    output = str(tmp_path / "out")
    table = outputs.result_table(outputs.plan_table(shard=3, errors=(4,)))
    shards.write_shard(output, 3, table)
    path = tmp_path / "out" / "data" / "shard-00000003.parquet"
    first = path.read_bytes()
    shards.write_shard(output, 3, outputs.result_table(outputs.plan_table(shard=3, errors=(4,))))
    assert path.read_bytes() == first
    (tmp_path / "out" / "data" / "notes.txt").write_text("mine")
    assert layout.list_done(output) == {3}
    with pytest.raises(ValueError, match="rows of another shard"):
        shards.write_shard(output, 4, table)


class Counted(Ranges):
    """Ranges of bytes in memory, which notes what it requests."""

    WINDOW_BYTES = 1 << 14

    def __init__(self, data):
        super().__init__("s3://bucket/key", len(data))
        self.data, self.asked = data, []

    def _fetch(self, start, stop):
        self.asked.append(stop - start)
        return self.data[start:stop]


def test_a_shard_larger_than_two_windows_is_requested_once(outputs):
    table = outputs.result_table(outputs.plan_table(rows=96))
    for rows in (96, 2):
        data = shards.shard_bytes(table[:rows]).to_pybytes()
        file = Counted(data)
        assert (len(data) > 3 * file.WINDOW_BYTES) == (rows == 96)
        with pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False) as parquet:
            assert shards.read_shard(parquet).equals(table[:rows])
        assert len(data) - len(b"PAR1") <= sum(file.asked) <= len(data)
        assert len(file.asked) <= -(-len(data) // file.WINDOW_BYTES)


def test_ranges_give_the_bytes_of_any_place():
    draw, data = np.random.default_rng(0), np.random.default_rng(1).bytes(100_000)
    for _ in range(20):
        file = Counted(data)
        for start, count in draw.integers(0, (110_000, 40_000), (30, 2)):
            file.seek(int(start))
            assert file.read(int(count)) == data[start : start + count]
            assert file.tell() == max(start, min(start + count, len(data)))
        file.seek(-10, io.SEEK_END)
        assert file.read() == data[-10:]


def test_a_page_with_a_wrong_bit_is_one_sentence(outputs, tmp_path):
    shards.write_shard(str(tmp_path), 0, outputs.result_table(outputs.plan_table()))
    path = layout.shard_path(str(tmp_path), 0)
    flip_bit(path, "image.bytes")
    words = r"shard-00000000\.parquet cannot be read \(.*CRC.*\): move it"
    with (
        pytest.raises(InputError, match=words) as caught,
        shards.open_finished(str(tmp_path), 0) as parquet,
    ):
        parquet.read()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"shard-00000000\.parquet.*which holds source images, is corrupt"):
        list(read_cells(path, [0]))


def test_only_the_volatile_columns_tell_two_makings_apart(outputs):
    one = outputs.result_table(outputs.plan_table(), made=Producer("replica 1", "e" * 64, 1))
    two = outputs.result_table(outputs.plan_table(), made=Producer("replica 2", "e" * 64, 3))
    differing = {name for name in one.column_names if one.column(name) != two.column(name)}
    assert differing and differing <= set(outputs_schema.VOLATILE)


def test_a_file_reads_back_with_the_declared_schema(outputs, tmp_path):
    table = outputs.result_table(outputs.plan_table(rows=70), save_tokens=True)
    shards.write_shard(str(tmp_path), 0, table)
    with shards.open_shard(str(tmp_path), 0) as parquet:
        assert parquet.schema_arrow.equals(table.schema, check_metadata=True)
        assert parquet.read().equals(table)
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        assert [group.num_rows for group in groups] == [32, 32, 6]
        compression = {groups[0].column(i).path_in_schema: groups[0].column(i).compression for i in range(40)}
        assert compression["image.bytes"] == "UNCOMPRESSED" and compression["prompt"] == "ZSTD"
    with pytest.raises(FileNotFoundError), shards.open_shard(str(tmp_path), 1):
        pass


def test_all_readers_agree(outputs, tmp_path):
    import datasets
    import duckdb
    import pandas

    output = str(tmp_path / "out")
    for shard in range(2):
        table = outputs.result_table(
            outputs.plan_table(first_row=6 * shard, shard=shard, errors=(1,) if shard else ())
        )
        shards.write_shard(output, shard, table)
    files = sorted(str(path) for path in (tmp_path / "out" / "data").iterdir())

    frame = pandas.read_parquet(tmp_path / "out" / "data")
    assert list(frame["row_id"]) == list(range(12)) and frame["image"][0]["path"] == "row-00000000.png"

    counted = duckdb.sql(
        f"select status, count(*) from '{tmp_path}/out/data/*.parquet' group by 1"
    ).fetchall()
    assert sorted(counted) == [("error", 1), ("ok", 11)]
    nested = duckdb.sql(f"select image.bytes from '{files[0]}' where row_id = 0").fetchall()[0]
    assert Image.open(io.BytesIO(nested[0])).size == (80, 64)

    dataset = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset[0]["image"].size == (80, 64) and dataset[7]["image"] is None
    assert (np.asarray(dataset[2]["image"]) == outputs.picture(1002)).all()
    assert dataset[3]["tag"] == "t3"


def test_features_of_carried_pictures_are_kept_in_hugging_face_s_metadata():
    features = {"photo": {"_type": "Image"}, "gone": {"_type": "Value", "dtype": "string"}}
    carried = pa.schema(
        [("photo", outputs_schema.IMAGE_TYPE)],
        metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    found = json.loads(result_schema(carried).metadata[b"huggingface"])["info"]["features"]
    assert found == {"image": {"_type": "Image"}, "photo": {"_type": "Image"}}
    broken = carried.with_metadata({b"huggingface": b"[1"})
    assert set(json.loads(result_schema(broken).metadata[b"huggingface"])["info"]["features"]) == {"image"}


def test_run_json_is_made_once_and_guards_the_output(tmp_path):
    output = str(tmp_path)
    fields = {
        "task": "edit",
        "seed": 1,
        "sampling": {"cfg": 3.0, "top_k": 1000},
        "templates": {},
        "width": None,
    }
    run_file.put_run(output, fields, {"replicas": [1, 2]})
    made = (tmp_path / "run.json").read_bytes()
    run_file.put_run(output, fields | {"sampling": {"cfg": 3, "top_k": 1000}}, {"replicas": [4, 4]})
    assert (tmp_path / "run.json").read_bytes() == made
    document = run_file.read_run(output)
    assert document["config"] == fields and document["config_digest"] == values.digest(fields)
    other = {
        "task": "edit",
        "seed": 2,
        "sampling": {"cfg": 5.0, "top_k": 1000},
        "templates": {"en": "x" * 200},
        "width": None,
    }
    with pytest.raises(InputError) as caught:
        run_file.put_run(output, other)
    message = str(caught.value)
    assert (
        "seed is 1 in the output and 2 in this run" in message
        and "sampling.cfg is 3.0 in the output and 5.0 in this run" in message
    )
    assert "templates.en is absent in the output" in message and "another output folder" in message
    assert "top_k" not in message and len(message) < 500


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 9, "config": {}}', b'{"format": 1}'])
def test_a_run_json_of_another_kind_is_one_sentence(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "run.json"))):
        run_file.read_run(str(tmp_path))


def test_a_folder_without_run_json_is_no_output(tmp_path):
    with pytest.raises(InputError, match=r"not the output of a run"):
        run_file.read_run(str(tmp_path))


def test_digests_do_not_depend_on_order_or_on_how_a_number_is_written():
    assert values.digest({"a": 1.0, "b": [2, {"c": "ü"}]}) == values.digest({"b": (2, {"c": "ü"}), "a": 1})
    assert values.digest({"a": 1}) != values.digest({"a": True})
    with pytest.raises(ValueError):
        values.digest({"a": float("nan")})


def test_an_environment_names_what_may_round_otherwise():
    one = outputs_rows.environment("cpu", 1, {"group_rows": 8})
    assert one["versions"]["torch"] and one["versions"]["pillow"]
    assert values.digest(one) == values.digest(outputs_rows.environment("cpu", 1, {"group_rows": 8}))
    for other in (
        ("cpu", 2, {"group_rows": 8}),
        ("H200", 1, {"group_rows": 8}),
        ("cpu", 1, {"group_rows": 16}),
    ):
        assert values.digest(outputs_rows.environment(*other)) != values.digest(one)


def test_map_shards_keeps_order_and_passes_errors_on():
    assert list(shards.map_shards(lambda shard: shard * shard, range(100), threads=4)) == [
        n * n for n in range(100)
    ]

    def fail(shard):
        if shard == 5:
            raise InputError("five")
        return shard

    with pytest.raises(InputError, match="five"):
        list(shards.map_shards(fail, range(100), threads=4))


def test_a_table_of_texts_or_errors_only_is_one_row_group(outputs, tmp_path):
    table = outputs.result_table(outputs.plan_table(rows=40, errors=range(40)))
    shards.write_shard(str(tmp_path), 0, table)
    assert pq.ParquetFile(layout.shard_path(str(tmp_path), 0)).num_row_groups == 1


def test_what_is_wrong_with_the_storage_is_not_taken_for_a_broken_file(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InputError, match=r"run\.json cannot be used, it is a folder"):
        run_file.read_run(str(tmp_path))
    (tmp_path / "_SUCCESS").mkdir()
    with pytest.raises(InputError, match=r"_SUCCESS cannot be used, it is a folder"):
        read_success(str(tmp_path))


def test_an_edit_keeps_its_source_and_an_answer_is_a_text_with_a_hash(outputs, tmp_path):
    outputs.make_task_output(tmp_path / "edit", "edit", bad=(1,))
    outputs.make_task_output(tmp_path / "understand", "understand", bad=(1,))
    for task in ("edit", "understand"):
        table = pq.read_table(layout.shard_path(str(tmp_path / task), 0))
        assert table.schema.equals(result_schema(outputs.CARRIED), check_metadata=True)
        rows = table.to_pylist()
        assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok", "ok", "ok"]
        for number, row in enumerate(rows):
            source, uri = row["source"], tmp_path / "sources" / f"s{number // 2}.png"
            assert (source["uri"], source["row_id"]) == (str(uri), None)
            if row["status"] == "error":
                assert row["error_type"] == "image" and source["sha256"] is None and row["image"] is None
                continue
            assert source["sha256"] == hashlib.sha256(uri.read_bytes()).hexdigest()
            assert (source["width"], source["height"]) == (60, 40)
            if task == "edit":
                assert (row["width"], row["height"], row["text"]) == (64, 48, "")
                assert row["sha256"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
            else:
                assert row["text"].startswith(f"Score {3 * number % 10}/10: row {number}, ein Känguru")
                assert row["sha256"] == hashlib.sha256(row["text"].encode()).hexdigest()
                assert (row["image"], row["mime_type"], row["width"]) == (None, "", None)
                assert (row["finish_reason"], row["output_tokens"]) == ("stop", 2)


def test_a_text_needs_something_that_decodes_it(outputs):
    plan, schema = outputs.plan_table(rows=1), result_schema(outputs.CARRIED)
    run = RunConstants("understand", "m" * 64, "c" * 64)
    given = Outcome(0, outputs.STARTED, 0.5, tokens=np.array([1], np.int32))
    with pytest.raises(ValueError, match="nothing decodes it"):
        build_result_table(plan, [given], run, Producer(), schema)
    with pytest.raises(ValueError, match="no text"):
        build_result_table(plan, outputs.outcomes(plan), run, Producer(), schema, decode=str)


def test_the_content_of_an_answer_is_that_of_its_source_and_length(outputs):
    def digest_of(sha256="0" * 64, **changes):
        row = outputs.plan_table(rows=1).to_pylist()[0] | {"source": {"sha256": sha256}}
        schema = outputs.plan_table(1).schema.append(pa.field("source", outputs_schema.SOURCE_TYPE))
        given = Outcome(0, outputs.STARTED, 0.5, tokens=np.array([1], np.int32))
        run = RunConstants("understand", "m" * 64, "c" * 64, **changes)
        plan = pa.Table.from_pylist([row], schema)
        table = build_result_table(plan, [given], run, Producer(), result_schema(outputs.CARRIED), decode=str)
        return table.column("content_digest")[0].as_py()

    assert digest_of() == digest_of(image_format="jpeg")
    assert len({digest_of(), digest_of("1" * 64), digest_of(max_new_tokens=7)}) == 3
