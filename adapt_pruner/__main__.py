"""`python -m adapt_pruner`, which torchrun needs: the same as `adapt-pruner`."""

import sys

from adapt_pruner.cli import main

sys.exit(main())
