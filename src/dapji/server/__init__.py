"""HTTP: other programs' clients talk to Dapji in the protocols that they have.

Needs starlette and uvicorn (the extra `serve`); `dapji.cli.serve` imports this on use.
"""
