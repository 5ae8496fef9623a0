"""`python -m adapterkit`: the command, where its script is not on the path."""

from adapterkit_command import main

main()
