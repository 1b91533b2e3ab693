"""mythos_dist: train the OpenMythos Recurrent-Depth Transformer, from a laptop to a cluster."""

__version__ = "0.1.0"
