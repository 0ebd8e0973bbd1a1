"""`python -m sidstream` is `sidstream`."""

from sidstream.cli import main

main()
