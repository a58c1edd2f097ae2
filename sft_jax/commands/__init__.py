"""The commands, one per file. Each parses its arguments, calls one function, and imports its dependencies lazily."""
