"""The one exception that is meant for people."""


class UserError(Exception):
    """Input that a person can mend.

    The message is one line: what was wrong, which file, subject or field, the offending value, and what
    would be right. The command line prints it without a traceback and exits with code 2.
    """
