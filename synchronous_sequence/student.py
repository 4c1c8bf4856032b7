"""The student: a small network whose output mimics the children's answers."""

from torch import nn


class Student(nn.Module):
    """Answers in the children's place, so that a step need not wait for them.

    The forward half of a Decoupled Neural Interface (Jaderberg et al. 2017,
    arXiv 1608.05343, section 2.1), one for all the children of a MACH. Only the
    synthetic loss trains it, and that loss trains nothing else.

    Args:
        children: C, how many MACHs it mimics.
        hidden: width of the two hidden layers.
        embedding: E, the width of one child's answer.
        pixels: width of one flattened image.
    """

    def __init__(self, children, hidden, embedding, pixels=784):
        super().__init__()
        self.layers = nn.Sequential(  # x [B, 784] -> [B, C, E]
            nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
            nn.ReLU(), nn.Linear(hidden, children * embedding),
            nn.Unflatten(1, (children, embedding)))

    def forward(self, x):
        """x [B, 784] -> synthetic inputs [B, C, E]; slice j mimics a_j(x)."""
        return self.layers(x).to(x.dtype)


def synthetic_loss(synthetic, real):
    """Mean over the batch of sum_j |synthetic_j - real_j|^2, a scalar.

    Args:
        synthetic: [B, C, E], from the student, with a graph.
        real: [B, C, E], the answers; no gradient reaches the children.
    """
    return (synthetic - real.detach()).square().flatten(1).sum(1).mean()
