"""The pages of the documentation taken apart: code blocks with their markers, inline code, links, tables."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "infra/README.md")),
    *(ROOT / name for name in ("model/tiny/README.md", "tests/faults/README.md")),
    *(ROOT / name for name in ("tests/benchmarks/README.md", "tests/conformance/README.md")),
)

ENDS = {";", "&&", "||", "|", "&", "do", "done"}
"""What a command of a shell line ends with."""


@dataclass(frozen=True)
class Block:
    """A code block. line: of its fence. marker: text of the HTML comment before it, or empty."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, and those that are indented by four spaces, whose language is empty."""
    found, fence, start, lines, marker = [], None, 0, [], ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence is not None:
            if line.startswith("```"):
                found.append(Block(page, start, fence, "\n".join(lines), marker))
                fence, marker = None, ""
            else:
                lines.append(line)
        elif line.startswith("```"):
            fence, start, lines = line.removeprefix("```"), number, []
        elif line.startswith("    "):
            last = found[-1] if found and not found[-1].language else None
            if last and last.line + last.text.count("\n") == number - 1:
                found[-1] = replace(last, text=f"{last.text}\n{line[4:]}")
            else:
                found.append(Block(page, number, "", line[4:], ""))
        elif match := re.fullmatch(r"<!-- (.*) -->", line):
            marker = match[1]
        elif line.strip():
            marker = ""
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures, addresses of the web left out."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its first two lines."""
    text = re.split(rf"^#+ {re.escape(heading)}$", page.read_text(), flags=re.M)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, flags=re.M)
    assert rows, heading
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[0].splitlines()[2:]]


def words_of(line: str) -> list[str]:
    """The words of a line of shell, with `;` and the like as words; none where it cannot be taken apart."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    reader.whitespace_split = True
    try:
        return list(reader)
    except ValueError:
        return []


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in some shell text, here-documents left out."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", text, flags=re.M | re.S)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        command: list[str] = []
        for word in [*words_of(line), ";"]:
            if word not in ENDS:
                command.append(word)
            elif command:
                yield command
                command = []


def all_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that a page names, with the place where it stands."""
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("sh", ""):
                yield from ((block.where, command) for command in commands(block.text))
        for code in inline_code(page):
            yield from ((str(page.relative_to(ROOT)), command) for command in commands(code))
