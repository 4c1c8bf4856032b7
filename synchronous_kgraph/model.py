"""The network of a MACH: local network, joiner of children's answers, head."""
# Copied from synchronous_single/model.py

import torch
from torch import nn


class Mach(nn.Module):
    """One learning component with `children` neighbours that feed it.

    The children's answers enter late, just before the embedding's relu. If they
    entered the first layer, beside x, the network would learn to ignore them.

    Args:
        children: C, how many MACHs feed this one; 0 for none.
        hidden: width of the first hidden layer; the second is half as wide.
        embedding: E, the width of the embedding and of an answer.
        pixels: width of one flattened image.
        classes: number of target classes.
    """

    def __init__(self, children, hidden, embedding, pixels=784, classes=10):
        super().__init__()
        self.local = nn.Sequential(  # x [B, 784] -> h [B, E]
            nn.Linear(pixels, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden // 2), nn.ReLU(),
            nn.Linear(hidden // 2, embedding))
        self.joiner = None  # inputs [B, C * E] -> [B, E]
        if children:
            self.joiner = nn.Linear(children * embedding, embedding, bias=False)
            # It starts near a third of the children's mean. So a direction that
            # means a class to a child means that class to its parent.
            mean = torch.eye(embedding).repeat(1, children) / children
            with torch.no_grad():
                self.joiner.weight.mul_(0.2).add_(mean, alpha=0.3)
        # d [B, E] -> answer [B, E], without parameters. Parents see neither the
        # scale nor the mean of an embedding, and their Grads push neither.
        self.answer = nn.LayerNorm(embedding, elementwise_affine=False)
        self.head = nn.Linear(embedding, classes)  # d [B, E] -> logits [B, 10]

    def forward(self, x, inputs=None):
        """x [B, 784], the children's answers [B, C, E] -> embedding d [B, E].

        `inputs` is None for a MACH without children.
        """
        return self.join(self.local_part(x), inputs)

    # The forward has two parts, because a training step drops units of h
    # between them. With autocast they compute in bfloat16 and return x's dtype.

    def local_part(self, x):
        """x [B, 784] -> h [B, E], what the local network makes of x."""
        return self.local(x).to(x.dtype)

    def join(self, h, inputs):
        """h [B, E], the children's answers [B, C, E] -> embedding d [B, E]."""
        if self.joiner is not None:
            h = h + self.joiner(inputs.flatten(1)).to(h.dtype)
        return torch.relu(h)
