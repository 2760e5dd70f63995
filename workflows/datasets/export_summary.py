"""The summary of an export, and the mark of a partial one."""

import json
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.export_files import Results
from wallaroo.workflows.datasets.export_sink import Growing

PARTIAL_FILE = "_partial.json"
"""Is in DEST while the export is partial."""

_WRITER = "wallaroo export --partial"


@dataclass(frozen=True)
class ExportSummary:
    """The result of an export."""

    dest: str
    """Folder of its files."""
    what: str
    """What an ok row gives, such as `picture`."""
    exported: int
    """Ok rows that are in `dest` now."""
    errors: int
    """Error rows, which give nothing but what `failed` says."""
    failed: str
    """What the format writes of error rows, as the end of a phrase."""
    left_out: int
    """Ok rows that the format has no place for."""
    why: str
    """Why they are left out."""
    files: int
    """Files of the export in `dest`, new and unchanged."""
    unchanged: int
    """Files that were there already with these bytes."""
    renamed: int
    """Rows whose id is no safe file name."""
    misses: int
    """Files that an evaluator looks for and that are missing."""
    missed: tuple[str, ...]
    """The first names of `misses`."""
    unread: int = 0
    """Sources that signed edits only name, since they have changed."""
    finished_shards: int = 0
    """Shards of the output that were finished at the start."""
    shards: int = 0
    """Planned shards."""
    missing_rows: int = 0
    """Planned rows of unfinished shards."""
    planned: bool = True
    """Whether the plan was complete."""
    partial: bool = False
    """Whether the output was not finished."""

    def text(self) -> str:
        """The summary as a sentence or a few."""
        parts = [
            f"{_number(self.exported, self.what)} exported to {self.dest}, {_number(self.files, 'file')}"
        ]
        if self.unchanged:
            parts[0] += f", {self.unchanged:,} of them unchanged"
        if self.errors:
            parts.append(f"{_number(self.errors, 'error row')} {self.failed}")
        if self.left_out:
            parts.append(f"{_number(self.left_out, 'ok row')} left out, since {self.why}")
        if self.renamed:
            parts.append(f"{_number(self.renamed, 'name')} with a hash, since the id is not a safe file name")
        if self.misses:
            more = self.misses - len(self.missed)
            names = ", ".join(self.missed) + (f" and {_number(more, 'more file')}" if more else "")
            parts.append(f"the evaluator will miss {names}")
        if self.unread:
            parts.append(f"{_number(self.unread, 'source')} named by digest alone, since they have changed")
        again = " Export again when more is finished." if self.partial else ""
        return f"{self._partial_text()}{'; '.join(parts)}.{again}"

    def _partial_text(self) -> str:
        if not self.partial:
            return ""
        done = self.exported + self.errors + self.left_out
        so_far = "" if self.planned else " so far"
        return (
            f"Partial export: {self.finished_shards:,} of {_number(self.shards, 'shard')} and {done:,} of "
            f"{_number(done + self.missing_rows, 'row')} planned{so_far} are finished. "
        )


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def refuse_foreign_mark(dest: str) -> None:
    """Refuses a folder with a foreign file under the name of the mark.

    Raises:
        InputError: There is such a file.
    """
    if _read_mark(dest) == {}:
        raise InputError(
            f"{storage.join(dest, PARTIAL_FILE)} exists, and no export wrote it: choose another DEST, or "
            f"--overwrite to replace it."
        )


def read_growing(dest: str) -> dict[str, tuple[str, ...]]:
    """Returns the files that a partial export wrote and that a later one may replace.

    Args:
        dest: The folder of the export.

    Returns:
        Path below the folder -> sha256 of each content that it may have; empty without a mark.
    """
    found = (_read_mark(dest) or {}).get("growing")
    if not isinstance(found, dict):
        return {}
    return {
        name: tuple(digest for digest in digests if isinstance(digest, str))
        for name, digests in found.items()
        if isinstance(digests, list)
    }


def put_mark(dest: str, results: Results, growing: Growing, **counts: int) -> None:
    """Writes the mark of a partial export.

    Args:
        dest: The folder of the export.
        results: Of the output.
        growing: What a later export may replace.
        **counts: Numbers of rows, as far as they are known.
    """
    document = {
        "partial": True,
        "written_by": _WRITER,
        "output": results.output,
        "finished_shards": results.finished_shards,
        "shards": len(results.plan.shards),
        "plan_complete": results.plan.complete,
        **counts,
        "growing": {name: list(digests) for name, digests in growing.items()},
    }
    storage.write_atomic(storage.join(dest, PARTIAL_FILE), json.dumps(document, indent=2).encode() + b"\n")


def remove_mark(dest: str) -> None:
    """Removes the mark of an earlier export from a complete one; a foreign file stays."""
    if _read_mark(dest):
        storage.delete(storage.join(dest, PARTIAL_FILE))


def _read_mark(dest: str) -> dict[str, Any] | None:
    """Contents of the mark; empty if the file is foreign, None if there is none."""
    try:
        found = json.loads(storage.read_bytes(storage.join(dest, PARTIAL_FILE)))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        return {}
    return found if isinstance(found, dict) and found.get("written_by") == _WRITER else {}
