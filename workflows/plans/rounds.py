"""A round of a plan: its rows are counted, cut into parts, planned in Ray tasks, and its parts are committed.

A part is valid once its JSON exists. Parts are committed in order, so the valid ones are always the beginning
of a plan.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import PLAN_FOLDER
from wallaroo.workflows.plans.columns import carried_schema
from wallaroo.workflows.plans.counts import RowCounts, count_rows
from wallaroo.workflows.plans.increments import check_carried
from wallaroo.workflows.plans.parts import PartWork, PieceWork, write_part
from wallaroo.workflows.plans.passes import each, pack_bits
from wallaroo.workflows.plans.plan import FORMAT, Plan, PlanPart, Round
from wallaroo.workflows.plans.scanned import PieceRows, ScannedManifest, selected_rows
from wallaroo.workflows.storage.checkpoints import read_checkpoint

PART_SHARDS = 1024
"""Most shards of a part."""


class LostRace(Exception):
    """Another process committed the part first, and its part is the valid one."""


class RoundPlanner:
    """Adds rounds to a plan."""

    def __init__(self, source: ScannedManifest, model: str, output: str | None):
        """Keeps what the rounds are planned from.

        Args:
            source: The manifest, with the settings of the plan.
            model: Folder of the checkpoint, local or on S3.
            output: Folder of the run; None to count only and write nothing.
        """
        self.source, self.settings, self.model, self.output = source, source.settings, model, output
        self.versions: np.ndarray | None = None

    def extended(self, plan: Plan) -> Plan:
        """Plans all rows that are asked for.

        Args:
            plan: The plan so far.

        Returns:
            The whole plan.

        Raises:
            InputError: The manifest has changed, lacks a column, or gives no rows.
            LostRace: Another process planned meanwhile.
        """
        source = self.source
        source.check()
        if plan.rounds and len(plan.rounds[0].selected) != source.rows:
            raise _changed(source.manifest.path)
        check_carried(source.schema, plan.rounds, self.settings)
        if plan.parts and not plan.complete:
            plan = self.with_round(plan, plan.rounds[-1].selected, plan.rounds[-1])
        selected = selected_rows(source)
        for earlier in plan.rounds:
            selected &= ~earlier.selected
        if selected.any():
            return self.with_round(plan, selected)
        if not plan.parts:
            why = "has no rows"
            if source.rows:
                why = f"has no row that matches --where '{self.settings.where}'"
            raise nothing_to_plan(source.manifest.path, why)
        return plan

    def with_round(self, plan: Plan, selected: np.ndarray, old: Round | None = None) -> Plan:
        """Adds a round of the selected rows, or finishes one.

        Args:
            plan: The plan so far.
            selected: bool [rows of the manifest].
            old: The last round of the plan, if that one lacks parts and is to be finished.

        Returns:
            The plan with the round; the plan itself if all rows are joined with rows of earlier rounds.

        Raises:
            InputError: The manifest has changed.
            LostRace: Another process planned meanwhile.
        """
        earlier = plan.rounds[:-1] if old else plan.rounds
        # Rounds of a growing manifest have a manifest each, so their bits do not compare.
        same = [one.selected for one in earlier if not one.known]
        taken = np.logical_or.reduce(same or [np.zeros_like(selected)])
        counts = count_rows(self.source, selected, taken, self.settings)
        rows = int(counts.outputs.sum())
        if not rows and plan.parts:
            return plan
        if old and old.rows != rows:
            raise _changed(self.source.manifest.path)
        opening = old or self._opened(selected, counts)
        number = len(earlier)
        before = [part for part in plan.parts if part.round < number]
        done = [part for part in plan.parts if part.round == number]
        works = self._works(opening, selected, counts, before, len(done))
        made = self._made(works, opening, number, begun=bool(done))
        return Plan((*before, *done, *made), (*earlier, opening))

    def part_rows(self, rows: int) -> int:
        """Returns the most planned rows of a part, in a round of so many rows."""
        return PART_SHARDS * self.settings.shard_rows(rows, read_checkpoint(self.model).config)

    def _opened(self, selected: np.ndarray, counts: RowCounts) -> Round:
        """Decides what all parts of a new round share."""
        checkpoint = read_checkpoint(self.model)
        rows = int(counts.outputs.sum())
        return Round(
            rows=rows,
            shard_rows=self.settings.shard_rows(rows, checkpoint.config),
            selected=selected,
            settings=self.settings.meaning(),
            model_digest=checkpoint.digest,
            carried=carried_schema(self.source.schema, self.settings),
            warnings=[*self.source.warnings, *self.source.column_warnings, *_joined_in_words(counts)],
            **self._origin(),
        )

    def _origin(self) -> dict[str, Any]:
        """Fields of a Round that say what it is planned from."""
        return {"manifest": self.source.manifest.identity()}

    def _works(
        self, opening: Round, selected: np.ndarray, counts: RowCounts, before: list[PlanPart], done: int
    ) -> dict[int, PartWork]:
        """Cuts a round into parts.

        Args:
            opening: The round.
            selected: bool [rows of the manifest]: its rows.
            counts: Planned rows of each piece.
            before: Parts of earlier rounds.
            done: How many parts of the round exist.

        Returns:
            Number of a part -> its work, for the parts that do not exist yet.
        """
        ends = np.cumsum(counts.outputs)
        first_row_id = sum(part.rows for part in before)
        first_shard, first_part = (before[-1].end, before[-1].part + 1) if before else (0, 0)
        step = PART_SHARDS * opening.shard_rows
        works = {}
        for start in range(done * step, opening.rows, step):
            stop = min(start + step, opening.rows)
            part = first_part + start // step
            works[part] = PartWork(
                part,
                first_row_id + start,
                first_shard + start // opening.shard_rows,
                stop - start,
                self._pieces(selected, counts, ends, start, stop),
            )
        return works

    def _pieces(
        self, selected: np.ndarray, counts: RowCounts, ends: np.ndarray, start: int, stop: int
    ) -> list[PieceWork]:
        """Finds the pieces of the planned rows [start, stop) of a round, and the rows to skip in each.

        Args:
            selected: bool [rows of the manifest]: rows of the round.
            counts: Planned rows of each piece.
            ends: int64 [pieces]: planned rows of each piece and of those before it.
            start: First planned row of the part, from 0 in the round.
            stop: Last planned row of the part plus 1.

        Returns:
            The work of each piece that gives a planned row, in order.
        """
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

    def _made(
        self, works: dict[int, PartWork], opening: Round, number: int, begun: bool
    ) -> Iterator[PlanPart]:
        """Writes parts in Ray tasks, and commits them in order.

        Args:
            works: Number of a part -> its work; all parts of the round that do not exist yet.
            opening: The round.
            number: Its number.
            begun: Whether a part of the round exists; if not, the first one opens the round.

        Yields:
            The parts, in order.

        Raises:
            InputError: The manifest has changed.
            LostRace: Another process committed one of them first.
        """
        constants = {
            "schema": self.source.schema,
            "settings": self.settings,
            "model": self.model,
            "output": self.output,
            "shard_rows": opening.shard_rows,
        }
        following, last = min(works, default=0), max(works, default=0)
        waiting: dict[int, PlanPart] = {}
        for part, answer in each(works, write_part, **constants):
            work = works[part]
            waiting[part] = PlanPart(
                part=part,
                round=number,
                complete=part == last,
                first_row_id=work.first_row_id,
                first_shard=work.first_shard,
                rows=work.rows,
                shards=-(-work.rows // opening.shard_rows),
                shard_rows=opening.shard_rows,
                **answer,
            )
            while (ready := waiting.pop(following, None)) is not None:
                self._commit(ready, None if begun else opening)
                begun = True
                following += 1
                yield ready

    def _commit(self, part: PlanPart, opening: Round | None) -> None:
        """Makes a part valid. opening: the round, if it is its first part."""
        if self.output is None:
            return
        document = {"format": FORMAT, **dataclasses.asdict(part)}
        if opening is not None:
            document["opening"] = opening.to_values()
        path = storage.join(self.output, PLAN_FOLDER, part.json_name)
        if not storage.put_if_absent(path, json.dumps(document, ensure_ascii=False).encode() + b"\n"):
            raise LostRace


def nothing_to_plan(path: str, why: str) -> InputError:
    """The error for a manifest that gives no row. why: the rest of the sentence that begins with its path."""
    return InputError(f"The manifest {path} {why}: correct it.")


def _changed(path: str) -> InputError:
    return InputError(f"The manifest {path} changed while it was read: start again when it is complete.")


def _joined_in_words(counts: RowCounts) -> list[str]:
    joined = sum(map(len, counts.joined.values()))
    if not joined:
        return []
    return [f"Rows with the id and prompt of an earlier row are joined with it: {joined:,}."]
