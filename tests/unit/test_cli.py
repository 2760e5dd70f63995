"""The command line without a run: help, mistakes, exit codes, and what is said about them."""

import os
import re
import select
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from wallaroo.jobs import cli
from wallaroo.workflows.settings import OPTIONS

ROOT = Path(__file__).parents[2]
PROMPTS = str(ROOT / "jobs" / "examples" / "prompts.jsonl")


@pytest.fixture
def wallaroo(capsys, monkeypatch):
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


def sentence(err):
    """What was complained of: one line, with a pointer to the help at most."""
    lines = err.splitlines()
    assert len(lines) == 1 or (len(lines) == 2 and re.fullmatch(r"Help: wallaroo.* --help", lines[1])), err
    assert lines[0].startswith("wallaroo: ")
    return lines[0].removeprefix("wallaroo: ")


def test_help_names_every_command(wallaroo):
    code, out, _ = wallaroo("--help")
    assert code == 0
    listed = re.findall(r"^  (\w+)  +\w", out.split("Commands:")[1], flags=re.MULTILINE)
    assert listed == list(cli.cli.commands)


@pytest.mark.parametrize("command", list(cli.cli.commands))
def test_help_of_every_command(wallaroo, command):
    code, out, _ = wallaroo(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: wallaroo {command} ")
    assert max(map(len, out.splitlines())) <= 100


PRESETS_OF = {
    "generate": "geneval|dpg",
    "edit": "imgedit",
    "understand": "vlmevalkit",
    "plan": "geneval|dpg|imgedit|vlmevalkit",
}


@pytest.mark.parametrize("command", list(PRESETS_OF))
def test_help_names_every_setting(wallaroo, command):
    _, out, _ = wallaroo(command, "--help")
    for option in OPTIONS.values():
        if command != "plan" and not option.serves(command):
            assert not re.search(rf"^  {option.flag}( |$)", out, flags=re.MULTILINE)
            continue
        metavar = PRESETS_OF[command] if option.name == "preset" else option.kind.metavar
        assert re.search(
            rf"^  {option.flag}{re.escape(f' {metavar}' if metavar else '')}( |$)", out, flags=re.MULTILINE
        )


def test_version(wallaroo):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wallaroo("--version") == (0, f"wallaroo {project['version']}\n", "")


def test_nothing_asked_shows_the_help(wallaroo):
    code, out, err = wallaroo()
    assert (code, err) == (0, "")
    assert "Commands:" in out


@pytest.mark.parametrize("group", ["jobs", "bench", "data"])
def test_a_group_without_a_command_shows_its_help(wallaroo, group):
    code, out, err = wallaroo(group)
    assert (code, err) == (0, "")
    assert out == wallaroo(group, "--help")[1]


def arguments_of(group, before=()):
    """Each command below a group with its words and its arguments."""
    for name, command in group.commands.items():
        words = (*before, name)
        if hasattr(command, "commands"):
            yield from arguments_of(command, words)
        else:
            yield words, [one for one in command.params if isinstance(one, click.Argument)]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [case for case in arguments_of(cli.cli) if case[1]],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_help_explains_the_arguments(wallaroo, command, arguments):
    _, out, _ = wallaroo(*command, "--help")
    explained = out[out.index("Positional arguments:") :]
    for one in arguments:
        name = one.make_metavar(click.Context(click.Command("x"))).strip("[]{}").replace("...", "")
        words = re.search(rf"^  [\[{{]*{re.escape(name)}[\]}}.]* +(\w.*)", explained, flags=re.MULTILINE)
        assert words and len(words[1]) >= 12, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(wallaroo, shell):
    code, out, _ = wallaroo("completion", shell)
    assert code == 0
    assert f"_WALLAROO_COMPLETE={shell}_complete" in out


@pytest.fixture
def path():
    """PATH with the installed command first."""
    command = Path(sys.executable).with_name("wallaroo")
    if not os.access(command, os.X_OK):
        pytest.skip("the project is not installed in this environment")
    return f"{command.parent}{os.pathsep}{os.environ['PATH']}"


WORDS = ["und", "generate m o --image-f", "generate m o --image-format ", "generate m o --preset "]
"""What is typed after `wallaroo` before the key."""


def test_bash_completes_commands_options_and_values(path):
    """As the printed script does: bash runs it, and asks it about the words before the cursor."""
    asked = "\n".join(f"""ask {words}{'""' if words.endswith(" ") else ""}""" for words in WORDS)
    script = f"""
        eval "$(wallaroo completion bash)"
        ask() {{ COMP_WORDS=(wallaroo "$@"); COMP_CWORD=$#; COMPREPLY=(); _wallaroo_completion wallaroo
                 echo "${{COMPREPLY[*]}}"; }}
        {asked}
    """
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.stdout.splitlines() == [
        "understand",
        "--image-format",
        "png webp jpeg",
        "geneval dpg",
    ], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish: apt-get install fish")
def test_fish_completes_commands_options_and_values(path, tmp_path):
    asked = "; ".join(f"complete --do-complete 'wallaroo {words}'; echo =" for words in WORDS)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"wallaroo completion fish | source; {asked}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "TERM": "dumb"},
    )
    found = [part.split("\n")[:-1] for part in done.stdout.split("=\n")[:-1]]
    assert [[line.partition("\t")[0] for line in lines] for lines in found] == [
        ["understand"],
        ["--image-format"],
        ["jpeg", "png", "webp"],
        ["dpg", "geneval"],
    ], done.stderr


@pytest.mark.skipif(
    None in (shutil.which("zsh"), shutil.which("script")),
    reason="there is no zsh, or no script: apt-get install zsh bsdutils",
)
def test_zsh_completes_commands_options_and_values(path, tmp_path):
    """In a terminal of its own, where the tab key is pressed."""
    (tmp_path / ".zshrc").write_text(
        "PS1='> '; autoload -Uz compinit; compinit -u -D; eval \"$(wallaroo completion zsh)\"\n"
    )
    with subprocess.Popen(
        ["script", "--quiet", "--flush", "--command", "zsh -i", "/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"},
    ) as terminal:
        seen = ""

        def until(*words):
            """Reads what the terminal shows until it has shown all of these."""
            nonlocal seen
            while not all(word in seen for word in words):
                assert select.select([terminal.stdout], [], [], 60)[0], seen
                more = os.read(terminal.stdout.fileno(), 4096)
                assert more, seen
                seen += more.decode(errors="replace")
            seen = ""

        try:
            until("> ")
            shown = (["erstand "], ["ormat "], ["png", "webp", "jpeg"], ["geneval", "dpg"])
            for typed, words in zip(WORDS, shown, strict=True):
                # The first key takes back what was typed before.
                os.write(terminal.stdin.fileno(), f"\x15wallaroo {typed}\t".encode())
                until(*words)
        finally:
            terminal.kill()


@pytest.mark.parametrize(
    "command, message",
    [
        ("generat", "No such command 'generat'. Did you mean 'generate'?"),
        ("generate m o --sampels 2", "No such option '--sampels'. "),
        (
            "generate m o --weights fp8",
            "--weights asks for 8-bit weights, which only version 0.1.0 had: leave it out.",
        ),
        ("generate m", "Missing argument 'OUTPUT'."),
        ("plan m.csv", "task is 'm.csv', but must be one of generate, edit, understand."),
        ("generate m o p", "Got unexpected extra argument (p)"),
        ("generate m o --cfg", "Option '--cfg' requires an argument."),
        ("generate m o --cfg nan", "--cfg is 'nan', but must be a finite number of at least 0."),
        ("generate m o --cfg=-1", "--cfg is '-1', but must be a finite number of at least 0."),
        ("generate m o --top-k=-1", "--top-k is '-1', but must be a whole number from 0"),
        ("generate m o --top-p 0", "--top-p is '0', but must be above 0 and at most 1"),
        ("generate m o --top-p 1.1", "--top-p is '1.1', but must be above 0 and at most 1"),
        ("generate m o --temperature=-1", "--temperature is '-1', but must be a finite number"),
        ("generate m o --width 64", "width is 64, but height is missing: give both, or neither."),
        ("generate m o --height 64", "height is 64, but width is missing: give both, or neither."),
        ("generate m o --image-format gif", "--image-format is 'gif', but must be one of png, webp"),
        ("generate m o --replicas 3:2", "--replicas is '3:2', but must be a whole number from 1, or MIN:MAX"),
        ("generate m o --set sampling.cgf=3", "--set: unknown key 'cgf' in section sampling; did"),
        ("generate m o --set smapling.cfg=3", "--set: unknown section 'smapling'; did you mean"),
        ("generate m o --config absent.toml", "There is no run file absent.toml."),
        ("plan genrate m", "task is 'genrate', but must be one of generate"),
        ("plan generate m --cfg x", "--cfg is 'x', but must be a finite number of at least 0."),
        (
            "generate m o --template-en {foo}:{prompt}",
            "template_en: The template has an unknown placeholder '{foo}'",
        ),
        ("completion tcsh", "Invalid value for '{bash|zsh|fish}'"),
        ("convert o --backbone b --vq v", "--wallaroo is missing: give the published .ckpt, or --new-heads"),
        ("convert o --backbone b --wallaroo w", "--vq is missing, but images need it"),
    ],
)
def test_mistakes_in_the_command_line(wallaroo, command, message):
    code, out, err = wallaroo(*command.split())
    assert (code, out) == (2, "")
    assert sentence(err).startswith(message)


@pytest.mark.parametrize("command", ["status", "report", "verify"])
def test_what_is_no_output_of_a_run(wallaroo, tmp_path, command):
    for folder in (tmp_path, tmp_path / "absent"):
        code, out, err = wallaroo(command, folder)
        assert (code, out) == (1, "")
        assert "is not the output of a run" in sentence(err)


LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ("edit", PROMPTS, "OUT", "--image-column", LATIN),
            r"--image-column is caf\xe9, which is not UTF-8: ",
        ),
        (("edit", PROMPTS, "OUT", "--prompt", LATIN), r"--prompt is caf\xe9, which is not UTF-8: check the"),
        (("generate", PROMPTS, "OUT", "--id-column", LATIN), r"--id-column is caf\xe9, which is not UTF-8: "),
        (
            ("edit", PROMPTS, "OUT", "--image-root", LATIN),
            r"is caf\xe9, which is not UTF-8: rename the folder",
        ),
        (("generate", PROMPTS, LATIN), r"/caf\xe9 is not UTF-8: rename the file or folder."),
        (("plan", "generate", f"{LATIN}.jsonl"), r"/caf\xe9.jsonl is not UTF-8: rename the file or folder."),
        (
            ("prompts", "expand", f"{LATIN} {{c}}", "a.jsonl", "--set", "c=1"),
            r"argument caf\xe9 {c} is not UTF",
        ),
        (
            ("prompts", "expand", "a {c}", "a.jsonl", "--set", f"c={LATIN}"),
            r"argument c=caf\xe9 is not UTF-8",
        ),
    ],
)
def test_bytes_that_are_not_utf_8(wallaroo, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = wallaroo(*command)
    assert code in (1, 2) and words in sentence(err) and not list(tmp_path.iterdir())


def test_convert_of_files_that_are_not_there(wallaroo, tmp_path):
    arguments = ("--wallaroo", tmp_path / "w.ckpt", "--vq", tmp_path / "vq.pt", "--backbone", tmp_path)
    code, _, err = wallaroo("convert", *arguments, tmp_path / "new")
    assert code == 1
    assert "w.ckpt cannot be read" in sentence(err)
    assert not (tmp_path / "new").exists()


def test_status_report_and_verify_of_an_output(wallaroo, outputs, tmp_path):
    output = tmp_path / "out"
    outputs.make_output(output, [outputs.plan_table(4), outputs.plan_table(4, 4, 1)], skip=[1])
    code, out, _ = wallaroo("status", output)
    assert code == 0
    assert f"{output}: " in out and "1 of 2 shards" in out
    code, out, _ = wallaroo("report", output)
    assert (code, out) == (0, f"{output}/report.html\n")
    assert (output / "report.html").stat().st_size > 1000
    code, out, _ = wallaroo("verify", output)
    assert code == 1
    assert "4 of 8 rows" in out


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m wallaroo.jobs.cli generate --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("Usage: ")
    assert done.stderr == ""


def test_the_installed_command():
    command = Path(sys.executable).with_name("wallaroo")
    if not os.access(command, os.X_OK):
        pytest.skip("the project is not installed in this environment")
    done = subprocess.run([command, "status"], capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence(done.stderr) == "Missing argument 'OUTPUT'."
