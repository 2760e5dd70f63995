"""Peak anonymous memory of `wallaroo convert` on a synthetic checkpoint of 6 GiB in shards of 1 GiB.

    python -m tests.benchmarks.convert_memory [FOLDER]

Mapped files count in RSS but not in RssAnon, which is what the bound is about: 1.2 x the largest shard
plus 1 GiB. Needs 13 GiB of disk in FOLDER (default: a temporary one).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conformance.released import (
    flat_config,
    split,
    write_backbone,
    write_vq,
    write_wallaroo,
    zeros,
)
from wallaroo.jobs.make_tiny import tokenizer_json
from wallaroo.model.config import DecoderConfig, ModelConfig, VisionConfig, VQConfig

GIB = 2**30

_PROGRAM = """
import sys, threading, time
from wallaroo.model.convert import convert

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

# What the libraries themselves take is not of interest.
import torch, transformers.models.qwen2_5_vl.configuration_qwen2_5_vl
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
wallaroo, vq, backbone, output, shard_bytes = sys.argv[1:]
convert(wallaroo, vq, backbone, output, shard_bytes=int(shard_bytes))
print(before, max(peak, anonymous()))
"""


def write_published(folder: Path, config: ModelConfig) -> tuple[Path, Path, Path]:
    """Wallaroo file, image tokenizer and backbone folder of that architecture, in float32."""
    wallaroo, vq = split(zeros(config))
    backbone = write_backbone(
        folder / "backbone", flat_config(config.decoder, config.vision), tokenizer_json(controls=False)
    )
    return write_wallaroo(folder / "wallaroo.ckpt", wallaroo), write_vq(folder / "vq.pt", vq), backbone


def anonymous_memory(files: tuple[Path, Path, Path], output: Path, shard_bytes: int) -> tuple[int, int]:
    """RssAnon in bytes of a process before it converts, and the largest while it does."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, (*files, output, shard_bytes))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak = map(int, done.stdout.split())
    return before, peak


def main() -> None:
    config = ModelConfig(
        decoder=DecoderConfig(vocab_size=65536, num_hidden_layers=3),
        vision=VisionConfig(depth=8, fullatt_block_indexes=(7,)),
        vq=VQConfig(),
    )
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        folder = Path(made)
        files = write_published(folder, config)
        size = sum(file.stat().st_size for file in files[:2])
        _, peak = anonymous_memory(files, folder / "checkpoint", GIB)
        shards = [file.stat().st_size for file in (folder / "checkpoint").glob("*.safetensors")]
    bound = 1.2 * max(shards) + GIB
    print(f"{size / GIB:.2f} GiB in {len(shards)} shards, the largest of {max(shards) / GIB:.2f} GiB")
    verdict = "ok" if peak < bound else "TOO MUCH"
    print(f"peak RssAnon {peak / GIB:.3f} GiB, bound {bound / GIB:.2f} GiB: {verdict}")
    sys.exit(peak >= bound)


if __name__ == "__main__":
    main()
