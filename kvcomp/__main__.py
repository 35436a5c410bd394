"""`python -m kvcomp`: the command `kvcomp`, also in a checkout that is not installed."""

from kvcomp.cli.app import app

app(prog_name="kvcomp")
