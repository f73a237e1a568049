"""`python -m dapji` is the `dapji` command."""

from dapji.cli.main import main

main()
