"""``python -m vpdeploy``."""

from vpdeploy.cli.main import main

main()
