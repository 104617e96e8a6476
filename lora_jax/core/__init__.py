"""The idea: three trees, a rewrite, and the arithmetic between them. Read leaves.py first."""
