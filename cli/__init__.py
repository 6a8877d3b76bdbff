"""The command lines: they parse, call the library, and print."""
