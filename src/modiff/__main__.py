"""`python -m modiff` is `modiff`."""

from modiff.cli import app

app(prog_name="modiff")
