"""Slide stores -> shards, in parts that also run apart: a plan, shards by pools of slides, the end.

sources tells which stores are packed, plan divides their groups into shards, write writes the shards of a pool, finish
makes index, manifest and card of them. All is a function of the stores and the config: tasks need not know of each
other.
"""
