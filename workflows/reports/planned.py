"""The planned rows of a part, shard after shard, from one pass over its file."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import PLAN_FOLDER
from wallaroo.workflows.plans.plan import PlanPart


def planned_shards(
    output: str,
    part: PlanPart,
    stamp: str | None,
    shards: Sequence[int],
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[int, pa.Table]]:
    """Reads the planned rows of some shards of a part; one shard is in memory at a time.

    Args:
        output: Where the plan is written, local or on S3.
        part: Of the plan.
        stamp: Of the part's file, from a listing of `plan/`; None if it is not there.
        shards: Numbers of shards of the part, ascending.
        columns: Those wanted, if they are there; all if None.

    Returns:
        Each number with its rows.

    Raises:
        InputError: The part's file is absent or corrupt.
    """
    if not shards:
        return
    path = storage.join(output, PLAN_FOLDER, part.file)
    remedy = f"but {part.json_name} names it: restore it, or give a new output"
    if stamp is None:
        raise InputError(f"{path} is missing, {remedy}.")
    try:
        with storage.open_ranges(path, storage.stamp_size(stamp)) as file, pq.ParquetFile(file) as parquet:
            for shard in shards:
                yield shard, parquet.read_row_group(shard - part.first_shard, columns, use_threads=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing, {remedy}.") from None
    except (pa.ArrowException, OSError, IndexError) as error:
        raise InputError(f"{path} is corrupt, {remedy}.") from error
