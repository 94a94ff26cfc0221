"""The one exception that users meet, and what its words may be."""


def visible(text: object) -> str:
    """A name or a model's text that cannot steer a terminal or a page: what does not print becomes an escape.

    Control and format characters, such as those that turn the direction of writing, and bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


class EmonbError(Exception):
    """A user's mistake or damaged input: the message names the file, the field and the remedy.

    The command line prints the message alone; a notebook shows it as the last line of the traceback. Arguments are
    its lines; names of strangers in them are made `visible` here.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(map(visible, self.args))


class StoppedEarly(EmonbError):
    """A run that asks a paid model ended before all was asked: a limit on the cost, or useless answers in a row."""

    exit_code = 3


class UnreadablePicture(EmonbError):
    """A file that is no picture, or a damaged one: the rest of the dataset can do without it."""


class PassingTrouble(EmonbError):
    """Disk, network or memory fail, not the file: to leave it out would be wrong, so that the run stops."""
