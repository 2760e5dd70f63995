"""Planning: manifest -> plan, in three passes, before any GPU time is spent."""

import dataclasses
import json
import secrets
from typing import Any

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.listing import list_pictures
from wallaroo.workflows.manifests.types import Manifest, encode_schema
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.outputs.layout import PLAN_FOLDER
from wallaroo.workflows.plans.checks import check_same, refuse_inside
from wallaroo.workflows.plans.columns import carried_schema, check_columns
from wallaroo.workflows.plans.counts import RowCounts, counted
from wallaroo.workflows.plans.increments import (
    PAIR,
    PlannedPairs,
    check_carried,
    picture_pairs,
    read_planned,
    row_pairs,
    unseen,
    write_pictures,
    write_planned,
)
from wallaroo.workflows.plans.parts import PartWork, PieceWork, folder_of, write_part
from wallaroo.workflows.plans.passes import PieceRows, ScannedManifest, each, ids_of, pack_bits, selected_rows
from wallaroo.workflows.plans.plan import FORMAT, Plan, PlanPart, Round, read_plan
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.storage.checkpoints import read_checkpoint

PART_SHARDS = 1024
"""Most shards of a part."""


def make_plan(manifest: str, settings: PlanSettings, model: str, output: str | None = None) -> Plan:
    """Plans the rows of a manifest that are not planned yet. Ray must be connected.

    Planned rows are never planned again: a second call with the same arguments only reads the parts. A row
    that cannot be served is planned as an error row.

    Args:
        manifest: Local or `s3://` path.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run; None to count only and write nothing.

    Returns:
        The whole plan.

    Raises:
        InputError: The manifest cannot be read or has no rows, or the output has the plan of another
            manifest, another model or other settings.
        OptionError: The checkpoint lacks the size that the settings ask for.
    """
    checkpoint = read_checkpoint(model)
    settings.check(checkpoint.config)
    refuse_inside(manifest, output)
    found = discover(manifest, settings.task, settings.image_column)
    return extend_plan(open_plan(found, settings, checkpoint.digest, output), found, settings, model, output)


def open_plan(found: Manifest, settings: PlanSettings, model_digest: str, output: str | None) -> Plan:
    """Reads the valid parts of the plan of an output. Needs no Ray.

    Args:
        found: The manifest.
        settings: What the plan depends on.
        model_digest: Digest of the checkpoint, hexadecimal.
        output: Folder of the run; None for a plan without parts.

    Returns:
        The plan; without parts if there is none.

    Raises:
        InputError: The plan is of another manifest, another model or other settings.
    """
    plan = read_plan(output) if output else Plan()
    check_same(plan, found, settings, model_digest, output)
    return plan


def is_complete(plan: Plan, found: Manifest, settings: PlanSettings) -> bool:
    """Tells whether a plan has all rows that are asked for, from the plan and the listing alone.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.

    Returns:
        False also where the rows must be read to know.
    """
    if settings.incremental:
        return bool(plan.rounds) and not unseen(found, plan.rounds, settings).files
    if not plan.complete or settings.where is not None:
        return False
    taken = np.logical_or.reduce([one.selected for one in plan.rounds])
    return bool(taken[: settings.limit].all())


def scan_early(plan: Plan, found: Manifest, settings: PlanSettings) -> ScannedManifest:
    """Scans a small manifest before Ray starts, and refuses it if its columns or their lack require that.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.

    Returns:
        The manifest for `extend_plan`. A large one is scanned by that, in Ray tasks.

    Raises:
        InputError: A file cannot be read, a column that the task needs is missing, or there is no row.
        OptionError: `where` does not fit the columns.
    """
    source = ScannedManifest(found)
    if source.quick and not settings.incremental:
        if source.rows:
            check_columns(source.schema, settings)
        if settings.where is not None:
            Filter(settings.where, source.schema)
        if not source.rows and not plan.parts:
            raise _nothing_to_do(found.path, "has no rows")
    return source


def extend_plan(
    plan: Plan,
    found: Manifest,
    settings: PlanSettings,
    model: str,
    output: str | None = None,
    source: ScannedManifest | None = None,
) -> Plan:
    """Plans the rows that a plan from `open_plan` lacks. Ray must be connected.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run; None to count only and write nothing.
        source: The manifest from `scan_early`; None to scan it here.

    Returns:
        The whole plan.

    Raises:
        InputError: As `make_plan`.
        OptionError: The settings are incremental, but there is no output.
    """
    if settings.incremental:
        return _make_increment(plan, found, settings, model, output)
    source = source or ScannedManifest(found)
    while not is_complete(plan, found, settings):
        try:
            return _Planner(source, settings, model, output).extended(plan)
        except _LostRace:
            # Another process made a part meanwhile, and its choice holds.
            plan = open_plan(found, settings, read_checkpoint(model).digest, output)
    return plan


class _LostRace(Exception):
    pass


def _make_increment(
    plan: Plan, found: Manifest, settings: PlanSettings, model: str, output: str | None
) -> Plan:
    """Does `extend_plan` for a growing manifest: rounds of one part each, until nothing is new.

    With one part, one JSON decides for a whole round. Whoever loses the race for it looks for new rows again.
    """
    if output is None:
        raise OptionError("--incremental needs the output of earlier runs: give OUTPUT.")
    while True:
        earlier, left = read_planned(output, plan.rounds), unseen(found, plan.rounds, settings)
        identity, pairs = left.identity(), None
        if any(file.format == "pictures" for file in left.files):
            left, pairs = _new_pictures(left, earlier, output)
        added = None
        if left.files:
            try:
                source = ScannedManifest(left, plan.rounds, settings)
                added = _Increment(source, settings, model, output, earlier, identity).added(plan, pairs)
            except _LostRace:
                plan = open_plan(found, settings, read_checkpoint(model).digest, output)
                continue
        if added is None:
            if not plan.parts:
                raise _nothing_to_do(found.path, "has no rows")
            return plan
        plan = added


def _new_pictures(found: Manifest, earlier: PlannedPairs, output: str) -> tuple[Manifest, np.ndarray]:
    """Replaces a folder of pictures by a manifest of the new ones. Returns their PAIRs too."""
    files = list_pictures(found.path)
    pairs = picture_pairs(files)
    new = np.flatnonzero(earlier.new(pairs)[0])
    one = [write_pictures(output, [files[index] for index in new])] if len(new) else []
    return dataclasses.replace(found, files=tuple(one)), pairs[new]


class _Planner:
    """Adds rounds to a plan."""

    def __init__(self, source: ScannedManifest, settings: PlanSettings, model: str, output: str | None):
        self.source, self.settings, self.model, self.output = source, settings, model, output
        self.versions: np.ndarray | None = None
        # A file without rows may have no columns either; that the rows are missing is the better message.
        self.warnings = source.warnings + (check_columns(source.schema, settings) if source.rows else [])

    def extended(self, plan: Plan) -> Plan:
        """Plans all rows that are asked for.

        Args:
            plan: The plan so far.

        Returns:
            The whole plan.

        Raises:
            InputError: The manifest has changed, or gives no rows.
            _LostRace: Another process planned meanwhile.
        """
        source = self.source
        if plan.rounds and len(plan.rounds[0].selected) != source.rows:
            raise _changed(source.manifest.path)
        check_carried(source.schema, plan.rounds, self.settings)
        if plan.parts and not plan.complete:
            plan = self._with_round(plan, plan.rounds[-1].selected, plan.rounds[-1])
        selected = selected_rows(source, self.settings)
        for earlier in plan.rounds:
            selected &= ~earlier.selected
        if selected.any():
            return self._with_round(plan, selected)
        if not plan.parts:
            why = "has no rows"
            if source.rows:
                why = f"has no row that matches --where '{self.settings.where}'"
            raise _nothing_to_do(source.manifest.path, why)
        return plan

    def _with_round(self, plan: Plan, selected: np.ndarray, old: Round | None = None) -> Plan:
        """Adds a round of the selected rows, or finishes one.

        Args:
            plan: The plan so far.
            selected: bool [rows of the manifest].
            old: The last round of the plan, if that one lacks parts and is to be finished.

        Returns:
            The plan with the round.
        """
        earlier = plan.rounds[:-1] if old else plan.rounds
        # Rounds of a growing manifest have a manifest each, so their bits do not compare.
        same = [one.selected for one in earlier if not one.known]
        taken = np.logical_or.reduce(same or [np.zeros_like(selected)])
        counts = counted(self.source, selected, taken, self.settings)
        ends = np.cumsum(counts.outputs)
        rows = int(ends[-1])
        if not rows and plan.parts:
            return plan  # all are joined with rows of earlier rounds
        if old and old.rows != rows:
            raise _changed(self.source.manifest.path)
        checkpoint = read_checkpoint(self.model)
        carried = carried_schema(self.source.schema, self.settings)
        now = old or Round(
            rows=rows,
            shard_rows=self.settings.shard_rows(rows, checkpoint.config),
            selected=selected,
            settings=self.settings.meaning(),
            model_digest=checkpoint.digest,
            carried=carried,
            warnings=self.warnings + _joined_in_words(counts),
            **self._decided(),
        )
        number = len(earlier)
        before = [part for part in plan.parts if part.round < number]
        done = [part for part in plan.parts if part.round == number]
        constants = {
            "schema": self.source.schema,
            "settings": self.settings,
            "model": self.model,
            "output": self.output,
            "shard_rows": now.shard_rows,
        }
        first_row_id, first_shard = sum(part.rows for part in before), before[-1].end if before else 0
        first_part = before[-1].part + 1 if before else 0
        step = PART_SHARDS * now.shard_rows
        items = {}
        for start in range(len(done) * step, rows, step):
            stop = min(start + step, rows)
            index = first_part + start // step
            items[index] = PartWork(
                index,
                first_row_id + start,
                first_shard + start // now.shard_rows,
                stop - start,
                self._work(selected, counts, ends, start, stop),
            )
        waiting: dict[int, PlanPart] = {}
        parts = [*before, *done]
        for index, answer in each(items, write_part, **constants):
            item = items[index]
            waiting[index] = PlanPart(
                part=index,
                round=number,
                complete=item.first_row_id + item.rows == first_row_id + rows,
                first_row_id=item.first_row_id,
                first_shard=item.first_shard,
                rows=item.rows,
                shards=-(-item.rows // now.shard_rows),
                shard_rows=now.shard_rows,
                **answer,
            )
            # Parts become valid in order, so that the valid ones always are the beginning of a plan.
            while (ready := waiting.pop(first_part + len(parts) - len(before), None)) is not None:
                self._commit(ready, now if len(parts) == len(before) else None)
                parts.append(ready)
        return Plan(tuple(parts), (*earlier, now))

    def _work(
        self, selected: np.ndarray, counts: RowCounts, ends: np.ndarray, start: int, stop: int
    ) -> list[PieceWork]:
        """Finds the pieces of the planned rows [start, stop) of a round, and the rows to skip in each."""
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop)
        work = []
        for index in range(first, last + 1):
            begin = int(ends[index] - counts.outputs[index])
            if counts.outputs[index]:
                bits = selected[self.source.slice(index)].copy()
                bits[counts.joined.get(index, [])] = False
                work.append(
                    PieceWork(
                        PieceRows(self.source.pieces[index], pack_bits(bits)),
                        sorted(counts.duplicates.get(index, ())),
                        self._versions(index),
                        skip=max(0, start - begin),
                        take=min(stop, int(ends[index])) - max(start, begin),
                    )
                )
        return work

    def _versions(self, index: int) -> dict[int, int]:
        """Row in the piece -> version, for rows that are not the first of their id."""
        if self.versions is None:
            return {}
        mine = self.versions[self.source.slice(index)]
        return {int(row): int(mine[row]) for row in np.flatnonzero(mine)}

    def _commit(self, part: PlanPart, opening: Round | None) -> None:
        if self.output is None:
            return
        document = {"format": FORMAT, **dataclasses.asdict(part)}
        if opening is not None:
            document["opening"] = opening.to_values()
        path = storage.join(self.output, PLAN_FOLDER, f"{part.name}.json")
        if not storage.put_if_absent(path, json.dumps(document, ensure_ascii=False).encode() + b"\n"):
            raise _LostRace

    def _decided(self) -> dict[str, Any]:
        """Fields of a Round that say what it is planned from."""
        return {"manifest": self.source.manifest.identity()}


class _Increment(_Planner):
    """Adds a round of new rows of a growing manifest."""

    def __init__(
        self,
        source: ScannedManifest,
        settings: PlanSettings,
        model: str,
        output: str,
        earlier: PlannedPairs,
        identity: list[list[Any]],
    ):
        """identity: of the files that are read, and need not be again once all that is new is planned."""
        super().__init__(source, settings, model, output)
        self.folder, self.earlier, self.identity, self.file = output, earlier, identity, ""

    def added(self, plan: Plan, pairs: np.ndarray | None) -> Plan | None:
        """Adds a round of the new rows.

        Args:
            plan: The plan so far.
            pairs: PAIR [rows of the source]; None to compute them.

        Returns:
            The plan with the round; None if nothing is new.

        Raises:
            _LostRace: Another process planned meanwhile.
        """
        source = self.source
        if not source.rows:
            return None
        pairs = self._pairs() if pairs is None else pairs
        selected, self.versions = self.earlier.new(pairs)
        whole = selected.sum()
        if not whole:
            return None
        config = read_checkpoint(self.model).config
        while True:
            counts = counted(source, selected, np.zeros_like(selected), self.settings)
            rows = int(counts.outputs.sum())
            most = PART_SHARDS * self.settings.shard_rows(rows, config)
            if rows <= most:
                break
            # The next round plans the rest.
            chosen = np.flatnonzero(selected)
            selected = selected.copy()
            selected[chosen[max(1, len(chosen) * most // (rows + 1)) :]] = False
        if selected.sum() < whole:
            self.identity = []
        self.file = write_planned(self.folder, pairs[selected], self.versions[selected])
        return self._with_round(plan, selected)

    def _decided(self) -> dict[str, Any]:
        schema = encode_schema(self.source.schema)
        return {"manifest": self.identity, "known": self.file, "schema": schema}

    def _pairs(self) -> np.ndarray:
        pairs = np.empty(self.source.rows, PAIR)
        every = np.ones(self.source.rows, bool)
        constants = {
            "schema": self.source.schema,
            "settings": self.settings,
            "when": secrets.token_hex(8),
        }
        for index, found in each(self.source.items(every), _pair, **constants):
            pairs[self.source.slice(index)] = found
        return pairs


def _pair(source: PieceRows, schema: pa.Schema, settings: PlanSettings, when: str) -> np.ndarray:
    """PAIR of all rows of a piece."""
    found = []
    column = column_names(schema, settings)["id"]
    for rows in source.read(schema, set(schema.names)):
        faults = [rows.faults.get(number, "") for number in rows.numbers]
        folder = folder_of(rows.piece.file.path)
        found.append(row_pairs(rows.table, ids_of(rows, column), settings, folder, faults, when))
    return np.concatenate(found)


def _joined_in_words(counts: RowCounts) -> list[str]:
    joined = sum(map(len, counts.joined.values()))
    if not joined:
        return []
    return [f"Rows with the id and prompt of an earlier row are joined with it: {joined:,}."]


def _nothing_to_do(path: str, why: str) -> InputError:
    return InputError(f"The manifest {path} {why}: correct it.")


def _changed(path: str) -> InputError:
    return InputError(f"The manifest {path} changed while it was read: start again when it is complete.")
