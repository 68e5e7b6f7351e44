"""The errors that a user can cause and mend; every message says what was given, what was wanted, what to do."""


class UserError(ValueError):
    """Something given by the user cannot be used. Jobs print the message alone and exit with 2."""


class Refused(ValueError):
    """One image cannot be used; the message is the reason recorded in its row."""
