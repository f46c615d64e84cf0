"""What the commands show: every view draws the plain document that `--json` would print."""
