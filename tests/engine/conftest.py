"""Settings of the engine's tests."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """Errors that tests cause are not rendered: structlog's default draws each traceback, for seconds."""
    with structlog.testing.capture_logs():
        yield
