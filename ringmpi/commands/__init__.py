"""One file for each subcommand: `add_arguments(parser)` and `run(arguments) -> exit code`.

They are imported only when their command runs, and import what is heavy only in `run`.
"""
