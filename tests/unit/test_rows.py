"""What crosses into and out of a replica comes out as it went in, is counted by the watch, and is served."""

import asyncio
import json
import math
import subprocess
import sys
import threading
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from wallaroo.actors import replica as replica_module
from wallaroo.actors import watch as watch_module
from wallaroo.actors.calls import Announced, Call, Encoders, RowQueue
from wallaroo.actors.replica import EXIT_DEVICE, Replica, joined
from wallaroo.actors.rows import (
    OUTCOMES,
    REQUESTS,
    Outcome,
    PictureFile,
    from_ipc,
    outcomes,
    outcomes_table,
    request_values,
    requests,
    requests_table,
    to_ipc,
)
from wallaroo.actors.watch import Limits, Watch
from wallaroo.model.checkpoint import TINY, load, load_config, load_tokenizer
from wallaroo.model.config import Size
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.requests import Request
from wallaroo.model.errors import InputError
from wallaroo.model.prompts import Prompt, generate_prompt
from wallaroo.model.sampling import Sampling

STARTED = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


def text_prompt(length):
    return Prompt(
        np.arange(length, dtype=np.int32), np.tile(np.arange(length, dtype=np.int32), (3, 1)), length
    )


def picture_prompt():
    positions = np.arange(30, dtype=np.int32).reshape(3, 10)
    return Prompt(np.arange(5, 15, dtype=np.int32), positions, 17, (4, 8), np.array([1, 2], np.int32))


def assert_same_prompt(found, wanted):
    if wanted is None:
        assert found is None
        return
    assert found.ids.dtype == found.positions.dtype == np.int32
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.positions, wanted.positions)
    assert (found.next_position, found.semantic) == (wanted.next_position, wanted.semantic)
    if wanted.pixel is None:
        assert found.pixel is None
    else:
        np.testing.assert_array_equal(found.pixel, wanted.pixel)


def test_requests_come_out_as_they_went_in():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    semantic = np.zeros((28, 56, 3), np.uint8)
    wanted = [
        Request("a", text_prompt(7), text_prompt(3), Size(32, 48), 2**63 - 1, Sampling(3.5, 0.25, 17, 0.5)),
        Request("b", text_prompt(1), None, Size(16, 16), 0, Sampling(1.0, 1.0, 0, 1.0)),
        Request(
            "c", picture_prompt(), picture_prompt(), None, 5, Sampling(), semantic, pixels, max_new_tokens=9
        ),
    ]
    table = requests_table(
        request_values(
            row,
            one.prompt,
            one.null,
            one.size,
            one.seed,
            vars(one.sampling),
            one.semantic,
            one.pixels,
            one.max_new_tokens,
        )
        for row, one in zip((0, 2, 5), wanted, strict=True)
    )
    table = from_ipc(to_ipc(table))
    assert table.schema == REQUESTS
    assert table.column("row").to_pylist() == [0, 2, 5]
    found = requests(table, ["a", "b", "c"])
    for one, other in zip(found, wanted, strict=True):
        assert_same_prompt(one.prompt, other.prompt)
        assert_same_prompt(one.null, other.null)
        assert (one.key, one.size, one.seed, one.sampling) == (
            other.key,
            other.size,
            other.seed,
            other.sampling,
        )
        assert one.max_new_tokens == other.max_new_tokens
        for name in ("semantic", "pixels"):
            image, wanted_image = getattr(one, name), getattr(other, name)
            assert (image is None) == (wanted_image is None)
            if image is not None:
                np.testing.assert_array_equal(image, wanted_image)
    with pytest.raises(ValueError):
        requests(table, ["a", "b"])


def test_outcomes_come_out_as_they_went_in():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    tokens = np.array([5, 0, 7], np.int32)
    wanted = [
        Outcome(3, STARTED, 1.5, pixels=pixels, tokens=tokens, finish_reason="length", prompt_tokens=40),
        Outcome(0, STARTED, 0.25, error_type="engine", error_message='too "large"'),
        Outcome(1, STARTED, 2.5, tokens=tokens, file=PictureFile(16, 32, b"encoded")),
    ]
    table = from_ipc(to_ipc(outcomes_table(wanted)))
    assert table.schema == OUTCOMES
    first, second, third = outcomes(table)
    np.testing.assert_array_equal(first.pixels, pixels)
    np.testing.assert_array_equal(first.tokens, tokens)
    assert (first.row, first.started_at, first.seconds) == (3, STARTED, 1.5)
    assert (first.error_type, first.finish_reason, first.prompt_tokens) == ("", "length", 40)
    assert (second.row, second.error_type, second.error_message) == (0, "engine", 'too "large"')
    assert second.pixels is None and len(second.tokens) == 0
    assert third.file == PictureFile(16, 32, b"encoded") and third.pixels is None and first.file is None


def test_no_requests_and_no_outcomes_have_the_same_schemas():
    assert from_ipc(to_ipc(requests_table([]))).schema == REQUESTS
    assert from_ipc(to_ipc(outcomes_table([]))).schema == OUTCOMES


# The watch


def test_the_watch_counts_rows_once():
    watch = Watch()
    watch.note_up("a")
    assert watch.note_start("a", 4, [0, 1, 3]).attempt == 1
    watch.note_done("a", [(4, 0, True), (4, 1, False)])
    watch.note_done("a", [(4, 0, True), (9, 0, True)])
    counts = watch.counts()
    assert (counts.rows, counts.errors, counts.replicas, counts.deaths) == (2, 1, 1, 0)
    watch.note_done("a", [(4, 3, True)])
    assert watch.counts().rows == 3
    # A finished shard whose answer was lost is made again, and counted anew.
    assert watch.note_start("a", 4, [0, 1, 3]).attempt == 2
    assert watch.counts().rows == 0


def test_the_watch_learns_of_a_death_from_the_shards_that_go_to_another_replica():
    watch = Watch()
    for replica in ("a", "b"):
        watch.note_up(replica)
    watch.note_start("a", 0, [0, 1])
    watch.note_start("a", 1, [0])
    watch.note_start("b", 2, [0])
    watch.note_done("a", [(0, 0, True)])
    assert watch.note_start("b", 0, [0, 1]).attempt == 2
    assert watch.note_start("b", 1, [0]).attempt == 2
    watch.note_done("a", [(0, 1, True)])
    counts = watch.counts()
    assert (counts.rows, counts.replicas, counts.deaths, counts.fruitless) == (0, 1, 1, 1)
    assert watch.note_start("c", 1, [0]).attempt == 3
    assert (watch.counts().fruitless, watch.counts().deaths) == (2, 2)


def test_the_watch_keeps_what_a_replica_said_before_it_ended():
    watch = Watch()
    watch.note_death("a", "CUDA error")
    counts = watch.counts()
    assert (counts.last_death, counts.deaths, counts.replicas) == ("CUDA error", 1, 0)


class Lives:
    """Replicas after one another, each with shard 0 of four rows, which die at the same row."""

    def __init__(self):
        self.watch, self.number = Watch(), 0

    def die(self, at_work, given_back=(), alone=False):
        """One life, and what the next one is told at its start."""
        name, after = f"r{self.number}", f"r{self.number + 1}"
        self.number += 1
        for replica in (name, after):
            self.watch.note_up(replica)
        if self.number == 1:
            self.watch.note_start(name, 0, [0, 1, 2, 3])
        if given_back:
            self.watch.note_in_flight(name, [(0, row) for row in given_back])
            self.watch.note_done(name, [(0, row, True) for row in given_back])
        self.watch.note_in_flight(name, [(0, row) for row in at_work], alone)
        return self.watch.note_start(after, 0, [0, 1, 2, 3])


def test_a_row_that_kills_its_replica_twice_alone_is_lethal_and_its_neighbours_are_not():
    lives = Lives()
    assert lives.die([0, 1]).suspects == {}
    assert lives.die([0, 1]).suspects == {0: 0, 1: 0}
    assert lives.die([1], [0, 2], alone=True).suspects == {0: 0, 1: 1}
    told = lives.die([1], [0, 2], alone=True)
    assert (told.suspects, list(told.lethal)) == ({0: 0}, [1])
    # What happened until then led to something.
    assert lives.watch.counts().fruitless == 0 and lives.watch.counts().deaths == 4


def test_a_device_that_makes_no_row_at_all_blames_none():
    lives = Lives()
    lives.die([0, 1, 2, 3])
    lives.die([0, 1, 2, 3])
    for row in (3, 2, 1, 0):
        told = lives.die([row], alone=True)
    assert not told.lethal
    # The run is stopped by its count.
    assert lives.watch.counts().fruitless == 6
    # Two good rows between, and the device is cleared.
    lives.die([3], [0, 1], alone=True)
    assert lives.die([3], [0, 1], alone=True).lethal == [3]


def test_a_stopping_run_begins_no_shard():
    watch = Watch()
    watch.note_start("a", 0, [0])
    watch.stop()
    assert watch.note_start("a", 1, [0]).stopping
    assert watch.counts().held == 1
    watch.note_done("a", [(0, 0, True)])
    assert (watch.counts().held, watch.counts().finished) == (0, 1)


def test_no_shard_begins_while_many_are_unwritten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Watch(Limits(shards=3, seconds=20))
    assert not watch.note_start("a", 0, [0]).wait
    watch.note_done("a", [(0, 0, True)])
    assert not watch.note_start("a", 1, [0]).wait
    assert watch.note_start("a", 2, [0]).wait
    # What was begun goes on elsewhere, and what was lost is made again.
    assert not watch.note_start("b", 1, [0]).wait
    assert not watch.note_start("b", 0, [0]).wait
    watch.note_done("b", [(0, 0, True)])
    watch.note_written(7)  # the plan had refused all of it
    assert watch.note_start("a", 2, [0]).wait
    watch.note_written(0)
    assert not watch.note_start("a", 2, [0]).wait
    assert watch.note_start("a", 3, [0]).wait
    now[0] = 20.0
    assert watch.note_start("a", 3, [0]).wait
    now[0] = 20.1
    assert not watch.note_start("a", 3, [0]).wait


def test_no_shard_begins_while_too_many_rows_are_errors():
    watch = Watch(Limits(error_rate=0.5, least_rows=2))
    watch.note_start("a", 0, [0, 1, 2, 3])
    watch.note_done("a", [(0, 0, False)])
    assert not watch.note_start("a", 1, [0]).wait
    watch.note_done("a", [(0, 1, False)])
    assert watch.note_start("a", 2, [0]).wait
    watch.note_done("a", [(0, 2, True), (0, 3, True)])
    assert not watch.note_start("a", 2, [0]).wait


# Rows on their way through a replica


class Row(NamedTuple):
    """In place of a row of a call."""

    name: str


def test_a_suspect_keeps_the_engine_to_itself_until_it_is_given_back():
    rows = RowQueue(given_back=True)
    suspect, other = Row("suspect"), Row("other")
    rows.put(other, None)
    rows.put(suspect, 1)
    assert rows.take(8, idle=False) == ([], False)
    assert rows.take(8, idle=True) == ([suspect], True)
    # No other suspect is left, and still nothing keeps it company.
    assert rows.take(8, idle=False) == ([], False)
    assert rows.take(8, idle=True) == ([other], False)


def test_suspects_come_last_until_a_row_was_given_back():
    rows = RowQueue()
    for name, deaths in (("a", None), ("worse", 2), ("bad", 0), ("b", None)):
        rows.put(Row(name), deaths)
    assert rows.take(1, idle=True) == ([Row("a")], False)
    rows.given_back = True
    assert [rows.take(9, idle=True) for _ in range(3)] == [
        ([Row("bad")], True),
        ([Row("worse")], True),
        ([Row("b")], False),
    ]


def test_the_engine_gets_rows_in_order_and_only_when_the_watch_knows_of_them():
    announced, first, second = Announced(), Future(), Future()
    announced.add([Row("a"), Row("b")], first)
    announced.add([Row("c")], second)
    assert announced.take(block=False) == [] and announced.rows == 3
    second.set_result(None)
    assert announced.take(block=False) == []
    threading.Timer(0.05, first.set_result, [None]).start()
    assert announced.take(block=True) == [Row("a"), Row("b"), Row("c")] and announced.rows == 0
    announced.add([Row("d")], None)
    assert announced.take(block=False) == [Row("d")]
    lost = Future()
    lost.set_exception(RuntimeError("the watch is gone"))
    announced.add([Row("e")], lost)
    with pytest.raises(RuntimeError, match="is gone"):
        announced.take(block=False)


def test_pictures_are_encoded_as_far_as_there_is_room_and_none_is_lost():
    pixels = np.zeros((4, 4, 3), np.uint8)
    free = threading.Event()

    def encode(row, pixels):
        assert free.wait(60)
        if row == 1:
            raise MemoryError("no room")
        return PictureFile(*pixels.shape[:2], b"file of row %d" % row)

    async def ask():
        encoders = Encoders(1, most_bytes=2 * pixels.nbytes)
        call = Call(0, [0, 1, 2, 3], asyncio.get_running_loop(), encode)
        for row in range(3):
            encoders.give_back(call, Outcome(row, STARTED, 0.5, pixels=pixels))
        encoders.give_back(call, Outcome(3, STARTED, 0.5, error_type="engine"))
        free.set()
        await call.finished
        # What was encoded makes room again.
        other = Call(0, [4], asyncio.get_running_loop(), encode)
        encoders.give_back(other, Outcome(4, STARTED, 0.5, pixels=pixels))
        await other.finished
        return call.outcomes + other.outcomes

    found = {one.row: one for one in asyncio.run(ask())}
    assert found[0].file == (4, 4, b"file of row 0") and found[0].pixels is None
    assert found[1].pixels is pixels and found[2].pixels is pixels
    assert found[1].file is None and found[2].file is None
    assert found[3].error_type == "engine" and found[4].file.data == b"file of row 4"


def test_a_round_of_notes_counts_what_is_done_before_what_is_new():
    watch = Watch()
    for replica in ("a", "b"):
        watch.note_up(replica)
    watch.note_start("a", 0, [0, 1, 2])
    watch.note_rows("a", [], [(0, 0), (0, 1)])
    watch.note_rows("a", [(0, 0, True)], [(0, 2)])
    assert watch.counts().rows == 1
    # Rows 1 and 2 have seen this death, row 0 has not.
    watch.note_start("b", 0, [0, 1, 2])
    watch.note_rows("b", [], [(0, 1), (0, 2)])
    watch.note_up("c")
    assert watch.note_start("c", 0, [0, 1, 2]).suspects == {1: 0, 2: 0}


def test_with_many_replicas_each_asks_less_often():
    for replicas, seconds in ((2, 0.1), (128, 0.64)):
        watch = Watch(Limits(shards=1))
        for number in range(replicas):
            watch.note_up(f"r{number}")
        assert watch.note_start("r0", 0, [0]).wait == seconds


# The replica, without Ray


SIZES = [Size(*size) for size in load_config(TINY).sizes.values()]


def shard(number, rows):
    """A Ray row with requests for pictures of several sizes, and what an engine alone must be asked."""
    config, tokenizer = load_config(TINY), load_tokenizer(TINY)
    values, alone = [], []
    for row in rows:
        size = min(SIZES, key=lambda size: size.height * size.width) if row % 2 else SIZES[0]
        prompt = generate_prompt(tokenizer, config, f"thing {row} of shard {number}", size, "en")
        null = generate_prompt(tokenizer, config, "", size, "en")
        seed = 100 * number + row
        values.append(request_values(row, prompt, null, size, seed, vars(Sampling())))
        alone.append(Request((number, row), prompt, null, size, seed, Sampling()))
    return {"shard": number, "plan": b"p", "requests": to_ipc(requests_table(values))}, alone


@pytest.mark.numerics
def test_a_replica_gives_every_row_back_once_as_an_engine_alone_makes_it():
    replica = Replica(lambda: TINY, device="cpu", options={"slots": 16})
    rows, alone = zip(shard(7, [0, 1, 4]), shard(8, [2]), shard(9, []), strict=True)

    async def ask():
        return await asyncio.gather(*(replica(row) for row in rows))

    answers = asyncio.run(ask())
    engine = Engine(load(TINY, "generate"), "generate")
    wanted = {result.key: result for result in engine.run([one for shard in alone for one in shard])}
    assert [answer["shard"] for answer in answers] == [7, 8, 9]
    for answer, requested in zip(answers, alone, strict=True):
        assert answer["plan"] == b"p" and "requests" not in answer
        assert answer["replica"] == replica.name and answer["attempts"] == 1
        found = outcomes(from_ipc(answer["outcomes"]))
        assert sorted(one.row for one in found) == [request.key[1] for request in requested]
        for one in found:
            result = wanted[answer["shard"], one.row]
            np.testing.assert_array_equal(one.tokens, result.tokens)
            np.testing.assert_array_equal(one.pixels, result.pixels)
            assert one.prompt_tokens == result.prompt_tokens and not one.error_type


class Reply:
    """What Ray gives for a call of an actor, with the reply in it."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        return self.value
        yield

    def future(self):
        future = Future()
        future.set_result(self.value)
        return future


class Told:
    """A watch that is called as an actor is, and its notes of rows."""

    def __init__(self):
        self.watch, self.notes, self.turn = Watch(), [], threading.Lock()

    def __getattr__(self, name):
        def remote(*arguments):
            with self.turn:
                if name == "note_rows":
                    self.notes.append(arguments)
                return Reply(getattr(self.watch, name)(*arguments))

        return SimpleNamespace(remote=remote)


def test_a_replica_tells_of_many_rows_at_once_and_of_all_before_it_gives_their_shard_back(monkeypatch):
    monkeypatch.setattr(replica_module, "NOTE_SECONDS", math.inf)
    told, shards = Told(), 3
    keys = {(number, row) for number in range(shards) for row in range(1, 25, 2)}
    filled, turn = threading.Event(), Replica._turn
    # All rows are there before the engine's first step, whatever else the machine does.
    monkeypatch.setattr(Replica, "_turn", lambda *given: (filled.wait(), turn(*given)))
    replica = Replica(lambda: TINY, device="cpu", options={"slots": 2}, watch=told)

    async def made(number):
        await replica(shard(number, range(1, 25, 2))[0])
        return number, {key for key in told.watch._done}

    async def ask():
        asked = asyncio.gather(*map(made, range(shards)))
        while replica._inbox.qsize() < len(keys) and not asked.done():
            await asyncio.sleep(0)
        filled.set()
        return await asked

    for number, finished in asyncio.run(ask()):
        assert number in finished
    begun, done = [], []
    for _, rows, in_flight, _ in told.notes:
        done += [(number, row) for number, row, ok in rows if ok]
        assert set(done) <= set(begun)
        begun += in_flight
    assert sorted(begun) == sorted(done) == sorted(keys)
    # With a note for each row they would be as many; each end of a shard has one of its own.
    assert len(told.notes) <= len(keys) / replica_module.NOTE_ROWS + shards + 3


def test_a_replica_encodes_its_pictures_as_the_call_wants_them():
    def encoder(row):
        def encode(position, pixels):
            return PictureFile(*pixels.shape[:2], row["plan"] + bytes([position]) + pixels.tobytes())

        return encode

    row, (_, alone) = shard(7, [0, 1])
    encodes, plain = (Replica(lambda: TINY, device="cpu", encoder=one) for one in (encoder, None))
    encoded, raw = (
        {one.row: one for one in outcomes(from_ipc(asyncio.run(replica(row))["outcomes"]))}
        for replica in (encodes, plain)
    )
    assert encoded.keys() == raw.keys() == {0, 1}
    for position, one in encoded.items():
        pixels = raw[position].pixels
        assert one.pixels is None and raw[position].file is None
        assert one.file == (*pixels.shape[:2], b"p" + bytes([position]) + pixels.tobytes())
    assert encoded[1].file.height == alone.size.height


def test_rows_made_before_and_after_a_group_became_smaller_name_both_shapes():
    shapes = {"group_rows": 128, "attention": "triton"}
    before, after = (
        json.dumps({"device": "H200", "threads": 1, "shapes": shapes | {"group_rows": rows}})
        for rows in (128, 64)
    )
    assert joined(before, before) == before and joined(after, after) == after
    both = json.loads(joined(before, after))
    assert both["shapes"] == {"group_rows": "128, then 64", "attention": "triton"}
    assert (both["device"], both["threads"]) == ("H200", 1)


def test_a_replica_names_the_shape_that_its_engine_has_after_memory_ran_out():
    class Lacks(Replica):
        """Its device has no memory for the first decode step."""

        def _turn(self, engine):
            prefill, self.lacked = engine.prefill.step, False

            def step(*args, **kwargs):
                if not self.lacked:
                    self.lacked = True
                    raise torch.OutOfMemoryError("tried to allocate too much")
                return prefill(*args, **kwargs)

            engine.prefill.step = step
            super()._turn(engine)

    replica = Lacks(lambda: TINY, device="cpu", options={"slots": 4, "group_rows": 4, "smaller": (2,)})
    with pytest.warns(RuntimeWarning, match="a group has 2 rows now"):
        first = asyncio.run(replica(shard(1, [0, 1, 2])[0]))
    second = asyncio.run(replica(shard(2, [0])[0]))
    rows = [json.loads(answer["environment"])["shapes"]["group_rows"] for answer in (first, second)]
    assert rows == ["4, then 2", 2]
    assert len(outcomes(from_ipc(first["outcomes"]))) == 3


def test_a_row_that_the_engine_refuses_is_an_error_row_beside_good_ones():
    replica = Replica(lambda: TINY, device="cpu")
    row, _ = shard(1, [0, 1])
    table = from_ipc(row["requests"])
    bad = table.set_column(table.schema.get_field_index("cfg"), "cfg", [[-1.0, 3.0]]).cast(REQUESTS)
    answer = asyncio.run(replica({**row, "requests": to_ipc(bad)}))
    found = {one.row: one for one in outcomes(from_ipc(answer["outcomes"]))}
    assert "cfg is -1.0" in found[0].error_message and found[0].error_type == "engine"
    assert not found[1].error_type and found[1].pixels is not None


def test_a_checkpoint_that_cannot_be_used_stops_the_run_and_not_the_process(tmp_path):
    replica = Replica(lambda: tmp_path, device="cpu")
    with pytest.raises(InputError, match="not a checkpoint"):
        asyncio.run(replica(shard(0, [0])[0]))


def test_a_broken_engine_ends_the_process():
    program = """
import asyncio
from wallaroo.actors.replica import Replica
from wallaroo.model.checkpoint import TINY

class Breaks(Replica):
    def _turn(self, engine):
        engine.step = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: unspecified launch failure"))
        super()._turn(engine)

from tests.unit.test_rows import shard
asyncio.run(Breaks(lambda: TINY, device="cpu")(shard(0, [0])[0]))
print("still here")
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == EXIT_DEVICE
    assert "unspecified launch failure" in ended.stderr and "still here" not in ended.stdout
