"""What every user error must look like."""

from collections.abc import Callable

import pytest

from ffnskip.errors import FfnskipError


def sentence(call: Callable[[], object]) -> str:
    """The message of the user error that `call` raises: one line, no full stop."""
    with pytest.raises(FfnskipError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message
