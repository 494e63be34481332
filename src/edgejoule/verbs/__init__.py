"""The verbs of the command line, in groups: one short function a verb: parse, call, print. ``cli.py`` lists them."""
