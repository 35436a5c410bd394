"""The `kvcomp` command."""
