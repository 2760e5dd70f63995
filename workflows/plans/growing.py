"""Rounds of a growing manifest (`--incremental`): each plans the rows that no earlier round has planned."""

import dataclasses
import secrets
from typing import Any

import numpy as np
import pyarrow as pa

from wallaroo.workflows.manifests.listing import list_pictures
from wallaroo.workflows.manifests.types import Manifest, encode_schema
from wallaroo.workflows.plans.checks import open_plan
from wallaroo.workflows.plans.counts import count_rows
from wallaroo.workflows.plans.increments import (
    PAIR,
    PlannedPairs,
    picture_pairs,
    read_planned,
    row_pairs,
    unseen,
    write_pictures,
    write_planned,
)
from wallaroo.workflows.plans.parts import folder_of
from wallaroo.workflows.plans.passes import each
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.plans.rounds import LostRace, RoundPlanner, nothing_to_plan
from wallaroo.workflows.plans.scanned import PieceRows, ScannedManifest, ids_of
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.storage.checkpoints import read_checkpoint


def plan_new_rows(
    plan: Plan, found: Manifest, settings: PlanSettings, model: str, output: str | None
) -> Plan:
    """Adds rounds of one part each until nothing is new. Ray must be connected.

    With one part, one JSON decides for a whole round. A process that loses the race for it looks for new rows
    again.

    Args:
        plan: The plan so far.
        found: The manifest as it is now.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run.

    Returns:
        The whole plan.

    Raises:
        InputError: The manifest cannot be read, or there is no row at all.
        OptionError: `output` is None.
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
                source = ScannedManifest(left, settings, plan.rounds)
                added = _NewRowsPlanner(source, model, output, earlier, identity).added(plan, pairs)
            except LostRace:
                plan = open_plan(found, settings, read_checkpoint(model).digest, output)
                continue
        if added is None:
            if not plan.parts:
                raise nothing_to_plan(found.path, "has no rows")
            return plan
        plan = added


def _new_pictures(found: Manifest, earlier: PlannedPairs, output: str) -> tuple[Manifest, np.ndarray]:
    """Replaces a folder of pictures by a manifest of the new ones. Returns their PAIRs too."""
    files = list_pictures(found.path)
    pairs = picture_pairs(files)
    new = np.flatnonzero(earlier.new(pairs)[0])
    one = [write_pictures(output, [files[index] for index in new])] if len(new) else []
    return dataclasses.replace(found, files=tuple(one)), pairs[new]


class _NewRowsPlanner(RoundPlanner):
    """Adds a round of new rows of a growing manifest."""

    def __init__(
        self,
        source: ScannedManifest,
        model: str,
        output: str,
        earlier: PlannedPairs,
        identity: list[list[Any]],
    ):
        """Keeps what the round is planned from.

        Args:
            source: The files that may have new rows.
            model: Folder of the checkpoint, local or on S3.
            output: Folder of the run.
            earlier: Rows of earlier rounds.
            identity: `Manifest.identity()` of the files. They are not read again once all of their new rows
                are planned.
        """
        super().__init__(source, model, output)
        self.folder, self.earlier, self.identity, self.file = output, earlier, identity, ""

    def added(self, plan: Plan, pairs: np.ndarray | None) -> Plan | None:
        """Adds a round of the new rows.

        Args:
            plan: The plan so far.
            pairs: PAIR [rows of the source]; None to compute them.

        Returns:
            The plan with the round; None if nothing is new.

        Raises:
            LostRace: Another process planned meanwhile.
        """
        source = self.source
        source.check()
        if not source.rows:
            return None
        pairs = self._pairs() if pairs is None else pairs
        selected, self.versions = self.earlier.new(pairs)
        whole = selected.sum()
        if not whole:
            return None
        while True:
            counts = count_rows(source, selected, np.zeros_like(selected), self.settings)
            rows = int(counts.outputs.sum())
            most = self.part_rows(rows)
            if rows <= most:
                break
            # The next round plans the rest.
            chosen = np.flatnonzero(selected)
            selected = selected.copy()
            selected[chosen[max(1, len(chosen) * most // (rows + 1)) :]] = False
        if selected.sum() < whole:
            self.identity = []
        self.file = write_planned(self.folder, pairs[selected], self.versions[selected])
        return self.with_round(plan, selected)

    def _origin(self) -> dict[str, Any]:
        schema = encode_schema(self.source.schema)
        return {"manifest": self.identity, "known": self.file, "schema": schema}

    def _pairs(self) -> np.ndarray:
        """PAIR of all rows of the source."""
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
