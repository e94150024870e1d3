"""`ssmamba doctor`: is this installation sound, and if not, what mends it."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby

import click

from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.hub import check_hub
from ssmamba_models.cli.checks.kernels import BACKENDS, check_kernels
from ssmamba_models.cli.checks.machine import TORCH_FACTS, check_machine
from ssmamba_models.cli.checks.packages import CORE, IMPORT_EACH, OPTIONAL, check_packages
from ssmamba_models.cli.checks.probe import finish_probe, start_probe


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check versions, kernels, devices and the hub's settings, and name the cure for what is amiss.

    Exit code: 0 where nothing is broken (a missing optional package is no fault), 1 where something is.
    """
    findings = _examine()
    problems = sum(finding.status == "problem" for finding in findings)
    if as_json:
        click.echo(json.dumps({"findings": list(map(dataclasses.asdict, findings)), "problems": problems}, indent=2))
    else:
        click.echo(_report(findings))
        click.echo(f"\n{problems} problem{'s' if problems != 1 else ''} found" if problems else "\nnothing is broken")
    ctx.exit(1 if problems else 0)


def _examine() -> list[Finding]:
    # Importing torch takes seconds: one process does it, for all who ask about it.
    running = start_probe(IMPORT_EACH + TORCH_FACTS + BACKENDS, *CORE), start_probe(IMPORT_EACH, *OPTIONAL)
    core, optional = map(finish_probe, running)
    return [
        *check_packages(core, optional),
        *check_machine(core),
        *check_kernels(core),
        *check_hub(),
    ]


def _report(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        lines += ["", subject] if lines else [subject]
        for finding in group:
            lines.append(f"  {finding.status:<7}  {finding.name:<{width}}  {finding.text}")
            if finding.cure:
                lines.append(f"  {'':<7}  {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)
