"""`python -m ptq.cli`, which is `ptq`."""

import sys

from ptq.cli import main

sys.exit(main())
