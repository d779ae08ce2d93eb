"""Evaluation: images from a model or from disk, measured against a reference, with the record that makes it comparable.

Joins metrics, pipelines and image sources; the command line and the training loop both come here. accelerate stays
outside: processes are torch.distributed's.
"""
