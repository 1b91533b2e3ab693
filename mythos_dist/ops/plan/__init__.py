"""The planner: memory, communication, seconds and cost of a run, by formula."""
