"""The one exception that users meet."""


class EmonbError(Exception):
    """A user's mistake or damaged input: the message names the file, the field and the remedy.

    The command line prints the message alone; a notebook shows it as the last line of the traceback.
    """

    exit_code = 1


class StoppedEarly(EmonbError):
    """A run that asks a paid model ended before all was asked: a limit on the cost, or useless answers in a row."""

    exit_code = 3


class UnreadablePicture(EmonbError):
    """A file that is no picture, or a damaged one: the rest of the dataset can do without it."""


class PassingTrouble(EmonbError):
    """Disk, network or memory fail, not the file: to leave it out would be wrong, so that the run stops."""
