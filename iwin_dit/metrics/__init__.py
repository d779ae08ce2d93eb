"""Image metrics: what a distance is measured in, the distance itself, and the record that goes with every number.

Each network has one file, so has each metric. Nothing here knows the models, the data sets or accelerate: images come
in as uint8 tensors or as files, numbers go out as plain values with their settings.
"""
