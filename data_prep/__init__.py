"""Preparation, offline and on the CPU: slides and measurements -> slide stores -> shards.

One module per stage, run as `python -m data_prep.<stage>`. Nothing here imports torch: what preparation and
training share lies in the base modules of `storm` (schema, genes, regions, store, shards, config).
"""
