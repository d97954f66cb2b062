"""Routes that are there only where a flag asks for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from jaxllm.engine import Engine
from jaxllm.serve.config import ServerConfig
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import demo_tokenizer

ROUTES = [
    ("GET", "/tokenizer_info"),
    ("GET", "/server_info"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"),
    ("GET", "/is_sleeping"),
    ("POST", "/wake_up"),
    ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_their_flags_they_are_not_there(api: Api, method: str, path: str) -> None:
    assert api.request(method, path).status_code == 404


def test_with_them_they_are_and_want_a_key(tmp_path: Path) -> None:
    config = ServerConfig(
        enable_tokenizer_info_endpoint=True,
        enable_dev_routes=True,
        profile_dir=str(tmp_path),
        api_key=("secret",),
    )
    with serving(config) as api:
        profiled = []
        api.fake.start_profile = profiled.append  # type: ignore[attr-defined]
        api.fake.stop_profile = lambda: profiled.append("stop")  # type: ignore[attr-defined]
        slept: list[object] = []
        api.fake.is_sleeping = False  # type: ignore[attr-defined]
        api.fake.sleep = slept.append  # type: ignore[attr-defined]
        api.fake.wake_up = lambda tags: not slept.append(tags)  # type: ignore[attr-defined]
        key = {"Authorization": "Bearer secret"}
        for method, path in ROUTES:
            assert api.request(method, path).status_code == 401
            assert api.request(method, path, headers=key).status_code == 200
        assert profiled == [str(tmp_path), "stop"]
        assert api.request("POST", "/reset_prefix_cache", headers=key).json() == {"success": True}
        assert api.fake.resets == 2
        assert slept == [1, None]
        assert api.request("POST", "/sleep?level=2", headers=key).json() == {"status": "sleeping", "level": 2}
        assert api.request("POST", "/sleep?level=7", headers=key).status_code == 400
        awake = api.request("POST", "/wake_up?tags=weights&tags=kv_cache", headers=key).json()
        assert awake == {"status": "awake", "tags": ["weights", "kv_cache"]}
        assert slept[2:] == [2, ["weights", "kv_cache"]]
        info = api.get("/tokenizer_info", headers=key).json()
        assert info["tokenizer_class"] == type(demo_tokenizer()).__name__
        assert info["chat_template"] == demo_tokenizer().chat_template
        shown = api.get("/server_info", headers=key)
        assert shown.json()["engine_config"]["model"] == "demo"
        assert "secret" not in shown.text
        for path in ("/pooling", "/classify", "/score", "/rerank"):
            assert api.post(path, {}).status_code == 401


def test_a_profile_is_started_once_and_stopped_once(tmp_path: Path) -> None:
    """By JAX's profiler, of which a process has one: whoever comes at the wrong moment is told so."""
    with serving(ServerConfig(profile_dir=str(tmp_path))) as api:
        engine: Any = api.fake
        engine.start_profile = functools.partial(Engine.start_profile, engine)
        engine.stop_profile = functools.partial(Engine.stop_profile, engine)

        def refused(path: str, remedy: str) -> None:
            answer = api.request("POST", path)
            assert answer.status_code == 400, answer.text
            assert remedy in answer.json()["error"]["message"]

        for _ in range(2):
            refused("/stop_profile", "call start_profile first")
            assert api.request("POST", "/start_profile").status_code == 200
            refused("/start_profile", "call stop_profile first")
            assert api.request("POST", "/stop_profile").status_code == 200
        assert list(tmp_path.rglob("*.xplane.pb"))
