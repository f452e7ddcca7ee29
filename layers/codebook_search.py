"""The code that is most similar to a feature. Shapes: M features, K codes, D code
dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.meant_device import is_cpu
from layers.rel_pos_bias import is_exporting

ROWS_PER_CHUNK = 32768  # similarities of this many features at once: 32768 x 8192 in fp32 is 1 GiB
ROWS_IN_CACHE = 256  # on a CPU so few that they stay in its cache: 256 x 8192 is 8 MiB


def nearest_codes(features: Tensor, codes: Tensor) -> Tensor:
    """Unit features (M, D), unit codes (K, D) -> index of the most similar code (M,),
    in chunks of bounded memory.
    """
    if is_exporting():  # the number of chunks would be a constant
        return (features @ codes.t()).argmax(dim=1)
    rows = ROWS_IN_CACHE if is_cpu(features.device) else ROWS_PER_CHUNK
    return torch.cat([(chunk @ codes.t()).argmax(dim=1) for chunk in features.split(rows)])
