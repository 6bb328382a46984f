"""``distloop doctor``: tries what a run will need, and says what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from distloop.ending import leave
from distloop.errors import ConfigError, DistloopError, WorldError, found_by_all, nearest

if TYPE_CHECKING:
    from distloop.doctor import Finding
    from distloop.world import World

SETTINGS_FOLLOW = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}

SECONDS = 600.0


@click.command(context_settings=SETTINGS_FOLLOW, short_help="Try what a run will need, and say what to do.")
@click.argument("target", default="digits")
@click.option("--json", "as_json", is_flag=True, help="Print JSON when all is done.")
@click.option("--only", "only", multiple=True, metavar="AREA", help="host, network, storage, software or ranks.")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def doctor(context: click.Context, target: str, as_json: bool, only: tuple[str, ...], traceback: bool) -> None:
    """Try what a run of TARGET, with the settings behind it, will need, and say what to do.

    Started as train is, it examines every host, lets the ranks meet and tries all collectives between them:

        torchrun --nproc-per-node 2 -m distloop doctor

    Alone it does so with two ranks of its own. Exit code 3 if something has failed.
    """
    from distloop.failure import guarded
    from distloop.orphans import follow_launcher

    follow_launcher()
    _leave_in_the_end()
    given = [target, *context.args]
    guarded(lambda: _examine(given, only, as_json=as_json), traceback=traceback)


def _examine(given: list[str], only: tuple[str, ...], *, as_json: bool) -> int:
    from distloop.doctor import AREAS, Context, Level, examine, show
    from distloop.doctor.findings import failed, hanging, ok
    from distloop.targets import resolve
    from distloop.world import World

    with found_by_all():
        for area in only:
            if area not in AREAS:
                raise ConfigError(f"command line --only: there is no area {area!r}{nearest(area, AREAS)}")
        arguments = ["digits", *given] if given[0].startswith("-") else given
        resolved = resolve(arguments[0], arguments[1:])
    say: Callable[[Any], None] = (lambda finding: None) if as_json else show.say
    findings: list[Finding] = []
    try:
        world = World.from_environment()
        findings.append(ok("launcher", _in_words(world)))
    except DistloopError as failure:
        world = World()
        findings.append(failed("launcher", failure, "mend what the launcher sets, or unset it"))
        only = only or tuple(area for area in AREAS if area != "ranks")
    if world.rank == 0:
        say(findings[0])
    found = Context(world, resolved.config, tuple(arguments))
    findings += examine(found, say, only=only, links=None if as_json else show.links)
    worst = any(finding.level == Level.FAILED for finding in findings)
    if world.rank == 0:
        if as_json:
            print(json.dumps({"findings": [f.as_json() for f in findings], "failed": worst}, indent=2))
        else:
            print(show.summary(findings), flush=True)
    if hanging():
        leave(WorldError.exit_code)  # a thread in foreign code would keep the process
    return WorldError.exit_code if worst else 0


def _in_words(world: World) -> str:
    from distloop.report import launch

    return launch.found() if world.launcher == "none" else f"{launch.found()} ({world.because})"


def _leave_in_the_end() -> None:
    """Whatever hangs, and in whatever code: this does not."""

    def end() -> None:
        print(f"distloop: doctor has not ended within {SECONDS:g} s: something hangs that has no timeout", flush=True)
        leave(WorldError.exit_code)

    last = threading.Timer(SECONDS, end)
    last.daemon = True
    last.start()
