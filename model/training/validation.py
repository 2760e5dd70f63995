"""Losses of rows that are held out. Knows nothing of gradients."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from wallaroo.model.training.data import Row, from_memory
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.process import Process
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sharding import halves


class Validation:
    """The losses of the same held-out rows each time, as one of the processes that share them.

    Args:
        learner: Of the stage; gives model and tokenizer.
        data: Task -> held-out rows.
        recipe: The stage.
        process: One of those that share the training.
    """

    def __init__(
        self, learner: LMLearner, data: Mapping[str, Sequence[Row]], recipe: Recipe, process: Process
    ):
        rows = {task: recipe.rows[task] for task in data}
        self.recipe = dataclasses.replace(recipe, rows=rows, data=dict.fromkeys(rows, ""), drop=0.0)
        self.process, self.module = process, learner.module
        source = from_memory(data, recipe.seed)
        self.learner = learner.with_rows(source, self.recipe)

    def losses(self) -> dict[str, float]:
        """Computes the losses; all processes must call this together.

        Returns:
            `held_out_TASK_HEAD` -> mean loss.
        """
        half = halves(self.recipe, self.process) and self.process.shard == "none"
        kind = self.process.device.partition(":")[0]
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for step in range(self.recipe.validate_steps):
            for piece in range(self.recipe.accumulate):
                batch = self.learner.batch(step, piece)
                counts = self.learner.counts(*batch)
                with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=half):
                    losses = self.module(*batch)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(loss) * counts[name]
                    weights[name] = weights.get(name, 0.0) + counts[name]
        total, count = self.process.total(sums), self.process.total(weights)
        return {f"held_out_{name}": total[name] / count[name] for name in total}
