"""What travels with a model as its proof, in a file beside it: where it came from, and how it behaves.

record        `dapji.json`, part by part, each with its own digest
lineage       the files, data, settings and versions that a model was made of, and its parents' lineages
behaviour     what a model makes of texts before a weight is read: tokens, rendered conversations, stop tokens
replay        what executors give for some passages, and how far it may differ
certificate   the files' hashes, the behaviour and the passages: made here, and the quick part checked at every load
verification  all of it against the files that are there
licences      what the licences of all these ask for

Sits above what opens files and runs engines, below what loads a model to answer. Knows no terminal.
"""
