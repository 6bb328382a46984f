"""``distloop env``: what a bug report needs."""

from __future__ import annotations

import json

import click


@click.command(short_help="Show what a bug report needs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def env(as_json: bool) -> None:
    """Show versions, machine, launcher and variables, for a bug report.

    Of the environment only variables of launchers and of what computes are shown, and what looks like a secret is
    blanked in them. Whatever cannot be read says why; the exit code is 0.
    """
    from distloop import report

    found = report.collect()
    print(json.dumps(found, indent=2) if as_json else report.text(found))
