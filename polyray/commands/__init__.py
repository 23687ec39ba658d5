"""The commands of the command line, each a function with its options; `cli.py` puts them together.

`sweeps` are those that work on a cluster, `datasets` those that need an OUT alone; `terminal` is how all of them speak
and with which exit codes they end.
"""
