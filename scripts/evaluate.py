#!/usr/bin/env python
"""`ptq evaluate`, from a clone."""

import sys

from ptq.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
