"""``python -m fasternet`` is ``fasternet``."""

from fasternet.cli import main

main()
