"""The student: synthetic inputs, made on the spot, that mimic the children."""
# Copied from synchronous_single/student.py

import torch
from torch import nn
from torch.nn import functional


class Student(nn.Module):
    """Answers in the children's place, so that nobody waits for them.

    The forward half of a Decoupled Neural Interface (Jaderberg et al. 2017,
    arXiv 1608.05343, section 2.1), one for all the children of a MACH. It learns
    from the synthetic loss alone, and the synthetic loss touches nothing else.

    Args:
        children: C, how many MACHs are mimicked.
        hidden: width of the hidden layers.
        embedding: E, the width of one child's answer.
        pixels: width of one flattened image.
    """

    def __init__(self, children, hidden, embedding, pixels=784):
        super().__init__()
        self.trunk = nn.Sequential(  # x [B, 784] -> [B, hidden]
            nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
            nn.ReLU())
        self.heads = nn.ModuleList(  # of each child: [B, hidden] -> [B, E]
            nn.Linear(hidden, embedding) for _ in range(children))

    def forward(self, x, chosen=None):
        """x [B, 784] -> synthetic inputs [B, C, E]; slice j mimics d_j(x).

        Args:
            x: [B, 784].
            chosen: positions of n children, whose slices alone are made
                [B, n, E]; None for all.
        """
        heads = list(self.heads)
        if chosen is not None:
            heads = [self.heads[position] for position in chosen]
        # One product for all heads, in place of one for each.
        synthetic = functional.linear(
            self.trunk(x), torch.cat([head.weight for head in heads]),
            torch.cat([head.bias for head in heads]))
        # Nonnegative as the embeddings it mimics, and in their precision.
        synthetic = torch.relu(synthetic.to(heads[0].weight.dtype))
        return synthetic.unflatten(1, (len(heads), -1))


def synthetic_loss(synthetic, real, answered=None):
    """Mean over the batch of the squared distance to the children's answers.

    Args:
        synthetic: [B, C, E], from the student, with a graph.
        real: [B, C, E], the answers; no gradient reaches the children.
        answered: [B, C], 1 where child j answered row b and 0 where its answer
            was lost; None for all.
    Returns:
        A scalar: mean over B of sum_j |synthetic_j - real_j|^2.
    """
    distance = (synthetic - real.detach()).square().sum(-1)  # [B, C]
    if answered is not None:
        distance = distance * answered
    return distance.sum(1).mean()
