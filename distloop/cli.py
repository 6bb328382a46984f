"""The command line: ``distloop train``, ``launch``, ``doctor`` and what else there is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from distloop import __version__
from distloop.checkpoint_cli import checkpoint
from distloop.doctor_cli import doctor
from distloop.env_cli import env
from distloop.errors import ConfigError, found_by_all
from distloop.launch_cli import launch
from distloop.signals import Caught
from distloop.targets import SETTINGS_FOLLOW, TRAIN, Given, resolve

if TYPE_CHECKING:
    from distloop.records import Result
    from distloop.settings import Resolved
    from distloop.world import World

SETTINGS_HELP = """
Any value of the configuration can be set behind TARGET by its dotted key, as in --optimizer.lr 0.1, or by an
environment variable, as in DISTLOOP_OPTIMIZER__LR=0.1; the command line wins over the environment, the environment
over the file. distloop config TARGET lists all keys."""


class _Command(click.Command):
    """A command whose help ends with how settings are given."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        with formatter.section("Settings"):
            formatter.write_text(" ".join(SETTINGS_HELP.split()))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distloop")
def cli() -> None:
    """One readable training loop, and any way of collecting gradients behind it."""


@cli.command(
    cls=_Command, params=list(TRAIN), context_settings=SETTINGS_FOLLOW, short_help="Train a configuration or a task."
)
@click.pass_context
def train(context: click.Context, target: str | None, resume: str | None, ranks: int | None, traceback: bool) -> None:
    """Train what TARGET says.

    TARGET is a configuration file, a supplied task (digits, gan, ...), or a task of your own as package.module:Class.
    With --resume PATH it may be left out: the run's own configuration counts.

    Alone this trains in one process. Under torchrun every rank does its part:

        torchrun --nproc-per-node 4 -m distloop train configs/digits.yaml
    """
    from distloop.failure import guarded
    from distloop.orphans import follow_launcher

    follow_launcher()

    def work() -> int:
        from distloop.world import World

        world = World.from_environment()
        with found_by_all():
            _check_simulation(ranks, world)
            resolved = Given(target, resume, ranks, traceback, tuple(context.args)).resolved()
        from distloop.api import run

        return (run(resolved, world) if ranks is None else _simulate(resolved, ranks)).exit_code

    guarded(work, traceback=traceback)


@cli.command(cls=_Command, context_settings=SETTINGS_FOLLOW, short_help="Show every value and where it is from.")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def config(context: click.Context, target: str, as_json: bool, traceback: bool) -> None:
    """Print the configuration that TARGET comes to: every value, and where it came from."""
    from distloop.failure import guarded

    def work() -> int:
        resolved = resolve(target, context.args)
        from distloop.build import check

        check(resolved)
        _print_config(resolved, as_json=as_json)
        return 0

    guarded(work, traceback=traceback)


@cli.command(cls=_Command, context_settings=SETTINGS_FOLLOW, short_help="Measure how fast ranks sum gradients.")
@click.argument("target", default="digits")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def calibrate(context: click.Context, target: str, traceback: bool) -> None:
    """Measure the ways to sum gradients between these ranks, and remember the fastest for strategy.name auto.

    Started as train is; of TARGET's settings those of world and strategy.wire_dtype count:

        torchrun --nproc-per-node 4 -m distloop calibrate
    """
    from distloop.failure import guarded

    def work() -> int:
        from distloop.world import World

        world = World.from_environment()
        with found_by_all():
            only_settings = target.startswith("-")
            resolved = resolve("digits" if only_settings else target, [target] * only_settings + context.args)
        from distloop.api import calibrate

        costs = calibrate(resolved, world).costs
        if world.rank == 0:
            print(
                f"milliseconds on {world.size} ranks, measured in {costs.took:.1f} s (* the fastest):\n{costs.table()}"
            )
            print(f"auto takes {costs.describe()}")
        return 0

    guarded(work, traceback=traceback)


@cli.command(context_settings=SETTINGS_FOLLOW, short_help="Draw learning curves of runs, or a schedule.")
@click.argument("runs", nargs=-1)
@click.option("--schedule", metavar="TARGET", help="Draw the learning rate of a run that has not begun.")
@click.option("--output", help="The picture: .png, .pdf, .svg or .jpg  [default: plot.png or schedule.png]")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="A panel to draw; may be given repeatedly.")
@click.option(
    "--x", type=click.Choice(["step", "epoch", "seconds"]), default="step", show_default=True, help="Abscissa."
)
@click.option("--smooth", type=click.IntRange(1), default=1, metavar="N", help="Mean over N training records.")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def plot(
    context: click.Context,
    runs: tuple[str, ...],
    schedule: str | None,
    output: str | None,
    metrics: tuple[str, ...],
    x: str,
    smooth: int,
    traceback: bool,
) -> None:
    """Draw the learning curves of RUNS, run directories, finished or not, into one picture.

    Several runs are told apart by the settings in which they differ:

        distloop plot runs/*

    With --schedule, draw the learning rate of a run before it begins; TARGET and settings are those of train:

        distloop plot --schedule configs/digits.yaml --schedule.name one_cycle
    """
    from distloop.failure import guarded

    def work() -> int:
        from distloop.plot import check_request

        picture = Path(output or ("plot.png" if schedule is None else "schedule.png"))
        given = context.get_parameter_source
        asked = [f"--{name}" for name in ("x", "smooth") if given(name) is click.core.ParameterSource.COMMANDLINE]
        check_request(runs, schedule, picture, [*(["--metric"] if metrics else []), *asked])
        if schedule is None:
            from distloop.plot.runs import plot_runs

            print(plot_runs(runs, picture, x=x, metrics=metrics, smooth=smooth))
        else:
            from distloop.plot.schedule import plot_schedule

            print(plot_schedule(resolve(schedule, list(runs)), picture))
        return 0

    guarded(work, traceback=traceback)


cli.add_command(checkpoint)
cli.add_command(env)
cli.add_command(doctor)
cli.add_command(launch)


def _check_simulation(ranks: int | None, world: World) -> None:
    if ranks is not None and world.size > 1:
        raise ConfigError(
            f"command line: --simulate {ranks} makes its ranks in one process, and {world.launcher} started "
            f"{world.size}: leave out one of them"
        )


def _simulate(resolved: Resolved, ranks: int) -> Result:
    from distloop.api import simulate, simulated

    chosen, default = simulated(resolved).config.strategy.name, resolved.config.strategy.name
    why = (
        ""
        if chosen == default or ranks == 1
        else f"; strategy {chosen}, because {default}, the default, needs processes"
    )
    print(f"{'simulated':<14}{ranks} rank{'s' if ranks > 1 else ''} in one process, one at a time{why}", flush=True)
    return simulate(resolved, ranks)


def _print_config(resolved: Resolved, *, as_json: bool) -> None:
    import json

    found = [*resolved.rows(), *_of_the_task(resolved)]
    rows = [{"key": key, "value": value, "source": source} for key, value, source in found]
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    from rich.console import Console
    from rich.text import Text

    shown = ((row["key"], json.dumps(row["value"], default=str), row["source"]) for row in rows)
    texts = [("key", "value", "from"), *shown]
    keys, values = (max(len(text[column]) for text in texts) for column in (0, 1))
    console = Console(highlight=False, soft_wrap=True)
    for key, value, source in texts:
        style = "bold" if key == "key" else "dim" if source == "default" else ""
        console.print(Text(f"{key:<{keys}}  {value:<{min(values, 24)}}  {source}", style=style))


def _of_the_task(resolved: Resolved) -> list[tuple[str, Any, str]]:
    """Return the arguments of the task that were not set, with their defaults."""
    import inspect

    from distloop.tasks import check_options, find_task

    task, source = resolved.config.task, resolved.source("task.name")
    make = find_task(task.name, source)
    check_options(make, task.name, task.options, source, resolved.sources)
    return [
        (f"task.{name}", parameter.default, "default")
        for name, parameter in inspect.signature(make).parameters.items()
        if name not in task.options and parameter.default is not parameter.empty
    ]


def _quiet_torch() -> None:
    """Keep C++ backtraces off the screen when a peer is gone; what happened is said in one sentence."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main(arguments: list[str] | None = None, run: Callable[..., object] = cli.main) -> NoReturn:
    """Entry point of the ``distloop`` command."""
    _quiet_torch()
    with Caught(None, patience=0.2):  # until a run asks for more, also while torch is imported
        run(args=arguments, prog_name="distloop")
    raise SystemExit(0)
