"""``python -m pe_app`` is the command line."""

from pe_app.cli import main

main()
