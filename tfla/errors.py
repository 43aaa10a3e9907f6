"""What the person who called can put right; it imports nothing, so that `tfla --help` is quick."""


class RunError(Exception):
    """A run cannot start or go on as asked; the message is one line that says what to change."""
