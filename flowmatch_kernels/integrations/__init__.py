"""Drop-in replacements for the samplers of other projects, one module for each: `alpamayo`, `lerobot`, `openpi`.

Importing this package imports none of them, and importing one of them does not import the project it is for.
"""
