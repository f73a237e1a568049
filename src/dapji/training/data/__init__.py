"""Files of examples to shuffled, packed windows of tokens with masks. Needs no torch.

files          rows with their lines          conventions    rows to examples
encoding       examples to ids and masks      dataset        samples in a folder, by number
permutation, packing, stream                  samples to windows, by a number that is the place in a run
report         what `dapji data check` tells
"""

from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Encoder
from dapji.training.data.reading import Reader, prepare
from dapji.training.data.stream import Stream, Window

__all__ = ["Dataset", "Encoder", "Reader", "Stream", "Window", "prepare"]
