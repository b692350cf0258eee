"""Models written as files for other runtimes."""
