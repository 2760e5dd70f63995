"""Prefill: prompts go through the decoder in pieces of a constant length, and wait there for a slot.

Knows nothing of slots and steps.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.attention import BACKENDS, KEY_BLOCK, Visible
from wallaroo.model.cuda import ops
from wallaroo.model.cuda.transfer import to_device
from wallaroo.model.decoder import packed, rope, rope_frequencies
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.prefixes import PendingPrefix
from wallaroo.model.engine.requests import Row
from wallaroo.model.images import patchify
from wallaroo.model.kv_cache import KVCache
from wallaroo.model.prompts import Prompt
from wallaroo.model.vision import embed_picture
from wallaroo.model.vq import precision, to_float
from wallaroo.model.wallaroo import Wallaroo


class Prefill:
    """The prompts of an engine's rows, shared by rows with equal ones.

    Every forward has the same shape: `prefill_pieces` pieces of `prefill_piece` tokens, unused ones filled
    with a pad. A piece is cut by its place in its own prompt, so that its numbers do not depend on which
    other pieces are there.

    Args:
        model: The model.
        options: Of the engine.
        backend: Of attention.
        counts: Of the engine, written.
    """

    def __init__(self, model: Wallaroo, options: EngineOptions, backend: str, counts: Counter[str]):
        self.model, self.options, self.backend, self.counts = model, options, backend, counts
        self.decoder = packed(model.language_model, options.prefill_pieces * options.prefill_piece)
        self.frequencies = rope_frequencies(model.config.decoder, model.device)
        self.prompts: OrderedDict[Hashable, PendingPrefix] = OrderedDict()
        self._private = 0
        self.reset()

    def reset(self) -> None:
        """Forgets what is half done; prompts that are done stay."""
        pieces, model = self.options.prefill_pieces, self.model
        with torch.inference_mode():
            # The last row takes the pads of unused pieces.
            self.scratch = KVCache(model.config.decoder, pieces + 1, 0, model.device, model.dtype)
        self.scratch_free = list(range(pieces))
        for pending in self.prompts.values():
            if pending.prefix is None:
                pending.done, pending.scratch, pending.features = 0, -1, None

    def add(self, prompt: Prompt, semantic: np.ndarray | None, pixels: np.ndarray | None) -> PendingPrefix:
        """Adds the prompt of one more row, which rows with an equal one share.

        Args:
            prompt: The prompt.
            semantic: Source for the vision tower, uint8 `(h, w, 3)`, or None.
            pixels: Source for the image tokenizer, uint8 `(H, W, 3)`, or None.

        Returns:
            The prompt in the queue.
        """
        key: Hashable
        if self.options.prefix_sharing:
            digest = hashlib.sha256(prompt.ids.tobytes())
            for image in (semantic, pixels):
                digest.update(b"" if image is None else str(image.shape).encode() + image.tobytes())
            key = digest.digest()
        else:
            self._private += 1
            key = self._private
        known = self.prompts.get(key)
        if known is None:
            known = self.prompts[key] = PendingPrefix(key, prompt, semantic, pixels)
        else:
            self.prompts.move_to_end(key)
            self.counts["prefixes_shared"] += 1
        known.waiting += 1
        return known

    def release(self, prefixes: Iterable[PendingPrefix]) -> None:
        """Tells that a row needs its prompts no more.

        Forgets the least recently used prompts that no row waits for, down to `prefix_tokens`.

        Args:
            prefixes: Prompts of the row.
        """
        for pending in prefixes:
            pending.waiting -= 1
        idle = [pending for pending in self.prompts.values() if not pending.waiting and pending.prefix]
        kept = sum(len(pending.prompt.ids) for pending in idle)
        for pending in idle:
            if kept <= self.options.prefix_tokens and self.options.prefix_sharing:
                return
            kept -= len(pending.prompt.ids)
            del self.prompts[pending.key]

    def step(self, rows: Iterable[Row], only_full: bool) -> None:
        """Takes the next pieces of prompts through the decoder in one forward.

        Args:
            rows: Whose prompts, in this order.
            only_full: Do nothing unless every piece of the forward would be in use.
        """
        width, count = self.options.prefill_piece, self.options.prefill_pieces
        pieces: list[tuple[PendingPrefix, int]] = []
        seen: set[Hashable] = set()
        for row in rows:
            for pending in row.prefixes:
                if len(pieces) < count and not pending.prefix and pending.key not in seen:
                    seen.add(pending.key)
                    starts = range(pending.done, len(pending.prompt.ids), width)
                    pieces += [(pending, start) for start in starts[: count - len(pieces)]]
        if not pieces or (only_full and len(pieces) < count):
            return
        hidden = self._forward(pieces)
        for index, (pending, start) in enumerate(pieces):
            length = len(pending.prompt.ids)
            pending.done = min(start + width, length)
            if pending.done == length:
                last = hidden[index * width + length - 1 - start].clone()
                pending.prefix = self.scratch.prefix(
                    pending.scratch, length, last, pending.prompt.next_position
                )
                self.scratch_free.append(pending.scratch)
                pending.features = pending.semantic = pending.pixels = None

    def _forward(self, pieces: list[tuple[PendingPrefix, int]]) -> Tensor:
        """Hidden states `(prefill_pieces * prefill_piece, H)` of pieces given by prompt and first token."""
        model, cache = self.model, self.scratch
        width, count = self.options.prefill_piece, self.options.prefill_pieces
        ids, positions = np.zeros((count, width), np.int64), np.zeros((3, count, width), np.int64)
        rows, starts = [count] * count, [0] * count
        inserted: list[tuple[np.ndarray, Tensor]] = []
        for index, (pending, start) in enumerate(pieces):
            if pending.scratch < 0:
                pending.scratch = self.scratch_free.pop()
                pending.features = self._features(pending)
            piece = pending.prompt.ids[start : start + width]
            ids[index, : len(piece)] = piece
            positions[:, index, : len(piece)] = pending.prompt.positions[:, start : start + width]
            rows[index], starts[index] = pending.scratch, start
            for where, feature in pending.features or ():
                first, last = np.searchsorted(where, (start, start + width))
                inserted.append((where[first:last] - start + index * width, feature[first:last]))
            self.counts["prefill_tokens"] += len(piece)
        self.counts["prefill_forwards"] += 1
        cache.grow(max(starts) + width)
        limits = np.array(starts)[:, None] + np.arange(1, width + 1)
        parts = [ids, positions, np.array(rows), limits, *(into for into, _ in inserted)]
        flat = np.concatenate([part.reshape(-1) for part in parts]).astype(np.int64)
        sent = to_device(flat, model.device).split([part.size for part in parts])
        tokens, turns, run_rows, limit = (
            x.view(part.shape) for x, part in zip(sent, parts[:4], strict=False)
        )
        x = model.language_model.embed_tokens(tokens.view(-1))
        for into, (_, feature) in zip(sent[4:], inserted, strict=True):
            x[into] = feature
        section = model.config.decoder.mrope_section
        cos, sin = rope(turns.view(3, -1), self.frequencies, section, x.dtype)
        longest = max(starts) + width
        if self.backend == "triton":
            return ops.prefill_layers(model.language_model, cache, x, cos, sin, run_rows, limit, longest)
        visible = Visible(run_rows, limit, [start + width for start in starts], longest)
        attention = BACKENDS[self.backend](visible, model.config.decoder.num_key_value_heads, x.dtype)
        row, place = run_rows.repeat_interleave(width, output_size=count * width), (limit - 1).view(-1)
        block, offset = place // KEY_BLOCK, place % KEY_BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[row, :, block, offset] = k
            values[row, :, block, offset] = v
            return attention(q.view(count, width, *q.shape[1:]), keys, values).flatten(0, 1)

        return self.decoder(x, cos, sin, attend)

    def _features(self, pending: PendingPrefix) -> list[tuple[np.ndarray, Tensor]]:
        """What the source of a prompt puts in place of embeddings: ascending places `(n,)` among the
        prompt's tokens, and decoder inputs `(n, H)`."""
        model, prompt = self.model, pending.prompt
        features = []
        if prompt.semantic is not None:
            assert model.visual is not None and pending.semantic is not None
            patches, grid = patchify(pending.semantic)
            seen = embed_picture(model.visual, to_device(patches, model.device).to(model.dtype), grid)
            features.append((np.arange(*prompt.semantic), seen))
        if prompt.pixel is not None:
            assert model.vq is not None and model.pixel_adapter is not None and pending.pixels is not None
            picture = to_device(pending.pixels, model.device)[None]
            with precision(self.options.vq_precision, model.device):
                latents = model.vq.encode(to_float(picture))[0].flatten(1).T
            features.append((prompt.pixel, model.pixel_adapter(latents.to(model.dtype))))
        return features
