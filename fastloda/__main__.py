"""`python -m fastloda` is `fastloda`."""

import sys

from fastloda.cli import main

sys.exit(main())
