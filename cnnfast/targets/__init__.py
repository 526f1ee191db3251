"""A model by its name, and inputs for it: what a user names on the command line, or later in a recipe for training.

naming.py says what a name may be, libraries.py looks it up among published models, files.py in the user's own code,
and inputs.py finds a shape that the model takes. Nothing here knows of the command line: what cannot be had raises
TargetError, whose message says what would be right.
"""
