import sys

from s0kernels.cli import main

sys.exit(main())
