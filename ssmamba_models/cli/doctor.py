"""`ssmamba doctor`: is this installation sound, and if not, what mends it."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from pathlib import Path

import click

from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.hub import check_hub
from ssmamba_models.cli.checks.kernels import BACKENDS, check_kernels
from ssmamba_models.cli.checks.machine import TORCH_FACTS, check_machine
from ssmamba_models.cli.checks.packages import CORE, IMPORT_EACH, OPTIONAL, check_packages
from ssmamba_models.cli.checks.probe import finish_probe, start_probe
from ssmamba_models.cli.options import check_json, json_option, write_results


@click.command()
@json_option
@click.pass_context
def command(ctx: click.Context, json_path: Path | None) -> None:
    """Check this installation and say how to mend it.

    Looks at versions, kernels, devices and the Hub's settings, and names the cure for what is amiss.

    \b
    Examples:
      ssmamba doctor
      ssmamba doctor --json report.json

    Exit code: 0 nothing is broken (a missing optional package is no fault), 1 something is, 2 bad input.
    """
    check_json(json_path)
    findings = _examine()
    problems = sum(finding.status == "problem" for finding in findings)
    if not write_results(json_path, {"findings": list(map(dataclasses.asdict, findings)), "problems": problems}):
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
    lines: list[str] = []
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        lines += ["", subject] if lines else [subject]
        for finding in group:
            lines.append(f"  {finding.status:<7}  {finding.name:<{width}}  {finding.text}")
            if finding.cure:
                lines.append(f"  {'':<7}  {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)
