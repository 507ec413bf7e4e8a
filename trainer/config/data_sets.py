"""The data sets by their names in a config: each is one entry here and one function in trainer/data.

The function takes (options, root, split) and returns a DataSet. Names only, since reading a config imports no torch.
"""

from __future__ import annotations

DATA_SETS = {
    "digits": "in_memory:digits",
    "mnist": "in_memory:mnist",
    "fashion_mnist": "in_memory:fashion_mnist",
    "cifar10": "in_memory:cifar10",
    "cifar100": "in_memory:cifar100",
    "lsun": "stored:lsun",
    "imagenet": "stored:imagenet",
    "folder": "stored:folder",
    "shards": "stored:shards",
    "pairs": "pairs:pairs",
    "fake": "in_memory:fake",
    "ring8": "in_memory:ring8",
    "grid25": "in_memory:grid25",
    "stacked_mnist": "in_memory:stacked_mnist",
    "tinyshakespeare": "text:tinyshakespeare",
    "text": "text:text",
}
