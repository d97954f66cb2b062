"""The command line of `python -m jaxllm.replay`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.replay.page import write_page
from jaxllm.replay.terminal import draw_step, interact
from jaxllm.scheduling.policies import load_policy
from jaxllm.scheduling.recording.schedule import Schedule, read_schedule
from jaxllm.scheduling.simulator import Summary, simulate, summarize
from jaxllm.scheduling.simulator.report import Outcome
from jaxllm.simulate import parse_policies, print_outcomes


def rerun(schedule: Schedule, options: argparse.Namespace) -> list[Outcome]:
    """What happened, what the simulator makes of it, and what it says of other policies.

    The second says how far the third can be trusted: it should be as the first.

    Raises:
        JaxLLMError: there is no such policy.
        ValueError: too little was recorded to know what a step costs.
    """
    header, traced, cost = schedule.header, schedule.trace(), schedule.cost()

    def outcome(name: str, policy: str, arguments: dict[str, object]) -> Outcome:
        simulation = simulate(
            traced.values(),
            schedule.config,
            cost,
            load_policy(policy, arguments),
            max_in_flight=header["max_in_flight"],
        )
        return Outcome(name, None, summarize(simulation, ttft=options.ttft, tpot=options.tpot), simulation)

    recorded = schedule.as_simulation()
    summary = summarize(recorded, ttft=options.ttft, tpot=options.tpot)
    own = header["policy"]
    outcomes = [Outcome(f"{own}, recorded", None, summary, recorded)]
    try:
        outcomes.append(outcome(f"{own}, simulated", own, header["policy_config"]))
    except ConfigError as error:
        print(f"The policy that was recorded is not simulated: {error}", file=sys.stderr)
    for name in options.policy:
        outcomes.append(outcome(name, name, options.scheduling_config.get(name, {})))
    return outcomes


def tiles_of(schedule: Schedule, summary: Summary) -> list[tuple[str, str]]:
    """What stands out of a recording, as names and values."""
    return [
        ("requests", f"{len(schedule.requests):,}"),
        ("steps", f"{len(schedule.steps):,}"),
        ("seconds", f"{summary.seconds:.1f}"),
        ("output tokens/s", f"{summary.output_tokens_per_second:,.1f}"),
        ("TTFT, mean", f"{summary.ttft.mean * 1e3:,.0f} ms"),
        ("TTFT, p99", f"{summary.ttft.p99 * 1e3:,.0f} ms"),
        ("TPOT, mean", f"{summary.tpot.mean * 1e3:,.1f} ms"),
        ("prompt tokens cached", f"{summary.cache_hit_rate:.0%}"),
        ("preemptions", f"{summary.num_preemptions:,}"),
        ("device busy", f"{summary.device_busy:.0%}"),
    ]


def describe(schedule: Schedule) -> tuple[str, str]:
    """A title, and a line below it."""
    header, config = schedule.header, schedule.config
    about = (
        f"{header['policy']} on {header['device']}, {header['dtype']}, recorded {header['started']}: "
        f"{'' if schedule.num_replicas == 1 else f'{schedule.num_replicas} replicas, each of '}at most "
        f"{config.max_num_batched_tokens:,} tokens of {config.max_num_seqs} requests a step, "
        f"{config.num_pages - 1:,} pages of {config.page_size}"
    )
    return f"Schedule of {header['model']}", about


def print_summary(schedule: Schedule, console: Console) -> None:
    """The figures of a recording."""
    title, about = describe(schedule)
    console.print(f"{title}\n{about}", highlight=False)
    table = Table(show_header=False)
    for name, value in tiles_of(schedule, summarize(schedule.as_simulation())):
        table.add_row(name, value)
    console.print(table)


def make_parser(program: str = "python -m jaxllm.replay") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Look at a schedule that --record-schedule wrote, and at what other policies would have "
        "made of it. Without an option: step by step in a terminal, the figures elsewhere.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path)
    add("--summary", action="store_true", help="print the figures")
    add("--step", type=int, metavar="N", help="print step N; -1 is the last")
    add("--html", type=Path, metavar="OUT", help="write it as a page that needs nothing beside it")
    add("--policy", type=parse_policies, default=[], metavar="NAME,...",
        help="simulate the same requests under other policies, with what steps cost here")  # fmt: skip
    add("--scheduling-config", type=json.loads, default={}, metavar="JSON",
        help='arguments by policy: {"mlfq": {"quantum": 512}}')  # fmt: skip
    add("--ttft", type=float, default=1.0, metavar="S", help="objective for goodput, in seconds")
    add("--tpot", type=float, default=0.05, metavar="S", help="objective for goodput, in seconds")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """Does what the options ask for.

    Raises:
        JaxLLMError, OSError, ValueError: a file or a policy cannot be used, or there is no such step.
    """
    schedule = read_schedule(options.file)
    if not schedule.steps:
        raise ValueError(f"{options.file} holds no step: the engine had nothing to do")
    chosen = options.step is not None or options.html or options.policy
    if options.step is not None:
        last = len(schedule.steps) - 1
        if not -1 <= options.step <= last:
            raise ValueError(f"--step {options.step}: there are steps 0 to {last}")
        console.print(draw_step(schedule, options.step % (last + 1)))
    if options.html:
        title, about = describe(schedule)
        write_page(
            options.html, schedule, title, about, tiles_of(schedule, summarize(schedule.as_simulation()))
        )
        console.print(f"{options.html} holds {len(schedule.steps)} steps; open it in a browser.")
    if options.policy:
        outcomes = rerun(schedule, options)
        print_outcomes(outcomes, f"{describe(schedule)[0]}: what happened, and what would have")
        left_out = len(schedule.requests) - len(outcomes[0].simulation.requests)
        if left_out:
            console.print(f"{left_out} requests that generated nothing, or had not ended, are left out.")
    if options.summary or not (chosen or (console.is_terminal and sys.stdin.isatty())):
        print_summary(schedule, console)
    elif not chosen:
        interact(schedule, console)


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.replay") -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser(program)
    options = parser.parse_args(argv)
    if not isinstance(options.scheduling_config, dict) or not options.scheduling_config.keys() <= set(
        options.policy
    ):
        parser.error(f"argument --scheduling-config: its keys must be among the policies, {options.policy}")
    try:
        console = Console()
        # Where the output goes to a file there is no width to keep to.
        run(options, console if console.is_terminal else Console(width=140))
    except (JaxLLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
