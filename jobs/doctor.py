"""`pairsieve doctor`, also `python -m jobs.doctor`: versions, the device really used, and what is missing."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.entry import DONE, FAILED, main
from pipeline.machine import load_machine


def doctor(
    machine: Annotated[str | None, typer.Option(help="Machine file. [default: this machine]")] = None,
) -> int:
    """Say what is installed, what computes, and what is missing; exit 1 if something is wrong."""
    # torch takes seconds to import: only here.
    from pipeline.doctor import facts, findings

    here = load_machine(machine)
    found = list(findings(facts(here), here))
    for finding in found:
        print(f"{finding.level:>7}  {finding.what}: {finding.detail}")
    faults = [finding.what for finding in found if finding.level == "fault"]
    if faults:
        print(f"pairsieve: not fit to run: {', '.join(faults)}", file=sys.stderr)
    return FAILED if faults else DONE


if __name__ == "__main__":
    sys.exit(main([doctor]))
