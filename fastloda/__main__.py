"""The entry point of `python -m fastloda`, which runs the command `fastloda`."""

import sys

from fastloda.synthesis.cli import main

sys.exit(main())
