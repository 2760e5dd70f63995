"""The engine itself: which rows decode, and what happens before and after."""

import dataclasses
import functools
import itertools
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from wallaroo.model.cuda.graphs import GraphRecorder, Recorder
from wallaroo.model.cuda.transfer import Streams
from wallaroo.model.decoder import packed, rope_frequencies
from wallaroo.model.engine.backends import default_backend
from wallaroo.model.engine.groups import Group, MixedGroup
from wallaroo.model.engine.options import EngineOptions, longest_prompt, most_steps
from wallaroo.model.engine.pictures import Pictures
from wallaroo.model.engine.prefill import Prefill
from wallaroo.model.engine.requests import Request, Result, Row, line_of, steps_of
from wallaroo.model.errors import RowError
from wallaroo.model.kv_cache import KVCache
from wallaroo.model.sampling import ALWAYS
from wallaroo.model.wallaroo import Wallaroo

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
END_OF_LINE = "<|end_of_line>|"


class Engine:
    """Serves rows of one task with one model on one device.

    `submit` rows, then call `step` until `pending` is 0; each row is given back exactly once. Where
    memory runs out, half of the groups go on, and the rows that were in slots begin again; with one group,
    a smaller one if the options name any.
    `counts` says what was done: steps, forwards, slot_steps (slots times steps), row_steps (of them in
    use), null_steps (null branches fed beside them), prefill_forwards, prefill_tokens, prefixes_shared,
    vq_slices, pictures, halvings.

    Args:
        model: Loaded with the parts of the task.
        task: `generate`, `edit` or `understand`.
        options: What shapes the work.
        new_recorder: Makes what records decode steps, for each group; by default CUDA graphs on CUDA, where
            the options ask for them and nothing is traced.
    """

    def __init__(
        self,
        model: Wallaroo,
        task: str,
        options: EngineOptions | None = None,
        new_recorder: Callable[[], Recorder] | None = None,
    ):
        if task not in model.tasks:
            raise ValueError(f"the model was loaded for {model.tasks}, not for '{task}'")
        self.model = model.eval()
        self.task = task
        self.counts: Counter[str] = Counter()
        self.options = options or EngineOptions()
        device = model.device
        self.backend = self.options.attention or default_backend(device, model.dtype)
        graphs = self.options.graphs and device.type == "cuda"
        if new_recorder is None and graphs and not self.options.trace:
            new_recorder = functools.partial(GraphRecorder, [])
        # Blocks of keys are counted by the host.
        self.new_recorder = None if self.backend == "block" else new_recorder
        self.reserves = self.new_recorder is not None or device.type == "cuda"
        steps = most_steps(model.config, task, self.options.max_new_tokens)
        self.longest = longest_prompt(model.config, task, self.options) + steps, steps
        self.streams = Streams(device)
        self.frequencies = rope_frequencies(model.config.decoder, device)
        ids = model.config.token_ids
        embed = model.language_model.embed_tokens
        with torch.inference_mode():
            if task == "understand":
                assert model.lm_head is not None
                self.table = embed.weight
                self.vocabulary = model.lm_head.out_features
                self.line_end = None
                self.stops = [ids[name] for name in STOP_TOKENS if name in ids]
            else:
                self.table = model.token_table(task)
                self.vocabulary = len(self.table)
                self.line_end = embed(torch.tensor(ids[END_OF_LINE], device=device))
                self.stops = []
            self.stop_ids = torch.tensor(self.stops, dtype=torch.int64, device=device)
        self.prefill = Prefill(model, self.options, self.backend, self.counts)
        self.pictures = Pictures(model, self.options, self.backend, self.streams, self.counts)
        self.lossless = self.options.cfg_interval == ALWAYS
        self.most_groups = -(-self.options.slots // self.options.group_rows)
        self.groups: list[Group] = []
        self._pack()
        self.waiting: deque[Row] = deque()
        self.done: list[Result] = []
        self.pending = 0
        self.streams.begin()

    def _pack(self) -> None:
        """Lays out the weights for groups of the size that the options have now."""
        sequences = 2 * self.options.group_rows
        prefilled = self.options.prefill_pieces * self.options.prefill_piece
        self.decoder = (
            self.prefill.decoder if prefilled == sequences else packed(self.model.language_model, sequences)
        )
        if self.task != "understand":
            _, head = self.model.image_parts(self.task)
            self.head = packed(cast(nn.Sequential, head[:-1]), sequences)

    @property
    def slots(self) -> int:
        """Guided rows that can decode at once; on average, where their null branches end before them."""
        return int(self.most_groups * 2 * self.options.group_rows / (1 + self.options.cfg_interval[1]))

    @property
    def scratch(self) -> KVCache:
        """Keys and values of prompts on their way."""
        return self.prefill.scratch

    def shapes(self) -> dict[str, int | str]:
        """The options that may change a row by rounding, as they apply now."""
        return self.options.shapes(self.model.device, self.model.dtype) | {"attention": self.backend}

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

        Returns:
            The rows that are finished.

        Raises:
            torch.OutOfMemoryError: Memory ran out with the smallest group.
        """
        try:
            with self.streams.on_main():
                self._round()
            lacking = ""
        except torch.OutOfMemoryError as error:
            if self.most_groups == 1 and not self.options.smaller:
                raise
            lacking = str(error).partition("\n")[0]
        if lacking:
            # Only here does no frame of the round hold its tensors any more.
            self._shrink(lacking)
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
                    self.pictures.add(row, tokens, logits)
        if decoding:
            self.counts["steps"] += 1
            self.counts["row_steps"] += sum(group.active_before for group in decoding)
            rows = sum(group.rows for group in self.groups) if self.lossless else 0
            self.counts["slot_steps"] += max(self.slots, rows)
            self.streams.end_round()
        self.done += self.pictures.step(flush=not (decoding or self.waiting))

    def _shrink(self, lacking: str) -> None:
        """Gives up half of the groups, or makes the only one smaller.

        Rows in slots begin again, with the same draws.
        """
        before = self.slots
        if self.most_groups > 1:
            self.most_groups //= 2
            change = "no image changes"
        else:
            rows, *smaller = self.options.smaller
            self.most_groups = max(1, self.options.group_rows // 2 // rows)
            self.options = dataclasses.replace(self.options, group_rows=rows, smaller=tuple(smaller))
            self._pack()
            change = f"rounding may differ, since a group has {rows} rows now"
        warnings.warn(
            f"out of memory with {before} slots ({lacking}): continuing with {self.slots}, {change}",
            RuntimeWarning,
            stacklevel=3,
        )
        started = [row.request for group in self.groups for row in group.members if row is not None]
        for group in self.groups:
            group.drop_recordings()
        self.groups.clear()
        self.prefill.reset()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.waiting.extendleft([self._row(request) for request in started][::-1])
        self.counts["halvings"] += 1

    def _row(self, request: Request) -> Row:
        request.sampling.validate()
        if request.sampling.guided and request.null is None:
            raise RowError("sampling", f"cfg is {request.sampling.cfg}, which needs a null prompt.")
        line_break = self.model.config.line_break
        steps = request.max_new_tokens if request.size is None else steps_of(request.size, line_break)
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
        prefixes = [self.prefill.add(*branch) for branch in branches]
        length = max(len(prompt.ids) for prompt, _, _ in branches) + steps
        return Row(request, prefixes, steps, guided, length, line_of(request, steps, line_break))

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
            with self.streams.phase("admit"):
                group.admit(row)
            self.waiting.popleft()
            self.prefill.release(row.prefixes)
            row.prefixes.clear()

    def _prefill(self, only_full: bool) -> None:
        with self.streams.phase("prefill"):
            self.prefill.step(itertools.islice(self.waiting, self.options.group_rows), only_full)

    def _group_with_room(self, row: Row) -> Group | None:
        """A free slot in a group of the row's kind; the kind may change only while a group is empty,
        since it decides the shape of the head's matrix product."""
        for group in self.groups:
            if group.has_room(row):
                return group
        for index, group in enumerate(self.groups):
            if not group.active:
                # What it holds goes before the new one takes as much.
                group.drop_recordings()
                del self.groups[index], group
                self.groups.insert(index, self._group(row))
                return self.groups[index]
        if len(self.groups) < self.most_groups:
            self.groups.append(self._group(row))
            return self.groups[-1]
        return None

    def _group(self, row: Row) -> Group:
        """An empty group of a row's kind."""
        return Group(self, bool(row.guided)) if self.lossless else MixedGroup(self)

    def _text(self, row: Row, tokens: Tensor, logits: np.ndarray | None) -> Result:
        drawn = tokens[: row.step].cpu().numpy().astype(np.int32)
        stops = np.flatnonzero(np.isin(drawn, self.stops))
        end = int(stops[0]) if len(stops) else len(drawn)
        return Result(
            row.request.key,
            drawn[:end],
            finish_reason="stop" if len(stops) else "length",
            prompt_tokens=len(row.request.prompt.ids),
            logits=logits,
        )
