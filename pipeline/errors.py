"""What can go wrong, split by who can act.

PairsieveError
    UserError       the command line, recipe, machine file or pool is wrong; exit 2, nothing was computed
    RunError        storage, memory or a worker failed on named units; the rest finished; exit 1, a rerun retries those
    SchemaError     a stage broke its promise (columns, row count); nothing was written; exit 1
"""


class PairsieveError(Exception):
    """Base of every error that pairsieve raises on purpose; its text is the whole message."""


class UserError(PairsieveError):
    """A mistake that the user can mend: the message names the key or the file."""


class RunError(PairsieveError):
    """Units that could not be finished: the message names each and its cause."""


class SchemaError(PairsieveError):
    """A stage returned something else than it declares."""
