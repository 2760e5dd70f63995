"""Groups of rows that decode together: a constant number of sequences that take each step together.

Knows nothing of prefill, pixels and waiting rows.
"""

import functools
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.attention import BACKENDS, KEY_BLOCK, Visible
from wallaroo.model.cuda import ops
from wallaroo.model.cuda.graphs import Recorder
from wallaroo.model.cuda.transfer import to_host
from wallaroo.model.decoder import Layer, packed, product_in_float32, rope
from wallaroo.model.engine.requests import Row
from wallaroo.model.engine.shared import Shared
from wallaroo.model.engine.updates import Updates
from wallaroo.model.kv_cache import KVCache
from wallaroo.model.sampling import Filters, draws, sample

Ended = tuple[Row, Tensor, np.ndarray | None]
"""A finished row; its tokens, int64 `(steps or more,)` on the device, one a step; its logits if traced."""

_Look = tuple[Tensor, torch.cuda.Event, list[Row | None]]
"""Stop flags by slot on the host, when they are there, and the rows that had the slots."""

LARGEST_TOP_K = 2**31
"""A bound beyond the vocabulary is none, and int64 could not hold every whole number."""


class Group:
    """A constant number of sequences that decode together.

    Guided: `group_rows` rows, conditional sequences first, then their null sequences. Unguided: twice
    as many rows, a sequence each.

    What a step works on stays where it is, and whatever the host decides travels as numbers in it, so that a
    step can be recorded: one recording serves all sizes, filters and mixtures of rows, a second one those
    with a top_p. In a recorded step line ends are drawn too, and the draw is not used.

    Args:
        engine: The engine that the group belongs to.
        guided: Whether its rows are guided.
    """

    STOP_CHECK = 4
    """Steps between two looks at the stop flags of texts."""

    def __init__(self, engine: Shared, guided: bool):
        model, options = engine.model, engine.options
        self.engine, self.guided = engine, guided
        sequences = 2 * options.group_rows
        self.rows = options.group_rows if guided else sequences
        if engine.task != "understand":
            _, head = model.image_parts(engine.task)
            self.logits = packed(head[-1], self.rows)
        device = model.device
        self.recorder = engine.new_recorder() if engine.new_recorder is not None else None
        self.recorded: dict[bool, Callable[[], None]] = {}
        keys, steps = engine.longest if engine.reserves else (0, 0)
        self.cache = KVCache(model.config.decoder, sequences, keys, device, model.dtype)
        self.hidden = torch.zeros(
            sequences, model.config.decoder.hidden_size, device=device, dtype=model.dtype
        )
        self.updates = Updates(device)
        # By sequence. An empty slot computes too, but its length and position do not change.
        self.places = torch.zeros(3, sequences, dtype=torch.int64, device=device)
        self.length, self.position, self.advance = self.places
        self.sequence = torch.arange(sequences, device=device)
        branches = self.sequence if not guided else self.sequence % self.rows
        null_of = self.sequence if not guided else (self.sequence + self.rows) % sequences
        # The slot whose tokens a sequence is fed; the null branch of a slot, itself where it is not guided.
        self.branches = torch.stack((branches, null_of))
        self.fed_as, self.guided_from = self.branches
        # By slot.
        self.counters = torch.tensor([[0], [1], [1]], device=device).repeat(1, self.rows)
        self.taken, self.line, self.top_k = self.counters
        self.factors = torch.ones(3, self.rows, device=device)
        self.cfg = self.factors[0].unsqueeze(1)
        _, self.temperature, self.top_p = self.factors
        self.token = torch.zeros(self.rows, dtype=torch.int64, device=device)
        # One more than there are steps: a picture's last line is as long as the others in `tokens`.
        self.uniform = torch.zeros(self.rows, steps + 1, dtype=torch.float64, device=device)
        self.tokens, self.forced = (
            torch.zeros(self.rows, steps + 1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.filters = Filters(0, False)
        self.members: list[Row | None] = [None] * self.rows
        self.traces: dict[int, list[Tensor]] = {}
        self.look: _Look | None = None
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

    def has_room(self, row: Row) -> bool:
        """Whether a row can be put into it now."""
        return self.guided == bool(row.guided) and self.active < self.rows

    def _sequences(self, row: Row) -> tuple[int, ...]:
        """Free places for the branches of a row."""
        slot = self.members.index(None)
        return (slot, slot + self.rows) if self.guided else (slot,)

    def _grow(self, row: Row) -> None:
        """Makes room for a row that is longer than all before it."""
        missing = row.steps + 1 - self.uniform.shape[1]
        if self.cache.capacity < row.length or missing > 0:
            self.updates.send()
            # They were made with the tensors that are replaced now.
            self.drop_recordings()
        self.cache.grow(row.length)
        if missing > 0:
            self.uniform, self.tokens, self.forced = (
                torch.cat((tensor, tensor.new_zeros(self.rows, missing)), dim=1)
                for tensor in (self.uniform, self.tokens, self.forced)
            )

    def drop_recordings(self) -> None:
        """Gives up the recorded steps and their memory."""
        if self.recorder is not None:
            self.recorder.clear()
        self.recorded.clear()

    def admit(self, row: Row) -> None:
        """Puts a row whose prompts are ready into a free slot."""
        request, sampling = row.request, row.request.sampling
        row.sequences = self._sequences(row)
        slot = row.slot
        self._grow(row)
        for pending, sequence in zip(row.prefixes, row.sequences, strict=True):
            prefix = pending.prefix
            assert prefix is not None
            prefix.copy_to(self.cache, sequence)
            self.hidden[sequence] = prefix.hidden
            self.updates.put(self.places, 1, sequence, (prefix.length, prefix.next_position, 1))
        numbers = np.zeros(self.uniform.shape[1])
        numbers[: row.steps] = draws(request.seed, row.steps)
        self.updates.put(self.uniform, 0, slot, numbers)
        self.updates.put(self.counters, 1, slot, (0, row.line, min(sampling.top_k, LARGEST_TOP_K)))
        self.updates.put(self.factors, 1, slot, (sampling.cfg, sampling.temperature, sampling.top_p))
        if self.engine.options.trace:
            forced = np.full(self.forced.shape[1], -1)
            if request.forced is not None:
                forced[row.token_steps()[: len(request.forced)]] = request.forced
            self.updates.put(self.forced, 0, slot, forced)
            self.traces[slot] = []
        self.members[slot] = row
        samplings = (member.request.sampling for member in self.members if member)
        self.filters = Filters.of(samplings, self.engine.vocabulary)

    def step(self) -> list[Ended]:
        """Draws a token in every slot and takes it through the decoder; returns the finished rows."""
        rows = [row for row in self.members if row is not None]
        for row in rows:
            row.step += 1
        self.active_before = len(rows)
        streams = self.engine.streams
        with streams.phase("admit"):
            self.updates.send()
        # Nothing after a last token is used. If all rows are at theirs, it is not computed.
        fed = any(row.step < row.steps for row in rows)
        with streams.phase("decode"):
            if fed and self.recorder is not None:
                self._recorded(self.recorder)()
            else:
                # Where all rows are at the end of a line, which is not drawn, the tokens before stand in.
                drawn = self.engine.options.trace or any(row.step % row.line for row in rows)
                longest = max(row.length - row.steps + row.step for row in rows)
                self._advance(self.filters if drawn else None, fed, longest)
        self.engine.counts["forwards"] += fed
        self.engine.counts["null_steps"] += fed * self.nulls
        with streams.phase("results"):
            return self._finished()

    def _recorded(self, recorder: Recorder) -> Callable[[], None]:
        """The recording that serves the rows that are there."""
        nucleus = self.filters.nucleus
        if nucleus not in self.recorded:
            # Nothing in it may depend on how long the rows are: the capacity bounds them all.
            filters = Filters(self.engine.vocabulary, nucleus)
            work = functools.partial(self._advance, filters, True, self.cache.capacity)
            self.recorded[nucleus] = recorder(work)
        return self.recorded[nucleus]

    def _advance(self, filters: Filters | None, fed: bool, longest: int) -> None:
        """A token in every slot, drawn if there are filters; `longest` bounds the keys."""
        if filters is not None:
            self._draw(filters)
        else:
            self.taken += self.advance[: self.rows]
        if fed:
            self._feed(longest)

    def _feed(self, longest: int) -> None:
        """Takes `token` of every slot through the decoder; `longest` bounds the keys."""
        engine, model = self.engine, self.engine.model
        if engine.backend == "triton":
            decoder = model.language_model
            fed = ops.feed(
                self.token,
                engine.table,
                engine.line_end,
                self.taken,
                self.line,
                self.fed_as,
                self.advance,
                self.length,
                self.position,
                engine.frequencies,
                cast(Layer, decoder.layers[0]).input_layernorm,
            )
            ops.decode_layers(decoder, self.cache, fed, self.hidden)
            return
        x = engine.table[self.token]
        if engine.line_end is not None:
            # The last token of a line is fed like any other; then a line end is fed, not drawn.
            x = torch.where((self.taken % self.line == 0).unsqueeze(-1), engine.line_end, x)
        x = self._to_branches(x)
        positions = self.position.expand(3, -1)
        cos, sin = rope(positions, engine.frequencies, model.config.decoder.mrope_section, x.dtype)
        visible = Visible.decode(self.length + 1, longest)
        attention = BACKENDS[engine.backend](visible, model.config.decoder.num_key_value_heads, x.dtype)
        block, offset = self.length // KEY_BLOCK, self.length % KEY_BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[self.sequence, :, block, offset] = k
            values[self.sequence, :, block, offset] = v
            return attention(q.unsqueeze(1), keys, values).squeeze(1)

        self.hidden.copy_(engine.decoder(x, cos, sin, attend))
        self.length += self.advance
        self.position += self.advance

    def _draw(self, filters: Filters) -> None:
        """Puts the next token of every slot into `token`, and into its place in `tokens`."""
        engine = self.engine
        logits = self._logits()
        if engine.backend == "triton" and not (filters.nucleus or engine.options.trace):
            ops.draw(
                logits,
                self.temperature,
                self.top_k,
                self.uniform,
                self.advance,
                self.taken,
                self.token,
                self.tokens,
            )
            return
        step = self.taken.unsqueeze(1)
        uniform = self.uniform.gather(1, step).squeeze(1)
        token = sample(logits, self.temperature, self.top_k, self.top_p, uniform, filters)
        if engine.options.trace:
            forced = self.forced.gather(1, step).squeeze(1)
            token = torch.where(forced >= 0, forced, token)
            for slot, trace in self.traces.items():
                trace.append(logits[slot].clone())
        self.token.copy_(token)
        self.tokens.scatter_(1, step, token.unsqueeze(1))
        self.taken += self.advance[: self.rows]

    def _logits(self) -> Tensor:
        """Logits of every slot's next token, float32 `(rows, vocabulary)`."""
        engine, model = self.engine, self.engine.model
        if engine.task == "understand":
            assert model.lm_head is not None
            return product_in_float32(model.lm_head, self.hidden)
        if engine.backend == "triton":
            made = ops.guide(engine.head[0](self.hidden), self.cfg, self.guided_from[: self.rows])
        else:
            made = self._guide(engine.head(self.hidden))
        return product_in_float32(self.logits, made)

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

    def _finished(self) -> list[Ended]:
        ended = [row for row in self.members if row is not None and row.step == row.steps]
        self.since_check += 1
        if self.engine.stops and self.since_check >= self.STOP_CHECK:
            self.since_check = 0
            ended += [row for row in self._stopped() if row not in ended]
        if not ended:
            return []
        # All are read before one is released, since memory may run out on the way.
        taken = [self.tokens[row.slot].clone() for row in ended]
        results: list[Ended] = []
        for row, tokens in zip(ended, taken, strict=True):
            logits = None
            if self.engine.options.trace:
                logits = torch.stack(self.traces[row.slot]).cpu().numpy()[row.token_steps()]
            results.append((row, tokens, logits))
        for row in ended:
            self._release(row)
        return results

    def _stopped(self) -> list[Row]:
        """Rows that have drawn a stop token. On CUDA those of the look before: this one's flags are still on
        their way."""
        drawn = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.taken.unsqueeze(1)
        flags = to_host((torch.isin(self.tokens, self.engine.stop_ids) & drawn).any(1))
        event, members = self.engine.streams.main_event(), list(self.members)
        if event is not None:
            before, self.look = self.look, (flags, event, members)
            if before is None:
                return []
            flags, event, members = before
            event.synchronize()
        rows = [members[slot] for slot in torch.nonzero(flags).flatten().tolist()]
        return [row for row in rows if row is not None and row in self.members]

    def _release(self, row: Row) -> None:
        self.members[row.slot] = None
        self.traces.pop(row.slot, None)
        for sequence in row.sequences:
            self._stop(sequence)
        self.updates.put(self.counters, 1, row.slot, (0, 1, 1))

    def _stop(self, sequence: int) -> None:
        """Marks a sequence as unused: what it computes is ignored."""
        self.updates.put(self.places, 1, sequence, (0, 0, 0))


class MixedGroup(Group):
    """A group of rows that are guided in a part of their steps: a sequence a branch, each in any place.

    When the last guided step of a row is done, the place of its null branch is free for another row. It
    cannot begin later than its row, since guidance needs its keys from the first token on.

    Args:
        engine: The engine that the group belongs to.
    """

    def __init__(self, engine: Shared):
        super().__init__(engine, guided=False)

    def _free(self) -> list[int]:
        taken = {sequence for row in self.members if row is not None for sequence in row.sequences}
        return [sequence for sequence in range(self.rows) if sequence not in taken]

    def has_room(self, row: Row) -> bool:
        """Whether the group has a free place for each branch of a row."""
        return len(self._free()) >= len(row.prefixes)

    def _sequences(self, row: Row) -> tuple[int, ...]:
        return tuple(self._free()[: len(row.prefixes)])

    def admit(self, row: Row) -> None:
        """Puts a row into free places, its null branches too."""
        super().admit(row)
        self.updates.put(self.branches, 1, row.slot, (row.slot, row.slot))
        for null in row.sequences[1:]:
            self.updates.put(self.branches, 1, null, (row.slot, null))
            self.updates.put(self.counters, 1, null, (0, 1, 1))

    def step(self) -> list[Ended]:
        """Takes a step, in which guidance of rows may begin or end.

        Returns:
            The rows that ended.
        """
        for row in self.members:
            if row is not None and row.guided and row.step == row.guided.start:
                self.updates.put(self.branches, 1, row.slot, (row.slot, row.sequences[1]))
        finished = super().step()
        for row in self.members:
            if row is not None and row.guided and row.step == row.guided.stop:
                self._stop(row.sequences[1])
                self.updates.put(self.branches, 1, row.slot, (row.slot, row.slot))
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
        self.updates.put(self.branches, 1, sequence, (sequence, sequence))
        self.updates.put(self.counters, 1, sequence, (0, 1, 1))
