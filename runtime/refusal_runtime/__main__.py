"""`python -m refusal_runtime` is the command `refusal`."""

import sys

from refusal_runtime.cli import main

sys.exit(main())
