"""The commands' output for people: every view draws the document that `--json` would print."""
