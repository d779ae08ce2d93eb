"""Image metrics: the networks, statistics of their features, what is computed from these, and files of images.

Each network has one file; statistics stream, over batches, attempts and processes, and distances are functions of what
they give. Nothing here knows the models, the data sets or accelerate: images come in as uint8 tensors or as files,
numbers go out as plain values with their settings.
"""
