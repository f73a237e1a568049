"""The command line: one file per command, each parses, calls, prints. stdout is data, stderr is talk.

Top layer: nothing imports it. Commands are imported on use, so that `dapji --help` answers at once.
"""
