"""`python -m dist_transformer` is the command `dist-transformer`."""

import sys

from dist_transformer.cli import main

sys.exit(main())
