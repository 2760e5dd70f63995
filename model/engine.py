"""The batching engine: rows in, pictures or texts out, as many at once as there are slots.

A row's numbers depend on nothing but the row: decode runs in groups of a constant number of
sequences, prefill in pieces of a constant length, VQ decode in slices of a constant number of
pictures, and the draws of a row are fixed by its seed and the token's position. So a row comes out the
same alone or in any company, in any slot and any order. Knows nothing of Ray, files or manifests; one
thread at a time may use an engine.
"""

import functools
import hashlib
import itertools
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.attention import BACKENDS, KEY_BLOCK, Visible, default_backend
from wallaroo.model.config import SLOTS, VQ_FACTOR, DecoderConfig, ModelConfig, Size
from wallaroo.model.decoder import packed, rope, rope_frequencies
from wallaroo.model.errors import RowError
from wallaroo.model.graphs import Replayed
from wallaroo.model.images import patchify
from wallaroo.model.kv_cache import KVCache, Prefix
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import ALWAYS, Filters, Sampling, draws, sample
from wallaroo.model.vision import encode_image
from wallaroo.model.vq import to_float, to_uint8
from wallaroo.model.wallaroo import Wallaroo

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
END_OF_LINE = "<|end_of_line>|"
GPU_GROUP_ROWS = 64
"""Rows of a group on a GPU with room for them: fewer would read the weights more often than they compute."""
MIN_SHARED = 1 << 15
"""Numbers a thread that torch gives one at least, of an operator on a CPU."""
VECTOR = 32
"""Numbers that torch's float32 operators take at once where vectors are widest."""
PROMPT_ROOM = 1024
"""Prompt tokens a row is taken to have when slots are chosen."""
VQ_BYTES = 3500
"""Activations of a VQ decode in float32, bytes a pixel."""


@dataclass(frozen=True)
class Request:
    """One row to serve.

    key: given back with the result; prompt: the conditional branch; null: the null branch, needed if
    `sampling.guided`; size: of the picture in pixels, None for text; semantic `(h, w, 3)` and pixels
    `(H, W, 3)`: the uint8 source as the vision tower and the VQ encoder take it (see model/images.py);
    max_new_tokens: bound on a text's length; forced: tokens to take instead of the drawn ones, int32
    `(n,)`, -1 where drawn, for scoring a given picture or text.
    """

    key: Hashable
    prompt: Prompt
    null: Prompt | None
    size: Size | None
    seed: int
    sampling: Sampling
    semantic: np.ndarray | None = None
    pixels: np.ndarray | None = None
    max_new_tokens: int = 256
    forced: np.ndarray | None = None


@dataclass(frozen=True)
class Result:
    """What became of a row.

    tokens: int32 `(n,)`, codebook indices in raster order or text token ids without the stop token;
    pixels: uint8 `(H, W, 3)`, None for text; finish_reason: `length` or `stop`; prompt_tokens: of the
    conditional branch; error: empty if all is well, else why the row could not be served; logits:
    float32 `(n, vocabulary)` before temperature, only from an engine that traces.
    """

    key: Hashable
    tokens: np.ndarray
    pixels: np.ndarray | None = None
    finish_reason: str = ""
    prompt_tokens: int = 0
    error: str = ""
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What shapes an engine's work.

    slots: rows that decode at once (rounded up to whole groups).
    group_rows: guided rows a group, which is twice as many sequences.
    prefill_piece: tokens of one prompt that stay together; prefill_pieces: pieces, of one or several
        prompts, that go through the decoder at once.
    vq_slice: pictures a VQ decode.
    prefix_sharing: whether rows of one prompt share its prefill; prefix_tokens: prompt tokens kept for
        sharing when no row waits for them any more.
    attention: `block`, `sdpa` or `flash`; None for what suits the device.
    capture: whether decode steps on CUDA are recorded and replayed (see model/graphs.py); off until a GPU has
        shown that replayed tokens are those of the steps themselves.
    decode_vq: whether pictures are wanted and not their tokens alone.
    cfg_interval: first and last share of a picture's steps between which it is guided; lossy unless all are.
        What follows needs no null branch, so more rows decode at once.
    trace: keep each row's logits, and take tokens that are forced.

    `shapes` names those that may change a row by rounding.
    """

    slots: int = SLOTS["cpu"]
    group_rows: int = 16
    prefill_piece: int = 8
    prefill_pieces: int = 8
    vq_slice: int = 1
    prefix_sharing: bool = True
    prefix_tokens: int = 16384
    attention: str | None = None
    capture: bool = False
    decode_vq: bool = True
    cfg_interval: tuple[float, float] = ALWAYS
    trace: bool = False

    def shapes(self, device: torch.device, dtype: torch.dtype) -> dict[str, int | str]:
        """The options that may change a row by rounding, as they apply on a device."""
        return {
            "group_rows": self.group_rows,
            "prefill_piece": self.prefill_piece,
            "prefill_pieces": self.prefill_pieces,
            "vq_slice": self.vq_slice,
            "attention": self.attention or default_backend(device, dtype),
        }


def gpu_options(config: ModelConfig, free: int, element: int, **given: Any) -> EngineOptions:
    """Options for a GPU with `free` bytes of memory beside the model and `element` bytes a number.

    Groups are large where a large one fits, whatever slots were asked for, since the shape of a group may
    change a row by rounding; slots are as many whole groups as fit. What is `given` stays as it is.
    """
    decoder = config.decoder
    largest = max(config.size_list(), key=lambda size: size.height * size.width)
    height, width = largest.grid
    tokens = PROMPT_ROOM + height * (width + config.line_break)
    row = 4 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * element * tokens
    slice_bytes = given.get("vq_slice", EngineOptions.vq_slice) * largest.height * largest.width * VQ_BYTES
    # A tenth is left to what a step computes on.
    fitting = int((0.9 * free - slice_bytes) // row)
    group = GPU_GROUP_ROWS if fitting >= GPU_GROUP_ROWS else EngineOptions.group_rows
    group = given.get("group_rows", group)
    slots = max(1, min(fitting, SLOTS["cuda"]) // group) * group
    return EngineOptions(**({"group_rows": group, "slots": slots} | given))


def even_threads(config: DecoderConfig, options: EngineOptions, threads: int) -> int:
    """The most of so many CPU threads with which a row's bits do not depend on where in its group it stands.

    Threads share an operator's numbers evenly. Where a share ends within a vector, its last numbers go
    through other code, which rounds SiLU and powers of two otherwise. Only wide models are shared at all.
    """
    forwards = 2 * options.group_rows, options.prefill_piece * options.prefill_pieces
    widths = config.intermediate_size, config.num_attention_heads * KEY_BLOCK

    def even(count: int, tokens: int, width: int) -> bool:
        numbers = tokens * width
        share = -(-numbers // min(count, -(-numbers // MIN_SHARED)))
        return share % width == 0 or (share % VECTOR == 0 and width % VECTOR == 0)

    return next(
        count
        for count in range(threads, 0, -1)
        if all(even(count, tokens, width) for tokens in forwards for width in widths)
    )


@dataclass(eq=False)
class _Row:
    """A request on its way: `steps` are all forwards from its first draw to its last token; `guided` those
    whose draw is guided, counted from 0; `sequences` its branches' places in a group, the first its slot."""

    request: Request
    prefixes: list["_PendingPrefix"]
    steps: int
    guided: range
    length: int
    sequences: tuple[int, ...] = ()
    step: int = 0

    @property
    def slot(self) -> int:
        return self.sequences[0]


@dataclass(eq=False)
class _PendingPrefix:
    """A prompt on its way through the decoder, or through it (`prefix` is set)."""

    key: Hashable
    prompt: Prompt
    semantic: np.ndarray | None
    pixels: np.ndarray | None
    waiting: int = 0
    done: int = 0
    scratch: int = -1
    features: list[tuple[np.ndarray, Tensor]] | None = None
    prefix: Prefix | None = None


@dataclass(eq=False)
class _Picture:
    row: _Row
    tokens: np.ndarray
    logits: np.ndarray | None


@dataclass(eq=False)
class _Slice:
    """Pictures that go through the image tokenizer together, and their pixels, once `event` has come."""

    pictures: list[_Picture]
    pixels: Tensor | None
    event: torch.cuda.Event | None

    def is_there(self, wait: bool) -> bool:
        if self.event is None:
            return True
        if wait:
            self.event.synchronize()
        return bool(self.event.query())


class Engine:
    """Serves rows of one task with one model on one device.

    `submit` rows, then call `step` until `pending` is 0; each row is given back exactly once. Where
    memory runs out, half of the groups go on, and the rows that were in slots begin again.
    `counts` says what was done: steps, forwards, slot_steps (slots times steps), row_steps (of them in
    use), null_steps (null branches fed beside them), prefill_forwards, prefill_tokens, prefixes_shared,
    vq_slices, pictures.
    """

    def __init__(self, model: Wallaroo, task: str, options: EngineOptions | None = None):
        self.options = options or EngineOptions()
        if task not in model.tasks:
            raise ValueError(f"the model was loaded for {model.tasks}, not for '{task}'")
        self.model = model.eval()
        self.task = task
        backend = self.options.attention or default_backend(model.device, model.dtype)
        self.attention = BACKENDS[backend]
        # Blocks of keys are counted by the host, and traces are kept by it.
        captures = self.options.capture and model.device.type == "cuda" and backend != "block"
        self.graph_pool = torch.cuda.graph_pool_handle() if captures and not self.options.trace else None
        self.counts: Counter[str] = Counter()
        self.frequencies = rope_frequencies(model.config.decoder, model.device)
        ids = model.config.token_ids
        sequences = 2 * self.options.group_rows
        prefilled = self.options.prefill_pieces * self.options.prefill_piece
        self.decoder = packed(model.language_model, sequences)
        self.prefiller = self.decoder if prefilled == sequences else packed(model.language_model, prefilled)
        embed = model.language_model.embed_tokens
        with torch.inference_mode():
            if task == "understand":
                assert model.lm_head is not None
                self.table = embed.weight
                self.vocabulary = model.lm_head.out_features
                self.line_end = None
                self.stops = [ids[name] for name in STOP_TOKENS if name in ids]
            else:
                _, head = model.image_parts(task)
                self.head = packed(head[:-1], sequences)
                self.table = model.token_table(task)
                self.vocabulary = len(self.table)
                self.line_end = embed(torch.tensor(ids[END_OF_LINE], device=model.device))
                self.stops = []
        self.most_groups = -(-self.options.slots // self.options.group_rows)
        self.lossless = self.options.cfg_interval == ALWAYS
        self.groups: list[_Group] = []
        self._clear_scratch()
        self.waiting: deque[_Row] = deque()
        self.prefixes: OrderedDict[Hashable, _PendingPrefix] = OrderedDict()
        self.pictures: dict[Size, list[_Picture]] = {}
        self.slices: deque[_Slice] = deque()
        self.vq_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self.done: list[Result] = []
        self.pending = 0
        self._private = 0

    @property
    def slots(self) -> int:
        """Guided rows that can decode at once; on average, where their null branches end before them."""
        return int(self.most_groups * 2 * self.options.group_rows / (1 + self.options.cfg_interval[1]))

    def submit(self, request: Request) -> None:
        """Queues a row. One that cannot be served comes back from `step` with its error."""
        self.pending += 1
        try:
            self.waiting.append(self._row(request))
        except RowError as error:
            self.done.append(Result(request.key, np.zeros(0, np.int32), error=str(error)))

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Serves all of `requests`, yielding results as they finish, in no fixed order."""
        for request in requests:
            self.submit(request)
        while self.pending:
            yield from self.step()

    def step(self) -> list[Result]:
        """One round: fill free slots, prefill a chunk, decode a token in every slot.

        Returns the rows that are finished.
        """
        try:
            self._round()
            lacking = ""
        except torch.OutOfMemoryError as error:
            if self.most_groups == 1:
                raise
            lacking = str(error).partition("\n")[0]
        if lacking:
            # Only here does no frame of the round hold its tensors any more.
            self._halve(lacking)
        results, self.done = self.done, []
        self.pending -= len(results)
        return results

    @torch.inference_mode()
    def _round(self) -> None:
        """What `step` does; rows that are finished are in `done`, also if memory runs out on the way."""
        self._fill()
        decoding = [group for group in self.groups if group.active]
        for group in decoding:
            for row, tokens, logits in group.step():
                if self.task == "understand":
                    self.done.append(self._text(row, tokens, logits))
                else:
                    size = row.request.size
                    assert size is not None
                    self.pictures.setdefault(size, []).append(_Picture(row, tokens, logits))
        if decoding:
            self.counts["steps"] += 1
            self.counts["row_steps"] += sum(group.active_before for group in decoding)
            rows = sum(group.rows for group in self.groups) if self.lossless else 0
            self.counts["slot_steps"] += max(self.slots, rows)
        self._decode_pictures(flush=not (decoding or self.waiting))

    def _halve(self, lacking: str) -> None:
        """Gives up half of the groups and starts the rows in slots anew: their draws are the same again."""
        before = self.slots
        self.most_groups = max(1, self.most_groups // 2)
        warnings.warn(
            f"out of memory with {before} slots ({lacking}): going on with {self.slots}, no picture changes",
            RuntimeWarning,
            stacklevel=3,
        )
        started = [row.request for group in self.groups for row in group.members if row is not None]
        self.groups.clear()
        self._clear_scratch()
        for pending in self.prefixes.values():
            if pending.prefix is None:
                pending.done, pending.scratch, pending.features = 0, -1, None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.waiting.extendleft([self._row(request) for request in started][::-1])
        self.counts["halvings"] += 1

    def _clear_scratch(self) -> None:
        """Room for prompts on their way; the last row takes the pads of unused pieces."""
        pieces, model = self.options.prefill_pieces, self.model
        with torch.inference_mode():
            self.scratch = KVCache(model.config.decoder, pieces + 1, 0, model.device, model.dtype)
        self.scratch_free = list(range(pieces))

    # -- rows and their prompts ---------------------------------------------------------------------

    def _row(self, request: Request) -> _Row:
        request.sampling.validate()
        if request.sampling.guided and request.null is None:
            raise RowError("sampling", f"cfg is {request.sampling.cfg}, which needs a null prompt.")
        if request.size is None:
            steps = request.max_new_tokens
        else:
            height, width = request.size.grid
            steps = height * width + (height - 1 if self.model.config.line_break else 0)
        first, last = (round(share * steps) for share in self.options.cfg_interval)
        guided = range(first, last) if request.sampling.guided else range(0)
        branches = [(request.prompt, request.semantic, request.pixels)]
        if guided:
            assert request.null is not None
            # The null branch of an edit sees a black image of the source's size.
            semantic, pixels = (
                None if image is None else np.zeros_like(image)
                for image in (request.semantic, request.pixels)
            )
            branches.append((request.null, semantic, pixels))
        prefixes = [self._prefix(*branch) for branch in branches]
        length = max(len(prompt.ids) for prompt, _, _ in branches) + steps
        return _Row(request, prefixes, steps, guided, length)

    def _prefix(
        self, prompt: Prompt, semantic: np.ndarray | None, pixels: np.ndarray | None
    ) -> _PendingPrefix:
        key: Hashable
        if self.options.prefix_sharing:
            digest = hashlib.sha256(prompt.ids.tobytes())
            for image in (semantic, pixels):
                digest.update(b"" if image is None else str(image.shape).encode() + image.tobytes())
            key = digest.digest()
        else:
            self._private += 1
            key = self._private
        known = self.prefixes.get(key)
        if known is None:
            known = self.prefixes[key] = _PendingPrefix(key, prompt, semantic, pixels)
        else:
            self.prefixes.move_to_end(key)
            self.counts["prefixes_shared"] += 1
        known.waiting += 1
        return known

    def _fill(self) -> None:
        """Fills every free slot, first come first served; if none is free, prefills ahead.

        A free slot is worth more than a step of the others: the total work is the same, and a fuller
        group makes better use of the weights it reads.
        """
        while self.waiting:
            row = self.waiting[0]
            group = self._group_with_room(row)
            if group is None:
                return self._prefill(only_full=True)
            while not all(pending.prefix for pending in row.prefixes):
                self._prefill(only_full=False)
            group.admit(row)
            self.waiting.popleft()
            for pending in row.prefixes:
                pending.waiting -= 1
            row.prefixes.clear()
            self._evict()

    def _group_with_room(self, row: _Row) -> "_Group | None":
        """A free slot in a group of the row's kind; the kind may change only while a group is empty,
        since it decides the shape of the head's matrix product."""
        for group in self.groups:
            if group.has_room(row):
                return group
        for index, group in enumerate(self.groups):
            if not group.active:
                self.groups[index] = self._group(row)
                return self.groups[index]
        if len(self.groups) < self.most_groups:
            self.groups.append(self._group(row))
            return self.groups[-1]
        return None

    def _group(self, row: _Row) -> "_Group":
        """An empty group of a row's kind."""
        return _Group(self, bool(row.guided)) if self.lossless else _MixedGroup(self)

    def _evict(self) -> None:
        """Forgets the least recently used prompts that no row waits for, down to `prefix_tokens`."""
        idle = [pending for pending in self.prefixes.values() if not pending.waiting and pending.prefix]
        kept = sum(len(pending.prompt.ids) for pending in idle)
        for pending in idle:
            if kept <= self.options.prefix_tokens and self.options.prefix_sharing:
                return
            kept -= len(pending.prompt.ids)
            del self.prefixes[pending.key]

    def _prefill(self, only_full: bool) -> None:
        """Takes the next pieces of the next rows' prompts through the decoder in one forward.

        With `only_full` nothing is done unless every piece of the forward would be in use.
        """
        width, count = self.options.prefill_piece, self.options.prefill_pieces
        pieces: list[tuple[_PendingPrefix, int]] = []
        seen: set[Hashable] = set()
        for row in itertools.islice(self.waiting, self.options.group_rows):
            for pending in row.prefixes:
                if len(pieces) < count and not pending.prefix and pending.key not in seen:
                    seen.add(pending.key)
                    starts = range(pending.done, len(pending.prompt.ids), width)
                    pieces += [(pending, start) for start in starts[: count - len(pieces)]]
        if not pieces or (only_full and len(pieces) < count):
            return
        hidden = self._prefill_pieces(pieces)
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

    def _prefill_pieces(self, pieces: list[tuple[_PendingPrefix, int]]) -> Tensor:
        """Hidden states `(prefill_pieces * prefill_piece, H)` of pieces given by prompt and first token."""
        model, cache = self.model, self.scratch
        width, count = self.options.prefill_piece, self.options.prefill_pieces
        ids, positions = np.zeros((count, width), np.int64), np.zeros((3, count, width), np.int64)
        rows, starts = [count] * count, [0] * count
        for index, (pending, start) in enumerate(pieces):
            if pending.scratch < 0:
                pending.scratch = self.scratch_free.pop()
                pending.features = self._features(pending)
            piece = pending.prompt.ids[start : start + width]
            ids[index, : len(piece)] = piece
            positions[:, index, : len(piece)] = pending.prompt.positions[:, start : start + width]
            rows[index], starts[index] = pending.scratch, start
            self.counts["prefill_tokens"] += len(piece)
        self.counts["prefill_forwards"] += 1
        cache.grow(max(starts) + width)
        x = model.language_model.embed_tokens(torch.from_numpy(ids.reshape(-1)).to(model.device))
        for index, (pending, start) in enumerate(pieces):
            for where, feature in pending.features or ():
                first, last = np.searchsorted(where, (start, start + width))
                into = torch.from_numpy(where[first:last] - start + index * width).to(model.device)
                x[into] = feature[first:last]
        turns = torch.from_numpy(positions.reshape(3, -1)).to(model.device)
        cos, sin = rope(turns, self.frequencies, model.config.decoder.mrope_section, x.dtype)
        visible = Visible.prefill(rows, starts, width, model.device)
        attention = self.attention(visible, model.config.decoder.num_key_value_heads, x.dtype)
        assert visible.rows is not None
        row, place = visible.rows.repeat_interleave(width), (visible.limits - 1).reshape(-1)
        block, offset = place // KEY_BLOCK, place % KEY_BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[row, :, block, offset] = k
            values[row, :, block, offset] = v
            return attention(q.view(count, width, *q.shape[1:]), keys, values).flatten(0, 1)

        return self.prefiller(x, cos, sin, attend)

    def _features(self, pending: _PendingPrefix) -> list[tuple[np.ndarray, Tensor]]:
        """What the source of a prompt puts in place of embeddings: ascending places `(n,)` among the
        prompt's tokens, and decoder inputs `(n, H)`."""
        model, prompt = self.model, pending.prompt
        features = []
        if prompt.semantic is not None:
            assert model.visual is not None and pending.semantic is not None
            patches, grid = patchify(pending.semantic)
            seen = encode_image(model.visual, torch.from_numpy(patches).to(model.device, model.dtype), grid)
            features.append((np.arange(*prompt.semantic), seen))
        if prompt.pixel is not None:
            assert model.vq is not None and model.pixel_adapter is not None and pending.pixels is not None
            picture = torch.tensor(pending.pixels, device=model.device)[None]
            latents = model.vq.encode(to_float(picture))[0].flatten(1).T
            features.append((prompt.pixel, model.pixel_adapter(latents.to(model.dtype))))
        return features

    # -- results ------------------------------------------------------------------------------------

    def _text(self, row: _Row, tokens: np.ndarray, logits: np.ndarray | None) -> Result:
        stops = np.flatnonzero(np.isin(tokens, self.stops))
        end = int(stops[0]) if len(stops) else len(tokens)
        return Result(
            row.request.key,
            tokens[:end].astype(np.int32),
            finish_reason="stop" if len(stops) else "length",
            prompt_tokens=len(row.request.prompt.ids),
            logits=logits,
        )

    def _decode_pictures(self, flush: bool) -> None:
        """Begins to decode pictures whose slice is full, or all of them, and ends those that are decoded; a
        slice is padded with its first picture."""
        width = self.options.vq_slice
        for size, ready in self.pictures.items():
            while len(ready) >= width or (flush and ready):
                taken = ready[:width]
                self.slices.append(_Slice(taken, *self._decoded(size, taken)))
                del ready[:width]
        while self.slices and self.slices[0].is_there(wait=flush):
            self._end(self.slices.popleft())

    @torch.inference_mode()
    def _decoded(self, size: Size, taken: list[_Picture]) -> tuple[Tensor | None, torch.cuda.Event | None]:
        """Pixels uint8 `(vq_slice, H, W, 3)` on the host, and when they are there if not yet."""
        if not self.options.decode_vq:
            return None, None
        assert self.model.vq is not None
        grids = [picture.tokens.reshape(size.grid) for picture in taken]
        grids += grids[:1] * (self.options.vq_slice - len(grids))
        tokens = torch.from_numpy(np.stack(grids)).long()
        self.counts["vq_slices"] += 1
        if self.vq_stream is None:
            return to_uint8(self.model.vq.decode(tokens.to(self.model.device))).cpu(), None
        # Beside the decode steps that follow. Nothing but the weights is shared with their stream.
        with torch.cuda.stream(self.vq_stream):
            pixels = to_uint8(self.model.vq.decode(tokens.to(self.model.device)))
            return pixels.to("cpu", non_blocking=True), self.vq_stream.record_event()

    def _end(self, made: _Slice) -> None:
        for index, picture in enumerate(made.pictures):
            request = picture.row.request
            self.done.append(
                Result(
                    request.key,
                    picture.tokens,
                    None if made.pixels is None else made.pixels[index].numpy().copy(),
                    "length",
                    len(request.prompt.ids),
                    logits=picture.logits,
                )
            )
        self.counts["pictures"] += len(made.pictures)


class _Group:
    """A constant number of sequences that decode together.

    Guided: `group_rows` rows, conditional sequences first, then their null sequences. Unguided: twice
    as many rows, a sequence each.
    """

    STOP_CHECK = 4
    """Steps between two looks at the stop flags of texts, each of which waits for the device."""

    def __init__(self, engine: Engine, guided: bool):
        model, options = engine.model, engine.options
        self.engine, self.guided = engine, guided
        sequences = 2 * options.group_rows
        self.rows = options.group_rows if guided else sequences
        if engine.task != "understand":
            _, head = model.image_parts(engine.task)
            self.logits = packed(head[-1], self.rows)
        device = model.device
        self.cache = KVCache(model.config.decoder, sequences, 0, device, model.dtype)
        self.hidden = torch.zeros(
            sequences, model.config.decoder.hidden_size, device=device, dtype=model.dtype
        )
        # An empty slot goes on computing over one finite key; its length and position stand still.
        self.length = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.position = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.advance = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.sequence = torch.arange(sequences, device=device)
        self.token = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.taken = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.line = torch.ones(self.rows, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(self.rows, 0, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(self.rows, 0, dtype=torch.int64, device=device)
        self.forced = torch.zeros(self.rows, 0, dtype=torch.int64, device=device)
        self.cfg = torch.ones(self.rows, 1, device=device, dtype=torch.float32)
        self.temperature = torch.ones(self.rows, device=device)
        self.top_k = torch.ones(self.rows, dtype=torch.int64, device=device)
        self.top_p = torch.ones(self.rows, device=device)
        self.filters = Filters(0, False)
        self.members: list[_Row | None] = [None] * self.rows
        self.traces: dict[int, list[Tensor]] = {}
        self.replayed: dict[tuple[bool, Filters], Replayed] = {}
        self.since_check = 0
        self.active_before = 0

    @property
    def active(self) -> int:
        """Slots in use."""
        return sum(row is not None for row in self.members)

    @property
    def nulls(self) -> int:
        """Sequences in use that are null branches."""
        return sum(len(row.sequences) - 1 for row in self.members if row is not None)

    def has_room(self, row: _Row) -> bool:
        """Whether a row can be put into it now."""
        return self.guided == bool(row.guided) and self.active < self.rows

    def _sequences(self, row: _Row) -> tuple[int, ...]:
        """Free places for the branches of a row."""
        slot = self.members.index(None)
        return (slot, slot + self.rows) if self.guided else (slot,)

    def admit(self, row: _Row) -> None:
        """Puts a row whose prompts are ready into a free slot."""
        request, sampling = row.request, row.request.sampling
        row.sequences = self._sequences(row)
        slot = row.slot
        if self.cache.capacity < row.length or self.tokens.shape[1] < row.steps:
            self.replayed.clear()  # they were recorded with the tensors that are replaced now
        self.cache.grow(row.length)
        if self.tokens.shape[1] < row.steps:
            missing = row.steps - self.tokens.shape[1]
            self.uniform, self.tokens, self.forced = (
                torch.cat((tensor, tensor.new_zeros(self.rows, missing)), dim=1)
                for tensor in (self.uniform, self.tokens, self.forced)
            )
        for pending, sequence in zip(row.prefixes, row.sequences, strict=True):
            prefix = pending.prefix
            assert prefix is not None
            prefix.copy_to(self.cache, sequence)
            self.hidden[sequence] = prefix.hidden
            self.length[sequence] = prefix.length
            self.position[sequence] = prefix.next_position
            self.advance[sequence] = 1
        self.taken[slot] = 0
        self.uniform[slot, : row.steps] = torch.from_numpy(draws(request.seed, row.steps)).to(
            self.uniform.device
        )
        if self.engine.options.trace:
            self.forced[slot] = -1
            if request.forced is not None:
                where = self._token_steps(row)
                self.forced[slot, torch.from_numpy(where[: len(request.forced)])] = torch.from_numpy(
                    request.forced.astype(np.int64)
                )
            self.traces[slot] = []
        self.line[slot] = self._line(row)
        self.cfg[slot], self.temperature[slot] = sampling.cfg, sampling.temperature
        # A bound beyond the vocabulary is none, and the tensor could not hold every whole number.
        self.top_k[slot], self.top_p[slot] = min(sampling.top_k, 2**31), sampling.top_p
        self.members[slot] = row
        samplings = (member.request.sampling for member in self.members if member)
        self.filters = Filters.of(samplings, self.engine.vocabulary)

    def step(self) -> list[tuple[_Row, np.ndarray, np.ndarray | None]]:
        """Draws a token in every slot and takes it through the decoder; returns the finished rows with
        their tokens (and logits, if traced)."""
        rows = [row for row in self.members if row is not None]
        for row in rows:
            row.step += 1
        self.active_before = len(rows)
        # Where all rows are at the end of a line, which is not drawn, the tokens before stand in.
        drawn = self.engine.options.trace or any(row.step % self._line(row) for row in rows)
        # Nobody needs what comes after a last token; where all rows are at theirs, it is not computed.
        fed = any(row.step < row.steps for row in rows)
        longest = max(row.length - row.steps + row.step for row in rows)
        if fed and self.engine.graph_pool is not None:
            replayed = self.replayed.get((drawn, self.filters))
            if replayed is None:
                # Nothing in it may depend on how long the rows are; the capacity bounds them all.
                work = functools.partial(self._advance, drawn, fed, self.cache.capacity)
                replayed = self.replayed[drawn, self.filters] = Replayed(work, self.engine.graph_pool)
            replayed()
        else:
            self._advance(drawn, fed, longest)
        self.engine.counts["forwards"] += fed
        self.engine.counts["null_steps"] += fed * self.nulls
        return self._finished()

    def _advance(self, drawn: bool, fed: bool, longest: int) -> None:
        """A token in every slot, on tensors that stay where they are; `longest` bounds the keys."""
        if drawn:
            self._draw()
        self.taken += self.advance[: self.rows]
        if fed:
            self._feed(longest)

    def _feed(self, longest: int) -> None:
        """Takes `token` of every slot through the decoder; `longest` bounds the keys."""
        engine, model = self.engine, self.engine.model
        x = engine.table[self.token]
        if engine.line_end is not None:
            # The last token of a line is fed like any other; then a line end is fed, not drawn.
            x = torch.where((self.taken % self.line == 0).unsqueeze(-1), engine.line_end, x)
        x = self._to_branches(x)
        positions = self.position.expand(3, -1)
        cos, sin = rope(positions, engine.frequencies, model.config.decoder.mrope_section, x.dtype)
        visible = Visible.decode(self.length + 1, longest)
        attention = engine.attention(visible, model.config.decoder.num_key_value_heads, x.dtype)
        block, offset = self.length // KEY_BLOCK, self.length % KEY_BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[self.sequence, :, block, offset] = k
            values[self.sequence, :, block, offset] = v
            return attention(q.unsqueeze(1), keys, values).squeeze(1)

        self.hidden.copy_(engine.decoder(x, cos, sin, attend))
        self.length += self.advance
        self.position += self.advance

    def _draw(self) -> None:
        """Puts the next token of every slot into `token`, and into its place in `tokens`."""
        engine, model = self.engine, self.engine.model
        if engine.task == "understand":
            assert model.lm_head is not None
            logits = model.lm_head(self.hidden).float()
        else:
            logits = self.logits(self._guide(engine.head(self.hidden))).float()
        step = self.taken.unsqueeze(1)
        uniform = self.uniform.gather(1, step).squeeze(1)
        token = sample(logits, self.temperature, self.top_k, self.top_p, uniform, self.filters)
        if engine.options.trace:
            forced = self.forced.gather(1, step).squeeze(1)
            token = torch.where(forced >= 0, forced, token)
            for slot, trace in self.traces.items():
                trace.append(logits[slot].clone())
        self.token.copy_(token)
        self.tokens.scatter_(1, step, token.unsqueeze(1))

    def _to_branches(self, x: Tensor) -> Tensor:
        """Decoder inputs of all sequences, of those of all slots."""
        return torch.cat((x, x)) if self.guided else x

    def _guide(self, hidden: Tensor) -> Tensor:
        """What the head's last matrix takes, a row a slot, of what all sequences have before it.

        That matrix is linear, so guidance comes first: half of its rows are saved.
        """
        if not self.guided:
            return hidden
        conditional, null = hidden.float().split(self.rows)
        return (null + self.cfg * (conditional - null)).to(hidden.dtype)

    def _finished(self) -> list[tuple[_Row, np.ndarray, np.ndarray | None]]:
        ended = [row for row in self.members if row is not None and row.step == row.steps]
        self.since_check += 1
        if self.engine.stops and self.since_check >= self.STOP_CHECK:
            self.since_check = 0
            stops = torch.tensor(self.engine.stops, device=self.tokens.device)
            stopped = torch.isin(self.tokens, stops)
            drawn = torch.arange(self.tokens.shape[1], device=stopped.device) < self.taken.unsqueeze(1)
            for slot in torch.nonzero((stopped & drawn).any(1)).flatten().tolist():
                row = self.members[slot]
                if row is not None and row not in ended:
                    ended.append(row)
        results = []
        # All are read before one is released, since memory may run out on the way.
        for row in ended:
            where = self._token_steps(row)
            tokens = self.tokens[row.slot].cpu().numpy()[where].astype(np.int32)
            logits = None
            if self.engine.options.trace:
                logits = torch.stack(self.traces[row.slot]).cpu().numpy()[where]
            results.append((row, tokens, logits))
        for row in ended:
            self._release(row)
        return results

    def _release(self, row: _Row) -> None:
        self.members[row.slot] = None
        self.traces.pop(row.slot, None)
        for sequence in row.sequences:
            self._stop(sequence)
        self.taken[row.slot] = 0

    def _stop(self, sequence: int) -> None:
        """A sequence computes nothing that anybody needs any more."""
        self.length[sequence] = self.position[sequence] = self.advance[sequence] = 0

    def _line(self, row: _Row) -> int:
        """Steps a line of the picture takes, its line end included; past all steps if there is none."""
        size = row.request.size
        if size is None or not self.engine.model.config.line_break:
            return row.steps + 1
        return size.width // VQ_FACTOR + 1

    def _token_steps(self, row: _Row) -> np.ndarray:
        """The steps of a row at which a token that counts was drawn: those so far, line ends left out."""
        steps = np.arange(row.step or row.steps)
        line = self._line(row)
        return steps[steps % line != line - 1]


class _MixedGroup(_Group):
    """A group of rows that are guided in a part of their steps: a sequence a branch, each in any place.

    When the last guided step of a row is done, the place of its null branch is free for another row. It
    cannot begin later than its row, since guidance needs its keys from the first token on.
    """

    def __init__(self, engine: Engine):
        super().__init__(engine, guided=False)
        self.fed_as = self.sequence.clone()  # the slot whose tokens a sequence is fed
        self.guided_from = self.sequence.clone()  # the null branch of a slot; itself where it is not guided

    def _free(self) -> list[int]:
        taken = {sequence for row in self.members if row is not None for sequence in row.sequences}
        return [sequence for sequence in range(self.rows) if sequence not in taken]

    def has_room(self, row: _Row) -> bool:
        return len(self._free()) >= len(row.prefixes)

    def _sequences(self, row: _Row) -> tuple[int, ...]:
        return tuple(self._free()[: len(row.prefixes)])

    def admit(self, row: _Row) -> None:
        super().admit(row)
        for null in row.sequences[1:]:
            self.fed_as[null] = row.slot

    def step(self) -> list[tuple[_Row, np.ndarray, np.ndarray | None]]:
        for row in self.members:
            if row is not None and row.guided and row.step == row.guided.start:
                self.guided_from[row.slot] = row.sequences[1]
        finished = super().step()
        for row in self.members:
            if row is not None and row.guided and row.step == row.guided.stop:
                self._stop(row.sequences[1])
                self.guided_from[row.slot] = row.slot
                row.sequences = row.sequences[:1]
        return finished

    def _to_branches(self, x: Tensor) -> Tensor:
        return x[self.fed_as]

    def _guide(self, hidden: Tensor) -> Tensor:
        branches = hidden.float()
        null = branches[self.guided_from]
        return (null + self.cfg * (branches - null)).to(hidden.dtype)

    def _stop(self, sequence: int) -> None:
        super()._stop(sequence)
        self.taken[sequence] = 0
        self.fed_as[sequence] = self.guided_from[sequence] = sequence
