"""Run commands as a user types them, in this process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from mochi import cli


class Done(NamedTuple):
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Done:
    """Run `mochi ARGUMENTS` in this process; a traceback fails the test that calls it."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mochi", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refused(*arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 1, done
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    return done.stderr
