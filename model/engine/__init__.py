"""The batching engine: rows in, pictures or texts out, as many at once as there are slots.

A row's numbers depend on nothing but the row: decode runs in groups of a constant number of sequences,
prefill in pieces of a constant length, VQ decode in slices of a constant number of pictures, and the draws of
a row are fixed by its seed and the token's position. So a row comes out the same alone or in any company, in
any slot and any order. Knows nothing of Ray, files or manifests; one thread at a time may use an engine.

    engine    which rows decode, and what happens to them before and after
    groups    rows that decode together, and their step
    prefill   prompts on their way through the decoder
    pictures  from tokens to pixels
    backends  which attention suits a device
    updates   what the host changes on the device
    options   what shapes the work, and the choice of it for a device
    requests  rows, and what becomes of them
"""

from wallaroo.model.engine.engine import END_OF_LINE, STOP_TOKENS, Engine
from wallaroo.model.engine.options import EngineOptions, even_threads, gpu_options
from wallaroo.model.engine.requests import Request, Result

__all__ = [
    "END_OF_LINE",
    "STOP_TOKENS",
    "Engine",
    "EngineOptions",
    "Request",
    "Result",
    "even_threads",
    "gpu_options",
]
