"""The one exception whose message is written for users."""


class UserError(Exception):
    """Input that the user can correct.

    The message is one line: what was wrong, in which file, subject or field, the wrong value, and what would
    be right. The command line prints it without a traceback and exits with code 2.
    """


class StorageError(OSError):
    """What a search knows cannot be written: everything stops, and the run can be resumed."""
