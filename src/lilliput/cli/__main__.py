"""`python -m lilliput.cli`."""

from lilliput.cli import main

main()
