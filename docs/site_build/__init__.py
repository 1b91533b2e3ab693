"""What builds the documentation site besides Sphinx: pages made of the code, links, figures (docs/conf.py uses it)."""
