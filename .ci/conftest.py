"""The fixtures of `make test` that slow tests share."""

from tests.conftest import copy, finished, project  # noqa: F401
