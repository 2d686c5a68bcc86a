"""`python -m sarqc`."""

from sarqc.cli import main

main()
