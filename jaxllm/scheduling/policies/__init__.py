"""The policies that are built in, and how one is found by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from typing import Any, cast

from jaxllm.errors import ConfigError
from jaxllm.scheduling.policies.batching import DecodeFirst, PrefillFirst
from jaxllm.scheduling.policies.fairness import MultiLevelFeedback, VirtualTokenCounter
from jaxllm.scheduling.policies.order import (
    EarliestDeadlineFirst,
    FirstComeFirstServed,
    LongestPrefixFirst,
    Priority,
    ShortestJobFirst,
    ShortestRemainingFirst,
)
from jaxllm.scheduling.policy import SchedulingPolicy

BUILT_IN: dict[str, Callable[..., SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "prefill-first": PrefillFirst,
    "sarathi": DecodeFirst,
    "sjf": ShortestJobFirst,
    "srtf": ShortestRemainingFirst,
    "mlfq": MultiLevelFeedback,
    "vtc": VirtualTokenCounter,
    "edf": EarliestDeadlineFirst,
    "lpm": LongestPrefixFirst,
}
ENTRY_POINTS = "jaxllm.scheduling_policies"
"""Group of the entry points under which packages offer policies."""


def load_policy(name: str, config: Mapping[str, Any] | None = None) -> SchedulingPolicy:
    """The policy of that name: built in, offered by an installed package, or a class `module:Class`.

    Args:
        config: arguments of the class.

    Raises:
        ConfigError: there is no such policy, or it cannot be made of these arguments.
    """
    try:
        policy = _find(name)(**(config or {}))
    except ConfigError:
        raise
    except Exception as error:
        raise _cannot_be_loaded(name, f" with {dict(config)}" if config else "", error) from error
    if not isinstance(policy, SchedulingPolicy):
        raise ConfigError(
            f"scheduling_policy {name!r} gives a {type(policy).__name__}, not a policy; derive it from "
            "jaxllm.scheduling.SchedulingPolicy, which has defaults for everything.",
            param="scheduling_policy",
        )
    return policy


def terms_of(name: str) -> Collection[str] | None:
    """The scheduling terms that the policy of that name goes by; None where it may go by all.

    Raises:
        ConfigError: there is no such policy.
    """
    try:
        return cast(Collection[str] | None, getattr(_find(name), "terms", None))
    except ConfigError:
        raise
    except Exception as error:
        raise _cannot_be_loaded(name, "", error) from error


def _cannot_be_loaded(name: str, arguments: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"scheduling_policy {name!r} cannot be loaded{arguments}: {type(error).__name__}: {error}. "
        "Give an importable module and a class in it, and in scheduling_config its arguments.",
        param="scheduling_policy",
    )


def _find(name: str) -> Callable[..., Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, class_name = name.partition(":")
    if colon and module_name and class_name:
        return cast(Callable[..., Any], getattr(importlib.import_module(module_name), class_name))
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in offered:
        return cast(Callable[..., Any], offered[name].load())
    raise ConfigError(
        f"scheduling_policy is {name!r}; it must be one of {', '.join([*BUILT_IN, *sorted(offered)])}, "
        "or `module:Class` for a policy of your own.",
        param="scheduling_policy",
    )
