"""``python -m backend`` is the command ``geoprelabel``."""

from .cli import main

main()
