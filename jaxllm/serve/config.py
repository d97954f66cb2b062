"""What the server itself is told, beside the engine's arguments; every field is a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Arguments of the HTTP server; flags are the field names with dashes.

    Attributes:
        host: address to listen on; every address unless given.
        uds: listen on this Unix socket instead of host and port.
        uvicorn_log_level: log level of the HTTP server.
        disable_uvicorn_access_log: log no line per HTTP request.
        api_key: keys that /v1 routes demand as `Authorization: Bearer KEY`; none demands nothing.
        allowed_origins: origins that browsers may call from; empty turns CORS off.
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
        enable_dev_routes: serve /server_info and /reset_prefix_cache, which show and change
            the engine itself; not for the open internet.
        profile_dir: directory for what the JAX profiler records between /start_profile and /stop_profile;
            without it there are no such routes.
        shutdown_timeout: seconds that running requests get to finish after Ctrl-C or SIGTERM.
    """

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"
    disable_uvicorn_access_log: bool = False
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
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
    enable_dev_routes: bool = False
    profile_dir: str | None = None
    shutdown_timeout: float = 30.0
