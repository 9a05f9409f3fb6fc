"""``python -m medfusion`` is ``medfusion``."""

from medfusion.cli.main import main

main()
