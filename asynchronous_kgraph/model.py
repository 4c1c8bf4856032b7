"""The MACH: a local network, a joiner of its children's embeddings, a head."""
# Copied from synchronous_single/model.py

import torch
from torch import nn
from torch.nn import functional


class Mach(nn.Module):
    """One learning component with `children` neighbours that feed it.

    The children's embeddings enter late, just before the embedding's relu: fed
    into the first layer beside x, they are ignored.

    Args:
        children: C, how many MACHs answer this one; 0 for none.
        hidden: width of the first hidden layer; the second is half as wide.
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
        self.joiner = None  # inputs [B, C * E] -> joined [B, E]
        if children:
            self.joiner = nn.Linear(children * embedding, embedding, bias=False)
            # Starts near a third of the children's mean: what they call a class
            # then means that class from the first step on.
            mean = torch.eye(embedding).repeat(1, children) / children
            self.joiner.weight.data.mul_(0.2).add_(mean, alpha=0.3)
        self.head = nn.Linear(embedding, classes)  # d [B, E] -> logits [B, 10]

    def forward(self, x, inputs=None):
        """x [B, 784], its children's inputs [B, C, E] -> d(x) [B, E].

        This is the answer to a Spike. `inputs` is None where there are none.
        """
        return torch.relu(self.local_part(x) + self.joined_part(inputs))

    # The two summands under the relu stand apart, because a training step drops
    # units of the first alone, so that the MACH leans on its children. Autocast
    # makes both bfloat16; what is sent keeps the precision of x.

    def local_part(self, x):
        """x [B, 784] -> h [B, E], what this MACH makes of x by itself."""
        return self.local(x).to(x.dtype)

    def joined_part(self, inputs):
        """inputs [B, C, E] -> [B, E], what the children add; 0 without any.

        Each embedding is brought to mean 0 and variance 1. That bounds the loop
        of synthetic inputs that mimic answers made from synthetic inputs, and
        keeps Grads from making a child's embedding grow or shift, which its
        parents' students would have to chase.
        """
        if self.joiner is None:
            return 0.0
        normal = functional.layer_norm(inputs, inputs.shape[-1:])
        return self.joiner(normal.flatten(1)).to(inputs.dtype)
