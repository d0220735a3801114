"""Feature maps of tiles that were met lately: regions of a slide overlap, inference meets most tiles four times.

In: batches of one model, on the CPU. Out: the same on its device, with maps beside the pixels. A tile is known by its
pixels: a flip or turn of it is another tile. T tiles, P patches, D image width.
"""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from storm.model.storm import Storm

_LIMIT_BYTES = 2 * 1024**3  # of maps that are kept; a row of regions of a large slide


class TileMaps:
    """Encodes each tile once while it is remembered, the least lately met forgotten first."""

    def __init__(self, model: Storm, device: torch.device, limit_bytes: int = _LIMIT_BYTES) -> None:
        self.model, self.device, self.limit_bytes = model, device, limit_bytes
        self.known: OrderedDict[bytes, Tensor] = OrderedDict()  # [P, D] each
        self.encoded = 0  # tiles so far

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device, with `tile_map` [T, P, D]; zero where the tile's weight is zero."""
        tiles, weight_T = batch["tiles"], batch["tile_weight"]
        keys = [hashlib.blake2b(tile.numpy(), digest_size=16).digest() for tile in tiles]
        self._encode({key: i for i, key in enumerate(keys) if key not in self.known}, tiles)
        maps_TPD = torch.stack([self.known[key] for key in keys]) * weight_T.to(self.device)[:, None, None]
        for key in keys:
            self.known.move_to_end(key)
        self._forget()
        return {name: tensor.to(self.device) for name, tensor in batch.items()} | {"tile_map": maps_TPD}

    def _encode(self, new: dict[bytes, int], tiles: Tensor) -> None:
        if not new:
            return
        some = tiles[list(new.values())].to(self.device)
        maps_TPD, _ = self.model.morphology(some, torch.ones(len(some), device=self.device))
        self.known |= {key: one.clone() for key, one in zip(new, maps_TPD, strict=True)}
        self.encoded += len(new)

    def _forget(self) -> None:
        size = next(iter(self.known.values())).nbytes if self.known else 1
        while len(self.known) * size > self.limit_bytes:
            self.known.popitem(last=False)
