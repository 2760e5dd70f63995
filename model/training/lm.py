"""The language model's batches, its losses by task and head, and the learner that trains it."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.attention import causal_attention
from wallaroo.model.config import VisionConfig
from wallaroo.model.decoder import Attend, rope, rope_frequencies
from wallaroo.model.errors import InputError
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.model.training.data import BadPicture, Source
from wallaroo.model.training.losses import entropy
from wallaroo.model.training.packed import Kernel, find_kernel, row_ends
from wallaroo.model.training.process import Process
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.rows import Rows, TrainingRow
from wallaroo.model.training.sharding import halves
from wallaroo.model.training.sizing import Sizes
from wallaroo.model.vision import take_many, tower_plan
from wallaroo.model.wallaroo import Wallaroo


@dataclass(frozen=True)
class Batch:
    """Rows of one task, padded right to `T` places."""

    ids: Tensor
    """Text tokens, int64 `(B, T)`."""
    image: Tensor
    """Image tokens, -1 elsewhere, int64 `(B, T)`."""
    positions: Tensor
    """int64 `(3, B, T)`."""
    target: Tensor
    """Places whose token is predicted, bool `(B, T)`."""
    null: Tensor
    """Rows whose prompt was dropped, bool `(B,)`."""
    filled: Tensor
    """Places without pads in the flattened `B * T`, int64 `(tokens,)`."""
    patches: Tensor | None = None
    """Of all sources, `(n, 1176)`."""
    grids: Tensor | None = None
    """Patches of each source along time, height and width, int64 `(B, 3)`."""
    semantic: Tensor | None = None
    """Places of the vision tower's embeddings in the flattened `B * T`, int64 `(m,)`."""
    pixel: Tensor | None = None
    """Places of the source's latents there, int64 `(k,)`."""
    latents: Tensor | None = None
    """Of all sources, float32 `(k, 8)`."""
    tower: dict[str, Tensor] = field(default_factory=dict)
    """What the vision tower derives from the grids."""
    bad: tuple[str, ...] = ()
    """Reasons for which rows were replaced."""
    lengths: tuple[int, ...] = ()
    """Tokens of each row."""

    @classmethod
    def of(cls, rows: Sequence[TrainingRow], config: VisionConfig, bad: Sequence[str] = ()) -> "Batch":
        """Pads rows of a task to a batch.

        Args:
            rows: At least one.
            config: Of the vision tower.
            bad: Reasons for which rows were replaced.

        Returns:
            The batch, on the CPU.
        """
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest)
        ids, image, target = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, bool)
        positions = np.zeros((3, *shape), np.int64)
        semantic, pixel, filled = [], [], []
        for index, row in enumerate(rows):
            length = len(row.ids)
            filled.append(index * longest + np.arange(length))
            ids[index, :length], image[index, :length] = row.ids, row.image
            target[index, :length], positions[:, index, :length] = row.target, row.positions
            if row.semantic is not None:
                semantic.append(index * longest + np.arange(*row.semantic))
            if row.pixel is not None:
                pixel.append(index * longest + row.pixel.astype(np.int64))

        def put(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
            found = [array for array in arrays if array is not None]
            return torch.from_numpy(np.concatenate(found)) if found else None

        grids = put([np.array([[1, *row.grid]]) for row in rows if row.grid is not None])
        return cls(
            ids=torch.from_numpy(ids),
            image=torch.from_numpy(image),
            positions=torch.from_numpy(positions),
            target=torch.from_numpy(target),
            null=torch.tensor([row.null for row in rows]),
            filled=torch.from_numpy(np.concatenate(filled)),
            patches=put([row.patches for row in rows]),
            grids=grids,
            semantic=put(semantic),
            pixel=put(pixel),
            latents=put([row.latents for row in rows]),
            tower=tower_plan(config, grids) if grids is not None else {},
            bad=tuple(bad),
            lengths=tuple(len(row.ids) for row in rows),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copies all tensors to a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["tower"] = {name: value.to(device, non_blocking=True) for name, value in self.tower.items()}
        return dataclasses.replace(self, **moved)


class LMLosses(nn.Module):
    """Next-token losses of all tasks of a step.

    Label smoothing (Szegedy et al. 2016, section 7) serves guidance (Ho and Salimans 2022), which at scale s
    draws by s log p(token | prompt) - (s - 1) log p(token). Both terms of an unlikely token are large
    negative numbers that no loss bounds, so such a token can win at random; smoothing bounds them. With
    shares e after a prompt and n after a dropped one, guidance leaves e^s / n^(s - 1).

    Args:
        model: Computes everything.
        smoothing: Share of label smoothing of image tokens after a prompt.
        null_smoothing: The same after a dropped prompt.

    Attributes:
        kernel: Attends to packed rows; None for torch's attention over padded rows.
    """

    frequencies: Tensor

    def __init__(self, model: Wallaroo, smoothing: float = 0.0, null_smoothing: float = 0.0):
        super().__init__()
        self.model, self.smoothing, self.null_smoothing = model, smoothing, null_smoothing
        self.kernel: Kernel | None = None
        if model.visual is not None:
            take_many(model.visual)
        # A model without memory yet has its buffers on the CPU.
        device = None if model.device.type == "meta" else model.device
        self.register_buffer("frequencies", rope_frequencies(model.config.decoder, device), persistent=False)

    def forward(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Computes the losses of a step.

        Args:
            batches: Task -> rows.

        Returns:
            `TASK_text` and `TASK_image` -> mean loss, float32 `()`.
        """
        losses: dict[str, Tensor] = {}
        given = {task: batch.to(self.frequencies.device) for task, batch in batches.items()}
        for (task, batch), hidden in zip(given.items(), self._decoded(given), strict=True):
            # Each place predicts the token after it; the last one of a row predicts nothing.
            image, wanted, ids = (
                _following(part, end)[batch.filled]
                for part, end in ((batch.image, -1), (batch.target, 0), (batch.ids, 0))
            )
            text, drawn = wanted & (image < 0), image >= 0
            assert self.model.lm_head is not None
            losses[f"{task}_text"] = entropy(self.model.lm_head, hidden[text], ids[text]).mean()
            if task != "understand":
                _, head = self.model.image_parts(task)
                smoothing: Tensor | float = self.smoothing
                if self.null_smoothing != self.smoothing:
                    null = batch.null.unsqueeze(1).expand_as(batch.ids).flatten()[batch.filled][drawn]
                    smoothing = torch.where(null, self.null_smoothing, self.smoothing)
                losses[f"{task}_image"] = entropy(head, hidden[drawn], image[drawn], smoothing).mean()
        return losses

    def hidden(self, task: str, batch: Batch) -> Tensor:
        """Hidden states after the final norm.

        Args:
            task: Of the rows.
            batch: Rows.

        Returns:
            `(B, T, H)`, zeros at pads.
        """
        [made] = self._decoded({task: batch})
        return _padded(batch, made)

    def _decoded(self, batches: Mapping[str, Batch]) -> list[Tensor]:
        """The decoder's output of each batch, `(tokens, H)` without pads; its layers run once for all."""
        decoder = self.model.language_model
        x = torch.cat([self._embedded(task, batch) for task, batch in batches.items()])
        positions = torch.cat([batch.positions.flatten(1)[:, batch.filled] for batch in batches.values()], 1)
        cos, sin = rope(positions, self.frequencies, self.model.config.decoder.mrope_section, x.dtype)
        lengths = [len(batch.filled) for batch in batches.values()]
        attend = self._attend_packed(batches) if self.kernel else self._attend_padded(batches)
        return list(decoder(x, cos, sin, attend).split(lengths))

    def _attend_packed(self, batches: Mapping[str, Batch]) -> Attend:
        """One call of the kernel for the rows of all batches."""
        kernel, rows = self.kernel, [length for batch in batches.values() for length in batch.lengths]
        assert kernel is not None
        ends, longest = row_ends(rows, self.frequencies.device), max(rows)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Turned queries and keys are float32 where autocast has made v in bfloat16.
            return kernel(q.to(v.dtype), k.to(v.dtype), v, ends, longest).flatten(1)

        return attend

    def _attend_padded(self, batches: Mapping[str, Batch]) -> Attend:
        """One call of torch's attention for each batch, whose rows are padded."""
        lengths = [len(batch.filled) for batch in batches.values()]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(batches.values(), *(part.split(lengths) for part in (q, k, v)), strict=True)
            # Pads stand at the right, where no token that counts can see them; nothing else computes any.
            return torch.cat(
                [
                    causal_attention(*(_padded(batch, part) for part in qkv)).flatten(0, 1)[batch.filled]
                    for batch, *qkv in parts
                ]
            )

        return attend

    def _embedded(self, task: str, batch: Batch) -> Tensor:
        """What the decoder is given for a batch, `(tokens, H)` without pads."""
        model = self.model
        x = model.language_model.embed_tokens(batch.ids)
        if task != "understand":
            drawn = batch.image >= 0
            adapter, _ = model.image_parts(task)
            assert model.vq is not None
            codebook = model.vq.codebook().to(x.dtype)
            x = x.masked_scatter(drawn.unsqueeze(-1), adapter(codebook[batch.image[drawn]]).to(x.dtype))
        flat = x.flatten(0, 1)
        if batch.semantic is not None:
            assert model.visual is not None and batch.patches is not None
            tower = model.visual
            seen = tower(batch.patches.to(tower.dtype), grid_thw=batch.grids, **batch.tower).pooler_output
            flat = flat.index_copy(0, batch.semantic, seen.to(x.dtype))
        if batch.pixel is not None:
            assert model.pixel_adapter is not None and batch.latents is not None
            flat = flat.index_copy(0, batch.pixel, model.pixel_adapter(batch.latents.to(x.dtype)).to(x.dtype))
        return flat[batch.filled]


def _padded(batch: Batch, part: Tensor) -> Tensor:
    """Values of the filled places `(tokens, ...)` among zeros, `(B, T, ...)`."""
    rows, places = batch.ids.shape
    whole = part.new_zeros((rows * places, *part.shape[1:])).index_copy(0, batch.filled, part)
    return whole.unflatten(0, (rows, places))


def _following(values: Tensor, end: int) -> Tensor:
    """For each place of `(B, T)` the value after it, and `end` for the last, as `(B * T,)`."""
    return F.pad(values[:, 1:], (0, 1), value=end).flatten()


MAX_BAD = 100
"""Consecutive rows whose pictures cannot be decoded, after which a training fails."""


class LMLearner:
    """Trains decoder, heads and adapters, and what else the recipe does not freeze; see `loop.Learner`.

    Args:
        model: That learns; `requires_grad` of its parameters is set.
        tokenizer: Of its base.
        source: Gives the rows.
        recipe: The stage.
        process: One of those that share it, by default the only one.

    Attributes:
        bad: Reasons for which rows were replaced, each once.
    """

    def __init__(
        self,
        model: Wallaroo,
        tokenizer: Tokenizer,
        source: Source,
        recipe: Recipe,
        process: Process | None = None,
    ):
        self.module = LMLosses(model, recipe.smoothing, recipe.null_smoothing)
        self.source, self.recipe, self.process = source, recipe, process or Process()
        if halves(recipe, self.process):
            decoder = model.config.decoder
            self.module.kernel = find_kernel(
                torch.device(self.process.device),
                decoder.num_attention_heads,
                decoder.num_key_value_heads,
                decoder.head_dim,
            )
        self.share = recipe.share(self.process.world)
        self.bad: list[str] = []
        self.rows = Rows(model, tokenizer, recipe)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(recipe.learns(name))
        self.flops_per_token = Sizes(model.config, recipe, False, model).flops_per_token()

    def with_rows(self, source: Source, recipe: Recipe) -> "LMLearner":
        """Makes a learner with the same model on other rows; what learns does not change.

        Args:
            source: Gives the rows.
            recipe: For them.

        Returns:
            The learner.
        """
        made = copy.copy(self)
        made.source, made.recipe, made.share = source, recipe, recipe.share(self.process.world)
        made.rows, made.bad = copy.copy(self.rows), []
        made.rows.recipe = recipe
        return made

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        """Makes this process's share of a piece of a step.

        Args:
            step: Number of the step.
            piece: Number of the piece, below `recipe.accumulate`.

        Returns:
            The arguments of the module's forward: task -> batch.
        """
        part = piece * self.process.world + self.process.rank
        batches: dict[str, Batch] = {}
        for index, (task, size) in enumerate(sorted(self.share.items())):
            first = step * self.recipe.rows[task] + part * size
            made, bad = [], []
            for place, row in enumerate(self.source(task, first, size), first):
                # What is drawn for a row depends on its place in the whole step, not on the process.
                key = (self.recipe.seed, index, place)
                for further in range(1, MAX_BAD + 1):
                    try:
                        made.append(self.rows.make(task, row, np.random.default_rng(key)))
                        break
                    except BadPicture as error:
                        bad.append(f"{task}: {error}")
                        [row] = self.source(task, place, 1, further)
                else:
                    raise InputError(f"{MAX_BAD} consecutive rows cannot be used, the last: {bad[-1]}")
            batches[task] = Batch.of(made, self.rows.config.vision, bad)
        return (batches,)

    def counts(self, batches: Mapping[str, Batch]) -> dict[str, int]:
        """Counts what the means of losses are taken over, and notes new reasons of bad rows.

        Args:
            batches: What `batch` gave.

        Returns:
            Name of the loss -> tokens; and `tokens` and `bad_rows`.
        """
        found = {"bad_rows": sum(len(batch.bad) for batch in batches.values())}
        for reason in (reason for batch in batches.values() for reason in batch.bad):
            if reason not in self.bad:
                self.bad.append(reason)
        found |= {"tokens": sum(len(batch.filled) for batch in batches.values())}
        for task, batch in batches.items():
            drawn = batch.image[:, 1:] >= 0
            found[f"{task}_text"] = int((batch.target[:, 1:] & ~drawn).sum())
            if task != "understand":
                found[f"{task}_image"] = int(drawn.sum())
        return found

    def after_step(self, step: int) -> dict[str, float]:
        """Does nothing.

        Returns:
            No metrics.
        """
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Nothing beside the model and its optimizers."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Does nothing."""
        return None
