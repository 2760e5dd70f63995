"""The Triton kernels against the plain code, on a CPU.

Run with `TRITON_INTERPRET=1 pytest tests/unit/interpreted_kernels.py`. pytest does not collect it by itself,
since Triton reads the variable when it is first imported, and other tests need the compiler. All is float32,
since the interpreter multiplies bfloat16 wrongly.
"""

import itertools

import pytest
import torch
from torch import Tensor

from wallaroo.model.attention import KEY_BLOCK, BlockAttention, Visible
from wallaroo.model.config import DecoderConfig
from wallaroo.model.cuda import ops
from wallaroo.model.cuda.operators import OPERATORS
from wallaroo.model.cuda.steps import DRAW_BLOCK
from wallaroo.model.decoder import Decoder, rope, rope_frequencies
from wallaroo.model.kv_cache import KVCache

HIDDEN, WIDE = 3584, 18944
HEADS = {"7B": (28, 4, 128), "tiny": (4, 2, 32)}
ENDS = 1.0 - 2**-53
"""The largest number below 1 that is drawn."""


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def both(name, *args):
    """The arguments after the plain code had them, and after the kernels had them."""
    operator = OPERATORS[f"wallaroo::{name}"]
    results = []
    for function in operator.plain, operator.launch:
        given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        function(*given)
        results.append(given)
    return results


def assert_equal(plain, launched, tolerance=1e-5):
    for one, other in zip(plain, launched, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
        elif isinstance(one, Tensor):
            assert other.tolist() == one.tolist()


def layer(rows, blocks, kv_heads, dim):
    """Keys or values of one layer as they lie on a GPU."""
    return torch.randn(rows, kv_heads, blocks, KEY_BLOCK, dim)


def unread(cached, limits):
    """The same with NaN from each row's limit on: whoever reads there gets NaN."""
    places = torch.arange(cached.shape[2] * KEY_BLOCK).view(-1, KEY_BLOCK, 1)
    return torch.where(places >= limits.view(-1, 1, 1, 1, 1), float("nan"), cached)


# -- attention ------------------------------------------------------------------------------------------


def step(seen, heads, kv_heads, dim, blocks):
    """Arguments of `attend` for sequences of so many keys."""
    seen = torch.tensor(seen)
    n = len(seen)
    angles = torch.rand(n, dim // 2) * 7
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim)
    keys, values = (layer(n, blocks, kv_heads, dim) for _ in range(2))
    return [qkv, angles.cos(), angles.sin(), seen, keys, values, torch.full((n, heads * dim), float("nan"))]


@pytest.mark.parametrize("model", HEADS)
def test_attend(model):
    given = step([577, 0, 257, 256, 1, 65, 640], *HEADS[model], blocks=10)
    assert_equal(*both("attend", *given))


def test_attention_in_half_precision():
    """Of float16, which the interpreter multiplies rightly: as near to float32 as its own rounding allows."""
    heads, _, dim = HEADS["7B"]
    given = [
        one.half() if one.is_floating_point() else one for one in step([290, 70], *HEADS["7B"], blocks=5)
    ]
    exact = [one.float() if one.is_floating_point() else one for one in given]
    _, launched = both("attend", *given)
    plain, _ = both("attend", *exact)
    for one, other in zip(launched[-3:], plain[-3:], strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one.float(), other, rtol=2e-3, atol=2e-3)

    limits, q = torch.tensor([[60, 61], [7, 8]]), torch.randn(2, 2, heads, dim).half()
    more = given[4], given[5], torch.tensor([0, 1]), limits, 64
    made = both("cache_attention", q, *more, torch.empty(2, 2, heads * dim).half())[1][-1]
    keys, values, *rest = more
    expected = torch.empty(2, 2, heads * dim)
    expected = both("cache_attention", q.float(), keys.float(), values.float(), *rest, expected)[0][-1]
    torch.testing.assert_close(made.float(), expected, rtol=2e-3, atol=2e-3)


def test_attend_reads_and_writes_keys_that_are_there_alone():
    given = step([130, 0, 300], *HEADS["7B"], blocks=6)
    plain, _ = both("attend", *given)
    seen = given[3]
    for cached in 4, 5:
        # The new token's own place, too, is written only.
        given[cached] = unread(given[cached], (seen - 1).clamp(min=0))
    _, launched = both("attend", *given)
    torch.testing.assert_close(launched[-1], plain[-1], rtol=1e-5, atol=1e-5)
    assert launched[-1][1].eq(0).all()
    for cached in 4, 5:
        expected = unread(plain[cached], seen)
        torch.testing.assert_close(launched[cached], expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_attend_gives_a_row_the_same_bits_alone_and_in_company_at_any_capacity():
    attend = OPERATORS["wallaroo::attend"].launch
    *given, keys, values, out = step([300, 3, 0, 527], *HEADS["7B"], blocks=9)
    alone: dict[int, list[Tensor]] = {}
    for chosen, blocks in ([0], 9), ([1], 9), ([3], 9), ([3, 2, 0, 1], 9), ([1, 0, 3, 1, 2, 3], 13):
        cached = [torch.zeros(len(chosen), 4, blocks, KEY_BLOCK, 128) for _ in range(2)]
        for copy, source in zip(cached, (keys, values), strict=True):
            copy[:, :, :9] = source[chosen]
        made = out[chosen]
        attend(*(one[chosen] for one in given), *cached, made)
        for at, row in enumerate(chosen):
            results = [made[at], *(copy[at, :, :9] for copy in cached)]
            first = alone.setdefault(row, results)
            assert all(torch.equal(one, other) for one, other in zip(first, results, strict=True))


@pytest.mark.parametrize(("model", "tokens"), [("7B", 16), ("7B", 21), ("tiny", 8), ("tiny", 1)])
def test_cache_attention(model, tokens):
    heads, kv_heads, dim = HEADS[model]
    limits = torch.tensor([0, 60, 120])[:, None] + torch.arange(1, tokens + 1)
    limits[1, tokens // 2 :] = 0  # nothing to see
    rows = torch.tensor([2, 0, 2])
    q = torch.randn(3, tokens, heads, dim)
    keys, values = (layer(3, 3, kv_heads, dim) for _ in range(2))
    assert_equal(
        *both("cache_attention", q, keys, values, rows, limits, 192, torch.empty(3, tokens, heads * dim))
    )


def test_cache_attention_of_a_run_is_the_same_in_any_company_and_reads_only_its_keys():
    heads, kv_heads, dim = HEADS["7B"]
    launch = OPERATORS["wallaroo::cache_attention"].launch
    limits = torch.tensor([0, 77])[:, None] + torch.arange(1, 18)
    keys, values = (unread(layer(2, 2, kv_heads, dim), limits[:, -1]) for _ in range(2))
    q = torch.randn(2, 17, heads, dim)
    made = torch.empty(2, 17, heads * dim)
    launch(q, keys, values, torch.arange(2), limits, 128, made)
    assert made.isfinite().all()
    alone = torch.empty(1, 17, heads * dim)
    wide = [torch.cat((torch.zeros(3, *one.shape[1:]), one)).repeat(1, 1, 2, 1, 1) for one in (keys, values)]
    for run in range(2):
        launch(q[[run]], *wide, torch.tensor([3 + run]), limits[[run]], 256, alone)
        assert torch.equal(alone[0], made[run])


@pytest.mark.parametrize("model", HEADS)
def test_rotate_and_store(model):
    heads, kv_heads, dim = HEADS[model]
    qkv, angles = torch.randn(5, (heads + 2 * kv_heads) * dim), torch.rand(5, 1, dim // 2) * 7
    keys, values = (layer(3, 2, kv_heads, dim) for _ in range(2))
    rows, places = torch.tensor([0, 0, 2, 2, 1]), torch.tensor([0, 1, 63, 64, 127])
    given = (qkv, angles.cos(), angles.sin(), keys, values, rows, places)
    plain, launched = both("rotate_and_store", *given, torch.empty(5, heads, dim))
    assert_equal(plain, launched, 1e-6)
    assert not torch.equal(launched[3], keys)


# -- rows -----------------------------------------------------------------------------------------------


def row_arguments(size):
    """Of operators that take each row by itself: arguments with a row a row, other ones, the output."""
    weight = torch.rand(size) + 0.5
    x, residual, wide = torch.randn(4, size), torch.randn(4, size) * 30, torch.randn(4, 2 * size) * 3
    return {
        "rms_norm": ([x], [weight, 1e-6], torch.empty(4, size)),
        "add_rms_norm": ([residual, x], [weight, 1e-6], torch.empty(4, size)),
        "swiglu": ([wide], [], torch.empty(4, size)),
    }


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("rms_norm", HIDDEN),
        ("rms_norm", 130),
        ("add_rms_norm", HIDDEN),
        ("add_rms_norm", 130),
        ("swiglu", WIDE),
        ("swiglu", 1025),
    ],
)
def test_rows(name, size):
    rows, shared, out = row_arguments(size)[name]
    plain, launched = both(name, *rows, *shared, out)
    assert_equal(plain, launched)
    for row in range(4):
        alone = both(name, *(one[[row]] for one in rows), *shared, out[[row]])[1]
        assert torch.equal(alone[-1][0], launched[-1][row])
        assert torch.equal(alone[0][0], launched[0][row])


@pytest.mark.parametrize("size", [HIDDEN, 100])
def test_guide(size):
    hidden, cfg = torch.randn(6, size) * 2, torch.tensor([[3.0], [7.5], [1.5]])
    null_of = torch.tensor([4, 1, 5])  # the second is not guided
    plain, launched = both("guide", hidden, cfg, null_of, torch.empty(3, size))
    assert_equal(plain, launched)
    alone = both("guide", hidden[[0, 4]], cfg[[0]], torch.tensor([1]), torch.empty(1, size))[1]
    assert torch.equal(alone[-1][0], launched[-1][0])


# -- pictures -------------------------------------------------------------------------------------------


def pictures(pixels, channels):
    """Arguments of `group_norm` for two pictures whose channels are far from 0."""
    x = torch.randn(2, pixels, channels) * 2 + torch.randn(channels) * 100
    return x, torch.rand(channels) + 0.5, torch.randn(channels), 32, 1e-6, True, torch.empty_like(x)


def test_group_norm():
    for pixels, channels in (600, 128), (130, 512):
        x, *rest, out = pictures(pixels, channels)
        exact = torch.nn.functional.group_norm(x.double().mT, 32, *(one.double() for one in rest[:2]), 1e-6)
        plain, launched = both("group_norm", x, *rest, out)
        assert_equal(plain, launched)
        expected = torch.nn.functional.silu(exact).mT
        torch.testing.assert_close(launched[-1].double(), expected, rtol=1e-5, atol=1e-5)


def test_group_norm_of_a_picture_is_the_same_in_any_company():
    x, *rest, out = pictures(70, 256)
    _, launched = both("group_norm", x, *rest, out)
    alone = both("group_norm", x[[1]], *rest, out[[1]])[1]
    assert torch.equal(alone[-1][0], launched[-1][1])


@pytest.mark.parametrize("swish", [True, False])
def test_group_norm_of_a_layer(swish):
    norm = torch.nn.GroupNorm(4, 24)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=torch.channels_last)
    made, expected = ops.group_norm(norm, x, swish), norm(x)
    torch.testing.assert_close(made, torch.nn.functional.silu(expected) if swish else expected)
    assert made.stride() == x.stride()


# -- from step to step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "no lines"])
@pytest.mark.parametrize(("size", "half"), [(HIDDEN, 64), (96, 16)])
def test_feed(size, half, lines):
    n = 6
    token, taken, line = torch.tensor([3, 0, 18]), torch.tensor([33, 34, 66]), torch.tensor([33, 33, 33])
    fed_as, advance = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 0, 1, 1, 0])
    length, position = torch.tensor([5, 64, 0, 1063, 9, 0]), torch.tensor([5, 64, 0, 2063, 9, 0])
    frequencies = rope_frequencies(DecoderConfig(hidden_size=2 * half, num_attention_heads=1))
    table, end, weight = torch.randn(19, size), torch.randn(size), torch.rand(size) + 0.5
    outs = [torch.empty(n, size), torch.empty(n, size), torch.empty(n, half), torch.empty(n, half)]
    given = [token, table, end if lines else None, taken, line, fed_as, advance, length, position]
    seen = torch.empty(n, dtype=torch.int64)
    plain, launched = both("feed", *given, frequencies, weight, 1e-6, *outs, seen)
    assert_equal(plain, launched)
    assert launched[-1].tolist() == [6, 65, 0, 1064, 10, 0]
    assert torch.equal(launched[12][0], end if lines else table[3])


def draw(logits, temperature, top_k, uniform):
    """Arguments of `draw` for rows that are at different steps, 5 in all."""
    rows = len(logits)
    taken = torch.arange(rows) % 5
    numbers = torch.rand(rows, 5, dtype=torch.float64)
    numbers[torch.arange(rows), taken] = torch.as_tensor(uniform, dtype=torch.float64)
    noted, advance = torch.full((rows, 5), -1), torch.arange(rows + 1) % 2
    ks = torch.as_tensor(top_k).expand(rows).clone()
    heat = torch.as_tensor(temperature, dtype=torch.float32).expand(rows).clone()
    return logits, heat, ks, numbers, advance, taken, torch.zeros(rows, dtype=torch.int64), noted


def cases(vocabulary):
    """Every pair of a top_k and a temperature, and uniform numbers from end to end."""
    ks = 0, 1, 2, 7, vocabulary // 2, vocabulary - 1, vocabulary, vocabulary + 9, 2**31
    pairs = list(itertools.product(ks, (0.0, 1e-6, 0.3, 1.0, 2.5)))
    ends = torch.linspace(0, 1, len(pairs), dtype=torch.float64).clamp(max=ENDS)
    return len(pairs), *(torch.tensor(column) for column in zip(*pairs, strict=True)), ends


@pytest.mark.parametrize("vocabulary", [3, 1000, 4097])
@pytest.mark.parametrize("step", [None, 0.5], ids=["all differ", "many ties"])
def test_draw(vocabulary, step):
    rows, top_k, temperature, uniform = cases(vocabulary)
    logits = torch.randn(rows, vocabulary) * 3
    if step:
        logits = (logits / step).round() * step  # with zeros of both signs
    assert_equal(*both("draw", *draw(logits, temperature, top_k, uniform)))


@pytest.mark.parametrize("vocabulary", [16384, 152064])
def test_draw_from_the_vocabularies_of_the_7b(vocabulary):
    logits = torch.randn(3, vocabulary) * 2
    logits[0, ::7] = float("-inf")
    assert_equal(*both("draw", *draw(logits, 0.9, torch.tensor([1000, 1, 40]), [0.7, 0.1, 0.999])))


def test_draw_finds_the_last_token_kept_at_any_top_k():
    """Logits fall, and all are about as likely, so the last token kept is drawn at the end."""
    powers = 2.0 ** torch.arange(20, -21, -1)
    logits = torch.cat((powers, torch.zeros(1), -powers.flip(0)))
    count = len(logits)
    given = draw(logits.repeat(count - 2, 1), 1e9, torch.arange(2, count), ENDS)
    plain, launched = both("draw", *given)
    assert_equal(plain, launched)
    assert launched[6].tolist() == list(range(1, count - 1))


def test_draw_at_a_border_takes_the_token_behind_it():
    given = draw(torch.zeros(8, 8), 1.0, 0, torch.arange(8) / 8)
    plain, launched = both("draw", *given)
    assert_equal(plain, launched)
    assert launched[6].tolist() == list(range(8))


def test_greedy_draw_takes_the_first_of_equals():
    logits = torch.zeros(1, 3 * DRAW_BLOCK)
    logits[0, 100::DRAW_BLOCK] = 1.0
    _, launched = both("draw", *draw(logits, 1.0, 1, 0.9))
    assert launched[6].tolist() == [100]


def test_draw_keeps_every_tie_with_the_last_token_kept():
    logits = torch.tensor([-1.5, 2.0, -1.5, 0.0, 7.0, -0.0, -1.5, -9.0])
    for top_k, kept in (
        (1, {4}),
        (2, {1, 4}),
        (3, {1, 3, 4, 5}),
        (4, {1, 3, 4, 5}),
        (5, {0, 1, 2, 3, 4, 5, 6}),
    ):
        uniform = torch.linspace(0, ENDS, 16, dtype=torch.float64)
        given = draw(logits.repeat(16, 1), 9.0, top_k, uniform)
        plain, launched = both("draw", *given)
        assert_equal(plain, launched)
        assert set(launched[6].tolist()) == kept


def test_draw_of_a_row_is_the_same_in_any_company():
    rows, top_k, temperature, uniform = cases(500)
    given = draw(torch.randn(rows, 500), temperature, top_k, uniform)
    _, launched = both("draw", *given)
    for row in 4, 17, 33:
        alone = both("draw", *(one[[row]] for one in given))[1]
        assert alone[6] == launched[6][row] and alone[7].tolist() == launched[7][[row]].tolist()


def test_a_row_that_has_no_room_for_a_token_writes_none():
    *given, taken, token, _ = draw(torch.randn(2, 50), 1.0, 9, 0.5)
    taken[1] = 5
    guarded = torch.full((3, 5), -1)
    OPERATORS["wallaroo::draw"].launch(*given, taken, token, guarded[:2])
    assert guarded[1:].eq(-1).all() and guarded[0, 0] >= 0


# -- forwards -------------------------------------------------------------------------------------------


@pytest.fixture
def kernels_on_cpu():
    """Has the operators start their kernels here as they do on a GPU."""
    library = torch.library.Library("wallaroo", "IMPL")
    for name, operator in OPERATORS.items():
        library.impl(name.partition("::")[2], operator.launch, "CPU", allow_override=True)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")
def test_forwards_of_kernels_equal_the_decoder(kernels_on_cpu):
    """A prompt of 7 tokens and then 3 more, in rows 2 and 0 of a cache whose row 1 is an empty slot."""
    config = DecoderConfig(64, 64, 96, 2, 2, 1, mrope_section=(4, 6, 6))
    decoder, frequencies = Decoder(config), rope_frequencies(config)
    cpu = torch.device("cpu")
    caches = [KVCache(config, 3, 64, cpu, torch.float32) for _ in range(2)]
    for layers in caches[1].keys, caches[1].values:
        layers[:] = [one.contiguous() for one in layers]  # as on a GPU
    ids, positions = torch.randint(64, (2, 10)), torch.arange(10).repeat(3, 2, 1)
    positions[:, :, :7] //= torch.tensor([1, 2, 3])[:, None, None]
    rows = torch.tensor([2, 0])
    table = decoder.embed_tokens.weight
    advance, length = torch.tensor([1, 0, 1]), torch.tensor([7, 0, 7])
    position, hidden = length.clone(), torch.zeros(3, 64)

    def plain(start, stop):
        limits = torch.arange(start + 1, stop + 1).repeat(2, 1)
        visible = Visible(rows, limits, None, stop)
        cos, sin = rope(
            positions[:, :, start:stop].flatten(1), frequencies, config.mrope_section, torch.float32
        )

        def attend(layer, q, k, v):
            keys, values = caches[0].keys[layer], caches[0].values[layer]
            for run, row in enumerate(rows.tolist()):
                keys[row, :, 0, start:stop] = k.view(2, -1, *k.shape[1:])[run].transpose(0, 1)
                values[row, :, 0, start:stop] = v.view(2, -1, *v.shape[1:])[run].transpose(0, 1)
            attention = BlockAttention(visible, 1, torch.float32)
            return attention(q.view(2, -1, *q.shape[1:]), keys, values).flatten(0, 1)

        return limits, cos, sin, decoder(table[ids[:, start:stop]].flatten(0, 1), cos, sin, attend)

    limits, cos, sin, expected = plain(0, 7)
    x = table[ids[:, :7]].flatten(0, 1)
    made = ops.prefill_layers(decoder, caches[1], x, cos, sin, rows, limits, 7)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    for start in 7, 8, 9:
        expected = plain(start, start + 1)[-1]
        token = torch.stack((ids[1, start], ids[0, 0], ids[0, start]))
        fed = ops.feed(
            token, table, None, token, token, torch.arange(3), advance, length, position, frequencies,
            decoder.layers[0].input_layernorm,
        )  # fmt: skip
        ops.decode_layers(decoder, caches[1], fed, hidden)
        torch.testing.assert_close(hidden[rows], expected, rtol=1e-4, atol=1e-5)
    assert length.tolist() == [10, 0, 10]
    for one, other in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert other[1].eq(0).all() and other[0, :, 0, :10].ne(0).all()
