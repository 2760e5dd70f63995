"""All checks that need a GPU, in one run of under nine minutes: `python -m wallaroo.model.gpu_check`.

It needs Python 3.11 or newer, torch and transformers; flash-attn and Triton are checked if they are
installed. Ray is not needed. Each part runs in its own process with a time limit, so one that fails does not
affect the others. Prints a table and writes one JSON file.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRACE = 5
"""Seconds between the end of a part's time and its kill."""


class Part(NamedTuple):
    """A part of the check."""

    module: str
    """Name of the module."""
    function: str
    """Name of the function in it."""
    seconds: int
    """Its share of the time on a GPU."""


PARTS = {
    "machine": Part("wallaroo.model.gpu_parts", "machine", 35),
    "kernels": Part("wallaroo.model.gpu_parts", "kernels", 65),
    "equal-tiny": Part("wallaroo.model.gpu_parts", "equal_tiny", 60),
    "equal-random": Part("wallaroo.model.gpu_parts", "equal_random", 70),
    "speed": Part("wallaroo.model.gpu_speed", "speed", 115),
    "profile": Part("wallaroo.model.gpu_speed", "profile", 60),
    "edit": Part("wallaroo.model.gpu_speed", "edit", 40),
    "tokenizer": Part("wallaroo.model.gpu_speed", "tokenizer", 25),
    "loading": Part("wallaroo.model.gpu_speed", "loading", 30),
}
"""What is checked and measured, in this order."""

SECONDS = sum(part.seconds for part in PARTS.values())


def run_part(name: str, device: str, model: str, seconds: float, out: Path) -> None:
    """Runs a part in this process. Each result is written at once, as a line of JSON.

    Args:
        name: Of the part, a key of PARTS.
        device: `cuda` or `cpu`.
        model: Name of the shapes of the random model.
        seconds: Time that the part may take.
        out: The file to append to.
    """
    end = time.monotonic() + seconds
    with out.open("a") as file:

        def report(key: str, value: Any) -> None:
            file.write(json.dumps([key, value]) + "\n")
            file.flush()

        try:
            # Here, not above: the process that starts the parts needs no torch, and must outlive it.
            import importlib

            import torch

            from wallaroo.model.gpu_parts import Bench

            work: Callable[[Bench], None] = getattr(
                importlib.import_module(PARTS[name].module), PARTS[name].function
            )
            work(Bench(torch.device(device), model, end, report))
        except Exception as error:
            report("error", f"{type(error).__name__}: {error}".partition("\n")[0])
            report("traceback", traceback.format_exc())
        else:
            report("done", True)


def start_part(name: str, device: str, model: str, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own, and ends that process after its time.

    Args:
        name: Of the part, a key of PARTS.
        device: `cuda` or `cpu`.
        model: Name of the shapes of the random model.
        seconds: Time that the part may take.

    Returns:
        What the part reported, also if it was ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "reported")
        out.touch()
        command = [sys.executable, "-m", "wallaroo.model.gpu_check", "--part", name, "--out", str(out)]
        command += ["--device", device, "--model", model, "--seconds", str(seconds)]
        start = time.monotonic()
        with Path(folder, "printed").open("w+") as printed:
            process = subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True)
            try:
                process.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            printed.seek(0)
            words = printed.read()
        found: dict[str, Any] = {}
        for line in out.read_text().splitlines():
            key, value = json.loads(line)
            found[key] = value
    done, error = found.pop("done", False), found.pop("error", "")
    if error:
        status = f"failed: {error}"
    elif done:
        status = "done"
    elif process.returncode == -signal.SIGKILL:
        status = "out of time"
    else:
        status = f"ended with status {process.returncode}"
    result = {"status": status, "seconds": time.monotonic() - start, "reported": found}
    if status != "done" or "Warning" in words:
        result["printed"] = words[-4000:]
    return result


def wrong(results: dict[str, dict[str, Any]]) -> list[str]:
    """Checks that are false, and parts that failed; those that ran out of time are not among them."""
    found = [name for name, result in results.items() if result["status"].startswith(("failed", "ended"))]
    for name, result in results.items():
        checks = {key: value for key, value in result["reported"].items() if key.startswith("is_")}
        found += [f"{name} {key}" for key, value in checks.items() if not value]
    return found


def to_text(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, a line a number or check; what is longer is in the JSON only."""
    lines = ["| part | what | value |", "|---|---|---|"]
    for name, result in results.items():
        lines.append(f"| {name} | {result['status']} | {result['seconds']:.0f} s |")
        for key, value in result["reported"].items():
            what = key.removeprefix("is_").replace("_", " ")
            if isinstance(value, bool):
                lines.append(f"| | {what} | {'yes' if value else 'NO'} |")
            elif not isinstance(value, (dict, list)) and key != "traceback":
                lines.append(f"| | {what} | {f'{value:.4g}' if isinstance(value, float) else value} |")
            elif key.endswith("_by_phase"):
                for phase, times in value.items():
                    host, device = times["host_milliseconds"], times["device_milliseconds"]
                    lines.append(f"| | {what}: {phase} | host {host:.3g} ms, device {device:.3g} ms |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts, or those named; 1 if a check is false or a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m wallaroo.model.gpu_check", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the parts")
    parser.add_argument(
        "--model", choices=["7b", "mid", "tiny"], default="7b", help="shapes of random weights"
    )
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="a part; may be repeated")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of all parts together (default {SECONDS})"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file to write")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        run_part(options.part, options.device, options.model, options.seconds, options.out)
        return 0
    end = time.monotonic() + options.seconds
    results: dict[str, dict[str, Any]] = {}
    for name in options.only or PARTS:
        share = PARTS[name].seconds * options.seconds / SECONDS
        # Time that a part did not need is there for those after it.
        left = end - time.monotonic() - GRACE
        later = sum(PARTS[other].seconds for other in list(PARTS)[list(PARTS).index(name) + 1 :])
        seconds = max(share, left - later * options.seconds / SECONDS) if not options.only else left
        if left <= 0:
            results[name] = {"status": "no time left", "seconds": 0.0, "reported": {}}
            continue
        results[name] = start_part(name, options.device, options.model, min(seconds, left))
        # Written each time, so that what is known survives the end of this process.
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results[name]['status']}, {results[name]['seconds']:.0f} s", flush=True)
    print(to_text(results))
    for name in wrong(results):
        print(f"WRONG: {name}")
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
