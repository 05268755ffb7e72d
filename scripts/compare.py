#!/usr/bin/env python
"""`ptq compare`, from a clone."""

import sys

from ptq.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
