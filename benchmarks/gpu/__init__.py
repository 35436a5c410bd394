"""One GPU measured by one script, `run.sh`."""
