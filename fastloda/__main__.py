"""`python -m fastloda` is `fastloda`."""

import sys

from fastloda.synthesis.cli import main

sys.exit(main())
