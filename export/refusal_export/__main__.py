"""`python -m refusal_export` is the command `refusal-export`."""

import sys

from refusal_export.cli import main

sys.exit(main())
