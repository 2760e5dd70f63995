"""Who may ask for what, and the command `wallaroo view`."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tests.s3_proxy import proxy
from tests.viewers import serving, wait_for
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import shards
from wallaroo.workflows.reports import status
from wallaroo.workflows.viewer import output as viewer_output
from wallaroo.workflows.viewer import server, votes
from wallaroo.workflows.viewer.guard import LOOPBACK
from wallaroo.workflows.viewer.votes import Key, Votes


def test_pages_escape_and_say_what_a_browser_may_do(tmp_path, outputs):
    bad = "<script>alert(1)</script>\" onload='x'"
    outputs.make_output(
        tmp_path / "out",
        [outputs.plan_table(4)],
        edit=lambda row: row | {"prompt": bad, "id": f"{bad}{row['id']}"},
    )
    with serving(tmp_path / "out") as served:
        served.indexed()
        for path in ("/0/", "/0/rows/0/0", "/0/?q=%3Cscript%3E&f.status=%3Cb%3E", "/0/?where=%3Cscript%3E"):
            answer = served.get(path)
            assert "<script>alert" not in answer.text and "<b>ok" not in answer.text
            assert set(re.findall(r"<script[^>]*>", answer.text)) == {
                re.search(r"<script defer[^>]*>", answer.text)[0]
            }
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert html.escape(bad, quote=False)[:20] in served.get("/0/").text


def test_facets_that_are_not_there_are_explained(tmp_path, outputs):
    same = {"width": 64, "tag": "t", "weight": 1.0}
    outputs.make_output(tmp_path / "out", [outputs.plan_table(4)], edit=lambda row: row | same)
    with serving(tmp_path / "out") as served:
        early = served.get("/0/").text
        if "Counts appear here" in early:
            assert 'data-complete="no"' in early  # and so the page asks again
        served.indexed()
        page = served.get("/0/").text
        assert "Nothing to count: each column of these rows has one value, or too many." in page
        assert "Counts appear here" not in page and 'data-complete="yes"' in page
        nothing = served.get("/0/?q=dog").text
        assert "No rows match." in nothing
        assert "Nothing to count" not in nothing and "Counts appear here" not in nothing


def test_other_names_other_sites_and_other_paths_are_refused(three, tmp_path):
    shutil.copytree(three, tmp_path / "other")
    # As `wallaroo view` has them, with the address that it listens at.
    hosts = (*LOOPBACK, "127.0.0.1")
    with serving(three, tmp_path / "other", votes=tmp_path / "v.parquet", hosts=hosts) as served:
        host = served.base.removeprefix("http://")
        for name in (host, "localhost:1", "LOCALHOST", "[::1]:80"):
            assert served.get("/0/", {"Host": name}).status == 200
        for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""):
            answer = served.get("/0/", {"Host": name})
            assert answer.status == 421
            assert answer.text == "The viewer answers as 127.0.0.1 or localhost or [::1] only.\n"
        assert served.get("/0/", {"Sec-Fetch-Site": "cross-site"}).status == 403
        assert served.get("/0/live", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}).status == 403
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert served.get("/0/", link).status == 200
        for path in (
            "/static/../app.py", "/static/%2e%2e/app.py", "/static/app.py", "/2/", "/0/pictures/0/400",
            "/0/pictures/7/0", "/0/rows/..%2f..%2f/0", "/0/pictures/0/3",
            "/0/sources/0/0", "/etc/passwd", "/-1/",
        ):  # fmt: skip
            assert served.get(path).status == 404, path
        vote = {"id": "p0", "version": "0", "sample": "0", "choice": "a"}
        for headers in (
            {},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://{host}0"},
        ):
            assert served.get("/votes", headers, vote).status == 403
        strange = {"Origin": served.base, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert served.get("/votes", strange, vote).status == 403
        assert not (tmp_path / "v.parquet").exists()
        assert served.get("/votes", {"Origin": served.base}, vote | {"choice": "/etc"}).status == 400
        for wrong in ({}, {"version": "x"}, {"version": str(2**31)}, {"sample": "-1"}):
            values = {"choice": "a"} | (vote | wrong if wrong else {})
            assert served.get("/votes", {"Origin": served.base}, values).status == 400
        answer = served.get("/votes", {"Origin": served.base}, vote | {"back": "//evil.example/compare"})
        assert (answer.status, answer.headers["Location"]) == (303, "/compare")
        assert pq.read_table(tmp_path / "v.parquet").column("choice").to_pylist() == [str(three)]


def test_other_machines_need_the_token(three):
    with serving(three, hosts=None, token="secret") as served:
        assert served.get("/0/").status == 403
        assert served.get("/0/?token=other").status == 403
        assert served.get("/0/", {"Cookie": "wallaroo-view=other"}).status == 403
        answer = served.get("/0/?token=secret&tile=s")
        assert (answer.status, answer.headers["Location"]) == (303, "/0/?tile=s")
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert served.get("/0/", {"Cookie": cookie.partition(";")[0], "Host": "box:80"}).status == 200
        assert served.get("//evil.example/?token=secret").headers["Location"] == "/evil.example/"


def test_source_is_shown_only_if_it_is_what_the_model_saw(tmp_path, outputs):
    outputs.make_task_output(tmp_path / "out", "edit", bad=(1,))
    with serving(tmp_path / "out") as served:
        answer = served.get("/0/sources/0/0")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/webp")
        assert served.get("/0/sources/0/1").status == 404
        (tmp_path / "sources" / "s0.png").write_bytes((tmp_path / "sources" / "s1.png").read_bytes())
        assert served.get("/0/sources/0/0").status == 404
        assert "s0.png" in served.get("/0/rows/0/0").text


def test_running_run_is_described(tmp_path, outputs, monkeypatch):
    from wallaroo.workflows.outputs.run_log import RunLog

    monkeypatch.setattr(status, "SILENT_SECONDS", 3600.0)
    tables = [outputs.plan_table(4, 4 * i, i) for i in range(3)]
    outputs.make_output(tmp_path / "out", tables, skip=(1, 2))
    seconds = itertools.count(time.time())
    with RunLog(str(tmp_path / "out"), {}, lambda: next(seconds)) as log:
        log.update(rows=12, done=0, before=0, errors={}, images=0)
        log.update(rows=12, done=4, before=0, errors={"size": 1}, images=3)
        log.end("running")
        with serving(tmp_path / "out") as served:
            state = json.loads(served.get("/0/live").text)
            assert state["running"] and state["shards"] == 1
            text = re.sub(r"<[^>]+>|\s+", " ", state["html"])
            assert re.search(r"running .*4 +of 12 +rows .*1 +error .*rows/s .*left", re.sub(" +", " ", text))
            shards.write_shard(str(tmp_path / "out"), 1, outputs.result_table(tables[1]))
            wait_for(lambda: json.loads(served.get("/0/live").text)["shards"] == 2)
            served.indexed()
            assert ">8<" in served.get("/0/?q=cat").text


def test_command_says_what_is_wrong(tmp_path, three):
    import socket

    from wallaroo.jobs.cli import main

    def told(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["view", "--no-open", *map(str, arguments)])
        return ended.value.code

    assert told(tmp_path) == 1
    assert told() == 2
    assert told(three, "--port", "70000") == 2
    assert told(*[three] * 9) == 1
    with pytest.raises(InputError, match=r"/out is given twice: give each output once\."):
        server.serve([str(three), f"{three}/"], 0)
    words = r"127\.0\.0\.1:\d+ is taken: give another --host or --port\."
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=words):
        server.serve([str(three)], taken.getsockname()[1])
    with pytest.raises(InputError, match=r"has no run\.json: give the folder of an output"):
        server.serve([str(tmp_path)], 0)


def test_command_serves_until_it_is_interrupted(three, tmp_path):
    """As a process of its own, whose memory an expression of a user cannot fill."""
    import signal
    import urllib.parse
    import urllib.request

    # On a busy machine a query may take long before it has filled its memory.
    script = (
        "import sys; from wallaroo.workflows.viewer import index; index.SECONDS = 600.0; "
        "from wallaroo.jobs.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "view", str(three), "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            page = urllib.request.urlopen(address, timeout=300).read().decode()
            assert "a cat, number 0" in page

            def answer(where):
                query = urllib.parse.urlencode({"where": where})
                try:
                    return urllib.request.urlopen(f"{address}0/?{query}", timeout=300).read().decode()
                except urllib.error.HTTPError as error:
                    with error:
                        return error.read().decode()

            wait_for(lambda: ">120<" in answer("true"))
            assert "more memory than a page may use" in answer("length(repeat(prompt, 100000000)) > 0")
            assert ">120<" in answer("true")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(300)
        assert process.stderr.read() == ""


def test_missing_extra_is_named(three):
    script = (
        "import sys; sys.modules['uvicorn'] = None; from wallaroo.jobs.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "view", "--no-open", str(three)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "wallaroo: the viewer needs uvicorn, which is not installed: pip install 'wallaroo-batch[view]'.\n"
    )


def test_help_needs_nothing_but_click():
    from wallaroo.jobs.cli import cli

    done = CliRunner().invoke(cli, ["view", "--help"])
    assert done.exit_code == 0 and "--votes" in done.output


def test_first_page_on_s3_takes_few_requests(s3_server, tmp_path, outputs, monkeypatch):
    local = tmp_path / "out"
    outputs.make_output(local, [outputs.plan_table(64, 64 * i, i) for i in range(12)])
    # However slow the machine, neither the index nor another listing begins before it is asked for.
    for name in ("QUIET_SECONDS", "RESTING_SECONDS"):
        monkeypatch.setattr(viewer_output, name, math.inf)
    for file in storage.list_files(str(local)):
        storage.write_atomic(f"s3://ready/viewed/{file.relative}", Path(file.path).read_bytes())
    with proxy(s3_server.endpoint, share=0) as between:
        for name, value in s3_server.variables(between.endpoint).items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        try:
            with serving("s3://ready/viewed") as served:
                page = served.get("/0/").text
                links = [html.unescape(link) for link in re.findall(r'<img src="([^"]+)"', page)]
                assert len(links) == 48
                assert all(served.get(link).status == 200 for link in links)
                assert between.requests <= 20
                served.indexed()
                assert ">768<" in served.get("/0/?q=cat").text
        finally:
            monkeypatch.undo()
            storage.forget_clients()


def test_votes_on_s3(s3_server):
    path = "s3://ready/a.votes.parquet"
    mine, theirs = (
        Votes(path, ["s3://ready/a", "s3://ready/b"]),
        Votes(path, ["s3://ready/a", "s3://ready/b"]),
    )
    mine.cast(Key("x", 0, 0), ["1", "2"], "s3://ready/a")
    theirs.cast(Key("y", 0, 0), ["1", "2"], "s3://ready/b")
    mine.cast(Key("z", 0, 0), ["1", "2"], votes.TIE)
    assert len(Votes(path, ["s3://ready/a", "s3://ready/b"]).choices()) == 3
