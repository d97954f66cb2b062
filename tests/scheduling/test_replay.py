"""`python -m jaxllm.replay`: what is shown is what was recorded."""

from __future__ import annotations

import gzip
import json
import os
import pty
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.replay.__main__ import main
from jaxllm.scheduling.recording.schedule import read_schedule
from jaxllm.scheduling.recording.schedule_recorder import VERSION
from tests.scheduling.recorded_server import Recorded, rows_of, serve
from tests.scheduling.simulated_device import make_config, make_request


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "schedule.jsonl.gz"
    server = Recorded(make_config(num_pages=30, max_num_seqs=6), in_flight=2)
    server.record(path)
    rng = random.Random(1)
    requests = [
        make_request(f"</script>{i}", [rng.randrange(7) for _ in range(rng.randrange(1, 40))], max_tokens=20)
        for i in range(25)
    ]
    serve(server, requests, rng)
    assert server.scheduler.num_preemptions
    return path


def test_the_figures(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recorded)]) == 0
    out = capsys.readouterr().out
    read = read_schedule(recorded)
    assert "a <model>" in out
    assert re.search(r"requests\s*│ 25 ", out)
    assert re.search(rf"steps\s*│ {len(read.steps):,} ", out)
    assert re.search(rf"preemptions\s*│ {read.as_simulation().num_preemptions} ", out)


def test_one_step(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_schedule(recorded)
    index = next(i for i, step in enumerate(read.steps) if step.preempted)
    assert main([str(recorded), "--step", str(index)]) == 0
    out = capsys.readouterr().out
    assert f"Step {index} of {len(read.steps)}" in out
    assert f"preempted: {read.steps[index].preempted[0]}" in out
    for row in read.rows(index):
        assert row.request.request_id in out
    assert main([str(recorded), "--step", "100000"]) == 1
    assert f"there are steps 0 to {len(read.steps) - 1}" in capsys.readouterr().err


def test_the_page_holds_every_step_and_needs_nothing_else(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "page" / "schedule.html"
    assert main([str(recorded), "--html", str(out)]) == 0
    page = out.read_text()
    assert page.count("</script>") == 2, "an id closes no script"
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match
    data, read = json.loads(match[1]), read_schedule(recorded)
    assert len(data["steps"]["start"]) == len(read.steps)
    for index in range(len(read.steps)):
        rows = [
            (r["id"], start + (index - first) * tokens, tokens)
            for r in data["requests"]
            for first, count, start, tokens in r["runs"]
            if first <= index < first + count
        ]
        assert sorted(rows) == sorted(row[:3] for row in rows_of(read, index))


def test_other_policies(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(recorded), "--policy", "srtf,mlfq", "--scheduling-config", '{"mlfq": {"quantum": 4}}']) == 0
    )
    out = capsys.readouterr().out
    for name in ("fcfs, recorded", "fcfs, simulated", "srtf", "mlfq"):
        assert name in out
    assert main([str(recorded), "--policy", "no-such"]) == 1
    assert "no-such" in capsys.readouterr().err


def test_files_that_are_no_schedules_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    config = json.dumps({"jaxllm_schedule": 99, "config": {}})
    for content, message in (("", "no schedule"), ("{}\n", "no schedule"), (config + "\n", "no schedule")):
        path.write_text(content)
        assert main([str(path)]) == 1
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "missing")]) == 1
    assert "missing" in capsys.readouterr().err


def test_a_wrong_line_is_named(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, *lines = gzip.decompress(recorded.read_bytes()).decode().splitlines()
    path = tmp_path / "s.jsonl"
    for bad in ('["plan"]', '["flag", 1]', "7", '["end", 999, 1, "stop", 1, 0, 0, ""]'):
        path.write_text("\n".join([header, lines[0], bad, lines[1]]) + "\n")
        assert main([str(path)]) == 1
        assert "line 3" in capsys.readouterr().err
    path.write_text(header.replace(f'"jaxllm_schedule":{VERSION}', '"jaxllm_schedule":77') + "\n")
    assert main([str(path)]) == 1
    assert "version 77" in capsys.readouterr().err


def test_keys_step_through_it(recorded: Path) -> None:
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "jaxllm.replay", str(recorded)],
        stdin=theirs,
        stdout=theirs,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(theirs)
    seen = ""
    last = len(read_schedule(recorded).steps) - 1
    for key, shows in (("", "Step 0 "), ("l", "Step 1 "), ("\x1b[C", "Step 2 "), ("g12\n", "Step 12 "),
                       ("\x1b[F", f"Step {last} "), ("h", f"Step {last - 1} ")):  # fmt: skip
        os.write(ours, key.encode())
        seen = ""
        while shows not in seen:
            seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(ours, 1 << 16).decode(errors="replace"))
    os.write(ours, b"q")
    while True:
        try:
            if not os.read(ours, 1 << 16):
                break
        except OSError:  # Linux's way to say that the other end is closed
            break
    assert program.wait(timeout=20) == 0
    os.close(ours)
