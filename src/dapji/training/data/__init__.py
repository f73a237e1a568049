"""Files of examples to shuffled, packed windows of tokens with masks. Needs no torch.

files          rows with their lines          conventions    rows to examples
encoding       examples to ids and masks      dataset        samples in a folder, by number
permutation, packing, stream                  samples to windows, by a number that is the place in a run
report         what `dapji data check` tells
"""
