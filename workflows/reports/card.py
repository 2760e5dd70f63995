"""The card of a data set: a `README.md` that says what it holds, how it was made, and how to read it.

Its front matter is what the Hugging Face Hub and `datasets` look for, so `load_dataset(OUTPUT)` reads
`data/` and nothing else. Users' texts are quoted strings and code in it, never markup. Knows nothing of how
anything is counted.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import CARD_FILE, DATA_FOLDER, ERRORS_FILE
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.values import flat

if TYPE_CHECKING:
    from wallaroo.workflows.outputs.success import RowTotals
    from wallaroo.workflows.plans.plan import Plan

log = logging.getLogger(__name__)

MAX_FILES = 20
MAX_LINES = 40
"""Most counts of one kind in a card."""
_CATEGORIES = {"generate": "text-to-image", "edit": "image-to-image", "understand": "image-to-text"}
_WHAT = {
    "generate": "Images made from text prompts",
    "edit": "Images edited by instructions",
    "understand": "Answers to questions about images",
}
_SIGNATURE = "\n<!-- Written by Wallaroo Batch, which replaces it while its SHA-256 is {}. -->\n"
"""The last line of a card. The digest is that of all before it."""
_BOUNDS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_SIZES = (f"n<{_BOUNDS[0]}", *map("{}<n<{}".format, _BOUNDS, _BOUNDS[1:]), f"n>{_BOUNDS[-1]}")
"""The Hub's words for numbers of rows, each for ten times as many as the one before."""


def write_card(output: str, plan: "Plan", counts: "RowTotals") -> None:
    """Writes OUTPUT/README.md of a finished data set.

    Args:
        output: The folder of the run, local or `s3://`.
        plan: Its plan.
        counts: What its rows add up to.
    """
    put_card(output, render_card(output, plan, counts))


def put_card(folder: str, text: str) -> None:
    """Writes README.md, signed by a digest of its text, unless another one is there.

    Args:
        folder: Of a data set, local or on S3.
        text: The card.
    """
    path = storage.join(folder, CARD_FILE)
    try:
        existing = storage.read_bytes(path)
    except FileNotFoundError:
        existing = None
    if existing is None or is_card(existing):
        digest = hashlib.sha256(text.encode()).hexdigest()
        storage.write_atomic(path, f"{text}{_SIGNATURE.format(digest)}".encode())
    else:
        log.warning(
            f"{path} is kept, since it was written or changed by hand; "
            f"move it elsewhere and start again to get the card of the data set."
        )


def is_card(data: bytes) -> bool:
    """Whether a README.md is an unchanged card, or one of version 0.1.0, which signed none."""
    text, mark, digest = data.decode("utf-8", "replace").rpartition(_SIGNATURE.partition("{")[0])
    if mark:
        signed = _SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest())
        return mark + digest == signed
    text = digest
    return (
        text.startswith("---\npretty_name: ")
        and '\n- "wallaroo"\nconfigs:\n' in text
        and re.search(r"^.* (Made|chosen) with Wallaroo Batch[;.]", text, flags=re.MULTILINE) is not None
    )


def render_card(output: str, plan: "Plan", counts: "RowTotals") -> str:
    """The text of the card. Equal runs give equal text wherever their output is.

    Args:
        output: The folder of the run, local or `s3://`.
        plan: Its plan.
        counts: What its rows add up to.

    Returns:
        Markdown, with a YAML block first.
    """
    run = read_run(output)
    config, options = run["config"], run["options"]
    task = str(config.get("task", "generate"))
    files = [name for name, *_ in plan.rounds[0].manifest] if plan.rounds else []
    manifest = options.get("manifest")
    settings = {**flat(config), "config_digest": run["config_digest"]}
    settings = {name: options[name] for name in ("model", "preset") if options.get(name)} | settings
    lines = [
        front_matter(
            str(PurePosixPath(str(manifest)).name) if manifest else "Wallaroo",
            task,
            sorted(counts.languages),
            counts.rows,
            {"train": f"{DATA_FOLDER}/*.parquet"},
        ),
        f"# {_WHAT.get(task, 'Results of a batch run')}",
        "",
        f"{counts.rows:,} rows: {counts.ok:,} ok and {counts.rows - counts.ok:,} errors. "
        "Made with Wallaroo Batch.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'rows = load_dataset("PATH OF THIS FOLDER", split="train")',
        'ok = rows.filter(lambda status: status == "ok", input_columns="status")',
        "```",
        "",
        "A row is an error row where `status` is `error`; `error_type` and `error_message` say why. "
        f"`{ERRORS_FILE}` holds these rows as a manifest for a second try.",
        "",
        "## Provenance",
        "",
        *_provenance(task, config, options),
        "",
        "## Settings",
        "",
        *(
            f"- {code(name)}: {code(json.dumps(value, ensure_ascii=False))}"
            for name, value in settings.items()
        ),
        "",
        "## Sources",
        "",
    ]
    if manifest:
        lines += [f"The manifest {code(manifest)}:", ""]
    lines += [f"- {code(name)}" for name in files[:MAX_FILES]]
    if len(files) > MAX_FILES:
        lines.append(f"- and {len(files) - MAX_FILES:,} more files")
    lines.append("")
    if counts.folders:
        folders = {code(folder) if folder else "elsewhere": count for folder, count in counts.folders.items()}
        lines += ["Source images of the ok rows; their own terms of use apply:", ""]
        lines += _counted(folders)
    lines += ["## Contents", ""]
    lines += _counted({f"language {code(language)}": count for language, count in counts.languages.items()})
    lines += _counted(
        {f"{width} x {height} pixels": count for (width, height), count in counts.sizes.items()}
    )
    lines += _counted({f"errors of kind {code(kind)}": count for kind, count in counts.errors.items()})
    return "\n".join(lines).rstrip() + "\n"


def front_matter(name: str, task: str, languages: Sequence[str], rows: int, splits: Mapping[str, str]) -> str:
    """The YAML block that a card begins with, as the Hugging Face Hub reads it.

    Args:
        name: Of the data set.
        task: `generate`, `edit`, `understand`, or empty.
        languages: Codes of the languages of its prompts.
        rows: How many rows it has.
        splits: Name of each split -> pattern of its files.

    Returns:
        The block, with its `---` lines.
    """
    from huggingface_hub import DatasetCardData

    files = [{"split": split, "path": pattern} for split, pattern in splits.items()]
    data = DatasetCardData(
        pretty_name=_whole(_cut(name)),
        language=list(languages) or None,
        size_categories=[_size_category(rows)],
        task_categories=[_CATEGORIES[task]] if task in _CATEGORIES else None,
        tags=["synthetic", "wallaroo"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _size_category(rows: int) -> str:
    """The Hub's category for a number of rows."""
    return _SIZES[min(max(len(str(rows)) - 3, 0), len(_SIZES) - 1)]


def _provenance(task: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Who made the results, and how their files say so."""
    model = PurePosixPath(str(options.get("model") or "")).name
    maker = f"the model {code(model)}" if model else "a model"
    digest = f" (digest {code(config['model_digest'])})" if config.get("model_digest") else ""
    if task == "understand":
        return [f"All texts in `text` were generated by {maker}{digest}."]
    lines = [
        f"All images in `image` were generated by {maker}{digest}; none is a photograph. The columns "
        "`model_digest`, `prompt` and `seed` say how each was made.",
        "",
    ]
    if config.get("embed_metadata"):
        lines.append(
            "Their files are marked: XMP metadata holds IPTC's digital source type "
            "`trainedAlgorithmicMedia`, prompt, seed and model digest."
        )
    else:
        lines.append(
            "Their files carry no mark. `wallaroo export files` writes copies with XMP metadata "
            "(`--embed-metadata`) or signed Content Credentials (`--c2pa`)."
        )
    return lines


def code(text: Any) -> str:
    """A text as a code span that no Markdown or HTML in it can leave."""
    text = _whole(_cut(str(text)))
    text = "".join(c if c.isprintable() else " " for c in text) or " "
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    # One space at both ends belongs to the fence, and parts it from backticks of the text.
    return f"{fence} {text} {fence}" if longest else f"{fence}{text}{fence}"


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _counted(rows: Mapping[str, int]) -> list[str]:
    """A Markdown list of numbers of rows, the greatest first; nothing where there are none."""
    if not rows:
        return []
    order = sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"- {name}: {count:,}" for name, count in order[:MAX_LINES]]
    if len(order) > MAX_LINES:
        lines.append(f"- others: {sum(count for _, count in order[MAX_LINES:]):,}")
    return [*lines, ""]
