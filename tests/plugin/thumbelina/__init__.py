"""Methods that join lilliput by the entry point in pyproject.toml: one idea a file."""
