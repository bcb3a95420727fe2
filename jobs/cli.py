"""The console script `pairsieve`: every command under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import curate, doctor, entry, explain, gc, plan, report, sample, status, train_filter, verify

COMMANDS = (
    curate.run,
    plan.plan,
    explain.explain,
    verify.verify,
    report.report,
    status.status,
    sample.sample,
    doctor.doctor,
    train_filter.train_filter,
    gc.gc,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return entry.main(COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
