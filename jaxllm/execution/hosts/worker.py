"""What runs on every host but the first: the commands of host 0, one after the other."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from typing import Any

import jax

from jaxllm.config import EngineConfig
from jaxllm.errors import JaxLLMError
from jaxllm.execution.build import build_runner, read_model
from jaxllm.execution.commands import Command
from jaxllm.execution.hosts.executor import digest_of
from jaxllm.execution.hosts.link import HostLink
from jaxllm.execution.hosts.startup import READY, check_hosts, follow_host_0
from jaxllm.execution.hosts.wire import CommandCodec
from jaxllm.execution.platform import current_platform
from jaxllm.execution.resolve import resolve
from jaxllm.execution.runner import Runner
from sharding import leave_hosts

logger = logging.getLogger(__name__)


def run_worker(config: EngineConfig) -> int:
    """Takes part in a model that host 0 serves, until that stops; returns the exit status.

    The process ends with status 1 at any time when host 0, or any other host, is gone or hangs.

    Args:
        config: says which host this is and where host 0 is; where it says more, host 0 must agree.
    """
    try:
        check_hosts(config)
        link, config = follow_host_0(config)
    except JaxLLMError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    try:
        runner = _load(config, link)
    except BaseException as error:
        logger.debug("host %d cannot take part", link.host, exc_info=error)
        link.fail(error)
    logger.info("Host %d takes part; host 0 has %s.", link.host, config.master_addr)
    link.started()
    try:
        _follow(runner, link)
    except BaseException as error:
        logger.debug("host %d cannot go on", link.host, exc_info=error)
        link.fail(error)
    # Host 0 waits for all to part, so nothing that takes long comes before it.
    leave_hosts()
    runner.close()
    return 0


def _load(config: EngineConfig, link: HostLink) -> Runner:
    path, model = read_model(config)
    platform = current_platform()
    config = resolve(config, model, platform)
    runner, _ = build_runner(config, model, path, platform, progress=not config.disable_log_stats, hosts=link)
    link.ready = runner.compiler.ready_numbers
    link.gather(READY, link.ready())
    return runner


def _follow(runner: Runner, link: HostLink) -> None:
    """Does what host 0 says until it says stop."""
    codec = CommandCodec()
    results: queue.SimpleQueue[tuple[int, Command, Any]] = queue.SimpleQueue()
    threading.Thread(target=_note_results, args=[results, link], name="jaxllm-results", daemon=True).start()
    while (message := link.receive()).header["kind"] != "stop":
        number, command = codec.decode(message)
        link.status["started"] = number
        results.put((number, command, runner.run(command)))
    link.close()


def _note_results(results: queue.SimpleQueue[tuple[int, Command, Any]], link: HostLink) -> None:
    """Waits for what was begun, in order, and notes what came of it."""
    while True:
        number, command, result = results.get()
        try:
            jax.block_until_ready(result)
            link.note_done(number, digest_of(command, result))
        except Exception as error:
            link.fail(error)
