"""Parallelism: the mesh of ranks, collectives, sharded layers, token dispatch, pipeline stages."""
