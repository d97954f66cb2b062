"""What the server itself is told, beside the engine's arguments; every field is a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.errors import ConfigError

# Limits of which a server with none, or less than none, would answer nobody.
_POSITIVE = (
    "max_connections",
    "request_timeout",
    "write_timeout",
    "max_request_bytes",
    "max_sequences_per_request",
    "h11_max_incomplete_event_size",
    "h11_max_header_count",
)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Arguments of the HTTP server; flags are the field names with dashes.

    Attributes:
        host: address to listen on; every address unless given.
        uds: listen on this Unix socket instead of host and port.
        uvicorn_log_level: log level of the HTTP server.
        disable_uvicorn_access_log: log no line per HTTP request.
        disable_access_log_for_endpoints: paths, with commas between, whose requests get no line.
        log_format: "json" writes each line of the log as an object, with the id of its request.
        api_key: keys that every route but /health, /ping and the page's own files demands as
            `Authorization: Bearer KEY`; several, or the flag several times, are all valid; none demands none.
        allowed_origins: origins that browsers may call from; empty turns CORS off.
        ssl_cert_reqs: whether clients need a certificate: 0 no, 1 checked where they have one, 2 yes.
        headless: serve nothing on this host, which is not host 0; what hosts but the first do anyway.
        root_path: prefix under which a proxy serves this server.
        served_model_name: names the API knows the model by, the first of them in responses.
        chat_template: file with a Jinja template, or the template itself, instead of the tokenizer's.
        chat_template_content_format: whether a template gets message contents as strings or as lists of
            parts; "auto" looks at the template.
        trust_request_chat_template: let a request bring a template of its own.
        enable_auto_tool_choice: let the model decide by itself to call tools; needs tool_call_parser.
        tool_call_parser: what finds the calls in what the model writes: hermes, llama3_json, mistral, ...
        tool_parser_plugin: Python file that registers a tool parser of one's own.
        exclude_tools_when_tool_choice_none: keep tools from the prompt where "tool_choice" is "none".
        reasoning_parser: what tells reasoning from the answer: deepseek_r1, qwen3, ...
        response_role: role of the messages that the model writes.
        return_tokens_as_token_ids: show tokens in logprobs as "token_id:N".
        enable_prompt_tokens_details: report cached prompt tokens in `usage`.
        enable_force_include_usage: send usage in every stream.
        enable_log_requests: log each request's prompt and parameters.
        max_log_len: characters of a prompt that are logged; all of them unless given.
        enable_tokenizer_info_endpoint: serve /tokenizer_info, which shows the tokenizer's settings and the
            chat template.
        disable_page: serve no page at / and no /engine/events, from which the page draws the engine at work.
        enable_dev_routes: serve /server_info, /reset_prefix_cache, /sleep and /wake_up, which show and
            change the engine itself; not for the open internet.
        profile_dir: directory for what the JAX profiler records between /start_profile and /stop_profile;
            without it there are no such routes.
        max_num_queued_reqs: sequences that wait or run at once; further ones get a 503 with Retry-After.
        max_num_queued_tokens: prompt tokens that wait for their first output; once there are as many, a
            further request gets a 503 with Retry-After. Objective of the first token, in seconds, times
            prompt tokens that the engine computes a second, is a good value.
        max_connections: connections at once, busy or idle; a further one gets a 503.
        request_timeout: seconds that a client may take to send a request, its body included.
        write_timeout: seconds that a client may read nothing of an answer that waits for it.
        max_request_bytes: bytes of a request's body.
        max_sequences_per_request: prompts times n of one request.
        h11_max_incomplete_event_size: bytes of a request's headers.
        h11_max_header_count: headers of a request.
        response_store_size: how many responses of /v1/responses are kept, to be fetched or gone on from.
        shutdown_timeout: seconds that running requests get to finish after Ctrl-C or SIGTERM.
    """

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: str | None = None
    log_format: Literal["text", "json"] = "text"
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: Literal[0, 1, 2] = 0
    headless: bool = False
    root_path: str = ""
    enable_request_id_headers: bool = False
    disable_fastapi_docs: bool = False
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    trust_request_chat_template: bool = False
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    tool_parser_plugin: str | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_parser: str | None = None
    response_role: str = "assistant"
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_log_requests: bool = False
    max_log_len: int | None = None
    enable_tokenizer_info_endpoint: bool = False
    disable_page: bool = False
    enable_dev_routes: bool = False
    profile_dir: str | None = None
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    max_connections: int = 8192
    request_timeout: float = 60.0
    write_timeout: float = 60.0
    max_request_bytes: int = 32 * 2**20
    max_sequences_per_request: int = 16384
    h11_max_incomplete_event_size: int = 64 * 2**10
    h11_max_header_count: int = 256
    response_store_size: int = 1000
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not value > 0:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {value:g} must be above 0.", param=name)
