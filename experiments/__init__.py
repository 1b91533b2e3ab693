"""Studies that compare many training runs; docs/loops.md quotes their results. Run them with the tools of tools/."""
