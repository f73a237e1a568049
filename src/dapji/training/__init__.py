"""Adapting models. Knows no server and no terminal.

data           examples to windows of tokens        settings       what a recipe says, strictly
network        a model's weights as parameters      trainer        THE loop: windows, gradients, steps, metrics
loss           cross-entropy in chunks              checkpoints    whole states of a run, written beside it
supervised, preference   methods                    sharding       several processes, one model
methods        what a recipe's [method] becomes     output         what a run leaves, and where it came from
new            a model that has learned nothing yet, with a tokenizer of its own
reference      what the base says of answers        tune           a recipe, put together
log            what a run tells while it goes on      samples        what the model answers meanwhile
report         the page of a run                    writers        other programs' logs
rollouts       answers that the model writes, and what they are worth: by an actor (engine), rewards, for a policy
teacher        what another model thinks of learned tokens, for distillation; answers: its answers as examples

Where methods join: the loop asks a `trainer.Method` for two numbers of a window: what it counts, and the sum of its
losses over that; it divides by the count of all windows of a step, on all ranks and in all micro-batches. What
follows from all windows of a step, a method makes in `begin`. A method asks the network for what it needs of the hidden
states before the learned tokens (`Network.forward` takes a function of hidden states, the head's weight and the cap of
logits): `supervised.losses_of` gives -log p of each learned token, with any gradient flowing back into each, whence
preferences make their own sums; a method with a teacher takes the hidden states themselves.
Where windows come from is a `trainer.Source`: files that were read before, or answers that are generated when a window
is asked for by its number.
"""
