"""Bytes that atheris makes go to the loader of pictures and the reader of manifests: `make fuzz`.

    python -m tests.fuzz pictures|manifests [options of libFuzzer, such as -max_total_time=60]

Rows, a picture or one sentence are what may come of them; everything else is a finding, which libFuzzer
keeps in a file. It starts from small good files.
"""

import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["wallaroo.workflows", "PIL"]):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from wallaroo.model.errors import InputError, RowError
    from wallaroo.workflows.manifests import discover, read
    from wallaroo.workflows.manifests import schema as manifests_schema
    from wallaroo.workflows.sources import decode

ROW = {"id": ["a", "b"], "prompt": ["a red circle", "一个红色的圆"], "cfg": [3.0, None], "seed": [1, 2]}


def pictures(data: bytes) -> None:
    """One picture."""
    try:
        found = decode.decode(data, most_pixels=1 << 20, seconds=5)
    except RowError as error:
        assert "\n" not in str(error)
    else:
        assert found.mode == "RGB" and found.width * found.height <= 1 << 20


def manifests(data: bytes) -> None:
    """A file; its first byte chooses the format."""
    if not data:
        return
    with tempfile.NamedTemporaryFile(suffix=(".csv", ".jsonl", ".parquet")[data[0] % 3]) as file:
        file.write(data[1:])
        file.flush()
        try:
            for one in discover.discover(file.name).files:
                found, columns = read.scan(one), manifests_schema.Columns()
                columns.add(0, one.path, found)
                schema = columns.schema()
                rows = sum(
                    batch.table.num_rows for piece in found.pieces for batch in read.read(piece, schema)
                )
                assert rows == sum(piece.rows for piece in found.pieces)
        except InputError as error:
            assert "\n" not in str(error)


def good_files(target: str) -> list[bytes]:
    """What libFuzzer begins with."""
    if target == "manifests":
        table = io.BytesIO()
        pq.write_table(pa.table(ROW), table)
        lines = b'{"id": "a", "prompt": "x", "tags": [1, 2]}\n{"id": "b", "prompt": null}\n'
        return [b'\0id,prompt,cfg\na,x,3\nb,"y\nz",\n', b"\1" + lines, b"\2" + table.getvalue()]
    found = []
    for form, mode in (("PNG", "RGBA"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("GIF", "P"), ("TIFF", "I;16")):
        file = io.BytesIO()
        Image.new(mode, (9, 7)).save(file, form)
        found.append(file.getvalue())
    return found


def main() -> None:
    """Fuzz one target until libFuzzer's options say that it is enough."""
    target, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(good_files(target)):
            (Path(corpus) / str(number)).write_bytes(data)
        atheris.Setup(
            [sys.argv[0], corpus, "-rss_limit_mb=4096", "-timeout=30", *options],
            {"pictures": pictures, "manifests": manifests}[target],
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
