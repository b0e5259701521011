"""The one error that a user is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the thing and the remedy.

    The command line prints the sentence alone and exits with code 2 (`debug=true` adds the traceback).
    """
