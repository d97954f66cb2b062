"""Several processes serve one model: what they say, and what becomes of them when one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.vocabulary import large_tokenizer
from jaxllm.models.families import translate_config
from tests.hosts.processes import ENGINE, ROOT, Processes, flags, two_free_ports
from tests.parallel.models import Oracle, hf_config, write_model

OFFLINE = str(ROOT / "tests" / "hosts" / "offline.py")
LENGTHS, OUTPUT = (21, 18, 5, 23), 9
BIAS = {3: 4.0, 500: -5.0, 600: 4.0}
START = 300  # seconds, on a machine that does other things as well
IN_TIME = 30  # seconds in which everybody must have ended


def model_of(directory: Path, layers: int) -> tuple[Path, Oracle]:
    write_model(directory, "llama", num_hidden_layers=layers)
    return directory, Oracle(directory, translate_config(hf_config("llama", num_hidden_layers=layers)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    return model_of(tmp_path_factory.mktemp("llama"), layers=1)  # compiling is what these tests wait for


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(601, size=8).tolist()
    return [(shared + rng.integers(601, size=length).tolist())[:length] for length in LENGTHS]


def other_host(host: int, num_hosts: int, port: int) -> list[str]:
    """The command of a host that has no settings of its own."""
    where = {"nnodes": num_hosts, "node_rank": host, "master_port": port}
    return ["-m", "jaxllm.serve", "--headless", *flags(where)]


def offline(directory: Path, num_hosts: int, devices: int, port: int, **asked: Any) -> list[str]:
    settings = {
        **ENGINE,
        "tensor_parallel_size": num_hosts * devices,
        "nnodes": num_hosts,
        "master_port": port,
        **asked.pop("settings", {}),
    }
    return [
        OFFLINE,
        json.dumps({"model": str(directory), "settings": settings, "prompts": prompts(), **asked}),
    ]


def test_two_hosts_say_what_one_device_would(model: tuple[Path, Oracle], tmp_path: Path) -> None:
    """Two devices each: chunked prefill, prefix cache, pages kept on hosts, n > 1, biases, forms, sleep."""
    directory, oracle = model
    common = {"temperature": 0, "max_tokens": OUTPUT}
    params = [
        {**common, "temperature": 0.7, "top_k": 1, "seed": 4, "n": 2},
        {**common, "logprobs": 3, "prompt_logprobs": 2, "presence_penalty": 1e-6},
        {**common, "logit_bias": BIAS},
        common,
    ]
    port = two_free_ports()
    # Too few pages for two long sequences.
    settings = {"max_model_len": 32, "max_num_seqs": 2, "num_gpu_blocks_override": 10, "swap_space": 0.001}
    tokenizer = large_tokenizer(601, [Path(__file__)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings |= {"skip_tokenizer_init": False, "tokenizer": str(tmp_path / "tokenizer")}
    regexes = ["x(ab|cd|ef){20}", None, "a (b )?c"]
    with Processes(tmp_path) as processes:
        command = offline(
            directory, 2, 2, port, params=params, settings=settings, sleeps=True, regexes=regexes
        )
        processes.start(command, devices=2)
        processes.start(other_host(1, 2, port), devices=2)
        said = json.loads(processes.wait_for_line(0, "SAID ", START))
        biases = (None, None, BIAS, None)
        for prompt, bias, one, params_of_one in zip(prompts(), biases, said["tokens"], params, strict=True):
            assert one == [oracle.greedy(prompt, OUTPUT, bias)] * params_of_one.get("n", 1)
        assert said["again"] == said["tokens"]
        assert said["preemptions"] >= said["swaps"] > 0
        assert said["hits"] > 0
        # Embeddings and logits: the first 512 of 601 rows, since a shard has 256. Of queries, their output
        # and the MLP one half; one of two KV heads, for each of the two devices; all of the norms.
        halves = 2 * 48 * 48 // 2 + 3 * 76 * 48 // 2
        read = 4 * (2 * 512 * 48 + halves + 2 * 2 * 6 * 48 + 3 * 48)
        assert said["copied"] == 2 * read  # at the start, and after a sleep without weights
        assert read < 0.8 * sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        # A step of 16 tokens and 2 sequences is 0.5 KB; what is more are penalties' and biases' rows.
        assert said["sent"] / said["commands"] < 700
        long, free, short = said["formed"]
        assert re.fullmatch("x(ab|cd|ef)*[ace]?", tokenizer.decode(long["token_ids"]))
        assert len(long["token_ids"]) == OUTPUT
        assert free["token_ids"] == oracle.greedy(prompts()[1], OUTPUT)  # As without those beside it.
        assert tokenizer.decode(short["token_ids"]) in ("a c", "a b c")
        assert short["finish_reason"] == "stop"
        assert processes.wait(0, IN_TIME) == 0
        assert processes.wait(1, IN_TIME) == 0


class Server:
    """A server on two hosts.

    Args:
        before: Python to run in host 0's process first.
    """

    def __init__(self, processes: Processes, directory: Path, before: str = "", **settings: Any) -> None:
        port, self.port = two_free_ports(), two_free_ports()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {**ENGINE, **settings, "nnodes": 2, "master_port": port}
        arguments = [str(directory), *flags({**settings, "port": self.port, "host": "127.0.0.1"})]
        code = f"import sys; {before or 'pass'}; from jaxllm.serve.__main__ import main; sys.exit(main())"
        processes.start(["-c", code, *arguments])
        # The same command, but for its number: it has what host 0 has.
        processes.start(["-m", "jaxllm.serve", *arguments, "--node-rank=1"])
        deadline = time.monotonic() + START
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert processes.started[0].poll() is None, processes.said(0)
            assert time.monotonic() < deadline, processes.said(0)
            time.sleep(0.1)

    def complete(self, prompt: list[int], max_tokens: int, **fields: Any) -> str:
        """The answer's text; also of an error."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).text

    def last_words(self) -> str:
        """What /health says, once that is that something is wrong."""
        deadline = time.monotonic() + IN_TIME
        while time.monotonic() < deadline:
            health = httpx.get(f"{self.url}/health")
            if health.status_code != 200:
                assert health.status_code == 503
                return health.text
            time.sleep(0.1)
        raise AssertionError("the server goes on as if nothing were wrong")


def test_a_killed_host_ends_requests_and_server(model: tuple[Path, Oracle], tmp_path: Path) -> None:
    directory, oracle = model
    with Processes(tmp_path) as processes:
        server = Server(processes, directory, tensor_parallel_size=2)
        prompt = prompts()[0]
        answer = json.loads(server.complete(prompt, OUTPUT))
        assert answer["choices"][0]["token_ids"] == oracle.greedy(prompt, OUTPUT)
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            fields = {"n": 8, "temperature": 1, "stream": number == 0}
            answers[number] = server.complete(prompts()[number], 230, **fields)

        # One sequence runs, the others wait: thousands of steps.
        threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        started = time.monotonic()
        os.kill(processes.started[1].pid, signal.SIGKILL)
        health = server.last_words()
        assert "host 1 is gone" in health
        for thread in threads:
            thread.join(IN_TIME)
        assert len(answers) == 4
        assert all("host 1 is gone" in answer for answer in answers.values()), answers
        assert processes.wait(0, IN_TIME) == 1
        assert time.monotonic() - started < IN_TIME


def test_a_stopped_host_is_as_dead(tmp_path: Path) -> None:
    """Here a stage of a pipeline, while nobody asks for anything; when it goes on, it ends."""
    directory, oracle = model_of(tmp_path, layers=2)
    with Processes(tmp_path) as processes:
        # Otherwise this would take 15 seconds; that it is less than 30 is asserted elsewhere.
        patience = "import jaxllm.execution.hosts.group as g; g.SILENCE = 3.0"
        server = Server(processes, directory, patience, pipeline_parallel_size=2)
        answer = json.loads(server.complete(prompts()[1], OUTPUT))
        assert answer["choices"][0]["token_ids"] == oracle.greedy(prompts()[1], OUTPUT)
        os.kill(processes.started[1].pid, signal.SIGSTOP)
        assert "host 1 has not been heard of for" in server.last_words()
        refused = server.complete(prompts()[0], 3)
        assert "host 1 has not been heard of for" in refused
        assert processes.wait(0, IN_TIME) == 1
        os.kill(processes.started[1].pid, signal.SIGCONT)
        assert processes.wait(1, IN_TIME) == 1


def test_four_hosts_end_with_host_0(tmp_path: Path) -> None:
    """Two replicas of two stages, each in a process of its own."""
    directory, oracle = model_of(tmp_path, layers=2)
    port = two_free_ports()
    params = [{"temperature": 0, "max_tokens": OUTPUT}] * len(LENGTHS)
    with Processes(tmp_path) as processes:
        settings = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "data_parallel_size": 2}
        processes.start(offline(directory, 4, 1, port, params=params, settings=settings, forever=True))
        for host in (3, 1, 2):
            processes.start(other_host(host, 4, port))
        said = json.loads(processes.wait_for_line(0, "SAID ", START))
        assert said["tokens"] == [[oracle.greedy(prompt, OUTPUT)] for prompt in prompts()]
        os.kill(processes.started[0].pid, signal.SIGKILL)
        started = time.monotonic()
        assert [processes.wait(number, IN_TIME) for number in (1, 2, 3)] == [1, 1, 1]
        assert time.monotonic() - started < IN_TIME
        assert "host 0 is gone" in processes.said(1)


def test_a_start_that_cannot_be_says_why(model: tuple[Path, Oracle], tmp_path: Path) -> None:
    """A host that never comes; one with other settings; host 0 that is nowhere."""
    directory, _ = model
    where = {**ENGINE, "nnodes": 3, "tensor_parallel_size": 3, "distributed_timeout_seconds": 6}
    with Processes(tmp_path) as processes:
        port = two_free_ports()
        arguments = ["-m", "jaxllm.serve", str(directory), *flags({**where, "master_port": port, "port": 0})]
        processes.start(arguments)
        processes.start([*arguments, "--node-rank=2"])
        port = two_free_ports()
        arguments = ["-m", "jaxllm.serve", str(directory), *flags({**where, "master_port": port, "port": 0})]
        processes.start(arguments)
        processes.start([*arguments, "--node-rank=1", "--max-num-seqs=7"])
        processes.start(
            [*arguments[:2], *flags({"nnodes": 2, "node_rank": 1, "distributed_timeout_seconds": 1})]
        )
        for number in range(5):
            assert processes.wait(number, START) == 1
        assert "host 1 of 3 did not come to 127.0.0.1" in processes.said(0)
        assert "host 0 ended: host 1 of 3 did not come" in processes.said(1)
        assert "host 1 has max_num_seqs=7, and host 0 1" in processes.said(2)
        assert "host 1 has max_num_seqs=7, and host 0 1" in processes.said(3)
        assert "host 0 was not found at 127.0.0.1:29501 within 1 s" in processes.said(4)
