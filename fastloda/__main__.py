"""Run the command `fastloda` by `python -m fastloda`."""

import sys

from fastloda.synthesis.cli import main

sys.exit(main())
