"""From a command line to a server that listens, and from a signal to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

import jaxllm
from jaxllm.async_engine import AsyncEngine
from jaxllm.config import DEMO_MODEL, EngineConfig
from jaxllm.errors import ConfigError, HostError, JaxLLMError
from jaxllm.serve.app import build_app, load_chat_template, served_names
from jaxllm.serve.arguments import ServeArguments
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.connections import bounded_connections
from jaxllm.serve.logs import configure_logging
from jaxllm.serve.parsing import OutputParsers
from jaxllm.serve.state import ServerState
from jaxllm.serve.throughput_log import ThroughputLog

logger = logging.getLogger("jaxllm.serve")

# Seconds for which a server whose other hosts are gone still says so.
_LAST_WORDS = 5
# Seconds that answers get to leave their sockets once the engine has stopped.
_FLUSH_TIMEOUT = 5

# Objects that come, and do not go, between two rounds of the garbage collector.
_YOUNG_OBJECTS = 10_000

# Files that a server opens beside its connections.
_FILES_BESIDE = 512


def load_engine(config: EngineConfig) -> AsyncEngine:
    """The engine, loaded and on its own thread."""
    # JAX takes a second to import: not before the port is ours.
    from jaxllm.engine import Engine

    engine = Engine.from_config(config)
    served = AsyncEngine(engine)
    engine.on_failure(served.fail)
    return served


def follow(config: EngineConfig) -> int:
    """Take part in what another host serves; returns the exit status."""
    from jaxllm.execution.hosts.worker import run_worker

    return run_worker(config)


def launch(arguments: ServeArguments, load: Callable[[EngineConfig], AsyncEngine] = load_engine) -> int:
    """Load the model and serve until a signal says stop; returns the exit status.

    On hosts other than the first it serves nothing, and does what host 0 says.
    """
    configure_logging(arguments.server.log_format, quiet_paths(arguments.server))
    if arguments.engine.node_rank:
        return follow(arguments.engine)
    if arguments.server.headless:
        return _refuse(ConfigError("--headless is for hosts other than the first; give it a --node-rank."))
    names = served_names(arguments.engine.model, arguments.server)
    try:
        load_chat_template(arguments.server.chat_template)
        OutputParsers.from_config(arguments.server)
        _check_readable(arguments.server)
        # Before the model is loaded, so that a busy port costs no minutes.
        listener = bind(arguments.server)
    except JaxLLMError as error:
        return _refuse(error)
    raise_file_limit(arguments.server.max_connections)
    with contextlib.closing(listener):
        try:
            started = time.monotonic()
            engine = load(arguments.engine)
            logger.info("The engine is ready after %.1f s.", time.monotonic() - started)
        except JaxLLMError as error:
            return _refuse(error)
        except KeyboardInterrupt:
            print("Interrupted while the model was loading.", file=sys.stderr)
            return 130
        app = build_app(engine, arguments.server, model_names=names)
        is_demo = arguments.engine.model == DEMO_MODEL
        announcement = banner(arguments.server, listener, names[0], is_demo=is_demo)
        keep_for_good()
        server = DrainingServer(make_uvicorn_config(app, arguments.server), app.state.server, announcement)
        try:
            server.run(sockets=[listener])
        finally:
            engine.stop(timeout=_FLUSH_TIMEOUT)
            if arguments.server.uds is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(arguments.server.uds)
    return 0 if server.started and not engine.is_dead else 1


def keep_for_good() -> None:
    """Take what the process holds by now out of the garbage collector's rounds.

    Modules, the model and the application stay until the end. A full round through them finds nothing, and
    stops every stream for a tenth of a second or more.
    """
    gc.collect()
    gc.freeze()
    # With the default, a few tokens of some hundred streams make a round.
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


def bind(config: ServerConfig) -> socket.socket:
    """A socket that is bound to where the server shall listen, and does not listen yet.

    Raises:
        ConfigError: somebody else has the port or the path, or it cannot be had.
    """
    if config.uds is not None:
        return _bind_unix(config.uds)
    host = config.host or "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        # It does not listen yet: until the model is loaded, connections are refused and nobody waits.
        listener.bind((host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{config.port}: {error.strerror}. Stop what listens there, or choose"
            " another with --port (or --host).",
            param="port",
        ) from error
    listener.setblocking(False)
    return listener


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ConfigError(
                    f"--uds {path} is a file that is no socket; choose another path.", param="uds"
                )
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise ConfigError(f"Another server listens on --uds {path}.", param="uds")
            os.unlink(path)  # Left behind by a server that was killed.
        listener.bind(path)
    except OSError as error:
        listener.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"Cannot listen on --uds {path}: {error.strerror}.", param="uds") from error
    except ConfigError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _check_readable(config: ServerConfig) -> None:
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(config, name)
        if path is not None and not os.access(path, os.R_OK):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {path} cannot be read; give the path of a PEM file.", param=name)


def raise_file_limit(connections: int) -> None:
    """Let this process open a file for each of so many connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES_BESIDE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refuse(error: JaxLLMError) -> int:
    print(f"jaxllm: {error}", file=sys.stderr)
    return 1


def make_uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    return uvicorn.Config(
        app,
        log_level=config.uvicorn_log_level,
        access_log=not config.disable_uvicorn_access_log,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        # On h11, whose limits on headers are the ones that the flags set.
        http=bounded_connections(config),
        ws="none",
        h11_max_incomplete_event_size=config.h11_max_incomplete_event_size,
        log_config=None if config.log_format == "json" else uvicorn.config.LOGGING_CONFIG,
        root_path=config.root_path,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_TIMEOUT,
    )


def quiet_paths(config: ServerConfig) -> tuple[str, ...]:
    """The paths of `--disable-access-log-for-endpoints`."""
    listed = (config.disable_access_log_for_endpoints or "").split(",")
    return tuple(path.strip() for path in listed if path.strip())


def banner(config: ServerConfig, listener: socket.socket, model: str, *, is_demo: bool) -> str:
    """What the terminal says once the server listens: the model, where it is, and a request to paste."""
    scheme = "https" if config.ssl_certfile is not None else "http"
    if config.uds is not None:
        url, where, option = "http://localhost", f"unix socket {config.uds}", f"--unix-socket {config.uds} "
    else:
        host, port = listener.getsockname()[:2]
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        url, option = f"{scheme}://{host}:{port}", ""
        where = url
    key = ' -H "Authorization: Bearer $KEY"' if config.api_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    lines = [
        "",
        f"  jaxllm {jaxllm.__version__}",
        f"  model   {model}",
        f"  serves  {where}{config.root_path}/v1",
        *([] if config.disable_page or config.uds is not None else [f"  page    {url}{config.root_path}/"]),
        "",
    ]
    if is_demo:
        lines += [
            "  This is a tiny demo model that is bundled with jaxllm; it knows very little.",
            "  Serve a real one with: python -m jaxllm.serve DIRECTORY_OR_HUB_NAME",
            "",
        ]
    lines += [
        f"  curl {option}{url}{config.root_path}/v1/chat/completions{key} \\",
        f"    -H 'Content-Type: application/json' -d '{body}'",
        "",
    ]
    return "\n".join(lines)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, but a signal lets running requests finish, and meanwhile new ones get a 503.

    A second signal ends everything at once.

    Args:
        announcement: printed when the server listens.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, announcement: str = "") -> None:
        super().__init__(config)
        self._state = state
        self._announcement = announcement
        self._throughput_log = ThroughputLog()
        self._stop_requested = False
        self._draining: asyncio.Task[None] | None = None
        self._dead_since: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        try:
            # Two servers may hold one port until one of them listens. Asked here, since uvloop keeps
            # quiet about a socket that cannot listen, and would serve nobody.
            for sock in sockets or ():
                sock.listen(self.config.backlog)
        except OSError as error:
            logger.error("Cannot listen: %s. Another server took the port meanwhile.", error.strerror)
            self.should_exit = True
            return
        await super().startup(sockets)
        if self.started and self._announcement:
            print(self._announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; the loop sees to it within a tenth of a second."""
        if self._stop_requested:
            self.force_exit = True
            self.should_exit = True
        self._stop_requested = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: begin draining where a signal asked for it, and keep the log."""
        if not self._state.engine.engine.config.disable_log_stats:
            self._throughput_log.tick(self._state.engine.stats)
        if isinstance(self._state.engine.error, HostError):
            # Without the other hosts this process is of no use: it ends, so that somebody starts it again.
            self._dead_since = self._dead_since or time.monotonic()
            if time.monotonic() > self._dead_since + _LAST_WORDS:
                self.should_exit = True
        if self._stop_requested and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        state = self._state
        timeout = state.config.shutdown_timeout
        state.engine.start_draining()
        if state.requests_in_progress:
            logger.info(
                "Stopping: %d running requests may finish within %g s. A second signal stops at once.",
                state.requests_in_progress,
                timeout,
            )
        deadline = time.monotonic() + timeout
        while state.requests_in_progress and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if state.requests_in_progress:
            logger.warning("Aborting %d requests that are still running.", state.requests_in_progress)
        await state.engine.shutdown(drain=False)
        self.should_exit = True
