"""`python -P -m adapterkit`: the command, where its script is not on the path."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory: what lies there is not installed

from adapterkit_command import main

main()
