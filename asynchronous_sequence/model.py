"""The MACH: a local network, a joiner of its children's embeddings, a head."""
# Copied from synchronous_single/model.py

import math

import torch
from torch import nn
from torch.nn import functional


class Mach(nn.Module):
    """One learning component with `children` neighbours that feed it.

    The children's embeddings enter late, just before the embedding's relu: fed
    into the first layer beside x, they are ignored.

    Args:
        children: C, how many MACHs answer this one; 0 for none.
        hidden: width of the first hidden layer of the local network; the second
            is half as wide.
        embedding: E, the width of what this MACH answers.
        pixels: width of one flattened image.
        classes: number of target classes.
    """

    def __init__(self, children, hidden, embedding, pixels=784, classes=10):
        super().__init__()
        self.local = nn.Sequential(  # x [B, 784] -> h [B, E]
            nn.Linear(pixels, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden // 2), nn.ReLU(),
            nn.Linear(hidden // 2, embedding))
        # The joiner, inputs [B, C, E] -> joined [B, E]: a weight [E, E] of each
        # child, apart, so that a step with n of them costs no more than these.
        self.joiner = nn.ParameterList()
        for _ in range(children):
            # Starts near a third of the children's mean: what they call a class
            # then means that class from the first step on.
            mean = torch.eye(embedding) / children
            spread = 0.2 / math.sqrt(children * embedding)
            noise = torch.empty_like(mean).uniform_(-spread, spread)
            self.joiner.append(nn.Parameter(0.3 * mean + noise))
        self.head = nn.Linear(embedding, classes)  # d [B, E] -> logits [B, 10]

    def forward(self, x, inputs=None):
        """Embeds x [B, 784] with its children's inputs [B, C, E] -> d [B, E].

        `inputs` may be None where there are no children. This is the answer to
        a Spike, so it is free of dropout whatever the training mode.
        """
        return torch.relu(self.local_part(x) + self.joined_part(inputs))

    # The two summands under the embedding's relu stand apart, because a training
    # step drops units of the first alone, on its own rows, so that the MACH
    # leans on its children. Autocast makes both bfloat16; what is summed, sent
    # and compared with a student's output keeps the precision of the weights.

    def local_part(self, x):
        """x [B, 784] -> h [B, E], what this MACH makes of x by itself."""
        return self.local(x).to(self.head.weight.dtype)

    def joined_part(self, inputs, chosen=None):
        """inputs [B, n, E] -> [B, E], what the children add; 0 without any.

        Each child's embedding is brought to mean 0 and variance 1. That bounds
        the loop of synthetic inputs that mimic answers made from synthetic
        inputs, and no Grad can push a child's embedding to grow or to shift, a
        drift that its parents' students would have to chase.

        Args:
            inputs: [B, n, E].
            chosen: positions of the n children they are of, which then speak
                for all C (times C / n); None for all.
        """
        if not len(self.joiner):
            return 0.0
        parts = list(self.joiner)
        if chosen is not None:
            parts = [self.joiner[position] for position in chosen]
        weight = torch.cat(parts, 1)  # [E, n * E]
        inputs = functional.layer_norm(inputs, inputs.shape[-1:])
        joined = functional.linear(inputs.flatten(1), weight)
        joined = joined.to(self.head.weight.dtype)
        if len(parts) < len(self.joiner):
            joined = joined * (len(self.joiner) / len(parts))
        return joined
