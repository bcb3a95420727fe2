"""The console script `pairsieve`: every command under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import curate, entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return entry.main([curate.run], argv)


if __name__ == "__main__":
    sys.exit(main())
