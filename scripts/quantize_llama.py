#!/usr/bin/env python
"""`ptq quantize`, from a clone."""

import sys

from ptq.cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
