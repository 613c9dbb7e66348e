"""The start of a run: every check that can be made before the first file is written, and the dry run."""
