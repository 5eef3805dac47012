"""Small dense networks to start from: plain modules, one paper a file."""
