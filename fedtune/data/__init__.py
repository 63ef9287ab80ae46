"""From files to token batches: reading, dividing among clients, encoding.

``load`` gives a :class:`Federation` of client shards, ``encode`` turns rows into
tokens, ``plan_order`` fixes the order of training and ``batches`` makes tensors.
"""

from fedtune.data.encode import Encoded, batches, encode, plan_order
from fedtune.data.partition import Federation, Shard, deal, digest, load, load_eval

__all__ = [
    "Encoded",
    "Federation",
    "Shard",
    "batches",
    "deal",
    "digest",
    "encode",
    "load",
    "load_eval",
    "plan_order",
]
