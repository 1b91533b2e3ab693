"""Evaluation on tasks and texts: log-likelihoods and answers of a checkpoint or of a run, over the number of loops."""
