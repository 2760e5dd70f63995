"""The memory that a stage needs on each worker, computed from shapes before anything is allocated.

Of a device it knows the size alone. Numbers are estimates; RESERVE stands for what an allocator loses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from wallaroo.model.checkpoint import empty_model
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.training import lora
from wallaroo.model.training.losses import CHUNK
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.wallaroo import Wallaroo

RESERVE = 4_000_000_000
"""Bytes for the device's context, communication buffers and the allocator's losses."""

MAX_WORKERS = 1024
SHARDS = ("auto", "none", "full")


@dataclass(frozen=True)
class Need:
    """Memory of a worker."""

    shard: str
    """`none` or `full`."""
    workers: int
    """Number of workers."""
    parts: Mapping[str, int]
    """Purpose -> bytes."""

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        spread = "whole model" if self.shard == "none" else "sharded"
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items())
        return f"{workers}, {spread}: {self.total / 1e9:.1f} GB a worker ({parts})"


class Sizes:
    """Parameters of a stage's model, counted once for any number of workers.

    Args:
        config: Of the stage's model.
        recipe: The stage.
        half: Whether products are in bfloat16.
        model: Of the stage, by default one without memory.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, half: bool, model: Wallaroo | None = None):
        self.config, self.recipe, self.half = config, recipe, half
        self.model = model or empty_model(config, None, "meta", torch.float32)
        if recipe.lora and model is None:
            lora.add(self.model, recipe)
        named = dict(self.model.named_parameters())
        self.learning = sum(one.numel() for name, one in named.items() if recipe.learns(name))
        self.frozen = sum(one.numel() for name, one in named.items() if not recipe.learns(name))
        self.tokenizer = sum(
            one.numel() for name, one in named.items() if name.startswith("vq.") and not recipe.learns(name)
        )
        self.layer = self._learning(self.model.language_model.layers[0], "language_model.layers.0.")
        layers = ("language_model.layers.", "visual.blocks.")
        self.rest = sum(
            one.numel() for name, one in named.items() if recipe.learns(name) and not name.startswith(layers)
        )

    def _learning(self, module: nn.Module, prefix: str) -> int:
        return sum(
            one.numel() for name, one in module.named_parameters() if self.recipe.learns(prefix + name)
        )

    def need(self, workers: int, shard: str) -> Need:
        """Computes the memory of a worker.

        Args:
            workers: Number of workers.
            shard: `none` or `full`.

        Returns:
            The need of each worker.

        Raises:
            InputError: The workers cannot share a step evenly.
        """
        narrow = 2 if self.half else 4
        parts: dict[str, int] = {}
        if shard == "none":
            parts["weights"] = 4 * (self.learning + self.frozen)
            # Products in bfloat16 keep a copy of what learns.
            parts["copies"] = 2 * self.learning if self.half else 0
            parts["gradients"], parts["optimizer"] = 4 * self.learning, self._moments()
        else:
            frozen = 4 * self.tokenizer + narrow * (self.frozen - self.tokenizer)
            parts["weights"] = frozen + 4 * self.learning // workers
            parts["gradients"] = 4 * self.learning // workers
            parts["optimizer"] = self._moments() // workers
            # Two layers are gathered at a time, with the gradient of one; the rest is gathered for a step,
            # its gradients are summed in float32. Pieces before the last keep all gradients, in float32.
            parts["gathered"] = (3 * narrow + 4) * self.layer + (2 * narrow + 4) * self.rest
            if self.recipe.accumulate > 1:
                parts["gathered"] += 4 * self.learning
        parts["activations"] = self._activations(workers, shard)
        parts["logits"] = 12 * CHUNK * max(self.config.decoder.vocab_size, self.config.vq.codebook_size)
        parts["reserve"] = RESERVE
        return Need(shard, workers, parts)

    def _moments(self) -> int:
        """AdamW keeps two numbers a parameter."""
        return 8 * self.learning

    def _activations(self, workers: int, shard: str) -> int:
        """Of the tokens that a worker has in a piece, each row as long as it may be."""
        recipe, decoder = self.recipe, self.config.decoder
        tokens = sum(
            count * (recipe.lengths.get(task) or self.config.trained_tokens[task])
            for task, count in recipe.share(workers).items()
        )
        narrow = 2 if self.half else 4
        wide = 4 if shard == "none" else narrow
        hidden, inner = decoder.hidden_size, decoder.intermediate_size
        turned = (decoder.num_attention_heads + 2 * decoder.num_key_value_heads) * decoder.head_dim
        layer = 4 * wide * hidden + narrow * (2 * hidden + 2 * turned + 4 * inner)
        kept = decoder.num_hidden_layers
        each = wide * hidden * kept + layer if recipe.checkpointing else layer * kept
        return tokens * each

    def flops_per_token(self) -> float:
        """Operations of a forward and backward pass per token.

        Counted are products with parameters of the decoder's layers and an image head (or the text head), not
        those of queries and keys, and not the vision tower's.
        """
        model = self.model
        head = model.gen_image_head or model.lm_head
        assert head is not None
        counted = {"language_model.layers.": model.language_model.layers, "gen_image_head.": head}
        total = 0.0
        for prefix, module in counted.items():
            count = sum(one.numel() for one in module.parameters())
            # Two a parameter forward, two for the input's gradient, two for the parameter's own if it learns.
            total += 4.0 * count + 2.0 * self._learning(module, prefix)
        return total

    def choose(self, workers: int, shard: str, available: int) -> Need:
        """Chooses how a model is spread so that it fits.

        Args:
            workers: Number of workers.
            shard: `none`, `full`, or `auto`: the first of the two that fits.
            available: Memory of a worker's device in bytes; 0 for no bound.

        Returns:
            The need of each worker.

        Raises:
            InputError: It does not fit; the message has the number of workers that it takes.
        """
        if shard not in SHARDS:
            raise InputError(f"shard is '{shard}', but must be one of {', '.join(SHARDS)}.")
        tried = [self.need(workers, one) for one in (("none", "full") if shard == "auto" else (shard,))]
        for need in tried:
            if not available or need.total <= available:
                return need
        raise InputError(
            f"The stage needs {tried[-1].total / 1e9:.1f} GB on each of {workers} workers, but a device has "
            f"{available / 1e9:.1f} GB; {self._remedy(workers, tried[-1].shard, available)}."
        )

    def _remedy(self, workers: int, shard: str, available: int) -> str:
        for more in range(workers + 1, MAX_WORKERS + 1):
            try:
                fits = self.need(more, "full").total <= available
            except InputError:
                continue
            if fits:
                return f"it takes {more} workers" + (" and --shard full" if shard == "none" else "")
        way = "a larger accumulate" if self.recipe.checkpointing else "checkpointing = true"
        return f"no number of workers that its rows can be divided by is enough, so set {way} in the recipe"


def device_bytes(device: str) -> int:
    """Memory of a GPU in bytes, 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else 0
