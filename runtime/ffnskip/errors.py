"""The errors a user can cause, and the warnings. Each message is one plain sentence that says what to change."""


class FfnskipError(Exception):
    """A mistake in the input: the command line prints the sentence and exits with code 2."""


class ProfileError(FfnskipError):
    """A profile that cannot be read, breaks the schema, or belongs to another model."""


class UnsupportedModelError(FfnskipError):
    """A model whose feed-forward blocks cannot be wrapped, or not with proof that nothing else changed."""


class FfnskipWarning(UserWarning):
    """What a user should know before trusting the result; the command line prints the sentence."""
